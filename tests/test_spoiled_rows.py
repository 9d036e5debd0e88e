"""One row that a person spoiled stops nothing but itself: no other release, and no answer to anybody.

SQLite takes values of any type in any column. What no column can use is refused as it is written (_guard_types), and
mended where it is there already; what is of the right type and makes no sense is borne by every reader.
"""
from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from lab import World, sql

import releasectl as rc

# The columns of these tables, but those that tie rows together, which foreign keys and the row id keep.
TABLES = {"release_tasks": "id", "release_task_nodes": "release_task_id", "nodes": "id"}
VALUES = (b"\x00\xff", "abc", -5, 2**62, 1e300)


def columns(table: str) -> list[str]:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(Path(rc.SCHEMA_FILE).read_text(encoding="utf-8"))
        return [row[1] for row in database.execute(f"PRAGMA table_info({table})")
                if row[1] not in ("id", "release_task_id", "node_id")]


COLUMNS = [(table, column) for table in TABLES for column in columns(table)]


def write(store: rc.Store, table: str, column: str, key: int, value: object) -> str:
    """Write a value as a person does; return why it was refused, "" where it was not."""
    try:
        sql(store, f"UPDATE {table} SET {column} = ? WHERE {TABLES[table]} = ?", value, key)
    except rc.AppError as error:
        return error.message
    return ""


def all_faces(client, quick, releases: list[rc.Release]) -> Iterator[str]:
    """Yield what went wrong where everything was asked that can be asked about releases and nodes."""
    paths = ["releases", "nodes", "nodes/1", "nodes/1/releases", "overview", "health", "audit", "../../metrics"]
    commands: list[tuple[object, ...]] = [("list",), ("status",), ("why",), ("node", "list"), ("create", "--plan"),
                                          ("catch-up", "--plan"), ("check",)]
    for release in releases:
        paths += [f"releases/{release.id}{more}" for more in
                  ("", "?view=summary", "/events", "/payload", "/diff?with=before", "/why")]
        commands += [(verb, release.id, *more) for verb, *more in (
            ("status",), ("events",), ("why",), ("payload",), ("diff",), ("retry", "--plan"), ("rollback", "--plan"))]
    for path in paths:
        answer = client("GET", f"/api/v1/{path}".replace("/api/v1/../..", ""))
        if answer.status >= 500:
            yield f"{path}: {answer.text}"
    for command in commands:
        result = quick(*command)
        if result.code not in (0, 1, 2, 3, 69) or "Traceback" in result.out + result.err or "bug" in result.err:
            yield f"{command}: {result.code} {result.err}"


def goes_through(world: World, release: rc.Release) -> bool:
    executor = world.executor()
    try:
        executor.tick()
    finally:
        executor.close()
    return world.store.releases.get(release.id).status == "success"


def check_column(world: World, client, quick, table: str, column: str, status: str,
                 values: Sequence[object] = VALUES) -> dict[object, str]:
    """Spoil one release of the column, of target dns, by each value; one of cdn must go through beside it."""
    store, refused = world.store, dict[object, str]()
    for value in values:
        spoiled, other = (store.releases.create(rc.ReleaseRequest(
            target, payload={"websites": []}, node_ids=[number]), "tests").release
            for number, target in enumerate(("dns", "cdn"), 1))
        if status != "pending":
            sql(store, "UPDATE release_tasks SET status = ?, started_at = created_at WHERE id = ?", status, spoiled.id)
            sql(store, "UPDATE release_task_nodes SET status = ? WHERE release_task_id = ?", status, spoiled.id)
        key = 1 if table == "nodes" else spoiled.id
        with store.database.transaction() as tx:
            before = tx.value(f"SELECT {column} FROM {table} WHERE {TABLES[table]} = ?", key)
        refused[value] = write(store, table, column, key, value)
        if not refused[value]:
            what = f"{status} {table}.{column} = {value!r}"
            assert not list(all_faces(client, quick, [spoiled, other])), what
            assert goes_through(world, other), what
            assert client("GET", "/api/v1/overview").status == client("GET", "/api/v1/releases").status == 200, what
            if table == "nodes":
                write(store, table, column, key, before)
        sql(store, "UPDATE release_task_nodes SET status = 'skipped', hold_until = NULL")
        sql(store, "UPDATE release_tasks SET status = 'cancelled', finished_at = created_at")
    return refused


@pytest.fixture
def spoiling(sqlite_world, quick, new_client, monkeypatch):
    monkeypatch.setattr(rc, "RARE_READ_REST", 0)
    world = sqlite_world.nodes(2)
    quick.settings.update(DATABASE_URL=world.url, MTLS_ENABLED="0", AGENT_CONNECT_TIMEOUT_SEC="1")
    client = new_client(world.store)
    return lambda *what: check_column(world, client, quick, *what)


# Every value in every column of a release in every status takes an hour: TEST_LONG=1. Else some of them, by a
# seed that is the same in all processes of a run.
CASES = [(table, column, status, value) for table, column in COLUMNS for status in ("pending", "running", "failed")
         for value in VALUES]
if not os.environ.get("TEST_LONG"):
    CASES = random.Random(16).sample(CASES, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "column", "status", "value"), CASES)
def test_a_row_with_any_value_in_any_column_stops_no_release_and_no_answer(spoiling, table, column, status, value):
    refused = spoiling(table, column, status, [value])
    assert refused[value] or value != b"\x00\xff"


@pytest.mark.parametrize(("table", "column", "word"), [
    ("release_tasks", "strategy", "text"), ("release_tasks", "claim_fence", "whole number"),
    ("release_task_nodes", "waited_sec", "number"), ("nodes", "last_version", "whole number")])
def test_a_value_of_another_type_is_refused_by_the_name_of_its_column(spoiling, table, column, word):
    refused = spoiling(table, column, "pending")
    assert refused[b"\x00\xff"].endswith(f": {table}.{column} takes a {word}")
    assert bool(refused["abc"]) == (word != "text")
    assert not refused[-5]


def test_every_column_has_its_guard_and_rows_written_by_hand_go_on_working(sqlite_url, open_store):
    store = open_store(sqlite_url)
    for table, column in COLUMNS:
        with store.database.transaction() as tx:
            guards = [row[0] for row in tx.rows("SELECT sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?",
                                                table)]
        assert sum(f"NEW.{column})" in guard for guard in guards) == 2, (table, column)
    sql(store, "INSERT INTO nodes (name, main_ip) VALUES ('edge-1', '127.0.0.9')")
    sql(store, "INSERT INTO release_tasks (version) VALUES ('7')")  # SQLite makes it a number
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (1, 1, 1.0)")
    with pytest.raises(rc.DatabaseError, match="release_tasks.payload takes a text"):
        sql(store, "INSERT INTO release_tasks (version, payload) VALUES (8, x'7b7d')")
    assert store.releases.get(1).version == 7


def test_what_was_spoiled_before_is_mended_and_logged_at_the_next_migrate(sqlite_url, open_store, told):
    store = open_store(sqlite_url)
    sql(store, "INSERT INTO nodes (name, main_ip) VALUES ('edge-1', '127.0.0.9')")
    sql(store, "INSERT INTO release_tasks (version) VALUES (7)")
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (1, 1, 1)")
    with store.database.transaction() as tx:
        guards = [row[0] for row in tx.rows("SELECT name FROM sqlite_master WHERE name LIKE '%_types_%'")]
    for guard in guards:
        sql(store, f"DROP TRIGGER {guard}")
    for statement in ("UPDATE release_tasks SET strategy = x'00', claim_fence = 'x', reason = x'6869'",
                      "UPDATE release_task_nodes SET batch = 'two', waited_sec = 'long'"):
        sql(store, statement)
    store.database.migrate()
    release, [node] = store.releases.with_nodes(1)
    assert (release.claim_fence, release.reason, node.batch, node.waited_s) == (0, "hi", 1, 0.0)
    assert "release_tasks, row 1: claim_fence was 'x', which is no whole number: it is 0 now" in told.text
    assert "release_task_nodes, row 1: batch was 'two', which is no whole number: it is 1 now" in told.text
    with pytest.raises(rc.DatabaseError, match="release_tasks.claim_fence takes a whole number"):
        sql(store, "UPDATE release_tasks SET claim_fence = 'x'")
    told.clear()
    store.database.migrate()
    assert told.text == ""
