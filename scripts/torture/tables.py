"""Reads the tables, by statements of our own, and checks them against the contract (section 3)."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from contract import AT_REST, TERMINAL, Change, Histories, Subject
from fake_agent import payload_sha256

import releasectl as rc

from .figures import Finding


class ReleaseRow(NamedTuple):
    id: int
    version: int
    status: str
    total: int
    success: int
    failed: int
    finished_at: str | None
    claim_expires_at: str | None
    content: str  # payload_sha256 of the payload
    strategy: str
    status_reason: str
    error_msg: str
    reason: str
    rollback_of: int | None


class NodeRow(NamedTuple):
    release_id: int
    node_id: int
    main_ip: str
    protocol: str
    status: str
    error_kind: str
    error_msg: str
    task_id: str


class EventRow(NamedTuple):
    id: int
    release_id: int
    node_id: int | None
    at: str
    event: str
    from_status: str
    to_status: str


class Tables(NamedTuple):
    """The tables at one moment."""

    releases: list[ReleaseRow]
    nodes: list[NodeRow]
    events: list[EventRow]


def read_tables(database: rc.Database) -> Tables:
    """Read all tables in one transaction."""
    with database.transaction() as tx:
        releases = [ReleaseRow(*row) for row in tx.rows(
            "SELECT id, version, status, total_nodes, success_nodes, failed_nodes, finished_at, "
            "claim_expires_at, payload, strategy, status_reason, error_msg, reason, rollback_of "
            "FROM release_tasks ORDER BY id")]
        return Tables(
            [release._replace(content=payload_sha256(json.loads(release.content))) for release in releases],
            [NodeRow(*row) for row in tx.rows(
                "SELECT n.release_task_id, n.node_id, h.main_ip, h.agent_protocol, n.status, n.error_kind, "
                "n.error_msg, n.task_id FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id ORDER BY n.id")],
            [EventRow(*row) for row in tx.rows(
                "SELECT id, release_task_id, node_id, at, event, from_status, to_status FROM release_events "
                "ORDER BY id")])


def read_open_releases(database: rc.Database) -> list[tuple[int, str]]:
    """Return the releases that are not terminal, and their statuses."""
    with database.transaction() as tx:
        return [(row[0], row[1]) for row in tx.rows("SELECT id, status FROM release_tasks ORDER BY id")
                if row[1] not in TERMINAL]


# -- once all is over ---------------------------------------------------------------------------


def check_tables(tables: Tables) -> Iterator[Finding]:
    """Yield what is wrong in the tables by themselves."""
    nodes: dict[int, list[NodeRow]] = {}
    for node in tables.nodes:
        nodes.setdefault(node.release_id, []).append(node)
    for release in tables.releases:
        yield from _check_release(release, nodes.get(release.id, []))
    yield from _check_histories(tables)
    yield from _check_order(tables)
    yield from _check_rollbacks(tables)
    yield from _check_approvals(tables)
    yield from _check_freezes(tables)
    yield from _check_addresses(tables)
    yield from _check_task_ids(tables)


def _check_release(release: ReleaseRow, nodes: list[NodeRow]) -> Iterator[Finding]:
    """Yield what a release at its end may not be."""
    tally = Counter(node.status for node in nodes)
    if release.status not in TERMINAL:
        yield Finding("lost", f"release {release.id} is {release.status}, its nodes {dict(tally)}")
    elif set(tally) - AT_REST or release.finished_at is None or release.claim_expires_at is not None:
        yield Finding("lost", f"release {release.id} is {release.status}, and not at its end: {dict(tally)}, "
                              f"finished {release.finished_at}, claimed until {release.claim_expires_at}")
    if (release.success, release.failed, release.total) != (tally["success"], tally["failed"], len(nodes)):
        yield Finding("counters", f"{release}: its rows are {dict(tally)}")


def _check_histories(tables: Tables) -> Iterator[Finding]:
    """Yield every break in a chain of events: one event for each change, each change allowed."""
    histories = Histories()
    for event in tables.events:
        for broken in histories.follow(Change(event.release_id, event.node_id, event.from_status, event.to_status)):
            yield Finding("late" if broken.is_late else "history", f"{event}: {broken.what}")
    ends: dict[Subject, str] = {(release.id, None): release.status for release in tables.releases}
    ends.update({(node.release_id, node.node_id): node.status for node in tables.nodes})
    for (release_id, node_id), status in ends.items():
        known = histories.status_of(release_id, node_id)
        if status != known:
            yield Finding("history", f"release {release_id}, node {node_id}: its events end at {known!r}, its row is "
                                     f"{status}")


def _check_order(tables: Tables) -> Iterator[Finding]:
    """Yield releases with an address in common that did not go one after the other, the lowest version first.

    One that ended before it sent anything to such an address has overtaken nobody: the other one keeps its version.
    """
    started: dict[int, int] = {}
    ended: dict[int, int] = {}
    for event in tables.events:
        if event.node_id is None and event.to_status == "running":
            started.setdefault(event.release_id, event.id)
        if event.node_id is None and event.to_status in TERMINAL:
            ended[event.release_id] = event.id
    addresses: dict[int, set[str]] = {}
    sent: dict[int, set[str]] = {}
    for node in tables.nodes:
        addresses.setdefault(node.release_id, set()).add(node.main_ip)
        if node.task_id:
            sent.setdefault(node.release_id, set()).add(node.main_ip)
    ranked = sorted((one for one in tables.releases if one.id in started), key=lambda one: one.version)
    for low, high in itertools.combinations(ranked, 2):
        common = addresses.get(low.id, set()) & addresses.get(high.id, set())
        is_over = not common & sent.get(high.id, set()) and ended.get(high.id, started[low.id]) < started[low.id]
        if common and not is_over and not started[low.id] <= ended.get(low.id, 0) <= started[high.id]:
            yield Finding("order", f"release {high.id} (v{high.version}) began at event {started[high.id]}, release "
                                   f"{low.id} (v{low.version}) was under way from {started[low.id]} to "
                                   f"{ended.get(low.id)}: both have {min(common)}")


def _check_rollbacks(tables: Tables) -> Iterator[Finding]:
    """Yield the releases that ended by onExceed without one rollback that both name, and those that have one else."""
    for release in tables.releases:
        found = [one for one in tables.releases
                 if one.rollback_of == release.id and one.reason.startswith("automatic rollback")]
        goes_back = release.rollback_of is None and json.loads(release.strategy).get("onExceed") == "rollback"
        is_sent = any(node.task_id for node in tables.nodes if node.release_id == release.id)
        is_wanted = goes_back and is_sent and release.status == "failed" and release.error_msg.startswith("node ")
        why_not = release.status_reason.partition("; not rolled back, as ")[2]
        is_refused = bool(why_not) and not (release.status == "cancelled" and why_not.startswith("it was cancelled"))
        is_named = all(f"release {one.id} rolls it back" in release.status_reason and
                       f"rollback of release {release.id} " in one.reason for one in found)
        if len(found) + is_refused != is_wanted or not is_named:
            yield Finding("back", f"{release}: {found}")


def _check_approvals(tables: Tables) -> Iterator[Finding]:
    """Yield releases that started while they waited for an approval."""
    waiting: set[int] = set()
    for event in tables.events:
        if event.event == "approval":
            waiting.add(event.release_id)
        elif event.event == "approved":
            waiting.discard(event.release_id)
        elif event.to_status == "running" and event.release_id in waiting:
            yield Finding("unapproved", f"{event}: nobody had approved it")


def _check_freezes(tables: Tables) -> Iterator[Finding]:
    """Yield dispatches that were written down while a freeze, which a person lifted later, held their release."""
    frozen: set[int] = set()
    for event in tables.events:
        if event.event in ("frozen", "unfrozen"):
            (frozen.add if event.event == "frozen" else frozen.discard)(event.release_id)
        elif event.to_status == "running" and event.from_status == "pending" and event.release_id in frozen:
            yield Finding("frozen", f"{event}: its target was frozen")


def _check_addresses(tables: Tables) -> Iterator[Finding]:
    """Yield every moment of the history at which an address had two running nodes."""
    address_of = {(node.release_id, node.node_id): node.main_ip for node in tables.nodes}
    running: dict[str, set[tuple[int, int]]] = {}
    for event in tables.events:
        if event.node_id is None or event.from_status == event.to_status:
            continue
        key = (event.release_id, event.node_id)
        here = running.setdefault(address_of.get(key, ""), set())
        here.discard(key)
        if event.to_status == "running":
            if here:
                yield Finding("two", f"{event}: at {address_of.get(key)}, where {here} is running")
            here.add(key)


def _check_task_ids(tables: Tables) -> Iterator[Finding]:
    """Yield every task id that rows of two releases, or of two nodes, have."""
    rows: dict[str, NodeRow] = {}
    for node in tables.nodes:
        other = rows.setdefault(node.task_id, node) if node.task_id else node
        if other is not node:
            yield Finding("ids", f"{node.task_id} is of {other} and of {node}")


# -- at any moment ------------------------------------------------------------------------------


def check_now(database: rc.Database) -> Iterator[Finding]:
    """Yield what is wrong in the rows of the last releases and of running nodes, and may be at no moment."""
    with database.transaction() as tx:
        releases = tx.rows("""
            SELECT r.id, r.success_nodes, r.failed_nodes,
                   (SELECT COUNT(*) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'success'),
                   (SELECT COUNT(*) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'failed')
            FROM release_tasks r
            WHERE r.id > (SELECT MAX(id) FROM release_tasks) - 40""")
        two = tx.rows("SELECT h.main_ip, h.agent_port, COUNT(*), MIN(n.release_task_id), MAX(n.release_task_id) "
                      "FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id WHERE n.status = 'running' "
                      "GROUP BY h.main_ip, h.agent_port HAVING COUNT(*) > 1")
        unnamed = tx.rows("SELECT release_task_id, node_id FROM release_task_nodes "
                          "WHERE status = 'running' AND (task_id = '' OR started_at IS NULL OR attempts = 0)")
    for release_id, success, failed, success_rows, failed_rows in releases:
        if (success, failed) != (success_rows, failed_rows):
            yield Finding("counters", f"release {release_id}: {success}, {failed} in place of {success_rows}, "
                                      f"{failed_rows}")
    for address, port, count, first, last in two:
        yield Finding("two", f"{address}:{port} has {count} running rows, of releases {first} and {last}")
    if unnamed:
        yield Finding("history", f"running without task_id, started_at or attempts: {unnamed}")
