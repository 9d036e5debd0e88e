#!/usr/bin/env python3
"""Run the commands that the documents show, in their order, and look whether what they say comes.

    scripts/run_docs.py --throwaway-host FOLDER [DOCUMENT ...]

A block of a document (indented by four spaces) is a piece of a shell's session, which goes on through the document. It
must end with 0; `says "TEXT"` in a comment means that TEXT comes. A block behind the comment
`<!-- not run: WHY -->` is left out. It runs as root on a host that may be thrown away, as scripts/fresh_debian.sh makes
one, in a network of its own: stand-in agents listen at the addresses that the documents name, and stand-ins for
systemctl and journalctl are written into /usr/local/sbin. Nothing runs without --throwaway-host, nor in a network that
has routes: the agents' addresses would take those of the hosts behind them, the name server's perhaps.
"""
from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "README.zh-CN.md", "docs/OPERATIONS.md", "docs/UPGRADE.md", "docs/STRATEGIES.md",
             "docs/RUNBOOK.md", "docs/SECURITY.md", "docs/HIGH-AVAILABILITY.md")
AGENTS = ("10.0.0.7:8443", "10.0.0.8:9090,execute")
# What a document takes for granted, beside what the ones before it did.
BEFORE = {
    "README.zh-CN.md": "rm -rf certs site.json try.db*",
    "docs/UPGRADE.md": """
        mkdir old && tar -xzf releasectl-$version.tar.gz -C old && mv old/releasectl-$version releasectl-0.0.9
        sed -i 's/^__version__ = .*/__version__ = "0.0.9"/' releasectl-0.0.9/releasectl.py
        make -C releasectl-0.0.9 install && systemctl restart releasectl
        releasectl create --payload site.json --wait""",
    "docs/STRATEGIES.md": """
        systemctl stop releasectl
        echo '{"websites": []}' >site.json
        releasectl node set edge-1 --label region=eu --label rack=r1 --label role=canary
        releasectl node set edge-2 --label region=us --label rack=r2
        releasectl node add edge-fra-6 10.0.0.9 --label region=eu --label rack=r1
        releasectl node add edge-fra-7 10.0.0.10 --label region=eu --label rack=r2
        releasectl node list""",
    # those that were only queued until here
    "docs/RUNBOOK.md": """
        for id in $(releasectl list --status pending --page-size 100 --json |
            python3 -c 'import json, sys; print(*(one["id"] for one in json.load(sys.stdin)["items"]))'); do
            releasectl cancel "$id"
        done
        releasectl node set 'edge-fra-*' --disable
        systemctl start releasectl
        releasectl create --payload site.json --wait""",
}
SYSTEMCTL = """#!/bin/bash
# A stand-in: one service, which runs as its user and writes its log into a file.
set -eu
lives() { [[ -n $1 && -e /proc/$1/status ]] && ! grep -q '^State:.Z' "/proc/$1/status"; }
pid() { cat /run/releasectl.pid 2>/dev/null || true; }
stop() {
    running=$(pid)
    ! lives "$running" || kill "$running"
    while lives "$running"; do sleep 0.05; done
    rm -f /run/releasectl.pid
}
start() {
    lives "$(pid)" || {
        : >/var/log/releasectl
        command=$(sed -n 's/^ExecStart=//p' /usr/local/lib/systemd/system/releasectl.service)
        (cd /var/lib/releasectl && exec setsid setpriv --reuid releasectl --regid releasectl --init-groups $command \
            >>/var/log/releasectl 2>&1 </dev/null) &
        echo $! >/run/releasectl.pid
    }
    for _ in {1..600}; do grep -q serving /var/log/releasectl && break; sleep 0.1; done
}
words=(); for word; do [[ $word == -* ]] || words+=("$word"); done
case ${words[0]} in
    enable | start) start ;;
    stop) stop ;;
    restart) stop; start ;;
    status) lives "$(pid)" ;;
    *) ;;
esac
"""


class Block(NamedTuple):
    """A block of a document."""
    line: int
    text: str
    # Why it is not run, "" for one that is.
    left_out: str


def blocks(text: str) -> Iterator[Block]:
    """Yield the blocks of a document: what is indented by four spaces, below a line that is not."""
    lines, at = text.split("\n"), 0
    while at < len(lines):
        if not lines[at].startswith("    ") or (at and lines[at - 1].strip()):
            at += 1
            continue
        end = at
        while end < len(lines) and (lines[end].startswith("    ") or (
                not lines[end].strip() and lines[end + 1:end + 2] and lines[end + 1].startswith("    "))):
            end += 1
        above = at - 1
        while above > 0 and (not lines[above].strip() or lines[above].strip() == "<!-- grants -->"):
            above -= 1
        mark = re.match(r"\s*<!-- not run: (.+) -->", lines[above])
        yield Block(at + 1, "\n".join(line.strip("\n") for line in lines[at:end]), mark[1] if mark else "")
        at = end


def said(text: str) -> list[str]:
    """Return what a block says will come."""
    return re.findall(r'#.*?(?:\bsays|输出) "(.+?)"', text)


class Shell:
    """A session of bash."""

    def __init__(self, folder: Path):
        self._process = subprocess.Popen(["bash", "-s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder,
                                         stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def run(self, text: str) -> tuple[int, str]:
        """Run a text up to its first command that fails; return the exit code and what was printed."""
        assert self._process.stdin
        assert self._process.stdout
        # in this shell, as what it sets must stay; -e works in no function that is tested
        self._process.stdin.write(f"trap 'echo \"=== $?\"; exit' EXIT\nset -e\n{text}\n"
                                  "set +e; trap - EXIT; echo '=== 0'\n")
        self._process.stdin.flush()
        lines = []
        for line in self._process.stdout:
            if end := re.search(r"=== (\d+)$", line):
                return int(end[1]), "".join([*lines, line[:end.start()]])
            lines.append(line)
        return 1, "".join(lines)

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # and what it started beside it
        self._process.wait()


def set_up_network(addresses: list[str]) -> None:
    """Raise the loopback interface of this network and give it addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number, address in enumerate(["127.0.0.1", *addresses]):
            name = f"lo:{number}".encode() if number else b"lo"
            family = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(sock, 0x8916, struct.pack("16s", name) + family)  # SIOCSIFADDR
            fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", name, 0x1 | 0x40))  # SIOCSIFFLAGS: up, running


def start_agents(folder: Path) -> subprocess.Popen[str]:
    """Make the certificates and start stand-in agents at AGENTS, and at what the documents name beside them."""
    addresses = [one.partition(":")[0] for one in AGENTS]
    set_up_network(addresses)
    subprocess.run(["bash", ROOT / "scripts" / "make_certs.sh", folder / "made", ",".join(addresses)], check=True,
                   capture_output=True)
    for name in ("control.crt", "control.key", "ca.crt"):
        shutil.copy(folder / "made" / name, folder)
    listen = [word for one in AGENTS for word in ("--listen", one)]
    agents = subprocess.Popen([sys.executable, ROOT / "scripts" / "fake_agent.py", "--certs", folder / "made", *listen,
                               "--control", "127.0.0.1:8500"], stdout=subprocess.PIPE, text=True)
    assert agents.stdout
    if not agents.stdout.readline().startswith("ready"):
        raise SystemExit("run_docs: the agents did not start")
    return agents


def run_document(name: str, folder: Path) -> int:
    """Run the blocks of a document; return how many did not do what they say."""
    # documents of an unpacked archive are run there, all others where the archives lie
    here = ROOT if name.startswith("README") else folder
    shell, wrong = Shell(here), 0
    code, out = shell.run("version=0.1.0\n" + BEFORE.get(name, ""))
    if code:
        raise SystemExit(f"run_docs: what {name} takes for granted could not be made:\n{out}")
    for block in blocks((ROOT / name).read_text(encoding="utf-8")):
        if block.left_out:
            print(f"{name}:{block.line}: not run: {block.left_out}")
            continue
        began = time.monotonic()
        code, out = shell.run(block.text)
        missing = [text for text in said(block.text) if text not in out]
        verdict = "WRONG" if code or missing else "ok"
        print(f"{name}:{block.line}: {verdict} ({time.monotonic() - began:.1f} s)", flush=True)
        if code or missing:
            wrong += 1
            print(block.text, "--- exit code {}, not said: {}".format(code, missing or "-"), out, sep="\n")
        if code:
            shell.end()
            shell = Shell(here)
    shell.end()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the commands that the documents show.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what is said to lie there: archives, certificates")
    parser.add_argument("documents", nargs="*", choices=[*DOCUMENTS, []], metavar="DOCUMENT", help="without any: all")
    parser.add_argument("--throwaway-host", action="store_true", required=True,
                        help="this host is for that alone: services, users and files of it are overwritten")
    options = parser.parse_args()
    if Path("/proc/net/route").read_text().count("\n") > 1:  # the first line names the columns
        raise SystemExit("run_docs: this network has routes: run it in one of its own (unshare --net)")
    folder = options.folder.resolve()
    for name, text in (("systemctl", SYSTEMCTL), ("journalctl", "#!/bin/sh\ntail -n 20 /var/log/releasectl\n")):
        path = Path("/usr/local/sbin") / name
        path.write_text(text)
        path.chmod(0o755)
    Path("/var/log/releasectl").touch(mode=0o666)
    os.chmod("/var/log/releasectl", 0o666)
    agents = start_agents(folder)
    try:
        wrong = sum(run_document(name, folder) for name in options.documents or DOCUMENTS)
    finally:
        subprocess.run(["/usr/local/sbin/systemctl", "stop", "releasectl"], check=False)
        agents.kill()
        agents.wait()
    print(f"run_docs: {wrong} blocks do not do what they say" if wrong else "run_docs: every block does what it says")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
