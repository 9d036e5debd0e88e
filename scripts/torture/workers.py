"""releasectl processes, started by exec as people do, or forked as trials do. Each that was started is ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lab import mtls

from .fork_server import PACKAGE, Forked, ForkServer
from .injections import FIRED, REPORT_PREFIX, Injection, parse_injection

# Exit codes with which a process may end by itself: the contract's, but for wrong usage and wrong state.
CLEAN_EXITS = {0, 1, 69, 75}
CLEAN_STOP_S = 30.0
TRACE = "Traceback (most recent call last)"


class Worker:
    """A releasectl process."""

    def __init__(self, name: str, log: Path, process: subprocess.Popen[bytes] | Forked):
        self.name, self.log = name, log
        self.suspended_until = 0.0
        self.is_killed_by_us = False
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process lives."""
        return self._process.poll()

    def send(self, number: int) -> None:
        """Send a signal to the process, if it still is there."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self.wait(10)

    def wait(self, limit_s: float) -> int | None:
        """Wait for the end; return the exit code, None when the process did not end."""
        give_up_at = time.monotonic() + limit_s
        while self.exit_code() is None and time.monotonic() < give_up_at:
            time.sleep(0.01)
        return self.exit_code()

    def has_begun(self) -> bool:
        """Return whether the process handles SIGTERM, which releasectl prepares before all else."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)
            return bool(caught & 1 << signal.SIGTERM - 1)
        return False

    def terminate(self) -> None:
        """Ask the process to stop, as soon as it has begun: before, it can't stop cleanly."""
        give_up_at = time.monotonic() + CLEAN_STOP_S
        while self.exit_code() is None and not self.has_begun() and time.monotonic() < give_up_at:
            time.sleep(0.01)
        self.send(signal.SIGTERM)

    def reports(self, kind: str) -> list[str]:
        """Return what the injector inside reported, without its prefix."""
        prefix = REPORT_PREFIX + kind
        return [line[len(prefix):] for line in self.log_text().splitlines() if line.startswith(prefix)]

    def fired(self) -> list[Injection]:
        """Return the injections that acted."""
        return [parse_injection(text) for text in self.reports(FIRED)]

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def end_of_log(self) -> str:
        return self.log_text()[-600:]


class Workers:
    """Starts workers, knows those that live, and ends them whatever happens."""

    def __init__(self, folder: Path, program: Path):
        self._folder, self._program = folder, program
        self._numbers = itertools.count(1)
        self._live: dict[int, Worker] = {}
        self._lock = threading.Lock()
        self._fork_server = ForkServer()

    def start(self, command: Sequence[str], environment: dict[str, str], injections: str = "") -> Worker:
        """Start a real `python -m releasectl COMMAND`, or the same in a child with injections."""
        log = self._new_log()
        words = [PACKAGE, "child", injections] if injections else ["-m", "releasectl"]
        with open(log, "wb") as output:
            process = subprocess.Popen([sys.executable, *words, *command], stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=output, cwd=self._program, env={**os.environ, **environment})
        return self._keep(Worker(" ".join([injections, *command]).strip(), log, process))

    def fork(self, command: Sequence[str], environment: dict[str, str], injections: str = "") -> Worker:
        """Start the same from the fork server."""
        log = self._new_log()
        process = self._fork_server.fork(injections=injections, command=list(command), environment=environment,
                                         log=str(log))
        return self._keep(Worker(" ".join([injections, *command]).strip(), log, process))

    def drop(self, worker: Worker) -> None:
        """Do not keep a worker that has ended."""
        with self._lock:
            self._live.pop(worker.pid, None)

    def close(self) -> None:
        """Kill what still lives."""
        for worker in list(self._live.values()):
            worker.kill()
        self._fork_server.close()

    def _new_log(self) -> Path:
        return self._folder / f"{next(self._numbers):05d}.log"

    def _keep(self, worker: Worker) -> Worker:
        with self._lock:
            self._live[worker.pid] = worker
        return worker


def settings_for(url: str, certs: Path | None, claim_ttl_s: float, **more: object) -> dict[str, str]:
    """Return the settings of a worker: quick intervals, patient with agents."""
    values: dict[str, object] = {
        "DATABASE_URL": url, "HTTP_ADDR": "127.0.0.1:0", "RELEASE_EXECUTOR_INTERVAL_SEC": 0.2,
        "CLAIM_TTL_SEC": claim_ttl_s, "AGENT_CONNECT_TIMEOUT_SEC": 2, "AGENT_REQUEST_TIMEOUT_SEC": 2,
        "AGENT_RETRIES": 100, "AGENT_CONCURRENCY": 16, "NODE_DEADLINE_SEC": 600}
    if certs is None:
        values["MTLS_ENABLED"] = 0
    else:
        values.update(mtls(certs))
    return {name: str(value) for name, value in {**values, **more}.items()}
