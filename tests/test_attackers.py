"""What an attacker with a viewer's token, without one, or on another site can't do: docs/SECURITY.md, on sockets."""
from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
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

import pytest
from lab import (
    ADDRESSES,
    FOREVER_MS,
    OPERATOR,
    ROOT,
    Cli,
    Client,
    Peer,
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
    server_context,
    serving,
    settings_for,
    sha256,
    split_answer,
    statuses,
    trusting,
)

import releasectl as rc


def request(method: str, path: str, token: str = "", *headers: str) -> bytes:
    """Return a request's head."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    lines += [f"Authorization: Bearer {token}"] if token else []
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.fixture
def logged(told):
    """A function that returns what was logged."""
    return lambda: [record.getMessage() for record in told.records]


# -- names, labels, numbers (item 12) --------------------------------------------------------------

DECEIVING = {"zero width": "edge\u200b1", "bidi": "\u202eedge", "soft hyphen": "ed\u00adge", "Hangul filler": "a\u3164",
             "variation selector": "a\ufe0f", "Cyrillic in Latin": "\u0435dge", "Greek in Latin": "\u03bfpen",
             "decomposed": "e\u0301", "control": "a\x07", "line": "a\u2028b", "no-break space": "a\u00a0b",
             "space before": " a", "blank Braille": "\u2800", "private use": "edge\ue000", "unassigned": "edge\u0378",
             "empty note head": "a\U0001d159", "Khitan filler": "a\U00016fe4",
             "Cyrillic behind a mark": "pa\u0335\u0443", "full width": "\uff45dge", "mathematical": "\U0001d41edge",
             "ligature": "e\ufb01", "Roman numeral": "edge-\u2160", "full-width digit": "edge-\uff11",
             "hyphen": "edge\u20101", "minus": "edge\u22121", "dot": "edge\u20241", "Lisu in Latin": "edge\ua4f2",
             "Coptic in Latin": "n\u2c9fde"}
HONEST = ["edge-1", "\u8fb9\u7f18\u8282\u70b9", "Z\u00fcrich", "\u0441\u0435\u0440\u0432\u0435\u0440-web1", "10\u00b5s",
          "a b", "\u65e5\u672c A", "\u4e0a\u6d77\uff08\u4e00\u671f\uff09", "10 m\u00b2",
          "\u0915\u093f\u0924\u093e\u092c", "q\u0307"]


@pytest.mark.parametrize("text", DECEIVING.values(), ids=DECEIVING)
def test_names_and_labels_that_look_like_others_are_refused(text):
    for fields in ({"name": text}, {"labels": {text: "x"}}, {"labels": {"x": text}}):
        with pytest.raises(rc.AppError) as refused:
            rc.parse_node_fields(fields)
        assert (refused.value.code, rc.PLAIN_TEXT in refused.value.message) == (2003, True)
        assert len(refused.value.message) <= rc.MAX_MESSAGE_CHARS


@pytest.mark.parametrize("text", HONEST)
def test_names_and_labels_of_any_script_are_taken(text):
    assert rc.parse_node_fields({"name": text, "labels": {text: text}})["name"] == text


@pytest.mark.parametrize(("labels", "words"), [
    ({f"k{n}": "" for n in range(65)}, "at most 64"), ({"k" * 64: ""}, "1 to 63"), ({"": "x"}, "1 to 63"),
    ({"k": "v" * 256}, "at most 255")])
def test_labels_have_limits(new_server, labels, words):
    client = new_server()
    client.token = "operator-secret"
    answer = client("POST", "/api/v1/nodes", {"name": "edge-1", "mainIp": "10.0.0.1", "labels": labels})
    assert (answer.code, words in answer.message) == (2003, True)


def test_labels_are_taken_up_to_their_limits(new_server):
    client = new_server()
    client.token = "operator-secret"
    labels = {f"{n:063}": "v" * 255 for n in range(64)}
    assert client.ok("POST", "/api/v1/nodes", {"name": "edge-1", "mainIp": "10.0.0.1", "labels": labels},
                     201)["labels"] == labels


def test_long_numbers_are_refused_before_they_are_read_on_every_python():
    """As Python 3.9 does it, which has no limit of its own."""
    code = ("import time, releasectl as rc; started = time.process_time()\n"
            "try: rc.parse_json(b'{\"x\":' + b'9' * (1 << 20) + b'}')\n"
            "except ValueError as error: print(error)\n"
            "print(time.process_time() - started < 1)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONINTMAXSTRDIGITS": "0"})
    assert result.stdout.splitlines()[1:] == ["True"]
    assert f"at most {rc.MAX_INTEGER_DIGITS} digits" in result.stdout
    assert rc.parse_json("9" * rc.MAX_INTEGER_DIGITS) == int("9" * rc.MAX_INTEGER_DIGITS)


# -- in the clear (item 15) ------------------------------------------------------------------------

def test_tokens_over_plain_http_beyond_loopback_stop_the_start(tmp_path):
    cli = Cli(tmp_path)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"vera:viewer:{sha256('x')}\n")
    tokens.chmod(0o600)
    cli.settings.update(API_TOKENS_FILE=str(tokens), HTTP_ADDR="0.0.0.0:0", MTLS_ENABLED="0")
    for command in ("serve", "check"):
        result = cli(command)
        assert (result.code, "HTTP_PLAIN=1 behind a proxy that does TLS" in result.err + result.out) == (2, True)


def test_plain_http_beyond_loopback_is_warned_of_where_it_is_meant(new_server, logged):
    new_server(HTTP_ADDR="0.0.0.0:0", HTTP_PLAIN=1)
    assert [line for line in logged() if "HTTP_PLAIN=1" in line and "can read the tokens" in line]


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.0.1.9:0", "[::1]:0"])
def test_loopback_needs_no_switch_and_no_warning(new_server, logged, address):
    new_server(HTTP_ADDR=address)
    assert not [line for line in logged() if "HTTP_PLAIN" in line]


@pytest.fixture
def open_house(open_store, sqlite_url):
    """A client of a server without tokens."""
    with serving(open_store(sqlite_url)) as client:
        yield client


@pytest.mark.parametrize("header", [
    {"Forwarded": "for=192.0.2.1"}, {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-Proto": "https"},
    {"X-Real-IP": "192.0.2.1"}, {"Via": "1.1 squid"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://evil.example"}, {"Host": "evil.example"}], ids=str)
def test_without_tokens_nothing_is_served_that_a_proxy_or_another_page_sent(open_house, header):
    for method, path in (("GET", "/api/v1/releases"), ("POST", "/api/v1/releases"), ("GET", "/metrics")):
        assert open_house(method, path, headers=header).code == 1004
    assert open_house("GET", "/healthz", headers=header).code == 0


@pytest.mark.parametrize("header", [
    {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {"Host": "LOCALHOST"},
    {"Host": "LocalHost:8080", "Origin": "http://localhost:8080"}], ids=str)
def test_without_tokens_ones_own_page_is_served(open_house, header):
    assert open_house("GET", "/api/v1/releases", headers=header).code == 0


def test_with_tokens_a_proxy_may_be_before_it(new_server):
    client = new_server()
    client.token = "viewer-secret"
    assert client("GET", "/api/v1/nodes", headers={"X-Forwarded-For": "192.0.2.1", "Via": "1.1 nginx"}).code == 0


def test_readyz_tells_strangers_no_more_than_no_and_the_log_why(new_server, logged, tmp_path):
    client = new_server()
    (tmp_path / "test.db").rename(tmp_path / "gone.db")
    answer = eventually(lambda: (a := client("GET", "/readyz")).code == 5002 and a)
    assert (answer.status, answer.message) == (503, "not ready: the log of releasectl says why")
    client.token = "wrong"
    assert client("GET", "/readyz").message == answer.message
    client.token = "viewer-secret"
    assert str(tmp_path) in client("GET", "/readyz").message
    time.sleep(rc.READY_CHECK_EVERY_S)
    client("GET", "/readyz")
    told = [line for line in logged() if line.startswith("not ready: ")]
    assert (len(told), str(tmp_path) in told[0]) == (1, True)
    (tmp_path / "gone.db").rename(tmp_path / "test.db")
    eventually(lambda: client("GET", "/readyz").code == 0 and "ready again" in logged())


def test_without_tokens_readyz_tells_no_proxy_why(open_house, tmp_path):
    (tmp_path / "test.db").rename(tmp_path / "gone.db")
    assert eventually(lambda: str(tmp_path) in open_house("GET", "/readyz").message)
    assert "the log" in open_house("GET", "/readyz", headers={"X-Forwarded-For": "192.0.2.1"}).message


def test_who_hangs_up_learns_nothing_and_gains_nothing(new_server, monkeypatch):
    """Else one would hang up on whatever is not answered at once, and try the next token."""
    monkeypatch.setattr(rc, "FIRST_DELAY_S", 2.0)
    client = new_server()
    client.token = "wrong"
    for _ in range(rc.FREE_ATTEMPTS):
        assert client.code("GET", "/api/v1/nodes") == 1002
    for token in ("wrong", "operator-secret", "wrong", "operator-secret"):
        with connected(client, sent=request("GET", "/api/v1/nodes", token)) as sock:
            sock.settimeout(0.1)
            with pytest.raises(socket.timeout):  # a good one is not told from a bad one by the time that it takes
                sock.recv(1)
    eventually(lambda: not open_connections(client))
    assert client.server.throttle.delay_s("127.0.0.1", "x") == rc.MAX_DELAY_S  # the bad ones counted
    client.token, started = "operator-secret", time.monotonic()
    assert client.code("GET", "/api/v1/nodes") == 0
    assert 1.5 < time.monotonic() - started < 30
    started = time.monotonic()
    assert client.code("GET", "/api/v1/nodes") == 0  # from now on it does not wait for others' bad ones
    assert time.monotonic() - started < 1.5


def test_bad_tokens_at_the_same_time_wait_for_each_other(new_server, monkeypatch):
    monkeypatch.setattr(rc, "MAX_DELAY_S", 0.8)
    client = new_server()
    client.token, started = "wrong", time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: client.code("GET", "/api/v1/nodes"), range(16))) == {1002}
    assert time.monotonic() - started > 0.7


@pytest.mark.parametrize(("first", "same", "network", "other"), [
    ("192.0.2.1", "192.0.2.1", "192.0.2.200", "192.0.3.1"),
    ("2001:db8:0:1::1", "2001:db8:0:1:2::9", "2001:db8:0:ffff::1", "2001:db8:1::1")])
def test_bad_tokens_are_counted_by_address_and_by_network(first, same, network, other):
    throttle = rc.AuthThrottle()
    first, same, network, other = map(rc.network_of, (first, same, network, other))
    for _ in range(rc.FREE_ATTEMPTS):
        throttle.note_bad(first)
    assert (throttle.delay_s(same, "x"), throttle.delay_s(network, "x")) == (rc.FIRST_DELAY_S, 0.0)
    for _ in range(rc.FREE_ATTEMPTS_OF_NETWORK):
        throttle.note_bad(first)
    assert throttle.delay_s(network, "x") > 0
    assert throttle.delay_s(other, "x") == 0.0
    throttle.note_good(network, "x")
    assert (throttle.delay_s(network, "x"), throttle.delay_s(network, "y") > 0) == (0.0, True)


def test_bad_tokens_from_many_addresses_of_a_network_do_not_fill_the_log():
    throttle = rc.AuthThrottle()
    told = [throttle.note_bad(f"192.0.2.{number}")[1] for number in range(250)]
    assert told.count(True) <= rc.FREE_ATTEMPTS_OF_NETWORK + 4


def test_refused_requests_of_one_token_are_not_a_log_line_each(new_server, logged):
    client = new_server()
    client.token = "viewer-secret"
    for _ in range(20):
        assert client.code("POST", "/api/v1/releases", {}) == 1004
    lines = [line for line in logged() if "POST /api/v1/releases: 403, by vera" in line]
    assert len(lines) == 5
    assert lines[-1].endswith(", the 16. in a row")


# -- connections (item 10) -----------------------------------------------------------------------

def acts(client: Client, source: str = "127.0.0.1") -> int:
    """Cancel a release that is not there, as an operator; return the status: 404 is the good one."""
    with connected(client, source, request("POST", "/api/v1/releases/1/cancel", "operator-secret",
                                           "Connection: close")) as sock:
        return split_answer(read_all(sock))[0]


def test_the_role_and_the_route_are_looked_at_before_the_body(new_server):
    client = new_server()
    json_body = ("Content-Type: application/json", "Content-Length: 9", "Expect: 100-continue")
    for method, path, token, status in (
            ("POST", "/api/v1/nodes", "viewer-secret", 403), ("GET", "/api/v1/releases", "viewer-secret", 400),
            ("POST", "/api/v1/nowhere", "operator-secret", 404), ("POST", "/healthz", "", 405)):
        with connected(client, sent=request(method, path, token, *json_body)) as sock:
            assert split_answer(read_all(sock))[0] == status  # without a 100 before it
    with connected(client, sent=request("POST", "/api/v1/nodes", "operator-secret", "Content-Length: 9")) as sock:
        assert split_answer(read_all(sock))[0] == 415


def test_a_refused_body_that_came_with_its_head_leaves_the_connection(new_server):
    client = new_server()
    post = request("POST", "/api/v1/nodes", "viewer-secret", "Content-Type: application/json", "Content-Length: 2")
    with connected(client, sent=(post + b"{}") * 2 + request("GET", "/healthz", "", "Connection: close")) as sock:
        raw = read_all(sock)
    assert [raw.count(f"HTTP/1.1 {status} ".encode()) for status in (403, 200)] == [2, 1]


def stands_still(client: Client) -> bool:
    """Return whether no connection came or went for half a second: an attack is where it wants to be."""
    before = set(open_connections(client))
    time.sleep(0.5)
    return open_connections(client) == before


@pytest.mark.parametrize("sources", [["127.0.0.1"], ["127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"]])
def test_bodies_that_never_come_hold_no_operator_out(new_server, sources):
    client = new_server()
    with contextlib.ExitStack() as stack:
        for source in sources * 32:
            stack.enter_context(connected(client, source, request(
                "POST", "/api/v1/nodes", "operator-secret", "Content-Type: application/json", "Content-Length: 9")))
        eventually(lambda: stands_still(client))
        assert [acts(client) for _ in range(8)] == [404] * 8
        client.token = ""
        assert client.code("GET", "/healthz") == 0


def test_a_slow_body_is_read_where_nobody_needs_the_place(new_server):
    client = new_server()
    body = b'{"name":"edge-1","mainIp":"10.0.0.1"}'
    with connected(client, sent=request("POST", "/api/v1/nodes", "operator-secret", "Content-Type: application/json",
                                        f"Content-Length: {len(body)}", "Connection: close")) as sock:
        for byte in body:
            sock.sendall(bytes([byte]))
            time.sleep(0.02)
        assert split_answer(read_all(sock))[0] == 201


def test_who_waits_for_events_holds_no_operator_out(new_server):
    client = new_server(HTTP_MAX_CONNECTIONS=16, HTTP_MAX_CONNECTIONS_PER_ADDRESS=4)
    add_nodes(client.store, 1)
    new_release(client.store)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connected(client, sent=request(
                "GET", "/api/v1/releases/1/events?after=1&wait=30", "operator-secret")))
        eventually(lambda: stands_still(client))
        client.token = "operator-secret"
        assert client.code("GET", "/api/v1/nodes") == 0


@pytest.fixture
def hold(monkeypatch):
    """A function that makes GET /api/v1/nodes wait, busy, until the test is over."""
    over = threading.Event()
    yield lambda: replace_handler(monkeypatch, rc.Api.list_nodes,
                                  lambda *_: over.wait(30) and rc.Reply(200, None))
    over.set()


def at_work(client: Client) -> int:
    return sum(connection.is_at_work for connection in open_connections(client))


def test_a_viewers_token_has_a_quarter_of_the_seats_and_half_of_an_address(new_server, hold):
    client = new_server(HTTP_MAX_CONNECTIONS=32, HTTP_MAX_CONNECTIONS_PER_ADDRESS=8)
    hold()
    with contextlib.ExitStack() as stack:
        for source, most in (("127.0.0.1", 4), ("127.0.0.2", 8), ("127.0.0.3", 8)):
            sockets = [stack.enter_context(connected(client, source, request("GET", "/api/v1/nodes", "viewer-secret")))
                       for _ in range(8)]
            eventually(lambda most=most: at_work(client) == most)
            refused = [sock for sock in sockets if rc.has_hung_up(sock, 1.5 if sock is sockets[0] else 0.2)]
            assert len(refused) >= 4
            raw = read_all(refused[0])
            assert (split_answer(raw)[0], b"\r\nRetry-After: 1\r\n" in raw) == (429, True)
            assert acts(client, source) == 404
        assert at_work(client) == 8


def test_idle_connections_of_a_token_give_way_to_its_own_next_one(new_server, monkeypatch):
    monkeypatch.setattr(rc, "MIN_IDLE_S", 0.0)
    client = new_server(HTTP_MAX_CONNECTIONS=32, HTTP_MAX_CONNECTIONS_PER_ADDRESS=32)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(connected(client, sent=request("GET", "/api/v1/nodes", "viewer-secret")))
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert len([connection for connection in open_connections(client) if connection.token == "vera"]) <= 8


def large_release(client: Client) -> None:
    """A release of more nodes than are read freely, that is under way."""
    for number in range(rc.MAX_FREE_READ_NODES + 1):
        client.store.nodes.add(f"n{number}", f"10.0.{number // 250}.{number % 250 + 1}")
    new_release(client.store)


def test_few_wait_for_their_turn_to_read_a_whole_release_and_operators_go_first(new_server, monkeypatch):
    client = new_server()
    large_release(client)
    reads = client.server.api._whole_reads
    assert reads.acquire(rc.Request((), {}, {}, "", role=rc.VIEWER))
    read: list[tuple[str, int]] = []
    taken: list[str] = []
    acquire = reads.acquire
    monkeypatch.setattr(reads, "acquire", lambda request: acquire(request) and not taken.append(request.role))

    def reader(token: str, source: str) -> None:
        with connected(client, source, request("GET", "/api/v1/releases/1", token, "Connection: close")) as sock:
            read.append((token, split_answer(read_all(sock))[0]))

    threads = [threading.Thread(target=reader, args=("viewer-secret", f"127.0.0.{n}")) for n in range(2, 12)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(read) == 10 - rc.MAX_WHOLE_READ_QUEUE)
    assert set(read) == {("viewer-secret", 429)}
    assert at_work(client) <= rc.MAX_WHOLE_READ_QUEUE
    operator = threading.Thread(target=reader, args=("operator-secret", "127.0.0.1"))
    operator.start()
    eventually(lambda: reads._waiting[rc.OPERATOR] == 1)
    reads.release(0.2)
    for thread in (*threads, operator):
        thread.join(60)
    assert [status for _, status in read] == [429] * 6 + [200] * 5
    assert taken == [rc.OPERATOR] + [rc.VIEWER] * 4


def test_the_rest_after_a_whole_reading_holds_for_who_hangs_up(new_server, monkeypatch):
    client = new_server()
    large_release(client)
    monkeypatch.setattr(rc, "WHOLE_READ_REST", 10**6)
    monkeypatch.setattr(rc, "MAX_WHOLE_READ_REST_S", 3.0)
    client.server.api._is_busy = lambda: True
    client.token, started = "viewer-secret", time.monotonic()
    assert client.code("GET", "/api/v1/releases/1") == 0
    assert time.monotonic() - started < 2.7  # who reads is answered at once
    assert client.code("GET", "/api/v1/releases/1") == 0
    assert time.monotonic() - started > 2.7  # the next one waits


# -- revocation (item 14) --------------------------------------------------------------------------

class Authority:
    """A CA with a CRL, as openssl keeps it."""

    def __init__(self, certs: Path, folder: Path):
        self.certs, self.folder = certs, folder
        folder.mkdir()
        (folder / "index").touch()
        (folder / "number").write_text("01\n")
        (folder / "cnf").write_text(
            f"[ca]\ndefault_ca=d\n[d]\ndatabase={folder}/index\ncrlnumber={folder}/number\n"
            f"certificate={certs}/ca.crt\nprivate_key={certs}/ca.key\ndefault_md=sha256\n")
        self.file = folder / "ca+crl.pem"

    def openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)

    def revoke(self, certificate: str) -> None:
        self.openssl("ca", "-config", f"{self.folder}/cnf", "-revoke", f"{self.certs}/{certificate}")

    def publish(self, hours: int = 48) -> str:
        """Write the CA with a CRL; return the file."""
        self.openssl("ca", "-config", f"{self.folder}/cnf", "-gencrl", "-crlhours", str(hours), "-out",
                     f"{self.folder}/crl.pem")
        text = (self.certs / "ca.crt").read_text() + (self.folder / "crl.pem").read_text()
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)
        return str(self.file)


@pytest.fixture
def authority(tmp_path):
    """An authority of its own, that made a control certificate, and one for each of two agents."""
    return Authority(make_certs(tmp_path / "pki", *ADDRESSES[:2]), tmp_path / "authority")


@pytest.fixture
def api(new_server, authority, tmp_path):
    """A client with a certificate, of a server that demands one and has a CRL without it."""
    client = new_server(**copy_pair(authority.certs, tmp_path), HTTP_CLIENT_CA=authority.publish())
    client.context = trusting(authority.certs, f"{authority.certs}/control.crt", f"{authority.certs}/control.key")
    client.token = "operator-secret"
    return client


def test_a_revoked_client_certificate_is_refused_and_its_kept_connection_ends(api, authority):
    kept = api.connect()
    try:
        kept.request("GET", "/api/v1/nodes", headers=OPERATOR)
        assert read_answer(kept.getresponse()).code == 0
        authority.revoke("control.crt")
        authority.publish()
        kept.request("POST", "/api/v1/releases/1/cancel", b"{}", {**OPERATOR, "Content-Type": "application/json"})
        answer = read_answer(kept.getresponse())
        assert (answer.status, answer.code, answer.headers["Connection"]) == (503, 5003, "close")
    finally:
        kept.close()
    with pytest.raises(ssl.SSLError, match="(?i)revoked"):
        api.code("GET", "/api/v1/nodes")


def test_another_ca_ends_what_the_one_before_let_in(api, authority, tmp_path):
    kept = api.connect()
    try:
        kept.request("GET", "/api/v1/nodes", headers=OPERATOR)
        assert read_answer(kept.getresponse()).code == 0
        other = make_certs(tmp_path / "other", ADDRESSES[0])
        shutil.copy(other / "ca.crt", authority.file)
        kept.request("GET", "/api/v1/nodes", headers=OPERATOR)
        assert read_answer(kept.getresponse()).code == 5003
    finally:
        kept.close()


def test_a_new_crl_is_taken_while_the_certificate_in_use_has_expired(api, authority, monkeypatch):
    monkeypatch.setattr(rc, "certificate_times", lambda _pem: [(0.0, 1.0)])
    authority.revoke("control.crt")
    authority.publish()
    with pytest.raises(ssl.SSLError, match="(?i)revoked"):
        api.code("GET", "/api/v1/nodes")


@pytest.mark.parametrize("fault", ["open to others", "half renewed"])
def test_a_new_crl_is_taken_while_the_pair_as_it_is_now_cant_be_used(api, authority, tmp_path, fault):
    key = tmp_path / "api.key"
    assert api.code("GET", "/api/v1/nodes") == 0
    if fault == "half renewed":
        shutil.copy(authority.certs / "control.key", key)
    else:
        os.chmod(key, 0o644)
    assert api.code("GET", "/api/v1/nodes") == 0
    authority.revoke("control.crt")
    authority.publish()
    with pytest.raises(ssl.SSLError, match="(?i)revoked"):
        api.code("GET", "/api/v1/nodes")


def test_a_crl_that_is_only_renewed_asks_to_connect_again(api, authority):
    assert api.code("GET", "/api/v1/nodes") == 0
    authority.publish()
    assert api.code("GET", "/api/v1/nodes") == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_crl_that_expires_ends_what_it_let_in_and_no_session_outlives_it(api, authority, monkeypatch, version):
    api.context.maximum_version = version
    sock = api.context.wrap_socket(socket.create_connection(api.address), server_hostname=ADDRESSES[0])
    with sock:
        for _ in range(2):  # the second answer comes after TLS 1.3's tickets
            sock.sendall(request("GET", "/api/v1/nodes", "operator-secret"))
            assert b" 200 " in sock.recv(65536)
        session, now = sock.session, time.time()
        monkeypatch.setattr(rc.time, "time", lambda: now + 49 * 3600)
        sock.sendall(request("GET", "/api/v1/nodes", "operator-secret"))
        assert b"5003" in sock.recv(65536)
    resumed = api.context.wrap_socket(socket.create_connection(api.address), server_hostname=ADDRESSES[0],
                                      session=session)
    with resumed:
        assert resumed.session_reused
        resumed.sendall(request("GET", "/api/v1/nodes", "operator-secret"))
        assert b"5003" in resumed.recv(65536)


def test_the_crl_of_another_ca_that_expires_refuses_nobody(authority, tmp_path):
    pki, both = tmp_path / "other-pki", tmp_path / "both.pem"
    pki.mkdir()
    authority.openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
                      "/CN=other", "-keyout", f"{pki}/ca.key", "-out", f"{pki}/ca.crt")
    crls = authority.publish(48), Authority(pki, tmp_path / "other").publish(1)
    both.write_text("".join(Path(crl).read_text() for crl in crls))
    ends = [rc.crl_end_of(ssl.PEM_cert_to_DER_cert(certificate.read_text()), str(both), "") - time.time()
            for certificate in (authority.certs / "control.crt", pki / "ca.crt")]
    assert [round(end / 3600) for end in ends] == [48, 1]


def test_a_client_certificate_that_expires_ends_its_kept_connection(api, monkeypatch):
    monkeypatch.setattr(rc, "certificate_end", lambda _certificate: time.time() - 1)
    assert api.code("GET", "/api/v1/nodes") == 5003


@pytest.mark.parametrize("what", ["token", "file"])
def test_a_kept_connection_whose_token_is_gone_ends(new_server, tmp_path, what):
    client = new_server()
    kept = client.connect()
    try:
        kept.request("GET", "/api/v1/nodes", headers=OPERATOR)
        assert read_answer(kept.getresponse()).code == 0
        if what == "token":
            (tmp_path / "tokens").write_text(f"vera:viewer:{sha256('viewer-secret')}\n")
        else:
            (tmp_path / "tokens").unlink()
        kept.request("POST", "/api/v1/nodes", b"{}", {**OPERATOR, "Content-Type": "application/json"})
        answer = read_answer(kept.getresponse())
        assert (answer.code, answer.headers["Connection"]) == (1002 if what == "token" else 5001, "close")
    finally:
        kept.close()


def test_who_waits_for_events_is_told_nothing_once_the_token_is_gone(new_server, tmp_path):
    client = new_server()
    add_nodes(client.store, 1)
    new_release(client.store)
    with connected(client, sent=request("GET", "/api/v1/releases/1/events?after=1&wait=30", "viewer-secret")) as sock:
        eventually(lambda: client.server.api._waiters._value < client.server.api._waiters._initial_value)
        (tmp_path / "tokens").write_text("")
        status, document = split_answer(sock.recv(65536))
        assert (status, document["data"]["items"]) == (200, [])


def test_an_agent_whose_certificate_is_revoked_gets_nothing(sqlite_world, authority, new_fleet, monkeypatch):
    """The agents' certificates are the authority's own."""
    from fake_agent import AgentSpec, Fleet
    fleet = Fleet(authority.certs, [AgentSpec(address, 0, "tasks") for address in ADDRESSES[:2]], task_ms=20).start()
    try:
        for number, address in enumerate(ADDRESSES[:2], 1):
            sqlite_world.store.nodes.add(f"edge-{number}", address, fleet.agent(address).port)
        authority.revoke(f"agents/{ADDRESSES[1]}.crt")
        sqlite_world.certs = authority.certs
        new_release(sqlite_world.store)
        sqlite_world.drain(CONTROL_CA=authority.publish(), AGENT_RETRIES=0)
        nodes = sqlite_world.store.releases.with_nodes(1)[1]
        assert [(node.status, node.error_kind) for node in nodes] == [("success", ""), ("failed", "tls")]
        assert "presented a certificate that was revoked" in nodes[1].error_msg
        assert [len(fleet.agent(address).runs) for address in ADDRESSES[:2]] == [1, 0]
    finally:
        fleet.stop()


@pytest.fixture
def nibbled(certs):
    """An agent whose every answer comes as chunks of one byte; it gives the moments at which it was asked."""
    asked_at: list[float] = []

    def talk(peer: Peer, sock: socket.socket) -> None:
        while True:
            peer.read_request(sock)
            head, body = peer.requests[-1]
            task_id = json.loads(body)["taskId"] if body else head.split()[1].rpartition("/")[2]
            asked_at.append(time.monotonic())
            status = "success" if len(asked_at) > 4 else "running"
            answer = json.dumps({"code": 0, "data": {"taskId": task_id, "status": status}}).encode()
            sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 19_000
                         + b"%x\r\n%s\r\n0\r\n\r\n" % (len(answer), answer))

    peer = Peer(talk, server_context(certs), ADDRESSES[19])
    yield peer, asked_at
    peer.stop()


@pytest.mark.slow
def test_an_agent_whose_answers_are_dear_is_asked_less_often_and_others_as_ever(sqlite_world, nibbled, monkeypatch):
    monkeypatch.setattr(rc, "ANSWER_CREDIT_S", 0.0)
    monkeypatch.setattr(rc, "ANSWER_SHARE", 0.02)
    peer, asked_at = nibbled
    world = sqlite_world.nodes(1, task_ms=FOREVER_MS)
    world.store.nodes.add("dear", peer.host, peer.port)
    new_release(world.store, strategy={"batches": [2]})
    drain = threading.Thread(target=lambda: world.drain(RELEASE_EXECUTOR_INTERVAL_SEC="0.1"))
    drain.start()
    eventually(lambda: len(asked_at) > 4)
    assert world.agent(1).queries > 2 * len(asked_at)
    world.finish()
    drain.join(60)
    assert statuses(world.store, 1) == ["success", "success"]
    # after the dispatch and the look that follows it at once, 10 ms of CPU at the very least for each
    assert min(later - before for before, later in zip(asked_at[1:], asked_at[2:])) > 0.01 / rc.ANSWER_SHARE


def test_the_name_of_an_agent_is_never_its_common_name(authority):
    context = rc.client_context(f"{authority.certs}/control.crt", f"{authority.certs}/control.key",
                                f"{authority.certs}/ca.crt")
    assert not context.hostname_checks_common_name


def test_the_name_of_a_database_server_is_never_its_common_name(authority):
    ca = f"{authority.certs}/ca.crt"
    context = rc.pg8000_tls({"sslmode": "verify-full", "sslrootcert": ca})
    assert (context.check_hostname, context.hostname_checks_common_name) == (True, False)


def test_every_context_that_verifies_a_name_goes_by_alternative_names_alone():
    """The kind: each function that makes a client's context settles it, or verifies no name."""
    source = (ROOT / "releasectl.py").read_text()
    texts = dict(re.findall(r"^ *def (\w+)(.*?)(?=^\S|^    def |\Z)", source, re.DOTALL | re.MULTILINE))
    made = {name: text for name, text in texts.items() if re.search("PROTOCOL_TLS_CLIENT|create_default_context", text)}
    assert {"client_context", "pg8000_tls"} <= set(made)
    for name, text in made.items():
        assert "verify_no_common_name(" in text or "check_hostname = False" in text, name


def findings(settings: rc.Settings) -> dict[str, rc.Finding]:
    return {finding.subject: finding for finding in (*rc.check_agents(settings), *rc.check_api(settings))}


@functools.lru_cache(maxsize=1)
def process_state(settings: rc.Settings) -> rc.ProcessState:
    store, agents = rc.Store(rc.Database(settings.database_url)), rc.AgentClient(settings)
    return rc.ProcessState(settings, rc.Executor(settings, store, agents, store.database.metrics))


def health(settings: rc.Settings) -> dict[str, dict]:
    """Return what /api/v1/health of one process tells of certificates and CRLs."""
    return {entry["name"]: entry for entry in process_state(settings)()["certificates"]}


def test_check_metrics_and_health_tell_how_long_a_crl_is_good(authority, tmp_path):
    pair = copy_pair(authority.certs, tmp_path)
    crl = authority.publish()
    settings = settings_for("sqlite:///x.db", authority.certs, CONTROL_CA=crl, HTTP_CLIENT_CA=crl, **pair)
    for name in ("CONTROL_CA", "HTTP_CLIENT_CA"):
        figure = rc.certificate_figures(settings)["releasectl_certificate_expiry_timestamp_seconds", f"{name}_CRL"]
        assert 47 * 3600 < figure - time.time() <= 48 * 3600
        finding = findings(settings)[f"{name} CRL"]
        assert (finding.exit_code, "holds 1 CRL, good until" in finding.text) == (0, True)
        assert 1.9 < health(settings)[f"{name} CRL"]["daysLeft"] <= 2
    authority.openssl(
        "ca", "-config", f"{authority.folder}/cnf", "-gencrl", "-crl_lastupdate", "20200101000000Z",
        "-crl_nextupdate", "20200102000000Z", "-out", f"{authority.folder}/old.pem")
    authority.file.write_text((authority.certs / "ca.crt").read_text() + (authority.folder / "old.pem").read_text())
    finding = findings(settings)["CONTROL_CA CRL"]
    assert (finding.exit_code, "expired since 2020-01-02" in finding.text) == (2, True)
    seen = health(settings)["CONTROL_CA CRL"]
    assert (seen["notAfter"], seen["daysLeft"]) == (None, None)
    assert seen["message"].startswith("expired since 2020-01-02")
    authority.file.write_text((authority.certs / "ca.crt").read_text())
    assert set(health(settings)) == {"CONTROL_CERT", "HTTP_CERT"}


def test_health_tells_at_once_of_a_key_that_is_gone_or_back_and_looks_at_none_that_stayed(authority, tmp_path,
                                                                                          monkeypatch):
    settings = settings_for("sqlite:///x.db", authority.certs, **copy_pair(authority.certs, tmp_path))
    handshakes, of_control = [], rc.control_certificate
    monkeypatch.setattr(rc, "control_certificate", lambda of: handshakes.append(of) or of_control(of))
    key, ends = Path(settings.control_key), health(settings)["CONTROL_CERT"]["notAfter"]
    assert ends == health(settings)["CONTROL_CERT"]["notAfter"]
    assert len(handshakes) == 1
    kept = key.rename(f"{key}.kept")
    gone = health(settings)["CONTROL_CERT"]
    assert (gone["notAfter"], gone["message"]) == (None, "run `releasectl check` to see why")
    kept.rename(key)
    assert health(settings)["CONTROL_CERT"]["notAfter"] == ends


def other_ca(folder: Path) -> str:
    """Return a CA of another name."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-subj", "/CN=another", "-keyout", f"{folder}/other.key", "-out", f"{folder}/other.crt"],
                   check=True, capture_output=True)
    return (folder / "other.crt").read_text()


def test_a_ca_without_a_crl_beside_one_that_has_it_is_told(authority):
    crl = authority.publish()
    with open(crl, "a") as file:
        file.write(other_ca(authority.folder))
    assert "1 of its CAs have none" in next(rc.check_crl("CONTROL_CA", crl)).text
    assert rc.cas_without_crl(Path(crl).read_text()) == 1
    pair = f"{authority.certs}/control.crt", f"{authority.certs}/control.key"
    both = ssl.VERIFY_CRL_CHECK_CHAIN
    assert rc.client_context(*pair, crl).verify_flags & both == ssl.VERIFY_CRL_CHECK_LEAF
    assert rc.client_context(*pair, authority.publish()).verify_flags & both == both
    assert not rc.client_context(*pair, f"{authority.certs}/ca.crt").verify_flags & both


@pytest.mark.parametrize("harm", ["truncated", "nonsense", "not base64"])
def test_a_crl_that_is_broken_is_told_and_never_a_traceback(authority, harm):
    crl = Path(authority.publish())
    text = crl.read_text()
    crl.write_text({"truncated": text[:-200] + "\n-----END X509 CRL-----\n", "not base64": text.replace("M", "!"),
                    "nonsense": text + "-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n"}[harm])
    assert list(rc.check_crl("CONTROL_CA", str(crl)))[0].exit_code == 2
    with pytest.raises(rc.ConfigError):
        rc.client_context(f"{authority.certs}/control.crt", f"{authority.certs}/control.key", str(crl))


def test_with_a_crl_of_every_ca_a_revoked_intermediate_is_refused(tmp_path):
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=tmp_path)

    def issue(name: str, issuer: str, extensions: str) -> None:
        (tmp_path / "ext").write_text(extensions)
        openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signer = ["-signkey", "root.key"] if name == issuer else ["-CA", f"{issuer}.crt", "-CAkey", f"{issuer}.key",
                                                                  "-CAcreateserial"]
        openssl("x509", "-req", "-in", f"{name}.csr", *signer, "-days", "9", "-extfile", "ext", "-out", f"{name}.crt")

    def crl(issuer: str, revoked: str = "") -> str:
        (tmp_path / "index").write_text("")
        (tmp_path / "cnf").write_text(f"[ca]\ndefault_ca=d\n[d]\ndatabase=index\ncertificate={issuer}.crt\n"
                                      f"private_key={issuer}.key\ndefault_md=sha256\ndefault_crl_days=9\n")
        if revoked:
            openssl("ca", "-config", "cnf", "-revoke", f"{revoked}.crt")
        openssl("ca", "-config", "cnf", "-gencrl", "-out", "crl")
        return (tmp_path / "crl").read_text()

    issue("root", "root", "basicConstraints=critical,CA:TRUE")
    issue("between", "root", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign")
    issue("agent", "between", "subjectAltName=DNS:agent.test")
    cas = "".join((tmp_path / f"{name}.crt").read_text() for name in ("root", "between"))
    agent = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    agent.load_cert_chain(tmp_path / "agent.crt", tmp_path / "agent.key")
    for crls, is_good in ((crl("between"), True), (crl("between") + crl("root"), True),
                          (crl("between") + crl("root", "between"), False), (crl("between", "agent"), False)):
        (tmp_path / "ca.pem").write_text(cas + crls)
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        ours.check_hostname = False
        rc.load_ca(ours, str(tmp_path / "ca.pem"), "CONTROL_CA")
        with contextlib.nullcontext() if is_good else pytest.raises(ssl.SSLError, match="(?i)revoked"):
            rc._meet(ours, agent)


def test_a_header_that_cant_be_read_is_told_without_its_value(new_server):  # noqa: F811
    with socket.create_connection(new_server().address, 5) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer S3cr3t\x01\r\n\r\n")
        answer = sock.recv(4096)
    assert (b" 400 " in answer, b"Authorization" in answer, b"S3cr3t" in answer) == (True, True, False)
