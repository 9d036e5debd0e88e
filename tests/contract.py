"""What the contract allows, once, for every oracle: which status follows which, and why a node has failed.

The simulation, the torture, the acceptance test and the tests judge by it. It is written down here
from section 3 and not taken from releasectl.py, which it judges; tests/test_contract.py compares the
two, and the tables' own constraints.

    sql "SELECT release_task_id, node_id, from_status, to_status ... ORDER BY id" | python tests/contract.py

prints what is wrong in histories, separated by "|" as sqlite3 and psql print them, and ends with 1 then.
"""
from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Optional

# Each status with those that may follow it; "" is before a row was made.
RELEASE: Mapping[str, frozenset[str]] = {
    "": frozenset({"pending"}),
    "pending": frozenset({"running", "paused", "cancelling"}),
    "running": frozenset({"success", "partial", "failed", "paused", "cancelling"}),
    "paused": frozenset({"pending", "running", "cancelling"}),
    "cancelling": frozenset({"cancelled"}),
    "success": frozenset(), "partial": frozenset(), "failed": frozenset(), "cancelled": frozenset(),
}
NODE: Mapping[str, frozenset[str]] = {
    # failed: the node was sent a higher version meanwhile
    "pending": frozenset({"running", "skipped", "failed"}),
    "running": frozenset({"success", "failed"}),
    # failed: it did not pass when its batch was verified again at the end of its soak
    "success": frozenset({"failed"}),
    "failed": frozenset(), "skipped": frozenset(),
}
TERMINAL = frozenset({"success", "partial", "failed", "cancelled"})
AT_REST = frozenset({"success", "failed", "skipped"})
ERROR_KINDS = ("unreachable", "tls", "timeout", "http", "protocol", "rejected", "agent_failed", "verify", "deadline",
               "abandoned")

# A time in a sentence: whole or to the minute, or the time of a day.
_TIME_IN_TEXT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d)(?::[\d.]+)?Z|(?<!T)\b(\d\d:\d\d:\d\d)Z")

# A release (node_id None), or a node of it.
Subject = tuple[int, Optional[int]]


def has_its_time(text: str, until: str | None) -> bool:
    """Return whether until (RFC 3339) is a time that a sentence names, or None where it names none."""
    named = {minute or time for minute, time in _TIME_IN_TEXT.findall(text)}
    return bool(named & {until[:16], until[11:19]}) if until else not named


def may_follow(node_id: int | None, before: str, after: str) -> bool:
    """Return whether a release (node_id None) or a node may go from one status to another."""
    return after in (RELEASE if node_id is None else NODE).get(before, frozenset())


class Change(NamedTuple):
    """A row of release_events: from_status is to_status where it tells of no change, as the freeze does."""
    release_id: int
    node_id: int | None
    from_status: str
    to_status: str


class Break(NamedTuple):
    """What is wrong with a change. is_late: it is all right but for its time, after the end of its release."""
    change: Change
    what: str
    is_late: bool = False


class Histories:
    """The statuses of releases and nodes, as their events tell them one after the other."""

    def __init__(self) -> None:
        self.statuses: dict[Subject, str] = {}

    def status_of(self, release_id: int, node_id: int | None) -> str:
        """Return the status of a release or node; a node begins as pending."""
        return self.statuses.get((release_id, node_id), "" if node_id is None else "pending")

    def follow(self, change: Change) -> Iterator[Break]:
        """Take one more event, and give all that is wrong with it."""
        release_id, node_id, before, after = change
        known = self.status_of(release_id, node_id)
        if before != known:
            yield Break(change, f"it does not follow {known!r}")
        if before == after:
            return
        if not may_follow(node_id, before, after):
            yield Break(change, f"{before!r} to {after!r} is no change that the contract knows")
        if node_id is not None and self.status_of(release_id, None) in TERMINAL:
            yield Break(change, "it is after the end of its release", is_late=True)
        self.statuses[release_id, node_id] = after


def breaks(changes: Iterable[Change]) -> Iterator[Break]:
    """Give all that is wrong in histories."""
    histories = Histories()
    for change in changes:
        yield from histories.follow(change)


def main() -> int:
    changes = []
    for line in sys.stdin.read().splitlines():
        release_id, node_id, before, after = line.split("|")
        changes.append(Change(int(release_id), int(node_id) if node_id else None, before, after))
    found = list(breaks(changes))
    for one in found:
        print(f"release {one.change.release_id}, node {one.change.node_id}: {one.what}")
    if not found:
        print(f"{len(changes)} events")
    return 1 if found or not changes else 0


if __name__ == "__main__":
    sys.exit(main())
