#!/usr/bin/env python3
"""releasectl: brings configuration versions to edge nodes, batch by batch, over mutual TLS.

    python releasectl.py serve          API and executor in one process
    python releasectl.py run-once       one tick of the executor, for cron
    python releasectl.py --help         every command

One file, standard library only; a PostgreSQL driver is loaded for a postgresql:// URL alone.
The floors, in order; each uses only the ones above it:

     1 Vocabulary      status words, error kinds, codes, limits, the exceptions
     2 Helpers         time, one-line text, strict JSON
     3 Settings        one table of the configuration
     4 Database        connection factory, transactions, migrations; where the engines differ
     5 Plan            what a release will do: batches, node addresses, payloads; pure
     6 Decision        what to write and what to send next; pure
     7 Store           every SQL statement of the domain
     8 Agent client    mutual TLS, deadlines, the two dialects
     9 Executor        claim, lease, and the loop that joins 6, 7 and 8
    10 Shapes          the JSON of the API and the command line
    11 API             routes, tokens, the HTTP server
    12 Check           what is wrong with an installation
    13 Command line    a table of commands

How a release flows through them is drawn in docs/ARCHITECTURE.md.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import functools
import getpass
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import json
import logging
import os
import queue
import re
import secrets
import select
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import sys
import threading
import time
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import (
    Any,
    Callable,
    NamedTuple,
    NoReturn,
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

NODE_STATUSES = ("online", "offline", "maintenance")
PROTOCOLS = (TASKS, EXECUTE) = ("tasks", "execute")

# The operations that go to an agent.
DISPATCH, QUERY, PING = "dispatch", "query", "ping"

UNREACHABLE, TLS, TIMEOUT, HTTP, PROTOCOL = "unreachable", "tls", "timeout", "http", "protocol"
REJECTED, AGENT_FAILED, VERIFY, DEADLINE, ABANDONED = "rejected", "agent_failed", "verify", "deadline", "abandoned"

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
    4013: (413, EXIT_USAGE),        # body too large
    4015: (415, EXIT_USAGE),        # not JSON
    4029: (429, EXIT_BUSY),         # too many requests
    5001: (500, EXIT_UNAVAILABLE),  # internal
    5002: (503, EXIT_UNAVAILABLE),  # database
}

MAX_VERSION = 2**53
MAX_ID = 2**63 - 1
MAX_MESSAGE_CHARS = 255
MAX_DETAIL_BYTES = 4096
MAX_BODY_BYTES = 1 << 20
MAX_PAGE_SIZE = 100
MAX_JSON_DEPTH = 64

# How soon a running task is asked for first, and by what the wait grows until the interval.
FIRST_POLL_S, POLL_GROWTH = 0.05, 1.3
# The look that follows a dispatch at once ends so soon: it holds up the word that the task was taken.
FIRST_LOOK_S = 1.0
# Waits between tries of a request that failed.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 10.0
# An execute agent whose connection was cut is sent nothing for so long (contract section 1).
CUT_HOLD_S = 5.0
# How long outcomes are gathered for one commit, while many requests are in flight.
GATHER_S = 0.02
# A clean stop waits so long for requests in flight.
STOP_GRACE_S = 5.0

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


class ClaimLost(Exception):
    """The release has another owner now, or none: whatever was to be written was not."""


class StateMoved(Exception):
    """Somebody changed the release since it was read: nothing was written, read again."""


class AgentError(Exception):
    """An agent that could not be spoken with, or said what can't be used.

    kind: the error_kind of the contract. reached: whether the agent may have got the request.
    hold_s: how long an execute agent may still be busy with it. final: no further try helps.
    """

    def __init__(self, kind: str, message: str, reached: bool, hold_s: float = 0.0, final: bool = False,
                 detail: str = ""):
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.reached = reached
        self.hold_s = hold_s
        self.final = final
        self.detail = detail or message


# ======================================================================================
# 2 Helpers: time, one-line text, strict JSON; nothing that knows a release.
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


@functools.lru_cache(maxsize=64)  # all rows of one commit have one time
def utc_text(epoch_s: float) -> str:
    """Gives seconds since 1970 as RFC 3339, UTC, milliseconds, Z (contract section 2)."""
    whole_ms = round(epoch_s * 1000)
    moment = datetime.datetime.fromtimestamp(whole_ms // 1000, datetime.timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{whole_ms % 1000:03d}Z"


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


def detail_text(text: object) -> str:
    """Gives any text as an event's detail: printable, lines kept, at most 4 KiB of UTF-8."""
    clean = "".join(_printable(c, True) for c in str(text)[:MAX_DETAIL_BYTES]).strip()
    return clean.encode()[:MAX_DETAIL_BYTES].decode(errors="ignore")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {one_line(twice, 60)!r} stands twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _nesting(value: object) -> int:
    """Gives the depth of a JSON value, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def parse_json(data: bytes | str) -> Any:
    """Reads JSON strictly: UTF-8, no duplicate keys, no NaN, bounded nesting; ValueError else."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
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
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Gives ' (did you mean X?)' for a near miss, else ''."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


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


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError("must be " + " or ".join(words))
        return text
    return parse


def _database_url(text: str) -> str:
    if text.startswith("sqlite:///") and len(text) > len("sqlite:///"):
        return text
    if text.startswith(("postgresql://", "postgres://")):
        return text
    raise ValueError("must be sqlite:///FILE, sqlite:////ABSOLUTE/FILE or postgresql://USER@HOST/NAME")


def _host_port(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:]*):([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise ValueError("must be ADDRESS:PORT, or [ADDRESS]:PORT for IPv6")
    return match[1].strip("[]") or "0.0.0.0", int(match[2])


def safe_url(url: str) -> str:
    """Gives a database URL without its password, also one that is mistyped or within a sentence."""
    url = re.sub(r"(password\s*=\s*)('[^']*'|[^&\s]*)", r"\1***", url)
    return re.sub(r"((?:://|(?<!\S))[^/@:\s]*):(?!//|\s).*@", r"\1:***@", url)


class Setting(NamedTuple):
    """One row of the configuration: the field is the name in lower case."""
    name: str
    default: str
    parse: Callable[[str], Any]
    help: str


SETTINGS: tuple[Setting, ...] = (
    Setting("DATABASE_URL", "sqlite:///releasectl.db", _database_url, "sqlite:///FILE or postgresql://..."),
    Setting("HTTP_ADDR", "127.0.0.1:8080", _host_port, "address and port of the API"),
    Setting("HTTP_CERT", "", _text, "certificate of the API (with HTTP_KEY: HTTPS)"),
    Setting("HTTP_KEY", "", _text, "key of the API's certificate"),
    Setting("HTTP_CLIENT_CA", "", _text, "CA: client certificates are demanded"),
    Setting("API_TOKENS_FILE", "", _text, "one name:role:sha256-of-token a line"),
    Setting("RELEASE_EXECUTOR_ENABLED", "1", _switch, "0: nothing is dispatched"),
    Setting("RELEASE_EXECUTOR_INTERVAL_SEC", "2", _number(0.1, 60), "seconds between looks for work"),
    Setting("MTLS_ENABLED", "1", _switch, "0: plain HTTP to agents, for a laboratory"),
    Setting("CONTROL_CERT", "", _text, "our client certificate for the agents"),
    Setting("CONTROL_KEY", "", _text, "its key"),
    Setting("CONTROL_CA", "", _text, "the CA that signed the agents' certificates"),
    Setting("AGENT_TLS_SERVER_NAME", "", _text, "verify this name, not the dialled address"),
    Setting("AGENT_CONCURRENCY", "64", _integer(1, 1024), "requests to agents in flight"),
    Setting("AGENT_CONNECT_TIMEOUT_SEC", "15", _number(0.1, 600), "seconds for TCP and TLS"),
    Setting("AGENT_REQUEST_TIMEOUT_SEC", "60", _number(0.1, 3600), "seconds for a request and its answer"),
    Setting("AGENT_RETRIES", "2", _integer(0, 100), "tries after the first"),
    Setting("NODE_DEADLINE_SEC", "600", _number(1, 604800), "seconds from a node's dispatch to its end"),
    Setting("CLAIM_TTL_SEC", "30", _number(1, 3600), "seconds that a silent process keeps a release"),
    Setting("LOG_FORMAT", "text", _one_of("text", "json"), "text or json"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The configuration of one process; see SETTINGS for the meaning of each field."""
    database_url: str
    http_addr: tuple[str, int]
    http_cert: str
    http_key: str
    http_client_ca: str
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

    @classmethod
    def load(cls, environ: Mapping[str, str], config_file: str = "", database_url: str = "") -> Settings:
        """Reads the environment, which wins over config_file; database_url (--db) wins over both.

        Raises ConfigError naming the value that can't be used and what would do.
        """
        given = dict(_read_config_file(config_file)) if config_file else {}
        given.update((s.name, environ[s.name]) for s in SETTINGS if s.name in environ)
        if database_url:
            given["DATABASE_URL"] = database_url
        values = {}
        for setting in SETTINGS:
            text = given.get(setting.name, setting.default).strip()
            try:
                values[setting.name.lower()] = setting.parse(text or setting.default)
            except ValueError as error:
                shown = one_line(safe_url(text), 80)
                raise ConfigError(f"{setting.name}={shown} can't be used: {error}") from None
        settings = cls(**values)
        if bool(settings.http_cert) != bool(settings.http_key):
            raise ConfigError("HTTP_CERT and HTTP_KEY go together: set both or neither")
        if settings.http_client_ca and not settings.http_cert:
            raise ConfigError("HTTP_CLIENT_CA needs HTTP_CERT and HTTP_KEY")
        return settings


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
        if not value.isprintable():
            raise ConfigError(f"{path}:{number}: {name} holds a control character")
        seen.add(name)
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
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
# "releasectl" in numbers; the key of PostgreSQL's advisory lock
PG_LOCK_KEY = 7235419


def _close(connection: Any) -> None:
    with contextlib.suppress(Exception):  # a broken connection may refuse even that
        connection.close()


class SqliteEngine:
    """The words of SQLite, and how to reach one file."""

    name = "sqlite"
    begin_read = "BEGIN"
    begin_write = "BEGIN IMMEDIATE"
    now_sql = "SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
    has_table_sql = "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
    has_any_table_sql = "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    error: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __init__(self, url: str):
        self.path = url[len("sqlite:///"):]
        if sqlite3.sqlite_version_info < (3, 26):
            raise ConfigError(f"SQLite {sqlite3.sqlite_version} is too old: 3.26 or newer is needed")

    def __str__(self) -> str:
        return f"database {self.path}"

    def identity(self) -> object:
        """Gives what the path names now: a deleted file would go on taking writes unseen."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def connect(self, create: bool) -> sqlite3.Connection:
        """Opens the file, made when create says so; raises DatabaseError with one line."""
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            raise DatabaseError(f"{self}: the folder {folder} does not exist")
        if not create and not os.path.exists(self.path):
            raise DatabaseError(f"{self} does not exist: make it with `releasectl.py migrate`")
        connection = None
        try:
            # statements differ by the number of rows: more of them kept would be megabytes, and not used again
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None,
                                         check_same_thread=False, cached_statements=16)
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            # with much history a release touches a page for each node: 16 MiB of WAL write it back less often
            connection.execute("PRAGMA wal_autocheckpoint = 4000")
            return connection
        except sqlite3.Error as error:
            if connection:
                _close(connection)
            raise DatabaseError(self.explain(error)) from None

    def explain(self, error: Exception) -> str:
        """Gives one line: what is wrong with the file and what would mend it."""
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
    begin_read = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    begin_write = f"BEGIN; SELECT pg_advisory_xact_lock({PG_LOCK_KEY})"
    now_sql = """SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')"""
    has_table_sql = """SELECT COUNT(*) FROM information_schema.tables
        WHERE table_schema = current_schema() AND table_name = ?"""
    has_any_table_sql = "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = current_schema()"
    # A stopped client holds its locks until the server gives up on it.
    session_sql = """
        SET idle_in_transaction_session_timeout = '5s'; SET lock_timeout = '10s';
        SET statement_timeout = '30s'; SET tcp_user_timeout = '15s';
        SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
        SET synchronous_commit = on; SET client_encoding = 'UTF8'"""

    def __init__(self, url: str):
        self.url = url
        self.driver = _load_postgres_driver()
        self.error = (self.driver.Error, OSError)  # pg8000 lets the socket's errors through

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
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute("SHOW server_version_num")
            number = int(cursor.fetchone()[0])
            if number < 130000:
                raise DatabaseError(f"{self}: PostgreSQL {number // 10000} is too old: 13 or newer is needed")
            cursor.execute(self.session_sql)
            return connection
        except AppError:
            raise
        except Exception as error:  # a driver raises its own errors, OSError and ssl.SSLError here
            if connection is not None:
                _close(connection)
            raise DatabaseError(self.explain(error)) from None

    def _open(self) -> Any:
        if self.driver.__name__ != "pg8000.dbapi":
            return self.driver.connect(self.url, connect_timeout=5, keepalives_idle=10, keepalives_interval=5,
                                       keepalives_count=3, tcp_user_timeout=15000)
        parts = urllib.parse.urlsplit(self.url)
        return self.driver.connect(
            user=urllib.parse.unquote(parts.username or "") or getpass.getuser(),
            password=urllib.parse.unquote(parts.password) if parts.password else os.environ.get("PGPASSWORD"),
            host=parts.hostname or "localhost", port=parts.port or 5432,
            database=urllib.parse.unquote(parts.path.lstrip("/")) or None, timeout=40,
            ssl_context=_pg8000_tls(urllib.parse.parse_qs(parts.query)))

    def explain(self, error: Exception) -> str:
        """Gives one line: what the server or the driver said, without the password."""
        text = one_line(_pg8000_fields(error).get("M", error))
        password = urllib.parse.unquote(urllib.parse.urlsplit(self.url).password or "")
        return f"{self}: {text.replace(password, '***') if password else text}"

    @staticmethod
    def is_stale(error: Exception) -> bool:
        """Says whether BEGIN failed for the connection's sake, and not after waiting for a lock."""
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or _pg8000_fields(error).get("C")
        return state != "55P03"

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


def _pg8000_tls(query: Mapping[str, list[str]]) -> ssl.SSLContext | None:
    """Gives what libpq's sslmode and sslrootcert mean, for the driver that does not know them."""
    unknown = sorted(set(query) - {"sslmode", "sslrootcert"})
    if unknown:
        raise ConfigError(f"DATABASE_URL: pg8000 does not take {unknown[0]}: install psycopg, or leave it out")
    mode = query.get("sslmode", ["prefer"])[0]
    if mode in ("disable", "allow", "prefer"):
        return None
    context = ssl.create_default_context(cafile=query.get("sslrootcert", [None])[0])
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

    def execute(self, statement: str, *params: object) -> int:
        """Runs a statement; gives the number of rows that it changed."""
        sql = self._engine.sql(statement)
        # without parameters a driver would not undo the doubling of %
        self._cursor.execute(sql, params) if params else self._cursor.execute(statement)
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
        self._idle: list[tuple[Any, object]] = []
        self._guard = threading.Lock()

    def __str__(self) -> str:
        return str(self.engine)

    def close(self) -> None:
        """Closes the idle connections."""
        with self._guard:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            _close(connection)

    @contextlib.contextmanager
    def transaction(self, write: bool = False, create: bool = False) -> Iterator[Transaction]:
        """Gives one transaction: a snapshot to read, or the only writer; committed at the end.

        Raises DatabaseError where the engine fails; an exception of the caller rolls back.
        """
        connection, identity = self._begin(write, create)
        try:
            yield Transaction(self.engine, connection)
            connection.cursor().execute("COMMIT")
        except self.engine.error as error:
            _close(connection)  # which rolls back, if there is anything left to roll back
            raise DatabaseError(self.engine.explain(error)) from error
        except BaseException as error:
            try:
                connection.cursor().execute("ROLLBACK")
                self._give_back(connection, identity)
            except self.engine.error:
                _close(connection)
            if isinstance(error, OverflowError):
                raise AppError(2003, "a number is too large for the database") from None
            raise
        self._give_back(connection, identity)

    def _begin(self, write: bool, create: bool) -> tuple[Any, object]:
        statement = self.engine.begin_write if write else self.engine.begin_read
        while True:
            connection, identity, pooled = self._take(create)
            try:
                connection.cursor().execute(statement)
                return connection, identity
            except self.engine.error as error:
                _close(connection)
                if not (pooled and self.engine.is_stale(error)):
                    raise DatabaseError(self.engine.explain(error)) from error

    def _take(self, create: bool) -> tuple[Any, object, bool]:
        now = self.engine.identity()
        with self._guard:
            while self._idle:
                connection, identity = self._idle.pop()
                if identity == now:
                    return connection, identity, True
                _close(connection)
        connection = self.engine.connect(create)
        return connection, self.engine.identity(), False

    def _give_back(self, connection: Any, identity: object) -> None:
        with self._guard:
            if len(self._idle) < MAX_IDLE_DB_CONNECTIONS:
                self._idle.append((connection, identity))
                return
        _close(connection)

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

    def migrate(self) -> tuple[int, int]:
        """Brings the schema up to date, one transaction a step; gives the versions before and after."""
        steps = schema_steps()
        before = None
        while True:
            with self.transaction(write=True, create=True) as tx:
                version = self._schema_version(tx)
                before = version if before is None else before
                self._refuse_newer(version, len(steps))
                if version == len(steps):
                    return before, version
                for statement in steps[version]:
                    tx.execute(self.engine.ddl(statement))
            log.info("%s: schema step %d done", self, version + 1)

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
    except OSError as error:
        raise ConfigError(f"{SCHEMA_FILE} can't be read ({_os_reason(error)}): "
                          "it belongs beside releasectl.py") from None
    text = re.sub(r"^\s*--(?! step ).*$", "", text, flags=re.MULTILINE)
    steps = re.split(r"^-- step \d+.*$", text, flags=re.MULTILINE)[1:]
    return tuple(tuple(s.strip() for s in re.split(r";\s*$", step, flags=re.MULTILINE) if s.strip())
                 for step in steps)


# ======================================================================================
# 5 Plan: what a release is and will do: nodes, batches, payloads. Pure; uses 1 and 2.
# ======================================================================================

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
    skipped_nodes: int
    current_batch: int

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    def __str__(self) -> str:
        return f"release {self.id} (v{self.version})"


@dataclasses.dataclass(frozen=True)
class ReleaseNode:
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
    # The next request and when it is due, in the seconds of Clock.elapsed().
    next_op: str = ""
    due: float = 0.0
    deadline: float = 0.0
    in_flight: bool = False
    # Whether the agent gave the task another id than the one that was written.
    is_renamed: bool = False
    # Whether a request of ours may have reached the agent.
    reached: bool = False
    polls: int = 0
    # How often the agent did not know the task.
    forgotten: int = 0
    # Tries in a row that failed, and what the last one said.
    errors: int = 0
    last_kind: str = ""
    last_error: str = ""
    # How the agent's answers ended it, not written yet.
    verdict: Verdict | None = None


class Verdict(NamedTuple):
    """How a node ended: SUCCESS, or FAILED with an error_kind, a message and its whole text.

    hold_s: for how long an execute agent may still be at our last request; None: as stored.
    """
    status: str
    error_kind: str = ""
    error_msg: str = ""
    detail: str = ""
    hold_s: float | None = 0.0


class Strategy(NamedTuple):
    """The limits that a release was created with (contract section 7)."""
    max_failed: int = 0


NO_STRATEGY = Strategy()


class ReleaseRequest(NamedTuple):
    """What a release is asked to be: see POST /api/v1/releases."""
    target: str = "cdn"
    reason: str = ""
    payload: Mapping[str, Any] = {}
    retry_of: int | None = None
    rollback_of: int | None = None


HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def parse_address(text: object) -> str:
    """Gives an IP address or host name in its plain form; AppError 2003 for anything else."""
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            if "%" not in text:
                return str(ipaddress.ip_address(text))
        labels = text.split(".")
        if len(text) <= 253 and all(map(HOST_LABEL.fullmatch, labels)) and not labels[-1].isdigit():
            return text.lower()
    raise AppError(2003, f"mainIp {one_line(text, 60)!r} is neither an IP address nor a host name")


def parse_port(value: object) -> int:
    """Gives a TCP port; AppError 2003 when it is not a whole number from 1 to 65535."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise AppError(2003, f"agentPort {one_line(value, 40)} must be a whole number from 1 to 65535")
    return value


def parse_name(text: object) -> str:
    """Gives a node's name: 1 to 100 printable characters, no space around; AppError 2003 else."""
    if not isinstance(text, str) or not 1 <= len(text) <= 100 or one_line(text) != text:
        raise AppError(2003, f"name {one_line(text, 60)!r} must be 1 to 100 printable characters")
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
    """Gives labels as stored: a JSON object of strings; AppError 2003 else."""
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise AppError(2003, "labels must be an object whose values are strings")
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


def parse_payload(value: object) -> dict[str, Any]:
    """Gives a release's payload; AppError 2003 when it is not an object."""
    if not isinstance(value, dict):
        raise AppError(2003, "payload must be a JSON object")
    return value


def parse_strategy(value: object) -> Strategy:
    """Gives the limits of a strategy; AppError 2003 naming a key that is not known."""
    if not isinstance(value, dict):
        raise AppError(2003, "strategy must be a JSON object")
    for key in value:
        raise AppError(2003, f"strategy: {one_line(key, 60)} is not a known key")
    return NO_STRATEGY


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


def plan_batches(node_ids: Sequence[int]) -> list[list[int]]:
    """Gives the default batches: the first node, then all others (contract rule 1)."""
    return [list(part) for part in (node_ids[:1], node_ids[1:]) if part]


def task_id_for(release_type: str, main_ip: str, version: int) -> str:
    """Gives the agent's task id: the same for every try of a release on a node (section 1)."""
    return f"{release_type}_{main_ip}_{version}"


# ======================================================================================
# 6 Decision: what to write and what to send next. Pure: no clock, no socket, no disk, no
#   thread. Uses 1, 2 and 5.
#
#   A driver folds what the agents said into its nodes with observe(), asks decide() what
#   follows, commits that, and only then sends. decide() compares what is with what should
#   be, so a restart needs no path of its own: adopt() says what a row found running means.
#   Everything that moves a status lives here: change it here and nowhere else.
# ======================================================================================

class Moment(NamedTuple):
    """One instant on both clocks, in seconds."""
    wall: float
    elapsed: float

    @property
    def text(self) -> str:
        return utc_text(self.wall)


class Policy(NamedTuple):
    """The numbers of the configuration that a decision needs, in seconds but for retries."""
    retries: int
    node_deadline_s: float
    request_timeout_s: float
    interval_s: float
    # A dispatch leaves so soon after it was written down, or not at all.
    leave_within_s: float = 0.0

    @property
    def hold_s(self) -> float:
        """How long an execute agent may be at a request, reckoned from when it was written down."""
        return self.leave_within_s + self.request_timeout_s


# What came back from an agent.
ACCEPTED = "accepted"   # it has the task
WORKING = "working"     # the task is not at its end
UNKNOWN = "unknown"     # it does not know the task
UNSENT = "unsent"       # the request never reached it
LOST = "lost"           # the request may have reached it, no answer came
UNCLEAR = "unclear"     # it answered what can't be used: 429, 5xx, nonsense
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
    """Folds what an agent answered into what the driver knows of a running node."""
    node = dataclasses.replace(node, in_flight=False)
    if outcome.result == SUCCESS:
        return dataclasses.replace(node, verdict=Verdict(SUCCESS))
    if outcome.result == FAILED:
        return dataclasses.replace(node, verdict=Verdict(
            FAILED, outcome.error_kind, one_line(outcome.message), detail_text(outcome.detail)))
    if outcome.result == ACCEPTED:
        return dataclasses.replace(node, task_id=outcome.task_id, is_renamed=outcome.task_id != node.task_id,
                                   next_op=QUERY, polls=0, due=now.elapsed + FIRST_POLL_S, reached=True)
    if outcome.result == WORKING:
        return dataclasses.replace(node, errors=0, polls=node.polls + 1,
                                   due=now.elapsed + poll_delay_s(node.polls + 1, policy.interval_s))
    if outcome.result == UNKNOWN:
        # at once the first time: a tick that only waited here would end before it sent anything
        wait_s = backoff_s(node.forgotten, node.node_id) if node.forgotten else 0.0
        return dataclasses.replace(node, next_op=DISPATCH, reached=True, forgotten=node.forgotten + 1,
                                   last_error="the agent does not know the task", due=now.elapsed + wait_s)
    return _observe_error(node, outcome, now, policy)


def _observe_error(node: ReleaseNode, outcome: Outcome, now: Moment, policy: Policy) -> ReleaseNode:
    node = dataclasses.replace(node, errors=node.errors + 1, last_kind=outcome.error_kind,
                               last_error=outcome.message, reached=node.reached or outcome.result == LOST)
    if node.errors > policy.retries:
        tries = f" (tried {node.errors} times)" if node.errors > 1 else ""
        return dataclasses.replace(node, verdict=Verdict(
            FAILED, outcome.error_kind, one_line(outcome.message, MAX_MESSAGE_CHARS - len(tries)) + tries,
            detail_text(outcome.detail), outcome.hold_s))
    held_s = outcome.hold_s if node.agent_protocol == EXECUTE else 0.0
    wait_s = max(backoff_s(node.errors, node.node_id), held_s)
    return dataclasses.replace(node, due=now.elapsed + wait_s,
                               next_op=AFTER_ERROR[node.agent_protocol, outcome.op, outcome.result])


def adopt(node: ReleaseNode, now: Moment, policy: Policy) -> ReleaseNode:
    """Gives a node as a new owner of its release finds it (rule 9): ask first, or wait and repeat.

    Deadline and hold were stored by the wall clock, and go on from there. A deadline that passed
    while nobody looked leaves time for one question: the task may have ended well before it.
    """
    if node.status != RUNNING:
        return node
    started = epoch_of(node.started_at) if node.started_at else now.wall
    deadline = now.elapsed + started + policy.node_deadline_s - now.wall
    if node.agent_protocol == TASKS:
        return dataclasses.replace(node, next_op=QUERY, due=now.elapsed, reached=True,
                                   deadline=max(deadline, now.elapsed + policy.interval_s))
    held_s = epoch_of(node.hold_until) - now.wall if node.hold_until else 0.0
    # a clock that was set back must not hold a node for longer than a hold can be
    due = now.elapsed + min(max(held_s, 0.0), policy.hold_s)
    return dataclasses.replace(node, next_op=DISPATCH, due=due, deadline=deadline, reached=True)


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
    """What to commit, then what to send, and when to look again if nothing happens."""
    changes: tuple[NodeChange, ...]
    status: str
    status_reason: str
    error_msg: str
    sends: tuple[Send, ...]
    wake_at: float


def decide(release: Release, nodes: Sequence[ReleaseNode], now: Moment, policy: Policy,
           strategy: Strategy = NO_STRATEGY, slots: int = 1, busy: frozenset[int] = frozenset(),
           broken: str = "") -> Decision:
    """Gives what follows from a release and its nodes (contract section 3, rules 3 to 8).

    nodes: all of the release's, by batch and id. slots: how many requests may leave now.
    busy: ids of nodes that another release has in flight, or that may still be at our last
    request. broken: why the release's own row can't be used, which ends it. Waiting for a
    slot is no reason to wake: a result will come and free one.
    """
    # each pass over thousands of nodes counts: calls and copies are for the few that are running
    ended = {n.node_id: change for n in nodes if n.status == RUNNING
             for change in [_end_node(n, now, policy)] if change}
    failing = bool(broken) or _is_failing(_after(nodes, ended), strategy)
    if failing or release.status == CANCELLING:
        ended.update((n.node_id, change) for n in nodes if n.node_id not in ended
                     for change in [_close_node(n, now)] if change)
    left = _after(nodes, ended)
    status = _next_status(release.status, left, failing)
    running = [n for n in left if n.status == RUNNING]
    renamed = [NodeChange(n, dataclasses.replace(n, is_renamed=False)) for n in running if n.is_renamed]
    # half of the slots are for nodes to be asked: else their kept connections would be gone by then
    waiting = sum(_is_due(n, QUERY, now) for n in running)
    begun = _dispatches(release, left, running, now, policy, slots - min(waiting, slots // 2),
                        busy) if status == RUNNING and not failing else []
    after = _after(left, {change.after.node_id: change for change in (*renamed, *begun)})
    running = [n for n in after if n.status == RUNNING]
    polls = [n for n in running if _is_due(n, QUERY, now)][: max(0, slots - len(begun))]
    asked = {n.node_id for n in polls}
    return Decision(
        changes=(*ended.values(), *renamed, *begun),
        status=status,
        status_reason=describe(status, after, failing, busy, broken),
        error_msg=_error_msg(after, failing, release, broken),
        sends=(*(Send(DISPATCH, change.after) for change in begun),
               *(Send(QUERY, dataclasses.replace(n, in_flight=True)) for n in polls)),
        wake_at=min((_wake(n, now) for n in running if n.node_id not in asked),
                    default=now.elapsed + policy.interval_s))


def _after(nodes: Sequence[ReleaseNode], changes: Mapping[int, NodeChange]) -> Sequence[ReleaseNode]:
    """Gives the nodes as the changes, by node id, leave them."""
    return [changes[n.node_id].after if n.node_id in changes else n for n in nodes] if changes else nodes


def _is_due(node: ReleaseNode, op: str, now: Moment) -> bool:
    return (node.status == RUNNING and not node.in_flight and node.verdict is None and node.next_op == op
            and node.due <= now.elapsed)


def _wake(node: ReleaseNode, now: Moment) -> float:
    """Gives when a running node needs a look: never for one in flight or waiting for a slot."""
    if node.in_flight:
        return float("inf")
    return node.due if now.elapsed < node.due < node.deadline else node.deadline


def _end_node(node: ReleaseNode, now: Moment, policy: Policy) -> NodeChange | None:
    """Gives the end of a running node: its agent's word, or the deadline."""
    if node.status != RUNNING or node.in_flight:
        return None
    if node.verdict is not None:
        return _at_rest(node, node.verdict, now)
    if now.elapsed < node.deadline:
        return None
    last = f"; last: {node.last_error}" if node.last_error else ""
    message = f"not done {policy.node_deadline_s:g} s after its dispatch{last}"
    return _at_rest(node, Verdict(FAILED, DEADLINE, one_line(message), detail_text(message), None), now)


def _close_node(node: ReleaseNode, now: Moment) -> NodeChange | None:
    """Gives the end of a node in a release that sends nothing any more (rules 5 and 8)."""
    if node.status == PENDING:
        return NodeChange(node, dataclasses.replace(node, status=SKIPPED, finished_at=now.text))
    if node.status != RUNNING or node.in_flight or node.next_op != DISPATCH:
        return None
    if node.reached:
        message = "outcome unknown: " + (node.last_error or "the answer was lost with the process that asked")
        return _at_rest(node, Verdict(FAILED, ABANDONED, one_line(message), detail_text(message), None), now)
    message = f"{node.last_error} (not tried again: the release ends)"
    return _at_rest(node, Verdict(FAILED, node.last_kind, one_line(message), detail_text(message)), now)


def _at_rest(node: ReleaseNode, verdict: Verdict, now: Moment) -> NodeChange:
    hold_until = node.hold_until
    if verdict.hold_s is not None:
        is_busy = verdict.hold_s > 0 and node.agent_protocol == EXECUTE
        hold_until = utc_text(now.wall + verdict.hold_s) if is_busy else None
    return NodeChange(node, dataclasses.replace(
        node, status=verdict.status, error_kind=verdict.error_kind, error_msg=verdict.error_msg,
        finished_at=now.text, hold_until=hold_until), verdict.detail)


def _is_failing(nodes: Sequence[ReleaseNode], strategy: Strategy) -> bool:
    """Says whether more nodes of one batch failed than the strategy tolerates (rule 5)."""
    failed = [n.batch for n in nodes if n.status == FAILED]
    return any(failed.count(batch) > strategy.max_failed for batch in set(failed))


def _next_status(status: str, nodes: Sequence[ReleaseNode], failing: bool) -> str:
    """Gives the release's status after the changes; a paused one waits for a person whatever comes.

        status      nodes running or pending   failing   next
        running     running                    any       running
        running     none running               yes       failed
        running     pending only               no        running
        running     none                       no        success, or partial when some failed
        cancelling  running                    any       cancelling
        cancelling  none running               any       cancelled
    """
    running = any(n.status == RUNNING for n in nodes)
    if status not in (RUNNING, CANCELLING) or running:
        return status
    if status == CANCELLING:
        return CANCELLED
    if failing or not nodes:
        return FAILED
    if any(n.status == PENDING for n in nodes):
        return RUNNING
    return PARTIAL if any(n.status != SUCCESS for n in nodes) else SUCCESS


def _dispatches(release: Release, nodes: Sequence[ReleaseNode], running: Sequence[ReleaseNode], now: Moment,
                policy: Policy, slots: int, busy: frozenset[int]) -> list[NodeChange]:
    """Gives the intents of the dispatches that leave now: repetitions, and the current batch's."""
    pending = [n for n in nodes if n.status == PENDING]
    batch = min((n.batch for n in (*running, *pending)), default=0)
    ready = [n for n in running if _is_due(n, DISPATCH, now)]
    ready += [n for n in pending if n.batch == batch and n.node_id not in busy]
    return [_intent(release, n, now, policy) for n in ready[:max(0, slots)]]


def _intent(release: Release, node: ReleaseNode, now: Moment, policy: Policy) -> NodeChange:
    """Gives what is written before a dispatch leaves; started_at and the deadline are the first try's."""
    hold_until = utc_text(now.wall + policy.hold_s) if node.agent_protocol == EXECUTE else None
    task_id = node.task_id or task_id_for(release.type, node.main_ip, release.version)
    after = dataclasses.replace(node, status=RUNNING, task_id=task_id, attempts=node.attempts + 1,
                                hold_until=hold_until, in_flight=True, next_op=DISPATCH)
    if node.status == PENDING:
        after = dataclasses.replace(after, started_at=now.text, deadline=now.elapsed + policy.node_deadline_s)
    return NodeChange(node, after)


def first_failed(nodes: Iterable[ReleaseNode]) -> ReleaseNode | None:
    """Gives the node that failed first, the lower id of two at once."""
    return min((n for n in nodes if n.status == FAILED), key=lambda n: (n.finished_at or "", n.node_id), default=None)


def _error_msg(nodes: Sequence[ReleaseNode], failing: bool, release: Release, broken: str) -> str:
    if broken or not nodes:
        return one_line(broken or NO_NODES)
    first = first_failed(nodes) if failing else None
    return one_line(f"node {first.name}: {first.error_msg}") if first else release.error_msg


# Every sentence of status_reason.

REASON_PENDING = "waiting for the executor"
NO_NODES = "the release has no nodes"


def describe(status: str, nodes: Sequence[ReleaseNode], failing: bool, busy: frozenset[int] = frozenset(),
             broken: str = "") -> str:
    """Gives status_reason: what the release is doing or waiting for, in one sentence."""
    running = [n for n in nodes if n.status == RUNNING]
    if status == SUCCESS:
        return f"{count_of_nodes(len(nodes))} succeeded"
    if status == PARTIAL:
        return f"{_tally(nodes, FAILED)} of {count_of_nodes(len(nodes))} failed, within what was tolerated"
    if status == FAILED:
        first = first_failed(nodes)
        return one_line(f"stopped by node {first.name} in batch {first.batch}: {first.error_msg}"
                        if first and not broken else broken or NO_NODES)
    if status == CANCELLED:
        return f"cancelled with {_tally(nodes, SUCCESS)} of {count_of_nodes(len(nodes))} done"
    waiting = f"waiting for {_names(running)} to end" if running else ""
    if status == CANCELLING:
        return "cancelling: " + (waiting or "nothing is in flight")
    if status == PAUSED:
        first = first_failed(nodes) if failing else None
        failed = f"node {first.name} failed: resume to end the release" if first else "resume to go on"
        return "paused: " + (f"{waiting}; " if waiting else "") + failed
    if failing:
        first = first_failed(nodes)
        cause = f"node {first.name} failed" if first else broken
        return one_line(f"stopping, {cause}: {waiting}")
    return _progress(nodes, busy)


def _progress(nodes: Sequence[ReleaseNode], busy: frozenset[int]) -> str:
    waiting = [n for n in nodes if n.status in (PENDING, RUNNING)]
    batch = min([n.batch for n in waiting], default=0)
    held = [n for n in waiting if n.batch == batch and n.status == PENDING and n.node_id in busy] if busy else []
    sentence = (f"batch {batch} of {max([n.batch for n in nodes])}: waiting for "
                f"{sum(n.batch == batch for n in waiting)} of "
                f"{count_of_nodes(len([n for n in nodes if n.batch == batch]))}")
    return sentence + (f"; {_names(held)} busy with an earlier request" if held else "")


def count_of_nodes(number: int) -> str:
    """Gives '1 node', '2 nodes'."""
    return f"{number} node" + ("" if number == 1 else "s")


def _tally(nodes: Sequence[ReleaseNode], status: str) -> int:
    return sum(n.status == status for n in nodes)


def _names(nodes: Sequence[ReleaseNode]) -> str:
    return nodes[0].name if len(nodes) == 1 else f"{nodes[0].name} and {len(nodes) - 1} more"


class Verb(NamedTuple):
    """What an operator may do to a release: from which states, the event, and its sentence."""
    name: str
    states: tuple[str, ...]
    event: str


VERBS: Mapping[str, Verb] = {verb.name: verb for verb in (
    Verb("pause", (PENDING, RUNNING), "paused"),
    Verb("resume", (PAUSED,), "resumed"),
    Verb("cancel", (PENDING, RUNNING, PAUSED), "cancelling"),
    Verb("retry", (PARTIAL, FAILED, CANCELLED), "created"),
    Verb("rollback", (SUCCESS, PARTIAL, FAILED, CANCELLED), "created"),
)}


def check_verb(verb: str, release: Release) -> None:
    """Raises AppError 3003 saying which states allow the verb, where this one does not."""
    allowed = VERBS[verb].states
    if release.status not in allowed:
        states = " or ".join(filter(None, (", ".join(allowed[:-1]), allowed[-1])))
        raise AppError(3003, f"release {release.id} is {release.status}: {verb} needs {states}")


def status_after_verb(verb: str, release: Release) -> str:
    """Gives the status that pause, resume or cancel brings; one that never started waits again."""
    if verb == "resume":
        return RUNNING if release.started_at else PENDING
    return {"pause": PAUSED, "cancel": CANCELLING}[verb]


class Candidate(NamedTuple):
    """A release that is not terminal, as the look for work sees it."""
    id: int
    target: str
    version: int
    status: str
    running_nodes: int
    claimed: bool


def runnable(candidates: Iterable[Candidate]) -> tuple[list[int], list[int]]:
    """Gives which releases may be claimed now, and which are in other hands (rule 2).

    A pending one waits for the active one of its target and for lower versions; a paused one
    needs an owner only while nodes of it are in flight.
    """
    free: list[int] = []
    taken: list[int] = []
    blocked = set()
    for c in sorted(candidates, key=lambda c: (c.status == PENDING, c.version)):
        wanted = c.target not in blocked if c.status == PENDING else c.status != PAUSED or c.running_nodes > 0
        blocked.add(c.target)
        if wanted:
            (taken if c.claimed else free).append(c.id)
    return free, taken


# ======================================================================================
# 7 Store: every SQL statement of the domain; a method is one transaction. Uses 1 to 6.
#   Rows become dataclasses here and nowhere else.
# ======================================================================================

class Claim(NamedTuple):
    """The right to work on a release: every write of its owner is conditional on the fence."""
    release_id: int
    fence: int


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


class Page(NamedTuple):
    """A part of a list, and how many there are in all."""
    items: list[Any]
    total: int
    number: int
    size: int


NODE_COLUMNS = """id, name, main_ip, agent_port, agent_protocol, labels, enabled, status, created_at, updated_at"""

# The index release_task_nodes_by_status serves the two that are counted: the lowest batch of one
# status is its first entry, while IN would go through all of them.
RELEASE_COLUMNS = """r.id, r.type, r.target, r.version, r.status, r.status_reason, r.reason, r.payload, r.strategy,
    r.retry_of, r.rollback_of, r.total_nodes, r.success_nodes, r.failed_nodes, r.error_msg, r.claim_owner,
    r.claim_fence, r.claim_expires_at, r.created_at, r.started_at, r.finished_at, r.updated_at,
    (SELECT COUNT(*) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'skipped'),
    COALESCE((SELECT MIN(w.batch) FROM (
        SELECT MIN(n.batch) AS batch FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'pending'
        UNION ALL
        SELECT MIN(n.batch) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'running'
        UNION ALL
        SELECT MIN(n.batch) FROM release_task_nodes n WHERE n.release_task_id = r.id AND n.status = 'failed') w), 0)"""

RELEASE_NODE_COLUMNS = """n.node_id, h.name, h.main_ip, h.agent_port, h.agent_protocol, n.batch, n.status, n.task_id,
    n.attempts, n.error_kind, n.error_msg, n.hold_until, n.started_at, n.finished_at"""

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

# Nodes in one statement, up to three parameters each: SQLite 3.26 takes 999.
NODES_PER_STATEMENT = 320


class Store:
    """The tables of the contract as verbs. Every method is one transaction."""

    def __init__(self, database: Database, clock: Clock = Clock()):  # noqa: B008 - it has no state
        self.database = database
        self.clock = clock

    # -- nodes ---------------------------------------------------------------------------

    def add_node(self, name: str, main_ip: str, agent_port: int = 8443, agent_protocol: str = TASKS,
                 labels: str = "{}", enabled: bool = True, status: str = "online") -> Node:
        """Adds a node; AppError 3002 when the name is taken. The values are checked by floor 5."""
        return self.add_nodes([(name, main_ip, agent_port, agent_protocol, labels, int(enabled), status)])[0]

    def add_nodes(self, rows: Sequence[tuple[str, str, int, str, str, int, str]]) -> list[Node]:
        """Adds nodes, all or none; AppError 3002 naming the first whose name is taken."""
        with self.database.transaction(write=True) as tx:
            now = self._now()
            for row in rows:
                if tx.value("SELECT COUNT(*) FROM nodes WHERE name = ?", row[0]):
                    raise AppError(3002, f"node {row[0]} exists already")
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
            for column in ("name", "main_ip", "agent_port", "agent_protocol", "labels", "enabled", "status"):
                if column in changes:
                    tx.execute(f"UPDATE nodes SET {column} = ?, updated_at = ? WHERE id = ?",
                               changes[column], self._now(), node_id)
            return self._node(tx, node_id)

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

    def create_release(self, request: ReleaseRequest, actor: str) -> tuple[Release, list[list[int]]]:
        """Creates a release for the enabled, online nodes; gives it and its batches (rule 1).

        Raises AppError 3003 without such a node, 2003 when the payload names another version.
        """
        with self.database.transaction(write=True) as tx:
            node_ids = [row[0] for row in tx.rows(
                "SELECT id FROM nodes WHERE enabled = 1 AND status = 'online' ORDER BY id")]
            return self._create(tx, request, node_ids, actor)

    def retry(self, release_id: int, actor: str) -> tuple[Release, list[list[int]]]:
        """Creates a release of the same payload for what was failed or skipped (rule 10)."""
        with self.database.transaction(write=True) as tx:
            old = self._release(tx, release_id)
            check_verb("retry", old)
            request = ReleaseRequest(old.target, f"retry of release {old.id}",
                                     self._stored_payload(old), retry_of=old.id)
            return self._create(tx, request, self._touched(tx, old, (FAILED, SKIPPED)), actor)

    def rollback(self, release_id: int, actor: str) -> tuple[Release, list[list[int]]]:
        """Creates a release of the newest successful payload before it, for the nodes it touched."""
        with self.database.transaction(write=True) as tx:
            old = self._release(tx, release_id)
            check_verb("rollback", old)
            row = tx.row(f"""
                SELECT {RELEASE_COLUMNS}
                FROM release_tasks r
                WHERE r.target = ? AND r.status = 'success' AND r.version < ?
                ORDER BY r.version DESC
                LIMIT 1""", old.target, old.version)
            if row is None:
                raise AppError(3003, f"no release of {old.target} before {old.id} was a success: "
                                     "nothing to go back to")
            good = Release(*row)
            request = ReleaseRequest(old.target, f"rollback of release {old.id} to the payload of version "
                                     f"{good.version}", self._stored_payload(good), rollback_of=old.id)
            return self._create(tx, request, self._touched(tx, old, (SUCCESS, FAILED)), actor)

    @staticmethod
    def _stored_payload(release: Release) -> dict[str, Any]:
        try:
            return parse_payload(parse_json(release.payload))
        except (ValueError, AppError) as error:
            raise AppError(3003, f"the payload of release {release.id} can't be used: {one_line(error)}") from None

    @staticmethod
    def _touched(tx: Transaction, release: Release, statuses: Sequence[str]) -> list[int]:
        rows = tx.rows(f"""
            SELECT n.node_id
            FROM release_task_nodes n
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ? AND n.status IN ({', '.join('?' * len(statuses))})
              AND h.enabled = 1 AND h.status = 'online'
            ORDER BY n.node_id""", release.id, *statuses)
        if not rows:
            raise AppError(3003, f"release {release.id} has no online nodes that were {' or '.join(statuses)}")
        return [row[0] for row in rows]

    def _create(self, tx: Transaction, request: ReleaseRequest, node_ids: Sequence[int],
                actor: str) -> tuple[Release, list[list[int]]]:
        if not node_ids:
            raise AppError(3003, "no online nodes: add one, or enable one and set it online")
        version = tx.value("SELECT COALESCE(MAX(version), 0) + 1 FROM release_tasks")
        if version > MAX_VERSION:
            raise AppError(3003, f"the versions are used up: the newest is {MAX_VERSION}")
        payload = dict(request.payload)
        if request.retry_of or request.rollback_of:
            payload = payload_for_version(payload, version)
        check_payload_version(payload, version)
        now = self._now()
        tx.execute("""
            INSERT INTO release_tasks (target, version, status_reason, reason, payload, retry_of, rollback_of,
                                       total_nodes, created_at, updated_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                   request.target, version, REASON_PENDING, request.reason, to_json(payload), request.retry_of,
                   request.rollback_of, len(node_ids), now, now)
        release_id = tx.value("SELECT id FROM release_tasks WHERE version = ?", version)
        batches = plan_batches(node_ids)
        tx.insert_many("INSERT INTO release_task_nodes (release_task_id, node_id, batch, created_at, updated_at) "
                       "VALUES ", 5, [(release_id, node_id, number, now, now)
                                      for number, batch in enumerate(batches, 1) for node_id in batch])
        tx.insert_many(INSERT_EVENTS, 8, [(release_id, None, now, actor, "created", "", PENDING, request.reason)])
        return self._release(tx, release_id), batches

    def release(self, release_id: int) -> Release:
        """Gives a release; AppError 3001 when there is none."""
        with self.database.transaction() as tx:
            return self._release(tx, release_id)

    def release_with_nodes(self, release_id: int) -> tuple[Release, list[ReleaseNode]]:
        """Gives a release and its nodes by batch and id, of one moment; AppError 3001."""
        with self.database.transaction() as tx:
            return self._release(tx, release_id), self._release_nodes(tx, release_id)

    def releases(self, status: str = "", page: int = 1, size: int = 20) -> Page:
        """Gives a page of the releases, newest first; of one status when it is given."""
        where = "WHERE r.status = ?" if status else ""
        params = (status,) if status else ()
        with self.database.transaction() as tx:
            total = tx.value(f"SELECT COUNT(*) FROM release_tasks r {where}", *params)
            rows = tx.rows(f"SELECT {RELEASE_COLUMNS} FROM release_tasks r {where} ORDER BY r.id DESC "
                           "LIMIT ? OFFSET ?", *params, size, (page - 1) * size)
            return Page([Release(*row) for row in rows], total, page, size)

    def events(self, release_id: int, after: int = 0, limit: int = 100) -> list[Event]:
        """Gives the events of a release with an id above after, oldest first; AppError 3001."""
        with self.database.transaction() as tx:
            self._release(tx, release_id)
            return [Event(*row) for row in tx.rows("""
                SELECT e.id, e.release_task_id, e.node_id, COALESCE(h.name, ''), e.at, e.actor, e.event,
                       e.from_status, e.to_status, e.detail
                FROM release_events e
                LEFT JOIN nodes h ON h.id = e.node_id
                WHERE e.release_task_id = ? AND e.id > ?
                ORDER BY e.id
                LIMIT ?""", release_id, after, limit)]

    def counts(self) -> dict[str, dict[str, int]]:
        """Gives how many releases and nodes there are in each status, and how many are in flight."""
        with self.database.transaction() as tx:
            return {
                "releases": dict(tx.rows("SELECT status, COUNT(*) FROM release_tasks GROUP BY status")),
                "nodes": dict(tx.rows("SELECT status, COUNT(*) FROM nodes WHERE enabled = 1 GROUP BY status")),
                # the index release_task_nodes_one_running holds just these
                "in_flight": {"running": tx.value(
                    "SELECT COUNT(*) FROM release_task_nodes WHERE status = 'running'")},
            }

    def probe(self) -> None:
        """Commits a write; DatabaseError when that can't be done now.

        A look alone would not tell: SQLite begins to write on a full disk or a read-only file too.
        """
        with self.database.transaction(write=True) as tx:
            tx.execute("UPDATE health_probe SET at = ? WHERE id = 1", self._now())

    def act(self, verb: str, release_id: int, actor: str, reason: str = "") -> Release:
        """Does pause, resume or cancel; gives the release after it. AppError 3001, or 3003.

        A cancelled release with nothing in flight is at its end at once; else its executor ends it.
        """
        with self.database.transaction(write=True) as tx:
            release = self._release(tx, release_id)
            check_verb(verb, release)
            status = status_after_verb(verb, release)
            now = Moment(self.clock.wall(), self.clock.elapsed())
            nodes = self._release_nodes(tx, release_id)
            sentence = REASON_PENDING if status == PENDING else describe(
                status, nodes, any(n.status == FAILED for n in nodes))
            tx.execute(f"UPDATE release_tasks SET status = ?, status_reason = ?, updated_at = ?, {COUNTERS} "
                       "WHERE id = ?", status, sentence, now.text, release_id)
            tx.insert_many(INSERT_EVENTS, 8, [(release_id, None, now.text, actor, VERBS[verb].event, release.status,
                                               status, detail_text(reason))])
            if status == CANCELLING and not any(n.status == RUNNING for n in nodes):
                release = self._release(tx, release_id)
                self._write(tx, release, decide(release, nodes, now, Policy(0, 0.0, 0.0, 0.0)), now, actor)
            return self._release(tx, release_id)

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

    # -- the claim -----------------------------------------------------------------------

    def look(self) -> tuple[list[int], list[int]]:
        """Gives the ids of the releases that may be claimed now, and of those in other hands."""
        with self.database.transaction() as tx:
            return runnable(self._candidates(tx))

    @staticmethod
    def _candidates(tx: Transaction) -> list[Candidate]:
        now = tx.now()
        # the index release_tasks_by_status finds what is not terminal
        return [Candidate(id_, target, version, status, running, expires is not None and expires > now)
                for id_, target, version, status, running, expires in tx.rows("""
            SELECT r.id, r.target, r.version, r.status,
                   (SELECT COUNT(*) FROM release_task_nodes n
                    WHERE n.release_task_id = r.id AND n.status = 'running'),
                   r.claim_expires_at
            FROM release_tasks r
            WHERE r.status IN ('pending', 'running', 'paused', 'cancelling')""")]

    def claim(self, release_id: int, owner: str, ttl_s: float) -> Claim | None:
        """Takes a release for ttl_s seconds; None when somebody else was first or it must wait.

        Every claim raises the fence, so what an earlier owner still wants to write changes nothing.
        """
        with self.database.transaction(write=True) as tx:
            if release_id not in runnable(self._candidates(tx))[0]:
                return None
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
                  AND (claim_expires_at IS NULL OR claim_expires_at <= ?)""", owner, expires, release_id, now)
            if not changed:
                raise StateMoved(f"release {release_id} was claimed by a writer outside of the lock")
            return Claim(release_id, tx.value("SELECT claim_fence FROM release_tasks WHERE id = ?", release_id))

    def renew(self, claim: Claim, ttl_s: float) -> bool:
        """Keeps a claim for ttl_s seconds more; False when it is lost."""
        with self.database.transaction(write=True) as tx:
            return tx.execute("UPDATE release_tasks SET claim_expires_at = ? WHERE id = ? AND claim_fence = ? "
                              "AND claim_expires_at IS NOT NULL",
                              self._expiry(tx, ttl_s), claim.release_id, claim.fence) == 1

    def let_go(self, claim: Claim) -> None:
        """Hands a claim back, so that anyone may take the release at once."""
        with self.database.transaction(write=True) as tx:
            tx.execute("UPDATE release_tasks SET claim_owner = '', claim_expires_at = NULL "
                       "WHERE id = ? AND claim_fence = ?", claim.release_id, claim.fence)

    def claimed_release(self, claim: Claim) -> Release:
        """Gives the release of a claim; ClaimLost when it has another owner or none."""
        with self.database.transaction() as tx:
            release = self._release(tx, claim.release_id)
            self._refuse_lost(release, claim)
            return release

    def claimed_release_with_nodes(self, claim: Claim) -> tuple[Release, list[ReleaseNode]]:
        """Gives the release of a claim and its nodes, of one moment; ClaimLost."""
        with self.database.transaction() as tx:
            release = self._release(tx, claim.release_id)
            self._refuse_lost(release, claim)
            return release, self._release_nodes(tx, claim.release_id)

    @staticmethod
    def _refuse_lost(release: Release, claim: Claim) -> None:
        if release.claim_fence != claim.fence or release.claim_expires_at is None:
            raise ClaimLost(f"{release} is with {release.claim_owner or 'nobody'} now")

    def busy_nodes(self, release_id: int) -> frozenset[int]:
        """Gives the nodes that another release has in flight, or that may be at a lost request."""
        with self.database.transaction() as tx:
            return self._busy_nodes(tx, release_id)

    def _busy_nodes(self, tx: Transaction, release_id: int) -> frozenset[int]:
        # the partial indexes release_task_nodes_one_running and _held hold few rows
        return frozenset(row[0] for row in tx.rows("""
            SELECT node_id FROM release_task_nodes WHERE status = 'running' AND release_task_id <> ?
            UNION
            SELECT node_id FROM release_task_nodes WHERE hold_until IS NOT NULL AND hold_until > ?
               AND release_task_id <> ?""", release_id, self._now(), release_id))

    def commit(self, claim: Claim, release: Release, decision: Decision, now: Moment, actor: str) -> None:
        """Writes a decision on the release as it was read, or nothing.

        Raises ClaimLost when the fence moved, StateMoved when the status or a node did. After a
        DatabaseError whether it was written is not known: read again.
        """
        with self.database.transaction(write=True) as tx:
            self._refuse_lost(self._release(tx, claim.release_id), claim)
            begun = {c.after.node_id for c in decision.changes if c.before.status == PENDING
                     and c.after.status == RUNNING}
            if begun and begun & self._busy_nodes(tx, claim.release_id):
                raise StateMoved(f"another release has a node of {release} in flight")
            self._write(tx, release, decision, now, actor, claim.fence)

    def was_written(self, claim: Claim, decision: Decision) -> bool:
        """Reads back, after an error at COMMIT, whether it took place; ClaimLost when that is another's now.

        As a writer, which waits for a transaction of ours that the server may still be at: what is
        found is the end of it.
        """
        with self.database.transaction(write=True) as tx:
            release = self._release(tx, claim.release_id)
            if release.claim_fence != claim.fence:
                raise ClaimLost(f"{release} is with {release.claim_owner or 'nobody'} now")
            found = {n.node_id: n for n in self._release_nodes(tx, claim.release_id)}
        return release.status == decision.status if not decision.changes else all(
            (after.status, after.attempts, after.finished_at, after.task_id)
            == (row.status, row.attempts, row.finished_at, row.task_id)
            for _, after, _ in decision.changes for row in [found[after.node_id]])

    def _write(self, tx: Transaction, release: Release, decision: Decision, now: Moment, actor: str,
               fence: int | None = None) -> None:
        self._write_nodes(tx, release.id, decision.changes, now)
        ends = decision.status in TERMINAL
        changed = tx.execute(f"""
            UPDATE release_tasks
            SET status = ?, status_reason = ?, error_msg = ?, updated_at = ?, {COUNTERS},
                finished_at = ?,
                claim_owner = CASE WHEN ? = 1 THEN '' ELSE claim_owner END,
                claim_expires_at = CASE WHEN ? = 1 THEN NULL ELSE claim_expires_at END
            WHERE id = ? AND status = ? AND claim_fence = ?""",
                             decision.status, decision.status_reason, decision.error_msg, now.text,
                             now.text if ends else None, int(ends), int(ends), release.id, release.status,
                             release.claim_fence if fence is None else fence)
        if changed != 1:
            raise StateMoved(f"{release} is no longer {release.status}")
        events: list[tuple[object, ...]] = [
            (release.id, c.after.node_id, now.text, actor, NODE_EVENTS[c.after.status], c.before.status,
             c.after.status, detail_text(c.detail or c.after.error_msg))
            for c in decision.changes if c.before.status != c.after.status]
        if decision.status != release.status:
            events.append((release.id, None, now.text, actor, RELEASE_EVENTS[decision.status], release.status,
                           decision.status, detail_text(decision.error_msg)))
        tx.insert_many(INSERT_EVENTS, 8, events)

    @staticmethod
    def _write_nodes(tx: Transaction, release_id: int, changes: Sequence[NodeChange], now: Moment) -> None:
        """Updates nodes, those that become alike in all but the task's id in one statement."""
        alike: dict[tuple[object, ...], list[NodeChange]] = {}
        for change in changes:
            before, after, _ = change
            key: tuple[object, ...] = (after.status, after.attempts, after.error_kind, after.error_msg,
                   after.hold_until, after.started_at, after.finished_at, before.status, before.attempts)
            alike.setdefault(key, []).append(change)
        for key, group in alike.items():
            for start in range(0, len(group), NODES_PER_STATEMENT):
                part = [change.after for change in group[start:start + NODES_PER_STATEMENT]]
                named = [c.after for c in group[start:start + NODES_PER_STATEMENT]
                         if c.after.task_id != c.before.task_id]
                task_id = f"CASE node_id {'WHEN ? THEN ? ' * len(named)}ELSE task_id END" if named else "task_id"
                changed = tx.execute(f"""
                    UPDATE release_task_nodes
                    SET status = ?, attempts = ?, error_kind = ?, error_msg = ?, hold_until = ?, started_at = ?,
                        finished_at = ?, updated_at = ?, task_id = {task_id}
                    WHERE release_task_id = ? AND status = ? AND attempts = ?
                      AND node_id IN ({', '.join('?' * len(part))})""",
                                     *key[:7], now.text, *(v for n in named for v in (n.node_id, n.task_id)),
                                     release_id, *key[7:], *(n.node_id for n in part))
                if changed != len(part):
                    raise StateMoved(f"a node of release {release_id} is no longer {key[7]}")

    @staticmethod
    def _expiry(tx: Transaction, ttl_s: float) -> str:
        return utc_text(epoch_of(tx.now()) + ttl_s)


# ======================================================================================
# 8 Agent client: mutual TLS, connections, deadlines, the two dialects (contract section 1).
#   Uses 1 to 3, and the words of 6; knows no database and no release.
# ======================================================================================

MAX_IDLE_AGENT_CONNECTIONS = 256
MAX_IDLE_AGENT_CONNECTION_S = 60.0
# The head of an answer may be this long on top of the body.
MAX_HEAD_BYTES = 64 << 10

# X509_V_ERR_...: what OpenSSL found wrong with an agent's certificate, for a person on call.
CERTIFICATE_FAULTS: Mapping[int, str] = {
    9: "presented a certificate that is not valid yet (look at both clocks)",
    10: "presented a certificate that has expired",
    18: "presented a self-signed certificate: it is not of our CA (CONTROL_CA)",
    19: "presented a certificate of another CA than ours (CONTROL_CA)",
    20: "presented a certificate of another CA than ours (CONTROL_CA)",
    21: "presented a certificate of another CA than ours (CONTROL_CA)",
    62: "presented a certificate for another name",
    64: "presented a certificate for another address",
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


class Answer(NamedTuple):
    """What an agent said: ACCEPTED, WORKING, SUCCESS or UNKNOWN, and the task's id."""
    state: str
    task_id: str = ""


class _TimedSocket:
    """A connected socket whose every wait ends at one moment, as http.client wants it.

    A socket's own timeout starts anew with each byte; a peer that drips would never end.
    """

    def __init__(self, sock: socket.socket, ends_at: float):
        self.sock = sock
        self.ends_at = ends_at
        self.received = 0
        self.unread = b""
        self.at_end = False

    def _arm(self) -> None:
        left_s = self.ends_at - time.monotonic()
        if left_s <= 0:
            raise socket.timeout("deadline")
        self.sock.settimeout(left_s)

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._arm()
            view = view[self.sock.send(view):]

    def recv(self, max_bytes: int) -> bytes:
        if self.unread:
            data, self.unread = self.unread[:max_bytes], self.unread[max_bytes:]
            return data
        self._arm()
        data = self.sock.recv(max_bytes)
        self.received += len(data)
        self.at_end = not data
        if self.received > MAX_BODY_BYTES + MAX_HEAD_BYTES:
            raise _TooBig
        return data

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_SocketReader(self), 16384)

    def close(self) -> None:
        """Does nothing: AgentClient closes, after the last byte was read."""


class _SocketReader(io.RawIOBase):
    def __init__(self, source: _TimedSocket):
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.recv(len(buffer))
        buffer[:len(data)] = data
        return len(data)


class _TooBig(Exception):
    """An answer over MAX_BODY_BYTES."""


class _Stale(Exception):
    """A kept-alive connection that the agent had closed before it saw the request."""


class ClientTls:
    """Our client certificate as an ssl context, made anew when the files change."""

    def __init__(self, cert: str, key: str, ca: str):
        self._files = (cert, key, ca)
        self._guard = threading.Lock()
        self._stamp: object = None
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """Gives the context of the files as they are; ConfigError when there is none that works.

        While a renewal is half done, the last pair that fitted goes on serving.
        """
        with self._guard:
            stamp = tuple(map(_file_stamp, self._files))
            if stamp != self._stamp:
                try:
                    self._context = client_context(*self._files)
                except ConfigError as error:
                    if self._context is None:
                        raise
                    log.warning("renewed certificate not taken yet: %s", error)
                self._stamp = stamp
            assert self._context is not None
            return self._context


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
        require_file(name, path)
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise ConfigError(f"{names[0]} {cert} does not fit {names[1]} {key}: "
                              "they are not of one pair") from None
        raise ConfigError(f"{names[0]} {cert} or {names[1]} {key} is not PEM: {_tls_reason(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{names[1]} {key}: {error}") from None


def require_file(name: str, path: str) -> None:
    """Raises ConfigError naming the setting, when its file can't be read."""
    if not path:
        raise ConfigError(f"{name} is not set")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{name} {path} can't be read: {_os_reason(error)}") from None


def load_ca(context: ssl.SSLContext, ca: str, name: str) -> None:
    """Loads the CA to verify peers by; ConfigError naming the setting."""
    require_file(name, ca)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(f"{name} {ca} holds no PEM certificate: {_tls_reason(error)}") from None


def client_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """Gives the context for calls to agents: TLS 1.2 or newer, both sides verified (section 1)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_ca(context, ca, "CONTROL_CA")
    load_pair(context, cert, key, ("CONTROL_CERT", "CONTROL_KEY"))
    return context


def _tls_reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


class AgentClient:
    """Speaks with agents, from many threads at once: dispatch(), query(), ping()."""

    def __init__(self, settings: Settings):
        """Takes the settings; reads no file yet: see prepare()."""
        self._connect_s = settings.agent_connect_timeout_sec
        self._request_s = settings.agent_request_timeout_sec
        self._server_name = settings.agent_tls_server_name
        self._tls = ClientTls(settings.control_cert, settings.control_key,
                              settings.control_ca) if settings.mtls_enabled else None
        self._guard = threading.Lock()
        # kept-alive connections, the oldest first: socket, its context, since
        self._idle: dict[Address, tuple[socket.socket, object, float]] = {}
        self._active: set[socket.socket] = set()
        self._is_closed = False

    def prepare(self) -> None:
        """Raises ConfigError when no agent could be called with these settings."""
        if self._tls:
            self._tls.context()

    def close(self) -> None:
        """Ends every connection, also under requests in flight: they and all later ones fail at once."""
        with self._guard:
            self._is_closed = True
            idle, self._idle = self._idle, {}
            for sock in self._active:
                with contextlib.suppress(OSError):
                    # not SSLSocket.shutdown: it takes the encryption away from under the other thread
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for sock, _, _ in idle.values():
            _close(sock)

    def dispatch(self, address: Address, task: AgentTask, within_s: float = 3600.0,
                 gate: Callable[[], bool] = lambda: True) -> Answer:
        """Sends a task; gives ACCEPTED with the id to poll, or SUCCESS from an execute agent.

        within_s shortens the request timeout; gate is asked just before the first byte leaves.
        Raises AgentError.
        """
        if address.protocol == TASKS:
            data = self._call(address, "POST", "/tasks/dispatch", within_s, {
                "taskId": task.id, "type": task.type, "version": task.version, "payload": task.payload}, gate)
            named = data.get("taskId")
            if not isinstance(named, str) or not named or one_line(named) != named:
                raise self._nonsense(address, "names no task id", data)
            return Answer(ACCEPTED, named)
        data = self._call(address, "POST", "/agent/v1/tasks/execute", within_s, {
            "requestId": task.id, "type": task.type, "payload": {**task.payload, "version": task.version}}, gate)
        return self._read_execution(address, task, data)

    def query(self, address: Address, task_id: str, within_s: float = 3600.0) -> Answer:
        """Asks a tasks agent for a task; gives WORKING, SUCCESS or UNKNOWN. Raises AgentError."""
        path = "/tasks/" + urllib.parse.quote(task_id, safe=":")
        data = self._call(address, "GET", path, within_s, may_be_unknown=True)
        if data is UNKNOWN_TASK:
            return Answer(UNKNOWN, task_id)
        status, last_error = data.get("status"), data.get("lastError")
        if data.get("taskId") != task_id:
            raise self._nonsense(address, "answers for another task", data)
        if status in ("pending", "running"):
            return Answer(WORKING, task_id)
        if status == "success":
            return Answer(SUCCESS, task_id)
        if status == "failed":
            text = str(last_error or "the agent gave no reason")
            raise AgentError(AGENT_FAILED, text, reached=True, final=True)
        raise self._nonsense(address, "gives no known status", data)

    def ping(self, address: Address) -> str:
        """Asks an agent for a task that it can't know; gives a line when it answers. AgentError else."""
        started = time.monotonic()
        status, _ = self._exchange(_Call(address, "GET", "/tasks/releasectl-ping", None, self._request_s,
                                         started + self._request_s, lambda: True))
        return f"answers (HTTP {status}) in {(time.monotonic() - started) * 1000:.0f} ms"

    def _read_execution(self, address: Address, task: AgentTask, data: Mapping[str, Any]) -> Answer:
        status, message = data.get("status"), data.get("message")
        text = message if isinstance(message, str) else ""
        if data.get("requestId") != task.id:
            raise self._nonsense(address, "answers for another request", data)
        if status == "failed":
            raise AgentError(AGENT_FAILED, text or "the agent gave no reason", reached=True, final=True)
        if status != "success":
            raise self._nonsense(address, "gives no known status", data)
        # an execute agent says success where its message tells otherwise (contract section 1)
        if "but reload failed:" in text:
            raise AgentError(AGENT_FAILED, text, reached=True, final=True)
        applied = re.search(r"Version (\d+) already applied \(current: (\d+)\)", text)
        if applied and int(applied.group(2)) > task.version:
            raise AgentError(REJECTED, f"the agent is already at version {int(applied.group(2))}", reached=True,
                             final=True, detail=text)
        if applied and int(applied.group(2)) != task.version:
            raise self._nonsense(address, f"has version {int(applied.group(2))} and calls it applied", data)
        return Answer(SUCCESS, task.id)

    @staticmethod
    def _nonsense(address: Address, what: str, data: object) -> AgentError:
        return AgentError(PROTOCOL, f"{address} {what}", reached=True, detail=f"{address} {what}: {data!r}")

    def _call(self, address: Address, method: str, path: str, within_s: float,
              body: Mapping[str, Any] | None = None, gate: Callable[[], bool] = lambda: True,
              may_be_unknown: bool = False) -> Any:
        """Gives the data of the agent's envelope, an object."""
        raw = to_json(body).encode() if body is not None else None
        limit_s = min(self._request_s, max(within_s, 0.0))
        status, answer = self._exchange(_Call(address, method, path, raw, limit_s, time.monotonic() + limit_s, gate))
        if status == 404 and may_be_unknown:
            return UNKNOWN_TASK
        if status != 200:
            raise self._bad_status(address, status, answer)
        envelope = self._read_envelope(address, answer)
        code = envelope.get("code")
        if isinstance(code, bool) or not isinstance(code, int):
            raise self._nonsense(address, "answers without a code", envelope)
        if code != 0:
            text = f"{address} refused: {envelope.get('message') or 'no reason given'} (code {code})"
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
            said = str(parse_json(answer).get("message") or said)
        text = f"{address} answered HTTP {status}" + (f": {said}" if said.strip() else "")
        if 300 <= status < 400:
            return AgentError(HTTP, f"{address} answered a redirect (HTTP {status}), which is not followed", True)
        if 400 <= status < 500 and status != 429:
            return AgentError(REJECTED, text, reached=True, final=True)
        return AgentError(HTTP, text, reached=True)

    # -- connections ---------------------------------------------------------------------

    def _exchange(self, call: _Call) -> tuple[int, bytes]:
        """Gives status and body of one request; on a new connection where a kept one was stale."""
        context = self._tls.context() if self._tls else None
        if call.address.protocol == TASKS:
            sock = self._take_idle(call.address, context)
            if sock is not None:
                with contextlib.suppress(_Stale):
                    return self._request(call, sock, context, reused=True)
        # an execute agent would run a repeated request twice, so its connections are never kept
        sock = self._connect(call.address, context, call.ends_at)
        return self._request(call, sock, context, reused=False)

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
        with self._guard:
            if self._is_closed:
                raise ConnectionAbortedError("releasectl is stopping")
            self._active.add(sock)
        try:
            yield
        finally:
            with self._guard:
                self._active.discard(sock)

    def _connect(self, address: Address, context: ssl.SSLContext | None, ends_at: float) -> socket.socket:
        connect_s = max(0.0, min(self._connect_s, ends_at - time.monotonic()))
        connect_by = time.monotonic() + connect_s
        try:
            sock = self._open_socket(address, connect_by)
        except socket.timeout:
            raise AgentError(UNREACHABLE, f"{address} did not take a connection within {connect_s:.3g} s",
                             reached=False) from None
        except (OSError, UnicodeError) as error:
            raise AgentError(UNREACHABLE, f"{address} can't be reached: {_os_reason(error)}", reached=False) from None
        if context is None:
            return sock
        try:
            tls_sock = context.wrap_socket(sock, server_hostname=self._server_name or address.host,
                                           do_handshake_on_connect=False)
            sock = tls_sock  # the plain one is detached from now on
            sock.settimeout(max(connect_by - time.monotonic(), 0.001))
            with self._in_flight(sock):
                tls_sock.do_handshake()
            return sock
        except (OSError, ValueError) as error:
            _close(sock)
            raise self._handshake_error(address, error, connect_s) from None

    def _open_socket(self, address: Address, connect_by: float) -> socket.socket:
        """Connects to the first address that answers; all tries together end at connect_by."""
        error: OSError = OSError("no address found")
        for family, kind, number, _, target in socket.getaddrinfo(address.host, address.port,
                                                                  type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, number)
            try:
                sock.settimeout(max(connect_by - time.monotonic(), 0.001))
                with self._in_flight(sock):
                    sock.connect(target)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as failed:
                sock.close()
                error = failed
        raise error

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

    def _request(self, call: _Call, sock: socket.socket, context: object, reused: bool) -> tuple[int, bytes]:
        address = call.address
        timed = _TimedSocket(sock, call.ends_at)
        keep = False
        try:
            with self._in_flight(sock):
                if not call.gate():
                    raise AgentError(UNREACHABLE, f"{address}: not sent, it became too late while connecting",
                                     reached=False)
                timed.sendall(_request_bytes(call))
                plain = _plain_answer(timed)
                status, answer, keep = plain if plain else _any_answer(timed, call)
            keep = keep and address.protocol == TASKS
            return status, answer
        except _TooBig:
            raise AgentError(PROTOCOL, f"{address} answered more than {MAX_BODY_BYTES >> 20} MiB",
                             reached=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            is_late = isinstance(error, socket.timeout)  # a reading that waited has seen the alert
            refusal = _refusal(error) or (_late_alert(timed) if timed.received == 0 and not is_late else "")
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

    def _exchange_error(self, address: Address, error: Exception, timed: _TimedSocket, limit_s: float) -> AgentError:
        if isinstance(error, socket.timeout):
            text = "drips: no whole answer" if timed.received else "did not answer"
            return AgentError(TIMEOUT, f"{address} {text} within {limit_s:.3g} s", reached=True,
                              hold_s=self._request_s)
        if isinstance(error, (OSError, http.client.IncompleteRead)) or timed.at_end:
            when = "in the middle of its answer" if timed.received else "before it answered"
            return AgentError(UNREACHABLE, f"{address} cut the connection {when}", reached=True, hold_s=CUT_HOLD_S)
        return AgentError(PROTOCOL, f"{address} answered what is not HTTP: {type(error).__name__}", reached=True)


def _request_bytes(call: _Call) -> bytes:
    """Gives a request as it leaves: head and body in one piece."""
    host = f"[{call.address.host}]" if ":" in call.address.host else call.address.host
    head = f"{call.method} {call.path} HTTP/1.1\r\nHost: {host}:{call.address.port}\r\n"
    if call.address.protocol != TASKS:
        head += "Connection: close\r\n"
    if call.body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(call.body)}\r\n"
    return f"{head}\r\n".encode() + (call.body or b"")


PLAIN_HEAD = re.compile(rb"HTTP/1\.1 ([2-5]\d\d) [^\r\n]*(?:\r\n[!#-9;-~]+:[^\r\n]*)+")


def _plain_answer(timed: _TimedSocket) -> tuple[int, bytes, bool] | None:
    """Reads an answer of the usual shape: one Content-Length, and no word on the connection.

    Gives status, body and True: to be kept. Any other shape is left unread for http.client, which
    takes 0.2 ms for each: a fifth of the time of a release.
    """
    data = b""
    while part := timed.recv(16384):
        data += part
        head, end, body = data.partition(b"\r\n\r\n")
        if not end and len(data) < 16384:
            continue
        plain, fields = PLAIN_HEAD.fullmatch(head), head.lower()
        lengths = re.findall(rb"\ncontent-length: *(\d{1,7})(?=\r|$)", fields)
        if not plain or len(lengths) != 1 or fields.count(b"\ncontent-length") != 1 or re.search(
                rb"\n(connection|transfer-encoding):", fields) or int(lengths[0]) > MAX_BODY_BYTES:
            break
        parts, missing = [body], int(lengths[0]) - len(body)
        while missing > 0 and (part := timed.recv(min(missing, 65536))):
            parts.append(part)
            missing -= len(part)
        if missing > 0:
            raise http.client.IncompleteRead(body)
        if missing < 0:
            break
        return int(plain.group(1)), b"".join(parts), True
    timed.unread, timed.at_end = data, False
    return None


def _any_answer(timed: _TimedSocket, call: _Call) -> tuple[int, bytes, bool]:
    """Reads an answer by http.client; gives status, body, and whether the connection can be kept."""
    response = http.client.HTTPResponse(timed, method=call.method)  # type: ignore[arg-type]
    response.begin()
    # http.client takes the end of the connection for the end of a head, and of a body
    cut_in_head = timed.at_end
    answer = response.read(MAX_BODY_BYTES + 1)
    if len(answer) > MAX_BODY_BYTES:
        raise _TooBig
    if cut_in_head or response.length:
        raise http.client.IncompleteRead(answer)
    return response.status, answer, not response.will_close and response.isclosed()


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


def _late_alert(timed: _TimedSocket) -> str:
    """Reads once more where a request failed: with TLS 1.3 the refusal comes after the handshake."""
    for _ in range(2):
        try:
            timed.ends_at = time.monotonic() + 0.5
            if not timed.recv(1):
                return ""
        except Exception as error:  # whatever it is, only an alert is of use
            if _refusal(error):
                return _refusal(error)
    return ""


# ======================================================================================
# 9 Executor: claim, lease, and the loop that joins decision, store and agents. Uses 1 to 8.
#
#   One driver thread a claimed release alone reads and writes its rows. Workers only talk to
#   agents and put outcomes on the driver's queue. One lease thread renews. Persist, then send.
# ======================================================================================

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
    """What run_once did: releases that it worked on as they are now, and how many others hold."""
    worked_on: list[Release]
    in_other_hands: int


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
        # Requests were cut by ourselves: what they bring says nothing of an agent.
        self.has_cut = False
        self._wake = threading.Event()
        self._guard = threading.Lock()
        self._drivers: dict[int, Driver] = {}
        self._pool = ThreadPoolExecutor(settings.agent_concurrency, thread_name_prefix="agent")
        self._lease_thread: threading.Thread | None = None
        self._closed = threading.Event()

    # -- what others call ----------------------------------------------------------------

    def run_once(self, drain: bool = False) -> Tick:
        """One tick (contract section 4); with drain one after the other until nothing is left to do.

        Raises DatabaseError, and ConfigError when there is work and no way to call an agent.
        """
        worked_on: dict[int, None] = {}
        while True:
            started, taken = self._look(is_tick=not drain)
            worked_on.update((driver.lease.claim.release_id, None) for driver in started)
            for driver in started:
                while driver.is_running() and not self.stopping.is_set():
                    driver.join(0.2)
            if self.stopping.is_set():
                self.close()
            if not drain or not started or self.stopping.is_set():
                return Tick([self.store.release(release_id) for release_id in worked_on], taken)

    def run_loop(self) -> None:
        """Looks for work every interval, and at once when nudged, until stop(). Survives the database."""
        said = ""
        while not self.stopping.is_set():
            self._wake.clear()
            try:
                self._look(is_tick=False)
                said = ""
            except (AppError, StateMoved) as error:
                if str(error) != said:
                    log.error("executor: %s; trying again", error)
                said = str(error)
            except Exception:  # the edge of a tick: the loop goes on
                log.exception("executor: a look for work failed")
            self._wake.wait(self.settings.release_executor_interval_sec)

    def nudge(self) -> None:
        """Says that something changed: looks for work now, and each driver at its release."""
        self._wake.set()
        for driver in self._active_drivers():
            driver.results.put(None)

    def is_busy(self) -> bool:
        """Says whether a release is driven now."""
        return bool(self._drivers)

    def stop(self) -> None:
        """Asks for a clean end; safe in a signal handler, returns at once."""
        self.stopping.set()
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
        self._pool.shutdown(wait=False)

    # -- claims --------------------------------------------------------------------------

    def _look(self, is_tick: bool) -> tuple[list[Driver], int]:
        """Claims what is runnable and starts a driver for each; gives them, and how many others hold."""
        free, taken = self.store.look()
        mine = {driver.lease.claim.release_id for driver in self._active_drivers()}
        if free:
            self.agents.prepare()  # raises before anything is claimed that could not be dispatched
            self._start_lease_thread()
        started = []
        for release_id in free:
            if release_id in mine or self.stopping.is_set():
                continue
            asked_at = self.clock.elapsed()
            claim = self.store.claim(release_id, self.owner, self.settings.claim_ttl_sec)
            if claim is not None:
                # started at once: an error at the next claim must not leave a claim without its driver
                started.append(self._drive(Lease(claim, asked_at + self.settings.claim_ttl_sec), is_tick))
        return started, len([release_id for release_id in taken if release_id not in mine])

    def _drive(self, lease: Lease, is_tick: bool) -> Driver:
        driver = Driver(self, lease, is_tick)
        with self._guard:
            self._drivers[lease.claim.release_id] = driver
        driver.start()
        return driver

    def _start_lease_thread(self) -> None:
        if self._lease_thread is None:
            self._lease_thread = threading.Thread(target=self._keep_leases, name="lease", daemon=True)
            self._lease_thread.start()

    def _keep_leases(self) -> None:
        """Renews every claim three times in its life, apart from the work."""
        while not self._closed.wait(self.settings.claim_ttl_sec / 3):
            for driver in self._active_drivers():
                self._renew(driver.lease)

    def _renew(self, lease: Lease) -> None:
        asked_at = self.clock.elapsed()
        try:
            if self.store.renew(lease.claim, self.settings.claim_ttl_sec):
                lease.valid_until = asked_at + self.settings.claim_ttl_sec
            else:
                lease.is_lost = True
        except DatabaseError as error:
            log.error("release %d: its claim could not be renewed: %s", lease.claim.release_id, error)
        except Exception:  # the lease thread must outlive everything
            log.exception("release %d: its claim could not be renewed", lease.claim.release_id)

    def _active_drivers(self) -> list[Driver]:
        with self._guard:
            return list(self._drivers.values())

    # -- what drivers call ---------------------------------------------------------------

    def ended(self, driver: Driver) -> None:
        """Forgets a driver at its end; the next release of its target may go now."""
        with self._guard:
            self._drivers.pop(driver.lease.claim.release_id, None)
        self._wake.set()

    def share(self) -> int:
        """Gives how many requests a driver may have in flight: AGENT_CONCURRENCY is for all."""
        with self._guard:
            return max(1, self.settings.agent_concurrency // max(1, len(self._drivers)))

    def submit(self, work: Callable[[], None]) -> None:
        """Runs work on a worker."""
        self._pool.submit(work)


def outcome_of(node_id: int, op: str, answer: Answer | AgentError) -> Outcome:
    """Gives what an agent's answer or failure means to the decision."""
    if isinstance(answer, Answer):
        return Outcome(node_id, op, answer.state, answer.task_id)
    result = FAILED if answer.final else UNSENT if not answer.reached else LOST if answer.hold_s else UNCLEAR
    return Outcome(node_id, op, result, "", answer.kind, answer.message, answer.detail, answer.hold_s)


class Driver:
    """Drives one claimed release, in a thread of its own: read, decide, commit, send, wait."""

    def __init__(self, executor: Executor, lease: Lease, is_tick: bool):
        self.lease = lease
        self.results: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._executor = executor
        self._store = executor.store
        self._policy = executor.policy
        self._is_tick = is_tick
        self._nodes: dict[int, ReleaseNode] = {}
        self._is_stale = True
        self._broken = ""
        self._payload: dict[str, Any] = {}
        self._strategy = NO_STRATEGY
        self._in_flight = 0
        self._news_at = self._now().elapsed
        self._said = ""
        self._unclear: Decision | None = None
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
        return Moment(self._executor.clock.wall(), self._executor.clock.elapsed())

    def _run(self) -> None:
        try:
            wait_s = self.step()
            while wait_s is not None:
                self.collect(wait_s)
                wait_s = self.step()
        finally:
            self.lease.is_lost = True
            self._executor.ended(self)

    def step(self) -> float | None:
        """Takes one turn, and lets go after the last; gives how many seconds to wait, None at the end."""
        release_id = self.lease.claim.release_id
        try:
            wait_s = self.turn()
            if wait_s is None and not self.lease.is_lost:
                self._store.let_go(self.lease.claim)
            return wait_s
        except ClaimLost as error:
            log.warning("release %d: let go, %s", release_id, error)
        except DatabaseError as error:
            log.error("release %d: let go without a word to the database: %s", release_id, error)
        except Exception:  # the edge of a driver: the release goes on when the claim has run out
            log.exception("release %d: its driver failed", release_id)
        return None

    def turn(self) -> float | None:
        """Read, decide, commit, send; gives how many seconds to wait for outcomes, None at the end."""
        try:
            release = self._read()
            now = self._now()
            decision = self._decide(release, now)
            if decision.changes or decision.status != release.status:
                self._commit(release, decision, now)
            if decision.status in TERMINAL:
                self.lease.is_lost = True  # the commit handed the claim back
                return None
            self._send(release, decision, now)
            if self._may_leave(decision, now):
                return None
            if self._room() <= 0:
                return self._policy.interval_s
            return min(max(decision.wake_at - self._now().elapsed, 0.0), self._policy.interval_s)
        except StateMoved as error:
            log.info("%s: read again", error)
            self._is_stale, self._unclear = True, None  # rolled back for certain
            return 0.0
        except DatabaseError as error:
            # what agents said stays in memory, and is written when the database is back
            if self.lease.is_lost or self._executor.stopping.is_set():
                raise
            self._say(str(error))
            self._is_stale = True
            return min(self._policy.interval_s, 1.0)

    def _say(self, error: str) -> None:
        """Logs an error of the database when it is another one than the last."""
        if error != self._said:
            log.error("release %d: %s; trying again", self.lease.claim.release_id, error)
        self._said = error

    def _read(self) -> Release:
        """Gives the release as it stands; the nodes too when what is known of them may be old."""
        if self._unclear is not None:
            self._settle(self._unclear)
        if not self._is_stale:
            return self._store.claimed_release(self.lease.claim)
        release, rows = self._store.claimed_release_with_nodes(self.lease.claim)
        now = self._now()
        for row in rows:
            known = self._nodes.get(row.node_id)
            if known is None or (known.status, known.attempts) != (row.status, row.attempts):
                self._nodes[row.node_id] = adopt(row, now, self._policy)
        try:
            self._payload = parse_payload(parse_json(release.payload))
            self._strategy = parse_strategy(parse_json(release.strategy))
        except (ValueError, AppError) as error:
            self._broken = f"payload or strategy can't be used: {one_line(error, 200)}"
        self._is_stale = False
        return release

    def _decide(self, release: Release, now: Moment) -> Decision:
        nodes = list(self._nodes.values())
        is_starting = release.status == RUNNING and any(n.status == PENDING for n in nodes)
        busy = self._store.busy_nodes(release.id) if is_starting else frozenset()
        return decide(release, nodes, now, self._policy, self._strategy, self._room(), busy, self._broken)

    def _room(self) -> int:
        """Gives how many requests may leave now."""
        if self._executor.stopping.is_set() or not self.lease.is_valid(self._executor.clock.elapsed()):
            return 0
        return self._executor.share() - self._in_flight

    def _commit(self, release: Release, decision: Decision, now: Moment) -> None:
        self._unclear = decision
        self._store.commit(self.lease.claim, release, decision, now, self._executor.owner)
        self._unclear = None
        self._said = ""
        self._news_at = now.elapsed
        for change in decision.changes:
            self._nodes[change.after.node_id] = change.after
            if change.after.status == FAILED:
                log.warning("%s: node %s failed: %s", release, change.after.name, change.after.error_msg)
        if decision.status != release.status:
            log.log(logging.INFO if decision.status == SUCCESS else logging.WARNING, "%s: %s, %s", release,
                    decision.status, decision.status_reason)

    def _settle(self, decision: Decision) -> None:
        """Finds out whether a commit that ended in an error took place, before anything is repeated.

        Where it did, its requests did not leave: they are due now, as repetitions.
        """
        if self._store.was_written(self.lease.claim, decision):
            for change in decision.changes:
                self._nodes[change.after.node_id] = dataclasses.replace(change.after, in_flight=False)
            if decision.status in TERMINAL:
                self.lease.is_lost = True
                raise ClaimLost("the release is at its end: the commit that seemed to fail took place")
        self._unclear = None

    def _send(self, release: Release, decision: Decision, now: Moment) -> None:
        for op, node in decision.sends:
            task_id = node.task_id or task_id_for(release.type, node.main_ip, release.version)
            node = dataclasses.replace(node, in_flight=True)
            self._nodes[node.node_id] = node
            self._in_flight += 1
            task = AgentTask(task_id, release.type, release.version, self._payload)
            self._executor.submit(functools.partial(self._work, op, node, task, now))

    def may_dispatch(self, written_at: Moment) -> bool:
        """Says whether a dispatch may leave this instant: the claim holds, and it is not too late.

        Asked on a worker after connecting, just before the first byte. A take-over reckons with a
        request that left soon after it was written down, and waits for that one only.
        """
        elapsed = self._executor.clock.elapsed()
        return self.lease.is_valid(elapsed) and elapsed <= written_at.elapsed + self._policy.leave_within_s

    def _work(self, op: str, node: ReleaseNode, task: AgentTask, written_at: Moment) -> None:
        """Runs on a worker: one request, one outcome, whatever happens."""
        try:
            outcome = self._ask(op, node, task, written_at)
        except Exception:  # the edge of a worker: a node must never be forgotten
            log.exception("node %s: %s failed within releasectl", node.name, op)
            outcome = Outcome(node.node_id, op, LOST, "", PROTOCOL, "releasectl itself failed: see its log")
        self.results.put(outcome)

    def _ask(self, op: str, node: ReleaseNode, task: AgentTask, written_at: Moment) -> Outcome:
        address = Address(node.main_ip, node.agent_port, node.agent_protocol)
        within_s = node.deadline - written_at.elapsed
        agents = self._executor.agents
        try:
            if op == DISPATCH:
                gate = functools.partial(self.may_dispatch, written_at)
                answer = agents.dispatch(address, task, within_s, gate)
                if answer == Answer(ACCEPTED, task.id):
                    answer = self._look_at_once(address, answer, within_s)
                return outcome_of(node.node_id, op, answer)
            return outcome_of(node.node_id, op, agents.query(address, task.id, within_s))
        except AgentError as error:
            return outcome_of(node.node_id, op, error)
        except ConfigError as error:  # the certificate went away under us
            return Outcome(node.node_id, op, UNSENT, "", TLS, error.message)

    def _look_at_once(self, address: Address, accepted: Answer, within_s: float) -> Answer:
        """Asks for a task just dispatched, on the same connection: a quick one is at its end by then.

        That saves it a turn of the driver. Whatever else is said now, a poll will hear again.
        """
        try:
            answer = self._executor.agents.query(address, accepted.task_id, min(within_s, FIRST_LOOK_S))
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
        if self._executor.has_cut:
            return
        now = self._now()
        if outcome.result != WORKING:
            self._news_at = now.elapsed
        if outcome.error_kind and outcome.result != FAILED:
            log.info("release %d: node %s: %s failed, %s", self.lease.claim.release_id,
                     self._nodes[outcome.node_id].name, outcome.op, outcome.message)
        self._nodes[outcome.node_id] = observe(self._nodes[outcome.node_id], outcome, now, self._policy)

    def _may_leave(self, decision: Decision, now: Moment) -> bool:
        """Says whether the claim can be handed back: nothing in flight, and no reason to stay."""
        if self._in_flight:
            return False
        if self._executor.stopping.is_set():
            return True
        if decision.status == PAUSED and not any(n.status == RUNNING for n in self._nodes.values()):
            return True
        return self._is_tick and now.elapsed - self._news_at >= self._policy.interval_s


# ======================================================================================
# 10 Shapes: the JSON of section 5 of the contract, for the API and the command line, and
#    its schemas. Pure; uses 1, 2, 5, 6 and the rows of 7.
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


def event_json(event: Event) -> dict[str, Any]:
    """Gives one row of a release's history."""
    return {"id": event.id, "releaseId": event.release_id, "nodeId": event.node_id, "nodeName": event.node_name,
            "at": event.at, "actor": event.actor, "event": event.event, "fromStatus": event.from_status,
            "toStatus": event.to_status, "detail": event.detail}


def page_json(page: Page, item_json: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Gives a page of a list."""
    return {"items": [item_json(item) for item in page.items], "total": page.total, "page": page.number,
            "pageSize": page.size}


def created_json(release: Release, batches: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Gives the answer to the creation of a release."""
    return {"releaseId": release.id, "version": release.version, "totalNodes": release.total_nodes,
            "batches": [{"batch": number, "nodeIds": list(ids)} for number, ids in enumerate(batches, 1)]}


def release_with_nodes_json(release: Release, nodes: Sequence[ReleaseNode]) -> dict[str, Any]:
    """Gives a release with its nodes by batch."""
    batches: dict[int, list[dict[str, Any]]] = {}
    for node in nodes:
        batches.setdefault(node.batch, []).append(release_node_json(node))
    return {"release": release_json(release),
            "batches": [{"batch": number, "nodes": members} for number, members in sorted(batches.items())]}


# Field of a node in JSON: column, how it is read, schema for /openapi.json.
NODE_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "name": ("name", parse_name, {"type": "string", "minLength": 1, "maxLength": 100}),
    "mainIp": ("main_ip", parse_address, {"type": "string", "description": "IP address or host name"}),
    "agentPort": ("agent_port", parse_port, {"type": "integer", "minimum": 1, "maximum": 65535}),
    "agentProtocol": ("agent_protocol", lambda v: parse_choice("agentProtocol", v, PROTOCOLS),
                      {"type": "string", "enum": list(PROTOCOLS)}),
    "labels": ("labels", parse_labels, {"type": "object", "additionalProperties": {"type": "string"}}),
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
    """Gives what a release is asked to be from its JSON; AppError 2003."""
    known_keys(body, ("target", "reason", "payload", "strategy"))
    parse_strategy(body.get("strategy", {}))
    return ReleaseRequest(parse_target(body.get("target", "cdn")), parse_text("reason", body.get("reason", "")),
                          parse_payload(body.get("payload", {})))


# The schemas, for /openapi.json.

_TIME = {"type": ["string", "null"], "format": "date-time"}
_ID = {"type": "integer", "minimum": 1}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}


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
    return {
        "Release": _object({
            "id": _ID, "type": _TEXT, "target": _TEXT, "version": _ID,
            "status": {"type": "string", "enum": list(RELEASE_STATUSES)}, "statusReason": _TEXT, "reason": _TEXT,
            "totalNodes": _COUNT, "successNodes": _COUNT, "failedNodes": _COUNT, "skippedNodes": _COUNT,
            "currentBatch": _COUNT, "errorMsg": _TEXT, "strategy": {"type": "object"},
            "retryOf": {"type": ["integer", "null"]}, "rollbackOf": {"type": ["integer", "null"]},
            "createdAt": _TIME, "startedAt": _TIME, "finishedAt": _TIME, "updatedAt": _TIME}),
        "ReleaseNode": _object({
            "nodeId": _ID, "nodeName": _TEXT, "mainIp": _TEXT,
            "status": {"type": "string", "enum": [PENDING, RUNNING, SUCCESS, FAILED, SKIPPED]}, "taskId": _TEXT,
            "attempts": _COUNT, "errorKind": _TEXT, "errorMsg": _TEXT, "startedAt": _TIME, "finishedAt": _TIME}),
        "ReleaseWithNodes": _object({
            "release": _ref("Release"),
            "batches": {"type": "array", "items": _object({
                **batch, "nodes": {"type": "array", "items": _ref("ReleaseNode")}})}}, required=["release"]),
        "ReleaseList": _list_of("Release"),
        "Created": _object({
            "releaseId": _ID, "version": _ID, "totalNodes": _COUNT,
            "batches": {"type": "array", "items": _object({
                **batch, "nodeIds": {"type": "array", "items": _ID}})}}),
        "Event": _object({
            "id": _ID, "releaseId": _ID, "nodeId": {"type": ["integer", "null"]}, "nodeName": _TEXT, "at": _TIME,
            "actor": _TEXT, "event": _TEXT, "fromStatus": _TEXT, "toStatus": _TEXT, "detail": _TEXT}),
        "EventList": _list_of("Event", paged=False),
        "Node": _object({"id": _ID, **node, "createdAt": _TIME, "updatedAt": _TIME}),
        "NodeList": _list_of("Node"),
        "NewNode": _object(node, required=["name", "mainIp"]),
        "NodeChange": _object(node, required=[]),
        "NewRelease": _object({"target": _TEXT, "reason": _TEXT, "payload": {"type": "object"},
                               "strategy": {"type": "object"}}, required=[]),
        "Act": _object({"reason": _TEXT}, required=[]),
        "Nothing": _object({}),
        "Status": _object({"status": _TEXT}),
        "Null": {"type": "null"},
        "Error": _object({"code": {"type": "integer", "enum": sorted(ERROR_CODES)}, "message": _TEXT,
                          "data": {"type": "null"}}),
    }


# ======================================================================================
# 11 API: routes as a table, handlers, tokens, the HTTP server and its limits (contract
#    section 5). Uses 1 to 10.
# ======================================================================================

VIEWER, OPERATOR, ANYONE = "viewer", "operator", ""
IDLE_CONNECTION_S = 30.0
# While a release runs, whoever reads a whole one rests so many times as long as the reading took.
WHOLE_READ_REST, WHOLE_READ_WAIT_S = 15, 20.0
# Before a connection is closed, what its client still sends is dropped for so long.
LINGER_S, MAX_LINGER_BYTES = 1.0, 16 << 20


class Request(NamedTuple):
    """A request as a handler sees it: checked, and with who asks."""
    ids: tuple[int, ...]
    query: Mapping[str, str]
    body: Mapping[str, Any]
    actor: str

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


class Api:
    """The handlers of the routes: a Request in, a Reply out, AppError for everything else."""

    def __init__(self, store: Store, nudge: Callable[[], None] = lambda: None,
                 is_busy: Callable[[], bool] = lambda: False):
        """nudge is called after every act, so that an executor in this process looks at once.

        is_busy says whether it drives a release now, which a reading of whole releases must not slow down.
        """
        self.store = store
        self._nudge = nudge
        self._is_busy = is_busy
        self._whole_read = threading.Lock()
        self.started_at = time.time()

    def create_release(self, request: Request) -> Reply:
        reply = Reply(201, created_json(*self.store.create_release(parse_release_request(request.body),
                                                                   request.actor)))
        self._nudge()
        return reply

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
        return Reply(200, self._whole_release(request.ids[0]))

    def _whole_release(self, release_id: int) -> dict[str, Any]:
        """Gives a release with its nodes; of thousands only one at a time, with a rest while a release runs.

        All threads of this process share one interpreter: clients that read in a loop would take most of it.
        """
        if not self._whole_read.acquire(timeout=WHOLE_READ_WAIT_S):
            raise AppError(4029, "too many read whole releases: ask for ?view=summary", retry_after_s=5)
        try:
            began = time.thread_time()
            data = release_with_nodes_json(*self.store.release_with_nodes(release_id))
            if self._is_busy():
                time.sleep(WHOLE_READ_REST * (time.thread_time() - began))
            return data
        finally:
            self._whole_read.release()

    def pause(self, request: Request) -> Reply:
        return self._act("pause", request)

    def resume(self, request: Request) -> Reply:
        return self._act("resume", request)

    def cancel(self, request: Request) -> Reply:
        return self._act("cancel", request)

    def _act(self, verb: str, request: Request) -> Reply:
        known_keys(request.body, ("reason",))
        reason = parse_text("reason", request.body.get("reason", ""))
        release = self.store.act(verb, request.ids[0], request.actor, reason)
        self._nudge()
        return Reply(200, release_json(release))

    def retry(self, request: Request) -> Reply:
        return self._again(self.store.retry, request)

    def rollback(self, request: Request) -> Reply:
        return self._again(self.store.rollback, request)

    def _again(self, make: Callable[[int, str], tuple[Release, list[list[int]]]], request: Request) -> Reply:
        known_keys(request.body, ())
        reply = Reply(201, created_json(*make(request.ids[0], request.actor)))
        self._nudge()
        return reply

    def list_events(self, request: Request) -> Reply:
        events = self.store.events(request.ids[0], request.integer("after", 0, 0, MAX_ID),
                                   request.integer("limit", 100, 1, 1000))
        return Reply(200, {"items": [event_json(event) for event in events]})

    def list_nodes(self, request: Request) -> Reply:
        page = self.store.nodes(request.integer("page", 1, 1, 10**9),
                                request.integer("pageSize", 20, 1, MAX_PAGE_SIZE))
        return Reply(200, page_json(page, node_json))

    def add_node(self, request: Request) -> Reply:
        return Reply(201, node_json(self.store.add_node(**parse_node_fields(request.body, ("name", "mainIp")))))

    def get_node(self, request: Request) -> Reply:
        return Reply(200, node_json(self.store.node(request.ids[0])))

    def update_node(self, request: Request) -> Reply:
        return Reply(200, node_json(self.store.update_node(request.ids[0], parse_node_fields(request.body))))

    def delete_node(self, request: Request) -> Reply:
        self.store.delete_node(request.ids[0])
        return Reply(200, None)

    def health(self, _request: Request) -> Reply:
        return Reply(200, {"status": "ok"})

    def ready(self, _request: Request) -> Reply:
        self.store.database.require_schema()
        self.store.probe()
        return Reply(200, {"status": "ready"})

    def metrics(self, _request: Request) -> Reply:
        return Reply(200, metrics_text(self.store.counts(), self.started_at),
                     "text/plain; version=0.0.4; charset=utf-8")

    def openapi(self, _request: Request) -> Reply:
        return Reply(200, to_json(openapi_document()), "application/json")


def metrics_text(counts: Mapping[str, Mapping[str, int]], started_at: float) -> str:
    """Gives the gauges in the Prometheus text format."""
    lines = ["# HELP releasectl_build_info What runs here.", "# TYPE releasectl_build_info gauge",
             f'releasectl_build_info{{version="{__version__}"}} 1',
             "# HELP releasectl_start_time_seconds When this process started, in seconds since 1970.",
             "# TYPE releasectl_start_time_seconds gauge", f"releasectl_start_time_seconds {started_at:.3f}"]
    for name, help_text, key, words in (
            ("releasectl_releases", "Releases in the database.", "releases", RELEASE_STATUSES),
            ("releasectl_nodes", "Enabled nodes.", "nodes", NODE_STATUSES),
            ("releasectl_release_nodes", "Nodes of releases that are in flight.", "in_flight", (RUNNING,))):
        lines += [f"# HELP {name} {help_text}", f"# TYPE {name} gauge"]
        lines += [f'{name}{{status="{word}"}} {counts[key].get(word, 0)}' for word in words]
    return "\n".join(lines) + "\n"


class Route(NamedTuple):
    """One row of the API: {id} in the path is a number."""
    method: str
    path: str
    handler: str
    role: str
    summary: str
    answers: str
    query: tuple[str, ...] = ()
    body: str = ""


ROUTES: tuple[Route, ...] = (
    Route("POST", "/api/v1/releases", "create_release", OPERATOR, "Create a release for the online nodes",
          "Created", body="NewRelease"),
    Route("GET", "/api/v1/releases", "list_releases", VIEWER, "List releases, newest first", "ReleaseList",
          ("status", "page", "pageSize")),
    Route("GET", "/api/v1/releases/{id}", "get_release", VIEWER, "A release and its nodes by batch",
          "ReleaseWithNodes", ("view",)),
    Route("POST", "/api/v1/releases/{id}/pause", "pause", OPERATOR, "Dispatch nothing more until resume", "Release",
          body="Act"),
    Route("POST", "/api/v1/releases/{id}/resume", "resume", OPERATOR, "Go on", "Release", body="Act"),
    Route("POST", "/api/v1/releases/{id}/cancel", "cancel", OPERATOR, "End it: what is in flight is waited for",
          "Release", body="Act"),
    Route("POST", "/api/v1/releases/{id}/retry", "retry", OPERATOR,
          "A new release of its payload for its failed and skipped nodes", "Created", body="Nothing"),
    Route("POST", "/api/v1/releases/{id}/rollback", "rollback", OPERATOR,
          "A new release of the newest successful payload before it", "Created", body="Nothing"),
    Route("GET", "/api/v1/releases/{id}/events", "list_events", VIEWER, "Its history, oldest first", "EventList",
          ("after", "limit")),
    Route("GET", "/api/v1/nodes", "list_nodes", VIEWER, "List nodes", "NodeList", ("page", "pageSize")),
    Route("POST", "/api/v1/nodes", "add_node", OPERATOR, "Add a node", "Node", body="NewNode"),
    Route("GET", "/api/v1/nodes/{id}", "get_node", VIEWER, "A node", "Node"),
    Route("PATCH", "/api/v1/nodes/{id}", "update_node", OPERATOR, "Change a node", "Node", body="NodeChange"),
    Route("DELETE", "/api/v1/nodes/{id}", "delete_node", OPERATOR, "Delete a node that no release names", "Null"),
    Route("GET", "/healthz", "health", ANYONE, "The process serves", "Status"),
    Route("GET", "/readyz", "ready", ANYONE, "The database can be used", "Status"),
    Route("GET", "/metrics", "metrics", VIEWER, "Gauges for Prometheus", "text"),
    Route("GET", "/openapi.json", "openapi", VIEWER, "This document", "json"),
)
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

    def load(self) -> list[tuple[str, str, str]]:
        """Gives name, role and hash of each token; ConfigError naming the line that is wrong."""
        with self._guard:
            stamp = _file_stamp(self._path)
            if stamp != self._stamp or stamp is None:
                self._entries = self._read()
                self._stamp = stamp
            return self._entries

    def _read(self) -> list[tuple[str, str, str]]:
        require_private("API_TOKENS_FILE", self._path)
        try:
            lines = Path(self._path).read_text(encoding="utf-8").splitlines()
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
            log.error("nobody is let in: %s", error)
            raise AppError(5001, "the tokens can't be read: see the log of releasectl") from None
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for name, role, known in entries:
            if hmac.compare_digest(known, digest):
                found = name, role
        if found is None:
            raise AppError(1002, "this token is not known")
        return found


def require_private(name: str, path: str) -> None:
    """Raises ConfigError when a file can't be read, or can be read by others than owner and group."""
    require_file(name, path)
    if os.stat(path).st_mode & stat.S_IROTH:
        raise ConfigError(f"{name} {path} can be read by everybody: chmod o-rwx it")


class ApiHandler(http.server.BaseHTTPRequestHandler):
    """One connection. Whatever the library's parser thinks, the answer is the JSON envelope."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_CONNECTION_S
    wbufsize = -1  # head and body leave in one packet
    server: ApiServer

    def setup(self) -> None:
        if self.server.tls:
            self.request.settimeout(self.timeout)
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        """Says goodbye, then drops what still comes: a reset would take our answer away (RFC 9112, 9.6)."""
        super().finish()
        self.request.settimeout(LINGER_S)
        with contextlib.suppress(OSError, ValueError):
            if self.server.tls:
                self.request.unwrap()
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)
            left = MAX_LINGER_BYTES
            while left > 0:
                left -= len(self.request.recv(65536)) or left
        self.request.close()

    def handle_expect_100(self) -> bool:
        """Sends the 100 at once: the client waits for it."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def __getattr__(self, name: str) -> Any:
        """Gives one do_METHOD for every method: the table of routes knows which are taken."""
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        try:
            self._reply(self._handle())
        except AppError as error:
            self._refuse(error)
        except (BrokenPipeError, ConnectionResetError, socket.timeout, ssl.SSLError):
            raise
        except Exception:  # the edge of a request
            log.exception("%s %s failed", self.command, one_line(self.path, 200))
            self._refuse(AppError(5001, "releasectl itself failed: see its log"))

    def _handle(self) -> Reply:
        raw_body = self._read_body()
        try:
            target = urllib.parse.urlsplit(self.path)
        except ValueError:
            raise AppError(2002, f"{one_line(self.path, 100)} is not an address") from None
        route, ids = find_route(self.command, urllib.parse.unquote(target.path))
        actor, role = "", OPERATOR
        if route.role != ANYONE:
            actor, role = self.server.who(self.headers.get("Authorization"))
        if route.role == OPERATOR and role != OPERATOR:
            raise AppError(1004, f"{actor} has the role {role}: this needs {OPERATOR}")
        query = self._query(target.query, route)
        request = Request(ids, query, self._body(raw_body, route), actor)
        return getattr(self.server.api, route.handler)(request)  # type: ignore[no-any-return]

    def _read_body(self) -> bytes:
        """Reads the body before anything is answered, so that the next request is found."""
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise AppError(2002, "Transfer-Encoding is not taken: send Content-Length")
        lengths = self.headers.get_all("Content-Length", ["0"])
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            self.close_connection = True
            raise AppError(2002, "Content-Length must be one number")
        if int(lengths[0]) > MAX_BODY_BYTES:
            self.close_connection = True
            raise AppError(4013, f"the body is over {MAX_BODY_BYTES >> 20} MiB")
        body = self.rfile.read(int(lengths[0]))
        if len(body) < int(lengths[0]):
            self.close_connection = True
            raise AppError(2002, "the body is shorter than its Content-Length")
        return body

    def _query(self, text: str, route: Route) -> dict[str, str]:
        try:
            pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=20, errors="strict")
        except ValueError:
            raise AppError(2002, "the query can't be read") from None
        known_keys(dict(pairs), route.query)
        if len(dict(pairs)) != len(pairs):
            raise AppError(2002, "a parameter of the query stands twice")
        return dict(pairs)

    def _body(self, raw: bytes, route: Route) -> Mapping[str, Any]:
        if not raw:
            return {}
        if not route.body:
            raise AppError(2002, f"{route.method} {route.path} takes no body")
        content_type = self.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if content_type != "application/json":
            raise AppError(4015, "the body must be JSON: send Content-Type: application/json")
        try:
            body = parse_json(raw)
        except ValueError as error:
            raise AppError(2002, f"the body is not JSON: {one_line(error, 150)}") from None
        if not isinstance(body, dict):
            raise AppError(2002, "the body must be a JSON object")
        return body

    def _reply(self, reply: Reply) -> None:
        if reply.content_type:
            self._write(reply.status, reply.data, reply.content_type, {})
        else:
            envelope = {"code": 0, "message": "success", "data": reply.data}
            self._write(reply.status, to_json(envelope), "application/json", {})

    def _refuse(self, error: AppError, http_status: int = 0) -> None:
        headers = {}
        if error.allow:
            headers["Allow"] = error.allow
        if error.retry_after_s:
            headers["Retry-After"] = str(error.retry_after_s)
        if error.http_status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        text = to_json({"code": error.code, "message": one_line(error.message), "data": None})
        self._write(http_status or error.http_status, text, "application/json", headers)

    def _write(self, status: int, text: str, content_type: str, headers: Mapping[str, str]) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answers what the library's parser refuses: in the envelope, then closes."""
        self.close_connection = True
        if not hasattr(self, "headers"):
            self.headers = http.client.HTTPMessage()
        self.command = self.command or "GET"
        if self.request_version == "HTTP/0.9":
            self.request_version = "HTTP/1.0"  # else the library would leave out the head
        text = message or http.HTTPStatus(code).phrase
        self._refuse(AppError(2002, one_line(text, 150)), http_status=code)

    def version_string(self) -> str:
        return "releasectl"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), one_line(format % args))


class ApiServer(http.server.ThreadingHTTPServer):
    """The listener: a thread a connection, TLS in that thread and never in the accept loop."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, settings: Settings, api: Api):
        """Binds the address; ConfigError when it can't be, or is open to others without tokens."""
        host, port = settings.http_addr
        self.api = api
        self.tokens = Tokens(settings.api_tokens_file) if settings.api_tokens_file else None
        if self.tokens:
            self.tokens.load()
        self.tls = server_context(settings) if settings.http_cert else None
        try:
            family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            if not self.tokens and not ipaddress.ip_address(str(target[0])).is_loopback:
                raise ConfigError(f"HTTP_ADDR {host}:{port} is open to others: set API_TOKENS_FILE, "
                                  "or listen on 127.0.0.1")
            self.address_family = family
            super().__init__((str(target[0]), port), ApiHandler)
        except OSError as error:
            raise ConfigError(f"HTTP_ADDR {host}:{port} can't be listened on: {_os_reason(error)}") from None

    def server_bind(self) -> None:
        """Binds without the look-up of a name, which may take long on a host without DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def who(self, authorization: str | None) -> tuple[str, str]:
        """Gives name and role of who asks; without a token file everybody on this host is an operator."""
        return self.tokens.who(authorization) if self.tokens else ("api", OPERATOR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.debug("%s: connection ended: %s", client_address[0], one_line(sys.exc_info()[1]))


def server_context(settings: Settings) -> ssl.SSLContext:
    """Gives the API's TLS context; ConfigError naming what is wrong with the files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_pair(context, settings.http_cert, settings.http_key, ("HTTP_CERT", "HTTP_KEY"))
    if settings.http_client_ca:
        load_ca(context, settings.http_client_ca, "HTTP_CLIENT_CA")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


# -- /openapi.json: made from ROUTES and the shapes, so that it can't drift ------------------

# Parameter of a query: its schema.
QUERY_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "status": {"type": "string", "enum": list(RELEASE_STATUSES)},
    "page": {"type": "integer", "minimum": 1, "maximum": 10**9, "default": 1},
    "pageSize": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": 20},
    "view": {"type": "string", "enum": ["full", "summary"], "default": "full"},
    "after": {"type": "integer", "minimum": 0, "default": 0},
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
}


def _operation(route: Route) -> dict[str, Any]:
    error = {"description": "an error, in the envelope", "content": {"application/json": {"schema": _ref("Error")}}}
    envelope = _object({"code": {"const": 0}, "message": {"const": "success"}, "data": _ref(route.answers)})
    documents: dict[str, dict[str, Any]] = {
        "text": {"text/plain": {"schema": _TEXT}}, "json": {"application/json": {}}}
    content = documents.get(route.answers, {"application/json": {"schema": envelope}})
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "query", "schema": QUERY_PARAMETERS[name]} for name in route.query]
    if "{id}" in route.path:
        parameters.insert(0, {"name": "id", "in": "path", "required": True, "schema": _ID})
    operation: dict[str, Any] = {
        "operationId": route.handler, "summary": route.summary, "parameters": parameters,
        "security": [{"token": []}] if route.role else [],
        "responses": {"201" if route.answers == "Created" or route.body == "NewNode" else "200":
                      {"description": route.summary, "content": content}, "default": error}}
    if route.body:
        operation["requestBody"] = {"required": route.body == "NewNode",
                                    "content": {"application/json": {"schema": _ref(route.body)}}}
    return operation


def openapi_document() -> dict[str, Any]:
    """Gives the OpenAPI 3.1 description of ROUTES."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {"openapi": "3.1.0", "info": {"title": "releasectl", "version": __version__}, "paths": paths,
            "components": {"schemas": openapi_schemas(),
                           "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}}


# ======================================================================================
# 12 Check: what is wrong with this installation, and what would mend it. Uses 1 to 11.
# ======================================================================================

class Ping(NamedTuple):
    """What one agent answered to a ping."""
    node: Node
    is_ok: bool
    error_kind: str
    text: str


def ping_nodes(settings: Settings, nodes: Sequence[Node]) -> list[Ping]:
    """Asks agents all at once whether they answer. Raises ConfigError without certificates."""
    agents = AgentClient(settings)
    agents.prepare()

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
    ours = server_context(settings)
    ours.verify_mode = ssl.CERT_NONE
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname = False
    theirs.load_verify_locations(settings.http_cert)
    theirs.verify_flags |= 0x80000  # ssl.VERIFY_X509_PARTIAL_CHAIN, which Python 3.9 does not name
    try:
        return dict(_meet(theirs, ours)[0].getpeercert() or {})
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"HTTP_CERT {settings.http_cert}: {error.verify_message}; clients will refuse it") from None


def check_certificate(name: str, path: str, look: Callable[[], Mapping[str, Any]]) -> Finding:
    """Says until when a certificate is good, or why it is not."""
    try:
        expires = ssl.cert_time_to_seconds(str(look()["notAfter"]))
    except ConfigError as error:
        return Finding(name, EXIT_USAGE, error.message)
    days = (expires - time.time()) / 86400
    renew = ": renew it now" if days < 14 else ""
    return Finding(name, EXIT_DONE, f"{path} is good until {utc_text(expires)}, {days:.0f} days{renew}")


def check_private(name: str, path: str) -> Finding:
    """Says whether a key can be read by everybody."""
    try:
        require_private(name, path)
    except ConfigError as error:
        return Finding(name, EXIT_USAGE, error.message)
    return Finding(name, EXIT_DONE, f"{path} is not readable by everybody")


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
    if settings.http_cert:
        yield check_certificate("HTTP_CERT", settings.http_cert, lambda: api_certificate(settings))
        yield check_private("HTTP_KEY", settings.http_key)


def check_database(settings: Settings, store: Store) -> Iterator[Finding]:
    """Looks at the database, and asks the agents of its enabled, online nodes."""
    try:
        store.database.require_schema()
        store.probe()
        yield Finding("DATABASE_URL", EXIT_DONE, f"{store.database}: schema {len(schema_steps())}, takes writes")
        nodes = [node for node in store.nodes(size=0).items if node.enabled and node.status == "online"]
        for ping in ping_nodes(settings, nodes) if nodes else []:
            yield Finding(f"node {ping.node.name}", EXIT_DONE if ping.is_ok else EXIT_UNAVAILABLE, ping.text)
    except DatabaseError as error:
        yield Finding("DATABASE_URL", EXIT_UNAVAILABLE, error.message)
    except ConfigError:
        yield Finding("nodes", EXIT_USAGE, "not asked: without good certificates no agent answers")


# ======================================================================================
# 13 Command line: a table of commands (contract section 4). Uses 1 to 12.
# ======================================================================================

class Context:
    """What a command works with: options, settings, and the store when it is first asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.settings = Settings.load(os.environ, options.config, options.db)
        self.store = Store(Database(self.settings.database_url))
        self.actor = "cli:" + one_line(_user_name(), 60)

    def open(self, create: bool = False) -> Store:
        """Gives the store over a database of the right schema; create makes an empty one."""
        self.store.database.require_schema(create)
        return self.store

    def show(self, document: Any, text: str) -> None:
        """Prints one JSON document with --json, else text for people; no error when its reader went away."""
        out = to_json(document) if self.options.json else text
        if not out:
            return
        try:
            print(out, flush=True)
        except OSError as error:
            # the interpreter would flush it once more at its end, and say so
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                raise AppError(5001, f"standard output can't be written: {_os_reason(error)}") from None


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """Gives rows as text in columns, or '' when there are none."""
    cells = [[one_line(cell) if cell is not None else "" for cell in row] for row in rows]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                     for row in [[h.upper() for h in head], *cells])


def release_line(release: Release) -> str:
    """Gives a release in one line."""
    says_it = release.status_reason.startswith(release.status) or not release.status_reason
    return f"{release}: " + (release.status_reason or release.status if says_it
                             else f"{release.status}, {release.status_reason}")


def exit_code_of(release: Release) -> int:
    """Gives the exit code for how a release ended; 0 while it has not."""
    return EXIT_NOT_SUCCESS if release.is_terminal and release.status != SUCCESS else EXIT_DONE


# -- the processes ---------------------------------------------------------------------------

def command_serve(context: Context) -> int:
    settings = context.settings
    warn_of_settings(settings)
    context.store.database.migrate()
    agents = AgentClient(settings)
    if settings.release_executor_enabled and (settings.control_cert or not settings.mtls_enabled):
        agents.prepare()
    # an answer of the API needs the interpreter a dozen times: with 64 busy workers each waited up to 5 ms
    sys.setswitchinterval(0.001)
    executor = Executor(settings, context.store, agents)
    server = ApiServer(settings, Api(context.store, executor.nudge, executor.is_busy))
    _stop_on_signal(executor.stop)
    accept = threading.Thread(target=server.serve_forever, name="accept", daemon=True)
    accept.start()
    scheme = "https" if server.tls else "http"
    log.info("serving %s://%s:%d, %s, executor %s", scheme, *server.server_address[:2], context.store.database,
             "on" if settings.release_executor_enabled else "off (RELEASE_EXECUTOR_ENABLED=0)")
    if settings.release_executor_enabled:
        executor.run_loop()
    else:
        executor.stopping.wait()
    server.shutdown()
    server.server_close()
    executor.close()
    log.info("stopped")
    return EXIT_DONE


def command_run_once(context: Context) -> int:
    settings = context.settings
    if not settings.release_executor_enabled:
        print("nothing is dispatched: RELEASE_EXECUTOR_ENABLED=0", file=sys.stderr)
        context.show({"releases": [], "inOtherHands": 0}, "")
        return EXIT_DONE
    warn_of_settings(settings)
    context.store.database.migrate()
    executor = Executor(settings, context.store, AgentClient(settings))
    _stop_on_signal(executor.stop)
    try:
        tick = executor.run_once(context.options.drain)
    finally:
        executor.close()
    context.show({"releases": [release_json(release) for release in tick.worked_on],
                  "inOtherHands": tick.in_other_hands}, "\n".join(map(release_line, tick.worked_on)))
    if not tick.worked_on and tick.in_other_hands:
        print(f"{tick.in_other_hands} releases to work on, all in other hands: try later", file=sys.stderr)
        return EXIT_BUSY
    return max(map(exit_code_of, tick.worked_on), default=EXIT_DONE)


def warn_of_settings(settings: Settings) -> None:
    """Says at every start what a laboratory may do and production may not."""
    if not settings.mtls_enabled:
        log.warning("MTLS_ENABLED=0: agents are called by plain HTTP, unprotected; for a laboratory only")
    elif not settings.control_cert and settings.release_executor_enabled:
        log.warning("CONTROL_CERT is not set: nothing can be dispatched until it is, with CONTROL_KEY and CONTROL_CA")


def _stop_on_signal(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def command_migrate(context: Context) -> int:
    before, after = context.store.database.migrate()
    context.show({"before": before, "after": after},
                 f"{context.store.database}: schema {after}" + (f", was {before}" if before != after else ""))
    return EXIT_DONE


# -- nodes -----------------------------------------------------------------------------------

def _labels_option(pairs: Sequence[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise AppError(2003, f"--label {one_line(pair, 60)} must be K=V")
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

def command_create(context: Context) -> int:
    options = context.options
    payload: object = {}
    if options.payload:
        try:
            payload = parse_json(_read_text(options.payload))
        except ValueError as error:
            raise AppError(2002, f"--payload {options.payload} is not JSON: {one_line(error, 150)}") from None
    request = parse_release_request({"target": options.target, "reason": options.reason, "payload": payload})
    return _show_created(context, *context.open(create=True).create_release(request, context.actor))


def _show_created(context: Context, release: Release, batches: Sequence[Sequence[int]]) -> int:
    if context.options.wait:
        print(f"{release}: created", file=sys.stderr)
        return _watch(context, release.id)
    sizes = ", ".join(str(len(batch)) for batch in batches)
    context.show(created_json(release, batches),
                 f"{release}: created, {count_of_nodes(release.total_nodes)} in batches of {sizes}")
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
    return _watch(context, context.options.id)


def _watch(context: Context, release_id: int) -> int:
    """Follows a release to its end: a line on standard error when its sentence changes."""
    store, said = context.open(), ""
    while True:
        try:
            release = store.release(release_id)
        except DatabaseError as error:
            line = str(error)
        else:
            line = release_line(release)
            if release.is_terminal:
                break
        if line != said:
            print(line, file=sys.stderr, flush=True)
        said = line
        time.sleep(min(0.5, context.settings.release_executor_interval_sec))
    context.show({"release": release_json(release)}, release_line(release))
    return exit_code_of(release)


def command_events(context: Context) -> int:
    options = context.options
    events = context.open().events(options.id, options.after, options.limit)
    context.show({"items": [event_json(event) for event in events]}, table(
        [(e.id, e.at, e.node_name or "release", e.event, f"{e.from_status} -> {e.to_status}", e.actor, e.detail)
         for e in events], ("id", "at", "who", "event", "change", "by", "detail")))
    return EXIT_DONE


def command_act(context: Context) -> int:
    options = context.options
    release = context.open().act(options.command, options.id, context.actor, parse_text("--reason", options.reason))
    context.show(release_json(release), release_line(release))
    return EXIT_DONE


def command_again(context: Context) -> int:
    make = {"retry": Store.retry, "rollback": Store.rollback}[context.options.command]
    return _show_created(context, *make(context.open(), context.options.id, context.actor))


def command_check(context: Context) -> int:
    settings = context.settings
    findings = [Finding("settings", EXIT_DONE, "every value can be used"), *check_agents(settings),
                *check_api(settings), *check_database(settings, context.store)]
    context.show({"items": [{"subject": f.subject, "ok": f.exit_code == EXIT_DONE, "message": f.text}
                            for f in findings]},
                 table([("ok" if f.exit_code == EXIT_DONE else "WRONG", f.subject, f.text) for f in findings],
                       ("", "what", "found")))
    codes = {f.exit_code for f in findings}
    return EXIT_USAGE if EXIT_USAGE in codes else max(codes)


# -- the table of commands -------------------------------------------------------------------

class Command(NamedTuple):
    """One command: its words, help, options as (flags, keywords) of argparse, and what runs it."""
    name: str
    help: str
    run: Callable[[Context], int]
    options: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()


def _option(*flags: str, **keywords: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, keywords


def _number_option(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return int(text)
    return parse


_ID_OPTION = _option("id", metavar="ID", type=_number_option(0, MAX_ID), help="id of the release")
_REASON_OPTION = _option("--reason", default="", metavar="TEXT", help="why, for the history")
_WAIT_OPTION = _option("--wait", action="store_true", help="follow it to its end; exit 0 on success, 1 else")
_NODE_OPTIONS = (
    _option("--port", type=_number_option(1, 65535), help="the agent's port (8443)"),
    _option("--protocol", choices=PROTOCOLS, help="the agent's dialect (tasks)"),
    _option("--label", action="append", metavar="K=V", help="a label; may be repeated"),
    _option("--status", choices=NODE_STATUSES, help="only online nodes get releases"),
    _option("--enable", dest="enabled", action="store_true", default=None, help="it may get releases"),
    _option("--disable", dest="enabled", action="store_false", default=None, help="it gets no releases"),
)

COMMANDS: tuple[Command, ...] = (
    Command("serve", "API and executor in one process, until SIGTERM or SIGINT", command_serve),
    Command("run-once", "one tick of the executor, then exit", command_run_once, (
        _option("--drain", action="store_true", help="go on until nothing is left to do"),)),
    Command("migrate", "bring the database to this schema.sql", command_migrate),
    Command("node add", "add a node", command_node_add, (
        _option("name", metavar="NAME"), _option("ip", metavar="IP", help="IP address or host name"), *_NODE_OPTIONS)),
    Command("node list", "list the nodes", command_node_list),
    Command("node set", "change a node", command_node_set, (
        _option("name", metavar="NAME"), _option("--rename", metavar="NAME"), _option("--ip"), *_NODE_OPTIONS)),
    Command("node import", "add nodes from a file, all or none: a JSON array, or lines NAME IP [PORT [PROTOCOL]]",
            command_node_import, (_option("file", metavar="FILE", help="- for standard input"),)),
    Command("node ping", "ask agents whether they answer", command_node_ping, (
        _option("names", nargs="*", metavar="NAME", help="none: every enabled node"),)),
    Command("create", "create a release for the enabled, online nodes", command_create, (
        _option("--payload", metavar="FILE", help="JSON object for the agents; - for standard input"),
        _REASON_OPTION, _option("--target", default="cdn"), _WAIT_OPTION)),
    Command("list", "list releases, newest first", command_list, (
        _option("--status", choices=RELEASE_STATUSES),
        _option("--page", type=_number_option(1, 10**9), default=1),
        _option("--page-size", type=_number_option(1, MAX_PAGE_SIZE), default=20))),
    Command("status", "a release and its nodes", command_status, (_ID_OPTION,)),
    Command("watch", "follow a release to its end", command_watch, (_ID_OPTION,)),
    Command("events", "the history of a release", command_events, (
        _ID_OPTION, _option("--after", type=_number_option(0, MAX_ID), default=0, help="only ids above this one"),
        _option("--limit", type=_number_option(1, 100000), default=1000))),
    Command("pause", "dispatch nothing more until resume", command_act, (_ID_OPTION, _REASON_OPTION)),
    Command("resume", "go on with a paused release", command_act, (_ID_OPTION, _REASON_OPTION)),
    Command("cancel", "end a release: what is in flight is waited for", command_act, (_ID_OPTION, _REASON_OPTION)),
    Command("retry", "a new release for the failed and skipped nodes of one", command_again,
            (_ID_OPTION, _WAIT_OPTION)),
    Command("rollback", "a new release of the newest successful payload before one", command_again,
            (_ID_OPTION, _WAIT_OPTION)),
    Command("check", "configuration, certificates, database, agents: what is wrong and how to mend it",
            command_check),
)


class _Parser(argparse.ArgumentParser):
    """Tells wrong usage as every other error is told: one line, no secret in it."""

    def error(self, message: str) -> NoReturn:
        raise AppError(2002, f"{safe_url(message)} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """Gives the parser of COMMANDS; --db, --config and --json stand before or behind the command."""
    # no abbreviations: one in somebody's script would break with the next option that we add
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--db", metavar="URL", help="overrides DATABASE_URL")
    common.add_argument("--config", metavar="FILE", help="settings as KEY=VALUE lines; the environment wins")
    common.add_argument("--json", action="store_true", help="one JSON document on standard output")
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
                group_parser = commands.add_parser(
                    group[0], parents=[common], allow_abbrev=False, help="add, list, set, import, ping")
                groups[group[0]] = group_parser.add_subparsers(metavar="COMMAND", required=True)
            place = groups[group[0]]
        sub = place.add_parser(word, parents=[common], allow_abbrev=False, help=command.help,
                               description=command.help)
        for flags, keywords in command.options:
            sub.add_argument(*flags, **keywords)
        sub.set_defaults(run=command.run, command=command.name)
    return parser


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"at": utc_text(record.created), "level": record.levelname.lower(),
                "thread": record.threadName, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return to_json(line)


class TextFormatter(logging.Formatter):
    """One line an event, for people."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{utc_text(record.created)} {record.levelname.lower()}: {record.getMessage()}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def set_up_log(log_format: str) -> None:
    """Sends the log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit code. Errors are one line on standard error."""
    words = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says: JSON is UTF-8
    try:
        for word in words:
            if re.search("[\ud800-\udfff]", word):
                raise AppError(2002, f"the argument {one_line(word, 60)!r} is not UTF-8")
        options = build_parser().parse_args(words, argparse.Namespace(db="", config="", json=False))
        context = Context(options)
        set_up_log(context.settings.log_format)
        with contextlib.closing(context.store.database):
            code: int = options.run(context)
        return code
    except AppError as error:
        print(f"releasectl: {one_line(error.message, 500)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
