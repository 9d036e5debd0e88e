"""Which command passes which point, and what it finds when it starts."""

from __future__ import annotations

from typing import NamedTuple

from .injector import POINTS

PAYLOAD_FILE = "PAYLOAD_FILE"  # in a command: the path of the file that a laboratory has


class Scenario(NamedTuple):
    """A command of releasectl, and what it works on."""

    command: tuple[str, ...]
    protocols: tuple[str, ...] = ("tasks", "tasks", "execute")  # of the agents, one a node
    task_ms: int = 80
    before: str = "created"  # what is there: "" an empty database, "nodes", a "created" or a "cancelled" release
    settings: tuple[tuple[str, object], ...] = ()
    first: str = ""  # an injection that comes before the one that is tried
    outcome: str = "success"  # of the agents' tasks, and so of the release


DRAIN = Scenario(("run-once", "--drain"))
SERVE = Scenario(("serve",))
# Tasks that last longer than a third of the claim, so that it is renewed.
SLOW = DRAIN._replace(task_ms=700)
# A tick that leaves while tasks are in flight, so that it lets its claim go.
TICK = Scenario(("run-once",), ("tasks", "tasks"), 900, settings=(("RELEASE_EXECUTOR_INTERVAL_SEC", 0.1),))
# Where a point is passed, if not by DRAIN.
OTHER_SCENARIOS = {
    "migrate": DRAIN._replace(before=""),
    "claims.renew": SLOW,
    "claims.drop": TICK,
    "releases.create": Scenario(("create", "--reason", "torture", "--payload", PAYLOAD_FILE), before="nodes"),
    "claims.was_written": DRAIN._replace(first="claims.commit:lost:1"),
    "releases.act": Scenario(("cancel", "1")),
    "releases.retry": Scenario(("retry", "1"), before="cancelled"),
    "releases.set_first_version": Scenario(("migrate", "--first-version", "50")),
}
SCENARIOS = {point: OTHER_SCENARIOS.get(point, DRAIN) for point in POINTS}
# Those that an executor passes.
EXECUTOR_POINTS = [point for point, scenario in SCENARIOS.items() if scenario.command[0] == "run-once"]
# Those that change nothing: a suspension there is no more than slowness.
READING_POINTS = {"claims.scan", "claims.dispatch_blockers", "claims.halts", "claims.read",
                  "claims.read_with_nodes", "releases.find"}

# Tasks that a new owner finds still running, and that fail: an agent would run them again under another id.
LONG = DRAIN._replace(protocols=("tasks", "tasks"), task_ms=2200, outcome="failed")
LONG_POINTS = ("claims.commit", "dispatch", "query", "claims.claim", "claims.renew")

# Small, for the phase that tries every call of the database.
FAULT_SCENARIOS = [scenario._replace(protocols=("tasks", "execute"), task_ms=30) for scenario in (DRAIN, SERVE)]
