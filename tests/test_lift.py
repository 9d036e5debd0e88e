"""Where approvals are wanted, two persons lift a freeze that somebody else set (issue 17, 7)."""
from __future__ import annotations

import contextlib

import pytest
from lab import USER, add_nodes, new_release, sql
from test_approvals import ALICE, BOB, signed_in
from test_audit import rows_of
from test_freeze import freezes_of, in_s, said
from test_notify import outbox

import releasectl as rc

CAROL = rc.Act("carol", rc.VIA_API, token="carol")
ANYBODY = rc.Act(rc.ANONYMOUS, rc.VIA_API)


@pytest.fixture
def frozen(store) -> rc.Store:
    """A store of a process with APPROVALS=1 where alice froze cdn, and a release that this holds."""
    store.database.approvals = True
    add_nodes(store, 1)
    new_release(store, approval=rc.AUTOMATIC)
    store.releases.set_freeze(True, ALICE, "the match", "cdn")
    return store


def lift(store: rc.Store, by: rc.Who, reason: str = "", is_emergency: bool = False) -> rc.Freeze:
    """Return the freeze of cdn after somebody lifted it."""
    return store.releases.set_freeze(False, by, reason, "cdn", None, is_emergency).of_target("cdn")


def waits(store: rc.Store, by: rc.Who, reason: str = "") -> str:
    """Return what somebody is told who may not lift the freeze alone; it is still on."""
    with pytest.raises(rc.AppError) as error:
        lift(store, by, reason)
    assert error.value.code == rc.WRONG_STATE
    assert store.releases.freezes().of_target("cdn").frozen
    return error.value.message


def freeze_again(store: rc.Store, by: rc.Who, until: str | None = None) -> rc.Freeze:
    return store.releases.set_freeze(True, by, "overtime", "cdn", until).of_target("cdn")


# -- who lifts what: pure --------------------------------------------------------------------------

@pytest.mark.parametrize(("setter", "wanted_by", "who", "two_persons", "may"), [
    ("alice", "", "bob", False, True), ("", "", "bob", False, True), ("api", "", "api", False, True),
    ("alice", "", "alice", True, True), ("alice", "", "Alice", True, True), ("alice", "", "bob", True, False),
    ("alice", "bob", "bob", True, False), ("alice", "bob", "BOB", True, False), ("alice", "bob", "carol", True, True),
    ("alice", "bob", "alice", True, True), ("", "", "bob", True, False), ("", "bob", "carol", True, True),
    ("api", "", "api", True, False), ("api", "api", "api", True, False), ("api", "api", "bob", True, True)])
def test_its_setter_lifts_a_freeze_and_else_the_second_person_who_wants_it(setter, wanted_by, who, two_persons, may):
    freeze = rc.Freeze(True, "x", setter=setter, lift_wanted_by=wanted_by, two_persons=two_persons)
    assert rc.may_lift(freeze, who) == may


@pytest.mark.parametrize(("before", "after", "who", "is_refused"), [
    (None, None, "bob", False), (None, "2026-02-01", "bob", True), ("2026-02-01", "2026-02-01", "bob", False),
    ("2026-02-01", "2026-01-31", "bob", True), ("2026-02-01", "2026-02-02", "bob", False),
    ("2026-02-01", None, "bob", False), (None, "2026-02-01", "alice", False)])
def test_nobody_but_its_setter_lets_a_freeze_end_earlier(before, after, who, is_refused):
    freeze = rc.Freeze(True, "x", "alice", until=before, setter="alice", two_persons=True)
    refused = pytest.raises(rc.AppError, match="it can't end earlier, but be lifted: alice lifts it, or any two others")
    with refused if is_refused else contextlib.nullcontext():
        rc.check_longer(freeze, who, after)


# -- on both engines -------------------------------------------------------------------------------

def test_through_an_api_where_nobody_signs_in_nobody_is_the_second_person(frozen):
    waits(frozen, BOB)
    for _ in range(2):
        with pytest.raises(rc.AppError, match="nobody is a second person: set API_TOKENS_FILE"):
            lift(frozen, ANYBODY)
    assert frozen.releases.freezes().of_target("cdn").lift_wanted_by == "bob"
    assert not lift(frozen, ANYBODY, "down", is_emergency=True).frozen


def test_who_set_it_lifts_it_alone(frozen):
    assert not lift(frozen, ALICE).frozen
    assert said(frozen, frozen.releases.get(1)) == "queued for an executor"


def test_without_the_setting_anybody_lifts_it_as_ever(store):
    store.releases.set_freeze(True, ALICE, "the match", "cdn")
    assert store.releases.freezes().of_target("cdn").lifted_by == ""
    assert not lift(store, BOB).frozen


@pytest.mark.parametrize("target", ["cdn", ""])
def test_of_two_others_the_first_ones_wish_is_kept_and_the_second_lifts_it_with_both_named(frozen, target):
    freezes, setter = frozen.releases, {"cdn": ALICE, "": CAROL}[target]
    freezes.set_freeze(True, setter, "the match", target)
    second = {"cdn": CAROL, "": ALICE}[target]
    with pytest.raises(rc.AppError, match="bob wants it lifted since .*Z, so .* or anybody but bob lifts it: "
                                          "`releasectl freeze off"):
        freezes.set_freeze(False, BOB, "we need it", target)
    freeze = freezes.freezes().of_target(target)
    assert (freeze.frozen, freeze.setter, freeze.lift_wanted_by, bool(freeze.lift_wanted_at)) == (
        True, str(setter), "bob", True)
    freezes.set_freeze(False, second, "", target)
    assert not freezes.freezes().of_target(target).frozen
    wish, lifted = rows_of(frozen)[-2:]
    assert (wish.action, wish.actor, lifted.action, lifted.actor) == (
        "freeze.lift-wanted", "bob", "freeze.off", str(second))
    assert '"liftWantedBy":"bob"' in wish.after
    assert '"why":"we need it"' in wish.after
    assert '"liftWantedBy":"bob"' in lifted.before
    if target:
        event, detail = freezes_of(frozen, frozen.releases.get(1))[-1]
        assert (event, detail) == ("unfrozen", f"wanted by bob since {freeze.lift_wanted_at}")
    freezes.set_freeze(True, setter, "again", target)
    assert freezes.freezes().of_target(target).lift_wanted_by == ""


def test_a_wish_that_is_told_twice_is_one_and_nobodys_second(frozen):
    waits(frozen, BOB)
    before = frozen.releases.freezes(), frozen.audit.head()
    waits(frozen, rc.Act("cert:x", rc.VIA_API, token="BOB", certificate="x"))
    assert (frozen.releases.freezes(), frozen.audit.head()) == before
    assert frozen.claims.scan() == ([], [])


def test_a_wish_is_told_and_shown_by_why_verdict_and_freeze(frozen):
    frozen.database.notify_on = frozenset((rc.APPROVAL,))
    [step] = [one for one in frozen.claims.why(1, 600).steps if one.name == "freeze"]
    assert (step.text, step.mend) == ("cdn is frozen by alice: the match; alice lifts it, or any two others",
                                      "releasectl freeze off --target cdn")
    waits(frozen, BOB, "we need it")
    [step] = [one for one in frozen.claims.why(1, 600).steps if one.name == "freeze"]
    assert "bob wants it lifted since " in step.text
    assert step.text.endswith(", so alice or anybody but bob lifts it")
    [problem] = [one for one in frozen.overview.read(()).problems if one.kind == "frozen"]
    assert (problem.text, problem.mend) == (step.text, step.mend)
    [note] = [row for row in outbox(frozen) if row.kind == rc.APPROVAL]
    assert note.detail == step.text + ": we need it"


def test_in_an_emergency_one_lifts_it_with_a_reason_and_everybody_is_told(frozen):
    frozen.database.notify_on = frozenset((rc.STUCK,))
    with pytest.raises(rc.AppError, match="reason is missing"):
        lift(frozen, BOB, is_emergency=True)
    with pytest.raises(rc.AppError, match="emergency goes with a freeze that is lifted"):
        frozen.releases.set_freeze(True, BOB, "x", "cdn", is_emergency=True)
    assert not lift(frozen, BOB, "the site is down", is_emergency=True).frozen
    [note] = outbox(frozen)
    text = "emergency: lifted without a second person; the site is down"
    assert (note.kind, note.detail) == (rc.APPROVAL, f"the freeze of cdn was lifted by bob: {text}")
    assert freezes_of(frozen, frozen.releases.get(1))[-1] == ("unfrozen", text)
    assert '"emergency":true' in rows_of(frozen)[-1].after


def test_freeze_on_is_no_way_around_it(frozen):
    with pytest.raises(rc.AppError, match="cdn is frozen until somebody lifts it by alice: it can't end earlier"):
        freeze_again(frozen, BOB, in_s(1))
    freeze = freeze_again(frozen, BOB)  # as long, in other words: it stays hers
    assert (freeze.setter, freeze.actor, freeze.reason) == ("alice", "alice", "overtime (so bob)")
    waits(frozen, BOB)
    freeze_again(frozen, BOB)  # takes the wish back
    waits(frozen, CAROL)
    assert freeze_again(frozen, ALICE, in_s(3600)).reason == "overtime"
    with pytest.raises(rc.AppError, match="cdn is frozen until 20"):
        freeze_again(frozen, BOB, in_s(60))
    freeze = freeze_again(frozen, BOB, in_s(7200))
    assert freeze.setter == "alice"
    waits(frozen, BOB)
    assert not lift(frozen, ALICE).frozen


def test_its_end_ends_it_without_anybody(frozen):
    freeze_again(frozen, ALICE, in_s(3600))
    waits(frozen, BOB)
    sql(frozen, "UPDATE target_freezes SET until = '2026-01-31T06:00:00.000Z'")
    assert frozen.claims.scan() == ([1], [])
    assert frozen.releases.freezes().on == []


def test_where_nobody_is_known_to_have_set_it_two_persons_lift_it(frozen):
    sql(frozen, "UPDATE target_freezes SET setter = ''")  # by hand
    assert frozen.releases.freezes().of_target("cdn").lifted_by == "it takes two persons to lift it"
    waits(frozen, BOB)
    assert not lift(frozen, CAROL).frozen
    frozen.releases.set_freeze(True, ANYBODY, "the match", "cdn")
    with pytest.raises(rc.AppError, match="set API_TOKENS_FILE"):
        lift(frozen, ANYBODY)
    waits(frozen, BOB)
    assert not lift(frozen, CAROL).frozen


@pytest.mark.parametrize("kind", [rc.SERVE, rc.TICK])
def test_the_setting_of_one_executor_counts_for_a_shell_without_it(frozen, kind):
    frozen.claims.note_executor("a:1:x", "a", kind, 15.0, "", True)
    frozen.database.approvals = False
    waits(frozen, BOB)
    frozen.claims.note_executor("b:1:x", "b", kind, 15.0, "", True)  # another host's, without the setting
    frozen.claims.end_executor("a:1:x")
    assert "bob wants it lifted" in waits(frozen, BOB)
    frozen.claims.note_executor("a:2:x", "a", kind, 15.0, "", True)  # started anew without it
    assert not lift(frozen, BOB).frozen


# -- API and command line --------------------------------------------------------------------------

def test_the_api_answers_409_and_shows_the_wish_until_a_second_token_lifts_it(frozen, tokens):
    path = "/api/v1/freeze"
    with signed_in(frozen, tokens, "bob") as bob, signed_in(frozen, tokens, "alice") as alice:
        answer = bob("PUT", path, {"frozen": False, "target": "cdn"})
        assert (answer.status, answer.code) == (409, rc.WRONG_STATE)
        [shown] = bob.ok("GET", path)["targets"]
        assert (shown["setter"], shown["twoPersons"], shown["liftWantedBy"]) == ("alice", True, "bob")
        assert shown["liftWantedAt"]
        assert alice.ok("PUT", path, {"frozen": False, "target": "cdn"})["targets"] == []
        alice.ok("PUT", path, {"frozen": True, "reason": "again"})
        assert bob("PUT", path, {"frozen": False, "emergency": True}).code == rc.MISSING
        assert not bob.ok("PUT", path, {"frozen": False, "emergency": True, "reason": "down"})["frozen"]


def test_the_command_line_ends_with_3_says_who_lifts_it_and_takes_an_emergency(quick, open_store):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    quick.settings.update(APPROVALS="1")
    quick.ok("freeze", "on", "--reason", "mine")
    quick.ok("freeze", "off")
    store.releases.set_freeze(True, ALICE, "the match")
    assert "alice lifts it, or any two others" in quick.ok("freeze").out
    assert "alice lifts it, or any two others" in quick("check").out
    said_ = quick.refused(3, "freeze", "off")
    assert f"frozen by alice: the match: still frozen, as {USER} wants it lifted since " in said_
    assert f"so alice or anybody but {USER} lifts it: `releasectl freeze off`" in said_
    assert f"{USER} wants it lifted since " in quick.ok("freeze").out
    assert "--emergency go with on or off" in quick.refused(2, "freeze", "--emergency")
    assert "not frozen" in quick.ok("freeze", "off", "--emergency", "--reason", "down").out
