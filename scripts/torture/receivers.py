"""A receiver of notifications that counts: whatever a committed event tells must have got there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Callable

from contract import TERMINAL
from lab import Inbox

import releasectl as rc

from .databases import retry
from .figures import Figures, Finding
from .tables import EventRow, Tables

# All kinds that releases have here, for workers and for those in this process who create and steer releases.
KINDS = ("created", "started", "paused", "success", "partial", "failed", "cancelled", "taken_over", "stuck",
         "approval")
SETTINGS = {"NOTIFY_ON": ",".join(KINDS)}


def begin_telling(url: str) -> None:
    """Enter an executor with a receiver, as if one had run before: who has no settings writes for it."""
    teller = rc.Store(rc.Database(url, notify_on=frozenset(KINDS)))
    retry(lambda: teller.claims.note_executor("before:1:x", "before", "serve", 1.0, "", True))
    teller.database.close()


def deliver(database: rc.Database, run_tick: Callable[[], None], ends_at: float) -> None:
    """Let ticks send what is left, as if the time until it is due again had passed."""
    def left() -> int:
        with database.transaction(write=True) as tx:
            return tx.execute("UPDATE notifications SET next_at = '2000-01-01T00:00:00.000Z'")

    while retry(left) and time.monotonic() < ends_at:
        run_tick()


def check_told(tables: Tables, inbox: Inbox, figures: Figures, may_be_lost: bool = False) -> Iterator[Finding]:
    """Yield the events that were not told, and what was told without an event.

    may_be_lost: a failover took some events of which it was told.
    """
    told = Counter((message["release"]["id"], message["kind"], message["at"]) for message in list(inbox.messages))
    ids = Counter(message["id"] for message in inbox.messages)
    figures.count("notifications", len(ids))
    figures.count("notifications that came again", sum(ids.values()) - len(ids))
    happened = {(event.release_id, kind, event.at) for event in tables.events for kind in [_kind_of(event)] if kind}
    for one in sorted(happened - set(told)):
        yield Finding("untold", f"release {one[0]} was {one[1]} at {one[2]}, and nobody was told")
    for one in sorted(set(told) - happened):
        yield Finding("told", f"release {one[0]} was {one[1]} at {one[2]}: a failover took it") if may_be_lost else (
            Finding("made up", f"release {one[0]} was {one[1]} at {one[2]}: no event says so"))


def _kind_of(event: EventRow) -> str:
    """Return what is to be told of an event, "" for nothing; by the documentation, not by what is judged."""
    if event.node_id is not None:
        return ""
    if event.from_status == event.to_status:
        return event.event if event.event in ("taken_over", "stuck", "approval") else ""
    if event.to_status == "paused" or event.to_status in TERMINAL:
        return event.to_status
    return {("", "pending"): "created", ("pending", "running"): "started"}.get(
        (event.from_status, event.to_status), "")
