"""How long a claim stays without an owner that can act.

A process that is suspended within a transaction keeps all others from writing: on SQLite until it is
woken, on PostgreSQL until the server ends its session. Take-overs that waited for it are counted apart.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from typing import NamedTuple

import releasectl as rc

from .figures import LOCKED_OUT, Figures

# A take-over waited for a lock if nobody could write for longer than this.
LOCKED_OUT_S = 0.4


class Orphan(NamedTuple):
    """A claim whose owner was killed or suspended."""

    fence: int
    since: float
    cause: str
    pid: int
    locked_s: float = 0.0  # for so long nobody at all could write meanwhile


class TakeOvers:
    """Watches orphaned claims, and counts the seconds until another process has them. For several threads."""

    def __init__(self, database: rc.Database, figures: Figures):
        self._database, self._figures = database, figures
        self._orphans: dict[int, Orphan] = {}  # by release
        self._lock = threading.Lock()
        self._updated_at = time.monotonic()
        self._lock_check: sqlite3.Connection | None = None

    @property
    def are_awaited(self) -> bool:
        return bool(self._orphans)

    def owners(self) -> dict[int, list[tuple[int, int]]]:
        """Return the claims that stand, each a release and a fence, by the owner's process id."""
        owners: dict[int, list[tuple[int, int]]] = {}
        with self._database.transaction() as tx:
            for release_id, owner, fence in tx.rows("SELECT id, claim_owner, claim_fence FROM release_tasks "
                                                    "WHERE claim_expires_at IS NOT NULL"):
                owners.setdefault(int(owner.split(":")[1]), []).append((release_id, fence))
        return owners

    def add_orphans(self, pid: int, cause: str, since: float) -> None:
        """Note the claims of a process that can't act any more."""
        with contextlib.suppress(rc.DatabaseError):
            for release_id, fence in self.owners().get(pid, []):
                with self._lock:
                    self._orphans.setdefault(release_id, Orphan(fence, since, cause, pid))

    def drop_orphans_of(self, pid: int) -> None:
        """Do not wait for the claims of a process that goes on."""
        with self._lock:
            kept = {key: orphan for key, orphan in self._orphans.items() if orphan.pid != pid}
            self._figures.count("suspended owners woken before a take-over", len(self._orphans) - len(kept))
            self._orphans = kept

    def drop_all(self) -> None:
        """Do not wait for any: the server was away meanwhile."""
        with self._lock:
            self._orphans = {}

    def update(self) -> None:
        """Count the claims that were taken over since the last call. To be called often."""
        self._note_lock()
        with self._database.transaction() as tx:
            claims = tx.rows("SELECT id, claim_fence, claim_expires_at IS NULL FROM release_tasks "
                             "WHERE id > (SELECT MAX(id) FROM release_tasks) - 40")
        now = time.monotonic()
        for release_id, fence, is_free in claims:
            with self._lock:
                orphan = self._orphans.get(release_id)
                if orphan is None or (fence == orphan.fence and not is_free):
                    continue
                del self._orphans[release_id]
            if fence > orphan.fence:
                cause = orphan.cause + (LOCKED_OUT if orphan.locked_s > LOCKED_OUT_S else "")
                self._figures.take_overs[cause].append(now - orphan.since)
                self._figures.count("take-overs")

    def close(self) -> None:
        if self._lock_check is not None:
            self._lock_check.close()

    def _note_lock(self) -> None:
        """Add the time since the last call to every orphan's, if somebody keeps the write lock."""
        now = time.monotonic()
        passed_s, self._updated_at = now - self._updated_at, now
        if self._orphans and self._is_locked():
            with self._lock:
                self._orphans = {key: orphan._replace(locked_s=orphan.locked_s + passed_s)
                                 for key, orphan in self._orphans.items()}

    def _is_locked(self) -> bool:
        engine = self._database.engine
        if not isinstance(engine, rc.SqliteEngine):
            with self._database.transaction() as tx:
                return not tx.value("SELECT pg_try_advisory_xact_lock(?)", rc.PG_LOCK_KEY)
        if self._lock_check is None:
            self._lock_check = sqlite3.connect(engine.path, timeout=0, isolation_level=None)
        try:
            self._lock_check.execute("BEGIN IMMEDIATE")
            self._lock_check.execute("ROLLBACK")
            return False
        except sqlite3.OperationalError:
            return True
