"""A release that goes back by itself (onExceed), and one that goes first: rollback --now, --supersede, --during-freeze.

Contract sections 3 (rules 2 and 10) and 7, on both engines.
"""
from __future__ import annotations

from typing import Any

import pytest
from lab import JSON, add_nodes, assert_books_balance, new_release, sql, statuses
from test_again import TABLES, content_of, ended, everything, good
from test_decision import POLICY
from test_store import now_of

import releasectl as rc

BACK = {"onExceed": "rollback"}
BAD = rc.NodeEnd("failed", "agent_failed", "no disk space", "no disk space")


def cycle(store: rc.Store, claim: rc.Claim, failing: tuple[int, ...] = (), at_rest: tuple[int, ...] | None = None,
          broken: str = "") -> rc.Decision:
    """Read, decide and commit once, as a driver does: nodes that run end, those of failing badly; None: all of them."""
    now = now_of(store)
    release, rows = store.claims.read_with_nodes(claim)
    strategy = rc.parse_strategy(rc.parse_json(release.strategy))
    nodes = [rc.recover(n, now, POLICY) for n in rows]
    nodes = [n._replace(end=BAD if n.node_id in failing else rc.NodeEnd("success"))
             if n.status == rc.RUNNING and (at_rest is None or n.node_id in at_rest) else n for n in nodes]
    decision = rc.decide(rc.Situation(
        release, rc.NodeIndex(nodes), now, POLICY, strategy, slots=100, broken=broken,
        freeze=store.releases.freezes().of(release)))
    store.claims.commit(claim, release, decision, now, "test")
    return decision


def claimed(store: rc.Store, release_id: int) -> rc.Claim:
    claim = store.claims.claim(release_id, "test", 30)
    assert claim, store.releases.get(release_id).status_reason
    return claim


def run(store: rc.Store, release_id: int, *failing: int) -> rc.Release:
    """Let a release run to its end, failing on these nodes."""
    claim = claimed(store, release_id)
    while cycle(store, claim, failing).status not in rc.TERMINAL:
        pass
    assert_books_balance(store, release_id)
    return store.releases.get(release_id)


def rollbacks_of(store: rc.Store, release: rc.Release) -> list[rc.Release]:
    return [store.releases.get(one.id) for one in store.releases.page().items if one.rollback_of == release.id]


def last_event(store: rc.Store, release: rc.Release) -> rc.Event:
    return [e for e in store.releases.events(release.id) if e.node_id is None][-1]


def gone_bad(store: rc.Store, nodes: int = 3, failing: tuple[int, ...] = (2,), **fields) -> rc.Release:
    """Return a release that failed and was to go back by itself, after one that succeeded."""
    add_nodes(store, nodes)
    good(store, "A")
    return run(store, new_release(store, payload={"content": "B"}, strategy={"batches": [1, 1], **BACK}, **fields).id,
               *failing)


def begun(store: rc.Store, nodes: int, **strategy: Any) -> tuple[rc.Release, rc.Claim]:
    """Return a release that goes back by itself, and its claim: its first batch is under way, one before succeeded."""
    add_nodes(store, nodes)
    good(store, "A")
    bad = new_release(store, payload={"content": "B"}, strategy={**strategy, **BACK})
    claim = claimed(store, bad.id)
    cycle(store, claim)
    return bad, claim


# -- a release that ends by onExceed ---------------------------------------------------------------------------

def test_section_7_a_release_that_fails_is_rolled_back_in_the_transaction_of_its_end(store):
    bad = gone_bad(store)
    [back] = rollbacks_of(store, bad)
    assert (bad.status, statuses(store, bad.id)) == ("failed", ["success", "failed", "skipped"])
    assert (content_of(back), back.status, back.goes_first, back.during_freeze) == ("A", "pending", 1, 0)
    assert bad.status_reason == f"stopped by node edge-2 in batch 2: no disk space; release {back.id} rolls it back"
    assert bad.error_msg == "node edge-2: no disk space"
    assert last_event(store, bad).detail == bad.status_reason
    assert back.reason == f"automatic rollback of release {bad.id} to the payload of version 1"
    assert [(node.node_id, node.batch, node.accepted) for node in store.releases.with_nodes(back.id)[1]] == [
        (1, 1, 0), (2, 2, 1)]
    acts = [(row.action, row.object) for row in store.audit.rows(limit=1000)][-2:]
    assert acts == [("release.end", f"release {bad.id}"), ("release.rollback", f"release {back.id}")]
    assert store.audit.verify().faults == []


ROLLBACK_IS = {
    "pending": "to be rolled back by release 3, which waits: releasectl why 3", "running": "release 3 rolls it back",
    "success": "rolled back by release 3", "partial": "rolled back by release 3, which ended partial",
    "failed": "was to be rolled back by release 3, which failed",
    "cancelled": "was to be rolled back by release 3, which was cancelled"}


@pytest.mark.parametrize("status", ROLLBACK_IS)
def test_rule_10_a_release_that_a_person_rolled_back_says_so_however_that_stands(store, status):
    add_nodes(store, 2)
    good(store, "A")
    bad = good(store, "B")
    sql(store, "UPDATE release_tasks SET status_reason = '2 nodes succeeded' WHERE id = ?", bad.id)
    store.releases.rollback(bad.id, "anna")
    sql(store, "UPDATE release_tasks SET status = ? WHERE id = 3", status)
    said = f"2 nodes succeeded; {ROLLBACK_IS[status]}"
    listed = next(one for one in store.releases.page().items if one.id == bad.id)
    assert [one.status_reason for one in (store.releases.as_shown(store.releases.get(bad.id)), listed)] == [said, said]
    assert store.claims.why(bad.id, 600.0).text == f"it has ended: success, {said}"
    shown = rc.release_json(listed)
    assert shown["rolledBackBy"] == (None if status in ("failed", "cancelled") else 3)
    assert shown["rollbackStatus"] == status
    assert rc.release_json(store.releases.get(1))["rolledBackBy"] is None
    assert "\u4e00" <= rc.in_chinese(ROLLBACK_IS[status])[0] <= "\u9fff"


def test_rule_10_of_several_rollbacks_the_first_that_succeeded_is_told_else_the_newest(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = good(store, "B")

    def told() -> tuple[int | None, str]:
        found = rc.release_json(store.releases.get(bad.id))
        return found["rolledBackBy"], found["rollbackStatus"]

    assert told() == (None, "")
    ends = ["failed", "partial", "failed", "success", "success", "pending"]
    for expected, status in enumerate(ends, 3):
        assert store.releases.rollback(bad.id, "anna", rc.Again(over_newer=True)).release.id == expected
        assert told() == ((6, "success") if expected > 6 else (expected, "pending"))
        sql(store, "UPDATE release_tasks SET status = ? WHERE id = ?", status, expected)
        assert told() == {3: (None, "failed"), 4: (4, "partial"), 5: (4, "partial")}.get(expected, (6, "success"))


def test_section_7_a_rollback_never_rolls_back(store):
    bad = gone_bad(store)
    [back] = rollbacks_of(store, bad)
    assert "onExceed" not in rc.parse_json(back.strategy)
    sql(store, "UPDATE release_tasks SET strategy = ? WHERE id = ?",  # a person's hand
        rc.to_json({**rc.parse_json(back.strategy), **BACK}), back.id)
    failed = run(store, back.id, 1)
    assert (failed.status, rollbacks_of(store, failed)) == ("failed", [])


def test_section_7_pause_stays_pause_in_a_rollback(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed", strategy={"onExceed": "pause"})
    assert rc.parse_json(store.releases.rollback(bad.id, "anna").release.strategy)["onExceed"] == "pause"


def test_section_7_the_rollback_comes_when_the_last_node_is_at_rest_and_counts_what_is_unknown_as_touched(store):
    bad, claim = begun(store, 3, batches=["100%"])
    assert cycle(store, claim, (1,), at_rest=(1, 2)).status == "running"
    assert rollbacks_of(store, bad) == []
    assert store.releases.get(bad.id).status_reason == (
        "stopping, node edge-1 failed: waiting for edge-3 to end, then it is rolled back")
    sql(store, "UPDATE release_task_nodes SET started_at = '2020-01-01T00:00:00.000Z', started_clock = '' "
               "WHERE release_task_id = ? AND node_id = 3", bad.id)
    now = now_of(store)
    release, rows = store.claims.read_with_nodes(claim)
    nodes = [n._replace(next_op=rc.QUERY, deadline=now.elapsed - 1, is_unknown=True) if n.node_id == 3 else n
             for n in rows]
    decision = rc.decide(rc.Situation(release, rc.NodeIndex(nodes), now, POLICY, rc.parse_strategy(
        rc.parse_json(release.strategy)), slots=1))
    store.claims.commit(claim, release, decision, now, "test")
    [back] = rollbacks_of(store, bad)
    assert [n.error_kind for n in store.releases.with_nodes(bad.id)[1]] == ["agent_failed", "", "deadline"]
    assert sorted(n.node_id for n in store.releases.with_nodes(back.id)[1]) == [1, 2, 3]


@pytest.mark.parametrize("verb", ["cancel", "cancel --force"])
def test_section_7_a_release_that_a_person_cancels_is_not_rolled_back(store, verb):
    bad, claim = begun(store, 2, batches=["100%"])
    cycle(store, claim, (1,), at_rest=(1,))
    store.releases.act(verb, bad.id, "anna")
    if verb == "cancel":
        cycle(store, claim)
    assert (store.releases.get(bad.id).status, rollbacks_of(store, bad)) == ("cancelled", [])


def test_section_7_what_is_within_the_limits_or_ends_for_another_reason_is_not_rolled_back(store):
    add_nodes(store, 2)
    good(store, "A")
    partly = new_release(store, payload={"content": "B"}, strategy={"maxFailed": 1, **BACK})
    assert (run(store, partly.id, 1).status, rollbacks_of(store, partly)) == ("partial", [])
    broken = new_release(store, payload={"content": "C"}, strategy=BACK)
    assert cycle(store, claimed(store, broken.id), broken="payload can't be used").status == "failed"
    assert rollbacks_of(store, broken) == []


def test_section_7_a_paused_release_that_is_resumed_to_its_end_is_rolled_back(store):
    bad, claim = begun(store, 2, batches=["100%"])
    store.releases.act("pause", bad.id, "anna")
    cycle(store, claim, (1,))
    assert store.releases.get(bad.id).status_reason.endswith("resume to end the release and to roll it back")
    with pytest.raises(rc.AppError, match="ends it then: resume without accepting"):
        store.releases.act("resume", bad.id, "anna", accept_failures=True)
    store.releases.act("resume", bad.id, "anna")
    decision = cycle(store, claim)
    assert (decision.status, decision.changes, len(rollbacks_of(store, bad))) == ("failed", (), 1)
    assert store.claims.was_written(claim, decision)  # after a COMMIT in doubt


@pytest.mark.parametrize("verb", ["cancel", "cancel --force"])
@pytest.mark.parametrize("is_paused", [False, True])
def test_section_7_a_cancel_between_the_failure_and_the_end_says_that_nothing_goes_back(store, verb, is_paused):
    store.database.notify_on = frozenset(("cancelled",))
    bad, claim = begun(store, 2, batches=["100%"])
    cycle(store, claim, (1,), at_rest=(1,))
    if is_paused:
        store.releases.act("pause", bad.id, "anna")
    answer = store.releases.act(verb, bad.id, "anna", "wrong window").status_reason
    if verb == "cancel":
        assert answer == ("cancelling: waiting for edge-2 to end; not rolled back, as it was cancelled: once it has "
                          "ended, releasectl rollback 2")
        cycle(store, claim)
    told = "not rolled back, as it was cancelled: releasectl rollback 2"
    done = "1 of 2" if verb == "cancel" else "0 of 2"
    assert store.releases.get(bad.id).status_reason == f"{done} nodes updated; {told}"
    assert last_event(store, bad).detail.endswith(f"no disk space; {told}")
    with store.database.transaction() as tx:
        assert tx.value("SELECT detail FROM notifications ORDER BY id DESC LIMIT 1").endswith(told)
    assert store.releases.rollback(bad.id, "anna").release.rollback_of == bad.id


def test_section_7_a_cancel_where_nothing_would_have_gone_back_says_nothing_of_it(store):
    add_nodes(store, 2)
    good(store, "A")
    one, other = (new_release(store, payload={"content": text}, strategy=strategy)
                  for text, strategy in (("B", BACK), ("C", {})))
    assert store.releases.act("cancel", one.id, "anna").status_reason == "0 of 2 nodes updated"
    claim = claimed(store, other.id)
    cycle(store, claim)
    store.releases.act("cancel", other.id, "anna")
    cycle(store, claim, (1,))
    assert store.releases.get(other.id).status_reason == "0 of 2 nodes updated"


# -- where there can be no rollback ------------------------------------------------------------------------------

def test_rule_10_without_something_to_go_back_to_it_ends_and_says_why_and_what_to_do(store):
    add_nodes(store, 2)
    bad = run(store, new_release(store, payload={"content": "B"}, strategy=BACK).id, 1)
    assert (bad.status, rollbacks_of(store, bad)) == ("failed", [])
    told = ("not rolled back, as nothing to roll back to: no release of target cdn before 1 succeeded on any of "
            "its nodes")
    mend = "create a release that is good, or name one: releasectl rollback 1 --to ID"
    assert bad.status_reason.startswith("stopped by node edge-1 in batch 1: no disk space; not rolled back, as nothing")
    assert bad.status_reason.endswith(f"; {mend}")
    assert len(bad.status_reason) <= 255
    assert last_event(store, bad).detail == f"stopped by node edge-1 in batch 1: no disk space; {told}; {mend}"
    run(store, new_release(store, payload={"content": "C"}).id)  # as it says
    with pytest.raises(rc.AppError, match="nothing to roll back to: .*; create a release that is good"):
        store.releases.plan_again("rollback", bad.id, rc.Again(over_newer=True))
    assert store.releases.plan_again("rollback", bad.id, rc.Again(over_newer=True, to_release=2)).payload_of == (2, 2)


@pytest.mark.parametrize("change", [
    "UPDATE release_tasks SET payload = 'x' WHERE id = 1", "UPDATE nodes SET agent_protocol = 'execute'"])
def test_rule_10_a_payload_that_can_not_be_brought_back_is_mended_by_another(store, change):
    add_nodes(store, 2)
    good(store, "A")
    bad = new_release(store, payload={"content": "B", "websites": []}, strategy=BACK)
    claim = claimed(store, bad.id)
    cycle(store, claim)
    sql(store, change)
    cycle(store, claim, (1,))
    text = store.releases.get(bad.id).status_reason
    assert "; not rolled back, as the payload of release 1 " in text
    assert text.endswith("; create a release that is good, or name one: releasectl rollback 2 --to ID")


def test_what_a_person_should_do_is_never_cut():
    nodes = rc.NodeIndex([])
    long = rc.Decision((), "failed", "r" * 255, "", (), 0.0, nodes).with_sequel("t" * 255, "m" * 90).status_reason
    assert (len(long), long[-92:]) == (255, "; " + "m" * 90)
    assert min(long.count("r"), long.count("t")) > 40


def test_rule_10_nodes_that_get_nothing_now_are_left_out_by_name_and_without_any_there_is_no_rollback(store):
    add_nodes(store, 2)
    good(store, "A")
    first = new_release(store, payload={"content": "B"}, strategy={"batches": ["100%"], **BACK})
    claim = claimed(store, first.id)
    cycle(store, claim)
    sql(store, "UPDATE nodes SET status = 'offline' WHERE id = 2")
    cycle(store, claim, (1,))
    [back] = rollbacks_of(store, first)
    assert store.releases.get(first.id).status_reason.endswith(
        f"release {back.id} rolls it back, without edge-2 (offline)")
    run(store, back.id)
    sql(store, "UPDATE nodes SET status = 'online'")
    second = new_release(store, payload={"content": "C"}, strategy={"batches": ["100%"], **BACK})
    claim = claimed(store, second.id)
    cycle(store, claim)
    sql(store, "UPDATE nodes SET status = 'offline'")
    cycle(store, claim, (1,))
    assert rollbacks_of(store, second) == []
    assert store.releases.get(second.id).status_reason.endswith(
        f"not rolled back, as release {second.id} has no online nodes that were touched by it; mend that, then: "
        f"releasectl rollback {second.id}")


def test_who_is_left_out_is_told_by_reason():
    left_out = [rc.LeftOut(n, f"edge-{n}", "offline" if n < 5 else "disabled") for n in (1, 5, 2, 3)]
    assert rc.rollback_text(9, left_out, rc.NO_FREEZE) == (
        "release 9 rolls it back, without edge-1, edge-2 and 1 more (offline), edge-5 (disabled)")


def test_rule_10_a_release_that_changed_no_node_has_nothing_to_roll_back(store):
    add_nodes(store, 1)
    good(store, "A")
    bad = new_release(store, payload={"content": "B"}, strategy=BACK)
    claim = claimed(store, bad.id)
    sql(store, "UPDATE nodes SET last_version = 9")
    cycle(store, claim)
    assert (store.releases.get(bad.id).status, rollbacks_of(store, bad)) == ("failed", [])
    assert last_event(store, bad).detail == "stopped by node edge-1 in batch 1: node has version 9 already"
    with pytest.raises(rc.AppError, match=f"nothing to roll back: release {bad.id} changed no node"):
        store.releases.rollback(bad.id, "anna")


def test_section_7_a_notification_of_the_end_says_what_follows(store):
    store.database.notify_on = frozenset(("failed", "created"))
    bad = gone_bad(store)
    [back] = rollbacks_of(store, bad)
    with store.database.transaction() as tx:
        told = tx.rows("SELECT kind, release_task_id, detail FROM notifications ORDER BY id DESC LIMIT 2")[::-1]
    assert told[0] == ("failed", bad.id,
                       f"stopped by node edge-2 in batch 2: no disk space; release {back.id} rolls it back")
    assert told[1][:2] == ("created", back.id)


# -- killed, and in doubt ------------------------------------------------------------------------------------------

def test_rule_9_an_end_whose_commit_was_lost_makes_its_rollback_once(store, monkeypatch):
    bad, claim = begun(store, 2)
    before = everything(store)
    with monkeypatch.context() as patch:
        patch.setattr(rc.Releases, "create_sequel", lambda *_: 1 / 0)  # the process dies here
        with pytest.raises(ZeroDivisionError):
            cycle(store, claim, (1,))
    after = everything(store)
    assert {name: after[name] for name in TABLES} == {name: before[name] for name in TABLES}
    decision = cycle(store, claim, (1,))
    assert store.claims.was_written(claim, decision)
    with pytest.raises(rc.ClaimLost):
        cycle(store, claim, (1,))
    assert len(rollbacks_of(store, bad)) == 1
    assert store.claims.scan() == ([rollbacks_of(store, bad)[0].id], [])


# -- first in the queue ----------------------------------------------------------------------------------------------

def test_rule_2_the_rollback_goes_before_what_waits_and_who_was_overtaken_takes_a_later_version(store):
    add_nodes(store, 2)
    good(store, "A")
    bad, first, second = (new_release(store, payload={"content": text, "version": n}, strategy=BACK)
                          for n, text in ((2, "B"), (3, "C"), (4, "D")))
    run(store, bad.id, 1)
    [back] = rollbacks_of(store, bad)
    assert store.claims.scan() == ([back.id], [])
    assert store.releases.get(first.id).status_reason == (
        f"waiting for release {back.id}, which is pending and goes first")
    assert [step.text for step in store.claims.why(first.id, 600).steps if step.name == "order"] == [
        f"waiting for release {back.id}, which is pending and goes first"]
    assert run(store, back.id, 1).status == "partial"
    assert store.claims.scan() == ([first.id], [])
    for one in (first, second):  # by its new version the second comes first, until it has a new one too
        assert store.claims.claim(one.id, "test", 30) is None
    assert run(store, first.id).status == run(store, second.id).status == "success"
    ended_first, ended_second = store.releases.get(first.id), store.releases.get(second.id)
    assert (ended_first.version, ended_second.version) == (6, 7)
    assert rc.parse_json(ended_first.payload) == {"content": "C", "version": 6}
    assert [e.detail for e in store.releases.events(first.id) if e.event == "renumbered"] == [
        f"version 3 became 6: release {back.id} (v5) went out before it"]
    assert all(status == "success" for one in (first, second) for status in statuses(store, one.id))


def test_rule_2_a_row_that_a_person_wrote_with_a_low_version_keeps_it_unless_it_was_overtaken(store):
    add_nodes(store, 1)
    good(store, "A")
    sql(store, "UPDATE release_tasks SET started_at = '2020-01-01T00:00:00.000Z', version = 8 WHERE id = 1")
    sql(store, "UPDATE nodes SET last_version = 8")
    sql(store, "INSERT INTO release_tasks (version) VALUES (5)")
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (2, 1, 1)")
    assert store.claims.claim(2, "test", 30).version == 5


def test_rule_2_a_release_of_another_target_is_overtaken_where_it_shares_a_node(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = new_release(store, payload={"content": "B"}, strategy=BACK)
    shared, apart = (new_release(store, target="dns", node_ids=[number]) for number in (1, 2))
    run(store, bad.id, 1)
    [back] = rollbacks_of(store, bad)
    assert [n.node_id for n in store.releases.with_nodes(back.id)[1]] == [1]
    assert store.claims.claim(shared.id, "test", 30) is None
    run(store, back.id)
    assert store.claims.claim(shared.id, "test", 30) is None  # by its new version the other one of dns comes first
    assert run(store, apart.id).version == 4  # nobody overtook it
    assert run(store, shared.id).version == 6


# -- freeze ------------------------------------------------------------------------------------------------------------

def test_section_7_a_freeze_holds_an_automatic_rollback_and_the_end_says_so(store):
    bad, claim = begun(store, 2)
    store.releases.set_freeze(True, "anna", "holidays")
    cycle(store, claim, (1,))
    [back] = rollbacks_of(store, bad)
    assert store.releases.get(bad.id).status_reason.endswith(
        f"release {back.id} rolls it back once the freeze is lifted")
    assert (back.status_reason, store.claims.scan()) == ("frozen: holidays", ([], []))
    store.releases.set_freeze(False, "anna")
    assert store.claims.scan() == ([back.id], [])


def test_section_7_during_freeze_goes_out_in_a_freeze_and_needs_a_reason_that_is_in_the_audit_log(store):
    bad = gone_bad(store)
    [automatic] = rollbacks_of(store, bad)
    store.releases.set_freeze(True, "anna", "holidays")
    for act in (store.releases.plan_again, lambda _, number, wish: store.releases.rollback(number, "anna", wish)):
        with pytest.raises(rc.AppError, match="reason is missing") as refused:
            act("rollback", bad.id, rc.Again(during_freeze=True))
        assert refused.value.code == 2001
    made = store.releases.rollback(bad.id, "anna", rc.Again("shop is down", during_freeze=True)).release
    # what is frozen holds nobody up
    assert (store.claims.scan(), store.releases.get(automatic.id).status) == (([made.id], []), "pending")
    assert rc.stored_json(store.audit.rows(limit=1000)[-1].after).items() >= {
        "duringFreeze": True, "reason": "shop is down", "rollbackOf": bad.id}.items()
    steps = {step.name: step for step in store.claims.why(made.id, 600).steps}
    assert (steps["freeze"].state, "goes out all the same" in steps["freeze"].text) == ("ok", True)
    assert run(store, made.id).status == "success"
    assert store.releases.get(automatic.id).status_reason == "frozen: holidays"
    store.releases.set_freeze(False, "anna")
    assert store.claims.claim(automatic.id, "test", 30) is None  # it would bring back what the other one did
    assert store.releases.get(automatic.id).status_reason.startswith(
        f"release {made.id} (v{made.version}) succeeded later on edge-1 and 1 more: this rollback comes too late")


def test_section_7_a_freeze_that_comes_later_does_not_hold_it_and_counts_no_pause(store):
    bad = gone_bad(store)
    made = store.releases.rollback(bad.id, "anna", rc.Again("now", during_freeze=True, supersede=True)).release
    claim = claimed(store, made.id)
    cycle(store, claim)
    store.releases.set_freeze(True, "anna", "holidays")
    assert [e.event for e in store.releases.events(made.id) if e.event == "frozen"] == []
    assert store.claims.halts(made.id) == []
    while cycle(store, claim).status not in rc.TERMINAL:
        pass
    assert store.releases.get(made.id).status == "success"


def test_section_7_the_plan_of_a_rollback_says_what_would_hold_it_and_what_goes_without(store):
    bad = gone_bad(store)
    store.database.approvals = True
    store.releases.set_freeze(True, "anna", "holidays", "cdn")
    frozen = "cdn is frozen by anna: holidays: it waits; duringFreeze (--during-freeze) goes out all the same"
    unapproved = ("waits for approval by somebody else than its author; in an emergency it goes without: emergency "
                  "(--emergency)")
    without = "emergency: it goes without an approval, and everybody is told so"

    [back] = rollbacks_of(store, bad)
    store.releases.act("cancel", back.id, "anna")

    def told(**wish) -> list[str]:
        return store.releases.plan_again("rollback", bad.id, rc.Again("down", **wish)).warnings

    assert told() == [frozen, unapproved]
    assert told(during_freeze=True) == [unapproved]
    assert told(is_emergency=True) == [frozen, without]
    assert told(during_freeze=True, is_emergency=True, supersede=True) == [without]
    assert store.releases.rollback(bad.id, "anna").warnings == [frozen]
    assert store.releases.plan(rc.ReleaseRequest()).warnings == [unapproved]


def test_section_7_a_rollback_of_what_is_open_is_refused_with_what_to_roll_back_or_to_end(store):
    add_nodes(store, 2)
    only = new_release(store)
    with pytest.raises(rc.AppError, match="release 1 is pending and changed no node: releasectl cancel 1$"):
        store.releases.rollback(only.id, "anna")
    run(store, only.id)
    running = new_release(store, payload={"content": "B"}, strategy={"batches": ["100%"]})
    waits = new_release(store)
    claim = claimed(store, running.id)
    cycle(store, claim)
    for one, words in (
            (waits, "is pending and changed no node; the newest of target cdn that went out is release 2: releasectl "
                    "rollback 2"),
            (running, "is running; a release is rolled back after its end: releasectl cancel 2")):
        with pytest.raises(rc.AppError, match=f"release {one.id} {words}$") as refused:
            store.releases.plan_again("rollback", one.id, rc.Again(supersede=True))
        assert refused.value.code == 3003
    store.releases.act("cancel", running.id, "anna")
    with pytest.raises(rc.AppError, match="release 2 is cancelling; a release is rolled back after its end: releasectl "
                                          "watch 2$"):
        store.releases.rollback(running.id, "anna")


# -- supersede ---------------------------------------------------------------------------------------------------------

def waiting(store: rc.Store) -> list[rc.Release]:
    """Return four releases that have not started: pending, paused, of another target, and one that starts late."""
    made = [new_release(store), new_release(store), new_release(store, target="dns"),
            new_release(store, strategy={"startAt": "2999-01-01T00:00:00Z"})]
    store.releases.act("pause", made[1].id, "bob")
    return made


def test_section_7_supersede_cancels_what_has_not_started_of_the_target_and_names_it(store):
    add_nodes(store, 2)
    pending, paused, dns, late = waiting(store)
    wanted = rc.ReleaseRequest(payload={"content": "B"}, supersede=True)
    before = everything(store)
    plan = store.releases.plan(wanted)
    assert everything(store) == before
    made = store.releases.create(wanted, "anna")
    assert plan.superseded == made.superseded == [(1, 1), (2, 2), (4, 4)]
    why = f"superseded by release {made.release.id} (v5)"
    for one in (pending, paused, late):
        after = store.releases.get(one.id)
        assert (after.status, after.status_reason) == ("cancelled", f"{why}: 0 of 2 nodes updated")
        assert [(e.to_status, e.actor, e.detail) for e in store.releases.events(one.id) if e.node_id is None][-2:] == [
            ("cancelling", "anna", why), ("cancelled", "anna", why)]
        assert_books_balance(store, one.id)
    assert store.releases.get(dns.id).status == "pending"
    cancels = [row for row in store.audit.rows(limit=1000) if row.action == "release.cancel"]
    assert [row.object for row in cancels] == ["release 1", "release 2", "release 4"]
    assert {rc.stored_json(row.after)["reason"] for row in cancels} == {why}
    assert store.audit.verify().faults == []


def test_rule_7_a_release_that_a_person_wrote_and_that_is_superseded_counts_its_nodes(store):
    add_nodes(store, 1)
    sql(store, "INSERT INTO release_tasks (version) VALUES (1)")
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (1, 1, 1)")
    store.releases.create(rc.ReleaseRequest(supersede=True), "anna")
    assert_books_balance(store, 1)
    assert store.releases.get(1).total_nodes == 1


def test_section_7_an_emergency_rollback_goes_first_and_does_not_wait_behind_what_is_queued(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed")
    queued = [new_release(store, payload={"content": text}) for text in "CD"]
    other = new_release(store, target="dns", payload={"content": "X"})
    plain = store.releases.plan_again("rollback", bad.id)
    assert plain.superseded == []
    assert plain.warnings == [f"goes behind release {queued[0].id} (v3) and 1 more: supersede (--now) cancels them and "
                              "goes first"]
    made = store.releases.rollback(bad.id, "anna", rc.Again(supersede=True))
    assert [one.release_id for one in made.superseded] == [one.id for one in queued]
    assert (made.release.goes_first, store.claims.scan()) == (1, ([made.release.id], []))
    assert store.releases.get(other.id).status_reason == (
        f"waiting for release {made.release.id}, which is pending and goes first")


def test_section_7_what_runs_is_not_cancelled_and_the_answer_names_the_command(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed")
    running = new_release(store, payload={"content": "C"})
    claimed(store, running.id)
    warning = f"waits for release {running.id} (v3), which is running: releasectl cancel {running.id}"
    assert store.releases.plan_again("rollback", bad.id, rc.Again(supersede=True)).warnings == [warning]
    made = store.releases.rollback(bad.id, "anna", rc.Again(supersede=True))
    assert (made.superseded, made.warnings) == ([], [warning])
    assert store.releases.get(running.id).status == "running"
    assert store.releases.get(made.release.id).status_reason == f"waiting for release {running.id}, which is running"
    assert store.releases.create(rc.ReleaseRequest(supersede=True), "anna").warnings == [
        warning, f"cancels release {made.release.id}, which is to roll back release {bad.id}"]
    assert store.releases.create(rc.ReleaseRequest(), "anna").warnings == []


def test_section_5_the_api_names_what_was_superseded_and_a_replay_says_the_same(client):
    store = client.store
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed")
    queued = new_release(store)
    named = [{"releaseId": queued.id, "version": queued.version}]
    path, body = f"/api/v1/releases/{bad.id}/rollback", {"supersede": True, "duringFreeze": True, "reason": "down"}
    assert client.ok("POST", path, {**body, "dryRun": True})["superseded"] == named
    key = {**JSON, "Idempotency-Key": "k-1"}
    made = client("POST", path, body, key).data
    assert made["superseded"] == named
    assert client("POST", path, body, key).data == made
    shown = client.ok("GET", f"/api/v1/releases/{made['releaseId']}?view=summary")["release"]
    assert (shown["goesFirst"], shown["duringFreeze"]) == (True, True)
    for wrong in ({"supersede": 1}, {"duringFreeze": "yes"}):
        assert client("POST", path, wrong).code == 2003
    assert client("POST", path, {"duringFreeze": True}).code == 2001
    again = client.ok("POST", "/api/v1/releases", {"supersede": True}, 201)
    assert again["superseded"] == [{"releaseId": made["releaseId"], "version": made["version"]}]


# -- a retry, and its batches -------------------------------------------------------------------------------------

def test_rule_10_a_retry_leaves_out_who_is_excluded_or_not_selected_any_more_and_names_them(store):
    add_nodes(store, 4)
    for node_id, labels in ((1, {"region": "eu"}), (2, {"region": "eu"}), (3, {"region": "eu"}), (4, {"region": "us"})):
        sql(store, "UPDATE nodes SET labels = ? WHERE id = ?", rc.to_json(labels), node_id)
    old = ended(store, "B", "failed", "failed", "skipped", labels={"region": "eu"},
                exclude={"labels": {"role": ["cache"]}})
    sql(store, "UPDATE nodes SET labels = ? WHERE id = 1", rc.to_json({"region": "eu", "role": "cache"}))
    sql(store, "UPDATE nodes SET labels = ? WHERE id = 2", rc.to_json({"region": "ap"}))
    made = store.releases.retry(old.id, "anna")
    assert made.batches == [[3]]
    assert made.left_out == [(1, "edge-1", "excluded"), (2, "edge-2", "no longer selected (region=eu)")]
    sql(store, "UPDATE nodes SET labels = '{}'")
    with pytest.raises(rc.AppError, match="has no online nodes that were failed or skipped"):
        store.releases.retry(old.id, "anna")


def test_rule_10_a_retry_of_a_rollback_keeps_its_batches_however_many_and_whatever_their_nodes(store):
    add_nodes(store, 6)
    for number in range(1, 7):  # by region: 2, 4, 6 then 1, 3, 5
        sql(store, "UPDATE nodes SET labels = ? WHERE id = ?", rc.to_json({"region": "ba"[number % 2 == 0]}), number)
    good(store, "A")
    bad = new_release(store, payload={"content": "B"}, strategy={"batchBy": "region", **BACK})
    assert [n.node_id for n in store.releases.with_nodes(bad.id)[1]] == [2, 4, 6, 1, 3, 5]
    run(store, bad.id, 5)
    [back] = rollbacks_of(store, bad)
    assert run(store, back.id, 4).status == "failed"
    retry = store.releases.retry(back.id, "anna")
    assert retry.batches == [[4], [1, 3], [5]]  # 2 and 6 were done with it
    assert rc.parse_json(retry.release.strategy)["batches"] == [1, 2]
    run(store, retry.release.id, 4)
    assert store.releases.retry(retry.release.id, "anna").batches == [[4], [1, 3], [5]]


def test_section_7_batch_1_is_one_node_where_none_of_first_is_left_also_by_region():
    nodes = [rc.Node(n, f"edge-{n}", f"10.0.0.{n}", 8443, "tasks", rc.to_json({"region": "ab"[n % 2]}), 1, "online", "",
                     "") for n in range(1, 7)]
    strategy = rc.parse_strategy({"first": {"role": "canary"}, "batchBy": "region"})
    assert rc.batches_of(strategy, nodes) == [("region=a", [2]), ("region=a", [4, 6]), ("region=b", [1, 3, 5])]
    sized = strategy._replace(batches=(2,))
    assert [batch for _, batch in rc.batches_of(sized, nodes)] == [[2, 4], [6], [1, 3], [5]]


# -- the command line --------------------------------------------------------------------------------------------------

def test_section_4_the_plan_and_the_answer_name_what_is_superseded_and_what_is_waited_for(quick, open_store):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed")
    running, queued = new_release(store), new_release(store)
    claimed(store, running.id)
    note = f"note: waits for release {running.id} (v3), which is running: releasectl cancel {running.id}"
    plan = quick.ok("rollback", bad.id, "--now", "--plan").out
    assert f"release {queued.id} (v4) would be cancelled: superseded, it has not started\n{note}" in plan
    assert "payload of release 1 (v1)" in plan
    assert "reason is missing: say why it can't wait for the end of the freeze" in quick.refused(
        2, "rollback", bad.id, "--now", "--during-freeze")
    made = quick.ok("rollback", bad.id, "--now", "--during-freeze", "--reason", "shop is down").out
    assert f"release {queued.id} (v4) was cancelled: superseded, it has not started\n{note}" in made
    assert store.releases.get(5).during_freeze == store.releases.get(5).goes_first == 1
    assert "release 5 (v5) was cancelled: superseded" in quick.ok("create", "--supersede").out


def test_section_4_a_plan_says_that_a_release_goes_back_by_itself(quick, open_store):
    add_nodes(open_store(f"sqlite:///{quick.folder}/releasectl.db"), 2)
    assert "more failures: it is rolled back" in quick.ok("create", "--on-exceed", "rollback", "--plan").out
    assert "pause" in quick.refused(2, "create", "--on-exceed", "stop")
