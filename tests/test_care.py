"""Care: backup, prune, version, completion, the man page, the archive (issue 8, point 5)."""
from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import select
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, add_nodes, eventually, leave_out, new_release, statuses
from test_cli import AS_OTHERS, PROGRAM, Cli, Quick

import releasectl as rc

DAY_S = 86400.0


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


@pytest.fixture
def quick(tmp_path):
    return Quick(tmp_path)


def run(*command: object, **more) -> str:
    """Runs a program that must succeed; gives what it printed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=300,
                          **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- backup ------------------------------------------------------------------------------------

def look(path: Path, statement: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(statement).fetchall()


@pytest.fixture
def filled(cli, open_store):
    """A command line over a database with a release in it."""
    cli.store = open_store(f"sqlite:///{cli.folder}/releasectl.db")
    add_nodes(cli.store, 2)
    new_release(cli.store, reason="kept")
    return cli


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_backup_is_one_whole_file_that_only_its_owner_may_read(filled):
    target = filled.folder / "copies"
    target.mkdir()
    # while others hold the database open, with pages in its -wal file
    document = filled.ok("backup", "copies/monday.db", "--json").json
    assert document == {"file": "copies/monday.db", "bytes": (target / "monday.db").stat().st_size,
                        "schema": len(rc.schema_steps())}
    assert stat.S_IMODE((target / "monday.db").stat().st_mode) == 0o600
    assert look(target / "monday.db", "SELECT reason FROM release_tasks") == [("kept",)]
    assert look(target / "monday.db", "PRAGMA journal_mode") == [("delete",)]
    assert files(target) == {"monday.db"}
    filled.settings["DATABASE_URL"] = "sqlite:///copies/monday.db"
    assert filled.ok("list", "--json").json["total"] == 1


def test_a_backup_is_of_one_moment_while_others_write(filled):
    """Each release is written with its nodes in one transaction: a torn copy would hold one without them."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            new_release(filled.store)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            filled.store.database.backup(str(filled.folder / f"copy-{number}.db"))
    finally:
        stop.set()
        writer.join()
    counts = [look(filled.folder / f"copy-{number}.db", """
        SELECT (SELECT COUNT(*) FROM release_tasks), (SELECT COUNT(*) FROM release_task_nodes),
               (SELECT COUNT(*) FROM release_events)""")[0] for number in range(5)]
    assert all(nodes == 2 * releases and events == releases for releases, nodes, events in counts)
    assert counts[-1] > counts[0]


def test_a_backup_refuses_a_file_that_exists(filled):
    path = filled.file("mine.db", "precious")
    assert filled.refused(rc.EXIT_STATE, "backup", path) == f"releasectl: {path} exists already: name another file"
    os.symlink("nowhere", filled.folder / "link.db")
    assert "exists already" in filled.refused(rc.EXIT_STATE, "backup", "link.db")
    assert Path(path).read_text() == "precious"


@pytest.mark.parametrize(("database", "said"), [
    (None, "does not exist: make it with"), ("no database at all", "is not an SQLite file")])
def test_a_backup_of_nothing_leaves_nothing(cli, database, said):
    if database:
        cli.file("releasectl.db", database)
    before = files(cli.folder)
    assert said in cli.refused(rc.EXIT_UNAVAILABLE, "backup", "copy.db")
    assert files(cli.folder) == before


def test_a_backup_that_is_not_sound_leaves_nothing(filled):
    for number in range(40):
        new_release(filled.store, reason=f"{number} " * 100)
    filled.store.database.close()
    path = filled.folder / "releasectl.db"
    size = look(path, "PRAGMA page_size")[0][0]
    root = look(path, "SELECT rootpage FROM sqlite_master WHERE name = 'release_tasks_by_status'")[0][0]
    with open(path, "r+b") as file:
        file.seek(root * size - 200)
        file.write(b"\xff" * 200)
    assert "could not be copied to copy.db" in filled.refused(rc.EXIT_UNAVAILABLE, "backup", "copy.db")
    assert files(filled.folder) == {"releasectl.db"}


def test_a_backup_into_a_place_that_takes_none_is_told_in_one_line(filled):
    assert "no/copy.db: no such file or directory" in filled.refused(rc.EXIT_UNAVAILABLE, "backup", "no/copy.db")
    if not shutil.which("setpriv"):
        leave_out("setpriv")
    (filled.folder / "closed").mkdir(mode=0o500)
    filled.prefix = AS_OTHERS if os.getuid() == 0 else ()
    assert "permission denied" in filled.refused(rc.EXIT_UNAVAILABLE, "backup", "closed/copy.db")


def test_a_backup_of_an_older_schema_is_made_before_the_migration(cli):
    with contextlib.closing(sqlite3.connect(cli.folder / "releasectl.db")) as old:
        for statement in rc.schema_steps()[0]:
            old.execute(statement)
        old.commit()
    assert cli.ok("backup", "before.db", "--json").json["schema"] == 1


def test_on_postgresql_backup_names_pg_dump(cli, new_postgres_url):
    cli.settings["DATABASE_URL"] = new_postgres_url()
    assert cli.refused(rc.EXIT_USAGE, "backup", "copy.db") == (
        'releasectl: backup is for SQLite; on PostgreSQL take pg_dump -Fc -f FILE "$DATABASE_URL"')


# -- prune -------------------------------------------------------------------------------------

class Past:
    """Releases in a store that ended some days ago."""

    def __init__(self, store: rc.Store):
        self.store = store
        add_nodes(store, 2)

    def release(self, status: str, days_ago: float, **fields) -> int:
        """Makes a release that ended so; gives its id. With retry_of or rollback_of it is linked."""
        made = new_release(self.store, **fields)
        at = rc.utc_text(time.time() - days_ago * DAY_S)
        with self.store.database.transaction(write=True) as tx:
            tx.execute("UPDATE release_tasks SET status = ?, finished_at = ?, updated_at = ? WHERE id = ?", status,
                       at if status in rc.TERMINAL else None, at, made.id)
            if status in (rc.SUCCESS, rc.FAILED):
                tx.execute("UPDATE release_task_nodes SET status = ? WHERE release_task_id = ?", status, made.id)
        return made.id

    def many(self, *what: tuple[str, float]) -> list[int]:
        return [self.release(status, days) for status, days in what]

    def ids(self) -> list[int]:
        return sorted(r.id for r in self.store.releases.page(size=100).items)

    def prune(self, older_than_days: float = 90, keep: int = 1) -> list[int]:
        """Deletes what prune would, in one go; gives the ids that are left."""
        found = [r.id for r in self.store.releases.old(older_than_days * DAY_S, keep)]
        assert found == sorted(found, reverse=True)
        assert self.store.releases.delete(found) == found[::-1]
        return self.ids()


@pytest.fixture
def past(store):
    return Past(store)


def test_prune_keeps_the_newest_and_the_success_before_them(past):
    past.many(("success", 200), ("success", 199), ("failed", 198), ("failed", 197), ("failed", 196))
    assert past.prune(keep=2) == [2, 4, 5]


def test_prune_never_deletes_the_last_success_though_it_is_old(past):
    past.release("success", 500, payload={"site": "good"})
    past.many(*[("failed", 400)] * 5)
    assert past.prune(keep=1) == [1, 6]
    assert rc.parse_json(past.store.releases.rollback(6, "test")[0].payload)["site"] == "good"


def test_a_rollback_of_whatever_stays_has_what_it_had_before(past):
    for number, days in enumerate((400, 300, 200, 50, 10)):
        past.release("success", days, payload={"site": number})
    assert past.prune(keep=1) == [3, 4, 5]  # 4 and 5 are not older, 3 is what a rollback of 4 brings back
    assert rc.parse_json(past.store.releases.rollback(4, "test", rc.Again(over_newer=True))[0].payload)["site"] == 2


@pytest.mark.parametrize("status", ["pending", "running", "paused", "cancelling"])
def test_prune_never_deletes_what_is_not_at_its_end(past, status):
    past.many(("failed", 400), (status, 400), ("failed", 400))
    assert past.prune() == [2, 3]


def test_prune_counts_each_target_for_itself(past):
    for target in ("cdn", "dns", "cdn", "dns", "cdn"):
        past.release("failed", 400, target=target)
    assert past.prune() == [4, 5]


def test_prune_keeps_what_a_release_that_stays_is_linked_to(past):
    first = past.release("failed", 400)
    again = past.release("failed", 400, retry_of=first)
    past.release("failed", 400)
    past.release("failed", 1, rollback_of=again)
    assert past.prune() == [1, 2, 4]


def test_prune_deletes_both_ends_of_a_link_that_nobody_needs(past):
    first = past.release("failed", 400)
    past.release("failed", 400, retry_of=first)
    past.release("failed", 400)
    assert past.prune() == [3]


def test_a_release_that_somebody_retried_meanwhile_stays(past):
    first = past.release("failed", 400)
    past.release("failed", 400, retry_of=first)
    past.many(("success", 400), ("failed", 400))
    found = [r.id for r in past.store.releases.old(90 * DAY_S, 1)]
    assert found == [2, 1]
    past.store.releases.retry(2, "test", rc.Again(over_newer=True))
    assert past.store.releases.delete(found) == []
    assert past.ids() == [1, 2, 3, 4, 5]


def test_versions_are_never_used_again_after_prune(past):
    past.many(*[("failed", 400)] * 4)
    assert past.prune() == [4]
    assert new_release(past.store).version == 5
    assert new_release(past.store, target="dns").version == 6


def test_prune_takes_nodes_events_and_keys_with_it(past):
    past.many(("failed", 400), ("failed", 400))
    with past.store.database.transaction(write=True) as tx:
        tx.execute("INSERT INTO idempotency_keys (actor, idempotency_key, request_sha256, release_task_id) "
                   "VALUES ('api', 'k', '', 1)")
    assert past.prune() == [2]
    with past.store.database.transaction() as tx:
        for name in ("release_events", "release_task_nodes", "idempotency_keys"):
            assert tx.value(f"SELECT COUNT(*) FROM {name} WHERE release_task_id = 1") == 0
        assert tx.value("SELECT COUNT(*) FROM release_task_nodes WHERE release_task_id = 2") == 2
    with pytest.raises(rc.AppError, match="release 1 does not exist"):
        past.store.releases.get(1)
    assert statuses(past.store, 2) == ["failed", "failed"]


def test_dry_run_shows_what_prune_would_delete_and_deletes_nothing(quick, database_url, open_store):
    past = Past(open_store(database_url))
    quick.settings["DATABASE_URL"] = database_url
    past.many(("success", 400), ("failed", 400), ("failed", 400))
    shown = quick.ok("prune", "--older-than", "90d", "--keep", "1", "--dry-run", "--json").json
    assert (shown["dryRun"], shown["total"], [r["id"] for r in shown["items"]]) == (True, 1, [2])
    assert shown["items"][0].keys() == {"id", "version", "target", "status", "totalNodes", "endedAt"}
    text = quick.ok("prune", "--older-than", "90d", "--keep", "1", "--dry-run").out
    assert text.splitlines()[-1] == "releases to be deleted: 1"
    assert past.ids() == [1, 2, 3]
    assert quick.ok("prune", "--older-than", "90d", "--keep", "1").out == "releases deleted: 1\n"
    assert past.ids() == [1, 3]
    assert quick.ok("prune", "--older-than", "90d", "--keep", "1").out == "releases deleted: 0\n"


@pytest.mark.parametrize("arguments", [
    (), ("--older-than", "23h"), ("--older-than", "40000d"), ("--older-than", "90d", "--keep", "0")])
def test_prune_refuses_what_would_delete_too_much(quick, arguments):
    quick.refused(rc.EXIT_USAGE, "prune", *arguments)


def test_prune_deletes_in_parts_so_that_no_transaction_is_long(quick, sqlite_url, open_store, monkeypatch):
    past = Past(open_store(sqlite_url))
    quick.settings["DATABASE_URL"] = sqlite_url
    past.many(*[("failed", 400)] * 7)
    parts = []
    forget = rc.Releases.delete
    monkeypatch.setattr(rc.Releases, "delete", lambda store, ids, _by: parts.append(list(ids)) or forget(store, ids))
    monkeypatch.setattr(rc, "PRUNE_NODES", 4)
    quick.ok("prune", "--older-than", "90d", "--keep", "1")
    assert parts == [[6, 5], [4, 3], [2, 1]]  # two nodes each
    assert past.ids() == [7]


# -- version -----------------------------------------------------------------------------------

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
    from conftest import DRIVERS
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


# -- completion --------------------------------------------------------------------------------

def bash_says(script: str, line: str, folder: Path) -> set[str]:
    """Gives what bash would offer behind a line."""
    words = line.split(" ")
    asked = f"""{script}
        COMP_WORDS=({' '.join(f'"{word}"' for word in words)}) COMP_CWORD={len(words) - 1}
        $(complete -p "${{COMP_WORDS[0]}}" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}" """
    return set(run("bash", "--norc", "-uc", asked, cwd=folder).split())


TOP = {command.name.split()[0] for command in rc.COMMANDS} | {"--db", "--config", "--json", "--help", "--version"}
COMMON = {"--db", "--config", "--json", "--help"}


@pytest.mark.parametrize(("line", "offered"), [
    ("releasectl ", TOP),
    ("releasectl.py re", {"resume", "retry"}),
    ("releasectl node ", {"add", "list", "set", "import", "ping"} | COMMON),
    ("releasectl --db sqlite:///x.db node pi", {"ping"}),
    ("releasectl node add edge-1 10.0.0.1 --pro", {"--protocol"}),
    ("releasectl node add edge-1 10.0.0.1 --protocol ", {"tasks", "execute"}),
    ("releasectl node set edge-1 --status = off", {"offline"}),  # bash parts words at =
    ("releasectl list --status c", {"cancelling", "cancelled"}),
    ("releasectl list --status = paused --page-", {"--page-size"}),
    ("releasectl freeze o", {"on", "off"}),
    ("releasectl completion ", {"bash", "zsh"} | COMMON),
    ("releasectl prune ", {"--older-than", "--keep", "--dry-run"} | COMMON),
    ("releasectl prune --older-than ", set()),
    ("releasectl --config ", set()),  # a file name: readline's own
    ("releasectl node import ", set()),
    ("releasectl node import --", {"--db", "--config", "--json", "--help"}),
])
def test_bash_completes(tmp_path, line, offered):
    assert bash_says(rc.bash_completion(rc.COMMANDS), line, tmp_path) == offered


def test_bash_takes_the_script_of_every_command_without_a_word(tmp_path):
    script = Quick(tmp_path).ok("completion", "bash").out
    assert run("bash", "--norc", "-euc", script + "complete -p releasectl releasectl.py").count("_releasectl") == 2
    for command in rc.COMMANDS:
        flags = {flag for flags, _ in command.options for flag in flags if flag.startswith("-")}
        assert bash_says(script, f"releasectl {command.name} --", tmp_path) == flags | COMMON


class Zsh:
    """An interactive zsh in a terminal of its own."""

    def __init__(self, folder: Path):
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "COLUMNS": "200", "PS1": "> "}
        child, self._terminal = pty.fork()
        if child == 0:
            os.chdir(folder)
            os.execvpe("zsh", ["zsh", "-f", "-i"], environment)
        self._child = child
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def shows(self, *words: str) -> bool:
        """Says whether all words have come on the screen since the last look at them."""
        while select.select([self._terminal], [], [], 0.05)[0]:
            self.shown += os.read(self._terminal, 65536).decode(errors="replace")
        return all(word in self.shown for word in words)

    def close(self) -> None:
        os.kill(self._child, 9)
        os.waitpid(self._child, 0)
        os.close(self._terminal)


@pytest.mark.parametrize("how", ["sourced", "from fpath"])
def test_zsh_completes(tmp_path, how):
    if not shutil.which("zsh"):
        leave_out("zsh")
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions" / "_releasectl").write_text(Quick(tmp_path).ok("completion", "zsh").out)
    with contextlib.closing(Zsh(tmp_path)) as zsh:
        zsh.type("fpath=($PWD/functions $fpath); autoload -Uz compinit; compinit -u -D\n" if how == "from fpath" else
                 "autoload -Uz compinit; compinit -u -D; source functions/_releasectl\n")
        zsh.type("setopt nolistambiguous; print rea''dy\n")
        eventually(lambda: zsh.shows("ready"), message="zsh did not start")
        for line, words in (("releasectl re", ("resume", "continue a paused release")),
                            ("releasectl node ", ("import", "ask agents whether they answer")),
                            ("releasectl.py list --status c", ("cancelling", "cancelled")),
                            ("releasectl node set edge-1 --p", ("--protocol", "the agent's protocol (tasks)")),
                            ("releasectl freeze o", ("off",))):
            zsh.shown = ""
            zsh.type(line + "\t")
            eventually(lambda words=words: zsh.shows(*words), message=line)
            zsh.type("\x15")  # forget the line
        assert "error" not in zsh.shown


# -- the man page ------------------------------------------------------------------------------

MAN_PAGE = ROOT / "docs" / "releasectl.1"


def test_the_man_page_is_what_the_tables_make_of_it():
    assert MAN_PAGE.read_text() == run(sys.executable, ROOT / "scripts" / "man_page.py"), "run make man"


def test_the_man_page_names_every_command_option_and_setting():
    text = MAN_PAGE.read_text().replace("\\-", "-")
    words = [command.name for command in rc.COMMANDS] + [s.name for s in rc.SETTINGS] + [
        flag for command in rc.COMMANDS for flags, _ in command.options for flag in flags if flag.startswith("-")]
    assert [word for word in words if f"\\fB{word}\\fR" not in text] == []


def test_roff_finds_nothing_wrong_with_the_man_page():
    if shutil.which("groff"):
        command = ["groff", "-man", "-ww", "-Tutf8", "-z", str(MAN_PAGE)]
    elif shutil.which("mandoc"):
        command = ["mandoc", "-Tlint", "-Werror", str(MAN_PAGE)]
    else:
        leave_out("groff or mandoc")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


# -- the archive -------------------------------------------------------------------------------

def make_archive(folder: Path, umask: int) -> Path:
    """Makes the archive out of a copy of this tree, as somebody else would; gives it."""
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
            "docs/releasectl.1", "docs/systemd/releasectl.service", "scripts/demo.sh"} <= found
    clean = {"PATH": os.environ["PATH"]}
    version = run(sys.executable, "-I", folder / "releasectl.py", "version", cwd=tmp_path, env=clean)
    assert hashlib.sha256(Path(PROGRAM).read_bytes()).hexdigest() in version
    for page in folder.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(folder)} links to {link}"


# -- the docs ----------------------------------------------------------------------------------

def headings(path: Path) -> list[str]:
    return [line.strip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]


def test_the_runbook_tells_what_to_do_for_every_error_kind_and_every_alert():
    text = (ROOT / "docs" / "RUNBOOK.md").read_text(encoding="utf-8")
    kinds = (rc.UNREACHABLE, rc.TLS, rc.TIMEOUT, rc.HTTP, rc.PROTOCOL, rc.REJECTED, rc.AGENT_FAILED, rc.VERIFY,
             rc.DEADLINE, rc.ABANDONED)
    assert [kind for kind in kinds if f"\n| `{kind}` | " not in text] == []
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
