"""contract.py is what the tables, the module and its documents say too."""
from __future__ import annotations

import re

import contract
import pytest
from contract import Change
from lab import ROOT

import releasectl as rc

SCHEMA = (ROOT / "schema.sql").read_text()


def checked(table: str, column: str) -> set[str]:
    """Return the values that a column's CHECK allows."""
    text = SCHEMA[SCHEMA.index(f"CREATE TABLE {table} ("):]
    match = re.search(rf"\b{column} IN\s*\(([^)]*)\)", text)
    assert match
    return set(re.findall("'([^']*)'", match[1]))


def test_the_statuses_are_those_of_the_tables_and_the_module():
    assert checked("release_tasks", "status") == set(contract.RELEASE) - {""} == set(rc.RELEASE_STATUSES)
    assert checked("release_task_nodes", "status") == set(contract.NODE)
    assert {"": rc.TERMINAL, "node": rc.AT_REST} == {"": contract.TERMINAL, "node": contract.AT_REST}


def test_the_transitions_are_those_of_the_module():
    assert {status: frozenset(after) for status, after in rc.RELEASE_TRANSITIONS.items()} \
        == {status: after for status, after in contract.RELEASE.items() if status and after}
    assert {status: frozenset(after) for status, after in rc.NODE_TRANSITIONS.items()} \
        == {status: after for status, after in contract.NODE.items() if after}


def test_a_terminal_status_is_followed_by_none():
    assert {status for status, after in contract.RELEASE.items() if not after} == contract.TERMINAL
    assert {status for status, after in contract.NODE.items() if not after} == contract.AT_REST - {"success"}


def test_the_error_kinds_are_those_of_the_tables_and_the_module():
    assert checked("release_task_nodes", "error_kind") == {"", *contract.ERROR_KINDS}
    assert contract.ERROR_KINDS == rc.ERROR_KINDS


@pytest.mark.parametrize(("changes", "wrong"), [
    ([("", "pending"), ("pending", "running"), ("running", "success")], []),
    ([("", "pending"), ("pending", "running"), ("running", "running")], []),
    ([("", "pending"), ("pending", "success")], ["'pending' to 'success' is no change that the contract knows"]),
    ([("", "pending"), ("running", "failed")], ["it does not follow 'pending'"]),
    ([("", "pending"), ("running", "running")], ["it does not follow 'pending'"]),
])
def test_a_history_is_judged_change_by_change(changes, wrong):
    assert [one.what for one in contract.breaks(Change(1, None, *change) for change in changes)] == wrong


def test_a_node_changes_no_more_when_its_release_has_ended():
    late = Change(1, 7, "pending", "skipped")
    found = list(contract.breaks([Change(1, None, "", "pending"), Change(1, None, "pending", "cancelling"),
                                  Change(1, None, "cancelling", "cancelled"), late]))
    assert [(one.change, one.is_late) for one in found] == [(late, True)]


def test_releases_that_end_in_each_way_have_whole_histories(world):
    world.nodes(3)
    world.agent(1).set(outcome="failed", message="no")
    store = world.store
    for strategy in ({}, {"maxFailed": 1}):
        store.releases.create(rc.ReleaseRequest(strategy=strategy), "test")
        world.drain()
    store.releases.act("cancel", store.releases.create(rc.ReleaseRequest(), "test")[0].id, "anna")
    world.drain()
    changes = [Change(release_id, event.node_id, event.from_status, event.to_status)
               for release_id in (1, 2, 3) for event in store.releases.events(release_id)]
    assert {store.releases.get(number).status for number in (1, 2, 3)} == {"failed", "partial", "cancelled"}
    assert list(contract.breaks(changes)) == []
