"""Who acted: a row of audit_log for every act, in its transaction; a chain that shows what was bent (issue 13, 13)."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from lab import (
    ADDRESSES,
    ROOT,
    Quick,
    add_nodes,
    admin,
    at_schema,
    copy_pair,
    eventually,
    new_release,
    serving,
    sha256,
    sql,
    trusting,
)

import releasectl as rc

DAY_S = 86400.0


def rows_of(store: rc.Store) -> list[rc.AuditRow]:
    return store.audit.rows(0, 1000)


def bend(store: rc.Store, *statements: str) -> None:
    """Write to audit_log by hand, as somebody who owns the database could."""
    with store.database.transaction(write=True) as tx:
        if store.database.engine.name == "sqlite":
            for (name,) in tx.rows("SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'audit%'"):
                tx.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            tx.execute(statement)


def end_releases(store: rc.Store, count: int) -> None:
    """Make releases that were cancelled before they began."""
    for _ in range(count):
        store.releases.act("cancel", new_release(store).id, "anna")


@pytest.fixture
def kept(store):
    """A store with two nodes, two ended releases and 8 rows: 2 nodes added, and create, cancel, end of each release."""
    add_nodes(store, 2)
    end_releases(store, 2)
    assert [row.action for row in rows_of(store)] == [
        "node.add", "node.add", *["release.create", "release.cancel", "release.end"] * 2]
    return store


# -- every act leaves one row ------------------------------------------------------------------

def make_failed(store: rc.Store) -> None:
    """Make release 1 one that failed, and 2 one that can be rolled back, by hand."""
    for status in ("success", "failed"):
        made = new_release(store, payload={"for": status})
        with store.database.transaction(write=True) as tx:
            tx.execute("UPDATE release_tasks SET status = ? WHERE id = ?", status, made.id)
            tx.execute("UPDATE release_task_nodes SET status = ? WHERE release_task_id = ?", status, made.id)


def make_paused(store: rc.Store) -> None:
    store.releases.act("pause", new_release(store).id, "test")


def make_waiting(store: rc.Store) -> None:
    new_release(store, approval="wanted")


def make_running(store: rc.Store) -> None:
    """Release 1 has a node in flight: a cancel does not end it."""
    new_release(store)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = 'running'")
        tx.execute("UPDATE release_task_nodes SET status = 'running' WHERE node_id = 1")


def make_behind(store: rc.Store) -> None:
    """Let node 2 have failed in release 1, within what was tolerated."""
    made = new_release(store)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = CASE node_id WHEN 1 THEN 'success' ELSE 'failed' END")
        tx.execute("UPDATE release_tasks SET status = 'partial' WHERE id = ?", made.id)


def make_frozen(store: rc.Store) -> None:
    store.releases.set_freeze(True, "test", "holidays")


# Method and path: what is there before, body, action, object, before, some of after.
API_ACTS = {
    ("POST", "/api/v1/releases"): (None, {"reason": "why"}, "release.create", "release 1", None, {
        "version": 1, "reason": "why", "totalNodes": 2}),
    ("POST", "/api/v1/releases/1/pause"): (new_release, {"reason": "why"}, "release.pause", "release 1", {
        "status": "pending"}, {"status": "paused", "reason": "why"}),
    ("POST", "/api/v1/releases/1/resume"): (make_paused, {}, "release.resume", "release 1", {"status": "paused"}, {
        "status": "pending"}),
    ("POST", "/api/v1/releases/1/cancel"): (make_running, {"reason": "no"}, "release.cancel", "release 1", {
        "status": "running"}, {"status": "cancelling", "reason": "no"}),
    ("POST", "/api/v1/releases/2/retry"): (make_failed, {}, "release.retry", "release 3", None, {"retryOf": 2}),
    ("POST", "/api/v1/releases/2/rollback"): (make_failed, {}, "release.rollback", "release 3", None, {
        "rollbackOf": 2}),
    ("POST", "/api/v1/nodes"): (None, {"name": "edge-9", "mainIp": "10.0.0.9"}, "node.add", "node edge-9", None, {
        "id": 3, "mainIp": "10.0.0.9", "agentPort": 8443, "labels": {}, "enabled": True}),
    ("PATCH", "/api/v1/nodes/1"): (None, {"mainIp": "10.0.0.9", "labels": {"a": "b"}, "enabled": True}, "node.set",
                                   "node edge-1", {"mainIp": ADDRESSES[0], "labels": {}},
                                   {"mainIp": "10.0.0.9", "labels": {"a": "b"}}),
    ("PATCH", "/api/v1/nodes?name=edge-1"): (None, {"enabled": False, "total": 1}, "node.set",
                                             "node edge-1", {"enabled": True}, {"enabled": False}),
    ("DELETE", "/api/v1/nodes/1"): (None, None, "node.delete", "node edge-1", {"id": 1, "mainIp": ADDRESSES[0]}, None),
    ("POST", "/api/v1/releases/1/approve"): (make_waiting, {"reason": "why"}, "release.approve", "release 1", {
        "approval": "wanted", "author": "test"}, {"approval": "given", "reason": "why"}),
    ("POST", "/api/v1/catch-up"): (make_behind, {"reason": "why"}, "release.catch-up", "release 2", None, {
        "catchUpOf": 1, "reason": "why"}),
    ("PUT", "/api/v1/freeze"): (None, {"frozen": True, "reason": "why"}, "freeze.on", "freeze", {"frozen": False}, {
        "frozen": True, "reason": "why"}),
}


def test_the_table_below_has_every_route_that_changes_anything():
    assert {(method, re.sub("/[0-9]+", "/{id}", path.partition("?")[0])) for method, path in API_ACTS} == {
        (route.method, route.path) for route in rc.ROUTES if route.method != "GET" and route.answers != "Ping"}


def agrees(text: str, wanted: Any) -> bool:
    found = json.loads(text) if text else None
    return found is None if wanted is None else {key: found.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(("method", "path"), API_ACTS)
def test_every_act_by_the_api_is_one_row_that_names_who_and_what(store, tmp_path, method, path):
    arrange, body, action, what, before, after = API_ACTS[method, path]
    tokens = tmp_path / "tokens"
    tokens.write_text(f"olga:operator:{sha256('o' * 40)}\nvera:viewer:{sha256('v' * 40)}\n")
    tokens.chmod(0o600)
    add_nodes(store, 2)
    if arrange:
        arrange(store)
    known = rows_of(store)[-1].id
    with serving(store, API_TOKENS_FILE=tokens, LOG_LEVEL="warning") as client:
        for token, code in ("v" * 40, 1004), ("x" * 40, 1002), ("o" * 40, 0):
            assert store.audit.head()[0] == known
            client.token = token
            answer = client(method, path, body, {"X-Request-Id": "r-7", "Content-Type": "application/json"})
            assert answer.code == code, answer.text
    [row] = store.audit.rows(known)
    assert (row.actor, row.via, row.token, row.certificate, row.address, row.request_id) == (
        "olga", "api", "olga", "", "127.0.0.1", "r-7")
    assert (row.action, row.object) == (action, what)
    assert agrees(row.before, before), row.before
    assert agrees(row.after, after), row.after
    assert store.audit.verify().faults == []


# A command: its words, what is there before, action, object.
CLI_ACTS = {
    "migrate": ("migrate --first-version 7", None, "migrate.first-version", "database"),
    "node add": ("node add edge-9 10.0.0.9", None, "node.add", "node edge-9"),
    "node set": ("node set edge-1 --status offline", None, "node.set", "node edge-1"),
    "node import": ("node import nodes", None, "node.import", "2 nodes"),
    "token add": ("token add vera --role viewer", None, "token.add", "token vera"),
    "create": ("create --reason why", None, "release.create", "release 1"),
    "pause": ("pause 1", new_release, "release.pause", "release 1"),
    "resume": ("resume 1", make_paused, "release.resume", "release 1"),
    "cancel": ("cancel 1", make_running, "release.cancel", "release 1"),
    "retry": ("retry 2", make_failed, "release.retry", "release 3"),
    "rollback": ("rollback 2", make_failed, "release.rollback", "release 3"),
    "approve": ("approve 1", make_waiting, "release.approve", "release 1"),
    "catch-up": ("catch-up --reason why", make_behind, "release.catch-up", "release 2"),
    "node rm": ("node rm edge-1", None, "node.delete", "node edge-1"),
    "freeze": ("freeze off", make_frozen, "freeze.off", "freeze"),
    "backup": ("backup copy.db", None, "backup", "file copy.db"),
    "prune": ("prune --older-than 30d --keep 1", lambda store: (end_releases(store, 3), age(store)), "prune",
              "releases"),
}
# What changes nothing by itself; serve and run-once act by the executor and the API.
NO_ACTS = {"serve", "run-once", *rc.READ_ONLY}


def age(store: rc.Store) -> None:
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET finished_at = '2020-01-01T00:00:00.000Z'")


def test_the_table_above_has_every_command_that_changes_anything():
    assert set(CLI_ACTS) | NO_ACTS == {command.name for command in rc.COMMANDS}
    assert not set(CLI_ACTS) & NO_ACTS


@pytest.fixture
def quick(tmp_path, open_store):
    """The command line in this process, over a database with two nodes, and files that commands read."""
    quick = Quick(tmp_path)
    quick.store = open_store(f"sqlite:///{tmp_path}/releasectl.db")
    quick.settings["API_TOKENS_FILE"] = str(tmp_path / "tokens")
    quick.file("nodes", "edge-3 10.0.0.3\nedge-4 10.0.0.4\n")
    add_nodes(quick.store, 2)
    return quick


@pytest.mark.parametrize("name", CLI_ACTS)
def test_every_act_by_the_command_line_is_one_row_that_names_the_unix_user_and_who_used_sudo(quick, name):
    words, arrange, action, what = CLI_ACTS[name]
    if arrange:
        arrange(quick.store)
    known = rows_of(quick.store)[-1].id
    quick.settings.update(SUDO_USER="bob", USER="mallory", LOGNAME="mallory", LOG_LEVEL="warning")
    quick.ok(*words.split())
    [row] = quick.store.audit.rows(known)
    assert (row.actor, row.via, row.token) == (f"cli:{pwd.getpwuid(os.getuid()).pw_name} (sudo: bob)", "cli", "")
    assert (row.action, row.object) == (action, what)
    if name == "prune":
        assert json.loads(row.before) == {"releases": [[1, 2]]}
    assert quick.store.audit.verify().faults == []


@pytest.mark.parametrize("words", [
    "node add edge-1 10.0.0.9", "node set edge-1 --ip 0.0.0.0", "pause 7", "retry 1", "rollback 1",
    "create --label region=mars", "freeze on", "backup nodes", "token add a:b --role viewer", "node set edge-1",
    "create --plan", "node set edge-1 --status online", "freeze off", "migrate --first-version 1"])
def test_what_is_refused_or_changes_nothing_leaves_no_row(quick, words):
    new_release(quick.store)
    before = rows_of(quick.store)
    quick(*words.split())
    assert rows_of(quick.store) == before


def test_a_token_that_can_t_be_written_leaves_no_row(quick):
    quick.settings["API_TOKENS_FILE"] = str(quick.folder / "none" / "tokens")
    quick.refused(2, "token", "add", "vera", "--role", "viewer")
    assert [row.action for row in rows_of(quick.store)] == ["node.add", "node.add"]


def test_the_end_of_a_release_is_a_row_of_its_executor_with_the_digest_of_its_events(world, caplog):
    world.nodes(3)
    new_release(world.store, payload={"secret": "s3cr3t-payload"})
    executor = world.executor()
    with caplog.at_level("INFO", "releasectl"):
        executor.drain()
    row = rows_of(world.store)[-1]
    assert (row.actor, row.via, row.action, row.object) == (executor.owner, "executor", "release.end", "release 1")
    events = world.store.releases.events(1)
    text = json.dumps([[e.id, e.node_id, e.at, e.actor, e.event, e.from_status, e.to_status, e.detail]
                       for e in events], separators=(",", ":"))
    assert json.loads(row.after) == {"status": "success", "events": len(events),
                                     "eventsSha256": hashlib.sha256(text.encode()).hexdigest()}
    assert f"release 1 (v1): the audit log is at {row.id}:{row.hash}" in caplog.messages
    assert "s3cr3t" not in "".join(map(str, rows_of(world.store)))
    assert world.store.audit.verify((row.id, row.hash)).faults == []


def test_a_release_that_a_person_cancels_at_once_has_its_end_too(kept):
    cancel, end = rows_of(kept)[-2:]
    assert (cancel.actor, end.actor, end.via, end.object) == ("anna", "anna", "executor", "release 2")


def test_a_certificate_can_t_pass_for_a_unix_user_or_a_token(store, certs, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"olga:operator:{sha256('o' * 40)}\n")
    tokens.chmod(0o600)
    made = issue(certs, tmp_path, "cli:root")
    with serving(store, **copy_pair(certs, tmp_path), API_TOKENS_FILE=tokens,
                 HTTP_CLIENT_CA=f"{certs}/ca.crt") as client:
        client.context, client.token = trusting(certs, *made), "o" * 40
        client.ok("POST", "/api/v1/nodes", {"name": "edge-1", "mainIp": "10.0.0.1"}, 201)
    [row] = rows_of(store)
    assert (row.actor, row.token, row.certificate) == ("cert:cli:root", "olga", "cli:root")


def issue(certs: Path, folder: Path, name: str) -> tuple[str, str]:
    """Make a client certificate of a common name, of the agents' CA."""
    cert, key = f"{folder}/client.crt", f"{folder}/client.key"
    subprocess.run(["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-subj", f"/CN={name}", "-keyout", key, "-out", f"{folder}/csr"], check=True, capture_output=True)
    subprocess.run(["openssl", "x509", "-req", "-in", f"{folder}/csr", "-CA", f"{certs}/ca.crt", "-CAkey",
                    f"{certs}/ca.key", "-set_serial", "77", "-days", "2", "-out", cert], check=True,
                   capture_output=True)
    return cert, key


def test_long_values_become_their_digest(store):
    labels = rc.to_json({f"key-{n}": "x" * 255 for n in range(60)})
    store.nodes.add("edge-1", "10.0.0.1", labels=labels)
    [row] = rows_of(store)
    assert len(row.after) < rc.MAX_AUDIT_BYTES
    assert set(json.loads(row.after)["labels"]) == {"sha256", "bytes"}


# -- the chain ---------------------------------------------------------------------------------

def test_the_canonical_form_is_what_security_md_says(kept):
    """By another program than ours: SHA-256 of a compact JSON array in ASCII, with the hash before it."""
    hash_before = ""
    for row in rows_of(kept):
        fields = [hash_before, row.id, row.at, row.actor, row.via, row.token, row.certificate, row.address,
                  row.request_id, row.action, row.object, row.before, row.after]
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True)
        assert hashlib.sha256(text.encode("ascii")).hexdigest() == row.hash
        hash_before = row.hash
    assert [row.id for row in rows_of(kept)] == list(range(1, 9))


BENT = [
    ("UPDATE audit_log SET actor = 'bert' WHERE id = 3", "changed: row 3 "),
    ("UPDATE audit_log SET after = '{}' WHERE id = 8", "changed: row 8 "),
    ("UPDATE audit_log SET at = '2020-01-01T00:00:00.000Z' WHERE id = 1", "changed: row 1 "),
    ("UPDATE audit_log SET hash = (SELECT hash FROM audit_log WHERE id = 2) WHERE id = 4", "changed: row 4 "),
    ("DELETE FROM audit_log WHERE id = 4", "taken away: row 4, before row 5"),
    ("DELETE FROM audit_log WHERE id < 4", "taken away: rows 1 to 3, before row 4"),
    ("INSERT INTO audit_log (action) VALUES ('by hand')", "inserted: row 9 "),
    ("INSERT INTO audit_log (id, action, hash) VALUES (0, 'x', 'x')", "inserted: row 0 "),
    ("UPDATE release_events SET actor = 'bert' WHERE release_task_id = 2 AND event = 'created'",
     "digest of release 2 differs"),
    ("DELETE FROM release_events WHERE release_task_id = 1 AND event = 'created'", "digest of release 1 differs"),
    ("INSERT INTO release_events (release_task_id, event) VALUES (1, 'x')", "digest of release 1 differs"),
]


@pytest.mark.parametrize(("statement", "said"), BENT)
def test_what_was_bent_by_hand_is_named(kept, statement, said):
    assert kept.audit.verify().faults == []
    bend(kept, statement)
    report = kept.audit.verify()
    assert report.faults
    assert report.faults[0].startswith(said), report.faults


def test_acts_go_on_behind_a_row_that_somebody_wrote_by_hand(kept):
    bend(kept, "INSERT INTO audit_log (action) VALUES ('by hand')")
    new_release(kept)
    assert [row.id for row in rows_of(kept)] == list(range(1, 11))
    assert len(kept.audit.verify().faults) == 1


def test_a_deleted_release_is_a_fault_unless_prune_tells_of_it(kept):
    bend(kept, "DELETE FROM release_events WHERE release_task_id = 1",
         "DELETE FROM release_task_nodes WHERE release_task_id = 1", "DELETE FROM release_tasks WHERE id = 1")
    assert kept.audit.verify().faults == ["taken away: release 1, and no row of prune tells of it"]


def test_prune_keeps_the_chain_whole_and_names_what_it_deleted(kept):
    age(kept)
    found = [release.id for release in kept.history.prunable(DAY_S, 1)]
    assert kept.history.delete(found) == [1]
    assert json.loads(rows_of(kept)[-1].before) == {"releases": [[1, 1]]}
    report = kept.audit.verify()
    assert (report.faults, report.rows) == ([], 9)


def test_a_prune_that_comes_second_names_only_what_it_deleted_itself(kept):
    assert kept.history.delete([1]) == [1]
    assert kept.history.delete([1, 2]) == [2]
    assert kept.history.delete([1, 2]) == []
    assert [json.loads(row.before) for row in rows_of(kept) if row.action == "prune"] == [
        {"releases": [[1, 1]]}, {"releases": [[2, 2]]}]


def test_a_tail_that_was_cut_off_shows_by_a_copy_of_the_head_alone(kept):
    id_, hash_ = kept.audit.head()
    bend(kept, "DELETE FROM audit_log WHERE id > 6")
    assert kept.audit.verify().faults == []
    assert kept.audit.verify((id_, hash_)).faults == ["taken away: the log ends with row 6, and the copy is of row 8"]
    new_release(kept), new_release(kept)
    assert kept.audit.verify((id_, hash_)).faults == ["changed: row 8 has another hash than the copy of it"]


def test_a_look_at_the_newest_part_alone_is_bounded_and_finds_what_is_in_it(kept):
    report = kept.audit.verify(max_rows=4, max_releases=1)
    assert (report.rows, report.of_rows, report.releases, report.faults) == (4, 8, 1, [])
    bend(kept, "UPDATE audit_log SET actor = 'bert' WHERE id = 5")
    assert kept.audit.verify(max_rows=4).faults[0].startswith("changed: row 5 ")


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import releasectl as rc
store = rc.Store(rc.Database(sys.argv[2]))
for number in range(25):
    store.nodes.update(1, {"labels": rc.to_json({"by": f"{sys.argv[3]}-{number}"})}, rc.Act(sys.argv[3], "cli"))
"""


def test_many_processes_that_write_at_once_leave_one_whole_chain(store, database_url):
    add_nodes(store, 1)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(ROOT), database_url, f"writer-{n}"])
               for n in range(4)]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    rows = rows_of(store)
    assert [row.id for row in rows] == list(range(1, 102))
    assert {row.actor for row in rows[1:]} == {f"writer-{n}" for n in range(4)}
    assert store.audit.verify().faults == []


def test_an_act_that_fails_leaves_neither_row_nor_gap(kept):
    def fail() -> None:
        raise rc.ConfigError("no space")
    with pytest.raises(rc.ConfigError, match="no space"):
        kept.audit.perform("anna", "token.add", "token vera", {}, fail)
    new_release(kept)
    assert [row.id for row in rows_of(kept)] == list(range(1, 10))
    assert kept.audit.verify().faults == []


def test_a_database_of_an_older_schema_begins_its_chain_at_the_migration(database_url, open_store):
    with at_schema(database_url, rc.AUDIT_SCHEMA - 1) as old:
        sql(old, "INSERT INTO nodes (name, main_ip) VALUES ('edge-1', '10.0.0.1')")
    again = open_store(database_url)
    assert rows_of(again) == []
    assert again.audit.verify().faults == []
    new_release(again)
    assert [row.id for row in rows_of(again)] == [1]


# -- it only grows -----------------------------------------------------------------------------

@pytest.mark.parametrize("statement", [
    "UPDATE audit_log SET actor = 'x'", "DELETE FROM audit_log", "UPDATE audit_log SET id = 99 WHERE id = 2",
    "INSERT OR REPLACE INTO audit_log (id, action) VALUES (2, 'x')",
    "REPLACE INTO audit_log (id, action) VALUES (2, 'x')"])
def test_on_sqlite_triggers_refuse_every_change(open_store, sqlite_url, statement):
    store = open_store(sqlite_url)
    add_nodes(store, 2)
    before = rows_of(store)
    with contextlib.closing(sqlite3.connect(sqlite_url[len("sqlite:///"):])) as connection, \
            pytest.raises(sqlite3.IntegrityError, match="audit_log only grows"):
        connection.execute(statement)
    assert rows_of(store) == before


def granted(role: str) -> list[str]:
    """Return the statements of docs/OPERATIONS.md that let a role work, and not change the audit log."""
    text = (ROOT / "docs" / "OPERATIONS.md").read_text()
    block = text.partition("<!-- grants -->")[2].partition("<!-- end -->")[0]
    statements = [line.strip() for line in block.splitlines() if line.strip()]
    assert len(statements) > 3
    return [statement.replace("releasectl_service", role).rstrip(";") for statement in statements]


def test_on_postgresql_the_documented_grants_let_a_second_role_append_only(new_postgres_url, open_store):
    url, role = new_postgres_url(), f"service_{os.getpid()}"
    open_store(url)
    admin(url, f"CREATE ROLE {role} LOGIN")
    try:
        for statement in granted(role)[1:]:
            admin(url, statement)
        store = open_store(re.sub("//[^@]*@", f"//{role}@", url))  # which migrates, as serve does
        add_nodes(store, 2)
        store.releases.act("cancel", new_release(store).id, "anna")
        assert (len(rows_of(store)), store.audit.verify().faults) == (5, [])
        for statement in ("UPDATE audit_log SET actor = 'x'", "DELETE FROM audit_log", "TRUNCATE audit_log",
                          "DROP TABLE audit_log", "ALTER TABLE audit_log DROP COLUMN hash"):
            with pytest.raises(rc.DatabaseError, match="permission denied|must be owner"), \
                    store.database.transaction(write=True) as tx:
                tx.execute(statement)
        age(store), end_releases(store, 1), age(store)
        assert store.history.delete([release.id for release in store.history.prunable(DAY_S, 1)]) == [1]
        store.database.close()
    finally:
        admin(url, f"DROP OWNED BY {role}")
        admin(url, f"DROP ROLE {role}")


# -- how it is read ----------------------------------------------------------------------------

def test_the_api_shows_it_to_operators_by_pages(kept, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"olga:operator:{sha256('o' * 40)}\nvera:viewer:{sha256('v' * 40)}\n")
    tokens.chmod(0o600)
    with serving(kept, API_TOKENS_FILE=tokens) as client:
        client.token = "v" * 40
        assert client.code("GET", "/api/v1/audit") == 1004
        client.token = "o" * 40
        first = client.ok("GET", "/api/v1/audit?limit=3")["items"]
        assert [row["id"] for row in first] == [1, 2, 3]
        assert [row["id"] for row in client.ok("GET", "/api/v1/audit?after=6")["items"]] == [7, 8]
        assert client.code("GET", "/api/v1/audit?limit=0") == 2003
        schema = client("GET", "/openapi.json").data["components"]["schemas"]["AuditRow"]
    assert set(first[0]) == set(schema["properties"])
    assert (first[0]["before"], first[0]["after"]["name"], first[0]["requestId"]) == (None, "edge-1", "")


def test_the_command_lists_the_newest_last_and_filters(quick):
    end_releases(quick.store, 2)
    quick.ok("node", "set", "edge-1", "--port", "9000")

    def found(*options: object) -> list[int]:
        return [row["id"] for row in quick.ok("audit", "--json", *options).json["items"]]
    assert found() == list(range(1, 10))
    assert found("--limit", 2) == [8, 9]
    assert found("--after", 3, "--limit", 2) == [4, 5]
    assert found("--actor", "anna") == [4, 5, 7, 8]
    assert found("--action", "node") == [1, 2, 9]
    assert found("--action", "release.end") == [5, 8]
    assert found("--object", "node edge-1") == [1, 9]
    assert found("--release", 2) == [6, 7, 8]
    assert found("--since", "1h") == list(range(1, 10))
    assert found("--since", "2099-01-01T00:00:00Z") == []
    assert '{"agentPort":8443} -> {"agentPort":9000}' in quick.ok("audit").out


def test_audit_verify_exits_1_and_check_tells_it_too(quick):
    end_releases(quick.store, 1)
    head = "{}:{}".format(*quick.store.audit.head())
    document = quick.ok("audit", "--verify", "--head", head, "--json").json
    assert document == {"isWhole": True, "rows": 5, "releases": 1, "faults": [], "head": {
        "id": 5, "hash": head.partition(":")[2]}}
    assert quick.ok("audit", "--verify").out.startswith("whole: 5 of 5 rows and the events of 1 of 1 ended release ")
    assert "audit log        5 of 5 rows" in quick("check").out
    bend(quick.store, "DELETE FROM audit_log WHERE id = 3")
    broken = quick("audit", "--verify")
    assert (broken.code, broken.out.splitlines()[0]) == (1, "taken away: row 3, before row 4")
    assert "taken away: row 3, before row 4" in quick("check").out
    assert quick.refused(2, "audit", "--head", head).endswith("--head goes with --verify")


def test_a_backup_is_whole_and_a_database_before_the_log_can_be_backed_up(quick):
    quick.ok("backup", "copy.db")
    assert quick.ok("--db", "sqlite:///copy.db", "audit", "--verify").code == 0
    bend(quick.store, "DELETE FROM schema_version WHERE version >= 6", "DROP TABLE audit_log")
    quick.ok("backup", "older.db")


def test_no_writer_waits_for_the_verification(kept):
    """It reads page by page, and holds no lock that an act needs."""
    stop, reports = threading.Event(), []

    def verify() -> None:
        while not stop.is_set():
            reports.append(kept.audit.verify())
    looking = threading.Thread(target=verify)
    looking.start()
    try:
        for _ in range(10):
            end_releases(kept, 1)
        eventually(lambda: len(reports) > 3)
    finally:
        stop.set()
        looking.join()
    assert [report.faults for report in reports if report.faults] == []
