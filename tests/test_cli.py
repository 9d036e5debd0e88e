"""The command line: real processes, what they print, how they end (contract section 4; issue 3, "Bad input")."""
from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import leave_out
from lab import (
    ADDRESSES,
    AS_OTHERS,
    DRIVERS,
    PROGRAM,
    ROOT,
    TIMEOUT_S,
    Cli,
    Quick,
    Result,
    add_nodes,
    answers,
    assert_books_balance,
    eventually,
    findings,
    free_port,
    make_certs,
    mtls,
    new_release,
    statuses,
)

import releasectl as rc

# -- every command, with and without --json ----------------------------------------------------

RELEASE = {"id", "version", "status", "statusReason", "totalNodes", "currentBatch"}
CREATED = {"releaseId", "version", "totalNodes", "batches"}
PAGE = {"items", "total"}
COMMANDS = [
    (("migrate",), {"before", "after"}, "schema"),
    (("node", "add", "edge-3", "10.0.0.3", "--label", "region=eu"), {"id", "name", "mainIp", "labels"}, "edge-3"),
    (("node", "list"), PAGE, "edge-2"),
    (("node", "set", "edge-2", "--status", "offline"), {"id", "name", "status"}, "offline"),
    (("node", "import", "new-nodes"), {"items"}, "nodes added: 1"),
    (("create", "--reason", "weekly"), CREATED, "created, 2 nodes in batches of 1, 1"),
    (("list",), {*PAGE, "page", "pageSize"}, "failed"),
    (("status", "2"), {"release", "batches"}, "edge-2"),
    (("watch", "1"), {"release"}, "success"),
    (("events", "3"), {"items"}, "created"),
    (("pause", "3"), RELEASE, "paused"),
    (("cancel", "3", "--reason", "no"), RELEASE, "cancelled"),
    (("retry", "2"), CREATED, "created, 2 nodes"),
    (("rollback", "2"), CREATED, "created, 2 nodes"),
]


@pytest.mark.parametrize(("arguments", "keys", "word"), COMMANDS, ids=[" ".join(c[0][:2]) for c in COMMANDS])
def test_a_command_prints_text_for_people_and_one_document_with_json(filled, arguments, keys, word):
    filled.file("new-nodes", "edge-9 10.0.0.9\n")
    with contextlib.closing(sqlite3.connect(filled.folder / "releasectl.db")) as source, \
            contextlib.closing(sqlite3.connect(filled.folder / "copy.db")) as target:
        source.backup(target)
    text = Quick(filled.folder).ok(*arguments).out
    assert word in text
    assert not text.startswith("{")
    assert keys <= set(filled.ok("--db", "sqlite:///copy.db", *arguments, "--json").json)


def test_json_db_and_config_stand_before_or_behind_the_command(filled):
    url = f"sqlite:///{filled.folder}/releasectl.db"
    config = filled.file("ours.conf", f"DATABASE_URL={url}\n")
    filled.settings["DATABASE_URL"] = "sqlite:///none.db"
    wanted = filled.ok("--db", url, "--json", "node", "list").json
    assert wanted["total"] == 2
    assert filled.ok("node", "list", "--json", "--db", url).json == wanted
    assert filled.ok("node", "--json", "list", f"--db={url}").json == wanted
    del filled.settings["DATABASE_URL"]
    assert filled.ok("--config", config, "node", "list", "--json").json == wanted
    assert filled.ok("node", "--json", "list", "--config", config).json == wanted


def test_the_text_for_people_is_in_columns(filled_quick):
    lines = filled_quick.ok("status", "3").out.splitlines()
    assert lines[0].startswith("release 3 (v3): pending, ")
    assert lines[1] == "reason: for pending"
    assert lines[-1] == "not shown: 2 nodes with nothing wrong (--all)"
    lines = filled_quick.ok("status", "3", "--all").out.splitlines()
    assert lines[-3].split()[:3] == ["BATCH", "NODE", "STATUS"]
    assert [line.split()[:3] for line in lines[-2:]] == [["1", "edge-1", "pending"], ["2", "edge-2", "pending"]]


def test_the_list_is_filtered_and_paged(filled_quick):
    assert [r["id"] for r in filled_quick.ok("list", "--json").json["items"]] == [3, 2, 1]
    assert [r["id"] for r in filled_quick.ok("list", "--status", "failed", "--json").json["items"]] == [2]
    assert [r["id"] for r in filled_quick.ok("list", "--status", "open", "--json").json["items"]] == [3]
    assert [r["id"] for r in filled_quick.ok("list", "--status", "ended", "--json").json["items"]] == [2, 1]
    second = filled_quick.ok("list", "--page", "2", "--page-size", "2", "--json").json
    assert ([r["id"] for r in second["items"]], second["total"]) == ([1], 3)


def test_help_names_every_command_and_every_setting(cli):
    text = cli.ok("--help").out
    assert [command.name for command in rc.COMMANDS if command.name.split()[-1] not in text] == []
    assert "MTLS_ENABLED" not in text
    settings = cli.ok("help", "settings").out
    assert [setting.name for setting in rc.SETTINGS if setting.name not in settings] == []
    assert cli.ok("--version").out == cli.ok("-V").out == f"releasectl {rc.__version__}\n"
    assert "--drain" in cli.ok("run-once", "--help").out


def test_the_actor_in_the_history_is_the_user(filled_quick):
    filled_quick.ok("pause", "3", "--reason", "lunch\nbreak")
    event = filled_quick.ok("events", "3", "--json").json["items"][-1]
    assert event["actor"].startswith("cli:")
    assert (event["event"], event["detail"]) == ("paused", "lunch break")


# -- exit codes --------------------------------------------------------------------------------

def test_0_when_the_release_succeeded_and_nothing_is_printed_with_nothing_to_do(fleet_cli):
    assert fleet_cli("run-once") == Result(0, "", "")
    new_release(fleet_cli.world.store)
    result = fleet_cli.ok("run-once")
    assert result.out.startswith("release 1 (v1): success")
    assert fleet_cli("run-once") == Result(0, "", "")
    assert fleet_cli("run-once", "--drain") == Result(0, "", "")
    assert fleet_cli("run-once", "--json").json == {"releases": [], "inOtherHands": 0}


def test_1_when_the_release_ended_other_than_success(fleet_cli):
    fleet_cli.world.agent(1).set(outcome="failed", message="no disk space")
    new_release(fleet_cli.world.store)
    result = fleet_cli("run-once", "--json")
    assert (result.code, result.json["releases"][0]["status"]) == (1, "failed")
    assert fleet_cli("watch", 1).code == 1


@pytest.mark.parametrize("arguments", [
    ("stats",), ("node",), ("node", "ad"), ("events",), ("status", "x"), ("status", "-1"), ("status", "9" * 40),
    ("list", "--page-size", "101"), ("list", "--page", "0"), ("list", "--status", "done"), ("create", "--colour"),
    ("node", "add", "a"), ("node", "add", "a", "10.0.0.1", "--port", "0"), ("status", "1", "2"), ("list", "--jso"),
    ("node", "add", "a", "10.0.0.1", "--protocol", "http"), ("events", "1", "--limit", "0"), ("list", "--db"),
])
def test_2_when_the_command_line_is_wrong_in_one_line_that_says_where_help_is(quick, arguments):
    assert "(see `releasectl help" in quick.refused(2, *arguments)
    assert os.listdir(quick.folder) == []


def test_2_when_there_is_no_command(cli):
    assert cli() == Result(2, "", cli.ok("--help").out)
    assert cli.refused(2, "--json") == (
        "releasectl: the following arguments are required: COMMAND (see `releasectl help`)")


def test_3_when_it_is_not_found_or_in_the_wrong_state(filled_quick):
    assert Cli(filled_quick.folder).refused(3, "status", 99) == "releasectl: release 99 does not exist"
    assert "; only paused releases can be resumed" in filled_quick.refused(3, "resume", 1)
    assert "release 3 is pending; only partial, failed or cancelled releases can be retried" in \
        filled_quick.refused(3, "retry", 3)
    assert "node edge-7 does not exist" in filled_quick.refused(3, "node", "set", "edge-7", "--disable")
    assert filled_quick.refused(3, "watch", 2**63 - 1).endswith("does not exist")


def test_69_when_the_database_or_an_agent_is_out_of_reach(fleet_cli):
    fleet_cli.world.agent(2).set(mode="refuse")
    result = fleet_cli("node", "ping", "--json")
    assert result.code == 69
    assert [(item["name"], item["ok"], item["errorKind"]) for item in result.json["items"]] == [
        ("edge-1", True, ""), ("edge-2", False, "unreachable"), ("edge-3", True, "")]
    assert fleet_cli.ok("node", "ping", "edge-1").out.splitlines()[1].split()[:2] == ["edge-1", "ok"]
    assert "does not exist" in fleet_cli.refused(69, "list", "--db", "sqlite:///none.db")


def test_75_when_another_process_holds_every_runnable_release(fleet_cli):
    release = new_release(fleet_cli.world.store)
    claim = fleet_cli.world.store.claims.claim(release.id, "another", 60)
    result = fleet_cli("run-once")
    assert (result.code, result.out) == (75, "")
    assert "another process" in result.err
    fleet_cli.world.store.claims.drop(claim)
    assert fleet_cli("run-once").code == 0


def test_an_executor_that_is_switched_off_says_so_and_dispatches_nothing(fleet_cli):
    release = new_release(fleet_cli.world.store)
    fleet_cli.settings["RELEASE_EXECUTOR_ENABLED"] = "0"
    result = fleet_cli("run-once", "--json")
    assert (result.code, "RELEASE_EXECUTOR_ENABLED=0" in result.err) == (0, True)
    assert result.json == {"releases": [], "inOtherHands": 0}
    assert fleet_cli.world.store.releases.get(release.id).status == "pending"


# -- bad input ---------------------------------------------------------------------------------

def test_no_online_node_is_refused_and_nothing_is_written(filled_quick):
    assert "no online nodes" in filled_quick.refused(3, "create", "--db", "sqlite:///new.db")
    filled_quick.ok("node", "set", "edge-1", "--disable")
    filled_quick.ok("node", "set", "edge-2", "--status", "maintenance")
    assert "no online nodes" in filled_quick.refused(3, "create")
    assert filled_quick.store.releases.page().total == 3


@pytest.mark.parametrize(("payload", "message"), [
    (b"[]", "payload must be a JSON object"), (b'{"version": 9}', "payload names version 9"),
    (b'{"a": 1,}', "is not JSON"), (b"", "is not JSON"), (b"\xff", "not UTF-8"), (b'{"a": NaN}', "NaN is not JSON"),
    (b'{"a": 1, "a": 2}', "'a' stands twice"), (b"[" * 100_000, "nested too deep"), (None, "no such file"),
])
def test_a_payload_that_cant_be_used_is_refused_and_nothing_is_written(filled_quick, payload, message):
    path = f"{filled_quick.folder}/none.json" if payload is None else filled_quick.file("payload.json", payload)
    assert message in filled_quick.refused(2, "create", "--payload", path)
    assert filled_quick.store.releases.page().total == 3


def test_a_payload_comes_from_a_file_or_standard_input(filled):
    filled.ok("create", "--payload", filled.file("payload.json", '{"sites": ["\u00e9"]}'))
    filled.ok("create", "--payload", "-", stdin='{"version": 5}')
    assert [filled.store.releases.get(number).payload for number in (5, 4)] == [
        '{"version":5}', '{"sites":["\u00e9"]}']


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (("node", "add", "a", "10.0.0.300"), 2, "'10.0.0.300' is neither an IP address nor a host name"),
    (("node", "add", "a", "10.0.0.1:8443"), 2, "is neither an IP address nor a host name"),
    (("node", "add", "a", "10.0.0.1", "--port", "65536"), 2, "'65536' must be a whole number from 1 to 65535"),
    (("node", "add", "edge-1", "10.0.0.9"), 3, "node edge-1 exists already"),
    (("node", "add", "", "10.0.0.9"), 2, "name is empty: 1 to 100"),
    (("node", "add", "a", "10.0.0.9", "--label", "eu"), 2, "--label eu must be K=V"),
    (("node", "add", "a", "10.0.0.9", "--label", b"k=\xff"), 2, "not UTF-8"),
    (("node", "set", b"\xff", "--disable"), 2, "not UTF-8"),
    (("node", "set", "edge-1"), 2, "nothing to change"),
    (("node", "set", "edge-1", "--rename", "edge-2"), 3, "node edge-2 exists already"),
    (("node", "set", "edge-1", "--ip", "10.9.9.9"), 3, "node edge-1 is part of release 3"),
    (("status", "seven"), 2, "'seven' is not a release"),
    (("create", "--target", "a b"), 2, "target must be"),
    (("create", "--reason", "x" * 501), 2, "reason must be a text of at most 500"),
])
def test_a_value_that_cant_be_used_is_refused_in_one_line(filled_quick, arguments, code, message):
    before = filled_quick.store.nodes.page()
    assert message in filled_quick.refused(code, *(os.fsdecode(a) if isinstance(a, bytes) else a for a in arguments))
    assert (filled_quick.store.nodes.page(), filled_quick.store.releases.page().total) == (before, 3)


@pytest.mark.parametrize(("content", "message"), [
    ("new-1 10.0.0.1\nedge-1 10.0.0.2\n", "node edge-1 exists already"),
    ("new-1 10.0.0.1\nnew-1 10.0.0.2\n", "node new-1 is in the file twice"),
    ("new-1 10.0.0.1\nnew-2 nowhere!\n", "node 2: mainIp"),
    ("new-1 10.0.0.1 70000\n", "node 1: agentPort 70000"),
    ("new-1 10.0.0.1 \u00b2\n", "is not NAME IP [PORT [PROTOCOL]]"),
    ("new-1 10.0.0.1 " + "9" * 5000, "is not NAME IP [PORT [PROTOCOL]]"),
    ("new-1 10.0.0.1 80 http\n", "node 1: agentProtocol 'http' must be one of tasks, execute"),
    ("new-1\n", "'new-1' is not NAME IP [PORT [PROTOCOL]]"),
    ('[{"name": "new-1", "mainIp": "10.0.0.1"}, {"name": "new-2"}]', "node 2: mainIp is missing"),
    ('[{"name": "new-1", "mainIp": "10.0.0.1", "ip": "x"}]', "node 1: ip is not a known key"),
    ('[{"name": "new-1", "mainIp": "10.0.0.1"}, 5]', "must be an array of objects"),
    ('{"name": "new-1", "mainIp": "10.0.0.1"}', "must be an array of objects"),
    ('[{"name": ', "is not JSON"), (b"\xff\xfe", "not UTF-8"),
])
def test_an_import_that_cant_be_used_adds_no_node_at_all(filled_quick, content, message):
    code = 3 if "exists" in message or "twice" in message else 2
    assert message in filled_quick.refused(code, "node", "import", filled_quick.file("nodes", content))
    assert filled_quick.store.nodes.page().total == 2


def test_nodes_are_imported_from_lines_or_json(quick):
    lines = "\ufeff# name ip port protocol\n\nedge-1 10.0.0.1\r\nedge-2,10.0.0.2,9090,execute # old\n"
    assert quick.ok("node", "import", quick.file("nodes.txt", lines)).out == "nodes added: 2\n"
    document = json.dumps([{"name": "edge-3", "mainIp": "::1", "labels": {"region": "eu"}, "enabled": False}])
    quick.ok("node", "import", quick.file("nodes.json", "\ufeff" + document))
    nodes = [(n["name"], n["mainIp"], n["agentPort"], n["agentProtocol"], n["labels"], n["enabled"])
             for n in quick.ok("node", "list", "--json").json["items"]]
    assert nodes == [("edge-1", "10.0.0.1", 8443, "tasks", {}, True),
                     ("edge-2", "10.0.0.2", 9090, "execute", {}, True),
                     ("edge-3", "::1", 8443, "tasks", {"region": "eu"}, False)]


def harm_database(cli: Cli, how: str) -> str:
    """Make a database that can't be used; return its URL."""
    path = f"{cli.folder}/bad.db"
    if how == "not a database":
        cli.file("bad.db", "plain text, and more of it than a page header needs\n" * 20)
    elif how == "a folder":
        os.mkdir(path)
    elif how == "no folder":
        path = f"{cli.folder}/none/bad.db"
    elif how == "newer schema":
        with contextlib.closing(rc.Database(f"sqlite:///{path}")) as database:
            database.migrate()
            with database.transaction(write=True) as tx:
                tx.execute("INSERT INTO schema_version (version) VALUES (99)")
    elif how == "other tables":
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE customers (id INTEGER)")
    return f"sqlite:///{path}"


@pytest.mark.parametrize(("how", "message"), [
    ("not a database", "is not an SQLite file"), ("a folder", "can't be opened"),
    ("no folder", "none does not exist"), ("newer schema", "has schema 99, newer than this program's"),
    ("other tables", "holds other tables"),
])
def test_a_database_that_cant_be_used_is_told_in_one_line_by_every_way_in(quick, how, message):
    url = harm_database(quick, how)
    assert message in Cli(quick.folder).refused(69, "--db", url, "list")
    for arguments in (("list",), ("node", "add", "a", "10.0.0.1"), ("run-once",), ("migrate",), ("serve",)):
        assert message in quick.refused(69, "--db", url, *arguments)
    check = quick("check", "--db", url, "--json")
    assert check.code in (2, 69)
    assert any(message in item["message"] and not item["ok"] for item in check.json["items"])


def test_a_database_that_is_read_only_says_what_it_needs(filled):
    if os.geteuid() == 0:
        if not shutil.which("setpriv") or subprocess.run([*AS_OTHERS, "true"], check=False).returncode:
            leave_out("setpriv, to obey permissions as root")
        filled.prefix = AS_OTHERS
    filled.store.database.close()
    path = filled.folder / "releasectl.db"
    path.chmod(0o444)
    filled.folder.chmod(0o555)
    try:
        for arguments in (("pause", 3), ("node", "add", "a", "10.0.0.1"), ("run-once",)):
            message = filled.refused(69, *arguments)
            assert "read-only: give this user write permission" in message
        path.chmod(0)
        assert "can't be opened: look at the permissions" in filled.refused(69, "list")
    finally:
        filled.folder.chmod(0o755)
        path.chmod(0o644)


@pytest.mark.parametrize(("setting", "value", "message"), [
    ("AGENT_RETRIES", "two", "AGENT_RETRIES=two can't be used: must be a whole number from 0 to 100"),
    ("DATABASE_URL", "mysql://u:hunter2@h/d", "DATABASE_URL=mysql://u:***@h/d can't be used: must be"),
    ("HTTP_ADDR", "8080", "HTTP_ADDR=8080 can't be used: must be ADDRESS:PORT"),
    ("HTTP_CERT", "/etc/x.crt", "HTTP_CERT and HTTP_KEY go together"),
])
def test_a_config_value_that_cant_be_used_stops_the_start_with_one_line(quick, setting, value, message):
    quick.settings[setting] = value
    for command in ("list", "serve", "run-once", "check"):
        assert message in quick.refused(2, command)


@pytest.fixture
def in_etc(quick, monkeypatch):
    """A command line whose DEFAULT_CONFIG lies in a folder of its own; nothing names another file."""
    monkeypatch.setattr(rc, "DEFAULT_CONFIG", str(quick.folder / "etc" / "releasectl.conf"))
    (quick.folder / "etc").mkdir()
    quick.settings[rc.CONFIG_VARIABLE] = ""
    return quick


def test_settings_come_from_the_file_that_config_names_else_the_variable_else_from_etc(in_etc):
    for name in ("etc/releasectl.conf", "named.conf", "option.conf"):
        in_etc.file(name, f"DATABASE_URL=sqlite:///{Path(name).name}.db\n")

    def database(*options: str) -> str:
        return in_etc.ok(*options, "migrate").out.split()[1]

    assert database() == "releasectl.conf.db:"
    in_etc.settings[rc.CONFIG_VARIABLE] = "named.conf"
    assert database() == "named.conf.db:"
    assert database("--config", "option.conf") == "option.conf.db:"


def test_without_a_file_in_etc_all_settings_have_their_defaults(in_etc):
    assert in_etc.ok("migrate").out.split()[1] == "releasectl.db:"


def test_a_settings_file_that_cant_be_read_never_means_another_database(in_etc):
    in_etc.ok("migrate")
    path = in_etc.folder / "etc" / "releasectl.conf"
    path.mkdir()
    assert f"{path} can't be read: is a directory" in in_etc.refused(2, "list")
    path.rmdir()
    path.symlink_to("releasectl.conf")  # nobody can tell what is there: as in a folder that is closed to this user
    assert f"{path} can't be read: " in in_etc.refused(2, "list")
    in_etc.settings[rc.CONFIG_VARIABLE] = "none.conf"
    assert "none.conf can't be read: no such file" in in_etc.refused(2, "list")


def test_check_names_the_file_and_the_variables_that_settings_come_from(in_etc):
    in_etc.file("etc/releasectl.conf", "DATABASE_URL=sqlite:///not-this.db\nMTLS_ENABLED=0\nLOG_LEVEL=debug\n")
    in_etc.settings = {rc.CONFIG_VARIABLE: "", "LOG_LEVEL": "info"}
    in_etc.ok("--db", "sqlite:///r.db", "migrate")
    found = findings(in_etc.ok("--db", "sqlite:///r.db", "check", "--json"))
    assert found["settings"] == (True, f"valid; from {in_etc.folder}/etc/releasectl.conf: MTLS_ENABLED; "
                                       "from the environment: LOG_LEVEL; from --db: DATABASE_URL; "
                                       "all others have their defaults")


def test_a_config_file_that_cant_be_used_stops_the_start_with_its_line(quick):
    path = quick.file("ours.conf", "AGENT_RETRIES=1\nAGENT_RETRYS=1\n")
    assert f"{path}:2: AGENT_RETRYS is not a setting (did you mean AGENT_RETRIES?)" in quick.refused(
        2, "list", "--config", path)
    assert "can't be read: no such file" in quick.refused(2, "--config", "none.conf", "list")


@pytest.mark.parametrize(("change", "message"), [
    ({"CONTROL_KEY": "agents/" + ADDRESSES[0] + ".key"}, "does not fit CONTROL_KEY"),
    ({"CONTROL_CERT": "none.crt"}, "CONTROL_CERT .*none.crt can't be read: no such file"),
    ({"CONTROL_CA": "control.key"}, "CONTROL_CA .* holds no PEM certificate"),
    ({"CONTROL_CERT": ""}, "CONTROL_CERT is not set"),
])
def test_certificates_that_cant_be_used_dispatch_nothing(fleet_cli, change, message):
    release = new_release(fleet_cli.world.store)
    fleet_cli.settings.update({k: v and f"{fleet_cli.world.certs}/{v}" for k, v in change.items()})
    assert re.search(message, Quick.refused(fleet_cli, 2, "run-once"))
    assert fleet_cli.world.store.releases.get(release.id).status == "pending"
    assert fleet_cli.world.runs() == [0, 0, 0]


def test_a_password_in_the_url_never_shows(quick):
    url = "postgresql://rele:hun%24ter2@127.0.0.1:1/none?connect_timeout=2"
    if not DRIVERS:
        leave_out("a PostgreSQL driver")
    quick.settings.update(DATABASE_URL=url, LOG_FORMAT="json", RELEASE_EXECUTOR_ENABLED="0")
    shown = [quick(*arguments) for arguments in (
        ("list",), ("migrate", "--json"), ("check",), ("serve",), ("node", "list", url), ("status", url),
        ("--db", url + "&password=hun$ter2", "list"))]
    assert {result.code for result in shown} == {2, 69}
    for result in shown:
        assert "ter2" not in result.out + result.err
        assert "Traceback" not in result.err


# -- following a release to its end ------------------------------------------------------------

@pytest.mark.parametrize(("outcome", "code"), [("success", 0), ("failed", 1)])
def test_watch_and_create_wait_follow_a_release_to_its_end(fleet_cli, outcome, code):
    fleet_cli.world.agent(1).set(outcome=outcome)
    executor = fleet_cli.world.executor()
    create = fleet_cli.start("create", "--wait", "--json")
    eventually(lambda: fleet_cli.world.store.releases.page().total)
    watch = fleet_cli.start("watch", 1)
    assert "release 1 (v1): created" in create.stderr.readline()
    assert "release 1 (v1): pending" in watch.stderr.readline()
    executor.drain()
    created, watched = Cli.end(create), Cli.end(watch)
    assert (created.code, created.json["release"]["status"]) == (code, outcome)
    assert (watched.code, watched.out.startswith(f"release 1 (v1): {outcome}")) == (code, True)


def test_retry_wait_follows_the_new_release(fleet_cli):
    fleet_cli.world.agent(1).set(outcome="failed")
    new_release(fleet_cli.world.store)
    fleet_cli.world.drain()
    fleet_cli.world.agent(1).set(outcome="success")
    retry = fleet_cli.start("retry", 1, "--wait", "--json")
    eventually(lambda: fleet_cli.world.store.releases.page().total == 2)
    fleet_cli.world.drain()
    result = Cli.end(retry)
    assert (result.code, result.json["release"]["retryOf"], result.json["release"]["totalNodes"]) == (0, 1, 3)


def test_an_interrupted_watch_ends_without_a_stack_trace(filled):
    watch = filled.start("watch", 3)
    assert "pending" in watch.stderr.readline()
    watch.send_signal(signal.SIGINT)
    assert Cli.end(watch).code == 130


# -- standard output that goes away ------------------------------------------------------------

def test_a_reader_that_goes_away_is_no_error(filled):
    with filled.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status_reason = ?", "x" * 100_000)
    process = filled.start("list", "--json")
    assert process.stdout.read(1) == "{"
    process.stdout.close()
    assert (process.wait(TIMEOUT_S), process.stderr.read()) == (0, "")
    process.stderr.close()


def test_a_full_disk_under_standard_output_is_told_in_one_line(filled):
    if not os.path.exists("/dev/full"):
        leave_out("/dev/full")
    with open("/dev/full", "w") as full:
        _, err = filled.start("list", stdout=full).communicate(timeout=TIMEOUT_S)
    assert err == "releasectl: standard output can't be written: no space left on device\n"


def test_names_of_all_the_world_are_printed_in_utf_8_under_any_locale(filled):
    filled.settings.update(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    process = subprocess.run([sys.executable, PROGRAM, "node", "add", "\u043a\u0440\u0430\u0439", "10.0.0.1", "--json"],
                             cwd=filled.folder, env={**filled.environment, "LC_ALL": "C.UTF-8"},
                             capture_output=True, check=False, timeout=TIMEOUT_S)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.decode("utf-8"))["name"] == "\u043a\u0440\u0430\u0439"


# -- check -------------------------------------------------------------------------------------

def test_check_finds_nothing_wrong_where_all_is_well(fleet_cli):
    result = fleet_cli.ok("check", "--json")
    found = findings(result)
    assert all(ok for ok, _ in found.values()), found
    assert "is good until 20" in found["CONTROL_CERT"][1]
    assert {"settings", "CONTROL_KEY", "DATABASE_URL"} <= set(found)
    assert found["agents"] == (True, "3 of 3 nodes reachable")  # counted, not listed
    shown = fleet_cli.ok("check").out
    assert "WRONG" not in shown
    assert shown.endswith(f"all {len(result.json['items'])} checks passed\n")


def test_check_says_what_is_wrong_and_how_to_mend_it(fleet_cli, tmp_path):
    certs = Path(shutil.copytree(fleet_cli.world.certs, tmp_path / "copy"))
    (certs / "control.key").chmod(0o644)
    fleet_cli.settings.update(mtls(certs), API_TOKENS_FILE=fleet_cli.file("tokens", "x"))
    os.chmod(tmp_path / "tokens", 0o644)
    fleet_cli.world.agent(2).set(mode="refuse")
    result = fleet_cli("check", "--json")
    found = findings(result)
    assert result.code == 2
    for subject, words in (("CONTROL_KEY", "chmod o-rwx"), ("API_TOKENS_FILE", "chmod o-rwx"),
                           ("node edge-2", "connection refused")):
        assert (found[subject][0], words in found[subject][1]) == (False, True)
    assert found["CONTROL_CERT"][0]
    assert found["agents"] == (True, "2 of 3 nodes reachable")
    failed = [subject for subject, (ok, _) in found.items() if not ok]
    assert fleet_cli("check").out.endswith(f"{len(failed)} of {len(found)} checks failed\n")
    fleet_cli.world.fleet.set(mode="refuse")
    assert findings(fleet_cli("check", "--json"))["agents"] == (False, "0 of 3 nodes reachable")


def test_check_tells_that_little_room_is_left_for_the_database(quick, monkeypatch):
    quick.settings["MTLS_ENABLED"] = "0"
    quick.ok("migrate")
    assert "disk" not in findings(quick("check", "--json"))
    usage = shutil.disk_usage(quick.folder)
    monkeypatch.setattr(rc.shutil, "disk_usage", lambda _: usage._replace(free=100 * 2**20))
    result = quick("check", "--json")
    assert result.code == 1
    assert findings(result)["disk"][1].startswith(f"100 MiB left in {quick.folder}: without room nothing is dispatched")


@pytest.mark.parametrize(("days", "is_ok", "words"), [("-1", False, "expired"), ("5", True, "renew it now")])
def test_check_tells_a_certificate_that_expired_or_soon_will(quick, tmp_path, days, is_ok, words):
    if not shutil.which("openssl"):
        leave_out("openssl")
    certs = make_certs(tmp_path / "certs", "127.0.0.1", DAYS=days)
    pair = certs / "agents" / "127.0.0.1"
    quick.settings.update(mtls(certs), HTTP_CERT=f"{pair}.crt", HTTP_KEY=f"{pair}.key")
    quick.ok("migrate")
    found = findings(quick("check", "--json"))
    for subject in ("CONTROL_CERT", "HTTP_CERT"):
        assert (subject, found[subject][0], words in found[subject][1]) == (subject, is_ok, True), found


def test_check_without_a_database_says_how_to_make_one(quick, certs):
    quick.settings.update(mtls(certs))
    result = quick("check", "--json")
    assert result.code == 69
    assert "releasectl migrate" in findings(result)["DATABASE_URL"][1]
    quick.settings.update(CONTROL_CA=f"{certs}/other/ca.crt")
    assert findings(quick("check", "--json"))["CONTROL_CERT"][0] is False


# -- serve -------------------------------------------------------------------------------------

def test_75_when_a_drain_was_told_to_end_before_its_release_was_at_its_end(fleet_cli):
    fleet_cli.world.agent(1).set(task_ms=60_000)
    release = new_release(fleet_cli.world.store)
    drain = fleet_cli.start("run-once", "--drain")
    eventually(lambda: statuses(fleet_cli.world.store, release.id)[0] == "running")
    drain.send_signal(signal.SIGTERM)
    _, said = drain.communicate(timeout=60)
    assert drain.returncode == 75
    assert "releases that have not ended: 1: try later" in said
    assert fleet_cli.world.store.releases.get(release.id).claim_expires_at is None


def test_a_signal_that_interrupts_who_holds_a_lock_still_stops():
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, *rc.STOP_SIGNALS)}
    lock, stopped = threading.Lock(), threading.Event()

    def stop():
        if lock.acquire(timeout=3):
            stopped.set()

    try:
        rc._handle_signals(stop, lambda: None)
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.wait(60)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_process_takes_as_many_descriptors_as_the_host_allows(fleet_cli):
    fleet_cli.world.agent(1).set(task_ms=60_000)
    release = new_release(fleet_cli.world.store)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        drain = fleet_cli.start("run-once", "--drain")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    eventually(lambda: statuses(fleet_cli.world.store, release.id)[0] == "running")
    assert resource.prlimit(drain.pid, resource.RLIMIT_NOFILE) == (before[1], before[1])
    drain.terminate()
    drain.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_runs_releases_until_it_is_told_to_end_and_ends_cleanly(fleet_cli, number):
    port = free_port()
    fleet_cli.settings["HTTP_ADDR"] = f"127.0.0.1:{port}"
    serve = fleet_cli.start("serve")
    try:
        eventually(lambda: answers(port), message="serve does not answer")
        fleet_cli.ok("create")
        store = fleet_cli.world.store
        eventually(lambda: store.releases.get(1).is_terminal)
        fleet_cli.world.agent(1).set(task_ms=60_000)
        release = new_release(store)
        eventually(lambda: store.releases.with_nodes(release.id)[1][0].status == "running")
        store.database.close()  # serve is the last to have it open
        told = time.monotonic()
        serve.send_signal(number)
        result = Cli.end(serve)
        assert not Path(store.database.engine.path + "-wal").exists()  # a copy of the one file has all
    finally:
        serve.kill()
    assert time.monotonic() - told < 8
    assert (result.code, result.out) == (0, "")
    assert result.err.splitlines()[-1].endswith("info: stopped")
    assert store.releases.get(1).status == "success"
    assert store.releases.get(release.id).claim_expires_at is None
    assert store.claims.scan()[0] == [release.id]


def test_serve_with_the_executor_off_serves_the_api_only(fleet_cli):
    port = free_port()
    fleet_cli.settings.update(HTTP_ADDR=f"127.0.0.1:{port}", RELEASE_EXECUTOR_ENABLED="0", LOG_FORMAT="json")
    new_release(fleet_cli.world.store)
    serve = fleet_cli.start("serve")
    try:
        eventually(lambda: answers(port), message="serve does not answer")
        serve.terminate()
        result = Cli.end(serve)
    finally:
        serve.kill()
    lines = [json.loads(line) for line in result.err.splitlines()]
    assert "executor off (RELEASE_EXECUTOR_ENABLED=0)" in lines[0]["message"]
    assert set(lines[0]) == {"at", "level", "thread", "message"}
    assert (result.code, fleet_cli.world.store.releases.get(1).status) == (0, "pending")


def test_serve_refuses_a_port_that_is_taken_and_an_address_open_to_others(cli):
    cli.settings["MTLS_ENABLED"] = "0"
    with socket.create_server(("127.0.0.1", 0)) as other:
        cli.settings["HTTP_ADDR"] = f"127.0.0.1:{other.getsockname()[1]}"
        assert "can't be listened on: address already in use" in cli.refused(2, "serve")
    cli.settings["HTTP_ADDR"] = "0.0.0.0:0"
    assert "set API_TOKENS_FILE, or listen on 127.0.0.1" in cli.refused(2, "serve")


def test_without_mutual_tls_every_start_warns(cli):
    cli.settings["MTLS_ENABLED"] = "0"
    result = cli.ok("run-once")
    assert (result.out, "warning: MTLS_ENABLED=0" in result.err) == ("", True)


# -- two at once -------------------------------------------------------------------------------

def test_two_processes_at_the_same_time_run_each_task_once(cli, world):
    world.nodes(4, task_ms=100)
    cli.settings.update(mtls(world.certs), DATABASE_URL=world.url)
    releases = [new_release(world.store) for _ in range(2)]
    first, second = cli.start("run-once", "--drain"), cli.start("run-once", "--drain")
    codes = {Cli.end(first).code, Cli.end(second).code}
    assert codes <= {0, 75}
    assert 0 in codes
    cli.ok("run-once", "--drain")
    for release in releases:
        assert world.store.releases.get(release.id).status == "success"
        assert_books_balance(world.store, release.id)
    assert world.runs() == [2, 2, 2, 2]
    for number in range(1, 5):
        agent = world.agent(number)
        assert (agent.overlaps, set(agent.run_counts.values())) == (0, {1})


@pytest.mark.slow
def test_a_new_database_may_be_made_by_many_at_the_same_time(cli, database_url):
    several = [cli.start("node", "add", f"edge-{n}", f"10.0.0.{n}", "--db", database_url) for n in range(1, 5)]
    assert [Cli.end(process).code for process in several] == [0, 0, 0, 0]
    assert cli.ok("node", "list", "--db", database_url, "--json").json["total"] == 4
    before_and_after = cli.ok("migrate", "--db", database_url, "--json").json
    assert before_and_after == {"before": len(rc.schema_steps()), "after": len(rc.schema_steps())}


# -- steering (contract section 7) -------------------------------------------------------------------

def test_create_takes_a_strategy_by_options_and_plan_shows_it_before(filled_quick):
    options = ("--batches", "1,50%", "--max-failed", "10%", "--max-failed-total", "1", "--max-parallel", "2",
               "--soak", "5m", "--pause-after", "1", "--on-exceed", "pause", "--node-deadline", "1h", "--retries", "0",
               "--start-at", "2999-01-01T00:00:00Z", "--verify-url", "http://{main_ip}:8080/health",
               "--verify-successes", "2")
    plan = filled_quick.ok("create", *options, "--plan", "--json").json
    assert plan == {"version": 4, "totalNodes": 2, "maxFailedTotal": 1, "maxParallel": 2, "leftOut": [], "notChosen": 0,
                    "emptied": [], "maxParallelPer": {}, "warnings": [], "superseded": [], "approval": "",
                    "duringFreeze": False, "payloadOf": None, "soakSec": 300, "preflight": None,
                    "pauseAfter": [1], "onExceed": "pause", "startAt": "2999-01-01T00:00:00.000Z",
                    "effect": plan["effect"],
                    "verify": {"url": "http://{main_ip}:8080/health", "status": 200, "timeoutSec": 5, "successes": 2,
                               "host": "", "contains": ""},
                    "batches": [{"batch": 1, "nodeIds": [1], "nodeNames": ["edge-1"], "maxFailed": 0, "tolerated": 0,
                                 "group": ""},
                                {"batch": 2, "nodeIds": [2], "nodeNames": ["edge-2"], "maxFailed": 0, "tolerated": 0,
                                 "group": ""}], "retries": 0, "nodeDeadlineSec": 3600}
    text = filled_quick.ok("create", *options, "--plan", "--utc").out
    for line in ("1      1      0         edge-1", "more failures: it pauses", "soaks after each batch: 300 s",
                 "pauses after batch: 1", "tries of a request after the first: 0", "a node has: 3600 s",
                 "each node is probed at: http://{main_ip}:8080/health",
                 "starts no earlier than: 2999-01-01 00:00Z\n", plan["effect"]["text"]):
        assert line in text
    assert filled_quick.store.releases.page().total == 3
    filled_quick.ok("create", *options)
    assert rc.parse_json(filled_quick.store.releases.get(4).strategy) == {
        "batches": [1, "50%"], "maxFailed": "10%", "maxFailedTotal": 1, "maxParallel": 2, "soakSec": 300,
        "pauseAfter": [1], "onExceed": "pause", "nodeDeadlineSec": 3600, "retries": 0,
        "startAt": "2999-01-01T00:00:00Z",
        "verify": {"url": "http://{main_ip}:8080/health", "successes": 2}}


def test_a_plan_says_where_more_tries_are_wanted_than_a_node_has_time_for(filled_quick):
    def warnings(*options: str) -> list[str]:
        return filled_quick.ok("create", *options, "--plan", "--json").json["warnings"]

    assert warnings("--retries", "99", "--node-deadline", "300") == [
        "retries 99 do not fit into the 300 s that a node has (nodeDeadlineSec): it fails before the last one"]
    assert warnings("--retries", "5", "--node-deadline", "7")[0].startswith("retries 5 do not fit into the 7 s")
    assert warnings("--retries", "99", "--node-deadline", "1h") == []
    assert warnings("--retries", "40", "--node-deadline", "300") == []
    assert warnings("--retries", "99") == []  # NODE_DEADLINE_SEC is for whoever sends it to know


def test_create_goes_to_the_nodes_that_are_named_or_labelled(filled_quick):
    filled_quick.ok("node", "set", "edge-2", "--label", "region=eu")
    assert filled_quick.ok("create", "--label", "region=eu", "--json").json["batches"] == [
        {"batch": 1, "nodeIds": [2]}]
    assert filled_quick.ok("create", "--node", "edge-1", "--json").json["totalNodes"] == 1
    filled_quick.ok("node", "set", "edge-2", "--status", "maintenance")
    assert "left out: edge-2 is in maintenance" in filled_quick.ok("create", "--plan").out
    refused = filled_quick("create", "--node", "edge-2")
    assert (refused.code, "node edge-2 is in maintenance" in refused.err) == (2, True)


@pytest.mark.parametrize(("options", "named"), [
    (("--batches", "1,x"), "batches"), (("--max-failed", "many"), "maxFailed"), (("--soak", "5 minutes"), "--soak"),
    (("--verify-status", "200"), "verify"), (("--on-exceed", "stop"), "onExceed"), (("--start-at", "now"), "startAt")])
def test_an_option_that_can_not_be_meant_is_refused_by_name(filled_quick, options, named):
    refused = filled_quick("create", *options)
    assert (refused.code, named in refused.err) == (2, True), refused.err
    assert filled_quick.store.releases.page().total == 3


def test_the_freeze_can_be_set_seen_and_lifted(filled_quick):
    assert filled_quick("freeze", "on").code == 2  # without a reason
    assert filled_quick("freeze", "--reason", "x").code == 2
    filled_quick.ok("freeze", "on", "--reason", "holidays")
    assert "holidays" in filled_quick.ok("freeze").out
    assert "frozen: holidays" in filled_quick.ok("list").out
    assert filled_quick.ok("run-once").out == ""
    assert filled_quick.ok("freeze", "off", "--json").json["frozen"] is False
    assert filled_quick.ok("freeze").out.strip() == "not frozen"


def test_verbs_take_a_reason_force_and_accepted_failures(filled_quick):
    filled_quick.ok("cancel", "3", "--force", "--reason", "wrong payload")
    assert "wrong payload" in filled_quick.ok("events", "3").out
    filled_quick.ok("retry", "3", "--reason", "again")
    assert filled_quick.store.releases.get(4).reason == "again"
    filled_quick.ok("pause", "4")
    filled_quick.ok("resume", "4", "--accept-failures")


# -- watch ----------------------------------------------------------------------------------------------

def test_watch_without_an_id_follows_the_newest_and_ends_at_its_end(filled_quick):
    filled_quick.ok("cancel", "3")
    ended = filled_quick("watch")
    assert (ended.code, "release 3 (v3): cancelled" in ended.out) == (1, True)
    assert filled_quick("watch", "latest").code == 1
    assert filled_quick("watch", "1").code == 0


def test_watch_gives_up_with_75_when_its_time_is_over(filled_quick):
    over = filled_quick("watch", "3", "--timeout", "0.2")
    assert (over.code, over.out) == (75, "")
    assert filled_quick("watch", "3", "--timeout", "0", "--json").json["release"]["id"] == 3
    assert filled_quick("create", "--timeout", "1").code == 2
    assert "release 3 is still pending (no executor is running" in over.err


def test_watch_until_paused_or_until_a_batch_is_done(filled_quick):
    filled_quick.ok("pause", "3")
    assert filled_quick("watch", "3", "--until", "paused").code == 0
    with filled_quick.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'success' WHERE release_task_id = 3 AND batch = 1")
    assert filled_quick("watch", "3", "--until", "batch=1").code == 0
    assert filled_quick("watch", "3", "--until", "batch=2", "--timeout", "0.2").code == 75
    assert filled_quick("watch", "3", "--until", "lunch").code == 2


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps what was written."""

    def __init__(self):
        super().__init__()
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_watch_draws_batches_counts_and_failures_in_a_terminal(filled_quick, monkeypatch, no_colour):
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setenv("TERM", "xterm")
    store, stream = filled_quick.store, Terminal()
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'failed', error_msg = 'boom' "
                   "WHERE release_task_id = 2 AND node_id = 1")
        tx.execute("UPDATE release_tasks SET failed_nodes = 1 WHERE id = 2")
    screen = rc.Screen(stream)
    screen.show(store.releases.progress(2))
    screen.show(store.releases.progress(2))
    assert "batch   1      0 of 1" in stream.text
    assert "1 other: boom (edge-1)" in stream.text
    assert ("\x1b[31m" in stream.text) == (no_colour == "")
    height = stream.text.split("\x1b[J")[0].count("\n")
    assert f"\x1b[{height}A" in stream.text  # the second picture is drawn over the first


@pytest.mark.parametrize("columns", [10, 30, 80, 200])
def test_no_line_of_watch_is_wider_than_the_terminal(filled_quick, monkeypatch, columns):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    store, stream = filled_quick.store, Terminal()
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'failed', error_msg = ? WHERE release_task_id = 2",
                   "\u8fb9\u7f18\u8282\u70b9" * 30)
        tx.execute("UPDATE release_tasks SET failed_nodes = total_nodes, status_reason = ? WHERE id = 2",
                   "waiting for \u8fb9\u7f18" + "e\u0301" * 100)
    screen = rc.Screen(stream)
    screen.show(store.releases.progress(2))
    screen.say("the database is away " * 20)
    lines = re.sub(r"\x1b\[[0-9]*[A-Z]|\r", "", stream.text).splitlines()
    assert max(map(rc.columns_of, lines)) in range(columns - 2, columns)


def test_columns_of_a_table_line_up_under_wide_characters():
    lines = rc.Display().table([("\u8fb9\u7f18", "x"), ("edge-1", "y")], ("name", "is")).splitlines()
    assert {rc.columns_of(line[:re.search("[xy]$|IS$", line).start()]) for line in lines} == {8}


def test_watch_survives_a_database_that_is_away_for_a_while(filled_quick, monkeypatch):
    filled_quick.ok("cancel", "3")
    real, calls = rc.Releases.progress, []

    def progress(self, *arguments):
        calls.append(1)
        if len(calls) < 3:
            raise rc.DatabaseError("database x is locked")
        return real(self, *arguments)
    monkeypatch.setattr(rc.Releases, "progress", progress)
    ended = filled_quick("watch", "3")
    assert (ended.code, ended.err.count("is locked")) == (1, 1)


def test_create_wait_follows_a_release_over_real_agents(fleet_cli):
    watching = fleet_cli.start("create", "--wait", "--timeout", "60", "--batches", "1,1")
    try:
        eventually(lambda: fleet_cli.world.store.releases.page().total)
        fleet_cli.ok("run-once", "--drain")
        done = Cli.end(watching)
    finally:
        watching.kill()
    assert (done.code, "3 nodes succeeded" in done.out) == (0, True), done.err
    assert "created" in done.err


# -- a success is a success (issue 12) ------------------------------------------------------------------

SAMPLES = ("terminal", "5m", "90d", "1", "1,2", "edge-1", "tls,http", f"1:{64 * '0'}")


def sample_of(keywords: dict[str, Any]) -> str:
    """Return a value that an option takes."""
    if "choices" in keywords:
        return keywords["choices"][0]
    for text in SAMPLES:
        with contextlib.suppress(Exception):
            keywords.get("type", str)(text)
            return text
    raise AssertionError(f"no sample for {keywords}")


SINGLE_OPTIONS = [(command.name, flags[0], sample_of(keywords)) for command in rc.COMMANDS
                  for flags, keywords in (*command.options, *rc.COMMON_OPTIONS)
                  if flags[0].startswith("--") and "action" not in keywords]


@pytest.mark.slow
def test_an_option_of_one_value_is_refused_a_second_in_every_command(quick):
    """The last one would win silently: another target, file or host than meant."""
    assert len(SINGLE_OPTIONS) > 60
    for command, flag, value in SINGLE_OPTIONS:
        for twice in ((flag, value, flag, value), (f"{flag}={value}", flag, value)):
            refused = quick(*command.split(), *twice)
            assert (refused.code, refused.out) == (2, ""), (command, twice)
            assert f"{flag} is given twice" in refused.err, (command, twice, refused.err)
    assert os.listdir(quick.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--db", "--config"])
def test_neither_may_a_common_option_stand_before_and_behind_the_command(quick, flag):
    value = "sqlite:///a.db" if flag == "--db" else quick.file("a.conf", "LOG_LEVEL=info\n")
    for arguments in ((flag, value, "node", flag, value, "list"), (flag, value, "node", "list", flag, value),
                      (flag, value, flag, value, "migrate"), (flag, value, "migrate", f"{flag}={value}")):
        assert f"{flag} is given twice" in quick.refused(2, *arguments)
    quick.ok(flag, value, "migrate")
    quick.ok("--json", "migrate", "--json")  # it says the same twice


@pytest.mark.parametrize("labels", [("region=eu", "region=us"), ("region=eu", "rack=1", "region=eu")])
@pytest.mark.parametrize("words", ["create", "create --plan", "node add edge-9 10.0.0.9", "node set edge-1"])
def test_a_label_that_is_given_twice_is_refused_and_nothing_is_written(filled_quick, words, labels):
    filled_quick.store.nodes.update(1, {"labels": '{"region":"us","rack":"1"}'})
    before = filled_quick.store.nodes.page()
    options = [option for label in labels for option in ("--label", label)]
    assert "--label region is given twice" in filled_quick.refused(2, *words.split(), *options)
    assert (filled_quick.store.nodes.page(), filled_quick.store.releases.page().total) == (before, 3)


def test_other_options_that_may_be_repeated_are_refused_the_same_twice(filled_quick):
    assert "different" in filled_quick.refused(2, "create", "--node", "edge-1", "--node", "edge-1")
    assert filled_quick.store.releases.page().total == 3


@pytest.mark.parametrize("words", ["node add edge-9 10.0.0.9", "node set edge-1"])
def test_enable_and_disable_exclude_each_other_in_either_order(filled_quick, words):
    before = filled_quick.store.nodes.page()
    for options in (("--enable", "--disable"), ("--disable", "--enable"), ("--enable", "--enable", "--disable")):
        assert f"{options[-1]} contradicts another option" in filled_quick.refused(2, *words.split(), *options)
    assert filled_quick.store.nodes.page() == before
    filled_quick.ok(*words.split(), "--disable", "--disable")


NO_HOSTS = ("0.0.0.0", "::", "224.0.0.1", "239.255.255.255", "ff02::1", "255.255.255.255", "169.254.169.254", "fe80::1",
            "0.0.0.1", "::ffff:169.254.169.254", "::ffff:0.0.0.0", "::ffff:224.0.0.1", "0", "0x0", "0xA9FEA9FE",
            "169.254.43518", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376", "10.0.0.0x7")


@pytest.mark.parametrize("address", NO_HOSTS)
def test_an_address_that_is_no_hosts_is_refused_as_a_node(filled_quick, address):
    before = filled_quick.store.nodes.page()
    document = json.dumps([{"name": "edge-8", "mainIp": "10.0.0.8"}, {"name": "edge-9", "mainIp": address}])
    filled_quick.ok("cancel", "3")
    for arguments in (("node", "add", "edge-9", address), ("node", "set", "edge-1", "--ip", address),
                      ("node", "import", filled_quick.file("lines", f"edge-8 10.0.0.8\nedge-9 {address}\n")),
                      ("node", "import", filled_quick.file("json", document))):
        assert "mainIp" in filled_quick.refused(2, *arguments)
    assert filled_quick.store.nodes.page() == before


def test_an_ipv4_address_within_ipv6_is_stored_as_what_it_is(filled_quick):
    filled_quick.ok("cancel", "3")
    filled_quick.ok("node", "add", "edge-8", "::ffff:10.0.0.8")
    filled_quick.ok("node", "import", filled_quick.file("lines", "edge-9 ::FFFF:0a00:0009\n"))
    filled_quick.ok("node", "set", "edge-1", "--ip", "::ffff:a00:1")
    assert [n.main_ip for n in filled_quick.store.nodes.page().items] == [
        "10.0.0.1", ADDRESSES[1], "10.0.0.8", "10.0.0.9"]
    assert "edge-8 has the address 10.0.0.8:8443" in filled_quick.refused(3, "node", "add", "x", "10.0.0.8")


# -- exit 1 where too many failed, though nobody has ended the release ------------------------------------------

@pytest.mark.parametrize("command", [("run-once",), ("run-once", "--drain")])
def test_1_where_too_many_failures_paused_the_release(fleet_cli, command):
    fleet_cli.world.agent(1).set(outcome="failed", message="no disk space")
    release = new_release(fleet_cli.world.store, strategy={"onExceed": "pause", "retries": 0})
    result = fleet_cli(*command, "--json")
    assert (result.code, result.json["releases"][0]["status"]) == (1, "paused")
    for until in ("paused", "batch=1"):
        watched = fleet_cli("watch", release.id, "--until", until, "--timeout", "20", "--json")
        assert (watched.code, watched.json["release"]["status"]) == (1, "paused"), until
    fleet_cli.world.store.releases.act("resume", release.id, "anna", accept_failures=True)
    assert fleet_cli("run-once", "--drain").code == 1  # partial


def test_1_from_a_wait_that_was_there_when_too_many_failed(fleet_cli):
    fleet_cli.world.agent(1).set(outcome="failed")
    waits = [fleet_cli.start("create", "--on-exceed", "pause", "--retries", "0", "--wait", "--until", "paused",
                             "--timeout", "40")]
    eventually(lambda: fleet_cli.world.store.releases.page().total)
    waits.append(fleet_cli.start("watch", "1", "--until", "batch=1", "--timeout", "40"))
    assert fleet_cli("run-once", "--drain").code == 1
    assert [Cli.end(wait).code for wait in waits] == [1, 1]


def test_0_at_a_gate_that_was_planned_also_with_failures_that_are_tolerated(fleet_cli):
    fleet_cli.world.agent(1).set(outcome="failed")
    strategy = {"pauseAfter": [1], "maxFailed": 1, "retries": 0, "onExceed": "pause"}
    release = new_release(fleet_cli.world.store, strategy=strategy)
    for command in (("run-once", "--drain"), ("watch", release.id, "--until", "paused"),
                    ("watch", release.id, "--until", "batch=1")):
        result = fleet_cli(*command)
        assert (result.code, "paused" in result.out) == (0, True), command
    assert fleet_cli.world.store.releases.get(release.id).failed_nodes == 1
    fleet_cli.ok("resume", release.id)
    assert fleet_cli("run-once", "--drain").code == 1  # partial: not a success
    assert fleet_cli("watch", release.id).code == 1


def test_0_where_a_person_paused_a_release_with_nothing_wrong(fleet_cli):
    release = new_release(fleet_cli.world.store, strategy={"onExceed": "pause"})
    fleet_cli.ok("pause", release.id)
    assert fleet_cli("watch", release.id, "--until", "paused").code == 0
    assert fleet_cli("run-once", "--drain").code == 0


# -- retry and rollback ------------------------------------------------------------------------------------------

@pytest.fixture
def past_cli(quick, open_store, database_url):
    """A command line over three nodes and releases 1 good, 2 failed, 3 good, 4 failed; edge-3 is in maintenance."""
    quick.store = store = open_store(database_url)
    quick.settings["DATABASE_URL"] = database_url
    add_nodes(store, 3)
    for content, status in (("A", "success"), ("B", "failed"), ("C", "success"), ("D", "failed")):
        release = new_release(store, payload={"content": content})
        with store.database.transaction(write=True) as tx:
            tx.execute("UPDATE release_tasks SET status = ? WHERE id = ?", status, release.id)
            tx.execute("UPDATE release_task_nodes SET status = ?, attempts = 1 WHERE release_task_id = ?", status,
                       release.id)
    store.nodes.update(3, {"status": "maintenance"})
    return quick


@pytest.mark.parametrize(("verb", "source", "content"), [("retry", 4, "D"), ("rollback", 3, "C")])
def test_retry_and_rollback_tell_their_plan_and_who_is_left_out(past_cli, verb, source, content):
    text = past_cli.ok(verb, 4, "--plan").out
    assert f"sends: payload of release {source} (v{source})" in text
    assert "version: 5" in text
    assert "left out: edge-3 is in maintenance" in text
    plan = past_cli.ok(verb, 4, "--plan", "--json").json
    left_out = [{"nodeId": 3, "nodeName": "edge-3", "why": "in maintenance"}]
    assert (plan["payloadOf"], plan["leftOut"], plan["totalNodes"]) == (
        {"releaseId": source, "version": source}, left_out, 2)
    assert past_cli.store.releases.page().total == 4
    made = past_cli.ok(verb, 4, "--json").json
    assert (made["leftOut"], made["version"], made["batches"]) == (
        left_out, 5, [{key: batch[key] for key in ("batch", "nodeIds")} for batch in plan["batches"]])
    assert "left out: edge-3 is in maintenance" in past_cli.ok(verb, 4).out
    waited = past_cli(verb, 4, "--wait", "--timeout", "0")
    assert (waited.code, "left out: edge-3 is in maintenance" in waited.err) == (75, True)
    assert rc.parse_json(past_cli.store.releases.get(5).payload) == {"content": content}


@pytest.mark.parametrize("verb", ["retry", "rollback"])
def test_retry_and_rollback_go_over_what_is_newer_only_when_told(past_cli, verb):
    for options in ((), ("--plan",)):
        refused = past_cli.refused(3, verb, 2, *options)
        assert "release 3 (v3) succeeded later on edge-1 and 1 more" in refused
        assert refused.endswith("would replace its payload; --over-newer if that is meant")  # no key of the API
    assert past_cli.ok(verb, 2, "--over-newer", "--plan", "--json").json["totalNodes"] == 2
    assert past_cli.store.releases.page().total == 4
    past_cli.ok(verb, 2, "--over-newer")
    release = past_cli.store.releases.get(5)
    assert (release.retry_of, release.rollback_of) == ((2, None) if verb == "retry" else (None, 2))


def test_rollback_goes_to_the_release_that_is_named(past_cli):
    assert "payload of release 1 (v1)" in past_cli.ok("rollback", 4, "--to", 1, "--plan").out
    past_cli.ok("rollback", 4, "--to", 1)
    assert rc.parse_json(past_cli.store.releases.get(5).payload) == {"content": "A"}
    assert "--to: there is no release 99 of target cdn" in past_cli.refused(2, "rollback", 4, "--to", 99)
    assert "it changes nothing" in past_cli.refused(3, "rollback", 4, "--to", 4)
    assert "--to" in past_cli.refused(2, "retry", 4, "--to", 1)
    assert "--to: there is no release 0 of target cdn" in past_cli.refused(2, "rollback", 4, "--to", 0)
    assert past_cli.store.releases.page().total == 5


# -- a database beside agents that are further on ------------------------------------------------------------------

def test_migrate_leads_the_versions_past_what_agents_have(quick, database_url):
    db = ("--db", database_url)
    made = quick.ok("migrate", *db, "--first-version", "42", "--json").json
    assert made == {"before": 0, "after": len(rc.schema_steps()), "nextVersion": 42}
    assert quick.ok("migrate", *db, "--first-version", "7").out.endswith("; the next release is version 42\n")
    assert "nextVersion" not in quick.ok("migrate", *db, "--json").json
    quick.ok("node", "add", "edge-1", "10.0.0.1", *db)
    assert quick.ok("create", *db, "--plan", "--json").json["version"] == 42
    assert quick.ok("create", *db, "--json").json["version"] == 42
    assert quick.ok("migrate", *db, "--first-version", "43", "--json").json["nextVersion"] == 43
    most = rc.MAX_NAMED_VERSION
    assert quick.ok("migrate", *db, "--first-version", str(most), "--json").json["nextVersion"] == most
    for number in ("0", "-1", "x", str(most + 1), "1.5", ""):
        assert "--first-version" in quick.refused(2, "migrate", *db, f"--first-version={number}")


def test_create_takes_a_higher_version_and_no_other(quick, database_url):
    db = ("--db", database_url)
    quick.ok("node", "add", "edge-1", "10.0.0.1", *db)
    assert quick.ok("create", *db, "--version", "10", "--plan").out.splitlines()[2] == "version: 10"
    assert quick.ok("create", *db, "--version", "10", "--json").json["version"] == 10
    for used in ("1", "9", "10"):
        for options in ((), ("--plan",)):
            refused = quick.refused(2, "create", *db, "--version", used, *options)
            assert f"version {used} may have been used already: leave it out, or name one from 11 on" in refused
    payload = quick.file("payload", '{"version": 20}')
    assert "leave the version out" in quick.refused(2, "create", *db, "--version", "12", "--payload", payload)
    assert quick.ok("create", *db, "--version", "20", "--payload", payload, "--json").json["version"] == 20
    assert quick.ok("create", *db, "--json").json["version"] == 21
    for number in ("0", "-1", "x", str(2**53 + 1)):
        assert "--version" in quick.refused(2, "create", *db, f"--version={number}")


def test_check_names_claims_and_holds_that_lie_further_ahead_than_any_setting_allows(quick, world):
    world.nodes(1, "execute")
    quick.settings.update(mtls(world.certs), DATABASE_URL=world.url)
    release = new_release(world.store, payload={"websites": []})
    assert world.store.claims.claim(release.id, "host-a:17", 30)
    assert "clock" not in findings(quick.ok("check", "--json"))
    ahead = rc.utc_text(time.time() + 2 * 86400)
    with world.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET claim_expires_at = ?", ahead)
        tx.execute("UPDATE release_task_nodes SET status = 'failed', hold_until = ?", ahead)
    result = quick("check", "--json")
    said = [(item["ok"], item["message"].split(", further")[0]) for item in result.json["items"]
            if item["subject"] == "clock"]
    assert said == [(False, f"release 1 is claimed by host-a:17 until {ahead}"),
                    (False, f"node edge-1 is kept free until {ahead}")]
    assert result.code == 69
    text = quick("check").out
    assert (text.count("WRONG  clock"), "NTP" in text) == (2, True), text


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_check_tells_what_is_no_host_name(cli, host):
    cli.settings["HTTP_ADDR"] = f"{host}:8080"
    assert "that is no host name" in cli("check").out


@pytest.mark.parametrize("arguments", [("--db", "sqlite:///x.db", "list"),
                                       ("--db", "sqlite:///{}/r.db", "backup", "x")])
def test_in_a_folder_that_is_gone_errors_are_one_line(cli, tmp_path, arguments):
    arguments = [argument.format(tmp_path) for argument in arguments]
    cli.ok("--db", f"sqlite:///{tmp_path}/r.db", "migrate")
    (tmp_path / "gone").mkdir()
    code = ("import os, runpy, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); sys.argv[:3] = [sys.argv[2]]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    # -I: without it Python itself looks for modules in the folder that is gone, and 3.13.0 ends there now and then
    result = subprocess.run([sys.executable, "-IBc", code, tmp_path / "gone", ROOT / "releasectl.py", *arguments],
                            env=cli.environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n"), "Traceback" in result.stderr) == (69, 1, False)


def test_a_schema_that_is_not_utf_8_is_told_in_one_line(cli, tmp_path):
    copy = shutil.copy(ROOT / "releasectl.py", tmp_path)
    (tmp_path / "schema.sql").write_bytes(b"-- step 1\n\xff")
    result = subprocess.run([sys.executable, copy, "migrate"], env=cli.environment, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 2
    assert "schema.sql can't be read (not UTF-8)" in result.stderr


def test_no_text_of_a_row_that_was_written_by_hand_reaches_the_terminal_as_it_is(fleet_cli):
    cli, store = fleet_cli, fleet_cli.world.store
    release = new_release(store)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status_reason = ?", "a\nb\x1b[31m\u202e")
    for command in (("status", release.id), ("watch", release.id, "--timeout", "1"), ("list",)):
        shown = cli(*command)
        assert "a b [31m" in shown.out + shown.err
        assert not set("\x1b\u202e") & set(shown.out + shown.err)


@pytest.mark.parametrize("words", [
    "status {}", "watch {} --timeout 0.1s", "events {}", "pause {}", "cancel {}", "payload {}", "diff {}", "diff 1 {}",
    "diff {} {}", "audit --release {}"])
def test_section_4_an_id_is_a_number_or_latest(filled_quick, words):
    filled_quick.ok("cancel", "3")
    newest = filled_quick.ok("create", "--json").json["releaseId"]
    result = filled_quick("--json", *words.replace("{}", "latest").split())
    assert result.code in (rc.EXIT_DONE, rc.EXIT_NOT_SUCCESS, rc.EXIT_BUSY)
    assert re.search(f'"(id|releaseId)":{newest},|"object":"release {newest}"', result.out)


def test_section_4_every_option_that_takes_a_release_takes_latest():
    taken = {flags[0].lstrip("-") for command in rc.COMMANDS for flags, keywords in command.options
             if keywords.get("type") is rc._release_id}
    assert taken == set(rc.RELEASE_OPTIONS)
    ids = {(command.name, flags[0]) for command in rc.COMMANDS for flags, keywords in command.options
           if keywords.get("metavar") == "ID" and keywords.get("type") is not rc._release_id}
    assert ids == set()


def test_section_4_a_rollback_goes_to_latest_too(filled_quick):
    assert filled_quick.ok("rollback", 2, "--to", "latest", "--plan", "--json").json["payloadOf"]["releaseId"] == 3


@pytest.mark.parametrize("verb", ["retry", "rollback"])
def test_section_4_latest_is_what_a_retry_and_a_rollback_take_too(filled_quick, verb):
    assert "release 3 is pending" in filled_quick.refused(3, verb, "latest")


def test_section_4_an_id_that_is_neither_is_told_with_what_would_do(quick):
    quick.ok("migrate")
    assert "'abc' is not a release: use a number from `releasectl list`, or `latest`" in quick.refused(
        2, "status", "abc")
    assert "there is no release yet" in quick.refused(3, "status", "latest")
