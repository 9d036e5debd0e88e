"""Real parts for the tests: databases of both engines, agents, certificates, a clock.

Every test that asks for `database_url`, `store` or what builds on them runs on SQLite and on
PostgreSQL. TEST_POSTGRES_URL names a server to use; without it a throwaway one is started where
PostgreSQL and a driver are installed. REQUIRE_ALL=1 fails where something would be left out.
"""
from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from fake_agent import AgentSpec, Fleet  # noqa: E402

import releasectl as rc  # noqa: E402

REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"
ADDRESSES = [f"127.0.1.{n}" for n in range(1, 21)]
DRIVERS = [name for name in ("psycopg", "psycopg2", "pg8000") if importlib.util.find_spec(name)]


def leave_out(what: str) -> None:
    """Skips the test, or fails it where nothing may be left out."""
    if REQUIRE_ALL:
        pytest.fail(f"REQUIRE_ALL=1, and missing: {what}")
    pytest.skip(f"left out: {what}")


def eventually(look, within_s: float = 15.0, message: str = ""):
    """Gives what look() returns as soon as it is true; fails with the last value it saw."""
    give_up_at = time.monotonic() + within_s
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > give_up_at:
            pytest.fail(f"{message or 'it did not come'} within {within_s} s; last seen: {seen!r}")
        time.sleep(0.01)


class FakeClock(rc.Clock):
    """Both clocks, turned by hand."""

    def __init__(self, wall: float = 1_790_000_000.0, elapsed: float = 1_000.0):
        self.now_wall, self.now_elapsed = wall, elapsed

    def wall(self) -> float:
        return self.now_wall

    def elapsed(self) -> float:
        return self.now_elapsed

    def advance(self, seconds: float) -> None:
        self.now_wall += seconds
        self.now_elapsed += seconds


# -- databases -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory):
    """The URL of a server on which databases may be made."""
    given = os.environ.get("TEST_POSTGRES_URL")
    if not DRIVERS:
        leave_out("a PostgreSQL driver (psycopg, psycopg2 or pg8000)")
    if given:
        yield given
        return
    folder = str(tmp_path_factory.mktemp("postgres"))
    script = str(ROOT / "scripts" / "postgres.sh")
    started = subprocess.run(["bash", script, "start", folder], capture_output=True, text=True, check=False)
    if started.returncode != 0:
        leave_out("PostgreSQL: " + started.stderr.strip())
    yield started.stdout.strip()
    subprocess.run(["bash", script, "remove", folder], check=True)


_numbers = itertools.count(1)


def admin(server_url: str, statement: str) -> None:
    """Runs one statement on the server itself."""
    connection = rc.PostgresEngine(server_url).connect(create=False)
    try:
        connection.cursor().execute(statement)
    finally:
        connection.close()


@pytest.fixture
def new_postgres_url(postgres_server):
    """A function that makes an empty database and gives its URL."""
    made = []

    def make() -> str:
        name = f"test_{os.getpid()}_{next(_numbers)}"
        admin(postgres_server, f"CREATE DATABASE {name}")
        made.append(name)
        return f"{postgres_server.rsplit('/', 1)[0]}/{name}"

    yield make
    for name in made:
        admin(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """The URL of an empty database, of each engine in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    return request.getfixturevalue("new_postgres_url")()


@pytest.fixture
def sqlite_url(tmp_path):
    """The URL of an empty SQLite database, where the engine does not matter."""
    return f"sqlite:///{tmp_path}/test.db"


@pytest.fixture
def open_store():
    """A function that opens one more store, as another process would; all are closed at the end."""
    stores = []

    def open_one(url: str, clock: rc.Clock | None = None) -> rc.Store:
        database = rc.Database(url)
        database.migrate()
        stores.append(rc.Store(database, clock or rc.Clock()))
        return stores[-1]

    yield open_one
    for store in stores:
        store.database.close()


@pytest.fixture
def store(database_url, open_store):
    """A store over an empty database, on both engines."""
    return open_store(database_url)


def add_nodes(store: rc.Store, count: int, protocol: str = "tasks", first: int = 1) -> list[rc.Node]:
    """Adds nodes edge-1, edge-2, ... whose agents nobody calls."""
    return [store.nodes.add(f"edge-{n}", ADDRESSES[n - 1], agent_protocol=protocol)
            for n in range(first, first + count)]


# What a release to execute agents needs at least: they would drop all their sites without it.
SITES = {"websites": []}


def new_release(store: rc.Store, **fields) -> rc.Release:
    """Creates a release for the nodes there are."""
    return store.releases.create(rc.ReleaseRequest(**fields), "test")[0]


def statuses(store: rc.Store, release_id: int) -> list[str]:
    """Gives the statuses of a release's nodes, in order."""
    return [node.status for node in store.releases.with_nodes(release_id)[1]]


def assert_books_balance(store: rc.Store, release_id: int) -> None:
    """Rule 7: the counters are the rows, and a terminal release has all its nodes at rest."""
    release, nodes = store.releases.with_nodes(release_id)
    tally = [node.status for node in nodes]
    assert (release.success_nodes, release.failed_nodes) == (tally.count("success"), tally.count("failed"))
    if release.is_terminal:
        assert set(tally) <= rc.AT_REST
        assert tally.count("success") + tally.count("failed") + tally.count("skipped") == release.total_nodes


# -- agents ----------------------------------------------------------------------------------

def make_certs(folder: Path, *names: str, **environment: str) -> Path:
    """Makes a CA, a client certificate and agents' certificates; gives the folder."""
    subprocess.run(["bash", str(ROOT / "scripts" / "make_certs.sh"), str(folder), *names], check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    return folder


@pytest.fixture(scope="session")
def certs(tmp_path_factory) -> Path:
    """Certificates for all ADDRESSES, and of another CA in the folder other/."""
    if not shutil.which("openssl"):
        leave_out("openssl")
    folder = make_certs(tmp_path_factory.mktemp("certs"), ",".join([*ADDRESSES, "agent.test"]))
    make_certs(folder / "other", ",".join(ADDRESSES))
    return folder


def settings_for(url: str, certs_folder: Path | None = None, **overrides) -> rc.Settings:
    """Gives settings for tests: quick intervals, mutual TLS with the folder's certificates."""
    values = {"DATABASE_URL": url, "RELEASE_EXECUTOR_INTERVAL_SEC": "0.2", "AGENT_CONNECT_TIMEOUT_SEC": "2",
              "AGENT_REQUEST_TIMEOUT_SEC": "3", "AGENT_CONCURRENCY": "16", "HTTP_ADDR": "127.0.0.1:0"}
    if certs_folder is None:
        values["MTLS_ENABLED"] = "0"
    else:
        values.update(CONTROL_CERT=f"{certs_folder}/control.crt", CONTROL_KEY=f"{certs_folder}/control.key",
                      CONTROL_CA=f"{certs_folder}/ca.crt")
    values.update({name: str(value) for name, value in overrides.items()})
    return rc.Settings.load(values)


@pytest.fixture
def new_fleet(certs):
    """A function that starts agents that really listen; all are stopped at the end."""
    fleets = []

    def start(count: int, protocol: str = "tasks", task_ms: int = 20, tls12: bool = False) -> Fleet:
        specs = [AgentSpec(address, 0, protocol) for address in ADDRESSES[:count]]
        fleets.append(Fleet(certs, specs, task_ms=task_ms, tls12=tls12).start())
        return fleets[-1]

    yield start
    for fleet in fleets:
        fleet.stop()


@pytest.fixture
def new_executor():
    """A function that makes an executor over a store; all are closed at the end."""
    executors = []

    def make(store: rc.Store, settings: rc.Settings) -> rc.Executor:
        executors.append(rc.Executor(settings, store, rc.AgentClient(settings)))
        return executors[-1]

    yield make
    for executor in executors:
        executor.close()


class World:
    """A store, agents that listen, their nodes, and settings to run executors over them."""

    def __init__(self, store: rc.Store, url: str, certs_folder: Path, new_fleet, new_executor):
        self.store, self.url, self.certs = store, url, certs_folder
        self._new_fleet, self._new_executor = new_fleet, new_executor
        self.fleet: Fleet = None  # type: ignore[assignment]

    def nodes(self, count: int, protocol: str = "tasks", task_ms: int = 20) -> World:
        """Starts agents and adds their nodes edge-1, edge-2, ..."""
        self.fleet = self._new_fleet(count, protocol, task_ms)
        for number, address in enumerate(ADDRESSES[:count], 1):
            self.store.nodes.add(f"edge-{number}", address, self.fleet.agent(address).port, protocol)
        return self

    def agent(self, number: int):
        """Gives the agent of edge-NUMBER."""
        return self.fleet.agent(ADDRESSES[number - 1])

    def settings(self, **overrides) -> rc.Settings:
        return settings_for(self.url, self.certs, **overrides)

    def executor(self, **overrides) -> rc.Executor:
        return self._new_executor(self.store, self.settings(**overrides))

    def drain(self, **overrides) -> None:
        """Runs an executor until nothing is left to do."""
        self.executor(**overrides).drain()

    def runs(self) -> list[int]:
        """Gives how many tasks each agent ran."""
        return [len(self.fleet.agent(address).runs) for address in ADDRESSES[:len(self.fleet.agents)]]


@pytest.fixture
def world(store, database_url, certs, new_fleet, new_executor) -> World:
    """A world on both engines."""
    return World(store, database_url, certs, new_fleet, new_executor)


@pytest.fixture
def sqlite_world(sqlite_url, open_store, certs, new_fleet, new_executor) -> World:
    """A world on SQLite alone, for what has nothing to do with the engine."""
    return World(open_store(sqlite_url), sqlite_url, certs, new_fleet, new_executor)
