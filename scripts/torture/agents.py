"""Stand-in agents, and a record of what each was sent and ran, against which the tables are compared."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

from fake_agent import Agent, AgentSpec, Fleet, payload_sha256

import releasectl as rc

from .databases import retry


class Sent(NamedTuple):
    """A dispatch that an agent read, whatever it did with it."""

    at: float
    task_id: str
    version: int
    content: str


class Run(NamedTuple):
    """A task that an agent ran."""

    task_id: str
    version: int
    content: str  # payload_sha256; each release has its own
    began_at: float
    ended_at: float | None
    outcome: str | None


class Loss(NamedTuple):
    """What a failover took: whatever the new primary did not know."""

    dead_at: float  # when the old primary was dead
    until: float  # what was written before may still have left until then
    contents: frozenset[str]  # of the releases that the new primary knew
    dispatched: frozenset[tuple[str, str]]  # content and address of each dispatch that it knew


class Losses:
    """All failovers: what agents know, and no database does any more."""

    def __init__(self) -> None:
        self.all: list[Loss] = []
        self.created_at: dict[str, float] = {}  # when the creation of a content was begun
        self.blind_until = 0.0  # the tables need not know what began before

    def took_dispatch(self, content: str, address: str, at: float, before: float = float("inf")) -> bool:
        """Return whether a dispatch at a time was known to no database any more, at the time `before`."""
        return any(self._is_younger(loss, content) and at <= loss.until and loss.dead_at < before
                   and (content, address) not in loss.dispatched for loss in self.all)

    def took_release(self, content: str) -> bool:
        return any(self._is_younger(loss, content) and content not in loss.contents for loss in self.all)

    def _is_younger(self, loss: Loss, content: str) -> bool:
        """Return whether a failover came after a release was created: only then it can have taken it."""
        return self.created_at.get(content, 0.0) <= loss.dead_at


class RecordedAgents:
    """One agent a node, what each was sent, and when its memory ended."""

    TWINS = 3  # so many agents have two nodes, of which one is enabled

    def __init__(self, certs: Path | None, protocols: Sequence[str], task_ms: int):
        specs = [AgentSpec(f"127.0.1.{number}", 0, protocol) for number, protocol in enumerate(protocols, 1)]
        self.losses = Losses()
        self.fleet = Fleet(certs, specs, task_ms, log_requests=False)
        self._sent: dict[str, list[Sent]] = {agent.address: [] for agent in self.all}
        self._ends: dict[str, list[int]] = {agent.address: [] for agent in self.all}
        for agent in self.all:
            setattr(agent, "handle", self._recording(agent, agent.handle))  # noqa: B010 - it is a method
        self.fleet.start()

    @property
    def all(self) -> list[Agent]:
        return self.fleet.agents

    def add_nodes(self, store: rc.Store) -> None:
        """Add a node for each agent."""
        for number, agent in enumerate(self.all, 1):
            retry(functools.partial(store.nodes.add, f"edge-{number}", agent.address, agent.port, agent.protocol))

    def add_twins(self, store: rc.Store) -> None:
        """Add a second node for the host of some agents: disabled, by hand."""
        with store.database.transaction(write=True) as tx:
            for number, agent in enumerate(self.all[:self.TWINS], 1):
                tx.execute("INSERT INTO nodes (name, main_ip, agent_port, agent_protocol, enabled) "
                           "VALUES (?, ?, ?, ?, 0)", f"twin-{number}", agent.address, agent.port, agent.protocol)

    def restart(self, agent: Agent) -> None:
        """Restart an agent, and note what it ran before."""
        def restart() -> None:
            self._ends[agent.address].append(len(agent.runs))
            agent.apply_restart()

        self.fleet.call(restart)

    def sent(self, agent: Agent) -> list[Sent]:
        """Return what an agent was sent, in order."""
        return self._sent[agent.address][:]

    def runs(self, agent: Agent) -> list[Run]:
        """Return what an agent ran, in order."""
        return [Run(run["taskId"], run["version"], run["payloadSha256"], run["startedAt"], run["finishedAt"],
                    run["outcome"]) for run in agent.runs]

    def lifetimes(self, agent: Agent) -> Iterator[list[Run]]:
        """Yield an agent's runs, a list for each time from one restart to the next."""
        runs, start = self.runs(agent), 0
        for end in [*self._ends[agent.address], len(runs)]:
            yield runs[start:end]
            start = end

    def stop(self) -> None:
        self.fleet.stop()

    def _recording(self, agent: Agent, handle: Callable[..., None]) -> Callable[..., None]:
        """Return an agent's handle() that records each dispatch first."""
        def recording(connection: Any, request: Any) -> None:
            if request.method == "POST":
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the empty body of a ping
                    task = json.loads(request.body)
                    version = task["version"] if agent.protocol == "tasks" else task["payload"]["version"]
                    self._sent[agent.address].append(Sent(
                        time.monotonic(), task.get("taskId") or task["requestId"], version,
                        payload_sha256(task["payload"])))
            handle(connection, request)
        return recording
