"""Failovers to a standby that lags, so that each takes commits: releases, dispatches, outcomes, claims."""

from __future__ import annotations

import contextlib
import time
from typing import Callable, NamedTuple

import releasectl as rc

from .agents import Loss, RecordedAgents
from .databases import PostgresServer
from .figures import Figures
from .tables import Tables, read_tables


class Lag(NamedTuple):
    """What the standby had when it was cut off, and since when."""

    since: float
    event_id: int
    release_id: int


class Failovers:
    """Lets the standby lag while releases go out, and promotes it when the primary has died."""

    ENOUGH = 6  # lost events of nodes
    PATIENCE_S = 8.0  # for a lost release that an agent ran already

    def __init__(self, server: PostgresServer, url: str, agents: RecordedAgents, figures: Figures, wanted: int):
        self._server, self._url, self._agents, self._figures = server, url, agents, figures
        self._wanted = wanted
        self._lag: Lag | None = None
        self._primary = rc.Database(url)

    @property
    def is_lagging(self) -> bool:
        return self._lag is not None

    def close(self) -> None:
        self._primary.close()

    def begin(self) -> None:
        """Cut the standby off."""
        self._server.cut_off_standby()
        standby = rc.Database(self._server.url_of_standby(self._url))
        with standby.transaction() as tx:
            self._lag = Lag(time.monotonic(), tx.value("SELECT COALESCE(MAX(id), 0) FROM release_events"),
                            tx.value("SELECT COALESCE(MAX(id), 0) FROM release_tasks"))
        standby.close()

    def is_ripe(self, is_short: bool) -> bool:
        """Return whether enough was committed that the standby does not have; after a short lag little is enough."""
        assert self._lag is not None
        with self._primary.transaction() as tx:
            created = tx.value("SELECT COUNT(*) FROM release_tasks WHERE id > ?", self._lag.release_id)
            dispatched = tx.value("SELECT COUNT(*) FROM release_events WHERE id > ? AND to_status = 'running' "
                                  "AND node_id IS NOT NULL", self._lag.event_id)
            ended = tx.value("SELECT COUNT(*) FROM release_events WHERE release_task_id > ? AND node_id IS NOT NULL "
                             "AND to_status = 'success'", self._lag.release_id)
        is_late = is_short or time.monotonic() > self._lag.since + self.PATIENCE_S
        return bool(created and dispatched and ((ended and dispatched >= self.ENOUGH) or is_late))

    def is_moment(self) -> bool:
        """Return whether an execute agent works at a request that the standby does not know of: best to fail now."""
        assert self._lag is not None
        with self._primary.transaction() as tx:
            return bool(tx.value("""
                SELECT COUNT(*)
                FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id JOIN release_events e
                     ON e.release_task_id = n.release_task_id AND e.node_id = n.node_id
                WHERE n.status = 'running' AND h.agent_protocol = 'execute' AND e.to_status = 'running'
                  AND e.id > ?""", self._lag.event_id))

    def fail_over(self, meanwhile: Callable[[], None]) -> None:
        """Kill the primary, promote the standby, note what was lost, and make a new standby.

        meanwhile is called when there is no database to ask.
        """
        assert self._lag is not None
        losses = self._agents.losses
        losses.blind_until = float("inf")
        with contextlib.suppress(rc.DatabaseError), self._primary.transaction() as tx:
            self._count_lost(tx, self._lag)
        self._server.crash()
        dead_at = time.monotonic()
        meanwhile()
        standby = rc.Database(self._server.url_of_standby(self._url))
        tables = read_tables(standby)
        standby.close()
        self._server.promote()
        losses.blind_until = time.monotonic() + self._figures.claim_ttl_s
        losses.all.append(_loss(tables, dead_at, losses.blind_until))
        self._lag = None
        self._figures.count("failovers")
        if self._figures.counts["failovers"] < self._wanted:
            self._server.add_standby()

    def _count_lost(self, tx: rc.Transaction, lag: Lag) -> None:
        """Count what is on the primary alone; what comes between here and its death is not counted."""
        self._figures.count("release_tasks lost by failovers",
                            tx.value("SELECT COUNT(*) FROM release_tasks WHERE id > ?", lag.release_id))
        self._figures.count("release_events lost by failovers",
                            tx.value("SELECT COUNT(*) FROM release_events WHERE id > ?", lag.event_id))


def _loss(tables: Tables, dead_at: float, until: float) -> Loss:
    contents = {release.id: release.content for release in tables.releases}
    return Loss(dead_at, until, frozenset(contents.values()), frozenset(
        (contents[node.release_id], node.main_ip) for node in tables.nodes
        if node.status in ("running", "success", "failed")))
