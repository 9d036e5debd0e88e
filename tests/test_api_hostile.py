"""The API in a hostile network, over real sockets: every limit, hostile requests, tokens, TLS (docs/SECURITY.md).

tests/hostile holds a request a file. Its first line, "# 400 close: a title", says the statuses of
the answers, one each, and what then becomes of the connection: close (the server closes it at once),
keep (it stays), eof (the server waits for more: the client ends), none (no answer at all). Behind a
request that is to be refused most hide a second one, which would add a node.
"""
from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import io
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import (
    ADDRESSES,
    OPERATOR,
    ROOT,
    Client,
    add_nodes,
    connected,
    copy_pair,
    eventually,
    make_certs,
    new_release,
    open_connections,
    read_all,
    read_answer,
    replace_handler,
    serving,
    serving_one_node,
    split_answer,
    trusting,
)

import releasectl as rc

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HOSTILE = sorted((Path(__file__).parent / "hostile").glob("*.http"))


def drip(sock: socket.socket, data: bytes = b"x" * 1000) -> float:
    """Send a byte every few ms until the server has had enough; return how long that took."""
    start = time.monotonic()
    sock.settimeout(0.02)
    for byte in data:
        try:
            sock.send(bytes([byte]))
            if sock.recv(1, socket.MSG_PEEK) is not None:
                break
        except socket.timeout:
            continue
        except OSError:
            break
    sock.settimeout(60)
    return time.monotonic() - start


# -- hostile requests --------------------------------------------------------------------------

class Hostile(NamedTuple):
    """One file of the corpus."""
    statuses: list[int]
    end: str
    request: bytes


def read_case(path: Path) -> Hostile:
    first, _, request = path.read_bytes().partition(b"\n")
    match = re.fullmatch(r"# ([\d ]*) (close|keep|eof|none): .+", first.decode())
    assert match, f"{path.name} does not say what is expected"
    return Hostile([int(word) for word in match[1].split()], match[2], request)


class Received(io.BytesIO):
    """What came, as a socket from which answer after answer is read."""

    def makefile(self, _mode: str) -> Received:
        return self

    def close(self) -> None:
        """Stay open behind the first answer."""


def answers_in(raw: bytes) -> list[http.client.HTTPResponse]:
    """Read every answer in what came, and hold each to the envelope."""
    found, source = [], Received(raw)
    while source.tell() < len(raw):
        response = http.client.HTTPResponse(source)  # type: ignore[arg-type]
        response.begin()
        text = response.read().decode()
        assert "Traceback" not in text
        assert ("Python" in str(response.headers), response.headers["Server"]) == (False, "releasectl")
        assert set(json.loads(text)) == {"code", "message", "data"}
        found.append(response)
    return found


@pytest.fixture(scope="module")
def besieged(tmp_path_factory):
    """A server without tokens, where every hidden request that ran would leave a trace.

    Nobody gets as far as its deadlines: what is to end ends at once.
    """
    with pytest.MonkeyPatch.context() as patch, serving_one_node(tmp_path_factory.mktemp("hostile")) as client:
        for name in ("UNAUTHENTICATED_S", "HEAD_S", "BODY_S", "WRITE_S", "IDLE_S"):
            patch.setattr(rc, name, 600.0)
        yield client


def test_the_corpus_is_large():
    assert len(HOSTILE) >= 200


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_a_hostile_request_ends_in_the_envelope_or_a_close_at_once(besieged, path):
    case = read_case(path)
    with connected(besieged) as sock:
        raw = b""
        with contextlib.suppress(OSError):  # it may close before all of it was sent
            sock.sendall(case.request)
        if case.end in ("eof", "none"):
            sock.shutdown(socket.SHUT_WR)
        while chunk := sock.recv(65536):
            raw += chunk
            if case.end == "keep" and raw.count(b"HTTP/1.1 ") == len(case.statuses):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
    answers = answers_in(raw)
    assert [answer.status for answer in answers] == case.statuses
    if answers:
        assert (answers[-1].headers["Connection"] == "close") == (case.end in ("close", "eof"))
    assert besieged.store.nodes.page().total == 1, "a hidden request ran"
    assert besieged.store.releases.page().total == 0


# -- deadlines ---------------------------------------------------------------------------------

def test_who_says_nothing_is_gone_after_a_short_while_and_is_told_nothing(new_server, impatient):
    client = new_server()
    with connected(client) as sock:
        assert read_all(sock) == b""
    eventually(lambda: not open_connections(client))


def test_a_head_that_drips_is_408_at_its_deadline(new_server, impatient):
    client = new_server()
    with connected(client) as sock:
        assert drip(sock, GET[:-2] + b"X: " + b"y" * 1000) < 15
        assert split_answer(read_all(sock)) == (408, {
            "code": 4008, "message": "the request did not come in time", "data": None})


def test_a_good_token_gives_time_to_be_idle_and_the_deadline_of_a_head_stays(new_server, impatient, monkeypatch):
    monkeypatch.setattr(rc, "IDLE_S", 60.0)
    client = new_server()
    connection = client.connect()
    try:
        connection.request("GET", "/api/v1/nodes", headers=OPERATOR)
        assert read_answer(connection.getresponse()).code == 0
        time.sleep(1.5)  # longer than who has shown no token may be silent
        connection.request("GET", "/api/v1/nodes", headers=OPERATOR)
        assert read_answer(connection.getresponse()).code == 0
        assert drip(connection.sock, GET[:-2] + b"X: " + b"y" * 1000) < 15
        assert split_answer(read_all(connection.sock))[0] == 408
    finally:
        connection.close()
    eventually(lambda: not open_connections(client))


def test_an_idle_connection_with_a_token_is_gone_after_its_time(new_server, impatient):
    client = new_server()
    connection = client.connect()
    try:
        connection.request("GET", "/api/v1/nodes", headers=OPERATOR)
        assert read_answer(connection.getresponse()).code == 0
        assert read_all(connection.sock) == b""
    finally:
        connection.close()


def test_a_body_that_drips_is_408_at_its_deadline(new_server, impatient):
    client = new_server()
    with connected(client, sent=b"POST /api/v1/nodes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
                                b"Content-Type: application/json\r\nAuthorization: Bearer operator-secret\r\n\r\n"
                   ) as sock:
        assert drip(sock) < 15
        assert split_answer(read_all(sock))[0] == 408


def test_nobodys_body_is_read_without_a_good_token(new_server):
    client = new_server()
    for authorization, code in ((b"", 1001), (b"Authorization: Bearer wrong\r\n", 1002)):
        with connected(client, sent=b"POST /api/v1/nodes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
                                    + authorization + b"Expect: 100-continue\r\n\r\n") as sock:
            status, document = split_answer(read_all(sock))  # no 100 before it
            assert (status, document["code"]) == (401, code)


def test_a_client_that_does_not_read_its_answer_holds_its_thread_until_the_deadline(new_server, impatient, monkeypatch):
    client, answered = new_server(), threading.Event()

    def more_than_fits(*_: object) -> rc.Reply:
        answered.set()
        return rc.Reply(200, "x" * (64 << 20), "text/plain")

    replace_handler(monkeypatch, rc.Api.metrics, more_than_fits)
    with connected(client, sent=b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer viewer-secret\r\n"
                                b"\r\n"):
        assert answered.wait(60)
        eventually(lambda: not open_connections(client))


def test_clients_that_do_not_read_their_answers_hold_nobody_out(new_server, monkeypatch):
    client = new_server(HTTP_MAX_CONNECTIONS=4, HTTP_MAX_CONNECTIONS_PER_ADDRESS=4)
    replace_handler(monkeypatch, rc.Api.page, lambda *_: rc.Reply(200, "x" * (64 << 20), "text/html"))
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connected(client, "127.0.0.2", sent=b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        eventually(lambda: sum(
            connection.owes_answer and not connection.is_at_work for connection in open_connections(client)) == 4)
        assert eventually(lambda: healthy(client, "127.0.0.9"))


def test_a_client_that_drips_after_its_answer_holds_its_thread_until_the_deadline(new_server, impatient):
    client = new_server()
    with connected(client, sent=b"nonsense\r\n\r\n") as sock:
        assert split_answer(read_all(sock))[0] == 400
        until = time.monotonic() + 60
        while open_connections(client) and time.monotonic() < until:
            with contextlib.suppress(OSError):
                sock.send(b"x")
            time.sleep(0.01)
        assert not open_connections(client)


# -- sizes -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("request_bytes", "status"), [
    (b"GET /" + b"x" * (8192 - 16) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /" + b"x" * (8192 - 15) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    (GET[:-2] + b"".join(b"X-%d: y\r\n" % n for n in range(63)) + b"\r\n", 200),
    (GET[:-2] + b"".join(b"X-%d: y\r\n" % n for n in range(64)) + b"\r\n", 431),
    (GET[:-2] + b"X: " + b"y" * (16384 - len(GET) - 5) + b"\r\n\r\n", 200),
    (GET[:-2] + b"X: " + b"y" * (16384 - len(GET) - 2) + b"\r\n\r\n", 431),
])
def test_first_line_head_and_headers_are_taken_up_to_their_limits(besieged, request_bytes, status):
    with connected(besieged, sent=request_bytes) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert split_answer(read_all(sock))[0] == status


def test_the_limit_of_a_body_can_be_set(new_server):
    client = new_server(HTTP_MAX_BODY_BYTES=1024)
    client.token = "operator-secret"
    body = b'{"x":"' + b"y" * 1016 + b'"}'
    assert client("POST", "/api/v1/nodes", body, {"Content-Type": "application/json"}).code == 2003
    answer = client("POST", "/api/v1/nodes", b"x" * 1025)
    assert (answer.code, answer.message) == (4013, "the body is over 1024 bytes (HTTP_MAX_BODY_BYTES)")


@pytest.mark.parametrize(("depth", "code"), [(rc.MAX_JSON_DEPTH, 2003), (rc.MAX_JSON_DEPTH + 1, 2002)])
def test_json_is_taken_up_to_its_depth(besieged, depth, code):
    body = b'{"x":' * (depth - 1) + b"{}" + b"}" * (depth - 1)
    assert besieged("POST", "/api/v1/releases", body, {"Content-Type": "application/json"}).code == code


# -- how many ----------------------------------------------------------------------------------

@pytest.fixture
def hold(monkeypatch):
    """A function that makes GET /api/v1/nodes wait, until the function that it returns is called."""
    events = []
    monkeypatch.setattr(rc, "MIN_IDLE_S", 0.0)

    def hold() -> Any:
        released = threading.Event()
        events.append(released)
        list_nodes = rc.Api.list_nodes
        replace_handler(monkeypatch, list_nodes, lambda api, request: released.wait(30) and list_nodes(api, request))
        return released.set

    yield hold
    for event in events:
        event.set()


def busy(client: Client, stack: contextlib.ExitStack, source: str, count: int,
         token: bytes = b"operator-secret") -> None:
    """Make connections of an address that are all at work."""
    before = sum(connection.is_at_work for connection in open_connections(client))
    for _ in range(count):
        stack.enter_context(connected(client, source, b"GET /api/v1/nodes HTTP/1.1\r\nHost: localhost\r\n"
                                                      b"Authorization: Bearer " + token + b"\r\n\r\n"))
    eventually(lambda: sum(connection.is_at_work for connection in open_connections(client)) == before + count)


def assert_rejected(client: Client, source: str) -> None:
    with connected(client, source) as sock:  # it need not say anything to be told
        raw = read_all(sock)
    status, document = split_answer(raw)
    assert (status, document["code"]) == (503, 5003)
    assert b"\r\nRetry-After: 1\r\n" in raw


def healthy(client: Client, source: str) -> bool:
    with connected(client, source, GET) as sock:
        return sock.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_one_address_may_have_so_many_connections_at_work_and_hurts_no_other(new_server, hold):
    client = new_server(HTTP_MAX_CONNECTIONS=16, HTTP_MAX_CONNECTIONS_PER_ADDRESS=4)
    release = hold()
    with contextlib.ExitStack() as stack:
        busy(client, stack, "127.0.0.2", 4)
        assert_rejected(client, "127.0.0.2")
        assert healthy(client, "127.0.0.3")
        release()


def test_a_full_house_answers_503_at_once_and_serves_again_when_there_is_room(new_server, hold):
    client = new_server(HTTP_MAX_CONNECTIONS=4, HTTP_MAX_CONNECTIONS_PER_ADDRESS=2)
    release = hold()
    with contextlib.ExitStack() as stack:
        busy(client, stack, "127.0.0.2", 2)
        busy(client, stack, "127.0.0.3", 2, b"another-secret")
        assert_rejected(client, "127.0.0.4")
        release()
        eventually(lambda: healthy(client, "127.0.0.4"))


def test_silence_keeps_nobody_out_neither_of_its_own_address_nor_of_others(new_server, impatient, monkeypatch):
    monkeypatch.setattr(rc, "UNAUTHENTICATED_S", 30.0)
    client = new_server(HTTP_MAX_CONNECTIONS=8, HTTP_MAX_CONNECTIONS_PER_ADDRESS=5)
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(connected(client, "127.0.0.3")) for n in range(3)]
        silent = [stack.enter_context(connected(client, "127.0.0.2")) for n in range(5)]
        eventually(lambda: len(open_connections(client)) == 8)
        first = stack.enter_context(connected(client, "127.0.0.2", GET))  # takes the oldest connection of its address
        assert first.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert split_answer(read_all(silent[0]))[0] == 503
        assert client.code("GET", "/healthz") == 0  # takes the oldest connection of the address that has most
        assert split_answer(read_all(silent[1]))[0] == 503
        eventually(lambda: len(open_connections(client)) == 7)
        client.token = "viewer-secret"
        assert client.code("GET", "/api/v1/nodes") == 0
        for sock in (*others, *silent[2:]):
            sock.settimeout(0.01)
            with pytest.raises(socket.timeout):
                sock.recv(1)


def test_who_has_shown_a_token_loses_the_seat_last(new_server, impatient, monkeypatch):
    monkeypatch.setattr(rc, "UNAUTHENTICATED_S", 30.0)
    client = new_server(HTTP_MAX_CONNECTIONS=4)
    connection = client.connect()
    try:
        connection.request("GET", "/api/v1/nodes", headers=OPERATOR)
        assert read_answer(connection.getresponse()).code == 0
        eventually(lambda: not any(connection.is_at_work for connection in open_connections(client)))
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(connected(client))  # of the same address, and younger
            eventually(lambda: len(open_connections(client)) == 4)
            connection.request("GET", "/api/v1/nodes", headers=OPERATOR)
            assert read_answer(connection.getresponse()).code == 0
    finally:
        connection.close()


def test_idle_connections_with_tokens_give_way_too(new_server, impatient):
    client = new_server(HTTP_MAX_CONNECTIONS=4)
    connections = [client.connect() for _ in range(4)]
    try:
        for connection in connections:
            connection.request("GET", "/api/v1/nodes", headers=OPERATOR)
            assert read_answer(connection.getresponse()).code == 0
        eventually(lambda: not any(connection.is_at_work for connection in open_connections(client)))
        assert healthy(client, "127.0.0.2")
    finally:
        for connection in connections:
            connection.close()


def test_there_are_never_more_threads_than_connections(new_server, impatient):
    client = new_server(HTTP_MAX_CONNECTIONS=8, HTTP_MAX_CONNECTIONS_PER_ADDRESS=8)
    with contextlib.ExitStack() as stack:
        for number in range(64):
            stack.enter_context(connected(client, f"127.0.0.{2 + number % 4}"))
        assert healthy(client, "127.0.0.9")
        assert len(client.server._workers._threads) <= 8
        assert len(open_connections(client)) <= 8
    eventually(lambda: not open_connections(client))
    eventually(lambda: len(client.server._rejected) <= rc.MAX_REJECTED)


@pytest.mark.parametrize(("host", "network"), [
    ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::/64"), ("::1", "::/64")])
def test_an_address_is_ipv4_or_a_network_of_ipv6(host, network):
    assert rc.network_of(host) == network


def test_a_stop_lets_the_request_at_work_be_answered_and_ends_the_idle_ones(new_server, hold):
    client = new_server()
    release = hold()
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(connected(client))
        asked = client.connect()
        stack.callback(asked.close)
        asked.request("GET", "/api/v1/nodes", headers=OPERATOR)
        eventually(lambda: [connection.is_at_work for connection in open_connections(client)].count(True) == 1)
        client.server.shutdown()
        closing = threading.Thread(target=client.server.server_close)
        closing.start()
        assert read_all(idle) == b""
        release()
        answer = read_answer(asked.getresponse())
        closing.join(60)
        assert (answer.code, answer.headers["Connection"], closing.is_alive()) == (0, "close", False)


# -- tokens ------------------------------------------------------------------------------------

def test_bad_tokens_are_answered_late_and_one_that_was_good_at_the_same_address_at_once(new_server, monkeypatch):
    monkeypatch.setattr(rc, "FIRST_DELAY_S", 120.0)
    monkeypatch.setattr(rc, "MAX_DELAY_S", 120.0)
    client = new_server()
    for token, code in (("operator-secret", 0), *[("wrong", 1002)] * rc.FREE_ATTEMPTS):
        client.token = token
        assert client.code("GET", "/api/v1/nodes") == code
    with connected(client, sent=b"GET /api/v1/nodes HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n"
                                b"\r\n") as sock:
        sock.settimeout(0.5)
        with pytest.raises(socket.timeout):
            sock.recv(1)
        client.token = "operator-secret"
        start = time.monotonic()
        assert client.code("GET", "/api/v1/nodes") == 0
        assert time.monotonic() - start < 50
        sock.send(b"x")
        with pytest.raises(socket.timeout):
            sock.recv(1)
        sock.shutdown(socket.SHUT_WR)  # who does not wait gets no answer
        sock.settimeout(60)
        assert read_all(sock) == b""


def test_bad_tokens_are_counted_by_address_and_forgotten():
    throttle = rc.AuthThrottle()
    waits = []
    for number in range(1, 13):
        waits.append(throttle.delay_s("192.0.2.1", "x"))
        assert throttle.note_bad("192.0.2.1") == (number, number in (1, 2, 4, 8))
    assert waits[:3] == [0.0, 0.0, 0.0]
    assert waits[3:6] == [0.1, 0.2, 0.4]
    assert waits[-1] == rc.MAX_DELAY_S
    assert throttle.delay_s("192.0.2.2", "x") == 0.0
    for number in range(rc.MAX_STREAKS):
        throttle.note_bad(f"10.0.{number // 250}.{number % 250}")
    assert len(throttle._bad._seen) == rc.MAX_STREAKS
    throttle._bad._forget_s = 0.0
    assert throttle.note_bad("10.0.8.40") == (1, True)


def test_bad_tokens_are_logged_without_the_token_and_do_not_fill_the_log(new_server, caplog, monkeypatch):
    monkeypatch.setattr(rc.log, "propagate", True)
    monkeypatch.setattr(rc, "FIRST_DELAY_S", 0.0)
    caplog.set_level(logging.DEBUG)
    client = new_server()
    client.token = "hunter2"
    for _ in range(9):
        assert client.code("GET", "/api/v1/nodes") == 1002
    found = [record.getMessage() for record in caplog.records if "bad token" in record.getMessage()]
    assert len(found) == 4  # the 1st, 2nd, 4th and 8th
    assert re.fullmatch(r"bad token from 127\.0\.0\.1 \(8 in a row\), request [0-9a-f]{16}", found[-1])
    assert "hunter2" not in caplog.text


def test_healthz_is_answered_whatever_token_comes_with_it(new_server):
    client = new_server()
    client.token = "wrong"
    assert client.code("GET", "/healthz") == 0


@pytest.mark.parametrize(("mode", "is_taken"), [(0o600, True), (0o640, True), (0o400, True), (0o660, False),
                                                (0o604, False), (0o602, False), (0o644, False), (0o777, False)])
def test_a_file_of_tokens_or_a_key_is_refused_that_others_can_read_or_any_but_the_owner_write(tmp_path, mode, is_taken):
    path = tmp_path / "file"
    path.write_text("")
    path.chmod(mode)
    if is_taken:
        rc.require_private("HTTP_KEY", str(path))
        return
    with pytest.raises(rc.ConfigError, match="chmod o-rwx,g-w"):
        rc.require_private("HTTP_KEY", str(path))


def test_a_key_that_others_can_read_stops_the_start(new_server, certs, tmp_path):
    pair = copy_pair(certs, tmp_path)
    os.chmod(pair["HTTP_KEY"], 0o644)
    with pytest.raises(rc.ConfigError, match="HTTP_KEY .* is open to others"):
        new_server(**pair)


# -- safe to repeat ----------------------------------------------------------------------------

@pytest.fixture
def three_nodes(client):
    """Three nodes in the client's database."""
    return add_nodes(client.store, 3)


def post(client: Client, key: str, body: Any = None) -> Any:
    return client("POST", "/api/v1/releases", {"reason": "x"} if body is None else body,
                  {"Content-Type": "application/json", "Idempotency-Key": key})


def test_the_same_key_and_body_give_the_first_answer_again(client, three_nodes):
    first, again = post(client, "k1"), post(client, "k1")
    assert (first.status, first.data) == (201, again.data)
    assert (again.status, client.store.releases.page().total) == (201, 1)
    assert post(client, "k1", b'{ "reason" :\t"x"}').data == first.data  # the same JSON, written otherwise
    assert post(client, "k2").data["releaseId"] == 2


def test_the_first_answer_holds_when_nodes_were_added_and_the_release_has_ended(client, three_nodes):
    first = post(client, "k1")
    add_nodes(client.store, 1, first=4)
    client.ok("POST", "/api/v1/releases/1/cancel")
    assert post(client, "k1").data == first.data


def test_another_body_under_the_same_key_is_3002_and_creates_nothing(client, three_nodes):
    post(client, "k1")
    answer = post(client, "k1", {"reason": "y"})
    assert (answer.status, answer.code, "release 1" in answer.message) == (409, 3002, True)
    assert client.store.releases.page().total == 1


def test_a_request_that_failed_may_be_repeated_with_its_key(client, three_nodes):
    for number in (1, 2, 3):
        client.store.nodes.update(number, {"enabled": 0})
    assert post(client, "k1").code == 3003
    client.store.nodes.update(1, {"enabled": 1})
    assert post(client, "k1").data["totalNodes"] == 1


def test_a_key_is_kept_for_a_day(client, three_nodes):
    post(client, "k1")
    with client.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE idempotency_keys SET created_at = ?", rc.utc_text(time.time() - rc.IDEMPOTENCY_KEY_S + 60))
    assert post(client, "k1").data["releaseId"] == 1
    with client.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE idempotency_keys SET created_at = ?", rc.utc_text(time.time() - rc.IDEMPOTENCY_KEY_S - 1))
    assert post(client, "k1").data["releaseId"] == 2
    with client.store.database.transaction() as tx:
        assert tx.value("SELECT COUNT(*) FROM idempotency_keys") == 1


def test_a_key_holds_across_processes_and_among_requests_of_one_moment(database_url, open_store):
    stores = [open_store(database_url) for _ in range(4)]
    add_nodes(stores[0], 2)
    once = rc.IdempotencyKey("oskar", "k1", "0" * 64)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: stores[n % 4].releases.create(rc.ReleaseRequest(), "oskar", once), range(8)))
    assert {one.release.id for one in made} == {1}
    assert all(one.batches == [[1], [2]] for one in made)
    assert stores[0].releases.create(rc.ReleaseRequest(), "vera", once._replace(actor="vera"))[0].id == 2


@pytest.mark.parametrize("key", ["", "a b", "x" * 129, "\xe9", "a\tb"])
def test_a_key_is_1_to_128_printable_characters(besieged, key):
    answer = besieged("POST", "/api/v1/releases", {}, {"Content-Type": "application/json", "Idempotency-Key": key})
    assert (answer.code, "Idempotency-Key" in answer.message) == (2003, True)


def test_a_release_and_the_list_have_etags_and_304_for_who_has_them(client, three_nodes):
    new_release(client.store)
    for path in ("/api/v1/releases/1", "/api/v1/releases/1?view=summary", "/api/v1/releases",
                 "/api/v1/releases?status=pending"):
        first = client("GET", path)
        etag = first.headers["ETag"]
        assert re.fullmatch(r'"[0-9a-f]{32}"', etag)
        for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
            again = client("GET", path, headers={"If-None-Match": known})
            assert (again.status, again.text, again.headers["ETag"]) == (304, "", etag)
        assert client("GET", path, headers={"If-None-Match": '"x"'}).status == 200
        client.store.releases.act("pause", 1, "test")
        assert client("GET", path, headers={"If-None-Match": etag}).status == 200
        client.store.releases.act("resume", 1, "test")


def test_a_request_id_is_taken_over_or_made_and_stands_in_answer_and_log(client, three_nodes, caplog, monkeypatch):
    monkeypatch.setattr(rc.log, "propagate", True)
    caplog.set_level(logging.INFO)
    new_release(client.store)
    answer = client("POST", "/api/v1/releases/1/pause", headers={"X-Request-Id": "abc-1.2_Z"})
    assert answer.headers["X-Request-Id"] == "abc-1.2_Z"
    eventually(lambda: "POST /api/v1/releases/1/pause: 200, by api at 127.0.0.1, request abc-1.2_Z" in caplog.text)
    for bad in ("", "a b", "x" * 65, "a\xe9", "<script>"):
        assert re.fullmatch("[0-9a-f]{16}", client("GET", "/nowhere", headers={"X-Request-Id": bad}
                                                   ).headers["X-Request-Id"])


# -- waiting for events ------------------------------------------------------------------------

def test_who_waits_for_events_gets_them_also_those_of_another_process(client, three_nodes, database_url, open_store):
    new_release(client.store)
    other = open_store(database_url)
    answers: list[Any] = []
    path = "/api/v1/releases/1/events?after=1&wait=30"
    waiting = threading.Thread(target=lambda: answers.append(client.ok("GET", path)))
    waiting.start()
    eventually(lambda: any(connection.owes_answer for connection in open_connections(client)))
    other.releases.act("pause", 1, "somebody")
    waiting.join(60)
    assert [event["event"] for event in answers[0]["items"]] == ["paused"]


def test_the_wait_for_events_ends_with_nothing_when_its_time_is_over(client, three_nodes):
    new_release(client.store)
    start = time.monotonic()
    assert client.ok("GET", "/api/v1/releases/1/events?after=1&wait=1")["items"] == []
    assert time.monotonic() - start >= 1
    assert len(client.ok("GET", "/api/v1/releases/1/events?wait=30")["items"]) == 1  # there is one: at once
    assert client.code("GET", "/api/v1/releases/1/events?wait=31") == 2003
    assert client.code("GET", "/api/v1/releases/9/events?wait=30") == 3001


def test_only_so_many_may_wait_for_events_and_the_next_is_answered_at_once(client, three_nodes):
    new_release(client.store)
    client.server.api._waiters = threading.BoundedSemaphore(2)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connected(client, sent=b"GET /api/v1/releases/1/events?after=1&wait=30 HTTP/1.1\r\n"
                                                       b"Host: localhost\r\n\r\n"))
        eventually(lambda: sum(connection.owes_answer for connection in open_connections(client)) == 2)
        eventually(lambda: client.server.api._waiters._value == 0)
        assert client.ok("GET", "/api/v1/releases/1/events?after=1&wait=30")["items"] == []
    eventually(lambda: client.server.api._waiters._value == 2, message="who hung up is waited with")


def test_a_stop_ends_the_wait_for_events(store):
    add_nodes(store, 1)
    new_release(store)
    with serving(store) as client, connected(
            client, sent=b"GET /api/v1/releases/1/events?after=1&wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n") as sock:
        eventually(lambda: any(connection.owes_answer for connection in open_connections(client)))
        client.server.shutdown()
        client.server.server_close()
        assert split_answer(read_all(sock))[0] == 200


# -- TLS ---------------------------------------------------------------------------------------

def serial_of(client: Client) -> Any:
    with connected(client) as plain, client.context.wrap_socket(plain, server_hostname=ADDRESSES[0]) as sock:
        return sock.getpeercert()["serialNumber"]


def test_a_handshake_that_stops_is_gone_at_its_deadline_and_holds_up_nobody(new_server, impatient, certs, tmp_path):
    client = new_server(**copy_pair(certs, tmp_path))
    client.context = trusting(certs)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(connected(client, "127.0.0.2", b"\x16\x03\x01\x02\0\x01"[:n])) for n in range(6)]
        assert client.code("GET", "/healthz") == 0
        for sock in stalled:
            read_all(sock)
        dripping = stack.enter_context(connected(client, "127.0.0.2"))
        assert drip(dripping, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\0" * 500) < 15
    eventually(lambda: not open_connections(client))


def test_a_renewed_certificate_is_taken_and_nobody_is_dropped(new_server, certs, tmp_path):
    client = new_server(**copy_pair(certs, tmp_path))
    client.context = trusting(certs)
    first = serial_of(client)
    kept = client.connect()
    try:
        kept.request("GET", "/healthz")
        assert read_answer(kept.getresponse()).code == 0
        (tmp_path / "api.crt").write_text("half written")
        assert serial_of(client) == first
        renewed = make_certs(tmp_path / "renewed", ADDRESSES[0])
        copy_pair(renewed, tmp_path)
        client.context = trusting(renewed)
        assert serial_of(client) != first
        assert client.code("GET", "/healthz") == 0
        kept.request("GET", "/healthz")
        assert read_answer(kept.getresponse()).code == 0
    finally:
        kept.close()


def test_a_client_certificate_names_the_actor_and_the_token_gives_the_role(new_server, certs, tmp_path):
    client = new_server(**copy_pair(certs, tmp_path), HTTP_CLIENT_CA=f"{certs}/ca.crt")
    client.context = trusting(certs, f"{certs}/control.crt", f"{certs}/control.key")
    add_nodes(client.store, 1)
    assert client.code("GET", "/api/v1/nodes") == 1001
    client.token = "viewer-secret"
    answer = client("POST", "/api/v1/releases", {})
    name = next(value for part in certificate(certs)["subject"] for key, value in part if key == "commonName")
    assert (answer.code, answer.message.split()[0]) == (1004, f"cert:{name.split()[0]}")
    client.token = "operator-secret"
    client.ok("POST", "/api/v1/releases", {}, 201)
    assert client.store.releases.events(1)[0].actor == f"cert:{name}"


def certificate(certs: Path) -> Any:
    return ssl._ssl._test_decode_cert(f"{certs}/control.crt")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("version", "ciphers"), [
    (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"), (ssl.TLSVersion.TLSv1_2, "AES128-SHA:AES256-GCM-SHA384:@SECLEVEL=0"),
    (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES128-SHA:ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0")])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_versions_and_weak_suites_of_tls_are_refused(new_server, certs, tmp_path, version, ciphers):
    client = new_server(**copy_pair(certs, tmp_path))
    context = trusting(certs)
    context.set_ciphers(ciphers)
    context.minimum_version = context.maximum_version = version
    with connected(client) as plain, pytest.raises(ssl.SSLError), \
            context.wrap_socket(plain, server_hostname=ADDRESSES[0]):
        pass


@pytest.mark.slow
def test_a_tls_scanner_finds_nothing_below_1_2_and_no_weak_suite(new_server, certs, tmp_path):
    sslyze = shutil.which("sslyze") or shutil.which("sslyze", path=os.path.dirname(sys.executable))
    if not sslyze:
        pytest.skip("left out: sslyze (make fuzz runs it)")
    assert sslyze
    client = new_server(**copy_pair(certs, tmp_path))
    report = tmp_path / "report.json"
    host, port = client.address
    subprocess.run([sslyze, f"--json_out={report}", f"{host}:{port}"], check=False, timeout=120,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = json.loads(report.read_text())["server_scan_results"][0]["scan_result"]
    suites = {name[:7]: [suite["cipher_suite"]["name"] for suite in found["result"]["accepted_cipher_suites"]]
              for name, found in result.items() if name.endswith("_cipher_suites")}
    assert [name for name, accepted in suites.items() if accepted] == ["tls_1_2", "tls_1_3"]
    assert all(re.fullmatch("TLS_ECDHE_(RSA|ECDSA)_WITH_(AES_(128|256)_GCM|CHACHA20_POLY1305).*", name)
               for name in suites["tls_1_2"])
    assert not result["heartbleed"]["result"]["is_vulnerable_to_heartbleed"]
    assert not result["openssl_ccs_injection"]["result"]["is_vulnerable_to_ccs_injection"]
    assert not result["session_renegotiation"]["result"]["is_vulnerable_to_client_renegotiation_dos"]
    assert not result["tls_compression"]["result"]["supports_compression"]
    assert result["tls_fallback_scsv"]["result"]["supports_fallback_scsv"]
    assert "SUCCESSFUL" in result["robot"]["result"]["robot_result"] or \
        "NOT_VULNERABLE" in result["robot"]["result"]["robot_result"]


# -- /openapi.json ------------------------------------------------------------------------------

def test_openapi_tells_statuses_headers_and_security_of_every_route(besieged):
    document = besieged("GET", "/openapi.json").data
    for route in rc.ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        statuses = set(operation["responses"])
        assert {"400", "405", "408", "413", "414", "431", "500", "501", "503", "505", str(route.status)} <= statuses
        assert ("401" in statuses, "403" in statuses) == (bool(route.role), bool(route.role))
        assert operation["security"] == ([{"token": []}] if route.role else [])
        assert {p["name"] for p in operation["parameters"] if p["in"] == "header"} == {"X-Request-Id", *route.headers}
        assert ("304" in statuses) == ("If-None-Match" in route.headers)
    answers = document["components"]["responses"]
    assert {"Retry-After", "X-Request-Id"} == set(answers["503"]["headers"])
    assert "Allow" in answers["405"]["headers"]
    assert set(document["components"]["securitySchemes"]) == {"token"}


# -- the flood ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_flood_of_one_address_keeps_nobody_else_out(tmp_path):
    """scripts/flood.py prints the figures (docs/TESTING.md); here none may be turned away."""
    result = subprocess.run([sys.executable, str(ROOT / "scripts" / "flood.py"), "--seconds", "6", "--json"],
                            capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["requests"] > 100
    assert figures["failures"] == []
    assert figures["threads"] <= 128 + 8
    assert figures["attackers_left"] == 0
    assert figures["p99_ms"] < 1000  # generous: the machine may be busy; the figure is for docs/TESTING.md

