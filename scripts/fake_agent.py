#!/usr/bin/env python3
"""fake_agent: a fleet of stand-in agents in one process, for demos, tests and benchmarks.

    scripts/make_certs.sh certs 127.0.1.1,127.0.1.2,127.0.1.3
    python scripts/fake_agent.py --certs certs --listen 127.0.1.1-127.0.1.3:8443 --control 127.0.0.1:8499
    curl -X PUT 127.0.0.1:8499/agents/127.0.1.3 -d '{"outcome":"failed","message":"no disk space"}'

As a module (every method may be called from any thread):

    with Fleet("certs", [AgentSpec("127.0.1.1", 0)], task_ms=20) as fleet:
        agent = fleet.agent("127.0.1.1")
        agent.set(mode="status", http_status=503, times=2, only="dispatch")
        ... agent.port, agent.runs, agent.overlaps, agent.content, agent.sites ...

The two dialects are those of the contract, section 1, in the order of the real
agents: an agent looks for a known id first and only then at the version, so a
stored outcome is the answer whatever the version. What ran, and what is on the
node now, is told by the SHA-256 of the payload (payload_sha256): a success that
was not is seen by comparing it with the release's. What an agent does wrong on
request is its Behaviour. Never imported by releasectl.py.

Sections: vocabulary, HTTP and TLS on one connection, the agent, the fleet, the
control server, the command line. Everything but the fleet's public methods runs
in the thread of the fleet's own event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import ipaddress
import json
import re
import resource
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any, Callable, NamedTuple, Protocol, TypeVar

# ---------------------------------------------------------------------------
# Vocabulary: what can be asked of an agent, and the limits.
# ---------------------------------------------------------------------------

PROTOCOLS = ("tasks", "execute")
MODES = (
    "normal",
    "refuse",  # listener and connections closed; "times" does not count for it
    "hangTls",  # accepts, never does the handshake; "times" counts connections, "only" does not matter
    "hang",  # reads the request, never answers
    "drip",  # one byte each 0.2 s, endlessly
    "notJson",
    "tooBig",
    "wrongShape",
    "status",  # httpStatus with the JSON envelope
    "code",  # 200 with businessCode
    "redirect",
    "cut",  # runs the task, then closes in place of the answer
    "cutEarly",  # closes as soon as the request is read, and runs the task nevertheless
    "drop",  # closes, and does not run the task
)
BACKLOG = 128
MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_LOGGED_REQUESTS = 10_000
DRIP_S = 0.2
MAX_PENDING_S = 0.05  # how long a task of the "tasks" dialect is pending, at most
CALL_TIMEOUT_S = 30.0

T = TypeVar("T")


class AgentSpec(NamedTuple):
    """Where an agent listens (port 0: any free one) and which dialect it speaks."""

    address: str
    port: int = 8443
    protocol: str = "tasks"


@dataclasses.dataclass
class Behaviour:
    """What an agent does; keys are written in camelCase from outside."""

    task_ms: int = 200
    outcome: str = "success"
    message: str = ""  # lastError or message; empty: a default that fits the outcome
    mode: str = "normal"
    times: int = 0  # so many requests in this mode, then normal again; 0: for ever
    only: str = ""  # the mode holds for this operation only
    http_status: int = 500
    business_code: int = 5001
    delay_ms: int = 0  # before each answer
    forget: bool = False  # once: restart after the answer to the next dispatch
    rename: bool = False  # tasks only: a new task gets an id of the agent's own, "agent-" and the id sent


_CHOICES = {"mode": MODES, "outcome": ("success", "failed"), "only": ("", "dispatch", "query")}
_RANGES = {"http_status": (200, 599)}


def snake_case(key: str) -> str:
    return re.sub(r"[A-Z]", lambda match: "_" + match[0].lower(), key)


def camel_case(key: str) -> str:
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), key)


def parse_behaviour(keys: dict[str, Any]) -> dict[str, Any]:
    """Return behaviour keys in snake case, checked; values may be text. Raise ValueError with the key."""
    defaults = {**dataclasses.asdict(Behaviour()), "applied_version": 0}
    parsed = {}
    for key, value in keys.items():
        name = snake_case(key)
        if name not in defaults:
            raise ValueError(f"unknown key {key}: known are {', '.join(map(camel_case, defaults))}")
        parsed[name] = _parse_value(name, value, type(defaults[name]))
    return parsed


def _parse_value(name: str, value: Any, kind: type) -> Any:
    if kind is bool and value in ("true", "false", "1", "0"):
        value = value in ("true", "1")
    elif kind is int and isinstance(value, str) and value.isdecimal():
        value = int(value)
    if type(value) is not kind or value not in _CHOICES.get(name, (value,)):
        raise ValueError(f"{camel_case(name)}: {value!r} is not allowed")
    low, high = _RANGES.get(name, (0, 2**63))
    if isinstance(value, int) and not low <= value <= high:
        raise ValueError(f"{camel_case(name)}: {value} is out of range")
    return value


def payload_sha256(payload: dict[str, Any]) -> str:
    """Return the SHA-256 of a payload as canonical JSON, without its key "version".

    An execute agent is sent the version within the payload and a tasks agent beside it, and a
    rollback sends old content with a new version: without it the same content has the same digest.
    """
    content = {key: value for key, value in payload.items() if key != "version"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # any JSON, a lone surrogate too


def wall_clock() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")[:-6] + "Z"


# ---------------------------------------------------------------------------
# HTTP and TLS on one connection. TLS is done here on memory buffers, not by
# asyncio: its alerts are sent by every Python version in the same way then, and
# a connection can be cut without the goodbye of TLS.
# ---------------------------------------------------------------------------


class Request(NamedTuple):
    method: str
    path: str  # without the query
    body: bytes


class Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = "application/json; charset=utf-8"
    location: str = ""


def json_answer(document: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(document, separators=(",", ":")).encode())


def envelope(data: Any, code: int = 0, message: str = "success", status: int = 200) -> Answer:
    return json_answer({"code": code, "message": message, "data": data}, status)


def text_answer(status: int, text: str) -> Answer:
    return Answer(status, text.encode() + b"\n", "text/plain; charset=utf-8")


NOT_FOUND = text_answer(404, "404 page not found")
INVALID_BODY = envelope(None, 2001, "invalid request body", 400)

_REASONS = {200: "OK", 301: "Moved Permanently", 302: "Found", 400: "Bad Request", 404: "Not Found",
            413: "Content Too Large", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
            500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable"}


@functools.lru_cache(maxsize=64)
def _head(status: int, content_type: str) -> bytes:
    reason = _REASONS.get(status, "Status")
    return f"HTTP/1.1 {status} {reason}\r\nContent-Type: {content_type}\r\nContent-Length: ".encode()


def render(answer: Answer, keep_alive: bool) -> bytes:
    if answer.status in (204, 304):  # these have no body by definition
        return b"HTTP/1.1 %d No Content\r\n\r\n" % answer.status
    extra = b"" if keep_alive else b"\r\nConnection: close"
    if answer.location:
        extra += b"\r\nLocation: " + answer.location.encode("ascii", "replace")
    head = _head(answer.status, answer.content_type)
    return b"%s%d%s\r\n\r\n%s" % (head, len(answer.body), extra, answer.body)


class HttpError(Exception):
    """A request that is not worth an answer of the agent's own: status, text."""


class Head(NamedTuple):
    method: str
    path: str
    keep_alive: bool
    length: int
    expects_continue: bool


def parse_head(head: bytes) -> Head:
    lines = head.decode("latin-1").split("\r\n")
    try:
        method, target, version = lines[0].split(" ")
    except ValueError:
        raise HttpError(400, "malformed request line") from None
    fields = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise HttpError(400, "malformed header")
        fields[name.lower()] = value.strip()
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise HttpError(400, "malformed HTTP version")
    if version == "HTTP/1.1" and "host" not in fields:
        raise HttpError(400, "missing required Host header")
    if "transfer-encoding" in fields:
        raise HttpError(501, "unsupported transfer encoding")
    length = fields.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise HttpError(400, "bad Content-Length")
    if int(length) > MAX_BODY_BYTES:
        raise HttpError(413, "body too large")
    connection = fields.get("connection", "").lower()
    keep_alive = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
    expects = fields.get("expect", "").lower() == "100-continue"
    return Head(method, target.partition("?")[0], keep_alive, int(length), expects)


class Owner(Protocol):
    """Who serves a connection: an agent, or the control server."""

    def handle(self, connection: Connection, request: Request) -> None: ...
    def opened(self, connection: Connection) -> None: ...
    def shaken(self, resumed: bool, error: Exception | None) -> None: ...
    def lost(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One client: gives the owner one request at a time, and sends what the owner answers."""

    def __init__(self, owner: Owner, context: ssl.SSLContext | None = None, stalled: bool = False) -> None:
        self._owner = owner
        self._stalled = stalled  # never reads: for the mode hangTls
        self._transport: Any = None
        self._buffer = bytearray()
        self._head: Head | None = None
        self._busy = False
        self._goodbye = False  # the client ended TLS: what it sent before still counts
        self.closed = False
        self._tls: ssl.SSLObject | None = None
        self._shaken = context is None
        if context is not None:
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._owner.opened(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.closed = True
        self._owner.lost(self)

    def data_received(self, data: bytes) -> None:
        if self._stalled or self.closed:
            return
        if self._tls is None:
            self._buffer += data
        else:
            self._incoming.write(data)
            self._decrypt()
        self._parse()
        if self._goodbye:
            self.close()

    # what the owner uses

    def answer(self, answer: Answer) -> None:
        """End the request under way; the client may be gone by now."""
        if self.closed or self._head is None:
            return
        keep_alive = self._head.keep_alive
        self.write(render(answer, keep_alive))
        self._head, self._busy = None, False
        if not keep_alive:
            self.close()
        elif self._buffer:
            asyncio.get_running_loop().call_soon(self._parse)

    def write(self, data: bytes) -> None:
        if self.closed:
            return
        if self._tls is None:
            self._transport.write(data)
            return
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest):]
        self._flush()

    def close(self) -> None:
        """Close with the goodbye of TLS, after all that was written."""
        if self._tls is not None and self._shaken and not self.closed:
            with contextlib.suppress(ssl.SSLError):  # the client's goodbye is not waited for
                self._tls.unwrap()
            self._flush()
        self.cut()

    def cut(self) -> None:
        """Close as a program that died does."""
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once, whatever waits to be sent."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # TLS

    def _decrypt(self) -> None:
        """Move what came in into the buffer."""
        assert self._tls is not None
        try:
            if not self._shaken:
                self._shake()
            while True:
                data = self._tls.read(65536)
                if not data:
                    self._goodbye = True
                    return
                self._buffer += data
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._flush()  # the alert
            if not self._shaken:
                self._owner.shaken(False, error)
            self.cut()

    def _shake(self) -> None:
        assert self._tls is not None
        self._tls.do_handshake()
        self._shaken = True
        self._owner.shaken(bool(self._tls.session_reused), None)

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    # HTTP

    def _parse(self) -> None:
        while not self._busy and not self.closed:
            try:
                request = self._next_request()
            except HttpError as error:
                self._head = Head("", "", False, 0, False)
                self.answer(text_answer(*error.args))
                return
            if request is None:
                return
            self._busy = True
            self._owner.handle(self, request)

    def _next_request(self) -> Request | None:
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end > MAX_HEAD_BYTES or (end < 0 and len(self._buffer) > MAX_HEAD_BYTES):
                raise HttpError(431, "head too large")
            if end < 0:
                return None
            self._head = parse_head(bytes(self._buffer[:end]))
            del self._buffer[:end + 4]
            if self._head.expects_continue and len(self._buffer) < self._head.length:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = self._head
        if len(self._buffer) < head.length:
            return None
        body = bytes(self._buffer[:head.length])
        del self._buffer[:head.length]
        return Request(head.method, head.path, body)


# ---------------------------------------------------------------------------
# The agent.
# ---------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Task:
    """What an agent remembers of one task, of either dialect."""

    task_id: str  # as it was sent; a repeated dispatch is known by it
    type: str
    version: int
    payload: dataclasses.InitVar[Any] = None
    name: str = ""  # what the agent calls it: the same, or an id of its own
    status: str = "pending"
    message: str = ""
    created_at: str = dataclasses.field(default_factory=wall_clock)
    started_at: str = ""
    finished_at: str = ""
    broken: bool = False  # another task of an "execute" agent ran at the same time
    timer: asyncio.TimerHandle | None = None
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    exchange: Exchange | None = None  # of an "execute" agent: who waits for the outcome
    content: str = ""  # the payload's SHA-256
    websites: int = 0

    def __post_init__(self, payload: Any) -> None:
        # The payload itself is not kept: thousands of agents may get a large one.
        content = payload if isinstance(payload, dict) else {}
        websites = content.get("websites")
        self.name = self.name or self.task_id
        self.content = payload_sha256(content)
        self.websites = len(websites) if isinstance(websites, list) else 0


@dataclasses.dataclass(eq=False)
class Exchange:
    """One request that the agent is working on."""

    connection: Connection
    cuts: bool = False  # the mode "cut": close in place of the answer
    forgets: bool = False  # restart after the answer


class Agent:
    """One stand-in agent. Attributes without an underscore may be read from any thread."""

    def __init__(self, fleet: Fleet, spec: AgentSpec, context: ssl.SSLContext | None, task_ms: int) -> None:
        if spec.protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {spec.protocol}: known are {', '.join(PROTOCOLS)}")
        self.address = str(ipaddress.ip_address(spec.address))
        self.port = spec.port
        self.protocol = spec.protocol
        self.behaviour = Behaviour(task_ms=task_ms)
        self.applied_version = 0
        self.content = ""  # payload_sha256 of the last run that ended in success
        self.sites = 0  # what an "execute" agent serves now
        self._fleet = fleet
        self._context = context
        self._listener: socket.socket | None = None
        self._connections: set[Connection] = set()
        self._open: set[Exchange] = set()
        self._tasks: dict[str, Task] = {}  # by the id that was sent
        self._renamed: dict[str, Task] = {}  # by the agent's own id, where it gave one
        self._live: set[Task] = set()  # pending or running
        self.reset_log()

    def reset_log(self) -> None:
        self.connections = self.handshakes = self.handshake_errors = self.resumed = 0
        self.dispatches = self.queries = self.overlaps = self.restarts = self.max_concurrent = 0
        self._run_counts: dict[str, int] = {}
        self._runs: list[dict[str, Any]] = []
        self._requests: list[str] = []

    # for any thread

    def set(self, **behaviour: Any) -> None:
        """Change the behaviour; back to mode "normal" also resets times and only. Raise ValueError."""
        parsed = parse_behaviour(behaviour)
        self._fleet.call(lambda: self.apply_behaviour(parsed))

    def restart(self) -> None:
        """Forget the tasks, kill what runs, close the connections; applied version, content and sites stay."""
        self._fleet.call(self.apply_restart)

    def clear_log(self) -> None:
        """Set the counters to 0 and empty the logs; what the agent remembers stays."""
        self._fleet.call(self.reset_log)

    @property
    def in_flight(self) -> int:
        return len(self._open)

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What was run, in order of start; times are monotonic, finishedAt and outcome None at first.

        payloadSha256 is the payload's content; websites, of an "execute" agent, how many it named.
        """
        return [dict(run) for run in self._runs[:]]

    @property
    def run_counts(self) -> dict[str, int]:
        return dict(self._run_counts)

    @property
    def requests(self) -> list[str]:
        """The first 10,000 requests as "METHOD path", where the fleet logs them."""
        return self._requests[:]

    def snapshot(self) -> dict[str, Any]:
        """Return everything of the agent as one JSON object."""
        names = ("address", "port", "protocol", "applied_version", "content", "sites", "connections",
                 "open_connections", "handshakes", "handshake_errors", "resumed", "dispatches", "queries",
                 "overlaps", "restarts", "in_flight", "max_concurrent", "run_counts", "runs", "requests")
        document = {camel_case(name): getattr(self, name) for name in names}
        behaviour = dataclasses.asdict(self.behaviour)
        document["behaviour"] = {camel_case(name): value for name, value in behaviour.items()}
        return document

    # listening

    def listen(self) -> None:
        """Open the listener, at the same port as before. Raise OSError."""
        if self._listener is not None or self.behaviour.mode == "refuse":
            return
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((self.address, self.port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            place = f"{self.address}:{self.port}"
            raise OSError(error.errno, f"can't listen on {place}: {error.strerror}") from None
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._fleet.loop.add_reader(listener, self._accept)

    def unlisten(self) -> None:
        if self._listener is not None:
            self._fleet.loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def close_connections(self) -> None:
        for connection in list(self._connections):
            connection.cut()

    def abort_connections(self) -> None:
        for connection in list(self._connections):
            connection.abort()

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            if self._listener is None:
                return
            try:
                client, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._wait_for_files()
                return
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio only does it where proto is set
            self._fleet.adopt(client, self._new_connection())

    def _wait_for_files(self) -> None:
        listener = self._listener
        assert listener is not None
        self._fleet.loop.remove_reader(listener)
        self._fleet.log(f"{self.address}: too many open files, accepting again in 1 s")

        def resume() -> None:
            if self._listener is listener:
                self._fleet.loop.add_reader(listener, self._accept)

        self._fleet.loop.call_later(1.0, resume)

    def _new_connection(self) -> Connection:
        self.connections += 1
        if self.behaviour.mode == "hangTls":
            self._count_down()
            return Connection(self, stalled=True)
        return Connection(self, self._context)

    # Owner

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def shaken(self, resumed: bool, error: Exception | None) -> None:
        if error is None:
            self.handshakes += 1
            self.resumed += resumed
        else:
            self.handshake_errors += 1
            self._fleet.log(f"{self.address}:{self.port} handshake failed: {error}")

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        # A task goes on without its client; all else has ended with the connection.
        waited_for = {task.exchange for task in self._live}
        gone = [one for one in self._open if one.connection is connection and one not in waited_for]
        self._open.difference_update(gone)

    def handle(self, connection: Connection, request: Request) -> None:
        operation = self._operation(request)
        self._count(request, operation)
        mode = self._mode_for(operation)
        exchange = Exchange(connection, cuts=mode == "cut")
        if operation == "dispatch" and self.behaviour.forget:
            self.behaviour.forget = False
            exchange.forgets = True
        self._open.add(exchange)
        self.max_concurrent = max(self.max_concurrent, len(self._open))
        if mode == "cutEarly":
            connection.cut()
        if mode in ("normal", "cut", "cutEarly"):
            self._serve(exchange, request, operation)
        elif mode == "drop":
            exchange.cuts = True
            self._reply(exchange, NOT_FOUND)
        elif mode == "drip":
            self._drip(connection, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                                   b"Content-Length: 1048576\r\n\r\n{")
        elif mode != "hang":
            self._reply(exchange, self._wrong_answer(mode, request))

    # modes

    def _operation(self, request: Request) -> str:
        """Return what a request asks: dispatch, query, or empty for a path that is not there."""
        method, path = request.method, request.path
        if self.protocol == "execute":
            return "dispatch" if (method, path) == ("POST", "/agent/v1/tasks/execute") else ""
        if (method, path) == ("POST", "/tasks/dispatch"):
            return "dispatch"
        return "query" if method == "GET" and re.fullmatch(r"/tasks/[^/]+", path) else ""

    def _count(self, request: Request, operation: str) -> None:
        self.dispatches += operation == "dispatch"
        self.queries += operation == "query"
        if self._fleet.log_requests and len(self._requests) < MAX_LOGGED_REQUESTS:
            self._requests.append(f"{request.method} {request.path}")

    def _mode_for(self, operation: str) -> str:
        behaviour = self.behaviour
        mode = behaviour.mode
        if mode in ("normal", "refuse", "hangTls") or behaviour.only not in ("", operation):
            return "normal"
        self._count_down()
        return mode

    def _count_down(self) -> None:
        if self.behaviour.times > 0:
            self.behaviour.times -= 1
            if self.behaviour.times == 0:
                self.behaviour.mode, self.behaviour.only = "normal", ""

    def _wrong_answer(self, mode: str, request: Request) -> Answer:
        behaviour = self.behaviour
        message = behaviour.message or "simulated error"
        if mode == "notJson":
            return Answer(200, b"<html><body>It works!</body></html>\n", "text/html")
        if mode == "tooBig":
            return envelope({"padding": "x" * (2 * 1024 * 1024)})
        if mode == "wrongShape":
            return json_answer(["success", 0, None])
        if mode == "redirect":
            return text_answer(302, "Found")._replace(location=f"{request.path}-elsewhere")
        status = behaviour.http_status if mode == "status" else 200
        return envelope(None, behaviour.business_code, message, status)

    def _drip(self, connection: Connection, rest: bytes) -> None:
        if not connection.closed:
            connection.write(rest[:1] or b" ")
            self._fleet.loop.call_later(DRIP_S, self._drip, connection, rest[1:])

    # answers

    def _reply(self, exchange: Exchange, answer: Answer) -> None:
        if self.behaviour.delay_ms:
            self._fleet.loop.call_later(self.behaviour.delay_ms / 1000, self._deliver, exchange, answer)
        else:
            self._deliver(exchange, answer)

    def _deliver(self, exchange: Exchange, answer: Answer) -> None:
        self._open.discard(exchange)
        if exchange.cuts:
            exchange.connection.cut()
        else:
            exchange.connection.answer(answer)
        if exchange.forgets:
            self.apply_restart()

    def _serve(self, exchange: Exchange, request: Request, operation: str) -> None:
        if operation == "query":
            self._reply(exchange, self._query(urllib.parse.unquote(request.path[len("/tasks/"):])))
        elif operation == "":
            self._reply(exchange, self._unknown_path(request))
        else:
            try:
                document = json.loads(request.body)
            except (ValueError, RecursionError):
                document = None
            if not isinstance(document, dict):
                self._reply(exchange, INVALID_BODY)
            elif self.protocol == "tasks":
                self._reply(exchange, self._dispatch(document))
            else:
                self._execute(exchange, document)

    def _unknown_path(self, request: Request) -> Answer:
        path = request.path.rstrip("/")
        if path != request.path and self._operation(request._replace(path=path)):
            return text_answer(301, "Moved Permanently")._replace(location=path)
        return NOT_FOUND

    # the dialect "tasks"

    def _query(self, task_id: str) -> Answer:
        task = self._tasks.get(task_id) or self._renamed.get(task_id)
        if task is None:
            return envelope(None, 3001, f"task not found: {task_id}", 404)
        return envelope({"taskId": task_id, "type": task.type, "status": task.status,
                         "lastError": task.message, "createdAt": task.created_at,
                         "startedAt": task.started_at, "finishedAt": task.finished_at})

    def _dispatch(self, document: dict[str, Any]) -> Answer:
        task_id, version = document.get("taskId"), document.get("version", 0)
        if not isinstance(task_id, str) or not task_id or type(version) is not int:
            return INVALID_BODY
        task = self._tasks.get(task_id)
        if task is None:
            task = Task(task_id, str(document.get("type", "")), version, document.get("payload"))
            self._tasks[task_id] = task
            if self.behaviour.rename:
                task.name = f"agent-{task_id}"
                self._renamed[task.name] = task
            if version <= self.applied_version:
                task.status, task.started_at, task.finished_at = "success", wall_clock(), wall_clock()
            else:
                self._schedule(task)
                return envelope({"taskId": task.name, "status": "pending"})
        return envelope({"taskId": task.name, "status": task.status})

    def _schedule(self, task: Task) -> None:
        task_s = self.behaviour.task_ms / 1000
        pending_s = min(MAX_PENDING_S, task_s / 4)
        self._live.add(task)
        if task_s > 0:
            task.timer = self._fleet.loop.call_later(pending_s, self._begin, task, task_s - pending_s)
        else:  # it is done before anybody can ask
            self._begin(task)
            self._finish(task)

    # the dialect "execute"

    def _execute(self, exchange: Exchange, document: dict[str, Any]) -> None:
        task_id, kind, payload = document.get("requestId"), document.get("type"), document.get("payload")
        if not isinstance(task_id, str) or not task_id or not isinstance(kind, str) or not kind:
            self._reply(exchange, INVALID_BODY)
            return
        version = _execute_version(payload)
        known = self._tasks.get(task_id)  # only once its run has ended: a repetition before that runs too
        if known is not None:
            self._reply(exchange, _outcome(task_id, known.status, known.message))
        elif version <= self.applied_version:
            text = f"Version {version} already applied (current: {self.applied_version})"
            self._reply(exchange, _outcome(task_id, "success", text))
        else:
            task = Task(task_id, kind, version, payload, exchange=exchange)
            self._begin(task, self.behaviour.task_ms / 1000)

    # a run, in either dialect

    def _begin(self, task: Task, duration_s: float | None = None) -> None:
        running = [other for other in self._live if other.status == "running"]
        if running:
            self.overlaps += 1
        if running and self.protocol == "execute":
            for one in (task, *running):
                one.broken = True
        task.status, task.started_at = "running", wall_clock()
        task.run = {"taskId": task.task_id, "version": task.version, "payloadSha256": task.content,
                    "startedAt": time.monotonic(), "finishedAt": None, "outcome": None}
        if self.protocol == "execute":
            task.run["websites"] = task.websites
        self._runs.append(task.run)
        self._run_counts[task.task_id] = self._run_counts.get(task.task_id, 0) + 1
        self._live.add(task)
        if duration_s is not None:
            task.timer = self._fleet.loop.call_later(duration_s, self._finish, task)

    def _finish(self, task: Task) -> None:
        behaviour = self.behaviour
        task.status = "failed" if task.broken else behaviour.outcome
        task.message = behaviour.message
        if task.broken:
            task.message = "apply failed: another apply was running"
        elif task.status == "failed":
            task.message = behaviour.message or "simulated failure"
        elif self.protocol == "execute":
            task.message = behaviour.message or f"Version {task.version} applied"
        if task.status == "success":
            self.applied_version = max(self.applied_version, task.version)
            self.content = task.content
            if self.protocol == "execute":
                self.sites = task.websites
        self._tasks[task.task_id] = task
        self._end_run(task, task.status)
        if task.exchange is not None:
            self._reply(task.exchange, _outcome(task.task_id, task.status, task.message))

    def _end_run(self, task: Task, outcome: str) -> None:
        task.finished_at = wall_clock()
        self._live.discard(task)
        if task.run:
            task.run.update(finishedAt=time.monotonic(), outcome=outcome)
            self._fleet.log(f"{self.address}:{self.port} {task.task_id} v{task.version}: {outcome}")

    # changes from outside, in the loop's thread

    def apply_behaviour(self, parsed: dict[str, Any]) -> None:
        parsed = dict(parsed)
        self.applied_version = parsed.pop("applied_version", self.applied_version)
        if parsed.get("mode") == "normal":
            parsed = {"times": 0, "only": "", **parsed}
        self.behaviour = dataclasses.replace(self.behaviour, **parsed)
        if parsed.get("mode") in ("refuse", "hangTls"):
            self.abort_connections()
        if self.behaviour.mode == "refuse":
            self.unlisten()
        elif self._fleet.is_running:
            self.listen()

    def apply_finish(self) -> None:
        for task in list(self._live):
            if task.timer is not None:
                task.timer.cancel()
            if task.status == "pending":
                self._begin(task)
            self._finish(task)

    def apply_restart(self) -> None:
        for task in list(self._live):
            if task.timer is not None:
                task.timer.cancel()
            self._end_run(task, "killed")
        self.restarts += 1
        self._tasks.clear()
        self._renamed.clear()
        self._open.clear()
        self.close_connections()


def _execute_version(payload: Any) -> int:
    """Return the version as the agents read it: a double, so it rounds above 2^53; 0 where there is none."""
    version = payload.get("version") if isinstance(payload, dict) else None
    if not isinstance(version, (int, float)) or isinstance(version, bool):
        return 0
    try:
        return int(float(version))
    except (OverflowError, ValueError):
        return 0


def _outcome(request_id: str, status: str, message: str) -> Answer:
    return envelope({"requestId": request_id, "status": status, "message": message})


# ---------------------------------------------------------------------------
# The fleet: the loop's thread, the certificates, and the agents by address.
# ---------------------------------------------------------------------------


class Fleet:
    """Many agents in one thread. certs_dir is what make_certs.sh made; None: plain HTTP."""

    def __init__(self, certs_dir: str | Path | None, agents: list[AgentSpec], task_ms: int = 200, *,
                 tls12: bool = False, log_requests: bool = True, control: tuple[str, int] | None = None,
                 log: Callable[[str], None] | None = None) -> None:
        self._certs_dir = None if certs_dir is None else Path(certs_dir)
        self._tls12 = tls12
        self._contexts: dict[Path, ssl.SSLContext] = {}
        self.log_requests = log_requests
        self.log = log or (lambda _line: None)
        self.is_running = False
        self.loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None
        self._adopting: set[asyncio.Task[None]] = set()
        self.agents = [Agent(self, AgentSpec(*spec), self._context_for(spec[0]), task_ms) for spec in agents]
        self._by_address: dict[str, list[Agent]] = {}
        for agent in self.agents:
            self._by_address.setdefault(agent.address, []).append(agent)
        self._control = None if control is None else Control(self, *control)

    # for any thread

    def start(self) -> Fleet:
        """Listen on all addresses. Raise OSError, and then nothing listens."""
        if self._thread is not None:
            raise RuntimeError("the fleet was started before")
        _raise_file_limit(len(self.agents) * 2 + 256)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="fake-agents", daemon=True)
        self._thread.start()
        self.is_running = True
        try:
            self.call(self._listen)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Close everything and end the thread; the agents' counters stay readable."""
        if self._thread is None or not self.is_running:
            return
        self.call(self._close)
        self.is_running = False
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(CALL_TIMEOUT_S)

    def __enter__(self) -> Fleet:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def control_port(self) -> int:
        """The port of the control server, 0 where there is none."""
        return 0 if self._control is None else self._control.port

    def agent(self, address: str) -> Agent:
        """Return one agent by ADDRESS, or ADDRESS:PORT where several share it. Raise KeyError."""
        found = self.find(address)
        if len(found) != 1:
            raise KeyError(f"{len(found)} agents match {address}")
        return found[0]

    def find(self, address: str) -> list[Agent]:
        """Return agents by ADDRESS, ADDRESS:PORT or "*" for all."""
        if address == "*":
            return self.agents
        if address in self._by_address:
            return self._by_address[address]
        host, _, port = address.rpartition(":")
        return [agent for agent in self._by_address.get(host.strip("[]"), []) if str(agent.port) == port]

    def set(self, **behaviour: Any) -> None:
        """Change the behaviour of all agents."""
        parsed = parse_behaviour(behaviour)

        def apply() -> None:
            for agent in self.agents:
                agent.apply_behaviour(parsed)

        self.call(apply)

    def finish(self) -> None:
        """End every task now that was to take longer, on all agents at once: its time is over."""
        def finish() -> None:
            for agent in self.agents:
                agent.apply_finish()

        self.call(finish)

    def clear_log(self) -> None:
        """Set the counters of all agents to 0 and empty their logs."""
        def clear() -> None:
            for agent in self.agents:
                agent.reset_log()

        self.call(clear)

    def snapshot(self) -> dict[str, Any]:
        """Return every agent's JSON object, by address, or ADDRESS:PORT where several share it."""
        return {self._name_of(agent): agent.snapshot() for agent in self.agents}

    def _name_of(self, agent: Agent) -> str:
        is_alone = len(self._by_address[agent.address]) == 1
        return agent.address if is_alone else f"{agent.address}:{agent.port}"

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the loop's thread; return its result or raise its exception."""
        if not self.is_running or threading.current_thread() is self._thread:
            return function()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def settle() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # it belongs to the thread that called
                future.set_exception(error)

        self.loop.call_soon_threadsafe(settle)
        return future.result(CALL_TIMEOUT_S)

    # in the loop's thread

    def adopt(self, client: socket.socket, connection: Connection) -> None:
        """Hand an accepted socket to its protocol."""
        task = self.loop.create_task(self._adopt(client, connection))
        self._adopting.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._adopting.discard)

    async def _adopt(self, client: socket.socket, connection: Connection) -> None:
        try:
            await self.loop.connect_accepted_socket(lambda: connection, client)
        except (OSError, asyncio.CancelledError):
            client.close()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(asyncio.sleep(0))  # lets the closed connections go
            self.loop.close()

    def _listen(self) -> None:
        for agent in self.agents:
            agent.listen()
        if self._control is not None:
            self._control.listen()

    def _close(self) -> None:
        if self._control is not None:
            self._control.unlisten()
        for task in list(self._adopting):
            task.cancel()
        for agent in self.agents:
            agent.unlisten()
            agent.abort_connections()

    def _context_for(self, address: str) -> ssl.SSLContext | None:
        if self._certs_dir is None:
            return None
        certificate = self._certificate_for(address)
        if certificate not in self._contexts:
            self._contexts[certificate] = self._new_context(certificate)
        return self._contexts[certificate]

    def _certificate_for(self, address: str) -> Path:
        assert self._certs_dir is not None
        directory = self._certs_dir / "agents"
        for name in (address, "default"):
            if (directory / f"{name}.crt").exists():
                return directory / f"{name}.crt"
        first = min(directory.glob("*.crt"), default=None)
        if first is None:
            hint = f"no agent certificate in {directory}: make_certs.sh makes them"
            raise FileNotFoundError(errno.ENOENT, hint)
        return first

    def _new_context(self, certificate: Path) -> ssl.SSLContext:
        assert self._certs_dir is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self._tls12:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        context.load_verify_locations(self._certs_dir / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def _raise_file_limit(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and soft != resource.RLIM_INFINITY:
        new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, new), hard))


# ---------------------------------------------------------------------------
# The control server: plain HTTP, loopback only.
#   GET /agents   PUT /agents/ADDRESS {behaviour}   POST /agents/ADDRESS/restart   DELETE /log
# ---------------------------------------------------------------------------


class Control:
    """The control server of a fleet; ADDRESS may be "*" for all agents."""

    def __init__(self, fleet: Fleet, address: str, port: int) -> None:
        if not ipaddress.ip_address(address).is_loopback:
            raise ValueError(f"the control address must be a loopback address, not {address}")
        self.address = address
        self.port = port
        self._fleet = fleet
        self._server: asyncio.AbstractServer | None = None
        self._connections: set[Connection] = set()

    def listen(self) -> None:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        listener = socket.create_server((self.address, self.port), family=family)
        self.port = listener.getsockname()[1]
        # create_server with a ready socket only registers it; there is nothing to wait for.
        starting = self._fleet.loop.create_task(
            self._fleet.loop.create_server(lambda: Connection(self), sock=listener))
        starting.add_done_callback(self._started)

    def _started(self, task: asyncio.Task[Any]) -> None:
        self._server = task.result()

    def unlisten(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def shaken(self, resumed: bool, error: Exception | None) -> None:
        pass

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def handle(self, connection: Connection, request: Request) -> None:
        try:
            answer = self._route(request)
        except (ValueError, OSError) as error:
            answer = json_answer({"error": str(error)}, 400)
        connection.answer(answer)

    def _route(self, request: Request) -> Answer:
        path = urllib.parse.unquote(request.path)
        if (request.method, path) == ("GET", "/agents"):
            return json_answer(self._fleet.snapshot())
        if (request.method, path) == ("DELETE", "/log"):
            self._fleet.clear_log()
            return json_answer({"agents": len(self._fleet.agents)})
        match = re.fullmatch(r"/agents/([^/]+)(/restart)?", path)
        agents = self._fleet.find(match[1]) if match else []
        if match is None or not agents:
            return json_answer({"error": f"nothing at {path}"}, 404)
        if request.method == "POST" and match[2]:
            for agent in agents:
                agent.apply_restart()
        elif request.method == "PUT" and not match[2]:
            keys = json.loads(request.body)
            if not isinstance(keys, dict):
                raise ValueError("the body must be a JSON object")
            parsed = parse_behaviour(keys)
            for agent in agents:
                agent.apply_behaviour(parsed)
        else:
            return json_answer({"error": f"{request.method} is not for {path}"}, 404)
        return json_answer({"agents": len(agents)})


# ---------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------


def parse_listen(text: str) -> list[AgentSpec]:
    """Return the agents of FIRST[-LAST]:PORT[,PROTOCOL]. Raise ValueError."""
    place, _, protocol = text.partition(",")
    addresses, colon, port = place.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"not an address and a port: {text}")
    first, _, last = addresses.strip("[]").partition("-")
    low, high = ipaddress.ip_address(first), ipaddress.ip_address(last or first)
    if low.version != high.version or int(high) < int(low):
        raise ValueError(f"not a range of addresses: {addresses}")
    if protocol not in ("", *PROTOCOLS):
        raise ValueError(f"unknown protocol {protocol}: known are {', '.join(PROTOCOLS)}")
    count = int(high) - int(low) + 1
    return [AgentSpec(str(low + n), int(port), protocol or "tasks") for n in range(count)]


def parse_pairs(text: str) -> dict[str, str]:
    """Return the pairs of KEY=VALUE[,KEY=VALUE...]; a comma that no KEY= follows belongs to the value."""
    pairs = {}
    for pair in re.split(r",(?=\w+=)", text):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"not KEY=VALUE: {pair}")
        pairs[key] = value
    return pairs


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fake_agent.py", description="A fleet of stand-in agents.")
    parser.add_argument("--certs", metavar="DIR", help="what make_certs.sh made")
    parser.add_argument("--plain", action="store_true", help="HTTP without TLS")
    parser.add_argument("--listen", metavar="FIRST[-LAST]:PORT[,PROTOCOL]", action="append", required=True,
                        help="addresses, and the dialect: tasks (default) or execute; may be repeated")
    parser.add_argument("--task-ms", type=int, default=200, metavar="N", help="how long a task runs (200)")
    parser.add_argument("--set", nargs=2, metavar=("ADDRESS", "KEY=VALUE[,KEY=VALUE]"), action="append",
                        default=[], help="behaviour of one agent, or of all with *; may be repeated")
    parser.add_argument("--control", metavar="ADDRESS:PORT", help="control over plain HTTP, loopback only")
    parser.add_argument("--tls12", action="store_true", help="TLS 1.2 and nothing newer")
    parser.add_argument("--log-requests", action="store_true",
                        help="keep the first 10,000 request lines of each agent")
    parser.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")
    options = parser.parse_args(argv)
    if bool(options.certs) == options.plain:
        parser.error("one of --certs DIR and --plain is needed")
    if options.task_ms < 0:
        parser.error("--task-ms must not be negative")
    return options


def build_fleet(options: argparse.Namespace) -> Fleet:
    specs = [spec for text in options.listen for spec in parse_listen(text)]
    control = parse_listen(options.control)[0][:2] if options.control else None
    fleet = Fleet(options.certs, specs, options.task_ms, tls12=options.tls12, control=control,
                  log_requests=options.log_requests, log=None if options.quiet else log_to_stderr)
    for address, pairs in options.set:
        agents = fleet.find(address)
        if not agents:
            raise ValueError(f"--set: no agent at {address}")
        for agent in agents:
            agent.set(**parse_pairs(pairs))
    return fleet


def log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        fleet = build_fleet(options).start()
    except (ValueError, OSError) as error:
        text = getattr(error, "strerror", None) or error
        print(f"fake_agent: {text}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"ready: {len(fleet.agents)} agents", flush=True)
    if fleet.control_port:
        fleet.log(f"control: {options.control.rpartition(':')[0]}:{fleet.control_port}")
    stopped.wait()
    fleet.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
