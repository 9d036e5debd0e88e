"""A real PgBouncer in transaction mode before the real PostgreSQL: OPERATIONS says that it may stand between."""
from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from conftest import leave_out
from lab import ROOT, Cli, Pooler, World, assert_books_balance, mtls, new_release, statuses

import releasectl as rc


@pytest.fixture
def new_pooler(tmp_path_factory, new_postgres_url):
    """A function that starts a PgBouncer before an empty database, and gives the URL by it and the one around it."""
    folder = tmp_path_factory.mktemp("pgbouncer")
    started = []

    def start(mode: str = "transaction", size: int = 3) -> tuple[str, str]:
        direct = new_postgres_url()
        try:
            started.append(Pooler(folder, direct, mode, size))
        except FileNotFoundError:
            leave_out("pgbouncer")
        return started[-1].url(direct), direct

    yield start
    for pooler in started:
        pooler.stop()


def drains(world, url: str, count: int) -> list[subprocess.Popen]:
    """Start so many processes that drive whatever they find to its end."""
    settings = {**os.environ, "DATABASE_URL": url, "RELEASE_EXECUTOR_INTERVAL_SEC": "0.1", "CLAIM_TTL_SEC": "10",
                **mtls(world.certs)}
    return [subprocess.Popen([sys.executable, str(ROOT / "releasectl.py"), "run-once", "--drain"], env=settings,
                             stderr=subprocess.PIPE, text=True) for _ in range(count)]


def server_side(url: str) -> tuple[dict[str, str], list]:
    """Return what is set on the one connection that a pooler has to the server, and what is prepared there."""
    connection = rc.PostgresEngine(url)._open()
    try:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SELECT name, setting FROM pg_settings WHERE name NOT IN ('application_name', "
                       "'client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings')")
        found = dict(cursor.fetchall())
        cursor.execute("SELECT name FROM pg_prepared_statements")
        return found, cursor.fetchall()
    finally:
        connection.close()


def test_releases_come_to_their_end_by_several_processes_and_a_program_that_sets_and_prepares(
        new_pooler, open_store, certs, new_fleet, new_executor, driver):
    url, _ = new_pooler()
    store = open_store(url)
    world = World(store, url, certs, new_fleet, new_executor).nodes(6)
    for number in range(1, 7):
        new_release(store, target=f"t{number}", node_ids=[number])
    processes = drains(world, url, 3)
    busy = rc.PostgresEngine(url)._open()  # another program of the same pool, which leaves things lying about
    try:
        busy.autocommit = True
        cursor = busy.cursor()
        for number in range(60):
            cursor.execute("SET default_transaction_read_only = on")
            cursor.execute("SET statement_timeout = 0")
            cursor.execute(f"PREPARE _pg3_{number} AS SELECT 'the statement of another program'")
            assert all(store.releases.find(n).target == f"t{n}" for n in range(1, 7))
    finally:
        busy.close()
    for process in processes:
        _, said = process.communicate(timeout=90)
        assert process.returncode in (0, rc.EXIT_BUSY), said
        assert "Traceback" not in said
    for number in range(1, 7):
        assert statuses(store, number) == ["success"]
        assert_books_balance(store, number)
    assert world.runs() == [1] * 6


def test_nothing_that_we_set_or_prepare_stays_on_a_connection_of_the_pool(new_pooler, open_store, driver):
    url, _ = new_pooler(size=1)
    before = server_side(url)
    store = open_store(url)
    for number in range(1, 11):
        store.nodes.add(f"edge-{number}", f"10.0.0.{number}")
        store.nodes.page()
    new_release(store)
    store.database.close()
    assert server_side(url) == before


def test_there_is_one_writer_at_a_time_behind_a_pooler_too(new_pooler, open_store, driver):
    stores = [open_store(url) for url, _ in [new_pooler()] for _ in range(2)]
    with stores[0].database.transaction(write=True) as tx:
        tx.execute("CREATE TABLE counted (n INTEGER)")
        tx.execute("INSERT INTO counted VALUES (0)")

    def count(store: rc.Store) -> None:
        for _ in range(10):
            with store.database.transaction(write=True) as tx:
                tx.execute("UPDATE counted SET n = ?", tx.value("SELECT n FROM counted") + 1)

    threads = [threading.Thread(target=count, args=(stores[number % 2],)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with stores[0].database.transaction() as tx:
        assert tx.value("SELECT n FROM counted") == 60


def test_a_pooler_that_tears_transactions_apart_is_refused_in_one_line(new_pooler, tmp_path, driver):
    url, _ = new_pooler("statement")
    cli = Cli(tmp_path)
    cli.settings.update(DATABASE_URL=url, RELEASECTL_PG_DRIVER=driver, MTLS_ENABLED="0")
    for command in ("migrate", "run-once", "serve"):
        line = cli.refused(rc.EXIT_UNAVAILABLE, command)
        assert "it took no transaction: a pooler before the server must have pool_mode transaction or session" in line
