"""What an agent says, and what is asked of a node beside its agent: words, ping, check, verify, certificates.

Each test is a way in which a node was called well, or a success, by an answer that says nothing of the kind.
"""
from __future__ import annotations

import contextlib
import datetime
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import on_sqlite
from lab import (
    ADDRESSES,
    FOREVER_MS,
    HOST,
    SITES,
    Cli,
    Peer,
    WaitingClient,
    accepted,
    add_nodes,
    beside,
    envelope,
    eventually,
    executed,
    findings,
    free_port,
    misfit,
    mtls,
    new_release,
    our_files,
    outcomes,
    reply,
    says,
    serving,
    settings_for,
    statuses,
    task,
)

import releasectl as rc


def details(store: rc.Store, release: rc.Release, event: str) -> list[str]:
    return [e.detail for e in store.releases.events(release.id) if e.event == event]


# -- the agent's words -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", ["tasks", "execute"])
@pytest.mark.parametrize("text", ["   ", "\t\r\n", "\u200b\u2028"])
def test_section_1_an_agent_that_fails_with_blanks_is_told_to_have_given_no_reason(sqlite_world, protocol, text):
    sqlite_world.nodes(1, protocol)
    sqlite_world.agent(1).set(outcome="failed", message=text)
    release = new_release(sqlite_world.store, payload=SITES)
    sqlite_world.drain()
    assert outcomes(sqlite_world.store, release) == [("failed", "agent_failed", "the agent gave no reason")]
    assert sqlite_world.store.releases.get(release.id).error_msg.endswith("edge-1: the agent gave no reason")


def test_section_1_a_refusal_with_blanks_is_told_to_have_given_no_reason(sqlite_world):
    sqlite_world.nodes(1)
    sqlite_world.agent(1).set(mode="code", business_code=4001, message=" \u200b ")
    release = new_release(sqlite_world.store)
    sqlite_world.drain()
    (status, kind, message), = outcomes(sqlite_world.store, release)
    assert (status, kind) == ("failed", "rejected")
    assert message.endswith("refused: no reason given (code 4001)")


def release_to(sqlite_world, peer: Peer, protocol: str, **fields) -> rc.Release:
    """Make a release to a node whose agent is a peer, with the id that the peer's answers have."""
    sqlite_world.store.nodes.add("edge-1", peer.host, peer.port, protocol)
    return new_release(sqlite_world.store, payload=SITES, strategy={"retries": 0}, **fields)


@pytest.mark.parametrize(("status", "word"), [("queued", '"queued"'), ("Success", '"Success"'), (None, "null"),
                                              (True, "true"), ("x" * 300, '"' + "x" * 56 + "...")])
@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_section_1_a_status_that_nobody_knows_is_told_with_that_word(sqlite_world, new_peer, protocol, status, word):
    def talk(peer: Peer, sock: socket.socket) -> None:
        while True:
            peer.read_request(sock)
            head, body = peer.requests[-1]
            if head.startswith("GET"):
                sock.sendall(task(status, head.split()[1].split("/")[-1]))
            else:
                sent = json.loads(body)
                sock.sendall(accepted(sent["taskId"]) if protocol == "tasks" else
                             executed(status, "done", sent["requestId"]))

    release = release_to(sqlite_world, new_peer(talk), protocol)
    sqlite_world.drain()
    (found, kind, message), = outcomes(sqlite_world.store, release)
    assert (found, kind) == ("failed", "protocol")
    assert f"gives the unknown status {word}" in message


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_section_1_what_an_agent_says_beside_its_success_is_kept_for_people(sqlite_world, new_peer, protocol):
    def talk(peer: Peer, sock: socket.socket) -> None:
        while True:
            peer.read_request(sock)
            head, body = peer.requests[-1]
            if head.startswith("GET"):
                sock.sendall(task("success", head.split()[1].split("/")[-1], lastError="applied, 3 warnings"))
            else:
                sent = json.loads(body)
                sock.sendall(accepted(sent["taskId"]) if protocol == "tasks" else
                             executed("success", "applied, 3 warnings", sent["requestId"]))

    release = release_to(sqlite_world, new_peer(talk), protocol)
    sqlite_world.drain()
    assert sqlite_world.store.releases.get(release.id).status == "success"
    assert details(sqlite_world.store, release, "succeeded") == ["applied, 3 warnings"]


# -- ping and check ------------------------------------------------------------------------------------------------

def pings(cli: Cli) -> dict[str, tuple[bool, str, str]]:
    result = cli("node", "ping", "--json")
    found = {item["name"]: (item["ok"], item["errorKind"], item["message"]) for item in result.json["items"]}
    assert result.code == (0 if all(ok for ok, _, _ in found.values()) else 69)
    return found


def checked(cli: Cli) -> dict[str, tuple[bool, str]]:
    """Return what check finds of the nodes; those that are well it only counts."""
    result = cli("check", "--json")
    found = {name[5:]: what for name, what in findings(result).items() if name.startswith("node ")}
    assert result.code == (0 if all(ok for ok, _ in found.values()) else 69)
    return found


@pytest.mark.parametrize(("speaks", "node_is"), [("tasks", "execute"), ("execute", "tasks")])
def test_section_1_ping_and_check_know_an_agent_of_the_other_dialect(cli, sqlite_world, speaks, node_is):
    sqlite_world.nodes(2, speaks)
    cli.settings.update(mtls(sqlite_world.certs), DATABASE_URL=sqlite_world.url)
    sqlite_world.store.nodes.update(2, {"agent_protocol": node_is})
    first = pings(cli)["edge-1"]
    assert (first[0], f" {speaks} agent in" in first[-1]) == (True, True)
    assert "edge-1" not in checked(cli)  # which counts those that are well
    for found in (pings(cli), checked(cli)):
        ok, *_, message = found["edge-2"]
        assert (ok, f"is no {node_is} agent: it answered HTTP 404" in message) == (False, True), message
        assert message.endswith("(wrong --protocol or --port?)")
    assert pings(cli)["edge-2"][1] == "protocol"
    assert sqlite_world.runs() == [0, 0]
    assert [sqlite_world.agent(number).applied_version for number in (1, 2)] == [0, 0]


OTHERS = {
    "a plain web server": reply(b"<html>It works!</html>", "200 OK", "Content-Type: text/html\r\n"),
    "a web server without that page": reply(b"<h1>Not Found</h1>", "404 Not Found", "Content-Type: text/html\r\n"),
    "another service with JSON": reply({"detail": "Not Found"}, "404 Not Found"),
    "one with a code that is a text": reply({"code": "404", "message": "not found"}, "404 Not Found"),
    "one that finds everything": reply(envelope({"taskId": "releasectl-ping", "status": "running"})),
    "a list": reply([], "404 Not Found"),
    "nothing in it": reply(b"", "404 Not Found"),
    "one that wants a token": reply(envelope(None, 1001, "no token"), "401 Unauthorized"),
    "a redirect": reply(b"", "301 Moved Permanently", "Location: /elsewhere\r\n"),
    "a bad request of another kind": reply(envelope(None, 2002, "malformed"), "400 Bad Request"),
}


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
@pytest.mark.parametrize("what", OTHERS)
def test_section_1_ping_takes_no_other_service_for_an_agent(new_peer, certs, protocol, what):
    peer = new_peer(says(OTHERS[what]))
    node = rc.Node(1, "edge-1", peer.host, peer.port, protocol, "{}", 1, "online", "", "")
    ping, = rc.ping_nodes(settings_for("sqlite:///unused.db", certs), [node])
    assert (ping.is_ok, ping.error_kind) == (False, "protocol"), ping
    assert f"is no {protocol} agent" in ping.text
    (head, body), = peer.requests
    assert (head.split("\r\n")[0], body) == (
        ("GET /tasks/releasectl-ping HTTP/1.1", b"") if protocol == "tasks" else
        ("POST /agent/v1/tasks/execute HTTP/1.1", b"{}"))


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_section_1_ping_does_not_say_what_a_broken_server_is(new_peer, certs, protocol):
    peer = new_peer(says(reply(envelope(None, 5001, "internal"), "500 Internal Server Error")))
    node = rc.Node(1, "edge-1", peer.host, peer.port, protocol, "{}", 1, "online", "", "")
    ping, = rc.ping_nodes(settings_for("sqlite:///unused.db", certs), [node])
    assert (ping.is_ok, ping.error_kind) == (False, "http"), ping
    assert ping.text.endswith("answered HTTP 500: internal")


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_section_1_ping_tells_plain_http_from_tls_in_both_directions(cli, sqlite_world, new_peer, protocol):
    sqlite_world.nodes(1, protocol)
    cli.settings.update(mtls(sqlite_world.certs), DATABASE_URL=sqlite_world.url)
    status, code = ("400 Bad Request", 2001) if protocol == "execute" else ("404 Not Found", 3001)

    def talk(_peer: Peer, sock: socket.socket) -> None:
        is_tls = sock.recv(65536).startswith(b"\x16")
        sock.sendall(reply(b"", "400 Bad Request") if is_tls else reply(envelope(None, code, "plain"), status))

    plain = new_peer(talk, tls=False, host=ADDRESSES[1])
    sqlite_world.store.nodes.add("edge-2", plain.host, plain.port, protocol)
    for found in (pings(cli), checked(cli)):  # TLS to plain
        assert found.get("edge-1", (True,))[0]
        assert (found["edge-2"][0], found["edge-2"][-1].endswith("does not speak TLS on this port")) == (False, True)
    cli.settings = {"DATABASE_URL": sqlite_world.url, "MTLS_ENABLED": "0"}
    for found in (pings(cli), checked(cli)):  # plain to TLS
        assert (found["edge-1"][0], found.get("edge-2", (True,))[0]) == (False, True), found
        assert found["edge-1"][-1].startswith(f"agent {HOST}:")


def test_section_1_plain_http_to_an_agent_that_answers_it_in_words_is_no_agent_either(new_peer):
    """What Go's server says to plain HTTP on its TLS port."""
    peer = new_peer(says(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"),
                    tls=False)
    for protocol in rc.PROTOCOLS:
        node = rc.Node(1, "edge-1", peer.host, peer.port, protocol, "{}", 1, "online", "", "")
        ping, = rc.ping_nodes(settings_for("sqlite:///unused.db"), [node])
        assert (ping.is_ok, ping.error_kind) == (False, "protocol")
        assert "HTTP 400, Client sent an HTTP request to an HTTPS server." in ping.text


@pytest.mark.parametrize(("speaks", "node_is"), [("tasks", "execute"), ("execute", "tasks")])
def test_section_1_a_release_to_the_wrong_dialect_asks_whether_the_protocol_is_wrong(sqlite_world, speaks, node_is):
    sqlite_world.nodes(1, speaks)
    sqlite_world.store.nodes.update(1, {"agent_protocol": node_is})
    release = new_release(sqlite_world.store, payload=SITES)
    sqlite_world.drain()
    (status, kind, message), = outcomes(sqlite_world.store, release)
    assert (status, kind) == ("failed", "rejected")
    assert message.endswith("answered HTTP 404: 404 page not found (wrong --protocol?)")
    assert "(wrong --protocol?)" in sqlite_world.store.releases.get(release.id).error_msg


# -- verify ---------------------------------------------------------------------------------------------------------

class Sites:
    """Web servers on the nodes' addresses, one port, that tell what was asked for, and by which name in TLS."""

    def __init__(self, certs: Path):
        self.certs = certs
        self.servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []
        self.port = 0
        self.body, self.status, self.chunked = b"hello", 200, False
        # address, Host header, path, name in the handshake
        self.asked: list[tuple[str, str, str, str | None]] = []
        self.cookies: list[str | None] = []

    def serve(self, *addresses: str, tls: bool = False, port: int = 0) -> Sites:
        sites = self

        class Site(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                name = getattr(self.connection, "name_asked_for", None)
                sites.asked.append((self.server.server_address[0], self.headers["Host"], self.path, name))
                sites.cookies.append(self.headers["Authorization"] or self.headers["Cookie"])
                self.send_response(sites.status)
                if sites.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for byte in sites.body:
                        self.wfile.write(b"1\r\n%c\r\n" % byte)
                    self.wfile.write(b"0\r\n\r\n")
                    return
                self.send_header("Content-Length", str(len(sites.body)))
                self.end_headers()
                self.wfile.write(sites.body)

            def log_message(self, *_: object) -> None:
                pass

        if not port:
            port = self.port = self.port or free_port(*addresses)
        for address in addresses:
            server = ThreadingHTTPServer((address, port), Site)
            if tls:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*(f"{self.certs}/other/agents/{HOST}.{end}" for end in ("crt", "key")))

                def note(sock: Any, name: str | None, _context: ssl.SSLContext) -> None:
                    sock.name_asked_for = name

                context.sni_callback = note
                server.socket = context.wrap_socket(server.socket, server_side=True)
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            self.servers.append((server, thread))
        return self

    def stop(self) -> None:
        for server, thread in self.servers:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def sites(certs):
    sites = Sites(certs)
    yield sites
    sites.stop()


def verified(world, sites: Sites, scheme: str = "http", url: str = "", **verify) -> rc.Release:
    """Run a release with a probe to its end."""
    url = url or f"{scheme}://{{main_ip}}:{sites.port}/health?n={{name}}"
    release = new_release(world.store, strategy={"retries": 0, "verify": {"url": url, **verify}})
    world.drain()
    return world.store.releases.get(release.id)


def test_section_7_verify_asks_each_node_for_the_site_by_its_host_header(world, sites):
    world.nodes(2)
    sites.serve(*ADDRESSES[:2])
    assert verified(world, sites, host="www.example.com").status == "success"
    assert sorted(sites.asked) == [(address, "www.example.com", f"/health?n=edge-{n}", None)
                                   for n, address in enumerate(ADDRESSES[:2], 1)]
    assert sites.cookies == [None, None]


def test_section_7_verify_names_the_site_in_tls_too(sqlite_world, sites):
    sqlite_world.nodes(2)
    sites.serve(*ADDRESSES[:2], tls=True)
    assert verified(sqlite_world, sites, "https", host="www.example.com").status == "success"
    assert sorted(sites.asked) == [(address, "www.example.com", f"/health?n=edge-{n}", "www.example.com")
                                   for n, address in enumerate(ADDRESSES[:2], 1)]


def test_section_7_without_a_host_verify_asks_for_what_stands_in_the_url(sqlite_world, sites):
    sqlite_world.nodes(1)
    sites.serve(HOST, tls=True)
    assert verified(sqlite_world, sites, "https").status == "success"
    assert verified(sqlite_world, sites, url=f"https://{{name}}:{sites.port}/").status == "success"
    assert sites.asked == [(HOST, f"{HOST}:{sites.port}", "/health?n=edge-1", None),
                           (HOST, f"edge-1:{sites.port}", "/", "edge-1")]


def test_section_7_verify_goes_to_the_nodes_own_address_and_the_urls_port_whatever_the_names_say(sqlite_world, sites):
    sqlite_world.nodes(1)
    sites.serve(HOST)
    elsewhere = Sites(sites.certs)
    try:
        # what the names would lead to, if anybody looked them up
        elsewhere.serve(ADDRESSES[8], port=sites.port)
        elsewhere.serve(ADDRESSES[8], HOST)
        sqlite_world.store.nodes.update(1, {"name": ADDRESSES[8]})
        for url in (f"http://{{name}}:{sites.port}/", f"http://{{main_ip}}:{sites.port}/"):
            assert verified(sqlite_world, sites, url=url, host=ADDRESSES[8]).status == "success"
        assert verified(sqlite_world, sites, url=f"http://{{name}}:{sites.port}/").status == "success"
        assert [(address, host.split(":")[0]) for address, host, _, _ in sites.asked] == [(HOST, ADDRESSES[8])] * 3
        assert elsewhere.asked == []
    finally:
        elsewhere.stop()


def test_section_7_verify_follows_no_redirect_to_where_an_answer_points(sqlite_world, sites):
    sqlite_world.nodes(1)
    sites.serve(HOST)
    sites.status = 301
    release = verified(sqlite_world, sites, host="www.example.com")
    assert (release.status, "answered HTTP 301 instead of 200" in release.error_msg) == ("failed", True)
    assert len(sites.asked) == 1


@pytest.mark.parametrize("chunked", [False, True], ids=["in one piece", "in chunks"])
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_section_7_verify_wants_the_text_in_the_answer(sqlite_world, sites, tls, chunked):
    sqlite_world.nodes(1)
    sites.serve(HOST, tls=tls)
    sites.body, sites.chunked = "<p>Grüße, build 7</p>".encode(), chunked
    scheme = "https" if tls else "http"
    assert verified(sqlite_world, sites, scheme, contains="Grüße, build 7").status == "success"
    release = verified(sqlite_world, sites, scheme, contains="build 8")
    (status, kind, message), = outcomes(sqlite_world.store, release)
    assert (status, kind) == ("failed", "verify")
    assert "answered without 'build 8' in it" in message
    sites.status = 500  # the text alone is not enough
    assert verified(sqlite_world, sites, scheme, contains="build 7").status == "failed"


def test_section_7_the_text_is_wanted_again_at_the_end_of_the_soak(sqlite_world, sites):
    sqlite_world.nodes(2)
    sites.serve(*ADDRESSES[:2])
    sites.body = b"build 7"
    release = new_release(sqlite_world.store, strategy={"retries": 0, "soakSec": 1, "verify": {
        "url": f"http://{{main_ip}}:{sites.port}/", "contains": "build 7"}})
    with beside(sqlite_world.drain):
        eventually(lambda: statuses(sqlite_world.store, release.id) == ["success", "pending"])
        sites.body = b"build 6"  # somebody turned it back
    assert [found[:2] for found in outcomes(sqlite_world.store, release)] == [("failed", "verify"), ("skipped", "")]


def test_section_7_an_answer_that_never_ends_is_not_read_for_ever(sqlite_world, new_peer):
    sqlite_world.nodes(1)
    peer = new_peer(says(b"HTTP/1.1 200 OK\r\n\r\nbuild 7", forever=b"x" * 65536), tls=False)
    release = new_release(sqlite_world.store, strategy={"retries": 0, "verify": {
        "url": f"http://{{main_ip}}:{peer.port}/", "contains": "build 7", "timeoutSec": 10}})
    sqlite_world.drain()
    assert outcomes(sqlite_world.store, release)[0][:2] == ("failed", "verify")
    assert "answered more than 1024 KiB" in outcomes(sqlite_world.store, release)[0][2]


@on_sqlite
@pytest.mark.parametrize("verify", [
    *({"host": host} for host in ("www.example.com:81", "a b", "a..b", ".a", "a.", "-a", "[::1]", "::1", "a/b", "a\n",
                                  "a\r\nX: y", "a@b", "www.exämple.com", "a" * 254, 7, None, ["a"])),
    *({"contains": text} for text in (7, None, ["a"], "x" * 501)),
    {"Host": "a"}, {"content": "a"}, {"headers": {}},
])
def test_section_7_a_site_or_text_that_can_not_be_meant_is_refused_by_name(store, verify):
    add_nodes(store, 1)
    key, = verify
    with pytest.raises(rc.AppError, match=key) as refused:
        new_release(store, strategy={"verify": {"url": "http://{main_ip}/", **verify}})
    assert refused.value.code == 2003
    assert store.releases.page().total == 0


@pytest.mark.parametrize("host", ["www.example.com", "WWW.Example.COM", "a", "_dmarc.example.com", "10.0.0.7",
                                  "xn--exmple-cua.com", "a-b.c"])
def test_section_7_every_name_of_a_site_is_taken(host):
    assert rc.parse_strategy({"verify": {"url": "http://{main_ip}/", "host": host}}).verify.host == host


def test_section_7_the_command_line_takes_the_site_and_the_text(cli, sqlite_world, sites):
    sqlite_world.nodes(1)
    sites.serve(HOST)
    cli.settings.update(mtls(sqlite_world.certs), DATABASE_URL=sqlite_world.url)
    url = f"http://{{main_ip}}:{sites.port}/"
    cli.ok("create", "--verify-url", url, "--verify-host", "www.example.com", "--verify-contains", "hello")
    assert rc.parse_json(sqlite_world.store.releases.get(1).strategy) == {
        "verify": {"url": url, "host": "www.example.com", "contains": "hello"}}
    cli.ok("run-once", "--drain")
    assert sites.asked == [(HOST, "www.example.com", "/", None)]
    assert "host" in cli.refused(2, "create", "--verify-url", url, "--verify-host", "a b")
    assert "needs a url" in cli.refused(2, "create", "--verify-host", "www.example.com")


def test_section_7_the_api_and_its_description_take_the_site_and_the_text(store):
    add_nodes(store, 1)
    with serving(store) as client:
        document = client("GET", "/openapi.json").data
        schema = document["paths"]["/api/v1/releases"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        verify = {"url": "http://{main_ip}/", "host": "www.example.com", "contains": "build 7"}
        body = {"strategy": {"verify": verify}}
        assert misfit(body, schema, document) == ""
        assert client.ok("POST", "/api/v1/releases", body, 201)["releaseId"] == 1
        assert client.ok("GET", "/api/v1/releases/1?view=summary")["release"]["strategy"] == body["strategy"]
        described = document["components"]["schemas"]["Strategy"]["properties"]["verify"]["properties"]
        assert re.search(described["host"]["pattern"], "www.example.com")
        assert not re.search(described["host"]["pattern"], "a b")
        assert (described["host"]["maxLength"], described["contains"]["maxLength"]) == (253, 500)
        for wrong in ({"host": 7}, {"contains": 7}, {"sni": "a"}):
            assert misfit({"strategy": {"verify": {**verify, **wrong}}}, schema, document) != ""
            assert client.code("POST", "/api/v1/releases", {"strategy": {"verify": {**verify, **wrong}}}) == 2003


# -- certificates that are renewed ------------------------------------------------------------------------------------

def issue(certs: Path, folder: Path, name: str, since_s: float, until_s: float) -> tuple[Path, Path]:
    """Make a pair of the CA that is valid from so many seconds from now on, until then; return its files."""
    folder.mkdir(exist_ok=True)
    key, request, config = folder / f"{name}.key", folder / "request", folder / "config"
    moment = [(datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)).strftime(
        "%Y%m%d%H%M%SZ") for seconds in (since_s, until_s)]
    config.write_text(
        f"[ca]\ndefault_ca=own\n[own]\ndatabase={folder}/index\nserial={folder}/serial\nnew_certs_dir={folder}\n"
        "default_md=sha256\npolicy=any\nunique_subject=no\n[any]\ncommonName=supplied\n[extensions]\n"
        f"basicConstraints=critical,CA:FALSE\nsubjectAltName=IP:{HOST}\nsubjectKeyIdentifier=hash\n"
        "authorityKeyIdentifier=keyid:always\nkeyUsage=critical,digitalSignature\n"
        "extendedKeyUsage=clientAuth,serverAuth\n")
    (folder / "index").write_text("")
    (folder / "serial").write_text(f"{time.time_ns():016X}\n")
    for command in (
            ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
             "-keyout", str(key), "-out", str(request)],
            ["ca", "-batch", "-notext", "-config", str(config), "-extensions", "extensions", "-startdate", moment[0],
             "-enddate", moment[1], "-cert", f"{certs}/ca.crt", "-keyfile", f"{certs}/ca.key", "-in", str(request),
             "-out", str(folder / f"{name}.crt")]):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    key.chmod(0o600)
    return folder / f"{name}.crt", key


def put(pair: tuple[Path, Path], cert: str, key: str) -> None:
    """Renew a pair on the disk: the key first, each file in one go."""
    for source, target in ((pair[1], key), (pair[0], cert)):
        shutil.copy(source, f"{target}.new")
        Path(f"{target}.new").replace(target)


DAY_S = 86400.0
BAD_PAIRS = {"expired": (-10 * DAY_S, -DAY_S, "expired 20"),
             "not valid yet": (DAY_S, 10 * DAY_S, "is not valid before 20")}


@pytest.fixture(params=BAD_PAIRS)
def bad_pair(request, certs, tmp_path):
    """A pair that nobody accepts now, and what is said of it."""
    since_s, until_s, said = BAD_PAIRS[request.param]
    return issue(certs, tmp_path / "bad", "control", since_s, until_s), said


def not_taken(told) -> list[str]:
    messages = [record.getMessage() for record in told.records]
    return [message for message in messages if message.startswith("renewed certificate: not taken yet")]


def test_a_renewed_certificate_that_nobody_accepts_now_does_not_replace_the_good_one(
        new_peer, certs, tmp_path, told, bad_pair):
    pair, said = bad_pair
    ours = our_files(certs, tmp_path)
    client = WaitingClient(rc.AgentClient(settings_for("sqlite:///unused.db", certs, **ours)))
    peer = new_peer(says(reply(b"", "404 Not Found", "Connection: close\r\n")))
    try:
        assert client.query(peer.address(), "x").result == rc.UNKNOWN
        put(pair, *ours.values())
        for _ in range(3):
            assert client.query(peer.address(), "x").result == rc.UNKNOWN
        assert len(set(peer.serials)) == 1
        message, = not_taken(told)  # once
        assert said in message
        assert ours["CONTROL_CERT"] in message
        # the next renewal is as good as any
        put(issue(certs, tmp_path / "good", "control", -60, DAY_S), *ours.values())
        assert client.query(peer.address(), "x").result == rc.UNKNOWN
        assert peer.serials[-1] != peer.serials[0]
    finally:
        client.close()


def put_soon(certs: Path, folder: Path, name: str, files: Collection[str], use: Callable[[], object]) -> float:
    """Renew a pair by one that is used before its time; return its time: 3 s from now, on a slow machine later."""
    for seconds in (3, 10, 30):
        pair = issue(certs, folder / f"in-{seconds}-s", name, seconds, DAY_S)
        valid_from = rc.certificate_times(pair[0].read_text())[0][0]
        if time.time() < valid_from - seconds / 2:
            put(pair, *files)
            use()
            assert time.time() < valid_from, "too slow to show anything"
            return valid_from
    raise AssertionError("too slow to show anything")


def test_a_renewed_certificate_is_taken_when_its_time_has_come(new_peer, certs, tmp_path, told):
    ours = our_files(certs, tmp_path)
    client = WaitingClient(rc.AgentClient(settings_for("sqlite:///unused.db", certs, **ours)))
    peer = new_peer(says(reply(b"", "404 Not Found", "Connection: close\r\n")))
    try:
        client.query(peer.address(), "x")
        valid_from = put_soon(certs, tmp_path, "control", ours.values(), lambda: client.query(peer.address(), "x"))
        assert len(set(peer.serials)) == 1

        def is_taken() -> bool:
            client.query(peer.address(), "x")
            return peer.serials[-1] != peer.serials[0]
        eventually(is_taken)
        assert time.time() >= valid_from
        assert len(not_taken(told)) == 1
    finally:
        client.close()


def test_a_running_release_goes_on_with_the_good_certificate(world, certs, tmp_path, told, bad_pair):
    pair, said = bad_pair
    ours = our_files(certs, tmp_path)
    world.nodes(4)
    world.agent(2).set(task_ms=FOREVER_MS)
    release = new_release(world.store, strategy={"batches": [1, 1, 1]})
    runner = threading.Thread(target=lambda: world.drain(**ours))
    runner.start()
    eventually(lambda: statuses(world.store, release.id)[0] == "success")
    put(pair, *ours.values())
    world.finish()
    runner.join(60)
    assert world.store.releases.get(release.id).status == "success"
    # between the two files of a pair another thing may be told too: that they do not fit; and what is put there
    # between the look at a file and its reading is told again
    assert [said in message for message in not_taken(told)].count(True) in (1, 2)


@pytest.fixture
def api_files(tmp_path) -> dict[str, str]:
    """The settings for a certificate of the API that a test renews."""
    return {"HTTP_CERT": f"{tmp_path}/served.crt", "HTTP_KEY": f"{tmp_path}/served.key"}


@pytest.fixture
def https(certs, tmp_path, open_store, sqlite_url, api_files):
    """A client of an API with a certificate of its own, and the files of that."""
    pair = issue(certs, tmp_path / "api", "api", -60, 5 * DAY_S)
    put(pair, *api_files.values())
    with serving(open_store(sqlite_url), HTTP_ADDR=f"{HOST}:0", **api_files) as client:
        client.context = ssl.create_default_context(cafile=f"{certs}/ca.crt")
        yield client


def served_serial(client) -> str:
    with contextlib.closing(client.connect()) as connection:
        connection.request("GET", "/healthz")
        assert connection.sock is not None
        serial = connection.sock.getpeercert()["serialNumber"]
        assert json.loads(connection.getresponse().read())["code"] == 0
        return serial


def test_the_apis_certificate_is_not_replaced_by_one_that_nobody_accepts_now(https, api_files, certs, tmp_path, told,
                                                                                  bad_pair):
    pair, said = bad_pair
    before = served_serial(https)
    put(pair, *api_files.values())
    assert [served_serial(https) for _ in range(3)] == [before] * 3
    message, = not_taken(told)
    assert said in message
    assert api_files["HTTP_CERT"] in message
    put(issue(certs, tmp_path / "good", "api", -60, DAY_S), *api_files.values())
    assert served_serial(https) != before


def test_the_apis_certificate_is_taken_when_its_time_has_come(https, api_files, certs, tmp_path, told):
    seen = {served_serial(https)}
    valid_from = put_soon(certs, tmp_path, "api", api_files.values(), lambda: seen.add(served_serial(https)))
    assert len(seen) == 1
    eventually(lambda: served_serial(https) not in seen)
    assert time.time() >= valid_from
    assert len(not_taken(told)) == 1


def test_a_renewed_certificate_is_taken_a_little_after_its_time_for_clocks_that_are_behind(
        certs, tmp_path, monkeypatch):
    ours = our_files(certs, tmp_path)
    files = rc.TlsFiles(rc.client_context, *ours.values(), f"{certs}/ca.crt")
    pair = issue(certs, tmp_path / "later", "control", 60, DAY_S)
    valid_from = rc.certificate_times(pair[0].read_text())[0][0]
    first = files.context()
    put(pair, *ours.values())
    for after_s, is_taken in ((-1.0, False), (0.0, False), (0.5, False), (rc.CLOCKS_APART_S, True)):
        monkeypatch.setattr(rc.time, "time", lambda after_s=after_s: valid_from + after_s)
        assert (files.context() is not first) == is_taken, after_s
