"""Fixtures: the parts of lab.py, started for a test and gone after it.

Every test that asks for `database_url`, `store` or what builds on them runs on SQLite and on
PostgreSQL. TEST_POSTGRES_URL names a server to use; without it a throwaway one is started where
PostgreSQL and a driver are installed. REQUIRE_ALL=1 fails where something would be left out.

Tests run beside each other in several processes (pytest-xdist, where it is installed). What is
expensive (certificates, the server, migrated databases to copy) is made once, in the folder that
RELEASECTL_TESTS_SHARED names, by whichever process asks first.
"""
from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import importlib.util
import itertools
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

pytest.register_assert_rewrite("lab", "contract")

import lab  # noqa: E402
from browser import PROGRAM as CHROMIUM  # noqa: E402
from browser import Browser  # noqa: E402
from forks import Forks  # noqa: E402
from lab import ADDRESSES, DRIVERS, Cli, Client, Listener, Peer, Quick, World  # noqa: E402

import releasectl as rc  # noqa: E402

REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"
SHARED = "RELEASECTL_TESTS_SHARED"
LEFT_OUT = "left out: "
# Lines that the summary has for what was left out.
MOST_LINES = 8
ENGINES = ["sqlite", "postgresql"]


def leave_out(what: str) -> None:
    """Skip the test, or fail it where nothing may be left out."""
    if REQUIRE_ALL:
        pytest.fail(f"REQUIRE_ALL=1, and missing: {what}")
    pytest.skip(LEFT_OUT + what)


# -- one run, in one process or several --------------------------------------------------------

def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is one of several, started by another pytest."""
    return hasattr(config, "workerinput")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job ignores SIGINT, and what it starts inherits that. A handler, which
    # is not inherited, ignores it as well.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)
    if not is_worker(config):
        signal.signal(signal.SIGTERM, interrupt)  # so that a run that is ended leaves nothing behind
        os.environ[SHARED] = tempfile.mkdtemp(prefix="releasectl-tests.")
        lab.compile_program(Path(os.environ[SHARED]) / "program")
    Cli.compiled = f"{os.environ[SHARED]}/program"


def pytest_unconfigure(config: pytest.Config) -> None:
    if is_worker(config) or SHARED not in os.environ:
        return
    shared = Path(os.environ.pop(SHARED))
    if (shared / "postgres" / "cluster").exists():
        lab.postgres("remove", shared / "postgres")
    elif (shared / "template.done").exists() and DRIVERS:
        server, template = (shared / "template.done").read_text().split()
        lab.admin(server, f"DROP DATABASE IF EXISTS {template}")
    shutil.rmtree(shared, ignore_errors=True)


def import_tests(config: pytest.Config) -> None:
    """Import the modules of the tests that were asked for, each process beginning with others of them.

    To compile one takes as long as its tests may: whoever comes second finds what the first has compiled.
    It is kept for this run alone where nothing may be written beside the modules (PYTHONDONTWRITEBYTECODE).
    """
    asked = [Path(argument.partition("::")[0]) for argument in config.args]
    names = sorted({path.stem for one in asked for path in ([one] if one.suffix else one.glob("test_*.py"))})
    first = len(names) * int(config.workerinput["workerid"][len("gw"):]) // config.workerinput["workercount"]
    prefix = f"{os.environ[SHARED]}/compiled" if sys.dont_write_bytecode else sys.pycache_prefix
    with mock.patch.object(sys, "pycache_prefix", prefix), mock.patch.object(sys, "dont_write_bytecode", False):
        for name in names[first:] + names[:first]:
            with contextlib.suppress(Exception, SystemExit, pytest.skip.Exception):  # collection tells of it
                importlib.import_module(name)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Let the garbage collector leave out what stays to the end, the 7,000 tests, each time that it looks."""
    gc.disable()
    if is_worker(session.config):
        import_tests(session.config)
    yield
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let slow tests go first, so that the last process does not sit over one alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Sum up what was left out and what would mend it, in a few lines."""
    reasons = Counter(str(report.longrepr[2]).replace("Skipped: ", "").replace(LEFT_OUT, "")
                      for report in terminalreporter.stats.get("skipped", []))
    lines = [f"{count:5} x {reason.splitlines()[0][:100]}" for reason, count in reasons.most_common()]
    slow = len(terminalreporter.stats.get("deselected", []))
    if lines:
        terminalreporter.section("left out")
        for line in lines[:MOST_LINES]:
            terminalreporter.write_line(line)
        if len(lines) > MOST_LINES:
            terminalreporter.write_line(f"and {len(lines) - MOST_LINES} other reasons: pytest -rs lists each test")
    if slow and "slow" in terminalreporter.config.option.markexpr:
        terminalreporter.write_line(f"left to `make test-all`: {slow} slow tests")


def once(name: str, make: Callable[[Path], str]) -> str:
    """Return what make(folder) returned in the process that asked first; the others wait for it."""
    folder = Path(os.environ[SHARED]) / name
    done = folder.with_suffix(".done")
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)  # an earlier try may have failed
            done.write_text(make(folder))
    return done.read_text()


# -- databases -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def postgres_server() -> str:
    """The URL of a server on which databases may be made."""
    def start(folder: Path) -> str:
        try:
            return lab.postgres("start", "--in-memory", folder)
        except OSError as error:
            return f"missing: {error}"

    if not DRIVERS:
        leave_out("a PostgreSQL driver (psycopg, psycopg2 or pg8000)")
    url = os.environ.get("TEST_POSTGRES_URL") or once("postgres", start)
    if url.startswith("missing: "):
        leave_out("PostgreSQL: " + url[len("missing: "):])
    return url


@pytest.fixture(scope="session")
def postgres_admin(postgres_server) -> Iterator[Callable[[str], None]]:
    """A function that runs statements on the server in one session: to begin one costs half of what a database does."""
    connection = rc.PostgresEngine(postgres_server).connect(create=False)
    yield lambda statement: connection.cursor().execute(statement)
    connection.close()


@pytest.fixture(scope="session")
def copied_by_files(postgres_server) -> str:
    """What copies files, in a fifth of the time of writing all into the log, as servers do by themselves from 15 on."""
    return " STRATEGY FILE_COPY" if lab.admin(postgres_server, "SHOW server_version_num") >= "150000" else ""


@pytest.fixture(scope="session")
def postgres_template(postgres_server) -> str:
    """The name of a migrated database on the server, to make others of."""
    def make(_folder: Path) -> str:
        name = f"test_template_{os.getpid()}"
        lab.admin(postgres_server, f"CREATE DATABASE {name}")
        lab.migrate(lab.database_on(postgres_server, name))
        return f"{postgres_server} {name}"

    return once("template", make).split()[1]


@pytest.fixture(scope="session")
def sqlite_template() -> Path:
    """The path of a migrated SQLite database, to be copied."""
    def make(folder: Path) -> str:
        lab.migrate(f"sqlite:///{folder}/migrated.db")
        return f"{folder}/migrated.db"

    return Path(once("sqlite", make))


_numbers = itertools.count(1)


@pytest.fixture
def new_postgres_url(postgres_server, postgres_admin, copied_by_files) -> Iterator[Callable[..., str]]:
    """A function that makes an empty database, or a copy of a template, and returns its URL."""
    made = []

    def make(template: str = "") -> str:
        name = f"test_{os.getpid()}_{next(_numbers)}"
        postgres_admin(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else "") + copied_by_files)
        made.append(name)
        return lab.database_on(postgres_server, name)

    yield make
    for name in made:
        postgres_admin(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["psycopg", "psycopg2", "pg8000"])
def driver(request, monkeypatch) -> str:
    """Each driver in turn, for this process; the environment of others has its name too."""
    if not importlib.util.find_spec(request.param):
        leave_out(request.param)
    monkeypatch.setenv("RELEASECTL_PG_DRIVER", request.param)
    return request.param


@pytest.fixture(params=ENGINES)
def database_url(request, tmp_path) -> str:
    """The URL of a database of each engine in turn: empty, but migrated where the test uses `store`."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    template = request.getfixturevalue("postgres_template") if "store" in request.fixturenames else ""
    return request.getfixturevalue("new_postgres_url")(template)


# For a test of `store` or `client` about what is refused, in the same words on both engines.
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def sqlite_url(tmp_path) -> str:
    """The URL of an empty SQLite database, where the engine does not matter."""
    return f"sqlite:///{tmp_path}/test.db"


@pytest.fixture
def open_store(sqlite_template) -> Iterator[Callable[..., rc.Store]]:
    """A function that opens one more store, as another process would; all are closed at the end."""
    stores = []

    def open_one(url: str, clock: rc.Clock | None = None) -> rc.Store:
        path = Path(url.partition("sqlite:///")[2])
        if path.suffix == ".db" and not path.exists():
            shutil.copy(sqlite_template, path)
        database = rc.Database(url)
        database.migrate()
        stores.append(rc.Store(database, clock or lab.AheadClock()))
        return stores[-1]

    yield open_one
    for store in stores:
        store.database.close()


@pytest.fixture
def store(database_url, open_store) -> rc.Store:
    """A store over an empty database, on both engines."""
    return open_store(database_url)


# -- agents ----------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def certs() -> Path:
    """Certificates for all ADDRESSES, and of another CA in the folder other/."""
    def make(folder: Path) -> str:
        lab.make_certs(folder, ",".join([*ADDRESSES, "agent.test"]))
        lab.make_certs(folder / "other", ",".join(ADDRESSES))
        return str(folder)

    if not shutil.which("openssl"):
        leave_out("openssl")
    return Path(once("certs", make))


@pytest.fixture
def new_fleet(certs):
    """A function that starts agents that really listen; all are stopped at the end."""
    with lab.fleets(certs) as start:
        yield start


@pytest.fixture
def new_peer(certs):
    """A function that starts an agent which answers, or misbehaves, as a test says; all are stopped at the end."""
    peers = []

    def start(talk, tls=True, host: str = lab.HOST) -> Peer:
        peers.append(Peer(talk, lab.server_context(certs) if tls is True else tls or None, host))
        return peers[-1]

    yield start
    for peer in peers:
        peer.stop()


@pytest.fixture
def new_executor():
    """A function that makes an executor over a store; all are closed at the end."""
    executors = []

    def make(store: rc.Store, settings: rc.Settings) -> rc.Executor:
        metrics = store.database.metrics
        executors.append(rc.Executor(settings, store, rc.AgentClient(settings, metrics), metrics))
        return executors[-1]

    yield make
    for executor in executors:
        executor.close()


@pytest.fixture
def world(store, database_url, certs, new_fleet, new_executor) -> World:
    """A world on both engines."""
    return World(store, database_url, certs, new_fleet, new_executor)


@pytest.fixture
def sqlite_world(sqlite_url, open_store, certs, new_fleet, new_executor) -> World:
    """A world on SQLite alone, for what has nothing to do with the engine."""
    return World(open_store(sqlite_url), sqlite_url, certs, new_fleet, new_executor)


# -- the command line --------------------------------------------------------------------------

@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with contextlib.closing(Forks(Cli(Path("/")).environment)) as one:
        yield one


@pytest.fixture
def cli(tmp_path, forks) -> Cli:
    one = Cli(tmp_path)
    one.forks = forks
    return one


@pytest.fixture
def quick(tmp_path) -> Quick:
    return Quick(tmp_path)


@pytest.fixture(scope="session")
def filled_template(sqlite_template) -> Path:
    """The path of a SQLite database that lab.fill() has filled, to be copied."""
    def make(folder: Path) -> str:
        shutil.copy(sqlite_template, folder / "filled.db")
        lab.fill(f"sqlite:///{folder}/filled.db")
        return f"{folder}/filled.db"

    return Path(once("filled", make))


@pytest.fixture
def over_filled(filled_template, open_store) -> Callable[[Cli], Cli]:
    """A function that gives a command line a copy of that database, and returns it."""
    def give(one: Cli) -> Cli:
        shutil.copy(filled_template, one.folder / "releasectl.db")
        one.store = open_store(f"sqlite:///{one.folder}/releasectl.db")
        return one

    return give


@pytest.fixture
def filled(cli, over_filled) -> Cli:
    """A command line over nodes edge-1 and edge-2, and releases: 1 success, 2 failed, 3 pending."""
    return over_filled(cli)


@pytest.fixture
def filled_quick(quick, over_filled) -> Cli:
    """The same without processes."""
    return over_filled(quick)


@pytest.fixture
def fleet_cli(cli, sqlite_world) -> Cli:
    """A command line over three agents that listen, on SQLite, and a port for serve."""
    cli.world, cli.port = sqlite_world.nodes(3), lab.free_port()
    cli.settings.update(lab.mtls(sqlite_world.certs), DATABASE_URL=sqlite_world.url,
                        HTTP_ADDR=f"127.0.0.1:{cli.port}")
    return cli


# -- the API -----------------------------------------------------------------------------------

@pytest.fixture
def new_client(open_store):
    """A function that starts a server over a store and returns a client of it.

    It ends before the stores are closed: what it still does then would open connections that nobody closes.
    """
    with contextlib.ExitStack() as stack:
        yield lambda store, **settings: stack.enter_context(lab.serving(store, **settings))


@pytest.fixture
def client(new_client, store) -> Client:
    """A client of a server over an empty database, on both engines."""
    return new_client(store)


@pytest.fixture
def new_server(new_client, open_store, sqlite_url, tmp_path):
    """A function that serves an empty SQLite database, with tokens; returns a client without one."""
    tokens = tmp_path / "tokens"
    tokens.write_text(lab.TOKENS)
    tokens.chmod(0o600)
    return lambda **settings: new_client(open_store(sqlite_url), **{"API_TOKENS_FILE": tokens, **settings})


@pytest.fixture
def tokens(tmp_path) -> Path:
    """A file of tokens, each the name eight times: two operators and who runs the tests, and a viewer."""
    path = tmp_path / "tokens"
    path.write_text("".join(f"{name}:{role}:{lab.sha256(name * 8)}\n" for name, role in (
        ("alice", "operator"), ("bob", "operator"), ("vera", "viewer"), (lab.USER, "operator"))))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if CHROMIUM is None:
        leave_out("Chromium (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Deadlines of connections that a test can wait for."""
    for name, seconds in (("UNAUTHENTICATED_S", 1.0), ("HEAD_S", 1.0), ("BODY_S", 1.0), ("WRITE_S", 1.0),
                          ("IDLE_S", 2.0), ("LINGER_S", 0.5), ("MIN_IDLE_S", 0.0)):
        monkeypatch.setattr(rc, name, seconds)


# -- the log -----------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def same_log() -> Iterator[None]:
    """The log is as it was before, whatever a test, or a command in this process, made of it."""
    log = rc.log
    level, handlers, propagate, disabled = log.level, list(log.handlers), log.propagate, log.disabled
    yield
    log.setLevel(level)
    log.handlers, log.propagate, log.disabled = handlers, propagate, disabled


@pytest.fixture
def told(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    """What was logged."""
    monkeypatch.setattr(rc.log, "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def records(monkeypatch) -> Iterator[list[logging.LogRecord]]:
    """Every record of the log from now on, those for debugging too."""
    listener = Listener()
    monkeypatch.setattr(rc.log, "handlers", [listener])
    monkeypatch.setattr(rc.log, "disabled", False)
    level = rc.log.level
    rc.log.setLevel(logging.DEBUG)
    yield listener.records
    rc.log.setLevel(level)
