"""Completion in bash, zsh and fish, and the man page (issue 8, point 5; issue 22, point 5)."""
from __future__ import annotations

import contextlib
import os
import pty
import resource
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import leave_out
from lab import ROOT, Quick, eventually, run, sql

import releasectl as rc


def bash_says(script: str, line: str, folder: Path, breaks: str = " \t\n\"'@><=;|&(:") -> set[str]:
    """Return what bash would offer behind a line; breaks: COMP_WORDBREAKS."""
    asked = f"""{script}
        COMP_LINE={shlex.quote(line)}
        COMP_POINT=${{#COMP_LINE}} COMP_WORDBREAKS={shlex.quote(breaks)}
        $(complete -p "${{COMP_LINE%% *}}" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}" """
    # compiled once for all tests of a process
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_CACHE_HOME": str(folder.parent / "cache")}
    return set(run("bash", "--norc", "-uc", asked, cwd=folder, env=environment).splitlines()) - {""}


TOP = {command.name.split()[0] for command in rc.COMMANDS}
COMMON = {flag for flags, _ in rc.COMMON_OPTIONS for flag in flags if flag.startswith("--")} | {"--help"}
FLEET = {"edge-1", "edge-2"}
IDS = {"1", "2", "3", "latest"}


@pytest.fixture
def fleet(filled_quick):
    """A folder with two nodes, three releases and labels in its database."""
    sql(filled_quick.store, "UPDATE nodes SET labels = ? WHERE id = 1", '{"region":"eu","tier":"a b"}')
    sql(filled_quick.store, "UPDATE release_tasks SET target = 'a:b' WHERE id = 2")
    return filled_quick.folder


@pytest.mark.parametrize(("line", "offered"), [
    ("releasectl ", TOP),
    ("releasectl --", COMMON | {"--version"}),
    ("releasectl.py re", {"resume", "retry"}),
    ("releasectl node ", {"add", "list", "show", "set", "rm", "import", "ping"}),
    ("releasectl --db sqlite:///x.db node pi", {"ping"}),
    ("releasectl node add edge-1 10.0.0.1 --pro", {"--protocol"}),
    ("releasectl node add edge-1 10.0.0.1 --protocol ", {"tasks", "execute"}),
    ("releasectl node set edge-1 --status=off", {"offline"}),  # bash parts words at =
    ("releasectl list --status c", {"cancelling", "cancelled"}),
    ("releasectl list --status=paused --page-", {"--page-size"}),
    ("releasectl freeze o", {"on", "off"}),
    ("releasectl completion ", {"bash", "zsh", "fish"}),
    ("releasectl prune --", {"--older-than", "--keep", "--dry-run"} | COMMON),
    ("releasectl prune --older-than ", set()),
    ("releasectl --config ", set()),  # a file name: readline's own
    ("releasectl node import ", set()),
    ("releasectl node import --", COMMON | {"--update"}),
    ("releasectl --color ", {"auto", "always", "never"}),
    ("releasectl help com", {"completion"}),
    ("releasectl status ", IDS),
    ("releasectl show la", {"latest"}),
    ("releasectl diff 3 ", IDS - {"3"}),
    ("releasectl rollback 3 --to=", IDS),
    ("releasectl node show ", FLEET),
    ("releasectl nodes edge-1 edge", {"edge-2"}),
    ("releasectl list --node e", FLEET),
    ("releasectl create --label ", {"region=eu", "'tier=a b'"}),
    ("releasectl create --label region=", {"eu"}),
    ("releasectl create --label=region=e", {"eu"}),
    ("releasectl create --label 'region=e", {"eu"}),
    ("releasectl --db sqlite:///releasectl.db status ", IDS),
    ("releasectl status --db=sqlite:///releasectl.db ", IDS),
    ("releasectl list --target 'a:", {"b"}),
    ("releasectl list --target ", {"cdn", "a:b"}),
    ("releasectl --db sqlite:///none.db status ", set()),
    ("releasectl node add ", set()),
])
def test_bash_completes(fleet, line, offered):
    script = rc.completion_script("bash")
    # on a busy machine the database may answer too late, and nothing is offered of it
    said = set[str]()

    def says_it() -> bool:
        said.clear()
        said.update(bash_says(script, line, fleet))
        return said == offered

    try:
        eventually(says_it)
    except AssertionError:
        pytest.fail(f"behind {line!r} bash offers {sorted(said)}")
    assert not (fleet / "none.db").exists()


def test_bash_keeps_a_word_whole_that_it_does_not_break(fleet):
    script = rc.completion_script("bash")
    eventually(lambda: bash_says(script, "releasectl list --target a:", fleet, " \t\n\"'=") == {"a:b"})


def test_the_script_asks_with_the_settings_that_it_was_made_with(filled_quick):
    config = filled_quick.file("our own.conf", f"DATABASE_URL=sqlite:///{filled_quick.folder}/releasectl.db\n")
    script = filled_quick.ok("--config", config, "completion", "bash").out
    (filled_quick.folder / "elsewhere").mkdir()
    eventually(lambda: bash_says(script, "releasectl status ", filled_quick.folder / "elsewhere") == IDS)


def test_what_a_row_written_by_hand_holds_is_no_line_of_its_own(filled_quick):
    sql(filled_quick.store, "UPDATE nodes SET name = ? WHERE id = 1", "a\nb\x1b[31m")
    assert filled_quick.ok(rc.COMPLETE, "fish", "node", "show", "").out == "edge-2\t127.0.1.2\n"


def test_the_answer_takes_less_than_300_ms(fleet):
    script = rc.completion_script("bash")
    eventually(lambda: bash_says(script, "releasectl status ", fleet) == IDS)  # Python keeps what it compiles

    def took_s() -> float:
        """Return the CPU time: other tests run beside this one."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        bash_says(script, "releasectl status ", fleet)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    eventually(lambda: took_s() < 0.3)


def test_a_database_that_hangs_holds_nobody_up(filled_quick, monkeypatch):
    monkeypatch.setattr(rc.Database, "require_schema", lambda *_: time.sleep(5))
    began = time.monotonic()
    assert filled_quick.ok(rc.COMPLETE, "zsh", "status", "").out == ""
    assert time.monotonic() - began < 2


def test_bash_takes_the_script_of_every_command_without_a_word(tmp_path):
    script = Quick(tmp_path).ok("completion", "bash").out
    assert run("bash", "--norc", "-euc", script + "complete -p releasectl releasectl.py").count("_releasectl") == 2
    for command in rc.COMMANDS:
        flags = {flag for flags, _ in command.options for flag in flags if flag.startswith("--")}
        words = [*command.name.split(), "--"]
        assert {one.word for one in rc.completions(rc.COMMANDS, rc.OTHER_WORDS, words)} == flags | COMMON


def test_fish_completes(fleet):
    if not shutil.which("fish"):
        leave_out("fish")
    (fleet / "releasectl.fish").write_text(rc.completion_script("fish"))
    for line, words in (("releasectl re", {"resume\tcontinue a paused release"}),
                        ("releasectl status ", {"latest\tthe newest release", "3\tpending; for pending"}),
                        ("releasectl node show edge-", {"edge-1\t127.0.1.1", "edge-2\t127.0.1.2"}),
                        ("releasectl list --status=c", {"--status=cancelled"}),
                        ("releasectl node import rel", {"releasectl.fish"})):
        def said(line=line) -> set[str]:
            shown = run("fish", "--no-config", "-c", f"source releasectl.fish; complete -C '{line}'", cwd=fleet,
                        env={"PATH": os.environ["PATH"], "HOME": str(fleet)})
            return {offer.rstrip() for offer in shown.splitlines()}
        eventually(lambda words=words, said=said: words <= said(),
                   message=lambda line=line, said=said: f"{line}: {said()}")


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
        """Return whether all words have come on the screen since the last look at them."""
        while select.select([self._terminal], [], [], 0.05)[0]:
            self.shown += os.read(self._terminal, 65536).decode(errors="replace")
        return all(word in self.shown for word in words)

    def offers(self, line: str, words: tuple[str, ...]) -> bool:
        """Return whether the tab key behind a line brings words; on a busy machine the database may be late."""
        self.shown = ""
        self.type(line + "\t")
        ends_at = time.monotonic() + 5
        while not self.shows(*words) and time.monotonic() < ends_at:
            pass  # shows() waits for what is written
        self.type("\x15")  # forget the line
        return self.shows(*words)

    def close(self) -> None:
        os.kill(self._child, 9)
        os.waitpid(self._child, 0)
        os.close(self._terminal)


@pytest.mark.parametrize("how", ["sourced", "from fpath"])
def test_zsh_completes(fleet, how):
    tmp_path = fleet
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
                            ("releasectl status ", ("latest", "pending; for pending")),
                            ("releasectl node show edge-", ("edge-1", "127.0.1.2")),
                            ("releasectl create --label reg", ("region=eu",)),
                            ("releasectl freeze o", ("off",))):
            eventually(lambda line=line, words=words: zsh.offers(line, words), message=line)
        assert "error" not in zsh.shown

# -- the man page -----------------------------------------------------------------------------

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
