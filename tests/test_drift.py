"""What each node runs, what it should run, how far these are apart, and the catch-up (contract section 5)."""
from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import on_sqlite
from fake_agent import payload_sha256
from lab import ADDRESSES, Cli, add_nodes, at_schema, new_release, sql
from test_again import content_of, ended, good, settle

import releasectl as rc


def level(store: rc.Store, node_id: int) -> rc.Level:
    return store.fleet.listed([store.nodes.get(node_id)])[0].level


def drifts(store: rc.Store) -> list[str]:
    """Return the drift of each node, by id."""
    return [listed.level.drift for listed in store.fleet.page(size=0).items]


def ids(store: rc.Store, what: str) -> list[int | None]:
    """Return the release that each node runs, has or wants, by id."""
    found = [getattr(listed.level, what) for listed in store.fleet.page(size=0).items]
    return [ran and ran.release_id for ran in found]


def partly(store: rc.Store, content: str, *found: str, **fields: Any) -> rc.Release:
    """Make a release that ended partial, its failures within what was tolerated."""
    release = ended(store, content, *found, **fields)
    sql(store, "UPDATE release_tasks SET status = 'partial' WHERE id = ?", release.id)
    return release


def try_of(store: rc.Store, release: rc.Release, node_id: int, **columns: object) -> None:
    """Set columns of a node of a release."""
    sql(store, f"UPDATE release_task_nodes SET {', '.join(f'{name} = ?' for name in columns)} "
               "WHERE release_task_id = ? AND node_id = ?", *columns.values(), release.id, node_id)


# -- the rule -----------------------------------------------------------------------------------

OLD, NEW = rc.Ran(1, 1, "a", "success", 1), rc.Ran(2, 2, "b", "success", 2)
FAILED = rc.Ran(2, 2, "b", "failed", 2)
AGAIN = rc.Ran(3, 3, "a", "success", 1)


@pytest.mark.parametrize(("has", "wants", "is_unknown", "drift"), [
    (None, None, False, "none"), (None, OLD, False, "behind"), (OLD, OLD, False, "none"), (OLD, NEW, False, "behind"),
    (OLD, NEW._replace(payload_sha256="a"), False, "none"), (NEW._replace(payload_sha256="a"), OLD, False, "none"),
    (FAILED, OLD, False, "ahead"), (FAILED, None, False, "ahead"), (NEW, OLD, False, "ahead"),
    (FAILED._replace(status="cancelled"), OLD, False, "ahead"),
    # what is under way is no drift yet
    (FAILED._replace(status="running"), OLD, False, "none"), (FAILED._replace(status="paused"), None, False, "none"),
    # what brings an old payload again is no newer than that
    (AGAIN, NEW, False, "behind"), (NEW, AGAIN, False, "ahead"), (OLD, AGAIN, False, "none"),
    (OLD, OLD, True, "unknown"), (None, None, True, "unknown")])
def test_drift_is_what_a_node_has_against_what_is_for_it(has, wants, is_unknown, drift):
    assert rc.Level(has, has, wants, is_unknown).drift == drift


# -- runs -----------------------------------------------------------------------------------------

def test_a_node_that_was_offline_while_a_release_went_out_is_behind(store):
    add_nodes(store, 3)
    good(store, "A")
    store.nodes.update(2, {"status": "offline"})
    good(store, "B", 1, 3)
    assert drifts(store) == ["none", "none", "none"]  # it was for nodes 1 and 3 by their ids
    ended(store, "C", "success", "success")
    assert ids(store, "runs") == [3, 1, 3]
    assert ids(store, "wants") == [3, 3, 3]
    assert drifts(store) == ["none", "behind", "none"]
    store.nodes.update(2, {"status": "online"})
    assert drifts(store) == ["none", "behind", "none"]


def test_what_a_failed_release_left_is_ahead(store):
    add_nodes(store, 3)
    good(store, "A")
    ended(store, "B", "success", "failed", "skipped")
    assert ids(store, "runs") == [2, 1, 1]
    assert ids(store, "wants") == [1, 1, 1]
    assert drifts(store) == ["ahead", "none", "none"]


def test_a_node_that_failed_in_a_partial_release_is_behind(store):
    add_nodes(store, 2)
    good(store, "A")
    partly(store, "B", "success", "failed")
    assert drifts(store) == ["none", "behind"]


@pytest.mark.parametrize(("columns", "drift"), [
    ({"error_kind": "agent_failed", "reached": 1}, "none"), ({"error_kind": "rejected", "reached": 1}, "none"),
    ({"error_kind": "unreachable", "reached": 0}, "none"), ({"error_kind": "timeout", "reached": 0}, "none"),
    ({"error_kind": "deadline", "reached": 0}, "none"), ({"error_kind": "timeout", "reached": 1}, "unknown"),
    ({"error_kind": "http", "reached": 1}, "unknown"), ({"error_kind": "deadline", "reached": 1}, "unknown"),
    ({"error_kind": "abandoned", "reached": 1}, "unknown"),
    ({"error_kind": "rejected", "error_msg": f"{rc.ALREADY_AT} 9", "reached": 0}, "unknown"),
    ({"error_kind": "agent_failed", "error_msg": f"applied, {rc.RELOAD_FAILED} exit 1", "reached": 1}, "unknown"),
    ({"error_kind": "verify", "reached": 1}, "ahead")])
def test_how_a_later_try_ended_tells_what_the_node_has(store, columns, drift):
    add_nodes(store, 1)
    good(store, "A")
    later = ended(store, "B", "failed")
    try_of(store, later, 1, **columns)
    found = level(store, 1)
    assert (found.runs.release_id, found.drift) == (1, drift)
    assert found.has.release_id == (later.id if drift == "ahead" else 1)
    # a try that is known to have changed nothing makes an earlier one no clearer
    good_again = ended(store, "C", "failed")
    try_of(store, good_again, 1, error_kind="agent_failed")
    assert level(store, 1).drift == drift
    good(store, "A")
    assert level(store, 1).drift == "none"


def test_a_try_that_is_under_way_leaves_nothing_unknown(store):
    add_nodes(store, 1)
    good(store, "A")
    release = new_release(store)
    sql(store, "UPDATE nodes SET last_version = 2")
    try_of(store, release, 1, status="running", attempts=1)
    assert level(store, 1).drift == "none"


@pytest.mark.parametrize("change", [
    "UPDATE nodes SET last_version = 9", "UPDATE nodes SET main_ip = '10.0.0.99'", "UPDATE nodes SET agent_port = 9",
    f"INSERT INTO nodes (name, main_ip, enabled, last_version) VALUES ('again', '{ADDRESSES[0]}', 0, 9)"])
def test_what_a_node_runs_is_not_known_where_something_else_may_have_reached_its_address(store, change):
    add_nodes(store, 1)
    good(store, "A")
    assert level(store, 1).drift == "none"
    sql(store, change)
    assert level(store, 1).drift == "unknown"
    if "INSERT" in change:
        try_of(store, ended(store, "C", "failed", node_ids=[1]), 1, error_kind="agent_failed")
        assert level(store, 1).drift == "unknown"
    good(store, "A", 1)
    assert level(store, 1).drift == "none"


def test_after_a_restore_with_first_version_it_is_not_known_what_nodes_run(store):
    add_nodes(store, 1)
    ended(store, "A", "success")
    store.releases.set_first_version(50)
    assert level(store, 1).drift == "unknown"
    failed = ended(store, "B", "failed")
    try_of(store, failed, 1, error_kind="agent_failed")
    assert level(store, 1).drift == "unknown"  # that it took nothing then does not tell what it had
    sql(store, "INSERT INTO nodes (name, main_ip, created_at) VALUES ('later', '10.9.9.9', '2999-01-01T00:00:00.000Z')")
    assert level(store, 2).drift == "behind"
    ended(store, "A", "success", "success")
    assert drifts(store) == ["none", "none"]


def test_a_database_that_lost_a_release_knows_no_longer_what_nodes_run(store):
    add_nodes(store, 2)
    good(store, "A")
    new_release(store, node_ids=[2])
    store.state.seen.use_version(3)
    store.state.is_rewind_unwritten = True
    store.claims.scan()
    assert drifts(store) == ["unknown", "unknown"]
    store.releases.act("cancel", 2, "anna")
    good(store, "A", 1)
    assert drifts(store) == ["none", "unknown"]


def test_a_host_name_in_other_letters_is_the_same_address(store):
    add_nodes(store, 1)
    sql(store, "UPDATE nodes SET main_ip = 'edge.example'")
    good(store, "A")
    sql(store, "UPDATE nodes SET main_ip = 'EDGE.example'")
    assert level(store, 1).drift == "none"


# -- wants ------------------------------------------------------------------------------------------

def test_a_release_for_a_label_is_for_whoever_has_it_now(store):
    for number, region in enumerate(("eu", "us", "us"), 1):
        store.nodes.add(f"edge-{number}", ADDRESSES[number - 1], labels=f'{{"region":"{region}"}}')
    good(store, "A")
    ended(store, "B", "success", "success", labels={"region": "us"})
    assert ids(store, "wants") == [1, 2, 2]
    store.nodes.update(1, {"labels": '{"region":"us"}'})
    store.nodes.update(2, {"labels": '{"region":"eu"}'})
    assert ids(store, "wants") == [2, 1, 2]
    assert drifts(store) == ["behind", "ahead", "none"]


def test_a_retry_stands_for_all_whom_the_first_was_for(store):
    add_nodes(store, 3)
    good(store, "A")
    failed = ended(store, "B", "success", "failed", "skipped")
    retry = store.releases.retry(failed.id, "anna").release
    assert retry.selection == "{}"
    sql(store, "UPDATE release_task_nodes SET status = 'success', attempts = 1 WHERE release_task_id = ?", retry.id)
    sql(store, "UPDATE release_tasks SET status = 'success' WHERE id = ?", retry.id)
    assert ids(store, "wants") == [retry.id] * 3
    assert drifts(store) == ["none"] * 3
    sql(store, "UPDATE release_tasks SET selection = 'broken' WHERE id = ?", failed.id)
    assert store.releases.retry(failed.id, "anna", rc.Again(over_newer=True)).release.selection == '{"nodesOf":2}'


def test_nobody_wants_what_was_rolled_back(store):
    add_nodes(store, 3)
    good(store, "A")
    store.nodes.update(3, {"status": "offline"})
    bad = ended(store, "B", "success", "success")
    assert drifts(store) == ["none", "none", "behind"]
    rollback = store.releases.rollback(bad.id, "anna").release
    assert rollback.selection == '{"nodeIds":[1,2]}'
    assert ids(store, "wants") == [1, 1, 1]
    assert drifts(store) == ["ahead", "ahead", "none"]
    store.releases.act("cancel", rollback.id, "anna")
    assert ids(store, "wants") == [bad.id] * 3  # before any node had it
    again = store.releases.rollback(bad.id, "anna").release
    sql(store, "UPDATE release_task_nodes SET status = 'success' WHERE release_task_id = ?", again.id)
    sql(store, "UPDATE release_tasks SET status = 'success', success_nodes = 2 WHERE id = ?", again.id)
    assert ids(store, "wants") == [again.id, again.id, 1]
    assert drifts(store) == ["none"] * 3


def test_a_release_that_a_person_wrote_is_for_the_nodes_that_it_has(store):
    add_nodes(store, 2)
    sql(store, "INSERT INTO release_tasks (version) VALUES (1)")
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (1, 2, 1)")
    assert store.claims.claim(1, "me", 30)
    assert store.releases.get(1).selection == '{"nodesOf":1}'
    sql(store, "UPDATE release_task_nodes SET status = 'success'")
    sql(store, "UPDATE release_tasks SET status = 'success'")
    assert ids(store, "wants") == [None, 1]
    for text in ("[]", "broken", '{"labels":1}', '{"nodeIds":[[]]}', '{"nodesOf":"x"}', '{"nodesOf":true}', "null",
                 f'{{"nodesOf":1{"0" * 30}}}', '{"nodeid":[1]}', '{"exclude":{"node":[1]}}',
                 '{"exclude":[1]}', '{"labels":{"region":[]}}'):
        sql(store, "UPDATE release_tasks SET selection = ?", text)
        assert ids(store, "wants") == [None, None], text
        assert rc.release_json(store.releases.get(1))["selection"] == {"nodeIds": []}


def test_migrate_knows_what_nodes_run_from_their_history(database_url, open_store):
    with at_schema(database_url, 7) as old:
        for number in (1, 2, 3):
            sql(old, "INSERT INTO nodes (name, main_ip, last_version) VALUES (?, ?, 2)", f"edge-{number}",
                ADDRESSES[number - 1])
        for version in (1, 2):
            sql(old, "INSERT INTO release_tasks (version, status, payload) VALUES (?, 'success', ?)", version,
                f'{{"n":{version}}}')
        for release, node, status in ((1, 1, "success"), (1, 2, "success"), (2, 1, "success"), (2, 2, "failed")):
            sql(old, "INSERT INTO release_task_nodes (release_task_id, node_id, batch, status, attempts, error_kind, "
                     "main_ip, agent_port) VALUES (?, ?, 1, ?, 1, ?, ?, 8443)", release, node, status,
                "deadline" if status == "failed" else "", ADDRESSES[node - 1])
    store = open_store(database_url)
    assert ids(store, "runs") == [2, 1, None]
    assert ids(store, "wants") == [2, 2, None]
    assert drifts(store) == ["none", "unknown", "unknown"]


def test_migrate_takes_a_retry_for_the_nodes_of_the_first_release(database_url, open_store):
    with at_schema(database_url, 7) as old:
        for number in (1, 2):
            sql(old, "INSERT INTO nodes (name, main_ip, last_version) VALUES (?, ?, ?)", f"edge-{number}",
                ADDRESSES[number - 1], 2 * number)
        for version, status, payload, retry_of in ((1, "success", "a", None), (2, "failed", "b", None),
                                                   (3, "failed", "b", 2), (4, "success", "b", 3)):
            sql(old, "INSERT INTO release_tasks (version, status, payload, retry_of) VALUES (?, ?, ?, ?)", version,
                status, f'{{"n":"{payload}"}}', retry_of)
        for release, node, status in ((1, 1, "success"), (1, 2, "success"), (2, 1, "success"), (2, 2, "failed"),
                                      (3, 2, "failed"), (4, 2, "success")):
            sql(old, "INSERT INTO release_task_nodes (release_task_id, node_id, batch, status, attempts) "
                     "VALUES (?, ?, 1, ?, 1)", release, node, status)
    store = open_store(database_url)
    assert [store.releases.get(number).selection for number in (2, 3, 4)] == ['{"nodesOf":2}'] * 3
    assert drifts(store) == ["none", "none"]


def test_prune_keeps_what_a_node_runs_or_should_run(store):
    add_nodes(store, 3)
    good(store, "A", 1)
    good(store, "B", target="dns")
    store.nodes.update(2, {"status": "offline"})
    for _ in range(5):
        ended(store, "C", "success", "success")
    sql(store, "UPDATE release_tasks SET finished_at = '2020-01-01T00:00:00.000Z'")
    before = ids(store, "runs"), ids(store, "wants"), drifts(store)
    store.history.delete([old.id for old in store.history.prunable(86400.0, keep=1)])
    assert (ids(store, "runs"), ids(store, "wants"), drifts(store)) == before
    assert store.releases.page().total < 7


# -- what plans say of it -------------------------------------------------------------------------

@pytest.mark.parametrize("doubt", [
    lambda store: try_of(store, ended(store, "B", "failed", "skipped"), 1, error_kind="abandoned"),
    lambda store: store.releases.set_first_version(50), lambda store: store.nodes.update(1, {"main_ip": "10.9.9.9"})])
def test_nothing_is_called_unchanged_on_a_node_of_which_it_is_not_known(store, doubt):
    add_nodes(store, 2)
    good(store, "A")
    assert rc.CHANGES_NOTHING in rc.effect_text(store.releases.plan(rc.ReleaseRequest(payload={"content": "A"})).effect)
    doubt(store)
    plan = store.releases.plan(rc.ReleaseRequest(payload={"content": "A"}))
    text = rc.effect_text(plan.effect)
    assert rc.CHANGES_NOTHING not in text
    assert "is not known" in text
    assert not store.releases.create(rc.ReleaseRequest(payload={"content": "A"}), "anna").is_unchanged


def test_a_probe_that_failed_leaves_the_payload_on_the_node(store):
    add_nodes(store, 1)
    good(store, "A")
    try_of(store, ended(store, "B", "failed"), 1, error_kind="verify")
    plan = store.releases.plan(rc.ReleaseRequest(payload={"content": "A"}))
    assert rc.effect_text(plan.effect) == "1 change against release 2 (v2, 1 of 1 node)"


# -- catch-up ----------------------------------------------------------------------------------------

def behind(store: rc.Store) -> rc.Release:
    """Make nodes 3 and 4 miss a release, and 4 be in maintenance still."""
    add_nodes(store, 4)
    good(store, "A")
    for node_id, status in ((3, "offline"), (4, "maintenance")):
        store.nodes.update(node_id, {"status": status})
    release = ended(store, "B", "success", "success")
    store.nodes.update(3, {"status": "online"})
    return release


def test_a_catch_up_brings_to_those_behind_what_they_should_run(store):
    wanted = behind(store)
    plans, left_out = store.releases.plan_catch_up()
    assert [(plan.batches, plan.payload_of, plan.version) for plan in plans] == [([[3]], (2, 2), 3)]
    assert rc.effect_text(plans[0].effect) == "1 change against release 1 (v1, 1 of 1 node)"
    assert [(one.name, one.why) for one in left_out] == [("edge-4", "in maintenance")]
    assert store.releases.page().total == 2
    made, left_out = store.releases.catch_up("anna")
    release = made[0].release
    assert (release.catch_up_of, release.target, release.selection, release.reason, content_of(release)) == (
        wanted.id, "cdn", "{}", "catch-up with release 2", "B")
    assert len(left_out) == 1
    # what is under way is not sent again
    made, left_out = store.releases.catch_up("anna")
    assert made == []
    assert [one.why for one in left_out] == ["in maintenance", "part of release 3, which has not ended"]
    sql(store, "UPDATE release_task_nodes SET status = 'success' WHERE release_task_id = 3")
    sql(store, "UPDATE release_tasks SET status = 'success' WHERE id = 3")
    assert drifts(store) == ["none", "none", "none", "behind"]
    assert ids(store, "wants") == [3] * 4


def test_a_catch_up_makes_a_release_for_each_wanted_payload_in_their_order(store):
    for number, region in enumerate(("eu", "us", "us"), 1):
        store.nodes.add(f"edge-{number}", ADDRESSES[number - 1], labels=f'{{"region":"{region}"}}')
    partly(store, "A", "success", "failed", labels={"region": "us"}, target="dns")
    partly(store, "B", "failed", labels={"region": "eu"})
    made, left_out = store.releases.catch_up("anna", "level", {"batches": [1]})
    assert [(one.release.catch_up_of, one.release.target, one.batches, one.release.reason) for one in made] == [
        (1, "dns", [[3]], "level"), (2, "cdn", [[1]], "level")]
    assert left_out == []


def test_a_catch_up_leaves_out_what_can_not_be_sent(store):
    store.nodes.add("edge-1", ADDRESSES[0], labels='{"a":"1"}')
    store.nodes.add("edge-2", ADDRESSES[1], labels='{"a":"2"}')
    partly(store, "A", "failed", labels={"a": "1"})
    partly(store, "B", "failed", labels={"a": "2"})
    sql(store, "UPDATE release_tasks SET payload = '[]' WHERE id = 2")
    made, left_out = store.releases.catch_up("anna")
    assert [one.release.catch_up_of for one in made] == [1]
    assert left_out[0].name == "edge-2"
    assert left_out[0].why.startswith("left behind: the payload of release 2 can't be used")


def succeed(store: rc.Store, release: rc.Release) -> None:
    """Let a release end well, by hand."""
    sql(store, "UPDATE release_task_nodes SET status = 'success', attempts = 1 WHERE release_task_id = ?", release.id)
    sql(store, "UPDATE nodes SET last_version = ? WHERE id IN (SELECT node_id FROM release_task_nodes "
               "WHERE release_task_id = ?)", release.version, release.id)
    sql(store, "UPDATE release_tasks SET status = 'success', success_nodes = total_nodes WHERE id = ?", release.id)


def test_what_a_catch_up_of_a_release_that_is_rolled_back_brought_is_told(store):
    bad = behind(store)
    succeed(store, store.releases.catch_up("anna")[0][0].release)
    rollback = store.releases.rollback(bad.id, "anna", rc.Again(to_release=1)).release
    succeed(store, rollback)
    assert ids(store, "wants") == [rollback.id, rollback.id, 1, 1]
    assert drifts(store) == ["none", "none", "ahead", "none"]


@pytest.mark.parametrize("way", ["a second catch-up", "a retry of a catch-up"])
def test_what_was_rolled_back_comes_back_by_no_way(store, way):
    add_nodes(store, 5)
    good(store, "A")
    sql(store, "UPDATE release_tasks SET selection = '{}'")
    for number in (2, 3, 4, 5):
        store.nodes.update(number, {"status": "offline"})
    bad = ended(store, "B", "success")
    is_retry = way == "a retry of a catch-up"
    for number in (2, 3, 4, 5) if is_retry else (2,):
        store.nodes.update(number, {"status": "online"})
    first = store.releases.catch_up("anna")[0][0].release
    settle(store, first, *(["failed"] * 4 if is_retry else ["success"]))
    for number in (3, 4, 5):
        store.nodes.update(number, {"status": "online"})
    second = store.releases.retry(first.id, "anna").release if is_retry else \
        store.releases.catch_up("anna")[0][0].release
    assert second.total_nodes == (4 if is_retry else 3)
    succeed(store, second)
    rollback = store.releases.rollback(bad.id, "anna", rc.Again(over_newer=True)).release
    succeed(store, rollback)
    has_b = [ran for ran in ids(store, "has") if ran == second.id]
    assert has_b
    assert second.id not in ids(store, "wants")
    after = good(store, "C")
    assert store.releases.plan_again("rollback", after.id).payload_of == (rollback.id, rollback.version)


def test_nodes_should_still_run_what_somebody_only_began_to_roll_back(store):
    add_nodes(store, 2)
    good(store, "A")
    good(store, "B")
    rollback = store.releases.rollback(2, "anna").release
    store.releases.act("cancel", rollback.id, "anna")
    assert (ids(store, "wants"), drifts(store)) == ([2, 2], ["none", "none"])


def test_a_filter_that_takes_no_node_is_an_empty_list(store):
    add_nodes(store, 2)
    good(store, "A")
    sql(store, "UPDATE release_tasks SET selection = '{\"nodesOf\":1}'")
    assert store.fleet.page(wanted=rc.NodeFilter(search="zzz")).items == []
    assert store.fleet.page(page=9).items == []
    sql(store, "UPDATE nodes SET enabled = 0")
    assert store.fleet.counts().drift == dict.fromkeys(rc.DRIFTS, rc.DriftCount())


@pytest.mark.parametrize(("sent", "first_version", "then"), [(0, 1000, 999), (1, 1000, 999), (1, 0, 2)])
def test_a_node_that_moves_is_never_taken_for_one_that_was_sent_less(store, sent, first_version, then):
    add_nodes(store, 1)
    for content in "AB"[:2 * sent]:
        good(store, content)
    if first_version:
        store.releases.set_first_version(first_version)
    store.nodes.update(1, {"main_ip": ADDRESSES[8]})
    assert store.nodes.get(1).last_version == then


def test_what_is_caught_up_with_again_and_again_names_the_first_release(store):
    """So each can be pruned, and to tell which is newer costs no more with each of them."""
    add_nodes(store, 2)
    good(store, "A")
    sql(store, "UPDATE release_tasks SET selection = '{}'")
    store.nodes.update(2, {"status": "offline"})
    wanted = ended(store, "B", "success")
    for _ in range(3):
        store.nodes.update(2, {"status": "online"})
        sql(store, "UPDATE release_task_nodes SET status = 'failed', error_kind = 'agent_failed' "
                   "WHERE node_id = 2 AND release_task_id > 1")
        made = store.releases.catch_up("anna")[0][0].release
        assert made.catch_up_of == wanted.id
        succeed(store, made)


def test_a_release_written_by_hand_that_names_a_digest_is_told_by_what_it_would_send(store):
    add_nodes(store, 2)
    good(store, "A", 1)
    sql(store, "UPDATE release_tasks SET selection = '{}', started_at = NULL, payload = '{\"content\":\"Z\"}'")
    made = store.releases.catch_up("anna")[0][0].release
    assert store.claims.claim(made.id, "me", 30.0) is not None


def test_a_catch_up_makes_no_old_payload_new_again(store):
    behind(store)
    caught_up = store.releases.catch_up("anna")[0][0].release  # of release 2, before release 4 but with a lower version
    good(store, "C", 1, 2)
    sql(store, "UPDATE release_tasks SET selection = '{}' WHERE id = 4")
    succeed(store, caught_up)
    sql(store, "UPDATE release_tasks SET version = 9 WHERE id = ?", caught_up.id)
    sql(store, "UPDATE nodes SET last_version = 9 WHERE id = 3")
    assert ids(store, "wants") == [4] * 4
    assert drifts(store) == ["none", "none", "behind", "behind"]


def test_a_retry_of_an_older_release_makes_its_payload_no_newer(store):
    add_nodes(store, 3)
    first = partly(store, "A", "success", "success", "failed")
    store.nodes.update(3, {"status": "offline"})
    newer = ended(store, "B", "success", "success")
    store.nodes.update(3, {"status": "online"})
    succeed(store, store.releases.retry(first.id, "anna").release)
    assert ids(store, "wants") == [newer.id] * 3
    assert drifts(store) == ["none", "none", "behind"]


@pytest.mark.parametrize("change", [
    lambda store: store.releases.rollback(2, "anna", rc.Again(to_release=1)),
    lambda store: (good(store, "C", 1, 2), sql(store, "UPDATE release_tasks SET selection = '{}' WHERE id = 4"))])
def test_a_catch_up_that_nobody_should_have_any_more_does_not_start(store, change):
    behind(store)
    caught_up = store.releases.catch_up("anna")[0][0].release
    change(store)
    assert store.claims.claim(caught_up.id, "me", 30) is None
    release = store.releases.get(caught_up.id)
    assert release.status == "cancelled"
    assert "edge-3 should run something else now" in store.releases.events(release.id)[-1].detail
    assert store.releases.with_nodes(release.id)[1][0].status == "skipped"


def test_a_catch_up_does_not_go_to_a_node_that_has_other_labels_since(store):
    for number in (1, 2):
        store.nodes.add(f"edge-{number}", ADDRESSES[number - 1], labels='{"region":"eu"}')
    partly(store, "A", "success", "failed", labels={"region": "eu"})
    caught_up = store.releases.catch_up("anna")[0][0].release
    store.nodes.update(2, {"labels": '{"region":"us"}'})
    assert store.claims.claim(caught_up.id, "me", 30) is None
    assert store.releases.get(caught_up.id).status == "cancelled"


def test_a_rollback_in_one_region_says_nothing_of_another(store):
    for number, region in enumerate(("eu", "us"), 1):
        store.nodes.add(f"edge-{number}", ADDRESSES[number - 1], labels=f'{{"region":"{region}"}}')
    ended(store, "W", "success", "success")
    ended(store, "X", "success", labels={"region": "us"})
    bad = ended(store, "X", "success", labels={"region": "eu"})
    rollback = store.releases.rollback(bad.id, "anna").release
    succeed(store, rollback)
    assert drifts(store) == ["none", "none"]
    assert ids(store, "wants") == [rollback.id, 2]


def test_a_node_that_moved_away_and_back_runs_what_nobody_knows(store):
    add_nodes(store, 2)
    good(store, "A", 1)
    store.nodes.update(1, {"main_ip": "10.0.0.1"})
    store.nodes.update(2, {"main_ip": ADDRESSES[0]})
    good(store, "B", 2)
    store.nodes.update(2, {"main_ip": "10.0.0.2"})
    store.nodes.update(1, {"main_ip": ADDRESSES[0]})
    assert drifts(store) == ["unknown", "unknown"]


def test_what_a_node_at_the_same_address_was_sent_stays_known_when_it_leaves(store):
    add_nodes(store, 1)
    good(store, "A", 1)
    store.nodes.update(1, {"enabled": 0})
    store.nodes.add("other", ADDRESSES[0])
    good(store, "B", 2)
    store.nodes.update(2, {"main_ip": "10.0.0.2"})
    store.nodes.update(1, {"enabled": 1})
    assert drifts(store)[0] == "unknown"


def test_a_node_that_no_release_takes_costs_no_query_a_release(store, monkeypatch):
    add_nodes(store, 2)
    for number in range(40):
        good(store, f"A{number}", 1)
        sql(store, "UPDATE release_tasks SET selection = ? WHERE id = ?", f'{{"nodesOf":{number + 1}}}', number + 1)
    asked = []
    execute = rc.Transaction.execute
    monkeypatch.setattr(rc.Transaction, "execute", lambda tx, statement, *params: asked.append(statement) or execute(
        tx, statement, *params))
    assert level(store, 2).wants is None
    assert len(asked) < 20


# -- counted -------------------------------------------------------------------------------------------

def counted_one_by_one(store: rc.Store) -> rc.FleetCounts:
    """Return what Fleet.counts() counts, from what is told of each node by itself."""
    listed = store.fleet.page(size=0).items
    nodes = [one.node for one in listed]
    counts, right, enabled = {drift: rc.DriftCount() for drift in rc.DRIFTS}, [], [n for n in nodes if n.enabled]
    for node, found in listed:
        if not node.enabled:
            continue
        has, wants = (ran.release_id if ran else 0 for ran in (found.has, found.wants))
        one, since = counts[found.drift], found.drift_since and max(found.drift_since, node.created_at)
        counts[found.drift] = rc.DriftCount(
            one.nodes + 1, one.first or node.name, min([s for s in (one.since, since) if s], default=None),
            one.away + (not node.gets_releases), one.known or rc.may_run_text(found),
            (has, wants) if not one.nodes else (has if has == one.release_ids[0] else 0,
                                                wants if wants == one.release_ids[1] else 0))
        right += [found.has.payload_sha256] if found.is_right else []
    states, twins = [node.state for node in nodes], rc.twins_of(enabled)
    return rc.FleetCounts(counts, len(right), len(set(right)), {state: states.count(state) for state in set(states)},
                          *((rc.twins_text(*twins), twins[1].name) if twins else ()))


# What a release is for, of nodes 1 to 12, some of which have the label l; what became of a node; where nodes are.
SELECTIONS = ({}, {"labels": {"l": "x"}}, {"labels": {"l": ["x", "z"]}, "exclude": {"nodeIds": [3]}},
              {"nodeIds": [1, 2, 5, 9, 77]}, {"nodeIds": [4, 6], "labels": {"l": "y"}}, {"exclude": {"nodeIds": [12]}},
              {"exclude": {"labels": {"l": "y"}}}, {"nodesOf": 1}, {"nodesOf": 2}, {"no": "such"})
FATES = (("success", ""), ("skipped", ""), ("failed", "verify"), ("failed", "abandoned"), ("failed", "agent_failed"))
PLACES = ("10.0.0.9", "10.0.0.8", "::ffff:10.0.0.8", "::FFFF:10.0.0.9", "host", "Host", "::1", "0::1")


def draw_rows(tx: rc.Transaction, rng: random.Random, releases: int) -> None:
    """Write anew what became of 12 nodes in some releases, mostly that they succeeded."""
    ends = [rc.utc_text(1.8e9 + 60 * number) for number in range(releases + 2)]
    sent, oddity = dict.fromkeys(range(1, 13), 0), rng.choice((0.0, 0.1, 0.4))
    tx.execute("UPDATE release_tasks SET rollback_of = NULL")
    for number in range(1, releases + 1):
        for node_id in sent:
            fate, kind = rng.choice(FATES) if rng.random() < oddity else FATES[0]
            sent[node_id] = number if fate != "skipped" else sent[node_id]
            tx.execute("UPDATE release_task_nodes SET status = ?, error_kind = ?, attempts = 1, finished_at = ?, "
                       "main_ip = ? WHERE release_task_id = ? AND node_id = ?", fate, kind, rng.choice((
                           ends[number], ends[number - 1], None)), "10.9.9.9" if rng.random() < oddity / 4 else "",
                       number, node_id)
        status = rng.choice(("success", "success", "partial", "failed", "running"))
        tx.execute("UPDATE release_tasks SET selection = ?, status = ?, started_at = ?, finished_at = ?, "
                   f"rollback_of = ?, {rc.COUNTERS} WHERE id = ?", rc.to_json(rng.choice(SELECTIONS)), status,
                   ends[number], ends[number], 1 if number > 1 and rng.random() < 0.1 else None, number)
    for node_id, version in sent.items():
        tx.execute("UPDATE nodes SET labels = ?, enabled = ?, status = ?, created_at = ?, last_version = ?, "
                   "main_ip = ? WHERE id = ?",
                   rng.choice(('{}', '{"l":"x"}', '{"l":"y"}', '{"l": "x"}')), int(rng.random() < 0.9),
                   rng.choice(("online", "online", "offline")), rng.choice((ends[0], ends[-1])),
                   version + (rng.random() < oddity / 4),
                   rng.choice(PLACES) if rng.random() < oddity else f"10.0.1.{node_id}", node_id)
    tx.execute("UPDATE database_state SET unsure_version = ?, unsure_at = ?", rng.choice((0, 0, 2)), ends[0])


@pytest.mark.parametrize("seed", range(3))
def test_nodes_that_are_counted_together_are_what_each_is_by_itself(store, monkeypatch, seed):
    monkeypatch.setattr(rc, "IDS_PER_STATEMENT", 3)
    rng = random.Random(seed)
    add_nodes(store, 12)
    releases = [new_release(store, payload={"n": number % 3}, node_ids=list(range(1, 13 - 5 * (number == 1))))
                for number in range(4)]
    for _ in range(25):
        with store.database.transaction(write=True) as tx:
            draw_rows(tx, rng, len(releases))
        assert store.fleet.counts(key=object()) == counted_one_by_one(store)


def test_nodes_that_came_after_a_restore_are_counted_apart_from_those_that_may_run_something_else(store):
    add_nodes(store, 3)
    settle(store, new_release(store, payload={"content": "A"}), *["success"] * 3)
    sql(store, "UPDATE nodes SET created_at = '2020-01-01T00:00:00.000Z' WHERE id > 1")
    sql(store, "UPDATE database_state SET unsure_version = 9, unsure_at = '2021-01-01T00:00:00.000Z'")
    found = store.fleet.counts().drift
    assert {drift: found[drift].nodes for drift in ("none", "unknown")} == {"none": 1, "unknown": 2}
    assert store.fleet.counts(key=2) == counted_one_by_one(store)


def test_most_nodes_of_a_fleet_are_counted_by_one_of_them(store, monkeypatch):
    add_nodes(store, 9)
    settle(store, new_release(store, payload={"content": "A"}), *["success"] * 9)
    read, real = [], rc.levels_by_parts
    monkeypatch.setattr(rc, "levels_by_parts", lambda tx, ids: read.append(ids) or real(tx, ids))
    assert store.fleet.counts().drift["none"].nodes == 9
    new_release(store, node_ids=[4, 7], payload={"content": "B"})
    sql(store, "UPDATE release_tasks SET status = 'success' WHERE id = 2")
    assert store.fleet.counts(key=2).drift["behind"].nodes == 2
    assert read == [[1], [1, 4, 7]]


# -- against a model -----------------------------------------------------------------------------------

class Model:
    """Reads runs, wants and drift off a history that it keeps in plain lists, by going through all of it."""

    def __init__(self) -> None:
        self.labels: dict[int, str] = {}
        self.address: dict[int, str] = {}
        # id, version, payload, status, selection, rollback_of, and by node what became of it there, and its address
        self.releases: list[dict[str, Any]] = []

    def takes(self, release: dict[str, Any], node: int) -> bool:
        selection = release["selection"]
        if "nodeIds" in selection:
            return node in selection["nodeIds"]
        return "labels" not in selection or selection["labels"]["l"] == self.labels[node]

    def again(self, release: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a release and those whose payload it brings again, by retry or catch-up."""
        up = [other for other in self.releases if other["id"] == release["up"]]
        return [release, *(self.again(up[0]) if up else [])]

    def rank(self, release: dict[str, Any]) -> int:
        return self.again(release)[-1]["version"]

    def is_bad(self, release: dict[str, Any]) -> bool:
        return any(other["rollback_of"] == one["id"] for other in self.releases for one in self.again(release))

    def drift(self, node: int) -> tuple[int | None, int | None, str]:
        runs = wants = has = None
        is_unknown = False
        for release in sorted(self.releases, key=lambda r: r["version"]):
            end, address = release["nodes"].get(node, ("", ""))
            if end:
                if address != self.address[node] and end == "success":
                    runs = has = None
                    is_unknown = True
                elif end == "success":
                    runs = has = release
                    is_unknown = False
                elif end == "verify":
                    has, is_unknown = release, False
                elif end == "unknown":
                    is_unknown = True
            if release["status"] in ("success", "partial") and self.takes(release, node) and not self.is_bad(
                    release) and (wants is None or self.rank(release) >= self.rank(wants)):
                wants = release
        name = lambda r: r and r["id"]  # noqa: E731 - one line, used once below
        if is_unknown:
            return name(runs), name(wants), "unknown"
        if has and wants and has["payload"] == wants["payload"]:
            drift = "none"
        elif wants and (has is None or self.rank(has) < self.rank(wants)):
            drift = "behind"
        else:
            drift = "ahead" if has else "none"
        return name(runs), name(wants), drift


ENDS = {"success": {"status": "success"}, "known": {"status": "failed", "error_kind": "agent_failed"},
        "unknown": {"status": "failed", "error_kind": "abandoned"}, "verify": {"status": "failed",
                                                                              "error_kind": "verify"}}


@pytest.mark.parametrize("seed", range(12))
def test_runs_wants_and_drift_agree_with_a_model_over_random_histories(store, seed):
    rng, model = random.Random(seed), Model()
    for number in range(1, 6):
        model.labels[number], model.address[number] = rng.choice("xy"), ADDRESSES[number - 1]
        store.nodes.add(f"edge-{number}", ADDRESSES[number - 1], labels=f'{{"l":"{model.labels[number]}"}}')
    for _ in range(14):
        deed = rng.random()
        if deed < 0.1:
            node = rng.randint(1, 5)
            model.labels[node] = rng.choice("xy")
            store.nodes.update(node, {"labels": f'{{"l":"{model.labels[node]}"}}', "name": f"node-{rng.random()}"})
        elif deed < 0.3:
            for made in store.releases.catch_up("anna")[0]:
                _ended_somehow(store, model, rng, made.release)
        elif deed < 0.35:
            sql(store, "UPDATE release_tasks SET finished_at = '2020-01-01T00:00:00.000Z'")
            gone = store.history.delete([old.id for old in store.history.prunable(86400.0, keep=1)])
            model.releases = [r for r in model.releases if r["id"] not in gone]
        else:
            _random_release(store, model, rng)
        for node in range(1, 6):
            found = level(store, node)
            assert (found.runs and found.runs.release_id, found.wants and found.wants.release_id,
                    found.drift) == model.drift(node), f"node {node}, {model.releases}"
        assert store.fleet.counts(key=object()) == counted_one_by_one(store)


def _random_release(store: rc.Store, model: Model, rng: random.Random) -> None:
    """Make a release, or a rollback or retry of one, that ends somehow."""
    content = rng.choice("ABC")
    old = rng.choice(model.releases) if model.releases and rng.random() < 0.2 else None
    fields: dict[str, Any] = rng.choice([{}, {"labels": {"l": rng.choice("xy")}},
                                         {"node_ids": rng.sample(range(1, 6), 2)}])
    try:
        if old:
            verb = rng.choice((store.releases.rollback, store.releases.retry))
            release = verb(old["id"], "anna", rc.Again(over_newer=True)).release
        else:
            release = new_release(store, payload={"content": content}, **fields)
    except rc.AppError:
        return
    _ended_somehow(store, model, rng, release)


def _ended_somehow(store: rc.Store, model: Model, rng: random.Random, release: rc.Release) -> None:
    ends = {}
    for row in store.releases.with_nodes(release.id)[1]:
        end = rng.choice(("success", "success", "success", *ENDS))
        try_of(store, release, row.node_id, attempts=1, **ENDS[end])
        sql(store, "UPDATE nodes SET last_version = ? WHERE id = ?", release.version, row.node_id)
        ends[row.node_id] = end, model.address[row.node_id]
    successes = sum(end == "success" for end, _ in ends.values())
    status = "success" if successes == len(ends) else rng.choice(("partial", "failed", "cancelled"))
    sql(store, "UPDATE release_tasks SET status = ?, success_nodes = ? WHERE id = ?", status, successes, release.id)
    rollback_of = None if status == "cancelled" and not successes else release.rollback_of
    model.releases.append({"id": release.id, "version": release.version, "payload": content_of(release),
                           "status": status, "selection": rc.parse_json(release.selection), "rollback_of": rollback_of,
                           "up": release.retry_of or release.catch_up_of, "nodes": ends})


# -- by the API ------------------------------------------------------------------------------------------

def test_the_api_tells_of_a_node_what_it_runs_and_what_it_should_run(client):
    wanted = behind(client.store)
    node = client.ok("GET", "/api/v1/nodes/3")
    since = client.store.fleet.listed([client.store.nodes.get(3)])[0].level
    assert node["drift"] == "behind"
    assert node["runs"] == {"releaseId": 1, "version": 1, "payloadSha256": client.store.releases.get(1).payload_sha256,
                            "since": since.runs.since}
    assert node["wants"] == {"releaseId": 2, "version": 2, "payloadSha256": wanted.payload_sha256,
                             "since": wanted.finished_at}
    fresh = client.ok("POST", "/api/v1/nodes", {"name": "new", "mainIp": "10.9.9.9"}, 201)
    assert (fresh["runs"], fresh["wants"]["releaseId"], fresh["drift"]) == (None, 2, "behind")


@pytest.mark.parametrize(("query", "names"), [
    ("drift=behind", ["edge-3", "edge-4"]), ("runs=2", ["edge-1", "edge-2"]),
    ("name=edge-1,edge-4", ["edge-1", "edge-4"]),
    ("name=*-[34]", ["edge-3", "edge-4"]), ("label=region=eu", ["edge-2"]), ("label=region=eu,rack=1", ["edge-2"]),
    ("label=region=us", []), ("search=EU", ["edge-2"]), ("search=127.0.1.3", ["edge-3"]),
    ("sort=-name&pageSize=2", ["edge-4", "edge-3"]), ("sort=drift&drift=&pageSize=1", ["edge-3"]),
    ("sort=runs&pageSize=2&page=2", ["edge-1", "edge-2"]), ("drift=none&search=edge&page=2&pageSize=1", ["edge-2"]),
    ("search=rack%3D1%20region%3Deu", ["edge-2"]), ("search=region%3Deu,%20rack%3D1", ["edge-2"]),
    ("search=rack%3D1%20region%3Dus", []), ("search=EU%20edge", ["edge-2"]),
    ("search=,&drift=behind", ["edge-3", "edge-4"]),
    ("state=disabled", []), ("state=maintenance", ["edge-4"]), ("state=online", ["edge-1", "edge-2", "edge-3"])])
def test_a_list_of_nodes_can_be_searched_and_sorted(client, query, names):
    behind(client.store)
    client.store.nodes.update(2, {"labels": '{"region":"eu","rack":"1"}'})
    assert [node["name"] for node in client.ok("GET", f"/api/v1/nodes?{query}")["items"]] == names


def test_a_disabled_node_is_that_whatever_its_status_and_the_command_line_finds_it_too(quick, open_store):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    behind(store)
    store.nodes.update(4, {"enabled": 0})
    store.nodes.update(2, {"labels": '{"region":"eu","rack":"1"}'})
    found = [[node["name"] for node in quick.ok("node", "list", "--json", *words).json["items"]] for words in (
        ("--state", "disabled"), ("--state", "maintenance"), ("--search", "rack=1 region=eu"))]
    assert found == [["edge-4"], [], ["edge-2"]]
    assert quick("node", "list", "--state", "gone").code == 2


@on_sqlite
@pytest.mark.parametrize("query", ["state=gone", "drift=x", "label=region", "label=a=1,a=2", "runs=x", "sort=size"])
def test_a_search_that_can_not_be_meant_is_refused(client, query):
    assert client.code("GET", f"/api/v1/nodes?{query}") in (2002, 2003)


def test_the_api_tells_what_a_node_was_given_newest_first(client):
    behind(client.store)
    found = client.ok("GET", "/api/v1/nodes/1/releases")
    assert [(one["releaseId"], one["version"], one["releaseStatus"], one["status"]) for one in found["items"]] == [
        (2, 2, "success", "success"), (1, 1, "success", "success")]
    assert found["total"] == 2
    assert client.ok("GET", "/api/v1/nodes/1/releases?page=2&pageSize=1")["items"][0]["releaseId"] == 1
    assert client.code("GET", "/api/v1/nodes/9/releases") == 3001


def test_the_api_makes_a_catch_up(client):
    behind(client.store)
    dry = client.ok("POST", "/api/v1/catch-up", {"dryRun": True, "reason": "level"})
    assert [(plan["payloadOf"], plan["batches"][0]["nodeNames"]) for plan in dry["plans"]] == [
        ({"releaseId": 2, "version": 2}, ["edge-3"])]
    assert [one["nodeName"] for one in dry["leftOut"]] == ["edge-4"]
    made = client("POST", "/api/v1/catch-up", {"strategy": {"maxFailed": 1}})
    assert made.status == 201
    assert [(one["releaseId"], one["catchUpOf"]) for one in made.data["releases"]] == [(3, 2)]
    release = client.ok("GET", "/api/v1/releases/3?view=summary")["release"]
    assert (release["catchUpOf"], release["selection"], release["strategy"]) == (2, {}, {"maxFailed": 1})
    assert client.ok("POST", "/api/v1/catch-up", {}, 201)["releases"] == []
    for body in ({"nodes": [1]}, {"strategy": []}, {"strategy": {"x": 1}}, {"dryRun": 1}, {"reason": 1}):
        assert client.code("POST", "/api/v1/catch-up", body) == 2003


def test_the_api_tells_what_was_done_to_one_object(client):
    add_nodes(client.store, 2)
    client.ok("PATCH", "/api/v1/nodes/2", {"enabled": False})
    rows = client.ok("GET", "/api/v1/audit?object=node%20edge-2")["items"]
    assert [row["action"] for row in rows] == ["node.add", "node.set"]


def test_the_metrics_count_enabled_nodes_by_drift(store):
    behind(store)
    store.nodes.update(4, {"enabled": 0})
    assert [found.nodes for found in store.fleet.counts().drift.values()] == [2, 1, 0, 0]
    assert 'releasectl_nodes_drift{drift="behind"} 1' in rc.metrics_text(rc.Metrics(), store, {})


# -- by the command line ------------------------------------------------------------------------------------

@pytest.fixture
def late(quick, open_store):
    """A command line over nodes of which edge-3 is behind."""
    quick.store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    behind(quick.store)
    return quick


def test_node_list_shows_what_each_node_runs_and_how_far_it_is_off(late):
    assert [line.split()[1:8] for line in late.ok("node", "list").out.splitlines()[:4]] == [
        ["NAME", "ADDRESS", "PROTOCOL", "ENABLED", "STATUS", "RUNS", "DRIFT"],
        ["edge-1", "127.0.1.1:8443", "tasks", "yes", "online", "2", "(v2)"],
        ["edge-2", "127.0.1.2:8443", "tasks", "yes", "online", "2", "(v2)"],
        ["edge-3", "127.0.1.3:8443", "tasks", "yes", "online", "1", "(v1)"]]
    for words, names in ((("--drift", "behind"), ["edge-3", "edge-4"]), (("edge-[12]",), ["edge-1", "edge-2"]),
                         (("--runs", 1, "--sort=-name"), ["edge-4", "edge-3"]), (("--search", "1.4"), ["edge-4"])):
        assert [node["name"] for node in late.ok("node", "list", *words, "--json").json["items"]] == names
    assert late.ok("node", "list", "x*").out == "no such nodes\n"
    late.refused(2, "node", "list", "--label", "x")
    late.refused(2, "node", "list", "--sort", "size")


def test_node_show_tells_all_of_a_node(late):
    late.ok("node", "set", "edge-3", "--label", "region=eu")
    shown = late.ok("node", "show", "edge-3")
    for text in ("node 3: edge-3\n", "127.0.1.3:8443", '{"region":"eu"}', "release 1 (v1) since",
                 "release 2 (v2) since", "behind: release 2 (v2) is for it, `catch-up` sends it", "node.set",
                 "cli:root", "program"):
        assert text in shown.out
    found = late.ok("node", "show", "edge-3", "--json").json
    assert found["node"]["drift"] == "behind"
    assert [one["releaseId"] for one in found["releases"]] == [1]
    assert [(row["action"], row["actor"]) for row in found["changes"]] == [
        ("node.add", "program"), ("node.set", "program"), ("node.set", "program"), ("node.set", "cli:root")]
    assert "does not exist" in late.refused(3, "node", "show", "edge-9")


def test_node_rm_deletes_a_node_that_no_release_names(late):
    assert "disable it instead" in late.refused(3, "node", "rm", "edge-1")
    late.ok("node", "add", "edge-5", "10.0.0.5")
    assert late.ok("node", "rm", "edge-5").out == "node 5: edge-5 deleted\n"
    late.refused(3, "node", "rm", "edge-5")


def test_catch_up_shows_its_plan_and_makes_its_releases(late):
    assert late.ok("catch-up", "--plan").out == """\
BATCH  NODES  MAY FAIL  NAMES
1      1      0         edge-3
version: 3
sends: payload of release 2 (v2)
nodes: 1
1 change against release 1 (v1, 1 of 1 node)
~ $.content: "A" -> "B"
left out: edge-4 is in maintenance
"""
    assert late.ok("catch-up", "--reason", "level", "--soak", "5").out == """\
release 3 (v3): created, 1 node in batches of 1
left out: edge-4 is in maintenance
"""
    assert late.ok("catch-up").out.startswith("no node else is behind\nleft out: edge-4 is in maintenance\n")
    assert late.store.releases.get(3).strategy == '{"soakSec":5}'
    assert late.store.releases.get(3).reason == "level"


def test_check_says_which_nodes_do_not_run_what_they_should(late):
    late.settings["MTLS_ENABLED"] = "0"
    found = {item["subject"]: (item["ok"], item["message"]) for item in late("check", "--json").json["items"]}
    assert found["drift"] == (False, "of 3 nodes: 1 behind, see `node list --sort drift`; edge-3 is behind: "
                                     "release 2 (v2) is for it, `catch-up` sends it")


# -- many nodes at once --------------------------------------------------------------------------------------

def test_what_node_list_prints_is_what_node_import_takes(late, tmp_path, open_store):
    printed = late.ok("node", "list", "--json").out
    other = type(late)(tmp_path)
    other.settings["DATABASE_URL"] = f"sqlite:///{tmp_path}/other.db"
    assert other.ok("node", "import", other.file("nodes.json", printed)).out == "nodes added: 4\n"
    keys = list(rc.NODE_FIELDS)
    assert [[node[key] for key in keys] for node in other.ok("node", "list", "--json").json["items"]] == [
        [node[key] for key in keys] for node in rc.parse_json(printed)["items"]]
    again = other.ok("node", "import", "--update", other.file("nodes.json", printed))
    assert again.out == "nodes added: 0, changed: 0, as they were: 4\n"
    assert "exists already" in other.refused(3, "node", "import", other.file("nodes.json", printed))
    assert "colour is not a known key" in other.refused(
        2, "node", "import", other.file("wrong.json", '[{"name": "x", "mainIp": "10.0.0.1", "colour": "red"}]'))


def test_an_import_with_update_changes_what_is_there_and_adds_the_rest_all_or_none(late):
    lines = late.file("lines", f"edge-1 {ADDRESSES[1]}\nedge-2 {ADDRESSES[0]}\nedge-9 10.0.0.9 9090\n")
    done = late.ok("node", "import", "--update", lines, "--json").json
    assert (done["added"], done["changed"], done["same"]) == (1, 2, 0)  # two nodes that swapped
    assert [(node.name, node.main_ip) for node in late.store.nodes.page().items if node.id in (1, 2, 5)] == [
        ("edge-1", ADDRESSES[1]), ("edge-2", ADDRESSES[0]), ("edge-9", "10.0.0.9")]
    assert drifts(late.store)[:2] == ["unknown", "unknown"]
    before = late.ok("node", "list", "--json").out
    for content, code, message in (
            (f"edge-7 10.0.0.7\nedge-1 {ADDRESSES[2]}\n", 3, "node edge-3 has the address 127.0.1.3:8443 already: "
                                                            "an agent is one node, so edge-1 can't have it too"),
            ("edge-1 10.0.0.1\nedge-1 10.0.0.2\n", 3, "node edge-1 is in the file twice"),
            ("edge-8 10.0.0.8\nedge-1 not/an/address\n", 2, "node 2: ")):
        assert message in late.refused(code, "node", "import", "--update", late.file("lines", content))
        assert late.ok("node", "list", "--json").out == before
    late.store.releases.create(rc.ReleaseRequest(), "anna")
    assert "is part of release 3, which has not ended" in late.refused(
        3, "node", "import", "--update", late.file("lines", "edge-8 10.0.0.8\nedge-1 10.0.0.1\n"))
    assert late.ok("node", "list", "--json").out.count("edge-8") == 0


def test_node_set_takes_many_nodes_by_names_patterns_and_labels(late):
    late.ok("node", "set", "edge-[12]", "edge-4", "--label", "region=eu")
    assert late.ok("node", "set", "--where", "region=eu", "--status", "offline", "--json").json["items"][0]["id"] == 1
    assert [node.status for node in late.store.nodes.page().items] == ["offline", "offline", "online", "offline"]
    late.ok("node", "set", "edge-[13]", "edge-4", "--where", "region=eu", "--status", "online")
    assert [node.status for node in late.store.nodes.page().items] == ["online", "offline", "online", "online"]
    for words, code, message in (
            ((), 2, "no node is chosen"), (("edge-1", "x*"), 3, "node x* does not exist"),
            (("--where", "region=us"), 3, "no node matches region=us (values of region: eu)"),
            (("--where", "region"), 2, "must be K=V"),
            (("edge-3", "--where", "region=eu"), 3, "node edge-3 does not exist with region=eu")):
        assert message in late.refused(code, "node", "set", *words, "--disable")
    for word in ("--rename", "--ip"):
        assert f"{word} is for one node, and 4 are chosen" in late.refused(2, "node", "set", "*", word, "10.0.0.1")
    assert late.ok("node", "set", "edge-1", "--port", "9090", "--json").json["agentPort"] == 9090
    assert all(node.enabled for node in late.store.nodes.page().items)


def test_node_set_compares_no_exact_name_with_every_node(late, monkeypatch):
    taken, takes = [], rc.NodeWords.takes
    monkeypatch.setattr(rc.NodeWords, "takes", lambda words, node: taken.append(node) or takes(words, node))
    late.ok("node", "set", "edge-1", "edge-2", "edge-3", "edge-4", "--disable")
    assert len(taken) == 4  # by all names at once
    assert not any(node.enabled for node in late.store.nodes.page().items)


def test_node_set_gives_a_node_the_labels_named_and_no_others(late):
    late.ok("node", "set", "edge-1", "--label", "region=eu", "--label", "rack=7")
    late.ok("node", "set", "edge-1", "--label", "region=us")
    assert late.store.nodes.named("edge-1").labels == '{"region":"us"}'
    helps = [" ".join(Cli(late.folder)("node", verb, "--help").out.split()) for verb in ("add", "set")]
    assert ["replaces all labels" in text for text in helps] == [False, True]


def test_node_show_follows_a_node_through_its_names_and_takes_no_other_for_it(late):
    late.ok("node", "set", "edge-1", "--rename", "edge-9")
    late.ok("node", "add", "edge-1", "10.0.0.9")
    late.ok("node", "set", "edge-1", "--label", "name=edge-9")
    of = {name: [(row["action"], row["object"]) for row in late.ok("node", "show", name, "--json").json["changes"]]
          for name in ("edge-9", "edge-1")}
    assert of == {"edge-9": [("node.add", "node edge-1"), ("node.set", "node edge-1")],
                  "edge-1": [("node.add", "node edge-1"), ("node.set", "node edge-1")]}


def test_node_show_shows_nothing_of_a_node_that_was_deleted_and_had_its_name(store):
    store.nodes.add("edge-1", ADDRESSES[0], by="bob")
    store.nodes.delete(1, "bob")
    store.nodes.import_all([{"name": "edge-1", "main_ip": ADDRESSES[0]}], "anna")
    assert [(row.action, row.actor) for row in store.audit.of_node(2, "edge-1", 10)] == [("node.import", "anna")]


def twins(store: rc.Store) -> None:
    """Make two enabled nodes of one address, as only a person with SQL can."""
    add_nodes(store, 2)
    sql(store, "UPDATE nodes SET main_ip = ?", ADDRESSES[0])


def test_what_is_not_about_their_address_can_be_changed_of_twins(store):
    twins(store)
    store.nodes.update_all([1, 2], {"labels": '{"a":"b"}'})
    store.nodes.update(1, {"status": "maintenance"})
    rows = [{"name": f"edge-{n}", "main_ip": ADDRESSES[0]} for n in (1, 2)]
    assert len(store.nodes.import_all(rows, update=True).same) == 2
    store.nodes.update(1, {"enabled": 0})
    for make_twins in (lambda: store.nodes.update(1, {"enabled": 1}),
                       lambda: store.nodes.import_all([{**rows[0], "enabled": 1}], update=True)):
        with pytest.raises(rc.AppError, match="an agent is one node") as caught:
            make_twins()
        assert caught.value.code == 3002


def test_a_new_name_that_is_in_the_file_twice_is_told_as_that(store):
    rows = [{"name": "edge-1", "main_ip": address} for address in ADDRESSES[:2]]
    for update in (True, False):
        with pytest.raises(rc.AppError, match="node edge-1 is in the file twice"):
            store.nodes.import_all(rows, update=update)


def test_node_show_names_the_import_that_brought_the_node(late):
    late.ok("node", "import", late.file("lines", "edge-8 10.0.0.8\nedge-80 10.0.0.80\n"))
    changes = late.ok("node", "show", "edge-8", "--json").json["changes"]
    assert [(row["action"], row["actor"], row["after"]) for row in changes] == [
        ("node.import", "cli:root", {"name": "edge-8"})]


# -- with agents ----------------------------------------------------------------------------------------

def test_a_node_that_was_in_maintenance_is_brought_level_by_a_catch_up(world):
    world.nodes(3)
    new_release(world.store, payload={"n": 1})
    world.drain()
    world.store.nodes.update(3, {"status": "maintenance"})
    new_release(world.store, payload={"n": 2})
    world.drain()
    world.store.nodes.update(3, {"status": "online"})
    assert drifts(world.store) == ["none", "none", "behind"]
    made, _ = world.store.releases.catch_up("anna")
    world.drain()
    assert world.store.releases.get(made[0].release.id).status == "success"
    assert drifts(world.store) == ["none"] * 3
    assert world.agent(3).runs[-1]["payloadSha256"] == payload_sha256({"n": 2})

