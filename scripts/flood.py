#!/usr/bin/env python3
"""A flood of one address against `releasectl.py serve`, and what a healthy client at another notices.

    python scripts/flood.py [--plain] [--viewer | --agents] [--seconds N] [--again S] [--json]

From 127.0.0.2: 500 connections that say nothing, 200 that drip a head byte by byte, 50 that stop in
the TLS handshake; whoever is closed comes again after --again seconds. Meanwhile 127.0.0.3 asks in
turn for /healthz, for a release with a token, and to cancel a release as an operator, each on a
connection of its own. Then the flood stops coming again, and its connections must be gone within the
deadline. Prints figures; exit 1 when a healthy request failed or an attacker stayed.

--viewer: the attackers have a viewer's token instead, and come from four addresses, of which one is
the operator's own: 128 send a head whose body never comes, 64 wait for events, 64 read a release of
2000 nodes again and again, and 64 list nodes, all of them on kept connections.

--agents: the attackers are twelve agents of a release that the server drives, over mutual TLS. To each question
they say that the task is running: in chunks of one byte, in TLS records of one byte, or in JSON of thousands of
objects or keys. The figure cpu_percent is what the server takes of a core meanwhile.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import math
import multiprocessing
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from lab import eventually, free_port, make_certs, mtls, sha256  # noqa: E402

import releasectl as rc  # noqa: E402

SERVER, ATTACKER, HEALTHY = "127.0.1.1", "127.0.0.2", "127.0.0.3"
FROM_OUTSIDE = {"idle": 500, "dripping": 200, "stalled": 50}
OF_A_VIEWER = {"unsent": 128, "waiting": 64, "reading": 64, "listing": 64}
VIEWERS_SOURCES = (ATTACKER, "127.0.0.4", "127.0.0.5", HEALTHY)
TOKEN, VIEWERS_TOKEN = "flood", "viewer"  # of a server that lives for seconds
NODES_TO_READ = 2000
AGENTS, AGENT_PORT = {"agents": 12}, 8443
# The healthy client comes again so often, and for so long, when it is turned away.
COME_AGAIN_S, COME_AGAIN_FOR_S = 0.25, 30.0
ASKED = {"unsent": ("POST", "/api/v1/nodes", "Content-Type: application/json\r\nContent-Length: 9\r\n"),
         "waiting": ("GET", "/api/v1/releases/1/events?after=1000000&wait=30", ""),
         "reading": ("GET", "/api/v1/releases/1", ""), "listing": ("GET", "/api/v1/nodes?pageSize=100", "")}


# -- the attackers, in a process of their own ----------------------------------------------------

class Flood:
    """All attackers; open_now counts the connections that the server has not closed."""

    def __init__(self, port: int, context: ssl.SSLContext | None, again_s: float, kinds: dict[str, int]):
        self.port, self.context, self.again_s, self.kinds = port, context, again_s, kinds
        self.open_now = self.connects = 0
        self.is_over = False

    async def attacker(self, kind: str, number: int) -> None:
        source = VIEWERS_SOURCES[number % len(VIEWERS_SOURCES)] if kind in ASKED else ATTACKER
        while not self.is_over:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self.visit(kind, source)
            await asyncio.sleep(self.again_s)

    async def visit(self, kind: str, source: str) -> None:
        """Make one connection, and stay until the server closes it."""
        self.connects += 1
        tls = None if kind in ("idle", "stalled") else self.context
        reader, writer = await asyncio.open_connection(
            SERVER, self.port, local_addr=(source, 0), ssl=tls, server_hostname=SERVER if tls else None)
        self.open_now += 1
        try:
            if kind == "stalled":
                writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            dripping = asyncio.ensure_future(self.drip(writer)) if kind == "dripping" else None
            if kind in ASKED:
                return await self.ask_again_and_again(reader, writer, *ASKED[kind])
            while await reader.read(65536):
                pass
            if dripping:
                dripping.cancel()
        finally:
            self.open_now -= 1
            writer.close()

    async def ask_again_and_again(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str,
                                  path: str, headers: str) -> None:
        while not self.is_over:
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {VIEWERS_TOKEN}\r\n{headers}"
                         "\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))

    @staticmethod
    async def drip(writer: asyncio.StreamWriter) -> None:
        for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 10000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.2)

    async def run(self, pipe: Any) -> None:
        tasks = [asyncio.ensure_future(self.attacker(kind, number))
                 for kind, count in self.kinds.items() for number in range(count)]
        while not pipe.poll():
            await asyncio.sleep(0.05)
        pipe.recv()
        self.is_over = True
        for task, kind in zip(tasks, (kind for kind, count in self.kinds.items() for _ in range(count))):
            if kind in ASKED:  # whoever has shown a token may stay for longer
                task.cancel()
        ends_at = time.monotonic() + 2 * rc.UNAUTHENTICATED_S
        started = time.monotonic()
        while self.open_now and time.monotonic() < ends_at:
            await asyncio.sleep(0.05)
        pipe.send((self.connects, self.open_now, time.monotonic() - started))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def agent_address(number: int) -> str:
    return f"127.0.2.{number + 1}"


def dear_answer(number: int, document: dict[str, Any]) -> list[bytes]:
    """Return an answer of at most 64 KiB that is dear to read, in the pieces in which it is sent."""
    text = json.dumps(document)
    if number % 4 == 0:
        return [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 19_000
                + f"{len(text):x}\r\n{text}\r\n0\r\n\r\n".encode()]
    more = {1: " " * 60_000, 2: ', "x": [' + ",".join(['{"":0}'] * 9000) + "]",
            3: ', "x": {' + ",".join(f'"{n}":0' for n in range(7000)) + "}"}[number % 4]
    whole = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text) + len(more)}\r\n\r\n{text[:-1]}{more}}}".encode()
    return [bytes([byte]) for byte in whole] if number % 4 == 1 else [whole]


def dear_agents(certs: Path, pipe: Any) -> None:
    """Be the hostile agents, until the pipe says that it is over; tell how often they were asked."""
    asked = [0]

    def talk(number: int, sock: socket.socket, context: ssl.SSLContext) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as connection:
            while request := connection.recv(1 << 16):
                head, _, body = request.partition(b"\r\n\r\n")
                asked[0] += 1
                task_id = json.loads(body)["taskId"] if body else head.split()[1].decode().rpartition("/")[2]
                status = "pending" if body else "running"
                for piece in dear_answer(number, {"code": 0, "data": {"taskId": task_id, "status": status}}):
                    connection.sendall(piece)

    def listen(number: int, listener: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*(f"{certs}/agents/{agent_address(number)}.{kind}" for kind in ("crt", "key")))
        while True:
            threading.Thread(target=talk, args=(number, listener.accept()[0], context), daemon=True).start()

    for number in range(AGENTS["agents"]):
        listener = socket.create_server((agent_address(number), AGENT_PORT))
        threading.Thread(target=listen, args=(number, listener), daemon=True).start()
    pipe.send("listening")
    pipe.recv()
    pipe.send((asked[0], 0, 0.0))


def attack(port: int, ca: str, again_s: float, kinds: dict[str, int], pipe: Any) -> None:
    """The body of the attackers' process."""
    if kinds == AGENTS:
        dear_agents(Path(ca).parent, pipe)
    else:
        context = ssl.create_default_context(cafile=ca) if ca else None
        asyncio.run(Flood(port, context, again_s, kinds).run(pipe))


# -- the healthy client ---------------------------------------------------------------------------

HEALTH, RELEASE, ACT = "/healthz", "/api/v1/releases/1?view=summary", "/api/v1/releases/999/cancel"
RESUME = "/api/v1/releases/1/resume"


def ask(port: int, context: ssl.SSLContext | None, path: str) -> float:
    """Make one request on a connection of its own; return the ms that it took. Raise on a wrong answer."""
    started = time.monotonic()
    source = (HEALTHY, 0)
    connection = http.client.HTTPSConnection(SERVER, port, timeout=10, source_address=source, context=context) \
        if context else http.client.HTTPConnection(SERVER, port, timeout=10, source_address=source)
    try:
        connection.request("POST" if path in (ACT, RESUME) else "GET", path,
                           headers={} if path == HEALTH else {"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != (404 if path == ACT else 200):  # there is no such release: the act was looked at
            raise RuntimeError(f"{path}: {answer.status}")
        return (time.monotonic() - started) * 1000
    finally:
        connection.close()


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(part * len(values)) - 1)] if values else math.nan


def usage(pid: int) -> dict[str, int]:
    """Return memory in KiB and threads of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {"rss_kib": int(lines["VmRSS"].split()[0]), "peak_kib": int(lines["VmHWM"].split()[0]),
            "threads": int(lines["Threads"])}


def cpu_s(pid: int) -> float:
    """Return the seconds of CPU that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- the server -----------------------------------------------------------------------------------

@contextlib.contextmanager
def serving(folder: Path, is_plain: bool, before: str = "", nodes: int = 1, agents: int = 0) -> Any:
    """Run `serve` with one release, after some lines of Python; give its process, port and CA.

    With agents the release is theirs, and is driven.
    """
    port = free_port(SERVER)
    tokens, database = folder / "tokens", f"sqlite:///{folder}/flood.db"
    tokens.touch(0o600)
    tokens.write_text(f"flood:operator:{sha256(TOKEN)}\n"
                      f"vera:viewer:{sha256(VIEWERS_TOKEN)}\n")
    values = {"DATABASE_URL": database, "HTTP_ADDR": f"{SERVER}:{port}", "API_TOKENS_FILE": str(tokens),
              "RELEASE_EXECUTOR_ENABLED": "0", "MTLS_ENABLED": "0"}
    ca = ""
    if not is_plain:
        make_certs(folder / "certs", SERVER, *map(agent_address, range(agents)))
        ca, pair = f"{folder}/certs/ca.crt", f"{folder}/certs/agents/{SERVER}"
        values.update(HTTP_CERT=f"{pair}.crt", HTTP_KEY=f"{pair}.key")
    if agents:
        values.update(RELEASE_EXECUTOR_ENABLED="1", MTLS_ENABLED="1", **mtls(folder / "certs"))
    store = rc.Store(rc.Database(database))
    store.database.migrate()
    for number in range(agents or nodes):
        address = agent_address(number) if agents else f"10.1.{number // 250}.{number % 250 + 1}"
        store.nodes.add(f"edge-{number}", address, AGENT_PORT)
    store.releases.create(rc.ReleaseRequest(strategy={"batches": [agents or 1]}), "flood")
    if agents:  # until they listen
        store.releases.act("pause", 1, "flood")
    store.database.close()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HTTP_", "API_", "CONTROL_"))}
    program = f"import sys, releasectl as rc\n{before}\nsys.exit(rc.main(['serve']))"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", program], env={**environ, **values}, cwd=ROOT, stderr=log)
    try:
        await_health(port, ca)
        yield process, port, ca
    finally:
        process.terminate()
        process.wait(30)


def await_health(port: int, ca: str) -> None:
    context = ssl.create_default_context(cafile=ca) if ca else None

    def answers() -> bool:
        with contextlib.suppress(OSError):
            ask(port, context, HEALTH)
            return True
        return False

    eventually(answers, 30.0, "/healthz does not answer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="HTTP in place of HTTPS")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--viewer", action="store_true", help="attackers with a viewer's token")
    kind.add_argument("--agents", action="store_true", help="attackers are agents whose answers are dear to read")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the flood lasts")
    parser.add_argument("--again", type=float, default=1.0, help="seconds until an attacker who was closed comes again")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.agents and options.plain:
        parser.error("--agents speak TLS")
    folder = Path(tempfile.mkdtemp(prefix="releasectl-flood."))
    try:
        with serving(folder, options.plain, nodes=NODES_TO_READ if options.viewer else 1,
                     agents=AGENTS["agents"] if options.agents else 0) as (process, port, ca):
            figures = measure(process.pid, port, ca, options)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures) if options.json else "\n".join(f"{k:<16} {v}" for k, v in figures.items()))
    may_be_turned_away = options.viewer and figures["worst_wait_ms"] < 1000 * COME_AGAIN_FOR_S
    return 1 if (figures["failures"] and not may_be_turned_away) or figures["attackers_left"] else 0


def measure(pid: int, port: int, ca: str, options: argparse.Namespace) -> dict[str, Any]:
    context = ssl.create_default_context(cafile=ca) if ca else None
    paths = HEALTH, RELEASE, ACT
    kinds = OF_A_VIEWER if options.viewer else AGENTS if options.agents else FROM_OUTSIDE
    quiet = [ask(port, context, paths[n % 3]) for n in range(200)]
    before = usage(pid)
    ours, theirs = multiprocessing.Pipe()
    attackers = multiprocessing.get_context("spawn").Process(target=attack, args=(
        port, ca, options.again, kinds, theirs))
    attackers.start()
    if options.agents:
        ours.recv()
        ask(port, context, RESUME)
    cpu_before, began_at = cpu_s(pid), time.monotonic()
    took: list[float] = []
    waits: list[float] = []
    failures: list[str] = []
    most = before
    until = time.monotonic() + options.seconds
    number = 0
    while time.monotonic() < until:
        number += 1
        path, began = paths[number % 3], time.monotonic()
        while True:
            try:
                took.append(ask(port, context, path))
                break
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                if time.monotonic() - began > COME_AGAIN_FOR_S:
                    break
                time.sleep(COME_AGAIN_S)
        waits.append((time.monotonic() - began) * 1000)
        if number % 20 == 0:
            now = usage(pid)
            most = {key: max(most[key], now[key]) for key in most}
        time.sleep(0.005)
    cpu_percent = round(100 * (cpu_s(pid) - cpu_before) / (time.monotonic() - began_at))
    ours.send("over")
    connects, left, gone_s = ours.recv()
    attackers.join(30)
    return {"scheme": "https" if ca else "http", "seconds": options.seconds, "attackers": sum(kinds.values()),
            "attacks": connects, "requests": len(took), "turned_away": len(failures),
            "failures": failures[:10],
            "quiet_p50_ms": round(percentile(quiet, 0.5), 1), "quiet_p99_ms": round(percentile(quiet, 0.99), 1),
            "p50_ms": round(percentile(took, 0.5), 1), "p99_ms": round(percentile(took, 0.99), 1),
            "max_ms": round(max(took, default=math.nan), 1),
            "worst_wait_ms": round(max(waits, default=math.nan), 1), "threads": most["threads"],
            "cpu_percent": cpu_percent,
            "rss_before_mib": round(before["rss_kib"] / 1024, 1), "rss_peak_mib": round(most["peak_kib"] / 1024, 1),
            "attackers_left": left, "gone_after_s": round(gone_s, 1)}


if __name__ == "__main__":
    sys.exit(main())
