"""A freeze of one target, and one that ends by itself (contract section 7), pure and on both engines."""
from __future__ import annotations

import datetime
import json
import re
import time

import pytest
from conftest import on_sqlite
from lab import CLOCK, Quick, add_nodes, eventually, new_release, sql, statuses
from test_audit import rows_of
from test_decision import POLICY
from test_metrics import look

import releasectl as rc

PAST = "2026-01-31T06:00:00.000Z"


@pytest.fixture
def quick(tmp_path):
    quick = Quick(tmp_path)
    quick.ok("migrate")
    return quick


def in_s(seconds: float) -> str:
    return rc.utc_text(time.time() + seconds)


def end(store: rc.Store, at: str = PAST) -> None:
    """Let the end of each freeze be over, as the clock does."""
    sql(store, "UPDATE release_freeze SET until = ? WHERE until IS NOT NULL", at)
    sql(store, "UPDATE target_freezes SET until = ? WHERE until IS NOT NULL", at)


def said(store: rc.Store, release: rc.Release) -> str:
    return store.releases.get(release.id).status_reason


def freezes_of(store: rc.Store, release: rc.Release) -> list[tuple[str, str]]:
    return [(event.event, event.detail) for event in store.releases.events(release.id)
            if event.event in ("frozen", "unfrozen")]


# -- which releases a freeze holds -----------------------------------------------------------------

EVERYTHING = rc.Freeze(True, "holidays", "anna")
CDN = rc.Freeze(True, "the match", "bert", target="cdn")


def candidate(target: str = "cdn", release_id: int = 1, **fields) -> rc.Candidate:
    return rc.Candidate(release_id, target, release_id, rc.PENDING, 0, False, **fields)


@pytest.mark.parametrize(("freezes", "target", "held_by"), [
    (rc.NO_FREEZES, "cdn", []), (rc.Freezes(EVERYTHING), "cdn", [EVERYTHING]),
    (rc.Freezes(EVERYTHING), "dns", [EVERYTHING]),
    (rc.Freezes(rc.NO_FREEZE, (CDN,)), "cdn", [CDN]), (rc.Freezes(rc.NO_FREEZE, (CDN,)), "dns", []),
    (rc.Freezes(rc.NO_FREEZE, (CDN,)), "CDN", []), (rc.Freezes(EVERYTHING, (CDN,)), "cdn", [EVERYTHING, CDN]),
    (rc.Freezes(EVERYTHING._replace(until=PAST), (CDN,)), "cdn", [CDN, EVERYTHING._replace(until=PAST)])])
def test_a_release_is_held_by_the_freezes_of_all_and_of_its_target_the_last_to_end_first(freezes, target, held_by):
    assert freezes.holding(candidate(target)) == held_by
    assert freezes.of(candidate(target)) == (held_by or [rc.NO_FREEZE])[0]


def test_a_freeze_is_over_when_its_end_has_come_and_each_by_its_own():
    early, late = EVERYTHING._replace(until=PAST), CDN._replace(until="2026-01-31T07:00:00.000Z")
    freezes = rc.Freezes(early, (late,))
    assert freezes.in_force("2026-01-31T05:59:59.999Z").on == [early, late]
    assert freezes.in_force(PAST).on == [late]
    assert freezes.in_force("2026-01-31T07:00:00.000Z").on == []
    assert freezes.over_at("2026-01-31T07:00:00.000Z") == [early, late]
    assert rc.Freezes(EVERYTHING, (CDN,)).in_force("9999").on == [EVERYTHING, CDN]


def test_a_frozen_release_holds_nobody_up_and_nobody_else_is_held():
    both = [candidate("cdn", 1), candidate("dns", 2)]
    frozen = rc.Freezes(rc.NO_FREEZE, (CDN,))
    assert rc.runnable(both, PAST, rc.NO_FREEZES, lambda *_: True) == ([1], [])
    assert rc.runnable(both, PAST, frozen, lambda *_: True) == ([2], [])
    assert rc.waiting_reasons(both, PAST, frozen, lambda *_: True) == {
        1: "frozen: the match", 2: "queued for an executor"}
    assert rc.ahead_of(2, both, PAST, frozen, lambda *_: True) == []


# -- how long it held them ---------------------------------------------------------------------------

def at(second: float) -> str:
    return rc.utc_text(1_790_000_000.0 + second)


@pytest.mark.parametrize(("history", "halts"), [
    # one freeze was lifted, another one stays: the event says that it is frozen still
    ([(0, "frozen", "running"), (100, "frozen", "running"), (200, "unfrozen", "running")], [(0, 200)]),
    # an end that was written down after somebody had paused the release
    ([(0, "frozen", "running"), (150, "paused", "paused"), (100, "unfrozen", "paused"), (180, "resumed", "running")],
     [(0, 100), (150, 180)]),
    ([(0, "frozen", "running"), (50, "paused", "paused"), (100, "unfrozen", "paused"), (180, "resumed", "running")],
     [(0, 180)]),
    ([(0, "unfrozen", "pending"), (10, "frozen", "pending")], [(10, float("inf"))]),
    # the clock of whoever set it was ahead of the end
    ([(30, "frozen", "running"), (10, "unfrozen", "running")], [(30, 30)])])
def test_halts_are_told_by_events_whenever_they_were_written(history, halts):
    found = rc.halts_of((at(second), event, status) for second, event, status in history)
    assert [(halt.since - rc.epoch_of(at(0)), halt.until - rc.epoch_of(at(0))) for halt in found] == halts


def test_the_end_of_a_freeze_ends_the_halt_before_anybody_wrote_it_down_and_after(store):
    add_nodes(store, 1)
    release = new_release(store)
    store.releases.set_freeze(True, "anna", "the match", "cdn", in_s(3600))
    [halt] = store.claims.halts(release.id)
    assert halt.until == float("inf")
    sql(store, "UPDATE release_events SET at = ? WHERE event = 'frozen'", rc.utc_text(halt.since - 60))
    end(store, rc.utc_text(halt.since - 20))
    assert [h.until - h.since for h in store.claims.halts(release.id)] == [pytest.approx(40)]
    store.claims.scan("host:1")
    assert [h.until - h.since for h in store.claims.halts(release.id)] == [pytest.approx(40)]


# -- set, replaced, lifted, over ---------------------------------------------------------------------

def test_a_freeze_of_a_target_stops_that_target_alone(store):
    add_nodes(store, 1)
    cdn, dns = new_release(store), new_release(store, target="dns")
    store.releases.set_freeze(True, "anna", "the match", "cdn")
    assert (said(store, cdn), said(store, dns)) == ("frozen: the match", "queued for an executor")
    assert store.claims.scan() == ([dns.id], [])
    assert store.claims.claim(cdn.id, "a", 30) is None
    assert (freezes_of(store, cdn), freezes_of(store, dns)) == ([("frozen", "the match")], [])
    freezes = store.releases.freezes()
    assert (freezes.everything.frozen, [one.target for one in freezes.on]) == (False, ["cdn"])
    store.releases.set_freeze(False, "bert", "it is over", "cdn")
    assert said(store, cdn) == "queued for an executor"
    assert freezes_of(store, cdn) == [("frozen", "the match"), ("unfrozen", "it is over")]
    assert [(row.action, row.object, row.before, row.after) for row in rows_of(store)[-2:]] == [
        ("freeze.on", "freeze cdn", '{"frozen":false}', '{"frozen":true,"reason":"the match"}'),
        ("freeze.off", "freeze cdn", '{"frozen":true,"reason":"the match"}',
         '{"frozen":false,"reason":"it is over"}')]


def test_a_commit_of_a_dispatch_is_refused_in_a_frozen_target_and_in_no_other(store):
    add_nodes(store, 1)
    made = new_release(store)
    claim = store.claims.claim(made.id, "a", 30)
    read, nodes = store.claims.read_with_nodes(claim)
    now = store.state.moment()
    decision = rc.decide(rc.Situation(read, rc.NodeIndex(nodes), now, POLICY))
    store.releases.set_freeze(True, "anna", "the match", "cdn", in_s(3600))
    with pytest.raises(rc.StateMoved, match="a freeze came before"):
        store.claims.commit(claim, read, decision, now, "a")
    store.releases.set_freeze(True, "anna", "the match", "dns")
    end(store)  # that of cdn, which nobody has taken away yet
    store.claims.commit(claim, read, decision, now, "a")
    assert statuses(store, made.id) == ["running"]


def test_of_several_freezes_each_is_lifted_by_itself_and_a_release_waits_for_all(store):
    add_nodes(store, 1)
    release = new_release(store)
    store.releases.set_freeze(True, "anna", "holidays")
    store.releases.set_freeze(True, "bert", "the match", "cdn", "2999-01-01T00:00:00.000Z")
    assert said(store, release) == "frozen: holidays"
    left = store.releases.set_freeze(False, "anna")
    assert [one.line() for one in left.on] == ["cdn is frozen until 2999-01-01T00:00:00.000Z, by bert: the match"]
    assert said(store, release) == "frozen until 2999-01-01T00:00:00.000Z: the match"
    assert store.claims.scan() == ([], [])
    store.releases.set_freeze(False, "bert", target="cdn")
    assert freezes_of(store, release) == [
        ("frozen", "holidays"), ("frozen", "holidays; until 2999-01-01T00:00:00.000Z: the match"),
        ("frozen", "until 2999-01-01T00:00:00.000Z: the match"), ("unfrozen", "")]
    assert store.claims.scan() == ([release.id], [])


def test_a_freeze_whose_end_has_come_is_over_and_the_first_who_scans_writes_that_once(store):
    add_nodes(store, 1)
    cdn, dns = new_release(store), new_release(store, target="dns")
    store.releases.set_freeze(True, "anna", "the match", "cdn", in_s(3600))
    store.releases.set_freeze(True, "anna", "holidays", until=in_s(7200))
    end(store)
    assert store.releases.freezes().on == []
    assert store.claims.scan("host:1:x")[0] == [cdn.id]
    known = rows_of(store)[-1].id
    assert store.claims.scan("host:2:x")[0] == [cdn.id]
    ends = [(event.at, event.actor, event.detail) for event in store.releases.events(cdn.id)
            if event.event == "unfrozen"]
    assert ends == [(PAST, "host:1:x", f"its end has come: cdn is frozen until {PAST}, by anna: the match")]
    assert [event for event, _ in freezes_of(store, dns)] == ["frozen", "unfrozen"]
    assert (said(store, cdn), rows_of(store)[-1].id) == ("queued for an executor", known)
    assert [(row.action, row.object) for row in rows_of(store)[-2:]] == [("freeze.end", "freeze"), ("freeze.end",
                                                                                                    "freeze cdn")]
    assert store.audit.verify().faults == []


def test_freeze_on_again_replaces_reason_and_end_and_says_so(store):
    add_nodes(store, 1)
    release = new_release(store)
    store.releases.set_freeze(True, "anna", "the match", "cdn", in_s(3600))
    [freeze] = store.releases.set_freeze(True, "bert", "overtime", "cdn").on
    assert freeze._replace(at="") == rc.Freeze(True, "overtime", "bert", "", None, "cdn", setter="bert")
    assert [event for event, _ in freezes_of(store, release)] == ["frozen", "frozen"]
    end(store)  # there is none
    assert store.claims.scan() == ([], [])


def test_an_end_that_was_not_written_down_is_before_the_freeze_is_set_again(store):
    add_nodes(store, 1)
    release = new_release(store)
    store.releases.set_freeze(True, "anna", "the match", "cdn", in_s(3600))
    end(store)
    store.releases.set_freeze(True, "bert", "overtime", "cdn")
    assert freezes_of(store, release)[1:] == [
        ("unfrozen", f"its end has come: cdn is frozen until {PAST}, by anna: the match"), ("frozen", "overtime")]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ((True, "anna", "why", "cdn", PAST), rc.INVALID, f"until {PAST} is over: by the clock that it goes by it is 20"),
    ((False, "anna", "", "cdn", "2999-01-01T00:00:00.000Z"), rc.INVALID, "until goes with a freeze that is set"),
    ((True, "anna", "", "cdn"), rc.MISSING, "reason is missing")])
def test_a_freeze_that_makes_no_sense_is_refused_and_nothing_is_written(store, arguments, code, words):
    with pytest.raises(rc.AppError, match=re.escape(words)) as error:
        store.releases.set_freeze(*arguments)
    assert error.value.code == code
    assert (store.releases.freezes().on, rows_of(store)) == ([], [])


def test_a_release_made_while_frozen_goes_out_with_a_later_version_where_others_went_before(store):
    add_nodes(store, 1)
    store.releases.set_freeze(True, "anna", "the match", "cdn")
    held, other = new_release(store), new_release(store, target="dns")
    assert freezes_of(store, held) == [("frozen", "the match")]
    assert store.claims.claim(other.id, "a", 30)
    sql(store, "UPDATE release_task_nodes SET status = 'success' WHERE release_task_id = ?", other.id)
    sql(store, "UPDATE nodes SET last_version = ?", other.version)
    sql(store, "UPDATE release_tasks SET status = 'success', claim_owner = '', claim_expires_at = NULL WHERE id = ?",
        other.id)
    store.releases.set_freeze(False, "anna", target="cdn")
    assert store.claims.claim(held.id, "a", 30)
    assert store.releases.get(held.id).version > other.version > held.version
    assert "release 2 (v2) went out before it" in [e.detail for e in store.releases.events(held.id)
                                                   if e.event == "renumbered"][0]


def test_an_older_process_beside_us_sees_a_freeze_of_everything_and_people_set_one_by_hand(store):
    store.releases.set_freeze(True, "anna", "holidays", until=in_s(3600))
    with store.database.transaction() as tx:
        assert tx.value("SELECT frozen FROM release_freeze WHERE id = 1") == 1
    store.releases.set_freeze(False, "anna")
    sql(store, "UPDATE release_freeze SET frozen = 1, reason = 'by hand' WHERE id = 1")
    sql(store, "INSERT INTO target_freezes (target, until) VALUES ('dns', '')")
    assert [(one.target, one.reason, one.until) for one in store.releases.freezes().on] == [
        ("", "by hand", None), ("dns", "", None)]


# -- what is said of it ---------------------------------------------------------------------------------

def test_why_names_each_freeze_that_holds_a_release_and_that_one_with_an_end_goes_by(store):
    add_nodes(store, 1)
    cdn, dns = new_release(store), new_release(store, target="dns")
    store.releases.set_freeze(True, "anna", "the match", "cdn", in_s(7200))

    def step(release: rc.Release) -> rc.Step:
        return next(step for step in store.claims.why(release.id, 600).steps if step.name == "freeze")

    assert (step(cdn).state, step(cdn).mend) == ("waits", "releasectl freeze off --target cdn")
    assert re.fullmatch(r"cdn is frozen until \S+Z, in 2 h, by anna: the match", step(cdn).text)
    assert step(dns) == rc.Step("freeze", "ok", "not frozen")
    store.releases.set_freeze(True, "bert", "holidays")
    assert (step(cdn).state, step(cdn).mend) == ("stops", "releasectl freeze off")
    assert re.fullmatch("frozen by bert: holidays; cdn is frozen until .*", step(cdn).text)
    assert step(dns).text == "frozen by bert: holidays"


def test_the_verdict_names_each_freeze_with_its_own_mend(store):
    store.releases.set_freeze(True, "anna", "the match", "cdn", "2999-01-01T00:00:00.000Z")
    store.releases.set_freeze(True, "bert", "holidays")
    found = [p for p in store.overview.read([]).problems if p.kind == "frozen"]
    assert [(p.text, p.mend) for p in found] == [
        ("frozen by bert: holidays", "releasectl freeze off"),
        ("cdn is frozen until 2999-01-01T00:00:00.000Z, by anna: the match", "releasectl freeze off --target cdn")]
    freezes = store.releases.freezes()
    assert [p.since for p in found] == [freezes.everything.at, freezes.targets[0].at]


def test_metrics_tell_everything_frozen_from_a_target(store):
    add_nodes(store, 1)
    new_release(store)
    new_release(store, target="dns")
    store.releases.set_freeze(True, "anna", "the match", "cdn")
    seen = look(store)
    assert (seen["releasectl_frozen",], seen["releasectl_target_frozen", "cdn"],
            seen["releasectl_target_frozen", "dns"]) == (0, 1, 0)
    store.releases.set_freeze(True, "anna", "holidays")
    seen = look(store)
    assert (seen["releasectl_frozen",], seen["releasectl_target_frozen", "dns"]) == (1, 1)


def test_a_notification_says_which_target_and_until_when(store):
    store.database.notify_on = frozenset({"frozen"})
    store.releases.set_freeze(True, "anna", "the match", "cdn", "2999-01-01T00:00:00.000Z")
    notification, _ = store.outbox.next()
    assert notification.detail == "cdn is frozen until 2999-01-01T00:00:00.000Z, by anna: the match"


def test_a_release_starts_by_itself_when_the_freeze_is_over(world):
    world.nodes(1, task_ms=10)
    world.store.releases.set_freeze(True, "anna", "the match", "cdn", in_s(1.5))
    made = new_release(world.store)
    executor = world.executor()
    executor.claim_runnable([], is_tick=False)
    assert statuses(world.store, made.id) == ["pending"]
    eventually(lambda: executor.claim_runnable([], is_tick=False) or world.store.releases.get(made.id).is_terminal)
    assert world.store.releases.get(made.id).status == "success"
    assert [event for event, _ in freezes_of(world.store, made)] == ["frozen", "unfrozen"]


# -- API and command line --------------------------------------------------------------------------------

def test_the_api_sets_shows_and_lifts_the_freeze_of_a_target(client):
    add_nodes(client.store, 1)
    new_release(client.store)
    found = client.ok("PUT", "/api/v1/freeze", {
        "frozen": True, "reason": "the match", "target": "cdn", "until": "2999-01-01T06:00:00+06:00"})
    assert (found["frozen"], found["warnings"]) == (False, [])
    assert found["targets"] == [{"target": "cdn", "reason": "the match", "actor": "api",
                                 "at": found["targets"][0]["at"], "until": "2999-01-01T00:00:00.000Z",
                                 "setter": "api", "twoPersons": False, "liftWantedBy": "", "liftWantedAt": None}]
    assert client.ok("GET", "/api/v1/freeze")["targets"] == found["targets"]
    client.ok("PUT", "/api/v1/freeze", {"frozen": True, "reason": "holidays"})
    left = client.ok("PUT", "/api/v1/freeze", {"frozen": False})
    assert (left["frozen"], [one["target"] for one in left["targets"]]) == (False, ["cdn"])
    assert client.ok("PUT", "/api/v1/freeze", {"frozen": False, "target": "cdn"})["targets"] == []
    misspelt = client.ok("PUT", "/api/v1/freeze", {"frozen": True, "reason": "x", "target": "cdm"})
    assert misspelt["warnings"] == ["no release has the target cdm (did you mean cdn?): it is frozen for those to come"]


@on_sqlite
@pytest.mark.parametrize(("body", "words"), [
    ({"target": "a b"}, "target must be"), ({"target": ""}, "target must be"), ({"target": None}, "target must be"),
    ({"target": "cdn'; --"}, "target must be"), ({"until": "2h"}, "until must be a time with its zone"),
    ({"until": None}, "until must be"), ({"until": PAST}, f"until {PAST} is over"), ({"untill": PAST}, "untill")])
def test_the_api_refuses_a_target_or_an_end_that_can_not_be_meant(client, body, words):
    answer = client("PUT", "/api/v1/freeze", {"frozen": True, "reason": "x", **body})
    assert answer.code == 2003
    assert words in answer.text
    assert client.ok("GET", "/api/v1/freeze")["targets"] == []


def test_the_api_says_that_what_was_to_go_on_is_held_by_another_freeze(client):
    client.ok("PUT", "/api/v1/freeze", {"frozen": True, "reason": "x"})
    assert client.ok("PUT", "/api/v1/freeze", {"frozen": False, "target": "dns"})["warnings"] == [
        "the freeze of everything holds dns still: releasectl freeze off"]


def test_the_command_line_freezes_a_target_until_a_time_and_shows_all(quick):
    quick.ok("freeze", "on", "--reason", "the match", "--target", "cdn", "--until", "2h")
    assert re.fullmatch(rf"cdn is frozen until {CLOCK}, in (2 h|1 h 50 min), by cli:\w+ at \S+: the match\n",
                        quick.ok("freeze").out)
    quick.ok("freeze", "on", "--reason", "holidays")
    assert len(quick.ok("freeze").out.splitlines()) == 2
    left = quick.ok("freeze", "off", "--target", "dns")
    assert left.err == "warning: the freeze of everything holds dns still: releasectl freeze off\n"
    left = quick.ok("freeze", "off")
    assert left.out.startswith("cdn is frozen until ")
    assert left.err == "warning: the freeze of cdn holds cdn still: releasectl freeze off --target cdn\n"
    assert quick.ok("freeze", "off", "--target", "cdn").out == "not frozen\n"


def test_a_target_that_no_release_has_is_frozen_with_a_warning(quick):
    assert "warning: no release has the target cdm: it is frozen for those to come" in quick.ok(
        "freeze", "on", "--reason", "x", "--target", "cdm").err
    assert "warning" not in quick.ok("freeze", "off", "--target", "cdm").err


@pytest.mark.parametrize(("words", "refusal"), [
    (("freeze", "--target", "cdn"), "go with on or off"), (("freeze", "--until", "2h"), "go with on or off"),
    (("freeze", "off", "--until", "2h"), "until goes with a freeze that is set"),
    (("freeze", "on", "--reason", "x", "--until", "2020-01-01"), "is over: by the clock"),
    (("freeze", "on", "--reason", "x", "--until", "soon"), "'soon' is not a time like 5m"),
    (("freeze", "on", "--reason", "x", "--target", ""), "target must be"),
    (("freeze", "on", "--reason", "x", "--target", "c/d"), "target must be")])
def test_the_command_line_refuses_what_makes_no_sense(quick, words, refusal):
    assert refusal in quick.refused(2, *words)


def test_a_time_of_day_that_is_over_today_is_tomorrows():
    now = datetime.datetime.now()
    for minutes in (-5, 5):
        wanted = (now + datetime.timedelta(minutes=minutes)).replace(second=0, microsecond=0)
        found = rc.epoch_of(rc._time_to_come(wanted.strftime("%H:%M")))
        assert 0 < found - time.time() <= 86400
        assert datetime.datetime.fromtimestamp(found).strftime("%H:%M") == wanted.strftime("%H:%M")


def test_the_document_of_the_api_has_the_new_fields():
    schemas = json.loads(rc.to_json(rc.openapi_document()))["components"]["schemas"]
    assert schemas["SetFreeze"]["properties"].keys() == {"frozen", "reason", "target", "until", "emergency"}
    assert {"until", "targets", "warnings"} <= schemas["Freeze"]["properties"].keys()


@pytest.mark.parametrize(("freeze", "line", "chinese"), [
    (rc.Freeze(True, "the match", "api", ""), "frozen: the match", "已冻结：the match"),
    (rc.Freeze(True, "the match", "api", "", "2026-01-02T03:04:05.000Z", "cdn"),
     "cdn is frozen until 2026-01-02T03:04:05.000Z: the match", "cdn 已冻结，至 2026-01-02T03:04:05.000Z：the match"),
    (rc.Freeze(True, "the match", "anna", ""), "frozen by anna: the match", "由 anna 冻结：the match")])
def test_where_nobody_signs_in_no_sentence_says_who_it_was(freeze, line, chinese):
    assert (freeze.line(), rc.in_chinese(freeze.line())) == (line, chinese)
    assert rc.by_whom("api") == rc.by_whom("") == ""
