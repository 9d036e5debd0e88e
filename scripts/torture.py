#!/usr/bin/env python3
"""torture: kills, suspends and cuts off real releasectl processes, then checks that nothing was lost.

    python scripts/torture.py --kills 200 --suspends 40                 on SQLite
    python scripts/torture.py --engine postgresql --kills 1000          on a throwaway PostgreSQL server
    python scripts/torture.py --db postgresql://me@host/ --seed 7       on a server that is there (not restarted)
    python scripts/torture.py child commit:unanswered:2 run-once        one victim, by hand

Three phases, on releases that real `serve` and `run-once` processes drive and stand-in agents
run (scripts/fake_agent.py):

  points   every named fail point, once for each moment: the process kills or suspends itself
           before a commit or request, after it, or when it took place and nobody knows yet
  faults   the database call number N fails, for every N of a small release and every kind of fault
  random   kills, suspensions, lost answers, restarts of agents, while releases of several targets
           go out to shared nodes without end; on PostgreSQL also cut connections, restarts of the
           server, and failovers to a standby that lacks the last commits

Then it compares the tables with what the agents really were sent and ran, prints figures, and
exits with 1 when a figure that must be zero is not; the folder with the evidence is named then.
The seed settles what is tried and when, not how the machine schedules it.

Sections: vocabulary, the child, databases, agents, processes, losses, checks, figures, trials, the
random phase, the command line. releasectl.py and schema.sql are copied first, so that nobody's
editing disturbs a run; TORTURE_PROGRAM names another folder to take them from.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import queue
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(os.environ.get("TORTURE_PROGRAM", ROOT))
sys.path[:0] = [str(PROGRAM), str(ROOT / "scripts")]

import fake_agent  # noqa: E402
from fake_agent import Agent, AgentSpec, Behaviour, Fleet  # noqa: E402

import releasectl as rc  # noqa: E402

# ---------------------------------------------------------------------------
# Vocabulary: what is tried, and the numbers.
# ---------------------------------------------------------------------------

# A moment at which a named point strikes. Points are the methods of Store that make a
# transaction, migrate, and the two requests to agents.
WHENS = {
    "before": "killed: all is written, the commit or request has not left",
    "after": "killed: it took place, and the caller is about to hear of it",
    "unanswered": "killed: it took place at the other end, the answer was not read",
    "lost": "it took place, and the process sees a broken connection in place of the answer",
    "stop-before": "suspended as in before, past the claim's end, then woken",
    "stop-after": "suspended as in after",
    "stop-unanswered": "suspended as in unanswered",
}
REQUESTS = {"dispatch": "dispatching", "query": "querying"}
COUNTING = "count"
CALL = "call"

# What a database call does in place of its work; "lost" does it and fails then.
FAULTS = {
    "sqlite": ("full", "io", "busy", "readonly", "lost", "gone"),
    "postgresql": ("full", "io", "busy", "readonly", "cut", "lost", "gone"),
}
SQLITE_ERRORS = {"full": "database or disk is full", "io": "disk I/O error", "busy": "database is locked",
                 "readonly": "attempt to write a readonly database", "gone": "unable to open database file",
                 "lost": "disk I/O error"}
POSTGRES_ERRORS = {"full": ("53100", "could not extend file: No space left on device"),
                   "io": ("58030", "could not read block 0: Input/output error"),
                   "busy": ("55P03", "canceling statement due to lock timeout"),
                   "readonly": ("25006", "cannot execute UPDATE in a read-only transaction")}
GONE_S = 1.0

# The figures that must be zero, by the kind of a finding.
ZEROS = {
    "lost": "releases lost",
    "counters": "wrong counters",
    "history": "illegal histories",
    "twice": "tasks run twice",
    "overlaps": "overlaps",
    "two": "addresses with two tasks",
    "order": "releases out of order",
    "lower": "lower versions sent",
    "reused": "versions given out again",
    "ids": "task ids of two releases",
    "unproven": "successes without a run of it",
    "untrue": "outcomes that are not the agents'",
    "owners": "writes without the claim",
    "intents": "dispatched before it was written",
    "late": "dispatched after the end",
    "unexplained": "nodes failed without cause",
    "process": "processes that went wrong",
    "traces": "logs with a stack trace",
}
# What nobody can know after a failover: the database that said so is gone, and agents of the
# dialect "tasks" do not tell which version they have. Counted, and no fault.
LEGAL = {
    "lowered": "lower versions after lost higher ones",
    "blind": "successes below lost versions (tasks)",
    "crossed": "overlaps with lost tasks (tasks)",
}
STRICTLY = {"lowered": "lower", "blind": "unproven", "crossed": "overlaps"}  # with --strict

NEXT_OF_RELEASE = {
    "": {"pending"}, "pending": {"running", "paused", "cancelling"},
    "running": {"success", "partial", "failed", "paused", "cancelling"},
    "paused": {"pending", "running", "cancelling"}, "cancelling": {"cancelled"},
}
# pending -> failed: it was sent a higher version meanwhile. success -> failed: the look at the soak's end.
NEXT_OF_NODE = {"": {"pending"}, "pending": {"running", "skipped", "failed"}, "running": {"success", "failed"},
                "success": {"failed"}}
TERMINAL = {"success", "partial", "failed", "cancelled"}
AT_REST = {"success", "failed", "skipped"}

TRIAL_TTL_S = 1.0
CHAOS_TTL_S = 2.0
TRIAL_LIMIT_S = 60.0
END_LIMIT_S = 180.0
CLEAN_STOP_S = 30.0
# A process younger than this may not listen to SIGTERM yet.
YOUNG_S = 3.0
# A machine under load: what the clocks of two processes and the agent may disagree by.
SLACK_S = 0.5
# Of a take-over that waited, for that long, for a write lock in the hands of a suspended process.
LOCKED, LOCKED_S = ", locked out", 0.4
SAID = "torture: "
CLEAN_EXITS = {0, 1, 69, 75}
TRACE = "Traceback (most recent call last)"
# An execute agent without "websites" would drop all its sites: such a release is refused.
PAYLOAD = {"websites": []}
PAYLOAD_FILE = "PAYLOAD_FILE"  # in a Scene's command: the path of a file that holds it


class Spec(NamedTuple):
    """What a child does to itself: POINT:WHEN:COUNT, or call:FAULT:NUMBER, or count:all:0."""
    point: str
    when: str
    count: int

    def __str__(self) -> str:
        return f"{self.point}:{self.when}:{self.count}"


def parse_specs(text: str) -> tuple[Spec, ...]:
    """Reads Specs joined by commas. Raises ValueError."""
    return tuple(map(parse_spec, text.split(",")))


def parse_spec(text: str) -> Spec:
    """Reads a Spec. Raises ValueError."""
    point, when, count = text.split(":")
    if point == CALL and when not in FAULTS["sqlite"] + FAULTS["postgresql"]:
        raise ValueError(f"unknown fault {when}")
    if point not in (CALL, COUNTING) and when not in WHENS:
        raise ValueError(f"unknown moment {when}: known are {', '.join(WHENS)}")
    return Spec(point, when, int(count))


# ---------------------------------------------------------------------------
# The child: runs inside the victim, around releasectl.py, which knows nothing of it. Uses the
# engines' connect(), the methods of Store and AgentClient, and the socket of a request.
# ---------------------------------------------------------------------------


def say(text: str) -> None:
    """Tells the parent, at once and in one piece."""
    os.write(2, f"{SAID}{text}\n".encode())


class Torment:
    """The Specs at work in this process: counts passings, and strikes at the right ones."""

    def __init__(self, specs: Sequence[Spec]):
        self.specs = specs
        self.here = threading.local()  # .point: the method that this thread is in
        self.requests: dict[int, str] = {}  # which request a socket's conversation is at, by its id()
        self.passings: Counter[str] = Counter()
        self.strikes: Counter[Spec] = Counter()
        self.commits: list[int] = []  # numbers of the calls that were a COMMIT
        self.calls = 0
        self.gone_until = 0.0
        self._guard = threading.Lock()

    def point(self) -> str:
        return getattr(self.here, "point", "")

    def is_due(self, point: str, when: str) -> str:
        """Counts a passing of a point; gives the moment of a Spec when this is the one, else ''."""
        with self._guard:
            if when == "after":
                self.passings[point] += 1
            for spec in self.specs:
                if (spec.point, spec.when.removeprefix("stop-")) == (point, when):
                    self.strikes[spec] += 1
                    if self.strikes[spec] == spec.count:
                        say(f"fired {spec}")
                        return spec.when
        return ""

    def pass_by(self, point: str, when: str) -> None:
        """Kills or suspends this process when it is due."""
        due = self.is_due(point, when)
        if due:
            is_stop = due.startswith("stop-")
            os.kill(os.getpid(), signal.SIGSTOP if is_stop else signal.SIGKILL)
            time.sleep(0.05 if is_stop else 60)  # a signal may need a moment

    def call_is_due(self, is_commit: bool) -> str:
        """Counts a call of the database; gives the fault when this one fails, else ''."""
        with self._guard:
            self.calls += 1
            if is_commit:
                self.commits.append(self.calls)
            if time.monotonic() < self.gone_until:
                return "gone"
            for spec in self.specs:
                if spec.point == CALL and spec.count == self.calls:
                    if spec.when == "gone":
                        self.gone_until = time.monotonic() + GONE_S
                    say(f"fired {spec}")
                    return spec.when
        return ""


class TormentedConnection:
    """A connection of the engine's driver whose cursors ask the Torment first."""

    def __init__(self, real: Any, torment: Torment, engine: Any):
        self._real, self._torment, self._engine = real, torment, engine
        self._backend = None if isinstance(engine, rc.SqliteEngine) else _value(real, "SELECT pg_backend_pid()")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def cursor(self) -> TormentedCursor:
        return TormentedCursor(self._real.cursor(), self)

    def around(self, statement: str, run: Callable[[], Any]) -> Any:
        """Runs a statement, or what is to come in its place."""
        torment, point = self._torment, self._torment.point()
        is_commit = statement.strip().upper() == "COMMIT"
        fault = torment.call_is_due(is_commit)
        if fault:
            if fault == "lost":
                run()
            self.fail(fault)
        if not is_commit:
            return run()
        torment.pass_by(point, "before")
        result = run()
        torment.pass_by(point, "unanswered")
        if torment.is_due(point, "lost"):
            self.fail("lost")
        return result

    def fail(self, fault: str) -> None:
        """Raises what the driver raises for this fault, after doing to the connection what it would."""
        if isinstance(self._engine, rc.SqliteEngine):
            if fault in ("full", "io") and self._real.in_transaction:
                self._real.execute("ROLLBACK")  # so does SQLite by itself
            raise sqlite3.OperationalError(SQLITE_ERRORS[fault])
        cursor = self._real.cursor()
        if fault in POSTGRES_ERRORS:
            state, text = POSTGRES_ERRORS[fault]
            cursor.execute(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{state}', MESSAGE = '{text}'; END $$")
        else:
            self._terminate()
            cursor.execute("SELECT 1")
        raise AssertionError("the connection should be gone")

    def _terminate(self) -> None:
        other = _original_connects[type(self._engine)](self._engine, False)
        try:
            _value(other, f"SELECT pg_terminate_backend({self._backend})")
            while _value(other, f"SELECT COUNT(*) FROM pg_stat_activity WHERE pid = {self._backend}"):
                time.sleep(0.005)
        finally:
            other.close()


class TormentedCursor:
    """A cursor of the engine's driver whose execute() goes through its connection."""

    def __init__(self, real: Any, connection: TormentedConnection):
        self._real, self._connection = real, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def execute(self, statement: str, *params: Any) -> Any:
        return self._connection.around(statement, lambda: self._real.execute(statement, *params))


_original_connects = {engine: engine.connect for engine in (rc.SqliteEngine, rc.PostgresEngine)}


def _value(connection: Any, statement: str) -> Any:
    cursor = connection.cursor()
    cursor.execute(statement)
    return cursor.fetchone()[0]


def named_points() -> dict[str, tuple[type, str]]:
    """Gives every named point: where its method lives."""
    methods = [name for name, value in vars(rc.Store).items() if callable(value) and not name.startswith("_")]
    points: dict[str, tuple[type, str]] = {name: (rc.Store, name) for name in methods}
    points["migrate"] = (rc.Database, "migrate")
    points.update({name: (rc.AgentClient, method) for name, method in REQUESTS.items()})
    return points


def install(torment: Torment) -> None:
    """Puts a Torment around the database, the store and the agents' client of this process."""
    for engine, connect in _original_connects.items():
        setattr(engine, "connect", _tormented_connect(torment, connect))  # noqa: B010 - it is a method
    for name, (owner, method) in named_points().items():
        torment_it = _tormented_request if name in REQUESTS else _tormented_method
        setattr(owner, method, torment_it(torment, name, getattr(owner, method)))
    request, receive = rc.AgentClient._request, rc.TimedSocket.recv

    async def noted(self: Any, call: Any, sock: Any, *more: Any, **keywords: Any) -> Any:
        torment.requests[id(sock)] = "dispatch" if call.method == "POST" else "query"
        try:
            return await request(self, call, sock, *more, **keywords)
        finally:
            torment.requests.pop(id(sock))

    async def recv(self: Any, max_bytes: int) -> bytes:
        point = torment.requests.get(id(self.sock), "")  # it has left, its answer is about to be read
        if point and self.received == 0:
            torment.pass_by(point, "unanswered")
            if torment.is_due(point, "lost"):
                raise ConnectionResetError("torture: the answer was lost")
        return bytes(await receive(self, max_bytes))

    rc.AgentClient._request, rc.TimedSocket.recv = noted, recv


def _tormented_connect(torment: Torment, connect: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, create: bool) -> TormentedConnection:
        fault = torment.call_is_due(is_commit=False)
        if fault:
            raise rc.DatabaseError(f"{self}: torture: no connection ({fault})")
        return TormentedConnection(connect(self, create), torment, self)
    return wrapped


def _tormented_method(torment: Torment, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **keywords: Any) -> Any:
        if torment.point():  # within another one, which counts
            return method(*args, **keywords)
        torment.here.point = name
        try:
            result = method(*args, **keywords)
        finally:
            torment.here.point = ""
        torment.pass_by(name, "after")
        return result
    return wrapped


def _tormented_request(torment: Torment, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapped(*args: Any, **keywords: Any) -> Any:
        torment.pass_by(name, "before")
        result = await method(*args, **keywords)
        torment.pass_by(name, "after")
        return result
    return wrapped


def run_child(specs: str, command: Sequence[str]) -> int:
    """Runs a command of releasectl under Specs; gives its exit code."""
    torment = Torment(parse_specs(specs))
    install(torment)
    try:
        return int(rc.main(list(command)))
    finally:
        if torment.specs[-1].point == COUNTING:
            say("counted " + json.dumps({"passings": torment.passings, "calls": torment.calls,
                                         "commits": torment.commits}))


def run_nursery() -> int:
    """Forks victims on request, from a process that has imported all: ten times as fast as exec.

    Reads a JSON object a line, answers {"pid"} to each, and tells {"pid", "code"} of each end.
    Whoever is left when its caller goes away is killed.
    """
    with contextlib.suppress(ImportError):  # as releasectl would when it first connects
        import psycopg  # noqa: F401
    live: set[int] = set()
    rest = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            data = os.read(0, 65536)
            if not data:
                for pid in live:
                    os.kill(pid, signal.SIGKILL)
                return 0
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    return _be_born(**json.loads(line))
                live.add(pid)
                os.write(1, b'{"pid": %d}\n' % pid)
        while live:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            live.discard(pid)
            os.write(1, b'{"pid": %d, "code": %d}\n' % (pid, os.waitstatus_to_exitcode(status)))


def _be_born(spec: str, command: Sequence[str], environment: dict[str, str], log: str) -> int:
    """Is where a forked process begins."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    return run_child(spec, command) if spec else rc.main(command)


# ---------------------------------------------------------------------------
# Databases: where trials and the long run put their tables.
# ---------------------------------------------------------------------------


class SqliteFarm:
    """SQLite files in a folder."""

    name = "sqlite"
    can_cut = can_restart = False

    def __init__(self, folder: Path):
        self._folder = folder
        self._numbers = itertools.count(1)

    def new(self) -> str:
        return f"sqlite:///{self._folder}/torture-{next(self._numbers)}.db"

    def give_back(self, url: str) -> None:
        """Forgets a database that nobody needs to see."""
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(url[len("sqlite:///"):] + suffix)

    def dump(self, url: str, folder: Path) -> None:
        """Keeps a database as evidence."""
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(url[len("sqlite:///"):] + suffix, folder)

    def close(self) -> None:
        pass


class PostgresFarm:
    """Databases on one PostgreSQL server, of ours or given; one of ours may have a standby."""

    name = "postgresql"
    can_cut = True

    def __init__(self, folder: Path, server_url: str = ""):
        self._place = folder
        self._servers = itertools.count(1)
        self._folder = "" if server_url else self._new_folder()
        self._standby = ""  # its folder
        self.standby_url = ""
        self._ports: list[int] = []  # of the first server and its first standby: later ones take them in turn
        self.can_restart = not server_url
        self._server = server_url or self._control("start", "--durable", self._folder)
        self._numbers = itertools.count(1)
        self._guard = threading.Lock()
        self._used: list[str] = []
        self._free: list[str] = []

    def new(self) -> str:
        with self._guard:
            if self._free:
                return self._free.pop()
            name = f"torture_{os.getpid()}_{next(self._numbers)}"
            self._used.append(name)
        self.run(f"CREATE DATABASE {name}")
        return self._server.rsplit("/", 1)[0] + f"/{name}"

    def give_back(self, url: str) -> None:
        """Empties a database for the next one that asks."""
        self.run("DROP SCHEMA public CASCADE", url)
        self.run("CREATE SCHEMA public", url)
        with self._guard:
            self._free.append(url)

    def dump(self, url: str, folder: Path) -> None:
        """Keeps a database as evidence, where pg_dump is there."""
        with open(folder / f"{name_of(url)}.sql", "wb") as file, contextlib.suppress(OSError):
            subprocess.run(["pg_dump", url], stdout=file, stderr=subprocess.DEVNULL, check=False)

    def run(self, statement: str, url: str = "") -> Any:
        """Runs one statement in a session of its own; gives the first value, if there is one."""
        connection = rc.PostgresEngine(url or self._server).connect(create=False)
        try:
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchone()[0] if cursor.description else None
        finally:
            connection.close()

    def cut(self, url: str) -> bool:
        """Ends one session of a database, any but its own; says whether there was one."""
        return bool(self.run("SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE "
                             "datname = current_database() AND pid <> pg_backend_pid() ORDER BY random() "
                             "LIMIT 1) s UNION ALL SELECT false LIMIT 1", url))

    def restart(self) -> None:
        self._control("restart", self._folder)

    def add_standby(self) -> None:
        """Starts a standby of the server, in a new folder."""
        folder = self._new_folder()
        # the port of the first server is free again after the first failover, and so on
        port = [str(one) for one in self._ports if one != port_of(self._server)]
        self.standby_url = self._control("standby", *(["--port", *port] if port else []), self._folder, folder)
        self._standby = folder
        self._ports = self._ports or [port_of(self._server), port_of(self.standby_url)]

    def url_of_all(self, url: str) -> str:
        """Gives the URL of a database wherever the primary is: libpq looks for the one that can be written to."""
        hosts = ",".join("127.0.0.1" for _ in self._ports)
        return (f"postgresql://releasectl@/{name_of(url)}?host={hosts}&port={','.join(map(str, self._ports))}"
                "&target_session_attrs=read-write")

    def url_on_standby(self, url: str) -> str:
        return self.standby_url.rsplit("/", 1)[0] + f"/{name_of(url)}"

    def cut_off_standby(self) -> None:
        """Lets the standby receive nothing more; gives it back when it has applied what it had."""
        self.run("ALTER SYSTEM SET primary_conninfo = ''", self.standby_url)
        self.run("SELECT pg_reload_conf()", self.standby_url)
        self._wait_for_standby("SELECT COUNT(*) = 0 FROM pg_stat_wal_receiver")
        self._wait_for_standby("SELECT COALESCE(pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn(), true)")

    def crash(self) -> None:
        """Stops the primary as a loss of power would."""
        self._control("crash", self._folder)

    def promote(self) -> None:
        """Makes the standby the primary, and forgets the one that crashed."""
        self._control("promote", self._standby)
        self._control("remove", self._folder)
        self._folder, self._standby = self._standby, ""
        self._server, self.standby_url = self.standby_url, ""

    def close(self) -> None:
        if self.can_restart:
            for folder in filter(None, (self._standby, self._folder)):
                self._control("remove", folder)
            return
        for name in self._used:
            with contextlib.suppress(rc.DatabaseError, *rc.PostgresEngine(self._server).error):
                self.run(f"DROP DATABASE {name} WITH (FORCE)")

    def _new_folder(self) -> str:
        return str(self._place / f"server-{next(self._servers)}")

    def _wait_for_standby(self, statement: str) -> None:
        give_up_at = time.monotonic() + 30.0
        while not self.run(statement, self.standby_url):
            if time.monotonic() > give_up_at:
                raise OSError(f"the standby: {statement}: this did not come true")
            time.sleep(0.02)

    @staticmethod
    def _control(*words: str) -> str:
        script = str(ROOT / "scripts" / "postgres.sh")
        done = subprocess.run(["bash", script, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"postgres.sh {words[0]}: {done.stderr.strip()}")
        return done.stdout.strip()


def name_of(url: str) -> str:
    """Gives the name of a URL's database."""
    return urllib.parse.urlsplit(url).path.lstrip("/")


def port_of(url: str) -> int:
    return urllib.parse.urlsplit(url).port or 5432


def knows_many_hosts() -> bool:
    """Says whether the driver takes a URL of several hosts: those that are made of libpq do."""
    with contextlib.suppress(rc.ConfigError):
        return rc.load_postgres_driver().__name__ != "pg8000.dbapi"
    return False


Farm = SqliteFarm  # either; both have the same methods


# Who had the claim when an event was written, noted by the database itself, in order. What comes
# with the first claim is written before it.
AUDIT_TABLE = {
    "sqlite": "CREATE TABLE torture_audit (id INTEGER PRIMARY KEY AUTOINCREMENT, release_id INTEGER, "
              "owner TEXT, fence INTEGER, event TEXT)",
    "postgresql": "CREATE TABLE torture_audit (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, release_id BIGINT, "
                  "owner TEXT, fence BIGINT, event TEXT)",
}
AUDIT_TRIGGERS = {
    "sqlite": (
        """CREATE TRIGGER torture_claims AFTER UPDATE OF claim_fence ON release_tasks
           WHEN NEW.claim_fence <> OLD.claim_fence BEGIN
               INSERT INTO torture_audit (release_id, owner, fence, event)
               VALUES (NEW.id, NEW.claim_owner, NEW.claim_fence, ''); END""",
        """CREATE TRIGGER torture_events AFTER INSERT ON release_events
           WHEN NEW.event NOT IN ('started', 'renumbered') BEGIN
               INSERT INTO torture_audit (release_id, owner, fence, event)
               VALUES (NEW.release_task_id, NEW.actor, 0, NEW.event || ' ' || NEW.id); END"""),
    "postgresql": (
        """CREATE FUNCTION torture_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               INSERT INTO torture_audit (release_id, owner, fence, event)
               VALUES (NEW.id, NEW.claim_owner, NEW.claim_fence, ''); RETURN NULL; END $$""",
        """CREATE FUNCTION torture_event() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               INSERT INTO torture_audit (release_id, owner, fence, event)
               VALUES (NEW.release_task_id, NEW.actor, 0, NEW.event || ' ' || NEW.id); RETURN NULL; END $$""",
        """CREATE TRIGGER torture_claims AFTER UPDATE OF claim_fence ON release_tasks FOR EACH ROW
           WHEN (NEW.claim_fence <> OLD.claim_fence) EXECUTE FUNCTION torture_claim()""",
        """CREATE TRIGGER torture_events AFTER INSERT ON release_events FOR EACH ROW
           WHEN (NEW.event NOT IN ('started', 'renumbered')) EXECUTE FUNCTION torture_event()"""),
}


def set_up_audit(database: rc.Database) -> None:
    """Lets the database note who wrote what under whose claim. Its schema is there."""
    name = database.engine.name
    with database.transaction(write=True) as tx:
        for statement in (AUDIT_TABLE[name], *AUDIT_TRIGGERS[name]):
            tx.execute(statement)


def check_audit(database: rc.Database) -> Iterator[Finding]:
    """Gives every event that a process wrote while another one had the claim."""
    with database.transaction() as tx:
        rows = tx.rows("SELECT id, release_id, owner, fence, event FROM torture_audit ORDER BY id")
    owners: dict[int, tuple[str, int]] = {}
    for _, release_id, owner, fence, event in rows:
        if not event:
            if fence <= owners.get(release_id, ("", 0))[1]:
                yield Finding("owners", f"release {release_id}: fence {fence} after {owners[release_id]}")
            owners[release_id] = (owner, fence)
        elif owner.count(":") == 2 and owner != owners.get(release_id, ("", 0))[0]:
            yield Finding("owners", f"release {release_id}: event {event} is by {owner}, the claim was with "
                                    f"{owners.get(release_id)}")


def check_intents(database: rc.Database, crew: Crew) -> Iterator[Finding]:
    """Gives what an agent runs that the tables do not know to be dispatched; true at any moment."""
    blind_until = crew.losses.blind_until
    begun = {(agent.address, run["version"]) for agent in crew.agents for run in agent.runs[-5:]
             if run["startedAt"] > blind_until}
    with database.transaction() as tx:
        pending = tx.rows("SELECT h.main_ip, r.version FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id "
                          "JOIN release_tasks r ON r.id = n.release_task_id WHERE n.status = 'pending'")
    if crew.losses.blind_until != blind_until:
        return  # a failover came between
    for address, version in begun & {(row[0], row[1]) for row in pending}:
        yield Finding("intents", f"{address} runs version {version}, and its row is pending")


def patiently(action: Callable[[], Any], limit_s: float = 60.0) -> Any:
    """Does what a database may refuse for a while."""
    give_up_at = time.monotonic() + limit_s
    while True:
        try:
            return action()
        except (rc.DatabaseError, rc.StateMoved):
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.05)


# ---------------------------------------------------------------------------
# Agents: the fleet, what each was sent, and what it ran between two restarts.
# ---------------------------------------------------------------------------


def _digest(payload: dict[str, Any]) -> str:
    content = {key: value for key, value in payload.items() if key != "version"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# What a payload is known by, without the version that an execute agent finds in it.
content_of: Callable[[dict[str, Any]], str] = getattr(fake_agent, "payload_sha256", _digest)


class Sent(NamedTuple):
    """A dispatch that an agent read, whatever it did with it."""
    at: float
    task_id: str
    version: int
    content: str


class Run(NamedTuple):
    """What an agent ran; content tells the payload, and so the release."""
    task_id: str
    version: int
    content: str
    began_at: float
    ended_at: float | None
    outcome: str | None


class Loss(NamedTuple):
    """A failover: when the old primary was dead, and which nodes the new one knew to be dispatched to."""
    dead_at: float
    until: float  # what was written down before may still have left until then
    contents: frozenset[str]  # of the releases that survived
    dispatched: frozenset[tuple[str, str]]  # content, address


class Losses:
    """All failovers: what the agents know and no database does any more."""

    def __init__(self) -> None:
        self.all: list[Loss] = []
        self.created_at: dict[str, float] = {}  # when the creation of a content was begun
        self.blind_until = 0.0  # the tables need not know what began before

    def forgot(self, content: str, address: str, at: float, before: float = float("inf")) -> bool:
        """Says whether a dispatch at that time is known to nobody any more, at the time `before`."""
        return any(self._may_have(loss, content) and at <= loss.until and loss.dead_at < before
                   and (content, address) not in loss.dispatched for loss in self.all)

    def vanished(self, content: str) -> bool:
        """Says whether the whole release is."""
        return any(self._may_have(loss, content) and content not in loss.contents for loss in self.all)

    def _may_have(self, loss: Loss, content: str) -> bool:
        return self.created_at.get(content, 0.0) <= loss.dead_at


class Crew:
    """Stand-in agents, one a node, and where their memories end."""

    TWINS = 3  # so many agents have two nodes each, of which one is enabled

    def __init__(self, certs: str | None, protocols: Sequence[str], task_ms: int):
        specs = [AgentSpec(f"127.0.1.{number}", 0, protocol) for number, protocol in enumerate(protocols, 1)]
        self.losses = Losses()
        self._sent: dict[str, list[Sent]] = {spec.address: [] for spec in specs}
        self.fleet = Fleet(certs, specs, task_ms, log_requests=False)
        for agent in self.agents:
            setattr(agent, "handle", self._noting(agent, agent.handle))  # noqa: B010 - it is a method
        self.fleet.start()
        self._ends: dict[str, list[int]] = {agent.address: [] for agent in self.agents}

    @property
    def agents(self) -> list[Agent]:
        return self.fleet.agents

    def enlist(self, store: rc.Store) -> None:
        """Adds a node for each agent."""
        for number, agent in enumerate(self.agents, 1):
            patiently(functools.partial(store.nodes.add, f"edge-{number}", agent.address, agent.port, agent.protocol))

    def enlist_twins(self, store: rc.Store) -> None:
        """Adds, disabled and by hand, a second node for the host of some agents."""
        with store.database.transaction(write=True) as tx:
            for number, agent in enumerate(self.agents[:self.TWINS], 1):
                tx.execute("INSERT INTO nodes (name, main_ip, agent_port, agent_protocol, enabled) "
                           "VALUES (?, ?, ?, ?, 0)", f"twin-{number}", agent.address, agent.port, agent.protocol)

    def restart(self, agent: Agent) -> None:
        """Restarts an agent, and notes what it ran before."""
        def forget() -> None:
            self._ends[agent.address].append(len(agent.runs))
            agent.apply_restart()

        self.fleet.call(forget)

    def sent(self, agent: Agent) -> list[Sent]:
        """Gives what an agent was sent, in order."""
        return self._sent[agent.address][:]

    def runs(self, agent: Agent) -> list[Run]:
        """Gives what an agent ran, in order."""
        runs, sent = agent.runs, self.sent(agent)
        return [Run(run["taskId"], run["version"], run.get("payloadSha256") or self._content_of(run, sent),
                    run["startedAt"], run["finishedAt"], run["outcome"]) for run in runs]

    def lifetimes(self, agent: Agent) -> Iterator[list[Run]]:
        """Gives an agent's runs, a list for each time from one restart to the next."""
        runs, start = self.runs(agent), 0
        for end in [*self._ends[agent.address], len(runs)]:
            yield runs[start:end]
            start = end

    def stop(self) -> None:
        self.fleet.stop()

    @staticmethod
    def _content_of(run: dict[str, Any], sent: Sequence[Sent]) -> str:
        """Gives the content of the last dispatch before a run, for agents that do not note it themselves."""
        found = [one.content for one in sent if one.task_id == run["taskId"] and one.at <= run["startedAt"]]
        return found[-1] if found else ""

    def _noting(self, agent: Agent, handle: Callable[..., None]) -> Callable[..., None]:
        """Gives an agent's handle() that notes each dispatch first."""
        def noted(connection: Any, request: Any) -> None:
            if request.method == "POST":
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the empty body of a ping
                    task = json.loads(request.body)
                    version = task["version"] if agent.protocol == "tasks" else task["payload"]["version"]
                    self._sent[agent.address].append(Sent(
                        time.monotonic(), task.get("taskId") or task["requestId"], version,
                        content_of(task["payload"])))
            handle(connection, request)
        return noted


# ---------------------------------------------------------------------------
# Processes: victims of two births. Every one that was started is ended.
# ---------------------------------------------------------------------------


class Victim:
    """A releasectl process: started by exec as people do, or forked by the nursery as trials do."""

    def __init__(self, name: str, log: Path):
        self.name, self.log = name, log
        self.started_at = time.monotonic()
        self.stopped_until = 0.0
        self.spec = ""
        self.is_ended_by_us = False
        self.process: Any = None

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def exit_code(self) -> int | None:
        """Gives the exit code, negative for a signal; None while it lives."""
        code: int | None = self.process.poll()
        return code

    def send(self, number: int) -> None:
        """Sends a signal to the process, if it still is there."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, limit_s: float) -> int | None:
        """Waits for the end; gives the exit code, None when it did not come."""
        give_up_at = time.monotonic() + limit_s
        while self.exit_code() is None and time.monotonic() < give_up_at:
            time.sleep(0.01)
        return self.exit_code()

    def said(self) -> list[str]:
        """Gives what the child inside told."""
        if not self.log.exists():
            return []
        lines = self.log.read_text(errors="replace").splitlines()
        return [line[len(SAID):] for line in lines if line.startswith(SAID)]

    def fired(self) -> list[Spec]:
        """Gives the Specs that struck."""
        return [parse_spec(line[len("fired "):]) for line in self.said() if line.startswith("fired ")]


class Forked(NamedTuple):
    """A process that the nursery forked, as far as Victim needs one."""
    pid: int
    codes: dict[int, int]

    def poll(self) -> int | None:
        return self.codes.get(self.pid)


class Nursery:
    """The process that forks victims, and what it tells of them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "nursery"],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._born: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._codes: dict[int, int] = {}
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="nursery", daemon=True)
        self._thread.start()

    def fork(self, **what: Any) -> Forked:
        """Gives a new process; see _be_born for what it needs."""
        assert self._process.stdin is not None
        with self._guard:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
            return Forked(self._born.get(timeout=60), self._codes)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._thread.join(30)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                told = json.loads(line)
                if "code" in told:
                    self._codes[told["pid"]] = told["code"]
                else:
                    self._codes.pop(told["pid"], None)  # a number that was used before
                    self._born.put(told["pid"])


class Processes:
    """Starts victims, knows all that live, and ends them whatever happens."""

    def __init__(self, folder: Path, program: Path):
        self._folder, self._program = folder, program
        self._numbers = itertools.count(1)
        self._live: dict[int, Victim] = {}
        self._guard = threading.Lock()
        self._nursery = Nursery()

    def start(self, command: Sequence[str], environment: dict[str, str], spec: str = "") -> Victim:
        """Starts a real `python releasectl.py COMMAND`, or the same in a child with a Spec."""
        victim = self._new(command, spec)
        words = [str(Path(__file__).resolve()), "child", spec] if spec else [str(self._program / "releasectl.py")]
        with open(victim.log, "wb") as log:
            victim.process = subprocess.Popen([sys.executable, *words, *command], stdin=subprocess.DEVNULL,
                                              stdout=log, stderr=log, env={**os.environ, **environment})
        return self._know(victim)

    def fork(self, command: Sequence[str], environment: dict[str, str], spec: str = "") -> Victim:
        """Starts the same from the nursery."""
        victim = self._new(command, spec)
        victim.process = self._nursery.fork(spec=spec, command=list(command), environment=environment,
                                            log=str(victim.log))
        return self._know(victim)

    def close(self) -> None:
        """Ends all."""
        self.end_all()
        self._nursery.close()

    def end_all(self) -> None:
        """Kills what still lives."""
        for victim in list(self._live.values()):
            victim.send(signal.SIGKILL)
            victim.wait(10)

    def forget(self, victim: Victim) -> None:
        """Lets go of a victim that has ended."""
        with self._guard:
            self._live.pop(victim.pid, None)

    def _new(self, command: Sequence[str], spec: str) -> Victim:
        victim = Victim(" ".join(filter(None, [spec, *command])), self._folder / f"{next(self._numbers):05d}.log")
        victim.spec = spec
        return victim

    def _know(self, victim: Victim) -> Victim:
        with self._guard:
            self._live[victim.pid] = victim
        return victim


def environment_for(url: str, certs: str | None, ttl_s: float, **more: object) -> dict[str, str]:
    """Gives the settings of a victim: quick intervals, patient with agents."""
    values: dict[str, object] = {
        "TORTURE_PROGRAM": os.environ["TORTURE_PROGRAM"], "DATABASE_URL": url, "HTTP_ADDR": "127.0.0.1:0",
        "RELEASE_EXECUTOR_INTERVAL_SEC": 0.2, "CLAIM_TTL_SEC": ttl_s, "AGENT_CONNECT_TIMEOUT_SEC": 2,
        "AGENT_REQUEST_TIMEOUT_SEC": 2, "AGENT_RETRIES": 100, "AGENT_CONCURRENCY": 16, "NODE_DEADLINE_SEC": 600}
    if certs is None:
        values["MTLS_ENABLED"] = 0
    else:
        values.update(CONTROL_CERT=f"{certs}/control.crt", CONTROL_KEY=f"{certs}/control.key",
                      CONTROL_CA=f"{certs}/ca.crt")
    values.update(more)
    return {name: str(value) for name, value in values.items()}


# ---------------------------------------------------------------------------
# Checks: the tables against themselves and against what the agents ran.
# ---------------------------------------------------------------------------


class Finding(NamedTuple):
    """Something that must not be: its kind in ZEROS, and what was seen."""
    kind: str
    text: str


class ReleaseRow(NamedTuple):
    id: int
    version: int
    status: str
    total: int
    success: int
    failed: int
    finished_at: str | None
    claim_expires_at: str | None
    content: str


class NodeRow(NamedTuple):
    release_id: int
    node_id: int
    main_ip: str
    protocol: str
    status: str
    error_kind: str
    error_msg: str
    task_id: str


class EventRow(NamedTuple):
    id: int
    release_id: int
    node_id: int | None
    at: str
    event: str
    from_status: str
    to_status: str


class Books(NamedTuple):
    """The tables at one moment."""
    releases: list[ReleaseRow]
    nodes: list[NodeRow]
    events: list[EventRow]


def read_books(database: rc.Database) -> Books:
    """Reads all tables in one transaction, by statements of our own."""
    with database.transaction() as tx:
        return Books(
            [ReleaseRow(*row[:-1], content_of(json.loads(row[-1]))) for row in tx.rows(
                "SELECT id, version, status, total_nodes, success_nodes, failed_nodes, finished_at, "
                "claim_expires_at, payload FROM release_tasks ORDER BY id")],
            [NodeRow(*row) for row in tx.rows(
                "SELECT n.release_task_id, n.node_id, h.main_ip, h.agent_protocol, n.status, n.error_kind, "
                "n.error_msg, n.task_id FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id ORDER BY n.id")],
            [EventRow(*row) for row in tx.rows(
                "SELECT id, release_task_id, node_id, at, event, from_status, to_status FROM release_events "
                "ORDER BY id")])


def check_books(books: Books) -> Iterator[Finding]:
    """Gives what is wrong in the tables by themselves (contract section 3), once all is over."""
    nodes: dict[int, list[NodeRow]] = {}
    for node in books.nodes:
        nodes.setdefault(node.release_id, []).append(node)
    for release in books.releases:
        mine = nodes.get(release.id, [])
        tally = Counter(node.status for node in mine)
        if release.status not in TERMINAL:
            yield Finding("lost", f"release {release.id} is {release.status}, its nodes {dict(tally)}")
        elif set(tally) - AT_REST or release.finished_at is None or release.claim_expires_at is not None:
            yield Finding("lost", f"release {release.id} is {release.status}, and not at its end: {dict(tally)}, "
                                  f"finished {release.finished_at}, claimed until {release.claim_expires_at}")
        if (release.success, release.failed, release.total) != (tally["success"], tally["failed"], len(mine)):
            yield Finding("counters", f"{release}: its rows are {dict(tally)}")
    yield from check_histories(books)
    yield from check_order(books)
    yield from check_addresses(books)
    yield from check_task_ids(books)


def check_histories(books: Books) -> Iterator[Finding]:
    """Gives every break in a chain of events: one event for each change, each change allowed."""
    now = {(release.id, None): release.status for release in books.releases}
    now.update({(node.release_id, node.node_id): node.status for node in books.nodes})
    seen: dict[tuple[int, int | None], str] = {
        key: "" if key[1] is None else "pending" for key in now}
    for event in books.events:
        key = (event.release_id, event.node_id)
        if event.from_status == event.to_status:
            continue  # the freeze, which changes no status
        allowed = (NEXT_OF_RELEASE if event.node_id is None else NEXT_OF_NODE).get(event.from_status, set())
        if event.from_status != seen.get(key):
            yield Finding("history", f"{event} does not follow {seen.get(key)!r}")
        elif event.to_status not in allowed:
            yield Finding("history", f"{event} is no change that the contract knows")
        if event.node_id is not None and seen.get((event.release_id, None)) in TERMINAL:
            yield Finding("late", f"{event} is after the end of its release")
        seen[key] = event.to_status
    for key, status in now.items():
        if seen[key] != status:
            yield Finding("history", f"release {key[0]}, node {key[1]}: its events end at {seen[key]!r}, "
                                     f"its row is {status}")


def check_order(books: Books) -> Iterator[Finding]:
    """Gives releases with a node in common that did not go one after the other, the lowest version first."""
    started: dict[int, int] = {}
    ended: dict[int, int] = {}
    for event in books.events:
        if event.node_id is None and event.to_status == "running":
            started.setdefault(event.release_id, event.id)
        if event.node_id is None and event.to_status in TERMINAL:
            ended[event.release_id] = event.id
    addresses: dict[int, set[str]] = {}
    for node in books.nodes:
        addresses.setdefault(node.release_id, set()).add(node.main_ip)
    ranked = sorted((one for one in books.releases if one.id in started), key=lambda one: one.version)
    for low, high in itertools.combinations(ranked, 2):
        common = addresses.get(low.id, set()) & addresses.get(high.id, set())
        if common and not started[low.id] <= ended.get(low.id, 0) <= started[high.id]:
            yield Finding("order", f"release {high.id} (v{high.version}) began at event {started[high.id]}, release "
                                   f"{low.id} (v{low.version}) was under way from {started[low.id]} to "
                                   f"{ended.get(low.id)}: both have {min(common)}")


def check_addresses(books: Books) -> Iterator[Finding]:
    """Gives every moment of the history at which an address had two running nodes."""
    address_of = {(node.release_id, node.node_id): node.main_ip for node in books.nodes}
    running: dict[str, set[tuple[int, int | None]]] = {}
    for event in books.events:
        if event.node_id is None or event.from_status == event.to_status:
            continue
        key = (event.release_id, event.node_id)
        here = running.setdefault(address_of.get(key, ""), set())
        here.discard(key)
        if event.to_status == "running":
            if here:
                yield Finding("two", f"{event}: at {address_of.get(key)}, where {here} is running")
            here.add(key)


def check_task_ids(books: Books) -> Iterator[Finding]:
    """Gives every task id that rows of two releases, or of two nodes, have."""
    rows: dict[str, NodeRow] = {}
    for node in books.nodes:
        other = rows.setdefault(node.task_id, node) if node.task_id else node
        if other is not node:
            yield Finding("ids", f"{node.task_id} is of {other} and of {node}")


def check_agents(books: Books, crew: Crew) -> Iterator[Finding]:
    """Gives where the tables and the agents disagree, and what was run or sent that must not be."""
    for agent in crew.agents:
        yield from _check_runs(agent, crew)
        yield from _check_lower(agent, crew)
    yield from _check_reuse(crew)
    offset = time.time() - time.monotonic()
    by_address = {agent.address: agent for agent in crew.agents}
    releases = {release.id: release for release in books.releases}
    runs_of = {agent.address: crew.runs(agent) for agent in crew.agents}
    for node in books.nodes:
        agent, release = by_address[node.main_ip], releases[node.release_id]
        yield from NodeCheck(node, release, agent, runs_of[agent.address], crew).findings(offset)


def _check_runs(agent: Agent, crew: Crew) -> Iterator[Finding]:
    """Gives what an agent ran twice, and what it ran beside something else."""
    name, crossed = f"{agent.address} ({agent.protocol})", 0
    for number, runs in enumerate(crew.lifetimes(agent)):
        for (version, content), count in Counter((run.version, run.content) for run in runs).items():
            if count > 1:
                yield Finding("twice", f"{name}, lifetime {number}: version {version} ran {count} times: "
                                       f"{[run for run in runs if (run.version, run.content) == (version, content)]}")
    runs = crew.runs(agent)
    for place, run in enumerate(runs):
        others = [one for one in runs[:place] if one.ended_at is None or one.ended_at > run.began_at]
        crossed += bool(others)
        if others:
            # An execute agent is left alone for a while by whoever sees that the database went back.
            is_lost = agent.protocol == "tasks" and all(
                crew.losses.forgot(one.content, agent.address, one.began_at, run.began_at) for one in others)
            yield Finding("crossed" if is_lost else "overlaps", f"{name}: {run} beside {others}")
    if agent.overlaps > crossed:
        yield Finding("overlaps", f"{name}: the agent counted {agent.overlaps}, its runs show {crossed}")


def _check_lower(agent: Agent, crew: Crew) -> Iterator[Finding]:
    """Gives every version that an agent was sent after a higher one."""
    sent = crew.sent(agent)
    told: set[int] = set()
    for place, one in enumerate(sent):
        higher = [other for other in sent[:place] if other.version > one.version]
        if not higher or one.version in told:
            continue
        told.add(one.version)
        known = [other for other in higher
                 if not crew.losses.forgot(other.content, agent.address, other.at, one.at)]
        yield Finding("lower" if known else "lowered", f"{agent.address} ({agent.protocol}) was sent {one} after "
                                                       f"{(known or higher)[-1]}")


def _check_reuse(crew: Crew) -> Iterator[Finding]:
    """Gives every version that stood for two payloads, and every task id that did."""
    versions: dict[int, dict[str, str]] = {}
    task_ids: dict[str, dict[str, str]] = {}
    for agent in crew.agents:
        for one in crew.sent(agent):
            versions.setdefault(one.version, {}).setdefault(one.content, f"{agent.address} {one}")
            task_ids.setdefault(one.task_id, {}).setdefault(one.content, f"{agent.address} {one}")
    for kind, uses in (("reused", versions), ("ids", task_ids)):
        for name, contents in uses.items():
            if len(contents) > 1:
                yield Finding(kind, f"{name} was sent with {len(contents)} payloads: {list(contents.values())}")


def check_created(books: Books, crew: Crew, created: Iterable[str]) -> Iterator[Finding]:
    """Gives the releases whose creation was confirmed, that no failover took, and that are not there."""
    there = {release.content for release in books.releases}
    for content in created:
        if content not in there and not crew.losses.vanished(content):
            yield Finding("lost", f"the release with the payload {content} is not there")


class NodeCheck:
    """One node of one release against what the agent at its address was sent and ran."""

    def __init__(self, node: NodeRow, release: ReleaseRow, agent: Agent, runs: Sequence[Run], crew: Crew):
        self.node, self.release, self.agent = node, release, agent
        self._runs, self._crew, self._losses = runs, crew, crew.losses
        self._mine = [run for run in runs if (run.version, run.content) == (release.version, release.content)]
        self._name = (f"release {release.id} (v{release.version}), node {node.main_ip} ({agent.protocol}) "
                      f"is {node.status}")

    def findings(self, offset: float) -> Iterator[Finding]:
        """Gives what is wrong; offset is what the wall clock is ahead of the monotonic one."""
        if self.node.status == "success" and not any(run.outcome == "success" for run in self._mine):
            yield Finding("blind" if self._is_blind() else "unproven",
                          f"{self._name}, and the agent never applied it: {self._mine}, at last {self._runs[-3:]}")
        known = [run for run in self._mine
                 if not self._losses.forgot(run.content, self.node.main_ip, run.began_at)]
        if self.node.status in ("skipped", "pending") and known:
            yield Finding("untrue", f"{self._name}, and the agent ran it: {known}")
        if self.node.status == "failed" and not self._is_explained():
            yield Finding("unexplained", f"{self._name}: {self.node.error_kind}, {self.node.error_msg}; "
                                         f"it ran {self._mine}")
        if self.release.finished_at and self.node.error_kind != "abandoned":
            ended = rc.epoch_of(self.release.finished_at) + SLACK_S
            late = [run for run in known if run.began_at + offset > ended]
            if late:
                yield Finding("late", f"{self._name}, and the agent began {late} after {self.release.finished_at}")

    def _higher(self) -> list[Sent]:
        """Gives the higher versions that the agent was sent before this release for the last time."""
        sent = self._crew.sent(self.agent)
        last = max((one.at for one in sent if one.content == self.release.content), default=float("inf"))
        return [one for one in sent if one.version > self.release.version and one.at < last]

    def _is_blind(self) -> bool:
        """Says whether the agent had a higher version that only lost commits knew of, and told nobody."""
        higher = self._higher()
        return self.agent.protocol == "tasks" and bool(higher) and all(
            self._losses.forgot(one.content, self.node.main_ip, one.at) for one in higher)

    def _is_explained(self) -> bool:
        """Says whether there is a cause for the failure."""
        if self.node.error_kind == "rejected":  # a higher version, or one that it has before anybody knew of it
            return bool(self._higher()) or any(
                self._losses.forgot(run.content, self.node.main_ip, run.began_at) for run in self._mine)
        if self.node.error_msg.endswith("(not tried again: the release ends)"):  # no answer yet, and none waited for
            return self.release.status in ("failed", "cancelled") and not self._mine
        return {"agent_failed": any(run.outcome == "failed" for run in self._mine),
                "abandoned": self.release.status in ("failed", "cancelled")}.get(self.node.error_kind, False)


# ---------------------------------------------------------------------------
# Figures.
# ---------------------------------------------------------------------------


class Figures:
    """What was done and what was found, counted from many threads."""

    def __init__(self, engine: str, seed: int, is_strict: bool = False):
        self.engine, self.seed, self.is_strict = engine, seed, is_strict
        self.started_at = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.points: dict[str, Counter[str]] = {}
        self.faults: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()
        self.phases: dict[str, float] = {}
        self.findings: list[Finding] = []
        self.unknowable: list[Finding] = []  # of a kind in LEGAL
        self.take_overs: dict[str, list[float]] = {
            cause + state: [] for state in ("", LOCKED) for cause in ("kill", "suspension")}
        self._guard = threading.Lock()

    def count(self, name: str, number: int = 1) -> None:
        with self._guard:
            self.counts[name] += number

    def fired(self, spec: Spec) -> None:
        """Counts a Spec that struck."""
        with self._guard:
            if spec.point == CALL:
                self.faults[spec.when] += 1
            else:
                self.points.setdefault(spec.point, Counter())[spec.when] += 1

    def find(self, findings: Iterable[Finding], where: str) -> bool:
        """Keeps findings, counts what is legal; says whether there were any of those that must not be."""
        with self._guard:
            found = []
            for kind, text in findings:
                finding = Finding(STRICTLY.get(kind, kind) if self.is_strict else kind, f"{where}: {text}")
                if finding.kind in LEGAL:
                    self.counts[LEGAL[kind]] += 1
                    self.unknowable.append(finding)
                elif finding not in self.findings:
                    found.append(finding)
                    self.findings.append(finding)
        for finding in found:
            logging.error("%s: %s", ZEROS[finding.kind], finding.text)
        return bool(found)

    def zeros(self) -> dict[str, int]:
        found = Counter(finding.kind for finding in self.findings)
        return {name: found[kind] for kind, name in ZEROS.items()}

    def document(self) -> dict[str, Any]:
        """Gives all figures as one JSON object."""
        return {
            "engine": self.engine, "seed": self.seed, "seconds": round(time.monotonic() - self.started_at, 1),
            "phases": {name: round(seconds, 1) for name, seconds in self.phases.items()},
            "counts": dict(sorted(self.counts.items())), "points": self.points, "faults": dict(self.faults),
            "exits": dict(self.exits), "zeros": self.zeros(),
            "takeOverS": {cause: quantiles(times) for cause, times in self.take_overs.items()},
            "claimTtlS": CHAOS_TTL_S, "findings": [finding._asdict() for finding in self.findings[:200]],
            "unknowable": [finding._asdict() for finding in self.unknowable[:200]]}

    def table(self) -> str:
        """Gives all figures for people."""
        document = self.document()
        lines = [("engine, seed", f"{self.engine}, {self.seed}"),
                 ("seconds", f"{document['seconds']} ({self._pairs(document['phases'])})"),
                 *document["counts"].items(),
                 ("faults of the database", self._pairs(document["faults"]))]
        lines += [(f"point {name}", self._pairs(tried)) for name, tried in sorted(self.points.items())]
        lines += [(f"take-over after a {cause}, s", f"{self._pairs(figures)} (CLAIM_TTL_SEC {CHAOS_TTL_S:g})")
                  for cause, figures in document["takeOverS"].items() if figures]
        lines += [("exit codes of their own", self._pairs(document["exits"])),
                  *((f"{name} (0)", count) for name, count in document["zeros"].items())]
        return "\n".join(f"{name:<34} {value}" for name, value in lines)

    @staticmethod
    def _pairs(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Gives how many there are, the median, the 99th percentile and the largest."""
    ranked = sorted(times)
    if not ranked:
        return {}
    return {"number": len(ranked), "median": round(ranked[len(ranked) // 2], 2),
            "p99": round(ranked[min(len(ranked) - 1, int(len(ranked) * 0.99))], 2), "largest": round(ranked[-1], 2)}


# ---------------------------------------------------------------------------
# Trials: one small release, one Spec, in a database of its own; many at a time.
# ---------------------------------------------------------------------------


class World(NamedTuple):
    """What every phase works with."""
    farm: Any
    certs: str | None
    processes: Processes
    figures: Figures
    folder: Path
    random: random.Random


class Scene(NamedTuple):
    """A kind of trial: the victim's command, and what the world is like before."""
    command: tuple[str, ...]
    protocols: tuple[str, ...] = ("tasks", "tasks", "execute")
    task_ms: int = 80
    before: str = "created"  # "": an empty database; "nodes"; "created"; "cancelled"
    settings: tuple[tuple[str, object], ...] = ()
    also: str = ""  # a Spec that comes first
    outcome: str = "success"


DRAIN = Scene(("run-once", "--drain"))
SERVE = Scene(("serve",))
# Tasks longer than a third of the claim, for renewals.
SLOW = Scene(("run-once", "--drain"), task_ms=700)
# A tick that leaves with tasks in flight, for let_go.
TICK = Scene(("run-once",), protocols=("tasks", "tasks"), task_ms=900, settings=(
    ("RELEASE_EXECUTOR_INTERVAL_SEC", 0.1),))
# Where each point is passed; DRAIN for all others.
SCENES = {
    "migrate": Scene(("run-once", "--drain"), before=""),
    "renew": SLOW,
    "let_go": TICK,
    "create_release": Scene(("create", "--reason", "torture", "--payload", PAYLOAD_FILE), before="nodes"),
    "was_written": Scene(("run-once", "--drain"), also="commit:lost:1"),
    "act": Scene(("cancel", "1")),
    "retry": Scene(("retry", "1"), before="cancelled"),
    "set_first_version": Scene(("migrate", "--first-version", "50")),
}
# Points that no executor passes, and that no command of one release does either.
NO_SCENE = {"add_node", "add_nodes", "node", "node_named", "nodes", "update_node", "delete_node", "rollback",
            "release_with_nodes", "releases", "events", "counts", "probe", "plan_release", "progress", "freeze",
            "set_freeze", "last_releases", "open_releases", "release", "moment", "tell", "exceeded", "plan_again",
            "times_ahead", "old_releases", "forget"}


# Points that are tried once more with tasks that a new owner finds still running, and that end as failed:
# such a one an agent would run again under another id.
LONG = Scene(("run-once", "--drain"), ("tasks", "tasks"), 2200, outcome="failed")
LONG_POINTS = ("commit", "dispatch", "query", "claim", "renew")
# Points that change nothing.
READING = {"look", "obstacles", "holds", "claimed_release", "claimed_release_with_nodes", "find_release"}


class Trial:
    """One run of a scene under a Spec: strike, rescue, check."""

    def __init__(self, world: World, scene: Scene, spec: Spec):
        self.world, self.scene, self.spec = world, scene, spec
        self.name = f"{spec} {' '.join(scene.command)}"
        self.began_at = time.monotonic()
        self.ends_at = self.began_at + TRIAL_LIMIT_S
        self.counted: dict[str, Any] = {}
        self.fired = False
        self._victims: list[Victim] = []
        self._findings: list[Finding] = []

    def run(self) -> Trial:
        url = self.world.farm.new()
        crew = Crew(self.world.certs, self.scene.protocols, self.scene.task_ms)
        database = rc.Database(url)
        try:
            self._set_the_scene(rc.Store(database), crew)
            self._play(rc.Store(database), crew, environment_for(
                url, self.world.certs, TRIAL_TTL_S, AGENT_REQUEST_TIMEOUT_SEC=1, **dict(self.scene.settings)))
            books = read_books(database)
            self._findings += [*check_books(books), *check_agents(books, crew), *check_audit(database),
                               *self._check_end(books, crew)]
        except Exception as error:  # the edge of a trial: the others go on
            logging.exception("%s", self.name)
            self._findings.append(Finding("process", f"the trial itself failed: {error!r}"))
        finally:
            for victim in self._victims:
                victim.send(signal.SIGKILL)
                victim.wait(10)
                self.world.processes.forget(victim)
                self._findings += check_log(victim)
            crew.stop()
            database.close()
        self._clear_up(url)
        logging.info("%.1f s: %s", time.monotonic() - self.began_at, self.name)
        return self

    def _set_the_scene(self, store: rc.Store, crew: Crew) -> None:
        if not self.scene.before:
            return
        store.database.migrate()
        set_up_audit(store.database)
        crew.enlist(store)
        if self.scene.before != "nodes":
            store.releases.create(rc.ReleaseRequest(reason="torture", payload=PAYLOAD), "torture")
        crew.fleet.set(outcome=self.scene.outcome)
        if self.scene.before == "cancelled":
            store.releases.act("cancel", 1, "torture")

    def _play(self, store: rc.Store, crew: Crew, environment: dict[str, str]) -> None:
        victim = self._start(self.scene.command, environment, ",".join(filter(None, [
            self.scene.also, str(self.spec)])))
        self._watch(victim, store)
        self.fired = self.spec in victim.fired()
        if self.fired:
            self.world.figures.fired(self.spec)
        if not self.scene.before:
            self._finish_the_scene(victim, store, crew)
        self._findings += patiently(lambda: list(check_intents(store.database, crew)))
        self._rescue(victim, store, environment)
        self._release(victim)
        self._rescue(victim, store, environment)  # a victim that was woken may have brought more to do
        for line in victim.said():
            if line.startswith("counted "):
                self.counted = json.loads(line[len("counted "):])

    def _start(self, command: Sequence[str], environment: dict[str, str], spec: str = "") -> Victim:
        payload = str(self.world.folder / "payload.json")
        words = [payload if word == PAYLOAD_FILE else word for word in command]
        victim = self.world.processes.fork(words, environment, spec)
        self._victims.append(victim)
        return victim

    def _watch(self, victim: Victim, store: rc.Store) -> None:
        """Waits until the victim has ended, is suspended, or has done its work."""
        is_server = self.scene.command[0] == "serve"
        while victim.exit_code() is None and time.monotonic() < self.ends_at:
            if self.spec.when.startswith("stop-") and self.spec in victim.fired():
                return
            if is_server and self._is_over(store):
                victim.send(signal.SIGTERM)
                victim.wait(CLEAN_STOP_S)
                return
            time.sleep(0.02)

    @staticmethod
    def _finish_the_scene(victim: Victim, store: rc.Store, crew: Crew) -> None:
        """Adds, after a migration that was cut short, what the other scenes have from the start."""
        time.sleep(TRIAL_TTL_S / 2)
        victim.send(signal.SIGCONT)
        patiently(store.database.migrate)
        patiently(lambda: set_up_audit(store.database))
        crew.enlist(store)
        patiently(lambda: store.releases.create(rc.ReleaseRequest(reason="torture", payload=PAYLOAD), "torture"))

    def _rescue(self, victim: Victim, store: rc.Store, environment: dict[str, str]) -> None:
        """Lets fresh processes end the release, as the next tick of cron would."""
        while not self._is_over(store) and time.monotonic() < self.ends_at:
            time.sleep(min(max(self._claimed_for_s(store), 0.0), TRIAL_TTL_S))
            rescuer = self._start(("run-once", "--drain"), environment)
            code = rescuer.wait(max(self.ends_at - time.monotonic(), 0.1))
            if code not in CLEAN_EXITS:
                self._findings.append(Finding("process", f"the rescuer ended with {code}: {_tail(rescuer.log)}"))
                return
            if code == rc.EXIT_UNAVAILABLE:
                victim.send(signal.SIGCONT)  # on SQLite a suspended writer keeps everyone out
            if code != rc.EXIT_DONE:
                time.sleep(0.1)

    def _release(self, victim: Victim) -> None:
        """Wakes a suspended victim, which must end by itself, and looks how it ended."""
        victim.send(signal.SIGCONT)
        code = victim.wait(CLEAN_STOP_S)
        is_killed = self.fired and self.spec.when in ("before", "after", "unanswered")
        if (is_killed and code != -signal.SIGKILL) or (not is_killed and code not in CLEAN_EXITS):
            self._findings.append(Finding("process", f"it ended with {code}: {_tail(victim.log)}"))

    def _is_over(self, store: rc.Store) -> bool:
        def look() -> bool:
            with store.database.transaction() as tx:
                return not tx.value("SELECT COUNT(*) FROM release_tasks WHERE status NOT IN "
                                    "('success', 'partial', 'failed', 'cancelled')")
        return bool(patiently(look))

    @staticmethod
    def _claimed_for_s(store: rc.Store) -> float:
        """Gives how long the latest claim stands if nobody renews it."""
        def look() -> str:
            with store.database.transaction() as tx:
                return tx.value("SELECT MAX(claim_expires_at) FROM release_tasks") or ""
        expires = patiently(look)
        return rc.epoch_of(expires) - time.time() if expires else 0.0

    def _check_end(self, books: Books, crew: Crew) -> Iterator[Finding]:
        """Gives what a release to agents that behave may not end as."""
        wanted = {"success", "cancelled"} if self.scene.command[0] in ("cancel", "retry") else {self.scene.outcome}
        for release in books.releases:
            if release.status not in wanted:
                yield Finding("lost", f"release {release.id} ended as {release.status}: "
                                      f"{[n for n in books.nodes if n.status == 'failed']}")
        took_place = self.fired and self.spec.when in ("after", "unanswered", "lost", "stop-before", "stop-after",
                                                       "stop-unanswered")
        if self.spec.point in ("create_release", "retry"):
            expected = int(self.spec.point == "retry") + int(took_place or not self.fired)
            if len(books.releases) != expected:
                yield Finding("lost", f"{len(books.releases)} releases, {expected} were created")
        elif self.scene.before == "created" and self.scene.command[0] != "cancel":
            for agent in crew.agents:
                if len(agent.runs) != 1 and self.scene.outcome == "success":
                    yield Finding("twice" if agent.runs else "untrue", f"{agent.address} ran {agent.runs}")

    def _clear_up(self, url: str) -> None:
        is_bad = self.world.figures.find(self._findings, self.name)
        if not is_bad:
            for victim in self._victims:
                with contextlib.suppress(FileNotFoundError):
                    victim.log.unlink()
            self.world.farm.give_back(url)
            return
        folder = self.world.folder / "trials" / self.name.replace(" ", "_").replace(":", "-")
        folder.mkdir(parents=True, exist_ok=True)
        self.world.farm.dump(url, folder)
        for number, victim in enumerate(self._victims):
            shutil.copy(victim.log, folder / f"{number}-{victim.log.name}")


def check_log(victim: Victim) -> Iterator[Finding]:
    """Gives the stack traces in a log, as one finding: whatever happens, one line says it."""
    text = victim.log.read_text(errors="replace") if victim.log.exists() else ""
    count, at = text.count(TRACE), text.find(TRACE)
    if count:
        yield Finding("traces", f"{victim.name}: {count}, the first: {text[max(at - 300, 0):at + 3000]}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-600:] if log.exists() else ""


def play_trials(world: World, trials: Iterable[tuple[Scene, Spec]], at_once: int, ends_at: float) -> list[Trial]:
    """Runs trials, some at a time; those that could not begin in time are left out."""
    def play(scene: Scene, spec: Spec) -> Trial | None:
        if time.monotonic() > ends_at:
            world.figures.count("trials left out for time")
            return None
        world.figures.count("trials")
        return Trial(world, scene, spec).run()

    pool = ThreadPoolExecutor(at_once)
    try:
        return [trial for trial in pool.map(lambda one: play(*one), trials) if trial is not None]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # all are done, or we were told to stop


def count_passings(world: World, scenes: Iterable[Scene]) -> dict[Scene, dict[str, Any]]:
    """Gives what a release in each scene passes when nothing is done to it."""
    spec = Spec(COUNTING, "all", 0)
    return {scene: Trial(world, scene, spec).run().counted for scene in scenes}


def point_trials(world: World, deepest: int, whens: Sequence[str]) -> list[tuple[Scene, Spec]]:
    """Gives the trials of all named points: every moment, up to the passing number `deepest`."""
    points = [name for name in named_points() if name not in NO_SCENE]
    scenes = {name: SCENES.get(name, DRAIN) for name in points}
    counted = count_passings(world, set(scenes.values()))
    trials = [(LONG, Spec(name, when, 1 if name != "commit" else world.random.randint(1, 2)))
              for name, when in itertools.product(LONG_POINTS, whens)]
    for name, when in itertools.product(points, whens):
        if name in READING and when.startswith("stop-"):
            continue  # as good as being slow
        passings = counted[scenes[name]].get("passings", {}).get(name, 0)
        if not passings:
            world.figures.points[name] = Counter({"not passed by any scene": 0})
        depths = range(1, min(passings, deepest) + 1) if deepest > 1 else [world.random.randint(1, max(passings, 1))]
        trials += [(scenes[name], Spec(name, when, depth)) for depth in depths if passings]
    world.random.shuffle(trials)
    return trials


def play_points(world: World, deepest: int, whens: Sequence[str], at_once: int, ends_at: float) -> None:
    """Plays all point trials; a moment that its lot did not meet once more, at the first passing."""
    trials = point_trials(world, deepest, whens)
    play_trials(world, trials, at_once, ends_at)

    def missed() -> list[tuple[Scene, Spec]]:
        first = {(scene, spec._replace(count=1)): None for scene, spec in trials}
        return [(scene, spec) for scene, spec in first if not world.figures.points.get(spec.point, {}).get(spec.when)]

    play_trials(world, missed(), at_once, ends_at)
    world.figures.count("points that were not reached", len(missed()))


def fault_trials(world: World, every: bool, at_most: int) -> list[tuple[Scene, Spec]]:
    """Gives the trials of database calls that fail: each call, each kind (or one kind each)."""
    scenes = [Scene((*scene.command,), ("tasks", "execute"), 30) for scene in (DRAIN, SERVE)]
    counted = count_passings(world, scenes)
    trials = []
    for scene in scenes:
        calls, commits = counted[scene].get("calls", 0), set(counted[scene].get("commits", ()))
        for number in range(1, calls + 1):
            kinds = [kind for kind in FAULTS[world.farm.name] if kind != "lost" or number in commits]
            trials += [(scene, Spec(CALL, kind, number))
                       for kind in (kinds if every else [world.random.choice(kinds)])]
    world.random.shuffle(trials)
    return trials[:at_most] if at_most else trials


# ---------------------------------------------------------------------------
# The random phase: a few processes on one database, releases without end.
# ---------------------------------------------------------------------------


class Wanted(NamedTuple):
    """How much of it."""
    kills: int
    suspends: int
    restarts: int
    failovers: int
    seconds: float
    nodes: int


class Orphan(NamedTuple):
    """A claim whose owner was killed or suspended: who will take it over, and when."""
    fence: int
    since: float
    cause: str
    pid: int
    locked_s: float = 0.0  # for how long nobody at all could write meanwhile


class TakeOvers:
    """Watches claims: how long an orphan stays one.

    A process that is suspended within a transaction keeps all others from writing, on SQLite until
    it is woken, on PostgreSQL until the server ends its session: such a wait is told apart.
    """

    def __init__(self, database: rc.Database, crew: Crew, figures: Figures):
        self._database, self._crew, self._figures = database, crew, figures
        self._orphans: dict[int, Orphan] = {}
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._looked_at = time.monotonic()
        self._probe: sqlite3.Connection | None = None
        self._thread = threading.Thread(target=self._watch, name="take-overs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(30)

    def owners(self) -> dict[int, list[tuple[int, int]]]:
        """Gives the claims that stand, by the owner's process id: release and fence."""
        owners: dict[int, list[tuple[int, int]]] = {}
        with self._database.transaction() as tx:
            for release_id, owner, fence in tx.rows("SELECT id, claim_owner, claim_fence FROM release_tasks "
                                                    "WHERE claim_expires_at IS NOT NULL"):
                owners.setdefault(int(owner.split(":")[1]), []).append((release_id, fence))
        return owners

    def orphaned(self, pid: int, cause: str, since: float) -> None:
        """Notes the claims of a process that can't act any more."""
        with contextlib.suppress(rc.DatabaseError):
            for release_id, fence in self.owners().get(pid, []):
                with self._guard:
                    self._orphans.setdefault(release_id, Orphan(fence, since, cause, pid))

    def woken(self, pid: int) -> None:
        """Forgets the claims of a process that goes on."""
        with self._guard:
            kept = {key: orphan for key, orphan in self._orphans.items() if orphan.pid != pid}
            self._figures.count("suspended owners woken before a take-over", len(self._orphans) - len(kept))
            self._orphans = kept

    def disturbed(self) -> None:
        """Forgets all: the server went away meanwhile."""
        with self._guard:
            self._orphans = {}

    def _watch(self) -> None:
        while not self._stopped.wait(0.025):
            try:
                self._note_lock()
                self._look()
            except rc.DatabaseError:
                self.disturbed()
        if self._probe is not None:
            self._probe.close()

    def _note_lock(self) -> None:
        """Adds the time since the last look to every orphan's, if somebody keeps the write lock."""
        now = time.monotonic()
        passed_s, self._looked_at = now - self._looked_at, now
        if self._orphans and self._is_locked():
            with self._guard:
                self._orphans = {key: orphan._replace(locked_s=orphan.locked_s + passed_s)
                                 for key, orphan in self._orphans.items()}

    def _is_locked(self) -> bool:
        engine = self._database.engine
        if not isinstance(engine, rc.SqliteEngine):
            with self._database.transaction() as tx:
                return not tx.value("SELECT pg_try_advisory_xact_lock(?)", rc.PG_LOCK_KEY)
        if self._probe is None:
            self._probe = sqlite3.connect(engine.path, timeout=0, isolation_level=None)
        try:
            self._probe.execute("BEGIN IMMEDIATE")
            self._probe.execute("ROLLBACK")
            return False
        except sqlite3.OperationalError:
            return True

    def _look(self) -> None:
        self._figures.find(check_intents(self._database, self._crew), "meanwhile")
        with self._database.transaction() as tx:
            rows = tx.rows("""
                SELECT r.id, r.claim_fence, r.claim_expires_at IS NULL, r.success_nodes, r.failed_nodes,
                       (SELECT COUNT(*) FROM release_task_nodes n
                        WHERE n.release_task_id = r.id AND n.status = 'success'),
                       (SELECT COUNT(*) FROM release_task_nodes n
                        WHERE n.release_task_id = r.id AND n.status = 'failed')
                FROM release_tasks r
                WHERE r.id > (SELECT MAX(id) FROM release_tasks) - 40""")
            two = tx.rows("SELECT h.main_ip, h.agent_port, COUNT(*), MIN(n.release_task_id), MAX(n.release_task_id) "
                          "FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id WHERE n.status = 'running' "
                          "GROUP BY h.main_ip, h.agent_port HAVING COUNT(*) > 1")
            unnamed = tx.rows("SELECT release_task_id, node_id FROM release_task_nodes "
                              "WHERE status = 'running' AND (task_id = '' OR started_at IS NULL OR attempts = 0)")
        self._figures.find([Finding("two", f"{row[0]}:{row[1]} has {row[2]} running rows, of releases {row[3]} "
                                           f"and {row[4]}") for row in two], "meanwhile")
        if unnamed:
            self._figures.find([Finding("history", f"running without task_id, started_at or attempts: {unnamed}")],
                               "meanwhile")
        now = time.monotonic()
        for release_id, fence, is_free, success, failed, real_success, real_failed in rows:
            if (success, failed) != (real_success, real_failed):
                self._figures.find([Finding("counters", f"release {release_id}: {success}, {failed} in place of "
                                                        f"{real_success}, {real_failed}")], "meanwhile")
            with self._guard:
                orphan = self._orphans.get(release_id)
                if orphan is None or (fence == orphan.fence and not is_free):
                    continue
                del self._orphans[release_id]
            if fence > orphan.fence:
                cause = orphan.cause + (LOCKED if orphan.locked_s > LOCKED_S else "")
                self._figures.take_overs[cause].append(now - orphan.since)
                self._figures.count("take-overs")


class Creator:
    """Creates releases as long as few are under way; pauses, resumes and cancels some.

    Each has a payload of its own, by which agents and tables are compared, and a target by lot: any
    target's releases may go to any node.
    """

    TARGETS = ("cdn", "dns", "waf", "cache")
    AT_ONCE = 5

    def __init__(self, url: str, crew: Crew, figures: Figures, seed: int):
        self._url, self._crew, self._figures, self._random = url, crew, figures, random.Random(seed)
        self.store = rc.Store(rc.Database(url))
        self.created: list[str] = []  # the contents of those that were confirmed
        self.refusal = ""  # the last one
        self._marks = itertools.count(1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="creator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60)
        self.store.database.close()

    def forget(self) -> None:
        """Goes on as a process would that begins now, and has seen no version yet."""
        old, self.store = self.store, rc.Store(rc.Database(self._url))
        old.database.close()

    def resume_all(self) -> None:
        for release_id, status in self.open_releases():
            if status == "paused":
                self._act("resume", release_id)

    def open_releases(self) -> list[tuple[int, str]]:
        """Gives the releases that are not at their end, and their status."""
        with self.store.database.transaction() as tx:
            return [(row[0], row[1]) for row in tx.rows(
                "SELECT id, status FROM release_tasks WHERE status NOT IN "
                "('success', 'partial', 'failed', 'cancelled') ORDER BY id")]

    def _run(self) -> None:
        while not self._stopped.wait(0.1):
            try:
                self._step()
            except (rc.AppError, rc.StateMoved) as error:  # the database is away, or the release went on
                self._figures.count("operator's requests refused")
                self.refusal = str(error)
            except Exception:
                logging.exception("the creator of releases")

    def _step(self) -> None:
        opened = self.open_releases()
        if len(opened) < self.AT_ONCE:
            self._create()
        release_id, status = self._random.choice(opened) if opened else (0, "")
        dice = self._random.random()
        if status == "paused" and dice < 0.4:
            self._act("resume", release_id)
        elif status in ("pending", "running") and dice < 0.015:  # it holds up all that share a node with it
            self._act("pause", release_id)
        elif status and dice > 0.995:
            self._act("cancel", release_id)

    def _create(self) -> None:
        """Makes a release for all nodes or for some of them; some begin later than others that come after."""
        if self._random.random() < 0.1:
            self._swap_twins()
        with self.store.database.transaction() as tx:
            nodes = [row[0] for row in tx.rows("SELECT id FROM nodes WHERE enabled = 1 ORDER BY id")]
        # mostly a few, so that some releases go side by side
        chosen = None if self._random.random() < 0.1 else self._random.sample(
            nodes, self._random.randint(1, max(len(nodes) // 4, 1)))
        strategy = {"startAt": rc.utc_text(time.time() + self._random.uniform(0.5, 4.0))} if (
            self._random.random() < 0.1) else {}
        mark = next(self._marks)
        payload = {"websites": [], "mark": mark}
        content = content_of(payload)
        self._crew.losses.created_at[content] = time.monotonic()
        self.store.releases.create(rc.ReleaseRequest(
            self._random.choice(self.TARGETS), f"mark {mark}", payload, strategy=strategy, node_ids=chosen), "torture")
        self.created.append(content)

    def _swap_twins(self) -> None:
        """Enters a host anew under its other name, as a person does by hand."""
        number = self._random.randint(1, self._crew.TWINS)
        names = [f"edge-{number}", f"twin-{number}"]
        with self.store.database.transaction(write=True) as tx:
            old = tx.value("SELECT name FROM nodes WHERE enabled = 1 AND name IN (?, ?)", *names)
            for name in sorted(names, key=lambda one: one != old):  # never both at once
                tx.execute("UPDATE nodes SET enabled = ? WHERE name = ?", int(name != old), name)

    def _act(self, verb: str, release_id: int) -> None:
        with contextlib.suppress(rc.AppError, rc.StateMoved):
            self.store.releases.act(verb, release_id, "torture")
            self._figures.count(f"operator's {verb}")


class Lag(NamedTuple):
    """What the standby had when it was cut off, and since when."""
    since: float
    event_id: int
    release_id: int


class Failovers:
    """Lets the standby lag while releases go out, and promotes it when the primary has died.

    Every commit between is lost: a release or more, dispatches, outcomes, claims.
    """

    ENOUGH = 6  # lost events of nodes
    PATIENCE_S = 8.0  # for a lost release that an agent ran already

    def __init__(self, world: World, url: str, crew: Crew, wanted: int):
        self._farm, self._figures, self._crew, self._wanted = world.farm, world.figures, crew, wanted
        self._url = url
        self._lag: Lag | None = None
        self._primary = rc.Database(url)

    @property
    def is_lagging(self) -> bool:
        return self._lag is not None

    @property
    def is_enough(self) -> bool:
        return self._figures.counts["failovers"] >= self._wanted

    def close(self) -> None:
        self._primary.close()

    def begin(self) -> None:
        """Cuts the standby off."""
        self._farm.cut_off_standby()
        standby = rc.Database(self._farm.url_on_standby(self._url))
        with standby.transaction() as tx:
            self._lag = Lag(time.monotonic(), tx.value("SELECT COALESCE(MAX(id), 0) FROM release_events"),
                            tx.value("SELECT COALESCE(MAX(id), 0) FROM release_tasks"))
        standby.close()

    def is_ripe(self, is_short: bool) -> bool:
        """Says whether enough was committed that the standby does not have; a short lag is content with little."""
        assert self._lag is not None
        with self._primary.transaction() as tx:
            created = tx.value("SELECT COUNT(*) FROM release_tasks WHERE id > ?", self._lag.release_id)
            dispatched = tx.value("SELECT COUNT(*) FROM release_events WHERE id > ? AND to_status = 'running' "
                                  "AND node_id IS NOT NULL", self._lag.event_id)
            ended = tx.value("SELECT COUNT(*) FROM release_events WHERE release_task_id > ? AND node_id IS NOT NULL "
                             "AND to_status = 'success'", self._lag.release_id)
        is_late = is_short or time.monotonic() > self._lag.since + self.PATIENCE_S
        return bool(created and dispatched and ((ended and dispatched >= self.ENOUGH) or is_late))

    def is_moment(self) -> bool:
        """Says whether an execute agent is at a request that the standby does not know of: best to fail now."""
        assert self._lag is not None
        with self._primary.transaction() as tx:
            return bool(tx.value("""
                SELECT COUNT(*)
                FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id JOIN release_events e
                     ON e.release_task_id = n.release_task_id AND e.node_id = n.node_id
                WHERE n.status = 'running' AND h.agent_protocol = 'execute' AND e.to_status = 'running'
                  AND e.id > ?""", self._lag.event_id))

    def fail_over(self, meanwhile: Callable[[], None]) -> None:
        """Kills the primary, promotes the standby, notes what was lost, and makes a new standby.

        meanwhile is called when there is no database to ask.
        """
        assert self._lag is not None
        losses = self._crew.losses
        losses.blind_until = float("inf")
        with contextlib.suppress(rc.DatabaseError), self._primary.transaction() as tx:
            self._count_lost(tx)
        self._farm.crash()
        dead_at = time.monotonic()
        meanwhile()
        standby = rc.Database(self._farm.url_on_standby(self._url))
        books = read_books(standby)
        standby.close()
        self._farm.promote()
        losses.blind_until = time.monotonic() + CHAOS_TTL_S
        losses.all.append(self._loss(books, dead_at, losses.blind_until))
        self._lag = None
        self._figures.count("failovers")
        if not self.is_enough:
            self._farm.add_standby()

    def _count_lost(self, tx: rc.Transaction) -> None:
        """Counts what is on the primary alone; what comes between here and its death is not counted."""
        assert self._lag is not None
        for table, lost_after in (("release_tasks", self._lag.release_id), ("release_events", self._lag.event_id)):
            self._figures.count(f"{table} lost by failovers",
                                tx.value(f"SELECT COUNT(*) FROM {table} WHERE id > ?", lost_after))

    @staticmethod
    def _loss(books: Books, dead_at: float, until: float) -> Loss:
        contents = {release.id: release.content for release in books.releases}
        return Loss(dead_at, until, frozenset(contents.values()), frozenset(
            (contents[node.release_id], node.main_ip) for node in books.nodes
            if node.status in ("running", "success", "failed")))


class Chaos:
    """The random phase."""

    RUNNING = 4
    SUSPENDED = 3
    KILL_EVERY_S = 0.35
    SUSPEND_EVERY_S = 1.2
    CUT_EVERY_S = 0.5

    def __init__(self, world: World, wanted: Wanted):
        self._world, self._wanted, self._figures = world, wanted, world.figures
        self._random = world.random
        self._url = world.farm.new()
        if wanted.failovers:
            world.farm.add_standby()
            self._url = world.farm.url_of_all(self._url)
        protocols = ["execute" if number % 4 == 3 else "tasks" for number in range(wanted.nodes)]
        self._crew = Crew(world.certs, protocols, 100)
        self._database = rc.Database(self._url)
        self._store = rc.Store(self._database)
        self._take_overs = TakeOvers(self._database, self._crew, self._figures)
        self._creator = Creator(self._url, self._crew, self._figures, self._random.randrange(2**32))
        self._failovers = Failovers(world, self._url, self._crew, wanted.failovers)
        self._victims: list[Victim] = []
        self._suspended: list[Victim] = []
        self._due: dict[str, float] = {}
        self._calm_since = 0.0  # before a failover
        self._points = [name for name in named_points() if name not in NO_SCENE and name not in (
            "create_release", "act", "retry")]

    def run(self) -> None:
        self._database.migrate()
        set_up_audit(self._database)
        self._crew.enlist(self._store)
        self._crew.enlist_twins(self._store)
        self._creator.start()
        self._take_overs.start()
        began = time.monotonic()
        try:
            while time.monotonic() - began < self._wanted.seconds and not self._is_enough():
                self._reap()
                self._refill()
                self._strike()
                time.sleep(0.02)
            self._settle()
            self._check()
        finally:
            self._creator.stop()
            self._take_overs.stop()
            for victim in [*self._victims, *self._suspended]:
                victim.send(signal.SIGKILL)
                victim.wait(10)
            self._crew.stop()
            self._failovers.close()
            self._database.close()

    def _is_enough(self) -> bool:
        counts = self._figures.counts
        return (counts["kills"] >= self._wanted.kills and counts["suspensions"] >= self._wanted.suspends
                and self._failovers.is_enough)

    # -- victims ---------------------------------------------------------------------------

    def _refill(self) -> None:
        while len(self._victims) < self.RUNNING:
            dice, spec = self._random.random(), ""
            command = ["serve"] if dice < 0.7 else ["run-once"] if dice < 0.8 else ["run-once", "--drain"]
            if self._random.random() < 0.15:
                whens = [when for when in WHENS if not when.startswith("stop-")]
                spec = str(Spec(self._random.choice(self._points), self._random.choice(whens),
                                self._random.randint(1, 12)))
            interval_s = round(self._random.uniform(0.1, 0.3), 2)
            self._victims.append(self._world.processes.start(command, environment_for(
                self._url, self._world.certs, CHAOS_TTL_S, RELEASE_EXECUTOR_INTERVAL_SEC=interval_s), spec))
            self._figures.count("processes started")

    def _reap(self) -> None:
        for victim in [one for one in self._victims if one.exit_code() is not None]:
            self._victims.remove(victim)
            self._note_end(victim)

    def _note_end(self, victim: Victim) -> None:
        self._world.processes.forget(victim)
        code = victim.exit_code()
        for spec in victim.fired():
            self._figures.fired(spec)
            if code == -signal.SIGKILL:
                victim.is_ended_by_us = True
                self._take_overs.orphaned(victim.pid, "kill", time.monotonic())
        errors = list(check_log(victim))
        self._figures.find(errors, str(victim.log))
        self._figures.count("tracebacks in logs", len(errors))
        if not victim.is_ended_by_us:
            self._figures.exits[str(code)] += 1
            if code not in CLEAN_EXITS:
                self._figures.find([Finding("process", f"{victim.name} ended with {code}: {_tail(victim.log)}")],
                                   str(victim.log))
        if not errors and code in (*CLEAN_EXITS, -signal.SIGKILL):
            victim.log.unlink()

    # -- strikes ---------------------------------------------------------------------------

    def _strike(self) -> None:
        now = time.monotonic()
        for victim in [one for one in self._suspended if one.stopped_until < now]:
            self._wake(victim)
        counts = self._figures.counts
        if counts["kills"] < self._wanted.kills and not self._calm_since and self._is_due("kill", self.KILL_EVERY_S):
            self._kill()
        if (counts["suspensions"] < self._wanted.suspends and len(self._suspended) < self.SUSPENDED
                and self._is_due("suspend", self.SUSPEND_EVERY_S)):
            self._suspend()
        if not self._calm_since and self._is_due("agents", 0.15):
            self._upset_an_agent()
        if self._world.farm.can_cut and self._is_due("cut", self.CUT_EVERY_S):
            with contextlib.suppress(rc.DatabaseError, *rc.PostgresEngine(self._url).error):
                self._figures.count("connections cut", int(self._world.farm.cut(self._url)))
        if self._world.farm.can_restart and self._comes_now("server restarts", self._wanted.restarts):
            self._take_overs.disturbed()
            self._world.farm.restart()
            self._take_overs.disturbed()
            self._figures.count("server restarts")
        self._fail_over()

    def _fail_over(self) -> None:
        """Goes on with a failover, or begins one."""
        if not self._failovers.is_lagging:
            if self._comes_now("failovers", self._wanted.failovers):
                self._failovers.begin()
                if self._random.random() < 0.4:  # the lag is short: claims that are lost, and given again, count alike
                    self._begin_calm()
            return
        with contextlib.suppress(rc.DatabaseError):
            if self._calm_since:
                calm_s = time.monotonic() - self._calm_since
                if calm_s > CHAOS_TTL_S and (self._failovers.is_moment() or calm_s > 4 * CHAOS_TTL_S) and (
                        self._failovers.is_ripe(is_short=True)):
                    self._end_calm()
            elif self._is_due("failover", 0.3) and self._failovers.is_ripe(is_short=False):
                self._begin_calm()

    def _begin_calm(self) -> None:
        """Kills nobody for a while, so that releases have owners that live, and agents work longer."""
        self._calm_since = time.monotonic()
        if self._random.random() < 0.7:
            for agent in self._crew.agents:
                agent.set(outcome="success", task_ms=self._random.randint(1000, 1500), mode="normal")

    def _end_calm(self) -> None:
        """Fails over: an owner may sleep meanwhile, and whoever makes releases may be a new process after it."""
        self._calm_since = 0.0
        if self._random.random() < 0.6:
            self._suspend()
        forget = self._creator.forget if self._random.random() < 0.5 else lambda: None
        self._take_overs.disturbed()
        self._failovers.fail_over(meanwhile=forget)
        self._take_overs.disturbed()
        # who saw it happen is left alive for a while
        self._due["kill"] = time.monotonic() + self._random.uniform(0.0, 3 * CHAOS_TTL_S)

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.setdefault(what, now + every_s):
            return False
        self._due[what] = now + self._random.uniform(0.3, 1.7) * every_s
        return True

    def _comes_now(self, what: str, wanted: int) -> bool:
        """Spreads what comes a few times over the kills."""
        done, kills = self._figures.counts[what], self._figures.counts["kills"]
        return done < wanted and kills * (wanted + 1) >= self._wanted.kills * (done + 1)

    def _choose(self, owner_share: float) -> Victim | None:
        """Picks a victim: one that holds a claim in so many cases, and then none if there is none."""
        ready = [one for one in self._victims if time.monotonic() - one.started_at > 0.3]
        if self._random.random() < owner_share:
            try:
                owners = self._take_overs.owners()
            except rc.DatabaseError:
                return None
            ready = [one for one in ready if one.pid in owners]
        return self._random.choice(ready) if ready else None

    def _kill(self) -> None:
        if self._suspended and self._random.random() < 0.05:
            victim: Victim | None = self._suspended.pop()
        else:
            victim = self._choose(0.6)
        if victim is None or victim.exit_code() is not None:
            return
        victim.is_ended_by_us = True
        victim.send(signal.SIGKILL)
        since = time.monotonic()
        victim.wait(10)
        self._take_overs.orphaned(victim.pid, "kill", since)
        self._figures.count("kills")
        if victim not in self._victims:
            self._note_end(victim)

    def _suspend(self) -> None:
        victim = self._choose(0.9)
        if victim is None or victim.exit_code() is not None:
            self._due["suspend"] = 0.0  # as soon as there is one
            return
        victim.send(signal.SIGSTOP)
        since = time.monotonic()
        victim.stopped_until = since + self._random.uniform(1.2, 2.5) * CHAOS_TTL_S
        self._take_overs.orphaned(victim.pid, "suspension", since)
        self._victims.remove(victim)
        self._suspended.append(victim)
        self._figures.count("suspensions")

    def _wake(self, victim: Victim) -> None:
        self._take_overs.woken(victim.pid)
        victim.send(signal.SIGCONT)
        self._suspended.remove(victim)
        self._victims.append(victim)

    def _upset_an_agent(self) -> None:
        agent = self._random.choice(self._crew.agents)
        dice = self._random.random()
        if dice < 0.1:
            self._crew.restart(agent)
            self._figures.count("agents restarted")
        elif dice < 0.5:
            mode = self._random.choice(("cut", "cutEarly", "drop"))
            only = self._random.choice(("dispatch", "dispatch", "query", ""))
            if agent.protocol == "tasks" or self._random.random() < 0.2:  # a cut costs an execute node 5 s
                agent.set(mode=mode, times=self._random.randint(1, 2), only=only)
                self._figures.count("answers to be lost")
        elif dice < 0.53:
            agent.set(outcome="failed")
        elif dice < 0.56 and hasattr(Behaviour, "rename"):  # it gives tasks ids of its own for a while
            agent.set(rename=not agent.behaviour.rename)
        else:
            agent.set(outcome="success", task_ms=self._task_ms(agent), delay_ms=self._random.choice((0, 0, 0, 20, 100)))

    def _task_ms(self, agent: Agent) -> int:
        """Gives a short task mostly; now and then one that a new owner finds still running."""
        if self._random.random() > 0.15:
            return self._random.randint(0, 300)
        return self._random.randint(1000, 1500) if agent.protocol == "execute" else self._random.randint(2000, 4000)

    # -- the end ---------------------------------------------------------------------------

    def _settle(self) -> None:
        """Ends all faults, stops the processes cleanly, and lets one drain what is left."""
        self._creator.stop()
        for victim in list(self._suspended):
            self._wake(victim)
        self._crew.fleet.set(mode="normal", outcome="success", delay_ms=0)
        patiently(self._creator.resume_all)
        self._wait_for_owners()
        self._reap()  # also who was killed last
        self._take_overs.stop()
        time.sleep(max([0.0, *(one.started_at + YOUNG_S - time.monotonic() for one in self._victims)]))
        for victim in self._victims:
            victim.send(signal.SIGTERM)
        for victim in self._victims:
            if victim.wait(CLEAN_STOP_S) not in CLEAN_EXITS and not victim.fired():
                self._figures.find([Finding("process", f"{victim.name} did not stop cleanly: "
                                                       f"{victim.exit_code()}, {_tail(victim.log)}")], "the end")
            victim.send(signal.SIGKILL)
            victim.wait(10)
            self._note_end(victim)
        self._victims = []
        give_up_at = time.monotonic() + END_LIMIT_S
        while self._creator.open_releases() and time.monotonic() < give_up_at:
            patiently(self._creator.resume_all)
            drain = self._world.processes.start(["run-once", "--drain"], environment_for(
                self._url, self._world.certs, CHAOS_TTL_S))
            drain.wait(END_LIMIT_S)
            self._note_end(drain)

    def _wait_for_owners(self) -> None:
        """Gives orphans the time to find an owner, so that the take-overs are all measured."""
        give_up_at = time.monotonic() + 5 * CHAOS_TTL_S
        while self._take_overs._orphans and time.monotonic() < give_up_at:
            self._reap()
            time.sleep(0.05)

    def _check(self) -> None:
        books = patiently(lambda: read_books(self._database))
        self._figures.count("releases", len(books.releases))
        self._figures.count("releases that were success", sum(r.status == "success" for r in books.releases))
        self._figures.count("tasks run", sum(len(agent.runs) for agent in self._crew.agents))
        self._figures.count("dispatches read by agents", sum(len(self._crew.sent(a)) for a in self._crew.agents))
        findings = [*check_books(books), *check_agents(books, self._crew), *check_audit(self._database),
                    *check_created(books, self._crew, self._creator.created)]
        if not any(release.status == "success" for release in books.releases):
            findings.append(Finding("process", f"no release came to a success; refused at last: "
                                               f"{self._creator.refusal or 'nothing'}"))
        if self._figures.find(findings, "random phase"):
            folder = self._world.folder / "random"
            folder.mkdir()
            self._world.farm.dump(self._url, folder)
            (folder / "agents.json").write_text(json.dumps(self._crew.fleet.snapshot(), indent=1))


# ---------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torture.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="moments:\n" + "\n".join(f"  {when:<16} {text}" for when, text in WHENS.items())
               + f"\nfaults: {', '.join(sorted({kind for kinds in FAULTS.values() for kind in kinds}))}")
    parser.add_argument("--db", metavar="URL", default="", help="sqlite:///FOLDER/ANY or a PostgreSQL server")
    parser.add_argument("--engine", choices=("sqlite", "postgresql"), help="a database of its own (sqlite)")
    parser.add_argument("--seed", type=int, default=None, help="settles what is tried (from the clock)")
    parser.add_argument("--phases", default="points,faults,random", help="which of points,faults,random")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="SIGKILLs of the random phase (100)")
    parser.add_argument("--suspends", type=int, default=20, metavar="N", help="SIGSTOPs of the random phase (20)")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="of the PostgreSQL server (3)")
    parser.add_argument("--failovers", type=int, default=None, metavar="N",
                        help="to a standby that lacks commits (2 on a PostgreSQL server of its own, else 0)")
    parser.add_argument("--strict", action="store_true",
                        help="what nobody can know after a failover must be zero too")
    parser.add_argument("--depth", type=int, default=6, metavar="N",
                        help="passings of each point; 1: one of them by lot (6)")
    parser.add_argument("--whens", default=",".join(WHENS), help="which moments of the points (all)")
    parser.add_argument("--faults", type=int, default=0, metavar="N", help="trials of faults at most (0: all)")
    parser.add_argument("--every-kind", action="store_true", help="every kind of fault at every call, not one by lot")
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="MAX", help="begin nothing after that (3600)")
    parser.add_argument("--nodes", type=int, default=12, metavar="N", help="of the random phase (12)")
    parser.add_argument("--at-once", type=int, default=16, metavar="N", help="trials at a time (16)")
    parser.add_argument("--tls", action="store_true", help="mutual TLS to the agents (plain HTTP)")
    parser.add_argument("--verbose", action="store_true", help="say when each trial is done")
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON document")
    options = parser.parse_args(arguments)
    engine = "postgresql" if options.db.startswith("postgresql:") else "sqlite" if options.db else options.engine
    options.engine = engine or "sqlite"
    may_fail_over = options.engine == "postgresql" and not options.db and knows_many_hosts()
    if options.failovers is None:
        options.failovers = 2 if may_fail_over else 0
    if options.failovers and not may_fail_over:
        parser.error("--failovers: only on a PostgreSQL server of its own, by psycopg or psycopg2")
    if not set(options.whens.split(",")) <= set(WHENS):
        parser.error(f"--whens: known are {','.join(WHENS)}")
    return options


def make_world(options: argparse.Namespace, folder: Path, figures: Figures) -> World:
    """Copies the program, makes certificates and the place for databases."""
    program = folder / "program"
    program.mkdir()
    for name in ("releasectl.py", "schema.sql"):
        shutil.copy(PROGRAM / name, program)
    os.environ["TORTURE_PROGRAM"] = str(program)
    (folder / "logs").mkdir()
    (folder / "payload.json").write_text(json.dumps(PAYLOAD))
    certs = None
    if options.tls:
        certs = str(folder / "certs")
        names = ",".join(f"127.0.1.{number}" for number in range(1, options.nodes + 1))
        subprocess.run(["bash", str(ROOT / "scripts" / "make_certs.sh"), certs, names], check=True,
                       stdout=subprocess.DEVNULL)
    if options.engine == "postgresql":
        farm: Any = PostgresFarm(folder, options.db)
    else:
        place = Path(options.db[len("sqlite:///"):]).parent if options.db else folder
        farm = SqliteFarm(place)
    return World(farm, certs, Processes(folder / "logs", program), figures, folder, random.Random(figures.seed))


def run_phases(world: World, options: argparse.Namespace) -> None:
    """Runs the phases that were asked for, one after the other."""
    ends_at = world.figures.started_at + options.seconds
    phases: dict[str, Callable[[], object]] = {
        "points": lambda: play_points(world, options.depth, options.whens.split(","), options.at_once, ends_at),
        "faults": lambda: play_trials(world, fault_trials(world, options.every_kind, options.faults),
                                      options.at_once, ends_at),
        "random": lambda: Chaos(world, Wanted(options.kills, options.suspends, options.restarts, options.failovers,
                                              ends_at - time.monotonic(), options.nodes)).run(),
    }
    for name in filter(None, options.phases.split(",")):
        began = time.monotonic()
        phases[name]()
        world.figures.phases[name] = time.monotonic() - began


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["child"]:
        return run_child(arguments[1], arguments[2:])
    if arguments == ["nursery"]:
        return run_nursery()
    options = parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO if options.verbose else logging.WARNING)
    logging.getLogger("releasectl").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="releasectl-torture."))
    figures = Figures(options.engine, options.seed if options.seed is not None else time.time_ns() % 10**6,
                      options.strict)
    world: World | None = None
    try:
        world = make_world(options, folder, figures)
        run_phases(world, options)
    finally:
        if world is not None:
            world.processes.close()
            world.farm.close()
    is_bad = any(figures.zeros().values())
    (folder / "figures.json").write_text(json.dumps(figures.document(), indent=1))
    print(json.dumps(figures.document()) if options.json else figures.table(), flush=True)
    if is_bad or options.keep:
        print(f"evidence: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
