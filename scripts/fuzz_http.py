#!/usr/bin/env python3
"""Mutated raw HTTP against `releasectl.py serve`, after which it must still serve.

    python scripts/fuzz_http.py [--seconds N] [--seed N]

Takes the requests of tests/hostile and some good ones, changes bytes, swaps and doubles parts, cuts
and joins them, and sends each over a connection of its own. An answer must be HTTP with a status
that the API knows and JSON in its envelope (or a document of a good request); the connection must
end; and afterwards the server must serve with as many threads as before, without an error in its
log. Prints figures; exit 1 and the requests that did harm, else.
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from flood import SERVER, TOKEN, await_health, serving, usage

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 8
STATUSES = {200, 201, 304, 400, 401, 403, 404, 405, 408, 409, 413, 414, 415, 431, 501, 505}
AUTHORIZATION = f"Authorization: Bearer {TOKEN}\r\n".encode()
# What parsers have tripped over.
WORDS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\r\n\r\n", b"%00", b"\xff", b"\xef\xbb\xbf", b"GET", b"HTTP/1.1",
    b"HTTP/1.0", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n",
    b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Content-Type: application/json\r\n", AUTHORIZATION,
    b"{", b"}", b"[" * 70, b'"\\ud800"', b"1e999", b"NaN", b"9" * 5000, b"A" * 9000, b"X: y\r\n" * 70]


def corpus() -> list[bytes]:
    good = [b"%s %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (method, path, AUTHORIZATION, len(body), body)
            for method, path, body in (
                (b"GET", b"/api/v1/releases?page=1&pageSize=5", b""), (b"GET", b"/api/v1/releases/1", b""),
                (b"POST", b"/api/v1/releases", b'{"reason":"x","payload":{"a":[1,2.5,null]},"target":"cdn"}'),
                (b"POST", b"/api/v1/nodes", b'{"name":"n","mainIp":"10.0.0.1","labels":{"a":"b"}}'),
                (b"POST", b"/api/v1/releases", b'{"version":7,"dryRun":true,"strategy":{"batches":[1],'
                 b'"onExceed":"pause","verify":{"url":"http://{main_ip}:8080/","host":"www.example.com","contains":"ok","timeoutSec":5}}}'),
                (b"POST", b"/api/v1/releases/1/rollback", b'{"toRelease":1,"overNewer":true,"dryRun":true}'),
                (b"POST", b"/api/v1/releases/1/retry", b'{"overNewer":true,"dryRun":true,"reason":"x"}'),
                (b"PUT", b"/api/v1/freeze", b'{"frozen":true,"reason":"x"}'),
                (b"PATCH", b"/api/v1/nodes/1", b'{"enabled":true}'), (b"HEAD", b"/metrics", b""),
                (b"GET", b"/api/v1/releases/1/events?after=0&limit=10", b""))]
    hostile = [path.read_bytes().partition(b"\n")[2] for path in sorted((ROOT / "tests" / "hostile").glob("*.http"))]
    return good * 20 + [request.replace(b"Host: localhost\r\n", b"Host: localhost\r\n" + AUTHORIZATION, 1)
                        for request in hostile]


def mutate(chance: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with one to six changes."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 6)):
        at = chance.randint(0, len(data))
        to = min(len(data), at + chance.choice((1, 2, 8, 64)))
        kind = chance.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at:at] = chance.choice(WORDS)
        elif kind == 2:
            del data[at:to]
        elif kind == 3:
            data[at:at] = data[at:to] * chance.randint(1, 4)
        elif kind == 4:
            data[at:to] = bytes(chance.randrange(256) for _ in range(to - at))
        elif kind == 5:
            other = chance.choice(seeds)
            data[at:] = other[chance.randint(0, len(other)):]
        else:
            data += chance.choice(seeds)
    return bytes(data[:200_000])


def send(port: int, data: bytes, is_torn: bool) -> tuple[bytes, str]:
    """Send a request, in two parts when it is torn; return what came and what was wrong with it."""
    with socket.create_connection((SERVER, port), timeout=20) as sock:
        raw = b""
        try:
            with contextlib.suppress(ConnectionError):
                for part in (data[:len(data) // 2], data[len(data) // 2:]) if is_torn else (data,):
                    sock.sendall(part)
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while chunk := sock.recv(65536):
                    raw += chunk
        except socket.timeout:
            return raw, "the connection does not end"
    return raw, judge(raw)


def judge(raw: bytes) -> str:
    """Return what is wrong with the answers; '' when nothing is."""
    rest = raw.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    while rest:
        head, _, rest = rest.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        if not status or int(status[1]) not in STATUSES:
            return "no answer of HTTP, or a status that is not for a client's mistake"
        length = re.search(rb"\r\nContent-Length: (\d+)", head)
        if not length or not rest or rest.startswith(b"HTTP/1.1 "):
            continue  # the answer to HEAD, or 304
        body, rest = rest[:int(length[1])], rest[int(length[1]):]
        if b"Content-Type: application/json" in head:
            try:
                document = json.loads(body)
            except ValueError:
                return "a body that is not JSON"
            if "openapi" not in document and set(document) != {"code", "message", "data"}:
                return "no envelope"
        if b"Traceback" in body:
            return "a stack trace"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.randrange(10**9) if options.seed is None else options.seed
    chance, seeds = random.Random(seed), corpus()
    print(f"seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="releasectl-fuzz."))
    harm: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    try:
        with serving(folder, is_plain=True, before="rc.MAX_DELAY_S = 0.0") as (process, port, ca):
            before = usage(process.pid)
            until = time.monotonic() + options.seconds
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
                while time.monotonic() < until and len(harm) < 10:
                    batch = [(mutate(chance, seeds), chance.random() < 0.2) for _ in range(200)]
                    for (data, _), (raw, wrong) in zip(batch, pool.map(lambda pair: send(port, *pair), batch)):
                        counts[raw[9:12].decode("latin-1") or "no answer"] += 1
                        if wrong:
                            harm.append(f"{wrong}: {data[:2000]!r} -> {raw[:300]!r}")
            await_health(port, ca)
            after = usage(process.pid)
        log = (folder / "log").read_text().splitlines()
        errors = [line for line in log if " error: " in line or "Traceback" in line]
    finally:
        shutil.rmtree(folder)
    print(f"{sum(counts.values())} requests, first answers: " + ", ".join(f"{k} {v}" for k, v in counts.most_common()))
    print(f"memory {before['rss_kib'] >> 10} MiB, then {after['rss_kib'] >> 10} MiB; threads {after['threads']}")
    print("\n".join([*harm, *errors[:20]]), file=sys.stderr)
    return 1 if harm or errors else 0


if __name__ == "__main__":
    sys.exit(main())
