"""The laboratory: databases, certificates, agents and processes that tests, bench.py, flood.py and torture share.

Everything in it is real but the clock. Nothing here needs pytest (conftest.py makes its fixtures of
it), so that the scripts run where there is only Python. What releasectl.py is meant is the first on
sys.path: LAB_PROGRAM names the folder of another one.

Sections: waiting, databases, certificates and settings, agents, a world, processes, the API.
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import pwd
import py_compile
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [os.environ.get("LAB_PROGRAM", str(ROOT)), str(ROOT / "scripts")]

from fake_agent import Agent, AgentSpec, Fleet  # noqa: E402
from forks import Forks  # noqa: E402

import releasectl as rc  # noqa: E402

PROGRAM = str(ROOT / "releasectl.py")
SCRIPTS = ROOT / "scripts"
TIMEOUT_S = 60
# How long a task takes that a test ends itself, by Fleet.finish().
FOREVER_MS = 600_000
# Where agents listen; Linux has all of 127.0.0.0/8.
ADDRESSES = [f"127.0.1.{n}" for n in range(1, 21)]
HOST = ADDRESSES[0]
DRIVERS = [name for name in ("psycopg", "psycopg2", "pg8000") if importlib.util.find_spec(name)]
# Who runs the tests: the actor of what the command line does.
USER = pwd.getpwuid(os.getuid()).pw_name
# What a release to execute agents needs at least: they would drop all their sites without it.
SITES: dict[str, Any] = {"websites": []}
# Root may write and read everywhere; without these two abilities it obeys permissions as others do.
AS_OTHERS = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all")
# Below what the kernel gives to clients, and what postgres.sh takes: nobody gets it between our look and our use.
PORTS = range(10_000, 16_000)
# A time to come as people read it, whatever the time of day: after midnight it has its day.
CLOCK = r"(?:\d{4}-\d\d-\d\d )?\d\d:\d\dZ?"


# -- waiting ---------------------------------------------------------------------------------

def eventually(look: Callable[[], Any], within_s: float = 60.0, message: str | Callable[[], object] = "") -> Any:
    """Return what look() returns as soon as it is true; fail with the last value it saw.

    message: what is wrong then; a function is called at the failure.
    """
    give_up_at = time.monotonic() + within_s
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > give_up_at:
            text = message() if callable(message) else message
            raise AssertionError(f"{text or 'it did not come'} within {within_s} s; last seen: {seen!r}")
        time.sleep(0.01)


class FakeClock(rc.Clock):
    """Both clocks, turned by hand."""

    def __init__(self, wall: float = 1_790_000_000.0, elapsed: float = 1_000.0):
        self.now_wall, self.now_elapsed = wall, elapsed

    def wall(self) -> float:  # type: ignore[override]
        return self.now_wall

    def elapsed(self) -> float:  # type: ignore[override]
        return self.now_elapsed

    def advance(self, seconds: float) -> None:
        self.now_wall += seconds
        self.now_elapsed += seconds


class AheadClock(rc.Clock):
    """The real clocks, until a test turns them on."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def wall(self) -> float:  # type: ignore[override]
        return time.time() + self.ahead_s

    def elapsed(self) -> float:  # type: ignore[override]
        return rc.Clock.elapsed() + self.ahead_s

    def advance(self, seconds: float) -> None:
        self.ahead_s += seconds


# -- databases -------------------------------------------------------------------------------

def postgres(*words: object) -> str:
    """Run scripts/postgres.sh, which starts, removes, ... a throwaway server; return what it prints, a URL mostly.

    Raise OSError with what it says where it fails.
    """
    done = subprocess.run(["bash", str(SCRIPTS / "postgres.sh"), *map(str, words)], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout.strip()


def database_on(server_url: str, name: str) -> str:
    """Return the URL of a server's database of that name."""
    return f"{server_url.rsplit('/', 1)[0]}/{name}"


def migrate(url: str) -> None:
    """Make or bring a database to this schema, and close it."""
    database = rc.Database(url)
    database.migrate()
    database.close()


@contextlib.contextmanager
def at_schema(url: str, step: int) -> Iterator[rc.Store]:
    """Give a store over a database that has the first steps of schema.sql only, for SQL; close it."""
    database, steps = rc.Database(url), rc.schema_steps()[:step]
    with mock.patch.object(rc, "schema_steps", return_value=steps):
        database.migrate()
    with contextlib.closing(database):
        yield rc.Store(database)


def admin(server_url: str, statement: str) -> Any:
    """Run one statement in a session of its own; return the first value of its result, if it has one."""
    connection = rc.PostgresEngine(server_url).connect(create=False)
    try:
        cursor = connection.cursor()
        cursor.execute(statement)
        return cursor.fetchone()[0] if cursor.description else None
    finally:
        connection.close()


def take_away(url: str) -> None:
    """Make a database unreachable, for those connected to it too."""
    if url.startswith("sqlite:///"):
        path = url[len("sqlite:///"):]
        os.rename(path, path + ".away")
        return
    server, name = database_on(url, "postgres"), url.rsplit("/", 1)[1]
    admin(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    admin(server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


class Pooler:
    """A PgBouncer before one server, with that one's databases. Root's runs as nobody, as it refuses root."""

    def __init__(self, folder: Path, server_url: str, mode: str = "transaction", size: int = 3, more: str = ""):
        """Start it, with more lines of settings; raise FileNotFoundError where there is none."""
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if not program:
            raise FileNotFoundError("pgbouncer is not installed")
        self._folder, self._mode, self._size, self._more, self.port = folder, mode, size, more, free_port()
        self._settings = folder / f"pgbouncer-{self.port}.ini"
        self.point_at(server_url)
        command = [program, str(self._settings)]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
            for path in (folder, *folder.parents):
                if path.owner() == "root" and str(path) not in ("/", "/tmp"):
                    path.chmod(path.stat().st_mode | 0o55)
        self._log = folder / f"pgbouncer-{self.port}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        eventually(self._listens)

    def point_at(self, server_url: str) -> None:
        """Name the server; a pooler that runs goes on with that one."""
        server = urllib.parse.urlsplit(server_url)
        (self._folder / "users").write_text(f'"{server.username}" ""\n')
        self._settings.write_text(
            f"[databases]\n* = host={server.hostname} port={server.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {self.port}\nunix_socket_dir =\nauth_type = trust\nauth_file = {self._folder}/users\n"
            f"pool_mode = {self._mode}\ndefault_pool_size = {self._size}\nmax_client_conn = 200\n"
            f"{self._more}\n")
        if hasattr(self, "process"):
            self.process.send_signal(signal.SIGHUP)

    def url(self, server_url: str) -> str:
        """Return the URL by which a server's database is reached through it."""
        server = urllib.parse.urlsplit(server_url)
        return f"postgresql://{server.username}@127.0.0.1:{self.port}{server.path}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT_S)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


def add_nodes(store: rc.Store, count: int, protocol: str = "tasks", first: int = 1) -> list[rc.Node]:
    """Add nodes edge-1, edge-2, ... whose agents nobody calls."""
    return [store.nodes.add(f"edge-{n}", ADDRESSES[n - 1], agent_protocol=protocol)
            for n in range(first, first + count)]


def fleet(count: int, labels: Callable[[int], dict[str, str]] = lambda _: {}) -> list[rc.Node]:
    """Return nodes 1, 2, ... that no database has; labels: from a node's number to its labels."""
    return [rc.Node(n, f"edge-{n}", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 8443, "tasks", rc.to_json(labels(n)), 1,
                    "online", "", "") for n in range(1, count + 1)]


def new_release(store: rc.Store, **fields: Any) -> rc.Release:
    """Create a release for the nodes there are."""
    return store.releases.create(rc.ReleaseRequest(**fields), "test")[0]


def statuses(store: rc.Store, release_id: int) -> list[str]:
    """Return the statuses of a release's nodes, in order."""
    return [node.status for node in store.releases.with_nodes(release_id)[1]]


def assert_books_balance(store: rc.Store, release_id: int) -> None:
    """Rule 7: the counters are the rows, and a terminal release has all its nodes at rest."""
    release, nodes = store.releases.with_nodes(release_id)
    tally = [node.status for node in nodes]
    assert (release.success_nodes, release.failed_nodes) == (tally.count("success"), tally.count("failed"))
    if release.is_terminal:
        assert set(tally) <= rc.AT_REST
        assert tally.count("success") + tally.count("failed") + tally.count("skipped") == release.total_nodes


def nodes_of(store: rc.Store, release: rc.Release) -> list[rc.ReleaseNode]:
    return store.releases.with_nodes(release.id)[1]


def outcomes(store: rc.Store, release: rc.Release) -> list[tuple[str, str, str]]:
    return [(n.status, n.error_kind, n.error_msg) for n in nodes_of(store, release)]


def sql(store: rc.Store, statement: str, *params: object) -> int:
    """Do what a person with a database client may do; return the number of rows."""
    with store.database.transaction(write=True) as tx:
        return tx.execute(statement, *params)


@contextlib.contextmanager
def nothing_committed(store: rc.Store) -> Iterator[None]:
    """Let every transaction fail at its end."""
    transaction = store.database.transaction

    @contextlib.contextmanager
    def failing(write: bool = False, create: bool = False) -> Iterator[rc.Transaction]:
        with transaction(write, create) as tx:
            yield tx
            raise rc.DatabaseError("not committed")

    with mock.patch.object(store.database, "transaction", failing):
        yield


# -- certificates and settings ------------------------------------------------------------------

def make_certs(folder: Path, *names: str, **environment: str) -> Path:
    """Make a CA, a client certificate and agents' certificates; return the folder."""
    subprocess.run(["bash", str(SCRIPTS / "make_certs.sh"), str(folder), *names], check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    return folder


def mtls(certs: Path) -> dict[str, str]:
    """Return the settings for mutual TLS with a folder's certificates."""
    return {"CONTROL_CERT": f"{certs}/control.crt", "CONTROL_KEY": f"{certs}/control.key",
            "CONTROL_CA": f"{certs}/ca.crt"}


def settings_for(url: str, certs_folder: Path | None = None, **overrides: object) -> rc.Settings:
    """Return settings for tests: quick intervals, mutual TLS with the folder's certificates."""
    values = {"DATABASE_URL": url, "RELEASE_EXECUTOR_INTERVAL_SEC": "0.2", "AGENT_CONNECT_TIMEOUT_SEC": "20",
              "AGENT_REQUEST_TIMEOUT_SEC": "20", "AGENT_CONCURRENCY": "16", "HTTP_ADDR": "127.0.0.1:0"}
    if certs_folder is None:
        values["MTLS_ENABLED"] = "0"
    else:
        values.update(mtls(certs_folder))
    values.update({name: str(value) for name, value in overrides.items()})
    return rc.Settings.load(values)


def server_context(folder: Path, ca: Path | None = None, version: str = "") -> ssl.SSLContext:
    """Return an agent's context with the folder's one certificate; it demands ours of the CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = next((folder / "agents").glob("*.crt"))
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    context.load_verify_locations((ca or folder) / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    if version:
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    return context


def our_files(certs: Path, folder: Path) -> dict[str, str]:
    """Copy our certificate and key; return the settings that name them."""
    for name in ("control.crt", "control.key"):
        shutil.copy(certs / name, folder / name)
    return {"CONTROL_CERT": f"{folder}/control.crt", "CONTROL_KEY": f"{folder}/control.key"}


def copy_pair(certs: Path, folder: Path, name: str = ADDRESSES[0]) -> dict[str, str]:
    """Copy a certificate and its key to where they can be renewed; return the settings."""
    for suffix in ("crt", "key"):
        shutil.copy2(certs / "agents" / f"{name}.{suffix}", folder / f"api.{suffix}.new")
        os.replace(folder / f"api.{suffix}.new", folder / f"api.{suffix}")
    return {"HTTP_ADDR": f"{ADDRESSES[0]}:0", "HTTP_CERT": f"{folder}/api.crt", "HTTP_KEY": f"{folder}/api.key"}


def trusting(certs: Path, *client_pair: str) -> ssl.SSLContext:
    """Return a client's context for a folder's CA."""
    context = ssl.create_default_context(cafile=f"{certs}/ca.crt")
    if client_pair:
        context.load_cert_chain(*client_pair)
    return context


# -- agents ------------------------------------------------------------------------------------

@contextlib.contextmanager
def fleets(certs: Path) -> Iterator[Callable[..., Fleet]]:
    """Give a function that starts agents that really listen; all are stopped at the end."""
    with contextlib.ExitStack() as stack:
        def start(count: int, protocol: str = "tasks", task_ms: int = 20, tls12: bool = False) -> Fleet:
            specs = [AgentSpec(address, 0, protocol) for address in ADDRESSES[:count]]
            return stack.enter_context(Fleet(certs, specs, task_ms=task_ms, tls12=tls12))

        yield start


TASK_ID = "apply_config_10.0.0.7_42"
DRIP_S = 0.05


class Peer:
    """A listening thread: on each connection, one after the other, it does what a test says."""

    def __init__(self, talk: Callable[[Peer, Any], None], tls: ssl.SSLContext | None, host: str = HOST):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.host, self.port = host, self.listener.getsockname()[1]
        self.talk, self.tls = talk, tls
        self.accepted = self.handshakes = 0
        self.requests: list[tuple[str, bytes]] = []  # the head, the body
        self.serials: list[str] = []  # of the client certificates
        self.stopped = threading.Event()
        self._current: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self.stopped.is_set():
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            with contextlib.suppress(OSError), contextlib.closing(sock):
                self._meet(sock)

    def _meet(self, sock: socket.socket) -> None:
        if self.tls is None:
            self._current = sock
            self.talk(self, sock)
            return
        with self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False,
                                  suppress_ragged_eofs=False) as tls_sock:
            self._current = tls_sock
            tls_sock.do_handshake()
            self.handshakes += 1
            self.serials.append(str((tls_sock.getpeercert() or {}).get("serialNumber", "")))
            self.talk(self, tls_sock)

    def read_request(self, sock: socket.socket) -> None:
        """Read one request with its body. Raise OSError when the client ends the connection."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._read(sock)
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        while length and len(body) < int(length.group(1)):
            body += self._read(sock)
        self.requests.append((head.decode(), body))

    @staticmethod
    def _read(sock: socket.socket) -> bytes:
        data = sock.recv(65536)
        if not data:
            raise ConnectionError("the client went away")
        return data

    def address(self, protocol: str = "tasks", host: str = "") -> rc.Address:
        return rc.Address(host or self.host, self.port, protocol)

    def stop(self) -> None:
        self.stopped.set()
        for sock in (self.listener, self._current):
            with contextlib.suppress(OSError):
                if sock is not None:
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self._thread.join(TIMEOUT_S)
        self.listener.close()
        assert not self._thread.is_alive(), "the thread of a peer does not end"


def hang(peer: Peer, sock: socket.socket) -> None:
    """Take what comes, answer nothing."""
    peer.stopped.wait(TIMEOUT_S)


def hang_after_request(peer: Peer, sock: socket.socket) -> None:
    peer.read_request(sock)
    hang(peer, sock)


def drip(start: bytes, more: bytes) -> Callable[[Peer, Any], None]:
    """Answer start at once, and more byte by byte, over and over."""
    def talk(peer: Peer, sock: socket.socket) -> None:
        if peer.tls is not None:
            peer.read_request(sock)
        sock.sendall(start)
        while True:
            for byte in more:
                sock.sendall(bytes([byte]))
                if peer.stopped.wait(DRIP_S):
                    return
    return talk


def says(*answers: bytes, forever: bytes = b"", reset: bool = False) -> Callable[[Peer, Any], None]:
    """Give each request of a connection its answer, the last one also endlessly, then close."""
    def talk(peer: Peer, sock: socket.socket) -> None:
        for answer in answers:
            peer.read_request(sock)
            sock.sendall(answer)
        while forever and not peer.stopped.is_set():
            sock.sendall(forever)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return talk


def reply(body: object, status: str = "200 OK", headers: str = "") -> bytes:
    """Return a whole answer; a body that is not bytes goes as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(raw)}\r\n{headers}\r\n".encode() + raw


def envelope(data: object, code: object = 0, message: str = "success") -> dict[str, object]:
    return {"code": code, "message": message, "data": data}


def accepted(task_id: str = TASK_ID) -> bytes:
    return reply(envelope({"taskId": task_id, "status": "pending"}))


def task(status: str, task_id: str = TASK_ID, **fields: object) -> bytes:
    return reply(envelope({"taskId": task_id, "status": status, **fields}))


def executed(status: str, message: object = "", request_id: str = TASK_ID) -> bytes:
    return reply(envelope({"requestId": request_id, "status": status, "message": message}))


# -- a world ------------------------------------------------------------------------------------

class Inbox:
    """A receiver of notifications: it counts what it gets, and answers with a status, or not at all."""

    def __init__(self, status: int = 200, tls: ssl.SSLContext | None = None):
        self.status = status
        self.is_hanging = False
        self.messages: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self._stopped = threading.Event()
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if inbox.is_hanging:
                    inbox._stopped.wait(TIMEOUT_S)
                    return
                if inbox.status < 300:
                    inbox.heads.append(dict(self.headers))
                    inbox.bodies.append(body)
                    inbox.messages.append(json.loads(body))
                self.send_response(inbox.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://{HOST}:{self._server.server_port}/hook/SECRET?key=SECRET"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def kinds(self) -> list[str]:
        return [message["kind"] for message in self.messages]

    def stop(self) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()


class WaitingClient:
    """An AgentClient whose requests are waited for, each by run()."""

    def __init__(self, agents: rc.AgentClient,
                 run: Callable[[Coroutine[rc.Wait, None, rc.Outcome]], rc.Outcome] = rc.run_coroutine):
        self.agents, self.run = agents, run

    def dispatch(self, *arguments: Any) -> rc.Outcome:
        return self.run(self.agents.dispatch(*arguments))

    def query(self, *arguments: Any) -> rc.Outcome:
        return self.run(self.agents.query(*arguments))

    def close(self) -> None:
        self.agents.close()


class World:
    """A store, agents that listen, their nodes, and settings to run executors over them."""

    def __init__(self, store: rc.Store, url: str, certs_folder: Path, new_fleet: Callable[..., Fleet],
                 new_executor: Callable[[rc.Store, rc.Settings], rc.Executor]):
        self.store, self.url, self.certs = store, url, certs_folder
        self._new_fleet, self._new_executor = new_fleet, new_executor
        self.fleet: Fleet = None  # type: ignore[assignment]

    def nodes(self, count: int, protocol: str = "tasks", task_ms: int = 20) -> World:
        """Start agents and add their nodes edge-1, edge-2, ..."""
        self.fleet = self._new_fleet(count, protocol, task_ms)
        for number, address in enumerate(ADDRESSES[:count], 1):
            self.store.nodes.add(f"edge-{number}", address, self.fleet.agent(address).port, protocol)
        return self

    def agent(self, number: int) -> Agent:
        """Return the agent of edge-NUMBER."""
        return self.fleet.agent(ADDRESSES[number - 1])

    def finish(self) -> None:
        """End every task that runs now; those that begin later are quick."""
        self.fleet.set(task_ms=20)
        self.fleet.finish()

    def settings(self, **overrides: object) -> rc.Settings:
        return settings_for(self.url, self.certs, **overrides)

    def executor(self, **overrides: object) -> rc.Executor:
        return self._new_executor(self.store, self.settings(**overrides))

    def advance(self, seconds: float) -> None:
        """Turn on the clocks of those who work in this process."""
        assert isinstance(self.store.clock, AheadClock)
        self.store.clock.advance(seconds)

    def drain(self, **overrides: object) -> None:
        """Run an executor until nothing is left to do."""
        self.executor(**overrides).drain()

    def runs(self) -> list[int]:
        """Return how many tasks each agent ran."""
        return [len(self.fleet.agent(address).runs) for address in ADDRESSES[:len(self.fleet.agents)]]


@contextlib.contextmanager
def beside(run: Callable[[], object], within_s: float = 30.0) -> Iterator[None]:
    """Run something in a thread beside the body, and wait for its end."""
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(within_s)
    assert not thread.is_alive(), f"{run} does not end within {within_s:g} s"


# -- processes ----------------------------------------------------------------------------------

class Result(NamedTuple):
    """How a process ended."""
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return the one JSON document on standard output."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        return json.loads(self.out)


def compile_program(folder: Path) -> None:
    """Make the module releasectl in a folder: a link to the program, and beside it what Python compiled of it.

    Python compiles a script anew at each start, which is most of what a short command takes.
    """
    folder.mkdir()
    (folder / "releasectl.py").symlink_to(PROGRAM)
    py_compile.compile(f"{folder}/releasectl.py", doraise=True)


class Cli:
    """Runs releasectl.py in a folder, with a database in it unless --db or a setting names another.

    store, world, certs and port are what a fixture that uses them has made for it.
    """
    compiled = ""  # the folder of compile_program(), which conftest.py calls
    forks: Forks | None = None  # of that folder, where commands are forked
    store: rc.Store
    world: World
    certs: Path
    port: int

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = {"RELEASE_EXECUTOR_INTERVAL_SEC": "0.2"}
        self.prefix: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
        path = {"PYTHONPATH": self.compiled} if self.compiled else {}
        # no settings of this host
        return {**inherited, **path, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(self.folder),
                rc.CONFIG_VARIABLE: os.devnull, **self.settings}

    def start(self, *arguments: object, **streams: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        program = ("-m", "releasectl") if self.compiled else (PROGRAM,)
        return subprocess.Popen([*self.prefix, sys.executable, *program, *map(str, arguments)], text=True,
                                cwd=self.folder, env=self.environment, **pipes)

    def __call__(self, *arguments: object, stdin: str | None = None) -> Result:
        """Run a command to its end; whatever happens, it shows no stack trace.

        It is a process by exec where what begins with the interpreter matters.
        """
        if not self.forks or self.prefix or any(
                name.startswith(("PYTHON", "LC_", "LANG", "TZ")) for name in self.settings):
            process = self.start(*arguments, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE)
            return self.end(process, stdin)
        return self._checked(*self.forks.run([str(word) for word in arguments], str(self.folder), self.environment,
                                             stdin, TIMEOUT_S))

    @classmethod
    def end(cls, process: subprocess.Popen[str], stdin: str | None = None) -> Result:
        out, err = process.communicate(stdin, timeout=TIMEOUT_S)
        return cls._checked(process.returncode, out, err)

    @staticmethod
    def _checked(code: int, out: str, err: str) -> Result:
        assert "Traceback" not in err + out
        assert "Exception ignored" not in err
        return Result(code, out, err)

    def ok(self, *arguments: object, stdin: str | None = None) -> Result:
        result = self(*arguments, stdin=stdin)
        assert result.code == 0, result.err
        return result

    def refused(self, code: int, *arguments: object, stdin: str | None = None) -> str:
        """Return the one line on standard error of a command that must fail with nothing on standard output."""
        result = self(*arguments, stdin=stdin)
        lines = [line for line in result.err.splitlines() if not re.match(r"\S+Z (warning|info): ", line)]
        assert (result.code, result.out, len(lines)) == (code, "", 1), result
        assert lines[0].startswith("releasectl: ")
        return lines[0]

    def file(self, name: str, content: str | bytes) -> str:
        """Write a file into the folder; return its path."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)


class Quick(Cli):
    """The same without a process of its own, for the many cases of one kind: it starts in no time."""

    def __call__(self, *arguments: object, stdin: str | None = None) -> Result:
        assert stdin is None
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
        handlers, propagate = rc.log.handlers, rc.log.propagate
        signals = {number: signal.getsignal(number)
                   for number in (signal.SIGHUP, *rc.STOP_SIGNALS, *rc.IGNORED_SIGNALS)}
        was_in = os.getcwd()
        os.chdir(self.folder)
        try:
            with mock.patch.object(os, "environ", self.environment), contextlib.redirect_stdout(streams[0]), \
                    contextlib.redirect_stderr(streams[1]):
                code = rc.main([str(argument) for argument in arguments])
        finally:
            os.chdir(was_in)
        rc.log.handlers, rc.log.propagate = handlers, propagate
        for number, handler in signals.items():
            signal.signal(number, handler)
        out, err = (stream.detach().getvalue().decode() for stream in streams)
        return Result(code, out, err)


def fill(url: str) -> None:
    """Make nodes edge-1 and edge-2 in a migrated database, and releases: 1 success, 2 failed, 3 pending."""
    database = rc.Database(url)
    store = rc.Store(database)
    add_nodes(store, 2)
    for status in ("success", "failed", "pending"):
        release = new_release(store, reason=f"for {status}", payload={"for": status})
        sql(store, "UPDATE release_tasks SET status = ? WHERE id = ?", status, release.id)
        if status != "pending":
            sql(store, "UPDATE release_task_nodes SET status = ? WHERE release_task_id = ?", status, release.id)
    database.close()


def run(*command: object, **more: Any) -> str:
    """Run a program that must succeed; return what it printed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=300,
                          **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def findings(result: Result) -> dict[str, tuple[bool, str]]:
    """Return what `check --json` said of each subject."""
    return {item["subject"]: (item["ok"], item["message"]) for item in result.json["items"]}


def free_port(*addresses: str) -> int:
    """Return a port of PORTS that is free on all these addresses (127.0.0.1)."""
    while True:
        port = random.choice(PORTS)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for address in addresses or ("127.0.0.1",):
                stack.enter_context(socket.create_server((address, port)))
            return port


def answers(port: int) -> bool:
    """Return whether a ready server is at a port of this host."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def serve_process(cli: Cli, *options: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """Start `serve` and wait until it answers; kill it at the end."""
    process = cli.start("serve", *options, **streams)
    try:
        eventually(lambda: answers(cli.port), message="serve does not answer")
        yield process
    finally:
        process.kill()
        process.communicate()


class Listener(logging.Handler):
    """Keeps every record."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


# -- the API ------------------------------------------------------------------------------------

# Written down here and not taken from ERROR_CODES: programs go by it, so a code keeps its status.
HTTP_STATUS = {0: (200, 201), 1001: (401,), 1002: (401,), 1004: (403,), 2001: (400,), 2002: (400,), 2003: (400,),
               3001: (404,), 3002: (409,), 3003: (409,), 4005: (405,), 4008: (408,), 4013: (413,), 4014: (414,),
               4015: (415,), 4029: (429,), 4031: (431,), 5001: (500,), 5002: (503,), 5003: (503,),
               5004: (501,), 5005: (505,)}
JSON = {"Content-Type": "application/json"}


def replace_handler(monkeypatch: Any, handler: Any, by: Any) -> None:
    """Let another function answer a route, in all servers of this process."""
    monkeypatch.setattr(rc, "_PATTERNS", [(pattern, route._replace(handler=by) if route.handler is handler else route)
                                          for pattern, route in rc._PATTERNS])


class Answer(NamedTuple):
    """What the server answered; code is None for a document that is not the envelope."""
    status: int
    headers: Any
    text: str
    code: int | None
    message: str
    data: Any


def read_answer(response: HTTPResponse, method: str = "GET") -> Answer:
    """Read an answer, and hold it to what is promised of every answer."""
    text = response.read().decode()
    assert "Traceback" not in text
    assert ".py" not in text or "releasectl.py" in text
    if method == "HEAD" or response.status == 304:
        assert text == ""
        return Answer(response.status, response.headers, text, None, "", None)
    assert int(response.headers["Content-Length"]) == len(text.encode())
    if response.headers["Content-Type"] != "application/json":
        return Answer(response.status, response.headers, text, None, "", None)
    document = json.loads(text)
    if "openapi" in document:
        return Answer(response.status, response.headers, text, None, "", document)
    assert set(document) == {"code", "message", "data"}
    if document["code"]:
        assert document["data"] is None
        assert 0 < len(document["message"]) <= 255
        assert document["message"] == rc.one_line(document["message"])
    else:
        assert document["message"] == "success"
    return Answer(response.status, response.headers, text, document["code"], document["message"], document["data"])


def split_answer(raw: bytes) -> tuple[int, dict[str, Any]]:
    """Return the status and the envelope of a whole answer."""
    head, _, body = raw.partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
    assert match, raw
    assert b"application/json" in head
    assert b"Traceback" not in raw
    document = json.loads(body)
    assert set(document) == {"code", "message", "data"}
    return int(match[1]), document


def misfit(value: Any, schema: dict[str, Any], root: dict[str, Any], place: str = "$") -> str:
    """Return where a value does not fit a JSON Schema, as far as ours use it; '' when it does."""
    if "$ref" in schema:
        return misfit(value, root["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], root, place)
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    words = schema.get("type", [])
    allowed = [words] if isinstance(words, str) else words
    if allowed and not any(isinstance(value, kinds[w]) and (w == "boolean" or not isinstance(value, bool))
                           for w in allowed):
        return f"{place}: {value!r} is not of {allowed}"
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return f"{place}: {value!r} is not allowed"
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{place}: {value} is out of range"
    if isinstance(value, list):
        return next(filter(None, (misfit(item, schema["items"], root, f"{place}[]") for item in value)), "")
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        if not set(schema["required"]) <= set(value) <= set(known):
            return f"{place}: keys {sorted(value)}, wanted {sorted(known)}"
        return next(filter(None, (misfit(value[k], known[k], root, f"{place}.{k}") for k in value)), "")
    return ""


class Client:
    """Calls one server; each call is a connection of its own."""

    def __init__(self, server: rc.ApiServer, store: rc.Store):
        self.server, self.store = server, store
        self.address = (str(server.server_address[0]), server.server_address[1])
        self.token = ""
        self.context: ssl.SSLContext | None = None

    def connect(self) -> HTTPConnection:
        host, port = self.address
        if self.context:
            return HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self.context)
        return HTTPConnection(host, port, timeout=TIMEOUT_S)

    def __call__(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Send a body as JSON when it is not bytes already; check that the code has its HTTP status."""
        sent = dict(headers if headers is not None else JSON if body is not None else {})
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, raw, sent)
            answer = read_answer(connection.getresponse(), method)
        finally:
            connection.close()
        assert answer.code is None or answer.status in HTTP_STATUS[answer.code]
        return answer

    def ok(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """Return the data of an answer that must be a success."""
        answer = self(method, path, body)
        assert (answer.code, answer.status) == (0, status), answer.text
        return answer.data

    def code(self, method: str, path: str, body: Any = None) -> int | None:
        return self(method, path, body).code

    def raw(self, request: bytes) -> bytes:
        """Send bytes as they are, and return all that comes until the server closes."""
        with socket.create_connection(self.address, timeout=TIMEOUT_S) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextlib.contextmanager
def serving(store: rc.Store, **settings: Any) -> Iterator[Client]:
    """Give a client of a server over a store; at the end nothing of it is left."""
    server = rc.ApiServer(settings_for("sqlite:///unused.db", **settings), rc.Api(store, store.database.metrics))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Client(server, store)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()  # which waits for the threads of its connections


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@contextlib.contextmanager
def serving_one_node(folder: Path) -> Iterator[Client]:
    """Give a client of a server over a new SQLite database with one node."""
    migrate(f"sqlite:///{folder}/test.db")
    store = rc.Store(rc.Database(f"sqlite:///{folder}/test.db"))
    add_nodes(store, 1)
    with serving(store) as client:
        yield client
    store.database.close()


# A tokens file, and the header of its operator.
TOKENS = f"vera:viewer:{sha256('viewer-secret')}\noskar:operator:{sha256('operator-secret')}\n" \
         f"olga:operator:{sha256('another-secret')}\n"
OPERATOR = {"Authorization": "Bearer operator-secret"}


@contextlib.contextmanager
def connected(client: Client, source: str = "127.0.0.1", sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(client.address, timeout=TIMEOUT_S, source_address=(source, 0)) as sock:
        if sent:
            sock.sendall(sent)
        yield sock


def read_all(sock: socket.socket) -> bytes:
    """Return all that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            received += chunk
    return received


def open_connections(client: Client) -> set[rc.Connection]:
    return set(client.server.connections._connections)  # which other threads change
