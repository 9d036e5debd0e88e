"""How long a release still takes: a pure function with a table of cases, and one real run (issue 15, item 4)."""
from __future__ import annotations

import threading

import pytest
from lab import add_nodes, eventually, new_release, sql
from test_cli import Terminal
from test_decision import NOW, release

import releasectl as rc


def batches(*counts: dict[str, int]) -> list[rc.BatchProgress]:
    return [rc.BatchProgress(number, found) for number, found in enumerate(counts, 1)]


DONE, OPEN = {"success": 1}, {"pending": 10}
SOAKING = {"soak_until": rc.utc_text(NOW.wall + 120)}
# The batch before took 20 s, and nothing is under way.
TOOK_20_S = rc.Pace(before_s=20.0)


def lately(ended: int, spent_s: float) -> rc.Pace:
    """So many nodes of a batch ended in the last minute, or since it began."""
    return rc.Pace(spent_s, min(spent_s, 60.0) / ended)


@pytest.mark.parametrize(("counts", "pace", "strategy", "fields", "text"), [
    # the rate of the last minute
    (({"running": 60, "success": 40},), lately(40, 20.0), {}, {}, "about 30 s left"),
    (({"running": 60, "success": 400},), lately(30, 900.0), {}, {}, "about 2 min left"),
    (({"running": 1, "failed": 1},), lately(1, 3.0), {}, {}, "about 5 s left"),
    (({"pending": 990, "running": 10, "success": 20},), lately(2, 600.0), {}, {}, "about 8 h 20 min left"),
    (({"pending": 9000, "success": 1},), lately(1, 60.0), {}, {}, "about 6 days left"),
    # it holds for the batches to come, with soaks between them, and none after the last
    (({"running": 10, "success": 10}, OPEN), lately(10, 10.0), {}, {}, "about 20 s left"),
    (({"running": 10, "success": 10}, OPEN), lately(10, 10.0), {"soakSec": 300}, {}, "about 5 min left"),
    (({"running": 10, "success": 10}, OPEN, OPEN), lately(10, 10.0), {"soakSec": 300}, {}, "about 10 min left"),
    # up to the next pause
    (({"running": 10, "success": 10}, OPEN, OPEN), lately(10, 10.0), {"pauseAfter": [2], "soakSec": 60}, {},
     "about 2 min left, then a pause"),
    (({"running": 10, "success": 10}, OPEN), lately(10, 10.0), {"pauseAfter": "each"}, {},
     "about 10 s left, then a pause"),
    (({"running": 10, "success": 10},), lately(10, 10.0), {"pauseAfter": [1]}, {}, "about 10 s left"),
    # nothing ended in the last minute: as long as the batch before, in as many goes
    ((DONE, {"running": 10}), TOOK_20_S._replace(spent_s=5.0), {}, {"passed_batch": 1}, "about 15 s left"),
    ((DONE, {"running": 10}, OPEN), TOOK_20_S._replace(spent_s=5.0), {}, {"passed_batch": 1}, "about 35 s left"),
    ((DONE, OPEN), TOOK_20_S, {"maxParallel": 2}, {"passed_batch": 1}, "about 2 min left"),
    (({"success": 4}, OPEN), TOOK_20_S, {"maxParallel": 2}, {"passed_batch": 1}, "about 50 s left"),
    # in a soak, and in one before a pause
    ((DONE, OPEN), TOOK_20_S, {"soakSec": 300}, SOAKING, "about 2 min left"),
    ((DONE, OPEN), rc.Pace(), {"soakSec": 300, "pauseAfter": [1]}, SOAKING, "about 2 min left, then a pause"),
    # nothing to go by
    (({"running": 10},), rc.Pace(5.0), {}, {}, ""),
    ((OPEN,), rc.Pace(), {}, {}, ""),
    ((DONE, OPEN), rc.Pace(), {}, {"passed_batch": 1}, ""),
    ((DONE, {"running": 10}), TOOK_20_S._replace(spent_s=25.0), {}, {"passed_batch": 1}, ""),
    ((DONE,), TOOK_20_S, {}, {}, ""),
    ((DONE, {"skipped": 10}), TOOK_20_S, {}, {}, ""),
    ((), rc.Pace(), {}, {}, ""),
    *(((DONE, {"running": 10, "success": 10}), lately(10, 10.0), {}, {"status": status}, "")
      for status in rc.RELEASE_STATUSES if status != "running"),
])
def test_the_time_left_is_told_from_what_ended_lately(counts, pace, strategy, fields, text):
    assert rc.time_left(release(**fields), batches(*counts), pace, rc.parse_strategy(strategy), NOW) == text


def shown(store: rc.Store) -> str:
    progress = store.releases.progress(1)
    told = store.releases.as_shown(store.releases.get(1))
    assert told.status_reason == "; ".join(filter(None, (progress.release.status_reason, progress.time_left)))
    return progress.time_left


def let_succeed(store: rc.Store, release_id: int, node_ids: list[int], began_s: float, ended_s: float) -> None:
    """Let nodes have been dispatched and have succeeded so many seconds ago, and the release run."""
    began, ended = (rc.utc_text(store.clock.wall() - seconds) for seconds in (began_s, ended_s))
    sql(store, "UPDATE release_tasks SET status = 'running', status_reason = 'at work', claim_owner = 'a:1:x', "
               "claim_expires_at = ? WHERE id = ?", rc.utc_text(store.clock.wall() + 1000), release_id)
    for node_id in node_ids:
        sql(store, "UPDATE release_task_nodes SET status = 'success', started_at = ?, finished_at = ? "
                   "WHERE release_task_id = ? AND node_id = ?", began, ended, release_id, node_id)
        for at, event, status in ((began, "dispatched", "running"), (ended, "succeeded", "success")):
            sql(store, "INSERT INTO release_events (release_task_id, node_id, at, event, to_status) "
                       "VALUES (?, ?, ?, ?, ?)", release_id, node_id, at, event, status)


def test_the_time_left_is_read_from_the_history_and_written_nowhere(store):
    add_nodes(store, 4)
    new_release(store, strategy={"batches": [3], "pauseAfter": [1]})
    assert shown(store) == ""  # pending
    let_succeed(store, 1, [1, 2], 100, 30)
    assert shown(store) == "about 30 s left, then a pause"
    before = store.releases.get(1)
    assert store.releases.as_shown(before).status_reason == "at work; about 30 s left, then a pause"
    assert store.releases.get(1) == before
    store.releases.set_freeze(True, "anna", "lunch")
    assert shown(store) == ""
    store.releases.set_freeze(False, "anna")
    sql(store, "UPDATE release_events SET at = ? WHERE node_id IS NOT NULL", rc.utc_text(store.clock.wall() - 100))
    assert shown(store) == ""


def test_a_batch_of_which_nothing_has_ended_takes_as_long_as_the_one_before(store):
    add_nodes(store, 3)
    new_release(store)
    let_succeed(store, 1, [1], 2030, 30)
    sql(store, "UPDATE release_tasks SET passed_batch = 1")
    assert shown(store) == "about 33 min left"
    let_succeed(store, 1, [1], 80, 40)  # and nobody has begun it yet
    assert shown(store) == ""


def test_of_a_long_history_the_end_is_enough(store, monkeypatch):
    monkeypatch.setattr(rc, "PACE_EVENTS", 10)
    add_nodes(store, 20)
    new_release(store, strategy={"batches": ["100%"]})
    let_succeed(store, 1, list(range(1, 11)), 80, 30)
    assert shown(store) == "about 2 min left"  # 5 in a minute


@pytest.mark.parametrize("events", [4, 5, 8, 9, 2000])
def test_what_ended_in_the_batch_before_tells_no_pace(store, monkeypatch, events):
    monkeypatch.setattr(rc, "PACE_EVENTS", events)
    add_nodes(store, 10)
    new_release(store, strategy={"batches": [6]})
    let_succeed(store, 1, list(range(1, 7)), 50, 45)
    let_succeed(store, 1, [7, 8], 30, 20)
    sql(store, "UPDATE release_tasks SET passed_batch = 1")
    assert shown(store) == "about 30 s left"  # 2 of batch 2 in 30 s


@pytest.mark.parametrize(("batches", "succeeded", "text"), [
    ([4], 6, "about 2 min left"),     # the last batch: 6 at 15 s each, by the counters
    ([4, 6], 5, "about 4 min left"),  # batch 2 and 3: 7 at 30 s each, by their open nodes
    (["100%"], 4, "about 2 min left")])
def test_the_time_left_of_a_large_release_needs_no_node_that_is_done(store, monkeypatch, batches, succeeded, text):
    monkeypatch.setattr(rc, "SMALL_RELEASE_NODES", 0)
    add_nodes(store, 12)
    new_release(store, strategy={"batches": batches})
    let_succeed(store, 1, list(range(1, 5)), 80, 30)
    let_succeed(store, 1, list(range(5, succeeded + 1)), 30, 20)
    sql(store, "UPDATE release_tasks SET passed_batch = (SELECT MAX(batch) - 1 FROM release_task_nodes "
               f"WHERE status = 'success'), {rc.COUNTERS}")
    told, read = shown(store), []
    assert told == text
    real = rc.read_batches
    monkeypatch.setattr(rc, "read_batches", lambda tx, id_, *where: read.append(where) or real(tx, id_, *where))
    assert store.releases.with_failures(1)[0].status_reason == f"at work; {text}"
    assert [where != () for where in read] == ([True] if batches == [4, 6] else [])


def test_status_and_watch_tell_the_time_left(filled_quick, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    store = filled_quick.store
    sql(store, "UPDATE release_task_nodes SET batch = 1 WHERE release_task_id = 3")
    let_succeed(store, 3, [1], 80, 30)
    line = "release 3 (v3): running, at work; about 1 min left"
    assert filled_quick.ok("status", 3).out.splitlines()[0] == line
    assert filled_quick("watch", 3, "--timeout", "0.1s").err.splitlines()[0] == line
    stream = Terminal()
    rc.Screen(stream).show(store.releases.progress(3))
    assert "0 succeeded, 0 failed, 0 skipped of 2; about 1 min left" in stream.text


def test_the_api_tells_the_time_left_of_a_real_run(world, new_client):
    world.nodes(4, task_ms=1500)
    new_release(world.store, strategy={"batches": [2], "soakSec": 1, "maxParallel": 1, "pauseAfter": [1]})
    executor, client = world.executor(), new_client(world.store)
    loop = threading.Thread(target=executor.run_loop)
    loop.start()
    texts = []
    try:
        eventually(lambda: texts.append(client.ok("GET", "/api/v1/releases/1?view=summary")["release"]["statusReason"])
                   or "left" in texts[-1])
        whole = client.ok("GET", "/api/v1/releases/1")["release"]["statusReason"]
    finally:
        executor.stop()
        loop.join()
    for text in (texts[-1], whole):
        assert text.endswith("s left, then a pause"), text
    with world.store.database.transaction() as tx:
        assert not tx.value("SELECT COUNT(*) FROM release_events WHERE detail LIKE '%left, then%'")
