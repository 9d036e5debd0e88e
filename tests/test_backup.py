"""`backup`: a whole copy while others write, and nothing where it can't be made (issue 8, point 5)."""
from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from conftest import leave_out
from lab import AS_OTHERS, add_nodes, new_release

import releasectl as rc


def look(path: Path, statement: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(statement).fetchall()


@pytest.fixture
def filled(cli, open_store):
    """A command line over a database with a release in it."""
    cli.store = open_store(f"sqlite:///{cli.folder}/releasectl.db")
    add_nodes(cli.store, 2)
    new_release(cli.store, reason="kept")
    return cli


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_backup_is_one_whole_file_that_only_its_owner_may_read(filled):
    target = filled.folder / "copies"
    target.mkdir()
    # while others hold the database open, with pages in its -wal file
    document = filled.ok("backup", "copies/monday.db", "--json").json
    assert document == {"file": "copies/monday.db", "bytes": (target / "monday.db").stat().st_size,
                        "schema": len(rc.schema_steps())}
    assert stat.S_IMODE((target / "monday.db").stat().st_mode) == 0o600
    assert look(target / "monday.db", "SELECT reason FROM release_tasks") == [("kept",)]
    assert look(target / "monday.db", "PRAGMA journal_mode") == [("delete",)]
    assert files(target) == {"monday.db"}
    filled.settings["DATABASE_URL"] = "sqlite:///copies/monday.db"
    assert filled.ok("list", "--json").json["total"] == 1


def test_a_backup_is_of_one_moment_while_others_write(filled):
    """Each release is written with its nodes in one transaction: a torn copy would hold one without them."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            new_release(filled.store)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            filled.store.database.backup(str(filled.folder / f"copy-{number}.db"))
    finally:
        stop.set()
        writer.join()
    counts = [look(filled.folder / f"copy-{number}.db", """
        SELECT (SELECT COUNT(*) FROM release_tasks), (SELECT COUNT(*) FROM release_task_nodes),
               (SELECT COUNT(*) FROM release_events)""")[0] for number in range(5)]
    assert all(nodes == 2 * releases and events == releases for releases, nodes, events in counts)
    assert counts[-1] > counts[0]


def test_a_backup_refuses_a_file_that_exists(filled):
    path = filled.file("mine.db", "precious")
    assert filled.refused(rc.EXIT_STATE, "backup", path) == f"releasectl: {path} exists already: name another file"
    os.symlink("nowhere", filled.folder / "link.db")
    assert "exists already" in filled.refused(rc.EXIT_STATE, "backup", "link.db")
    assert Path(path).read_text() == "precious"


def no_link(*_paths) -> None:
    raise PermissionError(1, "Operation not permitted")  # as FAT answers


@pytest.mark.parametrize("link", [os.link, no_link])
def test_a_file_that_appears_while_the_copy_is_made_is_not_overwritten(filled, monkeypatch, link):
    monkeypatch.setattr(rc.os, "link", link)
    copy = rc.SqliteEngine._copy

    def copy_while_somebody_writes(source, path):
        copy(source, path)
        filled.file("copy.db", "precious")

    monkeypatch.setattr(rc.SqliteEngine, "_copy", staticmethod(copy_while_somebody_writes))
    before = files(filled.folder)
    with pytest.raises(rc.AppError, match="copy.db exists already"):
        filled.store.database.backup(str(filled.folder / "copy.db"))
    assert (filled.folder / "copy.db").read_text() == "precious"
    assert files(filled.folder) == before | {"copy.db"}


def test_a_backup_needs_no_hard_links(filled, monkeypatch):
    monkeypatch.setattr(rc.os, "link", no_link)
    filled.store.database.backup(str(filled.folder / "copy.db"))
    assert stat.S_IMODE((filled.folder / "copy.db").stat().st_mode) == 0o600
    assert look(filled.folder / "copy.db", "SELECT reason FROM release_tasks") == [("kept",)]


@pytest.mark.parametrize(("database", "said"), [
    (None, "does not exist: bring it back, or make"), ("no database at all", "is not an SQLite file")])
def test_a_backup_of_nothing_leaves_nothing(cli, database, said):
    if database:
        cli.file("releasectl.db", database)
    before = files(cli.folder)
    assert said in cli.refused(rc.EXIT_UNAVAILABLE, "backup", "copy.db")
    assert files(cli.folder) == before


def test_a_backup_that_is_not_sound_leaves_nothing(filled):
    for number in range(40):
        new_release(filled.store, reason=f"{number} " * 100)
    filled.store.database.close()
    path = filled.folder / "releasectl.db"
    size = look(path, "PRAGMA page_size")[0][0]
    root = look(path, "SELECT rootpage FROM sqlite_master WHERE name = 'release_tasks_by_status'")[0][0]
    with open(path, "r+b") as file:
        file.seek(root * size - 200)
        file.write(b"\xff" * 200)
    assert "could not be copied to copy.db" in filled.refused(rc.EXIT_UNAVAILABLE, "backup", "copy.db")
    assert files(filled.folder) == {"releasectl.db"}


def test_a_backup_into_a_place_that_takes_none_is_told_in_one_line(filled):
    assert "no/copy.db: no such file or directory" in filled.refused(rc.EXIT_UNAVAILABLE, "backup", "no/copy.db")
    if not shutil.which("setpriv"):
        leave_out("setpriv")
    (filled.folder / "closed").mkdir(mode=0o500)
    filled.prefix = AS_OTHERS if os.getuid() == 0 else ()
    assert "permission denied" in filled.refused(rc.EXIT_UNAVAILABLE, "backup", "closed/copy.db")


def test_a_backup_of_an_older_schema_is_made_before_the_migration(cli):
    with contextlib.closing(sqlite3.connect(cli.folder / "releasectl.db")) as old:
        for statement in rc.schema_steps()[0]:
            old.execute(statement)
        old.commit()
    assert cli.ok("backup", "before.db", "--json").json["schema"] == 1


def test_on_postgresql_backup_names_pg_dump(cli, new_postgres_url):
    cli.settings["DATABASE_URL"] = new_postgres_url()
    assert cli.refused(rc.EXIT_USAGE, "backup", "copy.db") == (
        'releasectl: backup is for SQLite; on PostgreSQL take pg_dump -Fc -f FILE "$DATABASE_URL"')
