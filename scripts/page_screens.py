#!/usr/bin/env python3
"""Photograph the dashboard for the docs in a real Chromium, over a world that is made up: `make page-screens`."""
from __future__ import annotations

import argparse
import base64
import json
import struct
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Browser  # noqa: E402

import releasectl as rc  # noqa: E402

NODES = 200
SITES = ("www.example.com", "shop.example.com", "api.example.com", "static.example.com", "img.example.com")
POPS = ("ams", "fra", "gru", "hkg", "iad", "sin")
# What the failed release met: error kind, message, the nodes of which POP, how many.
FAILURES = (("agent_failed", "nginx: [emerg] bind() to 0.0.0.0:443 failed (98: Address already in use)", "gru", 17),
            ("unreachable", "{ip}:8443: connection refused", "hkg", 12),
            ("timeout", "{ip}:8443: no answer within 60 s", "sin", 8))


def payload(number: int) -> dict[str, object]:
    """Return what release NUMBER brings: sites with origins, a little more with each."""
    return {"websites": [{"domain": site, "origin": f"10.20.0.{place + 1 + (number if place == 1 else 0)}:8080",
                          "cache": {"ttl": 300 if place or number < 14 else 3}, "http2": number > 5}
                         for place, site in enumerate(SITES)], "workers": 4 + number // 6}


def fill(store: rc.Store) -> None:
    """Write a fleet, its releases of two weeks, one that failed in the night, and what goes out now."""
    store.nodes.import_all([
        {"name": f"edge-{POPS[n % 6]}-{n // 6 + 1:02d}", "main_ip": f"10.1.{n % 6}.{n // 6 + 1}",
         "labels": json.dumps({"pop": POPS[n % 6], "role": "cache" if n % 5 else "origin"})} for n in range(NODES)])
    now_s, strategy = time.time(), {"batches": [1, "10%", "25%*"], "maxFailed": "50%", "maxFailedTotal": "15%",
                                    "soakSec": 120}
    for number in range(1, 15):
        release = create(store, number, "cdn", ("weekly", "certificates renewed", "hotfix 4711")[number % 3], strategy)
        age_s = (15 - number) * 86400 - 7200
        if number == 14:
            break
        end(store, release.id, "failed" if number == 6 else "success", now_s - age_s, 240 + number * 37 % 400)
    fail(store, 14, now_s - 5400)
    run(store, create(store, 15, "dns", "new resolvers", {"batches": [1, "25%*"]}).id, now_s - 80)
    for number, reason in ((16, "log format"), (17, "TLS 1.3 only")):
        create(store, number, "dns", reason, {})
    with store.database.transaction(write=True) as tx:
        tx.execute("INSERT INTO executors (owner, host, kind, started_at, seen_at, period_sec) "
                   "VALUES (?, ?, ?, ?, ?, ?)", "host-a:1:9f3a61c0", "host-a", "serve", rc.utc_text(now_s - 86400),
                   rc.utc_text(now_s), 3600)
    store.nodes.update(3, {"status": "maintenance"})


def create(store: rc.Store, number: int, target: str, reason: str, strategy: dict[str, object]) -> rc.Release:
    request = rc.ReleaseRequest(target, reason, payload(number), strategy=strategy)
    return store.releases.create(request, rc.Act("anna", rc.VIA_API)).release


def end(store: rc.Store, release_id: int, status: str, began_s: float, took_s: float) -> None:
    """End a release whose nodes all went as it did."""
    times = rc.utc_text(began_s), rc.utc_text(began_s + took_s)
    text = f"{NODES} nodes succeeded" if status == "success" else "stopped by node edge-ams-01 in batch 1: disk full"
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'success', attempts = 1, started_at = ?, finished_at = ? "
                   "WHERE release_task_id = ?", *times, release_id)
        if status == "failed":
            tx.execute("UPDATE release_task_nodes SET status = 'skipped' WHERE release_task_id = ? AND batch > 1",
                       release_id)
            tx.execute("UPDATE release_task_nodes SET status = 'failed', error_kind = 'agent_failed', error_msg = "
                       "'disk full' WHERE release_task_id = ? AND batch = 1", release_id)
        settle(tx, release_id, status, text, *times)


def fail(store: rc.Store, release_id: int, began_s: float) -> None:
    """Let a release fail on 37 nodes for three causes."""
    times = rc.utc_text(began_s), rc.utc_text(began_s + 412)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'success', attempts = 1, started_at = ?, finished_at = ? "
                   "WHERE release_task_id = ? AND batch < 5", *times, release_id)
        tx.execute("UPDATE release_task_nodes SET status = 'skipped' WHERE release_task_id = ? AND batch >= 5",
                   release_id)
        for kind, message, pop, count in FAILURES:
            for node, address in tx.rows("SELECT node_id, main_ip FROM release_task_nodes WHERE release_task_id = ? "
                                         "AND node_name LIKE ? ORDER BY id LIMIT ?", release_id, f"edge-{pop}-%",
                                         count):
                tx.execute("UPDATE release_task_nodes SET status = 'failed', attempts = 3, error_kind = ?, "
                           "error_msg = ?, started_at = ?, finished_at = ? WHERE release_task_id = ? AND node_id = ?",
                           kind, message.format(ip=address), *times, release_id, node)
        release, nodes = rc.read_release(tx, release_id), rc.NodeIndex(rc.read_release_nodes(tx, release_id))
        strategy = rc.strategy_of(release.strategy)
        reason = rc.describe("failed", rc.Situation(release, nodes, store.state.moment(), strategy=strategy,
                                                    exceeded=rc.exceeded_limit(nodes, strategy)))
        settle(tx, release_id, "failed", reason, *times)
        rc.add_events(tx, times[1], "host-a:1", [rc.NewEvent(release_id, "finished", "running", "failed", reason)])


def run(store: rc.Store, release_id: int, began_s: float) -> None:
    """Let a release be half-way."""
    now = rc.utc_text(time.time())
    with store.database.transaction(write=True) as tx:
        for status, low, high in (("success", 0, 38), ("running", 38, 51)):
            tx.execute("UPDATE release_task_nodes SET status = ?, attempts = 1, started_at = ?, finished_at = ? "
                       "WHERE release_task_id = ? AND node_id > ? AND node_id <= ?", status, rc.utc_text(began_s),
                       now if status == "success" else None, release_id, low, high)
        settle(tx, release_id, "running",
               "batch 2 of 5: waiting for 13 of 50 nodes, slowest edge-fra-07 for 24 s of 600 s",
               rc.utc_text(began_s), None)
        tx.execute("UPDATE release_tasks SET claim_owner = 'host-a:1:9f3a61c0', claim_expires_at = ? WHERE id = ?",
                   rc.utc_text(time.time() + 25), release_id)
        rc.add_events(tx, now, "host-a:1", [rc.NewEvent(release_id, "started", "pending", "running")])


def settle(tx: rc.Transaction, release_id: int, status: str, text: str, began: str, ended: str | None) -> None:
    tx.execute("UPDATE release_tasks SET status = ?, status_reason = ?, created_at = ?, started_at = ?, "
               f"finished_at = ?, {rc.COUNTERS} WHERE id = ?", status, text, began, began, ended, release_id)


class Picture(NamedTuple):
    """A file, and what is on it."""
    name: str
    place: str
    width: int = 1280
    height: int = 900
    scheme: str = "light"
    language: str = "en"
    # What is done before it is taken.
    script: str = ""
    # How it is shown: "", print or forced-colors.
    media: str = ""


TYPED = ("sessionStorage.setItem('releasectl-draft', JSON.stringify({target: 'cdn', reason: 'shop moves house', "
         f"payload: {json.dumps(json.dumps(payload(20), indent=2))}, strategy: '{{\"batches\": [1, \"10%\", \"25%*\"], "
         "\"maxFailed\": \"5%\"}', who: 'labels', labels: {pop: ['ams', 'fra']}}));")
PRESS = "[...document.querySelectorAll('button')].find(b => b.textContent === {!r}).click()".format
PICTURES = (
    Picture("dashboard", "#/releases"),
    Picture("dashboard-failed", "#/releases/14", height=1150),
    Picture("dashboard-new", "#/new", script=TYPED, height=1000),
    Picture("dashboard-rollback-dark", "#/releases/14", scheme="dark", script=PRESS("Roll back")),
    Picture("dashboard-running-dark", "#/releases/15", scheme="dark"),
    Picture("dashboard-nodes", "#/nodes?search=gru"),
    Picture("dashboard-node", "#/nodes/3"),
    Picture("dashboard-health", "#/health", height=800),
    Picture("dashboard-zh", "#/releases/14", language="zh", height=1150),
    Picture("dashboard-360", "#/releases", 360, 780),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Photograph the dashboard in Chromium, as PNG files.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs", metavar="FOLDER",
                        help="docs without one")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of pictures: dashboard-zh; without any: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        store = rc.Store(rc.Database(f"sqlite:///{work}/releasectl.db", rc.Metrics()))
        store.database.migrate()
        fill(store)
        api = rc.Api(store, rc.Metrics(), process=lambda: {
            "executor": {"enabled": True, "owner": "host-a:1:9f3a61c0", "lastLookAt": rc.utc_text(time.time())},
            "certificates": [
                {"name": name, "notAfter": rc.utc_text(time.time() + 86400 * days), "daysLeft": float(days),
                 "message": ""}
                for name, days in (("CONTROL_CERT", 210), ("CONTROL_CA", 900))]})
        server = rc.ApiServer(rc.Settings.load({"DATABASE_URL": f"sqlite:///{work}/releasectl.db",
                                                "HTTP_ADDR": "127.0.0.1:0", "MTLS_ENABLED": "0"}), api)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            with Browser(Path(work) / "chromium") as browser:
                for picture in PICTURES:
                    if not options.names or picture.name in options.names:
                        keep_alive(store)
                        take(browser, f"http://127.0.0.1:{server.server_address[1]}/", picture, options.folder)
                for error in browser.errors:
                    print(error, file=sys.stderr)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def keep_alive(store: rc.Store) -> None:
    """Let the executor that is made up have been seen just now."""
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE executors SET seen_at = ?", rc.utc_text(time.time()))
        tx.execute("UPDATE release_tasks SET claim_expires_at = ? WHERE claim_owner IS NOT NULL",
                   rc.utc_text(time.time() + 25))


def take(browser: Browser, url: str, picture: Picture, folder: Path) -> None:
    browser.look(picture.width, picture.height, picture.scheme, picture.media)
    browser.open(url + "#/health")
    browser.run(f"localStorage.setItem('releasectl-language', {picture.language!r}); sessionStorage.clear(); null")
    if picture.script.startswith("session"):
        browser.run(picture.script + "null")
    browser.open(url + picture.place)
    wait(browser, "document.querySelector('main h1') && !/Loading/.test(document.querySelector('main').textContent)")
    if picture.script and not picture.script.startswith("session"):
        browser.run(picture.script + "; null")
    time.sleep(1.5)  # plans come half a second after the last key
    file = folder / f"{picture.name}.png"
    browser.picture(file)
    file.write_bytes(with_palette(browser, file.read_bytes()))


# 256 colours: the most frequent ones, then one of each kind that is far from these; the rest as the nearest of them.
PALETTE = """(async () => {
  const bitmap = await createImageBitmap(await (await fetch('data:image/png;base64,' + PICTURE)).blob());
  const {width, height} = bitmap, context = new OffscreenCanvas(width, height).getContext('2d');
  context.drawImage(bitmap, 0, 0);
  const {data} = context.getImageData(0, 0, width, height), counts = new Map();
  const indexes = new Uint8Array(width * height);
  const colourAt = i => data[4 * i] << 16 | data[4 * i + 1] << 8 | data[4 * i + 2];
  for (let i = 0; i < indexes.length; i += 1) counts.set(colourAt(i), (counts.get(colourAt(i)) || 0) + 1);
  const common = [...counts].sort((a, b) => b[1] - a[1]).map(([colour]) => colour), kindOf = c => c & 0xe0e0e0;
  const palette = common.slice(0, 160), kinds = new Set(palette.map(kindOf));
  for (const c of common) if (palette.length < 256 && !kinds.has(kindOf(c))) palette.push(c), kinds.add(kindOf(c));
  const distance = (a, b) => [16, 8, 0].reduce((sum, bits) => sum + ((a >> bits & 255) - (b >> bits & 255)) ** 2, 0);
  const numbers = new Map(common.map(c => [c, palette.includes(c) ? palette.indexOf(c)
    : palette.reduce((best, one, i) => distance(one, c) < distance(palette[best], c) ? i : best, 0)]));
  let text = '';
  for (let i = 0; i < indexes.length; i += 1) text += String.fromCharCode(indexes[i] = numbers.get(colourAt(i)));
  return [width, height, palette, btoa(text)];
})()"""


def with_palette(browser: Browser, data: bytes) -> bytes:
    """Return a PNG with 256 colours: a third of its size."""
    browser.open("about:blank")
    width, height, palette, text = browser.run(PALETTE.replace("PICTURE", json.dumps(base64.b64encode(data).decode())))
    indexes = base64.b64decode(text)
    rows = b"".join(b"\0" + indexes[at:at + width] for at in range(0, len(indexes), width))
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            (b"PLTE", b"".join(colour.to_bytes(3, "big") for colour in palette)),
            (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")))


def wait(browser: Browser, condition: str) -> None:
    give_up_at = time.monotonic() + 20
    while not browser.run(f"Boolean({condition})"):
        if time.monotonic() > give_up_at:
            raise SystemExit(f"{condition} did not come: {browser.run('document.body.innerText')}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
