#!/usr/bin/env python3
"""ha: takes the database server away under a release, in every way, and looks whether it goes on as it should.

    make ha                                       every scenario, with every driver that is installed
    python scripts/ha.py switchover kill          these only; --help lists them
    python scripts/ha.py hung --driver pg8000 --json result.json
    python scripts/ha.py --short                  switchover and kill, with one driver: what CI runs

Each turn has a PostgreSQL server and a standby of its own (scripts/postgres.sh, streaming replication), two `serve`
processes, and a release to stand-in agents of both protocols, batch after batch, by mutual TLS. Meanwhile both serve
processes are asked for the release and for `why`, and other acts are confirmed just before the server dies.

A turn is WRONG where an agent ran something twice or something was lost, where the tables are not as the contract says,
or where an answer told what was not so. psycopg and psycopg2 get a URL of both servers; pg8000, which takes one host,
goes through haproxy. Exit code 1: something was wrong; 3: something that it needs is missing.

Its parts: the oracle (pure), what stands between, the laboratory, the scenarios, the table.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from lab import DRIVERS, PROGRAM, Pooler, eventually, free_port, make_certs, migrate, mtls  # noqa: E402
from torture.agents import RecordedAgents, Run  # noqa: E402
from torture.databases import PostgresServer  # noqa: E402
from torture.tables import Tables, check_tables, read_tables  # noqa: E402

import releasectl as rc  # noqa: E402

# Two releases are under way, one for the nodes of each protocol: how many nodes, and how many of them in a batch.
NODES = {"tasks": (40, 5), "execute": (20, 2)}
RELEASES = range(1, len(NODES) + 1)
TOTAL = sum(count for count, _ in NODES.values())
TASK_MS = 400
# How many nodes are done when the scenario begins, and how many more when commits were made that will be lost.
DONE_BEFORE, DONE_UNSEEN = 12, 10
# Their sum is how long an execute node may be busy with a request whose answer was lost.
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 2, 2
TURN_S = 240.0
# So long it may still be said that the database takes no writes when it does.
BELATED_S = 3.0
# How long the primary is silent at least, and within which time everybody must have been told that it does not answer.
SILENT_S, SILENCE_TOLD_S = 20.0, 25.0
MISSING = 3


# ---------------------------------------------------------------------------
# The oracle: pure.
# ---------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a serve process answered when it was asked for the release, or why it waits."""
    at: float
    # The number of the serve process, which is asked for one thing after the other.
    by: int
    release_id: int
    # Of the envelope: 0 is success, -1 stands for no answer.
    code: int
    # What `why` says, or the error.
    text: str
    # As a look at the release tells; "" and -1 for an answer of another kind.
    status: str
    success_nodes: int
    # How many of its nodes the agents had done once the answer was here.
    done: int


class Act(NamedTuple):
    """What was asked for and confirmed just before the server was lost, and whether it is there afterwards."""
    name: str
    is_there: bool


class Seen(NamedTuple):
    """What a turn left: all that it is judged by."""
    tables: Tables
    # By address.
    runs: dict[str, list[Run]]
    overlaps: int
    answers: list[Answer]
    acts: list[Act]
    # Whether the new primary may lack what the old one had confirmed.
    may_lose: bool
    # Nothing may begin between these times.
    quiet: tuple[float, float]
    # When the database could be written again.
    back_at: float
    # What should have been said, and whether it was.
    told: dict[str, bool]


def judge(seen: Seen) -> Iterator[str]:
    """Yield what was wrong."""
    yield from (f"{finding.kind}: {finding.text}" for finding in check_tables(seen.tables))
    yield from _judge_runs(seen)
    yield from _judge_answers(seen)
    if not seen.may_lose:
        yield from (f"lost: {act.name}" for act in seen.acts if not act.is_there)
    yield from (f"not said: {what}" for what, was_said in seen.told.items() if not was_said)


def _judge_runs(seen: Seen) -> Iterator[str]:
    watched = [release for release in seen.tables.releases if release.id in RELEASES]
    yield from (f"lost: release {one.id} is {one.status}: {one.error_msg or one.status_reason}" for one in watched
                if one.status != "success")
    if len(watched) < len(RELEASES):
        yield f"lost: of {len(RELEASES)} releases there are {len(watched)}"
    if seen.overlaps:
        yield f"twice: {seen.overlaps} runs began while another one ran"
    for node in seen.tables.nodes:
        if node.release_id not in RELEASES:
            continue
        runs = seen.runs[node.main_ip]
        if len(runs) > 1:
            yield f"twice: {node.main_ip} ran {', '.join(run.task_id for run in runs)}"
        elif node.status == "success" and not any(run.outcome == "success" for run in runs):
            yield f"said wrongly: {node.main_ip} is a success, and ran nothing"
        elif runs and runs[0].task_id != node.task_id:
            yield f"said wrongly: {node.main_ip} ran {runs[0].task_id}, its row has {node.task_id}"
        yield from (f"{node.main_ip} began when nothing could be written down" for run in runs
                    if seen.quiet[0] < run.began_at < seen.quiet[1])


def _judge_answers(seen: Seen) -> Iterator[str]:
    """Yield answers that told more than the agents had done, or less than an answer that was given before."""
    totals = {release.id: release.total for release in seen.tables.releases}
    most: dict[tuple[int, int], int] = {}
    on_at = min((run.began_at for runs in seen.runs.values() for run in runs if run.began_at > seen.back_at),
                default=float("inf"))
    for answer in seen.answers:
        if "takes no writes" in answer.text and answer.at > seen.back_at + BELATED_S:
            yield f"said wrongly, {answer.at - seen.back_at:.1f} s after the database was back: {answer.text}"
        if "no executor is running" in answer.text and answer.at > on_at + BELATED_S:
            yield f"said wrongly, {answer.at - on_at:.1f} s after it went on: {answer.text}"
        if answer.success_nodes < 0:
            continue
        name = f"said wrongly: release {answer.release_id} {answer.status} with {answer.success_nodes} successes"
        if answer.success_nodes > answer.done or (
                answer.status == "success" and answer.done < totals.get(answer.release_id, 0)):
            yield f"{name}, when agents had done {answer.done}"
        if answer.status not in ("pending", "running", "success"):
            yield name
        before = most.get((answer.by, answer.release_id), 0)
        if answer.success_nodes < before and not seen.may_lose:
            yield f"{name} after {before}"
        most[answer.by, answer.release_id] = max(before, answer.success_nodes)


# ---------------------------------------------------------------------------
# What stands between releasectl and the servers.
# ---------------------------------------------------------------------------


class Haproxy:
    """A haproxy before both servers: it sends to the one that tells a new session that it is no standby."""

    # The begin of a session of PostgreSQL's protocol 3, and what only a primary answers (PostgreSQL 14).
    HELLO = b"\0\3\0\0user\0releasectl\0database\0postgres\0\0"
    HELLO = (len(HELLO) + 4).to_bytes(4, "big") + HELLO
    PRIMARY = b"in_hot_standby\0off\0"

    def __init__(self, folder: Path, places: list[str]):
        """Start it before servers (HOST:PORT); raise FileNotFoundError where there is none."""
        program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if not program:
            raise FileNotFoundError("haproxy is not installed")
        self.port = free_port()
        servers = "".join(f"    server db{n} {place} check\n" for n, place in enumerate(places, 1))
        settings = folder / "haproxy.cfg"
        settings.write_text(
            "defaults\n    mode tcp\n    timeout connect 2s\n    timeout check 1s\n    timeout client 1h\n"
            f"    timeout server 1h\nlisten releasectl\n    bind 127.0.0.1:{self.port}\n    option tcp-check\n"
            f"    tcp-check connect\n    tcp-check send-binary {self.HELLO.hex()}\n"
            f"    tcp-check expect binary {self.PRIMARY.hex()}\n"
            f"    default-server inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions\n{servers}")
        self._log = folder / "haproxy.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen([program, "-db", "-f", str(settings)], stdout=log, stderr=log)

    def wait_until_checked(self) -> None:
        """Wait until it has found the standby: at first it takes both for the primary."""
        eventually(lambda: "is DOWN" in self._log.read_text(), message="haproxy did not find the standby")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


class Host:
    """A host of its own for the primary, by whose address it is reached, and which can be cut off without a word.

    It is a network namespace: of one that is cut off the kernel, too, answers nothing. Whatever comes to the primary's
    port there is passed on to 127.0.0.1.
    """

    def __init__(self, port: int):
        """Make it; raise FileNotFoundError where that can't be."""
        pid = os.getpid()
        self._port, self._name, self._link = port, f"releasectl-ha-{pid}", f"rcha{pid}"
        # four addresses of those that are for tests of networks (RFC 2544)
        network, first = f"198.18.{pid >> 6 & 255}", (pid & 63) << 2
        self._outside, self.address = f"{network}.{first + 1}", f"{network}.{first + 2}"
        # Guards the three below.
        self._lock = threading.Lock()
        self._is_stopped = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        try:
            self._make()
        except BaseException as error:
            self.stop()
            if isinstance(error, (RuntimeError, OSError)):
                raise FileNotFoundError(f"no network namespace: {error}") from None
            raise

    def cut_off(self) -> None:
        """Let nothing in and nothing out any more."""
        self._ip("-n", self._name, "route", "add", "blackhole", f"{self._outside}/32")

    def stop(self) -> None:
        """Remove all that there is of it."""
        with self._lock:
            self._is_stopped = True
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)  # which wakes the thread that waits for it
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()
        for kind, name in (("link", self._link), ("netns", self._name)):
            with contextlib.suppress(RuntimeError):
                self._ip(kind, "del", name)

    def _make(self) -> None:
        inside = f"{self._link}i"
        self._ip("netns", "add", self._name)
        self._ip("link", "add", self._link, "type", "veth", "peer", "name", inside, "netns", self._name)
        self._ip("addr", "add", f"{self._outside}/30", "dev", self._link)
        self._ip("link", "set", self._link, "up")
        self._ip("-n", self._name, "addr", "add", f"{self.address}/30", "dev", inside)
        self._ip("-n", self._name, "link", "set", inside, "up")
        # of a neighbour that does not say where it is our own kernel would tell that it is not there
        mac = json.loads(self._ip("-n", self._name, "-json", "link", "show", inside))[0]["address"]
        self._ip("neigh", "replace", self.address, "lladdr", mac, "dev", self._link, "nud", "permanent")
        with ThreadPoolExecutor(1) as other:
            listener = other.submit(self._listen).result()
        with self._lock:
            self._sockets.append(listener)
            self._begin(self._accept, listener)

    def _listen(self) -> socket.socket:
        """Return a socket of the namespace, as all are that it accepts; the thread stays there."""
        with open(f"/var/run/netns/{self._name}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(os.strerror(ctypes.get_errno()))
        # what comes from where no way leads back to is dropped then, so who is cut off hears nothing either
        Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text("1")
        return socket.create_server((self.address, self._port))

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                if self._is_stopped:
                    return
                raise
            try:
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:  # the primary is gone
                client.close()
                continue
            with self._lock:
                self._sockets += [client, server]
                if self._is_stopped:
                    return
                self._begin(self._pass_on, client, server)
                self._begin(self._pass_on, server, client)

    def _begin(self, act: Callable[..., None], *args: socket.socket) -> None:
        self._threads.append(threading.Thread(target=act, args=args))
        self._threads[-1].start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()  # the other way closes the other one

    @staticmethod
    def _ip(*args: str) -> str:
        """Return what the command `ip` printed."""
        program = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if not program:
            raise RuntimeError("ip (iproute2) is not installed")
        done = subprocess.run([program, *args], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout


# ---------------------------------------------------------------------------
# The laboratory of one turn.
# ---------------------------------------------------------------------------


class Serve:
    """A `serve` process, and a thread that asks it for the release and why it waits, all the time."""

    def __init__(self, folder: Path, number: int, url: str, certs: Path, driver: str, ask: Callable[[Serve], None]):
        self.number, self.port, self.log = number, free_port(), folder / f"serve-{number}.log"
        settings = {
            **mtls(certs), "DATABASE_URL": url, "RELEASECTL_PG_DRIVER": driver, rc.CONFIG_VARIABLE: os.devnull,
            "HTTP_ADDR": f"127.0.0.1:{self.port}", "AGENT_CONNECT_TIMEOUT_SEC": str(CONNECT_TIMEOUT_S),
            "AGENT_REQUEST_TIMEOUT_SEC": str(REQUEST_TIMEOUT_S), "AGENT_RETRIES": "10",
            "RELEASE_EXECUTOR_INTERVAL_SEC": "0.5"}
        inherited = {name: value for name, value in os.environ.items() if name not in {s.name for s in rc.SETTINGS}}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, PROGRAM, "serve"], stdin=subprocess.DEVNULL, stderr=log,
                                            env={**inherited, **settings}, cwd=folder)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._ask_on, args=(ask,))

    def call(self, method: str, path: str, body: Any = None, timeout_s: float = 60.0) -> tuple[int, Any]:
        """Return code and data of an answer; in place of the data the message of one that is no success."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None,
                               {"Content-Type": "application/json"} if body is not None else {})
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return -1, str(error)
        finally:
            connection.close()
        return answer["code"], answer["message"] if answer["code"] else answer["data"]

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """Return the data of an answer that must be a success."""
        code, data = self.call(method, path, body)
        if code:
            raise RuntimeError(f"{method} {path}: {data}; see {self.log}")
        return data

    def is_ready(self) -> bool:
        return self.call("GET", "/readyz", timeout_s=5)[0] == 0

    def metrics(self) -> str:
        """Return its metrics, "" where it does not answer."""
        with contextlib.suppress(OSError), \
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            return str(answer.read(), "utf-8")
        return ""

    def begin_to_ask(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it, which it must do with 0."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(TURN_S)
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ask_on(self, ask: Callable[[Serve], None]) -> None:
        while not self._stopped.wait(0.1):
            ask(self)


class Turn:
    """Two servers, two serve processes, agents, and a release under way."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, certs: Path, driver: str, scenario: Scenario):
        """Start all of it; the stack ends it."""
        self.folder, self.driver, self.scenario, self._stack = folder, driver, scenario, stack
        self.answers: list[Answer] = []
        self.told: dict[str, bool] = {}
        # After how many seconds who asked for something was told that the database does not answer.
        self.told_s: dict[str, float] = {}
        self.acts: dict[str, Callable[[], bool]] = {}
        # The highest one that was given out.
        self.last_version = 0
        # When the database was lost, when it could be written again, and between when nothing may begin.
        self.lost_at = self.back_at = 0.0
        self.quiet = (0.0, 0.0)
        protocols = [protocol for protocol, (count, _) in NODES.items() for _ in range(count)]
        self.agents = RecordedAgents(certs, protocols, TASK_MS)
        self._stack.callback(self.agents.stop)
        self.servers = PostgresServer(folder, kind="--in-memory")  # processes die here, no power does
        self._stack.callback(self.servers.close)
        self.database = self.servers.new()
        migrate(self.database)
        with contextlib.closing(rc.Database(self.database)) as database:
            self.agents.add_nodes(rc.Store(database))
        self.servers.add_standby()
        if scenario.is_synchronous:
            self.servers.make_synchronous(True)
        self.pooler: Pooler | None = None
        self.host: Host | None = None
        if scenario.has_host:
            self.host = Host(self.servers.ports[0])
            self._stack.callback(self.host.stop)
        self.url = self._url()
        self.serves = [Serve(folder, n, self.url, certs, driver, self._ask) for n in (1, 2)]
        for serve in self.serves:
            self._stack.callback(serve.stop)
        for serve in self.serves:
            eventually(serve.is_ready, message=f"serve is not ready: {serve.log}")

    def _url(self) -> str:
        """Return the URL by which releasectl finds the server that can be written to, whichever it is."""
        if self.scenario.is_pooled:
            self.pooler = Pooler(self.folder, self.database, size=10, more="server_login_retry = 1")
            self._stack.callback(self.pooler.stop)
            return self.pooler.url(self.database)
        first = self.host.address if self.host else "127.0.0.1"
        if self.driver != "pg8000":
            return self.servers.url_of_primary(self.database).replace("host=127.0.0.1", f"host={first}", 1)
        proxy = Haproxy(self.folder, [f"{host}:{port}" for host, port in zip((first, "127.0.0.1"), self.servers.ports)])
        self._stack.callback(proxy.stop)
        proxy.wait_until_checked()
        return f"postgresql://releasectl@127.0.0.1:{proxy.port}/{self.database.rpartition('/')[2]}"

    # -- what goes on ----------------------------------------------------------------------

    def done(self, release_id: int = 0) -> int:
        """Return how many nodes the agents have done, of one release or of both."""
        protocol = list(NODES)[release_id - 1] if release_id else ""
        return sum(any(run.outcome == "success" for run in self.agents.runs(agent)) for agent in self.agents.all
                   if protocol in ("", agent.protocol))

    def begin(self) -> None:
        """Create the releases and wait until some nodes are done."""
        first = 1
        for serve, (protocol, (count, at_once)) in zip(self.serves, NODES.items()):
            serve.ok("POST", "/api/v1/releases", {
                "target": protocol, "payload": {"websites": []}, "nodeIds": list(range(first, first + count)),
                "strategy": {"batches": [at_once] * (count // at_once)}})
            first += count
        for serve in self.serves:
            serve.begin_to_ask()
        self.wait_until_done(DONE_BEFORE)

    def wait_until_done(self, count: int) -> None:
        eventually(lambda: self.done() >= count, TURN_S, f"the agents have not done {count} nodes")

    def confirm_acts(self) -> None:
        """Create, cancel and freeze, all confirmed; acts tells later whether that is there."""
        first = self.serves[0]
        later = {"strategy": {"startAt": "2099-01-01T00:00:00Z"}, "payload": {"websites": []}, "target": "later"}
        cancelled = first.ok("POST", "/api/v1/releases", later)["releaseId"]
        first.ok("POST", f"/api/v1/releases/{cancelled}/cancel", {"reason": "it was a mistake"})
        first.ok("PUT", "/api/v1/freeze", {"frozen": True, "target": "shop", "reason": "inventory"})
        last = first.ok("POST", "/api/v1/releases", {**later, "reason": "the last one"})
        created, self.last_version = last["releaseId"], last["version"]
        self.acts = {
            "a release that was created": lambda: self._has(created, "reason", "the last one"),
            "a cancel": lambda: self._has(cancelled, "status", "cancelled"),
            "a freeze": lambda: any(one["target"] == "shop" for one in first.ok("GET", "/api/v1/freeze")["targets"])}

    def _has(self, release_id: int, key: str, value: str) -> bool:
        code, data = self.serves[0].call("GET", f"/api/v1/releases/{release_id}")
        return code == 0 and data["release"][key] == value

    def lose(self, act: Callable[[], None]) -> None:
        """Do what takes the database away."""
        self.lost_at = time.monotonic()
        act()

    def promote(self) -> None:
        """Make the standby the primary; from now on it may go on."""
        self.servers.promote()
        self.back()

    def back(self) -> None:
        self.back_at = time.monotonic()

    def why_on_standby(self) -> str:
        """Return what the command `why` says of the first release when only the standby can be asked."""
        command = [sys.executable, PROGRAM, "--db", self.servers.url_of_standby(self.database), "why", "1"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env={
            **os.environ, rc.CONFIG_VARIABLE: os.devnull, "MTLS_ENABLED": "0"})
        (self.folder / "why-on-standby").write_text(found.stdout + found.stderr)
        return found.stdout

    def expect(self, what: str, pattern: str) -> None:
        """Wait until an answer since the loss says something; note whether one did."""
        self._expect(what, lambda: any(answer.at > self.lost_at and re.search(pattern, answer.text)
                                       for answer in list(self.answers)))

    def expect_logged(self, what: str, text: str) -> None:
        """Wait until both serve processes have logged something; note whether they did."""
        self._expect(what, lambda: all(text in serve.log.read_text() for serve in self.serves))

    def expect_metric(self, what: str, line: str) -> None:
        """Wait until the metrics of both serve processes have a line; note whether they did."""
        self._expect(f"{what} (/metrics)", lambda: all(line in serve.metrics() for serve in self.serves))

    def expect_silence_told(self) -> None:
        """Ask both serve processes what people ask, all at once; note when both have told that the database fails."""
        def told_s(serve: Serve, path: str) -> float | None:
            code, _ = serve.call("GET", f"/api/v1/releases/1{path}")
            return time.monotonic() - self.lost_at if code == rc.DATABASE_DOWN else None
        with ThreadPoolExecutor() as others:
            asked = {what: [others.submit(told_s, serve, path) for serve in self.serves]
                     for what, path in (("the release", "?view=summary"), ("`why`", "/why"))}
        for what, answers in asked.items():
            after_s = [answer.result() for answer in answers]
            self.told[f"within {SILENCE_TOLD_S:g} s to who asks for {what}, that the database does not answer"] = all(
                one is not None and one <= SILENCE_TOLD_S for one in after_s)
            self.told_s[what] = max(filter(None, after_s), default=0.0)

    def new_version(self) -> int:
        """Return the version of a new release, which is cancelled at the end."""
        made = self.serves[0].ok("POST", "/api/v1/releases", {
            "target": "new", "payload": {"websites": []}, "strategy": {"startAt": "2099-01-01T00:00:00Z"}})
        return int(made["version"])

    def _expect(self, what: str, look: Callable[[], bool]) -> None:
        try:
            self.told[what] = bool(eventually(look))
        except AssertionError:
            self.told[what] = False

    def _ask(self, serve: Serve) -> None:
        def note(release_id: int, code: int, text: str, status: str = "", success_nodes: int = -1) -> None:
            self.answers.append(Answer(time.monotonic(), serve.number, release_id, code, text, status, success_nodes,
                                       self.done(release_id)))
        for number in RELEASES:
            code, data = serve.call("GET", f"/api/v1/releases/{number}?view=summary")
            if code:
                note(number, code, data)
            else:
                found = data["release"]
                note(number, 0, found["statusReason"], found["status"], found["successNodes"])
            code, data = serve.call("GET", f"/api/v1/releases/{number}/why")
            note(number, code, data if code else json.dumps(data))

    # -- the end ---------------------------------------------------------------------------

    def end(self) -> Seen:
        """Wait for the end of the release, end everything, and return what is to be judged."""
        first = self.serves[0]

        def is_over() -> bool:
            found = [first.call("GET", f"/api/v1/releases/{one}?view=summary") for one in RELEASES]
            return all(code == 0 and data["release"]["status"] in rc.TERMINAL for code, data in found)
        with contextlib.suppress(AssertionError):  # the release is judged as it is then
            eventually(is_over, TURN_S)
        acts = [Act(name, is_there()) for name, is_there in self.acts.items()]
        for release in first.ok("GET", "/api/v1/releases?pageSize=100")["items"]:
            if release["id"] not in RELEASES and release["status"] not in rc.TERMINAL:
                first.ok("POST", f"/api/v1/releases/{release['id']}/cancel", {})
        for serve in self.serves:
            serve.stop()
        (self.folder / "said").write_text("".join(
            f"{one.at - self.lost_at:8.2f} {one.release_id} {one.code} {one.status} {one.success_nodes} of {one.done} "
            f"{one.text}\n" for one in sorted(self.answers)))
        self.told["serve ended with 0"] = all(serve.process.returncode == 0 for serve in self.serves)
        self.told["no stack trace"] = not any("Traceback" in serve.log.read_text() for serve in self.serves)
        with contextlib.closing(rc.Database(self.servers.url_of_primary_alone(self.database))) as database:
            tables = read_tables(database)
        runs = {agent.address: self.agents.runs(agent) for agent in self.agents.all}
        return Seen(tables, runs, sum(agent.overlaps for agent in self.agents.all),
                    sorted(self.answers), acts, self.scenario.may_lose, self.quiet, self.back_at, self.told)


# ---------------------------------------------------------------------------
# The scenarios. Each begins with a release under way, and says when the database was lost and when it was back.
# ---------------------------------------------------------------------------


def switchover(turn: Turn) -> None:
    turn.confirm_acts()
    turn.lose(turn.servers.stop)
    turn.promote()
    turn.expect_logged("that the database moved", "moved to another server")


def kill(turn: Turn) -> None:
    turn.lose(lambda: turn.servers.signal(signal.SIGKILL))
    turn.promote()


def kill_synchronous(turn: Turn) -> None:
    turn.confirm_acts()
    kill(turn)


def hung(turn: Turn) -> None:
    turn.lose(lambda: turn.servers.signal(signal.SIGSTOP))
    time.sleep(5.0)  # how long it takes until somebody decides
    turn.servers.signal(signal.SIGKILL)  # the fence
    turn.promote()


def silent(turn: Turn) -> None:
    turn.confirm_acts()
    assert turn.host
    turn.lose(turn.host.cut_off)
    turn.expect_silence_told()
    time.sleep(max(turn.lost_at + SILENT_S - time.monotonic(), 0.0))
    turn.servers.signal(signal.SIGKILL)  # the fence: the standby had all of it before, so nothing may be lost
    turn.quiet = turn.lost_at + 3.0, time.monotonic()
    turn.promote()


def split_brain(turn: Turn) -> None:
    turn.lose(lambda: turn.servers.signal(signal.SIGSTOP))
    turn.servers.promote(keeps_old=True)
    turn.back()
    done = turn.done() + len(NODES) * max(at_once for _, at_once in NODES.values())
    turn.wait_until_done(done)  # what was in flight is over, so it goes on at the new primary
    turn.servers.signal(signal.SIGCONT)
    time.sleep(3.0)  # both take writes
    turn.servers.signal(signal.SIGKILL)
    turn.servers.remove_old()


def standby_only(turn: Turn) -> None:
    turn.lose(lambda: turn.servers.signal(signal.SIGKILL))
    lost_at = time.monotonic()
    time.sleep(12.0)
    turn.expect("that the database can't be used", "takes no writes|read-only|refused|closed|reset")
    turn.told["by /readyz, that it is not ready"] = not any(serve.is_ready() for serve in turn.serves)
    turn.told["by `why` on the standby, that it is one"] = "it takes no writes" in turn.why_on_standby()
    turn.quiet = lost_at + 3.0, time.monotonic()
    turn.promote()


def lost_commits(turn: Turn) -> None:
    turn.servers.cut_off_standby()
    turn.wait_until_done(turn.done() + DONE_UNSEEN)
    turn.confirm_acts()
    kill(turn)
    turn.expect_logged("that the database went back", "went back to an earlier state")
    turn.expect_metric("that the database went back", "releasectl_database_went_back_total 1")
    turn.told["by a new version, that the lost ones are used"] = turn.new_version() > turn.last_version


def synchronous_returns(turn: Turn) -> None:
    turn.lose(turn.servers.stop_standby)
    turn.expect("that the commit waits for a standby", "synchronous standby|takes no writes|has not answered")
    turn.servers.start_standby()
    turn.back()


def synchronous_emptied(turn: Turn) -> None:
    turn.lose(turn.servers.stop_standby)
    turn.expect("that the commit waits for a standby", "synchronous standby|takes no writes|has not answered")
    turn.servers.make_synchronous(False)
    turn.back()


def pooler(turn: Turn) -> None:
    turn.confirm_acts()
    turn.lose(turn.servers.stop)
    turn.servers.promote()
    assert turn.pooler
    turn.pooler.point_at(turn.servers.url_of_primary_alone(turn.database))
    turn.back()


class Scenario(NamedTuple):
    run: Callable[[Turn], None]
    what: str
    is_synchronous: bool = False
    is_pooled: bool = False
    has_host: bool = False
    may_lose: bool = False


SCENARIOS = {
    "switchover": Scenario(switchover, "primary stopped cleanly, standby promoted"),
    "kill": Scenario(kill, "primary killed (-9), standby promoted", may_lose=True),
    "kill-sync": Scenario(kill_synchronous, "the same, synchronous replication", is_synchronous=True),
    "hung": Scenario(hung, "primary stopped answering for 5 s, killed, standby promoted", may_lose=True),
    "silent": Scenario(silent, f"primary cut off without a word for {SILENT_S:g} s or more, killed, standby promoted",
                       has_host=True),
    "split-brain": Scenario(split_brain, "primary hung, standby promoted, old one back for 3 s, then killed",
                            may_lose=True),
    "standby-only": Scenario(standby_only, "primary killed, standby promoted more than 12 s later", may_lose=True),
    "lost-commits": Scenario(lost_commits, "standby cut off, primary killed, standby promoted", may_lose=True),
    "sync-down": Scenario(synchronous_returns, "synchronous standby stopped, started again", is_synchronous=True),
    "sync-given-up": Scenario(synchronous_emptied, "synchronous standby stopped, synchronous_standby_names emptied",
                              is_synchronous=True),
    "pooler": Scenario(pooler, "switchover behind PgBouncer, which is told the new server", is_pooled=True),
}
SHORT = ("switchover", "kill")


# ---------------------------------------------------------------------------
# The table.
# ---------------------------------------------------------------------------


class Row(NamedTuple):
    scenario: str
    driver: str
    what: str
    # Seconds from the loss to the moment that the database could be written again, and from then to the next dispatch
    # to a node of each protocol.
    away_s: float
    on_s: dict[str, float]
    # As Turn.told_s.
    told_s: dict[str, float]
    # How many nodes ran it once, of how many.
    once: int
    nodes: int
    # What was confirmed and is gone, where that may be.
    gone: list[str]
    faults: list[str]

    @property
    def verdict(self) -> str:
        return "WRONG" if self.faults else "ok"


def take_turn(name: str, driver: str, folder: Path, certs: Path) -> Row:
    """Let one scenario happen."""
    folder.mkdir()
    os.environ["RELEASECTL_PG_DRIVER"] = driver
    scenario = SCENARIOS[name]
    with contextlib.ExitStack() as stack:
        turn = Turn(stack, folder, certs, driver, scenario)
        turn.begin()
        scenario.run(turn)
        seen = turn.end()
    on_s = {protocol: min((run.began_at - turn.back_at for agent in turn.agents.all if agent.protocol == protocol
                           for run in turn.agents.runs(agent) if run.began_at > turn.back_at), default=float("nan"))
            for protocol in NODES}
    return Row(name, driver, scenario.what, turn.back_at - turn.lost_at, on_s, turn.told_s,
               sum(len(runs) == 1 for runs in seen.runs.values()), TOTAL,
               [act.name for act in seen.acts if not act.is_there], list(dict.fromkeys(judge(seen))))


def print_rows(rows: list[Row]) -> None:
    heads = ("SCENARIO", "DRIVER", "WHAT WAS DONE", "AWAY", *(f"ON: {name}" for name in NODES), "RAN ONCE", "VERDICT")
    lines = [(row.scenario, row.driver, row.what, f"{row.away_s:.1f} s",
              *(f"{row.on_s[name]:.1f} s" for name in NODES), f"{row.once}/{row.nodes}", row.verdict) for row in rows]
    widths = [max(len(line[n]) for line in [heads, *lines]) for n in range(len(heads))]
    for line in [heads, *lines]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for row in rows:
        if row.gone:
            print(f"{row.scenario} {row.driver}: confirmed, and gone with the old primary: {', '.join(row.gone)}")
        for what, seconds in row.told_s.items():
            print(f"{row.scenario} {row.driver}: who asked for {what} was told of the silence after {seconds:.1f} s")
        for fault in row.faults:
            print(f"{row.scenario} {row.driver}: {fault}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="scenarios:\n" + "\n".join(f"  {name:<14} {one.what}" for name, one in SCENARIOS.items()))
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="all of those below when none is named")
    parser.add_argument("--driver", action="append", choices=DRIVERS, help="this one only; may be repeated")
    parser.add_argument("--short", action="store_true", help=f"{' and '.join(SHORT)}, with one driver")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--keep", action="store_true", help="keep the logs in any case")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    options = parse_arguments()
    drivers = options.driver or DRIVERS[:1 if options.short else None]
    if not drivers:
        print("ha: no PostgreSQL driver is installed: psycopg, psycopg2 or pg8000", file=sys.stderr)
        return MISSING
    folder = Path(tempfile.mkdtemp(prefix="releasectl-ha."))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    certs = make_certs(folder / "certs", ",".join(f"127.0.1.{n}" for n in range(1, TOTAL + 1)))
    rows: list[Row] = []
    missing: set[str] = set()
    for name in options.scenarios or (SHORT if options.short else SCENARIOS):
        for driver in drivers:
            try:
                rows.append(take_turn(name, driver, folder / f"{name}-{driver}", certs))
            except FileNotFoundError as error:
                missing.add(str(error))
                print(f"{name} {driver}: left out, {error}", file=sys.stderr, flush=True)
                continue
            row = rows[-1]
            on = ", ".join(f"{row.on_s[one]:.1f} s ({one})" for one in NODES)
            print(f"{name} {driver}: {row.verdict}, away {row.away_s:.1f} s, on after {on}", *row.faults,
                  sep="\n  ", file=sys.stderr, flush=True)
    print_rows(rows)
    if options.json:
        Path(options.json).write_text(json.dumps([{**row._asdict(), "verdict": row.verdict} for row in rows],
                                                 indent=1) + "\n")
    is_wrong = any(row.faults for row in rows)
    if is_wrong or options.keep:
        print(f"evidence: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if is_wrong else MISSING if missing else 0


if __name__ == "__main__":
    sys.exit(main())
