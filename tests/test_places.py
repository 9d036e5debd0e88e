"""Where to change what: docs/ARCHITECTURE.md names the places, and a place that is forgotten fails here.

What else holds a place is named in the table's last column.
"""
from __future__ import annotations

import ast
import inspect
import re

import pytest
from lab import ROOT, add_nodes, new_release
from test_contract import checked
from test_sections import LINES, ORDER, SECTIONS, definitions

import releasectl as rc


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section_of(name: str, heading: str) -> str:
    """Return what a document says below one of its headings."""
    found = text_of(name).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert found, f"{name} has no section {heading}"
    return found


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of a table's rows, without its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]


# -- the plan and the table themselves ---------------------------------------------------------

def test_the_plan_in_the_document_is_that_of_the_modules_head():
    head = (rc.__doc__ or "").partition("Sections")[2]
    groups: dict[str, list[str]] = {}
    for group, section in re.findall(r"(?m)^  ([A-Z]+)\b|^    ([A-Z][A-Za-z ]*?)  ", head):
        if group:
            groups[group] = []
        else:
            groups[list(groups)[-1]].append(section)
    drawn = re.findall(r"(?m)^    ([A-Z]+) {3,}([A-Z].*)$", section_of("docs/ARCHITECTURE.md", "The plan"))
    assert {group: names.split(", ") for group, names in drawn} == groups


PLACES = rows_of(section_of("docs/ARCHITECTURE.md", "Where to change what"))


@pytest.mark.parametrize(("what", "where", "tests"), PLACES, ids=[row[0] for row in PLACES])
def test_every_place_in_the_table_is_where_it_says(what, where, tests):
    known = definitions()
    named = re.findall(r"([A-Z][A-Za-z]*(?: [a-z]+)*|[a-z_/]+\.(?:py|html)): ((?:`\w+`(?:, )?)+)", where)
    assert named, f"{what} names no place"
    for place, names in named:
        for name in re.findall(r"`(\w+)`", names):
            if "." in place:
                assert re.search(rf"\b{name}\b", text_of(place)), f"{place} has no {name}"
            else:
                assert place in ORDER, f"there is no section {place}"
                assert known.get(name, ("nowhere",))[0] == place, f"{name} is not in {place}"
    for name in re.findall(r"\btest_\w+", tests):
        assert (ROOT / "tests" / f"{name}.py").is_file(), f"there is no {name}"


def test_every_name_in_the_document_is_in_the_section_that_it_says():
    known = definitions()
    methods = {(name, home) for home, one in known.values() if isinstance(one, ast.ClassDef)
               for name in vars(getattr(rc, one.name))}
    text, name = " ".join(text_of("docs/ARCHITECTURE.md").split()), r"`(\w+)(?:\.(\w+))?(?:\(\))?`"
    sections = "|".join(sorted(ORDER, key=len, reverse=True))
    found = {*re.findall(rf"{name} \(({sections})[),:]", text),
             *((*one, where) for names, where in re.findall(rf"\((`[^()]+`), ({sections})[),:]", text)
               for one in re.findall(name, names)),
             *((*one, where) for where, names in re.findall(rf"\(({sections}): (`\w+`)", text)
               for one in re.findall(name, names))} - {("schema", "sql", "Database"), ("dashboard", "html", "Page")}
    assert len(found) > 15
    assert [f"{name} is not in {where}" for name, _, where in found - {("store", "state", "Database state")}
            if known.get(name, ("",))[0] != where and (name, where) not in methods] == []
    assert [f"{name} has no {member}" for name, member, _ in found
            if member and name != "store" and not hasattr(getattr(rc, name), member)] == []


def test_the_document_names_every_part_of_the_store_with_its_section(sqlite_store):
    plan, known = section_of("docs/ARCHITECTURE.md", "The plan"), definitions()
    said = plan.partition("`Store` (Overview)")[2].partition("`Executor`")[0]
    named = re.findall(r"`(?:store)?\.(\w+)`(?: \(([A-Z][a-z ]+)\))?", said)
    assert {part: where or part.capitalize() for part, where in named} == {
        part: known[type(value).__name__][0] for part, value in vars(sqlite_store).items()
        if part not in ("database", "clock")}


def test_the_document_has_every_thread_with_the_section_that_starts_it():
    started = {(name, section.name) for section in SECTIONS for name in re.findall(
        r'Thread(?:PoolExecutor)?\(.*(?:name=f?|, )"([a-z-]+?)-?["{]', "\n".join(LINES[section.first:section.last]))}
    told = {(re.sub(r"-ID|_N|`", "", cells[0]), where)
            for cells in rows_of(section_of("docs/ARCHITECTURE.md", "The threads")) for where in cells[3].split(", ")}
    assert started <= told
    assert {name for name, _ in told} - {name for name, _ in started} == {"main"}


# -- a setting, a strategy key ------------------------------------------------------------------

def test_the_documentation_has_every_setting_with_its_default():
    rows = {cells[0].strip("`"): cells[1].strip("`") for cells in rows_of(section_of(
        "docs/OPERATIONS.md", "Configuration"))}
    assert rows == {setting.name: setting.default for setting in rc.SETTINGS}


@pytest.mark.parametrize(("keys", "options", "values"), [
    (rc.STRATEGY_KEYS, rc.STRATEGY_OPTIONS, rc.Strategy), (rc.VERIFY_KEYS, rc.VERIFY_OPTIONS, rc.Verify)],
    ids=["strategy", "verify"])
def test_every_strategy_key_has_a_field_and_an_option(keys, options, values):
    assert [field for field, *_ in keys.values()] == list(values._fields)
    assert {key for _, key, *_ in options} == set(keys) - {"verify"}


# Keys that the page's form has no field for: they are written as JSON there.
WITHOUT_FIELD = {"first", "preflight"}


def test_the_page_has_a_field_with_a_name_and_a_sentence_for_every_strategy_key():
    page = text_of("dashboard.html")
    fields = re.findall(r"(\w+): '", page.partition("\nconst STRATEGY_FIELDS = {")[2].partition("};")[0])
    assert sorted({*fields, *WITHOUT_FIELD}) == sorted(rc.STRATEGY_KEYS)
    assert [key for key in fields if f"\nfield.{key}\t" not in page] == []
    sentences = page.partition("\nfunction strategyLines(s) {")[2].partition("\n}\n")[0]
    assert set(re.findall(r"\bs\.(\w+)", sentences)) == set(rc.STRATEGY_KEYS)


def test_the_documentation_has_every_strategy_key_and_its_option():
    rows = {cells[1].strip("`"): cells[0] for cells in rows_of(section_of("docs/STRATEGIES.md", "The keys"))}
    options = {key: flag for flag, key, *_ in rc.STRATEGY_OPTIONS}
    assert set(rc.STRATEGY_KEYS) <= set(rows)
    assert [key for key, flag in options.items() if not re.match(rf"`{flag}\b", rows[key])] == []
    verify = section_of("docs/STRATEGIES.md", "Verify")
    assert [flag for flag, *_ in rc.VERIFY_OPTIONS if flag not in verify] == []


# -- a column -----------------------------------------------------------------------------------

@pytest.fixture
def sqlite_store(open_store, sqlite_url) -> rc.Store:
    return open_store(sqlite_url)


# Columns that no API shows: what goes to the agents, and what the executor needs.
INTERNAL = {"payload", "tag", "claim_owner", "claim_fence", "claim_expires_at", "passed_batch", "soak_clock",
            "paused_by", "preflight_accepted"}
# Fields of a release that are computed from its nodes, and from its rollback.
COMPUTED = {"skipped_nodes", "current_batch", "rollback_id", "rollback_status", "rolled_back_by"}
# Columns that a row of a release's node does not need, and fields with another name than their column.
NOT_READ = {"id", "release_task_id", "created_at", "updated_at"}
RENAMED = {"node_name": "name", "reached": "stored_reached", "waited_sec": "waited_s",
           "payload_sha256": "stored_sha256"}


def columns(store: rc.Store, table: str) -> list[str]:
    with store.database.transaction() as tx:
        return [row[1] for row in tx.rows(f"PRAGMA table_info({table})")]


def snake(key: str) -> str:
    return re.sub("[A-Z]", lambda match: "_" + match[0].lower(), key)


def test_every_column_has_a_field(sqlite_store):
    fields = [*rc.Release._fields]
    read = {RENAMED.get(name, name) for name in columns(sqlite_store, "release_tasks")}
    assert read == set(fields) - COMPUTED
    assert set(columns(sqlite_store, "nodes")) == {*rc.Node._fields}
    assert set(columns(sqlite_store, "audit_log")) == set(rc.AuditRow._fields)
    read = {RENAMED.get(name, name) for name in set(columns(sqlite_store, "release_task_nodes")) - NOT_READ}
    assert read <= set(rc.ReleaseNode._fields)


def test_every_column_of_a_release_is_shown_or_named_as_internal(sqlite_store):
    shown = {snake(key) for key in rc.RELEASE_SCHEMA}
    assert set(columns(sqlite_store, "release_tasks")) == (shown | INTERNAL) - COMPUTED
    assert not shown & INTERNAL


def test_every_field_of_a_release_is_read_from_its_own_column(sqlite_store):
    add_nodes(sqlite_store, 1)
    release_id = new_release(sqlite_store).id
    names = columns(sqlite_store, "release_tasks")
    # columns whose values a CHECK or a key limits
    fixed = {"id", "version", "status", "approval", "retry_of", "rollback_of", "catch_up_of"}
    with sqlite_store.database.transaction(write=True) as tx:
        tx.execute(f"UPDATE release_tasks SET {', '.join(f'{name} = ?' for name in names if name not in fixed)}",
                   *({"goes_first": 1, "during_freeze": 0}.get(name, 1000 + number)
                     for number, name in enumerate(names) if name not in fixed))
        row = tx.row(f"SELECT {', '.join(names)} FROM release_tasks WHERE id = ?", release_id)
    release = sqlite_store.releases.get(release_id)
    assert {name: getattr(release, name) for name in names} == dict(zip(names, row))


# -- a dialect, a status of a node ----------------------------------------------------------------

def test_the_tables_and_the_page_allow_every_dialect_and_every_status_of_a_node():
    assert checked("nodes", "agent_protocol") == set(rc.PROTOCOLS)
    spoken = re.search(r"(?m)^PROTOCOLS = \((.*)\)$", text_of("scripts/fake_agent.py"))
    assert spoken
    assert re.findall(r'"(\w+)"', spoken[1]) == list(rc.PROTOCOLS)
    assert checked("nodes", "status") == set(rc.NODE_STATUSES)
    chosen = dict(re.findall(r"key: '(agentProtocol|status)'[^\[]*choices: \[([^\]]*)\]", text_of("dashboard.html")))
    assert {key: re.findall(r"'(\w+)'", choices) for key, choices in chosen.items()} == {
        "agentProtocol": list(rc.PROTOCOLS), "status": list(rc.NODE_STATUSES)}


# -- a command, a route, a verb -------------------------------------------------------------------

def test_every_function_of_a_command_is_in_the_table_of_commands():
    functions = {name for name in vars(rc) if name.startswith("command_")}
    assert functions == {command.run.__name__ for command in rc.COMMANDS}


def test_every_public_method_of_the_api_is_the_handler_of_a_route():
    methods = {name for name, _ in inspect.getmembers(rc.Api, inspect.isfunction) if not name.startswith("_")}
    assert methods == {route.handler.__name__ for route in rc.ROUTES}


def test_the_schemas_of_a_route_and_its_parameters_exist():
    schemas = {*rc.openapi_schemas(), "text", "html", "json", ""}
    for route in rc.ROUTES:
        assert {route.answers, route.body, route.dry_run} <= schemas, route.path
        assert set(route.query) <= set(rc.QUERY_PARAMETERS), route.path


def test_the_documentation_has_every_verb():
    known = [cells[0] for cells in rows_of(section_of("docs/STRATEGIES.md", "Verbs"))]
    for verb in rc.VERBS:
        word, *more = verb.split()
        assert f"`{' '.join([word, 'ID', *more])}`" in known


# -- an error kind, an error code -------------------------------------------------------------------

def test_the_api_says_what_to_do_about_every_error_kind_in_both_languages():
    assert sorted(rc.ERROR_HINTS) == sorted(rc.ERROR_KINDS)
    assert [hint for hint in (*rc.ERROR_HINTS.values(), rc.HOST_HINT) if rc.in_chinese(hint) == hint] == []


def test_the_documentation_says_what_to_do_about_every_error_code():
    found = {}
    for statuses, codes, *_ in rows_of(section_of("docs/OPERATIONS.md", "Using the API")):
        for low, high in re.findall(r"([0-9]{4})(?: to ([0-9]{4}))?", codes):
            for code in range(int(low), int(high or low) + 1):
                found[code] = statuses.split(", ")
    assert set(found) == set(rc.ERROR_CODES)
    assert [code for code, (status, _) in rc.ERROR_CODES.items() if str(status) not in found[code]] == []


def test_upgrade_says_what_each_schema_step_brings():
    table = section_of("docs/UPGRADE.md", "What each schema step brings")
    assert re.findall(r"(?m)^\| ([0-9]+) \|", table) == [str(number) for number in range(1, len(rc.schema_steps()) + 1)]
