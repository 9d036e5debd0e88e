"""The log: one line an event, a release to be followed by its id, in text, JSON and the journal."""
from __future__ import annotations

import json
import logging
import os
import re
import subprocess

import pytest
from lab import Cli, add_nodes, eventually, new_release, nothing_committed, serving

import releasectl as rc

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def about(record: logging.LogRecord) -> dict:
    return getattr(record, "about", {})


def said(records: list[logging.LogRecord], least: int = logging.DEBUG) -> list[str]:
    return [record.getMessage() for record in records if record.levelno >= least]


def logged(formatter: logging.Formatter, message: str, *arguments: object, error: Exception | None = None,
           level: int = logging.INFO, **keys: object) -> str:
    """Return what a formatter makes of one record."""
    exc_info = (type(error), error, None) if error else None
    record = rc.log.makeRecord("releasectl", level, __file__, 1, message, arguments, exc_info, extra=rc.about(**keys))
    return formatter.format(record)


# -- what is told ------------------------------------------------------------------------------

def test_each_change_of_a_status_is_one_line_with_the_events_words(world, records):
    world.nodes(4)
    world.agent(2).set(outcome="failed", message="nginx -t failed")
    store = world.store
    new_release(store, strategy={"batches": [1, 1, 1]})
    store.releases.act("pause", 1, "anna", "lunch")
    store.releases.act("resume", 1, "anna")
    world.executor().drain()
    store.releases.retry(1, "bert")
    store.releases.act("cancel", 2, "bert", "no more")
    for release_id in (1, 2):
        wanted = [(e.event, e.node_name, e.actor) for e in store.releases.events(release_id)]
        lines = [(a["event"], a.get("node", ""), a["actor"]) for a in map(about, records)
                 if a.get("release") == release_id and "event" in a]
        for change in wanted:
            # the release's own end is told as what it became
            assert lines.count(change) == wanted.count(change), (change, lines)
        assert {line[0] for line in lines} - {change[0] for change in wanted} <= {"batch_done", "taken"}


def test_a_release_can_be_followed_by_its_id(world, records):
    world.nodes(3)
    world.agent(2).set(outcome="failed", message="nginx -t failed")
    new_release(world.store, reason="new site")
    world.executor().drain()
    lines = [line for line in said(records, logging.INFO) if "release 1" in line]
    assert all(line.startswith("release 1 (v1): ") for line in lines)
    assert lines[0] == "release 1 (v1): created by test, 3 nodes in batches of 1, 2: new site"
    assert re.fullmatch(r"release 1 \(v1\): started, taken by \S+", lines[1])
    assert "release 1 (v1): batch 1 done" in lines
    assert "release 1 (v1): node edge-2 failed: nginx -t failed" in lines
    assert lines[-1].startswith("release 1 (v1): failed, ")
    for record in records:
        assert ("release" in about(record)) == record.getMessage().startswith("release 1 (v1): "), record


def test_single_nodes_that_do_well_are_told_only_for_debugging(world, records):
    world.nodes(3)
    new_release(world.store)
    world.executor().drain()
    nodes = [record for record in records if "node" in about(record) and "event" in about(record)]
    assert {record.levelno for record in nodes} == {logging.DEBUG}
    assert {about(record)["node"] for record in nodes} == {"edge-1", "edge-2", "edge-3"}
    assert [line for line in said(records, logging.INFO) if "batch" in line and "done" in line] == [
        "release 1 (v1): batch 1 done", "release 1 (v1): batch 2 done"]


def test_skipped_nodes_are_summed_up_in_one_line(world, records):
    world.nodes(5)
    world.agent(1).set(outcome="failed", message="no")
    new_release(world.store)
    world.executor().drain()
    assert [line for line in said(records, logging.INFO) if "skipped" in line and "batch" not in line][0] == (
        "release 1 (v1): 4 nodes skipped")


def test_a_takeover_says_from_whom(store, records):
    add_nodes(store, 1)
    new_release(store)
    store.claims.claim(1, "first", 30)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET claim_expires_at = '2026-01-01T00:00:00.000Z'")
    store.claims.claim(1, "second", 30)
    found = [record for record in records if about(record).get("event") == "taken_over"]
    assert said(found, logging.WARNING) == [
        "release 1 (v1): taken over by second from first, whose claim had run out"]


def test_what_was_not_committed_is_not_told(store, records):
    add_nodes(store, 1)
    new_release(store)
    before = len(records)
    with nothing_committed(store):
        for deed in (lambda: store.releases.act("pause", 1, "test"), lambda: store.claims.claim(1, "owner", 30),
                     lambda: new_release(store), lambda: store.releases.set_freeze(True, "test", "holidays")):
            with pytest.raises(rc.DatabaseError):
                deed()
    assert said(records)[before:] == []


def test_a_commit_whose_answer_was_lost_is_told_once_it_is_known(sqlite_world, records, monkeypatch):
    world = sqlite_world.nodes(1)
    world.agent(1).set(outcome="failed", message="no")
    new_release(world.store)
    commit, lost = rc.Claims.commit, []

    def lose_once(claims: rc.Claims, claim, release, decision, now, actor, counts) -> None:
        store = world.store
        if decision.status == "failed" and not lost:
            lost.append(decision)
            give_back = store.database._give_back

            def cut(*connection: object) -> None:
                monkeypatch.setattr(store.database, "_give_back", give_back)
                store.database._discard(connection[0])
                raise rc.DatabaseError("the connection was cut")
            monkeypatch.setattr(store.database, "_give_back", cut)
        commit(claims, claim, release, decision, now, actor, counts)

    monkeypatch.setattr(rc.Claims, "commit", lose_once)
    world.executor().drain()
    assert lost
    assert world.store.releases.get(1).status == "failed"
    lines = said(records)
    assert len([line for line in lines if line == "release 1 (v1): node edge-1 failed: no"]) == 1
    assert len([line for line in lines if line.startswith("release 1 (v1): failed, ")]) == 1


def test_a_freeze_says_who_and_why(store, records):
    store.releases.set_freeze(True, "anna", "looking\ninto it")
    store.releases.set_freeze(False, "bert")
    assert [(record.getMessage(), about(record)) for record in records if about(record)] == [
        ("frozen by anna: looking\ninto it", {"actor": "anna", "event": "frozen"}),
        ("the freeze was lifted by bert", {"actor": "bert", "event": "unfrozen"})]


def test_a_request_to_the_api_names_release_actor_and_request(store, records):
    add_nodes(store, 1)
    new_release(store)
    with serving(store) as client:
        client("POST", "/api/v1/releases/1/pause", {}, {"X-Request-Id": "r-7", "Content-Type": "application/json"})
        eventually(lambda: [r for r in records if r.getMessage().startswith("POST ")])
    line = next(record for record in records if record.getMessage().startswith("POST "))
    assert about(line) == {"release": 1, "actor": "api", "request_id": "r-7"}


# -- how it is written ---------------------------------------------------------------------------

def test_json_lines_have_stable_keys():
    text = logged(rc.JsonFormatter(), "%s: node %s failed", "release 7 (v42)", "edge-3", level=logging.WARNING,
                  release=7, version=42, node="edge-3", actor="host:1", event="failed", request_id="")
    line = json.loads(text)
    assert re.fullmatch(STAMP, line.pop("at"))
    assert line == {"level": "warning", "thread": "MainThread", "message": "release 7 (v42): node edge-3 failed",
                    "release": 7, "version": 42, "node": "edge-3", "actor": "host:1", "event": "failed"}


FORGED = "no\n2026-01-31T22:00:00.000Z error: release 1 (v1): forged\r\n\x1b[31m\u2028\x85 end"


@pytest.mark.parametrize("formatter", [rc.JsonFormatter(), rc.TextFormatter(False), rc.TextFormatter(True),
                                       rc.JournalFormatter(rc.TextFormatter(True)),
                                       rc.JournalFormatter(rc.JsonFormatter())])
def test_nothing_from_outside_makes_a_second_line(formatter):
    text = logged(formatter, "node %s failed", FORGED, node=FORGED, actor=FORGED)
    assert len(text.splitlines()) == 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028]", text)


@pytest.mark.parametrize("prefix", ["", "<3>"])
def test_a_stack_trace_cannot_pass_for_lines_of_the_log(prefix):
    formatter: logging.Formatter = rc.TextFormatter(bool(prefix))
    formatter = rc.JournalFormatter(formatter) if prefix else formatter
    head, *rest = logged(formatter, "it failed", error=ValueError(FORGED), level=logging.ERROR).split("\n")
    assert head == "<3>it failed" if prefix else re.fullmatch(STAMP + " error: it failed", head)
    assert rest
    assert all(line.startswith(prefix + "    ") for line in rest)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028]", "".join(rest))


def test_json_keeps_a_stack_trace_in_its_line():
    line = json.loads(logged(rc.JsonFormatter(), "it failed", error=ValueError("no\nreally"), level=logging.ERROR))
    assert line["exception"].splitlines()[-2:] == ["ValueError: no", "really"]


def test_an_agents_words_stay_in_their_line(sqlite_world, records):
    world = sqlite_world.nodes(1)
    world.agent(1).set(outcome="failed", message=FORGED)
    new_release(world.store)
    world.executor().drain()
    formatter = rc.TextFormatter(False)
    lines = "\n".join(map(formatter.format, records)).splitlines()
    assert [line for line in lines if "forged" in line]
    assert all(re.match(STAMP + r" (debug|info|warning): release 1 \(v1\): ", line) for line in lines), lines


# -- real processes ------------------------------------------------------------------------------

@pytest.fixture
def fleet_cli(fleet_cli):
    """The command line of conftest.py, with a release whose second node fails."""
    fleet_cli.world.agent(2).set(outcome="failed", message="no")
    new_release(fleet_cli.world.store)
    return fleet_cli


def run_into_journal(cli: Cli, *arguments: str, inode: str = "") -> list[str]:
    """Run a command whose standard error is what JOURNAL_STREAM names; return the lines there."""
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as stream:
        found = os.fstat(writer)
        cli.settings["JOURNAL_STREAM"] = f"{found.st_dev}:{inode or found.st_ino}"
        process = cli.start(*arguments, stderr=writer, stdout=subprocess.DEVNULL)
        os.close(writer)
        lines = stream.read().splitlines()
    process.wait()
    return lines


def test_the_journal_gets_priorities_and_no_times(fleet_cli):
    lines = run_into_journal(fleet_cli, "run-once", "--drain")
    assert all(re.match(r"<[3-7]>release 1 \(v1\): ", line) for line in lines), lines
    assert "<6>release 1 (v1): batch 1 done" in lines
    assert "<4>release 1 (v1): node edge-2 failed: no" in lines
    assert not re.search(STAMP, "".join(lines))


def test_json_in_the_journal_has_priorities_and_keeps_its_keys(fleet_cli):
    fleet_cli.settings["LOG_FORMAT"] = "json"
    lines = run_into_journal(fleet_cli, "run-once", "--drain")
    failed = next(line for line in lines if "node edge-2 failed" in line)
    assert failed.startswith("<4>{")
    line = json.loads(failed[3:])
    assert (line["release"], line["version"], line["node"], line["event"]) == (1, 1, "edge-2", "failed")
    assert set(line) == {"at", "level", "thread", "message", "release", "version", "node", "actor", "event"}


def test_an_error_that_ends_a_command_has_its_priority_in_the_journal(fleet_cli):
    assert run_into_journal(fleet_cli, "status", "99") == ["<3>releasectl: release 99 does not exist"]


def test_a_pipe_below_a_service_is_not_the_journal(fleet_cli):
    lines = run_into_journal(fleet_cli, "run-once", "--drain", inode="1")
    assert lines
    assert all(re.match(STAMP + " (info|warning): ", line) for line in lines), lines


@pytest.mark.parametrize(("level", "seen", "unseen"), [
    ("debug", "node edge-1 succeeded", "\0"), ("info", "batch 1 done", "edge-1 succeeded"),
    ("warning", "node edge-2 failed", "batch 1 done")])
def test_log_level_says_how_much_is_told(fleet_cli, level, seen, unseen):
    fleet_cli.settings["LOG_LEVEL"] = level
    told = fleet_cli("run-once", "--drain").err
    assert seen in told
    assert unseen not in told


def test_commands_for_people_log_warnings_only(fleet_cli):
    for arguments in (("node", "add", "edge-9", "127.0.1.9"), ("pause", "1"), ("resume", "1"), ("cancel", "1"),
                      ("retry", "1"), ("freeze", "off")):
        err = fleet_cli.ok(*arguments).err
        assert " info: " not in err, arguments
