"""What a person sees: tables, times, colours, and the screens of list, status, events and watch (issue 22, point 5)."""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from conftest import leave_out
from lab import PROGRAM, TIMEOUT_S, Cli, Quick, Result, eventually, new_release, sql

import releasectl as rc

SHANGHAI = "边缘-上海-01"
COMBINING = "cafe\u0301-01"
LONG = "edge-fra-in-a-rack-that-has-a-long-name-0001"

# -- times --------------------------------------------------------------------------------------------------

NOON_S = 1795780800.0  # 2026-11-27T12:00:00Z


@pytest.fixture
def shanghai(monkeypatch):
    """A process in Shanghai (UTC+8) at 2026-11-27 20:00 there."""
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    monkeypatch.setattr(rc.time, "time", lambda: NOON_S)
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(("stored", "local", "utc"), [
    ("soaking after batch 1 until 2026-11-27T12:00:19.000Z", "soaking after batch 1 until 20:00, in 19 s",
     "soaking after batch 1 until 12:00Z, in 19 s"),
    ("until 12:00:40Z, in 40 s, then", "until 20:00, in 40 s, then", "until 12:00:40Z, in 40 s, then"),
    ("until 23:59:00Z, in 12 h", "until 2026-11-28 07:59, in 12 h", "until 23:59:00Z, in 12 h"),
    ("it starts at 2026-11-30T12:00Z, in 3 days", "it starts at 2026-11-30 20:00, in 3 days",
     "it starts at 2026-11-30 12:00Z, in 3 days"),
    ("edge-1 (deadline 12:00:40Z, in 40 s)", "edge-1 (deadline 20:00, in 40 s)", "edge-1 (deadline 12:00:40Z, in"),
    ("scheduled for 2026-11-27T13:00:00.000Z", "scheduled for 21:00, in 60 min", "scheduled for 13:00Z, in 60 min"),
    ("x.pem is good until 2025-01-01T20:00:00.000Z, 3", "x.pem is good until 2025-01-02 04:00, 3",
     "x.pem is good until 2025-01-01 20:00Z, 3"),
    ("release 1 (v1) waits: soaking after batch 1 until 12:00:40Z, in 40 s",
     "release 1 (v1) waits: soaking after batch 1 until 20:00, in 40 s", "release 1 (v1) waits: soaking after batch 1"),
    ("scheduled for 2026-13-41T06:00:00Z", "scheduled for 2026-13-41T06:00:00Z", "scheduled for 2026-13-41T06:00:00Z"),
])
def test_the_times_of_a_sentence_are_local_and_short_or_in_utc(shanghai, stored, local, utc):
    assert rc.Display().sentence(stored).startswith(local)
    assert rc.Display(is_utc=True).sentence(stored).startswith(utc)
    for display in (rc.Display(), rc.Display(is_utc=True)):
        once = display.sentence(stored)
        assert display.sentence(once) == once


@pytest.mark.parametrize("text", [
    "paused by anna: until 2026-12-01T00:00:00Z", "see https://grafana/d?from=2026-11-27T11:00:00Z&to=06:00:00Z",
    'note: "valid until 2026-12-01T00:00:00Z" -> "valid until 2026-12-02T00:00:00Z"', "at 06:00:00Z",
    "maintenance 2026-12-01T15:00:00Z to 2026-12-01T16:00:00Z", "v2026-11-27T06:00Z",
    "stopped by node a: no lease since 2026-11-27T06:00:00Z",
    # as we write them ourselves, but quoted
    "frozen: scheduled for 2026-12-01T15:00:00.000Z; waiting for edge-1 to end",
    "release 1 (v1) is stopped: frozen by anna: the match, scheduled for 2026-12-01T15:00:00.000Z",
    "stopped by node a in batch 1: my licence is good until 2026-12-01T15:00:00.000Z",
    "batch 1 of 2: waiting for 1 of 2 nodes; trying again: a: good until 2026-12-01T15:00:00.000Z, try 2 of 3, now"])
def test_a_time_that_somebody_else_wrote_is_not_touched(shanghai, text):
    assert rc.Display().sentence(text) == rc.Display(is_utc=True).sentence(text) == text


def test_texts_of_people_and_agents_are_shown_as_they_were_given(filled_quick):
    text = "scheduled for 2026-12-01T15:00:00.000Z, until 2026-12-01T16:00:00Z"
    sql(filled_quick.store, "UPDATE release_tasks SET reason = ? WHERE id = 3", text)
    sql(filled_quick.store, "UPDATE release_events SET detail = ? WHERE release_task_id = 3", text)
    sql(filled_quick.store, "UPDATE release_task_nodes SET status = 'failed', error_msg = ? WHERE release_task_id = 3",
        text)
    filled_quick.ok("freeze", "on", "--reason", text)
    for day in (1, 2):
        filled_quick.ok("create", "--payload", filled_quick.file(f"{day}.json", json.dumps(
            {"note": f"good until 2026-12-0{day}T00:00:00Z"})))
    diff = filled_quick("diff", 5, 4).out
    assert '"good until 2026-12-01T00:00:00Z" -> "good until 2026-12-02T00:00:00Z"' in diff
    for words in (("status", 3), ("list", "--search", "scheduled"), ("events", 3), ("audit",), ("freeze",),
                  ("node", "show", "edge-1")):
        assert text in filled_quick.ok(*words).out, words
    assert "T" not in filled_quick.ok("freeze").out.partition(": ")[0].partition(" at ")[2]


def test_a_time_in_a_table_has_its_second_today_and_its_day_else(shanghai):
    display = rc.Display()
    assert [display.moment(text) for text in ("2026-11-27T06:21:40.609Z", "2026-11-26T15:00:00.000Z", "", None, "x")] \
        == ["14:21:40", "2026-11-26 23:00", "", "", "x"]


def test_json_keeps_rfc_3339_and_utc_is_an_option(filled_quick, monkeypatch):
    sql(filled_quick.store, "UPDATE release_tasks SET created_at = '2020-01-01T23:00:00.000Z' WHERE id = 3")
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        assert "created 2020-01-02 07:00\n" in filled_quick.ok("status", 3).out
        assert "created 2020-01-01 23:00Z" in filled_quick.ok("--utc", "status", 3).out
        assert filled_quick.ok("status", 3, "--json").json["release"]["createdAt"] == "2020-01-01T23:00:00.000Z"
    finally:
        monkeypatch.undo()
        time.tzset()


# -- tables -------------------------------------------------------------------------------------------------

ROWS = [(1, SHANGHAI, "failed", "连接被拒绝 " * 20), (2, COMBINING, "success", "e\u0301" * 90),
        (3, LONG, "running", "a\x1b[31mb\x1b]0;title\x07\u202e" + "word " * 40)]
HEAD = ("id", "name", "status", "message")


@pytest.mark.parametrize("width", [20, 30, 60, 80, 200])
@pytest.mark.parametrize("cuts", [False, True])
def test_a_table_fits_the_terminal_and_keeps_the_names_of_nodes_whole(width, cuts):
    lines = rc.Display(width).table(ROWS, HEAD, cuts).splitlines()
    assert max(map(rc.columns_of, lines)) <= width
    joined = "".join(line.replace("NAME", "").strip() for line in lines)
    assert all(name in joined for name in (SHANGHAI, COMBINING))
    assert LONG in joined or (LONG[:24] in joined and LONG[-10:] in joined)  # the second part is in the next line
    assert not set("\x1b\x07\u202e") & set(joined)
    assert ("..." in joined) == (cuts and width >= 60)  # in blocks of lines there is room for all


def test_nothing_of_a_table_is_lost_in_a_narrow_terminal():
    for width in (30, 80):
        text = rc.Display(width).table(ROWS, HEAD)
        assert text.count("word") == 40
        assert text.count("连接被拒绝") >= 12  # a few are broken at the end of a line


def test_a_table_in_a_pipe_has_a_line_for_each_row_and_no_colour():
    lines = rc.Display().table(ROWS, HEAD).splitlines()
    assert len(lines) == 4
    assert "\x1b" not in "".join(lines)


def test_columns_line_up_under_wide_and_combining_characters():
    lines = rc.Display(80).table([(name, "x") for name in (SHANGHAI, COMBINING, "edge")], ("name", "is")).splitlines()
    assert {rc.columns_of(line[:-1]) for line in lines[1:]} == {rc.columns_of(SHANGHAI) + 2}


@pytest.mark.parametrize(("mode", "no_color", "terminal", "painted"), [
    ("auto", "", True, True), ("auto", "1", True, False), ("auto", "", False, False), ("always", "1", False, True),
    ("never", "", True, False)])
def test_colours_are_for_terminals_unless_told_otherwise(filled_quick, monkeypatch, mode, no_color, terminal, painted):
    real, stream = rc.Display.of, mock.Mock(isatty=lambda: terminal, fileno=mock.Mock(side_effect=OSError))
    monkeypatch.setattr(rc.Display, "of",
                        lambda _, colour, is_utc: real(stream, colour, is_utc))
    filled_quick.settings.update(NO_COLOR=no_color, TERM="xterm")
    assert ("\x1b[32msuccess\x1b[0m" in filled_quick.ok("list", "--color", mode).out) == painted


# -- the screens, in a real terminal ------------------------------------------------------------------------

@pytest.fixture
def busy(cli, open_store):
    """A database in which release 24 of 40 nodes, among them Chinese ones, goes out and has three failures."""
    store = open_store(f"sqlite:///{cli.folder}/releasectl.db")
    for number, name in enumerate([SHANGHAI, COMBINING, LONG, *(f"edge-{n:03d}" for n in range(37))]):
        store.nodes.add(name, f"10.0.0.{number + 1}")
    for _ in range(24):
        new_release(store, reason="证书更新 for 上海", strategy={"batches": [1, 10, 10]})
    sql(store, "UPDATE release_tasks SET status = 'success', status_reason = '40 nodes succeeded', started_at = "
               "created_at, finished_at = created_at, success_nodes = 40 WHERE id < 24")
    sql(store, "UPDATE release_task_nodes SET status = 'success', attempts = 1 WHERE release_task_id < 24 "
               "OR (release_task_id = 24 AND node_id < 6)")
    sql(store, "UPDATE release_task_nodes SET status = 'running', attempts = 1, started_at = ? "
               "WHERE release_task_id = 24 AND node_id BETWEEN 9 AND 11", rc.utc_text(time.time() - 20))
    sql(store, "UPDATE release_task_nodes SET status = 'failed', attempts = 3, error_kind = 'unreachable', "
               "error_msg = ?, started_at = created_at, finished_at = created_at "
               "WHERE release_task_id = 24 AND node_id IN (3, 6, 7)",
        "connection to 10.0.0.7:8443 was refused: 连接被拒绝 \x1b[31m" + "again and " * 8)
    sql(store, "UPDATE release_tasks SET status = 'running', success_nodes = 4, failed_nodes = 3, started_at = ?, "
               "claim_owner = 'other:1', claim_expires_at = ?, status_reason = ? WHERE id = 24",
        rc.utc_text(time.time() - 300), rc.utc_text(time.time() + 300),
        f"batch 2 of 4: waiting for 3 of 10 nodes, slowest {LONG} for 20 s of 600 s")
    cli.store = store
    return cli


class Tmux:
    """A program in a terminal of a given size."""

    def __init__(self, folder: Path, cli: Cli, columns: int, lines: int, *arguments: object):
        self._socket = f"{folder}/tmux"
        words = " ".join(f"'{word}'" for word in (sys.executable, PROGRAM, *arguments))
        self._run("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(lines), "-c", str(cli.folder),
                  f"{words}; echo \"[$?]\"; exec cat",
                  env={**cli.environment, "LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]})

    def _run(self, *words: str, **more) -> str:
        return subprocess.run(["tmux", "-u", "-S", self._socket, *words], check=True, capture_output=True,
                              encoding="utf-8", **more).stdout

    @property
    def screen(self) -> str:
        """Return what the terminal shows now."""
        return self._run("capture-pane", "-p")

    def close(self) -> None:
        self._run("kill-server")


@contextlib.contextmanager
def terminal(cli: Cli, columns: int, lines: int, *arguments: object) -> Iterator[Tmux]:
    if not shutil.which("tmux"):
        leave_out("tmux")
    with tempfile.TemporaryDirectory(prefix="tmux") as folder, \
            contextlib.closing(Tmux(Path(folder), cli, columns, lines, *arguments)) as shown:
        yield shown


def ended(shown: Tmux) -> str:
    """Return the screen when the program has ended."""
    eventually(lambda: re.search(r"^\[\d+\]$", shown.screen, re.MULTILINE), message="it does not end")
    return shown.screen


SIZES = pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 50)])


@SIZES
def test_list_fits_the_screen_and_says_that_there_are_older_ones(busy, columns, lines):
    with terminal(busy, columns, lines, "list") as shown:
        screen = ended(shown)
    rows = screen.splitlines()
    assert rows[0].split()[:8] == ["ID", "VERSION", "TARGET", "STATUS", "DONE", "FAILED", "AGE", "TOOK"]
    assert [row.split()[0] for row in rows[1:21]] == [str(number) for number in range(24, 4, -1)]
    assert "证书更新" in rows[1]
    assert rows[21] == "20 of 24, older: --page 2"


@SIZES
def test_status_is_a_head_bars_and_the_nodes_that_are_not_well(busy, columns, lines):
    sql(busy.store, "UPDATE release_task_nodes SET error_msg = '连接被拒绝' WHERE status = 'failed'")
    with terminal(busy, columns, lines, "status", 24) as shown:
        screen = ended(shown)
    assert screen.startswith("release 24 (v24): running, batch 2 of 4: waiting for 3 of 10 nodes, slowest")
    assert [line.split()[:4] for line in screen.splitlines() if line.startswith("batch ")] == [
        ["batch", "1", "1", "of"], ["batch", "2", "3", "of"], ["batch", "3", "0", "of"], ["batch", "4", "0", "of"]]
    table = screen.partition("BATCH")[2].splitlines()
    rows = [line.split() for line in table if "failed" in line]
    assert [row[1] for row in rows] == [LONG[:len(rows[0][1])], "edge-002", "edge-003"], screen
    assert len(rows[0][1]) >= 24
    assert LONG[-15:] in screen.partition("BATCH")[2]
    assert [row[-1] for row in rows] == ["连接被拒绝"] * 3
    assert "not shown: 37 nodes with nothing wrong (--all)" in screen


@SIZES
def test_watch_shows_elapsed_time_causes_and_whole_names(busy, columns, lines):
    with terminal(busy, columns, lines, "watch", 24) as shown:
        eventually(lambda: "5 min so far" in shown.screen)
        screen = shown.screen
    assert LONG in screen.partition("batch   1")[0].replace("\n", " ")
    assert "unreachable: conn" in screen
    assert "4 succeeded, 3 failed, 0 skipped of 40; 5 min so far" in screen
    assert max(map(rc.columns_of, screen.splitlines())) < columns


def test_thirty_columns_are_enough_for_status_list_and_watch(busy):
    for arguments in (("status", 24, "--all"), ("list",)):
        with terminal(busy, 30, 24, *arguments) as shown:
            ended(shown)
    with terminal(busy, 30, 24, "watch", 24) as shown:
        eventually(lambda: "so far" in shown.screen)
        assert LONG in shown.screen.replace("\n", "")


def test_status_shows_everything_with_all(busy):
    out = Quick(busy.folder).ok("status", 24, "--all").out
    assert all(name in out for name in (SHANGHAI, COMBINING, LONG, "edge-036"))
    assert "not shown" not in out
    assert "\x1b" not in out


def test_status_of_a_release_that_failed_everywhere_says_how_many_it_leaves_out(busy):
    sql(busy.store, "UPDATE release_task_nodes SET status = 'failed', error_msg = 'boom' WHERE release_task_id = 24 "
                    "AND node_id > 2")
    out = Quick(busy.folder).ok("status", 24).out
    assert out.partition("BATCH")[2].count("boom") == rc.MAX_ILL
    assert out.endswith("not shown: 18 that failed or are tried again, 2 nodes with nothing wrong (--all)\n")


# -- list ---------------------------------------------------------------------------------------------------

def listed(quick: Quick, *options: object) -> list[int]:
    return [release["id"] for release in quick.ok("list", "--json", *options).json["items"]]


def test_list_has_filters_that_add_up(filled_quick):
    store = filled_quick.store
    sql(store, "UPDATE release_tasks SET target = 'dns', reason = '100%_\\ Ärger 上海' WHERE id = 2")
    sql(store, "UPDATE release_tasks SET created_at = '2020-01-01T00:00:00.000Z' WHERE id = 1")
    store.nodes.add("late", "10.0.9.9")
    sql(store, "UPDATE release_task_nodes SET node_id = (SELECT id FROM nodes WHERE name = 'late') "
               "WHERE release_task_id = 3 AND node_id = 2")
    assert listed(filled_quick, "--target", "dns") == [2]
    assert listed(filled_quick, "--target", "dn") == []
    assert listed(filled_quick, "--search", "for PEND") == [3]
    for text in ("100%", "%_\\ Ä", "上海", "ärger".replace("ä", "Ä"), "v2", "2"):
        assert listed(filled_quick, "--search", text) == [2], text
    assert listed(filled_quick, "--search", "1%0") == []
    assert listed(filled_quick, "--since", "1h") == [3, 2]
    assert listed(filled_quick, "--since", "2019-01-01T00:00:00Z") == [3, 2, 1]
    assert listed(filled_quick, "--node", "late") == [3]
    assert listed(filled_quick, "--node", "edge-1", "--status", "failed", "--search", "上海", "--target", "dns") == [2]
    assert "node nobody does not exist" in filled_quick.refused(3, "list", "--node", "nobody")
    assert filled_quick.ok("list", "--target", "x").out == "no such releases\n"
    assert filled_quick.ok("list", "--page", 9).out == "no releases on page 9 of 1\n"


def test_list_says_which_part_it_shows(filled_quick):
    assert filled_quick.ok("list", "--page-size", 2).out.endswith("2 of 3, older: --page 2\n")
    assert filled_quick.ok("list", "--page-size", 2, "--page", 2).out.endswith("3 to 3 of 3\n")
    assert " of 3" not in filled_quick.ok("list").out


def test_the_filters_of_the_list_are_the_same_in_the_api_on_both_engines(store, new_client):
    for number in range(2):
        store.nodes.add(f"edge-{number + 1}", f"10.0.0.{number + 1}")
    for target in ("cdn", "dns", "cdn"):
        new_release(store, target=target, reason=f"for {target} 上海")
    sql(store, "UPDATE release_tasks SET created_at = '2020-01-01T00:00:00.000Z' WHERE id = 1")
    sql(store, "UPDATE release_tasks SET status = 'cancelled', finished_at = created_at WHERE id = 1")
    client = new_client(store)
    for query, ids in (("status=open", [3, 2]), ("status=ended", [1]), ("status=ended&target=dns", []),
                       ("target=dns", [2]), ("search=FOR%20CDN", [3, 1]), ("search=%E4%B8%8A", [3, 2, 1]),
                       ("search=v2", [2]), ("search=%25", []), ("since=2021-01-01T00:00:00Z", [3, 2]),
                       ("node=edge-2&target=cdn&since=2021-01-01T08:00:00%2B08:00", [3]), ("node=nobody", []),
                       ("before=3", [2, 1]), ("before=3&target=dns", [2]), ("before=1", []),
                       ("before=0&node=edge-2", [3, 2, 1]),
                       ("status=pending&search=dns", [2])):
        answer = client.ok("GET", f"/api/v1/releases?{query}")
        assert ([release["id"] for release in answer["items"]], answer["total"]) == (ids, len(ids)), query
    assert client("GET", "/api/v1/releases?since=yesterday").code == 2003


@pytest.mark.parametrize(("wanted", "index"), [
    (rc.ReleaseFilter(target="cdn"), "release_tasks_by_target"),
    (rc.ReleaseFilter(since="2020-01-01T00:00:00.000Z"), "release_tasks_by_created"),
    (rc.ReleaseFilter(node="edge-1"), "release_task_nodes_by_node")])
def test_each_filter_has_an_index_that_serves_it(filled_quick, wanted, index):
    where, values = wanted.where()
    with filled_quick.store.database.transaction() as tx:
        plan = tx.rows(f"EXPLAIN QUERY PLAN SELECT COUNT(*) FROM release_tasks r{where}", *values)
    assert any(index in str(row) for row in plan), plan


# -- events -------------------------------------------------------------------------------------------------

def many_events(store: rc.Store, release_id: int, count: int) -> None:
    with store.database.transaction(write=True) as tx:
        tx.insert_many("INSERT INTO release_events (release_task_id, event, detail) VALUES ", 3,
                       [(release_id, "noted", f"number {number}") for number in range(count)])


def test_events_shows_the_newest_and_says_what_it_leaves_out(filled_quick):
    many_events(filled_quick.store, 3, 1500)
    result = filled_quick.ok("events", 3)
    assert "number 1499" in result.out.splitlines()[-1]
    assert result.err == "the newest 1000 of 1501 events; all of them: --limit 1501\n"
    whole = filled_quick.ok("events", 3, "--limit", 1501)
    assert (len(whole.out.splitlines()), whole.err) == (1502, "")
    assert len(filled_quick.ok("events", 3, "--json").json["items"]) == 1000
    first = filled_quick.ok("events", 3, "--after", 0, "--limit", 2)
    assert ("created" in first.out, "number 1499" in first.out) == (True, False)
    assert re.search(r"there may be later ones: --after \d+", first.err)


def test_events_follows_a_release_to_its_end(filled):
    following = filled.start("events", 3, "-f")
    try:
        lines = [following.stdout.readline(), following.stdout.readline()]
        assert "created" in lines[1]
        filled.ok("pause", 3, "--reason", "a moment")
        assert "a moment" in following.stdout.readline()
        filled.ok("cancel", 3)
        done = Cli.end(following)
    finally:
        following.kill()
    assert (done.code, done.err) == (0, "")
    assert "cancelled" in done.out
    assert "NODE" not in done.out  # the head stands once
    assert "one document" in filled.refused(2, "events", 3, "-f", "--json")


def test_events_ends_when_its_reader_has_left(filled):
    following = filled.start("events", 3, "-f")
    following.stdout.readline()
    following.stdout.close()
    try:
        assert following.wait(TIMEOUT_S) == 0
    finally:
        following.kill()
        following.stderr.close()


def test_events_says_that_there_are_none(filled_quick):
    assert filled_quick.ok("events", 3, "--after", 999).out == "no events\n"


def test_the_whole_detail_of_an_event_is_shown(filled_quick):
    sql(filled_quick.store, "UPDATE release_events SET detail = ? WHERE release_task_id = 3", "word " * 300 + "end")
    assert filled_quick.ok("events", 3).out.rstrip().endswith("word end")


# -- one answer, and no log lines ---------------------------------------------------------------------------

def cancelling(quick: Quick) -> None:
    """Bring release 3 to where a forced cancel abandons both nodes."""
    sql(quick.store, "UPDATE release_tasks SET status = 'running', claim_owner = 'x', claim_expires_at = ? "
                     "WHERE id = 3", rc.utc_text(time.time() + 60))
    sql(quick.store, "UPDATE release_task_nodes SET status = 'running' WHERE release_task_id = 3")


def test_a_verb_prints_its_answer_and_no_log_lines(filled_quick):
    cancelling(filled_quick)
    result = filled_quick.ok("cancel", 3, "--force")
    assert result.err == ""
    assert result.out.count("\n") == 1
    assert filled_quick.ok("freeze", "on", "--reason", "x").err == ""


def test_quiet_prints_nothing_and_verbose_the_log_too(filled_quick):
    cancelling(filled_quick)
    assert filled_quick("-q", "cancel", 3, "--force") == Result(0, "", "")
    assert filled_quick("watch", 3, "-q") == Result(1, "", "")
    assert filled_quick("list", "--quiet", "--json").json["total"] == 3
    assert filled_quick("pause", 3, "-q").err.startswith("releasectl: ")
    assert re.search(r"Z info: release 4 .*created", filled_quick.ok("create", "-v").err)
    assert filled_quick.ok("create", "-q") == Result(0, "", "")


# -- words --------------------------------------------------------------------------------------------------

def test_help_is_one_screen_and_names_every_command():
    lines = rc._parser(()).format_help().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("...") for line in lines)
    assert all(len(names) < 26 for _, rows in rc.HELP_GROUPS for names, _ in rows), "a column of its own"
    named = " ".join(names for _, rows in rc.HELP_GROUPS for names, _ in rows)
    assert [c.name for c in rc.COMMANDS if c.name.split()[-1] not in re.findall("[a-z-]+", named)] == []


def test_help_of_a_command_is_shown_by_help_as_well(cli):
    assert cli.ok("help", "node", "list").out == cli.ok("node", "list", "--help").out
    assert cli.ok("help", "undo").out.replace("undo", "rollback").split() == \
        cli.ok("rollback", "--help").out.split()
    assert cli.ok("help").out == cli.ok("--help").out
    assert "(did you mean status?)" in cli.refused(2, "help", "statsu")


@pytest.mark.parametrize(("word", "command"), [
    (("ls", "--page-size", "1"), ("list", "--page-size", "1")), (("show", "3"), ("status", "3")),
    (("logs", "3"), ("events", "3")), (("nodes", "--search", "edge"), ("node", "list", "--search", "edge")),
    (("undo", "3", "--plan"), ("rollback", "3", "--plan"))])
def test_other_words_do_the_same(filled_quick, word, command):
    assert filled_quick(*word) == filled_quick(*command)


@pytest.mark.parametrize(("words", "meant"), [
    (("statsu", "3"), "status"), (("rolback", "3"), "rollback"), (("node", "lst"), "list"),
    (("--utc", "pasue"), "pause")])
def test_a_command_that_is_mistyped_is_told_with_what_was_meant(quick, words, meant):
    assert f"is not a command (did you mean {meant}?)" in quick.refused(2, *words)


def test_watch_of_an_ended_release_prints_its_line_once(filled_quick):
    filled_quick.ok("cancel", 3)
    result = filled_quick("watch", 3)
    assert (result.out.count("release 3"), result.err) == (1, "")


def test_a_quiet_tick_prints_no_warnings(filled_quick):
    filled_quick.settings["MTLS_ENABLED"] = "0"
    filled_quick.ok("cancel", 3)
    assert filled_quick("run-once", "-q") == Result(0, "", "")


def test_a_narrow_status_says_which_column_it_leaves_out(busy):
    progress, nodes = busy.store.releases.progress(24), busy.store.releases.whole(24)[1]
    assert "; when each started (110 columns)" in rc.status_text(progress, nodes, rc.Display(80))
    wide = rc.status_text(progress, nodes, rc.Display(200))
    assert ("STARTED" in wide, "when each" in wide) == (True, False)


@pytest.mark.parametrize(("words", "text"), [
    (("list", "--pages", "2"), "unrecognized arguments: --pages 2 (did you mean --page?) (see `releasectl help list`)"),
    (("create", "--reson=x"), "(did you mean --reason?) (see `releasectl help create`)"),
    (("node", "list", "--lable", "a=b"), "(did you mean --label?) (see `releasectl help node list`)"),
    (("list", "--status", "zzz"), "argument --status: 'zzz' is none of pending, running, "),
    (("list", "--status", "faild"), "(did you mean failed?) (see `releasectl help list`)"),
    (("freeze", "onn"), "'onn' is none of on, off (did you mean on?) (see `releasectl help freeze`)"),
    (("completion",), "the following arguments are required: bash|zsh|fish"),
    (("status", "1", "x"), "arguments: x (see")])
def test_an_option_or_choice_that_is_mistyped_is_told_with_what_was_meant(quick, words, text):
    assert text in quick.refused(2, *words)


def test_a_cancelled_release_says_so_once(filled_quick):
    filled_quick.settings["LOG_LEVEL"] = "info"
    told = [filled_quick.ok("-v", "cancel", 3), filled_quick("why", 3), filled_quick.ok("list", "--node", "edge-1"),
            filled_quick("watch", 3), filled_quick.ok("status", 3)]
    for result in told:
        assert "0 of 2 nodes updated" in result.out
        lines = [line for line in (result.out + result.err).splitlines() if "of 2 nodes updated" in line]
        assert [line.count("cancelled") for line in lines] == [1] * len(lines), lines


@pytest.mark.parametrize(("text", "stored"), [
    ("2026-11-27", "2026-11-26T16:00:00.000Z"), ("2026-11-27 14:21", "2026-11-27T06:21:00.000Z"),
    ("14:21:40", "2026-11-27T06:21:40.000Z"), ("2026-11-27 06:21Z", "2026-11-27T06:21:00.000Z"),
    ("06:21:40Z", "2026-11-27T06:21:40.000Z"), ("1w", "2026-11-20T12:00:00.000Z"),
    ("1h", "2026-11-27T11:00:00.000Z"), ("2026-01-31T00:00:00+01:00", "2026-01-30T23:00:00.000Z")])
def test_since_takes_what_tables_show(shanghai, text, stored):
    assert rc._since(text) == stored


@pytest.mark.parametrize("text", ["", "Z", " 14:21", "2026-11-2714:21", "2026-13-01", "25:00", "1y"])
def test_since_refuses_what_is_no_time(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a time like"):
        rc._since(text)


# -- watch says why -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["watch", "create --wait"])
def test_watch_and_wait_say_why_a_release_does_not_go_on(filled_quick, command):
    sql(filled_quick.store, "INSERT INTO executors (owner, host, period_sec) VALUES ('a:1', 'host-a', 60)")
    filled_quick.ok("freeze", "on", "--reason", "the site is down")
    if command == "watch":
        sql(filled_quick.store, "UPDATE release_tasks SET status_reason = '' WHERE id = 3")
    result = filled_quick(*command.split(), "--timeout", "0.2")
    assert result.code == 75
    number = 3 if command == "watch" else 4
    assert re.search(rf"release {number} \(v{number}\).*the site is down", result.err), result.err


def test_watch_of_a_release_at_work_says_why_after_a_while(filled_quick, monkeypatch):
    monkeypatch.setattr(rc, "STILL_S", 0.3)
    sql(filled_quick.store, "UPDATE release_tasks SET status = 'running', status_reason = 'batch 1 of 2', strategy = ? "
                            "WHERE id = 3", json.dumps({"maxParallel": 1, "batches": [2]}))
    sql(filled_quick.store, "UPDATE release_task_nodes SET batch = 1 WHERE release_task_id = 3")
    sql(filled_quick.store, "UPDATE release_task_nodes SET status = 'running', started_at = ? "
                            "WHERE release_task_id = 3 AND node_id = 1", rc.utc_text(time.time()))
    sql(filled_quick.store, "UPDATE release_tasks SET claim_owner = 'a', claim_expires_at = ? WHERE id = 3",
        rc.utc_text(time.time() + 60))
    assert "free slot" not in filled_quick("watch", 3, "--timeout", "0.1").err
    assert filled_quick("watch", 3, "--timeout", "1.2").err.count("waits: waiting for a free slot") == 1


def test_status_reads_of_a_release_the_nodes_that_it_shows_and_says_of_how_many_more_it_knows(store):
    for number in range(1, 61):
        store.nodes.add(f"edge-{number}", f"10.0.0.{number}")
    made = new_release(store, strategy={"batches": [20, 20]})
    sql(store, "UPDATE release_tasks SET status = 'running', started_at = created_at WHERE id = ?", made.id)
    sql(store, "UPDATE release_task_nodes SET attempts = 1, started_at = created_at, status = "
               "CASE WHEN node_id % 2 = 0 THEN 'failed' WHEN node_id % 15 = 0 THEN 'running' ELSE 'success' END")
    sql(store, "UPDATE release_task_nodes SET attempts = 2 WHERE node_id IN (15, 45)")
    nodes = store.releases.with_nodes(made.id)[1]
    progress, some = store.releases.progress_and_nodes(made.id, rc.MAX_ILL)
    assert [n.node_id for n in some] == [n.node_id for n in nodes if n.status == "running" or (
        n.status == "failed" and n.node_id <= 40)]
    shown = rc.status_text(progress, some, rc.Display(200))
    assert shown == rc.status_text(progress, nodes, rc.Display(200))
    assert "12 that failed or are tried again, 28 nodes with nothing wrong" in shown
    assert "not shown" not in rc.status_text(progress, nodes, rc.Display(200), shows_all=True)
