"""What a process stands on: streams, signals, the service manager, a name's addresses, the clock (issue 13, 6 to 9)."""
from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
import urllib.request

import pytest
from conftest import leave_out
from lab import (
    ADDRESSES,
    FOREVER_MS,
    PROGRAM,
    TIMEOUT_S,
    Cli,
    eventually,
    findings,
    free_port,
    new_release,
    serve_process,
    settings_for,
    sha256,
)

import releasectl as rc

# What a shell may do to the standard streams.
REDIRECTIONS = ["2>&-", "1>&-", "<&-", "<&- 1>&- 2>&-", "2>/dev/full", "1>/dev/full", "1>/dev/full 2>/dev/full",
                "1>/dev/full 2>&-"]


def redirected(cli: Cli, streams: str) -> Cli:
    """Let a shell redirect the streams of what the command line starts."""
    if "/dev/full" in streams and not os.path.exists("/dev/full"):
        leave_out("/dev/full")
    cli.prefix = ("bash", "-c", f'{"" if "|" in streams else "exec "}"$@" {streams}', "bash")
    return cli


# -- standard streams --------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("streams", REDIRECTIONS)
def test_no_stream_changes_what_is_done_or_the_exit_code(cli, streams):
    cli.ok("migrate")
    redirected(cli, streams)
    assert cli("node", "add", "edge-1", "10.0.0.1").code == 0
    assert cli("--json", "create", "--reason", "x").code == 0
    assert cli("status", "99").code == rc.EXIT_STATE
    assert cli("list", "--page", "x").code == rc.EXIT_USAGE
    assert cli("watch", "1", "--timeout", "0.1s").code == rc.EXIT_BUSY
    assert cli("--help").code == 0
    cli.prefix = ()
    assert cli.ok("--json", "node", "list").json["total"] == 1
    assert cli.ok("--json", "list").json["total"] == 1


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
def test_without_standard_error_one_document_is_on_standard_output(cli, streams):
    cli.ok("node", "add", "edge-1", "10.0.0.1")
    assert redirected(cli, streams).ok("--json", "node", "list").json["items"][0]["name"] == "edge-1"


def test_that_standard_output_is_full_is_told_and_no_failure_of_what_was_done(cli):
    result = redirected(cli, ">/dev/full")("node", "add", "edge-1", "10.0.0.1", "--json")
    assert result == (0, "", "releasectl: standard output can't be written: no space left on device\n")
    assert cli("freeze", "on", "--reason", "x").code == 0


@pytest.mark.parametrize("words", [("list",), ("node", "list", "--json"), ("events", "1"), ("payload", "1"),
                                   ("freeze",), ("prune", "--older-than", "1d", "--dry-run"), ("create", "--plan")])
def test_an_answer_that_could_not_be_written_is_a_failure_where_nothing_else_was_to_do(filled, words):
    full = redirected(filled, ">/dev/full")(*words)
    assert full == (rc.EXIT_UNAVAILABLE, "", "releasectl: standard output can't be written: no space left on device\n")
    assert redirected(filled, "| true; exit ${PIPESTATUS[0]}")(*words).code == 0


@pytest.mark.parametrize("streams", ["<&- 1>&- 2>&-", "2>/dev/full"])
def test_a_tick_without_streams_brings_its_release_to_the_end(fleet_cli, streams):
    release = new_release(fleet_cli.world.store)
    assert redirected(fleet_cli, streams)("run-once", "--drain").code == 0
    assert fleet_cli.world.store.releases.get(release.id).status == "success"


def test_serve_without_streams_keeps_its_database_whole(fleet_cli):
    redirected(fleet_cli, "<&- 1>&- 2>&-").settings["LOG_LEVEL"] = "debug"
    with serve_process(fleet_cli) as serve:
        assert {os.readlink(f"/proc/{serve.pid}/fd/{n}") for n in range(3)} == {"/dev/null"}
        release = new_release(fleet_cli.world.store)
        eventually(lambda: fleet_cli.world.store.releases.get(release.id).status == "success")
        serve.terminate()
        assert serve.wait(TIMEOUT_S) == 0
    with contextlib.closing(sqlite3.connect(fleet_cli.world.store.database.engine.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_serve_goes_on_when_the_reader_of_its_log_left(fleet_cli):
    with serve_process(fleet_cli) as serve:
        serve.stderr.close()
        release = new_release(fleet_cli.world.store)
        eventually(lambda: fleet_cli.world.store.releases.get(release.id).status == "success")
        serve.terminate()
        assert serve.wait(TIMEOUT_S) == 0
        serve.stderr = None


def test_a_payload_from_a_closed_standard_input_is_refused_in_one_line(cli):
    cli.ok("node", "add", "edge-1", "10.0.0.1")
    redirected(cli, "<&-")
    assert "is not JSON" in cli.refused(rc.EXIT_USAGE, "create", "--payload", "-")


# -- signals -----------------------------------------------------------------------------------

def test_no_signal_but_one_to_stop_ends_serve_or_what_it_is_at(fleet_cli):
    fleet_cli.world.agent(1).set(task_ms=FOREVER_MS)
    with serve_process(fleet_cli) as serve:
        release = new_release(fleet_cli.world.store)
        eventually(lambda: fleet_cli.world.runs() == [1, 0, 0])
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF,
                       signal.SIGIO, signal.SIGPWR, signal.SIGRTMIN, signal.SIGRTMAX):
            serve.send_signal(number)
            time.sleep(0.05)
        fleet_cli.world.finish()
        eventually(lambda: fleet_cli.world.store.releases.get(release.id).status == "success")
        serve.terminate()
        assert Cli.end(serve).code == 0
    assert fleet_cli.world.runs() == [1, 1, 1]


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGXCPU])
def test_what_else_would_kill_is_a_clean_stop(fleet_cli, number):
    fleet_cli.world.agent(1).set(task_ms=60_000)
    with serve_process(fleet_cli) as serve:
        release = new_release(fleet_cli.world.store)
        eventually(lambda: fleet_cli.world.store.releases.get(release.id).claim_expires_at)
        serve.send_signal(number)
        result = Cli.end(serve)
    assert (result.code, result.err.splitlines()[-1].endswith("info: stopped")) == (0, True)
    assert fleet_cli.world.store.releases.get(release.id).claim_expires_at is None


def test_a_drain_survives_the_terminal_that_goes(fleet_cli):
    fleet_cli.world.agent(1).set(task_ms=FOREVER_MS)
    release = new_release(fleet_cli.world.store)
    drain = fleet_cli.start("run-once", "--drain")
    eventually(lambda: fleet_cli.world.runs() == [1, 0, 0])
    drain.send_signal(signal.SIGHUP)
    fleet_cli.world.finish()
    result = Cli.end(drain)
    assert (result.code, fleet_cli.world.store.releases.get(release.id).status) == (0, "success")
    assert "SIGHUP: read again: certificate for agents; " in result.err


def test_sighup_reads_certificates_and_tokens_anew_and_says_so_in_one_line(fleet_cli):
    tokens = fleet_cli.file("tokens", f"vera:viewer:{sha256('x')}\n")
    os.chmod(tokens, 0o600)
    pair = fleet_cli.world.certs / "agents" / ADDRESSES[0]
    fleet_cli.settings.update(API_TOKENS_FILE=tokens, HTTP_CERT=f"{pair}.crt", HTTP_KEY=f"{pair}.key")
    log = fleet_cli.folder / "log"

    def lines() -> list[str]:
        return [line for line in log.read_text().splitlines() if "SIGHUP" in line]

    with open(log, "w") as stream:
        serve = fleet_cli.start("serve", stderr=stream)
    try:
        eventually(lambda: "serving https://" in log.read_text(), message="serve is not ready")
        serve.send_signal(signal.SIGHUP)
        eventually(lambda: len(lines()) == 1, message="the first SIGHUP is not told")
        with open(tokens, "a") as file:
            file.write("nonsense\n")
        serve.send_signal(signal.SIGHUP)
        eventually(lambda: len(lines()) == 2, message="the second SIGHUP is not told")
        serve.terminate()
        assert serve.wait(TIMEOUT_S) == 0
    finally:
        serve.kill()
        serve.communicate()
    first, second = lines()
    assert "info: SIGHUP: read again: certificate for agents, certificate of the API, 1 tokens; " in first
    assert re.search(r"error: SIGHUP: .*not the tokens: API_TOKENS_FILE .*:2: must be NAME", second)
    assert "Traceback" not in log.read_text()


def connects(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def test_a_vanished_notify_socket_is_told_once_each_time(fleet_cli, tmp_path):
    path = f"{tmp_path}/notify"
    fleet_cli.settings.update(NOTIFY_SOCKET=path, RELEASE_EXECUTOR_INTERVAL_SEC="0.1")
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(path)
    log = tmp_path / "log"

    def told() -> int:
        return log.read_text().count("systemd: could not be told")

    with contextlib.closing(manager), open(log, "w") as stream, serve_process(fleet_cli, stderr=stream) as serve:
        os.rename(path, path + ".away")
        eventually(lambda: told() == 1)
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while manager.recv(4096):
                pass
        os.rename(path + ".away", path)
        manager.settimeout(60)
        assert manager.recv(4096).startswith(b"WATCHDOG=1")
        os.rename(path, path + ".away")
        eventually(lambda: told() == 2)
        time.sleep(1)  # ten times a second it is tried again
        serve.terminate()
        assert serve.wait(TIMEOUT_S) == 0
    assert told() == 2
    assert log.read_text().count("systemd: mended: could not be told") == 1


# -- names with several addresses --------------------------------------------------------------

@pytest.fixture
def dead():
    """A port of ADDRESSES[18] that neither takes nor refuses a connection: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((ADDRESSES[18], 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()


@pytest.fixture
def name_of(monkeypatch):
    """A function that lets the name edge.test have some addresses."""
    real = socket.getaddrinfo

    def give(*targets: tuple[str, int]) -> None:
        def look_up(host, port, *more, flags=0, **keywords):
            if host != "edge.test":
                return real(host, port, *more, flags=flags, **keywords)
            if flags & socket.AI_NUMERICHOST:
                raise socket.gaierror("not a number")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", target) for target in targets]
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return give


WELL_BELOW_A_MINUTE_S = 30.0


def agents_for(sqlite_url: str, certs, connect_s: float = 60.0) -> rc.AgentClient:
    return rc.AgentClient(settings_for(sqlite_url, certs, AGENT_CONNECT_TIMEOUT_SEC=connect_s,
                                       AGENT_TLS_SERVER_NAME="agent.test"))


@pytest.mark.parametrize("count", [1, 3])
def test_a_dead_address_does_not_use_up_the_time_of_the_next(sqlite_url, certs, new_fleet, dead, name_of, count):
    agent = new_fleet(1).agent(ADDRESSES[0])
    name_of(*[dead] * count, (ADDRESSES[0], agent.port))
    with contextlib.closing(agents_for(sqlite_url, certs)) as client:
        client._server_name = ADDRESSES[0]
        began = time.monotonic()
        assert "answers as a tasks agent" in client.ping(rc.Address("edge.test", 443, "tasks")).message
        assert count * rc.NEXT_ADDRESS_S <= time.monotonic() - began < WELL_BELOW_A_MINUTE_S


def test_where_the_first_answers_no_other_is_tried(sqlite_url, certs, new_fleet, dead, name_of, monkeypatch):
    monkeypatch.setattr(rc, "NEXT_ADDRESS_S", 60.0)
    agent = new_fleet(1).agent(ADDRESSES[0])
    name_of((ADDRESSES[0], agent.port), dead)
    with contextlib.closing(agents_for(sqlite_url, certs)) as client:
        client._server_name = ADDRESSES[0]
        began = time.monotonic()
        client.ping(rc.Address("edge.test", 443, "tasks"))
        assert time.monotonic() - began < WELL_BELOW_A_MINUTE_S


def test_after_one_that_refuses_the_next_is_tried_at_once(sqlite_url, certs, new_fleet, name_of, monkeypatch):
    monkeypatch.setattr(rc, "NEXT_ADDRESS_S", 60.0)
    agent = new_fleet(1).agent(ADDRESSES[0])
    name_of((ADDRESSES[18], free_port()), (ADDRESSES[17], free_port()), (ADDRESSES[0], agent.port))
    with contextlib.closing(agents_for(sqlite_url, certs)) as client:
        client._server_name = ADDRESSES[0]
        began = time.monotonic()
        client.ping(rc.Address("edge.test", 443, "tasks"))
        assert time.monotonic() - began < WELL_BELOW_A_MINUTE_S


def test_when_none_answers_all_tries_end_at_the_connect_timeout(sqlite_url, certs, dead, name_of):
    name_of(dead, (ADDRESSES[17], free_port()), dead)
    descriptors = len(os.listdir("/proc/self/fd"))
    with contextlib.closing(agents_for(sqlite_url, certs, 2.0)) as client:
        began = time.monotonic()
        outcome = client.ping(rc.Address("edge.test", 443, "tasks"))
        assert 1.9 < time.monotonic() - began < WELL_BELOW_A_MINUTE_S
        assert (outcome.error_kind, outcome.result) == (rc.UNREACHABLE, rc.UNSENT)
        assert "did not take a connection within 2 s" in outcome.message
        name_of((ADDRESSES[18], free_port()), (ADDRESSES[17], free_port()))
        outcome = client.ping(rc.Address("edge.test", 443, "tasks"))
        assert "can't be reached: connection refused" in outcome.message
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_probe_too_goes_to_the_address_that_answers(sqlite_url, dead, name_of):
    with socket.create_server((ADDRESSES[0], 0)) as server:
        name_of(dead, server.getsockname())
        client = rc.AgentClient(settings_for(sqlite_url))
        verify = rc.parse_strategy({"verify": {"url": "http://{main_ip}:80/", "status": 204}}).verify

        def answer() -> None:
            sock, _ = server.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        thread = threading.Thread(target=answer)
        thread.start()
        began = time.monotonic()
        assert verify
        outcome = rc.run_coroutine(client.probe("edge.test", verify, "http://edge.test:80/", 60.0))
        assert outcome == rc.Outcome(rc.PROBE, rc.SUCCESS)
        thread.join()
        assert time.monotonic() - began < WELL_BELOW_A_MINUTE_S
        client.close()


@pytest.mark.parametrize("target", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1%1", "0.0.0.0", "::",
                                    "224.0.0.1", "255.255.255.255"])
def test_a_name_leads_nowhere_where_a_node_may_not_be(sqlite_url, certs, name_of, target):
    with contextlib.closing(agents_for(sqlite_url, certs)) as client:
        name_of((target, free_port()))
        verify = rc.parse_strategy({"verify": {"url": "http://{main_ip}:80/latest/"}}).verify
        assert verify
        outcome = client.ping(rc.Address("edge.test", 443, "tasks"))
        assert outcome.error_kind == rc.UNREACHABLE
        assert "can't be reached: its name leads to " in outcome.message
        probed = rc.run_coroutine(client.probe("edge.test", verify, "http://edge.test:80/", 60.0))
        assert "its name leads to" in probed.message


def test_of_a_names_addresses_those_of_no_host_are_left_out(sqlite_url, certs, new_fleet, name_of):
    agent = new_fleet(1).agent(ADDRESSES[0])
    name_of(("169.254.169.254", agent.port), (ADDRESSES[0], agent.port))
    with contextlib.closing(agents_for(sqlite_url, certs)) as client:
        client._server_name = ADDRESSES[0]
        assert "answers as a tasks agent" in client.ping(rc.Address("edge.test", 443, "tasks")).message


# -- a clock that was ahead --------------------------------------------------------------------

@pytest.fixture
def ahead(fleet_cli):
    """A release that a dead process with a clock two days ahead left claimed."""
    store = fleet_cli.world.store
    release = new_release(store)
    until = rc.utc_text(time.time() + 2 * 86400)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = 'running', claim_owner = 'gone:1:0', claim_expires_at = ? "
                   "WHERE id = ?", until, release.id)
    fleet_cli.release, fleet_cli.until = release, until
    return fleet_cli


def test_readyz_stays_ready_and_the_log_names_a_claim_that_lies_ahead_once(ahead):
    ahead.settings["RELEASE_EXECUTOR_ENABLED"] = "0"
    with serve_process(ahead) as serve:
        for _ in range(3):
            time.sleep(rc.READY_CHECK_EVERY_S)
            with urllib.request.urlopen(f"http://127.0.0.1:{ahead.port}/readyz", timeout=60) as answer:
                assert answer.status == 200
        serve.terminate()
        result = Cli.end(serve)
    told = [line for line in result.err.splitlines() if "a clock was ahead" in line]
    assert len(told) == 1
    assert f"release {ahead.release.id} is claimed by gone:1:0 until {ahead.until}" in told[0]


def test_a_claim_that_lies_ahead_is_named_by_check_and_counts_as_expired(ahead):
    found = findings(ahead("check", "--json"))
    assert (found["clock"][0], "gone:1:0" in found["clock"][1]) == (False, True)
    ahead.ok("run-once", "--drain")
    assert ahead.world.store.releases.get(ahead.release.id).status == "success"


# -- terminals ---------------------------------------------------------------------------------

def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


@pytest.mark.parametrize(("width", "name"), [(80, "边缘节点上海浦东新区数据中心机房第一号服务器"), (30, "edge-1"),
                                             (5, "edge-1")])
def test_no_line_of_watch_is_wider_than_its_terminal(cli, width, name):
    cli.ok("node", "add", name, "10.0.0.1")
    cli.ok("create")
    with contextlib.closing(sqlite3.connect(cli.folder / "releasectl.db")) as connection, connection:
        connection.execute("UPDATE release_tasks SET status = 'running', status_reason = ?",
                           (f"batch 1 of 1: waiting for 1 of 1 node, slowest {name} for 2 s of 600 s",))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    cli.settings["TERM"] = "xterm"
    # standard output is no terminal here
    watch = subprocess.run([sys.executable, PROGRAM, "watch", "1", "--timeout", "0.5s"], cwd=cli.folder,
                           env=cli.environment, stdout=subprocess.DEVNULL, stderr=theirs, check=False,
                           timeout=TIMEOUT_S)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: all was read
        while True:
            drawn += os.read(ours, 65536)
    os.close(ours)
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", drawn.decode()).replace("\r", "").split("\n")
    drawn_lines = [line for line in lines if not line.startswith("timed out after")]
    assert watch.returncode == rc.EXIT_BUSY
    assert len(drawn_lines) > 2
    assert max(map(columns, drawn_lines)) <= width


def test_columns_of_a_table_count_columns_and_not_letters():
    lines = rc.Display().table([("上海", "a"), ("edge", "b"), ("e\u0301dge", "c")], ("name", "x")).splitlines()
    assert lines == ["NAME  X", "上海  a", "edge  b", "e\u0301dge  c"]


# -- weak keys ---------------------------------------------------------------------------------

def test_a_weak_key_is_told_as_weak(cli, tmp_path):
    if not shutil.which("openssl"):
        leave_out("openssl")
    key, cert = tmp_path / "weak.key", tmp_path / "weak.crt"
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:512", "-nodes", "-days", "30", "-subj",
                           "/CN=weak", "-keyout", str(key), "-out", str(cert)], capture_output=True, check=False)
    if made.returncode:
        leave_out("an openssl that makes keys of 512 bits")
    os.chmod(key, 0o600)
    cli.settings.update(CONTROL_CERT=str(cert), CONTROL_KEY=str(key), CONTROL_CA=str(cert))
    line = cli.refused(rc.EXIT_USAGE, "serve")
    assert f"CONTROL_CERT {cert} is weak: its key is too weak: make one of RSA with 2048 bits" in line
