"""A success is a success: what is said of a node is what happened there.

Each test is a way in which releases of this and of other tools said "success" for nodes that never
ran them, or said something else that was not so.
"""
from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from fake_agent import payload_sha256
from lab import (
    ADDRESSES,
    FOREVER_MS,
    SITES,
    WaitingClient,
    add_nodes,
    beside,
    eventually,
    new_release,
    nodes_of,
    outcomes,
    sql,
    statuses,
)

import releasectl as rc


def succeed(store: rc.Store, **fields) -> rc.Release:
    """Return a release that ended as a success, without agents."""
    made = new_release(store, **fields)
    sql(store, "UPDATE release_tasks SET status = 'success', started_at = created_at, finished_at = created_at "
               "WHERE id = ?", made.id)
    sql(store, "UPDATE release_task_nodes SET status = 'success', attempts = 1 WHERE release_task_id = ?", made.id)
    return made


# -- a new or restored database beside agents that remember -------------------------------------------------

@pytest.fixture
def another_database(world, tmp_path, open_store):
    """A function that gives a second, empty database with the world's nodes in it."""
    def make() -> rc.Store:
        store = open_store(f"sqlite:///{tmp_path}/another.db")
        for node in world.store.nodes.page().items:
            store.nodes.add(node.name, node.main_ip, node.agent_port, node.agent_protocol)
        return store
    return make


def drain(world, store: rc.Store, **overrides) -> None:
    world._new_executor(store, world.settings(**overrides)).drain()


def test_rule_1_the_first_release_of_a_new_database_is_no_success_by_what_an_agent_remembers(world, another_database):
    world.nodes(1, "execute")
    new_release(world.store, payload={"websites": [{"id": "old"}]})
    world.drain()
    store = another_database()
    release = new_release(store, payload={"websites": [{"id": "new"}]})
    drain(world, store)
    assert outcomes(store, release) == [("failed", "rejected", "the agent is already at version 1")]
    assert world.agent(1).content == payload_sha256({"websites": [{"id": "old"}]})


def test_section_1_the_ids_of_two_databases_differ_and_those_of_one_release_do_not(world, another_database):
    world.nodes(2)
    first, second = new_release(world.store), new_release(another_database())
    assert first.version == second.version == 1
    assert first.tag != second.tag
    world.drain()
    assert [n.task_id for n in nodes_of(world.store, first)] == [
        f"apply_config_{address}_1_{first.tag}" for address in ADDRESSES[:2]]


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_rule_1_first_version_leads_a_new_database_past_what_agents_have(world, another_database, protocol):
    world.nodes(1, protocol)
    for number in range(3):
        new_release(world.store, payload={"websites": [], "mark": number})
    world.drain()
    store = another_database()
    assert store.releases.set_first_version(4) == 4
    release = new_release(store, payload={"websites": [], "mark": "new"})
    drain(world, store)
    assert (release.version, store.releases.get(release.id).status) == (4, "success")
    assert world.agent(1).content == payload_sha256({"websites": [], "mark": "new"})


def test_rule_1_first_version_never_lowers_anything(store):
    add_nodes(store, 1)
    assert store.releases.set_first_version(100) == 100
    assert store.releases.set_first_version(7) == 100
    assert new_release(store).version == 100
    assert store.releases.set_first_version(50) == 101


def test_rule_1_a_version_is_above_what_any_node_was_ever_sent(store):
    add_nodes(store, 2)
    sql(store, "UPDATE nodes SET last_version = 41 WHERE id = 2")
    assert new_release(store).version == 42


def test_rule_1_a_version_is_above_the_ids_that_were_given_out(store):
    add_nodes(store, 1)
    for _ in range(3):
        new_release(store)
    other = rc.Store(store.database)  # another process, that saw none of them
    for table in ("release_events", "release_task_nodes", "release_tasks"):
        sql(store, f"DELETE FROM {table}")
    assert new_release(other).version == 4


def test_rule_1_a_version_that_was_seen_is_never_used_again(store):
    add_nodes(store, 1)
    sql(store, "INSERT INTO release_tasks (version) VALUES (70)")
    store.claims.scan()
    for table in ("release_events", "release_task_nodes", "release_tasks"):
        sql(store, f"DELETE FROM {table}")
    assert new_release(store).version == 71


def test_rule_1_a_caller_may_name_a_higher_version_and_no_other(store):
    add_nodes(store, 1)
    assert new_release(store, version=10).version == 10
    for used in (1, 10):
        with pytest.raises(rc.AppError, match="name one from 11 on") as refused:
            new_release(store, version=used)
        assert refused.value.code == 2003
    assert store.releases.page().total == 1
    assert new_release(store).version == 11


def test_section_2_a_row_that_a_person_wrote_gets_its_tag_and_the_names_of_its_nodes_at_the_claim(store):
    add_nodes(store, 1)
    sql(store, "INSERT INTO release_tasks (version) VALUES (5)")
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (1, 1, 1)")
    assert store.releases.get(1).tag == ""
    assert store.claims.claim(1, "a", 30)
    assert len(store.releases.get(1).tag) == 8
    with store.database.transaction() as tx:
        assert tx.row("SELECT node_name, main_ip, agent_port FROM release_task_nodes") == ("edge-1", ADDRESSES[0], 8443)


def test_section_1_tasks_that_agents_know_from_before_there_were_tags_keep_their_ids(store):
    add_nodes(store, 1)
    release = new_release(store)
    sql(store, "UPDATE release_tasks SET tag = '', status = 'running', started_at = created_at")
    sql(store, "UPDATE release_task_nodes SET status = 'running', attempts = 1, task_id = 'apply_config_127.0.1.1_1'")
    assert store.claims.claim(release.id, "a", 30)
    assert store.releases.get(release.id).tag == ""
    assert rc.task_id_for("apply_config", "127.0.1.1", 1, "") == "apply_config_127.0.1.1_1"


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_rule_1_agents_that_are_further_on_than_a_new_database_are_no_success(world, protocol):
    world.nodes(2, protocol)
    world.fleet.set(applied_version=57)
    release = new_release(world.store, payload=SITES)
    world.drain()
    assert [n.status for n in nodes_of(world.store, release)] == ["failed", "skipped"]
    assert outcomes(world.store, release)[0][1] == "rejected"
    assert world.runs() == [0, 0]


def test_section_1_a_task_that_was_done_by_an_earlier_try_is_a_success(sqlite_world):
    sqlite_world.nodes(1, task_ms=0)
    sqlite_world.agent(1).set(mode="cut", times=1, only="dispatch")  # it runs the task, and cuts the connection
    release = new_release(sqlite_world.store)
    sqlite_world.drain()
    assert sqlite_world.store.releases.get(release.id).status == "success"
    assert sqlite_world.runs() == [1]


def test_section_1_a_dispatch_that_was_sent_again_on_a_new_connection_may_be_done_by_itself(sqlite_world):
    sqlite_world.nodes(1, task_ms=0)
    agent, client = sqlite_world.agent(1), WaitingClient(rc.AgentClient(sqlite_world.settings()))
    address = rc.Address(ADDRESSES[0], agent.port, "tasks")
    client.query(address, "unknown")  # its connection is kept
    agent.set(mode="cutEarly", times=1, only="dispatch")  # it runs the task, and ends the connection
    outcome = client.dispatch(address, rc.AgentTask("apply_config_1", "apply_config", 1, "{}"))
    client.close()
    assert (outcome.result, outcome.applied, agent.dispatches, len(agent.runs)) == (rc.ACCEPTED, 0, 2, 1)


@pytest.mark.parametrize("first_try", [
    {"mode": "refuse"}, {"mode": "status", "http_status": 429, "only": "dispatch"},
    {"mode": "status", "http_status": 503, "only": "dispatch"}, {"mode": "redirect", "only": "dispatch"}])
@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_section_1_already_applied_is_not_believed_after_a_try_that_reached_no_agent(world, protocol, first_try):
    world.nodes(1, protocol)
    agent = world.agent(1)
    agent.set(applied_version=1)  # another database brought it there
    agent.set(**first_try)
    release = new_release(world.store, payload=SITES)
    # a take-over waits for as long as a request may take
    limits = {"AGENT_RETRIES": 50, "AGENT_CONNECT_TIMEOUT_SEC": 1, "AGENT_REQUEST_TIMEOUT_SEC": 1}
    executor = world.executor(**limits)
    with beside(executor.run_loop):
        eventually(lambda: nodes_of(world.store, release)[0].attempts > 1)
        executor.close()  # and another process takes the release over
    agent.set(mode="normal")
    world.drain(**limits)
    assert outcomes(world.store, release)[0][:2] == ("failed", "rejected")
    assert world.runs() == [0]


def test_rule_1_what_is_half_done_in_a_restored_database_is_sent_nothing_below_the_first_version(world):
    world.nodes(2)
    release = new_release(world.store, strategy={"pauseAfter": [1]})
    world.drain()
    world.agent(2).set(applied_version=5)  # the world went on, then this state was restored
    world.store.releases.set_first_version(6)
    world.store.releases.act("resume", release.id, "anna")
    world.drain()
    assert outcomes(world.store, release) == [("success", "", ""), ("failed", "rejected", "node has version 5 already")]


def test_rule_1_a_version_that_was_refused_for_its_payload_is_not_used_up(store):
    add_nodes(store, 1)
    for _ in range(3):
        with pytest.raises(rc.AppError, match="the release is version 1"):
            new_release(store, payload={"version": 99})
    assert new_release(store, payload={"version": 1}).version == 1


def test_rule_1_a_named_version_leaves_room_for_others(store):
    with pytest.raises(rc.AppError, match="must be a whole number from 1 to"):
        rc.parse_release_request({"version": rc.MAX_VERSION})


def test_an_execute_agent_that_was_restarted_after_a_cut_is_believed_and_its_words_are_kept(sqlite_world):
    sqlite_world.nodes(1, "execute", task_ms=0)
    agent = sqlite_world.agent(1)
    agent.set(mode="cut", times=1, forget=True)  # it applies, cuts the connection and forgets the id
    release = new_release(sqlite_world.store, payload=SITES)
    sqlite_world.drain()
    assert sqlite_world.store.releases.get(release.id).status == "success"
    done = [e for e in sqlite_world.store.releases.events(release.id) if e.event == "succeeded"]
    assert [e.detail for e in done] == ["Version 1 already applied (current: 1)"]


# -- an older version after a newer one -------------------------------------------------------------------------

def test_rule_2_releases_that_share_a_node_go_in_order_whatever_their_targets(store):
    add_nodes(store, 3)
    first = new_release(store, node_ids=[1, 2])
    second = new_release(store, target="dns", node_ids=[2, 3])
    third = new_release(store, target="www", node_ids=[3])
    apart = new_release(store, target="img", node_ids=[1])
    assert store.claims.scan() == ([first.id], [])
    assert store.releases.get(second.id).status_reason == "waiting for release 1, which is pending"
    assert store.releases.get(third.id).status_reason == "waiting for release 2, which is pending"
    sql(store, "UPDATE release_tasks SET status = 'success' WHERE id = ?", first.id)
    assert store.claims.scan() == ([second.id, apart.id], [])
    assert store.claims.claim(third.id, "a", 30) is None


def test_rule_2_releases_without_a_common_node_go_at_the_same_time(store):
    add_nodes(store, 2)
    ids = [new_release(store, target=f"t{n}", node_ids=[n]).id for n in (1, 2)]
    assert store.claims.scan() == (ids, [])


def test_rule_2_two_names_of_one_address_are_one_node(store):
    add_nodes(store, 1)
    first = new_release(store)
    sql(store, "UPDATE nodes SET enabled = 0")
    store.nodes.add("again", ADDRESSES[0])
    second = new_release(store, target="dns")
    assert store.claims.scan() == ([first.id], [])
    assert store.releases.get(second.id).status_reason == "waiting for release 1, which is pending"


def test_rule_2_a_release_that_a_person_writes_in_pieces_is_looked_at_each_time(store):
    add_nodes(store, 1)
    first = new_release(store)
    assert store.claims.claim(first.id, "a", 30)
    sql(store, "INSERT INTO release_tasks (target, version, status) VALUES ('dns', 2, 'paused')")
    store.claims.scan()
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (2, 1, 1)")
    sql(store, "UPDATE release_tasks SET status = 'pending' WHERE id = 2")
    assert store.claims.scan() == ([], [first.id])


def test_rule_2_while_a_release_soaks_no_later_one_reaches_its_nodes(world):
    world.nodes(3)
    first = new_release(world.store, strategy={"soakSec": 0.7})
    second = new_release(world.store, target="dns")
    world.drain()
    assert [world.store.releases.get(r.id).status for r in (first, second)] == ["success", "success"]
    for number in (1, 2, 3):
        assert [run["version"] for run in world.agent(number).runs] == [1, 2]


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_rule_2_a_node_that_was_sent_a_higher_version_is_sent_nothing_and_failed(world, protocol):
    world.nodes(2, protocol)
    release = new_release(world.store, payload=SITES)
    sql(world.store, "UPDATE nodes SET last_version = 9 WHERE id = 1")
    world.drain()
    assert outcomes(world.store, release)[0] == ("failed", "rejected", "node has version 9 already")
    assert statuses(world.store, release.id) == ["failed", "skipped"]
    assert world.agent(1).dispatches == 0


def test_rule_2_nodes_with_a_higher_version_fail_one_batch_after_the_other(world):
    world.nodes(2)
    release = new_release(world.store, strategy={"maxFailed": 1})
    sql(world.store, "UPDATE nodes SET last_version = 9")
    world.drain()
    assert outcomes(world.store, release) == [("failed", "rejected", "node has version 9 already")] * 2


def test_rule_2_what_a_node_was_sent_is_noted_before_it_is_sent(world):
    world.nodes(2)
    world.agent(2).set(outcome="failed")
    new_release(world.store)
    world.drain()
    assert [node.last_version for node in world.store.nodes.page().items] == [1, 1]
    new_release(world.store, node_ids=[1])
    world.drain()
    assert [node.last_version for node in world.store.nodes.page().items] == [2, 1]


def test_rule_2_a_release_that_may_not_start_yet_holds_nobody_up_and_takes_a_later_version_then(store):
    add_nodes(store, 1)
    late = new_release(store, payload={"version": 1}, strategy={"startAt": "2999-01-01T00:00:00Z"})
    now = new_release(store)
    assert store.claims.scan() == ([now.id], [])
    claim = store.claims.claim(now.id, "a", 30)
    store.claims.drop(claim)
    sql(store, "UPDATE release_tasks SET status = 'success', claim_expires_at = NULL WHERE id = ?", now.id)
    sql(store, "UPDATE release_tasks SET strategy = ? WHERE id = ?", '{"startAt":"2020-01-01T00:00:00Z"}', late.id)
    assert store.claims.claim(late.id, "a", 30).version == 3
    after = store.releases.get(late.id)
    assert (after.version, after.payload) == (3, '{"version":3}')
    assert [(e.event, e.from_status, e.to_status) for e in store.releases.events(late.id)][1:] == [
        ("renumbered", "pending", "pending"), ("started", "pending", "running")]


def test_rule_2_a_release_that_was_given_a_later_version_goes_behind_those_that_have_lower_ones(store):
    add_nodes(store, 1)
    late, first, second = (new_release(store, strategy={"startAt": at} if at else {})
                           for at in ("2999-01-01T00:00:00Z", "", ""))
    assert store.claims.claim(first.id, "a", 30)
    sql(store, "UPDATE release_tasks SET strategy = ? WHERE id = ?", '{"startAt":"2020-01-01T00:00:00Z"}', late.id)
    sql(store, "UPDATE release_tasks SET status = 'success', claim_expires_at = NULL WHERE id = ?", first.id)
    assert store.claims.claim(late.id, "a", 30) is None
    assert (store.releases.get(late.id).version, store.claims.scan()) == (4, ([second.id], []))
    assert store.releases.get(late.id).status_reason == "waiting for release 3, which is pending"


def test_rule_2_a_drain_runs_a_release_that_was_given_a_later_version_after_the_others(world):
    world.nodes(1, task_ms=FOREVER_MS)
    ids = [new_release(world.store, strategy={"startAt": at} if at else {}).id
           for at in ("2999-01-01T00:00:00Z", "", "")]
    with beside(world.drain):
        eventually(lambda: world.agent(1).runs)
        sql(world.store, "UPDATE release_tasks SET strategy = ? WHERE id = ?",
            '{"startAt":"2020-01-01T00:00:00Z"}', ids[0])
        world.finish()
    assert [world.store.releases.get(i).status for i in ids] == ["success"] * 3
    assert [run["version"] for run in world.agent(1).runs] == [2, 3, 4]


def test_rule_1_what_was_to_go_out_in_a_restored_database_gets_versions_that_no_agent_has(world):
    world.nodes(1)
    ids = [new_release(world.store, payload={"version": number}).id for number in (1, 2)]
    world.agent(1).set(applied_version=40)
    assert world.store.releases.set_first_version(41) == 41
    world.drain()
    assert [world.store.releases.get(i).status for i in ids] == ["success", "success"]
    assert [run["version"] for run in world.agent(1).runs] == [41, 42]
    assert [world.store.releases.get(i).payload for i in ids] == ['{"version":41}', '{"version":42}']
    assert "version 1 became 41: agents may have versions below 41" in world.store.releases.events(ids[0])[1].detail


def test_rule_2_what_an_address_was_sent_counts_for_every_row_that_names_it(world):
    world.nodes(1)
    port = world.agent(1).port
    sql(world.store, "INSERT INTO nodes (name, main_ip, agent_port, enabled, last_version) VALUES ('old', ?, ?, 0, 8)",
        ADDRESSES[0], port)
    sql(world.store, "INSERT INTO release_tasks (version) VALUES (7)")
    sql(world.store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (1, 1, 1)")
    world.drain()
    assert outcomes(world.store, world.store.releases.get(1)) == [("failed", "rejected", "node has version 8 already")]
    assert world.agent(1).dispatches == 0


def test_rule_7_a_release_that_a_person_wrote_and_cancelled_before_its_claim_counts_its_nodes(store):
    add_nodes(store, 1)
    sql(store, "INSERT INTO release_tasks (version) VALUES (7)")
    sql(store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (1, 1, 1)")
    after = store.releases.act("cancel", 1, "anna")
    assert (after.status, after.total_nodes, after.skipped_nodes) == ("cancelled", 1, 1)


def test_rule_2_a_release_whose_time_came_first_keeps_its_version(store):
    add_nodes(store, 1)
    first = new_release(store, strategy={"startAt": "2020-01-01T00:00:00Z"})
    new_release(store)
    assert store.claims.claim(first.id, "a", 30).version == 1


# -- the id that is sent again -----------------------------------------------------------------------------------

def test_section_1_what_is_sent_again_is_our_own_id_whatever_the_agent_called_its_task(world):
    world.nodes(1, task_ms=FOREVER_MS)
    agent = world.agent(1)
    agent.set(rename=True)
    release = new_release(world.store)
    with beside(world.drain):
        eventually(lambda: nodes_of(world.store, release)[0].task_id.startswith("agent-"))
        agent.set(task_ms=20)
        agent.restart()
    assert world.store.releases.get(release.id).status == "success"
    assert set(agent.run_counts) == {f"apply_config_{ADDRESSES[0]}_1_{release.tag}"}


# -- one host entered as two nodes -------------------------------------------------------------------------------

@pytest.mark.parametrize("again", ["10.0.0.7", "::ffff:10.0.0.7", "::ffff:a00:7"])
def test_section_2_no_two_enabled_nodes_have_one_address(store, again):
    store.nodes.add("edge-1", rc.parse_address("10.0.0.7"))
    with pytest.raises(rc.AppError, match="node edge-1 has the address 10.0.0.7:8443 already") as refused:
        store.nodes.add("edge-2", rc.parse_address(again))
    assert refused.value.code == 3002
    store.nodes.add("edge-3", "10.0.0.7", 9090)  # another agent on the host
    other = store.nodes.add("edge-4", "10.0.0.7", enabled=False)
    for change in ({"enabled": 1}, {"enabled": 1, "name": "edge-9"}):
        with pytest.raises(rc.AppError, match="edge-1 has the address"):
            store.nodes.update(other.id, change)
    store.nodes.update(1, {"name": "edge-one", "enabled": 1, "main_ip": "10.0.0.7"})  # itself is no other


def test_section_2_an_import_with_one_address_twice_adds_nothing(store):
    rows = [{"name": f"edge-{n}", "main_ip": "10.0.0.7"} for n in (1, 2)]
    with pytest.raises(rc.AppError, match="node edge-1 has the address"):
        store.nodes.import_all(rows)
    assert store.nodes.page().total == 0


def test_section_2_a_release_to_two_nodes_of_one_address_is_refused_and_names_both(store):
    add_nodes(store, 2)
    sql(store, "UPDATE nodes SET main_ip = ? WHERE id = 2", f"::ffff:{ADDRESSES[0]}")
    with pytest.raises(rc.AppError, match="nodes edge-1 and edge-2 have one address") as refused:
        new_release(store)
    assert refused.value.code == 3003
    assert store.releases.page().total == 0


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_section_2_two_rows_of_a_release_at_one_address_never_run_at_once(sqlite_world, protocol):
    sqlite_world.nodes(2, protocol, task_ms=200)
    store = sqlite_world.store
    release = new_release(store, strategy={"batches": [2]}, payload=SITES)
    sql(store, "UPDATE release_task_nodes SET main_ip = ?, agent_port = ?", ADDRESSES[0], sqlite_world.agent(1).port)
    sqlite_world.drain()
    assert sqlite_world.agent(1).overlaps == 0
    assert sqlite_world.runs() == [1, 0]
    assert nodes_of(store, release)[0].status == "success"


def test_section_2_an_address_is_held_for_the_other_rows_of_its_release_too():
    rows = rc.NodeIndex([node(n, "pending", "execute", main_ip="10.0.0.1") for n in (1, 2)])
    strategy = rc.Strategy(max_failed=2, retries=0)
    begun = rc.decide(rc.Situation(release_row(), rows, NOW, POLICY.under(strategy), strategy, slots=8))
    lost = rc.Outcome("dispatch", rc.LOST, "", "timeout", "no answer", "", 60.0)
    begun.nodes.put(rc.observe(begun.nodes[1], lost, later(60), POLICY.under(strategy)))
    after = rc.decide(rc.Situation(release_row(), begun.nodes, later(60), POLICY.under(strategy), strategy, slots=8))
    assert [(c.after.node_id, c.after.status) for c in after.changes] == [(1, "failed")]
    then = rc.decide(rc.Situation(release_row(), after.nodes, later(120), POLICY.under(strategy), strategy, slots=8))
    assert [send.node.node_id for send in then.sends] == [2]


# -- no payload empties the fleet ----------------------------------------------------------------------------------

@pytest.mark.parametrize("payload", [{}, {"websites": None}, {"websites": {}}, {"sites": []}])
def test_section_1_a_payload_that_would_empty_execute_nodes_by_mistake_is_refused(store, payload):
    add_nodes(store, 1)
    add_nodes(store, 2, "execute", first=2)
    with pytest.raises(rc.AppError, match="no list websites, and edge-2 and 1 more would drop all sites") as refused:
        new_release(store, payload=payload)
    assert refused.value.code == 2003
    assert store.releases.page().total == 0
    assert new_release(store, payload=payload, node_ids=[1]).total_nodes == 1


def test_section_1_a_plan_says_which_nodes_would_be_left_without_any_site(store):
    add_nodes(store, 1)
    add_nodes(store, 1, "execute", first=2)
    assert store.releases.plan(rc.ReleaseRequest(payload=SITES)).emptied == ["edge-2"]
    assert store.releases.plan(rc.ReleaseRequest(payload={"websites": [{"id": 1}]})).emptied == []


def test_section_1_a_row_written_by_hand_empties_no_node_either(world):
    world.nodes(1, "execute")
    sql(world.store, "INSERT INTO release_tasks (version) VALUES (1)")
    sql(world.store, "INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (1, 1, 1)")
    world.drain()
    release = world.store.releases.get(1)
    assert (release.status, statuses(world.store, 1)) == ("failed", ["skipped"])
    assert "no list websites" in release.error_msg
    assert world.agent(1).dispatches == 0


# -- pause, freeze and restarts use up nobody's deadline -------------------------------------------------------------

def halt(store: rc.Store, how: str, release: rc.Release) -> None:
    if how == "pause":
        store.releases.act("pause", release.id, "anna")
    else:
        store.releases.set_freeze(True, "anna", "holidays")


def go_on(store: rc.Store, how: str, release: rc.Release) -> None:
    store.releases.act("resume", release.id, "anna") if how == "pause" else store.releases.set_freeze(False, "anna")


@pytest.mark.parametrize("how", ["pause", "freeze"])
@pytest.mark.parametrize("restarted", [False, True], ids=["one process", "another process"])
def test_section_7_a_hold_uses_up_no_deadline_of_a_node_whose_agent_was_restarted(world, how, restarted):
    world.nodes(1, task_ms=FOREVER_MS)
    release = new_release(world.store)
    executor = world.executor(CLAIM_TTL_SEC=3600)
    loop = threading.Thread(target=executor.run_loop)
    loop.start()
    eventually(lambda: world.agent(1).runs)
    halt(world.store, how, release)
    world.agent(1).set(task_ms=20)
    world.agent(1).restart()
    asked = world.agent(1).queries
    eventually(lambda: world.agent(1).queries > asked)  # it was told that the agent does not know the task
    if restarted:
        executor.close()
        executor = world.executor(CLAIM_TTL_SEC=3600)
        loop.join(60)
        loop = threading.Thread(target=executor.run_loop)
        loop.start()
    world.advance(700)  # longer than the deadline
    since = time.monotonic()
    eventually(lambda: time.monotonic() > since + 0.6)  # three intervals
    assert statuses(world.store, release.id) == ["running"]
    go_on(world.store, how, release)
    eventually(lambda: world.store.releases.get(release.id).is_terminal)
    executor.close()
    loop.join(60)
    assert outcomes(world.store, release) == [("success", "", "")]


NOW = rc.Moment(1_790_000_000.0, 1_000.0, "boot")
POLICY = rc.Policy(retries=2, node_deadline_s=600.0, request_timeout_s=60.0, interval_s=2.0, leave_within_s=15.0)


def later(seconds: float, clock_set_s: float = 0.0) -> rc.Moment:
    """Return a moment later by all clocks; clock_set_s: the wall clock was set by so much meanwhile."""
    return rc.Moment(NOW.wall + seconds + clock_set_s, NOW.elapsed + seconds, NOW.boot)


def release_row(status: str = "running", **fields) -> rc.Release:
    values: dict[str, Any] = dict.fromkeys(rc.Release._fields, "")
    values.update(id=1, version=42, status=status, started_at=NOW.text, claim_fence=1, passed_batch=0, soak_until=None)
    return rc.Release(**{**values, **fields})


def node(node_id: int = 1, status: str = "running", protocol: str = "tasks", batch: int = 1,
         **fields) -> rc.ReleaseNode:
    row = rc.ReleaseNode(node_id, f"edge-{node_id}", f"10.0.0.{node_id}", 8443, protocol, batch, status, "", 1, "", "",
                         None, NOW.text, None)
    return row._replace(**{"deadline": NOW.elapsed + 600, **fields})


HISTORY = [(NOW.text, "started", "running"), (later(100).text, "paused", "paused"),
           (later(400).text, "frozen", "paused"), (later(500).text, "resumed", "running"),
           (later(700).text, "unfrozen", "running")]


def test_section_7_holds_are_the_pauses_and_freezes_of_the_history_taken_together():
    assert [(halt.since - NOW.wall, halt.until - NOW.wall) for halt in rc.halts_of(HISTORY)] == [(100, 700)]
    assert rc.halts_of(HISTORY[:2])[0].until == float("inf")
    assert rc.halts_of(HISTORY[:1]) == []


def test_section_7_a_new_owner_counts_no_hold_against_a_node_that_is_not_at_its_agent():
    adopted = rc.recover(node(), later(1000), POLICY, rc.halts_of(HISTORY))
    assert adopted.deadline - later(1000).elapsed == 200  # 600 s, of which 400 are used up
    unknown = rc.observe(adopted, rc.Outcome("query", rc.UNKNOWN), later(1000), POLICY)
    assert unknown.deadline == adopted.deadline
    sent = rc.decide(rc.Situation(release_row(), rc.NodeIndex([unknown]), later(1000), POLICY)).changes[0].after
    assert (sent.waited_s, sent.deadline) == (600, adopted.deadline)
    # the next owner reads that from the row, whatever the history says
    again = rc.recover(sent._replace(credit_s=0.0), later(1010), POLICY, [])
    assert again.deadline == adopted.deadline


def test_section_7_a_node_whose_agent_is_at_work_keeps_its_own_deadline():
    adopted = rc.recover(node(), later(1000), POLICY, rc.halts_of(HISTORY))
    working = rc.observe(adopted, rc.Outcome("query", rc.WORKING), later(1000), POLICY)
    assert working.deadline == NOW.elapsed + 600


@pytest.mark.parametrize("fields", [{"reached": True}, {"errors": 1, "last_error": "HTTP 503"}, {}])
def test_section_7_whatever_a_node_was_at_before_a_hold_moves_its_deadline_along(fields):
    held = node(next_op=rc.DISPATCH, **fields)
    assert rc.kept_from_dispatch(rc.NodeIndex([held]), 60.0) == [
        held._replace(deadline=held.deadline + 60.0, waited_s=60.0)]


def test_section_7_a_node_that_is_being_asked_has_the_time_of_a_hold_until_its_agent_says_that_it_is_at_work():
    asked = rc.kept_from_dispatch(rc.NodeIndex([node(next_op=rc.QUERY)]), 60.0)[0]
    assert asked.deadline == NOW.elapsed + 660
    assert rc.observe(asked, rc.Outcome("query", rc.WORKING), NOW, POLICY).deadline == NOW.elapsed + 600
    assert rc.kept_from_dispatch(rc.NodeIndex([node(next_op=rc.QUERY, is_at_work=True)]), 60.0) == []


# -- no wait without an end ----------------------------------------------------------------------------------------

def test_section_7_a_second_look_that_passes_and_fails_in_turn_ends():
    strategy = rc.Strategy(soak_s=10.0, verify=rc.Verify("http://{main_ip}/", successes=2), retries=100)
    policy = POLICY.under(strategy)
    release = release_row(soak_until=NOW.text, soak_clock=NOW.clock_mark(0))
    nodes, passes = rc.NodeIndex([node(1, "success"), node(2, "pending", batch=2)]), 0
    for seconds in range(2000):
        decision = rc.decide(rc.Situation(release, nodes, later(seconds), policy, strategy, slots=8))
        nodes = decision.nodes
        if decision.status == "failed":
            break
        for send in decision.sends:
            passes += 1
            outcome = rc.Outcome("probe", rc.SUCCESS if passes % 2 else rc.UNCLEAR, "", "verify", "HTTP 500")
            nodes.put(rc.observe(send.node, outcome, later(seconds), policy))
    assert 590 < seconds < 620
    assert nodes[1].error_kind == "verify"
    assert nodes[1].error_msg == "not verified 600 s after the end of its soak; last: HTTP 500"


def test_section_7_a_second_look_keeps_its_deadline_as_long_as_something_is_to_come():
    strategy = rc.Strategy(soak_s=10.0, verify=rc.Verify("http://{main_ip}/"))
    release = release_row(soak_until=NOW.text, soak_clock=NOW.clock_mark(0))
    nodes = rc.NodeIndex([node(1, "success", deadline=0.0), node(2, "pending", batch=2)])
    first = rc.decide(rc.Situation(release, nodes, later(5000), POLICY.under(strategy), strategy, slots=8))
    assert [(send.op, send.node.deadline) for send in first.sends] == [("probe", later(5600).elapsed)]


# -- soak and hold last by a clock that nobody sets ------------------------------------------------------------------

SOAK = rc.Strategy(soak_s=600.0)


@pytest.mark.parametrize("clock_set_s", [3600.0, -3600.0])
def test_section_7_a_soak_lasts_as_long_as_it_says_whatever_is_done_to_the_wall_clock(clock_set_s):
    nodes = rc.NodeIndex([node(1, "success"), node(2, "pending", batch=2)])
    begun = rc.decide(rc.Situation(release_row(), nodes, NOW, POLICY, SOAK))
    soaking = release_row(soak_until=begun.soak_until, soak_clock=begun.soak_clock)
    for seconds, is_over in ((1, False), (599, False), (600, True)):
        # the same process, or another one on this host
        decision = rc.decide(rc.Situation(soaking, nodes, later(seconds, clock_set_s), POLICY, SOAK, slots=8))
        assert bool(decision.sends) == is_over, seconds


def test_section_7_a_soak_read_on_another_host_is_never_longer_than_it_was_meant():
    nodes = rc.NodeIndex([node(1, "success"), node(2, "pending", batch=2)])
    far = release_row(soak_until=later(86400 * 2).text, soak_clock="another-boot 17.000")
    decision = rc.decide(rc.Situation(far, nodes, NOW, POLICY, SOAK))
    assert decision.soak_clock == f"boot {NOW.elapsed + 600:.3f}"
    assert decision.must_commit(far)  # from now on by our own clock


def test_section_7_a_soak_whose_mark_lies_further_ahead_than_it_is_long_is_not_longer():
    nodes = rc.NodeIndex([node(1, "success"), node(2, "pending", batch=2)])
    far = release_row(soak_until=later(5000).text, soak_clock=NOW.clock_mark(5000))
    assert rc.decide(rc.Situation(far, nodes, NOW, POLICY, SOAK)).soak_clock == NOW.clock_mark(600)


@pytest.mark.parametrize("clock_set_s", [3600.0, -3600.0])
def test_section_7_the_hold_of_an_execute_agent_lasts_whatever_is_done_to_the_wall_clock(clock_set_s):
    sent = rc.decide(rc.Situation(release_row(), rc.NodeIndex([node(1, "pending", "execute")]), NOW,
                                  POLICY)).changes[0].after
    adopted = rc.recover(sent, later(30, clock_set_s), POLICY)
    assert adopted.due == NOW.elapsed + 75


class SetClock(rc.Clock):
    """A wall clock that somebody sets."""

    def __init__(self) -> None:
        self.set_s = 0.0

    def wall(self) -> float:
        return time.time() + self.set_s


@pytest.mark.parametrize("set_s", [3600.0, -3600.0, 86400.0])
def test_section_7_an_address_is_busy_for_as_long_as_its_hold_whatever_is_done_to_the_wall_clock(
        database_url, open_store, set_s):
    clock = SetClock()
    store = open_store(database_url, clock)
    add_nodes(store, 1, "execute")
    release = new_release(store, payload=SITES)
    until, mark = rc._hold_for(30.0, store.state.moment())
    sql(store, "UPDATE release_task_nodes SET status = 'failed', hold_until = ?, hold_clock = ?", until, mark)
    clock.set_s = set_s
    assert store.claims.dispatch_blockers(release.id + 1).busy == {(ADDRESSES[0], 8443)}
    sql(store, "UPDATE release_task_nodes SET hold_clock = ?", store.state.moment().clock_mark(-1.0))
    assert store.claims.dispatch_blockers(release.id + 1).busy == set()


def test_rule_9_a_claim_or_hold_that_lies_further_ahead_than_any_setting_allows_is_over_and_told(store):
    add_nodes(store, 1, "execute")
    release = new_release(store, payload=SITES)
    assert store.claims.claim(release.id, "dead", 30)
    ahead = rc.utc_text(time.time() + 2 * 86400)
    sql(store, "UPDATE release_tasks SET claim_expires_at = ?", ahead)
    sql(store, "UPDATE release_task_nodes SET status = 'failed', hold_until = ?", ahead)
    assert store.claims.times_ahead() == [
        f"release 1 is claimed by dead until {ahead}", f"node edge-1 is kept free until {ahead}"]
    assert store.claims.scan() == ([release.id], [])
    assert store.claims.claim(release.id, "alive", 30)
    assert store.claims.dispatch_blockers(release.id + 1).busy == set()


@pytest.mark.parametrize("clock_set_s", [4 * 3600.0, -4 * 3600.0])
def test_rule_8_a_deadline_goes_on_in_a_new_owner_whatever_is_done_to_the_wall_clock(clock_set_s):
    sent = rc.decide(rc.Situation(release_row(), rc.NodeIndex([node(1, "pending")]), NOW, POLICY)).changes[0].after
    assert rc.recover(sent, later(30, clock_set_s), POLICY).deadline == NOW.elapsed + 600


def test_rule_9_a_node_whose_start_lies_ahead_has_no_longer_a_deadline_than_others():
    assert rc.recover(node(started_at=later(86400).text), NOW, POLICY).deadline == NOW.elapsed + 600


# -- a database that goes back -----------------------------------------------------------------------------------------

def lose_newest_release(store: rc.Store) -> None:
    """Do what a failover does that lost the last commits."""
    with store.database.transaction(write=True) as tx:
        for table in ("release_events", "release_task_nodes"):
            tx.execute(f"DELETE FROM {table} WHERE release_task_id = (SELECT MAX(id) FROM release_tasks)")
        tx.execute("DELETE FROM release_tasks WHERE id = (SELECT MAX(id) FROM release_tasks)")


def went_back(store: rc.Store) -> float:
    return store.database.metrics._figures["releasectl_database_went_back_total",]


def test_rule_1_a_database_that_went_back_is_told_once_and_its_versions_are_not_used_again(store, told):
    add_nodes(store, 1)
    new_release(store), new_release(store)
    store.claims.scan()
    lose_newest_release(store)
    for _ in range(3):
        store.claims.scan()
    assert went_back(store) == 1
    assert told.text.count("went back to an earlier state (version 1 after 2, event 1 after 2)") == 1
    assert new_release(store).version == 3


def test_rule_1_what_one_process_saw_fall_all_of_them_know(store, database_url, open_store):
    add_nodes(store, 1)
    new_release(store), new_release(store)
    store.claims.scan()
    lose_newest_release(store)
    store.claims.scan()
    other = open_store(database_url)  # a command, which has seen nothing
    assert new_release(other).version == 3
    assert other.claims.dispatch_blockers(1).moved_s < 60


def test_a_fall_is_written_down_once_so_that_the_wait_after_it_ends(store):
    add_nodes(store, 1)
    new_release(store), new_release(store)
    store.claims.scan()
    lose_newest_release(store)
    store.claims.scan()
    sql(store, "UPDATE database_state SET moved_at = ?", rc.utc_text(time.time() - 3600))
    store.claims.scan()
    store.state.changed_at = float("-inf")  # this process waited for itself as long
    assert store.claims.dispatch_blockers(1).moved_s > 3500


def test_a_move_that_lies_ahead_holds_nobody_up(store):
    sql(store, "UPDATE database_state SET moved_at = ?", rc.utc_text(time.time() + 86400))
    assert store.claims.dispatch_blockers(1).moved_s == float("inf")


def test_after_a_fall_tasks_agents_are_asked_before_they_are_sent_anything():
    release = release_row(tag="9f3a61c0", type="apply_config")
    asked = rc.decide(rc.Situation(release, rc.NodeIndex([node(1, "pending")]), NOW, POLICY, asks_first=True))
    assert [(send.op, send.node.task_id) for send in asked.sends] == [("query", "apply_config_10.0.0.1_42_9f3a61c0")]
    unknown = rc.observe(asked.nodes[1], rc.Outcome("query", rc.UNKNOWN), NOW, POLICY)
    assert (unknown.next_op, unknown.reached) == (rc.DISPATCH, False)
    known = rc.observe(asked.nodes[1], rc.Outcome("query", rc.SUCCESS), NOW, POLICY)
    assert known.end.status == "success"


def test_what_another_thread_read_meanwhile_is_no_database_that_went_back(store, told):
    add_nodes(store, 1)
    new_release(store)
    with store.state.checked_read():  # an older snapshot, which ends after a newer one was read
        before = store.state.seen.high
        new_release(store)
        store.claims.scan()
    assert store.state.seen.note(before, 1, 1, before.timeline) == ("", False)
    assert (went_back(store), "went back" in told.text) == (0, False)


def test_prune_is_no_database_that_went_back(store, told):
    add_nodes(store, 1)
    for _ in range(2):
        made = new_release(store)
        sql(store, "UPDATE release_tasks SET status = 'failed', finished_at = '2020-01-01T00:00:00.000Z', "
                   "updated_at = '2020-01-01T00:00:00.000Z' WHERE id = ?", made.id)
    sql(store, "INSERT INTO release_events (release_task_id, event) VALUES (1, 'note')")
    store.claims.scan()
    store.history.delete([release.id for release in store.history.prunable(86400.0, 1)])
    store.claims.scan()
    assert went_back(store) == 0


@pytest.mark.parametrize("deed", ["renew", "let_go", "read", "commit"])
def test_rule_9_an_owner_whose_claim_number_was_given_out_again_changes_nothing(store, deed):
    add_nodes(store, 1)
    release = new_release(store)
    claim = store.claims.claim(release.id, "first", 30)
    found, nodes = store.claims.read_with_nodes(claim)
    # the database went back before that claim, and another process took the same number
    sql(store, "UPDATE release_tasks SET claim_owner = 'second'")
    before = store.releases.get(release.id)
    if deed == "renew":
        assert not store.claims.renew(claim, 30)
    elif deed == "let_go":
        store.claims.drop(claim)
    else:
        now = store.state.moment()
        with pytest.raises(rc.ClaimLost):
            store.claims.read(claim) if deed == "read" else store.claims.commit(
                claim, found, rc.decide(rc.Situation(found, rc.NodeIndex(nodes), now, POLICY)), now, "first")
    assert store.releases.get(release.id) == before


def test_a_release_that_vanished_is_told_as_that_and_a_drain_goes_on_with_the_rest(world, told):
    world.nodes(2, task_ms=FOREVER_MS)
    keep = new_release(world.store, node_ids=[1])
    lost = new_release(world.store, target="dns", node_ids=[2])
    ticks: list[rc.Tick] = []
    runner = threading.Thread(target=lambda: ticks.append(world.executor().drain()))
    runner.start()
    eventually(lambda: statuses(world.store, lost.id) == ["running"])
    lose_newest_release(world.store)
    world.finish()
    runner.join(60)
    assert ([r.id for r in ticks[0].worked_on], list(ticks[0].vanished)) == ([keep.id], [lost.id])
    assert world.store.releases.get(keep.id).status == "success"
    assert "release 2 (v2): stopped working on it: it is no longer in the database" in told.text
    assert "Traceback" not in told.text


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_rule_9_a_dispatch_that_the_database_forgot_is_not_sent_beside_the_first_one(world, protocol):
    world.nodes(1, protocol, task_ms=FOREVER_MS)
    release = new_release(world.store, payload=SITES)
    other = new_release(world.store, target="dns", node_ids=[1], payload=SITES)
    runner = threading.Thread(target=lambda: world.drain(AGENT_CONNECT_TIMEOUT_SEC=1, AGENT_REQUEST_TIMEOUT_SEC=2))
    runner.start()
    eventually(lambda: world.agent(1).runs)
    # what a failover that lost the last commits leaves: the dispatch was never written, and a release is gone
    sql(world.store, "UPDATE release_task_nodes SET status = 'pending', attempts = 0, task_id = '', started_at = NULL, "
                     "hold_until = NULL WHERE release_task_id = ?", release.id)
    lose_newest_release(world.store)
    world.finish()
    runner.join(60)
    assert world.agent(1).overlaps == 0
    assert (world.runs(), world.store.releases.get(release.id).status) == ([1], "success")
    assert world.store.releases.find(other.id) is None


def test_rule_1_a_failover_skips_the_versions_that_lost_releases_may_have_had(new_postgres_url, open_store):
    store = open_store(new_postgres_url())
    add_nodes(store, 1)
    assert new_release(store).version == 1
    with store.database.transaction() as tx:
        timeline = tx.value("SELECT timeline FROM database_state")
    assert timeline >= 1
    sql(store, "UPDATE database_state SET timeline = ?", timeline + 1)  # as a standby that was promoted sees it
    assert new_release(store).version > 1000
    assert store.claims.dispatch_blockers(1).moved_s < 60


def test_rule_9_an_execute_agent_is_sent_nothing_for_a_while_after_the_database_went_back():
    sent = node(1, "running", "execute", hold_until=later(-5).text)
    assert rc.recover(sent, NOW, POLICY, quiet_s=40.0).due == NOW.elapsed + 40


# -- what agents say ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["", "   ", "\t\n", "\u200b"])
def test_section_1_an_error_text_that_shows_nothing_is_told_as_no_reason(text):
    said = rc.Outcome("query", rc.FAILED, "", "agent_failed", text, text)
    seen = rc.observe(node(next_op=rc.QUERY), said, NOW, POLICY)
    assert seen.end.error_msg == "the agent gave no reason"


def test_section_1_what_an_agent_says_of_its_success_is_kept(sqlite_world):
    sqlite_world.nodes(1, "execute")
    sqlite_world.agent(1).set(message="Version 1 applied, 3 warnings")
    release = new_release(sqlite_world.store, payload=SITES)
    sqlite_world.drain()
    assert [e.detail for e in sqlite_world.store.releases.events(release.id) if e.event == "succeeded"] == [
        "Version 1 applied, 3 warnings"]


def test_a_rollback_of_what_stays_is_not_pruned_as_it_tells_that_that_was_bad(store):
    add_nodes(store, 3)

    def old(**fields) -> rc.Release:
        made = succeed(store, **fields)
        sql(store, "UPDATE release_tasks SET finished_at = '2020-01-01T00:00:00.000Z' WHERE id = ?", made.id)
        return made

    old(payload={"is": "good"})
    bad = old(payload={"is": "bad"})
    for node_id in (2, 3):
        store.nodes.update(node_id, {"status": "offline"})
    back = store.releases.rollback(bad.id, "anna").release
    sql(store, "UPDATE release_tasks SET status = 'success', finished_at = '2020-01-01T00:00:00.000Z' WHERE id = ?",
        back.id)
    sql(store, "UPDATE release_task_nodes SET status = 'success' WHERE release_task_id = ?", back.id)
    for number in range(3):
        old(payload={"is": number}, node_ids=[1])
    gone = store.history.prunable(86400.0, 1)
    for node_id in (2, 3):
        store.nodes.update(node_id, {"status": "online"})
    last = succeed(store, payload={"is": "new"})
    before = store.releases.plan_again("rollback", last.id).payload_of
    store.history.delete([release.id for release in gone])
    assert store.releases.plan_again("rollback", last.id).payload_of == before == (1, 1)


def test_history_is_of_its_time(store):
    add_nodes(store, 2)
    release = new_release(store)
    sql(store, "UPDATE release_task_nodes SET status = 'failed', error_msg = 'boom' WHERE node_id = 1")
    sql(store, "UPDATE release_tasks SET status = 'failed'")
    sql(store, "INSERT INTO release_events (release_task_id, node_id, event) VALUES (1, 1, 'failed')")
    before = nodes_of(store, release), store.releases.events(release.id), store.releases.progress(release.id)
    for node_id, name, address in ((1, "tmp", "10.9.9.9"), (2, "edge-1", ADDRESSES[0]), (1, "edge-2", ADDRESSES[1])):
        store.nodes.update(node_id, {"name": name, "main_ip": address})
    assert (nodes_of(store, release), store.releases.events(release.id), store.releases.progress(release.id)) == before
    assert [n.name for n in store.nodes.page().items] == ["edge-2", "edge-1"]


def test_a_freeze_that_is_not_there_is_lifted_without_a_word(store):
    add_nodes(store, 1)
    new_release(store)
    before = store.releases.events(1), store.releases.freezes()
    assert store.releases.set_freeze(False, "anna") == before[1]
    assert (store.releases.events(1), store.releases.freezes()) == before


