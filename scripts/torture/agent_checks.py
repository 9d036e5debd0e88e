"""Checks the tables against what the agents were sent and ran."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from fake_agent import Agent

import releasectl as rc

from .agents import RecordedAgents, Run, Sent
from .figures import Finding
from .tables import NodeRow, ReleaseRow, Tables

# What the clocks of two processes and an agent may disagree by, on a machine under load.
SLACK_S = 0.5


def check_agents(tables: Tables, agents: RecordedAgents) -> Iterator[Finding]:
    """Yield where tables and agents disagree, and what was run or sent that must not be."""
    for agent in agents.all:
        yield from _check_runs(agent, agents)
        yield from _check_lower(agent, agents)
    yield from _check_reuse(agents)
    releases = {release.id: release for release in tables.releases}
    by_address = {agent.address: agent for agent in agents.all}
    runs = {agent.address: agents.runs(agent) for agent in agents.all}
    for node in tables.nodes:
        yield from _NodeCheck(node, releases[node.release_id], by_address[node.main_ip], runs[node.main_ip],
                              agents).findings()


def _check_runs(agent: Agent, agents: RecordedAgents) -> Iterator[Finding]:
    """Yield what an agent ran twice, and what it ran beside something else."""
    name, crossed = f"{agent.address} ({agent.protocol})", 0
    for number, runs in enumerate(agents.lifetimes(agent)):
        for (version, content), count in Counter((run.version, run.content) for run in runs).items():
            if count > 1:
                yield Finding("twice", f"{name}, lifetime {number}: version {version} ran {count} times: "
                                       f"{[run for run in runs if (run.version, run.content) == (version, content)]}")
    runs = agents.runs(agent)
    for place, run in enumerate(runs):
        others = [one for one in runs[:place] if one.ended_at is None or one.ended_at > run.began_at]
        crossed += bool(others)
        if others:
            # An executor that sees that the database went back leaves execute agents alone for a while.
            is_lost = agent.protocol == "tasks" and all(
                agents.losses.took_dispatch(one.content, agent.address, one.began_at, run.began_at) for one in others)
            yield Finding("crossed" if is_lost else "overlaps", f"{name}: {run} beside {others}")
    if agent.overlaps > crossed:
        yield Finding("overlaps", f"{name}: the agent counted {agent.overlaps}, its runs show {crossed}")


def _check_lower(agent: Agent, agents: RecordedAgents) -> Iterator[Finding]:
    """Yield every version that an agent was sent after a higher one."""
    sent = agents.sent(agent)
    found: set[int] = set()
    for place, one in enumerate(sent):
        higher = [other for other in sent[:place] if other.version > one.version]
        if not higher or one.version in found:
            continue
        found.add(one.version)
        known = [other for other in higher
                 if not agents.losses.took_dispatch(other.content, agent.address, other.at, one.at)]
        yield Finding("lower" if known else "lowered", f"{agent.address} ({agent.protocol}) was sent {one} after "
                                                       f"{(known or higher)[-1]}")


def _check_reuse(agents: RecordedAgents) -> Iterator[Finding]:
    """Yield every version that was sent with two payloads, and every task id that was."""
    versions: dict[object, dict[str, str]] = {}
    task_ids: dict[object, dict[str, str]] = {}
    for agent in agents.all:
        for one in agents.sent(agent):
            versions.setdefault(one.version, {}).setdefault(one.content, f"{agent.address} {one}")
            task_ids.setdefault(one.task_id, {}).setdefault(one.content, f"{agent.address} {one}")
    for kind, uses in (("reused", versions), ("ids", task_ids)):
        for name, contents in uses.items():
            if len(contents) > 1:
                yield Finding(kind, f"{name} was sent with {len(contents)} payloads: {list(contents.values())}")


def check_created(tables: Tables, agents: RecordedAgents, created: Iterable[str]) -> Iterator[Finding]:
    """Yield the releases whose creation was confirmed, that no failover took, and that are not there."""
    there = {release.content for release in tables.releases}
    for content in created:
        if content not in there and not agents.losses.took_release(content):
            yield Finding("lost", f"the release with the payload {content} is not there")


def check_intents(database: rc.Database, agents: RecordedAgents) -> Iterator[Finding]:
    """Yield what an agent runs and the tables do not know to be dispatched. May be called at any moment."""
    blind_until = agents.losses.blind_until
    begun = {(agent.address, run["version"]) for agent in agents.all for run in agent.runs[-5:]
             if run["startedAt"] > blind_until}
    with database.transaction() as tx:
        pending = tx.rows("SELECT h.main_ip, r.version FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id "
                          "JOIN release_tasks r ON r.id = n.release_task_id WHERE n.status = 'pending'")
    if agents.losses.blind_until != blind_until:
        return  # a failover came between
    for address, version in begun & {(row[0], row[1]) for row in pending}:
        yield Finding("intents", f"{address} runs version {version}, and its row is pending")


class _NodeCheck:
    """One node of one release against what the agent at its address was sent and ran."""

    def __init__(self, node: NodeRow, release: ReleaseRow, agent: Agent, runs: Sequence[Run], agents: RecordedAgents):
        self.node, self.release, self.agent = node, release, agent
        self._all_runs, self._sent, self._losses = runs, agents.sent(agent), agents.losses
        self._runs = [run for run in runs if (run.version, run.content) == (release.version, release.content)]
        self._name = (f"release {release.id} (v{release.version}), node {node.main_ip} ({agent.protocol}) "
                      f"is {node.status}")

    def findings(self) -> Iterator[Finding]:
        if self.node.status == "success" and not any(run.outcome == "success" for run in self._runs):
            yield Finding("blind" if self._is_blind() else "unproven", f"{self._name}, and the agent never applied "
                          f"it: {self._runs}, at last {self._all_runs[-3:]}")
        known = [run for run in self._runs if not self._is_forgotten(run)]
        if self.node.status in ("skipped", "pending") and known:
            yield Finding("untrue", f"{self._name}, and the agent ran it: {known}")
        if self.node.status == "failed" and not self._is_explained():
            yield Finding("unexplained", f"{self._name}: {self.node.error_kind}, {self.node.error_msg}; "
                                         f"it ran {self._runs}")
        if self.release.finished_at and self.node.error_kind != "abandoned":
            # agents note monotonic times
            ended = rc.epoch_of(self.release.finished_at) - time.time() + time.monotonic() + SLACK_S
            late = [run for run in known if run.began_at > ended]
            if late:
                yield Finding("late", f"{self._name}, and the agent began {late} after {self.release.finished_at}")

    def _is_forgotten(self, run: Run) -> bool:
        return self._losses.took_dispatch(run.content, self.node.main_ip, run.began_at)

    def _higher(self) -> list[Sent]:
        """Return the higher versions that the agent was sent before this release for the last time."""
        mine = (self.release.version, self.release.content)
        last = max((one.at for one in self._sent if (one.version, one.content) == mine), default=float("inf"))
        return [one for one in self._sent if one.version > self.release.version and one.at < last]

    def _is_blind(self) -> bool:
        """Return whether the agent had a higher version that only lost commits knew of, and did not report it."""
        higher = self._higher()
        return self.agent.protocol == "tasks" and bool(higher) and all(
            self._losses.took_dispatch(one.content, self.node.main_ip, one.at) for one in higher)

    def _is_explained(self) -> bool:
        """Return whether there is a cause for the failure."""
        is_ending = self.release.status in ("failed", "cancelled")
        if self.release.error_msg.startswith("preflight: "):  # its agent did not answer
            return not self._runs
        if self.node.error_kind == "rejected":  # a higher version, or one that it had before anybody knew of it
            return bool(self._higher()) or any(map(self._is_forgotten, self._runs))
        if self.node.error_kind != "abandoned" and self.node.error_msg.endswith("(not tried again: the release ends)"):
            return is_ending and not self._runs  # no answer yet, and none waited for
        if self.node.error_kind == "agent_failed":
            return any(run.outcome == "failed" for run in self._runs)
        return self.node.error_kind == "abandoned" and is_ending
