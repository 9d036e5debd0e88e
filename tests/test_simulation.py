"""Never twice, never lost: the real driver and store under a fake clock, with faults by a seed.

TEST_LONG=1 runs 10,000 schedules; one alone, with its schedule:
python tests/simulation.py SEED [plain|steering|shared]
"""
from __future__ import annotations

import itertools
import os

import pytest
import simulation
from simulation import Violation, run_seed

import releasectl as rc

# How many schedules of each world.
SCHEDULES = {"plain": 150, "steering": 100, "shared": 100}
if os.environ.get("TEST_LONG") == "1":
    SCHEDULES = {"plain": 10_000, "steering": 5_000, "shared": 10_000}
PER_TEST = 25
# The part of `make test`.
QUICK = 10
# The schedules in which every fault is looked for; they hold the rules as all others do.
WITH_EVERY_FAULT = range(26, 66)
# A mutant that survives so many schedules would survive for ever. The search begins at the seed that found it last:
# one schedule mostly, many where the schedules have changed since.
ENOUGH = 400
# Figures of what nobody does in the world `plain`, and of what takes several chances at once.
RARE = {"automatic", "cancelled late"}
STEERED = RARE | {
    "full labels", "preflights", "silent", "approved", "approved late", "target freezes", "freezes that end",
    "rolled back", "not rolled back", "superseded", "rollbacks now", "during a freeze", "overtaken"}


@pytest.fixture(autouse=True)
def _quiet():
    rc.log.disabled = True


def run_seeds(first: int, end: int, **options) -> None:
    for seed in range(first, end):
        run_seed(seed, **options)


def parts_of(world: str):
    """The first seeds of the tests for a world, and those before which they end; all but one part are slow."""
    return pytest.mark.parametrize(("first", "end"), [(1, QUICK + 1), *(
        pytest.param(first, end, marks=pytest.mark.slow) for first, end in (
            (QUICK + 1, WITH_EVERY_FAULT.start),
            *((first, first + PER_TEST) for first in range(WITH_EVERY_FAULT.stop, SCHEDULES[world] + 1, PER_TEST))))])


@parts_of("plain")
def test_rule_9_whatever_fails_nothing_runs_twice_and_nothing_is_lost(first, end):
    run_seeds(first, end)


@parts_of("steering")
def test_section_7_whatever_fails_and_whoever_steers_every_strategy_keeps_its_promise(first, end):
    run_seeds(first, end, world="steering")


@parts_of("shared")
def test_section_8_a_success_is_a_success_whatever_goes_back_or_is_set(first, end):
    run_seeds(first, end, world="shared")


@pytest.mark.slow
@pytest.mark.parametrize("world", simulation.WORLDS)
def test_the_schedules_contain_every_fault(world):
    figures = [run_seed(seed, world=world).figures for seed in WITH_EVERY_FAULT]
    rare = {"plain": {"verbs", "hung"} | STEERED, "steering": {"hung"} | RARE,
            "shared": {"unknowable", "rollbacks now", "during a freeze"} | RARE}
    for name in figures[0].keys() - rare[world]:
        assert sum(one[name] for one in figures) > 2, name


@pytest.mark.parametrize("seed", range(1, 11))
def test_an_owner_that_nothing_disturbs_keeps_its_release_to_the_end(seed):
    assert run_seed(seed, owners=3, faults=False).figures["take-overs"] == 0


@pytest.mark.parametrize("world", simulation.WORLDS)
def test_the_same_seed_gives_the_same_schedule(world):
    assert run_seed(7, world=world).schedule == run_seed(7, world=world).schedule


def mutants(*found):
    """Mutants, each with the seed that found it last. They test the simulation alone: slow."""
    return pytest.mark.parametrize(("mutate", "first"), [
        pytest.param(*one, id=one[0].__name__, marks=pytest.mark.slow) for one in found])


# -- the mutants: each breaks one line of the claim, and must be found ------------------------

def without_fence(patch):
    """A write goes through whoever the owner is."""
    write = rc.Queue.write_decision

    def write_blindly(self, tx, release, decision, now, actor, claim=None, **more):
        row = rc.read_release(tx, release.id)
        write(self, tx, release, decision, now, actor,
              claim and claim._replace(fence=row.claim_fence, owner=row.claim_owner), **more)
    patch.setattr(rc.Queue, "write_decision", write_blindly)
    patch.setattr(rc.Claims, "_read_claimed", lambda _, tx, claim: rc.read_release(tx, claim.release_id))


def with_a_new_task_id_after_a_take_over(patch):
    """The new owner names the task anew, so the agent does not know it again."""
    numbers, name = itertools.count(), rc.task_id_for
    patch.setattr(rc, "task_id_for", lambda *parts: f"{name(*parts)}-{next(numbers)}")


def with_the_intent_after_the_request(patch):
    """The request leaves, then its commit may fail or never come."""
    commit, send = rc.Driver._commit, rc.Driver._send

    def commit_late(self, release, decision, now):
        send(self, release, decision, now)
        commit(self, release, decision, now)
    patch.setattr(rc.Driver, "_commit", commit_late)
    patch.setattr(rc.Driver, "_send", lambda *_: None)
    patch.setattr(simulation.Simulation, "at_once", True, raising=False)


def with_the_expiry_compared_the_wrong_way_round(patch):
    """A claim that holds may be taken, one that ran out may not."""
    execute, candidates = rc.Transaction.execute, rc.read_candidates
    patch.setattr(rc.Transaction, "execute", lambda self, statement, *params: execute(
        self, statement.replace("claim_expires_at <= ?", "claim_expires_at > ?"), *params))
    patch.setattr(rc, "read_candidates", lambda tx: [c._replace(claimed=False) for c in candidates(tx)])


def without_a_look_at_the_lease_before_a_dispatch(patch):
    """A process that was suspended past its lease sends what it had written before."""
    patch.setattr(rc.Driver, "may_dispatch", lambda *_: True)


def without_the_hold_of_an_execute_agent(patch):
    """The new owner repeats a request that may still be at the agent."""
    recover = rc.recover
    patch.setattr(rc, "recover", lambda node, *rest: recover(node._replace(hold_until=None, hold_clock=""), *rest))


@mutants(
    (without_fence, 36), (with_a_new_task_id_after_a_take_over, 141), (with_the_intent_after_the_request, 1),
    (with_the_expiry_compared_the_wrong_way_round, 1), (without_a_look_at_the_lease_before_a_dispatch, 75),
    (without_the_hold_of_an_execute_agent, 49))
def test_the_schedules_find_a_claim(mutate, first, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(Violation):
        run_seeds(first, first + ENOUGH)


def test_the_schedules_find_a_lease_that_is_not_renewed(monkeypatch):
    monkeypatch.setattr(rc.Executor, "_renew", lambda *_: None)
    assert any(run_seed(seed, owners=3, faults=False).figures["take-overs"] for seed in range(1, 11))


# -- the mutants of steering -------------------------------------------------------------------

def without_a_look_at_the_freeze_in_the_commit(patch):
    """A freeze that comes between the decision and its commit is overlooked."""
    commit, read_freezes = rc.Claims.commit, rc.read_freezes

    def commit_blindly(self, *arguments):
        rc.read_freezes = lambda *_: rc.NO_FREEZES
        try:
            commit(self, *arguments)
        finally:
            rc.read_freezes = read_freezes
    patch.setattr(rc.Claims, "commit", commit_blindly)


def without_a_look_at_the_freeze_of_a_target(patch):
    """Only a freeze of everything holds anybody."""
    patch.setattr(rc.Freezes, "holding", lambda self, _: [self.everything] if self.everything.frozen else [])


def with_a_freeze_of_a_target_that_is_everybodys(patch):
    """Whoever goes to another target waits too."""
    patch.setattr(rc.Freezes, "holding", lambda self, _: self.on)


def without(patch, **fields):
    """A strategy whose promise is forgotten."""
    stage_of, dispatches = rc.stage_of, rc._dispatches
    patch.setattr(rc, "stage_of", lambda release, nodes, now, strategy: stage_of(
        release, nodes, now, strategy._replace(**fields)))
    patch.setattr(rc, "_dispatches", lambda release, nodes, now, policy, strategy, *rest: dispatches(
        release, nodes, now, policy, strategy._replace(**fields), *rest))


def without_a_soak(patch):
    without(patch, soak_s=0.0)


def without_a_pause(patch):
    without(patch, pause_after=())


def without_a_limit_in_flight(patch):
    without(patch, max_parallel=0)


def without_a_limit_for_each_label(patch):
    without(patch, max_parallel_per={})


def without_labels_as_they_were(patch):
    """Who moves to another rack while a release runs counts there."""
    labels = rc._COMPUTED_OF_NODE["labels"]
    patch.setattr(rc, "RELEASE_NODE_COLUMNS", rc.RELEASE_NODE_COLUMNS.replace(labels, "h.labels"))


def without_a_preflight(patch):
    """Nobody is asked before batch 1."""
    patch.setattr(rc, "preflight_of", lambda *_: None)


def with_any_silence_tolerated(patch):
    """However few answer, batch 1 begins."""
    patch.setattr(rc.Preflight, "exceeded", property(lambda _: ""))


def with_a_preflight_that_waits_for_nobody(patch):
    """Batch 1 begins when the first one has answered."""
    patch.setattr(rc.Preflight, "waiting", property(
        lambda self: 0 if self.answered else self.total - len(self.silent)))


def without_probes(patch):
    """The agent's word is enough."""
    under = rc.Policy.under
    patch.setattr(rc.Policy, "under", lambda self, strategy: under(self, strategy)._replace(probes=0))


def without_the_second_look(patch):
    """What was verified once is verified."""
    stage_of = rc.stage_of
    patch.setattr(rc, "stage_of", lambda release, nodes, now, strategy: stage_of(
        release, rc.NodeIndex(n._replace(is_reverified=True) for n in nodes), now, strategy))


@mutants(
    (without_a_look_at_the_freeze_in_the_commit, 440), (without_a_look_at_the_freeze_of_a_target, 2),
    (with_a_freeze_of_a_target_that_is_everybodys, 4), (without_probes, 3), (without_the_second_look, 3),
    (without_a_soak, 3), (without_a_pause, 12), (without_a_limit_in_flight, 12), (without_a_limit_for_each_label, 19),
    (without_a_preflight, 7), (with_any_silence_tolerated, 7), (with_a_preflight_that_waits_for_nobody, 8))
def test_the_schedules_find_a_promise_that_is_not_kept(mutate, first, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(Violation):
        run_seeds(first, first + ENOUGH, world="steering")


def test_the_schedules_find_a_release_that_nobody_approved(monkeypatch):
    monkeypatch.setattr(rc, "read_candidates", lambda tx, read=rc.read_candidates: [
        c._replace(needs_approval=False) for c in read(tx)])
    with pytest.raises(Violation, match="which nobody has approved"):
        run_seeds(1, ENOUGH, world="steering")


def test_the_schedules_find_a_release_for_which_nobody_asked_for_an_approval(monkeypatch):
    monkeypatch.setattr(rc, "unasked", lambda _: [])
    with pytest.raises(Violation, match="which nobody has approved"):
        run_seeds(9, ENOUGH, world="shared")


# -- the mutants of what goes back, and of what is shared --------------------------------------

def with_ids_without_a_tag(patch):
    """What one database gave out, another gives out again."""
    patch.setattr(rc, "new_tag", lambda: "")


def with_already_applied_believed_at_a_first_try(patch):
    """A version that only has the same number is taken for this one."""
    observe = rc.observe
    patch.setattr(rc, "observe", lambda node, outcome, *rest: observe(node, outcome._replace(applied=0), *rest))


def with_order_by_target_alone(patch):
    """Two releases go to one node at the same time, the later one first."""
    runnable = rc.runnable
    patch.setattr(rc, "runnable", lambda candidates, now, freeze, _: runnable(
        candidates, now, freeze, lambda *_: False))


def without_the_last_version(patch):
    """A node is sent whatever the release has."""
    patch.setattr(rc, "_surpassed", lambda *_: [])
    patch.setattr(rc.Claims, "_raise_last_versions", staticmethod(lambda *_: None))


def with_the_agents_id_sent_again(patch):
    """After a 404 the id goes out that the agent gave the task."""
    intent = rc._intent

    def intent_again(release, node, *rest):
        change = intent(release, node, *rest)
        return change._replace(after=change.after._replace(task_id=node.task_id or change.after.task_id))
    patch.setattr(rc, "_intent", intent_again)


def with_rows_busy_in_place_of_addresses(patch):
    """Two rows of one host have nothing to do with each other."""
    def busy(self, tx, release_id):
        rows = tx.rows("SELECT node_id, status, hold_until, hold_clock FROM release_task_nodes "
                       "WHERE release_task_id <> ?", release_id)
        return frozenset((f"row {node_id}", 0) for node_id, status, *hold in rows
                         if status == "running" or self._state.moment().until_s(*hold) > 0)
    patch.setattr(rc.Claims, "_busy", busy)
    patch.setattr(rc.ReleaseNode, "endpoint", property(lambda self: (f"row {self.node_id}", 0)))


def with_deadlines_that_run_in_a_pause(patch):
    """Whoever waits in a pause or a freeze fails at its end."""
    patch.setattr(rc, "kept_from_dispatch", lambda *_: [])
    patch.setattr(rc, "halts_of", lambda _: [])


def with_a_second_look_that_never_ends(patch):
    """A node whose probes alternate keeps a release for ever."""
    awaited = rc._awaited
    patch.setattr(rc, "_awaited", lambda nodes, stage, now, policy, slots: awaited(
        nodes, stage, now, policy._replace(node_deadline_s=float("inf")), slots))


def with_the_clock_on_the_wall_alone(patch):
    """A soak, or a hold, is over when somebody sets the clock."""
    patch.setattr(rc.Moment, "clock_mark", lambda *_: "")


def with_claims_by_their_number_alone(patch):
    """A database that went back gives a claim's number to another owner, and the first one writes on."""
    def claimed(self, tx, claim):
        release = rc.read_release(tx, claim.release_id)
        if release.claim_fence != claim.fence or release.claim_expires_at is None:
            raise rc.ClaimLost("another number")
        return release

    def by_number(method):
        def ask(self, claim, *rest):
            with self._database.transaction() as tx:
                row = tx.row("SELECT claim_owner FROM release_tasks WHERE id = ?", claim.release_id)
            return method(self, claim._replace(owner=row[0] if row else ""), *rest)
        return ask
    write = rc.Queue.write_decision
    patch.setattr(rc.Claims, "_read_claimed", claimed)
    patch.setattr(rc.Claims, "renew", by_number(rc.Claims.renew))
    patch.setattr(rc.Claims, "drop", by_number(rc.Claims.drop))
    patch.setattr(rc.Queue, "write_decision", lambda self, tx, release, decision, now, actor, claim=None, **more: write(
        self, tx, release, decision, now, actor,
        claim and claim._replace(owner=rc.read_release(tx, release.id).claim_owner), **more))


def with_versions_that_are_forgotten(patch):
    """What a process saw of a lost release counts for nothing."""
    patch.setattr(rc.Seen, "version", property(lambda _: 0, lambda *_: None), raising=False)


def without_a_wait_after_a_database_went_back(patch):
    """An execute agent may be at a request that the database has lost, and gets the next."""
    obstacles = rc.Claims.dispatch_blockers
    patch.setattr(rc.Claims, "dispatch_blockers",
                  lambda *arguments: obstacles(*arguments)._replace(moved_s=float("inf")))


def with_lost_versions_that_are_kept_to_oneself(patch):
    """Who saw the database go back lets others give out the lost versions again."""
    patch.setattr(rc.DatabaseState, "write_rewind", lambda *_: None)


def with_a_first_version_for_new_releases_alone(patch):
    """What is half done goes on with a version below those that agents have."""
    def set_first_version(self, version):
        with self._database.transaction(write=True) as tx:
            tx.execute("UPDATE database_state SET first_version = ?", version)
    patch.setattr(rc.Releases, "set_first_version", set_first_version)


@mutants(
    (with_ids_without_a_tag, 65), (with_already_applied_believed_at_a_first_try, 62), (with_order_by_target_alone, 1),
    (without_the_last_version, 1), (with_the_agents_id_sent_again, 170), (with_rows_busy_in_place_of_addresses, 214),
    (with_deadlines_that_run_in_a_pause, 92), (with_a_second_look_that_never_ends, 22),
    (with_the_clock_on_the_wall_alone, 218), (with_claims_by_their_number_alone, 552),
    (with_versions_that_are_forgotten, 64), (without_a_wait_after_a_database_went_back, 147),
    (with_lost_versions_that_are_kept_to_oneself, 106), (with_a_first_version_for_new_releases_alone, 234),
    (without_labels_as_they_were, 28))
def test_the_schedules_find_a_success_that_is_none(mutate, first, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(Violation):
        run_seeds(first, first + ENOUGH, world="shared")


# -- and these make `why` say what is not so ----------------------------------------------------------

def with_a_queue_that_nobody_is_told_of(patch):
    """A release that waits for others seems to move."""
    patch.setattr(rc, "_order_step", lambda _: None)


def with_a_start_time_that_nobody_is_told_of(patch):
    """A release that waits for its time seems to move."""
    patch.setattr(rc, "_start_step", lambda _: None)


def with_an_approval_that_nobody_is_told_of(patch):
    """A release that waits for a second person seems to move."""
    patch.setattr(rc, "_approval_step", lambda _: None)


def with_a_pause_that_nobody_is_told_of(patch):
    """A release that waits for a person seems to move."""
    patch.setattr(rc, "_pause_step", lambda _: None)


def with_a_freeze_that_stops_nothing(patch):
    """What a freeze holds seems to move."""
    patch.setattr(rc, "_freeze_step", lambda _: rc.Step("freeze", rc.OK, "not frozen"))


def with_executors_that_never_get_old(patch):
    """Somebody seems to look for work when all are dead."""
    patch.setattr(rc.ExecutorRow, "is_live", lambda *_: True)


@mutants(
    (with_a_queue_that_nobody_is_told_of, 1), (with_a_start_time_that_nobody_is_told_of, 6),
    (with_a_pause_that_nobody_is_told_of, 3), (with_an_approval_that_nobody_is_told_of, 1),
    (with_a_freeze_that_stops_nothing, 1), (with_executors_that_never_get_old, 2))
def test_the_schedules_find_a_why_that_is_not_true(mutate, first, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(Violation):
        run_seeds(first, first + ENOUGH, world="steering")
