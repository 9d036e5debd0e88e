#!/usr/bin/env python3
"""releasectl: brings configuration versions to edge nodes, batch by batch, over mutual TLS.

    python releasectl.py serve          API and executor in one process
    python releasectl.py run-once       one tick of the executor, for cron
    python releasectl.py --help         every command

One file, standard library only; a PostgreSQL driver is loaded for a postgresql:// URL alone.
The floors, in order; each uses only the ones above it:

     1 Vocabulary      status words, error kinds, codes, limits, the exceptions
     2 Helpers         time, one-line text, strict JSON, figures for /metrics
     3 Settings        one table of the configuration
     4 Database        connection factory, transactions, migrations; where the engines differ
     5 Plan            what a release will do: batches, node addresses, payloads; pure
     6 Sentences       what a release is doing or waiting for; pure
     7 Decision        what to write and what to send next; pure
     8 Store           every SQL statement of the domain
     9 Conversations   waiting for many sockets in one thread
    10 Agent client    mutual TLS, deadlines, the two dialects
    11 Executor        claim, lease, and the loop that joins 7, 8 and 10
    12 Shapes          the JSON of the API and the command line
    13 Page            the dashboard's document, one raw string
    14 HTTP            one connection's bytes against limits and deadlines, and who may stay
    15 API             routes and their handlers, tokens, /openapi.json
    16 Server          a request from its first byte to its answer, TLS, the listener
    17 Check           what is wrong with an installation
    18 Screen          what a person sees in a terminal
    19 Commands        what each command does
    20 Command line    the table of commands, the parser, completion, main()

How a release flows through them is drawn in docs/ARCHITECTURE.md.
"""
from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import faulthandler
import fcntl
import functools
import getpass
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import os
import platform
import queue
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
from collections.abc import Collection, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import (
    Any,
    Callable,
    NamedTuple,
    NoReturn,
    TextIO,
    TypeVar,
    cast,
)

# ======================================================================================
# 1 Vocabulary: the contract's words and numbers, and the exceptions. Uses nothing.
# ======================================================================================

__version__ = "0.1.0"

PENDING, RUNNING, PAUSED, CANCELLING = "pending", "running", "paused", "cancelling"
SUCCESS, PARTIAL, FAILED, CANCELLED, SKIPPED = "success", "partial", "failed", "cancelled", "skipped"
RELEASE_STATUSES = (PENDING, RUNNING, PAUSED, CANCELLING, SUCCESS, PARTIAL, FAILED, CANCELLED)
TERMINAL = frozenset((SUCCESS, PARTIAL, FAILED, CANCELLED))
ACTIVE = frozenset((RUNNING, PAUSED, CANCELLING))
AT_REST = frozenset((SUCCESS, FAILED, SKIPPED))
OPEN = frozenset((PENDING, RUNNING))

NODE_STATUSES = ("online", "offline", "maintenance")
PROTOCOLS = (TASKS, EXECUTE) = ("tasks", "execute")

# The operations that go to an agent; a probe goes to what the node serves (verify).
DISPATCH, QUERY, PING, PROBE = "dispatch", "query", "ping", "probe"

UNREACHABLE, TLS, TIMEOUT, HTTP, PROTOCOL = "unreachable", "tls", "timeout", "http", "protocol"
REJECTED, AGENT_FAILED, VERIFY, DEADLINE, ABANDONED = "rejected", "agent_failed", "verify", "deadline", "abandoned"
ERROR_KINDS = (UNREACHABLE, TLS, TIMEOUT, HTTP, PROTOCOL, REJECTED, AGENT_FAILED, VERIFY, DEADLINE, ABANDONED)

# What a look for work found (metrics).
IDLE, WORKED, BUSY, ERROR = "idle", "worked", "busy", "error"

EXIT_DONE, EXIT_NOT_SUCCESS, EXIT_USAGE, EXIT_STATE, EXIT_UNAVAILABLE, EXIT_BUSY = 0, 1, 2, 3, 69, 75

# Error code of the API (contract section 5): HTTP status, exit code of the command line.
ERROR_CODES: Mapping[int, tuple[int, int]] = {
    1001: (401, EXIT_USAGE),        # no token
    1002: (401, EXIT_USAGE),        # bad token
    1004: (403, EXIT_USAGE),        # not allowed
    2001: (400, EXIT_USAGE),        # missing parameter
    2002: (400, EXIT_USAGE),        # malformed
    2003: (400, EXIT_USAGE),        # value not allowed
    3001: (404, EXIT_STATE),        # not found
    3002: (409, EXIT_STATE),        # exists
    3003: (409, EXIT_STATE),        # wrong state
    4005: (405, EXIT_USAGE),        # method not allowed
    4008: (408, EXIT_UNAVAILABLE),  # the request did not come in time
    4013: (413, EXIT_USAGE),        # body too large
    4014: (414, EXIT_USAGE),        # address too long
    4015: (415, EXIT_USAGE),        # not JSON
    4029: (429, EXIT_BUSY),         # too many requests
    4031: (431, EXIT_USAGE),        # head too large
    5001: (500, EXIT_UNAVAILABLE),  # internal
    5002: (503, EXIT_UNAVAILABLE),  # database
    5003: (503, EXIT_BUSY),         # every connection is taken
    5004: (501, EXIT_USAGE),        # not implemented: Transfer-Encoding
    5005: (505, EXIT_USAGE),        # another version of HTTP
}

MAX_VERSION = 2**53
MAX_ID = 2**63 - 1
MAX_MESSAGE_CHARS = 255
MAX_DETAIL_BYTES = 4096
MAX_BODY_BYTES = 1 << 20
MAX_PAGE_SIZE = 100
MAX_NODES = 1_000_000
MAX_BATCHES = 1000
MAX_JSON_DEPTH = 64
# Of a whole number in JSON. Python 3.9 and 3.10.0 to 3.10.6 have no limit of their own.
MAX_INTEGER_DIGITS = 4000
# Of a node: how many labels, and characters of a key and of a value.
MAX_LABELS, MAX_LABEL_KEY_CHARS, MAX_LABEL_CHARS = 64, 63, 255

# How soon a running task is asked for first, and by what the wait grows until the interval.
FIRST_POLL_S, POLL_GROWTH = 0.05, 1.3
# The look that follows a dispatch at once ends so soon: it holds up the word that the task was taken.
FIRST_LOOK_S = 1.0
# Waits between tries of a request that failed.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 10.0
# An execute agent whose connection was cut is sent nothing for so long (contract section 1).
CUT_HOLD_S = 5.0
# Between two probes of a row of successes.
PROBE_AGAIN_S = 1.0
# How long outcomes are gathered for one commit, while many requests are in flight.
GATHER_S = 0.02
# A clean stop waits so long for requests in flight.
STOP_GRACE_S = 5.0
# A thread that has not turned for so long, beyond its own wait, hangs: longer than the database may take.
HUNG_AFTER_S = 180.0
# The largest values of the settings that decide how long a claim and an execute agent's hold may last. A stored
# time that lies further ahead was written by a clock that was wrong, and counts as over.
MAX_CLAIM_TTL_S, MAX_CONNECT_TIMEOUT_S, MAX_REQUEST_TIMEOUT_S = 3600, 600, 3600
MAX_HOLD_S = float(MAX_CONNECT_TIMEOUT_S + MAX_REQUEST_TIMEOUT_S)
# After a failover that may have lost releases, new ones are numbered from so much further on.
VERSIONS_SKIPPED = 1000
# What a person may name leaves so many versions: one slip must not use them up.
MAX_NAMED_VERSION = 2**53 - 1_000_000

log = logging.getLogger("releasectl")


class AppError(Exception):
    """An error that an operator or a client can cause: one line, and a code of the API."""

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
        super().__init__(2003, message)


class DatabaseError(AppError):
    """The database refused or is out of reach. Whether a commit took place is not known."""

    def __init__(self, message: str):
        super().__init__(5002, message, retry_after_s=2)


class UnstorableValue(AppError):
    """A value that the database can't hold: no later try would store it."""

    def __init__(self, message: str):
        super().__init__(2003, message)


class ClaimLost(Exception):
    """The release has another owner now, or none: whatever was to be written was not."""


class StateMoved(Exception):
    """Somebody changed the release since it was read: nothing was written, read again."""


class AgentError(Exception):
    """An agent that could not be spoken with, or said what can't be used.

    kind: the error_kind of the contract. reached: whether the agent may have got the request.
    hold_s: how long an execute agent may still be busy with it. final: no further try helps.
    is_held: the request was kept back by ourselves, so the agent is not to blame. is_refusal: the answer says
    that nothing was done (429, 503, a redirect).
    """

    def __init__(self, kind: str, message: str, reached: bool, hold_s: float = 0.0, final: bool = False,
                 detail: str = "", is_held: bool = False, is_refusal: bool = False):
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.reached = reached
        self.hold_s = hold_s
        self.final = final
        self.is_held = is_held
        self.is_refusal = is_refusal
        self.detail = detail or message


# ======================================================================================
# 2 Helpers: time, one-line text, strict JSON, figures for /metrics; nothing that knows a release.
# ======================================================================================

class Clock:
    """The two clocks. Tests bring their own."""

    @staticmethod
    def wall() -> float:
        """Gives seconds since 1970: only for what is stored."""
        return time.time()

    @staticmethod
    def elapsed() -> float:
        """Gives seconds that also count while the machine sleeps: for durations and leases."""
        if hasattr(time, "CLOCK_BOOTTIME"):
            return time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.monotonic()

    @staticmethod
    def boot() -> str:
        """Return what elapsed() counts from: equal for all processes that may compare their elapsed times."""
        return _boot_id()


@functools.lru_cache(maxsize=1)
def _boot_id() -> str:
    with contextlib.suppress(OSError):
        if hasattr(time, "CLOCK_BOOTTIME"):
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return secrets.token_hex(8)  # of this process alone


@functools.lru_cache(maxsize=64)  # all rows of one commit have one time
def utc_text(epoch_s: float) -> str:
    """Gives seconds since 1970 as RFC 3339, UTC, milliseconds, Z (contract section 2)."""
    whole_ms = round(epoch_s * 1000)
    moment = datetime.datetime.fromtimestamp(whole_ms // 1000, datetime.timezone.utc)
    # not %Y: it writes the year 999 as 999, and stored times are compared as text
    return f"{moment.year:04d}-{moment:%m-%dT%H:%M:%S}.{whole_ms % 1000:03d}Z"


def epoch_of(text: str) -> float:
    """Gives the seconds since 1970 of an RFC 3339 time; ValueError for anything else."""
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment.timestamp()


def _printable(char: str, keep_lines: bool) -> str:
    if keep_lines and char == "\n":
        return char
    # Cc control, Cf format (bidi overrides), Cs lone surrogate, Zl and Zp line separators
    return " " if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char


def one_line(text: object, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    """Gives any text as one printable line of at most max_chars characters (contract section 3)."""
    # what can't be in the result is cut off before it is looked at: an agent's text may be long
    line = str(text)[: 16 * max_chars]
    if not line.isprintable():
        line = "".join(_printable(c, False) for c in line)
    line = " ".join(line.split())
    return line if len(line) <= max_chars else line[: max_chars - 3].rstrip() + "..."


def is_utf8(text: str) -> bool:
    """Return whether a text from outside was UTF-8: bytes that are not come in as lone surrogates (PEP 383)."""
    return not re.search("[\ud800-\udfff]", text)


def detail_text(text: object) -> str:
    """Gives any text as an event's detail: printable, lines kept, at most 4 KiB of UTF-8."""
    clean = "".join(_printable(c, True) for c in str(text)[:MAX_DETAIL_BYTES]).strip()
    return clean.encode()[:MAX_DETAIL_BYTES].decode(errors="ignore")


# Letters and marks that are drawn as nothing, beside the format characters (Cf): grapheme joiner, Hangul fillers,
# Khmer inherent vowels, variation selectors, the Khitan filler, the empty note head, the empty Braille pattern.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                       "\U00016fe4\U0001d159\U000e0100-\U000e01ef]")
_LOOK_ALIKE_SCRIPTS = frozenset(("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "CHEROKEE"))
# What is_plain() takes, for whoever is refused.
PLAIN_TEXT = ("printable characters, none of them invisible or changing the direction, without space around, in "
              "composed form (NFC), and no word that mixes Latin letters with Greek or Cyrillic ones")


def is_plain(text: str) -> bool:
    """Return whether a text reads as what it is, so that no two look the same: see PLAIN_TEXT."""
    if not text.isprintable() or one_line(text, len(text) + 1) != text:
        return False
    if text.isascii():
        return True
    # a mark over a letter does not part a word
    letters = "".join(char for char in text if not unicodedata.category(char).startswith("M"))
    return (not INVISIBLE.search(text) and unicodedata.is_normalized("NFC", text)
            and all(len(_scripts(word)) < 2 for word in re.findall(r"[^\W_]+", letters)))


def _scripts(word: str) -> set[str]:
    """Return the scripts of a word, as far as their letters are taken for one another's."""
    return {unicodedata.name(char, "").split(" ")[0] for char in word} & _LOOK_ALIKE_SCRIPTS


def epoch_or(text: str | None, otherwise: float) -> float:
    """Gives the seconds since 1970 of a stored time; another value where there is none that can be read."""
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
    """Return a number; raise ValueError for one whose reading would take a while, for int() is quadratic."""
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"{one_line(digits, 40)} is too long a number: at most {MAX_INTEGER_DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0:  # 1e999
        raise ValueError(f"{one_line(digits, 40)} is too large a number")
    return number


def _nesting(value: object) -> int:
    """Gives the depth of a JSON value, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
    return depth


# Made once: json.loads() makes one for each text, which takes longer than a short text.
_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite,
                            parse_int=_bounded_integer)
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def parse_json(data: bytes | str) -> Any:
    """Reads JSON strictly: UTF-8, no duplicate keys, no NaN, bounded nesting; ValueError else."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = _DECODER.decode(text)
        if "\\u" in text or not isinstance(data, bytes):
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate can't be stored
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _nesting(value) > MAX_JSON_DEPTH:
        raise ValueError("nested too deep")
    return value


def to_json(value: object) -> str:
    """Gives a value as compact JSON in one line."""
    return _ENCODER.encode(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Gives ' (did you mean X?)' for a near miss, else ''."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"
# Name of a metric and the values of its labels: its figure.
Figures = Mapping[tuple[str, ...], float]


class Metric(NamedTuple):
    """One metric of /metrics. words: for each label all its values, where they are known before."""
    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    words: tuple[tuple[str, ...], ...] = ()


# No label holds an id or a name of a node: the number of series must not grow with the use.
METRICS: tuple[Metric, ...] = (
    Metric("releasectl_build_info", GAUGE, "Version of releasectl and of its Python, always 1.", ("version", "python")),
    Metric("releasectl_database_up", GAUGE, "Whether the database answered when this was asked for (1), or not (0)."),
    Metric("releasectl_database_errors_total", COUNTER, "Transactions that failed at the database."),
    Metric("releasectl_database_went_back_total", COUNTER,
           "How often the database was found in an earlier state than this process had seen: a restore, or a failover "
           "that lost commits."),
    Metric("releasectl_releases", GAUGE, "Releases in the database.", ("target", "status")),
    Metric("releasectl_release_nodes", GAUGE, "Nodes of the active releases.", ("target", "status")),
    Metric("releasectl_release_last_event_timestamp_seconds", GAUGE,
           "When the status of an active release or of one of its nodes changed last.", ("target", "status")),
    Metric("releasectl_nodes", GAUGE, "Enabled nodes.", ("status",)),
    Metric("releasectl_frozen", GAUGE, "Whether the freeze is on (1), or not (0)."),
    Metric("releasectl_ticks_total", COUNTER, "Looks for work, by what they found.", ("outcome",),
           ((IDLE, WORKED, BUSY, ERROR),)),
    Metric("releasectl_last_tick_timestamp_seconds", GAUGE,
           "When work was last looked for without an error, 0 for not yet. Only where the executor is on."),
    Metric("releasectl_takeovers_total", COUNTER, "Releases taken over from a process whose claim had run out."),
    Metric("releasectl_node_failures_total", COUNTER, "Nodes of releases that failed.", ("error_kind",),
           (ERROR_KINDS,)),
    Metric("releasectl_agent_requests_total", COUNTER, "Requests to agents and probes of nodes, by how they ended.",
           ("operation", "outcome"), ((DISPATCH, QUERY, PROBE), (SUCCESS, *ERROR_KINDS[:-2]))),
    Metric("releasectl_agent_request_duration_seconds", HISTOGRAM, "How long they took, with connecting.",
           ("operation",)),
    Metric("releasectl_api_requests_total", COUNTER, "Requests that the API answered.", ("route", "method", "status")),
    Metric("releasectl_certificate_expiry_timestamp_seconds", GAUGE,
           "Until when a certificate is good; of several in a file the first to end.", ("certificate",)),
    Metric("process_start_time_seconds", GAUGE, "When this process started."),
    Metric("process_cpu_seconds_total", COUNTER, "Processor time that it used."),
    Metric("process_resident_memory_bytes", GAUGE, "Memory that it has in use."),
    Metric("process_open_fds", GAUGE, "File descriptors that it has open."),
    Metric("process_threads", GAUGE, "Threads that it has."),
)
# Upper ends of the histogram's buckets, seconds: an agent's word takes milliseconds, its work a minute.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What a process counts, from many threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        # a counter stands at 0 from the start where its labels are known: its first event is then seen as a rise
        self._figures: dict[tuple[str, ...], float] = {
            (m.name, *words): 0.0 for m in METRICS if m.kind == COUNTER and m.name.startswith("releasectl_")
            and len(m.words) == len(m.labels) for words in itertools.product(*m.words)}
        # for each histogram its buckets, one for what is above them, and the sum
        self._times: dict[tuple[str, ...], list[float]] = {}

    def count(self, name: str, *labels: str) -> None:
        """Adds one to a counter."""
        key = (name, *labels)
        with self._guard:
            self._figures[key] = self._figures.get(key, 0.0) + 1.0

    def put(self, name: str, figure: float, *labels: str) -> None:
        """Sets a gauge."""
        key = (name, *labels)
        with self._guard:
            self._figures[key] = figure

    def count_request(self, operation: str, outcome: str, since: float) -> None:
        """Counts a request to an agent, which began at since, a time.monotonic()."""
        took_s = time.monotonic() - since
        key = ("releasectl_agent_requests_total", operation, outcome)
        with self._guard:
            self._figures[key] = self._figures.get(key, 0.0) + 1.0
            times = self._times.setdefault(("releasectl_agent_request_duration_seconds", operation),
                                           [0.0] * (len(BUCKETS_S) + 2))
            times[bisect.bisect_left(BUCKETS_S, took_s)] += 1.0
            times[-1] += took_s

    def text(self, more: Figures) -> str:
        """Gives what was counted, and more, in the Prometheus text format 0.0.4, in the order of METRICS."""
        with self._guard:
            figures = {**self._figures, **more}
            times = {key: list(values) for key, values in self._times.items()}
        lines: dict[str, list[str]] = {metric.name: [] for metric in METRICS}
        labels = {metric.name: metric.labels for metric in METRICS}
        for (name, *values), figure in sorted(figures.items()):
            lines[name].append(_sample(name, zip(labels[name], values), figure))
        for (name, *values), (*buckets, total) in sorted(times.items()):
            pairs, counts = list(zip(labels[name], values)), list(itertools.accumulate(buckets))
            for end, count in zip((*map(str, BUCKETS_S), "+Inf"), counts):
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
    """Gives what the system knows of this process; what it does not tell (no /proc) is left out."""
    figures: dict[tuple[str, ...], float] = {
        ("process_start_time_seconds",): started_at, ("process_cpu_seconds_total",): time.process_time(),
        ("process_threads",): threading.active_count()}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        figures["process_resident_memory_bytes",] = pages * os.sysconf("SC_PAGE_SIZE")
        figures["process_open_fds",] = len(os.listdir("/proc/self/fd"))
    return figures


# ======================================================================================
# 3 Settings: one table of the configuration (contract section 6). Uses 1 and 2.
# ======================================================================================

def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not low <= float(text) <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return float(text)
    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)
    return parse


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


def _text(text: str) -> str:
    return text


def _server_name(text: str) -> str:
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
    """The parts of a postgresql:// URL, decoded. hosts: with their ports, as they stand; query: libpq's options."""
    user: str
    password: str
    hosts: tuple[tuple[str, int], ...]
    name: str
    query: Mapping[str, str]


# As libpq reads it: a user and a password end at the first "@", if no "/" comes before; "?" and "#" are letters there.
_POSTGRES_URL = re.compile(r"postgres(?:ql)?://(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?"
                           r"(?P<hosts>[^@/?#]*)(?:/(?P<name>[^@/?#]*))?(?:\?(?P<query>[^@#]*))?")
_POSTGRES_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%25[^\[\]:]+)?\]|[^\[\]:]*)(?::([0-9]{1,5})?)?")


def parse_postgres_url(url: str) -> PostgresUrl:
    """Return the parts of a URL that every driver reads in the same way; raise ValueError without a part of it."""
    match = _POSTGRES_URL.fullmatch(url)
    hosts = [_POSTGRES_HOST.fullmatch(host) for host in match["hosts"].split(",")] if match else []
    is_whole = match and all(h and int(h[2] or 0) <= 65535 for h in hosts) and not re.search(r"\s|[^ -~]", url)
    options = [option.partition("=") for option in (match["query"] or "").split("&") if option] if match else []
    if not (match and is_whole and all(re.fullmatch(r"[a-z_]+", key) and equals for key, equals, _ in options)):
        raise ValueError("it does not read as postgresql://USER:PASSWORD@HOST:PORT/NAME?OPTION=VALUE: percent-encode "
                         "the special characters of each part (@ is %40, / is %2F, a space %20)")
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
    if not match or int(match[2]) > 65535:
        raise ValueError("must be ADDRESS:PORT, or [ADDRESS]:PORT for IPv6")
    return match[1].strip("[]") or "0.0.0.0", int(match[2])


def safe_url(url: str) -> str:
    """Return a text without the password of a database URL in it, also of one that is mistyped or within a sentence.

    By patterns alone, which can't fail: of what reads as nothing in particular rather too much is left out.
    """
    # a password by name: in a URL to its next option, so that an & or a space in it hides nothing; in libpq's words
    url = re.sub(r"([?&]\w*pass(?:word|wd)?=)(?:[^&]|&(?![a-z_]+=))*", r"\1***", url, flags=re.IGNORECASE)
    url = re.sub(r"((?:pass|password|passwd)\s*=\s*)(?!\*\*\*)('(?:[^'\\]|\\.)*'?|\S*(?:\s+(?![a-z_]+\s*=)\S+)*)",
                 r"\1***", url, flags=re.IGNORECASE)
    # from a user's colon to the last @, also where the first colon was left out
    url = re.sub(r"(//[^:@\s]*|(?<!\S)[^:/@\s]+(?=:(?!//|\s))):[\s\S]*@", r"\1:***@", url)
    # no @ behind it, and no port either
    return re.sub(r"(postgres(?:ql)?://[^:@\[\s]*:)(?!\*\*\*@|[0-9]{0,5}(?:[/?,]|\s|$))\S*", r"\1***", url)


class Setting(NamedTuple):
    """One row of the configuration: the field is the name in lower case."""
    name: str
    default: str
    parse: Callable[[str], Any]
    help: str


SETTINGS: tuple[Setting, ...] = (
    Setting("DATABASE_URL", "sqlite:///releasectl.db", _database_url, "sqlite:///FILE or postgresql://..."),
    Setting("DATABASE_URL_FILE", "", _text, "a file that holds it, so that the password is in no environment"),
    Setting("HTTP_ADDR", "127.0.0.1:8080", _host_port, "address and port of the API"),
    Setting("HTTP_PLAIN", "0", _switch, "1: tokens over plain HTTP beyond loopback, behind a TLS proxy"),
    Setting("HTTP_CERT", "", _text, "certificate of the API (with HTTP_KEY: HTTPS)"),
    Setting("HTTP_KEY", "", _text, "key of the API's certificate"),
    Setting("HTTP_CLIENT_CA", "", _text, "CA: client certificates are demanded, and name who acts"),
    Setting("HTTP_MAX_CONNECTIONS", "128", _integer(4, 1024), "connections to the API at a time"),
    Setting("HTTP_MAX_CONNECTIONS_PER_ADDRESS", "32", _integer(1, 1024), "of these, from one address"),
    Setting("HTTP_MAX_BODY_BYTES", "1048576", _integer(1024, 16 << 20), "largest body of a request"),
    Setting("API_TOKENS_FILE", "", _text, "one name:role:sha256-of-token a line"),
    Setting("RELEASE_EXECUTOR_ENABLED", "1", _switch, "0: nothing is dispatched"),
    Setting("RELEASE_EXECUTOR_INTERVAL_SEC", "2", _number(0.1, 60), "seconds between looks for work"),
    Setting("MTLS_ENABLED", "1", _switch, "0: plain HTTP to agents, for a laboratory"),
    Setting("CONTROL_CERT", "", _text, "our client certificate for the agents"),
    Setting("CONTROL_KEY", "", _text, "its key"),
    Setting("CONTROL_CA", "", _text, "the CA that signed the agents' certificates"),
    Setting("AGENT_TLS_SERVER_NAME", "", _server_name, "verify this name, not the dialled address"),
    Setting("AGENT_CONCURRENCY", "64", _integer(1, 1024), "requests to agents in flight"),
    Setting("AGENT_CONNECT_TIMEOUT_SEC", "15", _number(0.1, MAX_CONNECT_TIMEOUT_S), "seconds for TCP and TLS"),
    Setting("AGENT_REQUEST_TIMEOUT_SEC", "60", _number(0.1, MAX_REQUEST_TIMEOUT_S),
            "seconds for a request and its answer"),
    Setting("AGENT_RETRIES", "2", _integer(0, 100), "tries after the first"),
    Setting("NODE_DEADLINE_SEC", "600", _number(1, 604800), "seconds from a node's dispatch to its end"),
    Setting("CLAIM_TTL_SEC", "30", _number(1, MAX_CLAIM_TTL_S), "seconds that a silent process keeps a release"),
    Setting("LOG_FORMAT", "text", _one_of("text", "json"), "text or json"),
    Setting("LOG_LEVEL", "info", _one_of("debug", "info", "warning"), "debug: single nodes too"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The configuration of one process; see SETTINGS for the meaning of each field."""
    database_url: str
    database_url_file: str
    http_addr: tuple[str, int]
    http_plain: bool
    http_cert: str
    http_key: str
    http_client_ca: str
    http_max_connections: int
    http_max_connections_per_address: int
    http_max_body_bytes: int
    api_tokens_file: str
    release_executor_enabled: bool
    release_executor_interval_sec: float
    mtls_enabled: bool
    control_cert: str
    control_key: str
    control_ca: str
    agent_tls_server_name: str
    agent_concurrency: int
    agent_connect_timeout_sec: float
    agent_request_timeout_sec: float
    agent_retries: int
    node_deadline_sec: float
    claim_ttl_sec: float
    log_format: str
    log_level: str

    @classmethod
    def load(cls, environ: Mapping[str, str], config_file: str = "", database_url: str = "") -> Settings:
        """Reads the environment, which wins over config_file; database_url (--db) wins over both.

        Raises ConfigError naming the value that can't be used and what would do.
        """
        given: dict[str, str] = {}
        for source in (dict(_read_config_file(config_file)) if config_file else {},
                       {s.name: environ[s.name] for s in SETTINGS if s.name in environ},
                       {"DATABASE_URL": database_url} if database_url else {}):
            if source.get("DATABASE_URL", "").strip() or source.get("DATABASE_URL_FILE", "").strip():
                # the two are one setting: whoever wins with one of them wins over the other
                given = {name: text for name, text in given.items() if not name.startswith("DATABASE_URL")}
            given.update(source)
        if given.get("DATABASE_URL", "").strip() and given.get("DATABASE_URL_FILE", "").strip():
            raise ConfigError("DATABASE_URL and DATABASE_URL_FILE are both set: set one of them")
        if given.get("DATABASE_URL_FILE", "").strip():
            given["DATABASE_URL"] = _read_database_url(given["DATABASE_URL_FILE"].strip())
        values = {}
        for setting in SETTINGS:
            text = given.get(setting.name, setting.default).strip()
            try:
                if setting.parse not in (_text, _database_url) and not is_utf8(text):  # those may be paths
                    raise ValueError("must be UTF-8")
                values[setting.name.lower()] = setting.parse(text or setting.default)
            except ValueError as error:
                file = given.get("DATABASE_URL_FILE", "").strip() if setting.name == "DATABASE_URL" else ""
                if file:  # not a word of what it holds: that may be the password alone, or another secret
                    raise ConfigError(f"DATABASE_URL_FILE={file}: what it holds can't be used: {error}") from None
                shown = one_line(safe_url(text), 80)
                raise ConfigError(f"{setting.name}={shown} can't be used: {error}") from None
        settings = cls(**values)
        if bool(settings.http_cert) != bool(settings.http_key):
            raise ConfigError("HTTP_CERT and HTTP_KEY go together: set both or neither")
        if settings.http_client_ca and not settings.http_cert:
            raise ConfigError("HTTP_CLIENT_CA needs HTTP_CERT and HTTP_KEY")
        return settings


def _read_database_url(path: str) -> str:
    """Return the one line of DATABASE_URL_FILE; raise ConfigError without a part of it."""
    try:
        mode = os.stat(path).st_mode
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"DATABASE_URL_FILE={path} can't be read: {_os_reason(error)}") from None
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"DATABASE_URL_FILE={path} is open to others: chmod o-rwx,g-w it (its group may read it)")
    if not text or not text.isprintable():
        raise ConfigError(f"DATABASE_URL_FILE={path} must hold one line: a URL as for DATABASE_URL, and nothing else")
    return text


def _read_config_file(path: str) -> Iterator[tuple[str, str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--config {path} can't be read: {_os_reason(error)}") from None
    names = [s.name for s in SETTINGS]
    seen = set()
    for number, line in enumerate(lines, 1):
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
            raise ConfigError(f"{path}:{number}: {name} stands twice")
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


def _os_reason(error: Exception) -> str:
    """Gives the system's words for an error, without its number and file name."""
    if isinstance(error, UnicodeError):
        return "not UTF-8"
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else one_line(error)


# ======================================================================================
# 4 Database: the connection factory, transaction(), migrate(); the one place where the
#   engines differ. Uses 1 to 3.
#
#   One writer at a time, on both engines: SQLite by BEGIN IMMEDIATE, PostgreSQL by an
#   advisory lock, so that what a transaction read still holds when it writes, and events
#   become visible in the order of their ids. Nothing waits inside a transaction.
# ======================================================================================

SCHEMA_FILE = Path(__file__).resolve().with_name("schema.sql")
BUSY_TIMEOUT_S = 5.0
MAX_IDLE_DB_CONNECTIONS = 8
# To PostgreSQL, of one process; further ones wait in turn, for so long.
MAX_DB_CONNECTIONS, CONNECTION_WAIT_S = 16, 30.0
# What the server's own limits allow a transaction: 10 s for the lock, 30 s for a statement. Older ones are cut off.
MAX_TRANSACTION_S = 45.0
# A migration may have much to rewrite.
MAX_MIGRATION_S = 3600.0
# While the process ends, a new transaction may take so long.
LAST_TRANSACTION_S = 2.0
# "releasectl" in numbers; the key of PostgreSQL's advisory lock
PG_LOCK_KEY = 7235419
LOCK_NOT_AVAILABLE = "55P03"
# What speaks PostgreSQL's protocol and is another thing, by its version().
OTHER_SERVERS = re.compile(
    r"CockroachDB|-YB-|Redshift|Greenplum|Materialize|RisingWave|CrateDB|GaussDB|QuestDB|openGauss", re.IGNORECASE)


def sync_folder(folder: str) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _close(connection: Any) -> None:
    with contextlib.suppress(Exception):  # a broken connection may refuse even that
        connection.close()


class _Watch:
    """A transaction that is open: a second handle of its socket, since and until when it may be, whether cut off."""
    __slots__ = ("is_cut", "since", "sock", "until")

    def __init__(self, sock: socket.socket | None, limit_s: float):
        self.sock = sock
        self.since = time.monotonic()
        self.until = self.since + limit_s
        self.is_cut = False


class _Guard:
    """Shuts down the sockets of transactions that are open for too long: a driver may wait for ever for a server
    that hangs. Whoever waits gets an error then, and does not know whether a COMMIT took place."""

    EVERY_S, IDLE_ROUNDS = 0.25, 40

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._thread: threading.Thread | None = None
        self._end_at = float("inf")

    def begin(self, connection: Any, limit_s: float) -> _Watch:
        """Watch over a connection until end()."""
        sock = None
        with contextlib.suppress(Exception):  # one that is closed already fails by itself
            handle = connection._usock if hasattr(connection, "_usock") else connection  # noqa: SLF001 - pg8000
            sock = socket.fromfd(handle.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        watch = _Watch(sock, limit_s)
        with self._lock:
            self._watches.add(watch)
            if self._thread is None:
                with contextlib.suppress(RuntimeError):  # no room for a thread: the next one tries again
                    thread = threading.Thread(target=self._run, name="database-guard", daemon=True)
                    thread.start()
                    self._thread = thread
        return watch

    def end(self, watch: _Watch) -> None:
        """Watch no longer."""
        with self._lock:
            self._watches.discard(watch)
        if watch.sock is not None:
            watch.sock.close()

    def end_within(self, seconds: float) -> None:
        """Cut off what is open then, and from then on what takes longer than LAST_TRANSACTION_S."""
        with self._lock:
            self._end_at = min(self._end_at, time.monotonic() + seconds)

    @property
    def is_ending(self) -> bool:
        """Say whether end_within() was called."""
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


class _Turns:
    """So many at a time; who comes later waits in turn."""

    def __init__(self, count: int):
        self._free = count
        self._queue: collections.deque[threading.Event] = collections.deque()
        self._lock = threading.Lock()

    def take(self, timeout_s: float) -> bool:
        """Wait for a turn; say whether it came within the time."""
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

    def give_back(self) -> None:
        """Let the next one go."""
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._free += 1


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _who_has_locked(file: os.stat_result) -> int:
    """Return the id of another process that has an SQLite file open, 0 for none that can be seen.

    Not by asking for the lock: to close a handle of the file would drop all locks of this process.
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


class SqliteEngine:
    """The words of SQLite, and how to reach one file."""

    name = "sqlite"
    begin_read = "BEGIN"
    begin_write = "BEGIN IMMEDIATE"
    now_sql = "SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
    has_table_sql = "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
    has_any_table_sql = "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    # The id of the next release: to look at it, and to take it.
    next_release_id_sql = take_release_id_sql = \
        "SELECT COALESCE(MAX(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'release_tasks'"
    # The nodes of a release as one text.
    joined_sql = "group_concat(node_id)"
    # What lets a transaction take as long as it needs.
    patience_sql: tuple[str, ...] = ()
    # A number that grows with each failover; 0 for a server that only follows another one.
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
        """Return what the path, its -wal and its -shm name now: a deleted file would go on taking writes unseen."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return (found.st_dev, found.st_ino, found.st_nlink > 1, *map(_inode, self._side_files()))

    def _side_files(self) -> tuple[str, str]:
        path = os.path.realpath(self.path)
        return f"{path}-wal", f"{path}-shm"

    def keep_aside(self) -> str:
        """Give a new -wal that others have begun a second name, before our last connection takes it away.

        Return what was found, for the log.
        """
        wal = self._side_files()[0]
        said = f"{self}: {wal} or its -shm was removed or replaced while this process worked with it"
        with contextlib.suppress(OSError):
            if os.path.getsize(wal):
                kept = f"{wal}.{int(time.time())}"
                os.link(wal, kept)
                return f"{said}; what others wrote into a new one is kept as {kept}"
        return said

    def _refuse_torn(self) -> None:
        """Raise DatabaseError where the file has a second name, or is open elsewhere without its -wal."""
        try:
            found = os.stat(self.path)
        except OSError:
            return
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
            raise DatabaseError(f"{self} has a second name (hard link), under which it would have another -wal: "
                                f"remove all but one (find / -xdev -inum {found.st_ino})")
        give_up_at = time.monotonic() + 1.0  # somebody may just begin or end
        while not all(map(os.path.exists, self._side_files())):
            pid = _who_has_locked(found)
            if not pid:
                return
            if time.monotonic() > give_up_at:
                raise DatabaseError(f"{self}: its -wal or -shm was removed while process {pid} works with it: "
                                    "stop that process, which then saves what it has, and try again")
            time.sleep(0.05)

    def connect(self, create: bool) -> sqlite3.Connection:
        """Opens the file, made when create says so; raises DatabaseError with one line."""
        folder = os.path.dirname(self.path) or os.curdir  # not abspath(): the current folder may be gone
        if not os.path.isdir(folder):
            raise DatabaseError(f"{self}: the folder {folder} does not exist")
        if not create and not os.path.exists(self.path):
            raise DatabaseError(f"{self} does not exist: make it with `releasectl.py migrate`")
        self._refuse_torn()
        connection = None
        try:
            if create:
                self._make_file()
            # statements differ by the number of rows: more of them kept would be megabytes, and not used again
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None,
                                         check_same_thread=False, cached_statements=16)
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            # with much history a release touches a page for each node: 16 MiB of WAL write it back less often
            connection.execute("PRAGMA wal_autocheckpoint = 4000")
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()  # now its -wal and -shm are there
            return connection
        except (sqlite3.Error, OSError) as error:
            if connection:
                _close(connection)
            raise DatabaseError(self.explain(error)) from None

    def _make_file(self) -> None:
        """Make the file, empty and closed to others whatever the umask, where there is none.

        SQLite gives its -wal and -shm the mode of the file.
        """
        with contextlib.suppress(FileExistsError):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(handle, 0o600)
            finally:
                os.close(handle)

    @staticmethod
    def is_data_error(error: Exception) -> bool:
        """Say whether a value was refused, whatever the state of the file."""
        return isinstance(error, (sqlite3.DataError, OverflowError, ValueError)) or (
            isinstance(error, (sqlite3.InterfaceError, sqlite3.ProgrammingError)) and "binding parameter" in str(error))

    def explain(self, error: Exception) -> str:
        """Gives one line: what is wrong with the file and what would mend it."""
        if isinstance(error, OSError):
            return f"{self} can't be made: {_os_reason(error)}"
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
        """Writes a copy of one moment to a new file, mode 0600, checked; gives its size in bytes.

        Others read and write meanwhile. The file has its name only when it is whole and on the disk.
        """
        if os.path.lexists(path):
            raise AppError(3002, f"{path} exists already: name another file")
        folder, temporary = os.path.dirname(path) or os.curdir, ""
        source = self.connect(create=False)
        try:
            handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
            with open(handle, "rb") as file:
                os.fchmod(handle, 0o600)  # whatever the umask
                self._copy(source, temporary)
                os.fsync(file.fileno())
            os.rename(temporary, path)
            sync_folder(folder)
        except (sqlite3.Error, OSError) as error:
            raise DatabaseError(f"{self} could not be copied to {path}: {_os_reason(error)}") from None
        finally:
            _close(source)
            with contextlib.suppress(OSError):  # it has its name by now
                os.unlink(temporary)
        return os.path.getsize(path)

    @staticmethod
    def _copy(source: sqlite3.Connection, path: str) -> None:
        """Copies a database into an empty file, and checks the copy; raises sqlite3.Error."""
        target = sqlite3.connect(path, isolation_level=None)
        try:
            # In one step: in several it would begin anew after each commit of another process.
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")  # one file, that needs no -wal beside it
            found = target.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"the copy is not sound: {one_line(found)}")
        finally:
            _close(target)

    @staticmethod
    def is_stale(_error: Exception) -> bool:
        """Says whether BEGIN failed for the connection's sake: a file is not cut off."""
        return False

    @staticmethod
    def sql(statement: str) -> str:
        """Gives a statement in this engine's placeholders."""
        return statement

    @staticmethod
    def ddl(statement: str) -> str:
        """Gives a statement of schema.sql in this engine's words."""
        return statement


class PostgresEngine:
    """The words of PostgreSQL, and the drivers that can reach it."""

    name = "postgresql"
    # For each transaction: behind a pooler the next one may be on another connection, and what was set for a session
    # would be another program's. A stopped client holds its locks until the server gives up on it.
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
    # Not what belongs to an extension that the provider has put there.
    has_any_table_sql = """
        SELECT COUNT(*)
        FROM pg_class c
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = current_schema() AND c.relkind IN ('r', 'p', 'f')
          AND NOT EXISTS (SELECT 1 FROM pg_depend d
                          WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')"""
    # A person may have written a row with an id of their own, which the sequence does not know.
    next_release_id_sql = """
        SELECT GREATEST(COALESCE(pg_sequence_last_value(pg_get_serial_sequence('release_tasks', 'id')::regclass), 0),
                        COALESCE(MAX(id), 0)) + 1
        FROM release_tasks"""
    take_release_id_sql = """
        SELECT setval(pg_get_serial_sequence('release_tasks', 'id'),
                      GREATEST(nextval(pg_get_serial_sequence('release_tasks', 'id')), COALESCE(MAX(id), 0) + 1))
        FROM release_tasks"""
    joined_sql = "string_agg(node_id::text, ',')"
    patience_sql = ("SET LOCAL statement_timeout = 0", "SET LOCAL idle_in_transaction_session_timeout = 0")
    timeline_sql = """
        SELECT CASE WHEN pg_is_in_recovery() THEN 0
                    ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END"""
    # Who has the writers' lock, and what for.
    holder_sql = f"""
        SELECT a.application_name || ' (pid ' || a.pid || ', ' || COALESCE(host(a.client_addr), 'local') || ')',
               COALESCE(a.wait_event, '')
        FROM pg_locks l
        JOIN pg_stat_activity a ON a.pid = l.pid
        WHERE l.locktype = 'advisory' AND l.objid = {PG_LOCK_KEY} AND l.granted"""
    max_connections = MAX_DB_CONNECTIONS

    def __init__(self, url: str):
        self.url = url
        self.driver = _load_postgres_driver()
        self.error = (self.driver.Error, OSError)  # pg8000 lets the socket's errors through
        try:
            self.parts = parse_postgres_url(url)
        except ValueError as error:
            raise ConfigError(f"DATABASE_URL={one_line(safe_url(url), 80)} can't be used: {error}") from None
        raw = re.search(r":([^:@/]*)@", url)
        secrets_ = {self.parts.password, raw[1] if raw else "", *(
            value for key, value in self.parts.query.items() if "password" in key)}
        self._secrets = sorted(filter(None, secrets_), key=len, reverse=True)
        self.is_pg8000 = self.driver.__name__ == "pg8000.dbapi"
        if self.is_pg8000:
            if len(self.parts.hosts) > 1:
                raise ConfigError("DATABASE_URL: pg8000 takes one host only: install psycopg, or name one")
            _pg8000_options(self.parts.query)
        self.guard = _Guard()

    def __str__(self) -> str:
        return f"database {safe_url(self.url)}"

    def identity(self) -> object:
        """Gives a constant: a server that went away says so itself."""
        return self.url

    def connect(self, create: bool) -> Any:  # noqa: ARG002 - a server's database is there or not
        """Opens a connection in autocommit mode; raises DatabaseError with one line."""
        connection = None
        try:
            connection = self._open()
            watch = self.guard.begin(connection, MAX_TRANSACTION_S)
            try:
                connection.autocommit = True
                cursor = connection.cursor()
                if self.is_pg8000:  # which takes what it is told; the others send theirs as they connect
                    cursor.execute("SET client_encoding = 'UTF8'")
                cursor.execute("SELECT version(), current_setting('server_encoding')")
                self.refuse_server(*cursor.fetchone())
            finally:
                self.guard.end(watch)
            return connection
        except AppError:
            if connection is not None:
                _close(connection)
            raise
        except Exception as error:  # a driver raises its own errors, OSError and ssl.SSLError here
            if connection is not None:
                _close(connection)
            raise DatabaseError(self.explain(error)) from None

    def refuse_server(self, version: str, encoding: str) -> None:
        """Raise DatabaseError for a server or a database that can't do what is needed, from what version() says."""
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
        timeout_s = int(LAST_TRANSACTION_S) if self.guard.is_ending else 5
        if not self.is_pg8000:
            more: dict[str, Any] = {"fallback_application_name": "releasectl"}
            if self.driver.__name__ == "psycopg":
                more["prepare_threshold"] = None  # behind a pooler the name of a statement may be another connection's
            connection = self.driver.connect(
                self.url, connect_timeout=timeout_s, keepalives_idle=10, keepalives_interval=5, keepalives_count=3,
                tcp_user_timeout=15000, client_encoding="UTF8", **more)
            if self.driver.__name__ == "psycopg2":
                connection.set_client_encoding("UTF8")
            return connection
        user, password, [(host, port)], name, query = self.parts
        place: dict[str, Any] = {"unix_sock": f"{host}/.s.PGSQL.{port}"} if host.startswith("/") else {
            "host": host or "localhost", "port": port}
        connection = self.driver.connect(
            user=user or getpass.getuser(), password=password or os.environ.get("PGPASSWORD"), database=name or None,
            timeout=timeout_s, ssl_context=_pg8000_tls(query),
            application_name=query.get("application_name", "releasectl"), **place)
        connection._usock.settimeout(40)  # noqa: SLF001 - it has one for connecting and for all that follows
        return connection

    def tls_text(self) -> str:
        """Return how the way to the server is protected, with the driver that is there."""
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
        """Gives one line: what the server or the driver said, without the password."""
        state = _sqlstate(error)
        if state in ("25006", "0A000"):
            return (f"{self} is a standby, or read-only: put all hosts into DATABASE_URL and add "
                    "target_session_attrs=read-write (psycopg or psycopg2)")
        # masked before it is cut to a line: else half of a password could be left, or its blanks be others
        return f"{self}: {one_line(self.without_password(str(_pg8000_fields(error).get('M', error))))}"

    def without_password(self, text: str) -> str:
        """Return a text without the password, as it stands in the URL or decoded."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def is_data_error(self, error: Exception) -> bool:
        """Say whether a value was refused, whatever the state of the server: SQLSTATE 22 and 54, or the driver."""
        return isinstance(error, (ValueError, OverflowError)) or _sqlstate(error)[:2] in ("22", "54") or (
            isinstance(error, self.driver.DataError) and not _sqlstate(error))

    @staticmethod
    def is_stale(error: Exception) -> bool:
        """Says whether BEGIN failed for the connection's sake, and not after waiting for a lock."""
        return _sqlstate(error) != LOCK_NOT_AVAILABLE

    @staticmethod
    @functools.lru_cache(maxsize=512)
    def sql(statement: str) -> str:
        """Gives a statement in this engine's placeholders."""
        return statement.replace("%", "%%").replace("?", "%s")

    @staticmethod
    def ddl(statement: str) -> str:
        """Gives a statement of schema.sql in this engine's words."""
        return statement.replace(
            "INTEGER PRIMARY KEY AUTOINCREMENT", "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY").replace(
            "(strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))",
            """(to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'))""")


def _pg8000_fields(error: Exception) -> Mapping[str, str]:
    """Gives the server's fields of a pg8000 error (M message, C SQLSTATE); none for other drivers."""
    return error.args[0] if error.args and isinstance(error.args[0], dict) else {}


def _sqlstate(error: Exception) -> str:
    """Return the SQLSTATE of an error of any driver, "" for none."""
    return str(getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
               or _pg8000_fields(error).get("C") or "")


def _pg8000_options(query: Mapping[str, str]) -> None:
    """Raise ConfigError for an option that pg8000 does not know."""
    unknown = sorted(set(query) - {"sslmode", "sslrootcert", "application_name"})
    if unknown:
        raise ConfigError(f"DATABASE_URL: pg8000 does not take {unknown[0]}: install psycopg, or leave it out")


def _pg8000_tls(query: Mapping[str, str]) -> ssl.SSLContext | None:
    """Gives what libpq's sslmode and sslrootcert mean, for the driver that does not know them."""
    mode = query.get("sslmode", "prefer")
    if mode in ("disable", "allow", "prefer"):
        return None
    context = ssl.create_default_context(cafile=query.get("sslrootcert"))
    context.check_hostname = mode == "verify-full"
    if mode == "require":
        context.verify_mode = ssl.CERT_NONE
    return context


def _load_postgres_driver() -> Any:
    """Gives the first driver found. RELEASECTL_PG_DRIVER picks one in tests."""
    wanted = os.environ.get("RELEASECTL_PG_DRIVER", "")
    if wanted in ("", "psycopg"):
        with contextlib.suppress(ImportError):
            import psycopg
            return psycopg
    if wanted in ("", "psycopg2"):
        with contextlib.suppress(ImportError):
            import psycopg2
            return psycopg2
    if wanted in ("", "pg8000"):
        with contextlib.suppress(ImportError):
            import pg8000.dbapi
            return pg8000.dbapi
    raise ConfigError("a postgresql:// URL needs a driver: install psycopg, psycopg2 or pg8000 (1.30 or newer)")


class Transaction:
    """One open transaction: statements with ? for parameters, on either engine."""

    def __init__(self, engine: SqliteEngine | PostgresEngine, connection: Any):
        self._engine = engine
        self._cursor = connection.cursor()
        # What to do once it is certain that this took place: log lines and counters tell no more than is true.
        self.afterwards: list[Callable[[], None]] = []

    def execute(self, statement: str, *params: object) -> int:
        """Runs a statement; gives the number of rows that it changed."""
        sql = self._engine.sql(statement)
        try:
            # without parameters a driver would not undo the doubling of %
            self._cursor.execute(sql, params) if params else self._cursor.execute(statement)
        except (*self._engine.error, ValueError, OverflowError) as error:
            if not self._engine.is_data_error(error):
                raise
            raise UnstorableValue("a number is too large for the database" if isinstance(error, OverflowError)
                                  else f"a value can't be stored: {self._engine.explain(error)}") from None
        return int(self._cursor.rowcount)

    def rows(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Runs a query; gives all its rows."""
        self.execute(statement, *params)
        return [tuple(row) for row in self._cursor.fetchall()]

    def row(self, statement: str, *params: object) -> tuple[Any, ...] | None:
        """Runs a query; gives its first row or None."""
        self.execute(statement, *params)
        found = self._cursor.fetchone()
        return tuple(found) if found is not None else None

    def value(self, statement: str, *params: object) -> Any:
        """Runs a query; gives the first column of its first row, or None."""
        found = self.row(statement, *params)
        return found[0] if found else None

    def insert_many(self, statement: str, width: int, rows: Sequence[tuple[object, ...]]) -> None:
        """Inserts rows by statement + (?, ...), ...: a few round trips for thousands of rows."""
        step = 900 // width  # SQLite 3.26 takes 999 parameters
        one = "(" + ", ".join("?" * width) + ")"
        for start in range(0, len(rows), step):
            part = rows[start:start + step]
            self.execute(statement + ", ".join([one] * len(part)), *(value for row in part for value in row))

    def now(self) -> str:
        """Gives the time that decides who holds a claim: the server's on PostgreSQL."""
        return str(self.value(self._engine.now_sql))


class Database:
    """The only door to the database: a few pooled connections, and transaction()."""

    def __init__(self, url: str):
        """Takes a sqlite:/// or postgresql:// URL; connects to nothing yet."""
        self.engine = SqliteEngine(url) if url.startswith("sqlite:") else PostgresEngine(url)
        self._turns = _Turns(self.engine.max_connections)
        # All connections that are open are to what had this identity; changed tells of one that was given back.
        self._idle: list[Any] = []
        self._in_use = 0
        self._identity: object = None
        self._changed = threading.Condition()
        # Of the whole process: whoever counts has a database at hand.
        self.metrics = Metrics()

    def __str__(self) -> str:
        return str(self.engine)

    def close(self) -> None:
        """Closes the idle connections."""
        with self._changed:
            while self._idle:
                _close(self._idle.pop())

    def end_within(self, seconds: float) -> None:
        """Cut off what is open after so many seconds, also in a server that hangs: the process ends."""
        if isinstance(self.engine, PostgresEngine):
            self.engine.guard.end_within(seconds)

    @contextlib.contextmanager
    def transaction(self, write: bool = False, create: bool = False,
                    limit_s: float = MAX_TRANSACTION_S) -> Iterator[Transaction]:
        """Gives one transaction: a snapshot to read, or the only writer; committed at the end.

        Raises DatabaseError where the engine fails or takes longer than limit_s, UnstorableValue for a value that
        it can't hold; an exception of the caller rolls back.
        """
        try:
            connection, watch = self._begin(write, create, limit_s)
        except DatabaseError:
            self.metrics.count("releasectl_database_errors_total")
            raise
        tx = Transaction(self.engine, connection)
        try:
            yield tx
            connection.cursor().execute("COMMIT")
        except self.engine.error as error:
            self._give_up(connection)  # which rolls back, if there is anything left to roll back
            self.metrics.count("releasectl_database_errors_total")
            raise DatabaseError(self._explain(error, watch)) from error
        except BaseException as error:
            if watch is not None and watch.is_cut:  # pg8000 stumbles over that in several ways
                self._give_up(connection)
                raise DatabaseError(self._explain(error, watch)) from error
            if isinstance(error, UnstorableValue):  # pg8000 may have sent half of it
                self._give_up(connection)
                raise
            try:
                connection.cursor().execute("ROLLBACK")
                self._give_back(connection)
            except self.engine.error:
                self._give_up(connection)
            raise
        else:
            self._give_back(connection)
        finally:
            self._unwatch(watch)
        for deed in tx.afterwards:
            deed()

    def _explain(self, error: BaseException, watch: _Watch | None) -> str:
        if watch is not None and watch.is_cut:
            return (f"{self}: no answer for {time.monotonic() - watch.since:.0f} s, so the connection was cut: the "
                    "server hangs, or a commit waits for a synchronous standby")
        return self.engine.explain(cast(Exception, error))

    def _unwatch(self, watch: _Watch | None) -> None:
        if watch is not None and isinstance(self.engine, PostgresEngine):
            self.engine.guard.end(watch)

    def _begin(self, write: bool, create: bool, limit_s: float) -> tuple[Any, _Watch | None]:
        statement = self.engine.begin_write if write else self.engine.begin_read
        while True:
            connection, pooled = self._take(create)
            watch = self.engine.guard.begin(connection, limit_s) if isinstance(self.engine, PostgresEngine) else None
            try:
                connection.cursor().execute(statement)
                return connection, watch
            except self.engine.error as error:
                self._give_up(connection)
                is_cut = watch is not None and watch.is_cut
                self._unwatch(watch)
                if is_cut or not (pooled and self.engine.is_stale(error)):
                    raise DatabaseError(self._explain(error, watch) + self._lock_holder(error)) from error
            except BaseException as error:
                self._give_up(connection)
                self._unwatch(watch)
                if watch is not None and watch.is_cut:
                    raise DatabaseError(self._explain(error, watch)) from error
                raise

    def _lock_holder(self, error: Exception) -> str:
        """Return who holds the writers' lock, after an error of waiting for it; "" where that can't be told."""
        if not isinstance(self.engine, PostgresEngine) or _sqlstate(error) != LOCK_NOT_AVAILABLE:
            return ""
        with contextlib.suppress(Exception), self.transaction() as tx:
            found = tx.row(self.engine.holder_sql)
            if found:
                return f"; {found[0]} holds the lock" + (
                    ", whose commit waits for a synchronous standby" if found[1] == "SyncRep" else "")
        return ""

    def _take(self, create: bool) -> tuple[Any, bool]:
        """Return a connection in autocommit mode, and whether it was in use before."""
        if not self._turns.take(CONNECTION_WAIT_S):
            raise DatabaseError(f"{self}: all {self.engine.max_connections} connections of this process are in use for "
                                f"more than {CONNECTION_WAIT_S:g} s")
        try:
            with self._changed:
                self._leave_what_is_gone()
                self._in_use += 1
                if self._idle:
                    return self._idle.pop(), True
            connection = None
            try:
                connection = self.engine.connect(create)
            finally:
                if connection is None:
                    self._left()
            with self._changed:
                if self._identity is None:
                    self._identity = self.engine.identity()
            return connection, False
        except BaseException:
            self._turns.give_back()
            raise

    def _leave_what_is_gone(self) -> None:
        """Close all connections where the files are others than they were; raise DatabaseError while some are in use.

        The last one brings into the file what was written into a -wal that is removed. None must be open when the
        next one begins: SQLite would have both share what it keeps of a file.
        """
        if not self._in_use and not self._idle:
            self._identity = None  # whoever was last has taken -wal and -shm away
        known, found = self._identity, self.engine.identity()
        if known in (None, found):
            return
        if isinstance(self.engine, SqliteEngine) and found and tuple(found)[:3] == tuple(known)[:3]:  # type: ignore
            self.metrics.count("releasectl_database_errors_total")
            log.error("%s; everything is read anew. Nothing but releasectl may touch these files",
                      self.engine.keep_aside())
            self._identity = "left"  # told once
        while self._idle:
            _close(self._idle.pop())
        if not self._changed.wait_for(lambda: not self._in_use or self._identity == self.engine.identity(),
                                      BUSY_TIMEOUT_S):
            raise DatabaseError(f"{self}: its files were removed or replaced while a transaction is open")
        if not self._in_use and not self._idle:
            self._identity = None

    def _left(self) -> None:
        with self._changed:
            self._in_use -= 1
            self._changed.notify_all()

    def _give_back(self, connection: Any) -> None:
        with self._changed:
            if self._identity == self.engine.identity() and len(self._idle) < MAX_IDLE_DB_CONNECTIONS:
                self._idle.append(connection)
            else:
                _close(connection)  # within: who looks at the files then finds them as the last one has left them
            self._left()
        self._turns.give_back()

    def _give_up(self, connection: Any) -> None:
        with self._changed:
            _close(connection)
            self._left()
        self._turns.give_back()

    def schema_version(self) -> int:
        """Gives the version of the schema in the database; 0 for an empty one."""
        with self.transaction() as tx:
            return self._schema_version(tx)

    def _schema_version(self, tx: Transaction) -> int:
        if tx.value(self.engine.has_table_sql, "schema_version"):
            return int(tx.value("SELECT COALESCE(MAX(version), 0) FROM schema_version"))
        if tx.value(self.engine.has_any_table_sql):
            raise DatabaseError(f"{self} holds other tables, and not those of releasectl: name another one")
        return 0

    def backup(self, path: str) -> tuple[int, int]:
        """Writes a checked copy to a new file; gives its schema and its size in bytes.

        Raises AppError 3002 when the file exists, ConfigError on PostgreSQL, DatabaseError.
        """
        if isinstance(self.engine, PostgresEngine):
            raise ConfigError("backup is for SQLite; on PostgreSQL take pg_dump -Fc -f FILE \"$DATABASE_URL\"")
        return self.schema_version(), self.engine.backup(path)

    def migrate(self) -> tuple[int, int]:
        """Brings the schema up to date, one transaction a step; gives the versions before and after.

        An empty database gets all steps in one: nobody sees it half made, and takes it for an old one.
        """
        steps = schema_steps()
        before = None
        while True:
            with self.transaction(write=True, create=True, limit_s=MAX_MIGRATION_S) as tx:
                version = self._schema_version(tx)
                before = version if before is None else before
                self._refuse_newer(version, len(steps))
                if version == len(steps):
                    return before, version
                done = version + 1 if version else len(steps)
                for statement in self.engine.patience_sql:
                    tx.execute(statement)
                for statement in itertools.chain(*steps[version:done]):
                    tx.execute(self.engine.ddl(statement))
            log.info("%s: schema step %d done", self, done)

    def require_schema(self, create: bool = False) -> None:
        """Raises DatabaseError when the schema is not this program's; create makes an empty one."""
        needed = len(schema_steps())
        if create and isinstance(self.engine, SqliteEngine) and self.engine.identity() is None:
            self.migrate()
        version = self.schema_version()
        if version == 0 and create:
            self.migrate()
        elif version < needed:
            raise DatabaseError(f"{self} has schema {version}, this program needs {needed}: "
                                "run `releasectl.py migrate`")
        self._refuse_newer(version, needed)

    def _refuse_newer(self, version: int, known: int) -> None:
        if version > known:
            raise DatabaseError(f"{self} has schema {version}, newer than this program's {known}: "
                                "use the newer releasectl.py")


@functools.lru_cache(maxsize=1)
def schema_steps() -> tuple[tuple[str, ...], ...]:
    """Gives the steps of schema.sql, each as its statements."""
    try:
        text = SCHEMA_FILE.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{SCHEMA_FILE} can't be read ({_os_reason(error)}): "
                          "it belongs beside releasectl.py") from None
    text = re.sub(r"^\s*--(?! step ).*$", "", text, flags=re.MULTILINE)
    steps = re.split(r"^-- step \d+.*$", text, flags=re.MULTILINE)[1:]
    if not steps or not all(map(str.strip, steps)):
        raise ConfigError(f"{SCHEMA_FILE} is empty or cut off: copy the one that came with this releasectl.py")
    return tuple(tuple(s.strip() for s in re.split(r";\s*$", step, flags=re.MULTILINE) if s.strip())
                 for step in steps)


# ======================================================================================
# 5 Plan: what a release is and will do: nodes, batches, payloads. Pure; uses 1 and 2.
# ======================================================================================

# A host and a port: what can have one task at a time, whatever rows name it.
Endpoint = tuple[str, int]


def endpoint_of(main_ip: str, port: int) -> Endpoint:
    """Return where an agent listens; two spellings of one address give the same."""
    if ":" in main_ip:
        with contextlib.suppress(ValueError):
            return str(plain_address(ipaddress.ip_address(main_ip))), port
    return main_ip.lower(), port


def plain_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> (
        ipaddress.IPv4Address | ipaddress.IPv6Address):
    """Return an IPv4 address for one that is mapped into IPv6 (::ffff:10.0.0.7), else the address."""
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
    # The highest version that was ever sent to it.
    last_version: int = 0

    @property
    def gets_releases(self) -> bool:
        return bool(self.enabled) and self.status == "online"

    @property
    def endpoint(self) -> Endpoint:
        """Return where its agent listens."""
        return endpoint_of(self.main_ip, self.agent_port)

    @property
    def condition(self) -> str:
        """Why it gets no release, or online."""
        return "disabled" if not self.enabled else f"in {self.status}" if self.status == "maintenance" else self.status

    @property
    def label_items(self) -> Set[tuple[str, Any]]:
        """Gives its labels as pairs; none when a person wrote what can't be read."""
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            return frozenset(parse_json(self.labels).items())
        return frozenset()


@dataclasses.dataclass(frozen=True)
class Release:
    """A row of release_tasks, with two numbers that its nodes give."""
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
    # Up to which batch all is behind it: soaked, looked at again, and resumed where it pauses.
    passed_batch: int
    soak_until: str | None
    paused_by: str
    # Part of its tasks' ids; "" until the claim where a person wrote the row.
    tag: str
    # soak_until by the clock that nobody sets: see clock_mark().
    soak_clock: str
    skipped_nodes: int
    current_batch: int

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    def __str__(self) -> str:
        return f"release {self.id} (v{self.version})"


class ReleaseNode(NamedTuple):
    """A node of a release: its row, and below what only the driver of the release knows."""
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
    # Whether a failure of it counts against no limit: a person accepted it, or a rollback tries it all the same.
    accepted: int = 0
    # The highest version that was ever sent to its address, by any release.
    last_version: int = 0
    # hold_until by the clock that nobody sets: see clock_mark().
    hold_clock: str = ""
    # started_at by the same clock.
    started_clock: str = ""
    # For how long pauses and freezes kept it from its dispatch, in seconds: no part of its deadline.
    waited_s: float = 0.0
    # Whether a try of this release may have reached the agent, as the row says: see reached.
    stored_reached: int = 1
    # The next request and when it is due, in the seconds of Clock.elapsed().
    next_op: str = ""
    due: float = 0.0
    deadline: float = 0.0
    in_flight: bool = False
    # Seconds in its deadline for pauses before a take-over: taken back when its agent turns out to be at work.
    credit_s: float = 0.0
    # Whether the agent gave the task another id than the one that was written.
    is_renamed: bool = False
    # Whether a try of this release may have reached the agent: then "already applied" may be our own doing.
    reached: bool = False
    # Whether the agent may have run the task, as nothing is known of the last try.
    is_unknown: bool = False
    # Whether the agent has said that it has the task, and not said otherwise since.
    is_at_work: bool = False
    # What the agent said of its success, while that is verified.
    agent_said: str = ""
    polls: int = 0
    # How often the agent did not know the task.
    forgotten: int = 0
    # Probes in a row that passed; whether the look at the end of the soak is done.
    passes: int = 0
    is_looked_at: bool = False
    # Tries in a row that failed, and what the last one said.
    errors: int = 0
    last_kind: str = ""
    last_error: str = ""
    # How the agent's answers ended it, not written yet.
    verdict: Verdict | None = None

    @property
    def endpoint(self) -> Endpoint:
        """Return where its agent listens."""
        return endpoint_of(self.main_ip, self.agent_port)


class Verdict(NamedTuple):
    """How a node ended: SUCCESS, or FAILED with an error_kind, a message and its whole text.

    hold_s: for how long an execute agent may still be at our last request; None: as stored.
    """
    status: str
    error_kind: str = ""
    error_msg: str = ""
    detail: str = ""
    hold_s: float | None = 0.0


FAIL, PAUSE = "fail", "pause"
EACH = "each"


class Verify(NamedTuple):
    """How a node's success is verified: a GET of url, this status, so often in a row."""
    url: str
    status: int = 200
    timeout_s: float = 5.0
    successes: int = 1
    # The site to ask for: the Host header, and with https the name in the handshake.
    host: str = ""
    # A text that the answer's body must hold.
    contains: str = ""

    def url_for(self, node: ReleaseNode) -> str:
        """Gives the address to probe on a node."""
        host = f"[{node.main_ip}]" if ":" in node.main_ip else node.main_ip
        return self.url.replace("{main_ip}", host).replace("{name}", urllib.parse.quote(node.name, safe=""))


class Strategy(NamedTuple):
    """How a release goes out, as it was asked for (contract section 7). A text like "10%" is a share."""
    batches: tuple[int | str, ...] = (1,)
    max_failed: int | str = 0
    max_failed_total: int | str | None = None
    max_parallel: int = 0
    soak_s: float = 0.0
    pause_after: tuple[int, ...] | str = ()
    on_exceed: str = FAIL
    node_deadline_s: float | None = None
    retries: int | None = None
    start_at: str = ""
    verify: Verify | None = None

    def pauses_after(self, batch: int) -> bool:
        """Says whether someone must resume after a batch."""
        return self.pause_after == EACH or batch in self.pause_after


NO_STRATEGY = Strategy()


class ReleaseRequest(NamedTuple):
    """What a release is asked to be: see POST /api/v1/releases. None: no choice among the nodes."""
    target: str = "cdn"
    reason: str = ""
    payload: Mapping[str, Any] = {}
    retry_of: int | None = None
    rollback_of: int | None = None
    strategy: Mapping[str, Any] = {}
    node_ids: Sequence[int] | None = None
    labels: Mapping[str, str] | None = None
    version: int | None = None


class LeftOut(NamedTuple):
    """A node that was meant and does not get the release, and why."""
    node_id: int
    name: str
    why: str


class Plan(NamedTuple):
    """What a release will do, in whole numbers: node ids by batch, limits, and the nodes left out."""
    strategy: Strategy
    batches: list[list[int]]
    max_failed: list[int]
    max_failed_total: int | None
    left_out: Sequence[LeftOut]
    # Names of execute nodes that will serve no site, as the payload says.
    emptied: Sequence[str] = ()
    # Nodes whose failure counts against no limit.
    tolerated: frozenset[int] = frozenset()
    # The release whose payload goes out again: its id and version.
    payload_of: tuple[int, int] | None = None
    # The version that it would get now.
    version: int = 0

    def __str__(self) -> str:
        """Gives the plan as a line for the history."""
        limits = f"at most {_words(self.max_failed)} failed" + (
            "" if self.max_failed_total is None else f", {self.max_failed_total} in all")
        return f"batches of {_words([len(batch) for batch in self.batches])}; {limits}"


def _words(numbers: Sequence[int]) -> str:
    """Gives '1, 5, 44'; a long list is cut."""
    return ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")


HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
# The end of what the system's resolver may read as an IPv4 address of another spelling: 0xA9FEA9FE, 10.7, 010.0.0.7.
NUMBER_LABEL = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def parse_address(text: object) -> str:
    """Return an IP address or host name in its plain form; raise AppError 2003 for what is no host's."""
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            if "%" not in text:
                address = plain_address(ipaddress.ip_address(text))
                if fault := address_fault(address):
                    raise AppError(2003, f"mainIp {address} {fault}: name the node's own address")
                return str(address)
        labels = text.split(".")
        if len(text) <= 253 and all(map(HOST_LABEL.fullmatch, labels)) and not NUMBER_LABEL.fullmatch(labels[-1]):
            return text.lower()
    raise AppError(2003, f"mainIp {one_line(text, 60)!r} is neither an IP address nor a host name")


def address_fault(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return why no host has an address of its own like this one: it means many hosts or none; "" for a host's."""
    is_broadcast = address.version == 4 and (int(address) == 0xFFFFFFFF or int(address) >> 24 == 0)
    kinds = ((address.is_unspecified, "stands for any address"), (address.is_multicast, "is a multicast address"),
             (address.is_link_local, "is link-local (cloud metadata lives there)"),
             (is_broadcast, "is no address of a host"))
    return next((what for is_it, what in kinds if is_it), "")


def parse_port(value: object) -> int:
    """Gives a TCP port; AppError 2003 when it is not a whole number from 1 to 65535."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise AppError(2003, f"agentPort {one_line(value, 40)} must be a whole number from 1 to 65535")
    return value


def parse_name(text: object) -> str:
    """Return a node's or a token's name; raise AppError 2003 unless it is 1 to 100 plain characters."""
    if not isinstance(text, str) or not 1 <= len(text) <= 100 or not is_plain(text):
        raise AppError(2003, f"name {one_line(ascii(text), 50)} must be 1 to 100 {PLAIN_TEXT}")
    return text


def parse_choice(field: str, value: object, choices: Sequence[str]) -> str:
    """Gives value when it is one of the choices; AppError 2003 else."""
    if not isinstance(value, str) or value not in choices:
        raise AppError(2003, f"{field} {one_line(value, 40)!r} must be one of {', '.join(choices)}")
    return value


def parse_flag(field: str, value: object) -> bool:
    """Gives a JSON boolean; AppError 2003 else."""
    if not isinstance(value, bool):
        raise AppError(2003, f"{field} must be true or false")
    return value


def parse_labels(value: object) -> str:
    """Return labels as they are stored, a JSON object; raise AppError 2003 for what contract section 2 forbids."""
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise AppError(2003, "labels must be an object whose values are strings")
    if len(value) > MAX_LABELS:
        raise AppError(2003, f"labels must be at most {MAX_LABELS}, not {len(value)}")
    for key, text in value.items():
        if not 1 <= len(key) <= MAX_LABEL_KEY_CHARS or not is_plain(key):
            raise AppError(2003, f"labels: the key {one_line(ascii(key), 40)} must be 1 to {MAX_LABEL_KEY_CHARS} "
                                 f"{PLAIN_TEXT}")
        if len(text) > MAX_LABEL_CHARS or not is_plain(text):
            raise AppError(2003, f"labels: the value of {one_line(key, 30)} must be at most {MAX_LABEL_CHARS} "
                                 f"{PLAIN_TEXT}")
    return to_json(value)


def parse_text(field: str, value: object, max_chars: int = 500) -> str:
    """Gives a text of one line for people; AppError 2003 when it is none or too long."""
    if not isinstance(value, str) or len(value) > max_chars:
        raise AppError(2003, f"{field} must be a text of at most {max_chars} characters")
    return one_line(value, max_chars)


def parse_target(value: object) -> str:
    """Gives a release's target: a word of letters, digits and ._-; AppError 2003 else."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise AppError(2003, "target must be 1 to 64 letters, digits or . _ -")
    return value


def parse_version(field: str, value: object) -> int:
    """Return a version that a person names; raise AppError 2003 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_NAMED_VERSION:
        raise AppError(2003, f"{field} {one_line(value, 40)} must be a whole number from 1 to {MAX_NAMED_VERSION}")
    return value


def parse_payload(value: object) -> dict[str, Any]:
    """Gives a release's payload; AppError 2003 when it is not an object."""
    if not isinstance(value, dict):
        raise AppError(2003, "payload must be a JSON object")
    return value


def _whole(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"must be a whole number from {low} to {high}")
    return value


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(value)
    return parse


def _share(low: int) -> Callable[[Any], int | str]:
    """Gives a parser of a number from low on, or of a share of "1%" to "100%" (of "0%" when low is 0)."""
    def parse(value: Any) -> int | str:
        if isinstance(value, str) and re.fullmatch(r"(0|[1-9][0-9]?|100)%", value) and int(value[:-1]) >= low:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_NODES:
            raise ValueError(f'must be a whole number from {low} to {MAX_NODES}, or "{low}%" to "100%"')
        return value
    return parse


def _batch_sizes(value: Any) -> tuple[int | str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_BATCHES:
        raise ValueError(f"must be a list of 1 to {MAX_BATCHES} sizes")
    return tuple(map(_share(1), value))


def _batch_numbers(value: Any) -> tuple[int, ...] | str:
    if value == EACH:
        return EACH
    if not isinstance(value, list) or len(value) > MAX_BATCHES:
        raise ValueError(f'must be a list of batch numbers, or "{EACH}"')
    return tuple(_whole(number, 1, MAX_NODES) for number in value)


def _end_of_failing(value: Any) -> str:
    if value not in (FAIL, PAUSE):
        raise ValueError(f'must be "{FAIL}" or "{PAUSE}"')
    return str(value)


def parse_time(value: Any) -> str:
    """Gives an RFC 3339 time as it is stored, in UTC; ValueError for anything else."""
    # RFC 3339, 5.6: t and z may be small, and a second may have any number of digits; milliseconds are kept
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
    """Gives the address of a probe. Its host is the node itself: a probe goes nowhere else."""
    if not isinstance(value, str) or len(value) > 500 or not re.fullmatch(VERIFY_URL, value):
        raise ValueError("must be http:// or https:// with the host {main_ip} or {name}, "
                         "like http://{main_ip}:8080/health, and no other {...} in it")
    port = re.match(r"https?://[^/?:]*:([0-9]+)", value)
    if port and not 1 <= int(port[1]) <= 65535:
        raise ValueError("has a port that is not from 1 to 65535")
    return value


VERIFY_HOST = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"


def _verify_host(value: Any) -> str:
    """Return the name of a site. It decides what is asked for, not where: a probe goes to the node alone."""
    if not isinstance(value, str) or len(value) > 253 or not re.fullmatch(f"({VERIFY_HOST})?", value):
        raise ValueError("must be a host name, like www.example.com")
    return value


def _verify_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 500:
        raise ValueError("must be a text of at most 500 characters")
    return value


# Key of verify: field, how it is read, schema.
VERIFY_KEYS: Mapping[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "url": ("url", _verify_url, {"type": "string", "maxLength": 500, "pattern": f"^{VERIFY_URL}$"}),
    "status": ("status", lambda v: _whole(v, 100, 599), {"type": "integer", "minimum": 100, "maximum": 599}),
    "timeoutSec": ("timeout_s", _seconds(0.1, 60), {"type": "number", "minimum": 0.1, "maximum": 60}),
    "successes": ("successes", lambda v: _whole(v, 1, 100), {"type": "integer", "minimum": 1, "maximum": 100}),
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


def _share_schema(low: int) -> dict[str, Any]:
    return {"oneOf": [{"type": "integer", "minimum": low, "maximum": MAX_NODES},
                      {"type": "string", "pattern": "^(0|[1-9][0-9]?|100)%$" if low == 0 else "^([1-9][0-9]?|100)%$"}]}


# Key of a strategy (contract section 7): field, how it is read, schema for /openapi.json.
STRATEGY_KEYS: Mapping[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "batches": ("batches", _batch_sizes,
                {"type": "array", "minItems": 1, "maxItems": MAX_BATCHES, "items": _share_schema(1)}),
    "maxFailed": ("max_failed", _share(0), _share_schema(0)),
    "maxFailedTotal": ("max_failed_total", _share(0), _share_schema(0)),
    "maxParallel": ("max_parallel", lambda v: _whole(v, 0, MAX_NODES),
                    {"type": "integer", "minimum": 0, "maximum": MAX_NODES}),
    "soakSec": ("soak_s", _seconds(0, 604800), {"type": "number", "minimum": 0, "maximum": 604800}),
    "pauseAfter": ("pause_after", _batch_numbers, {"oneOf": [
        {"type": "array", "maxItems": MAX_BATCHES, "items": {"type": "integer", "minimum": 1, "maximum": MAX_NODES}},
        {"const": EACH}]}),
    "onExceed": ("on_exceed", _end_of_failing, {"type": "string", "enum": [FAIL, PAUSE]}),
    "nodeDeadlineSec": ("node_deadline_s", _seconds(1, 604800), {"type": "number", "minimum": 1, "maximum": 604800}),
    "retries": ("retries", lambda v: _whole(v, 0, 100), {"type": "integer", "minimum": 0, "maximum": 100}),
    "startAt": ("start_at", parse_time, {"type": "string", "format": "date-time"}),
    "verify": ("verify", _verify, {
        "type": "object", "properties": {key: schema for key, (_, _, schema) in VERIFY_KEYS.items()},
        "required": ["url"], "additionalProperties": False}),
}


def _fields(value: Mapping[str, Any], keys: Mapping[str, tuple[str, Callable[[Any], Any], Any]]) -> dict[str, Any]:
    """Gives the fields of an object by its table of keys; ValueError naming the key that is wrong."""
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
    """Gives a strategy from its JSON; AppError 2003 naming the key that is unknown or can't be meant."""
    if not isinstance(value, dict):
        raise AppError(2003, "strategy must be a JSON object")
    try:
        return Strategy(**_fields(value, STRATEGY_KEYS))
    except ValueError as error:
        raise AppError(2003, f"strategy: {error}") from None


def in_numbers(share: int | str, whole: int) -> int:
    """Gives a number as it is, and "N%" as that share of a whole, rounded down: "10%" of 19 is 1."""
    return share if isinstance(share, int) else whole * int(share[:-1]) // 100


def plan_batches(node_ids: Sequence[int], sizes: Sequence[int | str] = NO_STRATEGY.batches) -> list[list[int]]:
    """Gives the nodes by batch: shares are of all nodes and at least 1; what is left is the last batch.

    Of 50 nodes [1, "10%", "25%"] makes batches of 1, 5, 12 and 32.
    """
    batches, start = [], 0
    for size in (*sizes, len(node_ids)):
        end = start + max(1, in_numbers(size, len(node_ids)))
        batches.append(list(node_ids[start:end]))
        start = end
    return [batch for batch in batches if batch]


def make_plan(strategy: Strategy, node_ids: Sequence[int], left_out: Sequence[LeftOut] = (),
              batches: list[list[int]] | None = None, tolerated: frozenset[int] = frozenset()) -> Plan:
    """Return a strategy in whole numbers for these nodes; raise AppError 2003 when it names a batch too many.

    batches: they are settled already. tolerated: nodes whose failure counts against no limit.
    """
    batches = plan_batches(node_ids, strategy.batches) if batches is None else batches
    beyond = [] if strategy.pause_after == EACH else [n for n in strategy.pause_after if int(n) > len(batches)]
    if beyond:
        raise AppError(2003, f"strategy: pauseAfter names batch {beyond[0]}, and there are {len(batches)}")
    total = None if strategy.max_failed_total is None else in_numbers(strategy.max_failed_total, len(node_ids))
    limits = [in_numbers(strategy.max_failed, len(batch)) + len(tolerated.intersection(batch))
              for batch in batches]
    return Plan(strategy, batches, limits, total, list(left_out), tolerated=tolerated)


def choose_nodes(nodes: Sequence[Node], request: ReleaseRequest) -> tuple[list[Node], list[LeftOut]]:
    """Return the nodes that a release goes to, by id, and those that are left out of it.

    Raise AppError 2003 for an id that is not among the enabled, online nodes, 3003 when none is left.
    """
    if request.node_ids is not None:
        by_id = {node.id: node for node in nodes}
        for number in request.node_ids:
            if number not in by_id:
                raise AppError(2003, f"nodeIds: node {number} does not exist")
            if not by_id[number].gets_releases:
                raise AppError(2003, f"nodeIds: node {by_id[number].name} is {by_id[number].condition}")
        return [by_id[number] for number in sorted(request.node_ids)], []
    if request.labels is not None:
        wanted = request.labels.items()
        nodes = [node for node in nodes if wanted <= node.label_items]
    chosen = [node for node in nodes if node.gets_releases]
    if not chosen:
        among = "" if request.labels is None else f" with the labels {to_json(dict(request.labels))}"
        raise AppError(3003, f"no online nodes{among}: add one, or enable one and set it online")
    return chosen, who_is_left_out(nodes)


def who_is_left_out(nodes: Iterable[Node]) -> list[LeftOut]:
    """Return those of some nodes that get no releases now, and why."""
    return [LeftOut(node.id, node.name, node.condition) for node in nodes if not node.gets_releases]


def refuse_twins(nodes: Iterable[Node]) -> None:
    """Raise AppError 3003 naming two nodes with one address: it would get the same task twice at once (section 2)."""
    seen: dict[Endpoint, Node] = {}
    for node in nodes:
        twin = seen.setdefault(node.endpoint, node)
        if twin is not node:
            raise AppError(3003, f"nodes {twin.name} and {node.name} have one address, "
                                 f"{node.main_ip}:{node.agent_port}: disable one of them")


# The key of a payload that an execute agent needs: without it, it drops all its sites (contract section 1).
WEBSITES = "websites"


def drops_sites(payload: Mapping[str, Any]) -> bool:
    """Say whether an execute agent would drop all its sites without having been asked to."""
    return not isinstance(payload.get(WEBSITES), list)


def refuse_dropping_sites(payload: Mapping[str, Any], nodes: Iterable[Node | ReleaseNode], code: int = 2003,
                          what: str = "the payload") -> None:
    """Raise AppError where an execute agent among the nodes would drop all its sites without having been asked to."""
    served = [node.name for node in nodes if node.agent_protocol == EXECUTE]
    if served and drops_sites(payload):
        raise AppError(code, f"{what} has no list {WEBSITES}, and {names_of(served)} would drop all sites without it "
                             f'(protocol execute): name the sites, or "{WEBSITES}": [] where none is meant')


def names_of(names: Sequence[str]) -> str:
    """Return 'edge-1', or 'edge-1 and 3 more'."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def parse_release_id(field: str, value: object) -> int:
    """Return the id of a release; raise AppError 2003 for what can be none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ID:
        raise AppError(2003, f"{field} {one_line(value, 40)} must be the id of a release")
    return value


def parse_node_ids(value: object) -> list[int]:
    """Gives the ids of a choice of nodes; AppError 2003 when it is no list of different ids."""
    if (not isinstance(value, list) or not value or len(set(map(str, value))) != len(value)
            or not all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= MAX_ID for v in value)):
        raise AppError(2003, "nodeIds must be a list of different ids of nodes")
    return value


def known_keys(body: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises AppError 2003 naming the first key of body that is not known."""
    for key in body:
        if key not in known:
            raise AppError(2003, f"{one_line(key, 60)} is not a known key{did_you_mean(key, known)}")


def check_payload_version(payload: Mapping[str, Any], version: int) -> None:
    """Raises AppError 2003 when the payload names another version than the release's."""
    named = payload.get("version", version)
    if isinstance(named, bool) or named != version or not isinstance(named, int):
        raise AppError(2003, f"payload names version {one_line(to_json(named), 40)}, the release is version {version}:"
                             " leave the version out")


def payload_for_version(payload: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Gives an older release's payload for a new version (contract rule 10)."""
    return {**payload, "version": version} if "version" in payload else dict(payload)


def new_tag() -> str:
    """Return what tells a release's tasks from those of any other, in any database: eight hex digits."""
    return secrets.token_hex(4)


def task_id_for(release_type: str, main_ip: str, version: int, tag: str) -> str:
    """Return the agent's task id: the same for every try of a release on a node, and no other's (section 1).

    Without a tag: of a release that was under way when tags came; its agents know the id in that form.
    """
    return f"{release_type}_{main_ip}_{version}" + (f"_{tag}" if tag else "")


class Moment(NamedTuple):
    """One instant on both clocks, in seconds. boot: what elapsed counts from, see Clock.boot()."""
    wall: float
    elapsed: float
    boot: str = ""

    @property
    def text(self) -> str:
        return utc_text(self.wall)

    def clock_mark(self, seconds: float) -> str:
        """Return the moment so many seconds from now, for left_s(): by a clock that nobody sets."""
        return f"{self.boot} {self.elapsed + seconds:.3f}"

    def left_s(self, until: str | None, mark: str, at_most_s: float) -> float:
        """Return the seconds until a stored moment, 0 when it is over; never more than it can have been for."""
        return min(max(self.until_s(until, mark), 0.0), at_most_s)

    def until_s(self, until: str | None, mark: str) -> float:
        """Return the seconds until a stored moment, below 0 when it is over.

        By the mark where this host wrote it since it was started, else by the wall clock.
        """
        boot, _, elapsed = mark.rpartition(" ")
        if elapsed and boot == self.boot:
            with contextlib.suppress(ValueError):  # written by hand
                return float(elapsed) - self.elapsed
        return epoch_or(until, self.wall) - self.wall


class Policy(NamedTuple):
    """The numbers of the configuration that a decision needs, in seconds but for retries."""
    retries: int
    node_deadline_s: float
    request_timeout_s: float
    interval_s: float
    # A dispatch leaves so soon after it was written down, or not at all.
    leave_within_s: float = 0.0
    # So many probes in a row verify a node; 0: the agent's word is enough.
    probes: int = 0

    @property
    def hold_s(self) -> float:
        """How long an execute agent may be at a request, reckoned from when it was written down."""
        return self.leave_within_s + self.request_timeout_s

    def under(self, strategy: Strategy) -> Policy:
        """Gives the numbers for a release, whose strategy may have its own."""
        return self._replace(
            retries=self.retries if strategy.retries is None else strategy.retries,
            node_deadline_s=strategy.node_deadline_s or self.node_deadline_s,
            probes=strategy.verify.successes if strategy.verify else 0)


class Roster:
    """The nodes of a release, indexed by what a decision asks of them.

    A release of ten thousand is decided on a thousand times: only those that are at work are looked at.
    """

    def __init__(self, nodes: Iterable[ReleaseNode] = ()):
        """Takes all nodes, by batch and id."""
        self._nodes = {n.node_id: n for n in nodes}
        # The nodes in each status, as they came into it; the pending ones by batch and id.
        self.of: dict[str, dict[int, ReleaseNode]] = {status: {} for status in (*OPEN, *AT_REST)}
        # How many rows each batch has, and how many of them are pending or running.
        self.sizes: dict[int, int] = {}
        self._open: dict[int, int] = {}
        # Addresses that several rows name: a person wrote them. And the highest version that a node was sent.
        named = collections.Counter(n.endpoint for n in self._nodes.values())
        self.twins = frozenset(endpoint for endpoint, count in named.items() if count > 1)
        self.highest_sent = max((n.last_version for n in self._nodes.values()), default=0)
        for n in self._nodes.values():
            self.of[n.status][n.node_id] = n
            self.sizes[n.batch] = self.sizes.get(n.batch, 0) + 1
            self._open[n.batch] = self._open.get(n.batch, 0) + (n.status in OPEN)
        self._batches = sorted(self.sizes)

    def __iter__(self) -> Iterator[ReleaseNode]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, node_id: int) -> ReleaseNode:
        return self._nodes[node_id]

    def get(self, node_id: int) -> ReleaseNode | None:
        """Gives a node by its id, None for one that is not of the release."""
        return self._nodes.get(node_id)

    def copy(self) -> Roster:
        """Gives one that can be changed apart."""
        other = Roster.__new__(Roster)
        other._nodes, other.sizes, other._open = self._nodes.copy(), self.sizes, self._open.copy()
        other.of, other._batches = {status: found.copy() for status, found in self.of.items()}, self._batches
        other.twins, other.highest_sent = self.twins, self.highest_sent
        return other

    def put(self, node: ReleaseNode) -> None:
        """Puts a node in the place of what was known of it."""
        before = self._nodes[node.node_id]
        if before.status != node.status:
            del self.of[before.status][node.node_id]
            self._open[node.batch] += (node.status in OPEN) - (before.status in OPEN)
        self.of[node.status][node.node_id] = self._nodes[node.node_id] = node

    @property
    def open(self) -> list[ReleaseNode]:
        """The nodes that have not come to their end."""
        return [*self.of[RUNNING].values(), *self.of[PENDING].values()]

    @property
    def batch(self) -> int:
        """The lowest batch with a pending or running node, 0 for none."""
        first = next(iter(self.of[PENDING].values()), None)
        batches = [n.batch for n in self.of[RUNNING].values()] + ([first.batch] if first else [])
        return min(batches, default=0)

    @property
    def last_batch(self) -> int:
        return self._batches[-1] if self._batches else 0

    def open_in(self, batch: int) -> int:
        """Gives how many nodes of a batch are pending or running."""
        return self._open.get(batch, 0)

    def batch_before(self, batch: int) -> int:
        """Gives the batch before one, 0 for none."""
        found = bisect.bisect_left(self._batches, batch)
        return self._batches[found - 1] if found else 0

    def looked_at_again(self, batch: int) -> list[ReleaseNode]:
        """Gives the nodes of a batch that wait for the look at the end of its soak."""
        return [n for n in self.of[SUCCESS].values() if n.batch == batch and not n.is_looked_at]


class Freeze(NamedTuple):
    """The switch that lets nothing new be dispatched, by any process; who set it, when and why."""
    frozen: bool = False
    reason: str = ""
    actor: str = ""
    at: str = ""


NO_FREEZE = Freeze()


class Stage(NamedTuple):
    """Where a running release stands between its batches.

    batch: whose pending nodes may go now, 0 for none. passed_batch, soak_until, soak_clock: as in Decision.
    soak_left_s: how many seconds of the soak are left. pauses: whether someone must resume first.
    looks_at: the batch whose second look is on, or 0.
    """
    batch: int
    passed_batch: int
    soak_until: str | None = None
    soak_clock: str = ""
    soak_left_s: float = 0.0
    pauses: bool = False
    looks_at: int = 0


# ======================================================================================
# 6 Sentences: status_reason, what a release is doing or waiting for, on whom and until when.
#   Pure; uses 1, 2 and 5.
# ======================================================================================

def first_failed(nodes: Roster) -> ReleaseNode | None:
    """Gives the node that failed first, the lower id of two at once."""
    return min(nodes.of[FAILED].values(), key=lambda n: (n.finished_at or "", n.node_id), default=None)


REASON_PENDING = "waiting for the executor"
NO_NODES = "the release has no nodes"
# A node that runs for less is not worth a word.
SLOW_S = 1.0


class Situation(NamedTuple):
    """What a sentence needs to know beside the nodes."""
    release: Release
    strategy: Strategy
    policy: Policy
    stage: Stage
    # Which limit the failures are beyond, and why the release's own row can't be used.
    exceeded: str = ""
    broken: str = ""
    busy: frozenset[Endpoint] = frozenset()
    freeze: Freeze = NO_FREEZE

    @property
    def failing(self) -> bool:
        return bool(self.broken or (self.exceeded and self.strategy.on_exceed == FAIL))


def describe(status: str, nodes: Roster, now: Moment, situation: Situation) -> str:
    """Gives status_reason: what the release is doing or waiting for, on whom, until when."""
    if status == SUCCESS:
        return f"{count_of_nodes(len(nodes))} succeeded"
    if status == PARTIAL:
        return one_line(f"{len(nodes.of[FAILED])} of {count_of_nodes(len(nodes))} failed, within what was tolerated: "
                        + _names(nodes.of[FAILED].values()))
    if status == FAILED:
        return one_line(_cause(nodes, situation))
    if status == CANCELLED:
        return f"cancelled with {len(nodes.of[SUCCESS])} of {count_of_nodes(len(nodes))} done"
    running = nodes.of[RUNNING].values()
    waiting = f"waiting for {_names(running)} to end" if running else ""
    if status == CANCELLING:
        return one_line("cancelling: " + (waiting or "nothing is in flight"))
    if status == PAUSED:
        return one_line(_paused(nodes, situation, waiting))
    if situation.failing:
        first = first_failed(nodes)
        return one_line(f"stopping, {f'node {first.name} failed' if first else situation.broken}: {waiting}")
    return one_line(_progress(nodes, now, situation, waiting))


def _cause(nodes: Roster, situation: Situation) -> str:
    first = first_failed(nodes)
    if situation.broken or first is None:
        return situation.broken or NO_NODES
    node = f"node {first.name} in batch {first.batch}: {first.error_msg}"
    tolerates = situation.strategy.max_failed not in (0, "0%") or situation.strategy.max_failed_total
    return f"stopped, {situation.exceeded}; first {node}" if tolerates else f"stopped by {node}"


def _paused(nodes: Roster, situation: Situation, waiting: str) -> str:
    """Gives who paused it, where it stands, what it waits for, and what sets it going again."""
    by = f" by {situation.release.paused_by}" if situation.release.paused_by else ""
    begun = max((n.batch for n in nodes if n.status not in (PENDING, SKIPPED)), default=0)
    where = f" {'in' if nodes.open_in(begun) else 'after'} batch {begun}" if begun else ""
    then = "resume to go on"
    if situation.failing:
        first = first_failed(nodes)
        then = f"{f'node {first.name} failed' if first else situation.broken}: resume to end the release"
    elif situation.exceeded:
        then = f"{situation.exceeded}: resume and accept the failures, or cancel"
    return f"paused{by}{where}: " + (f"{waiting}; " if waiting else "") + then


def _progress(nodes: Roster, now: Moment, situation: Situation, waiting: str) -> str:
    """Gives what a running release is at: frozen, soaking, verifying, or a batch."""
    stage, freeze = situation.stage, situation.freeze
    if not nodes:
        return NO_NODES
    if freeze.frozen:
        return f"frozen: {freeze.reason}" + (f"; {waiting}" if waiting else "")
    if stage.looks_at:
        return (f"verifying batch {stage.looks_at} after its soak: waiting for "
                + _names(nodes.looked_at_again(stage.looks_at)))
    batch = nodes.batch
    if stage.soak_left_s:
        return f"soaking batch {nodes.batch_before(batch)} until {stage.soak_until}"
    members = itertools.takewhile(lambda n: n.batch == batch, nodes.of[PENDING].values())
    held = [n for n in members if n.endpoint in situation.busy] if situation.busy else []
    sentence = (f"batch {batch} of {nodes.last_batch}: waiting for {nodes.open_in(batch)} of "
                + count_of_nodes(nodes.sizes.get(batch, 0)))
    return (sentence + _slowest([n for n in nodes.of[RUNNING].values() if n.batch == batch], now, situation.policy)
            + (f"; {_names(held)} busy with an earlier request" if held else ""))


def _slowest(running: Sequence[ReleaseNode], now: Moment, policy: Policy) -> str:
    slowest = min(running, key=lambda n: n.deadline, default=None)
    if slowest is None:
        return ""
    ran_s = now.elapsed + policy.node_deadline_s - slowest.deadline
    if ran_s < SLOW_S:
        return ""
    verified = ", which is verified" if slowest.next_op == PROBE else ""
    return f", slowest {slowest.name}{verified} for {ran_s:.0f} s of {policy.node_deadline_s:.0f} s"


def count_of_nodes(number: int) -> str:
    """Gives '1 node', '2 nodes'."""
    return f"{number} node" + ("" if number == 1 else "s")


def _names(nodes: Collection[ReleaseNode]) -> str:
    first = min(nodes, key=lambda n: (n.batch, n.node_id)).name if nodes else "no node"
    return f"{first} and {len(nodes) - 1} more" if len(nodes) > 1 else first


# ======================================================================================
# 7 Decision: what to write and what to send next. Pure: no clock, no socket, no disk, no
#   thread. Uses 1, 2, 5 and 6.
#
#   A driver folds what the agents said into its nodes with observe(), asks decide() what
#   follows, commits that, and only then sends. decide() compares what is with what should
#   be, so a restart needs no path of its own: adopt() says what a row found running means.
#   Everything that moves a status lives here: change it here and nowhere else.
# ======================================================================================

# What came back from an agent.
ACCEPTED = "accepted"   # it has the task
WORKING = "working"     # the task is not at its end
UNKNOWN = "unknown"     # it does not know the task
UNSENT = "unsent"       # the request never reached it
LOST = "lost"           # the request may have reached it, no answer came
UNCLEAR = "unclear"     # it answered what can't be used: 429, 5xx, nonsense
HELD = "held"           # we kept it back ourselves: it says nothing of the agent
# ... and SUCCESS and FAILED, which are believed.


class Outcome(NamedTuple):
    """What one request to an agent brought."""
    node_id: int
    op: str
    result: str
    task_id: str = ""
    error_kind: str = ""
    message: str = ""
    detail: str = ""
    hold_s: float = 0.0
    # The version that an agent says it has already applied; 0 where it says nothing of the kind.
    applied: int = 0
    # Whether an answer that can't be used says that nothing was done.
    is_refusal: bool = False


# What an agent is taken to have said where its text is empty.
NO_REASON_GIVEN = "the agent gave no reason"


# What to do next when a request failed (rule 8): a tasks agent is asked before it is sent
# anything again; an execute agent can't be asked, but runs no version twice.
AFTER_ERROR: Mapping[tuple[str, str, str], str] = {
    (TASKS, DISPATCH, UNSENT): DISPATCH,
    (TASKS, DISPATCH, LOST): QUERY,
    (TASKS, DISPATCH, UNCLEAR): QUERY,
    (TASKS, QUERY, UNSENT): QUERY,
    (TASKS, QUERY, LOST): QUERY,
    (TASKS, QUERY, UNCLEAR): QUERY,
    (EXECUTE, DISPATCH, UNSENT): DISPATCH,
    (EXECUTE, DISPATCH, LOST): DISPATCH,
    (EXECUTE, DISPATCH, UNCLEAR): DISPATCH,
    **{(protocol, PROBE, result): PROBE for protocol in PROTOCOLS for result in (UNCLEAR, LOST)},
}


def backoff_s(errors: int, node_id: int) -> float:
    """Gives the wait before try errors + 1: doubling, half of it spread over the nodes."""
    longest = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * (1 << min(errors - 1, 10)))
    spread = (node_id * 2654435761 + errors * 40503) % 1024 / 1024  # jitter that a test can foretell
    return longest * (0.5 + 0.5 * spread)


def poll_delay_s(polls: int, interval_s: float) -> float:
    """Gives the wait before poll number polls (from 0): quick at first, then the interval."""
    return min(interval_s, float(FIRST_POLL_S * POLL_GROWTH ** min(polls, 64)))


def observe(node: ReleaseNode, outcome: Outcome, now: Moment, policy: Policy) -> ReleaseNode:
    """Folds what an agent or a probe answered into what the driver knows of a node."""
    if outcome.result == HELD:
        return node._replace(in_flight=False, due=now.elapsed)
    if outcome.op == PROBE and outcome.result == SUCCESS:
        return _observe_pass(node, now, policy)
    if outcome.result in (SUCCESS, ACCEPTED) and outcome.applied and not node.reached:
        # no try of ours can have done it: somebody else's version, which only has the same number
        return node._replace(in_flight=False, verdict=Verdict(
            FAILED, REJECTED, f"the agent is already at version {outcome.applied}", detail_text(outcome.detail)))
    if outcome.result == SUCCESS and policy.probes:
        return node._replace(in_flight=False, next_op=PROBE, due=now.elapsed, errors=0, passes=0, reached=True,
                             agent_said=detail_text(outcome.detail))
    if outcome.result == SUCCESS:
        return node._replace(in_flight=False, verdict=Verdict(SUCCESS, detail=detail_text(outcome.detail)))
    if outcome.result == FAILED:
        return node._replace(in_flight=False, verdict=Verdict(
            FAILED, outcome.error_kind, one_line(outcome.message) or NO_REASON_GIVEN, detail_text(outcome.detail)))
    if outcome.result == ACCEPTED:
        return node._replace(in_flight=False, task_id=outcome.task_id, is_renamed=outcome.task_id != node.task_id,
                             next_op=QUERY, errors=0, polls=0, due=now.elapsed + FIRST_POLL_S, reached=True,
                             is_unknown=True, is_at_work=True)
    if outcome.result == WORKING:
        return _without_credit(node)._replace(in_flight=False, errors=0, polls=node.polls + 1, is_at_work=True,
                                              due=now.elapsed + poll_delay_s(node.polls + 1, policy.interval_s))
    if outcome.result == UNKNOWN:
        # at once the first time: a tick that only waited here would end before it sent anything
        wait_s = backoff_s(node.forgotten, node.node_id) if node.forgotten else 0.0
        return node._replace(in_flight=False, next_op=DISPATCH, forgotten=node.forgotten + 1, is_at_work=False,
                             is_unknown=node.is_unknown or node.reached,
                             last_error="the agent does not know the task", due=now.elapsed + wait_s)
    return _observe_error(node, outcome, now, policy)


def _without_credit(node: ReleaseNode) -> ReleaseNode:
    """Return a node whose agent is at work: it keeps its own deadline, whatever pauses there were."""
    return node._replace(deadline=node.deadline - node.credit_s, credit_s=0.0)


def _observe_pass(node: ReleaseNode, now: Moment, policy: Policy) -> ReleaseNode:
    node = node._replace(in_flight=False, errors=0, passes=node.passes + 1)
    if node.passes < policy.probes:
        return node._replace(due=now.elapsed + PROBE_AGAIN_S)
    if node.status == SUCCESS:
        return node._replace(next_op="", is_looked_at=True)
    return node._replace(verdict=Verdict(SUCCESS, detail=node.agent_said))


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
            detail_text(outcome.detail), outcome.hold_s))
    held_s = outcome.hold_s if node.agent_protocol == EXECUTE else 0.0
    wait_s = max(backoff_s(node.errors, node.node_id), held_s)
    return node._replace(due=now.elapsed + wait_s,
                         next_op=AFTER_ERROR[node.agent_protocol, outcome.op, outcome.result])


class Hold(NamedTuple):
    """A time in which a pause or a freeze let a release dispatch nothing; by the wall clock, inf: it goes on."""
    since: float
    until: float


def holds_of(history: Iterable[tuple[str, str, str]]) -> list[Hold]:
    """Return the holds of a release from its own events in order: time, event, and the status after it."""
    holds: list[Hold] = []
    is_paused = is_frozen = False
    began: float | None = None
    for at, event, status in history:
        is_paused = status == PAUSED
        is_frozen = event == "frozen" or (is_frozen and event != "unfrozen")
        moment = epoch_or(at, 0.0)
        if (is_paused or is_frozen) and began is None:
            began = moment
        elif not (is_paused or is_frozen) and began is not None:
            holds.append(Hold(began, moment))
            began = None
    return holds if began is None else [*holds, Hold(began, float("inf"))]


def held_s(holds: Iterable[Hold], since: float, until: float) -> float:
    """Return for how many seconds between two times holds were on."""
    return sum(max(0.0, min(hold.until, until) - max(hold.since, since)) for hold in holds)


def adopt(node: ReleaseNode, now: Moment, policy: Policy, holds: Sequence[Hold] = (),
          quiet_s: float = 0.0) -> ReleaseNode:
    """Return a node as a new owner of its release finds it (rule 9): ask first, or wait and repeat.

    Deadline and hold were stored, and go on from there. What pauses and freezes took is no part of the
    deadline (contract section 7), unless the agent turns out to be at work. A deadline that passed while
    nobody looked leaves time for one question: the task may have ended well before it. quiet_s: so long no
    execute agent is sent anything, as one may be at a request that the database does not know.
    """
    if node.status != RUNNING:
        return node
    # a clock that was ahead must not keep a node for longer than a deadline can be
    age_s = max(0.0, -now.until_s(node.started_at, node.started_clock))
    credit_s = max(0.0, min(held_s(holds, now.wall - age_s, now.wall), age_s) - node.waited_s)
    deadline = now.elapsed - age_s + policy.node_deadline_s + node.waited_s + credit_s
    reached = bool(node.stored_reached)
    node = node._replace(reached=reached, is_unknown=reached, credit_s=credit_s, deadline=deadline)
    if node.agent_protocol == TASKS:
        return node._replace(next_op=QUERY, due=now.elapsed, deadline=max(deadline, now.elapsed + policy.interval_s))
    busy_s = max(quiet_s, now.left_s(node.hold_until, node.hold_clock, policy.hold_s))
    return node._replace(next_op=DISPATCH, due=now.elapsed + busy_s)


def kept_from_dispatch(nodes: Roster, passed_s: float) -> list[ReleaseNode]:
    """Return the nodes whose deadline moves along while a pause or a freeze keeps them from their dispatch.

    Whatever a node was at before, its agent is not at work now; one that is keeps its own deadline (section 7).
    That is known once it says so: until then a node that is being asked has the time as credit.
    """
    running = nodes.of[RUNNING].values()
    return [*(n._replace(deadline=n.deadline + passed_s, waited_s=n.waited_s + passed_s)
              for n in running if n.next_op == DISPATCH and not n.in_flight),
            *(n._replace(deadline=n.deadline + passed_s, credit_s=n.credit_s + passed_s)
              for n in running if n.next_op == QUERY and not n.is_at_work)]


class NodeChange(NamedTuple):
    """One node before and after a commit; detail goes into its event."""
    before: ReleaseNode
    after: ReleaseNode
    detail: str = ""


class Send(NamedTuple):
    """One request to an agent, to leave after the commit."""
    op: str
    node: ReleaseNode


class Decision(NamedTuple):
    """What to commit, then what to send, and when to look again if nothing happens.

    passed_batch, soak_until and soak_clock are the release's own from then on, and nodes what is known of them.
    """
    changes: tuple[NodeChange, ...]
    status: str
    status_reason: str
    error_msg: str
    sends: tuple[Send, ...]
    wake_at: float
    nodes: Roster
    passed_batch: int = 0
    soak_until: str | None = None
    soak_clock: str = ""

    def in_ascii(self) -> Decision:
        """Return the same with every text of it in ASCII, for a database that can't hold what an agent said."""
        changes = tuple(c._replace(after=c.after._replace(error_msg=_in_ascii(c.after.error_msg)),
                                   detail=_in_ascii(c.detail, MAX_DETAIL_BYTES)) for c in self.changes)
        return self._replace(changes=changes, status_reason=_in_ascii(self.status_reason),
                             error_msg=_in_ascii(self.error_msg), nodes=_with(self.nodes, changes))

    def changes_more_than_words(self, release: Release) -> bool:
        """Says whether something is to be committed at once; a new sentence alone can wait."""
        return bool(self.changes) or (self.status, self.passed_batch, self.soak_clock) != (
            release.status, release.passed_batch, release.soak_clock)


def _in_ascii(text: str, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    return one_line(text.encode("ascii", "backslashreplace").decode(), max_chars)


def stage_of(release: Release, nodes: Roster, now: Moment, strategy: Strategy) -> Stage:
    """Gives what lies between the batch that is done and the next one (contract section 7).

        a batch is at rest  ->  soak until a moment  ->  second look (verify)  ->  pause  ->  next batch

    Each step is left out where the strategy has none. Nothing follows the last batch. What is
    over is kept as passed_batch, so that nobody soaks or pauses twice.
    """
    batch = nodes.batch
    before = nodes.batch_before(batch)
    if before <= release.passed_batch:
        return Stage(batch, release.passed_batch)
    if strategy.soak_s:
        soak = _soak_of(release, now, strategy)
        if soak.soak_left_s:
            return soak
        if strategy.verify and nodes.looked_at_again(before):
            return soak._replace(looks_at=before)
    if strategy.pauses_after(before):
        return Stage(0, before, pauses=True)
    return Stage(batch, before)


def _soak_of(release: Release, now: Moment, strategy: Strategy) -> Stage:
    """Return what is left of a soak, which begins now where the release has none; it lasts by elapsed time.

    A new owner on another host, or after a start of this one, goes on by the wall clock and makes a mark of its own.
    """
    left_s = strategy.soak_s
    if release.soak_until:
        left_s = now.left_s(release.soak_until, release.soak_clock, strategy.soak_s)
        is_ours = release.soak_clock.rpartition(" ")[0] == now.boot and release.soak_clock
        if is_ours and now.until_s(release.soak_until, release.soak_clock) <= strategy.soak_s:
            return Stage(0, release.passed_batch, release.soak_until, release.soak_clock, left_s)
    return Stage(0, release.passed_batch, utc_text(now.wall + left_s), now.clock_mark(left_s), left_s)


def decide(release: Release, nodes: Roster, now: Moment, policy: Policy,
           strategy: Strategy = NO_STRATEGY, slots: int = 1, busy: frozenset[Endpoint] = frozenset(),
           broken: str = "", freeze: Freeze = NO_FREEZE, asks_first: bool = False) -> Decision:
    """Gives what follows from a release and its nodes (contract section 3, rules 3 to 8; section 7).

    nodes: all of the release's; they are left as they are. slots: how many requests may leave now.
    busy: addresses that another release has in flight, or that may still be at our last
    request. broken: why the release's own row can't be used, which ends it. asks_first: the database went back,
    so tasks agents are asked whether they know the task before they are sent it. Waiting for a
    slot is no reason to wake: a result will come and free one.
    """
    after = nodes.copy()
    ended = _ended(nodes, now, policy, strategy)
    _with(after, ended)
    if release.status == RUNNING and not freeze.frozen and not broken:
        surpassed = _surpassed(release, after, now)
        ended += surpassed
        _with(after, surpassed)
    exceeded = exceeded_limit(after, strategy)
    failing = bool(broken) or (bool(exceeded) and strategy.on_exceed == FAIL)
    if failing or release.status == CANCELLING:
        closed = [change for n in after.open for change in [_close_node(n, now)] if change]
        ended += closed
        _with(after, closed)
    stage = Stage(0, release.passed_batch, release.soak_until, release.soak_clock)
    if release.status == RUNNING and not failing and not exceeded:
        stage = stage_of(release, after, now, strategy)
    pauses = stage.pauses or (bool(exceeded) and not failing)
    status = PAUSED if release.status == RUNNING and pauses else _next_status(release.status, after, failing)
    # before it the row has our own id
    renamed = [NodeChange(n._replace(task_id=""), n._replace(is_renamed=False))
               for n in after.of[RUNNING].values() if n.is_renamed]
    # half of the slots are for nodes to be asked: else their kept connections would be gone by then
    waiting = sum(_is_due(n, QUERY, now) for n in after.of[RUNNING].values())
    # what is known not to have reached its agent is written down: a new owner would have to think that it may have
    unsent = [NodeChange(n, n._replace(stored_reached=0)) for n in after.of[RUNNING].values()
              if n.stored_reached and not n.reached and not n.in_flight]
    _with(after, unsent)
    is_going = status == RUNNING and not failing and not freeze.frozen
    begun = _dispatches(release, after, now, policy, strategy, stage.batch,
                        slots - min(waiting, slots // 2), busy, asks_first) if is_going else []
    _with(after, [*renamed, *begun])
    awaited = _awaited(after, stage, now, policy)
    asked = [n for n in awaited if _is_due(n, QUERY, now) or _is_due(n, PROBE, now)][: max(0, slots - len(begun))]
    asked_ids = {n.node_id for n in asked}
    soak_ends = [now.elapsed + stage.soak_left_s] if status == RUNNING and stage.soak_left_s else []
    return Decision(
        changes=(*ended, *renamed, *_without(unsent, begun), *begun),
        status=status,
        status_reason=describe(status, after, now, Situation(release, strategy, policy, stage, exceeded, broken,
                                                             busy, freeze)),
        error_msg=_error_msg(after, failing, release, broken),
        sends=(*(Send(change.after.next_op, change.after) for change in begun),
               *(Send(n.next_op, n._replace(in_flight=True)) for n in asked)),
        wake_at=min((*soak_ends, *(_wake(n, now) for n in awaited if n.node_id not in asked_ids)),
                    default=now.elapsed + policy.interval_s),
        nodes=after,
        passed_batch=stage.passed_batch,
        soak_until=None if status in TERMINAL else stage.soak_until,
        soak_clock="" if status in TERMINAL else stage.soak_clock)


def _with(nodes: Roster, changes: Iterable[NodeChange]) -> Roster:
    """Gives the roster, with the changes in it."""
    for change in changes:
        nodes.put(change.after)
    return nodes


def _ended(nodes: Roster, now: Moment, policy: Policy, strategy: Strategy) -> list[NodeChange]:
    """Gives the ends of the nodes that run, or that are looked at again after their success."""
    again = nodes.of[SUCCESS].values() if strategy.verify else ()
    return [change for n in (*nodes.of[RUNNING].values(), *again) for change in [_end_node(n, now, policy)] if change]


def _surpassed(release: Release, nodes: Roster, now: Moment) -> list[NodeChange]:
    """Return the ends of nodes that are to be sent something and have a higher version already (rule 2).

    Their agents would answer "success" and do nothing.
    """
    if nodes.highest_sent <= release.version:
        return []
    batch = nodes.batch
    due = [n for n in nodes.open if n.last_version > release.version and not n.in_flight and (
        n.next_op == DISPATCH if n.status == RUNNING else n.batch == batch)]
    return [_at_rest(n, Verdict(FAILED, REJECTED, f"node has version {n.last_version} already", hold_s=None), now)
            for n in due]


def _awaited(nodes: Roster, stage: Stage, now: Moment, policy: Policy) -> list[ReleaseNode]:
    """Return the nodes of which something is to come: those that run, and those to be verified again.

    A node's second look may last as long as its way to the first one: from its first probe on.
    """
    again = nodes.looked_at_again(stage.looks_at) if stage.looks_at else ()
    return [*nodes.of[RUNNING].values(), *(
        n if n.next_op == PROBE else n._replace(next_op=PROBE, deadline=now.elapsed + policy.node_deadline_s)
        for n in again)]


def _is_due(node: ReleaseNode, op: str, now: Moment) -> bool:
    return (node.next_op == op and not node.in_flight and node.due <= now.elapsed and node.verdict is None
            and (node.status == RUNNING or (node.status == SUCCESS and op == PROBE)))


def _wake(node: ReleaseNode, now: Moment) -> float:
    """Gives when an awaited node needs a look: never for one in flight or waiting for a slot."""
    if node.in_flight:
        return float("inf")
    return node.due if now.elapsed < node.due < node.deadline else node.deadline


def _end_node(node: ReleaseNode, now: Moment, policy: Policy) -> NodeChange | None:
    """Gives the end of a running node: its agent's word, a probe's, or the deadline.

    A success that a probe takes back at the end of the soak is an end too.
    """
    if node.in_flight or node.status not in (RUNNING, SUCCESS):
        return None
    if node.verdict is not None:
        return _at_rest(node, node.verdict, now)
    is_second = node.status == SUCCESS
    if now.elapsed < node.deadline or (is_second and node.next_op != PROBE):
        return None
    last = f"; last: {node.last_error}" if node.last_error else ""
    if is_second:
        message = f"not verified {policy.node_deadline_s:g} s after the end of its soak{last}"
        return _at_rest(node, Verdict(FAILED, VERIFY, one_line(message), detail_text(message)), now)
    message = f"not done {policy.node_deadline_s:g} s after its dispatch{last}"
    return _at_rest(node, Verdict(FAILED, DEADLINE, one_line(message), detail_text(message), None), now)


def _close_node(node: ReleaseNode, now: Moment) -> NodeChange | None:
    """Gives the end of a node in a release that sends nothing any more (rules 5 and 8)."""
    if node.status == PENDING:
        return NodeChange(node, node._replace(status=SKIPPED, finished_at=now.text))
    if node.status != RUNNING or node.in_flight or node.next_op != DISPATCH:
        return None
    if node.is_unknown:
        return _abandon(node, node.last_error or "the answer was lost with the process that asked", now)
    message = f"{node.last_error or 'it was never sent'} (not tried again: the release ends)"
    return _at_rest(node, Verdict(FAILED, node.last_kind or ABANDONED, one_line(message), detail_text(message)), now)


def _abandon(node: ReleaseNode, why: str, now: Moment) -> NodeChange:
    message = f"outcome unknown: {why}"
    return _at_rest(node, Verdict(FAILED, ABANDONED, one_line(message), detail_text(message), None), now)


def force_end(nodes: Roster, now: Moment) -> list[NodeChange]:
    """Gives how the nodes end of a release that is cancelled by force: at once, whatever they are at."""
    changes = [_abandon(n, "cancelled by force while it was in flight", now) if n.status == RUNNING
               else _close_node(n, now) for n in nodes.open]
    return [change for change in changes if change]


def _at_rest(node: ReleaseNode, verdict: Verdict, now: Moment) -> NodeChange:
    hold_until, hold_clock = node.hold_until, node.hold_clock
    if verdict.hold_s is not None:
        is_busy = verdict.hold_s > 0 and node.agent_protocol == EXECUTE
        hold_until, hold_clock = _hold_for(verdict.hold_s, now) if is_busy else (None, "")
    return NodeChange(node, node._replace(
        status=verdict.status, error_kind=verdict.error_kind, error_msg=verdict.error_msg, finished_at=now.text,
        hold_until=hold_until, hold_clock=hold_clock, verdict=None, next_op="", errors=0, passes=0, due=now.elapsed),
        verdict.detail)


def _hold_for(seconds: float, now: Moment) -> tuple[str, str]:
    """Return until when an execute agent may be busy, by both clocks."""
    return utc_text(now.wall + seconds), now.clock_mark(seconds)


def exceeded_limit(nodes: Roster, strategy: Strategy) -> str:
    """Gives which limit the failures are beyond, "" when they are tolerated (rule 5, section 7).

    A share is of the batch's planned size, which is its number of rows, and is rounded down.
    """
    failed = [n.batch for n in nodes.of[FAILED].values() if not n.accepted]
    for batch, count in sorted(collections.Counter(failed).items()):
        most = in_numbers(strategy.max_failed, nodes.sizes[batch])
        if count > most:
            return f"{count_of_nodes(count)} of batch {batch} failed, at most {most} may"
    if failed and strategy.max_failed_total is not None:
        count, most = len(failed), in_numbers(strategy.max_failed_total, len(nodes))
        if count > most:
            return f"{count_of_nodes(count)} failed in all, at most {most} may"
    return ""


def _next_status(status: str, nodes: Roster, failing: bool) -> str:
    """Gives the release's status after the changes; a paused one waits for a person whatever comes.

        status      nodes running or pending   failing   next
        running     running                    any       running
        running     none running               yes       failed
        running     pending only               no        running
        running     none                       no        success, or partial when some failed
        cancelling  running                    any       cancelling
        cancelling  none running               any       cancelled
    """
    if status not in (RUNNING, CANCELLING) or nodes.of[RUNNING]:
        return status
    if status == CANCELLING:
        return CANCELLED
    if failing or not nodes:
        return FAILED
    if nodes.of[PENDING]:
        return RUNNING
    return SUCCESS if len(nodes.of[SUCCESS]) == len(nodes) else PARTIAL


def _dispatches(release: Release, nodes: Roster, now: Moment, policy: Policy, strategy: Strategy, batch: int,
                slots: int, busy: frozenset[Endpoint], asks_first: bool = False) -> list[NodeChange]:
    """Gives the intents of the dispatches that leave now: repetitions, then the current batch's."""
    running = nodes.of[RUNNING].values()
    ready = [n for n in running if _is_due(n, DISPATCH, now)]
    # one that is pending and in flight was sent by a commit that the database has lost: its outcome is to come
    members = itertools.takewhile(lambda n: n.batch == batch, nodes.of[PENDING].values())
    room = min(slots, strategy.max_parallel - len(running)) if strategy.max_parallel else slots
    # and one that has a higher version fails in the next turn
    fresh = itertools.islice(_free((n for n in members if not n.in_flight and n.last_version <= release.version),
                                   nodes, busy, now), max(0, room))
    return [_intent(release, n, now, policy, asks_first) for n in (*ready, *fresh)[:max(0, slots)]]


def _free(members: Iterable[ReleaseNode], nodes: Roster, busy: frozenset[Endpoint],
          now: Moment) -> Iterator[ReleaseNode]:
    """Return those whose address has no task: of another release, or of this one by another row."""
    if not busy and not nodes.twins:
        yield from members
        return
    taken = set(busy)
    if nodes.twins:
        taken.update(n.endpoint for n in nodes.of[RUNNING].values())
        taken.update(n.endpoint for n in nodes.of[FAILED].values() if now.until_s(n.hold_until, n.hold_clock) > 0)
    for node in members:
        if node.endpoint not in taken:
            if node.endpoint in nodes.twins:
                taken.add(node.endpoint)
            yield node


def _without(changes: Iterable[NodeChange], others: Iterable[NodeChange]) -> list[NodeChange]:
    """Return changes but those of nodes that other changes are for."""
    ids = {change.after.node_id for change in others}
    return [change for change in changes if change.after.node_id not in ids]


def _intent(release: Release, node: ReleaseNode, now: Moment, policy: Policy, asks_first: bool = False) -> NodeChange:
    """Return what is written before a dispatch leaves; started_at and the deadline are the first try's.

    What is sent is our own id, whatever the agent called its task before.
    """
    hold_until, hold_clock = _hold_for(policy.hold_s, now) if node.agent_protocol == EXECUTE else (None, "")
    task_id = task_id_for(release.type, node.main_ip, release.version, release.tag)
    is_first = node.status == PENDING
    asks = asks_first and is_first and node.agent_protocol == TASKS
    return NodeChange(node, node._replace(
        stored_reached=int(node.reached or not asks), status=RUNNING, task_id=task_id, attempts=node.attempts + 1,
        hold_until=hold_until, hold_clock=hold_clock, in_flight=True, verdict=None,
        waited_s=node.waited_s + node.credit_s, credit_s=0.0,
        next_op=QUERY if asks else DISPATCH, started_at=now.text if is_first else node.started_at,
        started_clock=now.clock_mark(0.0) if is_first else node.started_clock,
        deadline=now.elapsed + policy.node_deadline_s if is_first else node.deadline))


def _error_msg(nodes: Roster, failing: bool, release: Release, broken: str) -> str:
    if broken or not nodes:
        return one_line(broken or NO_NODES)
    first = first_failed(nodes) if failing else None
    return one_line(f"node {first.name}: {first.error_msg}") if first else release.error_msg


class Verb(NamedTuple):
    """What an operator may do to a release: from which states, to which, and the event that tells of it."""
    name: str
    states: tuple[str, ...]
    status: str
    event: str


CANCEL_BY_FORCE = "cancel --force"

VERBS: Mapping[str, Verb] = {verb.name: verb for verb in (
    Verb("pause", (PENDING, RUNNING), PAUSED, "paused"),
    Verb("resume", (PAUSED,), RUNNING, "resumed"),
    Verb("cancel", (PENDING, RUNNING, PAUSED), CANCELLING, "cancelling"),
    Verb(CANCEL_BY_FORCE, (PENDING, RUNNING, PAUSED, CANCELLING), CANCELLING, "cancelling"),
    # these make a new release
    Verb("retry", (PARTIAL, FAILED, CANCELLED), PENDING, "created"),
    Verb("rollback", (SUCCESS, PARTIAL, FAILED, CANCELLED), PENDING, "created"),
)}


def check_verb(verb: str, release: Release) -> None:
    """Raises AppError 3003 saying which states allow the verb, where this one does not."""
    allowed = VERBS[verb].states
    if release.status not in allowed:
        states = " or ".join(filter(None, (", ".join(allowed[:-1]), allowed[-1])))
        raise AppError(3003, f"release {release.id} is {release.status}: {verb} needs {states}")


def check_resume(release: Release, nodes: Roster, strategy: Strategy, accepts: bool) -> None:
    """Raises AppError 3003 where resume can't go on: failures that must be accepted first, or can't be."""
    exceeded = exceeded_limit(nodes, strategy)
    if exceeded and strategy.on_exceed == PAUSE and not accepts:
        raise AppError(3003, f"release {release.id}: {exceeded}: resume it with acceptFailures "
                             "(--accept-failures), or cancel it")
    if exceeded and strategy.on_exceed == FAIL and accepts:
        raise AppError(3003, f"release {release.id}: {exceeded}, and its strategy (onExceed) ends it then: "
                             "resume without accepting, then retry")


def status_after_verb(verb: str, release: Release) -> str:
    """Gives the status that a verb brings; a release that never started waits again after resume."""
    return PENDING if verb == "resume" and not release.started_at else VERBS[verb].status


class Candidate(NamedTuple):
    """A release that is not terminal, as the look for work sees it."""
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
    # "": a person wrote the row, and may be at it still.
    tag: str = ""

    def may_start(self, now: str) -> bool:
        """Say whether its own time has come; before that it holds nobody up."""
        return self.status != PENDING or self.start_at <= now


# Whether two releases share a node.
Shares = Callable[[Candidate, Candidate], bool]


def share_nothing(_one: Candidate, _other: Candidate) -> bool:
    """Say that two releases have no node in common."""
    return False


def _in_turn(candidates: Iterable[Candidate], now: str, shares: Shares) -> Iterator[tuple[Candidate, Candidate | None]]:
    """Return each release and the one that goes before it, of its target or with a node of it.

    That is one that has started, or a lower version: a node that was sent a higher one is never sent a lower.
    """
    ahead: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.status == PENDING or not c.has_started, c.version)):
        # by target first: what nodes a release has is read only where it matters
        yield c, (next((a for a in ahead if a.target == c.target), None)
                  or next((a for a in ahead if shares(a, c)), None))
        if c.may_start(now):
            ahead.append(c)


def runnable(candidates: Iterable[Candidate], now: str = "", freeze: Freeze = NO_FREEZE,
             shares: Shares = share_nothing) -> tuple[list[int], list[int]]:
    """Return which releases may be claimed now, and which are in other hands (rule 2).

    A pending one waits for active ones and lower versions of its target or with a node of it, for its time
    and for the end of a freeze; one that is paused or kept by a freeze needs an owner only while nodes of it
    are in flight.
    """
    free: list[int] = []
    taken: list[int] = []
    for c, before in _in_turn(candidates, now, shares):
        if c.status == PENDING:
            wanted = before is None and c.may_start(now) and not freeze.frozen
        else:
            waits = c.status == PAUSED or (c.status == RUNNING and freeze.frozen and c.has_pending)
            wanted = c.running_nodes > 0 or not waits
        if wanted:
            (taken if c.claimed else free).append(c.id)
    return free, taken


def waiting_reasons(candidates: Iterable[Candidate], now: str = "", freeze: Freeze = NO_FREEZE,
                    shares: Shares = share_nothing) -> dict[int, str]:
    """Return the sentences of releases that nobody works on: whom or what they wait for."""
    reasons = {}
    for c, before in _in_turn(candidates, now, shares):
        frozen = f"frozen: {freeze.reason}"
        if c.status == RUNNING and not c.claimed and c.running_nodes == 0 and (
                freeze.frozen or c.status_reason.startswith("frozen: ")):
            reasons[c.id] = one_line(frozen if freeze.frozen else REASON_PENDING)
        if c.status != PENDING:
            continue
        if before is not None and c.may_start(now):
            by = f"which {before.paused_by} paused" if before.paused_by else f"which is {before.status}"
            reason = f"waiting for release {before.id}, {by}"
        elif freeze.frozen:
            reason = frozen
        else:
            reason = REASON_PENDING if c.may_start(now) else f"starts no earlier than {c.start_at}" + (
                f", and after release {before.id}" if before else "")
        reasons[c.id] = one_line(reason)
    return reasons


# ======================================================================================
# 8 Store: every SQL statement of the domain; a method is one transaction. Uses 1 to 7.
#   Rows become dataclasses here and nowhere else.
# ======================================================================================

class Claim(NamedTuple):
    """The right to work on a release: every write of its owner is conditional on owner and fence.

    On both: a database that went back gives the same fence again, to another owner.
    """
    release_id: int
    fence: int
    version: int
    owner: str
    # Which state of the database it was taken in: see Store.generation.
    generation: int = 0

    def __str__(self) -> str:
        return f"release {self.release_id} (v{self.version})"


def about(release: Release | Claim | None = None, /, **more: object) -> dict[str, Any]:
    """Gives logging's `extra`: what a record is about, as keys of their own in a line of JSON.

    The keys: release (its id), version, node (its name), actor, event, request_id.
    """
    if release is None:
        return {"about": more}
    release_id = release.release_id if isinstance(release, Claim) else release.id
    return {"about": {"release": release_id, "version": release.version, **more}}


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


class Once(NamedTuple):
    """A caller's Idempotency-Key, and the SHA-256 of what was asked with it."""
    actor: str
    key: str
    request_sha256: str


class Again(NamedTuple):
    """What a retry or rollback is asked to be.

    over_newer: also where a node has a newer success of the target. to_release: whose payload a rollback brings back.
    """
    reason: str = ""
    over_newer: bool = False
    to_release: int | None = None


class Made(NamedTuple):
    """A release that was created, its nodes by batch, and who was left out."""
    release: Release
    batches: list[list[int]]
    left_out: Sequence[LeftOut] = ()


class Obstacles(NamedTuple):
    """What may keep a release from its dispatches.

    busy: addresses that another release has in flight, or that may be at a lost request. moved_s: how many seconds
    ago the database went back or moved to another server, which may not know of the last dispatches.
    """
    busy: frozenset[Endpoint]
    freeze: Freeze
    moved_s: float


class Numbers(NamedTuple):
    """What a database has reached; none of it ever falls but where it goes back to an earlier state.

    generation counts how often that was seen.
    """
    generation: int = 0
    version: int = 0
    event_id: int = 0
    timeline: int = 0


class Seen:
    """The numbers that this process has read, to notice a database that goes back: a restore, a failover."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.numbers = Numbers()
        # The highest version of any release that this process knew, also of one that is lost.
        self.version = 0

    def use_version(self, version: int) -> None:
        """Note a version that is given out: never again, whatever becomes of its release."""
        with self._guard:
            self.version = max(self.version, version)

    def note(self, before: Numbers, version: int, event_id: int, timeline: int) -> tuple[str, bool]:
        """Note what a transaction read that began when `before` was known.

        Return what fell, "" for nothing, and whether the database moved to another server without that. It is
        compared with what was known when it began: its snapshot may be older than what others have read since.
        """
        found = Numbers(before.generation, version, event_id, timeline)
        fell = [f"{name} {now} after {was}" for name, now, was in (
            ("version", version, before.version), ("event", event_id, before.event_id),
            ("timeline", timeline, before.timeline)) if now < was]
        with self._guard:
            if before.generation != self.numbers.generation:
                return "", False  # another transaction has told of it
            self.version = max(self.version, version)
            has_moved = bool(before.timeline) and timeline != before.timeline
            if fell or has_moved:
                self.numbers = found._replace(generation=before.generation + 1)
            else:
                self.numbers = Numbers(*map(max, self.numbers, found))
        return ", ".join(fell), has_moved and not fell

    def note_fall(self) -> None:
        """Note that the database went back, as another number of it told."""
        with self._guard:
            self.numbers = self.numbers._replace(generation=self.numbers.generation + 1, version=0, event_id=0)


class Page(NamedTuple):
    """A part of a list, and how many there are in all."""
    items: list[Any]
    total: int
    number: int
    size: int


class OldRelease(NamedTuple):
    """A release as prune looks at it; ended_at is "" while it is not terminal."""
    id: int
    target: str
    version: int
    status: str
    retry_of: int | None
    rollback_of: int | None
    total_nodes: int
    ended_at: str


class Content(NamedTuple):
    """What a release brought: its payload as a digest, the nodes that it touched and those where it succeeded.

    is_bad: somebody rolled it back, or the same payload later on.
    """
    digest: str
    touched: frozenset[int]
    succeeded: frozenset[int]
    is_bad: bool = False


def digest_of(payload: Mapping[str, Any]) -> str:
    """Return what is equal for two payloads that differ by their version at most."""
    return hashlib.sha256(json.dumps({**payload, "version": 0}, sort_keys=True).encode()).hexdigest()


def prunable(releases: Iterable[OldRelease], before: str, keep: int, content_of: Callable[[OldRelease], Content],
             newest: int = 0) -> list[OldRelease]:
    """Return those that nobody needs any more, newest first, out of all releases.

    Of each target stay the newest keep, and what ended later than before or not yet. Of each node's releases
    of the target stays the newest success, and what a rollback of one that stays would bring back to it: the
    newest success before it with another payload that nobody rolled back. And what a release that stays is a
    retry or a rollback of, and the one of the newest event. So the highest version and event stay, and none
    is ever used again.
    """
    goes = []
    seen: dict[str, int] = {}
    named: set[int | None] = set()
    # The nodes of each target whose newest success was found, and whose newest one that was not bad; and for each node
    # the payloads of releases that stay and could not be rolled back on it yet.
    known: dict[bool, set[tuple[str, int]]] = {False: set(), True: set()}
    wanting: dict[tuple[str, int], set[str]] = {}
    for release in sorted(releases, key=lambda r: -r.version):
        seen[release.target] = seen.get(release.target, 0) + 1
        stays = (seen[release.target] <= keep or not release.ended_at or release.ended_at >= before
                 or release.id == newest)
        content, target = content_of(release), release.target
        served = [node for node in content.succeeded if (target, node) not in known[content.is_bad] | known[False] or (
            not content.is_bad and wanting.get((target, node), set()) - {content.digest})]
        if not stays and not served and release.id not in named:
            goes.append(release)
            continue
        named |= {release.retry_of, release.rollback_of}
        for node in content.succeeded:
            known[content.is_bad].add((target, node))
            if not content.is_bad:
                wanting[target, node] = wanting.get((target, node), set()) & {content.digest}
        for node in content.touched if stays else ():
            wanting.setdefault((target, node), set()).add(content.digest)
    # a rollback of what stays tells that that was bad
    gone = {release.id for release in goes}
    return [release for release in goes if release.rollback_of is None or release.rollback_of in gone]


class BatchProgress(NamedTuple):
    """How many nodes of a batch are in each status."""
    number: int
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def count(self, *statuses: str) -> int:
        """Gives how many nodes are in one of the statuses."""
        return sum(self.counts.get(status, 0) for status in statuses)


class Progress(NamedTuple):
    """Where a release stands: its batches in order, and name and error of the first nodes that failed."""
    release: Release
    batches: list[BatchProgress]
    failures: list[tuple[str, str]]


NODE_COLUMNS = """id, name, main_ip, agent_port, agent_protocol, labels, enabled, status, created_at, updated_at,
    last_version"""

# The index release_task_nodes_by_status serves the two that are counted: the lowest batch of one
# status is its first entry, while IN would go through all of them.
RELEASE_COLUMNS = """r.id, r.type, r.target, r.version, r.status, r.status_reason, r.reason, r.payload, r.strategy,
    r.retry_of, r.rollback_of, r.total_nodes, r.success_nodes, r.failed_nodes, r.error_msg, r.claim_owner,
    r.claim_fence, r.claim_expires_at, r.created_at, r.started_at, r.finished_at, r.updated_at,
    r.passed_batch, r.soak_until, r.paused_by, r.tag, r.soak_clock,
    (SELECT COUNT(*) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'skipped'),
    COALESCE((SELECT MIN(w.batch) FROM (
         SELECT MIN(n.batch) AS batch FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'pending'
         UNION ALL
         SELECT MIN(n.batch) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'running') w),
        (SELECT MIN(n.batch) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'failed'), 0)"""

# A node of a release n as it was when the release was made; as it is in nodes h where a person wrote the row.
NAME_THEN, ADDRESS_THEN = "COALESCE(NULLIF(n.node_name, ''), h.name)", """COALESCE(NULLIF(n.main_ip, ''), h.main_ip),
    COALESCE(NULLIF(n.agent_port, 0), h.agent_port)"""

RELEASE_NODE_COLUMNS = f"""n.node_id, {NAME_THEN}, {ADDRESS_THEN}, h.agent_protocol, n.batch, n.status, n.task_id,
    n.attempts, n.error_kind, n.error_msg, n.hold_until, n.started_at, n.finished_at, n.accepted,
    (SELECT MAX(a.last_version) FROM nodes a WHERE a.main_ip = h.main_ip AND a.agent_port = h.agent_port),
    n.hold_clock, n.started_clock, n.waited_sec, n.reached"""

# The counters, made from the rows themselves in the transaction that changes them (rule 7).
COUNTERS = """success_nodes = (SELECT COUNT(*) FROM release_task_nodes n
                         WHERE n.release_task_id = release_tasks.id AND n.status = 'success'),
        failed_nodes = (SELECT COUNT(*) FROM release_task_nodes n
                        WHERE n.release_task_id = release_tasks.id AND n.status = 'failed')"""

INSERT_EVENTS = """
    INSERT INTO release_events
        (release_task_id, node_id, at, actor, event, from_status, to_status, detail)
    VALUES """

RELEASE_EVENTS = {PENDING: "created", RUNNING: "started", PAUSED: "paused", CANCELLING: "cancelling",
                  SUCCESS: "finished", PARTIAL: "finished", FAILED: "finished", CANCELLED: "cancelled"}
NODE_EVENTS = {RUNNING: "dispatched", SUCCESS: "succeeded", FAILED: "failed", SKIPPED: "skipped"}

# So many targets have figures of their own, the oldest ones; the others' are summed up.
MAX_TARGETS_COUNTED, OTHER = 50, "other"

# An Idempotency-Key is kept for so long.
ONCE_S = 86400.0

# Nodes in one statement, up to three parameters each: SQLite 3.26 takes 999.
NODES_PER_STATEMENT = 320

# Of so many releases it is kept which addresses they have.
MAX_MASKS = 1000


class Store:
    """The tables of the contract as verbs. Every method is one transaction."""

    def __init__(self, database: Database, clock: Clock = Clock()):  # noqa: B008 - it has no state
        self.database = database
        self.clock = clock
        self._seen = Seen()
        # The addresses of open releases as bits of one number, by id and version, in one generation of the database.
        self._masks: dict[tuple[int, int], int] = {}
        self._bits: dict[Endpoint, int] = {}
        self._masks_guard = threading.Lock()
        # When the generation grew last, by elapsed time; whether a fall is not written down yet.
        self._changed_at = float("-inf")
        self._has_fallen = False

    @property
    def generation(self) -> int:
        """How often the database went back, or moved to another server, as far as this process saw."""
        return self._seen.numbers.generation

    def moment(self) -> Moment:
        """Return this instant."""
        return Moment(self.clock.wall(), self.clock.elapsed(), self.clock.boot())

    @contextlib.contextmanager
    def _watching(self) -> Iterator[Transaction]:
        """Give a transaction that reads, and notice where the database went back since the last one."""
        before = self._seen.numbers
        with self.database.transaction() as tx:
            version, event_id = tx.row("SELECT (SELECT COALESCE(MAX(version), 0) FROM release_tasks), "
                                       "(SELECT COALESCE(MAX(id), 0) FROM release_events)") or (0, 0)
            timeline = tx.value(self.database.engine.timeline_sql)
            # a standby that is behind is no database that went back
            fell, has_moved = self._seen.note(before, version, event_id, timeline) if timeline else ("", False)
            if fell:
                self._tell_went_back(fell)
            elif has_moved:
                self._begin_anew()
                log.warning("%s moved to another server (failover): everything is read anew, and agents are asked "
                            "before anything is sent", self.database)
            yield tx

    def _begin_anew(self) -> None:
        """Drop what was derived from a state of the database that is gone."""
        self._masks.clear()
        self._changed_at = self.clock.elapsed()

    def _tell_went_back(self, fell: str) -> None:
        self._begin_anew()
        self._has_fallen = True
        self.database.metrics.count("releasectl_database_went_back_total")
        log.error("%s went back to an earlier state (%s): a backup was restored, or a failover lost commits; "
                  "everything is read anew, and agents are asked before anything is sent. See the runbook, "
                  "ReleasectlDatabaseWentBack", self.database, fell)

    # -- nodes ---------------------------------------------------------------------------

    def add_node(self, name: str, main_ip: str, agent_port: int = 8443, agent_protocol: str = TASKS,
                 labels: str = "{}", enabled: bool = True, status: str = "online") -> Node:
        """Adds a node; AppError 3002 when the name is taken. The values are checked by floor 5."""
        return self.add_nodes([(name, main_ip, agent_port, agent_protocol, labels, int(enabled), status)])[0]

    def add_nodes(self, rows: Sequence[tuple[str, str, int, str, str, int, str]]) -> list[Node]:
        """Adds nodes, all or none; AppError 3002 naming the first whose name is taken."""
        with self.database.transaction(write=True) as tx:
            now, owners = self._now(), self._endpoints(tx)
            for row in rows:
                if tx.value("SELECT COUNT(*) FROM nodes WHERE name = ?", row[0]):
                    raise AppError(3002, f"node {row[0]} exists already")
                if row[5]:
                    self._refuse_twin(owners, row[0], row[1], row[2])
                tx.execute("""
                    INSERT INTO nodes (name, main_ip, agent_port, agent_protocol, labels, enabled, status,
                                       created_at, updated_at)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""", *row, now, now)
            return [self._node_by_name(tx, row[0]) for row in rows]

    def node(self, node_id: int) -> Node:
        """Gives a node; AppError 3001 when there is none."""
        with self.database.transaction() as tx:
            return self._node(tx, node_id)

    def node_named(self, name: str) -> Node:
        """Gives a node by its name; AppError 3001 when there is none."""
        with self.database.transaction() as tx:
            return self._node_by_name(tx, name)

    def nodes(self, page: int = 1, size: int = MAX_PAGE_SIZE) -> Page:
        """Gives a page of the nodes, by id; size 0 for all of them."""
        with self.database.transaction() as tx:
            total = tx.value("SELECT COUNT(*) FROM nodes")
            rows = tx.rows(f"SELECT {NODE_COLUMNS} FROM nodes ORDER BY id LIMIT ? OFFSET ?",
                           size or total, (page - 1) * size)
            return Page([Node(*row) for row in rows], total, page, size)

    def last_releases(self, node_ids: Sequence[int]) -> dict[int, tuple[int, str]]:
        """Gives for each of some nodes the newest release that names it, and what it is there."""
        if not node_ids:
            return {}
        with self.database.transaction() as tx:
            # the index release_task_nodes_by_node finds the newest of each
            return {node_id: (release_id, status) for node_id, release_id, status in tx.rows(f"""
                SELECT n.node_id, n.release_task_id, n.status
                FROM release_task_nodes n
                WHERE n.node_id IN ({', '.join('?' * len(node_ids))})
                  AND n.release_task_id = (SELECT MAX(m.release_task_id) FROM release_task_nodes m
                                           WHERE m.node_id = n.node_id)""", *node_ids)}

    def update_node(self, node_id: int, changes: Mapping[str, object]) -> Node:
        """Changes columns of a node, checked by floor 5; 3001, 3002, or 3003 while a release needs it."""
        with self.database.transaction(write=True) as tx:
            node = self._node(tx, node_id)
            if changes.get("name", node.name) != node.name and tx.value(
                    "SELECT COUNT(*) FROM nodes WHERE name = ?", changes["name"]):
                raise AppError(3002, f"node {changes['name']} exists already")
            if any(changes.get(c, getattr(node, c)) != getattr(node, c)
                   for c in ("main_ip", "agent_port", "agent_protocol")):
                self._refuse_in_use(tx, node)
            after = dataclasses.replace(node, **dict(changes))  # type: ignore[arg-type]
            if after.enabled and (after.endpoint != node.endpoint or not node.enabled):
                self._refuse_twin(self._endpoints(tx), after.name, after.main_ip, after.agent_port, node.name)
            for column in ("name", "main_ip", "agent_port", "agent_protocol", "labels", "enabled", "status"):
                if column in changes:
                    tx.execute(f"UPDATE nodes SET {column} = ?, updated_at = ? WHERE id = ?",
                               changes[column], self._now(), node_id)
            return self._node(tx, node_id)

    @staticmethod
    def _endpoints(tx: Transaction) -> dict[Endpoint, str]:
        """Return which enabled node has which address."""
        return {endpoint_of(main_ip, port): name for name, main_ip, port in tx.rows(
            "SELECT name, main_ip, agent_port FROM nodes WHERE enabled = 1")}

    @staticmethod
    def _refuse_twin(owners: dict[Endpoint, str], name: str, main_ip: str, port: int, known_as: str = "") -> None:
        """Raise AppError 3002 where another enabled node has this address; else note that it is taken now."""
        twin = owners.setdefault(endpoint_of(main_ip, port), name)
        if twin not in (name, known_as):
            raise AppError(3002, f"node {twin} has the address {main_ip}:{port} already: one agent is one node")

    def delete_node(self, node_id: int) -> None:
        """Deletes a node; AppError 3003 when a release names it (the history is kept)."""
        with self.database.transaction(write=True) as tx:
            node = self._node(tx, node_id)
            release_id = tx.value("SELECT MAX(release_task_id) FROM release_task_nodes WHERE node_id = ?", node_id)
            if release_id is not None:
                raise AppError(3003, f"node {node.name} is part of release {release_id}: disable it instead")
            tx.execute("DELETE FROM nodes WHERE id = ?", node_id)

    def _refuse_in_use(self, tx: Transaction, node: Node) -> None:
        release_id = tx.value("""
            SELECT MIN(r.id)
            FROM release_tasks r
            WHERE r.status IN ('pending', 'running', 'paused', 'cancelling')
              AND EXISTS (SELECT 1 FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.node_id = ?)""",
                              node.id)
        if release_id is not None:
            raise AppError(3003, f"node {node.name} is part of release {release_id}, which is not at its end: "
                                 "its address, port and protocol stay until then")

    @staticmethod
    def _node(tx: Transaction, node_id: int) -> Node:
        row = tx.row(f"SELECT {NODE_COLUMNS} FROM nodes WHERE id = ?", node_id) if node_id <= MAX_ID else None
        if row is None:
            raise AppError(3001, f"node {node_id} does not exist")
        return Node(*row)

    @staticmethod
    def _node_by_name(tx: Transaction, name: str) -> Node:
        row = tx.row(f"SELECT {NODE_COLUMNS} FROM nodes WHERE name = ?", name)
        if row is None:
            raise AppError(3001, f"node {one_line(name, 100)} does not exist")
        return Node(*row)

    # -- releases ------------------------------------------------------------------------

    def plan_release(self, request: ReleaseRequest) -> Plan:
        """Gives what create_release() would make, and raises what it would; writes nothing."""
        with self.database.transaction() as tx:
            version = self._version_for(tx, request, tx.value(self.database.engine.next_release_id_sql))
            check_payload_version(request.payload, version)
            return self._plan(tx, request)[0]._replace(version=version)

    def create_release(self, request: ReleaseRequest, actor: str, once: Once | None = None) -> Made:
        """Create a release for the nodes it asks for; return it, its batches and who is left out (rule 1).

        With once, what the key's first request made is returned again. Raise AppError 3003 without an
        enabled, online node or where two have one address, 2003 when the strategy, the choice of nodes,
        the version or the payload can't be meant, 3002 when the key was for another request.
        """
        with self.database.transaction(write=True) as tx:
            return self._made_before(tx, once) or self._remember(
                tx, once, self._create(tx, actor, request, *self._plan(tx, request)))

    def _remember(self, tx: Transaction, once: Once | None, made: Made) -> Made:
        """Keep what a key made, for a day."""
        if once:
            tx.execute("INSERT INTO idempotency_keys (actor, idempotency_key, request_sha256, release_task_id, "
                       "created_at, left_out) VALUES (?, ?, ?, ?, ?, ?)", *once, made.release.id, self._now(),
                       to_json(made.left_out))
        return made

    def _made_before(self, tx: Transaction, once: Once | None) -> Made | None:
        if once is None:
            return None
        # the index idempotency_keys_by_age
        tx.execute("DELETE FROM idempotency_keys WHERE created_at < ?", utc_text(self.clock.wall() - ONCE_S))
        row = tx.row("SELECT request_sha256, release_task_id, left_out FROM idempotency_keys "
                     "WHERE actor = ? AND idempotency_key = ?", once.actor, once.key)
        if row is None:
            return None
        if row[0] != once.request_sha256:
            raise AppError(3002, f"Idempotency-Key {once.key} was used for another request, which made release "
                                 f"{row[1]}: take a new key")
        batches: dict[int, list[int]] = {}
        for batch, node_id in tx.rows("SELECT batch, node_id FROM release_task_nodes WHERE release_task_id = ? "
                                      "ORDER BY batch, id", row[1]):
            batches.setdefault(batch, []).append(node_id)
        return Made(self._release(tx, row[1]), list(batches.values()), [LeftOut(*one) for one in parse_json(row[2])])

    def retry(self, release_id: int, actor: str, wish: Again = Again(), once: Once | None = None) -> Made:  # noqa: B008
        """Create a release of the same payload for the nodes that were failed or skipped (rule 10).

        Raise AppError 3003 where the release's state, its payload or a newer success stands against it.
        """
        return self._make_again("retry", release_id, actor, wish, once)

    def rollback(self, release_id: int, actor: str, wish: Again = Again(),  # noqa: B008 - it has no state
                 once: Once | None = None) -> Made:
        """Create a release that brings back, to the nodes that a release touched, what they had before (rule 10).

        It goes out in the old batches under the old limits, but waits for nothing and nobody; nodes that had
        failed come last, and never stop it. Raise AppError 3003 where there is nothing to bring back, or a
        newer success stands against it, 2003 for a toRelease that can't be meant.
        """
        return self._make_again("rollback", release_id, actor, wish, once)

    def plan_again(self, verb: str, release_id: int, wish: Again = Again()) -> Plan:  # noqa: B008 - it has no state
        """Return what a retry or rollback would make, and raise what it would; write nothing."""
        with self.database.transaction() as tx:
            _, plan, _ = self._plan_again(tx, verb, release_id, wish)
            return plan._replace(version=self._next_version(tx, tx.value(self.database.engine.next_release_id_sql)))

    def _make_again(self, verb: str, release_id: int, actor: str, wish: Again, once: Once | None) -> Made:
        with self.database.transaction(write=True) as tx:
            made = self._made_before(tx, once)
            return made or self._remember(tx, once, self._create(
                tx, actor, *self._plan_again(tx, verb, release_id, wish)))

    def _plan_again(self, tx: Transaction, verb: str, release_id: int,
                    wish: Again) -> tuple[ReleaseRequest, Plan, list[Node]]:
        """Return what a retry or rollback asks for, how it would go out, and its nodes."""
        old = self._release(tx, release_id)
        check_verb(verb, old)
        request, plan, nodes = (self._plan_retry if verb == "retry" else self._plan_rollback)(tx, old, wish)
        if not wish.over_newer:
            self._refuse_over_newer(tx, verb, old, nodes)
        refuse_twins(nodes)
        source = plan.payload_of[0] if plan.payload_of else old.id
        refuse_dropping_sites(request.payload, nodes, 3003, f"the payload of release {source}")
        return request, plan._replace(emptied=self._emptied(request.payload, nodes)), nodes

    def _plan_retry(self, tx: Transaction, old: Release, wish: Again) -> tuple[ReleaseRequest, Plan, list[Node]]:
        found = self._nodes_of(tx, old, "n.status IN ('failed', 'skipped')")
        nodes = self._online(old, found, "failed or skipped")
        strategy = self._strategy_again(old, ("startAt",))
        node_ids = [node.id for node in nodes]
        if isinstance(strategy.get("pauseAfter"), list):
            # there may be fewer batches now
            last = len(plan_batches(node_ids, parse_strategy(strategy).batches))
            strategy["pauseAfter"] = [number for number in strategy["pauseAfter"] if number <= last]
        request = ReleaseRequest(old.target, wish.reason or f"retry of release {old.id}", self._payload_of(old),
                                 retry_of=old.id, strategy=strategy)
        plan = make_plan(parse_strategy(strategy), node_ids, who_is_left_out(found))
        return request, plan._replace(payload_of=(old.id, old.version)), nodes

    def _plan_rollback(self, tx: Transaction, old: Release, wish: Again) -> tuple[ReleaseRequest, Plan, list[Node]]:
        # what was rejected before anything was sent to it has nothing to be rolled back
        found = self._nodes_of(tx, old, "(n.status = 'success' OR (n.status = 'failed' AND NOT "
                                        "(n.error_kind = 'rejected' AND n.attempts = 0)))")
        nodes = self._online(old, found, "touched by it")
        where = {node_id: (status, batch) for node_id, status, batch in tx.rows(
            "SELECT node_id, status, batch FROM release_task_nodes WHERE release_task_id = ?", old.id)}
        failed = [node.id for node in nodes if where[node.id][0] == FAILED]
        batches: dict[int, list[int]] = {}
        for node in sorted(nodes, key=lambda node: (where[node.id][1], node.id)):
            if where[node.id][0] == SUCCESS:
                batches.setdefault(where[node.id][1], []).append(node.id)
        good = self._payload_to_bring_back(tx, old, [node.id for node in nodes], wish.to_release)
        planned = [*batches.values(), *([failed] if failed else [])]
        sizes = [len(batch) for batch in planned[:-1]] or [len(planned[0])]
        # planned is what counts; it may have a batch more than can be asked for, and any number by hand
        strategy = {**self._strategy_again(old, ("startAt", "soakSec", "pauseAfter", "verify")),
                    "batches": sizes[:MAX_BATCHES]}
        with contextlib.suppress(AppError):  # what is looked for belongs to the content that goes out
            strategy.update({key: value for key, value in self._strategy_again(good, ()).items() if key == "verify"})
        request = ReleaseRequest(
            old.target, wish.reason or f"rollback of release {old.id} to the payload of version {good.version}",
            self._payload_of(good), rollback_of=old.id, strategy=strategy)
        plan = make_plan(parse_strategy(strategy), [node.id for node in nodes], who_is_left_out(found), planned,
                         frozenset(failed))
        return request, plan._replace(payload_of=(good.id, good.version)), nodes

    @staticmethod
    def _nodes_of(tx: Transaction, old: Release, where: str) -> list[Node]:
        return [Node(*row) for row in tx.rows(f"""
            SELECT {NODE_COLUMNS}
            FROM nodes
            WHERE id IN (SELECT n.node_id FROM release_task_nodes n WHERE n.release_task_id = ? AND {where})
            ORDER BY id""", old.id)]

    @staticmethod
    def _online(old: Release, found: Sequence[Node], what: str) -> list[Node]:
        nodes = [node for node in found if node.gets_releases]
        if not nodes:
            raise AppError(3003, f"release {old.id} has no online nodes that were {what}")
        return nodes

    def _refuse_over_newer(self, tx: Transaction, verb: str, old: Release, nodes: Sequence[Node]) -> None:
        """Raise AppError 3003 where one of the nodes has a newer success of the target (rule 10)."""
        names = {node.id: node.name for node in nodes}
        for release_id, version in tx.rows("""
                SELECT id, version
                FROM release_tasks
                WHERE target = ? AND version > ?
                ORDER BY version DESC""", old.target, old.version):
            over = [names[node_id] for node_id in sorted(self._succeeded(tx, release_id) & names.keys())]
            if over:
                raise AppError(3003, f"release {release_id} (v{version}) succeeded later on {names_of(over)}: {verb} "
                                     f"of release {old.id} would replace its payload; overNewer (--over-newer) if "
                                     "that is meant")

    @staticmethod
    def _succeeded(tx: Transaction, release_id: int) -> set[int]:
        return {row[0] for row in tx.rows(
            "SELECT node_id FROM release_task_nodes WHERE release_task_id = ? AND status = 'success'", release_id)}

    def _payload_to_bring_back(self, tx: Transaction, old: Release, node_ids: Sequence[int],
                               to_release: int | None) -> Release:
        """Return the release whose payload a rollback brings back (rule 10).

        Of each node the newest before it that succeeded there, with another payload, and that nobody rolled
        back; the payload that most of the nodes had wins, the newer one of two.
        """
        unwanted = digest_of(self._payload_of(old))
        if to_release is not None:
            row = tx.row(f"SELECT {RELEASE_COLUMNS} FROM release_tasks r WHERE r.id = ? AND r.target = ?",
                         min(to_release, MAX_ID), old.target)
            if row is None:
                raise AppError(2003, f"toRelease {to_release} is no release of target {old.target}")
            if digest_of(self._payload_of(Release(*row))) == unwanted:
                raise AppError(3003, f"release {to_release} has the same payload as release {old.id}: "
                                     "nothing would change")
            return Release(*row)
        bad = self._rolled_back(tx, old.target)
        missing, votes = set(node_ids), collections.Counter[str]()
        newest: dict[str, tuple[int, int]] = {}
        for release_id, version in tx.rows("""
                SELECT id, version
                FROM release_tasks
                WHERE target = ? AND version < ?
                ORDER BY version DESC""", old.target, old.version):
            found = self._succeeded(tx, release_id) & missing
            digest = self._digest(tx, release_id) if found else unwanted
            if digest != unwanted and version > bad.get(digest, 0):
                votes[digest] += len(found)
                newest.setdefault(digest, (version, release_id))
                missing -= found
            if not missing:
                break
        if not votes:
            raise AppError(3003, f"nothing to roll back to: no release of target {old.target} before {old.id} "
                                 "succeeded on its nodes with another payload; toRelease (--to) names one")
        return self._release(tx, newest[max(votes, key=lambda digest: (votes[digest], newest[digest]))][1])

    def _rolled_back(self, tx: Transaction, target: str) -> dict[str, int]:
        """Return payloads of a target that somebody rolled back, each with the highest version of which that was done.

        The same payload under a lower version is as bad; under a higher one somebody wanted it again.
        """
        bad: dict[str, int] = {}
        for release_id, version in tx.rows("""
                SELECT id, version
                FROM release_tasks
                WHERE target = ? AND id IN (SELECT rollback_of FROM release_tasks WHERE rollback_of IS NOT NULL)""",
                                           target):
            digest = self._digest(tx, release_id)
            bad[digest] = max(bad.get(digest, 0), version)
        return bad

    def _digest(self, tx: Transaction, release_id: int) -> str:
        """Return the digest of a release's payload; one of its own for a payload that can't be read."""
        text = tx.value("SELECT payload FROM release_tasks WHERE id = ?", release_id)
        with contextlib.suppress(ValueError, AppError):
            return digest_of(parse_payload(parse_json(text)))
        return f"release {release_id}"

    @staticmethod
    def _emptied(payload: Mapping[str, Any], nodes: Iterable[Node]) -> list[str]:
        """Return the names of execute nodes that are told to serve no site."""
        return [node.name for node in nodes if node.agent_protocol == EXECUTE and payload.get(WEBSITES) == []]

    @staticmethod
    def _payload_of(release: Release) -> dict[str, Any]:
        try:
            return parse_payload(parse_json(release.payload))
        except (ValueError, AppError) as error:
            raise AppError(3003, f"the payload of release {release.id} can't be used: {one_line(error)}") from None

    @staticmethod
    def _strategy_again(release: Release, without: Sequence[str]) -> dict[str, Any]:
        """Gives the strategy of an old release for a new one, without some of its keys."""
        try:
            strategy = parse_json(release.strategy)
            parse_strategy(strategy)
        except (ValueError, AppError) as error:
            raise AppError(3003, f"the strategy of release {release.id} can't be used: {one_line(error)}") from None
        return {key: value for key, value in strategy.items() if key not in without}

    def _plan(self, tx: Transaction, request: ReleaseRequest) -> tuple[Plan, list[Node]]:
        strategy = parse_strategy(request.strategy)
        nodes, left_out = choose_nodes(
            [Node(*row) for row in tx.rows(f"SELECT {NODE_COLUMNS} FROM nodes ORDER BY id")], request)
        refuse_twins(nodes)
        refuse_dropping_sites(request.payload, nodes)
        plan = make_plan(strategy, [node.id for node in nodes], left_out)
        return plan._replace(emptied=self._emptied(request.payload, nodes)), nodes

    def _next_version(self, tx: Transaction, release_id: int) -> int:
        """Return the version for the release of an id: above every one that may ever have been used (rule 1)."""
        # the unique index of version, and nodes_by_last_version
        highest = tx.value("""
            SELECT MAX(v)
            FROM (SELECT MAX(version) AS v FROM release_tasks
                  UNION ALL SELECT MAX(last_version) FROM nodes
                  UNION ALL SELECT first_version - 1 FROM database_state
                  UNION ALL SELECT lost_version FROM database_state) used""")
        version = int(max(highest or 0, release_id - 1, self._seen.version)) + 1
        if version > MAX_VERSION:
            raise AppError(3003, f"the versions are used up: the newest is {MAX_VERSION}")
        return version

    def _version_for(self, tx: Transaction, request: ReleaseRequest, release_id: int) -> int:
        version = self._next_version(tx, release_id)
        if request.version is not None and request.version < version:
            raise AppError(2003, f"version {request.version} may have been used already: leave it out, or name one "
                                 f"from {version} on")
        return request.version or version

    def set_first_version(self, version: int) -> int:
        """Let new releases be numbered from a version on; return the version of the next one (rule 1).

        For a database that was restored or begins beside agents that are further on.
        """
        with self.database.transaction(write=True) as tx:
            tx.execute("UPDATE database_state SET first_version = ? WHERE id = 1 AND first_version < ?",
                       version, version)
            # what is half done has a lower version than agents may have: its nodes are sent nothing more
            tx.execute("UPDATE nodes SET last_version = ? WHERE last_version < ?", version - 1, version - 1)
            return self._next_version(tx, tx.value(self.database.engine.next_release_id_sql))

    def _write_fall(self, tx: Transaction) -> None:
        """Write down that the database went back, where this process saw it: others saw no lost version."""
        if self._has_fallen:
            tx.execute("""
                UPDATE database_state
                SET moved_at = ?, lost_version = CASE WHEN lost_version > ? THEN lost_version ELSE ? END
                WHERE id = 1""", tx.now(), self._seen.version, self._seen.version)
            tx.afterwards.append(functools.partial(setattr, self, "_has_fallen", False))

    def _note_timeline(self, tx: Transaction) -> None:
        """Note the server that a writer has; after a failover leave out the numbers that lost releases may have had."""
        self._write_fall(tx)
        timeline = tx.value(self.database.engine.timeline_sql)
        known = tx.value("SELECT timeline FROM database_state WHERE id = 1")
        if known == 0 != timeline:
            tx.execute("UPDATE database_state SET timeline = ? WHERE id = 1", timeline)
        elif known != timeline:
            tx.execute("UPDATE database_state SET timeline = ?, moved_at = ?, lost_version = ? WHERE id = 1",
                       timeline, tx.now(), min(self._next_version(tx, 0) + VERSIONS_SKIPPED - 1, MAX_VERSION))

    def _create(self, tx: Transaction, actor: str, request: ReleaseRequest, plan: Plan, nodes: Sequence[Node]) -> Made:
        self._note_timeline(tx)
        if not (request.retry_of or request.rollback_of):
            # before a number is used up: the next try would have to name another
            check_payload_version(request.payload, self._version_for(
                tx, request, tx.value(self.database.engine.next_release_id_sql)))
        release_id = tx.value(self.database.engine.take_release_id_sql)
        version = self._version_for(tx, request, release_id)
        payload = payload_for_version(request.payload, version)
        self._seen.use_version(version)
        now = self._now()
        tx.execute("""
            INSERT INTO release_tasks (id, target, version, tag, status_reason, reason, payload, strategy, retry_of,
                                       rollback_of, total_nodes, created_at, updated_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                   release_id, request.target, version, new_tag(), REASON_PENDING, request.reason, to_json(payload),
                   to_json(request.strategy), request.retry_of, request.rollback_of,
                   sum(map(len, plan.batches)), now, now)
        as_it_is = {node.id: (node.name, node.main_ip, node.agent_port) for node in nodes}
        tx.insert_many("INSERT INTO release_task_nodes (release_task_id, node_id, batch, accepted, created_at, "
                       "updated_at, node_name, main_ip, agent_port) VALUES ", 9, [
                           (release_id, node_id, number, int(node_id in plan.tolerated), now, now, *as_it_is[node_id])
                           for number, batch in enumerate(plan.batches, 1) for node_id in batch])
        left_out = [f"left out: {one.name} is {one.why}" for one in plan.left_out[:20]
                    if request.retry_of or request.rollback_of]
        detail = "; ".join(filter(None, (request.reason, str(plan) if request.strategy else "", *left_out)))
        tx.insert_many(INSERT_EVENTS, 8, [
            (release_id, None, now, actor, "created", "", PENDING, detail_text(detail))])
        self._explain_waiting(tx)
        release = self._release(tx, release_id)
        tx.afterwards.append(lambda: log.info(
            "%s: created by %s, %s in batches of %s%s", release, actor, count_of_nodes(release.total_nodes),
            _words([len(batch) for batch in plan.batches]), f": {request.reason}" if request.reason else "",
            extra=about(release, actor=actor, event="created")))
        return Made(release, plan.batches, plan.left_out)

    @staticmethod
    def _keep_as_they_are(tx: Transaction, release_id: int) -> None:
        """Write names and addresses of a release's nodes into its rows: a rename or a move changes no history."""
        tx.execute("""
            UPDATE release_task_nodes
            SET (node_name, main_ip, agent_port) =
                (SELECT h.name, h.main_ip, h.agent_port FROM nodes h WHERE h.id = release_task_nodes.node_id)
            WHERE release_task_id = ? AND main_ip = '' AND node_id IN (SELECT id FROM nodes)""", release_id)

    def release(self, release_id: int) -> Release:
        """Gives a release; AppError 3001 when there is none."""
        with self.database.transaction() as tx:
            return self._release(tx, release_id)

    def find_release(self, release_id: int) -> Release | None:
        """Return a release, None when there is none."""
        try:
            return self.release(release_id)
        except DatabaseError:
            raise
        except AppError:
            return None

    def exceeded(self, release_id: int) -> str:
        """Return which limit the failures of a release are beyond, "" for none; raise AppError 3001."""
        release, nodes = self.release_with_nodes(release_id)
        return exceeded_limit(Roster(nodes), self._strategy_of(release))

    def release_with_nodes(self, release_id: int) -> tuple[Release, list[ReleaseNode]]:
        """Gives a release and its nodes by batch and id, of one moment; AppError 3001."""
        with self.database.transaction() as tx:
            return self._release(tx, release_id), self._release_nodes(tx, release_id)

    def progress(self, release_id: int, failures: int = 10) -> Progress:
        """Gives a release with its nodes counted by batch, and so many of its failures; AppError 3001."""
        with self.database.transaction() as tx:
            release = self._release(tx, release_id)
            batches: dict[int, dict[str, int]] = {}
            for batch, status, count in tx.rows("""
                    SELECT batch, status, COUNT(*)
                    FROM release_task_nodes
                    WHERE release_task_id = ?
                    GROUP BY batch, status
                    ORDER BY batch""", release_id):
                batches.setdefault(batch, {})[status] = count
            failed = tx.rows(f"""
                SELECT {NAME_THEN}, n.error_msg
                FROM release_task_nodes n
                JOIN nodes h ON h.id = n.node_id
                WHERE n.release_task_id = ? AND n.status = 'failed'
                ORDER BY n.finished_at, n.node_id
                LIMIT ?""", release_id, failures)
            return Progress(release, [BatchProgress(*item) for item in batches.items()],
                            [(name, text) for name, text in failed])

    def releases(self, status: str = "", page: int = 1, size: int = 20) -> Page:
        """Gives a page of the releases, newest first; of one status when it is given."""
        where = "WHERE r.status = ?" if status else ""
        params = (status,) if status else ()
        with self.database.transaction() as tx:
            total = tx.value(f"SELECT COUNT(*) FROM release_tasks r {where}", *params)
            rows = tx.rows(f"SELECT {RELEASE_COLUMNS} FROM release_tasks r {where} ORDER BY r.id DESC "
                           "LIMIT ? OFFSET ?", *params, size, (page - 1) * size)
            return Page([Release(*row) for row in rows], total, page, size)

    def open_releases(self, limit: int = MAX_PAGE_SIZE) -> list[tuple[Release, int]]:
        """Gives the releases that are not at their end, oldest first, each with its number of batches."""
        with self.database.transaction() as tx:
            rows = tx.rows(f"""
                SELECT {RELEASE_COLUMNS},
                       COALESCE((SELECT MAX(n.batch) FROM release_task_nodes n WHERE n.release_task_id = r.id), 0)
                FROM release_tasks r
                WHERE r.status IN ('pending', 'running', 'paused', 'cancelling')
                ORDER BY r.id
                LIMIT ?""", limit)
            return [(Release(*row[:-1]), row[-1]) for row in rows]

    def events(self, release_id: int, after: int = 0, limit: int = 100) -> list[Event]:
        """Gives the events of a release with an id above after, oldest first; AppError 3001."""
        with self.database.transaction() as tx:
            self._release(tx, release_id)
            return [Event(*row) for row in tx.rows(f"""
                SELECT e.id, e.release_task_id, e.node_id, COALESCE({NAME_THEN}, ''), e.at, e.actor, e.event,
                       e.from_status, e.to_status, e.detail
                FROM release_events e
                LEFT JOIN release_task_nodes n ON n.release_task_id = e.release_task_id AND n.node_id = e.node_id
                LEFT JOIN nodes h ON h.id = e.node_id
                WHERE e.release_task_id = ? AND e.id > ?
                ORDER BY e.id
                LIMIT ?""", release_id, after, limit)]

    def counts(self) -> dict[tuple[str, ...], float]:
        """Gives the figures of METRICS that are in the database.

        Nothing here reads the nodes or events of a release that is over: there may be millions.
        """
        with self.database.transaction() as tx:
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
            frozen = self._freeze(tx).frozen
        oldest = {target: first for target, _, _, first in sorted(releases, key=lambda row: -row[3])}
        labels = {target: target if place < MAX_TARGETS_COUNTED else OTHER
                  for place, target in enumerate(sorted(oldest, key=oldest.__getitem__))}
        figures: dict[tuple[str, ...], float] = {
            **{("releasectl_nodes", status): fleet.get(status, 0) for status in NODE_STATUSES},
            **{("releasectl_releases", label, status): 0 for label in labels.values() for status in RELEASE_STATUSES},
            **{("releasectl_release_nodes", labels[target], status): 0 for target, _, _ in nodes
               for status in (PENDING, RUNNING, SUCCESS, FAILED, SKIPPED)},
            ("releasectl_frozen",): float(frozen)}
        for target, status, count, _ in releases:
            figures["releasectl_releases", labels[target], status] += count
        for target, status, count in nodes:
            figures["releasectl_release_nodes", labels[target], status] += count
        for target, status, at in changed:
            key = ("releasectl_release_last_event_timestamp_seconds", labels[target], status)
            with contextlib.suppress(ValueError, TypeError):  # a person wrote the row, and no event or another time
                figures[key] = min(epoch_of(at), figures.get(key, epoch_of(at)))
        return figures

    def probe(self) -> None:
        """Commits a write; DatabaseError when that can't be done now.

        A look alone would not tell: SQLite begins to write on a full disk or a read-only file too.
        """
        with self.database.transaction(write=True) as tx:
            tx.execute("UPDATE health_probe SET at = ? WHERE id = 1", self._now())

    def act(self, verb: str, release_id: int, actor: str, reason: str = "", accept_failures: bool = False) -> Release:
        """Does pause, resume, cancel or cancel --force; gives the release after it. AppError 3001, or 3003.

        A cancelled release with nothing in flight is at its end at once; else its executor ends
        it, or force does. accept_failures goes with resume: what failed counts no more.
        """
        with self.database.transaction(write=True) as tx:
            release, nodes = self._release(tx, release_id), Roster(self._release_nodes(tx, release_id))
            check_verb(verb, release)
            # a person who wrote the rows left that to the claim, which may never come
            tx.execute("UPDATE release_tasks SET total_nodes = ? WHERE id = ? AND total_nodes <> ?",
                       len(nodes), release_id, len(nodes))
            now, strategy = self.moment(), self._strategy_of(release)
            if verb == "resume":
                check_resume(release, nodes, strategy, accept_failures)
                if accept_failures:
                    reason = self._accept(tx, release, reason)
            if status_after_verb(verb, release) != release.status:
                self._turn(tx, release, nodes, VERBS[verb], now, actor, reason)
                release, reason = self._release(tx, release_id), ""
            ends_now = verb == CANCEL_BY_FORCE or not nodes.of[RUNNING]
            if release.status == CANCELLING and ends_now:
                changes = force_end(nodes, now)
                for change in changes:
                    nodes.put(change.after)
                decision = decide(release, nodes, now, Policy(0, 0.0, 0.0, 0.0), strategy)
                self._write(tx, release, decision._replace(changes=tuple(changes)), now, actor, detail=reason)
            self._explain_waiting(tx)
            return self._release(tx, release_id)

    @staticmethod
    def _accept(tx: Transaction, release: Release, reason: str) -> str:
        """Lets the failures of a release count no more; gives the event's reason."""
        count = tx.execute("UPDATE release_task_nodes SET accepted = 1 "
                           "WHERE release_task_id = ? AND status = 'failed' AND accepted = 0", release.id)
        return "; ".join(filter(None, (reason, f"failures accepted: {count}")))

    def _turn(self, tx: Transaction, release: Release, nodes: Roster, verb: Verb, now: Moment,
              actor: str, reason: str) -> None:
        """Writes the status that a verb brings, with its sentence and its event."""
        status, strategy = status_after_verb(verb.name, release), self._strategy_of(release)
        turned = dataclasses.replace(release, status=status, paused_by=actor if status == PAUSED else "")
        sentence = one_line(f"resumed by {actor}: {REASON_PENDING}") if status == RUNNING else describe(
            status, nodes, now, Situation(turned, strategy, Policy(0, 0.0, 0.0, 0.0), Stage(0, release.passed_batch),
                                          exceeded_limit(nodes, strategy)))
        tx.execute(f"UPDATE release_tasks SET status = ?, status_reason = ?, paused_by = ?, updated_at = ?, {COUNTERS} "
                   "WHERE id = ?", status, sentence, turned.paused_by, now.text, release.id)
        tx.insert_many(INSERT_EVENTS, 8, [(release.id, None, now.text, actor, verb.event, release.status, status,
                                           detail_text(reason))])
        tx.afterwards.append(lambda: log.info("%s: %s by %s%s", release, verb.event, actor,
                                              f": {reason}" if reason else "",
                                              extra=about(release, actor=actor, event=verb.event)))

    @staticmethod
    def _strategy_of(release: Release) -> Strategy:
        """Gives a release's strategy; none for one that can't be used, which the executor ends."""
        with contextlib.suppress(ValueError, AppError):
            return parse_strategy(parse_json(release.strategy))
        return NO_STRATEGY

    def freeze(self) -> Freeze:
        """Gives the switch that lets nothing new be dispatched."""
        with self.database.transaction() as tx:
            return self._freeze(tx)

    def set_freeze(self, frozen: bool, actor: str, reason: str = "") -> Freeze:
        """Sets or lifts the freeze, for every process; gives it as it is then.

        Each release that is not at its end has an event of it. AppError 2001 without a reason to set it.
        """
        if frozen and not reason:
            raise AppError(2001, "reason is missing: say why, for whoever waits")
        with self.database.transaction(write=True) as tx:
            if not frozen and not self._freeze(tx).frozen:
                return self._freeze(tx)
            tx.execute("UPDATE release_freeze SET frozen = ?, reason = ?, actor = ?, at = ? WHERE id = 1",
                       int(frozen), reason, actor, self._now())
            event = "frozen" if frozen else "unfrozen"
            tx.insert_many(INSERT_EVENTS, 8, [(c.id, None, self._now(), actor, event, c.status, c.status, reason)
                                              for c in self._candidates(tx)])
            tx.afterwards.append(lambda: log.warning(
                "%s by %s%s", "frozen" if frozen else "the freeze was lifted", actor, f": {reason}" if reason else "",
                extra=about(actor=actor, event=event)))
            self._explain_waiting(tx)
            return self._freeze(tx)

    @staticmethod
    def _freeze(tx: Transaction) -> Freeze:
        row = tx.row("SELECT frozen, reason, actor, at FROM release_freeze WHERE id = 1")
        return Freeze(bool(row[0]), *row[1:]) if row else NO_FREEZE

    def _explain_waiting(self, tx: Transaction) -> None:
        """Brings the sentences of pending releases up to date, after whatever may have changed them."""
        candidates = self._candidates(tx)
        said = {c.id: c.status_reason for c in candidates}
        for release_id, reason in waiting_reasons(candidates, tx.now(), self._freeze(tx), self._shares(tx)).items():
            if said[release_id] != reason:
                tx.execute("UPDATE release_tasks SET status_reason = ?, updated_at = ? WHERE id = ?",
                           reason, self._now(), release_id)

    @staticmethod
    def _release(tx: Transaction, release_id: int) -> Release:
        row = tx.row(f"SELECT {RELEASE_COLUMNS} FROM release_tasks r WHERE r.id = ?",
                     release_id) if release_id <= MAX_ID else None
        if row is None:
            raise AppError(3001, f"release {release_id} does not exist")
        return Release(*row)

    @staticmethod
    def _release_nodes(tx: Transaction, release_id: int) -> list[ReleaseNode]:
        return [ReleaseNode(*row) for row in tx.rows(f"""
            SELECT {RELEASE_NODE_COLUMNS}
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ?
            ORDER BY n.batch, n.node_id""", release_id)]

    def _now(self) -> str:
        return utc_text(self.clock.wall())

    # -- what nobody needs any more --------------------------------------------------------

    def old_releases(self, older_than_s: float, keep: int) -> list[OldRelease]:
        """Gives the releases that prunable() finds, ended longer ago than that, newest first."""
        before = utc_text(self.clock.wall() - older_than_s)
        with self.database.transaction() as tx:
            releases = [OldRelease(*row) for row in tx.rows("""
                SELECT id, target, version, status, retry_of, rollback_of, total_nodes,
                       CASE WHEN status IN ('success', 'partial', 'failed', 'cancelled')
                            THEN COALESCE(finished_at, updated_at) ELSE '' END
                FROM release_tasks""")]
            bad = {target: self._rolled_back(tx, target) for target in {release.target for release in releases}}
            newest = tx.value("SELECT release_task_id FROM release_events ORDER BY id DESC LIMIT 1") or 0

            def content_of(release: OldRelease) -> Content:
                digest = self._digest(tx, release.id)
                rows = tx.rows("SELECT node_id, status FROM release_task_nodes "
                               "WHERE release_task_id = ? AND status IN ('success', 'failed', 'running')", release.id)
                return Content(digest, frozenset(node_id for node_id, _ in rows),
                               frozenset(node_id for node_id, status in rows if status == SUCCESS),
                               release.version <= bad[release.target].get(digest, 0))

            return prunable(releases, before, keep, content_of, newest)

    def forget(self, release_ids: Sequence[int]) -> list[int]:
        """Deletes terminal releases with all that belongs to them; gives the ids of those that are gone.

        At most NODES_PER_STATEMENT of them. One of which somebody made a retry or a rollback meanwhile stays.
        """
        with self.database.transaction(write=True) as tx:
            going = set(release_ids)
            while going:
                marks = ", ".join("?" * len(going))
                # the indexes release_tasks_by_retry_of and release_tasks_by_rollback_of
                named = {id_ for row in tx.rows(f"""
                    SELECT retry_of, rollback_of
                    FROM release_tasks
                    WHERE (retry_of IN ({marks}) OR rollback_of IN ({marks})) AND id NOT IN ({marks})""",
                                                *going, *going, *going) for id_ in row}
                if not named & going:
                    for table_name in ("idempotency_keys", "release_events", "release_task_nodes"):
                        tx.execute(f"DELETE FROM {table_name} WHERE release_task_id IN ({marks})", *going)
                    tx.execute(f"DELETE FROM release_tasks WHERE id IN ({marks})", *going)
                    break
                going -= named
            return sorted(going)

    # -- the claim -----------------------------------------------------------------------

    def look(self) -> tuple[list[int], list[int]]:
        """Gives the ids of the releases that may be claimed now, and of those in other hands."""
        with self._watching() as tx:
            found = self._runnable(tx)
        if self._has_fallen:
            with self.database.transaction(write=True) as tx:
                self._write_fall(tx)
                found = self._runnable(tx)
        return found

    def _runnable(self, tx: Transaction) -> tuple[list[int], list[int]]:
        return runnable(self._candidates(tx), tx.now(), self._freeze(tx), self._shares(tx))

    def _shares(self, tx: Transaction) -> Shares:
        """Return how to tell whether two open releases have an address in common.

        What nodes a release has is read once: with fifty of ten thousand each look would read half a million rows.
        """
        bit_of: dict[int, int] = {}

        def mask(c: Candidate) -> int:
            known = self._masks.get((c.id, c.version)) if c.tag else None
            if known is None:
                bit_of.update(() if bit_of else self._bit_of(tx).items())
                # as one text: ten thousand rows take five times as long
                text = tx.value(f"SELECT {self.database.engine.joined_sql} FROM release_task_nodes "
                                "WHERE release_task_id = ?", c.id)
                bits = bytearray(len(self._bits) // 8 + 1)
                for bit in {bit_of[int(node_id)] for node_id in text.split(",")} if text else ():
                    bits[bit >> 3] |= 1 << (bit & 7)
                if len(self._masks) >= MAX_MASKS:
                    self._masks.clear()
                known = self._masks[c.id, c.version] = int.from_bytes(bits, "little")
            return known

        return lambda one, other: bool(mask(one) & mask(other))

    def _bit_of(self, tx: Transaction) -> dict[int, int]:
        """Return for each node which bit its address is in the masks of releases."""
        rows = tx.rows("SELECT id, main_ip, agent_port FROM nodes")
        with self._masks_guard:
            return {node_id: self._bits.setdefault(endpoint_of(main_ip, port), len(self._bits))
                    for node_id, main_ip, port in rows}

    @classmethod
    def _candidates(cls, tx: Transaction) -> list[Candidate]:
        now = tx.now()
        # the index release_tasks_by_status finds what is not terminal
        return [Candidate(id_, target, version, status, running,
                          expires is not None and now < expires <= cls._latest_expiry(now),
                          cls._start_at(strategy), paused_by, said, started is not None, bool(pending), tag)
                for id_, target, version, status, running, expires, strategy, paused_by, said, started, pending, tag
                in tx.rows("""
            SELECT r.id, r.target, r.version, r.status,
                   (SELECT COUNT(*) FROM release_task_nodes n
                    WHERE n.release_task_id = r.id AND n.status = 'running'),
                   r.claim_expires_at, r.strategy, r.paused_by, r.status_reason, r.started_at,
                   (SELECT MIN(n.batch) FROM release_task_nodes n
                    WHERE n.release_task_id = r.id AND n.status = 'pending'), r.tag
            FROM release_tasks r
            WHERE r.status IN ('pending', 'running', 'paused', 'cancelling')""")]

    @staticmethod
    def _start_at(strategy: str) -> str:
        """Gives the startAt of a stored strategy; "" where there is none, or none that can be read."""
        with contextlib.suppress(ValueError, AppError):
            return parse_strategy(parse_json(strategy)).start_at if "startAt" in strategy else ""
        return ""

    def claim(self, release_id: int, owner: str, ttl_s: float) -> Claim | None:
        """Takes a release for ttl_s seconds; None when somebody else was first or it must wait.

        Every claim raises the fence, so what an earlier owner still wants to write changes nothing.
        """
        with self.database.transaction(write=True) as tx:
            if release_id not in self._runnable(tx)[0]:
                return None
            self._note_timeline(tx)
            before = self._release(tx, release_id)
            if before.status == PENDING:
                renumbered = self._renumber(tx, before, owner)
                if renumbered != before and release_id not in self._runnable(tx)[0]:
                    self._explain_waiting(tx)
                    return None  # with its new number others come before it
                before = renumbered
            self._complete(tx, before)
            now, expires = tx.now(), self._expiry(tx, ttl_s)
            started = tx.execute(f"""
                UPDATE release_tasks
                SET status = 'running', started_at = COALESCE(started_at, ?), updated_at = ?, status_reason = ?,
                    {COUNTERS},
                    total_nodes = (SELECT COUNT(*) FROM release_task_nodes n
                                   WHERE n.release_task_id = release_tasks.id)
                WHERE id = ? AND status = 'pending'""", now, now, f"taken by {owner}", release_id)
            if started:
                tx.insert_many(INSERT_EVENTS, 8, [(release_id, None, now, owner, "started", PENDING, RUNNING, "")])
            changed = tx.execute("""
                UPDATE release_tasks
                SET claim_owner = ?, claim_fence = claim_fence + 1, claim_expires_at = ?
                WHERE id = ? AND status IN ('running', 'paused', 'cancelling')
                  AND (claim_expires_at IS NULL OR claim_expires_at <= ? OR claim_expires_at > ?)""",
                                 owner, expires, release_id, now, self._latest_expiry(now))
            if not changed:
                raise StateMoved(f"release {release_id} was claimed by a writer outside of the lock")
            self._explain_waiting(tx)
            tx.afterwards.append(lambda: self._tell_claim(before, owner))
            return Claim(release_id, before.claim_fence + 1, before.version, owner, self.generation)

    def _renumber(self, tx: Transaction, release: Release, owner: str) -> Release:
        """Give a release the next version when it starts, where nodes may have higher ones than it has (rule 2).

        That is one that had to wait for its time while later ones started, and one that is numbered below the first
        version that a person named: agents are further on. Not after a failover: it may be at its agents already,
        under this number, and they know it by that.
        """
        first_version = tx.value("SELECT first_version FROM database_state WHERE id = 1")
        if release.version < first_version:
            why = f"agents may have versions below {first_version} (migrate --first-version)"
        elif self._start_at(release.strategy) and tx.value(
                "SELECT COUNT(*) FROM release_tasks WHERE version > ? AND started_at IS NOT NULL", release.version):
            why = "later ones went out while it waited for its time"
        else:
            return release
        version = self._next_version(tx, release.id)
        self._seen.use_version(version)
        payload = release.payload
        with contextlib.suppress(ValueError, AppError):  # what can't be used ends the release, a little later
            payload = to_json(payload_for_version(parse_payload(parse_json(payload)), version))
        tx.execute("UPDATE release_tasks SET version = ?, payload = ? WHERE id = ?", version, payload, release.id)
        text = f"version {release.version} became {version}: {why}"
        tx.insert_many(INSERT_EVENTS, 8, [(release.id, None, self._now(), owner, "renumbered", PENDING, PENDING, text)])
        tx.afterwards.append(lambda: log.info("%s: %s", release, text,
                                              extra=about(release, actor=owner, event="renumbered")))
        return self._release(tx, release.id)

    def _complete(self, tx: Transaction, release: Release) -> None:
        """Fill what a person who wrote the rows of a release left to us."""
        if release.tag:
            return
        # tasks that agents know already, from before there were tags, keep their ids
        tx.execute("""
            UPDATE release_tasks
            SET tag = ?
            WHERE id = ? AND NOT EXISTS (SELECT 1 FROM release_task_nodes n
                                         WHERE n.release_task_id = release_tasks.id AND n.task_id <> '')""",
                   new_tag(), release.id)
        self._keep_as_they_are(tx, release.id)

    def _tell_claim(self, before: Release, owner: str) -> None:
        """Logs and counts that a release was taken."""
        if before.status == PENDING:
            log.info("%s: started, taken by %s", before, owner, extra=about(before, actor=owner, event="started"))
        elif before.claim_expires_at is not None:
            self.database.metrics.count("releasectl_takeovers_total")
            log.warning("%s: taken over by %s from %s, whose claim had run out", before, owner, before.claim_owner,
                        extra=about(before, actor=owner, event="taken_over"))
        else:
            log.debug("%s: taken by %s", before, owner, extra=about(before, actor=owner, event="taken"))

    def renew(self, claim: Claim, ttl_s: float) -> bool:
        """Keeps a claim for ttl_s seconds more; False when it is lost."""
        with self.database.transaction(write=True) as tx:
            return tx.execute("UPDATE release_tasks SET claim_expires_at = ? WHERE id = ? AND claim_fence = ? "
                              "AND claim_owner = ? AND claim_expires_at IS NOT NULL",
                              self._expiry(tx, ttl_s), claim.release_id, claim.fence, claim.owner) == 1

    def let_go(self, claim: Claim) -> None:
        """Hands a claim back, so that anyone may take the release at once."""
        with self.database.transaction(write=True) as tx:
            tx.execute("UPDATE release_tasks SET claim_owner = '', claim_expires_at = NULL "
                       "WHERE id = ? AND claim_fence = ? AND claim_owner = ?",
                       claim.release_id, claim.fence, claim.owner)

    def claimed_release(self, claim: Claim) -> Release:
        """Return the release of a claim; raise ClaimLost when it has another owner or none, or is gone."""
        with self._watching() as tx:
            return self._claimed(tx, claim)

    def claimed_release_with_nodes(self, claim: Claim) -> tuple[Release, list[ReleaseNode]]:
        """Return the release of a claim and its nodes, of one moment; raise ClaimLost."""
        with self._watching() as tx:
            return self._claimed(tx, claim), self._release_nodes(tx, claim.release_id)

    def holds(self, release_id: int) -> list[Hold]:
        """Return when pauses and freezes held a release."""
        with self.database.transaction() as tx:
            # the index release_events_of_releases
            return holds_of((at, event, status) for at, event, status in tx.rows(
                "SELECT at, event, to_status FROM release_events WHERE release_task_id = ? AND node_id IS NULL "
                "ORDER BY id", release_id))

    def _claimed(self, tx: Transaction, claim: Claim) -> Release:
        row = tx.row(f"SELECT {RELEASE_COLUMNS} FROM release_tasks r WHERE r.id = ?", claim.release_id)
        if row is None or Release(*row).version != claim.version:
            self._note_fall(claim, f"{claim} is gone")
            raise ClaimLost("it is no longer in the database")
        release = Release(*row)
        if release.claim_fence < claim.fence:
            self._note_fall(claim, f"the claim number of {claim} is {release.claim_fence} after {claim.fence}")
        if (release.claim_fence, release.claim_owner) != (claim.fence, claim.owner) or release.claim_expires_at is None:
            raise ClaimLost(f"{release} is with {release.claim_owner or 'nobody'} now")
        return release

    def _note_fall(self, claim: Claim, fell: str) -> None:
        """Tell that the database went back, where that was not noticed since the claim was taken."""
        if self.generation == claim.generation:
            self._seen.note_fall()
            self._tell_went_back(fell)

    def obstacles(self, release_id: int) -> Obstacles:
        """Return what may keep a release from its dispatches."""
        with self.database.transaction() as tx:
            moved_at = tx.value("SELECT moved_at FROM database_state WHERE id = 1")
            moved_s = epoch_of(tx.now()) - epoch_or(moved_at, 0.0) if moved_at else float("inf")
            if moved_s < 0:  # the clock of the server before was ahead
                moved_s = float("inf")
            return Obstacles(self._busy(tx, release_id), self._freeze(tx),
                             min(moved_s, self.clock.elapsed() - self._changed_at))

    def _busy(self, tx: Transaction, release_id: int) -> frozenset[Endpoint]:
        """Return the addresses that another release has in flight or that may be at a lost request."""
        now = self.moment()
        # the partial indexes release_task_nodes_one_running and _held hold few rows; the wall clock may have been
        # set since, by no more than a week
        rows = tx.rows(f"""
            SELECT {ADDRESS_THEN}, n.status, n.hold_until, n.hold_clock
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.status = 'running' AND n.release_task_id <> ?
            UNION ALL
            SELECT {ADDRESS_THEN}, n.status, n.hold_until, n.hold_clock
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.hold_until IS NOT NULL AND n.hold_until > ?
              AND (n.release_task_id <> ? OR n.status IN ('success', 'failed'))""",
                       release_id, utc_text(now.wall - 7 * 86400), release_id)
        return frozenset(endpoint_of(main_ip, port) for main_ip, port, status, until, mark in rows
                         if status == RUNNING or 0 < now.until_s(until, mark) <= MAX_HOLD_S)

    def times_ahead(self) -> list[str]:
        """Return a sentence for each claim and hold that lies further ahead than any setting allows.

        A process whose clock was ahead wrote it; it counts as over.
        """
        with self.database.transaction() as tx:
            now = tx.now()
            claims = tx.rows("SELECT id, claim_owner, claim_expires_at FROM release_tasks WHERE status IN "
                             "('pending', 'running', 'paused', 'cancelling') AND claim_expires_at > ?",
                             self._latest_expiry(now))
            holds = tx.rows(f"SELECT {NAME_THEN}, n.hold_until FROM release_task_nodes n "
                            "JOIN nodes h ON h.id = n.node_id WHERE n.hold_until IS NOT NULL AND n.hold_until > ?",
                            utc_text(self.clock.wall() + MAX_HOLD_S))
        return [*(f"release {id_} is claimed by {owner} until {until}" for id_, owner, until in claims),
                *(f"node {name} is kept free until {until}" for name, until in holds)]

    def commit(self, claim: Claim, release: Release, decision: Decision, now: Moment, actor: str) -> None:
        """Writes a decision on the release as it was read, or nothing.

        Raises ClaimLost when the fence moved, StateMoved when the status or a node did. After a
        DatabaseError whether it was written is not known: read again.
        """
        with self.database.transaction(write=True) as tx:
            self._claimed(tx, claim)
            begun = [c.after for c in decision.changes if c.after.attempts > c.before.attempts]
            first = {c.after.endpoint for c in decision.changes
                     if (c.before.status, c.after.status) == (PENDING, RUNNING)}
            if first and first & self._busy(tx, claim.release_id):
                raise StateMoved(f"another release has a node of {release} in flight")
            self._raise_last_versions(tx, release, [node.node_id for node in begun])
            if begun and self._freeze(tx).frozen:
                raise StateMoved(f"a freeze came before a dispatch of {release}")
            self._write(tx, release, decision, now, actor, claim)

    @staticmethod
    def _raise_last_versions(tx: Transaction, release: Release, node_ids: Sequence[int]) -> None:
        """Note that nodes are sent a version, where the dispatch is written; StateMoved where one has a higher one."""
        for start in range(0, len(node_ids), NODES_PER_STATEMENT):
            part = node_ids[start:start + NODES_PER_STATEMENT]
            marks = ", ".join("?" * len(part))
            tx.execute(f"UPDATE nodes SET last_version = ? WHERE last_version < ? AND id IN ({marks})",
                       release.version, release.version, *part)
            # the index nodes_by_address: a host that was entered anew has two rows
            if tx.value(f"""
                    SELECT COUNT(*)
                    FROM nodes h
                    JOIN nodes a ON a.main_ip = h.main_ip AND a.agent_port = h.agent_port
                    WHERE h.id IN ({marks}) AND a.last_version > ?""", *part, release.version):
                raise StateMoved(f"a node of {release} was sent a higher version")

    def was_written(self, claim: Claim, decision: Decision) -> bool:
        """Reads back, after an error at COMMIT, whether it took place; ClaimLost when that is another's now.

        As a writer, which waits for a transaction of ours that the server may still be at: what is
        found is the end of it.
        """
        with self.database.transaction(write=True) as tx:
            # not _claimed(): the commit may have handed the claim back
            release = self._release(tx, claim.release_id)
            if release.claim_fence != claim.fence or release.claim_owner not in ("", claim.owner):
                raise ClaimLost(f"{release} is with {release.claim_owner or 'nobody'} now")
            found = {n.node_id: n for n in self._release_nodes(tx, claim.release_id)}
        return (release.status, release.passed_batch, release.soak_clock) == (
            decision.status, decision.passed_batch, decision.soak_clock) if not decision.changes else all(
            (after.status, after.attempts, after.finished_at, after.task_id)
            == (row.status, row.attempts, row.finished_at, row.task_id)
            for _, after, _ in decision.changes for row in [found[after.node_id]])

    def _write(self, tx: Transaction, release: Release, decision: Decision, now: Moment, actor: str,
               claim: Claim | None = None, detail: str = "") -> None:
        self._write_nodes(tx, release.id, decision.changes, now)
        ends = decision.status in TERMINAL
        changed = tx.execute(f"""
            UPDATE release_tasks
            SET status = ?, status_reason = ?, error_msg = ?, updated_at = ?, {COUNTERS},
                finished_at = ?, passed_batch = ?, soak_until = ?, soak_clock = ?,
                claim_owner = CASE WHEN ? = 1 THEN '' ELSE claim_owner END,
                claim_expires_at = CASE WHEN ? = 1 THEN NULL ELSE claim_expires_at END
            WHERE id = ? AND status = ? AND updated_at = ? AND claim_fence = ? AND claim_owner = ?""",
                             decision.status, decision.status_reason, decision.error_msg, now.text,
                             now.text if ends else None, decision.passed_batch, decision.soak_until,
                             decision.soak_clock, int(ends), int(ends), release.id, release.status, release.updated_at,
                             claim.fence if claim else release.claim_fence,
                             claim.owner if claim else release.claim_owner)
        if changed != 1:
            raise StateMoved(f"{release} is no longer as it was read")
        events: list[tuple[object, ...]] = [
            (release.id, c.after.node_id, now.text, actor, NODE_EVENTS[c.after.status], c.before.status,
             c.after.status, detail_text(c.detail or c.after.error_msg))
            for c in decision.changes if c.before.status != c.after.status]
        if decision.status != release.status:
            events.append((release.id, None, now.text, actor, RELEASE_EVENTS[decision.status], release.status,
                           decision.status, detail_text(detail or decision.error_msg or decision.status_reason)))
        tx.insert_many(INSERT_EVENTS, 8, events)
        if decision.status != release.status:
            self._explain_waiting(tx)
        tx.afterwards.append(lambda: self.tell(release, decision, actor))

    def tell(self, release: Release, decision: Decision, actor: str) -> None:
        """Logs and counts what a commit changed, once it is certain: a line for each change of a status.

        Of single nodes only failures are for everybody: ten thousand successes would bury all else.
        """
        for change in decision.changes:
            node, event = change.after, NODE_EVENTS.get(change.after.status, "")
            if node.status == change.before.status:
                continue
            if node.status == FAILED:
                self.database.metrics.count("releasectl_node_failures_total", node.error_kind)
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
        if decision.status != release.status:
            log.log(logging.INFO if decision.status == SUCCESS else logging.WARNING, "%s: %s, %s", release,
                    decision.status, decision.status_reason,
                    extra=about(release, actor=actor, event=RELEASE_EVENTS[decision.status]))

    @staticmethod
    def _write_nodes(tx: Transaction, release_id: int, changes: Sequence[NodeChange], now: Moment) -> None:
        """Updates nodes, those that become alike in all but the task's id in one statement."""
        alike: dict[tuple[object, ...], list[NodeChange]] = {}
        for change in changes:
            before, after, _ = change
            key: tuple[object, ...] = (
                after.status, after.attempts, after.error_kind, after.error_msg, after.hold_until, after.hold_clock,
                after.started_clock, round(after.waited_s, 3), after.stored_reached, after.started_at,
                after.finished_at, before.status, before.attempts)
            alike.setdefault(key, []).append(change)
        for key, group in alike.items():
            for start in range(0, len(group), NODES_PER_STATEMENT):
                part = [change.after for change in group[start:start + NODES_PER_STATEMENT]]
                named = [c.after for c in group[start:start + NODES_PER_STATEMENT]
                         if c.after.task_id != c.before.task_id]
                task_id = f"CASE node_id {'WHEN ? THEN ? ' * len(named)}ELSE task_id END" if named else "task_id"
                changed = tx.execute(f"""
                    UPDATE release_task_nodes
                    SET status = ?, attempts = ?, error_kind = ?, error_msg = ?, hold_until = ?, hold_clock = ?,
                        started_clock = ?, waited_sec = ?, reached = ?, started_at = ?, finished_at = ?, updated_at = ?,
                        task_id = {task_id}
                    WHERE release_task_id = ? AND status = ? AND attempts = ?
                      AND node_id IN ({', '.join('?' * len(part))})""",
                                     *key[:-2], now.text, *(v for n in named for v in (n.node_id, n.task_id)),
                                     release_id, *key[-2:], *(n.node_id for n in part))
                if changed != len(part):
                    raise StateMoved(f"a node of release {release_id} is no longer {key[-2]}")

    @staticmethod
    def _expiry(tx: Transaction, ttl_s: float) -> str:
        return utc_text(epoch_of(tx.now()) + ttl_s)

    @staticmethod
    def _latest_expiry(now: str) -> str:
        """Return until when a claim may last at the most."""
        return utc_text(epoch_of(now) + MAX_CLAIM_TTL_S)


# ======================================================================================
# 9 Conversations: coroutines that wait for sockets, many in one thread, or one in the caller's.
#   Uses 1 and 2; knows no agent.
#
#   A thread for each of 64 requests costs a third more CPU: they wake at once, and fight for the
#   interpreter. asyncio is not used, as its TLS needs twice the CPU of a plain SSLSocket.
# ======================================================================================

# So often it is looked whose time is over, while there is somebody who waits.
LATE_CHECK_S = 0.05
# So many begin before others are looked at: with large payloads each takes its time.
NEW_AT_ONCE = 8

T = TypeVar("T")


class Wait(NamedTuple):
    """What a conversation waits for: that a socket can be read or written (POLLIN, POLLOUT), until a moment.

    The moment is one of time.monotonic(); socket.timeout is raised then.
    """
    sock: socket.socket | select.epoll | None
    event: int
    ends_at: float

    def __await__(self) -> Generator[Wait, None, None]:
        yield self


# Awaited before what blocks its thread: among many, a conversation goes on in a thread of its own then.
BLOCKS = Wait(None, 0, 0.0)


def converse(talk: Coroutine[Wait, None, T]) -> T:
    """Holds a conversation to its end in this thread; gives what it returns, raises what it raises."""
    error: Exception | None = None
    try:
        while True:
            wait = talk.throw(error) if error else talk.send(None)
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


class Conversations:
    """Holds many conversations at once, in one thread; each that blocks in one more."""

    def __init__(self) -> None:
        self._new: collections.deque[Coroutine[Wait, None, None]] = collections.deque()
        self._waiting: dict[int, tuple[Coroutine[Wait, None, None], Wait]] = {}
        self._poller = select.poll()
        self._wakers: tuple[socket.socket, socket.socket] | None = None
        self._is_woken = False
        self._is_closed = False
        self._turned_at = self._check_at = 0.0
        self._guard = threading.Lock()

    def start(self) -> None:
        """Starts the thread where it does not run; RuntimeError or OSError when there is no room for it."""
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

    def submit(self, talk: Coroutine[Wait, None, None]) -> None:
        """Begins a conversation, which must tell its outcome itself, and raise nothing; after close() it is let go.

        It waits for start().
        """
        with self._guard:
            if self._is_closed:
                talk.close()
                return
            if not self._waiting and not self._new:
                self._turned_at = time.monotonic()  # a thread that nobody needed did not turn
            self._new.append(talk)
            self._wake()

    def is_hung(self, since: float) -> bool:
        """Says whether somebody waits, and nobody was looked at since a moment of time.monotonic()."""
        return bool(self._waiting or self._new) and self._turned_at < since

    def close(self) -> None:
        """Lets go of what is under way, without a word to it."""
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
            limit_ms = 0 if self._new else LATE_CHECK_S * 1000 if self._waiting else None
            for descriptor, _ in self._poller.poll(limit_ms):
                if descriptor == woken.fileno():
                    woken.recv(1)
                    self._is_woken = False  # before the new ones are taken: whoever comes later wakes again
                else:
                    self._go_on(self._stop_waiting(descriptor))
            for _ in range(min(len(self._new), NEW_AT_ONCE)):
                self._go_on(self._new.popleft())
            self._end_late()
        for talk in (*self._new, *(talk for talk, _ in self._waiting.values())):
            talk.close()
        with self._guard:
            self._wakers = None
            woken.close()
            waker.close()

    def _end_late(self) -> None:
        """Ends the waits whose time is over, now and then; not where the answer is there, and we are late."""
        self._turned_at = now = time.monotonic()
        if now >= self._check_at:
            self._check_at = now + LATE_CHECK_S
            late = [descriptor for descriptor, (_, wait) in self._waiting.items() if wait.ends_at <= now]
            ready = {descriptor for descriptor, _ in self._poller.poll(0)} if late else set()
            for descriptor in late:
                if descriptor not in ready:
                    self._go_on(self._stop_waiting(descriptor), socket.timeout("deadline"))

    def _stop_waiting(self, descriptor: int) -> Coroutine[Wait, None, None]:
        self._poller.unregister(descriptor)
        return self._waiting.pop(descriptor)[0]

    def _go_on(self, talk: Coroutine[Wait, None, None], error: Exception | None = None) -> None:
        """Lets a conversation go on until it waits again, or ends."""
        try:
            wait = talk.throw(error) if error else talk.send(None)
        except StopIteration:
            return
        except Exception:  # one conversation must not end all others
            log.exception("a conversation with an agent failed within releasectl")
            return
        try:
            if wait.sock is None:
                # a daemon, not a pool's, which the end of the process would wait for: a name may take long to look up
                threading.Thread(target=self._hold, args=(talk,), name="agent", daemon=True).start()
            else:
                descriptor = wait.sock.fileno()
                self._poller.register(descriptor, wait.event)
                self._waiting[descriptor] = talk, wait
        except Exception as failed:  # no thread can be started, say: the conversation itself tells what it lost
            self._go_on(talk, failed)

    @staticmethod
    def _hold(talk: Coroutine[Wait, None, None]) -> None:
        """Holds the rest of a conversation that blocks."""
        try:
            converse(talk)
        except Exception:
            log.exception("a conversation with an agent failed within releasectl")


class TimedSocket:
    """A connected socket, plain or TLS, whose every wait ends at one moment, also under a peer that drips."""

    def __init__(self, sock: socket.socket, ends_at: float, max_bytes: int):
        """Takes a socket that does not block, a moment of time.monotonic(), and how much may be read in all."""
        self.sock = sock
        self.ends_at = ends_at
        self.received = 0
        self.unread = b""
        self.at_end = False
        self._max_bytes = max_bytes

    async def when_ready(self, act: Callable[[], T], event: int) -> T:
        """Gives what act() gives as soon as the socket lets it; socket.timeout when the time is over by then.

        What is there is taken without a look at the clock: it may be we who are late.
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
        """Sends all of it; nothing when the time is over."""
        if time.monotonic() >= self.ends_at:
            raise socket.timeout("deadline")
        view = memoryview(data)
        while view:
            view = view[await self.when_ready(functools.partial(self.sock.send, view), select.POLLOUT):]

    async def recv(self, max_bytes: int) -> bytes:
        """Gives what is there, b"" at the end; TooBig when it is more than may be read."""
        if self.unread:
            data, self.unread = self.unread[:max_bytes], self.unread[max_bytes:]
            return data
        data = await self.when_ready(functools.partial(self.sock.recv, max_bytes), select.POLLIN)
        self.received += len(data)
        self.at_end = not data
        if self.received > self._max_bytes:
            raise TooBig
        return data

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Gives it as http.client wants it, which blocks."""
        return io.BufferedReader(_SocketReader(self), 16384)

    def close(self) -> None:
        """Does nothing: who opened the socket closes it, after the last byte was read."""


class _SocketReader(io.RawIOBase):
    def __init__(self, source: TimedSocket):
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = converse(self._source.recv(len(buffer)))
        buffer[:len(data)] = data
        return len(data)


class TooBig(Exception):
    """More came than may be read."""


# ======================================================================================
# 10 Agent client: mutual TLS, connections, deadlines, the two dialects (contract section 1).
#   Uses 1 to 3, 9, and the words of 7; knows no database and no release.
# ======================================================================================

MAX_IDLE_AGENT_CONNECTIONS = 256
MAX_IDLE_AGENT_CONNECTION_S = 60.0
# Of a name's several addresses the next is tried beside the ones before after so long (RFC 8305, 5).
NEXT_ADDRESS_S = 0.25
# The head of an answer may be this long on top of the body.
MAX_HEAD_BYTES = 64 << 10
# The body of an agent's answer (contract section 1), and of what a probe gets: a page that a node serves.
MAX_ANSWER_BYTES, MAX_PROBED_BYTES = 64 << 10, 1 << 20

# X509_V_ERR_...: what OpenSSL found wrong with an agent's certificate, for a person on call.
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
# What OpenSSL's security level refuses in our own files, and what would do.
WEAK_REASONS: Mapping[str, str] = {
    "EE_KEY_TOO_SMALL": "its key is too weak: make one of RSA with 2048 bits or more, or of EC",
    "CA_KEY_TOO_SMALL": "the key of its CA is too weak: it needs RSA of 2048 bits or more, or EC",
    "CA_MD_TOO_WEAK": "it is signed with a digest that is too weak: it needs SHA-256 or better",
    "DH_KEY_TOO_SMALL": "its key is too weak: make one of RSA with 2048 bits or more, or of EC",
}
# Alerts by which an agent says that it does not like our certificate; their prefixes differ
# between versions of TLS and of OpenSSL.
REFUSAL_ALERTS = ("CERTIFICATE_REQUIRED", "BAD_CERTIFICATE", "UNKNOWN_CA", "CERTIFICATE_EXPIRED",
                  "CERTIFICATE_REVOKED", "CERTIFICATE_UNKNOWN", "UNSUPPORTED_CERTIFICATE", "ACCESS_DENIED",
                  "NO_CERTIFICATE", "HANDSHAKE_FAILURE", "DECRYPT_ERROR")


class Address(NamedTuple):
    """Where an agent listens, and its dialect."""
    host: str
    port: int
    protocol: str

    def __str__(self) -> str:
        return f"agent [{self.host}]:{self.port}" if ":" in self.host else f"agent {self.host}:{self.port}"


class AgentTask(NamedTuple):
    """What an agent is asked to do."""
    id: str
    type: str
    version: int
    payload: Mapping[str, Any]


class _Call(NamedTuple):
    """One request: what is asked of whom, until when, and what is asked before it leaves."""
    address: Address
    method: str
    path: str
    body: bytes | None
    limit_s: float
    ends_at: float
    gate: Callable[[], bool]
    # The Host header, where it is not the address.
    host: str = ""
    # Gets an entry when the request was sent once more, as a kept connection ended before it was answered.
    resent: list[bool] | None = None

    @property
    def max_bytes(self) -> int:
        """How long the answer's body may be."""
        return MAX_PROBED_BYTES if self.address.protocol == PROBE else MAX_ANSWER_BYTES


class Answer(NamedTuple):
    """What an agent said: ACCEPTED, WORKING, SUCCESS or UNKNOWN, and the task's id.

    message: its own words, where it had some. applied: the version that it says it has already; 0 for none.
    """
    state: str
    task_id: str = ""
    message: str = ""
    applied: int = 0


class _Stale(Exception):
    """A kept-alive connection that the agent had closed before it saw the request."""


# A renewed certificate that was not valid yet is taken so long after its time: the clocks of those who look at it,
# OpenSSL's own among them, may be behind ours.
CLOCKS_APART_S = 1.0


class TlsFiles:
    """Certificates as an ssl context, made anew when their files change; for both of our sides."""

    def __init__(self, make: Callable[..., ssl.SSLContext], *files: str):
        """make: gives a context of the files: our certificate, its key, and the CA's, which may have no name."""
        self._make, self._files = make, files
        self._guard = threading.Lock()
        self._stamp: tuple[object, ...] = ()
        # Of the certificate and key in use, and a digest of the CA and the CRLs that others are verified by.
        self._pair_stamp: tuple[object, ...] = ()
        self._trust = ""
        self._context: ssl.SSLContext | None = None
        # Why the files as they are were not taken.
        self._fault = ""
        # When a renewed certificate that is not valid yet will be.
        self._valid_from = float("inf")

    def context(self) -> ssl.SSLContext:
        """Return the context of the files as they are; raise ConfigError when there is none that works.

        While a renewal is half done, or brought a certificate that nobody accepts now, the last pair goes on.
        """
        return self.current()[0]

    def current(self) -> tuple[ssl.SSLContext, str]:
        """Do context(); return also what tells whether the CA or its CRLs are others than they were."""
        with self._guard:
            stamp = tuple(map(_file_stamp, self._files))
            if stamp != self._stamp or time.time() >= self._valid_from:
                try:
                    self._valid_from = float("inf")
                    made = self._make(*self._files)
                    if self._context is not None and stamp[:2] != self._pair_stamp:  # a new CA or CRL is always taken
                        self._refuse_invalid(self._files[0])
                    self._context, self._pair_stamp, self._trust = made, stamp[:2], _digest_of_file(self._files[-1])
                    self._fault = ""
                except ConfigError as error:
                    if self._context is None:
                        raise
                    self._fault = str(error)
                    log.warning("renewed certificate not taken yet, the one before goes on: %s", error)
                self._stamp = stamp
            assert self._context is not None
            return self._context, self._trust

    def reload(self) -> None:
        """Read the files anew, whether they changed or not; raise ConfigError when they can't be used."""
        with self._guard:
            self._stamp = ()
        self.context()
        if self._fault:
            raise ConfigError(f"{self._fault} (the one before goes on)")

    def _refuse_invalid(self, path: str) -> None:
        """Raise ConfigError when a certificate has expired or is not valid yet."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            since, until = certificate_times(Path(path).read_text(encoding="latin-1"))[0]
            if time.time() > until:
                raise ConfigError(f"{path} expired {utc_text(until)}: put a valid one there")
            if time.time() < since:
                self._valid_from = since + CLOCKS_APART_S
                raise ConfigError(f"{path} is not valid before {utc_text(since)}")


def _digest_of_file(path: str) -> str:
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    return ""


VALIDITY = re.compile(rb"(?:\x17\x0d(\d{12})Z|\x18\x0f(\d{14})Z)(?:\x17\x0d(\d{12})Z|\x18\x0f(\d{14})Z)")


def certificate_times(pem: str) -> list[tuple[float, float]]:
    """Return notBefore and notAfter of each certificate of a PEM file, in seconds since 1970.

    Raise ValueError for a broken file. Read from the bytes and not off a handshake, which an expired certificate
    does not pass.
    """
    return [times for der in pem_blocks(pem, "CERTIFICATE") for times in _validity(der)]


def crl_ends(pem: str) -> list[float]:
    """Return nextUpdate of each CRL of a PEM file that names one, in seconds since 1970; raise ValueError."""
    return [until for der in pem_blocks(pem, "X509 CRL") for _, until in _validity(der)]


def certificate_end(certificate: Mapping[str, Any]) -> float:
    """Return until when a certificate of getpeercert() is good, in seconds since 1970."""
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def cas_without_crl(pem: str) -> int:
    """Return how many of the CAs of a PEM file have no CRL there; raise ValueError for a broken file."""
    issuers = {_der_name(der, 2, 0x02) for der in pem_blocks(pem, "X509 CRL")}
    return len({_der_name(der, 5, 0xA0) for der in pem_blocks(pem, "CERTIFICATE")} - issuers)


@functools.lru_cache(maxsize=256)
def crl_end_of(peer: bytes, ca: str, trust: str) -> float:  # noqa: ARG001 - trust: looked at anew when it changes
    """Return until when the CRLs for a certificate (DER) are good, in seconds since 1970, infinity without one.

    ca is the file that it was verified by; raise ConfigError when it can't be read. OpenSSL looks at a CRL in a whole
    handshake alone: a resumed session and a kept connection would outlive it.
    """
    try:
        pem = Path(ca).read_text(encoding="latin-1")
        crls, cas = pem_blocks(pem, "X509 CRL"), pem_blocks(pem, "CERTIFICATE")
        issuers = {_der_name(each, 5, 0xA0): _der_name(each, 3, 0xA0) for each in cas}
        ends: dict[bytes, float] = {}
        for name, until in ((_der_name(crl, 2, 0x02), until) for crl in crls for _, until in _validity(crl)):
            ends[name] = max(until, ends.get(name, 0.0))
        issuer: bytes | None = _der_name(peer, 3, 0xA0)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{ca} can't be read: {one_line(error, 100)}") from None
    chain: list[bytes] = []
    while issuer is not None and issuer not in chain:
        chain.append(issuer)
        issuer = issuers.get(issuer)
    looked_at = chain[:1] if set(issuers) - set(ends) else chain  # as load_ca() has it
    return min((ends[name] for name in looked_at if name in ends), default=float("inf"))


def pem_blocks(pem: str, label: str) -> list[bytes]:
    """Return the blocks of one kind of a PEM file; raise ValueError for one that is not base64."""
    return [base64.b64decode("".join(text.split()), validate=True)
            for text in re.findall(f"-----BEGIN {label}-----(.*?)-----END {label}-----", pem, re.DOTALL)]


def _validity(der: bytes) -> Iterator[tuple[float, float]]:
    # a certificate's validity and a CRL's updates are the only places of two times in a row (RFC 5280, 4.1.2.5, 5.1.2)
    found = VALIDITY.search(der)
    if found:
        short_since, long_since, short_until, long_until = found.groups()
        yield _asn1_time(short_since, long_since), _asn1_time(short_until, long_until)


def _der_name(der: bytes, place: int, version_tag: int) -> bytes:
    """Return a field of what is signed: a certificate's subject or a CRL's issuer; raise ValueError.

    place counts from the version, which may be left out: it is known by its tag.
    """
    outer = next(_der_items(der), (0, b""))[1]
    fields = list(_der_items(next(_der_items(outer), (0, b""))[1]))
    place -= 0 if fields and fields[0][0] == version_tag else 1
    if place >= len(fields):
        raise ValueError("neither a certificate nor a CRL")
    return fields[place][1]


def _der_items(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of the items that follow one another; raise ValueError for what is no DER."""
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


def _file_stamp(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError:
        return None
    # the ctime also tells a file that was made readable, or written with its old time
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _no_passphrase() -> str:
    raise ConfigError("the key is protected by a passphrase: releasectl needs it without one")


def load_pair(context: ssl.SSLContext, cert: str, key: str, names: tuple[str, str]) -> None:
    """Loads a certificate and its key; ConfigError naming the setting and what is wrong."""
    for name, path in zip(names, (cert, key)):
        require_pem(name, path)
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
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
    """Return how a file begins; raise ConfigError naming the setting when it can't be read."""
    if not path:
        raise ConfigError(f"{name} is not set")
    try:
        with open(path, "rb") as file:
            return file.read(3)
    except OSError as error:
        raise ConfigError(f"{name} {path} can't be read: {_os_reason(error)}") from None


def require_pem(name: str, path: str) -> None:
    """Raise ConfigError for a file that can't be read, or whose first certificate OpenSSL would leave out unseen."""
    if require_file(name, path) == codecs.BOM_UTF8:
        raise ConfigError(f"{name} {path} begins with a byte order mark: save it without one (`sed -i '1s/^\\xEF\\xBB"
                          "\\xBF//'`)")


def require_private(name: str, path: str) -> None:
    """Raise ConfigError for a file that can't be read, that others than owner and group can read, or that anybody
    but its owner can write."""
    require_file(name, path)
    if os.stat(path).st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"{name} {path} is open to others: chmod o-rwx,g-w it (its group may read it)")


def load_ca(context: ssl.SSLContext, ca: str, name: str) -> None:
    """Load the CA to verify peers by, with its CRLs where the file holds some; raise ConfigError naming the setting."""
    require_pem(name, ca)
    try:
        context.load_verify_locations(ca)
        if context.cert_store_stats()["crl"]:
            # every CA of the chain must have a CRL then; else it is asked of the one that signed the peer's own
            is_whole = not cas_without_crl(Path(ca).read_text(encoding="latin-1"))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN if is_whole else ssl.VERIFY_CRL_CHECK_LEAF
    except ssl.SSLError as error:
        if error.reason in WEAK_REASONS:
            raise ConfigError(f"{name} {ca} is weak: {WEAK_REASONS[error.reason]}") from None
        raise ConfigError(f"{name} {ca} holds no PEM certificate: {_tls_reason(error)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} {ca} can't be read: {one_line(error, 100)}") from None


def client_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """Gives the context for calls to agents: TLS 1.2 or newer, both sides verified (section 1)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ssl.HAS_NEVER_CHECK_COMMON_NAME:
        context.hostname_checks_common_name = False
    load_ca(context, ca, "CONTROL_CA")
    load_pair(context, cert, key, ("CONTROL_CERT", "CONTROL_KEY"))
    return context


def _tls_reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


class AgentClient:
    """Speaks with agents: dispatching() and querying() are conversations; dispatch(), query(), ping() wait for one."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None):
        """Takes the settings, and where to count; reads no file yet: see prepare()."""
        self.metrics = metrics or Metrics()
        self._connect_s = settings.agent_connect_timeout_sec
        self._request_s = settings.agent_request_timeout_sec
        self._server_name = settings.agent_tls_server_name
        self._key = settings.control_key
        self._tls = TlsFiles(client_context, settings.control_cert, settings.control_key,
                             settings.control_ca) if settings.mtls_enabled else None
        self._guard = threading.Lock()
        # kept-alive connections, the oldest first: socket, its context, since
        self._idle: dict[Address, tuple[socket.socket, object, float]] = {}
        self._active: set[socket.socket] = set()
        self._is_closed = False

    def prepare(self, key_may_be_open: bool = False) -> None:
        """Raise ConfigError when no agent could be called with these settings, or others can read our key.

        For who is about to begin something; what is under way goes on with a key that was opened meanwhile.
        """
        if self._tls:
            self._tls.context()
            if not key_may_be_open:
                require_private("CONTROL_KEY", self._key)

    def reload(self) -> None:
        """Read the certificates anew; raise ConfigError when they can't be used."""
        if self._tls:
            self._tls.reload()

    def close(self) -> None:
        """Ends every connection, also under requests in flight: they and all later ones fail at once."""
        with self._guard:
            self._is_closed = True
            idle, self._idle = self._idle, {}
        for sock in list(self._active):
            with contextlib.suppress(OSError):
                # not SSLSocket.shutdown: it takes the encryption away from under the other thread
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for sock, _, _ in idle.values():
            _close(sock)

    async def dispatching(self, address: Address, task: AgentTask, within_s: float = 3600.0,
                          gate: Callable[[], bool] = lambda: True) -> Answer:
        """Sends a task; gives ACCEPTED with the id to poll, or SUCCESS from an execute agent.

        within_s shortens the request timeout; gate is asked just before the first byte leaves.
        Raises AgentError.
        """
        return await self._counted(DISPATCH, self._dispatch(address, task, within_s, gate))

    async def querying(self, address: Address, task_id: str, within_s: float = 3600.0) -> Answer:
        """Asks a tasks agent for a task; gives WORKING, SUCCESS or UNKNOWN. Raises AgentError."""
        return await self._counted(QUERY, self._query(address, task_id, within_s))

    def dispatch(self, address: Address, task: AgentTask, within_s: float = 3600.0,
                 gate: Callable[[], bool] = lambda: True) -> Answer:
        """Does dispatching() in the caller's thread."""
        return converse(self.dispatching(address, task, within_s, gate))

    def query(self, address: Address, task_id: str, within_s: float = 3600.0) -> Answer:
        """Does querying() in the caller's thread."""
        return converse(self.querying(address, task_id, within_s))

    async def _counted(self, operation: str, talk: Coroutine[Wait, None, Answer]) -> Answer:
        """Gives what a conversation gives, counted; not what close() cut, which says nothing of an agent."""
        since = time.monotonic()
        try:
            answer = await talk
        except AgentError as error:
            if not self._is_closed:
                self.metrics.count_request(operation, error.kind, since)
            raise
        self.metrics.count_request(operation, SUCCESS, since)
        return answer

    async def _dispatch(self, address: Address, task: AgentTask, within_s: float,
                        gate: Callable[[], bool]) -> Answer:
        if address.protocol == TASKS:
            resent: list[bool] = []
            data = await self._call(address, "POST", "/tasks/dispatch", within_s, {
                "taskId": task.id, "type": task.type, "version": task.version, "payload": task.payload}, gate,
                resent=resent)
            named = data.get("taskId")
            if not isinstance(named, str) or not named or one_line(named) != named:
                raise self._nonsense(address, "names no task id", data)
            # what is going to run is pending; a version that the agent has already is done at once
            is_done = data.get("status") == "success" and not resent
            return Answer(ACCEPTED, named, applied=task.version if is_done else 0)
        data = await self._call(address, "POST", EXECUTE_PATH, within_s, {
            "requestId": task.id, "type": task.type, "payload": {**task.payload, "version": task.version}}, gate)
        return self._read_execution(address, task, data)

    async def _query(self, address: Address, task_id: str, within_s: float) -> Answer:
        path = "/tasks/" + urllib.parse.quote(task_id, safe=":")
        data = await self._call(address, "GET", path, within_s, may_be_unknown=True)
        if data is UNKNOWN_TASK:
            return Answer(UNKNOWN, task_id)
        status, last_error = data.get("status"), data.get("lastError")
        if data.get("taskId") != task_id:
            raise self._nonsense(address, "answers for another task", data)
        if status in ("pending", "running"):
            return Answer(WORKING, task_id)
        if status == "success":
            return Answer(SUCCESS, task_id, text_of(last_error))
        if status == "failed":
            raise AgentError(AGENT_FAILED, text_of(last_error) or NO_REASON_GIVEN, reached=True, final=True)
        raise self._nonsense(address, _unknown_status(status), data)

    def ping(self, address: Address) -> str:
        """Ask an agent what only one of its dialect answers so (section 1); return a line. Raise AgentError else."""
        started = time.monotonic()
        call = _Call(address, "GET", "/tasks/releasectl-ping", None, self._request_s, started + self._request_s,
                     lambda: True)
        if address.protocol == EXECUTE:
            call = call._replace(method="POST", path=EXECUTE_PATH, body=b"{}")
        status, answer = converse(self._exchange(call))
        if not _is_of_dialect(address.protocol, status, answer):
            said = answer[:2000].decode("utf-8", "replace").strip()
            text = f"it answered HTTP {status}" + (f", {one_line(said, 80)}" if said else "")
            raise AgentError(PROTOCOL, f"{address} is no {address.protocol} agent: {text} "
                                       "(wrong --protocol or --port?)", reached=True)
        article, took_ms = "an" if address.protocol == EXECUTE else "a", (time.monotonic() - started) * 1000
        return f"answers as {article} {address.protocol} agent in {took_ms:.0f} ms"

    async def probing(self, host: str, verify: Verify, url: str, timeout_s: float) -> str:
        """Get a url from a node, in timeout_s seconds in all; return "" when it answers as verify says, else why not.

        It goes to the node's own address, whatever name the url or verify.host has. Redirects are not followed. A
        certificate is not verified, as it is made out for what the node serves and not for its
        address; what comes back is a status and a yes or no, and no secret goes out.
        """
        parts, ends_at = urllib.parse.urlsplit(url), time.monotonic() + timeout_s
        address = Address(host, parts.port or (443 if parts.scheme == "https" else 80), PROBE)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        call = _Call(address, "GET", path, None, timeout_s, ends_at, lambda: True, verify.host or parts.netloc)
        context = _unverified_context() if parts.scheme == "https" else None
        try:
            sock = await self._connect(address, context, ends_at, verify.host or parts.hostname or host)
            found, answer = await self._request(call, sock, context, reused=False)
        except AgentError as error:
            return f"{url}: {error.message.replace(str(address), 'it', 1)}"
        if found != verify.status:
            return f"{url} answered HTTP {found} instead of {verify.status}"
        if verify.contains.encode() not in answer:
            return f"{url} answered without {one_line(verify.contains, 60)!r} in it"
        return ""

    def _read_execution(self, address: Address, task: AgentTask, data: Mapping[str, Any]) -> Answer:
        status, text = data.get("status"), text_of(data.get("message"))
        if data.get("requestId") != task.id:
            raise self._nonsense(address, "answers for another request", data)
        if status == "failed":
            raise AgentError(AGENT_FAILED, text or NO_REASON_GIVEN, reached=True, final=True)
        if status != "success":
            raise self._nonsense(address, _unknown_status(status), data)
        # an execute agent says success where its message tells otherwise (contract section 1)
        if "but reload failed:" in text:
            raise AgentError(AGENT_FAILED, text, reached=True, final=True)
        found = re.search(r"Version (\d{1,4000}) already applied \(current: (\d{1,4000})\)", text)
        if found is None:
            return Answer(SUCCESS, task.id, text)
        asked, applied = int(found.group(1)), int(found.group(2))
        if applied > task.version:
            raise AgentError(REJECTED, f"the agent is already at version {applied}", reached=True, final=True,
                             detail=text)
        if applied != task.version:
            raise self._nonsense(address, f"has version {applied} and calls it applied", data)
        if asked != task.version:
            raise self._nonsense(address, f"calls version {asked} applied, and was sent {task.version}", data)
        return Answer(SUCCESS, task.id, text, applied)

    @staticmethod
    def _nonsense(address: Address, what: str, data: object) -> AgentError:
        return AgentError(PROTOCOL, f"{address} {what}", reached=True, detail=f"{address} {what}: {data!r}")

    async def _call(self, address: Address, method: str, path: str, within_s: float,
                    body: Mapping[str, Any] | None = None, gate: Callable[[], bool] = lambda: True,
                    may_be_unknown: bool = False, resent: list[bool] | None = None) -> Any:
        """Gives the data of the agent's envelope, an object."""
        raw = to_json(body).encode() if body is not None else None
        limit_s = min(self._request_s, max(within_s, 0.0))
        status, answer = await self._exchange(
            _Call(address, method, path, raw, limit_s, time.monotonic() + limit_s, gate, resent=resent))
        if status == 404 and may_be_unknown:
            return UNKNOWN_TASK
        if status != 200:
            raise self._bad_status(address, status, answer)
        envelope = self._read_envelope(address, answer)
        code = envelope.get("code")
        if isinstance(code, bool) or not isinstance(code, int):
            raise self._nonsense(address, "answers without a code", envelope)
        if code != 0:
            text = f"{address} refused: {text_of(envelope.get('message')) or 'no reason given'} (code {code})"
            raise AgentError(REJECTED, text, reached=True, final=True)
        if not isinstance(envelope.get("data"), dict):
            raise self._nonsense(address, "answers without data", envelope)
        return envelope["data"]

    @staticmethod
    def _read_envelope(address: Address, answer: bytes) -> Mapping[str, Any]:
        try:
            envelope = parse_json(answer)
        except ValueError as error:
            shown = answer[:200].decode("utf-8", "replace")
            raise AgentError(PROTOCOL, f"{address} answered what is not JSON: {one_line(error, 60)}", reached=True,
                             detail=f"{address} answered what is not JSON ({one_line(error, 60)}): {shown}") from None
        if not isinstance(envelope, dict):
            raise AgentError(PROTOCOL, f"{address} answered JSON that is no object", reached=True)
        return envelope

    @staticmethod
    def _bad_status(address: Address, status: int, answer: bytes) -> AgentError:
        said = answer[:2000].decode("utf-8", "replace")
        with contextlib.suppress(ValueError, AttributeError):
            said = text_of(parse_json(answer).get("message")) or said
        text = f"{address} answered HTTP {status}" + (f": {said.strip()}" if text_of(said) else "") + (
            " (wrong --protocol?)" if status == 404 else "")
        if 300 <= status < 400:
            return AgentError(HTTP, f"{address} answered a redirect (HTTP {status}), which is not followed", True,
                              is_refusal=True)
        if 400 <= status < 500 and status != 429:
            return AgentError(REJECTED, text, reached=True, final=True)
        return AgentError(HTTP, text, reached=True, is_refusal=status in (429, 503))

    # -- connections ---------------------------------------------------------------------

    async def _exchange(self, call: _Call) -> tuple[int, bytes]:
        """Gives status and body of one request; on a new connection where a kept one was stale."""
        context = self._tls.context() if self._tls else None
        if call.address.protocol == TASKS:
            sock = self._take_idle(call.address, context)
            if sock is not None:
                with contextlib.suppress(_Stale):
                    return await self._request(call, sock, context, reused=True)
                if call.resent is not None:
                    call.resent.append(True)
        # an execute agent would run a repeated request twice, so its connections are never kept
        sock = await self._connect(call.address, context, call.ends_at)
        return await self._request(call, sock, context, reused=False)

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
            _close(sock)
        return found

    def _keep_idle(self, address: Address, sock: socket.socket, context: object) -> None:
        with self._guard:
            surplus = [self._idle.pop(address)] if address in self._idle else []
            self._idle[address] = (sock, context, time.monotonic())
            if len(self._idle) > (0 if self._is_closed else MAX_IDLE_AGENT_CONNECTIONS):
                surplus.append(self._idle.pop(next(iter(self._idle))))
        for dropped, _, _ in surplus:
            _close(dropped)

    @contextlib.contextmanager
    def _in_flight(self, sock: socket.socket) -> Iterator[None]:
        """Lets close() end what waits on a connection; OSError when it was called before."""
        self._active.add(sock)
        try:
            if self._is_closed:  # looked at after the addition: close() looks at what is there after it said so
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
            raise AgentError(UNREACHABLE, f"{address} did not take a connection within {connect_s:.3g} s",
                             reached=False) from None
        except (OSError, UnicodeError) as error:
            raise AgentError(UNREACHABLE, f"{address} can't be reached: {_os_reason(error)}", reached=False) from None
        if context is None:
            return sock
        try:
            tls_sock = context.wrap_socket(sock, server_hostname=name or self._server_name or address.host,
                                           do_handshake_on_connect=False)
            sock = tls_sock  # the plain one is detached from now on
            with self._in_flight(sock):
                await TimedSocket(sock, connect_by, 0).when_ready(tls_sock.do_handshake, select.POLLIN)
            return sock
        except (OSError, ValueError) as error:
            _close(sock)
            raise self._handshake_error(address, error, connect_s) from None

    async def _open_socket(self, address: Address, connect_by: float) -> socket.socket:
        """Connect to the address, until connect_by; of a name's several to the one that answers first."""
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
        """Return a socket that connects to one result of getaddrinfo(): it can be written at the end, well or not."""
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
        """Connect to several addresses, one more every NEXT_ADDRESS_S (RFC 8305); return the first that answers.

        In the system's order; when one fails, the next is begun at once.
        """
        error = OSError("no address found")
        left = collections.deque(found)
        trying: dict[int, socket.socket] = {}
        with contextlib.ExitStack() as stack:
            poller = stack.enter_context(select.epoll())
            stack.callback(lambda: collections.deque(map(_close, trying.values()), 0))
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
        """Return what getaddrinfo() gives: at once for an IP address, while a name may take its time.

        A name leads nowhere where a node's address may not be either: DNS is not ours. OSError where nothing is left.
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
            return AgentError(TLS, f"{address} {text}", reached=False)
        if isinstance(error, socket.timeout):
            return AgentError(TIMEOUT, f"{address} did not finish the TLS handshake within {connect_s:.3g} s",
                              reached=False)
        refusal = _refusal(error)
        if refusal:
            return AgentError(TLS, f"{address} refused our client certificate ({refusal})", reached=False)
        reason = getattr(error, "reason", None) or ""
        if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
            return AgentError(TLS, f"{address} does not speak TLS on this port", reached=False)
        if "PROTOCOL_VERSION" in reason or reason == "UNSUPPORTED_PROTOCOL":
            return AgentError(TLS, f"{address} speaks no TLS 1.2 or newer", reached=False)
        says_why = isinstance(error, ssl.SSLError) and reason and not isinstance(error, ssl.SSLEOFError)
        said = reason.replace("_", " ").lower() if says_why else "it closed the connection"
        return AgentError(TLS, f"{address}: the TLS handshake failed: {said}", reached=False)

    async def _request(self, call: _Call, sock: socket.socket, context: object, reused: bool) -> tuple[int, bytes]:
        address = call.address
        timed = TimedSocket(sock, call.ends_at, call.max_bytes + MAX_HEAD_BYTES)
        keep = False
        try:
            with self._in_flight(sock):
                if not call.gate():
                    raise AgentError(UNREACHABLE, f"{address}: not sent, as it may not or is too late",
                                     reached=False, is_held=True)
                await timed.sendall(_request_bytes(call))
                plain = await _plain_answer(timed, call.max_bytes)
                status, answer, keep = plain if plain else await _any_answer(timed, call)
            keep = keep and address.protocol == TASKS
            return status, answer
        except TooBig:
            raise AgentError(PROTOCOL, f"{address} answered more than {call.max_bytes >> 10} KiB",
                             reached=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            is_late = isinstance(error, socket.timeout)  # a reading that waited has seen the alert
            refusal = _refusal(error) or (await _late_alert(timed) if timed.received == 0 and not is_late else "")
            if refusal:
                raise AgentError(TLS, f"{address} refused our client certificate ({refusal})",
                                 reached=False) from None
            if reused and timed.received == 0 and not is_late and not self._is_closed:
                raise _Stale from None
            raise self._exchange_error(address, error, timed, call.limit_s) from None
        finally:
            if keep:
                self._keep_idle(address, sock, context)
            else:
                _close(sock)

    def _exchange_error(self, address: Address, error: Exception, timed: TimedSocket, limit_s: float) -> AgentError:
        if isinstance(error, socket.timeout):
            text = "drips: no whole answer" if timed.received else "did not answer"
            return AgentError(TIMEOUT, f"{address} {text} within {limit_s:.3g} s", reached=True,
                              hold_s=self._request_s)
        if isinstance(error, (OSError, http.client.IncompleteRead)) or timed.at_end:
            when = "in the middle of its answer" if timed.received else "before it answered"
            return AgentError(UNREACHABLE, f"{address} cut the connection {when}", reached=True, hold_s=CUT_HOLD_S)
        return AgentError(PROTOCOL, f"{address} answered what is not HTTP: {type(error).__name__}", reached=True)


@functools.lru_cache(maxsize=1)
def _unverified_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _request_bytes(call: _Call) -> bytes:
    """Gives a request as it leaves: head and body in one piece."""
    host = f"[{call.address.host}]" if ":" in call.address.host else call.address.host
    head = f"{call.method} {call.path} HTTP/1.1\r\nHost: {call.host or f'{host}:{call.address.port}'}\r\n"
    if call.address.protocol != TASKS:
        head += "Connection: close\r\n"
    if call.body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(call.body)}\r\n"
    return f"{head}\r\n".encode() + (call.body or b"")


PLAIN_HEAD = re.compile(rb"HTTP/1\.1 ([2-5]\d\d) [^\r\n]*(?:\r\n[!#-9;-~]+:[^\r\n]*)+")


async def _plain_answer(timed: TimedSocket, max_bytes: int) -> tuple[int, bytes, bool] | None:
    """Reads an answer of the usual shape: one Content-Length, and no word on the connection but close.

    Gives status, body, and whether the connection can be kept. Any other shape is left unread for http.client, which
    takes 0.2 ms for each: a fifth of the time of a release.
    """
    data = b""
    while part := await timed.recv(16384):
        data += part
        head, end, body = data.partition(b"\r\n\r\n")
        if not end and len(data) < 16384:
            continue
        plain, fields = PLAIN_HEAD.fullmatch(head), head.lower()
        lengths = re.findall(rb"\ncontent-length: *(\d{1,7})(?=\r|$)", fields)
        words = re.findall(rb"\nconnection: *([^\r]*)", fields)
        if not plain or len(lengths) != 1 or fields.count(b"\ncontent-length") != 1 or set(words) - {b"close"} or (
                b"\ntransfer-encoding:" in fields) or int(lengths[0]) > max_bytes:
            break
        parts, missing = [body], int(lengths[0]) - len(body)
        while missing > 0 and (part := await timed.recv(min(missing, 65536))):
            parts.append(part)
            missing -= len(part)
        if missing > 0:
            raise http.client.IncompleteRead(body)
        if missing < 0:
            break
        return int(plain.group(1)), b"".join(parts), not words
    if not data:
        raise http.client.RemoteDisconnected("no answer")
    timed.unread, timed.at_end = data, False
    return None


async def _any_answer(timed: TimedSocket, call: _Call) -> tuple[int, bytes, bool]:
    """Reads an answer by http.client; gives status, body, and whether the connection can be kept."""
    await BLOCKS
    response = http.client.HTTPResponse(timed, method=call.method)  # type: ignore[arg-type]
    response.begin()
    # http.client takes the end of the connection for the end of a head, and of a body
    cut_in_head = timed.at_end
    answer = response.read(call.max_bytes + 1)
    if len(answer) > call.max_bytes:
        raise TooBig
    if cut_in_head or response.length:
        raise http.client.IncompleteRead(answer)
    return response.status, answer, not response.will_close and response.isclosed()


EXECUTE_PATH = "/agent/v1/tasks/execute"


def text_of(value: object) -> str:
    """Return an agent's text, "" for one that shows nothing: blanks, control characters, no text at all."""
    text = "" if value is None else str(value)
    return text if one_line(text) else ""


def _unknown_status(status: object) -> str:
    return f"gives the unknown status {one_line(to_json(status), 60)}"


def _is_of_dialect(protocol: str, status: int, answer: bytes) -> bool:
    """Say whether an answer to a ping is that of an agent of this dialect (contract section 1)."""
    try:
        envelope = parse_json(answer)
    except ValueError:
        return False
    if not isinstance(envelope, dict):
        return False
    code = envelope.get("code")
    is_code = isinstance(code, int) and not isinstance(code, bool)
    return is_code and ((status, code) == (400, 2001) if protocol == EXECUTE else status == 404 and code != 0)


# What _call gives for a 404 to a query.
UNKNOWN_TASK: dict[str, Any] = {}


def _is_readable(sock: socket.socket) -> bool:
    """Says whether an idle connection has something to say: its end, as nothing was asked."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def _refusal(error: Exception) -> str:
    """Gives the alert by which an agent refused our certificate, or ''."""
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLError) and "ALERT" in reason and reason.endswith(REFUSAL_ALERTS):
        return str(reason).split("ALERT_", 1)[1].replace("_", " ").lower()
    return ""


async def _late_alert(timed: TimedSocket) -> str:
    """Reads once more where a request failed: with TLS 1.3 the refusal comes after the handshake."""
    for _ in range(2):
        try:
            timed.ends_at = time.monotonic() + 0.5
            if not await timed.recv(1):
                return ""
        except Exception as error:  # whatever it is, only an alert is of use
            if _refusal(error):
                return _refusal(error)
    return ""


# ======================================================================================
# 11 Executor: claim, lease, and the loop that joins decision, store and agents. Uses 1 to 10.
#
#   One driver thread a claimed release alone reads and writes its rows. Conversations only talk
#   to agents and put outcomes on its queue. One lease thread renews. Persist, then send.
# ======================================================================================

# While one is at the mathematics of a TLS handshake, which leave the interpreter free, the other goes on.
TALKING_THREADS = 2


@contextlib.contextmanager
def starting_threads() -> Iterator[None]:
    """Raises ConfigError where a thread within can't be started, or gets no descriptors."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"no thread can be started ({error}): this process needs more of `ulimit -u` (TasksMax) "
                          "or `ulimit -n`") from None


class Lease:
    """A claim, and until when this process may rely on it by its own clock."""

    def __init__(self, claim: Claim, valid_until: float):
        self.claim = claim
        self.valid_until = valid_until
        self.is_lost = False

    def is_valid(self, elapsed: float) -> bool:
        """Says whether a request may leave now."""
        return not self.is_lost and elapsed < self.valid_until


class Tick(NamedTuple):
    """What run_once did: releases that it worked on as they are now, how many others hold, whether stop() ended it.

    vanished: ids of those that are no longer in the database.
    """
    worked_on: list[Release]
    in_other_hands: int
    was_stopped: bool
    vanished: Sequence[int] = ()


class Executor:
    """Claims releases and drives each to its end, or in a tick as far as it goes."""

    def __init__(self, settings: Settings, store: Store, agents: AgentClient):
        self.settings = settings
        self.store = store
        self.agents = agents
        self.clock = store.clock
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.policy = Policy(settings.agent_retries, settings.node_deadline_sec, settings.agent_request_timeout_sec,
                             settings.release_executor_interval_sec, settings.agent_connect_timeout_sec)
        self.stopping = threading.Event()
        # When run_loop() last looked for work and could, for people.
        self.looked_at: float | None = None
        # Requests were cut by ourselves: what they bring says nothing of an agent.
        self.has_cut = False
        self._wake = threading.Event()
        self._guard = threading.Lock()
        self._drivers: dict[int, Driver] = {}
        self._conversations = [Conversations() for _ in range(TALKING_THREADS)]
        self._in_turn = itertools.cycle(self._conversations)
        # Drivers that found fewer slots than they may have: told when one is free.
        self._short_of_slots: dict[Driver, None] = {}
        self._lease_thread: threading.Thread | None = None
        self._renewed_at = self.clock.elapsed()
        self._closed = threading.Event()
        if settings.release_executor_enabled:
            store.database.metrics.put("releasectl_last_tick_timestamp_seconds", 0.0)

    # -- what others call ----------------------------------------------------------------

    def run_once(self, drain: bool = False, beat: Callable[[], None] = lambda: None) -> Tick:
        """One tick (contract section 4); with drain one after the other until nothing is left to do.

        beat is called several times a second meanwhile. Raises DatabaseError, and ConfigError when
        there is work and no way to call an agent.
        """
        worked_on: dict[int, None] = {}
        failure: AppError | None
        running: list[Driver] = []
        said = ""
        while True:
            had_running, taken, failure = bool(running), 0, None
            started: list[Driver] = []
            try:
                taken = self._counted_look(started, is_tick=not drain)
                said = ""
            except AppError as error:
                if not had_running and not started:
                    raise
                said = self._say(error, said)
                failure = error
            running += started
            worked_on.update(dict.fromkeys(driver.lease.claim.release_id for driver in started))
            # a drain looks again meanwhile: ours may wait for a node of one whose owner died
            look_at = self.clock.elapsed() + (self.settings.release_executor_interval_sec if drain else float("inf"))
            while ((running := [driver for driver in running if driver.is_running()]) and not self.stopping.is_set()
                   and self.clock.elapsed() < look_at):
                running[0].join(0.2)
                self.store.database.metrics.put("releasectl_last_tick_timestamp_seconds", self.clock.wall())
                beat()
            if self.stopping.is_set():
                self.close()
            # what ran during the look may have ended since, and made way for a release that it did not find
            if not drain or not (started or had_running) or self.stopping.is_set():
                if failure is not None and not drain:
                    raise failure
                found = {release_id: self.store.find_release(release_id) for release_id in worked_on}
                return Tick([release for release in found.values() if release], taken, self.stopping.is_set(),
                            tuple(release_id for release_id, release in found.items() if release is None))

    @staticmethod
    def _say(error: AppError, said: str) -> str:
        """Logs an error of a look for work when it is another one than the last; gives it."""
        if str(error) != said:
            log.error("executor: %s; trying again", error)
        return str(error)

    def run_loop(self, beat: Callable[[str], None] = lambda _: None) -> None:
        """Looks for work every interval, and at once when nudged, until stop(). Survives the database.

        beat is called at each turn, with a sentence on what it is at, as long as no thread of ours hangs.
        """
        said = ""
        while not self.stopping.is_set():
            self._wake.clear()
            try:
                self._counted_look([], is_tick=False)
                self.looked_at = self.clock.wall()
                said = ""
            except AppError as error:
                said = self._say(error, said)
            except Exception:  # the edge of a tick: the loop goes on
                log.exception("executor: a look for work failed")
            hung = self.hung()
            if hung:
                log.error("executor: %s", hung)
            else:
                beat(said or self.at_work())
            self._wake.wait(self.settings.release_executor_interval_sec)

    def at_work(self) -> str:
        """Gives a sentence on what is being done now."""
        with self._guard:
            ids = sorted(self._drivers)
        return f"at work on release {', '.join(map(str, ids))}" if ids else "nothing to do"

    def hung(self) -> str:
        """Gives a sentence on the thread that hangs; "" when all turn.

        The lease thread would keep the release of a driver that hangs, and no driver goes on without it.
        """
        late = self.clock.elapsed() - HUNG_AFTER_S
        for driver in self._active_drivers():
            if driver.turned_at < late - self.settings.release_executor_interval_sec:
                return f"the driver of release {driver.lease.claim.release_id} hangs"
        if any(conversations.is_hung(time.monotonic() - HUNG_AFTER_S) for conversations in self._conversations):
            return "a thread that talks to agents hangs"
        if self._lease_thread and self._renewed_at < late - self.settings.claim_ttl_sec / 3:
            return "the lease thread hangs"
        return ""

    def nudge(self) -> None:
        """Says that something changed: looks for work now, and each driver at its release."""
        self._wake.set()
        for driver in self._active_drivers():
            driver.results.put(None)

    def is_busy(self) -> bool:
        """Says whether a release is driven now."""
        return bool(self._drivers)

    def stop(self) -> None:
        """Asks for a clean end, from any thread; returns at once. Not in a signal handler: it takes locks."""
        self.stopping.set()
        self.store.database.end_within(STOP_GRACE_S)
        self._wake.set()

    def close(self) -> None:
        """Ends cleanly: requests in flight get STOP_GRACE_S, their answers are written, claims let go."""
        self.stop()
        self.nudge()
        give_up_at = time.monotonic() + STOP_GRACE_S
        for driver in self._active_drivers():
            driver.join(max(give_up_at - time.monotonic(), 0.0))
        self.has_cut = True
        self.agents.close()
        for driver in self._active_drivers():
            driver.join(STOP_GRACE_S)
        self._closed.set()
        if self._lease_thread:
            self._lease_thread.join(STOP_GRACE_S)
        for conversations in self._conversations:
            conversations.close()

    # -- claims --------------------------------------------------------------------------

    def _counted_look(self, started: list[Driver], is_tick: bool) -> int:
        metrics, outcome = self.store.database.metrics, ERROR
        try:
            taken = self._look(started, is_tick)
            outcome = WORKED if started or self._active_drivers() else BUSY if taken else IDLE
            metrics.put("releasectl_last_tick_timestamp_seconds", self.clock.wall())
            return taken
        finally:
            metrics.count("releasectl_ticks_total", outcome)

    def _look(self, started: list[Driver], is_tick: bool) -> int:
        """Claims what is runnable and starts a driver for each, also added to started; gives how many others hold."""
        while True:
            mine = {driver.lease.claim.release_id for driver in self._active_drivers()}
            free, taken = self.store.look()
            new = [release_id for release_id in free if release_id not in mine]
            if new:
                self.agents.prepare()  # raises before anything is claimed that could not be dispatched
                self._start_threads()
            # one that could not be claimed after all may have let others go first: it has a later version now
            if self._claim_all(new, taken, started, is_tick) or self.stopping.is_set():
                return len([release_id for release_id in taken if release_id not in mine])

    def _claim_all(self, release_ids: Iterable[int], taken: list[int], started: list[Driver], is_tick: bool) -> bool:
        """Claim releases and start their drivers; say whether none turned out to have to wait."""
        is_settled = True
        for release_id in release_ids:
            if self.stopping.is_set():
                break
            asked_at = self.clock.elapsed()
            try:
                claim = self.store.claim(release_id, self.owner, self.settings.claim_ttl_sec)
            except StateMoved:  # another was quicker
                taken.append(release_id)
                continue
            if claim is not None:
                # started at once: an error at the next claim must not leave a claim without its driver
                started.append(self._drive(Lease(claim, asked_at + self.settings.claim_ttl_sec), is_tick))
            is_settled &= claim is not None
        return is_settled

    def _drive(self, lease: Lease, is_tick: bool) -> Driver:
        driver = Driver(self, lease, is_tick)
        with self._guard:
            self._drivers[lease.claim.release_id] = driver
        try:
            with starting_threads():
                driver.start()
        except ConfigError:
            with self._guard:  # not ended(): that would make the loop look again at once
                self._drivers.pop(lease.claim.release_id, None)
            self.store.let_go(lease.claim)
            raise
        return driver

    def _start_threads(self) -> None:
        """Starts what all drivers need, where it does not run; ConfigError when there is no room for it."""
        with starting_threads():
            for conversations in self._conversations:
                conversations.start()
            if self._lease_thread is None:
                self._renewed_at = self.clock.elapsed()
                thread = threading.Thread(target=self._keep_leases, name="lease", daemon=True)
                thread.start()
                self._lease_thread = thread

    def _keep_leases(self) -> None:
        """Renews every claim three times in its life, apart from the work."""
        while not self._closed.wait(self.settings.claim_ttl_sec / 3):
            self._renewed_at = self.clock.elapsed()
            for driver in self._active_drivers():
                self._renew(driver.lease)
                self._renewed_at = self.clock.elapsed()

    def _renew(self, lease: Lease) -> None:
        asked_at = self.clock.elapsed()
        try:
            if self.store.renew(lease.claim, self.settings.claim_ttl_sec):
                lease.valid_until = asked_at + self.settings.claim_ttl_sec
            else:
                lease.is_lost = True
        except DatabaseError as error:
            log.error("%s: its claim could not be renewed: %s", lease.claim, error, extra=about(lease.claim))
        except Exception:  # the lease thread must outlive everything
            log.exception("%s: its claim could not be renewed", lease.claim, extra=about(lease.claim))

    def _active_drivers(self) -> list[Driver]:
        with self._guard:
            return list(self._drivers.values())

    # -- what drivers call ---------------------------------------------------------------

    def ended(self, driver: Driver) -> None:
        """Forgets a driver at its end; the next release of its target may go now."""
        with self._guard:
            self._drivers.pop(driver.lease.claim.release_id, None)
        self.give_back(driver, driver.slots)
        self._wake.set()

    def take_slots(self, driver: Driver) -> int:
        """Gives how many more requests a driver may send: AGENT_CONCURRENCY is for all, in equal shares.

        They are taken before what is sent is written down: a dispatch that had to queue would be late.
        """
        with self._guard:
            limit, held = self.settings.agent_concurrency, sum(d.slots for d in self._drivers.values())
            may_have = max(1, limit // max(1, len(self._drivers))) - driver.slots
            count = max(0, min(may_have, limit - held))
            driver.slots += count
            if count < may_have:
                self._short_of_slots[driver] = None
            return count

    def give_back(self, driver: Driver, count: int, had_enough: bool = False) -> None:
        """Takes slots back from a driver, and tells those that found too few."""
        if not count:
            return
        with self._guard:
            driver.slots -= count
            if had_enough:
                self._short_of_slots.pop(driver, None)
            told, self._short_of_slots = self._short_of_slots, {}
        for other in told:
            other.results.put(None)

    def submit(self, work: Callable[[], Coroutine[Wait, None, None]]) -> None:
        """Begins a conversation with an agent."""
        next(self._in_turn).submit(work())


def outcome_of(node_id: int, op: str, answer: Answer | AgentError) -> Outcome:
    """Gives what an agent's answer or failure means to the decision."""
    if isinstance(answer, Answer):
        return Outcome(node_id, op, answer.state, answer.task_id, message=answer.message, detail=answer.message,
                       applied=answer.applied)
    if answer.is_held:
        return Outcome(node_id, op, HELD)
    result = FAILED if answer.final else UNSENT if not answer.reached else LOST if answer.hold_s else UNCLEAR
    return Outcome(node_id, op, result, "", answer.kind, answer.message, answer.detail, answer.hold_s,
                   is_refusal=answer.is_refusal)


class Driver:
    """Drives one claimed release, in a thread of its own: read, decide, commit, send, wait."""

    def __init__(self, executor: Executor, lease: Lease, is_tick: bool):
        self.lease = lease
        # not SimpleQueue: on Python 3.9 its get() may wait for ever when the timeout is very short
        self.results: queue.Queue[Outcome | None] = queue.Queue()
        self._executor = executor
        self._store = executor.store
        self._policy = executor.policy
        self._is_tick = is_tick
        self._nodes = Roster()
        self._is_stale = True
        # What the row said when it was last read or written by us: else somebody turned it.
        self._seen_at = ""
        self._freeze = NO_FREEZE
        # Which state of the database the nodes were read from.
        self._generation = executor.store.generation
        # Nothing may be dispatched, as far as this driver knows: paused, cancelling, frozen.
        self._is_halted = False
        self._moved = 0
        self._broken = ""
        self._payload: dict[str, Any] = {}
        self._strategy = NO_STRATEGY
        self._in_flight = 0
        # Of AGENT_CONCURRENCY: those in flight, and within a turn those that may be sent.
        self.slots = 0
        self.turned_at = self._news_at = self._spoke_at = self._decided_at = self._now().elapsed
        self._said = ""
        self._unclear: tuple[Release, Decision] | None = None
        self._thread = threading.Thread(target=self._run, name=f"release-{lease.claim.release_id}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits for the thread's end, for so long."""
        self._thread.join(timeout_s)

    def is_running(self) -> bool:
        """Says whether the thread has not come to its end."""
        return self._thread.is_alive()

    def _now(self) -> Moment:
        return self._store.moment()

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
            self._executor.ended(self)

    def step(self) -> float | None:
        """Takes one turn, and lets go after the last; gives how many seconds to wait, None at the end."""
        claim = self.lease.claim
        self.turned_at = self._now().elapsed
        try:
            wait_s = self.turn()
            if wait_s is None and not self.lease.is_lost:
                self._store.let_go(claim)
            return wait_s
        except ClaimLost as error:
            log.warning("%s: let go, %s", claim, error, extra=about(claim))
        except DatabaseError as error:
            log.error("%s: let go without a word to the database: %s", claim, error, extra=about(claim))
        except AppError as error:
            log.error("%s: let go: %s", claim, error, extra=about(claim))
        except Exception:  # the edge of a driver: the release goes on when the claim has run out
            log.exception("%s: its driver failed", claim, extra=about(claim))
        return None

    def turn(self) -> float | None:
        """Read, decide, commit, send; gives how many seconds to wait for outcomes, None at the end."""
        try:
            release = self._read()
            now = self._now()
            decision = self._decide(release, now)
            is_news = decision.changes_more_than_words(release)
            if is_news or self._is_due_to_speak(release, decision, now):
                self._commit(release, decision, now)
            if is_news:
                self._news_at = now.elapsed
            if decision.status in TERMINAL:
                self.lease.is_lost = True  # the commit handed the claim back
                return None
            self._send(release, decision, now)
            if self._may_leave(decision, now):
                if not is_news and decision.status_reason != release.status_reason:
                    self._commit(release, decision, now)  # what is true while nobody works on it
                return None
            if self.slots <= self._in_flight:
                return self._policy.interval_s
            return min(max(decision.wake_at - self._now().elapsed, 0.0), self._policy.interval_s)
        except StateMoved as error:
            log.info("%s: read again, as %s", self.lease.claim, error, extra=about(self.lease.claim))
            self._is_stale, self._unclear = True, None  # rolled back for certain
            self._moved += 1
            return 0.0 if self._moved == 1 else min(0.01 * 2.0**min(self._moved, 10), self._policy.interval_s)
        except DatabaseError as error:
            # what agents said stays in memory, and is written when the database is back
            is_over = self._is_tick and not self.lease.is_valid(self._now().elapsed)  # others may go on then
            if self.lease.is_lost or self._executor.stopping.is_set() or is_over:
                raise
            self._say(str(error))
            self._is_stale = True
            return min(self._policy.interval_s, 1.0)
        finally:
            self._executor.give_back(self, self.slots - self._in_flight, had_enough=True)

    def _is_due_to_speak(self, release: Release, decision: Decision, now: Moment) -> bool:
        """Says whether a new sentence alone is worth a commit: the last one is an interval old."""
        return (decision.status_reason != release.status_reason
                and now.elapsed >= self._spoke_at + max(self._policy.interval_s, 1.0))

    def _say(self, error: str) -> None:
        """Logs an error of the database when it is another one than the last."""
        if error != self._said:
            log.error("%s: %s; trying again", self.lease.claim, error, extra=about(self.lease.claim))
        self._said = error

    def _read(self) -> Release:
        """Gives the release as it stands; the nodes too when what is known of them may be old."""
        if self._unclear is not None:
            self._settle(*self._unclear)
        if not self._is_stale:
            release = self._store.claimed_release(self.lease.claim)
            if release.updated_at == self._seen_at and self._store.generation == self._generation:
                return release
            # a person turned it, who may have accepted failures too
        release, rows = self._store.claimed_release_with_nodes(self.lease.claim)
        holds, moved_s = self._store.holds(release.id), self._store.obstacles(release.id).moved_s
        self._broken = ""
        try:
            self._payload = parse_payload(parse_json(release.payload))
            self._strategy = parse_strategy(parse_json(release.strategy))
            self._policy = self._executor.policy.under(self._strategy)
            refuse_dropping_sites(self._payload, (row for row in rows if row.status != SUCCESS))
        except (ValueError, AppError) as error:
            self._broken = f"payload or strategy can't be used: {one_line(error, 200)}"
        now, nodes = self._now(), []
        went_back, self._generation = self._store.generation != self._generation, self._store.generation
        for row in rows:
            known = self._nodes.get(row.node_id)
            if known is None or went_back or (known.status, known.attempts) != (row.status, row.attempts):
                nodes.append(self._adopt(row, known, now, holds, max(0.0, self._policy.hold_s - moved_s)))
            else:
                nodes.append(known._replace(accepted=row.accepted, last_version=row.last_version))
        self._nodes = Roster(nodes)
        self._is_stale, self._seen_at = False, release.updated_at
        return release

    def _adopt(self, row: ReleaseNode, known: ReleaseNode | None, now: Moment, holds: Sequence[Hold],
               quiet_s: float) -> ReleaseNode:
        """Return a node as its row says, asked before it is sent anything; a request of ours under way still is."""
        node = adopt(row, now, self._policy, holds, quiet_s)
        if known is None or not known.in_flight:
            return node
        # its outcome is to come, and until then nobody else may ask
        return node._replace(in_flight=True) if node.status in OPEN else node

    def _decide(self, release: Release, now: Moment) -> Decision:
        busy: frozenset[Endpoint] = frozenset()
        asks_first = False
        if release.status == RUNNING and (self._nodes.of[RUNNING] or self._nodes.of[PENDING]):
            busy, self._freeze, moved_s = self._store.obstacles(release.id)
            if moved_s < self._policy.hold_s:
                # one may be under way of which the database that is there now does not know
                busy |= {n.endpoint for n in self._nodes.of[PENDING].values() if n.agent_protocol == EXECUTE}
            # a release from before that may have been dispatched there (an hour: for clocks that differ)
            asks_first = moved_s < now.wall - epoch_or(release.created_at, now.wall) + 3600
        self._is_halted = release.status != RUNNING or self._freeze.frozen
        passed_s = now.elapsed - self._decided_at
        if passed_s > self._executor.settings.claim_ttl_sec:  # suspended: what was on and off meanwhile it did not see
            passed_s = held_s(self._store.holds(release.id), now.wall - passed_s, now.wall)
        elif not self._is_halted:
            passed_s = 0.0
        for node in kept_from_dispatch(self._nodes, passed_s) if passed_s else ():
            self._nodes.put(node)
        self._decided_at = now.elapsed
        return decide(release, self._nodes, now, self._policy, self._strategy, self._take_slots(), busy, self._broken,
                      self._freeze, asks_first)

    def _take_slots(self) -> int:
        """Gives how many requests may leave now; what is not used is given back at the end of the turn."""
        if self._executor.stopping.is_set() or not self.lease.is_valid(self._executor.clock.elapsed()):
            return 0
        return self._executor.take_slots(self)

    def _commit(self, release: Release, decision: Decision, now: Moment) -> None:
        self._unclear = release, decision
        try:
            self._store.commit(self.lease.claim, release, decision, now, self._executor.owner)
        except UnstorableValue as error:
            log.error("%s: %s; written in ASCII instead", self.lease.claim, error, extra=about(self.lease.claim))
            decision = decision.in_ascii()
            self._unclear = release, decision
            self._store.commit(self.lease.claim, release, decision, now, self._executor.owner)
        self._unclear = None
        self._seen_at = now.text
        self._moved = 0
        self._said = ""
        self._spoke_at = now.elapsed
        self._nodes = decision.nodes

    def _settle(self, release: Release, decision: Decision) -> None:
        """Finds out whether a commit that ended in an error took place, before anything is repeated.

        Where it did, its requests did not leave: they are due now, as repetitions.
        """
        if self._store.was_written(self.lease.claim, decision):
            self._store.tell(release, decision, self._executor.owner)
            for change in decision.changes:
                self._nodes.put(change.after._replace(in_flight=False))
            if decision.status in TERMINAL:
                self.lease.is_lost = True
                raise ClaimLost("the release is at its end: the commit that seemed to fail took place")
        self._unclear = None

    def _send(self, release: Release, decision: Decision, now: Moment) -> None:
        for op, node in decision.sends:
            self._nodes.put(node)
            self._in_flight += 1
            task = AgentTask(node.task_id, release.type, release.version, self._payload)
            self._executor.submit(functools.partial(self._work, op, node, task, now))

    def may_dispatch(self, written_at: Moment) -> bool:
        """Says whether a dispatch may leave this instant: the claim holds, it is not too late, nobody paused.

        Asked after connecting, just before the first byte. A take-over reckons with a
        request that left soon after it was written down, and waits for that one only.
        """
        elapsed = self._executor.clock.elapsed()
        is_soon = elapsed <= written_at.elapsed + self._policy.leave_within_s
        return is_soon and not self._is_halted and self.lease.is_valid(elapsed)

    async def _work(self, op: str, node: ReleaseNode, task: AgentTask, written_at: Moment) -> None:
        """A conversation: one request, one outcome, whatever happens."""
        try:
            outcome = await self._ask(op, node, task, written_at)
        except Exception:  # the edge of a conversation: a node must never be forgotten
            claim = self.lease.claim
            log.exception("%s: node %s: %s failed within releasectl", claim, node.name, op,
                          extra=about(claim, node=node.name))
            outcome = Outcome(node.node_id, op, LOST, "", PROTOCOL, "releasectl itself failed: see its log",
                              hold_s=self._policy.request_timeout_s)
        self.results.put(outcome)

    async def _ask(self, op: str, node: ReleaseNode, task: AgentTask, written_at: Moment) -> Outcome:
        address = Address(node.main_ip, node.agent_port, node.agent_protocol)
        within_s = node.deadline - written_at.elapsed if node.status == RUNNING else float("inf")
        agents = self._executor.agents
        try:
            if op == PROBE:
                return await self._probe(node, within_s)
            if op == DISPATCH:
                gate = functools.partial(self.may_dispatch, written_at)
                answer = await agents.dispatching(address, task, within_s, gate)
                if answer == Answer(ACCEPTED, task.id):
                    answer = await self._look_at_once(address, answer, within_s)
                return outcome_of(node.node_id, op, answer)
            return outcome_of(node.node_id, op, await agents.querying(address, task.id, within_s))
        except AgentError as error:
            return outcome_of(node.node_id, op, error)
        except ConfigError as error:  # the certificate went away under us
            return Outcome(node.node_id, op, UNSENT, "", TLS, error.message)

    async def _probe(self, node: ReleaseNode, within_s: float) -> Outcome:
        verify = self._strategy.verify or Verify("http://{main_ip}/")  # it was there when the probe was decided on
        since = time.monotonic()
        said = await self._executor.agents.probing(node.main_ip, verify, verify.url_for(node),
                                                   min(verify.timeout_s, max(within_s, 0.0)))
        self._executor.agents.metrics.count_request(PROBE, VERIFY if said else SUCCESS, since)
        return Outcome(node.node_id, PROBE, UNCLEAR if said else SUCCESS, "", VERIFY if said else "", said, said)

    async def _look_at_once(self, address: Address, accepted: Answer, within_s: float) -> Answer:
        """Asks for a task just dispatched, on the same connection: a quick one is at its end by then.

        That saves it a turn of the driver. Whatever else is said now, a poll will hear again.
        """
        try:
            answer = await self._executor.agents.querying(address, accepted.task_id, min(within_s, FIRST_LOOK_S))
        except AgentError as error:
            if error.kind == AGENT_FAILED:
                raise
            return accepted
        return answer if answer.state == SUCCESS else accepted

    def collect(self, wait_s: float) -> None:
        """Waits for an outcome or a nudge, then folds in all that came.

        With many requests in flight it gathers a little: a turn for each outcome would cost more
        than the requests themselves, and fill the disk with commits. Half of the slots go on meanwhile.
        """
        with contextlib.suppress(queue.Empty):
            outcome = self.results.get(timeout=wait_s)
            enough, gather_until = self._in_flight // 2, time.monotonic() + min(GATHER_S, wait_s)
            while True:
                if outcome is not None:
                    self._fold(outcome)
                left_s = gather_until - time.monotonic() if self._in_flight > enough else 0.0
                outcome = self.results.get(timeout=max(left_s, 0.0))

    def _fold(self, outcome: Outcome) -> None:
        self._in_flight -= 1
        self._executor.give_back(self, 1)
        node = self._nodes.get(outcome.node_id)
        if self._executor.has_cut or node is None:  # its row was deleted by hand
            return
        now = self._now()
        if outcome.result != WORKING:
            self._news_at = now.elapsed
        if outcome.error_kind and outcome.result != FAILED:
            claim, name = self.lease.claim, node.name
            log.info("%s: node %s: %s failed, %s", claim, name, outcome.op, outcome.message,
                     extra=about(claim, node=name))
        self._nodes.put(observe(node, outcome, now, self._policy))

    def _may_leave(self, decision: Decision, now: Moment) -> bool:
        """Says whether the claim can be handed back: nothing in flight, and no reason to stay."""
        if self._in_flight:
            return False
        if self._executor.stopping.is_set():
            return True
        waits = decision.status == PAUSED or (decision.status == RUNNING and self._freeze.frozen)
        if waits and not self._nodes.of[RUNNING]:
            return True
        if not self._is_tick or now.elapsed - self._news_at < self._policy.interval_s:
            return False
        # a row of tries or probes is not torn apart: the next tick would begin it anew
        return not any((n.errors or n.passes) and n.due <= now.elapsed + BACKOFF_MAX_S for n in self._nodes)


# ======================================================================================
# 12 Shapes: the JSON of section 5 of the contract, for the API and the command line, and
#    its schemas. Pure; uses 1, 2, 5 to 7 and the rows of 8.
# ======================================================================================

def release_json(release: Release) -> dict[str, Any]:
    """Gives RELEASE of the contract."""
    return {
        "id": release.id, "type": release.type, "target": release.target, "version": release.version,
        "status": release.status, "statusReason": release.status_reason, "reason": release.reason,
        "totalNodes": release.total_nodes, "successNodes": release.success_nodes,
        "failedNodes": release.failed_nodes, "skippedNodes": release.skipped_nodes,
        "currentBatch": release.current_batch, "errorMsg": release.error_msg,
        "strategy": _stored_json(release.strategy), "retryOf": release.retry_of,
        "rollbackOf": release.rollback_of, "createdAt": release.created_at, "startedAt": release.started_at,
        "finishedAt": release.finished_at, "updatedAt": release.updated_at}


def _stored_json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return {}  # written by hand; the executor refuses to run it


def release_node_json(node: ReleaseNode) -> dict[str, Any]:
    """Gives NODE of the contract."""
    return {"nodeId": node.node_id, "nodeName": node.name, "mainIp": node.main_ip, "status": node.status,
            "taskId": node.task_id, "attempts": node.attempts, "errorKind": node.error_kind,
            "errorMsg": node.error_msg, "startedAt": node.started_at, "finishedAt": node.finished_at}


def node_json(node: Node) -> dict[str, Any]:
    """Gives a node as /api/v1/nodes shows it."""
    return {"id": node.id, "name": node.name, "mainIp": node.main_ip, "agentPort": node.agent_port,
            "agentProtocol": node.agent_protocol, "labels": _stored_json(node.labels),
            "enabled": bool(node.enabled), "status": node.status, "createdAt": node.created_at,
            "updatedAt": node.updated_at}


def listed_node_json(node: Node, last_release: tuple[int, str] | None) -> dict[str, Any]:
    """Gives a node with the newest release that names it, and what it is there."""
    last = {"releaseId": last_release[0], "status": last_release[1]} if last_release else None
    return {**node_json(node), "lastRelease": last}


def event_json(event: Event) -> dict[str, Any]:
    """Gives one row of a release's history."""
    return {"id": event.id, "releaseId": event.release_id, "nodeId": event.node_id, "nodeName": event.node_name,
            "at": event.at, "actor": event.actor, "event": event.event, "fromStatus": event.from_status,
            "toStatus": event.to_status, "detail": event.detail}


def open_releases_json(releases: Sequence[tuple[Release, int]]) -> dict[str, Any]:
    """Gives the releases that are not at their end, each with its number of batches, and who works on them."""
    return {"releases": [{**release_json(release), "batches": batches} for release, batches in releases],
            "claims": [{"releaseId": release.id, "owner": release.claim_owner, "expiresAt": release.claim_expires_at}
                       for release, _ in releases if release.claim_expires_at]}


def page_json(page: Page, item_json: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Gives a page of a list."""
    return {"items": [item_json(item) for item in page.items], "total": page.total, "page": page.number,
            "pageSize": page.size}


def created_json(made: Made) -> dict[str, Any]:
    """Return the answer to the creation of a release."""
    release = made.release
    return {"releaseId": release.id, "version": release.version, "totalNodes": release.total_nodes,
            "batches": [{"batch": number, "nodeIds": list(ids)} for number, ids in enumerate(made.batches, 1)]}


def created_again_json(made: Made) -> dict[str, Any]:
    """Return the answer to a retry or rollback: that to a creation, and who is left out."""
    return {**created_json(made), "leftOut": left_out_json(made.left_out)}


def left_out_json(left_out: Iterable[LeftOut]) -> list[dict[str, Any]]:
    """Return the nodes that were meant and do not get a release."""
    return [{"nodeId": one.node_id, "nodeName": one.name, "why": one.why} for one in left_out]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return what a release would do: the answer to dryRun."""
    payload_of = {"releaseId": plan.payload_of[0], "version": plan.payload_of[1]} if plan.payload_of else None
    return {"version": plan.version, "totalNodes": sum(map(len, plan.batches)),
            "batches": [{"batch": number, "nodeIds": ids, "maxFailed": most}
                        for number, (ids, most) in enumerate(zip(plan.batches, plan.max_failed), 1)],
            "maxFailedTotal": plan.max_failed_total, "maxParallel": plan.strategy.max_parallel,
            "leftOut": left_out_json(plan.left_out), "emptied": list(plan.emptied), "payloadOf": payload_of}


def freeze_json(freeze: Freeze) -> dict[str, Any]:
    """Gives the switch that lets nothing new be dispatched."""
    return {"frozen": freeze.frozen, "reason": freeze.reason, "actor": freeze.actor, "at": freeze.at}


def release_with_nodes_json(release: Release, nodes: Sequence[ReleaseNode]) -> dict[str, Any]:
    """Gives a release with its nodes by batch."""
    batches: dict[int, list[dict[str, Any]]] = {}
    for node in nodes:
        batches.setdefault(node.batch, []).append(release_node_json(node))
    return {"release": release_json(release),
            "batches": [{"batch": number, "nodes": members} for number, members in sorted(batches.items())]}


# Field of a node in JSON: column, how it is read, schema for /openapi.json.
NODE_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "name": ("name", parse_name, {"type": "string", "minLength": 1, "maxLength": 100, "format": "line",
                                  "description": "printable, single spaces within"}),
    "mainIp": ("main_ip", parse_address, {"type": "string", "minLength": 1, "maxLength": 253, "format": "address",
                                          "description": "IP address or host name"}),
    # to JSON 8443.0 is the same number as 8443
    "agentPort": ("agent_port", lambda v: parse_port(int(v) if isinstance(v, float) and v.is_integer() else v),
                  {"type": "integer", "minimum": 1, "maximum": 65535}),
    "agentProtocol": ("agent_protocol", lambda v: parse_choice("agentProtocol", v, PROTOCOLS),
                      {"type": "string", "enum": list(PROTOCOLS)}),
    "labels": ("labels", parse_labels, {
        "type": "object", "maxProperties": MAX_LABELS,
        "propertyNames": {"type": "string", "minLength": 1, "maxLength": MAX_LABEL_KEY_CHARS, "format": "line"},
        "additionalProperties": {"type": "string", "maxLength": MAX_LABEL_CHARS, "format": "line"}}),
    "enabled": ("enabled", lambda v: int(parse_flag("enabled", v)), {"type": "boolean"}),
    "status": ("status", lambda v: parse_choice("status", v, NODE_STATUSES),
               {"type": "string", "enum": list(NODE_STATUSES)}),
}


def parse_node_fields(body: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    """Gives the columns of a node from its JSON; AppError 2001 for what is missing, 2003 for the rest."""
    known_keys(body, list(NODE_FIELDS))
    for name in required:
        if name not in body:
            raise AppError(2001, f"{name} is missing")
    return {NODE_FIELDS[name][0]: NODE_FIELDS[name][1](value) for name, value in body.items()}


def parse_release_request(body: Mapping[str, Any]) -> ReleaseRequest:
    """Gives what a release is asked to be from its JSON; AppError 2003. The Store reads the strategy."""
    known_keys(body, ("target", "reason", "payload", "strategy", "nodeIds", "labels", "dryRun", "version"))
    if "nodeIds" in body and "labels" in body:
        raise AppError(2003, "nodeIds and labels exclude each other: name one of them")
    if not isinstance(body.get("strategy", {}), dict):
        raise AppError(2003, "strategy must be a JSON object")
    return ReleaseRequest(
        parse_target(body.get("target", "cdn")), parse_text("reason", body.get("reason", "")),
        parse_payload(body.get("payload", {})), strategy=body.get("strategy", {}),
        node_ids=parse_node_ids(body["nodeIds"]) if "nodeIds" in body else None,
        labels=parse_json(parse_labels(body["labels"])) if "labels" in body else None,
        version=parse_version("version", body["version"]) if "version" in body else None)


# The schemas, for /openapi.json.

_TIME = {"type": ["string", "null"], "format": "date-time"}
_ID = {"type": "integer", "minimum": 1}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_REASON = {"type": "string", "maxLength": 500}


def _object(properties: Mapping[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False,
            "required": list(properties if required is None else required)}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list_of(item: str, paged: bool = True) -> dict[str, Any]:
    page = {"total": _COUNT, "page": _ID, "pageSize": _ID} if paged else {}
    return _object({"items": {"type": "array", "items": _ref(item)}, **page})


def openapi_schemas() -> dict[str, Any]:
    """Gives the shapes of section 5 of the contract as JSON Schema."""
    node = {name: schema for name, (_, _, schema) in NODE_FIELDS.items()}
    batch = {"batch": _ID}
    left_out = {"type": "array", "items": _object({"nodeId": _ID, "nodeName": _TEXT, "why": _TEXT})}
    created = {"releaseId": _ID, "version": _ID, "totalNodes": _COUNT, "batches": {"type": "array", "items": _object({
        **batch, "nodeIds": {"type": "array", "items": _ID}})}}
    again = {"reason": _REASON, "overNewer": {"type": "boolean"}, "dryRun": {"type": "boolean"}}
    release = {
        "id": _ID, "type": _TEXT, "target": _TEXT, "version": _ID,
        "status": {"type": "string", "enum": list(RELEASE_STATUSES)}, "statusReason": _TEXT, "reason": _TEXT,
        "totalNodes": _COUNT, "successNodes": _COUNT, "failedNodes": _COUNT, "skippedNodes": _COUNT,
        "currentBatch": _COUNT, "errorMsg": _TEXT, "strategy": {"type": "object"},
        "retryOf": {"type": ["integer", "null"]}, "rollbackOf": {"type": ["integer", "null"]},
        "createdAt": _TIME, "startedAt": _TIME, "finishedAt": _TIME, "updatedAt": _TIME}
    return {
        "Release": _object(release),
        "ReleaseNode": _object({
            "nodeId": _ID, "nodeName": _TEXT, "mainIp": _TEXT,
            "status": {"type": "string", "enum": [PENDING, RUNNING, SUCCESS, FAILED, SKIPPED]}, "taskId": _TEXT,
            "attempts": _COUNT, "errorKind": _TEXT, "errorMsg": _TEXT, "startedAt": _TIME, "finishedAt": _TIME}),
        "ReleaseWithNodes": _object({
            "release": _ref("Release"),
            "batches": {"type": "array", "items": _object({
                **batch, "nodes": {"type": "array", "items": _ref("ReleaseNode")}})}}, required=["release"]),
        "ReleaseList": _list_of("Release"),
        "Created": _object(created),
        "CreatedAgain": _object({**created, "leftOut": left_out}),
        "Event": _object({
            "id": _ID, "releaseId": _ID, "nodeId": {"type": ["integer", "null"]}, "nodeName": _TEXT, "at": _TIME,
            "actor": _TEXT, "event": _TEXT, "fromStatus": _TEXT, "toStatus": _TEXT, "detail": _TEXT}),
        "EventList": _list_of("Event", paged=False),
        "Node": _object({"id": _ID, **node, "createdAt": _TIME, "updatedAt": _TIME}),
        "ListedNode": _object({
            "id": _ID, **node, "createdAt": _TIME, "updatedAt": _TIME,
            "lastRelease": {"type": ["object", "null"], "properties": {"releaseId": _ID, "status": _TEXT}}},
            required=["id", *node, "createdAt", "updatedAt"]),
        "NodeList": _list_of("ListedNode"),
        "NewNode": _object(node, required=["name", "mainIp"]),
        "NodeChange": _object(node, required=[]),
        "Plan": _object({
            "version": _ID, "totalNodes": _COUNT, "batches": {"type": "array", "items": _object({
                **batch, "nodeIds": {"type": "array", "items": _ID}, "maxFailed": _COUNT})},
            "maxFailedTotal": {"type": ["integer", "null"]}, "maxParallel": _COUNT,
            "leftOut": left_out, "emptied": {"type": "array", "items": _TEXT},
            "payloadOf": {"type": ["object", "null"], "properties": {"releaseId": _ID, "version": _ID}}}),
        "Strategy": _object({key: schema for key, (_, _, schema) in STRATEGY_KEYS.items()}, required=[]),
        "NewRelease": _object({
            "target": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}, "reason": _REASON,
            "payload": {"type": "object"}, "strategy": _ref("Strategy"),
            "nodeIds": {"type": "array", "minItems": 1, "uniqueItems": True, "items": _ID},
            "labels": NODE_FIELDS["labels"][2], "dryRun": {"type": "boolean"},
            "version": {"type": "integer", "minimum": 1, "maximum": MAX_NAMED_VERSION}}, required=[])
        | {"not": {"required": ["nodeIds", "labels"]}},
        "Act": _object({"reason": _REASON}, required=[]),
        "Retry": _object(again, required=[]),
        "Rollback": _object({**again, "toRelease": _ID}, required=[]),
        "Resume": _object({"reason": _REASON, "acceptFailures": {"type": "boolean"}}, required=[]),
        "Cancel": _object({"reason": _REASON, "force": {"type": "boolean"}}, required=[]),
        "Freeze": _object({"frozen": {"type": "boolean"}, "reason": _TEXT, "actor": _TEXT, "at": _TEXT}),
        "SetFreeze": _object({"frozen": {"type": "boolean"}, "reason": _REASON}, required=["frozen"])
        | {"anyOf": [{"properties": {"frozen": {"const": False}}},
                     {"properties": {"reason": {"pattern": r"[^\s\x00-\x1f\x7f-\x9f]"}}, "required": ["reason"]}]},
        "Health": _object({
            "version": _TEXT, "startedAt": _TIME, "role": _TEXT,
            "database": _object({"engine": _TEXT, "ok": {"type": "boolean"}, "schema": _COUNT, "message": _TEXT}),
            "executor": _object({"enabled": {"type": "boolean"}, "owner": _TEXT, "lastLookAt": _TIME}),
            "releases": {"type": "array", "items": _object({**release, "batches": _COUNT})},
            "claims": {"type": "array", "items": _object({"releaseId": _ID, "owner": _TEXT, "expiresAt": _TIME})},
            "certificates": {"type": "array", "items": _object({
                "name": _TEXT, "notAfter": _TIME, "daysLeft": {"type": ["number", "null"]}, "message": _TEXT})}}),
        "Status": _object({"status": _TEXT}),
        "Null": {"type": "null"},
        "Error": _object({"code": {"type": "integer", "enum": sorted(ERROR_CODES)}, "message": _TEXT,
                          "data": {"type": "null"}}),
    }


# ======================================================================================
# 13 Page: the dashboard's document, one raw string that loads nothing else; it knows the
#    daemon by section 5 of the contract alone. Uses nothing.
# ======================================================================================

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>releasectl</title>
<link rel="icon" href="data:,">
<style>
:root {
  --page: #f5f6f8; --card: #fff; --line: #d8dde4; --ink: #1b2129; --soft: #54606f; --link: #0a55c4;
  --ok: #1a7038; --ok-soft: #e3f3e8; --bad: #ba1b23; --bad-soft: #fde9ea; --busy: #0a55c4; --busy-soft: #e5eefc;
  --warn: #855000; --warn-soft: #fcf0d9; --rest: #566171; --rest-soft: #ebeef2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1318; --card: #171c23; --line: #2b333d; --ink: #e3e8ee; --soft: #9ca8b6; --link: #82b6ff;
    --ok: #5cc777; --ok-soft: #14301e; --bad: #ff8a82; --bad-soft: #3d1a1c; --busy: #82b6ff; --busy-soft: #172b48;
    --warn: #e8b95a; --warn-soft: #352811; --rest: #a0abb9; --rest-soft: #252c35;
  }
}
.ok, .success, .online { --tone: var(--ok); --tone-soft: var(--ok-soft); }
.bad, .failed { --tone: var(--bad); --tone-soft: var(--bad-soft); }
.busy, .running { --tone: var(--busy); --tone-soft: var(--busy-soft); }
.warn, .paused, .partial, .cancelling, .maintenance { --tone: var(--warn); --tone-soft: var(--warn-soft); }
.unknown, .pending, .skipped, .cancelled, .offline, .disabled { --tone: var(--rest); --tone-soft: var(--rest-soft); }

* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: .2em; text-decoration-thickness: 1px; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
h1, h2, h3, p, dl, dd, ul, ol, pre { margin: 0; padding: 0; }
h1 { font-size: 1.5rem; line-height: 1.25; letter-spacing: -.01em; }
h1:focus, h2:focus, main:focus { outline: none; }
h2 { font-size: 1.02rem; line-height: 1.35; }
ul, ol { list-style: none; }
time, .number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.mono, pre { font: .87em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem .7rem; }
.soft { color: var(--soft); }
.small { font-size: .87rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none !important; }

.row { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem .75rem; }
.between { justify-content: space-between; }
.stack { display: grid; grid-template-columns: minmax(0, 1fr); gap: .6rem; }
.stack.wide { gap: 1.1rem; }
.stack > .stack + .stack { margin-top: .5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.1rem; }
.tiles > .card { align-content: start; }
.card.toned { border-left: 4px solid var(--tone); }

body > header { position: sticky; top: 0; z-index: 1; background: var(--card); border-bottom: 1px solid var(--line); }
body > header > div, main { max-width: 1120px; margin: 0 auto; padding: .6rem 1.2rem; }
body > header > div { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem 1.4rem; }
main { padding-top: 1.3rem; padding-bottom: 4rem; }
.brand { font-weight: 650; color: var(--ink); text-decoration: none; letter-spacing: -.01em; }
nav { display: flex; flex-wrap: wrap; gap: .15rem; }
nav a { color: var(--soft); text-decoration: none; padding: .2rem .65rem; border-radius: 6px; }
nav a:hover { background: var(--rest-soft); color: var(--ink); }
nav a[aria-current] { color: var(--ink); font-weight: 600; background: var(--rest-soft); }
#pulse { margin-left: auto; display: flex; align-items: center; gap: .6rem; font-size: .87rem; }
#pulse .chip { text-decoration: none; }
#trouble { background: var(--bad-soft); color: var(--bad); border-bottom: 1px solid var(--bad); padding: .5rem 1.2rem;
  text-align: center; }
.stale main { opacity: .62; }

/* A status is always a shape, a word and a colour. */
.mark { display: inline-block; flex: none; width: .78em; height: .78em; background: var(--tone);
  forced-color-adjust: none; }
.mark.success, .mark.ok, .mark.online
  { clip-path: polygon(0 52%, 15% 37%, 38% 60%, 85% 10%, 100% 25%, 38% 90%); }
.mark.failed, .mark.bad
  { clip-path: polygon(16% 0, 50% 34%, 84% 0, 100% 16%, 66% 50%, 100% 84%, 84% 100%, 50% 66%, 16% 100%, 0 84%,
    34% 50%, 0 16%); }
.mark.running, .mark.busy { clip-path: polygon(10% 0, 100% 50%, 10% 100%); }
.mark.paused { clip-path: polygon(8% 0, 38% 0, 38% 100%, 62% 100%, 62% 0, 92% 0, 92% 100%, 8% 100%); }
.mark.partial, .mark.warn, .mark.maintenance { clip-path: polygon(50% 4%, 100% 96%, 0 96%); }
.mark.cancelling { clip-path: inset(8%); }
.mark.cancelled { background: none; border: 2px solid var(--tone); }
.mark.skipped, .mark.disabled, .mark.offline { clip-path: inset(36% 0); }
.mark.pending, .mark.unknown { background: none; border: 2px solid var(--tone); border-radius: 50%; }
.chip { display: inline-flex; align-items: center; gap: .4em; padding: .08rem .6rem; border-radius: 99px;
  font-size: .87rem; font-weight: 600; background: var(--tone-soft); color: var(--tone); white-space: nowrap; }

.verdict { display: flex; gap: 1rem; align-items: flex-start; background: var(--tone-soft); border-color: transparent; }
.verdict > .mark { font-size: 1.9rem; margin-top: .25rem; }
.verdict h1 { color: var(--tone); }
.fact { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.1rem; }
.fact dt { color: var(--soft); }

.bar { display: flex; gap: 2px; height: 10px; border-radius: 5px; overflow: hidden; background: var(--rest-soft); }
.bar span { background: var(--tone); min-width: 3px; flex-basis: 0; forced-color-adjust: none; }
.bar .pending { background: transparent; }
.bar .skipped { opacity: .5; }
.bar .running { background: repeating-linear-gradient(115deg, var(--busy) 0 5px, transparent 5px 8px); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .87rem; }
.legend li { display: flex; align-items: center; gap: .4em; }

.cells { display: flex; flex-wrap: wrap; gap: 4px; margin-top: .7rem; }
.cell { display: grid; place-items: center; width: 22px; height: 22px; border-radius: 5px; background: var(--tone-soft);
  font-size: 14px; }
.cell:hover { box-shadow: 0 0 0 2px var(--tone); }
.cell.failed { background: var(--bad); }
.cell.failed .mark { background: var(--card); }
.cell.running .mark { animation: breathe 1.6s ease-in-out infinite; }
@keyframes breathe { 50% { opacity: .35; } }
@media (prefers-reduced-motion: reduce) { .cell.running .mark { animation: none; } }
summary { cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary h3 { display: inline; font-size: 1rem; }
summary .turn { width: .55em; height: .55em; border: solid var(--soft); border-width: 0 2px 2px 0; flex: none;
  transform: rotate(-45deg); }
details[open] > summary .turn { transform: rotate(45deg); }
.lane { border-top: 1px solid var(--line); padding: .75rem 0 .15rem; }
.lane .bar { flex: 1 1 10rem; }
.names { display: flex; flex-wrap: wrap; gap: .1rem .9rem; }

table { border-collapse: collapse; width: 100%; }
caption { text-align: left; }
th, td { text-align: left; padding: .5rem .8rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-size: .87rem; font-weight: 500; }
tbody tr:last-child td { border-bottom: 0; }
td .row { gap: 0; margin: -.35rem -.45rem; }
td .bar { min-width: 7rem; margin-top: .4rem; }
.timeline li { display: grid; grid-template-columns: 10rem minmax(0, 1fr); gap: .1rem .9rem; padding: .35rem 0; }
.timeline li + li { border-top: 1px solid var(--line); }

button, input, select, textarea { font: inherit; color: inherit; }
button { border: 1px solid var(--line); background: var(--card); border-radius: 7px; padding: .3rem .8rem;
  cursor: pointer; min-height: 2.1rem; }
button:hover { border-color: var(--soft); }
button.main { background: var(--link); border-color: var(--link); color: var(--card); font-weight: 600; }
button.main.danger { background: var(--bad); border-color: var(--bad); }
button.plain { border-color: transparent; background: none; color: var(--link); padding: .3rem .45rem; }
button[aria-disabled=true] { color: var(--soft); border-style: dashed; cursor: not-allowed; background: none; }
input:not([type=checkbox]), select, textarea { width: 100%; border: 1px solid var(--soft); border-radius: 7px;
  padding: .35rem .6rem; background: var(--page); min-height: 2.1rem; }
::placeholder { color: var(--soft); opacity: 1; }
textarea { min-height: 5.5rem; font: .87rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
label { display: block; }
label.check { display: flex; gap: .6rem; align-items: baseline; }
input.find { width: 13rem; }
dialog { width: min(34rem, calc(100vw - 1.5rem)); max-height: calc(100vh - 2rem); overflow: auto;
  border: 1px solid var(--line); border-radius: 12px; background: var(--card); color: var(--ink); padding: 1.2rem; }
dialog::backdrop { background: rgb(8 12 18 / .45); }
dialog#node { margin: 0 0 0 auto; width: min(36rem, 100vw); height: 100vh; max-height: none; border-width: 0 0 0 1px;
  border-radius: 0; }
.refused { color: var(--bad); }
[aria-invalid=true] { border-color: var(--bad) !important; }
#plan h3 { font-size: 1rem; }
.notice { background: var(--tone-soft); color: var(--tone); border-radius: 7px; padding: .4rem .7rem; }

@media (max-width: 680px) {
  body > header > div, main { padding-left: .8rem; padding-right: .8rem; }
  nav a { padding: .2rem .5rem; }
  header nav { order: 1; margin-left: -.5rem; }
  #pulse { display: contents; }
  #pulse .chip, #age { margin-left: auto; }
  #age { order: 2; font-size: .87rem; }
  #age .word { display: none; }
  .card { padding: .85rem; }
  thead { display: none; }
  table, tbody, td { display: block; }
  td { border: 0; padding: .1rem 0; }
  td:nth-child(n+3) { grid-column: 1 / -1; }
  tbody tr { display: grid; grid-template-columns: minmax(0, 1fr) auto; padding: .6rem 0;
    border-bottom: 1px solid var(--line); }
  .timeline li { grid-template-columns: minmax(0, 1fr); }
  .fact { grid-template-columns: minmax(0, 1fr); }
  .fact dd { margin-bottom: .35rem; }
}
</style>
</head>
<body>
<header><div>
  <a class="brand" href="#/releases">releasectl</a>
  <nav aria-label="Views" id="nav"></nav>
  <div id="pulse"></div>
</div></header>
<div id="trouble" role="alert" hidden></div>
<main id="main" tabindex="-1"></main>
<dialog id="node" aria-labelledby="node-title"></dialog>
<dialog id="ask" aria-labelledby="ask-title"></dialog>
<p id="said" class="unseen" role="status"></p>
<noscript>This page needs JavaScript. The command line does all the same: releasectl.py --help</noscript>
<script>
'use strict';

// -- words: the API's own, and what they mean to a person -----------------------------------

const TERMINAL = ['success', 'partial', 'failed', 'cancelled'];
const RELEASE_STATUSES = ['pending', 'running', 'paused', 'cancelling', ...TERMINAL];
const NODE_ORDER = ['failed', 'running', 'pending', 'success', 'skipped'];
const VIEWS = [['releases', 'Releases'], ['nodes', 'Nodes'], ['health', 'Health']];
const CELLS_PER_LANE = 300, NAMES_SHOWN = 12, BATCHES_SHOWN = 8, SMALL_RELEASE = 300, EVENTS_PER_PAGE = 1000;
const RENEW_DAYS = 14, BUSY_MS = 2000, IDLE_MS = 10000, HIDDEN_MS = 30000, SILENT_MS = 120000;

// What each verb does, said before it is done; option: one more choice, and when it is offered;
// planned: it makes a release, whose plan is shown before.
const VERBS = {
  pause: {
    label: 'Pause', states: ['pending', 'running'],
    effect: r => `No further node gets version ${r.version} until someone resumes. Nodes that are in flight are `
      + `followed to their end. Waiting: ${count(leftOf(r), 'node')}.`,
  },
  resume: {
    label: 'Resume', states: ['paused'],
    effect: r => `Goes on from where it stands.${r.failedNodes ? ` ${count(r.failedNodes, 'node')} failed: where that `
      + 'is more than the strategy tolerates, the release ends as failed unless the failures are accepted.' : ''}`,
    option: ['acceptFailures', r => r.failedNodes > 0, 'Accept the failures so far and go on with the rest'],
  },
  cancel: {
    label: 'Cancel', states: ['pending', 'running', 'paused', 'cancelling'], danger: true,
    effect: r => `Ends the release. Nodes that wait are skipped, nodes in flight are followed to their end, and the `
      + `${count(r.successNodes, 'node')} that succeeded keep version ${r.version}. It can't be undone.`,
    option: ['force', r => r.status !== 'pending', 'End at once: nodes in flight become failed, their outcome unknown'],
  },
  retry: {
    label: 'Retry', states: ['partial', 'failed', 'cancelled'], planned: true,
    effect: r => `Makes a new release with a new version and the same payload, for the `
      + `${count(r.failedNodes + r.skippedNodes, 'node')} that failed or were skipped.`,
  },
  rollback: {
    label: 'Roll back', states: TERMINAL, danger: true, planned: true,
    effect: () => 'Makes a new release with a new version, for the nodes that this one touched. Its payload is the one '
      + 'that succeeded on them before, or that of the release that you name.',
    fields: [{key: 'toRelease', label: 'To release, by its number; empty for the newest before that succeeded'}],
  },
};

// What to do about each error_kind.
const HINTS = {
  unreachable: 'Nothing answers at the address. Is the host up, the agent running, its port open to us?',
  tls: 'The secure connection was refused. Look at both certificates: releasectl.py check, and the agent\'s log.',
  timeout: 'The agent took the connection but did not answer in time. Look at its load and its log.',
  http: 'The agent answered with an HTTP error. Is this the right port, and is the agent well?',
  protocol: 'The answer makes no sense. Does the node\'s protocol (tasks or execute) fit its agent?',
  rejected: 'The agent refused this version. Its message says why; a new release brings a new version.',
  agent_failed: 'The agent tried and failed. Mend what its message names on the host, then retry the release.',
  verify: 'The agent succeeded, but the probe of the service did not. Look at the service on the host.',
  deadline: 'The task did not end in time. See what the agent is at, then retry the release.',
  abandoned: 'The outcome is not known: the release ended first. Look at the host, then retry.',
};

// -- the document: h() builds, morph() changes what is there so that focus and scrolling stay --

const HANDLERS = ['onclick', 'oninput', 'onkeydown'];
const $ = id => document.getElementById(id);

function h(tag, props, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element[name] = value;
    else if (name === 'grow') element.style.flexGrow = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter(c => c !== null && c !== undefined && c !== false && c !== ''));
  return element;
}

function morph(old, fresh) {
  if (old.nodeName !== fresh.nodeName || old.id !== fresh.id) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return undefined;
  }
  for (const {name} of [...old.attributes]) {
    if (name !== 'style' && !fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const {name, value} of fresh.attributes) {
    if (name !== 'style' && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.style.flexGrow !== fresh.style.flexGrow) old.style.flexGrow = fresh.style.flexGrow;
  for (const name of HANDLERS) old[name] = fresh[name];
  return fill(old, [...fresh.childNodes]);
}

// Makes children the children of element; one with an id is found again wherever it stands.
function fill(element, children) {
  children.forEach((child, place) => {
    const known = child.id && $(child.id);
    if (known && known.parentNode === element && element.childNodes[place] !== known) {
      element.insertBefore(known, element.childNodes[place]);
    }
    if (element.childNodes[place]) morph(element.childNodes[place], child);
    else element.append(child);
  });
  while (element.childNodes.length > children.length) element.lastChild.remove();
}

// -- small parts ------------------------------------------------------------------------------

const count = (number, noun) => `${number.toLocaleString('en')} ${noun}${number === 1 ? '' : 's'}`;
const either = words => words.join(', ').replace(/, ([^,]*)$/, ' or $1');
const leftOf = r => r.totalNodes - r.successNodes - r.failedNodes - r.skippedNodes;
const mark = status => h('span', {class: `mark ${status}`, 'aria-hidden': 'true'});
const chip = (status, word) => h('span', {class: `chip ${status}`}, mark(status), word || status);
const soft = (...words) => h('span', {class: 'soft'}, words);
const mono = text => h('span', {class: 'mono'}, text);
const row = (...children) => h('div', {class: 'row'}, children);
const title = text => h('h1', {tabindex: '-1'}, text);
const button = (label, onclick, kind) => h('button', {type: 'button', class: kind, onclick}, label);
const card = (name, ...children) => h('section', {class: 'card stack'}, h('h2', null, name), children);
const releaseLink = id => h('a', {href: `#/releases/${id}`}, `Release ${id}`);
const facts = pairs => h('dl', {class: 'fact'}, pairs.filter(([, value]) => value !== null && value !== '')
  .map(([name, value]) => [h('dt', null, name), h('dd', null, value)]));

function table(names, rows) {
  return h('table', null, h('thead', null, h('tr', null, names.map(name => h('th', {scope: 'col'}, name)))),
    h('tbody', null, rows.map(([id, ...cells]) => h('tr', {id}, cells.map(cell => h('td', null, cell))))));
}

let clockSkewMs = 0; // the daemon's clock minus ours, by the Date of its answers
const nowMs = () => Date.now() + clockSkewMs;
const sinceMs = text => nowMs() - Date.parse(text);

function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000)), min = Math.floor(s / 60), hours = Math.floor(min / 60);
  if (s < 60) return `${s} s`;
  if (min < 60) return min < 10 && s % 60 ? `${min} min ${s % 60} s` : `${min} min`;
  if (hours < 48) return hours < 10 && min % 60 ? `${hours} h ${min % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} days`;
}

function clock(text) {
  const at = new Date(text), isToday = at.toDateString() === new Date(nowMs()).toDateString();
  const day = isToday ? '' : `${at.toLocaleDateString('sv')} `; // Sweden writes its dates as ISO 8601 does
  return h('time', {datetime: text, title: text}, day + at.toLocaleTimeString('en-GB'));
}

function ago(text) {
  if (!text) return null;
  const ms = sinceMs(text);
  return h('time', {datetime: text, title: text}, ms < -1000 ? `in ${span(-ms)}` : `${span(ms)} ago`);
}

const countsOf = r => ({success: r.successNodes, failed: r.failedNodes, skipped: r.skippedNodes, pending: leftOf(r)});

function tally(nodes) {
  const counts = {};
  for (const node of nodes) counts[node.status] = (counts[node.status] || 0) + 1;
  return counts;
}

const wordsOf = counts => NODE_ORDER.filter(s => counts[s]).map(s => `${counts[s].toLocaleString('en')} ${s}`);

function bar(counts, label) {
  const segments = ['success', 'failed', 'running', 'skipped', 'pending'].filter(s => counts[s]);
  return h('div', {class: 'bar', role: 'img', 'aria-label': `${label}: ${wordsOf(counts).join(', ') || 'no nodes'}`},
    segments.map(s => h('span', {class: s, grow: counts[s]})));
}

function legend(counts) {
  return h('ul', {class: 'legend'}, NODE_ORDER.filter(s => counts[s])
    .map(s => h('li', {class: s}, mark(s), h('span', null, wordsOf({[s]: counts[s]})))));
}

function address(place, query) {
  const kept = Object.entries(query).filter(([name, value]) => value && !(name === 'page' && value === '1'));
  return `#/${place}${kept.length ? `?${new URLSearchParams(kept)}` : ''}`;
}

function pager(place, query, page) {
  const last = Math.ceil(page.total / page.pageSize);
  const to = (number, word) => number < 1 || number > last ? soft(word)
    : h('a', {href: address(place, {...query, page: String(number)})}, word);
  return last > 1 && h('nav', {'aria-label': 'Pages', class: 'row'}, to(page.page - 1, 'Back'),
    soft(`page ${page.page} of ${last}`), to(page.page + 1, 'Next'));
}

// -- the API ----------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(httpStatus, {code, message}) {
    super(message);
    Object.assign(this, {httpStatus, code});
  }
}

let token = sessionStorage.getItem('releasectl-token') || '';
let known = new Map(); // what GET answered, by address, with its ETag

async function call(method, path, body, headers) {
  const sent = {...headers}, before = method === 'GET' && known.get(path);
  if (token) sent.Authorization = `Bearer ${token}`;
  if (before) sent['If-None-Match'] = before.etag;
  if (body) sent['Content-Type'] = 'application/json';
  const answer = await fetch(path, {method, headers: sent, cache: 'no-store',
    body: typeof body === 'object' ? JSON.stringify(body) : body, signal: AbortSignal.timeout(15000)});
  const date = Date.parse(answer.headers.get('Date'));
  if (date) clockSkewMs = Math.abs(date - Date.now()) < 2000 ? 0 : date - Date.now();
  if (answer.status === 304 && before) return before.data;
  const envelope = await answer.json();
  if (envelope.code) throw new Refusal(answer.status, envelope);
  const etag = answer.headers.get('ETag');
  if (method === 'GET' && etag) known.set(path, {etag, data: envelope.data});
  return envelope.data;
}

const get = path => call('GET', path);

function plain(error) {
  if (error.name === 'TimeoutError') return 'The daemon did not answer in time.';
  return error instanceof TypeError ? 'The daemon can\'t be reached.' : error.message;
}

// -- what holds for every view: the pulse and the verdict ----------------------------------------

let pulse = null;       // /api/v1/health, the newest releases, the freeze
let hasFreeze = true;   // until the API says that it knows none

async function loadPulse() {
  const health = await get('api/v1/health');
  const [newest, freeze] = health.database.ok ? await Promise.all([
    get('api/v1/releases?page=1&pageSize=20'), hasFreeze ? loadFreeze() : null]) : [{items: []}, null];
  pulse = {health, newest, freeze};
}

async function loadFreeze() {
  try {
    return await get('api/v1/freeze');
  } catch (error) {
    if (error.httpStatus !== 404) throw error;
    hasFreeze = false;
    return null;
  }
}

// The one sentence, of the first rule that holds: [tone, headline, what stands behind it, address].
function verdict() {
  const isBlind = !pulse || trouble && pulse.health.database.ok;
  if (isBlind) return ['unknown', trouble ? 'No contact' : 'Looking', trouble, 'health'];
  const {health: {executor, database, certificates, releases, startedAt}, newest, freeze} = pulse;
  const active = status => releases.find(r => r.status === status), underWay = new Set(releases.map(r => r.target));
  const lastOf = new Map(newest.items.filter(r => TERMINAL.includes(r.status)).reverse().map(r => [r.target, r]));
  const ended = status => [...lastOf.values()].find(r => r.status === status && !underWay.has(r.target));
  const silentMs = executor.enabled ? sinceMs(executor.lastLookAt || startedAt) : 0;
  const rules = [
    [!database.ok, 'bad', () => 'The database is out of reach', () => database.message, 'health'],
    [silentMs > SILENT_MS, 'bad', () => 'The executor does not look for work', () =>
      `Its last look: ${span(silentMs)} ago. Its log says why.`, 'health'],
    [ended('failed'), 'bad', r => `Release ${r.id} failed`, r => r.errorMsg || r.statusReason],
    [certificates.find(c => !c.notAfter), 'bad', c => `${c.name} can't be used`, c => c.message, 'health'],
    [freeze && freeze.frozen, 'warn', () => 'Frozen: nothing is dispatched', () => freeze.reason, 'health'],
    [releases.find(r => r.failedNodes), 'warn', r => `Release ${r.id} has failures`, r => r.statusReason],
    [active('paused'), 'warn', r => `Release ${r.id} waits for a person`, r => r.statusReason],
    [ended('partial') || ended('cancelled'), 'warn', r => `Release ${r.id} ended ${r.status}`, r => r.statusReason],
    [certificates.find(c => c.daysLeft < RENEW_DAYS), 'warn', c => `${c.name} ends soon`,
      c => `It is good for ${count(Math.floor(c.daysLeft), 'day')} more: renew it.`, 'health'],
    [active('running') || active('cancelling') || releases[0], 'busy', r => `Release ${r.id} is ${r.status}`, r =>
      r.startedAt ? `${r.successNodes} of ${count(r.totalNodes, 'node')} done after ${span(sinceMs(r.startedAt))}.`
        : r.statusReason],
    [ended('success'), 'ok', () => 'All is well', r => `Nothing is running. The last release, ${r.id} (version `
      + `${r.version}), succeeded ${span(sinceMs(r.finishedAt))} ago.`],
    [true, 'ok', () => 'All is well', () => 'There is no release yet.'],
  ];
  const [about, tone, headline, text, place] = rules.find(([holds]) => holds);
  return [tone, headline(about), text(about), place || (about.id ? `releases/${about.id}` : 'releases')];
}

function verdictCard(heading) {
  const [tone, headline, text] = verdict();
  return h('section', {class: `card verdict ${tone}`, 'aria-label': 'At a glance'}, mark(tone),
    h('div', null, heading(headline), h('p', null, text)));
}

// -- releases -------------------------------------------------------------------------------------

function releasesView() {
  let page = null, shown = '';
  return {
    name: 'Releases',
    async load(query) {
      const asked = new URLSearchParams({page: query.page || '1', pageSize: '20'});
      if (query.status) asked.set('status', query.status);
      page = query.status || query.page ? await get(`api/v1/releases?${asked}`) : pulse.newest;
      shown = address('releases', query);
    },
    draw(query) {
      const active = pulse.health.releases, nothing = !pulse.health.database.ok ? 'Not known now.'
        : query.status ? `No release is ${query.status}.` : 'None yet.';
      return h('div', {class: 'stack wide'}, verdictCard(title),
        active.length > 0 && h('section', {class: 'stack', 'aria-label': 'Under way'},
          h('h2', null, `Under way: ${active.length}`), active.map(activeCard)),
        h('section', {class: 'card stack'},
          h('div', {class: 'row between'}, h('h2', null, 'History'), button('New release', askForRelease)),
          h('nav', {'aria-label': 'Filter by status'}, ['', ...RELEASE_STATUSES].map(status => h('a', {
            href: address('releases', {status}), 'aria-current': (query.status || '') === status && 'true',
          }, status || 'all'))),
          shown !== address('releases', query) ? soft('Looking')
            : [page.items.length ? releaseTable(page.items) : soft(nothing), pager('releases', query, page)]));
    },
  };
}

function activeCard(r) {
  return h('article', {class: `card stack toned ${r.status}`, id: `active-${r.id}`},
    row(h('h3', null, releaseLink(r.id)), chip(r.status), soft(`version ${r.version}, ${r.target}`),
      r.currentBatch > 0 && soft(`batch ${r.currentBatch} of ${r.batches}`)),
    h('p', null, r.statusReason),
    bar(countsOf(r), `Nodes of release ${r.id}`),
    h('p', {class: 'soft small'}, done(r), r.reason && `; ${r.reason}`));
}

const done = r => `${r.successNodes} of ${r.totalNodes} done${r.failedNodes ? `, ${r.failedNodes} failed` : ''}`;

function releaseTable(items) {
  return table(['Release', 'Status', 'Nodes', 'What for', 'When'], items.map(r => [`release-${r.id}`,
    [releaseLink(r.id), h('div', {class: 'soft small number'}, `version ${r.version}, ${r.target}`)],
    chip(r.status),
    [h('span', {class: 'small'}, done(r)), bar(countsOf(r), `Nodes of release ${r.id}`)],
    [r.reason, r.errorMsg && h('div', {class: 'soft small'}, r.errorMsg)],
    [ago(r.finishedAt || r.startedAt || r.createdAt), h('div', {class: 'soft small'}, lasted(r))],
  ]));
}

function lasted(r) {
  if (!r.startedAt) return 'not started';
  return r.finishedAt ? `took ${span(Date.parse(r.finishedAt) - Date.parse(r.startedAt))}` : 'not at its end';
}

// -- one release ----------------------------------------------------------------------------------

// The nodes are read once, whole; then the events say what changed. They are read whole again
// where that is cheap, and when a failure brings more than an event tells.
function releaseView(place) {
  const id = Number(place.split('/')[1]), opened = new Map();
  let release = null, nodes = new Map(), batches = [], events = [], lastEvent = 0, followed = '', find = '';
  let isCaughtUp = false, mustReadAll = true;

  async function loadNodes() {
    ({release, batches} = await get(`api/v1/releases/${id}`));
    nodes = new Map(batches.flatMap(batch => batch.nodes.map(node => [node.nodeId, node])));
    mustReadAll = false;
  }

  async function loadEvents() {
    for (let part; !part || part.length === EVENTS_PER_PAGE;) {
      part = (await get(`api/v1/releases/${id}/events?after=${lastEvent}&limit=${EVENTS_PER_PAGE}`)).items;
      for (const event of part.filter(e => e.id > lastEvent)) { // two looks may be at it at once
        events.push(event);
        lastEvent = event.id;
        if (isCaughtUp) follow(event);
      }
    }
    mustReadAll = mustReadAll || (!isCaughtUp && !TERMINAL.includes(release.status)); // they moved on meanwhile
    isCaughtUp = true;
  }

  function follow(event) {
    const node = nodes.get(event.nodeId);
    if (!node) return;
    node.status = event.toStatus;
    node[event.toStatus === 'running' ? 'startedAt' : 'finishedAt'] = event.at;
    if (event.toStatus === 'failed') mustReadAll = true;
  }

  function open(batch, isOpen) {
    opened.set(batch, isOpen);
    render();
  }

  function search(event) {
    find = event.target.value.trim().toLowerCase();
    render();
  }

  return {
    name: `Release ${id}`,
    async load() {
      const isFirst = !release;
      if (mustReadAll) await loadNodes();
      else ({release} = await get(`api/v1/releases/${id}?view=summary`));
      const now = JSON.stringify(release);
      if (now === followed) return;
      if (isFirst) {
        this.isLoaded = true;
        render(); // a long history takes a moment, the nodes are there
      }
      await loadEvents();
      followed = now; // not what is read below: its events are still to come
      if (mustReadAll || (!isFirst && nodes.size <= SMALL_RELEASE)) await loadNodes();
    },
    draw() {
      const all = [...nodes.values()], failures = all.filter(n => n.status === 'failed');
      const finder = h('input', {class: 'find', type: 'search', placeholder: 'Find a node',
        'aria-label': 'Find a node by name or address', oninput: search});
      return h('div', {class: 'stack wide'},
        releaseHead(release, tally(all), events),
        failures.length > 0 && failureCard(release, failures),
        h('section', {class: 'card stack'},
          h('div', {class: 'row between'}, h('h2', null, `Batches: ${batches.length}`), finder),
          batches.map(batch => lane(release, batch, batches.length, opened, open, find))),
        card('What happened', h('ol', {class: 'timeline', id: 'timeline'},
          events.filter(e => e.nodeId === null).reverse().map(e => eventLine(e, 'release')))));
    },
    drawNode(nodeId) {
      const node = nodes.get(nodeId), batch = node && batches.find(b => b.nodes.includes(node));
      return node && nodeDetail(release, node, batch.batch, events.filter(e => e.nodeId === nodeId));
    },
  };
}

function releaseHead(r, counts, events) {
  const created = events.find(e => e.event === 'created'), unfit = Object.values(VERBS).filter(v => !isFit(v, r));
  return h('section', {class: `card stack toned ${r.status}`},
    row(title(`Release ${r.id}`), chip(r.status), soft(`version ${r.version}, ${r.target}`)),
    h('p', null, r.statusReason),
    bar(counts, 'Nodes'), legend(counts),
    h('div', {class: 'row', role: 'group', 'aria-label': 'What can be done'},
      Object.keys(VERBS).map(name => verbButton(name, r))),
    h('p', {class: 'soft small', id: 'why'}, mayAct() ? 'Not now: ' : 'Your token only reads (viewer).',
      mayAct() && unfit.map(v => `${v.label.toLowerCase()} needs ${either(v.states)}`).join('; ')),
    facts([
      ['What for', r.reason],
      ['Created', [clock(r.createdAt), created ? ` by ${created.actor}` : '']],
      ['Started', r.startedAt ? [clock(r.startedAt), ', ', ago(r.startedAt)] : 'not yet'],
      ['Ended', r.finishedAt && [clock(r.finishedAt), `, ${lasted(r)}`]],
      ['Retry of', r.retryOf && releaseLink(r.retryOf)],
      ['Rollback of', r.rollbackOf && releaseLink(r.rollbackOf)],
      ['Strategy', Object.keys(r.strategy).length ? mono(JSON.stringify(r.strategy)) : null],
    ]));
}

const mayAct = () => pulse.health.role !== 'viewer';
const isFit = (verb, r) => mayAct() && verb.states.includes(r.status);

function verbButton(name, r) {
  const verb = VERBS[name], unfit = !isFit(verb, r);
  return h('button', {type: 'button', id: `verb-${name}`, 'aria-disabled': unfit && 'true',
    'aria-describedby': unfit && 'why', onclick: () => unfit || askForVerb(verb, name, r)}, verb.label);
}

function failureCard(r, failures) {
  const groups = new Map();
  for (const node of failures) {
    const key = `${node.errorKind} ${node.errorMsg}`;
    groups.set(key, [...groups.get(key) || [], node]);
  }
  const largest = [...groups.values()].sort((a, b) => b.length - a.length);
  return h('section', {class: 'card stack toned failed', id: 'failures'},
    h('h2', null, `${count(failures.length, 'node')} failed`, groups.size > 1 && `, for ${groups.size} reasons`),
    largest.map(nodes => failureGroup(r, nodes)));
}

function failureGroup(r, nodes) {
  const {errorKind, errorMsg} = nodes[0], more = nodes.length - NAMES_SHOWN;
  return h('div', {class: 'stack'},
    row(chip('failed', errorKind), soft(count(nodes.length, 'node'))),
    h('pre', null, errorMsg || 'no message'),
    h('p', {class: 'small'}, HINTS[errorKind]),
    h('ul', {class: 'names'}, nodes.slice(0, NAMES_SHOWN).map(n => h('li', null,
      h('a', {href: address(`releases/${r.id}`, {node: n.nodeId})}, n.nodeName))),
    more > 0 && h('li', {class: 'soft'}, `and ${more.toLocaleString('en')} more`)));
}

function lane(r, batch, last, opened, open, find) {
  const counts = tally(batch.nodes), done = counts.success || 0, total = batch.nodes.length;
  const status = done === total ? 'success' : NODE_ORDER.find(s => counts[s]);
  const isFound = n => n.nodeName.toLowerCase().includes(find) || n.mainIp.includes(find);
  const found = find ? batch.nodes.filter(isFound) : batch.nodes;
  const isOfInterest = batch.batch === r.currentBatch || status === 'failed' || (last <= 2 && done < total);
  const isOpen = find ? found.length > 0 : opened.has(batch.batch) ? opened.get(batch.batch) : isOfInterest;
  const onclick = event => {
    event.preventDefault(); // whether it is open is ours to say at the next drawing
    open(batch.batch, !isOpen);
  };
  return h('details', {class: 'lane', open: isOpen, id: `batch-${batch.batch}`},
    h('summary', {onclick}, row(h('span', {class: 'turn', 'aria-hidden': 'true'}),
      h('h3', null, `Batch ${batch.batch} of ${last}`), chip(status),
      h('span', {class: 'soft small number'}, `${done} of ${total} done`), bar(counts, `Batch ${batch.batch}`))),
    isOpen && cells(r, batch.batch, found));
}

function cells(r, batch, nodes) {
  const isCapped = nodes.length > CELLS_PER_LANE; // then what is cut off is the calm end
  const ordered = isCapped ? NODE_ORDER.flatMap(status => nodes.filter(n => n.status === status)) : nodes;
  const left = ordered.slice(CELLS_PER_LANE);
  return h('div', null,
    h('div', {class: 'cells', role: 'group', 'aria-label': `Nodes of batch ${batch}`, onkeydown: walkCells},
      ordered.slice(0, CELLS_PER_LANE).map((n, i) => h('a', {id: `cell-${n.nodeId}`, class: `cell ${n.status}`,
        tabindex: i ? '-1' : '0', href: `#/releases/${r.id}?node=${n.nodeId}`,
        'aria-label': `${n.nodeName}: ${n.status}`,
        title: `${n.nodeName}: ${n.status}${n.errorMsg && `, ${n.errorMsg}`}`}, mark(n.status)))),
    isCapped && h('p', {class: 'soft small'}, `and ${count(left.length, 'more node')}: `,
      wordsOf(tally(left)).join(', ')));
}

// One stop of the tab key for a whole lane; the arrows walk within it.
function walkCells(event) {
  const step = {ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity}[event.key];
  if (!step) return;
  const all = [...event.currentTarget.children];
  const at = Math.min(all.length - 1, Math.max(0, all.indexOf(document.activeElement) + step));
  all.forEach((cell, i) => { cell.tabIndex = i === at ? 0 : -1; });
  all[at].focus();
  event.preventDefault();
}

function eventLine(e, list) {
  return h('li', {id: `event-${list}-${e.id}`}, h('div', null, clock(e.at)), h('div', null,
    row(e.toStatus && chip(e.toStatus), h('span', null, e.event), e.actor && soft(`by ${e.actor}`)),
    e.detail && h('div', {class: 'small'}, e.detail)));
}

function nodeDetail(r, node, batch, events) {
  const failed = [...events].reverse().find(e => e.toStatus === 'failed');
  const close = button('Close', () => $('node').close());
  return h('div', {class: 'stack wide'},
    h('div', {class: 'row between'}, h('h2', {id: 'node-title'}, node.nodeName), close),
    row(chip(node.status), soft(`batch ${batch} of release ${r.id}, version ${r.version}`)),
    node.errorMsg && h('section', {class: 'stack'}, h('h3', null, node.errorKind || 'error'),
      h('pre', null, (failed && failed.detail) || node.errorMsg), h('p', {class: 'small'}, HINTS[node.errorKind])),
    facts([
      ['Address', mono(node.mainIp)], ['Attempts', String(node.attempts)],
      ['Task', node.taskId ? mono(node.taskId) : 'none yet'],
      ['Started', node.startedAt ? [clock(node.startedAt), ', ', ago(node.startedAt)] : 'not yet'],
      ['Ended', node.finishedAt && [clock(node.finishedAt), node.startedAt && `, ${lasted(node)}`]],
    ]),
    h('section', null, h('h3', null, 'Its events'), events.length
      ? h('ol', {class: 'timeline'}, events.map(e => eventLine(e, 'node'))) : soft('Nothing yet.')));
}

// -- nodes ------------------------------------------------------------------------------------------

function nodesView() {
  let page = null, shown = '';
  return {
    name: 'Nodes',
    async load(query) {
      page = await get(`api/v1/nodes?page=${query.page || 1}&pageSize=50&lastRelease=1`);
      shown = address('nodes', query);
    },
    draw(query) {
      return h('div', {class: 'stack wide'},
        h('div', {class: 'row between'}, title('Nodes'), button('Add a node', () => askForNode(null))),
        h('section', {class: 'card stack'}, shown !== address('nodes', query) ? soft('Looking')
          : [page.total ? nodeTable(page.items) : soft('There is no node yet.'), pager('nodes', query, page)]),
        h('p', {class: 'soft small'}, 'A new release goes to the nodes that are enabled and online.'));
    },
  };
}

function nodeTable(items) {
  return table(['Node', 'State', 'Agent', 'Labels', 'Last release', 'Change'], items.map(n => [`row-${n.id}`,
    [n.name, h('div', {class: 'soft small mono'}, n.mainIp)],
    n.enabled ? chip(n.status) : chip('disabled', n.status === 'online' ? '' : `disabled, ${n.status}`),
    h('span', {class: 'small'}, `${n.agentProtocol}, port ${n.agentPort}`),
    h('span', {class: 'small'}, labelsText(n.labels)),
    n.lastRelease && [releaseLink(n.lastRelease.releaseId), ' ', chip(n.lastRelease.status)],
    row(button(n.status === 'maintenance' ? 'End maintenance' : 'Maintenance', () => askToChange(n,
      {status: n.status === 'maintenance' ? 'online' : 'maintenance'}), 'plain'),
    button(n.enabled ? 'Disable' : 'Enable', () => askToChange(n, {enabled: !n.enabled}), 'plain'),
    button('Edit', () => askForNode(n), 'plain')),
  ]));
}

function askToChange(node, change) {
  const isBack = change.enabled || change.status === 'online';
  ask({
    name: `${node.name}: ${change.status || (change.enabled ? 'enable' : 'disable')}`, action: 'Change',
    text: isBack ? 'New releases include it again, where it is both enabled and online.'
      : 'New releases leave it out. A release that already names it goes on as it is.',
    submit: () => call('PATCH', `api/v1/nodes/${node.id}`, change),
  });
}

function askForNode(node) {
  const n = node || {agentPort: 8443, agentProtocol: 'tasks', labels: {}, enabled: true, status: 'online'};
  ask({
    name: node ? `Edit ${n.name}` : 'Add a node', action: node ? 'Save' : 'Add',
    fields: [
      {key: 'name', label: 'Name', value: n.name},
      {key: 'mainIp', label: 'Address', value: n.mainIp},
      {key: 'agentPort', label: 'Agent port', kind: 'number', value: n.agentPort},
      {key: 'agentProtocol', label: 'Agent protocol', kind: 'select', value: n.agentProtocol,
        choices: ['tasks', 'execute']},
      {key: 'status', label: 'State', kind: 'select', value: n.status, choices: ['online', 'offline', 'maintenance']},
      {key: 'labels', label: 'Labels, as name=value, name=value', value: labelsText(n.labels)},
      {key: 'enabled', label: 'Enabled', kind: 'check', value: n.enabled},
    ],
    submit: values => call(node ? 'PATCH' : 'POST', node ? `api/v1/nodes/${n.id}` : 'api/v1/nodes',
      {...values, agentPort: Number(values.agentPort),
        // as text they may lose a comma or a space: what nobody touched is left as it is
        labels: node && values.labels === labelsText(n.labels) ? n.labels : labelsOf(values.labels)}),
  });
}

const labelsText = labels => Object.entries(labels).map(([name, value]) => `${name}=${value}`).join(', ');

function labelsOf(text) {
  const labels = new Map();
  for (const part of text.split(',').map(one => one.trim()).filter(Boolean)) {
    const [name, ...value] = part.split('=');
    if (labels.has(name.trim())) throw new FieldError('labels', `The label ${name.trim()} is there twice`);
    labels.set(name.trim(), value.join('=').trim());
  }
  return Object.fromEntries(labels);
}

// -- health -----------------------------------------------------------------------------------------

function healthView() {
  let takesWrites = false;
  return {
    name: 'Health',
    async load() {
      takesWrites = (await fetch('readyz', {cache: 'no-store', signal: AbortSignal.timeout(15000)})).ok;
    },
    draw() {
      const {executor, database, certificates, claims, version, startedAt} = pulse.health;
      return h('div', {class: 'stack wide'}, title('Health'), verdictCard(text => h('h2', null, text)),
        h('div', {class: 'tiles'},
          card('Executor', row(executor.enabled ? chip('ok', 'on') : chip('disabled', 'off in this process')), facts([
            ['Last look for work', executor.enabled ? ago(executor.lastLookAt) || 'none yet' : null],
            ['Name', executor.owner && mono(executor.owner)]])),
          card('Who is at work', claims.map(claimLine), !claims.length && soft('Nobody: no release is claimed.')),
          card('Database', row(database.ok ? chip('ok', 'answers') : chip('bad', 'out of reach'),
            takesWrites ? chip('ok', 'takes writes') : chip('bad', 'takes no writes')),
          facts([['Engine', database.engine], ['Schema', String(database.schema)], ['Says', database.message]])),
          card('Certificates', certificates.map(certificateLine), !certificates.length && soft('None is in use.')),
          pulse.freeze && freezeCard(pulse.freeze),
          card('Process', facts([['Version', version], ['Started', [clock(startedAt), ', ', ago(startedAt)]]]))));
    },
  };
}

const claimLine = c => row(releaseLink(c.releaseId), mono(c.owner),
  soft('its claim ends ', ago(c.expiresAt), ' unless renewed'));

function certificateLine(c) {
  const tone = !c.notAfter ? 'bad' : c.daysLeft < RENEW_DAYS ? 'warn' : 'ok';
  return row(chip(tone, c.name), h('span', null, c.notAfter
    ? [`${count(Math.floor(c.daysLeft), 'day')} left, until `, clock(c.notAfter)] : c.message));
}

function freezeCard(freeze) {
  return card('Freeze', row(freeze.frozen ? chip('paused', 'frozen') : chip('ok', 'not frozen'), freeze.reason),
    soft('While frozen, no process dispatches anything new.'),
    row(button(freeze.frozen ? 'Lift the freeze' : 'Freeze', () => askForFreeze(!freeze.frozen))));
}

function askForFreeze(frozen) {
  ask({
    name: frozen ? 'Freeze?' : 'Lift the freeze?', action: frozen ? 'Freeze' : 'Lift the freeze',
    text: frozen ? 'Nothing new is dispatched, by any process, until the freeze is lifted. What is in flight is '
      + 'followed to its end.' : 'Releases go on from where they stand.',
    fields: [{key: 'reason', label: 'Reason'}],
    submit: ({reason}) => call('PUT', 'api/v1/freeze', {frozen, reason}),
  });
}

// -- dialogs: one form for all of them ------------------------------------------------------------------

// What is wrong with one field of a form, to be said beside it.
class FieldError extends Error {
  constructor(key, message) {
    super(message);
    this.key = key;
  }
}

const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), b => b.toString(16).padStart(2, '0'))
  .join('');

function askForVerb(verb, name, r) {
  const [key, isOffered, label] = verb.option || ['', () => false], path = `api/v1/releases/${r.id}/${name}`;
  const once = verb.planned && {'Idempotency-Key': newKey()};
  const option = isOffered(r) ? [{key, label, kind: 'check', value: r.status === 'cancelling'}] : [];
  const overNewer = {key: 'overNewer', label: 'Go over newer releases', kind: 'check',
    offeredAt: error => error.code === 3003 && /newer/i.test(error.message)};
  const bodyOf = values => ({...values[key] && {[key]: true}, ...values.overNewer && {overNewer: true},
    ...values.toRelease && {toRelease: releaseNumber('toRelease', values.toRelease)}});
  ask({
    name: `${verb.label} release ${r.id}?`, text: verb.effect(r), action: `${verb.label} release ${r.id}`,
    danger: verb.danger, fields: [...option, ...verb.fields || [],
      {key: 'reason', label: 'Reason, for the record', keepsPlan: true}, ...verb.planned ? [overNewer] : []],
    plan: verb.planned && (values => call('POST', path, {...bodyOf(values), dryRun: true})), plansAtOnce: true,
    async submit(values) {
      const data = await call('POST', path, {...bodyOf(values), ...values.reason && {reason: values.reason}}, once);
      return data.releaseId && created(data);
    },
  });
}

function releaseNumber(key, text) {
  if (!/^[1-9]\d{0,14}$/.test(text)) throw new FieldError(key, 'Write the number of a release, for example 4');
  return Number(text);
}

function askForRelease() {
  const once = {'Idempotency-Key': newKey()};
  // JSON goes out as it was written: read and written anew, a number may lose digits and an object a key.
  const bodyOf = ({target, reason, payload, strategy, labels}, more) => {
    if (!payload) throw new FieldError('payload', 'Write the payload, for example {"websites": []}');
    const rest = JSON.stringify({target, reason, ...labels && {labels: labelsOf(labels)}, ...more});
    const written = [['payload', payload], ...strategy ? [['strategy', strategy]] : []];
    return `{${written.map(([key, text]) => `"${key}": ${checkedJson(key, text)}`)}, ${rest.slice(1)}`;
  };
  ask({
    name: 'New release', action: 'Create',
    text: 'Goes to the nodes that are enabled and online: by default to one, then to all others.',
    fields: [
      {key: 'target', label: 'Target', value: 'cdn'},
      {key: 'reason', label: 'What for'},
      {key: 'payload', label: 'Payload, a JSON object', kind: 'area', value: ''},
      {key: 'strategy', label: 'Strategy, a JSON object; empty for the default', kind: 'area', value: ''},
      {key: 'labels', label: 'Only nodes with these labels, as name=value'},
    ],
    plan: values => call('POST', 'api/v1/releases', bodyOf(values, {dryRun: true})),
    submit: async values => created(await call('POST', 'api/v1/releases', bodyOf(values), once)),
  });
}

// Goes to a release that was made; gives what has to be told of it: [heading, words], or null.
function created({releaseId, version, totalNodes, leftOut}) {
  location.hash = `#/releases/${releaseId}`;
  return leftOut && leftOut.length > 0 ? [`Release ${releaseId} is created`,
    h('p', null, `Version ${version} goes to ${count(totalNodes, 'node')}.`), leftOutParts(leftOut)] : null;
}

// What a release would do, from the answer to dryRun.
function planParts({totalNodes, batches = [], version, payloadOf, leftOut = [], emptied = []}) {
  const sizes = batches.slice(0, BATCHES_SHOWN).map(batch => batch.nodeIds.length.toLocaleString('en')).join(', then ');
  const more = batches.length - BATCHES_SHOWN, nodes = count(totalNodes, 'node');
  const what = payloadOf ? `Sends the payload of release ${payloadOf.releaseId} (v${payloadOf.version}) to ${nodes}`
    : `Goes to ${nodes}`;
  return [h('h3', null, 'Plan'),
    h('p', null, what, version && ` as version ${version}`, batches.length > 1 ? `, in batches of ${sizes}` : '',
      more > 0 && ` and ${more.toLocaleString('en')} more`, '.'),
    emptied.length > 0 && h('p', {class: 'notice warn'}, mark('warn'), ` Warning: ${count(emptied.length, 'node')} `
      + `would be left without any site: ${named(emptied)}`),
    leftOut.length > 0 && leftOutParts(leftOut)];
}

function leftOutParts(leftOut) {
  const reasons = new Map();
  for (const {nodeName, why} of leftOut) reasons.set(why, [...reasons.get(why) || [], nodeName]);
  return h('div', null, h('p', null, `Left out: ${count(leftOut.length, 'node')}.`),
    h('ul', {class: 'small'}, [...reasons].map(([why, names]) => h('li', null, soft(`${why}: `), named(names)))));
}

const named = names => names.slice(0, NAMES_SHOWN).join(', ') + (names.length > NAMES_SHOWN
  ? ` and ${(names.length - NAMES_SHOWN).toLocaleString('en')} more` : '');

function checkedJson(key, text) {
  try {
    JSON.parse(text);
  } catch (error) {
    throw new FieldError(key, `The ${key} is not JSON: ${error.message}`);
  }
  return text;
}

function askForToken(message) {
  const again = () => ask({
    name: 'Who is there?', action: 'Go on', text: token ? `${message}.` : 'The daemon asks for a token. It is kept '
      + 'until this tab is closed, and sent to this daemon alone.',
    fields: [{key: 'token', label: 'Token', kind: 'password'}], byEnter: true,
    async submit(values) {
      token = values.token;
      sessionStorage.setItem('releasectl-token', token);
    },
  });
  fill($('main'), [h('div', {class: 'stack'}, title('A token is needed'), row(button('Give a token', again)))]);
  again();
}

function field({key, label, kind, value, choices, offeredAt}) {
  const props = {name: key, id: `field-${key}`, autocomplete: 'off', spellcheck: 'false'};
  if (kind === 'check') {
    return h('label', {class: 'check', hidden: Boolean(offeredAt)}, h('input', {...props, type: 'checkbox',
      checked: value}), label);
  }
  props['aria-describedby'] = `wrong-${key}`;
  return h('div', null, h('label', null, label,
    kind === 'select' ? h('select', props, choices.map(choice => h('option', {selected: choice === value}, choice)))
      : kind === 'area' ? h('textarea', props, value) : h('input', {...props, type: kind || 'text', value})),
  h('p', {class: 'small', id: `wrong-${key}`, role: 'alert'}));
}

// byEnter: Enter in a field does it too; without, as for all that changes something, only the button.
// plan: asks what would come of the values; its answer is shown before the button can be used, and taken
// back when a field is changed that does not keep it; plansAtOnce: shown without being asked for.
// submit gives nothing, or what is to be told: [heading, words].
function ask({name, text, fields = [], action, danger, plan, plansAtOnce, byEnter, submit}) {
  const dialog = $('ask'), said = h('p', {role: 'alert'}), shown = h('div', {class: 'stack', id: 'plan',
    'aria-live': 'polite', hidden: !plan});
  const main = h('button', {type: byEnter ? 'submit' : 'button', onclick: byEnter ? null : act,
    'aria-describedby': plan && 'plan'}, action);
  const planner = plan && button('Show the plan', showPlan);
  let isBusy = false, planned = ''; // what the plan that is shown was asked with
  const valueOf = ({key, kind}) => kind === 'check' ? form.elements[key].checked : form.elements[key].value.trim();
  const valuesOf = () => Object.fromEntries(fields.map(one => [one.key, valueOf(one)]));
  const decisive = () => JSON.stringify(fields.filter(one => !one.keepsPlan).map(valueOf));
  const isReady = () => !isBusy && (!plan || planned === decisive());

  // Shows what can be pressed now, and takes back a plan that does not fit the fields.
  function update() {
    const isPlanned = planned === decisive();
    if (plan && !isPlanned) {
      planned = '';
      shown.replaceChildren(soft(isBusy ? 'Loading the plan' : `${action} can be used once the plan is shown.`));
      planner.className = 'main';
    } else if (plan) planner.className = '';
    if (isReady()) main.removeAttribute('aria-disabled');
    else main.setAttribute('aria-disabled', 'true');
    main.className = plan && !isPlanned ? '' : `main ${danger ? 'danger' : ''}`;
  }

  async function run(work, then) {
    isBusy = true;
    said.className = said.textContent = '';
    form.querySelectorAll('[id^=wrong-]').forEach(wrong => {
      wrong.className = 'small';
      wrong.textContent = '';
    });
    form.querySelectorAll('[aria-invalid]').forEach(input => input.removeAttribute('aria-invalid'));
    update();
    try {
      then(await work(valuesOf()));
    } catch (error) {
      refuse(error);
    }
    isBusy = false;
    update();
  }

  function refuse(error) {
    const input = form.elements[error.key], wrong = $(`wrong-${error.key}`);
    if (input && wrong) {
      input.setAttribute('aria-invalid', 'true');
      wrong.className = 'refused small';
      wrong.textContent = error.message;
      return input.focus();
    }
    said.className = 'refused';
    said.textContent = plain(error);
    for (const {key, offeredAt} of fields) {
      if (offeredAt && offeredAt(error)) form.elements[key].parentNode.hidden = false;
    }
    return said.scrollIntoView({block: 'nearest'});
  }

  function showPlan() {
    if (isBusy) return;
    const asked = decisive();
    planned = '';
    run(plan, answer => {
      shown.replaceChildren(...h('div', null, planParts(answer)).childNodes);
      planned = asked; // where a field was changed meanwhile, update() takes it back
      main.scrollIntoView({block: 'nearest'});
    });
  }

  function act() {
    if (!isReady()) return update();
    return run(submit, news => {
      $('said').textContent = `${action}: done`;
      if (form.isConnected) dialog.close();
      if (form.isConnected && news) tell(...news);
      poll();
    });
  }

  const form = h('form', {class: 'stack', novalidate: true, oninput: event => {
    update();
    if (plan && event.target.type === 'checkbox') showPlan();
  }, onsubmit: event => {
    event.preventDefault();
    if (byEnter) act();
  }}, h('h2', {id: 'ask-title', tabindex: '-1'}, name), text && h('p', null, text), fields.map(field), said, shown,
  row(planner, main, button('Close', () => dialog.close())));
  show(form);
  update();
  if (plan && plansAtOnce) showPlan();
}

// Says in a dialog what came of something.
function tell(name, ...words) {
  show(h('div', {class: 'stack'}, h('h2', {id: 'ask-title', tabindex: '-1'}, name), words,
    row(button('Close', () => $('ask').close()))));
}

// The focus goes to the first field, else to the heading: never to a button that does something.
function show(content) {
  const dialog = $('ask');
  dialog.replaceChildren(content);
  if (!dialog.open) dialog.showModal();
  (content.querySelector('input:not([type=checkbox]), textarea') || content.querySelector('h2')).focus();
}

// -- the loop: look, draw, wait; and the addresses -------------------------------------------------------

const ROUTES = [[/^releases$/, releasesView], [/^releases\/\d+$/, releaseView], [/^nodes$/, nodesView],
  [/^health$/, healthView]];
let view = null, place = '', query = {}, turn = 0, timer = 0, freshAt = 0;
let trouble = '', missing = '', isShutOut = false;

function route() {
  const [asked, rest] = (location.hash.replace(/^#\/?/, '') || 'releases').split('?'), before = place;
  query = Object.fromEntries(new URLSearchParams(rest || ''));
  if (asked !== before) {
    const found = ROUTES.find(([pattern]) => pattern.test(asked));
    place = asked;
    known = new Map();
    missing = found ? '' : `There is no page ${asked}.`;
    view = found ? found[1](asked) : {name: 'Not here', load: async () => {}};
    fill($('main'), [soft('Looking')]);
    window.scrollTo(0, 0);
    if (before) $('main').focus();
  }
  poll();
}

async function poll() {
  clearTimeout(timer);
  if (isShutOut && $('ask').open) return; // somebody is at the token: let them
  const mine = ++turn, shown = view;
  try {
    await loadPulse();
    await shown.load(query);
    if (mine !== turn) return;
    shown.isLoaded = true;
    freshAt = Date.now();
    trouble = '';
    isShutOut = false;
  } catch (error) {
    if (mine !== turn) return;
    isShutOut = error.httpStatus === 401;
    if (isShutOut) return void askForToken(error.message);
    if (error.httpStatus === 404) missing = error.message;
    else trouble = plain(error);
  }
  render();
  const isBusy = trouble || !pulse || pulse.health.releases.length > 0;
  timer = setTimeout(poll, document.hidden ? HIDDEN_MS : isBusy ? BUSY_MS : IDLE_MS);
}

function render() {
  const [tone, headline, , about] = verdict();
  fill($('nav'), VIEWS.map(([path, word]) => h('a', {href: `#/${path}`,
    'aria-current': place.startsWith(path) && 'page'}, word)));
  fill($('pulse'), [h('a', {class: `chip ${tone}`, href: `#/${about}`}, mark(tone), headline),
    h('span', {class: 'soft number', id: 'age'}, ageParts())]);
  const heading = `${headline} | ${view.name}`;
  if (document.title !== heading) {
    document.title = $('said').textContent = heading;
    document.querySelector('link[rel=icon]').href = icon(tone);
  }
  document.body.className = trouble ? 'stale' : '';
  $('trouble').hidden = !trouble;
  $('trouble').textContent = trouble && `${trouble} Trying again`;
  if (missing) fill($('main'), [title('Not here'), h('p', null, missing)]);
  else if (view.isLoaded && pulse) fill($('main'), [view.draw(query)]);
  drawNode();
}

function drawNode() {
  const dialog = $('node'), isAsked = query.node && view.drawNode && view.isLoaded;
  const detail = isAsked && view.drawNode(Number(query.node));
  if (detail) fill(dialog, [detail]);
  if (!detail) dialog.close();
  else if (!dialog.open) dialog.showModal();
}

const ageParts = () => freshAt ? [h('span', {class: 'word'}, 'updated '), `${span(Date.now() - freshAt)} ago`] : [];

function icon(tone) {
  const [colour, shape] = {
    ok: ['1a7038', 'M4 8.5l3 3 5-7'], bad: ['ba1b23', 'M5 5l6 6M11 5l-6 6'], busy: ['0a55c4', 'M6 4.5l5 3.5-5 3.5z'],
    warn: ['855000', 'M8 4v5M8 11.2v.6'], unknown: ['566171', 'M5 8h6'],
  }[tone];
  return 'data:image/svg+xml,' + encodeURIComponent('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
    + `<rect width="16" height="16" rx="4" fill="#${colour}"/>`
    + `<path d="${shape}" stroke="white" stroke-width="2" fill="none"/></svg>`);
}

$('node').onclose = () => { if (query.node) location.hash = `#/${place}`; };
window.onhashchange = route;
window.ononline = poll;
document.onvisibilitychange = () => { if (!document.hidden) poll(); };
setInterval(() => { if ($('age')) $('age').replaceChildren(...ageParts()); }, 1000);
route();
</script>
</body>
</html>
"""


def page_headers() -> dict[str, str]:
    """Gives the headers of PAGE: its own script and style by their hashes, its own origin, nothing else."""
    script, style = (hashlib.sha256(PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()).digest()
                     for tag in ("script", "style"))
    return {
        "Content-Security-Policy": "; ".join((
            "default-src 'none'", f"script-src 'sha256-{base64.b64encode(script).decode()}'",
            f"style-src 'sha256-{base64.b64encode(style).decode()}'", "connect-src 'self'", "img-src data:",
            "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")),
        "Referrer-Policy": "no-referrer"}


# ======================================================================================
# 14 HTTP: one connection's bytes against limits and deadlines, and who may stay when the house
#    is full (docs/SECURITY.md tells why). Uses 1, 2, 9 and 10; knows no route and no database.
#
#    The library's own parser is not used: it takes two lengths, a space before a colon, bare
#    line feeds, and so runs requests that a proxy before us never saw.
# ======================================================================================

MAX_TARGET_BYTES, MAX_REQUEST_HEAD_BYTES, MAX_HEADERS = 8 << 10, 16 << 10, 64
# All deadlines are of the whole thing: dripping does not stretch them. Who has not shown a good
# token has PROVE_S, from the connection or the last answer to the end of the (TLS handshake and)
# head; who has, may be idle for IDLE_S and then has HEAD_S. For the body BODY_S, for our answer
# WRITE_S; then the rest of what the client still sends is dropped for LINGER_S.
PROVE_S, HEAD_S, BODY_S, WRITE_S, IDLE_S, LINGER_S = 5.0, 5.0, 20.0, 20.0, 60.0, 1.0
MAX_LINGER_BYTES = 16 << 20
# After a refused request with a longer body the connection is closed.
MAX_SKIPPED_BYTES = 64 << 10
# Nobody loses a connection to a newcomer before it was silent for so long.
GRACE_S = 0.25
# Answered before the connection is closed without a thread, so many at a time.
MAX_TURNED_AWAY = 64
# The more bad tokens came from an address, or from the network around it, the later the next token is looked at;
# forgotten after a while. A token that was good at the address within KNOWN_TOKEN_S is looked at without delay.
FREE_ATTEMPTS, FREE_ATTEMPTS_OF_NETWORK, FIRST_DELAY_S, MAX_DELAY_S = 3, 24, 0.1, 3.0
FORGET_S, MAX_STREAKS = 60.0, 2048
KNOWN_TOKEN_S, MAX_KNOWN_TOKENS = 86400.0, 4096

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# RFC 9112, 3 and 5, without what it allows for old times' sake: no folding, no bare CR or LF.
REQUEST_LINE = re.compile(rf"({_TOKEN}{{1,32}}) ([!-\"$-~]+) HTTP/([0-9])\.([0-9])".encode())
HEADER_LINE = re.compile(rf"({_TOKEN}+):[ \t]*([\t -~\x80-\xff]*)".encode("latin-1"))
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(:[0-9]{0,5})?")
# Headers that we act on: two of one kind are two meanings.
READ_ONCE = frozenset(("host", "content-length", "transfer-encoding", "content-type", "authorization", "expect",
                       "idempotency-key", "if-none-match", "origin", "x-request-id"))


class Head(NamedTuple):
    """The head of a request; names of headers are in lower case."""
    method: str = "GET"
    target: str = ""
    is_http_1_0: bool = False
    headers: Mapping[str, str] = {}

    @property
    def is_last(self) -> bool:
        """Says whether the client wants the connection closed after this one."""
        words = self.headers.get("connection", "").lower().split(",")
        return self.is_http_1_0 or "close" in map(str.strip, words)


class Wire:
    """The bytes of one connection; every wait ends at a moment of the monotonic clock."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self._timed = TimedSocket(sock, 0.0, MAX_BODY_BYTES)
        self.buffer = bytearray()

    def fill(self, ends_at: float) -> bool:
        """Waits for bytes; False when the client has ended. AppError 4008 when time is up."""
        self._timed.ends_at, self._timed.received = ends_at, 0
        try:
            data = converse(self._timed.recv(65536))
        except socket.timeout:
            raise AppError(4008, "the request did not come in time") from None
        except OSError:
            return False
        self.buffer += data
        return bool(data)

    def line(self, ends_at: float, max_bytes: int, too_long: int) -> bytes | None:
        """Gives the next line without its CRLF, None at the client's end; AppError 2002, 4008, too_long."""
        while True:
            end = self.buffer.find(b"\n") + 1
            line = bytes(self.buffer[:end or len(self.buffer)])
            text = line[:-2] if end else line[:-1]  # without its end, the last byte may be a CR before a LF
            if b"\r" in text or b"\0" in line or (end and not line.endswith(b"\r\n")):
                raise AppError(2002, "a line of the head holds a bare CR, a bare LF or a NUL")
            if len(line) > max_bytes:
                raise AppError(too_long, f"the request's head is too large: at most {MAX_TARGET_BYTES >> 10} KiB for "
                               f"its first line, {MAX_REQUEST_HEAD_BYTES >> 10} KiB and {MAX_HEADERS} headers in all")
            if end:
                del self.buffer[:end]
                return text
            if not self.fill(ends_at):
                if line:
                    raise AppError(2002, "the request ends within its head")
                return None

    def take(self, count: int, ends_at: float) -> bytes:
        """Gives so many bytes; AppError 2002 when the client ends before them, 4008."""
        while len(self.buffer) < count:
            if not self.fill(ends_at):
                raise AppError(2002, "the body is shorter than its Content-Length")
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    def send(self, data: bytes) -> None:
        """Sends all of it within WRITE_S; OSError else."""
        self._timed.ends_at = time.monotonic() + WRITE_S
        converse(self._timed.sendall(data))


def read_head(wire: Wire, ends_at: float) -> Head | None:
    """Reads the head of a request, None at the client's end; AppError 2002, 4008, 4014, 4031, 5005."""
    line = wire.line(ends_at, MAX_TARGET_BYTES, 4014)
    if line is None:
        return None
    first = REQUEST_LINE.fullmatch(line)
    if not first:
        raise AppError(2002, "the first line of the request is not METHOD ADDRESS HTTP/1.1")
    if first[3] != b"1" or first[4] not in b"01":
        raise AppError(5005, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    left, headers = MAX_REQUEST_HEAD_BYTES - len(line), dict[str, str]()
    for number in range(MAX_HEADERS + 1):
        line = wire.line(ends_at, left if number < MAX_HEADERS else 2, 4031)
        if line is None:
            raise AppError(2002, "the request ends within its head")
        if not line:
            break
        left -= len(line) + 2
        _add_header(headers, line)
    head = Head(first[1].decode(), first[2].decode(), first[4] == b"0", headers)
    if not HOST.fullmatch(headers.get("host", "" if head.is_http_1_0 else " ")):
        raise AppError(2002, "the request needs one header Host, a name or an address")
    return head


def _add_header(headers: dict[str, str], line: bytes) -> None:
    match = HEADER_LINE.fullmatch(line)
    if not match:
        shown = one_line(line.partition(b":")[0].decode("latin-1"), 40)  # not its value: that may be a token
        raise AppError(2002, f"the header {shown!r} is not NAME: VALUE in one line")
    name, value = match[1].decode().lower(), match[2].decode("latin-1").strip(" \t")
    if name in headers and name in READ_ONCE:
        raise AppError(2002, f"the header {name} stands twice")
    headers[name] = f"{headers[name]}, {value}" if name in headers else value


def body_length(head: Head, max_bytes: int) -> int:
    """Gives the length of the body that follows a head; AppError 2002, 4013, 5004 when that is not plain."""
    text = head.headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", text):
        raise AppError(2002, "Content-Length must be a number")
    if "transfer-encoding" in head.headers:
        if "content-length" in head.headers:
            raise AppError(2002, "Content-Length and Transfer-Encoding exclude each other")
        raise AppError(5004, "Transfer-Encoding is not taken: send Content-Length")
    if int(text) > max_bytes:
        raise AppError(4013, f"the body is over {max_bytes} bytes (HTTP_MAX_BODY_BYTES)")
    return int(text)


def network_of(host: str) -> str:
    """Gives what counts as one address: IPv4 as it is, of IPv6 the network of 64 bits."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def wide_network_of(address: str) -> str:
    """Return the network around what network_of() gives: of IPv4 24 bits, of IPv6 48."""
    network = ipaddress.ip_network(address)
    return str(network.supernet(new_prefix=24 if network.version == 4 else 48))


@dataclasses.dataclass(eq=False)
class Seat:
    """One connection that has a thread. At rest it waits for something; at work it is never taken."""
    sock: socket.socket
    address: str
    since: float
    is_new: bool = True
    is_proven: bool = False
    # Whose token it has shown, and whether that is a viewer's; "" where there are no tokens.
    token: str = ""
    is_viewer: bool = False
    is_at_work: bool = False
    # A request of it is under way, or its answer: a clean stop lets it be answered.
    is_owed: bool = False


class Seats:
    """Who is connected: so many in all, so many of one address, so many with one token.

    When these are used up a newcomer takes the seat of who rests longest, first of those that have
    shown no good token, first of the address that has most. So silence holds nobody out, and there
    is room for /healthz and for tokens. Where all are at work, there is none. At work is only who
    keeps the interpreter busy: who waits for a body, an event or a turn is at rest.

    Viewers have at most half of all, and half of what an address may have, so that they leave an
    operator room everywhere. A viewer's token has a quarter of all, an operator's half.
    """

    def __init__(self, limit: int, limit_per_address: int, farewell: bytes):
        """farewell is sent to a connection that loses its seat before it said anything."""
        self._limit, self._limit_per_address, self._farewell = limit, limit_per_address, farewell
        self._guard = threading.Lock()
        self._seats: set[Seat] = set()

    def take(self, sock: socket.socket, host: str) -> Seat | None:
        """Gives a seat, if need be another's; None when there is none to take."""
        address, now = network_of(host), time.monotonic()
        with self._guard:
            held = collections.Counter(seat.address for seat in self._seats)
            is_crowd = held[address] >= self._limit_per_address
            if is_crowd or len(self._seats) >= self._limit:
                rivals = [s for s in self._seats if not s.is_at_work and now - s.since > GRACE_S
                          and (s.address == address or not is_crowd)]
                if not rivals:
                    return None
                self._cut(min(rivals, key=lambda s: (s.is_proven, -held[s.address], s.since)))
            seat = Seat(sock, address, now)
            self._seats.add(seat)
            return seat

    def _cut(self, seat: Seat) -> None:
        self._seats.discard(seat)
        with contextlib.suppress(OSError):
            if seat.is_new and self._farewell:
                seat.sock.send(self._farewell)  # nothing was sent before: it fits, and does not wait
            # not SSLSocket.shutdown: it takes the encryption away from under the other thread
            socket.socket.shutdown(seat.sock, socket.SHUT_RDWR)

    def encrypt(self, seat: Seat, context: ssl.SSLContext) -> None:
        """Puts TLS on a seat's connection; the handshake is not done yet."""
        with self._guard:
            seat.sock = context.wrap_socket(seat.sock, server_side=True, do_handshake_on_connect=False)

    def identify(self, seat: Seat, is_proven: bool, token: str = "", is_viewer: bool = False) -> bool:
        """Note whose token a seat has shown; return False when they have too many, and all of them are at work.

        Too many: the one of them that rests longest is closed in favour of this one.
        """
        with self._guard:
            if token and not self._make_room(seat, self._quotas(seat, token, is_viewer)):
                is_proven, token = False, ""
            seat.is_proven, seat.token, seat.is_viewer = is_proven, token, is_viewer and bool(token)
            return is_proven

    def _make_room(self, seat: Seat, quotas: Iterable[tuple[int, Callable[[Seat], bool]]]) -> bool:
        for limit, is_peer in quotas:
            peers = [s for s in self._seats if s is not seat and is_peer(s)]
            if len(peers) >= limit:
                resting = [s for s in peers if not s.is_at_work and time.monotonic() - s.since > GRACE_S]
                if not resting:
                    return False
                self._cut(min(resting, key=lambda s: s.since))
        return True

    def _quotas(self, seat: Seat, token: str, is_viewer: bool) -> list[tuple[int, Callable[[Seat], bool]]]:
        quotas: list[tuple[int, Callable[[Seat], bool]]] = [
            (max(1, self._limit // (4 if is_viewer else 2)), lambda s: s.token == token)]
        if is_viewer:
            quotas += [(max(1, self._limit // 2), lambda s: s.is_viewer),
                       (max(1, self._limit_per_address // 2), lambda s: s.is_viewer and s.address == seat.address)]
        return quotas

    def work(self, seat: Seat) -> bool:
        """Notes that a seat's request is here; False when the seat was taken before."""
        with self._guard:
            seat.is_at_work, seat.is_owed, seat.is_new = True, True, False
            return seat in self._seats

    def rest(self, seat: Seat, is_owed: bool = False, since: float | None = None) -> None:
        """Note that a seat waits: for its client to ask or to take its answer, for a body, an event or its turn."""
        with self._guard:
            seat.is_at_work, seat.is_owed = False, is_owed
            seat.since = time.monotonic() if since is None else since

    def leave(self, seat: Seat) -> None:
        """Closes a seat's connection."""
        with self._guard:
            self._seats.discard(seat)
            _close(seat.sock)

    def end_all(self, within_s: float) -> None:
        """Ends the connections at rest at once; those that answer have so many seconds to do it."""
        ends_at = time.monotonic() + within_s
        self._shut(lambda seat: socket.SHUT_RD if seat.is_owed else socket.SHUT_RDWR)
        while self._seats and time.monotonic() < ends_at:
            time.sleep(0.02)
        self._shut(lambda _seat: socket.SHUT_RDWR)

    def _shut(self, how: Callable[[Seat], int]) -> None:
        with self._guard:
            for seat in self._seats:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(seat.sock, how(seat))


def has_hung_up(sock: socket.socket, within_s: float) -> bool:
    """Waits so many seconds, less when the client ends its side or loses its seat; says whether it did."""
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)  # not POLLIN: what it sends meanwhile means nothing
    return bool(poller.poll(round(within_s * 1000)))


def say_goodbye(sock: socket.socket) -> None:
    """Ends a connection, and drops what still comes: a reset would take our answer away (RFC 9112, 9.6)."""
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


class Streaks:
    """How often something came in a row, by a key; forgotten after FORGET_S without it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._seen: collections.OrderedDict[tuple[str, ...], tuple[int, float]] = collections.OrderedDict()

    def add(self, *key: str) -> int:
        """Count one more; return how many there are."""
        with self._guard:
            count = self._count(key) + 1
            self._seen.pop(key, None)
            self._seen[key] = (count, time.monotonic())
            if len(self._seen) > MAX_STREAKS:
                self._seen.popitem(last=False)
            return count

    def count(self, *key: str) -> int:
        """Return how many there are."""
        with self._guard:
            return self._count(key)

    def _count(self, key: tuple[str, ...]) -> int:
        count, last = self._seen.get(key, (0, 0.0))
        return count if time.monotonic() - last < FORGET_S else 0


def is_logged(count: int) -> bool:
    """Return whether one of a streak is logged: the 1st, 2nd, 4th, 8th, ..., so that nobody fills the log."""
    return count & (count - 1) == 0


class AuthThrottle:
    """Bad tokens, by address and by the network around it: how late the next token is looked at.

    The wait comes before the look: who hangs up meanwhile has learnt nothing, and so gains nothing. A token that was
    good at the address before does not wait, so that nobody is slowed down by another's bad tokens but once a day.
    """

    def __init__(self) -> None:
        self._bad = Streaks()
        self._guard = threading.Lock()
        self._good: collections.OrderedDict[tuple[str, bytes], float] = collections.OrderedDict()

    def delay_s(self, address: str, authorization: str) -> float:
        """Return the seconds from a request's arrival to the look at its token."""
        with self._guard:
            if time.monotonic() - self._good.get(self._key(address, authorization), -KNOWN_TOKEN_S) < KNOWN_TOKEN_S:
                return 0.0
        beyond = max(self._bad.count(address) - FREE_ATTEMPTS,
                     self._bad.count(wide_network_of(address)) - FREE_ATTEMPTS_OF_NETWORK)
        return min(FIRST_DELAY_S * 2.0**min(beyond, 10), MAX_DELAY_S) if beyond >= 0 else 0.0

    def note_good(self, address: str, authorization: str) -> None:
        """Remember a good token."""
        key = self._key(address, authorization)
        with self._guard:
            self._good.pop(key, None)
            self._good[key] = time.monotonic()
            if len(self._good) > MAX_KNOWN_TOKENS:
                self._good.popitem(last=False)

    def note_bad(self, address: str) -> tuple[int, bool]:
        """Count a bad token; return the how manieth of its address it is, and whether that is to be logged."""
        count, of_network = self._bad.add(address), self._bad.add(wide_network_of(address))
        return count, is_logged(count) and (of_network <= FREE_ATTEMPTS_OF_NETWORK or is_logged(of_network))

    @staticmethod
    def _key(address: str, authorization: str) -> tuple[str, bytes]:
        return address, hashlib.sha256(authorization.encode("utf-8", "surrogateescape")).digest()


# ======================================================================================
# 15 API: routes as a table, handlers, tokens, /openapi.json (contract section 5). Uses 1 to 14;
#    knows no socket.
# ======================================================================================

VIEWER, OPERATOR, ANYONE = "viewer", "operator", ""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,128}")
# Who waits for events looks so often, for this process may not have made them.
EVENTS_LOOK_S, MAX_EVENTS_WAIT_S = 0.5, 30
# A look whether the database takes writes is a write: not more often, whoever asks.
READY_LOOK_S = 1.0
# What a claim or hold means that lies further ahead than any setting allows (Store.times_ahead).
CLOCK_WAS_AHEAD = ("further ahead than any setting allows: a clock was ahead. It counts as over; look at the clocks of "
                   "all hosts (NTP)")
# A look that lasts longer makes the answer "not ready", whatever was seen last.
READY_WAIT_S = 10.0
# While it is not ready, the log says why so often.
READY_TOLD_S = 60.0
# A release of more nodes is read whole by one client at a time. While one runs, the next one is read only after so
# many times as long as the reading took. Of each role so few wait for their turn, and so long: then they are told to
# come again.
MAX_FREE_READ_NODES, WHOLE_READ_REST, MAX_WHOLE_READ_REST_S = 500, 15, 3.0
MAX_WHOLE_READ_QUEUE, WHOLE_READ_WAIT_S, WHOLE_READ_LOOK_S = 4, 7.0, 0.05


class Request(NamedTuple):
    """A request as a handler sees it: checked, and with who asks.

    is_over waits so many seconds, and says whether nobody waits for the answer any more; its connection is at rest
    meanwhile. role is ANYONE for who has shown no good token.
    """
    ids: tuple[int, ...]
    query: Mapping[str, str]
    body: Mapping[str, Any]
    actor: str
    key: str | None = None
    is_over: Callable[[float], bool] = lambda _within_s: True
    role: str = OPERATOR

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Gives a number of the query; AppError 2002 for what is none, 2003 out of range."""
        text = self.query.get(name, str(default))
        if not re.fullmatch(r"-?[0-9]{1,4000}", text):  # int() itself has a limit of 4300 digits
            raise AppError(2002, f"{name} {one_line(text, 40)!r} is not a number")
        if not low <= int(text) <= high:
            raise AppError(2003, f"{name} must be from {low} to {high}")
        return int(text)


class Reply(NamedTuple):
    """A status, and what goes into the envelope's data; with a content type a whole document."""
    status: int
    data: Any
    content_type: str = ""
    headers: Mapping[str, str] = {}


class Turns:
    """Who reads a whole release: one at a time, operators first; few wait, at rest (see Seats)."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_taken = False
        self._free_at = 0.0
        self._waiting = collections.Counter[str]()

    def take(self, request: Request) -> bool:
        """Wait for the turn of a request, up to WHOLE_READ_WAIT_S; return whether it came."""
        with self._guard:
            if self._is_free(request.role):
                self._is_taken = True
                return True
            if self._waiting[request.role] >= MAX_WHOLE_READ_QUEUE:
                return False
            self._waiting[request.role] += 1
        ends_at, is_mine = time.monotonic() + WHOLE_READ_WAIT_S, False
        try:
            while not is_mine and time.monotonic() < ends_at and not request.is_over(WHOLE_READ_LOOK_S):
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

    def leave(self, rest_s: float) -> None:
        """End a turn; the next one begins after so many seconds."""
        with self._guard:
            self._is_taken, self._free_at = False, time.monotonic() + rest_s


# What a process without an executor knows of its health.
NO_PROCESS: Mapping[str, Any] = {"executor": {"enabled": False, "owner": "", "lastLookAt": None}, "certificates": []}


class Api:
    """The handlers of the routes: a Request in, a Reply out, AppError for everything else."""

    def __init__(self, store: Store, nudge: Callable[[], None] = lambda: None, max_waiting: int = 32,
                 process: Callable[[], Mapping[str, Any]] = lambda: NO_PROCESS,
                 is_busy: Callable[[], bool] = lambda: False,
                 figures: Callable[[], Figures] = lambda: {}, hung: Callable[[], str] = lambda: ""):
        """nudge is called after every act, so that an executor in this process looks at once.

        process gives what only the process knows of its health: executor and certificates;
        figures what of that is for /metrics.
        is_busy says whether it drives a release now, which a reading of whole releases must not slow down.
        hung gives a sentence on a thread of this process that hangs, "" for none.
        max_waiting: how many may wait for events; further ones are answered at once.
        """
        self.store = store
        self._nudge = nudge
        self._process = process
        self._is_busy = is_busy
        self._whole_reads = Turns()
        self._figures = figures
        self._hung = hung
        self._waiters = threading.BoundedSemaphore(max_waiting)
        self._ready_guard = threading.Lock()
        self._ready = (-READY_LOOK_S, "the database was not looked at yet")
        self._ahead: set[str] = set()
        # Since when somebody waits for the database, to find out.
        self._looking_since = float("inf")
        self._ready_told = -READY_TOLD_S
        self.started_at = time.time()

    def create_release(self, request: Request) -> Reply:
        wanted = parse_release_request(request.body)
        self._once(request)  # a key that can't be used is told in any case
        if parse_flag("dryRun", request.body.get("dryRun", False)):
            return Reply(200, plan_json(self.store.plan_release(wanted)))
        made = self.store.create_release(wanted, request.actor, self._once(request))
        self._nudge()
        return Reply(201, created_json(made))

    @staticmethod
    def _once(request: Request, what: str = "") -> Once | None:
        """Return a request's Idempotency-Key with what was asked: `what` tells apart what takes the same body."""
        if request.key is None:
            return None
        if not IDEMPOTENCY_KEY.fullmatch(request.key):
            raise AppError(2003, "Idempotency-Key must be 1 to 128 printable characters without a space")
        asked = (what + json.dumps(request.body, sort_keys=True)).encode()
        return Once(request.actor, request.key, hashlib.sha256(asked).hexdigest())

    def list_releases(self, request: Request) -> Reply:
        status = request.query.get("status", "")
        if status:
            parse_choice("status", status, RELEASE_STATUSES)
        page = self.store.releases(status, request.integer("page", 1, 1, 10**9),
                                   request.integer("pageSize", 20, 1, MAX_PAGE_SIZE))
        return Reply(200, page_json(page, release_json))

    def get_release(self, request: Request) -> Reply:
        view = parse_choice("view", request.query.get("view", "full"), ("full", "summary"))
        if view == "summary":
            return Reply(200, {"release": release_json(self.store.release(request.ids[0]))})
        return Reply(200, self._whole_release(request))

    def _whole_release(self, request: Request) -> dict[str, Any]:
        """Return a release with its nodes; a large one only one at a time, with a rest while a release runs.

        All threads of this process share one interpreter: clients that read in a loop would take most of it.
        """
        release_id = request.ids[0]
        if self.store.release(release_id).total_nodes <= MAX_FREE_READ_NODES:
            return release_with_nodes_json(*self.store.release_with_nodes(release_id))
        if not self._whole_reads.take(request):
            raise AppError(4029, "too many read whole releases: ask for ?view=summary", retry_after_s=5)
        began, rest_s = time.thread_time(), 0.0
        try:
            data = release_with_nodes_json(*self.store.release_with_nodes(release_id))
            if self._is_busy():
                rest_s = min(WHOLE_READ_REST * (time.thread_time() - began), MAX_WHOLE_READ_REST_S)
            return data
        finally:
            self._whole_reads.leave(rest_s)

    def pause(self, request: Request) -> Reply:
        return self._act("pause", request)

    def resume(self, request: Request) -> Reply:
        accepts = parse_flag("acceptFailures", request.body.get("acceptFailures", False))
        return self._act("resume", request, "acceptFailures", accept_failures=accepts)

    def cancel(self, request: Request) -> Reply:
        force = parse_flag("force", request.body.get("force", False))
        return self._act(CANCEL_BY_FORCE if force else "cancel", request, "force")

    def _act(self, verb: str, request: Request, *keys: str, **more: bool) -> Reply:
        reason = self._reason(request, *keys)
        release = self.store.act(verb, request.ids[0], request.actor, reason, **more)
        self._nudge()
        return Reply(200, release_json(release))

    def retry(self, request: Request) -> Reply:
        return self._again("retry", self.store.retry, request)

    def rollback(self, request: Request) -> Reply:
        return self._again("rollback", self.store.rollback, request, "toRelease")

    def _again(self, verb: str, make: Callable[[int, str, Again, Once | None], Made], request: Request,
               *keys: str) -> Reply:
        body, release_id = request.body, request.ids[0]
        wish = Again(self._reason(request, "overNewer", "dryRun", *keys),
                     parse_flag("overNewer", body.get("overNewer", False)),
                     parse_release_id("toRelease", body["toRelease"]) if "toRelease" in body else None)
        once = self._once(request, f"{verb} {release_id} ")
        if parse_flag("dryRun", body.get("dryRun", False)):
            return Reply(200, plan_json(self.store.plan_again(verb, release_id, wish)))
        reply = Reply(201, created_again_json(make(release_id, request.actor, wish, once)))
        self._nudge()
        return reply

    @staticmethod
    def _reason(request: Request, *more_keys: str) -> str:
        known_keys(request.body, ("reason", *more_keys))
        return parse_text("reason", request.body.get("reason", ""))

    def get_freeze(self, _request: Request) -> Reply:
        return Reply(200, freeze_json(self.store.freeze()))

    def set_freeze(self, request: Request) -> Reply:
        reason = self._reason(request, "frozen")
        if "frozen" not in request.body:
            raise AppError(2001, "frozen is missing")
        freeze = self.store.set_freeze(parse_flag("frozen", request.body["frozen"]), request.actor, reason)
        self._nudge()
        return Reply(200, freeze_json(freeze))

    def list_events(self, request: Request) -> Reply:
        after, limit = request.integer("after", 0, 0, MAX_ID), request.integer("limit", 100, 1, 1000)
        wait_s = request.integer("wait", 0, 0, MAX_EVENTS_WAIT_S)
        ends_at = time.monotonic() + wait_s
        may_wait = wait_s > 0 and self._waiters.acquire(blocking=False)
        try:
            while True:
                events = self.store.events(request.ids[0], after, limit)
                left_s = ends_at - time.monotonic()
                if events or not may_wait or left_s <= 0 or request.is_over(min(EVENTS_LOOK_S, left_s)):
                    return Reply(200, {"items": [event_json(event) for event in events]})
        finally:
            if may_wait:
                self._waiters.release()

    def list_nodes(self, request: Request) -> Reply:
        page = self.store.nodes(request.integer("page", 1, 1, 10**9),
                                request.integer("pageSize", 20, 1, MAX_PAGE_SIZE))
        if parse_choice("lastRelease", request.query.get("lastRelease", "0"), ("0", "1")) == "0":
            return Reply(200, page_json(page, node_json))
        last = self.store.last_releases([node.id for node in page.items])
        return Reply(200, page_json(page, lambda node: listed_node_json(node, last.get(node.id))))

    def add_node(self, request: Request) -> Reply:
        return Reply(201, node_json(self.store.add_node(**parse_node_fields(request.body, ("name", "mainIp")))))

    def get_node(self, request: Request) -> Reply:
        return Reply(200, node_json(self.store.node(request.ids[0])))

    def update_node(self, request: Request) -> Reply:
        return Reply(200, node_json(self.store.update_node(request.ids[0], parse_node_fields(request.body))))

    def delete_node(self, request: Request) -> Reply:
        self.store.delete_node(request.ids[0])
        return Reply(200, None)

    def page(self, _request: Request) -> Reply:
        return Reply(200, PAGE, "text/html; charset=utf-8", page_headers())

    def overview(self, request: Request) -> Reply:
        message, schema, releases = "", 0, []
        try:
            schema, releases = self.store.database.schema_version(), self.store.open_releases()
        except DatabaseError as error:
            message = error.message
        database = {"engine": self.store.database.engine.name, "ok": not message, "schema": schema, "message": message}
        return Reply(200, {"version": __version__, "startedAt": utc_text(self.started_at), "role": request.role,
                           "database": database,
                           **open_releases_json(releases), **self._process()})

    def health(self, _request: Request) -> Reply:
        return Reply(200, {"status": "ok"})

    def ready(self, request: Request) -> Reply:
        if self._ready_guard.acquire(blocking=False):  # else somebody is looking: what was seen last holds
            try:
                if time.monotonic() - self._ready[0] >= READY_LOOK_S:
                    self._looking_since = time.monotonic()
                    self._ready = (time.monotonic(), self._look_whether_ready())
            finally:
                self._looking_since = float("inf")
                self._ready_guard.release()
        waited_s = time.monotonic() - self._looking_since
        trouble = self._ready[1] or self._hung()
        if waited_s > READY_WAIT_S:
            trouble = f"the database has not answered for {waited_s:.0f} s"
        self._tell_ready(trouble)
        if trouble:
            raise DatabaseError(trouble if request.role else "not ready: the log of releasectl says why")
        return Reply(200, {"status": "ready"})

    def _look_whether_ready(self) -> str:
        try:
            self.store.database.require_schema()
            self.store.probe()
            self._tell_times_ahead()
            return ""
        except AppError as error:
            return error.message

    def _tell_ready(self, trouble: str) -> None:
        """Log now and then why we are not ready, and once that we are again: strangers are told neither."""
        if trouble and time.monotonic() - self._ready_told >= READY_TOLD_S:
            self._ready_told = time.monotonic()
            log.warning("not ready: %s", trouble)
        elif not trouble and self._ready_told > -READY_TOLD_S:
            self._ready_told = -READY_TOLD_S
            log.info("ready again")

    def _tell_times_ahead(self) -> None:
        """Log claims and holds that a clock that was ahead left, each once: they count as over, so all is ready."""
        ahead = set(self.store.times_ahead())
        for sentence in sorted(ahead - self._ahead):
            log.warning("%s, %s", sentence, CLOCK_WAS_AHEAD)
        self._ahead = ahead

    def metrics(self, _request: Request) -> Reply:
        return Reply(200, metrics_text(self.store, {**process_figures(self.started_at), **self._figures()}),
                     "text/plain; version=0.0.4; charset=utf-8")

    def openapi(self, _request: Request) -> Reply:
        return Reply(200, to_json(openapi_document()), "application/json")


def metrics_text(store: Store, more: Figures) -> str:
    """Gives /metrics: what the process counted, what the database has where it answers, and more."""
    figures = {("releasectl_build_info", __version__, ".".join(map(str, sys.version_info[:3]))): 1.0, **more}
    try:
        figures.update(store.counts())
        figures["releasectl_database_up",] = 1.0
    except DatabaseError:  # counted where it came up; what only this process knows is wanted all the more
        figures["releasectl_database_up",] = 0.0
    return store.database.metrics.text(figures)


class Route(NamedTuple):
    """One row of the API: {id} in the path is a number; headers are those that it heeds."""
    method: str
    path: str
    handler: str
    role: str
    summary: str
    answers: str
    query: tuple[str, ...] = ()
    body: str = ""
    # What it answers with 200 in place of 201.
    dry_run: str = ""
    headers: tuple[str, ...] = ()
    # For ANYONE, and tells more to who shows a good token.
    tells_more: bool = False

    @property
    def status(self) -> int:
        """The HTTP status of its success."""
        return 201 if self.answers in ("Created", "CreatedAgain") or self.body == "NewNode" else 200


ROUTES: tuple[Route, ...] = (
    Route("POST", "/api/v1/releases", "create_release", OPERATOR, "Create a release for the online nodes",
          "Created", body="NewRelease", headers=("Idempotency-Key",), dry_run="Plan"),
    Route("GET", "/api/v1/releases", "list_releases", VIEWER, "List releases, newest first", "ReleaseList",
          ("status", "page", "pageSize"), headers=("If-None-Match",)),
    Route("GET", "/api/v1/releases/{id}", "get_release", VIEWER, "A release and its nodes by batch",
          "ReleaseWithNodes", ("view",), headers=("If-None-Match",)),
    Route("POST", "/api/v1/releases/{id}/pause", "pause", OPERATOR, "Dispatch nothing more until resume", "Release",
          body="Act"),
    Route("POST", "/api/v1/releases/{id}/resume", "resume", OPERATOR, "Go on", "Release", body="Resume"),
    Route("POST", "/api/v1/releases/{id}/cancel", "cancel", OPERATOR, "End it: what is in flight is waited for",
          "Release", body="Cancel"),
    Route("POST", "/api/v1/releases/{id}/retry", "retry", OPERATOR,
          "A new release of its payload for its failed and skipped nodes", "CreatedAgain", body="Retry",
          headers=("Idempotency-Key",), dry_run="Plan"),
    Route("POST", "/api/v1/releases/{id}/rollback", "rollback", OPERATOR,
          "A new release that brings back what the nodes that it touched had before", "CreatedAgain", body="Rollback",
          headers=("Idempotency-Key",), dry_run="Plan"),
    Route("GET", "/api/v1/releases/{id}/events", "list_events", VIEWER, "Its history, oldest first", "EventList",
          ("after", "limit", "wait")),
    Route("GET", "/api/v1/nodes", "list_nodes", VIEWER, "List nodes", "NodeList",
          ("page", "pageSize", "lastRelease")),
    Route("POST", "/api/v1/nodes", "add_node", OPERATOR, "Add a node", "Node", body="NewNode"),
    Route("GET", "/api/v1/nodes/{id}", "get_node", VIEWER, "A node", "Node"),
    Route("PATCH", "/api/v1/nodes/{id}", "update_node", OPERATOR, "Change a node", "Node", body="NodeChange"),
    Route("DELETE", "/api/v1/nodes/{id}", "delete_node", OPERATOR, "Delete a node that no release names", "Null"),
    Route("GET", "/api/v1/freeze", "get_freeze", VIEWER, "Is anything new dispatched", "Freeze"),
    Route("PUT", "/api/v1/freeze", "set_freeze", OPERATOR, "Let nothing new be dispatched, or again", "Freeze",
          body="SetFreeze"),
    Route("GET", "/api/v1/health", "overview", VIEWER, "What this process and its releases are at", "Health"),
    Route("GET", "/", "page", ANYONE, "The dashboard", "html"),
    Route("GET", "/healthz", "health", ANYONE, "The process serves", "Status"),
    Route("GET", "/readyz", "ready", ANYONE, "The database can be used", "Status", tells_more=True),
    Route("GET", "/metrics", "metrics", VIEWER, "Figures for Prometheus", "text"),
    Route("GET", "/openapi.json", "openapi", VIEWER, "This document", "json"),
)
METHODS = frozenset(("HEAD", *(route.method for route in ROUTES)))
_PATTERNS = [(re.compile(re.escape(r.path).replace(r"\{id\}", "([^/]+)")), r) for r in ROUTES]


def find_route(method: str, path: str) -> tuple[Route, tuple[int, ...]]:
    """Gives the route of a request and the numbers in its path; AppError 3001, 4005 or 2002."""
    found = [(route, match.groups()) for pattern, route in _PATTERNS
             for match in [pattern.fullmatch(path)] if match]
    if not found:
        raise AppError(3001, f"there is no {one_line(path, 100)} here: see /openapi.json")
    wanted = "GET" if method == "HEAD" else method
    for route, texts in found:
        if route.method == wanted:
            return route, tuple(parse_id(text) for text in texts)
    allowed = [route.method for route, _ in found]
    allow = ", ".join(allowed + (["HEAD"] if "GET" in allowed else []))
    raise AppError(4005, f"{one_line(method, 20)} is not for {one_line(path, 100)}: it takes {allow}", allow=allow)


def parse_id(text: str) -> int:
    """Gives the id of a release or node; AppError 2002 when it is not a number."""
    if not re.fullmatch(r"[0-9]{1,4000}", text):
        raise AppError(2002, f"id {one_line(text, 40)!r} is not a number")
    return int(text)


class Tokens:
    """The API's tokens from a file of name:role:sha256 lines, read anew when it changes."""

    def __init__(self, path: str):
        self._path = path
        self._guard = threading.Lock()
        self._stamp: object = None
        self._entries: list[tuple[str, str, str]] = []
        # Why they could not be read, as it was told last.
        self._said = ""

    def load(self) -> list[tuple[str, str, str]]:
        """Gives name, role and hash of each token; ConfigError naming the line that is wrong."""
        with self._guard:
            stamp = _file_stamp(self._path)
            if stamp != self._stamp or stamp is None:
                self._entries = self._read()
                self._stamp = stamp
            return self._entries

    def reload(self) -> int:
        """Read the file anew; return how many tokens it has. Raise ConfigError as load() does."""
        with self._guard:
            self._stamp = None
        return len(self.load())

    def _read(self) -> list[tuple[str, str, str]]:
        require_private("API_TOKENS_FILE", self._path)
        try:
            lines = Path(self._path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"API_TOKENS_FILE {self._path} can't be read: {_os_reason(error)}") from None
        entries = []
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            match = re.fullmatch(f"([^:]+):({VIEWER}|{OPERATOR}):([0-9a-fA-F]{{64}})", line)
            if not match:
                raise ConfigError(f"API_TOKENS_FILE {self._path}:{number}: must be NAME:viewer:SHA256 or "
                                  "NAME:operator:SHA256, with the token's SHA-256 in hexadecimal")
            entries.append((one_line(match[1], 100), match[2], match[3].lower()))
        return entries

    def who(self, authorization: str | None) -> tuple[str, str]:
        """Gives name and role for an Authorization header; AppError 1001, 1002, or 5001 without a good file."""
        scheme, _, token = (authorization or "").partition(" ")
        if not authorization or scheme.lower() != "bearer" or not token.strip():
            raise AppError(1001, "no token: send the header Authorization: Bearer TOKEN")
        try:
            entries = self.load()
        except ConfigError as error:
            if str(error) != self._said:  # not at each request
                log.error("nobody is let in: %s", error)
            self._said = str(error)
            raise AppError(5001, "the tokens can't be read: see the log of releasectl") from None
        self._said = ""
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for name, role, known in entries:
            if hmac.compare_digest(known, digest):
                found = name, role
        if found is None:
            raise AppError(1002, "this token is not known")
        return found


def add_token(path: str, name: str, role: str) -> str:
    """Adds a token to a file of tokens, all of it or nothing; gives the token, which is stored nowhere.

    Raises AppError 3002 when the name has one, ConfigError for a file that can't be read or written.
    """
    if ":" in name or name.startswith("#"):
        raise AppError(2003, f"name {one_line(name, 60)!r} must not hold a colon or begin with #")
    token = secrets.token_hex(32)
    line = f"{parse_name(name)}:{role}:{hashlib.sha256(token.encode()).hexdigest()}\n"
    folder = os.path.dirname(os.path.realpath(path))
    try:
        guard = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)  # of two at a time the second sees the first one's line
            before = os.stat(path) if os.path.exists(path) else None
            if before and name in [entry[0] for entry in Tokens(path).load()]:
                raise AppError(3002, f"{name} has a token in {path} already: delete its line first, or take a new name")
            text = Path(path).read_text(encoding="utf-8") if before else ""
            _replace(path, text + ("\n" if text and not text.endswith("\n") else "") + line, before)
            os.fsync(guard)
        finally:
            os.close(guard)
    except OSError as error:
        raise ConfigError(f"API_TOKENS_FILE {path} can't be written: {_os_reason(error)}") from None
    return token


def _replace(path: str, text: str, before: os.stat_result | None, mode: int = 0o600) -> None:
    """Put a file in the place of another, with its owner, group and mode; one without before has the mode given.

    A symbolic link stays one: what it leads to is replaced.
    """
    path = os.path.realpath(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file")  # a device, say, which a rename would take away
    descriptor, temporary = tempfile.mkstemp(prefix=".releasectl-", dir=os.path.dirname(path))
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            if before:
                os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(before.st_mode) if before else mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# -- /openapi.json: made from ROUTES and the shapes, so that it can't drift ------------------

# Parameter of a query: its schema.
QUERY_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "status": {"type": "string", "enum": ["", *RELEASE_STATUSES]},
    "page": {"type": "integer", "minimum": 1, "maximum": 10**9, "default": 1},
    "pageSize": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": 20},
    "view": {"type": "string", "enum": ["full", "summary"], "default": "full"},
    "lastRelease": {"type": "string", "enum": ["0", "1"], "default": "0"},
    "after": {"type": "integer", "minimum": 0, "maximum": MAX_ID, "default": 0},
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
    "wait": {"type": "integer", "minimum": 0, "maximum": MAX_EVENTS_WAIT_S, "default": 0,
             "description": "seconds to wait for an event when there is none yet"},
}
# Header of a request: its schema.
HEADER_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "X-Request-Id": {"type": "string", "description": "taken over when it is 1 to 64 letters, digits or . _ -"},
    "If-None-Match": {"type": "string", "description": "an ETag that the client has"},
    "Idempotency-Key": {"type": "string", "pattern": "^[!-~]{1,128}$", "description":
                        "the same key and body again within a day give the first answer again"},
}
# Header of an answer: the HTTP statuses that carry it, and its schema.
ANSWER_HEADERS: Mapping[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "Allow": ((405,), _TEXT),
    "Retry-After": ((429, 503), _TEXT),
    "WWW-Authenticate": ((401,), _TEXT),
    "ETag": ((304,), _TEXT),
}
# What every request may be answered, whatever it asks: see floor 14.
ANY_STATUS = (400, 405, 408, 413, 414, 431, 500, 501, 503, 505)


def _statuses(route: Route) -> list[int]:
    """Gives the HTTP statuses of errors of a route."""
    found = [*ANY_STATUS]
    found += [401, 403, 429] if route.role else []
    found += [404] if "{id}" in route.path else []
    found += [409] if route.role == OPERATOR else []
    found += [415] if route.body else []
    return sorted(found)


def _answer_headers(status: int) -> dict[str, Any]:
    names = ["X-Request-Id", *(name for name, (statuses, _) in ANSWER_HEADERS.items() if status in statuses)]
    return {name: {"schema": ANSWER_HEADERS[name][1] if name in ANSWER_HEADERS else _TEXT,
                   "required": name != "X-Request-Id"} for name in names}


def _success(answers: str, description: str, headers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    envelope = _object({"code": {"const": 0}, "message": {"const": "success"}, "data": _ref(answers)})
    documents: dict[str, dict[str, Any]] = {
        "text": {"text/plain": {"schema": _TEXT}}, "html": {"text/html": {"schema": _TEXT}},
        "json": {"application/json": {"schema": {"type": "object"}}}}
    return {"description": description, "headers": headers or _answer_headers(200),
            "content": documents.get(answers, {"application/json": {"schema": envelope}})}


def _operation(route: Route) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [{"name": "id", "in": "path", "required": True, "schema": _ID}] \
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
        "operationId": route.handler, "summary": route.summary, "parameters": parameters,
        "security": [{"token": []}] if route.role else [], "responses": dict(sorted(responses.items()))}
    if route.dry_run:
        operation["responses"]["200"] = _success(route.dry_run, "what it would do")
    if route.body:
        operation["requestBody"] = {"required": route.body in ("NewNode", "SetFreeze"),
                                    "content": {"application/json": {"schema": _ref(route.body)}}}
    return operation


def openapi_document() -> dict[str, Any]:
    """Gives the OpenAPI 3.1 description of ROUTES."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    statuses = sorted({status for route in ROUTES for status in _statuses(route)})
    error = {"application/json": {"schema": _ref("Error")}}
    return {"openapi": "3.1.0", "info": {"title": "releasectl", "version": __version__}, "paths": paths,
            "components": {"schemas": openapi_schemas(),
                           "responses": {str(status): {"description": http.HTTPStatus(status).phrase, "content": error,
                                                       "headers": _answer_headers(status)} for status in statuses},
                           "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}}


# ======================================================================================
# 16 Server: a request from its first byte to its answer, who asks, TLS, the listener and its
#    threads. Uses 1 to 15.
# ======================================================================================

class Identity(NamedTuple):
    """Who asks, as the history names them, and what they may do."""
    actor: str
    role: str
    # The token's name, "" where there are no tokens.
    token: str = ""


class ClientGone(Exception):
    """Nobody waits for an answer: the client has hung up, or its connection was closed in favour of another."""


class HttpAnswer(NamedTuple):
    """What is sent: status, headers, body."""
    status: int
    headers: Mapping[str, str]
    body: bytes


def answer_of(reply: Reply, route: Route, head: Head) -> HttpAnswer:
    """Gives the answer to a request that went well: 304 where the client has it already."""
    text = reply.data if reply.content_type else to_json({"code": 0, "message": "success", "data": reply.data})
    body = text.encode(errors="backslashreplace")  # the path of a database may be any bytes
    headers = {"Content-Type": reply.content_type or "application/json", **reply.headers}
    if "If-None-Match" in route.headers:
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        known = [tag.strip().replace("W/", "", 1) for tag in head.headers.get("if-none-match", "").split(",")]
        if headers["ETag"] in known or "*" in known:
            return HttpAnswer(304, {"ETag": headers["ETag"]}, b"")
    return HttpAnswer(reply.status, headers, body)


def refusal_of(error: AppError) -> HttpAnswer:
    """Gives the answer to a request that did not go well."""
    headers = {"Content-Type": "application/json"}
    if error.allow:
        headers["Allow"] = error.allow
    if error.retry_after_s:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    text = to_json({"code": error.code, "message": one_line(error.message), "data": None})
    return HttpAnswer(error.http_status, headers, text.encode())


class ApiHandler(http.server.BaseHTTPRequestHandler):
    """One connection: the library writes the heads of answers, floor 14 reads requests."""

    protocol_version = request_version = "HTTP/1.1"
    server: ApiServer

    def __init__(self, seat: Seat, client_address: Any, server: ApiServer):
        self.seat, self.certificate_name = seat, ""
        # What the handshake's client certificate was verified by, and until when it is good.
        self.trust, self.trusted_until = "", float("inf")
        super().__init__(seat.sock, client_address, server)

    def setup(self) -> None:
        # else an answer waits for the acknowledgement of TLS 1.3's tickets, 40 ms
        self.seat.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.server.tls:
            context, self.trust = self.server.tls.current()
            self.server.seats.encrypt(self.seat, context)
            sock = self.seat.sock
            assert isinstance(sock, ssl.SSLSocket)
            sock.settimeout(PROVE_S)  # which OpenSSL's handshake takes as a whole
            sock.do_handshake()
            certificate = sock.getpeercert() or {}
            self.certificate_name = _name_in(certificate)
            if certificate:
                self.trusted_until = min(certificate_end(certificate), crl_end_of(
                    sock.getpeercert(binary_form=True) or b"", self.server.client_ca, self.trust))
        self.wire = Wire(self.seat.sock)

    def handle(self) -> None:
        while self._serve_one():
            pass

    def finish(self) -> None:
        """Leaves the goodbye to the server, which says it also after a handshake that failed."""

    def _serve_one(self) -> bool:
        """Serves one request; says whether the connection stays."""
        self.close_connection = True  # until a request was understood to its end
        self.head, self.actor, self.request_id = Head(), "", secrets.token_hex(8)
        self.route: Route | None = None
        self.ids: tuple[int, ...] = ()
        self.unread_bytes, self.is_ending = 0, False  # ending: whatever becomes of the request, its connection closes
        try:
            if not self._read_head():
                return False
            answer = self._answer()
        except ClientGone:
            return False
        except AppError as error:
            self._keep_connection()
            answer = refusal_of(error)
        except Exception:  # the edge of a request
            log.exception("%s %s failed, request %s", self.head.method, self._path, self.request_id)
            answer = refusal_of(AppError(5001, "releasectl itself failed: see its log"))
        self.close_connection |= self.server.is_stopping or self.is_ending
        self._tell(answer)
        self.server.seats.rest(self.seat, is_owed=True)  # who does not read may lose the seat
        self._send(answer)
        self.server.seats.rest(self.seat)
        return not self.close_connection and self._skip_body()

    @property
    def _path(self) -> str:
        return one_line(self.head.target.partition("?")[0], 200)

    def _read_head(self) -> bool:
        """Waits for the next request; False when none comes, or the seat is another's."""
        seat = self.seat
        ends_at = time.monotonic() + IDLE_S if seat.is_proven else seat.since + PROVE_S
        with contextlib.suppress(AppError):  # who says nothing is told nothing
            while not self.wire.buffer and self.wire.fill(ends_at):
                pass
        if not self.wire.buffer:
            return False
        head = read_head(self.wire, time.monotonic() + HEAD_S if seat.is_proven else ends_at)
        if head is None or not self.server.seats.work(seat):
            return False
        self.head, self.began = head, time.monotonic()
        asked_id = head.headers.get("x-request-id", "")
        if REQUEST_ID.fullmatch(asked_id):
            self.request_id = asked_id
        return True

    def _answer(self) -> HttpAnswer:
        head = self.head
        self.unread_bytes = body_length(head, self.server.max_body_bytes)
        self.close_connection = head.is_last or self.unread_bytes > 0  # until the body was read, too
        path, _, query = head.target.partition("?")
        self.route, self.ids = route, ids = find_route(head.method, path)
        identity = self._identify(route)
        if route.role:
            assert identity is not None
            self._require_role(identity, route.role)
        fields = self._query(query, route)
        body = self._body(self._read_body(route))
        request = Request(ids, fields, body, self.actor, head.headers.get("idempotency-key"), self._is_over,
                          identity.role if identity else ANYONE)
        return answer_of(getattr(self.server.api, route.handler)(request), route, head)

    # -- who asks: all of this before a byte of the body is waited for ---------------------

    def _identify(self, route: Route) -> Identity | None:
        """Return who asks, None where that does not matter; raise AppError 1001, 1002, 1004, 4029, 5001, 5003."""
        server, seat = self.server, self.seat
        if not route.role and not route.tells_more:
            server.seats.identify(seat, False)
            return None
        if self._is_distrusted():
            self.is_ending = True
            raise AppError(5003, "what client certificates are verified by has changed or expired: connect again",
                           retry_after_s=1)
        authorization = self.head.headers.get("authorization", "")
        if server.tokens and authorization:
            self._wait_for_token(authorization)
        identity, refusal = server.who(self.head, self.certificate_name)
        if refusal and refusal.code == 1002:
            self._note_bad_token()
        elif identity and server.tokens:
            server.throttle.note_good(seat.address, authorization)
        if identity and not server.seats.identify(seat, True, identity.token, identity.role == VIEWER):
            self.is_ending = True
            refusal = AppError(4029, f"{identity.token} has as many connections at work as one token, or all viewers "
                                     "here, may have: come back in a moment", retry_after_s=1)
            identity = None
        elif not identity:
            self.is_ending = seat.is_proven  # its token is gone
            server.seats.identify(seat, False)
        if refusal and route.role:
            raise refusal
        return identity

    def _is_distrusted(self) -> bool:
        """Return whether the connection's client certificate or its CRL has expired, or its CA or CRL is another."""
        tls = self.server.tls
        return tls is not None and (time.time() > self.trusted_until or tls.current()[1] != self.trust)

    def _wait_for_token(self, authorization: str) -> None:
        """Wait at rest while the address has sent too many bad tokens; raise ClientGone when the client does not."""
        throttle, address = self.server.throttle, self.seat.address
        while (left_s := self.began + throttle.delay_s(address, authorization) - time.monotonic()) > 0:
            if self._rest(left_s):
                raise ClientGone

    def _note_bad_token(self) -> None:
        count, is_to_be_logged = self.server.throttle.note_bad(self.seat.address)
        if is_to_be_logged:
            log.warning("bad token from %s, the %d. in a row, request %s", self.client_address[0], count,
                        self.request_id)

    def _require_role(self, identity: Identity, role: str) -> None:
        self.actor = identity.actor
        if role == OPERATOR and identity.role != OPERATOR:
            raise AppError(1004, f"{identity.actor} has the role {identity.role}: this needs {OPERATOR}")

    # -- waiting: at rest, so that the seat is there for whoever needs it ------------------

    def _rest(self, within_s: float) -> bool:
        """Wait so many seconds; return whether there is nobody to answer any more: it hung up, or lost its seat."""
        self.server.seats.rest(self.seat, is_owed=True, since=self.began)
        has_gone = has_hung_up(self.seat.sock, within_s)
        return not self.server.seats.work(self.seat) or has_gone

    def _is_over(self, within_s: float) -> bool:
        """Do _rest(); return whether the wait is to end: also when we stop, or who asks is let in no more."""
        return self._rest(within_s) or self.server.is_stopping or self._is_distrusted() or (
            self.server.who(self.head, self.certificate_name)[0] is None)

    def _read_body(self, route: Route) -> bytes:
        """Return the body; wait for it at rest. Raise AppError 2002, 4008, 4015, before it where that can be said."""
        length, wire, seats = self.unread_bytes, self.wire, self.server.seats
        if not length:
            return b""
        if not route.body:
            raise AppError(2002, f"{route.method} {route.path} takes no body")
        content_type = self.head.headers.get("content-type", "").split(";")[0].strip().lower()
        if content_type != "application/json":
            raise AppError(4015, "the body must be JSON: send Content-Type: application/json")
        if len(wire.buffer) < length:
            seats.rest(self.seat, is_owed=True)
            if self.head.headers.get("expect", "").lower() == "100-continue":
                with contextlib.suppress(OSError):
                    wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.unread_bytes = 0  # from here on nobody else takes it: an error in the middle of it ends the connection
        raw = wire.take(length, time.monotonic() + BODY_S)
        if not seats.work(self.seat):
            raise ClientGone
        self.close_connection = self.head.is_last
        return raw

    def _keep_connection(self) -> None:
        """Let the connection stay after a refusal where the body is there, or is small, and somebody's whom we know."""
        is_short = (bool(self.actor) or self.seat.is_proven) and "expect" not in self.head.headers and (
            self.unread_bytes <= MAX_SKIPPED_BYTES)
        if self.unread_bytes and (is_short or self.unread_bytes <= len(self.wire.buffer)):
            self.close_connection = self.head.is_last

    def _skip_body(self) -> bool:
        """Drop the body of a refused request; return whether it came to its end soon."""
        with contextlib.suppress(AppError):
            self.wire.take(self.unread_bytes, time.monotonic() + LINGER_S)
            return True
        return False

    @staticmethod
    def _query(text: str, route: Route) -> dict[str, str]:
        try:
            pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=20, errors="strict")
        except ValueError:
            raise AppError(2002, "the query can't be read") from None
        known_keys(dict(pairs), route.query)
        if len(dict(pairs)) != len(pairs):
            raise AppError(2002, "a parameter of the query stands twice")
        return dict(pairs)

    @staticmethod
    def _body(raw: bytes) -> Mapping[str, Any]:
        if not raw:
            return {}
        try:
            body = parse_json(raw)
        except ValueError as error:
            raise AppError(2002, f"the body is not JSON: {one_line(error, 150)}") from None
        if not isinstance(body, dict):
            raise AppError(2002, "the body must be a JSON object")
        return body

    def _send(self, answer: HttpAnswer) -> None:
        self.wfile = io.BytesIO()  # head and body leave together, within one deadline
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != http.HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Request-Id", self.request_id)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.head.method != "HEAD":
            self.wfile.write(answer.body)
        self.wire.send(self.wfile.getvalue())

    def _tell(self, answer: HttpAnswer) -> None:
        """Count a request; log what a known caller changed, or asked to be changed, all else for debugging.

        Of requests in a row that one caller was refused only the 1st, 2nd, 4th, ... is logged.
        """
        path, method = self.route.path if self.route else OTHER, self.head.method
        self.server.api.store.database.metrics.count("releasectl_api_requests_total", path,
                                                     method if method in METHODS else OTHER, str(answer.status))
        level, in_a_row = logging.INFO if self.actor and method not in ("GET", "HEAD") else logging.DEBUG, ""
        if level == logging.INFO and answer.status >= http.HTTPStatus.BAD_REQUEST:
            count = self.server.refused.add(self.actor, str(answer.status))
            level = level if is_logged(count) else logging.DEBUG
            in_a_row = f", the {count}. in a row" if count > 1 else ""
        release = self.ids[0] if path.startswith("/api/v1/releases/{id}") else None
        log.log(level, "%s %s: %d, by %s at %s, request %s%s", method, self._path, answer.status,
                self.actor or "-", self.client_address[0], self.request_id, in_a_row,
                extra=about(release=release, actor=self.actor, request_id=self.request_id))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Does nothing: see _tell()."""

    def version_string(self) -> str:
        return "releasectl"


def _name_in(certificate: Mapping[str, Any]) -> str:
    """Gives the common name of a verified client certificate, else its first other name."""
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    names += [value for _, value in certificate.get("subjectAltName", ())]
    return one_line(names[0], 100) if names else ""


class ApiServer(http.server.ThreadingHTTPServer):
    """The listener: it only gives seats to connections; a seat's thread does all the rest, TLS too.

    The threads are a bounded pool's, in place of one made for each connection without a limit.
    """

    request_queue_size = 1024

    def __init__(self, settings: Settings, api: Api):
        """Bind the address; raise ConfigError when it can't be, or is open to others without tokens or TLS."""
        host, port = settings.http_addr
        self.api = api
        self.max_body_bytes = settings.http_max_body_bytes
        self.throttle, self.refused = AuthThrottle(), Streaks()
        self.is_stopping = False
        self.tokens = Tokens(settings.api_tokens_file) if settings.api_tokens_file else None
        if self.tokens:
            self.tokens.load()
        self.client_ca = settings.http_client_ca
        self.tls = TlsFiles(server_context, settings.http_cert, settings.http_key,
                            settings.http_client_ca) if settings.http_cert else None
        if self.tls:
            self.tls.context()
        self._farewell = b"" if self.tls else _canned(
            AppError(5003, "every connection is taken: come back in a moment", retry_after_s=1))
        self.seats = Seats(settings.http_max_connections, settings.http_max_connections_per_address, self._farewell)
        self._workers = ThreadPoolExecutor(settings.http_max_connections, "api")
        self._turned_away: collections.deque[tuple[float, socket.socket]] = collections.deque()
        try:
            self.address_family, address = listening_address(settings)
            exposure = exposure_of(settings, address)
            if exposure:
                log.warning("%s", exposure)
            super().__init__((address, port), ApiHandler)
        except OSError as error:
            raise ConfigError(f"HTTP_ADDR {host}:{port} can't be listened on: {_os_reason(error)}") from None

    def server_bind(self) -> None:
        """Binds without the look-up of a name, which may take long on a host without DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    # -- in the accept thread: nothing here waits ------------------------------------------

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.05)  # no file descriptor is left: the loop would spin, as the listener stays ready
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.exception("connection of %s could not be taken", client_address[0])

    def process_request(self, request: Any, client_address: Any) -> None:
        seat = self.seats.take(request, client_address[0])
        if seat is None:
            self._turn_away(request)
            return
        try:
            self._workers.submit(self._serve, seat, client_address)
        except RuntimeError as error:  # the system gives no more threads
            log.error("no thread for a connection: %s", error)
            self.seats.leave(seat)

    def _turn_away(self, sock: socket.socket) -> None:
        """Answers 503 at once; over TLS, which would need a handshake first, it just closes."""
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(self._farewell)
            sock.shutdown(socket.SHUT_WR)
        self._turned_away.append((time.monotonic() + LINGER_S, sock))

    def service_actions(self) -> None:
        """Closes those that were turned away once they had the time to read why."""
        while self._turned_away and (len(self._turned_away) > MAX_TURNED_AWAY
                                     or self._turned_away[0][0] < time.monotonic()):
            sock = self._turned_away.popleft()[1]
            with contextlib.suppress(OSError):
                sock.recv(65536)  # what was not read would make a reset of the close
            _close(sock)

    # -- in a seat's thread ----------------------------------------------------------------

    def _serve(self, seat: Seat, client_address: Any) -> None:
        try:
            ApiHandler(seat, client_address, self)
        except (OSError, ConfigError) as error:
            log.debug("%s: connection ended: %s", client_address[0], one_line(error))
        except Exception:  # the edge of a connection
            log.exception("connection of %s failed", client_address[0])
        finally:
            self.seats.rest(seat, since=0.0)  # it was answered: whoever needs the seat has it
            say_goodbye(seat.sock)
            self.seats.leave(seat)

    def who(self, head: Head, certificate_name: str) -> tuple[Identity, None] | tuple[None, AppError]:
        """Return who asks, or why that can't be said: what needs no token is served all the same.

        Without a token file everybody on this host is an operator. A client certificate names the
        actor; the role is the token's.
        """
        try:
            if not self.tokens:
                _refuse_strangers(head)
                return Identity(certificate_name or "api", OPERATOR), None
            name, role = self.tokens.who(head.headers.get("authorization"))
        except AppError as error:
            return None, error
        return Identity(certificate_name or name, role, name), None

    def server_close(self) -> None:
        """Stops listening, lets the requests at work be answered, and ends all connections."""
        super().server_close()
        self.is_stopping = True
        self.seats.end_all(STOP_GRACE_S)
        self._workers.shutdown()
        while self._turned_away:
            _close(self._turned_away.popleft()[1])


def _canned(error: AppError) -> bytes:
    """Gives a whole answer for who gets no thread."""
    status, headers, body = refusal_of(error)
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in headers.items()),
             f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


def listening_address(settings: Settings) -> tuple[socket.AddressFamily, str]:
    """Return the address that HTTP_ADDR means; raise OSError when it means none."""
    host, port = settings.http_addr
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError:  # an empty label, or one of more than 63 characters
        raise OSError("that is no host name") from None
    return family, str(target[0])


def exposure_of(settings: Settings, address: str) -> str:
    """Return what to warn of when the API listens on an address, "" for nothing; raise ConfigError where it may not."""
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
    return f"HTTP_PLAIN=1: {shown} is plain HTTP: whoever is on the way to the TLS proxy can read the tokens"


# By what a proxy shows itself; and X-Forwarded-anything.
PROXY_HEADERS = frozenset(("forwarded", "via", "x-real-ip"))


def _refuse_strangers(head: Head) -> None:
    """Raise AppError 1004 for what a browser sent for another site's page, or a proxy for another host.

    Without tokens nothing else would tell them from the person at this host.
    """
    host = head.headers.get("host", "").lower()
    name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
    for header in head.headers:
        if header in PROXY_HEADERS or header.startswith("x-forwarded"):
            raise AppError(1004, f"without API_TOKENS_FILE nothing is served through a proxy ({one_line(header, 40)})")
    is_foreign = head.headers.get("sec-fetch-site", "none").lower() not in ("same-origin", "none")
    with contextlib.suppress(ValueError):
        if name not in ("", "localhost"):
            ipaddress.ip_address(name.strip("[]"))
        origin = head.headers.get("origin", f"http://{host}").lower()
        if not is_foreign and origin in (f"http://{host}", f"https://{host}"):
            return
    raise AppError(1004, "without API_TOKENS_FILE only this host's own address is served, and no other site's page")


def server_context(cert: str, key: str, client_ca: str) -> ssl.SSLContext:
    """Gives the API's TLS context; ConfigError naming what is wrong with the files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2; those of 1.3 are all sound
    context.options |= ssl.OP_NO_RENEGOTIATION
    load_pair(context, cert, key, ("HTTP_CERT", "HTTP_KEY"))
    require_private("HTTP_KEY", key)
    if client_ca:
        load_ca(context, client_ca, "HTTP_CLIENT_CA")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


# ======================================================================================
# 17 Check: what is wrong with this installation, and what would mend it. Uses 1 to 16.
# ======================================================================================

class Ping(NamedTuple):
    """What one agent answered to a ping."""
    node: Node
    is_ok: bool
    error_kind: str
    text: str


def ping_nodes(settings: Settings, nodes: Sequence[Node], key_may_be_open: bool = False) -> list[Ping]:
    """Ask agents all at once whether they answer. Raise ConfigError without certificates, or with an open key."""
    agents = AgentClient(settings)
    agents.prepare(key_may_be_open)

    def ping(node: Node) -> Ping:
        try:
            return Ping(node, True, "", agents.ping(Address(node.main_ip, node.agent_port, node.agent_protocol)))
        except AgentError as error:
            return Ping(node, False, error.kind, one_line(error.message))

    with ThreadPoolExecutor(settings.agent_concurrency) as pool:
        pings = list(pool.map(ping, nodes))
    agents.close()
    return pings


class Finding(NamedTuple):
    """One thing that check looked at: exit code 0 when it is well, and a sentence."""
    subject: str
    exit_code: int
    text: str


def _meet(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Gives both sides after a handshake in memory; ssl.SSLCertVerificationError where one refuses the other."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return sides


def control_certificate(settings: Settings) -> Mapping[str, Any]:
    """Gives our certificate as an agent sees it; ConfigError when the CA does not vouch for it."""
    cert, key, ca = settings.control_cert, settings.control_key, settings.control_ca
    ours = client_context(cert, key, ca)
    ours.check_hostname = False
    ours.verify_mode = ssl.CERT_NONE
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(cert, key, password=_no_passphrase)
    theirs.load_verify_locations(ca)
    theirs.verify_mode = ssl.CERT_REQUIRED
    try:
        return dict(_meet(ours, theirs)[1].getpeercert() or {})
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"CONTROL_CERT {cert}: {error.verify_message}; agents will refuse it") from None


def api_certificate(settings: Settings) -> Mapping[str, Any]:
    """Gives the API's certificate as a client sees it that trusts just this one; ConfigError."""
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


def check_certificate(name: str, path: str, look: Callable[[], Mapping[str, Any]]) -> Finding:
    """Says until when a certificate is good, or why it is not."""
    try:
        expires = certificate_end(look())
    except ConfigError as error:
        return Finding(name, EXIT_USAGE, error.message)
    days = _days_until(expires)
    renew = ": renew it now" if days < 14 else ""
    return Finding(name, EXIT_DONE, f"{path} is good until {utc_text(expires)}, {days:.0f} days{renew}")


def check_crl(name: str, path: str) -> Iterator[Finding]:
    """Say until when the CRLs beside a CA are good, and which CAs have none; nothing where there is none."""
    try:
        pem = Path(path).read_text(encoding="latin-1")
        count, ends, bare = len(pem_blocks(pem, "X509 CRL")), crl_ends(pem), cas_without_crl(pem)
    except (OSError, ValueError) as error:
        yield Finding(f"{name} CRL", EXIT_USAGE, f"{path} can't be read: {one_line(error, 100)}")
        return
    if not count:
        return
    text, days = f"{path} holds {count} CRL{'s' if count > 1 else ''}", _days_until(min(ends, default=float("inf")))
    if days < 0:
        yield Finding(f"{name} CRL", EXIT_USAGE, f"{text}, expired since {utc_text(min(ends))}: every certificate of "
                                                 "its CA is refused; put a newer one there")
        return
    if ends:
        text += f", good until {utc_text(min(ends))}, {days:.0f} days" + (": fetch a newer one now" if days < 1 else "")
    if bare:
        text += f"; {bare} of its CAs have none: what these signed for a peer is refused"
    yield Finding(f"{name} CRL", EXIT_DONE, text)


def check_private(name: str, path: str) -> Finding:
    """Says whether a key is closed to others."""
    try:
        require_private(name, path)
    except ConfigError as error:
        return Finding(name, EXIT_USAGE, error.message)
    return Finding(name, EXIT_DONE, f"{path} is closed to others")


def _is_in_reach(path: str, of: int) -> bool:
    """Return whether a file has one of the modes, and its folders let everybody through to it."""
    found = os.path.realpath(path)
    if not os.stat(found).st_mode & of:
        return False
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in Path(found).parents)


def check_config(path: str) -> Iterator[Finding]:
    """Look at who may read and write the file of the settings: whoever writes it decides what goes out."""
    if not path:
        return
    url = dict(_read_config_file(path)).get("DATABASE_URL", "")  # not the one in use: another setting may win over it
    has_secret = safe_url(url) != url
    if os.stat(path).st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        yield Finding("--config", EXIT_USAGE, f"{path} is open to others, who may write it: chmod o-rwx,g-w it")
    elif has_secret and _is_in_reach(path, stat.S_IROTH):
        yield Finding("--config", EXIT_USAGE, f"{path} is open to others, and the database's password is in it: "
                                              "chmod o-rwx it (its group may read it)")
    else:
        yield Finding("--config", EXIT_DONE, f"{path} is closed to others" if has_secret else
                      f"{path} can be written by its owner alone")


def check_database_file(engine: SqliteEngine | PostgresEngine) -> Iterator[Finding]:
    """Look at who else may read or write the files of an SQLite database: the payloads are in them."""
    if not isinstance(engine, SqliteEngine):
        return
    for path in (engine.path, engine.path + "-wal", engine.path + "-shm"):
        with contextlib.suppress(OSError):  # not there; the database itself is told of
            if _is_in_reach(path, stat.S_IRWXO):
                yield Finding("DATABASE_URL", EXIT_USAGE, f"{path} is open to others: chmod o-rwx it")


def check_agents(settings: Settings) -> Iterator[Finding]:
    """Looks at what mutual TLS with the agents needs."""
    if not settings.mtls_enabled:
        yield Finding("MTLS_ENABLED", EXIT_DONE, "0: agents are called by plain HTTP, for a laboratory only")
        return
    missing = [name for name, path in (("CONTROL_CERT", settings.control_cert), ("CONTROL_KEY", settings.control_key),
                                       ("CONTROL_CA", settings.control_ca)) if not path]
    for name in missing:
        yield Finding(name, EXIT_USAGE, "not set: no agent can be called without it")
    if not missing:
        yield check_certificate("CONTROL_CERT", settings.control_cert, lambda: control_certificate(settings))
    if settings.control_ca:
        yield from check_crl("CONTROL_CA", settings.control_ca)
    if settings.control_key:
        yield check_private("CONTROL_KEY", settings.control_key)


def check_api(settings: Settings) -> Iterator[Finding]:
    """Looks at what the API needs."""
    if settings.api_tokens_file:
        try:
            yield Finding("API_TOKENS_FILE", EXIT_DONE, f"{len(Tokens(settings.api_tokens_file).load())} tokens")
        except ConfigError as error:
            yield Finding("API_TOKENS_FILE", EXIT_USAGE, error.message)
    else:
        yield Finding("API_TOKENS_FILE", EXIT_DONE, "not set: the API listens on loopback, for everybody on this host")
    try:
        exposure = exposure_of(settings, listening_address(settings)[1])
        if exposure:
            yield Finding("HTTP_ADDR", EXIT_DONE, exposure)
    except ConfigError as error:
        yield Finding("HTTP_ADDR", EXIT_USAGE, error.message)
    except OSError as error:
        yield Finding("HTTP_ADDR", EXIT_USAGE, "{}:{} can't be listened on: {}".format(*settings.http_addr,
                                                                                   _os_reason(error)))
    if settings.http_client_ca:
        yield from check_crl("HTTP_CLIENT_CA", settings.http_client_ca)
    if settings.http_cert:
        yield check_certificate("HTTP_CERT", settings.http_cert, lambda: api_certificate(settings))
        yield check_private("HTTP_KEY", settings.http_key)


def process_json(settings: Settings, executor: Executor) -> dict[str, Any]:
    """Gives what /api/v1/health tells of this process itself."""
    certificates = []
    if settings.mtls_enabled and settings.control_cert:
        certificates.append(certificate_json("CONTROL_CERT", lambda: control_certificate(settings)))
    if settings.http_cert:
        certificates.append(certificate_json("HTTP_CERT", lambda: api_certificate(settings)))
    return {"certificates": certificates, "executor": {
        "enabled": settings.release_executor_enabled, "owner": executor.owner,
        "lastLookAt": utc_text(executor.looked_at) if executor.looked_at else None}}


def certificate_json(name: str, look: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Gives until when a certificate is good; what is wrong with it is for who may read its files."""
    try:
        expires = certificate_end(look())
    except ConfigError:
        return {"name": name, "notAfter": None, "daysLeft": None, "message": "run releasectl.py check to see why"}
    return {"name": name, "notAfter": utc_text(expires), "daysLeft": round(_days_until(expires), 2), "message": ""}


def certificate_figures(settings: Settings) -> dict[tuple[str, ...], float]:
    """Return the ends of our certificates and CRLs for /metrics; of files that can't be read check tells more."""
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
    return figures


def check_database(settings: Settings, store: Store) -> Iterator[Finding]:
    """Looks at the database, and asks the agents of its enabled, online nodes."""
    engine = store.database.engine
    tls = f"; {engine.tls_text()}" if isinstance(engine, PostgresEngine) else ""
    try:
        store.database.require_schema()
        store.probe()
        yield Finding("DATABASE_URL", EXIT_DONE, f"{store.database}: schema {len(schema_steps())}, takes writes{tls}")
        yield from check_database_file(store.database.engine)
        for sentence in store.times_ahead():
            yield Finding("clock", EXIT_UNAVAILABLE, f"{sentence}, {CLOCK_WAS_AHEAD}")
        nodes = [node for node in store.nodes(size=0).items if node.gets_releases]
        try:
            refuse_twins(nodes)
        except AppError as error:
            yield Finding("nodes", EXIT_USAGE, error.message)
        for ping in ping_nodes(settings, nodes, key_may_be_open=True) if nodes else []:  # that is told of itself
            yield Finding(f"node {ping.node.name}", EXIT_DONE if ping.is_ok else EXIT_UNAVAILABLE, ping.text)
    except DatabaseError as error:
        yield Finding("DATABASE_URL", EXIT_UNAVAILABLE, error.message)
    except ConfigError:
        yield Finding("nodes", EXIT_USAGE, "not asked: without good certificates no agent answers")


# ======================================================================================
# 18 Screen: what a person sees in a terminal: columns, a release in one line, its progress
#   as it goes. Uses 1 to 17.
# ======================================================================================

def columns_of(text: str) -> int:
    """Return how many columns a printable text takes in a terminal: a Chinese letter two, an accent of its own none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.category(char) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(char) in "WF"
               else 1 for char in text)


def cut_to(text: str, columns: int) -> str:
    """Return as much of a printable text as fits into so many columns."""
    if columns_of(text) <= columns:
        return text
    ends = itertools.accumulate(columns_of(char) for char in text)
    return text[:sum(1 for end in ends if end <= columns)]


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """Gives rows as text in columns, or '' when there are none."""
    cells = [[one_line(cell) if cell is not None else "" for cell in row] for row in rows]
    if not cells:
        return ""
    widths = [max(columns_of(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    return "\n".join("  ".join(cell + " " * (width - columns_of(cell)) for cell, width in zip(row, widths)).rstrip()
                     for row in [[h.upper() for h in head], *cells])


def release_line(release: Release) -> str:
    """Return a release in one line for a terminal: people may have written the row by hand."""
    says_it = release.status_reason.startswith(release.status) or not release.status_reason
    text = release.status_reason or release.status if says_it else f"{release.status}, {release.status_reason}"
    return one_line(f"{release}: {text}", 2 * MAX_MESSAGE_CHARS)


class Screen:
    """Shows the progress of a release: drawn anew in a terminal, else a line for each step."""

    MARKS = ((SUCCESS, "#", "32"), (FAILED, "x", "31"), (RUNNING, ">", "36"), (SKIPPED, "-", "90"),
             (PENDING, ".", "0"))
    MAX_BATCHES, MAX_FAILURES = 12, 8

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._has_colours = self._is_terminal and not os.environ.get("NO_COLOR")
        self._drawn = 0
        self._said = ""

    def show(self, progress: Progress) -> None:
        """Shows where a release stands."""
        if self._is_terminal:
            self._draw(self._lines(progress))
            return
        release = progress.release
        # a sentence that only counts seconds is no step
        self._say(release_line(release), f"{release.status} {release.status_reason.partition(', slowest')[0]}")

    def say(self, line: str) -> None:
        """Shows what is wrong, once."""
        if self._is_terminal:
            self._draw([cut_to(one_line(line), self._size().columns - 1)])
        else:
            self._say(line, line)

    def _say(self, line: str, step: str) -> None:
        if step != self._said:
            print(line, file=self._stream, flush=True)
        self._said = step

    def _size(self) -> os.terminal_size:
        """Return the size of the terminal that is drawn in, which standard output may not be."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            found = os.get_terminal_size(self._stream.fileno())
            if found.columns > 0 and found.lines > 0:
                return found
        return shutil.get_terminal_size((100, 24))

    def _draw(self, lines: Sequence[str]) -> None:
        """Puts lines in the place of the last ones, as many as the screen has."""
        lines = lines[:max(self._size().lines - 1, 1)]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        print(up + "".join(f"\r\x1b[K{line}\n" for line in lines) + "\x1b[J", end="", file=self._stream, flush=True)
        self._drawn = len(lines)

    def _lines(self, progress: Progress) -> list[str]:
        width = max(self._size().columns - 1, 1)
        release, batches = progress.release, progress.batches
        at = max(release.current_batch or len(batches), 1)
        # the batches around the current one, where there are too many for the screen
        first = max(0, min(at - self.MAX_BATCHES // 2, len(batches) - self.MAX_BATCHES))
        lines = [cut_to(release_line(release), width)]
        lines += [self._batch_line(batch, width) for batch in batches[first:first + self.MAX_BATCHES]]
        if len(batches) > self.MAX_BATCHES:
            lines.append(cut_to(f"({len(batches)} batches in all)", width))
        lines.append(cut_to(f"{release.success_nodes} succeeded, {release.failed_nodes} failed, "
                            f"{release.skipped_nodes} skipped of {release.total_nodes}", width))
        shown = progress.failures[:self.MAX_FAILURES]
        lines += [self._paint(cut_to("  " + one_line(f"{name}: {text}"), width), "31") for name, text in shown]
        if release.failed_nodes > len(shown):
            lines.append(cut_to(f"  and {release.failed_nodes - len(shown)} more", width))
        return lines

    def _batch_line(self, batch: BatchProgress, width: int) -> str:
        """Gives one batch as a bar whose parts are as long as their share, rounded, and at least one mark."""
        done = f"batch {batch.number:>3} {batch.count(SUCCESS):>6} of {batch.total:<6} "
        room = min(40, width - len(done) - len(self.MARKS))  # rounding up makes each part longer by less than one
        if room < 1:
            return cut_to(done, width)
        parts = [(mark, colour, batch.count(status)) for status, mark, colour in self.MARKS]
        bar = ""
        for mark, colour, count in parts:
            length = max(1, round(room * count / batch.total)) if count else 0
            bar += self._paint(mark * length, colour) if length else ""
        return done + bar

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._has_colours else text


# ======================================================================================
# 19 Commands: what each command does (contract section 4). Uses 1 to 18.
# ======================================================================================

class Context:
    """What a command works with: options, settings, and the store when it is first asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        # what needs no settings runs with a broken file too
        self.settings = Settings.load(os.environ, options.config, options.db) if options.needs_settings \
            else Settings.load({})
        self.store = Store(Database(self.settings.database_url))
        self.actor = "cli:" + one_line(_user_name(), 60)

    def open(self, create: bool = False) -> Store:
        """Gives the store over a database of the right schema; create makes an empty one."""
        self.store.database.require_schema(create)
        return self.store

    def show(self, document: Any, text: str) -> None:
        """Print one JSON document with --json, else text for people."""
        out = to_json(document) if self.options.json else text
        if out:
            print(out, flush=True)


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def exit_code_of(store: Store, release: Release) -> int:
    """Return the exit code for how a release ended; 0 while it has not, 1 where too many failures paused it."""
    if release.is_terminal:
        return EXIT_DONE if release.status == SUCCESS else EXIT_NOT_SUCCESS
    is_exceeded = release.status == PAUSED and release.failed_nodes > 0 and store.exceeded(release.id)
    return EXIT_NOT_SUCCESS if is_exceeded else EXIT_DONE


# -- the processes ---------------------------------------------------------------------------

def command_serve(context: Context) -> int:
    settings = context.settings
    _survive_signals()
    warn_of_settings(settings)
    _raise_descriptor_limit()
    context.store.database.migrate()
    agents = AgentClient(settings, context.store.database.metrics)
    if settings.release_executor_enabled and (settings.control_cert or not settings.mtls_enabled):
        agents.prepare()
    executor = Executor(settings, context.store, agents)
    server = ApiServer(settings, Api(context.store, executor.nudge, settings.http_max_connections // 4,
                                     lambda: process_json(settings, executor), executor.is_busy,
                                     lambda: certificate_figures(settings), executor.hung))
    _handle_signals(executor.stop, lambda: _reload(settings, agents, server))
    manager, secret_files = ServiceManager(os.environ.get("NOTIFY_SOCKET", "")), SecretFiles(settings)
    accept = threading.Thread(target=server.serve_forever, name="accept", daemon=True)
    with starting_threads():
        accept.start()
    scheme = "https" if server.tls else "http"
    host, port = str(server.server_address[0]), server.server_address[1]
    log.info("serving %s://%s:%d, %s, executor %s", scheme, f"[{host}]" if ":" in host else host, port,
             context.store.database,
             "on" if settings.release_executor_enabled else "off (RELEASE_EXECUTOR_ENABLED=0)")

    def beat(sentence: str) -> None:
        secret_files.look()
        if accept.is_alive():
            manager.tell("WATCHDOG=1", f"STATUS={one_line(sentence)}")

    faulthandler.enable()  # the watchdog ends who hangs by SIGABRT: the log then tells where each thread was
    manager.tell("READY=1")  # the database answered migrate(), and the API listens
    try:
        if settings.release_executor_enabled:
            executor.run_loop(beat)
        while not executor.stopping.is_set():
            beat("API only, nothing is dispatched: RELEASE_EXECUTOR_ENABLED=0")
            executor.stopping.wait(settings.release_executor_interval_sec)
    finally:
        manager.tell("STOPPING=1")
        executor.close()  # first: what clients do must not keep a claim
        server.shutdown()
        server.server_close()
    log.info("stopped")
    return EXIT_DONE


def command_run_once(context: Context) -> int:
    _survive_signals()
    path = context.options.metrics_file
    try:
        code = _run_once(context)
    except BaseException:
        with contextlib.suppress(ConfigError):  # what went wrong first is what is to be told
            _write_metrics(context, path)
        raise
    _write_metrics(context, path)
    return code


# While a drain goes on, its figures are written so often.
METRICS_EVERY_S = 10.0


def _write_metrics(context: Context, path: str) -> None:
    """Writes /metrics for node_exporter's textfile collector, all at once; ConfigError when that can't be done.

    Without the figures of the process, which is over then: node_exporter has its own of these names.
    """
    if path:
        text = metrics_text(context.store, certificate_figures(context.settings))
        try:
            _replace(path, text, None, 0o644)
        except OSError as error:
            raise ConfigError(f"--metrics-file {path} can't be written: {_os_reason(error)}") from None


def _run_once(context: Context) -> int:
    settings = context.settings
    if not settings.release_executor_enabled:
        print("nothing is dispatched: RELEASE_EXECUTOR_ENABLED=0", file=sys.stderr)
        context.show({"releases": [], "inOtherHands": 0}, "")
        return EXIT_DONE
    warn_of_settings(settings)
    context.store.database.migrate()
    executor = Executor(settings, context.store, AgentClient(settings, context.store.database.metrics))
    _handle_signals(executor.stop, lambda: _reload(settings, executor.agents))
    _raise_descriptor_limit()
    secret_files = SecretFiles(settings)
    written_at = time.monotonic()

    def beat() -> None:
        nonlocal written_at
        secret_files.look()
        if time.monotonic() >= written_at + METRICS_EVERY_S:
            written_at = time.monotonic()
            with contextlib.suppress(AppError):  # told at the end, if it is still so
                _write_metrics(context, context.options.metrics_file)

    try:
        tick = executor.run_once(context.options.drain, beat)
    finally:
        executor.close()
    context.show({"releases": [release_json(release) for release in tick.worked_on],
                  "inOtherHands": tick.in_other_hands}, "\n".join(map(release_line, tick.worked_on)))
    if not tick.worked_on and tick.in_other_hands:
        print(f"{tick.in_other_hands} releases to work on, all in other hands: try later", file=sys.stderr)
        return EXIT_BUSY
    code = max((exit_code_of(context.store, release) for release in tick.worked_on), default=EXIT_DONE)
    for release_id in tick.vanished:
        print(f"release {release_id} is no longer in the database, which went back to an earlier state",
              file=sys.stderr)
        code = EXIT_NOT_SUCCESS
    unended = [release for release in tick.worked_on if release.status in (PENDING, RUNNING, CANCELLING)]
    is_held = any(release.claim_expires_at for release in unended)
    if code == EXIT_DONE and context.options.drain and (is_held or (tick.was_stopped and unended)):
        print(f"releases that are not at their end: {len(unended)}: try later", file=sys.stderr)
        return EXIT_BUSY
    return code


def warn_of_settings(settings: Settings) -> None:
    """Says at every start what a laboratory may do and production may not; ConfigError for an open key."""
    if settings.mtls_enabled and settings.control_key:
        require_private("CONTROL_KEY", settings.control_key)
    if not settings.mtls_enabled:
        log.warning("MTLS_ENABLED=0: agents are called by plain HTTP, unprotected; for a laboratory only")
    elif not settings.control_cert and settings.release_executor_enabled:
        log.warning("CONTROL_CERT is not set: nothing can be dispatched until it is, with CONTROL_KEY and CONTROL_CA")


class ServiceManager:
    """systemd, or who else stands behind NOTIFY_SOCKET (sd_notify(3)); that it can't be told is no reason to fail."""

    def __init__(self, address: str):
        """address: of the socket, "" for none."""
        self._address = address
        self._said = ""

    def tell(self, *lines: str) -> None:
        """Say how we are."""
        if not self._address:
            return
        said = ""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1.0)
                # @ is how the environment writes the NUL of an abstract name
                sock.sendto("\n".join(lines).encode(),
                            "\0" + self._address[1:] if self._address.startswith("@") else self._address)
        except OSError as error:
            said = _os_reason(error)
        if said and said != self._said:  # at each sign of life it would be a flood
            log.warning("systemd could not be told %s: NOTIFY_SOCKET %s: %s", lines[0], self._address, said)
        self._said = said


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
# They would end a process by default, and mean nothing to us; SIGPWR and SIGSTKFLT are Linux's.
IGNORED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO,
                   *(getattr(signal, name) for name in ("SIGPWR", "SIGSTKFLT") if hasattr(signal, name)),
                   *range(signal.SIGRTMIN, signal.SIGRTMAX + 1))


def _survive_signals() -> None:
    """Let no signal but one to stop end this process, also before there is something to reload."""
    for number in (signal.SIGHUP, *IGNORED_SIGNALS):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which a child would inherit


def _handle_signals(stop: Callable[[], None], reload: Callable[[], None]) -> None:
    """Let signals call stop() or reload(), in a thread: a handler may interrupt who holds a lock that they take.

    The thread is told by a descriptor: a handler would not run while the main thread waits within a driver's C code.
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
            except Exception:  # the next signal must find somebody
                log.exception("a signal could not be followed")

    with starting_threads():
        threading.Thread(target=listen, name="signals", daemon=True).start()
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)


def _reload(settings: Settings, agents: AgentClient, server: ApiServer | None = None) -> None:
    """Read anew what can be without a restart, and log in one line what became of it (SIGHUP)."""
    parts: list[tuple[str, Callable[[], int | None]]] = []
    if settings.mtls_enabled and settings.control_cert:
        parts.append(("certificate for agents", agents.reload))
    if server and server.tls:
        parts.append(("certificate of the API", server.tls.reload))
    if server and server.tokens:
        parts.append(("tokens", server.tokens.reload))
    said, is_wrong = [], False
    for name, act in parts:
        try:
            count = act()
            said.append(name if count is None else f"{count} {name}")
        except ConfigError as error:
            is_wrong = True
            said.append(f"not the {name}: {error}")
    log.log(logging.ERROR if is_wrong else logging.INFO,
            "SIGHUP: read anew: %s; other settings need a restart, and the log, on standard error, has no file of ours "
            "to open anew", ", ".join(said) or "nothing")


class SecretFiles:
    """The files that others may not read: says once when one of them becomes open while a process runs."""

    LOOK_EVERY_S = 2.0

    def __init__(self, settings: Settings):
        self._files = [(name, path) for name, path in (
            ("CONTROL_KEY", settings.control_key if settings.mtls_enabled else ""), ("HTTP_KEY", settings.http_key),
            ("API_TOKENS_FILE", settings.api_tokens_file)) if path]
        self._open: dict[str, str] = {}
        self._look_at = 0.0

    def look(self) -> None:
        """Log what has changed since the last look."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + self.LOOK_EVERY_S
        for name, path in self._files:
            said = ""
            try:
                require_private(name, path)
            except (ConfigError, OSError) as error:
                said = one_line(error)
            if said and said != self._open.get(name):
                log.error("%s", said)
            elif not said and self._open.get(name):
                log.info("%s %s is as it should be again", name, path)
            self._open[name] = said


def _raise_descriptor_limit() -> None:
    """Takes as many descriptors as the host allows: an agent costs one, and the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def command_migrate(context: Context) -> int:
    before, after = context.store.database.migrate()
    document: dict[str, Any] = {"before": before, "after": after}
    text = f"{context.store.database}: schema {after}" + (f", was {before}" if before != after else "")
    if context.options.first_version is not None:
        document["nextVersion"] = context.store.set_first_version(context.options.first_version)
        text += f"; the next release is version {document['nextVersion']}"
    context.show(document, text)
    return EXIT_DONE


# -- tokens ----------------------------------------------------------------------------------

def command_token_add(context: Context) -> int:
    options, path = context.options, context.settings.api_tokens_file
    if not path:
        raise ConfigError("API_TOKENS_FILE is not set: name the file that holds the tokens of the API")
    token = add_token(path, options.name, options.role)
    print(f"{options.name} may act as {options.role} with this token, which is shown once and stored nowhere",
          file=sys.stderr)
    context.show({"name": options.name, "role": options.role, "token": token}, token)
    return EXIT_DONE


# -- nodes -----------------------------------------------------------------------------------

def _labels_option(pairs: Sequence[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise AppError(2003, f"--label {one_line(pair, 60)} must be K=V")
        if key in labels:
            raise AppError(2003, f"--label {one_line(key, 60)} is given twice: a node has one value of each label")
        labels[key] = value
    return labels


def _node_options(options: argparse.Namespace) -> dict[str, Any]:
    """Gives the node that the options describe, as JSON fields."""
    fields = {"name": options.name if options.command == "node add" else options.rename, "mainIp": options.ip,
              "agentPort": options.port, "agentProtocol": options.protocol, "status": options.status,
              "labels": _labels_option(options.label) if options.label else None, "enabled": options.enabled}
    return {name: value for name, value in fields.items() if value is not None}


NODE_HEAD = ("id", "name", "address", "protocol", "enabled", "status", "labels")


def _node_row(node: Node) -> tuple[object, ...]:
    return (node.id, node.name, f"{node.main_ip}:{node.agent_port}", node.agent_protocol,
            "yes" if node.enabled else "no", node.status, node.labels)


def command_node_add(context: Context) -> int:
    columns = parse_node_fields(_node_options(context.options), ("name", "mainIp"))
    node = context.open(create=True).add_node(**columns)
    context.show(node_json(node), f"node {node.id}: {node.name} at {node.main_ip}:{node.agent_port}")
    return EXIT_DONE


def command_node_list(context: Context) -> int:
    page = context.open().nodes(size=0)
    context.show({"items": [node_json(node) for node in page.items], "total": page.total},
                 table([_node_row(node) for node in page.items], NODE_HEAD) or "no nodes: add one with `node add`")
    return EXIT_DONE


def command_node_set(context: Context) -> int:
    columns = parse_node_fields(_node_options(context.options))
    if not columns:
        raise AppError(2001, "nothing to change: name an option, see `node set --help`")
    store = context.open()
    node = store.update_node(store.node_named(context.options.name).id, columns)
    context.show(node_json(node), table([_node_row(node)], NODE_HEAD))
    return EXIT_DONE


def command_node_import(context: Context) -> int:
    path = context.options.file
    rows = []
    for number, fields in enumerate(_read_node_file(path), 1):
        try:
            columns = parse_node_fields(fields, ("name", "mainIp"))
        except AppError as error:
            raise AppError(error.code, f"{path}, node {number}: {error.message}") from None
        rows.append((columns["name"], columns["main_ip"], columns.get("agent_port", 8443),
                     columns.get("agent_protocol", TASKS), columns.get("labels", "{}"),
                     columns.get("enabled", 1), columns.get("status", "online")))
    nodes = context.open(create=True).add_nodes(rows)
    context.show({"items": [node_json(node) for node in nodes]}, f"nodes added: {len(nodes)}")
    return EXIT_DONE


def _read_node_file(path: str) -> list[dict[str, Any]]:
    """Gives the nodes of a JSON array, or of lines NAME IP [PORT [PROTOCOL]]."""
    text = _read_text(path)
    if text.lstrip().startswith(("[", "{")):
        try:
            items = parse_json(text)
        except ValueError as error:
            raise AppError(2002, f"{path} is not JSON: {one_line(error, 150)}") from None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise AppError(2002, f"{path} must be an array of objects")
        return list(items)
    nodes = []
    for line in text.splitlines():
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) < 2 or len(words) > 4 or (len(words) > 2 and not re.fullmatch("[0-9]{1,9}", words[2])):
            raise AppError(2002, f"{path}: {one_line(line, 60)!r} is not NAME IP [PORT [PROTOCOL]]")
        node: dict[str, Any] = {"name": words[0], "mainIp": words[1]}
        if len(words) > 2:
            node["agentPort"] = int(words[2])
        if len(words) > 3:
            node["agentProtocol"] = words[3]
        nodes.append(node)
    return nodes


def _read_text(path: str) -> str:
    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise AppError(2002, f"{path} can't be read: {_os_reason(error)}") from None


def command_node_ping(context: Context) -> int:
    store = context.open()
    nodes = [store.node_named(name) for name in context.options.names] or \
        [node for node in store.nodes(size=0).items if node.enabled]
    pings = ping_nodes(context.settings, nodes)
    context.show({"items": [{"name": p.node.name, "ok": p.is_ok, "errorKind": p.error_kind, "message": p.text}
                            for p in pings]},
                 table([(p.node.name, "ok" if p.is_ok else p.error_kind, p.text) for p in pings],
                       ("node", "result", "what it said")))
    return EXIT_DONE if all(p.is_ok for p in pings) else EXIT_UNAVAILABLE


# -- releases --------------------------------------------------------------------------------

def _duration_s(text: str) -> float:
    """Reads 90, 90s, 5m, 2h or 1d as seconds; argparse.ArgumentTypeError else."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time like 90, 90s, 5m, 2h or 1d")
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    return int(seconds) if seconds == int(seconds) else seconds


def _number_or_text(text: str) -> int | str:
    """Gives a number of digits as one, all else as it is: the Store says what is wrong with it."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text


def _list_of_numbers(text: str) -> list[int | str]:
    return [_number_or_text(part.strip()) for part in text.split(",")]


# Option of create: key of the strategy, how its text is read, placeholder, sentence.
STRATEGY_OPTIONS: tuple[tuple[str, str, Callable[[str], Any], str, str], ...] = (
    ("--batches", "batches", _list_of_numbers, "SPEC", "sizes: 1,10%%,25%%; what is left is the last batch (1)"),
    ("--max-failed", "maxFailed", _number_or_text, "N", "failed nodes that a batch may have: a number or N%% (0)"),
    ("--max-failed-total", "maxFailedTotal", _number_or_text, "N", "the same over the whole release (no limit)"),
    ("--max-parallel", "maxParallel", _number_or_text, "N", "nodes in flight at once; 0: the whole batch (0)"),
    ("--soak", "soakSec", _duration_s, "TIME", "wait after a batch before the next one: 90, 5m, 2h (0)"),
    ("--pause-after", "pauseAfter", lambda text: text if text == EACH else _list_of_numbers(text), "LIST",
     "batch numbers, or each: wait there for resume"),
    ("--on-exceed", "onExceed", str, "WHAT", "too many failures: fail, or pause and wait for a person (fail)"),
    ("--node-deadline", "nodeDeadlineSec", _duration_s, "TIME", "from a node's dispatch to its end"),
    ("--retries", "retries", _number_or_text, "N", "tries after the first"),
    ("--start-at", "startAt", str, "TIME", "not before, like 2026-01-31T22:00:00Z"),
)
VERIFY_OPTIONS: tuple[tuple[str, str, Callable[[str], Any], str, str], ...] = (
    ("--verify-url", "url", str, "URL", "probe after success, like http://{main_ip}:8080/health"),
    ("--verify-status", "status", _number_or_text, "N", "its status (200)"),
    ("--verify-timeout", "timeoutSec", _duration_s, "TIME", "for one probe (5)"),
    ("--verify-successes", "successes", _number_or_text, "N", "so many in a row (1)"),
    ("--verify-host", "host", str, "NAME", "the site to ask for: the Host header, and the name in TLS"),
    ("--verify-contains", "contains", str, "TEXT", "a text that the answer must hold"),
)


def _given(options: argparse.Namespace,
           known: Iterable[tuple[str, str, Callable[[str], Any], str, str]]) -> dict[str, Any]:
    """Gives the keys whose options were given."""
    values = {key: getattr(options, flag[2:].replace("-", "_")) for flag, key, *_ in known}
    return {key: value for key, value in values.items() if value is not None}


def command_create(context: Context) -> int:
    options = context.options
    _check_wait(options)
    body: dict[str, Any] = {"target": options.target, "reason": options.reason, "payload": {},
                            "strategy": _given(options, STRATEGY_OPTIONS)}
    if options.payload:
        try:
            body["payload"] = parse_json(_read_text(options.payload))
        except ValueError as error:
            raise AppError(2002, f"--payload {options.payload} is not JSON: {one_line(error, 150)}") from None
    verify = _given(options, VERIFY_OPTIONS)
    if verify:
        body["strategy"]["verify"] = verify
    if options.label:
        body["labels"] = _labels_option(options.label)
    if options.version is not None:
        body["version"] = options.version
    store = context.open(create=True)
    if options.node:
        body["nodeIds"] = [store.node_named(name).id for name in options.node]
    request = parse_release_request(body)
    if options.plan:
        return _show_plan(context, store.plan_release(request))
    return _show_created(context, store.create_release(request, context.actor))


def _show_plan(context: Context, plan: Plan) -> int:
    """Prints what a release would do, and whom it would leave out."""
    payload = "payload of release {} (v{})".format(*plan.payload_of) if plan.payload_of else None
    limits = [("version", plan.version), ("sends", payload), ("nodes", sum(map(len, plan.batches))),
              ("failed in all, at most", plan.max_failed_total),
              ("in flight at once, at most", plan.strategy.max_parallel or None)]
    text = table([(number, len(ids), most, _words(ids)) for number, (ids, most) in enumerate(
        zip(plan.batches, plan.max_failed), 1)], ("batch", "nodes", "may fail", "ids of nodes"))
    emptied = [f"left without any site: {', '.join(plan.emptied)}"] if plan.emptied else []
    context.show(plan_json(plan), "\n".join(
        [text, *(f"{name}: {value}" for name, value in limits if value is not None), *_left_out_lines(plan.left_out),
         *emptied]))
    return EXIT_DONE


def _left_out_lines(left_out: Iterable[LeftOut]) -> list[str]:
    return [f"left out: {one.name} is {one.why}" for one in left_out]


def _check_wait(options: argparse.Namespace) -> None:
    if not options.wait and (options.timeout is not None or options.until != Until()):
        raise AppError(2001, "--timeout and --until go with --wait")


def _show_created(context: Context, made: Made) -> int:
    release = made.release
    left_out = _left_out_lines(made.left_out) if release.retry_of or release.rollback_of else []
    if context.options.wait:
        print("\n".join([f"{release}: created", *left_out]), file=sys.stderr)
        return _watch(context, release.id)
    as_json = created_again_json if release.retry_of or release.rollback_of else created_json
    context.show(as_json(made), "\n".join([
        f"{release}: created, {count_of_nodes(release.total_nodes)} in batches of "
        f"{_words([len(batch) for batch in made.batches])}", *left_out]))
    return EXIT_DONE


def command_list(context: Context) -> int:
    options = context.options
    page = context.open().releases(options.status or "", options.page, options.page_size)
    rows = [(r.id, f"v{r.version}", r.target, r.status, f"{r.success_nodes}/{r.total_nodes}", r.failed_nodes,
             r.created_at, r.status_reason) for r in page.items]
    context.show(page_json(page, release_json), table(
        rows, ("id", "version", "target", "status", "done", "failed", "created", "what it does")) or "no releases")
    return EXIT_DONE


def command_status(context: Context) -> int:
    release, nodes = context.open().release_with_nodes(context.options.id)
    context.show(release_with_nodes_json(release, nodes), "\n".join([release_line(release), table(
        [(n.batch, n.name, n.status, n.attempts, n.started_at, n.finished_at, n.error_kind, n.error_msg)
         for n in nodes], ("batch", "node", "status", "tries", "started", "finished", "error", "message"))]))
    return EXIT_DONE


def command_watch(context: Context) -> int:
    if context.options.id != LATEST:
        return _watch(context, int(context.options.id))
    page = context.open().releases(size=1)
    if not page.items:
        raise AppError(3001, "there is no release yet")
    return _watch(context, page.items[0].id)


WATCH_EVERY_S = 0.5


class Until(NamedTuple):
    """What watch waits for: the end, a pause, or the end of a batch."""
    paused: bool = False
    batch: int = 0

    def is_reached(self, progress: Progress) -> bool:
        """Says whether watch may end; a release that is at its end always does."""
        at = min((b.number for b in progress.batches if b.count(PENDING, RUNNING)), default=MAX_NODES)
        return (progress.release.is_terminal or (self.paused and progress.release.status == PAUSED)
                or 0 < self.batch < at)


def _until(text: str) -> Until:
    """Reads terminal, paused or batch=N."""
    match = re.fullmatch(r"batch=([1-9][0-9]{0,6})", text)
    if match:
        return Until(batch=int(match[1]))
    if text not in ("terminal", PAUSED):
        raise argparse.ArgumentTypeError(f"{text!r} is not terminal, paused or batch=N")
    return Until(paused=text == PAUSED)


def _watch(context: Context, release_id: int) -> int:
    """Follows a release on standard error until what --until names, whatever becomes of the database.

    Gives EXIT_BUSY when --timeout is over first.
    """
    options, store, screen = context.options, context.open(), Screen(sys.stderr)
    ends_at = float("inf") if options.timeout is None else time.monotonic() + options.timeout
    while True:
        try:
            progress = store.progress(release_id)
            screen.show(progress)
        except DatabaseError as error:
            screen.say(str(error))
        else:
            if options.until.is_reached(progress):
                break
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            print(f"release {release_id}: not there within {options.timeout:g} s", file=sys.stderr)
            if options.json:
                context.show({"release": release_json(store.release(release_id))}, "")
            return EXIT_BUSY
        time.sleep(min(WATCH_EVERY_S, left_s))
    release = progress.release
    context.show({"release": release_json(release)}, release_line(release))
    return exit_code_of(store, release)


def command_events(context: Context) -> int:
    options = context.options
    events = context.open().events(options.id, options.after, options.limit)
    context.show({"items": [event_json(event) for event in events]}, table(
        [(e.id, e.at, e.node_name or "release", e.event, f"{e.from_status} -> {e.to_status}", e.actor, e.detail)
         for e in events], ("id", "at", "who", "event", "change", "by", "detail")))
    return EXIT_DONE


def command_act(context: Context) -> int:
    options = context.options
    verb = CANCEL_BY_FORCE if options.command == "cancel" and options.force else options.command
    more = {"accept_failures": options.accept_failures} if verb == "resume" else {}
    release = context.open().act(verb, options.id, context.actor, parse_text("--reason", options.reason), **more)
    context.show(release_json(release), release_line(release))
    return EXIT_DONE


def command_again(context: Context) -> int:
    options = context.options
    _check_wait(options)
    wish = Again(parse_text("--reason", options.reason), options.over_newer, getattr(options, "to", None))
    store = context.open()
    if options.plan:
        return _show_plan(context, store.plan_again(options.command, options.id, wish))
    make = {"retry": store.retry, "rollback": store.rollback}[options.command]
    return _show_created(context, make(options.id, context.actor, wish))


def command_freeze(context: Context) -> int:
    options, store = context.options, context.open()
    if options.switch is None and options.reason:
        raise AppError(2001, "--reason goes with on or off")
    freeze = store.freeze() if options.switch is None else store.set_freeze(
        options.switch == "on", context.actor, parse_text("--reason", options.reason))
    context.show(freeze_json(freeze), f"frozen by {freeze.actor} at {freeze.at}: {freeze.reason}" if freeze.frozen
                 else "not frozen")
    return EXIT_DONE


def command_check(context: Context) -> int:
    settings = context.settings
    findings = [Finding("settings", EXIT_DONE, "every value can be used"),
                *check_config(context.options.config), *check_agents(settings),
                *check_api(settings), *check_database(settings, context.store)]
    context.show({"items": [{"subject": f.subject, "ok": f.exit_code == EXIT_DONE, "message": f.text}
                            for f in findings]},
                 table([("ok" if f.exit_code == EXIT_DONE else "WRONG", f.subject, f.text) for f in findings],
                       ("", "what", "found")))
    codes = {f.exit_code for f in findings}
    return EXIT_USAGE if EXIT_USAGE in codes else max(codes)


# -- care ------------------------------------------------------------------------------------

def command_backup(context: Context) -> int:
    path = context.options.file
    schema, size = context.store.database.backup(path)
    context.show({"file": path, "bytes": size, "schema": schema},
                 f"{path}: {size} bytes, schema {schema}, checked")
    return EXIT_DONE


# Between two transactions of prune: others, who look for the lock now and then, get it.
PRUNE_PAUSE_S = 0.1
# Nodes of releases in one transaction of prune; each has some events too.
PRUNE_NODES = 500


def command_prune(context: Context) -> int:
    options, store = context.options, context.open()
    found = store.old_releases(options.older_than, options.keep)
    if options.dry_run:
        return _show_pruned(context, found)
    gone: set[int] = set()
    for chunk in _chunks(found):
        gone.update(store.forget([release.id for release in chunk]))
        time.sleep(PRUNE_PAUSE_S)
    return _show_pruned(context, [release for release in found if release.id in gone])


def _chunks(releases: Iterable[OldRelease]) -> Iterator[list[OldRelease]]:
    """Parts a list so that each part is soon deleted; a release stays whole."""
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
    rows = table([(r.id, f"v{r.version}", r.target, r.status, r.total_nodes, r.ended_at) for r in releases],
                 ("id", "version", "target", "status", "nodes", "ended")) if is_dry else ""
    context.show({"dryRun": is_dry, "total": len(releases), "items": [
        {"id": r.id, "version": r.version, "target": r.target, "status": r.status, "totalNodes": r.total_nodes,
         "endedAt": r.ended_at} for r in releases]},
        "\n".join(filter(None, [rows, f"releases {'to be ' if is_dry else ''}deleted: {len(releases)}"])))
    return EXIT_DONE


def command_version(context: Context) -> int:
    driver = ""
    with contextlib.suppress(ConfigError):
        name = _load_postgres_driver().__name__.partition(".")[0]
        driver = f"{name} {sys.modules[name].__version__}"
    found = {"version": __version__, "sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
             "schema": len(schema_steps()), "python": platform.python_version(),
             "sqlite": sqlite3.sqlite_version, "openssl": ssl.OPENSSL_VERSION, "postgresDriver": driver or None}
    context.show(found, "\n".join([f"releasectl {__version__}", *(
        f"{name:<15} {value or 'none'}" for name, value in found.items() if name != "version")]))
    return EXIT_DONE


# ======================================================================================
# 20 Command line: the table of commands, and what is made of it: the parser, completion in
#   shells; the log, and main(). Uses 1 to 19.
# ======================================================================================

class Command(NamedTuple):
    """One command: its words, help, options as (flags, keywords) of argparse, and what runs it."""
    name: str
    help: str
    run: Callable[[Context], int]
    options: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    needs_settings: bool = True


def _option(*flags: str, **keywords: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, keywords


def _number_option(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return int(text)
    return parse


def _age_s(text: str) -> float:
    """Reads a time from a day on: an Idempotency-Key is kept for so long, with its release."""
    seconds = _duration_s(text)
    if not ONCE_S <= seconds <= 36500 * ONCE_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 1d to 36500d")
    return seconds


LATEST = "latest"


def _id_or_latest(text: str) -> int | str:
    return text if text == LATEST else _number_option(0, MAX_ID)(text)


_ID_OPTION = _option("id", metavar="ID", type=_number_option(0, MAX_ID), help="id of the release")
_REASON_OPTION = _option("--reason", default="", metavar="TEXT", help="why, for the history")
_AGAIN_OPTIONS = (
    _REASON_OPTION,
    _option("--over-newer", action="store_true", help="also where a node has a newer success"),
    _option("--plan", action="store_true", help="show what it would do, and create nothing"))
_WATCH_OPTIONS = (
    _option("--until", type=_until, default=Until(), metavar="WHAT", help="terminal, paused or batch=N (terminal)"),
    _option("--timeout", type=_duration_s, metavar="TIME", help="exit 75 when it is over: 90, 5m"))
_WAIT_OPTIONS = (
    _option("--wait", action="store_true", help="follow it to its end; exit 0 on success, 1 else"), *_WATCH_OPTIONS)
_NODE_OPTIONS = (
    _option("--port", type=_number_option(1, 65535), help="the agent's port (8443)"),
    _option("--protocol", choices=PROTOCOLS, help="the agent's dialect (tasks)"),
    _option("--label", action="append", metavar="K=V", help="a label; may be repeated"),
    _option("--status", choices=NODE_STATUSES, help="only online nodes get releases"),
    _option("--enable", dest="enabled", action="store_true", default=None, help="it may get releases"),
    _option("--disable", dest="enabled", action="store_false", default=None, help="it gets no releases"),
)

def command_completion(context: Context) -> int:
    shell = context.options.shell
    script = COMPLETIONS[shell]()
    context.show({"shell": shell, "script": script}, script)
    return EXIT_DONE


COMMANDS: tuple[Command, ...] = (
    Command("serve", "API and executor in one process, until SIGTERM or SIGINT", command_serve),
    Command("run-once", "one tick of the executor, then exit", command_run_once, (
        _option("--drain", action="store_true", help="go on until nothing is left to do"),
        _option("--metrics-file", default="", metavar="FILE",
                help="write figures there for node_exporter's textfile collector: a name that ends with .prom"))),
    Command("migrate", "bring the database to this schema.sql", command_migrate, (
        _option("--first-version", type=_number_option(1, MAX_NAMED_VERSION), metavar="N",
                help="number new releases from N on: after a restore, or beside agents that are further on"),)),
    Command("node add", "add a node", command_node_add, (
        _option("name", metavar="NAME"), _option("ip", metavar="IP", help="IP address or host name"), *_NODE_OPTIONS)),
    Command("node list", "list the nodes", command_node_list),
    Command("node set", "change a node", command_node_set, (
        _option("name", metavar="NAME"), _option("--rename", metavar="NAME"), _option("--ip"), *_NODE_OPTIONS)),
    Command("node import", "add nodes from a file, all or none: a JSON array, or lines NAME IP [PORT [PROTOCOL]]",
            command_node_import, (_option("file", metavar="FILE", help="- for standard input"),)),
    Command("node ping", "ask agents whether they answer", command_node_ping, (
        _option("names", nargs="*", metavar="NAME", help="none: every enabled node"),)),
    Command("token add", "make a token for the API, and print it once", command_token_add, (
        _option("name", metavar="NAME", help="whom the history names"),
        _option("--role", choices=(VIEWER, OPERATOR), required=True, help="viewer reads, operator acts"))),
    Command("create", "create a release for the enabled, online nodes", command_create, (
        _option("--payload", metavar="FILE", help="JSON object for the agents; - for standard input"),
        _REASON_OPTION, _option("--target", default="cdn"),
        _option("--node", action="append", metavar="NAME", help="only to this node; may be repeated"),
        _option("--label", action="append", metavar="K=V", help="only to nodes with this label; may be repeated"),
        _option("--version", type=_number_option(1, MAX_NAMED_VERSION), metavar="N",
                help="a higher version than the next one"),
        *(_option(flag, type=parse, metavar=metavar, help=text)
          for flag, _, parse, metavar, text in (*STRATEGY_OPTIONS, *VERIFY_OPTIONS)),
        _option("--plan", action="store_true", help="show what it would do, and create nothing"), *_WAIT_OPTIONS)),
    Command("list", "list releases, newest first", command_list, (
        _option("--status", choices=RELEASE_STATUSES),
        _option("--page", type=_number_option(1, 10**9), default=1),
        _option("--page-size", type=_number_option(1, MAX_PAGE_SIZE), default=20))),
    Command("status", "a release and its nodes", command_status, (_ID_OPTION,)),
    Command("watch", "follow a release to its end", command_watch, (
        _option("id", metavar="ID", nargs="?", default=LATEST, type=_id_or_latest,
                help="id of the release, or latest (latest)"), *_WATCH_OPTIONS)),
    Command("events", "the history of a release", command_events, (
        _ID_OPTION, _option("--after", type=_number_option(0, MAX_ID), default=0, help="only ids above this one"),
        _option("--limit", type=_number_option(1, 100000), default=1000))),
    Command("pause", "dispatch nothing more until resume", command_act, (_ID_OPTION, _REASON_OPTION)),
    Command("resume", "go on with a paused release", command_act, (
        _ID_OPTION, _REASON_OPTION,
        _option("--accept-failures", action="store_true", help="what failed so far counts no more"))),
    Command("cancel", "end a release: what is in flight is waited for", command_act, (
        _ID_OPTION, _REASON_OPTION,
        _option("--force", action="store_true", help="at once: what is in flight is given up, its outcome unknown"))),
    Command("retry", "a new release for the failed and skipped nodes of one", command_again,
            (_ID_OPTION, *_AGAIN_OPTIONS, *_WAIT_OPTIONS)),
    Command("rollback", "a new release that brings back what the nodes of one had before", command_again,
            (_ID_OPTION, _option("--to", type=_number_option(1, MAX_ID), metavar="ID",
                                 help="the payload of this release (what most of the nodes had before)"),
             *_AGAIN_OPTIONS, *_WAIT_OPTIONS)),
    Command("freeze", "let nothing new be dispatched, by any process (on), or again (off); without a word: say which",
            command_freeze, (_option("switch", nargs="?", choices=("on", "off"), metavar="on|off"), _REASON_OPTION)),
    Command("check", "configuration, certificates, database, agents: what is wrong and how to mend it",
            command_check),
    Command("backup", "a checked copy of an SQLite database, also while it is in use", command_backup, (
        _option("file", metavar="FILE", help="a new file; it gets mode 0600"),)),
    Command("prune", "delete old releases with their history; what a rollback needs stays", command_prune, (
        _option("--older-than", type=_age_s, required=True, metavar="TIME", help="ended longer ago than that: 90d"),
        _option("--keep", type=_number_option(1, 10**9), default=10, metavar="N",
                help="of each target the newest N stay (10)"),
        _option("--dry-run", action="store_true", help="show what would be deleted, and delete nothing"))),
    Command("version", "version and SHA-256 of this file, and what it runs on", command_version,
            needs_settings=False),
    Command("completion", "a script for the shell that completes these commands", command_completion, (
        _option("shell", choices=("bash", "zsh")),), needs_settings=False),
)

# They stand before or behind every command.
COMMON_OPTIONS = (
    _option("--db", metavar="URL", help="overrides DATABASE_URL"),
    _option("--config", metavar="FILE", help="settings as KEY=VALUE lines; the environment wins"),
    _option("--json", action="store_true", help="one JSON document on standard output"),
)


class _StoreOnce(argparse.Action):
    """Store a value; an option that takes one is refused a second, which would silently win."""

    is_given = False

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        if self.is_given and option_string:
            parser.error(f"{option_string} is given twice")
        self.is_given = True
        setattr(namespace, self.dest, values)


class _StoreSwitch(argparse.Action):
    """Store True or False; the same again is no harm, the opposite is."""

    def __init__(self, const: bool, **keywords: Any):
        super().__init__(nargs=0, const=const, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, _values: Any,
                 option_string: str | None = None) -> None:
        if getattr(namespace, self.dest, None) is (not self.const) and self.default is None:
            parser.error(f"{option_string} says the opposite of another option")
        setattr(namespace, self.dest, self.const)


class _Parser(argparse.ArgumentParser):
    """Tells wrong usage as every other error is told: one line, no secret in it."""

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)
        self.register("action", "store_true", functools.partial(_StoreSwitch, const=True))
        self.register("action", "store_false", functools.partial(_StoreSwitch, const=False))

    def error(self, message: str) -> NoReturn:
        raise AppError(2002, f"{safe_url(message)} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """Gives the parser of COMMANDS; --db, --config and --json stand before or behind the command."""
    # no abbreviations: one in somebody's script would break with the next option that we add
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for flags, keywords in COMMON_OPTIONS:
        common.add_argument(*flags, **keywords)
    parser = _Parser(
        "releasectl.py", parents=[common], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Brings configuration versions to edge nodes, batch by batch, over mutual TLS.",
        epilog="settings, from the environment or --config:\n" + "\n".join(
            f"  {s.name:<30} {s.help}" + (f" ({s.default})" if s.default else "") for s in SETTINGS))
    parser.add_argument("--version", action="version", version=f"releasectl {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    groups: dict[str, Any] = {}
    for command in COMMANDS:
        *group, word = command.name.split()
        place = commands
        if group:
            if group[0] not in groups:
                words = [c.name.split()[1] for c in COMMANDS if c.name.startswith(f"{group[0]} ")]
                group_parser = commands.add_parser(
                    group[0], parents=[common], allow_abbrev=False, help=", ".join(words))
                groups[group[0]] = group_parser.add_subparsers(metavar="COMMAND", required=True)
            place = groups[group[0]]
        sub = place.add_parser(word, parents=[common], allow_abbrev=False, help=command.help,
                               description=command.help)
        for flags, keywords in command.options:
            sub.add_argument(*flags, **keywords)
        sub.set_defaults(run=command.run, command=command.name, needs_settings=command.needs_settings)
    return parser


# -- completion in shells ----------------------------------------------------------------------

# What may be called so.
_PROGRAMS = "releasectl releasectl.py"
_HELP_OPTION = _option("--help", action="store_true", help="show what it takes")


def _takes_value(keywords: Mapping[str, Any]) -> bool:
    return "action" not in keywords or keywords["action"] == "append"


def _sub_commands(group: str = "") -> dict[str, str]:
    """Gives the words that may follow a group's name, each with its help."""
    parts = [(c.name[len(group):].split(), c.help) for c in COMMANDS if c.name.startswith(group)]
    return {words[0]: text if len(words) == 1 else ", ".join(p[1] for p, _ in parts if p[0] == words[0] and p[1:])
            for words, text in parts}


def bash_completion() -> str:
    """Gives the script for bash: all words that may stand at the cursor, or file names where none is known."""
    valued = sorted({flag for command in COMMANDS for flags, keywords in (*command.options, *COMMON_OPTIONS)
                     for flag in flags if flag.startswith("-") and _takes_value(keywords)})
    groups = sorted({c.name.split()[0] for c in COMMANDS if " " in c.name})
    # a value that is not known beforehand is completed as a file name
    lines = [
        f"# bash completion of releasectl {__version__}, made by `releasectl.py completion bash`",
        "_releasectl() {",
        '    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command="" words="" i',
        '    [[ $word != "=" ]] || word=""',
        '    [[ $before != "=" ]] || before=${COMP_WORDS[COMP_CWORD - 2]}',
        "    COMPREPLY=()",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        case ${COMP_WORDS[i]} in",
        f"            {' | '.join(valued)})",
        '                i=$((i + 1)); [[ ${COMP_WORDS[i]} != "=" ]] || i=$((i + 1)) ;;',
        "            -*) ;;",
        '            *) command+="${command:+ }${COMP_WORDS[i]}" ;;',
        "        esac",
        "    done",
        "    case $before in --config | --db) return ;; esac",
        "    case $command in"]
    for group in ("", *groups):
        words = [*_sub_commands(f"{group} " if group else ""), *_flags(COMMON_OPTIONS), "--help"]
        lines.append(f'        "{group}") words="{" ".join(words + ["--version"] * (not group))}" ;;')
    for command in COMMANDS:
        words = [*_flags(command.options), *_flags(COMMON_OPTIONS), "--help"]
        lines += [f'        "{command.name}" | "{command.name} "*)', "            case $before in"]
        takes_file = False
        for flags, keywords in command.options:
            known = keywords.get("choices", ())
            if not flags[0].startswith("-"):
                words = [*known, *words]
                takes_file |= keywords.get("metavar") == "FILE"
            elif known:
                lines.append(f'                {flags[0]}) words="{" ".join(known)}" ;;')
        look = '[[ $word != -* ]] || ' if takes_file else ""
        lines += [f"                {' | '.join(valued)}) ;;",
                  f'                *) {look}words="{" ".join(words)}" ;;', "            esac ;;"]
    return "\n".join([
        *lines, "    esac", '    COMPREPLY=($(compgen -W "$words" -- "$word"))', "}",
        f"complete -o default -F _releasectl {_PROGRAMS}"])


def _flags(options: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]]) -> list[str]:
    return [flag for flags, _ in options for flag in flags if flag.startswith("-")]


def zsh_completion() -> str:
    """Gives the script for zsh, with the help of each command and option."""
    lines = [f"#compdef {_PROGRAMS}",
             f"# zsh completion of releasectl {__version__}, made by `releasectl.py completion zsh`"]
    groups = sorted({c.name.split()[0] for c in COMMANDS if " " in c.name})
    for group in ("", *groups):
        name = f"_releasectl{'_' if group else ''}{group}"
        commands = _sub_commands(f"{group} " if group else "")
        lines += [f"{name}() {{", "    local context state state_descr line", "    typeset -A opt_args",
                  "    local -a commands", "    commands=(",
                  *(f"        {_zsh_quoted(word + ':' + text)}" for word, text in commands.items()), "    )",
                  f"    _arguments -C {_zsh_options((*COMMON_OPTIONS, _HELP_OPTION))} \\",
                  "        '1:command:->command' '*::argument:->arguments'",
                  "    case $state in", "        command) _describe command commands ;;",
                  "        arguments)", "            case $words[1] in"]
        for word in commands:
            known = [c for c in COMMANDS if c.name == f"{group} {word}".strip()]
            call = f"_releasectl_{word}" if not known else \
                f"_arguments {_zsh_options((*known[0].options, *COMMON_OPTIONS, _HELP_OPTION))}"
            lines.append(f"                {word}) {call} ;;")
        lines += ["            esac ;;", "    esac", "}"]
    # as a file of fpath it is the function's body at the first call; else it is sourced
    return "\n".join([*lines, 'if [[ $funcstack[1] == _releasectl ]]; then _releasectl "$@"; '
                              f"else compdef _releasectl {_PROGRAMS}; fi"])


def _zsh_options(options: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]]) -> str:
    """Gives options as the arguments of zsh's _arguments."""
    specs = []
    for flags, keywords in options:
        metavar = str(keywords.get("metavar", flags[0].lstrip("-")))
        values = f":{metavar}:" + (f"({' '.join(keywords['choices'])})" if keywords.get("choices")
                                   else "_files" if metavar == "FILE" else " ") if _takes_value(keywords) else ""
        if not flags[0].startswith("-"):
            specs.append({"*": "*", "?": ":"}.get(str(keywords.get("nargs")), "") + values)
            continue
        text = re.sub(r"([\[\]:\\])", r"\\\1", str(keywords.get("help", "")) % {})
        text = f"[{text}]" if text else ""
        specs += [f"{'*' if keywords.get('action') == 'append' else ''}{flag}{text}{values}" for flag in flags]
    return " ".join(map(_zsh_quoted, specs))


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


COMPLETIONS: Mapping[str, Callable[[], str]] = {"bash": bash_completion, "zsh": zsh_completion}


# Longer than any line of ours: what is cut came from outside.
MAX_LOG_CHARS = 4096


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with what the record is about as keys of their own: see about()."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"at": utc_text(record.created), "level": record.levelname.lower(), "thread": record.threadName,
                "message": one_line(record.getMessage(), MAX_LOG_CHARS),
                **{key: one_line(value) if isinstance(value, str) else value
                   for key, value in getattr(record, "about", {}).items() if value not in ("", None)}}
        if record.exc_info:
            line["exception"] = "\n".join(_trace(self, record))
        return to_json(line)


class TextFormatter(logging.Formatter):
    """One line an event, for people; a stack trace stands below its line, indented, so that it can't pass for one."""

    def __init__(self, in_journal: bool):
        """in_journal: who reads the log has time and level of each line already."""
        super().__init__()
        self._in_journal = in_journal

    def format(self, record: logging.LogRecord) -> str:
        stamp = "" if self._in_journal else f"{utc_text(record.created)} {record.levelname.lower()}: "
        return "\n    ".join((stamp + one_line(record.getMessage(), MAX_LOG_CHARS), *_trace(self, record)))


class JournalFormatter(logging.Formatter):
    """What another formatter gives, each line with its priority before it (sd-daemon(3))."""

    PRIORITIES: Mapping[str, int] = {"DEBUG": 7, "INFO": 6, "WARNING": 4}

    def __init__(self, inner: logging.Formatter):
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = self.PRIORITIES.get(record.levelname, 3)
        return "\n".join(f"<{priority}>{line}" for line in self._inner.format(record).split("\n"))


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    """Gives the lines of a record's stack trace; none without one."""
    text = formatter.formatException(record.exc_info) if record.exc_info else ""
    return "".join(_printable(char, True) for char in text).splitlines()


def is_journal() -> bool:
    """Says whether standard error is the journal itself, and not a pipe or file of somebody below a service."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def set_up_log(settings: Settings, command: str) -> None:
    """Sends the log to standard error; a command for people prints what it did, and warns there only."""
    in_journal = is_journal()
    formatter = JsonFormatter() if settings.log_format == "json" else TextFormatter(in_journal)
    handler = logging.StreamHandler()
    handler.setFormatter(JournalFormatter(formatter) if in_journal else formatter)
    log.handlers = [handler]
    log.setLevel(settings.log_level.upper() if command in ("serve", "run-once") else logging.WARNING)
    log.propagate = False


class StandardStream:
    """A standard stream on which no print fails: what can't be written (nobody reads, the disk is full) is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        # The first error, for who wants to tell it.
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it; return its length."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: somebody closed it
            self.error = self.error or error
            return len(text)

    def flush(self) -> None:
        """Bring out what was written; no error when that can't be done."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def end(self) -> None:
        """Drop what could not be written: the interpreter would try once more, and end with 120."""
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError):  # it has no descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Let nothing depend on the standard streams: one that is closed becomes /dev/null, and no print fails.

    A file that is opened later, the database say, would get the number of a closed one.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each open() takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - to the end of the process
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        # whatever the locale says: JSON is UTF-8, and a path that is none becomes an escape of JSON
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    out, err = StandardStream(sys.stdout), StandardStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        out.end()
        if out.error is not None and not isinstance(out.error, BrokenPipeError):
            print(f"releasectl: standard output can't be written: {_os_reason(out.error)}", file=sys.stderr)
        err.end()
        sys.stdout, sys.stderr = before


# Options that name a file: any bytes but NUL are a path on Linux.
PATH_OPTIONS = frozenset(("config", "db", "payload", "file", "metrics_file"))


def _refuse_not_utf8(options: argparse.Namespace) -> None:
    """Raise AppError for an option that is not UTF-8, unless it names a file."""
    for name, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            if name not in PATH_OPTIONS and isinstance(text, str) and not is_utf8(text):
                raise AppError(2002, f"the argument {one_line(text, 60)!r} is not UTF-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Errors are one line on standard error."""
    with standard_streams():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(words: Sequence[str]) -> int:
    try:
        options = build_parser().parse_args(words, argparse.Namespace(db="", config="", json=False))
        _refuse_not_utf8(options)
        context = Context(options)
        set_up_log(context.settings, options.command)
        with contextlib.closing(context.store.database):
            code: int = options.run(context)
        return code
    except AppError as error:
        print(f"{'<3>' if is_journal() else ''}releasectl: {one_line(error.message, 500)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
