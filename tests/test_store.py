"""The tables, on both engines: creation, the claim and its fence, conditional writes, migrations."""
from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
import subprocess
import threading
from typing import Any
from unittest import mock

import pytest
from lab import ROOT, add_nodes, assert_books_balance, eventually, new_release, sql, statuses

import releasectl as rc

POLICY = rc.Policy(2, 600.0, 60.0, 2.0)


def now_of(store: rc.Store) -> rc.Moment:
    return rc.Moment(store.clock.wall(), store.clock.elapsed())


def step(store: rc.Store, claim: rc.Claim, **more) -> rc.Decision:
    """Read, decide and commit once, as a driver does."""
    now = now_of(store)
    release, nodes = store.claims.read_with_nodes(claim)
    decision = rc.decide(rc.Situation(release, rc.NodeIndex(rc.recover(n, now, POLICY) for n in nodes), now, POLICY,
                                      slots=100, **more))
    store.claims.commit(claim, release, decision, now, "test")
    return decision


def finish(store: rc.Store, claim: rc.Claim, node_id: int, end: rc.NodeEnd = rc.NodeEnd("success")) -> None:  # noqa: B008
    """Commit the end of one running node."""
    now = now_of(store)
    release, nodes = store.claims.read_with_nodes(claim)
    nodes = [rc.recover(n, now, POLICY)._replace(end=end if n.node_id == node_id else None)
             for n in nodes]
    decision = rc.decide(rc.Situation(release, rc.NodeIndex(nodes), now, POLICY, slots=100))
    store.claims.commit(claim, release, decision, now, "test")



# -- rule 1: creation --------------------------------------------------------------------------

@pytest.mark.parametrize(("node_id", "before", "after"), [
    (None, "success", "running"), (None, "pending", "success"), (1, "failed", "running"), (1, "skipped", "pending")])
def test_a_change_of_a_status_that_is_no_transition_is_not_written(store, node_id, before, after):
    add_nodes(store, 1)
    release = new_release(store)
    with pytest.raises(RuntimeError, match=f"no status {after} after {before}"), \
            store.database.transaction(write=True) as tx:
        rc.add_events(tx, tx.now(), "x", [rc.NewEvent(release.id, "changed", before, after, node_id=node_id)])
    assert [event.event for event in store.releases.events(release.id)] == ["created"]


def test_rule_1_versions_grow_and_the_nodes_are_those_enabled_and_online_by_id(store):
    nodes = add_nodes(store, 5)
    store.nodes.update(nodes[1].id, {"enabled": 0})
    store.nodes.update(nodes[2].id, {"status": "maintenance"})
    first, batches, *_ = store.releases.create(rc.ReleaseRequest(reason="why"), "anna")
    second = new_release(store)
    assert (first.version, second.version) == (1, 2)
    assert batches == [[nodes[0].id], [nodes[3].id, nodes[4].id]]
    assert (first.status, first.total_nodes, first.reason) == ("pending", 3, "why")
    assert [(e.event, e.actor, e.to_status) for e in store.releases.events(first.id)] == [
        ("created", "anna", "pending")]


def test_rule_1_the_next_version_is_one_above_the_highest_also_of_rows_by_hand(store):
    add_nodes(store, 1)
    sql(store, "INSERT INTO release_tasks (version) VALUES (?)", 2**53 - 1)
    assert new_release(store).version == 2**53
    with pytest.raises(rc.AppError, match="versions are used up"):
        new_release(store)


def test_rule_1_without_an_online_node_nothing_is_written(store):
    with pytest.raises(rc.AppError, match="no online nodes") as refused:
        new_release(store)
    assert refused.value.code == 3003
    assert store.releases.page().total == 0


def test_rule_1_a_payload_of_another_version_leaves_nothing_half_written(store):
    add_nodes(store, 1)
    with pytest.raises(rc.AppError, match="the release is version 1"):
        new_release(store, payload={"version": 7})
    assert store.releases.page().total == 0


def test_rule_1_releases_created_at_once_get_versions_of_their_own(store, database_url, open_store):
    add_nodes(store, 2)
    stores = [open_store(database_url) for _ in range(4)]
    threads = [threading.Thread(target=lambda s=s: [new_release(s) for _ in range(5)]) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.version for r in store.releases.page(size=100).items) == list(range(1, 21))


def test_section_2_an_insert_that_names_only_columns_without_default_works(store):
    sql(store, "INSERT INTO nodes (name, main_ip) VALUES ('by-hand', '10.0.0.9')")
    sql(store, "INSERT INTO release_tasks (version) VALUES (5)")
    node, release = store.nodes.named("by-hand"), store.releases.page().items[0]
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (?, ?, 1)", release.id, node.id)
    sql(store, "INSERT INTO release_events (release_task_id, event) VALUES (?, 'note')", release.id)
    assert (node.agent_port, node.agent_protocol, node.enabled, node.status) == (8443, "tasks", 1, "online")
    assert (release.type, release.target, release.status, release.payload) == ("apply_config", "cdn", "pending", "{}")
    assert rc.epoch_of(node.created_at) == pytest.approx(rc.epoch_of(release.created_at), abs=60)
    store.claims.claim(release.id, "a", 30)
    assert store.releases.get(release.id).total_nodes == 1


@pytest.mark.parametrize("statement", [
    "UPDATE release_tasks SET status = 'done'", "UPDATE release_task_nodes SET status = 'ok'",
    "UPDATE nodes SET agent_port = 0", "UPDATE nodes SET agent_protocol = 'ssh'", "UPDATE nodes SET status = 'up'",
    "UPDATE release_task_nodes SET error_kind = 'odd'", "UPDATE release_tasks SET version = 0",
    "UPDATE release_task_nodes SET node_id = 999", "UPDATE release_tasks SET retry_of = 999",
    "DELETE FROM nodes", "UPDATE release_task_nodes SET batch = 0"])
def test_section_2_the_tables_refuse_words_and_references_that_are_not_the_contracts(store, statement):
    add_nodes(store, 1)
    new_release(store)
    with pytest.raises(rc.DatabaseError):
        sql(store, statement)


# -- the claim ---------------------------------------------------------------------------------

def test_rule_2_whoever_claims_second_leaves_it_alone(store):
    add_nodes(store, 1)
    release = new_release(store)
    assert store.claims.claim(release.id, "a", 30) is not None
    assert store.claims.claim(release.id, "b", 30) is None
    assert store.releases.get(release.id).claim_owner == "a"


def test_rule_2_many_that_claim_at_once_only_one_has_it(store, database_url, open_store):
    add_nodes(store, 1)
    stores = [open_store(database_url) for _ in range(6)]
    for _ in range(5):
        release = new_release(store)
        won = []
        threads = [threading.Thread(target=lambda s=s, r=release, w=won: w.append(s.claims.claim(r.id, "x", 30)))
                   for s in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([claim for claim in won if claim]) == 1
        store.releases.act("cancel", release.id, "test")


def test_rule_2_the_lowest_version_of_a_target_goes_first(store):
    add_nodes(store, 2)
    first, second = new_release(store, node_ids=[1]), new_release(store, node_ids=[1])
    other = new_release(store, target="dns", node_ids=[2])
    assert store.claims.scan() == ([first.id, other.id], [])
    assert store.claims.claim(second.id, "a", 30) is None


def two_on_one_address(store, protocol: str = "tasks") -> list[int]:
    """Return two releases for nodes of their own, the second of which a person moved to the first one's address."""
    add_nodes(store, 2, protocol)
    ids = [new_release(store, target=target, node_ids=[number], payload={"websites": []}).id
           for number, target in enumerate(("cdn", "dns"), 1)]
    assert store.claims.scan() == (ids, [])
    sql(store, "UPDATE release_task_nodes SET main_ip = ? WHERE release_task_id = ?", "::ffff:127.0.1.1", ids[1])
    return ids


def test_rule_2_no_address_has_tasks_of_two_releases_in_flight(store):
    ids = two_on_one_address(store)
    claims = [store.claims.claim(i, "a", 30) for i in ids]
    step(store, claims[0])
    assert store.claims.dispatch_blockers(ids[1]).busy == frozenset([("127.0.1.1", 8443)])
    with pytest.raises(rc.StateMoved):
        step(store, claims[1])
    assert statuses(store, ids[1]) == ["pending"]
    assert step(store, claims[1], busy=store.claims.dispatch_blockers(ids[1]).busy).sends == ()


def test_rule_2_an_address_held_by_a_lost_request_of_another_release_is_busy(store):
    ids = two_on_one_address(store, "execute")
    claim = store.claims.claim(ids[0], "a", 30)
    step(store, claim)
    finish(store, claim, 1, rc.NodeEnd("failed", "timeout", "no answer", "no answer", 30.0))
    assert store.claims.dispatch_blockers(ids[1]).busy == frozenset([("127.0.1.1", 8443)])


def test_rule_9_a_claim_that_ran_out_is_taken_over_under_a_higher_number(store):
    add_nodes(store, 1)
    release = new_release(store)
    first = store.claims.claim(release.id, "a", 0.05)
    second = eventually(lambda: store.claims.claim(release.id, "b", 30))
    assert second.fence > first.fence
    assert not store.claims.renew(first, 30)
    assert store.claims.renew(second, 30)


def test_rule_9_a_process_that_wakes_up_late_changes_nothing(store):
    add_nodes(store, 2)
    release = new_release(store)
    old = store.claims.claim(release.id, "a", 0.05)
    stale, nodes = store.claims.read_with_nodes(old)
    new = eventually(lambda: store.claims.claim(release.id, "b", 30))
    now = now_of(store)
    with pytest.raises(rc.ClaimLost):
        store.claims.commit(old, stale, rc.decide(rc.Situation(stale, rc.NodeIndex(nodes), now, POLICY)), now, "a")
    store.claims.drop(old)
    assert statuses(store, release.id) == ["pending", "pending"]
    assert store.releases.get(release.id).claim_fence == new.fence
    assert store.releases.get(release.id).claim_expires_at is not None


def test_a_claim_that_was_handed_back_is_free_at_once_and_can_t_be_used(store):
    add_nodes(store, 1)
    release = new_release(store)
    claim = store.claims.claim(release.id, "a", 30)
    store.claims.drop(claim)
    assert not store.claims.renew(claim, 30)
    with pytest.raises(rc.ClaimLost):
        store.claims.read(claim)
    assert store.claims.claim(release.id, "b", 30) is not None


# -- writing -----------------------------------------------------------------------------------

def test_rule_7_counters_equal_the_rows_at_every_commit(store):
    nodes = add_nodes(store, 3)
    release = new_release(store)
    claim = store.claims.claim(release.id, "a", 30)
    for node in nodes:
        step(store, claim)
        assert_books_balance(store, release.id)
        finish(store, claim, node.id)
        assert_books_balance(store, release.id)
    assert store.releases.get(release.id).status == "success"
    assert store.releases.get(release.id).claim_expires_at is None


def noted_statements() -> Any:
    """Note the statements from now on: see has_counted()."""
    return mock.patch.object(rc.Transaction, "execute", autospec=True, side_effect=rc.Transaction.execute)


def has_counted(execute: Any) -> bool:
    """Return whether a counter was set by counting rows since this was asked last."""
    counted = any("success_nodes = (SELECT COUNT" in call.args[1] for call in execute.call_args_list)
    execute.reset_mock()
    return counted


def large_release(store: rc.Store, monkeypatch: pytest.MonkeyPatch) -> rc.Claim:
    """Claim a release whose 9 nodes run, and are so many that each fourth end counts them."""
    monkeypatch.setattr(rc, "COUNTED_EVERY", 4)
    add_nodes(store, 9)
    claim = store.claims.claim(new_release(store, strategy={"batches": [9]}).id, "a", 30)
    assert claim is not None
    step(store, claim)
    return claim


def test_rule_7_a_large_release_adds_what_each_commit_ended_and_counts_now_and_then(store, monkeypatch):
    claim = large_release(store, monkeypatch)
    counted = []
    with noted_statements() as execute:
        for node_id in range(1, 10):
            finish(store, claim, node_id, rc.NodeEnd("failed" if node_id % 3 == 0 else "success"))
            counted.append(has_counted(execute))
            assert_books_balance(store, claim.release_id)
    assert counted == [False, False, False, True, False, False, False, True, True]  # the last one ends the release
    assert store.releases.get(claim.release_id).status == "failed"


def test_a_large_release_counts_a_row_that_somebody_turned_by_hand_when_no_node_changes(store, monkeypatch):
    claim = large_release(store, monkeypatch)
    sql(store, "UPDATE release_task_nodes SET status = 'success' WHERE node_id = 9")
    step(store, claim)
    assert store.releases.get(claim.release_id).success_nodes == 1


def test_a_large_release_counts_where_its_rows_were_read_anew(store, monkeypatch):
    claim = large_release(store, monkeypatch)
    sql(store, "UPDATE release_task_nodes SET status = 'success' WHERE node_id = 9")
    with mock.patch.object(store.claims, "commit", functools.partial(store.claims.commit, counts=True)):
        finish(store, claim, 2)
    assert store.releases.get(claim.release_id).success_nodes == 2


def test_the_addresses_of_what_ended_make_room_and_a_full_memory_costs_what_does_not_fit(store, monkeypatch):
    monkeypatch.setattr(rc, "MAX_MASK_BYTES", 3)
    add_nodes(store, 2)
    made = [new_release(store, target=f"t{number}") for number in range(4)]
    reads = []
    value = rc.Transaction.value

    def noted(tx: rc.Transaction, statement: str, *params: object) -> object:
        reads.extend(params if statement.endswith("FROM release_task_nodes WHERE release_task_id = ?") else ())
        return value(tx, statement, *params)
    monkeypatch.setattr(rc.Transaction, "value", noted)
    for _ in range(2):
        store.claims.scan()
    assert reads == [made[3].id] * 2, "not all of them anew"
    store.releases.act("cancel", made[1].id, "anna", "")
    reads.clear()
    for _ in range(2):
        store.claims.scan()
    assert reads in ([], [made[3].id])


def test_one_event_for_each_change_in_order_with_who_did_it(store):
    add_nodes(store, 2)
    release = new_release(store)
    claim = store.claims.claim(release.id, "owner", 30)
    step(store, claim)
    finish(store, claim, 1, rc.NodeEnd("failed", "agent_failed", "boom", "boom\nwhole text"))
    found = [(e.node_name, e.from_status, e.to_status, e.actor, e.detail) for e in store.releases.events(release.id)]
    assert found == [
        ("", "", "pending", "test", ""), ("", "pending", "running", "owner", ""),
        ("edge-1", "pending", "running", "test", ""), ("edge-1", "running", "failed", "test", "boom\nwhole text"),
        ("edge-2", "pending", "skipped", "test", ""),
        ("", "running", "failed", "test", "stopped by node edge-1 in batch 1: boom")]


def test_events_come_in_pages(store):
    add_nodes(store, 1)
    release = new_release(store)
    store.releases.act("pause", release.id, "test")
    events = store.releases.events(release.id)
    assert [e.event for e in events] == ["created", "paused"]
    assert store.releases.events(release.id, after=events[0].id) == events[1:]
    assert store.releases.events(release.id, limit=1) == events[:1]


def test_a_commit_on_a_release_that_was_paused_meanwhile_writes_nothing(store):
    add_nodes(store, 1)
    release = new_release(store)
    claim = store.claims.claim(release.id, "a", 30)
    read, nodes = store.claims.read_with_nodes(claim)
    store.releases.act("pause", release.id, "anna")
    now = now_of(store)
    with pytest.raises(rc.StateMoved):
        store.claims.commit(claim, read, rc.decide(rc.Situation(read, rc.NodeIndex(nodes), now, POLICY)), now, "a")
    assert statuses(store, release.id) == ["pending"]


@pytest.mark.parametrize("table", ["release_task_nodes", "release_tasks", "release_events"])
def test_a_commit_that_fails_halfway_leaves_nothing(store, table, monkeypatch):
    add_nodes(store, 1)
    release = new_release(store)
    claim = store.claims.claim(release.id, "a", 30)
    read, nodes = store.claims.read_with_nodes(claim)
    now = now_of(store)
    decision = rc.decide(rc.Situation(read, rc.NodeIndex(nodes), now, POLICY))
    bad: dict[str, Any] = {"error_kind": "odd"} if table == "release_task_nodes" else {}
    changes = tuple(c._replace(after=c.after._replace(**bad)) for c in decision.changes)
    decision = decision._replace(changes=changes, error_msg="x" * (300 if table == "release_tasks" else 5))
    if table == "release_events":
        monkeypatch.setitem(rc.NODE_EVENTS, "running", None)
    with pytest.raises(rc.DatabaseError):
        store.claims.commit(claim, read, decision, now, "a")
    assert statuses(store, release.id) == ["pending"]
    assert len(store.releases.events(release.id)) == 2


# What the driver alone knows begins with next_op; the others are fixed when the release is made.
DECIDED = sorted({*rc.ReleaseNode._fields[:rc.ReleaseNode._fields.index("next_op")]} - {
    "node_id", "name", "main_ip", "agent_port", "agent_protocol", "batch", "accepted", "last_version", "labels"})
COLUMNS = {"waited_s": "waited_sec", "stored_reached": "reached"}


def committed(store: rc.Store) -> tuple[rc.Claim, rc.Decision]:
    """Commit a decision that changes each field of a node and of its release that a decision can change."""
    add_nodes(store, 2)
    claim = store.claims.claim(new_release(store).id, "a", 30)
    assert claim is not None
    release, nodes = store.claims.read_with_nodes(claim)
    after = nodes[0]._replace(
        status="running", task_id="task", attempts=7, error_kind="http", error_msg="what", hold_until="2030",
        hold_clock="boot 1", started_at="2031", finished_at="2032", started_clock="boot 2", waited_s=1.2345678,
        stored_reached=0)
    assert all(getattr(after, name) != getattr(nodes[0], name) for name in DECIDED)
    decision = rc.Decision((rc.NodeChange(nodes[0], after),), "paused", "why", "error", (), 0.0, rc.NodeIndex(nodes),
                           passed_batch=3, soak_until="2033", soak_clock="boot 3")
    store.claims.commit(claim, release, decision, now_of(store), "a")
    return claim, decision


def test_all_that_a_decision_changes_is_written(store):
    claim, decision = committed(store)
    release, nodes = store.claims.read_with_nodes(claim)
    assert nodes[0]._replace(last_version=0) == decision.changes[0].after
    names = {*rc.Decision._fields} & {*release._fields}
    assert len(names) == 6
    assert {name: getattr(release, name) for name in names} == {name: getattr(decision, name) for name in names}


@pytest.mark.parametrize("name", DECIDED)
def test_a_commit_of_which_one_column_is_missing_did_not_take_place(store, name):
    claim, decision = committed(store)
    assert store.claims.was_written(claim, decision)
    other = {"status": "success", "error_kind": "tls", "stored_reached": 1}.get(name, 9)
    sql(store, f"UPDATE release_task_nodes SET {COLUMNS.get(name, name)} = ? WHERE node_id = 1",
        str(other) if isinstance(getattr(decision.changes[0].after, name), str) else other)
    assert not store.claims.was_written(claim, decision)


@pytest.mark.parametrize("name", ["status", "status_reason", "error_msg", "passed_batch", "soak_until", "soak_clock"])
def test_a_commit_without_nodes_is_known_by_every_column_of_its_release(store, name):
    claim, decision = committed(store)
    decision = decision._replace(changes=())
    assert store.claims.was_written(claim, decision)
    other = {"status": "running", "passed_batch": 9}.get(name, "9")
    sql(store, f"UPDATE release_tasks SET {name} = ? WHERE id = 1", other)
    assert not store.claims.was_written(claim, decision)


@pytest.mark.slow
def test_thousands_of_nodes_are_written_in_one_transaction(store):
    store.nodes.import_all([{"name": f"n-{n}", "main_ip": f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"}
                            for n in range(2500)])
    release = new_release(store)
    claim = store.claims.claim(release.id, "a", 60)
    step(store, claim)
    store.releases.act("cancel", release.id, "test")
    finish(store, claim, 1)
    assert store.releases.get(release.id).skipped_nodes == 2499
    assert_books_balance(store, release.id)


# -- verbs ---------------------------------------------------------------------------------------

def test_a_pending_release_that_is_cancelled_is_at_its_end_at_once(store):
    add_nodes(store, 2)
    release = new_release(store)
    assert store.releases.act("cancel", release.id, "anna", "wrong one").status == "cancelled"
    assert statuses(store, release.id) == ["skipped", "skipped"]
    assert [(e.event, e.detail) for e in store.releases.events(release.id) if e.node_id is None] == [
        ("created", ""), ("cancelling", "wrong one"), ("cancelled", "0 of 2 nodes updated")]
    assert_books_balance(store, release.id)


def test_a_release_that_was_paused_before_it_started_waits_again_after_resume(store):
    add_nodes(store, 1)
    release = new_release(store)
    store.releases.act("pause", release.id, "test")
    assert store.claims.scan() == ([], [])
    assert store.releases.act("resume", release.id, "test").status == "pending"
    assert store.claims.scan() == ([release.id], [])


def fail_first(store: rc.Store, **fields) -> rc.Release:
    """Run a release whose first node fails."""
    release = new_release(store, **fields)
    claim = store.claims.claim(release.id, "a", 30)
    assert claim
    step(store, claim)
    finish(store, claim, 1, rc.NodeEnd("failed", "agent_failed", "boom", "boom"))
    return store.releases.get(release.id)


def succeed(store: rc.Store, **fields) -> rc.Release:
    """Run a release whose nodes all succeed."""
    release = new_release(store, **fields)
    claim = store.claims.claim(release.id, "a", 30)
    assert claim
    step(store, claim)
    while not store.releases.get(release.id).is_terminal:
        running = [n.node_id for n in store.releases.with_nodes(release.id)[1] if n.status == "running"]
        finish(store, claim, running[0])
    return store.releases.get(release.id)


def test_rule_10_retry_makes_a_new_release_for_what_was_failed_or_skipped(store):
    add_nodes(store, 3)
    old = fail_first(store, payload={"a": 1, "version": 1})
    new, batches, *_ = store.releases.retry(old.id, "anna")
    assert (new.version, new.retry_of, new.total_nodes) == (2, old.id, 3)
    assert new.payload == '{"a":1,"version":2}'
    assert batches == [[1], [2, 3]]
    assert store.releases.get(old.id) == old


def test_rule_10_retry_leaves_out_what_succeeded_and_what_is_not_online(store):
    add_nodes(store, 4)
    release = new_release(store)
    claim = store.claims.claim(release.id, "a", 30)
    assert claim
    step(store, claim)
    finish(store, claim, 1)
    finish(store, claim, 2, rc.NodeEnd("failed", "agent_failed", "boom", "boom"))
    finish(store, claim, 3)
    finish(store, claim, 4, rc.NodeEnd("failed", "agent_failed", "boom", "boom"))
    store.nodes.update(4, {"status": "maintenance"})
    assert store.releases.retry(release.id, "anna")[1] == [[2]]


def test_rule_10_rollback_sends_the_newest_successful_payload_to_the_nodes_it_touched(store):
    add_nodes(store, 3)
    succeed(store, payload={"old": 0})
    good = succeed(store, payload={"good": 1})
    succeed(store, payload={"else": 1}, target="dns")
    bad = fail_first(store, payload={"bad": 1})
    new, batches, *_ = store.releases.rollback(bad.id, "anna")
    assert (new.version, new.rollback_of, new.payload) == (5, bad.id, good.payload)
    assert batches == [[1]]
    assert store.releases.get(bad.id) == bad._replace(rollback_id=5, rollback_status="pending")


def test_rule_10_rollback_without_an_older_success_says_so(store):
    add_nodes(store, 1)
    with pytest.raises(rc.AppError, match="nothing to roll back to"):
        store.releases.rollback(fail_first(store).id, "anna")


@pytest.mark.parametrize("verb", ["retry", "rollback"])
def test_rule_10_only_for_a_release_that_is_at_its_end(store, verb):
    add_nodes(store, 1)
    with pytest.raises(rc.AppError, match="is pending(; only | and changed no node)"):
        getattr(store.releases, verb)(new_release(store).id, "anna")


# -- the database itself ---------------------------------------------------------------------------

def test_the_schema_is_made_once_by_whoever_comes_first(database_url):
    made = []

    def migrate() -> None:
        with contextlib.closing(rc.Database(database_url)) as database:
            made.append(database.migrate())

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = len(rc.schema_steps())
    assert sorted(made) == [(0, last), *[(last, last)] * 3]


def test_an_older_database_is_brought_up_to_date_step_by_step(store, monkeypatch):
    add_nodes(store, 1)
    known = len(rc.schema_steps())
    steps = (*rc.schema_steps(), ("CREATE TABLE extra (id INTEGER PRIMARY KEY AUTOINCREMENT, a TEXT)",
                                  f"INSERT INTO schema_version (version) VALUES ({known + 1})"))
    monkeypatch.setattr(rc, "schema_steps", lambda: steps)
    with pytest.raises(rc.DatabaseError, match=f"has schema {known}, this program needs {known + 1}: "
                                               "run `releasectl migrate`"):
        store.database.require_schema()
    assert store.database.migrate() == (known, known + 1)
    assert store.database.migrate() == (known + 1, known + 1)
    assert store.nodes.get(1).name == "edge-1"


def test_a_step_that_fails_leaves_the_database_as_it_was(store, monkeypatch):
    known = len(rc.schema_steps())
    steps = (*rc.schema_steps(), ("CREATE TABLE extra (a TEXT)", "CREATE TABLE nodes (a TEXT)"))
    monkeypatch.setattr(rc, "schema_steps", lambda: steps)
    for _ in range(2):
        with pytest.raises(rc.DatabaseError, match="nodes"):
            store.database.migrate()
    assert store.database.schema_version() == known


def test_a_database_newer_than_the_program_is_refused(store):
    sql(store, "INSERT INTO schema_version (version) VALUES (99)")
    for call in (store.database.require_schema, store.database.migrate):
        with pytest.raises(rc.DatabaseError, match="schema 99, newer than this program's"):
            call()


def test_a_database_of_another_program_is_refused(database_url, open_store):
    database = rc.Database(database_url)
    with database.transaction(write=True, create=True) as tx:
        tx.execute("CREATE TABLE customers (id INTEGER)")
    with pytest.raises(rc.DatabaseError, match="holds other tables"):
        database.migrate()
    database.close()


def test_schema_sql_works_as_it_stands_in_the_sqlite3_shell(tmp_path):
    if not shutil.which("sqlite3"):
        pytest.skip("left out: the sqlite3 shell")
    with open(ROOT / "schema.sql", "rb") as schema:
        subprocess.run(["sqlite3", str(tmp_path / "new.db")], stdin=schema, check=True,
                       # the shell is the system's: it does not run with the old library under test
                       env={name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"})
    database = rc.Database(f"sqlite:///{tmp_path}/new.db")
    database.require_schema()
    database.close()


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: path.write_bytes(b"this is not a database, whatever its name says" * 20), "is not an SQLite file"),
    (lambda path: path.mkdir(), "can't be opened"),
])
def test_a_file_that_is_no_database_is_told(tmp_path, make, message):
    path = tmp_path / "x.db"
    make(path)
    database = rc.Database(f"sqlite:///{path}")
    with pytest.raises(rc.DatabaseError, match=message):
        database.migrate()


def test_a_folder_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(rc.DatabaseError, match="folder .*/nowhere does not exist"):
        rc.Database(f"sqlite:///{tmp_path}/nowhere/x.db").migrate()


def test_a_deleted_sqlite_file_takes_no_writes_unseen(sqlite_url, open_store, tmp_path):
    store = open_store(sqlite_url)
    add_nodes(store, 1)
    (tmp_path / "test.db").unlink()
    with pytest.raises(rc.DatabaseError, match="does not exist"):
        store.nodes.page()


def test_a_lock_that_lasts_is_told_in_one_line(sqlite_url, open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(rc, "BUSY_TIMEOUT_S", 0.1)
    store = open_store(sqlite_url)
    other = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(rc.DatabaseError, match="is locked by another process"):
        add_nodes(store, 1)
    other.close()
    add_nodes(store, 1)


@pytest.mark.parametrize("statement", [
    "INSERT INTO nodes (name, main_ip) VALUES ('a', '127.0.0.9'), ('b', '127.0.0.9'), ('a', '127.0.0.9')",
    "SELECT abs(id - 9223372036854775807 - 2) FROM nodes ORDER BY id"])
def test_a_failed_statement_locks_nobody_out_while_its_error_lives(sqlite_url, open_store, monkeypatch, statement):
    monkeypatch.setattr(rc, "BUSY_TIMEOUT_S", 0.1)
    store = open_store(sqlite_url)
    [node] = add_nodes(store, 1)

    def fail() -> None:
        with store.database.transaction(write=True) as tx:
            tx.execute("UPDATE nodes SET name = 'x'")
            tx.rows(statement) if statement.startswith("SELECT") else tx.execute(statement)

    with pytest.raises(rc.DatabaseError) as error:
        fail()
    with store.database.transaction(write=True) as tx:
        assert tx.value("SELECT name FROM nodes") == node.name
    assert error.value.__cause__.__traceback__  # it is alive, with all that it holds


def test_sqlite_is_set_so_that_what_was_committed_survives_a_power_cut(sqlite_url, open_store):
    store = open_store(sqlite_url)
    with store.database.transaction() as tx:
        assert [tx.value(f"PRAGMA {name}") for name in ("journal_mode", "synchronous", "foreign_keys")] == ["wal", 2, 1]


def test_no_statement_of_a_tick_scans_all_node_rows(sqlite_url, open_store):
    """Look at the plan of every statement that runs between a claim and the end of a release."""
    store = open_store(sqlite_url)
    add_nodes(store, 3)
    asked = {}
    execute = rc.Transaction.execute

    def spy(self, statement, *params):
        asked[statement] = params
        return execute(self, statement, *params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rc.Transaction, "execute", spy)
        store.claims.scan()
        release = succeed(store)
        store.claims.dispatch_blockers(release.id)
        store.releases.page()
        store.releases.act("cancel", new_release(store).id, "test")
    assert len(asked) > 20
    with store.database.transaction() as tx:
        for statement, params in asked.items():
            if statement.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
                plan = "\n".join(row[3] for row in tx.rows("EXPLAIN QUERY PLAN " + statement, *params))
                scans = [line for line in plan.splitlines() if line.startswith("SCAN") and "USING" not in line]
                assert not [line for line in scans if line.split()[-1] in ("n", "release_task_nodes")], plan
                # nor all that are pending, where it names a few
                assert "node_id IN (?" not in statement or "status=?" not in plan, plan


def test_postgresql_cuts_a_connection_and_the_next_transaction_takes_a_new_one(new_postgres_url, open_store):
    url = new_postgres_url()
    store, other = open_store(url), open_store(url)
    add_nodes(store, 1)
    with other.database.transaction() as tx:
        tx.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()")
    assert store.nodes.page().total == 1


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
def test_every_driver_does_the_same(new_postgres_url, open_store, monkeypatch, driver):
    pytest.importorskip(driver)
    monkeypatch.setenv("RELEASECTL_PG_DRIVER", driver)
    store = open_store(new_postgres_url())
    assert store.database.engine.driver.__name__.startswith(driver)
    add_nodes(store, 2)
    release = new_release(store, reason="100 % sure? yes")
    claim = store.claims.claim(release.id, "a", 30)
    assert claim
    step(store, claim)
    finish(store, claim, 1)
    finish(store, claim, 2)
    assert store.releases.get(release.id).status == "success"
    with pytest.raises(rc.DatabaseError, match="agent_port"):
        sql(store, "UPDATE nodes SET agent_port = 0")
    assert store.nodes.page().total == 2


def test_health_is_a_real_committed_write(store):
    store.state.check_write()
    with store.database.transaction() as tx:
        assert rc.epoch_of(tx.value("SELECT at FROM health_probe")) == pytest.approx(store.clock.wall(), abs=60)


@pytest.mark.parametrize(("pragma", "message"), [("PRAGMA query_only = ON", "read-only"),
                                                 ("PRAGMA max_page_count = 1", "disk is full")])
def test_a_full_disk_or_a_read_only_file_is_told_and_nothing_is_half_written(
        sqlite_url, open_store, monkeypatch, pragma, message):
    store = open_store(sqlite_url)
    add_nodes(store, 20)
    store.database.close()
    connect = rc.SqliteEngine.connect

    def limited(engine, create):
        connection = connect(engine, create)
        connection.execute(pragma)
        return connection

    def write_until_it_fails():
        while True:
            new_release(store)
            store.state.check_write()

    with monkeypatch.context() as patch:
        patch.setattr(rc.SqliteEngine, "connect", limited)
        with pytest.raises(rc.DatabaseError, match=message):
            write_until_it_fails()
        store.database.close()
    for release in store.releases.page(size=100).items:
        assert statuses(store, release.id) == ["pending"] * 20
        assert len(store.releases.events(release.id)) == 1
