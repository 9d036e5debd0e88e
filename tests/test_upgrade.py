"""Old and new on one database at once: the commit before, and a schema that is newer (docs/UPGRADE.md)."""
from __future__ import annotations

import contextlib
import py_compile
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from lab import ROOT, Cli, eventually, free_port, mtls, serve_process, statuses

import releasectl as rc

PROGRAM = ("releasectl.py", "schema.sql", "dashboard.html")


def git(*words: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True).stdout


class Copy(Cli):
    """A command line of another copy of the program."""

    def __init__(self, folder: Path, program: Path, like: Cli):
        super().__init__(folder)
        self.compiled = str(program)
        py_compile.compile(f"{program}/releasectl.py", doraise=True)
        self.port = free_port()
        self.settings = {**like.settings, "HTTP_ADDR": f"127.0.0.1:{self.port}"}


@pytest.fixture
def fleet(cli, world):
    """A command line over four slow agents, on both engines."""
    world.nodes(4, task_ms=300)
    cli.world, cli.port = world, free_port()
    cli.settings.update(mtls(world.certs), DATABASE_URL=world.url, HTTP_ADDR=f"127.0.0.1:{cli.port}",
                        CLAIM_TTL_SEC="2")
    return cli


@pytest.fixture
def old(fleet, tmp_path):
    """The program as it was before the last commit that changed it, or, in a changed tree, as it is committed."""
    try:
        changed = git("status", "--porcelain", "--", *PROGRAM[:2]).strip()
        commits = git("log", "-2", "--format=%H", "--", *PROGRAM[:2]).decode().split()
        commit = commits[0 if changed else 1]
        files = {name: git("show", f"{commit}:{name}") for name in PROGRAM}
    except (OSError, subprocess.CalledProcessError, IndexError):
        pytest.skip("left out: git, and the commit before this one")
    folder = tmp_path / "old"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Copy(tmp_path, folder, fleet)


@pytest.fixture
def newer(fleet, tmp_path):
    """A copy of this program with one more step in its schema."""
    folder = tmp_path / "newer"
    folder.mkdir()
    for name in PROGRAM:
        shutil.copy(ROOT / name, folder)
    step = len(rc.schema_steps()) + 1
    with open(folder / "schema.sql", "a") as schema:
        schema.write(f"\n-- step {step}: of a test\n\nCREATE TABLE later_step (id INTEGER);\n\n"
                     f"INSERT INTO schema_version (version) VALUES ({step});\n")
    return Copy(tmp_path, folder, fleet)


@pytest.mark.slow
def test_two_processes_of_two_versions_share_the_releases_of_one_database(fleet, old):
    if len(rc.schema_steps()) != len(re.findall(r"(?m)^-- step ", (Path(old.compiled) / "schema.sql").read_text())):
        pytest.skip("the last commit has another schema: both can't work at once, and the next test shows that")
    programs = {"new": fleet, "old": old}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(serve_process(program)) for program in programs.values()]
        for number in range(8):  # two nodes a release, so that two of them can go at once
            names = ("edge-1", "edge-2") if number % 2 else ("edge-3", "edge-4")
            programs["old" if number < 4 else "new"].ok(
                "create", "--target", f"t{number % 2}", "--node", names[0], "--node", names[1], "--batches", "100%")
        eventually(lambda: [r.status for r in fleet.world.store.releases.page(size=100).items] == [rc.SUCCESS] * 8)
        for process in processes:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert fleet.world.runs() == [4, 4, 4, 4]  # no task ran twice
    assert fleet.ok("audit", "--verify")


@pytest.mark.slow
def test_a_process_writes_nothing_once_another_has_brought_a_newer_schema_and_its_release_goes_on_there(fleet, newer):
    fleet.world.fleet.set(task_ms=3_600_000)
    fleet.ok("create", "--batches", "100%")
    process = fleet.start("serve")
    try:
        eventually(lambda: set(statuses(fleet.world.store, 1)) == {rc.RUNNING})
        newer.ok("migrate")
        assert "newer than this program's" in fleet.refused(rc.EXIT_UNAVAILABLE, "list")
        events = len(newer.ok("events", "1", "--after", "0", "--json").json["items"])
        fleet.world.finish()
        # busy until the claim of the process that may write no more has lapsed
        eventually(lambda: newer("run-once", "--drain").code == rc.EXIT_DONE)
        release = newer.ok("status", "1", "--json").json["release"]
        assert (release["status"], release["successNodes"]) == (rc.SUCCESS, 4)
        taken = newer.ok("events", "1", "--after", "0", "--json").json["items"][events:]
        assert not [event for event in taken if f":{process.pid}:" in event["actor"]]
        assert fleet.world.runs() == [1, 1, 1, 1]
    finally:
        process.send_signal(signal.SIGTERM)
        result = fleet.end(process)
    assert "newer than this program's" in result.err
    assert fleet("serve").code == rc.EXIT_UNAVAILABLE
