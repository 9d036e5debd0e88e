"""Every agent is asked before batch 1: too many silent ones, and nothing is sent (section 7, `preflight`)."""
from __future__ import annotations

import re
import shutil
import threading
import time
from typing import Any

import pytest
from lab import SITES, World, assert_books_balance, eventually, make_certs, mtls, nodes_of, sql, statuses
from test_decision import NOW, POLICY, later, moves, node, release, sends

import releasectl as rc

PREFLIGHT = rc.Strategy(preflight=True)


def decide(nodes, status: str = "running", now: rc.Moment = NOW, **more: Any) -> rc.Decision:
    fields = more.pop("release", {})
    more.setdefault("strategy", PREFLIGHT)
    more.setdefault("slots", 64)
    return rc.decide(rc.Situation(release(status, **fields), rc.NodeIndex(nodes), now, more.pop("policy", POLICY),
                                  **more))


def answers(asked: rc.ReleaseNode, kind: str = "", result: str = rc.UNSENT, now: rc.Moment = NOW,
            hold_s: float = 0.0) -> rc.ReleaseNode:
    outcome = rc.Outcome(rc.PING, result if kind else rc.SUCCESS, "", kind, f"{kind} it is" if kind else "", "", hold_s)
    return rc.observe(asked, outcome, now, POLICY)


def silent(node_id: int, kind: str = "unreachable", **fields: Any) -> rc.ReleaseNode:
    return node(node_id, end=rc.NodeEnd("failed", kind, f"{kind} it is", f"{kind} it is"), next_op=rc.PING,
                deadline=NOW.elapsed + 600, **fields)


def answered(node_id: int, **fields: Any) -> rc.ReleaseNode:
    return node(node_id, has_answered=True, next_op=rc.PING, deadline=NOW.elapsed + 600, **fields)


# -- the decision ----------------------------------------------------------------------------------

def test_every_agent_is_asked_of_whatever_batch_and_nothing_is_dispatched():
    decision = decide([node(1), node(2, batch=2), node(3, batch=3)], slots=2)
    assert (sends(decision), decision.changes) == ([("ping", 1), ("ping", 2)], ())
    assert decision.status_reason == "asking all 3 agents before batch 1: 0 answered"
    assert decision.sends[0].node.deadline == NOW.elapsed + 600


def test_batch_1_begins_in_the_decision_in_which_the_last_agent_has_answered():
    nodes = [answered(1), answered(2, batch=2, in_flight=False), node(3, batch=2, next_op=rc.PING, in_flight=True,
                                                                      deadline=NOW.elapsed + 600)]
    waiting = decide(nodes)
    assert (waiting.sends, waiting.changes) == ((), ())
    assert waiting.status_reason == "asking all 3 agents before batch 1: 2 answered"
    decision = decide([*nodes[:2], answers(nodes[2])])
    assert (sends(decision), moves(decision)) == ([("dispatch", 1)], {1: ("pending", "running")})


def test_without_the_key_or_once_something_was_sent_nobody_is_asked():
    assert sends(decide([node(1)], strategy=rc.NO_STRATEGY)) == [("dispatch", 1)]
    for begun in (node(1, "success", attempts=1), node(1, "failed", attempts=1, accepted=1)):
        assert sends(decide([begun, node(2, batch=2)])) == [("dispatch", 2)]
    # a node that was rejected before anything was sent is no beginning
    assert sends(decide([node(1, "failed", error_kind="rejected", accepted=1), node(2, batch=2)])) == [("ping", 2)]
    assert sends(decide([node(1)], release={"preflight_accepted": 1})) == [("dispatch", 1)]


def test_a_silent_agent_is_asked_again_as_often_as_the_release_may_retry():
    asked = node(1, next_op=rc.PING, in_flight=True, deadline=NOW.elapsed + 600, protocol="execute")
    for number in (1, 2):
        asked = answers(asked, "timeout", rc.LOST, hold_s=60.0)
        assert (asked.end, asked.errors, asked.next_op) == (None, number, rc.PING)
        assert NOW.elapsed < asked.due <= NOW.elapsed + 10  # a question leaves no agent busy
        decision = decide([asked, node(2, in_flight=True, next_op=rc.PING, deadline=NOW.elapsed + 600)])
        assert (decision.sends, decision.wake_at) == ((), asked.due)
        assert f"; trying again: edge-1: timeout it is, try {number + 1} of 3" in decision.status_reason
        assert sends(decide([asked], now=later(11))) == [("ping", 1)]
    asked = answers(asked, "timeout", rc.LOST)
    assert asked.end == rc.NodeEnd("failed", "timeout", "timeout it is (tried 3 times)", "timeout it is")
    assert (asked.reached, asked.is_unknown, asked.errors) == (False, False, 0)


def test_those_that_were_not_asked_yet_come_before_those_that_are_asked_again():
    again = node(1, next_op=rc.PING, errors=1, due=NOW.elapsed - 1, deadline=NOW.elapsed + 600)
    assert sends(decide([again, node(2), node(3)], slots=2)) == [("ping", 2), ("ping", 3)]


def test_too_many_silent_agents_end_the_release_in_one_commit_and_nothing_is_sent():
    decision = decide([silent(1, "tls"), answered(2, batch=2), silent(3, batch=2), silent(4, batch=2)])
    assert (decision.status, decision.sends) == ("failed", ())
    assert moves(decision) == {1: ("pending", "failed"), 2: ("pending", "skipped"), 3: ("pending", "failed"),
                               4: ("pending", "failed")}
    after = {n.node_id: (n.error_kind, n.error_msg, n.attempts, n.stored_reached, n.hold_until, n.finished_at)
             for n in decision.nodes}
    assert after[1] == ("tls", "tls it is", 0, 0, None, NOW.text)
    assert after[2] == ("", "", 0, 1, None, NOW.text)
    text = "preflight: 3 of 4 agents did not answer (2 unreachable, 1 tls); nothing was sent"
    assert (decision.error_msg, decision.status_reason) == (text, f"{text}; such as node edge-3: unreachable it is")


@pytest.mark.parametrize(("strategy", "most"), [
    ({}, 0), ({"max_failed": 2}, 2), ({"max_failed": "30%"}, 3), ({"max_failed": 9, "max_failed_total": 1}, 1),
    ({"max_failed_total": "25%"}, 2)])
def test_so_many_may_be_silent_as_the_total_limit_says_else_the_one_of_a_batch(strategy, most):
    limits = PREFLIGHT._replace(**strategy)
    for count in (most, most + 1):
        nodes = [silent(n) if n > 10 - count else answered(n) for n in range(1, 11)]
        decision = decide(nodes, strategy=limits)
        assert decision.status == ("running" if count == most else "failed")
        assert len(sends(decision)) == (10 if count == most else 0)  # the tolerated ones are dispatched as well
    if most:
        assert f"{most + 1} of 10 agents did not answer, at most {most} may (" in decision.error_msg


def test_a_tolerated_silent_node_begins_its_dispatch_anew():
    decision = decide([silent(1, errors=2, last_error="x", last_kind="tls")],
                      strategy=PREFLIGHT._replace(max_failed=1))
    sent = decision.sends[0].node
    assert (sent.errors, sent.last_error, sent.last_kind, sent.end, sent.attempts) == (0, "", "", None, 1)


def test_on_exceed_pause_waits_for_a_person_before_batch_1():
    strategy = PREFLIGHT._replace(on_exceed="pause")
    decision = decide([silent(1), answered(2)], strategy=strategy)
    assert (decision.status, decision.changes, decision.sends) == ("paused", (), ())
    text = ("paused before batch 1: preflight: 1 of 2 agents did not answer (1 unreachable); nothing was sent: resume "
            "to ask again, resume and accept the failures to go on, or cancel")
    assert decision.status_reason == text
    # as its driver sees it once more before it lets go
    assert decide([silent(1), answered(2)], "paused", strategy=strategy).status_reason == text


def test_on_exceed_rollback_ends_it_like_fail_as_nothing_was_sent():
    decision = decide([silent(1), answered(2)], strategy=PREFLIGHT._replace(on_exceed="rollback"))
    assert (decision.status, decision.sends, decision.rolls_back) == ("failed", (), False)
    assert moves(decision) == {1: ("pending", "failed"), 2: ("pending", "skipped")}


def test_a_pause_and_a_freeze_ask_nobody_and_their_time_does_not_count():
    freeze = rc.Freeze(True, "lunch", "anna")
    assert decide([node(1)], freeze=freeze).sends == ()
    assert decide([node(1)], "paused", release={"paused_by": "anna"}).sends == ()
    # also too many silent ones change nothing while a person's pause lasts
    paused = decide([silent(1)], "paused", release={"paused_by": "anna"})
    assert (paused.status, paused.changes) == ("paused", ())
    asked = rc.NodeIndex([node(1, next_op=rc.PING, deadline=NOW.elapsed + 600), node(2)])
    assert [n.deadline for n in rc.kept_from_dispatch(asked, 30.0)] == [NOW.elapsed + 630]


def test_a_cancel_does_not_wait_for_answers():
    decision = decide([answered(1), node(2, in_flight=True, next_op=rc.PING)], "cancelling")
    assert (decision.status, moves(decision)) == ("cancelled", {1: ("pending", "skipped"), 2: ("pending", "skipped")})


def test_the_preflight_ends_when_a_node_would_have_to():
    deadline = NOW.elapsed + 600
    nodes = [answered(1), node(2, next_op=rc.PING, deadline=deadline, errors=1, last_kind="tls", last_error="bad",
                               due=NOW.elapsed + 1000),
             node(3), node(4, next_op=rc.PING, deadline=deadline, in_flight=True)]
    assert decide(nodes, now=later(599), slots=0).wake_at == deadline
    assert decide(nodes, now=later(601)).changes == ()  # a request that is under way is waited for
    decision = decide([*nodes[:3], answers(nodes[3])], now=later(601))
    assert decision.status == "failed"
    assert {n.node_id: (n.error_kind, n.error_msg) for n in decision.nodes if n.status == "failed"} == {
        2: ("tls", "no answer within 600 s: bad"),
        3: ("deadline", "not asked within 600 s: no slot was free (AGENT_CONCURRENCY)")}


def test_an_answer_for_a_node_that_is_no_longer_pending_changes_nothing_about_it():
    running = node(1, "running", in_flight=True)
    after = answers(running, "unreachable")
    assert (after.in_flight, after.end, after.errors, after.next_op) == (False, None, 0, rc.QUERY)


def test_the_questions_of_a_large_release_cost_little():
    nodes = rc.NodeIndex([node(n) if n % 2 else answered(n) for n in range(1, 10_001)])
    began = time.process_time()
    for _ in range(3):
        rc.decide(rc.Situation(release(), nodes, NOW, POLICY, PREFLIGHT, 64))
    assert (time.process_time() - began) / 3 < 0.25  # 0.02 s on an idle core


# -- with agents -------------------------------------------------------------------------------------

def create(world: World, **strategy: object) -> rc.Release:
    return world.store.releases.create(rc.ReleaseRequest(
        payload=SITES, strategy={"preflight": True, **strategy}), "tests").release


def kinds(world: World, made: rc.Release) -> list[tuple[str, str, int]]:
    return [(n.status, n.error_kind, n.attempts) for n in nodes_of(world.store, made)]


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
def test_all_answer_and_the_release_goes_out(world, protocol):
    world.nodes(3, protocol)
    made = create(world)
    world.drain()
    assert world.store.releases.get(made.id).status == "success"
    assert world.runs() == [1, 1, 1]
    asked = ["POST /agent/v1/tasks/execute"] if protocol == "execute" else ["GET /tasks/releasectl-ping"]
    assert [agent.requests[:1] for agent in world.fleet.agents] == [asked] * 3


def test_a_dead_agent_ends_it_before_anything_was_sent(world):
    world.nodes(3)
    world.agent(3).set(mode="refuse")
    made = create(world, retries=1)
    world.drain()
    ended = world.store.releases.get(made.id)
    assert (ended.status, ended.failed_nodes, ended.skipped_nodes) == ("failed", 1, 2)
    assert ended.error_msg == "preflight: 1 of 3 agents did not answer (1 unreachable); nothing was sent"
    assert kinds(world, made) == [("skipped", "", 0), ("skipped", "", 0), ("failed", "unreachable", 0)]
    assert [agent.dispatches for agent in world.fleet.agents] == [0, 0, 0]
    assert re.search(r"\(tried 2 times\)$", nodes_of(world.store, made)[2].error_msg)
    assert_books_balance(world.store, made.id)
    # one commit: the events of the end are in a row, and of one moment
    events = world.store.releases.events(made.id)
    assert {event.at for event in events if event.to_status in ("failed", "skipped")} == {ended.finished_at}
    # nothing was touched: there is nothing to roll back
    with pytest.raises(rc.AppError, match=f"nothing to roll back: release {made.id} changed no node"):
        world.store.releases.rollback(made.id, "anna")
    with world.store.database.transaction() as tx:
        assert {level.drift for level in rc.levels(tx, rc.all_nodes(tx)).values()} == {"none"}
    # and a retry is for all of them, with the same question
    world.agent(3).set(mode="normal")
    again = world.store.releases.retry(made.id, "anna").release
    world.drain()
    assert (world.store.releases.get(again.id).status, rc.parse_json(again.strategy)["preflight"]) == ("success", True)


@pytest.mark.parametrize(("behaviour", "kind", "message"), [
    ({"mode": "status", "httpStatus": 404, "businessCode": 0}, "protocol", "is no tasks agent: it answered HTTP 404"),
    ({"mode": "status", "httpStatus": 503}, "http", "answered HTTP 503"),
    ({"mode": "notJson"}, "protocol", "is no tasks agent: it answered HTTP 200"),
    ({"mode": "hang"}, "timeout", "did not answer within 1 s"),
    ({"mode": "hangTls"}, "timeout", "did not finish the TLS handshake within 1 s"),
    ({"mode": "drop"}, "unreachable", "cut the connection")])
def test_an_agent_that_answers_otherwise_is_silent(world, behaviour, kind, message):
    world.nodes(2)
    world.agent(2).set(**behaviour)
    made = create(world, retries=0)
    world.drain(AGENT_REQUEST_TIMEOUT_SEC=1, AGENT_CONNECT_TIMEOUT_SEC=1)
    assert kinds(world, made) == [("skipped", "", 0), ("failed", kind, 0)]
    assert message in nodes_of(world.store, made)[1].error_msg
    assert world.runs() == [0, 0]


def test_what_was_left_of_a_limit_is_told_as_people_read_it():
    assert [rc.tenths(seconds) for seconds in (0.9991, 1.0, 0.31, 15.249, 600.0, 0.004)] == [
        "1", "1", "0.3", "15.2", "600", "0.1"]


@pytest.mark.parametrize("entered", ["tasks", "execute"])
def test_an_agent_of_the_other_dialect_is_silent_and_named(world, entered):
    world.nodes(2, "execute" if entered == "tasks" else "tasks")
    sql(world.store, "UPDATE nodes SET agent_protocol = ? WHERE id = 2", entered)
    made = create(world, retries=0)
    world.drain()
    assert kinds(world, made) == [("skipped", "", 0), ("failed", "protocol", 0)]
    assert f"is no {entered} agent" in nodes_of(world.store, made)[1].error_msg
    assert world.runs() == [0, 0]


def test_a_wrong_certificate_is_silent_on_either_side(world, tmp_path, certs):
    world.nodes(2)
    other = make_certs(tmp_path / "other", "127.9.9.9")
    made = create(world, retries=0)
    shutil.copy(certs / "ca.crt", tmp_path / "ca.crt")
    # a client certificate of another CA: the agents refuse it
    world.drain(CONTROL_CERT=other / "control.crt", CONTROL_KEY=other / "control.key",
                CONTROL_CA=tmp_path / "ca.crt")
    assert kinds(world, made) == [("failed", "tls", 0)] * 2
    assert "refused our client certificate" in nodes_of(world.store, made)[0].error_msg
    made = create(world, retries=0)
    world.drain(CONTROL_CA=other / "ca.crt")  # the agents' certificates are of another CA
    assert kinds(world, made) == [("failed", "tls", 0)] * 2
    assert world.store.releases.get(made.id).error_msg == (
        "preflight: 2 of 2 agents did not answer (2 tls); nothing was sent")
    assert world.runs() == [0, 0]


def test_tolerated_silent_nodes_get_their_dispatch(world):
    world.nodes(3)
    world.agent(3).set(mode="status", httpStatus=503, times=1)
    made = create(world, retries=0, maxFailedTotal=1)
    world.drain()
    assert statuses(world.store, made.id) == ["success"] * 3
    assert world.runs() == [1, 1, 1]


def test_it_pauses_before_batch_1_and_resume_asks_again_or_goes_on_without(world):
    world.nodes(2)
    world.agent(2).set(mode="refuse")
    made = create(world, retries=0, onExceed="pause", maxFailed=0)
    world.drain()
    paused = world.store.releases.get(made.id)
    assert (paused.status, paused.paused_by, world.runs()) == ("paused", "", [0, 0])
    assert "resume to ask again" in paused.status_reason
    assert world.store.releases.is_exceeded(made.id)
    found = world.store.claims.why(made.id, 600.0).stopped_by
    assert found is not None
    assert (found.name, found.mend) == ("pause", f"releasectl resume {made.id}")

    asked = len(world.agent(1).requests)
    world.store.releases.act("resume", made.id, "anna")
    world.drain()
    assert (world.store.releases.get(made.id).status, world.runs()) == ("paused", [0, 0])
    assert len(world.agent(1).requests) == asked + 1

    world.store.releases.act("resume", made.id, "anna", accept_failures=True)
    world.drain()
    assert world.runs() == [1, 0]
    assert kinds(world, made) == [("success", "", 1), ("failed", "unreachable", 1)]
    assert world.agent(1).requests[asked + 1].startswith("POST /tasks/dispatch")
    assert "goes on though agents did not answer the preflight" in "".join(
        event.detail for event in world.store.releases.events(made.id))


def test_accepting_failures_where_a_person_paused_does_not_leave_the_preflight_out(world):
    world.nodes(2)
    made = create(world, onExceed="pause")
    world.store.releases.act("pause", made.id, "anna")
    world.store.releases.act("resume", made.id, "anna", accept_failures=True)
    world.drain()
    assert world.agent(1).requests[0] == "GET /tasks/releasectl-ping"


def test_a_new_owner_asks_again_where_nothing_was_sent(world, monkeypatch):
    monkeypatch.setattr(rc, "STOP_GRACE_S", 0.5)
    world.nodes(2)
    world.agent(2).set(mode="hang")
    made = create(world)
    executor = world.executor()
    tick = threading.Thread(target=executor.tick)
    tick.start()
    eventually(lambda: len(world.agent(1).requests) == 1 and world.agent(2).requests)
    executor.close()  # as a process that ends
    tick.join(30)
    world.agent(2).set(mode="normal")
    sql(world.store, "UPDATE release_tasks SET claim_owner = '', claim_expires_at = NULL")
    world.drain()
    assert statuses(world.store, made.id) == ["success", "success"]
    assert [r for r in world.agent(1).requests if "ping" in r] == ["GET /tasks/releasectl-ping"] * 2


def test_no_more_questions_are_under_way_than_requests_may_be(world):
    world.nodes(6)
    for agent in world.fleet.agents:
        agent.set(mode="hang")
    made = create(world, retries=0)
    drain = threading.Thread(target=world.drain, kwargs={"AGENT_CONCURRENCY": 2, "AGENT_REQUEST_TIMEOUT_SEC": 1})
    drain.start()
    busiest = 0
    while drain.is_alive():
        busiest = max(busiest, sum(agent.in_flight for agent in world.fleet.agents))
        time.sleep(0.02)  # a sample, not a wait
    assert busiest == 2
    assert kinds(world, made) == [("failed", "timeout", 0)] * 6


def test_a_preflight_holds_up_no_other_release(world):
    world.nodes(4)
    for number in (1, 2, 3):
        world.agent(number).set(mode="hang")
    slow = world.store.releases.create(rc.ReleaseRequest("a", payload=SITES, node_ids=[1, 2, 3],
                                                         strategy={"preflight": True}), "tests").release
    quick = world.store.releases.create(rc.ReleaseRequest("b", payload=SITES, node_ids=[4]), "tests").release
    executor = world.executor(AGENT_CONCURRENCY=2, AGENT_REQUEST_TIMEOUT_SEC=3)
    drain = threading.Thread(target=executor.drain)
    drain.start()
    eventually(lambda: world.store.releases.get(quick.id).status == "success")
    now = world.store.releases.get(slow.id)
    assert (now.status, world.runs()) == ("running", [0, 0, 0, 1])
    found = eventually(lambda: next((one for one in world.store.claims.why(slow.id, 600.0).steps
                                     if one.name == "preflight"), None))
    assert (found.state, found.text) == ("ok", "asking all 3 agents before batch 1: 0 answered")
    order = [one.name for one in world.store.claims.why(slow.id, 600.0).steps]
    assert order.index("preflight") < order.index("nodes")
    world.store.releases.act("cancel", slow.id, "anna")
    assert world.store.releases.get(slow.id).status == "cancelled"
    executor.close()
    drain.join(30)


# -- what is shown -----------------------------------------------------------------------------------

def test_the_plan_says_it_and_a_bad_value_is_refused(world, quick, client):
    world.nodes(3)
    quick.settings.update(DATABASE_URL=world.url)
    shown = quick.ok("create", "--preflight", "--max-failed", "50%", "--plan")
    assert "asks every agent before batch 1; of these may not answer, at most: 1" in shown.out
    assert quick.ok("create", "--preflight", "--plan", "--json").json["preflight"] == {"maxSilent": 0}
    assert quick.ok("create", "--plan", "--json").json["preflight"] is None
    made = quick.ok("create", "--preflight", "--json").json["releaseId"]
    assert "all agents are asked first, at most 0 may be silent" in world.store.releases.events(made)[0].detail
    answer = client("POST", "/api/v1/releases", {"strategy": {"preflight": 1}})
    assert (answer.status, answer.message) == (400, "strategy: preflight 1 must be true or false")


def test_check_agents_asks_them_and_makes_nothing(cli, world):
    world.nodes(3)
    cli.settings.update(DATABASE_URL=world.url, AGENT_RETRIES="0", **mtls(world.certs))
    found = cli("create", "--check-agents", "--json")
    assert found.code == 0
    assert [(item["name"], item["ok"]) for item in found.json["items"]] == [(f"edge-{n}", True) for n in (1, 2, 3)]
    world.agent(2).set(mode="refuse")
    world.agent(3).set(mode="status", httpStatus=404, businessCode=0)
    found = cli("create", "--check-agents")
    assert found.code == 69
    assert re.search(r"(?m)^edge-2 +unreachable +\S", found.out)
    assert found.out.splitlines()[-1] == "1 of 3 agents answered: 1 protocol, 1 unreachable"
    assert "edge-1" not in found.out
    assert cli("create", "--check-agents", "--node", "edge-1").code == 0
    found = cli("create", "--check-agents", "--preflight", "--max-failed", "2")  # such a release would go
    assert (found.code, found.out.splitlines()[-1]) == (
        0, "1 of 3 agents answered: 1 protocol, 1 unreachable; at most 2 may be silent")
    assert re.search(r"(?m)^edge-2 +unreachable +\S", found.out)
    assert cli("create", "--check-agents", "--max-failed", "2", "--max-failed-total", "1").code == 69
    world.agent(2).set(mode="normal")
    world.agent(3).set(mode="status", httpStatus=503, businessCode=0, times=1)
    assert cli("create", "--check-agents", "--retries", "1").code == 0  # it is asked again, as by a preflight
    assert world.store.releases.page().total == 0
    assert world.runs() == [0, 0, 0]
