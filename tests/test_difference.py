"""What went out and what it changes: payloads digit for digit, their digests, differences, plans that tell them."""
from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from lab import add_nodes, at_schema, new_release, sql
from test_again import ended, good, settle

import releasectl as rc

EXACT = ('{"b":0.1234567890123456789,"a":[1.10,-0,1e5,1E+05,100000000000000000000001,-0.0],"c":{"x":1.0,"y":1},'
         '"d":"\\ud83d\\ude00 1.10"}')


# -- numbers, digit for digit -----------------------------------------------------------------------------

def test_numbers_of_a_payload_are_written_as_they_were_read():
    payload = rc.read_payload(EXACT)
    assert rc.to_json(payload) == EXACT.replace("\\ud83d\\ude00", "\U0001f600")
    assert rc.to_json(rc.read_payload(rc.indented_json(payload))) == rc.to_json(payload)
    assert json.loads(rc.canonical_json(payload)) == json.loads(EXACT)
    assert rc.plain_numbers(payload) == rc.parse_json(EXACT) == json.loads(EXACT)


def test_no_text_is_taken_for_a_number():
    for text in ('"\\ud8001.10"', '"\\ud800"', '{"\\ud8001":1}'):
        for exact in (False, True):
            with pytest.raises(ValueError, match="UTF-8"):
                rc.parse_json(text, exact=exact)
    texts = ["\U00010000" + "1.5", "\\ud8001.5", '"\\ud8001.5"', "1.5", "\u00d8001.5"]
    assert json.loads(rc.to_json(texts)) == json.loads(rc.canonical_json(texts)) == texts


@pytest.mark.parametrize("text", ["1e999", "[-1e999]", "NaN", "9" * 10_000])
def test_what_no_agent_could_read_is_refused(text):
    with pytest.raises(ValueError, match="too large|too long|not JSON"):
        rc.parse_json(text, exact=True)


def test_two_payloads_are_the_same_when_they_differ_by_version_and_order_at_most():
    def digest(text: str) -> str:
        return rc.digest_of(rc.read_payload(text))
    assert digest('{"a":1,"b":2}') == digest('{"b":2,"version":7,"a":1}')
    different = ['{"a":1.1}', '{"a":1.10}', '{"a":1}', '{"a":1.0}', '{"a":true}', '{"a":"1.1"}', '{"a":-0}', '{"a":0}']
    assert len(set(map(digest, different))) == len(different)
    # as the audit log has had it since its first row
    assert digest('{"b":1.5,"a":"\u00e9"}') == rc.hashlib.sha256(
        json.dumps({"a": "\u00e9", "b": 1.5, "version": 0}, sort_keys=True).encode()).hexdigest()


# -- the difference ------------------------------------------------------------------------------------------

def apply(changes: list[rc.Change], value: Any) -> Any:
    """Do to a value what the changes say."""
    holder: Any = {"": copy(value)}
    removed = []
    for change in changes:
        parent: Any = holder
        path = ("", *change.path)
        for step in path[:-1]:
            parent = parent[place(parent, step)]
        last: Any = path[-1]
        if isinstance(last, rc.Element) and last.value is None:
            parent.sort(key=lambda e, m=last.member, names=change.after: names.index(e[m]))
        elif change.kind == rc.REMOVED and isinstance(last, int):
            removed.append(parent)
        elif change.kind == rc.REMOVED:
            del parent[place(parent, last)]
        elif change.kind == rc.ADDED and isinstance(parent, list):
            parent.insert(last if change.position is None else change.position, copy(change.after))
        else:
            parent[place(parent, last)] = copy(change.after)
    for parent in removed:
        parent.pop()
    return holder[""]


def place(parent: Any, step: Any) -> Any:
    if isinstance(step, rc.Element):
        return next(i for i, e in enumerate(parent) if type(e[step.member]) is type(step.value)
                    and e[step.member] == step.value)
    return step


def copy(value: Any) -> Any:
    return rc.parse_json(rc.to_json(value), exact=True)


def some_json(rng: random.Random, depth: int = 4) -> Any:
    """Return a value of few different parts, so that two of them have much in common."""
    kind = rng.randrange(9 if depth else 5)
    if kind < 5:
        return rng.choice([None, True, False, 0, 1, 2, "", "1", "a", "b", 0.0,
                           *map(rc.Number, ("1.0", "1.10", "-0.0"))])
    if kind < 6:
        return [some_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind < 8:
        member = rng.choice(rc.NAMING_MEMBERS)
        names = rng.sample([1, 2, 3, "1", "a", "b", *ODD_KEYS[:2]], rng.randrange(5))
        return [{member: name, "x": some_json(rng, depth - 1)} for name in names]
    return {key: some_json(rng, depth - 1) for key in rng.sample(["id", "name", "version", "x", *ODD_KEYS],
                                                                 rng.randrange(4))}


# Whatever a path must escape.
ODD_KEYS = ["odd key", 'a"]["b', "a.b", "$[0]", "\\\n\u202e", "*", "?@.id==1", "\u00e9", ""]


def steps_of(where: str) -> list[Any]:
    """Return the steps of a path in a JSONPath, so that a change can be found by its text alone."""
    steps: list[Any] = []
    text = where[1:]
    while text:
        string = r'"(?:[^"\\]|\\.)*"'
        found = re.match(rf"\.(\w+)|\[(\d+)\]|\[({string})\]|\[\?@\.(\w+)==({string}|-?\d+)\]|\[\*\]\.(\w+)$", text,
                         re.ASCII)
        assert where[0] == "$", where
        assert found, where
        member, index, key, name, value, every = found.groups()
        steps.append(member if member else int(index) if index else json.loads(key) if key else
                     rc.Element(name, json.loads(value)) if name else rc.Element(every, None))
        text = text[found.end():]
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_a_difference_says_all_that_changed_and_nothing_else(seed):
    rng = random.Random(seed)
    for _ in range(200):
        before, after = copy(some_json(rng)), copy(some_json(rng))
        for a, b in ((before, after), (after, before), ({"v": before}, {"v": after})):
            found = rc.difference(a, b)
            assert rc.canonical_json(apply(found.changes, a)) == rc.canonical_json(b), (a, b, found)
            assert (found.total == 0) == (rc.canonical_json(a) == rc.canonical_json(b)), (a, b, found)
            assert all(steps_of(change.where) == list(change.path) for change in found.changes)
        assert rc.difference(before, copy(before)) == rc.Difference([], 0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("names", [None, *rc.NAMING_MEMBERS])
def test_elements_that_were_swapped_moved_or_replaced_are_found(seed, names):
    rng = random.Random(seed)
    for _ in range(20):
        elements = [{names or "x": number, "v": rng.randrange(2)} for number in range(rng.randrange(2, 8))]
        after = copy(rng.sample(elements, rng.randrange(len(elements) + 1)))
        for number in range(rng.randrange(3)):
            after.insert(rng.randrange(len(after) + 1), {names or "x": 100 + number})
        found = rc.difference({"l": elements}, {"l": after})
        assert apply(found.changes, {"l": elements}) == {"l": after}, (elements, after, found)
        if names and sorted(map(rc.to_json, elements)) == sorted(map(rc.to_json, after)):
            assert [change.where for change in found.changes] in ([], [f"$.l[*].{names}"])


@pytest.mark.parametrize("seed", range(10))
def test_what_is_cut_is_a_beginning_and_its_count_is_true(seed, monkeypatch):
    rng = random.Random(seed)
    before, after = ([some_json(rng) for _ in range(100)] for _ in range(2))
    monkeypatch.setattr(rc, "MAX_CHANGES", 10**9)
    whole = rc.difference(before, after)
    assert (len(whole.changes), whole.total > 50) == (whole.total, True)
    for most in (1, 7, whole.total - 1, whole.total, whole.total + 1):
        monkeypatch.setattr(rc, "MAX_CHANGES", most)
        assert rc.difference(before, after) == (whole.changes[:most], whole.total)
    for chars in (1, 100, 1000):
        monkeypatch.setattr(rc, "MAX_CHANGES_CHARS", chars)
        cut = rc.difference(before, after)
        assert (cut.changes, cut.total) == (whole.changes[:len(cut.changes)], whole.total)
        sizes = [len(change.where) + sum(map(len, change.values)) for change in whole.changes]
        assert sum(sizes[:len(cut.changes)]) <= chars or len(cut.changes) == 1
        assert sum(sizes[:len(cut.changes) + 1]) > chars


@pytest.mark.parametrize(("before", "after", "lines"), [
    ('{"ttl":1.1}', '{"ttl":1.10}', ["~ $.ttl: 1.1 -> 1.10"]),
    ('{"a":1}', '{"a":true}', ["~ $.a: 1 -> true"]),
    ('{"a":1}', '{"b b":null}', ["- $.a: 1", '+ $["b b"]: null']),
    ('{"l":[1,2,3]}', '{"l":[1,3]}', ["~ $.l[1]: 2 -> 3", "- $.l[2]: 3"]),
    ('{"s":[{"name":"x","p":1},{"name":"y","p":2}]}', '{"s":[{"name":"y","p":3},{"name":"z","p":4}]}',
     ['- $.s[?@.name=="x"]: {"name":"x","p":1}', '~ $.s[?@.name=="y"].p: 2 -> 3',
      '+ $.s[?@.name=="z"]: {"name":"z","p":4}']),
    ('{"s":[{"id":1},{"id":2}]}', '{"s":[{"id":2},{"id":1}]}', ["~ $.s[*].id: [1,2] -> [2,1]"]),
    ('{"s":[{"id":1,"name":"a"},{"id":1,"name":"b"}]}', '{"s":[{"id":1,"name":"b"}]}',
     ['- $.s[?@.name=="a"]: {"id":1,"name":"a"}']),
    ('{"s":[{"id":1.0}]}', '{"s":[{"id":1.00}]}', ["~ $.s[0].id: 1.0 -> 1.00"]),
    ('{"t":"\\u001b[31m"}', '{"t":"a\\nb"}', ['~ $.t: "\\u001b[31m" -> "a\\nb"']),
])
def test_a_change_is_one_line_with_a_jsonpath(before, after, lines):
    found = rc.difference(rc.read_payload(before), rc.read_payload(after))
    assert list(map(str, found.changes)) == lines


def test_a_hundred_thousand_changes_are_a_thousand_and_a_count():
    before, after = {str(n): n for n in range(100_000)}, {str(n): -n - 1 for n in range(100_000)}
    found = rc.difference(before, after)  # which would not end, were each compared with each
    assert (len(found.changes), found.total, str(found)) == (1000, 100_000, "100000 changes")


def test_what_a_difference_holds_is_bounded_and_the_rest_is_counted():
    key = "k" * 900_000
    before, after = {key: {str(n): n for n in range(1500)}}, {key: {str(n): -n - 1 for n in range(1500)}}
    found = rc.difference(before, after)
    assert (len(found.changes), found.total) == (1, 1500)
    assert sum(len(change.where) for change in found.changes) < rc.MAX_CHANGES_CHARS
    big, other = ({"a": letter * 600_000, "b": [letter * 300_000] * 3} for letter in "xy")
    found = rc.difference(big, other)
    assert ([change.where for change in found.changes], found.total) == (["$.a"], 4)  # the first one, whatever its size
    assert rc.difference({"a": "x" * 300_000, "b": 1}, {"a": "y" * 300_000, "b": 2}).total == 2


@pytest.mark.parametrize(("before", "after", "line"), [
    ("a  b", "a b", '~ $.t: "a  b" -> "a b"'),
    ("a\u200bb", "ab", '~ $.t: "a\\u200bb" -> "ab"'),
    ("a\u00a0b", "a b", '~ $.t: "a\\u00a0b" -> "a b"'),
    ("a\x7f", "a", '~ $.t: "a\\u007f" -> "a"'),
    ("e\u0301", "\u00e9", '~ $.t: "e\\u0301" -> "\u00e9"'),
    ("\u0441\u043e", "co", '~ $.t: "\\u0441\\u043e" -> "co"'),
    ("Z\u00fcrich", "Z\u00f6rich", '~ $.t: "Z\u00fcrich" -> "Z\u00f6rich"'),
    ("\u5317\u4eac", "\u4e0a\u6d77", '~ $.t: "\u5317\u4eac" -> "\u4e0a\u6d77"'),
    ("\U000e0100", "", '~ $.t: "\\udb40\\udd00" -> ""'),
    ("x" * 500 + "1", "x" * 500 + "2", f'~ $.t: ...{"x" * 33}1" -> ...{"x" * 33}2"'),
    ("x" * 500, "x" * 520, f'~ $.t: ...{"x" * 33}" -> ...{"x" * 53}"'),
    ("1" + "x" * 500, "2" + "x" * 500, f'~ $.t: "1{"x" * 98}... -> "2{"x" * 98}...')])
def test_two_values_never_look_the_same(before, after, line):
    assert list(map(str, rc.difference({"t": before}, {"t": after}).changes)) == [line]
    assert line.isprintable()


def test_the_line_of_a_change_has_its_whole_path_or_both_of_its_ends():
    lines = [str(rc.Change(rc.ADDED, path, after=1)) for path in (
        ("a  b\u202e",), ("x" * 300, "one"), ("x" * 300, "two"), ("x" * 190,))]
    assert lines == ['+ $["a  b\\u202e"]: 1', f'+ $.{"x" * 98}...{"x" * 96}.one: 1',
                     f'+ $.{"x" * 98}...{"x" * 96}.two: 1', f'+ $.{"x" * 190}: 1']


# -- in the store ----------------------------------------------------------------------------------------------

def test_a_release_carries_the_digest_of_its_payload(store):
    add_nodes(store, 1)
    release = new_release(store, payload=rc.read_payload('{"a":1.10}'))
    assert release.payload == '{"a":1.10}'
    wanted = rc.digest_of(rc.read_payload('{"a":1.10}'))
    assert [release.stored_sha256, store.releases.page().items[0].payload_sha256,
            rc.release_json(release)["payloadSha256"]] == [wanted] * 3
    assert store.releases.page().items[0].payload == ""  # a list reads no payloads


def test_a_payload_written_by_hand_has_its_digest_at_once_and_in_its_row_from_the_claim_on(store):
    add_nodes(store, 1)
    release = new_release(store, payload={"a": 1})
    sql(store, "UPDATE release_tasks SET payload = '{\"a\":2}', payload_sha256 = '' WHERE id = ?", release.id)
    wanted = rc.digest_of({"a": 2})
    assert store.releases.page().items[0].payload_sha256 == store.releases.get(release.id).payload_sha256 == wanted
    sql(store, "UPDATE release_tasks SET payload = '{\"a\":3}' WHERE id = ?", release.id)
    assert store.claims.claim(release.id, "me", 30)
    assert store.releases.get(release.id).stored_sha256 == rc.digest_of({"a": 3})


def test_migrate_fills_the_digests_of_what_is_there(database_url, open_store):
    with at_schema(database_url, rc.DIGEST_SCHEMA - 1) as old:
        for version, payload in enumerate(('{"a":1.10}', "broken"), 1):
            sql(old, "INSERT INTO release_tasks (version, payload) VALUES (?, ?)", version, payload)
    store = open_store(database_url)
    assert [store.releases.get(number).stored_sha256 for number in (1, 2)] == [
        rc.digest_of(rc.read_payload('{"a":1.10}')), ""]


def test_a_release_is_compared_with_the_one_that_succeeded_before_it(store):
    add_nodes(store, 1)
    first = good(store, "A")
    ended(store, "B", "failed")
    good(store, "other", target="dns")
    last = good(store, "C")
    release, other, changes = store.releases.difference(last.id)
    assert (release.id, other.id, list(map(str, changes.changes))) == (last.id, first.id, ['~ $.content: "A" -> "C"'])
    assert store.releases.difference(last.id, 2)[2].changes[0].before == "B"
    assert store.releases.difference(last.id, last.id)[2].total == 0


@pytest.mark.parametrize(("release_id", "other", "code", "text"), [
    (9, None, 3001, "release 9 does not exist"), (1, 9, 3001, "release 9 does not exist"),
    (1, None, 3001, "no release of target cdn before release 1 succeeded"),
    (1, 2, 2003, "release 2 is of target dns, release 1 of target cdn"),
    (1, 3, 3003, "the payload of release 3 can't be used"), (3, 1, 3003, "the payload of release 3 can't be used")])
def test_what_can_not_be_compared_is_said_in_one_line(store, release_id, other, code, text):
    add_nodes(store, 1)
    good(store, "A")
    good(store, "A", target="dns")
    good(store, "A")
    sql(store, "UPDATE release_tasks SET payload = '[1' WHERE id = 3")
    with pytest.raises(rc.AppError, match=text) as caught:
        store.releases.difference(release_id, other)
    assert caught.value.code == code
    assert "\n" not in caught.value.message


@pytest.fixture
def edited(store) -> rc.Store:
    """Return a store whose releases 1 (A) and 2 (B) succeeded, and somebody then wrote another payload into 2."""
    add_nodes(store, 2)
    good(store, "A")
    good(store, "B")
    sql(store, "UPDATE release_tasks SET payload = '{\"content\":\"never sent\"}' WHERE id = 2")
    return store


def test_a_payload_that_was_changed_after_it_went_out_is_never_shown_nor_sent_as_what_went_out(edited):
    releases, text = edited.releases, "the payload of release 2 can't be used: it was changed by hand after it went out"
    for refused in (lambda: rc.stored_payload(releases.get(2)), lambda: releases.difference(2),
                    lambda: releases.difference(1, 2), lambda: releases.rollback(1, "anna", rc.Again("", True, 2))):
        with pytest.raises(rc.AppError, match=text) as caught:
            refused()
        assert caught.value.code == rc.WRONG_STATE
    sql(edited, "UPDATE release_tasks SET status = 'failed' WHERE id = 2")
    sql(edited, "UPDATE release_task_nodes SET status = 'failed' WHERE release_task_id = 2 AND node_id = 2")
    with pytest.raises(rc.AppError, match=text):
        releases.retry(2, "anna")


def test_what_went_out_is_known_by_its_digest_whatever_the_row_says_now(edited):
    plan = edited.releases.plan(rc.ReleaseRequest(payload={"content": "never sent"}))
    assert rc.effect_text(plan.effect) == (
        "not compared against release 2 (v2, 2 of 2 nodes): the payload of release 2 can't be used: it was changed by "
        "hand after it went out")
    made = edited.releases.create(rc.ReleaseRequest(payload={"content": "B"}), "anna")
    assert made.is_unchanged
    settle(edited, made.release, "success", "success")
    for number in (3, 2):  # both are the payload B, which A comes before
        assert edited.releases.plan_again("rollback", number, rc.Again(over_newer=True)).payload_of == (1, 1)


def test_a_paused_release_whose_payload_was_changed_sends_it_to_nobody(world):
    world.nodes(2)
    release = new_release(world.store, payload={"content": "A"}, strategy={"pauseAfter": [1]})
    world.drain()
    digest = world.store.releases.get(release.id).stored_sha256
    sql(world.store, "UPDATE release_tasks SET payload = '{}' WHERE id = ?", release.id)
    world.store.releases.act("resume", release.id, "anna")
    world.drain()
    release = world.store.releases.get(release.id)
    assert (release.status, release.stored_sha256, world.runs()) == ("failed", digest, [1, 0])
    assert "it was changed by hand after it went out" in release.error_msg


def test_a_payload_that_was_changed_before_the_start_is_shown_with_its_own_digest(client):
    add_nodes(client.store, 1)
    new_release(client.store, payload={"content": "A"})
    sql(client.store, "UPDATE release_tasks SET payload = '{\"content\":\"B\"}'")
    assert client.ok("GET", "/api/v1/releases/1/payload") == {
        "releaseId": 1, "version": 1, "payloadSha256": rc.digest_of({"content": "B"}), "payload": {"content": "B"}}


# -- what nodes run, and what a plan says of it ----------------------------------------------------------------

def runs(store: rc.Store, *node_ids: int) -> dict[int, int]:
    with store.database.transaction() as tx:
        found = rc.levels(tx, [node for node in rc.all_nodes(tx) if node.id in node_ids])
    return {node: level.has.release_id if not level.is_unknown else None for node, level in found.items() if level.has}


def test_a_node_runs_the_newest_release_that_succeeded_on_it_of_any_target(store):
    add_nodes(store, 4)
    ended(store, "A", "success", "success", "failed", "skipped")
    ended(store, "B", "success", "failed", "failed", "failed")
    ended(store, "C", "success", target="dns", node_ids=[2])
    assert runs(store, 1, 2, 3, 4) == {1: 2, 2: 3}


def test_a_release_that_started_late_is_newer_than_those_it_let_pass(store):
    add_nodes(store, 3)
    for content in "ABC":
        good(store, content)
    sql(store, "UPDATE release_tasks SET version = 10 WHERE id = 1")
    sql(store, "UPDATE nodes SET last_version = 10 WHERE id <> 2")
    sql(store, "UPDATE release_task_nodes SET status = 'failed' WHERE release_task_id = 1 AND node_id = 2")
    assert runs(store, 1, 2, 3) == {1: 1, 2: 3, 3: 1}


def test_a_plan_says_what_changes_against_what_the_nodes_run(store):
    add_nodes(store, 4)
    good(store, "A", 1)
    good(store, "B", 2, 3)
    plan = store.releases.plan(rc.ReleaseRequest(payload={"content": "C", "more": [1]}))
    assert plan.names == {n: f"edge-{n}" for n in range(1, 5)}
    assert rc.effect_text(plan.effect) == ("2 changes against release 2 (v2, 2 of 4 nodes); 1 node runs release 1; "
                                           "1 node had no release yet: edge-4")
    again = store.releases.plan(rc.ReleaseRequest(payload={"content": "B"}))
    assert rc.effect_text(again.effect) == ("1 change against release 1 (v1, 1 of 4 nodes); 2 nodes run release 2 "
                                            "(the same payload); 1 node had no release yet: edge-4")
    sql(store, "UPDATE release_tasks SET payload = '[1' WHERE id = 2")
    assert "not compared against release 2 (v2, 2 of 4 nodes): the payload of release 2 can't be used" in \
        rc.effect_text(store.releases.plan(rc.ReleaseRequest(payload={"content": "C"})).effect)


def test_a_plan_names_the_nodes_without_a_release_however_many_releases_the_others_run(store):
    add_nodes(store, rc.MAX_RUNNING_NAMED + 3)
    for n in range(1, rc.MAX_RUNNING_NAMED + 3):
        good(store, f"content {n}", n)
    text = rc.effect_text(store.releases.plan(rc.ReleaseRequest(payload={"content": "C"})).effect)
    assert text.endswith("; 1 node runs other releases; 1 node had no release yet: edge-8")


def test_a_release_that_changes_nothing_says_so_and_goes_on(store):
    add_nodes(store, 2)
    good(store, "A")
    request = rc.ReleaseRequest(payload={"content": "A", "version": 2})
    assert rc.effect_text(store.releases.plan(request).effect) == rc.CHANGES_NOTHING + " (release 1)"
    made = store.releases.create(request, "anna")
    assert (made.is_unchanged, made.release.status) == (True, "pending")
    assert rc.CHANGES_NOTHING in store.releases.events(made.release.id)[0].detail
    store.releases.act("cancel", made.release.id, "anna")
    good(store, "B", 1)
    assert store.releases.create(rc.ReleaseRequest(payload={"content": "A"}), "anna").is_unchanged is False


def test_the_plan_of_a_rollback_says_what_it_takes_back(store):
    add_nodes(store, 2)
    good(store, "A")
    bad = ended(store, "B", "success", "failed")
    plan = store.releases.plan_again("rollback", bad.id)
    assert rc.effect_text(plan.effect) == ("1 change against release 2 (v2, 1 of 2 nodes); 1 node runs release 1 "
                                           "(the same payload)")
    assert list(map(str, plan.effect.difference.changes)) == ['~ $.content: "B" -> "A"']


# -- by the API ---------------------------------------------------------------------------------------------------

def test_the_api_gives_back_the_payload_digit_for_digit_but_for_the_version(client):
    add_nodes(client.store, 2)
    raw = '{"payload":{"version":1,"b":0.1234567890123456789,"a":1.10},"strategy":{"soakSec":1.50}}'
    assert client("POST", "/api/v1/releases", raw.encode()).status == 201
    assert client.store.releases.get(1).payload == '{"version":1,"b":0.1234567890123456789,"a":1.10}'
    answer = client("GET", "/api/v1/releases/1/payload")
    assert '"payload":{"b":0.1234567890123456789,"a":1.10}' in answer.text
    assert answer.data["payloadSha256"] == client.store.releases.get(1).payload_sha256
    assert client.store.releases.get(1).strategy == '{"soakSec":1.5}'


def test_payloads_are_read_by_one_client_at_a_time(client, monkeypatch):
    add_nodes(client.store, 1)
    good(client.store, "A")
    monkeypatch.setattr(rc.ReadQueue, "acquire", lambda *_: False)
    for path in ("payload", "diff?with=1"):
        answer = client("GET", f"/api/v1/releases/1/{path}")
        assert (answer.status, answer.code) == (429, rc.TOO_MANY_REQUESTS)


@pytest.mark.parametrize(("protocol", "more"), [("tasks", ""), ("execute", ',"version":1')])
def test_a_payload_is_encoded_once_a_release(world, monkeypatch, protocol, more):
    world.nodes(3, protocol)
    release = new_release(world.store, payload={"websites": [], "a": rc.Number("1.10")})
    encoded, to_json = [], rc.to_json
    monkeypatch.setattr(rc, "to_json", lambda value: encoded.append(text := to_json(value)) or text)
    world.drain()
    assert (world.store.releases.get(release.id).status, world.runs()) == ("success", [1, 1, 1])
    assert [text for text in encoded if "1.10" in text] == [f'{{"websites":[],"a":1.10{more}}}']


def test_the_api_tells_what_a_release_changed(client):
    add_nodes(client.store, 1)
    good(client.store, "A")
    good(client.store, "B")
    for query in ("", "?with=before", "?with=1"):
        assert client.ok("GET", f"/api/v1/releases/2/diff{query}") == {
            "releaseId": 2, "version": 2, "with": {"releaseId": 1, "version": 1}, "total": 1,
            "changes": [{"change": "changed", "path": "$.content", "before": "A", "after": "B"}]}
    assert client.ok("GET", "/api/v1/releases/2/diff?with=2")["total"] == 0
    for path, code in (("2/diff?with=9", 3001), ("9/diff", 3001), ("1/diff", 3001), ("2/diff?with=x", 2002),
                       ("2/diff?other=1", 2003), ("9/payload", 3001)):
        assert client.code("GET", f"/api/v1/releases/{path}") == code
    sql(client.store, "UPDATE release_tasks SET payload = '[]'")
    for path in ("2/payload", "2/diff"):
        assert client.code("GET", f"/api/v1/releases/{path}") == 3003


def test_the_plan_in_the_api_has_the_names_and_what_changes(client):
    add_nodes(client.store, 2)
    good(client.store, "A")
    plan = client.ok("POST", "/api/v1/releases", {"payload": {"content": "B"}, "dryRun": True})
    assert [batch["nodeNames"] for batch in plan["batches"]] == [["edge-1"], ["edge-2"]]
    assert plan["effect"] == {
        "text": "1 change against release 1 (v1, 2 of 2 nodes)", "against": 1, "total": 1,
        "changes": [{"change": "changed", "path": "$.content", "before": "A", "after": "B"}], "openReleases": 0,
        "running": [{"releaseId": 1, "version": 1, "nodes": 2, "same": False}]}


def test_a_key_tells_requests_apart_by_the_digits_of_their_numbers(client):
    add_nodes(client.store, 1)
    codes = [client("POST", "/api/v1/releases", b'{"payload":{"a":%s}}' % number,
                    {"Content-Type": "application/json", "Idempotency-Key": "k"}).code
             for number in (b"1.10", b"1.10", b"1.1")]
    assert codes == [0, 0, 3002]


@pytest.mark.parametrize(("path", "body", "changes_nothing"), [
    ("", {"payload": {"content": "A"}}, True), ("", {"payload": {"content": "B"}}, False),
    ("/2/retry", {}, True), ("/3/retry", {}, False), ("/3/rollback", {"toRelease": 1}, True)])
def test_an_answer_says_whether_what_was_created_changes_anything(client, path, body, changes_nothing):
    add_nodes(client.store, 1)
    good(client.store, "A")
    ended(client.store, "A", "failed")
    ended(client.store, "B", "failed")
    for _ in range(2):  # the same key gets the same answer
        made = client("POST", f"/api/v1/releases{path}", body, {"Content-Type": "application/json",
                                                                "Idempotency-Key": "k"})
        assert (made.data["releaseId"], made.data["changesNothing"]) == (4, changes_nothing)


@pytest.mark.parametrize("path", ["payload", "diff"])
def test_a_viewer_is_shown_no_payload(new_server, path):
    client = new_server()
    for client.token, code in (("viewer-secret", 1004), ("operator-secret", 3001)):
        assert client.code("GET", f"/api/v1/releases/1/{path}") == code


# -- by the command line ------------------------------------------------------------------------------------------

def test_payload_prints_what_create_takes_digit_for_digit(filled_quick):
    text = '{"b":0.1234567890123456789,"a":[1.10,-0]}'
    made = filled_quick.ok("create", "--payload", filled_quick.file("p.json", text), "--json").json["releaseId"]
    out = filled_quick.ok("payload", made).out
    assert rc.to_json(rc.parse_json(out, exact=True)) == text
    again = filled_quick.ok("create", "--payload", filled_quick.file("q.json", out), "--json").json["releaseId"]
    assert filled_quick("diff", again, made).code == 0
    assert f'"payload":{text}' in filled_quick.ok("payload", made, "--json").out
    assert text in filled_quick.store.releases.get(made).payload


def test_diff_ends_with_1_where_something_changed(filled_quick):
    differs = filled_quick("diff", 2)
    assert (differs.code, differs.out) == (1, """\
release 1 (v1) -> release 2 (v2): 1 change
~ $.for: "success" -> "failed"
""")
    assert filled_quick("diff", 3, 2, "--json").json["changes"] == [
        {"change": "changed", "path": "$.for", "before": "failed", "after": "pending"}]
    same = filled_quick("diff", 2, 2)
    assert (same.code, same.out) == (0, "release 2 (v2) -> release 2 (v2): no change\n")
    for arguments in (("diff", 1), ("diff", 99), ("diff", 1, 99), ("payload", 99)):
        assert filled_quick.refused(3, *arguments).count("\n") <= 1


def test_a_rollback_is_compared_with_what_it_rolls_back_and_the_list_says_whose_it_is(quick, open_store):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    add_nodes(store, 2)
    good(store, "A")
    bad = good(store, "B")
    store.releases.rollback(bad.id, "anna", rc.Again(reason="bad config"))
    assert quick("diff", 3).out == 'release 2 (v2) -> release 3 (v3): 1 change\n~ $.content: "B" -> "A"\n'
    assert "bad config (rollback of release 2)" in quick.ok("list").out


def test_create_says_what_it_changes_and_whether_that_is_anything(filled_quick):
    some, same = (filled_quick.file(f"{name}.json", f'{{"for":"{name}"}}') for name in ("other", "success"))
    assert filled_quick.ok("create", "--payload", some, "--plan").out.endswith("""\
1 change against release 1 (v1, 2 of 2 nodes); 1 other release has not ended yet
~ $.for: "success" -> "other"
""")
    assert filled_quick.ok("create", "--payload", same, "--plan").out.endswith(
        f"{rc.CHANGES_NOTHING} (release 1); 1 other release has not ended yet\n")
    assert rc.CHANGES_NOTHING not in filled_quick.ok("create", "--payload", same).out  # release 3 comes before it
    for number in (3, 4):
        filled_quick.ok("cancel", number)
    assert f"\n{rc.CHANGES_NOTHING}\n" in filled_quick.ok("create", "--payload", same).out
    filled_quick.ok("cancel", "latest")
    assert filled_quick.ok("create", "--payload", same, "--json").json["changesNothing"] is True
    assert rc.CHANGES_NOTHING not in filled_quick.ok("create", "--payload", some).out
