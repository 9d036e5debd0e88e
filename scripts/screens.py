#!/usr/bin/env python3
"""Draw what commands show in a terminal as SVG for the docs, from a database that is made up: `make screens`."""
from __future__ import annotations

import html
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import releasectl as rc  # noqa: E402

COLUMNS, LINES = 104, 30
CELL, LINE_HEIGHT, MARGIN, TOP = 8.4, 20, 20, 52
# The colours of releasectl, on a dark ground.
COLOURS = {"32": "#a6e3a1", "31": "#f38ba8", "36": "#89dceb", "33": "#f9e2af", "90": "#7f849c"}
PLAIN = "#cdd6f4"
ERRORS = ("no space left on device: /etc/nginx/sites.new", "nginx: [emerg] duplicate listen options for [::]:443")


def fill(store: rc.Store) -> None:
    """Write a fleet of 60 nodes and 28 releases, the last of which goes out and has met two failures."""
    now_s = time.time()
    for number in range(60):
        name = f"edge-{number + 1}" if number % 9 else f"边缘-上海-{number // 9 + 1:02d}"
        store.nodes.add(name, f"10.0.0.{number + 1}", labels='{"region":"ap"}')
    for number in range(28):
        request = rc.ReleaseRequest(target="cdn", reason=("weekly", "证书更新", "hotfix 4711")[number % 3],
                                    strategy={"batches": [1, 6, 24], "maxFailed": "10%"})
        release = store.releases.create(request, rc.PROGRAM).release
        age_s = (27 - number) * 86400 + 300
        set_release(store, release.id, "success", "60 nodes succeeded", now_s - age_s, now_s - age_s + 190)
    set_release(store, 24, "failed", "stopped by node edge-12 in batch 2: connection refused", now_s - 4 * 86400,
                now_s - 4 * 86400 + 9)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET success_nodes = 1, failed_nodes = 1 WHERE id = 24")
    set_release(store, 28, "running", "batch 3 of 4: waiting for 7 of 24 nodes, slowest edge-25 for 4 s of 600 s",
                now_s - 71, None)
    with store.database.transaction(write=True) as tx:
        nodes = tx.rows("SELECT node_id FROM release_task_nodes WHERE release_task_id = 28 ORDER BY batch, node_id")
        tx.execute("UPDATE release_task_nodes SET status = 'success', attempts = 1 WHERE release_task_id <> 24")
        tx.execute("UPDATE release_task_nodes SET status = 'pending' WHERE release_task_id = 28")
        for place, (node_id,) in enumerate(nodes[:31]):
            status = "failed" if place in (15, 22) else "running" if place > 23 else "success"
            error = ERRORS[place // 20] if status == "failed" else ""
            tx.execute("UPDATE release_task_nodes SET status = ?, attempts = 1, error_kind = ?, error_msg = ?, "
                       "started_at = ?, finished_at = ? WHERE release_task_id = 28 AND node_id = ?", status,
                       "agent_failed" if error else "", error, rc.utc_text(now_s - 30),
                       None if status == "running" else rc.utc_text(now_s - 25 + place % 9), node_id)
        tx.execute("UPDATE release_tasks SET success_nodes = 22, failed_nodes = 2, claim_owner = 'edge-host:1', "
                   "claim_expires_at = ? WHERE id = 28", rc.utc_text(now_s + 60))


def set_release(store: rc.Store, release_id: int, status: str, reason: str, began_s: float, ended_s: float | None
                ) -> None:
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = ?, status_reason = ?, created_at = ?, started_at = ?, "
                   "finished_at = ?, success_nodes = total_nodes WHERE id = ?", status, reason,
                   rc.utc_text(began_s - 1), rc.utc_text(began_s), ended_s and rc.utc_text(ended_s), release_id)


def svg(title: str, text: str) -> str:
    """Return a picture of a terminal that shows a text with colours."""
    lines = text.splitlines()
    width = MARGIN * 2 + max(rc.columns_of(re.sub(r"\x1b\[\d+m", "", line)) for line in lines) * CELL
    height = TOP + LINE_HEIGHT * len(lines)
    rows = "\n".join(f'  <text y="{TOP + LINE_HEIGHT * number}">{"".join(spans(line))}</text>'
                     for number, line in enumerate(lines))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
            f'viewBox="0 0 {width:.0f} {height}" role="img" aria-label="{html.escape(title)}">\n'
            '<rect width="100%" height="100%" rx="8" fill="#1e1e2e"/>\n'
            '<g fill="#45475a"><circle cx="20" cy="18" r="6"/><circle cx="40" cy="18" r="6"/>'
            '<circle cx="60" cy="18" r="6"/></g>\n'
            "<g font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"14\" "
            f'fill="{PLAIN}" style="white-space: pre">\n{rows}\n</g>\n</svg>\n')


def spans(line: str) -> list[str]:
    """Return the parts of a line that have one colour, each as wide as a terminal would show it."""
    found, column, colour = [], 0, ""
    for part in re.split(r"(\x1b\[\d+m| {2,})", line):
        if part.startswith("\x1b"):
            colour = COLOURS.get(part[2:-1], "")
        elif part.strip():
            fill_it = f' fill="{colour}"' if colour else ""
            found.append(f'<tspan x="{MARGIN + column * CELL:.1f}" textLength="{rc.columns_of(part) * CELL:.1f}" '
                         f'lengthAdjust="spacingAndGlyphs"{fill_it}>{html.escape(part)}</tspan>')
        if not part.startswith("\x1b"):
            column += rc.columns_of(part)
    return found


class Terminal(io.StringIO):
    """What watch draws on."""

    def isatty(self) -> bool:
        return True


def main() -> None:
    os.environ.update(COLUMNS=str(COLUMNS), LINES=str(LINES), TERM="xterm", NO_COLOR="")
    with tempfile.TemporaryDirectory() as folder:
        store = rc.Store(rc.Database(f"sqlite:///{folder}/releasectl.db", rc.Metrics()))
        store.database.migrate()
        fill(store)
        display, screen = rc.Display(COLUMNS, LINES, True, True), Terminal()
        rc.Screen(screen).show(store.releases.progress(28))
        pictures = {
            "watch": re.sub(r"\r\x1b\[K|\x1b\[J", "", screen.getvalue()),
            "status": rc.status_text(store.releases.progress(28), store.releases.with_nodes(28)[1], display),
            "list": rc.list_text(store.releases.page(size=8), display)}
        for name, text in pictures.items():
            typed = f"releasectl {name}" + (" 28" if name == "status" else "")
            (ROOT / "docs" / f"{name}.svg").write_text(svg(typed, f"$ {typed}\n{text}"), encoding="utf-8")


if __name__ == "__main__":
    main()
