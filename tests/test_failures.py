"""Failures by cause: the groups, where they are shown, and the retry of some of the nodes."""
from __future__ import annotations

import json
import random
import re
import time

import pytest
from lab import ADDRESSES, JSON, add_nodes, free_port, misfit, new_release, sql, statuses
from test_again import settle
from test_decision import decide, node
from test_goes_back import last_event, run

import releasectl as rc

IN_USE = "nginx: bind to 0.0.0.0:443 failed (98: Address already in use)"


def failed(number: int, message: str, kind: str = "agent_failed", **fields) -> rc.FailedNode:
    made = rc.FailedNode(number, f"edge-{number}", f"10.0.{number // 250}.{number % 250}",
                         f"apply_config_10.0.{number // 250}.{number % 250}_42_9f3a61c0", kind, message)
    return made._replace(**fields)


def patterns(*messages: str) -> list[str]:
    """Return the patterns of nodes 1, 2, ... with these messages."""
    return [group.pattern for group in rc.group_failures(map(failed, range(1, len(messages) + 1), messages))]


# -- the groups -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("messages", "pattern"), [
    (["boom"], "boom"), ([""], ""), ([IN_USE, IN_USE], IN_USE),
    (["dial tcp 10.0.0.1:8443: refused", "dial tcp 10.0.0.2:8443: refused"], "dial tcp <address>:8443: refused"),
    (["edge-1 is full", "edge-2 is full"], "<name> is full"),
    (["no task apply_config_10.0.0.1_42_9f3a61c0", "no task apply_config_10.0.0.2_42_9f3a61c0"], "no task <task>"),
    (["HTTP 503", "HTTP 503"], "HTTP 503"), (["HTTP 503", "HTTP 504"], "HTTP N"),
    (["HTTP 503 after 12 ms", "HTTP 503 after 9 ms"], "HTTP 503 after N ms"),
    (["took 12ms", "took 9ms"], "took N"), (["x509: expired", "x509: expired"], "x509: expired"),
    (["request 9f3a61c0 lost", "request b2f41d04 lost"], "request N lost"),
    (["sha256 of a1 is b2", "sha256 of a1 is c3"], "sha256 of a1 is N"),
    # a peer's name is no own one
    (["edge-12 is full", "edge-13 is full"], "edge-N is full"), (["edge-10 and edge-1", "edge-10 and edge-2"],
                                                                 "edge-10 and <name>"),
    (["端口443被占用", "端口443被占用"], "端口443被占用"), (["a\0b", "a\0b"], "a b"), (["\ud800 1", "\ud800 2"], "N")])
def test_a_cause_is_the_message_without_what_is_the_nodes_own(messages, pattern):
    assert patterns(*messages) == [pattern]


def test_what_differs_by_more_than_numbers_is_another_cause():
    assert patterns("HTTP 503", "no route to host", "x509: old") == ["HTTP 503", "no route to host", "x509: old"]
    assert len(rc.group_failures([failed(1, "a", "timeout"), failed(2, "a", "http")])) == 2


def test_what_differs_only_far_behind_is_one_cause():
    """The end of a long message was cut off, and where depends on how long the node's own name is."""
    long = [rc.one_line(f"edge-{number}: " + "nothing works " * 30) for number in (1, 23456)]
    groups = rc.group_failures([failed(1, long[0]), failed(23456, long[1])])
    assert [(group.size, len(group.pattern)) for group in groups] == [(2, rc.MAX_PATTERN_CHARS)]


def test_a_line_of_a_group_says_how_many_where_what_and_who():
    labels = [json.dumps({"pop": "gru" if number < 10 else "fra", "role": "cache"}) for number in range(1, 41)]
    found = [failed(number, "no route to host", "unreachable", labels=labels[number - 1]) for number in range(1, 13)]
    [group] = rc.group_failures(found, {labels[0]: 9, labels[39]: 31})
    assert str(group) == "12 unreachable, 9 of 12 in pop=gru: no route to host (edge-1 and 11 more)"
    assert [str(one) for one in rc.group_failures([failed(1, "boom"), failed(2, "", "")])] == [
        "1 other (edge-2)", "1 agent_failed: boom (edge-1)"]


@pytest.mark.parametrize(("ours", "all_nodes", "label"), [
    ("gru " * 9 + "fra " * 3, {"gru": 9, "fra": 31}, ("pop", "gru", 9)),
    ("gru " * 9 + "fra " * 3, {"gru": 13, "fra": 27}, ("pop", "gru", 9)),
    ("gru gru", {"gru": 2, "fra": 38}, ("pop", "gru", 2)),
    ("gru gru gru", {"gru": 4, "fra": 4, "iad": 4}, ("pop", "gru", 3)),  # few, and chance does that in 1 of 55 cases
    ("gru gru gru", {"gru": 3, "fra": 3}, ("pop", "gru", 3)),            # in 1 of 20
    ("gru gru gru", {"gru": 6, "fra": 6}, None),                         # in 1 of 11
    ("gru " * 12, {"gru": 12}, None),                   # all nodes have it
    ("gru " * 9 + "fra " * 3, {"gru": 30, "fra": 10}, None),  # so have three in four
    ("gru gru", {"gru": 20, "fra": 20}, None),          # a coin falls so too
    ("gru " * 5 + "fra " * 5 + "iad " * 5, {"gru": 5, "fra": 5, "iad": 5, "lhr": 900}, None),  # not most of them
    ("gru", {"gru": 1, "fra": 99}, None)])              # one node shares nothing
def test_a_label_is_named_where_most_of_a_group_share_it_by_more_than_chance(ours, all_nodes, label):
    rows = {pop: json.dumps({"pop": pop, "role": "cache"}) for pop in all_nodes}
    found = [failed(number, "x", labels=rows[pop]) for number, pop in enumerate(ours.split(), 1)]
    assert rc.group_failures(found, {rows[pop]: count for pop, count in all_nodes.items()})[0].label == label


@pytest.mark.parametrize("labels", ["", "[]", "{", '{"pop": ["gru"]}', '{"pop": null}', "\ud800"])
def test_labels_that_somebody_wrote_by_hand_stop_nothing(labels):
    found = [failed(number, "x", labels=labels) for number in (1, 2)]
    assert rc.group_failures(found, {labels: 2, '{"pop": "gru"}': 100})[0].size == 2


WORDS = ["HTTP", "503", ":443", "bind", "to", "x509:", "{}", "ms", "9f3a61c0", "deadbeef", "0x7ffe", "é1", "端口",
         "12ms", "fd00::1", "-", "1.5", "\ud800", "\u0663", "a1b2", "C"]


def generated(rng: random.Random) -> list[rc.FailedNode]:
    """Return nodes that failed for a few causes, each message with its own name, address, task or a number in it."""
    causes = [[rng.choice([*WORDS, "OWN", "NUMBER"]) for _ in range(rng.randrange(1, 12))] for _ in range(4)]
    nodes = []
    for number in range(1, rng.randrange(2, 60)):
        made = failed(number, "", rng.choice(["http", "agent_failed", ""]))
        words = [rng.choice([made.name, made.main_ip, made.task_id]) if word == "OWN" else
                 str(rng.randrange(10**6)) if word == "NUMBER" else word for word in rng.choice(causes)]
        nodes.append(made._replace(error_msg=rng.choice([" ", ":", "/"]).join(words)[:255]))
    return nodes


@pytest.mark.parametrize("seed", range(100))
def test_every_failed_node_is_in_one_group_and_the_order_of_rows_does_not_matter(seed):
    rng = random.Random(seed)
    nodes = generated(rng)
    groups = rc.group_failures(nodes)
    assert sum(group.size for group in groups) == len(nodes)
    shown = [group for group in groups if group.kind != rc.OTHERS]
    assert len(shown) <= rc.MAX_GROUPS
    assert groups[len(shown):] == groups[rc.MAX_GROUPS:]
    order = [(-group.size, group.kind) for group in shown]
    assert order == sorted(order)
    by_id = {one.node_id: one for one in nodes}
    assert sorted(node_id for group in groups for node_id in group.ids) == sorted(by_id)
    for group in shown:
        assert list(group.ids) == sorted(group.ids)
        assert list(group.names) == [by_id[node_id].name for node_id in group.ids[:rc.MAX_GROUP_NODES]]
        for node_id in group.ids:
            one = by_id[node_id]
            assert one.error_kind == group.kind
            words = group.pattern.replace("/", " ").replace(":", " ").split()
            assert not {one.name, one.main_ip, one.task_id} & {*words}, "its own"
    rng.shuffle(nodes)
    assert rc.group_failures(nodes) == groups


@pytest.mark.parametrize("seed", range(100))
def test_nodes_with_one_cause_are_in_one_group_whatever_is_their_own(seed):
    rng = random.Random(seed)
    parts = [*WORDS, "<name>", "<address>", "<task>", "NUMBER", "ID"]
    words = [rng.choice(parts) for _ in range(rng.randrange(1, 14))]
    nodes = []
    for number in rng.sample(range(1, 100_000), rng.randrange(2, 9)):
        made = failed(number, "")
        own = {"<name>": made.name, "<address>": made.main_ip, "<task>": made.task_id,
               "NUMBER": str(rng.randrange(10**9)), "ID": f"{rng.getrandbits(32):08x}1"}
        nodes.append(made._replace(error_msg=" ".join(own.get(word, word) for word in words)[:255]))
    assert [group.size for group in rc.group_failures(nodes)] == [len(nodes)]


def test_a_pattern_of_digits_alone_finds_the_numbers_of_a_text():
    rng = random.Random(1)
    for _ in range(20_000):
        text = "".join(rng.choices("ab3x9F0_-. :é端\ud800\u0663g", k=rng.randrange(20)))
        assert rc._fold_ids(rc._fold_digits(text)) == rc._NUMBER.sub("\0", text)


def test_no_more_than_some_groups_are_shown_and_the_others_are_counted():
    nodes = [failed(number, "cause " + "x" * (number % 14)) for number in range(1, 29)]
    groups = rc.group_failures(nodes)
    assert len(groups) == rc.MAX_GROUPS + 1
    assert groups[-1][:2] == (rc.OTHERS, "4 other causes")
    rest = {"cause " + "x" * number for number in range(10, 14)}
    assert list(groups[-1].ids) == [node.node_id for node in nodes if node.error_msg in rest]
    assert str(groups[-1]) == "8 more with 4 other causes"
    [group] = rc.group_failures([failed(number, "x") for number in range(1, 99)])
    assert (len(group.ids), len(group.names)) == (98, rc.MAX_GROUP_NODES)


def hostile(name: str) -> list[str]:
    """Return messages of 100,000 agents that want to be a burden."""
    rng = random.Random(1)
    make = {"refused": lambda number: f"dial tcp 10.0.{number // 250}.{number % 250}:8443: refused, request {number}",
            "all numbers": lambda number: f"{number} " * 40,
            "noise": lambda _: "".join(rng.choices("1a2b 3", k=255)),
            "all different": lambda _: "".join(rng.choices("qwertyuiopklzxcv,;:/ ", k=255)),
            "own names": lambda number: f"edge-{number} 10.0.{number // 250}.{number % 250} " * 15,
            "wide": lambda number: f"端口{number}被占用绑定失败" * 30}[name]
    return [make(number)[:255] for number in range(1, 100_001)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["refused", "all numbers", "noise", "all different", "own names", "wide"])
def test_a_hundred_thousand_failed_nodes_are_grouped_in_about_a_second(name):
    nodes = [failed(number, text) for number, text in enumerate(hostile(name), 1)]
    began = time.thread_time()
    groups = rc.group_failures(nodes, {"{}": len(nodes)})
    assert time.thread_time() - began < 5.0  # 0.3 to 1 s on a host that does nothing else
    assert sum(group.size for group in groups) == len(nodes)


# -- sentences ------------------------------------------------------------------------------------------------

def sentence(*kinds: tuple[str, str], **strategy) -> str:
    """Return the status_reason of a release whose nodes failed in these ways."""
    nodes = [node(number, "failed", error_kind=kind, error_msg=text) for number, (kind, text) in enumerate(kinds, 1)]
    return decide([*nodes, node(len(nodes) + 1, "success")], strategy=rc.Strategy(**strategy)).status_reason


MIXED = [("agent_failed", "bind to :443 in use")] * 3 + [("unreachable", "10.0.0.4: no route to host"), ("timeout", "")]


def test_the_end_of_a_release_says_how_many_failed_of_what():
    assert sentence(*MIXED, max_failed_total=8, max_failed=8) == (
        "finished with 5 failures (limit 8): 3 agent_failed (bind to :443 in use), 1 timeout, 1 unreachable")
    assert sentence(*MIXED) == (
        "stopped, 5 nodes failed: 3 agent_failed (bind to :443 in use), 1 timeout, 1 unreachable; "
        "such as node edge-1 in batch 1")
    assert sentence(*MIXED, max_failed=2).startswith(
        "stopped, 5 nodes of batch 1 failed, at most 2 may: 3 agent_failed (bind to :443 in use), 1 timeout, 1 unreach")
    assert sentence(*MIXED, on_exceed="pause") == (
        "paused after batch 1: 5 nodes of batch 1 failed, at most 0 may: 3 agent_failed (bind to :443 in use), "
        "1 timeout, 1 unreachable; resume and accept the failures, or cancel")


def test_the_end_names_a_node_of_the_largest_cause_and_not_what_failed_first():
    mixed = [("unreachable", "10.0.0.1: no route to host"), *[("agent_failed", "bind to :443 in use")] * 3]
    assert sentence(*mixed) == (
        "stopped, 4 nodes failed: 3 agent_failed (bind to :443 in use), 1 unreachable; such as node edge-2 in batch 1")
    apart = [("timeout", "c"), ("agent_failed", "a is full"), ("agent_failed", "b is gone")]
    assert sentence(*apart).endswith("2 agent_failed, 1 timeout; such as node edge-2 in batch 1: a is full")


def test_the_failures_of_all_batches_are_told_as_such_beside_those_of_the_batch_that_ended_it(store):
    add_nodes(store, 6)
    release = run(store, new_release(store, strategy={"batches": [2], "maxFailed": 1}).id, 1, 3, 4)
    assert release.status_reason.startswith(
        "stopped, 2 nodes of batch 2 failed, at most 1 may; 3 in all: 3 agent_failed (no disk space); "
        "such as node edge-1")


def test_the_end_says_which_label_all_that_failed_share(store):
    gru = [{"name": f"gru-{number}", "main_ip": f"10.9.0.{number}", "labels": '{"pop": "gru", "role": "cache"}'}
           for number in range(1, 4)]
    others = [{"name": f"fra-{number}", "main_ip": f"10.9.1.{number}", "labels": '{"pop": "fra", "role": "cache"}'}
              for number in range(1, 28)]
    store.nodes.import_all([*others, *gru], "anna", False)
    release = run(store, new_release(store, strategy={"batches": [27], "maxFailed": 1}).id, 28, 29, 30)
    assert release.status_reason == (
        "stopped, 3 nodes of batch 2 failed, at most 1 may: 3 agent_failed (no disk space); "
        "such as node gru-1 in batch 2; all 3 in pop=gru")
    again = run(store, new_release(store, strategy={"batches": [30], "maxFailed": 1}).id, 1, 28, 29, 30)
    assert again.status_reason.endswith("; such as node fra-1 in batch 1; 3 of 4 in pop=gru")
    assert run(store, new_release(store, strategy={"batches": [30], "maxFailed": 9}).id, 1, 2, 3).status_reason == (
        "finished with 3 failures (limit 9 in a batch): 3 agent_failed (no disk space)")


def test_the_history_and_a_notification_tell_the_end_as_the_release_does(store):
    store.database.notify_on = frozenset(("failed",))
    add_nodes(store, 3)
    release = run(store, new_release(store, strategy={"batches": ["100%"]}).id, 1, 2)
    assert release.status_reason.startswith("stopped, 2 nodes failed: 2 agent_failed (no disk space); such as node")
    assert last_event(store, release).detail == release.status_reason
    with store.database.transaction() as tx:
        assert tx.rows("SELECT detail FROM notifications") == [(release.status_reason,)]


def test_a_single_failure_is_told_as_before():
    assert sentence(("agent_failed", "boom")) == "stopped by node edge-1 in batch 1: boom"


def test_a_cause_is_named_where_most_of_the_first_kind_have_it():
    some = [("agent_failed", "a"), ("agent_failed", "a"), ("agent_failed", "b"), ("timeout", "c")]
    assert "3 agent_failed (2 of them: a, 1: b), 1 timeout" in sentence(*some)
    assert "5 agent_failed (3 of them: a, 2 for other reasons), 1 timeout" in sentence(
        ("agent_failed", "a"), ("agent_failed", "c"), *some)
    assert "2 agent_failed, 1 timeout;" in sentence(*some[1:])


def test_where_a_second_cause_finds_no_room_it_is_counted_and_nothing_after_it_is_cut():
    first, second = f"nginx: invalid port in {'x' * 72}", f"nginx: no space left on {'y' * 70}"
    text = sentence(*[("agent_failed", first)] * 6, *[("agent_failed", second)] * 2)
    assert f"8 agent_failed (6 of them: {first}, 2 for other reasons); such as node edge-1 in batch 1" in text
    assert len(text) <= rc.MAX_MESSAGE_CHARS
    # there a label would cut the example, which the table of failures names too
    assert sentence(*[("agent_failed", first)] * 6, *[("agent_failed", second)] * 2, max_failed=5) == (
        f"stopped, 8 nodes of batch 1 failed, at most 5 may: 8 agent_failed (6 of them: {first}, 2 for other reasons)")


def test_a_second_cause_without_room_is_told_by_what_fails_on_its_host():
    first, second = f"nginx: invalid port in {'x' * 72}", f"write /etc/{'y' * 58}: no space left on device"
    assert f"8 agent_failed (6 of them: {first}, 2: no space left on device); such as node edge-1" in sentence(
        *[("agent_failed", first)] * 6, *[("agent_failed", second)] * 2)
    some = [("agent_failed", "a"), ("agent_failed", "a"), ("agent_failed", "write /x: no space left on device")]
    assert "3 agent_failed (2 of them: a, 1: write /x: no space left on device)" in sentence(*some)
    late = sentence(*[("agent_failed", f"write {'/z' * 60}: no space left on device")] * 2)
    assert re.search(r"2 agent_failed \(write (/z)+\S*: no space left on device\);", late)


@pytest.mark.parametrize(("kind", "message", "hint"), [
    ("agent_failed", "write /etc/x: No space left on device", rc.HOST_HINT),
    ("agent_failed", "open /etc/x: read-only file system", rc.HOST_HINT),
    ("agent_failed", "write: disk quota exceeded", rc.HOST_HINT),
    ("agent_failed", "read: input/output error", rc.HOST_HINT),
    ("agent_failed", "mmap() failed (12: Cannot allocate memory)", rc.ERROR_HINTS["agent_failed"]),
    ("agent_failed", "nginx: [emerg] invalid port", rc.ERROR_HINTS["agent_failed"]),
    ("unreachable", "no space left on device", rc.ERROR_HINTS["unreachable"]), ("", "no space left on device", "")])
def test_advice_is_for_the_host_where_that_is_what_fails(kind, message, hint):
    assert rc.hint_for(kind, message) == hint
    group = rc.FailureGroup(kind, message, [1], ["edge-1"])
    assert [one["hint"] for one in rc.failures_json([group])] == [hint]


def test_error_msg_names_the_first_failed_node_as_ever():
    nodes = [node(number, "failed", error_kind=kind, error_msg=text) for number, (kind, text) in enumerate(MIXED, 1)]
    assert decide(nodes).error_msg == "node edge-1: bind to :443 in use"


# -- where they are shown ------------------------------------------------------------------------------------------

# kind and message of nodes 1 to 6; 7 and 8 were skipped, 9 to 40 succeeded.
ENDS = [*[("agent_failed", "bind to :443 in use")] * 3, *[("unreachable", "connect: no route to host")] * 2,
        ("timeout", "")]


def failing(store: rc.Store) -> rc.Release:
    """Make a release to 40 nodes of which 6 failed and 2 were skipped."""
    store.nodes.import_all([
        {"name": f"edge-{number}", "main_ip": f"10.9.0.{number}",
         "labels": json.dumps({"pop": "gru" if number in (1, 2, 3) else "fra", "role": "cache"})}
        for number in range(1, 41)], "anna", False)
    release = settle(store, new_release(store), *["failed"] * 6, "skipped", "skipped", *["success"] * 32)
    for number, (kind, text) in enumerate(ENDS, 1):
        sql(store, "UPDATE release_task_nodes SET error_kind = ?, error_msg = ? WHERE node_id = ?", kind, text, number)
    return release


FAILURES = [
    {"errorKind": "agent_failed", "message": "bind to :443 in use", "nodes": 3, "nodeIds": [1, 2, 3],
     "nodeNames": ["edge-1", "edge-2", "edge-3"], "label": {"key": "pop", "value": "gru", "nodes": 3}},
    {"errorKind": "unreachable", "message": "connect: no route to host", "nodes": 2, "nodeIds": [4, 5],
     "nodeNames": ["edge-4", "edge-5"], "label": None},
    {"errorKind": "timeout", "message": "", "nodes": 1, "nodeIds": [6], "nodeNames": ["edge-6"], "label": None}]
for _group in FAILURES:
    _group["hint"] = rc.ERROR_HINTS[str(_group["errorKind"])]
LINES = ["3 agent_failed, 3 of 3 in pop=gru: bind to :443 in use (edge-1 and 2 more)",
         "2 unreachable: connect: no route to host (edge-4 and 1 more)", "1 timeout (edge-6)"]


def test_the_api_has_the_failures_of_a_release_by_cause(client, store):
    release = failing(store)
    document = rc.openapi_document()
    for view in ("", "?view=summary"):
        answer = client.ok("GET", f"/api/v1/releases/{release.id}{view}")
        assert answer["failures"] == FAILURES
        assert misfit(answer, document["components"]["schemas"]["ReleaseWithNodes"], document) == ""
    assert client.ok("GET", f"/api/v1/releases/{new_release(store).id}")["failures"] == []


def test_a_whole_release_has_all_nodes_of_each_cause_and_a_summary_the_first(client, store):
    store.nodes.import_all([{"name": f"edge-{n}", "main_ip": f"10.9.0.{n}"} for n in range(1, 71)], "anna", False)
    release = settle(store, new_release(store), *["failed"] * 70)
    for number in range(1, 71):  # 30 with one cause, and one more cause than is shown of the others
        sql(store, "UPDATE release_task_nodes SET error_kind = 'agent_failed', error_msg = ? WHERE node_id = ?",
            "full" if number <= 30 else "cause " + "x" * (number % (rc.MAX_GROUPS + 1)), number)
    whole = client.ok("GET", f"/api/v1/releases/{release.id}")["failures"]
    assert sorted(node_id for group in whole for node_id in group["nodeIds"]) == list(range(1, 71))
    assert all(len(group["nodeIds"]) == group["nodes"] for group in whole)
    summary = client.ok("GET", f"/api/v1/releases/{release.id}?view=summary")["failures"]
    assert [len(group["nodeIds"]) for group in summary if group["nodes"] == 30] == [rc.MAX_GROUP_NODES]
    assert [{**group, "nodeIds": []} for group in summary] == [{**group, "nodeIds": []} for group in whole]
    assert whole[-1]["errorKind"] == rc.OTHERS


def test_status_and_watch_have_a_line_for_each_cause(quick, open_store):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    release = failing(store)
    shown = [line.strip() for line in quick.ok("status", str(release.id)).out.splitlines()]
    first = shown.index(LINES[0])
    assert shown[first:first + 3] == LINES
    assert shown[first + 3].startswith("BATCH")
    assert quick.ok("status", str(release.id), "--json").json["failures"] == FAILURES
    groups = store.releases.progress(release.id).failures
    assert [line.strip() for line in rc.cause_lines(groups, rc.Display())] == LINES
    assert rc.cause_lines(groups, rc.Display(), 1)[1:] == ["  and 3 more with other causes"]


@pytest.mark.parametrize("columns", [20, 40, 70, 80, 200])
def test_where_there_is_little_room_the_message_is_cut_and_no_name(columns):
    [group] = rc.group_failures([failed(number, IN_USE * 2) for number in (1, 2)])
    lines = rc.cause_lines([group], rc.Display(columns))
    assert "(edge-1 and 1 more)" in " ".join(line.strip() for line in lines)
    assert max(map(len, lines)) < columns
    assert (len(lines) == 1) == (columns >= 70)


def test_agents_that_fail_for_one_cause_are_one_group_and_only_those_are_tried_again(world):
    world.nodes(4)
    for number in (1, 2, 3):
        world.agent(number).set(outcome="failed", message=f"{ADDRESSES[number - 1]}: bind to :443 in use, pid {number}")
    world.store.nodes.update(4, {"agent_port": free_port(ADDRESSES[3])})
    strategy = {"batches": ["100%"], "maxFailed": 9}
    release = new_release(world.store, strategy=strategy)
    world.drain(AGENT_RETRIES=0)
    release, groups = world.store.releases.with_failures(release.id)
    assert [(group.kind, group.size) for group in groups] == [("agent_failed", 3), ("unreachable", 1)]
    assert groups[0].pattern == "<address>: bind to :443 in use, pid N"
    assert release.status_reason == ("finished with 4 failures (limit 9 in a batch): 3 agent_failed "
                                     "(<address>: bind to :443 in use, pid N), 1 unreachable")
    for number in (1, 2, 3):
        world.agent(number).set(outcome="success", message="")
    made = world.store.releases.retry(release.id, "anna", rc.Again(kinds=["agent_failed"])).release
    world.drain()
    assert statuses(world.store, made.id) == ["success"] * 3


def test_a_large_release_is_not_grouped_again_and_again(sqlite_url, open_store, monkeypatch):
    store = open_store(sqlite_url)
    release = failing(store)
    sql(store, "UPDATE release_tasks SET total_nodes = ?", rc.SMALL_RELEASE_NODES + 1)
    times, real = [], rc.read_failures
    monkeypatch.setattr(rc, "read_failures", lambda *what: times.append(1) or real(*what))
    monkeypatch.setattr(rc, "RARE_READ_REST", 1e6)
    found = [store.releases.with_failures(release.id)[1] for _ in range(3)]
    assert (len(times), [str(group) for group in found[2]]) == (1, LINES)
    sql(store, "UPDATE release_tasks SET status = 'partial'")  # its end is always told
    store.releases.progress(release.id)
    assert len(times) == 2


def test_the_labels_of_a_large_release_are_counted_once_a_minute_and_only_where_nodes_that_failed_have_any(
        sqlite_url, open_store, monkeypatch):
    store = open_store(sqlite_url)
    release = failing(store)
    labels = {node.id: node.labels for node in store.nodes.page(size=0).items}
    sql(store, "UPDATE release_tasks SET total_nodes = ?", rc.SMALL_RELEASE_NODES + 1)
    sql(store, "UPDATE nodes SET labels = '{}'")
    monkeypatch.setattr(rc, "RARE_READ_REST", 0)
    asked, rows = [], rc.Transaction.rows
    monkeypatch.setattr(rc.Transaction, "rows", lambda tx, statement, *params: asked.append(
        "GROUP BY h.labels" in statement) or rows(tx, statement, *params))
    assert [group.label for group in store.releases.with_failures(release.id)[1]] == [None] * len(LINES)
    assert not any(asked)
    for node_id, text in labels.items():
        sql(store, "UPDATE nodes SET labels = ? WHERE id = ?", text, node_id)
    found = [[str(group) for group in store.releases.with_failures(release.id)[1]] for _ in range(3)]
    assert (found, sum(asked)) == ([LINES] * 3, 1)


# -- retry of some ------------------------------------------------------------------------------------------------

RETRIES = [({"kinds": ["unreachable"]}, [4, 5], 6), ({"kinds": ["unreachable", "timeout"]}, [4, 5, 6], 5),
           ({"nodeIds": [7, 1]}, [1, 7], 6), ({"kinds": ["agent_failed"], "nodeIds": [2, 4]}, [2], 7),
           ({}, [1, 2, 3, 4, 5, 6, 7, 8], 0)]


@pytest.mark.parametrize(("chosen", "node_ids", "others"), RETRIES)
def test_a_retry_takes_only_the_chosen_nodes(client, store, chosen, node_ids, others):
    release = failing(store)
    plan = client.ok("POST", f"/api/v1/releases/{release.id}/retry", {**chosen, "dryRun": True})
    assert sorted(sum((batch["nodeIds"] for batch in plan["batches"]), [])) == node_ids
    assert (plan["notChosen"], plan["leftOut"], store.releases.page().total) == (others, [], 1)
    made = client.ok("POST", f"/api/v1/releases/{release.id}/retry", chosen, status=201)
    assert sorted(sum((batch["nodeIds"] for batch in made["batches"]), [])) == node_ids
    assert made["leftOut"] == []


def test_a_chosen_node_that_gets_no_releases_is_left_out_by_name(client, store):
    release = failing(store)
    store.nodes.update(4, {"enabled": 0})
    plan = client.ok("POST", f"/api/v1/releases/{release.id}/retry", {"kinds": ["unreachable"], "dryRun": True})
    assert plan["leftOut"] == [{"nodeId": 4, "nodeName": "edge-4", "why": "disabled"}]
    assert plan["notChosen"] == 6


@pytest.mark.parametrize(("chosen", "words"), [
    ({"kinds": ["tls"]}, "no node failed as tls; kinds: 3 agent_failed, 2 unreachable, 1 timeout"),
    ({"kinds": ["timeuot"]}, "timeuot is no kind of failure (did you mean timeout?)"),
    ({"kinds": []}, "kinds must be a list of unreachable"), ({"kinds": "tls"}, "kinds must be a list"),
    ({"kinds": [7]}, "7 is no kind of failure"), ({"kinds": [None]}, "None is no kind of failure"),
    ({"nodeIds": [9]}, "node edge-9 was neither failed nor skipped in release 1; failed or skipped: edge-1, edge-2"),
    ({"nodeIds": [99]}, "node 99 was neither failed nor skipped"), ({"nodeIds": []}, "nodeIds must be a list"),
    ({"kinds": ["timeout"], "nodeIds": [1]}, "none of these nodes failed as timeout; kinds: 3 agent_failed")])
def test_a_choice_that_fits_nobody_is_refused_with_what_there_is(client, store, chosen, words):
    release = failing(store)
    for more in ({}, {"dryRun": True}):
        answer = client("POST", f"/api/v1/releases/{release.id}/retry", {**chosen, **more})
        assert answer.code == 2003
        assert words in answer.message
    assert store.releases.page().total == 1


def test_the_nodes_that_were_not_chosen_are_behind_once_the_retry_has_succeeded(store):
    release = failing(store)
    retry = store.releases.retry(release.id, "anna", rc.Again(kinds=["agent_failed"])).release
    settle(store, retry, "success", "success", "success")
    drift = {one.node.id: one.level.drift for one in store.fleet.page(size=0).items}
    assert [drift[number] for number in (1, 2, 3, 7, 8, 40)] == ["none", "none", "none", "behind", "behind", "none"]


def test_a_rollback_takes_no_kinds(client, store):
    release = failing(store)
    assert client.code("POST", f"/api/v1/releases/{release.id}/rollback", {"kinds": ["tls"]}) == 2003


def test_the_same_key_gives_the_same_retry_and_another_choice_is_refused(client, store):
    place, key = f"/api/v1/releases/{failing(store).id}/retry", {**JSON, "Idempotency-Key": "night"}
    first, again = (client("POST", place, {"kinds": ["timeout"]}, key).data for _ in range(2))
    assert first == again
    assert client("POST", place, {"kinds": ["unreachable"]}, key).code == 3002


@pytest.mark.parametrize(("words", "node_ids"), [
    (["--kind", "unreachable"], [4, 5]), (["--kind", "unreachable,timeout"], [4, 5, 6]),
    (["--node", "edge-1", "--node", "edge-7"], [1, 7]), (["--node", "edge-[1-5]", "--kind", "unreachable"], [4, 5]),
    (["--node", "*"], [1, 2, 3, 4, 5, 6, 7, 8]), (["--label", "pop=gru"], [1, 2, 3]),
    (["--label", "pop!=gru", "--exclude", "edge-8"], [4, 5, 6, 7]),
    (["--label", "pop=fra,gru", "--kind", "unreachable", "--exclude", "edge-[4x]"], [5])])
def test_retry_takes_kinds_and_the_words_that_choose_nodes(quick, open_store, words, node_ids):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    release = failing(store)
    plan = quick.ok("retry", str(release.id), *words, "--plan")
    left = f"failed or skipped, and not chosen: {8 - len(node_ids)}"
    assert (left in plan.out) == (len(node_ids) < 8)
    quick.ok("retry", str(release.id), *words)
    assert sorted(one.node_id for one in store.releases.with_nodes(2)[1]) == node_ids


@pytest.mark.parametrize(("words", "message"), [
    (["--kind", "tls"], "no node failed as tls; kinds: 3 agent_failed, 2 unreachable, 1 timeout"),
    (["--kind", "tsl"], "tsl is no kind of failure (did you mean tls?)"), (["--kind", ""], "is no kind of failure"),
    (["--node", "edge-9"], "node edge-9 was neither failed nor skipped in release 1"),
    (["--node", "edge-1", "--node", "pop-*"], "node pop-* was neither failed nor skipped in release 1"),
    (["--label", "pop=ams"], "no node matches pop=ams (values of pop: fra, gru), of those that failed or were skipped"),
    (["--label", "pop=gru", "--kind", "timeout"], "none of these nodes failed as timeout; kinds: 3 agent_failed")])
def test_retry_refuses_by_name(quick, open_store, words, message):
    failing(open_store(f"sqlite:///{quick.folder}/releasectl.db"))
    refused = quick("retry", "1", *words)
    assert refused.code == 2
    assert message in refused.err
