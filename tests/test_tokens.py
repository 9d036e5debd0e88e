"""`token add`: what it prints, what it writes, what it refuses, and that it is let in (issue 5, "Who may do what")."""
from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from lab import Cli, Quick, serving, sha256

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
