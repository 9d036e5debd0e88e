"""The agent client against real TLS sockets that misbehave (contract section 1)."""
from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import warnings
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import leave_out
from lab import (
    HOST,
    TASK_ID,
    Peer,
    WaitingClient,
    accepted,
    drip,
    envelope,
    eventually,
    executed,
    hang,
    hang_after_request,
    make_certs,
    mtls,
    our_files,
    reply,
    says,
    server_context,
    settings_for,
    task,
)

import releasectl as rc

TASK = rc.AgentTask(TASK_ID, "apply_config", 42, '{"a":1}')
# Others may be at work beside us; who misbehaves does so for a minute.
LIMIT_S, MARGIN_S = 0.6, 30.0
# -- agents that misbehave -------------------------------------------------------------------

# -- arrangement -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def same_ca(certs, tmp_path_factory) -> Callable[..., Path]:
    """A function that makes a folder with a new client certificate and an agent's of the same CA."""
    def make(names: str, **environment: str) -> Path:
        folder = tmp_path_factory.mktemp("same_ca")
        for name in ("ca.crt", "ca.key"):
            shutil.copy(certs / name, folder / name)
        return make_certs(folder, names, **environment)
    return make


@pytest.fixture(scope="module")
def local(same_ca) -> Path:
    """Certificates for the names of this machine itself."""
    return same_ca("localhost,::1")


@pytest.fixture(scope="module")
def expired(same_ca) -> Path:
    return same_ca(HOST, DAYS="-1")


def among_others(request: Coroutine[rc.Wait, None, rc.Outcome]) -> rc.Outcome:
    """Run a request as the executor does: in an event loop."""
    outcomes: queue.SimpleQueue[rc.Outcome | Exception] = queue.SimpleQueue()

    async def put() -> None:
        try:
            outcomes.put(await request)
        except Exception as error:
            outcomes.put(error)
    loop = rc.EventLoop()
    loop.start()
    loop.submit(put())
    try:
        outcome = outcomes.get(timeout=60)
    finally:
        loop.close()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.fixture(params=[rc.run_coroutine, among_others], ids=["alone", "among others"])
def new_client(certs, request):
    """A function that makes a client; all are closed at the end. Outcomes are the same in either way to wait."""
    clients = []

    def make(folder: Path | None = certs, **settings: object) -> WaitingClient:
        agents = rc.AgentClient(settings_for("sqlite:///unused.db", folder, **settings))
        clients.append(WaitingClient(agents, request.param))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(new_client) -> WaitingClient:
    return new_client()


@contextlib.contextmanager
def full_listener():
    """Yield the address of a listener whose queue is full: it takes no connection, and refuses none."""
    with socket.create_server((HOST, 0), backlog=0) as listener, contextlib.ExitStack() as crowd:
        for _ in range(3):
            sock = crowd.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield rc.Address(HOST, listener.getsockname()[1], "tasks")


def assert_outcome(outcome: rc.Outcome, kind: str, message: str, result: str = rc.UNCLEAR, hold_s: float = 0.0) -> None:
    """The outcome as it is stored; A stands for "agent ADDRESS:PORT"."""
    stored = re.sub(r"^agent (\[.*\]|[^ :]*):\d+", "A", rc.one_line(outcome.message))
    assert (outcome.error_kind, stored, outcome.result, outcome.hold_s) == (kind, message, result, hold_s)


# -- limits ----------------------------------------------------------------------------------

def test_a_refused_connection_is_told_as_such(client):
    with socket.create_server((HOST, 0)) as listener:
        address = rc.Address(HOST, listener.getsockname()[1], "tasks")
    assert_outcome(client.dispatch(address, TASK), "unreachable", "A can't be reached: connection refused",
                 rc.UNSENT)


def test_an_agent_that_takes_no_connection_ends_at_the_connect_limit(new_client):
    client = new_client(AGENT_CONNECT_TIMEOUT_SEC=LIMIT_S)
    with full_listener() as address:
        started = time.monotonic()
        outcome = client.dispatch(address, TASK)
    assert LIMIT_S <= time.monotonic() - started < LIMIT_S + MARGIN_S
    assert_outcome(outcome, "unreachable", "A did not take a connection within 0.6 s", rc.UNSENT)


@pytest.mark.parametrize("talk", [hang, drip(b"\x16\x03\x03\x40\x00", b"\x02")], ids=["hangs", "drips"])
def test_a_handshake_ends_at_the_connect_limit_also_when_it_drips(new_client, new_peer, talk):
    client, peer = new_client(AGENT_CONNECT_TIMEOUT_SEC=LIMIT_S), new_peer(talk, tls=False)
    started = time.monotonic()
    outcome = client.dispatch(peer.address(), TASK)
    assert LIMIT_S <= time.monotonic() - started < LIMIT_S + MARGIN_S
    assert_outcome(outcome, "timeout", "A did not finish the TLS handshake within 0.6 s", rc.UNSENT)


LATE = {
    "hangs after the request": (hang_after_request, "A did not answer within 0.6 s"),
    "drips in the head": (drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), "A drips: no whole answer within 0.6 s"),
    "drips in the body": (drip(b"HTTP/1.1 200 OK\r\n\r\n", b" "), "A drips: no whole answer within 0.6 s"),
    "drips in a chunk": (drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
                         "A drips: no whole answer within 0.6 s"),
    "reads no request": (hang, "A did not answer within 0.6 s"),
}


@pytest.mark.parametrize("protocol", rc.PROTOCOLS)
@pytest.mark.parametrize("case", LATE)
def test_a_request_ends_at_the_request_limit_however_slowly_it_drips(new_client, new_peer, case, protocol):
    talk, message = LATE[case]
    client, peer = new_client(AGENT_REQUEST_TIMEOUT_SEC=LIMIT_S), new_peer(talk)
    payload = rc.to_json({"a": "x" * (8 << 20)} if case == "reads no request" else {})
    started = time.monotonic()
    outcome = client.dispatch(peer.address(protocol), TASK._replace(payload=payload))
    assert LIMIT_S <= time.monotonic() - started < LIMIT_S + MARGIN_S
    assert_outcome(outcome, "timeout", message, rc.LOST, hold_s=LIMIT_S)


def test_within_s_shortens_the_request_limit_and_the_message_says_so(client, new_peer):
    peer = new_peer(hang_after_request)
    started = time.monotonic()
    outcome = client.dispatch(peer.address("execute"), TASK, 0.3)
    assert 0.3 <= time.monotonic() - started < 0.3 + MARGIN_S
    # the agent may go on working for as long as a whole request may take
    assert_outcome(outcome, "timeout", "A did not answer within 0.3 s", rc.LOST, hold_s=20.0)


# -- certificates ----------------------------------------------------------------------------

def test_an_agent_of_another_ca_is_not_spoken_with(client, certs, new_peer):
    peer = new_peer(hang, server_context(certs / "other", ca=certs))
    assert_outcome(client.dispatch(peer.address(), TASK), "tls",
                 "A presented a certificate of another CA than ours (CONTROL_CA)", rc.UNSENT)


def test_an_agent_whose_certificate_names_another_address_is_not_spoken_with(client, new_peer):
    peer = new_peer(hang, host="127.0.1.99")
    assert_outcome(client.dispatch(peer.address(), TASK), "tls",
                 "A presented a certificate for another address", rc.UNSENT)


def test_an_expired_certificate_of_an_agent_is_told_as_such(client, expired, new_peer):
    peer = new_peer(hang, server_context(expired))
    assert_outcome(client.dispatch(peer.address(), TASK), "tls",
                 "A presented a certificate that has expired", rc.UNSENT)


def test_agent_tls_server_name_is_verified_instead_of_the_address(new_client, new_peer):
    peer = new_peer(says(accepted()), host="127.0.1.99")
    assert new_client(AGENT_TLS_SERVER_NAME="agent.test").dispatch(peer.address(), TASK).result == rc.ACCEPTED
    outcome = new_client(AGENT_TLS_SERVER_NAME="wrong.test").dispatch(peer.address(), TASK)
    assert_outcome(outcome, "tls", "A presented a certificate for another name than wrong.test (AGENT_TLS_SERVER_NAME)",
                 rc.UNSENT)


@pytest.mark.parametrize("body_bytes", [10, 8 << 20], ids=["small body", "large body"])
@pytest.mark.parametrize("protocol", rc.PROTOCOLS)
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize(("ours", "alerts"), [
    ("of another CA", {"unknown ca"}), ("expired", {"certificate expired"}),
    ("none", {"certificate required", "handshake failure"})])
def test_an_agent_that_refuses_our_certificate_is_told_as_such(new_client, new_peer, certs, expired, monkeypatch,
                                                               ours, alerts, version, protocol, body_bytes):
    folder = {"of another CA": certs / "other", "expired": expired, "none": certs}[ours]
    if ours == "none":
        monkeypatch.setattr(rc, "load_pair", lambda *_: None)
    client = new_client(folder, CONTROL_CA=certs / "ca.crt")
    peer = new_peer(hang, server_context(certs, version=version))
    outcome = client.dispatch(peer.address(protocol), TASK._replace(payload=rc.to_json({"a": "x" * body_bytes})))
    alert = re.sub(r".*\((.*)\)", r"\1", outcome.message)
    assert alert in alerts
    assert_outcome(outcome, "tls", f"A refused our client certificate ({alert})", rc.UNSENT)


def test_a_port_without_tls_is_told_as_such(client, new_peer):
    def plain(peer: Peer, sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(reply(b"Client sent an HTTP request", "400 Bad Request"))
    assert_outcome(client.dispatch(new_peer(plain, tls=False).address(), TASK), "tls",
                 "A does not speak TLS on this port", rc.UNSENT)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_handshake_that_the_agent_cuts_is_told_as_such(client, new_peer, reset):
    def cut(peer: Peer, sock: socket.socket) -> None:
        sock.recv(65536)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert_outcome(client.dispatch(new_peer(cut, tls=False).address(), TASK), "tls",
                 "A: the TLS handshake failed: it closed the connection", rc.UNSENT)


def test_tls_older_than_1_2_is_refused(client, certs, new_peer):
    if not ssl.HAS_TLSv1_1:
        leave_out("TLS 1.1 in the local OpenSSL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context = server_context(certs, version="TLSv1_1")
        context.set_ciphers("ALL:@SECLEVEL=0")
    assert_outcome(client.dispatch(new_peer(hang, context).address(), TASK), "tls",
                 "A speaks no TLS 1.2 or newer", rc.UNSENT)


# -- answers that make no sense --------------------------------------------------------------

CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
NOT_JSON = "A answered what is not JSON: "
NOT_HTTP = "A answered what is not HTTP: "
HEAD_TOO_LARGE = (NOT_HTTP + "the head is too large: at most 64 KiB for its first line, 64 KiB and 100 headers in all")
TOO_BIG = ("protocol", "A answered more than 64 KiB", False)
BROKEN: dict[str, tuple[Callable[[Peer, Any], None], str, str, bool]] = {
    "not JSON": (says(reply(b"hello")), "protocol", NOT_JSON + "Expecting value: line 1 column 1 (char 0)", False),
    "no body": (says(reply(b"")), "protocol", NOT_JSON + "Expecting value: line 1 column 1 (char 0)", False),
    "a list": (says(reply([1])), "protocol", "A answered JSON that is no object", False),
    "no code": (says(reply({"data": {}})), "protocol", "A answers without a code", False),
    "code true": (says(reply(envelope({}, True))), "protocol", "A answers without a code", False),
    "code false": (says(reply(envelope({}, False))), "protocol", "A answers without a code", False),
    "code text": (says(reply(envelope({}, "0"))), "protocol", "A answers without a code", False),
    "code 0.0": (says(reply(envelope({}, 0.0))), "protocol", "A answers without a code", False),
    "code 5001": (says(reply(envelope(None, 5001, "disk full"))), "rejected", "A refused: disk full (code 5001)", True),
    "no data": (says(reply(envelope(None))), "protocol", "A answers without data", False),
    "no id": (says(reply(envelope({}))), "protocol", "A names no task id", False),
    "an id with a newline": (says(accepted("a\nb")), "protocol", "A names no task id", False),
    "400": (says(reply(envelope(None, 2001, "invalid request body"), "400 Bad Request")),
            "rejected", "A answered HTTP 400: invalid request body", True),
    "404 to a dispatch": (says(reply(b"404 page not found\n", "404 Not Found", "Content-Type: text/plain\r\n")),
                          "rejected", "A answered HTTP 404: 404 page not found (wrong --protocol?)", True),
    "429": (says(reply(b"", "429 Too Many Requests")), "http", "A answered HTTP 429", False),
    "500": (says(reply(envelope(None, 5001, "oops"), "500 Internal")), "http", "A answered HTTP 500: oops", False),
    "204": (says(b"HTTP/1.1 204 No Content\r\n\r\n"), "http", "A answered HTTP 204", False),
    "too big, with its length": (says(reply(b" " * ((1 << 20) + 1))), *TOO_BIG),
    "too big, without length": (says(b"HTTP/1.1 200 OK\r\n\r\n", forever=b" " * 65536), *TOO_BIG),
    "too big, chunked": (says(CHUNKED.encode(), forever=b"10000\r\n" + b" " * 65536 + b"\r\n"), *TOO_BIG),
    "too big, tiny chunks": (says(CHUNKED.encode(), forever=b"1;" + b"x" * 60_000 + b"\r\n \r\n"), *TOO_BIG),
    "endless 100 Continue": (says(b"", forever=b"HTTP/1.1 100 Continue\r\n\r\n" * 999), *TOO_BIG),
    "endless header": (says(b"HTTP/1.1 200 OK\r\nX: ", forever=b"x" * 65536),
                       "protocol", HEAD_TOO_LARGE, False),
    "endless status line": (says(b"HTTP/1.1 200 ", forever=b"x" * 65536),
                            "protocol", HEAD_TOO_LARGE, False),
    "endless headers": (says(b"HTTP/1.1 200 OK\r\n", forever=b"X: y\r\n" * 999),
                        "protocol", HEAD_TOO_LARGE, False),
    "no HTTP": (says(b"hello, who are you?\r\n"),
                "protocol", NOT_HTTP + "the first line is not HTTP/1.1 STATUS REASON", False),
    "a key twice": (says(reply(b'{"code":5,"code":0,"data":{}}')), "protocol",
                    NOT_JSON + "key 'code' stands twice", False),
    "NaN": (says(reply(b'{"code":0,"data":{"x":NaN}}')), "protocol", NOT_JSON + "NaN is not JSON", False),
    "deep nesting": (says(reply(b"[" * 60_000)), "protocol", NOT_JSON + "nested too deep", False),
    "invalid UTF-8": (says(reply(b'{"code":0,"message":"\xff"}')), "protocol", NOT_JSON + "not UTF-8", False),
    "a lone surrogate": (says(reply(b'{"code":0,"data":{"taskId":"\\ud800"}}')), "protocol",
                         NOT_JSON + "not UTF-8", False),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_answer_that_is_not_the_json_of_the_contract_is_an_error_that_says_which(client, new_peer, case):
    talk, kind, message, final = BROKEN[case]
    outcome = client.dispatch(new_peer(talk).address(), TASK)
    assert_outcome(outcome, kind, message, rc.FAILED if final else rc.UNCLEAR)


@pytest.mark.parametrize("status", ["301 Moved Permanently", "307 Temporary Redirect"])
def test_a_redirect_is_an_error_and_is_never_followed(client, new_peer, status):
    target = new_peer(says(accepted()))
    peer = new_peer(says(reply(b"", status, f"Location: https://{HOST}:{target.port}/tasks/dispatch\r\n")))
    outcome = client.dispatch(peer.address(), TASK)
    assert_outcome(outcome, "http", f"A answered a redirect (HTTP {status[:3]}), which is not followed")
    assert (len(peer.requests), target.accepted) == (1, 0)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n"
CUT = {
    "before the answer": b"", "in the status line": b"HTTP/1.1 2", "after the status": b"HTTP/1.1 404",
    "after the status line": b"HTTP/1.1 200 OK\r\n", "in a header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "before the end of the head": HEAD, "before the body": HEAD + b"\r\n", "in the body": HEAD + b"\r\n{",
    "in a chunk": CHUNKED.encode() + b"99\r\n{", "between chunks": CHUNKED.encode() + b"1\r\n{\r\n",
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("protocol", rc.PROTOCOLS)
@pytest.mark.parametrize("case", CUT)
def test_a_cut_connection_holds_the_next_request_for_5_s(client, new_peer, case, protocol, reset):
    peer = new_peer(says(CUT[case], reset=reset))
    outcome = client.dispatch(peer.address(protocol), TASK)
    if reset:  # what was sent before may be lost with it
        when = re.sub(".* connection ", "", outcome.message)
        assert when in ("before it answered", "in the middle of its answer")
    else:
        when = "in the middle of its answer" if CUT[case] else "before it answered"
    assert_outcome(outcome, "unreachable", f"A cut the connection {when}", rc.LOST, hold_s=rc.CUT_BUSY_S)
    assert len(peer.requests) == 1, "a request whose answer was lost is not repeated at once"


def test_a_cut_404_is_no_word_that_the_task_is_unknown(client, new_peer):
    peer = new_peer(says(b"HTTP/1.1 404 Not Found\r\nContent-Ty"))
    assert_outcome(client.query(peer.address(), TASK_ID), "unreachable",
                 "A cut the connection in the middle of its answer", rc.LOST, hold_s=rc.CUT_BUSY_S)


# -- the dialects ---------------------------------------------------------------------------

def test_a_dialect_has_a_row_in_every_table_and_stands_in_the_schema():
    assert list(rc.WIRE_FORMATS) == list(rc.DIALECTS)
    for name, wire in rc.WIRE_FORMATS.items():
        assert bool(wire.query_path) == rc.DIALECTS[name].can_be_asked
    allowed = ", ".join(f"'{name}'" for name in rc.DIALECTS)
    assert f"agent_protocol IN ({allowed})" in (Path(rc.__file__).parent / "schema.sql").read_text("utf-8")


# -- the tasks dialect -----------------------------------------------------------------------

def test_the_task_that_the_answer_names_is_the_one_to_poll_and_its_id_is_quoted(client, new_peer):
    odd = "a/b?c#d e%:\u00fc"
    peer = new_peer(says(accepted(odd), task("running", odd)))
    assert client.dispatch(peer.address(), TASK) == rc.Outcome(rc.DISPATCH, rc.ACCEPTED, odd)
    assert client.query(peer.address(), odd) == rc.Outcome(rc.QUERY, rc.WORKING, odd)
    (post, body), (get, _) = peer.requests
    assert post.startswith("POST /tasks/dispatch HTTP/1.1\r\n")
    assert json.loads(body) == {"taskId": TASK_ID, "type": "apply_config", "version": 42, "payload": {"a": 1}}
    assert get.startswith("GET /tasks/a%2Fb%3Fc%23d%20e%25:%C3%BC HTTP/1.1\r\n")


@pytest.mark.parametrize(("answer", "state"), [
    (task("pending"), rc.WORKING), (task("running"), rc.WORKING), (task("success"), rc.SUCCESS),
    (reply(b"404 page not found", "404 Not Found"), rc.UNKNOWN)], ids=["pending", "running", "success", "404"])
def test_a_poll_gives_what_the_agent_knows(client, new_peer, answer, state):
    assert client.query(new_peer(says(answer)).address(), TASK_ID) == rc.Outcome(rc.QUERY, state, TASK_ID)


@pytest.mark.parametrize(("answer", "kind", "message", "final"), [
    (task("success", "apply_config_10.0.0.8_42"), "protocol", "A answers for another task", False),
    (task("done"), "protocol", 'A gives the unknown status "done"', False),
    (task("failed", lastError="no space"), "agent_failed", "no space", True),
    (task("failed", lastError=None), "agent_failed", "the agent gave no reason", True),
    (task("failed", lastError=["odd"]), "agent_failed", "['odd']", True),
    (task("failed", lastError="a\x00\r\nb\x1b[31m\u202e c"), "agent_failed", "a b [31m c", True),
    (task("failed", lastError="x" * 60_000), "agent_failed", "x" * 252 + "...", True),
], ids=["another task", "unknown status", "failed", "no reason", "a list", "control characters", "60 kB"])
def test_a_poll_that_tells_no_success_says_why(client, new_peer, answer, kind, message, final):
    outcome = client.query(new_peer(says(answer)).address(), TASK_ID)
    assert_outcome(outcome, kind, message, rc.FAILED if final else rc.UNCLEAR)
    assert len(outcome.event_detail.encode()) <= rc.MAX_DETAIL_BYTES


# -- the execute dialect ---------------------------------------------------------------------

@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_an_agent_gets_the_numbers_of_a_payload_digit_for_digit(client, new_peer, protocol):
    peer = new_peer(says(executed("success", "applied")))
    payload = rc.read_payload('{"a":[0.1234567890123456789,1.10,-0,1E5]}')
    with contextlib.suppress(rc.AgentError):  # a tasks agent answers otherwise
        client.dispatch(peer.address(protocol), TASK._replace(payload=rc.payload_text(protocol, payload, 42)))
    (_, body), = peer.requests
    assert '"a":[0.1234567890123456789,1.10,-0,1E5]' in (body if isinstance(body, str) else body.decode())
    assert json.loads(body)["payload"].get("version", 42) == 42


def test_an_execute_agent_is_sent_the_version_within_the_payload(client, new_peer):
    peer = new_peer(says(executed("success", "applied")))
    payload = {"a": 1}
    task = TASK._replace(payload=rc.payload_text("execute", payload, 42))
    assert client.dispatch(peer.address("execute"), task) == rc.Outcome(
        rc.DISPATCH, rc.SUCCESS, TASK_ID, message="applied")
    (head, body), = peer.requests
    assert head.startswith("POST /agent/v1/tasks/execute HTTP/1.1\r\n")
    assert json.loads(body) == {"requestId": TASK_ID, "type": "apply_config", "payload": {"a": 1, "version": 42}}
    assert payload == {"a": 1}


def test_version_already_applied_is_a_success_where_it_is_the_releases_version(client, new_peer):
    peer = new_peer(says(executed("success", "Version 42 already applied (current: 42)")))
    assert client.dispatch(peer.address("execute"), TASK).result == rc.SUCCESS


@pytest.mark.parametrize(("answer", "kind", "message", "final"), [
    (executed("success", "Version 42 already applied (current: 43)"), "rejected",
     "the agent is already at version 43", True),
    (executed("success", "Version 0 already applied (current: 41)"), "protocol",
     "A has version 41 and calls it applied", False),
    (executed("success", "Version 42 applied but reload failed: nginx: [emerg]"), "agent_failed",
     "Version 42 applied but reload failed: nginx: [emerg]", True),
    (executed("failed", "no space"), "agent_failed", "no space", True),
    (executed("failed", None), "agent_failed", "the agent gave no reason", True),
    (executed("success", request_id="apply_config_10.0.0.8_42"), "protocol", "A answers for another request", False),
    (executed("running"), "protocol", 'A gives the unknown status "running"', False),
    (reply(envelope(None, 2001, "invalid request body"), "400 Bad Request"), "rejected",
     "A answered HTTP 400: invalid request body", True),
], ids=["above", "below", "reload failed", "failed", "no reason", "another request", "unknown status", "400"])
def test_an_execute_agent_is_believed_by_its_message(client, new_peer, answer, kind, message, final):
    assert_outcome(client.dispatch(new_peer(says(answer)).address("execute"), TASK), kind, message,
                 rc.FAILED if final else rc.UNCLEAR)


# -- connections -----------------------------------------------------------------------------

def test_kept_alive_connections_are_used_again(client, new_fleet):
    agent = new_fleet(1).agent(HOST)
    address = rc.Address(HOST, agent.port, "tasks")
    assert client.dispatch(address, TASK).result == rc.ACCEPTED
    states = [client.query(address, "unknown").result for _ in range(5)]
    assert (states, agent.handshakes) == ([rc.UNKNOWN] * 5, 1)


def test_a_kept_connection_that_the_agent_closed_meanwhile_is_replaced(client, new_fleet):
    fleet = new_fleet(1)
    agent = fleet.agent(HOST)
    address = rc.Address(HOST, agent.port, "tasks")
    client.query(address, "unknown")
    fleet.call(agent.close_connections)
    assert client.query(address, "unknown").result == rc.UNKNOWN
    assert agent.handshakes == 2


def test_a_kept_connection_that_ends_under_the_request_is_replaced(client, new_peer):
    def talk(peer: Peer, sock: socket.socket) -> None:
        peer.read_request(sock)
        sock.sendall(task("running"))
        if peer.handshakes == 1:
            peer.read_request(sock)  # and no answer
    peer = new_peer(talk)
    assert [client.query(peer.address(), TASK_ID).result for _ in range(2)] == [rc.WORKING] * 2
    assert (peer.handshakes, len(peer.requests)) == (2, 3)


def answer_then_hang(peer: Peer, sock: socket.socket) -> None:
    peer.read_request(sock)
    sock.sendall(task("running"))
    hang_after_request(peer, sock)


def test_a_kept_connection_that_hangs_is_a_timeout_and_not_replaced(new_client, new_peer):
    client, peer = new_client(AGENT_REQUEST_TIMEOUT_SEC=LIMIT_S), new_peer(answer_then_hang)
    client.query(peer.address(), TASK_ID)
    outcome = client.query(peer.address(), TASK_ID)
    assert_outcome(outcome, "timeout", "A did not answer within 0.6 s", rc.LOST, hold_s=LIMIT_S)
    assert peer.accepted == 1


def test_an_answer_that_says_close_is_not_kept(client, new_peer):
    peer = new_peer(says(reply(b"", "404 Not Found", "Connection: close\r\n")))
    assert [client.query(peer.address(), TASK_ID).result for _ in range(2)] == [rc.UNKNOWN] * 2
    assert peer.handshakes == 2


def test_connections_of_execute_agents_are_never_used_again(client, new_peer):
    peer = new_peer(says(executed("success")))
    for _ in range(2):
        client.dispatch(peer.address("execute"), TASK)
    assert peer.handshakes == 2
    assert all("Connection: close" in head for head, _ in peer.requests)


@pytest.mark.parametrize("head", ["Connection: close\r\nContent-Length: {}", "Transfer-Encoding: chunked", "X: y"],
                         ids=["closes", "in chunks", "to its end"])
def test_no_answer_takes_a_thread(client, new_peer, monkeypatch, head):
    monkeypatch.setattr(rc.EventLoop, "_run_alone", None)
    body = executed("success").partition(b"\r\n\r\n")[2]
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if "chunked" in head else body
    answer = f"HTTP/1.1 200 OK\r\n{head.format(len(body))}\r\n\r\n".encode() + sent
    assert client.dispatch(new_peer(says(answer)).address("execute"), TASK).result == rc.SUCCESS


def test_the_bound_on_idle_connections_holds(client, new_fleet, monkeypatch):
    monkeypatch.setattr(rc, "MAX_IDLE_AGENT_CONNECTIONS", 2)
    fleet = new_fleet(5)
    for agent in fleet.agents:
        client.query(rc.Address(agent.address, agent.port, "tasks"), "unknown")
    eventually(lambda: [agent.open_connections for agent in fleet.agents] == [0, 0, 0, 1, 1],
               message="the oldest connections are not closed")


def test_an_idle_connection_is_not_kept_for_ever(client, new_fleet, monkeypatch):
    monkeypatch.setattr(rc, "MAX_IDLE_AGENT_CONNECTION_S", 0.0)
    agent = new_fleet(1).agent(HOST)
    for _ in range(2):
        client.query(rc.Address(HOST, agent.port, "tasks"), "unknown")
    assert agent.handshakes == 2
    eventually(lambda: agent.open_connections == 1)


def test_proxies_of_the_environment_are_not_used(client, new_peer, monkeypatch):
    proxy, peer = new_peer(hang, tls=False, host="127.0.1.2"), new_peer(says(accepted()))
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{proxy.host}:{proxy.port}")
        monkeypatch.setenv(name.lower(), f"http://{proxy.host}:{proxy.port}")
    assert client.dispatch(peer.address(), TASK).result == rc.ACCEPTED
    assert (peer.accepted, proxy.accepted) == (1, 0)


def test_an_ipv6_address_is_called_and_verified(client, local, new_peer):
    try:
        peer = new_peer(says(accepted(), reply(b"", "500 Internal")), server_context(local), host="::1")
    except OSError:
        leave_out("IPv6 on loopback")
    assert client.dispatch(peer.address(), TASK).result == rc.ACCEPTED
    assert client.query(peer.address(), "x").message == f"agent [::1]:{peer.port} answered HTTP 500"


def test_a_host_name_is_called_and_verified(client, local, new_peer):
    try:
        socket.getaddrinfo("localhost", None)
    except OSError:
        leave_out("a host that knows the name localhost (/etc/hosts)")
    peer = new_peer(says(accepted()), server_context(local), host="127.0.0.1")
    assert client.dispatch(peer.address(host="localhost"), TASK).result == rc.ACCEPTED


def test_a_host_name_that_nobody_knows_can_not_be_reached(client):
    outcome = client.dispatch(rc.Address("no-such-host.invalid", 8443, "tasks"), TASK)
    assert (outcome.error_kind, outcome.result) == ("unreachable", rc.UNSENT)
    assert outcome.message.startswith("agent no-such-host.invalid:8443 can't be reached: ")


# -- the end ---------------------------------------------------------------------------------

@pytest.fixture
def fail_by_close(new_client):
    """A function that has a request under way, calls close(), and returns the outcome of the request."""
    def fail(client: WaitingClient, address: rc.Address, is_under_way: Callable[[], object]) -> rc.Outcome:
        outcomes: list[rc.Outcome] = []
        caller = threading.Thread(target=lambda: outcomes.append(client.query(address, TASK_ID)))
        caller.start()
        eventually(is_under_way)
        client.close()
        caller.join(60)
        assert outcomes, "close() does not end the request"
        return outcomes[0]
    return fail


@pytest.mark.parametrize(("talk", "reached"), [
    (hang, False), (hang_after_request, True), (answer_then_hang, True), (LATE["drips in the head"][0], True)],
    ids=["handshake", "answer", "kept connection", "drip"])
def test_close_ends_requests_in_flight_at_once(new_client, new_peer, fail_by_close, talk, reached):
    client = new_client(AGENT_CONNECT_TIMEOUT_SEC=600, AGENT_REQUEST_TIMEOUT_SEC=600)
    peer = new_peer(talk, tls=talk is not hang)
    if talk is answer_then_hang:
        client.query(peer.address(), TASK_ID)
    before = len(peer.requests)
    outcome = fail_by_close(client, peer.address(),
                            lambda: len(peer.requests) > before or not reached and peer.accepted)
    assert (outcome.result, peer.accepted) == (rc.LOST if reached else rc.UNSENT, 1)


def test_close_ends_a_connection_attempt_and_nothing_leaves_later(new_client, new_peer, fail_by_close):
    client, peer = new_client(AGENT_CONNECT_TIMEOUT_SEC=600), new_peer(says(accepted()))
    with full_listener() as address:
        outcome = fail_by_close(client, address, lambda: client.agents._active)
    assert (outcome.error_kind, outcome.result) == ("unreachable", rc.UNSENT)
    assert_outcome(client.dispatch(peer.address(), TASK), "unreachable",
                 "A can't be reached: releasectl is stopping", rc.UNSENT)
    assert not peer.requests


# -- our certificate -------------------------------------------------------------------------

def test_certificates_renewed_on_disk_are_used_without_a_restart(new_client, new_peer, certs, local, tmp_path):
    client = new_client(**our_files(certs, tmp_path))
    peer = new_peer(says(reply(b"", "404 Not Found", "Connection: close\r\n")))
    for name in ("", "control.crt", "control.key"):  # half done in between: the key is the old one
        if name:
            shutil.copy(local / name, tmp_path / name)
        assert client.query(peer.address(), TASK_ID).result == rc.UNKNOWN
    first, half_done, renewed = peer.serials
    assert first == half_done != renewed


def test_a_connection_made_with_the_old_certificate_is_not_kept(new_client, new_fleet, certs, local, tmp_path):
    client, agent = new_client(**our_files(certs, tmp_path)), new_fleet(1).agent(HOST)
    for folder in (certs, local):
        our_files(folder, tmp_path)
        client.query(rc.Address(HOST, agent.port, "tasks"), "unknown")
    assert agent.handshakes == 2
    eventually(lambda: agent.open_connections == 1)


def test_a_renewal_is_noticed_that_keeps_size_and_time_of_the_files(new_client, certs, tmp_path):
    ours = our_files(certs, tmp_path)
    key = tmp_path / "control.key"
    good, times = key.read_bytes(), (key.stat().st_atime_ns, key.stat().st_mtime_ns)
    client = new_client(**ours)
    client.agents.prepare()
    first = client.agents._tls.context()
    for content in (b"x" * len(good), good):
        assert client.agents._tls.context() is first  # the pair that fitted goes on serving
        key.write_bytes(content)
        os.utime(key, ns=times)
    assert client.agents._tls.context() is not first, "the mended key was not looked at"


def test_prepare_tells_what_is_wrong_with_our_certificate(certs, tmp_path):
    files = mtls(certs)
    locked, text = tmp_path / "locked.key", tmp_path / "text"
    subprocess.run(["openssl", "pkey", "-in", str(certs / "control.key"), "-aes256", "-passout", "pass:secret",
                    "-out", str(locked)], check=True, capture_output=True)
    text.write_text("hello\n")
    other_key, gone = certs / "other" / "control.key", tmp_path / "gone"
    wrong = {
        ("CONTROL_CERT", ""): "CONTROL_CERT is not set",
        ("CONTROL_CERT", gone): f"CONTROL_CERT {gone} can't be read: no such file or directory",
        ("CONTROL_KEY", gone): f"CONTROL_KEY {gone} can't be read: no such file or directory",
        ("CONTROL_CA", gone): f"CONTROL_CA {gone} can't be read: no such file or directory",
        ("CONTROL_CA", tmp_path): f"CONTROL_CA {tmp_path} can't be read: is a directory",
        ("CONTROL_KEY", other_key): f"CONTROL_CERT {files['CONTROL_CERT']} does not fit CONTROL_KEY {other_key}: "
                                    "they are not of one pair",
        ("CONTROL_KEY", locked): f"CONTROL_KEY {locked}: the key is protected by a passphrase: "
                                 "releasectl needs it without one",
        ("CONTROL_CERT", text): f"CONTROL_CERT {text} or CONTROL_KEY {files['CONTROL_KEY']} is not PEM: *",
        ("CONTROL_KEY", text): f"CONTROL_CERT {files['CONTROL_CERT']} or CONTROL_KEY {text} is not PEM: *",
        ("CONTROL_CA", text): f"CONTROL_CA {text} holds no PEM certificate: *",
    }
    for (name, path), message in wrong.items():
        client = rc.AgentClient(settings_for("sqlite:///unused.db", None, MTLS_ENABLED=1, **{**files, name: path}))
        with pytest.raises(rc.ConfigError) as caught:
            client.prepare()
        told = caught.value.message
        assert told.startswith(message[:-1]) if message.endswith("*") else told == message
