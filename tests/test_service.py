"""As a service: what systemd is told and when, who hangs is noticed, the units (issue 8, point 4)."""
from __future__ import annotations

import configparser
import contextlib
import http.client
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import leave_out
from lab import (
    ROOT,
    Answer,
    Cli,
    FakeClock,
    add_nodes,
    answers,
    eventually,
    free_port,
    mtls,
    new_release,
    read_answer,
    serve_process,
    settings_for,
)

import releasectl as rc

UNITS = ROOT / "docs" / "systemd"
SERVICES = ("releasectl.service", "releasectl-tick.service")


class Manager:
    """The service manager's end of NOTIFY_SOCKET: a real datagram socket, and all that came."""

    def __init__(self, address: str):
        self.address = address
        self.messages: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self._sock.setblocking(False)

    def read(self) -> list[str]:
        """Return every message so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.messages.append(self._sock.recv(4096).decode())
        return self.messages

    def statuses(self) -> list[str]:
        """Return the sentences that came with a sign of life."""
        return [m.partition("STATUS=")[2] for m in self.read() if m.startswith("WATCHDOG=1\n")]

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    address = f"{tmp_path}/notify" if request.param == "path" else f"@releasectl-test-{tmp_path.name}-{free_port()}"
    with contextlib.closing(Manager(address)) as one:
        yield one


@pytest.fixture
def service(tmp_path, sqlite_world, manager):
    """A command line over two agents that listen, as systemd would start it."""
    cli = Cli(tmp_path)
    cli.world, cli.port = sqlite_world.nodes(2), free_port()
    cli.settings.update(mtls(sqlite_world.certs), DATABASE_URL=sqlite_world.url, NOTIFY_SOCKET=manager.address,
                        HTTP_ADDR=f"127.0.0.1:{cli.port}")
    return cli


def test_systemd_is_told_of_readiness_work_and_stopping(service, manager):
    with serve_process(service) as serve:
        assert eventually(manager.read)[0] == "READY=1"
        assert answers(service.port)
        eventually(lambda: "nothing to do" in manager.statuses())
        service.world.agent(1).set(task_ms=60_000)
        new_release(service.world.store)
        eventually(lambda: manager.statuses()[-1] == "at work on release 1")
        serve.terminate()
        assert Cli.end(serve).code == 0
    assert manager.read()[-1] == "STOPPING=1"
    assert manager.messages.count("READY=1") == 1


def test_with_the_executor_off_the_service_is_alive_too(service, manager):
    service.settings["RELEASE_EXECUTOR_ENABLED"] = "0"
    with serve_process(service):
        eventually(lambda: len(manager.statuses()) > 2)
    assert set(manager.statuses()) == {"API only, nothing is dispatched: RELEASE_EXECUTOR_ENABLED=0"}


def pinged(service: Cli) -> Answer:
    """Return what its process answers to a ping of the first node."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)) as connection:
        connection.request("POST", "/api/v1/nodes/1/ping")
        return read_answer(connection.getresponse())


def test_a_process_with_or_without_an_executor_pings_agents_where_it_has_certificates(service):
    for options in ((), ("--api",)):
        with serve_process(service, *options):
            assert pinged(service).data["ok"]
    key = Path(service.file("open.key", Path(service.settings["CONTROL_KEY"]).read_bytes()))
    service.settings["CONTROL_KEY"] = str(key)
    key.chmod(0o600)
    with serve_process(service, "--api"):
        key.chmod(0o644)
        assert re.search("no agent can be asked from here: CONTROL_KEY .* is open to others", pinged(service).text)
    key.chmod(0o600)
    service.settings["CONTROL_CERT"] = ""
    with serve_process(service, "--api"):
        assert "no agent can be asked from here: CONTROL_CERT" in pinged(service).text


@pytest.mark.parametrize("options", [(), ("--api",)])
def test_a_ping_that_the_end_of_the_process_cuts_says_nothing_about_the_agent(service, options):
    agent, answers_of = service.world.agent(1), list[Answer]()
    agent.set(mode="hang")

    with serve_process(service, *options) as serve:
        thread = threading.Thread(target=lambda: answers_of.append(pinged(service)))
        thread.start()
        eventually(lambda: agent.queries)
        serve.terminate()
        thread.join()
        assert serve.wait(30) == 0
    assert (answers_of[0].code, "releasectl is stopping" in answers_of[0].text) == (5003, True)


def test_api_and_executor_may_be_two_processes(service, manager):
    with serve_process(service, "--api") as api:
        new_release(service.world.store)
        eventually(lambda: len(manager.statuses()) > 2)
        assert set(manager.statuses()) == {"API only, nothing is dispatched: --api"}
        assert service.world.store.releases.get(1).status == rc.PENDING
        service.settings["HTTP_ADDR"] = f"127.0.0.1:{service.port}"  # taken, and not asked for
        executor = service.start("serve", "--executor")
        eventually(lambda: service.world.store.releases.get(1).status == rc.SUCCESS)
        executor.terminate()
        assert "no API (--executor)" in Cli.end(executor).err
        api.terminate()
        assert Cli.end(api).code == 0


def test_serve_refuses_halves_that_make_no_whole(quick):
    assert "exclude each other" in quick.refused(rc.EXIT_USAGE, "serve", "--api", "--executor")
    quick.settings["RELEASE_EXECUTOR_ENABLED"] = "0"
    assert "RELEASE_EXECUTOR_ENABLED=0" in quick.refused(rc.EXIT_USAGE, "serve", "--executor")


def test_the_database_that_went_away_is_told_and_the_loop_lives_on(service, manager):
    path = service.world.store.database.engine.path
    with serve_process(service):
        eventually(manager.statuses)
        shutil.move(path, path + ".away")
        eventually(lambda: "does not exist" in manager.statuses()[-1])
        seen = len(manager.statuses())
        eventually(lambda: len(manager.statuses()) > seen + 2)
        shutil.move(path + ".away", path)
        eventually(lambda: manager.statuses()[-1] == "nothing to do")


@pytest.mark.parametrize("trouble", ["database", "address"])
def test_who_can_not_serve_is_never_ready(service, manager, trouble):
    with socket.create_server(("127.0.0.1", 0)) as other:
        if trouble == "database":
            service.settings["DATABASE_URL"] = "sqlite:///" + service.file("broken.db", "no database at all")
        else:
            service.settings["HTTP_ADDR"] = f"127.0.0.1:{other.getsockname()[1]}"
        service.refused(rc.EXIT_UNAVAILABLE if trouble == "database" else rc.EXIT_USAGE, "serve")
    assert manager.read() == []


def test_without_a_manager_that_listens_it_serves_all_the_same(service):
    service.settings["NOTIFY_SOCKET"] = f"{service.folder}/nobody"
    with serve_process(service) as serve:
        eventually(lambda: answers(service.port))
        serve.terminate()
        result = Cli.end(serve)
    assert result.code == 0
    assert f"systemd: could not be told anything: NOTIFY_SOCKET {service.folder}/nobody: no such file" in result.err


def test_who_is_ended_by_the_watchdog_tells_where_each_thread_was(service, manager):
    with serve_process(service) as serve:
        eventually(manager.statuses)
        serve.send_signal(signal.SIGABRT)
        result = Cli.end(serve)
    assert result.code == -signal.SIGABRT
    assert "in run_loop" in result.err  # the main thread
    assert "in serve_forever" in result.err  # the accept thread


# -- who must prove life -----------------------------------------------------------------------

@pytest.fixture
def busy(sqlite_url, open_store, monkeypatch):
    """An executor with a release at work, on a clock turned by hand; its beats, and a gate for what hangs."""
    class Busy:
        clock, gate = FakeClock(), threading.Event()

        def __init__(self):
            self.beats: list[str] = []
            store = open_store(sqlite_url, self.clock)
            add_nodes(store, 1)
            new_release(store)
            settings = settings_for(sqlite_url, RELEASE_EXECUTOR_INTERVAL_SEC=0.1)
            self.executor = rc.Executor(settings, store, rc.AgentClient(settings), store.database.metrics)
            self.thread = threading.Thread(target=self.executor.run_loop, args=(self.beats.append,))

        def start(self):
            self.thread.start()
            eventually(lambda: "at work on release 1" in self.beats)

        def falls_silent(self) -> bool:
            """Return whether no beat came in three turns of the loop."""
            scans = []
            monkeypatch.setattr(self.executor.store.claims, "scan",
                                lambda *_: scans.append(len(self.beats)) or ([], []))
            eventually(lambda: len(scans) > 3)
            return scans[-1] == scans[-3]

    one = Busy()
    yield one
    one.gate.set()
    one.executor.close()
    one.thread.join()


def test_a_driver_that_hangs_silences_the_loop(busy, monkeypatch):
    monkeypatch.setattr(rc.Driver, "cycle", lambda *_: busy.gate.wait() and None)
    busy.start()
    assert not busy.falls_silent()
    busy.clock.advance(rc.HUNG_AFTER_S + 1)
    assert busy.executor.hung() == "the driver of release 1 hangs"
    assert busy.falls_silent()
    busy.gate.set()
    eventually(lambda: busy.executor.hung() == "")
    assert not busy.falls_silent()


def test_a_lease_thread_that_hangs_silences_the_loop(busy, monkeypatch):
    renewing = threading.Event()
    monkeypatch.setattr(rc.Driver, "cycle", lambda *_: 0.05 if not busy.gate.is_set() else None)
    monkeypatch.setattr(rc.Executor, "_renew", lambda *_: renewing.set() or busy.gate.wait() and None)
    busy.executor.settings = settings_for(f"sqlite:///{busy.executor.store.database.engine.path}",
                                          RELEASE_EXECUTOR_INTERVAL_SEC=0.1, CLAIM_TTL_SEC=1)
    busy.start()
    renewing.wait(60)
    assert not busy.falls_silent()
    busy.clock.advance(rc.HUNG_AFTER_S + 1)
    eventually(lambda: busy.executor.hung() == "the lease thread hangs")
    assert busy.falls_silent()


# -- the units ---------------------------------------------------------------------------------

def systemd_analyze(*arguments: str) -> str:
    if not shutil.which("systemd-analyze"):
        leave_out("systemd-analyze (Debian: systemd)")
    done = subprocess.run(["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def unit(name: str) -> configparser.ConfigParser:
    """Return the last value of each key of a unit."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(UNITS / name)
    return parser


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path):
    copies = []
    for path in sorted(UNITS.iterdir()):
        copies.append(tmp_path / path.name)
        copies[-1].write_text(path.read_text().replace("/usr/local/bin/releasectl", sys.executable))
    assert [copy.name for copy in copies] == ["releasectl-tick.service", "releasectl-tick.timer", "releasectl.service"]
    assert systemd_analyze("verify", "--man=no", *map(str, copies)) == ""


@pytest.mark.parametrize("name", SERVICES)
def test_the_units_leave_little_exposed(name):
    assert "OK" in systemd_analyze("security", "--offline=true", "--threshold=12", str(UNITS / name)).splitlines()[-1]


def test_both_services_are_hardened_alike():
    hardening = [(UNITS / name).read_text().split("\n# What it may write")[1].split("\n[Install]")[0].strip()
                 for name in SERVICES]
    assert hardening[0] == hardening[1]


def test_the_units_run_commands_that_there_are():
    commands = [rc.build_parser(rc.COMMANDS, {}, "", ()).parse_args(unit(name)["Service"]["ExecStart"].split()[1:])
                for name in SERVICES]
    assert [(c.command, c.config) for c in commands] == [
        ("serve", "/etc/releasectl/releasectl.conf"), ("run-once", "/etc/releasectl/releasectl.conf")]


def test_the_watchdog_waits_longer_than_the_loop_may():
    assert float(unit(SERVICES[0])["Service"]["WatchdogSec"]) > 2 * 60  # RELEASE_EXECUTOR_INTERVAL_SEC at most
