"""Who works is known to the database, and `why` tells what a release waits for, also when nobody works."""
from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

import contract
import pytest
from lab import World, beside, eventually, findings, serve_process, sql, statuses

import releasectl as rc


def executors(store: rc.Store) -> list[rc.ExecutorRow]:
    with store.database.transaction() as tx:
        return rc.read_executors(tx)


@contextlib.contextmanager
def looking(world: World, **settings: object) -> Iterator[rc.Executor]:
    """Run an executor's loop beside the body, as serve does."""
    executor = world.executor(**settings)
    with beside(executor.run_loop):
        try:
            eventually(lambda: any(row.owner == executor.owner for row in executors(world.store)))
            yield executor
        finally:
            executor.stop()
    executor.close()


# -- the table executors -------------------------------------------------------------------------

def test_an_executor_has_a_row_from_its_first_look_until_it_is_stopped(world):
    with looking(world) as executor:
        [row] = executors(world.store)
        assert (row.owner, row.host, row.kind, row.error) == (executor.owner, executor.host, "serve", "")
        assert row.is_live(time.time())
    [row] = executors(world.store)
    assert row.period_s == 0
    assert not row.is_live(time.time())


def test_an_idle_executor_commits_nothing_but_its_row_every_ten_seconds(sqlite_world, monkeypatch):
    executor, written = sqlite_world.executor(), []
    note = executor.store.claims.note_executor
    monkeypatch.setattr(executor.store.claims, "note_executor", lambda *words: written.append(note(*words)))
    now = executor.clock.elapsed()
    monkeypatch.setattr(executor, "clock", type("At", (), {"elapsed": lambda _: now, "wall": lambda _: 0.0})())
    for seconds in (0, 1, 9, 10, 11, 19.9, 20):
        now = now - now % 1000 + seconds
        executor._scan([], is_tick=False)
    assert len(written) == 3


@pytest.fixture
def after_an_outage(world) -> Iterator[rc.Executor]:
    """An executor that has looked for work, and then could not for 100 s."""
    with contextlib.closing(world.nodes(1).executor()) as executor:
        executor._scan([], is_tick=False)
        sql(world.store, "UPDATE executors SET seen_at = ?", rc.utc_text(time.time() - 100))
        world.advance(100)
        yield executor


def test_who_takes_a_release_after_an_outage_is_seen_before_it_has_it(world, after_an_outage, monkeypatch):
    create(world)
    claim, seen = after_an_outage.store.claims.claim, []
    monkeypatch.setattr(after_an_outage.store.claims, "claim", lambda *words: (
        seen.append(executors(world.store)[0].is_live(time.time())), claim(*words))[1])
    after_an_outage._scan([], is_tick=False)
    assert seen == [True]


def test_an_executor_that_goes_on_after_an_outage_is_seen_before_its_look_is_over(world, after_an_outage):
    after_an_outage.claim_runnable([], is_tick=False)
    assert executors(world.store)[0].is_live(time.time())


def test_the_row_says_why_an_executor_can_dispatch_nothing_as_soon_as_there_is_something(world):
    world.nodes(1)
    with looking(world, CONTROL_CERT="") as executor:
        assert executors(world.store)[0].error == ""
        world.store.releases.create(rc.ReleaseRequest("cdn"), "tests")
        executor.nudge()
        assert eventually(lambda: executors(world.store)[0].error) == "CONTROL_CERT is not set"
        sql(world.store, "UPDATE release_tasks SET status = 'cancelled'")
        executor.nudge()
        eventually(lambda: executors(world.store)[0].error == "")


def test_a_tick_writes_once_and_takes_the_place_of_the_last_one_whose_period_it_measures(world):
    world.executor().tick()
    [first] = executors(world.store)
    assert (first.kind, first.period_s) == ("tick", 60 + 15.2)
    sql(world.store, "UPDATE executors SET started_at = ?, seen_at = ?", *[rc.utc_text(time.time() - 300)] * 2)
    world.executor().tick()
    [second] = executors(world.store)
    assert second.owner != first.owner
    assert 315 < second.period_s < 330
    world.executor().close()
    assert executors(world.store) == [second]


@pytest.mark.parametrize(("seen_s", "stays"), [(-86000, True), (-86500, False), (3600, False)])
def test_the_next_executor_clears_rows_that_are_old_or_of_a_clock_that_was_ahead(world, seen_s, stays):
    sql(world.store, "INSERT INTO executors (owner, host, seen_at, period_sec) VALUES ('a:1:x', 'a', ?, 15)",
        rc.utc_text(time.time() + seen_s))
    assert not executors(world.store)[0].is_live(time.time())
    world.executor().tick()
    assert ("a:1:x" in [row.owner for row in executors(world.store)]) == stays


def test_an_executor_works_on_where_its_row_can_not_be_written(world, told):
    world.nodes(1)
    sql(world.store, "ALTER TABLE executors RENAME COLUMN error TO fault")
    made = world.store.releases.create(rc.ReleaseRequest("cdn"), "tests")
    world.drain()
    assert world.store.releases.get(made.release.id).status == "success"
    assert told.text.count("its row in the table executors") == 1


# -- why -----------------------------------------------------------------------------------------

def why(world: World, release: rc.Release | None = None) -> rc.Why:
    return world.store.why(release.id if release else None, 600.0)


def step(found: rc.Why, name: str) -> rc.Step | None:
    return next((one for one in found.steps if one.name == name), None)


def create(world: World, target: str = "cdn", **strategy: object) -> rc.Release:
    return world.store.releases.create(rc.ReleaseRequest(
        target, payload={"websites": []}, strategy=strategy), "tests").release


def explained(world: World, release: rc.Release | None, name: str, state: str, pattern: str, mend: str = "") -> rc.Why:
    """Wait until a step says what it must; return the whole."""
    def look() -> rc.Why | None:
        found = why(world, release)
        one = step(found, name)
        return found if one and one.state == state and re.fullmatch(pattern, one.text) else None

    found = eventually(look, message=lambda: f"{name} says {step(why(world, release), name)}")
    assert step(found, name).mend == mend
    assert all(contract.has_its_time(one.text, one.until) for one in found.steps)
    assert (found.stopped_by is None) == all(one.state != "stops" for one in found.steps)
    return found


TIME = r"\d\d:\d\d:\d\dZ, in \d+ (s|min)"
HOST = r"\S+ pid \d+"


def test_nothing_is_to_do(world):
    found = why(world)
    assert found.text == ("nothing to do: no release is open; no executor is running (none was seen for a day): start "
                          "`serve`")
    with looking(world):
        assert re.fullmatch(rf"nothing to do: no release is open; {HOST} looks for work, last 0 s ago", why(world).line)


def test_no_executor_was_ever_there_or_the_last_one_was_stopped(world):
    release = create(world.nodes(1))
    found = explained(world, release, "executor", "stops",
                      r"no executor is running \(none was seen for a day\): start `serve`", "releasectl serve")
    assert found.line == f"release 1 (v1) is stopped: {found.text}"
    create(world, startAt="2100-01-01T00:00:00Z")
    with looking(world):
        eventually(lambda: world.store.releases.get(release.id).is_terminal)
    found = explained(world, None, "executor", "stops",
                      rf"no executor is running \(stopped \d s ago: {HOST}\): start `serve`", "releasectl serve")
    assert found.release.id == 2


def test_an_executor_waits_for_a_certificate(world):
    release = create(world.nodes(1))
    with looking(world, CONTROL_CERT="") as executor:
        found = explained(world, release, "executor", "stops",
                          f"{executor.host} can't dispatch: CONTROL_CERT is not set", "releasectl check")
        assert found.stopped_by.name == "executor"


def test_a_tick_is_expected(world):
    world.nodes(1).executor().tick()
    release = create(world)
    found = explained(world, release, "executor", "ok", r"\S+ looks for work now and then: run-once, last \d s ago")
    assert found.line == f"release 1 (v1): {found.text}"
    sql(world.store, "UPDATE executors SET seen_at = ?", rc.utc_text(time.time() - 100))
    explained(world, release, "executor", "stops",
              rf"no executor is running \(last seen \d+ \w+ ago: {HOST}\): start `serve`", "releasectl serve")


def test_a_freeze_stops_it(world):
    release = create(world.nodes(1))
    world.store.releases.set_freeze(True, "alice", "holidays")
    with looking(world):
        found = explained(world, release, "freeze", "stops", "frozen by alice: holidays", "releasectl freeze off")
        assert found.line == "release 1 (v1) is stopped: frozen by alice: holidays"
        world.store.releases.set_freeze(False, "alice")
        eventually(lambda: world.store.releases.get(release.id).status == "success")
        assert why(world, release).line == "release 1 (v1): it has ended: success, 1 node succeeded"


def test_it_waits_in_the_queue_with_all_that_is_before_it(world):
    world.nodes(1)
    first, second, third = (create(world) for _ in range(3))
    explained(world, third, "order", "waits",
              f"waiting for release {first.id}, which is pending, then release {second.id}, which is pending",
              f"releasectl why {first.id}")
    world.store.releases.act("pause", second.id, "alice")
    found = explained(world, third, "order", "stops",
                      f"waiting for release {first.id}, which is pending, then release {second.id}, which alice paused",
                      f"releasectl why {second.id}")
    assert step(why(world, first), "order") is None
    assert found.stopped_by.name == "executor"


def test_it_waits_for_what_the_release_before_it_waits_for(world):
    world.nodes(2)
    requests = [rc.ReleaseRequest(target, payload={"websites": []}, node_ids=ids)
                for target, ids in (("dns", [1]), ("cdn", [1, 2]), ("cdn", [2]))]
    paused, first, second = (world.store.releases.create(request, "tests").release for request in requests)
    world.store.releases.act("pause", paused.id, "alice")
    with looking(world):
        found = explained(world, second, "order", "stops",
                          f"waiting for release {paused.id}, which alice paused, then release {first.id}, which is "
                          "pending", f"releasectl why {paused.id}")
        assert found.stopped_by.name == "order"


def test_it_waits_for_its_time(world):
    release = create(world.nodes(1), startAt=rc.utc_text(time.time() + 3600))
    with looking(world):
        found = explained(world, release, "start", "waits", rf"it starts at {TIME}")
        assert found.line == f"release 1 (v1) waits: {found.text}"
        assert found.stopped_by is None


def test_a_pause_waits_for_a_person(world):
    world.nodes(2)
    release = create(world, pauseAfter=[1])
    with looking(world):
        found = explained(world, release, "pause", "stops", "paused after batch 1: resume to go on",
                          "releasectl resume 1")
        assert found.stopped_by.name == "pause"


def test_failures_wait_for_a_person_who_accepts_them(world):
    world.nodes(2)
    world.agent(1).set(mode="refuse")
    release = create(world, onExceed="pause")
    with looking(world, AGENT_RETRIES=0):
        explained(world, release, "pause", "stops", "paused in batch 1: .*accept the failures.*|paused after batch 1.*",
                  "releasectl resume 1 --accept-failures")


def test_it_soaks(world):
    world.nodes(2)
    release = create(world, soakSec=600)
    with looking(world):
        explained(world, release, "soak", "waits", rf"soaking after batch 1 until {TIME}")
        answer = rc.release_json(world.store.releases.get(release.id))
        assert answer["statusReason"] == f"soaking after batch 1 until {answer['soakUntil']}"


def test_the_times_of_a_sentence_are_fields_beside_it_the_first_one_where_there_are_more(world):
    world.nodes(2)
    release = create(world, startAt="2999-01-31T22:00:00Z")
    assert step(why(world, release), "start").until.startswith("2999-01-31T22:00:00")
    world.store.releases.set_freeze(True, "alice", "the match", until="2999-01-01T06:00:00.000Z")
    world.store.releases.set_freeze(True, "alice", "a move", target="cdn", until="2998-12-31T06:00:00.000Z")
    freeze = step(why(world, release), "freeze")
    assert "until 2999-01-01T06:00Z" in freeze.text
    assert "until 2998-12-31T06:00Z" in freeze.text
    assert freeze.until[:16] == "2998-12-31T06:00"
    assert freeze.until == "2998-12-31T06:00:00.000Z"  # as it is stored, by whatever clock
    assert [one.name for one in why(world, release).steps if one.until] == ["freeze", "start"]
    sql(world.store, "UPDATE release_tasks SET during_freeze = 1")
    passing = step(why(world, release), "freeze")
    assert (passing.text.partition(" (")[0], passing.until[:4]) == ("it goes out all the same", "2999")
    assert contract.has_its_time(passing.text, passing.until)


def test_nodes_in_flight_have_deadlines_and_slots_are_used_up(world):
    world.nodes(3, task_ms=60_000)
    release = create(world, batches=[3], maxParallel=2)
    with looking(world) as executor:
        found = explained(world, release, "nodes", "ok",
                          rf"batch 1 of 1: 0 of 3 nodes done, 2 in flight: edge-1 \(deadline {TIME}\), edge-2 "
                          rf"\(deadline {TIME}\)")
        assert step(found, "executor").text == f"{executor.host} pid {executor.owner.split(':')[1]} works on it"
        explained(world, release, "slots", "waits", r"waiting for a free slot \(2 of 2 in use: maxParallel\)")


def test_an_error_is_retried(world):
    world.nodes(2)
    world.agent(1).set(mode="refuse")
    release = create(world)
    with looking(world, AGENT_RETRIES=20, RELEASE_EXECUTOR_INTERVAL_SEC=1):
        found = explained(world, release, "errors", "waits",
                          r"edge-1: .*refused.*, try \d+ of 21, (next in \d+ s|now)", "releasectl check")
        assert found.stopped_by is None


def test_an_address_may_be_busy_with_another_release(world):
    first = create(world.nodes(1, "execute"), target="other")
    sql(world.store, "UPDATE release_tasks SET status = 'failed' WHERE id = ?", first.id)
    sql(world.store, "UPDATE release_task_nodes SET status = 'failed', hold_until = ? WHERE release_task_id = ?",
        rc.utc_text(time.time() + 50), first.id)
    second = create(world)
    with looking(world):
        explained(world, second, "busy", "waits", rf"edge-1 may still be busy with release 1 until {TIME}", "")


@pytest.mark.slow
def test_nobody_works_on_a_release_whose_owner_was_killed(fleet_cli):
    world = fleet_cli.world
    fleet_cli.settings["AGENT_RETRIES"] = "20"
    with serve_process(fleet_cli) as process:
        world.agent(1).set(mode="refuse")
        release = create(world)
        eventually(lambda: world.store.releases.get(release.id).claim_owner)
        assert fleet_cli("why").code == 0
        process.kill()
        process.wait()
    period_s = executors(world.store)[0].period_s
    began = time.monotonic()
    sentence = rf"no executor is running \(last seen \d+ s ago: \S+ pid {process.pid}\): start `serve`"
    eventually(lambda: re.fullmatch(sentence, why(world, release).text), within_s=period_s + 1)
    assert time.monotonic() - began < period_s + 1
    result = fleet_cli("why")
    assert (result.code, result.out.splitlines()[-1]) == (1, "mend: releasectl serve")
    assert re.search(sentence, result.out.splitlines()[0])
    with serve_process(fleet_cli):  # the mend
        eventually(lambda: fleet_cli("why").code == 0)


def test_the_command_has_the_steps_as_json_and_so_has_the_api(sqlite_world, quick, new_client):
    quick.settings["DATABASE_URL"] = sqlite_world.url
    assert quick.ok("why").out.endswith("mend: releasectl serve\n")  # exit 0: no release is open
    created = quick.ok("node", "add", "edge-1", "127.0.0.1") and quick.ok("create")
    assert created.out.splitlines()[-2:] == [
        "release 1 (v1) is stopped: no executor is running (none was seen for a day): start `serve`",
        "follow: releasectl watch 1"]
    result = quick("why", "--json")
    assert result.code == 1
    assert (result.json["releaseId"], result.json["moves"], result.json["stoppedBy"]) == (1, False, "executor")
    answer = new_client(sqlite_world.store).ok("GET", "/api/v1/releases/1/why")
    assert answer == result.json
    assert [one["name"] for one in answer["steps"]] == ["database", "freeze", "executor", "nodes"]
    assert "release 9 does not exist" in quick.refused(3, "why", 9)


def test_without_an_id_it_tells_of_the_first_that_is_stopped_else_of_the_first_that_runs(world):
    later = rc.utc_text(time.time() + 3600)
    scheduled, moves, paused = (create(world.nodes(1) if target == "a" else world, target, **strategy)
                                for target, strategy in (("a", {"startAt": later}), ("b", {}), ("c", {})))
    with looking(world):
        sql(world.store, "UPDATE release_tasks SET status = 'paused' WHERE id = ?", paused.id)
        assert why(world).release.id == paused.id
        sql(world.store, "UPDATE release_tasks SET status = 'cancelled' WHERE id = ?", paused.id)
        sql(world.store, "UPDATE release_tasks SET status = 'running', claim_owner = 'a:1:x', claim_expires_at = ? "
            "WHERE id = ?", rc.utc_text(time.time() + 60), moves.id)
        assert why(world).release.id == moves.id
        sql(world.store, "UPDATE release_tasks SET status = 'cancelled' WHERE id = ?", moves.id)
        assert why(world).release.id == scheduled.id


def test_without_an_id_the_one_that_runs_is_found_behind_many_that_wait(world):
    later = rc.utc_text(time.time() + 3600)
    world.nodes(1)
    for number in range(rc.MAX_OF_A_KIND + 1):
        create(world, f"target-{number}", startAt=later)
    runs = create(world)
    sql(world.store, "UPDATE release_tasks SET status = 'running', claim_owner = 'a:1:x', claim_expires_at = ? "
        "WHERE id = ?", rc.utc_text(time.time() + 60), runs.id)
    with looking(world):
        assert why(world).release.id == runs.id


@pytest.mark.parametrize(("kind", "mend"), [
    ("unreachable", "releasectl retry 1 --plan"), ("", "releasectl retry 1 --plan"),
    ("tls", "releasectl check; releasectl retry 1 --plan")])
def test_of_a_release_that_failed_it_tells_what_would_make_up_for_it(world, quick, kind, mend):
    quick.settings["DATABASE_URL"] = world.url
    create(world.nodes(1))
    with world.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'failed', error_kind = ?, attempts = 1", kind)
        tx.execute("UPDATE release_tasks SET status = 'failed', status_reason = 'stopped by node edge-1 in batch 1', "
                   "finished_at = created_at, started_at = created_at")
    for words, code in (["why"], 1), (["why", 1], 0):  # none is open, and no executor runs
        result = quick(*words)
        lines = result.out.splitlines()
        assert (lines[0], lines[-1]) == (
            "release 1 (v1): it has ended: failed, stopped by node edge-1 in batch 1", f"mend: {mend}")
        assert (result.code, len(lines)) == (code, 4 + code), lines
    create(world, "cdn")
    with world.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'success' WHERE release_task_id = 2")
        tx.execute("UPDATE release_tasks SET status = 'success' WHERE id = 2")
    assert why(world).release is None
    assert "mend:" not in quick.ok("why", 1).out


def test_check_sees_dead_executors_a_freeze_and_paused_releases(sqlite_world, quick):
    quick.settings.update(DATABASE_URL=sqlite_world.url, MTLS_ENABLED="0")
    create(sqlite_world.nodes(1))
    sqlite_world.store.releases.act("pause", 1, "alice")
    sqlite_world.store.releases.set_freeze(True, "bob", "holidays")
    found = findings(quick("check", "--json"))
    assert found["executor"] == (False, "no executor is running (none was seen for a day): start `serve`; mend: "
                                        "releasectl serve")
    assert found["freeze"][0] is False
    assert found["freeze"][1].startswith("frozen by bob at ")
    assert found["release 1"] == (False, "paused by alice: resume to go on; mend: releasectl resume 1")


def test_check_sees_an_executor_that_died_within_its_claim_as_why_does(sqlite_world, quick):
    quick.settings.update(DATABASE_URL=sqlite_world.url, MTLS_ENABLED="0")
    release = create(sqlite_world.nodes(1))
    claim = sqlite_world.store.claims.claim(release.id, "gone:7:x", 30)
    assert claim
    sql(sqlite_world.store, "INSERT INTO executors (owner, host, seen_at, period_sec) VALUES ('gone:7:x', 'gone', ?, "
        "15)", rc.utc_text(time.time() - 20))
    found = findings(quick("check", "--json"))
    assert re.fullmatch(r"no executor is running \(last seen 2\d s ago: gone pid 7\): start `serve`; mend: releasectl "
                        "serve", found["executor"][1])


def test_check_tells_a_freeze_where_no_release_is_open_too(sqlite_world, quick):
    quick.settings.update(DATABASE_URL=sqlite_world.url, MTLS_ENABLED="0")
    sqlite_world.store.releases.set_freeze(True, "bob", "holidays")
    assert findings(quick("check", "--json"))["freeze"][0] is False


# -- what is stored may be old ---------------------------------------------------------------------

def told_of(world: World, release: rc.Release) -> set[str]:
    """Return what list, GET of a release, watch and the page of health say."""
    releases = world.store.releases
    return {releases.page().items[0].status_reason, releases.as_shown(releases.get(release.id)).status_reason,
            releases.progress(release.id).release.status_reason, releases.open()[0][0].status_reason}


def same_told_of(world: World, release: rc.Release) -> str:
    """Return what all of these say, where it has a number of seconds that may go on between them."""
    [text] = eventually(lambda: [told for told in [told_of(world, release)] if len(told) == 1])[0]
    return text


def test_a_queued_release_says_that_nobody_will_take_it(world):
    release = create(world.nodes(1))
    nobody = "no executor is running (none was seen for a day): start `serve`"
    assert told_of(world, release) == {nobody}
    world.store.releases.set_freeze(True, "alice", "holidays")
    assert told_of(world, release) == {f"frozen: holidays; {nobody}"}
    assert world.store.releases.get(release.id).status_reason == "frozen: holidays"
    with looking(world):
        assert told_of(world, release) == {"frozen: holidays"}


def test_a_running_release_says_who_was_seen_last_and_who_takes_it_over(world):
    world.nodes(2, task_ms=60_000)
    release = create(world, batches=[2])
    with looking(world):
        eventually(lambda: [text for text in told_of(world, release) if "slowest" in text])
        stored = world.store.releases.get(release.id)
    sql(world.store, "UPDATE release_tasks SET claim_owner = 'gone:7:x', claim_expires_at = ? WHERE id = ?",
        rc.utc_text(time.time() + 20), release.id)
    sql(world.store, "INSERT INTO executors (owner, host, seen_at, period_sec) VALUES ('gone:7:x', 'gone', ?, 15)",
        rc.utc_text(time.time() - 20))
    assert stored.status_reason == world.store.releases.get(release.id).status_reason
    nobody = same_told_of(world, release)
    assert re.fullmatch(rf"no executor is running \(stopped \d s ago: {HOST}\): start `serve`", nobody)
    with looking(world):
        text = same_told_of(world, release)
        assert re.fullmatch(rf"nobody works on it: gone pid 7 was last seen \d+ s ago; {HOST} takes it over in \d+ s",
                            text)
        assert step(why(world, release), "executor").state == "waits"


def test_a_paused_release_needs_nobody(world):
    world.nodes(2)
    release = create(world, pauseAfter=[1])
    with looking(world):
        eventually(lambda: world.store.releases.get(release.id).status == "paused")
    assert told_of(world, release) == {"paused after batch 1: resume to go on"}


def test_status_list_and_watch_say_it_too(sqlite_world, quick, new_client):
    quick.settings["DATABASE_URL"] = sqlite_world.url
    create(sqlite_world.nodes(1))
    for words in (("status", 1), ("list",)):
        assert "no executor is running" in quick.ok(*words).out
    watched = quick("watch", 1, "--timeout", "1")
    assert watched.code == 75
    assert watched.err.count("no executor is running") == 2  # once as it goes, once at its end
    answer = new_client(sqlite_world.store).ok("GET", "/api/v1/releases/1")
    assert answer["release"]["statusReason"].startswith("no executor is running")


# -- the database takes no writes -------------------------------------------------------------------

FULL = "the disk is full"


def refuse_writes(store: rc.Store, *tables: str) -> None:
    """Let every write to some tables fail, as on a full disk."""
    is_sqlite = isinstance(store.database.engine, rc.SqliteEngine)
    if not is_sqlite:
        sql(store, "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                   f"$$ BEGIN RAISE EXCEPTION '{FULL}'; END $$")
    for table in tables:
        for act in ("INSERT", "UPDATE"):
            sql(store, f"CREATE TRIGGER no_{act}_{table} BEFORE {act} ON {table} " + (
                f"BEGIN SELECT RAISE(ABORT, '{FULL}'); END" if is_sqlite else
                "FOR EACH ROW EXECUTE FUNCTION refuse()"))


def allow_writes(store: rc.Store, *tables: str) -> None:
    for table in tables:
        for act in ("INSERT", "UPDATE"):
            sql(store, f"DROP TRIGGER no_{act}_{table}" + (
                "" if isinstance(store.database.engine, rc.SqliteEngine) else f" ON {table}"))


def test_who_can_not_write_that_it_works_says_so_and_not_that_nobody_does(world, new_client):
    release, old = create(world.nodes(1), startAt="2100-01-01T00:00:00Z"), rc.utc_text(time.time() - 300)
    with looking(world) as executor:
        sql(world.store, "UPDATE executors SET seen_at = ?", old)
        refuse_writes(world.store, "executors")
        world.advance(11)
        executor.nudge()
        found = explained(world, release, "database", "stops", f"it takes no writes: .*{FULL}.*", "releasectl check")
        assert found.stopped_by.name == "database"
        assert step(found, "executor") == rc.Step("executor", "waits", "not known: who works can't write that it does")
        assert [re.sub(f"writes: .*{FULL}.*", "writes", text) for text in told_of(world, release)] == [
            "scheduled for 2100-01-01T00:00:00.000Z; the database takes no writes"]
        answer = new_client(world.store).ok("GET", f"/api/v1/releases/{release.id}/why")
        assert answer["stoppedBy"] == "database"
        assert "start `serve`" not in str(answer)
        world.store.state.check_write()  # of another table: it is the executor's row that tells who works
        assert why(world, release).stopped_by.name == "database"
        allow_writes(world.store, "executors")
        executor.nudge()
        eventually(lambda: why(world, release).stopped_by is None)


def test_a_write_that_failed_long_ago_tells_nothing(world):
    refuse_writes(world.store, "health_probe")
    with pytest.raises(rc.DatabaseError, match=FULL):
        world.store.state.check_write()
    assert FULL in world.store.state.write_error
    world.advance(121)
    assert world.store.state.write_error == ""


def test_why_tries_to_write_but_for_a_release_that_has_ended(world, quick, new_client):
    quick.settings["DATABASE_URL"] = world.url
    release, ended = create(world.nodes(1)), create(world)
    sql(world.store, "UPDATE release_tasks SET status = 'failed', status_reason = 'by hand' WHERE id = ?", ended.id)
    refuse_writes(world.store, "health_probe")
    assert quick("why", release.id, "--json").json["stoppedBy"] == "database"
    assert quick.ok("why", ended.id).out.splitlines()[0] == "release 2 (v2): it has ended: failed, by hand"
    client = new_client(world.store)
    assert client.ok("GET", f"/api/v1/releases/{ended.id}/why")["stoppedBy"] is None
    assert world.store.state.write_error == ""
    assert client.ok("GET", f"/api/v1/releases/{release.id}/why")["stoppedBy"] == "database"


def test_why_says_within_a_second_that_the_database_takes_writes_again(world, new_client, monkeypatch):
    monkeypatch.setattr(rc, "READY_CHECK_EVERY_S", 0.0)
    release = create(world.nodes(1))
    client = new_client(world.store)
    refuse_writes(world.store, "health_probe")
    path = f"/api/v1/releases/{release.id}/why"
    assert client.ok("GET", path)["stoppedBy"] == "database"
    allow_writes(world.store, "health_probe")
    assert client.ok("GET", path)["stoppedBy"] != "database"


def test_a_first_row_that_could_not_be_written_clears_old_ones_later(world):
    sql(world.store, "INSERT INTO executors (owner, host, seen_at, period_sec) VALUES ('a:1:x', 'a', ?, 15)",
        rc.utc_text(time.time() - 86500))
    executor = world.executor()
    refuse_writes(world.store, "executors")
    executor._scan([], is_tick=False)
    assert [row.owner for row in executors(world.store)] == ["a:1:x"]
    allow_writes(world.store, "executors")
    executor._scan([], is_tick=False)
    assert [row.owner for row in executors(world.store)] == [executor.owner]


def test_an_executor_whose_time_can_not_be_read_was_not_seen(world):
    release = create(world.nodes(1))
    sql(world.store, "INSERT INTO executors (owner, host, seen_at, period_sec) VALUES ('gone:7:x', 'gone', 'noon', 0)")
    assert why(world, release).text == "no executor is running (none was seen for a day): start `serve`"
    sql(world.store, "UPDATE release_tasks SET status = 'running', claim_owner = 'gone:7:x', claim_expires_at = ?",
        rc.utc_text(time.time() + 20))
    sql(world.store, "INSERT INTO executors (owner, host, seen_at, period_sec) VALUES ('b:8:x', 'b', ?, 15)",
        rc.utc_text(time.time()))
    assert re.fullmatch(r"gone pid 7 is gone; b pid 8 takes it over in \d+ s", why(world, release).text)


# -- what it costs, and what it takes from a stored sentence ------------------------------------------

@pytest.fixture
def rows_read(monkeypatch):
    """The numbers of rows that each query for several of them gave."""
    counts, rows = [], rc.Transaction.rows

    def counted(tx, *arguments):
        found = rows(tx, *arguments)
        counts.append(len(found))
        return found

    monkeypatch.setattr(rc.Transaction, "rows", counted)
    return counts


def test_why_reads_nodes_in_flight_and_no_others(world, rows_read):
    for number in range(300):
        world.store.nodes.add(f"edge-{number}", f"10.0.{number // 200}.{number % 200 + 1}")
    release = create(world, batches=[300])
    for statement in ("UPDATE release_tasks SET status = 'running'",
                      "UPDATE release_task_nodes SET status = 'running' WHERE node_id <= 5",
                      "UPDATE release_task_nodes SET status = 'failed' WHERE node_id <= 3",
                      "UPDATE release_tasks SET status = 'paused'"):
        sql(world.store, statement)
        rows_read.clear()
        assert step(why(world, release), "nodes").text.startswith("batch 1 of 1: ")
        assert max(rows_read) <= 10
    assert step(why(world, release), "pause").mend == "releasectl resume 1"
    sql(world.store, "UPDATE release_tasks SET status = 'success'")
    rows_read.clear()
    assert why(world, release).text.startswith("it has ended: success")
    assert rows_read == []


def test_a_persons_text_is_no_error_that_is_tried_again(world):
    release = create(world.nodes(1), batches=[1])
    now_s = time.time()
    at_work = [rc.ExecutorRow("a:1:x", "a", "serve", rc.utc_text(now_s), rc.utc_text(now_s), 15, "")]
    text = "; trying again: edge-1: refused, try 2 of 3, now; waiting for a free slot: 1 of 1 in use by release 7"
    for reason, names in ((f"batch 1 of 1: waiting for 1 of 1 node{text}", ["errors", "slots"]),
                          (f"frozen: lunch{text}", []), (f"paused by alice{text}", [])):
        told = release._replace(status="running", status_reason=reason, claim_owner="a:1:x",
                                claim_expires_at=rc.utc_text(now_s + 20))
        found = rc.explain(rc.Facts(told, at_work, rc.NO_FREEZES, world.store.state.moment(), now_s))
        assert [one.name for one in found.steps if one.name in ("errors", "slots")] == names


def test_a_release_waits_for_the_slots_that_another_one_has(world, monkeypatch):
    monkeypatch.setattr(rc, "STOP_GRACE_S", 0.5)
    world.nodes(2)
    world.agent(1).set(mode="hang")
    make = world.store.releases.create
    first = make(rc.ReleaseRequest("a", node_ids=[1]), "tests").release
    with looking(world, AGENT_CONCURRENCY=1):
        eventually(lambda: statuses(world.store, first.id) == ["running"])  # it has the slot
        second = make(rc.ReleaseRequest("b", node_ids=[2]), "tests").release
        explained(world, second, "slots", "waits",
                  r"waiting for a free slot \(1 of 1 in use by release 1: AGENT_CONCURRENCY\)", "releasectl pause 1")
        assert step(why(world, first), "slots") is None
        world.agent(1).set(mode="normal")


# -- mends ---------------------------------------------------------------------------------------------

def _queue_behind_failures(world: World) -> None:
    world.agent(1).set(mode="refuse")
    create(world, onExceed="pause")
    create(world)
    world.drain(AGENT_RETRIES=0)


def _failed_before_a_success(world: World) -> None:
    world.agent(1).set(mode="refuse")
    create(world)
    world.drain(AGENT_RETRIES=0)
    world.agent(1).set(mode="normal")
    create(world)
    world.drain()


def _frozen_and_paused(world: World) -> None:
    world.store.releases.act("pause", create(world).id, "alice")
    world.store.releases.set_freeze(True, "bob", "holidays")


def _busy_address(world: World) -> None:
    create(world, target="other")
    sql(world.store, "UPDATE release_tasks SET status = 'failed'")
    sql(world.store, "UPDATE release_task_nodes SET status = 'failed', hold_until = ?", rc.utc_text(time.time() + 50))
    create(world)


def _failing_and_paused(world: World) -> None:
    world.store.releases.act("pause", create(world, onExceed="pause").id, "alice")
    sql(world.store, "UPDATE release_task_nodes SET status = 'failed' WHERE node_id = 1")  # no counter tells it


@pytest.mark.parametrize("situation", [_queue_behind_failures, _failed_before_a_success, _frozen_and_paused,
                                       _busy_address, _failing_and_paused, create])
def test_every_mend_can_be_done(world, quick, situation):
    quick.settings.update(DATABASE_URL=world.url, MTLS_ENABLED="0")
    situation(world.nodes(2))
    for release in world.store.releases.page().items:
        for one in why(world, release).steps:
            words = one.mend.split()
            if words and words[1] != "serve":  # which test_nobody_works_on_a_release_whose_owner_was_killed runs
                result = quick(*words[1:])
                assert result.code in (0, 1), (one, result)
                assert "releasectl: " not in result.err, (one, result)
