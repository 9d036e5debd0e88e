"""Twelve ways to make nothing happen, made for real and mended by nothing but what `releasectl why` says."""
from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import CLOCK, USER, Cli, eventually, serve_process, sql
from test_approvals import signed_in

import releasectl as rc

pytestmark = pytest.mark.slow

# Of what goes on by itself.
LONG_ENOUGH_TO_BE_READ_S = 25


def mend_of(text: str) -> str:
    """Return the mend at the end of what why says, "" for none."""
    last = text.splitlines()[-1]
    return last[len("mend: "):] if last.startswith("mend: ") else ""


class Night:
    """A person with nothing but `releasectl why` and what it says."""

    def __init__(self, cli: Cli, processes: contextlib.ExitStack):
        self.cli, self.store, self._processes = cli, cli.world.store, processes
        self.stop: Callable[[], None] = lambda: None

    def serve(self) -> None:
        self.stop = self._processes.enter_context(serve_process(self.cli)).kill

    def create(self, *words: object) -> int:
        return self.cli.ok("create", "--json", "--payload", self.cli.file("p.json", '{"websites":[]}'),
                           *words).json["releaseId"]

    def why(self, release_id: int, pattern: str, code: int) -> str:
        """Wait until why says a sentence, with its exit code; return its mend, "" for none."""
        def look() -> str | None:
            result = self.cli("why", release_id)
            return result.out if result.code == code and re.search(pattern, result.out) else None

        return mend_of(eventually(
            look, message=lambda: f"why says {self.cli('why', release_id)}, and not {pattern!r} with {code}"))

    def mend(self, words: str, code: int = 0) -> str:
        """Do what is told as a mend: one command, as it stands; return what it says, with this exit code."""
        program, *arguments = shlex.split(words)
        assert program == "releasectl", words
        if arguments == ["serve"]:
            self.serve()
            return ""
        result = self.cli(*arguments)
        assert result.code == code, result
        return result.out + result.err

    def goes_on(self, *release_ids: int) -> None:
        for release_id in release_ids:
            eventually(lambda: self.store.releases.get(release_id).status == "success",  # noqa: B023
                       message=lambda: f"release {release_id} does not end: {self.cli('why', release_id)}")  # noqa: B023


@pytest.fixture
def night(fleet_cli) -> Iterator[Night]:
    fleet_cli.settings.update(AGENT_RETRIES="20", AGENT_CONNECT_TIMEOUT_SEC="2")
    with contextlib.ExitStack() as processes:
        yield Night(fleet_cli, processes)


def test_where_no_executor_runs_the_mend_is_to_start_one(night):
    night.serve()
    night.stop()
    release_id = night.create()
    mend = night.why(release_id, r"is stopped: no executor is running \(last seen \d+ s ago: ", 1)
    assert mend == "releasectl serve"
    night.mend(mend)
    night.goes_on(release_id)


def test_where_our_certificate_is_missing_check_names_the_setting(night):
    certificate = night.cli.settings.pop("CONTROL_CERT")
    night.serve()
    release_id = night.create()
    mend = night.why(release_id, "is stopped: .* can't dispatch: CONTROL_CERT is not set", 1)
    assert mend == "releasectl check"
    assert re.search("CONTROL_CERT +not set: agents can't be called without it", night.mend(mend, code=2))
    night.stop()
    night.cli.settings["CONTROL_CERT"] = certificate
    night.serve()
    night.goes_on(release_id)


def test_where_agents_refuse_our_certificate_check_says_that_they_will(night, tmp_path):
    right = Path(night.cli.settings["CONTROL_CERT"]).parent
    for name in ("control.crt", "control.key"):
        shutil.copy(right / "other" / name, tmp_path / name)
        (tmp_path / name).chmod(0o600)
    night.cli.settings.update(CONTROL_CERT=str(tmp_path / "control.crt"), CONTROL_KEY=str(tmp_path / "control.key"))
    night.serve()
    release_id = night.create()
    mend = night.why(release_id, r"edge-1: .*refused our client certificate.*, try \d+ of 21", 0)
    assert "agents will refuse it" in night.mend(mend, code=2)
    for name in ("control.key", "control.crt"):
        shutil.copy(right / name, tmp_path / f"new.{name}")
        (tmp_path / f"new.{name}").chmod(0o600)
        os.replace(tmp_path / f"new.{name}", tmp_path / name)
    night.goes_on(release_id)


def test_a_release_that_is_frozen_names_the_freeze_and_what_lifts_it(night):
    night.serve()
    night.cli.ok("freeze", "on", "--reason", "the match")
    release_id = night.create()
    night.mend(night.why(release_id, "is stopped: frozen by .*: the match", 1))
    night.goes_on(release_id)


def test_a_release_in_the_queue_names_the_one_before_it_and_that_one_its_mend(night):
    night.serve()
    first = night.create("--pause-after", "1")
    second = night.create()
    mend = night.why(second, f"is stopped: waiting for release {first}, which ", 1)
    assert mend == f"releasectl why {first}"
    night.mend(mend_of(night.mend(mend, code=1)))
    night.goes_on(first, second)


def test_a_release_whose_time_has_not_come_says_when_and_needs_no_mend(night):
    night.serve()
    release_id = night.create("--start-at", rc.utc_text(time.time() + LONG_ENOUGH_TO_BE_READ_S))
    assert night.why(release_id, rf"waits: it starts at {CLOCK}, in \d+ s", 0) == ""
    night.goes_on(release_id)


def test_a_release_that_is_paused_says_after_what_and_how_to_resume_it(night):
    night.serve()
    release_id = night.create("--pause-after", "1")
    night.mend(night.why(release_id, "is stopped: paused after batch 1: resume to go on", 1))
    night.goes_on(release_id)


def test_a_release_that_soaks_says_until_when_and_needs_no_mend(night):
    night.serve()
    release_id = night.create("--soak", LONG_ENOUGH_TO_BE_READ_S)
    assert night.why(release_id, rf"waits: soaking after batch 1 until {CLOCK}, in \d+ s", 0) == ""
    night.goes_on(release_id)


def test_where_all_slots_are_in_use_the_mend_pauses_who_has_them(night):
    night.cli.settings.update(AGENT_CONCURRENCY="1", AGENT_REQUEST_TIMEOUT_SEC="10")
    night.serve()
    night.cli.world.agent(1).set(mode="hang")
    first = night.create("--node", "edge-1")
    eventually(lambda: night.store.releases.get(first).status == "running")
    second = night.create("--target", "dns", "--node", "edge-2")
    mend = night.why(second, rf"waiting for a free slot \(1 of 1 in use by release {first}: AGENT_CONCURRENCY\)", 0)
    assert mend == f"releasectl pause {first}"
    night.mend(mend)
    night.goes_on(second)
    night.mend(night.why(first, "is stopped: paused by ", 1))
    night.cli.world.agent(1).set(mode="normal")  # somebody starts it
    night.goes_on(first)


def tried(night) -> int:
    """Return a release whose agent is dead, and is tried again."""
    night.serve()
    night.cli.world.agent(1).set(mode="refuse")
    release_id = night.create()
    night.why(release_id, r"edge-1: .*refused.*, try \d+ of 21, (next in \d+ s|now)", 0)
    return release_id


def test_where_an_agent_is_dead_its_error_and_the_next_try_are_named(night):
    release_id = tried(night)
    night.cli.world.agent(1).set(mode="normal")  # somebody starts it
    night.goes_on(release_id)


def test_where_a_freeze_keeps_a_dead_agent_from_its_next_try_both_are_named(night):
    release_id = tried(night)
    night.cli.ok("freeze", "on", "--reason", "the match")
    eventually(lambda: re.fullmatch(r"frozen: the match; edge-1 is tried again after that: .*refused.*",
                                    night.store.releases.get(release_id).status_reason),
               message=lambda: night.store.releases.get(release_id).status_reason)
    night.cli.world.agent(1).set(mode="normal")
    night.mend(night.why(release_id, "is stopped: frozen by .*: the match", 1))
    night.goes_on(release_id)


def test_where_an_address_is_busy_it_says_with_what_and_until_when(night):
    first = night.create("--target", "dns", "--node", "edge-1")
    sql(night.store, "UPDATE release_tasks SET status = 'failed'")
    sql(night.store, "UPDATE release_task_nodes SET status = 'failed', hold_until = ?",
        rc.utc_text(time.time() + LONG_ENOUGH_TO_BE_READ_S))
    night.serve()
    release_id = night.create()
    mend = night.why(release_id, rf"edge-1 may still be busy with release {first} until {CLOCK}, in \d+ s", 0)
    assert mend == ""  # it goes on by itself
    night.goes_on(release_id)


def test_where_the_database_is_away_why_says_which_one_to_bring_back(night, tmp_path):
    night.serve()
    release_id = night.create("--pause-after", "1")
    eventually(lambda: night.store.releases.get(release_id).status == "paused")
    path = night.cli.settings["DATABASE_URL"][len("sqlite:///"):]
    folder, away = Path(path).parent, tmp_path.parent / f"{tmp_path.name}-away"
    away.mkdir()
    for name in os.listdir(folder):
        if name.startswith(Path(path).name):
            os.rename(folder / name, away / name)
    text = night.cli("why", release_id)
    assert text.code == rc.EXIT_UNAVAILABLE
    assert re.search(rf"releasectl: database {re.escape(path)} does not exist: bring it back", text.err)
    for name in os.listdir(away):
        os.rename(away / name, folder / name)
    night.mend(night.why(release_id, "is stopped: paused after batch 1", 1))
    night.goes_on(release_id)


def test_where_the_database_takes_no_writes_check_says_why(night):
    night.serve()
    release_id = night.create("--pause-after", "1")
    eventually(lambda: night.store.releases.get(release_id).status == "paused")
    tables = ("executors", "health_probe", "release_tasks")
    for table in tables:
        sql(night.store, f"CREATE TRIGGER no_{table} BEFORE UPDATE ON {table} BEGIN "
                         "SELECT RAISE(ABORT, 'the disk is full'); END")
    mend = night.why(release_id, "is stopped: it takes no writes: .*the disk is full", 1)
    assert mend == "releasectl check"
    assert re.search("DATABASE_URL +.*the disk is full", night.mend(mend, code=69))
    for table in tables:
        sql(night.store, f"DROP TRIGGER no_{table}")  # somebody makes room
    night.mend(night.why(release_id, "is stopped: paused after batch 1", 1))
    night.goes_on(release_id)


def test_where_nobody_has_approved_it_its_author_is_told_who_may(night, tokens):
    night.cli.settings["APPROVALS"] = "1"
    night.serve()
    release_id = night.create()
    mend = night.why(release_id, rf"is stopped: waiting for approval by somebody else than {USER}: ", 1)
    assert mend == f"releasectl approve {release_id}"
    assert f"release {release_id} was made by {USER}: somebody else must approve it" in night.mend(mend, code=3)
    with signed_in(night.store, tokens, "bob") as bob:
        bob.ok("POST", f"/api/v1/releases/{release_id}/approve", {})
    night.goes_on(release_id)


def test_where_somebody_else_set_the_freeze_it_is_told_who_lifts_it(night, tokens):
    night.cli.settings["APPROVALS"] = "1"
    night.serve()
    with signed_in(night.store, tokens, "bob") as bob, signed_in(night.store, tokens, "alice") as alice:
        bob.ok("PUT", "/api/v1/freeze", {"frozen": True, "reason": "the match"})
        release_id = night.create("--emergency", "--reason", "no approval")
        mend = night.why(release_id, "is stopped: frozen by bob: the match; bob lifts it, or any two others", 1)
        assert f"so bob or anybody but {USER} lifts it" in night.mend(mend, code=3)
        night.why(release_id, f"{USER} wants it lifted since .*, so bob or anybody but {USER} lifts it", 1)
        alice.ok("PUT", "/api/v1/freeze", {"frozen": False})
    night.goes_on(release_id)
