"""The verdict: everything that is wrong, worst first, each with since when and its mend (contract sections 5 and 8)."""
from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Callable

import pytest
from conftest import leave_out
from lab import AS_OTHERS, add_nodes, beside, misfit, new_release, sql
from test_again import ended, good, settle

import releasectl as rc


def problems(store: rc.Store, *certificates: rc.CertificateState) -> list[rc.Problem]:
    return list(store.overview.read(certificates).problems)


def kinds(store: rc.Store) -> list[str]:
    return [problem.kind for problem in problems(store)]


@pytest.fixture
def fresh(store, monkeypatch):
    """A store that reads everything anew each time, and for which an executor looks for work."""
    monkeypatch.setattr(rc, "RARE_READ_REST", 0)
    live(store, "host-z:9:z")
    return store


def nobody_looks(store: rc.Store) -> None:
    sql(store, "DELETE FROM executors")


def live(store: rc.Store, owner: str = "host-a:1:x") -> None:
    """Let an executor have looked for work just now."""
    store.claims.note_executor(owner, owner.partition(":")[0], "serve", 3600.0, "", True)


# -- each kind of problem, made for real ------------------------------------------------------------

def test_all_is_well_where_nothing_is_to_do_and_each_node_runs_what_it_should(fresh):
    assert fresh.overview.read([]).text == "all is well: nothing to do"
    add_nodes(fresh, 2)
    good(fresh, "A")
    assert problems(fresh) == []


def test_the_text_says_what_is_under_way(fresh):
    live(fresh)
    add_nodes(fresh, 1)
    first, _ = new_release(fresh), new_release(fresh)
    fresh.claims.claim(first.id, "host-a:1:x", 30.0)
    assert fresh.overview.read([]).text == "all is well: running release 1 (v1), 1 waiting"
    sql(fresh, "UPDATE release_tasks SET rollback_of = 2 WHERE id = 1")
    assert fresh.overview.read([]).text == "all is well: running release 1 (v1), a rollback of release 2, 1 waiting"


def test_no_executor_is_a_problem_where_something_is_to_do(fresh):
    nobody_looks(fresh)
    add_nodes(fresh, 1)
    new_release(fresh)
    [problem] = problems(fresh)
    assert problem == rc.Problem("executor", "no executor is running (none was seen for a day): start `serve`; "
                                 "nobody works on 1 release", "releasectl serve", fresh.releases.get(1).created_at)
    live(fresh)
    assert problems(fresh) == []
    fresh.claims.note_executor("host-a:1:x", "host-a", "serve", 3600.0, "CONTROL_CERT is not set", False)
    [problem] = problems(fresh)
    assert (problem.text, problem.mend) == ("host-a can't dispatch: CONTROL_CERT is not set; nobody works on 1 release",
                                            "releasectl check")
    fresh.releases.act("pause", 1, "anna")  # what waits for a person needs nobody else
    assert kinds(fresh) == ["paused", "idle"]


@pytest.mark.parametrize(("row", "text", "mend", "has_since"), [
    (None, "no executor is running (none was seen for a day): start `serve`", "releasectl serve", False),
    (("serve", 100, 15, ""), "no executor is running (last seen 2 min ago: a pid 1): start `serve`", "releasectl serve",
     True),
    (("serve", 5, 0, ""), "no executor is running (stopped 5 s ago: a pid 1): start `serve`", "releasectl serve", True),
    (("serve", 5, 15, "the lease thread hangs"), "a can't dispatch: the lease thread hangs", "releasectl check", False),
    (("tick", 310, 315, ""), "", "", False),  # cron starts the next one soon
    (("tick", 320, 315, ""), "no executor is running (last seen 5 min ago: a pid 1): start `serve`", "releasectl serve",
     True)])
def test_all_is_not_well_while_nobody_looks_for_work(fresh, row, text, mend, has_since):
    nobody_looks(fresh)
    at = rc.utc_text(time.time() - row[1]) if row else ""
    if row:
        sql(fresh, "INSERT INTO executors (owner, host, kind, started_at, seen_at, period_sec, error) VALUES ('a:1:x', "
                   "'a', ?, ?, ?, ?, ?)", row[0], at, at, row[2], row[3])
    found = problems(fresh)
    assert found == ([rc.Problem("idle", text, mend, at if has_since else None)] if text else [])
    assert all(problem.severity == "warning" for problem in found)


def ignore(store: rc.Store, seconds: float, **started: float) -> None:
    """Let executors have looked for work, and a release have been there, for so long."""
    sql(store, "UPDATE executors SET started_at = ?", rc.utc_text(time.time() - started.get("started", 500)))
    sql(store, "UPDATE release_tasks SET created_at = ?, updated_at = ?", *[rc.utc_text(time.time() - seconds)] * 2)


def test_a_pending_release_that_nobody_takes_is_a_problem_though_an_executor_lives(fresh):
    add_nodes(fresh, 1)
    release = new_release(fresh)
    for seconds, started, expected in ((55, 500, []), (400, 30, []), (300, 500, ["unattended"])):
        ignore(fresh, seconds, started=started)
        assert kinds(fresh) == expected
    [problem] = problems(fresh)
    assert problem[1:3] == (f"{release}: nobody has taken it for 5 min, though host-z pid 9 looks for work: its log "
                            "says why", "releasectl why 1")
    assert abs(rc.epoch_or(problem.since, 0.0) - time.time() + 300) < 30
    why = fresh.claims.why(release.id, 600.0)
    assert (why.stopped_by.name, why.stopped_by.mend) == ("executor", "releasectl check")
    assert why.text in problem.text
    fresh.releases.set_freeze(True, "anna", "x")
    assert kinds(fresh) == ["frozen"]


@pytest.mark.parametrize("strategy", [{"startAt": "2100-01-01T00:00:00Z"}, {}])
def test_a_release_that_waits_for_its_time_or_another_one_is_not_ignored(fresh, strategy):
    add_nodes(fresh, 1)
    if not strategy:
        fresh.claims.claim(new_release(fresh).id, "host-z:9:z", 300.0)
    release = new_release(fresh, strategy=strategy)
    ignore(fresh, 300)
    assert problems(fresh) == []
    assert fresh.claims.why(release.id, 600.0).stopped_by is None


def test_which_releases_could_start_is_not_read_anew_for_each_verdict(fresh, monkeypatch):
    monkeypatch.setattr(rc, "RARE_READ_REST", 1e6)
    add_nodes(fresh, 1)
    reads = []
    runnable = fresh.queue.runnable
    monkeypatch.setattr(fresh.queue, "runnable", lambda tx: reads.append(tx) or runnable(tx))
    new_release(fresh)
    ignore(fresh, 300)
    assert kinds(fresh) == kinds(fresh) == ["unattended"]
    assert len(reads) == 1
    new_release(fresh)
    assert kinds(fresh) == ["unattended"]
    assert len(reads) == 2


def test_a_release_that_waits_for_an_approval_is_not_ignored(fresh):
    add_nodes(fresh, 1)
    release = new_release(fresh, approval=rc.WANTED)
    ignore(fresh, 300)
    assert kinds(fresh) == ["approval"]
    why = fresh.claims.why(release.id, 600.0)
    assert (why.stopped_by.name, why.stopped_by.mend) == ("approval", f"releasectl approve {release.id}")
    assert {step.name: step.state for step in why.steps}["executor"] == "ok"
    fresh.approvals.approve(release.id, rc.Act("bob", rc.VIA_API, token="bob"))
    assert kinds(fresh) == []
    ignore(fresh, 300)
    assert kinds(fresh) == ["unattended"]


def test_a_release_that_ticks_leave_between_them_is_not_ignored_unless_they_do_not_take_it(fresh):
    nobody_looks(fresh)
    add_nodes(fresh, 1)
    release = new_release(fresh)
    fresh.claims.note_executor("a:1:x", "a", "tick", 15.0, "", True)
    sql(fresh, "UPDATE executors SET period_sec = 315")
    ignore(fresh, 200, started=290)
    sql(fresh, "UPDATE executors SET seen_at = started_at")
    assert problems(fresh) == []
    ignore(fresh, 400, started=290)
    assert kinds(fresh) == ["unattended"]
    assert fresh.claims.why(release.id, 600.0).stopped_by.name == "executor"


def test_two_enabled_nodes_with_one_address_are_a_problem(fresh):
    first, second = add_nodes(fresh, 2)
    sql(fresh, "UPDATE nodes SET main_ip = ? WHERE id = ?", first.main_ip, second.id)
    [problem] = problems(fresh)
    assert problem[:3] == ("twins", f"nodes {first.name} and {second.name} have one address, {first.main_ip}:8443: "
                           "disable one of them", f"releasectl node set {second.name} --disable")
    fresh.nodes.update(second.id, {"enabled": 0})
    assert problems(fresh) == []


def test_a_running_release_whose_owner_died_is_a_problem_though_others_live(fresh):
    nobody_looks(fresh)
    add_nodes(fresh, 1)
    release = new_release(fresh)
    live(fresh, "host-b:2:y")
    fresh.claims.claim(release.id, "host-b:2:y", 30.0)
    live(fresh)
    assert problems(fresh) == []
    sql(fresh, "UPDATE executors SET seen_at = ?, period_sec = 12 WHERE host = 'host-b'",
        rc.utc_text(time.time() - 15))
    [problem] = problems(fresh)
    assert (problem.kind, problem.mend, problem.release_id) == ("unattended", "releasectl why 1", 1)
    assert problem.text.startswith("release 1 (v1): nobody works on it: host-b pid 2 was last seen 15 s ago; ")
    assert 14 < time.time() - rc.epoch_or(problem.since, 0.0) < 20


def test_a_paused_release_waits_for_a_person(fresh):
    add_nodes(fresh, 1)
    new_release(fresh)
    fresh.releases.act("pause", 1, "anna", "look at the graphs")
    [problem] = problems(fresh)
    assert problem.text == f"release 1 (v1) waits for a person: {fresh.releases.get(1).status_reason}"
    assert (problem.kind, problem.severity, problem.mend) == ("paused", "warning", "releasectl why 1")
    assert problem.since == fresh.releases.events(1)[-1].at
    sql(fresh, "UPDATE release_tasks SET updated_at = '2100-01-01T00:00:00.000Z'")  # as each node that ends does
    assert problems(fresh) == [problem]
    fresh.releases.set_freeze(True, "anna", "the match")
    assert fresh.releases.events(1)[-1].event == "frozen"
    assert [found for found in problems(fresh) if found.kind == "paused"] == [problem]


def test_a_paused_release_needs_an_owner_while_nodes_are_in_flight(fresh):
    nobody_looks(fresh)
    add_nodes(fresh, 1)
    release = new_release(fresh)
    live(fresh)
    fresh.claims.claim(release.id, "host-a:1:x", 30.0)
    sql(fresh, "UPDATE release_task_nodes SET status = 'running'")
    fresh.releases.act("pause", release.id, "anna")
    assert kinds(fresh) == ["paused"]
    fresh.claims.end_executor("host-a:1:x")
    assert kinds(fresh) == ["executor", "paused"]


def test_a_running_release_that_nobody_claims_is_a_problem(fresh):
    add_nodes(fresh, 1)
    release = new_release(fresh)
    live(fresh)
    fresh.claims.drop(fresh.claims.claim(release.id, "host-a:1:x", 30.0))
    assert kinds(fresh) == []
    ignore(fresh, 75)
    assert kinds(fresh) == ["unattended"]
    assert problems(fresh)[0].text.startswith("release 1 (v1): nobody has taken it for 75 s, though host-")


def test_an_executor_with_a_thread_that_hangs_works_on_nothing(fresh):
    nobody_looks(fresh)
    add_nodes(fresh, 1)
    release = new_release(fresh)
    live(fresh)
    fresh.claims.claim(release.id, "host-a:1:x", 30.0)
    fresh.claims.note_executor("host-a:1:x", "host-a", "serve", 3600.0, "the driver of release 1 hangs", False)
    [problem] = problems(fresh)
    assert problem.text == "host-a can't dispatch: the driver of release 1 hangs; nobody works on 1 release"
    assert fresh.claims.why(release.id, 600.0).stopped_by.name == "executor"


def test_since_when_nobody_works_is_not_before_there_was_something_to_do(fresh):
    nobody_looks(fresh)
    add_nodes(fresh, 1)
    live(fresh)
    sql(fresh, "UPDATE executors SET seen_at = ?", rc.utc_text(time.time() - 50_000))
    new_release(fresh)
    [problem] = problems(fresh)
    assert problem.since == fresh.releases.get(1).created_at


def test_a_freeze_is_a_problem_until_it_is_lifted(fresh):
    fresh.releases.set_freeze(True, "anna", "the match")
    [problem] = problems(fresh)
    assert problem[:3] == ("frozen", "frozen by anna: the match", "releasectl freeze off")
    assert problem.since == fresh.releases.freezes().everything.at
    fresh.releases.set_freeze(False, "anna")
    assert problems(fresh) == []


def test_notifications_that_do_not_get_out_are_a_problem(fresh):
    at = rc.utc_text(time.time() - 400)
    sql(fresh, "INSERT INTO notifications (kind, at, next_at, last_error) VALUES ('frozen', ?, ?, 'it answered 500')",
        at, at)
    [problem] = problems(fresh)
    assert problem == rc.Problem("notifications", "1 notification has not got out: it answered 500",
                                 "releasectl check --notify", at)
    sql(fresh, "UPDATE notifications SET at = ?", rc.utc_text(time.time() - 200))
    assert problems(fresh) == []


def test_nodes_that_do_not_run_what_they_should_are_problems(fresh):
    add_nodes(fresh, 4)
    good(fresh, "A")
    sql(fresh, "UPDATE release_tasks SET selection = '{}'")
    fresh.nodes.update(2, {"status": "maintenance"})
    behind = ended(fresh, "B", "success", "success", "success")
    failed = ended(fresh, "C", "success", "failed", "failed")
    lost_at = rc.utc_text(time.time() + 5)
    sql(fresh, "UPDATE release_task_nodes SET error_kind = 'abandoned', reached = 1, finished_at = ? "
               "WHERE release_task_id = ? AND node_id = 4", lost_at, failed.id)
    sql(fresh, "UPDATE release_task_nodes SET error_kind = 'agent_failed', reached = 1 WHERE release_task_id = ? AND "
               "node_id = 3", failed.id)
    found = {problem.kind: problem for problem in problems(fresh)}
    assert list(found) == ["failed", "ahead", "unknown", "behind"]
    assert found["ahead"].text == (
        "1 node runs release 3 and should run release 2: edge-1")
    assert found["unknown"].text == ("edge-4 may run release 2 or 3: how what release 3 sent it ended is not known")
    assert found["behind"].text == "1 node runs an older payload than it should: edge-2; it is not online"
    assert found["behind"].since == fresh.releases.get(behind.id).finished_at
    assert found["unknown"].since == lost_at
    assert found["behind"].mend == "releasectl node list --drift behind"  # a catch-up leaves it out
    fresh.nodes.update(2, {"status": "online"})
    assert {problem.kind: problem.mend for problem in problems(fresh)}["behind"] == "releasectl catch-up"


def test_a_node_that_is_new_is_not_behind_since_before_it_was_there(fresh):
    add_nodes(fresh, 1)
    good(fresh, "A")
    sql(fresh, "UPDATE release_tasks SET selection = '{}', finished_at = '2020-01-01T00:00:00.000Z'")
    node = add_nodes(fresh, 1, first=2)[0]
    [problem] = problems(fresh)
    assert (problem.kind, problem.since) == ("behind", node.created_at)


# -- failures count until something made up for them ---------------------------------------------------

def test_a_success_on_one_node_after_two_failures_makes_up_for_that_node_only(fresh):
    add_nodes(fresh, 3)
    good(fresh, "A")
    ended(fresh, "B", "failed", "skipped", "skipped")
    ended(fresh, "C", "failed", "skipped", "skipped")
    good(fresh, "D", 1)
    assert [problem.release_id for problem in problems(fresh) if problem.kind == "failed"] == [3, 2]
    good(fresh, "E")
    assert problems(fresh) == []


def test_a_failed_target_is_not_hidden_behind_newer_releases_of_another(fresh):
    add_nodes(fresh, 1)
    ended(fresh, "A", "failed", target="dns")
    for _ in range(22):
        good(fresh, "B")
    [problem] = problems(fresh)
    assert problem.text.startswith("release 1 (v1) of dns ended failed")
    assert (problem.mend, problem.since) == ("releasectl retry 1 --plan", fresh.releases.get(1).finished_at)


def again(store: rc.Store, verb: str) -> None:
    release = getattr(store.releases, verb)(2, "anna").release
    settle(store, release, *["success"] * release.total_nodes)


def test_the_rollback_of_a_later_release_makes_up_for_the_nodes_that_an_older_failure_never_reached(fresh):
    add_nodes(fresh, 3)
    good(fresh, "A")
    ended(fresh, "B", "failed", "skipped", "skipped")
    later = ended(fresh, "C", "failed", "skipped", "skipped")
    assert [p.release_id for p in problems(fresh) if p.kind == "failed"] == [3, 2]
    release = fresh.releases.rollback(later.id, "anna").release
    settle(fresh, release, *["success"] * release.total_nodes)
    assert "failed" not in kinds(fresh)


def test_the_rollback_of_a_later_release_does_not_make_up_for_a_node_that_failed(fresh):
    add_nodes(fresh, 2)
    good(fresh, "A")
    ended(fresh, "B", "success", "failed")  # node 2 may run B
    later = ended(fresh, "C", "failed", "skipped")
    settle(fresh, fresh.releases.rollback(later.id, "anna").release, "success")
    assert [p.release_id for p in problems(fresh) if p.kind == "failed"] == [2]


@pytest.mark.parametrize("way", [
    lambda store: again(store, "retry"), lambda store: again(store, "rollback"), lambda store: good(store, "C"),
    lambda store: good(store, "C", 2, 3),
    lambda store: [store.nodes.update(node, {"enabled": 0}) for node in (2, 3)]])
def test_a_failure_is_made_up_for_by_a_retry_a_rollback_a_later_release_or_without_its_nodes(
        fresh: rc.Store, way: Callable[[rc.Store], object]):
    add_nodes(fresh, 3)
    good(fresh, "A")
    ended(fresh, "B", "success", "failed", "skipped")
    assert "failed" in kinds(fresh)
    way(fresh)
    assert "failed" not in kinds(fresh)


def mend_of_failure(store: rc.Store) -> str:
    [problem] = [p for p in problems(store) if p.kind == "failed"]
    return problem.mend


def test_a_failed_release_that_has_no_nodes_counts_until_a_later_one_succeeds(fresh):
    sql(fresh, "INSERT INTO release_tasks (version, status, status_reason) VALUES (7, 'failed', 'it has no nodes')")
    [problem] = problems(fresh)
    assert (problem.kind, problem.mend) == ("failed", "releasectl create --target cdn --payload FILE")
    assert problem.text.endswith("; a retry of all its nodes is refused: release 1 has no online nodes that were "
                                 "failed or skipped")
    add_nodes(fresh, 1)
    good(fresh, "A")
    assert problems(fresh) == []


def test_the_mend_of_a_failure_is_what_is_not_refused(fresh):
    add_nodes(fresh, 2)
    good(fresh, "A")
    ended(fresh, "B", "failed", "failed")
    assert mend_of_failure(fresh) == "releasectl retry 2 --plan"
    good(fresh, "C", 1)  # a retry of both would replace it
    assert mend_of_failure(fresh) == "releasectl retry 2 --node edge-2 --plan"
    fresh.nodes.update(2, {"status": "offline"})
    assert mend_of_failure(fresh) == "releasectl node set edge-2 --status online"
    fresh.nodes.update(2, {"status": "online"})
    sql(fresh, "UPDATE release_tasks SET payload = 'x' WHERE id = 2")  # what went out can't be sent again
    assert mend_of_failure(fresh) == "releasectl create --target cdn --payload FILE"


def test_beside_its_mend_a_failure_has_the_way_back_where_there_is_one(fresh):
    add_nodes(fresh, 2)
    ended(fresh, "A", "failed", "skipped")  # no release before it
    [problem] = [p for p in problems(fresh) if p.kind == "failed"]
    assert (problem.mends, problem.rollback) == ("releasectl retry 1 --plan", "")
    good(fresh, "A")
    ended(fresh, "B", "success", "failed")
    [problem] = [p for p in problems(fresh) if p.kind == "failed"]
    assert (problem.mend, problem.rollback) == ("releasectl retry 3 --plan", "releasectl rollback 3 --plan")
    assert rc.overview_json(fresh.overview.read([]))["problems"][0]["rollback"] == problem.rollback
    assert [(step.name, step.mend) for step in fresh.why(3, 600.0).steps] == [
        ("end", problem.mend), ("rollback", problem.rollback)]
    for node in (1, 2):
        fresh.nodes.update(node, {"status": "offline"})
    [problem] = [p for p in problems(fresh) if p.kind == "failed"]
    assert problem.mends == "releasectl node set edge-2 --status online"  # nobody can go back either


def test_the_mend_of_a_failure_that_can_only_be_rolled_back_is_that(fresh):
    add_nodes(fresh, 1)
    good(fresh, "A")
    ended(fresh, "B", "failed")
    sql(fresh, "UPDATE release_tasks SET payload = 'x' WHERE id = 2")
    assert mend_of_failure(fresh) == "releasectl rollback 2 --plan"


def test_what_ended_since_the_last_look_is_told_however_long_that_holds(store):
    live(store)
    add_nodes(store, 1)
    release = new_release(store)
    store.claims.claim(release.id, "host-a:1:x", 30.0)
    assert kinds(store) == []
    store.overview._failures._holds_until = store.fleet._counts._holds_until = float("inf")
    settle(store, release, "failed")
    assert kinds(store) == ["failed"]


def test_many_problems_of_a_kind_are_counted(fresh):
    add_nodes(fresh, 1)
    for _ in range(23):
        ended(fresh, "A", "failed")
    found = problems(fresh)
    assert len(found) == 21
    assert (found[0].release_id, found[-1].text) == (23, "and 3 more of this kind")


def test_a_success_for_all_nodes_ends_all_failures_before_it_and_costs_no_look_at_them(fresh):
    add_nodes(fresh, 2)
    ended(fresh, "A", "failed", "failed")
    fresh.nodes.update(2, {"status": "offline"})
    release = new_release(fresh, payload={"content": "B"})
    settle(fresh, release, "success")
    assert kinds(fresh) == ["behind"]  # node 2, which is not online


def test_a_later_release_that_failed_too_makes_up_for_nothing(fresh):
    add_nodes(fresh, 2)
    ended(fresh, "A", "failed", "skipped")
    retry = fresh.releases.retry(1, "anna").release
    settle(fresh, retry, "success", "failed")
    assert [problem.release_id for problem in problems(fresh) if problem.kind == "failed"] == [2, 1]


def test_a_release_that_started_late_makes_up_for_one_with_a_higher_id(fresh):
    add_nodes(fresh, 1)
    good(fresh, "A")
    ended(fresh, "B", "failed")
    sql(fresh, "UPDATE release_tasks SET version = 9 WHERE id = 1")
    assert "failed" not in kinds(fresh)


def test_a_partial_release_is_a_warning_and_what_a_person_cancelled_is_none(fresh):
    add_nodes(fresh, 2)
    ended(fresh, "A", "success", "failed")
    sql(fresh, "UPDATE release_tasks SET status = 'partial'")
    assert [p.severity for p in problems(fresh) if p.kind == "partial"] == ["warning"]
    sql(fresh, "UPDATE release_tasks SET status = 'cancelled'")
    assert "partial" not in kinds(fresh)


def test_failures_of_a_release_that_goes_on_are_told(fresh):
    live(fresh)
    add_nodes(fresh, 2)
    release = new_release(fresh)
    fresh.claims.claim(release.id, "host-a:1:x", 30.0)
    sql(fresh, "UPDATE release_task_nodes SET status = 'failed' WHERE node_id = 1")
    sql(fresh, "UPDATE release_tasks SET failed_nodes = 1")
    [problem] = problems(fresh)
    assert (problem.kind, problem.text) == ("failures", "release 1 (v1) is running, 1 node failed")


# -- what only the process knows, and the order ----------------------------------------------------------

LOOKS = rc.ExecutorRow("a:1:x", "a", "serve", rc.utc_text(0), rc.utc_text(0), 15.0, "")


@pytest.mark.parametrize(("found", "kind", "text"), [
    (("CONTROL_CERT", None, None, "run `releasectl check` to see why"), "certificate",
     "CONTROL_CERT can't be used: run `releasectl check` to see why"),
    (("HTTP_CERT", "2026-01-01T00:00:00.000Z", -3.0, ""), "certificate", "HTTP_CERT can't be used: it has expired"),
    (("CONTROL_CERT", "2026-01-01T00:00:00.000Z", 13.5, ""), "expires",
     "CONTROL_CERT is good for 14 days more: renew it"),
    (("CONTROL_CA CRL", "2026-01-01T00:00:00.000Z", 0.5, ""), "expires",
     "CONTROL_CA CRL is good for 12 h more: renew it"),
    (("CONTROL_CERT", "2026-01-01T00:00:00.000Z", 14.5, ""), "", ""),
    (("CONTROL_CA CRL", "2026-01-01T00:00:00.000Z", 1.5, ""), "", "")])
def test_certificates_that_end_are_problems(found, kind, text):
    facts = rc.OverviewFacts(certificates=[rc.CertificateState(*found)], executors=[LOOKS])
    assert [(p.kind, p.text) for p in rc.judge(facts).problems] == ([(kind, text)] if kind else [])


def test_a_row_of_executors_that_a_person_spoiled_spoils_no_verdict(sqlite_world):
    sql(sqlite_world.store, "INSERT INTO executors (owner, host, seen_at, period_sec) VALUES ('a:1:x', 'a', 'abc', 15)")
    assert kinds(sqlite_world.store) == ["idle"]
    release = new_release(sqlite_world.nodes(1).store)
    assert sqlite_world.store.claims.why(release.id, 600.0).stopped_by.name == "executor"


def test_all_problems_are_told_worst_first(fresh):
    add_nodes(fresh, 1)
    ended(fresh, "A", "failed")
    new_release(fresh)
    nobody_looks(fresh)
    fresh.releases.set_freeze(True, "anna", "x")
    expired = rc.CertificateState("HTTP_CERT", None, None, "gone")
    overview = fresh.overview.read([expired])
    found = [problem.kind for problem in overview.problems]
    assert found == ["executor", "certificate", "failed", "frozen"]
    assert overview.text == f"4 problems: {overview.problems[0].text}, and 3 more"
    assert found == [kind for kind in rc.PROBLEM_KINDS if kind in found]
    facts = overview.facts._replace(database_error="the disk is full")
    first, *_ = rc.judge(facts).problems
    assert (first.kind, first.text) == ("database", "the database can't be used: the disk is full")


def test_a_database_that_takes_no_writes_is_the_first_problem(fresh):
    add_nodes(fresh, 1)
    new_release(fresh)
    sql(fresh, "ALTER TABLE health_probe RENAME TO elsewhere")
    with pytest.raises(rc.DatabaseError):
        fresh.state.check_write()
    since = problems(fresh)[0].since
    assert abs(rc.epoch_or(since, 0.0) - time.time()) < 30
    assert [(p.kind, p.since) for p in problems(fresh)] == [("database", since)]
    sql(fresh, "ALTER TABLE elsewhere RENAME TO health_probe")
    fresh.state.check_write()
    nobody_looks(fresh)
    assert kinds(fresh) == ["executor"]


def test_the_verdict_comes_without_a_database_too(tmp_path):
    store = rc.Store(rc.Database(f"sqlite:///{tmp_path}/missing/test.db"))
    [problem] = problems(store)
    assert (problem.kind, problem.severity, problem.mend) == ("database", "error", "releasectl check")
    assert problem.since == problems(store)[0].since is not None


def test_every_kind_of_problem_has_a_headline_in_both_languages():
    titles = [rc.Problem(kind, "x", "", release_id=7).title for kind in rc.PROBLEM_KINDS]
    assert [title for title in titles if rc.in_chinese(title) == title or "{" in title] == []
    assert (titles[4], rc.in_chinese(titles[4])) == ("Release 7 failed", "发布 7 失败")


# -- by the API and the command line ------------------------------------------------------------------------

def test_the_api_tells_the_verdict(client):
    live(client.store)
    assert client.ok("GET", "/api/v1/overview") == {
        "ok": True, "text": "all is well: nothing to do", "activeReleases": 0, "pendingReleases": 0,
        "drift": dict.fromkeys(rc.DRIFTS, 0), "problems": [],
        "nodes": {"right": 0, "payloads": 0, "online": 0, "offline": 0, "maintenance": 0, "disabled": 0}}
    client.store.releases.set_freeze(True, "anna", "the match")
    [problem] = client.ok("GET", "/api/v1/overview")["problems"]
    assert problem == {"kind": "frozen", "severity": "warning", "title": "Frozen: nothing is dispatched",
                       "text": "frozen by anna: the match",
                       "since": client.store.releases.freezes().everything.at, "mend": "releasectl freeze off",
                       "releaseId": None, "rollback": ""}


def test_a_verdict_of_well_says_how_many_nodes_run_what_they_should_and_who_gets_no_release(client, monkeypatch):
    store = client.store
    monkeypatch.setattr(rc, "RARE_READ_REST", 0)
    live(store)
    add_nodes(store, 4)

    def verdict() -> tuple[str, list[int]]:
        found = client.ok("GET", "/api/v1/overview")
        assert misfit(found, document["components"]["schemas"]["Overview"], document) == ""
        return found["text"], list(found["nodes"].values())

    document = rc.openapi_document()
    assert verdict() == ("all is well: nothing to do", [0, 0, 4, 0, 0, 0])
    good(store, "A", 1, 2, 3)
    assert verdict() == ("all is well: 3 of 4 nodes run what they should, no release is for the others yet",
                         [3, 1, 4, 0, 0, 0])
    good(store, "B")
    assert verdict() == ("all is well: all 4 nodes run what they should", [4, 1, 4, 0, 0, 0])
    good(store, "C", 4)
    assert verdict() == ("all is well: all 4 nodes run what they should, 2 payloads among them", [4, 2, 4, 0, 0, 0])
    good(store, "B")
    store.nodes.update(1, {"status": "maintenance"})
    store.nodes.update(2, {"enabled": 0})
    store.nodes.update(3, {"enabled": 0, "status": "maintenance"})
    assert verdict() == ("all is well: all 2 nodes run what they should; 1 node in maintenance, 2 disabled",
                         [2, 1, 1, 0, 1, 2])
    new_release(store, payload={"content": "D"}, node_ids=[4])
    assert verdict()[0] == "all is well: 1 waiting; 1 node in maintenance, 2 disabled"


def test_a_node_that_a_good_release_is_no_longer_for_is_not_said_to_run_what_failed(fresh):
    fresh.nodes.import_all([{"name": f"edge-{n}", "main_ip": f"10.0.0.{n}",
                             "labels": '{"region":"%s"}' % ("eu" if n < 3 else "us")} for n in (1, 2, 3)])
    good(fresh, "A")
    settle(fresh, new_release(fresh, payload={"content": "B"}, labels={"region": "eu"}), "success", "success")
    assert problems(fresh) == []
    fresh.nodes.update(2, {"labels": '{"region":"us"}'})
    assert [p.text for p in problems(fresh)] == [
        "1 node runs release 2 and should run release 1: edge-2"]


def test_what_a_first_release_left_that_was_cancelled_is_said_of_that_release(fresh):
    add_nodes(fresh, 2)
    settle(fresh, new_release(fresh, payload={"content": "A"}), "success", "skipped")
    sql(fresh, "UPDATE release_tasks SET status = 'cancelled'")
    assert [p.text for p in problems(fresh)] == ["1 node runs release 1, which it should not: edge-1"]


def test_an_executor_without_a_certificate_is_a_problem_before_anything_is_to_do(sqlite_world):
    executor = sqlite_world.executor(CONTROL_CERT="")
    found = rc.ProcessState(executor.settings, executor)()["certificates"]
    facts = rc.OverviewFacts(certificates=rc.certificate_states(found), executors=[LOOKS])
    assert [p.text for p in rc.judge(facts).problems] == [
        "CONTROL_CERT can't be used: it is not set: agents can't be called without it"]


def test_a_key_that_only_the_service_may_read_is_no_problem_to_others(fleet_cli):
    if os.geteuid() == 0:
        if not shutil.which("setpriv") or subprocess.run([*AS_OTHERS, "true"], check=False).returncode:
            leave_out("setpriv, to obey permissions as root")
        fleet_cli.prefix = AS_OTHERS
    key = fleet_cli.file("other.key", Path(fleet_cli.settings["CONTROL_KEY"]).read_text())
    fleet_cli.settings["CONTROL_KEY"] = key
    os.chmod(fleet_cli.folder / "other.key", 0)
    live(fleet_cli.world.store)
    assert fleet_cli.ok("status", "--health").out == "all is well: nothing to do\n"


def test_status_without_an_id_shows_the_verdict_and_health_makes_it_the_exit_code(cli):
    cli.ok("migrate")
    assert cli("status").out.startswith("1 problem: no executor is running (none was seen for a day): start `serve`\n")
    assert cli("status", "--health").code == 1
    cli.ok("run-once")
    assert cli("status").out == "all is well: nothing to do\n"
    assert cli("status", "--health").code == 0
    cli.ok("freeze", "on", "--reason", "the match")
    found = cli("status")
    assert (found.code, found.out.splitlines()[0][:18]) == (0, "1 problem: frozen ")
    assert "releasectl freeze off" in found.out
    assert cli("status", "--health").code == 1


def wait_for_reads() -> None:
    for thread in threading.enumerate():
        if thread.name == "rare-read":
            thread.join(60)


def test_what_takes_long_is_read_anew_after_twenty_times_as_long_and_within_a_minute_and_nobody_waits(monkeypatch):
    now, taken = [1000.0], [2.0]
    monkeypatch.setattr(rc.time, "monotonic", lambda: now[0])

    def read() -> float:
        now[0] += taken[0]
        return now[0]

    def after_a_read_beside() -> float:
        wait_for_reads()
        return value.get()

    value = rc.RareRead(read, is_told_meanwhile=True)
    assert value.get() == 1002.0
    now[0] = 1002.0 + 39.9
    assert value.get() == 1002.0
    now[0], taken[0] = 1002.0 + 40.0, 9.0
    assert (value.get(), after_a_read_beside()) == (1002.0, 1051.0)
    now[0] = 1051.0 + 45.0  # and not after three minutes
    assert (value.get(), after_a_read_beside()) == (1051.0, 1105.0)
    now[0] = 1096.0 + 60.0  # it is too old to be told
    assert value.get() == 1165.0
    now[0], taken[0] = 1165.0 + 1.0, 0.5
    assert value.get(key="b") == 1166.5  # of another key what there was is not true any more
    assert value.get() == value.get(key="b") == 1166.5  # whoever takes any key makes nobody read it again
    now[0] = 1166.5 + 10.0 + 10.1  # whoever asks so late is told what is so now
    assert value.get(key="b") == 1187.1


def test_what_nobody_may_be_told_late_is_read_where_it_is_asked_for(monkeypatch):
    now, count = [1000.0], itertools.count(1)
    monkeypatch.setattr(rc.time, "monotonic", lambda: now[0])

    def read() -> int:
        now[0] += 1.0
        return next(count)

    value = rc.RareRead(read)
    assert [value.get(key="a"), value.get(key="a"), value.get(key="b")] == [1, 1, 2]
    now[0] += 20.0
    assert value.get(key="b") == 3


@pytest.mark.parametrize("key", [rc.ANY_KEY, "a"])
def test_what_could_not_be_read_anew_is_told_to_whoever_asks_once_the_value_is_too_old(monkeypatch, key):
    now, trouble = [1000.0], []
    monkeypatch.setattr(rc.time, "monotonic", lambda: now[0])

    def read() -> str:
        now[0] += 1.0
        if trouble:
            raise trouble[0]
        return "read"

    value = rc.RareRead(read, is_told_meanwhile=True)
    assert value.get(key=key) == "read"
    trouble.append(rc.DatabaseError("the disk is full"))
    now[0] += 21.0
    assert value.get(key=key) == "read"
    wait_for_reads()
    failed_at = now[0]
    assert value.get(key=key) == "read"
    wait_for_reads()
    assert now[0] == failed_at  # it was not tried again at once
    now[0] += 60.0
    with pytest.raises(rc.DatabaseError, match="the disk is full"):
        value.get(key=key)


class HeldRead:
    """A read that returns how often it was called, and of which one call lasts until it may end."""

    def __init__(self, held: int):
        self.begun, self.may_end = threading.Event(), threading.Event()
        self._held, self._calls = held, itertools.count(1)

    def __call__(self, *_: object) -> int:
        number = next(self._calls)
        if number == self._held:
            self.begun.set()
            assert self.may_end.wait(60)
        return number


@pytest.fixture
def rested(store, monkeypatch):
    """A store whose nodes take long to count, and count for 45 s."""
    monkeypatch.setattr(rc, "RARE_READ_REST", 1e9)
    monkeypatch.setattr(rc, "SLOW_READ_S", 0.0)
    live(store, "host-z:9:z")
    return store


@pytest.mark.parametrize("is_seen_running", [True, False])
def test_what_ended_just_now_is_in_the_verdict_also_where_it_takes_long_to_count_all_nodes(rested, is_seen_running):
    add_nodes(rested, 3)
    good(rested, "A")
    assert kinds(rested) == []
    bad = new_release(rested, payload={"content": "B"})
    sql(rested, "UPDATE release_tasks SET status = 'running', started_at = created_at WHERE id = ?", bad.id)
    if is_seen_running:
        assert kinds(rested) == []
    settle(rested, bad, "success", "skipped", "skipped")
    sql(rested, "UPDATE release_tasks SET status = 'cancelled' WHERE id = ?", bad.id)
    assert kinds(rested) == ["ahead"]


def test_a_scrape_and_the_verdict_take_one_count_of_all_nodes(rested, monkeypatch):
    counted, count = [], rested.fleet._count
    monkeypatch.setattr(rested.fleet._counts, "_read", lambda: counted.append(1) or count())
    add_nodes(rested, 2)
    problems(rested)
    for _ in range(3):
        rested.fleet.counts()
        problems(rested)
    assert len(counted) == 1


def test_nobody_is_told_what_was_read_more_than_a_minute_ago(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(rc.time, "monotonic", lambda: now[0])

    def read() -> float:
        now[0] += 30.0
        return now[0]

    value = rc.RareRead(read)
    assert value.get() == 1030.0
    now[0] = 1030.0 + 29.0  # good for 45 s from its end, but a minute old from its begin
    assert value.get() == 1030.0
    now[0] = 1000.0 + 60.0
    assert value.get() == 1090.0


def test_whoever_waited_for_a_read_that_began_after_he_asked_takes_it_whatever_its_key(monkeypatch):
    now, read, told = [1000.0], HeldRead(1), dict[str, int]()
    monkeypatch.setattr(rc.time, "monotonic", lambda: now[0])
    value = rc.RareRead(read)
    with contextlib.ExitStack() as stack:
        stack.enter_context(beside(lambda: told.update(first=value.get(key="first"))))
        assert read.begun.wait(60)
        now[0] = 1001.0
        for key in ("a", "b", "c"):
            stack.enter_context(beside(lambda key=key: told.update({key: value.get(key=key)})))
        read.may_end.set()
    assert told["first"] == 1
    assert {told["a"], told["b"], told["c"]} == {2}  # one read for all three, and none of before they asked


def test_what_another_read_in_his_own_transaction_is_not_taken_though_it_was_read_later(monkeypatch):
    now, read, told = [1000.0], HeldRead(1), list[int]()
    monkeypatch.setattr(rc.time, "monotonic", lambda: now[0])
    value = rc.RareRead(read)
    with beside(lambda: value.get("his transaction", key="before")):
        assert read.begun.wait(60)
        # asks while the other reads, at the same time
        with beside(lambda: told.append(value.get("another transaction", key="after"))):
            read.may_end.set()
    assert told == [2]


def test_while_one_caller_reads_anew_what_takes_long_others_get_what_there_is(monkeypatch):
    monkeypatch.setattr(rc, "RARE_READ_REST", 0)  # it is old at once
    read = HeldRead(2)
    value = rc.RareRead(read)
    assert value.get(key="a") == 1
    with beside(lambda: value.get(key="a")):
        assert read.begun.wait(60)
        assert value.get(key="a") == 1
        read.may_end.set()
    assert value.get(key="b") >= 3
