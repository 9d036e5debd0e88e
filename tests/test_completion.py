"""Completion in bash and zsh, and the man page (issue 8, point 5)."""
from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import leave_out
from lab import ROOT, Quick, eventually, run

import releasectl as rc


def bash_says(script: str, line: str, folder: Path) -> set[str]:
    """Return what bash would offer behind a line."""
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
    ("releasectl node ", {"add", "list", "show", "set", "rm", "import", "ping"} | COMMON),
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
    ("releasectl node import --", {"--db", "--config", "--json", "--help", "--update"}),
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
        """Return whether all words have come on the screen since the last look at them."""
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
