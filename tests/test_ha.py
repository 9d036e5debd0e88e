"""The oracle of scripts/ha.py, which judges what is left of a release whose database server was taken away."""
from __future__ import annotations

from typing import Any

import ha
import pytest
from torture.agents import Run
from torture.tables import EventRow, NodeRow, ReleaseRow, Tables

ADDRESSES = {1: "127.0.1.1", 2: "127.0.1.2"}


def release(number: int, **fields: Any) -> ReleaseRow:
    return ReleaseRow(number, number, "success", 1, 1, 0, "then", None, "", "{}", "", "", "", None)._replace(**fields)


def node(number: int, **fields: Any) -> NodeRow:
    return NodeRow(number, number, ADDRESSES[number], "tasks", "success", "", "", f"task-{number}")._replace(**fields)


def events(number: int) -> list[EventRow]:
    chain = [(None, "", "pending"), (None, "pending", "running"),
             (number, "pending", "running"), (number, "running", "success"), (None, "running", "success")]
    return [EventRow(number * 10 + n, number, node_id, "then", to, begin, to)
            for n, (node_id, begin, to) in enumerate(chain)]


def run(number: int, **fields: Any) -> Run:
    return Run(f"task-{number}", number, "", 10.0, 11.0, "success")._replace(**fields)


def answer(**fields: Any) -> ha.Answer:
    return ha.Answer(20.0, 1, 1, 0, "", "running", 1, 1)._replace(**fields)


def seen(**fields: Any) -> ha.Seen:
    """Return what two releases with one node each leave, where all went well."""
    tables = Tables([release(1), release(2)], [node(1), node(2)], events(1) + events(2))
    runs = {address: [run(number)] for number, address in ADDRESSES.items()}
    return ha.Seen(tables, runs, 0, [answer()], [ha.Act("a freeze", True)], False, (0.0, 0.0), 30.0,
                   {"it": True})._replace(**fields)


def tables(**fields: Any) -> Tables:
    return seen().tables._replace(**fields)


def test_nothing_is_said_where_all_went_well():
    assert list(ha.judge(seen())) == []
    # it went on at 10.0, and who was asked right after that may not have seen it yet
    assert list(ha.judge(seen(back_at=9.0, answers=[answer(at=12.9, text="no executor is running")]))) == []


@pytest.mark.parametrize(("fields", "said"), [
    ({"runs": {ADDRESSES[1]: [run(1), run(1)], ADDRESSES[2]: [run(2)]}}, "twice: 127.0.1.1 ran task-1, task-1"),
    ({"runs": {ADDRESSES[1]: [], ADDRESSES[2]: [run(2)]}}, "said wrongly: 127.0.1.1 is a success, and ran nothing"),
    ({"runs": {ADDRESSES[1]: [run(1, task_id="other")], ADDRESSES[2]: [run(2)]}},
     "said wrongly: 127.0.1.1 ran other, its row has task-1"),
    ({"overlaps": 1}, "twice: 1 runs began while another one ran"),
    ({"quiet": (9.0, 12.0)}, "127.0.1.1 began when nothing could be written down"),
    ({"tables": tables(releases=[release(1), release(2, status="failed", error_msg="a node")])},
     "lost: release 2 is failed: a node"),
    ({"tables": tables(releases=[release(1)])}, "lost: of 2 releases there are 1"),
    ({"tables": tables(releases=[release(1), release(2, success=0)])}, "counters: "),
    ({"answers": [answer(success_nodes=2)]},
     "said wrongly: release 1 running with 2 successes, when agents had done 1"),
    ({"answers": [answer(status="success", success_nodes=0, done=0)]},
     "said wrongly: release 1 success with 0 successes, when agents had done 0"),
    ({"answers": [answer(status="failed")]}, "said wrongly: release 1 failed with 1 successes"),
    ({"answers": [answer(), answer(success_nodes=0)]}, "said wrongly: release 1 running with 0 successes after 1"),
    ({"answers": [answer(at=34.0, success_nodes=-1, text="it takes no writes: the disk")]},
     "said wrongly, 4.0 s after the database was back: it takes no writes: the disk"),
    ({"back_at": 9.0, "answers": [answer(text="no executor is running (last seen 20 s ago: a pid 1): start `serve`")]},
     "said wrongly, 10.0 s after it went on: no executor is running"),
    ({"back_at": 9.0, "answers": [answer(at=13.1, text="no executor is running")]},
     "said wrongly, 3.1 s after it went on"),
    ({"acts": [ha.Act("a freeze", False)]}, "lost: a freeze"),
    ({"told": {"that it went back": False}}, "not said: that it went back"),
])
def test_what_ran_twice_was_lost_or_was_said_wrongly_is_found(fields, said):
    assert any(text.startswith(said) for text in ha.judge(seen(**fields))), list(ha.judge(seen(**fields)))


def test_where_commits_may_be_lost_what_was_confirmed_may_be_gone_and_counters_may_fall():
    lossy = seen(may_lose=True, acts=[ha.Act("a freeze", False)], answers=[answer(), answer(success_nodes=0)])
    assert list(ha.judge(lossy)) == []


def test_two_processes_may_answer_from_snapshots_of_different_age():
    assert list(ha.judge(seen(answers=[answer(), answer(by=2, success_nodes=0)]))) == []
