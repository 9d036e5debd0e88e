"""What is copied to a host: `version`, the archive of `make dist`, and documents that name what there is."""
from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import run_docs
from conftest import leave_out
from lab import DRIVERS, PROGRAM, ROOT, run

import releasectl as rc

# -- version ----------------------------------------------------------------------------------

def test_version_names_the_file_by_its_own_sha256_and_what_it_runs_on(cli):
    found = cli.ok("version", "--json").json
    del found["postgresDriver"]
    assert found == {
        "version": rc.__version__, "sha256": hashlib.sha256(Path(PROGRAM).read_bytes()).hexdigest(),
        "schema": len(rc.schema_steps()), "python": sys.version.split()[0], "sqlite": sqlite3.sqlite_version,
        "openssl": rc.ssl.OPENSSL_VERSION}
    text = cli.ok("version").out
    assert text.startswith(f"releasectl {rc.__version__}\nsha256 ")


def test_version_names_the_postgresql_driver(cli):
    if not DRIVERS:
        leave_out("a PostgreSQL driver (psycopg, psycopg2 or pg8000)")
    for name in DRIVERS:
        cli.settings["RELEASECTL_PG_DRIVER"] = name
        assert cli.ok("version", "--json").json["postgresDriver"].startswith(f"{name} ")


def test_version_and_completion_work_with_settings_that_can_not_be_used(quick):
    quick.settings.update(AGENT_RETRIES="many", DATABASE_URL="nonsense")
    quick.ok("version")
    quick.ok("completion", "bash")
    quick.refused(rc.EXIT_USAGE, "list")

# -- the archive ------------------------------------------------------------------------------

def make_archive(folder: Path, umask: int) -> Path:
    """Make the archive out of a copy of this tree, as somebody else would; return it."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "dist", "__pycache__", ".*_cache"))
    environment = {"PATH": os.environ["PATH"], "SOURCE_DATE_EPOCH": "1790000000"}
    run("bash", "-c", f"umask {umask:o}; exec bash scripts/dist.sh", cwd=tree, env=environment)
    run("sha256sum", "-c", "SHA256SUMS", cwd=tree / "dist")
    return tree / "dist" / f"releasectl-{rc.__version__}.tar.gz"


def test_the_archive_is_the_same_whoever_makes_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = make_archive(tmp_path / "a", 0o022), make_archive(tmp_path / "b", 0o077)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == sorted((m.name for m in members), key=lambda n: n.split("/"))
    assert {(m.uid, m.gid, m.mtime) for m in members} == {(0, 0, 1790000000)}
    assert {m.mode for m in members} == {0o755, 0o644}


def test_the_archive_holds_all_that_it_needs_and_nothing_is_missing_in_its_docs(tmp_path):
    run("tar", "-xzf", make_archive(tmp_path, 0o022), cwd=tmp_path)
    folder = tmp_path / f"releasectl-{rc.__version__}"
    run("sha256sum", "-c", "--quiet", "SHA256SUMS", cwd=folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"releasectl.py", "schema.sql", "dashboard.html", "Makefile", "LICENSE", "README.md", "README.zh-CN.md",
            "docs/releasectl.1", "docs/systemd/releasectl.service", "scripts/demo.sh", "scripts/lab.sh"} <= found
    clean = {"PATH": os.environ["PATH"]}
    version = run(sys.executable, "-I", folder / "releasectl.py", "version", cwd=tmp_path, env=clean)
    assert hashlib.sha256(Path(PROGRAM).read_bytes()).hexdigest() in version
    for page in folder.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(folder)} links to {link}"

# -- the documents ----------------------------------------------------------------------------

def headings(path: Path) -> list[str]:
    return [line.strip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]


def test_the_runbook_tells_what_to_do_for_every_error_kind_and_every_alert():
    text = (ROOT / "docs" / "RUNBOOK.md").read_text(encoding="utf-8")
    assert [kind for kind in rc.ERROR_KINDS if f"\n| `{kind}` | " not in text] == []
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "docs" / "alerts.yml").read_text(encoding="utf-8"))
    assert len(alerts) > 5
    assert set(alerts) <= {name for line in headings(ROOT / "docs" / "RUNBOOK.md") for name in line.split(", ")}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_names_every_command_in_both_languages(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [c.name for c in rc.COMMANDS if f"`{c.name}" not in text] == []


def test_the_chinese_readme_has_the_sections_the_commands_and_the_links_of_the_english_one():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))

    def links(text: str) -> list[str]:
        return sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh-CN.md"})

    def first_cells(text: str) -> list[str]:
        return [line.split(" | ")[0].replace("、", ", ") for line in text.splitlines() if line.startswith("| `")]

    assert links(chinese) == links(english)
    assert first_cells(chinese) == first_cells(english)
    assert len(headings(ROOT / "README.md")) == len(headings(ROOT / "README.zh-CN.md"))


@pytest.mark.parametrize("name", run_docs.DOCUMENTS)
def test_every_block_of_a_document_is_run_or_says_why_not(name):
    found = list(run_docs.blocks((ROOT / name).read_text(encoding="utf-8")))
    assert found
    for block in found:
        if not block.left_out:  # scripts/fresh_debian.sh runs it; here, that it can be pasted into a shell
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            notes = [line for line in block.text.splitlines() if re.search(r"\S {3,}[^#\s&|\\]", line)]
            assert not notes, f"{name}:{block.line}: a note that is no comment: {notes}"


def test_the_documents_are_run_in_a_network_of_their_own_alone(monkeypatch, tmp_path):
    # an agent's address on the loopback interface once took the way to the name server
    monkeypatch.setattr(sys, "argv", ["run_docs.py", "--throwaway-host", str(tmp_path)])
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Iface Destination\neth0 00000000\n")
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: pytest.fail(f"{path} is written"))
    with pytest.raises(SystemExit, match="this network has routes"):
        run_docs.main()


def test_the_documents_name_the_version_that_they_are_of():
    named = {version for name in run_docs.DOCUMENTS
             for version in re.findall(r"\bversion=([0-9.]+)", (ROOT / name).read_text(encoding="utf-8"))}
    assert named == {rc.__version__}
