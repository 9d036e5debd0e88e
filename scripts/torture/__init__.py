"""torture: kill, suspend and cut off real releasectl processes, and check that nothing was lost.

`python scripts/torture --help` says what it does. The modules, each of which uses only those above it:

    injections     what a process does to itself, and when: POINT:WHEN:HIT
    injector       how it does that, inside the process, around a releasectl.py that knows nothing of it
    fork_server    the process that forks others, and its client
    workers        releasectl processes: start, signal, wait, end
    databases      SQLite files; a PostgreSQL server with a standby
    agents         stand-in agents, and a record of what each was sent and ran
    figures        what was counted and found; which figures must be zero
    tables         reads the tables, and checks them against the contract (tests/contract.py)
    agent_checks   checks the tables against what the agents were sent and ran
    receivers      a receiver of notifications, and whether it was told all
    claim_trail    the database's own record of who wrote under whose claim
    laboratory     what every phase works with
    scenarios      which command passes which point, and on what
    trials         the phases "points" and "faults": one small release, one injection
    take_overs     how long a claim stays without an owner that lives
    operators      an operator who creates, pauses, resumes and cancels releases
    failovers      a standby that lags and is promoted
    chaos          the phase "random"
    command_line   options, and what runs when
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))

import lab  # noqa: E402, F401 - with it releasectl and fake_agent are found as well
