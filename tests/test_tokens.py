"""`token add`: what it prints, what it writes, what it refuses, and that it is let in (issue 5, "Who may do what")."""
from __future__ import annotations

import http.client
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from lab import Cli, Quick, add_nodes, eventually, findings, new_release, serving, sha256
from test_audit import API_ACTS

import releasectl as rc


@pytest.fixture
def quick(tmp_path):
    """The command line in this process, with the setting of a file of tokens that is not there yet."""
    quick = Quick(tmp_path)
    quick.settings["API_TOKENS_FILE"] = str(tmp_path / "tokens")
    return quick


def tokens_of(cli: Cli) -> Path:
    return Path(cli.settings["API_TOKENS_FILE"])


def test_token_add_prints_the_token_once_and_keeps_only_its_hash(quick):
    result = quick.ok("token", "add", "deploy", "--role", "operator")
    token = result.out.strip()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert (result.out.count("\n"), token in result.err, "shown again" in result.err) == (1, False, True)
    assert tokens_of(quick).read_text() == f"deploy:operator:{sha256(token)}\n"
    assert stat.S_IMODE(tokens_of(quick).stat().st_mode) == 0o600
    assert sorted(os.listdir(quick.folder)) == ["releasectl.db", "tokens"]


def test_token_add_as_json(quick):
    document = quick.ok("token", "add", "prometheus", "--role", "viewer", "--json").json
    assert (document.keys(), document["name"], document["role"]) == ({"name", "role", "token"}, "prometheus", "viewer")


def test_a_token_of_token_add_is_let_in_without_a_restart(quick, open_store, sqlite_url):
    first = quick.ok("token", "add", "vera", "--role", "viewer").out.strip()
    with serving(open_store(sqlite_url), API_TOKENS_FILE=tokens_of(quick)) as client:
        client.token = first
        assert client.code("POST", "/api/v1/releases", {}) == 1004
        client.token = quick.ok("token", "add", "oskar", "--role", "operator").out.strip()
        assert client.code("POST", "/api/v1/releases", {}) == 3003
        client.token = first
        assert client.code("GET", "/api/v1/nodes") == 0


def test_token_add_keeps_what_the_file_holds_and_its_mode(quick):
    path = tokens_of(quick)
    path.write_text(f"# ours\nvera:viewer:{sha256('x')}")  # without a line's end
    path.chmod(0o640)
    quick.ok("token", "add", "oskar", "--role", "operator")
    lines = path.read_text().splitlines()
    assert lines[:2] == ["# ours", f"vera:viewer:{sha256('x')}"]
    assert lines[2].startswith("oskar:operator:")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_name_has_one_token(quick):
    quick.ok("token", "add", "deploy", "--role", "operator")
    before = tokens_of(quick).read_bytes()
    assert "deploy has a token in" in quick.refused(3, "token", "add", "deploy", "--role", "viewer")
    assert tokens_of(quick).read_bytes() == before


def test_two_that_add_tokens_at_the_same_time_lose_none(tmp_path):
    cli = Cli(tmp_path)
    cli.settings["API_TOKENS_FILE"] = str(tmp_path / "tokens")
    several = [cli.start("token", "add", f"name-{n}", "--role", "viewer") for n in range(4)]
    assert [Cli.end(process).code for process in several] == [0] * 4
    assert len(rc.Tokens(str(tmp_path / "tokens")).load()) == 4


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("deploy",), 2, "--role"), (("deploy", "--role", "admin"), 2, "--role"), (("a:b", "--role", "viewer"), 2, "colon"),
    (("", "--role", "viewer"), 2, "name"), (("#a", "--role", "viewer"), 2, "begin with #"),
    ((" a", "--role", "viewer"), 2, "name"), (("a\nb", "--role", "viewer"), 2, "name"),
])
def test_what_is_no_name_or_role_is_refused_and_nothing_is_written(quick, arguments, code, words):
    assert words in quick.refused(code, "token", "add", *arguments)
    assert not tokens_of(quick).exists()


@pytest.mark.parametrize(("harm", "words"), [
    ("not set", "API_TOKENS_FILE is not set"), ("no folder", "can't be written: no such file or directory"),
    ("open to others", "chmod o-rwx,g-w"), ("broken", ":1: must be NAME:viewer:SHA256"), ("a folder", "can't be read")])
def test_a_file_that_cant_be_used_is_told_and_left_as_it_is(quick, harm, words):
    path = tokens_of(quick)
    if harm == "not set":
        quick.settings["API_TOKENS_FILE"] = ""
    elif harm == "no folder":
        quick.settings["API_TOKENS_FILE"] = str(path / "none" / "tokens")
    elif harm == "a folder":
        path.mkdir(0o700)
    else:
        path.write_text("nonsense" if harm == "broken" else "")
        path.chmod(0o600 if harm == "broken" else 0o644)
    before = path.read_bytes() if path.is_file() else None
    assert words in quick.refused(2, "token", "add", "deploy", "--role", "operator")
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not [name for name in os.listdir(quick.folder) if name.startswith(".tokens-")]


@pytest.mark.parametrize("command", ["serve", "run-once"])
def test_a_control_key_that_others_can_read_stops_the_start(quick, command):
    key = quick.file("control.key", "x")
    os.chmod(key, 0o644)
    quick.settings.update(CONTROL_CERT=key, CONTROL_KEY=key, CONTROL_CA=key)
    assert "CONTROL_KEY" in (line := quick.refused(2, command))
    assert "is open to others: chmod o-rwx,g-w" in line


@pytest.mark.parametrize("name", ["a\u202eb", "x" * 101])
def test_a_name_that_can_not_be_shown_is_refused_in_a_file_written_by_hand_too(quick, name):
    path = tokens_of(quick)
    path.write_text(f"{name}:viewer:{'0' * 64}\n", encoding="utf-8")
    path.chmod(0o600)
    assert f"{path}:1: name " in (said := quick.refused(2, "serve"))
    assert "must be 1 to 100" in said


@pytest.mark.parametrize("name", ["d\u0435ploy", "\uff41nna", "e\u0301dge"])
def test_a_name_that_looks_like_another_is_let_in_as_before_but_not_made(quick, open_store, sqlite_url, told, name):
    path = tokens_of(quick)
    path.write_text(f"{name}:operator:{sha256('x')}\n", encoding="utf-8")
    path.chmod(0o600)
    with serving(open_store(sqlite_url), API_TOKENS_FILE=path) as client:
        client.token = "x"
        assert client.code("PUT", "/api/v1/freeze", {"frozen": True, "reason": "y"}) == 0
        assert client.ok("GET", "/api/v1/freeze")["actor"] == name
    assert told.text.count(f"API_TOKENS_FILE {path}:1: still let in, but rename it: name ") == 1
    path.unlink()
    assert "must be 1 to 100" in quick.refused(2, "token", "add", name, "--role", "viewer")


@pytest.mark.parametrize("setting", ["API_TOKENS_FILE", "HTTP_CERT"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(cli, setting):
    os.mkfifo(cli.folder / "pipe", 0o600)
    cli.settings.update({"MTLS_ENABLED": "0", "HTTP_KEY": str(cli.folder / "pipe") if setting == "HTTP_CERT" else "",
                         setting: str(cli.folder / "pipe")})
    assert "is a pipe: name a file" in cli("check").out


# -- tokens that expire, and tokens for some targets (contract section 6) ---------------------------

HASH = "a" * 64


@pytest.mark.parametrize(("options", "expires", "targets"), [
    ("", None, ()), (":expires=2026-12-31", "2027-01-01T00:00:00.000Z", ()),
    (":expires=2026-12-31T22:00:00Z", "2026-12-31T22:00:00.000Z", ()),
    (":expires=2026-12-31T22:00:00.5+02:00:targets=cdn,dns", "2026-12-31T20:00:00.500Z", ("cdn", "dns")),
    (":targets=cdn", None, ("cdn",)), (":targets=cdn:expires=2026-12-31", "2027-01-01T00:00:00.000Z", ("cdn",))])
def test_a_line_may_name_when_its_token_expires_and_which_targets_it_is_for(options, expires, targets):
    token = rc.parse_token(f"olga:operator:{HASH}{options}")
    assert (token.name, token.role, token.sha256, token.targets) == ("olga", "operator", HASH, targets)
    assert token.expires_at == (rc.epoch_of(expires) if expires else float("inf"))


@pytest.mark.parametrize(("line", "words"), [
    (f"olga:operator:{HASH}:2026-12-31", "what follows the SHA-256 must be :expires=2026-12-31 or :targets=cdn,dns"),
    (f"olga:operator:{HASH}:", "what follows the SHA-256"), (f"olga:operator:{HASH}:secret", "what follows the SHA"),
    (f"olga:operator:{HASH}:expire=2026-12-31", "expire is not a known option (did you mean expires?)"),
    (f"olga:operator:{HASH}:expires=31.12.2026", "expires must be the last day, like 2026-12-31"),
    (f"olga:operator:{HASH}:expires=2026-02-30", "expires must be"), (f"olga:operator:{HASH}:expires=", "expires must"),
    (f"olga:operator:{HASH}:expires=2026-12-31T22:00:00", "expires must be"),
    (f"olga:operator:{HASH}:targets=", "targets must be names"), (f"olga:operator:{HASH}:targets=cdn, dns", "targets"),
    (f"olga:operator:{HASH}:targets=cdn,", "targets must be"),
    (f"olga:operator:{HASH}:targets=cdn:targets=dns", "targets is given twice"),
    (f"vera:viewer:{HASH}:targets=cdn", "a viewer only reads"), (f"olga:admin:{HASH}", "must be NAME:viewer:SHA256"),
    (f"olga:operator:{HASH[1:]}:expires=2026-12-31", "must be NAME:viewer:SHA256")])
def test_a_line_that_is_wrong_stops_the_start_and_is_named_without_what_is_in_it(quick, line, words):
    path = tokens_of(quick)
    path.write_text(f"# ours\n{line}\n")
    path.chmod(0o600)
    refusal = quick.refused(2, "serve")
    assert f"API_TOKENS_FILE {path}:2: " in refusal
    assert words in refusal
    assert HASH[1:] not in refusal
    assert "secret" not in refusal


def write_tokens(tmp_path: Path, **options: str) -> Path:
    """Write a file with an operator's token for each name, which is the token too."""
    path = tmp_path / "tokens"
    path.write_text("".join(f"{name}:operator:{sha256(name)}{more}\n" for name, more in options.items()))
    path.chmod(0o600)
    return path


def in_s(seconds: float) -> str:
    return rc.utc_text(time.time() + seconds)


def test_a_token_is_good_until_it_expires_and_its_user_is_told_since_when_it_is_not(store, tmp_path, told):
    path = write_tokens(tmp_path, old=":expires=2026-01-31", new=":expires=2999-12-31")
    with serving(store, API_TOKENS_FILE=path) as client:
        client.token = "new"
        assert client.code("GET", "/api/v1/nodes") == 0
        client.token = "old"
        for _ in range(10):
            answer = client("GET", "/api/v1/nodes")
            assert (answer.status, answer.code) == (401, 1002)
            assert "this token expired at 2026-02-01T00:00:00.000Z" in answer.text
        client.token = "older"
        assert "expired" not in client("GET", "/api/v1/nodes").text
        client.token = ""
        assert "expired" not in client("GET", "/readyz").text
        began = time.monotonic()
        client.token = "new"  # whom an expired token at the same address does not slow down
        assert client.code("GET", "/api/v1/nodes") == 0
        assert time.monotonic() - began < 3
    assert told.text.count("the token of old, which 127.0.0.1 sends, expired at 2026-02-01T00:00:00.000Z") == 4
    assert "bad token" in told.text  # that of nobody, and no other


def test_an_open_connection_does_not_outlive_its_token(store, tmp_path):
    add_nodes(store, 1)
    release = new_release(store)
    path = write_tokens(tmp_path, olga=f":expires={in_s(3)}")
    with serving(store, API_TOKENS_FILE=path) as client:
        headers = {"Authorization": "Bearer olga"}
        kept = http.client.HTTPConnection(*client.address, timeout=30)

        def status_of(target: str) -> int:
            kept.request("GET", target, headers=headers)
            answer = kept.getresponse()
            answer.read()
            return answer.status

        assert status_of("/api/v1/nodes") == 200
        began = time.monotonic()
        assert status_of(f"/api/v1/releases/{release.id}/events?after=99&wait=30") == 200
        assert time.monotonic() - began < 20  # the wait ended with the token
        sock = kept.sock
        assert status_of("/api/v1/nodes") == 401
        assert kept.sock is None or sock.recv(1) == b""
        kept.close()


# Of each act: what a token for dns alone gets for it, on a release of cdn where it is one of a release.
SCOPES = {key: "only: this touches every target" if "/nodes" in key[1] or key[1].endswith(("/catch-up", "/freeze"))
          else "only: this is of target cdn" for key in API_ACTS}


@pytest.mark.parametrize(("method", "path"), API_ACTS)
def test_a_token_of_another_target_acts_on_nothing_else_and_reads_all(store, tmp_path, method, path):
    arrange, body, *_ = API_ACTS[method, path]
    add_nodes(store, 2)
    if arrange:
        arrange(store)
    known = store.audit.head()[0]
    with serving(store, API_TOKENS_FILE=write_tokens(
            tmp_path, other=":targets=dns,web", mine=":targets=dns,cdn", all="")) as client:
        client.token = "other"
        answer = client(method, path, body, {"Content-Type": "application/json"})
        assert (answer.status, answer.code) == (403, 1004)
        assert "other may act on dns, web only: this " in answer.text
        assert SCOPES[method, path] in answer.text
        assert store.audit.head()[0] == known
        of_all = SCOPES[method, path].endswith("every target")
        client.token = "all" if of_all else "mine"
        assert client(method, path, body, {"Content-Type": "application/json"}).code == 0


def test_every_act_of_the_api_says_what_it_touches_and_nothing_else_does():
    for route in rc.ROUTES:  # a ping changes nothing
        assert (route.touches is not None) == (route.method != "GET" and route.answers != "Ping"), route.path


def test_a_token_of_a_target_does_there_what_it_may_and_reads_everything(store, tmp_path):
    add_nodes(store, 1)
    for target in ("cdn", "dns"):
        new_release(store, target=target, payload={"websites": []})
    with serving(store, API_TOKENS_FILE=write_tokens(tmp_path, olga=":targets=dns")) as client:
        client.token = "olga"
        for path in ("releases", "releases/1", "releases/1/payload", "nodes", "audit", "freeze", "overview"):
            assert client.code("GET", f"/api/v1/{path}") == 0, path
        assert client.ok("GET", "/api/v1/health")["targets"] == ["dns"]
        assert client.ok("POST", "/api/v1/releases", {"target": "dns", "payload": {"websites": []}}, 201)
        cases: list[tuple[Any, Any]] = [({"target": "dns"}, 0), ({"target": "cdn"}, 1004), ({}, 1004),
                                        ({"target": ["dns"]}, 2003), ({"target": None}, 2003),
                                        ({"target": "dns "}, 2003), ({"target": "", "dryRun": True}, 2003)]
        for body, code in cases:
            wanted = {"payload": {"websites": []}, "dryRun": True, **body}
            assert client.code("POST", "/api/v1/releases", wanted) == code
        for body, _ in cases[3:]:
            told = client("POST", "/api/v1/releases", {"payload": {"websites": []}, **body}).message
            assert told == client("PUT", "/api/v1/freeze", {"frozen": False, **body}).message == (
                "target must be 1 to 64 letters, digits or . _ -") or "dryRun" in body
        assert client("PUT", "/api/v1/freeze", {"frozen": False}).message == (
            'olga may act on dns only: this touches every target; with "target":"dns" it would not')
        for body, code in cases[:3]:
            assert client.code("PUT", "/api/v1/freeze", {"frozen": True, "reason": "x", **body}) == code
            assert client.code("PUT", "/api/v1/freeze", {"frozen": False, **body}) == code
        assert client.code("POST", "/api/v1/releases/2/pause", {}) == 0
        assert client.code("POST", "/api/v1/releases/1/pause", {}) == 1004
        assert client.code("POST", "/api/v1/releases/9/pause", {}) == 3001
    assert [row.actor for row in store.audit.rows(0, 100)].count("olga") == 4


def test_token_add_writes_when_a_token_expires_and_what_it_is_for(quick):
    result = quick.ok("token", "add", "deploy", "--role", "operator", "--expires", "2999-12-31", "--targets", "cdn,dns")
    assert "Token for deploy (operator, until 2999-12-31, for cdn,dns only)." in result.err
    assert tokens_of(quick).read_text() == (
        f"deploy:operator:{sha256(result.out.strip())}:expires=2999-12-31:targets=cdn,dns\n")
    document = quick.ok("token", "add", "vera", "--role", "viewer", "--expires", "90d", "--json").json
    assert abs(rc.epoch_of(document["expires"]) - time.time() - 90 * 86400) < 60
    [*_, row] = quick.ok("audit", "--action", "token.add", "--json").json["items"][:1]
    assert (row["after"]["targets"], row["after"]["expires"]) == ("cdn,dns", "2999-12-31")


@pytest.mark.parametrize(("options", "words"), [
    (("--expires", "2020-01-01"), "expires 2020-01-01 is over"), (("--expires", "soon"), "'soon' is not a time"),
    (("--expires", "2999-02-30"), "expires must be the last day"), (("--targets", "c/d"), "targets must be names"),
    (("--targets", "cdn,"), "targets must be names")])
def test_token_add_refuses_an_end_or_targets_that_can_not_be_meant(quick, options, words):
    assert words in quick.refused(2, "token", "add", "deploy", "--role", "operator", *options)
    assert not tokens_of(quick).exists()
    assert "a viewer only reads" in quick.refused(2, "token", "add", "deploy", "--role", "viewer", "--targets", "cdn")


def test_check_and_metrics_tell_which_tokens_expire(quick):
    path = write_tokens(quick.folder, old=":expires=2026-01-31", soon=f":expires={in_s(3 * 86400)}",
                        late=":expires=2999-12-31", never="")
    quick.ok("migrate")
    quick.settings["MTLS_ENABLED"] = "0"
    found = findings(quick("check", "--json"))
    assert found["API_TOKENS_FILE"] == (True, "4 tokens")
    assert found["token old"][0] is False
    assert found["token old"][1].startswith("expired since 2026-02-01T00:00:00.000Z, and is refused: delete its line")
    assert found["token soon"][0] is True
    assert re.fullmatch(r"is good until \S+, 3 days: make a new one", found["token soon"][1])
    assert not {"token late", "token never"} & found.keys()
    figures = rc.certificate_figures(rc.Settings.load({"API_TOKENS_FILE": str(path), "MTLS_ENABLED": "0"}))
    told = {key[1]: value for key, value in figures.items() if key[0] == "releasectl_token_expiry_timestamp_seconds"}
    assert told.keys() == {"old", "soon", "late"}
    assert told["old"] == rc.epoch_of("2026-02-01T00:00:00Z")


def test_of_two_tokens_with_one_name_the_one_that_is_good_longer_counts(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"olga:operator:{HASH}:expires=2026-01-31\nolga:operator:{'b' * 64}:expires=2999-12-31\n")
    path.chmod(0o600)
    assert list(rc.token_figures(str(path)).values()) == [rc.epoch_of("3000-01-01T00:00:00Z")]


def test_a_token_taken_up_late_is_refused_by_the_same_file_without_a_restart(store, tmp_path):
    path = write_tokens(tmp_path, olga="")
    with serving(store, API_TOKENS_FILE=path) as client:
        client.token = "olga"
        assert client.code("GET", "/api/v1/nodes") == 0
        write_tokens(tmp_path, olga=":expires=2026-01-31")
        assert eventually(lambda: client.code("GET", "/api/v1/nodes") == 1002)
