"""Killed anywhere, by anyone: short runs of scripts/torture, real processes on both engines.

On PostgreSQL a standby that lacks the last commits takes over as well.
TEST_LONG=1 makes the long ones: at least 1,000 kills and 200 suspensions on each engine.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import leave_out
from lab import DRIVERS, ROOT

TORTURE = str(ROOT / "scripts" / "torture")
IS_LONG = os.environ.get("TEST_LONG") == "1"

pytestmark = pytest.mark.slow


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request):
    """The arguments for a run on each engine; the server is one of torture's own, to be restarted."""
    if request.param == "postgresql":
        if not DRIVERS:
            leave_out("a PostgreSQL driver (psycopg, psycopg2 or pg8000)")
        request.getfixturevalue("postgres_server")  # leaves the test out where there is no server
    return ["--engine", request.param]


def torture(*arguments: str, limit_s: float = 300.0) -> dict:
    """Run it and return its figures; fail when one that must be zero is not."""
    command = [sys.executable, TORTURE, "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends what it started
            output, errors = process.communicate(timeout=60)
            pytest.fail(f"torture was not done within {limit_s} s: {errors[-3000:]}")
    assert process.returncode == 0, f"{output[-6000:]}\n{errors[-3000:]}"
    figures = json.loads(output)
    assert set(figures["zeros"].values()) == {0}
    return figures


def test_rule_9_a_process_that_dies_at_any_named_point_loses_nothing(engine):
    whens = ["before", "after", "unanswered", "lost"]
    figures = torture(*engine, "--phases", "points", "--whens", ",".join(whens), "--depth", "1", "--seed", "9")
    for name in ("claims.claim", "claims.commit", "claims.renew", "claims.drop", "releases.create", "releases.act",
                 "dispatch", "query"):
        assert set(figures["points"][name]) == set(whens)


def test_rule_9_a_database_call_that_fails_loses_nothing(engine):
    figures = torture(*engine, "--phases", "faults", "--faults", "40", "--seed", "9")
    assert sum(figures["faults"].values()) >= 30


def test_rule_9_kills_and_suspensions_at_random_moments_lose_nothing(engine):
    figures = torture(*engine, "--phases", "random", "--kills", "25", "--suspends", "6", "--restarts", "1",
                      "--failovers", "0", "--seed", "9")
    assert figures["counts"]["kills"] >= 25
    assert figures["counts"]["take-overs"] > 0


def test_a_failover_that_loses_commits_makes_no_success_untrue(request):
    if not {"psycopg", "psycopg2"} & set(DRIVERS):
        leave_out("a PostgreSQL driver that knows several hosts (psycopg or psycopg2)")
    request.getfixturevalue("postgres_server")  # leaves the test out where there is no server
    counts = torture("--engine", "postgresql", "--phases", "random", "--kills", "12", "--suspends", "3",
                     "--restarts", "0", "--failovers", "1", "--seed", "9")["counts"]
    assert counts["failovers"] == 1
    assert counts["release_tasks lost by failovers"] >= 1
    assert counts["release_events lost by failovers"] >= 2


@pytest.mark.skipif(not IS_LONG, reason="TEST_LONG=1: a quarter of an hour on each engine")
def test_rule_9_a_thousand_kills_and_two_hundred_suspensions_lose_nothing(engine):
    figures = torture(*engine, "--kills", "1000", "--suspends", "200", "--every-kind", limit_s=3600)
    assert figures["counts"]["kills"] >= 1000
    assert figures["counts"]["suspensions"] >= 200
    print(json.dumps(figures, indent=1))
