#!/usr/bin/env python3
"""releasectl: brings configuration versions to edge nodes, batch by batch, over mutual TLS.

    python releasectl.py serve          API and executor in one process
    python releasectl.py run-once       one tick of the executor, for cron
    python releasectl.py --help         every command

One file, standard library only; a PostgreSQL driver is loaded for a postgresql:// URL alone.
Sections, in order; each uses only those above it (tests/test_sections.py):

  GROUND
    Vocabulary          the contract's words and numbers, error codes and exceptions
    Helpers             time, one-line text, strict JSON, files; nothing that knows a release
    Settings            one table of the configuration (contract section 6)
    Log and metrics     formatters of the log, the figures of /metrics
    Certificates        TLS contexts, files watched for renewal, revocation lists, expiry; for
                        agents and API alike
  DOMAIN (pure)
    Payloads            what goes out, number for number as it came in; its digest, and the
                        version in it
    Difference          what was added, removed and changed between two JSON values
    Model               the rows of the tables as values, and what is derived from them
    Freezes             what is frozen, and which releases that holds
    Strategy            STRATEGY_KEYS and every other value that a person gives: parser and
                        JSON Schema
    Selection           for whom a release is: names, patterns, labels, exclusions
    Plan                the nodes chosen, batches, payloads; who is left out and why
    Failures            the nodes of a release that failed, grouped by cause
    Node index          a release's nodes by what a decision needs; which may go next
    Preflight           the agents that are asked before batch 1, and whether enough of them answer
    Status texts        what a release does or waits for, on whom, until when
    Decision            what to write and what to send next: no clock, no socket, no disk
    Verbs               what an operator may do when, and which release may start
    Why                 what a release waits for, step by step, and what would mend it
    Verdict             everything that is wrong, worst first, each with its mend
  STORAGE
    Engines             the one place where SQLite and PostgreSQL, and its drivers, differ
    Database            connections, transaction(), migrate()
    Database state      the clock, the versions given out, and whether the database went back
    Audit               the history of releases and of every act (contract section 2)
    Nodes               the registry of nodes
    Queue               the order of open releases, and the writing of what is decided on one
    Retry and rollback  what a new release brings back to whom (contract 3, rule 10)
    Drift               what each node runs, what it should run, and how far these are apart
                        (contract section 5)
    Counts              the figures of METRICS that are in the database
    Approvals           a release that waits for a second person, and who lets it start
    Releases            create, verbs, lists, payloads, freezes
    History             releases that ended long ago, which prune deletes
    Notifications       the outbox: messages that are still to go (contract section 2)
    Claims              claim, lease, fence, commit
    Overview            what the verdict is made from; the store that all parts make up
  EXECUTION
    Event loop          coroutines that wait for sockets: many in one thread, or one in the
                        caller's
    HTTP wire           heads and bodies read and written, for API and agents alike; and which of
                        many connections may stay
    Dialects            what agents are sent, and how their answers are read (contract section 1)
    Agents              connections to agents, deadlines, requests, probes
    Driver              one claimed release: read, decide, commit, send, collect
    Notifier            what is in the outbox goes to a command or a URL; releases that are
                        stuck
    Executor            scan, claims, leases, the threads
  FACES
    Languages           the sentences that people read, in Chinese, by their form; English where
                        none is known
    Serialization       the JSON of contract section 5, and its schemas
    Access              tokens, client certificates, throttling
    Requests            a checked request, its parameters and its reply; who may read much at a
                        time
    Page                dashboard.html as it is sent, and the headers that go with it
    API                 routes as a table, handlers, /openapi.json (contract section 5); knows
                        no socket
    Server              a request from its first byte to its answer; the listener and its
                        threads
    Check and why       what is wrong with this installation, and what would mend it
    Terminal            how text is shown to a person: columns of characters, tables, colours,
                        times
    Views               a release as a person sees it: its head, a bar for each batch, its nodes,
                        its history; and the screen of watch
    Commands            what each other command does (contract section 4)
    Upkeep commands     what the commands on database, tokens and audit log do, and `check`
    Node commands       what the commands on nodes do, and what is shown of a node
    Service             the processes serve and run-once: signals, the service manager, files
                        that change
    Arguments           what a command takes: the parser and its help, made from a table of
                        commands
    Completion          what the last word of a command line may become, from the table of
                        commands and from the database; and the scripts with which shells ask
                        for that
    Command line        the table of commands, the standard streams, main()

How a release flows through them is drawn in docs/ARCHITECTURE.md.
"""
from __future__ import annotations

# What few commands need is imported where they use it: each of difflib, email, http.client, platform and
# concurrent.futures would add to the start of every command.
import argparse
import base64
import bisect
import codecs
import collections
import contextlib
import dataclasses
import datetime
import errno
import faulthandler
import fcntl
import fnmatch
import functools
import gc
import hashlib
import heapq
import hmac
import http
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pwd
import queue
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
from collections.abc import (
    Collection,
    Coroutine,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
    ValuesView,
)
from pathlib import Path
from typing import (
    Any,
    Callable,
    Generic,
    NamedTuple,
    NoReturn,
    Protocol,
    TextIO,
    TypeVar,
    Union,
    cast,
)

# region Vocabulary
# ======================================================================================
# Vocabulary: the contract's words and numbers, error codes and exceptions.
# Uses: nothing.
# ======================================================================================

__version__ = "0.1.0"

PENDING, RUNNING, PAUSED, CANCELLING = "pending", "running", "paused", "cancelling"
SUCCESS, PARTIAL, FAILED, CANCELLED, SKIPPED = "success", "partial", "failed", "cancelled", "skipped"
RELEASE_STATUSES = (PENDING, RUNNING, PAUSED, CANCELLING, SUCCESS, PARTIAL, FAILED, CANCELLED)
TERMINAL = frozenset((SUCCESS, PARTIAL, FAILED, CANCELLED))
AT_REST = frozenset((SUCCESS, FAILED, SKIPPED))
OPEN = frozenset((PENDING, RUNNING))
# The statuses of releases that are not TERMINAL, for SQL.
OPEN_RELEASES = "('pending', 'running', 'paused', 'cancelling')"

# How somebody acts: the column via of audit_log.
VIA_CLI, VIA_API, VIA_EXECUTOR = "cli", "api", "executor"

# How an executor looks for work: the column kind of executors.
SERVE, TICK = "serve", "tick"

NODE_STATUSES = ("online", "offline", "maintenance")

# Whether a release needs a second person before it starts, "" for no (the column approval of release_tasks): it waits
# for one; one approved it; somebody let it go without; the program made it itself.
WANTED, GIVEN, EMERGENCY, AUTOMATIC = APPROVAL_STATES = ("wanted", "given", "emergency", "automatic")
# Everybody who acts through an API without tokens and client certificates.
ANONYMOUS = "api"
# Between the names of one person, a token's and that of the certificate beside it: 'alice (certificate laptop-7)'.
BESIDE = " (certificate "

# Kinds of notifications (NOTIFY_ON); most have the name of a status.
CREATED, STARTED, STUCK, APPROVAL, TAKEN_OVER, FROZEN = (
    "created", "started", "stuck", "approval", "taken_over", "frozen")
NOTIFY_KINDS = (FAILED, PARTIAL, PAUSED, STUCK, CREATED, STARTED, SUCCESS, CANCELLED, APPROVAL, TAKEN_OVER, FROZEN)
# What became of a try to send one, and of the notification (metrics).
SENT, UNDELIVERED, GIVEN_UP = "sent", "failed", "given_up"

# The event of the end of what FROZEN begins.
UNFROZEN = "unfrozen"

# How far what a node runs is from what it should run (contract section 5).
LEVEL, BEHIND, AHEAD, UNSURE = DRIFTS = ("none", "behind", "ahead", "unknown")
TASKS, EXECUTE = "tasks", "execute"
# Without this key in the payload an execute agent drops all its sites (contract section 1).
WEBSITES = "websites"


class Dialect(NamedTuple):
    """What a decision and a plan know of the agents of a dialect; what they are sent stands in WIRE_FORMATS."""
    # They can be asked for a task. Those that can't may be busy with a request whose answer was lost: a hold follows.
    can_be_asked: bool
    # They drop all their sites where the payload has no list WEBSITES.
    needs_websites: bool


# From agent_protocol to its dialect (contract section 1).
DIALECTS: Mapping[str, Dialect] = {
    TASKS: Dialect(can_be_asked=True, needs_websites=False),
    EXECUTE: Dialect(can_be_asked=False, needs_websites=True),
}
PROTOCOLS = tuple(DIALECTS)

# Operations: a dispatch, a query and a ping go to the agent, a probe to what the node serves (verify).
DISPATCH, QUERY, PROBE, PING = OPERATIONS = "dispatch", "query", "probe", "ping"

UNREACHABLE, TLS, TIMEOUT, HTTP, PROTOCOL = "unreachable", "tls", "timeout", "http", "protocol"
REJECTED, AGENT_FAILED, VERIFY, DEADLINE, ABANDONED = "rejected", "agent_failed", "verify", "deadline", "abandoned"
ERROR_KINDS = (UNREACHABLE, TLS, TIMEOUT, HTTP, PROTOCOL, REJECTED, AGENT_FAILED, VERIFY, DEADLINE, ABANDONED)
# In the message of an execute agent that has a new configuration, and serves the old one.
RELOAD_FAILED = "but reload failed:"
# Of an end that the agent itself told; "" is a success.
BELIEVED_KINDS = ("", REJECTED, AGENT_FAILED, VERIFY)

# Outcomes of a scan for work (metrics).
IDLE, WORKED, BUSY, ERROR = "idle", "worked", "busy", "error"

EXIT_DONE, EXIT_NOT_SUCCESS, EXIT_USAGE, EXIT_STATE, EXIT_UNAVAILABLE, EXIT_BUSY = 0, 1, 2, 3, 69, 75

# Error codes of the API (contract section 5).
NO_TOKEN, BAD_TOKEN, NOT_ALLOWED = 1001, 1002, 1004
MISSING, MALFORMED, INVALID = 2001, 2002, 2003
NOT_FOUND, EXISTS, WRONG_STATE = 3001, 3002, 3003
METHOD_NOT_ALLOWED, REQUEST_TIMEOUT, BODY_TOO_LARGE, ADDRESS_TOO_LONG = 4005, 4008, 4013, 4014
NOT_JSON, TOO_MANY_REQUESTS, HEAD_TOO_LARGE = 4015, 4029, 4031
INTERNAL, DATABASE_DOWN, NO_FREE_CONNECTION, NOT_IMPLEMENTED, UNKNOWN_HTTP_VERSION = 5001, 5002, 5003, 5004, 5005

# HTTP status and exit code of each error code.
ERROR_CODES: Mapping[int, tuple[int, int]] = {
    NO_TOKEN: (401, EXIT_USAGE), BAD_TOKEN: (401, EXIT_USAGE), NOT_ALLOWED: (403, EXIT_STATE),
    MISSING: (400, EXIT_USAGE), MALFORMED: (400, EXIT_USAGE), INVALID: (400, EXIT_USAGE),
    NOT_FOUND: (404, EXIT_STATE), EXISTS: (409, EXIT_STATE), WRONG_STATE: (409, EXIT_STATE),
    METHOD_NOT_ALLOWED: (405, EXIT_USAGE), REQUEST_TIMEOUT: (408, EXIT_UNAVAILABLE),
    BODY_TOO_LARGE: (413, EXIT_USAGE), ADDRESS_TOO_LONG: (414, EXIT_USAGE), NOT_JSON: (415, EXIT_USAGE),
    TOO_MANY_REQUESTS: (429, EXIT_BUSY), HEAD_TOO_LARGE: (431, EXIT_USAGE),
    INTERNAL: (500, EXIT_UNAVAILABLE), DATABASE_DOWN: (503, EXIT_UNAVAILABLE), NO_FREE_CONNECTION: (503, EXIT_BUSY),
    NOT_IMPLEMENTED: (501, EXIT_USAGE), UNKNOWN_HTTP_VERSION: (505, EXIT_USAGE),
}

MAX_VERSION = 2**53
MAX_ID = 2**63 - 1
MAX_MESSAGE_CHARS = 255
MAX_DETAIL_BYTES = 4096
# Length of a row of audit_log in a log line.
MAX_TRAIL_CHARS = 1000
# Size of before, and of after, in a row of audit_log; longer values are replaced by their SHA-256.
MAX_AUDIT_BYTES = 8192
MAX_PAGE_SIZE = 100
MAX_NODES = 1_000_000
MAX_BATCHES = 1000
MAX_JSON_DEPTH = 64
# Digits of an integer in JSON; Python 3.9 and 3.10.0 to 3.10.6 have no limit of their own.
MAX_INTEGER_DIGITS = 4000
# Characters of the name of a node or a token.
MAX_NAME_CHARS = 100
# Labels of a node; characters of a key and of a value.
MAX_LABELS, MAX_LABEL_KEY_CHARS, MAX_LABEL_CHARS = 64, 63, 255

# Wait before the first poll of a running task, and its growth from poll to poll, up to the interval.
FIRST_POLL_S, POLL_GROWTH = 0.05, 1.3
# The share of a thread's time that the answers of one agent may take.
ANSWER_SHARE = 0.01
# Seconds of the clock whose share an agent may take in advance: 0.06 s of CPU, which is hundreds of normal answers, or
# one during which our garbage was collected.
ANSWER_CREDIT_S = 6.0
# Timeout of the first poll: it follows the dispatch at once and delays the report that the task was accepted.
FIRST_POLL_TIMEOUT_S = 1.0
# Shortest and longest wait before a failed request is tried again.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 10.0
# Wait after a connection to an execute agent was cut: it may still be busy (contract section 1).
CUT_BUSY_S = 5.0
# Seconds between successful probes of a node.
PROBE_AGAIN_S = 1.0
# Time in which outcomes are gathered into one commit, while many requests are in flight.
GATHER_S = 0.02
# Longest wait of a clean stop for requests in flight.
STOP_GRACE_S = 5.0
# A thread without a sign of life for this long, beyond its own wait, hangs; longer than the database may take.
HUNG_AFTER_S = 180.0
# Limits of the settings that bound a claim and an execute agent's hold. A stored time further ahead than that
# comes from a clock that was wrong, and counts as over.
MAX_CLAIM_TTL_S, MAX_CONNECT_TIMEOUT_S, MAX_REQUEST_TIMEOUT_S = 3600, 600, 3600
MAX_BUSY_S = float(MAX_CONNECT_TIMEOUT_S + MAX_REQUEST_TIMEOUT_S)
# Versions left out after a failover, which may have lost releases.
VERSIONS_SKIPPED = 1000
# Highest version that a person may name: a slip must not use up all versions.
MAX_NAMED_VERSION = 2**53 - 1_000_000

log = logging.getLogger("releasectl")
# Who acted, and the head of the audit log: serve and run-once log that whatever LOG_LEVEL is.
trail = logging.getLogger("releasectl.trail")

T = TypeVar("T")

# How many times the time of a read its value holds, and for how many seconds at most: see RareRead.
RARE_READ_REST, MAX_RARE_READ_REST_S = 20, 60.0


class AppError(Exception):
    """An error that an operator or a client can cause: one line, and a key of ERROR_CODES."""

    def __init__(self, code: int, message: str, retry_after_s: int = 0, allow: str = ""):
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.allow = allow

    @property
    def http_status(self) -> int:
        return ERROR_CODES[self.code][0]

    @property
    def exit_code(self) -> int:
        return ERROR_CODES[self.code][1]


class ConfigError(AppError):
    """A setting that can't be used."""

    def __init__(self, message: str):
        super().__init__(INVALID, message)


class DatabaseError(AppError):
    """The database refused or is out of reach; a commit may have taken place."""

    def __init__(self, message: str):
        super().__init__(DATABASE_DOWN, message, retry_after_s=2)


class UnstorableValue(AppError):
    """A value that the database can't hold; trying again does not help."""

    def __init__(self, message: str):
        super().__init__(INVALID, message)


class ClaimLost(Exception):
    """The release has another owner now, or none; nothing was written."""


class StateMoved(Exception):
    """The release was changed since it was read; nothing was written. Read again."""


# What follows where more nodes fail than the strategy tolerates (onExceed).
FAIL, PAUSE, ROLLBACK = ON_EXCEED = "fail", "pause", "rollback"

# Roles of the API; ANYONE needs no token.
VIEWER, OPERATOR, ANYONE = "viewer", "operator", ""

# Stands for the newest release where a command takes an id.
LATEST = "latest"


# endregion


# region Helpers
# ======================================================================================
# Helpers: time, one-line text, strict JSON, files; nothing that knows a release.
# Uses: Vocabulary.
# ======================================================================================

class Clock:
    """The two clocks; tests replace it."""

    @staticmethod
    def wall() -> float:
        """Return seconds since 1970, for stored times only."""
        return time.time()

    @staticmethod
    def elapsed() -> float:
        """Return seconds that also count while the machine sleeps, for durations and leases."""
        if hasattr(time, "CLOCK_BOOTTIME"):
            return time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.monotonic()

    @staticmethod
    def boot() -> str:
        """Return an id of the origin of elapsed(); times of different origins can't be compared."""
        return _boot_id()


@functools.lru_cache(maxsize=1)
def _boot_id() -> str:
    with contextlib.suppress(OSError):
        if hasattr(time, "CLOCK_BOOTTIME"):
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return secrets.token_hex(8)  # comparable within this process only


@functools.lru_cache(maxsize=64)  # all rows of one commit have one time
def utc_text(epoch_s: float) -> str:
    """Return seconds since 1970 as RFC 3339 in UTC, with milliseconds and Z (contract section 2)."""
    whole_ms = round(epoch_s * 1000)
    moment = datetime.datetime.fromtimestamp(whole_ms // 1000, datetime.timezone.utc)
    # not %Y: it does not pad the year 999, and stored times are compared as text
    return f"{moment.year:04d}-{moment:%m-%dT%H:%M:%S}.{whole_ms % 1000:03d}Z"


def epoch_of(text: str) -> float:
    """Return an RFC 3339 time as seconds since 1970; raise ValueError for anything else."""
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment.timestamp()


def printable(char: str, keep_lines: bool) -> str:
    """Return a character, or a space where it is not printable; keep_lines: a line feed stays."""
    if keep_lines and char == "\n":
        return char
    # Cc control, Cf format (bidi overrides), Cs lone surrogate, Zl and Zp line separators
    return " " if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char


def one_line(text: object, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    """Return any text as one printable line of at most max_chars characters (contract section 3)."""
    # an agent's text may be long: examine only what can be part of the result
    line = str(text)[: 16 * max_chars]
    if not line.isprintable():
        line = "".join(printable(c, False) for c in line)
    line = " ".join(line.split())
    return line if len(line) <= max_chars else line[: max_chars - 3].rstrip() + "..."


def is_utf8(text: str) -> bool:
    """Return whether a text from outside was UTF-8; other bytes become lone surrogates (PEP 383)."""
    return not re.search("[\ud800-\udfff]", text)


def detail_text(text: object) -> str:
    """Return any text as an event's detail: printable, lines kept, at most 4 KiB of UTF-8."""
    clean = "".join(printable(c, True) for c in str(text)[:MAX_DETAIL_BYTES]).strip()
    return clean.encode()[:MAX_DETAIL_BYTES].decode(errors="ignore")


# Invisible characters outside category Cf: grapheme joiner, Hangul fillers, Khmer inherent vowels, variation
# selectors, the Khitan filler, the empty note head, the empty Braille pattern.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                       "\U00016fe4\U0001d159\U000e0100-\U000e01ef]")
_LOOK_ALIKE_SCRIPTS = frozenset(("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "CHEROKEE", "COPTIC", "LISU"))
# Other hyphens, minus signs, dots and underscores than those of ASCII.
_LOOK_ALIKE_MARKS = re.compile("[\u02d7\u06d4\u2010-\u2013\u2024\u2043\u2212\u2796\ufe4d-\ufe4f\ufe52\ufe58\ufe63"
                               "\uff0d\uff0e\uff3f]")
# What is_plain() accepts, for error messages.
PLAIN_TEXT = ("printable characters, none of them invisible, changing the direction or a double of an ASCII one, no "
              "space around, composed form (NFC), no word that mixes Latin letters with Greek or Cyrillic ones")


def is_plain(text: str) -> bool:
    """Return whether a text is PLAIN_TEXT, so that no two different ones look the same."""
    if not text.isprintable() or one_line(text, len(text) + 1) != text:
        return False
    if text.isascii():
        return True
    # accents are no letters, and do not separate words
    letters = "".join(char for char in text if not unicodedata.category(char).startswith("M"))
    return (not INVISIBLE.search(text) and not _LOOK_ALIKE_MARKS.search(text) and not any(map(_is_double, text))
            and unicodedata.is_normalized("NFC", text)
            and all(len(scripts_of(word)) < 2 for word in re.findall(r"[^\W_]+", letters)))


def _is_double(char: str) -> bool:
    """Return whether a letter or digit is another form of an ASCII one: full width, mathematical, Roman, a ligature."""
    is_word = unicodedata.category(char)[0] == "L" or unicodedata.category(char) in ("Nd", "Nl")
    return not char.isascii() and is_word and unicodedata.normalize("NFKC", char).isascii()


def scripts_of(word: str) -> set[str]:
    """Return those scripts of a word that have letters which look alike."""
    return {unicodedata.name(char, "").split(" ")[0] for char in word} & _LOOK_ALIKE_SCRIPTS


def visible(text: str, in_ascii: bool = False) -> str:
    """Return JSON with an escape for each character that can't be seen.

    in_ascii: for all that are not ASCII, as where the text is not in composed form (NFC).
    """
    if text.isascii() and text.isprintable():
        return text
    in_ascii = in_ascii or not unicodedata.is_normalized("NFC", text)
    return "".join(char if char.isprintable() and (char.isascii() or not (in_ascii or INVISIBLE.match(char)))
                   else json.dumps(char)[1:-1] for char in text)


def in_words(items: Sequence[T], most: int = 20, between: str = ", ", text: Callable[[T], str] = str) -> str:
    """Return '1, 5, 44', of a longer list than most only the beginning: '1, 5, 44 and 2 more'."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(map(text, items[:most])) + more


def by_whom(actor: str) -> str:
    """Return ' by anna', "" for nobody and where nobody signs in: then it is not known who it was."""
    return "" if actor in ("", ANONYMOUS) else f" by {actor}"


# Keys of the API that a sentence names with the option that says the same: overNewer (--over-newer).
_KEY_AND_OPTION = re.compile(r"\b(?:acceptFailures|duringFreeze|emergency|overNewer|supersede|toRelease) "
                             r"\(((?:--|releasectl )[^()]*)\)")


def with_options(text: str) -> str:
    """Return a sentence for the command line, with options alone where it names keys of the API beside them."""
    return _KEY_AND_OPTION.sub(r"\1", text)


def in_order_of_numbers(text: str) -> list[Any]:
    """Return a key by which edge-2 comes before edge-10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split("([0-9]+)", text))]


def epoch_or(text: str | None, otherwise: float) -> float:
    """Return a stored time as seconds since 1970, or otherwise where it is missing or unreadable."""
    try:
        return epoch_of(text) if text else otherwise
    except ValueError:  # written by hand
        return otherwise


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {one_line(twice, 60)!r} stands twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _bounded_integer(digits: str) -> int:
    """Return an integer; raise ValueError for one that is too long, as int() takes quadratic time."""
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"{one_line(digits, 40)} is too long a number: at most {MAX_INTEGER_DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0:  # 1e999
        raise ValueError(f"{one_line(digits, 40)} is too large a number")
    return number


class Number:
    """A number of JSON as it was written: 1.10 is another one than 1.1, and both go out as they came in."""
    __slots__ = ("text",)

    def __init__(self, text: str):
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Number) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return self.text

    @property
    def value(self) -> float:
        """Return the number that Python computes with; -0 is an integer."""
        return float(self.text) if set(self.text) & set(".eE") else int(self.text)


def _exact_float(digits: str) -> float | Number:
    number = _finite(digits)
    return number if repr(number) == digits and number else Number(digits)  # to Python -0.0 and 0.0 are equal


def _exact_integer(digits: str) -> int | Number:
    return Number(digits) if digits == "-0" else _bounded_integer(digits)


def plain_numbers(value: Any) -> Any:
    """Return a value of parse_json(exact=True) as parse_json() gives it."""
    if isinstance(value, dict):
        return {key: plain_numbers(member) for key, member in value.items()}
    if isinstance(value, list):
        return [plain_numbers(member) for member in value]
    return value.value if isinstance(value, Number) else value


# A string of ours that stands for a number in what an encoder gives: no text that parse_json() lets in has a surrogate.
_NUMBER_MARK, _MARKED_NUMBER = "\ud800", re.compile(r'"(?:\ud800|\\ud800)(-?[0-9][0-9.eE+-]*)"')


def _mark_number(value: object) -> str:
    if isinstance(value, Number):
        return _NUMBER_MARK + value.text
    raise TypeError(f"{type(value).__name__} is not JSON")


def _encoded(encoder: json.JSONEncoder, value: object) -> str:
    """Return JSON with numbers as they were written; the encoder in C would write its own digits."""
    text = encoder.encode(value)
    has_marks = _NUMBER_MARK in text or (encoder.ensure_ascii and '"\\ud800' in text)
    return _MARKED_NUMBER.sub(r"\1", text) if has_marks else text


def _nesting(value: object) -> int:
    """Return the depth of a JSON value; not recursive."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
    return depth


# Made once: json.loads() with hooks makes a decoder for each text, which takes longer than to read a short one.
_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite,
                            parse_int=_bounded_integer)
_EXACT_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant,
                                  parse_float=_exact_float, parse_int=_exact_integer)
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_mark_number)
_INDENTED_ENCODER = json.JSONEncoder(ensure_ascii=False, indent=2, default=_mark_number)
_CANONICAL_ENCODER = json.JSONEncoder(sort_keys=True, default=_mark_number)


def parse_json(data: bytes | str, exact: bool = False) -> Any:
    """Return the value of strict JSON; raise ValueError unless it is UTF-8, bounded, without duplicate keys and NaN.

    exact: with a Number for whatever Python would write with other digits.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = (_EXACT_DECODER if exact else _DECODER).decode(text)
        if "\\u" in text:  # an escape may be a lone surrogate, which can't be stored
            json.dumps(value, ensure_ascii=False, default=repr).encode()
        elif not isinstance(data, bytes):
            text.encode()  # the same, where it is not escaped
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _nesting(value) > MAX_JSON_DEPTH:
        raise ValueError("nested too deep")
    return value


def stored_json(text: str) -> Any:
    """Return a stored object; {} for one that can't be read: a person wrote it."""
    try:
        return parse_json(text)
    except ValueError:
        return {}


def read_json(data: bytes | str, what: str, exact: bool = False) -> Any:
    """Return the value of a JSON text that a person or a client gave; raise AppError 2002 that names it."""
    try:
        return parse_json(data, exact)
    except ValueError as error:
        raise AppError(MALFORMED, f"{what} is not JSON: {one_line(error, 150)}") from None


def to_json(value: object) -> str:
    """Return a value as compact JSON on one line."""
    return _encoded(_ENCODER, value)


def indented_json(value: object) -> str:
    """Return a value as JSON for people."""
    return _encoded(_INDENTED_ENCODER, value)


def canonical_json(value: object) -> str:
    """Return what is equal for two values that differ by the order of keys at most (docs/SECURITY.md)."""
    return _encoded(_CANONICAL_ENCODER, value)


class Range(NamedTuple):
    """The integers, or with kind float the numbers, from low to high: parsers and JSON Schema."""
    low: float
    high: float
    kind: type = int

    def from_text(self, text: str) -> Any:
        """Return the number in a text; raise ValueError saying what it must be."""
        pattern = r"[0-9]{1,19}" if self.kind is int else r"[0-9]{1,9}(\.[0-9]{1,9})?"
        return self.from_json(self.kind(text) if re.fullmatch(pattern, text) else None)

    def argument(self, text: str) -> Any:
        """Return from_text() for argparse; raise argparse.ArgumentTypeError."""
        try:
            return self.from_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from None

    def from_json(self, value: Any) -> Any:
        """Return a JSON number; raise ValueError saying what it must be."""
        is_number = isinstance(value, (int, self.kind)) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            what = "whole number" if self.kind is int else "number"
            raise ValueError(f"must be a {what} from {self.low} to {self.high}")
        return self.kind(value)

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "integer" if self.kind is int else "number", "minimum": self.low, "maximum": self.high}

    @property
    def json(self) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        """Return parser and JSON Schema, for a table of keys."""
        return self.from_json, self.schema


PORTS = Range(1, 65535)
IDS = Range(1, MAX_ID)
# Ids after which a list begins.
AFTER_IDS = Range(0, MAX_ID)
PAGES, PAGE_SIZES = Range(1, 10**9), Range(1, MAX_PAGE_SIZE)
# Versions that a person may name.
NAMED_VERSIONS = Range(1, MAX_NAMED_VERSION)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' where a known word is similar, else ''."""
    import difflib

    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def close_quietly(connection: Any) -> None:
    with contextlib.suppress(Exception):  # a broken connection may refuse even that, or there is None
        connection.close()


def os_reason(error: Exception) -> str:
    """Return the system's text for an error, without number and file name."""
    if isinstance(error, UnicodeError):
        return "not UTF-8"
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else one_line(error)


def sync_folder(folder: str) -> None:
    """Write the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inode_of(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def network_of(host: str) -> str:
    """Return what counts as one address: an IPv4 address, or the /64 network of an IPv6 address."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def wide_network_of(address: str) -> str:
    """Return the network around a result of network_of(): /24 for IPv4, /48 for IPv6."""
    network = ipaddress.ip_network(address)
    return str(network.supernet(new_prefix=24 if network.version == 4 else 48))


def _link_or_reserve(temporary: str, path: str) -> None:
    """Give a file a name that is free; raise FileExistsError for one that is not, also since a moment ago."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: FAT, some network file systems
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(temporary, path)


@contextlib.contextmanager
def whole_file(path: str, mode: int, is_new: bool) -> Iterator[tuple[int, str]]:
    """Yield a descriptor and the name of an empty file, which is given its path when it is complete and on the disk.

    mode: whatever the umask. is_new: raise FileExistsError where the path is taken by then; else replace it. After an
    error nothing is left.
    """
    folder = os.path.dirname(path) or os.curdir
    descriptor, temporary = tempfile.mkstemp(prefix=".releasectl-", dir=folder)
    try:
        os.fchmod(descriptor, mode)
        yield descriptor, temporary
        os.fsync(descriptor)
        if is_new:
            _link_or_reserve(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):  # it was renamed
            os.unlink(temporary)
    sync_folder(folder)


def replace_file(path: str, text: str, before: os.stat_result | None, mode: int = 0o600) -> None:
    """Replace a file atomically, with owner, group and mode of before; mode is that of a new file.

    A symbolic link stays: the file that it leads to is replaced.
    """
    path = os.path.realpath(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file")  # a device, say, which a rename would remove
    with whole_file(path, stat.S_IMODE(before.st_mode) if before else mode, is_new=False) as (descriptor, _):
        if before:
            os.fchown(descriptor, before.st_uid, before.st_gid)
        with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
            file.write(text)


def read_lines(path: str, name: str) -> list[str]:
    """Return the lines of a file of settings, which messages call by a name; raise ConfigError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{name} {path} can't be read: {os_reason(error)}") from None


def is_closed(path: str) -> bool:
    """Return whether a file is there and this user may not read it."""
    try:
        open(path, "rb").close()
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def read_text(path: str) -> str:
    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise AppError(MALFORMED, f"{path} can't be read: {os_reason(error)}") from None


def parse_duration(text: str) -> float:
    """Return 90, 90s, 5m, 2h, 1d or 1w in seconds; raise argparse.ArgumentTypeError else."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhdw]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time like 90, 90s, 5m, 2h or 1d")
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]
    return int(seconds) if seconds == int(seconds) else seconds


class RareRead(Generic[T]):
    """A value that takes long to read: read anew when RARE_READ_REST times the time of the last read is over."""

    def __init__(self, read: Callable[..., T]):
        self._read = read
        self._guard = threading.Lock()
        # The value, the key that it was read with, and when, by time.monotonic().
        self._last: tuple[T, object, float] | None = None
        # By time.monotonic().
        self._holds_until = 0.0

    def get(self, *arguments: object, key: object = None) -> T:
        """Return the value, which may be as old as that, a minute at most; raise what the read raises.

        arguments: of the read. key: read anew where it is another one than at the last read. While one caller reads it
        anew, others with the same key get it as it was, if that is not a minute old.
        """
        last, now = self._last, time.monotonic()
        if last is not None and last[1] == key:
            if now < self._holds_until:
                return last[0]
            is_young = now - last[2] < MAX_RARE_READ_REST_S
            if not self._guard.acquire(blocking=not is_young):
                return last[0]
        else:
            self._guard.acquire()
        try:
            if self._last is None or key != self._last[1] or time.monotonic() >= self._holds_until:
                began = time.monotonic()
                self._last = self._read(*arguments), key, began
                rest_s = RARE_READ_REST * (time.monotonic() - began)
                self._holds_until = time.monotonic() + min(rest_s, MAX_RARE_READ_REST_S)
            return self._last[0]
        finally:
            self._guard.release()


# endregion


# region Settings
# ======================================================================================
# Settings: one table of the configuration (contract section 6).
# Uses: Vocabulary, Helpers.
# ======================================================================================

# Where the settings' file lies when nothing names one, and the variable that names one.
DEFAULT_CONFIG, CONFIG_VARIABLE = "/etc/releasectl/releasectl.conf", "RELEASECTL_CONFIG"


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


def _path(text: str) -> str:
    return text


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError("must be " + " or ".join(words))
        return text
    return parse


def _database_url(text: str) -> str:
    if text.startswith("sqlite:///:memory:") or text.startswith("sqlite:///file:"):
        raise ValueError("a database in memory is gone with its process: name a file")
    if text.startswith("sqlite:///") and len(text) > len("sqlite:///"):
        return text
    if text.startswith(("postgresql://", "postgres://")):
        parse_postgres_url(text)
        return text
    raise ValueError("must be sqlite:///FILE, sqlite:////ABSOLUTE/FILE or postgresql://USER@HOST/NAME")


class PostgresUrl(NamedTuple):
    """The decoded parts of a postgresql:// URL."""
    user: str
    password: str
    # Each with its port.
    hosts: tuple[tuple[str, int], ...]
    name: str
    # Options of libpq.
    query: Mapping[str, str]


# As libpq reads it: user and password end at the first "@" if no "/" comes before it, and may hold "?" and "#".
_POSTGRES_URL = re.compile(r"postgres(?:ql)?://(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?"
                           r"(?P<hosts>[^@/?#]*)(?:/(?P<name>[^@/?#]*))?(?:\?(?P<query>[^@#]*))?")
_POSTGRES_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%25[^\[\]:]+)?\]|[^\[\]:]*)(?::([0-9]{1,5})?)?")


def parse_postgres_url(url: str) -> PostgresUrl:
    """Return the parts of a URL that all drivers read alike; raise a ValueError that quotes no part of it."""
    match = _POSTGRES_URL.fullmatch(url)
    hosts = [_POSTGRES_HOST.fullmatch(host) for host in match["hosts"].split(",")] if match else []
    is_whole = match and all(h and int(h[2] or 0) <= PORTS.high for h in hosts) and not re.search(r"\s|[^ -~]", url)
    options = [pair.partition("=") for pair in (match["query"] or "").split("&") if pair] if match else []
    if not (match and is_whole and all(re.fullmatch(r"[a-z_]+", key) and equals for key, equals, _ in options)):
        raise ValueError("it does not read as postgresql://USER:PASSWORD@HOST:PORT/NAME?OPTION=VALUE: percent-encode "
                         "special characters (@ is %40, / is %2F, a space is %20)")
    return PostgresUrl(_percent_decoded(match["user"] or ""), _percent_decoded(match["password"] or ""),
                       tuple((_percent_decoded(h[1].strip("[]")), int(h[2] or 5432)) for h in hosts if h),
                       _percent_decoded(match["name"] or ""), {key: _percent_decoded(v) for key, _, v in options})


def _percent_decoded(text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})|%00", text):
        raise ValueError("a % without two hex digits behind it, or %00, stands in it: percent-encode a % as %25")
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("what is percent-encoded in it is not UTF-8") from None


def _host_port(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:]*):([0-9]{1,5})", text)
    if not match or int(match[2]) > PORTS.high:
        raise ValueError("must be ADDRESS:PORT, or [ADDRESS]:PORT for IPv6")
    return match[1].strip("[]") or "0.0.0.0", int(match[2])


def _public_url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if text and not (re.fullmatch(r"https?://[!-~]+", text) and parts.hostname and "@" not in parts.netloc
                     and not parts.query and not parts.fragment):
        raise ValueError("must be the page's address, as https://HOST or https://HOST/PATH")
    return text.rstrip("/")


def _receiver_url(text: str) -> str:
    is_url = is_local = False
    with contextlib.suppress(ValueError):  # whose text may quote a part of it
        parts = urllib.parse.urlsplit(text)
        is_url = bool(re.fullmatch(r"""https?://[!#-&(-;=?-\[\]-~]+""", text)  # printable ASCII without " ' < > \
                      and parts.hostname and parts.port != 0 and not parts.fragment)
        is_local = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
    if text and not is_url:
        raise ValueError("must be https://HOST:PORT/PATH; quotes, <, >, \\ and what is not ASCII are percent-encoded")
    if text.startswith("http:") and not is_local:
        raise ValueError("must begin with https:// (http:// is for loopback: another program on this host)")
    return text


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError:
        raise ValueError("a quote in it is not closed") from None


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(filter(None, re.split(r"[,\s]+", text)))
    for kind in kinds:
        if kind not in NOTIFY_KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(NOTIFY_KINDS)}{did_you_mean(kind, NOTIFY_KINDS)}")
    return kinds


# Settings that may hold a secret anywhere: a value that can't be used is not quoted.
_SECRET = (_receiver_url, _words)


def without_url_secrets(text: str) -> str:
    """Return a text with nothing but scheme, host and port of the URLs in it: the rest may be a secret."""
    return re.sub(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/?#\"'<>]*@)?([^\s/?#\"'<>]*)([/?#][^\s\"'<>]*)?",
                  lambda match: f"{match[1]}{match[2]}/***" if match[3] else match[1] + match[2], text)


def safe_url(url: str) -> str:
    """Return a text without the passwords of database URLs in it, mistyped ones too.

    By patterns, as a parser would fail at a mistyped one; in doubt they hide too much.
    """
    # password=... in a URL, up to its next option, as a password may hold "&" or a space
    url = re.sub(r"([?&]\w*pass(?:word|wd)?=)(?:[^&]|&(?![a-z_]+=))*", r"\1***", url, flags=re.IGNORECASE)
    # the same in a connection string of libpq
    url = re.sub(r"((?:pass|password|passwd)\s*=\s*)(?!\*\*\*)('(?:[^'\\]|\\.)*'?|\S*(?:\s+(?![a-z_]+\s*=)\S+)*)",
                 r"\1***", url, flags=re.IGNORECASE)
    # from the colon after the user to the last @, also where the colon of the scheme is missing
    url = re.sub(r"(//[^:@\s]*|(?<!\S)[^:/@\s]+(?=:(?!//|\s))):[\s\S]*@", r"\1:***@", url)
    # from the colon on where no @ follows, unless that is a port
    return re.sub(r"(postgres(?:ql)?://[^:@\[\s]*:)(?!\*\*\*@|[0-9]{0,5}(?:[/?,]|\s|$))\S*", r"\1***", url)


class Setting(NamedTuple):
    """A setting; its field in Settings has its name in lower case."""
    name: str
    default: str
    parse: Callable[[str], Any]
    help: str


def _setting(default: str, parse: Range | Callable[[str], Any], help_text: str) -> Any:
    parser = parse.from_text if isinstance(parse, Range) else parse
    return dataclasses.field(metadata={"setting": (default, parser, help_text)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The configuration of a process: default, parser and help of each setting."""
    database_url: str = _setting("sqlite:///releasectl.db", _database_url, "sqlite:///FILE or postgresql://...")
    database_url_file: str = _setting("", _path, "a file that holds it, so that the password is in no environment")
    http_addr: tuple[str, int] = _setting("127.0.0.1:8080", _host_port, "address and port of the API")
    http_plain: bool = _setting("0", _switch, "1: tokens over plain HTTP beyond loopback, behind a TLS proxy")
    http_cert: str = _setting("", _path, "certificate of the API (with HTTP_KEY: HTTPS)")
    http_key: str = _setting("", _path, "key of the API's certificate")
    http_client_ca: str = _setting("", _path, "CA: client certificates are demanded, and name who acts")
    http_max_connections: int = _setting("128", Range(4, 1024), "connections to the API at a time")
    http_max_connections_per_address: int = _setting("32", Range(1, 1024), "of these, from one address")
    http_max_body_bytes: int = _setting("1048576", Range(1024, 16 << 20), "largest body of a request")
    api_tokens_file: str = _setting("", _path, "one name:role:sha256-of-token[:expires=DATE][:targets=cdn,dns] a line")
    release_executor_enabled: bool = _setting("1", _switch, "0: nothing is dispatched")
    release_executor_interval_sec: float = _setting("2", Range(0.1, 60, float), "seconds between scans for work")
    mtls_enabled: bool = _setting("1", _switch, "0: plain HTTP to agents, for a laboratory")
    control_cert: str = _setting("", _path, "our client certificate for the agents")
    control_key: str = _setting("", _path, "its key")
    control_ca: str = _setting("", _path, "the CA that signed the agents' certificates")
    agent_tls_server_name: str = _setting("", str, "verify this name, not the dialled address")
    agent_concurrency: int = _setting("64", Range(1, 1024), "requests to agents in flight")
    agent_connect_timeout_sec: float = _setting(
        "15", Range(0.1, MAX_CONNECT_TIMEOUT_S, float), "seconds for TCP and TLS")
    agent_request_timeout_sec: float = _setting(
        "60", Range(0.1, MAX_REQUEST_TIMEOUT_S, float), "seconds for a request and its answer")
    agent_retries: int = _setting("2", Range(0, 100), "tries after the first")
    node_deadline_sec: float = _setting("600", Range(1, 604800, float), "seconds from a node's dispatch to its end")
    claim_ttl_sec: float = _setting(
        "30", Range(1, MAX_CLAIM_TTL_S, float), "seconds that a silent process keeps a release")
    approvals: bool = _setting("0", _switch, "1: a release starts when somebody else than its author has approved it")
    public_url: str = _setting("", _public_url, "where people reach the page: for links in notifications")
    notify_command: tuple[str, ...] = _setting("", _words, "a program that gets each notification on standard input")
    notify_url: str = _setting("", _receiver_url, "where each notification is sent to by POST")
    notify_secret_file: str = _setting("", _path, "a file with the secret that signs these (HMAC-SHA256)")
    notify_ca: str = _setting("", _path, "the CA that signed the certificate of NOTIFY_URL; else the system's")
    notify_on: tuple[str, ...] = _setting("failed,partial,paused,stuck", _kinds, "kinds of notifications")
    log_format: str = _setting("text", _one_of("text", "json"), "text or json")
    log_level: str = _setting("info", _one_of("debug", "info", "warning"), "debug: single nodes too")

    @property
    def notify_kinds(self) -> frozenset[str]:
        """Return the kinds of notifications that somebody is to get, none without a receiver."""
        return frozenset(self.notify_on if self.notify_command or self.notify_url else ())

    @classmethod
    def load(cls, environ: Mapping[str, str], config_file: str = "", database_url: str = "") -> Settings:
        """Return the settings of the environment, else of config_file; database_url (--db) overrides both.

        Raise ConfigError naming the value that can't be used and what would do.
        """
        given = {name: text for name, (text, _) in given_settings(environ, config_file, database_url).items()}
        if given.get("DATABASE_URL", "").strip() and given.get("DATABASE_URL_FILE", "").strip():
            raise ConfigError("DATABASE_URL and DATABASE_URL_FILE are both set: set one of them")
        if given.get("DATABASE_URL_FILE", "").strip():
            given["DATABASE_URL"] = read_secret_file("DATABASE_URL_FILE", given["DATABASE_URL_FILE"].strip(),
                                                     "a URL as for DATABASE_URL, and nothing else")
        values = {}
        for setting in SETTINGS:
            text = given.get(setting.name, setting.default).strip()
            try:
                if setting.parse not in (_path, _database_url) and not is_utf8(text):
                    raise ValueError("must be UTF-8")
                values[setting.name.lower()] = setting.parse(text or setting.default)
            except ValueError as error:
                file = given.get("DATABASE_URL_FILE", "").strip() if setting.name == "DATABASE_URL" else ""
                if file:  # nothing of its content: that may be the password alone, or another secret
                    raise ConfigError(f"DATABASE_URL_FILE={file}: what it holds can't be used: {error}") from None
                shown = "***" if setting.parse in _SECRET else one_line(safe_url(text), 80)
                raise ConfigError(f"{setting.name}={shown} can't be used: {error}") from None
        settings = cls(**values)
        if bool(settings.http_cert) != bool(settings.http_key):
            raise ConfigError("HTTP_CERT and HTTP_KEY go together: set both or neither")
        if settings.http_client_ca and not settings.http_cert:
            raise ConfigError("HTTP_CLIENT_CA needs HTTP_CERT and HTTP_KEY")
        return settings


SETTINGS = tuple(Setting(field.name.upper(), *field.metadata["setting"]) for field in dataclasses.fields(Settings))


def find_config(environ: Mapping[str, str], named: str = "") -> str:
    """Return the path of the settings' file, "" for none: named (--config), RELEASECTL_CONFIG, or DEFAULT_CONFIG.

    Raise ConfigError where nobody can tell whether DEFAULT_CONFIG is there: without it another database would be meant.
    """
    if named or environ.get(CONFIG_VARIABLE):
        return named or environ[CONFIG_VARIABLE]
    try:
        os.stat(DEFAULT_CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise ConfigError(f"{DEFAULT_CONFIG} can't be read: {os_reason(error)}: use sudo, or name another file with "
                          f"--config or {CONFIG_VARIABLE}") from None
    return DEFAULT_CONFIG


class Given(NamedTuple):
    """The text of a setting that somebody gave, and where."""
    text: str
    source: str


def given_settings(environ: Mapping[str, str], config_file: str = "", database_url: str = "") -> dict[str, Given]:
    """Return the settings that are given, by name; of several sources that give one the strongest."""
    given: dict[str, Given] = {}
    for source, texts in ((config_file, dict(read_config_file(config_file)) if config_file else {}),
                          ("the environment", {s.name: environ[s.name] for s in SETTINGS if s.name in environ}),
                          ("--db", {"DATABASE_URL": database_url} if database_url else {})):
        if texts.get("DATABASE_URL", "").strip() or texts.get("DATABASE_URL_FILE", "").strip():
            # they are one setting: either of them overrides both of a weaker source
            given = {name: one for name, one in given.items() if not name.startswith("DATABASE_URL")}
        given.update((name, Given(text, source)) for name, text in texts.items())
    return given


def read_secret_file(name: str, path: str, content: str) -> str:
    """Return the one line of a file that a setting names; raise a ConfigError that quotes no part of it."""
    try:
        mode = os.stat(path).st_mode
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{name}={path} can't be read: {os_reason(error)}") from None
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"{name}={path} is open to others: chmod o-rwx,g-w it (its group may read it)")
    if not text or not text.isprintable():
        raise ConfigError(f"{name}={path} must hold one line: {content}")
    return text


def read_config_file(path: str) -> Iterator[tuple[str, str]]:
    names = [s.name for s in SETTINGS]
    seen = set()
    for number, line in enumerate(read_lines(path, "the settings' file"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name, value = name.strip(), value.strip()
        if not equals:
            raise ConfigError(f"{path}:{number}: not KEY=VALUE")
        if name not in names:
            raise ConfigError(f"{path}:{number}: {one_line(name, 60)} is not a setting{did_you_mean(name, names)}")
        if name in seen:
            raise ConfigError(f"{path}:{number}: {name} is set twice")
        is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        if not is_quoted and re.search(r"(^|\s)#", value):
            raise ConfigError(f"{path}:{number}: {name}: put the comment on a line of its own "
                              "(or the whole value in quotes, if # belongs to it)")
        if not value.isprintable():
            raise ConfigError(f"{path}:{number}: {name} holds a control character")
        seen.add(name)
        if is_quoted:
            value = value[1:-1]
        yield name, value


def read_beside(file: Path) -> str:
    """Return the text of a file that is shipped with this one; raise ConfigError when it can't be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{file} can't be read ({os_reason(error)}): it belongs beside releasectl.py") from None


# endregion


# region Log and metrics
# ======================================================================================
# Log and metrics: formatters of the log, the figures of /metrics.
# Uses: Vocabulary, Helpers, Settings.
# ======================================================================================

class Outage:
    """An error that lasts: a line when it begins or changes, and one when it is over, not one for each try."""

    def __init__(self, subject: object, level: int = logging.ERROR, extra: dict[str, Any] | None = None):
        """subject: what the lines begin with."""
        self._subject, self._level, self._extra = subject, level, extra
        self._guard = threading.Lock()
        # "" while all is well.
        self.error = ""

    def log(self, error: object) -> None:
        """Log an error unless it is the one that lasts already."""
        text = str(error)
        with self._guard:
            is_new, self.error = text != self.error, text
        if is_new:
            log.log(self._level, "%s: %s", self._subject, text, extra=self._extra)

    def end(self) -> None:
        """Note that the error is over, in a line if there was one."""
        with self._guard:
            text, self.error = self.error, ""
        if text:
            log.info("%s: mended: %s", self._subject, text, extra=self._extra)


GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

# Values by the name of the metric and the values of its labels.
Figures = Mapping[tuple[str, ...], float]


class Metric(NamedTuple):
    """A metric of /metrics."""
    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    # All values of each label, if they are known in advance.
    values: tuple[tuple[str, ...], ...] = ()
    # Upper bounds of a histogram's buckets.
    buckets_s: tuple[float, ...] = ()


# No label holds an id or a node's name: the number of series must not grow with use.
METRICS: tuple[Metric, ...] = (
    Metric("releasectl_build_info", GAUGE, "Version of releasectl and of its Python, always 1.", ("version", "python")),
    Metric("releasectl_database_up", GAUGE, "Whether the database answers this request (1), or not (0)."),
    Metric("releasectl_database_errors_total", COUNTER, "Transactions that failed at the database."),
    Metric("releasectl_database_went_back_total", COUNTER,
           "How often the database was in an earlier state than this process had seen before: a restore, or a "
           "failover that lost commits."),
    Metric("releasectl_releases", GAUGE, "Releases in the database.", ("target", "status")),
    Metric("releasectl_release_nodes", GAUGE, "Nodes of the active releases.", ("target", "status")),
    Metric("releasectl_release_last_event_timestamp_seconds", GAUGE,
           "Last change of the status of an active release or of one of its nodes.", ("target", "status")),
    Metric("releasectl_nodes", GAUGE, "Enabled nodes.", ("status",)),
    Metric("releasectl_nodes_drift", GAUGE, "Enabled nodes by how far what they run is from what they should run.",
           ("drift",)),
    Metric("releasectl_notifications_waiting", GAUGE, "Notifications that are still to go."),
    Metric("releasectl_notifications_oldest_age_seconds", GAUGE, "Age of the oldest of these, 0 for none."),
    Metric("releasectl_notifications_total", COUNTER,
           "Tries to send a notification to a receiver, by outcome; and notifications given up after a day.",
           ("outcome",), ((SENT, UNDELIVERED, GIVEN_UP),)),
    Metric("releasectl_frozen", GAUGE, "Whether everything is frozen (1), or not (0)."),
    Metric("releasectl_target_frozen", GAUGE,
           "Whether a target is frozen (1), by itself or with everything, or not (0).", ("target",)),
    Metric("releasectl_ticks_total", COUNTER, "Scans for work, by outcome.", ("outcome",),
           ((IDLE, WORKED, BUSY, ERROR),)),
    Metric("releasectl_last_tick_timestamp_seconds", GAUGE,
           "Last scan for work without an error, 0 for none yet. Only where the executor is enabled."),
    Metric("releasectl_takeovers_total", COUNTER, "Releases taken over from a process whose claim had expired."),
    Metric("releasectl_node_failures_total", COUNTER, "Nodes that failed in a release.", ("error_kind",),
           (ERROR_KINDS,)),
    Metric("releasectl_agent_requests_total", COUNTER, "Requests to agents and probes of nodes, by outcome.",
           ("operation", "outcome"), (OPERATIONS, (SUCCESS, *ERROR_KINDS[:-2]))),
    # an agent answers within milliseconds, or works for a minute
    Metric("releasectl_agent_request_duration_seconds", HISTOGRAM, "Duration of these, including connecting.",
           ("operation",), buckets_s=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)),
    Metric("releasectl_node_duration_seconds", HISTOGRAM,
           "Time from the first dispatch to a node of a release to its end.", ("status",),
           buckets_s=(0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)),
    Metric("releasectl_release_duration_seconds", HISTOGRAM,
           "Time from the start of a release to its end, with its soaks and pauses.", ("status",),
           buckets_s=(1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0, 86400.0, 604800.0)),
    Metric("releasectl_api_requests_total", COUNTER, "Requests that the API answered.", ("route", "method", "status")),
    Metric("releasectl_certificate_expiry_timestamp_seconds", GAUGE,
           "Expiry of a certificate; of several in a file, the first expiry.", ("certificate",)),
    Metric("releasectl_token_expiry_timestamp_seconds", GAUGE,
           "When a token of the API expires; no line for one that never does.", ("token",)),
    Metric("process_start_time_seconds", GAUGE, "Start time of the process."),
    Metric("process_cpu_seconds_total", COUNTER, "User and system CPU time."),
    Metric("process_resident_memory_bytes", GAUGE, "Resident memory."),
    Metric("process_open_fds", GAUGE, "Open file descriptors."),
    Metric("process_threads", GAUGE, "Threads."),
)
_BUCKETS_S = {metric.name: metric.buckets_s for metric in METRICS}


class Metrics:
    """The metrics of this process; thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        # a counter whose label values are known starts at 0, so that its first event shows as an increase
        self._figures: dict[tuple[str, ...], float] = {
            (m.name, *values): 0.0 for m in METRICS if m.kind == COUNTER and m.name.startswith("releasectl_")
            and len(m.values) == len(m.labels) for values in itertools.product(*m.values)}
        # Of each histogram: its buckets, the one above them, and the sum.
        self._times: dict[tuple[str, ...], list[float]] = {}

    def count(self, name: str, *labels: str) -> None:
        """Add one to a counter."""
        key = (name, *labels)
        with self._guard:
            self._figures[key] = self._figures.get(key, 0.0) + 1.0

    def put(self, name: str, figure: float, *labels: str) -> None:
        """Set a gauge."""
        key = (name, *labels)
        with self._guard:
            self._figures[key] = figure

    def count_request(self, operation: str, outcome: str, since: float) -> None:
        """Count a request to an agent that began at since (time.monotonic())."""
        self.count("releasectl_agent_requests_total", operation, outcome)
        self.observe("releasectl_agent_request_duration_seconds", time.monotonic() - since, operation)

    def observe(self, name: str, took_s: float, *labels: str) -> None:
        """Add a duration to a histogram."""
        ends = _BUCKETS_S[name]
        with self._guard:
            times = self._times.setdefault((name, *labels), [0.0] * (len(ends) + 2))
            times[bisect.bisect_left(ends, took_s)] += 1.0
            times[-1] += took_s

    def text(self, more: Figures) -> str:
        """Return all metrics, and more, in the Prometheus text format 0.0.4, in the order of METRICS."""
        with self._guard:
            figures = {**self._figures, **more}
            times = {key: list(values) for key, values in self._times.items()}
        lines: dict[str, list[str]] = {metric.name: [] for metric in METRICS}
        labels = {metric.name: metric.labels for metric in METRICS}
        for (name, *values), figure in sorted(figures.items()):
            lines[name].append(_sample(name, zip(labels[name], values), figure))
        for (name, *values), (*buckets, total) in sorted(times.items()):
            pairs, counts = list(zip(labels[name], values)), list(itertools.accumulate(buckets))
            for end, count in zip((*map(str, _BUCKETS_S[name]), "+Inf"), counts):
                lines[name].append(_sample(f"{name}_bucket", (*pairs, ("le", end)), count))
            lines[name] += [_sample(f"{name}_sum", pairs, total), _sample(f"{name}_count", pairs, counts[-1])]
        return "".join(f"# HELP {m.name} {m.help}\n# TYPE {m.name} {m.kind}\n" + "".join(lines[m.name])
                       for m in METRICS if lines[m.name])


def _sample(name: str, labels: Iterable[tuple[str, str]], figure: float) -> str:
    pairs = ",".join('{}="{}"'.format(label, value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\""))
                     for label, value in labels)
    shown = str(int(figure)) if figure == int(figure) else repr(figure)
    return f"{name}{{{pairs}}} {shown}\n" if pairs else f"{name} {shown}\n"


def process_figures(started_at: float) -> dict[tuple[str, ...], float]:
    """Return the metrics of this process; some need /proc."""
    figures: dict[tuple[str, ...], float] = {
        ("process_start_time_seconds",): started_at, ("process_cpu_seconds_total",): time.process_time(),
        ("process_threads",): threading.active_count()}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        figures["process_resident_memory_bytes",] = pages * os.sysconf("SC_PAGE_SIZE")
        figures["process_open_fds",] = len(os.listdir("/proc/self/fd"))
    return figures


# Longer than any message of our own: only text from outside is cut.
MAX_LOG_CHARS = 4096


class JsonFormatter(logging.Formatter):
    """One JSON object a line; the fields of about() are keys of their own."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"at": utc_text(record.created), "level": record.levelname.lower(), "thread": record.threadName,
                "message": one_line(record.getMessage(), MAX_LOG_CHARS),
                **{key: one_line(value) if isinstance(value, str) else value
                   for key, value in getattr(record, "about", {}).items() if value not in ("", None)}}
        if record.exc_info:
            line["exception"] = "\n".join(_trace(self, record))
        return to_json(line)


class TextFormatter(logging.Formatter):
    """One line for each event, for people; stack traces are indented, so that no line of one looks like an event."""

    def __init__(self, in_journal: bool):
        """in_journal: the journal adds time and level to each line itself."""
        super().__init__()
        self._in_journal = in_journal

    def format(self, record: logging.LogRecord) -> str:
        stamp = "" if self._in_journal else f"{utc_text(record.created)} {record.levelname.lower()}: "
        return "\n    ".join((stamp + one_line(record.getMessage(), MAX_LOG_CHARS), *_trace(self, record)))


class JournalFormatter(logging.Formatter):
    """The lines of another formatter, each with its priority in front (sd-daemon(3))."""

    PRIORITIES: Mapping[str, int] = {"DEBUG": 7, "INFO": 6, "WARNING": 4}

    def __init__(self, inner: logging.Formatter):
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = self.PRIORITIES.get(record.levelname, 3)
        return "\n".join(f"<{priority}>{line}" for line in self._inner.format(record).split("\n"))


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    """Return the lines of a record's stack trace, none without one."""
    text = formatter.formatException(record.exc_info) if record.exc_info else ""
    return "".join(printable(char, True) for char in text).splitlines()


def is_journal() -> bool:
    """Return whether standard error is the journal, not a pipe or a file."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def set_up_log(settings: Settings, command: str, is_quiet: bool = False, is_verbose: bool = False) -> None:
    """Log to standard error; commands for people, which print what they did, log errors alone unless verbose."""
    in_journal = is_journal()
    formatter = JsonFormatter() if settings.log_format == "json" else TextFormatter(in_journal)
    handler = logging.StreamHandler()
    handler.setFormatter(JournalFormatter(formatter) if in_journal else formatter)
    log.handlers = [handler]
    is_executor = command in ("serve", "run-once")
    level = settings.log_level.upper() if is_executor else "INFO" if is_verbose else "ERROR"
    log.setLevel("DEBUG" if is_executor and is_verbose else "ERROR" if is_executor and is_quiet else level)
    trail.setLevel(logging.INFO if is_executor else logging.NOTSET)  # NOTSET: that of log
    log.propagate = False


# endregion


# region Certificates
# ======================================================================================
# Certificates: TLS contexts, files watched for renewal, revocation lists, expiry; for
#   agents and API alike.
# Uses: Vocabulary, Helpers, Log and metrics.
# ======================================================================================

def verify_no_common_name(context: ssl.SSLContext) -> None:
    """Let a context verify a peer's name by its subject alternative names alone."""
    if ssl.HAS_NEVER_CHECK_COMMON_NAME:
        context.hostname_checks_common_name = False


def pg8000_tls(query: Mapping[str, str]) -> ssl.SSLContext | None:
    """Return the TLS context that libpq's sslmode and sslrootcert ask for; pg8000 does not know them."""
    mode = query.get("sslmode", "prefer")
    if mode in ("disable", "allow", "prefer"):
        return None
    context = ssl.create_default_context(cafile=query.get("sslrootcert"))
    context.check_hostname = mode == "verify-full"
    verify_no_common_name(context)
    if mode == "require":
        context.verify_mode = ssl.CERT_NONE
    return context


# Texts for OpenSSL's X509_V_ERR_... of an agent's certificate.
CERTIFICATE_FAULTS: Mapping[int, str] = {
    3: "presented a certificate of a CA that has no CRL in CONTROL_CA, while others have one there",
    8: "presented a certificate whose CA did not sign its CRL (CONTROL_CA)",
    11: "can't be verified: the CRL in CONTROL_CA is not valid yet (look at the clock)",
    12: "can't be verified: the CRL in CONTROL_CA has expired; put a newer one there",
    23: "presented a certificate that was revoked (the CRL in CONTROL_CA)",
    9: "presented a certificate that is not valid yet (look at both clocks)",
    10: "presented a certificate that has expired",
    18: "presented a self-signed certificate: it is not of our CA (CONTROL_CA)",
    19: "presented a certificate of another CA than ours (CONTROL_CA)",
    20: "presented a certificate of another CA than ours (CONTROL_CA)",
    21: "presented a certificate of another CA than ours (CONTROL_CA)",
    62: "presented a certificate for another name",
    64: "presented a certificate for another address",
    66: "presented a certificate whose key is too weak: it needs RSA of 2048 bits or more, or EC",
    67: "presented a certificate of a CA whose key is too weak: it needs RSA of 2048 bits or more, or EC",
    68: "presented a certificate signed with a digest that is too weak: it needs SHA-256 or better",
}
# Texts for what OpenSSL's security level refuses in our own files.
WEAK_REASONS: Mapping[str, str] = {
    "EE_KEY_TOO_SMALL": "its key is too weak: make one of RSA with 2048 bits or more, or of EC",
    "CA_KEY_TOO_SMALL": "the key of its CA is too weak: it needs RSA of 2048 bits or more, or EC",
    "CA_MD_TOO_WEAK": "it is signed with a digest that is too weak: it needs SHA-256 or better",
    "DH_KEY_TOO_SMALL": "its key is too weak: make one of RSA with 2048 bits or more, or of EC",
}
# Alerts of an agent that refuses our certificate; their prefixes differ between versions of TLS and of OpenSSL.
REFUSAL_ALERTS = ("CERTIFICATE_REQUIRED", "BAD_CERTIFICATE", "UNKNOWN_CA", "CERTIFICATE_EXPIRED",
                  "CERTIFICATE_REVOKED", "CERTIFICATE_UNKNOWN", "UNSUPPORTED_CERTIFICATE", "ACCESS_DENIED",
                  "NO_CERTIFICATE", "HANDSHAKE_FAILURE", "DECRYPT_ERROR")

# A renewed certificate is used this long after its notBefore: the clocks of those who verify it, and OpenSSL's own,
# may be behind ours.
CLOCKS_APART_S = 1.0


class TlsFiles:
    """An SSL context that is made again when its files change; thread-safe."""

    def __init__(self, make: Callable[..., ssl.SSLContext], *files: str):
        """Take a function that makes the context, and its files: certificate, key, and CA, which may be ""."""
        self._make, self._files = make, files
        self._guard = threading.Lock()
        # file_stamp() of the files when they were last read, and of the certificate and key in use.
        self._stamp: tuple[object, ...] = ()
        self._pair_stamp: tuple[object, ...] = ()
        # Content of the certificate and key in use.
        self._pair = b"", b""
        # Digest of the CA and CRLs in use.
        self._trust = ""
        self._context: ssl.SSLContext | None = None
        self._outage = Outage("renewed certificate", logging.WARNING)
        # When a renewed certificate becomes valid.
        self._valid_from = float("inf")

    def context(self) -> ssl.SSLContext:
        """Return the context of the files as they are now; raise ConfigError when there is none that works.

        The last pair stays in use while a renewal is half done, the key is open to others, or the new certificate is
        expired or not valid yet; a new CA or CRL is taken all the same.
        """
        return self.current()[0]

    def current(self) -> tuple[ssl.SSLContext, str]:
        """Return context(), and a digest that changes when the CA or its CRLs do."""
        with self._guard:
            stamp = tuple(map(file_stamp, self._files))
            if stamp != self._stamp or time.time() >= self._valid_from:
                try:
                    self._valid_from = float("inf")
                    made = self._make(*self._files)
                    if self._context is not None and stamp[:2] != self._pair_stamp:
                        self._refuse_invalid(self._files[0])
                    self._context, self._pair_stamp, self._trust = made, stamp[:2], _digest_of_file(self._files[-1])
                    self._pair = _content_of(self._files[0]), _content_of(self._files[1])
                    self._outage.end()
                except ConfigError as error:
                    if self._context is None:
                        raise
                    self._outage.log(f"not taken yet, the one before goes on: {error}")
                    self._take_trust()
                self._stamp = stamp
            assert self._context is not None
            return self._context, self._trust

    def reload(self) -> None:
        """Read the files again, whether they changed or not; raise ConfigError when they can't be used."""
        with self._guard:
            self._stamp = ()
        self.context()
        if self._outage.error:
            raise ConfigError(self._outage.error)

    def _take_trust(self) -> None:
        """Make a context of the last pair with the CA and CRLs as they are now, if they have changed and are good."""
        *_, ca = self._files
        trust = _digest_of_file(ca)
        if trust != self._trust and hasattr(os, "memfd_create"):
            with contextlib.suppress(ConfigError), _in_memory(self._pair[0]) as cert, _in_memory(self._pair[1]) as key:
                self._context, self._trust = self._make(cert, key, ca), trust

    def _refuse_invalid(self, path: str) -> None:
        """Raise ConfigError for a certificate that has expired or is not valid yet."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            since, until = certificate_times(Path(path).read_text(encoding="latin-1"))[0]
            if time.time() > until:
                raise ConfigError(f"{path} expired {utc_text(until)}: put a valid one there")
            if time.time() < since:
                self._valid_from = since + CLOCKS_APART_S
                raise ConfigError(f"{path} is not valid before {utc_text(since)}")


def _content_of(path: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(path).read_bytes() if path else b""
    return b""


def _digest_of_file(path: str) -> str:
    return hashlib.sha256(_content_of(path)).hexdigest()


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """Yield the path of a file that is on no disk, of this user alone: OpenSSL reads keys from files only."""
    with open(os.memfd_create("releasectl"), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


VALIDITY = re.compile(rb"(?:\x17\x0d(\d{12})Z|\x18\x0f(\d{14})Z)(?:\x17\x0d(\d{12})Z|\x18\x0f(\d{14})Z)")


def certificate_times(pem: str) -> list[tuple[float, float]]:
    """Return notBefore and notAfter of each certificate of a PEM file, in seconds since 1970.

    Raise ValueError for a broken file. Read from the bytes: an expired certificate passes no handshake.
    """
    return [times for der in pem_blocks(pem, "CERTIFICATE") for times in validity_of(der)]


def crl_ends(pem: str) -> list[float]:
    """Return nextUpdate of each CRL of a PEM file that names one, in seconds since 1970; raise ValueError."""
    return [until for der in pem_blocks(pem, "X509 CRL") for _, until in validity_of(der)]


def certificate_end(certificate: Mapping[str, Any]) -> float:
    """Return notAfter of a certificate of getpeercert(), in seconds since 1970."""
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def cas_without_crl(pem: str) -> int:
    """Return how many of the CAs of a PEM file have no CRL there; raise ValueError for a broken file."""
    issuers = {der_name(der, 2, 0x02) for der in pem_blocks(pem, "X509 CRL")}
    return len({der_name(der, 5, 0xA0) for der in pem_blocks(pem, "CERTIFICATE")} - issuers)


@functools.lru_cache(maxsize=256)
def crl_end_of(peer: bytes, ca: str, trust: str) -> float:  # noqa: ARG001 - trust: a part of the cache's key
    """Return when the first CRL for a certificate (DER) expires, in seconds since 1970; infinity without a CRL.

    ca is the file that it was verified by; raise ConfigError when it can't be read. OpenSSL checks CRLs in full
    handshakes only: a resumed session or a kept connection would outlive them.
    """
    try:
        pem = Path(ca).read_text(encoding="latin-1")
        crls, cas = pem_blocks(pem, "X509 CRL"), pem_blocks(pem, "CERTIFICATE")
        issuers = {der_name(each, 5, 0xA0): der_name(each, 3, 0xA0) for each in cas}
        ends: dict[bytes, float] = {}
        for name, until in ((der_name(crl, 2, 0x02), until) for crl in crls for _, until in validity_of(crl)):
            ends[name] = max(until, ends.get(name, 0.0))
        issuer: bytes | None = der_name(peer, 3, 0xA0)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{ca} can't be read: {one_line(error, 100)}") from None
    chain: list[bytes] = []
    while issuer is not None and issuer not in chain:
        chain.append(issuer)
        issuer = issuers.get(issuer)
    checked = chain[:1] if set(issuers) - set(ends) else chain  # as in load_ca()
    return min((ends[name] for name in checked if name in ends), default=float("inf"))


def pem_blocks(pem: str, label: str) -> list[bytes]:
    """Return the blocks of one kind of a PEM file; raise ValueError for one that is not base64."""
    return [base64.b64decode("".join(text.split()), validate=True)
            for text in re.findall(f"-----BEGIN {label}-----(.*?)-----END {label}-----", pem, re.DOTALL)]


def validity_of(der: bytes) -> Iterator[tuple[float, float]]:
    # only a certificate's validity and a CRL's updates are two times in a row (RFC 5280, 4.1.2.5 and 5.1.2)
    found = VALIDITY.search(der)
    if found:
        short_since, long_since, short_until, long_until = found.groups()
        yield _asn1_time(short_since, long_since), _asn1_time(short_until, long_until)


def der_name(der: bytes, place: int, version_tag: int) -> bytes:
    """Return a name in a certificate or CRL, by its place among the signed fields; raise ValueError.

    Place 0 is the version, known by its tag: it may be left out, and the others move up then.
    """
    outer = next(_der_items(der), (0, b""))[1]
    fields = list(_der_items(next(_der_items(outer), (0, b""))[1]))
    place -= 0 if fields and fields[0][0] == version_tag else 1
    if place >= len(fields):
        raise ValueError("neither a certificate nor a CRL")
    return fields[place][1]


def _der_items(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each item; raise ValueError for what is no DER."""
    while der:
        start, length = 2, der[1] if len(der) > 1 else 0x80
        if length >= 0x80:
            start += length - 0x80
            length = int.from_bytes(der[2:start], "big")
        if length == 0 and start > len(der) or start + length > len(der):
            raise ValueError("no DER")
        yield der[0], der[start:start + length]
        der = der[start + length:]


def _asn1_time(short: bytes | None, long: bytes | None) -> float:
    """Return seconds since 1970 of a UTCTime or a GeneralizedTime."""
    moment = datetime.datetime.strptime((short or long or b"").decode(), "%y%m%d%H%M%S" if short else "%Y%m%d%H%M%S")
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def file_stamp(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError:
        return None
    # the ctime changes too when a file becomes readable, or is written and gets its old mtime back
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def no_passphrase() -> str:
    raise ConfigError("the key is protected by a passphrase: releasectl needs it without one")


def load_pair(context: ssl.SSLContext, cert: str, key: str, names: tuple[str, str]) -> None:
    """Load a certificate and its key; raise ConfigError that names the setting and what is wrong."""
    for name, path in zip(names, (cert, key)):
        require_pem(name, path)
    try:
        context.load_cert_chain(cert, key, password=no_passphrase)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise ConfigError(f"{names[0]} {cert} does not fit {names[1]} {key}: "
                              "they are not of one pair") from None
        if error.reason in WEAK_REASONS:
            raise ConfigError(f"{names[0]} {cert} is weak: {WEAK_REASONS[error.reason]}") from None
        raise ConfigError(f"{names[0]} {cert} or {names[1]} {key} is not PEM: {_tls_reason(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{names[1]} {key}: {error}") from None


def require_file(name: str, path: str) -> bytes:
    """Return the first 3 bytes of a file; raise ConfigError that names the setting when it can't be read."""
    if not path:
        raise ConfigError(f"{name} is not set")
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # opening it would wait for a writer
            raise ConfigError(f"{name} {path} is a pipe: name a file, which is read again when it changes")
        with open(path, "rb") as file:
            return file.read(3)
    except OSError as error:
        raise ConfigError(f"{name} {path} can't be read: {os_reason(error)}") from None


def require_pem(name: str, path: str) -> None:
    """Raise ConfigError for a file that can't be read, or with a BOM: OpenSSL would ignore its first certificate."""
    if require_file(name, path) == codecs.BOM_UTF8:
        raise ConfigError(f"{name} {path} begins with a byte order mark: save it without one (`sed -i '1s/^\\xEF\\xBB"
                          "\\xBF//'`)")


def require_private(name: str, path: str) -> None:
    """Raise ConfigError for a file that can't be read, or is open to more than owner (rw) and group (r)."""
    require_file(name, path)
    if os.stat(path).st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"{name} {path} is open to others: chmod o-rwx,g-w it (its group may read it)")


def load_ca(context: ssl.SSLContext, ca: str, name: str) -> None:
    """Load the CA to verify peers by, and the CRLs in its file; raise ConfigError that names the setting."""
    require_pem(name, ca)
    try:
        context.load_verify_locations(ca)
        if context.cert_store_stats()["crl"]:
            # without a CRL for every CA, OpenSSL can check that of the peer's own issuer only
            is_whole = not cas_without_crl(Path(ca).read_text(encoding="latin-1"))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN if is_whole else ssl.VERIFY_CRL_CHECK_LEAF
    except ssl.SSLError as error:
        if error.reason in WEAK_REASONS:
            raise ConfigError(f"{name} {ca} is weak: {WEAK_REASONS[error.reason]}") from None
        raise ConfigError(f"{name} {ca} holds no PEM certificate: {_tls_reason(error)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} {ca} can't be read: {one_line(error, 100)}") from None


def client_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """Return the context for requests to agents: TLS 1.2 or newer, both sides verified (section 1)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    verify_no_common_name(context)
    load_ca(context, ca, "CONTROL_CA")
    load_pair(context, cert, key, ("CONTROL_CERT", "CONTROL_KEY"))
    return context


def receiver_context(ca: str) -> ssl.SSLContext:
    """Return the context to send notifications with: verified by NOTIFY_CA, else by the system's CAs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    verify_no_common_name(context)
    if ca:
        load_ca(context, ca, "NOTIFY_CA")
    else:
        context.load_default_certs()
    return context


def _tls_reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


def server_context(cert: str, key: str, client_ca: str) -> ssl.SSLContext:
    """Return the API's TLS context; raise ConfigError that names what is wrong with the files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # for TLS 1.2; all of TLS 1.3's are good
    context.options |= ssl.OP_NO_RENEGOTIATION
    load_pair(context, cert, key, ("HTTP_CERT", "HTTP_KEY"))
    require_private("HTTP_KEY", key)
    if client_ca:
        load_ca(context, client_ca, "HTTP_CLIENT_CA")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


# endregion


# region Payloads
# ======================================================================================
# Payloads: what goes out, number for number as it came in; its digest, and the version
#   in it. Pure.
# Uses: Vocabulary, Helpers.
# ======================================================================================

def parse_payload(value: object) -> dict[str, Any]:
    """Return a release's payload; raise AppError(INVALID) unless it is an object."""
    if not isinstance(value, dict):
        raise AppError(INVALID, "payload must be a JSON object")
    return value


def read_payload(text: str) -> dict[str, Any]:
    """Return a payload as it is stored, its numbers as they were written; raise ValueError, AppError(INVALID)."""
    return parse_payload(parse_json(text, exact=True))


def check_payload_version(payload: Mapping[str, Any], version: int) -> None:
    """Raise AppError(INVALID) where the payload names another version than the release's."""
    named = payload.get("version", version)
    if isinstance(named, bool) or named != version or not isinstance(named, int):
        raise AppError(INVALID, f"payload names version {one_line(to_json(named), 40)}, the release is version "
                                f"{version}: leave the version out")


def payload_for_version(payload: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return an older release's payload with a new version (contract 3, rule 10)."""
    return {**payload, "version": version} if "version" in payload else dict(payload)


def without_version(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return a payload as it was sent but for the version, which is the release's."""
    return {key: value for key, value in payload.items() if key != "version"}


def digest_of(payload: Mapping[str, Any]) -> str:
    """Return what is equal for two payloads that differ by their version, or the order of keys, at most.

    Agents get numbers digit for digit: 1.10 and 1.1 are two payloads.
    """
    return hashlib.sha256(canonical_json({**payload, "version": 0}).encode()).hexdigest()


def digest_of_stored(text: str) -> str:
    """Return the digest of a stored payload; "" for one that can't be read."""
    try:
        return digest_of(read_payload(text))
    except (ValueError, AppError):
        return ""


# endregion


# region Difference
# ======================================================================================
# Difference: what was added, removed and changed between two JSON values. Pure.
# Uses: Helpers.
# ======================================================================================

ADDED, REMOVED, CHANGED = "added", "removed", "changed"

# Changes that are listed, and the characters of JSON in their paths and values (the first change may have more); all
# others are counted. 1,000 changes may have a path of a megabyte in common.
MAX_CHANGES, MAX_CHANGES_CHARS = 1000, 1 << 20

# Characters that a line shows of a path and of a value.
MAX_PATH_SHOWN, MAX_VALUE_SHOWN = 200, 100

# Elements of a list are told apart by the first of these that each of them has, all with different values.
NAMING_MEMBERS = ("id", "name", "domain")


class Element(NamedTuple):
    """A step of a path: the element of a list whose member has a value; value None: the member of every element."""
    member: str
    value: str | int | None


class Change(NamedTuple):
    """One difference. A step of its path is a member's name, a position in a list, or an Element.

    The order of a list of named elements has changed where the last step is an Element without a value: before
    and after are the names in order.
    """
    kind: str
    path: tuple[str | int | Element, ...]
    before: Any = None
    after: Any = None
    # Position of an element that was added to a list of named ones.
    position: int | None = None

    @property
    def where(self) -> str:
        """Return the path as JSONPath (RFC 9535)."""
        return "$" + "".join(map(_step_text, self.path))

    @property
    def values(self) -> list[str]:
        """Return before and after as JSON, or the one that there is."""
        return [to_json(value) for value, kind in ((self.before, ADDED), (self.after, REMOVED)) if self.kind != kind]

    def __str__(self) -> str:
        """Return a line in which before and after never look the same."""
        values = self.values
        same = len(os.path.commonprefix(values)) if len(values) > 1 else 0
        start = max(0, same - MAX_VALUE_SHOWN // 3) if max(map(len, values)) > MAX_VALUE_SHOWN else 0
        scripts = [scripts_of(text[same:same + 1]) for text in values]
        is_look_alike = all(scripts) and scripts[0] != scripts[-1]
        shown = [f"{'...' if start else ''}{visible(text[start:start + MAX_VALUE_SHOWN], is_look_alike)}"
                 f"{'...' if start + MAX_VALUE_SHOWN < len(text) else ''}" for text in values]
        sign, path = {ADDED: "+", REMOVED: "-", CHANGED: "~"}[self.kind], self.where
        # the end of a path tells more than its middle
        parts = [path] if len(path) <= MAX_PATH_SHOWN else [path[:MAX_PATH_SHOWN // 2], path[-(MAX_PATH_SHOWN // 2):]]
        return f"{sign} {'...'.join(map(visible, parts))}: {' -> '.join(shown)}"


class Difference(NamedTuple):
    """The first changes, as many as the limits allow, at least one; and how many there are."""
    changes: list[Change]
    total: int

    def __str__(self) -> str:
        return "no change" if not self.total else "1 change" if self.total == 1 else f"{self.total} changes"


def difference(before: object, after: object) -> Difference:
    """Return what must be done to one JSON value to get another; nothing where their digests are the same."""
    changes, first, chars = _changes(before, after, ()), list[Change](), 0
    for change in changes:
        chars += len(change.where) + sum(map(len, change.values))
        if first and chars > MAX_CHANGES_CHARS:
            return Difference(first, len(first) + 1 + sum(1 for _ in changes))
        first.append(change)
        if len(first) == MAX_CHANGES:
            break
    return Difference(first, len(first) + sum(1 for _ in changes))


def _step_text(step: str | int | Element) -> str:
    if isinstance(step, Element):
        return _name_in_list(step)
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", step) else f"[{to_json(step)}]"


def _name_in_list(step: Element) -> str:
    return f"[*].{step.member}" if step.value is None else f"[?@.{step.member}=={to_json(step.value)}]"


def _changes(before: Any, after: Any, path: tuple[str | int | Element, ...]) -> Iterator[Change]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from _changes(value, after[key], (*path, key))
            else:
                yield Change(REMOVED, (*path, key), before=value)
        yield from (Change(ADDED, (*path, key), after=value) for key, value in after.items() if key not in before)
    elif isinstance(before, list) and isinstance(after, list):
        member = next((name for name in NAMING_MEMBERS if _is_named(before, name) and _is_named(after, name)), None)
        yield from _changes_by_name(before, after, path, member) if member else _changes_by_position(
            before, after, path)
    elif type(before) is not type(after) or before != after:  # to Python True, 1 and 1.0 are equal
        yield Change(CHANGED, path, before, after)


def _is_named(elements: Sequence[Any], member: str) -> bool:
    """Return whether each element has a name of its own in this member."""
    names = [element.get(member) if isinstance(element, dict) else None for element in elements]
    return all(type(name) in (str, int) for name in names) and len(set(names)) == len(names)


def _changes_by_name(before: Sequence[Any], after: Sequence[Any], path: tuple[str | int | Element, ...],
                     member: str) -> Iterator[Change]:
    old, new = ({element[member]: element for element in elements} for elements in (before, after))
    for name, value in old.items():
        if name in new:
            yield from _changes(value, new[name], (*path, Element(member, name)))
        else:
            yield Change(REMOVED, (*path, Element(member, name)), before=value)
    for position, (name, value) in enumerate(new.items()):
        if name not in old:
            yield Change(ADDED, (*path, Element(member, name)), after=value, position=position)
    if [name for name in old if name in new] != [name for name in new if name in old]:
        yield Change(CHANGED, (*path, Element(member, None)), list(old), list(new))


def _changes_by_position(before: Sequence[Any], after: Sequence[Any],
                         path: tuple[str | int | Element, ...]) -> Iterator[Change]:
    common = min(len(before), len(after))
    for index in range(common):
        yield from _changes(before[index], after[index], (*path, index))
    yield from (Change(REMOVED, (*path, index), before=before[index]) for index in range(common, len(before)))
    yield from (Change(ADDED, (*path, index), after=after[index]) for index in range(common, len(after)))


# endregion


# region Model
# ======================================================================================
# Model: the rows of the tables as values, and what is derived from them. Pure.
# Uses: Vocabulary, Helpers, Payloads.
# ======================================================================================

# Host and port of an agent, which gets one task at a time, whatever rows name it.
Endpoint = tuple[str, int]


def endpoint_of(main_ip: str, port: int) -> Endpoint:
    """Return where an agent listens, in one form for all spellings of an address."""
    if ":" in main_ip:
        with contextlib.suppress(ValueError):
            return str(plain_address(ipaddress.ip_address(main_ip))), port
    return main_ip.lower(), port


def plain_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> (
        ipaddress.IPv4Address | ipaddress.IPv6Address):
    """Return the IPv4 address of one that is mapped into IPv6 (::ffff:10.0.0.7), else the address itself."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


@dataclasses.dataclass(frozen=True)
class Node:
    """A host that runs an agent: a row of nodes."""
    id: int
    name: str
    main_ip: str
    agent_port: int
    agent_protocol: str
    labels: str
    enabled: int
    status: str
    created_at: str
    updated_at: str
    # Highest version ever sent to it.
    last_version: int = 0

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.agent_protocol]

    @property
    def gets_releases(self) -> bool:
        return bool(self.enabled) and self.status == "online"

    @property
    def endpoint(self) -> Endpoint:
        """Return where its agent listens."""
        return endpoint_of(self.main_ip, self.agent_port)

    @property
    def condition(self) -> str:
        """Return "online", or why it gets no releases: "disabled", "offline", "in maintenance"."""
        return "disabled" if not self.enabled else f"in {self.status}" if self.status == "maintenance" else self.status

    @functools.cached_property
    def label_values(self) -> Mapping[str, str]:
        """Return its labels."""
        return label_values(self.labels)


# A fleet has few sets of labels, and many nodes with each.
@functools.lru_cache(maxsize=16384)
def label_values(text: str) -> Mapping[str, str]:
    """Return labels from their JSON."""
    with contextlib.suppress(ValueError, AttributeError):  # written by hand
        found = parse_json(text.encode()).items()
        return {key: value if isinstance(value, str) else to_json(value) for key, value in found}
    return {}


# From a label's key to values of which a node must have one.
LabelChoice = Mapping[str, frozenset[str]]


def has_labels(values: Mapping[str, str], wanted: LabelChoice) -> bool:
    """Return whether labels have, for each key, one of the wanted values."""
    return all(values.get(key) in some for key, some in wanted.items())


@dataclasses.dataclass(frozen=True)
class Release:
    """A row of release_tasks, with two numbers that are computed from its nodes, and its rollback."""
    id: int
    type: str
    target: str
    version: int
    status: str
    status_reason: str
    reason: str
    payload: str
    strategy: str
    retry_of: int | None
    rollback_of: int | None
    total_nodes: int
    success_nodes: int
    failed_nodes: int
    error_msg: str
    claim_owner: str
    claim_fence: int
    claim_expires_at: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    updated_at: str
    # Highest batch whose soak, re-verification and pause are complete.
    passed_batch: int
    soak_until: str | None
    paused_by: str
    # Part of its tasks' ids; "" until the claim where a person wrote the row.
    tag: str
    # soak_until by the elapsed clock: see Moment.clock_mark().
    soak_clock: str
    # digest_of() its payload, as of its creation or start; "" until then where a person wrote the row.
    stored_sha256: str
    skipped_nodes: int
    current_batch: int
    # Whom it is for, as JSON: see Selection.
    selection: str = "{}"
    catch_up_of: int | None = None
    # 1: a person lets it go on though agents did not answer; they are not asked again.
    preflight_accepted: int = 0
    # 1: before those of its target that have not started, whatever their versions.
    goes_first: int = 0
    # 1: a freeze does not hold it.
    during_freeze: int = 0
    # Who made it, see Act.identity; "" where a person wrote the row.
    author: str = ""
    # "" or one of APPROVAL_STATES; who approved it, or let it go without, and when.
    approval: str = ""
    approved_by: str = ""
    approved_at: str | None = None
    # The release that rolls it back, and its status: of several the one that is open, else one that did, else the last.
    rollback_id: int | None = None
    rollback_status: str = ""

    @property
    def rolled_back_by(self) -> int | None:
        """Return the release that rolls it back or did; None for none, or where that failed or was cancelled."""
        return None if self.rollback_status in (FAILED, CANCELLED) else self.rollback_id

    @property
    def awaits_approval(self) -> bool:
        """Return whether it does not start before somebody has approved it."""
        return self.approval == WANTED and self.status in (PENDING, PAUSED) and not self.started_at

    @property
    def is_again(self) -> bool:
        """Return whether it was made from another release, whose nodes left out it names."""
        return (self.retry_of or self.rollback_of or self.catch_up_of) is not None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def payload_sha256(self) -> str:
        """Return the digest of its payload; "" where that can't be read."""
        return self.stored_sha256 or digest_of_stored(self.payload)

    @property
    def sent_sha256(self) -> str:
        """Return the digest of what went out; "" before its start, when a person may change the payload."""
        return self.stored_sha256 if self.started_at else ""

    def read_payload(self) -> dict[str, Any]:
        """Return its payload; raise ValueError or AppError(INVALID) where that can't be read, or is not what went out.

        Somebody may have changed the row since: what was sent to one node would differ from what another one gets.
        """
        payload = read_payload(self.payload)
        if self.sent_sha256 and digest_of(payload) != self.sent_sha256:
            raise AppError(INVALID, "it was changed by hand after it went out")
        return payload

    def __str__(self) -> str:
        return f"release {self.id} (v{self.version})"


class ReleaseNode(NamedTuple):
    """A node of a release: its row, and from next_op on what only the driver of the release knows."""
    node_id: int
    name: str
    main_ip: str
    agent_port: int
    agent_protocol: str
    batch: int
    status: str
    task_id: str
    attempts: int
    error_kind: str
    error_msg: str
    hold_until: str | None
    started_at: str | None
    finished_at: str | None
    # 1: its failure counts against no limit; a person accepted it, or a rollback includes it anyway.
    accepted: int = 0
    # Highest version ever sent to its address, by any release.
    last_version: int = 0
    # hold_until and started_at by the elapsed clock: see Moment.clock_mark().
    hold_clock: str = ""
    started_clock: str = ""
    # The labels that maxParallelPer needs, as they were when the release was made; all of now where a person wrote it.
    labels: str = "{}"
    # Seconds for which pauses and freezes delayed its dispatch; they extend the deadline.
    waited_s: float = 0.0
    # The row's value of reached.
    stored_reached: int = 1
    # The next request; due and deadline are times of Clock.elapsed().
    next_op: str = ""
    due: float = 0.0
    deadline: float = 0.0
    in_flight: bool = False
    # Part of the deadline that stands for pauses before a take-over; revoked when its agent is at work.
    credit_s: float = 0.0
    # The agent named another task id than the one written.
    is_renamed: bool = False
    # A try of this release may have reached the agent, so "already applied" may be due to it.
    reached: bool = False
    # The agent may have run the task, with an unknown outcome.
    is_unknown: bool = False
    # The agent's last answer was that it has the task.
    is_at_work: bool = False
    # The agent's message of success, while that is verified.
    agent_message: str = ""
    # Polls of its task that found it running.
    polls: int = 0
    # When the CPU time of its answers is paid for, by Clock.elapsed(): see observe().
    paid_at: float = 0.0
    # How often the agent did not know the task.
    forgotten: int = 0
    # Successful probes in a row.
    passes: int = 0
    # The re-verification at the end of the soak is done.
    is_reverified: bool = False
    # Its agent answered before batch 1: see Preflight.
    has_answered: bool = False
    # Failed tries in a row, with kind and message of the last one.
    errors: int = 0
    last_kind: str = ""
    last_error: str = ""
    # Its end according to the agent, not yet written.
    verdict: Verdict | None = None

    @property
    def endpoint(self) -> Endpoint:
        """Return where its agent listens."""
        return endpoint_of(self.main_ip, self.agent_port)

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.agent_protocol]


class Verdict(NamedTuple):
    """The end of a node: SUCCESS, or FAILED with an error_kind, a message and its whole text."""
    status: str
    error_kind: str = ""
    error_msg: str = ""
    detail: str = ""
    # Seconds for which an execute agent may still be busy with the last request; None: as stored.
    hold_s: float | None = 0.0


EACH = "each"


class Verify(NamedTuple):
    """How a node's success is verified: by GET requests for url, as many successes in a row."""
    url: str
    status: int = 200
    timeout_s: float = 5.0
    successes: int = 1
    # Host header, and with https the name in the handshake.
    host: str = ""
    # A text that the body must contain.
    contains: str = ""

    def url_for(self, node: ReleaseNode) -> str:
        """Return the URL to probe on a node."""
        host = f"[{node.main_ip}]" if ":" in node.main_ip else node.main_ip
        return self.url.replace("{main_ip}", host).replace("{name}", urllib.parse.quote(node.name, safe=""))


class Strategy(NamedTuple):
    """How a release is to go out (contract section 7); a text like "10%" is a share."""
    # Sizes, () where nobody named them.
    batches: tuple[int | str, ...] = ()
    # Key of the label of which each value is a batch.
    batch_by: str = ""
    # The nodes of batch 1.
    first: LabelChoice = {}
    max_failed: int | str = 0
    max_failed_total: int | str | None = None
    max_parallel: int = 0
    # The same for each value of a label, by its key.
    max_parallel_per: Mapping[str, int] = {}
    soak_s: float = 0.0
    pause_after: tuple[int, ...] | str = ()
    on_exceed: str = FAIL
    node_deadline_s: float | None = None
    retries: int | None = None
    start_at: str = ""
    verify: Verify | None = None
    # Every agent is asked before batch 1.
    preflight: bool = False

    @property
    def sizes(self) -> tuple[int | str, ...]:
        """Return the sizes of its batches; without a word on batches one node goes alone."""
        return self.batches or (() if self.first or self.batch_by else (1,))

    def pauses_after(self, batch: int) -> bool:
        """Return whether the release pauses after a batch."""
        return self.pause_after == EACH or batch in self.pause_after

    @property
    def silent_share(self) -> int | str:
        """Return how many of all nodes, or which share of them, may not answer the preflight."""
        return self.max_failed if self.max_failed_total is None else self.max_failed_total


NO_STRATEGY = Strategy()


class Moment(NamedTuple):
    """A time by both clocks, in seconds; boot is Clock.boot()."""
    wall: float
    elapsed: float
    boot: str = ""

    @property
    def text(self) -> str:
        return utc_text(self.wall)

    def clock_mark(self, seconds: float) -> str:
        """Return the time in so many seconds, for left_s(), by the elapsed clock, which nobody can set."""
        return f"{self.boot} {self.elapsed + seconds:.3f}"

    def left_s(self, until: str | None, mark: str, at_most_s: float) -> float:
        """Return the seconds until a stored time, from 0 to at_most_s."""
        return min(max(self.until_s(until, mark), 0.0), at_most_s)

    def until_s(self, until: str | None, mark: str) -> float:
        """Return the seconds until a stored time, below 0 when it is over.

        They are computed from the mark where this host wrote it since its boot, else by the wall clock.
        """
        boot, _, elapsed = mark.rpartition(" ")
        if elapsed and boot == self.boot:
            with contextlib.suppress(ValueError):  # written by hand
                return float(elapsed) - self.elapsed
        return epoch_or(until, self.wall) - self.wall


class Policy(NamedTuple):
    """Settings that a decision needs."""
    retries: int
    node_deadline_s: float
    request_timeout_s: float
    interval_s: float
    # A dispatch leaves within this time after it was written down, or not at all.
    leave_within_s: float = 0.0
    # Successful probes in a row that verify a node; 0: not verified.
    probes: int = 0

    @property
    def hold_s(self) -> float:
        """Return for how long an execute agent may be busy with a request, from when it was written down."""
        return self.leave_within_s + self.request_timeout_s

    def under(self, strategy: Strategy) -> Policy:
        """Return the policy with what a release's strategy overrides."""
        return self._replace(
            retries=self.retries if strategy.retries is None else strategy.retries,
            node_deadline_s=strategy.node_deadline_s or self.node_deadline_s,
            probes=strategy.verify.successes if strategy.verify else 0)


# Where no node is running, nothing depends on it.
NO_POLICY = Policy(0, 0.0, 0.0, 0.0)


class BatchProgress(NamedTuple):
    """How many nodes of a batch are in each status."""
    number: int
    counts: Mapping[str, int]

    @property
    def is_open(self) -> bool:
        return self.count(PENDING, RUNNING) > 0

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def count(self, *statuses: str) -> int:
        """Return the number of nodes in any of the statuses."""
        return sum(self.counts.get(status, 0) for status in statuses)


class Stage(NamedTuple):
    """Where a running release is between its batches."""
    # The batch whose pending nodes may be dispatched now, or 0.
    batch: int
    # As in Release.
    passed_batch: int
    soak_until: str | None = None
    soak_clock: str = ""
    soak_left_s: float = 0.0
    # Somebody must resume it first.
    pauses: bool = False
    # The batch that is re-verified now, or 0.
    reverifies: int = 0


class Outcome(NamedTuple):
    """The outcome of one request to an agent, or of a probe."""
    op: str
    # SUCCESS or FAILED, which are believed, or one of those that Decision adds (ACCEPTED, ...).
    result: str
    # The id by which the agent knows the task.
    task_id: str = ""
    error_kind: str = ""
    # What the agent said, or what is wrong with its answer.
    message: str = ""
    # The whole text, where it is more than message.
    detail: str = ""
    # Seconds for which an agent that can't be asked may still be busy with the request.
    hold_s: float = 0.0
    # The version of an "already applied", else 0.
    applied: int = 0
    # The answer can't be used, but says that nothing was done.
    is_refusal: bool = False
    # Seconds of CPU that its answer took us.
    cost_s: float = 0.0

    @property
    def event_detail(self) -> str:
        """Return the whole text, as an event stores it."""
        return detail_text(self.detail or self.message)


class Hold(NamedTuple):
    """A time in which a pause or a freeze stopped the dispatches of a release, by the wall clock."""
    since: float
    until: float  # inf: it goes on


class Candidate(NamedTuple):
    """A release that is not terminal, as a scan for work reads it."""
    id: int
    target: str
    version: int
    status: str
    running_nodes: int
    claimed: bool
    start_at: str = ""
    paused_by: str = ""
    status_reason: str = ""
    has_started: bool = True
    has_pending: bool = True
    # "": a person wrote the row, and may still be changing it.
    tag: str = ""
    # As in Release.
    goes_first: int = 0
    during_freeze: int = 0
    # It waits for an approval by somebody else than author.
    needs_approval: bool = False
    author: str = ""


class Claim(NamedTuple):
    """The right to work on a release: every write of its owner is conditional on owner and fence.

    Neither is enough alone: a database that went back gives the same fence to another owner.
    """
    release_id: int
    fence: int
    version: int
    owner: str
    # DatabaseState.generation when it was taken.
    generation: int = 0

    def __str__(self) -> str:
        return f"release {self.release_id} (v{self.version})"


def about(release: Release | Claim | None = None, /, **more: object) -> dict[str, Any]:
    """Return logging's `extra` for a record: each key is one of its line in JSON.

    Keys: release (its id), version, node (its name), actor, event, request_id.
    """
    if release is None:
        return {"about": more}
    release_id = release.release_id if isinstance(release, Claim) else release.id
    return {"about": {"release": release_id, "version": release.version, **more}}


class ExecutorRow(NamedTuple):
    """A process that looks for work, or did: a row of executors."""
    # HOST:PID:RANDOM
    owner: str
    host: str
    # SERVE, or TICK for run-once.
    kind: str
    started_at: str
    seen_at: str
    # It is seen again within this time; 0: it was stopped.
    period_s: float
    # Why it can dispatch nothing, "" where it can.
    error: str

    def seen_s(self, now_s: float) -> float:
        """Return for how many seconds it was not seen; below 0 where a clock was ahead, or what it wrote is no time."""
        return now_s - epoch_or(self.seen_at, float("inf"))

    def is_live(self, now_s: float) -> bool:
        """Return whether it runs, or its next tick is to be expected."""
        return self.period_s > 0 and abs(self.seen_s(now_s)) <= self.period_s

    def __str__(self) -> str:
        return f"{self.host} pid {self.owner[len(self.host) + 1:].partition(':')[0]}"


class IdempotencyKey(NamedTuple):
    """A caller's Idempotency-Key, and the SHA-256 of what was asked with it."""
    actor: str
    key: str
    request_sha256: str


# endregion


# region Freezes
# ======================================================================================
# Freezes: what is frozen, and which releases that holds. Pure.
# Uses: Vocabulary, Helpers, Model.
# ======================================================================================

class Freeze(NamedTuple):
    """The switch that stops new dispatches of all processes, in one target or in all; who set it, when and why."""
    frozen: bool = False
    reason: str = ""
    actor: str = ""
    at: str = ""
    # When it is over, by the clock that decides on claims (Transaction.now()); None: when somebody lifts it.
    until: str | None = None
    # "": it is of every target.
    target: str = ""
    # The identity (Act.identity) of who set it, "" where a person wrote the row; who else wants it lifted, and when.
    setter: str = ""
    lift_wanted_by: str = ""
    lift_wanted_at: str | None = None
    # Its setter lifts it alone, anybody else with a second person: somebody's APPROVALS is 1.
    two_persons: bool = False

    @property
    def detail(self) -> str:
        """Return its reason, and before that its end: 'until 2026-01-31T06:00:00.000Z: the match'."""
        return f"until {self.until}: {self.reason}" if self.until else self.reason

    @property
    def text(self) -> str:
        """Return what a release that it holds waits for: 'frozen: the match'."""
        return f"frozen {self.detail}" if self.until else f"frozen: {self.reason}"

    def line(self, at: str = "", end: str = "") -> str:
        """Return 'frozen by anna: the match', with its end 'cdn is frozen until 2026-..., by anna: the match'.

        at: when it was set, where that is to be told. end: how its end is told, "": by the stored time.
        """
        end = end or (f"until {self.until}" if self.until else "")
        how = ", ".join(filter(None, (end, by_whom(self.actor).strip())))
        return (f"{f'{self.target} is ' if self.target else ''}frozen{f' {how}' if how else ''}"
                f"{f' at {at}' if at else ''}: {self.reason}")

    @property
    def name(self) -> str:
        """Return what it is called in a sentence."""
        return f"the freeze of {self.target}" if self.target else "the freeze"

    @property
    def subject(self) -> str:
        """Return what it is called in the audit log and in `check`."""
        return f"freeze {self.target}" if self.target else "freeze"

    @property
    def mend(self) -> str:
        """Return the command that lifts it."""
        return "releasectl freeze off" + (f" --target {self.target}" if self.target else "")

    @property
    def lifted_by(self) -> str:
        """Return who lifts it where not anybody does: 'anna lifts it, or any two others'; else ""."""
        if not self.two_persons:
            return ""
        alone = self.setter if self.setter not in ("", ANONYMOUS) else ""
        if not self.lift_wanted_by:
            return f"{alone} lifts it, or any two others" if alone else "it takes two persons to lift it"
        return (f"{self.lift_wanted_by} wants it lifted since {self.lift_wanted_at}, so "
                f"{f'{alone} or ' if alone else ''}anybody but {self.lift_wanted_by} lifts it")


NO_FREEZE = Freeze()


class Freezable(Protocol):
    """What a freeze may hold: a release, or one that is asked for."""
    @property
    def target(self) -> str: ...

    @property
    def during_freeze(self) -> int: ...


class Freezes(NamedTuple):
    """What is frozen: everything, single targets, or both."""
    everything: Freeze = NO_FREEZE
    # By name.
    targets: tuple[Freeze, ...] = ()

    @property
    def on(self) -> list[Freeze]:
        """Return those that are set, the one of everything first."""
        return [freeze for freeze in (self.everything, *self.targets) if freeze.frozen]

    def of_target(self, target: str) -> Freeze:
        """Return the one that was set for exactly this target, "" for everything; NO_FREEZE for none."""
        return self.everything if not target else next((f for f in self.targets if f.target == target), NO_FREEZE)

    def holding(self, release: Freezable) -> list[Freeze]:
        """Return those that hold a release, the one that ends last first. No other place answers that."""
        found = [freeze for freeze in self.on if freeze.target in ("", release.target) and not release.during_freeze]
        return sorted(found, key=lambda freeze: freeze.until or "~", reverse=True)

    def of(self, release: Freezable) -> Freeze:
        """Return what a release waits for: of those that hold it the one that ends last, NO_FREEZE for none."""
        return next(iter(self.holding(release)), NO_FREEZE)

    def without(self, target: str) -> Freezes:
        """Return all but the one of a target, "" for everything."""
        return Freezes(self.everything if target else NO_FREEZE, tuple(f for f in self.targets if f.target != target))

    def over_at(self, now: str) -> list[Freeze]:
        """Return those whose end has come, the one that ended first before the others."""
        return sorted((f for f in self.on if f.until and f.until <= now), key=lambda f: f.until or "")

    def in_force(self, now: str) -> Freezes:
        """Return what is left when those are taken away whose end has come."""
        return functools.reduce(Freezes.without, [freeze.target for freeze in self.over_at(now)], self)


NO_FREEZES = Freezes()


def holds_of(history: Iterable[tuple[str, str, str]]) -> list[Hold]:
    """Return the holds of a release from its events in order, each with time, event and to_status.

    The end of a freeze may be written down later than what followed it: it says nothing of a pause then.
    """
    events = list(history)
    holds: list[Hold] = []
    for hold in sorted([*_spans((at, status == PAUSED) for at, event, status in events if event != UNFROZEN),
                        *_spans((at, event == FROZEN) for at, event, _ in events if event in (FROZEN, UNFROZEN))]):
        if holds and hold.since <= holds[-1].until:
            holds[-1] = Hold(holds[-1].since, max(holds[-1].until, hold.until))
        else:
            holds.append(hold)
    return holds


def _spans(changes: Iterable[tuple[str, bool]]) -> Iterator[Hold]:
    """Yield the times in which something was so, from the times and values of its changes."""
    began: float | None = None
    for at, is_so in changes:
        if is_so and began is None:
            began = epoch_or(at, 0.0)
        elif not is_so and began is not None:
            yield Hold(began, max(began, epoch_or(at, 0.0)))
            began = None
    if began is not None:
        yield Hold(began, float("inf"))


def held_s(holds: Iterable[Hold], since: float, until: float) -> float:
    """Return the seconds of holds between two times."""
    return sum(max(0.0, min(hold.until, until) - max(hold.since, since)) for hold in holds)


# endregion


# region Strategy
# ======================================================================================
# Strategy: STRATEGY_KEYS and every other value that a person gives: parser and JSON
#   Schema. Pure.
# Uses: Vocabulary, Helpers, Model.
# ======================================================================================

HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
# A name with such a last label may be an IPv4 address to a resolver: 0xA9FEA9FE, 10.7, 010.0.0.7.
NUMBER_LABEL = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def parse_address(text: object) -> str:
    """Return an IP address or host name in normal form; raise AppError(INVALID) for anything else."""
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            if "%" not in text:
                address = plain_address(ipaddress.ip_address(text))
                if fault := address_fault(address):
                    raise AppError(INVALID, f"mainIp {address} {fault}: name the node's own address")
                return str(address)
        labels = text.split(".")
        if len(text) <= 253 and all(map(HOST_LABEL.fullmatch, labels)) and not NUMBER_LABEL.fullmatch(labels[-1]):
            return text.lower()
    raise AppError(INVALID, f"mainIp {one_line(text, 60)!r} is neither an IP address nor a host name")


def address_fault(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return why no single host can have an address; "" where one can."""
    is_broadcast = address.version == 4 and (int(address) == 0xFFFFFFFF or int(address) >> 24 == 0)
    kinds = ((address.is_unspecified, "stands for any address"), (address.is_multicast, "is a multicast address"),
             (address.is_link_local, "is link-local (cloud metadata lives there)"),
             (is_broadcast, "is no address of a host"))
    return next((what for is_it, what in kinds if is_it), "")


def parse_integer(field: str, value: object, numbers: Range) -> int:
    """Return an integer of a range; raise AppError(INVALID) for anything else."""
    try:
        return int(numbers.from_json(value))
    except ValueError as error:
        shown = ascii(value) if isinstance(value, str) else value
        raise AppError(INVALID, f"{field} {one_line(shown, 40)} {error}") from None


def parse_name(text: object) -> str:
    """Return a node's or a token's name; raise AppError(INVALID) unless it is 1 to 100 plain characters."""
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_NAME_CHARS or not is_plain(text):
        raise AppError(INVALID, f"name {one_line(ascii(text), 50)} must be 1 to {MAX_NAME_CHARS} {PLAIN_TEXT}")
    return text


def parse_choice(field: str, value: object, choices: Sequence[str]) -> str:
    """Return value; raise AppError(INVALID) unless it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise AppError(INVALID, f"{field} {one_line(value, 40)!r} must be one of {', '.join(choices)}")
    return value


def parse_flag(field: str, value: object) -> bool:
    """Return a JSON boolean; raise AppError(INVALID) for anything else."""
    try:
        return _flag(value)
    except ValueError as error:
        raise AppError(INVALID, f"{field} {one_line(to_json(value), 40)} {error}") from None


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def parse_labels(value: object) -> str:
    """Return labels as stored, a JSON object; raise AppError(INVALID) for what contract section 2 forbids."""
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise AppError(INVALID, "labels must be an object whose values are strings")
    if len(value) > MAX_LABELS:
        raise AppError(INVALID, f"labels must be at most {MAX_LABELS}, not {len(value)}")
    for key, text in value.items():
        if not 1 <= len(key) <= MAX_LABEL_KEY_CHARS or not is_plain(key):
            raise AppError(INVALID, f"labels: the key {one_line(ascii(key), 40)} must be 1 to {MAX_LABEL_KEY_CHARS} "
                                    f"{PLAIN_TEXT}")
        if len(text) > MAX_LABEL_CHARS or not is_plain(text):
            raise AppError(INVALID, f"labels: the value of {one_line(key, 30)} must be at most {MAX_LABEL_CHARS} "
                                    f"{PLAIN_TEXT}")
    return to_json(value)


def parse_text(field: str, value: object, max_chars: int = 500) -> str:
    """Return a text on one line; raise AppError(INVALID) for anything else, or one that is too long."""
    if not isinstance(value, str) or len(value) > max_chars:
        raise AppError(INVALID, f"{field} must be a text of at most {max_chars} characters")
    return one_line(value, max_chars)


TARGET = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def parse_target(value: object) -> str:
    """Return a release's target; raise AppError(INVALID) for anything but letters, digits and ._-"""
    if not isinstance(value, str) or not re.fullmatch(TARGET, value):
        raise AppError(INVALID, "target must be 1 to 64 letters, digits or . _ -")
    return value


def _share(low: int) -> tuple[Callable[[Any], int | str], dict[str, Any]]:
    """Return parser and JSON Schema of a number of nodes, or a percentage of them, from low (0 or 1) on."""
    numbers, percents = Range(low, MAX_NODES), "([1-9][0-9]?|100)%" if low else "(0|[1-9][0-9]?|100)%"

    def parse(value: Any) -> int | str:
        if isinstance(value, str) and re.fullmatch(percents, value):
            return value
        try:
            return int(numbers.from_json(value))
        except ValueError as error:
            raise ValueError(f'{error}, or "{low}%" to "100%"') from None
    return parse, {"oneOf": [numbers.schema, {"type": "string", "pattern": f"^{percents}$"}]}


def _label_key(value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LABEL_KEY_CHARS or not is_plain(value):
        raise ValueError(f"must be the key of a label: 1 to {MAX_LABEL_KEY_CHARS} {PLAIN_TEXT}")
    return value


_LABEL_KEY_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_LABEL_KEY_CHARS, "format": "line"}
LABEL_VALUE_SCHEMA = {"type": "string", "maxLength": MAX_LABEL_CHARS, "format": "line"}


def labels_schema(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of an object with keys of labels, by the schema of its values."""
    return {"type": "object", "maxProperties": MAX_LABELS, "propertyNames": _LABEL_KEY_SCHEMA,
            "additionalProperties": values}


# Values of one label among which a node's may be.
MAX_LABEL_VALUES = 1000
LABEL_CHOICE_SCHEMA = labels_schema({"oneOf": [LABEL_VALUE_SCHEMA, {
    "type": "array", "minItems": 1, "maxItems": MAX_LABEL_VALUES, "uniqueItems": True, "items": LABEL_VALUE_SCHEMA}]})


def parse_label_choice(value: Any) -> dict[str, frozenset[str]]:
    """Return from each label's key the values of which a node must have one; raise ValueError for anything else."""
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        raise ValueError(f'must be an object of at most {MAX_LABELS} labels, like {{"region":"eu"}}')
    return {_label_key(key): _label_texts(key, values) for key, values in value.items()}


def _label_texts(key: str, value: Any) -> frozenset[str]:
    texts = value if isinstance(value, list) else [value]
    if not 1 <= len(texts) <= MAX_LABEL_VALUES or not all(
            isinstance(text, str) and len(text) <= MAX_LABEL_CHARS and is_plain(text) for text in texts):
        raise ValueError(f"must have for {one_line(key, 30)} a value, or a list of 1 to {MAX_LABEL_VALUES} of them: "
                         f"at most {MAX_LABEL_CHARS} {PLAIN_TEXT}")
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"must not have the value {one_line(twice, 60)} of {one_line(key, 30)} twice")
    return frozenset(texts)


def _first(value: Any) -> dict[str, frozenset[str]]:
    if value == {}:
        raise ValueError("must name a label: without one all nodes would be in batch 1")
    return parse_label_choice(value)


_PER_LABEL = Range(1, MAX_NODES)


def _limits_per_label(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_LABELS:
        raise ValueError(f'must be an object of 1 to {MAX_LABELS} labels, like {{"rack":1}}')
    return {_label_key(key): int(_PER_LABEL.from_json(number)) for key, number in value.items()}


_BATCH_SIZE, _BATCH_SIZE_SCHEMA = _share(1)
_REPEATED_SIZE = r"^([1-9][0-9]{0,5}|1000000|([1-9][0-9]?|100)%)\*$"
_BATCH_NUMBERS = Range(1, MAX_NODES)


def _batch_sizes(value: Any) -> tuple[int | str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_BATCHES:
        raise ValueError(f"must be a list of 1 to {MAX_BATCHES} sizes")
    *sizes, last = value
    if any(isinstance(size, str) and size.endswith("*") for size in sizes):
        raise ValueError("has a * at a size that is not the last one: only that one may go on to the end")
    return *map(_BATCH_SIZE, sizes), _last_size(last)


def _last_size(value: Any) -> int | str:
    """Return a size, or a text like "20*" or "10%*": such a size goes on to the end."""
    if not isinstance(value, str) or not value.endswith("*"):
        return _BATCH_SIZE(value)
    size = value[:-1]
    return f"{_BATCH_SIZE(int(size) if re.fullmatch('[1-9][0-9]{0,8}', size) else size)}*"


def _batch_numbers(value: Any) -> tuple[int, ...] | str:
    if value == EACH:
        return EACH
    if not isinstance(value, list) or len(value) > MAX_BATCHES:
        raise ValueError(f'must be a list of batch numbers, or "{EACH}"')
    return tuple(map(_BATCH_NUMBERS.from_json, value))


def _on_exceed(value: Any) -> str:
    if value not in ON_EXCEED:
        raise ValueError(f'must be "{FAIL}", "{PAUSE}" or "{ROLLBACK}"')
    return str(value)


def parse_time(value: Any) -> str:
    """Return an RFC 3339 time as stored, in UTC; raise ValueError for anything else."""
    # RFC 3339, 5.6: T and Z may be in lower case, a fraction of any length; it is rounded to milliseconds
    match = isinstance(value, str) and re.fullmatch(
        r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d{1,30})?(Z|[+-]\d\d:\d\d)", value, re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError("must be a time with its zone, like 2026-01-31T22:00:00Z")
    try:
        return utc_text(epoch_of(f"{match[1]}T{match[2]}{match[4].upper()}") + float(match[3] or 0))
    except (ValueError, OverflowError):
        raise ValueError("must be a time that exists, like 2026-01-31T22:00:00Z") from None


VERIFY_URL = r"https?://(\{main_ip\}|\{name\})(:[0-9]{1,5})?([/?]([!$-;=?-Z_a-z~%]|\{main_ip\}|\{name\})*)?"


def _verify_url(value: Any) -> str:
    """Return the URL of a probe, whose host is the node itself: a probe goes nowhere else."""
    if not isinstance(value, str) or len(value) > 500 or not re.fullmatch(VERIFY_URL, value):
        raise ValueError("must be http:// or https:// with the host {main_ip} or {name}, "
                         "like http://{main_ip}:8080/health, and no other {...} in it")
    port = re.match(r"https?://[^/?:]*:([0-9]+)", value)
    if port and not PORTS.low <= int(port[1]) <= PORTS.high:
        raise ValueError("has a port that is not from 1 to 65535")
    return value


VERIFY_HOST = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"


def _verify_host(value: Any) -> str:
    """Return the name of a site; it has no influence on where a probe goes."""
    if not isinstance(value, str) or len(value) > 253 or not re.fullmatch(f"({VERIFY_HOST})?", value):
        raise ValueError("must be a host name, like www.example.com")
    return value


def _verify_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 500:
        raise ValueError("must be a text of at most 500 characters")
    return value


# From a key of verify to its field, parser and JSON Schema.
VERIFY_KEYS: Mapping[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "url": ("url", _verify_url, {"type": "string", "maxLength": 500, "pattern": f"^{VERIFY_URL}$"}),
    "status": ("status", *Range(100, 599).json),
    "timeoutSec": ("timeout_s", *Range(0.1, 60, float).json),
    "successes": ("successes", *Range(1, 100).json),
    "host": ("host", _verify_host, {"type": "string", "maxLength": 253, "pattern": f"^({VERIFY_HOST})?$"}),
    "contains": ("contains", _verify_text, {"type": "string", "maxLength": 500}),
}


def _verify(value: Any) -> Verify:
    if not isinstance(value, dict):
        raise ValueError("must be an object with a url")
    fields = _fields(value, VERIFY_KEYS)
    if "url" not in fields:
        raise ValueError("needs a url")
    return Verify(**fields)


# From a key of a strategy (contract section 7) to its field, parser and JSON Schema.
STRATEGY_KEYS: Mapping[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "batches": ("batches", _batch_sizes, {
        "type": "array", "minItems": 1, "maxItems": MAX_BATCHES, "description": "only the last one may end with *",
        "items": {"oneOf": [*_BATCH_SIZE_SCHEMA["oneOf"], {"type": "string", "pattern": _REPEATED_SIZE}]}}),
    "batchBy": ("batch_by", _label_key, _LABEL_KEY_SCHEMA),
    "first": ("first", _first, {**LABEL_CHOICE_SCHEMA, "minProperties": 1}),
    "maxFailed": ("max_failed", *_share(0)),
    "maxFailedTotal": ("max_failed_total", *_share(0)),
    "maxParallel": ("max_parallel", *Range(0, MAX_NODES).json),
    "maxParallelPer": ("max_parallel_per", _limits_per_label,
                       {**labels_schema(_PER_LABEL.schema), "minProperties": 1}),
    "soakSec": ("soak_s", *Range(0, 604800, float).json),
    "pauseAfter": ("pause_after", _batch_numbers, {"oneOf": [
        {"type": "array", "maxItems": MAX_BATCHES, "items": _BATCH_NUMBERS.schema}, {"const": EACH}]}),
    "onExceed": ("on_exceed", _on_exceed, {"type": "string", "enum": list(ON_EXCEED)}),
    "nodeDeadlineSec": ("node_deadline_s", *Range(1, 604800, float).json),
    "retries": ("retries", *Range(0, 100).json),
    "startAt": ("start_at", parse_time, {"type": "string", "format": "date-time"}),
    "verify": ("verify", _verify, {
        "type": "object", "properties": {key: schema for key, (_, _, schema) in VERIFY_KEYS.items()},
        "required": ["url"], "additionalProperties": False}),
    "preflight": ("preflight", _flag, {"type": "boolean"}),
}


def _fields(value: Mapping[str, Any], keys: Mapping[str, tuple[str, Callable[[Any], Any], Any]]) -> dict[str, Any]:
    """Return the fields of an object with a table of keys; raise ValueError naming the first bad key."""
    fields = {}
    for key, member in value.items():
        if key not in keys:
            raise ValueError(f"{one_line(key, 60)} is not a known key{did_you_mean(key, keys)}")
        field, parse, _ = keys[key]
        try:
            fields[field] = parse(member)
        except ValueError as error:
            raise ValueError(f"{key} {one_line(to_json(member), 60)} {error}") from None
    return fields


def parse_strategy(value: object) -> Strategy:
    """Return a strategy from its JSON; raise AppError(INVALID) naming the first bad key."""
    if not isinstance(value, dict):
        raise AppError(INVALID, "strategy must be a JSON object")
    try:
        return Strategy(**_fields(value, STRATEGY_KEYS))
    except ValueError as error:
        raise AppError(INVALID, f"strategy: {error}") from None


def known_keys(body: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise AppError(INVALID) naming the first unknown key of body."""
    for key in body:
        if key not in known:
            raise AppError(INVALID, f"{one_line(key, 60)} is not a known key{did_you_mean(key, known)}")


def resolve_share(share: int | str, whole: int) -> int:
    """Return an integer as it is, "N%" as that share of whole, rounded down: "10%" of 19 is 1; a * is passed over."""
    number = str(share).rstrip("*")
    return whole * int(number[:-1]) // 100 if number.endswith("%") else int(number)


# endregion


# region Selection
# ======================================================================================
# Selection: for whom a release is, and the words by which nodes are chosen: names,
#   patterns, labels, exclusions. Pure.
# Uses: Vocabulary, Helpers, Model, Strategy.
# ======================================================================================

class Selection(NamedTuple):
    """For whom a release is: all nodes that are within each of these, and not excluded; None restricts nothing.

    nodes_of: the nodes that a release has, which may be this one; for releases of which nobody said more.
    """
    node_ids: frozenset[int] | None = None
    labels: LabelChoice = {}
    excluded_ids: frozenset[int] = frozenset()
    # A node is excluded by any of these.
    excluded_labels: LabelChoice = {}
    nodes_of: int | None = None

    def has(self, node: Node) -> bool:
        """Return whether a node is within it or excluded from it, as far as nodes_of does not tell."""
        return (self.node_ids is None or node.id in self.node_ids) and has_labels(node.label_values, self.labels)

    def excludes(self, node: Node) -> bool:
        """Return whether a node is excluded."""
        return node.id in self.excluded_ids or has_any_label(node.label_values, self.excluded_labels)

    def takes(self, node: Node) -> bool:
        """Return whether it takes a node, as far as nodes_of does not tell."""
        return self.has(node) and not self.excludes(node)


def has_any_label(values: Mapping[str, str], unwanted: LabelChoice) -> bool:
    """Return whether labels have, for any key, one of the unwanted values."""
    return any(values.get(key) in some for key, some in unwanted.items())


def parse_selection(value: Mapping[str, Any]) -> Selection:
    """Return a selection from the keys of its JSON; raise AppError(INVALID) naming the first bad one."""
    excluded = value.get("exclude", {})
    if not isinstance(excluded, dict):
        raise AppError(INVALID, 'exclude must be an object, like {"nodeIds":[3],"labels":{"role":"cache"}}')
    with prefixed("exclude: "):
        known_keys(excluded, ("nodeIds", "labels"))
        excluded_ids, excluded_labels = _ids_in(excluded) or frozenset(), _labels_in(excluded)
    return Selection(_ids_in(value), _labels_in(value), excluded_ids, excluded_labels,
                     parse_integer("nodesOf", value["nodesOf"], IDS) if "nodesOf" in value else None)


@contextlib.contextmanager
def prefixed(text: str) -> Iterator[None]:
    """Put a text before the message of an AppError."""
    try:
        yield
    except AppError as error:
        raise AppError(error.code, text + error.message) from None


def _ids_in(value: Mapping[str, Any]) -> frozenset[int] | None:
    return frozenset(parse_node_ids(value["nodeIds"])) if "nodeIds" in value else None


def _labels_in(value: Mapping[str, Any]) -> LabelChoice:
    try:
        return parse_label_choice(value.get("labels", {}))
    except ValueError as error:
        raise AppError(INVALID, f"labels {error}") from None


def selection_of(text: str) -> Selection | None:
    """Return a stored selection; None for one that can't be meant, which takes nobody: a person wrote it."""
    try:
        stored = parse_json(text)
        if "labels" in stored:  # a label may be a number there, as in the labels of a node
            stored["labels"] = {key: value if isinstance(value, (str, list)) else to_json(value)
                                for key, value in stored["labels"].items()}
        known_keys(stored, ("nodeIds", "labels", "exclude", "nodesOf"))
        return parse_selection(stored)
    except (ValueError, TypeError, AttributeError, AppError):
        return None


def parse_node_ids(value: object) -> list[int]:
    """Return the ids of selected nodes; raise AppError(INVALID) unless it is a list of different ids."""
    with contextlib.suppress(ValueError, TypeError):
        ids = list(map(IDS.from_json, value if isinstance(value, list) else ()))
        if ids and len(set(ids)) == len(ids):
            return ids
    raise AppError(INVALID, "nodeIds must be a list of different ids of nodes, like [1,2]")


def parse_label_pairs(field: str, pairs: Iterable[str]) -> dict[str, str]:
    """Return the labels of texts K=V; raise AppError(INVALID) naming the field they are of."""
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise AppError(INVALID, f"{field} {one_line(pair, 60)} must be K=V")
        if key in labels:
            raise AppError(INVALID, f"{field} {one_line(key, 60)} is given twice: a node has one value of each label")
        labels[key] = value
    return labels


def parse_label_words(field: str, texts: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return labels that nodes must have, and those that exclude a node, from texts of K=V, K=V1,V2 and K!=V.

    Several stand in one text, too: region=eu,us,role!=cache. Raise AppError(INVALID) naming the field they are of.
    """
    wanted: dict[str, list[str]] = {}
    unwanted: dict[str, list[str]] = {}
    for text in texts:
        values: list[str] = []
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if equals:
                labels, key = (unwanted, key[:-1]) if key.endswith("!") else (wanted, key)
                if key in wanted or key in unwanted:
                    raise AppError(INVALID, f"{field} {one_line(key, 60)} is given twice: name all its values at "
                                            "once, as in region=eu,us")
                values = labels[key] = []
            if not (key if equals else values and part):
                raise AppError(INVALID, f"{field} {one_line(text, 60)} must be K=V, K=V1,V2 or K!=V")
            values.append(value if equals else part)
    return _label_words_json(field, wanted), _label_words_json(field, unwanted)


def _label_words_json(field: str, labels: Mapping[str, list[str]]) -> dict[str, Any]:
    found = {key: values if values[1:] else values[0] for key, values in labels.items()}
    try:
        parse_label_choice(found)
    except ValueError as error:
        raise AppError(INVALID, f"{field} {error}") from None
    return found


class NodeWords(NamedTuple):
    """Nodes as a person chooses them; what is empty restricts nothing."""
    # Names, or patterns with *, ? and [...], of which one must fit.
    names: Sequence[str] = ()
    labels: LabelChoice = {}
    excluded_names: Sequence[str] = ()
    excluded_labels: LabelChoice = {}

    def takes(self, node: Node) -> bool:
        """Return whether they choose a node."""
        return ((not self.names or names_fit(tuple(self.names))(node.name))
                and has_labels(node.label_values, self.labels)
                and not (self.excluded_names and names_fit(tuple(self.excluded_names))(node.name))
                and not has_any_label(node.label_values, self.excluded_labels))

    def choose(self, nodes: Sequence[Node]) -> list[Node]:
        """Return the nodes that they choose; raise AppError(NOT_FOUND) for a name that is of none, or none at all."""
        refuse_unknown_names(self.excluded_names, nodes)
        text = choice_text(self.labels, self.excluded_labels)
        refuse_unknown_names(self.names, [node for node in nodes if has_labels(node.label_values, self.labels)
                                          and not has_any_label(node.label_values, self.excluded_labels)],
                             f" with {text}" if text else "")
        chosen = list(filter(self.takes, nodes))
        if not chosen and nodes:
            raise AppError(NOT_FOUND, self.why_none(nodes))
        return chosen

    def why_none(self, nodes: Sequence[Node]) -> str:
        """Return why they choose none of the nodes."""
        return why_no_match(nodes, self.names, self.labels, self.excluded_names, self.excluded_labels)


def node_words(names: Sequence[str], field: str, labels: Iterable[str], excluded: Sequence[str] = ()) -> NodeWords:
    """Return the words of a command; field: the option that the labels are of. Raise AppError(INVALID)."""
    wanted, unwanted = parse_label_words(field, labels)
    return NodeWords(names, parse_label_choice(wanted), excluded, parse_label_choice(unwanted))


@functools.lru_cache(maxsize=64)
def names_fit(names: tuple[str, ...]) -> Callable[[str], bool]:
    """Return whether a name is one of these, or fits one that is a pattern."""
    exact = frozenset(names)
    pattern = re.compile("|".join(fnmatch.translate(name) for name in names if is_pattern(name)) or "(?!)")
    return lambda name: name in exact or pattern.match(name) is not None


def is_pattern(name: str) -> bool:
    """Return whether a name stands for others."""
    return re.search(r"[*?\[]", name) is not None


def refuse_unknown_names(names: Iterable[str], nodes: Iterable[Node], within: str = "") -> None:
    """Raise AppError(NOT_FOUND) for a name that no node has, or a pattern that fits none; within: of what they are."""
    known = {node.name for node in nodes}
    for name in names:
        if name not in known and not any(map(names_fit((name,)), known)):
            raise AppError(NOT_FOUND, f"node {one_line(name, 100)} does not exist{within}")


def choice_text(labels: LabelChoice, unwanted: LabelChoice) -> str:
    """Return labels as on the command line: 'region=eu,us, role!=cache'."""
    return ", ".join([f"{key}{sign}{','.join(sorted(values))}" for sign, some in (("=", labels), ("!=", unwanted))
                      for key, values in some.items()])


def why_no_match(nodes: Sequence[Node], names: Sequence[str], labels: LabelChoice, excluded: Sequence[object],
                 excluded_labels: LabelChoice) -> str:
    """Return a sentence that names what was looked for, and the values that exist."""
    within = [node for node in nodes if has_labels(node.label_values, labels)]
    if labels and not within:
        return f"no node matches {choice_text(labels, {})} ({values_text(nodes, labels)})"
    words = [*([in_words(names)] if names else []), *([text] if (text := choice_text(labels, excluded_labels)) else []),
             *([f"without {in_words(excluded)}"] if excluded else [])]
    return f"no node matches {', '.join(words)}" + (
        f" ({values_text(nodes, excluded_labels)})" if excluded_labels else "")


def values_text(nodes: Iterable[Node], keys: Iterable[str]) -> str:
    """Return 'values of region: ap, eu, us', of a key that no node has which keys there are."""
    found: dict[str, set[str]] = {}
    for values in {node.labels: node.label_values for node in nodes}.values():
        for key, value in values.items():
            found.setdefault(key, set()).add(value)
    return "; ".join(f"values of {key}: {in_words(sorted(found[key]))}" if key in found else
                     f"no node has the label {key}{did_you_mean(key, found)}" + (
                         f"; labels: {in_words(sorted(found))}" if found else "") for key in keys)


# endregion


# region Plan
# ======================================================================================
# Plan: the nodes chosen, batches, payloads; who is left out and why. Pure.
# Uses: Vocabulary, Helpers, Difference, Model, Strategy, Selection.
# ======================================================================================

class ReleaseRequest(NamedTuple):
    """The body of POST /api/v1/releases; node_ids and labels are None where they restrict nothing.

    names and excluded_names, which may be patterns, are the command line's, in place of ids.
    """
    target: str = "cdn"
    reason: str = ""
    payload: Mapping[str, Any] = {}
    retry_of: int | None = None
    rollback_of: int | None = None
    strategy: Mapping[str, Any] = {}
    node_ids: Sequence[int] | None = None
    labels: Mapping[str, Any] | None = None
    version: int | None = None
    catch_up_of: int | None = None
    exclude: Mapping[str, Any] = {}
    names: Sequence[str] = ()
    excluded_names: Sequence[str] = ()
    # Cancel the releases of the target that have not started.
    supersede: bool = False
    # As in Release.
    goes_first: bool = False
    during_freeze: bool = False
    # WANTED or AUTOMATIC; "": as the setting APPROVALS says.
    approval: str = ""
    # It goes without the approval that it needs.
    is_emergency: bool = False

    @property
    def is_again(self) -> bool:
        """Return whether it brings the payload of another release."""
        return (self.retry_of or self.rollback_of or self.catch_up_of) is not None


class LeftOut(NamedTuple):
    """A selected node that does not get the release, and why."""
    node_id: int
    name: str
    why: str


class Superseded(NamedTuple):
    """A release that had not started, and that another one cancels."""
    release_id: int
    version: int

    def __str__(self) -> str:
        return f"release {self.release_id} (v{self.version})"


class Running(NamedTuple):
    """A release that nodes run, as id and version, how many of them, and whether its payload is the planned one.

    Without an id: nodes on which no release has succeeded yet, or of which it is not known what they run.
    """
    release_id: int | None
    version: int
    nodes: int
    is_same: bool
    is_unknown: bool = False


class Effect(NamedTuple):
    """What a payload changes on the nodes it would go to."""
    # Most nodes first.
    running: list[Running]
    # Against the release of another payload that most nodes run; its id, and why it can't be read.
    against: int | None = None
    difference: Difference | None = None
    unreadable: str = ""
    # Releases that have not ended, and may change what the nodes run before it does.
    open_releases: int = 0


class Plan(NamedTuple):
    """What a release will do, as integers: node ids and failure limit of each batch, and the nodes left out."""
    strategy: Strategy
    batches: list[list[int]]
    max_failed: list[int]
    max_failed_total: int | None
    left_out: Sequence[LeftOut]
    # Names of execute nodes whose sites the payload removes.
    emptied: Sequence[str] = ()
    # Nodes whose failure counts against no limit.
    tolerated: frozenset[int] = frozenset()
    # Id and version of the release whose payload is used again.
    payload_of: tuple[int, int] | None = None
    # The version that the release would get now.
    version: int = 0
    # Names of its nodes by id.
    names: Mapping[int, str] = {}
    # What it changes against what its nodes run.
    effect: Effect | None = None
    # Nodes that a retry could go to, and that nobody chose.
    not_chosen: int = 0
    # Whose nodes each batch has: "first", "region=eu", "no region"; "" where batches are by id alone.
    groups: Sequence[str] = ()
    # What the caller may not have meant.
    warnings: Sequence[str] = ()
    # For whom the release is, as it is stored: see Selection.
    selection: Mapping[str, Any] = {}
    # What it cancels.
    superseded: Sequence[Superseded] = ()
    # WANTED, EMERGENCY, or "" where it needs none.
    approval: str = ""
    # No freeze holds it.
    during_freeze: bool = False

    @property
    def pauses(self) -> list[int]:
        """Return the batches after which it pauses."""
        return [number for number in range(1, len(self.batches) + 1) if self.strategy.pauses_after(number)]

    @property
    def max_silent(self) -> int | None:
        """Return how many agents may not answer the preflight, None where they are not asked."""
        total = sum(map(len, self.batches))
        return _may_fail(self.strategy.silent_share, total) if self.strategy.preflight else None

    def __str__(self) -> str:
        """Return the plan as a line for the event."""
        limits = f"at most {in_words(self.max_failed)} failed" + (
            "" if self.max_failed_total is None else f", {self.max_failed_total} in all") + (
            "" if self.max_silent is None else f"; all agents are asked first, at most {self.max_silent} may be silent")
        return f"batches of {in_words([len(batch) for batch in self.batches])}; {limits}"


# Batches of a release, and nodes beyond which a last batch with most of them is worth a warning.
MAX_PLANNED_BATCHES, LARGE_BATCH = 10_000, 50


def plan_batches(node_ids: Sequence[int], sizes: Sequence[int | str] = NO_STRATEGY.sizes) -> list[list[int]]:
    """Return the nodes by batch; a share is of them all and at least 1, and the rest is the last batch.

    Sizes [1, "10%", "25%"] of 50 nodes are batches of 1, 5, 12 and 32; [1, "20*"] are 1, 20, 20 and 9.
    """
    batches, start = [], 0
    for size in (*sizes, len(node_ids)):
        repeats = isinstance(size, str) and size.endswith("*")
        number = max(1, resolve_share(size, len(node_ids)))
        end = len(node_ids) if repeats else start + number
        batches += [list(node_ids[at:min(at + number, end)]) for at in range(start, end, number)]
        start = end
    return [batch for batch in batches if batch]


# Name of the group that is batch 1.
FIRST = "first"


def grouped(strategy: Strategy, nodes: Iterable[Node]) -> list[tuple[str, list[int]]]:
    """Return the ids of the nodes by what the strategy's labels tell apart, each with its name, in order.

    With first role=canary and batchBy region: "first", "region=ap", "region=eu", "no region"; r2 comes before r11.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for node in nodes:
        values = node.label_values
        is_first = bool(strategy.first) and has_labels(values, strategy.first)
        place = (0, "") if is_first else (1, values[strategy.batch_by]) if strategy.batch_by in values else (2, "")
        groups.setdefault(place, []).append(node.id)
    key = strategy.batch_by
    names = {0: FIRST, 1: f"{key}=", 2: f"no {key}" if key else "others" if strategy.first else ""}
    return [(names[place] + value, groups[place, value]) for place, value in sorted(
        groups, key=lambda group: (group[0], in_order_of_numbers(group[1]), group[1]))]


def batches_of(strategy: Strategy, nodes: Iterable[Node]) -> list[tuple[str, list[int]]]:
    """Return the batches that a strategy makes of the nodes, each with the name of its group; no batch is empty.

    Where none of the nodes is of `first`, as in a retry after it succeeded there, one node goes first all the same, of
    the first group; with `batches` the first of these.
    """
    groups = grouped(strategy, nodes)
    is_without_first = bool(strategy.first) and all(name != FIRST for name, _ in groups)
    sizes = [strategy.sizes] * len(groups)
    if is_without_first and not strategy.batches:
        sizes[0] = NO_STRATEGY.sizes
    return [(name, batch) for (name, node_ids), of_group in zip(groups, sizes)
            for batch in ([node_ids] if name == FIRST else plan_batches(node_ids, of_group))]


def make_plan(strategy: Strategy, nodes: Sequence[Node], left_out: Sequence[LeftOut] = (),
              batches: list[list[int]] | None = None, tolerated: frozenset[int] = frozenset()) -> Plan:
    """Return the plan of a strategy; raise AppError(INVALID) where its batches are too many or it pauses after none.

    batches: given instead of computed. tolerated: nodes whose failure counts against no limit.
    """
    groups, warnings = [""] * len(batches or ()), _not_limited(strategy, nodes)
    if batches is None:
        named = batches_of(strategy, nodes)
        groups, batches = [name for name, _ in named], [batch for _, batch in named]
        warnings = [*_large_last_batch(strategy, named), *warnings]
        if len(batches) > MAX_PLANNED_BATCHES:
            raise AppError(INVALID, f"strategy: batches are {len(batches)}, and at most {MAX_PLANNED_BATCHES} can be: "
                                    "name larger sizes")
    beyond = [] if strategy.pause_after == EACH else [n for n in strategy.pause_after if int(n) > len(batches)]
    if beyond:
        raise AppError(INVALID, f"strategy: pauseAfter names batch {beyond[0]}, and there are {len(batches)}: name one "
                                f"of these, or {EACH}")
    total = None if strategy.max_failed_total is None else \
        _may_fail(strategy.max_failed_total, len(nodes), len(tolerated))
    limits = [_may_fail(strategy.max_failed, len(batch), len(tolerated.intersection(batch))) for batch in batches]
    return Plan(strategy, batches, limits, total, list(left_out), tolerated=tolerated, groups=groups,
                warnings=warnings)


def _may_fail(share: int | str, nodes: int, tolerated: int = 0) -> int:
    """Return how many of some nodes may fail: as many as a limit lets and those that it does not count, at most all."""
    return min(nodes, resolve_share(share, nodes) + tolerated)


def _large_last_batch(strategy: Strategy, batches: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """Return a warning where the last batch is what the sizes leave, and large; not where a size means it: "100%"."""
    (group, members), total = batches[-1], sum(len(batch) for _, batch in batches)
    last, cuts = len(members), sum(name == group for name, _ in batches)
    if last <= LARGE_BATCH or last * 2 <= total or cuts <= len(strategy.batches):
        return []
    size = str(strategy.batches[-1] if strategy.batches else "10%").rstrip("*")
    return [f"the last batch has {last} of {total} nodes: a last size with a * goes on to the end, like \"{size}*\""]


def _not_limited(strategy: Strategy, nodes: Sequence[Node]) -> list[str]:
    found = {key: [node.name for node in nodes if key not in node.label_values] for key in strategy.max_parallel_per}
    return [f"maxParallelPer does not limit those without {key}: {in_words(names)}"
            for key, names in found.items() if names]


def refuse_unknown_labels(strategy: Strategy, nodes: Sequence[Node]) -> None:
    """Raise AppError(INVALID) for a label of a strategy that none of the nodes has."""
    wanted = [("batchBy", [strategy.batch_by] if strategy.batch_by else []), ("first", strategy.first),
              ("maxParallelPer", strategy.max_parallel_per)]
    for field, keys in wanted:
        for key in keys:
            if not any(key in node.label_values for node in nodes):
                raise AppError(INVALID, f"strategy: {field}: {values_text(nodes, [key])}")
    if strategy.first and not any(has_labels(node.label_values, strategy.first) for node in nodes):
        raise AppError(INVALID, f"strategy: first: no node of the release matches {choice_text(strategy.first, {})} "
                                f"({values_text(nodes, strategy.first)})")


class Choice(NamedTuple):
    """The nodes that a release goes to, by id; the selected ones that are left out; and the selection as stored."""
    nodes: list[Node]
    left_out: list[LeftOut]
    stored: Mapping[str, Any] = {}
    warnings: Sequence[str] = ()


# Why a node is left out that the caller did not want.
EXCLUDED = "excluded"
# What a selection keeps of a pattern: it is read anew for nodes that come later, and names are not in it.
LATER_NODES = ("exclude: nodes that are added later, or renamed, are not excluded by a pattern of names, and count as "
               "behind: a label excludes them too (--label K!=V)")


def choose_nodes(nodes: Sequence[Node], request: ReleaseRequest) -> Choice:
    """Return whom a release goes to.

    Raise AppError(INVALID) for an id that is not of an enabled, online node, AppError(NOT_FOUND) for a name that no
    node has, AppError(WRONG_STATE) without nodes.
    """
    refuse_unknown_names([*request.names, *request.excluded_names], nodes)
    exact = {name for name in request.names if not is_pattern(name)}
    _refuse_named([*(request.node_ids or ()), *(node.id for node in nodes if node.name in exact)], nodes)
    stored = _selection_json(nodes, request)
    selection = parse_selection(stored)
    known = {node.id for node in nodes}
    for number in sorted(selection.excluded_ids - known):
        raise AppError(INVALID, f"exclude: node {number} does not exist")
    within = [node for node in nodes if selection.has(node)]
    chosen = [node for node in within if node.gets_releases and not selection.excludes(node)]
    if not chosen:
        raise AppError(WRONG_STATE, _why_no_nodes(nodes, within, selection))
    ids = {node.id for node in chosen}
    left_out = [LeftOut(node.id, node.name, EXCLUDED if selection.excludes(node) else node.condition)
                for node in within if node.id not in ids]
    later = [LATER_NODES] if any(map(is_pattern, request.excluded_names)) and "nodeIds" not in stored else []
    return Choice(chosen, left_out, stored, [*_excluding_nobody(nodes, within, selection), *later])


def _refuse_named(node_ids: Iterable[int], nodes: Iterable[Node]) -> None:
    by_id = {node.id: node for node in nodes}
    for number in node_ids:
        if number not in by_id:
            raise AppError(INVALID, f"nodeIds: node {number} does not exist")
        if not by_id[number].gets_releases:
            raise AppError(INVALID, f"nodeIds: node {by_id[number].name} is {by_id[number].condition}: leave it out, "
                                    "or let it get releases (enabled, online)")


def _selection_json(nodes: Sequence[Node], request: ReleaseRequest) -> dict[str, Any]:
    """Return a request's selection as it is stored, with ids in place of names."""
    def with_names(node_ids: Iterable[int], names: Sequence[str]) -> list[int]:
        fits = names_fit(tuple(names))
        return sorted({*node_ids, *(node.id for node in nodes if fits(node.name))} if names else node_ids)

    excluded_ids = with_names(request.exclude.get("nodeIds", ()), request.excluded_names)
    exclude = {key: value for key, value in (("nodeIds", excluded_ids), ("labels", request.exclude.get("labels")))
               if value}
    has_ids = request.node_ids is not None or bool(request.names)
    return {**({"nodeIds": with_names(request.node_ids or (), request.names)} if has_ids else {}),
            **({} if request.labels is None else {"labels": request.labels}),
            **({"exclude": exclude} if exclude else {})}


def _why_no_nodes(nodes: Sequence[Node], within: Sequence[Node], selection: Selection) -> str:
    text = choice_text(selection.labels, {})
    if not within and text:
        return why_no_match(nodes, (), selection.labels, (), {})
    if within and all(map(selection.excludes, within)):
        return f"no node is left: exclude names all of the {len(within)} that were selected"
    return f"no online nodes{f' with {text}' if text else ''}: add one, or enable one and set it online"


def _excluding_nobody(nodes: Sequence[Node], within: Sequence[Node], selection: Selection) -> list[str]:
    """Return a warning for each label of exclude that excludes nobody: it may be mistyped."""
    return [f"exclude: no selected node has {choice_text({key: values}, {})} ({values_text(nodes, [key])})"
            for key, values in selection.excluded_labels.items()
            if not any(node.label_values.get(key) in values for node in within)]


def left_out_nodes(nodes: Iterable[Node]) -> list[LeftOut]:
    """Return those of the nodes that get no releases now, and why."""
    return [LeftOut(node.id, node.name, node.condition) for node in nodes if not node.gets_releases]


def refuse_twins(nodes: Iterable[Node]) -> None:
    """Raise AppError(WRONG_STATE) for two nodes with one address, which would get a task twice at once (section 2)."""
    twins = twins_of(nodes)
    if twins:
        raise AppError(WRONG_STATE, twins_text(*twins))


def twins_of(nodes: Iterable[Node]) -> tuple[Node, Node] | None:
    """Return the first two nodes with one address, None where there are none."""
    seen: dict[Endpoint, Node] = {}
    pairs = ((seen.setdefault(node.endpoint, node), node) for node in nodes)
    return next(((first, second) for first, second in pairs if first is not second), None)


def twins_text(first: Node, second: Node) -> str:
    """Return that two nodes have one address."""
    return (f"nodes {first.name} and {second.name} have one address, {second.main_ip}:{second.agent_port}: disable one "
            "of them")


def refuse_dropping_sites(payload: Mapping[str, Any], nodes: Iterable[Node | ReleaseNode], code: int = INVALID,
                          what: str = "the payload") -> None:
    """Raise AppError where nodes would drop all their sites though the payload does not say so."""
    served = [node.name for node in nodes if node.dialect.needs_websites]
    if served and not isinstance(payload.get(WEBSITES), list):
        raise AppError(code, f"{what} has no list {WEBSITES}, and {names_of(served)} would drop all sites without it "
                             f'(protocol execute): name the sites, or "{WEBSITES}": [] where none is meant')


def names_of(names: Sequence[str]) -> str:
    """Return 'edge-1', or 'edge-1 and 3 more'."""
    return in_words(names, 1)


def parse_release_id(field: str, value: object) -> int:
    """Return the id of a release; raise AppError(INVALID) for what can't be one."""
    with contextlib.suppress(ValueError):
        return int(IDS.from_json(value))
    raise AppError(INVALID, f"{field} {one_line(value, 40)} must be the id of a release")


def parse_kinds(value: object) -> list[str]:
    """Return the error kinds of a list; raise AppError(INVALID) for anything else."""
    if not isinstance(value, list) or not value:
        raise AppError(INVALID, f"kinds must be a list of {', '.join(ERROR_KINDS)}")
    for kind in value:
        if kind not in ERROR_KINDS:
            raise AppError(INVALID, f"{one_line(kind, 40)} is no kind of failure"
                                    f"{did_you_mean(str(kind), ERROR_KINDS)}: take of {', '.join(ERROR_KINDS)}")
    return value


def new_tag() -> str:
    """Return eight hex digits that make the task ids of a release unique, over all databases."""
    return secrets.token_hex(4)


def task_id_for(release_type: str, main_ip: str, version: int, tag: str) -> str:
    """Return the agent's task id: one for all tries of a release on a node, and of no other (section 1).

    A release without a tag was under way when tags were introduced; agents know its ids without one.
    """
    return f"{release_type}_{main_ip}_{version}" + (f"_{tag}" if tag else "")


class Made(NamedTuple):
    """A release that was created, its nodes by batch, who was left out, and whether all its nodes run its payload."""
    release: Release
    batches: list[list[int]]
    left_out: Sequence[LeftOut] = ()
    is_unchanged: bool = False
    # As in Plan.
    warnings: Sequence[str] = ()
    superseded: Sequence[Superseded] = ()


class OldRelease(NamedTuple):
    """What prune needs of a release; ended_at is "" while it is not terminal."""
    id: int
    target: str
    version: int
    status: str
    retry_of: int | None
    rollback_of: int | None
    total_nodes: int
    ended_at: str
    catch_up_of: int | None = None


class Content(NamedTuple):
    """What a release brought: its payload as a digest, the nodes that it touched and those where it succeeded.

    is_bad: somebody rolled it back, or the same payload later on.
    """
    digest: str
    touched: frozenset[int]
    succeeded: frozenset[int]
    is_bad: bool = False


def prunable(releases: Iterable[OldRelease], before: str, keep: int, content_of: Callable[[OldRelease], Content],
             needed: Set[int] = frozenset()) -> list[OldRelease]:
    """Return the releases that nobody needs any more, newest first.

    These stay:
    - of each target the newest `keep`, and all that have not ended, or ended after `before`;
    - for each node and target its newest success, and what a rollback of a release that stays would bring back:
      the newest success before that release, with another payload, that nobody rolled back;
    - what a release that stays is a retry, a rollback or a catch-up of;
    - the releases `needed`: those that tell what a node runs or should run, and the one with the newest event.

    So the highest version and the highest event id stay, and neither is given out again.
    """
    goes = []
    seen: dict[str, int] = {}
    named: set[int | None] = set()
    # Target and node of each success that stays; under True those of a payload that somebody rolled back.
    known: dict[bool, set[tuple[str, int]]] = {False: set(), True: set()}
    # By target and node: payloads of releases that stay and have no success to roll back to yet.
    wanting: dict[tuple[str, int], set[str]] = {}
    for release in sorted(releases, key=lambda r: -r.version):
        seen[release.target] = seen.get(release.target, 0) + 1
        stays = seen[release.target] <= keep or not release.ended_at or release.ended_at >= before
        content, target = content_of(release), release.target
        better = known[content.is_bad], known[False]
        served = [node for node in content.succeeded if not any((target, node) in some for some in better) or (
            not content.is_bad and wanting.get((target, node), set()) - {content.digest})]
        if not stays and not served and release.id not in named | needed:
            goes.append(release)
            continue
        named |= {release.retry_of, release.rollback_of, release.catch_up_of}
        for node in content.succeeded:
            known[content.is_bad].add((target, node))
            if not content.is_bad:
                wanting[target, node] = wanting.get((target, node), set()) & {content.digest}
        for node in content.touched if stays else ():
            wanting.setdefault((target, node), set()).add(content.digest)
    # a rollback stays with the release that it rolled back: it shows that the payload was bad
    gone = {release.id for release in goes}
    return [release for release in goes if release.rollback_of is None or release.rollback_of in gone]


# endregion


# region Failures
# ======================================================================================
# Failures: the nodes of a release that failed, grouped by cause. Pure.
# Uses: Vocabulary, Helpers, Model.
# ======================================================================================

# Groups that are shown; the nodes of all others are counted together.
MAX_GROUPS = 10
# Nodes of a group that are named.
MAX_GROUP_NODES = 20
# Length of a pattern: what differs only after that is one cause. A text with more numbers is no sentence: all are N.
MAX_PATTERN_CHARS, MAX_NUMBERS = 200, 32
# Length of a pattern in a sentence.
MAX_CAUSE_CHARS = 100
# In place of the error_kind: of a row that a person wrote without one, and of the groups that are not shown.
NO_KIND, OTHERS = "other", "others"

# A number, or an id with a digit in it: 443, 12ms, 9f3a61c0, b2f41d04; not the letters of x509 and sha256.
_NUMBER = re.compile(r"(?:(?<![^\W_])[a-fA-F]+)?[0-9][0-9A-Za-z]*")
# The same where each run of digits is a NUL; a search for a NUL is many times faster.
_FOLDED, _FOLDED_ID = re.compile(r"\0[A-Za-z\0]*"), re.compile(r"(?<![^\W_])[a-fA-F]+\0")
_MAY_BE_ID = re.compile(r"[a-fA-F]\0")
_DIGITS_TO_NUL = bytes.maketrans(b"0123456789", bytes(10))


# What to do about each of ERROR_KINDS.
ERROR_HINTS: Mapping[str, str] = {
    UNREACHABLE: "Nothing answers there. Is the host up, the agent running, its port open to us?",
    TLS: "TLS failed. Check both certificates (releasectl check) and the agent's log.",
    TIMEOUT: "The agent did not answer in time. Check its load and its log.",
    HTTP: "The agent answered with an HTTP error. Is this the right port?",
    PROTOCOL: "Unexpected answer. Does the node's protocol (tasks or execute) match its agent?",
    REJECTED: "The agent refused this version; a new release brings a new one.",
    AGENT_FAILED: "The agent tried and failed. Fix what its message names on the host, then retry.",
    VERIFY: "The agent succeeded, the probe of the service did not. Check the service on the host.",
    DEADLINE: "The task did not end in time. Check what the agent is doing, then retry.",
    ABANDONED: "The outcome is unknown. Check the host, then retry.",
}

# Key and value.
_Label = tuple[str, Any]


class FailedNode(NamedTuple):
    """A failed node of a release, with its labels as its row has them."""
    node_id: int
    name: str
    main_ip: str
    task_id: str
    error_kind: str
    error_msg: str
    labels: str = "{}"


class SharedLabel(NamedTuple):
    """A label, and how many nodes of a group have it."""
    key: str
    value: str
    nodes: int


class FailureGroup(NamedTuple):
    """Nodes of a release that failed for one cause."""
    # error_kind, or OTHERS.
    kind: str
    # What their messages have in common: "bind to :443 in use", "{main_ip}: HTTP N".
    pattern: str
    size: int
    # Id and name of the first MAX_GROUP_NODES, by id.
    nodes: Sequence[tuple[int, str]] = ()
    # What most of them share, and the other nodes of the release do not.
    label: SharedLabel | None = None

    def __str__(self) -> str:
        """Return '12 unreachable, 9 of 12 in pop=gru: no route to host (edge-1 and 11 more)'."""
        if self.kind == OTHERS:
            return f"{self.size} more with {self.pattern}"
        shared = f", {self.label.nodes} of {self.size} in {self.label.key}={self.label.value}" if self.label else ""
        more = f" and {self.size - 1} more" if self.size > 1 else ""
        return (f"{self.size} {self.kind or NO_KIND}{shared}"
                + (f": {self.pattern}" if self.pattern else "") + f" ({self.nodes[0][1]}{more})")


def group_failures(failed: Iterable[FailedNode], labels: Mapping[str, int] = {}) -> list[FailureGroup]:  # noqa: B006
    """Return failed nodes by cause, most nodes first, then by kind and pattern; the order of the rows does not matter.

    A cause is an error_kind and the pattern of a message, without what is the node's own: {name}, {main_ip} and
    {task_id} stand for its name, address and task. A number stays where all of the group have the same one, else it
    is N:

        edge-1, 10.0.0.1: "10.0.0.1:8443: HTTP 503 after 12 ms"  \\  {main_ip}:8443: HTTP 503 after N ms
        edge-2, 10.0.0.2: "10.0.0.2:8443: HTTP 503 after 9 ms"   /
        edge-3, 10.0.0.3: "bind to :443 in use"                     bind to :443 in use

    After MAX_GROUPS one last group, OTHERS, counts the remaining nodes. labels: how many nodes of the release have
    which labels, as their rows have them.
    """
    nodes, shapes, by_digits = list(failed), dict[str, str](), dict[bytes, str]()
    texts = list(map(_without_own, nodes))
    for text in texts:
        if text not in shapes:
            # most messages that differ do so by their digits alone: the slow part is done once for all of them
            folded = _fold_digits(text)
            if folded not in by_digits:
                by_digits[folded] = _fold_ids(folded)
            shapes[text] = by_digits[folded]
    causes = [(node.error_kind, shapes[text]) for node, text in zip(nodes, texts)]
    sizes = collections.Counter(causes)
    members: dict[tuple[str, str], list[tuple[FailedNode, str]]] = {
        cause: [] for cause in heapq.nsmallest(MAX_GROUPS, sizes, lambda cause: (-sizes[cause], cause))}
    for cause, node, text in zip(causes, nodes, texts):
        if cause in members:
            members[cause].append((node, text))
    common = [_common_labels([node for node, _ in found]) for found in members.values()]
    having = _count_labels(labels, set[_Label]().union(*common))
    groups = [FailureGroup(kind, one_line(_pattern(shape, {text for _, text in found})), len(found),
                           [(node.node_id, node.name) for node, _ in heapq.nsmallest(MAX_GROUP_NODES, found)],
                           _shared_label(len(found), shared, having, sum(labels.values())))
              for ((kind, shape), found), shared in zip(members.items(), common)]
    others = len(sizes) - len(groups)
    if others:
        groups.append(FailureGroup(OTHERS, f"{others} other cause{'' if others == 1 else 's'}",
                                   len(nodes) - sum(group.size for group in groups)))
    return groups


def _without_own(node: FailedNode) -> str:
    """Return the message of a node without what is its own."""
    text = node.error_msg[:MAX_MESSAGE_CHARS].replace("\0", " ")
    if node.task_id in text:
        text = _replace_word(text, node.task_id, "{task_id}")
    if node.main_ip in text:
        text = _replace_word(text, node.main_ip, "{main_ip}")
    return _replace_word(text, node.name, "{name}") if node.name in text else text


def _replace_word(text: str, own: str, stands_for: str) -> str:
    """Return a text with another word in place of one, which edge-1 in edge-12 is not; digits alone are a number."""
    if not own or own.isdigit():
        return text
    before, *others = text.split(own)
    replaced = before
    for after in others:
        replaced += (own if before[-1:].isalnum() or after[:1].isalnum() else stands_for) + after
        before = after
    return replaced


def _fold_digits(text: str) -> bytes:
    """Return a text with a NUL for each run of digits."""
    folded = text.encode(errors="surrogatepass").translate(_DIGITS_TO_NUL)
    while b"\0\0" in folded:
        folded = folded.replace(b"\0\0", b"\0")
    return folded


def _fold_ids(folded: bytes) -> str:
    """Return the beginning of a text, with a NUL for each number, or id with a digit in it."""
    text = folded.decode(errors="surrogatepass")
    if folded.count(b"\0") > MAX_NUMBERS:
        text = text.replace("\0", "N")
    elif "\0" in text:
        text = _FOLDED.sub("\0", text)
        if _MAY_BE_ID.search(text):
            text = _FOLDED_ID.sub("\0", text)
    return text[:MAX_PATTERN_CHARS]


def _pattern(shape: str, texts: Collection[str]) -> str:
    """Return a shape with the numbers that are the same in all texts, and N for the others."""
    parts = shape.split("\0")
    numbers: list[str | None] = [*_NUMBER.findall(next(iter(texts)))[:len(parts) - 1]]
    has_these = _with_numbers(parts, numbers)
    for text in texts:
        if not has_these.match(text):
            numbers = [one if one == other else None for one, other in zip(numbers, _NUMBER.findall(text))]
            has_these = _with_numbers(parts, numbers)
    return parts[0] + "".join((number or "N") + part for number, part in itertools.zip_longest(numbers, parts[1:]))


def _with_numbers(parts: Sequence[str], numbers: Sequence[str | None]) -> re.Pattern[str]:
    """Return what matches the texts of a shape that have these numbers; None stands for any."""
    last = max((place for place, number in enumerate(numbers, 1) if number), default=0)
    return re.compile("".join(
        re.escape(part) + (f"{number}(?![0-9A-Za-z])" if number else "[0-9A-Za-z]+")
        for part, number in zip(parts, numbers[:last])))


def _common_labels(nodes: Sequence[FailedNode]) -> dict[_Label, int]:
    """Return the labels that more than half of the nodes have, and two at least; each with how many."""
    found = collections.Counter[_Label]()
    for text, number in collections.Counter(node.labels for node in nodes).items():
        found.update(dict.fromkeys(label_values(text).items(), number))
    return {label: number for label, number in found.items() if number > 1 and number > len(nodes) / 2}


def _count_labels(labels: Mapping[str, int], wanted: Set[_Label]) -> Mapping[_Label, int]:
    """Return how many nodes have each wanted label."""
    found = collections.Counter[_Label]()
    for text, number in labels.items() if wanted else ():
        found.update(dict.fromkeys(label_values(text).items() & wanted, number))
    return found


# How often, at most, chance makes a small group share one of its labels, however many these are, and we tell it.
MAX_CHANCE = 0.1


def _chance_of_all(size: int, having: int, total: int) -> float:
    """Return how probable it is that so many nodes, picked at random of a total, all have what some of these have."""
    return math.prod(max(0, having - picked) / max(1, total - picked) for picked in range(min(size, 100)))


def _shared_label(size: int, common: Mapping[_Label, int], having: Mapping[_Label, int],
                  total: int) -> SharedLabel | None:
    """Return the label that most of a group of some size share, and not by chance.

    Of 40 nodes 8 are in pop=gru: of a group of 12 there are 2.4 by chance, give or take 1.4 (the standard deviation).
    9 of 12 are far more. Where 3 in 4 of all nodes are in pop=gru, 9 of 12 say nothing. A group may be too small for
    that: where 4 of 12 are in pop=gru, 3 of 3 are there by chance in 1 of 55 cases.
    """
    shared, keys = [], len({key for key, _ in common})
    for (key, value), number in common.items():
        share = having[key, value] / total if total else 1.0
        beyond = number - size * share
        is_whole = number == size > 1 and _chance_of_all(size, having[key, value], total) * keys <= MAX_CHANCE
        if beyond > 0 and (is_whole or beyond**2 >= 9 * size * share * (1 - share)):
            shared.append((-beyond, key, str(value), number))
    return SharedLabel(*min(shared)[1:]) if shared else None


def failures_json(failures: Iterable[FailureGroup]) -> list[dict[str, Any]]:
    """Return the failed nodes of a release by cause; label is null where they share none."""
    return [{"errorKind": group.kind, "message": group.pattern, "nodes": group.size,
             "nodeIds": [node_id for node_id, _ in group.nodes], "nodeNames": [name for _, name in group.nodes],
             "label": group.label._asdict() if group.label else None, "hint": ERROR_HINTS.get(group.kind, "")}
            for group in failures]


def kinds_text(kinds: Iterable[str]) -> str:
    """Return '17 agent_failed, 12 unreachable', the most frequent kind first."""
    counted = collections.Counter(kind or NO_KIND for kind in kinds)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items(), key=lambda one: (-one[1], one[0])))


def causes_text(failed: Collection[ReleaseNode]) -> str:
    """Return '17 agent_failed (bind to :443 in use), 12 unreachable': of the first kind the cause that most have."""
    text = kinds_text(node.error_kind for node in failed)
    first = text.partition(",")[0]
    kind = first.partition(" ")[2]
    nodes = [FailedNode(n.node_id, n.name, n.main_ip, n.task_id, n.error_kind, n.error_msg) for n in failed
             if (n.error_kind or NO_KIND) == kind]
    largest = next(iter(group_failures(nodes)), None)
    if largest is None or not largest.pattern or largest.size <= len(nodes) / 2:
        return text
    some = "" if largest.size == len(nodes) else f"{largest.size} of them: "
    return f"{first} ({some}{one_line(largest.pattern, MAX_CAUSE_CHARS)}){text[len(first):]}"

# endregion


# region Node index
# ======================================================================================
# Node index: the nodes of a release by what a decision needs, and which of them may go
#   next. Pure.
# Uses: Vocabulary, Model.
# ======================================================================================

# Nodes of one part of a NodeMap: what a change copies.
NODES_OF_A_PART = 1024


class NodeMap(Mapping[int, ReleaseNode]):
    """Nodes by id, ordered by batch and then about by id; a copy shares what neither of the two changes."""

    def __init__(self, part_of: Mapping[int, int]):
        """Take the number of each node's part, in order."""
        self._part_of = part_of
        self._parts: list[dict[int, ReleaseNode]] = [{} for _ in range(max(part_of.values(), default=0) + 1)]
        # Parts that no copy shares.
        self._own = set(range(len(self._parts)))
        self._size = 0

    def copy(self) -> NodeMap:
        """Return an independent copy."""
        other = NodeMap.__new__(NodeMap)
        other._part_of, other._parts, other._size = self._part_of, self._parts.copy(), self._size
        self._own, other._own = set(), set()
        return other

    def __setitem__(self, node_id: int, node: ReleaseNode) -> None:
        part = self._writable(node_id)
        self._size += node_id not in part
        part[node_id] = node

    def __delitem__(self, node_id: int) -> None:
        del self._writable(node_id)[node_id]
        self._size -= 1

    def __getitem__(self, node_id: int) -> ReleaseNode:
        return self._parts[self._part_of[node_id]][node_id]

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self._parts)

    def __len__(self) -> int:
        return self._size

    def values(self) -> ValuesView[ReleaseNode]:
        return _NodesOf(self)

    def last_part(self) -> Iterable[ReleaseNode]:
        """Return the nodes of the last part that has any: those of the highest batch are among them."""
        return next(filter(None, reversed(self._parts)), {}).values()

    def _writable(self, node_id: int) -> dict[int, ReleaseNode]:
        number = self._part_of[node_id]
        if number not in self._own:
            self._parts[number] = self._parts[number].copy()
            self._own.add(number)
        return self._parts[number]


class _NodesOf(ValuesView[ReleaseNode]):
    """NodeMap.values()"""
    _mapping: NodeMap

    def __iter__(self) -> Iterator[ReleaseNode]:
        return itertools.chain.from_iterable(map(dict.values, self._mapping._parts))


# A label's key and value.
Label = tuple[str, str]
Limits = Mapping[str, int]


class Turn(NamedTuple):
    """The place of a queue, the nodes of a batch with the same labels: the fewer have begun, the earlier it comes."""
    begun: int
    # Its first pending node, and where that is in the queue.
    node_id: int
    place: int
    labels: str


class _Turns:
    """The queues of a batch that have pending nodes.

    A queue found with a full label waits for that one, with all others that do, and is not examined before it has room:
    of 1,000 racks in a region that is full, none.
    """

    def __init__(self, turns: Mapping[str, Turn]):
        # By their labels, with the label that each waits for; None: it may go, as far as is known.
        self.of: dict[str, tuple[Turn, Label | None]] = {labels: (turn, None) for labels, turn in turns.items()}
        # In order, by the label that they wait for.
        self.waiting: dict[Label | None, list[Turn]] = {None: sorted(turns.values())}
        # The labels of those lists that no copy shares.
        self._own: set[Label | None] = {None}

    def copy(self) -> _Turns:
        """Return an independent copy."""
        other = _Turns.__new__(_Turns)
        other.of, other.waiting = self.of.copy(), self.waiting.copy()
        self._own, other._own = set(), set()
        return other

    def put(self, labels: str, turn: Turn | None, waits_for: Label | None = None) -> None:
        """Replace the turn of a queue; None: it has no pending node any more."""
        before, label = self.of.pop(labels)
        turns = self._writable(label)
        del turns[bisect.bisect_left(turns, before)]
        if not turns and label is not None:
            del self.waiting[label]
        if turn is not None:
            self.of[labels] = turn, waits_for
            bisect.insort(self._writable(waits_for), turn)

    def _writable(self, label: Label | None) -> list[Turn]:
        if label not in self._own or label not in self.waiting:
            self.waiting[label] = self.waiting.get(label, []).copy()
            self._own.add(label)
        return self.waiting[label]


def _is_probed(node: ReleaseNode) -> bool:
    return node.status == SUCCESS and (node.next_op != "" or node.verdict is not None)


def _is_unverified(node: ReleaseNode) -> bool:
    return node.status == SUCCESS and not node.is_reverified


class NodeIndex:
    """The nodes of a release, indexed by what a decision needs.

    A release of ten thousand nodes has a thousand decisions: each examines and copies only the nodes at work.
    """

    def __init__(self, nodes: Iterable[ReleaseNode] = ()):
        """Take all nodes, ordered by batch and id."""
        given = list(nodes)
        part_of = {n.node_id: place // NODES_OF_A_PART for place, n in enumerate(given)}
        self._nodes = NodeMap(part_of)
        # By status.
        self.of = {status: NodeMap(part_of) for status in (*OPEN, *AT_REST)}
        # Nodes of each batch.
        self.sizes: dict[int, int] = {}
        # Pending and running nodes of each batch.
        self._open: dict[int, int] = {}
        # Ids of each batch's nodes by their labels, both in order; the copies share them.
        self._queues: dict[int, dict[str, list[int]]] = {}
        # What of a node's labels limits are for, by its labels; the copies share it, as a release has the same limits.
        self._limited: dict[str, list[Label]] = {}
        # Pending nodes that are in flight: the database has lost the commit of their dispatch.
        self.astray: dict[int, ReleaseNode] = {}
        # Successful nodes that are probed again.
        self.probed = {n.node_id: n for n in given if _is_probed(n)}
        # Of each batch: successful nodes that are not re-verified, and failed ones that count against a limit.
        self._unverified: collections.Counter[int] = collections.Counter()
        self.failures: collections.Counter[int] = collections.Counter()
        # Of a preflight: pending nodes that were asked, those that do not answer, and how many answered.
        self.asking: dict[int, ReleaseNode] = {}
        self.silent: dict[int, ReleaseNode] = {}
        self.answered = 0
        # Ids in order, where each batch begins there, and up to where all have begun what _fresh() is for: as that is
        # never undone, the copies share it.
        self._order = [n.node_id for n in given]
        self._first: dict[int, int] = {}
        self._passed: dict[int, int] = {}
        named = collections.Counter(n.endpoint for n in given)
        # Addresses that several rows have; a person wrote them.
        self.twins = frozenset(endpoint for endpoint, count in named.items() if count > 1)
        # Highest version that any of the nodes was ever sent.
        self.highest_sent = max((n.last_version for n in given), default=0)
        for place, n in enumerate(given):
            self.of[n.status][n.node_id] = self._nodes[n.node_id] = n
            self._first.setdefault(n.batch, place)
            self._count(n, 1)
            self.sizes[n.batch] = self.sizes.get(n.batch, 0) + 1
            self._open[n.batch] = self._open.get(n.batch, 0) + (n.status in OPEN)
            self._queues.setdefault(n.batch, {}).setdefault(n.labels, []).append(n.node_id)
            if n.status == PENDING:
                self._note_pending(n)
        self._batches = sorted(self.sizes)
        # Whose turn it is in each batch, and of which batches no copy shares that.
        self._turns = {batch: _Turns(self._first_turns(queues)) for batch, queues in self._queues.items()}
        self._own_turns = set(self._turns)

    def __iter__(self) -> Iterator[ReleaseNode]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, node_id: int) -> ReleaseNode:
        return self._nodes[node_id]

    def get(self, node_id: int) -> ReleaseNode | None:
        """Return a node by its id, or None."""
        return self._nodes.get(node_id)

    def copy(self) -> NodeIndex:
        """Return an independent copy."""
        other = NodeIndex.__new__(NodeIndex)
        other._nodes, other.sizes, other._open = self._nodes.copy(), self.sizes, self._open.copy()
        other.of, other._batches = {status: found.copy() for status, found in self.of.items()}, self._batches
        other.twins, other.highest_sent, other._queues = self.twins, self.highest_sent, self._queues
        other._limited, other.astray, other.probed = self._limited, self.astray.copy(), self.probed.copy()
        other._unverified, other.failures, other.answered = self._unverified.copy(), self.failures.copy(), self.answered
        other.asking, other.silent = self.asking.copy(), self.silent.copy()
        other._order, other._first, other._passed = self._order, self._first, self._passed
        other._turns = self._turns.copy()
        self._own_turns, other._own_turns = set(), set()
        return other

    def put(self, node: ReleaseNode) -> None:
        """Replace a node."""
        before = self._nodes[node.node_id]
        if before.status != node.status:
            del self.of[before.status][node.node_id]
            self._open[node.batch] += (node.status in OPEN) - (before.status in OPEN)
            if before.status == PENDING:
                self._end_turn(node)
        if before.status == PENDING:
            self.answered -= before.has_answered
            self._note_pending(node)
        if _is_probed(node):
            self.probed[node.node_id] = node
        else:
            self.probed.pop(node.node_id, None)
        self._count(before, -1)
        self._count(node, 1)
        self.of[node.status][node.node_id] = self._nodes[node.node_id] = node

    def _count(self, node: ReleaseNode, by: int) -> None:
        if _is_unverified(node):
            self._unverified[node.batch] += by
        elif node.status == FAILED and not node.accepted:
            self.failures[node.batch] += by

    @property
    def open(self) -> list[ReleaseNode]:
        """Return the running and the pending nodes."""
        return [*self.of[RUNNING].values(), *self.of[PENDING].values()]

    @property
    def batch(self) -> int:
        """Return the lowest batch with a pending or running node, or 0."""
        first = next(iter(self.of[PENDING].values()), None)
        batches = [n.batch for n in self.of[RUNNING].values()] + ([first.batch] if first else [])
        return min(batches, default=0)

    @property
    def last_batch(self) -> int:
        return self._batches[-1] if self._batches else 0

    @property
    def is_untouched(self) -> bool:
        """Return whether nothing was sent to any of the nodes."""
        return not (self.of[RUNNING] or self.of[SUCCESS] or any(n.attempts for n in self.of[FAILED].values()))

    def open_in(self, batch: int) -> int:
        """Return the number of pending and running nodes of a batch."""
        return self._open.get(batch, 0)

    def batch_before(self, batch: int) -> int:
        """Return the batch before a batch, or 0."""
        found = bisect.bisect_left(self._batches, batch)
        return self._batches[found - 1] if found else 0

    @property
    def highest_begun(self) -> int:
        """Return the highest batch with a node that is neither pending nor skipped, or 0."""
        return max((n.batch for status in (RUNNING, SUCCESS, FAILED) for n in self.of[status].last_part()), default=0)

    def unverified_in(self, batch: int) -> int:
        """Return how many nodes of a batch are still to be re-verified at the end of its soak."""
        return self._unverified[batch]

    def in_reverification(self, batch: int) -> list[ReleaseNode]:
        """Return the nodes of a batch whose re-verification has begun."""
        return [n for n in self.probed.values() if n.batch == batch and not n.is_reverified]

    def next_to_reverify(self, batch: int) -> Iterator[ReleaseNode]:
        """Yield the nodes of a batch whose re-verification has not begun, in order."""
        return self._fresh(batch, self._first.get(batch, 0), self.sizes.get(batch, 0),
                           lambda n: _is_unverified(n) and not _is_probed(n))

    def next_to_ask(self) -> Iterator[ReleaseNode]:
        """Yield the pending nodes that no preflight has asked yet, in order."""
        return self._fresh(0, 0, len(self._order), lambda n: n.status == PENDING and not (
            n.has_answered or n.node_id in self.asking or n.node_id in self.silent))

    def _fresh(self, key: int, first: int, count: int,
               is_fresh: Callable[[ReleaseNode], bool]) -> Iterator[ReleaseNode]:
        """Yield the nodes of a part of the order for which something has not begun yet; key: of what, in _passed."""
        places = range(self._passed.get(key, first), first + count)
        found = False
        for place in places:
            node = self._nodes[self._order[place]]
            if is_fresh(node):
                found = True
                yield node
            elif not found:
                self._passed[key] = place + 1

    def _note_pending(self, node: ReleaseNode) -> None:
        """Note what a node that is pending, or was, is at."""
        is_pending = node.status == PENDING
        waits = is_pending and not node.has_answered
        self.answered += is_pending and node.has_answered
        for kept, is_in in ((self.astray, is_pending and node.in_flight),
                            (self.silent, waits and node.verdict is not None),
                            (self.asking, waits and node.verdict is None and (
                                node.next_op == PING or node.in_flight))):
            if is_in:
                kept[node.node_id] = node
            else:
                kept.pop(node.node_id, None)

    def _first_turns(self, queues: Mapping[str, Sequence[int]]) -> dict[str, Turn]:
        pending, turns = self.of[PENDING], {}
        for labels, ids in queues.items():
            places = [place for place, node_id in enumerate(ids) if node_id in pending]
            if places:
                turns[labels] = Turn(len(ids) - len(places), ids[places[0]], places[0], labels)
        return turns

    def _end_turn(self, node: ReleaseNode) -> None:
        """Move the queue of a node that is no longer pending; a node never becomes pending again."""
        turns, ids, pending = self._turns_to_change(node.batch), self._queues[node.batch][node.labels], self.of[PENDING]
        begun, first, place, labels = turns.of[node.labels][0]
        if first == node.node_id:
            place = next((later for later in range(place + 1, len(ids)) if ids[later] in pending), -1)
        turns.put(labels, Turn(begun + 1, ids[place], place, labels) if place >= 0 else None)

    def _turns_to_change(self, batch: int) -> _Turns:
        if batch not in self._own_turns:
            self._turns[batch] = self._turns[batch].copy()
            self._own_turns.add(batch)
        return self._turns[batch]

    def turns(self, batch: int) -> Mapping[Label | None, Sequence[Turn]]:
        """Return the queues of a batch with pending nodes, those of which the fewest have begun first.

        They are given by the label that they wait for, as wait_for() noted it, with None for all others.
        """
        return self._turns[batch].waiting if batch in self._turns else {}

    def wait_for(self, batch: int, waits: Iterable[tuple[Turn, Label]]) -> None:
        """Note for which label queues wait, which is full; where a node of theirs begins, that is forgotten."""
        for turn, label in waits:
            self._turns_to_change(batch).put(turn.labels, turn, label)

    def queue(self, turn: Turn, batch: int) -> Iterator[ReleaseNode]:
        """Yield the pending nodes of a queue, in order."""
        ids, pending = self._queues[batch][turn.labels], self.of[PENDING]
        return (pending[node_id] for node_id in itertools.islice(ids, turn.place, None) if node_id in pending)

    def limited(self, labels: str, limits: Limits) -> list[Label]:
        """Do limited_labels(), once for all nodes with the same labels."""
        if labels not in self._limited:
            self._limited[labels] = limited_labels(labels, limits)
        return self._limited[labels]


def limited_labels(labels: str, limits: Limits) -> list[Label]:
    """Return the labels of a node that limits are for."""
    values = label_values(labels)
    return [(key, values[key]) for key in limits if key in values]


def labels_in_flight(nodes: Iterable[ReleaseNode], limits: Limits) -> collections.Counter[Label]:
    """Return how many of the nodes have each label that limits are for."""
    return collections.Counter(label for n in nodes for label in limited_labels(n.labels, limits))


def full_labels(labels: Iterable[Label], in_flight: Mapping[Label, int], limits: Limits) -> list[Label]:
    """Return those of a node's limited_labels() of which as many nodes are in flight as may be."""
    return [label for label in labels if in_flight.get(label, 0) >= limits[label[0]]]


def next_within(nodes: NodeIndex, batch: int, limits: Limits, held: Iterable[ReleaseNode],
                may_go: Callable[[ReleaseNode], bool], most: int) -> list[ReleaseNode]:
    """Return up to so many pending nodes of a batch to dispatch now, so that no label exceeds its limit.

    The labels of which the fewest nodes of the batch have begun come first, so that none waits for ever: of racks
    a, a, a, b, b, with two nodes at once, go a and b, then a and b, then a. held: nodes at rest that keep their place.
    """
    in_flight = labels_in_flight((*nodes.of[RUNNING].values(), *nodes.astray.values(), *held), limits)
    full = set(full_labels(in_flight, in_flight, limits))
    turns = nodes.turns(batch)
    # The next turn of those that wait for each label with room, of others, and of queues of which a node was chosen.
    heads = [(found[0], label, 0) for label, found in turns.items() if found and label not in full]
    heapq.heapify(heads)
    chosen, waits = list[ReleaseNode](), list[tuple[Turn, Label]]()
    # The nodes that a queue still has, of which one was chosen.
    queues: dict[str, Iterator[ReleaseNode]] = {}
    while heads and len(chosen) < most:
        turn, label, place = heapq.heappop(heads)
        if label in full:  # by what was chosen: the rest goes on waiting for it
            continue
        if place >= 0 and place + 1 < len(turns[label]):
            heapq.heappush(heads, (turns[label][place + 1], label, place + 1))
        labels = nodes.limited(turn.labels, limits)
        awaited = next((one for one in labels if one in full), None)
        if awaited is not None:
            if place >= 0:
                waits.append((turn, awaited))
            continue
        if turn.labels not in queues:
            queues[turn.labels] = nodes.queue(turn, batch)
        node = next(filter(may_go, queues[turn.labels]), None)
        if node is None:
            continue
        chosen.append(node)
        in_flight.update(labels)
        full.update(full_labels(labels, in_flight, limits))
        heapq.heappush(heads, (turn._replace(begun=turn.begun + 1, node_id=node.node_id), None, -1))
    nodes.wait_for(batch, waits)
    return chosen


# endregion


# region Preflight
# ======================================================================================
# Preflight: the agents that are asked before batch 1, and whether enough of them answer. Pure.
# Uses: Vocabulary, Helpers, Model, Strategy, Failures, Node index.
#
#   Nothing of it is stored: as long as nothing was sent, a new owner asks again. What agents
#   answered is in the nodes (has_answered, or a verdict while they are pending), as observe()
#   left it. It decides whether batch 1 begins, and nothing about a node: one that is silent
#   and tolerated is dispatched in its batch.
# ======================================================================================

class Preflight(NamedTuple):
    """What is known of the agents of a release, of which nothing was sent yet."""
    # How many are asked, and how many of them have answered.
    total: int
    answered: int
    # Nodes whose agents do not answer, each with a verdict that says why; those that were asked and still may.
    silent: Sequence[ReleaseNode]
    asking: Sequence[ReleaseNode]
    # How many may be silent.
    most: int
    # By Clock.elapsed(): who has not answered by then is silent.
    ends_at: float

    @property
    def waiting(self) -> int:
        """Return how many have not answered and still may."""
        return self.total - self.answered - len(self.silent)

    @property
    def exceeded(self) -> str:
        """Return that too many are silent, by kind; "" while it goes on, or where they are tolerated."""
        if self.waiting or len(self.silent) <= self.most:
            return ""
        kinds = kinds_text(n.verdict.error_kind for n in self.silent if n.verdict)
        limit = f", at most {self.most} may" if self.most else ""
        return f"preflight: {len(self.silent)} of {self.total} agents did not answer{limit} ({kinds})"

    def due(self, nodes: NodeIndex, now_s: float, most: int) -> list[ReleaseNode]:
        """Return up to so many nodes to ask now; those that were not asked yet come first."""
        fresh = itertools.islice(nodes.next_to_ask(), most) if now_s < self.ends_at else ()
        again = sorted((n for n in self.asking if not n.in_flight and n.due <= now_s), key=lambda n: n.errors)
        return [n._replace(next_op=PING, deadline=self.ends_at) for n in (*fresh, *again)][:most]

    def wakes(self, now_s: float) -> Iterator[float]:
        """Yield when to decide again for the nodes that are to be asked again later, or wait for a slot."""
        if self.waiting:
            yield self.ends_at
        for n in self.asking:
            if not n.in_flight and n.due > now_s:
                yield min(n.due, self.ends_at)


def preflight_of(release: Release, nodes: NodeIndex, strategy: Strategy, policy: Policy,
                 now_s: float) -> Preflight | None:
    """Return what is known of the agents; None where they need not be asked: not wanted, or something was sent.

    It lasts as long as a node may take (nodeDeadlineSec), from the first request on.
    """
    if not strategy.preflight or release.preflight_accepted or not nodes.is_untouched:
        return None
    pending, asking = nodes.of[PENDING], list(nodes.asking.values())
    # all end at the same time; where everybody who was asked has answered, the first node was asked
    asked = [n for n in (*asking, *itertools.islice(pending.values(), 1)) if n.next_op == PING]
    ends_at = min((n.deadline for n in asked), default=now_s + policy.node_deadline_s)
    silent = list(nodes.silent.values())
    if now_s >= ends_at:
        asking = [n for n in asking if n.in_flight]
        silent += [n._replace(verdict=_too_late(n, policy)) for n in pending.values()
                   if not (n.has_answered or n.in_flight or n.node_id in nodes.silent)]
    return Preflight(len(pending), nodes.answered, sorted(silent, key=lambda n: (n.batch, n.node_id)), asking,
                     resolve_share(strategy.silent_share, len(nodes)), ends_at)


def _too_late(node: ReleaseNode, policy: Policy) -> Verdict:
    within = f"within {policy.node_deadline_s:g} s"
    text = f"no answer {within}: {node.last_error}" if node.errors else \
        f"not asked {within}: no slot was free (AGENT_CONCURRENCY)"
    return Verdict(FAILED, node.last_kind if node.errors else DEADLINE, one_line(text), detail_text(text))


def is_paused_by_preflight(release: Release, strategy: Strategy) -> bool:
    """Return whether the preflight paused a release whose failures exceed no limit: nobody else did before batch 1."""
    return (release.status == PAUSED and not release.paused_by and release.passed_batch == 0
            and strategy.preflight and not release.preflight_accepted)


# endregion


# region Status texts
# ======================================================================================
# Status texts: what a release does or waits for, on whom, until when. Pure.
# Uses: Vocabulary, Helpers, Model, Freezes, Strategy, Plan, Failures, Node index,
#   Preflight.
# ======================================================================================

def first_failed(nodes: NodeIndex) -> ReleaseNode | None:
    """Return the node that failed first; of two at once the lower id."""
    return min(nodes.of[FAILED].values(), key=lambda n: (n.finished_at or "", n.node_id), default=None)


REASON_PENDING = "queued for an executor"
# How Freeze.text begins.
FROZEN_BEGINS = ("frozen: ", "frozen until ")


def approval_text(release_id: int, author: str) -> str:
    """Return that a release waits for an approval, who may give it, and how."""
    if author == ANONYMOUS:
        return "waiting for approval, which nobody can give: who made it did not sign in (set API_TOKENS_FILE)"
    whose = f" by somebody else than {author}" if author else ""
    return f"waiting for approval{whose}: {approval_mend(release_id, author)}"


def approval_mend(release_id: int, author: str) -> str:
    """Return the command that lets a release go that waits for an approval."""
    return f"releasectl approve {release_id}" + (" --emergency --reason TEXT" if author == ANONYMOUS else "")


# In the status_reason of a release that was to go back by itself, as rollback_text() wrote it when that ended.
ROLLS_BACK = re.compile(r"release [0-9]+ rolls it back( once the freeze is lifted)?")


def as_read(release: Release) -> Release:
    """Return a release that has ended with how its rollback stands now, if it has one, in its status_reason."""
    if release.rollback_id is None or not release.is_terminal:
        return release
    by = f"release {release.rollback_id}"
    waits, did = f"{by} is to roll it back and waits: releasectl why {release.rollback_id}", f"rolled back by {by}"
    text = {PENDING: waits, PAUSED: waits, SUCCESS: did, PARTIAL: f"{did}, which ended partial",
            FAILED: f"was to be {did}, which failed", CANCELLED: f"was to be {did}, which was cancelled"}.get(
        release.rollback_status, f"{by} rolls it back")
    reason = release.status_reason or release.error_msg
    return dataclasses.replace(release, status_reason=ROLLS_BACK.sub(text, reason, 1) if ROLLS_BACK.search(
        reason) else "; ".join(filter(None, (reason, text))))


NO_NODES = "the release has no nodes"
# A node that runs for less than this is not named.
SLOW_S = 1.0


class Situation(NamedTuple):
    """What a decision and a status text depend on."""
    release: Release
    # All nodes of the release.
    nodes: NodeIndex
    now: Moment
    policy: Policy = NO_POLICY
    strategy: Strategy = NO_STRATEGY
    # Number of requests that may be sent now.
    slots: int = 1
    # Addresses that another release has in flight, or that may still be busy with our last request.
    busy: frozenset[Endpoint] = frozenset()
    # Why the release's own row can't be used, which ends it.
    broken: str = ""
    freeze: Freeze = NO_FREEZE
    # The database went back, so tasks agents are asked for a task before they are sent it.
    asks_first: bool = False
    # Who has all slots, "" where some are free or this release has one: Slots.shortage().
    shortage: str = ""
    # These are computed by decide(); exceeded is what exceeded_limit() or the preflight says.
    stage: Stage = Stage(0, 0)
    exceeded: str = ""
    preflight: Preflight | None = None

    @property
    def is_failing(self) -> bool:
        """Return whether the release ends, failed."""
        return bool(self.broken or (self.exceeded and self.strategy.on_exceed != PAUSE))

    @property
    def is_rolled_back(self) -> bool:
        """Return whether its rollback is created when it ends, failed: something was sent; a rollback never does."""
        return bool(self.exceeded and self.strategy.on_exceed == ROLLBACK and self.release.rollback_of is None
                    and not self.nodes.is_untouched)


def describe(status: str, situation: Situation) -> str:
    """Return status_reason: what the release does or waits for, on whom, until when.

    It is stored, so times in it are in UTC: the reader's clock and zone are not known.
    """
    nodes = situation.nodes
    if status == SUCCESS:
        return f"{count_of_nodes(len(nodes))} succeeded"
    if status == PARTIAL:
        return one_line(_failures(nodes, situation.strategy))
    if status == FAILED:
        return one_line(_cause(situation))
    if status == CANCELLED:
        return "; ".join(filter(None, (f"{len(nodes.of[SUCCESS])} of {len(nodes)} nodes updated",
                                       cancelled_rollback(status, situation))))
    waiting = _awaited_text(nodes.of[RUNNING].values())
    if status == CANCELLING:
        text, more = f"cancelling: {waiting or 'nothing is in flight'}", cancelled_rollback(status, situation)
        return f"{one_line(text, MAX_MESSAGE_CHARS - len(more) - 2)}; {more}" if more else one_line(text)
    if status == PAUSED:
        return one_line(_paused(situation, waiting))
    if situation.is_failing:
        first = first_failed(nodes)
        then = ", then it is rolled back" if situation.is_rolled_back else ""
        return one_line(f"stopping, {f'node {first.name} failed' if first else situation.broken}: {waiting}{then}")
    return one_line(_progress(situation, waiting))


def cancelled_rollback(status: str, situation: Situation) -> str:
    """Return that a release is not rolled back as somebody cancelled it, and what does it; "" where it never was to."""
    if status not in (CANCELLING, CANCELLED) or not situation.is_rolled_back:
        return ""
    when = "once it has ended, " if status == CANCELLING else ""
    return f"not rolled back, as it was cancelled: {when}releasectl rollback {situation.release.id}"


def _awaited_text(running: Collection[ReleaseNode]) -> str:
    """Return 'waiting for edge-1 to end; edge-2 is tried again after that: connection refused', "" without a node.

    A pause or a freeze keeps those that are to be sent a request again; in a release that ends there are none.
    """
    held = [n for n in running if n.next_op == DISPATCH and not n.in_flight and n.verdict is None]
    ids = {n.node_id for n in held}
    others = [n for n in running if n.node_id not in ids]
    texts = [f"waiting for {_names(others)} to end"] if others else []
    if held:
        last = next((n.last_error for n in held if n.last_error), "")
        texts.append(f"{_names(held)} {'is' if len(held) == 1 else 'are'} tried again after that"
                     + (f": {one_line(last, MAX_RETRIED_CHARS)}" if last else ""))
    return "; ".join(texts)


def _failures(nodes: NodeIndex, strategy: Strategy) -> str:
    """Return 'finished with 37 failures (limit 41): 17 agent_failed (bind to :443 in use), 20 timeout'."""
    failed = nodes.of[FAILED].values()
    limit = (f"{strategy.max_failed} in a batch" if strategy.max_failed_total is None
             else str(resolve_share(strategy.max_failed_total, len(nodes))))
    accepted = sum(bool(n.accepted) for n in failed)
    return (f"finished with {count_of(len(failed), 'failure')} (limit {limit}"
            + (f", {accepted} accepted" if accepted else "") + f"): {causes_text(failed)}")


# Of a release that too many agents did not answer.
NOTHING_SENT = "nothing was sent"


def _cause(situation: Situation) -> str:
    first, preflight = first_failed(situation.nodes), situation.preflight
    if situation.broken or first is None:
        return situation.broken or NO_NODES
    if preflight and preflight.exceeded:
        return f"{preflight.exceeded}; {NOTHING_SENT}; first node {first.name}: {first.error_msg}"
    node = f"node {first.name} in batch {first.batch}: {first.error_msg}"
    failed = situation.nodes.of[FAILED].values()
    tolerates = situation.strategy.max_failed not in (0, "0%") or situation.strategy.max_failed_total
    if not tolerates and len(failed) == 1:
        return f"stopped by {node}"
    what = situation.exceeded if tolerates else f"{count_of_nodes(len(failed))} failed"
    return f"stopped, {what}: {causes_text(failed)}; first {node}"


def _paused(situation: Situation, waiting: str) -> str:
    """Return who paused it and after which batch, what it waits for, and what to do."""
    nodes = situation.nodes
    by = by_whom(situation.release.paused_by)
    begun = nodes.highest_begun
    where = f" {'in' if nodes.open_in(begun) else 'after'} batch {begun}" if begun else ""
    then = "resume to go on"
    if situation.is_failing:
        first = first_failed(nodes)
        then = (f"{f'node {first.name} failed' if first else situation.broken}: resume to end the release"
                + (" and to roll it back" if situation.is_rolled_back else ""))
    elif situation.preflight and situation.preflight.exceeded:
        return (f"paused{by} before batch 1: {situation.preflight.exceeded}; {NOTHING_SENT}: resume to ask again, "
                "resume and accept the failures to go on, or cancel")
    elif situation.exceeded:
        failed = nodes.of[FAILED].values()
        # a release that waits for nodes is described again and again
        causes = kinds_text(n.error_kind for n in failed) if waiting else causes_text(failed)
        then = f"{situation.exceeded}: {causes}; resume and accept the failures, or cancel"
    return f"paused{by}{where}: " + (f"{waiting}; " if waiting else "") + then


def _progress(situation: Situation, waiting: str) -> str:
    """Return what a running release does: frozen, re-verifying, soaking, or a batch."""
    nodes, stage, freeze = situation.nodes, situation.stage, situation.freeze
    if not nodes:
        return NO_NODES
    if freeze.frozen:
        return freeze.text + (f"; {waiting}" if waiting else "")
    if stage.reverifies:
        begun = nodes.in_reverification(stage.reverifies)
        first = min((*begun, *itertools.islice(nodes.next_to_reverify(stage.reverifies), 1)), key=lambda n: n.node_id)
        return (f"verifying batch {stage.reverifies} after its soak: waiting for "
                + _and_more(first.name, nodes.unverified_in(stage.reverifies)))
    if situation.preflight and situation.preflight.waiting:
        return _asking(situation.preflight, situation)
    batch = nodes.batch
    if stage.soak_left_s:
        return f"soaking after batch {nodes.batch_before(batch)} until {stage.soak_until}"
    members = itertools.takewhile(lambda n: n.batch == batch, nodes.of[PENDING].values())
    held = [n for n in members if n.endpoint in situation.busy] if situation.busy else []
    sentence = (f"batch {batch} of {nodes.last_batch}: waiting for {nodes.open_in(batch)} of "
                + count_of_nodes(nodes.sizes.get(batch, 0)))
    running = [n for n in nodes.of[RUNNING].values() if n.batch == batch]
    has_pending = any(n.batch == batch for n in itertools.islice(nodes.of[PENDING].values(), 1))
    return (sentence + _slowest(running, situation)
            + (f"; {_names(held)} busy with an earlier request" if held else "")
            + (f"{NO_SLOT}{situation.shortage}" if situation.shortage and has_pending else "")
            + _retried(running, situation))


# Begins the status_reason of a release in its preflight.
ASKING = "asking "


def _asking(preflight: Preflight, situation: Situation) -> str:
    silent = f", {len(preflight.silent)} did not" if preflight.silent else ""
    whom = f"all {preflight.total} agents" if preflight.total > 1 else "1 agent"
    asked = [n for n in preflight.asking if n.errors]
    return (f"{ASKING}{whom} before batch 1: {preflight.answered} answered{silent}"
            + (f"{NO_SLOT}{situation.shortage}" if situation.shortage else "") + _retried(asked, situation))


# Begins the part of a status_reason on the slots that other releases have, which no row tells.
NO_SLOT = "; waiting for a free slot: "
# Begins the part of a status_reason on the requests that failed and are tried again, which no row of a node has.
RETRYING = "; trying again: "
# Length of the error in it.
MAX_RETRIED_CHARS = 100


def _retried(running: Sequence[ReleaseNode], situation: Situation) -> str:
    """Return '; trying again: edge-1: connection refused, try 6 of 21, next in 8 s', "" for none."""
    retried = [n for n in running if n.errors]
    if not retried:
        return ""
    first = max(retried, key=lambda n: (n.errors, -n.node_id))
    wait_s = first.due - situation.now.elapsed
    when = f"next in {wait_s:.0f} s" if wait_s >= 0.5 and not first.in_flight else "now"
    return (f"{RETRYING}{first.name}: {one_line(first.last_error, MAX_RETRIED_CHARS)}, try {first.errors + 1} of "
            f"{situation.policy.retries + 1}, {when}"
            + (f"; and {len(retried) - 1} more" if len(retried) > 1 else ""))


def _slowest(running: Sequence[ReleaseNode], situation: Situation) -> str:
    slowest = min(running, key=lambda n: n.deadline, default=None)
    if slowest is None:
        return ""
    deadline_s = situation.policy.node_deadline_s
    ran_s = situation.now.elapsed + deadline_s - slowest.deadline
    if ran_s < SLOW_S:
        return ""
    verified = ", which is verified" if slowest.next_op == PROBE else ""
    return f", slowest {slowest.name}{verified} for {ran_s:.0f} s of {deadline_s:.0f} s"


# The time whose ended nodes tell how fast a release goes, and how many of its last events are read for that.
PACE_S, PACE_EVENTS = 60.0, 2000


class Pace(NamedTuple):
    """How fast a release goes, in seconds; 0: not known."""
    # Since the current batch began, or should have.
    spent_s: float = 0.0
    # From one end of a node to the next in it, of those within PACE_S.
    each_s: float = 0.0
    # From the first dispatch of the batch before to its last end.
    before_s: float = 0.0


def time_left(release: Release, batches: Sequence[BatchProgress], pace: Pace, strategy: Strategy, now: Moment) -> str:
    """Return 'about 6 min left', or 'about 6 min left, then a pause'; "" where nothing tells how long it takes.

    The nodes go on ending as they did lately. Where none did, each batch takes as long as the one before the current
    one, in as many goes as maxParallel makes of them. Soaks last as long as they are to.

        100 nodes of the batch are open, 200 ended in the last minute:  30 s left
        a soak of 5 min and a batch of 100 follow:                      30 s + 5 min + 30 s
    """
    ahead = [batch for batch in batches if batch.is_open]
    if release.status != RUNNING or not ahead:
        return ""
    before = max((b for b in batches if b.number < ahead[0].number), key=lambda b: b.number, default=None)
    left_s, pauses = 0.0, False
    if before and before.number > release.passed_batch:
        left_s = now.left_s(release.soak_until, release.soak_clock, strategy.soak_s)
        pauses = strategy.pauses_after(before.number)
    for batch, later in zip(ahead, [*ahead[1:], None]):
        if pauses:
            break
        if pace.each_s:
            took_s = batch.count(PENDING, RUNNING) * pace.each_s
        else:
            # how many goes maxParallelPer makes of a batch depends on its labels
            known = before and not strategy.max_parallel_per
            took_s = pace.before_s * (_goes(batch, strategy) / _goes(before, strategy) if before and known else 0)
            took_s -= pace.spent_s if batch is ahead[0] else 0.0
        if took_s <= 0:  # not known, or it takes longer already
            return ""
        left_s += took_s + (strategy.soak_s if later else 0.0)
        pauses = later is not None and strategy.pauses_after(batch.number)
    return f"about {rough_time(left_s)} left{', then a pause' if pauses else ''}" if left_s >= 1.0 else ""


def _goes(batch: BatchProgress, strategy: Strategy) -> int:
    return -(-batch.total // strategy.max_parallel) if strategy.max_parallel else 1


def rough_time(seconds: float) -> str:
    """Return a time to come as '25 s', '6 min', '3 h 20 min' or '2 days': no estimate is exact."""
    minutes = round(seconds / 60)
    if seconds < 57.5:
        return f"{max(1, round(seconds / 5)) * 5} s"
    if minutes < 90:
        return f"{minutes} min"
    tens = round(minutes / 10) * 10
    return f"{tens // 60} h" + (f" {tens % 60} min" if tens % 60 else "") if minutes < 2880 else \
        f"{round(minutes / 1440)} days"


def count_of(number: int, noun: str) -> str:
    """Return '1 event', '2 events'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def count_of_nodes(number: int) -> str:
    """Return '1 node', '2 nodes'."""
    return count_of(number, "node")


def _names(nodes: Collection[ReleaseNode]) -> str:
    return _and_more(min(nodes, key=lambda n: (n.batch, n.node_id)).name if nodes else "no node", len(nodes))


def _and_more(first: str, count: int) -> str:
    return f"{first} and {count - 1} more" if count > 1 else first


# How many of the releases that nodes run a sentence names.
MAX_RUNNING_NAMED = 5


def effect_text(effect: Effect) -> str:
    """Return what a payload would change: '3 changes against release 4 (v4, 38 of 40 nodes); 2 nodes run release 3'."""
    total, count = sum(one.nodes for one in effect.running), effect.open_releases
    before = [f"{count} other release{' has' if count == 1 else 's have'} not ended yet"] if count else []
    if effect.running and all(one.is_same for one in effect.running):
        ids = in_words([one.release_id for one in effect.running])
        return "; ".join([f"{CHANGES_NOTHING} (release {ids})", *before])
    first = [f"{effect.difference or 'not compared'} against release {one.release_id} (v{one.version}, {one.nodes} "
             f"of {count_of_nodes(total)})" + (f": {effect.unreadable}" if effect.unreadable else "")
             for one in effect.running if one.release_id is not None and one.release_id == effect.against]
    others = [one for one in effect.running if one.release_id is None or one.release_id != effect.against]
    texts = [_running_text(one) for one in others[:MAX_RUNNING_NAMED]]
    more = sum(one.nodes for one in others[MAX_RUNNING_NAMED:])
    return "; ".join([*first, *texts, *([f"{_nodes_run(more)} other releases"] if more else []), *before])


def _running_text(one: Running) -> str:
    if one.is_unknown:
        return f"what {_nodes_run(one.nodes)} is not known"
    if one.release_id is None:
        return f"{count_of_nodes(one.nodes)} had no release yet"
    return f"{_nodes_run(one.nodes)} release {one.release_id}" + (" (the same payload)" if one.is_same else "")


def _nodes_run(count: int) -> str:
    return f"{count_of_nodes(count)} {'runs' if count == 1 else 'run'}"


# Of a release whose nodes all run its payload.
CHANGES_NOTHING = "changes nothing: all its nodes run this payload already"

# endregion


# region Decision
# ======================================================================================
# Decision: what to write and what to send next. Pure: no clock, no socket, no disk.
# Uses: Vocabulary, Helpers, Model, Freezes, Strategy, Plan, Node index, Preflight,
#   Status texts.
#
#   A driver updates its nodes with outcomes by observe(), gets what follows from decide(),
#   commits that, and only then sends. decide() compares what is with what should be, so a
#   restart needs no path of its own: recover() restores a node that was found running.
#   Every change of a status is a row of RELEASE_TRANSITIONS or NODE_TRANSITIONS.
# ======================================================================================

# From a status to those that may follow it (contract section 3); statuses that are missing are final.
RELEASE_TRANSITIONS: Mapping[str, tuple[str, ...]] = {
    PENDING: (RUNNING, PAUSED, CANCELLING),
    RUNNING: (PAUSED, CANCELLING, SUCCESS, PARTIAL, FAILED),
    PAUSED: (PENDING, RUNNING, CANCELLING),
    CANCELLING: (CANCELLED,),
}
NODE_TRANSITIONS: Mapping[str, tuple[str, ...]] = {
    PENDING: (RUNNING, FAILED, SKIPPED),
    RUNNING: (SUCCESS, FAILED),
    SUCCESS: (FAILED,),
}


# Results of a request, beside SUCCESS and FAILED, which are believed.
ACCEPTED = "accepted"   # the agent has the task
WORKING = "working"     # the task has not ended
UNKNOWN = "unknown"     # the agent does not know the task
UNSENT = "unsent"       # the request never reached the agent
LOST = "lost"           # the request may have reached the agent, no answer came
UNCLEAR = "unclear"     # an answer that can't be used: 429, 5xx, nonsense
NOT_SENT = "held"       # releasectl did not send it; this says nothing about the agent

# Beginning of the message where an agent has a version that it can't have from us.
ALREADY_AT = "the agent is already at version"
# Message of a failure whose text is empty.
NO_REASON_GIVEN = "the agent gave no reason"


def backoff_s(errors: int, node_id: int, first_s: float = BACKOFF_FIRST_S, max_s: float = BACKOFF_MAX_S) -> float:
    """Return the wait before try errors + 1; it doubles, half of it is spread over the nodes (or what has the id)."""
    longest = min(max_s, first_s * (1 << min(errors - 1, 10)))
    spread = (node_id * 2654435761 + errors * 40503) % 1024 / 1024  # deterministic jitter
    return longest * (0.5 + 0.5 * spread)


def poll_delay_s(polls: int, interval_s: float) -> float:
    """Return the wait before a poll, counted from 0; it grows up to the interval."""
    return min(interval_s, float(FIRST_POLL_S * POLL_GROWTH ** min(polls, 64)))


def observe(node: ReleaseNode, outcome: Outcome, now: Moment, policy: Policy) -> ReleaseNode:
    """Return a node updated with the outcome of a request or a probe.

    The CPU time of an answer is paid for at ANSWER_SHARE: 20 ms take 2 s. A node that is more than ANSWER_CREDIT_S
    behind is asked again when it has caught up, whatever it answered.
    """
    after = _observe(node, outcome, now, policy)
    if not outcome.cost_s:
        return after
    paid_at = max(node.paid_at, now.elapsed) + outcome.cost_s / ANSWER_SHARE
    return after._replace(paid_at=paid_at, due=max(after.due, paid_at - ANSWER_CREDIT_S))


def _observe(node: ReleaseNode, outcome: Outcome, now: Moment, policy: Policy) -> ReleaseNode:
    if outcome.result == NOT_SENT:
        return node._replace(in_flight=False, due=now.elapsed)
    if outcome.op == PING:
        return _observe_ping(node, outcome, now, policy)
    if outcome.op == PROBE and outcome.result == SUCCESS:
        return _observe_pass(node, now, policy)
    if outcome.result in (SUCCESS, ACCEPTED) and outcome.applied and not node.reached:
        # no try of ours has reached the agent: it has another version with the same number
        return node._replace(in_flight=False, verdict=Verdict(
            FAILED, REJECTED, f"{ALREADY_AT} {outcome.applied}", outcome.event_detail))
    if outcome.result == SUCCESS and policy.probes:
        return node._replace(in_flight=False, next_op=PROBE, due=now.elapsed, errors=0, passes=0, reached=True,
                             agent_message=outcome.event_detail)
    if outcome.result == SUCCESS:
        return node._replace(in_flight=False, verdict=Verdict(SUCCESS, detail=outcome.event_detail))
    if outcome.result == FAILED:
        return node._replace(in_flight=False, verdict=Verdict(
            FAILED, outcome.error_kind, one_line(outcome.message) or NO_REASON_GIVEN, outcome.event_detail))
    if outcome.result == ACCEPTED:
        return node._replace(in_flight=False, task_id=outcome.task_id, is_renamed=outcome.task_id != node.task_id,
                             next_op=QUERY, errors=0, polls=0, due=now.elapsed + FIRST_POLL_S, reached=True,
                             is_unknown=True, is_at_work=True)
    if outcome.result == WORKING:
        # pauses do not extend the deadline of a node whose agent is at work
        return node._replace(in_flight=False, errors=0, polls=node.polls + 1, is_at_work=True,
                             deadline=node.deadline - node.credit_s, credit_s=0.0,
                             due=now.elapsed + poll_delay_s(node.polls + 1, policy.interval_s))
    if outcome.result == UNKNOWN:
        # the first time at once: else a tick would end before it sends anything
        wait_s = backoff_s(node.forgotten, node.node_id) if node.forgotten else 0.0
        return node._replace(in_flight=False, next_op=DISPATCH, forgotten=node.forgotten + 1, is_at_work=False,
                             is_unknown=node.is_unknown or node.reached,
                             last_error="the agent does not know the task", due=now.elapsed + wait_s)
    return _observe_error(node, outcome, now, policy)


def _observe_pass(node: ReleaseNode, now: Moment, policy: Policy) -> ReleaseNode:
    node = node._replace(in_flight=False, errors=0, passes=node.passes + 1)
    if node.passes < policy.probes:
        return node._replace(due=now.elapsed + PROBE_AGAIN_S)
    if node.status == SUCCESS:
        return node._replace(next_op="", is_reverified=True, passes=0)
    return node._replace(verdict=Verdict(SUCCESS, detail=node.agent_message))


def _observe_ping(node: ReleaseNode, outcome: Outcome, now: Moment, policy: Policy) -> ReleaseNode:
    if node.status != PENDING or outcome.result == SUCCESS:  # not pending: the database went back meanwhile
        return node._replace(in_flight=False, has_answered=True, errors=0)
    # a ping leaves nobody busy
    after = _observe_error(node, outcome._replace(hold_s=0.0), now, policy)
    return after if after.verdict is None else after._replace(errors=0)


def _observe_error(node: ReleaseNode, outcome: Outcome, now: Moment, policy: Policy) -> ReleaseNode:
    is_lost = outcome.result == LOST and (outcome.op == DISPATCH or node.reached)
    is_tried = is_lost or (outcome.op == DISPATCH and outcome.result == UNCLEAR and not outcome.is_refusal)
    node = node._replace(in_flight=False, errors=node.errors + 1, passes=0, last_kind=outcome.error_kind,
                         last_error=outcome.message, reached=node.reached or is_tried,
                         is_unknown=node.is_unknown or is_lost)
    if node.errors > policy.retries:
        tries = f" (tried {node.errors} times)" if node.errors > 1 else ""
        return node._replace(verdict=Verdict(
            FAILED, outcome.error_kind, one_line(outcome.message, MAX_MESSAGE_CHARS - len(tries)) + tries,
            outcome.event_detail, outcome.hold_s))
    wait_s = max(backoff_s(node.errors, node.node_id), 0.0 if node.dialect.can_be_asked else outcome.hold_s)
    # rule 8: an agent that can be asked is asked first; another runs no version twice
    asks = node.dialect.can_be_asked and outcome.op == DISPATCH and outcome.result != UNSENT
    return node._replace(due=now.elapsed + wait_s, next_op=QUERY if asks else outcome.op)


def recover(node: ReleaseNode, now: Moment, policy: Policy, holds: Sequence[Hold] = (),
            quiet_s: float = 0.0) -> ReleaseNode:
    """Return a node for a new owner of its release (rule 9): ask first, or wait and repeat.

    Deadline and hold continue as stored. Pauses and freezes extend the deadline (contract section 7), unless the
    agent is at work. Where the deadline is over, one query is still sent: the task may have ended before it.
    quiet_s: time in which execute agents are sent nothing, as they may be busy with a request that the database
    has lost.
    """
    if node.status != RUNNING:
        return node
    # a clock that was ahead must not extend the deadline
    age_s = max(0.0, -now.until_s(node.started_at, node.started_clock))
    credit_s = max(0.0, min(held_s(holds, now.wall - age_s, now.wall), age_s) - node.waited_s)
    deadline = now.elapsed - age_s + policy.node_deadline_s + node.waited_s + credit_s
    reached = bool(node.stored_reached)
    node = node._replace(reached=reached, is_unknown=reached, credit_s=credit_s, deadline=deadline)
    if node.dialect.can_be_asked:
        return node._replace(next_op=QUERY, due=now.elapsed, deadline=max(deadline, now.elapsed + policy.interval_s))
    busy_s = max(quiet_s, now.left_s(node.hold_until, node.hold_clock, policy.hold_s))
    return node._replace(next_op=DISPATCH, due=now.elapsed + busy_s)


def kept_from_dispatch(nodes: NodeIndex, passed_s: float) -> list[ReleaseNode]:
    """Return the nodes whose deadline is extended because a pause or a freeze delayed their dispatch.

    A node whose agent is at work keeps its deadline (section 7). One whose agent is still to be asked has the time as
    credit, which is taken back when the agent says that it is at work. A preflight is delayed too.
    """
    running, pending = nodes.of[RUNNING].values(), nodes.of[PENDING].values() if nodes.is_untouched else ()
    return [*(n._replace(deadline=n.deadline + passed_s, waited_s=n.waited_s + passed_s)
              for n in running if n.next_op == DISPATCH and not n.in_flight),
            *(n._replace(deadline=n.deadline + passed_s, credit_s=n.credit_s + passed_s)
              for n in running if n.next_op == QUERY and not n.is_at_work),
            *(n._replace(deadline=n.deadline + passed_s) for n in pending if n.next_op == PING)]


class NodeChange(NamedTuple):
    """A node before and after a commit, and the detail of its event."""
    before: ReleaseNode
    after: ReleaseNode
    detail: str = ""


class Send(NamedTuple):
    """A request to send after the commit."""
    op: str
    node: ReleaseNode


class Decision(NamedTuple):
    """What to commit, then what to send, and when to decide again."""
    # Commit these, and the fields status to error_msg, and those from passed_batch on, as columns of the release.
    changes: tuple[NodeChange, ...]
    status: str
    status_reason: str
    error_msg: str
    # Send these after the commit.
    sends: tuple[Send, ...]
    # When to decide again without a new outcome, by Clock.elapsed().
    wake_at: float
    # All nodes after the changes.
    nodes: NodeIndex
    passed_batch: int = 0
    soak_until: str | None = None
    soak_clock: str = ""
    # Create the release's rollback in the same commit (onExceed).
    rolls_back: bool = False
    # What the event of the new status says beside its error.
    remark: str = ""

    def in_ascii(self) -> Decision:
        """Return the decision with its texts in ASCII, for a database that can't store an agent's text."""
        changes = tuple(c._replace(after=c.after._replace(error_msg=_in_ascii(c.after.error_msg)),
                                   detail=_in_ascii(c.detail, MAX_DETAIL_BYTES)) for c in self.changes)
        _apply(self.nodes, changes)
        return self._replace(changes=changes, status_reason=_in_ascii(self.status_reason),
                             error_msg=_in_ascii(self.error_msg))

    def with_sequel(self, text: str, mend: str = "") -> Decision:
        """Return the decision with what follows the end of the release added to its status_reason; "" for nothing.

        mend: what a person should do, which is never cut, unlike the reason and the text.
        """
        if not text:
            return self
        end = f"; {mend}" if mend else ""
        room = MAX_MESSAGE_CHARS - len(end)
        reason = one_line(self.status_reason, max(room - len(text) - 2, room // 3))
        return self._replace(status_reason=one_line(f"{reason}; {text}", room) + end)

    def must_commit(self, release: Release) -> bool:
        """Return whether to commit at once; a new status_reason alone can wait."""
        return bool(self.changes) or (self.status, self.passed_batch, self.soak_clock) != (
            release.status, release.passed_batch, release.soak_clock)


def _in_ascii(text: str, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    return one_line(text.encode("ascii", "backslashreplace").decode(), max_chars)


def stage_of(release: Release, nodes: NodeIndex, now: Moment, strategy: Strategy) -> Stage:
    """Return where a release is between the batch that is done and the next one (contract section 7).

        batch at rest  ->  soak  ->  re-verification  ->  pause  ->  next batch

    Steps that the strategy does not have are left out; nothing follows the last batch. passed_batch keeps
    completed steps from being repeated after a take-over.
    """
    batch = nodes.batch
    before = nodes.batch_before(batch)
    if before <= release.passed_batch:
        return Stage(batch, release.passed_batch)
    if strategy.soak_s:
        soak = _soak_of(release, now, strategy)
        if soak.soak_left_s:
            return soak
        if strategy.verify and nodes.unverified_in(before):
            return soak._replace(reverifies=before)
    if strategy.pauses_after(before):
        return Stage(0, before, pauses=True)
    return Stage(batch, before)


def _soak_of(release: Release, now: Moment, strategy: Strategy) -> Stage:
    """Return the rest of a soak, which begins now where the release has none.

    It lasts by the elapsed clock; a new owner on another host, or after a reboot, continues by the wall clock.
    """
    left_s = strategy.soak_s
    if release.soak_until:
        left_s = now.left_s(release.soak_until, release.soak_clock, strategy.soak_s)
        is_ours = release.soak_clock.rpartition(" ")[0] == now.boot and release.soak_clock
        if is_ours and now.until_s(release.soak_until, release.soak_clock) <= strategy.soak_s:
            return Stage(0, release.passed_batch, release.soak_until, release.soak_clock, left_s)
    return Stage(0, release.passed_batch, utc_text(now.wall + left_s), now.clock_mark(left_s), left_s)


def decide(situation: Situation) -> Decision:
    """Return what follows from a release and its nodes (contract section 3, rules 3 to 8; section 7)."""
    release, before, now, policy, strategy = situation[:5]
    nodes = before.copy()
    ended = _apply(nodes, _ended(nodes, now, policy, strategy))
    if release.status == RUNNING and not situation.freeze.frozen and not situation.broken:
        ended += _apply(nodes, _surpassed(release, nodes, now))
    stage = Stage(0, release.passed_batch, release.soak_until, release.soak_clock)
    situation = situation._replace(nodes=nodes, stage=stage, exceeded=exceeded_limit(nodes, strategy))
    preflight = _preflight(situation)
    if preflight and preflight.exceeded and not situation.exceeded:
        situation = situation._replace(exceeded=preflight.exceeded, preflight=preflight)
        if situation.is_failing:
            ended += _apply(nodes, [_at_rest(n, n.verdict, now) for n in preflight.silent if n.verdict])
    if situation.is_failing or release.status == CANCELLING:
        ended += _apply(nodes, filter(None, [_close_node(n, now) for n in nodes.open]))
    if release.status == RUNNING and not situation.is_failing and not situation.exceeded:
        stage = Stage(0, release.passed_batch) if preflight and preflight.waiting else stage_of(
            release, nodes, now, strategy)
        situation = situation._replace(stage=stage, preflight=preflight)
    status = _next_status(situation)
    renamed, unsent = _renamed(nodes), _apply(nodes, _unsent(nodes))
    is_going = status == RUNNING and not situation.is_failing and not situation.freeze.frozen
    begun = _dispatches(release, nodes, now, policy, strategy, stage.batch, _slots_for_dispatches(situation),
                        situation.busy, situation.asks_first) if is_going else []
    _apply(nodes, [*renamed, *begun])
    free = max(0, situation.slots - len(begun))
    awaited = _awaited(nodes, stage, now, policy, free)
    pinged = preflight.due(nodes, now.elapsed, free) if preflight and is_going else []
    asked = [*(n for n in awaited if _is_due(n, QUERY, now) or _is_due(n, PROBE, now)), *pinged][:free]
    asked_ids = {n.node_id for n in asked}
    soak_ends = [now.elapsed + stage.soak_left_s] if status == RUNNING and stage.soak_left_s else []
    return Decision(
        changes=(*ended, *renamed, *_without(unsent, begun), *begun),
        status=status,
        status_reason=describe(status, situation),
        error_msg=_error_msg(situation),
        sends=(*(Send(change.after.next_op, change.after) for change in begun),
               *(Send(n.next_op, n._replace(in_flight=True)) for n in asked)),
        # nodes that wait for a slot don't count: the outcome that frees one is followed by a decision
        wake_at=min((*soak_ends, *(_wake(n, now) for n in awaited if n.node_id not in asked_ids),
                     *(preflight.wakes(now.elapsed) if preflight and is_going else ())),
                    default=now.elapsed + policy.interval_s),
        nodes=nodes,
        passed_batch=stage.passed_batch,
        soak_until=None if status in TERMINAL else stage.soak_until,
        soak_clock="" if status in TERMINAL else stage.soak_clock,
        rolls_back=status == FAILED and situation.is_rolled_back,
        remark=cancelled_rollback(status, situation))


def _preflight(situation: Situation) -> Preflight | None:
    """Return what is known of the agents of a release that asks them now, or that is paused as they did not answer."""
    release, nodes, now, policy, strategy = situation[:5]
    is_on = release.status == RUNNING or is_paused_by_preflight(release, strategy)
    return preflight_of(release, nodes, strategy, policy, now.elapsed) if is_on and not situation.broken else None


def _slots_for_dispatches(situation: Situation) -> int:
    """Return the slots for dispatches. Queries get up to half: if they waited, their connections would be closed."""
    waiting = sum(_is_due(n, QUERY, situation.now) for n in situation.nodes.of[RUNNING].values())
    return situation.slots - min(waiting, situation.slots // 2)


def _apply(nodes: NodeIndex, changes: Iterable[NodeChange]) -> list[NodeChange]:
    """Make the changes and return them."""
    applied = list(changes)
    for change in applied:
        nodes.put(change.after)
    return applied


def _ended(nodes: NodeIndex, now: Moment, policy: Policy, strategy: Strategy) -> list[NodeChange]:
    """Return the ends of running nodes, and of successful ones that are re-verified."""
    again = nodes.probed.values() if strategy.verify else ()
    return list(filter(None, [_end_node(n, now, policy) for n in (*nodes.of[RUNNING].values(), *again)]))


def _renamed(nodes: NodeIndex) -> list[NodeChange]:
    """Return the nodes whose agent named another task id than ours, which the row has."""
    return [NodeChange(n._replace(task_id=""), n._replace(is_renamed=False))
            for n in nodes.of[RUNNING].values() if n.is_renamed]


def _unsent(nodes: NodeIndex) -> list[NodeChange]:
    """Return the nodes whose request is known not to have reached the agent, for the next owner."""
    return [NodeChange(n, n._replace(stored_reached=0)) for n in nodes.of[RUNNING].values()
            if n.stored_reached and not n.reached and not n.in_flight]


def _surpassed(release: Release, nodes: NodeIndex, now: Moment) -> list[NodeChange]:
    """Return the ends of nodes to be dispatched that have a higher version already (rule 2).

    Their agents would answer "success" and do nothing.
    """
    if nodes.highest_sent <= release.version:
        return []
    batch = nodes.batch
    due = [n for n in nodes.open if n.last_version > release.version and not n.in_flight and (
        n.next_op == DISPATCH if n.status == RUNNING else n.batch == batch)]
    return [_at_rest(n, Verdict(FAILED, REJECTED, f"node has version {n.last_version} already", hold_s=None), now)
            for n in due]


def _awaited(nodes: NodeIndex, stage: Stage, now: Moment, policy: Policy, slots: int) -> list[ReleaseNode]:
    """Return the running nodes, and those that are re-verified: as many as there are slots begin with that.

    A re-verification has the deadline of a node, from its first probe on.
    """
    if not stage.reverifies:
        return list(nodes.of[RUNNING].values())
    return [*nodes.of[RUNNING].values(), *nodes.in_reverification(stage.reverifies), *(
        n._replace(next_op=PROBE, deadline=now.elapsed + policy.node_deadline_s)
        for n in itertools.islice(nodes.next_to_reverify(stage.reverifies), slots))]


def _is_due(node: ReleaseNode, op: str, now: Moment) -> bool:
    return (node.next_op == op and not node.in_flight and node.due <= now.elapsed and node.verdict is None
            and (node.status == RUNNING or (node.status == SUCCESS and op == PROBE)))


def _wake(node: ReleaseNode, now: Moment) -> float:
    """Return when to decide again for an awaited node; never for one in flight or waiting for a slot."""
    if node.in_flight:
        return float("inf")
    return node.due if now.elapsed < node.due < node.deadline else node.deadline


def _end_node(node: ReleaseNode, now: Moment, policy: Policy) -> NodeChange | None:
    """Return the end of a running node, or of a success that fails its re-verification; None for no end."""
    if node.in_flight or node.status not in (RUNNING, SUCCESS):
        return None
    if node.verdict is not None:
        return _at_rest(node, node.verdict, now)
    is_reverification = node.status == SUCCESS
    if now.elapsed < node.deadline or (is_reverification and node.next_op != PROBE):
        return None
    last = f"; last: {node.last_error}" if node.last_error else ""
    if is_reverification:
        return _fail(node, VERIFY, f"not verified {policy.node_deadline_s:g} s after the end of its soak{last}", now,
                     0.0)
    return _fail(node, DEADLINE, f"not done {policy.node_deadline_s:g} s after its dispatch{last}", now)


def _close_node(node: ReleaseNode, now: Moment) -> NodeChange | None:
    """Return the end of a node in a release that sends nothing more (rules 5 and 8); None for no end."""
    if node.status == PENDING:
        return NodeChange(node, node._replace(status=SKIPPED, finished_at=now.text))
    if node.status != RUNNING or node.in_flight or node.next_op != DISPATCH:
        return None
    if node.is_unknown:
        return _abandon(node, node.last_error or "the answer was lost with the process that asked", now)
    return _fail(node, node.last_kind or ABANDONED,
                 f"{node.last_error or 'it was never sent'} (not tried again: the release ends)", now, 0.0)


def _abandon(node: ReleaseNode, why: str, now: Moment) -> NodeChange:
    return _fail(node._replace(is_unknown=True), ABANDONED, f"outcome unknown: {why}", now)


def _fail(node: ReleaseNode, kind: str, message: str, now: Moment, hold_s: float | None = None) -> NodeChange:
    return _at_rest(node, Verdict(FAILED, kind, one_line(message), detail_text(message), hold_s), now)


def force_end(nodes: NodeIndex, now: Moment) -> list[NodeChange]:
    """End all nodes of a release that is cancelled by force, and return the changes."""
    changes = [_abandon(n, "cancelled by force while it was in flight", now) if n.status == RUNNING
               else _close_node(n, now) for n in nodes.open]
    return _apply(nodes, filter(None, changes))


def _at_rest(node: ReleaseNode, verdict: Verdict, now: Moment) -> NodeChange:
    hold_until, hold_clock = node.hold_until, node.hold_clock
    if verdict.hold_s is not None:
        is_busy = verdict.hold_s > 0 and not node.dialect.can_be_asked
        hold_until, hold_clock = _hold_for(verdict.hold_s, now) if is_busy else (None, "")
    return NodeChange(node, node._replace(
        stored_reached=int(node.reached or node.is_unknown or verdict.error_kind in BELIEVED_KINDS),
        status=verdict.status, error_kind=verdict.error_kind, error_msg=verdict.error_msg, finished_at=now.text,
        hold_until=hold_until, hold_clock=hold_clock, verdict=None, next_op="", errors=0, passes=0, due=now.elapsed),
        verdict.detail)


def _hold_for(seconds: float, now: Moment) -> tuple[str, str]:
    """Return hold_until and hold_clock for an execute agent that may be busy for some seconds."""
    return utc_text(now.wall + seconds), now.clock_mark(seconds)


def exceeded_limit(nodes: NodeIndex, strategy: Strategy) -> str:
    """Return the limit that the failures exceed, "" when they are tolerated (rule 5, section 7).

    A share is of the batch's planned size, which is its number of rows.
    """
    return limit_exceeded(nodes.failures, nodes.sizes, strategy)


def limit_exceeded(failures: Mapping[int, int], sizes: Mapping[int, int], strategy: Strategy) -> str:
    """Do exceeded_limit() with the failures of each batch that count, and the nodes of each."""
    for batch, count in sorted(failures.items()):
        most = resolve_share(strategy.max_failed, sizes[batch])
        if count > most:
            return f"{count_of_nodes(count)} of batch {batch} failed, at most {most} may"
    if failures and strategy.max_failed_total is not None:
        count, most = sum(failures.values()), resolve_share(strategy.max_failed_total, sum(sizes.values()))
        if count > most:
            return f"{count_of_nodes(count)} failed in all, at most {most} may"
    return ""


def _next_status(situation: Situation) -> str:
    """Return the release's status after the changes (a table in docs/ARCHITECTURE.md); a paused one stays paused."""
    status, nodes = situation.release.status, situation.nodes
    if status == RUNNING and (situation.stage.pauses or (situation.exceeded and not situation.is_failing)):
        return PAUSED
    if status not in (RUNNING, CANCELLING) or nodes.of[RUNNING]:
        return status
    if status == CANCELLING:
        return CANCELLED
    if situation.is_failing or not nodes:
        return FAILED
    if nodes.of[PENDING]:
        return RUNNING
    return SUCCESS if len(nodes.of[SUCCESS]) == len(nodes) else PARTIAL


def _dispatches(release: Release, nodes: NodeIndex, now: Moment, policy: Policy, strategy: Strategy, batch: int,
                slots: int, busy: frozenset[Endpoint], asks_first: bool = False) -> list[NodeChange]:
    """Return the intents of the dispatches to send now: repetitions first, then the current batch."""
    running = nodes.of[RUNNING].values()
    ready = [n for n in running if _is_due(n, DISPATCH, now)]
    # a pending node in flight was sent by a commit that the database has lost: its outcome is still to come
    members = itertools.takewhile(lambda n: n.batch == batch, nodes.of[PENDING].values())
    room = max(0, min(slots - len(ready), strategy.max_parallel - len(running) if strategy.max_parallel else slots))
    # rows that are at rest, and whose agent may still be busy with the request
    held = [n for n in nodes.of[FAILED].values() if 0 < now.until_s(n.hold_until, n.hold_clock) <= MAX_BUSY_S] \
        if nodes.twins or strategy.max_parallel_per else []
    is_free = _free(nodes, busy, held)

    def may_go(node: ReleaseNode) -> bool:
        # a node with a higher version fails in the next decision
        return not node.in_flight and node.last_version <= release.version and is_free(node)

    fresh = next_within(nodes, batch, strategy.max_parallel_per, held, may_go, room) \
        if strategy.max_parallel_per and room else list(itertools.islice(filter(may_go, members), room))
    return [_intent(release, n, now, policy, asks_first) for n in (*ready, *fresh)[:max(0, slots)]]


def _free(nodes: NodeIndex, busy: frozenset[Endpoint], held: Iterable[ReleaseNode]) -> Callable[[ReleaseNode], bool]:
    """Return whether an address has no task, of another release or of another row of this one, which it then has."""
    taken = set(busy)
    if nodes.twins:
        taken.update(n.endpoint for n in (*nodes.of[RUNNING].values(), *held))

    def is_free(node: ReleaseNode) -> bool:
        if not taken and not nodes.twins:
            return True
        endpoint = node.endpoint
        if endpoint in taken:
            return False
        if endpoint in nodes.twins:
            taken.add(endpoint)
        return True
    return is_free


def _without(changes: Iterable[NodeChange], others: Iterable[NodeChange]) -> list[NodeChange]:
    """Return the changes of nodes that are not in others."""
    ids = {change.after.node_id for change in others}
    return [change for change in changes if change.after.node_id not in ids]


def _intent(release: Release, node: ReleaseNode, now: Moment, policy: Policy, asks_first: bool = False) -> NodeChange:
    """Return what is committed before a dispatch; started_at and deadline are those of the first try.

    The id sent is always ours, whatever id the agent named before.
    """
    hold_until, hold_clock = (None, "") if node.dialect.can_be_asked else _hold_for(policy.hold_s, now)
    task_id = task_id_for(release.type, node.main_ip, release.version, release.tag)
    is_first = node.status == PENDING
    if is_first:  # what the preflight found decides nothing about a node
        node = node._replace(errors=0, last_kind="", last_error="")
    asks = asks_first and is_first and node.dialect.can_be_asked
    return NodeChange(node, node._replace(
        stored_reached=int(node.reached or not asks), status=RUNNING, task_id=task_id, attempts=node.attempts + 1,
        hold_until=hold_until, hold_clock=hold_clock, in_flight=True, verdict=None,
        waited_s=node.waited_s + node.credit_s, credit_s=0.0,
        next_op=QUERY if asks else DISPATCH, started_at=now.text if is_first else node.started_at,
        started_clock=now.clock_mark(0.0) if is_first else node.started_clock,
        deadline=now.elapsed + policy.node_deadline_s if is_first else node.deadline))


def _error_msg(situation: Situation) -> str:
    if situation.broken or not situation.nodes:
        return one_line(situation.broken or NO_NODES)
    if situation.is_failing and situation.preflight:
        return one_line(f"{situation.preflight.exceeded}; {NOTHING_SENT}")
    first = first_failed(situation.nodes) if situation.is_failing else None
    return one_line(f"node {first.name}: {first.error_msg}") if first else situation.release.error_msg


# endregion


# region Verbs
# ======================================================================================
# Verbs: what an operator may do when, and which release may start. Pure.
# Uses: Vocabulary, Helpers, Model, Freezes, Node index, Status texts, Decision.
# ======================================================================================

class Verb(NamedTuple):
    """What an operator may do with a release."""
    name: str
    # The statuses that allow it, and the one that follows.
    states: tuple[str, ...]
    status: str
    event: str
    # "only ... releases can be PAST".
    past: str


CANCEL_BY_FORCE = "cancel --force"

VERBS: Mapping[str, Verb] = {verb.name: verb for verb in (
    Verb("pause", (PENDING, RUNNING), PAUSED, "paused", "paused"),
    Verb("resume", (PAUSED,), RUNNING, "resumed", "resumed"),
    Verb("cancel", (PENDING, RUNNING, PAUSED), CANCELLING, "cancelling", "cancelled"),
    Verb(CANCEL_BY_FORCE, (PENDING, RUNNING, PAUSED, CANCELLING), CANCELLING, "cancelling", "cancelled by force"),
    # status and event of the new release
    Verb("retry", (PARTIAL, FAILED, CANCELLED), PENDING, "created", "retried"),
    Verb("rollback", (SUCCESS, PARTIAL, FAILED, CANCELLED), PENDING, "created", "rolled back"),
)}


def _is_now(release: Release) -> str:
    """Return 'release 7 succeeded', 'release 7 is running'."""
    return f"release {release.id} " + ("succeeded" if release.status == SUCCESS else f"is {release.status}")


def check_verb(verb: str, release: Release) -> None:
    """Raise AppError(WRONG_STATE) unless the release's status allows the verb."""
    allowed = VERBS[verb].states
    if release.status not in allowed:
        states = " or ".join(filter(None, (", ".join(allowed[:-1]), allowed[-1])))
        raise AppError(WRONG_STATE, f"{_is_now(release)}; only {states} releases can be {VERBS[verb].past}")


def same_person(one: str, other: str) -> bool:
    """Return whether two identities (Act.identity) count as one person.

    A token, a certificate and a Unix user of one name do; of a token with a certificate one name is enough.
    """
    return not _names_in(one).isdisjoint(_names_in(other))


def _names_in(identity: str) -> set[str]:
    # a certificate's name may hold anything, BESIDE too: whatever is cut, one name never becomes two persons
    return {name.rstrip(")") for name in identity.casefold().split(BESIDE)}


def check_signed_in(identity: str) -> None:
    """Raise AppError(NOT_ALLOWED) for whoever acts through an API where nobody signs in: he may be anybody."""
    if identity == ANONYMOUS:
        raise AppError(NOT_ALLOWED, "through an API where nobody signs in nobody is a second person: "
                                    "set API_TOKENS_FILE, or use the command line")


def check_emergency(is_emergency: bool, reason: str) -> None:
    """Raise AppError(MISSING) where somebody goes without an approval and does not say why."""
    if is_emergency and not reason:
        raise AppError(MISSING, "reason is missing: an emergency goes without approval, so say why")


def check_approval(release: Release, identity: str, is_emergency: bool) -> None:
    """Raise AppError(WRONG_STATE) unless the release waits for an approval.

    AppError(NOT_ALLOWED): for its author, and where it is not known who made it or who approves.
    """
    if not release.awaits_approval:
        how = {GIVEN: "approved it", EMERGENCY: "let it go without one"}.get(release.approval)
        raise AppError(WRONG_STATE, f"{_is_now(release)} and waits for no approval" + (
            f": {release.approved_by} {how} at {release.approved_at}" if how else ""))
    if is_emergency:
        return
    how = "in an emergency it goes without: emergency and reason (--emergency --reason TEXT)"
    if release.author == ANONYMOUS:
        raise AppError(NOT_ALLOWED, f"release {release.id} was made through an API where nobody signs in, perhaps by "
                                    f"you: set API_TOKENS_FILE, and make it again; {how}")
    check_signed_in(identity)
    if same_person(release.author, identity):
        raise AppError(NOT_ALLOWED, f"release {release.id} was made by {release.author}: somebody else must approve "
                                    f"it; {how}")


def is_setter(freeze: Freeze, identity: str) -> bool:
    """Return whether somebody set a freeze; nobody is known to have, through an API where everybody is the same."""
    return same_person(freeze.setter, identity) and identity != ANONYMOUS


def may_lift(freeze: Freeze, identity: str) -> bool:
    """Return whether somebody's wish lifts a freeze: its setter's, and that of the second person."""
    return not freeze.two_persons or is_setter(freeze, identity) or bool(
        freeze.lift_wanted_by and not same_person(freeze.lift_wanted_by, identity))


def check_longer(freeze: Freeze, identity: str, until: str | None) -> None:
    """Raise AppError(WRONG_STATE) where a freeze of somebody else would end earlier: that would be a way to lift it."""
    if freeze.two_persons and not is_setter(freeze, identity) and (until or "~") < (freeze.until or "~"):
        now = f"until {freeze.until}" if freeze.until else "until somebody lifts it"
        raise AppError(WRONG_STATE, f"{freeze.target or 'everything'} is frozen {now} by {freeze.actor}: it can't end "
                                    f"earlier, but be lifted: {freeze.lifted_by}: `{freeze.mend}`")


def check_resume(release: Release, nodes: NodeIndex, strategy: Strategy, accepts: bool) -> None:
    """Raise AppError(WRONG_STATE) where failures must be accepted to resume, or can't be accepted."""
    exceeded = exceeded_limit(nodes, strategy)
    if exceeded and strategy.on_exceed == PAUSE and not accepts:
        raise AppError(WRONG_STATE, f"release {release.id}: {exceeded}: resume it with acceptFailures "
                                    "(--accept-failures), or cancel it")
    if exceeded and strategy.on_exceed != PAUSE and accepts:
        raise AppError(WRONG_STATE, f"release {release.id}: {exceeded}, and its strategy (onExceed) ends it then: "
                                    "resume without accepting, then retry")


def status_after_verb(verb: str, release: Release) -> str:
    """Return the status after a verb; a release that never started is pending again after resume."""
    return PENDING if verb == "resume" and not release.started_at else VERBS[verb].status


# The addresses of a release as bits of a number: two that have a bit in common share a node.
Addresses = Callable[[Candidate], int]


def _in_order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return releases in their order.

    Started ones go first, then those that are to go first, then lower versions: who is overtaken takes a higher one at
    its start, as a node that was sent a higher version is never sent a lower one.
    """
    return sorted(candidates, key=lambda c: (c.status == PENDING or not c.has_started, not c.goes_first, c.version))


def _may_start(c: Candidate, now: str, freezes: Freezes) -> bool:
    """Return whether a release may start as far as it alone goes; until then no other one waits for it (rule 2)."""
    return c.status != PENDING or (c.start_at <= now and not c.needs_approval and not freezes.of(c).frozen)


# Releases whose addresses _Ahead has as one number.
AHEAD_BLOCK = 64


class _Ahead:
    """Releases in their order that have started or may start: whom a later one waits for."""

    def __init__(self, addresses: Addresses):
        self._addresses = addresses
        self._releases: list[Candidate] = []
        self._first_of: dict[str, Candidate] = {}
        # Addresses of each AHEAD_BLOCK of them, and of all; as far as somebody asked, as that may read their nodes.
        self._blocks: list[int] = []
        self._all = self._added = 0

    def add(self, c: Candidate) -> None:
        self._releases.append(c)
        self._first_of.setdefault(c.target, c)

    def first_for(self, c: Candidate) -> Candidate | None:
        """Return the first one of the same target, else the first with a node in common, or None."""
        if c.target in self._first_of or not self._releases:
            return self._first_of.get(c.target)
        for number in range(self._added, len(self._releases)):
            if number % AHEAD_BLOCK == 0:
                self._blocks.append(0)
            self._blocks[-1] |= self._addresses(self._releases[number])
            self._all |= self._blocks[-1]
        self._added = len(self._releases)
        bits = self._addresses(c)
        if not self._all & bits:
            return None
        # of ten thousand releases each would be compared with all before it
        first = next(number for number, block in enumerate(self._blocks) if block & bits)
        return next(a for a in itertools.islice(self._releases, first * AHEAD_BLOCK, None) if self._addresses(a) & bits)


def _in_turn(candidates: Iterable[Candidate], now: str, freezes: Freezes,
             addresses: Addresses) -> Iterator[tuple[Candidate, Candidate | None]]:
    """Return each release with the one that it waits for, of the same target or with a node in common, or None."""
    ahead = _Ahead(addresses)
    for c in _in_order(candidates):
        yield c, ahead.first_for(c)
        if _may_start(c, now, freezes):
            ahead.add(c)


def ahead_of(release_id: int, candidates: Iterable[Candidate], now: str, freezes: Freezes,
             addresses: Addresses) -> list[Candidate]:
    """Return all releases that a pending one waits for, and those that these wait for, in their order."""
    in_order = _in_order(candidates)
    place_of = {c.id: place for place, c in enumerate(in_order)}
    found: set[int] = set()
    waiting = [release_id]
    while waiting:
        place = place_of[waiting.pop()]
        c = in_order[place]
        more = [a for a in in_order[:place] if a.id not in found and _may_start(a, now, freezes)
                and (a.target == c.target or addresses(a) & addresses(c))]
        found.update(a.id for a in more)
        waiting += [a.id for a in more if a.status == PENDING]
    return [a for a in in_order if a.id in found]


def state_of(before: Candidate) -> str:
    """Return in what state a release is that others wait for: 'which alice paused', 'which is running'."""
    return f"which {before.paused_by} paused" if by_whom(before.paused_by) else f"which is {before.status}" + (
        " and goes first" if before.goes_first and before.status == PENDING else "")


def runnable(candidates: Iterable[Candidate], now: str, freezes: Freezes,
             addresses: Addresses) -> tuple[list[int], list[int]]:
    """Return the ids of releases that may be claimed now, and of those that others have claimed (rule 2).

    A pending release waits for those before it, its start time, an approval and the end of a freeze; one that is paused
    or frozen needs an owner only while its nodes are in flight.
    """
    free: list[int] = []
    taken: list[int] = []
    for c, before in _in_turn(candidates, now, freezes, addresses):
        if c.status == PENDING:
            wanted = before is None and _may_start(c, now, freezes)
        else:
            waits = c.status == PAUSED or (c.status == RUNNING and freezes.of(c).frozen and c.has_pending)
            wanted = c.running_nodes > 0 or not waits
        if wanted:
            (taken if c.claimed else free).append(c.id)
    return free, taken


def waiting_reasons(candidates: Iterable[Candidate], now: str, freezes: Freezes,
                    addresses: Addresses) -> dict[int, str]:
    """Return the status_reason of each release that is not being worked on."""
    reasons = {}
    for c, before in _in_turn(candidates, now, freezes, addresses):
        freeze = freezes.of(c)
        if c.status == RUNNING and not c.claimed and c.running_nodes == 0 and (
                freeze.frozen or c.status_reason.startswith(FROZEN_BEGINS)):
            reasons[c.id] = one_line(freeze.text if freeze.frozen else REASON_PENDING)
        if c.status != PENDING:
            continue
        if c.needs_approval:
            reason = approval_text(c.id, c.author)
        elif before is not None and c.start_at <= now:
            reason = f"waiting for release {before.id}, {state_of(before)}"
        elif freeze.frozen:
            reason = freeze.text
        else:
            reason = REASON_PENDING if c.start_at <= now else f"scheduled for {c.start_at}" + (
                f", and after release {before.id}" if before else "")
        reasons[c.id] = one_line(reason)
    return reasons


# endregion


# region Why
# ======================================================================================
# Why: what a release waits for, step by step, and what would mend it. Pure.
# Uses: Vocabulary, Helpers, Model, Freezes, Node index, Status texts, Verbs.
# ======================================================================================

# States of a step: done or at work; nothing moves until somebody acts; it goes on by itself.
OK, STOPS, WAITS = STEP_STATES = ("ok", "stops", "waits")
# Steps of a release that has ended: that, and beside what makes up for it the way back.
ENDED, BACK = "end", "rollback"
# Nodes, or releases, that a sentence names.
MAX_NAMED = 3


class Step(NamedTuple):
    """One thing that a release depends on."""
    name: str
    # OK, STOPS or WAITS
    state: str
    text: str
    # The command that mends it, "" where there is none.
    mend: str = ""


class Occupant(NamedTuple):
    """The release that keeps an address busy."""
    release_id: int
    # Seconds for which it may; None: as long as its task runs.
    left_s: float | None


class Keeper(NamedTuple):
    """A node that keeps its place within maxParallelPer."""
    labels: str
    name: str
    # Seconds for which the agent of a failed one may be busy; None: it runs.
    left_s: float | None


class Facts(NamedTuple):
    """What was read in one transaction to explain a release; without one, what there is when nothing is to do.

    Of a release that has ended nothing but its row is read.
    """
    release: Release | None
    executors: Sequence[ExecutorRow]
    freezes: Freezes
    now: Moment
    # The clock that decides on claims and executors: see Transaction.now().
    now_s: float
    batches: Sequence[BatchProgress] = ()
    # Seconds to the deadline and name of each running node, in this order.
    running: Sequence[tuple[float, str]] = ()
    # What a pending release waits for.
    ahead: Sequence[Candidate] = ()
    # Names of pending nodes whose address another release has in flight or may still keep busy, with that release.
    busy: Sequence[tuple[str, Occupant]] = ()
    strategy: Strategy = NO_STRATEGY
    # Where maxParallelPer limits them: who keeps a place, and how many nodes of the batch are PENDING by their labels.
    keepers: Sequence[Keeper] = ()
    waiting: Mapping[str, int] = {}
    # As in Situation, of a paused release.
    exceeded: str = ""
    # DatabaseState.write_error
    database_error: str = ""


class Why(NamedTuple):
    """What a release waits for."""
    release: Release | None
    # In one sentence.
    text: str
    steps: Sequence[Step]

    @property
    def stopped_by(self) -> Step | None:
        """Return the first step that stops the release, None where it moves or goes on by itself."""
        return next((step for step in self.steps if step.state == STOPS), None)

    @property
    def line(self) -> str:
        """Return the sentence, and which release it is about."""
        if self.release is None:
            return self.text
        waits = any(step.state == WAITS for step in self.steps)
        state = "" if self.release.is_terminal else "is stopped: " if self.stopped_by else "waits: " if waits else ""
        return f"{self.release}{' ' if state else ': '}{state}{self.text}"


def explain(facts: Facts) -> Why:
    """Return why a release does not go on, or what it does; without a release, that nothing is to do."""
    release = facts.release
    if release and release.is_terminal:
        text = f"it has ended: {release.status}" + (f", {release.status_reason}" if release.status_reason else "")
        return Why(release, text, [Step(ENDED, OK, text)])
    steps = [_database_step(facts), _freeze_step(facts), _executor_step(facts)]
    if release is None:
        return Why(None, f"nothing to do: no release is open; {steps[-1].text}", steps)
    steps += [step for step in (
        _order_step(facts), _approval_step(facts), _start_step(facts), _pause_step(facts), _soak_step(facts),
        _preflight_step(facts), _nodes_step(facts), _errors_step(facts), _busy_step(facts), _slots_step(facts)) if step]
    first = next((step for state in (STOPS, WAITS) for step in steps if step.state == state), None)
    if first is None and release.status == PENDING:
        first = next(step for step in steps if step.name == "executor")
    return Why(release, first.text if first else true_reason(
        release, facts.executors, facts.now_s, facts.database_error), steps)


# Whether somebody works on a release: its owner does; its owner is gone, and another one takes it over; the next look
# is to find it; executors have looked since it could be taken, and none did; no executor can dispatch anything.
AT_WORK, ORPHANED, UNCLAIMED, IGNORED, NOBODY = "at work", "orphaned", "unclaimed", "ignored", "nobody"
# An executor that looks for work takes a release within this time.
TAKEN_WITHIN_S = 60.0


class Attendance(NamedTuple):
    """Whether somebody works on a release, or could."""
    # One of the five above.
    state: str
    # Who does or will, who looks for work, or why nobody does.
    text: str
    # The command that mends it, "" where nothing is to be mended.
    mend: str = ""
    # Time, None where it is not known.
    since: str | None = None


def attendance(release: Release | None, executors: Sequence[ExecutorRow], now_s: float,
               may_go_s: float = float("inf")) -> Attendance:
    """Return whether somebody works on a release, or could; without a release, whether somebody could.

    executors: the one seen last comes first; of ticks nothing but their start was seen. may_go_s: since when, in
    seconds since 1970, nothing but the want of an owner keeps the release; inf: something else does, or may.
    """
    owner = next((row for row in executors if release and row.owner == release.claim_owner), None)
    left_s = _claim_left_s(release, now_s) if release else 0.0
    if release and left_s and (owner is None or owner.kind == TICK or (owner.is_live(now_s) and not owner.error)):
        return Attendance(AT_WORK, f"{owner or release.claim_owner} works on it")
    live = [row for row in executors if row.is_live(now_s)]
    seen = next((row for row in executors if row.seen_s(now_s) >= 0), None)
    able = next((row for row in live if not row.error), None)
    if able is None and live:
        return Attendance(NOBODY, f"{live[0].host} can't dispatch: {live[0].error}", "releasectl check")
    if able is None:
        last = "none was seen for a day" if seen is None else \
            f"{'last seen' if seen.period_s else 'stopped'} {_time(seen.seen_s(now_s))} ago: {seen}"
        return Attendance(NOBODY, f"no executor is running ({last}): start `serve`", "releasectl serve",
                          seen and seen.seen_at)
    if release and release.claim_expires_at is not None:
        gone = f"{owner} was last seen {_time(owner.seen_s(now_s))} ago" if owner and owner.seen_s(now_s) >= 0 else \
            f"{owner or release.claim_owner} is gone"
        when = f"in {_time(left_s)}" if left_s else "at its next look"
        return Attendance(ORPHANED, f"{gone}; {able} takes it over {when}",
                          since=owner.seen_at if owner else release.updated_at)
    begun_s = max(may_go_s, epoch_or(able.started_at, now_s) if able.kind == SERVE else 0.0)
    if now_s - able.seen_s(now_s) - begun_s > TAKEN_WITHIN_S:
        return Attendance(IGNORED, f"nobody has taken it for {_time(now_s - may_go_s)}, though {able} looks for work: "
                                   "its log says why", "releasectl check", utc_text(may_go_s))
    looks = f"{able.host} looks for work now and then: run-once" if able.kind == TICK else f"{able} looks for work"
    return Attendance(UNCLAIMED, f"{looks}, last {_time(able.seen_s(now_s))} ago")


def _claim_left_s(release: Release, now_s: float) -> float:
    """Return for how long its owner keeps a release, 0 where nobody has it."""
    left_s = epoch_or(release.claim_expires_at, now_s) - now_s
    return left_s if 0 < left_s <= MAX_CLAIM_TTL_S else 0.0


def needs_owner(release: Release) -> bool:
    """Return whether somebody should work on a release: on a paused one only while nodes are in flight (a claim)."""
    return not release.is_terminal and (release.status != PAUSED or release.claim_expires_at is not None)


def true_reason(release: Release, executors: Sequence[ExecutorRow], now_s: float, database_error: str = "") -> str:
    """Return status_reason, or what is true instead where nobody works who would keep it up to date.

    database_error: DatabaseState.write_error; who works can't write that then.
    """
    reason = release.status_reason
    if not needs_owner(release):
        return reason
    found = attendance(release, executors, now_s)
    if found.state == NOBODY:
        nobody = f"the database takes no writes: {database_error}" if database_error else found.text
        stays = release.status in (PENDING, PAUSED) or reason.startswith(FROZEN_BEGINS)
        return f"{reason}; {nobody}" if stays and reason and REASON_PENDING not in reason else nobody
    return f"nobody works on it: {found.text}" if found.state == ORPHANED else reason


def _database_step(facts: Facts) -> Step:
    if facts.database_error:
        return Step("database", STOPS, f"it takes no writes: {facts.database_error}", "releasectl check")
    return Step("database", OK, "it answers")


def _freeze_step(facts: Facts) -> Step:
    """Return what is frozen: of a release the freezes that hold it, the one that ends last first."""
    release = facts.release
    freezes = facts.freezes.holding(release) if release else facts.freezes.on
    if not freezes and release and release.during_freeze and facts.freezes.on:
        return Step("freeze", OK, f"it goes out all the same (--during-freeze): {facts.freezes.on[0].line()}")
    if not freezes:
        return Step("freeze", OK, "not frozen")
    has_pending = release is not None and (release.status == PENDING or any(b.count(PENDING) for b in facts.batches))
    state = OK if not has_pending else WAITS if freezes[0].until else STOPS
    return Step("freeze", state, "; ".join(_with_time_left(freeze, facts) for freeze in freezes), freezes[0].mend)


def _with_time_left(freeze: Freeze, facts: Facts) -> str:
    left_s = epoch_or(freeze.until, facts.now_s) - facts.now_s
    line = freeze.line(end=_until(left_s, facts.now) if left_s > 0 else "")
    return "; ".join(filter(None, (line, freeze.lifted_by)))


def _executor_step(facts: Facts) -> Step:
    found = attendance(facts.release, facts.executors, facts.now_s, _may_go_s(facts))
    if found.state == NOBODY and facts.database_error:
        return Step("executor", WAITS, "not known: who works can't write that it does")
    state = {NOBODY: STOPS, IGNORED: STOPS, ORPHANED: WAITS}.get(found.state, OK)
    return Step("executor", state, found.text, found.mend)


def _may_go_s(facts: Facts) -> float:
    """Return since when nothing but the want of an owner keeps a release, inf where something else does."""
    release = facts.release
    if release is None or facts.freezes.of(release).frozen or facts.ahead or release.status == PAUSED or \
            release.awaits_approval:
        return float("inf")
    return may_go_since(release, facts.strategy)


def may_go_since(release: Release, strategy: Strategy) -> float:
    """Return since when a release that nobody has may be taken, in seconds since 1970.

    inf: it waits for an approval, is frozen, or the end of that is still to be written down.
    """
    if release.awaits_approval or release.status_reason.startswith(FROZEN_BEGINS):
        return float("inf")
    start_s = epoch_or(strategy.start_at, 0.0) if release.status == PENDING else 0.0
    return max(epoch_or(release.updated_at, float("inf")), start_s)


def _order_step(facts: Facts) -> Step | None:
    release, ahead = facts.release, facts.ahead
    if release is None or release.status != PENDING or not ahead:
        return None
    text = in_words(ahead, MAX_NAMED, ", then ", lambda c: f"release {c.id}, {state_of(c)}")
    paused = next((c for c in ahead if c.status == PAUSED), None)
    return Step("order", STOPS if paused else WAITS, f"waiting for {text}", f"releasectl why {(paused or ahead[0]).id}")


def _approval_step(facts: Facts) -> Step | None:
    release = facts.release
    if release is None or release.started_at or not release.approval:
        return None
    if release.awaits_approval:
        return Step("approval", STOPS, approval_text(release.id, release.author),
                    approval_mend(release.id, release.author))
    how = {GIVEN: f"approved by {release.approved_by}",
           EMERGENCY: f"goes without: emergency of {release.approved_by}"}.get(release.approval, "needs none")
    return Step("approval", OK, how)


def _start_step(facts: Facts) -> Step | None:
    left_s = epoch_or(facts.strategy.start_at, 0.0) - facts.now.wall
    if facts.release is None or facts.release.status != PENDING or left_s <= 0:
        return None
    return Step("start", WAITS, f"it starts {_until(left_s, facts.now, 'at')}")


def _pause_step(facts: Facts) -> Step | None:
    release = facts.release
    if release is None or release.status != PAUSED:
        return None
    accepts = " --accept-failures" if facts.exceeded and facts.strategy.on_exceed == PAUSE else ""
    return Step("pause", STOPS, release.status_reason or "paused", f"releasectl resume {release.id}{accepts}")


def _soak_step(facts: Facts) -> Step | None:
    release = facts.release
    number = next((b.number for b in facts.batches if b.is_open), 0)
    before = max((b.number for b in facts.batches if b.number < number), default=0)
    if release is None or release.status != RUNNING or before <= release.passed_batch:
        return None
    left_s = facts.now.left_s(release.soak_until, release.soak_clock, facts.strategy.soak_s)
    return Step("soak", WAITS, f"soaking after batch {before} {_until(left_s, facts.now)}") if left_s else None


def _preflight_step(facts: Facts) -> Step | None:
    text = _part_of_progress(facts, ASKING).partition(";")[0]
    return Step("preflight", OK, ASKING + text) if text else None


def _nodes_step(facts: Facts) -> Step | None:
    """Return the nodes in flight, those with the next deadline first."""
    batch = next((b for b in facts.batches if b.is_open), None)
    if batch is None:
        return None
    text = (f"batch {batch.number} of {facts.batches[-1].number}: {batch.count(SUCCESS, FAILED, SKIPPED)} of "
            f"{count_of_nodes(batch.total)} done")

    def with_deadline(node: tuple[float, str]) -> str:
        left_s, name = node
        return f"{name} ({_until(left_s, facts.now, 'deadline') if left_s > 0 else 'past its deadline'})"

    if not facts.running:
        return Step("nodes", OK, text)
    if facts.release and (facts.freezes.of(facts.release).frozen or facts.release.status == PAUSED):
        # the rows don't tell which; the deadline of those that wait moves on
        names = in_words([name for _, name in facts.running], MAX_NAMED)
        return Step("nodes", OK, f"{text}, {len(facts.running)} in flight, or to be tried again after that: {names}")
    return Step("nodes", OK, f"{text}, {len(facts.running)} in flight: "
                             f"{in_words(facts.running, MAX_NAMED, text=with_deadline)}")


def _part_of_progress(facts: Facts, begins: str) -> str:
    """Return a part of the status_reason of a release at work in a batch or its preflight, "" where it has none."""
    release = facts.release
    if release is None or not release.status_reason.startswith(("batch ", ASKING)) or attendance(
            release, facts.executors, facts.now_s).state != AT_WORK:
        return ""
    return release.status_reason.partition(begins)[2]


def _errors_step(facts: Facts) -> Step | None:
    text = _part_of_progress(facts, RETRYING)
    return Step("errors", WAITS, text, "releasectl check") if text else None


def _busy_step(facts: Facts) -> Step | None:
    def occupied(node: tuple[str, Occupant]) -> str:
        name, by = node
        return f"{name} is at work for release {by.release_id}" if by.left_s is None else \
            f"{name} may still be busy with release {by.release_id} {_until(by.left_s, facts.now)}"

    at_work = [by.release_id for _, by in facts.busy if by.left_s is None]  # else it goes on by itself, at that time
    return Step("busy", WAITS, in_words(facts.busy, MAX_NAMED, text=occupied),
                f"releasectl why {at_work[0]}" if at_work else "") if facts.busy else None


def _slots_step(facts: Facts) -> Step | None:
    shortage = _part_of_progress(facts, NO_SLOT).partition(";")[0]
    if shortage:  # a paused release gives its slots back as its requests end
        user = re.search(r"release (\d+)", shortage)
        return Step("slots", WAITS, f"waiting for a free slot ({shortage}: AGENT_CONCURRENCY)",
                    f"releasectl pause {user[1]}" if user else "")
    most, running = facts.strategy.max_parallel, len(facts.running)
    if most and running >= most and any(b.count(PENDING) for b in facts.batches):
        return Step("slots", WAITS, f"waiting for a free slot ({running} of {most} in use: maxParallel)")
    full = in_words(_full_labels(facts), MAX_NAMED, "; ") if facts.waiting else ""
    return Step("slots", WAITS, f"waiting for a free slot ({full}: maxParallelPer)") if full else None


def _full_labels(facts: Facts) -> list[str]:
    """Return what keeps all pending nodes of the batch from a dispatch, the labels of the most nodes first."""
    limits, keepers = facts.strategy.max_parallel_per, dict[Label, list[Keeper]]()
    for keeper in facts.keepers:
        for label in limited_labels(keeper.labels, limits):
            keepers.setdefault(label, []).append(keeper)
    in_flight = {label: len(found) for label, found in keepers.items()}
    waiting = collections.Counter[Label]()
    for labels, count in facts.waiting.items():
        full = full_labels(limited_labels(labels, limits), in_flight, limits)
        if not full:
            return []
        waiting.update(dict.fromkeys(full, count))

    def kept_by(keeper: Keeper) -> str:
        return keeper.name if keeper.left_s is None else \
            f"{keeper.name}, which failed and may be busy {_until(keeper.left_s, facts.now)}"

    return [f"{key}={value} has {in_flight[key, value]} of {limits[key]} ("
            f"{in_words(keepers[key, value], MAX_NAMED, text=kept_by)}), for which {count_of_nodes(count)} "
            f"wait{'s' if count == 1 else ''}" for (key, value), count in waiting.most_common()]


def _time(seconds: float) -> str:
    return f"{max(seconds, 0.0):.0f} s" if seconds < 90 else rough_time(seconds)


def _until(left_s: float, now: Moment, word: str = "until") -> str:
    """Return 'until 06:26:40Z, in 19 s'; with the day where that is far off."""
    text = utc_text(now.wall + left_s)
    return f"{word} {text[11:19] if left_s < 43200 else text[:16]}Z, in {_time(left_s)}"


# endregion


# region Verdict
# ======================================================================================
# Verdict: everything that is wrong, worst first, each with its mend (contract sections
#   5 and 8). Pure.
# Uses: Vocabulary, Helpers, Model, Freezes, Status texts, Why.
# ======================================================================================

# How bad a problem is: something is not as it should be, or somebody should look at it.
_ERROR, _WARNING = PROBLEM_SEVERITIES = ("error", "warning")
# The kinds of problems, worst first: how bad each is, and its headline.
PROBLEM_KINDS: Mapping[str, tuple[str, str]] = {
    "database": (_ERROR, "The database can't be used"),
    "executor": (_ERROR, "Nobody looks for work"),
    "unattended": (_ERROR, "Nobody works on release {id}"),
    "certificate": (_ERROR, "A certificate can't be used"),
    "failed": (_ERROR, "Release {id} failed"),
    "twins": (_ERROR, "Two nodes have one address"),
    "paused": (_WARNING, "Release {id} needs you: paused"),
    "approval": (_WARNING, "Release {id} waits for approval"),
    "failures": (_WARNING, "Release {id} has failures"),
    "ahead": (_WARNING, "Nodes run what they should not"),
    "unknown": (_WARNING, "Nobody knows what some nodes run"),
    "behind": (_WARNING, "Nodes are behind"),
    "partial": (_WARNING, "Release {id} ended partial"),
    "notifications": (_WARNING, "Notifications do not get out"),
    "frozen": (_WARNING, "Frozen: nothing is dispatched"),
    "idle": (_WARNING, "No executor is running"),
    "expires": (_WARNING, "A certificate expires soon"),
}
# Problems of a kind that are told one by one; the rest is counted.
MAX_OF_A_KIND = 20
# A certificate, and a CRL, that is good for less than this should be renewed: a job makes CRLs anew every day or week.
RENEW_DAYS, RENEW_CRL_DAYS = 14.0, 1.0


class Problem(NamedTuple):
    """One thing that is wrong, and what would mend it."""
    # A key of PROBLEM_KINDS.
    kind: str
    text: str
    # The command that mends it, or that tells how; "" where there is none.
    mend: str
    # Time, None where it is not known.
    since: str | None = None
    release_id: int | None = None
    # As in Unmended.
    rollback: str = ""

    @property
    def mends(self) -> str:
        """Return the mend, and the way back beside it."""
        return " or ".join(filter(None, (self.mend, self.rollback)))

    @property
    def severity(self) -> str:
        """Return one of PROBLEM_SEVERITIES."""
        return PROBLEM_KINDS[self.kind][0]

    @property
    def title(self) -> str:
        """Return its headline."""
        return PROBLEM_KINDS[self.kind][1].format(id=self.release_id)


class DriftCount(NamedTuple):
    """The enabled nodes of one drift."""
    nodes: int = 0
    # Name of the first of them, by id.
    first: str = ""
    # Since when the oldest of them is so, as far as is known.
    since: str | None = None
    # How many of them are not online, and get no release until they are.
    away: int = 0


class FleetCounts(NamedTuple):
    """The enabled nodes, counted."""
    # By DRIFTS.
    drift: Mapping[str, DriftCount]
    # As in OverviewFacts.
    twins: str = ""
    twin: str = ""


class CertificateState(NamedTuple):
    """A certificate or CRL of this process."""
    name: str
    # None where it can't be read.
    ends_at: str | None = None
    days_left: float | None = None
    # What is wrong with it, "" for nothing.
    message: str = ""


# A notification that is older than this has not got out.
OLD_NOTIFICATION_S = 300.0


class Waiting(NamedTuple):
    """What is in the outbox."""
    total: int
    # Seconds since the oldest event of these, and its time; 0 and "" where there is none.
    oldest_s: float
    oldest_at: str
    # Of the last try that failed, "" for none.
    last_error: str

    @property
    def is_late(self) -> bool:
        """Return whether the oldest has not got out."""
        return self.oldest_s > OLD_NOTIFICATION_S

    @property
    def text(self) -> str:
        """Return that they have not got out, and why."""
        have = "has" if self.total == 1 else "have"
        return f"{count_of(self.total, 'notification')} {have} not got out: " + (
            self.last_error or "none was tried: no executor with NOTIFY_COMMAND or NOTIFY_URL is running")


NO_WAITING = Waiting(0, 0.0, "", "")


class Unmended(NamedTuple):
    """A failed or partial release that nothing has made up for."""
    release: Release
    # The command that would.
    mend: str
    # Why a retry of all its nodes is refused, "" where it is not.
    refused: str = ""
    # The command that rolls it back, "" where that can't be, or is the mend.
    rollback: str = ""


class OverviewFacts(NamedTuple):
    """What the verdict is made from."""
    # Running, paused and cancelling releases, how many are pending, and which of these may be taken, with since when.
    active: Sequence[Release] = ()
    pending: int = 0
    startable: Sequence[tuple[Release, float]] = ()
    # When the oldest of these was created, and since when each of the paused ones is that, by id.
    oldest_pending: str | None = None
    paused_at: Mapping[int, str] = {}
    # Of the pending ones those that wait for an approval.
    awaiting: Sequence[Release] = ()
    executors: Sequence[ExecutorRow] = ()
    freezes: Freezes = NO_FREEZES
    # The clock that decides on claims and executors: see Transaction.now().
    now_s: float = 0.0
    # Newest first.
    failures: Sequence[Unmended] = ()
    drift: Mapping[str, DriftCount] = {}
    # What is wrong with the addresses of the enabled nodes, "" for nothing, and the name of one to be disabled.
    twins: str = ""
    twin: str = ""
    certificates: Sequence[CertificateState] = ()
    notifications: Waiting = NO_WAITING
    # Why the database can't be used, "" where it can, and since when this process knows that.
    database_error: str = ""
    database_error_at: str | None = None


class Overview(NamedTuple):
    """The verdict."""
    problems: Sequence[Problem]
    # In one sentence.
    text: str
    facts: OverviewFacts

    @property
    def is_well(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems


def judge(facts: OverviewFacts) -> Overview:
    """Return the verdict on what was found."""
    rules = (_database_problems, _executor_problems, _release_problems, _twin_problems, _drift_problems,
             _freeze_problems, _notification_problems, _certificate_problems)
    order = list(PROBLEM_KINDS)
    found = sorted((problem for rule in rules for problem in rule(facts)), key=lambda p: order.index(p.kind))
    problems = [problem for _, group in itertools.groupby(found, key=lambda p: p.kind)
                for problem in _first_of_a_kind(list(group))]
    return Overview(problems, _verdict_text(problems, facts), facts)


def _first_of_a_kind(problems: Sequence[Problem]) -> list[Problem]:
    """Return problems, of many the first ones and how many more there are; a since that can't be read is None."""
    shown = [p._replace(since=p.since if epoch_or(p.since, 0.0) else None) for p in problems[:MAX_OF_A_KIND]]
    more = len(problems) - len(shown)
    return shown + ([Problem(problems[0].kind, f"and {more} more of this kind", "releasectl list")] if more else [])


def _verdict_text(problems: Sequence[Problem], facts: OverviewFacts) -> str:
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        return f"{count_of(len(problems), 'problem')}: {problems[0].text}{more}"
    waiting = f"{facts.pending} waiting" if facts.pending else ""
    working = in_words(facts.active, MAX_NAMED, text=lambda release: f"{release.status} {release}" + (
        f", a rollback of release {release.rollback_of}" if release.rollback_of else ""))
    return "all is well: " + (", ".join(filter(None, (working, waiting))) or "nothing to do")


def _database_problems(facts: OverviewFacts) -> Iterator[Problem]:
    if facts.database_error:
        yield Problem("database", f"the database can't be used: {facts.database_error}", "releasectl check",
                      facts.database_error_at)


def _executor_problems(facts: OverviewFacts) -> Iterator[Problem]:
    """Yield that nobody can work, or which releases nobody works on though somebody could."""
    anybody = attendance(None, facts.executors, facts.now_s)
    alone = [(release, found) for release, since_s in (
        *((release, float("inf") if facts.freezes.of(release).frozen else may_go_since(release, NO_STRATEGY))
          for release in facts.active if needs_owner(release)), *facts.startable)
             for found in [attendance(release, facts.executors, facts.now_s, since_s)] if found.state != AT_WORK]
    count = sum(release.status != PENDING for release, _ in alone) + facts.pending
    if anybody.state != NOBODY:
        for release, found in alone:
            if found.state in (ORPHANED, IGNORED):
                text = f"nobody works on it: {found.text}" if found.state == ORPHANED else found.text
                yield Problem("unattended", f"{release}: {text}", f"releasectl why {release.id}", found.since,
                              release.id)
    elif not facts.database_error and count:
        begun = [*(release.created_at for release, _ in alone), *([facts.oldest_pending] if facts.pending else [])]
        since = max(min(filter(None, begun), default=""), anybody.since or "")
        yield Problem("executor", f"{anybody.text}; nobody works on {count_of(count, 'release')}", anybody.mend, since)
    elif not facts.database_error and not any(needs_owner(release) for release in facts.active):
        yield Problem("idle", anybody.text, anybody.mend, anybody.since)


def _release_problems(facts: OverviewFacts) -> Iterator[Problem]:
    for release, mend, refused, rollback in facts.failures:
        why = release.status_reason or release.error_msg
        text = f"{release} of {release.target} ended {release.status}" + (f": {why}" if why else "") + (
            f"; a retry of all its nodes is refused: {refused}" if refused else "")
        yield Problem(release.status, text, mend, release.finished_at, release.id, rollback)
    for release in facts.active:
        if release.status == PAUSED:
            yield Problem("paused", f"{release} waits for a person: {release.status_reason or 'paused'}",
                          f"releasectl why {release.id}", facts.paused_at.get(release.id, release.updated_at),
                          release.id)
        elif release.failed_nodes:
            yield Problem("failures", f"{release} is {release.status}, {count_of_nodes(release.failed_nodes)} failed",
                          f"releasectl status {release.id}", release.started_at, release.id)
    for release in facts.awaiting:
        yield Problem("approval", f"{release} of {release.target} waits for a person: {release.status_reason}",
                      approval_mend(release.id, release.author), release.created_at, release.id)


def _drift_problems(facts: OverviewFacts) -> Iterator[Problem]:
    for drift in (AHEAD, UNSURE, BEHIND):
        found = facts.drift.get(drift, DriftCount())
        if found.nodes:
            nodes = count_of_nodes(found.nodes)
            run, they = ("runs", "it") if found.nodes == 1 else ("run", "they")
            text = {AHEAD: f"{nodes} {run} the payload of a release that failed or was cancelled",
                    UNSURE: f"it is not known what {nodes} {run}, as a later try may have changed it",
                    BEHIND: f"{nodes} {run} an older payload than {they} should"}[drift]
            names = f": {found.first}" + (f" and {found.nodes - 1} more" if found.nodes > 1 else "")
            of_them = "it is" if found.nodes == 1 else f"{found.away} of them {'is' if found.away == 1 else 'are'}"
            away = f"; {of_them} not online" if found.away else ""
            catches_up = drift == BEHIND and found.away < found.nodes
            yield Problem(drift, f"{text}{names}{away}", "releasectl catch-up" if catches_up else
                          f"releasectl node list --drift {drift}", found.since)


def _twin_problems(facts: OverviewFacts) -> Iterator[Problem]:
    if facts.twins:
        yield Problem("twins", facts.twins, f"releasectl node set {shlex.quote(facts.twin)} --disable")


def _freeze_problems(facts: OverviewFacts) -> Iterator[Problem]:
    for freeze in facts.freezes.on:
        text = "; ".join(filter(None, (freeze.line(), freeze.lifted_by)))
        yield Problem("frozen", text, freeze.mend, freeze.at)


def _notification_problems(facts: OverviewFacts) -> Iterator[Problem]:
    if facts.notifications.is_late:
        yield Problem("notifications", facts.notifications.text, "releasectl check --notify",
                      facts.notifications.oldest_at)


def _certificate_problems(facts: OverviewFacts) -> Iterator[Problem]:
    for found in facts.certificates:
        if found.message or found.days_left is None or found.days_left <= 0:
            yield Problem("certificate", f"{found.name} can't be used" + (f": {found.message}" if found.message else
                          ": it has expired"), "releasectl check", found.ends_at)
        elif found.days_left < (RENEW_CRL_DAYS if found.name.endswith("CRL") else RENEW_DAYS):
            yield Problem("expires", f"{found.name} is good for {rough_time(found.days_left * 86400)} more: renew it",
                          "releasectl check")


# endregion


# region Engines
# ======================================================================================
# Engines: the one place where SQLite and PostgreSQL, and its drivers, differ.
# Uses: Vocabulary, Helpers, Settings, Certificates.
# ======================================================================================

BUSY_TIMEOUT_S = 5.0
# Connections of one process to PostgreSQL, and how long a thread waits for one of them.
MAX_DB_CONNECTIONS, CONNECTION_WAIT_S = 16, 30.0
# A transaction is cut off after this time: above the server's own limits, 10 s for the lock and 30 s for a statement.
MAX_TRANSACTION_S = 45.0
# The same for a transaction that begins while the process ends.
LAST_TRANSACTION_S = 2.0
# Key of PostgreSQL's advisory lock.
PG_LOCK_KEY = 7235419
# A shorter password is masked in what a driver says only where it is no part of a longer word.
MIN_MASKED_CHARS = 6
LOCK_NOT_AVAILABLE, PROTOCOL_VIOLATION = "55P03", "08P01"
# Servers that only speak PostgreSQL's protocol, as version() names them.
OTHER_SERVERS = re.compile(
    r"CockroachDB|-YB-|Redshift|Greenplum|Materialize|RisingWave|CrateDB|GaussDB|QuestDB|openGauss", re.IGNORECASE)


class WatchedTransaction:
    """An open transaction under the watchdog's eye."""
    __slots__ = ("is_cut", "since", "sock", "until")

    def __init__(self, sock: socket.socket | None, limit_s: float):
        self.sock = sock  # a second handle of the connection's socket
        self.since = time.monotonic()
        self.until = self.since + limit_s
        self.is_cut = False


class _Watchdog:
    """Shuts down the socket of a transaction that takes too long: a driver may wait for ever for a server that hangs.

    The waiting thread then gets an error, and does not know whether a COMMIT took place.
    """

    EVERY_S, IDLE_ROUNDS = 0.25, 40

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[WatchedTransaction] = set()
        self._thread: threading.Thread | None = None
        self._end_at = float("inf")

    def watch(self, connection: Any, limit_s: float) -> WatchedTransaction:
        """Watch a connection until unwatch()."""
        sock = None
        with contextlib.suppress(Exception):  # one that is closed already fails by itself
            handle = connection._usock if hasattr(connection, "_usock") else connection  # noqa: SLF001 - pg8000
            sock = socket.fromfd(handle.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        watch = WatchedTransaction(sock, limit_s)
        with self._lock:
            self._watches.add(watch)
            if self._thread is None:
                with contextlib.suppress(RuntimeError):  # no room for a thread: the next one tries again
                    thread = threading.Thread(target=self._run, name="database-guard", daemon=True)
                    thread.start()
                    self._thread = thread
        return watch

    def unwatch(self, watch: WatchedTransaction) -> None:
        with self._lock:
            self._watches.discard(watch)
        if watch.sock is not None:
            watch.sock.close()

    def end_within(self, seconds: float) -> None:
        """Cut off all transactions in so many seconds, and later ones after LAST_TRANSACTION_S: the process ends."""
        with self._lock:
            self._end_at = min(self._end_at, time.monotonic() + seconds)

    @property
    def is_ending(self) -> bool:
        return self._end_at != float("inf")

    def _run(self) -> None:
        rounds = 0
        while rounds < self.IDLE_ROUNDS:
            time.sleep(self.EVERY_S)
            now = time.monotonic()
            with self._lock:
                rounds = 0 if self._watches else rounds + 1
                for watch in self._watches:
                    until = min(watch.until, max(self._end_at, watch.since + LAST_TRANSACTION_S))
                    if now >= until and not watch.is_cut and watch.sock is not None:
                        watch.is_cut = True
                        with contextlib.suppress(OSError):
                            watch.sock.shutdown(socket.SHUT_RDWR)
                if rounds >= self.IDLE_ROUNDS:
                    self._thread = None


class FairSemaphore:
    """A semaphore that serves its waiters in the order of their arrival."""

    def __init__(self, count: int):
        self._free = count
        self._queue: collections.deque[threading.Event] = collections.deque()
        self._lock = threading.Lock()

    def acquire(self, timeout_s: float) -> bool:
        """Return whether a place was free within the time."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            mine = threading.Event()
            self._queue.append(mine)
        if mine.wait(timeout_s):
            return True
        with self._lock:
            if not mine.is_set():
                self._queue.remove(mine)
            return mine.is_set()

    def release(self) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._free += 1


def _locking_process(file: os.stat_result) -> int:
    """Return the id of another process that has an SQLite file open, or 0.

    The lock itself is not tried: closing a handle of the file would drop all locks of this process.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            kind, _, _, pid, place, first = line.replace("->", "").split()[1:7]
            # SQLite's range of shared locks
            if kind != "POSIX" or int(first) < 0x40000000 or int(place.split(":")[2]) != file.st_ino:
                continue
            with contextlib.suppress(OSError):
                if int(pid) != os.getpid() and any(os.path.samestat(os.stat(f"/proc/{pid}/fd/{handle}"), file)
                                                   for handle in os.listdir(f"/proc/{pid}/fd")):
                    return int(pid)
    return 0


def _read_text(data: bytes) -> str:
    """Return a stored text; SQLite takes any bytes by hand, and one row of them must not fail the reading of all.

    What is not UTF-8 becomes SUB, which no JSON may hold: such a payload or strategy can't be used.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        return re.sub("[\udc80-\udcff]", "\x1a", data.decode("utf-8", "surrogateescape"))


class SqliteEngine:
    """The SQL that only SQLite understands, and one file of it."""

    name = "sqlite"
    begin_read = "BEGIN"
    begin_write = "BEGIN IMMEDIATE"
    now_sql = "SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
    has_table_sql = "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
    has_any_table_sql = "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    # The id of the next release: to know it, and to use it up.
    next_release_id_sql = take_release_id_sql = \
        "SELECT COALESCE(MAX(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'release_tasks'"
    audit_id_sql = "?"
    # The ids of nodes as one text.
    joined_sql = "group_concat(node_id)"
    # Statements that lift the limits of a transaction, for a migration.
    no_limits_sql: tuple[str, ...] = ()
    # A number that grows with each failover; 0 on a standby.
    timeline_sql = "SELECT 1"
    error: tuple[type[Exception], ...] = (sqlite3.Error,)
    max_connections = 1 << 20  # readers wait for nobody

    def __init__(self, url: str):
        self.path = url[len("sqlite:///"):]
        if sqlite3.sqlite_version_info < (3, 26):
            raise ConfigError(f"SQLite {sqlite3.sqlite_version} is too old: 3.26 or newer is needed")

    def __str__(self) -> str:
        return "database " + self.path.encode("utf-8", "backslashreplace").decode()  # a path may be any bytes

    def identity(self) -> object:
        """Return which file the path, its -wal and its -shm are now: a deleted one would go on taking writes."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return (found.st_dev, found.st_ino, found.st_nlink > 1, *map(inode_of, self._side_files()))

    def _side_files(self) -> tuple[str, str]:
        path = os.path.realpath(self.path)
        return f"{path}-wal", f"{path}-shm"

    def save_new_wal(self) -> str:
        """Link a -wal that another process has begun under a second name: our last connection would remove it.

        Return what was found, for the log.
        """
        wal = self._side_files()[0]
        found = f"{self}: {wal} or its -shm was removed or replaced while this process worked with it"
        with contextlib.suppress(OSError):
            if os.path.getsize(wal):
                kept = f"{wal}.{int(time.time())}"
                os.link(wal, kept)
                return f"{found}; what others wrote into a new one is kept as {kept}"
        return found

    def _refuse_unsafe_file(self) -> None:
        """Raise DatabaseError where the file has a second name, or is open elsewhere without its -wal."""
        try:
            found = os.stat(self.path)
        except OSError:
            return
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
            raise DatabaseError(f"{self} has a second name (hard link), under which it would have another -wal: "
                                f"remove all but one (find / -xdev -inum {found.st_ino})")
        give_up_at = time.monotonic() + 1.0  # another process may just open or close it
        while not all(map(os.path.exists, self._side_files())):
            pid = _locking_process(found)
            if not pid:
                return
            if time.monotonic() > give_up_at:
                raise DatabaseError(f"{self}: its -wal or -shm was removed while process {pid} works with it: "
                                    "stop that process, which then saves what it has, and try again")
            time.sleep(0.05)

    def connect(self, create: bool) -> sqlite3.Connection:
        """Return a connection in autocommit mode; with create make the file first. Raise DatabaseError."""
        folder = os.path.dirname(self.path) or os.curdir  # not abspath(): the current folder may be gone
        if not os.path.isdir(folder):
            raise DatabaseError(f"{self}: the folder {folder} does not exist")
        if not create and not os.path.exists(self.path):
            raise DatabaseError(f"{self} does not exist: bring it back, or make a new one with `releasectl migrate`")
        self._refuse_unsafe_file()
        connection = None
        try:
            if create:
                self._make_file()
            # statements differ by their number of rows: a larger cache would be megabytes without hits
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None,
                                         check_same_thread=False, cached_statements=16)
            connection.text_factory = _read_text
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            # with much history each node is another page: 16 MiB of WAL write it back less often
            connection.execute("PRAGMA wal_autocheckpoint = 4000")
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()  # makes -wal and -shm
            return connection
        except (sqlite3.Error, OSError) as error:
            close_quietly(connection)
            raise DatabaseError(self.explain(error)) from None

    def _make_file(self) -> None:
        """Make the file with mode 0600, whatever the umask, where there is none; -wal and -shm get the same mode."""
        with contextlib.suppress(FileExistsError):  # realpath(): a link may lead to where no file is yet
            handle = os.open(os.path.realpath(self.path), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(handle, 0o600)
                if os.geteuid() == 0:  # the service must write it; SQLite gives -wal and -shm the same owner
                    folder = os.stat(os.path.dirname(os.path.realpath(self.path)))
                    os.fchown(handle, folder.st_uid, folder.st_gid)
            finally:
                os.close(handle)

    @staticmethod
    def is_data_error(error: Exception) -> bool:
        """Return whether the error is due to a value, not to the file."""
        return isinstance(error, (sqlite3.DataError, OverflowError, ValueError)) or (
            isinstance(error, (sqlite3.InterfaceError, sqlite3.ProgrammingError)) and "binding parameter" in str(error))

    def explain(self, error: Exception) -> str:
        """Return one line: what is wrong with the file, and what would mend it."""
        if isinstance(error, OSError):
            return f"{self} can't be made: {os_reason(error)}"
        text = str(error)
        if "not a database" in text:
            return f"{self} is not an SQLite file"
        if "readonly" in text:
            return f"{self} is read-only: give this user write permission on the file and its folder"
        if "unable to open" in text:
            return f"{self} can't be opened: look at the permissions of the file and its folder"
        if "locked" in text or "busy" in text:
            return f"{self} is locked by another process for more than {BUSY_TIMEOUT_S:g} s"
        if "full" in text:
            return f"{self}: the disk is full"
        return f"{self}: {one_line(text)}"

    def backup(self, path: str) -> int:
        """Write a checked copy to a new file, mode 0600; return its size in bytes.

        Others may read and write meanwhile. The file gets its name when it is complete and on the disk.
        """
        source = self.connect(create=False)
        try:
            if os.path.lexists(path):  # before a copy is made for nothing
                raise FileExistsError
            with whole_file(path, 0o600, is_new=True) as (_, temporary):
                self._copy(source, temporary)
        except FileExistsError:
            raise AppError(EXISTS, f"{path} exists already: name another file") from None
        except (sqlite3.Error, OSError) as error:
            raise DatabaseError(f"{self} could not be copied to {path}: {os_reason(error)}") from None
        finally:
            close_quietly(source)
        return os.path.getsize(path)

    @staticmethod
    def _copy(source: sqlite3.Connection, path: str) -> None:
        """Copy a database into an empty file and check the copy; raise sqlite3.Error."""
        target = sqlite3.connect(path, isolation_level=None)
        try:
            # in one step: in several it would start again after each commit of another process
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")  # a single file, without a -wal
            found = target.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"the copy is not sound: {one_line(found)}")
        finally:
            close_quietly(target)

    @staticmethod
    def is_stale(_error: Exception) -> bool:
        """Return False: a connection to a file is never cut."""
        return False

    @staticmethod
    def sql(statement: str) -> str:
        """Return a statement with this engine's placeholders."""
        return statement

    @staticmethod
    def ddl(statement: str) -> str:
        """Return a statement of schema.sql for this engine, "" for one that it does not need."""
        return statement


class PostgresEngine:
    """The SQL that only PostgreSQL understands, and one database behind any of three drivers."""

    name = "postgresql"
    # SET LOCAL in each transaction: behind a pooler a session's settings would go to another program. The timeouts
    # make the server drop the locks of a client that hangs.
    _limits_sql = """
        SET LOCAL idle_in_transaction_session_timeout = '5s'; SET LOCAL lock_timeout = '10s';
        SET LOCAL statement_timeout = '30s'; SET LOCAL synchronous_commit = on; SET LOCAL tcp_user_timeout = '15s';
        SET LOCAL tcp_keepalives_idle = 10; SET LOCAL tcp_keepalives_interval = 5; SET LOCAL tcp_keepalives_count = 3"""
    begin_read = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {_limits_sql}"
    begin_write = (f"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {_limits_sql}; "
                   f"SELECT pg_advisory_xact_lock({PG_LOCK_KEY})")
    now_sql = """SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')"""
    has_table_sql = """SELECT COUNT(*) FROM information_schema.tables
        WHERE table_schema = current_schema() AND table_name = ?"""
    # Without the tables of extensions that the provider installed.
    has_any_table_sql = """
        SELECT COUNT(*)
        FROM pg_class c
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = current_schema() AND c.relkind IN ('r', 'p', 'f')
          AND NOT EXISTS (SELECT 1 FROM pg_depend d
                          WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')"""
    # The sequence does not know an id that a person wrote by hand.
    next_release_id_sql = """
        SELECT GREATEST(COALESCE(pg_sequence_last_value(pg_get_serial_sequence('release_tasks', 'id')::regclass), 0),
                        COALESCE(MAX(id), 0)) + 1
        FROM release_tasks"""
    take_release_id_sql = """
        SELECT setval(pg_get_serial_sequence('release_tasks', 'id'),
                      GREATEST(nextval(pg_get_serial_sequence('release_tasks', 'id')), COALESCE(MAX(id), 0) + 1))
        FROM release_tasks"""
    # The sequence follows, so that an INSERT by hand gets the next id.
    audit_id_sql = "setval(pg_get_serial_sequence('audit_log', 'id'), ?)"
    joined_sql = "string_agg(node_id::text, ',')"
    no_limits_sql = ("SET LOCAL statement_timeout = 0", "SET LOCAL idle_in_transaction_session_timeout = 0")
    timeline_sql = """
        SELECT CASE WHEN pg_is_in_recovery() THEN 0
                    ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END"""
    # Who has the writers' lock, and what it waits for.
    holder_sql = f"""
        SELECT a.application_name || ' (pid ' || a.pid || ', ' || COALESCE(host(a.client_addr), 'local') || ')',
               COALESCE(a.wait_event, '')
        FROM pg_locks l
        JOIN pg_stat_activity a ON a.pid = l.pid
        WHERE l.locktype = 'advisory' AND l.objid = {PG_LOCK_KEY} AND l.granted"""
    max_connections = MAX_DB_CONNECTIONS

    def __init__(self, url: str):
        self.url = url
        self.driver = load_postgres_driver()
        self.error = (self.driver.Error, OSError)  # pg8000 raises the socket's errors as they are
        try:
            self.parts = parse_postgres_url(url)
        except ValueError as error:
            raise ConfigError(f"DATABASE_URL={one_line(safe_url(url), 80)} can't be used: {error}") from None
        raw = re.search(r":([^:@/]*)@", url)
        secrets_ = {self.parts.password, raw[1] if raw else "", *(
            value for key, value in self.parts.query.items() if "password" in key)}
        self._secrets = re.compile("|".join(
            re.escape(each) if len(each) >= MIN_MASKED_CHARS else rf"(?<!\w){re.escape(each)}(?!\w)"
            for each in sorted(filter(None, secrets_), key=len, reverse=True)) or "(?!)")
        self.is_pg8000 = self.driver.__name__ == "pg8000.dbapi"
        if self.is_pg8000:
            if len(self.parts.hosts) > 1:
                raise ConfigError("DATABASE_URL: pg8000 takes one host only: install psycopg, or name one")
            _pg8000_options(self.parts.query)
        self.watchdog = _Watchdog()

    def __str__(self) -> str:
        return f"database {safe_url(self.url)}"

    def identity(self) -> object:
        """Return a constant: a server that goes away cuts its connections."""
        return self.url

    def connect(self, create: bool) -> Any:  # noqa: ARG002 - a server's database is there or not
        """Return a connection in autocommit mode; raise DatabaseError."""
        connection = None
        try:
            connection = self._open()
            watch = self.watchdog.watch(connection, MAX_TRANSACTION_S)
            try:
                connection.autocommit = True
                cursor = connection.cursor()
                if self.is_pg8000:  # the others send it as they connect
                    cursor.execute("SET client_encoding = 'UTF8'")
                cursor.execute("SELECT version(), current_setting('server_encoding')")
                self.refuse_server(*cursor.fetchone())
            finally:
                self.watchdog.unwatch(watch)
            return connection
        except Exception as error:  # a driver raises its own errors, OSError and ssl.SSLError here
            close_quietly(connection)
            if isinstance(error, AppError):
                raise
            raise DatabaseError(self.explain(error)) from None

    def refuse_server(self, version: str, encoding: str) -> None:
        """Raise DatabaseError for a server or an encoding that can't be used; version is what version() says."""
        match, other = re.match(r"PostgreSQL (\d+)", version), OTHER_SERVERS.search(version)
        if other or not match:
            name = {"-YB-": "YugabyteDB"}.get(other[0].upper(), other[0]) if other else one_line(version, 60)
            raise DatabaseError(f"{self} is {name}, whose advisory locks are not those of PostgreSQL: two processes "
                                "would write at once. Use PostgreSQL 13 or newer")
        if int(match[1]) < 13:
            raise DatabaseError(f"{self}: PostgreSQL {match[1]} is too old: 13 or newer is needed")
        if encoding != "UTF8":
            raise DatabaseError(f"{self} stores text as {encoding}, which can't hold what agents and people write: "
                                "make one with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, and name it")

    def _open(self) -> Any:
        timeout_s = int(LAST_TRANSACTION_S) if self.watchdog.is_ending else 5
        if not self.is_pg8000:
            more: dict[str, Any] = {"fallback_application_name": "releasectl"}
            if self.driver.__name__ == "psycopg":
                more["prepare_threshold"] = None  # a pooler mixes up prepared statements
            connection = self.driver.connect(
                self.url, connect_timeout=timeout_s, keepalives_idle=10, keepalives_interval=5, keepalives_count=3,
                tcp_user_timeout=15000, client_encoding="UTF8", **more)
            if self.driver.__name__ == "psycopg2":
                connection.set_client_encoding("UTF8")
            return connection
        import getpass

        user, password, [(host, port)], name, query = self.parts
        place: dict[str, Any] = {"unix_sock": f"{host}/.s.PGSQL.{port}"} if host.startswith("/") else {
            "host": host or "localhost", "port": port}
        connection = self.driver.connect(
            user=user or getpass.getuser(), password=password or os.environ.get("PGPASSWORD"), database=name or None,
            timeout=timeout_s, ssl_context=pg8000_tls(query),
            application_name=query.get("application_name", "releasectl"), **place)
        connection._usock.settimeout(40)  # noqa: SLF001 - it has one timeout for connecting and for requests
        return connection

    def tls_text(self) -> str:
        """Return how the connection to the server is protected."""
        mode = self.parts.query.get("sslmode") or (not self.is_pg8000 and os.environ.get("PGSSLMODE")) or "prefer"
        host = self.parts.query.get("host") or self.parts.hosts[0][0]
        if host.startswith("/") or (not host and not self.is_pg8000):
            return "a local socket"
        name = self.driver.__name__.partition(".")[0]
        if mode == "disable" or (self.is_pg8000 and mode in ("allow", "prefer")):
            return f"plain text ({name} with sslmode={mode}): add sslmode=verify-full"
        return f"{name} with sslmode={mode}: " + {
            "require": "TLS, whoever answers", "verify-ca": "TLS, the CA is verified, not the host's name",
            "verify-full": "TLS, verified"}.get(mode, "TLS if the server offers it, whoever answers")

    def explain(self, error: Exception) -> str:
        """Return in one line what the server or the driver said, without the password."""
        state = sqlstate_of(error)
        if state in ("25006", "0A000"):
            return (f"{self} is a standby, or read-only: put all hosts into DATABASE_URL and add "
                    "target_session_attrs=read-write (psycopg or psycopg2)")
        text = str(_pg8000_fields(error).get("M", error))
        if text == "network error":  # pg8000's words for all that can happen to its socket
            cause = error.__cause__
            is_cut = cause is None or isinstance(cause, ConnectionError)
            text = "the server closed the connection" if is_cut else str(cause)
        # masked before it is cut to one line, which could leave half of a password or change its blanks
        return f"{self}: {one_line(self.without_password(text))}"

    def without_password(self, text: str) -> str:
        """Return a text with the password masked, as it is in the URL and decoded."""
        return self._secrets.sub("***", text)

    def is_data_error(self, error: Exception) -> bool:
        """Return whether the error is due to a value: SQLSTATE 22 and 54, or the driver's refusal."""
        return isinstance(error, (ValueError, OverflowError)) or sqlstate_of(error)[:2] in ("22", "54") or (
            isinstance(error, self.driver.DataError) and not sqlstate_of(error))

    @staticmethod
    def is_stale(error: Exception) -> bool:
        """Return whether BEGIN failed because the connection was cut, not after a wait for the lock."""
        return sqlstate_of(error) != LOCK_NOT_AVAILABLE

    @staticmethod
    @functools.lru_cache(maxsize=512)
    def sql(statement: str) -> str:
        """Return a statement with this engine's placeholders."""
        return statement.replace("%", "%%").replace("?", "%s")

    @staticmethod
    def ddl(statement: str) -> str:
        """Return a statement of schema.sql for this engine, "" for one that it does not need."""
        if statement.startswith("CREATE TRIGGER"):
            return ""
        return statement.replace(
            "INTEGER PRIMARY KEY AUTOINCREMENT", "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY").replace(
            "(strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))",
            """(to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'))""")


def _pg8000_fields(error: Exception) -> Mapping[str, str]:
    """Return the server's fields of a pg8000 error (M: message, C: SQLSTATE); none for other drivers."""
    return error.args[0] if error.args and isinstance(error.args[0], dict) else {}


def sqlstate_of(error: Exception) -> str:
    """Return the SQLSTATE of an error of any driver, "" for none."""
    return str(getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
               or _pg8000_fields(error).get("C") or "")


def _pg8000_options(query: Mapping[str, str]) -> None:
    """Raise ConfigError for an option that pg8000 does not know."""
    unknown = sorted(set(query) - {"sslmode", "sslrootcert", "application_name"})
    if unknown:
        raise ConfigError(f"DATABASE_URL: pg8000 does not take {unknown[0]}: install psycopg, or leave it out")


def load_postgres_driver() -> Any:
    """Return the first driver found; RELEASECTL_PG_DRIVER picks one in tests. Raise ConfigError."""
    wanted = os.environ.get("RELEASECTL_PG_DRIVER", "")
    for name in ("psycopg", "psycopg2", "pg8000"):
        if wanted in ("", name):
            with contextlib.suppress(ImportError):
                return importlib.import_module("pg8000.dbapi" if name == "pg8000" else name)
    raise ConfigError("a postgresql:// URL needs a driver: install psycopg, psycopg2 or pg8000 (1.30 or newer)")


# endregion


# region Database
# ======================================================================================
# Database: connections, transaction(), migrate().
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Payloads, Engines.
#
#   One writer at a time, on both engines: SQLite by BEGIN IMMEDIATE, PostgreSQL by an
#   advisory lock. So what a transaction read still holds when it writes, and events become
#   visible in the order of their ids. Nothing waits for a network or a person meanwhile.
# ======================================================================================

SCHEMA_FILE = Path(__file__).resolve().with_name("schema.sql")
MAX_IDLE_DB_CONNECTIONS = 8
# The same as MAX_TRANSACTION_S, for one step of a migration.
MAX_MIGRATION_S = 3600.0
# Added where BEGIN fails on a connection that has just answered: two of three drivers hide PgBouncer's own message.
TAKES_NO_TRANSACTION = "; it took no transaction: a pooler before the server must have pool_mode transaction or session"


class Transaction:
    """One open transaction: statements with ? for parameters, on either engine."""

    def __init__(self, database: Database, connection: Any):
        self.database = database
        self._engine = database.engine
        self._cursor = connection.cursor()
        # Called after COMMIT, so that log lines and counters never tell what did not take place.
        self.after_commit: list[Callable[[], None]] = []

    def execute(self, statement: str, *params: object) -> int:
        """Return the number of rows that a statement changed; raise UnstorableValue."""
        sql = self._engine.sql(statement)
        try:
            # drivers turn %% into % only where there are parameters
            self._cursor.execute(sql, params) if params else self._cursor.execute(statement)
        except (*self._engine.error, ValueError, OverflowError) as error:
            if not self._engine.is_data_error(error):
                raise
            raise UnstorableValue("a number is too large for the database" if isinstance(error, OverflowError)
                                  else f"a value can't be stored: {self._engine.explain(error)}") from None
        return int(self._cursor.rowcount)

    def rows(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        self.execute(statement, *params)
        return [tuple(row) for row in self._cursor.fetchall()]

    def row(self, statement: str, *params: object) -> tuple[Any, ...] | None:
        """Return the first row of a query, or None."""
        self.execute(statement, *params)
        found = self._cursor.fetchone()
        return tuple(found) if found is not None else None

    def value(self, statement: str, *params: object) -> Any:
        """Return the first column of the first row of a query, or None."""
        found = self.row(statement, *params)
        return found[0] if found else None

    def insert_many(self, statement: str, width: int, rows: Sequence[tuple[object, ...]]) -> None:
        """Insert rows of so many columns; statement ends with VALUES."""
        step = 900 // width  # SQLite 3.26 takes 999 parameters
        one = "(" + ", ".join("?" * width) + ")"
        for start in range(0, len(rows), step):
            part = rows[start:start + step]
            self.execute(statement + ", ".join([one] * len(part)), *(value for row in part for value in row))

    def now(self) -> str:
        """Return the time that decides who holds a claim: the server's on PostgreSQL."""
        return str(self.value(self._engine.now_sql))


class Database:
    """The only door to the database: pooled connections, and transaction()."""

    def __init__(self, url: str, metrics: Metrics | None = None, notify_on: Set[str] = frozenset(),
                 approvals: bool = False):
        """Take a sqlite:/// or postgresql:// URL; connect at the first transaction. Count errors in metrics.

        notify_on: the kinds of notifications that this process has a receiver for. approvals: the setting APPROVALS.
        """
        self.engine = SqliteEngine(url) if url.startswith("sqlite:") else PostgresEngine(url)
        self._places = FairSemaphore(self.engine.max_connections)
        # Guards the three below; notified when a connection is no longer in use.
        self._changed = threading.Condition()
        self._idle: list[Any] = []
        self._in_use = 0
        # engine.identity() of what all open connections are to.
        self._identity: object = None
        # Whether this process found its schema there, so that the table of its version is there too.
        self._has_schema = False
        self.metrics = metrics or Metrics()
        self.notify_on = notify_on
        self.approvals = approvals
        # Set when this process wrote a notification.
        self.notified = threading.Event()

    def __str__(self) -> str:
        return str(self.engine)

    def close(self) -> None:
        """Close the idle connections."""
        with self._changed:
            while self._idle:
                close_quietly(self._idle.pop())

    def end_within(self, seconds: float) -> None:
        """Cut off transactions in so many seconds, also where the server hangs: the process ends."""
        if isinstance(self.engine, PostgresEngine):
            self.engine.watchdog.end_within(seconds)

    @contextlib.contextmanager
    def transaction(self, write: bool = False, create: bool = False,
                    limit_s: float = MAX_TRANSACTION_S) -> Iterator[Transaction]:
        """Yield a transaction, a snapshot to read or the only writer; commit at the end, roll back at an exception.

        Raise DatabaseError where the engine fails or takes longer than limit_s, or a writer's schema is newer than this
        program, which does not know what that means; UnstorableValue for a value that the engine can't hold.
        """
        try:
            connection, watch = self._begin(write, create, limit_s)
        except DatabaseError:
            self.metrics.count("releasectl_database_errors_total")
            raise
        tx = Transaction(self, connection)
        try:
            if write and self._has_schema:  # whoever migrates is a writer too, so this is as true at the commit
                self._refuse_newer(int(tx.value("SELECT MAX(version) FROM schema_version")), len(schema_steps()))
            yield tx
            connection.cursor().execute("COMMIT")
        except self.engine.error as error:
            self._discard(connection)  # which rolls back
            self.metrics.count("releasectl_database_errors_total")
            raise DatabaseError(self._explain(error, watch)) from error
        except BaseException as error:
            if watch is not None and watch.is_cut:  # pg8000 raises several errors of its own then
                self._discard(connection)
                raise DatabaseError(self._explain(error, watch)) from error
            if isinstance(error, UnstorableValue):  # pg8000 may have sent half of the statement
                self._discard(connection)
                raise
            try:
                connection.cursor().execute("ROLLBACK")
                self._give_back(connection)
            except self.engine.error:
                self._discard(connection)
            raise
        else:
            self._give_back(connection)
        finally:
            self._unwatch(watch)
        for call in tx.after_commit:
            call()

    def _explain(self, error: BaseException, watch: WatchedTransaction | None) -> str:
        if watch is not None and watch.is_cut:
            return (f"{self}: no answer for {time.monotonic() - watch.since:.0f} s, so the connection was cut: the "
                    "server hangs, or a commit waits for a synchronous standby")
        return self.engine.explain(cast(Exception, error))

    def _unwatch(self, watch: WatchedTransaction | None) -> None:
        if watch is not None and isinstance(self.engine, PostgresEngine):
            self.engine.watchdog.unwatch(watch)

    def _begin(self, write: bool, create: bool, limit_s: float) -> tuple[Any, WatchedTransaction | None]:
        statement = self.engine.begin_write if write else self.engine.begin_read
        while True:
            connection, pooled = self._take(create)
            watch = self.engine.watchdog.watch(connection, limit_s) if isinstance(self.engine, PostgresEngine) else None
            try:
                connection.cursor().execute(statement)
                return connection, watch
            except self.engine.error as error:
                self._discard(connection)
                is_cut = watch is not None and watch.is_cut
                self._unwatch(watch)
                if is_cut or not (pooled and self.engine.is_stale(error)):
                    text = self._explain(error, watch) + self._lock_holder(error)
                    if watch is not None and not is_cut and sqlstate_of(error) in ("", PROTOCOL_VIOLATION):
                        text += TAKES_NO_TRANSACTION
                    raise DatabaseError(text) from error
            except BaseException as error:
                self._discard(connection)
                self._unwatch(watch)
                if watch is not None and watch.is_cut:
                    raise DatabaseError(self._explain(error, watch)) from error
                raise

    def _lock_holder(self, error: Exception) -> str:
        """Return who has the writers' lock, for the error of a wait for it; "" where nobody can be named."""
        if not isinstance(self.engine, PostgresEngine) or sqlstate_of(error) != LOCK_NOT_AVAILABLE:
            return ""
        with contextlib.suppress(Exception), self.transaction() as tx:
            found = tx.row(self.engine.holder_sql)
            if found:
                return f"; {found[0]} holds the lock" + (
                    ", whose commit waits for a synchronous standby" if found[1] == "SyncRep" else "")
        return ""

    def _take(self, create: bool) -> tuple[Any, bool]:
        """Return a connection in autocommit mode, and whether it was in use before."""
        if not self._places.acquire(CONNECTION_WAIT_S):
            raise DatabaseError(f"{self}: all {self.engine.max_connections} connections of this process are in use for "
                                f"more than {CONNECTION_WAIT_S:g} s")
        try:
            with self._changed:
                self._close_stale()
                self._in_use += 1
                if self._idle:
                    return self._idle.pop(), True
            connection = None
            try:
                connection = self.engine.connect(create)
            finally:
                if connection is None:
                    self._count_out()
            with self._changed:
                if self._identity is None:
                    self._identity = self.engine.identity()
            return connection, False
        except BaseException:
            self._places.release()
            raise

    def _close_stale(self) -> None:
        """Close all connections where the files were replaced; raise DatabaseError while some are in use.

        The last one to close writes its removed -wal back into the file. The next one must open after that: SQLite
        shares its state of a file within a process.
        """
        if not self._in_use and not self._idle:
            self._identity = None  # the last connection has removed -wal and -shm
        known, found = self._identity, self.engine.identity()
        if known in (None, found):
            return
        if isinstance(self.engine, SqliteEngine) and found and tuple(found)[:3] == tuple(known)[:3]:  # type: ignore
            self.metrics.count("releasectl_database_errors_total")
            log.error("%s; everything is read anew. Nothing but releasectl may touch these files",
                      self.engine.save_new_wal())
            self._identity = "stale"  # logged once
        while self._idle:
            close_quietly(self._idle.pop())
        if not self._changed.wait_for(lambda: not self._in_use or self._identity == self.engine.identity(),
                                      BUSY_TIMEOUT_S):
            raise DatabaseError(f"{self}: its files were removed or replaced while a transaction is open")
        if not self._in_use and not self._idle:
            self._identity = None

    def _count_out(self) -> None:
        with self._changed:
            self._in_use -= 1
            self._changed.notify_all()

    def _give_back(self, connection: Any) -> None:
        with self._changed:
            if self._identity == self.engine.identity() and len(self._idle) < MAX_IDLE_DB_CONNECTIONS:
                self._idle.append(connection)
            else:
                close_quietly(connection)  # under the lock: to close the last one changes the files
            self._count_out()
        self._places.release()

    def _discard(self, connection: Any) -> None:
        if isinstance(self.engine, SqliteEngine):
            # as long as a traceback has the cursor of a failed statement, a close alone does not end the transaction
            with contextlib.suppress(*self.engine.error):
                connection.cursor().execute("ROLLBACK")
        with self._changed:
            close_quietly(connection)
            self._count_out()
        self._places.release()

    def schema_version(self) -> int:
        """Return the version of the schema in the database, 0 for an empty one."""
        with self.transaction() as tx:
            return self._schema_version(tx)

    def _schema_version(self, tx: Transaction) -> int:
        if tx.value(self.engine.has_table_sql, "schema_version"):
            return int(tx.value("SELECT COALESCE(MAX(version), 0) FROM schema_version"))
        if tx.value(self.engine.has_any_table_sql):
            raise DatabaseError(f"{self} holds other tables, and not those of releasectl: name another one")
        return 0

    def backup(self, path: str) -> tuple[int, int]:
        """Write a checked copy to a new file; return its schema and its size in bytes.

        Raise AppError 3002 where the file exists, ConfigError on PostgreSQL, DatabaseError.
        """
        if isinstance(self.engine, PostgresEngine):
            raise ConfigError("backup is for SQLite; on PostgreSQL take pg_dump -Fc -f FILE \"$DATABASE_URL\"")
        return self.schema_version(), self.engine.backup(path)

    def migrate(self) -> tuple[int, int]:
        """Bring the schema up to date, one transaction a step; return the versions before and after.

        An empty database gets all steps in one: half of them would look like an old database.
        """
        steps = schema_steps()
        before = None
        while True:
            with self.transaction(write=True, create=True, limit_s=MAX_MIGRATION_S) as tx:
                version = self._schema_version(tx)
                before = version if before is None else before
                self._refuse_newer(version, len(steps))
                if version == len(steps):
                    if isinstance(self.engine, SqliteEngine):
                        _guard_types(tx)
                    self._has_schema = True
                    return before, version
                done = version + 1 if version else len(steps)
                for statement in self.engine.no_limits_sql:
                    tx.execute(statement)
                for statement in filter(None, map(self.engine.ddl, itertools.chain(*steps[version:done]))):
                    tx.execute(statement)
                if version < DIGEST_SCHEMA <= done:
                    _fill_digests(tx)
            log.info("%s: schema step %d done", self, done)

    def require_schema(self, create: bool = False) -> None:
        """Raise DatabaseError where the schema is not this program's; with create fill an empty database."""
        needed = len(schema_steps())
        if create and isinstance(self.engine, SqliteEngine) and self.engine.identity() is None:
            self.migrate()
        version = self.schema_version()
        if version == 0 and create:
            self.migrate()
        elif version < needed:
            raise DatabaseError(f"{self} has schema {version}, this program needs {needed}: "
                                "run `releasectl migrate`")
        self._refuse_newer(version, needed)
        self._has_schema = True

    def _refuse_newer(self, version: int, known: int) -> None:
        if version > known:
            raise DatabaseError(f"{self} has schema {version}, newer than this program's {known}: "
                                "use the newer releasectl")


# The step of schema.sql that brings release_tasks.payload_sha256, which no SQL can fill.
DIGEST_SCHEMA = 7


def _fill_digests(tx: Transaction) -> None:
    """Write the digest of each payload that can be read, one at a time: each may be a megabyte."""
    release_id = 0
    while row := tx.row("SELECT id, payload FROM release_tasks WHERE id > ? ORDER BY id LIMIT 1", release_id):
        release_id = row[0]
        tx.execute("UPDATE release_tasks SET payload_sha256 = ? WHERE id = ?", digest_of_stored(row[1]), release_id)


# What a column of SQLite takes, by its declared type, and when a value is none; what can be made one it makes one.
_A_WHOLE_NUMBER = "whole number", "typeof({0}) <> 'integer' AND {0} IS NOT NULL"
_TYPES = {"TEXT": ("text", "typeof({0}) = 'blob'"), "DOUBLE PRECISION": ("number", "typeof({0}) IN ('text', 'blob')")}


def _guard_types(tx: Transaction) -> None:
    """Let SQLite refuse values that are not of their column's type, as PostgreSQL does, and mend those that are there.

    One of them fails each query that reads or compares it, so a single row written by hand would stop all releases.
    Triggers, as no constraint can be added to a table; they are made anew where its columns changed.
    """
    for table, in tx.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"):
        columns = [(name, default, *_TYPES.get(kind, _A_WHOLE_NUMBER)) for name, kind, default in
                   tx.rows("SELECT name, type, dflt_value FROM pragma_table_info(?)", table)]
        cases = " ".join(f"WHEN {misfit.format('NEW.' + name)} THEN RAISE(ABORT, '{table}.{name} takes a {word}')"
                         for name, _, word, misfit in columns)
        guards = {f"{table}_types_{act.lower()}": f"AFTER {act} ON {table} BEGIN SELECT CASE {cases} END; END"
                  for act in ("INSERT", "UPDATE")}
        known = dict(tx.rows("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?", table))
        if all(known.get(name) == f"CREATE TRIGGER {name} {guard}" for name, guard in guards.items()):
            continue
        for name in guards:
            tx.execute(f"DROP TRIGGER IF EXISTS {name}")
        for name, default, word, misfit in columns:
            for row_id, value in tx.rows(f"SELECT rowid, {name} FROM {table} WHERE {misfit.format(name)}"):
                tx.execute(f"UPDATE {table} SET {name} = " + (
                    f"CAST({name} AS TEXT)" if word == "text" else default or "1") + " WHERE rowid = ?", row_id)
                now = tx.value(f"SELECT {name} FROM {table} WHERE rowid = ?", row_id)
                log.warning("%s, row %d: %s was %s, which is no %s: it is %s now", table, row_id, name,
                            one_line(repr(value), 100), word, one_line(repr(now), 100))
        for name, guard in guards.items():
            tx.execute(f"CREATE TRIGGER {name} {guard}")


@functools.lru_cache(maxsize=1)
def schema_steps() -> tuple[tuple[str, ...], ...]:
    """Return the steps of schema.sql, each as its statements."""
    text = re.sub(r"^\s*--(?! step ).*$", "", read_beside(SCHEMA_FILE), flags=re.MULTILINE)
    steps = re.split(r"^-- step \d+.*$", text, flags=re.MULTILINE)[1:]
    if not steps or not all(map(str.strip, steps)):
        raise ConfigError(f"{SCHEMA_FILE} is empty or cut off: copy the one that came with this releasectl.py")
    return tuple(tuple(s.strip() for s in re.split(r";\s*$", step, flags=re.MULTILINE) if s.strip())
                 for step in steps)


# endregion


# region Database state
# ======================================================================================
# Database state: the clock, the versions given out, and whether the database went
#   back.
# Uses: Vocabulary, Helpers, Model, Database.
# ======================================================================================

class HighWater(NamedTuple):
    """Numbers of a database that only grow, unless it goes back to an earlier state."""
    # How often this process saw that it went back or moved to another server.
    generation: int = 0
    version: int = 0
    event_id: int = 0
    timeline: int = 0


class Seen:
    """What this process has read, to notice a database that goes back: a restored backup, a failover."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.high = HighWater()
        # Highest version of any release that this process knew, lost ones too.
        self.version = 0

    def use_version(self, version: int) -> None:
        """Note a version that is given out: it is never given out again, whatever becomes of its release."""
        with self._lock:
            self.version = max(self.version, version)

    def note(self, before: HighWater, version: int, event_id: int, timeline: int) -> tuple[str, bool]:
        """Compare what a transaction read with what was known when it began: its snapshot may be that old.

        Return which numbers are lower, "" for none, and whether the database moved to another server without that.
        """
        found = HighWater(before.generation, version, event_id, timeline)
        lower = [f"{name} {now} after {was}" for name, now, was in (
            ("version", version, before.version), ("event", event_id, before.event_id),
            ("timeline", timeline, before.timeline)) if now < was]
        with self._lock:
            if before.generation != self.high.generation:
                return "", False  # another transaction has reported it
            self.version = max(self.version, version)
            has_moved = bool(before.timeline) and timeline != before.timeline
            if lower or has_moved:
                self.high = found._replace(generation=before.generation + 1)
            else:
                self.high = HighWater(*map(max, self.high, found))
        return ", ".join(lower), has_moved and not lower

    def note_rewind(self) -> None:
        """Note that the database went back, as a claim showed."""
        with self._lock:
            self.high = self.high._replace(generation=self.high.generation + 1, version=0, event_id=0)


# A failed write that is older tells nothing: executors try again after each scan, probes of /readyz come again too.
MAX_WRITE_ERROR_AGE_S = 120.0


class DatabaseState:
    """What this process knows of the database as a whole. Methods that take a transaction belong into the caller's."""

    def __init__(self, database: Database, clock: Clock):
        self.database = database
        self.clock = clock
        self.seen = Seen()
        # When the generation grew last, by Clock.elapsed().
        self.changed_at = float("-inf")
        # The database went back, and write_rewind() has not been committed since.
        self.is_rewind_unwritten = False
        # When and why the last noted_write() of each kind failed.
        self._write_errors: dict[str, tuple[float, str]] = {}

    @property
    def generation(self) -> int:
        """Return how often this process saw the database go back or move to another server."""
        return self.seen.high.generation

    def moment(self) -> Moment:
        return Moment(self.clock.wall(), self.clock.elapsed(), self.clock.boot())

    def now(self) -> str:
        return utc_text(self.clock.wall())

    @contextlib.contextmanager
    def checked_read(self) -> Iterator[Transaction]:
        """Yield a transaction that reads, after a check whether the database went back."""
        before = self.seen.high
        with self.database.transaction() as tx:
            version, event_id = tx.row("SELECT (SELECT COALESCE(MAX(version), 0) FROM release_tasks), "
                                       "(SELECT COALESCE(MAX(id), 0) FROM release_events)") or (0, 0)
            timeline = tx.value(self.database.engine.timeline_sql)
            # timeline 0: a standby, which may just be behind
            lower, has_moved = self.seen.note(before, version, event_id, timeline) if timeline else ("", False)
            if lower:
                self._log_rewind(lower)
            elif has_moved:
                self.changed_at = self.clock.elapsed()
                log.warning("%s moved to another server (failover): everything is read anew, and agents are asked "
                            "before anything is sent", self.database)
            yield tx

    @property
    def write_error(self) -> str:
        """Return why the database takes no writes, "" where it does, as far as this process knows."""
        after = self.clock.elapsed() - MAX_WRITE_ERROR_AGE_S
        return next((message for at, message in list(self._write_errors.values()) if at > after), "")

    @contextlib.contextmanager
    def noted_write(self, kind: str) -> Iterator[Transaction]:
        """Yield a transaction that writes what is written again and again, and note for write_error whether it went."""
        try:
            with self.database.transaction(write=True) as tx:
                yield tx
        except DatabaseError as error:
            self._write_errors[kind] = self.clock.elapsed(), error.message
            raise
        self._write_errors.pop(kind, None)

    def check_write(self) -> None:
        """Commit a write; raise DatabaseError where that fails.

        BEGIN alone would not tell: SQLite begins on a full disk or a read-only file too.
        """
        with self.noted_write("health_probe") as tx:
            tx.execute("UPDATE health_probe SET at = ? WHERE id = 1", self.now())

    def next_version(self, tx: Transaction, release_id: int) -> int:
        """Return the version for the release of an id: above all that may ever have been used (rule 1)."""
        # the unique index of version, and nodes_by_last_version
        highest = tx.value("""
            SELECT MAX(v)
            FROM (SELECT MAX(version) AS v FROM release_tasks
                  UNION ALL SELECT MAX(last_version) FROM nodes
                  UNION ALL SELECT first_version - 1 FROM database_state
                  UNION ALL SELECT lost_version FROM database_state) used""")
        version = int(max(highest or 0, release_id - 1, self.seen.version)) + 1
        if version > MAX_VERSION:
            raise AppError(WRONG_STATE, f"the versions are used up: the newest is {MAX_VERSION}")
        return version

    def note_timeline(self, tx: Transaction) -> None:
        """Store the server's timeline; after a failover skip the versions that lost releases may have had."""
        self.write_rewind(tx)
        timeline = tx.value(self.database.engine.timeline_sql)
        known = tx.value("SELECT timeline FROM database_state WHERE id = 1")
        if known == 0 != timeline:
            tx.execute("UPDATE database_state SET timeline = ? WHERE id = 1", timeline)
        elif known != timeline:
            tx.execute("UPDATE database_state SET timeline = ?, moved_at = ?, lost_version = ? WHERE id = 1",
                       timeline, tx.now(), min(self.next_version(tx, 0) + VERSIONS_SKIPPED - 1, MAX_VERSION))

    def write_rewind(self, tx: Transaction) -> None:
        """Tell other processes that the database went back, where this one saw it: they know no lost version."""
        if self.is_rewind_unwritten:
            tx.execute("""
                UPDATE database_state
                SET moved_at = ?, lost_version = CASE WHEN lost_version > ? THEN lost_version ELSE ? END
                WHERE id = 1""", tx.now(), self.seen.version, self.seen.version)
            if self.seen.version > (tx.value("SELECT MAX(version) FROM release_tasks") or 0):
                self.note_unsure(tx, self.seen.version)
            tx.after_commit.append(functools.partial(setattr, self, "is_rewind_unwritten", False))

    def note_unsure(self, tx: Transaction, version: int) -> None:
        """Store that today's nodes may have versions up to this one of which the database knows nothing."""
        tx.execute("UPDATE database_state SET unsure_version = ?, unsure_at = ? WHERE id = 1 AND unsure_version <= ?",
                   version, self.now(), version)

    def report_rewind(self, claim: Claim, why: str) -> None:
        """Log and count that the database went back, unless that was noticed since the claim was taken."""
        if self.generation == claim.generation:
            self.seen.note_rewind()
            self._log_rewind(why)

    def _log_rewind(self, why: str) -> None:
        self.changed_at = self.clock.elapsed()
        self.is_rewind_unwritten = True
        self.database.metrics.count("releasectl_database_went_back_total")
        log.error("%s went back to an earlier state (%s): a backup was restored, or a failover lost commits; "
                  "everything is read anew, and agents are asked before anything is sent. See the runbook, "
                  "ReleasectlDatabaseWentBack", self.database, why)


# endregion


# region Audit
# ======================================================================================
# Audit: the history of releases and of every act (contract section 2).
# Uses: Vocabulary, Helpers, Model, Decision, Database, Database state.
# ======================================================================================

@dataclasses.dataclass(frozen=True)
class Act:
    """Who acts, and from where: what a row of audit_log names."""
    # cli:USER, cert:NAME of a client certificate, api (no tokens are set), an executor's owner, or a token's name.
    actor: str
    via: str = VIA_EXECUTOR
    token: str = ""
    certificate: str = ""
    # Of the client that sent a request, or the command line's host.
    address: str = ""
    request_id: str = ""
    # Of the command line: the Unix user, as the system has it.
    user: str = ""
    # Its committed rows.
    rows: list[AuditRow] = dataclasses.field(default_factory=list, compare=False)

    @property
    def identity(self) -> str:
        """Return the one name that says whether two acts are of one person (docs/SECURITY.md, "Four eyes").

        Nothing of it is what the caller says of himself: the token's name, with the certificate's where that is
        another one, else the certificate's, else the Unix user.
        """
        if self.token and self.certificate and self.token != self.certificate:
            return f"{self.token}{BESIDE}{self.certificate})"
        return self.token or self.certificate or self.user or self.actor

    def __str__(self) -> str:
        return self.actor


# A text is an executor's owner.
Who = Union[Act, str]


def identity_of(who: Who) -> str:
    """Return Act.identity; of an executor its owner."""
    return who.identity if isinstance(who, Act) else who


# The default: a program that uses Store itself.
PROGRAM = Act("program", VIA_CLI)


class AuditRow(NamedTuple):
    """A row of audit_log; before and after are JSON objects, or ""."""
    id: int
    at: str
    actor: str
    via: str
    token: str
    certificate: str
    address: str
    request_id: str
    action: str
    object: str
    before: str
    after: str
    hash: str

    def __str__(self) -> str:
        return one_line(" ".join(filter(None, (self.action, self.object, " -> ".join(
            filter(None, (self.before, self.after)))))), MAX_TRAIL_CHARS)


def _name_in(values: str) -> str:
    """Return the name of a node before or after an act, "" for none."""
    return str(stored_json(values).get("name", ""))


class AuditFilter(NamedTuple):
    """Which rows of audit_log to return; "" for all."""
    # An actor, a token or a certificate.
    actor: str = ""
    # An action, like `release.create`, or a group, like `release`.
    action: str = ""
    object: str = ""
    since: str = ""


class AuditReport(NamedTuple):
    """The result of a verification of audit_log."""
    # Rows and ended releases that were verified, and how many there are.
    rows: int
    of_rows: int
    releases: int
    of_releases: int
    # Id and hash of the newest row.
    head: tuple[int, str]
    faults: list[str]


# What the chain hashes: compact JSON in ASCII (docs/SECURITY.md). A payload's digest is of canonical_json().
_CHAINED = json.JSONEncoder(separators=(",", ":"), default=repr)


def audit_hash(row: AuditRow, hash_before: str) -> str:
    """Return the hash of a row after one with hash_before, which is "" for the first row."""
    return hashlib.sha256(_CHAINED.encode([hash_before, *row[:-1]]).encode()).hexdigest()


def audit_fault(row: AuditRow, id_before: int, hash_before: str) -> str:
    """Return what is wrong with a row after another one, "" for nothing."""
    if row.id <= id_before or not row.hash:
        return f"inserted: row {row.id} has no place in the chain: it was written by hand"
    if row.id > id_before + 1:
        gone = f"row {row.id - 1}" if row.id == id_before + 2 else f"rows {id_before + 1} to {row.id - 1}"
        return f"taken away: {gone}, before row {row.id}"
    if audit_hash(row, hash_before) != row.hash:
        return f"changed: row {row.id} is not as it was written, or the hash of the row before it is not"
    return ""


def audit_text(values: Mapping[str, object] | None) -> str:
    """Return before or after of a row: JSON, "" for nothing; above MAX_AUDIT_BYTES long values become digests."""
    if not values:
        return ""
    text = _CHAINED.encode(values)
    if len(text) > MAX_AUDIT_BYTES:
        text = _CHAINED.encode({key: _shortened(value) for key, value in values.items()})
    return text


def non_empty(**values: object) -> dict[str, object]:
    """Return the values that are not None, "" or {}."""
    return {name: value for name, value in values.items() if value not in (None, "", {})}


def _shortened(value: object) -> object:
    text = _CHAINED.encode(value)
    return value if len(text) <= 512 else {"sha256": hashlib.sha256(text.encode()).hexdigest(), "bytes": len(text)}


AUDIT_COLUMNS = ", ".join(AuditRow._fields)


class Event(NamedTuple):
    """A row of release_events."""
    id: int
    release_id: int
    node_id: int | None
    node_name: str
    at: str
    actor: str
    event: str
    from_status: str
    to_status: str
    detail: str


class NewEvent(NamedTuple):
    """A row of release_events to write."""
    release_id: int
    event: str
    from_status: str
    to_status: str
    detail: str = ""
    # None: the event is the release's.
    node_id: int | None = None


def add_events(tx: Transaction, at: str, actor: Who, events: Iterable[NewEvent]) -> None:
    """Append to the history of releases, in the transaction of what happened.

    Every change of a status has an event, so this is where it is checked: raise RuntimeError for one that is not in
    the tables of transitions.
    """
    rows = []
    for new in events:
        transitions = RELEASE_TRANSITIONS if new.node_id is None else NODE_TRANSITIONS
        if new.from_status and new.to_status not in (new.from_status, *transitions.get(new.from_status, ())):
            raise RuntimeError(f"no status {new.to_status} after {new.from_status}")
        rows.append((new.release_id, new.node_id, at, str(actor), new.event, new.from_status, new.to_status,
                     detail_text(new.detail)))
        if new.node_id is None and (kind := notification_kind(new.event, new.from_status, new.to_status)):
            add_notification(tx, kind, at, new.detail, new.release_id, is_always_told=new.event == EMERGENCY)
    tx.insert_many("INSERT INTO release_events (release_task_id, node_id, at, actor, event, from_status, to_status, "
                   "detail) VALUES ", 8, rows)


# From a change of a release's status to the kind of its notification.
NOTIFIED_CHANGES: Mapping[tuple[str, str], str] = {
    ("", PENDING): CREATED, (PENDING, RUNNING): STARTED,
    **{(before, after): after for before, statuses in RELEASE_TRANSITIONS.items() for after in statuses
       if after == PAUSED or after in TERMINAL}}
# From an event of a release that changes no status to the kind of its notification.
NOTIFIED_EVENTS: Mapping[str, str] = {STUCK: STUCK, TAKEN_OVER: TAKEN_OVER, APPROVAL: APPROVAL, EMERGENCY: APPROVAL}


def notification_kind(event: str, from_status: str, to_status: str) -> str:
    """Return the kind of the notification of a release's event, "" for none."""
    if from_status == to_status:
        return NOTIFIED_EVENTS.get(event, "")
    return NOTIFIED_CHANGES.get((from_status, to_status), "")


def add_notification(tx: Transaction, kind: str, at: str, detail: str, release_id: int | None = None,
                     is_always_told: bool = False) -> None:
    """Put a message into the outbox, in the transaction of what it tells, where somebody has a receiver for its kind.

    That is this process, or an executor that looks for work: an operator's shell need not have the same settings.
    is_always_told: any receiver gets it, whatever its kinds are.
    """
    kinds = set(NOTIFY_KINDS) if is_always_told else {kind}
    if not kinds & tx.database.notify_on and not any(
            kinds & set(row[0].split(",")) for row in tx.rows("SELECT notify_on FROM executors "
                                                              "WHERE notify_on <> ''")):
        return
    tx.execute("INSERT INTO notifications (kind, release_task_id, at, detail) VALUES (?, ?, ?, ?)",
               kind, release_id, at, detail_text(detail))
    tx.after_commit.append(tx.database.notified.set)


def approvals_in_force(tx: Transaction) -> bool:
    """Return whether APPROVALS is 1 for this process, or for one that looks for work.

    An operator's shell need not have the setting, and is no way around it.
    """
    return tx.database.approvals or tx.value("SELECT MAX(approvals) FROM executors") == 1


# An event that may follow the end of a release, and is left out of the digest of its events.
NOTIFY_GIVEN_UP = "notify.given_up"
# Actions that the verification reads.
RELEASE_END, PRUNE = "release.end", "prune"
# Rows read in one transaction.
AUDIT_PAGE = 2000
# The first schema with audit_log.
AUDIT_SCHEMA = 6
MAX_AUDIT_FAULTS = 20


class AuditChain:
    """A verification of the rows of audit_log, one after the other."""

    def __init__(self, last: tuple[int, str], copy: tuple[int, str] | None = None):
        """Begin after the row with this id and hash; copy: id and hash of a row as somebody kept them elsewhere."""
        self.last, self._copy = last, copy
        self.rows = 0
        self.faults: list[str] = []
        # By release: the row of its end, and the digest of its events there.
        self.ended: dict[int, tuple[int, str]] = {}
        self._pruned: list[tuple[int, int]] = []

    def add_fault(self, fault: str) -> None:
        """Keep a fault, up to MAX_AUDIT_FAULTS."""
        if len(self.faults) < MAX_AUDIT_FAULTS:
            self.faults.append(fault)

    def add(self, row: AuditRow) -> None:
        """Verify the next row."""
        self.rows += 1
        if fault := audit_fault(row, *self.last):
            self.add_fault(fault)
        if self._copy and self._copy[0] == row.id and self._copy[1] != row.hash:
            self.add_fault(f"changed: row {row.id} has another hash than the copy of it")
        if row.id > 0:
            self.last = row.id, row.hash
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):  # written by hand: a fault already
            if row.action == RELEASE_END:
                release_id = int(row.object.split()[1])
                self.ended.pop(release_id, None)
                self.ended[release_id] = row.id, str(parse_json(row.after)["eventsSha256"])
            elif row.action == PRUNE:
                self._pruned += [(int(first), int(last)) for first, last in parse_json(row.before)["releases"]]

    def is_pruned(self, release_id: int) -> bool:
        """Return whether a row says that prune deleted a release."""
        return any(first <= release_id <= last for first, last in self._pruned)


class Audit:
    """The log of every act (audit_log).

    Each public method is one transaction, or part of the one that it gets as tx; verify() is many.
    """

    def __init__(self, state: DatabaseState):
        self._state = state
        self._database = state.database

    def add(self, tx: Transaction, who: Who, action: str, what: str, before: Mapping[str, object] | None = None,
            after: Mapping[str, object] | None = None) -> tuple[int, str]:
        """Append the row of an act, in the act's own transaction; return its id and hash.

        There is one writer at a time, so the order of the ids is the order of the chain.
        """
        act = who if isinstance(who, Act) else Act(who)
        id_before, hash_before = self._head(tx)
        row = AuditRow(id_before + 1, self._state.now(), act.actor, act.via, act.token, act.certificate, act.address,
                       act.request_id, action, one_line(what), audit_text(before), audit_text(after), "")
        row = row._replace(hash=audit_hash(row, hash_before))
        tx.execute(f"INSERT INTO audit_log ({AUDIT_COLUMNS}) VALUES ({self._database.engine.audit_id_sql}"
                   f"{', ?' * (len(row) - 1)})", *row)
        tx.after_commit.append(lambda: act.rows.append(row))
        return row.id, row.hash

    def add_end(self, tx: Transaction, who: Who, release: Release, status: str) -> tuple[int, str]:
        """Append the row of a release's end, with the SHA-256 of its events."""
        count, digest = self._events_digest(tx, release.id)
        act = dataclasses.replace(who, via=VIA_EXECUTOR) if isinstance(who, Act) else who
        return self.add(tx, act, RELEASE_END, f"release {release.id}", {"status": release.status},
                        {"status": status, "events": count, "eventsSha256": digest})

    def perform(self, by: Who, action: str, what: str, after: Mapping[str, object], deed: Callable[[], T]) -> T:
        """Return deed(), which acts outside of the database; its row is committed after it, and only if it succeeds."""
        with self._database.transaction(write=True) as tx:
            self.add(tx, by, action, what, after=after)
            return deed()

    def backup(self, path: str, by: Who = PROGRAM) -> tuple[int, int]:
        """Do Database.backup() with a row in audit_log, where the schema has that already."""
        schema, size = self._database.backup(path)
        try:
            if schema >= AUDIT_SCHEMA:
                with self._database.transaction(write=True) as tx:
                    self.add(tx, by, "backup", f"file {path}", after={"bytes": size, "schema": schema})
        except BaseException:
            os.unlink(path)
            raise
        return schema, size

    def head(self) -> tuple[int, str]:
        """Return id and hash of the newest row, 0 and "" where there is none."""
        with self._database.transaction() as tx:
            return self._head(tx)

    def rows(self, after: int = 0, limit: int = 100, wanted: AuditFilter = AuditFilter(),  # noqa: B008
             newest: bool = False) -> list[AuditRow]:
        """Return the first rows with an id above after, or with newest the last ones; oldest first."""
        parts = [(clause, params) for clause, params, is_set in (
            ("? IN (actor, token, certificate)", (wanted.actor,), wanted.actor),
            ("(action = ? OR action LIKE ?)", (wanted.action, f"{wanted.action}.%"), wanted.action),
            ("object = ?", (wanted.object,), wanted.object), ("at >= ?", (wanted.since,), wanted.since)) if is_set]
        where = " AND ".join(["id > ?", *(clause for clause, _ in parts)])
        with self._database.transaction() as tx:
            rows = [AuditRow(*row) for row in tx.rows(
                f"SELECT {AUDIT_COLUMNS} FROM audit_log WHERE {where} ORDER BY id {'DESC' if newest else ''} LIMIT ?",
                after, *(param for _, params in parts for param in params), limit)]
        return rows[::-1] if newest else rows

    def of_node(self, node_id: int, name: str, limit: int) -> list[AuditRow]:
        """Return the newest acts on a node, oldest first, under its earlier names too, and the import that added it.

        Of another node that had one of these names at another time nothing is returned.
        """
        found: list[AuditRow] = []
        upto = MAX_ID
        with self._database.transaction() as tx:
            while len(found) < limit:
                renames = [row for row in self._find(tx, "action = 'node.set' AND id <= ? AND after LIKE ?", upto,
                                                     f'%"name":{to_json(name)}%') if _name_in(row.after) == name]
                # the index audit_log_by_object
                deleted = self._find(tx, "object = ? AND action = 'node.delete' AND id <= ?", f"node {name}", upto)
                since = max((row.id for some in (renames, deleted) for row in some[:1]), default=0)
                renames = [row for row in renames if row.id == since]
                rows = self._find(tx, "object = ? AND id > ? AND id <= ?", f"node {name}", since, upto)
                rows += [] if renames else [
                    row._replace(after=to_json({"name": name})) for row in self._find(
                        tx, "action = 'node.import' AND id > ? AND id <= ?", since, upto)
                    if any(node.get("name") == name for node in stored_json(row.after).get("nodes", []))]
                found += sorted(rows, reverse=True)
                own = next((place for place, row in enumerate(found) if row.action == "node.add"
                            and stored_json(row.after).get("id") == node_id), None)
                if own is not None or not renames:
                    found = found if own is None else found[:own + 1]
                    break
                name, upto = _name_in(renames[0].before), since
        return sorted(found[:limit])

    @staticmethod
    def _find(tx: Transaction, where: str, *params: object) -> list[AuditRow]:
        return [AuditRow(*row) for row in tx.rows(
            f"SELECT {AUDIT_COLUMNS} FROM audit_log WHERE {where} ORDER BY id DESC LIMIT 100", *params)]

    def verify(self, copy: tuple[int, str] | None = None, max_rows: int = MAX_ID,
               max_releases: int = MAX_ID) -> AuditReport:
        """Verify the chain of the newest rows, and the events of the newest releases that ended.

        Page by page: it holds no lock. copy: id and hash of a row as somebody kept them elsewhere; nothing else shows
        that the newest rows were taken away.
        """
        of_rows = self.head()[0]
        start = max(of_rows - max_rows, 0)
        before = self.rows(start - 1, 1) if start else []
        chain = AuditChain((start, before[0].hash if before and before[0].id == start else ""), copy)
        self._read(chain, start or -MAX_ID)
        ended = list(chain.ended.items())
        verified, gone = ended[max(len(ended) - max_releases, 0):], []
        for release_id, (row_id, digest) in verified:
            with self._database.transaction() as tx:
                if not tx.value("SELECT COUNT(*) FROM release_tasks WHERE id = ?", release_id):
                    gone.append(release_id)
                elif self._events_digest(tx, release_id)[1] != digest:
                    chain.add_fault(f"digest of release {release_id} differs: its events are not those that it ended "
                                    f"with (row {row_id})")
        if gone:
            self._read(chain, chain.last[0])  # a prune may have run meanwhile
        for release_id in gone:
            if not chain.is_pruned(release_id):
                chain.add_fault(f"taken away: release {release_id}, and no row of prune tells of it")
        if copy and copy[0] > chain.last[0]:
            chain.add_fault(f"taken away: the log ends with row {chain.last[0]}, and the copy is of row {copy[0]}")
        return AuditReport(chain.rows, max(of_rows, chain.last[0]), len(verified), len(ended), chain.last,
                           chain.faults)

    def _read(self, chain: AuditChain, after: int) -> None:
        while rows := self.rows(after, AUDIT_PAGE):
            for row in rows:
                chain.add(row)
            after = rows[-1].id

    @staticmethod
    def _head(tx: Transaction) -> tuple[int, str]:
        row = tx.row("SELECT id, hash FROM audit_log ORDER BY id DESC LIMIT 1")
        return (row[0], row[1]) if row and row[0] > 0 else (0, "")

    @staticmethod
    def _events_digest(tx: Transaction, release_id: int) -> tuple[int, str]:
        """Return the number of a release's events, and the SHA-256 of their canonical form."""
        digest, count, last_id = hashlib.sha256(b"["), 0, -MAX_ID
        while True:
            # the index release_events_by_release
            rows = tx.rows("""
                SELECT id, node_id, at, actor, event, from_status, to_status, detail
                FROM release_events
                WHERE release_task_id = ? AND id > ? AND event <> ?
                ORDER BY id
                LIMIT ?""", release_id, last_id, NOTIFY_GIVEN_UP, AUDIT_PAGE)
            if rows:
                digest.update((b"," if count else b"") + _CHAINED.encode(rows)[1:-1].encode())
                count, last_id = count + len(rows), rows[-1][0]
            if len(rows) < AUDIT_PAGE:
                digest.update(b"]")
                return count, digest.hexdigest()


# endregion


# region Nodes
# ======================================================================================
# Nodes: the registry of nodes.
# Uses: Vocabulary, Helpers, Model, Plan, Status texts, Database, Database state,
#   Audit.
# ======================================================================================

NODE_COLUMNS = ", ".join(field.name for field in dataclasses.fields(Node))
# What a person sets.
_SETTABLE_COLUMNS = ("name", "main_ip", "agent_port", "agent_protocol", "labels", "enabled", "status")


def node_values(node: Node, columns: Iterable[str] = _SETTABLE_COLUMNS) -> dict[str, object]:
    """Return columns of a node for audit_log, named and shown as in the API."""
    values: dict[str, object] = {}
    for column in columns:
        value = getattr(node, column)
        if column == "labels":
            with contextlib.suppress(ValueError):  # written by hand
                value = parse_json(value)
        name = re.sub("_([a-z])", lambda m: m[1].upper(), column)
        values[name] = bool(value) if column == "enabled" else value
    return values


class Imported(NamedTuple):
    """What became of the nodes of an import."""
    added: list[Node]
    changed: list[Node]
    same: list[Node]


class Page(NamedTuple):
    """A page of a list."""
    items: list[Any]
    # Of the whole list.
    total: int
    number: int
    size: int


def for_like(text: str) -> str:
    """Return a text as it stands in a pattern of LIKE ... ESCAPE '\\'."""
    return re.sub(r"([\\%_])", r"\\\1", text)


# Nodes in one statement, up to three parameters each: SQLite 3.26 takes 999.
NODES_PER_STATEMENT = 320


def rows_of_nodes(tx: Transaction, statement: str, ids: Sequence[int], *before: object) -> list[tuple[Any, ...]]:
    """Return the rows of a query for some ids, of nodes mostly; {marks} in it is where they go, some at a time.

    before: parameters that come before these.
    """
    return [row for start in range(0, len(ids), NODES_PER_STATEMENT)
            for part in [ids[start:start + NODES_PER_STATEMENT]]
            for row in tx.rows(statement.format(marks=", ".join("?" * len(part))), *before, *part)]


def all_nodes(tx: Transaction) -> list[Node]:
    """Return all nodes by id."""
    return [Node(*row) for row in tx.rows(f"SELECT {NODE_COLUMNS} FROM nodes ORDER BY id")]


def page_of_nodes(tx: Transaction, page: int, size: int) -> Page:
    """Return a page of the nodes by id; size 0: all of them."""
    total = int(tx.value("SELECT COUNT(*) FROM nodes"))
    rows = tx.rows(f"SELECT {NODE_COLUMNS} FROM nodes ORDER BY id LIMIT ? OFFSET ?", size or total, (page - 1) * size)
    return Page([Node(*row) for row in rows], total, page, size)


def find_node(tx: Transaction, node_id: int) -> Node:
    """Return a node; raise AppError 3001."""
    row = tx.row(f"SELECT {NODE_COLUMNS} FROM nodes WHERE id = ?", node_id) if node_id <= MAX_ID else None
    if row is None:
        raise AppError(NOT_FOUND, f"node {node_id} does not exist")
    return Node(*row)


def find_node_named(tx: Transaction, name: str) -> Node:
    """Return a node by its name; raise AppError 3001."""
    row = tx.row(f"SELECT {NODE_COLUMNS} FROM nodes WHERE name = ?", name)
    if row is None:
        raise AppError(NOT_FOUND, f"node {one_line(name, 100)} does not exist")
    return Node(*row)


def _at_new_address(before: Iterable[Node], after: Iterable[Node]) -> list[Node]:
    """Return the nodes that were moved or enabled."""
    return [new for old, new in zip(before, after) if new.endpoint != old.endpoint or new.enabled != old.enabled]


def succeeded_nodes(tx: Transaction, release_id: int) -> set[int]:
    return {row[0] for row in tx.rows(
        "SELECT node_id FROM release_task_nodes WHERE release_task_id = ? AND status = 'success'", release_id)}


class Nodes:
    """The registry of nodes. Each public method is one transaction; its callers have checked the values."""

    def __init__(self, state: DatabaseState, audit: Audit):
        self._state = state
        self._database = state.database
        self._audit = audit

    def add(self, name: str, main_ip: str, agent_port: int = 8443, agent_protocol: str = TASKS,
            labels: str = "{}", enabled: bool = True, status: str = "online", by: Who = PROGRAM) -> Node:
        """Add a node; raise AppError 3002 where its name or address is taken."""
        columns = {"name": name, "main_ip": main_ip, "agent_port": agent_port, "agent_protocol": agent_protocol,
                   "labels": labels, "enabled": int(enabled), "status": status}
        with self._database.transaction(write=True) as tx:
            node = self._add(tx, columns)
            self._refuse_twins(tx, [node])
            self._audit.add(tx, by, "node.add", f"node {name}", after={"id": node.id, **node_values(node)})
            return node

    def import_all(self, rows: Sequence[Mapping[str, Any]], by: Who = PROGRAM, update: bool = False) -> Imported:
        """Add all nodes or none, each given by its columns; with update change those whose name exists.

        Raise AppError 3002 for the first whose name or address is taken, 3003 where an open release needs one's
        address.
        """
        with self._database.transaction(write=True) as tx:
            twice = next((name for name, count in collections.Counter(row["name"] for row in rows).items()
                          if count > 1), None)
            if twice is not None:
                raise AppError(EXISTS, f"node {twice} is in the file twice")
            known = {node.name: node for node in all_nodes(tx)} if update else {}
            added = [self._add(tx, row) for row in rows if row["name"] not in known]
            found = [(known[row["name"]], row) for row in rows if row["name"] in known]
            changed = [self._change(tx, node, row, by) for node, row in found]
            before = [node for node, _ in found]
            self._refuse_twins(tx, [*added, *_at_new_address(before, changed)])
            if added:
                self._audit.add(tx, by, "node.import", count_of_nodes(len(added)), after={
                    "count": len(added), "names": names_of([node.name for node in added]),
                    "nodes": [node_values(node) for node in added]})
            return Imported(added, [node for node, old in zip(changed, before) if node != old],
                            [node for node, old in zip(changed, before) if node == old])

    def update(self, node_id: int, changes: Mapping[str, object], by: Who = PROGRAM) -> Node:
        """Change columns of a node; raise AppError 3001, 3002, or 3003 where an open release needs its address."""
        return self.update_all([node_id], changes, by)[0]

    def update_all(self, node_ids: Sequence[int], changes: Mapping[str, object], by: Who = PROGRAM) -> list[Node]:
        """Change columns of all of some nodes, or of none; raise AppError as update() does."""
        with self._database.transaction(write=True) as tx:
            before = [find_node(tx, node_id) for node_id in node_ids]
            nodes = [self._change(tx, node, changes, by) for node in before]
            self._refuse_twins(tx, _at_new_address(before, nodes))
            return nodes

    def delete(self, node_id: int, by: Who = PROGRAM) -> None:
        """Delete a node; raise AppError 3001, or 3003 where a release has it: history is kept."""
        with self._database.transaction(write=True) as tx:
            node = find_node(tx, node_id)
            release_id = tx.value("SELECT MAX(release_task_id) FROM release_task_nodes WHERE node_id = ?", node_id)
            if release_id is not None:
                raise AppError(WRONG_STATE, f"node {node.name} is part of release {release_id}: disable it instead")
            tx.execute("DELETE FROM nodes WHERE id = ?", node_id)
            self._audit.add(tx, by, "node.delete", f"node {node.name}", {"id": node.id, **node_values(node)})

    def get(self, node_id: int) -> Node:
        """Return a node; raise AppError 3001."""
        with self._database.transaction() as tx:
            return find_node(tx, node_id)

    def named(self, name: str) -> Node:
        """Return a node by its name; raise AppError 3001."""
        with self._database.transaction() as tx:
            return find_node_named(tx, name)

    def names(self, start: str, limit: int) -> list[tuple[str, str]]:
        """Return name and address of the first nodes whose name begins so."""
        with self._database.transaction() as tx:
            return [(name, address) for name, address in tx.rows(
                "SELECT name, main_ip FROM nodes WHERE name LIKE ? ESCAPE '\\' ORDER BY name LIMIT ?",
                for_like(start) + "%", limit)]

    def label_pairs(self) -> list[tuple[str, Any]]:
        """Return each label that a node has."""
        with self._database.transaction() as tx:
            found = [label_values(row[0]).items() for row in tx.rows("SELECT DISTINCT labels FROM nodes")]
        return sorted(set().union(*found), key=str)

    def label_counts(self) -> list[tuple[str, str, int]]:
        """Return each label of the nodes that get releases, as key, value and how many of them have it."""
        found = collections.Counter[tuple[str, str]]()
        with self._database.transaction() as tx:
            for labels, nodes in tx.rows("""
                    SELECT labels, COUNT(*)
                    FROM nodes
                    WHERE enabled = 1 AND status = 'online'
                    GROUP BY labels"""):
                found.update(dict.fromkeys(label_values(labels).items(), int(nodes)))
        return sorted((key, value, nodes) for (key, value), nodes in found.items())

    def page(self, page: int = 1, size: int = MAX_PAGE_SIZE) -> Page:
        """Return a page of the nodes by id; size 0: all of them."""
        with self._database.transaction() as tx:
            return page_of_nodes(tx, page, size)

    def last_releases(self, node_ids: Sequence[int]) -> dict[int, tuple[int, str]]:
        """Return by node the newest release that has it, and its status there."""
        if not node_ids:
            return {}
        with self._database.transaction() as tx:
            # the index release_task_nodes_by_node finds the newest of each
            return {node_id: (release_id, status) for node_id, release_id, status in tx.rows(f"""
                SELECT n.node_id, n.release_task_id, n.status
                FROM release_task_nodes n
                WHERE n.node_id IN ({', '.join('?' * len(node_ids))})
                  AND n.release_task_id = (SELECT MAX(m.release_task_id) FROM release_task_nodes m
                                           WHERE m.node_id = n.node_id)""", *node_ids)}

    def _add(self, tx: Transaction, columns: Mapping[str, Any]) -> Node:
        """Insert a node; the columns left out get the table's defaults."""
        self._refuse_taken_name(tx, columns["name"])
        now = self._state.now()
        tx.execute(f"INSERT INTO nodes ({', '.join(columns)}, created_at, updated_at) "
                   f"VALUES ({', '.join('?' * len(columns))}, ?, ?)", *columns.values(), now, now)
        return find_node_named(tx, columns["name"])

    def _change(self, tx: Transaction, node: Node, changes: Mapping[str, Any], by: Who) -> Node:
        """Write the columns of a node that change, with a row of the audit log; return it as it is then."""
        after = dataclasses.replace(node, **dict(changes))
        changed = [column for column in _SETTABLE_COLUMNS if getattr(after, column) != getattr(node, column)]
        if not changed:
            return node
        if "name" in changed:
            self._refuse_taken_name(tx, after.name)
        if not {"main_ip", "agent_port", "agent_protocol"}.isdisjoint(changed):
            self._refuse_in_use(tx, node)
        tx.execute(f"UPDATE nodes SET {', '.join(f'{column} = ?' for column in changed)}, updated_at = ? WHERE id = ?",
                   *(changes[column] for column in changed), self._state.now(), node.id)
        if after.endpoint != node.endpoint and node.last_version:
            # what the new host has is not known, not even when it moves back; who stays at the old address has it
            newest = int(tx.value("SELECT COALESCE(MAX(version), 0) FROM release_tasks"))
            tx.execute("UPDATE nodes SET last_version = ? WHERE id = ?", max(newest, node.last_version), node.id)
            tx.execute("UPDATE nodes SET last_version = ? WHERE main_ip = ? AND agent_port = ? AND last_version < ?",
                       node.last_version, node.main_ip, node.agent_port, node.last_version)
        self._audit.add(tx, by, "node.set", f"node {node.name}", node_values(node, changed),
                        node_values(after, changed))
        return find_node(tx, node.id)

    @staticmethod
    def _refuse_taken_name(tx: Transaction, name: str) -> None:
        if tx.value("SELECT COUNT(*) FROM nodes WHERE name = ?", name):
            raise AppError(EXISTS, f"node {name} exists already")

    @staticmethod
    def _refuse_twins(tx: Transaction, nodes: Collection[Node]) -> None:
        """Raise AppError 3002 where one of the nodes, as written, has the address of another enabled one.

        After all is written, so that nodes may take each other's address.
        """
        owners: dict[Endpoint, list[str]] = {}
        for name, main_ip, port in tx.rows("SELECT name, main_ip, agent_port FROM nodes WHERE enabled = 1 ORDER BY id"):
            owners.setdefault(endpoint_of(main_ip, port), []).append(name)
        written = {node.name for node in nodes}
        for node in nodes:
            names = owners.get(node.endpoint, [])
            if node.enabled and len(names) > 1:
                first, second = sorted(names, key=lambda name: name in written)[:2]
                raise AppError(EXISTS, f"node {first} has the address {node.main_ip}:{node.agent_port} already: "
                                       f"an agent is one node, so {second} can't have it too")

    @staticmethod
    def _refuse_in_use(tx: Transaction, node: Node) -> None:
        """Raise AppError 3003 where an open release has the node."""
        release_id = tx.value(f"""
            SELECT MIN(r.id)
            FROM release_tasks r
            WHERE r.status IN {OPEN_RELEASES}
              AND EXISTS (SELECT 1 FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.node_id = ?)""",
                              node.id)
        if release_id is not None:
            raise AppError(WRONG_STATE, f"node {node.name} is part of release {release_id}, which has not ended: "
                                        "its address, port and protocol stay until then")


# endregion


# region Queue
# ======================================================================================
# Queue: the order of open releases, and the writing of what is decided on one.
# Uses: Vocabulary, Helpers, Model, Freezes, Strategy, Failures, Node index, Status
#   texts, Decision, Verbs, Database, Database state, Audit, Nodes.
# ======================================================================================

_ROLLBACK = f"""FROM release_tasks b WHERE b.rollback_of = r.id
         ORDER BY CASE WHEN b.status IN {OPEN_RELEASES} THEN 0
                       WHEN b.status IN ('success', 'partial') THEN 1 ELSE 2 END, b.id DESC
         LIMIT 1"""
# Fields of Release that are computed; each other one is a column of its row r. The index release_task_nodes_by_status
# serves each status by itself: its lowest batch is the first entry, while IN would read all of them.
_COMPUTED_OF_RELEASE = {
    "stored_sha256": "r.payload_sha256",
    "skipped_nodes":
        "(SELECT COUNT(*) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'skipped')",
    "current_batch": """COALESCE((SELECT MIN(w.batch) FROM (
         SELECT MIN(n.batch) AS batch FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'pending'
         UNION ALL
         SELECT MIN(n.batch) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'running') w),
        (SELECT MIN(n.batch) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'failed'), 0)""",
    # the index release_tasks_by_rollback_of
    "rollback_id": f"(SELECT b.id {_ROLLBACK})", "rollback_status": f"COALESCE((SELECT b.status {_ROLLBACK}), '')"}
_RELEASE_FIELDS = [field.name for field in dataclasses.fields(Release)]
RELEASE_COLUMNS = ", ".join(_COMPUTED_OF_RELEASE.get(name, f"r.{name}") for name in _RELEASE_FIELDS)

# The same for a list, which needs a payload only where its digest is still to be made: each may be a megabyte.
LISTED_COLUMNS = RELEASE_COLUMNS.replace("r.payload,", "CASE WHEN r.payload_sha256 = '' THEN r.payload ELSE '' END,", 1)


class ReleaseFilter(NamedTuple):
    """Which releases a list shows; what is empty restricts nothing."""
    status: str = ""
    target: str = ""
    # Part of its id, version (v42), target, reason or status_reason.
    search: str = ""
    # Stored time: those created then or later.
    since: str = ""
    # Name of a node that it has.
    node: str = ""

    def where(self) -> tuple[str, list[object]]:
        """Return the condition on release_tasks r, "" for none, and its parameters.

        The indexes release_tasks_by_status, release_tasks_by_target and release_tasks_by_created; for a node
        release_task_nodes_by_node. A search reads every row that the others leave.
        """
        # LOWER() of SQLite knows ASCII only: other letters are found as they are written
        like = f"%{for_like(self.search)}%"
        text = "(LOWER(r.target) LIKE ? ESCAPE '\\' OR r.target LIKE ? ESCAPE '\\')"
        texts = [text.replace("r.target", f"r.{name}") for name in ("target", "reason", "status_reason")]
        number = self.search.lower()[:19]
        patterns: list[object] = [like.lower(), like]
        conditions: list[tuple[str, str, list[object]]] = [
            (self.status, "r.status = ?", [self.status]),
            (self.target, "r.target = ?", [self.target]),
            (self.since, "r.created_at >= ?", [self.since]),
            (self.node, """r.id IN (SELECT n.release_task_id FROM nodes h
                                    JOIN release_task_nodes n ON n.node_id = h.id WHERE h.name = ?)""", [self.node]),
            (self.search, f"({' OR '.join(texts)} OR CAST(r.id AS TEXT) = ? OR 'v' || CAST(r.version AS TEXT) = ?)",
             [*patterns * len(texts), number, number])]
        given = [(condition, values) for is_given, condition, values in conditions if is_given]
        return (" WHERE " + " AND ".join(condition for condition, _ in given) if given else "",
                [value for _, values in given for value in values])


# A node of a release (n) as it was when the release was made; where a person wrote the row, as it is now (nodes h).
NAME_THEN, _IP_THEN, _PORT_THEN = (
    "COALESCE(NULLIF(n.node_name, ''), h.name)", "COALESCE(NULLIF(n.main_ip, ''), h.main_ip)",
    "COALESCE(NULLIF(n.agent_port, 0), h.agent_port)")
ADDRESS_THEN = f"{_IP_THEN}, {_PORT_THEN}"
LABELS_THEN = "COALESCE(NULLIF(n.labels, ''), h.labels)"

# The same for the fields of ReleaseNode up to next_op, where the driver's own begin.
_COMPUTED_OF_NODE = {
    "name": NAME_THEN, "main_ip": _IP_THEN, "agent_port": _PORT_THEN, "agent_protocol": "h.agent_protocol",
    "labels": LABELS_THEN, "last_version":
        "(SELECT MAX(a.last_version) FROM nodes a WHERE a.main_ip = h.main_ip AND a.agent_port = h.agent_port)"}
_NODE_FIELDS = list(itertools.takewhile(lambda name: name != "next_op", ReleaseNode._fields))
_COLUMN_OF = {name: {"waited_s": "waited_sec", "stored_reached": "reached"}.get(name, name) for name in _NODE_FIELDS}
RELEASE_NODE_COLUMNS = ", ".join(_COMPUTED_OF_NODE.get(name, f"n.{_COLUMN_OF[name]}") for name in _NODE_FIELDS)

# What a commit writes of a release, and of a node; after a COMMIT in doubt the same is read back.
_DECIDED = [name for name in Decision._fields if name in _RELEASE_FIELDS]
_NODE_DECIDED = [name for name in _NODE_FIELDS if name not in {*_COMPUTED_OF_NODE, "node_id", "batch", "accepted"}]
decided_values = operator.attrgetter(*_DECIDED)
decided_node_values = operator.attrgetter(*_NODE_DECIDED)
# The same without the id of its task, which differs from node to node.
_ALIKE = [name for name in _NODE_DECIDED if name != "task_id"]
_alike_values = operator.attrgetter(*_ALIKE)

# The counters, counted from the nodes in the transaction that changes them (rule 7).
COUNTERS = """success_nodes = (SELECT COUNT(*) FROM release_task_nodes n
                         WHERE n.release_task_id = release_tasks.id AND n.status = 'success'),
        failed_nodes = (SELECT COUNT(*) FROM release_task_nodes n
                        WHERE n.release_task_id = release_tasks.id AND n.status = 'failed')"""

# Nodes of a large release end between two counts: counting 100,000 in each commit would cost more than all else in it.
COUNTED_EVERY = 1000

RELEASE_EVENTS = {PENDING: "created", RUNNING: "started", PAUSED: "paused", CANCELLING: "cancelling",
                  SUCCESS: "finished", PARTIAL: "finished", FAILED: "finished", CANCELLED: "cancelled"}
NODE_EVENTS = {RUNNING: "dispatched", SUCCESS: "succeeded", FAILED: "failed", SKIPPED: "skipped"}

# Memory for the addresses of open releases.
MAX_MASK_BYTES = 32 << 20


def counters_after(release: Release, decision: Decision, counts: bool = False) -> tuple[str, list[int]]:
    """Return SQL that sets the counters when a decision on a release is written (rule 7), and its parameters.

    A large release counts its rows at each COUNTED_EVERY-th end of a node, at a change of its status, where no node
    changes, and where that is asked for: after its rows were read anew. In between what the commit itself changed is
    added: write_nodes() checks that in the same transaction. So a row that somebody turned by hand is counted when it
    is met, and with the next thousand at the latest.
    """
    done = release.success_nodes + release.failed_nodes
    more = [sum((c.after.status == status) - (c.before.status == status) for c in decision.changes)
            for status in (SUCCESS, FAILED)]
    if (counts or release.total_nodes <= COUNTED_EVERY or decision.status != release.status or not decision.changes
            or done // COUNTED_EVERY != (done + sum(more)) // COUNTED_EVERY):
        return COUNTERS, []
    return "success_nodes = success_nodes + ?, failed_nodes = failed_nodes + ?", more


def find_release(tx: Transaction, release_id: int) -> Release | None:
    row = tx.row(f"SELECT {RELEASE_COLUMNS} FROM release_tasks r WHERE r.id = ?",
                 release_id) if release_id <= MAX_ID else None
    return Release(*row) if row else None


def read_release(tx: Transaction, release_id: int) -> Release:
    release = find_release(tx, release_id)
    if release is None:
        raise AppError(NOT_FOUND, f"release {release_id} does not exist")
    return release


def read_release_nodes(tx: Transaction, release_id: int, where: str = "", *params: object) -> list[ReleaseNode]:
    """Return the nodes of a release by batch and id; where: a condition that narrows them, with its parameters."""
    return [ReleaseNode(*row) for row in tx.rows(f"""
        SELECT {RELEASE_NODE_COLUMNS}
        FROM release_task_nodes n
        JOIN nodes h ON h.id = n.node_id
        WHERE n.release_task_id = ? {where}
        ORDER BY n.batch, n.node_id""", release_id, *params)]


def read_failures(tx: Transaction, release_id: int) -> list[FailureGroup]:
    """Return the failed nodes of a release by cause; the labels are those that nodes have now."""
    of_release = "FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id WHERE n.release_task_id = ?"
    failed = [FailedNode(*row) for row in tx.rows(f"""
        SELECT n.node_id, {NAME_THEN}, {_IP_THEN}, n.task_id, n.error_kind, n.error_msg, h.labels
        {of_release} AND n.status = 'failed'""", release_id)]
    labels = tx.rows(f"SELECT h.labels, COUNT(*) {of_release} GROUP BY h.labels", release_id) if failed[1:] else []
    return group_failures(failed, dict(labels))


# The failed nodes of a release with more nodes than this are rarely read; of so many such releases they are kept.
SMALL_RELEASE_NODES, MAX_LARGE_KEPT = 1000, 16


class FailureReader:
    """Reads the failed nodes of releases by cause; 100,000 of them take a second of CPU time."""

    def __init__(self) -> None:
        # Of large releases, by id and status: once a release has ended they don't change.
        self._large: dict[tuple[int, str], RareRead[list[FailureGroup]]] = {}

    def read(self, tx: Transaction, release: Release) -> list[FailureGroup]:
        """Return the failed nodes of a release by cause; while a large one runs, they may be some seconds old."""
        if release.total_nodes <= SMALL_RELEASE_NODES:
            return read_failures(tx, release.id)
        if len(self._large) >= MAX_LARGE_KEPT:
            self._large.clear()
        return self._large.setdefault((release.id, release.status), RareRead(read_failures)).get(tx, release.id)


def read_batches(tx: Transaction, release_id: int) -> list[BatchProgress]:
    batches: dict[int, dict[str, int]] = {}
    for batch, status, count in tx.rows("""
            SELECT batch, status, COUNT(*)
            FROM release_task_nodes
            WHERE release_task_id = ?
            GROUP BY batch, status
            ORDER BY batch""", release_id):
        batches.setdefault(batch, {})[status] = count
    return [BatchProgress(*item) for item in batches.items()]


def read_exceeded(tx: Transaction, release: Release, batches: Sequence[BatchProgress]) -> str:
    """Do exceeded_limit() with a release as it stands in the database."""
    failures = dict(tx.rows("SELECT batch, COUNT(*) FROM release_task_nodes WHERE release_task_id = ? "
                            "AND status = 'failed' AND accepted = 0 GROUP BY batch", release.id))
    return limit_exceeded(failures, {batch.number: batch.total for batch in batches}, strategy_of(release.strategy))


def read_freezes(tx: Transaction) -> Freezes:
    """Return what is frozen now: a freeze is over when its end has come, whether somebody wrote that down or not."""
    found = read_set_freezes(tx)
    return found.in_force(tx.now()) if any(freeze.until for freeze in found.on) else found


def read_set_freezes(tx: Transaction) -> Freezes:
    """Return the freezes that are stored, those too whose end has come and that nobody has taken away yet."""
    found = [Freeze(bool(frozen), reason, actor, at, until or None, target, setter, by, wanted_at)
             for frozen, reason, actor, at, until, target, setter, by, wanted_at in tx.rows("""
        SELECT frozen, reason, actor, at, until, '', setter, lift_wanted_by, lift_wanted_at
        FROM release_freeze
        WHERE id = 1
        UNION ALL
        SELECT 1, reason, actor, at, until, target, setter, lift_wanted_by, lift_wanted_at
        FROM target_freezes
        ORDER BY 6""")]
    if any(freeze.frozen for freeze in found) and approvals_in_force(tx):
        found = [freeze._replace(two_persons=freeze.frozen) for freeze in found]
    return Freezes(next((freeze for freeze in found if not freeze.target), NO_FREEZE),
                   tuple(freeze for freeze in found if freeze.target))


def over_freezes(tx: Transaction) -> list[Freeze]:
    """Return the freezes whose end has come and that nobody has taken away yet, the one that ended first first."""
    found = read_set_freezes(tx)
    return found.over_at(tx.now()) if any(freeze.until for freeze in found.on) else []


def write_freeze(tx: Transaction, freeze: Freeze) -> None:
    """Set the freeze of a target, or of everything, or take it away where it is not frozen."""
    values = (freeze.reason, freeze.actor, freeze.at, freeze.until, freeze.setter, freeze.lift_wanted_by,
              freeze.lift_wanted_at)
    if not freeze.target:
        tx.execute("""
            UPDATE release_freeze
            SET frozen = ?, reason = ?, actor = ?, at = ?, until = ?, setter = ?, lift_wanted_by = ?, lift_wanted_at = ?
            WHERE id = 1""", int(freeze.frozen), *values)
        return
    tx.execute("DELETE FROM target_freezes WHERE target = ?", freeze.target)
    if freeze.frozen:
        tx.execute("""
            INSERT INTO target_freezes (target, reason, actor, at, until, setter, lift_wanted_by, lift_wanted_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)""", freeze.target, *values)


def strategy_of(text: str) -> Strategy:
    """Return a stored strategy; NO_STRATEGY for one that can't be used: the executor ends its release."""
    with contextlib.suppress(ValueError, AppError):
        return parse_strategy(parse_json(text))
    return NO_STRATEGY


def start_at_of(text: str) -> str:
    """Return the startAt of a stored strategy, "" for none; most have none, and a scan reads all."""
    return strategy_of(text).start_at if "startAt" in text else ""


def read_candidates(tx: Transaction) -> list[Candidate]:
    now = tx.now()
    # the index release_tasks_by_status
    return [Candidate(id_, target, version, status, running,
                      expires is not None and now < expires <= latest_expiry(now),
                      start_at_of(strategy), paused_by, reason, started is not None, bool(pending), tag, goes_first,
                      during_freeze, approval == WANTED and started is None, author)
            for (id_, target, version, status, running, expires, strategy, paused_by, reason, started, pending, tag,
                 goes_first, during_freeze, approval, author) in tx.rows(f"""
        SELECT r.id, r.target, r.version, r.status,
               (SELECT COUNT(*) FROM release_task_nodes n
                WHERE n.release_task_id = r.id AND n.status = 'running'),
               r.claim_expires_at, r.strategy, r.paused_by, r.status_reason, r.started_at,
               (SELECT MIN(n.batch) FROM release_task_nodes n
                WHERE n.release_task_id = r.id AND n.status = 'pending'), r.tag, r.goes_first, r.during_freeze,
               r.approval, r.author
        FROM release_tasks r
        WHERE r.status IN {OPEN_RELEASES}""")]


def read_executors(tx: Transaction) -> list[ExecutorRow]:
    """Return who looks for work, or did within a day or so; who was seen last comes first."""
    return [ExecutorRow(*row) for row in tx.rows("""
        SELECT owner, host, kind, started_at, seen_at, CAST(period_sec AS DOUBLE PRECISION), error
        FROM executors
        ORDER BY seen_at DESC, owner""")]


def latest_expiry(now: str) -> str:
    """Return the latest expiry that a claim can have; a later one is of a clock that was ahead, and void."""
    return utc_text(epoch_of(now) + MAX_CLAIM_TTL_S)


def expiry_of(tx: Transaction, ttl_s: float) -> str:
    return utc_text(epoch_of(tx.now()) + ttl_s)


def freeze_values(freeze: Freeze) -> dict[str, object]:
    """Return a freeze as audit_log has it before or after an act."""
    return non_empty(frozen=freeze.frozen, reason=freeze.reason, until=freeze.until,
                     liftWantedBy=freeze.lift_wanted_by)


def fill_node_addresses(tx: Transaction, release_id: int) -> None:
    """Copy names and addresses of nodes into the rows of a release that a person wrote: history does not change."""
    tx.execute("""
        UPDATE release_task_nodes
        SET (node_name, main_ip, agent_port) =
            (SELECT h.name, h.main_ip, h.agent_port FROM nodes h WHERE h.id = release_task_nodes.node_id)
        WHERE release_task_id = ? AND main_ip = '' AND node_id IN (SELECT id FROM nodes)""", release_id)


def write_nodes(tx: Transaction, release_id: int, changes: Sequence[NodeChange], now: Moment) -> None:
    """Write changes of nodes, in one statement for those that become alike; raise StateMoved."""
    alike: dict[tuple[Any, ...], list[NodeChange]] = {}
    for change in changes:
        key = _alike_values(change.after), change.before.status, change.before.attempts
        alike.setdefault(key, []).append(change)
    columns = ", ".join(f"{_COLUMN_OF[name]} = ?" for name in _ALIKE)
    for (values, status, attempts), group in alike.items():
        for start in range(0, len(group), NODES_PER_STATEMENT):
            part = group[start:start + NODES_PER_STATEMENT]
            named = [c.after for c in part if c.after.task_id != c.before.task_id]
            task_id = f"CASE node_id {'WHEN ? THEN ? ' * len(named)}ELSE task_id END" if named else "task_id"
            # status || '': by the unique index of release and node, as the one by status has all pending ones
            changed = tx.execute(f"""
                UPDATE release_task_nodes
                SET {columns}, updated_at = ?, task_id = {task_id}
                WHERE release_task_id = ? AND status || '' = ? AND attempts = ?
                  AND node_id IN ({', '.join('?' * len(part))})""",
                                 *values, now.text, *(v for n in named for v in (n.node_id, n.task_id)),
                                 release_id, status, attempts, *(c.after.node_id for c in part))
            if changed != len(part):
                raise StateMoved(f"a node of release {release_id} is no longer {status}")


def change_status(tx: Transaction, release: Release, nodes: NodeIndex, verb: Verb, now: Moment, actor: Who,
                  reason: str) -> None:
    """Write the status that a verb brings, its status_reason and its event."""
    status, strategy = status_after_verb(verb.name, release), strategy_of(release.strategy)
    after = dataclasses.replace(release, status=status, paused_by=str(actor) if status == PAUSED else "")
    status_reason = one_line(f"resumed{by_whom(str(actor))}: {REASON_PENDING}") if status == RUNNING else describe(
        status, Situation(after, nodes, now, strategy=strategy, stage=Stage(0, release.passed_batch),
                          exceeded=exceeded_limit(nodes, strategy)))
    # total_nodes for rows that a person wrote: the claim sets it, but may never come
    tx.execute("UPDATE release_tasks SET status = ?, status_reason = ?, paused_by = ?, updated_at = ?, "
               f"total_nodes = ?, {COUNTERS} WHERE id = ?",
               status, status_reason, after.paused_by, now.text, len(nodes), release.id)
    add_events(tx, now.text, actor, [NewEvent(release.id, verb.event, release.status, status, reason)])
    tx.after_commit.append(lambda: log.info("%s: %s by %s%s", release, verb.event, actor,
                                            f": {reason}" if reason else "",
                                            extra=about(release, actor=str(actor), event=verb.event)))


class Queue:
    """The order of open releases, and the writing of what is decided on one; in the caller's transaction."""

    def __init__(self, state: DatabaseState, audit: Audit):
        self._state = state
        self._database = state.database
        self._audit = audit
        # The addresses of open releases, each as bits of a number; by generation of the database, id and version.
        self._masks: dict[tuple[int, int, int], int] = {}
        # The number of each address's bit.
        self._bits: dict[Endpoint, int] = {}
        self._masks_guard = threading.Lock()

    def runnable(self, tx: Transaction) -> tuple[list[int], list[int]]:
        """Return the ids of the releases that may be claimed now, and of those that others have claimed."""
        return runnable(read_candidates(tx), tx.now(), read_freezes(tx), self._addresses(tx))

    def ahead_of(self, tx: Transaction, release_id: int) -> list[Candidate]:
        """Return all releases that a pending one waits for, in their order."""
        return ahead_of(release_id, read_candidates(tx), tx.now(), read_freezes(tx), self._addresses(tx))

    def explain_waiting(self, tx: Transaction) -> None:
        """Bring status_reason of the waiting releases up to date, after any change that they may wait for."""
        candidates = read_candidates(tx)
        stored = {c.id: c.status_reason for c in candidates}
        for release_id, reason in waiting_reasons(candidates, tx.now(), read_freezes(tx), self._addresses(tx)).items():
            if stored[release_id] != reason:
                tx.execute("UPDATE release_tasks SET status_reason = ?, updated_at = ? WHERE id = ?",
                           reason, self._state.now(), release_id)

    def change_freeze(self, tx: Transaction, before: Freezes, freeze: Freeze, at: str, actor: Who,
                      detail: str = "") -> Freezes:
        """Write a freeze, or its end, with an event of each open release that it makes a difference to.

        before: what was frozen until then; return what is now. at: when that is so. detail: of the event of a release
        that is not frozen any more.
        """
        write_freeze(tx, freeze)
        rest = before.without(freeze.target)
        after = rest if not freeze.frozen else Freezes(rest.everything, (*rest.targets, freeze)) if freeze.target \
            else rest._replace(everything=freeze)
        events = []
        for c in read_candidates(tx):
            was, holding = before.holding(c), after.holding(c)
            if was != holding:
                events.append(NewEvent(c.id, FROZEN if holding else UNFROZEN, c.status, c.status,
                                       "; ".join(one.detail for one in holding) or detail))
        add_events(tx, at, actor, events)
        return after

    def end_freezes(self, tx: Transaction, actor: Who) -> bool:
        """Write down which freezes are over, each once, as of its end; return whether one was."""
        found = read_set_freezes(tx)
        over = found.over_at(tx.now())
        for freeze in over:
            until, text = freeze.until or "", f"its end has come: {freeze.line()}"
            found = self.change_freeze(tx, found, Freeze(False, "", freeze.actor, until, None, freeze.target), until,
                                       actor, text)
            self._audit.add(tx, actor, "freeze.end", freeze.subject, freeze_values(freeze),
                            {"frozen": False})
            tx.after_commit.append(functools.partial(
                log.warning, "the freeze of %s is over: %s", freeze.target or "everything", freeze.line(),
                extra=about(actor=str(actor), event=UNFROZEN)))
        if over:
            self.explain_waiting(tx)
        return bool(over)

    def write_decision(self, tx: Transaction, release: Release, decision: Decision, now: Moment, actor: Who,
                       claim: Claim | None = None, detail: str = "", counts: bool = False) -> None:
        """Write a decision on a release as it was read, with events and, at its end, the audit log's row.

        The nodes were written before it: write_nodes(). detail: of the release's event, in place of its error or
        status_reason. counts: see counters_after(). Raise StateMoved where the release or the claim changed meanwhile.
        """
        ends = decision.status in TERMINAL
        counters, more = counters_after(release, decision, counts)
        changed = tx.execute(f"""
            UPDATE release_tasks
            SET {', '.join(f'{name} = ?' for name in _DECIDED)}, updated_at = ?, finished_at = ?, {counters},
                claim_owner = CASE WHEN ? = 1 THEN '' ELSE claim_owner END,
                claim_expires_at = CASE WHEN ? = 1 THEN NULL ELSE claim_expires_at END
            WHERE id = ? AND status = ? AND updated_at = ? AND claim_fence = ? AND claim_owner = ?""",
                             *decided_values(decision), now.text, now.text if ends else None, *more, int(ends),
                             int(ends), release.id, release.status, release.updated_at,
                             claim.fence if claim else release.claim_fence,
                             claim.owner if claim else release.claim_owner)
        if changed != 1:
            raise StateMoved(f"{release} is no longer as it was read")
        events = [NewEvent(release.id, NODE_EVENTS[c.after.status], c.before.status, c.after.status,
                           c.detail or c.after.error_msg, c.after.node_id)
                  for c in decision.changes if c.before.status != c.after.status]
        if decision.status != release.status:
            events.append(NewEvent(release.id, RELEASE_EVENTS[decision.status], release.status, decision.status,
                                   "; ".join(filter(None, (detail or decision.error_msg or decision.status_reason,
                                                           decision.remark)))))
        add_events(tx, now.text, actor, events)
        if decision.status != release.status:
            self.explain_waiting(tx)
        head = self._audit.add_end(tx, actor, release, decision.status) if ends else None
        tx.after_commit.append(lambda: self.log_written(release, decision, str(actor), head))

    def log_written(self, release: Release, decision: Decision, actor: str,
                    head: tuple[int, str] | None = None) -> None:
        """Log and count what a commit changed; of single nodes failures alone, but at level debug."""
        for change in decision.changes:
            node, event = change.after, NODE_EVENTS.get(change.after.status, "")
            if node.status == change.before.status:
                continue
            if change.before.status == RUNNING and node.status in AT_REST:
                self._observe("releasectl_node_duration_seconds", node.started_at, node.finished_at, node.status)
            if node.status == FAILED:
                self._database.metrics.count("releasectl_node_failures_total", node.error_kind)
                log.warning("%s: node %s failed: %s", release, node.name, node.error_msg,
                            extra=about(release, node=node.name, actor=actor, event=event))
            elif log.isEnabledFor(logging.DEBUG):
                log.debug("%s: node %s %s", release, node.name, event,
                          extra=about(release, node=node.name, actor=actor, event=event))
        skipped = sum(c.before.status != SKIPPED and c.after.status == SKIPPED for c in decision.changes)
        if skipped:
            log.info("%s: %s skipped", release, count_of_nodes(skipped),
                     extra=about(release, actor=actor, event=NODE_EVENTS[SKIPPED]))
        done = decision.passed_batch if decision.passed_batch > release.passed_batch else 0
        if decision.status in (SUCCESS, PARTIAL):
            done = release.current_batch
        if done:
            log.info("%s: batch %d done", release, done, extra=about(release, actor=actor, event="batch_done"))
        if decision.status in TERMINAL:
            # a copy of the head where nobody who writes to the database can change it
            trail.info("%s: the audit log is at %d:%s", release, *(head or self._audit.head()), extra=about(release))
            self._observe("releasectl_release_duration_seconds", release.started_at, self._state.now(), decision.status)
        if decision.status != release.status:
            log.log(logging.INFO if decision.status == SUCCESS else logging.WARNING, "%s: %s, %s", release,
                    decision.status, decision.status_reason,
                    extra=about(release, actor=actor, event=RELEASE_EVENTS[decision.status]))

    def _observe(self, name: str, began: str | None, ended: str | None, status: str) -> None:
        """Count a duration, unless a time is missing: a release that never started, a row that was written by hand."""
        with contextlib.suppress(ValueError):
            if began and ended:
                self._database.metrics.observe(name, max(0.0, epoch_of(ended) - epoch_of(began)), status)

    def overtaker(self, tx: Transaction, release: Release) -> str:
        """Return the release with a higher version that started before a pending one: 'release 9 (v9)', "" for none.

        One of its target, or one that a node of it was sent. A row that a person wrote keeps a version that was too low
        from the beginning: its nodes have a higher one already.
        """
        since = release.created_at if not release.tag else ""
        # the index of the unique version; mostly no version is higher
        if not tx.value("SELECT COUNT(*) FROM release_tasks WHERE version > ? AND started_at >= ?",
                        release.version, since):
            return ""
        # the indexes nodes_by_address and that of the unique version
        row = tx.row("""
            SELECT r.id, r.version
            FROM release_tasks r
            WHERE r.version > ? AND r.started_at >= ? AND (r.target = ? OR r.version IN (
                SELECT a.last_version
                FROM release_task_nodes n
                JOIN nodes h ON h.id = n.node_id
                JOIN nodes a ON a.main_ip = h.main_ip AND a.agent_port = h.agent_port
                WHERE n.release_task_id = ? AND a.last_version > ?))
            ORDER BY r.version
            LIMIT 1""", release.version, since, release.target, release.id, release.version)
        return "release {} (v{})".format(*row) if row else ""

    def end_cancelled(self, tx: Transaction, release: Release, nodes: NodeIndex, now: Moment, actor: Who,
                      detail: str, why: str = "") -> None:
        """End a release that is cancelling at once; its nodes in flight are abandoned. why: of its status_reason."""
        changes = force_end(nodes, now)
        decision = decide(Situation(release, nodes, now, strategy=strategy_of(release.strategy)))
        reason = one_line(": ".join(filter(None, (why, decision.status_reason))))
        write_nodes(tx, release.id, changes, now)
        self.write_decision(tx, release, decision._replace(changes=tuple(changes), status_reason=reason), now, actor,
                            detail=detail)

    def end_unstarted(self, tx: Transaction, release: Release, actor: Who, why: str) -> None:
        """Cancel a release, nothing of which was sent."""
        nodes, now = NodeIndex(read_release_nodes(tx, release.id)), self._state.moment()
        change_status(tx, release, nodes, VERBS["cancel"], now, actor, why)
        self.end_cancelled(tx, read_release(tx, release.id), nodes, now, actor, why, why)

    def _addresses(self, tx: Transaction) -> Addresses:
        """Return a function that gives the addresses of an open release.

        It reads the nodes of a release once: with fifty of ten thousand, each scan would read half a million rows.
        """
        bit_of: dict[int, int] = {}
        generation = self._state.generation
        if not self._has_room(len(self._bits) // 8 + 1):
            self._forget_ended(tx, generation)

        def mask(c: Candidate) -> int:
            key = generation, c.id, c.version
            known = self._masks.get(key) if c.tag else None
            if known is None:
                bit_of.update(() if bit_of else self._bit_of(tx).items())
                # as one text: ten thousand rows would take five times as long
                text = tx.value(f"SELECT {self._database.engine.joined_sql} FROM release_task_nodes "
                                "WHERE release_task_id = ?", c.id)
                bits = bytearray(len(self._bits) // 8 + 1)
                for bit in {bit_of[int(node_id)] for node_id in text.split(",")} if text else ():
                    bits[bit >> 3] |= 1 << (bit & 7)
                known = int.from_bytes(bits, "little")
                if self._has_room(len(bits)):
                    self._masks[key] = known
            return known

        return mask

    def _has_room(self, size: int) -> bool:
        """Return whether the addresses of one more release, so many bytes, are kept."""
        return (len(self._masks) + 1) * size <= MAX_MASK_BYTES

    def _forget_ended(self, tx: Transaction, generation: int) -> None:
        """Forget the addresses of releases that have ended: those that are open are read in each scan."""
        are_open = {row[0] for row in tx.rows(f"SELECT id FROM release_tasks WHERE status IN {OPEN_RELEASES}")}
        for key in list(self._masks):
            if key[0] != generation or key[1] not in are_open:
                self._masks.pop(key, None)

    def _bit_of(self, tx: Transaction) -> dict[int, int]:
        """Return by node the number of its address's bit."""
        rows = tx.rows("SELECT id, main_ip, agent_port FROM nodes")
        with self._masks_guard:
            return {node_id: self._bits.setdefault(endpoint_of(main_ip, port), len(self._bits))
                    for node_id, main_ip, port in rows}


# endregion


# region Retry and rollback
# ======================================================================================
# Retry and rollback: what a new release brings back to whom (contract 3, rule 10).
# Uses: Vocabulary, Helpers, Payloads, Model, Freezes, Strategy, Selection, Plan,
#   Failures, Verbs, Database, Audit, Nodes, Queue.
# ======================================================================================

class Again(NamedTuple):
    """What a person asks of a retry or rollback."""
    reason: str = ""
    # Also where a node has a newer success of the target.
    over_newer: bool = False
    # Release whose payload a rollback brings back.
    to_release: int | None = None
    # A rollback goes first, and cancels the releases of the target that have not started.
    supersede: bool = False
    # A freeze does not hold the rollback.
    during_freeze: bool = False
    # Whom a retry is for, of the failed and skipped nodes: failed ones of these error kinds, ids, those of these words.
    kinds: Sequence[str] = ()
    node_ids: Sequence[int] = ()
    words: NodeWords = NodeWords()
    # It goes without an approval.
    is_emergency: bool = False


class NotAgain(AppError):
    """A retry or rollback that is refused also the next time, unless somebody does what mend says."""

    def __init__(self, cause: str, mend: str):
        super().__init__(WRONG_STATE, f"{cause}; {mend}")
        self.cause = cause
        self.mend = mend


def emptied_nodes(payload: Mapping[str, Any], nodes: Iterable[Node]) -> list[str]:
    """Return the names of execute nodes that a payload leaves without a site."""
    return [node.name for node in nodes if node.dialect.needs_websites and payload.get(WEBSITES) == []]


def plan_again(tx: Transaction, verb: str, release_id: int, wish: Again) -> tuple[ReleaseRequest, Plan, list[Node]]:
    """Return what a retry or rollback creates, its plan, and its nodes; raise AppError where it is refused."""
    old = read_release(tx, release_id)
    if verb == "rollback" and not old.is_terminal:
        raise AppError(WRONG_STATE, _not_to_roll_back_yet(tx, old))
    check_verb(verb, old)
    if wish.during_freeze and not wish.reason:
        raise AppError(MISSING, "reason is missing: say why it can't wait for the end of the freeze")
    check_emergency(wish.is_emergency, wish.reason)
    return _plan_ended(tx, verb, old, wish)


def _not_to_roll_back_yet(tx: Transaction, old: Release) -> str:
    """Return why an open release can't be rolled back, and what would do: it is asked for at night, by `latest`."""
    is_now = f"release {old.id} is {old.status}"
    if old.started_at:
        verb = "watch" if old.status == CANCELLING else "cancel"
        return f"{is_now}; a release is rolled back after its end: releasectl {verb} {old.id}"
    went_out = tx.value("SELECT id FROM release_tasks WHERE target = ? AND started_at IS NOT NULL "
                        "ORDER BY version DESC LIMIT 1", old.target)
    return f"{is_now} and changed no node" + (
        f"; the newest of target {old.target} that went out is release {went_out}: releasectl rollback {went_out}"
        if went_out else f": releasectl cancel {old.id}")


def automatic_rollback(tx: Transaction, old: Release) -> tuple[ReleaseRequest, Plan, list[Node]]:
    """Return the rollback of a release that ends by onExceed, and whose nodes are at rest; raise AppError as above."""
    request, plan, nodes = _plan_ended(tx, "rollback", old, Again())
    return request._replace(reason=f"automatic {request.reason}", goes_first=True,
                            approval=AUTOMATIC), plan, nodes


class Sequel(NamedTuple):
    """The rollback of a release that ends now, with the id that it gets."""
    release_id: int
    request: ReleaseRequest
    plan: Plan
    nodes: Sequence[Node]


def rollback_text(release_id: int, left_out: Sequence[LeftOut], freeze: Freeze) -> str:
    """Return 'release 9 rolls it back once the freeze is lifted, without edge-3 (offline)'."""
    by_reason: dict[str, list[str]] = {}
    for one in left_out:
        by_reason.setdefault(one.why, []).append(one.name)
    without = ", ".join(f"{in_words(names, 2)} ({why})" for why, names in by_reason.items())
    return (f"release {release_id} rolls it back" + (" once the freeze is lifted" if freeze.frozen else "")
            + (f", without {without}" if without else ""))


def _plan_ended(tx: Transaction, verb: str, old: Release, wish: Again) -> tuple[ReleaseRequest, Plan, list[Node]]:
    request, plan, nodes = (plan_retry if verb == "retry" else plan_rollback)(tx, old, wish)
    if not wish.over_newer:
        refuse_over_newer(tx, verb, old, nodes)
    refuse_twins(nodes)
    request = request._replace(is_emergency=wish.is_emergency)
    return request, plan._replace(emptied=emptied_nodes(request.payload, nodes)), nodes


def plan_retry(tx: Transaction, old: Release, wish: Again) -> tuple[ReleaseRequest, Plan, list[Node]]:
    tried = nodes_again(tx, old, "n.status IN ('failed', 'skipped')")
    found = chosen_again(tx, old, tried, wish)
    gone = _no_longer_taken(old, found)
    gone_ids = {one.node_id for one in gone}
    nodes = online_nodes(old, [node for node in found if node.id not in gone_ids], "failed or skipped")
    strategy = strategy_again(old, ("startAt",))
    batches = _batches_before(tx, old, nodes) if _brings_back(tx, old) else None
    if batches:
        strategy["batches"] = _sizes_of(batches)
    if isinstance(strategy.get("pauseAfter"), list):
        # there may be fewer batches than in the old release
        last = len(batches or batches_of(parse_strategy(strategy), nodes))
        strategy["pauseAfter"] = [number for number in strategy["pauseAfter"] if number <= last]
    request = ReleaseRequest(old.target, wish.reason or f"retry of release {old.id}", payload_again(old, nodes),
                             retry_of=old.id, strategy=strategy,
                             # who asked for it asked for this payload, without the setting too
                             approval=WANTED if old.approval in (WANTED, GIVEN) else "",
                             during_freeze=bool(old.during_freeze))
    left_out = [one for one in left_out_nodes(found) if one.node_id not in gone_ids]
    plan = make_plan(parse_strategy(strategy), nodes, [*gone, *left_out], batches)
    passes = [f"goes out in a freeze too, as release {old.id} may"] if old.during_freeze else []
    return request, plan._replace(
        payload_of=(old.id, old.version), selection=selection_again(old), not_chosen=len(tried) - len(found),
        warnings=[*plan.warnings, *passes]), nodes


def _no_longer_taken(old: Release, nodes: Iterable[Node]) -> list[LeftOut]:
    """Return those of the nodes that the selection of a release does not take any more: they have other labels now."""
    selection = selection_of(old.selection) or Selection()
    return [LeftOut(node.id, node.name, EXCLUDED if selection.excludes(node) else
                    f"no longer selected ({choice_text(selection.labels, {})})")
            for node in nodes if not selection.takes(node)]


def _brings_back(tx: Transaction, release: Release) -> bool:
    """Return whether a release is a rollback, or a retry of one: its strategy does not tell who is in which batch."""
    rollback_of, retry_of = release.rollback_of, release.retry_of
    while rollback_of is None and retry_of is not None:
        rollback_of, retry_of = tx.row("SELECT rollback_of, retry_of FROM release_tasks WHERE id = ?", retry_of) or (
            None, None)
    return rollback_of is not None


def _batches_before(tx: Transaction, old: Release, nodes: Iterable[Node]) -> list[list[int]]:
    """Return the nodes by the batch that they had in a release; no batch is empty."""
    batch_of = dict(tx.rows("SELECT node_id, batch FROM release_task_nodes WHERE release_task_id = ?", old.id))
    batches: dict[int, list[int]] = {}
    for node in sorted(nodes, key=lambda node: (batch_of[node.id], node.id)):
        batches.setdefault(batch_of[node.id], []).append(node.id)
    return [*batches.values()]


def _sizes_of(batches: Sequence[Sequence[int]]) -> list[int]:
    """Return the sizes of batches as a strategy has them; it may have fewer than a release."""
    return ([len(batch) for batch in batches[:-1]] or [len(batches[0])])[:MAX_BATCHES]


def chosen_again(tx: Transaction, old: Release, tried: Sequence[Node], wish: Again) -> list[Node]:
    """Return those of the failed and skipped nodes that somebody chose; raise AppError(INVALID) naming what fits none.

    A node has to fit all of kinds, node_ids and words; a skipped one has no kind.
    """
    kinds = dict(tx.rows("SELECT node_id, error_kind FROM release_task_nodes "
                         "WHERE release_task_id = ? AND status = 'failed'", old.id)) if wish.kinds else {}
    refuse_unknown_names(wish.words.excluded_names, all_nodes(tx) if wish.words.excluded_names else ())
    there_is = f"kinds: {kinds_text(kinds.values()) or 'none'}"
    for kind in wish.kinds:
        if kind not in kinds.values():
            raise AppError(INVALID, f"no node failed as {kind}; {there_is}")
    names, ids = [node.name for node in tried], {node.id for node in tried}
    wrong = [name for name in wish.words.names if not any(map(names_fit((name,)), names))]
    wrong += [str(tx.value("SELECT name FROM nodes WHERE id = ?", number) or number)
              for number in wish.node_ids if number not in ids]
    if wrong:
        raise AppError(INVALID, f"node {one_line(wrong[0], 100)} was neither failed nor skipped in release {old.id}; "
                                f"failed or skipped: {in_words(names) or 'none'}")
    of_words = list(filter(wish.words.takes, tried))
    if tried and not of_words:
        raise AppError(INVALID, f"{wish.words.why_none(tried)}, of those that failed or were skipped")
    chosen = [node for node in of_words if (not wish.kinds or kinds.get(node.id) in wish.kinds)
              and (not wish.node_ids or node.id in wish.node_ids)]
    if tried and not chosen:
        raise AppError(INVALID, f"none of these nodes failed as {' or '.join(wish.kinds)}; {there_is}")
    return chosen


def payload_again(release: Release, nodes: Sequence[Node]) -> dict[str, Any]:
    """Return the payload of a release, to be sent to nodes again; raise AppError(WRONG_STATE) where it can't be."""
    payload = stored_payload(release)
    refuse_dropping_sites(payload, nodes, WRONG_STATE, f"the payload of release {release.id}")
    return payload


def _another_payload(old: Release) -> str:
    return f"create a release that is good, or name one: toRelease (releasectl rollback {old.id} --to ID)"


def selection_again(release: Release) -> Mapping[str, Any]:
    """Return for whom a release is that brings the payload of another one: for the same nodes."""
    readable = selection_of(release.selection) is not None
    return dict(parse_json(release.selection)) if readable else {"nodesOf": release.id}


def plan_rollback(tx: Transaction, old: Release, wish: Again) -> tuple[ReleaseRequest, Plan, list[Node]]:
    # a node that was rejected, or silent in the preflight, before anything was sent has nothing to roll back
    found = nodes_again(tx, old, "(n.status = 'success' OR (n.status = 'failed' AND NOT "
                                 "(n.attempts = 0 AND n.error_kind <> '')))")
    if not found:
        raise AppError(WRONG_STATE, f"nothing to roll back: release {old.id} changed no node")
    nodes = online_nodes(old, found, "touched by it")
    failed_ids = {row[0] for row in tx.rows("SELECT node_id FROM release_task_nodes "
                                            "WHERE release_task_id = ? AND status = 'failed'", old.id)}
    failed = [node.id for node in nodes if node.id in failed_ids]
    good = payload_to_bring_back(tx, old, [node.id for node in nodes], wish.to_release)
    try:
        payload = payload_again(good, nodes)
    except AppError as error:
        raise NotAgain(error.message, _another_payload(old)) from None
    planned = [*_batches_before(tx, old, [node for node in nodes if node.id not in failed_ids]),
               *([failed] if failed else [])]
    # make_plan() goes by planned: a hand-written release may have more batches than a strategy can
    strategy = {**strategy_again(old, ("startAt", "soakSec", "pauseAfter", "verify", "first", "batchBy", "preflight")),
                "batches": _sizes_of(planned)}
    if strategy.get("onExceed") == ROLLBACK:  # a rollback never rolls back
        del strategy["onExceed"]
    with contextlib.suppress(AppError):  # the probes fit the payload that goes out
        strategy.update({key: value for key, value in strategy_again(good, ()).items() if key == "verify"})
    request = ReleaseRequest(
        old.target, wish.reason or f"rollback of release {old.id} to the payload of version {good.version}",
        payload, rollback_of=old.id, strategy=strategy, supersede=wish.supersede,
        goes_first=wish.supersede, during_freeze=wish.during_freeze,
        # as in plan_retry(); what a rollback finds by itself has succeeded since it was approved
        approval=WANTED if wish.to_release is not None and good.approval in (WANTED, GIVEN) else "")
    plan = make_plan(parse_strategy(strategy), nodes, left_out_nodes(found), planned, frozenset(failed))
    untried = [] if succeeded_nodes(tx, good.id) else [
        f"release {good.id} (v{good.version}) " + ("succeeded on no node" if good.started_at else "never went out")]
    return request, plan._replace(warnings=[*plan.warnings, *untried], payload_of=(good.id, good.version),
                                  selection={"nodeIds": [node.id for node in found]}), nodes


def approval_for(tx: Transaction, request: ReleaseRequest) -> str:
    """Return what a new release begins with: "" or one of APPROVAL_STATES."""
    needed = request.approval or (WANTED if tx.database.approvals else "")
    # an executor with the setting would ask for the approval that this process does not
    return EMERGENCY if request.is_emergency and (needed or approvals_in_force(tx)) else needed


def queue_effect(tx: Transaction, request: ReleaseRequest) -> tuple[list[Superseded], list[str]]:
    """Return the releases that a new one cancels, and warnings: of these, of what holds it, of what it does again.

    A freeze holds a rollback, too: the warning says what would do. Raise AppError(WRONG_STATE) where it would cancel
    others before somebody has approved it: that might be never.
    """
    approval = approval_for(tx, request)
    if request.supersede and approval == WANTED:
        same = "--supersede" if request.rollback_of is None else "--now"
        raise AppError(WRONG_STATE, "what needs an approval cancels no other release before it has one: leave out "
                                    f"supersede ({same}) and cancel those yourself, or take emergency (--emergency "
                                    "--reason TEXT)")
    others = sorted((c for c in read_candidates(tx) if c.target == request.target), key=lambda c: c.version)
    unstarted = [Superseded(c.id, c.version) for c in others if c.status in (PENDING, PAUSED) and not c.has_started]
    superseded = unstarted if request.supersede else []
    warnings = [f"waits for release {c.id} (v{c.version}), {state_of(c)}: releasectl cancel {c.id}" for c in others
                if c.has_started and (request.supersede or request.rollback_of is not None)]
    if request.rollback_of is not None and not request.supersede and not request.goes_first and unstarted:
        warnings.append(f"goes behind {in_words(unstarted, 1)}: supersede (--now) cancels "
                        f"{'it' if len(unstarted) == 1 else 'them'} and goes first")
    freeze = read_freezes(tx).of(request)
    if request.rollback_of is not None and freeze.frozen:
        warnings.append(f"{freeze.line()}: it waits; duringFreeze (--during-freeze) goes out all the same")
    for release_id, of_id in tx.rows(f"SELECT id, rollback_of FROM release_tasks WHERE rollback_of IS NOT NULL "
                                     f"AND status IN {OPEN_RELEASES} ORDER BY id"):
        if any(one.release_id == release_id for one in superseded):
            warnings.append(f"cancels release {release_id}, which is to roll back release {of_id}")
        elif of_id == request.rollback_of:
            warnings.append(f"release {release_id} rolls back release {of_id} already: releasectl why {release_id}")
    if request.is_emergency and approval != EMERGENCY:
        warnings.append("nothing asks for an approval here (APPROVALS is 0): emergency changes nothing")
    return superseded, warnings


def nodes_again(tx: Transaction, old: Release, where: str = "1 = 1") -> list[Node]:
    """Return the nodes of a release as they are now, by id; where: a condition on its rows n that narrows them."""
    return [Node(*row) for row in tx.rows(f"""
        SELECT {NODE_COLUMNS}
        FROM nodes
        WHERE id IN (SELECT n.node_id FROM release_task_nodes n WHERE n.release_task_id = ? AND {where})
        ORDER BY id""", old.id)]


def online_nodes(old: Release, found: Sequence[Node], what: str) -> list[Node]:
    nodes = [node for node in found if node.gets_releases]
    if not nodes:
        raise AppError(WRONG_STATE, f"release {old.id} has no online nodes that were {what}")
    return nodes


def refuse_over_newer(tx: Transaction, verb: str, old: Release, nodes: Sequence[Node]) -> None:
    """Raise AppError 3003 where one of the nodes has a newer success of the target (rule 10)."""
    newer = newer_success(tx, old, nodes)
    if newer:
        raise NotAgain(f"{newer}: {verb} of release {old.id} would replace its payload",
                       "overNewer (--over-newer) if that is meant")


def newer_success(tx: Transaction, release: Release, nodes: Sequence[Node]) -> str:
    """Return 'release 9 (v9) succeeded later on edge-1' of one of its target with a higher version, "" for none."""
    names = {node.id: node.name for node in nodes}
    for release_id, version in tx.rows("""
            SELECT id, version
            FROM release_tasks
            WHERE target = ? AND version > ?
            ORDER BY version DESC""", release.target, release.version):
        over = [names[node_id] for node_id in sorted(succeeded_nodes(tx, release_id) & names.keys())]
        if over:
            return f"release {release_id} (v{version}) succeeded later on {names_of(over)}"
    return ""


def payload_to_bring_back(tx: Transaction, old: Release, node_ids: Sequence[int], to_release: int | None) -> Release:
    """Return the release whose payload a rollback brings back (rule 10).

    Each node votes for the newest release before it that succeeded there, with another payload, and that nobody
    rolled back. The payload with most votes wins; of two with as many, the newer one.
    """
    unwanted = stored_digest(tx, old.id)
    if to_release is not None:
        good = find_release(tx, to_release)
        if good is None or good.target != old.target:
            raise AppError(INVALID, f"toRelease (--to): there is no release {to_release} of target {old.target}")
        if stored_digest(tx, good.id) == unwanted:
            raise AppError(WRONG_STATE, f"release {to_release} has the same payload as release {old.id}: "
                                        "it changes nothing")
        return good
    bad = rolled_back(tx, old.target)
    missing, votes, no_good = set(node_ids), collections.Counter[str](), list[str]()
    newest: dict[str, tuple[int, int]] = {}
    for release_id, version in tx.rows("""
            SELECT id, version
            FROM release_tasks
            WHERE target = ? AND version < ?
            ORDER BY version DESC""", old.target, old.version):
        found = succeeded_nodes(tx, release_id) & missing
        digest = stored_digest(tx, release_id) if found else unwanted
        if digest != unwanted and version > bad.get(digest, 0):
            votes[digest] += len(found)
            newest.setdefault(digest, (version, release_id))
            missing -= found
        elif found:
            what = "the same payload" if digest == unwanted else "rolled back"
            no_good.append(f"release {release_id} (v{version}, {what})")
        if not missing:
            break
    if not votes:
        why = f"no release of target {old.target} before {old.id} succeeded on any of its nodes"
        if no_good:
            why = f"before release {old.id} its nodes had nothing of target {old.target} but " + in_words(
                no_good, 2, " and ")
        raise NotAgain(f"nothing to roll back to: {why}", _another_payload(old))
    return read_release(tx, newest[max(votes, key=lambda digest: (votes[digest], newest[digest]))][1])


def unwanted_releases(tx: Transaction, where: str = "1 = 1") -> dict[int, tuple[str, int]]:
    """Return by id, with target and version, each release that was rolled back or brought the payload of one again.

    where: a condition on the rollbacks that narrows them.
    """
    # the indexes release_tasks_by_rollback_of, release_tasks_by_retry_of and release_tasks_by_catch_up_of
    return {release_id: (target, version) for release_id, target, version in tx.rows(f"""
        WITH RECURSIVE unwanted (id) AS (
            SELECT rollback_of
            FROM release_tasks
            WHERE rollback_of IS NOT NULL AND {where}
            UNION
            SELECT r.id
            FROM unwanted u
            JOIN release_tasks r ON r.retry_of = u.id OR r.catch_up_of = u.id)
        SELECT r.id, r.target, r.version
        FROM unwanted u
        JOIN release_tasks r ON r.id = u.id""")}


def rolled_back(tx: Transaction, target: str) -> dict[str, int]:
    """Return the payloads of a target that somebody rolled back, each with the highest version rolled back.

    A release with the payload up to that version is bad too; above it somebody wanted the payload again.
    """
    bad: dict[str, int] = {}
    for release_id, (of_target, version) in unwanted_releases(tx).items():
        if of_target == target:
            digest = stored_digest(tx, release_id)
            bad[digest] = max(bad.get(digest, 0), version)
    return bad


def stored_digest(tx: Transaction, release_id: int) -> str:
    """Return the digest of what a release sent, which is in its row, or would send; a payload may be large.

    For one that can't be read a text that no other release has.
    """
    digest, text = tx.row("SELECT payload_sha256, CASE WHEN payload_sha256 = '' OR started_at IS NULL THEN payload END "
                          "FROM release_tasks WHERE id = ?", release_id) or ("", "")
    return (digest if text is None else digest_of_stored(text)) or f"release {release_id}"


def stored_payload(release: Release) -> dict[str, Any]:
    """Return the payload of a release as it went out, or would; raise AppError(WRONG_STATE) where nobody knows it."""
    try:
        return release.read_payload()
    except (ValueError, AppError) as error:
        raise AppError(WRONG_STATE, f"the payload of release {release.id} can't be used: {one_line(error)}") from None


def release_before(tx: Transaction, release: Release) -> Release:
    """Return the newest release of the target before one that succeeded; raise AppError(NOT_FOUND)."""
    row = tx.row(f"""
        SELECT {RELEASE_COLUMNS}
        FROM release_tasks r
        WHERE r.target = ? AND r.version < ? AND r.status = 'success'
        ORDER BY r.version DESC
        LIMIT 1""", release.target, release.version)
    if row is None:
        raise AppError(NOT_FOUND, f"no release of target {release.target} before release {release.id} succeeded: "
                                  "name the one to compare it with")
    return Release(*row)


def strategy_again(release: Release, without: Sequence[str]) -> dict[str, Any]:
    """Return the strategy of an old release for a new one, without some keys; raise AppError 3003."""
    try:
        strategy = parse_json(release.strategy)
        parse_strategy(strategy)
    except (ValueError, AppError) as error:
        raise AppError(WRONG_STATE, f"the strategy of release {release.id} can't be used: {one_line(error)}") from None
    return {key: value for key, value in strategy.items() if key not in without}


# endregion


# region Drift
# ======================================================================================
# Drift: what each node runs, what it should run, and how far these are apart (contract
#   section 5).
# Uses: Vocabulary, Helpers, Payloads, Difference, Model, Strategy, Selection, Plan,
#   Decision, Verdict, Database, Database state, Nodes, Queue, Retry and rollback.
#
#   Nothing of it is stored: the rows of release_task_nodes tell it, whoever wrote them,
#   and an index finds the newest success of a node at once. A later try is looked at only
#   where last_version says that there was one.
# ======================================================================================

class Ran(NamedTuple):
    """A release that a node runs or should run, with its status, and since when."""
    release_id: int
    version: int
    payload_sha256: str
    status: str
    # Version of the release whose payload a retry or catch-up brings again; else its own. It tells which is newer.
    rank: int
    since: str | None = None

    @property
    def label(self) -> tuple[int, int]:
        """Return its id and version."""
        return self.release_id, self.version


class Level(NamedTuple):
    """What a node runs and should run."""
    # The newest release that succeeded on it.
    runs: Ran | None = None
    # What its agent took last: the same, or a later release that failed its probe there.
    has: Ran | None = None
    # The newest release that is for the node as it is now.
    wants: Ran | None = None
    # A later try may have changed the node, or it has another address since.
    is_unknown: bool = False
    # Ids of the releases whose tries since then tell it.
    tries: tuple[int, ...] = ()
    # Since when it is_unknown, None where that is not known.
    unknown_since: str | None = None

    @property
    def needs(self) -> set[int]:
        """Return the ids of the releases without which it could not be told."""
        return {*self.tries, *(ran.release_id for ran in (self.runs, self.has, self.wants) if ran)}

    @property
    def drift(self) -> str:
        """Return one of DRIFTS. A release under way is no drift: what it left counts when it has ended."""
        has, wants = self.has, self.wants
        if self.is_unknown:
            return UNSURE
        if has and wants and (has.release_id == wants.release_id or has.payload_sha256 == wants.payload_sha256):
            return LEVEL
        if wants and (has is None or has.rank < wants.rank):
            return BEHIND
        return AHEAD if has and has.status in TERMINAL else LEVEL

    @property
    def drift_since(self) -> str | None:
        """Return since when it is as `drift` says: the release ended that it should run, or that left what it has."""
        if self.is_unknown:
            return self.unknown_since
        ran = {BEHIND: self.wants, AHEAD: self.has}.get(self.drift)
        return ran and ran.since


class _Try(NamedTuple):
    """An end of a node other than success, or its being in flight."""
    node_id: int
    release_id: int
    version: int
    status: str
    error_kind: str
    error_msg: str
    reached: int
    finished_at: str | None

    @property
    def is_open(self) -> bool:
        """Return whether it ended so that nobody knows what the node runs."""
        if self.error_kind not in BELIEVED_KINDS:
            return self.status == FAILED and bool(self.reached)
        return self.error_msg.startswith(ALREADY_AT) or RELOAD_FAILED in self.error_msg


class _Success(NamedTuple):
    """A success of a node, at the address that it had."""
    node_id: int
    release_id: int
    since: str | None
    main_ip: str
    agent_port: int


_SUCCESS_COLUMNS = f"n.node_id, n.release_task_id, n.finished_at, {ADDRESS_THEN}"


def levels(tx: Transaction, nodes: Sequence[Node]) -> dict[int, Level]:
    """Return by id what nodes run and should run."""
    return _what_they_have(tx, nodes, _what_they_want(tx, nodes))


def _what_they_have(tx: Transaction, nodes: Sequence[Node], wants: Mapping[int, Ran] = {}) -> dict[  # noqa: B006
        int, Level]:
    by_id = {node.id: node for node in nodes}
    # the index release_task_nodes_succeeded
    found = {row[0]: _Success(*row) for row in rows_of_nodes(tx, f"""
        SELECT {_SUCCESS_COLUMNS}
        FROM nodes h
        JOIN release_task_nodes n ON n.node_id = h.id AND n.release_task_id =
             (SELECT MAX(m.release_task_id) FROM release_task_nodes m WHERE m.node_id = h.id AND m.status = 'success')
        WHERE h.id IN ({{marks}})""", list(by_id))}
    ran = _releases_by_id(tx, {success.release_id for success in found.values()})
    later = {node.id for node in nodes
             if node.last_version > (ran[found[node.id].release_id].version if node.id in found else 0)}
    found.update(_out_of_turn(tx, {id_: found[id_] for id_ in later & found.keys()}, ran))
    tries = _tries(tx, later)
    ran.update(_releases_by_id(tx, {one.release_id for some in tries.values() for one in some
                                    if one.error_kind == VERIFY} - ran.keys()))
    unsure_version, unsure_at = tx.row("SELECT unsure_version, unsure_at FROM database_state WHERE id = 1") or (0, "")
    sent = _sent_to_twins(tx, list(by_id))
    levels_of: dict[int, Level] = {}
    for node in nodes:
        success = found.get(node.id)
        runs = Ran(*ran[success.release_id][:-1], success.since) if success else None
        other_version = max(sent.get(node.id, 0), unsure_version if node.created_at <= unsure_at else 0)
        if success and (success.main_ip, success.agent_port) != (node.main_ip, node.agent_port) and endpoint_of(
                success.main_ip, success.agent_port) != node.endpoint:
            level = Level(wants=wants.get(node.id), is_unknown=True, unknown_since=node.updated_at)
        elif node.id in later or other_version:
            level = _level_of(node, runs, wants.get(node.id), tries.get(node.id, []), other_version, ran)
            if level.is_unknown and level.unknown_since is None and unsure_version and node.created_at <= unsure_at:
                level = level._replace(unknown_since=unsure_at)
        else:
            level = Level(runs, runs, wants.get(node.id))
        levels_of[node.id] = level
    return levels_of


def _level_of(node: Node, runs: Ran | None, wants: Ran | None, tries: Sequence[_Try], other_version: int,
              ran: Mapping[int, Ran]) -> Level:
    """Return what a node runs; other_version: the highest that it may have got in a way that its rows don't tell."""
    version = runs.version if runs else 0
    taken = max((one for one in tries if one.error_kind == VERIFY and one.version > version),
                key=lambda one: one.version, default=None)
    has = ran[taken.release_id]._replace(since=taken.finished_at) if taken else runs
    version = has.version if has else 0
    since = [one for one in sorted(tries, key=lambda one: one.version) if one.version > version]
    unclear = [one for one in since if one.is_open]
    told = since[-1].version if since else version
    return Level(runs, has, wants, is_unknown=bool(unclear) or node.last_version > told or other_version > version,
                 tries=tuple(one.release_id for some in (since, unclear) for one in some[-1:]),
                 unknown_since=unclear[-1].finished_at if unclear else None)


def _releases_by_id(tx: Transaction, release_ids: Set[int]) -> dict[int, Ran]:
    """Return releases by id, each since its end."""
    rows = rows_of_nodes(tx, "SELECT id, version, CASE WHEN started_at IS NOT NULL THEN payload_sha256 ELSE '' END, "
                             "status, finished_at, COALESCE(retry_of, catch_up_of) "
                             "FROM release_tasks WHERE id IN ({marks})", list(release_ids))
    ranks: dict[int, int] = {}
    return {id_: Ran(id_, version, digest or stored_digest(tx, id_), status, _rank(tx, up, id_, version, ranks), ended)
            for id_, version, digest, status, ended, up in rows}


def _rank(tx: Transaction, up: int | None, release_id: int, version: int, ranks: dict[int, int]) -> int:
    """Return the version of the first release whose payload this one brings again; up: the one before it.

    ranks: those that are known, by id; they become more.
    """
    path = [release_id]
    while up is not None and up not in ranks and up not in path:
        path.append(up)
        up, version = tx.row("SELECT COALESCE(retry_of, catch_up_of), version FROM release_tasks WHERE id = ?",
                             up) or (None, version)
    rank = version if up is None else ranks.get(up, version)
    ranks.update(dict.fromkeys(path, rank))
    return rank


def _out_of_turn(tx: Transaction, found: Mapping[int, _Success], ran: dict[int, Ran]) -> dict[int, _Success]:
    """Return the newer successes of nodes whose release has a lower id than the newest one by id: it started later."""
    late: dict[int, _Success] = {}
    known = {ran[success.release_id].label for success in found.values()}
    if not known:
        return late
    # the unique index of version
    for release_id, version in tx.rows("SELECT id, version FROM release_tasks WHERE version > ? AND id < ? "
                                       "ORDER BY version", min(v for _, v in known), max(id_ for id_, _ in known)):
        if any(release_id < id_ and version > v for id_, v in known):
            ran.update(_releases_by_id(tx, {release_id} - ran.keys()))
            late.update((row[0], _Success(*row)) for row in tx.rows(f"""
                SELECT {_SUCCESS_COLUMNS}
                FROM release_task_nodes n
                JOIN nodes h ON h.id = n.node_id
                WHERE n.release_task_id = ? AND n.status = 'success'""", release_id)
                if row[0] in found and ran[found[row[0]].release_id].version < version)
    return late


def _tries(tx: Transaction, node_ids: Set[int]) -> dict[int, list[_Try]]:
    """Return the tries of nodes that did not succeed, by node; those of which nothing was sent are left out."""
    tries: dict[int, list[_Try]] = {}
    # the indexes release_task_nodes_failed and release_task_nodes_one_running
    for status in (FAILED, RUNNING):
        for row in rows_of_nodes(tx, f"""
                SELECT n.node_id, n.release_task_id, r.version, n.status, n.error_kind, n.error_msg, n.reached,
                       n.finished_at
                FROM release_task_nodes n
                JOIN release_tasks r ON r.id = n.release_task_id
                WHERE n.status = '{status}' AND n.attempts > 0 AND n.node_id IN ({{marks}})""", list(node_ids)):
            tries.setdefault(row[0], []).append(_Try(*row))
    return tries


def _sent_to_twins(tx: Transaction, node_ids: Sequence[int]) -> dict[int, int]:
    """Return the highest version sent to other nodes of the same address: a host that was registered again."""
    return dict(rows_of_nodes(tx, """
        SELECT h.id, MAX(a.last_version)
        FROM nodes h
        JOIN nodes a ON a.main_ip = h.main_ip AND a.agent_port = h.agent_port AND a.id <> h.id
        WHERE h.id IN ({marks})
        GROUP BY h.id""", node_ids))  # the index nodes_by_address


class _Offer(NamedTuple):
    """A release that ended well, and for whom it is."""
    rank: int
    version: int
    release_id: int
    selection: Selection


# Releases read in one statement, newest first, in search of those that are for some nodes: first few, then many.
_FIRST_OFFERS, _MORE_OFFERS = 10, 300


def _offers(tx: Transaction) -> Iterator[list[_Offer]]:
    """Yield the releases that ended success or partial and that nobody rolled back, highest rank first, in parts.

    After a rollback that was cancelled before any node had it, nodes should still run what they do; only a later
    rollback does not bring back what somebody found bad enough to begin one.
    """
    unwanted = unwanted_releases(tx, "NOT (status = 'cancelled' AND success_nodes = 0)")
    ranks: dict[int, int] = {}
    # those that bring an older payload again, until it is the turn of that
    later: list[_Offer] = []
    below, limit = MAX_VERSION + 1, _FIRST_OFFERS
    while below:
        # the unique index of version
        rows = tx.rows("""
            SELECT id, version, COALESCE(retry_of, catch_up_of), selection
            FROM release_tasks
            WHERE version < ? AND status IN ('success', 'partial')
            ORDER BY version DESC
            LIMIT ?""", below, limit)
        below, limit = rows[-1][1] if len(rows) == limit else 0, _MORE_OFFERS
        for release_id, version, up, text in rows:
            rank, selection = _rank(tx, up, release_id, version, ranks), selection_of(text)
            if selection and release_id not in unwanted:
                later.append(_Offer(rank, version, release_id, selection))
        later.sort(reverse=True)
        now = [offer for offer in later if offer.rank >= below]
        later = later[len(now):]
        yield now


def _what_they_want(tx: Transaction, nodes: Sequence[Node]) -> dict[int, Ran]:
    """Return by node the newest release that ended success or partial, is for it, and that nobody rolled back."""
    if not nodes:
        return {}
    missing, found = {node.id: node for node in nodes}, dict[int, int]()
    for offers in _offers(tx):
        listed = _listed_nodes(tx, {offer.selection.nodes_of for offer in offers} - {None}, missing)
        for offer in offers:
            ids: Iterable[int] = missing if offer.selection.nodes_of is None else listed[offer.selection.nodes_of]
            for node_id in [id_ for id_ in ids if id_ in missing and offer.selection.takes(missing[id_])]:
                found[node_id] = offer.release_id
                del missing[node_id]
        if not missing:
            break
    ran = _releases_by_id(tx, set(found.values()))
    return {node_id: ran[release_id] for node_id, release_id in found.items()}


def _listed_nodes(tx: Transaction, release_ids: Set[int | None], nodes: Collection[int]) -> dict[int, list[int]]:
    """Return by release those of the nodes that it has."""
    listed: dict[int, list[int]] = {id_: [] for id_ in release_ids if id_ is not None}
    if len(nodes) <= NODES_PER_STATEMENT and listed:
        # the index release_task_nodes_by_node
        marks = ", ".join("?" * len(nodes))
        pairs = rows_of_nodes(tx, f"SELECT release_task_id, node_id FROM release_task_nodes WHERE node_id IN ({marks}) "
                                  "AND release_task_id IN ({marks})", list(listed), *nodes)
    else:
        pairs = rows_of_nodes(tx, "SELECT release_task_id, node_id FROM release_task_nodes "
                                  "WHERE release_task_id IN ({marks})", list(listed))
    for release_id, node_id in pairs:
        listed[release_id].append(node_id)
    return listed


def effect_of(tx: Transaction, payload: Mapping[str, Any], nodes: Sequence[Node]) -> Effect:
    """Return what a payload changes on nodes against what they run."""
    digest, found = digest_of(payload), _what_they_have(tx, nodes)
    counted = collections.Counter((level.has and level.has._replace(since=None), level.is_unknown)
                                  for level in found.values())
    running = [Running(has.release_id, has.version, count, has.payload_sha256 == digest)
               for (has, is_unknown), count in sorted(counted.items(), key=lambda item: (
                   -item[1], -(item[0][0].version if item[0][0] else 0))) if has and not is_unknown]
    unknown = sum(count for (_, is_unknown), count in counted.items() if is_unknown)
    fresh = counted[None, False]
    running += [Running(None, 0, count, False, is_unknown)
                for count, is_unknown in ((fresh, False), (unknown, True)) if count]
    against = next((one.release_id for one in running if one.release_id is not None and not one.is_same), None)
    ahead = _open_releases(tx)
    if against is None:
        return Effect(running, open_releases=ahead)
    try:
        before = stored_payload(read_release(tx, against))
    except AppError as error:
        return Effect(running, against, None, error.message, ahead)
    changes = difference(without_version(before), without_version(payload))
    return Effect(running, against, changes, open_releases=ahead)


def _open_releases(tx: Transaction) -> int:
    return int(tx.value(f"SELECT COUNT(*) FROM release_tasks WHERE status IN {OPEN_RELEASES}"))


def changes_nothing(tx: Transaction, digest: str, nodes: Sequence[Node]) -> bool:
    """Return whether each node has the payload of a digest and no release is open; one is asked before all are."""
    return not _open_releases(tx) and all(
        level.has is not None and not level.is_unknown and level.has.payload_sha256 == digest
        for some in (nodes[:1], nodes[1:]) for level in _what_they_have(tx, some).values())


def drift_text(level: Level) -> str:
    """Return a sentence on how far a node is from what it should run, and what would mend it."""
    has, wants = level.has, level.wants
    if level.drift == UNSURE:
        return ("unknown: it may have been sent something else since, or has another address; "
                "the next release to it tells")
    if level.drift == BEHIND and wants:
        return f"behind: release {wants.release_id} (v{wants.version}) is for it, `catch-up` sends it"
    if level.drift == AHEAD and has:
        ended = has.status if level.has == level.runs else "failed there"
        return (f"ahead: it has what release {has.release_id} (v{has.version}, {ended}) left, and that is not what it "
                "should run; `rollback` or a new release mends it")
    return "none: it runs what it should" if wants else "none: no release is for it yet"


class ListedNode(NamedTuple):
    """A node, with what it runs and should run."""
    node: Node
    level: Level


def _with_levels(tx: Transaction, nodes: Sequence[Node]) -> list[ListedNode]:
    found = levels(tx, nodes)
    return [ListedNode(node, found[node.id]) for node in nodes]


class NodeFilter(NamedTuple):
    """Which nodes a list shows, and in which order; what is empty restricts nothing."""
    drift: str = ""
    words: NodeWords = NodeWords()
    # Id of the release that they run.
    runs: int | None = None
    # Part of a name, an address or a label.
    search: str = ""
    # A key of NODE_ORDERS, with "-" before it backwards.
    sort: str = "id"

    def takes(self, node: Node) -> bool:
        """Return whether it takes a node, as far as the node's row tells."""
        return self.words.takes(node) and (not self.search or self.search.lower() in "\n".join(
            [node.name, node.main_ip, *(f"{key}={value}" for key, value in node.label_values.items())]).lower())


NODE_ORDERS: Mapping[str, Callable[[ListedNode], Any]] = {
    "id": lambda one: one.node.id,
    "name": lambda one: in_order_of_numbers(one.node.name),
    "address": lambda one: (in_order_of_numbers(one.node.main_ip), one.node.agent_port),
    "runs": lambda one: one.level.runs.version if one.level.runs else 0,
    "drift": lambda one: -DRIFTS.index(one.level.drift)}


class NodeTry(NamedTuple):
    """A release that a node was given, and what became of it there."""
    release_id: int
    version: int
    target: str
    release_status: str
    batch: int
    status: str
    attempts: int
    error_kind: str
    error_msg: str
    started_at: str | None
    finished_at: str | None


class Fleet:
    """All nodes, with what each runs and should run. Each public method is one transaction."""

    def __init__(self, state: DatabaseState):
        self._database = state.database
        self._counts = RareRead(self._count)

    def page(self, page: int = 1, size: int = MAX_PAGE_SIZE, wanted: NodeFilter = NodeFilter()) -> Page:  # noqa: B008
        """Return a page of nodes, each a ListedNode; size 0: all of them.

        Without a filter and in order of their ids only those of the page are read.
        """
        with self._database.transaction() as tx:
            if wanted == NodeFilter():
                found = page_of_nodes(tx, page, size)
                return found._replace(items=_with_levels(tx, found.items))
            listed = _with_levels(tx, [node for node in all_nodes(tx) if wanted.takes(node)])
        if wanted.drift:
            listed = [one for one in listed if one.level.drift == wanted.drift]
        if wanted.runs is not None:
            listed = [one for one in listed if one.level.runs and one.level.runs.release_id == wanted.runs]
        listed.sort(key=NODE_ORDERS[wanted.sort.lstrip("-")], reverse=wanted.sort.startswith("-"))
        return Page(listed[(page - 1) * size:page * size] if size else listed, len(listed), page, size)

    def listed(self, nodes: Sequence[Node]) -> list[ListedNode]:
        """Return nodes with what they run and should run."""
        with self._database.transaction() as tx:
            return _with_levels(tx, nodes)

    def tries(self, node_id: int, page: int = 1, size: int = MAX_PAGE_SIZE) -> Page:
        """Return a page of what a node was given, newest release first, each a NodeTry; raise AppError 3001."""
        with self._database.transaction() as tx:
            find_node(tx, node_id)
            # the index release_task_nodes_by_node
            total = int(tx.value("SELECT COUNT(*) FROM release_task_nodes WHERE node_id = ?", node_id))
            rows = tx.rows("""
                SELECT r.id, r.version, r.target, r.status, n.batch, n.status, n.attempts, n.error_kind, n.error_msg,
                       n.started_at, n.finished_at
                FROM release_task_nodes n
                JOIN release_tasks r ON r.id = n.release_task_id
                WHERE n.node_id = ?
                ORDER BY n.release_task_id DESC
                LIMIT ? OFFSET ?""", node_id, size, (page - 1) * size)
            return Page([NodeTry(*row) for row in rows], total, page, size)

    def counts(self, key: object = None) -> FleetCounts:
        """Return how many enabled nodes there are of each drift, and twins; a large fleet's are up to a minute old.

        key: as for RareRead.get().
        """
        return self._counts.get(key=key)

    def _count(self) -> FleetCounts:
        with self._database.transaction() as tx:
            enabled = [node for node in all_nodes(tx) if node.enabled]
            listed = _with_levels(tx, enabled)
        twins, counts = twins_of(enabled), {drift: DriftCount() for drift in DRIFTS}
        for node, level in listed:
            known, since = counts[level.drift], level.drift_since and max(level.drift_since, node.created_at)
            counts[level.drift] = DriftCount(
                known.nodes + 1, known.first or node.name, min(filter(None, (known.since, since)), default=None),
                known.away + (not node.gets_releases))
        return FleetCounts(counts, *((twins_text(*twins), twins[1].name) if twins else ()))


class CatchUp(NamedTuple):
    """A release to be made for nodes that are behind, its plan and its nodes."""
    request: ReleaseRequest
    plan: Plan
    nodes: Sequence[Node]


def plan_catch_up(tx: Transaction, reason: str, strategy: Mapping[str, Any]) -> tuple[list[CatchUp], list[LeftOut]]:
    """Return a release for each one that is wanted, oldest first, and the nodes that are behind but left out."""
    parsed, nodes = parse_strategy(strategy), all_nodes(tx)
    refuse_unknown_labels(parsed, nodes)
    found = levels(tx, nodes)
    behind = [node for node in nodes if found[node.id].drift == BEHIND]
    under_way = _releases_under_way(tx)
    left_out = [*left_out_nodes(behind), *(
        LeftOut(node.id, node.name, f"part of release {under_way[node.id]}, which has not ended")
        for node in behind if node.gets_releases and node.id in under_way)]
    groups: dict[int, list[Node]] = {}
    for node in behind:
        wants = found[node.id].wants
        if wants and node.gets_releases and node.id not in under_way:
            groups.setdefault(wants.release_id, []).append(node)
    found_ones = []
    for release_id, members in sorted(groups.items()):
        try:
            found_ones.append(_catch_up_with(read_release(tx, release_id), members, reason, strategy, parsed))
        except AppError as error:
            left_out += [LeftOut(node.id, node.name, f"left behind: {error.message}") for node in members]
    return found_ones, left_out


def _catch_up_with(wanted: Release, nodes: Sequence[Node], reason: str, strategy: Mapping[str, Any],
                   parsed: Strategy) -> CatchUp:
    payload = stored_payload(wanted)
    refuse_twins(nodes)
    refuse_dropping_sites(payload, nodes, WRONG_STATE, f"the payload of release {wanted.id}")
    request = ReleaseRequest(wanted.target, reason or f"catch-up with release {wanted.id}", payload, strategy=strategy,
                             catch_up_of=wanted.catch_up_of or wanted.id)
    plan = make_plan(parsed, nodes)
    return CatchUp(request, plan._replace(payload_of=(wanted.id, wanted.version), selection=selection_again(wanted),
                                          emptied=emptied_nodes(payload, nodes)), nodes)


def no_longer_wanted(tx: Transaction, release: Release) -> str:
    """Return why a release that has not started must not go out any more, "" where it may.

    A catch-up: a newer release went out meanwhile, the one that it brings was rolled back, or a node has other labels.
    A retry or rollback: it was overtaken (it waited for an approval, or the end of a freeze), and would undo a success
    that nobody knew of who asked for it (rule 10). One that a person wrote goes out as it stands.
    """
    if release.catch_up_of is None:
        is_again = release.tag and not (release.retry_of is None and release.rollback_of is None)
        newer = newer_success(tx, release, nodes_again(tx, release)) if is_again else ""
        verb = "rollback" if release.retry_of is None else "retry"
        return newer and (f"{newer}: this {verb} comes too late; {verb} again with --over-newer if it is meant all the "
                          "same")
    nodes = nodes_again(tx, release)
    wants, digest = _what_they_want(tx, nodes), stored_digest(tx, release.id)
    others = [node.name for node in nodes if node.id not in wants or wants[node.id].payload_sha256 != digest]
    return f"{names_of(others)} should run something else now: catch-up again" if others else ""


def _releases_under_way(tx: Transaction) -> dict[int, int]:
    """Return by node the newest release that has it and has not ended."""
    return dict(tx.rows(f"""
        SELECT n.node_id, MAX(r.id)
        FROM release_tasks r
        JOIN release_task_nodes n ON n.release_task_id = r.id
        WHERE r.status IN {OPEN_RELEASES}
        GROUP BY n.node_id"""))


# endregion


# region Counts
# ======================================================================================
# Counts: the figures of METRICS that are in the database.
# Uses: Vocabulary, Helpers, Database, Queue.
# ======================================================================================

# Targets with figures of their own, the oldest ones; the others are counted together as OTHER.
MAX_TARGETS_COUNTED, OTHER = 50, "other"


def read_counts(tx: Transaction) -> dict[tuple[str, ...], float]:
    """Return the figures of METRICS that are in the database.

    Nodes and events of terminal releases are not read: there may be millions.
    """
    releases = tx.rows("SELECT target, status, COUNT(*), MIN(id) FROM release_tasks GROUP BY target, status")
    # the indexes release_tasks_by_status, then release_task_nodes_by_status and release_events_by_release
    nodes = tx.rows("""
        SELECT r.target, n.status, COUNT(*)
        FROM release_tasks r
        JOIN release_task_nodes n ON n.release_task_id = r.id
        WHERE r.status IN ('running', 'paused', 'cancelling')
        GROUP BY r.target, n.status""")
    changed = tx.rows("""
        SELECT r.target, r.status,
               (SELECT e.at FROM release_events e WHERE e.release_task_id = r.id ORDER BY e.id DESC LIMIT 1)
        FROM release_tasks r
        WHERE r.status IN ('running', 'paused', 'cancelling')""")
    fleet = dict(tx.rows("SELECT status, COUNT(*) FROM nodes WHERE enabled = 1 GROUP BY status"))
    freezes = read_freezes(tx)
    oldest = {target: first for target, _, _, first in sorted(releases, key=lambda row: -row[3])}
    labels = {target: target if place < MAX_TARGETS_COUNTED else OTHER
              for place, target in enumerate(sorted(oldest, key=oldest.__getitem__))}
    figures: dict[tuple[str, ...], float] = {
        **{("releasectl_nodes", status): fleet.get(status, 0) for status in NODE_STATUSES},
        **{("releasectl_releases", label, status): 0 for label in labels.values() for status in RELEASE_STATUSES},
        **{("releasectl_release_nodes", labels[target], status): 0 for target, _, _ in nodes
           for status in (PENDING, RUNNING, SUCCESS, FAILED, SKIPPED)},
        ("releasectl_frozen",): float(freezes.everything.frozen),
        # a release of a target without figures of its own is counted as OTHER: that is not frozen as a whole
        **{("releasectl_target_frozen", label): float(bool(freezes.everything.frozen or (
            label != OTHER and freezes.of_target(label).frozen))) for label in {
                *labels.values(), *(freeze.target for freeze in freezes.targets[:MAX_TARGETS_COUNTED])}}}
    for target, status, count, _ in releases:
        figures["releasectl_releases", labels[target], status] += count
    for target, status, count in nodes:
        figures["releasectl_release_nodes", labels[target], status] += count
    for target, status, at in changed:
        key = ("releasectl_release_last_event_timestamp_seconds", labels[target], status)
        with contextlib.suppress(ValueError, TypeError):  # written by hand, without an event
            figures[key] = min(epoch_of(at), figures.get(key, epoch_of(at)))
    return figures


# endregion


# region Approvals
# ======================================================================================
# Approvals: a release that waits for a second person, and who lets it start.
# Uses: Vocabulary, Model, Status texts, Verbs, Database, Database state, Audit,
#   Queue.
# ======================================================================================

# From what becomes of approval to the event that says so, "" for none.
APPROVAL_EVENTS: Mapping[str, str] = {WANTED: APPROVAL, GIVEN: "approved", EMERGENCY: EMERGENCY, AUTOMATIC: ""}


def set_approval(tx: Transaction, release: Release, approval: str, at: str, actor: Who, reason: str) -> None:
    """Write one of APPROVAL_STATES for a release that has not started, with its event."""
    by, when = (identity_of(actor), at) if approval in (GIVEN, EMERGENCY) else ("", None)
    tx.execute("UPDATE release_tasks SET approval = ?, approved_by = ?, approved_at = ?, updated_at = ? WHERE id = ?",
               approval, by, when, at, release.id)
    event, why = APPROVAL_EVENTS[approval], {WANTED: approval_text(release.id, release.author),
                                             EMERGENCY: f"without approval, by {by}"}.get(approval, "")
    detail = "; ".join(filter(None, (why, reason)))
    if event:
        add_events(tx, at, actor, [NewEvent(release.id, event, release.status, release.status, detail)])
        tx.after_commit.append(lambda: log.log(
            logging.WARNING if approval == EMERGENCY else logging.INFO, "%s: %s by %s%s", release, event, actor,
            f": {detail}" if detail else "", extra=about(release, actor=str(actor), event=event)))


def unasked(tx: Transaction) -> list[int]:
    """Return the releases that have not started and for which nobody has asked for an approval, where APPROVALS is 1.

    They were made by a process without the setting, or by hand.
    """
    # the index release_tasks_by_status
    return [row[0] for row in tx.rows("SELECT id FROM release_tasks WHERE status = 'pending' AND started_at IS NULL "
                                      "AND approval = '' ORDER BY id")] if tx.database.approvals else []


class Approvals:
    """Who lets a release start that somebody else made. Each public method is one transaction."""

    def __init__(self, state: DatabaseState, audit: Audit, queue: Queue):
        self._state = state
        self._database = state.database
        self._audit = audit
        self._queue = queue

    def approve(self, release_id: int, actor: Who, reason: str = "", is_emergency: bool = False) -> Release:
        """Let a release start that waits for an approval; return it as it is then.

        is_emergency: without an approval, so by its author too. Raise AppError 3001, 3003 where it waits for none, 1004
        for its author, 2001 for an emergency without a reason.
        """
        check_emergency(is_emergency, reason)
        with self._database.transaction(write=True) as tx:
            release = read_release(tx, release_id)
            check_approval(release, identity_of(actor), is_emergency)
            approval = EMERGENCY if is_emergency else GIVEN
            set_approval(tx, release, approval, self._state.now(), actor, reason)
            self._audit.add(tx, actor, "release.approve", f"release {release_id}",
                            non_empty(approval=release.approval, author=release.author),
                            non_empty(approval=approval, reason=reason, emergency=is_emergency or None))
            self._queue.explain_waiting(tx)
            return read_release(tx, release_id)


# endregion


# region Releases
# ======================================================================================
# Releases: create, verbs, lists, payloads, freezes.
# Uses: Vocabulary, Helpers, Payloads, Difference, Model, Freezes, Strategy, Plan,
#   Failures, Node index, Preflight, Status texts, Decision, Verbs, Why, Database,
#   Database state, Audit, Nodes, Queue, Retry and rollback, Drift, Counts, Approvals.
# ======================================================================================

class Progress(NamedTuple):
    """Where a release is."""
    release: Release
    # In order.
    batches: list[BatchProgress]
    # By cause.
    failures: list[FailureGroup]
    # time_left()
    time_left: str = ""


# How long an Idempotency-Key is kept.
IDEMPOTENCY_KEY_S = 86400.0


class Releases:
    """Releases as people make, read and steer them.

    Each public method is one transaction, or part of the one that it gets as tx.
    """

    def __init__(self, state: DatabaseState, audit: Audit, queue: Queue):
        self._state = state
        self._database = state.database
        self._audit = audit
        self._queue = queue
        self._failures = FailureReader()

    def plan(self, request: ReleaseRequest) -> Plan:
        """Return what create() would make, and raise what it would; write nothing."""
        with self._database.transaction() as tx:
            version = self._version_for(tx, request, tx.value(self._database.engine.next_release_id_sql))
            check_payload_version(request.payload, version)
            return self._planned(tx, request, *self._plan(tx, request), version)

    @staticmethod
    def _planned(tx: Transaction, request: ReleaseRequest, plan: Plan, nodes: Sequence[Node], version: int) -> Plan:
        """Return a plan with what it needs to be shown."""
        superseded, warnings = queue_effect(tx, request)
        approval = approval_for(tx, request)
        if approval == WANTED:
            warnings.append("waits for approval by somebody else than its author; in an emergency it goes without: "
                            "emergency (--emergency)")
        elif approval == EMERGENCY:
            warnings.append("emergency: it goes without an approval, and everybody is told so")
        return plan._replace(version=version, names={node.id: node.name for node in nodes}, approval=approval,
                             effect=effect_of(tx, request.payload, nodes), superseded=superseded,
                             during_freeze=request.during_freeze, warnings=[*plan.warnings, *warnings])

    def create(self, request: ReleaseRequest, actor: Who, key: IdempotencyKey | None = None) -> Made:
        """Create a release for the nodes that a request chooses; return it, its batches and who is left out (rule 1).

        A key that was used returns what its first request made. Raise AppError 3003 where no chosen node is enabled
        and online, or two have one address; 2003 for a strategy, choice of nodes, version or payload that can't be
        used; 3002 where the key was used for another request.
        """
        with self._database.transaction(write=True) as tx:
            return self._replay(tx, key) or self._keep_for_replay(
                tx, key, self._create(tx, actor, request, *self._plan(tx, request)))

    def plan_again(self, verb: str, release_id: int, wish: Again = Again()) -> Plan:  # noqa: B008 - it has no state
        """Return what retry() or rollback() would make, and raise what it would; write nothing."""
        with self._database.transaction() as tx:
            planned = plan_again(tx, verb, release_id, wish)
            release_id = tx.value(self._database.engine.next_release_id_sql)
            return self._planned(tx, *planned, self._state.next_version(tx, release_id))

    def retry(self, release_id: int, actor: Who, wish: Again = Again(), key: IdempotencyKey | None = None) -> Made:  # noqa: B008
        """Create a release with the same payload for the nodes that were failed or skipped (rule 10).

        Raise AppError 3003 where the release's status, its payload or a newer success forbids it.
        """
        return self._make_again("retry", release_id, actor, wish, key)

    def rollback(self, release_id: int, actor: Who, wish: Again = Again(),  # noqa: B008 - it has no state
                 key: IdempotencyKey | None = None) -> Made:
        """Create a release with the payload that the nodes of a release had before it (rule 10).

        It has the old batches and limits, without soak, pauses and probes of its own; nodes that had failed come
        last, and never stop it. Raise AppError 3003 where there is nothing to bring back or a newer success forbids
        it, 2003 for a toRelease that can't be used.
        """
        return self._make_again("rollback", release_id, actor, wish, key)

    def plan_catch_up(self, reason: str = "", strategy: Mapping[str, Any] = {}) -> tuple[  # noqa: B006 - never changed
            list[Plan], list[LeftOut]]:
        """Return what catch_up() would make, and who is left out; raise what it would, and write nothing."""
        with self._database.transaction() as tx:
            found, left_out = plan_catch_up(tx, reason, strategy)
            version = self._state.next_version(tx, tx.value(self._database.engine.next_release_id_sql))
            return [self._planned(tx, one.request, one.plan, one.nodes, version + place)
                    for place, one in enumerate(found)], left_out

    def catch_up(self, actor: Who, reason: str = "", strategy: Mapping[str, Any] = {}) -> tuple[  # noqa: B006
            list[Made], list[LeftOut]]:
        """Create a release for each one that nodes are behind with (contract section 5); return who is left out.

        Nodes that a release under way has are left out too, so that a second call makes nothing more. Raise AppError
        2003 for a strategy that can't be used.
        """
        with self._database.transaction(write=True) as tx:
            found, left_out = plan_catch_up(tx, reason, strategy)
            return [self._create(tx, actor, *one) for one in found], left_out

    def act(self, verb: str, release_id: int, actor: Who, reason: str = "", accept_failures: bool = False) -> Release:
        """Pause, resume, cancel or cancel --force a release; return it as it is then. Raise AppError 3001 or 3003.

        A cancelled release ends at once where nothing is in flight, or by force; else its executor ends it.
        accept_failures: with resume, the failures so far count against no limit.
        """
        with self._database.transaction(write=True) as tx:
            release, nodes = read_release(tx, release_id), NodeIndex(read_release_nodes(tx, release_id))
            check_verb(verb, release)
            now, strategy, before, detail = self._state.moment(), strategy_of(release.strategy), release.status, reason
            if verb == "resume":
                check_resume(release, nodes, strategy, accept_failures)
                if accept_failures:
                    is_silent = is_paused_by_preflight(release, strategy) and not exceeded_limit(nodes, strategy)
                    detail = self._accept_silence(tx, release, reason) if is_silent else \
                        self._accept_failures(tx, release, reason)
            if status_after_verb(verb, release) != release.status:
                change_status(tx, release, nodes, VERBS[verb], now, actor, detail)
                release, detail = read_release(tx, release_id), ""
            self._audit.add(
                tx, actor, f"release.{verb.partition(' ')[0]}", f"release {release_id}", {"status": before},
                non_empty(status=release.status, reason=reason, force=verb == CANCEL_BY_FORCE or None,
                          acceptFailures=accept_failures or None))
            ends_now = verb == CANCEL_BY_FORCE or not nodes.of[RUNNING]
            if release.status == CANCELLING and ends_now:
                self._queue.end_cancelled(tx, release, nodes, now, actor, detail)
            self._queue.explain_waiting(tx)
            return read_release(tx, release_id)

    def freezes(self) -> Freezes:
        """Return what is frozen now."""
        with self._database.transaction() as tx:
            return read_freezes(tx)

    def set_freeze(self, frozen: bool, actor: Who, reason: str = "", target: str = "",
                   until: str | None = None, is_emergency: bool = False) -> Freezes:
        """Set or lift the freeze of a target, or that of everything; return what is frozen then.

        One that is set replaces an earlier one of the same target, and each open release that it holds gets an event.
        Where it takes two persons to lift somebody's freeze, the first one's wish is kept and answered by AppError
        3003, and nobody but its setter lets it end earlier: 3003. is_emergency: lifted at once, and everybody is told.
        until: stored time of its end. Raise AppError 2001 where it is set, or lifted in an emergency, without a reason,
        2003 where the end is over or it is not set.
        """
        if frozen and not reason:
            raise AppError(MISSING, "reason is missing: tell others why the site is frozen")
        if until and not frozen:
            raise AppError(INVALID, "until goes with a freeze that is set, not with one that is lifted")
        if is_emergency and frozen:
            raise AppError(INVALID, "emergency goes with a freeze that is lifted, not with one that is set")
        check_emergency(is_emergency, reason)
        with self._database.transaction(write=True) as tx:
            self._queue.end_freezes(tx, actor)
            freezes = read_freezes(tx)
            before = freezes.of_target(target)
            if until and until <= (now := tx.now()):
                raise AppError(INVALID, f"until {until} is over: by the clock that it goes by it is {now} now")
            if not frozen and not before.frozen:
                return freezes
            identity, now = identity_of(actor), self._state.now()
            if before.two_persons and not frozen and not is_emergency:
                check_signed_in(identity)
            after = Freeze(frozen, reason, str(actor), now, until or None, target, identity if frozen else "")
            if frozen and before.frozen:
                check_longer(before, identity, until)
                if before.two_persons and not is_setter(before, identity):  # it stays the setter's
                    after = after._replace(reason=f"{reason} (so {actor})", actor=before.actor, at=before.at,
                                           setter=before.setter)
            is_lifted = not frozen and (is_emergency or may_lift(before, identity))
            if frozen or is_lifted:
                self._change_freeze(tx, freezes, after, now, actor, reason, is_emergency)
                return read_freezes(tx)
            waiting = before if same_person(before.lift_wanted_by, identity) else self._want_lift(
                tx, before, now, actor, reason)
        raise AppError(WRONG_STATE, f"{waiting.line()}: still frozen, as {waiting.lifted_by}: `{waiting.mend}`; in an "
                                    "emergency: --emergency --reason TEXT")

    def _change_freeze(self, tx: Transaction, freezes: Freezes, after: Freeze, now: str, actor: Who, reason: str,
                       is_emergency: bool) -> None:
        """Write a freeze that somebody set or lifted, with what tells of it."""
        before, frozen = freezes.of_target(after.target), after.frozen
        how = "emergency: lifted without a second person" if is_emergency else \
            f"wanted by {before.lift_wanted_by} since {before.lift_wanted_at}" \
            if before.lift_wanted_by and not frozen else ""
        detail = "; ".join(filter(None, (how, reason)))
        self._queue.change_freeze(tx, freezes, after, now, actor, detail)
        self._audit.add(tx, actor, f"freeze.{'on' if frozen else 'off'}", after.subject, freeze_values(before),
                        {**freeze_values(after), **non_empty(emergency=is_emergency or None)})
        lifted = f"{before.name} was lifted{by_whom(str(actor))}"
        text = after.line() if frozen else f"{lifted}: {detail}" if detail else lifted
        if frozen:
            add_notification(tx, FROZEN, now, text)
        elif is_emergency:
            add_notification(tx, APPROVAL, now, text, is_always_told=True)
        tx.after_commit.append(lambda: log.warning(
            "%s", text, extra=about(actor=str(actor), event=FROZEN if frozen else UNFROZEN)))
        self._queue.explain_waiting(tx)

    def _want_lift(self, tx: Transaction, freeze: Freeze, now: str, actor: Who, reason: str) -> Freeze:
        """Write that the first of two persons wants a freeze lifted; return it as it is then."""
        wanted = freeze._replace(lift_wanted_by=identity_of(actor), lift_wanted_at=now)
        write_freeze(tx, wanted)
        self._audit.add(tx, actor, "freeze.lift-wanted", freeze.subject, freeze_values(freeze),
                        {**freeze_values(wanted), **non_empty(why=reason)})
        text = f"{wanted.line()}; {wanted.lifted_by}" + (f": {reason}" if reason else "")
        add_notification(tx, APPROVAL, now, text)
        tx.after_commit.append(lambda: log.warning("%s", text, extra=about(actor=str(actor), event=APPROVAL)))
        return wanted

    def freeze_warnings(self, target: str, freezes: Freezes, frozen: bool) -> list[str]:
        """Return what the caller of set_freeze() may not have meant; freezes: what it returned.

        That no release has the target, which may be misspelt; that another freeze holds what was to go on.
        """
        if not frozen:
            held = freezes.everything if target else next(iter(freezes.targets), NO_FREEZE)
            return [f"{held.name if held.target else 'the freeze of everything'} holds {target or held.target} still: "
                    f"{held.mend}"] if held.frozen else []
        known = self.targets() if target else []
        return [] if target in ("", *known) else [
            f"no release has the target {target}{did_you_mean(target, known)}: it is frozen for those to come"]

    def set_first_version(self, version: int, by: Who = PROGRAM) -> int:
        """Number new releases from a version on; return the version of the next one (rule 1).

        For a database that is restored, or new, while agents have higher versions.
        """
        with self._database.transaction(write=True) as tx:
            before = tx.value("SELECT first_version FROM database_state WHERE id = 1")
            changed = tx.execute("UPDATE database_state SET first_version = ? WHERE id = 1 AND first_version < ?",
                                 version, version)
            # releases that are under way have lower versions than agents may have: they send nothing more
            changed += tx.execute("UPDATE nodes SET last_version = ? WHERE last_version < ?", version - 1, version - 1)
            self._state.note_unsure(tx, version - 1)
            if changed:
                self._audit.add(tx, by, "migrate.first-version", "database", {"firstVersion": before},
                                {"firstVersion": max(before or 1, version)})
            return self._state.next_version(tx, tx.value(self._database.engine.next_release_id_sql))

    def get(self, release_id: int) -> Release:
        """Return a release; raise AppError 3001."""
        with self._database.transaction() as tx:
            return read_release(tx, release_id)

    def difference(self, release_id: int, other_id: int | None = None) -> tuple[Release, Release, Difference]:
        """Return a release, another one, and what the first changes against it; None: release_before().

        Raise AppError 3001, 2003 for one of another target, 3003 for a payload that can't be read.
        """
        with self._database.transaction() as tx:
            release = read_release(tx, release_id)
            other = release_before(tx, release) if other_id is None else read_release(tx, other_id)
        if other.target != release.target:
            raise AppError(INVALID, f"release {other.id} is of target {other.target}, release {release.id} of target "
                                    f"{release.target}: only releases of one target can be compared")
        before, after = (without_version(stored_payload(one)) for one in (other, release))
        return release, other, difference(before, after)

    def find(self, release_id: int) -> Release | None:
        """Return a release, or None."""
        with self._database.transaction() as tx:
            return find_release(tx, release_id)

    def with_nodes(self, release_id: int) -> tuple[Release, list[ReleaseNode]]:
        """Return a release and its nodes by batch and id; raise AppError 3001."""
        with self._database.transaction() as tx:
            return read_release(tx, release_id), read_release_nodes(tx, release_id)

    def progress_and_nodes(self, release_id: int, most_failed: int) -> tuple[Progress, list[ReleaseNode]]:
        """Return where a release is, and its nodes that run and the first that failed; raise AppError 3001."""
        with self._database.transaction() as tx:
            # the index release_task_nodes_by_status
            return self._progress(tx, release_id), read_release_nodes(tx, release_id, """AND n.id IN (
                SELECT m.id FROM release_task_nodes m WHERE m.release_task_id = ? AND m.status = 'running'
                UNION ALL
                SELECT f.id FROM (SELECT m.id FROM release_task_nodes m
                                  WHERE m.release_task_id = ? AND m.status = 'failed'
                                  ORDER BY m.batch, m.node_id
                                  LIMIT ?) f)""", release_id, release_id, most_failed)

    def with_failures(self, release_id: int) -> tuple[Release, list[FailureGroup]]:
        """Return a release and its failed nodes by cause; raise AppError 3001."""
        with self._database.transaction() as tx:
            release = read_release(tx, release_id)
            return release, self._failures.read(tx, release)

    def whole(self, release_id: int) -> tuple[Release, list[ReleaseNode], list[FailureGroup]]:
        """Return a release, its nodes by batch and id, and the failed ones by cause; raise AppError 3001."""
        with self._database.transaction() as tx:
            release = read_release(tx, release_id)
            return release, read_release_nodes(tx, release_id), self._failures.read(tx, release)

    def progress(self, release_id: int) -> Progress:
        """Return where a release is; raise AppError 3001."""
        with self._database.transaction() as tx:
            return self._progress(tx, release_id)

    def _progress(self, tx: Transaction, release_id: int) -> Progress:
        release, batches = read_release(tx, release_id), read_batches(tx, release_id)
        [shown] = self._as_true(tx, [release])
        left = self._time_left(tx, release, batches) if shown is release else ""
        return Progress(shown, batches, self._failures.read(tx, release), left)

    def _as_true(self, tx: Transaction, releases: Iterable[Release]) -> list[Release]:
        """Return releases as they are to be shown: with what is true in place of a status_reason that got old."""
        executors, now_s = read_executors(tx), epoch_of(tx.now())
        shown = []
        for release in releases:
            reason = true_reason(release, executors, now_s, self._state.write_error)
            shown.append(as_read(release) if reason == release.status_reason
                         else dataclasses.replace(release, status_reason=reason))
        return shown

    def as_shown(self, release: Release) -> Release:
        """Return a release whose status_reason is true when it is read, and says how long it still takes if known.

        That is for those who read it: the row would have to be written again and again.
        """
        with self._database.transaction() as tx:
            [shown] = self._as_true(tx, [release])
            if shown is not release or release.status != RUNNING:
                return shown
            text = self._time_left(tx, release, read_batches(tx, release.id))
        return dataclasses.replace(release, status_reason="; ".join(filter(None, (release.status_reason, text))))

    def _time_left(self, tx: Transaction, release: Release, batches: Sequence[BatchProgress]) -> str:
        number = next((batch.number for batch in batches if batch.is_open), 0)
        if release.status != RUNNING or not number or read_freezes(tx).of(release).frozen:
            return ""
        now, strategy, status_ages = self._state.moment(), strategy_of(release.strategy), list[tuple[str, float]]()
        # the index release_events_by_release
        for status, at in tx.rows("""
                SELECT e.to_status, e.at
                FROM (SELECT node_id, to_status, at FROM release_events WHERE release_task_id = ?
                      ORDER BY id DESC LIMIT ?) e
                JOIN release_task_nodes n ON n.release_task_id = ? AND n.node_id = e.node_id
                WHERE n.batch = ?""", release.id, PACE_EVENTS, release.id, number):
            status_ages.append((status, now.wall - epoch_or(at, now.wall)))
        spent_s = max((age_s for _, age_s in status_ages), default=0.0)
        ended = sum(status in (SUCCESS, FAILED) and age_s <= PACE_S for status, age_s in status_ages)
        pace = Pace(spent_s, min(spent_s, PACE_S) / ended if ended else 0.0)
        if not ended:
            began, last = tx.row("""
                SELECT MIN(started_at), MAX(finished_at)
                FROM release_task_nodes
                WHERE release_task_id = ? AND status IN ('success', 'failed') AND batch = ?""", release.id, max(
                (batch.number for batch in batches if batch.number < number), default=0)) or (None, None)
            # a batch that should have begun since then, and has not: perhaps no executor is running
            waits_s = max(0.0, now.wall - epoch_or(last, now.wall) - strategy.soak_s)
            pace = Pace(spent_s or waits_s, 0.0, max(0.0, epoch_or(last, 0.0) - epoch_or(began, 0.0)) if began else 0.0)
        return time_left(release, batches, pace, strategy, now)

    def is_exceeded(self, release_id: int) -> bool:
        """Return whether a release has too many failures, or agents that did not answer; raise AppError 3001."""
        with self._database.transaction() as tx:
            release = read_release(tx, release_id)
            return is_paused_by_preflight(release, strategy_of(release.strategy)) or bool(
                read_exceeded(tx, release, read_batches(tx, release_id)))

    def events(self, release_id: int, after: int = 0, limit: int = 100, newest: bool = False) -> list[Event]:
        """Return the first events of a release with an id above after, or the newest of them, oldest first.

        Raise AppError 3001.
        """
        with self._database.transaction() as tx:
            read_release(tx, release_id)
            rows = tx.rows(f"""
                SELECT e.id, e.release_task_id, e.node_id, COALESCE({NAME_THEN}, ''), e.at, e.actor, e.event,
                       e.from_status, e.to_status, e.detail
                FROM release_events e
                LEFT JOIN release_task_nodes n ON n.release_task_id = e.release_task_id AND n.node_id = e.node_id
                LEFT JOIN nodes h ON h.id = e.node_id
                WHERE e.release_task_id = ? AND e.id > ?
                ORDER BY e.id {'DESC' if newest else ''}
                LIMIT ?""", release_id, after, limit)
            return [Event(*row) for row in (reversed(rows) if newest else rows)]

    def count_events(self, release_id: int) -> int:
        """Return how many events a release has."""
        with self._database.transaction() as tx:
            return int(tx.value("SELECT COUNT(*) FROM release_events WHERE release_task_id = ?", release_id))

    def page(self, wanted: ReleaseFilter = ReleaseFilter(), page: int = 1, size: int = 20) -> Page:  # noqa: B008
        """Return a page of the releases that a filter takes, newest first."""
        where, values = wanted.where()
        with self._database.transaction() as tx:
            total = tx.value(f"SELECT COUNT(*) FROM release_tasks r{where}", *values)
            rows = tx.rows(f"SELECT {LISTED_COLUMNS} FROM release_tasks r{where} ORDER BY r.id DESC LIMIT ? OFFSET ?",
                           *values, size, (page - 1) * size)
            return Page(self._as_true(tx, (Release(*row) for row in rows)), total, page, size)

    def targets(self) -> list[str]:
        """Return the targets of all releases (the index release_tasks_by_target)."""
        with self._database.transaction() as tx:
            return [row[0] for row in tx.rows("SELECT DISTINCT target FROM release_tasks ORDER BY target")]

    def open(self, limit: int = MAX_PAGE_SIZE) -> list[tuple[Release, int]]:
        """Return the releases that are not terminal, oldest first, each with its number of batches."""
        with self._database.transaction() as tx:
            rows = tx.rows(f"""
                SELECT {LISTED_COLUMNS},
                       COALESCE((SELECT MAX(n.batch) FROM release_task_nodes n WHERE n.release_task_id = r.id), 0)
                FROM release_tasks r
                WHERE r.status IN {OPEN_RELEASES}
                ORDER BY r.id
                LIMIT ?""", limit)
            return list(zip(self._as_true(tx, (Release(*row[:-1]) for row in rows)), (row[-1] for row in rows)))

    def counts(self) -> dict[tuple[str, ...], float]:
        """Return read_counts()."""
        with self._database.transaction() as tx:
            return read_counts(tx)

    def _plan(self, tx: Transaction, request: ReleaseRequest) -> tuple[Plan, list[Node]]:
        strategy = parse_strategy(request.strategy)
        nodes, left_out, stored, warnings = choose_nodes(all_nodes(tx), request)
        refuse_twins(nodes)
        refuse_dropping_sites(request.payload, nodes)
        refuse_unknown_labels(strategy, nodes)
        plan = make_plan(strategy, nodes, left_out)
        is_over = bool(strategy.start_at) and strategy.start_at <= self._state.now()
        over = [f"startAt {strategy.start_at} is over: it starts as soon as it can"] if is_over else []
        return plan._replace(emptied=emptied_nodes(request.payload, nodes), selection=stored,
                             warnings=[*warnings, *plan.warnings, *over]), nodes

    def _version_for(self, tx: Transaction, request: ReleaseRequest, release_id: int) -> int:
        version = self._state.next_version(tx, release_id)
        if request.version is not None and request.version < version:
            raise AppError(INVALID, f"version {request.version} may have been used already: leave it out, or name one "
                                    f"from {version} on")
        return request.version or version

    def plan_rollback_of(self, tx: Transaction, release: Release) -> tuple[Sequel | None, str, str]:
        """Return the rollback that follows a release which ends now, and a sentence on it for whoever reads of the end.

        None: there can't be one; the sentence says why, and the last text what a person should do. Its nodes are at
        rest already.
        """
        try:
            planned = automatic_rollback(tx, release)
        except NotAgain as error:
            return None, f"not rolled back, as {error.cause}", with_options(error.mend)
        except AppError as error:
            return None, f"not rolled back, as {error.message}", f"mend that, then: releasectl rollback {release.id}"
        release_id = tx.value(self._database.engine.take_release_id_sql)
        return Sequel(release_id, *planned), rollback_text(
            release_id, planned[1].left_out, read_freezes(tx).of(release)), ""

    def create_sequel(self, tx: Transaction, actor: Who, sequel: Sequel) -> None:
        """Create the rollback of a release that has ended in this transaction."""
        self._create(tx, actor, *sequel[1:], sequel.release_id)

    def _create(self, tx: Transaction, actor: Who, request: ReleaseRequest, plan: Plan, nodes: Sequence[Node],
                release_id: int = 0) -> Made:
        self._state.note_timeline(tx)
        superseded, warnings = queue_effect(tx, request)
        if not request.is_again:
            # before an id, and with it a version, is used up
            check_payload_version(request.payload, self._version_for(
                tx, request, tx.value(self._database.engine.next_release_id_sql)))
        release_id = release_id or tx.value(self._database.engine.take_release_id_sql)
        version = self._version_for(tx, request, release_id)
        payload = payload_for_version(request.payload, version)
        digest = digest_of(payload)
        is_same = changes_nothing(tx, digest, nodes)
        self._state.seen.use_version(version)
        now = self._state.now()
        tx.execute("""
            INSERT INTO release_tasks (id, target, version, tag, status_reason, reason, payload, payload_sha256,
                                       strategy, selection, retry_of, rollback_of, catch_up_of, goes_first,
                                       during_freeze, total_nodes, created_at, updated_at, author)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                   release_id, request.target, version, new_tag(), REASON_PENDING, request.reason, to_json(payload),
                   digest, to_json(request.strategy), to_json(plan.selection), request.retry_of,
                   request.rollback_of, request.catch_up_of, int(request.goes_first), int(request.during_freeze),
                   sum(map(len, plan.batches)), now, now, identity_of(actor))
        limits = plan.strategy.max_parallel_per
        as_now = {node.id: (node.name, node.main_ip, node.agent_port, to_json(dict(sorted(limited_labels(
            node.labels, limits)))) if limits else "{}") for node in nodes}
        tx.insert_many("INSERT INTO release_task_nodes (release_task_id, node_id, batch, accepted, created_at, "
                       "updated_at, node_name, main_ip, agent_port, labels) VALUES ", 10, [
                           (release_id, node_id, number, int(node_id in plan.tolerated), now, now, *as_now[node_id])
                           for number, batch in enumerate(plan.batches, 1) for node_id in batch])
        left_out = [f"left out: {one.name} is {one.why}" for one in plan.left_out[:20] if request.is_again]
        detail = "; ".join(filter(None, (request.reason, str(plan) if request.strategy else "",
                                         CHANGES_NOTHING if is_same else "", *left_out,
                                         "goes out in a freeze too" if request.during_freeze else "")))
        add_events(tx, now, actor, [NewEvent(release_id, "created", "", PENDING, detail)])
        for old in superseded:
            why = f"superseded by release {release_id} (v{version})"
            self._queue.end_unstarted(tx, read_release(tx, old.release_id), actor, why)
            self._audit.add(tx, actor, "release.cancel", f"release {old.release_id}",
                            after={"status": CANCELLED, "reason": why})
        approval = approval_for(tx, request)
        if approval:
            set_approval(tx, read_release(tx, release_id), approval, now, actor, request.reason)
        self._queue.explain_waiting(tx)
        release = read_release(tx, release_id)
        freeze = read_freezes(tx).of(release)
        if freeze.frozen:  # why it does not start, and may take a later version then
            add_events(tx, now, actor, [NewEvent(release_id, FROZEN, PENDING, PENDING, freeze.detail)])
        verb = "retry" if request.retry_of else "rollback" if request.rollback_of else \
            "catch-up" if request.catch_up_of else "create"
        self._audit.add(tx, actor, f"release.{verb}", f"release {release_id}", after=non_empty(
            version=version, target=request.target, reason=request.reason, totalNodes=release.total_nodes,
            payloadSha256=digest, strategy=request.strategy, retryOf=request.retry_of,
            rollbackOf=request.rollback_of, catchUpOf=request.catch_up_of, goesFirst=request.goes_first or None,
            duringFreeze=request.during_freeze or None, superseded=[old.release_id for old in superseded] or None,
            approval=approval))
        tx.after_commit.append(lambda: log.info(
            "%s: created by %s, %s in batches of %s%s", release, actor, count_of_nodes(release.total_nodes),
            in_words([len(batch) for batch in plan.batches]), f": {request.reason}" if request.reason else "",
            extra=about(release, actor=str(actor), event="created")))
        return Made(release, plan.batches, plan.left_out, is_same, [*plan.warnings, *warnings], superseded)

    def _make_again(self, verb: str, release_id: int, actor: Who, wish: Again, key: IdempotencyKey | None) -> Made:
        with self._database.transaction(write=True) as tx:
            return self._replay(tx, key) or self._keep_for_replay(
                tx, key, self._create(tx, actor, *plan_again(tx, verb, release_id, wish)))

    def _replay(self, tx: Transaction, key: IdempotencyKey | None) -> Made | None:
        """Return what a key has made, or None; raise AppError 3002 where that was for another request."""
        if key is None:
            return None
        # the index idempotency_keys_by_age
        tx.execute("DELETE FROM idempotency_keys WHERE created_at < ?",
                   utc_text(self._state.clock.wall() - IDEMPOTENCY_KEY_S))
        row = tx.row("SELECT request_sha256, release_task_id, left_out, warnings, superseded FROM idempotency_keys "
                     "WHERE actor = ? AND idempotency_key = ?", key.actor, key.key)
        if row is None:
            return None
        if row[0] != key.request_sha256:
            raise AppError(EXISTS, f"Idempotency-Key {key.key} was used for another request, which made release "
                                   f"{row[1]}: take a new key")
        batches: dict[int, list[int]] = {}
        for batch, node_id in tx.rows("SELECT batch, node_id FROM release_task_nodes WHERE release_task_id = ? "
                                      "ORDER BY batch, id", row[1]):
            batches.setdefault(batch, []).append(node_id)
        # the index release_events_of_releases
        detail = tx.value("SELECT detail FROM release_events WHERE release_task_id = ? AND node_id IS NULL AND "
                          "event = 'created'", row[1]) or ""
        return Made(read_release(tx, row[1]), list(batches.values()), [LeftOut(*one) for one in parse_json(row[2])],
                    CHANGES_NOTHING in detail.split("; "), parse_json(row[3]),
                    [Superseded(*one) for one in parse_json(row[4])])

    def _keep_for_replay(self, tx: Transaction, key: IdempotencyKey | None, made: Made) -> Made:
        if key:
            tx.execute("INSERT INTO idempotency_keys (actor, idempotency_key, request_sha256, release_task_id, "
                       "created_at, left_out, warnings, superseded) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *key,
                       made.release.id, self._state.now(), to_json(made.left_out), to_json(made.warnings),
                       to_json(made.superseded))
        return made

    @staticmethod
    def _accept_failures(tx: Transaction, release: Release, reason: str) -> str:
        """Mark all failures as accepted; return the text for the event."""
        count = tx.execute("UPDATE release_task_nodes SET accepted = 1 "
                           "WHERE release_task_id = ? AND status = 'failed' AND accepted = 0", release.id)
        return "; ".join(filter(None, (reason, f"failures accepted: {count}")))

    @staticmethod
    def _accept_silence(tx: Transaction, release: Release, reason: str) -> str:
        """Let a release go on without asking its agents again; return the text for the event."""
        tx.execute("UPDATE release_tasks SET preflight_accepted = 1 WHERE id = ?", release.id)
        return "; ".join(filter(None, (reason, "goes on though agents did not answer the preflight")))


# endregion


# region History
# ======================================================================================
# History: releases that ended long ago, which prune deletes.
# Uses: Vocabulary, Helpers, Plan, Database state, Audit, Nodes, Retry and rollback,
#   Drift.
# ======================================================================================

def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Return numbers as [first, last] of each run of consecutive ones."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


class History:
    """Releases that ended long ago. Each public method is one transaction."""

    def __init__(self, state: DatabaseState, audit: Audit):
        self._state = state
        self._database = state.database
        self._audit = audit

    def prunable(self, older_than_s: float, keep: int) -> list[OldRelease]:
        """Return the releases that ended so long ago and are not needed, newest first; keep: of each target."""
        before = utc_text(self._state.clock.wall() - older_than_s)
        with self._database.transaction() as tx:
            releases = [OldRelease(*row) for row in tx.rows("""
                SELECT id, target, version, status, retry_of, rollback_of, total_nodes,
                       CASE WHEN status IN ('success', 'partial', 'failed', 'cancelled')
                            THEN COALESCE(finished_at, updated_at) ELSE '' END, catch_up_of
                FROM release_tasks""")]
            bad = {target: rolled_back(tx, target) for target in {release.target for release in releases}}
            newest = tx.value("SELECT release_task_id FROM release_events ORDER BY id DESC LIMIT 1") or 0
            unsent = {row[0] for row in tx.rows("SELECT release_task_id FROM notifications "
                                                "WHERE release_task_id IS NOT NULL")}
            needed = set().union({newest}, unsent, *(level.needs for level in levels(tx, all_nodes(tx)).values()))

            def content_of(release: OldRelease) -> Content:
                digest = stored_digest(tx, release.id)
                rows = tx.rows("SELECT node_id, status FROM release_task_nodes "
                               "WHERE release_task_id = ? AND status IN ('success', 'failed', 'running')", release.id)
                return Content(digest, frozenset(node_id for node_id, _ in rows),
                               frozenset(node_id for node_id, status in rows if status == SUCCESS),
                               release.version <= bad[release.target].get(digest, 0))

            return prunable(releases, before, keep, content_of, needed)

    def delete(self, release_ids: Sequence[int], by: Who = PROGRAM) -> list[int]:
        """Delete up to NODES_PER_STATEMENT terminal releases, with nodes and events; return the ids of those deleted.

        A release stays where somebody made a retry or a rollback of it meanwhile, or a notification of it is to go.
        """
        with self._database.transaction(write=True) as tx:
            marks = ", ".join("?" * len(release_ids)) or "NULL"
            # another prune may have been quicker
            going = {row[0] for row in tx.rows(
                f"SELECT id FROM release_tasks r WHERE id IN ({marks}) AND NOT EXISTS "
                "(SELECT 1 FROM notifications n WHERE n.release_task_id = r.id)", *release_ids)}
            while going:  # each round may spare more, which one of them names
                marks = ", ".join("?" * len(going))
                # the indexes release_tasks_by_retry_of, release_tasks_by_rollback_of and release_tasks_by_catch_up_of
                named = {row[0] for column in ("retry_of", "rollback_of", "catch_up_of") for row in tx.rows(
                    f"SELECT {column} FROM release_tasks WHERE {column} IN ({marks}) AND id NOT IN ({marks})",
                    *going, *going)}
                if not named & going:
                    for table_name in ("idempotency_keys", "release_events", "release_task_nodes"):
                        tx.execute(f"DELETE FROM {table_name} WHERE release_task_id IN ({marks})", *going)
                    tx.execute(f"DELETE FROM release_tasks WHERE id IN ({marks})", *going)
                    self._audit.add(tx, by, PRUNE, "releases", {"releases": _ranges(going)})
                    break
                going -= named
            return sorted(going)


# endregion


# region Notifications
# ======================================================================================
# Notifications: the outbox: messages that are still to go (contract section 2).
# Uses: Vocabulary, Helpers, Failures, Decision, Verdict, Database state, Audit,
#   Queue.
#
#   A row is written by add_notification() (Audit), in the transaction of what it tells. Whoever sends it
#   first moves next_at ahead under the number of tries that was read: so one process sends it, and when
#   that dies it is due again.
# ======================================================================================

# Within this time a try has ended, or its process is dead: then another one may try.
SENDING_S = 40.0
# The wait after a failed try, at first and at most; how old a notification is that is given up when a try fails.
NOTIFY_AGAIN_S, NOTIFY_AGAIN_MAX_S, NOTIFY_GIVE_UP_S = 5.0, 600.0, 86400.0


class Notification(NamedTuple):
    """A row of notifications."""
    id: int
    kind: str
    # None: it is of the freeze.
    release_id: int | None
    at: str
    detail: str
    # The message, the same at each try; "" before the first one.
    body: str
    # The receivers that have it, with a space between.
    sent_to: str
    attempts: int
    # Nobody tries it before that, by Transaction.now().
    next_at: str
    last_error: str


class Outbox:
    """Messages that are still to go. Each public method is one transaction."""

    COLUMNS = "id, kind, release_task_id, at, detail, body, sent_to, attempts, next_at, last_error"

    def __init__(self, state: DatabaseState):
        self._state = state
        self._database = state.database

    def next(self, min_age_s: float = 0.0) -> tuple[Notification | None, float]:
        """Return the message that is due first, None where the outbox is empty, and in how many seconds it is due.

        One that was never tried goes before those that a receiver did not take.
        """
        with self._database.transaction() as tx:
            now_s = epoch_of(tx.now())
            until = utc_text(now_s - min_age_s) if min_age_s else "9"
            # the index notifications_by_next
            select, order = f"SELECT {self.COLUMNS} FROM notifications WHERE at <= ?", "ORDER BY next_at, id LIMIT 1"
            row = tx.row(f"{select} AND attempts = 0 AND next_at <= ? {order}", until, utc_text(now_s)) or \
                tx.row(f"{select} {order}", until)
        if row is None:
            return None, float("inf")
        found = Notification(*row)
        wait_s = epoch_or(found.next_at, 0.0) - now_s
        return found, wait_s if 0 < wait_s <= NOTIFY_AGAIN_MAX_S else 0.0  # further: a clock was ahead

    def begin_try(self, notification: Notification, body: str) -> Notification | None:
        """Note that a message is being sent now; return it as it is then, None where another process was quicker."""
        with self._database.transaction(write=True) as tx:
            changed = tx.execute("UPDATE notifications SET body = ?, attempts = attempts + 1, next_at = ? "
                                 "WHERE id = ? AND attempts = ?", body,
                                 utc_text(epoch_of(tx.now()) + SENDING_S), notification.id, notification.attempts)
        return notification._replace(body=body, attempts=notification.attempts + 1) if changed else None

    def end_try(self, notification: Notification, error: str, actor: Who) -> str:
        """Write what became of a message in a try; return SENT, UNDELIVERED or GIVEN_UP.

        error: of a receiver that has not got it, "" where each has it. Who was suspended for long deletes what it sent,
        and else changes nothing.
        """
        with self._database.transaction(write=True) as tx:
            if not error:
                tx.execute("DELETE FROM notifications WHERE id = ?", notification.id)
                return SENT
            mine, now_s = (notification.id, notification.attempts), epoch_of(tx.now())
            if now_s - epoch_or(notification.at, now_s) < NOTIFY_GIVE_UP_S:
                tx.execute("UPDATE notifications SET sent_to = ?, last_error = ?, next_at = ? "
                           "WHERE id = ? AND attempts = ?", notification.sent_to, error,
                           utc_text(now_s + backoff_s(notification.attempts, notification.id, NOTIFY_AGAIN_S,
                                                      NOTIFY_AGAIN_MAX_S)), *mine)
                return UNDELIVERED
            if tx.execute("DELETE FROM notifications WHERE id = ? AND attempts = ?", *mine):
                release = None if notification.release_id is None else find_release(tx, notification.release_id)
                if release:
                    add_events(tx, self._state.now(), actor, [NewEvent(
                        release.id, NOTIFY_GIVEN_UP, release.status, release.status,
                        f"{notification.kind} of {notification.at}, after {notification.attempts} tries: {error}")])
            return GIVEN_UP

    def failures(self, release_id: int) -> list[FailureGroup]:
        """Return the failed nodes of a release by cause."""
        with self._database.transaction() as tx:
            return read_failures(tx, release_id)

    def waiting(self) -> Waiting:
        """Return how many messages wait, since when, and why."""
        with self._database.transaction() as tx:
            total, oldest = tx.row("SELECT COUNT(*), MIN(at) FROM notifications") or (0, None)
            if not total:
                return NO_WAITING
            error = tx.value("SELECT last_error FROM notifications WHERE last_error <> '' "
                             "ORDER BY next_at DESC LIMIT 1") or ""
            now_s = epoch_of(tx.now())
            return Waiting(total, max(0.0, now_s - epoch_or(oldest, 0.0)), oldest, error)

    def figures(self) -> dict[tuple[str, ...], float]:
        """Return the figures of METRICS on the outbox."""
        waiting = self.waiting()
        return {("releasectl_notifications_waiting",): waiting.total,
                ("releasectl_notifications_oldest_age_seconds",): waiting.oldest_s}

    def quiet_releases(self, quiet_s: float) -> list[int]:
        """Return the releases of which nothing was written for so long, and which somebody should be working on.

        Of those that are pending the first of each target: the others wait for it. Of paused ones those with nodes in
        flight, whose answers nobody gets.
        """
        with self._database.transaction() as tx:
            # the indexes release_tasks_by_status and release_task_nodes_by_status
            return [row[0] for row in tx.rows(f"""
                SELECT id
                FROM release_tasks r
                WHERE updated_at < ? AND (
                    status IN ('running', 'cancelling')
                    OR (status = 'paused' AND EXISTS (
                        SELECT 1 FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'running'))
                    OR (status = 'pending' AND approval <> 'wanted' AND NOT EXISTS (
                        SELECT 1 FROM release_tasks p
                        WHERE p.status = 'pending' AND p.approval <> 'wanted' AND p.target = r.target
                        AND (p.goes_first > r.goes_first OR (p.goes_first = r.goes_first AND p.version < r.version)))))
                    AND status IN {OPEN_RELEASES}
                ORDER BY id""", utc_text(self._state.clock.wall() - quiet_s))]

    def note_stuck(self, release_id: int, why: str, actor: Who) -> None:
        """Write that a release is stuck, unless that is the last that was written of it."""
        with self._database.transaction(write=True) as tx:
            release = find_release(tx, release_id)
            # the index release_events_of_releases
            last = tx.value("SELECT event FROM release_events WHERE release_task_id = ? AND node_id IS NULL "
                            "ORDER BY id DESC LIMIT 1", release_id)
            if release and not release.is_terminal and last != STUCK:
                add_events(tx, self._state.now(), actor, [NewEvent(release_id, STUCK, release.status, release.status,
                                                                   why)])


# endregion


# region Claims
# ======================================================================================
# Claims: claim, lease, fence, commit.
# Uses: Vocabulary, Helpers, Payloads, Model, Freezes, Plan, Status texts, Decision,
#   Why, Database, Database state, Audit, Nodes, Queue, Drift, Approvals, Releases.
# ======================================================================================

class DispatchBlockers(NamedTuple):
    """What may keep a release from its dispatches."""
    # Addresses that another release has in flight, or that may still be busy with a lost request.
    busy: frozenset[Endpoint]
    freezes: Freezes
    # Seconds since the database went back or moved to another server, which may not know the last dispatches.
    moved_s: float


# A row of executors that is older than this tells nothing; one that is further ahead is of a clock that was ahead.
MAX_EXECUTOR_AGE_S, MAX_EXECUTOR_AHEAD_S = 86400.0, 60.0
# Seconds between two ticks of a host: the first ones are taken for cron's shortest period, later ones are measured.
FIRST_TICK_PERIOD_S, MAX_TICK_PERIOD_S = 60.0, 900.0


class Claims:
    """What an executor does with releases, most of it under a claim. Each public method is one transaction."""

    def __init__(self, state: DatabaseState, queue: Queue, releases: Releases):
        self._state = state
        self._database = state.database
        self._queue = queue
        self._releases = releases

    def scan(self, owner: Who = PROGRAM) -> tuple[list[int], list[int]]:
        """Return the ids of the releases that may be claimed now, and of those that others have claimed.

        Whoever scans first after the end of a freeze writes that down. Those that need an approval (APPROVALS) and do
        not ask for one do from now on.
        """
        with self._state.checked_read() as tx:
            found = self._queue.runnable(tx)
            is_to_write = bool(over_freezes(tx) or unasked(tx))
        if self._state.is_rewind_unwritten or is_to_write:
            with self._database.transaction(write=True) as tx:
                if self._state.is_rewind_unwritten:
                    self._state.write_rewind(tx)
                self._queue.end_freezes(tx, owner)
                for release_id in unasked(tx):
                    set_approval(tx, read_release(tx, release_id), WANTED, self._state.now(), owner, "")
                self._queue.explain_waiting(tx)
                found = self._queue.runnable(tx)
        return found

    def note_executor(self, owner: str, host: str, kind: str, period_s: float, error: str, is_first: bool) -> bool:
        """Write that an executor looks for work and is seen again within period_s; its first row clears old ones.

        A tick takes the place of earlier ticks of its host, and is seen again when cron starts the next one; one that
        is still to be seen again, and has a receiver that this one lacks, stays. Return whether notifications wait.
        """
        with self._state.noted_write("executors") as tx:
            now, notify_on = tx.now(), ",".join(sorted(self._database.notify_on))
            approvals = int(self._database.approvals)
            if is_first:
                tx.execute("DELETE FROM executors WHERE seen_at < ? OR seen_at > ?",
                           utc_text(epoch_of(now) - MAX_EXECUTOR_AGE_S), utc_text(epoch_of(now) + MAX_EXECUTOR_AHEAD_S))
            others = [row for row in read_executors(tx) if (row.host, row.kind) == (host, kind) and row.owner != owner]
            gone = [row.owner for row in others if not row.is_live(epoch_of(now))]
            for other in gone if is_first else ():  # it may have had other settings
                tx.execute("UPDATE executors SET notify_on = '', approvals = 0 WHERE owner = ?", other)
            if kind == TICK:
                known_s = tx.value("SELECT period_sec FROM executors WHERE owner = ?", owner)
                before = max((row.started_at for row in others), default="")
                between_s = epoch_of(now) - epoch_or(before, 0.0) if before else 0.0
                period_s = known_s or period_s + min(max(between_s, FIRST_TICK_PERIOD_S), MAX_TICK_PERIOD_S)
                for row in others:
                    tx.execute("DELETE FROM executors WHERE owner = ? "
                               "AND (? = 1 OR (notify_on IN ('', ?) AND approvals <= ?))",
                               row.owner, int(row.owner in gone), notify_on, approvals)
            tx.execute("""
                INSERT INTO executors (owner, host, kind, started_at, seen_at, period_sec, error, notify_on,
                                       approvals)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (owner) DO UPDATE
                SET seen_at = excluded.seen_at, period_sec = excluded.period_sec, error = excluded.error,
                    notify_on = excluded.notify_on, approvals = excluded.approvals""",
                       owner, host, kind, now, now, period_s, one_line(error), notify_on, approvals)
            return bool(tx.value("SELECT COUNT(*) FROM (SELECT 1 FROM notifications LIMIT 1) waiting"))

    def end_executor(self, owner: str) -> None:
        """Write that an executor was stopped: it is not seen again."""
        with self._database.transaction(write=True) as tx:
            tx.execute("UPDATE executors SET seen_at = ?, period_sec = 0 WHERE owner = ?", tx.now(), owner)

    def claim(self, release_id: int, owner: str, ttl_s: float) -> Claim | None:
        """Claim a release for ttl_s seconds; return None where another process was first or the release must wait.

        A claim raises the fence, so a late write of an earlier owner is refused.
        """
        with self._database.transaction(write=True) as tx:
            if release_id not in self._queue.runnable(tx)[0] or release_id in unasked(tx):
                return None
            self._state.note_timeline(tx)
            before = read_release(tx, release_id)
            if before.status == PENDING:
                why = no_longer_wanted(tx, before)
                if why:
                    self._queue.end_unstarted(tx, before, owner, why)
                    return None
                renumbered = self._renumber(tx, before, owner)
                if renumbered != before and release_id not in self._queue.runnable(tx)[0]:
                    self._queue.explain_waiting(tx)
                    return None  # by its new version others come first
                before = renumbered
            self._fill_row(tx, before)
            now, expires = tx.now(), expiry_of(tx, ttl_s)
            started = tx.execute(f"""
                UPDATE release_tasks
                SET status = 'running', started_at = COALESCE(started_at, ?), updated_at = ?, status_reason = ?,
                    {COUNTERS},
                    total_nodes = (SELECT COUNT(*) FROM release_task_nodes n
                                   WHERE n.release_task_id = release_tasks.id)
                WHERE id = ? AND status = 'pending'""", now, now, f"taken by {owner}", release_id)
            if started:
                add_events(tx, now, owner, [NewEvent(release_id, "started", PENDING, RUNNING)])
            changed = tx.execute("""
                UPDATE release_tasks
                SET claim_owner = ?, claim_fence = claim_fence + 1, claim_expires_at = ?
                WHERE id = ? AND status IN ('running', 'paused', 'cancelling')
                  AND (claim_expires_at IS NULL OR claim_expires_at <= ? OR claim_expires_at > ?)""",
                                 owner, expires, release_id, now, latest_expiry(now))
            if not changed:
                raise StateMoved(f"release {release_id} was claimed by a writer outside of the lock")
            if before.status != PENDING and before.claim_expires_at is not None:
                add_events(tx, self._state.now(), owner, [NewEvent(
                    release_id, TAKEN_OVER, before.status, before.status,
                    f"taken over by {owner} from {before.claim_owner}, whose claim had run out")])
            self._queue.explain_waiting(tx)
            tx.after_commit.append(lambda: self._log_claim(before, owner))
            return Claim(release_id, before.claim_fence + 1, before.version, owner, self._state.generation)

    def renew(self, claim: Claim, ttl_s: float) -> bool:
        """Keep a claim for ttl_s seconds from now; return False where it is lost."""
        with self._database.transaction(write=True) as tx:
            return tx.execute("UPDATE release_tasks SET claim_expires_at = ? WHERE id = ? AND claim_fence = ? "
                              "AND claim_owner = ? AND claim_expires_at IS NOT NULL",
                              expiry_of(tx, ttl_s), claim.release_id, claim.fence, claim.owner) == 1

    def drop(self, claim: Claim) -> None:
        """Give a claim up, so that anyone may claim the release at once."""
        with self._database.transaction(write=True) as tx:
            tx.execute("UPDATE release_tasks SET claim_owner = '', claim_expires_at = NULL "
                       "WHERE id = ? AND claim_fence = ? AND claim_owner = ?",
                       claim.release_id, claim.fence, claim.owner)

    def read(self, claim: Claim) -> Release:
        """Return the release of a claim; raise ClaimLost where it has another owner or none, or is gone."""
        with self._state.checked_read() as tx:
            return self._read_claimed(tx, claim)

    def read_with_nodes(self, claim: Claim) -> tuple[Release, list[ReleaseNode]]:
        """Return the release of a claim and its nodes; raise ClaimLost."""
        with self._state.checked_read() as tx:
            return self._read_claimed(tx, claim), read_release_nodes(tx, claim.release_id)

    def holds(self, release_id: int) -> list[Hold]:
        """Return when pauses and freezes held a release."""
        with self._database.transaction() as tx:
            # the index release_events_of_releases
            history = [(at, event, status) for at, event, status in tx.rows(
                "SELECT at, event, to_status FROM release_events WHERE release_task_id = ? AND node_id IS NULL "
                "ORDER BY id", release_id)]
            release, stored = read_release(tx, release_id), read_set_freezes(tx)
            over = stored.of(release).until
            if over and not stored.in_force(tx.now()).of(release).frozen:  # nobody has written that down yet
                history.append((over, UNFROZEN, release.status))
            return holds_of(history)

    def dispatch_blockers(self, release_id: int) -> DispatchBlockers:
        """Return what may keep a release from its dispatches."""
        with self._database.transaction() as tx:
            moved_at = tx.value("SELECT moved_at FROM database_state WHERE id = 1")
            moved_s = epoch_of(tx.now()) - epoch_or(moved_at, 0.0) if moved_at else float("inf")
            if moved_s < 0:  # the clock of the server before was ahead
                moved_s = float("inf")
            return DispatchBlockers(self._busy(tx, release_id), read_freezes(tx),
                                    min(moved_s, self._state.clock.elapsed() - self._state.changed_at))

    def commit(self, claim: Claim, release: Release, decision: Decision, now: Moment, actor: Who,
               counts: bool = False) -> None:
        """Write a decision on a release as it was read, or nothing; counts: see counters_after().

        Raise ClaimLost where the release has another owner, StateMoved where the release or a node changed, or a
        dispatch may not leave. After a DatabaseError only was_written() tells.
        """
        with self._database.transaction(write=True) as tx:
            stored = self._read_claimed(tx, claim)
            begun = [c.after for c in decision.changes if c.after.attempts > c.before.attempts]
            starting = {c.after.endpoint for c in decision.changes
                        if (c.before.status, c.after.status) == (PENDING, RUNNING)}
            if starting and starting & self._busy(tx, claim.release_id):
                raise StateMoved(f"another release has a node of {release} in flight")
            self._raise_last_versions(tx, release, [node.node_id for node in begun])
            if begun and read_freezes(tx).of(stored).frozen:
                raise StateMoved(f"a freeze came before a dispatch of {release}")
            write_nodes(tx, release.id, decision.changes, now)
            rollback, text, mend = self._releases.plan_rollback_of(tx, release) if decision.rolls_back else (
                None, "", "")
            detail = "; ".join(filter(None, (text and decision.error_msg, text, mend)))
            self._queue.write_decision(tx, release, decision.with_sequel(text, mend), now, actor, claim, detail, counts)
            if rollback is not None:
                self._releases.create_sequel(tx, actor, rollback)

    def was_written(self, claim: Claim, decision: Decision) -> bool:
        """Return whether a commit that ended in an error took place; raise ClaimLost where another owner came since.

        In a writing transaction, which starts only when the server has ended the one in doubt.
        """
        with self._database.transaction(write=True) as tx:
            # not _read_claimed(): the end of a release gives its claim up
            release = read_release(tx, claim.release_id)
            if release.claim_fence != claim.fence or release.claim_owner not in ("", claim.owner):
                raise ClaimLost(f"{release} is with {release.claim_owner or 'nobody'} now")
            rows = {row.node_id: row for row in read_release_nodes(tx, claim.release_id)}
        if decision.changes:  # only nodes are compared: an operator may have changed the release since
            return all(decided_node_values(rows[change.after.node_id]) == decided_node_values(change.after)
                       for change in decision.changes)
        if decision.status in TERMINAL:  # its status_reason tells of the rollback, too
            return release.status == decision.status
        return bool(decided_values(release) == decided_values(decision))

    def why(self, release_id: int | None, node_deadline_s: float) -> Why:
        """Return what a release waits for, None: that none is open; raise AppError 3001.

        node_deadline_s: NODE_DEADLINE_SEC, for a strategy without its own.
        """
        with self._database.transaction() as tx:
            release = None if release_id is None else as_read(read_release(tx, release_id))
            facts = Facts(release, (), NO_FREEZES, self._state.moment(), epoch_of(tx.now()),
                          database_error=self._state.write_error)
            if release is None or not release.is_terminal:
                facts = facts._replace(executors=read_executors(tx), freezes=read_freezes(tx))
            if release is None or release.is_terminal:
                return explain(facts)
            batches, strategy = read_batches(tx, release.id), strategy_of(release.strategy)
            batch = next((b.number for b in batches if b.is_open), 0)
            return explain(facts._replace(
                batches=batches, strategy=strategy,
                running=self._in_flight(tx, release.id, strategy.node_deadline_s or node_deadline_s, facts.now),
                ahead=self._queue.ahead_of(tx, release.id) if release.status == PENDING else (),
                keepers=self._keepers(tx, release.id, facts.now) if strategy.max_parallel_per else (),
                waiting=self._waiting(tx, release.id, batch) if strategy.max_parallel_per else {},
                busy=self._busy_nodes(tx, release.id, batch),
                exceeded=read_exceeded(tx, release, batches) if release.status == PAUSED else ""))

    @staticmethod
    def _keepers(tx: Transaction, release_id: int, now: Moment) -> list[Keeper]:
        """Return the nodes of a release that run, or failed and may still be busy, by id."""
        # the index release_task_nodes_by_status
        rows = [Keeper(labels, name, None if status == RUNNING else now.until_s(until, mark))
                for labels, name, status, until, mark in tx.rows(f"""
            SELECT {LABELS_THEN}, {NAME_THEN}, n.status, n.hold_until, n.hold_clock
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ? AND n.status IN ('running', 'failed')
              AND (n.status = 'running' OR n.hold_until IS NOT NULL)
            ORDER BY n.node_id""", release_id)]
        return [keeper for keeper in rows if keeper.left_s is None or 0 < keeper.left_s <= MAX_BUSY_S]

    @staticmethod
    def _waiting(tx: Transaction, release_id: int, batch: int) -> dict[str, int]:
        """Return how many nodes of a batch are pending, by their labels."""
        # the index release_task_nodes_by_status
        return dict(tx.rows(f"""
            SELECT {LABELS_THEN}, COUNT(*)
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ? AND n.status = 'pending' AND n.batch = ?
            GROUP BY 1""", release_id, batch))

    @staticmethod
    def _in_flight(tx: Transaction, release_id: int, deadline_s: float, now: Moment) -> list[tuple[float, str]]:
        """Return how long each running node still has until its deadline, and its name."""
        # the index release_task_nodes_by_status
        return sorted((deadline_s + waited_s + now.until_s(started_at, mark), name)
                      for name, started_at, mark, waited_s in tx.rows(f"""
            SELECT {NAME_THEN}, n.started_at, n.started_clock, n.waited_sec
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ? AND n.status = 'running'""", release_id))

    def _busy_nodes(self, tx: Transaction, release_id: int, batch: int) -> list[tuple[str, Occupant]]:
        """Return the pending nodes of a batch whose address is busy: their names, with what keeps it so."""
        occupied = self._occupied(tx, release_id)
        # the index release_task_nodes_by_status; there may be many: only where one can be busy
        return [(name, occupied[address]) for name, ip, port in (tx.rows(f"""
            SELECT {NAME_THEN}, {ADDRESS_THEN}
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ? AND n.status = 'pending' AND n.batch = ?
            ORDER BY n.node_id""", release_id, batch) if occupied else ())
                for address in [endpoint_of(ip, port)] if address in occupied]

    def times_ahead(self) -> list[str]:
        """Return a text for each claim and hold further ahead than any setting allows, which therefore is void.

        A process whose clock was ahead wrote it.
        """
        with self._database.transaction() as tx:
            now = tx.now()
            claims = tx.rows("SELECT id, claim_owner, claim_expires_at FROM release_tasks "
                             f"WHERE status IN {OPEN_RELEASES} AND claim_expires_at > ?", latest_expiry(now))
            holds = tx.rows(f"SELECT {NAME_THEN}, n.hold_until FROM release_task_nodes n "
                            "JOIN nodes h ON h.id = n.node_id WHERE n.hold_until IS NOT NULL AND n.hold_until > ?",
                            utc_text(self._state.clock.wall() + MAX_BUSY_S))
        return [*(f"release {id_} is claimed by {owner} until {until}" for id_, owner, until in claims),
                *(f"node {name} is kept free until {until}" for name, until in holds)]

    def _renumber(self, tx: Transaction, release: Release, owner: str) -> Release:
        """Give a release that starts the next version, where nodes may have a higher one (rule 2).

        It was overtaken: it waited for something while later ones started, or one that goes first did; or it is below
        the first version that a person named. Else it keeps its version, by which agents may know it already where a
        failover lost its start.
        """
        first_version = tx.value("SELECT first_version FROM database_state WHERE id = 1")
        if release.version < first_version:
            why = f"agents may have versions below {first_version} (migrate --first-version)"
        elif overtaker := self._queue.overtaker(tx, release):
            why = f"{overtaker} went out before it"
        else:
            return release
        version = self._state.next_version(tx, release.id)
        self._state.seen.use_version(version)
        payload = None
        with contextlib.suppress(ValueError, AppError):  # one that can't be used ends the release: Driver
            payload = to_json(payload_for_version(read_payload(release.payload), version))
        tx.execute("UPDATE release_tasks SET version = ?, payload = COALESCE(?, payload) WHERE id = ?",
                   version, payload, release.id)
        text = f"version {release.version} became {version}: {why}"
        add_events(tx, self._state.now(), owner, [NewEvent(release.id, "renumbered", PENDING, PENDING, text)])
        tx.after_commit.append(lambda: log.info("%s: %s", release, text,
                                                extra=about(release, actor=owner, event="renumbered")))
        return read_release(tx, release.id)

    @staticmethod
    def _fill_row(tx: Transaction, release: Release) -> None:
        """Set the columns that a person who wrote the rows of a release left out."""
        if not release.sent_sha256:
            tx.execute("UPDATE release_tasks SET payload_sha256 = ? WHERE id = ?", digest_of_stored(release.payload),
                       release.id)
        if release.tag:
            return
        # a release of before schema 5 that is under way gets none: agents know its tasks by ids without a tag
        tx.execute("""
            UPDATE release_tasks
            SET tag = ?
            WHERE id = ? AND NOT EXISTS (SELECT 1 FROM release_task_nodes n
                                         WHERE n.release_task_id = release_tasks.id AND n.task_id <> '')""",
                   new_tag(), release.id)
        # it is for the nodes that the person gave it
        tx.execute("UPDATE release_tasks SET selection = ? WHERE id = ? AND selection = '{}'",
                   to_json({"nodesOf": release.id}), release.id)
        fill_node_addresses(tx, release.id)

    def _log_claim(self, before: Release, owner: str) -> None:
        """Log and count a claim."""
        if before.status == PENDING:
            log.info("%s: started, taken by %s", before, owner, extra=about(before, actor=owner, event="started"))
        elif before.claim_expires_at is not None:
            self._database.metrics.count("releasectl_takeovers_total")
            log.warning("%s: taken over by %s from %s, whose claim had run out", before, owner, before.claim_owner,
                        extra=about(before, actor=owner, event=TAKEN_OVER))
        else:
            log.debug("%s: taken by %s", before, owner, extra=about(before, actor=owner, event="taken"))

    def _read_claimed(self, tx: Transaction, claim: Claim) -> Release:
        """Do read() in a transaction, and report where the database went back since the claim."""
        release = find_release(tx, claim.release_id)
        if release is None or release.version != claim.version:
            self._state.report_rewind(claim, f"{claim} is gone")
            raise ClaimLost("it is no longer in the database")
        if release.claim_fence < claim.fence:
            self._state.report_rewind(
                claim, f"the claim number of {claim} is {release.claim_fence} after {claim.fence}")
        if (release.claim_fence, release.claim_owner) != (claim.fence, claim.owner) or release.claim_expires_at is None:
            raise ClaimLost(f"{release} is with {release.claim_owner or 'nobody'} now")
        return release

    def _busy(self, tx: Transaction, release_id: int) -> frozenset[Endpoint]:
        return frozenset(self._occupied(tx, release_id))

    def _occupied(self, tx: Transaction, release_id: int) -> dict[Endpoint, Occupant]:
        """Return the addresses that another release has in flight, or that may still be busy with a lost request."""
        now = self._state.moment()
        # Each half has a small partial index: release_task_nodes_one_running, _held. Holds that ended up to a week ago
        # are read too: the wall clock may have been set since, and until_s() goes by the elapsed clock.
        rows = tx.rows(f"""
            SELECT {ADDRESS_THEN}, n.release_task_id, n.status, n.hold_until, n.hold_clock
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.status = 'running' AND n.release_task_id <> ?
            UNION ALL
            SELECT {ADDRESS_THEN}, n.release_task_id, n.status, n.hold_until, n.hold_clock
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.hold_until IS NOT NULL AND n.hold_until > ?
              AND (n.release_task_id <> ? OR n.status IN ('success', 'failed'))""",
                       release_id, utc_text(now.wall - 7 * 86400), release_id)
        return {endpoint_of(main_ip, port): Occupant(by, None if status == RUNNING else now.until_s(until, mark))
                for main_ip, port, by, status, until, mark in rows
                if status == RUNNING or 0 < now.until_s(until, mark) <= MAX_BUSY_S}

    @staticmethod
    def _raise_last_versions(tx: Transaction, release: Release, node_ids: Sequence[int]) -> None:
        """Store that nodes are sent a version; raise StateMoved where one was sent a higher one."""
        for start in range(0, len(node_ids), NODES_PER_STATEMENT):
            part = node_ids[start:start + NODES_PER_STATEMENT]
            marks = ", ".join("?" * len(part))
            tx.execute(f"UPDATE nodes SET last_version = ? WHERE last_version < ? AND id IN ({marks})",
                       release.version, release.version, *part)
            # the index nodes_by_address: a host that was registered again has two rows
            if tx.value(f"""
                    SELECT COUNT(*)
                    FROM nodes h
                    JOIN nodes a ON a.main_ip = h.main_ip AND a.agent_port = h.agent_port
                    WHERE h.id IN ({marks}) AND a.last_version > ?""", *part, release.version):
                raise StateMoved(f"a node of {release} was sent a higher version")


# endregion


# region Overview
# ======================================================================================
# Overview: what the verdict is made from; the store that all parts make up.
# Uses: Vocabulary, Helpers, Model, Status texts, Why, Verdict, Database, Database
#   state, Audit, Nodes, Queue, Retry and rollback, Drift, Approvals, Releases,
#   History, Notifications, Claims.
# ======================================================================================

class OverviewReader:
    """Reads what is wrong. Each public method is one transaction, or two."""

    def __init__(self, state: DatabaseState, queue: Queue, fleet: Fleet, outbox: Outbox):
        self._state = state
        self._database = state.database
        self._queue = queue
        self._fleet = fleet
        self._outbox = outbox
        self._failures = RareRead(self._read_failures)
        self._startable = RareRead(self._read_startable)
        # Since when read() found the database not to be used, None where it could be.
        self._down_since: str | None = None

    def read(self, certificates: Sequence[CertificateState]) -> Overview:
        """Return the verdict on all there is; also where the database is out of reach."""
        facts = OverviewFacts(certificates=certificates, database_error=self._state.write_error)
        try:
            with self._database.transaction() as tx:
                active = [Release(*row) for row in tx.rows(f"""
                    SELECT {LISTED_COLUMNS}
                    FROM release_tasks r
                    WHERE r.status IN ('running', 'paused', 'cancelling')
                    ORDER BY r.id""")]
                pending, oldest = tx.row("SELECT COUNT(*), MIN(created_at) FROM release_tasks "
                                         "WHERE status = 'pending'") or (0, None)
                awaiting = [Release(*row) for row in tx.rows(
                    f"SELECT {LISTED_COLUMNS} FROM release_tasks r WHERE r.status = 'pending' "
                    "AND r.approval = 'wanted' AND r.started_at IS NULL ORDER BY r.id")]
                # the index release_events_of_releases
                paused_at = {release.id: at for release in active if release.status == PAUSED for at in [tx.value(
                    "SELECT MAX(at) FROM release_events "
                    "WHERE release_task_id = ? AND node_id IS NULL AND to_status = 'paused'", release.id)] if at}
                facts = facts._replace(active=active, pending=pending, oldest_pending=oldest, paused_at=paused_at,
                                       awaiting=awaiting, executors=read_executors(tx),
                                       freezes=read_freezes(tx), now_s=epoch_of(tx.now()))
                if pending and facts.now_s - epoch_or(oldest, 0.0) > TAKEN_WITHIN_S:
                    key = [release.id for release in active], pending
                    facts = facts._replace(startable=self._startable.get(tx, key=key))
            # what ended since the last look must not be missing in both
            key = [release.id for release in active], facts.pending
            fleet = self._fleet.counts(key)
            facts = facts._replace(failures=self._failures.get(key=key), drift=fleet.drift, twins=fleet.twins,
                                   twin=fleet.twin, notifications=self._outbox.waiting())
        except DatabaseError as error:
            facts = facts._replace(database_error=error.message)
        self._down_since = (self._down_since or self._state.now()) if facts.database_error else None
        return judge(facts._replace(database_error_at=self._down_since))

    def failure(self, release_id: int | None = None) -> Unmended | None:
        """Return a release, or the newest, that failed or ended partial and that nothing has made up for."""
        return next(iter(self._read_failures(release_id, 1)), None)

    def _read_startable(self, tx: Transaction) -> list[tuple[Release, float]]:
        """Return the first pending releases that may be claimed now, and since when."""
        found = map(functools.partial(find_release, tx), self._queue.runnable(tx)[0])
        waiting = [release for release in found if release and release.status == PENDING]
        return [(release, may_go_since(release, strategy_of(release.strategy))) for release in waiting]

    def _read_failures(self, release_id: int | None = None, most: int = MAX_ID) -> list[Unmended]:
        """Return the releases that failed or ended partial and that nothing has made up for, newest first.

        release_id: of this one alone. most: so many of them.

        One counts until somebody rolled it back, or each of its enabled nodes that failed, or was skipped, has a newer
        success of the target; for a skipped one, which runs what it ran before, it is enough that a later release of
        the target that has it was rolled back. A newer one for all nodes that succeeded makes up for it too: whom that
        did not reach is behind.
        """
        later = """
            SELECT 1
            FROM release_task_nodes s
            JOIN release_tasks q ON q.id = s.release_task_id
            WHERE s.node_id = n.node_id AND s.status = 'success' AND q.target = r.target AND q.version > r.version"""
        with self._database.transaction() as tx:
            # The indexes release_tasks_by_rollback_of, release_task_nodes_by_status and _succeeded. The later release
            # has a higher id, but where one started late: that is looked for last.
            found = [Release(*row) for row in tx.rows(f"""
                WITH newest AS (
                    SELECT target, MAX(version) AS version, MAX(CASE WHEN selection = '{{}}' AND COALESCE(
                        retry_of, rollback_of, catch_up_of) IS NULL THEN version END) AS for_all
                    FROM release_tasks
                    WHERE status = 'success'
                    GROUP BY target)
                SELECT {LISTED_COLUMNS}
                FROM release_tasks r
                LEFT JOIN newest w ON w.target = r.target
                WHERE r.status IN ('failed', 'partial') {"" if release_id is None else "AND r.id = ?"}
                  AND r.version > COALESCE(w.for_all, 0)
                  AND NOT EXISTS (SELECT 1 FROM release_tasks b
                                  WHERE b.rollback_of = r.id AND b.status IN ('success', 'partial'))
                  AND (EXISTS (
                          SELECT 1
                          FROM release_task_nodes n
                          JOIN nodes h ON h.id = n.node_id
                          WHERE n.release_task_id = r.id AND n.status IN ('failed', 'skipped') AND h.enabled = 1
                            AND NOT EXISTS ({later} AND s.release_task_id > r.id)
                            AND NOT EXISTS ({later} AND s.release_task_id < r.id)
                            AND NOT (n.status = 'skipped' AND EXISTS (
                                SELECT 1
                                FROM release_task_nodes s
                                JOIN release_tasks q ON q.id = s.release_task_id
                                JOIN release_tasks b ON b.rollback_of = q.id
                                WHERE s.node_id = n.node_id AND q.target = r.target AND q.version > r.version
                                  AND b.status IN ('success', 'partial'))))
                       OR (r.version > COALESCE(w.version, 0) AND NOT EXISTS (
                          SELECT 1 FROM release_task_nodes n WHERE n.release_task_id = r.id)))
                ORDER BY r.version DESC
                LIMIT ?""", *(() if release_id is None else (release_id,)), most)]
            return [self._unmended(tx, release) if place < MAX_OF_A_KIND else Unmended(release, "")
                    for place, release in enumerate(found)]

    @staticmethod
    def _unmended(tx: Transaction, release: Release) -> Unmended:
        """Return what would make up for a failure: a retry, one of the nodes without a newer success, or else."""
        rows = tx.rows("""
            SELECT h.id, h.name, h.status
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ? AND n.status IN ('failed', 'skipped') AND h.enabled = 1 AND NOT EXISTS (
                SELECT 1
                FROM release_task_nodes s
                JOIN release_tasks q ON q.id = s.release_task_id
                WHERE s.node_id = n.node_id AND s.status = 'success' AND q.target = ? AND q.version > ?)
            ORDER BY h.id""", release.id, release.target, release.version)
        release, rollback = as_read(release), release.rollback_id
        if rollback and release.rollback_status not in TERMINAL:
            return Unmended(release, f"releasectl why {rollback}", "")
        online = [(node_id, name) for node_id, name, status in rows if status == "online"]
        # a retry meets the same certificate: `check` names it, or has none to name any more
        by_tls = tx.row("SELECT MIN(error_kind), MAX(error_kind) FROM release_task_nodes "
                        "WHERE release_task_id = ? AND status = 'failed'", release.id) == (TLS, TLS)
        some = Again(node_ids=tuple(node_id for node_id, _ in online[:MAX_NAMED]))
        named = "".join(f" --node {shlex.quote(name)}" for _, name in online[:MAX_NAMED])
        refused, back = "", [("rollback", Again(), "")]
        # after a rollback that did not succeed a retry would bring back what somebody wanted to be rid of
        for verb, wish, words in (*(back if rollback else ()), ("retry", Again(), ""),
                                  *((("retry", some, named),) if online else ()), *back):
            try:
                plan_again(tx, verb, release.id, wish)
                first = "releasectl check; " if by_tls and verb == "retry" else ""
                return Unmended(release, f"{first}releasectl {verb} {release.id}{words} --plan", refused,
                                OverviewReader._way_back(tx, release) if verb == "retry" else "")
            except AppError as error:
                refused = refused or (error.message if verb == "retry" else "")
        if rows and not online:
            away = shlex.quote(rows[0][1])
            return Unmended(release, f"releasectl node set {away} --status online", refused,
                            OverviewReader._way_back(tx, release))
        return Unmended(release, f"releasectl create --target {shlex.quote(release.target)} --payload FILE", refused)

    @staticmethod
    def _way_back(tx: Transaction, release: Release) -> str:
        """Return the command that shows how a release is rolled back, "" where it can't be."""
        try:
            plan_again(tx, "rollback", release.id, Again())
        except AppError:
            return ""
        return f"releasectl rollback {release.id} --plan"


class Store:
    """All that is stored, in parts that share one database."""

    def __init__(self, database: Database, clock: Clock = Clock()):  # noqa: B008 - it has no state
        self.database = database
        self.clock = clock
        self.state = DatabaseState(database, clock)
        self.audit = Audit(self.state)
        self.nodes = Nodes(self.state, self.audit)
        self.queue = Queue(self.state, self.audit)
        self.fleet = Fleet(self.state)
        self.approvals = Approvals(self.state, self.audit, self.queue)
        self.releases = Releases(self.state, self.audit, self.queue)
        self.history = History(self.state, self.audit)
        self.outbox = Outbox(self.state)
        self.claims = Claims(self.state, self.queue, self.releases)
        self.overview = OverviewReader(self.state, self.queue, self.fleet, self.outbox)

    def why(self, release_id: int | None, node_deadline_s: float) -> Why:
        """Return what a release waits for, or what would make up for it; raise AppError 3001.

        release_id: None: of the open ones the first that is stopped, else the first that runs, else the oldest; where
        none is open, the newest failure that nothing has made up for. node_deadline_s: NODE_DEADLINE_SEC, for a
        strategy without its own.
        """
        asked: list[int | None] = [release_id]
        if release_id is None:
            opened = sorted((release for release, _ in self.releases.open()), key=lambda one: one.status == PENDING)
            asked = [release.id for release in opened[:MAX_OF_A_KIND]] or [None]
        found = (self.claims.why(one, node_deadline_s) for one in asked)
        why = next(found)
        if why.stopped_by is None:
            why = next((other for other in found if other.stopped_by), why)
        may_fail = why.release is None or why.release.status in (FAILED, PARTIAL)
        failure = self.overview.failure(release_id) if may_fail else None
        if failure is None:
            return why
        beside: list[Step] = []
        if why.release is None:
            beside = [step for step in why.steps if step.state != OK]
            why = self.claims.why(failure.release.id, node_deadline_s)
        [end] = why.steps
        back = [Step(BACK, OK, "it can be rolled back", failure.rollback)] if failure.rollback else []
        return why._replace(steps=[end._replace(mend=failure.mend), *back, *beside])

    def written(self, nodes: Sequence[Node]) -> list[ListedNode]:
        """Return nodes that were just written, with what they run and should run: "unknown" where it can't be read.

        Who reads an error takes what is done for not done, and does it twice.
        """
        try:
            return self.fleet.listed(nodes)
        except DatabaseError as error:
            log.warning("%s written; what runs on them can't be read: %s", count_of_nodes(len(nodes)), error)
            return [ListedNode(node, Level(is_unknown=True)) for node in nodes]


# endregion


# region Event loop
# ======================================================================================
# Event loop: coroutines that wait for sockets: many in one thread, or one in the
#   caller's.
# Uses: Vocabulary.
#
#   A thread for each of 64 requests costs a third more CPU: they wake at once, and compete for the
#   interpreter. asyncio is not used, as its TLS needs twice the CPU of a plain SSLSocket.
# ======================================================================================

# Seconds between checks for expired waits.
EXPIRY_CHECK_S = 0.05
# New coroutines started in a row: with large payloads each takes its time.
STARTED_AT_ONCE = 8
# Reads in a row without a wait, after which a coroutine yields.
READS_AT_ONCE = 64


class Wait(NamedTuple):
    """What a coroutine waits for: POLLIN or POLLOUT of a socket; socket.timeout is raised where it takes too long."""
    sock: socket.socket | select.epoll | None
    event: int
    # By time.monotonic().
    ends_at: float

    def __await__(self) -> Generator[Wait, None, None]:
        yield self


# Awaited before a call that blocks: an event loop continues the coroutine in a thread of its own.
BLOCKS = Wait(None, 0, 0.0)
# Awaited where an answer begins to be read: from there on a Meter counts.
READING = Wait(None, 1, 0.0)
# Awaited by a coroutine that could continue, so that others run.
YIELD = Wait(None, 2, 0.0)


def run_coroutine(coroutine: Coroutine[Wait, None, T]) -> T:
    """Run a coroutine to its end in this thread; return what it returns, raise what it raises."""
    error: Exception | None = None
    try:
        while True:
            wait = coroutine.throw(error) if error else coroutine.send(None)
            error = None
            if wait.sock is not None:
                poller = select.poll()
                try:
                    poller.register(wait.sock, wait.event)
                except ValueError:
                    error = ConnectionAbortedError("the socket was closed")
                    continue
                if not poller.poll(max(wait.ends_at - time.monotonic(), 0.0) * 1000):
                    error = socket.timeout("deadline")
    except StopIteration as end:
        return cast(T, end.value)


class Meter:
    """Await a coroutine, and count the seconds of CPU that it takes after READING; its waits cost nothing."""

    def __init__(self, coroutine: Coroutine[Wait, None, Any]):
        self._coroutine = coroutine
        self.cost_s = 0.0

    def __await__(self) -> Generator[Wait, None, Any]:
        error: Exception | None = None
        is_reading = False
        try:
            while True:
                since = time.thread_time()  # of the thread that runs it now: another one after BLOCKS
                try:
                    wait = self._coroutine.throw(error) if error else self._coroutine.send(None)
                except StopIteration as end:
                    return end.value
                finally:
                    self.cost_s += time.thread_time() - since if is_reading else 0.0
                error = None
                if wait is READING:
                    is_reading = True
                    continue
                try:
                    yield wait
                except Exception as failed:
                    error = failed
        finally:
            self._coroutine.close()


class EventLoop:
    """Run many coroutines in one thread; each that blocks in one more."""

    def __init__(self) -> None:
        self._new: collections.deque[Coroutine[Wait, None, None]] = collections.deque()
        self._waiting: dict[int, tuple[Coroutine[Wait, None, None], Wait]] = {}
        self._poller = select.poll()
        # Wakes the thread: the end that it polls, and the one to write to. None where no thread runs.
        self._wakers: tuple[socket.socket, socket.socket] | None = None
        self._is_woken = False
        self._is_closed = False
        # When the thread last completed a cycle.
        self._cycled_at = 0.0
        self._next_check_at = 0.0
        self._guard = threading.Lock()

    def start(self) -> None:
        """Start the thread if it does not run; raise RuntimeError or OSError when there is no room for it."""
        with self._guard:
            if self._wakers is not None or self._is_closed:
                return
            wakers = socket.socketpair()
            try:
                threading.Thread(target=self._run, args=wakers, name="agents", daemon=True).start()
            except RuntimeError:
                for sock in wakers:
                    sock.close()
                raise
            self._wakers = wakers

    def submit(self, coroutine: Coroutine[Wait, None, None]) -> None:
        """Run a coroutine from start() on, drop it after close(); it reports its outcome itself and raises nothing."""
        with self._guard:
            if self._is_closed:
                coroutine.close()
                return
            if not self._waiting and not self._new:
                self._cycled_at = time.monotonic()  # an idle thread has no cycles
            self._new.append(coroutine)
            self._wake()

    def is_hung(self, since: float) -> bool:
        """Return whether coroutines wait, and the thread completed no cycle since a moment of time.monotonic()."""
        return bool(self._waiting or self._new) and self._cycled_at < since

    def close(self) -> None:
        """Drop all coroutines; they are not notified."""
        with self._guard:
            self._is_closed = True
            self._wake()

    def _wake(self) -> None:
        if self._wakers and not self._is_woken:
            self._is_woken = True
            self._wakers[1].send(b"\0")

    def _run(self, woken: socket.socket, waker: socket.socket) -> None:
        self._poller.register(woken, select.POLLIN)
        while not self._is_closed:
            limit_ms = 0 if self._new else EXPIRY_CHECK_S * 1000 if self._waiting else None
            for descriptor, _ in self._poller.poll(limit_ms):
                if descriptor == woken.fileno():
                    woken.recv(1)
                    self._is_woken = False  # before the new ones are taken: a later submit() wakes again
                else:
                    self._resume(self._stop_waiting(descriptor))
            for _ in range(min(len(self._new), STARTED_AT_ONCE)):
                self._resume(self._new.popleft())
            self._end_expired()
        for coroutine in (*self._new, *(coroutine for coroutine, _ in self._waiting.values())):
            coroutine.close()
        with self._guard:
            self._wakers = None
            woken.close()
            waker.close()

    def _end_expired(self) -> None:
        """End expired waits, every EXPIRY_CHECK_S; not those whose socket is ready: it is we who are late."""
        self._cycled_at = now = time.monotonic()
        if now >= self._next_check_at:
            self._next_check_at = now + EXPIRY_CHECK_S
            expired = [descriptor for descriptor, (_, wait) in self._waiting.items() if wait.ends_at <= now]
            ready = {descriptor for descriptor, _ in self._poller.poll(0)} if expired else set()
            for descriptor in expired:
                if descriptor not in ready:
                    self._resume(self._stop_waiting(descriptor), socket.timeout("deadline"))

    def _stop_waiting(self, descriptor: int) -> Coroutine[Wait, None, None]:
        self._poller.unregister(descriptor)
        return self._waiting.pop(descriptor)[0]

    def _resume(self, coroutine: Coroutine[Wait, None, None], error: Exception | None = None) -> None:
        """Run a coroutine until it waits again, or ends."""
        try:
            wait = coroutine.throw(error) if error else coroutine.send(None)
        except StopIteration:
            return
        except Exception:  # it must not end all others
            log.exception("a request to an agent failed within releasectl")
            return
        try:
            if wait is BLOCKS:
                # a daemon, not a pool's, which the end of the process would wait for: looking up a name may take long
                threading.Thread(target=self._run_alone, args=(coroutine,), name="agent", daemon=True).start()
            elif wait.sock is None:
                self._new.append(coroutine)
            else:
                descriptor = wait.sock.fileno()
                self._poller.register(descriptor, wait.event)
                self._waiting[descriptor] = coroutine, wait
        except Exception as failed:  # no thread can be started, for example: the coroutine itself reports that
            self._resume(coroutine, failed)

    @staticmethod
    def _run_alone(coroutine: Coroutine[Wait, None, None]) -> None:
        try:
            run_coroutine(coroutine)
        except Exception:
            log.exception("a request to an agent failed within releasectl")


class TimedSocket:
    """A connected socket, plain or TLS, with one deadline for all its waits, also under a peer that drips."""

    def __init__(self, sock: socket.socket, ends_at: float, max_bytes: int = sys.maxsize):
        """Take a non-blocking socket, a moment of time.monotonic(), and how many bytes may be read in all."""
        self.sock = sock
        self.ends_at = ends_at
        self.received = 0
        self._max_bytes = max_bytes
        self._reads = 0

    async def when_ready(self, act: Callable[[], T], event: int) -> T:
        """Return act() as soon as the socket is ready for it; raise socket.timeout when it isn't by the deadline.

        What is ready is done after the deadline too: it may be we who are late.
        """
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            except BlockingIOError:
                pass
            if time.monotonic() >= self.ends_at:
                raise socket.timeout("deadline")
            await Wait(self.sock, event, self.ends_at)

    async def sendall(self, data: bytes) -> None:
        """Send all of it; nothing after the deadline."""
        if time.monotonic() >= self.ends_at:
            raise socket.timeout("deadline")
        view = memoryview(data)
        while view:
            view = view[await self.when_ready(functools.partial(self.sock.send, view), select.POLLOUT):]

    async def recv(self, max_bytes: int) -> bytes:
        """Return what is there, b"" at the end; raise TooBig when it is more than may be read.

        A peer whose bytes are always there, few at a time, delays no other coroutine and has the same deadline.
        """
        self._reads += 1
        if self._reads % READS_AT_ONCE == 0:
            if time.monotonic() >= self.ends_at:
                raise socket.timeout("deadline")
            await YIELD
        data = await self.when_ready(functools.partial(self.sock.recv, max_bytes), select.POLLIN)
        self.received += len(data)
        if self.received > self._max_bytes:
            raise TooBig
        return data


class TooBig(Exception):
    """An answer is longer than allowed."""


# endregion


# region HTTP wire
# ======================================================================================
# HTTP wire: heads and bodies read and written, for API and agents alike; and which of
#   many connections may stay.
# Uses: Vocabulary, Helpers, Event loop.
#
#   The standard library's parser is not used: it accepts two lengths, a space before a colon
#   and bare line feeds, and so would run requests that a proxy in front of us never saw. It also
#   blocks, and takes ten times as long.
# ======================================================================================

# Each deadline is for the whole step, however slowly bytes arrive.
# Without a good token: from the connection, or the last answer, to the end of the TLS handshake and head.
UNAUTHENTICATED_S = 5.0
# With a good token: idle, and then for the head.
IDLE_S, HEAD_S = 60.0, 5.0
# For the body; for sending our answer; for discarding what the client still sends after it.
BODY_S, WRITE_S, LINGER_S = 20.0, 20.0, 1.0
MAX_LINGER_BYTES = 16 << 20
# After a refused request with a longer body the connection is closed.
MAX_SKIPPED_BYTES = 64 << 10
# Minimum idle time before a connection may be evicted.
MIN_IDLE_S = 0.25
# Rejected connections that stay open at a time, so that their clients can read the 503.
MAX_REJECTED = 64
# Chunks of a body in a row, after which the reader yields: they may be tiny.
CHUNKS_AT_ONCE = 64

_TOKEN, _TEXT = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]", r"[\t -~\x80-\xff]"
# RFC 9112, sections 3 to 5 and 7, without its concessions to old programs: no folding, no bare CR or LF.
REQUEST_LINE = re.compile(rf"({_TOKEN}{{1,32}}) ([!-\"$-~]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(rf"HTTP/1\.([01]) ([1-9][0-9]{{2}})(?: {_TEXT}*)?")
HEADER_LINE = re.compile(rf"({_TOKEN}+):[ \t]*({_TEXT}*)")
CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,8}})[ \t]*(?:;{_TEXT}*)?")
CONTENT_LENGTH = re.compile("[0-9]{1,18}")
BARE = re.compile(rb"[\n\0]|\r(?!\Z)")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(:[0-9]{0,5})?")


class HeadLimits(NamedTuple):
    """How large a head may be."""
    first_line_bytes: int
    # All its lines, the empty one too.
    head_bytes: int
    headers: int
    # Headers that we act on; a second one of a name is refused.
    once: frozenset[str]


REQUEST_LIMITS = HeadLimits(8 << 10, 16 << 10, 64, frozenset((
    "host", "content-length", "transfer-encoding", "content-type", "authorization", "expect", "idempotency-key",
    "if-none-match", "origin", "x-request-id")))
ANSWER_LIMITS = HeadLimits(64 << 10, 64 << 10, 100, frozenset(("content-length", "transfer-encoding")))


class HttpReader:
    """The heads and bodies of HTTP/1.1 (RFC 9112) in the bytes of one connection.

    It knows no socket and no clock: receive() brings the next bytes, b"" at the end. Requests and answers are read
    with the same strictness. Raise AppError 2002, 4014 or 4031 for what is malformed or too large, EOFError for what
    is cut off, and what receive() raises.
    """

    def __init__(self, receive: Callable[[], Coroutine[Wait, None, bytes]], limits: HeadLimits):
        self.buffer = bytearray()
        self.limits = limits
        self._receive = receive

    async def fill(self) -> bool:
        """Wait for bytes; return False at the end."""
        data = await self._receive()
        self.buffer += data
        return bool(data)

    async def _fill_or_raise(self) -> None:
        if not await self.fill():
            raise EOFError

    async def head(self, first_line: re.Pattern[str], form: str) -> tuple[re.Match[str], dict[str, str]]:
        """Return the first line of a head, which messages call the form, and its headers, names in lower case.

        What is wrong with a part is refused as soon as it is there, and each byte is searched once: they may drip.
        """
        buffer, limits, first, headers = self.buffer, self.limits, None, dict[str, str]()
        most, start, searched, count = limits.first_line_bytes, 0, 0, 0
        while True:
            end = buffer.find(b"\r\n", searched)
            if end < 0 and BARE.search(buffer, searched):
                raise AppError(MALFORMED, "a line of the head holds a bare CR, a bare LF or a NUL")
            searched = end if end >= 0 else max(start, len(buffer) - 1)  # a last CR may be half of a CRLF
            if searched + 2 > most or (count > limits.headers and searched > start):
                raise AppError(HEAD_TOO_LARGE if first else ADDRESS_TOO_LONG, "the head is too large: at most "
                               f"{limits.first_line_bytes >> 10} KiB for its first line, {limits.head_bytes >> 10} KiB "
                               f"and {limits.headers} headers in all")
            if end < 0:
                await self._fill_or_raise()
                continue
            line = buffer[start:end].decode("latin-1")
            start = searched = end + 2
            count += 1
            if first and line:
                _add_header(headers, line, limits.once)
            elif first:
                del buffer[:start]
                return first, headers
            else:
                first, most = first_line.fullmatch(line), limits.head_bytes
                if not first:
                    raise AppError(MALFORMED, f"the first line is not {form}")

    async def take(self, count: int) -> bytes:
        """Return the next count bytes."""
        while len(self.buffer) < count:
            await self._fill_or_raise()
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    async def take_chunks(self, max_bytes: int) -> bytes:
        """Return a body in chunks; raise TooBig where it is longer than max_bytes."""
        parts, left = list[bytes](), max_bytes
        while True:
            searched = 0
            while (end := self.buffer.find(b"\r\n", searched)) < 0:
                searched = max(0, len(self.buffer) - 1)
                if searched > self.limits.first_line_bytes:
                    raise AppError(HEAD_TOO_LARGE, "the first line of a chunk is too long")
                await self._fill_or_raise()
            match = CHUNK_LINE.fullmatch(self.buffer[:end].decode("latin-1"))
            if not match:
                raise AppError(MALFORMED, "a chunk of the body does not begin with its size")
            size = int(match[1], 16)
            if not size:  # what is behind the last chunk has the form of a head
                await self.head(CHUNK_LINE, "a chunk")
                return b"".join(parts)
            left -= size
            if left < 0:
                raise TooBig
            del self.buffer[:end + 2]
            parts.append(await self.take(size))
            if await self.take(2) != b"\r\n":
                raise AppError(MALFORMED, "a chunk of the body is longer than its size")
            if len(parts) % CHUNKS_AT_ONCE == 0:
                await YIELD

    async def take_rest(self, max_bytes: int) -> bytes:
        """Return all up to the end of the connection; raise TooBig where that is more than max_bytes."""
        while len(self.buffer) <= max_bytes:
            if not await self.fill():
                return await self.take(len(self.buffer))
        raise TooBig


def _add_header(headers: dict[str, str], line: str, once: Set[str]) -> None:
    match = HEADER_LINE.fullmatch(line)
    if not match:
        shown = one_line(line.partition(":")[0], 40)  # not its value: that may be a token
        raise AppError(MALFORMED, f"the header {shown!r} is not NAME: VALUE in one line")
    name, value = match[1].lower(), match[2].rstrip(" \t")
    if name in headers and name in once:
        raise AppError(MALFORMED, f"the header {name} is given twice")
    headers[name] = f"{headers[name]}, {value}" if name in headers else value


def encode_message(first_line: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Return the bytes of a request or an answer in one piece, so that they leave within one deadline."""
    lines = [first_line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def is_last(is_http_1_0: bool, headers: Mapping[str, str]) -> bool:
    """Return whether the sender of a head closes the connection after the message."""
    return is_http_1_0 or "close" in map(str.strip, headers.get("connection", "").lower().split(","))


def length_in(headers: Mapping[str, str]) -> int | None:
    """Return the Content-Length, None where there is none; raise AppError 2002."""
    text = headers.get("content-length")
    if text is None:
        return None
    if not CONTENT_LENGTH.fullmatch(text):
        raise AppError(MALFORMED, "Content-Length must be a number")
    if "transfer-encoding" in headers:
        raise AppError(MALFORMED, "Content-Length and Transfer-Encoding exclude each other")
    return int(text)


class Head(NamedTuple):
    """The head of a request; header names are in lower case."""
    method: str = "GET"
    target: str = ""
    headers: Mapping[str, str] = {}
    # The client wants the connection closed after this request.
    is_last: bool = False


async def read_request_head(reader: HttpReader) -> Head:
    """Return the head of a request; raise what the reader raises, and AppError 5005."""
    first, headers = await reader.head(REQUEST_LINE, "METHOD ADDRESS HTTP/1.1")
    if first[3] != "1" or first[4] not in "01":
        raise AppError(UNKNOWN_HTTP_VERSION, "only HTTP/1.1 and HTTP/1.0 are supported")
    is_http_1_0 = first[4] == "0"
    if not HOST.fullmatch(headers.get("host", "" if is_http_1_0 else " ")):
        raise AppError(MALFORMED, "the request needs one header Host, a name or an address")
    return Head(first[1], first[2], headers, is_last(is_http_1_0, headers))


def body_length(head: Head, max_bytes: int) -> int:
    """Return the length of the body that follows the head of a request; raise AppError 2002, 4013, 5004."""
    length = length_in(head.headers) or 0
    if "transfer-encoding" in head.headers:
        raise AppError(NOT_IMPLEMENTED, "Transfer-Encoding is not supported: send Content-Length")
    if length > max_bytes:
        raise AppError(BODY_TOO_LARGE, f"the body is over {max_bytes} bytes (HTTP_MAX_BODY_BYTES)")
    return length


async def read_answer(reader: HttpReader, max_bytes: int) -> tuple[int, bytes, bool]:
    """Return status and body of an answer to GET or POST, and whether the connection can be used again.

    Raise what the reader raises, and TooBig where the body has more than max_bytes.
    """
    status = 100
    while 100 <= status < 200:  # interim answers: nothing is asked for that they would grant
        first, headers = await reader.head(STATUS_LINE, "HTTP/1.1 STATUS REASON")
        status = int(first[2])
    length, coding = length_in(headers), headers.get("transfer-encoding")
    if status in (http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED):
        length, coding = 0, None
    if coding is not None and coding.lower() != "chunked":
        raise AppError(MALFORMED, "its Transfer-Encoding is not chunked")
    if coding is None and length is None:
        return status, await reader.take_rest(max_bytes), False
    if (length or 0) > max_bytes:
        raise TooBig
    body = await reader.take_chunks(max_bytes) if length is None else await reader.take(length)
    return status, body, not is_last(first[1] == "0", headers) and not reader.buffer


class Wire:
    """A client's connection; every wait has a deadline on the monotonic clock."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self._timed = TimedSocket(sock, 0.0)
        self.reader = HttpReader(functools.partial(self._timed.recv, 65536), REQUEST_LIMITS)

    @property
    def buffered(self) -> int:
        """The number of bytes that came and were not read."""
        return len(self.reader.buffer)

    def _read(self, reading: Coroutine[Wait, None, T], ends_at: float) -> T:
        """Return what the reader's coroutine returns; raise AppError 2002 at the client's end, 4008 at the deadline."""
        self._timed.ends_at = ends_at
        try:
            return run_coroutine(reading)
        except socket.timeout:
            raise AppError(REQUEST_TIMEOUT, "the request did not come in time") from None
        except (OSError, EOFError):
            raise AppError(MALFORMED, "the connection ends within the request") from None

    def has_bytes(self, ends_at: float) -> bool:
        """Wait for the first byte of a request; return False where none comes."""
        with contextlib.suppress(AppError):
            return self.buffered > 0 or self._read(self.reader.fill(), ends_at)
        return False

    def head(self, ends_at: float) -> Head:
        """Return the head of the next request; raise AppError 2002, 4008, 4014, 4031, 5005."""
        return self._read(read_request_head(self.reader), ends_at)

    def take(self, count: int, ends_at: float) -> bytes:
        """Return the next count bytes; raise AppError 2002, 4008."""
        return self._read(self.reader.take(count), ends_at)

    def send(self, data: bytes) -> None:
        """Send all data within WRITE_S; raise OSError else."""
        self._timed.ends_at = time.monotonic() + WRITE_S
        run_coroutine(self._timed.sendall(data))


@dataclasses.dataclass(eq=False)
class Connection:
    """One admitted connection, which has a thread. A busy one is never evicted."""
    sock: socket.socket
    address: str
    # Since when it is idle.
    since: float
    # Nothing was read from it yet.
    is_new: bool = True
    is_authenticated: bool = False
    # The name of the token that it authenticated with, "" where there are no tokens.
    token: str = ""
    is_viewer: bool = False
    is_at_work: bool = False
    # It has a request or answer under way, which a clean stop waits for.
    owes_answer: bool = False


class ConnectionLimiter:
    """Limits the connections: in all, of one address, with one token.

    At a limit a new connection evicts the one that is idle longest: unauthenticated ones first, and of
    these the ones of the address that has most. So idle clients lock nobody out, and /healthz and
    tokens always get in. Where all are busy, the new one is rejected. Busy means using the interpreter:
    a connection that waits for a body, an event or its place in a queue is idle.

    Viewers get at most half of all, and half of an address's limit, so that an operator always finds
    room. One viewer's token gets a quarter of all, an operator's half.
    """

    def __init__(self, limit: int, limit_per_address: int, overload_response: bytes):
        """overload_response is sent to a connection that is evicted before it sent anything."""
        self._limit, self._limit_per_address = limit, limit_per_address
        self._overload_response = overload_response
        self._guard = threading.Lock()
        self._connections: set[Connection] = set()

    def admit(self, sock: socket.socket, host: str) -> Connection | None:
        """Admit a connection, if need be in place of an idle one; return None when all are busy."""
        address, now = network_of(host), time.monotonic()
        with self._guard:
            held = collections.Counter(connection.address for connection in self._connections)
            is_crowd = held[address] >= self._limit_per_address
            if is_crowd or len(self._connections) >= self._limit:
                rivals = [c for c in self._connections if not c.is_at_work and now - c.since > MIN_IDLE_S
                          and (c.address == address or not is_crowd)]
                if not rivals:
                    return None
                self._evict(min(rivals, key=lambda c: (c.is_authenticated, -held[c.address], c.since)))
            connection = Connection(sock, address, now)
            self._connections.add(connection)
            return connection

    def _evict(self, connection: Connection) -> None:
        self._connections.discard(connection)
        with contextlib.suppress(OSError):
            if connection.is_new and self._overload_response:
                connection.sock.send(self._overload_response)  # the first bytes: they fit into the buffer
            # not SSLSocket.shutdown: it would end the encryption that the connection's thread still uses
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def encrypt(self, connection: Connection, context: ssl.SSLContext) -> None:
        """Wrap a connection in TLS, without the handshake."""
        with self._guard:
            connection.sock = context.wrap_socket(connection.sock, server_side=True, do_handshake_on_connect=False)

    def identify(self, connection: Connection, is_good: bool, token: str = "", is_viewer: bool = False) -> bool:
        """Note how a connection authenticated; return False when its token's connections are at a limit and all busy.

        At a limit, the one of them that is idle longest is evicted.
        """
        with self._guard:
            if token and not self._make_room(connection, token, is_viewer):
                is_good, token = False, ""
            connection.is_authenticated, connection.token = is_good, token
            connection.is_viewer = is_viewer and bool(token)
            return is_good

    def _make_room(self, connection: Connection, token: str, is_viewer: bool) -> bool:
        address = connection.address
        quotas: list[tuple[int, Callable[[Connection], bool]]] = [
            (max(1, self._limit // (4 if is_viewer else 2)), lambda c: c.token == token)]
        if is_viewer:
            quotas += [(max(1, self._limit // 2), lambda c: c.is_viewer),
                       (max(1, self._limit_per_address // 2), lambda c: c.is_viewer and c.address == address)]
        for limit, is_peer in quotas:
            peers = [c for c in self._connections if c is not connection and is_peer(c)]
            if len(peers) >= limit:
                idle = [c for c in peers if not c.is_at_work and time.monotonic() - c.since > MIN_IDLE_S]
                if not idle:
                    return False
                self._evict(min(idle, key=lambda c: c.since))
        return True

    def set_busy(self, connection: Connection) -> bool:
        """Mark a connection as busy with a request; return False when it was evicted before."""
        with self._guard:
            connection.is_at_work, connection.owes_answer, connection.is_new = True, True, False
            return connection in self._connections

    def set_idle(self, connection: Connection, owes_answer: bool = False, since: float | None = None) -> None:
        """Mark a connection as waiting: for a request, a body, an event, a queue, or its client to read the answer."""
        with self._guard:
            connection.is_at_work, connection.owes_answer = False, owes_answer
            connection.since = time.monotonic() if since is None else since

    def close(self, connection: Connection) -> None:
        """Close a connection."""
        with self._guard:
            self._connections.discard(connection)
            close_quietly(connection.sock)

    def end_all(self, within_s: float) -> None:
        """End idle connections at once; the others may be answered within so many seconds."""
        ends_at = time.monotonic() + within_s
        self._shut(lambda connection: socket.SHUT_RD if connection.owes_answer else socket.SHUT_RDWR)
        while self._connections and time.monotonic() < ends_at:
            time.sleep(0.02)
        self._shut(lambda _: socket.SHUT_RDWR)

    def _shut(self, how: Callable[[Connection], int]) -> None:
        with self._guard:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection.sock, how(connection))


def has_hung_up(sock: socket.socket, within_s: float) -> bool:
    """Wait up to so many seconds; return whether the client ended its side, or we shut the connection down."""
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)  # not POLLIN: the client may send its next request meanwhile
    return bool(poller.poll(round(within_s * 1000)))


def lingering_close(sock: socket.socket) -> None:
    """End a connection and discard what still arrives: a reset could destroy our answer (RFC 9112, 9.6)."""
    ends_at, dropped = time.monotonic() + LINGER_S, 0
    with contextlib.suppress(OSError, ValueError):
        sock.settimeout(LINGER_S)
        if isinstance(sock, ssl.SSLSocket):
            sock.unwrap()
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while dropped < MAX_LINGER_BYTES and time.monotonic() < ends_at:
            sock.settimeout(max(0.001, ends_at - time.monotonic()))
            count = len(socket.socket.recv(sock, 65536))  # below TLS, if there is any
            if not count:
                return
            dropped += count


# endregion


# region Dialects
# ======================================================================================
# Dialects: what agents are sent, and how their answers are read (contract section 1).
# Uses: Vocabulary, Helpers, Model, Decision.
#
#   A dialect is a row of DIALECTS (what a decision and a plan know of it) and of WIRE_FORMATS, the
#   CHECK of agent_protocol in schema.sql, and its tests.
# ======================================================================================

class Address(NamedTuple):
    """Where an agent listens, and its dialect; none for a probe."""
    host: str
    port: int
    protocol: str = ""

    def __str__(self) -> str:
        return f"agent [{self.host}]:{self.port}" if ":" in self.host else f"agent {self.host}:{self.port}"


class AgentTask(NamedTuple):
    """What an agent is asked to do."""
    id: str
    type: str
    version: int
    # As JSON for the agent's dialect: payload_text().
    payload: str


class AgentError(Exception):
    """A request that failed, or an answer that can't be used; AgentClient returns its outcome."""

    def __init__(self, result: str, kind: str, message: str, **more: Any):
        super().__init__(message)
        self.outcome = Outcome("", result, "", kind, message, **more)


def _text_of(value: object) -> str:
    """Return an agent's text, "" for one that shows nothing: blanks, control characters, no text at all."""
    text = "" if value is None else str(value)
    return text if one_line(text) else ""


def _nonsense(address: Address, what: str, data: object) -> AgentError:
    return AgentError(UNCLEAR, PROTOCOL, f"{address} {what}", detail=f"{address} {what}: {data!r}")


def read_data(address: Address, status: int, answer: bytes) -> Mapping[str, Any]:
    """Return data of an agent's answer {"code": 0, "message": ..., "data": {...}}; raise AgentError."""
    if status != 200:
        raise _bad_status(address, status, answer)
    try:
        envelope = parse_json(answer)
    except ValueError as error:
        what = f"{address} answered what is not JSON"
        raise AgentError(UNCLEAR, PROTOCOL, f"{what}: {one_line(error, 60)}",
                         detail=f"{what} ({one_line(error, 60)}): {answer[:200].decode('utf-8', 'replace')}") from None
    if not isinstance(envelope, dict):
        raise AgentError(UNCLEAR, PROTOCOL, f"{address} answered JSON that is no object")
    code = envelope.get("code")
    if isinstance(code, bool) or not isinstance(code, int):
        raise _nonsense(address, "answers without a code", envelope)
    if code != 0:
        said = _text_of(envelope.get("message")) or "no reason given"
        raise AgentError(FAILED, REJECTED, f"{address} refused: {said} (code {code})")
    if not isinstance(envelope.get("data"), dict):
        raise _nonsense(address, "answers without data", envelope)
    return cast("Mapping[str, Any]", envelope["data"])


def _bad_status(address: Address, status: int, answer: bytes) -> AgentError:
    said = answer[:2000].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, AttributeError):
        said = _text_of(parse_json(answer).get("message")) or said
    text = f"{address} answered HTTP {status}" + (f": {said.strip()}" if _text_of(said) else "") + (
        " (wrong --protocol?)" if status == 404 else "")
    if 300 <= status < 400:
        return AgentError(UNCLEAR, HTTP, f"{address} answered a redirect (HTTP {status}), which is not followed",
                          is_refusal=True)
    if 400 <= status < 500 and status != 429:
        return AgentError(FAILED, REJECTED, text)
    return AgentError(UNCLEAR, HTTP, text, is_refusal=status in (429, 503))


def _require_success(address: Address, data: Mapping[str, Any], text: str) -> None:
    """Raise AgentError unless a task that has ended was a success; text is what the agent said about it."""
    status = data.get("status")
    if status == "failed":
        raise AgentError(FAILED, AGENT_FAILED, text or NO_REASON_GIVEN)
    if status != "success":
        raise _nonsense(address, f"gives the unknown status {one_line(to_json(status), 60)}", data)


def _read_accepted(address: Address, task: AgentTask, data: Mapping[str, Any], was_resent: bool) -> Outcome:
    named = data.get("taskId")
    if not isinstance(named, str) or not named or one_line(named) != named:
        raise _nonsense(address, "names no task id", data)
    # what is going to run is pending; a version that the agent has already is done at once
    is_done = data.get("status") == "success" and not was_resent
    return Outcome(DISPATCH, ACCEPTED, named, applied=task.version if is_done else 0)


def _read_polled(address: Address, task_id: str, data: Mapping[str, Any]) -> Outcome:
    if data.get("taskId") != task_id:
        raise _nonsense(address, "answers for another task", data)
    if data.get("status") in ("pending", "running"):
        return Outcome(QUERY, WORKING, task_id)
    text = _text_of(data.get("lastError"))
    _require_success(address, data, text)
    return Outcome(QUERY, SUCCESS, task_id, message=text)


def _read_executed(address: Address, task: AgentTask, data: Mapping[str, Any], _was_resent: bool) -> Outcome:
    text = _text_of(data.get("message"))
    if data.get("requestId") != task.id:
        raise _nonsense(address, "answers for another request", data)
    _require_success(address, data, text)
    # an execute agent says success where its message tells otherwise (contract section 1)
    if RELOAD_FAILED in text:
        raise AgentError(FAILED, AGENT_FAILED, text)
    found = re.search(r"Version (\d{1,4000}) already applied \(current: (\d{1,4000})\)", text)
    if found is None:
        return Outcome(DISPATCH, SUCCESS, task.id, message=text)
    asked, applied = int(found.group(1)), int(found.group(2))
    if applied > task.version:
        raise AgentError(FAILED, REJECTED, f"the agent is already at version {applied}", detail=text)
    if applied != task.version:
        raise _nonsense(address, f"has version {applied} and calls it applied", data)
    if asked != task.version:
        raise _nonsense(address, f"calls version {asked} applied, and was sent {task.version}", data)
    return Outcome(DISPATCH, SUCCESS, task.id, message=text, applied=applied)


class WireFormat(NamedTuple):
    """What agents of a dialect are sent, and how their answers are read; the readers raise AgentError."""
    dispatch_path: str
    # From a release's payload and version to what agents get as payload; the members of a dispatch before it.
    payload_of: Callable[[Mapping[str, Any], int], Mapping[str, Any]]
    members_of: Callable[[AgentTask], Mapping[str, Any]]
    # From the data of the answer to a dispatch, and whether it was sent twice.
    read_dispatch: Callable[[Address, AgentTask, Mapping[str, Any], bool], Outcome]
    # Method, path and body of a ping, and whether status and code of the answer are those of such an agent alone.
    ping: tuple[str, str, bytes | None]
    is_pong: Callable[[int, int], bool]
    # A connection may end under a request, which is sent again then: only where the agent does not run it twice.
    keeps_connections: bool = False
    # For a dialect that can be asked for a task: the path before its id, and the reader of the answer's data.
    query_path: str = ""
    read_query: Callable[[Address, str, Mapping[str, Any]], Outcome] = _read_polled


WIRE_FORMATS: Mapping[str, WireFormat] = {
    TASKS: WireFormat(
        "/tasks/dispatch",
        lambda payload, _version: payload,
        lambda task: {"taskId": task.id, "type": task.type, "version": task.version},
        _read_accepted, ("GET", "/tasks/releasectl-ping", None), lambda status, code: status == 404 and code != 0,
        keeps_connections=True, query_path="/tasks/"),
    EXECUTE: WireFormat(
        "/agent/v1/tasks/execute",
        lambda payload, version: {**payload, "version": version},
        lambda task: {"requestId": task.id, "type": task.type},
        _read_executed, ("POST", "/agent/v1/tasks/execute", b"{}"), lambda status, code: (status, code) == (400, 2001)),
}


def payload_text(protocol: str, payload: Mapping[str, Any], version: int) -> str:
    """Return a release's payload as the agents of a dialect get it. A large one takes long: once a release."""
    return to_json(WIRE_FORMATS[protocol].payload_of(payload, version))


def dispatch_body(protocol: str, task: AgentTask) -> bytes:
    """Return the body of a dispatch: JSON that ends with the payload."""
    return f'{to_json(WIRE_FORMATS[protocol].members_of(task))[:-1]},"payload":{task.payload}}}'.encode()


def read_pong(address: Address, status: int, answer: bytes) -> None:
    """Raise AgentError unless an answer to a ping is that of an agent of the address's dialect."""
    if status == 429 or status >= 500:  # it says nothing about the dialect
        raise _bad_status(address, status, answer)
    code = None
    with contextlib.suppress(ValueError, AttributeError):
        code = parse_json(answer).get("code")
    if not isinstance(code, int) or isinstance(code, bool) or not WIRE_FORMATS[address.protocol].is_pong(status, code):
        said = one_line(answer[:2000].decode("utf-8", "replace").strip(), 80)
        raise AgentError(UNCLEAR, PROTOCOL, f"{address} is no {address.protocol} agent: it answered HTTP {status}"
                                            + (f", {said}" if said else "") + " (wrong --protocol or --port?)")


# endregion


# region Agents
# ======================================================================================
# Agents: connections to agents, deadlines, requests, probes.
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Certificates, Model, Strategy,
#   Decision, Event loop, HTTP wire, Dialects.
# ======================================================================================

MAX_IDLE_AGENT_CONNECTIONS = 256
MAX_IDLE_AGENT_CONNECTION_S = 60.0
# Wait before the next address of a name is tried, beside those before it (RFC 8305, 5).
NEXT_ADDRESS_S = 0.25
# Body of an agent's answer (contract section 1).
MAX_ANSWER_BYTES = 64 << 10
# Body of the answer to a probe: a page that a node serves.
MAX_PROBED_BYTES = 1 << 20


class _Call(NamedTuple):
    """A request."""
    address: Address
    method: str
    path: str
    body: bytes | None
    # For the whole request, as messages say it, and the moment of time.monotonic() at which that is over.
    limit_s: float
    ends_at: float
    # Asked just before the first byte leaves: whether it may.
    gate: Callable[[], bool] = lambda: True
    # The Host header, where it is not the address.
    host: str = ""
    # Whether its connection may be a kept one, and is kept.
    keeps_connection: bool = False
    max_bytes: int = MAX_ANSWER_BYTES


class _Stale(Exception):
    """A kept connection that the agent had closed before it saw the request."""


class AgentClient:
    """Send requests to agents: dispatch(), query(), probe() and ask() are coroutines, ping() waits."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None):
        """Read no file yet: see prepare(). Requests are counted in metrics."""
        self._metrics = metrics or Metrics()
        self._connect_s = settings.agent_connect_timeout_sec
        self._request_s = settings.agent_request_timeout_sec
        self._server_name = settings.agent_tls_server_name
        self._key = settings.control_key
        self._tls = TlsFiles(client_context, settings.control_cert, settings.control_key,
                             settings.control_ca) if settings.mtls_enabled else None
        self._guard = threading.Lock()
        # Kept connections, the oldest first: socket, its context, since when.
        self._idle: dict[Address, tuple[socket.socket, object, float]] = {}
        self._active: set[socket.socket] = set()
        self._is_closed = False

    def prepare(self, key_may_be_open: bool = False) -> None:
        """Raise ConfigError when no agent can be called with these settings, or others can read our key.

        To be called before something begins; what is under way goes on with a key that was opened meanwhile.
        """
        if self._tls:
            self._tls.context()
        if not key_may_be_open:
            self.check_key()

    def check_key(self) -> None:
        """Raise ConfigError where others can read our key."""
        if self._tls and self._key:
            require_private("CONTROL_KEY", self._key)

    def reload(self) -> None:
        """Read the certificates again; raise ConfigError when they can't be used."""
        if self._tls:
            self._tls.reload()

    def close(self) -> None:
        """End every connection: requests in flight and all later ones fail at once."""
        with self._guard:
            self._is_closed = True
            idle, self._idle = self._idle, {}
        for sock in list(self._active):
            with contextlib.suppress(OSError):
                # not SSLSocket.shutdown(): it would remove the encryption under the other thread
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for sock, _, _ in idle.values():
            close_quietly(sock)

    async def dispatch(self, address: Address, task: AgentTask, within_s: float = 3600.0,
                       gate: Callable[[], bool] = lambda: True) -> Outcome:
        """Send a task; return its outcome: ACCEPTED with the id to poll, or the end of the task.

        within_s shortens the request timeout; gate() decides, just before the first byte leaves, whether it may.
        """
        return await self._counted(DISPATCH, self._dispatch(address, task, within_s, gate))

    async def query(self, address: Address, task_id: str, within_s: float = 3600.0) -> Outcome:
        """Ask for a task that was accepted; return the outcome."""
        return await self._counted(QUERY, self._query(address, task_id, within_s))

    async def probe(self, host: str, verify: Verify, url: str, timeout_s: float) -> Outcome:
        """Get a url from a node, in timeout_s seconds in all; return SUCCESS when it answers as verify says.

        It goes to the node's own address, whatever name the url or verify.host has. Redirects are not followed. A
        certificate is not verified, as it is made out for what the node serves and not for its
        address; what comes back is a status and a yes or no, and no secret goes out.
        """
        return await self._counted(PROBE, self._probe(host, verify, url, timeout_s))

    async def ask(self, address: Address, within_s: float = 3600.0) -> Outcome:
        """Ask an agent for what only one of its dialect answers so (contract section 1); return the outcome."""
        return await self._counted(PING, self._ping(address, within_s))

    def ping(self, address: Address) -> Outcome:
        """Do ask(), and wait for the outcome."""
        return run_coroutine(self.ask(address))

    async def _counted(self, operation: str, request: Coroutine[Wait, None, Outcome]) -> Outcome:
        """Return the outcome of a request, and count it; not what close() cut, which says nothing about the agent."""
        since = time.monotonic()
        try:
            outcome = await request
        except AgentError as error:
            outcome = error.outcome._replace(op=operation)
        if not (outcome.error_kind and self._is_closed):
            self._metrics.count_request(operation, outcome.error_kind or SUCCESS, since)
        return outcome

    async def _dispatch(self, address: Address, task: AgentTask, within_s: float,
                        gate: Callable[[], bool]) -> Outcome:
        wire = WIRE_FORMATS[address.protocol]
        call = self._call(address, "POST", wire.dispatch_path, dispatch_body(address.protocol, task), within_s)
        status, answer, was_resent = await self._exchange(call._replace(gate=gate))
        return wire.read_dispatch(address, task, read_data(address, status, answer), was_resent)

    async def _query(self, address: Address, task_id: str, within_s: float) -> Outcome:
        wire = WIRE_FORMATS[address.protocol]
        path = wire.query_path + urllib.parse.quote(task_id, safe=":")
        status, answer, _ = await self._exchange(self._call(address, "GET", path, None, within_s))
        if status == 404:
            return Outcome(QUERY, UNKNOWN, task_id)
        return wire.read_query(address, task_id, read_data(address, status, answer))

    async def _probe(self, host: str, verify: Verify, url: str, timeout_s: float) -> Outcome:
        parts, ends_at = urllib.parse.urlsplit(url), time.monotonic() + timeout_s
        address = Address(host, parts.port or (443 if parts.scheme == "https" else 80))
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        call = _Call(address, "GET", path, None, timeout_s, ends_at, host=verify.host or parts.netloc,
                     max_bytes=MAX_PROBED_BYTES)
        context = _unverified_context() if parts.scheme == "https" else None
        try:
            sock = await self._connect(address, context, ends_at, verify.host or parts.hostname or host)
            status, answer = await self._request(call, sock, context, reused=False)
        except AgentError as error:
            raise AgentError(UNCLEAR, VERIFY, f"{url}: {str(error).replace(str(address), 'it', 1)}") from None
        if status != verify.status:
            raise AgentError(UNCLEAR, VERIFY, f"{url} answered HTTP {status} instead of {verify.status}")
        if verify.contains.encode() not in answer:
            raise AgentError(UNCLEAR, VERIFY, f"{url} answered without {one_line(verify.contains, 60)!r} in it")
        return Outcome(PROBE, SUCCESS)

    async def _ping(self, address: Address, within_s: float) -> Outcome:
        started, wire = time.monotonic(), WIRE_FORMATS[address.protocol]
        status, answer, _ = await self._exchange(self._call(address, *wire.ping, within_s))
        read_pong(address, status, answer)
        article, took_ms = "an" if address.protocol[0] in "aeiou" else "a", (time.monotonic() - started) * 1000
        return Outcome(PING, SUCCESS, message=f"answers as {article} {address.protocol} agent in {took_ms:.0f} ms")

    def _call(self, address: Address, method: str, path: str, body: bytes | None, within_s: float) -> _Call:
        limit_s = min(self._request_s, max(within_s, 0.0))
        return _Call(address, method, path, body, limit_s, time.monotonic() + limit_s,
                     keeps_connection=WIRE_FORMATS[address.protocol].keeps_connections)

    # -- connections ---------------------------------------------------------------------

    async def _exchange(self, call: _Call) -> tuple[int, bytes, bool]:
        """Return status and body of an answer, and whether the request was sent again: a kept connection was stale."""
        context = self._tls.context() if self._tls else None
        sock = self._take_idle(call.address, context) if call.keeps_connection else None
        if sock is not None:
            with contextlib.suppress(_Stale):
                return *await self._request(call, sock, context, reused=True), False
        was_resent = sock is not None
        sock = await self._connect(call.address, context, call.ends_at)
        return *await self._request(call, sock, context, reused=False), was_resent

    def _take_idle(self, address: Address, context: object) -> socket.socket | None:
        oldest = time.monotonic() - MAX_IDLE_AGENT_CONNECTION_S
        dropped = []
        with self._guard:
            found, made_with, since = self._idle.pop(address, (None, None, 0.0))
            while self._idle and (first := next(iter(self._idle.items())))[1][2] < oldest:
                dropped.append(self._idle.pop(first[0])[0])
        if found is not None and (made_with is not context or since < oldest or _is_readable(found)):
            dropped.append(found)
            found = None
        for sock in dropped:
            close_quietly(sock)
        return found

    def _keep_idle(self, address: Address, sock: socket.socket, context: object) -> None:
        with self._guard:
            surplus = [self._idle.pop(address)] if address in self._idle else []
            self._idle[address] = (sock, context, time.monotonic())
            if len(self._idle) > (0 if self._is_closed else MAX_IDLE_AGENT_CONNECTIONS):
                surplus.append(self._idle.pop(next(iter(self._idle))))
        for dropped, _, _ in surplus:
            close_quietly(dropped)

    @contextlib.contextmanager
    def _in_flight(self, sock: socket.socket) -> Iterator[None]:
        """Let close() end a connection in use; raise OSError after close()."""
        self._active.add(sock)
        try:
            if self._is_closed:  # checked after the addition, as close() sets it before it goes through _active
                raise ConnectionAbortedError("releasectl is stopping")
            yield
        finally:
            self._active.discard(sock)

    async def _connect(self, address: Address, context: ssl.SSLContext | None, ends_at: float,
                       name: str = "") -> socket.socket:
        connect_s = max(0.0, min(self._connect_s, ends_at - time.monotonic()))
        connect_by = time.monotonic() + connect_s
        try:
            sock = await self._open_socket(address, connect_by)
        except socket.timeout:
            raise AgentError(UNSENT, UNREACHABLE,
                             f"{address} did not take a connection within {connect_s:.3g} s") from None
        except (OSError, UnicodeError) as error:
            raise AgentError(UNSENT, UNREACHABLE, f"{address} can't be reached: {os_reason(error)}") from None
        if context is None:
            return sock
        try:
            tls_sock = context.wrap_socket(sock, server_hostname=name or self._server_name or address.host,
                                           do_handshake_on_connect=False)
            sock = tls_sock  # wrap_socket() detached the plain one
            with self._in_flight(sock):
                await TimedSocket(sock, connect_by, 0).when_ready(tls_sock.do_handshake, select.POLLIN)
            return sock
        except (OSError, ValueError) as error:
            close_quietly(sock)
            raise self._handshake_error(address, error, connect_s) from None

    async def _open_socket(self, address: Address, connect_by: float) -> socket.socket:
        """Return a connection to the address, or to the first address of a name that answers, until connect_by."""
        found = await self._look_up(address)
        if len(found) > 1:
            return await self._open_first(found, connect_by)
        sock = self._begin_connect(found[0])
        try:
            with self._in_flight(sock):
                await Wait(sock, select.POLLOUT, connect_by)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            return sock
        except BaseException:
            sock.close()
            raise

    @staticmethod
    def _begin_connect(found: tuple[Any, ...]) -> socket.socket:
        """Return a socket that connects to a result of getaddrinfo(); it becomes writable when that ends, or fails."""
        family, kind, number, _, target = found
        sock = socket.socket(family, kind, number)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(target)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
            return sock
        except BaseException:
            sock.close()
            raise

    async def _open_first(self, found: Sequence[tuple[Any, ...]], connect_by: float) -> socket.socket:
        """Connect to several addresses in the system's order (RFC 8305); return the first connection.

        Start the next one NEXT_ADDRESS_S after the last, or at once when one fails.
        """
        error = OSError("no address found")
        left = collections.deque(found)
        trying: dict[int, socket.socket] = {}
        with contextlib.ExitStack() as stack:
            poller = stack.enter_context(select.epoll())
            stack.callback(lambda: collections.deque(map(close_quietly, trying.values()), 0))
            while left or trying:
                if left:
                    try:
                        sock = self._begin_connect(left.popleft())
                    except OSError as failed:
                        error = failed
                        continue
                    trying[sock.fileno()] = sock
                    stack.enter_context(self._in_flight(sock))
                    poller.register(sock, select.EPOLLOUT)
                next_at = time.monotonic() + NEXT_ADDRESS_S
                try:
                    await Wait(poller, select.POLLIN, min(next_at, connect_by) if left else connect_by)
                except socket.timeout:
                    if not left or time.monotonic() >= connect_by:
                        raise
                for descriptor, _ in poller.poll(0):
                    poller.unregister(descriptor)
                    sock = trying.pop(descriptor)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        return sock
                    sock.close()
                    error = OSError(code, os.strerror(code))
        raise error

    @staticmethod
    async def _look_up(address: Address) -> list[tuple[Any, ...]]:
        """Return the results of getaddrinfo(); only a name blocks.

        Leave out what no node may have as its address: DNS is not ours. Raise OSError when nothing is left.
        """
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        await BLOCKS
        found = [(target, plain_address(ipaddress.ip_address(str(target[4][0]).partition("%")[0])))
                 for target in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)]
        if found and all(address_fault(ip) for _, ip in found):
            raise OSError(f"its name leads to {found[0][1]}, which {address_fault(found[0][1])}")
        return [target for target, ip in found if not address_fault(ip)]

    def _handshake_error(self, address: Address, error: Exception, connect_s: float) -> AgentError:
        if isinstance(error, ssl.SSLCertVerificationError):
            text = CERTIFICATE_FAULTS.get(error.verify_code, f"presented a bad certificate: {error.verify_message}")
            if error.verify_code == 62 and self._server_name:
                text += f" than {self._server_name} (AGENT_TLS_SERVER_NAME)"
            return AgentError(UNSENT, TLS, f"{address} {text}")
        if isinstance(error, socket.timeout):
            return AgentError(UNSENT, TIMEOUT,
                              f"{address} did not finish the TLS handshake within {connect_s:.3g} s")
        refusal = _refusal(error)
        if refusal:
            return AgentError(UNSENT, TLS, f"{address} refused our client certificate ({refusal})")
        reason = getattr(error, "reason", None) or ""
        if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
            return AgentError(UNSENT, TLS, f"{address} does not speak TLS on this port")
        if "PROTOCOL_VERSION" in reason or reason == "UNSUPPORTED_PROTOCOL":
            return AgentError(UNSENT, TLS, f"{address} speaks no TLS 1.2 or newer")
        says_why = isinstance(error, ssl.SSLError) and reason and not isinstance(error, ssl.SSLEOFError)
        said = reason.replace("_", " ").lower() if says_why else "it closed the connection"
        return AgentError(UNSENT, TLS, f"{address}: the TLS handshake failed: {said}")

    async def _request(self, call: _Call, sock: socket.socket, context: object, reused: bool) -> tuple[int, bytes]:
        address = call.address
        timed = TimedSocket(sock, call.ends_at, call.max_bytes + ANSWER_LIMITS.head_bytes)
        reader, keep = HttpReader(functools.partial(timed.recv, 16384), ANSWER_LIMITS), False
        try:
            with self._in_flight(sock):
                if not call.gate():
                    raise AgentError(NOT_SENT, UNREACHABLE, f"{address}: not sent, as it may not or is too late")
                await timed.sendall(_request_bytes(call))
                await READING
                status, answer, keep = await read_answer(reader, call.max_bytes)
            keep = keep and call.keeps_connection
            return status, answer
        except TooBig:
            raise AgentError(UNCLEAR, PROTOCOL, f"{address} answered more than {call.max_bytes >> 10} KiB") from None
        except (OSError, EOFError, AppError) as error:
            is_late = isinstance(error, socket.timeout)  # while it waited, an alert would have been read
            refusal = _refusal(error) or (await _late_alert(timed) if timed.received == 0 and not is_late else "")
            if refusal:
                raise AgentError(UNSENT, TLS, f"{address} refused our client certificate ({refusal})") from None
            if reused and timed.received == 0 and not is_late and not self._is_closed:
                raise _Stale from None
            raise self._exchange_error(address, error, timed, call.limit_s) from None
        finally:
            if keep:
                self._keep_idle(address, sock, context)
            else:
                close_quietly(sock)

    def _exchange_error(self, address: Address, error: Exception, timed: TimedSocket, limit_s: float) -> AgentError:
        if isinstance(error, socket.timeout):
            text = "drips: no whole answer" if timed.received else "did not answer"
            return AgentError(LOST, TIMEOUT, f"{address} {text} within {limit_s:.3g} s", hold_s=self._request_s)
        if isinstance(error, (OSError, EOFError)):
            when = "in the middle of its answer" if timed.received else "before it answered"
            return AgentError(LOST, UNREACHABLE, f"{address} cut the connection {when}", hold_s=CUT_BUSY_S)
        return AgentError(UNCLEAR, PROTOCOL, f"{address} answered what is not HTTP: {error}")


@functools.lru_cache(maxsize=1)
def _unverified_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _request_bytes(call: _Call) -> bytes:
    host = f"[{call.address.host}]" if ":" in call.address.host else call.address.host
    headers = {"Host": call.host or f"{host}:{call.address.port}"}
    if not call.keeps_connection:
        headers["Connection"] = "close"
    if call.body is not None:
        headers.update({"Content-Type": "application/json", "Content-Length": str(len(call.body))})
    return encode_message(f"{call.method} {call.path} HTTP/1.1", headers, call.body or b"")


def _is_readable(sock: socket.socket) -> bool:
    """Return whether an idle connection is readable: it has ended, as there is no answer to come."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def _refusal(error: Exception) -> str:
    """Return the alert by which an agent refused our certificate, or ""."""
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLError) and "ALERT" in reason and reason.endswith(REFUSAL_ALERTS):
        return str(reason).split("ALERT_", 1)[1].replace("_", " ").lower()
    return ""


async def _late_alert(timed: TimedSocket) -> str:
    """Return the refusal that one more read brings after a failure: with TLS 1.3 it follows the handshake."""
    for _ in range(2):
        try:
            timed.ends_at = time.monotonic() + 0.5
            if not await timed.recv(1):
                return ""
        except Exception as error:  # anything but an alert is of no use
            if _refusal(error):
                return _refusal(error)
    return ""


# endregion


# region Driver
# ======================================================================================
# Driver: one claimed release: read, decide, commit, send, collect.
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Model, Freezes, Strategy,
#   Plan, Node index, Status texts, Decision, Overview, Event loop, Dialects, Agents.
# ======================================================================================

class Lease:
    """A claim, and until when this process may rely on it by its own clock."""

    def __init__(self, claim: Claim, valid_until: float):
        self.claim = claim
        self.valid_until = valid_until
        self.is_lost = False

    def is_valid(self, elapsed: float) -> bool:
        """Return whether a request may leave at this moment of the elapsed clock."""
        return not self.is_lost and elapsed < self.valid_until


class Slots:
    """AGENT_CONCURRENCY, in equal shares for the drivers of this process.

    A driver takes slots before it commits a dispatch: one that is written down and then queued would leave too late.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._guard = threading.Lock()
        # Slots of each driver that runs.
        self._held: dict[Hashable, int] = {}
        # Drivers that got less than their share, and how each is woken when a slot is free.
        self._short: dict[Hashable, Callable[[], None]] = {}

    def join(self, driver: Hashable) -> None:
        """Count a driver in: the shares of the others get smaller."""
        with self._guard:
            self._held[driver] = 0

    def held(self, driver: Hashable) -> int:
        """Return how many slots a driver has."""
        return self._held.get(driver, 0)

    def take(self, driver: Hashable, wake: Callable[[], None]) -> int:
        """Give a driver what is free of its share and return how many slots that is; wake it later if it was less."""
        with self._guard:
            share = max(1, self._limit // max(1, len(self._held))) - self.held(driver)
            count = max(0, min(share, self._limit - sum(self._held.values())))
            self._held[driver] = self.held(driver) + count
            if count < share:
                self._short[driver] = wake
            return count

    def shortage(self, driver: Hashable) -> str:
        """Return '64 of 64 in use by release 4' where others have all slots, "" where a driver has some or could."""
        with self._guard:
            if self.held(driver) or sum(self._held.values()) < self._limit:
                return ""
            return f"{self._limit} of {self._limit} in use by {in_words([d for d, held in self._held.items() if held])}"

    def give_back(self, driver: Hashable, count: int, had_enough: bool = False) -> None:
        """Take slots back from a driver and wake those that are short of some; had_enough: it is not one of them."""
        if count:
            with self._guard:
                self._held[driver] -= count
                if had_enough:
                    self._short.pop(driver, None)
            self._wake_short()

    def leave(self, driver: Hashable) -> None:
        """Count a driver out at its end."""
        with self._guard:
            self._held.pop(driver, None)
            self._short.pop(driver, None)
        self._wake_short()

    def _wake_short(self) -> None:
        """Wake each driver that is short of slots, outside the lock."""
        with self._guard:
            woken, self._short = self._short, {}
        for wake in woken.values():
            wake()


@dataclasses.dataclass
class DriverContext:
    """What the drivers of one executor share."""
    settings: Settings
    store: Store
    agents: AgentClient
    owner: str
    policy: Policy
    slots: Slots
    # Set when the process is to end.
    stopping: threading.Event
    # Start a coroutine that talks to an agent.
    submit: Callable[[Callable[[], Coroutine[Wait, None, None]]], None]
    # Called by a driver's thread at its end.
    ended: Callable[[Driver], None]


class Driver:
    """Drive one claimed release, in a thread of its own: read, decide, commit, send, collect."""

    def __init__(self, context: DriverContext, lease: Lease, is_tick: bool):
        self.lease = lease
        # Ids of nodes and outcomes of their requests; None only wakes the driver. Not SimpleQueue: on Python 3.9 its
        # get() may wait for ever when the timeout is very short.
        self.results: queue.Queue[tuple[int, Outcome] | None] = queue.Queue()
        # When the last cycle began, by the elapsed clock.
        self.cycled_at = 0.0
        # The process cuts its own connections now: what they bring says nothing of an agent.
        self.ignores_outcomes = False
        self._context = context
        self._store = context.store
        self._is_tick = is_tick
        self._thread = threading.Thread(target=self._run, name=f"release-{lease.claim.release_id}", daemon=True)

        # -- what is known of the release ------------------------------------------------
        self._nodes = NodeIndex()
        # The nodes must be read again before the next decision.
        self._is_stale = True
        # They were read since the last commit, which then counts them: somebody may have turned a row.
        self._is_anew = True
        # updated_at of the last row that we read or wrote; a difference means that somebody changed the release.
        self._seen_at = ""
        # Generation of the database that the nodes were read from (DatabaseState.generation).
        self._generation = context.store.state.generation
        self._payload: dict[str, Any] = {}
        # By dialect, as far as they were needed: payload_text().
        self._payload_texts: dict[str, str] = {}
        self._strategy = NO_STRATEGY
        self._policy = context.policy
        # Why payload or strategy can't be used, "" where they can.
        self._broken = ""
        self._freeze = NO_FREEZE
        # Paused, cancelling or frozen: nothing may be dispatched.
        self._is_halted = False

        # -- where the cycle is ----------------------------------------------------------
        self._in_flight = 0
        # A commit that ended in an error: whether it took place is not known.
        self._unclear: tuple[Release, Decision] | None = None
        # Cycles in a row that were rolled back because somebody else changed the release.
        self._moved = 0
        self._outage = Outage(lease.claim, extra=about(lease.claim))
        self._news_at = self._reason_written_at = self._decided_at = self._now().elapsed

    def __str__(self) -> str:
        return f"release {self.lease.claim.release_id}"

    def start(self) -> None:
        """Start the thread."""
        self.cycled_at = self._now().elapsed
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end, at most timeout_s."""
        self._thread.join(timeout_s)

    def is_running(self) -> bool:
        """Return whether the thread has not ended."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Start the next cycle now."""
        self.results.put(None)

    def _now(self) -> Moment:
        return self._store.state.moment()

    def _run(self) -> None:
        try:
            wait_s = self.step()
            while wait_s is not None:
                self.collect(wait_s)
                wait_s = self.step()
        except Exception:  # the edge of a driver, as in step()
            log.exception("%s: its driver failed", self.lease.claim, extra=about(self.lease.claim))
        finally:
            self.lease.is_lost = True
            self._context.ended(self)

    def step(self) -> float | None:
        """Run one cycle and release the claim after the last; return how many seconds to wait, None at the end."""
        claim = self.lease.claim
        self.cycled_at = self._now().elapsed
        try:
            wait_s = self.cycle()
            if wait_s is None and not self.lease.is_lost:
                self._store.claims.drop(claim)
            return wait_s
        except ClaimLost as error:
            log.warning("%s: stopped working on it: %s", claim, error, extra=about(claim))
        except DatabaseError as error:
            log.error("%s: stopped working on it, and its claim could not be released: %s", claim, error,
                      extra=about(claim))
        except AppError as error:
            log.error("%s: stopped working on it: %s", claim, error, extra=about(claim))
        except Exception:  # the edge of a driver: the release goes on when the claim has run out
            log.exception("%s: its driver failed", claim, extra=about(claim))
        return None

    def cycle(self) -> float | None:
        """Read, decide, commit, send; return how many seconds to wait for outcomes, None at the end."""
        try:
            release = self._read()
            now = self._now()
            decision = self._decide(release, now)
            is_news = decision.must_commit(release)
            if is_news or self._is_reason_due(release, decision, now):
                self._commit(release, decision, now)
            if is_news:
                self._news_at = now.elapsed
            if decision.status in TERMINAL:
                self.lease.is_lost = True  # the commit released the claim
                return None
            self._send(release, decision, now)
            if self._may_leave(decision, now):
                if not is_news and decision.status_reason != release.status_reason:
                    self._commit(release, decision, now)  # what is true while nobody works on it
                return None
            if self._context.slots.held(self) <= self._in_flight:
                return self._policy.interval_s
            return min(max(decision.wake_at - self._now().elapsed, 0.0), self._policy.interval_s)
        except StateMoved as error:
            log.info("%s: read again, as %s", self.lease.claim, error, extra=about(self.lease.claim))
            self._is_stale, self._unclear = True, None  # rolled back for certain
            self._moved += 1
            return 0.0 if self._moved == 1 else min(0.01 * 2.0**min(self._moved, 10), self._policy.interval_s)
        except DatabaseError as error:
            # what agents answered stays in memory, and is written when the database is back
            is_over = self._is_tick and not self.lease.is_valid(self._now().elapsed)  # others may go on then
            if self.lease.is_lost or self._context.stopping.is_set() or is_over:
                raise
            self._outage.log(f"{error}; trying again")
            self._is_stale = True
            return min(self._policy.interval_s, 1.0)
        finally:
            self._give_back_slots()

    def _give_back_slots(self) -> None:
        unused = self._context.slots.held(self) - self._in_flight
        self._context.slots.give_back(self, unused, had_enough=True)

    def _is_reason_due(self, release: Release, decision: Decision, now: Moment) -> bool:
        """Return whether a new status_reason alone is worth a commit: the last one is an interval old."""
        return (decision.status_reason != release.status_reason
                and now.elapsed >= self._reason_written_at + max(self._policy.interval_s, 1.0))

    # -- read ----------------------------------------------------------------------------

    def _read(self) -> Release:
        """Return the release as it is now; read its nodes again where what is known of them may be old."""
        if self._unclear is not None:
            self._settle(*self._unclear)
        if not self._is_stale:
            release = self._store.claims.read(self.lease.claim)
            if release.updated_at == self._seen_at and self._store.state.generation == self._generation:
                return release
            # an operator changed it, and may have accepted failures too
        release, rows = self._store.claims.read_with_nodes(self.lease.claim)
        holds, moved_s = self._store.claims.holds(release.id), self._store.claims.dispatch_blockers(release.id).moved_s
        self._broken = ""
        try:
            self._payload, self._payload_texts = release.read_payload(), {}
            self._strategy = parse_strategy(parse_json(release.strategy))
            self._policy = self._context.policy.under(self._strategy)
            refuse_dropping_sites(self._payload, (row for row in rows if row.status != SUCCESS))
        except (ValueError, AppError) as error:
            self._broken = f"payload or strategy can't be used: {one_line(error, 200)}"
        now, nodes = self._now(), []
        went_back, self._generation = self._store.state.generation != self._generation, self._store.state.generation
        for row in rows:
            known = self._nodes.get(row.node_id)
            if known is None or went_back or (known.status, known.attempts) != (row.status, row.attempts):
                nodes.append(self._recover(row, known, now, holds, max(0.0, self._policy.hold_s - moved_s)))
            else:
                nodes.append(known._replace(accepted=row.accepted, last_version=row.last_version))
        self._nodes = NodeIndex(nodes)
        self._is_stale, self._is_anew, self._seen_at = False, True, release.updated_at
        return release

    def _recover(self, row: ReleaseNode, known: ReleaseNode | None, now: Moment, holds: Sequence[Hold],
                 quiet_s: float) -> ReleaseNode:
        """Return a node as its row tells, to be asked before it is sent anything; what is in flight stays so."""
        node = recover(row, now, self._policy, holds, quiet_s)
        if known is None or not known.in_flight:
            return node
        # its outcome is to come, and until then nobody else may ask
        return node._replace(in_flight=True) if node.status in OPEN else node

    def _settle(self, release: Release, decision: Decision) -> None:
        """Find out whether a commit that ended in an error took place, before anything is repeated.

        Where it did, its requests did not leave: they are due now, as repetitions.
        """
        if self._store.claims.was_written(self.lease.claim, decision):
            self._store.queue.log_written(release, decision, self._context.owner)
            for change in decision.changes:
                self._nodes.put(change.after._replace(in_flight=False))
            if decision.status in TERMINAL:
                self.lease.is_lost = True
                raise ClaimLost("the release has ended: the commit that seemed to fail took place")
        self._unclear = None

    # -- decide --------------------------------------------------------------------------

    def _decide(self, release: Release, now: Moment) -> Decision:
        busy: frozenset[Endpoint] = frozenset()
        asks_first = False
        if release.status == RUNNING and (self._nodes.of[RUNNING] or self._nodes.of[PENDING]):
            busy, freezes, moved_s = self._store.claims.dispatch_blockers(release.id)
            self._freeze = freezes.of(release)
            if moved_s < self._policy.hold_s:
                # a request may be under way that the database has lost
                busy |= {n.endpoint for n in self._nodes.of[PENDING].values() if not n.dialect.can_be_asked}
            # a release made before it went back may have been dispatched already (an hour: clocks differ)
            asks_first = moved_s < now.wall - epoch_or(release.created_at, now.wall) + 3600
        self._is_halted = release.status != RUNNING or self._freeze.frozen
        passed_s = now.elapsed - self._decided_at
        if passed_s > self._context.settings.claim_ttl_sec:  # suspended: pauses that came and went it did not see
            passed_s = held_s(self._store.claims.holds(release.id), now.wall - passed_s, now.wall)
        elif not self._is_halted:
            passed_s = 0.0
        for node in kept_from_dispatch(self._nodes, passed_s) if passed_s else ():
            self._nodes.put(node)
        self._decided_at = now.elapsed
        return decide(Situation(release, self._nodes, now, self._policy, self._strategy, self._take_slots(), busy,
                                self._broken, self._freeze, asks_first, self._context.slots.shortage(self)))

    def _take_slots(self) -> int:
        """Return how many requests may leave now; what is not used is given back at the end of the cycle."""
        if self._context.stopping.is_set() or not self.lease.is_valid(self._store.clock.elapsed()):
            return 0
        return self._context.slots.take(self, self.wake)

    # -- commit --------------------------------------------------------------------------

    def _commit(self, release: Release, decision: Decision, now: Moment) -> None:
        self._unclear = release, decision
        try:
            self._store.claims.commit(self.lease.claim, release, decision, now, self._context.owner, self._is_anew)
        except UnstorableValue as error:
            log.error("%s: %s; written in ASCII instead", self.lease.claim, error, extra=about(self.lease.claim))
            decision = decision.in_ascii()
            self._unclear = release, decision
            self._store.claims.commit(self.lease.claim, release, decision, now, self._context.owner, self._is_anew)
        self._unclear, self._is_anew = None, False
        self._seen_at = now.text
        self._moved = 0
        self._outage.end()
        self._reason_written_at = now.elapsed
        self._nodes = decision.nodes

    # -- send ----------------------------------------------------------------------------

    def _send(self, release: Release, decision: Decision, now: Moment) -> None:
        for op, node in decision.sends:
            self._nodes.put(node)
            self._in_flight += 1
            payload = self._payload_for(node.agent_protocol, release)
            task = AgentTask(node.task_id, release.type, release.version, payload)
            self._context.submit(functools.partial(self._request, op, node, task, now))

    def _payload_for(self, protocol: str, release: Release) -> str:
        if protocol not in self._payload_texts:
            self._payload_texts[protocol] = payload_text(protocol, self._payload, release.version)
        return self._payload_texts[protocol]

    def may_dispatch(self, written_at: Moment) -> bool:
        """Return whether a dispatch may leave this instant: the claim holds, it is not too late, nobody paused.

        Asked after connecting, just before the first byte. A new owner of the release waits for a request that left
        soon after it was written down, and for no other.
        """
        elapsed = self._store.clock.elapsed()
        is_soon = elapsed <= written_at.elapsed + self._policy.leave_within_s
        return is_soon and not self._is_halted and self.lease.is_valid(elapsed)

    async def _request(self, op: str, node: ReleaseNode, task: AgentTask, written_at: Moment) -> None:
        """Run one request in an event loop, and queue exactly one outcome, whatever happens."""
        meter = Meter(self._ask(op, node, task, written_at))
        try:
            outcome: Outcome = await meter
        except Exception:  # the edge of a coroutine: a node must never be forgotten
            claim = self.lease.claim
            log.exception("%s: node %s: %s failed within releasectl", claim, node.name, op,
                          extra=about(claim, node=node.name))
            outcome = Outcome(op, LOST, "", PROTOCOL, "releasectl itself failed: see its log",
                              hold_s=self._policy.request_timeout_s)
        self.results.put((node.node_id, outcome._replace(cost_s=meter.cost_s)))

    async def _ask(self, op: str, node: ReleaseNode, task: AgentTask, written_at: Moment) -> Outcome:
        address = Address(node.main_ip, node.agent_port, node.agent_protocol)
        within_s = node.deadline - written_at.elapsed if node.status in OPEN else float("inf")
        agents = self._context.agents
        try:
            if op == PING:
                return await agents.ask(address, within_s)
            if op == PROBE:
                return await self._probe(node, within_s)
            if op == QUERY:
                return await agents.query(address, task.id, within_s)
            outcome = await agents.dispatch(address, task, within_s, functools.partial(self.may_dispatch, written_at))
            is_accepted = outcome == Outcome(DISPATCH, ACCEPTED, task.id)
            return await self._poll_at_once(address, outcome, within_s) if is_accepted else outcome
        except ConfigError as error:  # the certificate was removed
            return Outcome(op, UNSENT, "", TLS, error.message)

    async def _probe(self, node: ReleaseNode, within_s: float) -> Outcome:
        verify = self._strategy.verify
        if verify is None:  # removed by hand after the probe was decided on
            return Outcome(PROBE, SUCCESS)
        return await self._context.agents.probe(node.main_ip, verify, verify.url_for(node),
                                                min(verify.timeout_s, max(within_s, 0.0)))

    async def _poll_at_once(self, address: Address, accepted: Outcome, within_s: float) -> Outcome:
        """Poll a task just dispatched, on the same connection: a quick one has ended by then.

        That saves a cycle of the driver. Whatever else the agent answers, a later poll will hear again.
        """
        polled = await self._context.agents.query(address, accepted.task_id, min(within_s, FIRST_POLL_TIMEOUT_S))
        return polled if polled.result == SUCCESS or polled.error_kind == AGENT_FAILED else accepted

    # -- collect -------------------------------------------------------------------------

    def collect(self, wait_s: float) -> None:
        """Wait at most wait_s for an outcome or a wake(), then fold in all outcomes that are there.

        With many requests in flight it gathers for GATHER_S: a commit for each outcome would cost more than the
        requests themselves. It stops gathering when half of the slots are free again.
        """
        with contextlib.suppress(queue.Empty):
            result = self.results.get(timeout=wait_s)
            enough, gather_until = self._in_flight // 2, time.monotonic() + min(GATHER_S, wait_s)
            while True:
                if result is not None:
                    self._fold(*result)
                left_s = gather_until - time.monotonic() if self._in_flight > enough else 0.0
                result = self.results.get(timeout=max(left_s, 0.0))

    def _fold(self, node_id: int, outcome: Outcome) -> None:
        self._in_flight -= 1
        self._context.slots.give_back(self, 1)
        node = self._nodes.get(node_id)
        if self.ignores_outcomes or node is None:  # its row was deleted by hand
            return
        now = self._now()
        if outcome.result != WORKING:
            self._news_at = now.elapsed
        if outcome.error_kind and outcome.result not in (FAILED, NOT_SENT):
            claim, name = self.lease.claim, node.name
            log.info("%s: node %s: %s failed, %s", claim, name, outcome.op, outcome.message,
                     extra=about(claim, node=name))
        self._nodes.put(observe(node, outcome, now, self._policy))

    def _may_leave(self, decision: Decision, now: Moment) -> bool:
        """Return whether the claim can be released: nothing is in flight, and there is no reason to stay."""
        if self._in_flight:
            return False
        if self._context.stopping.is_set():
            return True
        waits = decision.status == PAUSED or (decision.status == RUNNING and self._freeze.frozen)
        if waits and not self._nodes.of[RUNNING]:
            return True
        if not self._is_tick or now.elapsed - self._news_at < self._policy.interval_s:
            return False
        # do not end the tick between retries or probes: their counters are in memory only
        is_untouched = self._nodes.is_untouched
        return not any((n.errors or n.passes) and n.due <= now.elapsed + BACKOFF_MAX_S for n in self._nodes
                       if n.status != PENDING or is_untouched)


# endregion


# region Notifier
# ======================================================================================
# Notifier: what is in the outbox goes to a command or a URL; releases that are stuck.
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Certificates, Failures, Why,
#   Notifications, Overview, Event loop, HTTP wire.
#
#   One thread of an executor, with transactions of its own: no release waits for it. A message may come
#   twice, under the same id: a process that is killed after a receiver has it has not written that yet.
# ======================================================================================

# Time for a try at one receiver.
TRY_S = 10.0
# End of a command's output that is kept, and what is read of a receiver's answer at most.
MAX_OUTPUT_BYTES, MAX_REPLY_BYTES = 4096, 64 << 10
# The wait after a cycle in which a receiver failed.
PAUSE_S = 5.0
# Time that a tick has for what is in the outbox.
TICK_NOTIFIES_S = 15.0
# A release is stuck that is stopped, with nothing written of it for so long; how often that is looked at.
STUCK_AFTER_S, STUCK_EVERY_S = 300.0, 60.0
# Steps that stop a release because a person wants it.
WANTED_STOPS = ("freeze", "order", "approval", "pause")
# Steps that stop all releases alike.
COMMON_STOPS = {"database", "executor"}
# What a command must not have: our settings, among them secrets, and what is between us and systemd.
HIDDEN_VARIABLES = {*(setting.name for setting in SETTINGS), "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}

# The seconds that are left for something.
Left = Callable[[], float]
# Gets id and body of a message to a receiver, or raises NotDelivered.
Receiver = Callable[[str, bytes, Left], None]


class NotDelivered(Exception):
    """A receiver has not got a message, as far as is known: one line, without secrets."""

    def __init__(self, text: str, said: str = ""):
        """said: the last line that a command printed, which may hold a secret: for who tries it by hand."""
        super().__init__(text)
        self.said = said


def receivers_of(settings: Settings) -> dict[str, Receiver]:
    """Return the receivers by the names of their settings."""
    found: dict[str, Receiver] = {}
    if settings.notify_command:
        found["NOTIFY_COMMAND"] = functools.partial(_run_command, settings.notify_command)
    if settings.notify_url:
        found["NOTIFY_URL"] = functools.partial(_post, settings.notify_url, settings.notify_secret_file,
                                                settings.notify_ca)
    return found


def _run_command(words: Sequence[str], _message_id: str, body: bytes, left_s: Left) -> None:
    """Run a command with the message as its standard input; end it, with all processes of its group, in time."""
    name, output = os.path.basename(words[0]), bytearray()
    try:
        with open(os.memfd_create("notification"), "w+b") as message:  # no pipe: it may be read at any time, or never
            message.write(body)
            message.seek(0)
            process = subprocess.Popen(
                words, stdin=message, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                env={key: value for key, value in os.environ.items() if key not in HIDDEN_VARIABLES})
    except (OSError, ValueError) as error:
        raise NotDelivered(f"{name} can't be run: {os_reason(error)}") from None
    with cast(io.BufferedReader, process.stdout) as stdout:
        has_ended = _read_until_end(process.pid, stdout.fileno(), output, left_s)
        with contextlib.suppress(OSError):  # it became another user
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
    code = process.returncode if has_ended else None
    if code != 0:
        last = output.decode("utf-8", "replace").strip().rpartition("\n")[2]
        said = one_line(without_url_secrets(last), 160)
        what = ("did not end in time, and was killed" if code is None else
                f"ended with {code}" if code > 0 else f"was killed by signal {-code}")
        if said:
            log.debug("notifications: %s %s: %s", name, what, said)
        raise NotDelivered(f"{name} {what}", said)


def _read_until_end(pid: int, descriptor: int, output: bytearray, left_s: Left) -> bool:
    """Read what a process says until it ends; return whether it did in time."""
    os.set_blocking(descriptor, False)
    poller, has_ended = select.poll(), False
    poller.register(descriptor, select.POLLIN)
    while not has_ended and left_s() > 0:
        if poller.poll(50) and not _read_some(descriptor, output):
            poller.unregister(descriptor)
        # not reaped: until then its number, which is that of its group, is nobody else's
        has_ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    _read_some(descriptor, output)
    return has_ended


def _read_some(descriptor: int, output: bytearray) -> bool:
    """Read what a command says, and keep the last of it; return False at the end."""
    with contextlib.suppress(BlockingIOError):
        data = os.read(descriptor, 65536)
        output[:] = (output + data)[-MAX_OUTPUT_BYTES:]
        return bool(data)
    return True


def _shown_url(url: str) -> str:
    """Return NOTIFY_URL as it may be shown: all but scheme, host and port may be a secret."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/***"


def _post(url: str, secret_file: str, ca: str, message_id: str, body: bytes, left_s: Left) -> None:
    """Send a message by POST; only a status of 2xx is a success, and no redirect is followed."""
    parts, shown, ends_at = urllib.parse.urlsplit(url), _shown_url(url), time.monotonic() + left_s()
    try:
        context = receiver_context(ca) if parts.scheme == "https" else None
        headers = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json",
                   "Content-Length": str(len(body)), "User-Agent": f"releasectl/{__version__}", "Connection": "close",
                   "X-Releasectl-Id": message_id}
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        if secret_file:
            headers["X-Releasectl-Signature"] = signature_of(body, secret_file)
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        sock = _connect(parts.hostname or "", parts.port or (443 if context else 80), ends_at)
        try:
            if context:
                sock = context.wrap_socket(sock, server_hostname=parts.hostname, do_handshake_on_connect=False)
            status = run_coroutine(_exchange(sock, encode_message(f"POST {target} HTTP/1.1", headers, body), left_s))
        finally:
            close_quietly(sock)
    except ssl.SSLCertVerificationError as error:
        raise NotDelivered(f"{shown} presented a bad certificate: {error.verify_message}") from None
    except socket.timeout:
        raise NotDelivered(f"{shown} did not answer in time") from None
    except ConfigError as error:
        raise NotDelivered(error.message) from None
    except (AppError, TooBig) as error:
        raise NotDelivered(f"{shown} answered what is not HTTP, or too much: {error}") from None
    except (OSError, EOFError, UnicodeError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else "it cut the connection"
        raise NotDelivered(f"{shown} can't be reached: {reason}") from None
    if not 200 <= status < 300:
        raise NotDelivered(f"{shown} answered {status}" + (", a redirect" if 300 <= status < 400 else ""))


def signature_of(body: bytes, secret_file: str) -> str:
    """Return the signature of a body: HMAC-SHA256 under the line in a file; raise ConfigError."""
    secret = read_secret_file("NOTIFY_SECRET_FILE", secret_file, "the secret that signs notifications")
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def _look_up(host: str, port: int, ends_at: float) -> list[tuple[Any, ...]]:
    """Return the results of getaddrinfo(), which has no time limit of its own; raise OSError.

    A thread that waits for DNS is left behind: a try that outlasted SENDING_S would send a message twice.
    """
    answers: queue.SimpleQueue[list[tuple[Any, ...]] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    try:
        threading.Thread(target=ask, name="notifier-dns", daemon=True).start()
        answer = answers.get(timeout=max(ends_at - time.monotonic(), 0.001))
    except queue.Empty:
        raise socket.timeout from None
    except RuntimeError as error:
        raise OSError(f"no room for a thread: {error}") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _connect(host: str, port: int, ends_at: float) -> socket.socket:
    """Return a connection to the first address of a host that takes one; raise OSError.

    Each address has its share of the time that is left: one that swallows packets leaves some to the next.
    """
    error: OSError = socket.timeout()
    found = _look_up(host, port, ends_at)
    for index, (family, kind, number, _, target) in enumerate(found):
        sock = socket.socket(family, kind, number)
        try:
            sock.settimeout(max((ends_at - time.monotonic()) / (len(found) - index), 0.001))
            sock.connect(target)
            sock.setblocking(False)
            return sock
        except OSError as failed:
            sock.close()
            error = failed
    raise error


async def _exchange(sock: socket.socket, request: bytes, left_s: Left) -> int:
    """Send a request; return the status of the answer.

    Nothing behind its line is read but the heads of interim answers: a receiver that says 2xx has the message.
    """
    timed = TimedSocket(sock, time.monotonic() + left_s(), MAX_REPLY_BYTES)
    if isinstance(sock, ssl.SSLSocket):
        await timed.when_ready(sock.do_handshake, select.POLLIN)
    await timed.sendall(request)
    buffer, is_interim = b"", False
    while True:
        line, end, rest = buffer.partition(b"\n")
        if not end:
            timed.ends_at = time.monotonic() + min(left_s(), 0.2)  # in parts: stop() may shorten the time
            try:
                data = await timed.recv(16384)
            except socket.timeout:
                if left_s() <= 0:
                    raise
                continue
            if not data:
                raise EOFError
            buffer += data
            continue
        buffer, line = rest, line.rstrip(b"\r")
        if is_interim:
            is_interim = bool(line)
            continue
        first = STATUS_LINE.fullmatch(line.decode("latin-1"))
        if not first:
            raise AppError(MALFORMED, "the first line is not HTTP/1.1 STATUS REASON")
        if int(first[2]) >= 200:
            return int(first[2])
        is_interim = True


def message_of(kind: str, at: str, detail: str, host: str, public_url: str, why: Why | None = None,
               failures: Iterable[FailureGroup] = ()) -> dict[str, Any]:
    """Return a message; why: of its release, as it is now."""
    release = why.release if why else None
    return {
        "id": secrets.token_hex(16), "kind": kind, "at": at, "host": host, "text": _message_text(kind, detail, why),
        "link": f"{public_url}/#/releases/{release.id}" if public_url and release else public_url,
        "release": {
            "id": release.id, "target": release.target, "version": release.version, "status": release.status,
            "statusReason": release.status_reason, "reason": release.reason, "totalNodes": release.total_nodes,
            "successNodes": release.success_nodes, "failedNodes": release.failed_nodes,
            "skippedNodes": release.skipped_nodes} if release else None,
        "failures": failures_json(failures)}


def _message_text(kind: str, detail: str, why: Why | None) -> str:
    """Return a message in one sentence; where the release has gone on since, what it was and what it is."""
    if why is None or why.release is None:
        return one_line(detail)
    status = {CREATED: PENDING, STARTED: RUNNING}.get(kind, kind)
    if kind in (TAKEN_OVER, APPROVAL):
        return one_line(f"{why.release}: {detail}")
    if why.release.status == status or (kind == STUCK and why.stopped_by):
        return one_line(why.line)
    return one_line(f"{why.release} was {kind}{f': {detail}' if detail else ''}; now: {why.text}")


def check_url(settings: Settings) -> str:
    """Return NOTIFY_URL as it may be shown; raise ConfigError where a file for it can't be used."""
    if settings.notify_url and settings.notify_secret_file:
        signature_of(b"", settings.notify_secret_file)
    if settings.notify_url.startswith("https:"):
        receiver_context(settings.notify_ca)
    return _shown_url(settings.notify_url)


class Notifier:
    """Send what is in the outbox, and note which releases are stuck."""

    def __init__(self, settings: Settings, store: Store, metrics: Metrics, owner: str, host: str):
        self.receivers = receivers_of(settings)
        self._settings, self._store, self._metrics = settings, store, metrics
        self._owner, self._host = owner, host
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        # Whether the thread sends before it ends.
        self._finishes = False
        # By time.monotonic(): nothing is tried after that.
        self._ends_at = float("inf")
        self._stuck_at = time.monotonic() + STUCK_EVERY_S
        # The releases that were stopped at the last look.
        self._stopped: set[int] = set()
        self._outage = Outage("notifier")
        self._outages = {name: Outage(f"notifications: {name}") for name in self.receivers}

    def start(self) -> None:
        """Start the thread where there is a receiver; raise RuntimeError when there is no room for it."""
        if self.receivers and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Look into the outbox: another process wrote there. Without a receiver only what is too old is given up."""
        if self._thread:
            self._store.database.notified.set()
        else:
            self._cycle()

    def finish(self) -> None:
        """Send what is due before a tick ends, as far as that goes in TICK_NOTIFIES_S, or until a shorter stop()."""
        with contextlib.suppress(RuntimeError):  # no room for a thread: the next tick sends it
            self._finishes = True
            self.start()
        self.stop(TICK_NOTIFIES_S)
        self.join()

    def stop(self, within_s: float) -> None:
        """Let the thread end; a try that is under way has so many seconds."""
        self._ends_at = min(self._ends_at, time.monotonic() + within_s)
        self._closing.set()
        self._store.database.notified.set()

    def join(self) -> None:
        """Wait for the end of the thread, no longer than stop() said; what it has not sent is due again."""
        while self._thread and self._thread.is_alive() and time.monotonic() < self._ends_at + 0.5:
            self._thread.join(0.1)  # stop() may shorten the time meanwhile

    def _run(self) -> None:
        while True:
            self._store.database.notified.clear()
            if self._closing.is_set():
                if self._finishes:
                    self._note_stuck(is_sure=True)
                    self._cycle()
                return
            if time.monotonic() >= self._stuck_at:
                self._stuck_at = time.monotonic() + STUCK_EVERY_S
                self._note_stuck(is_sure=False)
            wait_s = self._cycle()
            self._store.database.notified.wait(min(wait_s, STUCK_EVERY_S))

    def _cycle(self) -> float:
        """Send what is due, each message once; return for how many seconds there is nothing to do.

        A receiver that fails is not tried again in the cycle: if it hangs, each message would take TRY_S.
        """
        tried, failed = set[int](), dict[str, str]()
        try:
            wait_s = 0.0
            while time.monotonic() < self._ends_at:
                notification, wait_s = self._store.outbox.next(0.0 if self.receivers else NOTIFY_GIVE_UP_S)
                if notification is None or wait_s > 0 or notification.id in tried:
                    break
                tried.add(notification.id)
                self._try(notification, failed)
            self._outage.end()
            return PAUSE_S if failed else wait_s
        except DatabaseError as error:
            self._outage.log(f"{error}; trying again")
        except Exception:  # the edge of a cycle: the thread goes on
            log.exception("notifier: a notification could not be sent")
        return PAUSE_S

    def _try(self, waiting: Notification, failed: dict[str, str]) -> None:
        """Send a message to each receiver that has not got it, but those that failed: errors by name, added to."""
        outbox = self._store.outbox
        notification = outbox.begin_try(waiting, waiting.body or to_json(self._message(waiting)))
        if notification is None:
            return
        sent, errors = notification.sent_to.split(), [] if self.receivers else ["no executor has a receiver"]
        message_id = str(stored_json(notification.body).get("id", ""))
        for name, receive in self.receivers.items():
            if name in sent:
                continue
            error = failed.get(name) or self._send(name, receive, message_id, notification.body.encode())
            if error:
                failed[name] = error
                errors.append(error)
            else:
                sent.append(name)
        outcome = outbox.end_try(notification._replace(sent_to=" ".join(sent)), one_line("; ".join(errors)),
                                 self._owner)
        if outcome == GIVEN_UP:
            self._metrics.count("releasectl_notifications_total", GIVEN_UP)
            log.error("notification %s of %s is given up: %s", notification.kind, notification.at, "; ".join(errors))

    def _send(self, name: str, receive: Receiver, message_id: str, body: bytes) -> str:
        """Send a message to a receiver; return the error, "" for none."""
        ends_at = time.monotonic() + TRY_S
        try:
            receive(message_id, body, lambda: min(ends_at, self._ends_at) - time.monotonic())
        except NotDelivered as error:
            self._outages[name].log(error)
            self._metrics.count("releasectl_notifications_total", UNDELIVERED)
            return f"{name}: {error}"
        self._outages[name].end()
        self._metrics.count("releasectl_notifications_total", SENT)
        return ""

    def _message(self, waiting: Notification) -> dict[str, Any]:
        why, failures = None, list[FailureGroup]()
        try:
            if waiting.release_id is not None:
                why = self._store.claims.why(waiting.release_id, self._settings.node_deadline_sec)
                failures = self._store.outbox.failures(waiting.release_id)
        except DatabaseError:
            raise
        except Exception:  # rows that were written by hand: what is known goes out, and holds up nothing else
            log.exception("notifier: release %d can't be explained", waiting.release_id)
        return message_of(waiting.kind, waiting.at, waiting.detail, self._host, self._settings.public_url, why,
                          failures)

    def _note_stuck(self, is_sure: bool) -> None:
        """Note which releases are stopped by what nobody wants; with is_sure at the first look, else at the second.

        Of what stops all releases the oldest one tells.
        """
        if STUCK not in self._settings.notify_on:
            return
        stopped, causes = set[int](), set[str]()
        try:
            for release_id in self._store.outbox.quiet_releases(STUCK_AFTER_S):
                if time.monotonic() >= self._ends_at:
                    break
                step = self._store.claims.why(release_id, self._settings.node_deadline_sec).stopped_by
                if step is None or step.name in WANTED_STOPS or step.name in causes:
                    continue
                causes.update({step.name} & COMMON_STOPS)
                stopped.add(release_id)
                if is_sure or release_id in self._stopped:
                    self._store.outbox.note_stuck(release_id, step.text, self._owner)
            self._stopped = stopped
        except AppError as error:  # also a release that is gone
            self._outage.log(f"{error}; trying again")


# endregion


# region Executor
# ======================================================================================
# Executor: scan, claims, leases, the threads.
# Uses: Vocabulary, Settings, Log and metrics, Model, Overview, Event loop, Agents,
#   Driver, Notifier.
#
#   One driver thread a claimed release alone reads and writes its rows. Coroutines only talk to
#   agents and put outcomes on its queue. One lease thread renews all claims. Persist, then send.
# ======================================================================================

# Two event loops: a TLS handshake releases the GIL, so the other one runs meanwhile.
EVENT_LOOPS = 2
# Seconds between commits of an executor's row in executors, and how much later than the scan after that it may be.
NOTE_EVERY_S, NOTE_LATE_S = 10.0, 5.0


@contextlib.contextmanager
def starting_threads() -> Iterator[None]:
    """Raise ConfigError where a thread within can't be started, or gets no descriptors."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"no thread can be started ({error}): this process needs more of `ulimit -u` (TasksMax) "
                          "or `ulimit -n`") from None


class Tick(NamedTuple):
    """What a tick or a drain did."""
    # The releases that it worked on, as they are now.
    worked_on: list[Release]
    # How many releases others hold.
    in_other_hands: int
    # Whether stop() ended it.
    was_stopped: bool
    # Ids of releases that it worked on and that are no longer in the database.
    vanished: Sequence[int] = ()


class Executor:
    """Claim releases and drive each to its end, or in a tick as far as it goes."""

    def __init__(self, settings: Settings, store: Store, agents: AgentClient, metrics: Metrics):
        self.settings = settings
        self.store = store
        self.agents = agents
        self.metrics = metrics
        self.clock = store.clock
        self.host = socket.gethostname()
        self.owner = f"{self.host}:{os.getpid()}:{secrets.token_hex(4)}"
        self.stopping = threading.Event()
        # Last scan of run_loop() without an error, by the wall clock; for people.
        self.scanned_at: float | None = None
        policy = Policy(settings.agent_retries, settings.node_deadline_sec, settings.agent_request_timeout_sec,
                        settings.release_executor_interval_sec, settings.agent_connect_timeout_sec)
        self.context = DriverContext(settings, store, agents, self.owner, policy, Slots(settings.agent_concurrency),
                                     self.stopping, self.submit, self.ended)
        self.notifier = Notifier(settings, store, metrics, self.owner, self.host)
        self._kind = TICK
        # When the row in executors was written, by the elapsed clock, with which error; None: it was not.
        self._noted_at: float | None = None
        self._noted_error = ""
        self._note_outage = Outage("executor: its row in the table executors", logging.WARNING)
        self._wake = threading.Event()
        self._guard = threading.Lock()
        self._drivers: dict[int, Driver] = {}
        self._loops = [EventLoop() for _ in range(EVENT_LOOPS)]
        self._next_loop = itertools.cycle(self._loops)
        self._lease_thread: threading.Thread | None = None
        self._renewed_at = self.clock.elapsed()
        self._closed = threading.Event()
        if settings.release_executor_enabled:
            metrics.put("releasectl_last_tick_timestamp_seconds", 0.0)

    # -- tick, drain, loop ---------------------------------------------------------------

    def tick(self, beat: Callable[[], None] = lambda: None) -> Tick:
        """Work on what is runnable, as far as it goes now (contract section 4); return what was done.

        beat is called several times a second meanwhile. Raise DatabaseError, and ConfigError when there is work and
        no way to call an agent; both only when what was started has ended.
        """
        started: list[Driver] = []
        taken, failure = 0, None
        self._start_notifier()
        try:
            taken = self._scan(started, is_tick=True)
        except AppError as error:
            if started:
                log.error("executor: %s", error)
            failure = error
        self._wait_for(started, float("inf"), beat)
        if failure is not None:
            raise failure
        return self._summary([driver.lease.claim.release_id for driver in started], taken)

    def drain(self, beat: Callable[[], None] = lambda: None) -> Tick:
        """Work until nothing is left to do; return what was done.

        beat is called several times a second meanwhile. Raise what tick() raises, where nothing is being worked on.
        """
        worked_on: dict[int, None] = {}
        running: list[Driver] = []
        outage = Outage("executor")
        self._start_notifier()
        while True:
            started: list[Driver] = []
            had_running, taken = bool(running), 0
            try:
                taken = self._scan(started, is_tick=False)
                if had_running:
                    self.agents.check_key()
                outage.end()
            except AppError as error:
                if not had_running and not started:
                    raise
                outage.log(f"{error}; trying again")
            worked_on.update(dict.fromkeys(driver.lease.claim.release_id for driver in started))
            # it scans again meanwhile: a release of ours may wait for a node of one whose owner died
            until = self.clock.elapsed() + self.settings.release_executor_interval_sec
            running = self._wait_for(running + started, until, beat)
            # what ran during the scan may have ended since, and made way for a release that it did not find
            if not (started or had_running) or self.stopping.is_set():
                return self._summary(worked_on, taken)

    def _wait_for(self, drivers: list[Driver], until: float, beat: Callable[[], None]) -> list[Driver]:
        """Wait for drivers to end, until a moment of the elapsed clock or stop(); return those that still run."""
        while ((drivers := [driver for driver in drivers if driver.is_running()]) and not self.stopping.is_set()
               and self.clock.elapsed() < until):
            drivers[0].join(0.2)
            self.metrics.put("releasectl_last_tick_timestamp_seconds", self.clock.wall())
            beat()
        if self.stopping.is_set():
            self.close()
        return drivers

    def _summary(self, worked_on: Iterable[int], taken: int) -> Tick:
        found = {release_id: self.store.releases.find(release_id) for release_id in worked_on}
        return Tick([release for release in found.values() if release], taken, self.stopping.is_set(),
                    tuple(release_id for release_id, release in found.items() if release is None))

    def run_loop(self, beat: Callable[[str], None] = lambda _: None) -> None:
        """Scan for work every interval, and at once when nudged, until stop(). Survive the database.

        beat is called after each scan, with a sentence on what is being done, as long as no thread of ours hangs.
        """
        self._kind = SERVE
        outage = Outage("executor")
        self._start_notifier()
        while not self.stopping.is_set():
            self._wake.clear()
            try:
                self._scan([], is_tick=False)
                self.scanned_at = self.clock.wall()
                self.agents.check_key()  # an open one is logged also while there is nothing to begin
                outage.end()
            except AppError as error:
                outage.log(f"{error}; trying again")
            except Exception:  # the edge of a scan: the loop goes on
                log.exception("executor: a scan for work failed")
            hung = self.hung()
            if hung:
                log.error("executor: %s", hung)
            else:
                beat(outage.error or self.at_work())
            self._wake.wait(self.settings.release_executor_interval_sec)

    def at_work(self) -> str:
        """Return a sentence on what is being done now."""
        with self._guard:
            ids = sorted(self._drivers)
        return f"at work on release {', '.join(map(str, ids))}" if ids else "nothing to do"

    def hung(self) -> str:
        """Return a sentence on the thread that hangs, "" when none does.

        The lease thread would keep the release of a driver that hangs, and no driver goes on without it.
        """
        late = self.clock.elapsed() - HUNG_AFTER_S
        for driver in self._active_drivers():
            if driver.cycled_at < late - self.settings.release_executor_interval_sec:
                return f"the driver of release {driver.lease.claim.release_id} hangs"
        if any(loop.is_hung(time.monotonic() - HUNG_AFTER_S) for loop in self._loops):
            return "a thread that talks to agents hangs"
        if self._lease_thread and self._renewed_at < late - self.settings.claim_ttl_sec / 3:
            return "the lease thread hangs"
        return ""

    def nudge(self) -> None:
        """Scan for work now, and start a cycle of each driver: something changed."""
        self._wake.set()
        for driver in self._active_drivers():
            driver.wake()

    def is_busy(self) -> bool:
        """Return whether a release is being driven now."""
        return bool(self._drivers)

    def stop(self) -> None:
        """Ask for a clean end, from any thread; return at once. Not for a signal handler: it takes locks."""
        self.stopping.set()
        self.store.database.end_within(STOP_GRACE_S)
        self.notifier.stop(STOP_GRACE_S)
        self._wake.set()

    def close(self) -> None:
        """End cleanly: requests in flight get STOP_GRACE_S, their answers are written, claims released.

        A tick that was not stopped sends notifications before.
        """
        if self._kind == TICK and not self.stopping.is_set():
            self.notifier.finish()
        self.stop()
        self.nudge()
        give_up_at = time.monotonic() + STOP_GRACE_S
        for driver in self._active_drivers():
            driver.join(max(give_up_at - time.monotonic(), 0.0))
        for driver in self._active_drivers():
            driver.ignores_outcomes = True
        self.agents.close()
        for driver in self._active_drivers():
            driver.join(STOP_GRACE_S)
        if self._kind == SERVE and self._noted_at is not None and not self._note_outage.error:
            self._noted_at = None
            with contextlib.suppress(DatabaseError):  # its row gets old then
                self.store.claims.end_executor(self.owner)
        self._closed.set()
        self.notifier.join()
        if self._lease_thread:
            self._lease_thread.join(STOP_GRACE_S)
        for loop in self._loops:
            loop.close()

    # -- scan and claim ------------------------------------------------------------------

    def _scan(self, started: list[Driver], is_tick: bool) -> int:
        """Scan for work, and count the scan; parameters and result as claim_runnable()."""
        outcome = ERROR
        try:
            taken = self.claim_runnable(started, is_tick)
            outcome = WORKED if started or self._active_drivers() else BUSY if taken else IDLE
            self.metrics.put("releasectl_last_tick_timestamp_seconds", self.clock.wall())
            self._note(self.hung())
            return taken
        except ConfigError as error:
            self._note(error.message)
            raise
        finally:
            self.metrics.count("releasectl_ticks_total", outcome)

    def _note(self, error: str) -> None:
        """Write the row in executors, where it gets old or says another error.

        That this fails is only logged, and it is tried again after the next scan.
        """
        now = self.clock.elapsed()
        if self._noted_at is not None and now < self._noted_at + NOTE_EVERY_S and error == self._noted_error:
            return
        try:
            if self.store.claims.note_executor(
                    self.owner, self.host, self._kind,
                    NOTE_EVERY_S + self.settings.release_executor_interval_sec + NOTE_LATE_S, error,
                    self._noted_at is None):
                self.notifier.wake()
            self._noted_at, self._noted_error = now, error
            self._note_outage.end()
        except DatabaseError as failure:
            self._note_outage.log(f"it could not be written: {failure}")

    def claim_runnable(self, started: list[Driver], is_tick: bool) -> int:
        """Claim what is runnable and start a driver for each, added to started; return how many others hold."""
        while True:
            mine = {driver.lease.claim.release_id for driver in self._active_drivers()}
            free, taken = self.store.claims.scan(self.owner)
            new = [release_id for release_id in free if release_id not in mine]
            if new:
                self.agents.prepare()  # raises before anything is claimed that could not be dispatched
                self._start_threads()
            # one that could not be claimed after all may have let others go first: it has a later version now
            if self._claim_all(new, taken, started, is_tick) or self.stopping.is_set():
                return len([release_id for release_id in taken if release_id not in mine])

    def _claim_all(self, release_ids: Iterable[int], taken: list[int], started: list[Driver], is_tick: bool) -> bool:
        """Claim releases and start their drivers; return False where one has to wait after all."""
        is_settled = True
        for release_id in release_ids:
            if self.stopping.is_set():
                break
            asked_at = self.clock.elapsed()
            try:
                claim = self.store.claims.claim(release_id, self.owner, self.settings.claim_ttl_sec)
            except StateMoved:  # another was quicker
                taken.append(release_id)
                continue
            if claim is not None:
                # started at once: an error at the next claim must not leave a claim without its driver
                started.append(self._drive(Lease(claim, asked_at + self.settings.claim_ttl_sec), is_tick))
            is_settled &= claim is not None
        return is_settled

    def _drive(self, lease: Lease, is_tick: bool) -> Driver:
        driver = Driver(self.context, lease, is_tick)
        self.context.slots.join(driver)
        with self._guard:
            self._drivers[lease.claim.release_id] = driver
        try:
            with starting_threads():
                driver.start()
        except ConfigError:
            self._forget(driver)  # not ended(): that would make the loop scan again at once
            self.store.claims.drop(lease.claim)
            raise
        return driver

    def _forget(self, driver: Driver) -> None:
        with self._guard:
            self._drivers.pop(driver.lease.claim.release_id, None)
        self.context.slots.leave(driver)

    def ended(self, driver: Driver) -> None:
        """Forget a driver at its end, and scan: the next release of its target may go now."""
        self._forget(driver)
        self._wake.set()

    def submit(self, request: Callable[[], Coroutine[Wait, None, None]]) -> None:
        """Start a coroutine that talks to an agent, in one event loop after the other."""
        next(self._next_loop).submit(request())

    def _active_drivers(self) -> list[Driver]:
        with self._guard:
            return list(self._drivers.values())

    # -- threads and leases --------------------------------------------------------------

    def _start_notifier(self) -> None:
        with starting_threads():
            self.notifier.start()

    def _start_threads(self) -> None:
        """Start what all drivers need, where it does not run; raise ConfigError when there is no room for it."""
        with starting_threads():
            for loop in self._loops:
                loop.start()
            if self._lease_thread is None:
                self._renewed_at = self.clock.elapsed()
                thread = threading.Thread(target=self._keep_leases, name="lease", daemon=True)
                thread.start()
                self._lease_thread = thread

    def _keep_leases(self) -> None:
        """Renew every claim three times in its life, apart from the work."""
        while not self._closed.wait(self.settings.claim_ttl_sec / 3):
            self._renewed_at = self.clock.elapsed()
            for driver in self._active_drivers():
                self._renew(driver.lease)
                self._renewed_at = self.clock.elapsed()

    def _renew(self, lease: Lease) -> None:
        asked_at = self.clock.elapsed()
        try:
            if self.store.claims.renew(lease.claim, self.settings.claim_ttl_sec):
                lease.valid_until = asked_at + self.settings.claim_ttl_sec
            else:
                lease.is_lost = True
        except DatabaseError as error:
            log.error("%s: its claim could not be renewed: %s", lease.claim, error, extra=about(lease.claim))
        except Exception:  # the lease thread must outlive everything
            log.exception("%s: its claim could not be renewed", lease.claim, extra=about(lease.claim))


# endregion


# region Languages
# ======================================================================================
# Languages: the sentences that people read, in Chinese, by their form; English where none
#   is known. Pure.
# Uses: nothing.
# ======================================================================================

# From the form of a sentence, or of a part of one, to its Chinese: {1} is what stood there, {1!} a sentence again. What
# agents and people wrote stays as it is.
_CHINESE_FORMS = (
    # what is told of a rollback stands behind what an agent said
    (r"(.*); ((?:release \d+ (?:rolls it back|is to roll it back)|(?:was to be )?rolled back by|not rolled back).*)",
     "{1!}；{2!}"),
    (r"(\d+) nodes? succeeded", "{1} 个节点成功"),
    (r"(\d+) of (\d+) nodes updated", "{2} 个节点中已更新 {1} 个"),
    (r"not rolled back, as it was cancelled: (once it has ended, )?(releasectl .*)", "因已取消而未回滚：{2}"),
    (r"release (\d+) rolls it back", "由发布 {1} 回滚"), (r"rolled back by release (\d+)", "已由发布 {1} 回滚"),
    (r"rolled back by release (\d+), which ended partial", "已由发布 {1} 回滚（部分成功）"),
    (r"release (\d+) is to roll it back and waits: (releasectl .*)", "将由发布 {1} 回滚，正在等待：{2}"),
    (r"was to be rolled back by release (\d+), which was cancelled", "本应由发布 {1} 回滚，但该发布已取消"),
    (r"was to be rolled back by release (\d+), which failed", "本应由发布 {1} 回滚，但该发布失败"),
    ("it can be rolled back", "可以回滚"),
    (r"finished with (\d+) failures? \(limit ([^)]*)\): (.*)", "结束时有 {1} 个失败（上限 {2!}）：{3}"),
    (r"(\S+) in a batch", "每批 {1}"), (r"(\S+) in all", "共 {1}"),
    (r"(\S+) in a batch, (\S+) in all", "每批 {1}，共 {2}"),
    (r"release (\d+) \(v(\d+)\) succeeded later on (.*): retry of release (\d+) would replace its payload",
     "发布 {1}（v{2}）之后已在 {3} 上成功：重试发布 {4} 会覆盖其内容"),
    (r"release (\d+) \(v(\d+)\) succeeded later on (.*): rollback of release (\d+) would replace its payload",
     "发布 {1}（v{2}）之后已在 {3} 上成功：回滚发布 {4} 会覆盖其内容"),
    (r"(overNewer \(--over-newer\)) if that is meant", "若确需如此：{1}"),
    (r"goes behind (.*): (supersede \(--now\)) cancels (?:it|them) and goes first",
     "排在{1}之后：{2} 将其取消并最先执行"),
    (r"(duringFreeze \(--during-freeze\)) goes out all the same", "{1}：照样执行"),
    (r"create a release that is good, or name one: (toRelease .*)", "请新建一个正确的发布，或指定一个：{1}"),
    (r"nothing to roll back to: no release of target (\S+) before (\d+) succeeded on any of its nodes",
     "无可回滚：发布 {2} 之前，目标 {1} 没有在其节点上成功的发布"),
    (r"nothing to roll back to: before release (\d+) its nodes had nothing of target (\S+) but (.*)",
     "无可回滚：发布 {1} 之前，其节点上目标 {2} 只有{3!}"),
    (r"release (\d+) \(v(\d+), rolled back\)", "发布 {1}（v{2}，已回滚）"),
    (r"release (\d+) \(v(\d+), the same payload\)", "发布 {1}（v{2}，payload 相同）"),
    (r"(release \d+ \([^)]*\)) and (release .*)", "{1!}和{2!}"),
    (r"stopped by node (\S+) in batch (\d+): (.*)", "因批次 {2} 的节点 {1} 而停止：{3}"),
    (r"stopped, (.*?): (.*); first node (\S+) in batch (\d+): (.*)",
     "已停止，{1!}：{2}；首个是批次 {4} 的节点 {3}：{5}"),
    (r"stopping, (.*): (waiting for .*)", "正在停止，{1!}：{2!}"),
    (r"node (\S+) failed", "节点 {1} 失败"),
    (r"(\d+) nodes? failed", "{1} 个节点失败"),
    (r"(\d+) of (\d+) nodes? failed(.*)", "{2} 个节点中有 {1} 个失败{3}"),
    ("queued for an executor", "等待执行器"),
    (r"frozen: ([^;]*)", "已冻结：{1}"),
    (r"frozen until (\S+(?: \d\S+)?)(?:, in [^,:]*)?: ([^;]*)", "已冻结，至 {1}：{2}"),
    (r"(\S+) is frozen: ([^;]*)", "{1} 已冻结：{2}"),
    (r"(\S+) is frozen until (\S+(?: \d\S+)?)(?:, in [^,:]*)?: ([^;]*)", "{1} 已冻结，至 {2}：{3}"),
    (r"frozen by (.*?): (.*)", "由 {1} 冻结：{2}"),
    (r"frozen until (\S+(?: \d\S+)?)(?:, in [^,]*)?, by (.*?): (.*)", "由 {2} 冻结，至 {1}：{3}"),
    (r"(\S+) is frozen by (.*?): (.*)", "{1} 由 {2} 冻结：{3}"),
    (r"(\S+) is frozen until (\S+(?: \d\S+)?)(?:, in [^,]*)?, by (.*?): (.*)", "{1} 由 {3} 冻结，至 {2}：{4}"),
    ("not frozen", "未冻结"),
    (r"scheduled for (\S+(?: \d\S+)?)(?:, in [^,]*)?", "定于 {1} 开始"),
    (r"scheduled for (\S+), and after release (\d+)", "定于 {1} 开始，并在发布 {2} 之后"),
    (r"it starts at ([^,]*)(?:, in (.*))?", "开始时间：{1}"),
    (r"waiting for (release [^;]*)", "等待{1!}"),
    (r"release (\d+), (which [^;]*?), then (release [^;]*)", "发布 {1}（{2!}），然后{3!}"),
    (r"release (\d+), (which [^;]*)", "发布 {1}（{2!}）"),
    ("which is pending", "等待中"), ("which is running", "进行中"), ("which is paused", "已暂停"),
    ("which is cancelling", "正在取消"), (r"which (.*) paused", "由 {1} 暂停"),
    (r"waiting for (.*) and (\d+) more to end", "等待 {1} 等另外 {2} 个节点结束"),
    (r"waiting for (.*) to end", "等待 {1} 结束"),
    (r"batch (\d+) of (\d+): waiting for (\d+) of (\d+) nodes?", "批次 {1}/{2}：{4} 个节点中还在等待 {3} 个"),
    (r"(batch .* nodes?), slowest (\S+?)(?:, which is verified)? for (\d+) s of (\d+) s",
     "{1!}，最慢的是 {2}，已 {3} 秒（时限 {4} 秒）"),
    (r"(batch .*?)(; .*)", "{1!}{2!}"),
    (r"batch (\d+) of (\d+): (\d+) of (\d+) nodes? done", "批次 {1}/{2}：{4} 个节点中已完成 {3} 个"),
    (r"batch (\d+) of (\d+): (\d+) of (\d+) nodes? done, (\d+) in flight: (.*)",
     "批次 {1}/{2}：{4} 个节点中已完成 {3} 个，{5} 个进行中：{6}"),
    (r"(?:trying again: )?(\S+): (.*), try (\d+) of (\d+), now", "正在重试 {1}：{2}，第 {3}/{4} 次"),
    (r"(?:trying again: )?(\S+): (.*), try (\d+) of (\d+), next in (\d+) s",
     "正在重试 {1}：{2}，第 {3}/{4} 次，{5} 秒后再试"),
    (r"(.*) busy with an earlier request", "{1} 仍在处理之前的请求"),
    (r"waiting for a free slot: (.*)", "等待空闲名额：{1}"),
    (r"waiting for a free slot \((.*)\)", "等待空闲名额（{1}）"),
    (r"soaking after batch (\d+) until ([^,]*)(?:, in (.*))?", "批次 {1} 之后观察，至 {2}"),
    (r"verifying batch (\d+) after its soak: waiting for (.*)", "观察后验证批次 {1}：等待 {2}"),
    (r"cancelling: (.*)", "正在取消：{1!}"), ("nothing is in flight", "没有进行中的节点"),
    (r"paused by (\S+) (?:in|after) batch (\d+): (.*)", "由 {1} 暂停（批次 {2}）：{3!}"),
    (r"paused (?:in|after) batch (\d+): (.*)", "已暂停（批次 {1}）：{2!}"),
    (r"paused by (\S+): (.*)", "由 {1} 暂停：{2!}"),
    (r"paused: (.*)", "已暂停：{1!}"),
    ("resume to go on", "可继续"),
    (r"(.*): resume to end the release", "{1!}：继续则结束此发布"),
    ("resume and accept the failures, or cancel", "请接受失败并继续，或取消"),
    (r"about (\d+) (s|min|h|days)(?: (\d+) min)? left(, then a pause)?", "{0}"),
    (r"no executor is running \((.*)\): start `serve`", "没有执行器在运行（{1!}）：请启动 serve"),
    ("none was seen for a day", "一天之内未见过任何执行器"),
    (r"(?:last seen|stopped) (.*) ago: (.*)", "最近一次在 {1} 之前：{2}"),
    (r"(\S+) can't dispatch: (.*)", "{1} 不能下发：{2}"),
    (r"nobody works on (\d+) releases?", "{1} 个发布无人处理"),
    (r"nobody works on it: (.*)", "无人处理：{1!}"),
    (r"(.*) works on it", "{1} 正在处理"),
    (r"(.*) looks for work, last (.*) ago", "{1} 在等待任务，最近一次在 {2} 之前"),
    ("it answers", "有应答"),
    (r"it takes no writes: (.*)", "无法写入：{1}"),
    (r"the database takes no writes: (.*)", "数据库无法写入：{1}"),
    (r"the database can't be used: (.*)", "数据库无法使用：{1}"),
    (r"nothing to do: no release is open", "无事可做：没有未结束的发布"),
    (r"it has ended: (\w+), (.*)", "已结束：{1}，{2!}"),
    (r"release (\d+) \(v(\d+)\) of (\S+) ended (\S+): (.*)", "{3} 的发布 {1}（v{2}）以 {4} 结束：{5!}"),
    (r"release (\d+) \(v(\d+)\) waits for a person: (.*)", "发布 {1}（v{2}）等待人工处理：{3!}"),
    (r"release (\d+) \(v(\d+)\) is (?:\S+), (\d+) nodes? failed", "发布 {1}（v{2}）已有 {3} 个节点失败"),
    (r"release (\d+) \(v(\d+)\) is stopped: (.*)", "发布 {1}（v{2}）已停住：{3!}"),
    (r"release (\d+) \(v(\d+)\) waits: (.*)", "发布 {1}（v{2}）在等待：{3!}"),
    (r"release (\d+) \(v(\d+)\): (.*)", "发布 {1}（v{2}）：{3!}"),
    (r"(\d+) nodes? runs? an older payload than (?:it|they) should: (.*)", "{1} 个节点运行的 payload 比应有的旧：{2}"),
    (r"(\d+) nodes? runs? the payload of a release that failed or was cancelled: (.*)",
     "{1} 个节点保留着未成功的发布留下的内容：{2}"),
    (r"it is not known what (\d+) nodes? runs?, as a later try may have changed it: (.*)",
     "{1} 个节点运行的内容未知（之后的一次尝试可能已更改）：{2}"),
    (r"(.*?) can't be used: it has expired", "{1} 无法使用：已过期"),
    (r"(.*?) can't be used: (.*)", "{1} 无法使用：{2}"),
    (r"(.+) is good for (.*) more: renew it", "{1} 还有 {2} 到期：请续期"),
    (r"(\d+) notifications? (?:has|have) not got out: (.*)", "{1} 条通知未能发出：{2}"),
    ("disabled", "已停用"), ("offline", "离线"), ("in maintenance", "维护中"), ("excluded", "已排除"),
    (r"no online nodes.*", "没有在线节点：请添加节点，或启用节点并设为在线"),
    (r"no node matches (.*)", "没有节点符合 {1}"),
    (r"no release of target (\S+) before release (\d+) succeeded.*", "目标 {1} 在发布 {2} 之前没有成功的发布"),
    (r"release (\d+) does not exist", "发布 {1} 不存在"), (r"node (\d+) does not exist", "节点 {1} 不存在"),
    (r"Release (\d+) waits for approval", "发布 {1} 等待批准"),
    (r"Release (\d+) failed", "发布 {1} 失败"),
    (r"Release (\d+) has failures", "发布 {1} 有失败的节点"),
    (r"Release (\d+) ended partial", "发布 {1} 部分成功"),
    (r"Release (\d+) needs you: paused", "发布 {1} 需要您处理：已暂停"),
    (r"Nobody works on release (\d+)", "没有执行器处理发布 {1}"),
    # what the history says of a release
    (r"batches of ([\d, ]+(?: and \d+ more)?)", "批次大小 {1}"), (r"at most (\d[^;]*?) failed", "每批最多失败 {1}"),
    (r"at most (\d[^;]*?) failed, (\d+) in all", "每批最多失败 {1}，共 {2}"),
    (r"all agents are asked first, at most (\d+) may be silent", "先询问所有 agent，最多 {1} 个可不应答"),
    ("changes nothing: all its nodes run this payload already", "没有任何更改：其所有节点都已在运行此 payload"),
    (r"changes nothing: all its nodes run this payload already \(release (.*)\)",
     "没有任何更改：其所有节点都已在运行此 payload（发布 {1}）"),
    (r"(\d+) other releases? (?:has|have) not ended yet", "另有 {1} 个发布尚未结束"),
    (r"left out: (\S+) is (.*)", "未包含：{1}（{2!}）"), ("goes out in a freeze too", "冻结期间也执行"),
    (r"rollback of release (\d+) to the payload of version (\d+)", "发布 {1} 的回滚，回到版本 {2} 的 payload"),
    (r"automatic rollback of release (\d+) to the payload of version (\d+)",
     "发布 {1} 的自动回滚，回到版本 {2} 的 payload"),
    (r"retry of release (\d+)", "重试发布 {1}"), (r"superseded by release (\d+) \(v(\d+)\)", "被发布 {1}（v{2}）取代"),
    (r"failures accepted: (\d+)", "已接受 {1} 个失败"),
    ("goes on though agents did not answer the preflight", "尽管有 agent 未应答预检，仍继续"),
    (r"node (\S+): (.*)", "节点 {1}：{2}"),
    # what is wrong with a strategy
    (r"strategy: (.*)", "策略：{1!}"),
    (r"(.*) must be a whole number from (\d+) to (\d+)", "{1} 须为 {2} 到 {3} 的整数"),
    (r'(.*) must be a whole number from (\d+) to (\d+), or "(\d)%" to "100%"',
     '{1} 须为 {2} 到 {3} 的整数，或 "{4}%" 到 "100%"'),
    (r"(.*) must be a number from (\d+) to (\d+)", "{1} 须为 {2} 到 {3} 的数"),
    (r"(.*) must be a list of 1 to (\d+) sizes", "{1} 须为 1 到 {2} 个大小的列表"),
    (r'(.*) must be a list of batch numbers, or "each"', '{1} 须为批次号的列表，或 "each"'),
    (r'(.*) must be ("fail", "pause" or "rollback")', "{1} 须为其一：{2}"),
    (r"(.*) must be a time [^,]*, like (\S+)", "{1} 须为带时区的有效时间，例如 {2}"),
    (r"(.*) must be true or false", "{1} 须为 true 或 false"), (r"verify (.*) needs a url", "verify {1} 缺少 url"),
    (r"(.*) must be http:// or https:// with the host .*, like ([^,]*), and no other .*", "{1} 须为形如 {2} 的地址"),
    (r"(\S+) is not a known key", "{1} 不是已知的键"),
    (r"(\S+) is not a known key \(did you mean (.*)\?\)", "{1} 不是已知的键（是否指 {2}？）"),
    (r"(.*) must be the key of a label: .*", "{1} 须为标签名"),
    (r"first (.*) must name a label: .*", "first {1} 须指定标签"),
    (r"pauseAfter names batch (\d+), and there are (\d+): .*", "pauseAfter 指定了批次 {1}，但只有 {2} 个批次"),
    # what `why` says beside these
    (r"mend: (.*)", "解决办法：{1}"),
    (r"waiting for approval by somebody else than (.*): (releasectl .*)", "等待 {1} 以外的人批准：{2}"),
    (r"waiting for approval, which nobody can give: .*",
     "等待批准，但无人能批准：创建者未登录（请设置 API_TOKENS_FILE）"),
    (r"waits for approval by somebody else than its author", "需等待创建者以外的人批准"),
    (r"in an emergency it goes without: (emergency .*)", "紧急情况下可不经批准：{1}"),
    (r"emergency: it goes without an approval, and everybody is told so", "紧急：不经批准执行，并告知所有人"),
    (r"release (\d+) was made by (.*): somebody else must approve it", "发布 {1} 由 {2} 创建：须由其他人批准"),
    (r"approved by (.*)", "由 {1} 批准"), (r"goes without: emergency of (.*)", "紧急：{1} 未经批准启动"),
    (r"it goes out all the same \(--during-freeze\): (.*)", "冻结期间照样执行（--during-freeze）：{1!}"),
    (r"(\S+) is at work for release (\d+)", "{1} 正在处理发布 {2}"),
    (r"(\S+) may still be busy with release (\d+) until ([^,]*)(?:, in .*)?", "{1} 可能仍在处理发布 {2}，至 {3}"),
    (r"nobody has taken it for (.*), though (.*) looks for work: its log says why",
     "{1} 以来无人处理，尽管 {2} 在等待任务：原因见其日志"),
    (r"(.*) was last seen (.*) ago", "{1} 最近一次在 {2} 之前"), (r"(.*) takes it over (.*)", "{1} 将接管（{2}）"),
    # and what `check` says
    ("valid", "有效"), (r"from the environment: ([^;]*)", "来自环境变量：{1}"),
    (r"from ([^;]*?): ([^;]*)", "来自 {1}：{2}"), ("all others have their defaults", "其余均为默认值"),
    (r"(\S+) is good until ([^,]*), (\d+) days?", "{1} 有效期至 {2}，还有 {3} 天"),
    (r"(\S+) is good until ([^,]*), (\d+) days?: renew it now", "{1} 有效期至 {2}，还有 {3} 天：请立即续期"),
    (r"(\S+) is closed to others", "{1} 未向他人开放"),
    (r"(\S+) is open to others.*?: (chmod .*)", "{1} 向他人开放：{2}"),
    (r"(\S+) can be written by its owner alone", "{1} 只有所有者可写"),
    ("not set: agents can't be called without it", "未设置：没有它就无法调用 agent"),
    ("not set: the API listens on loopback only, for everybody on this host",
     "未设置：API 只监听回环地址，本机任何人可用"),
    ("0: agents are called by plain HTTP, for a laboratory only", "0：以明文 HTTP 调用 agent，仅限实验环境"),
    (r"database (.*): schema (\d+), takes writes(.*)", "数据库 {1}：schema {2}，可写{3}"),
    (r"database (.*) does not exist: (.*)", "数据库 {1} 不存在：{2}"),
    (r"(\d+) of (\d+) rows? and the events of (\d+) of (\d+) ended releases? verified",
     "{2} 行中已验证 {1} 行，{4} 个已结束的发布中已验证 {3} 个的事件"),
    (r"head (\d+:\w+)", "末尾 {1}"),
    (r"(\d+) nodes?: each runs what it should", "{1} 个节点都运行应有的内容"),
    (r"of (\d+) nodes?: (.*), see (`[^`]*`)", "{1} 个节点中：{2}，见 {3}"),
    (r"(\d+) of (\d+) nodes? reachable", "{2} 个节点中 {1} 个可达"),
    (r"agent (\S+) can't be reached: (.*)", "agent {1} 无法连接：{2}"),
    (r"agent (\S+) refused our client certificate \((.*)\)", "agent {1} 拒绝我们的客户端证书（{2}）"),
    (r"(`freeze off[^`]*`) lifts it", "用 {1} 解除"),
    (r"(\d+) MiB left in (.*): without room.*", "{2} 只剩 {1} MiB：空间用尽后不再下发，请腾出空间"),
    (r"(\d+) of (\d+) checks failed", "{2} 项检查中有 {1} 项未通过"),
    (r"all (\d+) checks passed", "{1} 项检查全部通过"),
)
_CHINESE = tuple((re.compile(form), chinese) for form, chinese in _CHINESE_FORMS)
# Sentences without parts: headlines, and what to do about each error_kind.
_CHINESE_SENTENCES = {
    "Nodes run what they should not": "有节点运行了不该运行的内容",
    "Nodes are behind": "有节点落后",
    "A certificate can't be used": "有证书无法使用",
    "The database can't be used": "数据库无法使用",
    "Nobody looks for work": "没有执行器在工作",
    "A certificate expires soon": "有证书即将过期",
    "Frozen: nothing is dispatched": "已冻结：不再下发",
    "No executor is running": "没有执行器在运行",
    "Notifications do not get out": "通知无法发出",
    "Two nodes have one address": "有两个节点地址相同",
    "Nobody knows what some nodes run": "部分节点运行的内容未知",
    "Nothing answers there. Is the host up, the agent running, its port open to us?":
        "该地址没有应答。主机是否开机、agent 是否运行、端口是否对控制端开放？",
    "TLS failed. Check both certificates (releasectl check) and the agent's log.":
        "TLS 失败。请检查双方证书（releasectl check）和 agent 的日志。",
    "The agent did not answer in time. Check its load and its log.":
        "agent 未及时应答。请检查其负载和日志。",
    "The agent answered with an HTTP error. Is this the right port?":
        "agent 返回 HTTP 错误。端口是否正确？",
    "Unexpected answer. Does the node's protocol (tasks or execute) match its agent?":
        "应答不符合预期。节点的协议（tasks 或 execute）是否与 agent 相符？",
    "The agent refused this version; a new release brings a new one.":
        "agent 拒绝了此版本；新的发布会带来新的版本。",
    "The agent tried and failed. Fix what its message names on the host, then retry.":
        "agent 尝试后失败。请在主机上修复消息所述问题，然后重试。",
    "The agent succeeded, the probe of the service did not. Check the service on the host.":
        "agent 成功，但服务探测失败。请检查主机上的服务。",
    "The task did not end in time. Check what the agent is doing, then retry.":
        "任务未按时结束。请查看 agent 在做什么，然后重试。",
    "The outcome is unknown. Check the host, then retry.":
        "结果未知。请检查主机，然后重试。",
}
# Words that stand alone in the tables of `why` and `check`, and what the screen of `help` says.
CHINESE_WORDS: Mapping[str, str] = {
    "state": "状态", "step": "步骤", "what": "说明", "subject": "项目", "result": "结果",
    "ok": "正常", "stops": "停住", "waits": "等待", "WRONG": "有误",
    "database": "数据库", "freeze": "冻结", "executor": "执行器", "order": "顺序", "approval": "批准", "start": "开始",
    "pause": "暂停", "soak": "观察", "preflight": "预检", "nodes": "节点", "errors": "错误", "busy": "节点占用",
    "slots": "名额", "rollback": "回滚", "end": "结束", "settings": "设置", "agents": "agent", "drift": "差异",
    "audit log": "审计日志", "disk": "磁盘", "clock": "时钟", "notifications": "通知",
    "releasectl COMMAND [options]: configuration versions to nodes, batch by batch":
        "releasectl COMMAND [选项]：把配置版本分批发到节点",
    "See": "查看", "Release": "发布", "Steer": "控制", "Nodes": "节点", "Run": "运行", "Help": "帮助", "More": "其他",
    "releases; one, what is wrong; one as it goes": "发布列表；单个发布或所有问题；实时跟踪",
    "what one waits for, what mends it; its past": "在等什么、如何解决；历史",
    "what one sends; changes in that; who did what": "发送的内容；改动；谁做了什么",
    "to all nodes or some; --plan shows it before": "发给全部或部分节点；--plan 先看计划",
    "failed nodes again; back to what was before": "重试失败的节点；回到之前的内容",
    "to nodes that are behind": "发给落后的节点",
    "let one start that waits; end one": "让等待批准的发布开始；结束发布",
    "hold one; let it go on": "暂停发布；继续",
    "all releases, or those of one target": "全部发布，或一个目标的发布",
    "what they run; one's history; who answers": "运行的内容；单个节点的历史；谁有应答",
    "which nodes there are": "有哪些节点",
    "API and executor; one tick of it, for cron": "API 与执行器；供 cron 调用的一次执行",
    "what is wrong, what mends it; the schema": "哪里有误、如何解决；数据库结构",
    "a copy; less history; a token for the API": "备份；清理历史；API 令牌",
    "what it takes; help settings: all settings": "命令的用法；help settings：全部设置",
    "for bash, zsh and fish; what this runs on": "用于 bash、zsh 和 fish；运行环境",
    "ID is a number or latest. Everywhere: --json --utc --color WHEN -q -v --db URL":
        "ID 是数字或 latest。通用：--json --utc --color WHEN -q -v --db URL",
    "--config FILE. Other words: ls (list), show (status), logs (events),":
        "--config FILE。别名：ls (list)、show (status)、logs (events)、",
    "nodes (node list), undo (rollback). Exit 0 done, 1 ended other than success,":
        "nodes (node list)、undo (rollback)。退出码 0 完成，1 结束但未成功，",
    "2 usage, 3 not found or wrong state, 69 out of reach, 75 try later.":
        "2 用法有误，3 不存在或状态不符，69 无法连接，75 稍后再试。"}

# Members of the API's JSON that hold sentences, and those without any, which may be large.
_SENTENCES = frozenset(("statusReason", "text", "why", "message", "warnings", "hint", "title"))
_NO_SENTENCES = frozenset(("batches", "payload", "changes", "strategy", "selection", "labels", "before", "after"))


def is_chinese(languages: str) -> bool:
    """Return whether Chinese is wanted most: 'zh-CN,zh;q=0.9' of HTTP (RFC 9110, 12.5.4), 'zh_CN.UTF-8' of a shell."""
    found = [(float(weight[1] if weight else 1), part.strip().lower()) for part in languages.split(",")
             for weight in [re.search(r";\s*q=([01](?:\.\d{0,3})?)\s*$", part)]]
    weight, language = max(found, key=lambda one: one[0])  # the first of those
    return weight > 0 and language.startswith("zh")


def language_of(environment: Mapping[str, str]) -> str:
    """Return the language of messages, as POSIX finds it: the first of these variables that is not empty."""
    return next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "")


def in_chinese(text: str) -> str:
    """Return a sentence in Chinese, or what of its parts between semicolons can be; the rest as it is."""
    if text in _CHINESE_SENTENCES:
        return _CHINESE_SENTENCES[text]
    for form, chinese in _CHINESE:
        found = form.fullmatch(text)
        if found:
            return re.sub(r"\{(\d)(!?)\}", lambda m: (in_chinese if m[2] else str)(found[int(m[1])] or ""), chinese)  # noqa: B023
    first, semicolon, rest = text.partition("; ")
    return f"{in_chinese(first)}；{in_chinese(rest)}" if semicolon else text


def translated(data: Any) -> Any:
    """Return data of the API with its sentences in Chinese."""
    if isinstance(data, dict):
        return {key: value if key in _NO_SENTENCES else _translated_sentence(value) if key in _SENTENCES else
                translated(value) for key, value in data.items()}
    return [translated(item) for item in data] if isinstance(data, list) else data


def _translated_sentence(value: Any) -> Any:
    if isinstance(value, list):
        return [_translated_sentence(one) for one in value]
    return in_chinese(value) if isinstance(value, str) else value


# endregion


# region Serialization
# ======================================================================================
# Serialization: the JSON of contract section 5, and its schemas. Pure.
# Uses: Vocabulary, Helpers, Payloads, Difference, Model, Freezes, Strategy,
#   Selection, Plan, Failures, Status texts, Verbs, Why, Verdict, Audit, Nodes, Drift.
# ======================================================================================

_TIME = {"type": ["string", "null"], "format": "date-time"}
ID = IDS.schema
_ID_OR_NULL = {"type": ["integer", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}
_OBJECT = {"type": "object"}
_REASON = {"type": "string", "maxLength": 500}
_APPROVAL = {"type": "string", "enum": ["", *APPROVAL_STATES]}
_SHA256 = {"type": "string", "pattern": "^([0-9a-f]{64})?$"}

# Schema of each JSON field. The row has the same field, in snake case: see _row_json().
RELEASE_SCHEMA: Mapping[str, Any] = {
    "id": ID, "type": TEXT, "target": TEXT, "version": ID,
    "status": {"type": "string", "enum": list(RELEASE_STATUSES)}, "statusReason": TEXT, "reason": TEXT,
    "totalNodes": _COUNT, "successNodes": _COUNT, "failedNodes": _COUNT, "skippedNodes": _COUNT,
    "currentBatch": _COUNT, "errorMsg": TEXT, "strategy": _OBJECT, "payloadSha256": _SHA256,
    "selection": _OBJECT, "retryOf": _ID_OR_NULL, "rollbackOf": _ID_OR_NULL, "catchUpOf": _ID_OR_NULL,
    "rolledBackBy": _ID_OR_NULL, "goesFirst": _FLAG, "duringFreeze": _FLAG,
    "createdAt": _TIME, "startedAt": _TIME, "finishedAt": _TIME, "updatedAt": _TIME,
    "author": TEXT, "approval": _APPROVAL, "approvedBy": TEXT, "approvedAt": _TIME}
RELEASE_NODE_SCHEMA: Mapping[str, Any] = {
    "nodeId": ID, "nodeName": TEXT, "mainIp": TEXT,
    "status": {"type": "string", "enum": [PENDING, RUNNING, SUCCESS, FAILED, SKIPPED]}, "taskId": TEXT,
    "attempts": _COUNT, "errorKind": TEXT, "errorMsg": TEXT, "startedAt": _TIME, "finishedAt": _TIME}
EVENT_SCHEMA: Mapping[str, Any] = {
    "id": ID, "releaseId": ID, "nodeId": _ID_OR_NULL, "nodeName": TEXT, "at": _TIME,
    "actor": TEXT, "event": TEXT, "fromStatus": TEXT, "toStatus": TEXT, "detail": TEXT}
AUDIT_ROW_SCHEMA: Mapping[str, Any] = {
    "id": ID, "at": TEXT, "actor": TEXT, "via": {"type": "string", "enum": [VIA_CLI, VIA_API, VIA_EXECUTOR]},
    "token": TEXT, "certificate": TEXT, "address": TEXT, "requestId": TEXT, "action": TEXT, "object": TEXT,
    "before": {"type": ["object", "null"]}, "after": {"type": ["object", "null"]}, "hash": TEXT}

# Of everything; and of a target, which is listed only while it is frozen.
FREEZE_SCHEMA: Mapping[str, Any] = {
    "frozen": _FLAG, "reason": TEXT, "actor": TEXT, "at": TEXT, "until": _TIME, "setter": TEXT, "twoPersons": _FLAG,
    "liftWantedBy": TEXT, "liftWantedAt": _TIME}
TARGET_FREEZE_SCHEMA: Mapping[str, Any] = {"target": TEXT, **{
    key: schema for key, schema in FREEZE_SCHEMA.items() if key != "frozen"}}


def schema_of(properties: Mapping[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False,
            "required": list(properties if required is None else required)}


def _row_json(schema: Iterable[str], **renamed: str) -> Callable[[Any], dict[str, Any]]:
    """Return a function from a row to the JSON object of a schema; renamed: fields that the row calls otherwise."""
    keys = tuple(schema)
    values = operator.attrgetter(*(renamed.get(key) or re.sub("[A-Z]", lambda m: "_" + m[0].lower(), key)
                                   for key in keys))
    return lambda row: dict(zip(keys, values(row)))


_release_fields = _row_json(RELEASE_SCHEMA)
release_node_json = _row_json(RELEASE_NODE_SCHEMA, nodeName="name")
event_json = _row_json(EVENT_SCHEMA)
_audit_fields = _row_json(AUDIT_ROW_SCHEMA)


def release_json(release: Release) -> dict[str, Any]:
    """Return RELEASE of the contract."""
    return {**_release_fields(release), "strategy": stored_json(release.strategy),
            "goesFirst": bool(release.goes_first), "duringFreeze": bool(release.during_freeze),
            "selection": stored_json(release.selection) if selection_of(release.selection) else {"nodeIds": []}}


def audit_json(row: AuditRow) -> dict[str, Any]:
    """Return one row of audit_log."""
    return {**_audit_fields(row), "before": stored_json(row.before) if row.before else None,
            "after": stored_json(row.after) if row.after else None}


def open_releases_json(releases: Sequence[tuple[Release, int]]) -> dict[str, Any]:
    """Return the releases that have not ended, each with its number of batches, and their claims."""
    return {"releases": [{**release_json(release), "batches": batches} for release, batches in releases],
            "claims": [{"releaseId": release.id, "owner": release.claim_owner, "expiresAt": release.claim_expires_at}
                       for release, _ in releases if release.claim_expires_at]}


def page_json(page: Page, item_json: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return a page of a list."""
    return {"items": [item_json(item) for item in page.items], "total": page.total, "page": page.number,
            "pageSize": page.size}


def created_json(made: Made) -> dict[str, Any]:
    """Return the answer to the creation of a release."""
    release = made.release
    return {"releaseId": release.id, "version": release.version, "totalNodes": release.total_nodes,
            "batches": [{"batch": number, "nodeIds": list(ids)} for number, ids in enumerate(made.batches, 1)],
            "changesNothing": made.is_unchanged, **({"warnings": list(made.warnings)} if made.warnings else {}),
            **({"superseded": superseded_json(made.superseded)} if made.superseded else {}),
            **({"approval": release.approval} if release.approval else {})}


def created_again_json(made: Made) -> dict[str, Any]:
    """Return the answer to a retry or rollback: that to a creation, and the nodes left out."""
    return {**created_json(made), "leftOut": left_out_json(made.left_out)}


def left_out_json(left_out: Iterable[LeftOut]) -> list[dict[str, Any]]:
    """Return the nodes that were selected and do not get the release, and why."""
    return [{"nodeId": one.node_id, "nodeName": one.name, "why": one.why} for one in left_out]


def superseded_json(superseded: Iterable[Superseded]) -> list[dict[str, Any]]:
    """Return the releases that a new one cancels."""
    return [_id_and_version(*one) for one in superseded]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the answer to dryRun: what a release would do."""
    payload_of, strategy = _id_and_version(*plan.payload_of) if plan.payload_of else None, plan.strategy
    return {"version": plan.version, "totalNodes": sum(map(len, plan.batches)),
            "batches": [{"batch": number, "nodeIds": ids, "nodeNames": [plan.names.get(id_, "") for id_ in ids],
                         "maxFailed": most, "group": group}
                        for number, (ids, most, group) in enumerate(
                            zip(plan.batches, plan.max_failed, plan.groups), 1)],
            "maxFailedTotal": plan.max_failed_total, "maxParallel": strategy.max_parallel,
            "maxParallelPer": dict(strategy.max_parallel_per),
            "soakSec": strategy.soak_s, "pauseAfter": plan.pauses, "onExceed": strategy.on_exceed,
            "preflight": None if plan.max_silent is None else {"maxSilent": plan.max_silent},
            "startAt": strategy.start_at or None, "verify": _verify_json(strategy.verify) if strategy.verify else None,
            "leftOut": left_out_json(plan.left_out), "notChosen": plan.not_chosen, "emptied": list(plan.emptied),
            "warnings": list(plan.warnings), "superseded": superseded_json(plan.superseded),
            "approval": plan.approval, "duringFreeze": plan.during_freeze, "payloadOf": payload_of,
            "effect": _effect_json(plan.effect) if plan.effect else None}


def _id_and_version(release_id: int, version: int) -> dict[str, Any]:
    return {"releaseId": release_id, "version": version}


def _verify_json(verify: Verify) -> dict[str, Any]:
    return {key: getattr(verify, field) for key, (field, _, _) in VERIFY_KEYS.items()}


def _effect_json(effect: Effect) -> dict[str, Any]:
    return {"text": effect_text(effect), "against": effect.against,
            **_changes_json(effect.difference or Difference([], 0)),
            "openReleases": effect.open_releases,
            "running": [{"releaseId": one.release_id, "version": one.version or None, "nodes": one.nodes,
                         "same": one.is_same} for one in effect.running]}


def _changes_json(changes: Difference) -> dict[str, Any]:
    return {"total": changes.total, "changes": [
        {"change": one.kind, "path": one.where,
         **({"before": one.before} if one.kind != ADDED else {}),
         **({"after": one.after} if one.kind != REMOVED else {}),
         **({"position": one.position} if one.position is not None else {})} for one in changes.changes]}


def difference_json(release: Release, other: Release, changes: Difference) -> dict[str, Any]:
    """Return what a release changes against another one."""
    return {**_id_and_version(release.id, release.version), "with": _id_and_version(other.id, other.version),
            **_changes_json(changes)}


def payload_json(release: Release, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return a release's payload as it was sent but for the version."""
    return {**_id_and_version(release.id, release.version),
            "payloadSha256": release.sent_sha256 or digest_of(payload),
            "payload": without_version(payload)}


def caught_up_json(made: Sequence[Made], left_out: Iterable[LeftOut]) -> dict[str, Any]:
    """Return the answer to a catch-up: the releases made, and the nodes that stay behind."""
    return {"releases": [{**created_json(one), "catchUpOf": one.release.catch_up_of} for one in made],
            "leftOut": left_out_json(left_out)}


def catch_up_plan_json(plans: Iterable[Plan], left_out: Iterable[LeftOut]) -> dict[str, Any]:
    """Return the answer to the dry run of a catch-up."""
    return {"plans": [plan_json(plan) for plan in plans], "leftOut": left_out_json(left_out)}


def why_json(why: Why) -> dict[str, Any]:
    """Return what a release waits for, step by step."""
    release, stopped_by = why.release, why.stopped_by
    return {"releaseId": release.id if release else None, "status": release.status if release else None,
            "moves": stopped_by is None, "text": why.text, "stoppedBy": stopped_by.name if stopped_by else None,
            "steps": [step._asdict() for step in why.steps]}


def certificate_states(found: Iterable[Mapping[str, Any]]) -> list[CertificateState]:
    """Return what the verdict takes of certificates from their JSON."""
    return [CertificateState(one["name"], one["notAfter"], one["daysLeft"], one["message"]) for one in found]


def overview_json(overview: Overview) -> dict[str, Any]:
    """Return the verdict; drift is null where the database is out of reach."""
    facts = overview.facts
    return {"ok": overview.is_well, "text": overview.text, "activeReleases": len(facts.active),
            "pendingReleases": facts.pending,
            "drift": {drift: found.nodes for drift, found in facts.drift.items()} or None,
            "problems": [{"kind": p.kind, "severity": p.severity, "title": p.title, "text": p.text, "since": p.since,
                          "mend": p.mend, "releaseId": p.release_id, "rollback": p.rollback}
                         for p in overview.problems]}


_freeze_fields = _row_json(FREEZE_SCHEMA)
_target_freeze_fields = _row_json(TARGET_FREEZE_SCHEMA)


def freezes_json(freezes: Freezes, warnings: Iterable[str] = ()) -> dict[str, Any]:
    """Return what is frozen: everything or not, and which targets are by themselves."""
    return {**_freeze_fields(freezes.everything), "targets": [_target_freeze_fields(one) for one in freezes.targets],
            "warnings": [*warnings]}


def release_summary_json(release: Release, failures: Iterable[FailureGroup]) -> dict[str, Any]:
    """Return a release without its nodes."""
    return {"release": release_json(release), "failures": failures_json(failures)}


def release_with_nodes_json(release: Release, nodes: Sequence[ReleaseNode],
                            failures: Iterable[FailureGroup]) -> dict[str, Any]:
    """Return a release with its nodes by batch."""
    batches: dict[int, list[dict[str, Any]]] = {}
    for node in nodes:
        batches.setdefault(node.batch, []).append(release_node_json(node))
    return {**release_summary_json(release, failures),
            "batches": [{"batch": number, "nodes": members} for number, members in sorted(batches.items())]}


# JSON field of a node: column, parser, JSON Schema.
NODE_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "name": ("name", parse_name, {"type": "string", "minLength": 1, "maxLength": 100, "format": "line",
                                  "description": "printable, single spaces within"}),
    "mainIp": ("main_ip", parse_address, {"type": "string", "minLength": 1, "maxLength": 253, "format": "address",
                                          "description": "IP address or host name"}),
    # in JSON 8443.0 and 8443 are the same number
    "agentPort": ("agent_port", lambda v: parse_integer(
        "agentPort", int(v) if isinstance(v, float) and v.is_integer() else v, PORTS), PORTS.schema),
    "agentProtocol": ("agent_protocol", lambda v: parse_choice("agentProtocol", v, PROTOCOLS),
                      {"type": "string", "enum": list(PROTOCOLS)}),
    "labels": ("labels", parse_labels, labels_schema(LABEL_VALUE_SCHEMA)),
    "enabled": ("enabled", lambda v: int(parse_flag("enabled", v)), _FLAG),
    "status": ("status", lambda v: parse_choice("status", v, NODE_STATUSES),
               {"type": "string", "enum": list(NODE_STATUSES)}),
}
_NODE_FIELD_SCHEMAS = {key: schema for key, (_, _, schema) in NODE_FIELDS.items()}
_NODE_SCHEMA: Mapping[str, Any] = {"id": ID, **_NODE_FIELD_SCHEMAS, "createdAt": _TIME, "updatedAt": _TIME}
_node_fields = _row_json(_NODE_SCHEMA)
_RAN_SCHEMA: Mapping[str, Any] = {"releaseId": ID, "version": ID, "payloadSha256": TEXT, "since": _TIME}
_ran_fields = _row_json(_RAN_SCHEMA)
NODE_SCHEMA: Mapping[str, Any] = {
    **_NODE_SCHEMA, "runs": {**schema_of(_RAN_SCHEMA), "type": ["object", "null"]},
    "wants": {**schema_of(_RAN_SCHEMA), "type": ["object", "null"]}, "drift": {"type": "string", "enum": list(DRIFTS)}}
NODE_TRY_SCHEMA: Mapping[str, Any] = {
    "releaseId": ID, "version": ID, "target": TEXT,
    "releaseStatus": {"type": "string", "enum": list(RELEASE_STATUSES)}, "batch": ID,
    **{key: RELEASE_NODE_SCHEMA[key] for key in ("status", "attempts", "errorKind", "errorMsg", "startedAt",
                                                 "finishedAt")}}
node_try_json = _row_json(NODE_TRY_SCHEMA)


def node_json(listed: ListedNode) -> dict[str, Any]:
    """Return a node as /api/v1/nodes shows it."""
    node, level = listed
    return {**_node_fields(node), "labels": stored_json(node.labels), "enabled": bool(node.enabled),
            "runs": _ran_fields(level.runs) if level.runs else None,
            "wants": _ran_fields(level.wants) if level.wants else None, "drift": level.drift}


def listed_node_json(listed: ListedNode, last_release: tuple[int, str] | None) -> dict[str, Any]:
    """Return a node with id and status of the newest release that has it."""
    last = {"releaseId": last_release[0], "status": last_release[1]} if last_release else None
    return {**node_json(listed), "lastRelease": last}


def parse_node_fields(body: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    """Return the columns of a node from its JSON; raise AppError 2001 for a missing field, 2003 for a bad one."""
    known_keys(body, list(NODE_FIELDS))
    for name in required:
        if name not in body:
            raise AppError(MISSING, f"{name} is missing")
    return {NODE_FIELDS[name][0]: NODE_FIELDS[name][1](value) for name, value in body.items()}


def parse_nodes_change(body: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return columns of many nodes from their JSON, and how many nodes there are; raise AppError 2001 or 2003."""
    known_keys(body, ("total", "enabled", "status"))
    if "total" not in body or len(body) == 1:
        raise AppError(MISSING, "total is missing" if "total" not in body else "enabled or status is missing")
    changes = parse_node_fields({key: value for key, value in body.items() if key != "total"})
    return changes, parse_integer("total", body["total"], AFTER_IDS)


def parse_catch_up(body: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return reason and strategy of a catch-up, the strategy unparsed; raise AppError 2003."""
    known_keys(body, ("reason", "strategy", "dryRun"))
    return parse_text("reason", body.get("reason", "")), _strategy_in(body)


def _strategy_in(body: Mapping[str, Any]) -> Mapping[str, Any]:
    strategy = body.get("strategy", {})
    if not isinstance(strategy, dict):
        raise AppError(INVALID, "strategy must be a JSON object")
    return strategy


def parse_release_request(body: Mapping[str, Any]) -> ReleaseRequest:
    """Return the request for a release from its JSON, the strategy unparsed; raise AppError 2003.

    body is of parse_json(exact=True), for the payload's sake.
    """
    known_keys(body, ("target", "reason", "payload", "strategy", "nodeIds", "labels", "exclude", "dryRun", "version",
                      "supersede", "approval", "emergency"))
    payload = body.get("payload", {})
    body = plain_numbers({key: value for key, value in body.items() if key != "payload"})
    if "nodeIds" in body and "labels" in body:
        raise AppError(INVALID, "nodeIds and labels exclude each other: name one of them")
    strategy, reason = _strategy_in(body), parse_text("reason", body.get("reason", ""))
    is_approval, is_emergency = (parse_flag(key, body.get(key, False)) for key in ("approval", "emergency"))
    if is_approval and is_emergency:
        raise AppError(INVALID, "approval and emergency exclude each other: name one of them")
    check_emergency(is_emergency, reason)
    parse_selection({key: value for key, value in body.items() if key in ("nodeIds", "labels", "exclude")})
    return ReleaseRequest(
        parse_target(body.get("target", "cdn")), reason, parse_payload(payload), strategy=strategy,
        node_ids=body.get("nodeIds"), labels=body.get("labels"), exclude=body.get("exclude", {}),
        version=parse_integer("version", body["version"], NAMED_VERSIONS) if "version" in body else None,
        supersede=parse_flag("supersede", body.get("supersede", False)),
        approval=WANTED if is_approval else "", is_emergency=is_emergency)


def ref_schema(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _array(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _list_of(item: str, paged: bool = True) -> dict[str, Any]:
    page = {"total": _COUNT, "page": ID, "pageSize": ID} if paged else {}
    return schema_of({"items": _array(ref_schema(item)), **page})


def openapi_schemas() -> dict[str, Any]:
    """Return the shapes of section 5 of the contract as JSON Schema."""
    left_out = _array(schema_of({"nodeId": ID, "nodeName": TEXT, "why": TEXT}))
    created = {"releaseId": ID, "version": ID, "totalNodes": _COUNT,
               "batches": _array(schema_of({"batch": ID, "nodeIds": _array(ID)})), "changesNothing": _FLAG}
    superseded = _array(schema_of({"releaseId": ID, "version": ID}))
    may_warn = {"warnings": _array(TEXT), "superseded": superseded, "approval": _APPROVAL}
    again = {"reason": _REASON, "overNewer": _FLAG, "dryRun": _FLAG, "emergency": _FLAG}
    says_why = {"properties": {"reason": {"pattern": r"[^\s\x00-\x1f\x7f-\x9f]"}}, "required": ["reason"]}
    emergency_says_why = {"anyOf": [{"properties": {"emergency": {"const": False}}}, says_why]}
    chosen_ids = {**_array(ID), "minItems": 1, "uniqueItems": True}
    changes = {"total": _COUNT, "changes": {**_array(schema_of(
        {"change": {"type": "string", "enum": [ADDED, REMOVED, CHANGED]}, "path": TEXT, "before": {}, "after": {},
         "position": _COUNT}, required=["change", "path"])), "maxItems": MAX_CHANGES}}
    return {
        "Release": schema_of(RELEASE_SCHEMA),
        "ReleaseNode": schema_of(RELEASE_NODE_SCHEMA),
        "ReleaseWithNodes": schema_of({
            "release": ref_schema("Release"),
            "failures": {**_array(ref_schema("FailureGroup")), "maxItems": MAX_GROUPS + 1},
            "batches": _array(schema_of({"batch": ID, "nodes": _array(ref_schema("ReleaseNode"))}))},
            required=["release", "failures"]),
        "FailureGroup": schema_of({
            "errorKind": {"type": "string", "enum": ["", *ERROR_KINDS, OTHERS]}, "message": TEXT, "nodes": ID,
            "nodeIds": {**_array(ID), "maxItems": MAX_GROUP_NODES},
            "nodeNames": {**_array(TEXT), "maxItems": MAX_GROUP_NODES},
            "label": {**schema_of({"key": TEXT, "value": TEXT, "nodes": ID}), "type": ["object", "null"]},
            "hint": TEXT}),
        "ReleaseList": _list_of("Release"),
        "Created": schema_of({**created, **may_warn}, required=list(created)),
        "CreatedAgain": schema_of({**created, "leftOut": left_out, **may_warn}, required=[*created, "leftOut"]),
        "Event": schema_of(EVENT_SCHEMA),
        "EventList": _list_of("Event", paged=False),
        "AuditRow": schema_of(AUDIT_ROW_SCHEMA),
        "AuditList": _list_of("AuditRow", paged=False),
        "Node": schema_of(NODE_SCHEMA),
        "NodeTry": schema_of(NODE_TRY_SCHEMA),
        "NodeTryList": _list_of("NodeTry"),
        "NodesChange": schema_of({"total": _COUNT, "enabled": _FLAG, "status": _NODE_FIELD_SCHEMAS["status"]},
                                 required=["total"]) | {"anyOf": [{"required": ["enabled"]}, {"required": ["status"]}]},
        "NodesChanged": schema_of({"changed": _COUNT}),
        "Label": schema_of({"key": TEXT, "value": TEXT, "nodes": ID}),
        "LabelList": _list_of("Label", paged=False),
        "CatchUp": schema_of({"reason": _REASON, "strategy": ref_schema("Strategy"), "dryRun": _FLAG}, required=[]),
        "CaughtUp": schema_of({"leftOut": left_out, "releases": _array(schema_of(
            {**created, "catchUpOf": ID, **may_warn}, required=[*created, "catchUpOf"]))}),
        "CatchUpPlan": schema_of({"plans": _array(ref_schema("Plan")), "leftOut": left_out}),
        "ListedNode": schema_of({
            **NODE_SCHEMA,
            "lastRelease": {"type": ["object", "null"], "properties": {"releaseId": ID, "status": TEXT}}},
            required=list(NODE_SCHEMA)),
        "NodeList": _list_of("ListedNode"),
        "NewNode": schema_of(_NODE_FIELD_SCHEMAS, required=["name", "mainIp"]),
        "NodeChange": schema_of(_NODE_FIELD_SCHEMAS, required=[]),
        "Plan": schema_of({
            "version": ID, "totalNodes": _COUNT,
            "batches": _array(schema_of({"batch": ID, "nodeIds": _array(ID), "nodeNames": _array(TEXT),
                                         "maxFailed": _COUNT, "group": TEXT})),
            "maxFailedTotal": _ID_OR_NULL, "maxParallel": _COUNT,
            "maxParallelPer": {"type": "object", "additionalProperties": ID},
            "soakSec": {"type": "number", "minimum": 0},
            "pauseAfter": _array(ID), "onExceed": TEXT, "startAt": _TIME,
            "preflight": {"type": ["object", "null"], "properties": {"maxSilent": _COUNT}},
            "verify": {"type": ["object", "null"]},
            "leftOut": left_out, "notChosen": _COUNT, "emptied": _array(TEXT), "warnings": _array(TEXT),
            "superseded": superseded, "approval": _APPROVAL, "duringFreeze": _FLAG,
            "payloadOf": {"type": ["object", "null"], "properties": {"releaseId": ID, "version": ID}},
            "effect": schema_of({"text": TEXT, "against": _ID_OR_NULL, **changes, "openReleases": _COUNT,
                                 "running": _array(schema_of({
                "releaseId": _ID_OR_NULL, "version": _ID_OR_NULL, "nodes": ID, "same": _FLAG}))})}),
        "Payload": schema_of({"releaseId": ID, "version": ID, "payloadSha256": _SHA256, "payload": _OBJECT}),
        "Difference": schema_of({"releaseId": ID, "version": ID,
                                 "with": schema_of({"releaseId": ID, "version": ID}), **changes}),
        "Strategy": schema_of({key: schema for key, (_, _, schema) in STRATEGY_KEYS.items()}, required=[]),
        "NewRelease": schema_of({
            "target": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}, "reason": _REASON,
            "payload": _OBJECT, "strategy": ref_schema("Strategy"),
            "nodeIds": chosen_ids, "labels": LABEL_CHOICE_SCHEMA,
            "exclude": schema_of({"nodeIds": chosen_ids, "labels": LABEL_CHOICE_SCHEMA}, required=[]), "dryRun": _FLAG,
            "version": NAMED_VERSIONS.schema, "supersede": _FLAG, "approval": _FLAG, "emergency": _FLAG}, required=[])
        | {"not": {"required": ["nodeIds", "labels"]}} | emergency_says_why,
        "Act": schema_of({"reason": _REASON}, required=[]),
        "Approve": schema_of({"reason": _REASON, "emergency": _FLAG}, required=[]) | emergency_says_why,
        "Retry": schema_of({**again, "kinds": {**_array({"type": "string", "enum": list(ERROR_KINDS)}), "minItems": 1},
                            "nodeIds": chosen_ids}, required=[]) | emergency_says_why,
        "Rollback": schema_of({**again, "toRelease": ID, "supersede": _FLAG, "duringFreeze": _FLAG}, required=[])
        | emergency_says_why,
        "Resume": schema_of({"reason": _REASON, "acceptFailures": _FLAG}, required=[]),
        "Cancel": schema_of({"reason": _REASON, "force": _FLAG}, required=[]),
        "Why": schema_of({
            "releaseId": _ID_OR_NULL, "status": {"type": ["string", "null"]}, "moves": _FLAG, "text": TEXT,
            "stoppedBy": {"type": ["string", "null"]},
            "steps": _array(schema_of({"name": TEXT, "state": {"type": "string", "enum": list(STEP_STATES)},
                                       "text": TEXT, "mend": TEXT}))}),
        "Freeze": schema_of({**FREEZE_SCHEMA, "targets": _array(schema_of(TARGET_FREEZE_SCHEMA)),
                             "warnings": _array(TEXT)}),
        "SetFreeze": schema_of({
            "frozen": _FLAG, "reason": _REASON, "target": {"type": "string", "pattern": f"^{TARGET}$"},
            "until": {"type": "string", "format": "date-time"}, "emergency": _FLAG}, required=["frozen"])
        | {"anyOf": [{"properties": {"frozen": {"const": False}}, "not": {"required": ["until"]}},
                     says_why]},
        "Health": schema_of({
            "version": TEXT, "startedAt": _TIME, "role": TEXT, "user": TEXT, "targets": _array(TEXT),
            "database": schema_of({"engine": TEXT, "ok": _FLAG, "schema": _COUNT, "message": TEXT}),
            "executor": schema_of({"enabled": _FLAG, "owner": TEXT, "lastLookAt": _TIME}),
            "releases": _array(schema_of({**RELEASE_SCHEMA, "batches": _COUNT})),
            "claims": _array(schema_of({"releaseId": ID, "owner": TEXT, "expiresAt": _TIME})),
            "certificates": _array(schema_of({
                "name": TEXT, "notAfter": _TIME, "daysLeft": {"type": ["number", "null"]}, "message": TEXT}))}),
        "Overview": schema_of({
            "ok": _FLAG, "text": TEXT, "activeReleases": _COUNT, "pendingReleases": _COUNT,
            "drift": {**schema_of(dict.fromkeys(DRIFTS, _COUNT)), "type": ["object", "null"]},
            "problems": _array(schema_of({
                "kind": {"type": "string", "enum": list(PROBLEM_KINDS)},
                "severity": {"type": "string", "enum": list(PROBLEM_SEVERITIES)}, "title": TEXT, "text": TEXT,
                "since": _TIME, "mend": TEXT, "releaseId": _ID_OR_NULL, "rollback": TEXT}))}),
        "Status": schema_of({"status": TEXT}),
        "Null": {"type": "null"},
        "Error": schema_of({"code": {"type": "integer", "enum": sorted(ERROR_CODES)}, "message": TEXT,
                            "data": {"type": "null"}}),
    }


# endregion


# region Access
# ======================================================================================
# Access: tokens, client certificates, throttling.
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Certificates, Strategy, HTTP
#   wire.
# ======================================================================================

# Bad tokens of an address, and of the network around it, after which each check is delayed, up to MAX_DELAY_S.
FREE_ATTEMPTS, FREE_ATTEMPTS_OF_NETWORK, FIRST_DELAY_S, MAX_DELAY_S = 3, 24, 0.1, 3.0
# A streak is forgotten this long after its last event.
FORGET_S, MAX_STREAKS = 60.0, 2048
# A token that was good at an address within this time is checked there without delay.
KNOWN_TOKEN_S, MAX_KNOWN_TOKENS = 86400.0, 4096


class Streaks:
    """Counts events in a row by key; a count is forgotten some time after its last event, or for newer keys."""

    def __init__(self, forget_s: float = FORGET_S, max_keys: int = MAX_STREAKS):
        self._forget_s, self._max_keys = forget_s, max_keys
        self._guard = threading.Lock()
        self._seen: collections.OrderedDict[tuple[str, ...], tuple[int, float]] = collections.OrderedDict()

    def add(self, *key: str) -> int:
        """Count an event; return the new count."""
        with self._guard:
            count = self._count(key) + 1
            self._seen.pop(key, None)
            self._seen[key] = (count, time.monotonic())
            if len(self._seen) > self._max_keys:
                self._seen.popitem(last=False)
            return count

    def count(self, *key: str) -> int:
        """Return the count of a key."""
        with self._guard:
            return self._count(key)

    def _count(self, key: tuple[str, ...]) -> int:
        count, last = self._seen.get(key, (0, 0.0))
        return count if time.monotonic() - last < self._forget_s else 0


def is_logged(count: int) -> bool:
    """Return whether an event of a streak is logged: the 1st, 2nd, 4th, 8th, ..., so that nobody can flood the log."""
    return count & (count - 1) == 0


class AuthThrottle:
    """Delays the answer to tokens after bad ones of an address, or of the network around it.

    Bad ones are counted at their arrival, so those that come at once wait for each other. A good one waits as long, so
    a client that hangs up meanwhile has learnt nothing; but for one that was good at the address before: another
    client's bad tokens slow it down once a day at most.
    """

    def __init__(self) -> None:
        self._bad = Streaks()
        self._good = Streaks(KNOWN_TOKEN_S, MAX_KNOWN_TOKENS)

    def delay_s(self, address: str, authorization: str, counted: int = 0) -> float:
        """Return the seconds from a request's arrival to its answer; counted: its own part in the bad ones, 0 or 1."""
        if self._good.count(*self._key(address, authorization)):
            return 0.0
        beyond = max(self._bad.count(address) - FREE_ATTEMPTS,
                     self._bad.count(wide_network_of(address)) - FREE_ATTEMPTS_OF_NETWORK) - counted
        return min(FIRST_DELAY_S * 2.0**min(beyond, 10), MAX_DELAY_S) if beyond >= 0 else 0.0

    def note_good(self, address: str, authorization: str) -> None:
        """Remember a good token."""
        self._good.add(*self._key(address, authorization))

    def note_bad(self, address: str) -> tuple[int, bool]:
        """Count a bad token; return its address's count, and whether it is to be logged."""
        count, of_network = self._bad.add(address), self._bad.add(wide_network_of(address))
        return count, is_logged(count) and (of_network <= FREE_ATTEMPTS_OF_NETWORK or is_logged(of_network))

    @staticmethod
    def _key(address: str, authorization: str) -> tuple[str, str]:
        return address, hashlib.sha256(authorization.encode("utf-8", "surrogateescape")).hexdigest()


class Token(NamedTuple):
    """A line of the file of tokens."""
    name: str
    role: str
    # SHA-256 of the token, in hexadecimal.
    sha256: str
    # From then on it is refused, in seconds since 1970.
    expires_at: float = float("inf")
    # The targets that its acts are limited to, empty for none: what it reads is not limited.
    targets: tuple[str, ...] = ()


class TokenExpired(AppError):
    """A token that is known, and no longer accepted."""

    def __init__(self, token: Token):
        super().__init__(BAD_TOKEN, f"this token expired at {utc_text(token.expires_at)}: ask for a new one")
        self.token = token


def token_end(text: str) -> float:
    """Return from when on a token is refused, in seconds since 1970; raise ValueError saying what it must be.

    A date means that whole day in UTC; a time is one of RFC 3339.
    """
    try:
        is_day = re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII)
        return epoch_of(parse_time(f"{text}T00:00:00Z" if is_day else text)) + (86400 if is_day else 0)
    except ValueError:
        raise ValueError("expires must be the last day, like 2026-12-31, or a time, like "
                         "2026-12-31T22:00:00Z") from None


def _token_targets(text: str) -> tuple[str, ...]:
    try:
        return tuple(parse_target(target) for target in text.split(","))
    except AppError:
        raise ValueError("targets must be names of targets with a comma between, like cdn,dns") from None


TOKEN_LINE = "NAME:viewer:SHA256 or NAME:operator:SHA256, with the token's SHA-256 in hexadecimal"
TOKEN_OPTIONS: Mapping[str, Callable[[str], Any]] = {"expires": token_end, "targets": _token_targets}


def parse_token(line: str) -> Token:
    """Return the token of a line; raise ValueError saying what is wrong, which shows no more of it than a key."""
    match = re.fullmatch(f"([^:]+):({VIEWER}|{OPERATOR}):([0-9a-fA-F]{{64}})((?::.*)?)", line)
    if not match:
        raise ValueError(f"must be {TOKEN_LINE}")
    rest, *parts = re.split(":(?=[A-Za-z]{1,20}=)", match[4])  # a time has colons of its own
    keys = [part.partition("=")[0] for part in parts]
    if rest:
        raise ValueError("what follows the SHA-256 must be :expires=2026-12-31 or :targets=cdn,dns, or both")
    for key in keys:
        if key not in TOKEN_OPTIONS:
            raise ValueError(f"{key} is not a known option{did_you_mean(key, TOKEN_OPTIONS)}: "
                             f"there are {' and '.join(TOKEN_OPTIONS)}")
        if keys.count(key) > 1:
            raise ValueError(f"{key} is given twice")
    values = {key: TOKEN_OPTIONS[key](part.partition("=")[2]) for key, part in zip(keys, parts)}
    if "targets" in values and match[2] == VIEWER:
        raise ValueError("targets limits what an operator does: a viewer only reads, and that is not limited")
    return Token(match[1], match[2], match[3].lower(), values.get("expires", float("inf")), values.get("targets", ()))


class Tokens:
    """The API's tokens, from a file of lines for parse_token() that is read again when it changes."""

    def __init__(self, path: str):
        self._path = path
        self._guard = threading.Lock()
        self._stamp: object = None
        self._entries: list[Token] = []
        self._outage = Outage("tokens")

    def load(self) -> list[Token]:
        """Return the tokens, expired ones too; raise ConfigError naming the line that is wrong."""
        with self._guard:
            stamp = file_stamp(self._path)
            if stamp != self._stamp or stamp is None:
                self._entries = self._read()
                self._stamp = stamp
            return self._entries

    def reload(self) -> int:
        """Read the file again; return the number of tokens. Raise ConfigError as load() does."""
        with self._guard:
            self._stamp = None
        return len(self.load())

    def check(self) -> list[Token]:
        """Return load(), and log what it raises, while that lasts once."""
        try:
            entries = self.load()
        except ConfigError as error:
            self._outage.log(f"none is accepted: {error}")
            raise
        self._outage.end()
        return entries

    def _read(self) -> list[Token]:
        require_private("API_TOKENS_FILE", self._path)
        entries = []
        for number, line in enumerate(map(str.strip, read_lines(self._path, "API_TOKENS_FILE")), 1):
            if not line or line.startswith("#"):
                continue
            try:
                token = parse_token(line)
            except ValueError as error:
                raise ConfigError(f"API_TOKENS_FILE {self._path}:{number}: {error}") from None
            try:
                parse_name(token.name)
            except AppError as error:
                if len(token.name) > MAX_NAME_CHARS or one_line(token.name) != token.name:
                    raise ConfigError(f"API_TOKENS_FILE {self._path}:{number}: {error.message}") from None
                # earlier versions took it: an upgrade must not keep its owner out, nor us from starting
                log.warning("API_TOKENS_FILE %s:%d: still let in, but rename it: %s", self._path, number, error.message)
            entries.append(token)
        return entries

    def who(self, authorization: str | None) -> Token:
        """Return the token of an Authorization header.

        Raise AppError 1001, 1002, for one that has expired TokenExpired, or 5001 without a good file.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if not authorization or scheme.lower() != "bearer" or not token.strip():
            raise AppError(NO_TOKEN, "no token: send the header Authorization: Bearer TOKEN")
        try:
            entries = self.check()
        except ConfigError:
            raise AppError(INTERNAL, "the tokens can't be read: see the log of releasectl") from None
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for entry in entries:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None:
            raise AppError(BAD_TOKEN, "this token isn't valid: mistyped, or removed on the server")
        if found.expires_at <= time.time():
            raise TokenExpired(found)  # who has the token may know that
        return found


def add_token(path: str, name: str, role: str, expires: str = "", targets: str = "") -> str:
    """Add a token to a file of tokens, atomically; return the token, of which only the hash is stored.

    expires, targets: as in its line, "" for none. Raise AppError 2003 for what is none or over, 3002 when the name has
    a token, ConfigError when the file can't be read or written.
    """
    if ":" in name or name.startswith("#"):
        raise AppError(INVALID, f"name {one_line(name, 60)!r} must not hold a colon or begin with #")
    token = secrets.token_hex(32)
    line = f"{parse_name(name)}:{role}:{hashlib.sha256(token.encode()).hexdigest()}" + "".join(
        f":{key}={value}" for key, value in (("expires", expires), ("targets", targets)) if value)
    try:
        if parse_token(line).expires_at <= time.time():
            raise ValueError(f"expires {expires} is over")
    except ValueError as error:
        raise AppError(INVALID, str(error)) from None
    folder = os.path.dirname(os.path.realpath(path))
    try:
        guard = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)  # of two at a time the second one reads the first one's line
            before = os.stat(path) if os.path.exists(path) else None
            if before and name in [entry.name for entry in Tokens(path).load()]:
                raise AppError(EXISTS, f"{name} has a token in {path} already: delete its line first, "
                                       "or take a new name")
            text = Path(path).read_text(encoding="utf-8") if before else ""
            replace_file(path, text + ("\n" if text and not text.endswith("\n") else "") + line + "\n", before)
            group = os.fstat(guard).st_gid
            if not before and os.geteuid() == 0 and group != 0:  # root's new file is for the service, too
                os.chown(path, 0, group)
                os.chmod(path, 0o640)
        finally:
            os.close(guard)
    except OSError as error:
        raise ConfigError(f"API_TOKENS_FILE {path} can't be written: {os_reason(error)}") from None
    return token


class Identity(NamedTuple):
    """An authenticated client: its name for the history (see Act), and its role."""
    actor: str
    role: str
    # The token's name, "" where there are no tokens.
    token: str = ""
    # As in Token.
    targets: tuple[str, ...] = ()


# Stands for all targets where an act touches more than one: nodes, the freeze of everything, catch-up.
EVERY_TARGET = ""


def check_target(identity: Identity, target: str, is_in_body: bool = False) -> None:
    """Raise AppError(NOT_ALLOWED) where a client may not act on a target; the one place that says so.

    is_in_body: where the request names none, it could.
    """
    if identity.targets and target not in identity.targets:
        what = f"is of target {target}" if target else "touches every target" + (
            f'; with "target":"{identity.targets[0]}" it would not' if is_in_body else "")
        raise AppError(NOT_ALLOWED, f"{identity.actor} may act on {', '.join(identity.targets)} only: this {what}")


def name_in(certificate: Mapping[str, Any]) -> str:
    """Return the common name of a verified client certificate, else its first alternative name."""
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    names += [value for _, value in certificate.get("subjectAltName", ())]
    return one_line(names[0], 100) if names else ""


def anonymity_of(settings: Settings) -> str:
    """Return the warning that nobody can approve through the API, as nobody signs in there; "" where somebody can."""
    if not settings.approvals or settings.api_tokens_file or settings.http_client_ca:
        return ""
    return ("APPROVALS=1 without API_TOKENS_FILE: nobody signs in, so nobody can approve through the API, nor what was "
            "made there: set API_TOKENS_FILE")


def exposure_of(settings: Settings, address: str) -> str:
    """Return the warning for an address that the API listens on, "" for none; raise ConfigError where it may not."""
    found, shown = ipaddress.ip_address(address.partition("%")[0]), "HTTP_ADDR {}:{}".format(*settings.http_addr)
    if (getattr(found, "ipv4_mapped", None) or found).is_loopback:
        return ""
    if not settings.api_tokens_file:
        raise ConfigError(f"{shown} is open to others: set API_TOKENS_FILE, or listen on 127.0.0.1")
    if settings.http_cert:
        return ""
    if not settings.http_plain:
        raise ConfigError(f"{shown} is open to others, and tokens would cross the network in plain text: set HTTP_CERT "
                          "and HTTP_KEY, listen on 127.0.0.1, or set HTTP_PLAIN=1 behind a proxy that does TLS")
    return f"HTTP_PLAIN=1: {shown} is plain HTTP: anyone on the way to the TLS proxy can read the tokens"


# Headers that proxies add, beside X-Forwarded-*.
PROXY_HEADERS = frozenset(("forwarded", "via", "x-real-ip"))


def refuse_strangers(head: Head) -> None:
    """Raise AppError 1004 for a request of another site's page in a browser, or through a proxy.

    Without tokens nothing else would tell it from a request of a person at this host.
    """
    host = head.headers.get("host", "").lower()
    name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
    for header in head.headers:
        if header in PROXY_HEADERS or header.startswith("x-forwarded"):
            raise AppError(NOT_ALLOWED,
                           f"without API_TOKENS_FILE nothing is served through a proxy ({one_line(header, 40)})")
    is_foreign = head.headers.get("sec-fetch-site", "none").lower() not in ("same-origin", "none")
    with contextlib.suppress(ValueError):
        if name not in ("", "localhost"):
            ipaddress.ip_address(name.strip("[]"))
        origin = head.headers.get("origin", f"http://{host}").lower()
        if not is_foreign and origin in (f"http://{host}", f"https://{host}"):
            return
    raise AppError(NOT_ALLOWED, "without API_TOKENS_FILE only this host's own address is served, "
                                "and no other site's page")


# endregion


# region Requests
# ======================================================================================
# Requests: a checked request, its parameters and its reply; who may read much at a time.
# Uses: Vocabulary, Helpers, Strategy, Plan, Audit, Drift, Overview, Access.
# ======================================================================================

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,128}")
# Seconds between polls of a client's wait for events: another process may write them.
EVENTS_POLL_S, MAX_EVENTS_WAIT_S = 0.5, 30
# A release of more nodes is read whole by one client at a time.
MAX_FREE_READ_NODES = 500
# While a release runs, the next whole read starts after this many times the CPU time of the last one.
WHOLE_READ_REST, MAX_WHOLE_READ_REST_S = 15, 3.0
# Of each role so many clients wait for a whole read, up to WHOLE_READ_WAIT_S; others get 429.
MAX_WHOLE_READ_QUEUE, WHOLE_READ_WAIT_S, WHOLE_READ_POLL_S = 4, 7.0, 0.05

# What stands for the release before one.
BEFORE = "before"

# An id in a path or a query: one that no row can have is not found, like any other that is not there (int() itself has
# a limit of 4300 digits).
ID_DIGITS = "[0-9]{1,4000}"

# Parameter of a query: its schema.
QUERY_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "status": {"type": "string", "enum": ["", *RELEASE_STATUSES]},
    "page": {**PAGES.schema, "default": 1},
    "pageSize": {**PAGE_SIZES.schema, "default": 20},
    "view": {"type": "string", "enum": ["full", "summary"], "default": "full"},
    "lastRelease": {"type": "string", "enum": ["0", "1"], "default": "0"},
    "drift": {"type": "string", "enum": ["", *DRIFTS]},
    "label": {"type": "string", "pattern": "^([^=,]+=[^,]*(,[^=,]+=[^,]*)*)?$",
              "description": "only nodes with these labels: K=V, several with a comma between"},
    "name": {"type": "string", "description": "only nodes of these names, several with a comma between: edge-*"},
    "runs": {**AFTER_IDS.schema, "default": 0,
             "description": "only nodes that run this release"},
    "search": {"type": "string", "description": "only what has this in it: a node in its name, address or labels; a "
                                                "release in its id, version (v42), target, reason or statusReason"},
    "target": {"type": "string", "description": "only releases of this target"},
    "since": {"type": "string", "description": "only releases that were created then or later: RFC 3339"},
    "node": {"type": "string", "description": "only releases that have the node of this name"},
    "sort": {"type": "string", "enum": [*NODE_ORDERS, *(f"-{order}" for order in NODE_ORDERS)], "default": "id"},
    "object": {"type": "string", "description": "only acts on this: node edge-1"},
    "with": {"type": "string", "pattern": f"^({BEFORE}|{ID_DIGITS})$", "default": BEFORE,
             "description": f"id of a release of its target; {BEFORE}: the newest of these before it that succeeded"},
    "after": {**AFTER_IDS.schema, "default": 0},
    "limit": {**Range(1, 1000).schema, "default": 100},
    "wait": {**Range(0, MAX_EVENTS_WAIT_S).schema, "default": 0,
             "description": "seconds to wait for an event when there is none yet"},
}


class Request(NamedTuple):
    """A checked request, as a handler gets it."""
    ids: tuple[int, ...]
    query: Mapping[str, str]
    body: Mapping[str, Any]
    actor: Who
    # Idempotency-Key
    key: str | None = None
    # Wait so many seconds with an idle connection; return whether nobody waits for the answer any more.
    is_over: Callable[[float], bool] = lambda _within_s: True
    # ANYONE for a client without a good token.
    role: str = OPERATOR
    # As in Token.
    targets: tuple[str, ...] = ()

    def integer(self, name: str) -> int:
        """Return a number of the query; raise AppError 2002 when it is none, 2003 out of range."""
        schema = QUERY_PARAMETERS[name]
        text = self.query.get(name, str(schema["default"]))
        if not re.fullmatch(r"-?[0-9]+", text):
            raise AppError(MALFORMED, f"{name} {one_line(text, 40)!r} is not a number")
        try:
            return int(Range(schema["minimum"], schema["maximum"]).from_text(text))
        except ValueError as error:
            raise AppError(INVALID, f"{name} {error}") from None

    def time(self, name: str) -> str:
        """Return an RFC 3339 time of the query as stored, "" without one; raise AppError 2003 for anything else."""
        text = self.query.get(name, "")
        try:
            return utc_text(epoch_of(text)) if text else ""
        except (ValueError, OverflowError):
            raise AppError(INVALID, f"{name} {one_line(text, 40)!r} is not a time like 2026-01-31T00:00:00Z") from None

    def words(self, name: str) -> list[str]:
        """Return the parts of a parameter between its commas, none for an empty one."""
        return [word for word in self.query.get(name, "").split(",") if word]

    def choice(self, name: str) -> str:
        """Return a word of the query, "" without one; raise AppError 2003 when it is not one of the schema's."""
        schema = QUERY_PARAMETERS[name]
        text, words = self.query.get(name, schema.get("default", "")), schema["enum"]
        return parse_choice(name, text, [word for word in words if word]) if text or text not in words else ""


class Reply(NamedTuple):
    """A status, and what goes into the envelope's data; with a content type a whole document."""
    status: int
    data: Any
    content_type: str = ""
    headers: Mapping[str, str] = {}


# The target that an act touches, EVERY_TARGET for more than one: see check_target().
Touches = Callable[[Store, Request], str]


def touches_release(store: Store, request: Request) -> str:
    """Return the target of the release whose id is in the path."""
    return store.releases.get(request.ids[0]).target


def touches_new_release(_: Store, request: Request) -> str:
    """Return the target of a release to create; raise AppError(INVALID) for what is none."""
    return parse_target(request.body.get("target", ReleaseRequest().target))


def touches_freeze(_: Store, request: Request) -> str:
    """Return the target to freeze; raise AppError(INVALID) for what is none."""
    return parse_target(request.body["target"]) if "target" in request.body else EVERY_TARGET


def touches_all(_store: Store, _request: Request) -> str:
    """Return that all targets are touched: nodes are of all."""
    return EVERY_TARGET


class ReadQueue:
    """Admits one reader of a whole release at a time, operators first; a few wait, idle (see ConnectionLimiter)."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_taken = False
        self._free_at = 0.0
        self._waiting = collections.Counter[str]()

    def acquire(self, request: Request) -> bool:
        """Wait until a request may read, up to WHOLE_READ_WAIT_S; return whether it may."""
        with self._guard:
            if self._is_free(request.role):
                self._is_taken = True
                return True
            if self._waiting[request.role] >= MAX_WHOLE_READ_QUEUE:
                return False
            self._waiting[request.role] += 1
        ends_at, is_mine = time.monotonic() + WHOLE_READ_WAIT_S, False
        try:
            while not is_mine and time.monotonic() < ends_at and not request.is_over(WHOLE_READ_POLL_S):
                with self._guard:
                    is_mine = self._is_free(request.role)
                    self._is_taken |= is_mine
            return is_mine
        finally:
            with self._guard:
                self._waiting[request.role] -= 1

    def _is_free(self, role: str) -> bool:
        is_first = role == OPERATOR or not self._waiting[OPERATOR]
        return not self._is_taken and is_first and time.monotonic() >= self._free_at

    def release(self, rest_s: float) -> None:
        """End a read; the next one may begin after so many seconds."""
        with self._guard:
            self._is_taken, self._free_at = False, time.monotonic() + rest_s


# endregion


# region Page
# ======================================================================================
# Page: dashboard.html as it is sent, and the headers that go with it.
# Uses: Vocabulary, Settings.
# ======================================================================================

DASHBOARD_FILE = Path(__file__).resolve().with_name("dashboard.html")


class Dashboard(NamedTuple):
    """The dashboard's document, and the headers that it needs."""
    text: str
    headers: Mapping[str, str]


@functools.lru_cache(maxsize=1)
def dashboard() -> Dashboard:
    """Return the dashboard, read once; raise ConfigError when its file can't be used."""
    text = read_beside(DASHBOARD_FILE)
    if not text.rstrip().endswith("</html>"):
        raise ConfigError(f"{DASHBOARD_FILE} is empty or cut off: copy the one that came with this releasectl.py")
    return Dashboard(text, page_headers(text))


def page_headers(text: str) -> dict[str, str]:
    """Return the headers of a page: its own script and style by their hashes, its own origin, nothing else."""
    script, style = (hashlib.sha256(text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()).digest()
                     for tag in ("script", "style"))
    return {
        "Content-Security-Policy": "; ".join((
            "default-src 'none'", f"script-src 'sha256-{base64.b64encode(script).decode()}'",
            f"style-src 'sha256-{base64.b64encode(style).decode()}'", "connect-src 'self'", "img-src data:",
            "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")),
        "Referrer-Policy": "no-referrer"}


# endregion


# region API
# ======================================================================================
# API: routes as a table, handlers, /openapi.json (contract section 5); knows no
#   socket.
# Uses: Vocabulary, Helpers, Log and metrics, Model, Strategy, Selection, Plan, Status
#   texts, Verbs, Audit, Queue, Retry and rollback, Drift, Overview, Serialization,
#   Requests, Page.
# ======================================================================================

# Minimum seconds between write checks of the database, however many clients ask; the first also after one that failed.
READY_CHECK_EVERY_S, WRITE_CHECK_EVERY_S = 1.0, 10.0
# Added to what Claims.times_ahead() returns: claims and holds that end later than any setting allows.
CLOCK_WAS_AHEAD = ("further ahead than any setting allows: a clock was ahead. It counts as over; look at the clocks of "
                   "all hosts (NTP)")
# A write check under way for longer than this makes the answer "not ready", whatever the last one found.
MAX_READY_CHECK_S = 10.0
# Seconds between log lines that say why we are not ready.
READY_LOG_EVERY_S = 60.0
# The health of a process without an executor.
NO_PROCESS: Mapping[str, Any] = {"executor": {"enabled": False, "owner": "", "lastLookAt": None}, "certificates": []}


class Api:
    """The handlers of ROUTES: each takes a Request and returns a Reply, or raises AppError."""

    def __init__(self, store: Store, metrics: Metrics, nudge: Callable[[], None] = lambda: None, max_waiting: int = 32,
                 process: Callable[[], Mapping[str, Any]] = lambda: NO_PROCESS,
                 is_busy: Callable[[], bool] = lambda: False,
                 figures: Callable[[], Figures] = lambda: {}, hung: Callable[[], str] = lambda: "",
                 node_deadline_s: float = 600.0):
        """Take what the handlers need of the process.

        nudge: called after every change, so that an executor in this process scans at once.
        max_waiting: how many clients may wait for events; further ones are answered at once.
        process, figures: health of executor and certificates, for /api/v1/health and for /metrics.
        is_busy: whether a release is driven here, which whole reads must not slow down.
        hung: one sentence on a thread of this process that hangs, "" for none.
        node_deadline_s: NODE_DEADLINE_SEC.
        """
        self.store = store
        self.counters = metrics
        self._nudge = nudge
        self._process = process
        self._is_busy = is_busy
        self._whole_reads = ReadQueue()
        self._figures = figures
        self._hung = hung
        self._node_deadline_s = node_deadline_s
        self._waiters = threading.BoundedSemaphore(max_waiting)
        self._ready_guard = threading.Lock()
        # When the last write check ended, and why it failed, "" when it did not.
        self._ready = (-READY_CHECK_EVERY_S, "the database was not checked yet")
        # Start of the write check under way.
        self._checking_since = float("inf")
        self._not_ready_logged_at = -READY_LOG_EVERY_S
        self._ahead: set[str] = set()
        self.started_at = time.time()

    def create_release(self, request: Request) -> Reply:
        wanted = parse_release_request(request.body)
        self._idempotency_key(request)  # a bad key is an error of a dry run too
        if parse_flag("dryRun", request.body.get("dryRun", False)):
            return Reply(200, plan_json(self.store.releases.plan(wanted)))
        made = self.store.releases.create(wanted, request.actor, self._idempotency_key(request))
        self._nudge()
        return Reply(201, created_json(made))

    @staticmethod
    def _idempotency_key(request: Request, what: str = "") -> IdempotencyKey | None:
        """Return a request's Idempotency-Key with a digest of the request; what: operation and release."""
        if request.key is None:
            return None
        if not IDEMPOTENCY_KEY.fullmatch(request.key):
            raise AppError(INVALID, "Idempotency-Key must be 1 to 128 printable characters without a space")
        asked = (what + canonical_json(request.body)).encode()
        return IdempotencyKey(str(request.actor), request.key, hashlib.sha256(asked).hexdigest())

    def list_releases(self, request: Request) -> Reply:
        wanted = ReleaseFilter(request.choice("status"), request.query.get("target", ""),
                               request.query.get("search", ""), request.time("since"), request.query.get("node", ""))
        page = self.store.releases.page(wanted, request.integer("page"), request.integer("pageSize"))
        return Reply(200, page_json(page, release_json))

    def get_release(self, request: Request) -> Reply:
        if request.choice("view") == "summary":
            release, failures = self.store.releases.with_failures(request.ids[0])
            return Reply(200, release_summary_json(self.store.releases.as_shown(release), failures))

        def read() -> dict[str, Any]:
            release, nodes, failures = self.store.releases.whole(request.ids[0])
            return release_with_nodes_json(self.store.releases.as_shown(release), nodes, failures)
        return Reply(200, self._by_size(request, read))

    def get_why(self, request: Request) -> Reply:
        if not self.store.releases.get(request.ids[0]).is_terminal:
            self._readiness(WRITE_CHECK_EVERY_S)  # why() tells whether the database takes writes
        return Reply(200, self._by_size(request, lambda: why_json(
            self.store.why(request.ids[0], self._node_deadline_s))))

    def get_payload(self, request: Request) -> Reply:
        def read() -> dict[str, Any]:
            release = self.store.releases.get(request.ids[0])
            return payload_json(release, stored_payload(release))
        return Reply(200, self._one_at_a_time(request, read))

    def get_difference(self, request: Request) -> Reply:
        text = request.query.get("with", BEFORE)
        other = None if text == BEFORE else parse_id(text)
        return Reply(200, self._one_at_a_time(request, lambda: difference_json(
            *self.store.releases.difference(request.ids[0], other))))

    def _by_size(self, request: Request, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Read something of all nodes of a release; of large ones one at a time."""
        is_small = self.store.releases.get(request.ids[0]).total_nodes <= MAX_FREE_READ_NODES
        return read() if is_small else self._one_at_a_time(request, read)

    def _one_at_a_time(self, request: Request, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Read what is dear, one at a time, with pauses while a release runs.

        All threads share one interpreter: clients that read in a loop would take most of it.
        """
        if not self._whole_reads.acquire(request):
            raise AppError(TOO_MANY_REQUESTS, "too many clients read whole releases, payloads or differences, ask why, "
                           "or search nodes: try again in a moment, or ask for ?view=summary", retry_after_s=5)
        began, rest_s = time.thread_time(), 0.0
        try:
            data = read()
            if self._is_busy():
                rest_s = min(WHOLE_READ_REST * (time.thread_time() - began), MAX_WHOLE_READ_REST_S)
            return data
        finally:
            self._whole_reads.release(rest_s)

    def pause(self, request: Request) -> Reply:
        return self._act("pause", request)

    def resume(self, request: Request) -> Reply:
        accepts = parse_flag("acceptFailures", request.body.get("acceptFailures", False))
        return self._act("resume", request, "acceptFailures", accept_failures=accepts)

    def cancel(self, request: Request) -> Reply:
        force = parse_flag("force", request.body.get("force", False))
        return self._act(CANCEL_BY_FORCE if force else "cancel", request, "force")

    def approve(self, request: Request) -> Reply:
        reason = self._reason(request, "emergency")
        release = self.store.approvals.approve(request.ids[0], request.actor, reason,
                                               parse_flag("emergency", request.body.get("emergency", False)))
        self._nudge()
        return Reply(200, release_json(release))

    def _act(self, verb: str, request: Request, *keys: str, **more: bool) -> Reply:
        reason = self._reason(request, *keys)
        release = self.store.releases.act(verb, request.ids[0], request.actor, reason, **more)
        self._nudge()
        return Reply(200, release_json(release))

    def retry(self, request: Request) -> Reply:
        return self._again("retry", self.store.releases.retry, request, "kinds", "nodeIds")

    def rollback(self, request: Request) -> Reply:
        return self._again("rollback", self.store.releases.rollback, request, "toRelease", "supersede", "duringFreeze")

    def _again(self, verb: str, make: Callable[[int, Who, Again, IdempotencyKey | None], Made], request: Request,
               *keys: str) -> Reply:
        body, release_id = request.body, request.ids[0]
        wish = Again(self._reason(request, "overNewer", "dryRun", "emergency", *keys),
                     parse_flag("overNewer", body.get("overNewer", False)),
                     parse_release_id("toRelease", body["toRelease"]) if "toRelease" in body else None,
                     parse_flag("supersede", body.get("supersede", False)),
                     parse_flag("duringFreeze", body.get("duringFreeze", False)),
                     parse_kinds(body["kinds"]) if "kinds" in body else (),
                     parse_node_ids(body["nodeIds"]) if "nodeIds" in body else (),
                     is_emergency=parse_flag("emergency", body.get("emergency", False)))
        once = self._idempotency_key(request, f"{verb} {release_id} ")
        if parse_flag("dryRun", body.get("dryRun", False)):
            return Reply(200, plan_json(self.store.releases.plan_again(verb, release_id, wish)))
        reply = Reply(201, created_again_json(make(release_id, request.actor, wish, once)))
        self._nudge()
        return reply

    @staticmethod
    def _reason(request: Request, *more_keys: str) -> str:
        known_keys(request.body, ("reason", *more_keys))
        return parse_text("reason", request.body.get("reason", ""))

    def get_freeze(self, _request: Request) -> Reply:
        return Reply(200, freezes_json(self.store.releases.freezes()))

    def set_freeze(self, request: Request) -> Reply:
        body, reason = request.body, self._reason(request, "frozen", "target", "until", "emergency")
        if "frozen" not in body:
            raise AppError(MISSING, "frozen is missing")
        target = parse_target(body["target"]) if "target" in body else ""
        try:
            until = parse_time(body["until"]) if "until" in body else None
        except ValueError as error:
            raise AppError(INVALID, f"until {error}") from None
        frozen = parse_flag("frozen", body["frozen"])
        freezes = self.store.releases.set_freeze(frozen, request.actor, reason, target,
                                                 until, parse_flag("emergency", body.get("emergency", False)))
        self._nudge()
        return Reply(200, freezes_json(freezes, self.store.releases.freeze_warnings(target, freezes, frozen)))

    def list_events(self, request: Request) -> Reply:
        after, limit, wait_s = request.integer("after"), request.integer("limit"), request.integer("wait")
        ends_at = time.monotonic() + wait_s
        may_wait = wait_s > 0 and self._waiters.acquire(blocking=False)
        try:
            while True:
                events = self.store.releases.events(request.ids[0], after, limit)
                left_s = ends_at - time.monotonic()
                if events or not may_wait or left_s <= 0 or request.is_over(min(EVENTS_POLL_S, left_s)):
                    return Reply(200, {"items": [event_json(event) for event in events]})
        finally:
            if may_wait:
                self._waiters.release()

    @staticmethod
    def _wanted_nodes(request: Request) -> NodeFilter:
        labels = request.words("label")
        return NodeFilter(
            request.choice("drift"),
            node_words(tuple(request.words("name")), "label", [",".join(labels)] if labels else []),
            request.integer("runs") or None, request.query.get("search", ""), request.choice("sort"))

    def list_nodes(self, request: Request) -> Reply:
        wanted = self._wanted_nodes(request)
        with_last = request.choice("lastRelease") == "1"

        def read() -> dict[str, Any]:
            page = self.store.fleet.page(request.integer("page"), request.integer("pageSize"), wanted)
            if not with_last:
                return page_json(page, node_json)
            last = self.store.nodes.last_releases([listed.node.id for listed in page.items])
            return page_json(page, lambda listed: listed_node_json(listed, last.get(listed.node.id)))

        # a search reads every node: 1 s of CPU time for 100,000
        return Reply(200, read() if wanted == NodeFilter() else self._one_at_a_time(request, read))

    def add_node(self, request: Request) -> Reply:
        node = self.store.nodes.add(**parse_node_fields(request.body, ("name", "mainIp")), by=request.actor)
        return Reply(201, node_json(self.store.written([node])[0]))

    def get_node(self, request: Request) -> Reply:
        return Reply(200, node_json(self.store.fleet.listed([self.store.nodes.get(request.ids[0])])[0]))

    def update_node(self, request: Request) -> Reply:
        node = self.store.nodes.update(request.ids[0], parse_node_fields(request.body), request.actor)
        return Reply(200, node_json(self.store.written([node])[0]))

    def update_nodes(self, request: Request) -> Reply:
        """Change all nodes that a search finds, where these are as many as the client saw."""
        changes, total = parse_nodes_change(request.body)

        def change() -> dict[str, Any]:
            found = self.store.fleet.page(1, 0, self._wanted_nodes(request)).items
            if len(found) != total:
                raise AppError(WRONG_STATE, f"{count_of_nodes(len(found))} found, not {total}: look at them again")
            nodes = [node for node, _ in found if any(getattr(node, key) != value for key, value in changes.items())]
            self.store.nodes.update_all([node.id for node in nodes], changes, request.actor)
            return {"changed": len(nodes)}

        return Reply(200, self._one_at_a_time(request, change))

    def list_labels(self, _request: Request) -> Reply:
        return Reply(200, {"items": [{"key": key, "value": value, "nodes": nodes}
                                     for key, value, nodes in self.store.nodes.label_counts()]})

    def list_node_releases(self, request: Request) -> Reply:
        page = self.store.fleet.tries(request.ids[0], request.integer("page"), request.integer("pageSize"))
        return Reply(200, page_json(page, node_try_json))

    def catch_up(self, request: Request) -> Reply:
        reason, strategy = parse_catch_up(request.body)
        if parse_flag("dryRun", request.body.get("dryRun", False)):
            return Reply(200, catch_up_plan_json(*self.store.releases.plan_catch_up(reason, strategy)))
        made, left_out = self.store.releases.catch_up(request.actor, reason, strategy)
        self._nudge()
        return Reply(201, caught_up_json(made, left_out))

    def delete_node(self, request: Request) -> Reply:
        self.store.nodes.delete(request.ids[0], request.actor)
        return Reply(200, None)

    def list_audit(self, request: Request) -> Reply:
        rows = self.store.audit.rows(request.integer("after"), request.integer("limit"),
                                     AuditFilter(object=request.query.get("object", "")))
        return Reply(200, {"items": [audit_json(row) for row in rows]})

    def page(self, _request: Request) -> Reply:
        try:
            text, headers = dashboard()
        except ConfigError as error:  # anybody may ask: nobody learns a path of this host
            message = error.message.replace(str(DASHBOARD_FILE), DASHBOARD_FILE.name)
            raise AppError(NOT_FOUND, f"no dashboard: {message}") from None
        return Reply(200, text, "text/html; charset=utf-8", headers)

    def get_overview(self, _request: Request) -> Reply:
        self._readiness(WRITE_CHECK_EVERY_S)  # read() tells whether the database takes writes
        return Reply(200, overview_json(self.store.overview.read(certificate_states(self._process()["certificates"]))))

    def process_health(self, request: Request) -> Reply:
        message, schema, releases = "", 0, []
        try:
            schema, releases = self.store.database.schema_version(), self.store.releases.open()
        except DatabaseError as error:
            message = error.message
        database = {"engine": self.store.database.engine.name, "ok": not message, "schema": schema, "message": message}
        return Reply(200, {"version": __version__, "startedAt": utc_text(self.started_at), "role": request.role,
                           "user": str(request.actor), "targets": list(request.targets), "database": database,
                           **open_releases_json(releases), **self._process()})

    def health(self, _request: Request) -> Reply:
        return Reply(200, {"status": "ok"})

    def _readiness(self, every_s: float) -> str:
        """Return why the database can't be used, "" where it can; checked each so many seconds, trouble each second."""
        if self._ready_guard.acquire(blocking=False):  # else a check is under way: the last result holds
            if time.monotonic() - self._ready[0] < (READY_CHECK_EVERY_S if self._ready[1] else every_s):
                self._ready_guard.release()
            else:
                self._start_check()
        waited_s = time.monotonic() - self._checking_since
        return f"the database has not answered for {waited_s:.0f} s" if waited_s > MAX_READY_CHECK_S else self._ready[1]

    def ready(self, request: Request) -> Reply:
        trouble = self._readiness(READY_CHECK_EVERY_S) or self._hung()
        self._log_readiness(trouble)
        if trouble:
            raise DatabaseError(trouble if request.role else "not ready: the log of releasectl says why")
        return Reply(200, {"status": "ready"})

    def _start_check(self) -> None:
        """Check the database in a thread of its own: where server or disk hang, wait only so long."""
        self._checking_since = time.monotonic()
        check = threading.Thread(target=self._check_ready, name="ready", daemon=True)
        try:
            check.start()
        except RuntimeError as error:  # the system has no more threads
            self._end_check(str(error))
        else:
            check.join(MAX_READY_CHECK_S)

    def _check_ready(self) -> None:
        trouble = "the database could not be checked"
        try:
            trouble = self._check_database()
        except Exception:  # the edge of a thread
            log.exception("the database could not be checked")
        finally:
            self._end_check(trouble)

    def _end_check(self, trouble: str) -> None:
        self._ready = (time.monotonic(), trouble)
        self._checking_since = float("inf")
        self._ready_guard.release()

    def _check_database(self) -> str:
        """Return why the database can't be used, "" when it can."""
        try:
            self.store.database.require_schema()
            self.store.state.check_write()
            self._log_times_ahead()
            return ""
        except AppError as error:
            return error.message

    def _log_readiness(self, trouble: str) -> None:
        """Log now and then why we are not ready, and once that we are again: clients without a token learn neither."""
        if trouble and time.monotonic() - self._not_ready_logged_at >= READY_LOG_EVERY_S:
            self._not_ready_logged_at = time.monotonic()
            log.warning("not ready: %s", trouble)
        elif not trouble and self._not_ready_logged_at > -READY_LOG_EVERY_S:
            self._not_ready_logged_at = -READY_LOG_EVERY_S
            log.info("ready again")

    def _log_times_ahead(self) -> None:
        """Log, each once, claims and holds of a clock that was ahead: they count as over, so we are ready."""
        ahead = set(self.store.claims.times_ahead())
        for sentence in sorted(ahead - self._ahead):
            log.warning("%s, %s", sentence, CLOCK_WAS_AHEAD)
        self._ahead = ahead

    def metrics(self, _request: Request) -> Reply:
        more = {**process_figures(self.started_at), **self._figures()}
        return Reply(200, metrics_text(self.counters, self.store, more), "text/plain; version=0.0.4; charset=utf-8")

    def openapi(self, _request: Request) -> Reply:
        return Reply(200, to_json(openapi_document()), "application/json")


def metrics_text(metrics: Metrics, store: Store, more: Figures) -> str:
    """Return /metrics: what this process counted, what the database holds if it answers, and more."""
    figures = {("releasectl_build_info", __version__, ".".join(map(str, sys.version_info[:3]))): 1.0, **more}
    try:
        figures.update({**store.releases.counts(), **store.outbox.figures()})
        figures.update({("releasectl_nodes_drift", drift): float(found.nodes)
                        for drift, found in store.fleet.counts().drift.items()})
        figures["releasectl_database_up",] = 1.0
    except DatabaseError:  # already counted; the figures of this process are wanted all the more
        figures["releasectl_database_up",] = 0.0
    return metrics.text(figures)


class Route(NamedTuple):
    """One row of the API; {id} in the path is a number."""
    method: str
    path: str
    handler: Callable[[Api, Request], Reply]
    role: str
    summary: str
    # Name of the schema of the answer's data, or text, html, json for a whole document.
    answers: str
    query: tuple[str, ...] = ()
    # Name of the schema of the body, "" where it takes none.
    body: str = ""
    # Name of the schema of the data when dryRun is set; such an answer is 200 instead of 201.
    dry_run: str = ""
    # Request headers that the route uses.
    headers: tuple[str, ...] = ()
    # A route for ANYONE whose answer says more to a client with a good token.
    tells_more: bool = False
    # For check_target(); None: it only reads.
    touches: Touches | None = None

    @property
    def status(self) -> int:
        """HTTP status of a success."""
        return 201 if self.answers in ("Created", "CreatedAgain", "CaughtUp") or self.body == "NewNode" else 200


ROUTES: tuple[Route, ...] = (
    Route("POST", "/api/v1/releases", Api.create_release, OPERATOR, "Create a release for the online nodes",
          "Created", body="NewRelease", headers=("Idempotency-Key",), dry_run="Plan", touches=touches_new_release),
    Route("GET", "/api/v1/releases", Api.list_releases, VIEWER, "List releases, newest first", "ReleaseList",
          ("status", "page", "pageSize", "target", "search", "since", "node"), headers=("If-None-Match",)),
    Route("GET", "/api/v1/releases/{id}", Api.get_release, VIEWER, "A release and its nodes by batch",
          "ReleaseWithNodes", ("view",), headers=("If-None-Match",)),
    Route("POST", "/api/v1/releases/{id}/pause", Api.pause, OPERATOR, "Dispatch nothing more until resume", "Release",
          body="Act", touches=touches_release),
    Route("POST", "/api/v1/releases/{id}/resume", Api.resume, OPERATOR, "Continue a paused release", "Release",
          body="Resume", touches=touches_release),
    Route("POST", "/api/v1/releases/{id}/cancel", Api.cancel, OPERATOR, "End it; nodes in flight are waited for",
          "Release", body="Cancel", touches=touches_release),
    Route("POST", "/api/v1/releases/{id}/approve", Api.approve, OPERATOR,
          "Let a release start that waits for an approval by somebody else than its author", "Release", body="Approve",
          touches=touches_release),
    Route("POST", "/api/v1/releases/{id}/retry", Api.retry, OPERATOR,
          "A new release of its payload for its failed and skipped nodes", "CreatedAgain", body="Retry",
          headers=("Idempotency-Key",), dry_run="Plan", touches=touches_release),
    Route("POST", "/api/v1/releases/{id}/rollback", Api.rollback, OPERATOR,
          "A new release that brings back what the nodes that it touched had before", "CreatedAgain", body="Rollback",
          headers=("Idempotency-Key",), dry_run="Plan", touches=touches_release),
    Route("GET", "/api/v1/releases/{id}/events", Api.list_events, VIEWER, "Its history, oldest first", "EventList",
          ("after", "limit", "wait")),
    Route("GET", "/api/v1/releases/{id}/payload", Api.get_payload, OPERATOR, "Its payload, but for the version",
          "Payload"),
    Route("GET", "/api/v1/releases/{id}/diff", Api.get_difference, OPERATOR,
          "What its payload changes against another release's", "Difference", ("with",)),
    Route("GET", "/api/v1/releases/{id}/why", Api.get_why, VIEWER,
          "What it waits for, step by step, and what would mend it", "Why"),
    Route("GET", "/api/v1/nodes", Api.list_nodes, VIEWER, "List nodes", "NodeList",
          ("page", "pageSize", "lastRelease", "drift", "label", "name", "runs", "search", "sort")),
    Route("POST", "/api/v1/nodes", Api.add_node, OPERATOR, "Add a node", "Node", body="NewNode",
          touches=touches_all),
    Route("PATCH", "/api/v1/nodes", Api.update_nodes, OPERATOR, "Change all nodes that a search finds", "NodesChanged",
          ("drift", "label", "name", "runs", "search"), body="NodesChange", touches=touches_all),
    Route("GET", "/api/v1/nodes/{id}", Api.get_node, VIEWER, "A node", "Node"),
    Route("PATCH", "/api/v1/nodes/{id}", Api.update_node, OPERATOR, "Change a node", "Node", body="NodeChange",
          touches=touches_all),
    Route("DELETE", "/api/v1/nodes/{id}", Api.delete_node, OPERATOR, "Delete a node that no release names", "Null",
          touches=touches_all),
    Route("GET", "/api/v1/nodes/{id}/releases", Api.list_node_releases, VIEWER, "What a node was given, newest first",
          "NodeTryList", ("page", "pageSize")),
    Route("GET", "/api/v1/labels", Api.list_labels, VIEWER, "The labels of the nodes that get releases", "LabelList"),
    Route("POST", "/api/v1/catch-up", Api.catch_up, OPERATOR,
          "A new release for each one that nodes are behind with", "CaughtUp", body="CatchUp",
          dry_run="CatchUpPlan", touches=touches_all),
    Route("GET", "/api/v1/freeze", Api.get_freeze, VIEWER, "Whether new dispatches are stopped", "Freeze"),
    Route("PUT", "/api/v1/freeze", Api.set_freeze, OPERATOR, "Stop or allow new dispatches", "Freeze",
          body="SetFreeze", touches=touches_freeze),
    Route("GET", "/api/v1/audit", Api.list_audit, OPERATOR, "Who did what, oldest first", "AuditList",
          ("after", "limit", "object")),
    Route("GET", "/api/v1/overview", Api.get_overview, VIEWER, "What is wrong, worst first, each with its mend",
          "Overview"),
    Route("GET", "/api/v1/health", Api.process_health, VIEWER, "State of this process and of its open releases",
          "Health"),
    Route("GET", "/", Api.page, ANYONE, "The dashboard", "html"),
    Route("GET", "/healthz", Api.health, ANYONE, "The process serves", "Status"),
    Route("GET", "/readyz", Api.ready, ANYONE, "The database can be used", "Status", tells_more=True),
    Route("GET", "/metrics", Api.metrics, VIEWER, "Figures for Prometheus", "text"),
    Route("GET", "/openapi.json", Api.openapi, VIEWER, "This document", "json"),
)
METHODS = frozenset(("HEAD", *(route.method for route in ROUTES)))
_PATTERNS = [(re.escape(r.path).replace(r"\{id\}", "([^/]+)"), r) for r in ROUTES]  # compiled by the first request


def find_route(method: str, path: str) -> tuple[Route, tuple[int, ...]]:
    """Return the route of a request and the numbers in its path; raise AppError 2002, 3001 or 4005."""
    found = [(route, match.groups()) for pattern, route in _PATTERNS
             for match in [re.fullmatch(pattern, path)] if match]
    if not found:
        raise AppError(NOT_FOUND, f"there is no {one_line(path, 100)} here: see /openapi.json")
    wanted = "GET" if method == "HEAD" else method
    for route, texts in found:
        if route.method == wanted:
            return route, tuple(parse_id(text) for text in texts)
    allowed = [route.method for route, _ in found]
    allow = ", ".join(allowed + (["HEAD"] if "GET" in allowed else []))
    raise AppError(METHOD_NOT_ALLOWED, f"{one_line(method, 20)} is not for {one_line(path, 100)}: it takes {allow}",
                   allow=allow)


def parse_id(text: str) -> int:
    """Return the id of a release or node; raise AppError 2002 when it is not a number."""
    if not re.fullmatch(ID_DIGITS, text):
        raise AppError(MALFORMED, f"id {one_line(text, 40)!r} is not a number")
    return int(text)


# Header of a request: its schema.
HEADER_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "X-Request-Id": {"type": "string", "description": "taken over when it is 1 to 64 letters, digits or . _ -"},
    "If-None-Match": {"type": "string", "description": "an ETag that the client has"},
    "Idempotency-Key": {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY.pattern}$", "description":
                        "the same key and body again within a day give the first answer again"},
}
# Header of an answer beside X-Request-Id: the HTTP statuses that carry it.
ANSWER_HEADERS: Mapping[str, tuple[int, ...]] = {
    "Allow": (405,), "Retry-After": (429, 503), "WWW-Authenticate": (401,), "ETag": (304,)}
# HTTP statuses of the errors that any request may get.
ANY_STATUS = (400, 405, 408, 413, 414, 431, 500, 501, 503, 505)


def _statuses(route: Route) -> list[int]:
    """Return the HTTP statuses of a route's errors."""
    found = [*ANY_STATUS]
    found += [401, 403, 429] if route.role else []
    found += [404] if "{id}" in route.path or route.answers == "html" else []  # no such row; no dashboard.html
    found += [409] if route.role == OPERATOR else []
    found += [415] if route.body else []
    return sorted(found)


def _answer_headers(status: int) -> dict[str, Any]:
    names = [name for name, statuses in ANSWER_HEADERS.items() if status in statuses]
    return {name: {"schema": TEXT, "required": name in names} for name in ["X-Request-Id", *names]}


def _success(answers: str, description: str, headers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    envelope = schema_of({"code": {"const": 0}, "message": {"const": "success"}, "data": ref_schema(answers)})
    documents: dict[str, dict[str, Any]] = {
        "text": {"text/plain": {"schema": TEXT}}, "html": {"text/html": {"schema": TEXT}},
        "json": {"application/json": {"schema": {"type": "object"}}}}
    return {"description": description, "headers": headers or _answer_headers(200),
            "content": documents.get(answers, {"application/json": {"schema": envelope}})}


def _operation(route: Route, schemas: Mapping[str, Any]) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [{"name": "id", "in": "path", "required": True, "schema": ID}] \
        if "{id}" in route.path else []
    parameters += [{"name": name, "in": "query", "schema": QUERY_PARAMETERS[name]} for name in route.query]
    parameters += [{"name": name, "in": "header", "schema": HEADER_PARAMETERS[name]}
                   for name in ("X-Request-Id", *route.headers)]
    responses: dict[str, Any] = {
        str(status): {"$ref": f"#/components/responses/{status}"} for status in _statuses(route)}
    responses[str(route.status)] = _success(route.answers, route.summary, _answer_headers(
        304 if "If-None-Match" in route.headers else route.status))
    if "If-None-Match" in route.headers:
        responses["304"] = {"description": "the client has it already", "headers": _answer_headers(304)}
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__, "summary": route.summary, "parameters": parameters,
        "security": [{"token": []}] if route.role else [], "responses": dict(sorted(responses.items()))}
    if route.dry_run:
        operation["responses"]["200"] = _success(route.dry_run, "what it would do")
    if route.body:
        operation["requestBody"] = {"required": bool(schemas[route.body]["required"]),
                                    "content": {"application/json": {"schema": ref_schema(route.body)}}}
    return operation


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of ROUTES."""
    schemas, paths = openapi_schemas(), dict[str, dict[str, Any]]()
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    statuses = sorted({status for route in ROUTES for status in _statuses(route)})
    error = {"application/json": {"schema": ref_schema("Error")}}
    return {"openapi": "3.1.0", "info": {"title": "releasectl", "version": __version__}, "paths": paths,
            "components": {"schemas": schemas,
                           "responses": {str(status): {"description": http.HTTPStatus(status).phrase, "content": error,
                                                       "headers": _answer_headers(status)} for status in statuses},
                           "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}}


# endregion


# region Server
# ======================================================================================
# Server: a request from its first byte to its answer; the listener and its threads.
# Uses: Vocabulary, Helpers, Settings, Certificates, Model, Strategy, Audit, Counts,
#   HTTP wire, Languages, Access, Requests, API.
# ======================================================================================

class ClientGone(Exception):
    """Nobody waits for an answer: the client has hung up, or its connection was evicted."""


class HttpAnswer(NamedTuple):
    """An answer before it is written out."""
    status: int
    headers: Mapping[str, str]
    body: bytes


def encode_answer(answer: HttpAnswer, headers: Mapping[str, str], has_body: bool = True) -> bytes:
    """Return the bytes of an answer with all its headers."""
    if answer.status != http.HTTPStatus.NOT_MODIFIED:
        headers = {**headers, "Content-Length": str(len(answer.body))}
    first_line = f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}"
    return encode_message(first_line, headers, answer.body if has_body else b"")


def answer_of(reply: Reply, route: Route, head: Head) -> HttpAnswer:
    """Return the answer to a request that succeeded: 304 where the client has it already."""
    data = translated(reply.data) if is_chinese(head.headers.get("accept-language", "")) else reply.data
    text = data if reply.content_type else to_json({"code": 0, "message": "success", "data": data})
    body = text.encode(errors="backslashreplace")  # the path of a database may be any bytes
    headers = {"Content-Type": reply.content_type or "application/json", **reply.headers}
    if "If-None-Match" in route.headers:
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        known = [tag.strip().replace("W/", "", 1) for tag in head.headers.get("if-none-match", "").split(",")]
        if headers["ETag"] in known or "*" in known:
            return HttpAnswer(304, {"ETag": headers["ETag"]}, b"")
    return HttpAnswer(reply.status, headers, body)


def refusal_of(error: AppError, head: Head = Head()) -> HttpAnswer:  # noqa: B008
    """Return the answer to a request that failed."""
    headers = {"Content-Type": "application/json"}
    if error.allow:
        headers["Allow"] = error.allow
    if error.retry_after_s:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    message = one_line(error.message)
    if is_chinese(head.headers.get("accept-language", "")):
        message = in_chinese(message)
    text = to_json({"code": error.code, "message": message, "data": None})
    return HttpAnswer(error.http_status, headers, text.encode())


class ApiHandler:
    """One connection, in its thread: the TLS handshake, then its requests one after the other."""

    def __init__(self, server: ApiServer, connection: Connection, client_host: str):
        self.server, self.connection, self.client_host = server, connection, client_host
        self.certificate_name = ""
        # What the client certificate was verified by, and when it expires.
        self.trust, self.trusted_until = "", float("inf")
        # else an answer waits 40 ms for the acknowledgement of TLS 1.3's tickets
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.tls:
            self._do_handshake(server.tls)
        self.wire = Wire(connection.sock)

    def _do_handshake(self, tls: TlsFiles) -> None:
        context, self.trust = tls.current()
        self.server.connections.encrypt(self.connection, context)
        sock = self.connection.sock
        assert isinstance(sock, ssl.SSLSocket)
        sock.settimeout(UNAUTHENTICATED_S)  # OpenSSL takes it for the whole handshake
        sock.do_handshake()
        certificate = sock.getpeercert() or {}
        self.certificate_name = name_in(certificate)
        if certificate:
            self.trusted_until = min(certificate_end(certificate), crl_end_of(
                sock.getpeercert(binary_form=True) or b"", self.server.client_ca, self.trust))

    def serve(self) -> None:
        """Answer requests until the connection ends."""
        while Exchange(self).run():
            pass

    def is_distrusted(self) -> bool:
        """Return whether the client certificate or its CRL has expired, or its CA or CRL changed since."""
        tls = self.server.tls
        return tls is not None and (time.time() > self.trusted_until or tls.current()[1] != self.trust)


class Exchange:
    """One request and its answer."""

    def __init__(self, handler: ApiHandler):
        self.handler, self.server = handler, handler.server
        self.connection, self.wire = handler.connection, handler.wire
        self.head, self.began = Head(), 0.0
        self.request_id = secrets.token_hex(8)
        self.route: Route | None = None
        self.ids: tuple[int, ...] = ()
        # None until the client is known.
        self.actor: Act | None = None
        # Length of the body while nobody has read it.
        self.unread_bytes = 0
        # The connection closes after the answer: so until the request was read to its end.
        self.closes = True
        # The connection closes even where the request was read to its end.
        self.must_close = False

    def run(self) -> bool:
        """Read a request and answer it; return whether the connection stays open."""
        try:
            if not self._read_head():
                return False
            answer = self._answer()
        except ClientGone:
            return False
        except AppError as error:
            self._keep_connection()
            answer = refusal_of(error, self.head)
        except Exception:  # the edge of a request
            log.exception("%s %s failed, request %s", self.head.method, self._path, self.request_id)
            answer = refusal_of(AppError(INTERNAL, "releasectl itself failed: see its log"))
        self.closes |= self.server.is_stopping or self.must_close
        self._log(answer)
        self.server.connections.set_idle(self.connection, owes_answer=True)  # one that does not read may be evicted
        self._send(answer)
        self.server.connections.set_idle(self.connection)
        return not self.closes and self._skip_body()

    @property
    def _path(self) -> str:
        return one_line(self.head.target.partition("?")[0], 200)

    def _read_head(self) -> bool:
        """Wait for the next request; return False when none comes, or the connection was evicted."""
        connection = self.connection
        ends_at = time.monotonic() + IDLE_S if connection.is_authenticated else connection.since + UNAUTHENTICATED_S
        if not self.wire.has_bytes(ends_at):
            return False  # a client that sends nothing gets no answer
        head = self.wire.head(time.monotonic() + HEAD_S if connection.is_authenticated else ends_at)
        if not self.server.connections.set_busy(connection):
            return False
        self.head, self.began = head, time.monotonic()
        asked_id = head.headers.get("x-request-id", "")
        if REQUEST_ID.fullmatch(asked_id):
            self.request_id = asked_id
        return True

    def _answer(self) -> HttpAnswer:
        head = self.head
        self.unread_bytes = body_length(head, self.server.max_body_bytes)
        self.closes = head.is_last or self.unread_bytes > 0
        path, _, query = head.target.partition("?")
        self.route, self.ids = route, ids = find_route(head.method, path)
        identity = self._identify(route)
        if route.role:
            assert identity is not None
            self._require_role(identity, route.role)
        fields = self._query(query, route)
        body = self._body(self._read_body(route), route)
        request = Request(ids, fields, body, self.actor or "", head.headers.get("idempotency-key"), self._is_over,
                          identity.role if identity else ANYONE, identity.targets if identity else ())
        if identity and identity.targets and route.touches:
            check_target(identity, route.touches(self.server.api.store, request), route.touches is touches_freeze)
        return answer_of(route.handler(self.server.api, request), route, head)

    # -- authentication: done before a byte of the body is waited for -----------------------

    def _identify(self, route: Route) -> Identity | None:
        """Return who asks, None where that does not matter; raise AppError 1001, 1002, 1004, 4029, 5001, 5003."""
        server, connection = self.server, self.connection
        if not route.role and not route.tells_more:
            server.connections.identify(connection, False)
            return None
        if self.handler.is_distrusted():
            self.must_close = True
            raise AppError(NO_FREE_CONNECTION,
                           "the CA or CRL for client certificates has changed or expired: connect again",
                           retry_after_s=1)
        authorization = self.head.headers.get("authorization", "")
        identity, refusal = server.who(self.head, self.handler.certificate_name)
        is_bad = refusal is not None and refusal.code == BAD_TOKEN and not isinstance(refusal, TokenExpired)
        if is_bad:
            self._note_bad_token()
        if server.tokens and authorization and self._wait_for_token(authorization, is_bad):
            identity, refusal = server.who(self.head, self.handler.certificate_name)  # it may have been removed
        if isinstance(refusal, TokenExpired):
            self._note_expired(refusal.token)
        if identity and server.tokens:
            server.throttle.note_good(connection.address, authorization)
        if identity and not server.connections.identify(connection, True, identity.token, identity.role == VIEWER):
            self.must_close = True
            refusal = AppError(TOO_MANY_REQUESTS,
                               f"{identity.token} has as many busy connections as one token, or all viewers here, "
                               "may have: try again in a moment", retry_after_s=1)
            identity = None
        elif not identity:
            self.must_close = connection.is_authenticated  # its token was removed
            server.connections.identify(connection, False)
        if refusal and route.role:
            raise refusal
        return identity

    def _wait_for_token(self, authorization: str, is_bad: bool) -> bool:
        """Wait while bad tokens of the address delay the answer, and return whether they did.

        Raises ClientGone when the client hangs up.
        """
        throttle, address, has_waited = self.server.throttle, self.connection.address, False
        while (left_s := self.began + throttle.delay_s(address, authorization, int(is_bad)) - time.monotonic()) > 0:
            has_waited = True
            if self._wait_idle(left_s):
                raise ClientGone
        return has_waited

    def _note_bad_token(self) -> None:
        count, is_to_be_logged = self.server.throttle.note_bad(self.connection.address)
        if is_to_be_logged:
            log.warning("bad token from %s (%d in a row), request %s", self.handler.client_host, count,
                        self.request_id)

    def _note_expired(self, token: Token) -> None:
        """Log who still sends a token that has expired; that is nobody who guesses, so nobody is slowed down."""
        if is_logged(self.server.expired.add(token.name)):
            log.warning("the token of %s, which %s sends, expired at %s, request %s", token.name,
                        self.handler.client_host, utc_text(token.expires_at), self.request_id)

    def _require_role(self, identity: Identity, role: str) -> None:
        self.actor = Act(identity.actor, VIA_API, identity.token, self.handler.certificate_name,
                         self.handler.client_host, self.request_id)
        if role == OPERATOR and identity.role != OPERATOR:
            raise AppError(NOT_ALLOWED, f"{identity.actor} has the role {identity.role}: this needs {OPERATOR}")

    # -- waiting: the connection is idle meanwhile, so that it may be evicted ---------------

    def _wait_idle(self, within_s: float) -> bool:
        """Wait up to so many seconds; return whether the client hung up or the connection was evicted."""
        self.server.connections.set_idle(self.connection, owes_answer=True, since=self.began)
        has_gone = has_hung_up(self.connection.sock, within_s)
        return not self.server.connections.set_busy(self.connection) or has_gone

    def _is_over(self, within_s: float) -> bool:
        """Wait as _wait_idle() does; return True also when we stop, or the client is no longer authorized."""
        return self._wait_idle(within_s) or self.server.is_stopping or self.handler.is_distrusted() or (
            self.server.who(self.head, self.handler.certificate_name)[0] is None)

    def _read_body(self, route: Route) -> bytes:
        """Return the body; raise AppError 2002 or 4015, if possible before it is waited for, or 4008."""
        length, wire, connections = self.unread_bytes, self.wire, self.server.connections
        if not length:
            return b""
        if not route.body:
            raise AppError(MALFORMED, f"{route.method} {route.path} takes no body")
        content_type = self.head.headers.get("content-type", "").split(";")[0].strip().lower()
        if content_type != "application/json":
            raise AppError(NOT_JSON, "the body must be JSON: send Content-Type: application/json")
        if wire.buffered < length:
            connections.set_idle(self.connection, owes_answer=True)
            if self.head.headers.get("expect", "").lower() == "100-continue":
                with contextlib.suppress(OSError):
                    wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.unread_bytes = 0  # an error in the middle of the body ends the connection
        raw = wire.take(length, time.monotonic() + BODY_S)
        if not connections.set_busy(self.connection):
            raise ClientGone
        self.closes = self.head.is_last
        return raw

    def _keep_connection(self) -> None:
        """Keep the connection after a refusal where the body is here, or is short and its client authenticated."""
        is_short = (bool(self.actor) or self.connection.is_authenticated) and "expect" not in self.head.headers and (
            self.unread_bytes <= MAX_SKIPPED_BYTES)
        if self.unread_bytes and (is_short or self.unread_bytes <= self.wire.buffered):
            self.closes = self.head.is_last

    def _skip_body(self) -> bool:
        """Discard the body of a refused request; return whether all of it came within LINGER_S."""
        with contextlib.suppress(AppError):
            self.wire.take(self.unread_bytes, time.monotonic() + LINGER_S)
            return True
        return False

    @staticmethod
    def _query(text: str, route: Route) -> dict[str, str]:
        try:
            pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=20, errors="strict")
        except ValueError:
            raise AppError(MALFORMED, "the query can't be read") from None
        known_keys(dict(pairs), route.query)
        if len(dict(pairs)) != len(pairs):
            raise AppError(MALFORMED, "a parameter of the query is given twice")
        return dict(pairs)

    @staticmethod
    def _body(raw: bytes, route: Route) -> Mapping[str, Any]:
        if not raw:
            return {}
        body = read_json(raw, "the body", exact=route.body == "NewRelease")
        if not isinstance(body, dict):
            raise AppError(MALFORMED, "the body must be a JSON object")
        return body

    def _send(self, answer: HttpAnswer) -> None:
        import email.utils

        self.wire.send(encode_answer(answer, {
            "Server": "releasectl", "Date": email.utils.formatdate(usegmt=True), **answer.headers,
            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Request-Id": self.request_id,
            **({"Connection": "close"} if self.closes else {})}, has_body=self.head.method != "HEAD"))

    def _log(self, answer: HttpAnswer) -> None:
        """Count a request; log what a known client changes, or tries to change, and all else for debugging.

        What was changed is logged as the audit log has it, whatever LOG_LEVEL is.
        Of refusals of one client in a row only the 1st, 2nd, 4th, ... is logged.
        """
        path, method = self.route.path if self.route else OTHER, self.head.method
        self.server.api.counters.count("releasectl_api_requests_total", path,
                                       method if method in METHODS else OTHER, str(answer.status))
        level, in_a_row = logging.INFO if self.actor and method not in ("GET", "HEAD") else logging.DEBUG, ""
        if level == logging.INFO and answer.status >= http.HTTPStatus.BAD_REQUEST:
            count = self.server.refused.add(str(self.actor), str(answer.status))
            level = level if is_logged(count) else logging.DEBUG
            in_a_row = f", the {count}. in a row" if count > 1 else ""
        release = self.ids[0] if path.startswith("/api/v1/releases/{id}") else None
        rows = self.actor.rows if self.actor else []
        (trail if rows else log).log(
            level, "%s %s: %d, by %s at %s, request %s%s%s", method, self._path, answer.status, self.actor or "-",
            self.handler.client_host, self.request_id, in_a_row, "".join(f": {row}" for row in rows),
            extra=about(release=release, actor=str(self.actor or ""), request_id=self.request_id))


class ApiServer(socketserver.TCPServer):
    """The listener: it admits or rejects connections; threads of a bounded pool do everything else, TLS too."""

    request_queue_size = 1024
    allow_reuse_address = True

    def __init__(self, settings: Settings, api: Api):
        """Bind the address; raise ConfigError when that fails, or it is open to others without tokens or TLS."""
        import concurrent.futures

        host, port = settings.http_addr
        self.api = api
        self.max_body_bytes = settings.http_max_body_bytes
        self.throttle, self.refused, self.expired = AuthThrottle(), Streaks(), Streaks()
        self.is_stopping = False
        self.tokens = Tokens(settings.api_tokens_file) if settings.api_tokens_file else None
        if self.tokens:
            self.tokens.load()
        self.client_ca = settings.http_client_ca
        self.tls = TlsFiles(server_context, settings.http_cert, settings.http_key,
                            settings.http_client_ca) if settings.http_cert else None
        if self.tls:
            self.tls.context()
        self._overload_response = b"" if self.tls else _overload_response()
        self.connections = ConnectionLimiter(settings.http_max_connections, settings.http_max_connections_per_address,
                                             self._overload_response)
        self._workers = concurrent.futures.ThreadPoolExecutor(settings.http_max_connections, "api")
        self._rejected: collections.deque[tuple[float, socket.socket]] = collections.deque()
        try:
            self.address_family, address = listening_address(settings)
            for warning in filter(None, (exposure_of(settings, address), anonymity_of(settings))):
                log.warning("%s", warning)
            super().__init__((address, port), socketserver.BaseRequestHandler)  # unused: see process_request()
        except OSError as error:
            raise ConfigError(f"HTTP_ADDR {host}:{port} can't be listened on: {os_reason(error)}") from None

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    def check_files(self) -> None:
        """Log what is wrong with the files of tokens and TLS by now; each request does it too."""
        if self.tls:
            self.tls.context()
        if self.tokens:
            with contextlib.suppress(ConfigError):
                self.tokens.check()

    # -- in the accept thread: nothing here waits ------------------------------------------

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.05)  # no file descriptor is left: the listener stays ready, and the loop would spin
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.exception("connection of %s could not be accepted", client_address[0])

    def process_request(self, request: Any, client_address: Any) -> None:
        connection = self.connections.admit(request, client_address[0])
        if connection is None:
            self._reject(request)
            return
        try:
            self._workers.submit(self._serve, connection, client_address[0])
        except RuntimeError as error:  # the system has no more threads
            log.error("no thread for a connection: %s", error)
            self.connections.close(connection)

    def _reject(self, sock: socket.socket) -> None:
        """Answer 503 at once; over TLS, which would need a handshake first, only close."""
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(self._overload_response)
            sock.shutdown(socket.SHUT_WR)
        self._rejected.append((time.monotonic() + LINGER_S, sock))

    def service_actions(self) -> None:
        """Close rejected connections once their clients had time to read the answer."""
        while self._rejected and (len(self._rejected) > MAX_REJECTED
                                  or self._rejected[0][0] < time.monotonic()):
            sock = self._rejected.popleft()[1]
            with contextlib.suppress(OSError):
                sock.recv(65536)  # unread bytes would turn the close into a reset
            close_quietly(sock)

    # -- in a connection's thread ------------------------------------------------------------

    def _serve(self, connection: Connection, client_host: str) -> None:
        try:
            ApiHandler(self, connection, client_host).serve()
        except (OSError, ConfigError) as error:
            log.debug("%s: connection ended: %s", client_host, one_line(error))
        except Exception:  # the edge of a connection
            log.exception("connection of %s failed", client_host)
        finally:
            self.connections.set_idle(connection, since=0.0)  # it was answered: it is the first to be evicted
            lingering_close(connection.sock)
            self.connections.close(connection)

    def who(self, head: Head, certificate_name: str) -> tuple[Identity, None] | tuple[None, AppError]:
        """Return who asks, or why that is not known; not raised, as some routes need no token.

        Without a token file everybody on this host is an operator. A client certificate names the
        actor; the role is the token's.
        """
        try:
            if not self.tokens:
                refuse_strangers(head)
                return Identity(f"cert:{certificate_name}" if certificate_name else "api", OPERATOR), None
            token = self.tokens.who(head.headers.get("authorization"))
        except AppError as error:
            return None, error
        return Identity(f"cert:{certificate_name}" if certificate_name else token.name, token.role, token.name,
                        token.targets), None

    def server_close(self) -> None:
        """Stop listening, let requests under way be answered, and end all connections."""
        super().server_close()
        self.is_stopping = True
        self.connections.end_all(STOP_GRACE_S)
        self._workers.shutdown()
        while self._rejected:
            close_quietly(self._rejected.popleft()[1])


def _overload_response() -> bytes:
    """Return the whole answer for a connection that gets no thread."""
    answer = refusal_of(AppError(NO_FREE_CONNECTION, "every connection is taken: try again in a moment",
                                 retry_after_s=1))
    return encode_answer(answer, {**answer.headers, "Connection": "close"})


def listening_address(settings: Settings) -> tuple[socket.AddressFamily, str]:
    """Return the address that HTTP_ADDR means; raise OSError when it means none."""
    host, port = settings.http_addr
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError:  # an empty label, or one of more than 63 characters
        raise OSError("that is no host name") from None
    return family, str(target[0])


# endregion


# region Check and why
# ======================================================================================
# Check and why: what is wrong with this installation, and what would mend it.
# Uses: Vocabulary, Helpers, Settings, Certificates, Model, Plan, Status texts,
#   Decision, Why, Verdict, Engines, Database, Audit, Drift, Overview, Dialects,
#   Agents, Notifier, Executor, Access, API, Server.
# ======================================================================================

class Ping(NamedTuple):
    """What one agent answered to a ping."""
    node: Node
    is_ok: bool
    error_kind: str
    text: str


def pings_json(pings: Iterable[Ping]) -> dict[str, Any]:
    """Return what agents answered."""
    return {"items": [{"name": p.node.name, "ok": p.is_ok, "errorKind": p.error_kind, "message": p.text}
                      for p in pings]}


def ping_nodes(settings: Settings, nodes: Sequence[Node], key_may_be_open: bool = False,
               retries: int = 0) -> list[Ping]:
    """Ask agents in parallel whether they answer, those that don't again (retries times).

    Raise ConfigError without certificates, or with an open key.
    """
    import concurrent.futures

    agents = AgentClient(settings)
    agents.prepare(key_may_be_open)

    def ping(node: Node) -> Ping:
        address = Address(node.main_ip, node.agent_port, node.agent_protocol)
        outcome = agents.ping(address)
        for errors in range(1, retries + 1):
            if outcome.error_kind:
                time.sleep(backoff_s(errors, node.id))
                outcome = agents.ping(address)
        return Ping(node, not outcome.error_kind, outcome.error_kind, one_line(outcome.message))

    with concurrent.futures.ThreadPoolExecutor(settings.agent_concurrency) as pool:
        pings = list(pool.map(ping, nodes))
    agents.close()
    return pings


class Finding(NamedTuple):
    """One result of check: what it is about, an exit code, 0 when all is well, and a sentence."""
    subject: str
    exit_code: int
    text: str


def _meet(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Return both sides after a handshake in memory; raise ssl.SSLCertVerificationError where one refuses the other."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return sides


def control_certificate(settings: Settings) -> Mapping[str, Any]:
    """Return our certificate as an agent sees it; raise ConfigError when the CA did not sign it."""
    cert, key, ca = settings.control_cert, settings.control_key, settings.control_ca
    ours = client_context(cert, key, ca)
    ours.check_hostname = False
    ours.verify_mode = ssl.CERT_NONE
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(cert, key, password=no_passphrase)
    theirs.load_verify_locations(ca)
    theirs.verify_mode = ssl.CERT_REQUIRED
    try:
        return dict(_meet(ours, theirs)[1].getpeercert() or {})
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"CONTROL_CERT {cert}: {error.verify_message}; agents will refuse it") from None


def api_certificate(settings: Settings) -> Mapping[str, Any]:
    """Return the API's certificate as a client sees it that trusts only this one; raise ConfigError."""
    ours = server_context(settings.http_cert, settings.http_key, "")
    ours.verify_mode = ssl.CERT_NONE
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname = False
    theirs.load_verify_locations(settings.http_cert)
    theirs.verify_flags |= 0x80000  # ssl.VERIFY_X509_PARTIAL_CHAIN, which Python 3.9 does not name
    try:
        return dict(_meet(theirs, ours)[0].getpeercert() or {})
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"HTTP_CERT {settings.http_cert}: {error.verify_message}; clients will refuse it") from None


def _days_until(moment: float) -> float:
    return (moment - time.time()) / 86400


def _finding(name: str, check: Callable[[], str]) -> Finding:
    """Return the text of a check as a finding, or the ConfigError that it raises."""
    try:
        return Finding(name, EXIT_DONE, check())
    except ConfigError as error:
        return Finding(name, EXIT_USAGE, error.message)


def _certificate_text(path: str, certificate: Mapping[str, Any]) -> str:
    expires = certificate_end(certificate)
    days = _days_until(expires)
    renew = ": renew it now" if days < RENEW_DAYS else ""
    return f"{path} is good until {utc_text(expires)}, {count_of(round(days), 'day')}{renew}"


def _private_text(name: str, path: str) -> str:
    require_private(name, path)
    return f"{path} is closed to others"


def check_crl(name: str, path: str) -> Iterator[Finding]:
    """Yield until when the CRLs beside a CA are good, and how many CAs have none; nothing without CRLs."""
    try:
        pem = Path(path).read_text(encoding="latin-1")
        count, ends, bare = len(pem_blocks(pem, "X509 CRL")), crl_ends(pem), cas_without_crl(pem)
    except (OSError, ValueError) as error:
        yield Finding(f"{name} CRL", EXIT_USAGE, f"{path} can't be read: {one_line(error, 100)}")
        return
    if not count:
        return
    text, days = f"{path} holds {count_of(count, 'CRL')}", _days_until(min(ends, default=float("inf")))
    if days < 0:
        yield Finding(f"{name} CRL", EXIT_USAGE, f"{text}, expired since {utc_text(min(ends))}: every certificate of "
                                                 "its CA is refused; replace it by a newer one")
        return
    if ends:
        text += (f", good until {utc_text(min(ends))}, {count_of(round(days), 'day')}"
                 + (": fetch a newer one now" if days < RENEW_CRL_DAYS else ""))
    if bare:
        text += f"; {bare} of its CAs have none: certificates that these signed are refused"
    yield Finding(f"{name} CRL", EXIT_DONE, text)


def _is_reachable(path: str, mode: int) -> bool:
    """Return whether a file has one of the mode's bits, and everybody may pass all its folders."""
    found = os.path.realpath(path)
    if not os.stat(found).st_mode & mode:
        return False
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in Path(found).parents)


def check_sources(given: Mapping[str, Given]) -> Finding:
    """Name each source of settings with what came from it; all values can be used, else no command runs."""
    parts = [f"from {source}: " + ", ".join(name for name, one in given.items() if one.source == source)
             for source in dict.fromkeys(one.source for one in given.values())]
    return Finding("settings", EXIT_DONE, "; ".join(["valid", *parts, "all others have their defaults"]))


def check_config(path: str) -> Iterator[Finding]:
    """Check who may read and write the settings file: its writers control what is sent to nodes."""
    if not os.path.isfile(path):  # none, or /dev/null
        return
    given = dict(read_config_file(path))  # not what is in use, which may come from elsewhere
    url = given.get("DATABASE_URL", "")
    secrets_in = [what for what, is_there in (("the database's password is", safe_url(url) != url),
                                              ("NOTIFY_URL is", given.get("NOTIFY_URL"))) if is_there]
    if os.stat(path).st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        yield Finding("--config", EXIT_USAGE, f"{path} is open to others, who may write it: chmod o-rwx,g-w it")
    elif secrets_in and _is_reachable(path, stat.S_IROTH):
        yield Finding("--config", EXIT_USAGE, f"{path} is open to others, and {' and '.join(secrets_in)} "
                                              "in it: chmod o-rwx it (its group may read it)")
    else:
        yield Finding("--config", EXIT_DONE, f"{path} is closed to others" if secrets_in else
                      f"{path} can be written by its owner alone")


# Less room than this for an SQLite database is told of.
LOW_DISK_BYTES = 512 * 2**20


def check_database_file(engine: SqliteEngine | PostgresEngine) -> Iterator[Finding]:
    """Check the room for an SQLite database, and who else may read or write its files, which hold the payloads."""
    if not isinstance(engine, SqliteEngine):
        return
    with contextlib.suppress(OSError):
        folder = os.path.dirname(os.path.abspath(engine.path))
        free = shutil.disk_usage(folder).free
        if free < LOW_DISK_BYTES:
            yield Finding("disk", EXIT_NOT_SUCCESS, f"{free // 2**20} MiB left in {folder}: without room nothing is "
                          "dispatched; make some, or `prune` and `backup` elsewhere")
    for path in (engine.path, engine.path + "-wal", engine.path + "-shm"):
        with contextlib.suppress(OSError):  # a file that does not exist; check_database() reports the database
            if _is_reachable(path, stat.S_IRWXO):
                yield Finding("DATABASE_URL", EXIT_USAGE, f"{path} is open to others: chmod o-rwx it")


def check_agents(settings: Settings) -> Iterator[Finding]:
    """Check what mutual TLS with the agents needs."""
    if not settings.mtls_enabled:
        yield Finding("MTLS_ENABLED", EXIT_DONE, "0: agents are called by plain HTTP, for a laboratory only")
        return
    cert, key, ca = settings.control_cert, settings.control_key, settings.control_ca
    for name, path in (("CONTROL_CERT", cert), ("CONTROL_KEY", key), ("CONTROL_CA", ca)):
        if not path:
            yield Finding(name, EXIT_USAGE, "not set: agents can't be called without it")
    if cert and key and ca:
        yield _finding("CONTROL_CERT", lambda: _certificate_text(cert, control_certificate(settings)))
    if ca:
        yield from check_crl("CONTROL_CA", ca)
    if key:
        yield _finding("CONTROL_KEY", lambda: _private_text("CONTROL_KEY", key))


def _tokens_text(path: str) -> str:
    count = len(Tokens(path).load())
    if not count:
        raise ConfigError(f"{path} holds no token, so nobody can use the API: `token add NAME --role operator`")
    return count_of(count, "token")


def check_api(settings: Settings) -> Iterator[Finding]:
    """Check what the API needs."""
    tokens, cert = settings.api_tokens_file, settings.http_cert
    yield _finding("API_TOKENS_FILE", lambda: _tokens_text(tokens) if tokens else
                   "not set: the API listens on loopback only, for everybody on this host")
    if anonymity_of(settings):
        yield Finding("APPROVALS", EXIT_NOT_SUCCESS, anonymity_of(settings))
    with contextlib.suppress(ConfigError):  # told above
        yield from check_tokens(Tokens(tokens).load() if tokens else ())
    try:
        exposure = _finding("HTTP_ADDR", lambda: exposure_of(settings, listening_address(settings)[1]))
        if exposure.text:
            yield exposure
    except OSError as error:
        yield Finding("HTTP_ADDR", EXIT_USAGE, "{}:{} can't be listened on: {}".format(*settings.http_addr,
                                                                                       os_reason(error)))
    if settings.http_client_ca:
        yield from check_crl("HTTP_CLIENT_CA", settings.http_client_ca)
    if cert:
        yield _finding("HTTP_CERT", lambda: _certificate_text(cert, api_certificate(settings)))
        yield _finding("HTTP_KEY", lambda: _private_text("HTTP_KEY", settings.http_key))


def check_tokens(tokens: Iterable[Token]) -> Iterator[Finding]:
    """Yield which tokens have expired, or will soon."""
    for token in tokens:
        days = (token.expires_at - time.time()) / 86400
        if days <= 0:
            yield Finding(f"token {token.name}", EXIT_NOT_SUCCESS,
                          f"expired since {utc_text(token.expires_at)}, and is refused: delete its line; where it is "
                          "still needed, `token add` makes a new one")
        elif days < RENEW_DAYS:
            yield Finding(f"token {token.name}", EXIT_DONE,
                          f"is good until {utc_text(token.expires_at)}, {count_of(round(days), 'day')}: make a new one")


def token_figures(path: str) -> dict[tuple[str, ...], float]:
    """Return when the tokens of a file expire, for /metrics: of several with one name the last; "": there is none."""
    figures: dict[tuple[str, ...], float] = {}
    with contextlib.suppress(ConfigError):  # left to check
        for token in Tokens(path).load() if path else ():
            key = "releasectl_token_expiry_timestamp_seconds", token.name
            figures[key] = max(token.expires_at, figures.get(key, token.expires_at))
    return {key: ends for key, ends in figures.items() if ends < float("inf")}


def process_json(settings: Settings, executor: Executor) -> dict[str, Any]:
    """Return the part of /api/v1/health that only this process knows."""
    certificates = certificates_json(settings)
    if settings.release_executor_enabled and settings.mtls_enabled and not settings.control_cert:
        certificates.append({"name": "CONTROL_CERT", "notAfter": None, "daysLeft": None,
                             "message": "it is not set: agents can't be called without it"})
    return {"certificates": certificates, "executor": {
        "enabled": settings.release_executor_enabled, "owner": executor.owner,
        "lastLookAt": utc_text(executor.scanned_at) if executor.scanned_at else None}}


def certificates_json(settings: Settings) -> list[dict[str, Any]]:
    """Return until when the certificates and CRLs that are configured are good."""
    certificates = []
    if settings.mtls_enabled and settings.control_cert:
        certificates.append(certificate_json("CONTROL_CERT", lambda: control_certificate(settings)))
    if settings.http_cert:
        certificates.append(certificate_json("HTTP_CERT", lambda: api_certificate(settings)))
    for name, path in (("CONTROL_CA", settings.control_ca if settings.mtls_enabled else ""),
                       ("HTTP_CLIENT_CA", settings.http_client_ca)):
        certificates += crl_json(name, path) if path else []
    return certificates


def certificate_json(name: str, load: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return until when a certificate is good; not what is wrong with it, as that names files of the host."""
    try:
        expires = certificate_end(load())
    except ConfigError:
        return {"name": name, "notAfter": None, "daysLeft": None, "message": "run `releasectl check` to see why"}
    return {"name": name, "notAfter": utc_text(expires), "daysLeft": round(_days_until(expires), 2), "message": ""}


def crl_json(name: str, path: str) -> list[dict[str, Any]]:
    """Return until when the CRLs beside a CA are good, in the form of a certificate; nothing where there is none."""
    found = {"name": f"{name} CRL", "notAfter": None, "daysLeft": None, "message": "run `releasectl check` to see why"}
    try:
        ends = crl_ends(Path(path).read_text(encoding="latin-1"))
    except (OSError, ValueError):
        return [found]
    if not ends:
        return []
    if min(ends) <= time.time():
        return [{**found, "message": f"expired since {utc_text(min(ends))}: every certificate of its CA is refused"}]
    return [{**found, "notAfter": utc_text(min(ends)), "daysLeft": round(_days_until(min(ends)), 2), "message": ""}]


def certificate_figures(settings: Settings) -> dict[tuple[str, ...], float]:
    """Return when certificates, CRLs and tokens of ours expire, for /metrics; what can't be read is left to check."""
    figures: dict[tuple[str, ...], float] = {}
    agents = settings.mtls_enabled
    for name, path in (("CONTROL_CERT", settings.control_cert if agents else ""),
                       ("CONTROL_CA", settings.control_ca if agents else ""), ("HTTP_CERT", settings.http_cert),
                       ("HTTP_CLIENT_CA", settings.http_client_ca)):
        with contextlib.suppress(OSError, ValueError):
            pem = Path(path).read_text(encoding="latin-1") if path else ""
            for label, ends in ((name, [until for _, until in certificate_times(pem)]), (f"{name}_CRL", crl_ends(pem))):
                if ends:
                    figures["releasectl_certificate_expiry_timestamp_seconds", label] = min(ends)
    return {**figures, **token_figures(settings.api_tokens_file)}


# How much of audit_log `check` verifies: the newest rows, and the events of the newest ended releases.
CHECKED_AUDIT_ROWS, CHECKED_RELEASES = 10_000, 20


def check_audit(store: Store) -> Finding:
    """Verify the newest part of audit_log."""
    report = store.audit.verify(None, CHECKED_AUDIT_ROWS, CHECKED_RELEASES)
    if report.faults:
        return Finding("audit log", EXIT_NOT_SUCCESS, f"{report.faults[0]}: see `audit --verify` and the runbook")
    return Finding("audit log", EXIT_DONE, audit_line(report))


def audit_line(report: AuditReport) -> str:
    """Return how much of audit_log was verified, and its head."""
    head = "empty" if not report.head[0] else f"head {report.head[0]}:{report.head[1]}"
    return (f"{report.rows} of {count_of(report.of_rows, 'row')} and the events of {report.releases} of "
            f"{count_of(report.of_releases, 'ended release')} verified; {head}")


def check_drift(listed: Sequence[ListedNode]) -> Iterator[Finding]:
    """Check whether the enabled, online nodes run what they should; nothing where there are none."""
    counts = collections.Counter(one.level.drift for one in listed)
    wrong = [f"{counts[drift]} {drift}" for drift in DRIFTS if drift != LEVEL and counts[drift]]
    if wrong:
        first = min((one for one in listed if one.level.drift != LEVEL), key=lambda one: one.node.id)
        yield Finding("drift", EXIT_NOT_SUCCESS,
                      f"of {count_of_nodes(len(listed))}: {', '.join(wrong)}, see `node list --sort drift`; "
                      f"{first.node.name} is {drift_text(first.level)}")
    elif listed:
        yield Finding("drift", EXIT_DONE, f"{count_of_nodes(len(listed))}: each runs what it should")


# Open releases that `check` asks why they don't go on.
MAX_CHECKED_OPEN = 10_000


def check_work(settings: Settings, store: Store) -> Iterator[Finding]:
    """Check what keeps the open releases from going on, and what is frozen."""
    stops: dict[str, Step] = {}
    for freeze in store.releases.freezes().on:
        yield Finding(freeze.subject, EXIT_NOT_SUCCESS,
                      f"{freeze.line(freeze.at)}; " + (f"{freeze.lifted_by}: " if freeze.lifted_by else "") +
                      f"`{freeze.mend.partition(' ')[2]}`" + ("" if freeze.lifted_by else " lifts it"))
    for release, _ in store.releases.open(MAX_CHECKED_OPEN):
        for step in store.claims.why(release.id, settings.node_deadline_sec).steps:
            if step.state == STOPS and step.name != "freeze":
                stops.setdefault("executor" if step.name == "executor" else f"release {release.id}", step)
    for subject, step in stops.items():
        yield Finding(subject, EXIT_NOT_SUCCESS, f"{step.text}; mend: {step.mend}")


def check_outbox(store: Store) -> Iterator[Finding]:
    """Check whether notifications get out."""
    waiting = store.outbox.waiting()
    if waiting.is_late:
        yield Finding("notifications", EXIT_NOT_SUCCESS, f"{waiting.text}; the oldest is of {waiting.oldest_at}")


def check_notifications(settings: Settings, is_test: bool) -> Iterator[Finding]:
    """Check the receivers of notifications; with is_test by a message to each."""
    receivers = receivers_of(settings)
    if settings.notify_command and not is_test:
        name = os.path.basename(settings.notify_command[0])
        is_there = shutil.which(settings.notify_command[0])
        yield Finding("NOTIFY_COMMAND", EXIT_DONE if is_there else EXIT_USAGE,
                      f"{name} can be run" if is_there else f"{name} is no program that this user can run")
    if settings.notify_url and not is_test:
        yield _finding("NOTIFY_URL", lambda: check_url(settings))
    if is_test and not receivers:
        yield Finding("notifications", EXIT_USAGE, "there is no receiver: set NOTIFY_COMMAND or NOTIFY_URL")
    for name, receive in receivers.items() if is_test else ():
        host, began = socket.gethostname(), time.monotonic()
        message = message_of("test", utc_text(time.time()), f"a test from {host}: notifications get here", host,
                             settings.public_url)
        try:
            receive(message["id"], to_json(message).encode(), lambda: began + TRY_S - time.monotonic())  # noqa: B023
            yield Finding(name, EXIT_DONE, f"took a test message in {(time.monotonic() - began) * 1000:.0f} ms")
        except NotDelivered as error:
            yield Finding(name, EXIT_UNAVAILABLE, f"{error}{f': {error.said}' if error.said else ''}")


def check_nodes(settings: Settings, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Ask the agents of nodes; those that answer are only counted."""
    pings = ping_nodes(settings, nodes, key_may_be_open=True) if nodes else []  # reported by check_agents()
    for ping in pings:
        if not ping.is_ok:
            yield Finding(f"node {ping.node.name}", EXIT_UNAVAILABLE, ping.text)
    if pings:
        reachable = sum(ping.is_ok for ping in pings)
        yield Finding("agents", EXIT_DONE if reachable else EXIT_UNAVAILABLE,
                      f"{reachable} of {count_of_nodes(len(pings))} reachable")


def check_database(settings: Settings, store: Store) -> Iterator[Finding]:
    """Check the database, and ask the agents of its enabled, online nodes."""
    engine = store.database.engine
    tls = f"; {engine.tls_text()}" if isinstance(engine, PostgresEngine) else ""
    try:
        store.database.require_schema()
        store.state.check_write()
        yield Finding("DATABASE_URL", EXIT_DONE, f"{store.database}: schema {len(schema_steps())}, takes writes{tls}")
        yield from check_database_file(store.database.engine)
        yield check_audit(store)
        for sentence in store.claims.times_ahead():
            yield Finding("clock", EXIT_UNAVAILABLE, f"{sentence}, {CLOCK_WAS_AHEAD}")
        listed = [one for one in store.fleet.page(size=0).items if one.node.gets_releases]
        nodes = [one.node for one in listed]
        try:
            refuse_twins(nodes)
        except AppError as error:
            yield Finding("nodes", EXIT_USAGE, error.message)
        yield from check_work(settings, store)
        yield from check_outbox(store)
        yield from check_drift(listed)
        yield from check_nodes(settings, nodes)
    except DatabaseError as error:
        yield Finding("DATABASE_URL", EXIT_UNAVAILABLE, error.message)
    except ConfigError:
        yield Finding("nodes", EXIT_USAGE, "not asked: agents don't answer without good certificates")


# endregion


# region Terminal
# ======================================================================================
# Terminal: how text is shown to a person: columns of characters, tables, colours, times.
# Uses: Vocabulary, Helpers, Status texts, Languages.
# ======================================================================================

def columns_of(text: str) -> int:
    """Return the columns of a printable text in a terminal: two for a Chinese letter, none for a combining accent."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.category(char) in ("Mn", "Me") or "\u1160" <= char <= "\u11ff" else
               2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def start_of(text: str, columns: int) -> str:
    """Return the start of a printable text that fits into so many columns."""
    if columns_of(text) <= columns:
        return text
    ends = itertools.accumulate(columns_of(char) for char in text)
    return text[:sum(1 for end in ends if end <= columns)]


def cut_to(text: str, columns: int) -> str:
    """Return a printable text in so many columns: what does not fit is cut off, and dots say so."""
    return text if columns_of(text) <= columns else start_of(text, max(columns - 3, 0)) + "..."[:columns]


def wrapped(text: str, columns: int) -> list[str]:
    """Return a printable text as lines of so many columns: broken at spaces, a longer word anywhere; 0: one line."""
    if not columns or columns_of(text) <= columns:
        return [text]
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if columns_of(longer) <= columns:
            line = longer
            continue
        if line:
            lines.append(line)
        while columns_of(word) > columns:
            part = start_of(word, columns) or word[0]
            lines.append(part)
            word = word[len(part):]
        line = word
    return [*lines, line] if line else lines


def time_span(seconds: float) -> str:
    """Return '19 s', '6 min', '3 h 20 min' or '2 days'."""
    return f"{max(seconds, 0.0):.0f} s" if seconds < 90 else rough_time(seconds)


def rough_span(seconds: float) -> str:
    """Return '19 s', '6 min', '5 h' or '2 days', for a column of a table."""
    for size, unit, most in ((1, "s", 90), (60, "min", 5400), (3600, "h", 172800)):
        if seconds < most:
            return f"{max(seconds, 0.0) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


# A time in a sentence that we make, and whether it is said how far off that is. It stands behind words of ours: a
# reason, a payload or an agent's message may hold times too, and is shown as it was given.
_TIME_IN_TEXT = re.compile(
    r"\b(soaking after batch \d+ until|scheduled for|frozen until|good until|expired since|"
    r"(?:until|it starts at|deadline)(?= \S+Z, in \d)) "
    r"(?:(\d{4}-\d\d-\d\d)T(\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?)|(\d\d:\d\d:\d\d))Z(?!\w)(, in |, (?=\d+ days?\b))?")

# Begins what a sentence of ours quotes up to its end: a reason, or what an agent said.
_BEFORE_QUOTED = re.compile(r"(?:frozen|(?<!is )stopped|finished with|failed|trying again)\b.*?: ", re.DOTALL)

# The colours of words that stand alone in a cell of a table, or tell the status of a release; as in watch.
_COLOURS: Mapping[str, str] = {
    SUCCESS: "32", FAILED: "31", RUNNING: "36", SKIPPED: "90", PARTIAL: "33", PAUSED: "33", CANCELLING: "33",
    CANCELLED: "90", "ok": "32", "WRONG": "31", "error": "31",
    "warning": "33", "stops": "31", "waits": "33"}
COLOURS = {**{CHINESE_WORDS[word]: colour for word, colour in _COLOURS.items() if word in CHINESE_WORDS}, **_COLOURS}
AUTO, ALWAYS, NEVER = COLOUR_MODES = ("auto", "always", "never")
# Tables have all their columns in a terminal of so many.
WIDE = 110


class Display(NamedTuple):
    """How text is shown to a person."""
    # Columns of the terminal; 0: as many as it takes, as in a file or a pipe.
    width: int = 0
    lines: int = 24
    is_terminal: bool = False
    has_colours: bool = False
    # Times in UTC, not in the zone of the process.
    is_utc: bool = False
    # said() and word() are Chinese.
    is_chinese: bool = False

    @classmethod
    def of(cls, stream: TextIO, colour: str = AUTO, is_utc: bool = False) -> Display:
        """Return what a stream can show now; colour: one of COLOUR_MODES."""
        is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        has_colours = colour == ALWAYS or (colour == AUTO and is_terminal and not os.environ.get("NO_COLOR"))
        size = _size_of(stream) if stream.isatty() else os.terminal_size((0, 24))
        return cls(size.columns, size.lines, is_terminal, has_colours, is_utc, is_chinese(language_of(os.environ)))

    @property
    def is_narrow(self) -> bool:
        """Return whether tables leave out what matters less."""
        return 0 < self.width < WIDE

    def paint(self, text: str, colour: str) -> str:
        """Return a text in a colour of COLOURS."""
        return f"\x1b[{colour}m{text}\x1b[0m" if self.has_colours and colour else text

    def sentence(self, text: str) -> str:
        """Return a sentence that we made, with its times as people read them: 'until 14:21, in 19 s'."""
        now_s = time.time()

        def short(match: re.Match[str]) -> str:
            before, day, clock, bare, is_left = match.groups()
            if bare and self.is_utc:  # short and in UTC already
                return match[0]
            try:
                at_s = _next_to(bare, now_s) if bare else epoch_of(f"{day}T{clock}Z")
                left = f", in {time_span(at_s - now_s)}" if at_s - now_s >= 1 and not bare and not is_left else ""
                return f"{before} {self._clock(at_s, now_s, '%H:%M')}{is_left or left}"
            except (ValueError, OverflowError):  # written by hand: no such day, or one that no calendar has
                return match[0]
        quoted = _BEFORE_QUOTED.search(text)
        ours = quoted.end() if quoted else len(text)
        return with_options(_TIME_IN_TEXT.sub(short, text[:ours])) + text[ours:]

    def said(self, text: str) -> str:
        """Return a sentence() in the language of who reads it."""
        found = self.sentence(text)
        return in_chinese(found) if self.is_chinese else found

    def word(self, text: str) -> str:
        """Return a word of CHINESE_WORDS in the language of who reads it."""
        return CHINESE_WORDS.get(text, text) if self.is_chinese else text

    def text(self, text: str) -> str:
        """Return a text broken at spaces where a line is too long."""
        return "\n".join(part for line in text.split("\n")
                         for part in ([line] if "\x1b" in line else wrapped(line, self.width)))

    def moment(self, text: str | None) -> str:
        """Return a stored time for a table: '14:21:40', of another day '2026-11-27 14:21'; "" for none."""
        try:
            return self._clock(epoch_of(text), time.time(), "%H:%M:%S") if text else ""
        except (ValueError, OverflowError):  # written by hand
            return text or ""

    def _clock(self, at_s: float, now_s: float, today: str) -> str:
        zone = datetime.timezone.utc if self.is_utc else None
        at, now = (datetime.datetime.fromtimestamp(s, zone) for s in (at_s, now_s))
        return at.strftime(today if at.date() == now.date() else "%Y-%m-%d %H:%M") + ("Z" if self.is_utc else "")

    def table(self, rows: Sequence[Sequence[object]], head: Sequence[str], cuts: bool = False,
              before: list[int] | None = None) -> str:
        """Return rows as text in columns that fit the terminal, "" when there are none; columns without a word go.

        What is too long goes on in the next line, or is cut off where cuts says so, but for the names of nodes. Where
        not even that fits, each row is a block of lines. before: a list that this fills with the widths, so that a
        later call goes on with the same table.
        """
        cells = [[self._cell(cell, name) for cell, name in zip(row, head)] for row in rows]
        if not cells:
            return ""
        if before is None:
            used = [any(column) for column in zip(*cells)]
            head, *cells = [list(itertools.compress(row, used)) for row in (head, *cells)]
        widths = [max(map(columns_of, column)) for column in zip(head, *cells)]
        lines = []
        if before:
            widths = list(map(max, widths, before))
        if not _shrink(widths, head, self.width):
            return "\n\n".join("\n".join(self._block(row, head)) for row in cells)
        if not before:
            lines.append(self._line([name.upper() for name in head], widths))
        if before is not None:
            before[:] = widths
        for row in cells:
            parts = [[cut_to(cell, width)] if cuts and name not in _NAMES else wrapped(cell, width)
                     for cell, width, name in zip(row, widths, head)]
            lines += [self._line(line, widths) for line in itertools.zip_longest(*parts, fillvalue="")]
        return "\n".join(lines)

    def _cell(self, value: object, name: str) -> str:
        text = one_line(value, MAX_DETAIL_BYTES) if value is not None else ""
        return self.moment(text) if name in _TIMES else text

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = [(cell, " " * (width - columns_of(cell))) for cell, width in zip(cells, widths)]
        return "  ".join(self.paint(cell, COLOURS.get(cell, "")) + space for cell, space in padded).rstrip()

    def _block(self, row: Sequence[str], head: Sequence[str]) -> list[str]:
        """Return a row as lines of name and value."""
        margin = max(map(len, head)) + 2
        if self.width - margin < MIN_COLUMN:  # each name is a line of its own
            return [line for name, cell in zip(head, row) if cell
                    for line in (*wrapped(name.upper(), self.width), *wrapped(cell, self.width))]
        return [f"{'' if number else name.upper():<{margin}}{self.paint(line, COLOURS.get(line, ''))}"
                for name, cell in zip(head, row) if cell
                for number, line in enumerate(wrapped(cell, self.width - margin))]


# The columns of tables that hold stored times.
_TIMES = frozenset(("at", "since", "started", "finished", "ended"))
# A column of a table is not made narrower than this; the names of nodes only where all others are as narrow as can be,
# and not as narrow.
MIN_COLUMN, MIN_NAME, _NAMES = 12, 24, frozenset(("name", "node"))


def _shrink(widths: list[int], head: Sequence[str], width: int) -> bool:
    """Make the widest columns of a table narrower until it fits; return whether it does. width: 0 for no limit."""
    over = sum(widths) + 2 * (len(widths) - 1) - width if width else 0
    for shrinks_names in (False, True):
        least = [min(wide, max(MIN_COLUMN, columns_of(name))) if name not in _NAMES else
                 min(wide, MIN_NAME) if shrinks_names else wide for wide, name in zip(widths, head)]
        while over > 0 and widths != least:
            _, place = max((wide, i) for i, wide in enumerate(widths) if wide > least[i])
            widths[place] -= 1
            over -= 1
    return over <= 0


def reader_leaves(stream: TextIO, within_s: float) -> bool:
    """Return whether nobody takes what is written to a stream; wait for that for a while."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors and hang-ups alone
        return bool(poll.poll(within_s * 1000)) or getattr(stream, "error", None) is not None
    except (OSError, ValueError):  # the stream has no descriptor
        time.sleep(within_s)
        return False


def _next_to(clock: str, now_s: float) -> float:
    """Return the time of day in UTC, HH:MM:SS, that is nearest to now."""
    hours, minutes, seconds = map(int, clock.split(":"))
    since_s = (hours * 3600 + minutes * 60 + seconds - now_s) % 86400
    return now_s + (since_s if since_s < 43200 else since_s - 86400)


def _size_of(stream: TextIO) -> os.terminal_size:
    """Return the size of a stream's terminal; standard output may be another."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found = os.get_terminal_size(stream.fileno())
        if found.columns > 0 and found.lines > 0:
            return found
    return shutil.get_terminal_size((100, 24))


# endregion


# region Views
# ======================================================================================
# Views: a release as a person sees it: its head, a bar for each batch, its nodes, its
#   history; and the screen of watch.
# Uses: Vocabulary, Helpers, Model, Freezes, Plan, Failures, Status texts, Audit,
#   Nodes, Releases, Check and why, Terminal.
# ======================================================================================

# Of each status of a node: its mark in a bar.
MARKS = ((SUCCESS, "#"), (FAILED, "x"), (RUNNING, ">"), (SKIPPED, "-"), (PENDING, "."))
# What is shown of a release at most: batches as bars, causes of failures, its nodes that are not well.
MAX_BARS, MAX_CAUSES, MAX_ILL = 12, 8, 20


def release_line(release: Release) -> str:
    """Return a release in one line for a terminal; its row may have been written by hand."""
    status, reason = release.status, release.status_reason
    text = reason if reason.startswith(status) else f"{status}, {reason}" if reason else status
    return one_line(f"{release}: {text}", 2 * MAX_MESSAGE_CHARS)


def silence_text(pings: Sequence[Ping], display: Display) -> str:
    """Return which agents did not answer, and how many of each kind."""
    silent = [ping for ping in pings if not ping.is_ok]
    count = f"{len(pings) - len(silent)} of {count_of(len(pings), 'agent')} answered"
    rows = [(ping.node.name, ping.error_kind, ping.text) for ping in silent]
    return "\n".join([display.table(rows, ("node", "state", "result")),
                      f"{count}: {kinds_text(ping.error_kind for ping in silent)}"]) if silent else count


def head_lines(release: Release, display: Display) -> list[str]:
    """Return release_line() in lines that fit, with the status in its colour."""
    line = display.sentence(release_line(release))
    first, *others = wrapped(line, max(display.width - 1, 0))
    return [first.replace(f": {release.status}", f": {display.paint(release.status, COLOURS.get(release.status, ''))}",
                          1), *others]


def time_taken(started_at: str | None, finished_at: str | None) -> str:
    """Return for how long something ran, or has been running; "" before it began."""
    if not started_at:
        return ""
    now_s = time.time()
    return time_span(epoch_or(finished_at, now_s) - epoch_or(started_at, now_s))


def times_line(release: Release, display: Display) -> str:
    """Return when a release was made, began and ended, and how long it took."""
    if not release.started_at:
        began = ""
    elif release.is_terminal:
        began = (f"ran {display.moment(release.started_at)} to {display.moment(release.finished_at)}, "
                 f"{time_taken(release.started_at, release.finished_at)}")
    else:
        began = f"started {display.moment(release.started_at)}, {time_taken(release.started_at, None)} ago"
    by = f" by {release.author}" if release.approval else ""
    how = {GIVEN: "approved", EMERGENCY: "let go without approval"}.get(release.approval)
    approved = f"{how} {display.moment(release.approved_at)} by {release.approved_by}" if how else ""
    return "; ".join(filter(None, (f"created {display.moment(release.created_at)}{by}", approved, began)))


def bar_lines(batches: Sequence[BatchProgress], at: int, display: Display, most: int = MAX_BARS) -> list[str]:
    """Return a bar for each batch, or for those around the current one where there are more than most."""
    width = max(display.width - 1, 1) if display.width else 80
    first = max(0, min((at or len(batches)) - most // 2, len(batches) - most))
    shown = batches[first:first + most]
    more = [cut_to(f"({len(batches)} batches in all)", width)] if len(batches) > len(shown) else []
    return [*(_bar_line(batch, width, display) for batch in shown), *more]


def _bar_line(batch: BatchProgress, width: int, display: Display) -> str:
    """Return a batch as a bar; each part is as long as its share, rounded, at least one mark."""
    done = f"batch {batch.number:>3} {batch.count(SUCCESS):>6} of {batch.total:<6} "
    room = min(40, width - len(done) - len(MARKS))  # rounding makes each part longer by less than one mark
    if room < 1:
        return cut_to(done.rstrip(), width)
    counts = [(mark, batch.count(status), COLOURS.get(status, "")) for status, mark in MARKS]
    return done + "".join(display.paint(mark * max(1, round(room * count / batch.total)), colour)
                          for mark, count, colour in counts if count)


def cause_lines(failures: Sequence[FailureGroup], display: Display, most: int = MAX_CAUSES) -> list[str]:
    """Return a line for each cause of failures; where there is little room, the message is cut, and no node's name."""
    width, lines = max(display.width - 1, 1) if display.width else 0, []
    for group in failures[:most]:
        room = width - 2 - columns_of(one_line(group._replace(pattern="."))) + 1
        text = "  " + one_line(group._replace(pattern=cut_to(group.pattern, room)) if room > 12 else group,
                               2 * MAX_MESSAGE_CHARS)
        lines += wrapped(text, width)
    left = sum(group.size for group in failures[most:])
    more = [f"  and {left} more with other causes"] if left else []
    return [*(display.paint(line, COLOURS[FAILED]) for line in lines), *more]


def is_well(node: ReleaseNode) -> bool:
    """Return whether nothing about a node needs a look: a skipped one was left as it was."""
    return node.status != FAILED and (node.status != RUNNING or node.attempts <= 1)


def nodes_text(nodes: Sequence[ReleaseNode], batches: Iterable[BatchProgress], display: Display,
               shows_all: bool) -> str:
    """Return the nodes of a release that are not well, or all of them, and how many are left out.

    nodes: all of them, or those that run and the first MAX_ILL that failed.
    """
    shown = nodes if shows_all else [node for node in nodes if not is_well(node)][:MAX_ILL]
    table = display.table(
        [(n.batch, n.name, n.status, n.attempts, "" if display.is_narrow else n.started_at,
          time_taken(n.started_at, n.finished_at), n.error_kind, n.error_msg) for n in shown],
        ("batch", "node", "status", "tries", "started", "took", "error", "message"))
    ill = 0 if shows_all else sum(batch.count(FAILED) for batch in batches) - len(shown) + sum(
        node.status == RUNNING and not is_well(node) for node in nodes)
    well = sum(batch.total for batch in batches) - len(shown) - ill
    left = ", ".join(filter(None, (f"{ill} that failed or are tried again" if ill else "",
                                   f"{count_of_nodes(well)} with nothing wrong" if well else "")))
    hidden = [*([f"{left} (--all)"] if left else []),
              *([f"when each started ({WIDE} columns)"] if table and display.is_narrow else [])]
    return "\n".join(filter(None, (table, f"not shown: {'; '.join(hidden)}" if hidden else "")))


def status_text(progress: Progress, nodes: Sequence[ReleaseNode], display: Display, shows_all: bool = False) -> str:
    """Return a release for `status`: its head, a bar for each batch, then the nodes that are not well."""
    release = progress.release
    doing = dataclasses.replace(release, status_reason="; ".join(filter(None, (release.status_reason,
                                                                               progress.time_left))))
    about = [f"reason: {one_line(release.reason)}"] if release.reason else []
    about += [one_line(f"target {release.target}; {times_line(release, display)}")]
    bars = bar_lines(progress.batches, release.current_batch, display,
                     max(len(progress.batches), 1) if shows_all else MAX_BARS)
    return "\n".join(filter(None, [*head_lines(doing, display), *about, *bars, *cause_lines(progress.failures, display),
                                   nodes_text(nodes, progress.batches, display, shows_all)]))


def freezes_text(freezes: Freezes, display: Display) -> str:
    """Return who froze what, when, until when and why, a line for each freeze."""
    lines = [display.sentence(freeze._replace(reason="").line(display.moment(freeze.at))) + freeze.reason +
             (f"; {display.sentence(freeze.lifted_by)}" if freeze.lifted_by else "") for freeze in freezes.on]
    return "\n".join(lines) or "not frozen"


def list_text(page: Page, display: Display) -> str:
    """Return a page of releases, and how many there are; "" for none."""
    rows, now_s = [], time.time()
    for r in page.items:
        state = "" if r.status == SUCCESS and r.rollback_id is None else display.sentence(r.status_reason)
        rows.append((r.id, f"v{r.version}", r.target, r.status, f"{r.success_nodes}/{r.total_nodes}",
                     r.failed_nodes or "", rough_span(now_s - epoch_or(r.created_at, now_s)),
                     rough_span(epoch_or(r.finished_at, now_s) - epoch_or(r.started_at, now_s)) if r.started_at else "",
                     *(["; ".join(filter(None, (r.reason, state)))] if display.is_narrow else [r.reason, state])))
    head = ("id", "version", "target", "status", "done", "failed", "age", "took",
            *(["reason, state"] if display.is_narrow else ["reason", "state"]))
    last = (page.number - 1) * page.size + len(rows)
    older = f", older: --page {page.number + 1}" if last < page.total else ""
    first = f"{last - len(rows) + 1} to {last}" if page.number > 1 else f"{last}"
    foot = [f"{first} of {page.total}{older}"] if page.total > len(rows) and rows else []
    return "\n".join([display.table(rows, head, cuts=True), *foot]) if rows else ""


EVENT_HEAD = ("id", "at", "node", "event", "change", "actor", "detail")


def event_row(event: Event) -> tuple[object, ...]:
    """Return an event as a row of a table."""
    change = f"{event.from_status} -> {event.to_status}" if event.to_status else ""
    return (event.id, event.at, event.node_name or "release", event.event, change, event.actor, event.detail)


class Until(NamedTuple):
    """What watch waits for beside the release's end: a pause, or the end of a batch."""
    paused: bool = False
    batch: int = 0

    def is_reached(self, progress: Progress) -> bool:
        """Return whether watch may end."""
        at = min((b.number for b in progress.batches if b.count(PENDING, RUNNING)), default=MAX_NODES)
        return (progress.release.is_terminal or (self.paused and progress.release.status == PAUSED)
                or 0 < self.batch < at)


def parse_until(text: str) -> Until:
    """Parse --until: terminal, paused or batch=N."""
    match = re.fullmatch(r"batch=([1-9][0-9]{0,6})", text)
    if match:
        return Until(batch=int(match[1]))
    if text not in ("terminal", PAUSED):
        raise argparse.ArgumentTypeError(f"{text!r} is not terminal, paused or batch=N")
    return Until(paused=text == PAUSED)


class Screen:
    """Shows the progress of a release: redrawn in a terminal, else one line for each step."""

    def __init__(self, stream: TextIO, colour: str = AUTO, is_utc: bool = False):
        self._stream, self._colour, self._is_utc = stream, colour, is_utc
        # Lines on the screen that the next drawing replaces.
        self._drawn = 0
        self._last_steps: dict[str, str] = {}

    def show(self, progress: Progress, why: str = "") -> None:
        """Show the progress of a release, and in a sentence why it does not go on."""
        display = self._display()
        if display.is_terminal:
            self._draw(self._lines(progress, why, display), display)
            return
        release = progress.release
        # a text that only counts seconds or tries is no new step
        step = re.sub(r", slowest [^;]*|, try \d.*|\d+ (s|min|h|days)\b", "", release.status_reason)
        self._print("; ".join(filter(None, (release_line(release), progress.time_left))), f"{release.status} {step}",
                    "release")
        if why:
            self._print(why, re.sub(r"[\d:]+Z?", "", why), "why")

    def say(self, line: str) -> None:
        """Show an error, once."""
        display = self._display()
        if display.is_terminal:
            self._draw([cut_to(one_line(line), display.width - 1)], display)
        else:
            self._print(line, line, "release")

    def _display(self) -> Display:
        return Display.of(self._stream, self._colour, self._is_utc)

    def _print(self, line: str, step: str, what: str) -> None:
        if step != self._last_steps.get(what):
            print(self._display().sentence(line), file=self._stream, flush=True)
        self._last_steps[what] = step

    def _draw(self, lines: Sequence[str], display: Display) -> None:
        """Replace the last lines by new ones, as many as fit on the screen."""
        lines = lines[:max(display.lines - 1, 1)]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        print(up + "".join(f"\r\x1b[K{line}\n" for line in lines) + "\x1b[J", end="", file=self._stream, flush=True)
        self._drawn = len(lines)

    @staticmethod
    def _lines(progress: Progress, why: str, display: Display) -> list[str]:
        release, width = progress.release, max(display.width - 1, 1)
        head = [*head_lines(release, display), *(wrapped(display.sentence(why), width) if why else [])]
        elapsed = time_taken(release.started_at, release.finished_at if release.is_terminal else None)
        counts = "; ".join(filter(None, (
            f"{release.success_nodes} succeeded, {release.failed_nodes} failed, "
            f"{release.skipped_nodes} skipped of {release.total_nodes}",
            f"took {elapsed}" if elapsed and release.is_terminal else elapsed and f"{elapsed} so far",
            progress.time_left)))
        foot = wrapped(counts, width)
        # what is left of the screen is shared by bars and failures, each with a line that says how many more there are
        room = max(display.lines - 1 - len(head) - len(foot), 4)
        causes = cause_lines(progress.failures, display, max(1, min(MAX_CAUSES, room // 2 - 1)))[:max(1, room - 3)]
        bars = bar_lines(progress.batches, release.current_batch, display,
                         max(1, min(MAX_BARS, room - len(causes) - 1)))
        return [*head, *bars, *causes, *foot]


def left_out_lines(left_out: Iterable[LeftOut]) -> list[str]:
    """Return a line for each node that is left out, and one for those that are excluded."""
    excluded = [one.name for one in left_out if one.why == EXCLUDED]
    return [*(f"left out: {one.name} is {one.why}" for one in left_out if one.why != EXCLUDED),
            *([f"excluded: {in_words(excluded)}"] if excluded else [])]


def superseded_lines(superseded: Sequence[Superseded], verb: str) -> list[str]:
    """Return a line for each release that another one cancels; verb: "was", or "would be"."""
    return [f"{one} {verb} cancelled: superseded, it has not started" for one in superseded]


def warning_lines(warnings: Iterable[str]) -> list[str]:
    """Return a line for each warning."""
    return [f"note: {with_options(text)}" for text in warnings]


# endregion


# region Commands
# ======================================================================================
# Commands: what each other command does (contract section 4).
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Payloads, Difference, Model,
#   Strategy, Selection, Plan, Status texts, Verbs, Why, Database, Audit, Queue, Retry
#   and rollback, Releases, Overview, Serialization, Check and why, Terminal, Views.
# ======================================================================================

# Where a command's options have the id of a release, or LATEST.
RELEASE_OPTIONS = ("id", "other", "to", "release", "runs")


class Context:
    """What a command works with: options, settings and the store."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        # a command that needs no settings runs with a broken file too
        self.config_file = find_config(os.environ, options.config) if options.needs_settings else ""
        self.settings = Settings.load(os.environ, self.config_file, options.db) if options.needs_settings \
            else Settings.load({})
        self.metrics = Metrics()
        self.store = Store(Database(self.settings.database_url, self.metrics, self.settings.notify_kinds,
                                    self.settings.approvals))
        self.actor = _unix_user()
        self._is_open = False
        self.display = Display.of(sys.stdout, options.color, options.utc)

    def open(self, create: bool = False) -> Store:
        """Return the store, after a check of the schema; create: make the database if it is empty.

        An option of RELEASE_OPTIONS that is `latest` becomes the newest release's id; raise AppError(NOT_FOUND) where
        there is none.
        """
        if not self._is_open:  # else something may have been done that is only shown now
            self.store.database.require_schema(create)
            self._is_open = True
        named = [name for name in RELEASE_OPTIONS if getattr(self.options, name, None) == LATEST]
        newest = self.store.releases.page(size=1).items if named else []
        if named and not newest:
            raise AppError(NOT_FOUND, "there is no release yet")
        for name in named:
            setattr(self.options, name, newest[0].id)
        return self.store

    def show(self, document: Any, text: str, is_data: bool = False) -> int:
        """Print a JSON document with --json, else text for people unless --quiet; return EXIT_DONE.

        is_data: the text goes out as it is, whatever options say.
        """
        is_shown = is_data or not self.options.quiet
        out = to_json(document) if self.options.json else text if is_data else self.display.text(text)
        if out and (self.options.json or is_shown):
            print(out, flush=True)
        return EXIT_DONE

    def note(self, text: str) -> None:
        """Print beside the answer, on standard error, unless --quiet."""
        if not self.options.quiet:
            print(self.display.sentence(text), file=sys.stderr, flush=True)

    def screen(self) -> Screen:
        """Return what shows the progress of a release on standard error."""
        return Screen(sys.stderr, self.options.color, self.options.utc)


def _unix_user() -> Act:
    """Return who runs this: the Unix user, whatever the environment says, and beside it what sudo says."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    before = one_line(os.environ.get("SUDO_USER", ""), 60)
    return Act(f"cli:{one_line(name, 60)}" + (f" (sudo: {before})" if before else ""), VIA_CLI,
               address=one_line(socket.gethostname(), 100), user=one_line(name, 60))


def exit_code_of(store: Store, release: Release) -> int:
    """Return the exit code for how a release ended; 0 while it has not, 1 where too many failures paused it."""
    if release.is_terminal:
        return EXIT_DONE if release.status == SUCCESS else EXIT_NOT_SUCCESS
    is_exceeded = release.status == PAUSED and store.releases.is_exceeded(release.id)
    return EXIT_NOT_SUCCESS if is_exceeded else EXIT_DONE


def _number_or_text(text: str) -> int | str:
    """Return digits as a number, all else as it is: parse_strategy() raises the error."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text


def _list_of_numbers(text: str) -> list[int | str]:
    return [_number_or_text(part.strip()) for part in text.split(",")]


def _wanted_labels(field: str, texts: Iterable[str]) -> dict[str, Any]:
    wanted, unwanted = parse_label_words(field, texts)
    if unwanted:
        raise AppError(INVALID, f"{field} takes K=V or K=V1,V2, and no !=")
    return wanted


# Placeholders of options that may be repeated; their parsers take all texts.
REPEATED = ("K=V", "K=N")
# Options of create: flag, key of the strategy, parser, placeholder ("": a switch), help.
STRATEGY_OPTIONS: tuple[tuple[str, str, Callable[[Any], Any], str, str], ...] = (
    ("--batches", "batches", _list_of_numbers, "SPEC",
     "sizes: 1,10%%,25%%; all other nodes are the last batch, but 20* or 10%%* goes on to the end (1)"),
    ("--batch-by", "batchBy", str, "KEY", "a batch for each value of this label; --batches cuts each of them"),
    ("--first", "first", lambda texts: _wanted_labels("--first", texts), "K=V",
     "nodes with this label are batch 1; may be repeated"),
    ("--max-failed", "maxFailed", _number_or_text, "N",
     "failures tolerated in a batch: N or N%% (default 0: stop at the first)"),
    ("--max-failed-total", "maxFailedTotal", _number_or_text, "N",
     "failures tolerated in the whole release: N or N%% (no limit)"),
    ("--max-parallel", "maxParallel", _number_or_text, "N", "nodes in flight at once; 0: the whole batch (0)"),
    ("--max-parallel-per", "maxParallelPer", lambda texts: {
        key: _number_or_text(number) for key, number in parse_label_pairs("--max-parallel-per", texts).items()}, "K=N",
     "nodes in flight at once for each value of this label, like rack=1; may be repeated"),
    ("--soak", "soakSec", parse_duration, "TIME", "wait between batches: 90, 5m, 2h (0)"),
    ("--pause-after", "pauseAfter", lambda text: text if text == EACH else _list_of_numbers(text), "LIST",
     "pause after these batches until resume: numbers, or each"),
    ("--on-exceed", "onExceed", str, "WHAT",
     "at more failures than tolerated: fail, pause until resume, or rollback: fail, and go back by itself (fail)"),
    ("--node-deadline", "nodeDeadlineSec", parse_duration, "TIME", "most time for a node, from its dispatch"),
    ("--retries", "retries", _number_or_text, "N", "tries after the first"),
    ("--start-at", "startAt", str, "TIME", "start no earlier than this, like 2026-01-31T22:00:00Z"),
    ("--preflight", "preflight", bool, "", "ask every agent before batch 1; too many silent ones: nothing is sent"),
)
VERIFY_OPTIONS: tuple[tuple[str, str, Callable[[Any], Any], str, str], ...] = (
    ("--verify-url", "url", str, "URL", "probe each node after its success, like http://{main_ip}:8080/health"),
    ("--verify-status", "status", _number_or_text, "N", "HTTP status that a probe must get (200)"),
    ("--verify-timeout", "timeoutSec", parse_duration, "TIME", "most time for one probe (5)"),
    ("--verify-successes", "successes", _number_or_text, "N", "probes in a row that must pass (1)"),
    ("--verify-host", "host", str, "NAME", "site to ask for: the Host header, and the name in TLS"),
    ("--verify-contains", "contains", str, "TEXT", "text that the answer must contain"),
)


def _given(options: argparse.Namespace,
           known: Iterable[tuple[str, str, Callable[[Any], Any], str, str]]) -> dict[str, Any]:
    """Return the keys whose options were given, with their values."""
    values = [(key, getattr(options, flag[2:].replace("-", "_")), parse if metavar in REPEATED else None)
              for flag, key, parse, metavar, _ in known]
    return {key: parse(value) if parse else value for key, value, parse in values if value is not None}


def _strategy_given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the strategy whose options were given, unparsed."""
    verify = _given(options, VERIFY_OPTIONS)
    return {**_given(options, STRATEGY_OPTIONS), **({"verify": verify} if verify else {})}


def command_create(context: Context) -> int:
    options = context.options
    _check_wait(options)
    body: dict[str, Any] = {"target": options.target, "reason": options.reason, "payload": {},
                            "strategy": _strategy_given(options)}
    if options.payload:
        body["payload"] = read_json(read_text(options.payload), f"--payload {options.payload}", exact=True)
    wanted, unwanted = parse_label_words("--label", options.label or ())
    if wanted and options.node:
        raise AppError(INVALID, "--node and --label K=V exclude each other: name one of them")
    if len(set(options.node or ())) < len(options.node or ()):
        raise AppError(INVALID, "--node must name different nodes")
    body.update({"labels": wanted} if wanted else {}, **({"exclude": {"labels": unwanted}} if unwanted else {}),
                **({"supersede": True} if options.supersede else {}))
    if options.version is not None:
        body["version"] = options.version
    body.update(approval=bool(options.approval), emergency=bool(options.emergency))
    store = context.open(create=True)
    request = parse_release_request(body)._replace(names=options.node or (), excluded_names=options.exclude or ())
    if options.check_agents:
        return _check_agents(context, store.releases.plan(request))
    if options.plan:
        return _show_plan(context, store.releases.plan(request))
    return _show_created(context, store.releases.create(request, context.actor))


def _check_agents(context: Context, plan: Plan) -> int:
    """Ask the agents of a plan as a preflight does, with its limit and its tries."""
    planned, settings, retries = set().union(*plan.batches), context.settings, plan.strategy.retries
    most = plan._replace(strategy=plan.strategy._replace(preflight=True)).max_silent or 0
    pings = ping_nodes(settings, [n for n in context.store.nodes.page(size=0).items if n.id in planned],
                       retries=settings.agent_retries if retries is None else retries)
    silent = sum(not ping.is_ok for ping in pings)
    limit = f"; at most {most} may be silent" if silent and most else ""
    context.show(pings_json(pings), silence_text(pings, context.display) + limit)
    return EXIT_DONE if silent <= most else EXIT_UNAVAILABLE


def _show_plan(context: Context, plan: Plan) -> int:
    return context.show(plan_json(plan), _plan_text(plan, context.display))


def _plan_text(plan: Plan, display: Display) -> str:
    """Return what a release would do, and which nodes it would leave out."""
    payload = "payload of release {} (v{})".format(*plan.payload_of) if plan.payload_of else None
    strategy, effect = plan.strategy, plan.effect
    limits = [("version", plan.version), ("sends", payload), ("nodes", sum(map(len, plan.batches))),
              ("failures tolerated in all", plan.max_failed_total),
              ("more failures", {PAUSE: "it pauses", ROLLBACK: "it is rolled back"}.get(strategy.on_exceed)),
              ("nodes in flight at once, at most", strategy.max_parallel or None),
              *((f"nodes in flight at once of each {key}, at most", number)
                for key, number in strategy.max_parallel_per.items()),
              ("asks every agent before batch 1; of these may not answer, at most", plan.max_silent),
              ("starts no earlier than", display.moment(strategy.start_at) or None),
              ("soaks after each batch", f"{strategy.soak_s:g} s" if strategy.soak_s else None),
              ("pauses after batch", in_words(plan.pauses) or None),
              ("each node is probed at", strategy.verify.url if strategy.verify else None),
              ("failed or skipped, and not chosen", plan.not_chosen or None)]
    has_groups = any(plan.groups)
    text = display.table(
        [(number, len(ids), most, *([group] if has_groups else []), in_words([plan.names[id_] for id_ in ids]))
         for number, (ids, most, group) in enumerate(zip(plan.batches, plan.max_failed, plan.groups), 1)],
        ("batch", "nodes", "may fail", *(["group"] if has_groups else []), "names"))
    emptied = [f"left without any site: {', '.join(plan.emptied)}"] if plan.emptied else []
    return "\n".join(
        [text, *(f"{name}: {value}" for name, value in limits if value is not None), *left_out_lines(plan.left_out),
         *superseded_lines(plan.superseded, "would be"), *warning_lines(plan.warnings), *emptied,
         *([effect_text(effect)] if effect else []),
         *(_change_lines(effect.difference, MAX_CHANGES_PLANNED) if effect and effect.difference else [])])


# Changes that a plan shows; `diff` and --json show more.
MAX_CHANGES_PLANNED = 20


def _change_lines(changes: Difference, most: int = MAX_CHANGES) -> list[str]:
    shown = changes.changes[:most]
    left = changes.total - len(shown)
    return [*map(str, shown), *([f"and {left} more"] if left else [])]


def command_payload(context: Context) -> int:
    release = context.open().releases.get(context.options.id)
    payload = stored_payload(release)
    return context.show(payload_json(release, payload), indented_json(without_version(payload)), is_data=True)


def command_diff(context: Context) -> int:
    release, other, changes = context.open().releases.difference(context.options.id, context.options.other)
    context.show(difference_json(release, other, changes), "\n".join(
        [f"{other} -> {release}: {changes}", *_change_lines(changes)]))
    return EXIT_NOT_SUCCESS if changes.total else EXIT_DONE


def _check_wait(options: argparse.Namespace) -> None:
    if not options.wait and (options.timeout is not None or options.until != Until()):
        raise AppError(MISSING, "--timeout and --until go with --wait")


def _show_created(context: Context, made: Made) -> int:
    if context.options.wait:
        context.note(_created_text(made))
        return _watch(context, made.release.id)
    if context.options.json:
        as_json = created_again_json if made.release.is_again else created_json
        return context.show(as_json(made), "")
    lines = [_created_text(made)]
    with contextlib.suppress(DatabaseError):  # it is created, whatever can be read of it now
        why = context.store.claims.why(made.release.id, context.settings.node_deadline_sec)
        # an approval comes first, whatever else stops it
        lines += [] if made.release.awaits_approval or why.text in lines[0] else [context.display.sentence(why.line)]
    return context.show(None, "\n".join([*lines, f"follow: releasectl watch {made.release.id}"]))


def _created_text(made: Made) -> str:
    release = made.release
    return "\n".join([
        f"{release}: created, {count_of_nodes(release.total_nodes)} in batches of "
        f"{in_words([len(batch) for batch in made.batches])}", *([CHANGES_NOTHING] if made.is_unchanged else []),
        *([release.status_reason] if release.awaits_approval else []),
        *(left_out_lines(made.left_out) if release.is_again else []), *superseded_lines(made.superseded, "was"),
        *warning_lines(made.warnings)])


def command_list(context: Context) -> int:
    options, store = context.options, context.open()
    node = store.nodes.named(options.node).name if options.node else ""
    wanted = ReleaseFilter(options.status or "", options.target, options.search, options.since or "", node)
    page = store.releases.page(wanted, options.page, options.page_size)
    none = "no releases" if wanted == ReleaseFilter() else "no such releases"
    return context.show(page_json(page, release_json), list_text(page, context.display) or (
        f"no releases on page {page.number} of {-(-page.total // page.size)}" if page.total else none))


def _show_overview(context: Context) -> int:
    store = context.open()
    with contextlib.suppress(DatabaseError):  # read() tells
        store.state.check_write()
    settings = context.settings
    keys = {"CONTROL_CERT": settings.control_key, "HTTP_CERT": settings.http_key}
    # a key that only the service may read is as it should be
    overview = store.overview.read([found for found in certificate_states(certificates_json(settings))
                                    if not (found.message and is_closed(keys.get(found.name, "")))])
    problems = context.display.table([(p.severity, p.since, context.display.sentence(with_options(p.text)), p.mends)
                                      for p in overview.problems], ("", "since", "what", "mend"))
    context.show(overview_json(overview), "\n".join(filter(None, [context.display.sentence(overview.text), problems])))
    return EXIT_NOT_SUCCESS if context.options.health and not overview.is_well else EXIT_DONE


def command_status(context: Context) -> int:
    if context.options.id is None:
        return _show_overview(context)
    options, store = context.options, context.open()
    if options.json:
        release, nodes, failures = store.releases.whole(options.id)
        return context.show(release_with_nodes_json(store.releases.as_shown(release), nodes, failures), "")
    progress, nodes = store.releases.progress_and_nodes(options.id, MAX_ILL)
    if options.all:
        nodes = store.releases.with_nodes(options.id)[1]
    return context.show(None, status_text(progress, nodes, context.display, options.all))


def command_why(context: Context) -> int:
    store, release_id = context.open(), context.options.id
    if release_id is None or not store.releases.get(release_id).is_terminal:
        with contextlib.suppress(DatabaseError):  # which why() tells then
            store.state.check_write()
    why = store.why(release_id, context.settings.node_deadline_sec)
    display, stopped_by = context.display, why.stopped_by
    steps = display.table([("=>" if step is stopped_by else "", display.word(step.state), display.word(step.name),
                            display.said(step.text)) for step in why.steps],
                          ("", *map(display.word, ("state", "step", "what"))))
    is_over = why.release is not None and why.release.is_terminal
    mends = [step.mend for step in ([stopped_by] if stopped_by and not is_over else why.steps)
             if step.mend and (step.state != OK or step.name in (ENDED, BACK))]
    # of what goes on by itself too: there it is a way to have it sooner
    back = [f"; or {step.mend}" for step in why.steps if step.name == BACK]
    mend = [display.said(f"mend: {''.join([mends[0], *back])}")] if mends else []
    context.show(why_json(why), "\n".join([display.said(why.line), steps, *mend]))
    return EXIT_NOT_SUCCESS if stopped_by and why.release else EXIT_DONE


def command_watch(context: Context) -> int:
    context.open()
    return _watch(context, context.options.id)


WATCH_EVERY_S = 0.5


def _watch(context: Context, release_id: int) -> int:
    """Show the progress of a release on standard error until --until is reached; return the exit code.

    The database may be out of reach meanwhile. EXIT_BUSY: --timeout was over first.
    """
    options, store, screen = context.options, context.open(), context.screen()
    ends_at = float("inf") if options.timeout is None else time.monotonic() + options.timeout
    state, standstill, is_first = "could not be read", _Standstill(context), True
    while True:
        try:
            progress = store.releases.progress(release_id)
            why, is_over = standstill.explain(progress), options.until.is_reached(progress)
            if not options.quiet and not (is_over and is_first):  # the answer says it
                screen.show(progress, why)
            is_first = False
        except DatabaseError as error:
            screen.say(str(error))
        else:
            release = progress.release
            if is_over:
                break
            reason = one_line(release.status_reason)
            state = f"is still {release.status}" + (f" ({reason})" if reason else "")
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            context.note(f"timed out after {options.timeout:g} s: release {release_id} {state}")
            if options.json:
                context.show({"release": release_json(store.releases.as_shown(store.releases.get(release_id)))}, "")
            return EXIT_BUSY
        time.sleep(min(WATCH_EVERY_S, left_s))
    context.show({"release": release_json(release)}, context.display.sentence(release_line(release)))
    return exit_code_of(store, release)


# A release at work that has done nothing for so long is explained, then and at most so often.
STILL_S, EXPLAIN_EVERY_S = 5.0, 2.0


class _Standstill:
    """Finds out why a release that is watched does not go on."""

    def __init__(self, context: Context):
        self._context = context
        self._place: tuple[object, ...] = ()
        self._since = self._explained_at = float("-inf")
        self._text = ""

    def explain(self, progress: Progress) -> str:
        """Return in a sentence what a release waits for; "" while it moves, or where its own state says that."""
        release, now = progress.release, time.monotonic()
        place = (release.status, release.current_batch, *(sorted(batch.counts.items()) for batch in progress.batches))
        if place != self._place:
            self._place, self._since, self._text = place, now, ""
        is_still = release.status != RUNNING or now - self._since >= STILL_S
        if release.is_terminal or not is_still:
            return ""
        if now - self._explained_at >= EXPLAIN_EVERY_S:
            why = self._context.store.claims.why(release.id, self._context.settings.node_deadline_sec)
            waits = why.stopped_by or any(step.state == WAITS for step in why.steps)
            self._explained_at, self._text = now, why.line if waits and why.text not in release.status_reason else ""
        return self._text


def command_events(context: Context) -> int:
    options = context.options
    if options.follow and options.json:
        raise AppError(INVALID, "--follow prints lines as they come, --json one document: ask again with --after ID")
    store = context.open()
    events = store.releases.events(options.id, options.after or 0, options.limit, newest=options.after is None)
    widths: list[int] = []
    context.show({"items": [event_json(event) for event in events]},
                 context.display.table(list(map(event_row, events)), EVENT_HEAD, before=widths)
                 or ("" if options.follow else "no events"))
    total = store.releases.count_events(options.id)
    if options.after is None and len(events) < total:
        context.note(f"the newest {len(events)} of {count_of(total, 'event')}; all of them: --limit {total}")
    elif len(events) == options.limit and options.limit < total:
        context.note(f"there may be later ones: --after {events[-1].id}")
    last = events[-1].id if events else options.after or 0
    wait_s = 0.0
    while options.follow and not reader_leaves(sys.stdout, wait_s):
        release = store.releases.get(options.id)  # before its events: what ends it is among them
        events = store.releases.events(options.id, last)
        wait_s = 0.0 if events else WATCH_EVERY_S
        if events:
            last = events[-1].id
            context.show(None, context.display.table(list(map(event_row, events)), EVENT_HEAD, before=widths))
        elif release.is_terminal:
            break
    return EXIT_DONE


def command_act(context: Context) -> int:
    options = context.options
    verb = CANCEL_BY_FORCE if options.command == "cancel" and options.force else options.command
    more = {"accept_failures": options.accept_failures} if verb == "resume" else {}
    reason = parse_text("--reason", options.reason)
    store = context.open()
    release = store.approvals.approve(options.id, context.actor, reason, bool(options.emergency)) if verb == "approve" \
        else store.releases.act(verb, options.id, context.actor, reason, **more)
    return context.show(release_json(release), context.display.sentence(release_line(release)))


def command_again(context: Context) -> int:
    options = context.options
    _check_wait(options)
    reason, store = parse_text("--reason", options.reason), context.open()
    wish = Again(reason, options.over_newer, getattr(options, "to", None), bool(getattr(options, "now", False)),
                 bool(getattr(options, "during_freeze", False)), getattr(options, "kind", ()),
                 words=node_words(getattr(options, "node", None) or (), "--label",
                                  getattr(options, "label", None) or (), getattr(options, "exclude", None) or ()),
                 is_emergency=bool(options.emergency))
    if options.plan:
        return _show_plan(context, store.releases.plan_again(options.command, options.id, wish))
    make = {"retry": store.releases.retry, "rollback": store.releases.rollback}[options.command]
    return _show_created(context, make(options.id, context.actor, wish))


def command_catch_up(context: Context) -> int:
    options = context.options
    reason, strategy = parse_catch_up({"reason": options.reason, "strategy": _strategy_given(options)})
    releases = context.open().releases
    if options.plan:
        plans, left_out = releases.plan_catch_up(reason, strategy)
        document, texts = catch_up_plan_json(plans, left_out), [_plan_text(plan, context.display) for plan in plans]
    else:
        made, left_out = releases.catch_up(context.actor, reason, strategy)
        document, texts = caught_up_json(made, left_out), [_created_text(one) for one in made]
    return context.show(document, "\n".join([
        *(texts or [f"no node {'else ' if left_out else ''}is behind"]), *left_out_lines(left_out)]))


def command_freeze(context: Context) -> int:
    options, releases = context.options, context.open().releases
    if options.switch is None and (options.reason or options.target or options.until or options.emergency):
        raise AppError(MISSING, "--reason, --target, --until and --emergency go with on or off")
    if options.switch is None:
        freezes, warnings = releases.freezes(), list[str]()
    else:
        target = parse_target(options.target) if options.target is not None else ""
        freezes = releases.set_freeze(options.switch == "on", context.actor, parse_text("--reason", options.reason),
                                      target, options.until, bool(options.emergency))
        warnings = releases.freeze_warnings(target, freezes, options.switch == "on")
    for warning in warnings:
        context.note(f"warning: {warning}")
    return context.show(freezes_json(freezes, warnings), freezes_text(freezes, context.display))


# endregion


# region Upkeep commands
# ======================================================================================
# Upkeep commands: what the commands on database, tokens and audit log do, and `check`.
# Uses: Vocabulary, Settings, Plan, Engines, Database, Audit, Nodes, Serialization,
#   Access, Check and why, Commands.
# ======================================================================================

def command_migrate(context: Context) -> int:
    before, after = context.store.database.migrate()
    document: dict[str, Any] = {"before": before, "after": after}
    text = f"{context.store.database}: schema {after}" + (f", was {before}" if before != after else "")
    if context.options.first_version is not None:
        document["nextVersion"] = context.store.releases.set_first_version(context.options.first_version,
                                                                           context.actor)
        text += f"; the next release is version {document['nextVersion']}"
    return context.show(document, text)


def command_token_add(context: Context) -> int:
    options, path = context.options, context.settings.api_tokens_file
    if not path:
        raise ConfigError("API_TOKENS_FILE is not set: name the file that holds the tokens of the API")
    if options.role == VIEWER and options.targets:
        raise AppError(INVALID, "--targets is for operators: a viewer only reads, and that is not limited")
    token = context.open(create=True).audit.perform(
        context.actor, "token.add", f"token {options.name}", non_empty(
            name=options.name, role=options.role, file=path, expires=options.expires, targets=options.targets),
        lambda: add_token(path, options.name, options.role, options.expires or "", options.targets))
    limits = "".join((f", until {options.expires}" if options.expires else "",
                      f", for {options.targets} only" if options.targets else ""))
    print(f"Token for {options.name} ({options.role}{limits}). Copy it now: it can't be shown again.", file=sys.stderr)
    return context.show({"name": options.name, "role": options.role, "token": token, **non_empty(
        expires=options.expires, targets=options.targets.split(",") if options.targets else None)}, token, is_data=True)


def command_audit(context: Context) -> int:
    options = context.options
    if options.head and not options.verify:
        raise AppError(MISSING, "--head goes with --verify")
    if options.verify:
        return _verify_audit(context)
    store = context.open()
    what = options.object if options.release is None else f"release {options.release}"
    rows = store.audit.rows(options.after, options.limit, AuditFilter(
        options.actor, options.action, what, options.since or ""), newest=not options.after)
    context.show({"items": [audit_json(row) for row in rows]}, context.display.table(
        [(r.id, r.at, r.actor, r.address, r.action, r.object, " -> ".join(filter(None, (r.before, r.after))))
         for r in rows], ("id", "at", "actor", "from", "action", "object", "change")) or "no rows")
    return EXIT_DONE


def _verify_audit(context: Context) -> int:
    report = context.open().audit.verify(context.options.head)
    context.show({"isWhole": not report.faults, "rows": report.rows, "releases": report.releases,
                  "head": {"id": report.head[0], "hash": report.head[1]}, "faults": report.faults},
                 "\n".join(report.faults or [f"whole: {audit_line(report)}"]))
    return EXIT_NOT_SUCCESS if report.faults else EXIT_DONE


def _checks_text(findings: Sequence[Finding]) -> str:
    failed = sum(f.exit_code != EXIT_DONE for f in findings)
    return f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed"


def command_check(context: Context) -> int:
    settings, display = context.settings, context.display
    findings = [check_sources(given_settings(os.environ, context.config_file, context.options.db)),
                *check_config(context.config_file), *check_agents(settings),
                *check_api(settings), *check_notifications(settings, context.options.notify),
                *check_database(settings, context.store)]
    context.show({"items": [{"subject": f.subject, "ok": f.exit_code == EXIT_DONE, "message": f.text}
                            for f in findings]},
                 display.table([(display.word("ok" if f.exit_code == EXIT_DONE else "WRONG"), display.word(f.subject),
                                 display.said(f.text)) for f in findings],
                               ("", *map(display.word, ("subject", "result")))) + "\n" +
                 display.said(_checks_text(findings)))
    codes = {f.exit_code for f in findings}
    return EXIT_USAGE if EXIT_USAGE in codes else max(codes)


def command_backup(context: Context) -> int:
    path = context.options.file
    schema, size = context.store.audit.backup(path, context.actor)
    return context.show({"file": path, "bytes": size, "schema": schema},
                        f"{path}: {size} bytes, schema {schema}, checked")


# Seconds between two transactions of prune, so that other writers get the lock.
PRUNE_PAUSE_S = 0.1
# Nodes of the releases that prune deletes in one transaction; each has some events too.
PRUNE_NODES = 500


def command_prune(context: Context) -> int:
    options, store = context.options, context.open()
    found = store.history.prunable(options.older_than, options.keep)
    if options.dry_run:
        return _show_pruned(context, found)
    gone: set[int] = set()
    for chunk in _chunks(found):
        gone.update(store.history.delete([release.id for release in chunk], context.actor))
        time.sleep(PRUNE_PAUSE_S)
    return _show_pruned(context, [release for release in found if release.id in gone])


def _chunks(releases: Iterable[OldRelease]) -> Iterator[list[OldRelease]]:
    """Yield parts of a list that are each deleted in a short transaction; a release is in one part."""
    chunk: list[OldRelease] = []
    for release in releases:
        if chunk and (len(chunk) == NODES_PER_STATEMENT
                      or sum(r.total_nodes for r in chunk) + release.total_nodes > PRUNE_NODES):
            yield chunk
            chunk = []
        chunk.append(release)
    if chunk:
        yield chunk


def _show_pruned(context: Context, releases: Sequence[OldRelease]) -> int:
    is_dry = context.options.dry_run
    rows = context.display.table([(r.id, f"v{r.version}", r.target, r.status, r.total_nodes, r.ended_at)
                                  for r in releases],
                                 ("id", "version", "target", "status", "nodes", "ended")) if is_dry else ""
    return context.show({"dryRun": is_dry, "total": len(releases), "items": [
        {"id": r.id, "version": r.version, "target": r.target, "status": r.status, "totalNodes": r.total_nodes,
         "endedAt": r.ended_at} for r in releases]},
        "\n".join(filter(None, [rows, f"releases {'to be ' if is_dry else ''}deleted: {len(releases)}"])))


def command_version(context: Context) -> int:
    import platform

    driver = ""
    with contextlib.suppress(ConfigError):
        name = load_postgres_driver().__name__.partition(".")[0]
        driver = f"{name} {sys.modules[name].__version__}"
    found = {"version": __version__, "sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
             "schema": len(schema_steps()), "python": platform.python_version(),
             "sqlite": sqlite3.sqlite_version, "openssl": ssl.OPENSSL_VERSION, "postgresDriver": driver or None}
    return context.show(found, "\n".join([f"releasectl {__version__}", *(
        f"{name:<15} {value or 'none'}" for name, value in found.items() if name != "version")]))


# endregion


# region Node commands
# ======================================================================================
# Node commands: what the commands on nodes do, and what is shown of a node.
# Uses: Vocabulary, Helpers, Model, Selection, Drift, Overview, Serialization, Check
#   and why, Terminal, Commands.
# ======================================================================================

def _node_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the JSON fields of a node that the options give."""
    fields = {"name": options.name if options.command == "node add" else options.rename, "mainIp": options.ip,
              "agentPort": options.port, "agentProtocol": options.protocol, "status": options.status,
              "labels": parse_label_pairs("--label", options.label) if options.label else None,
              "enabled": options.enabled}
    return {name: value for name, value in fields.items() if value is not None}


NODE_HEAD = ("id", "name", "address", "protocol", "enabled", "status", "runs", "drift", "labels")


def _node_row(listed: ListedNode) -> tuple[object, ...]:
    node, runs = listed.node, listed.level.runs
    return (node.id, node.name, f"{node.main_ip}:{node.agent_port}", node.agent_protocol,
            "yes" if node.enabled else "no", node.status, f"{runs.release_id} (v{runs.version})" if runs else "-",
            listed.level.drift, node.labels)


def command_node_add(context: Context) -> int:
    columns = parse_node_fields(_node_options(context.options), ("name", "mainIp"))
    node = context.open(create=True).nodes.add(**columns, by=context.actor)
    return context.show(node_json(context.store.written([node])[0]),
                        f"node {node.id}: {node.name} at {node.main_ip}:{node.agent_port}")


def command_node_list(context: Context) -> int:
    options = context.options
    words = node_words(tuple(options.names), "--label", options.label or (), tuple(options.exclude or ()))
    page = context.open().fleet.page(size=0, wanted=NodeFilter(
        options.drift or "", words, options.runs, options.search, options.sort))
    text = context.display.table([_node_row(listed) for listed in page.items], NODE_HEAD) or _why_none(
        words, context.store.nodes.page(size=0).items)
    return context.show({"items": [node_json(listed) for listed in page.items], "total": page.total}, text)


def _why_none(words: NodeWords, nodes: Sequence[Node]) -> str:
    if not nodes:
        return "no nodes: add one with `node add`"
    is_by_label = bool(words.labels or words.excluded_labels) and not any(map(words.takes, nodes))
    return words.why_none(nodes) if is_by_label else "no such nodes"


# Releases that `node show` shows.
TRIES_SHOWN = 20


def command_node_show(context: Context) -> int:
    store = context.open()
    listed = store.fleet.listed([store.nodes.named(context.options.name)])[0]
    node, level = listed
    tries = store.fleet.tries(node.id, size=TRIES_SHOWN)
    changes = store.audit.of_node(node.id, node.name, TRIES_SHOWN)
    facts = [("address", f"{node.main_ip}:{node.agent_port}"), ("protocol", node.agent_protocol),
             ("state", node.condition), ("labels", node.labels), ("runs", _ran_text(level.runs, context.display)),
             ("should run", _ran_text(level.wants, context.display)), ("drift", drift_text(level))]
    given = context.display.table(
        [(one.release_id, f"v{one.version}", one.target, one.release_status, one.status, one.attempts,
          one.started_at, one.finished_at, one.error_kind, one.error_msg) for one in tries.items],
        ("release", "version", "target", "ended", "here", "tries", "started", "finished", "error", "message"))
    more = [f"and {tries.total - TRIES_SHOWN} older ones"] if tries.total > TRIES_SHOWN else []
    acts = context.display.table([(row.at, row.actor, row.action, " -> ".join(filter(None, (row.before, row.after))))
                  for row in changes], ("at", "actor", "action", "change"))
    return context.show(
        {"node": node_json(listed), "releases": [node_try_json(one) for one in tries.items],
         "changes": [audit_json(row) for row in changes]},
        "\n".join([f"node {node.id}: {node.name}", *(f"{name:<10}  {value}" for name, value in facts), "",
                   given or "no release was for it yet", *more, *(["", acts] if acts else [])]))


def _ran_text(ran: Ran | None, display: Display) -> str:
    return f"release {ran.release_id} (v{ran.version}) since {display.moment(ran.since)}" if ran else "-"


def command_node_rm(context: Context) -> int:
    store = context.open()
    node = store.nodes.named(context.options.name)
    store.nodes.delete(node.id, context.actor)
    return context.show({"id": node.id, "name": node.name}, f"node {node.id}: {node.name} deleted")


def command_node_set(context: Context) -> int:
    columns = parse_node_fields(_node_options(context.options))
    if not columns:
        raise AppError(MISSING, "nothing to change: name an option, see `node set --help`")
    store = context.open()
    nodes = _chosen(context, store)
    one_only = [word for word, column in (("--rename", "name"), ("--ip", "main_ip")) if column in columns]
    if one_only and len(nodes) > 1:
        raise AppError(INVALID, f"{one_only[0]} is for one node, and {len(nodes)} are chosen")
    listed = store.written(store.nodes.update_all([node.id for node in nodes], columns, context.actor))
    is_one = len(context.options.names) == 1 and context.options.names[0] == nodes[0].name
    document = node_json(listed[0]) if is_one else {"items": [node_json(one) for one in listed]}
    return context.show(document, context.display.table([_node_row(one) for one in listed], NODE_HEAD))


def _chosen(context: Context, store: Store) -> list[Node]:
    """Return the nodes that names, patterns and --where choose, by id; raise AppError for one that chooses none."""
    options = context.options
    if not options.names and not options.where:
        raise AppError(MISSING, "no node is chosen: give names or patterns, or --where K=V")
    words = node_words(options.names, "--where", options.where or (), options.exclude or ())
    chosen = words.choose(store.nodes.page(size=0).items)
    if not chosen:
        raise AppError(NOT_FOUND, "no nodes: add one with `node add`")
    return chosen


def command_node_import(context: Context) -> int:
    path = context.options.file
    rows = []
    for number, fields in enumerate(_read_node_file(path), 1):
        try:
            columns = parse_node_fields(fields, ("name", "mainIp"))
        except AppError as error:
            raise AppError(error.code, f"{path}, node {number}: {error.message}") from None
        rows.append(columns)
    done = context.open(create=True).nodes.import_all(rows, context.actor, context.options.update)
    listed = context.store.written([*done.added, *done.changed])
    return context.show(
        {"items": [node_json(one) for one in listed], "added": len(done.added), "changed": len(done.changed),
         "same": len(done.same)},
        f"nodes added: {len(done.added)}" + (f", changed: {len(done.changed)}, as they were: {len(done.same)}"
                                             if context.options.update else ""))


def _read_node_file(path: str) -> list[dict[str, Any]]:
    """Return the nodes of a JSON array, or of lines NAME IP [PORT [PROTOCOL]], as JSON fields.

    What `node list --json` prints is taken too; what nobody sets is left out of it.
    """
    text = read_text(path)
    if text.lstrip().startswith(("[", "{")):
        items = read_json(text, path)
        if isinstance(items, dict) and "items" in items:
            items = items["items"]
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise AppError(MALFORMED, f"{path} must be an array of objects")
        return [{key: value for key, value in item.items() if key in NODE_FIELDS or key not in NODE_SCHEMA}
                for item in items]
    nodes = []
    for line in text.splitlines():
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) < 2 or len(words) > 4 or (len(words) > 2 and not re.fullmatch("[0-9]{1,9}", words[2])):
            raise AppError(MALFORMED, f"{path}: {one_line(line, 60)!r} is not NAME IP [PORT [PROTOCOL]]")
        node: dict[str, Any] = dict(zip(("name", "mainIp", "agentPort", "agentProtocol"), words))
        if "agentPort" in node:
            node["agentPort"] = int(node["agentPort"])
        nodes.append(node)
    return nodes


def command_node_ping(context: Context) -> int:
    store = context.open()
    options, known = context.options, store.nodes.page(size=0).items
    words = node_words(options.names, "--label", options.label or (), options.exclude or ())
    exact = {name for name in options.names if not is_pattern(name)}
    nodes = [node for node in words.choose(known) if node.enabled or node.name in exact]
    pings = ping_nodes(context.settings, nodes)
    context.show(pings_json(pings),
                 context.display.table([(p.node.name, "ok" if p.is_ok else p.error_kind, p.text) for p in pings],
                       ("node", "state", "result")))
    return EXIT_DONE if all(p.is_ok for p in pings) else EXIT_UNAVAILABLE


# endregion


# region Service
# ======================================================================================
# Service: the processes serve and run-once: signals, the service manager, files that
#   change.
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Certificates, Agents,
#   Notifier, Executor, Serialization, API, Server, Check and why, Views, Commands.
# ======================================================================================

def command_serve(context: Context) -> int:
    settings, is_executor = context.settings, context.options.executor
    if is_executor and context.options.api:
        raise AppError(MALFORMED, "--api and --executor exclude each other: without them serve is both")
    if is_executor and not settings.release_executor_enabled:
        raise ConfigError("--executor: RELEASE_EXECUTOR_ENABLED=0 lets it dispatch nothing")
    off = "--api" if context.options.api else "" if settings.release_executor_enabled else "RELEASE_EXECUTOR_ENABLED=0"
    settings = dataclasses.replace(settings, release_executor_enabled=not off)
    _survive_signals()
    warn_of_settings(settings)
    _raise_descriptor_limit()
    context.store.database.migrate()
    agents = AgentClient(settings, context.metrics)
    if not off and (settings.control_cert or not settings.mtls_enabled):
        agents.prepare()
    executor = Executor(settings, context.store, agents, context.metrics)
    server = None if is_executor else ApiServer(settings, Api(
        context.store, context.metrics, executor.nudge, settings.http_max_connections // 4,
        lambda: process_json(settings, executor), executor.is_busy, lambda: certificate_figures(settings),
        executor.hung, settings.node_deadline_sec))
    _handle_signals(executor.stop, lambda: _reload(settings, agents, server))
    manager = ServiceManager(os.environ.get("NOTIFY_SOCKET", ""))
    accept = _accept(server) if server else None
    log.info("%s, %s, executor %s", f"serving {server.url}" if server else "no API (--executor)",
             context.store.database, f"off ({off})" if off else "on")

    def beat(sentence: str) -> None:
        if server:
            server.check_files()
        if accept is None or accept.is_alive():
            manager.notify("WATCHDOG=1", f"STATUS={one_line(sentence)}")

    faulthandler.enable()  # systemd's watchdog sends SIGABRT: the log then shows where each thread hangs
    manager.notify("READY=1")  # the database answered migrate(), and the API listens
    try:
        if not off:
            executor.run_loop(beat)
        while not executor.stopping.is_set():
            beat(f"API only, nothing is dispatched: {off}")
            executor.stopping.wait(settings.release_executor_interval_sec)
    finally:
        manager.notify("STOPPING=1")
        executor.close()  # first: no client may delay the release of claims
        if server:
            server.shutdown()
            server.server_close()
    log.info("stopped")
    return EXIT_DONE


def _accept(server: ApiServer) -> threading.Thread:
    """Start the thread that accepts connections."""
    thread = threading.Thread(target=server.serve_forever, name="accept", daemon=True)
    with starting_threads():
        thread.start()
    return thread


def command_run_once(context: Context) -> int:
    _survive_signals()
    path = context.options.metrics_file
    try:
        code = _run_once(context)
    except BaseException:
        with contextlib.suppress(ConfigError):  # the first error is the one to report
            _write_metrics(context, path)
        raise
    _write_metrics(context, path)
    return code


# Seconds between writes of --metrics-file during a drain.
METRICS_EVERY_S = 10.0


def _write_metrics(context: Context, path: str) -> None:
    """Write /metrics for node_exporter's textfile collector, atomically; raise ConfigError when that fails.

    The figures of the process are left out: it ends, and node_exporter has figures of the same names.
    """
    if path:
        text = metrics_text(context.metrics, context.store, certificate_figures(context.settings))
        try:
            replace_file(path, text, None, 0o644)
        except OSError as error:
            raise ConfigError(f"--metrics-file {path} can't be written: {os_reason(error)}") from None


def _run_once(context: Context) -> int:
    settings = context.settings
    if not settings.release_executor_enabled:
        print("nothing is dispatched: RELEASE_EXECUTOR_ENABLED=0", file=sys.stderr)
        return context.show({"releases": [], "inOtherHands": 0}, "")
    warn_of_settings(settings)
    context.store.database.migrate()
    executor = Executor(settings, context.store, AgentClient(settings, context.metrics), context.metrics)
    _handle_signals(executor.stop, lambda: _reload(settings, executor.agents))
    _raise_descriptor_limit()
    written_at = time.monotonic()

    def beat() -> None:
        nonlocal written_at
        if time.monotonic() >= written_at + METRICS_EVERY_S:
            written_at = time.monotonic()
            with contextlib.suppress(AppError):  # reported at the end, if it still fails then
                _write_metrics(context, context.options.metrics_file)

    try:
        tick = executor.drain(beat) if context.options.drain else executor.tick(beat)
    finally:
        executor.close()
    context.show({"releases": [release_json(release) for release in tick.worked_on],
                  "inOtherHands": tick.in_other_hands},
                 "\n".join(context.display.sentence(release_line(release)) for release in tick.worked_on))
    if not tick.worked_on and tick.in_other_hands:
        count = tick.in_other_hands
        print(("1 release is being worked on by another process" if count == 1 else
               f"{count} releases are being worked on by other processes") + ": try later", file=sys.stderr)
        return EXIT_BUSY
    code = max((exit_code_of(context.store, release) for release in tick.worked_on), default=EXIT_DONE)
    for release_id in tick.vanished:
        print(f"release {release_id} is no longer in the database, which went back to an earlier state",
              file=sys.stderr)
        code = EXIT_NOT_SUCCESS
    unended = [release for release in tick.worked_on if release.status in (PENDING, RUNNING, CANCELLING)]
    is_not_sent = any(release.claim_expires_at for release in unended)
    if code == EXIT_DONE and context.options.drain and (is_not_sent or (tick.was_stopped and unended)):
        print(f"releases that have not ended: {len(unended)}: try later", file=sys.stderr)
        return EXIT_BUSY
    return code


def warn_of_settings(settings: Settings) -> None:
    """Log what is not fit for production; raise ConfigError for a file that can't be used."""
    if settings.mtls_enabled and settings.control_key:
        require_private("CONTROL_KEY", settings.control_key)
    check_url(settings)
    if settings.notify_command and not shutil.which(settings.notify_command[0]):
        log.warning("NOTIFY_COMMAND: %s is no program that can be run: its notifications wait",
                    os.path.basename(settings.notify_command[0]))
    if not settings.mtls_enabled:
        log.warning("MTLS_ENABLED=0: agents are called by plain HTTP, unprotected; for a laboratory only")
    elif not settings.control_cert and settings.release_executor_enabled:
        log.warning("CONTROL_CERT is not set: nothing can be dispatched until it is, with CONTROL_KEY and CONTROL_CA")


class ServiceManager:
    """systemd, or whatever else listens on NOTIFY_SOCKET (sd_notify(3)); a failure is only logged."""

    def __init__(self, address: str):
        """address: of the socket, "" for none."""
        self._address = address
        self._outage = Outage("systemd", logging.WARNING)

    def notify(self, *lines: str) -> None:
        """Send lines of state."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1.0)
                # in the environment, @ stands for the NUL of an abstract name
                sock.sendto("\n".join(lines).encode(),
                            "\0" + self._address[1:] if self._address.startswith("@") else self._address)
            self._outage.end()
        except OSError as error:
            self._outage.log(f"could not be told anything: NOTIFY_SOCKET {self._address}: {os_reason(error)}")


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
# Signals that mean nothing to us, and by default would end the process; only Linux has SIGPWR and SIGSTKFLT.
IGNORED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO,
                   *(getattr(signal, name) for name in ("SIGPWR", "SIGSTKFLT") if hasattr(signal, name)),
                   *range(signal.SIGRTMIN, signal.SIGRTMAX + 1))


def _survive_signals() -> None:
    """Ignore all signals but STOP_SIGNALS, also before there is something to reload."""
    for number in (signal.SIGHUP, *IGNORED_SIGNALS):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which a child would inherit


def _handle_signals(stop: Callable[[], None], reload: Callable[[], None]) -> None:
    """Call stop() or reload() at a signal, in a thread: a signal handler could interrupt a holder of their locks.

    A descriptor wakes the thread: Python runs no handler while the main thread waits in a driver's C code.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def listen() -> None:
        while True:
            numbers = set(ours.recv(64))
            try:
                if numbers & set(STOP_SIGNALS):
                    stop()
                elif signal.SIGHUP in numbers:
                    reload()
            except Exception:  # the thread must survive for the next signal
                log.exception("a signal could not be handled")

    with starting_threads():
        threading.Thread(target=listen, name="signals", daemon=True).start()
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)


def _reload(settings: Settings, agents: AgentClient, server: ApiServer | None = None) -> None:
    """Read again what needs no restart, and log the result in one line (SIGHUP)."""
    parts: list[tuple[str, Callable[[], int | None]]] = []
    if settings.mtls_enabled and settings.control_cert:
        parts.append(("certificate for agents", agents.reload))
    if server and server.tls:
        parts.append(("certificate of the API", server.tls.reload))
    if server and server.tokens:
        parts.append(("tokens", server.tokens.reload))
    results, is_wrong = [], False
    for name, act in parts:
        try:
            count = act()
            results.append(name if count is None else f"{count} {name}")
        except ConfigError as error:
            is_wrong = True
            results.append(f"not the {name}: {error}")
    log.log(logging.ERROR if is_wrong else logging.INFO,
            "SIGHUP: read again: %s; other settings need a restart; the log goes to standard error, so no file is "
            "reopened", ", ".join(results) or "nothing")


def _raise_descriptor_limit() -> None:
    """Allow as many file descriptors as the host does: each agent takes one, and the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# endregion


# region Arguments
# ======================================================================================
# Arguments: what a command takes: the parser and its help, made from a table of
#   commands.
# Uses: Vocabulary, Helpers, Settings, Languages, Terminal, Commands.
# ======================================================================================

class Command(NamedTuple):
    """One command: its words, help, what runs it, and its options as (flags, keywords) of argparse."""
    name: str
    help: str
    run: Callable[[Context], int]
    options: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    needs_settings: bool = True


def option(*flags: str, **keywords: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, keywords


# They may stand before or after every command.
COMMON_OPTIONS = (
    option("--db", metavar="URL", help="overrides DATABASE_URL"),
    option("--config", metavar="FILE", help=f"settings as KEY=VALUE lines ({DEFAULT_CONFIG}, where it is there); "
                                        "the environment wins"),
    option("--json", action="store_true", help="one JSON document on standard output"),
    option("--utc", action="store_true", help="times in UTC, not in this host's zone"),
    option("--color", choices=COLOUR_MODES, metavar="WHEN",
           help="auto (in a terminal, unless NO_COLOR is set), always or never"),
    option("-q", "--quiet", action="store_true", help="print nothing but errors: the exit code tells"),
    option("-v", "--verbose", action="store_true", help="log lines too, on standard error"),
)
# What they are where they are not given.
COMMON_DEFAULTS: Mapping[str, Any] = {"db": "", "config": "", "json": False, "utc": False, "color": AUTO,
                                      "quiet": False, "verbose": False}


HELP_OPTION = option("--help", action="store_true", help="show what it takes")


class _StoreOnce(argparse.Action):
    """Store a value; refuse the option a second time, as the last value would silently win."""

    is_given = False

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        if self.is_given and option_string:
            parser.error(f"{option_string} is given twice")
        self.is_given = True
        setattr(namespace, self.dest, values)


class _StoreSwitch(argparse.Action):
    """Store True or False; refuse the opposite of what was given before."""

    def __init__(self, const: bool, **keywords: Any):
        super().__init__(nargs=0, const=const, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, _values: Any,
                 option_string: str | None = None) -> None:
        if getattr(namespace, self.dest, None) is (not self.const) and self.default is None:
            parser.error(f"{option_string} contradicts another option")
        setattr(namespace, self.dest, self.const)


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage like every other error: in one line, without secrets."""

    # Takes the place of the help that argparse makes, "" where that is shown.
    whole_help = ""
    # The commands, or options, that may stand here.
    words: Collection[str] = ()

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)
        self.register("action", "store_true", functools.partial(_StoreSwitch, const=True))
        self.register("action", "store_false", functools.partial(_StoreSwitch, const=False))

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"(argument \S+: )invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if unknown and unknown[1] == "argument COMMAND: ":
            message = f"{one_line(unknown[2], 60)!r} is not a command{did_you_mean(unknown[2], self.words)}"
        elif unknown:
            words = re.findall(r"[\w-]+", unknown[3])
            message = (f"{unknown[1]}{one_line(unknown[2], 60)!r} is none of {', '.join(words)}"
                       + did_you_mean(unknown[2], words))
        command = " ".join(["releasectl help", *self.prog.split()[1:]])
        raise AppError(MALFORMED, f"{safe_url(message)} (see `{command}`)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse what a command does not know here: its own help tells what it takes, that of the program does not."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}"
                       + (did_you_mean(option, self.words) if option.startswith("-") else ""))
        return found, []

    def format_help(self) -> str:
        return self.whole_help or super().format_help()


def build_parser(commands: Sequence[Command], others: Mapping[str, str], whole_help: str,
                 words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of commands; others: more words for some of them; whole_help: what is shown without one.

    words: every word that there is, for who mistypes one.
    """
    # no abbreviations: in a script they would break with the next option that we add
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    everywhere = common.add_argument_group("with every command")
    for flags, keywords in COMMON_OPTIONS:
        everywhere.add_argument(*flags, **keywords)
    parser = _Parser("releasectl", parents=[common], allow_abbrev=False)
    parser.whole_help = whole_help
    parser.words = words
    parser.add_argument("-V", "--version", action="version", version=f"releasectl {__version__}")
    top = parser.add_subparsers(metavar="COMMAND", required=True)
    groups: dict[str, Any] = {}
    named = {command.name: command for command in commands}
    for name, command in (*named.items(), *((word, named[meant]) for word, meant in others.items())):
        *group, word = name.split()
        place = top
        if group:
            if group[0] not in groups:
                in_group = sub_commands(commands, f"{group[0]} ")
                group_parser = top.add_parser(
                    group[0], parents=[common], allow_abbrev=False, help=", ".join(in_group))
                group_parser.words = in_group
                groups[group[0]] = group_parser.add_subparsers(metavar="COMMAND", required=True)
            place = groups[group[0]]
        sub = place.add_parser(word, parents=[common], allow_abbrev=False, help=command.help,
                               description=command.help)
        for flags, keywords in command.options:
            sub.add_argument(*flags, **keywords)
        sub.words = [flag for flags, _ in (*command.options, *COMMON_OPTIONS, HELP_OPTION) for flag in flags
                     if flag.startswith("-")]
        sub.set_defaults(run=command.run, command=command.name, needs_settings=command.needs_settings)
    return parser


def sub_commands(commands: Sequence[Command], group: str = "") -> dict[str, str]:
    """Return the words that may follow a group's name, each with its help."""
    parts = [(c.name[len(group):].split(), c.help) for c in commands if c.name.startswith(group)]
    return {words[0]: text if len(words) == 1 else ", ".join(p[1] for p, _ in parts if p[0] == words[0] and p[1:])
            for words, text in parts}


def screen_of_help(commands: Sequence[Command], groups: Sequence[tuple[str, Sequence[tuple[str, str]]]],
                   foot: str) -> str:
    """Return all commands by group, on one screen; groups: each with commands and what they are for."""
    word = Display(is_chinese=is_chinese(language_of(os.environ))).word
    lines = [word("releasectl COMMAND [options]: configuration versions to nodes, batch by batch"), ""]
    named = {word for _, rows in groups for names, _ in rows for word in re.findall(r"[a-z-]+", names)}
    more = [(command.name, command.help) for command in commands if command.name.split()[-1] not in named]
    for group, rows in (*groups, *([("More", more)] if more else [])):
        head = word(group)
        lines += [cut_to(f"{'' if number else head:<{9 - columns_of(head) + len(head)}}{names:<26}{word(text)}", 80)
                  for number, (names, text) in enumerate(rows)]
    return "\n".join([*lines, "", *map(word, foot.split("\n")), ""])


def settings_text(display: Display) -> str:
    """Return every setting with its meaning and default."""
    margin = max(len(setting.name) for setting in SETTINGS) + 2
    width = max(display.width - margin, 30) if display.width else 0
    lines = ["Settings come from the environment, else from KEY=VALUE lines in the file of --config, of "
             f"{CONFIG_VARIABLE} or, where it is there, {DEFAULT_CONFIG}."]
    for setting in SETTINGS:
        text = setting.help + (f" ({setting.default})" if setting.default else "")
        lines += [f"{'' if number else setting.name:<{margin}}{line}"
                  for number, line in enumerate(wrapped(text, width))]
    return "\n".join(lines)


# endregion


# region Completion
# ======================================================================================
# Completion: what the last word of a command line may become, from the table of
#   commands and from the database; and the scripts with which shells ask for that.
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Database, Overview, Arguments.
# ======================================================================================

# The hidden command: SHELL WORD ..., the last word being the one to complete.
COMPLETE = "__complete"
# The database has so long to answer; Python starts in 0.1 to 0.2 s, a file is read in 0.02 s.
ASK_WITHIN_S = 0.2
# Newest releases, and nodes, that are offered.
MAX_IDS_OFFERED, MAX_NAMES_OFFERED = 50, 200


class Offer(NamedTuple):
    """What a word may become."""
    word: str
    help: str = ""


class _Line(NamedTuple):
    """A command line that is being written."""
    # Without options and their values.
    words: list[str]
    # Values of options by flag.
    values: dict[str, str]
    # The option whose value is to be completed, "" for none.
    flag: str
    # What stands of the word to complete, and what stands before it in the same word (--status=).
    word: str
    before: str


def _read_line(words: Sequence[str], valued: Set[str]) -> _Line:
    """Return what stands on a line; valued: the options that take a value."""
    *earlier, last = words or [""]
    line, flag = _Line([], {}, "", last, ""), ""
    for word in earlier:
        name, equals, value = word.partition("=")
        if flag:
            line.values[flag], flag = word, ""
        elif word.startswith("-") and equals:
            line.values[name] = value
        elif word in valued:
            flag = word
        elif not word.startswith("-"):
            line.words.append(word)
    name, equals, value = last.partition("=")
    if not flag and last.startswith("-") and equals:
        return line._replace(flag=name, word=value, before=f"{name}=")
    return line._replace(flag=flag)


def completions(commands: Sequence[Command], others: Mapping[str, str], words: Sequence[str]) -> list[Offer]:
    """Return what the last of some words may become, as a whole word; nothing: a file, or whatever."""
    every = [*COMMON_OPTIONS, *(one for command in commands for one in command.options)]
    line = _read_line(words, {flag for flags, keywords in every for flag in flags
                              if flag.startswith("-") and takes_value(keywords)})
    typed = " ".join(line.words)
    typed = next((meant + typed[len(word):] for word, meant in others.items() if f"{typed} ".startswith(f"{word} ")),
                 typed)
    command = next((c for c in commands if f"{typed} ".startswith(f"{c.name} ")), None)
    known = [*(command.options if command else ()), *COMMON_OPTIONS, HELP_OPTION]
    if line.flag:
        keywords = next((keywords for flags, keywords in known if line.flag in flags), {})
        found = _values_of(keywords, line, commands)
    elif line.word.startswith("-"):
        found = [Offer(flag, str(keywords.get("help", "")) % {}) for flags, keywords in known for flag in flags
                 if flag.startswith("--")] + ([] if typed else [Offer("--version")])
    elif command is None:
        found = [Offer(word, text) for word, text in sub_commands(commands, f"{typed} " if typed else "").items()]
    else:
        count = len(typed.split()) - len(command.name.split())
        places = [keywords for flags, keywords in command.options if not flags[0].startswith("-")]
        is_list = bool(places) and places[-1].get("nargs") == "*"
        place = places[min(count, len(places) - 1)] if count < len(places) or is_list else None
        found = _values_of(place, line, commands) if place is not None else []
        found = [one for one in found if one.word not in line.words]
    return [one._replace(word=line.before + one.word) for one in found
            if one.word.startswith(line.word) and one.word.isprintable()]


def takes_value(keywords: Mapping[str, Any]) -> bool:
    """Return whether an option has a value, by its keywords of argparse."""
    return "action" not in keywords or keywords["action"] == "append"


def _values_of(keywords: Mapping[str, Any], line: _Line, commands: Sequence[Command]) -> list[Offer]:
    """Return what an option or a word of a command may be."""
    if keywords.get("choices"):
        return [Offer(str(word)) for word in keywords["choices"]]
    if keywords.get("metavar") == "COMMAND":
        return [*(Offer(*pair) for pair in sub_commands(commands).items()), Offer("settings", "the configuration")]
    read = _SOURCES.get(str(keywords.get("metavar")))
    return _ask(line, read) if read else []


def _ask(line: _Line, read: Callable[[Store, str], list[Offer]]) -> list[Offer]:
    """Return what the database of a line holds; nothing where it does not answer in time."""
    found: list[Offer] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever is wrong: the command itself will say it
            settings = Settings.load(os.environ, find_config(os.environ, line.values.get("--config", "")),
                                     line.values.get("--db", ""))
            store = Store(Database(settings.database_url, Metrics()))
            with contextlib.closing(store.database):
                store.database.require_schema()
                found.extend(read(store, line.word))

    thread = threading.Thread(target=ask, name="ask", daemon=True)  # it may wait for a server that is away
    thread.start()
    thread.join(ASK_WITHIN_S)
    return list(found)


def _releases(store: Store, _word: str) -> list[Offer]:
    page = store.releases.page(size=MAX_IDS_OFFERED)
    return [Offer(LATEST, "the newest release"),
            *(Offer(str(r.id), one_line("; ".join(filter(None, (r.status, r.reason))), 60)) for r in page.items)]


def _targets(store: Store, _word: str) -> list[Offer]:
    return [Offer(target) for target in store.releases.targets()]


def _node_names(store: Store, word: str) -> list[Offer]:
    return [Offer(name, address) for name, address in store.nodes.names(word, MAX_NAMES_OFFERED)]


def _label_pairs(store: Store, _word: str) -> list[Offer]:
    return [Offer(f"{key}={value}") for key, value in store.nodes.label_pairs()]


# From the placeholder of an option to what it stands for in the database.
_SOURCES: Mapping[str, Callable[[Store, str], list[Offer]]] = {
    "ID": _releases, "OTHER": _releases, "TARGET": _targets, "NODE": _node_names, "K=V": _label_pairs}


def _words_on(line: str) -> list[str]:
    """Return the words of a line of bash, behind the command's own, the last being what the cursor stands at."""
    for closing in ("", "'", '"'):  # the last word may have begun with a quote
        with contextlib.suppress(ValueError):
            words = shlex.split(f"{line}\0{closing}")  # the NUL makes a word of its own behind a space
            return [*words[1:-1], words[-1].replace("\0", "")]
    return [""]


def answer_shell(commands: Sequence[Command], others: Mapping[str, str], shell: str, words: Sequence[str]) -> str:
    """Return what a shell's script asks for: a line for each word that may stand there.

    bash breaks words at = and :, as COMP_WORDBREAKS says: it sends that and the whole line, and takes what follows.
    """
    start = 0
    if shell == "bash":
        *given, breaks, line = words
        words = [*given, *_words_on(line)]
        start = 1 + max(words[-1].rfind(char) if char in breaks else -1 for char in "=:@")
    lines: Mapping[str, Callable[[Offer], str]] = {
        "bash": lambda one: _shell_word(one.word[start:]),
        "zsh": lambda one: one.word.replace("\\", "\\\\").replace(":", "\\:") + f":{one.help}",
        "fish": lambda one: f"{one.word}\t{one.help}"}
    return "".join(lines[shell](one) + "\n" for one in completions(commands, others, words))


def _shell_word(text: str) -> str:
    return text if re.fullmatch(r"[\w@%+=:,./-]*", text) else "'" + text.replace("'", "'\\''") + "'"


# An installed command is asked by its name. For a copy that is not installed a script starts Python with this module,
# not as a program: Python keeps what it compiled of a module, which is most of what a short command takes. It is kept
# in the cache of the user, where that is a folder of the user alone.
_ASK = "import sys; sys.path.insert(0, sys.argv.pop(1)); import releasectl; sys.exit(releasectl.main())"
_BASH_CACHE = """    local -a cache=(-B)
    [[ ! -O ${HOME:-} ]] || cache=(-X "pycache_prefix=${XDG_CACHE_HOME:-$HOME/.cache}/releasectl")
"""
_COPIES: Mapping[str, tuple[str, str]] = {
    "bash": (_BASH_CACHE, '"${cache[@]}"'),
    "zsh": (_BASH_CACHE, "$cache"),
    "fish": ("""    set -l kept $HOME/.cache
    set -q XDG_CACHE_HOME; and set kept $XDG_CACHE_HOME
    set -l cache -B
    test -O "$HOME"; and set cache -X "pycache_prefix=$kept/releasectl"
""", "$cache"),
}
_SCRIPTS: Mapping[str, str] = {
    "bash": """# bash completion of releasectl {version}, made by `releasectl completion bash`
_releasectl() {{
{cache}    mapfile -t COMPREPLY < <({ask} {complete} bash {given} \\
        "$COMP_WORDBREAKS" "${{COMP_LINE:0:COMP_POINT}}" 2>/dev/null)
}}
complete -o default -F _releasectl releasectl releasectl.py""",
    # as a file in fpath, the script is the body of the function at its first call; else it is sourced
    "zsh": """#compdef releasectl releasectl.py
# zsh completion of releasectl {version}, made by `releasectl completion zsh`
_releasectl() {{
    local -a offers
{cache}    offers=("${{(@f)$({ask} {complete} zsh {given} \\
        "${{(@)words[2,CURRENT]}}" 2>/dev/null)}}")
    if [[ -n $offers ]]; then _describe -V releasectl offers; else _files; fi
}}
if [[ $funcstack[1] == _releasectl ]]; then _releasectl "$@"; else compdef _releasectl releasectl releasectl.py; fi""",
    "fish": """# fish completion of releasectl {version}, made by `releasectl completion fish`
function __releasectl_offers
    set -l words (commandline -opc)
    set -l word (commandline -ct)
{cache}    set -l offers ({ask} {complete} fish {given} $words[2..-1] "$word" 2>/dev/null)
    if set -q offers[1]
        printf '%s\\n' $offers
    else
        __fish_complete_path "$word"
    end
end
complete -c releasectl -k -f -a '(__releasectl_offers)'
complete -c releasectl.py -k -f -a '(__releasectl_offers)'""",
}
SHELLS = tuple(_SCRIPTS)


def completion_script(shell: str, config: str = "", db: str = "", command: str = "") -> str:
    """Return the script that completes commands in a shell of this host; config, db: options that it always gives.

    command: an installed one, which PATH finds; "" for this copy of the module.
    """
    given = [f"{flag} {_shell_word(value)}" for flag, value in (("--config", config), ("--db", db)) if value]
    cache, arguments = ("", "") if command else _COPIES[shell]
    folder = _shell_word(str(Path(__file__).resolve().parent))
    return _SCRIPTS[shell].format(
        given=" ".join(given), version=__version__, complete=COMPLETE, cache=cache,
        ask=command or f"{_shell_word(sys.executable)} -I {arguments} -c '{_ASK}' {folder}")


# endregion


# region Command line
# ======================================================================================
# Command line: the table of commands, the standard streams, main().
# Uses: Vocabulary, Helpers, Settings, Log and metrics, Plan, Releases, Requests,
#   Views, Commands, Upkeep commands, Node commands, Service, Arguments, Completion.
# ======================================================================================

def _age_s(text: str) -> float:
    """Parse a time of a day or more: an Idempotency-Key is kept for a day, with its release."""
    seconds = parse_duration(text)
    if not IDEMPOTENCY_KEY_S <= seconds <= 36500 * IDEMPOTENCY_KEY_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 1d to 36500d")
    return seconds


def _since(text: str) -> str:
    """Return a time as stored: of so long ago (90, 5m, 2h, 1d, 1w), as a table shows it, or RFC 3339.

    Raise argparse.ArgumentTypeError for anything else.
    """
    return _stored_time(text, -1)


def _time_to_come(text: str) -> str:
    """Do _since() for a time to come: in so long, and a time of day that is over today is tomorrow's."""
    return _stored_time(text, 1)


def _stored_time(text: str, direction: int) -> str:
    shown = re.fullmatch(r"(\d{4}-\d\d-\d\d)?(?:(?:^|(?<=\d) )(\d\d:\d\d(?::\d\d)?))?(Z?)", text)
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if shown and (shown[1] or shown[2]):
            zone = datetime.timezone.utc if shown[3] else None
            today = datetime.datetime.fromtimestamp(time.time(), zone).strftime("%Y-%m-%d")
            at = datetime.datetime.fromisoformat(f"{shown[1] or today} {shown[2] or '00:00'}").replace(tzinfo=zone)
            if direction > 0 and not shown[1] and at.timestamp() <= time.time():
                at += datetime.timedelta(days=1)
            return utc_text(at.timestamp())
    with contextlib.suppress(argparse.ArgumentTypeError, ValueError, OverflowError):
        return utc_text(time.time() + direction * parse_duration(text))
    with contextlib.suppress(AppError, ValueError, OverflowError):
        return utc_text(epoch_of(text))
    raise argparse.ArgumentTypeError(f"{text!r} is not a time like 5m, 2h, 1d, 1w, 2026-01-31, '2026-01-31 14:21' or "
                                     "2026-01-31T00:00:00Z")


def _token_end(text: str) -> str:
    """Return a date as it is, which means the whole day in UTC, and else do _time_to_come()."""
    return text if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII) else _time_to_come(text)


def _audit_head(text: str) -> tuple[int, str]:
    """Return the id and hash of ID:HASH, a head of the audit log; raise argparse.ArgumentTypeError else."""
    match = re.fullmatch(r"([0-9]{1,18}):([0-9a-f]{64})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID:HASH, as the log shows it at the end of each release")
    return int(match[1]), match[2]


def _release_id(text: str) -> int | str:
    if text == LATEST:
        return text
    try:
        return int(AFTER_IDS.from_text(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a release: use a number from `releasectl list`, or `latest`") from None


def _error_kinds(text: str) -> list[str]:
    try:
        return parse_kinds(text.split(","))
    except AppError as error:
        raise argparse.ArgumentTypeError(error.message) from None


_ID_OPTION = option("id", metavar="ID", type=_release_id, help="id of the release, or latest")
_REASON_OPTION = option("--reason", default="", metavar="TEXT", help="why, for the history")
_EMERGENCY_OPTION = option("--emergency", action="store_true",
                           help="it goes without an approval, and everybody is told so; needs --reason")
_PLAN_OPTION = option("--plan", action="store_true", help="show what it would do, and create nothing")
_AGAIN_OPTIONS = (
    _REASON_OPTION, option("--over-newer", action="store_true", help="also where a node has a newer success"),
    _EMERGENCY_OPTION, _PLAN_OPTION)
_WATCH_OPTIONS = (
    option("--until", type=parse_until, default=Until(), metavar="WHAT",
           help="wait until the release has ended (terminal), is paused (paused), or batch N is done (batch=N)"),
    option("--timeout", type=parse_duration, metavar="TIME",
           help="stop waiting after TIME (90, 5m) with exit 75; the release goes on"))
_WAIT_OPTIONS = (
    option("--wait", action="store_true", help="follow it to its end; exit 0 on success, 1 else"), *_WATCH_OPTIONS)
_STRATEGY_OPTIONS = tuple(option(flag, help=text, **(
    {"metavar": metavar, "action": "append"} if metavar in REPEATED else
    {"metavar": metavar, "type": parse} if metavar else {"action": "store_true", "default": None}))
                          for flag, _, parse, metavar, text in (*STRATEGY_OPTIONS, *VERIFY_OPTIONS))
_EXCLUDE_OPTION = option("--exclude", action="append", metavar="NODE",
                         help="not this node, or those with a name like 'edge-fra-*'; may be repeated")
_LABELS_HELP = "only nodes with this label: K=V, K=V1,V2 or 'K!=V'; may be repeated"
_NODE_OPTIONS = (
    option("--port", type=PORTS.argument, help="the agent's port (8443)"),
    option("--protocol", choices=PROTOCOLS, help="the agent's protocol (tasks)"),
    option("--status", choices=NODE_STATUSES, help="only online nodes get releases"),
    option("--enable", dest="enabled", action="store_true", default=None, help="it may get releases"),
    option("--disable", dest="enabled", action="store_false", default=None, help="it gets no releases"),
)


def command_completion(context: Context) -> int:
    shell = context.options.shell
    started_as = os.path.basename(sys.argv[0])
    script = completion_script(shell, context.options.config, safe_url(context.options.db),
                               started_as if started_as == "releasectl" else "")
    return context.show({"shell": shell, "script": script}, script, is_data=True)


def command_help(context: Context) -> int:
    words = context.options.words
    if words == ["settings"]:
        settings = [{"name": s.name, "default": s.default, "help": s.help} for s in SETTINGS]
        return context.show({"items": settings}, settings_text(context.display), is_data=True)
    _parser(words).parse_args([*words, "--help"])
    return EXIT_DONE


COMMANDS: tuple[Command, ...] = (
    Command("serve", "API and executor in one process, until SIGTERM or SIGINT", command_serve, (
        option("--api", action="store_true", help="the API alone: other processes send releases out"),
        option("--executor", action="store_true", help="the executor alone: nothing listens"))),
    Command("run-once", "one tick of the executor, then exit", command_run_once, (
        option("--drain", action="store_true", help="repeat until nothing is left to do"),
        option("--metrics-file", default="", metavar="FILE",
               help="write figures there for node_exporter's textfile collector: a name that ends with .prom"))),
    Command("migrate", "bring the database to this schema.sql", command_migrate, (
        option("--first-version", type=NAMED_VERSIONS.argument, metavar="N",
                    help="number new releases from N on: after a restore, or where agents have higher versions"),)),
    Command("node add", "add a node", command_node_add, (
        option("name", metavar="NAME"), option("ip", metavar="IP", help="IP address or host name"),
        option("--label", action="append", metavar="K=V", help="a label; may be repeated"), *_NODE_OPTIONS)),
    Command("node list", "list the nodes, what each runs, and which do not run what they should", command_node_list, (
        option("names", nargs="*", metavar="NODE", help="only these; * and ? stand for other characters: 'edge-fra-*'"),
        option("--drift", choices=DRIFTS, help="only nodes with this drift"),
        option("--label", action="append", metavar="K=V", help=_LABELS_HELP), _EXCLUDE_OPTION,
        option("--runs", type=_release_id, metavar="ID", help="only nodes that run this release, or latest"),
        option("--search", default="", metavar="TEXT", help="only nodes with this in name, address or labels"),
        option("--sort", choices=QUERY_PARAMETERS["sort"]["enum"], default="id", metavar="KEY",
               help="id, name, address, runs, or drift with the worst first; backwards: --sort=-runs (id)"))),
    Command("node show", "a node: what it runs and should run, what it was given, who changed it", command_node_show, (
        option("name", metavar="NODE"),)),
    Command("node rm", "delete a node that no release names", command_node_rm, (option("name", metavar="NODE"),)),
    Command("node set", "change nodes, all or none", command_node_set, (
        option("names", nargs="*", metavar="NODE", help="these; * and ? stand for other characters: 'edge-fra-*'"),
        option("--where", action="append", metavar="K=V",
               help="of these, or of all, those with this label: K=V, K=V1,V2 or 'K!=V'; may be repeated"),
        _EXCLUDE_OPTION, option("--rename", metavar="NAME"), option("--ip"),
        option("--label", action="append", metavar="K=V", help="replaces all labels that they have; may be repeated"),
        *_NODE_OPTIONS)),
    Command("node import", "add nodes from a file, all or none: a JSON array, or lines NAME IP [PORT [PROTOCOL]]",
            command_node_import, (
                option("file", metavar="FILE", help="- for standard input; takes what `node list --json` printed"),
                option("--update", action="store_true", help="change the nodes whose name exists"))),
    Command("node ping", "ask agents whether they answer", command_node_ping, (
        option("names", nargs="*", metavar="NODE", help="these, or those with a name like 'edge-fra-*'; none: every "
                                                        "enabled node"),
        option("--label", action="append", metavar="K=V", help=_LABELS_HELP), _EXCLUDE_OPTION)),
    Command("token add", "make a token for the API, and print it once", command_token_add, (
        option("name", metavar="NAME", help="the name in the history"),
        option("--role", choices=(VIEWER, OPERATOR), required=True, help="viewer reads, operator acts"),
        option("--expires", type=_token_end, metavar="DATE",
               help="its last day (UTC), like 2026-12-31; or 90d, or a time, like 2026-12-31T22:00:00Z (never)"),
        option("--targets", default="", metavar="TARGET[,TARGET]",
               help="an operator acts on releases of these alone, and changes no nodes (all)"))),
    Command("create", "create a release for the enabled, online nodes", command_create, (
        option("--payload", metavar="FILE", help="JSON object for the agents; - for standard input"),
        _REASON_OPTION, option("--target", default="cdn", metavar="TARGET", help="what it is for (cdn)"),
        option("--node", action="append", metavar="NODE",
               help="only to this node, or those with a name like 'edge-fra-*'; may be repeated"),
        option("--label", action="append", metavar="K=V", help=_LABELS_HELP), _EXCLUDE_OPTION,
        option("--version", type=NAMED_VERSIONS.argument, metavar="N", help="a higher version than the next one"),
        option("--supersede", action="store_true", help="cancel the releases of the target that have not started"),
        option("--approval", action="store_true", help="it starts when somebody else has approved it"),
        _EMERGENCY_OPTION, *_STRATEGY_OPTIONS, _PLAN_OPTION,
        option("--check-agents", action="store_true", help="ask its agents whether they answer, and create nothing"),
        *_WAIT_OPTIONS)),
    Command("list", "list releases, newest first", command_list, (
        option("--status", choices=RELEASE_STATUSES, help="only those of this status"),
        option("--target", default="", metavar="TARGET", help="only those of this target"),
        option("--search", default="", metavar="TEXT", help="only those with this in id, version (v42), target, "
                                                             "reason or state"),
        option("--since", type=_since, metavar="TIME", help="only those made since then: 2h or 7d ago, "
                                                            "2026-01-31, or a time as tables show it"),
        option("--node", default="", metavar="NODE", help="only those that have this node"),
        option("--page", type=PAGES.argument, default=1), option("--page-size", type=PAGE_SIZES.argument, default=20))),
    Command("status", "a release, its batches and the nodes that are not well; without ID: what is wrong, worst first",
            command_status, (
                option("id", metavar="ID", nargs="?", type=_release_id, help="id of the release, or latest"),
                option("--all", action="store_true", help="every node and every batch"),
                option("--health", action="store_true", help="without ID: exit 1 where something is wrong"))),
    Command("watch", "follow a release to its end", command_watch, (
        option("id", metavar="ID", nargs="?", default=LATEST, type=_release_id,
               help="id of the release, or latest (latest)"), *_WATCH_OPTIONS)),
    Command("why", "what a release waits for, and what would mend it; exit 0: it moves, or none is open; 1: it is "
            "stopped", command_why, (option(
                "id", metavar="ID", nargs="?", type=_release_id,
                help="id of the release, or latest (the first that is stopped, else runs, else failed last)"),)),
    Command("events", "the history of a release, the newest last", command_events, (
        _ID_OPTION, option("-f", "--follow", action="store_true", help="go on until the release has ended"),
        option("--after", type=AFTER_IDS.argument, metavar="EVENT",
               help="the first ones with a higher id (without it: the newest)"),
        option("--limit", type=Range(1, 10**7).argument, default=1000, metavar="N", help="at most N (1000)"))),
    Command("payload", "the payload of a release, as it was sent but for the version", command_payload, (_ID_OPTION,)),
    Command("diff", "what a release changes against another one; exit 0: nothing, 1: something", command_diff, (
        _ID_OPTION, option("other", metavar="OTHER", nargs="?", type=_release_id,
                           help="against this release, or latest (the newest one of its target before it that "
                                "succeeded)"))),
    Command("audit", "who did what, newest last; whether the log is whole", command_audit, (
        option("--actor", default="", metavar="NAME", help="only by this actor, token or certificate"),
        option("--action", default="", metavar="WORD", help="only this action, or group: node.set, node"),
        option("--object", default="", metavar="TEXT", help="only on this: \"node edge-1\""),
        option("--release", type=_release_id, metavar="ID", help="only on this release, or latest"),
        option("--since", type=_since, metavar="TIME", help="only since then: 2h or 7d ago, "
                "2026-01-31, or a time as tables show it"),
        option("--after", type=AFTER_IDS.argument, default=0, metavar="ROW",
                    help="the first rows with a higher id (without it: the newest rows)"),
        option("--limit", type=Range(1, 100000).argument, default=100, metavar="N", help="at most N rows (100)"),
        option("--verify", action="store_true",
               help="prove that no row was changed, taken away or inserted, nor an event of an ended release; "
                     "exit 1 where one was"),
        option("--head", type=_audit_head, metavar="ID:HASH",
               help="with --verify: a copy of the head, from the log of a release's end"))),
    Command("approve", "let a release start that somebody else made", command_act, (
        _ID_OPTION, _REASON_OPTION, _EMERGENCY_OPTION)),
    Command("pause", "dispatch nothing more until resume", command_act, (_ID_OPTION, _REASON_OPTION)),
    Command("resume", "continue a paused release", command_act, (
        _ID_OPTION, _REASON_OPTION,
        option("--accept-failures", action="store_true", help="failures so far no longer count"))),
    Command("cancel", "end a release; nodes in flight are waited for", command_act, (
        _ID_OPTION, _REASON_OPTION,
        option("--force", action="store_true",
               help="do not wait for nodes in flight: their outcome stays unknown"))),
    Command("retry", "a new release for the failed and skipped nodes of one", command_again,
            (_ID_OPTION,
             option("--kind", type=_error_kinds, default=(), metavar="KIND[,KIND]",
                    help="only nodes that failed as this, like unreachable,timeout; skipped ones have no kind"),
             option("--node", action="append", metavar="NAME",
                    help="only this node; * and ? stand for other characters; may be repeated"),
             option("--label", action="append", metavar="K=V", help=_LABELS_HELP), _EXCLUDE_OPTION,
             *_AGAIN_OPTIONS, *_WAIT_OPTIONS)),
    Command("rollback", "a new release that brings back what the nodes of one had before", command_again,
            (_ID_OPTION, option("--to", type=_release_id, metavar="ID",
                                help="the payload of this release, or latest (what most of the nodes had before)"),
             option("--now", action="store_true",
                    help="go first, and cancel the releases of the target that have not started"),
             option("--during-freeze", action="store_true", help="go out in a freeze too; needs --reason"),
             *_AGAIN_OPTIONS, *_WAIT_OPTIONS)),
    Command("catch-up", "a new release for each one that nodes are behind with", command_catch_up, (
        _REASON_OPTION, *_STRATEGY_OPTIONS, _PLAN_OPTION)),
    Command("freeze", "stop (on) or allow (off) new dispatches, of all processes; without argument: show",
            command_freeze, (
                option("switch", nargs="?", choices=("on", "off"), metavar="on|off"), _REASON_OPTION,
                option("--target", metavar="TARGET", help="only for releases of this target (all)"),
                option("--until", type=_time_to_come, metavar="TIME",
                       help="over by itself in 2h or 7d, at 06:00, on '2026-01-31 14:21' or 2026-01-31T00:00:00Z"),
                option("--emergency", action="store_true",
                       help="lift it without a second person, and everybody is told so; needs --reason"))),
    Command("check", "configuration, certificates, database, agents: what is wrong and how to fix it",
            command_check, (option("--notify", action="store_true", help="send a test notification now"),)),
    Command("backup", "a checked copy of an SQLite database, also while it is in use", command_backup, (
        option("file", metavar="FILE", help="a new file; it gets mode 0600"),)),
    Command("prune", "delete old releases with their history; what a rollback needs stays", command_prune, (
        option("--older-than", type=_age_s, required=True, metavar="TIME", help="ended longer ago than that: 90d"),
        option("--keep", type=Range(1, 10**9).argument, default=10, metavar="N",
               help="keep the newest N of each target (10)"),
        option("--dry-run", action="store_true", help="show what would be deleted, and delete nothing"))),
    Command("help", "what a command takes; help settings: the configuration", command_help, (
        option("words", nargs="*", metavar="COMMAND", help="a command, or settings"),), needs_settings=False),
    Command("version", "version and SHA-256 of this file, and what it runs on", command_version,
            needs_settings=False),
    Command("completion", "print a script that completes these commands in a shell", command_completion, (
        option("shell", choices=SHELLS, metavar="|".join(SHELLS)),), needs_settings=False),
)


# Other words for commands.
OTHER_WORDS = {"ls": "list", "show": "status", "logs": "events", "nodes": "node list", "undo": "rollback"}
HELP_GROUPS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("See", (("list, status, watch", "releases; one, what is wrong; one as it goes"),
             ("why, events", "what one waits for, what mends it; its past"),
             ("payload, diff, audit", "what one sends; changes in that; who did what"))),
    ("Release", (("create", "to all nodes or some; --plan shows it before"),
                 ("retry, rollback", "failed nodes again; back to what was before"),
                 ("catch-up", "to nodes that are behind"))),
    ("Steer", (("approve, cancel", "let one start that waits; end one"),
               ("pause, resume", "hold one; let it go on"),
               ("freeze on|off", "all releases, or those of one target"))),
    ("Nodes", (("node list|show|ping", "what they run; one's history; who answers"),
               ("node add|set|rm|import", "which nodes there are"))),
    ("Run", (("serve, run-once", "API and executor; one tick of it, for cron"),
             ("check, migrate", "what is wrong, what mends it; the schema"),
             ("backup, prune, token add", "a copy; less history; a token for the API"))),
    ("Help", (("help COMMAND", "what it takes; help settings: all settings"),
              ("completion, version", "for bash, zsh and fish; what this runs on"))))
HELP_FOOT = """ID is a number or latest. Everywhere: --json --utc --color WHEN -q -v --db URL
--config FILE. Other words: ls (list), show (status), logs (events),
nodes (node list), undo (rollback). Exit 0 done, 1 ended other than success,
2 usage, 3 not found or wrong state, 69 out of reach, 75 try later."""


class StandardStream:
    """A standard stream on which print never fails: what can't be written (no reader, disk full) is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        # The first error.
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it; return its length."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.error = self.error or error
            return len(text)

    def flush(self) -> None:
        """Flush the stream; keep an error instead of raising it."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def end(self) -> None:
        """Drop what could not be written: the interpreter would try again, and exit with 120."""
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError):  # the stream has no descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def _lost(stream: Any) -> Exception | None:
    """Return why something could not be written though its reader is there, None where nothing was lost."""
    error: Exception | None = getattr(stream, "error", None)
    return None if isinstance(error, BrokenPipeError) else error


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Run without failing on the standard streams: a closed one becomes /dev/null, and print never fails.

    Otherwise a file that is opened later, such as the database, would get the number of a closed stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each open() gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - to the end of the process
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        # whatever the locale: JSON is UTF-8, and bytes of a path that are not UTF-8 become an escape
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    out, err = StandardStream(sys.stdout), StandardStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        out.end()
        error = _lost(out)
        if error is not None:
            print(f"releasectl: standard output can't be written: {os_reason(error)}", file=sys.stderr)
        err.end()
        sys.stdout, sys.stderr = before


# Options that hold a path, which on Linux may be any bytes but NUL.
PATH_OPTIONS = frozenset(("config", "db", "payload", "file", "metrics_file"))


def _refuse_not_utf8(options: argparse.Namespace) -> None:
    """Raise AppError for an option that is not UTF-8, unless it holds a path."""
    for name, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            if name not in PATH_OPTIONS and isinstance(text, str) and not is_utf8(text):
                raise AppError(MALFORMED, f"the argument {one_line(text, 60)!r} is not UTF-8")


# Commands that do nothing but answer: where the answer could not be written, nothing was done.
READ_ONLY = frozenset(("list", "status", "watch", "why", "events", "payload", "diff", "audit", "check", "version",
                     "completion", "help", "node list", "node show", "node ping"))


def _only_reads(options: argparse.Namespace) -> bool:
    is_trial = getattr(options, "plan", False) or getattr(options, "dry_run", False)
    return options.command in READ_ONLY or is_trial or (options.command == "freeze" and options.switch is None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Errors are one line on standard error."""
    with standard_streams():
        return _main(sys.argv[1:] if arguments is None else arguments)


def run_process() -> NoReturn:
    """Run one command as all that this process does, and exit."""
    gc.freeze()  # what was imported lives to the end: no collection looks at it again, nor does the one at the exit
    gc.enable()  # the launcher of `make install` disables it for the import
    sys.exit(main())


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for some words: it has the commands that they may name, as all would take 50 ms to make."""
    others = {word: meant for word, meant in OTHER_WORDS.items() if word in words}
    named = {*words, *(meant.partition(" ")[0] for meant in others.values())}
    commands = [command for command in COMMANDS if command.name.partition(" ")[0] in named]
    return build_parser(commands, others, screen_of_help(COMMANDS, HELP_GROUPS, HELP_FOOT),
                        [*sub_commands(COMMANDS), *OTHER_WORDS])


def _main(words: Sequence[str]) -> int:
    try:
        if words[:1] == [COMPLETE]:
            print(answer_shell(COMMANDS, OTHER_WORDS, words[1], words[2:]), end="")
            return EXIT_DONE
        if not words:
            _parser(words).print_help(sys.stderr)
            return EXIT_USAGE
        options = _parser(words).parse_args(words, argparse.Namespace(**COMMON_DEFAULTS))
        _refuse_not_utf8(options)
        context = Context(options)
        set_up_log(context.settings, options.command, options.quiet, options.verbose)
        with contextlib.closing(context.store.database):
            code: int = options.run(context)
        return code or (EXIT_UNAVAILABLE if _only_reads(options) and _lost(sys.stdout) else EXIT_DONE)
    except AppError as error:
        print(f"{'<3>' if is_journal() else ''}releasectl: {one_line(with_options(error.message), 500)}",
              file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


# endregion


if __name__ == "__main__":
    run_process()
