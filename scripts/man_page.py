#!/usr/bin/env python3
"""Print the man page of releasectl, made from its tables of commands and settings: `make man`."""
from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import releasectl as rc  # noqa: E402

EXIT_CODES = (
    (rc.EXIT_DONE, "done"), (rc.EXIT_NOT_SUCCESS, "the release ended other than success"),
    (rc.EXIT_USAGE, "wrong usage or configuration"), (rc.EXIT_STATE, "not found, or the wrong state for this"),
    (rc.EXIT_UNAVAILABLE, "database or agent out of reach"), (rc.EXIT_BUSY, "another process is at it: try later"),
    (130, "interrupted by Ctrl-C"))

HEAD = r""".\" Made by scripts/man_page.py (make man): change the tables of releasectl.py.
.TH RELEASECTL 1 "" "releasectl {version}" "User Commands"
.SH NAME
releasectl \- send config versions to nodes in batches, and stop when a node fails
.SH SYNOPSIS
.B releasectl
.I COMMAND
.RI [ options ]
.SH DESCRIPTION
releasectl sends a new configuration version to the agents on many hosts, in batches: first to one
node, then, when that one has succeeded, to all others. A node that fails stops the release, and the
rest stays as it was. Every step is kept in a database (SQLite or PostgreSQL), so a process that dies
loses nothing."""

TAIL = r""".SH FILES
.TP
.I /etc/releasectl/releasectl.conf
the settings, where neither \-\-config nor the variable RELEASECTL_CONFIG names another file
.TP
.I schema.sql
the tables; it belongs beside releasectl.py
.TP
.I dashboard.html
the dashboard; it belongs beside releasectl.py, and without it everything else works
.TP
.I docs/OPERATIONS.md, docs/RUNBOOK.md
installing and running it; what to do when something is wrong"""


def text(words: object) -> str:
    """Return text that roff shows as it is; a line may not begin with one of its control characters."""
    escaped = str(words).replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("~", r"\(ti")
    return r"\&" + escaped if escaped.startswith(".") else escaped


def bold(words: str) -> str:
    return rf"\fB{text(words)}\fR"


def option(flags: tuple[str, ...], keywords: Mapping[str, Any]) -> str:
    """Return an option, or a word of the command, as it is written."""
    values = "|".join(keywords.get("choices", ()))
    if not flags[0].startswith("-"):
        word = rf"\fI{text(keywords.get('metavar') or values or flags[0].upper())}\fR"
        return {"*": f"[{word} ...]", "?": f"[{word}]"}.get(str(keywords.get("nargs")), word)
    value = values or keywords.get("metavar") or flags[0].lstrip("-").upper()
    return ", ".join(map(bold, flags)) + (rf" \fI{text(value)}\fR" if "action" not in keywords
                                          or keywords["action"] == "append" else "")


def options(known: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]]) -> list[str]:
    lines = []
    for flags, keywords in known:
        if flags[0].startswith("-") or keywords.get("help"):
            lines += [".TP", option(flags, keywords), text(str(keywords.get("help", "")) % {}) or r"\&"]
    return lines


def command(one: rc.Command) -> list[str]:
    words = [option(flags, keywords) for flags, keywords in one.options if not flags[0].startswith("-")]
    more = options(one.options)
    return [f".SS {' '.join([bold(one.name), *words])}", text(one.help[0].upper() + one.help[1:]) + ".", *more]


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [line for term, meaning in rows for line in (".TP", term, meaning)]


def page() -> str:
    """Return the whole page."""
    lines = [HEAD.format(version=text(rc.__version__)), ".SH OPTIONS", "These may stand before or after every command:",
             *options(rc.COMMON_OPTIONS), ".SH COMMANDS"]
    for one in rc.COMMANDS:
        lines += command(one)
    lines += [".SH ENVIRONMENT", "The settings, from the environment or, as KEY=VALUE lines, from the file of",
              bold("--config") + ":",
              *table((bold(s.name), text(s.help) + (f" ({text(s.default)})" if s.default else ""))
                     for s in rc.SETTINGS),
              ".SH EXIT STATUS", *table((bold(str(code)), text(meaning)) for code, meaning in EXIT_CODES), TAIL]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
