"""A process that has imported all and forks others on request: ten times as fast as exec.

It reads a JSON object a line, answers each with {"pid"}, and reports {"pid", "code"} when a child ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import releasectl as rc

from .injector import run_injected

PACKAGE = str(Path(__file__).resolve().parent)  # what Python runs to be one of us


def serve_forks() -> int:
    """Fork what our standard input asks for, until it ends; then kill whoever is left."""
    with contextlib.suppress(ImportError):  # the driver that releasectl would load when it first connects
        import psycopg  # noqa: F401
    gc.freeze()  # else the first collection of each child copies all that was imported
    live: set[int] = set()
    rest = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            data = os.read(0, 65536)
            if not data:
                for pid in live:
                    os.kill(pid, signal.SIGKILL)
                return 0
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    _run_child(**json.loads(line))
                live.add(pid)
                os.write(1, b'{"pid": %d}\n' % pid)
        while live:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            live.discard(pid)
            os.write(1, b'{"pid": %d, "code": %d}\n' % (pid, os.waitstatus_to_exitcode(status)))


def _run_child(injections: str, command: Sequence[str], environment: dict[str, str], log: str) -> NoReturn:
    """Run a command in a process that was forked for it, and end as Python would.

    But for one thing: to clear all modules, as Python does at its end, copies all that is shared with our parent.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    code = 1
    try:
        code = run_injected(injections, command) if injections else rc.main(list(command))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()  # which is a finding
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Forked(NamedTuple):
    """A process of the fork server, with the part of Popen that a Worker needs."""

    pid: int
    codes: dict[int, int]

    def poll(self) -> int | None:
        return self.codes.get(self.pid)


class ForkServer:
    """The client of such a process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, PACKAGE, "fork-server"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)
        self._pids: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="fork-server", daemon=True)
        self._thread.start()

    def fork(self, **what: Any) -> Forked:
        """Return a new process; see _run_child for what it needs."""
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
            return Forked(self._pids.get(timeout=60), self._codes)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._thread.join(30)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                report = json.loads(line)
                if "code" in report:
                    self._codes[report["pid"]] = report["code"]
                else:
                    self._codes.pop(report["pid"], None)  # an id that was used before
                    self._pids.put(report["pid"])
