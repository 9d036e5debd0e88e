#!/usr/bin/env python3
"""bench: how fast releasectl is, beside bare scripts that do less, against the same stand-in agents.

    make bench                                        the table of docs/PERFORMANCE.md, in six minutes
    python scripts/bench.py makespan idle             these goals only; --help lists them
    python scripts/bench.py makespan --runs 3 --json result.json
    python scripts/bench.py queue --beside COMMIT     beside releasectl.py as it was then
    python scripts/bench.py change --beside HEAD~1    what a change costs: fails above 1.25 times the CPU
    make bench ARGS="--json docs/performance.json"    the table that later ones are compared with

All figures of a goal come from one run: its contenders take turns, and the table gives medians and
their ratios. So a machine that others use too, or another machine, changes the times but hardly the
ratios. Every turn of releasectl is a new process with a new database (SQLite: WAL, synchronous=FULL),
of the module compiled, as `make install` puts it.

The agents are processes of fake_agent.py, with mutual TLS. Their share of the CPU is measured in
every turn: while each of them is well under one core, they are not what is waited for.

Its parts: the laboratory (agents, servers), the bare scripts, the goals, the table.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import math
import os
import platform
import py_compile
import queue
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from lab import admin, database_on, free_port, make_certs, migrate, mtls, postgres  # noqa: E402

import releasectl as rc  # noqa: E402

IN_FLIGHT = 64
SERVER_NAME = "agents.bench"
AGENT_PORT = 8443
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# In the folder of a module that is compiled.
AS_MODULE = (sys.executable, "-m", "releasectl")
BENCH_TIMEOUT_S = 1800.0


# ---------------------------------------------------------------------------
# The laboratory: certificates, agents, databases, servers.
# ---------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def peak_mib(pid: int) -> float:
    """Return the peak of a process's resident memory (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM: this needs Linux")


def end(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Agents:
    """So many stand-in agents, spread over a few processes, node after node."""

    def __init__(self, certs: Path, count: int, processes: int):
        self.count = count
        self._processes: list[subprocess.Popen[str]] = []
        self._controls: list[int] = []
        shares = [len(range(number, count, processes)) for number in range(processes)]
        for number, share in enumerate(shares):
            control, first = free_port(), f"127.{20 + number}.0.1"
            last = f"127.{20 + number}.{share >> 8}.{share & 255}"
            self._controls.append(control)
            self._processes.append(subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / "fake_agent.py"), "--certs", str(certs), "--quiet",
                 "--listen", f"{first}-{last}:{AGENT_PORT}", "--control", f"127.0.0.1:{control}", "--task-ms", "0"],
                stdout=subprocess.PIPE, text=True))
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("ready"):
                self.close()
                raise SystemExit("bench: the agents did not start (does another bench run?)")
        self.addresses = [f"127.{20 + n % processes}.{(n // processes + 1) >> 8}.{(n // processes + 1) & 255}"
                          for n in range(count)]

    def reset(self, task_ms: int) -> None:
        """Make all agents forget, close their connections, and take so long for a task."""
        for control in self._controls:
            for method, path, body in (("POST", "/agents/*/restart", None), ("DELETE", "/log", None),
                                       ("PUT", "/agents/*", {"taskMs": task_ms, "appliedVersion": 0})):
                request = urllib.request.Request(f"http://127.0.0.1:{control}{path}", method=method,
                                                 data=json.dumps(body).encode() if body else None)
                urllib.request.urlopen(request, timeout=60).close()

    def cpu_s(self) -> list[float]:
        return [cpu_s(process.pid) for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            end(process)


class Turn(NamedTuple):
    """What one turn of a contender took: seconds, its CPU and the busiest agent process's share of a core."""
    seconds: float
    cpu_s: float = 0.0
    agent_share: float = 0.0
    peak_mib: float = 0.0
    extra: dict[str, float] = {}


class Server:
    """A `serve` process with a database of its own; program: the folder of its releasectl.py, as it is now without."""

    def __init__(self, lab: Lab, url: str, nodes: Sequence[str], executor: bool = True, program: Path | None = None,
                 **settings: str):
        program = program or lab.program
        lab.migrate(program, url)
        self.database = rc.Database(url)
        self.store = rc.Store(self.database)
        if nodes:
            fill_nodes(self.store, nodes)
        self.port = free_port()
        self.log = open(lab.folder / "serve.log", "a")  # noqa: SIM115 - closed with the server
        self.process = subprocess.Popen(
            [*AS_MODULE, "--db", url, "serve"], stderr=self.log, cwd=program,
            env=lab.environment(HTTP_ADDR=f"127.0.0.1:{self.port}", RELEASE_EXECUTOR_ENABLED=str(int(executor)),
                                **settings))
        give_up_at = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                self.call("GET", "/healthz")
                return
            if time.monotonic() > give_up_at or self.process.poll() is not None:
                raise SystemExit(f"bench: serve did not start: see {self.log.name}")
            time.sleep(0.02)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the data of one call of the API, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None,
                               {"Content-Type": "application/json"} if body is not None else {})
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if answer["code"] != 0:
            raise RuntimeError(f"{method} {path}: {answer['message']}")
        return answer["data"]

    def wait_for_end(self, release_id: int) -> None:
        """Wait for success, looking into the database itself: a look through the API would cost the server."""
        give_up_at = time.monotonic() + BENCH_TIMEOUT_S
        while True:
            with self.database.transaction() as tx:
                status = tx.value("SELECT status FROM release_tasks WHERE id = ?", release_id)
            if status == rc.SUCCESS:
                return
            if status in rc.TERMINAL or time.monotonic() > give_up_at or self.process.poll() is not None:
                raise RuntimeError(f"release {release_id} is {status}: see {self.log.name}")
            time.sleep(0.005)

    def close(self) -> None:
        end(self.process)
        self.log.close()
        self.database.close()


def fill_nodes(store: rc.Store, addresses: Sequence[str]) -> None:
    now = rc.utc_text(time.time())
    with store.database.transaction(write=True) as tx:
        tx.insert_many("INSERT INTO nodes (name, main_ip, agent_port, created_at, updated_at) VALUES ", 5,
                       [(f"edge-{n}", address, AGENT_PORT, now, now) for n, address in enumerate(addresses, 1)])


# What a folder of a program has.
PARTS = ("releasectl.py", "schema.sql")


class Lab:
    """A folder with certificates, and what is started in it."""

    def __init__(self, folder: Path, processes: int):
        self.folder = folder
        self.certs = folder / "certs"
        self.processes = processes
        self._numbers = iter(range(1, 1 << 30))
        self._postgres = ""
        self._agents: Agents | None = None
        make_certs(self.certs, SERVER_NAME)
        # The folder of releasectl.py as it is now.
        self.program = self._compiled("now", {name: (ROOT / name).read_bytes() for name in PARTS})

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in {s.name for s in rc.SETTINGS}}
        return {**kept, **mtls(self.certs), "AGENT_TLS_SERVER_NAME": SERVER_NAME, "AGENT_CONCURRENCY": str(IN_FLIGHT),
                **settings}

    def agents(self, count: int) -> Agents:
        """Return just so many agents; others than so many are ended, and these are started."""
        if self._agents is None or self._agents.count != count:
            if self._agents is not None:
                self._agents.close()
            self._agents = Agents(self.certs, count, self.processes)
        return self._agents

    def programs(self, commit: str) -> dict[str, Path]:
        """Return the folder of the program as it is, named "", and of it as it was at a commit, where one is named."""
        if not commit:
            return {"": self.program}
        return {"": self.program, commit: self._compiled("beside", {
            name: subprocess.run(["git", "show", f"{commit}:{name}"], cwd=ROOT, check=True, capture_output=True).stdout
            for name in PARTS})}

    def _compiled(self, name: str, parts: dict[str, bytes]) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for part, content in parts.items():
            (folder / part).write_bytes(content)
        py_compile.compile(str(folder / "releasectl.py"), doraise=True)
        return folder

    def go_client(self) -> Path | None:
        """Return bench_client.go as a program; None where Go is not installed."""
        program = self.folder / "bench_client"
        if not program.exists() and shutil.which("go"):
            subprocess.run(["go", "build", "-o", str(program), str(ROOT / "scripts" / "bench_client.go")], check=True,
                           env={**os.environ, "GOCACHE": str(self.folder / "go"), "GOFLAGS": "-mod=mod"})
        return program if program.exists() else None

    def migrate(self, program: Path, url: str) -> None:
        """Make a database by the program in a folder."""
        subprocess.run([*AS_MODULE, "--db", url, "migrate"], check=True, cwd=program, env=self.environment(),
                       stdout=subprocess.DEVNULL)

    def sqlite_url(self) -> str:
        return f"sqlite:///{self.folder}/bench-{next(self._numbers)}.db"

    def has_postgres(self) -> bool:
        """Start a durable throwaway server; return False, and say so, where there is none."""
        if not self._postgres:
            try:
                self._postgres = postgres("start", "--durable", self.folder / "postgres")
            except OSError:
                self._postgres = "missing"
        if self._postgres == "missing":
            print("  left out: PostgreSQL is not installed", file=sys.stderr)
        return self._postgres != "missing"

    def postgres_url(self) -> str:
        """Return the URL of an empty database where has_postgres()."""
        name = f"bench_{next(self._numbers)}"
        admin(self._postgres, f"CREATE DATABASE {name}")
        return database_on(self._postgres, name)

    def close(self) -> None:
        if self._agents is not None:
            self._agents.close()
        if self._postgres not in ("", "missing"):
            postgres("remove", self.folder / "postgres")


class Usage:
    """Seconds, and the CPU of a process and of the agents, from here to there."""

    def __init__(self, agents: Agents, pid: int):
        self._agents, self._pid = agents, pid
        self._cpu_s, self._agent_s, self._at = cpu_s(pid), agents.cpu_s(), time.monotonic()

    def turn(self, **extra: float) -> Turn:
        seconds = time.monotonic() - self._at
        busiest = max(after - before for after, before in zip(self._agents.cpu_s(), self._agent_s))
        return Turn(seconds, cpu_s(self._pid) - self._cpu_s, busiest / seconds, peak_mib(self._pid), extra)


def take_turns(options: argparse.Namespace, contenders: dict[str, Callable[[], Turn]],
               times: int = 1) -> dict[str, list[Turn]]:
    """Run every contender in turn, TIMES the number of runs, or as often as there is time; once at least."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    runs, started = options.runs * times, time.monotonic()
    for number in range(runs):
        if number and time.monotonic() + (time.monotonic() - started) / number > options.until:
            break
        for name, run in contenders.items():
            turns[name].append(run())
            print(f"  {number + 1}/{runs} {name}: {turns[name][-1].seconds:.3f} s", file=sys.stderr, flush=True)
    return turns


def median(turns: Sequence[Turn], field: str = "seconds") -> float:
    return float(statistics.median(getattr(turn, field) for turn in turns))


# ---------------------------------------------------------------------------
# The bare scripts: dispatch to every node and poll until it is done, and remember nothing.
# They run in a process of their own: bench.py --script NAME, the addresses on standard input.
# ---------------------------------------------------------------------------


def script_context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=os.environ["CONTROL_CA"])
    context.load_cert_chain(os.environ["CONTROL_CERT"], os.environ["CONTROL_KEY"])
    return context


def dispatch_body(address: str) -> tuple[str, bytes]:
    task_id = f"apply_config_{address}_1_9f3a61c0"
    return task_id, json.dumps({"taskId": task_id, "type": "apply_config", "version": 1, "payload": {}}).encode()


class NamedHttpsConnection(http.client.HTTPSConnection):
    """One that verifies the name of all agents, as AGENT_TLS_SERVER_NAME does."""

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._context.wrap_socket(self.sock, server_hostname=SERVER_NAME)  # type: ignore[attr-defined]


def http_client_node(context: ssl.SSLContext, address: str) -> None:
    """One connection a node, kept for the polls."""
    connection = NamedHttpsConnection(address, AGENT_PORT, timeout=60, context=context)
    task_id, body = dispatch_body(address)
    connection.request("POST", "/tasks/dispatch", body, {"Content-Type": "application/json"})
    json.loads(connection.getresponse().read())
    while True:
        connection.request("GET", f"/tasks/{task_id}")
        if json.loads(connection.getresponse().read())["data"]["status"] == "success":
            break
        time.sleep(0.02)
    connection.close()


class NamedHttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(NamedHttpsConnection, request, context=self._context)  # type: ignore[attr-defined]


def urllib_node(opener: urllib.request.OpenerDirector, address: str) -> None:
    """A connection for each request: urllib keeps none."""
    task_id, body = dispatch_body(address)
    base = f"https://{address}:{AGENT_PORT}/tasks/"
    with opener.open(urllib.request.Request(f"{base}dispatch", body, {"Content-Type": "application/json"})) as answer:
        json.load(answer)
    while True:
        with opener.open(f"{base}{task_id}") as answer:
            if json.load(answer)["data"]["status"] == "success":
                return
        time.sleep(0.02)


def run_threads(work: Callable[[str], None], addresses: Sequence[str]) -> None:
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for address in addresses:
        waiting.put(address)

    def drain() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                work(waiting.get_nowait())

    threads = [threading.Thread(target=drain) for _ in range(IN_FLIGHT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def script_http_client(addresses: Sequence[str]) -> None:
    context = script_context()
    run_threads(lambda address: http_client_node(context, address), addresses)


def script_urllib(addresses: Sequence[str]) -> None:
    opener = urllib.request.build_opener(NamedHttpsHandler(context=script_context()))
    run_threads(lambda address: urllib_node(opener, address), addresses)


def bare_node(context: ssl.SSLContext, address: str) -> None:
    """A handshake, and two requests whose answers nobody looks at: what is left when all else is taken away."""
    task_id, body = dispatch_body(address)
    with socket.create_connection((address, AGENT_PORT), timeout=60) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_hostname=SERVER_NAME) as sock:
            for request in (b"POST /tasks/dispatch HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (
                    len(body), body), f"GET /tasks/{task_id} HTTP/1.1\r\nHost: a\r\n\r\n".encode()):
                sock.sendall(request)
                sock.recv(16384)


def script_bare_sockets(addresses: Sequence[str]) -> None:
    context = script_context()
    run_threads(lambda address: bare_node(context, address), addresses)


def script_aiohttp(addresses: Sequence[str]) -> None:
    import asyncio

    import aiohttp

    async def node(session: aiohttp.ClientSession, slots: asyncio.Semaphore, address: str) -> None:
        task_id, body = dispatch_body(address)
        base = f"https://{address}:{AGENT_PORT}/tasks/"
        async with slots:
            async with session.post(f"{base}dispatch", data=body, server_hostname=SERVER_NAME,
                                    headers={"Content-Type": "application/json"}) as answer:
                await answer.json()
            while True:
                async with session.get(f"{base}{task_id}", server_hostname=SERVER_NAME) as answer:
                    if (await answer.json())["data"]["status"] == "success":
                        return
                await asyncio.sleep(0.02)

    async def everything() -> None:
        slots = asyncio.Semaphore(IN_FLIGHT)
        connector = aiohttp.TCPConnector(ssl=script_context(), limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(node(session, slots, address) for address in addresses))

    asyncio.run(everything())


SCRIPTS: dict[str, Callable[[Sequence[str]], None]] = {
    "http.client": script_http_client, "urllib": script_urllib, "aiohttp": script_aiohttp,
    "bare sockets": script_bare_sockets}
# bench_client.go
GO = "net/http of Go"


def run_script(name: str) -> None:
    """The process of one bare script: says that it is ready, and at the end the seconds that it took."""
    addresses = json.loads(sys.stdin.readline())
    if name == "aiohttp":
        import aiohttp  # noqa: F401 - the imports of releasectl are not counted either
    print("ready", flush=True)
    started = time.monotonic()
    SCRIPTS[name](addresses)
    print(time.monotonic() - started, flush=True)
    sys.stdin.readline()


def turn_of_script(lab: Lab, name: str, count: int) -> Turn:
    agents = lab.agents(count)
    agents.reset(0)
    command = [str(lab.go_client()), str(AGENT_PORT), SERVER_NAME] if name == GO else [
        sys.executable, __file__, "--script", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=lab.environment())
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(agents.addresses) + "\n")
    process.stdin.flush()
    process.stdout.readline()
    usage = Usage(agents, process.pid)
    seconds = float(process.stdout.readline())
    turn = usage.turn()
    process.communicate("\n")
    return turn._replace(seconds=seconds)


def turn_of_releasectl(lab: Lab, url: str, count: int, among: int = 0,
                        program: Path | None = None) -> Turn:
    """From POST to success, with serve running; among: how many agents there are, the same for all of a goal."""
    agents = lab.agents(max(count, among))
    agents.reset(0)
    server = Server(lab, url, agents.addresses[:count], program=program)
    try:
        usage = Usage(agents, server.process.pid)
        release_id = server.call("POST", "/api/v1/releases", {"reason": "bench"})["releaseId"]
        server.wait_for_end(release_id)
        return usage.turn()
    finally:
        server.close()
        remove_file(url)


def remove_file(url: str) -> None:
    """Remove the file of an SQLite database."""
    if url.startswith("sqlite:///"):
        for suffix in ("", "-wal", "-shm"):
            Path(url[len("sqlite:///"):] + suffix).unlink(missing_ok=True)


# ---------------------------------------------------------------------------
# The goals. Each gives rows of the table: what, measured, goal, as a number with its limit.
# ---------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table; limit None: for information."""
    goal: str
    what: str
    value: float
    unit: str
    limit: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        return "" if self.limit is None else "ok" if self.value <= self.limit else "MISSED"


def usage_note(turns: Sequence[Turn]) -> str:
    return f"CPU {median(turns, 'cpu_s'):.2f} s, busiest agent process {median(turns, 'agent_share'):.0%} of a core"


def goal_makespan(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """1,000 nodes, tasks of 0 ms: from POST to success, beside the bare scripts"""
    contenders: dict[str, Callable[[], Turn]] = {
        "releasectl": lambda: turn_of_releasectl(lab, lab.sqlite_url(), options.nodes)}
    for name in SCRIPTS:
        if name != "aiohttp" or _has("aiohttp"):
            contenders[name] = lambda name=name: turn_of_script(lab, name, options.nodes)  # type: ignore[misc]
    if lab.go_client():
        contenders[GO] = lambda: turn_of_script(lab, GO, options.nodes)
    else:
        print("  left out: Go is not installed", file=sys.stderr)
    turns = take_turns(options, contenders)
    for name, taken in turns.items():
        yield Row("makespan", f"{options.nodes} nodes: {name}", median(taken), "s", note=usage_note(taken))
    limits = {"http.client": 0.75, "bare sockets": None, GO: 2.0}  # no program in Python can be below bare sockets
    for what, field in (("seconds", "seconds"), ("CPU", "cpu_s")):
        for name in list(turns)[1:]:
            yield Row("makespan", f"{what}: releasectl / {name}", median(turns["releasectl"], field)
                      / median(turns[name], field), "x", limits.get(name, 1.0))
        yield Row("makespan", f"{what}: bare sockets / http.client",
                  median(turns["bare sockets"], field) / median(turns["http.client"], field), "x")


def goal_scale(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """10,000 nodes beside 1,000: makespan and memory"""
    many = 10 * options.nodes
    turns = take_turns(options, {
        f"{count} nodes": lambda count=count: turn_of_releasectl(  # type: ignore[misc]
            lab, lab.sqlite_url(), count, among=many) for count in (options.nodes, many)})
    taken = {count: turns[f"{count} nodes"] for count in (options.nodes, many)}
    few_s, many_s = (median(taken[count]) for count in (options.nodes, many))
    for count, limit in ((options.nodes, 64.0), (many, 200.0)):
        yield Row("scale", f"{count} nodes", median(taken[count]), "s", note=usage_note(taken[count]))
        yield Row("scale", f"{count} nodes: peak memory of serve", median(taken[count], "peak_mib"), "MiB", limit)
    yield Row("scale", f"{many} / {options.nodes} nodes", many_s / few_s, "x", 11.0)


def insert_release(store: rc.Store, version: int, batches: Sequence[Sequence[int]]) -> int:
    """Write a release by hand, as the contract allows; return its id."""
    with store.database.transaction(write=True) as tx:
        tx.execute("INSERT INTO release_tasks (version) VALUES (?)", version)
        release_id = int(tx.value("SELECT id FROM release_tasks WHERE version = ?", version))
        tx.insert_many("INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES ", 3,
                       [(release_id, node_id, number) for number, batch in enumerate(batches, 1)
                        for node_id in batch])
    return release_id


def turn_in_batches(lab: Lab, task_ms: int, count: int) -> Turn:
    """Three batches alike; the seconds from the claim to the end, and the longest gap between two batches."""
    agents = lab.agents(count)
    agents.reset(task_ms)
    url = lab.sqlite_url()
    server = Server(lab, url, agents.addresses, RELEASE_EXECUTOR_INTERVAL_SEC="1")
    try:
        third = count // 3
        usage = Usage(agents, server.process.pid)
        release_id = insert_release(server.store, 1, [range(1 + part * third, 1 + (part + 1) * third)
                                                      for part in range(3)])
        server.wait_for_end(release_id)
        release, nodes = server.store.releases.with_nodes(release_id)
        gaps = [min(rc.epoch_of(n.started_at or "") for n in nodes if n.batch == number + 1)
                - max(rc.epoch_of(n.finished_at or "") for n in nodes if n.batch == number) for number in (1, 2)]
        return usage.turn(gap_ms=max(gaps) * 1000)._replace(
            seconds=rc.epoch_of(release.finished_at or "") - rc.epoch_of(release.started_at or ""))
    finally:
        server.close()
        remove_file(url)


def goal_batches(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """3 batches of 300 nodes, tasks of 500 ms beside tasks of 0 ms"""
    count = 3 * (options.nodes * 3 // 10)
    turns = take_turns(options, {
        "tasks of 0 ms": lambda: turn_in_batches(lab, 0, count),
        "tasks of 500 ms": lambda: turn_in_batches(lab, 500, count)})
    fast_s, slow_s = median(turns["tasks of 0 ms"]), median(turns["tasks of 500 ms"])
    yield Row("batches", f"3 x {count // 3} nodes: tasks of 0 ms", fast_s, "s")
    yield Row("batches", f"3 x {count // 3} nodes: tasks of 500 ms", slow_s, "s")
    yield Row("batches", "500 ms / (1.5 s + that of 0 ms)", slow_s / (1.5 + fast_s), "x", 1.1)
    for name, taken in turns.items():
        yield Row("batches", f"{name}: longest gap between two batches",
                  statistics.median(turn.extra["gap_ms"] for turn in taken), "ms", 50.0)


def seconds_of(command: Sequence[str], environment: dict[str, str], folder: Path = ROOT) -> float:
    started = time.monotonic()
    subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def goal_idle(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """serve and run-once with nothing to do"""
    url = lab.sqlite_url()
    server = Server(lab, url, [])
    try:
        time.sleep(3)  # what its start leaves to do is done
        before, at = cpu_s(server.process.pid), time.monotonic()
        time.sleep(options.idle_s)
        share = (cpu_s(server.process.pid) - before) / (time.monotonic() - at)
    finally:
        server.close()
    yield Row("idle", f"CPU of serve with nothing to do, over {options.idle_s:g} s", share * 100, "%", 0.5)
    tick = [sys.executable, str(ROOT / "releasectl.py"), "--db", url, "run-once"]
    bare = [sys.executable, "-c", "import sqlite3, ssl, http.client"]
    module = [*AS_MODULE, "--db", url, "run-once"]
    turns = take_turns(options, {
        "run-once": lambda: Turn(seconds_of(tick, lab.environment())),
        "as a module": lambda: Turn(seconds_of(module, lab.environment(), lab.program)),
        "imports": lambda: Turn(seconds_of(bare, lab.environment()))}, times=4)
    yield Row("idle", "run-once with nothing to do", median(turns["run-once"]) * 1000, "ms")
    yield Row("idle", "the same, as python -m releasectl, compiled before", median(turns["as a module"]) * 1000, "ms")
    yield Row("idle", 'python -c "import sqlite3, ssl, http.client"', median(turns["imports"]) * 1000, "ms")
    yield Row("idle", "run-once / imports", median(turns["run-once"]) / median(turns["imports"]), "x", 1.5)


def goal_start(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """a short command of an installed releasectl, from its start to its end"""
    url, folder = lab.sqlite_url(), lab.folder / "start"
    migrate(url)
    subprocess.run(["bash", str(ROOT / "scripts" / "install.sh"), "install"], check=True, env={
        **os.environ, "DESTDIR": "/.", "PREFIX": str(folder), "SYSCONFDIR": str(folder / "etc"),
        "PYTHON": sys.executable})
    command = [str(folder / "bin" / "releasectl"), "--db", url, "list"]
    bare = [sys.executable, "-I", "-c", "import sqlite3, ssl, http.client"]
    turns = take_turns(options, {
        "list": lambda: Turn(seconds_of(command, lab.environment())),
        "imports": lambda: Turn(seconds_of(bare, lab.environment()))}, times=4)
    yield Row("start", "releasectl list, installed", median(turns["list"]) * 1000, "ms")
    yield Row("start", 'python -I -c "import sqlite3, ssl, http.client"', median(turns["imports"]) * 1000, "ms")
    yield Row("start", "list / imports", median(turns["list"]) / median(turns["imports"]), "x", 2.5)


class Reader:
    """A client that reads paths in a loop, on one connection, in a process of its own."""

    def __init__(self, port: int, paths: Sequence[str], pause_s: float):
        self._process = subprocess.Popen([sys.executable, __file__, "--reader", str(port), str(pause_s), *paths],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has started, which costs more than reading

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def stop(self) -> dict[str, list[float]]:
        """Return the seconds of every read, by path."""
        return dict(json.loads(self._process.communicate("\n")[0]))


def run_reader(port: int, pause_s: float, paths: Sequence[str]) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    stop = threading.Event()

    def wait_for_stop() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=wait_for_stop, daemon=True).start()
    taken: dict[str, list[float]] = {path: [] for path in paths}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=BENCH_TIMEOUT_S)
    while not stop.is_set():
        for path in paths:
            started = time.monotonic()
            connection.request("GET", path)
            answer = connection.getresponse()
            size = len(answer.read())
            if answer.status == 429:  # others read the whole of a release now
                stop.wait(float(answer.headers["Retry-After"]))
                continue
            if answer.status != 200 or not size:
                raise SystemExit(f"GET {path}: {answer.status}")
            taken[path].append(time.monotonic() - started)
            stop.wait(pause_s)
    print(json.dumps(taken))


# What an open page asks for, again and again, and the whole of a release.
PAGE_READS = {"summary": "/api/v1/releases/1?view=summary", "list": "/api/v1/releases?page=1&pageSize=30",
              "list of those that ended": "/api/v1/releases?status=ended&pageSize=30",
              "overview": "/api/v1/overview", "health": "/api/v1/health", "why": "/api/v1/releases/1/why"}
WHOLE_READS = {"whole": "/api/v1/releases/1"}


def turn_with_readers(lab: Lab, count: int, readers: int, reads: dict[str, str], pause_s: float) -> Turn:
    agents = lab.agents(count)
    agents.reset(0)
    url = lab.sqlite_url()
    server = Server(lab, url, agents.addresses)
    try:
        clients = [Reader(server.port, [*reads.values()], pause_s) for _ in range(readers)]
        usage = Usage(agents, server.process.pid)
        release_id = server.call("POST", "/api/v1/releases", {})["releaseId"]
        for client in clients:
            client.go()
        server.wait_for_end(release_id)
        turn = usage.turn()
        extra: dict[str, float] = {}
        for taken in [client.stop() for client in clients]:
            for kind, path in reads.items():
                extra[f"{kind} p99 ms"] = max(extra.get(f"{kind} p99 ms", 0.0), percentile(taken[path], 0.99) * 1000)
                extra[f"{kind} reads"] = extra.get(f"{kind} reads", 0.0) + len(taken[path])
        return turn._replace(extra=extra)
    finally:
        server.close()
        remove_file(url)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def goal_api(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """Reading the whole of a release of 5,000 nodes while it runs"""
    many = 5 * options.nodes
    turns = take_turns(options, {
        "nobody reads": lambda: turn_with_readers(lab, many, 0, {}, 0.0),
        "four read the whole in a loop": lambda: turn_with_readers(lab, many, 4, WHOLE_READS, 0.0)})
    alone_s = median(turns["nobody reads"])
    for name, taken in turns.items():
        yield Row("api", f"{many} nodes: {name}", median(taken), "s", note=usage_note(taken))
    whole = turns["four read the whole in a loop"]
    yield Row("api", "makespan with four readers / alone", median(whole) / alone_s, "x", 1.1,
              note=f"{statistics.median(turn.extra['whole reads'] for turn in whole):.0f} reads")


def goal_page(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """Reading what a page does while a release of 5,000 nodes runs"""
    many = 5 * options.nodes
    taken = take_turns(options, {"one reads": lambda: turn_with_readers(lab, many, 1, PAGE_READS, 0.05)})["one reads"]
    yield Row("page", f"{many} nodes: one reads", median(taken), "s", note=usage_note(taken))
    yield Row("page", f"{many} nodes: peak memory of serve", median(taken, "peak_mib"), "MiB", 220.0)
    for kind in PAGE_READS:  # the first overview counts all nodes
        slowest = statistics.median(turn.extra[f"{kind} p99 ms"] for turn in taken)
        yield Row("page", f"GET of the {kind}, 99th percentile", slowest, "ms",
                  200.0 if kind in ("overview", "why") else 50.0)


def fill_history(path: str, releases: int, nodes: int) -> None:
    """Write finished releases with their nodes and a few events straight into SQLite: history by the million."""
    connection = sqlite3.connect(path, isolation_level=None)
    # the indexes grow at random places: without memory for them each page is written a hundred times
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -2000000"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("BEGIN")
    connection.execute("""
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
        INSERT INTO release_tasks (version, status, total_nodes, success_nodes, started_at, finished_at)
        SELECT i, 'success', ?, ?, '2026-01-01T00:00:00.000Z', '2026-01-01T00:00:01.000Z' FROM n""",
                       (releases, nodes, nodes))
    connection.execute("""
        INSERT INTO release_task_nodes (release_task_id, node_id, batch, status, task_id, attempts,
                                        started_at, finished_at)
        SELECT r.id, h.id, 1 + (h.id > 1), 'success', 'apply_config_' || h.main_ip || '_' || r.version, 1,
               '2026-01-01T00:00:00.000Z', '2026-01-01T00:00:01.000Z'
        FROM release_tasks r CROSS JOIN nodes h""")
    connection.execute("""
        INSERT INTO release_events (release_task_id, event, to_status) SELECT id, 'created', 'pending'
        FROM release_tasks UNION ALL SELECT id, 'finished', 'success' FROM release_tasks""")
    connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()


def goal_history(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """10,000 releases and 5 million rows of nodes in the database, beside an empty one"""
    releases, nodes = 10 * options.nodes, options.nodes // 2
    servers: dict[str, Server] = {}
    urls = {"empty": lab.sqlite_url(), "full": lab.sqlite_url()}
    try:
        for name, url in urls.items():
            # enabled for the create: as many as every release of the history has
            database = rc.Database(url)
            database.migrate()
            fill_nodes(rc.Store(database), [f"127.90.{n >> 8}.{n & 255}" for n in range(1, nodes + 1)])
            database.close()
            if name == "full":
                print(f"  filling {releases} releases of {nodes} nodes", file=sys.stderr, flush=True)
                fill_history(url[len("sqlite:///"):], releases, nodes)
            servers[name] = Server(lab, url, [], executor=False)
        requests: dict[str, Callable[[Server], Any]] = {
            "scan for work": lambda server: server.store.claims.scan(),
            "list": lambda server: server.call("GET", "/api/v1/releases?pageSize=20"),
            "summary": lambda server: server.call("GET", "/api/v1/releases/1?view=summary"),
            # last: what it leaves behind is the same in both
            "create": lambda server: server.call("POST", "/api/v1/releases", {}),
        }
        for server in servers.values():
            server.call("POST", "/api/v1/releases", {})
        for what, request in requests.items():
            taken: dict[str, list[float]] = {name: [] for name in servers}
            for _ in range(10 * options.runs):
                for name, server in servers.items():
                    started = time.monotonic()
                    request(server)
                    taken[name].append(time.monotonic() - started)
            empty, full = (statistics.median(taken[name]) for name in ("empty", "full"))
            yield Row("history", f"{what}: full / empty", full / empty, "x", 2.0,
                      note=f"{full * 1000:.2f} ms / {empty * 1000:.2f} ms")
        ticks = {name: [sys.executable, str(ROOT / "releasectl.py"), "--db", url, "list", "--json"]
                 for name, url in urls.items()}
        turns = take_turns(options, {
            name: lambda name=name: Turn(seconds_of(ticks[name], lab.environment()))  # type: ignore[misc]
            for name in ticks})
        yield Row("history", "`releasectl list`: full / empty", median(turns["full"]) / median(turns["empty"]), "x",
                  2.0)
    finally:
        for server in servers.values():
            server.close()
        for url in urls.values():
            remove_file(url)


def fill_fleet(path: str, nodes: int) -> None:
    """Write nodes straight into SQLite: every tenth is in another region."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("""
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
        INSERT INTO nodes (name, main_ip, labels, last_version)
        SELECT 'edge-' || i, '10.' || (i >> 16) || '.' || ((i >> 8) & 255) || '.' || (i & 255),
               CASE WHEN i % 10 = 0 THEN '{"region":"us"}' ELSE '{"region":"eu"}' END, ? FROM n""",
                       (nodes, FLEET_RELEASES))
    connection.close()


FLEET_RELEASES = 50
BY_REGION = rc.ReleaseRequest(payload={"websites": []}, strategy={
    "batchBy": "region", "batches": ["1%*"], "maxParallelPer": {"region": 100}}, labels={"region": ["eu", "us"]})


def plan_by_region(url: str) -> float:
    """Return the seconds to choose the nodes of a fleet, which are read already, and to cut them into batches."""
    nodes = rc.Store(rc.Database(url)).nodes.page(size=0).items
    rc.label_values.cache_clear()
    started = time.monotonic()
    strategy, choice = rc.parse_strategy(BY_REGION.strategy), rc.choose_nodes(nodes, BY_REGION)
    rc.refuse_unknown_labels(strategy, choice.nodes)
    assert len(rc.make_plan(strategy, choice.nodes, choice.left_out).batches) == 200
    return time.monotonic() - started


def show_plan_by_region(url: str) -> float:
    """Return the seconds for the whole plan of it."""
    releases = rc.Store(rc.Database(url)).releases
    started = time.monotonic()
    releases.plan(BY_REGION)
    return time.monotonic() - started


def goal_fleet(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """what 100,000 nodes run and should run, with 5 million rows of history"""
    nodes, url = 100 * options.nodes, lab.sqlite_url()
    path = url[len("sqlite:///"):]
    migrate(url)
    print(f"  filling {FLEET_RELEASES} releases of {nodes} nodes", file=sys.stderr, flush=True)
    fill_fleet(path, nodes)
    fill_history(path, FLEET_RELEASES, nodes)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        # the newest release is for one region, and missed a hundred of its nodes
        connection.execute("UPDATE release_tasks SET payload = '{\"n\":' || id || '}', selection = "
                           "CASE WHEN id = ? THEN '{\"labels\":{\"region\":\"us\"}}' ELSE '{}' END", (FLEET_RELEASES,))
        connection.execute("UPDATE release_task_nodes SET status = 'failed', error_kind = 'agent_failed' "
                           "WHERE release_task_id = ? AND node_id % ? = 0", (FLEET_RELEASES, nodes // 100))
    server = Server(lab, url, [], executor=False)
    try:
        for what, limit_ms, query in (("first page", 100.0, "pageSize=100"),
                                      ("last page", None, f"pageSize=100&page={nodes // 100}"),
                                      ("first page of those behind", None, "pageSize=100&drift=behind"),
                                      ("first page by name", None, "pageSize=100&sort=name")):
            taken = []
            for _ in range(options.runs):
                started = time.monotonic()
                server.call("GET", f"/api/v1/nodes?{query}")
                taken.append(time.monotonic() - started)
            yield Row("fleet", what, statistics.median(taken) * 1000, "ms", limit_ms)
        fleet = rc.Store(rc.Database(url)).fleet
        started = time.thread_time()
        counts = fleet.counts()
        yield Row("fleet", "CPU to count them all by drift", (time.thread_time() - started) * 1000, "ms", None,
                  note=f"{sum(found.nodes for found in counts.drift.values())} nodes, done anew after "
                       f"{rc.RARE_READ_REST} times as long")
        for what, limit_ms, plan in (("plan by region: batches and limits", 2000.0, plan_by_region),
                                     ("`create --plan` of it, with what the nodes run", None, show_plan_by_region)):
            taken = [plan(url) for _ in range(options.runs)]
            yield Row("fleet", what, statistics.median(taken) * 1000, "ms", limit_ms)
        turns = take_turns(options, {"show": lambda: Turn(seconds_of(
            [sys.executable, str(ROOT / "releasectl.py"), "--db", url, "node", "show", f"edge-{nodes}"],
            lab.environment()))})
        yield Row("fleet", "`releasectl node show`", median(turns["show"]) * 1000, "ms", None)
    finally:
        server.close()
        remove_file(url)


# How 50 queued releases lie to each other: targets, and whether each has nodes of its own.
QUEUES = {"one target": (1, False), "50 targets, the same nodes": (50, False),
          "50 targets, no node in common": (50, True)}
QUEUED = 50
SCANS = 50


def fill_queue(url: str, targets: int, is_disjoint: bool, nodes: int) -> None:
    """Write pending releases by SQL, as create does it in this schema."""
    database = rc.Database(url)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {})"
    with database.transaction(write=True) as tx:
        has_names = tx.value("SELECT MAX(version) FROM schema_version") >= 5
        tx.execute(f"""
            {numbers.format(nodes * (QUEUED if is_disjoint else 1))}
            INSERT INTO nodes (name, main_ip)
            SELECT 'edge-' || i, '10.' || (i / 65536) || '.' || (i / 256 % 256) || '.' || (i % 256) FROM n""")
        tx.execute(f"""
            {numbers.format(QUEUED)}
            INSERT INTO release_tasks (version, target, total_nodes{", tag" if has_names else ""})
            SELECT i, 'target-' || (i % {targets}), {nodes}{", '5eed00' || (i + 9)" if has_names else ""} FROM n""")
        tx.execute(f"""
            INSERT INTO release_task_nodes (release_task_id, node_id, batch
                                            {", node_name, main_ip, agent_port" if has_names else ""})
            SELECT r.id, h.id, CASE h.id % {nodes} WHEN 1 THEN 1 ELSE 2 END
                   {", h.name, h.main_ip, h.agent_port" if has_names else ""}
            FROM release_tasks r CROSS JOIN nodes h
            WHERE {int(not is_disjoint)} = 1 OR (h.id - 1) / {nodes} = r.id - 1""")
        # so that a tick scans and starts nothing
        tx.execute("UPDATE release_freeze SET frozen = 1, reason = 'bench'")
    database.close()


def run_scans(url: str) -> None:
    """Print seconds and CPU seconds of each scan for work, of the releasectl.py in the path."""
    store = rc.Store(rc.Database(url))
    taken = []
    for _ in range(1 + SCANS):
        started, cpu = time.monotonic(), time.process_time()
        store.claims.scan()
        taken.append((time.monotonic() - started, time.process_time() - cpu))
    print(json.dumps(taken))


def turn_of_scans(lab: Lab, program: Path, url: str) -> Turn:
    found = subprocess.run([sys.executable, __file__, "--scans", url], check=True, capture_output=True, text=True,
                           env={**lab.environment(), "LAB_PROGRAM": str(program)})
    first, *later = json.loads(found.stdout)
    return Turn(first[0], first[1], extra={"later_s": statistics.median(seconds for seconds, _ in later)})


class AgentsAtOnce:
    """Agents that have done a task when they are asked: what is measured is the driver alone."""

    async def dispatch(self, _address: object, task: Any, _within_s: float, may_leave: Callable[[], bool]) -> Any:
        assert may_leave()
        return rc.Outcome(rc.DISPATCH, rc.ACCEPTED, task.id)

    async def query(self, *_: object) -> Any:
        return rc.Outcome(rc.QUERY, rc.SUCCESS)

    async def probe(self, *_: object) -> Any:
        return rc.Outcome(rc.PROBE, rc.SUCCESS)

    async def ask(self, *_: object) -> Any:
        return rc.Outcome(rc.PING, rc.SUCCESS)


# What a large release may be at: its strategy, and how many of 20 nodes have succeeded.
AT_WORK: dict[str, tuple[dict[str, Any], int]] = {
    "most are done": ({"batches": ["100%"], "maxFailed": "10%"}, 19),
    "racks in regions": ({"batches": ["100%"], "maxParallelPer": {"rack": 1, "region": 1}}, 10),
    "verified after a soak": ({"batches": ["95%"], "soakSec": 1, "verify": {"url": "http://{main_ip}/"}}, 19),
    "preflight": ({"preflight": True}, 0)}
CYCLES, PER_CYCLE = 40, 8


def run_cycles(url: str, name: str, count: int) -> None:
    """Print the CPU seconds of one cycle of a driver, of the releasectl.py in the path."""
    strategy, done = AT_WORK[name]
    database = rc.Database(url)
    database.migrate()
    store = rc.Store(database)
    with database.transaction(write=True) as tx:
        tx.insert_many("INSERT INTO nodes (name, main_ip, labels) VALUES ", 3, [
            (f"edge-{n}", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", f'{{"rack":"r{n % 5000}","region":"g{n % 5}"}}')
            for n in range(1, count + 1)])
    made = store.releases.create(rc.ReleaseRequest(strategy=strategy), "bench")[0]
    with database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'success', attempts = 1, started_at = created_at, "
                   "finished_at = created_at WHERE node_id <= ?", count * done // 20)
        tx.execute("UPDATE release_tasks SET soak_until = created_at WHERE id = ?", made.id)
    policy = rc.Policy(5, 600.0, 60.0, 2.0, 17.0)
    context = rc.DriverContext(DriverSettings, store, AgentsAtOnce(), "bench", policy,  # type: ignore[arg-type]
                               rc.Slots(PER_CYCLE), threading.Event(),
                               lambda request: rc.run_coroutine(request()), lambda _: None)
    claim = store.claims.claim(made.id, "bench", 3000.0)
    assert claim is not None
    driver = rc.Driver(context, rc.Lease(claim, float("inf")), False)
    context.slots.join(driver)
    for number in range(CYCLES + 10):
        if number == 10:
            began = time.process_time()
        if driver.step() is None:
            raise SystemExit(f"bench: the release ended: {store.releases.get(made.id)}")
        driver.collect(0.001)
    print((time.process_time() - began) / CYCLES)


class DriverSettings:
    """The one setting that a driver reads itself."""
    claim_ttl_sec = 30.0


def turn_of_cycles(lab: Lab, program: Path, name: str, count: int) -> Turn:
    url = lab.sqlite_url()
    found = subprocess.run([sys.executable, __file__, "--cycles", url, name, str(count)], check=True,
                           stdout=subprocess.PIPE, text=True, env={**lab.environment(), "LAB_PROGRAM": str(program)})
    remove_file(url)
    return Turn(float(found.stdout))


def goal_cycle(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """CPU of a driver's cycle, with 8 nodes in it, in a release of 10,000 nodes and in one of 100,000"""
    programs = lab.programs(options.beside)
    counts = (10 * options.nodes, 100 * options.nodes)
    for name in AT_WORK:
        contenders: dict[str, Callable[[], Turn]] = {
            f"{commit} {name}, {count} nodes": functools.partial(turn_of_cycles, lab, folder, name, count)
            for commit, folder in programs.items() for count in counts}
        turns = take_turns(options, contenders)
        # the least: whoever else is at work makes it only more
        least = {key: min(turn.seconds for turn in taken) for key, taken in turns.items()}
        for count in counts:
            before = "".join(f"; {commit}: {least[f'{commit} {name}, {count} nodes'] * 1000:.2f} ms"
                             for commit in list(programs)[1:])
            yield Row("cycle", f"{name}: {count} nodes", least[f" {name}, {count} nodes"] * 1000, "ms", None, before)
        yield Row("cycle", f"{name}: {counts[1]} / {counts[0]} nodes", least[f" {name}, {counts[1]} nodes"]
                  / least[f" {name}, {counts[0]} nodes"], "x", 1.5)


def goal_queue(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """A scan for work with 50 queued releases of 10,000 nodes each"""
    programs = lab.programs(options.beside)
    engines: dict[str, Callable[[], str]] = {"SQLite": lab.sqlite_url, "PostgreSQL": lab.postgres_url}
    for engine, queue_name in [(engine, name) for engine in engines for name in QUEUES]:
        if engine == "PostgreSQL" and not lab.has_postgres():
            continue
        yield from queue_rows(lab, options, queue_name, f"{engine}, {queue_name}", engines[engine], programs)


def queue_rows(lab: Lab, options: argparse.Namespace, queue_name: str, what: str, new_url: Callable[[], str],
               programs: dict[str, Path]) -> Iterator[Row]:
    """One queue on one engine, a new database for each program."""
    contenders: dict[str, Callable[[], Turn]] = {}
    urls = []
    for name, program in programs.items():
        url, empty = new_url(), new_url()
        urls += [url, empty]
        tick = [sys.executable, str(program / "releasectl.py"), "--db"]
        for made in (url, empty):
            lab.migrate(program, made)
        fill_queue(url, *QUEUES[queue_name], 10 * options.nodes)
        contenders[f"{name} scans"] = lambda program=program, url=url: turn_of_scans(  # type: ignore[misc]
            lab, program, url)
        for kind, one in (("tick", url), ("empty", empty)):
            contenders[f"{name} {kind}"] = lambda tick=tick, one=one: Turn(  # type: ignore[misc]
                seconds_of([*tick, one, "run-once"], lab.environment()))
    turns = take_turns(options, contenders)
    for url in urls:
        remove_file(url)
    now, then = turns[" scans"], turns[f"{options.beside} scans"] if options.beside else []
    before = f"; {options.beside}: {median(then) * 1000:.1f} ms" if then else ""
    yield Row("queue", f"{what}: first scan of a process", median(now) * 1000, "ms", 1000.0,
              f"CPU {median(now, 'cpu_s') * 1000:.0f} ms{before}")
    yield Row("queue", f"{what}: each later scan", later_s(now) * 1000, "ms")
    if then:
        yield Row("queue", f"{what}: each later scan, now / {options.beside}", later_s(now) / later_s(then), "x",
                  1.5 if queue_name == "one target" else None)
    yield Row("queue", f"{what}: run-once that only scans", median(turns[" tick"]), "s",
              note=f"{median(turns[' empty']):.2f} s with an empty database")


# So many times the CPU of the commit before is too much of a change, on a quiet machine.
WORST_CHANGE = 1.25


def turn_of_create(lab: Lab, program: Path, nodes: int) -> Turn:
    """Forty plans of a release for so many nodes, and one release."""
    url, agents = lab.sqlite_url(), lab.agents(lab.processes)
    server = Server(lab, url, [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(nodes)], executor=False,
                    program=program)
    try:
        usage = Usage(agents, server.process.pid)
        for dry_run in [True] * 40 + [False]:
            server.call("POST", "/api/v1/releases", {"reason": "bench", "dryRun": dry_run})
        return usage.turn()
    finally:
        server.close()
        remove_file(url)


def turn_of_ticks(lab: Lab, program: Path, url: str) -> Turn:
    """Five ticks with nothing to do."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        seconds_of([sys.executable, str(program / "releasectl.py"), "--db", url, "run-once"], lab.environment())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Turn(time.monotonic() - started,
                used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime)


def goal_change(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """CPU of a release, of create, and of ticks, beside the commit that --beside names"""
    if not options.beside:
        print("  left out: it needs --beside COMMIT", file=sys.stderr)
        return
    programs = lab.programs(options.beside)
    urls = {name: lab.sqlite_url() for name in programs}
    for name, program in programs.items():
        lab.migrate(program, urls[name])
    kinds: dict[str, Callable[[str, Path], Turn]] = {
        f"a release to {options.nodes} nodes": lambda _, program: turn_of_releasectl(
            lab, lab.sqlite_url(), options.nodes, program=program),
        f"plans and create for {10 * options.nodes} nodes": lambda _, program: turn_of_create(
            lab, program, 10 * options.nodes),
        "5 ticks with nothing to do": lambda name, program: turn_of_ticks(lab, program, urls[name])}
    for what, run in kinds.items():
        contenders: dict[str, Callable[[], Turn]] = {
            name or "now": functools.partial(run, name, program) for name, program in programs.items()}
        # the least of its turns: what others do on this machine only adds; what looks slow gets more turns for that
        now_s = then_s = math.inf
        for _ in range(3):
            turns = take_turns(options, contenders)
            now_s, then_s = (min(best_s, *(turn.cpu_s for turn in taken))
                             for best_s, taken in zip((now_s, then_s), turns.values()))
            if now_s <= options.worst * then_s:
                break
        yield Row("change", f"{what}: CPU now / {options.beside}", now_s / then_s, "x", options.worst,
                  f"{now_s:.2f} s, {then_s:.2f} s")


def later_s(turns: Sequence[Turn]) -> float:
    return statistics.median(turn.extra["later_s"] for turn in turns)


def goal_postgres(lab: Lab, options: argparse.Namespace) -> Iterator[Row]:
    """The same release on PostgreSQL and on SQLite"""
    if not lab.has_postgres():
        return
    turns = take_turns(options, {
        "SQLite": lambda: turn_of_releasectl(lab, lab.sqlite_url(), options.nodes),
        "PostgreSQL": lambda: turn_of_releasectl(lab, lab.postgres_url(), options.nodes)})
    for name, taken in turns.items():
        yield Row("postgres", f"{options.nodes} nodes: {name}", median(taken), "s", note=usage_note(taken))
    yield Row("postgres", "PostgreSQL / SQLite", median(turns["PostgreSQL"]) / median(turns["SQLite"]), "x", 1.3)


GOALS: dict[str, Callable[[Lab, argparse.Namespace], Iterator[Row]]] = {
    "makespan": goal_makespan, "batches": goal_batches, "postgres": goal_postgres, "scale": goal_scale,
    "api": goal_api, "page": goal_page, "idle": goal_idle, "start": goal_start, "history": goal_history,
    "fleet": goal_fleet, "queue": goal_queue, "change": goal_change, "cycle": goal_cycle}
# What `make bench` measures: the others fill databases with millions of rows, or need a commit beside.
EVERYDAY = ("makespan", "batches", "postgres", "start", "idle", "scale", "api", "page")


def _has(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


# ---------------------------------------------------------------------------
# The table and the command line.
# ---------------------------------------------------------------------------


def machine() -> str:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    return (f"{os.cpu_count()} x {model}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, "
            f"SQLite {sqlite3.sqlite_version}, load {os.getloadavg()[0]:.1f} at the start")


# The table that was committed last, as --json wrote it. What is of a unit in JUDGED is worse above 1.25 times of it.
COMMITTED = ROOT / "docs" / "performance.json"
JUDGED = ("x", "MiB", "%")


def committed_values() -> dict[tuple[str, str], float]:
    """Return by goal and line what the committed table has; nothing where there is none."""
    if not COMMITTED.exists():
        return {}
    return {(row["goal"], row["what"]): row["value"] for row in json.loads(COMMITTED.read_text())["rows"]}


def print_rows(rows: Sequence[Row], committed: dict[tuple[str, str], float]) -> None:
    """Print the table, beside what was committed; times of another day or machine are for information."""
    print("| goal | what | measured | limit | | committed |\n|---|---|---|---|---|---|")
    worse = 0
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:g} {row.unit}"
        before = committed.get((row.goal, row.what))
        is_worse = before is not None and row.unit in JUDGED and row.value > WORST_CHANGE * before
        worse += is_worse
        print(f"| {row.goal} | {row.what} | {row.value:.3g} {row.unit} | {limit} | "
              f"{' '.join(filter(None, (row.verdict, row.note)))} | "
              f"{'' if before is None else f'{before:.3g} {row.unit}'}{', WORSE' if is_worse else ''} |")
    if committed:
        print(f"\n{worse} of {len(rows)} lines are worse than {COMMITTED.relative_to(ROOT)} by more than "
              f"{WORST_CHANGE - 1:.0%} (ratios, memory, shares)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description="How fast releasectl is.", epilog="; ".join(
        f"{name}: {run.__doc__}" for name, run in GOALS.items()))
    parser.add_argument("goals", nargs="*", metavar="GOAL", help=f"{', '.join(GOALS)}; without any: "
                        f"{', '.join(EVERYDAY)}, and no more turns than fit in --minutes")
    parser.add_argument("--runs", type=int, default=5, help="turns of each contender, at most (5)")
    parser.add_argument("--minutes", type=float, default=5.5, help="for all goals, where none is named (5.5)")
    parser.add_argument("--nodes", type=int, default=1000, help="the small release; the large has ten times as many")
    parser.add_argument("--agent-processes", type=int, default=2, help="the agents are spread over so many (2)")
    parser.add_argument("--idle-s", type=float, default=15.0, help="how long an idle serve is watched (15)")
    parser.add_argument("--beside", metavar="COMMIT", default="",
                        help="queue, change, cycle: compare with releasectl.py of a commit")
    parser.add_argument("--worst", type=float, metavar="RATIO", default=WORST_CHANGE,
                        help=f"change: above that it fails ({WORST_CHANGE})")
    parser.add_argument("--json", metavar="FILE", help="write machine and rows into a file too")
    options = parser.parse_args()
    unknown = [name for name in options.goals if name not in GOALS]
    if unknown:
        parser.error(f"unknown goal {unknown[0]}: known are {', '.join(GOALS)}")
    return options


# What processes of its own are started for.
PROCESSES: dict[str, Callable[[Sequence[str]], None]] = {
    "--script": lambda words: run_script(words[0]),
    "--scans": lambda words: run_scans(words[0]),
    "--cycles": lambda words: run_cycles(words[0], words[1], int(words[2])),
    "--reader": lambda words: run_reader(int(words[0]), float(words[1]), words[2:])}


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in PROCESSES:
        PROCESSES[sys.argv[1]](sys.argv[2:])
        return 0
    options = parse_arguments()
    on = machine()
    print(on, file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="releasectl-bench-"))
    lab = Lab(folder, options.agent_processes)
    rows: list[Row] = []
    goals = options.goals or EVERYDAY
    end_at = math.inf if options.goals else time.monotonic() + 60 * options.minutes
    try:
        for number, name in enumerate(goals):
            print(f"{name}: {GOALS[name].__doc__}", file=sys.stderr, flush=True)
            # each goal has its share of the time that is left
            options.until = time.monotonic() + (end_at - time.monotonic()) / (len(goals) - number)
            rows += GOALS[name](lab, options)
    finally:
        lab.close()
        shutil.rmtree(folder, ignore_errors=True)
    print_rows(rows, committed_values())
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": on, "rows": [
            {**row._asdict(), "verdict": row.verdict} for row in rows]}, indent=1) + "\n")
    return int(any(row.verdict == "MISSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
