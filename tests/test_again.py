"""Retry and rollback (contract section 3, rule 10): who gets what again, who is left out, and what stands against it.

Each test is a way in which a rollback brought back the wrong thing, or stopped before the nodes that needed it.
"""
from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_agent import payload_sha256
from lab import JSON, SITES, add_nodes, new_release, sql, statuses

import releasectl as rc


def settle(store: rc.Store, release: rc.Release, *found: str) -> rc.Release:
    """Let a release have ended with its nodes, by id, in these statuses."""
    nodes = sorted(node.node_id for node in store.releases.with_nodes(release.id)[1])
    assert len(nodes) == len(found)
    for node_id, status in zip(nodes, found):
        sql(store, "UPDATE release_task_nodes SET status = ?, attempts = ? WHERE release_task_id = ? AND node_id = ?",
            status, int(status != "skipped"), release.id, node_id)
        if status != "skipped":
            sql(store, "UPDATE nodes SET last_version = ? WHERE id = ?", release.version, node_id)
    status = "success" if set(found) == {"success"} else "cancelled" if set(found) == {"skipped"} else "failed"
    sql(store, "UPDATE release_tasks SET status = ?, finished_at = updated_at, success_nodes = ?, failed_nodes = ?, "
               "started_at = COALESCE(started_at, created_at) WHERE id = ?",
        status, found.count("success"), found.count("failed"), release.id)
    return store.releases.get(release.id)


def ended(store: rc.Store, content: str, *found: str, **fields) -> rc.Release:
    """Make a release of a content that ended with its nodes in these statuses."""
    return settle(store, new_release(store, payload={"content": content}, **fields), *found)


def good(store: rc.Store, content: str, *node_ids: int, **fields) -> rc.Release:
    """Make a release that succeeded on these nodes; without any on all of them."""
    node_ids = node_ids or tuple(range(1, store.nodes.page().total + 1))
    return ended(store, content, *["success"] * len(node_ids), node_ids=list(node_ids), **fields)


def test_a_new_release_of_a_payload_that_did_not_end_well_is_told_so_until_it_did(store):
    add_nodes(store, 3)

    def notes(content: str) -> list[str]:
        return [text for text in store.releases.plan(
            rc.ReleaseRequest("cdn", payload={"content": content})).warnings if "brought" in text]

    good(store, "A")
    assert notes("A") == notes("B") == []
    bad = ended(store, "B", "success", "failed", "skipped")
    failed = "release 2 (v2) brought this payload: it ended failed, 1 of 3 nodes failed"
    assert notes("B") == [failed]
    sql(store, "UPDATE release_tasks SET status = 'partial' WHERE id = ?", bad.id)
    assert notes("B") == [failed.replace("failed,", "partial,")]
    sql(store, "UPDATE release_tasks SET status = 'failed' WHERE id = ?", bad.id)
    again = new_release(store, payload={"content": "B"})
    assert notes("B") == [failed]  # not taken back by one that waits, nor by one that never began
    store.releases.act("cancel", again.id, "anna")
    assert notes("B") == [failed]
    back = store.releases.rollback(bad.id, "anna", rc.Again()).release
    assert notes("B") == [failed]  # it is not rolled back yet
    settle(store, back, "success", "success")
    made = store.releases.create(rc.ReleaseRequest("cdn", payload={"content": "B"}), "anna")
    assert made.warnings[0] == f"{failed}, and was rolled back by release {back.id}"
    assert notes("A") == []
    settle(store, made.release, "success", "success", "success")
    assert notes("B") == []
    assert store.releases.plan(rc.ReleaseRequest("dns", payload={"content": "B"})).warnings == []


@pytest.mark.parametrize(("status", "nodes", "back", "told"), [
    ("success", ("success", "success", "success"), ("success", "success", "success"),
     "ended success, 0 of 3 nodes failed, and was rolled back by release 3"),
    ("success", ("success", "success", "success"), ("success", "success", "failed"),
     "ended success, 0 of 3 nodes failed, and was rolled back in part by release 3"),
    ("cancelled", ("success", "failed", "skipped"), ("success", "success"),
     "ended cancelled, 1 of 3 nodes failed, and was rolled back by release 3"),
    ("cancelled", ("failed", "failed", "skipped"), (), "ended cancelled, 2 of 3 nodes failed"),
    ("cancelled", ("success", "skipped", "skipped"), (), ""), ("success", ("success", "success", "success"), (), "")])
def test_of_a_payload_it_is_told_what_failed_and_what_was_rolled_back(store, status, nodes, back, told):
    add_nodes(store, 3)
    good(store, "A")
    old = ended(store, "B", *nodes)
    sql(store, "UPDATE release_tasks SET status = ? WHERE id = ?", status, old.id)
    if back:
        made = settle(store, store.releases.rollback(old.id, "anna", rc.Again()).release, *back)
        if "failed" in back:
            sql(store, "UPDATE release_tasks SET status = 'partial' WHERE id = ?", made.id)
    warnings = store.releases.plan(rc.ReleaseRequest("cdn", payload={"content": "B"})).warnings
    assert [text for text in warnings if "brought" in text] == [
        f"release 2 (v2) brought this payload: it {told}"] * bool(told)


@pytest.mark.parametrize(("status", "nodes"), [
    ("cancelled", ("success", "skipped", "skipped")), ("cancelled", ("skipped", "skipped", "skipped")),
    ("failed", ("skipped", "skipped", "skipped"))])
def test_what_failed_is_told_though_a_later_release_of_the_payload_ended_before_it_told_anything(store, status, nodes):
    add_nodes(store, 3)
    ended(store, "B", "success", "failed", "failed")
    later = ended(store, "B", *nodes)
    sql(store, "UPDATE release_tasks SET status = ? WHERE id = ?", status, later.id)
    assert store.releases.plan(rc.ReleaseRequest("cdn", payload={"content": "B"})).warnings == [
        "release 1 (v1) brought this payload: it ended failed, 2 of 3 nodes failed"]


def test_a_new_payload_is_compared_with_the_newest_releases_of_its_target_alone(store, monkeypatch):
    monkeypatch.setattr(rc, "MAX_COMPARED", 2)
    add_nodes(store, 1)
    ended(store, "A", "failed")
    good(store, "B")

    def notes() -> int:
        return len(store.releases.plan(rc.ReleaseRequest("cdn", payload={"content": "A"})).warnings)

    assert notes() == 1
    good(store, "C")
    assert notes() == 0


def content_of(release: rc.Release) -> str:
    return rc.parse_json(release.payload)["content"]


def brought_back(store: rc.Store, release: rc.Release, **wish) -> tuple[str, tuple[int, int] | None]:
    """Return what a rollback brings back, and of which release; the plan says the same."""
    plan = store.releases.plan_again("rollback", release.id, rc.Again(**wish))
    made = store.releases.rollback(release.id, "anna", rc.Again(**wish))
    assert plan.batches == made.batches
    assert plan.version == made.release.version
    return content_of(made.release), plan.payload_of


TABLES = ("nodes", "release_tasks", "release_task_nodes", "release_events", "release_freeze", "idempotency_keys",
          "database_state")


def everything(store: rc.Store) -> dict[str, list[tuple]]:
    """Return all rows of all tables."""
    with store.database.transaction() as tx:
        return {name: sorted(tx.rows(f"SELECT * FROM {name}"), key=repr) for name in TABLES}


# -- what a rollback brings back ------------------------------------------------------------------------------

def test_rule_10_an_experiment_on_one_node_does_not_go_to_the_whole_fleet(store):
    add_nodes(store, 4)
    fleet = good(store, "A")
    good(store, "experiment", 2)
    bad = good(store, "B")
    assert brought_back(store, bad) == ("A", (fleet.id, fleet.version))


def test_rule_10_each_node_has_one_vote_for_what_succeeded_there_last_and_the_majority_wins(store):
    add_nodes(store, 5)
    good(store, "A")
    most = good(store, "C", 3, 4, 5)
    bad = good(store, "B")
    assert brought_back(store, bad) == ("C", (most.id, most.version))


def test_rule_10_the_newer_one_wins_on_a_tie(store):
    add_nodes(store, 4)
    newer = [good(store, "A", 1, 2), good(store, "C", 3, 4)][1]
    bad = good(store, "B")
    assert brought_back(store, bad) == ("C", (newer.id, newer.version))


def test_rule_10_votes_for_one_payload_of_several_releases_are_counted_together(store):
    add_nodes(store, 5)
    good(store, "A", 1, 2)
    newest = good(store, "A", 3)
    good(store, "C", 4, 5)
    bad = good(store, "B")
    assert brought_back(store, bad) == ("A", (newest.id, newest.version))


def test_rule_10_what_counts_is_the_success_on_the_node_whatever_became_of_its_release(store):
    add_nodes(store, 3)
    good(store, "A")
    partly = ended(store, "C", "success", "success", "failed")
    bad = ended(store, "B", "success", "failed", "skipped")
    assert brought_back(store, bad) == ("C", (partly.id, partly.version))


def test_rule_10_a_success_of_another_node_is_no_past_of_this_one(store):
    add_nodes(store, 2)
    good(store, "A", 1)
    newest_elsewhere = good(store, "C", 2)
    bad = good(store, "B", 1)
    assert newest_elsewhere.status == "success"
    assert brought_back(store, bad)[0] == "A"
    alone = good(store, "D", 2, target="dns")
    with pytest.raises(rc.AppError, match=f"no release of target dns before {alone.id} succeeded on") as refused:
        store.releases.rollback(alone.id, "anna")
    assert refused.value.code == 3003


@pytest.mark.parametrize("again", ["B", {"content": "B", "version": 3}], ids=["the same", "with another version in it"])
def test_rule_10_a_payload_that_went_out_twice_can_be_rolled_back(store, again):
    add_nodes(store, 2)
    good(store, "A")
    good(store, "B")
    payload = again if isinstance(again, dict) else {"content": again}
    twice = settle(store, new_release(store, payload=payload), "success", "success")
    assert brought_back(store, twice) == ("A", (1, 1))


def test_rule_10_one_region_first_can_be_rolled_back(store):
    add_nodes(store, 4)
    good(store, "A")
    good(store, "B", 1)  # one region first
    everywhere = ended(store, "B", "success", "success", "failed", "skipped")
    assert brought_back(store, everywhere) == ("A", (1, 1))


def test_rule_10_a_rollback_goes_to_the_nodes_that_were_touched(store):
    add_nodes(store, 4)
    good(store, "A")
    bad = ended(store, "B", "success", "failed", "failed", "skipped")
    sql(store, "UPDATE release_task_nodes SET error_kind = 'rejected', attempts = 0 WHERE release_task_id = 2 AND "
               "node_id = 3")  # it had a higher version, and was sent nothing
    assert store.releases.rollback(bad.id, "anna").batches == [[1], [2]]


# -- content that somebody had rolled back ----------------------------------------------------------------------

def cancelled_rollback(store: rc.Store, release: rc.Release) -> rc.Release:
    """Roll a release back, and call that off before anything was sent: its content stays on the nodes."""
    return store.releases.act("cancel", store.releases.rollback(release.id, "anna").release.id, "anna")


def test_rule_10_content_that_somebody_had_rolled_back_does_not_come_again(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = good(store, "B")
    assert cancelled_rollback(store, bad).status == "cancelled"
    worse = good(store, "C")
    assert brought_back(store, worse) == ("A", (1, 1))


def test_rule_10_neither_does_the_same_payload_under_a_lower_version(store):
    add_nodes(store, 2)
    good(store, "A")
    good(store, "B")
    again = ended(store, "B", "failed", "failed")
    cancelled_rollback(store, again)
    worse = good(store, "C")
    assert brought_back(store, worse) == ("A", (1, 1))


def test_rule_10_the_rollback_of_a_rollback_says_so_and_names_whom_it_leaves_with_another_payload(store):
    add_nodes(store, 4)
    good(store, "A")
    good(store, "B")
    bad = ended(store, "C", "success", "failed", "success", "skipped")
    first = store.releases.rollback(bad.id, "anna").release
    settle(store, first, "success", "success", "success")
    plan = store.releases.plan_again("rollback", first.id)
    assert plan.payload_of == (1, 1)  # "another payload" than that of release 2, which this one brought again
    assert plan.warnings == [
        f"release {first.id} is itself a rollback, of release {bad.id}, to what release 2 brought: this goes back "
        "further than that",
        f"1 node of release {bad.id} is not in it, and stays on another payload: edge-4"]
    assert store.releases.plan_again("rollback", bad.id, rc.Again(over_newer=True)).warnings == []  # the same payload


def test_rule_10_it_does_come_again_when_somebody_wanted_it_again_under_a_higher_version(store):
    add_nodes(store, 2)
    good(store, "A")
    cancelled_rollback(store, good(store, "B"))
    wanted = good(store, "B")
    worse = good(store, "C")
    assert brought_back(store, worse) == ("B", (wanted.id, wanted.version))


def test_rule_10_what_was_rolled_back_in_one_target_is_not_bad_in_another(store):
    add_nodes(store, 2)
    good(store, "A", target="dns")
    good(store, "B", target="dns")
    good(store, "A")
    cancelled_rollback(store, good(store, "B"))
    assert brought_back(store, good(store, "C", target="dns"))[0] == "B"


# -- how it goes out ---------------------------------------------------------------------------------------------

def test_rule_10_the_batches_are_the_old_ones_and_what_had_failed_comes_last_in_one_of_its_own(store):
    add_nodes(store, 7)
    good(store, "A")
    bad = ended(store, "B", "success", "failed", "success", "success", "failed", "success", "success",
                strategy={"batches": [1, 2, 2], "maxFailed": 1, "soakSec": 60, "pauseAfter": [1, 2]})
    made = store.releases.rollback(bad.id, "anna")
    assert made.batches == [[1], [3], [4], [6, 7], [2, 5]]
    assert rc.parse_json(made.release.strategy) == {"batches": [1, 1, 1, 2], "maxFailed": 1}
    nodes = store.releases.with_nodes(made.release.id)[1]
    assert {node.node_id for node in nodes if node.accepted} == {2, 5}
    plan = store.releases.plan_again("rollback", bad.id, rc.Again())
    assert (plan.max_failed, [one["tolerated"] for one in rc.plan_json(plan)["batches"]]) == (
        [1, 1, 1, 1, 2], [0, 0, 0, 0, 2])
    said = "the last 2 had failed before: that they fail again stops nothing"  # why all of them may
    assert f"at most 4 x 1, 2 failed; {said}" in store.releases.events(made.release.id)[0].detail
    assert f"may fail: {said}\n" in rc._plan_text(plan, rc.Display())


def test_rule_10_a_release_that_failed_everywhere_is_rolled_back_in_one_batch(store):
    add_nodes(store, 3)
    good(store, "A")
    bad = ended(store, "B", "failed", "failed", "skipped", strategy={"batches": [2]})
    assert store.releases.rollback(bad.id, "anna").batches == [[1, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("failed", [False, True])
def test_rule_10_a_release_of_as_many_batches_as_there_may_be_can_be_rolled_back(sqlite_url, open_store, failed):
    store, count = open_store(sqlite_url), rc.MAX_LISTED_BATCHES + 2  # SQLite takes the fewest parameters
    store.nodes.import_all([{"name": f"edge-{n}", "main_ip": f"10.1.{n >> 8}.{n & 255}"} for n in range(1, count + 1)])
    good(store, "A")
    bad = ended(store, "B", *["success"] * (count - 1), "failed" if failed else "success",
                strategy={"batches": [1] * rc.MAX_LISTED_BATCHES})
    made = store.releases.rollback(bad.id, "anna")
    assert [len(batch) for batch in made.batches] == [1] * rc.MAX_LISTED_BATCHES + ([1, 1] if failed else [2])
    by_hand = ended(store, "C", *["success"] * count)
    sql(store, "UPDATE release_task_nodes SET batch = node_id WHERE release_task_id = ?", by_hand.id)
    made = store.releases.rollback(by_hand.id, "anna")
    assert [len(batch) for batch in made.batches] == [1] * count
    settle(store, made.release, *["failed"] * count)
    assert store.releases.retry(made.release.id, "anna").release.total_nodes == count


def test_rule_10_a_dead_node_does_not_keep_the_others_from_what_they_had_before(world):
    world.nodes(4)
    strategy = {"batches": [1, 2], "retries": 0, "maxFailedTotal": 0, "onExceed": "pause"}
    before = new_release(world.store, payload={"content": "A"})
    world.drain()
    assert world.store.releases.get(before.id).status == "success"
    world.agent(1).set(mode="refuse")
    bad = new_release(world.store, payload={"content": "B"}, strategy=strategy)
    world.drain()
    world.store.releases.act("resume", bad.id, "anna", accept_failures=True)
    world.drain()
    assert statuses(world.store, bad.id) == ["failed", "success", "success", "success"]
    made = world.store.releases.rollback(bad.id, "anna")
    assert made.batches == [[2, 3], [4], [1]]
    world.drain()
    back = world.store.releases.get(made.release.id)
    assert (back.status, back.success_nodes, back.failed_nodes) == ("partial", 3, 1)
    assert {world.agent(number).content for number in (2, 3, 4)} == {payload_sha256({"content": "A"})}


def test_rule_10_a_node_that_had_failed_and_lives_again_is_brought_back_too(world):
    world.nodes(2)
    new_release(world.store, payload={"content": "A"})
    world.drain()
    world.agent(1).set(outcome="failed", message="no disk space")
    bad = new_release(world.store, payload={"content": "B"})
    world.drain()
    world.agent(1).set(outcome="success")
    made = world.store.releases.rollback(bad.id, "anna").release
    world.drain()
    assert (world.store.releases.get(made.id).status, statuses(world.store, made.id)) == ("success", ["success"])
    assert world.agent(1).runs[-1]["payloadSha256"] == payload_sha256({"content": "A"})


def test_rule_10_a_node_that_had_not_failed_still_stops_a_rollback(world):
    world.nodes(3)
    new_release(world.store, payload={"content": "A"})
    bad = new_release(world.store, payload={"content": "B"})
    world.drain()
    world.agent(1).set(mode="refuse")
    made = world.store.releases.rollback(bad.id, "anna").release
    world.drain()
    assert (world.store.releases.get(made.id).status, statuses(world.store, made.id)) == (
        "failed", ["failed", "skipped", "skipped"])


def test_rule_10_where_nothing_can_be_brought_back_the_refusal_says_what_there_was(store):
    add_nodes(store, 2)
    good(store, "A", 1)
    cancelled_rollback(store, good(store, "C"))
    bad = good(store, "A")
    with pytest.raises(rc.AppError) as refused:
        store.releases.rollback(bad.id, "anna")
    assert refused.value.message == (
        "nothing to roll back to: before release 4 its nodes had nothing of target cdn but release 2 (v2, rolled back) "
        "and release 1 (v1, the same payload); create a release that is good, or name one: "
        "toRelease (releasectl rollback 4 --to ID)")


@pytest.mark.parametrize(("max_failed", "total", "expected"), [
    (0, None, ([0, 3], None)), (1, None, ([1, 3], None)), (9, 9, ([1, 3], 4)), ("50%", 0, ([0, 3], 3))])
def test_rule_10_the_plan_of_a_rollback_lets_no_more_nodes_fail_than_there_are(store, max_failed, total, expected):
    add_nodes(store, 4)
    good(store, "A")
    limits = {"maxFailed": max_failed, **({} if total is None else {"maxFailedTotal": total})}
    bad = ended(store, "B", "success", "failed", "failed", "failed", strategy=limits)
    plan = store.releases.plan_again("rollback", bad.id)
    assert (plan.max_failed, plan.max_failed_total) == expected


# -- toRelease --------------------------------------------------------------------------------------------------

def test_rule_10_to_release_names_whose_payload_comes_back(store):
    add_nodes(store, 2)
    oldest = good(store, "A")
    good(store, "C")
    never_went_out = ended(store, "D", "skipped", "skipped")
    bad = good(store, "B")
    assert brought_back(store, bad, to_release=oldest.id) == ("A", (oldest.id, oldest.version))
    assert brought_back(store, bad, to_release=never_went_out.id)[0] == "D"


@pytest.mark.parametrize(("to_release", "code", "words"), [
    (1, 2003, r"toRelease \(--to\): there is no release 1 of target cdn"),
    (99, 2003, r"toRelease \(--to\): there is no release 99 of target cdn"),
    (2**63 - 1, 2003, r"toRelease \(--to\): there is no release 9223372036854775807"),
    (2, 3003, "release 2 has the same payload as release 4: it changes nothing"),
    (4, 3003, "release 4 has the same payload as release 4: it changes nothing"),
])
def test_rule_10_a_to_release_that_can_not_be_meant_is_refused_and_nothing_is_written(store, to_release, code, words):
    add_nodes(store, 2)
    good(store, "A", target="dns")
    good(store, "B")
    good(store, "C")
    bad = good(store, "B")
    before = everything(store)
    for deed in (lambda wish: store.releases.rollback(bad.id, "anna", wish),
                 lambda wish: store.releases.plan_again("rollback", bad.id, wish)):
        with pytest.raises(rc.AppError, match=words) as refused:
            deed(rc.Again(to_release=to_release))
        assert refused.value.code == code
    assert everything(store) == before


# -- over something newer ----------------------------------------------------------------------------------------

@pytest.fixture(params=["retry", "rollback"])
def verb(request) -> str:
    return request.param


def make_again(store: rc.Store, verb: str, release: rc.Release, **wish) -> rc.Made:
    return getattr(store.releases, verb)(release.id, "anna", rc.Again(**wish))


def test_rule_10_nothing_newer_is_replaced_without_a_word(store, verb):
    add_nodes(store, 3)
    good(store, "A")
    old = ended(store, "B", "failed", "failed", "skipped")
    newer = good(store, "C")
    before = everything(store)
    names = "edge-1 and 2 more" if verb == "retry" else "edge-1 and 1 more"
    for deed in (make_again, lambda s, v, r: s.releases.plan_again(v, r.id)):
        with pytest.raises(rc.AppError) as refused:
            deed(store, verb, old)
        assert refused.value.code == 3003
        assert refused.value.message == (
            f"release {newer.id} (v{newer.version}) succeeded later on {names}: {verb} of release {old.id} would "
            "replace its payload; overNewer (--over-newer) if that is meant")
    told = (f"release {newer.id} (v{newer.version}) succeeded later on {names}: replaces what release {newer.id} "
            "brought")
    assert store.releases.plan_again(verb, old.id, rc.Again(over_newer=True)).warnings[0] == told
    assert everything(store) == before
    made = make_again(store, verb, old, over_newer=True)
    assert (content_of(made.release), made.warnings[0]) == ("B" if verb == "retry" else "A", told)


def test_rule_10_each_newer_release_that_is_replaced_is_named_with_the_nodes_that_run_it(store):
    add_nodes(store, 4)
    old = ended(store, "B", *["failed"] * 4)
    good(store, "C", 1, 2, 3)
    good(store, "D", 3, 4)
    good(store, "B", 1)  # the payload that the retry brings: it replaces nothing there
    assert store.releases.plan_again("retry", old.id, rc.Again(over_newer=True)).warnings == [
        "release 3 (v3) succeeded later on edge-3 and 1 more: replaces what release 3 brought",
        "release 2 (v2) succeeded later on edge-2: replaces what release 2 brought"]


def test_rule_10_what_was_rolled_back_already_is_said_to_be_that(store, verb):
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed")
    first = settle(store, store.releases.rollback(bad.id, "anna").release, "success", "success")
    then = "do that once more" if verb == "rollback" else "bring its payload back"
    with pytest.raises(rc.AppError) as refused:
        make_again(store, verb, bad)
    assert refused.value.message == (
        f"release {bad.id} was rolled back already, by release {first.id}: {verb} of it would {then}; "
        "overNewer (--over-newer) if that is meant")
    told = store.releases.plan_again(verb, bad.id, rc.Again(over_newer=True)).warnings
    ended_how = "it ended failed, 1 of 2 nodes failed, and was rolled back by release"
    assert (f"{bad} brought this payload: {ended_how} {first.id}"
            in told) == (verb == "retry")  # who insists is told once more what that brings back


def test_rule_10_what_a_rollback_that_failed_brought_back_in_part_is_not_called_rolled_back(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed")
    first = settle(store, store.releases.rollback(bad.id, "anna").release, "success", "failed")
    with pytest.raises(rc.AppError) as refused:
        make_again(store, "rollback", bad)
    assert refused.value.message == (
        f"release {first.id} (v{first.version}) succeeded later on edge-1: rollback of release "
        f"{bad.id} would replace its payload; overNewer (--over-newer) if that is meant")
    sql(store, "UPDATE release_tasks SET status = 'partial' WHERE id = ?", first.id)
    assert store.releases.plan_again("retry", bad.id).warnings == [
        f"{bad} brought this payload: it ended failed, 1 of 2 nodes failed, and was rolled back in part by release "
        f"{first.id}"]


def test_rule_10_what_is_newer_elsewhere_or_never_succeeded_stands_against_nothing(store, verb):
    add_nodes(store, 3)
    good(store, "A")
    old = ended(store, "B", "failed", "skipped", "skipped", node_ids=[1, 2, 3])
    sql(store, "UPDATE nodes SET status = 'offline' WHERE id = 2")
    good(store, "C", 3) if verb == "rollback" else good(store, "C", 1, target="dns")
    ended(store, "D", "failed", node_ids=[1])
    good(store, "E", 1, target="dns")
    assert make_again(store, verb, old).batches[0] == [1]


def test_rule_10_the_newer_success_of_a_node_that_is_left_out_stands_against_nothing(store, verb):
    add_nodes(store, 2)
    good(store, "A")
    old = ended(store, "B", "failed", "failed")
    good(store, "C", 2)
    sql(store, "UPDATE nodes SET status = 'offline' WHERE id = 2")
    made = make_again(store, verb, old)
    assert (made.batches, made.left_out) == ([[1]], [rc.LeftOut(2, "edge-2", "offline")])


# -- who is left out, plans, and keys: the API ----------------------------------------------------------------------

def left_two_out(store: rc.Store) -> rc.Release:
    """Return a failed release over four nodes, two of which get nothing now."""
    add_nodes(store, 4)
    good(store, "A")
    old = ended(store, "B", "failed", "failed", "failed", "failed")
    sql(store, "UPDATE nodes SET status = 'maintenance' WHERE id = 2")
    sql(store, "UPDATE nodes SET enabled = 0 WHERE id = 3")
    return old


LEFT_OUT = [{"nodeId": 2, "nodeName": "edge-2", "why": "in maintenance"},
            {"nodeId": 3, "nodeName": "edge-3", "why": "disabled"}]


def test_rule_10_the_answer_and_the_history_name_who_is_left_out_and_why(client, verb):
    old = left_two_out(client.store)
    path = f"/api/v1/releases/{old.id}/{verb}"
    plan = client.ok("POST", path, {"dryRun": True})
    made = client.ok("POST", path, {"reason": "again"}, 201)
    assert plan["leftOut"] == made["leftOut"] == LEFT_OUT
    assert made["totalNodes"] == 2
    created = client.ok("GET", f"/api/v1/releases/{made['releaseId']}/events")["items"][0]
    assert "left out: edge-2 is in maintenance; left out: edge-3 is disabled" in created["detail"]


def test_rule_10_a_plan_writes_nothing_and_is_what_is_then_made(client, verb):
    old = left_two_out(client.store)
    path, before = f"/api/v1/releases/{old.id}/{verb}", everything(client.store)
    body = {"dryRun": True, "reason": "again", **({"toRelease": 1} if verb == "rollback" else {})}
    answer = client("POST", path, body, {**JSON, "Idempotency-Key": "k-1"})
    assert (answer.status, everything(client.store)) == (200, before)
    source = 1 if verb == "rollback" else 2
    assert answer.data["payloadOf"] == {"releaseId": source, "version": source}
    made = client.ok("POST", path, {**body, "dryRun": False}, 201)
    assert (answer.data["version"], [batch["nodeIds"] for batch in answer.data["batches"]]) == (
        made["version"], [batch["nodeIds"] for batch in made["batches"]])


def test_rule_10_over_newer_and_to_release_are_asked_for_in_the_body(client, verb):
    add_nodes(client.store, 2)
    good(client.store, "A")
    old = ended(client.store, "B", "failed", "failed")
    good(client.store, "C")
    path = f"/api/v1/releases/{old.id}/{verb}"
    for dry in (False, True):
        answer = client("POST", path, {"dryRun": dry})
        assert (answer.code, "succeeded later on edge-1 and 1 more" in answer.message) == (3003, True)
    assert client.ok("POST", path, {"dryRun": True, "overNewer": True})["totalNodes"] == 2
    for body, code in (({"overNewer": "yes"}, 2003), ({"overNewer": None}, 2003), ({"dryRun": 1}, 2003),
                       ({"over_newer": True}, 2003), ({"version": 9}, 2003)):
        assert client.code("POST", path, {"overNewer": True, **body}) == code
    to = {"toRelease": 3}
    if verb == "retry":
        assert client.code("POST", path, {"overNewer": True, **to}) == 2003
        client.ok("POST", path, {"overNewer": True}, 201)
        return
    for number in ("3", 0, -1, 3.5, True, None, 2**63):
        assert client.code("POST", path, {"overNewer": True, "toRelease": number}) == 2003
    made = client.ok("POST", path, {"overNewer": True, **to}, 201)
    assert content_of(client.store.releases.get(made["releaseId"])) == "C"


def test_rule_10_the_same_key_and_body_again_gives_the_same_answer_and_makes_nothing_more(client, verb):
    old = left_two_out(client.store)
    path, key = f"/api/v1/releases/{old.id}/{verb}", {**JSON, "Idempotency-Key": "k-1"}
    first = client("POST", path, {"reason": "again"}, key)
    assert (first.status, first.data["leftOut"]) == (201, LEFT_OUT)
    # whatever has become of the nodes, and of what was made, meanwhile
    sql(client.store, "UPDATE nodes SET enabled = 1, status = 'online'")
    settle(client.store, client.store.releases.get(first.data["releaseId"]), "success", "success")
    before = everything(client.store)
    for _ in range(2):
        again = client("POST", path, {"reason": "again"}, key)
        assert (again.status, again.data) == (201, first.data)
    assert everything(client.store) == before


def test_rule_10_one_key_makes_one_release_also_for_many_who_ask_at_the_same_time(client, verb):
    old = left_two_out(client.store)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client("POST", f"/api/v1/releases/{old.id}/{verb}", {}, {
            **JSON, "Idempotency-Key": "k-1"}), range(6)))
    assert [answer.status for answer in answers] == [201] * 6
    assert all(answer.data == answers[0].data for answer in answers)
    assert client.store.releases.page().total == 3


def test_rule_10_a_key_that_was_for_something_else_is_refused(client):
    add_nodes(client.store, 2)
    good(client.store, "A")
    olds = [ended(client.store, content, "failed", "failed") for content in ("B", "C")]
    key = {**JSON, "Idempotency-Key": "k-1"}
    first = client("POST", f"/api/v1/releases/{olds[1].id}/retry", {"reason": "x"}, key)
    assert first.status == 201
    before = everything(client.store)
    for path, body in ((f"/{olds[1].id}/rollback", {"reason": "x"}), (f"/{olds[0].id}/retry", {"reason": "x"}),
                       (f"/{olds[1].id}/retry", {"reason": "y"}), (f"/{olds[1].id}/retry", {}),
                       (f"/{olds[1].id}/retry", {"reason": "x", "overNewer": True}), ("", {"reason": "x"})):
        answer = client("POST", f"/api/v1/releases{path}", body, key)
        assert (answer.code, f"made release {first.data['releaseId']}" in answer.message) == (3002, True), path
    for bad_key in ("", "a b", "x" * 129):
        assert client("POST", f"/api/v1/releases/{olds[1].id}/retry", {},
                      {**JSON, "Idempotency-Key": bad_key}).code == 2003
    assert everything(client.store) == before


def test_rule_10_a_refused_request_keeps_no_key(client, verb):
    add_nodes(client.store, 1)
    good(client.store, "A")
    old = ended(client.store, "B", "failed")
    newer = good(client.store, "C")
    path, key = f"/api/v1/releases/{old.id}/{verb}", {**JSON, "Idempotency-Key": "k-1"}
    assert client("POST", path, {}, key).code == 3003
    sql(client.store, "UPDATE release_task_nodes SET status = 'failed' WHERE release_task_id = ?", newer.id)
    assert client("POST", path, {}, key).status == 201


def test_rule_10_a_payload_without_websites_does_not_come_back_to_an_execute_node(store, verb):
    add_nodes(store, 1)
    good(store, "A")
    old = ended(store, "B", "failed")
    sql(store, "UPDATE nodes SET agent_protocol = 'execute'")
    with pytest.raises(rc.AppError, match=f"the payload of release {2 if verb == 'retry' else 1} has no list") as no:
        make_again(store, verb, old)
    assert no.value.code == 3003
    sql(store, "UPDATE release_tasks SET payload_sha256 = '', "
               "payload = '{\"websites\":[],\"v\":' || id || '}'")
    assert store.releases.plan_again(verb, old.id).emptied == ["edge-1"]
    assert rc.parse_json(make_again(store, verb, old).release.payload)["websites"] == SITES["websites"]


def test_rule_10_a_release_that_is_at_its_end_never_changes(store, verb):
    old = left_two_out(store)
    rows = {name: [row for row in found if old.id in row[:2]] for name, found in everything(store).items()
            if name.startswith("release_")}
    make_again(store, verb, old)
    after = everything(store)
    assert [name for name, found in rows.items() if not set(map(repr, found)) <= set(map(repr, after[name]))] == []


# -- prune keeps what rule 10 needs ------------------------------------------------------------------------------

def prune(store: rc.Store, keep: int = 1) -> list[int]:
    """Let all have ended long ago, delete what prune would, and return the ids that are left."""
    sql(store, "UPDATE release_tasks SET finished_at = ?, updated_at = ?",
        *[rc.utc_text(time.time() - 400 * 86400)] * 2)
    store.history.delete([release.id for release in store.history.prunable(90 * 86400.0, keep)])
    return sorted(release.id for release in store.releases.page(size=100).items)


def test_rule_10_prune_keeps_on_each_node_what_a_rollback_would_bring_back_to_it(store):
    add_nodes(store, 3)
    for content, node_ids in (("A", (1, 2, 3)), ("X", (3,)), ("A", (2,)), ("B", (1, 2, 3)), ("B", (1, 2, 3))):
        good(store, content, *node_ids)
    # 4 is as 5 is; node 1 would vote for 1, node 2 for 3, node 3 for 2
    before = [store.releases.plan_again("rollback", 5).payload_of, content_of(store.releases.get(3))]
    assert prune(store) == [1, 2, 3, 5]
    assert [store.releases.plan_again("rollback", 5).payload_of, content_of(store.releases.get(3))] == before


def test_rule_10_prune_keeps_the_newest_success_of_each_node(store):
    add_nodes(store, 2)
    good(store, "A", 1)
    good(store, "B", 1)
    for number in range(6):
        good(store, f"C{number}", 2)
    assert prune(store) == [2, 7, 8]


def test_rule_10_prune_does_not_take_what_was_rolled_back_for_what_would_come_again(store):
    add_nodes(store, 1)
    good(store, "A")
    good(store, "A")
    bad = good(store, "B")
    cancelled_rollback(store, bad)
    worse = good(store, "C")
    # 2 is what a rollback of 5 brings back; 3 is not, though it is the newer success
    assert store.releases.plan_again("rollback", worse.id).payload_of == (2, 2)
    left = prune(store)
    assert {2, 5} <= set(left)
    assert 1 not in left
    assert store.releases.plan_again("rollback", worse.id).payload_of == (2, 2)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_rule_10_every_rollback_of_what_stays_is_the_same_after_prune_as_before(store, keep):
    add_nodes(store, 4)
    for number in range(1, 15):
        content = "ABCABDAACBDCBA"[number % 14]
        node_ids = [node_id for node_id in (1, 2, 3, 4) if (number * 7 + node_id * 3) % 5 > 1]
        release = ended(store, content, *["failed" if (number + n) % 4 == 0 else "success" for n in node_ids],
                        node_ids=node_ids)
        if number in (5, 9):
            store.releases.act("cancel", store.releases.rollback(release.id, "anna").release.id, "anna")
    newest = sorted(r.id for r in store.releases.page(size=100).items)[-keep:]

    def plans() -> list[object]:
        found: list[object] = []
        for release_id in newest:
            try:
                plan = store.releases.plan_again("rollback", release_id, rc.Again(over_newer=True))
                found.append((content_of(store.releases.get(plan.payload_of[0])), plan.batches))
            except rc.AppError as error:
                found.append(error.code)
        return found

    before, count = plans(), store.releases.page().total
    assert any(isinstance(plan, tuple) for plan in before)
    assert len(prune(store, keep)) < count
    assert plans() == before
