"""Processes of releasectl, forked where all is imported already: by exec each takes ten times as much CPU to start.

What begins where a process does (the interpreter's own options and variables, its streams) is for those by exec. The
streams are files here, all commands of a server share one hash seed, and what a command left running is not waited for.
`python tests/forks.py FD` is the server: for each byte that comes over the socket FD it makes a process of the five
files sent with it: its three streams, where its exit code is to be written, and what it is (JSON).
"""
from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

FILES = 5


class Forks:
    """The client of one server."""

    def __init__(self, environment: Mapping[str, str]):
        """Start the server; environment: with PYTHONPATH, the folder of the module that it imports."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=dict(environment),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def run(self, arguments: Sequence[str], folder: str, environment: Mapping[str, str], stdin: str | None,
            limit_s: float) -> tuple[int, str, str]:
        """Run a command to its end; return its exit code and what it wrote. Raise TimeoutError."""
        with contextlib.ExitStack() as stack:
            told, given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(4))
            what = json.dumps([list(arguments), folder, dict(environment), limit_s])
            for file, text in ((told, what), (given, stdin or "")):
                file.write(text.encode())
                file.seek(0)
            ended, ends = os.pipe()
            stack.callback(os.close, ended)
            try:
                socket.send_fds(self._socket, [b"x"], [given.fileno(), out.fileno(), err.fileno(), ends, told.fileno()])
            finally:
                os.close(ends)
            if not select.select([ended], [], [], limit_s)[0]:
                raise TimeoutError(f"{arguments} has not ended within {limit_s} s")
            code = os.read(ended, 100)
            assert code, "the server of forks has ended"
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode())
            return int(code), texts[0], texts[1]

    def close(self) -> None:
        self._socket.close()
        self._process.wait(30)


def serve(requests: socket.socket) -> int:
    """Fork what is asked for until nobody can ask any more; then return 0. What was forked exits in here."""
    import releasectl  # noqa: PLC0415 - the server's alone, of the folder that PYTHONPATH names

    while True:
        byte, files, *_ = socket.recv_fds(requests, 1, FILES)
        if not byte:
            return 0
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # one that waited for an earlier command
    requests.close()
    *streams, ends, told = files
    with open(told, encoding="utf-8") as text:
        arguments, folder, environment, limit_s = json.load(text)
    child = os.fork()
    if child:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))  # nobody waits for it any more
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            os.write(ends, str(code).encode())
        os._exit(0)
    os.close(ends)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["releasectl", *arguments]
    return releasectl.run_process()  # which exits


if __name__ == "__main__":
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
