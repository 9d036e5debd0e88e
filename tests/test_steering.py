"""The operator steers: strategies, gates, verbs, freeze (contract section 7), pure and on both engines."""
from __future__ import annotations

import http.server
import itertools
import threading

import pytest
from conftest import on_sqlite
from lab import (
    ADDRESSES,
    FOREVER_MS,
    add_nodes,
    assert_books_balance,
    beside,
    eventually,
    fleet,
    free_port,
    new_release,
    statuses,
)
from test_decision import NOW, POLICY, decide, failed_end, later, moves, node, outcome, release, running, sends

import releasectl as rc

VERIFY = rc.Verify("http://{main_ip}/health")
SOAK = rc.Strategy(soak_s=60)


def lines_of(*found: str, batch: int = 1) -> list[rc.ReleaseNode]:
    """Return nodes 1, 2, ... of one batch in these statuses, and one pending node of the next."""
    return [*(node(n, s, batch) for n, s in enumerate(found, 1)), node(len(found) + 1, batch=batch + 1)]


# -- what a strategy means, in whole numbers -----------------------------------------------------

@pytest.mark.parametrize(("sizes", "count", "expected"), [
    ([1], 50, [1, 49]), ([1, "10%", "25%"], 50, [1, 5, 12, 32]), (["10%"], 19, [1, 18]), (["1%"], 3, [1, 2]),
    (["100%"], 3, [3]), ([5, 5], 3, [3]), ([1, 1, 1], 3, [1, 1, 1]), (["50%", "50%"], 5, [2, 2, 1]), ([2], 1, [1])])
def test_batches_are_sizes_or_shares_of_all_nodes_rounded_down_at_least_one_and_the_rest(sizes, count, expected):
    batches = rc.plan_batches(range(1, count + 1), rc.parse_strategy({"batches": sizes}).batches)
    assert [len(batch) for batch in batches] == expected
    assert sum(batches, []) == list(range(1, count + 1))


@pytest.mark.parametrize(("limit", "sizes", "expected"), [
    (0, [1], [0, 0]), (2, [1], [1, 2]), ("5%", [20, 39], [1, 1, 2]), ("100%", [1], [1, 99]), ("0%", [1], [0, 0])])
def test_a_share_of_failures_is_of_the_batchs_planned_size_rounded_down(limit, sizes, expected):
    strategy = rc.parse_strategy({"maxFailed": limit, "batches": sizes, "maxFailedTotal": "3%"})
    plan = rc.make_plan(strategy, fleet(100))
    assert plan.max_failed == expected
    assert plan.max_failed_total == 3


BAD_STRATEGIES = [
    ({"bachtes": [1]}, "bachtes is not a known key (did you mean batches?)"), ({"batches": []}, "batches"),
    ({"batches": [0]}, "batches"), ({"batches": ["0%"]}, "batches"), ({"batches": ["101%"]}, "batches"),
    ({"batches": [True]}, "batches"), ({"batches": [1.5]}, "batches"), ({"batches": 3}, "batches"),
    ({"batches": ["10 %"]}, "batches"), ({"maxFailed": -1}, "maxFailed"), ({"maxFailed": "a few"}, "maxFailed"),
    ({"maxFailed": None}, "maxFailed"), ({"maxFailedTotal": "200%"}, "maxFailedTotal"),
    ({"maxParallel": "10%"}, "maxParallel"), ({"maxParallel": -1}, "maxParallel"), ({"soakSec": -1}, "soakSec"),
    ({"soakSec": "5m"}, "soakSec"), ({"soakSec": True}, "soakSec"), ({"pauseAfter": [0]}, "pauseAfter"),
    ({"pauseAfter": "all"}, "pauseAfter"), ({"pauseAfter": [3]}, "pauseAfter names batch 3, and there are 2"),
    ({"onExceed": "stop"}, "onExceed"), ({"nodeDeadlineSec": 0}, "nodeDeadlineSec"), ({"retries": 101}, "retries"),
    ({"startAt": "tomorrow"}, "startAt"), ({"startAt": "2026-02-30T00:00:00Z"}, "startAt"),
    ({"startAt": "2026-01-31T22:00:00"}, "startAt"), ({"verify": {}}, "verify"), ({"verify": "http://x"}, "verify"),
    ({"verify": {"url": "http://evil.example/"}}, "url"), ({"verify": {"url": "file://{main_ip}/x"}}, "url"),
    ({"verify": {"url": "http://{main_ip}.evil.example/"}}, "url"),
    ({"verify": {"url": "http://{main_ip}@evil.example/"}}, "url"),
    ({"verify": {"url": "http://{main_ip}:99999/"}}, "port"), ({"verify": {"url": "http://{main_ip}/{id}"}}, "{...}"),
    ({"verify": {"url": "http://{main_ip}/a b"}}, "url"), ({"verify": {"url": "http://{main_ip}/\r\nX: y"}}, "url"),
    ({"verify": {"url": "http://{main_ip}/", "stauts": 200}}, "stauts is not a known key (did you mean status?)"),
    ({"verify": {"url": "http://{main_ip}/", "status": 99}}, "status"),
    ({"verify": {"url": "http://{main_ip}/", "successes": 0}}, "successes"),
]


@on_sqlite
@pytest.mark.parametrize(("strategy", "named"), BAD_STRATEGIES)
def test_what_can_not_be_meant_is_refused_at_creation_by_name(store, strategy, named):
    add_nodes(store, 2)
    with pytest.raises(rc.AppError) as error:
        new_release(store, strategy=strategy)
    assert error.value.code == 2003
    assert named in error.value.message
    assert store.releases.page().total == 0


@pytest.mark.parametrize(("url", "address", "expected"), [
    ("http://{main_ip}:8080/health", "10.0.0.1", "http://10.0.0.1:8080/health"),
    ("https://{main_ip}/?n={name}", "::1", "https://[::1]/?n=edge%201%2F%3F"),
    ("http://{name}", "10.0.0.1", "http://edge%201%2F%3F")])
def test_a_probe_goes_to_the_node_itself(url, address, expected):
    verify = rc.parse_strategy({"verify": {"url": url}}).verify
    assert verify.url_for(node(1, name="edge 1/?", main_ip=address)) == expected


@pytest.mark.parametrize(("text", "stored"), [
    ("2026-01-31T22:00:00Z", "2026-01-31T22:00:00.000Z"), ("2026-01-31T22:00:00.25+02:00", "2026-01-31T20:00:00.250Z"),
    ("2026-01-31t22:00:00z", "2026-01-31T22:00:00.000Z"), ("2026-01-31T22:00:00.5z", "2026-01-31T22:00:00.500Z"),
    ("2026-01-31t22:00:00.123456789-01:30", "2026-01-31T23:30:00.123Z"),
    ("2026-01-31T22:00:00.999999999Z", "2026-01-31T22:00:01.000Z"),
    ("0999-06-01T00:00:00Z", "0999-06-01T00:00:00.000Z"), ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
    ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59.000Z")])
def test_a_time_is_kept_in_utc(text, stored):
    assert rc.parse_strategy({"startAt": text}).start_at == stored


# -- who gets it ----------------------------------------------------------------------------------

def test_the_nodes_are_chosen_by_id_or_label_and_those_left_out_are_named(store):
    nodes = [store.nodes.add(f"edge-{n}", f"10.0.0.{n}", labels=rc.to_json({"region": region}))
             for n, region in enumerate(["eu", "eu", "us", "eu"], 1)]
    store.nodes.update(2, {"status": "maintenance"})
    store.nodes.update(3, {"enabled": 0})
    plan = store.releases.plan(rc.ReleaseRequest(labels={"region": "eu"}))
    assert plan.batches == [[1], [4]]
    assert [(n.name, n.why) for n in plan.left_out] == [("edge-2", "in maintenance")]
    assert store.releases.plan(rc.ReleaseRequest(node_ids=[4, 1])).batches == [[1], [4]]
    assert [n.name for n in store.releases.plan(rc.ReleaseRequest()).left_out] == ["edge-2", "edge-3"]
    for ids, message in (([2], "node edge-2 is in maintenance"), ([1, 3], "node edge-3 is disabled"),
                         ([9], "node 9 does not exist")):
        with pytest.raises(rc.AppError, match=message):
            store.releases.create(rc.ReleaseRequest(node_ids=ids), "test")
    for region, message in (("us", "no online nodes with region=us"),
                            ("mars", r"no node matches region=mars \(values of region: eu, us\)")):
        with pytest.raises(rc.AppError, match=message) as error:
            store.releases.create(rc.ReleaseRequest(labels={"region": region}), "test")
        assert error.value.code == 3003
    assert store.releases.page().total == 0
    assert len(nodes) == 4


def test_a_plan_writes_nothing_and_is_what_the_release_then_does(store):
    add_nodes(store, 20)
    request = rc.ReleaseRequest(strategy={"batches": [1, "50%"], "maxFailed": "20%"}, reason="nightly")
    plan = store.releases.plan(request)
    assert store.releases.page().total == 0
    made, batches, *_ = store.releases.create(request, "test")
    assert batches == plan.batches
    assert plan.max_failed == [0, 2, 1]
    assert rc.parse_json(made.strategy) == request.strategy
    assert store.releases.events(made.id)[0].detail == "nightly; batches of 1, 10, 9; at most 0, 2, 1 failed"


@pytest.mark.parametrize(("numbers", "text"), [
    ([7], "7"), ([1, 1, 2], "1, 1, 2"), ([20, *[100] * 18, 80], "20, 18 x 100, 80"), ([0] * 3, "0, 0, 0"),
    ([1, 2, 2, 3, 4, 4, 4], "1, 2, 2 and 4 more")])
def test_equal_batches_in_a_row_are_told_as_one_and_what_is_left_out_is_counted(numbers, text):
    assert rc.in_runs(numbers, 20 if "more" not in text else 2) == text


# -- failures ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("most", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_exactly_the_promised_number_of_failures_ends_a_release(most, count):
    found = ["failed"] * count + ["success"] * (4 - count)
    decision = decide(lines_of(*found), strategy=rc.Strategy(max_failed=most))
    assert (decision.status == "failed") == (count > most)
    assert bool(sends(decision)) == (count <= most)


def test_a_share_of_failures_counts_the_batchs_own_nodes():
    nodes = [*(node(n, "failed" if n < 3 else "success") for n in range(1, 11)), node(11, batch=2)]
    assert sends(decide(nodes, strategy=rc.Strategy(max_failed="20%"))) == [("dispatch", 11)]
    stopped = decide(nodes, strategy=rc.Strategy(max_failed="19%"))
    assert stopped.status == "failed"
    assert stopped.status_reason == ("stopped, 2 nodes of batch 1 failed, at most 1 may: 2 other; "
                                     "such as node edge-1 in batch 1")


def test_failures_of_all_batches_count_against_the_total():
    nodes = [node(1, "failed"), node(2, "failed", 2), node(3, batch=3)]
    assert sends(decide(nodes, strategy=rc.Strategy(max_failed=1, max_failed_total=2))) == [("dispatch", 3)]
    assert decide(nodes, strategy=rc.Strategy(max_failed=1, max_failed_total=1)).status == "failed"


def test_on_exceed_pause_keeps_what_is_pending_and_waits_for_a_person():
    nodes = [node(1, "running", end=failed_end()), node(2, "running"), node(3), node(4, batch=2)]
    decision = decide(nodes, strategy=rc.Strategy(on_exceed="pause"))
    assert moves(decision) == {1: ("running", "failed")}
    assert (decision.status, sends(decision)) == ("paused", [("query", 2)])
    assert decision.status_reason == ("paused in batch 1: waiting for edge-2 to end; 1 node of batch 1 failed, "
                                      "at most 0 may: 1 agent_failed; resume and accept the failures, or cancel")


def test_accepted_failures_count_no_more_and_the_result_is_partial():
    nodes = [node(1, "failed", accepted=1, error_kind="agent_failed"), node(2, "success"), node(3, batch=2)]
    assert sends(decide(nodes, strategy=rc.Strategy(on_exceed="pause"))) == [("dispatch", 3)]
    done = decide(nodes[:2], strategy=rc.Strategy(on_exceed="pause"))
    assert (done.status, done.status_reason) == (
        "partial", "finished with 1 failure (limit 0 in a batch, 1 accepted): 1 agent_failed")


# -- how many at once ---------------------------------------------------------------------------------

def test_no_more_than_max_parallel_are_in_flight_and_a_hanging_node_keeps_its_slot():
    nodes = [node(1, "running", in_flight=True), node(2, "running", due=NOW.elapsed + 9), *map(node, range(3, 9))]
    assert sends(decide(nodes, strategy=rc.Strategy(max_parallel=2))) == []
    assert sends(decide(nodes, strategy=rc.Strategy(max_parallel=4))) == [("dispatch", 3), ("dispatch", 4)]


# -- between two batches: soak, second look, pause -------------------------------------------------------

def test_a_batch_soaks_before_the_next_one_and_the_moment_is_written_down():
    decision = decide(lines_of("success"), strategy=SOAK)
    assert (sends(decision), decision.soak_until) == ([], later(60).text)
    assert decision.status_reason == f"soaking after batch 1 until {later(60).text}"
    assert decision.wake_at == pytest.approx(NOW.elapsed + 60, abs=0.01)
    assert decision.must_commit(release(soak_until=None))


def test_a_soak_goes_on_where_it_was_after_a_take_over_and_then_the_next_batch_leaves():
    soaking = release(soak_until=later(60).text)
    before = rc.decide(rc.Situation(soaking, rc.NodeIndex(lines_of("success")), later(59.9), POLICY, SOAK))
    assert (before.sends, before.soak_until) == ((), later(60).text)
    after = rc.decide(rc.Situation(soaking, rc.NodeIndex(lines_of("success")), later(60), POLICY, SOAK))
    assert (sends(after), after.soak_until, after.passed_batch) == ([("dispatch", 2)], None, 1)


def test_nothing_follows_the_last_batch():
    every = rc.Strategy(soak_s=60, pause_after="each", verify=VERIFY)
    assert decide([node(1, "success"), node(2, "success", 2)], strategy=every).status == "success"


@pytest.mark.parametrize("pause_after", ["each", (1,)])
def test_a_release_pauses_after_a_batch_until_someone_resumes(pause_after):
    gated = rc.Strategy(pause_after=pause_after)
    decision = decide(lines_of("success"), strategy=gated)
    assert (decision.status, decision.passed_batch, sends(decision)) == ("paused", 1, [])
    assert decision.status_reason == "paused after batch 1: resume to go on"
    resumed = rc.decide(rc.Situation(release(passed_batch=1), rc.NodeIndex(lines_of("success")), NOW, POLICY, gated))
    assert sends(resumed) == [("dispatch", 2)]


def test_a_batch_that_is_not_named_brings_no_pause():
    assert sends(decide(lines_of("success"), strategy=rc.Strategy(pause_after=(2,)))) == [("dispatch", 2)]


def test_the_pause_comes_after_the_soak():
    both = rc.Strategy(soak_s=60, pause_after="each")
    assert decide(lines_of("success"), strategy=both).status == "running"
    over = rc.decide(rc.Situation(release(soak_until=NOW.text), rc.NodeIndex(lines_of("success")), NOW, POLICY, both))
    assert (over.status, over.soak_until, over.passed_batch) == ("paused", None, 1)


# -- verify ------------------------------------------------------------------------------------------------

VERIFIED = POLICY._replace(probes=2)


def test_an_agents_success_is_probed_before_it_counts():
    seen = rc.observe(running(next_op=rc.QUERY), rc.Outcome("query", rc.SUCCESS), NOW, VERIFIED)
    assert (seen.end, seen.next_op) == (None, rc.PROBE)
    assert sends(decide([seen])) == [("probe", 1)]


def test_so_many_probes_must_pass_in_a_row():
    seen, passed = running(next_op=rc.PROBE), rc.Outcome("probe", rc.SUCCESS)
    broken = outcome(rc.UNCLEAR, "probe", error_kind="verify")
    for step, end in ((passed, None), (broken, None), (passed, None), (passed, ("success",))):
        assert seen.end is None
        seen = rc.observe(seen, step, NOW, VERIFIED)
        assert (seen.end and seen.end[:1]) == end


def test_a_node_that_does_not_pass_is_failed_with_error_kind_verify():
    seen = running(next_op=rc.PROBE)
    for _ in range(3):
        seen = rc.observe(seen, outcome(rc.UNCLEAR, "probe", error_kind="verify", message="HTTP 500"), NOW, VERIFIED)
    assert seen.end[:3] == ("failed", "verify", "HTTP 500 (tried 3 times)")


def test_at_the_end_of_its_soak_a_batch_is_probed_again():
    soaked = rc.Strategy(soak_s=60, verify=VERIFY)
    nodes = [node(1, "success"), node(2, "failed", accepted=1), node(3, batch=2)]
    look = rc.decide(rc.Situation(release(soak_until=NOW.text), rc.NodeIndex(nodes), NOW, POLICY, soaked, slots=8))
    assert sends(look) == [("probe", 1)]
    assert look.status_reason == "verifying batch 1 after its soak: waiting for edge-1"
    passed = rc.observe(look.sends[0].node, rc.Outcome("probe", rc.SUCCESS), NOW, POLICY._replace(probes=1))
    assert passed.is_reverified
    then = rc.decide(rc.Situation(release(soak_until=NOW.text), rc.NodeIndex([passed, *nodes[1:]]), NOW, POLICY, soaked,
                                  slots=8))
    assert sends(then) == [("dispatch", 3)]


def test_the_second_look_wants_as_many_probes_in_a_row_as_the_first():
    passed = rc.Outcome("probe", rc.SUCCESS)
    seen = running(next_op=rc.PROBE, in_flight=False, end=rc.NodeEnd("success"), passes=2)
    seen = decide([seen]).changes[0].after
    for passes in range(2):
        assert (seen.status, seen.is_reverified) == ("success", False), passes
        seen = rc.observe(seen._replace(next_op=rc.PROBE), passed, NOW, VERIFIED)
    assert seen.is_reverified


@pytest.mark.parametrize("protocol", rc.PROTOCOLS)
@pytest.mark.parametrize("result", [rc.UNCLEAR, rc.LOST])
def test_a_probe_that_fails_in_any_way_is_tried_again(protocol, result):
    seen = rc.observe(running(protocol, next_op=rc.PROBE), outcome(result, "probe", error_kind="verify"), NOW, VERIFIED)
    assert (seen.next_op, seen.passes, seen.end) == (rc.PROBE, 0, None)


def test_a_success_that_the_second_look_takes_back_is_a_failure_of_the_release():
    soaked = rc.Strategy(soak_s=60, verify=VERIFY)
    taken_back = node(1, "success", end=failed_end("verify", "HTTP 500"))
    decision = rc.decide(rc.Situation(release(soak_until=NOW.text), rc.NodeIndex([taken_back, node(2, batch=2)]), NOW,
                                      POLICY, soaked))
    assert moves(decision) == {1: ("success", "failed"), 2: ("pending", "skipped")}
    assert (decision.status, decision.error_msg) == ("failed", "node edge-1: HTTP 500")


# -- freeze --------------------------------------------------------------------------------------------------

def test_a_dispatch_that_is_kept_back_uses_up_nobodys_deadline_and_no_try():
    outcome = rc.Outcome("dispatch", rc.NOT_SENT)
    held = rc.observe(running(next_op=rc.DISPATCH, deadline=NOW.elapsed + 5), outcome, NOW,
                      POLICY)
    assert (held.errors, held.next_op, held.end) == (0, rc.DISPATCH, None)
    at_work = running(next_op=rc.QUERY, is_at_work=True)._replace(node_id=2)
    moved = rc.kept_from_dispatch(rc.NodeIndex([held, at_work, node(3)]), 60.0)
    assert [(n.node_id, n.deadline) for n in moved] == [(1, NOW.elapsed + 65)]


def test_a_cancel_ends_a_node_that_was_never_sent_anything():
    held = rc.observe(running(next_op=rc.DISPATCH), rc.Outcome("dispatch", rc.NOT_SENT), NOW, POLICY)
    ended = decide([held], "cancelling")
    assert ended.status == "cancelled"
    assert ended.changes[0].after.error_msg == "it was never sent (not tried again: the release ends)"


FROZEN = rc.Freeze(True, "change freeze for the holidays", "anna", NOW.text)


def test_a_freeze_lets_nothing_be_dispatched_not_even_again_and_polls_go_on():
    nodes = [node(1, "running"), node(2, "running", next_op=rc.DISPATCH), node(3)]
    decision = decide(nodes, freeze=FROZEN)
    assert sends(decision) == [("query", 1)]
    assert decision.status_reason == ("frozen: change freeze for the holidays; "
                                      "waiting for edge-1 to end; edge-2 is tried again after that")


@pytest.mark.parametrize(("status", "frozen", "reason"), [
    ("running", True, "frozen: change freeze for the holidays; {}"), ("paused", False, "paused by anna in batch 1: {}; "
                                                                                       "resume to go on")])
def test_who_waits_for_its_next_try_under_a_pause_or_a_freeze_is_not_waited_for(status, frozen, reason):
    tried = node(1, "running", next_op=rc.DISPATCH, errors=1, last_error="connection refused")
    of = release(status, paused_by="anna" if status == "paused" else "")
    freeze = FROZEN if frozen else rc.NO_FREEZE

    def said(*nodes):
        return rc.decide(rc.Situation(of, rc.NodeIndex(nodes), NOW, POLICY, freeze=freeze)).status_reason

    assert said(tried) == reason.format("edge-1 is tried again after that: connection refused")
    assert said(tried, node(2, "running", next_op=rc.DISPATCH)) == reason.format(
        "edge-1 and 1 more are tried again after that: connection refused")
    assert said(tried._replace(in_flight=True)) == reason.format("waiting for edge-1 to end")
    assert said(tried._replace(next_op=rc.QUERY)) == reason.format("waiting for edge-1 to end")


def test_a_frozen_commit_of_a_dispatch_changes_nothing(store):
    add_nodes(store, 1)
    made = new_release(store)
    claim = store.claims.claim(made.id, "a", 30)
    read, nodes = store.claims.read_with_nodes(claim)
    store.releases.set_freeze(True, "anna", "holidays")
    now = rc.Moment(store.clock.wall(), store.clock.elapsed())
    with pytest.raises(rc.StateMoved, match="a freeze came before"):
        store.claims.commit(claim, read, rc.decide(rc.Situation(read, rc.NodeIndex(nodes), now, POLICY)), now, "a")
    assert statuses(store, made.id) == ["pending"]


# -- what a pending release waits for --------------------------------------------------------------------------

def test_a_pending_release_says_whom_or_what_it_waits_for(store):
    add_nodes(store, 1)
    first, second = new_release(store), new_release(store)
    other = new_release(store, target="dns", strategy={"startAt": "2999-01-01T00:00:00Z"})

    def said(number: int) -> str:
        return store.releases.get(number).status_reason

    assert said(first.id) == "queued for an executor"
    assert said(second.id) == f"waiting for release {first.id}, which is pending"
    assert said(other.id) == "scheduled for 2999-01-01T00:00:00.000Z, and after release 1"
    store.releases.act("pause", first.id, "ops-anna")
    assert said(first.id) == "paused by ops-anna: resume to go on"
    assert said(second.id) == f"waiting for release {first.id}, which ops-anna paused"
    store.releases.set_freeze(True, "anna", "change freeze for the holidays")
    store.releases.act("resume", first.id, "ops-anna")
    assert said(first.id) == said(other.id) == "frozen: change freeze for the holidays"
    assert store.claims.scan() == ([], [])
    store.releases.set_freeze(False, "anna")
    assert store.claims.scan() == ([first.id], [])
    store.releases.act("cancel", first.id, "anna")
    assert said(second.id) == "queued for an executor"
    assert store.claims.scan() == ([second.id], [])


def test_a_running_release_says_on_whom_it_waits_and_until_when():
    slow = [node(17, "running", name="edge-17", deadline=NOW.elapsed + 559, due=NOW.elapsed + 1),
            node(18, "running", due=NOW.elapsed + 1, deadline=NOW.elapsed + 590),
            *(node(n, "success") for n in range(19, 67)), node(99, batch=2)]
    assert decide(slow).status_reason == \
        "batch 1 of 2: waiting for 2 of 50 nodes, slowest edge-17 for 41 s of 600 s"


# -- verbs: every pair of verb and state ------------------------------------------------------------------------

ALLOWED = {
    "pause": {"pending": "paused", "running": "paused"},
    "resume": {"paused": "running"},
    "cancel": {"pending": "cancelling", "running": "cancelling", "paused": "cancelling"},
    "cancel --force": dict.fromkeys(("pending", "running", "paused", "cancelling"), "cancelled"),
}


def in_state(store: rc.Store, status: str) -> rc.Release:
    """Return a release in a status, with a node that is success, one in flight and one pending."""
    add_nodes(store, 3)
    made = new_release(store)
    found = ("success", "failed", "skipped") if status in rc.TERMINAL else ("success", "running", "pending")
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = ?, started_at = created_at WHERE id = ?", status, made.id)
        for number, one in enumerate(found, 1):
            tx.execute("UPDATE release_task_nodes SET status = ?, attempts = 1, started_at = created_at "
                       "WHERE release_task_id = ? AND node_id = ?", one, made.id, number)
    return store.releases.get(made.id)


@pytest.mark.parametrize(("verb", "status"), list(itertools.product(ALLOWED, rc.RELEASE_STATUSES)))
def test_every_verb_in_every_state_works_or_says_which_states_allow_it(store, verb, status):
    made = in_state(store, status)
    expected = ALLOWED[verb].get(status)
    if expected is None:
        with pytest.raises(rc.AppError, match=r"release 1 (is [a-z]+|succeeded); only .* can be ") as error:
            store.releases.act(verb, made.id, "anna")
        assert error.value.code == 3003
        assert store.releases.get(made.id) == made
        return
    after = store.releases.act(verb, made.id, "anna", "because")
    assert after.status == expected
    events = [e for e in store.releases.events(made.id) if e.actor == "anna" and e.node_id is None]
    if (verb, status) != ("cancel --force", "cancelling"):
        assert events[0].detail == "because"
    assert_books_balance(store, made.id)


@pytest.mark.parametrize(("verb", "status"), list(itertools.product(("retry", "rollback"), rc.RELEASE_STATUSES)))
def test_retry_and_rollback_in_every_state(store, verb, status):
    add_nodes(store, 3)
    good = new_release(store, payload={"a": 1})
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = 'success' WHERE id = ?", good.id)
        tx.execute("UPDATE release_task_nodes SET status = 'success'")
    made = new_release(store, payload={"a": 2})
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = ? WHERE id = ?", status, made.id)
        tx.execute("UPDATE release_task_nodes SET status = 'failed' WHERE release_task_id = ?", made.id)
    if status in rc.VERBS[verb].states:
        new = getattr(store.releases, verb)(made.id, "anna", rc.Again("because")).release
        assert new.reason == "because"
        assert rc.parse_json(new.payload) == {"a": 2 if verb == "retry" else 1}
    else:
        with pytest.raises(rc.AppError, match=r"release 2 (is|succ)[a-z ]+(; only .* can be | and changed no node)"):
            getattr(store.releases, verb)(made.id, "anna")


def test_a_cancel_by_force_ends_at_once_and_the_nodes_in_flight_are_abandoned(store):
    made = in_state(store, "running")
    claim_of_another = store.claims.claim(made.id, "executor", 30)
    after = store.releases.act("cancel --force", made.id, "anna")
    assert (after.status, after.claim_expires_at) == ("cancelled", None)
    nodes = store.releases.with_nodes(made.id)[1]
    assert [(n.status, n.error_kind) for n in nodes] == [("success", ""), ("failed", "abandoned"), ("skipped", "")]
    assert "outcome unknown" in nodes[1].error_msg
    with pytest.raises(rc.ClaimLost):
        store.claims.read(claim_of_another)


def test_resume_of_too_many_failures_needs_them_accepted(store):
    add_nodes(store, 3)
    made = new_release(store, strategy={"onExceed": "pause"})
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = 'paused', started_at = created_at")
        tx.execute("UPDATE release_task_nodes SET status = 'failed' WHERE node_id = 1")
    with pytest.raises(rc.AppError, match="1 node of batch 1 failed, at most 0 may: resume it with acceptFailures"):
        store.releases.act("resume", made.id, "anna")
    assert store.releases.act("resume", made.id, "anna", accept_failures=True).status == "running"
    assert store.releases.events(made.id)[-1].detail == "failures accepted: 1"
    assert [n.accepted for n in store.releases.with_nodes(made.id)[1]] == [1, 0, 0]


def test_failures_that_end_a_release_can_not_be_accepted(store):
    add_nodes(store, 3)
    made = new_release(store)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = 'paused', started_at = created_at")
        tx.execute("UPDATE release_task_nodes SET status = 'failed' WHERE node_id = 1")
    with pytest.raises(rc.AppError, match="onExceed"):
        store.releases.act("resume", made.id, "anna", accept_failures=True)
    assert store.releases.act("resume", made.id, "anna").status == "running"


def test_rule_10_a_rollback_to_the_same_payload_is_refused(store):
    add_nodes(store, 1)
    for _ in range(2):
        new_release(store, payload={"sites": ["a"]})
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = 'success'")
        tx.execute("UPDATE release_task_nodes SET status = 'success'")
    with pytest.raises(rc.AppError, match=r"nothing of target cdn but release 1 \(v1, the same payload\)"):
        store.releases.rollback(2, "anna")


def test_rule_10_a_retry_keeps_the_strategy_and_a_rollback_waits_for_nothing(store):
    add_nodes(store, 4)
    strategy = {"batches": [1, 1, 1], "maxFailed": 1, "soakSec": 60, "pauseAfter": [1, 3],
                "startAt": "2020-01-01T00:00:00Z"}
    good, bad = new_release(store, payload={"a": 1}), new_release(store, payload={"a": 2}, strategy=strategy)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = CASE WHEN id = ? THEN 'success' ELSE 'failed' END", good.id)
        tx.execute("UPDATE release_task_nodes SET status = CASE WHEN release_task_id = ? THEN 'success' "
                   "WHEN node_id < 3 THEN 'failed' ELSE status END", good.id)
    again, back = store.releases.retry(bad.id, "anna").release, store.releases.rollback(bad.id, "anna").release
    assert rc.parse_json(again.strategy) == {"batches": [1, 1, 1], "maxFailed": 1, "soakSec": 60, "pauseAfter": [1]}
    assert rc.parse_json(back.strategy) == {"batches": [2], "maxFailed": 1}


# -- over real agents ------------------------------------------------------------------------------------------

def drained(world, status: str, **fields) -> rc.Release:
    """Run a release until nothing is left to do; return it in the status that it must have."""
    made = new_release(world.store, **fields)
    world.drain()
    after = world.store.releases.get(made.id)
    assert after.status == status, after.status_reason
    assert_books_balance(world.store, made.id)
    return after


def test_max_failed_tolerates_and_the_result_is_called_partial(world):
    world.nodes(4)
    world.agent(2).set(outcome="failed")
    after = drained(world, "partial", strategy={"batches": [1, 2], "maxFailed": 1})
    assert statuses(world.store, after.id) == ["success", "failed", "success", "success"]
    assert (after.success_nodes, after.failed_nodes) == (3, 1)


def test_on_exceed_pause_then_accept_goes_on_to_partial(world):
    world.nodes(3)
    world.agent(1).set(outcome="failed")
    made = drained(world, "paused", strategy={"onExceed": "pause"})
    assert statuses(world.store, made.id) == ["failed", "pending", "pending"]
    world.store.releases.act("resume", made.id, "anna", accept_failures=True)
    world.drain()
    assert world.store.releases.get(made.id).status == "partial"


def test_on_exceed_pause_then_accept_while_its_executor_still_follows_nodes(world):
    world.nodes(3, task_ms=FOREVER_MS)
    world.agent(1).set(outcome="failed", task_ms=10)
    made = new_release(world.store, strategy={"batches": [2], "onExceed": "pause"})
    executor = world.executor()
    executor.claim_runnable([], is_tick=False)
    eventually(lambda: world.store.releases.get(made.id).status == "paused")
    world.store.releases.act("resume", made.id, "anna", accept_failures=True)
    executor.nudge()
    world.finish()
    assert eventually(lambda: world.store.releases.get(made.id).is_terminal)
    assert statuses(world.store, made.id) == ["failed", "success", "success"]


def test_max_parallel_is_a_true_limit(world):
    world.nodes(6, task_ms=100)
    made = drained(world, "success", strategy={"batches": [6], "maxParallel": 2})
    changes = [(e.to_status, e.node_id) for e in world.store.releases.events(made.id) if e.node_id]
    in_flight, most = set(), 0
    for status, node_id in changes:
        (in_flight.add if status == "running" else in_flight.discard)(node_id)
        most = max(most, len(in_flight))
    assert most == 2


def test_pause_after_each_batch_waits_for_a_person_each_time(world):
    world.nodes(3)
    made = drained(world, "paused", strategy={"batches": [1, 1], "pauseAfter": "each"})
    for expected in (["success", "success", "pending"], ["success"] * 3):
        world.store.releases.act("resume", made.id, "anna")
        world.drain()
        assert statuses(world.store, made.id) == expected
    assert world.store.releases.get(made.id).status == "success"


def test_a_soak_lies_between_the_batches_also_over_ticks(world):
    world.nodes(2)
    made = new_release(world.store, strategy={"soakSec": 600})
    world.executor().tick()
    between = world.store.releases.get(made.id)
    assert between.status_reason == f"soaking after batch 1 until {between.soak_until}"
    world.executor().tick()
    assert statuses(world.store, made.id) == ["success", "pending"]
    world.advance(600)
    eventually(lambda: world.executor().tick() and world.store.releases.get(made.id).is_terminal)
    nodes = world.store.releases.with_nodes(made.id)[1]
    assert rc.epoch_of(nodes[1].started_at) >= rc.epoch_of(nodes[0].finished_at) + 599.99


def test_retries_and_deadline_of_a_strategy_are_the_releases_own(world):
    world.nodes(1, task_ms=FOREVER_MS)
    made = new_release(world.store, strategy={"nodeDeadlineSec": 100, "retries": 0})
    drain = threading.Thread(target=lambda: world.drain(CLAIM_TTL_SEC=3600))
    drain.start()
    eventually(lambda: world.agent(1).queries)
    world.advance(100)
    drain.join(60)
    assert world.store.releases.get(made.id).status == "failed"
    assert world.store.releases.with_nodes(made.id)[1][0].error_kind == "deadline"


def test_a_release_does_not_start_before_its_time(world):
    world.nodes(1)
    start = rc.utc_text(world.store.clock.wall() + 5)
    made = new_release(world.store, strategy={"startAt": start})
    world.executor().drain()
    assert world.store.releases.get(made.id).status == "pending"
    eventually(lambda: world.executor().drain() and world.store.releases.get(made.id).is_terminal)
    assert world.store.releases.get(made.id).started_at >= start


@pytest.mark.parametrize("start_at", [
    "0999-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "2020-01-31t22:00:00.123456789z", "1969-12-31T23:59:59.9-12:00"])
def test_a_start_time_in_the_past_starts_at_once_and_holds_nobody_up(world, start_at):
    world.nodes(2)
    first = drained(world, "success", strategy={"startAt": start_at})
    assert drained(world, "success").version == first.version + 1
    assert world.runs() == [2, 2]


def test_a_freeze_in_the_middle_of_a_release_stops_it_and_its_end_sets_it_going(world):
    world.nodes(2, task_ms=FOREVER_MS)
    made = new_release(world.store)
    executor = world.executor()
    executor.claim_runnable([], is_tick=False)
    eventually(lambda: statuses(world.store, made.id)[0] == "running")
    world.store.releases.set_freeze(True, "anna", "holidays")
    world.finish()
    eventually(lambda: world.store.releases.get(made.id).status_reason == "frozen: holidays"
               and world.store.releases.get(made.id).claim_expires_at is None)
    assert statuses(world.store, made.id) == ["success", "pending"]
    assert executor.drain().worked_on == []
    world.store.releases.set_freeze(False, "anna")
    world.drain()
    assert world.store.releases.get(made.id).status == "success"


def test_a_freeze_fails_no_node_that_waits_to_be_sent_its_task_again(world):
    world.nodes(1, task_ms=10)
    world.store.nodes.update(1, {"agent_port": 1})
    made = new_release(world.store, strategy={"nodeDeadlineSec": 100, "retries": 100})
    executor = world.executor(CLAIM_TTL_SEC=3600)
    executor.claim_runnable([], is_tick=False)
    eventually(lambda: world.store.releases.with_nodes(made.id)[1][0].status == "running")
    world.store.releases.set_freeze(True, "anna", "holidays")
    world.advance(150)
    since = world.store.clock.elapsed()
    eventually(lambda: world.store.clock.elapsed() > since + 0.6)  # three intervals
    assert world.store.releases.get(made.id).status == "running"
    world.store.releases.act("cancel --force", made.id, "anna")


def test_failures_accepted_between_two_looks_of_an_executor_elsewhere_are_noticed(world):
    world.nodes(3, task_ms=FOREVER_MS)
    world.agent(1).set(outcome="failed", task_ms=10)
    made = new_release(world.store, strategy={"batches": [3], "maxFailed": 1, "maxParallel": 2, "onExceed": "pause"})
    executor = world.executor(RELEASE_EXECUTOR_INTERVAL_SEC=0.5)
    executor.claim_runnable([], is_tick=False)
    eventually(lambda: world.store.releases.get(made.id).failed_nodes == 1)
    world.store.releases.act("pause", made.id, "anna")
    world.store.releases.act("resume", made.id, "anna", accept_failures=True)
    world.agent(3).set(outcome="failed")
    world.finish()
    assert eventually(lambda: world.store.releases.get(made.id).is_terminal)
    assert world.store.releases.get(made.id).status == "partial"


def test_pause_lets_nothing_be_dispatched_after_it_was_answered(world):
    world.nodes(8, task_ms=50)
    made = new_release(world.store, strategy={"batches": [8], "maxParallel": 1})
    executor = world.executor()
    executor.claim_runnable([], is_tick=False)
    eventually(lambda: world.store.releases.get(made.id).success_nodes >= 2)
    world.store.releases.act("pause", made.id, "anna")
    begun = [n.node_id for n in world.store.releases.with_nodes(made.id)[1] if n.status != "pending"]
    eventually(lambda: world.store.releases.get(made.id).claim_expires_at is None)
    assert [n.node_id for n in world.store.releases.with_nodes(made.id)[1] if n.status != "pending"] == begun
    assert sum(world.runs()) == len(begun)


# -- verify over real sockets -------------------------------------------------------------------------------------

@pytest.fixture
def web():
    """Servers of health pages on the nodes' addresses: a status each, and how often each was asked."""
    servers = []

    class Server(http.server.ThreadingHTTPServer):
        asked: list[str]
        statuses: list[int]

    class Page(http.server.BaseHTTPRequestHandler):
        server: Server

        def do_GET(self):
            self.server.asked.append(self.path)
            status = self.server.statuses.pop(0) if len(self.server.statuses) > 1 else self.server.statuses[0]
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    class Web:
        port = 0

        def serve(self, *statuses_of_each):
            Web.port = self.port = self.port or free_port(*ADDRESSES[:len(statuses_of_each)])
            for address, found in zip(ADDRESSES, statuses_of_each):
                server = Server((address, self.port), Page)
                server.asked, server.statuses = [], list(found)
                thread = threading.Thread(target=server.serve_forever, args=(0.02,))
                thread.start()
                servers.append((server, thread))
            return self

        def asked(self, number):
            return servers[number - 1][0].asked

        def strategy(self, **more):
            verify = {"url": f"http://{{main_ip}}:{self.port}/health?n={{name}}", **more.pop("verify", {})}
            return {"verify": verify, "retries": 1, **more}

    yield Web()
    for server, thread in servers:
        server.shutdown()
        thread.join(60)
        server.server_close()


def test_verify_probes_after_success_and_a_status_that_is_not_the_expected_one_fails(world, web):
    world.nodes(2)
    web.serve([200], [200, 503])
    made = drained(world, "failed", strategy=web.strategy(verify={"successes": 2}))
    nodes = world.store.releases.with_nodes(made.id)[1]
    assert [n.status for n in nodes] == ["success", "failed"]
    assert nodes[1].error_kind == "verify"
    assert "answered HTTP 503 instead of 200 (tried 2 times)" in nodes[1].error_msg
    assert web.asked(1) == ["/health?n=edge-1"] * 2


def test_verify_follows_no_redirect(world, web):
    world.nodes(1)
    web.serve([302])
    assert drained(world, "success", strategy=web.strategy(verify={"status": 302})).status == "success"
    assert web.asked(1) == ["/health?n=edge-1"]


def test_verify_looks_again_at_the_end_of_the_soak(world, web):
    world.nodes(2)
    web.serve([200, 500], [200])
    made = drained(world, "failed", strategy=web.strategy(soakSec=0.5))
    nodes = world.store.releases.with_nodes(made.id)[1]
    assert [(n.status, n.error_kind) for n in nodes] == [("failed", "verify"), ("skipped", "")]
    assert [(e.from_status, e.to_status) for e in world.store.releases.events(made.id) if e.node_id == 1] == [
        ("pending", "running"), ("running", "success"), ("success", "failed")]


def test_section_4_a_tick_ends_in_a_soak_also_after_a_batch_that_was_verified_again(world, web):
    world.nodes(3)
    web.serve([200], [200], [200])
    made = new_release(world.store, strategy=web.strategy(batches=[1, 1], soakSec=600))
    executor = world.executor()
    for done in (1, 2):
        wanted = ["success"] * done + ["pending"] * (3 - done)
        with beside(lambda wanted=wanted: eventually(
                lambda: executor.tick() and statuses(world.store, made.id) == wanted), 10.0):
            pass
        world.advance(600)


def test_a_probe_that_nobody_answers_fails_within_its_time(world):
    world.nodes(1)
    made = drained(world, "failed", strategy={"retries": 0, "verify": {
        "url": "http://{main_ip}:9/", "timeoutSec": 0.5}})
    first = world.store.releases.with_nodes(made.id)[1][0]
    assert first.error_kind == "verify"
    assert "connection refused" in first.error_msg


def test_a_policy_under_a_strategy_has_its_numbers():
    assert POLICY.under(rc.NO_STRATEGY) == POLICY
    own = POLICY.under(rc.Strategy(retries=0, node_deadline_s=5.0, verify=VERIFY._replace(successes=3)))
    assert (own.retries, own.node_deadline_s, own.probes) == (0, 5.0, 3)

