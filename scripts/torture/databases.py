"""Where the tables are: SQLite files, or databases of a PostgreSQL server that may have a standby."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Callable, TypeVar, Union

from lab import admin, database_on, postgres

import releasectl as rc

T = TypeVar("T")


class SqliteFiles:
    """SQLite files in a folder."""

    name = "sqlite"

    def __init__(self, folder: Path):
        self._folder = folder
        self._numbers = itertools.count(1)

    def new(self) -> str:
        """Return the URL of an empty database."""
        return f"sqlite:///{self._folder}/torture-{next(self._numbers)}.db"

    def free(self, url: str) -> None:
        """Delete a database that nobody needs any more."""
        for file in self._files(url):
            file.unlink(missing_ok=True)

    def dump(self, url: str, folder: Path) -> None:
        """Keep a database as evidence."""
        for file in self._files(url):
            if file.exists():
                shutil.copy(file, folder)

    def close(self) -> None:
        pass

    @staticmethod
    def _files(url: str) -> list[Path]:
        return [Path(url[len("sqlite:///"):] + suffix) for suffix in ("", "-wal", "-shm")]


class PostgresServer:
    """Databases of a PostgreSQL server: of one that is given, or of our own, which may have a standby."""

    name = "postgresql"

    def __init__(self, folder: Path, given_url: str = "", kind: str = "--durable"):
        self.is_ours = not given_url
        self._place = folder
        self._server_numbers = itertools.count(1)
        self._folder = self._new_folder() if self.is_ours else ""
        self._standby_folder = self._old_folder = ""
        self._standby_url = ""
        self._ports: list[int] = []  # of the first server and its first standby: later ones take them in turn
        self._url = postgres("start", kind, self._folder) if self.is_ours else given_url
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._made: list[str] = []  # the names of all databases
        self._free: list[str] = []  # the URLs of those to be used again

    def new(self) -> str:
        """Return the URL of an empty database."""
        with self._lock:
            if self._free:
                return self._free.pop()
            name = f"torture_{os.getpid()}_{next(self._numbers)}"
            self._made.append(name)
        admin(self._url, f"CREATE DATABASE {name}")
        return database_on(self._url, name)

    def free(self, url: str) -> None:
        """Empty a database, for whoever asks for one next."""
        admin(url, "DROP SCHEMA public CASCADE")
        admin(url, "CREATE SCHEMA public")
        with self._lock:
            self._free.append(url)

    def dump(self, url: str, folder: Path) -> None:
        """Keep a database as evidence, where pg_dump is there."""
        with open(folder / f"{_name_of(url)}.sql", "wb") as file, contextlib.suppress(OSError):
            subprocess.run(["pg_dump", url], stdout=file, stderr=subprocess.DEVNULL, check=False)

    def cut(self, url: str) -> bool:
        """End a session of a database, any but our own; return whether there was one."""
        with contextlib.suppress(rc.DatabaseError, *rc.PostgresEngine(url).error):
            return bool(admin(
                url, "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE "
                     "datname = current_database() AND pid <> pg_backend_pid() ORDER BY random() "
                     "LIMIT 1) s UNION ALL SELECT false LIMIT 1"))
        return False

    def restart(self) -> None:
        postgres("restart", self._folder)

    def stop(self) -> None:
        """Stop the primary cleanly: a standby that is there gets all of it first."""
        postgres("stop", self._folder)

    def signal(self, number: int) -> None:
        """Send a signal to every process of the primary (of the old one, where that was kept), the first one first."""
        data = Path(Path(self._old_folder or self._folder, "cluster").read_text().strip(), "data")
        first = int((data / "postmaster.pid").read_text().split()[0])
        for pid in [first, *_children_of(first)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGKILL:  # else pg_ctl takes it for alive until somebody has reaped it
            (data / "postmaster.pid").unlink()

    @property
    def ports(self) -> list[int]:
        """Return the ports of the first server and its standby."""
        return list(self._ports)

    def close(self) -> None:
        if self.is_ours:
            for folder in filter(None, (self._old_folder, self._standby_folder, self._folder)):
                postgres("remove", folder)
            return
        for name in self._made:
            with contextlib.suppress(rc.DatabaseError, *rc.PostgresEngine(self._url).error):
                admin(self._url, f"DROP DATABASE {name} WITH (FORCE)")

    # -- the standby ---------------------------------------------------------------------

    def add_standby(self) -> None:
        """Start a standby of the server, in a new folder."""
        folder = self._new_folder()
        # the port of the first server is free again after the first failover, and so on
        port = [str(one) for one in self._ports if one != _port_of(self._url)]
        self._standby_url = postgres("standby", *(["--port", *port] if port else []), self._folder, folder)
        self._standby_folder = folder
        self._ports = self._ports or [_port_of(self._url), _port_of(self._standby_url)]

    def url_of_primary(self, url: str) -> str:
        """Return a URL with which libpq looks for the server that can be written to, whichever it is."""
        hosts = ",".join("127.0.0.1" for _ in self._ports)
        return (f"postgresql://releasectl@/{_name_of(url)}?host={hosts}&port={','.join(map(str, self._ports))}"
                "&target_session_attrs=read-write")

    def url_of_primary_alone(self, url: str) -> str:
        return database_on(self._url, _name_of(url))

    def url_of_standby(self, url: str) -> str:
        return database_on(self._standby_url, _name_of(url))

    def cut_off_standby(self) -> None:
        """Let the standby receive nothing more; return when it has applied what it had."""
        admin(self._standby_url, "ALTER SYSTEM SET primary_conninfo = ''")
        admin(self._standby_url, "SELECT pg_reload_conf()")
        self._wait_for_standby("SELECT COUNT(*) = 0 FROM pg_stat_wal_receiver")
        self._wait_for_standby("SELECT COALESCE(pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn(), true)")

    def stop_standby(self) -> None:
        postgres("stop", self._standby_folder)

    def start_standby(self) -> None:
        """Start a standby again that was stopped."""
        postgres("start", self._standby_folder)

    def make_synchronous(self, is_synchronous: bool) -> None:
        """Let each commit of the primary wait for the standby, or not any more."""
        admin(self._url, f"ALTER SYSTEM SET synchronous_standby_names = '{'*' if is_synchronous else ''}'")
        admin(self._url, "SELECT pg_reload_conf()")

    def crash(self) -> None:
        """Stop the primary as a loss of power would."""
        postgres("crash", self._folder)

    def promote(self, keeps_old: bool = False) -> None:
        """Make the standby the primary, and remove the one that crashed, now or by remove_old()."""
        postgres("promote", self._standby_folder)
        self._old_folder = self._folder
        self._folder, self._standby_folder = self._standby_folder, ""
        self._url, self._standby_url = self._standby_url, ""
        if not keeps_old:
            self.remove_old()

    def remove_old(self) -> None:
        """Remove the primary of before a promotion."""
        postgres("remove", self._old_folder)
        self._old_folder = ""

    def _wait_for_standby(self, statement: str) -> None:
        give_up_at = time.monotonic() + 30.0
        while not admin(self._standby_url, statement):
            if time.monotonic() > give_up_at:
                raise OSError(f"the standby did not come so far within 30 s: {statement}")
            time.sleep(0.02)

    def _new_folder(self) -> str:
        return str(self._place / f"server-{next(self._server_numbers)}")


Databases = Union[SqliteFiles, PostgresServer]


def _name_of(url: str) -> str:
    """Return the name of a URL's database."""
    return urllib.parse.urlsplit(url).path.lstrip("/")


def _children_of(pid: int) -> list[int]:
    """Return the processes that a process has started, and that are there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


def _port_of(url: str) -> int:
    return urllib.parse.urlsplit(url).port or 5432


def driver_knows_many_hosts() -> bool:
    """Return whether the driver takes a URL of several hosts: those that are made of libpq do."""
    with contextlib.suppress(rc.ConfigError):
        return bool(rc.load_postgres_driver().__name__ != "pg8000.dbapi")
    return False


def retry(action: Callable[[], T], limit_s: float = 60.0) -> T:
    """Do what a database may refuse for a while; return what it returns in the end."""
    give_up_at = time.monotonic() + limit_s
    while True:
        try:
            return action()
        except (rc.DatabaseError, rc.StateMoved):
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.05)
