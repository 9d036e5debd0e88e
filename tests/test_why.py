"""Who works is known to the database, and `why` tells what a release waits for, also when nobody works."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
from lab import World, beside, eventually, sql

import releasectl as rc


def executors(store: rc.Store) -> list[rc.ExecutorRow]:
    with store.database.transaction() as tx:
        return rc.read_executors(tx)


@contextlib.contextmanager
def looking(world: World, **settings: object) -> Iterator[rc.Executor]:
    """Run an executor's loop beside the body, as serve does."""
    executor = world.executor(**settings)
    with beside(executor.run_loop):
        try:
            eventually(lambda: any(row.owner == executor.owner for row in executors(world.store)))
            yield executor
        finally:
            executor.close()


# -- the table executors -------------------------------------------------------------------------

def test_an_executor_has_a_row_from_its_first_look_until_it_is_stopped(world):
    with looking(world) as executor:
        [row] = executors(world.store)
        assert (row.owner, row.host, row.kind, row.error) == (executor.owner, executor.host, "serve", "")
        assert row.is_live(time.time())
    [row] = executors(world.store)
    assert row.period_s == 0
    assert not row.is_live(time.time())


def test_an_idle_executor_commits_nothing_but_its_row_every_ten_seconds(sqlite_world, monkeypatch):
    executor, written = sqlite_world.executor(), []
    note = executor.store.claims.note_executor
    monkeypatch.setattr(executor.store.claims, "note_executor", lambda *words: written.append(note(*words)))
    now = executor.clock.elapsed()
    monkeypatch.setattr(executor, "clock", type("At", (), {"elapsed": lambda _: now, "wall": lambda _: 0.0})())
    for seconds in (0, 1, 9, 10, 11, 19.9, 20):
        now = now - now % 1000 + seconds
        executor._scan([], is_tick=False)
    assert len(written) == 3


def test_the_row_says_why_an_executor_can_dispatch_nothing_as_soon_as_there_is_something(world):
    world.nodes(1)
    with looking(world, CONTROL_CERT="") as executor:
        assert executors(world.store)[0].error == ""
        world.store.releases.create(rc.ReleaseRequest("cdn"), "tests")
        executor.nudge()
        assert eventually(lambda: executors(world.store)[0].error) == "CONTROL_CERT is not set"
        sql(world.store, "UPDATE release_tasks SET status = 'cancelled'")
        executor.nudge()
        eventually(lambda: executors(world.store)[0].error == "")


def test_a_tick_writes_once_and_takes_the_place_of_the_last_one_whose_period_it_measures(world):
    world.executor().tick()
    [first] = executors(world.store)
    assert (first.kind, first.period_s) == ("tick", 60 + 15.2)
    sql(world.store, "UPDATE executors SET started_at = ?, seen_at = ?", *[rc.utc_text(time.time() - 300)] * 2)
    world.executor().tick()
    [second] = executors(world.store)
    assert second.owner != first.owner
    assert 315 < second.period_s < 330
    world.executor().close()
    assert executors(world.store) == [second]


@pytest.mark.parametrize(("seen_s", "stays"), [(-86000, True), (-86500, False), (3600, False)])
def test_the_next_executor_clears_rows_that_are_old_or_of_a_clock_that_was_ahead(world, seen_s, stays):
    sql(world.store, "INSERT INTO executors (owner, host, seen_at, period_sec) VALUES ('a:1:x', 'a', ?, 15)",
        rc.utc_text(time.time() + seen_s))
    assert not executors(world.store)[0].is_live(time.time())
    world.executor().tick()
    assert ("a:1:x" in [row.owner for row in executors(world.store)]) == stays


def test_an_executor_works_on_where_its_row_can_not_be_written(world, told):
    world.nodes(1)
    sql(world.store, "ALTER TABLE executors RENAME TO elsewhere")
    made = world.store.releases.create(rc.ReleaseRequest("cdn"), "tests")
    world.drain()
    assert world.store.releases.get(made.release.id).status == "success"
    assert told.text.count("its row in the table executors") == 1
