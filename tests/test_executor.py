"""The executor end to end: real agents over mutual TLS, both engines (contract section 3)."""
from __future__ import annotations

import itertools
import queue
import threading
import time

import pytest
from lab import FOREVER_MS, SITES, assert_books_balance, beside, eventually, new_release, statuses

import releasectl as rc


def test_rule_1_the_first_node_is_batch_1_and_all_others_batch_2(world):
    world.nodes(3)
    release, batches, *_ = world.store.releases.create(rc.ReleaseRequest(), "test")
    assert [len(batch) for batch in batches] == [1, 2]
    assert (release.version, release.total_nodes, release.status) == (1, 3, "pending")


def test_rule_4_batches_follow_one_another_in_one_tick(world):
    world.nodes(3)
    release = new_release(world.store)
    tick = world.executor().tick()
    assert [r.status for r in tick.worked_on] == ["success"]
    assert statuses(world.store, release.id) == ["success"] * 3
    assert world.runs() == [1, 1, 1]
    assert_books_balance(world.store, release.id)


def test_rule_4_batch_2_starts_after_batch_1_succeeded(world):
    world.nodes(3, task_ms=150)
    release = new_release(world.store)
    world.drain()
    _, nodes = world.store.releases.with_nodes(release.id)
    assert all(node.started_at >= nodes[0].finished_at for node in nodes[1:])
    assert world.agent(2).runs[0]["startedAt"] >= world.agent(1).runs[0]["finishedAt"]


def test_rule_5_a_failed_node_skips_the_batches_after_it(world):
    world.nodes(3)
    world.agent(1).set(outcome="failed", message="nginx -t failed\nline 2")
    release = new_release(world.store)
    world.drain()
    release = world.store.releases.get(release.id)
    assert statuses(world.store, release.id) == ["failed", "skipped", "skipped"]
    assert (release.status, release.failed_nodes, release.skipped_nodes) == ("failed", 1, 2)
    assert release.error_msg == "node edge-1: nginx -t failed line 2"
    assert world.runs() == [1, 0, 0]
    assert_books_balance(world.store, release.id)


def test_rule_5_nodes_that_run_already_are_polled_to_their_own_end(world):
    world.nodes(4, task_ms=400)
    world.agent(2).set(outcome="failed", task_ms=10)
    release = new_release(world.store)
    world.drain()
    assert statuses(world.store, release.id) == ["success", "failed", "success", "success"]
    assert world.store.releases.get(release.id).status == "failed"
    assert_books_balance(world.store, release.id)


def test_rule_3_dispatches_leave_at_the_same_time(world):
    world.nodes(5)
    for number in range(2, 6):
        world.agent(number).set(task_ms=FOREVER_MS)
    new_release(world.store)
    drain = threading.Thread(target=world.drain)
    drain.start()
    eventually(lambda: world.runs() == [1] * 5)
    world.finish()
    drain.join(60)


def finish_two_by_two(world, ids: list[int]) -> None:
    """Wait for two of six agents at work, three times, and let them end."""
    for done in (0, 2, 4):
        eventually(lambda: sum(agent.in_flight for agent in world.fleet.agents) == 2)
        # who waits for a slot is not written down as dispatched: it would be late, and its deadline would pass
        assert [status for i in ids for status in statuses(world.store, i)].count("pending") == 4 - done
        world.fleet.finish()


def most_at_once(world) -> int:
    """Return how many agents ran a task at the same time."""
    edges = sorted((run[edge], step) for agent in world.fleet.agents for run in agent.runs
                   for edge, step in (("startedAt", 1), ("finishedAt", -1)))
    return max(itertools.accumulate(step for _, step in edges))


def test_rule_3_no_more_than_agent_concurrency_requests_are_in_flight(world):
    world.nodes(6, protocol="execute", task_ms=FOREVER_MS)
    release = new_release(world.store, payload=SITES, strategy={"batches": [6]})
    drain = threading.Thread(target=lambda: world.drain(AGENT_CONCURRENCY=2, AGENT_REQUEST_TIMEOUT_SEC=120))
    drain.start()
    finish_two_by_two(world, [release.id])
    drain.join(60)
    assert world.store.releases.get(release.id).status == "success"
    assert most_at_once(world) == 2


def test_rule_8_a_request_that_never_reached_the_agent_is_tried_again(world):
    world.nodes(1)
    world.agent(1).set(mode="refuse")
    release = new_release(world.store)
    executor = world.executor(AGENT_RETRIES=100)
    with beside(executor.drain):
        eventually(lambda: world.store.releases.with_nodes(release.id)[1][0].attempts >= 2)
        world.agent(1).set(mode="normal")
    assert world.store.releases.get(release.id).status == "success"
    assert world.runs() == [1]


def test_rule_8_retries_are_bounded(world):
    world.nodes(2)
    world.agent(1).set(mode="refuse")
    release = new_release(world.store)
    world.drain(AGENT_RETRIES=1)
    _, nodes = world.store.releases.with_nodes(release.id)
    assert (nodes[0].status, nodes[0].error_kind, nodes[0].attempts) == ("failed", "unreachable", 2)
    assert nodes[0].error_msg.endswith("connection refused (tried 2 times)")


def test_rule_8_a_lost_answer_is_asked_for_before_anything_is_sent_again(world):
    world.nodes(1)
    world.agent(1).set(mode="cut", times=1, only="dispatch")
    release = new_release(world.store)
    world.drain()
    assert world.store.releases.get(release.id).status == "success"
    agent = world.agent(1)
    assert (agent.dispatches, len(agent.runs)) == (1, 1)
    assert agent.requests[1].startswith("GET /tasks/")


def test_rule_8_404_after_a_lost_answer_means_send_the_same_id_again(world):
    world.nodes(1)
    world.agent(1).set(mode="drop", times=1, only="dispatch")
    release = new_release(world.store)
    world.drain()
    assert world.store.releases.get(release.id).status == "success"
    assert world.agent(1).dispatches == 2
    assert list(world.agent(1).run_counts.values()) == [1]


def test_rule_8_an_agent_that_was_restarted_gets_the_same_id_again(world):
    world.nodes(1, task_ms=FOREVER_MS)
    release = new_release(world.store)
    executor = world.executor()
    with beside(executor.drain):
        eventually(lambda: world.agent(1).runs)
        world.agent(1).set(task_ms=20)
        world.agent(1).restart()
    assert world.store.releases.get(release.id).status == "success"
    assert [run["taskId"] for run in world.agent(1).runs] == [f"apply_config_127.0.1.1_1_{release.tag}"] * 2


@pytest.mark.parametrize(("mode", "kind"), [
    ({"mode": "status", "http_status": 503}, "http"),
    ({"mode": "status", "http_status": 429}, "http"),
    ({"mode": "notJson"}, "protocol"),
    ({"mode": "wrongShape"}, "protocol"),
    ({"mode": "tooBig"}, "protocol"),
    ({"mode": "redirect"}, "http"),
])
def test_rule_8_an_unusable_answer_is_tried_again_then_failed(sqlite_world, mode, kind):
    sqlite_world.nodes(1)
    sqlite_world.agent(1).set(**mode)
    release = new_release(sqlite_world.store)
    sqlite_world.drain(AGENT_RETRIES=1)
    node = sqlite_world.store.releases.with_nodes(release.id)[1][0]
    assert (node.status, node.error_kind) == ("failed", kind)
    assert "tried 2 times" in node.error_msg


@pytest.mark.parametrize("mode", [{"mode": "status", "http_status": 400}, {"mode": "code", "business_code": 2001}])
def test_rule_8_an_agent_that_refuses_is_believed_at_once(sqlite_world, mode):
    sqlite_world.nodes(1)
    sqlite_world.agent(1).set(**mode)
    release = new_release(sqlite_world.store)
    sqlite_world.drain()
    node = sqlite_world.store.releases.with_nodes(release.id)[1][0]
    assert (node.status, node.error_kind, node.attempts) == ("failed", "rejected", 1)


def test_rule_8_past_its_deadline_a_node_is_failed(world):
    world.nodes(2, task_ms=FOREVER_MS)
    release = new_release(world.store)
    drain = threading.Thread(target=lambda: world.drain(CLAIM_TTL_SEC=3600))
    drain.start()
    eventually(lambda: world.agent(1).queries)
    world.advance(600)
    drain.join(60)
    _, nodes = world.store.releases.with_nodes(release.id)
    assert [(n.status, n.error_kind) for n in nodes] == [("failed", "deadline"), ("skipped", "")]
    assert world.store.releases.get(release.id).error_msg.startswith("node edge-1: not done 600 s after its dispatch")


def test_section_1_an_execute_agent_succeeds_in_one_request(world):
    world.nodes(3, protocol="execute")
    release = new_release(world.store, payload={"websites": ["a.example"]})
    world.drain()
    assert world.store.releases.get(release.id).status == "success"
    assert [world.agent(n).applied_version for n in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize(("message", "status", "kind"), [
    ("Version 1 applied but reload failed: nginx", "failed", "agent_failed"),
    ("Version 1 already applied (current: 1)", "failed", "rejected"),
    ("Version 1 already applied (current: 9)", "failed", "rejected"),
])
def test_section_1_the_message_of_an_execute_agent_is_believed(sqlite_world, message, status, kind):
    sqlite_world.nodes(1, protocol="execute")
    sqlite_world.agent(1).set(message=message)
    release = new_release(sqlite_world.store, payload=SITES)
    sqlite_world.drain()
    node = sqlite_world.store.releases.with_nodes(release.id)[1][0]
    assert (node.status, node.error_kind) == (status, kind)


@pytest.mark.slow
def test_section_1_an_execute_request_that_was_cut_is_repeated_no_sooner_than_5_s(sqlite_world):
    sqlite_world.nodes(1, protocol="execute", task_ms=1500)
    sqlite_world.agent(1).set(mode="cutEarly", times=1)
    release = new_release(sqlite_world.store, payload=SITES)
    sqlite_world.drain()
    agent = sqlite_world.agent(1)
    assert sqlite_world.store.releases.get(release.id).status == "success"
    assert agent.overlaps == 0
    assert agent.dispatches == 2
    assert len(agent.runs) == 1  # the repetition found the version applied


def test_rule_2_two_releases_of_one_target_go_one_after_the_other(world):
    world.nodes(2, task_ms=50)
    first, second = new_release(world.store), new_release(world.store)
    world.drain()
    assert world.store.releases.get(second.id).started_at >= world.store.releases.get(first.id).finished_at
    assert world.store.releases.get(second.id).status == "success"


def test_rule_2_no_node_has_tasks_of_two_releases_in_flight(world):
    world.nodes(2, task_ms=300)  # long enough to be asked for, several times
    ids = [new_release(world.store, target=target).id for target in ("cdn", "dns")]
    world.drain()
    assert [world.store.releases.get(i).status for i in ids] == ["success", "success"]
    for number in (1, 2):
        assert world.agent(number).overlaps == 0


def test_rule_9_a_drain_takes_over_a_release_whose_owner_died_while_its_own_one_runs(world):
    world.nodes(2, task_ms=FOREVER_MS)
    ids = [new_release(world.store, target=target, node_ids=[number]).id
           for number, target in enumerate(("cdn", "dns"), 1)]
    assert world.store.claims.claim(ids[0], "dead", 1.0)
    with world.store.database.transaction(write=True) as tx:  # it died after it had written the intent
        tx.execute("UPDATE release_task_nodes SET status = 'running', attempts = 1, task_id = 'apply_config_1', "
                   "started_at = ? WHERE release_task_id = ?", rc.utc_text(time.time()), ids[0])
    drain = threading.Thread(target=world.drain)
    drain.start()
    eventually(lambda: world.runs() == [1, 1])
    world.finish()
    drain.join(60)
    assert [world.store.releases.get(i).status for i in ids] == ["success", "success"]


def test_a_drain_also_runs_what_waited_for_a_release_that_took_longer_than_an_interval(world):
    world.nodes(1, task_ms=700)  # an interval is 200 ms
    ids = [new_release(world.store).id for _ in range(2)]  # of one target: the second waits for the first
    world.drain()
    assert [world.store.releases.get(i).status for i in ids] == ["success", "success"]


def test_a_drain_goes_on_when_a_look_for_work_fails_while_its_release_runs(world, monkeypatch, caplog):
    world.nodes(1, task_ms=FOREVER_MS)
    release = new_release(world.store)
    looks, look = [], world.store.claims.scan

    def look_that_fails_twice(*_):
        looks.append(world.store.releases.get(release.id).status)
        if len(looks) == 4:
            world.finish()
        if len(looks) in (2, 3):
            raise rc.DatabaseError("it is away")
        return look()

    monkeypatch.setattr(world.store.claims, "scan", look_that_fails_twice)
    caplog.set_level("INFO", "releasectl")
    world.drain()
    assert looks[:3] == ["pending", "running", "running"]
    assert world.store.releases.get(release.id).status == "success"
    said = [record.getMessage() for record in caplog.records if "it is away" in record.getMessage()]
    assert said == ["executor: it is away; trying again", "executor: mended: it is away; trying again"]


def claim_that_fails_once(world, monkeypatch, of: int, error: Exception) -> None:
    claim, failures = world.store.claims.claim, [error]

    def failing(release_id, owner, ttl_s):
        if release_id == of and failures:
            raise failures.pop()
        return claim(release_id, owner, ttl_s)

    monkeypatch.setattr(world.store.claims, "claim", failing)


def test_a_drain_follows_what_a_look_began_before_it_failed(world, monkeypatch):
    world.nodes(2)
    world.agent(1).set(task_ms=900)
    ids = [new_release(world.store, target=f"t{node.id}", node_ids=[node.id]).id
           for node in world.store.nodes.page().items]
    claim_that_fails_once(world, monkeypatch, ids[1], rc.DatabaseError("database is locked"))
    tick = world.executor().drain()
    assert {release.id: release.status for release in tick.worked_on} == dict.fromkeys(ids, "success")


def test_a_claim_that_another_writer_was_quicker_at_is_in_other_hands(world, monkeypatch):
    world.nodes(1)
    release = new_release(world.store)
    claim_that_fails_once(world, monkeypatch, release.id, rc.StateMoved("another was quicker"))
    assert world.executor().tick() == rc.Tick([], 1, False)


def test_rule_3_all_releases_together_have_at_most_so_many_requests_in_flight(world):
    world.nodes(6, protocol="execute", task_ms=FOREVER_MS)
    nodes = world.store.nodes.page().items
    ids = [new_release(world.store, target=f"t{node.id}", node_ids=[node.id], payload=SITES).id for node in nodes]
    drain = threading.Thread(target=lambda: world.drain(AGENT_CONCURRENCY=2, AGENT_REQUEST_TIMEOUT_SEC=120))
    drain.start()
    finish_two_by_two(world, ids)
    drain.join(60)
    assert {world.store.releases.get(i).status for i in ids} == {"success"}
    assert most_at_once(world) == 2


def test_a_loop_that_can_start_no_driver_looks_again_after_an_interval_only(world, monkeypatch, caplog):
    world.nodes(1)
    new_release(world.store)
    looks, look, start = [], world.store.claims.scan, threading.Thread.start

    def start_others(thread):
        if thread.name == "release-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(world.store.claims, "scan", lambda *_: looks.append(1) or look())
    executor = world.executor(RELEASE_EXECUTOR_INTERVAL_SEC=60)
    loop = threading.Thread(target=executor.run_loop)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_others)
        start(loop)
        eventually(lambda: "no thread can be started" in caplog.text)
        loop.join(0.5)
    executor.stop()
    loop.join(60)
    assert len(looks) == 1


@pytest.mark.parametrize("name", ["release-1", "lease", "agents"])
def test_where_no_thread_can_be_started_the_release_stays_free_for_others(world, monkeypatch, name):
    world.nodes(1)
    release, start = new_release(world.store), threading.Thread.start

    def start_others(thread):
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    executor = world.executor()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_others)
        with pytest.raises(rc.ConfigError, match="no thread can be started .*ulimit -u"):
            executor.tick()
    assert world.store.releases.get(release.id).claim_expires_at is None
    executor.drain()
    assert world.store.releases.get(release.id).status == "success"


def test_an_answer_for_a_row_that_was_deleted_by_hand_is_dropped(world, caplog):
    world.nodes(2, protocol="execute", task_ms=FOREVER_MS)
    release = new_release(world.store, strategy={"batches": [2]}, payload=SITES)
    with beside(world.drain):
        eventually(lambda: statuses(world.store, release.id) == ["running", "running"])
        with world.store.database.transaction(write=True) as tx:
            tx.execute("DELETE FROM release_task_nodes WHERE node_id = 1")
        world.store.releases.act("pause", release.id, "somebody")
        world.finish()
    assert statuses(world.store, release.id) == ["success"]
    assert "its driver failed" not in caplog.text
    assert world.store.releases.get(release.id).claim_expires_at is None


def test_a_tick_ends_when_the_database_is_away_for_longer_than_its_claim_holds(world, monkeypatch):
    world.nodes(1, task_ms=FOREVER_MS)
    release = new_release(world.store)
    errors = queue.SimpleQueue()

    def tick():
        try:
            world.executor(CLAIM_TTL_SEC=3600, RELEASE_EXECUTOR_INTERVAL_SEC=5).tick()
        except rc.DatabaseError as error:
            errors.put(str(error))

    threading.Thread(target=tick, daemon=True).start()
    eventually(lambda: statuses(world.store, release.id) == ["running"])

    def away(*_args, **_options):
        raise rc.DatabaseError("it is away")

    monkeypatch.setattr(world.store.database, "transaction", away)
    world.advance(3601)
    assert "it is away" in errors.get(timeout=60)


def test_rule_9_a_tick_carries_on_where_another_stopped(world):
    world.nodes(2, task_ms=FOREVER_MS)
    release = new_release(world.store)
    first = world.executor()
    with beside(first.tick):
        eventually(lambda: world.agent(1).runs)
        first.stop()
        first.nudge()
    assert world.store.releases.get(release.id).claim_expires_at is None
    world.finish()
    world.drain()
    assert world.store.releases.get(release.id).status == "success"
    assert world.runs() == [1, 1]


def test_section_4_a_tick_lets_go_when_an_interval_brought_nothing_new(world):
    world.nodes(1, task_ms=FOREVER_MS)
    release = new_release(world.store)
    world.executor().tick()
    release = world.store.releases.get(release.id)
    assert (release.status, release.claim_expires_at) == ("running", None)
    assert statuses(world.store, release.id) == ["running"]


def test_section_4_a_tick_that_finds_a_release_in_other_hands_leaves_it(world):
    world.nodes(1)
    release = new_release(world.store)
    world.store.claims.claim(release.id, "another", 30)
    tick = world.executor().tick()
    assert (tick.worked_on, tick.in_other_hands) == ([], 1)
    assert world.runs() == [0]


def test_pause_lets_nothing_new_be_dispatched_and_resume_goes_on(world):
    world.nodes(2, task_ms=FOREVER_MS)
    release = new_release(world.store)
    executor = world.executor()
    with beside(executor.run_loop):
        eventually(lambda: world.agent(1).runs)
        world.store.releases.act("pause", release.id, "test")
        world.finish()
        eventually(lambda: statuses(world.store, release.id)[0] == "success")
        eventually(lambda: world.store.releases.get(release.id).claim_expires_at is None)
        assert statuses(world.store, release.id) == ["success", "pending"]
        world.store.releases.act("resume", release.id, "test")
        eventually(lambda: world.store.releases.get(release.id).status == "success")
        executor.stop()
    assert world.runs() == [1, 1]


def test_cancel_waits_for_what_is_in_flight_and_skips_the_rest(world):
    world.nodes(2, task_ms=FOREVER_MS)
    release = new_release(world.store)
    executor = world.executor()
    with beside(executor.drain):
        eventually(lambda: world.agent(1).runs)
        assert world.store.releases.act("cancel", release.id, "test").status == "cancelling"
        world.finish()
    assert world.store.releases.get(release.id).status == "cancelled"
    assert statuses(world.store, release.id) == ["success", "skipped"]
    assert_books_balance(world.store, release.id)


def test_rule_8_in_a_cancelled_release_an_unknown_task_is_abandoned(world):
    world.nodes(2, task_ms=FOREVER_MS)
    release = new_release(world.store)
    executor = world.executor()
    with beside(executor.drain):
        eventually(lambda: world.agent(1).queries)
        world.store.releases.act("cancel", release.id, "test")
        world.agent(1).restart()
    node = world.store.releases.with_nodes(release.id)[1][0]
    assert (node.status, node.error_kind) == ("failed", "abandoned")
    assert "outcome unknown" in node.error_msg
    assert world.store.releases.get(release.id).status == "cancelled"
    assert world.agent(1).dispatches == 1


def test_a_payload_written_by_hand_that_is_no_object_ends_the_release(world):
    world.nodes(1)
    release = new_release(world.store)
    with world.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET payload = ? WHERE id = ?", "[1]", release.id)
    world.drain()
    release = world.store.releases.get(release.id)
    assert release.status == "failed"
    assert "payload" in release.error_msg
    assert statuses(world.store, release.id) == ["skipped"]


def test_a_release_written_by_hand_without_nodes_is_failed(world):
    with world.store.database.transaction(write=True) as tx:
        tx.execute("INSERT INTO release_tasks (version) VALUES (?)", 7)
    world.nodes(1).drain()
    assert world.store.releases.get(1).error_msg == "the release has no nodes"
    assert world.store.releases.get(1).status == "failed"


def test_without_certificates_nothing_is_claimed(sqlite_world, new_executor):
    sqlite_world.nodes(1)
    release = new_release(sqlite_world.store)
    executor = sqlite_world.executor(CONTROL_CERT="")
    with pytest.raises(rc.ConfigError, match="CONTROL_CERT is not set"):
        executor.tick()
    assert sqlite_world.store.releases.get(release.id).status == "pending"


def test_a_clean_stop_finishes_requests_in_flight_and_lets_go(world, monkeypatch):
    monkeypatch.setattr(rc, "STOP_GRACE_S", 60.0)
    world.nodes(1, protocol="execute", task_ms=FOREVER_MS)
    release = new_release(world.store, payload=SITES)
    executor = world.executor()
    with beside(executor.run_loop):
        eventually(lambda: world.agent(1).in_flight)
        executor.stop()
        world.finish()
    executor.close()
    release = world.store.releases.get(release.id)
    assert release.claim_expires_at is None
    assert statuses(world.store, release.id) == ["success"]


@pytest.mark.parametrize("call", ["run_loop", "tick"])
def test_a_stop_that_cuts_a_request_itself_fails_no_node(world, monkeypatch, call):
    monkeypatch.setattr(rc, "STOP_GRACE_S", 0.2)
    world.nodes(1, protocol="execute", task_ms=FOREVER_MS)
    release = new_release(world.store, payload=SITES)
    executor = world.executor(AGENT_RETRIES=0)
    thread = threading.Thread(target=getattr(executor, call))
    thread.start()
    eventually(lambda: world.agent(1).in_flight)
    executor.stop()
    thread.join(60)
    executor.close()
    assert statuses(world.store, release.id) == ["running"]
    assert world.store.releases.get(release.id).claim_expires_at is None


# -- AGENT_CONCURRENCY ----------------------------------------------------------------------------


def test_slots_are_divided_equally_among_the_drivers_that_run():
    slots = rc.Slots(10)
    for driver in "ab":
        slots.join(driver)
    assert [slots.take(driver, lambda: None) for driver in "aab"] == [5, 0, 5]
    slots.leave("b")
    assert (slots.take("a", lambda: None), slots.held("a")) == (5, 10)


def test_each_driver_may_have_one_slot_but_all_together_never_more_than_the_limit():
    slots = rc.Slots(2)
    for driver in "abc":
        slots.join(driver)
    assert [slots.take(driver, lambda: None) for driver in "abc"] == [1, 1, 0]


@pytest.mark.parametrize("free", [lambda slots: slots.give_back("a", 1), lambda slots: slots.leave("a")])
def test_a_driver_that_got_less_than_its_share_is_woken_once_when_a_slot_is_free(free):
    slots, woken = rc.Slots(1), []
    for driver in "ab":
        slots.join(driver)
    assert slots.take("a", lambda: woken.append("a")) == 1
    assert slots.take("b", lambda: woken.append("b")) == 0
    free(slots)
    assert woken == ["b"]
    assert slots.take("b", lambda: None) == 1


@pytest.mark.parametrize(("had_enough", "who"), [(True, []), (False, ["a"])])
def test_a_driver_that_gives_back_what_it_did_not_need_is_not_woken(had_enough, who):
    slots, woken = rc.Slots(4), []
    slots.join("b")
    slots.take("b", lambda: None)
    slots.give_back("b", 1)
    slots.join("a")
    assert slots.take("a", lambda: woken.append("a")) == 1
    slots.give_back("a", 1, had_enough)
    assert woken == who
