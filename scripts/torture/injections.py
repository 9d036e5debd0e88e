"""What a process is told to do to itself, and when: POINT:WHEN:HIT, such as commit:unanswered:2."""

from __future__ import annotations

from typing import NamedTuple

# When an injection at a named point acts.
WHENS = {
    "before": "killed: all is written, the commit or request has not left",
    "after": "killed: it took place, and the caller is about to hear of it",
    "unanswered": "killed: it took place at the other end, the answer was not read",
    "lost": "it took place, and the process sees a broken connection in place of the answer",
    "stop-before": "suspended as in before, past the claim's end, then woken",
    "stop-after": "suspended as in after",
    "stop-unanswered": "suspended as in unanswered",
}
# What a database call does in place of its work; "lost" does the work and fails then.
FAULTS = {
    "sqlite": ("full", "io", "busy", "readonly", "lost", "gone"),
    "postgresql": ("full", "io", "busy", "readonly", "cut", "lost", "gone"),
}
# Words in the place of a point: a database call, whatever its point is; and no fault at all, only counting.
CALL, COUNT = "call", "count"


class Injection(NamedTuple):
    """POINT:WHEN:HIT; or call:FAULT:NUMBER for the call with that number; or count:all:0."""

    point: str
    when: str
    hit: int  # it acts when the point is passed for this time, from 1

    def __str__(self) -> str:
        return f"{self.point}:{self.when}:{self.hit}"

    @property
    def suspends(self) -> bool:
        return self.when.startswith("stop-")

    @property
    def kills(self) -> bool:
        return self.when in ("before", "after", "unanswered")


COUNTING = Injection(COUNT, "all", 0)


def parse_injections(text: str) -> tuple[Injection, ...]:
    """Return the injections of a text in which commas join them. Raise ValueError."""
    return tuple(map(parse_injection, text.split(",")))


def parse_injection(text: str) -> Injection:
    """Return the injection that a text stands for. Raise ValueError."""
    point, when, hit = text.split(":")
    if point == CALL and when not in FAULTS["sqlite"] + FAULTS["postgresql"]:
        raise ValueError(f"unknown fault {when}")
    if point not in (CALL, COUNT) and when not in WHENS:
        raise ValueError(f"unknown moment {when}: known are {', '.join(WHENS)}")
    return Injection(point, when, int(hit))


# -- what a process reports to us, in lines of its standard error -----------------------------------

REPORT_PREFIX = "torture: "
FIRED, COUNTED = "fired ", "counted "
