"""An operator who creates releases as long as few are open, and approves, steers and rolls back some."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
import time

from fake_agent import payload_sha256
from lab import SITES

import releasectl as rc

from .agents import RecordedAgents
from .figures import Figures
from .injector import mark_rollbacks
from .tables import read_open_releases


class Operator:
    """Works in a thread of its own.

    Each release has a payload of its own, by which agents and tables are compared, and a random target:
    any target's releases may go to any node.
    """

    TARGETS = ("cdn", "dns", "waf", "cache")
    OPEN_AT_MOST = 5

    def __init__(self, url: str, agents: RecordedAgents, figures: Figures, seed: int):
        self.created: list[str] = []  # the contents of releases whose creation was confirmed
        self.refusal = ""  # the last one
        self._url, self._agents, self._figures, self._random = url, agents, figures, random.Random(seed)
        mark_rollbacks()
        self._store = rc.Store(rc.Database(url))
        self._marks = itertools.count(1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60)
        self._store.database.close()

    def restart(self) -> None:
        """Go on as a process that begins now, and has seen no version yet."""
        old, self._store = self._store, rc.Store(rc.Database(self._url))
        old.database.close()

    def open_releases(self) -> list[tuple[int, str]]:
        return read_open_releases(self._store.database)

    def resume_all(self) -> None:
        self._lift_freezes()
        for release_id, status in self.open_releases():
            self._approve(release_id)
            if status == "paused":
                self._act("resume", release_id)

    def _run(self) -> None:
        while not self._stopped.wait(0.1):
            try:
                self._step()
            except (rc.AppError, rc.StateMoved) as error:  # the database is away, or the release went on
                self._figures.count("operator's requests refused")
                self.refusal = str(error)
            except Exception:
                logging.exception("the operator")

    def _step(self) -> None:
        releases = self.open_releases()
        if len(releases) < self.OPEN_AT_MOST:
            self._create()
        release_id, status = self._random.choice(releases) if releases else (0, "")
        dice = self._random.random()
        if status == "pending" and dice < 0.3:
            self._approve(release_id)
        if status == "paused" and dice < 0.4:
            self._act("resume", release_id)
        elif status in ("pending", "running") and dice < 0.015:  # it holds up all that share a node with it
            self._act("pause", release_id)
        elif status and dice > 0.995:
            self._act("cancel", release_id)
        elif dice > 0.985:
            self._roll_back()
        elif 0.95 < dice < 0.96:
            self._store.releases.set_freeze(True, "torture", "holidays", self._random.choice(self.TARGETS))
            self._figures.count("targets frozen")
        elif 0.9 < dice < 0.95:
            self._lift_freezes()

    def _create(self) -> None:
        """Make a release for all nodes or for some; some start later than others that are made after them."""
        if self._random.random() < 0.1:
            self._swap_twins()
        with self._store.database.transaction() as tx:
            nodes = [row[0] for row in tx.rows("SELECT id FROM nodes WHERE enabled = 1 ORDER BY id")]
        # mostly a few, so that some releases go side by side
        chosen = None if self._random.random() < 0.1 else self._random.sample(
            nodes, self._random.randint(1, max(len(nodes) // 4, 1)))
        strategy: dict[str, object] = {"startAt": rc.utc_text(time.time() + self._random.uniform(0.5, 4.0))} if (
            self._random.random() < 0.1) else {}
        if self._random.random() < 0.4:
            strategy["onExceed"] = rc.ROLLBACK
        if self._random.random() < 0.15:
            strategy.update(preflight=True, retries=1)
        mark = next(self._marks)
        payload = {**SITES, "mark": mark}
        content = payload_sha256(payload)
        self._agents.losses.created_at[content] = time.monotonic()
        made = self._store.releases.create(rc.ReleaseRequest(
            self._random.choice(self.TARGETS), f"mark {mark}", payload, strategy=strategy, node_ids=chosen,
            supersede=(supersedes := self._random.random() < 0.05),
            approval=rc.WANTED if self._random.random() < 0.15 and not supersedes else ""), "torture")
        self._figures.count("releases superseded", len(made.superseded))
        self.created.append(content)

    def _roll_back(self) -> None:
        """Roll one of the last releases back at once, before all that has not started."""
        with self._store.database.transaction() as tx:
            ended = [row[0] for row in tx.rows(
                "SELECT id FROM release_tasks WHERE status IN ('success', 'partial', 'failed', 'cancelled') "
                "ORDER BY id DESC LIMIT 20")]
        with contextlib.suppress(rc.AppError, rc.StateMoved):
            made = self._store.releases.rollback(self._random.choice(ended), "torture", rc.Again(
                "in a hurry", True, supersede=True)) if ended else None
            self._figures.count("operator's rollback --now", int(made is not None))
            self._figures.count("releases superseded", len(made.superseded) if made else 0)

    def _swap_twins(self) -> None:
        """Enter a host anew under its other name, as a person does by hand."""
        number = self._random.randint(1, self._agents.TWINS)
        names = [f"edge-{number}", f"twin-{number}"]
        with self._store.database.transaction(write=True) as tx:
            old = tx.value("SELECT name FROM nodes WHERE enabled = 1 AND name IN (?, ?)", *names)
            for name in sorted(names, key=lambda one: one != old):  # never both at once
                tx.execute("UPDATE nodes SET enabled = ? WHERE name = ?", int(name != old), name)

    def _lift_freezes(self) -> None:
        for freeze in self._store.releases.freezes().on:
            self._store.releases.set_freeze(False, "torture", target=freeze.target)

    def _approve(self, release_id: int) -> None:
        """Let a release start that waits for an approval, as somebody else than its author, who may not."""
        for who in ("torture", "another"):
            with contextlib.suppress(rc.AppError, rc.StateMoved):
                self._store.approvals.approve(release_id, who)
                self._figures.count(f"releases approved by {who}")

    def _act(self, verb: str, release_id: int) -> None:
        with contextlib.suppress(rc.AppError, rc.StateMoved):
            self._store.releases.act(verb, release_id, "torture")
            self._figures.count(f"operator's {verb}")
