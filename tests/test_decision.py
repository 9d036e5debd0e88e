"""The decision, pure: every transition, every outcome, every verb in every state (section 3)."""
from __future__ import annotations

import itertools
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import releasectl as rc

NOW = rc.Moment(wall=1_790_000_000.0, elapsed=1_000.0)
POLICY = rc.Policy(retries=2, node_deadline_s=600.0, request_timeout_s=60.0, interval_s=2.0, leave_within_s=15.0)


def later(seconds: float) -> rc.Moment:
    return rc.Moment(NOW.wall + seconds, NOW.elapsed + seconds)


def release(status: str = "running", **fields) -> rc.Release:
    values: dict[str, Any] = dict.fromkeys(rc.Release._fields, "")
    values.update(id=1, version=42, status=status, started_at=NOW.text, claim_fence=1, passed_batch=0, soak_until=None)
    return rc.Release(**{**values, **fields})


def node(node_id: int, status: str = "pending", batch: int = 1, protocol: str = "tasks", **fields) -> rc.ReleaseNode:
    made = rc.ReleaseNode(node_id, f"edge-{node_id}", f"10.0.0.{node_id}", 8443, protocol, batch, status,
                          "", 0, "", "", None, None, None)
    if status == "running":
        made = made._replace(attempts=1, started_at=NOW.text, next_op=rc.QUERY, due=NOW.elapsed,
                             deadline=NOW.elapsed + 600, reached=True)
    if status in rc.AT_REST:
        made = made._replace(finished_at=NOW.text)
    return made._replace(**fields)


def failed_end(kind: str = "agent_failed", message: str = "boom") -> rc.NodeEnd:
    return rc.NodeEnd("failed", kind, message, message)


def decide(nodes, status="running", now=NOW, slots=64, **more) -> rc.Decision:
    return rc.decide(rc.Situation(release(status), rc.NodeIndex(nodes), now, POLICY, slots=slots, **more))


def moves(decision: rc.Decision) -> dict[int, tuple[str, str]]:
    return {c.after.node_id: (c.before.status, c.after.status) for c in decision.changes}


def sends(decision: rc.Decision) -> list[tuple[str, int]]:
    return [(send.op, send.node.node_id) for send in decision.sends]


# -- rule 3 and 4: batches ---------------------------------------------------------------------

def test_rule_3_the_pending_nodes_of_the_current_batch_are_dispatched_together():
    decision = decide([node(1, "success"), node(2, batch=2), node(3, batch=2), node(4, batch=3)])
    assert sends(decision) == [("dispatch", 2), ("dispatch", 3)]
    assert moves(decision) == {2: ("pending", "running"), 3: ("pending", "running")}


def test_rule_3_what_is_sent_was_written_before_with_start_attempt_and_deadline():
    after = decide([node(1)]).changes[0].after
    assert (after.status, after.attempts, after.started_at) == ("running", 1, NOW.text)
    assert (after.deadline, after.in_flight) == (NOW.elapsed + 600, True)


def test_rule_3_no_more_requests_leave_than_there_is_room_for():
    assert len(decide([node(n) for n in range(1, 10)], slots=4).sends) == 4
    assert decide([node(1), node(2, "running")], slots=0).sends == ()


def test_rule_3_a_batch_waits_for_every_node_of_the_one_before():
    assert sends(decide([node(1, "running", in_flight=True), node(2, batch=2)])) == []


def test_rule_4_the_next_batch_leaves_in_the_same_decision_that_ends_the_last():
    decision = decide([node(1, "running", end=rc.NodeEnd("success")), node(2, batch=2)])
    assert moves(decision) == {1: ("running", "success"), 2: ("pending", "running")}


def test_rule_2_a_node_that_is_busy_with_another_release_is_not_dispatched():
    decision = decide([node(1), node(2)], busy=frozenset([node(1).endpoint]))
    assert sends(decision) == [("dispatch", 2)]
    assert decision.status_reason == \
        "batch 1 of 1: waiting for 2 of 2 nodes; edge-1 busy with an earlier request"


# -- rule 5 and 6: how a release ends ------------------------------------------------------------

def test_rule_5_a_failed_node_skips_every_pending_node_in_the_same_commit():
    decision = decide([node(1, "running", end=failed_end()), node(2), node(3, batch=2)])
    assert moves(decision) == {1: ("running", "failed"), 2: ("pending", "skipped"), 3: ("pending", "skipped")}
    assert (decision.status, decision.sends) == ("failed", ())
    assert decision.error_msg == "node edge-1: boom"


def test_rule_5_nodes_that_run_are_polled_to_their_end_first():
    decision = decide([node(1, "failed", error_msg="boom"), node(2, "running")])
    assert (decision.status, sends(decision)) == ("running", [("query", 2)])
    assert decision.status_reason == "stopping, node edge-1 failed: waiting for edge-2 to end"


def test_rule_5_error_msg_names_the_node_that_failed_first():
    nodes = [node(1, "failed", error_msg="late", finished_at=later(5).text),
             node(2, "failed", error_msg="early", finished_at=later(1).text)]
    assert decide(nodes).error_msg == "node edge-2: early"


def test_rule_5_failures_beyond_what_is_tolerated_end_the_release():
    nodes = [node(1, "failed"), node(2, "failed"), node(3, batch=2)]
    tolerant = decide(nodes, strategy=rc.Strategy(max_failed=2))
    assert sends(tolerant) == [("dispatch", 3)]
    assert decide(nodes, strategy=rc.Strategy(max_failed=1)).status == "failed"


def test_rule_6_all_success_is_success():
    decision = decide([node(1, "success"), node(2, "success", batch=2)])
    assert (decision.status, decision.status_reason) == ("success", "2 nodes succeeded")


def test_rule_6_failures_within_what_was_tolerated_make_it_partial():
    decision = decide([node(1, "success"), node(2, "failed")], strategy=rc.Strategy(max_failed=1))
    assert decision.status == "partial"


STATUS_TABLE = [
    # release, statuses of its nodes, next
    ("running", ("running",), "running"),
    ("running", ("success", "running"), "running"),
    ("running", ("failed", "running"), "running"),
    ("running", ("failed",), "failed"),
    ("running", ("failed", "skipped"), "failed"),
    ("running", ("success",), "success"),
    ("running", (), "failed"),
    ("paused", ("success",), "paused"),
    ("paused", ("failed", "pending"), "paused"),
    ("paused", ("running", "pending"), "paused"),
    ("cancelling", ("running", "pending"), "cancelling"),
    ("cancelling", ("success", "pending"), "cancelled"),
    ("cancelling", ("failed", "pending"), "cancelled"),
    ("cancelling", (), "cancelled"),
]


@pytest.mark.parametrize(("status", "found", "expected"), STATUS_TABLE)
def test_the_next_status_follows_from_the_nodes(status, found, expected):
    nodes = [node(n, s, in_flight=s == "running") for n, s in enumerate(found, 1)]
    assert decide(nodes, status).status == expected


@pytest.mark.parametrize("status", rc.RELEASE_STATUSES)
@pytest.mark.parametrize("found", list(itertools.product(
    ["pending", "running", "success", "failed", "skipped"], repeat=2)))
def test_rule_7_a_release_that_ends_has_all_its_nodes_at_rest(status, found):
    nodes = [node(n, s, in_flight=s == "running") for n, s in enumerate(found, 1)]
    decision = decide(nodes, status)
    after = {n.node_id: n for n in nodes} | {c.after.node_id: c.after for c in decision.changes}
    if decision.status in rc.TERMINAL and status not in rc.TERMINAL:
        assert {n.status for n in after.values()} <= rc.AT_REST
    allowed = {"running": {"running", "success", "partial", "failed"}, "cancelling": {"cancelling", "cancelled"}}
    assert decision.status in allowed.get(status, {status})


@pytest.mark.parametrize("status", [s for s in rc.RELEASE_STATUSES if s != "running"])
def test_nothing_is_dispatched_but_in_a_running_release(status):
    nodes = [node(1), node(2, "running", next_op=rc.DISPATCH, attempts=1), node(3, "running")]
    assert all(op == rc.QUERY for op, _ in sends(decide(nodes, status)))


def test_paused_nodes_in_flight_are_polled_and_a_failure_waits_for_a_person():
    decision = decide([node(1, "running", end=failed_end()), node(2, "running"), node(3)], "paused")
    assert moves(decision) == {1: ("running", "failed"), 3: ("pending", "skipped")}
    assert (decision.status, sends(decision)) == ("paused", [("query", 2)])
    assert "node edge-1 failed: resume to end the release" in decision.status_reason


def test_a_broken_row_ends_the_release_and_dispatches_nothing():
    decision = decide([node(1)], broken="payload can't be used")
    assert (decision.status, decision.error_msg) == ("failed", "payload can't be used")
    assert moves(decision) == {1: ("pending", "skipped")}


# -- rule 8: what an agent's answer means ---------------------------------------------------------

def outcome(result: str, op: str = "dispatch", **fields) -> rc.Outcome:
    return rc.Outcome(op, result, **{"error_kind": "timeout", "message": "no answer", **fields})


def running(protocol: str = "tasks", **fields) -> rc.ReleaseNode:
    return node(1, "running", protocol=protocol, **{"in_flight": True, **fields})


ANSWERS = [
    # dialect, asked, result, next request
    ("tasks", "dispatch", rc.ACCEPTED, "query"),
    ("tasks", "dispatch", rc.UNSENT, "dispatch"),
    ("tasks", "dispatch", rc.LOST, "query"),
    ("tasks", "dispatch", rc.UNCLEAR, "query"),
    ("tasks", "query", rc.WORKING, "query"),
    ("tasks", "query", rc.UNKNOWN, "dispatch"),
    ("tasks", "query", rc.UNSENT, "query"),
    ("tasks", "query", rc.LOST, "query"),
    ("tasks", "query", rc.UNCLEAR, "query"),
    ("execute", "dispatch", rc.UNSENT, "dispatch"),
    ("execute", "dispatch", rc.LOST, "dispatch"),
    ("execute", "dispatch", rc.UNCLEAR, "dispatch"),
]


@pytest.mark.parametrize(("protocol", "op", "result", "then"), ANSWERS)
def test_rule_8_what_follows_an_answer(protocol, op, result, then):
    seen = rc.observe(running(protocol, next_op=op), outcome(result, op), NOW, POLICY)
    assert (seen.next_op, seen.in_flight, seen.end) == (then, False, None)
    assert seen.due > NOW.elapsed or result == rc.UNKNOWN


@pytest.mark.parametrize(("protocol", "op", "result"), [row[:3] for row in ANSWERS
                                                        if row[2] in (rc.UNSENT, rc.LOST, rc.UNCLEAR)])
def test_rule_8_more_failures_in_a_row_than_retries_fail_the_node(protocol, op, result):
    seen = running(protocol)
    for _ in range(3):
        assert seen.end is None
        seen = rc.observe(seen, outcome(result, op), NOW, POLICY)
    assert seen.end[:3] == ("failed", "timeout", "no answer (tried 3 times)")


def test_rule_8_an_answer_ends_the_row_of_failures():
    seen = running()
    for result in (rc.LOST, rc.LOST, rc.WORKING, rc.LOST, rc.LOST):
        seen = rc.observe(seen, outcome(result, "query"), NOW, POLICY)
    assert seen.end is None


@pytest.mark.parametrize("kind", ["agent_failed", "rejected"])
def test_rule_8_an_agent_that_fails_or_refuses_is_believed_at_once(kind):
    seen = rc.observe(running(), outcome(rc.FAILED, error_kind=kind, message="a\nb"), NOW, POLICY)
    assert seen.end[:3] == ("failed", kind, "a b")


def test_the_id_to_poll_is_the_one_that_the_answer_names():
    assert rc.observe(running(), outcome(rc.ACCEPTED, task_id="other"), NOW, POLICY).task_id == "other"


@pytest.mark.parametrize("result", [rc.ACCEPTED, rc.WORKING, rc.UNKNOWN, rc.UNCLEAR, rc.LOST])
def test_whose_answers_are_dear_takes_its_share_of_the_time_and_no_more(result):
    seen, now, took_s, policy = running(), NOW, 0.0, POLICY._replace(retries=1 << 20)
    while now.elapsed < NOW.elapsed + 1000:
        seen = rc.observe(seen, outcome(result, cost_s=0.05), now, policy)
        took_s += 0.05
        now = later(seen.due - NOW.elapsed)
    assert took_s <= 1000 * rc.ANSWER_SHARE + rc.ANSWER_CREDIT_S * rc.ANSWER_SHARE + 0.05


def test_whose_answers_cost_what_answers_cost_is_asked_as_soon_as_ever():
    cheap, dear, now, policy = running(), running(), NOW, POLICY._replace(interval_s=0.1)
    for number in range(1000):
        cheap = rc.observe(cheap, outcome(rc.WORKING), now, policy)
        # a slow machine, and now and then a garbage collection
        cost_s = 0.0005 if number % 200 else 0.05
        dear = rc.observe(dear, outcome(rc.WORKING, cost_s=cost_s), now, policy)
        assert dear.due == cheap.due
        now = later(cheap.due - NOW.elapsed)


@pytest.mark.parametrize(("hold_s", "protocol", "least"), [(5, "execute", 5), (60, "execute", 60), (5, "tasks", 0)])
def test_section_1_only_an_execute_agent_is_left_alone_after_a_lost_answer(hold_s, protocol, least):
    seen = rc.observe(running(protocol), outcome(rc.LOST, hold_s=hold_s), NOW, POLICY)
    assert seen.due - NOW.elapsed >= least
    assert protocol == "execute" or seen.due - NOW.elapsed <= rc.BACKOFF_FIRST_S


def test_polling_starts_quick_and_slows_down_to_the_interval():
    delays = [rc.poll_delay_s(n, 2.0) for n in range(20)]
    assert delays[0] <= 0.1
    assert delays == sorted(delays)
    assert delays[-1] == 2.0


def test_the_backoff_doubles_spreads_over_the_nodes_and_is_bounded():
    waits = [rc.backoff_s(n, 1) for n in range(1, 30)]
    assert all(0.25 <= wait <= rc.BACKOFF_MAX_S for wait in waits)
    assert len({rc.backoff_s(1, node_id) for node_id in range(100)}) > 50


@pytest.mark.parametrize("status", ["running", "cancelling"])
@pytest.mark.parametrize(("protocol", "result", "op", "kind"), [
    ("tasks", rc.UNKNOWN, "query", "abandoned"),
    ("execute", rc.LOST, "dispatch", "abandoned"),
    ("execute", rc.UNSENT, "dispatch", "timeout"),
    ("tasks", rc.UNSENT, "dispatch", "timeout"),
])
def test_rule_8_in_a_release_that_ends_nothing_is_sent_again(status, protocol, result, op, kind):
    first = rc.observe(running(protocol), outcome(result, op), NOW, POLICY)
    nodes = [first, node(2, "failed" if status == "running" else "success", finished_at=NOW.text)]
    decision = decide(nodes, status, now=later(100))
    assert sends(decision) == []
    assert decision.changes[0].after.error_kind == kind
    assert decision.status == ("failed" if status == "running" else "cancelled")


def test_rule_8_a_lost_dispatch_of_a_tasks_agent_is_still_asked_for_while_the_release_ends():
    first = rc.observe(running(), outcome(rc.LOST), NOW, POLICY)
    assert sends(decide([first], "cancelling", now=later(100))) == [("query", 1)]


def test_rule_8_past_its_deadline_a_node_is_failed_but_not_under_a_request():
    late = later(601)
    in_flight = node(1, "running", in_flight=True)
    assert decide([in_flight], now=late).changes == ()
    change = decide([in_flight._replace(in_flight=False, last_error="no answer")], now=late).changes[0]
    assert (change.after.status, change.after.error_kind) == ("failed", "deadline")
    assert change.after.error_msg == "not done 600 s after its dispatch; last: no answer"


# -- section 1: the hold of an execute agent --------------------------------------------------------

def test_section_1_the_hold_is_written_with_the_intent_and_ends_with_an_answer():
    begun = decide([node(1, protocol="execute")]).changes[0].after
    assert begun.hold_until == later(75).text
    done = begun._replace(in_flight=False, end=rc.NodeEnd("success"))
    assert decide([done]).changes[0].after.hold_until is None


@pytest.mark.parametrize(("hold_s", "expected"), [(5.0, later(5).text), (60.0, later(60).text), (0.0, None)])
def test_section_1_a_node_given_up_after_a_lost_answer_stays_held_for_other_releases(hold_s, expected):
    given_up = node(1, "running", protocol="execute", hold_until=later(1).text,
                    end=rc.NodeEnd("failed", "timeout", "x", "x", hold_s))
    assert decide([given_up]).changes[0].after.hold_until == expected


# -- rule 9: what a new owner makes of a node -------------------------------------------------------

def test_rule_9_a_tasks_agent_is_asked_first():
    adopted = rc.recover(node(1, "running", next_op="", attempts=1), later(10), POLICY)
    assert (adopted.next_op, adopted.due, adopted.deadline) == ("query", later(10).elapsed, later(600).elapsed)


def test_rule_9_a_deadline_that_passed_while_nobody_looked_leaves_time_for_one_question():
    adopted = rc.recover(node(1, "running", next_op=""), later(9000), POLICY)
    assert sends(decide([adopted], now=later(9000))) == [("query", 1)]
    assert decide([adopted], now=later(9003)).changes[0].after.error_kind == "deadline"


@pytest.mark.parametrize(("hold_until", "wait_s"), [(None, 0), (later(45).text, 35), (later(5).text, 0),
                                                    (later(9999).text, 75)])
def test_rule_9_an_execute_agent_is_left_alone_until_the_hold_is_over(hold_until, wait_s):
    found = node(1, "running", protocol="execute", hold_until=hold_until)
    adopted = rc.recover(found, later(10), POLICY)
    assert (adopted.next_op, adopted.due - later(10).elapsed) == ("dispatch", pytest.approx(wait_s, abs=0.01))


@pytest.mark.parametrize("status", ["pending", "success", "failed", "skipped"])
def test_rule_9_other_nodes_are_what_their_row_says(status):
    assert rc.recover(node(1, status), NOW, POLICY) == node(1, status)


# -- when to look again -----------------------------------------------------------------------------

def test_the_next_look_is_at_the_first_poll_or_deadline():
    nodes = [node(1, "running", due=NOW.elapsed + 3), node(2, "running", due=NOW.elapsed + 7)]
    assert decide(nodes).wake_at == NOW.elapsed + 3
    assert decide([node(1, "running", in_flight=True)]).wake_at == float("inf")


# -- verbs ------------------------------------------------------------------------------------------

ALLOWED = {
    "pause": {"pending", "running"},
    "resume": {"paused"},
    "cancel": {"pending", "running", "paused"},
    "retry": {"partial", "failed", "cancelled"},
    "rollback": {"success", "partial", "failed", "cancelled"},
}


@pytest.mark.parametrize("status", rc.RELEASE_STATUSES)
@pytest.mark.parametrize("verb", ALLOWED)
def test_every_verb_in_every_state_works_or_says_which_states_allow_it(verb, status):
    if status in ALLOWED[verb]:
        rc.check_verb(verb, release(status))
        return
    with pytest.raises(rc.AppError, match="release 1 (is [a-z]+|succeeded); only .* can be ") as refused:
        rc.check_verb(verb, release(status))
    assert refused.value.code == 3003


@pytest.mark.parametrize(("verb", "started_at", "status"), [
    ("pause", None, "paused"), ("cancel", None, "cancelling"),
    ("resume", None, "pending"), ("resume", NOW.text, "running")])
def test_the_status_that_a_verb_brings(verb, started_at, status):
    assert rc.status_after_verb(verb, release("paused", started_at=started_at)) == status


# -- every change of a status ---------------------------------------------------------------------------

def test_the_transitions_are_those_of_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (release|node): ([a-z]+) \| ([a-z, ]+) \|$", text, re.MULTILINE)
    for thing, transitions in (("release", rc.RELEASE_TRANSITIONS), ("node", rc.NODE_TRANSITIONS)):
        assert {status: tuple(after.split(", ")) for kind, status, after in rows if kind == thing} == transitions


def test_no_terminal_release_changes_and_every_verb_is_a_transition():
    assert set(rc.RELEASE_STATUSES) - set(rc.RELEASE_TRANSITIONS) == rc.TERMINAL
    for verb in ("pause", "resume", "cancel", rc.CANCEL_BY_FORCE):
        for status in rc.VERBS[verb].states:
            assert rc.status_after_verb(verb, release(status)) in (status, *rc.RELEASE_TRANSITIONS[status])


# -- rule 2: which releases may be claimed ------------------------------------------------------------

def candidates(*rows):
    return [rc.Candidate(n, target, n, status, running, claimed)
            for n, (target, status, running, claimed) in enumerate(rows, 1)]


@pytest.mark.parametrize(("rows", "free", "taken"), [
    ([("cdn", "pending", 0, False), ("cdn", "pending", 0, False)], [1], []),
    ([("cdn", "pending", 0, False), ("dns", "pending", 0, False)], [1, 2], []),
    ([("cdn", "running", 1, False), ("cdn", "pending", 0, False)], [1], []),
    ([("cdn", "running", 1, True), ("cdn", "pending", 0, False)], [], [1]),
    ([("cdn", "paused", 0, False), ("cdn", "pending", 0, False)], [], []),
    ([("cdn", "paused", 2, False)], [1], []),
    ([("cdn", "cancelling", 0, False)], [1], []),
    ([("cdn", "pending", 0, False), ("cdn", "running", 0, False)], [2], []),
])
def test_rule_2_one_release_of_a_target_is_active_the_lowest_version_first(rows, free, taken):
    assert rc.runnable(candidates(*rows), "", rc.NO_FREEZES, lambda *_: False) == (free, taken)


@pytest.mark.parametrize("seed", range(20))
def test_rule_2_a_release_waits_for_the_first_before_it_of_its_target_or_else_with_a_node_of_its_own(seed):
    chance = random.Random(seed)
    rows = candidates(*((f"t{chance.randrange(60)}", "pending", 0, False) for _ in range(3 * rc.AHEAD_BLOCK)))
    rows = [c._replace(start_at="later" * (chance.random() < 0.1)) for c in rows]
    addresses = {c.id: 1 << chance.randrange(600) | 1 << chance.randrange(600) for c in rows}
    before: list[rc.Candidate] = []
    expected = {}
    for c in rows:
        first = next((a for a in before if a.target == c.target), None) or next(
            (a for a in before if addresses[a.id] & addresses[c.id]), None)
        if not c.start_at:
            expected[c.id] = f"waiting for release {first.id}, which is pending" if first else rc.REASON_PENDING
            before.append(c)
    reasons = rc.waiting_reasons(rows, "", rc.NO_FREEZES, lambda c: addresses[c.id])
    assert {id_: reasons[id_] for id_ in expected} == expected
    assert len(set(expected.values())) > 20


def test_whoever_looks_for_work_compares_no_release_with_each_of_those_before_it():
    rows, asked = candidates(*((f"t{n}", "pending", 0, False) for n in range(1000))), []
    free, _ = rc.runnable(rows, "", rc.NO_FREEZES, lambda c: asked.append(c.id) or 1 << c.id)
    assert len(free) == 1000
    assert len(asked) <= 2 * 1000


# -- the index of the nodes --------------------------------------------------------------------

def test_a_copy_of_an_index_and_its_original_know_nothing_of_each_others_changes():
    chance = random.Random(7)
    count = 3 * rc.NODES_OF_A_PART + 5
    rows = {n: node(n, chance.choice(["pending", "running", "success"]), batch=1 + n // 1000)
            for n in range(1, count)}
    pairs = [(rc.NodeIndex(rows.values()), dict(rows))]
    for _ in range(400):
        index, known = chance.choice(pairs)
        if len(pairs) < 8 and chance.random() < 0.05:
            pairs.append((index.copy(), known.copy()))
        before = known[chance.randrange(1, count)]
        after = before._replace(status=chance.choice([before.status, *rc.NODE_TRANSITIONS.get(before.status, ())]),
                                next_op=chance.choice(["", rc.PROBE]))
        index.put(after)
        known[after.node_id] = after
    for index, known in pairs:
        assert list(index) == list(known.values())
        assert len(index) == len(known)
        for status, found in index.of.items():
            assert sorted(found.values()) == [n for n in known.values() if n.status == status]
            assert len(found) == len(list(found))
        assert index.batch == min(n.batch for n in known.values() if n.status in rc.NODE_OPEN)
        assert index.probed == {n.node_id: n for n in known.values() if n.status == "success" and n.next_op}


# -- what a decision costs ---------------------------------------------------------------------

def decide_counted(situation: rc.Situation) -> tuple[rc.Decision, int]:
    """Return a decision, and how many lines of Python it ran, those of each round of a loop among them."""
    count = 0

    def trace(_frame, event, _argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return rc.decide(situation), count
    finally:
        sys.settrace(before)


SUCCEEDED = rc.NodeEnd("success")
PROBED: dict[str, Any] = {"next_op": rc.PROBE, "in_flight": True, "deadline": NOW.elapsed + 600}
ASKED: dict[str, Any] = {"next_op": rc.PING, "in_flight": True, "deadline": NOW.elapsed + 600}
# What each node of a large release is at, by its place from 0 to 1, and what is asked for.
STAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dispatching": (lambda n, at: node(n, "success" if at < 0.5 else "pending"), {}),
    "many failed": (lambda n, at: node(n, "failed" if at < 0.5 else "pending"),
                    {"strategy": rc.Strategy(max_failed="90%")}),
    "paused": (lambda n, at: node(n, "success" if at < 0.5 else "pending"), {"status": "paused"}),
    "re-verified": (lambda n, at: node(n, "success", 1, is_reverified=at < 0.5) if at < 0.99 else node(n, batch=2), {
        "strategy": rc.Strategy(soak_s=1.0, verify=rc.Verify("http://{main_ip}/")), "soak_until": NOW.text}),
    "preflight": (lambda n, at: node(n, **({**ASKED, "in_flight": False, "has_answered": True} if at < 0.5 else {})),
                  {"strategy": rc.Strategy(preflight=True)}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_decision_costs_does_not_grow_with_the_release(stage):
    """Forty nodes are at work; what decide() runs for them in a release of 500 nodes, and in one of 10,000."""
    node_at, more = STAGES[stage]
    at_work = {"re-verified": lambda n: node(n, "success", **PROBED), "preflight": lambda n: node(n, **ASKED)}.get(
        stage, lambda n: node(n, "running", in_flight=True))
    fields = {"soak_until": more["soak_until"]} if "soak_until" in more else {}
    costs = []
    for count in (500, 10_000):
        middle = count // 2
        index = rc.NodeIndex([at_work(n) if middle <= n < middle + 40 else node_at(n, n / count)
                              for n in range(1, count + 1)])
        situation = rc.Situation(release(more.get("status", "running"), **fields), index, NOW, POLICY,
                                 more.get("strategy", rc.NO_STRATEGY), slots=8)
        index = rc.decide(situation).nodes
        for n in range(middle, middle + 8):
            at = index[n]
            index.put(at._replace(in_flight=False, **(
                {"is_reverified": True, "next_op": ""} if stage == "re-verified" else
                {"has_answered": True} if stage == "preflight" else {"end": SUCCEEDED})))
        decision, cost = decide_counted(situation._replace(nodes=index))
        costs.append(cost)
        assert len(decision.sends) == (0 if stage == "paused" else 8), decision.status_reason
    assert costs[1] < 1.5 * costs[0], costs
