"""torture: kills, suspends and cuts off real releasectl processes, then checks that nothing was lost.

    python scripts/torture --kills 200 --suspends 40                 on SQLite
    python scripts/torture --engine postgresql --kills 1000          on a throwaway PostgreSQL server
    python scripts/torture --db postgresql://me@host/ --seed 7       on a server that is there (not restarted)
    python scripts/torture child commit:unanswered:2 run-once        one process with an injection, by hand

Three phases, on releases that real `serve` and `run-once` processes drive and stand-in agents
run (scripts/fake_agent.py):

  points   every named point, once for each moment: the process kills or suspends itself
           before a commit or request, after it, or when it took place and nobody knows yet
  faults   the database call number N fails, for every N of a small release and every kind of fault
  random   kills, suspensions, lost answers, restarts of agents, while releases of several targets
           go out to shared nodes without end; on PostgreSQL also cut connections, restarts of the
           server, and failovers to a standby that lacks the last commits

Then it compares the tables with what the agents really were sent and ran, and with the notifications
that a receiver got (it answers 500 now and then), prints figures, and
exits with 1 when a figure that must be zero is not; the folder with the evidence is named then.
The seed settles what is tried and when, not how the machine schedules it.

releasectl.py and schema.sql are copied first, so that nobody's editing disturbs a run;
LAB_PROGRAM names another folder to take them from.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from . import laboratory
from .chaos import CLAIM_TTL_S, Amounts, Chaos
from .databases import driver_knows_many_hosts
from .figures import Figures
from .fork_server import serve_forks
from .injections import FAULTS, WHENS
from .injector import run_injected
from .laboratory import Laboratory
from .trials import plan_faults, run_points, run_trials


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torture", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="moments:\n" + "\n".join(f"  {when:<16} {text}" for when, text in WHENS.items())
               + f"\nfaults: {', '.join(sorted({kind for kinds in FAULTS.values() for kind in kinds}))}")
    parser.add_argument("--db", metavar="URL", default="", help="sqlite:///FOLDER/ANY or a PostgreSQL server")
    parser.add_argument("--engine", choices=("sqlite", "postgresql"), help="a database of its own (sqlite)")
    parser.add_argument("--seed", type=int, default=None, help="settles what is tried (from the clock)")
    parser.add_argument("--phases", default="points,faults,random", help="which of points,faults,random")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="SIGKILLs of the random phase (100)")
    parser.add_argument("--suspends", type=int, default=20, metavar="N", help="SIGSTOPs of the random phase (20)")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="of the PostgreSQL server (3)")
    parser.add_argument("--failovers", type=int, default=None, metavar="N",
                        help="to a standby that lacks commits (2 on a PostgreSQL server of its own, else 0)")
    parser.add_argument("--strict", action="store_true",
                        help="what nobody can know after a failover must be zero too")
    parser.add_argument("--depth", type=int, default=6, metavar="N",
                        help="passings of each point; 1: one of them by lot (6)")
    parser.add_argument("--whens", default=",".join(WHENS), help="which moments of the points (all)")
    parser.add_argument("--faults", type=int, default=0, metavar="N", help="trials of faults at most (0: all)")
    parser.add_argument("--every-kind", action="store_true", help="every kind of fault at every call, not one by lot")
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="MAX", help="begin nothing after that (3600)")
    parser.add_argument("--nodes", type=int, default=12, metavar="N", help="of the random phase (12)")
    parser.add_argument("--at-once", type=int, default=16, metavar="N", help="trials at a time (16)")
    parser.add_argument("--tls", action="store_true", help="mutual TLS to the agents (plain HTTP)")
    parser.add_argument("--verbose", action="store_true", help="say when each trial is done")
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON document")
    options = parser.parse_args(arguments)
    engine = "postgresql" if options.db.startswith("postgresql:") else "sqlite" if options.db else options.engine
    options.engine = engine or "sqlite"
    may_fail_over = options.engine == "postgresql" and not options.db and driver_knows_many_hosts()
    if options.failovers is None:
        options.failovers = 2 if may_fail_over else 0
    if options.failovers and not may_fail_over:
        parser.error("--failovers: only on a PostgreSQL server of its own, by psycopg or psycopg2")
    if not set(options.whens.split(",")) <= set(WHENS):
        parser.error(f"--whens: known are {','.join(WHENS)}")
    return options


def run_phases(lab: Laboratory, options: argparse.Namespace) -> None:
    """Run the phases that were asked for, one after the other."""
    ends_at = lab.figures.started_at + options.seconds
    phases: dict[str, Callable[[], None]] = {
        "points": lambda: run_points(lab, options.depth, options.whens.split(","), options.at_once, ends_at),
        "faults": lambda: run_trials(lab, plan_faults(lab, options.every_kind, options.faults), options.at_once,
                                     ends_at),
        "random": lambda: Chaos(lab, Amounts(options.kills, options.suspends, options.restarts, options.failovers,
                                             ends_at - time.monotonic(), options.nodes)).run(),
    }
    for name in filter(None, options.phases.split(",")):
        began = time.monotonic()
        phases[name]()
        lab.figures.phases[name] = time.monotonic() - began


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["child"]:
        return run_injected(arguments[1], arguments[2:])
    if arguments == ["fork-server"]:
        return serve_forks()
    options = parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO if options.verbose else logging.WARNING)
    logging.getLogger("releasectl").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="releasectl-torture."))
    seed = options.seed if options.seed is not None else time.time_ns() % 10**6
    figures = Figures(options.engine, seed, CLAIM_TTL_S, options.strict)
    lab: Laboratory | None = None
    try:
        lab = laboratory.set_up(folder, figures, options.db, options.nodes if options.tls else 0)
        run_phases(lab, options)
    finally:
        if lab is not None:
            lab.close()
    is_bad = any(figures.zeros().values())
    (folder / "figures.json").write_text(json.dumps(figures.document(), indent=1))
    print(json.dumps(figures.document()) if options.json else figures.table(), flush=True)
    if is_bad or options.keep:
        print(f"evidence: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return int(is_bad)
