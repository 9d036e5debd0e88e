"""The plan of releasectl.py: a section uses only what stands above it (docs/ARCHITECTURE.md)."""
from __future__ import annotations

import ast
import functools
import re
import typing
from pathlib import Path

import pytest

import releasectl as rc

ROOT = Path(rc.__file__).parent
SOURCE = Path(rc.__file__).read_text("utf-8")
LINES = SOURCE.splitlines()
MAX_LINES = 600


class Section(typing.NamedTuple):
    name: str
    first: int
    last: int
    uses: set[str]


def sections() -> list[Section]:
    """Return the sections in order: what stands between `# region NAME` and `# endregion`."""
    found, start, name = [], 0, ""
    for number, line in enumerate(LINES, 1):
        if line.startswith("# region "):
            assert not name, f"line {number}: {name} has no # endregion"
            start, name = number, line[len("# region "):]
        elif line == "# endregion":
            banner = " ".join(text.lstrip("# ") for text in LINES[start:start + 12])
            uses = re.search(r"Uses: (.*?)\.( |$)", banner)
            assert uses, f"{name} does not say what it uses"
            found.append(Section(name, start, number, set(uses[1].split(", ")) - {"nothing"}))
            name = ""
    assert not name, f"{name} has no # endregion"
    return found


SECTIONS = sections()
ORDER = [section.name for section in SECTIONS]


@functools.lru_cache(maxsize=1)  # to parse the module takes a second
def definitions() -> dict[str, tuple[str, ast.stmt]]:
    """Return the section and the statement of every name at the top level."""
    found: dict[str, tuple[str, ast.stmt]] = {}
    for statement in ast.parse(SOURCE).body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [statement.name]
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [node.id for target in targets for node in ast.walk(target)
                     if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        else:
            continue
        home = [s.name for s in SECTIONS if s.first <= statement.lineno and (statement.end_lineno or 0) <= s.last]
        assert home, f"line {statement.lineno}: {names} is in no section"
        assert not found.keys() & set(names), f"line {statement.lineno}: {names} stands above too"
        found.update(dict.fromkeys(names, (home[0], statement)))
    return found


@functools.lru_cache(maxsize=1)
def uses() -> list[tuple[str, str, str, str]]:
    """Return who uses what of another section: section and name of the user, section and name of the used."""
    known = definitions()
    return sorted({(home, name, known[node.id][0], node.id)
                   for name, (home, statement) in known.items() for node in ast.walk(statement)
                   if isinstance(node, ast.Name) and node.id in known and known[node.id][0] != home})


def test_a_section_uses_only_what_stands_above_it():
    wrong = [f"{user} ({home}) uses {used} ({other})" for home, user, other, used in uses()
             if ORDER.index(other) > ORDER.index(home)]
    assert not wrong, "\n".join(wrong)


def test_a_name_with_a_leading_underscore_is_used_in_its_own_section_only():
    wrong = [f"{user} ({home}) uses {used} ({other})" for home, user, other, used in uses()
             if used.startswith("_") and not used.startswith("__")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("section", SECTIONS, ids=ORDER)
def test_no_section_is_longer_than_600_lines(section):
    assert section.last - section.first + 1 <= MAX_LINES


def test_the_banner_of_each_section_says_what_it_uses():
    assert {section.name: section.uses for section in SECTIONS} == {
        name: {other for home, _, other, _ in uses() if home == name} for name in ORDER}


def test_the_docstring_of_the_module_lists_the_sections_in_their_order():
    plan = (rc.__doc__ or "").partition("Sections")[2]
    assert re.findall(r"(?m)^    ([A-Z][A-Za-z ]*?)  ", plan) == ORDER


def functions(inside: ast.AST) -> typing.Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions among the statements of a module; no expression has one, and they are nearly all of it."""
    for node in ast.iter_child_nodes(inside):
        if not isinstance(node, ast.expr):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node
            yield from functions(node)


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("scripts/**/*.py")],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_the_docstring_of_a_function_says_what_to_do_and_not_what_it_does(path):
    first = [(ast.get_docstring(node) or "").partition(" ")[0] for node in functions(ast.parse(path.read_text("utf-8")))
             if not node.name.startswith("test_") and not node.decorator_list]  # nor what a fixture is
    assert [word for word in first if re.fullmatch("[A-Z][a-z]+[^s]s", word)] == [], "PEP 257"
