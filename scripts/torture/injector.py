"""How a process kills or suspends itself, or sees its database or an answer fail.

This runs inside the process, around a releasectl.py that knows nothing of it. It replaces connect()
of the engines, the methods in POINTS, and two methods that a request to an agent goes through.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Callable

import releasectl as rc

from .injections import CALL, COUNTED, COUNTING, FIRED, REPORT_PREFIX, Injection, parse_injections

# Where an injection can act: methods that make transactions, and the two requests to agents.
REQUESTS = {"dispatch": (rc.AgentClient, "dispatch"), "query": (rc.AgentClient, "query")}
POINTS: dict[str, tuple[type, str]] = {
    **{f"releases.{name}": (rc.Releases, name) for name in ("act", "create", "find", "retry", "set_first_version")},
    **{f"claims.{name}": (rc.Claims, name) for name in (
        "claim", "commit", "dispatch_blockers", "drop", "halts", "read", "read_with_nodes", "renew", "scan",
        "was_written")},
    **{f"outbox.{name}": (rc.Outbox, name) for name in ("begin_try", "end_try")},
    "migrate": (rc.Database, "migrate"),
    **REQUESTS,
}
CONNECTS: dict[type, Callable[..., Any]] = {
    engine: engine.connect for engine in (rc.SqliteEngine, rc.PostgresEngine)}

SQLITE_ERRORS = {"full": "database or disk is full", "io": "disk I/O error", "busy": "database is locked",
                 "readonly": "attempt to write a readonly database", "gone": "unable to open database file",
                 "lost": "disk I/O error"}
POSTGRES_ERRORS = {"full": ("53100", "could not extend file: No space left on device"),
                   "io": ("58030", "could not read block 0: Input/output error"),
                   "busy": ("55P03", "canceling statement due to lock timeout"),
                   "readonly": ("25006", "cannot execute UPDATE in a read-only transaction")}
# Seconds for which every call fails after one that failed as "gone".
GONE_S = 1.0


def report(text: str) -> None:
    """Write a line for our parent, at once and in one piece."""
    os.write(2, f"{REPORT_PREFIX}{text}\n".encode())


class Injector:
    """Counts how often each point is passed, and acts at the hits that the injections name."""

    def __init__(self, injections: Sequence[Injection]):
        self.injections = injections
        self.current = threading.local()  # .point: the point that this thread is in
        self.requests: dict[int, str] = {}  # which request a socket is used for, by the socket's id()
        self.passed: Counter[str] = Counter()  # how often each point was passed
        self.calls = 0  # of the database
        self.commits: list[int] = []  # the numbers of those that were a COMMIT
        self._hits: Counter[Injection] = Counter()
        self._gone_until = 0.0
        self._lock = threading.Lock()

    @property
    def point(self) -> str:
        return getattr(self.current, "point", "")

    def due_at(self, point: str, when: str) -> Injection | None:
        """Count a hit; return the injection that acts now."""
        with self._lock:
            if when == "after":
                self.passed[point] += 1
            for injection in self.injections:
                if (injection.point, injection.when.removeprefix("stop-")) == (point, when):
                    self._hits[injection] += 1
                    if self._hits[injection] == injection.hit:
                        report(f"{FIRED}{injection}")
                        return injection
        return None

    def pass_point(self, point: str, when: str) -> None:
        """Kill or suspend this process if that is due."""
        due = self.due_at(point, when)
        if due is not None:
            os.kill(os.getpid(), signal.SIGSTOP if due.suspends else signal.SIGKILL)
            time.sleep(0.05 if due.suspends else 60)  # a signal may need a moment to arrive

    def fault_of_call(self, is_commit: bool) -> str:
        """Count a call of the database; return the fault with which it fails, or ""."""
        with self._lock:
            self.calls += 1
            if is_commit:
                self.commits.append(self.calls)
            if time.monotonic() < self._gone_until:
                return "gone"
            for injection in self.injections:
                if injection.point == CALL and injection.hit == self.calls:
                    if injection.when == "gone":
                        self._gone_until = time.monotonic() + GONE_S
                    report(f"{FIRED}{injection}")
                    return injection.when
        return ""


class FaultyConnection:
    """A connection of the engine's driver whose statements the injector sees first."""

    def __init__(self, real: Any, injector: Injector, engine: rc.SqliteEngine | rc.PostgresEngine):
        self._real, self._injector, self._engine = real, injector, engine
        self._backend = None if isinstance(engine, rc.SqliteEngine) else _value(real, "SELECT pg_backend_pid()")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def cursor(self) -> FaultyCursor:
        return FaultyCursor(self._real.cursor(), self)

    def execute(self, statement: str, run: Callable[[], Any]) -> Any:
        """Run a statement, or do what is due in its place."""
        injector, point = self._injector, self._injector.point
        is_commit = statement.strip().upper() == "COMMIT"
        fault = injector.fault_of_call(is_commit)
        if fault:
            if fault == "lost":
                run()
            self._fail(fault)
        if not is_commit:
            return run()
        injector.pass_point(point, "before")
        result = run()
        injector.pass_point(point, "unanswered")
        if injector.due_at(point, "lost"):
            self._fail("lost")
        return result

    def _fail(self, fault: str) -> None:
        """Do to the connection what the fault would, and raise what the driver raises then."""
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
        other = CONNECTS[rc.PostgresEngine](self._engine, False)
        try:
            _value(other, f"SELECT pg_terminate_backend({self._backend})")
            while _value(other, f"SELECT COUNT(*) FROM pg_stat_activity WHERE pid = {self._backend}"):
                time.sleep(0.005)
        finally:
            other.close()


class FaultyCursor:
    """A cursor of the engine's driver whose execute() goes through a FaultyConnection."""

    def __init__(self, real: Any, connection: FaultyConnection):
        self._real, self._connection = real, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def execute(self, statement: str, *params: Any) -> Any:
        return self._connection.execute(statement, lambda: self._real.execute(statement, *params))


def _value(connection: Any, statement: str) -> Any:
    cursor = connection.cursor()
    cursor.execute(statement)
    return cursor.fetchone()[0]


def install(injector: Injector) -> None:
    """Put an injector around the database, the store and the agents' client of this process."""
    for engine, connect in CONNECTS.items():
        setattr(engine, "connect", _faulty_connect(injector, connect))  # noqa: B010 - it is a method
    for name, (owner, method) in POINTS.items():
        wrap = _watched_request if name in REQUESTS else _watched_method
        setattr(owner, method, wrap(injector, name, getattr(owner, method)))
    _install_in_exchange(injector)


def _install_in_exchange(injector: Injector) -> None:
    """Let the moments "unanswered" and "lost" act when a request has left, and its answer is about to be read."""
    request, receive = rc.AgentClient._request, rc.TimedSocket.recv

    async def noted(self: Any, call: Any, sock: Any, *more: Any, **keywords: Any) -> Any:
        injector.requests[id(sock)] = "dispatch" if call.method == "POST" else "query"
        try:
            return await request(self, call, sock, *more, **keywords)
        finally:
            injector.requests.pop(id(sock))

    async def recv(self: Any, max_bytes: int) -> bytes:
        point = injector.requests.get(id(self.sock), "")
        if point and self.received == 0:
            injector.pass_point(point, "unanswered")
            if injector.due_at(point, "lost"):
                raise ConnectionResetError("torture: the answer was lost")
        return await receive(self, max_bytes)

    setattr(rc.AgentClient, "_request", noted)  # noqa: B010 - it is a method
    setattr(rc.TimedSocket, "recv", recv)  # noqa: B010


def _faulty_connect(injector: Injector, connect: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, create: bool) -> FaultyConnection:
        fault = injector.fault_of_call(is_commit=False)
        if fault:
            raise rc.DatabaseError(f"{self}: torture: no connection ({fault})")
        connection = connect(self, create)
        try:
            return FaultyConnection(connection, injector, self)
        except self.error as error:  # the connection was cut already, by somebody else
            raise rc.DatabaseError(self.explain(error)) from None
    return wrapped


def _watched_method(injector: Injector, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **keywords: Any) -> Any:
        if injector.point:  # called by another point, which is the one that counts
            return method(*args, **keywords)
        injector.current.point = name
        try:
            result = method(*args, **keywords)
        finally:
            injector.current.point = ""
        injector.pass_point(name, "after")
        return result
    return wrapped


def _watched_request(injector: Injector, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapped(*args: Any, **keywords: Any) -> Any:
        injector.pass_point(name, "before")
        result = await method(*args, **keywords)
        injector.pass_point(name, "after")
        return result
    return wrapped


def mark_rollbacks() -> None:
    """Let each rollback have a payload of its own: by it agents and tables are compared."""
    plan_rollback = rc.plan_rollback

    def plan_marked(tx: rc.Transaction, old: rc.Release, wish: rc.Again) -> tuple[rc.ReleaseRequest, rc.Plan,
                                                                                  list[rc.Node]]:
        request, plan, nodes = plan_rollback(tx, old, wish)
        mark = f"{request.payload.get('mark')}, for {old.id}, {rc.new_tag()}"
        return request._replace(payload={**request.payload, "mark": mark}), plan, nodes
    rc.plan_rollback = plan_marked


def run_injected(injections: str, command: Sequence[str]) -> int:
    """Run a command of releasectl under injections; return its exit code."""
    injector = Injector(parse_injections(injections))
    install(injector)
    mark_rollbacks()
    try:
        return int(rc.main(list(command)))
    finally:
        if COUNTING in injector.injections:
            report(COUNTED + json.dumps({"passed": injector.passed, "calls": injector.calls,
                                         "commits": injector.commits}))
