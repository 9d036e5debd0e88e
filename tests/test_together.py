"""What approvals, rollbacks by themselves, hurry, freezes and the preflight do to each other, on both engines."""
from __future__ import annotations

import pytest
from lab import JSON, add_nodes, assert_books_balance, new_release, nodes_of, sql, statuses
from test_again import content_of, ended, everything, good
from test_approvals import ALICE, BOB, approve, runnable
from test_decision import POLICY
from test_goes_back import BACK, begun, claimed, cycle, gone_bad, last_event, rollbacks_of, run
from test_overview import ignore
from test_store import now_of

import releasectl as rc

NOW = rc.Again("checkout answers 502", supersede=True)


def needs_approvals(store: rc.Store) -> rc.Store:
    """Let all processes have APPROVALS=1 from now on."""
    store.database.approvals = True
    return store


def bad_release(store: rc.Store) -> rc.Release:
    """Return a release that failed, after one that succeeded; from now on releases need an approval."""
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed")
    needs_approvals(store)
    return bad


def reason_of(store: rc.Store, release: rc.Release) -> str:
    return store.releases.get(release.id).status_reason


def silent(store: rc.Store, claim: rc.Claim, *node_ids: int) -> rc.Decision:
    """Decide and commit as a driver does whose questions before batch 1 these nodes left without an answer."""
    now = now_of(store)
    release, rows = store.claims.read_with_nodes(claim)
    no_answer = rc.NodeEnd("failed", "unreachable", "refused", "refused")
    nodes = [n._replace(next_op=rc.PING, deadline=now.elapsed + 600, has_answered=n.node_id not in node_ids,
                        end=no_answer if n.node_id in node_ids else None) for n in rows]
    decision = rc.decide(rc.Situation(release, rc.NodeIndex(nodes), now, POLICY, rc.parse_strategy(
        rc.parse_json(release.strategy)), slots=9))
    store.claims.commit(claim, release, decision, now, "test")
    return decision


# -- approvals, and what goes back --------------------------------------------------------------------------------

def test_a_rollback_by_itself_waits_for_no_second_person(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = new_release(store, payload={"content": "B"}, strategy=BACK)
    claim = claimed(store, bad.id)
    needs_approvals(store)
    waiting = new_release(store)
    run_on(store, claim, 1)
    [back] = rollbacks_of(store, bad)
    assert (back.approval, back.awaits_approval, runnable(store)) == ("automatic", False, [back.id])
    assert [step.state for step in store.claims.why(back.id, 600).steps if step.name == "approval"] == [rc.OK]
    [made] = [row for row in store.audit.rows(limit=100) if row.action == "release.rollback"]
    assert rc.parse_json(made.after)["approval"] == "automatic"
    with pytest.raises(rc.AppError, match="waits for no approval"):
        approve(store, back.id)
    assert (run(store, back.id).status, store.releases.get(waiting.id).status) == ("success", "pending")


def run_on(store: rc.Store, claim: rc.Claim, *failing: int) -> None:
    """Let a claimed release run to its end, failing on these nodes."""
    while cycle(store, claim, failing).status not in rc.TERMINAL:
        pass


def test_what_people_make_of_a_rollback_by_itself_waits_again(store):
    bad = gone_bad(store)
    [back] = rollbacks_of(store, bad)
    run(store, back.id, 1)
    needs_approvals(store)
    again = store.releases.retry(back.id, "anna").release
    assert (again.approval, runnable(store)) == ("wanted", [])


def test_a_freeze_that_comes_while_a_rollback_by_itself_waits_holds_it_and_nobody_behind_it(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = new_release(store, payload={"content": "B"}, strategy=BACK)
    run(store, bad.id, 1)
    [back] = rollbacks_of(store, bad)
    dns = new_release(store, target="dns", node_ids=[1])
    assert runnable(store) == [back.id]
    freeze = store.releases.set_freeze(True, "anna", "holidays", "cdn").of_target("cdn")
    assert (runnable(store), reason_of(store, back)) == ([dns.id], freeze.text)
    assert last_event(store, back).event == "frozen"
    assert [step.name for step in store.claims.why(back.id, 600).steps if step.state == rc.STOPS] == [
        "freeze", "executor"]
    assert run(store, dns.id).status == "success"
    store.releases.set_freeze(False, "anna", "", "cdn")
    assert (runnable(store), last_event(store, back).event) == ([back.id], "unfrozen")
    # a node was sent a higher version meanwhile
    assert (run(store, back.id).status, store.releases.get(back.id).version) == ("success", dns.version + 1)


# -- approvals, and what is in a hurry ----------------------------------------------------------------------------

def test_what_waits_for_an_approval_is_superseded_like_all_that_has_not_started(store):
    add_nodes(store, 1)
    first = new_release(store, approval="wanted")
    made = store.releases.create(rc.ReleaseRequest(supersede=True), ALICE)
    assert [one.release_id for one in made.superseded] == [first.id]
    assert reason_of(store, first).startswith(f"superseded by release {made.release.id} (v2)")
    with pytest.raises(rc.AppError, match=f"release {first.id} is cancelled and waits for no approval$"):
        approve(store, first.id)
    assert runnable(store) == [made.release.id]
    assert_books_balance(store, first.id)


@pytest.mark.parametrize("has_setting", [False, True])
def test_what_needs_an_approval_cancels_nothing_before_it_has_one(store, has_setting):
    bad = bad_release(store)
    store.database.approvals = has_setting
    queued, wanted = new_release(store), rc.ReleaseRequest(supersede=True, approval="" if has_setting else "wanted")
    acts = [lambda: store.releases.plan(wanted), lambda: store.releases.create(wanted, ALICE)]
    if has_setting:
        acts += [lambda: store.releases.plan_again("rollback", bad.id, NOW),
                 lambda: store.releases.rollback(bad.id, ALICE, NOW)]
    before = everything(store)
    for act in acts:
        with pytest.raises(rc.AppError, match="cancels no other release before it has one: leave out super") as refused:
            act()
        assert refused.value.code == rc.WRONG_STATE
    assert everything(store) == before
    made = store.releases.create(wanted._replace(is_emergency=True, reason="down"), ALICE)
    assert ([one.release_id for one in made.superseded], made.release.approval) == ([queued.id], "emergency")


def test_who_cancels_a_rollback_or_repeats_one_is_told_so(store):
    bad = gone_bad(store)
    [back] = rollbacks_of(store, bad)
    twice = f"release {back.id} rolls back release {bad.id} already: releasectl why {back.id}"
    assert store.releases.plan_again("rollback", bad.id).warnings[-1] == twice
    wanted = rc.ReleaseRequest(supersede=True)
    cancels = f"cancels release {back.id}, which is to roll back release {bad.id}"
    for plan in (store.releases.plan(wanted), store.releases.plan_again("rollback", bad.id, NOW)):
        assert plan.warnings == [cancels]
    assert store.releases.create(wanted, ALICE).warnings == [cancels]


def told_of(store: rc.Store, release: rc.Release) -> tuple[str, str, str]:
    """Return what a release is said to be, what the verdict says of it, and what would mend it."""
    [problem] = [p for p in store.overview.read([]).problems if p.release_id == release.id]
    shown = store.releases.as_shown(store.releases.get(release.id)).status_reason
    assert shown == store.releases.progress(release.id).release.status_reason
    assert shown == [r for r in store.releases.page().items if r.id == release.id][0].status_reason
    assert shown in store.claims.why(release.id, 600).text
    return shown, problem.text, problem.mend


@pytest.mark.parametrize("by", ["a person", "another release"])
def test_what_is_said_of_a_rollback_is_how_it_stands_and_no_retry_is_offered_while_it_is_open(store, by):
    bad, claim = begun(store, 2)
    store.releases.set_freeze(True, "anna", "holidays")
    cycle(store, claim, (1,))
    bad, [back] = store.releases.get(bad.id), rollbacks_of(store, bad)
    waits = f"to be rolled back by release {back.id}, which waits: releasectl why {back.id}"
    for verb in ("pause", "resume"):
        shown, text, mend = told_of(store, bad)
        assert (shown.endswith(waits), text.endswith(waits), mend) == (True, True, f"releasectl why {back.id}")
        store.releases.act(verb, back.id, ALICE)
    if by == "a person":
        store.releases.act("cancel", back.id, ALICE)
    else:
        store.releases.create(rc.ReleaseRequest(supersede=True, target="cdn"), ALICE)
    was_to = f"was to be rolled back by release {back.id}, which was cancelled"
    shown, text, mend = told_of(store, bad)
    assert (shown.endswith(was_to), text.endswith(was_to), mend) == (True, True, f"releasectl rollback {bad.id} --plan")
    again = store.releases.rollback(bad.id, ALICE).release
    assert told_of(store, bad)[2] == f"releasectl why {again.id}"
    assert reason_of(store, bad) == bad.status_reason  # a terminal release never changes


@pytest.mark.parametrize(("status", "text"), [
    ("pending", "to be rolled back by release 4, which waits: releasectl why 4"),
    ("paused", "to be rolled back by release 4, which waits: releasectl why 4"),
    ("running", "release 4 rolls it back"), ("success", "rolled back by release 4"),
    ("cancelled", "was to be rolled back by release 4, which was cancelled"),
    ("partial", "rolled back by release 4, which ended partial"),
    ("failed", "was to be rolled back by release 4, which failed"), ("cancelling", "release 4 rolls it back")])
def test_a_sentence_on_a_rollback_that_got_old_is_replaced(store, status, text):
    def told(reason: str) -> str:
        return rc.as_read(bad._replace(
            status_reason=reason, rollback_id=4, rollback_status=status)).status_reason

    bad = bad_release(store)
    for old in ("release 3 rolls it back", "release 4 rolls it back once the freeze is lifted"):
        assert told(f"stopped; {old}, without edge-2") == f"stopped; {text}, without edge-2"
    assert told("stopped") == f"stopped; {text}"


@pytest.mark.parametrize(("approval", "asks"), [("", ""), ("wanted", "wanted"), ("given", "wanted"), ("automatic", "")])
def test_a_rollback_to_what_asked_for_an_approval_asks_for_it_again_and_says_what_never_went_out(store, approval, asks):
    bad = bad_release(store)
    store.database.approvals = False
    other = new_release(store, payload={"content": "C"})
    sql(store, "UPDATE release_tasks SET approval = ? WHERE id = ?", approval, other.id)
    store.releases.act("cancel", other.id, ALICE)
    wish, note = rc.Again(to_release=other.id), f"release {other.id} (v{other.version}) never went out"
    assert note in store.releases.plan_again("rollback", bad.id, wish).warnings
    made = store.releases.rollback(bad.id, ALICE, wish)
    assert (made.release.approval, made.warnings) == (asks, [note])
    sql(store, "UPDATE release_tasks SET started_at = created_at WHERE id = ?", other.id)
    assert f"release {other.id} (v{other.version}) succeeded on no node" in store.releases.plan_again(
        "rollback", bad.id, wish).warnings
    sql(store, "UPDATE release_tasks SET approval = 'given' WHERE id = 1")
    assert store.releases.rollback(bad.id, ALICE).release.approval == ""  # it succeeded since, on these nodes


def test_a_retry_of_a_rollback_that_goes_out_in_a_freeze_does_so_too_and_says_it(store):
    bad = bad_release(store)
    store.database.approvals = False
    store.releases.set_freeze(True, ALICE, "holidays")
    made = store.releases.rollback(bad.id, ALICE, rc.Again("down", during_freeze=True)).release
    run(store, made.id, 1)
    retry = store.releases.retry(made.id, ALICE)
    assert (retry.release.during_freeze, retry.warnings) == (1, [f"goes out in a freeze too, as release {made.id} may"])
    assert runnable(store) == [retry.release.id]


def test_in_an_emergency_a_rollback_at_once_starts_at_once(store):
    bad = bad_release(store)
    made = store.releases.rollback(bad.id, ALICE, NOW._replace(is_emergency=True))
    assert (made.release.approval, runnable(store)) == ("emergency", [made.release.id])


# -- who is overtaken while it waits ------------------------------------------------------------------------------

def test_who_was_approved_late_takes_a_version_above_those_that_went_out_before_it(store):
    add_nodes(store, 2)
    needs_approvals(store)
    late, other, dns = (new_release(store, target=target, payload={"version": number}, node_ids=ids)
                        for number, target, ids in ((1, "cdn", None), (2, "cdn", [1]), (3, "dns", [2])))
    for one in (other, dns):
        approve(store, one.id)
        assert run(store, one.id).version == one.version
    approve(store, late.id)
    done = run(store, late.id)
    assert (done.version, statuses(store, late.id)) == (4, ["success", "success"])
    assert rc.parse_json(done.payload) == {"version": 4}
    assert [e.detail for e in store.releases.events(late.id) if e.event == "renumbered"] == [
        f"version 1 became 4: release {other.id} (v2) went out before it"]


@pytest.mark.parametrize("verb", ["retry", "rollback"])
def test_rule_10_who_is_overtaken_by_a_success_on_its_nodes_is_cancelled_at_its_start(store, verb):
    bad = bad_release(store)
    again = getattr(store.releases, verb)(bad.id, ALICE).release
    newer = new_release(store, payload={"content": "C"})
    approve(store, newer.id)
    assert run(store, newer.id).status == "success"
    approve(store, again.id)
    assert store.claims.claim(again.id, "test", 30) is None
    names = "edge-2" if verb == "retry" else "edge-1 and 1 more"
    why = f"release {newer.id} (v{newer.version}) succeeded later on {names}: this {verb} comes too late; {verb} again "
    assert (store.releases.get(again.id).status, reason_of(store, again)) == (
        "cancelled", f"{why}with --over-newer if it is meant all the same: 0 of {again.total_nodes} nodes updated")
    assert runnable(store) == []
    assert_books_balance(store, again.id)
    with pytest.raises(rc.AppError, match="overNewer"):
        getattr(store.releases, verb)(bad.id, ALICE)


def test_rule_10_who_asks_to_replace_a_newer_success_is_cancelled_by_a_still_newer_one_alone(store):
    bad = bad_release(store)
    newer = new_release(store, payload={"content": "C"}, node_ids=[1])
    approve(store, newer.id)
    run(store, newer.id)
    again = store.releases.rollback(bad.id, ALICE, rc.Again(over_newer=True)).release
    elsewhere = new_release(store, target="dns", node_ids=[1])
    approve(store, elsewhere.id)
    run(store, elsewhere.id)
    approve(store, again.id)
    assert (content_of(again), run(store, again.id).status) == ("A", "success")


def test_rule_10_a_rollback_that_a_person_wrote_goes_out_as_it_stands(store):
    bad = gone_bad(store, 1, (1,))
    sql(store, "UPDATE release_tasks SET tag = '', goes_first = 0 WHERE rollback_of = ?", bad.id)
    newer = new_release(store, strategy={"startAt": "2020-01-01T00:00:00Z"})
    sql(store, "UPDATE release_tasks SET status = 'success' WHERE id = ?", newer.id)
    sql(store, "UPDATE release_task_nodes SET status = 'success' WHERE release_task_id = ?", newer.id)
    [back] = rollbacks_of(store, bad)
    claimed(store, back.id)


# -- the preflight, and what goes back or ends by force -----------------------------------------------------------

def test_a_preflight_that_ends_a_release_rolls_nothing_back_and_says_only_what_is_so(store):
    add_nodes(store, 2)
    good(store, "A")
    release = new_release(store, strategy={"preflight": True, **BACK})
    assert silent(store, claimed(store, release.id), 2).status == "failed"
    assert rollbacks_of(store, release) == []
    said = "preflight: 1 of 2 agents did not answer (1 unreachable); nothing was sent"
    assert reason_of(store, release) == f"{said}; such as node edge-2: refused"
    assert last_event(store, release).detail == f"{said}; such as node edge-2: refused"
    assert [(n.status, n.attempts) for n in nodes_of(store, release)] == [("skipped", 0), ("failed", 0)]


def test_a_silent_node_that_was_tolerated_and_then_fails_is_rolled_back(store):
    add_nodes(store, 2)
    good(store, "A")
    release = new_release(store, payload={"content": "B"}, strategy={
        "preflight": True, "batches": ["100%"], "maxFailedTotal": 1, **BACK})
    claim = claimed(store, release.id)
    silent(store, claim, 2)
    assert rc.RUNNING in statuses(store, release.id)
    run_on(store, claim, 1, 2)
    [back] = rollbacks_of(store, release)
    assert sorted(n.node_id for n in nodes_of(store, back)) == [1, 2]
    assert "preflight" not in rc.parse_json(back.strategy)


@pytest.mark.parametrize("verb", ["cancel", "cancel --force"])
def test_a_cancel_during_the_preflight_ends_it_at_once_and_what_was_decided_is_not_written(store, verb):
    add_nodes(store, 2)
    good(store, "A")
    release = new_release(store, strategy={"preflight": True, **BACK})
    claim = claimed(store, release.id)
    store.releases.act(verb, release.id, "anna")
    assert (store.releases.get(release.id).status, statuses(store, release.id)) == ("cancelled", ["skipped"] * 2)
    with pytest.raises((rc.ClaimLost, rc.StateMoved)):
        silent(store, claim)
    assert (runnable(store), rollbacks_of(store, release)) == ([], [])
    assert [node.last_version for node in store.nodes.page().items] == [1, 1]
    assert_books_balance(store, release.id)


# -- approvals, and who takes over --------------------------------------------------------------------------------

@pytest.mark.parametrize("approval", ["", "given", "automatic"])
def test_who_takes_over_what_has_started_asks_for_no_approval(store, approval):
    add_nodes(store, 1)
    release = new_release(store)
    sql(store, "UPDATE release_tasks SET approval = ? WHERE id = ?", approval, release.id)
    store.claims.claim(release.id, "first", 0.001)
    needs_approvals(store)
    sql(store, "UPDATE release_tasks SET claim_expires_at = '2020-01-01T00:00:00.000Z' WHERE id = ?", release.id)
    assert runnable(store) == [release.id]
    claim = store.claims.claim(release.id, "second", 30)
    assert (claim.fence, store.releases.get(release.id).approval) == (2, approval)
    with pytest.raises(rc.AppError, match="is running and waits for no approval"):
        approve(store, release.id, BOB)


def test_what_waits_for_an_approval_is_not_ignored_by_executors_that_look_for_work(store):
    add_nodes(store, 1)
    waiting = needs_approvals(store) and new_release(store)
    store.claims.note_executor("owner", "host-a", "serve", 60.0, "", is_first=True)
    ignore(store, 300)
    assert [step.name for step in store.claims.why(waiting.id, 600).steps if step.state != rc.OK] == ["approval"]
    assert [problem.kind for problem in store.overview.read([]).problems] == ["approval"]
    approve(store, waiting.id)
    assert all(step.state == rc.OK for step in store.claims.why(waiting.id, 600).steps)
    ignore(store, 300)
    assert store.claims.why(waiting.id, 600).stopped_by.name == "executor"


# -- a replay -----------------------------------------------------------------------------------------------------

def test_a_replay_says_again_what_was_superseded_and_how_the_approval_stands_now(client):
    store = needs_approvals(client.store)
    add_nodes(store, 2)
    queued = new_release(store)
    body, key = {"supersede": True, "emergency": True, "reason": "new sites"}, {**JSON, "Idempotency-Key": "k-1"}
    made = client("POST", "/api/v1/releases", body, key).data
    assert (made["superseded"], made["approval"]) == (
        [{"releaseId": queued.id, "version": queued.version}], "emergency")
    assert client("POST", "/api/v1/releases", body, key).data == made
    body, key = {"reason": "new sites"}, {**JSON, "Idempotency-Key": "k-2"}
    made = client("POST", "/api/v1/releases", body, key).data
    sql(store, "UPDATE release_tasks SET author = 'alice'")  # nobody signs in here
    assert made["approval"] == "wanted"
    store.approvals.approve(made["releaseId"], BOB)
    assert client("POST", "/api/v1/releases", body, key).data == {**made, "approval": "given"}
    assert store.releases.page().total == 3
