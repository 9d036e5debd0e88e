"""What was done and found, counted; and which figures must be zero."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .injections import CALL, Injection

# The figures that must be zero, by the kind of a finding.
ZEROS = {
    "lost": "releases lost",
    "counters": "wrong counters",
    "history": "illegal histories",
    "twice": "tasks run twice",
    "overlaps": "overlaps",
    "two": "addresses with two tasks",
    "order": "releases out of order",
    "back": "releases without their one rollback",
    "unapproved": "releases started without their approval",
    "frozen": "dispatches while their target was frozen",
    "lower": "lower versions sent",
    "reused": "versions given out again",
    "ids": "task ids of two releases",
    "unproven": "successes without a run of it",
    "untrue": "outcomes that are not the agents'",
    "owners": "writes without the claim",
    "intents": "dispatched before it was written",
    "late": "dispatched after the end",
    "unexplained": "nodes failed without cause",
    "untold": "notifications lost",
    "made up": "notifications of what was not",
    "process": "processes that went wrong",
    "traces": "logs with a stack trace",
}
# What nobody can know after a failover: the database that knew it is gone, and agents of the dialect
# "tasks" do not tell which version they have. Counted, and no fault.
UNKNOWABLE = {
    "lowered": "lower versions after lost higher ones",
    "blind": "successes below lost versions (tasks)",
    "crossed": "overlaps with lost tasks (tasks)",
    "told": "notifications of lost events",
}
# With --strict these are findings like any other, of another kind.
STRICT_KINDS = {"lowered": "lower", "blind": "unproven", "crossed": "overlaps", "told": "made up"}

# Of a take-over that waited for a write lock in the hands of a suspended process.
LOCKED_OUT = ", locked out"


class Finding(NamedTuple):
    """Something that must not be: its kind, of ZEROS or UNKNOWABLE, and what was seen."""

    kind: str
    text: str


class Figures:
    """All that is counted, by many threads."""

    def __init__(self, engine: str, seed: int, claim_ttl_s: float, is_strict: bool = False):
        self.engine, self.seed, self.claim_ttl_s, self.is_strict = engine, seed, claim_ttl_s, is_strict
        self.started_at = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.points: dict[str, Counter[str]] = {}
        self.faults: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()
        self.phases: dict[str, float] = {}
        self.findings: list[Finding] = []
        self.unknowable: list[Finding] = []
        self.take_overs: dict[str, list[float]] = {
            cause + state: [] for state in ("", LOCKED_OUT) for cause in ("kill", "suspension")}
        self._lock = threading.Lock()

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.counts[name] += number

    def count_fired(self, injection: Injection) -> None:
        with self._lock:
            if injection.point == CALL:
                self.faults[injection.when] += 1
            else:
                self.points.setdefault(injection.point, Counter())[injection.when] += 1

    def add(self, findings: Iterable[Finding], where: str) -> bool:
        """Keep findings; return whether there were new ones of a kind that must not be."""
        all_findings = list(findings)  # some ask a database, which may take a while
        with self._lock:
            new = []
            for kind, text in all_findings:
                finding = Finding(STRICT_KINDS.get(kind, kind) if self.is_strict else kind, f"{where}: {text}")
                if finding.kind in UNKNOWABLE:
                    self.counts[UNKNOWABLE[kind]] += 1
                    self.unknowable.append(finding)
                elif finding not in self.findings:
                    new.append(finding)
                    self.findings.append(finding)
        for finding in new:
            logging.error("%s: %s", ZEROS[finding.kind], finding.text)
        return bool(new)

    def zeros(self) -> dict[str, int]:
        found = Counter(finding.kind for finding in self.findings)
        return {name: found[kind] for kind, name in ZEROS.items()}

    def document(self) -> dict[str, Any]:
        """Return all figures as one JSON object."""
        return {
            "engine": self.engine, "seed": self.seed, "seconds": round(time.monotonic() - self.started_at, 1),
            "phases": {name: round(seconds, 1) for name, seconds in self.phases.items()},
            "counts": dict(sorted(self.counts.items())), "points": self.points, "faults": dict(self.faults),
            "exits": dict(self.exits), "zeros": self.zeros(),
            "takeOverS": {cause: quantiles(times) for cause, times in self.take_overs.items()},
            "claimTtlS": self.claim_ttl_s, "findings": [finding._asdict() for finding in self.findings[:200]],
            "unknowable": [finding._asdict() for finding in self.unknowable[:200]]}

    def table(self) -> str:
        """Return all figures for people."""
        document = self.document()
        lines = [("engine, seed", f"{self.engine}, {self.seed}"),
                 ("seconds", f"{document['seconds']} ({self._pairs(document['phases'])})"),
                 *document["counts"].items(),
                 ("faults of the database", self._pairs(document["faults"]))]
        lines += [(f"point {name}", self._pairs(tried)) for name, tried in sorted(self.points.items())]
        lines += [(f"take-over after a {cause}, s", f"{self._pairs(figures)} (CLAIM_TTL_SEC {self.claim_ttl_s:g})")
                  for cause, figures in document["takeOverS"].items() if figures]
        lines += [("exit codes of their own", self._pairs(document["exits"])),
                  *((f"{name} (0)", count) for name, count in document["zeros"].items())]
        return "\n".join(f"{name:<34} {value}" for name, value in lines)

    @staticmethod
    def _pairs(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return how many there are, the median, the 99th percentile and the largest."""
    ranked = sorted(times)
    if not ranked:
        return {}
    return {"number": len(ranked), "median": round(ranked[len(ranked) // 2], 2),
            "p99": round(ranked[min(len(ranked) - 1, int(len(ranked) * 0.99))], 2), "largest": round(ranked[-1], 2)}
