"""Rollouts as a CDN does them: batches by label, limits for each value of one, and who is chosen (section 7)."""
from __future__ import annotations

import collections
import random
import re
from typing import Any

import contract
import pytest
from conftest import on_sqlite
from lab import eventually, fleet, mtls, new_release, sql
from test_decision import NOW, POLICY, decide, later, node, release, sends

import releasectl as rc

REGIONS = ["ap", "eu", "us"]


def batches(strategy: dict[str, object], nodes: list[rc.Node]) -> list[tuple[str, list[int]]]:
    plan = rc.make_plan(rc.parse_strategy(strategy), nodes)
    return list(zip(plan.groups, plan.batches))


def sizes(strategy: dict[str, object], count: int) -> list[int]:
    return [len(batch) for batch in rc.make_plan(rc.parse_strategy(strategy), fleet(count)).batches]


# -- batches -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("given", "count", "expected"), [
    (["20*"], 2000, [20] * 100), (["20*"], 50, [20, 20, 10]), ([1, "20*"], 50, [1, 20, 20, 9]),
    (["10%*"], 19, [1] * 19), (["30%*"], 10, [3, 3, 3, 1]), (["100%*"], 7, [7]), (["20*"], 5, [5]),
    ([5, "3*"], 4, [4]), ([20], 2000, [20, 1980])])
def test_a_size_with_a_star_goes_on_to_the_end(given, count, expected):
    assert sizes({"batches": given}, count) == expected


def test_batches_go_by_label_after_the_first_ones_and_those_without_it_come_last():
    labels: dict[int, dict[str, str]] = {
        1: {"region": "us"}, 2: {"region": "eu", "role": "canary"}, 3: {}, 4: {"region": "eu"},
        5: {"region": "ap", "role": "canary"}, 6: {"region": "eu"}, 7: {"region": ""}}
    nodes = fleet(7, lambda n: labels[n])
    assert batches({"batchBy": "region"}, nodes) == [
        ("region=", [7]), ("region=ap", [5]), ("region=eu", [2, 4, 6]), ("region=us", [1]), ("no region", [3])]
    assert batches({"batchBy": "region", "first": {"role": "canary"}, "batches": [1]}, nodes) == [
        ("first", [2, 5]), ("region=", [7]), ("region=eu", [4]), ("region=eu", [6]), ("region=us", [1]),
        ("no region", [3])]
    assert batches({"first": {"region": ["ap", "us"]}}, nodes) == [("first", [1, 5]), ("others", [2, 3, 4, 6, 7])]
    assert batches({"first": {"region": "eu", "role": "canary"}, "batches": ["2*"]}, nodes) == [
        ("first", [2]), ("others", [1, 3]), ("others", [4, 5]), ("others", [6, 7])]
    # a retry after the canary succeeded
    assert batches({"first": {"role": "canary"}}, [nodes[0], *nodes[2:4]]) == [("others", [1]), ("others", [3, 4])]


def test_values_with_numbers_come_in_the_order_of_these():
    values = ["r11", "r2", "r1", "r02", "a", "r1-10", "r1-9"]
    found = batches({"batchBy": "region"}, fleet(len(values), lambda n: {"region": values[n - 1]}))
    assert [name for name, _ in found] == [f"region={value}" for value in [
        "a", "r1", "r1-9", "r1-10", "r02", "r2", "r11"]]


def test_a_share_is_of_the_nodes_that_it_cuts():
    nodes = fleet(40, lambda n: {"region": "eu" if n > 10 else "ap"})
    assert [len(batch) for _, batch in batches({"batchBy": "region", "batches": ["10%", "50%*"]}, nodes)] == [
        1, 5, 4, 3, 15, 12]


def random_fleet(chance: random.Random) -> list[rc.Node]:
    keys = ["region", "rack", "role"]
    labels = [{key: f"{key}-{chance.randrange(6)}" for key in keys if chance.random() < 0.8} for _ in range(20)]
    return fleet(chance.randint(1, 120), lambda _: chance.choice(labels))


@pytest.mark.parametrize("seed", range(200))
def test_every_node_is_in_one_batch_and_they_are_in_the_order_as_written(seed):
    chance = random.Random(seed)
    nodes = random_fleet(chance)
    key = chance.choice(["region", "rack", ""])
    firsts: list[dict[str, Any]] = [
        {}, {"role": "role-1"}, {"role": ["role-1", "role-2"], "region": "region-3"}]
    first = chance.choice(firsts)
    given = chance.choice([None, [1], [2, "3*"], ["25%*"], ["50%", 1], ["100%"]])
    strategy: dict[str, object] = {
        name: value for name, value in (("batchBy", key), ("first", first), ("batches", given)) if value}
    found = batches(strategy, nodes)

    assert sorted(id_ for _, batch in found for id_ in batch) == [n.id for n in nodes]
    assert all(batch for _, batch in found)
    labels = {n.id: rc.parse_json(n.labels) for n in nodes}

    def is_first(node_id: int) -> bool:
        return bool(first) and all(labels[node_id].get(name) in ([some] if isinstance(some, str) else some)
                                   for name, some in first.items())

    expected: list[list[int]] = [[n.id for n in nodes if is_first(n.id)]]
    rest = [n.id for n in nodes if not is_first(n.id)]
    for value in sorted({labels[id_].get(key) for id_ in rest}, key=lambda v: (v is None, v or "")) if key else [None]:
        members = [id_ for id_ in rest if not key or labels[id_].get(key) == value]
        # without any of first one node of the first batch goes alone, as it does where nobody said a word
        cuts = given or ([1] if len(expected) == 1 and not expected[0] and (first or not key) else [])
        while cuts and members:
            size, total = cuts[0], len([id_ for id_ in rest if not key or labels[id_].get(key) == value])
            number = str(size).rstrip("*")
            count = max(1, total * int(number[:-1]) // 100) if number.endswith("%") else int(number)
            expected.append(members[:count])
            members = members[count:]
            cuts = cuts if str(size).endswith("*") else cuts[1:]
        expected.append(members)
    assert [batch for _, batch in found] == [batch for batch in expected if batch]


def test_a_thousand_regions_are_a_thousand_batches_and_too_many_are_refused():
    regions = fleet(3000, lambda n: {"region": f"r{n % 1000:03}"})
    assert len(batches({"batchBy": "region"}, regions)) == 1000
    with pytest.raises(rc.AppError, match=r"strategy: batches are 10001, and at most 10000 can be: name larger sizes"):
        batches({"batches": ["1*"]}, fleet(10_001))


def test_a_large_last_batch_is_told_of_and_what_would_cut_it(store, quick):
    plan = rc.make_plan(rc.parse_strategy({"batches": [20]}), fleet(2000))
    assert plan.warnings == [
        'the last batch has 1980 of 2000 nodes: a last size with a * goes on to the end, like "20*"']
    for strategy, count in (({"batches": ["20*"]}, 2000), ({"batches": [20]}, 70), ({"batches": ["50%"]}, 200),
                            ({"batches": ["100%"]}, 200), ({"batches": [1, "100%"]}, 200),
                            ({"batches": [1, 199]}, 200)):
        assert rc.make_plan(rc.parse_strategy(strategy), fleet(count)).warnings == [], strategy
    # the batches of a rollback are those of its release: nobody chose them now
    assert rc.make_plan(rc.NO_STRATEGY, fleet(200), batches=[[1], list(range(2, 201))]).warnings == []
    store.nodes.import_all([{"name": f"n-{n}", "main_ip": f"10.0.0.{n}"} for n in range(1, 61)])
    key = rc.IdempotencyKey("anna", "key", "digest")
    made = store.releases.create(rc.ReleaseRequest(), "anna", key)
    assert [text[:38] for text in made.warnings] == ["the last batch has 59 of 60 nodes: a l"]
    assert rc.created_json(made)["warnings"] == list(made.warnings)
    assert store.releases.create(rc.ReleaseRequest(), "anna", key).warnings == list(made.warnings)


def test_a_start_that_is_over_is_told_when_the_release_is_made(store):
    store.nodes.add(name="n-1", main_ip="10.0.0.1")
    past, ahead = "2020-01-01T00:00:00.000Z", "2199-01-01T00:00:00.000Z"
    made = store.releases.create(rc.ReleaseRequest(strategy={"startAt": past}), "anna")
    assert made.warnings == [f"startAt {past} is over: it starts as soon as it can"]
    assert store.releases.create(rc.ReleaseRequest(strategy={"startAt": ahead}), "anna").warnings == []


# -- what can't be meant ---------------------------------------------------------------------------

@on_sqlite
@pytest.mark.parametrize(("strategy", "named"), [
    ({"batches": ["20*", 5]}, "batches"), ({"batches": ["*"]}, "batches"), ({"batches": ["0*"]}, "batches"),
    ({"batches": ["020*"]}, "batches"), ({"batches": ["101%*"]}, "batches"), ({"batches": ["20**"]}, "batches"),
    ({"batchBy": ""}, "batchBy"), ({"batchBy": ["region"]}, "batchBy"), ({"batchBy": "x" * 64}, "batchBy"),
    ({"batchBy": "regoin"}, "batchBy: no node has the label regoin (did you mean region?); labels: rack, region"),
    ({"first": {}}, "first"), ({"first": {"region": []}}, "first"), ({"first": {"region": 1}}, "first"),
    ({"first": {"region": ["eu", "eu"]}}, "first"), ({"first": "canary"}, "first"), ({"first": {"": "x"}}, "first"),
    ({"first": {"region": "mars"}}, "first: no node of the release matches region=mars (values of region: eu)"),
    ({"maxParallelPer": {}}, "maxParallelPer"), ({"maxParallelPer": {"rack": 0}}, "maxParallelPer"),
    ({"maxParallelPer": {"rack": "10%"}}, "maxParallelPer"), ({"maxParallelPer": {"rack": True}}, "maxParallelPer"),
    ({"maxParallelPer": ["rack"]}, "maxParallelPer"), ({"maxParallelPer": {"row": 1}}, "maxParallelPer: no node has"),
    ({"batchby": "region"}, "batchby is not a known key (did you mean batchBy?)")])
def test_what_can_not_be_meant_is_refused_by_the_keys_name(store, strategy, named):
    store.nodes.add("edge-1", "10.0.0.1", labels='{"region":"eu","rack":"a"}')
    with pytest.raises(rc.AppError) as error:
        new_release(store, strategy=strategy)
    assert error.value.code == 2003
    assert f"strategy: {named}" in error.value.message
    assert store.releases.page().total == 0


def test_a_retry_of_nodes_among_which_no_first_one_is_is_no_error(store):
    for number, role in enumerate(["canary", "edge", "edge"], 1):
        store.nodes.add(f"edge-{number}", f"10.0.0.{number}", labels=rc.to_json({"role": role}))
    made = new_release(store, strategy={"first": {"role": "canary"}, "batchBy": "role", "pauseAfter": [1, 2]})
    sql(store, "UPDATE release_task_nodes SET status = CASE WHEN node_id = 1 THEN 'success' ELSE 'failed' END")
    sql(store, "UPDATE release_tasks SET status = 'failed'")
    again = store.releases.retry(made.id, "anna")
    assert again.batches == [[2], [3]]
    assert rc.parse_json(again.release.strategy)["pauseAfter"] == [1, 2]
    sql(store, "UPDATE release_task_nodes SET status = 'success', attempts = 1 WHERE release_task_id = ?", made.id)
    with pytest.raises(rc.AppError, match="nothing to roll back to"):
        store.releases.rollback(made.id, "anna")


def test_a_rollback_keeps_the_batches_by_label_and_the_limits(store):
    for number, region in enumerate(["us", "eu", "us"], 1):
        store.nodes.add(f"edge-{number}", f"10.0.0.{number}", labels=rc.to_json({"region": region}))
    for content, strategy in (("A", {}), ("B", {"batchBy": "region", "first": {"region": "us"},
                                                "maxParallelPer": {"region": 1}})):
        made = new_release(store, payload={"content": content}, strategy=strategy)
        sql(store, "UPDATE release_task_nodes SET status = 'success', attempts = 1")
        sql(store, "UPDATE release_tasks SET status = 'success', started_at = created_at, success_nodes = 3")
    back = store.releases.rollback(made.id, "anna")
    assert back.batches == [[1, 3], [2]]
    assert rc.parse_json(back.release.strategy) == {"maxParallelPer": {"region": 1}, "batches": [2]}


# -- a limit for each value of a label ---------------------------------------------------------------

def in_rack(node_id: int, rack: str, status: str = "pending", batch: int = 1, **fields) -> rc.ReleaseNode:
    return node(node_id, status, batch, labels=rc.to_json({"rack": rack}), **fields)


PER_RACK = rc.Strategy(max_parallel_per={"rack": 1})


def test_no_more_than_that_of_a_rack_are_in_flight_and_a_hung_node_keeps_its_place():
    nodes = [in_rack(1, "a", "running", in_flight=True), in_rack(2, "a"), in_rack(3, "b"), in_rack(4, "b"),
             in_rack(5, "c", "running", due=NOW.elapsed + 9), in_rack(6, "c"), node(7), node(8)]
    assert sends(decide(nodes, strategy=PER_RACK)) == [("dispatch", 3), ("dispatch", 7), ("dispatch", 8)]
    two = rc.Strategy(max_parallel_per={"rack": 2})
    assert sorted(sends(decide(nodes, strategy=two))) == [("dispatch", n) for n in (2, 3, 4, 6, 7, 8)]


def test_all_limits_hold_at_once_also_beside_max_parallel_and_the_slots_of_the_process():
    nodes = [node(n, labels=rc.to_json({"rack": f"r{n % 4}", "region": "eu" if n % 4 < 2 else "us"}))
             for n in range(1, 17)]
    both = rc.Strategy(max_parallel_per={"rack": 2, "region": 3})
    sent = [n for _, n in sends(decide(nodes, strategy=both))]
    assert collections.Counter(n % 4 < 2 for n in sent) == {True: 3, False: 3}
    assert max(collections.Counter(n % 4 for n in sent).values()) == 2
    assert len(sends(decide(nodes, strategy=both._replace(max_parallel=4)))) == 4
    assert len(sends(decide(nodes, strategy=both, slots=2))) == 2
    assert sends(decide(nodes, strategy=both, slots=0)) == []


def test_racks_take_turns():
    strategy = rc.Strategy(max_parallel_per={"rack": 1}, max_parallel=1)
    nodes = [in_rack(n, "a" if n < 6 else "b") for n in range(1, 8)]
    order = []
    while any(n.status == "pending" for n in nodes):
        [(_, node_id)] = sends(decide(nodes, strategy=strategy))
        order.append(node_id)
        nodes[node_id - 1] = in_rack(node_id, "a" if node_id < 6 else "b", "success")
    assert order == [1, 6, 2, 7, 3, 4, 5]


def test_a_node_at_work_that_the_database_has_lost_and_one_that_may_be_busy_keep_their_place():
    lost = [in_rack(1, "a", in_flight=True), in_rack(2, "a")]
    assert sends(decide(lost, strategy=PER_RACK)) == []
    busy = in_rack(1, "a", "failed", protocol="execute", hold_until=later(9).text)
    tolerant = PER_RACK._replace(max_failed=1)
    assert sends(decide([busy, in_rack(2, "a")], strategy=tolerant)) == []
    assert sends(decide([busy, in_rack(2, "a")], strategy=tolerant, now=later(9))) == [("dispatch", 2)]
    # a hold that no setting allows is of a clock that was ahead, and void
    ahead = in_rack(1, "a", "failed", protocol="execute", hold_until=later(1e6).text)
    assert sends(decide([ahead, in_rack(2, "a")], strategy=tolerant)) == [("dispatch", 2)]


def test_a_busy_address_holds_its_own_node_up_and_not_its_rack():
    nodes = [in_rack(1, "a"), in_rack(2, "a")]
    assert sends(decide(nodes, strategy=PER_RACK, busy=frozenset({nodes[0].endpoint}))) == [("dispatch", 2)]


@pytest.mark.parametrize("seed", range(60))
def test_limits_are_never_exceeded_and_no_rack_waits_while_others_get_turn_after_turn(seed):
    """Agents take their time, some hang until their deadline; the count is that of the agents at work."""
    chance = random.Random(seed)
    racks, regions = chance.randint(1, 6), chance.randint(1, 3)
    limits = {"rack": chance.randint(1, 3), **({"region": chance.randint(1, 5)} if chance.random() < 0.5 else {})}
    strategy = rc.Strategy(max_parallel_per=limits, max_parallel=chance.choice([0, 1, 2, 7]), max_failed="100%")
    labels = {n: {key: value for key, value in (("rack", f"r{chance.randrange(racks) ** 2 % racks}"),
                                                ("region", f"g{chance.randrange(regions)}")) if chance.random() < 0.9}
              for n in range(1, chance.randint(2, 80))}
    index = rc.NodeIndex([node(n, batch=1 + (n > 40), labels=rc.to_json(values)) for n, values in labels.items()])
    slots, now, at_work = chance.choice([1, 2, 5, 64]), NOW, dict[int, float]()
    turns: collections.Counter[str] = collections.Counter()
    waited: collections.Counter[str] = collections.Counter()
    for _ in range(100_000):
        situation = rc.Situation(release(), index, now, POLICY, strategy, slots=max(0, slots - len(at_work)))
        anew = rc.NodeIndex(sorted(index, key=lambda n: (n.batch, n.node_id)))
        decision = rc.decide(situation)
        assert sends(decision) == sends(rc.decide(situation._replace(nodes=anew))), "what it noted of earlier decisions"
        index = decision.nodes
        for send in (one for one in decision.sends if one.op == rc.DISPATCH):
            node_id = send.node.node_id
            assert node_id not in at_work
            at_work[node_id] = now.elapsed + (9e9 if chance.random() < 0.1 else chance.uniform(1, 60))
            rack = rc.to_json(labels[node_id])
            turns[rack] += 1
            # whoever could go and did not, while others had their turn
            waited[rack] = 0
            for other in {n.labels for n in index.of["pending"].values() if n.batch == send.node.batch}:
                waited[other] += other != rack and not rc.full_labels(
                    rc.limited_labels(other, limits), rc.labels_in_flight(index.of["running"].values(), limits), limits)
                assert waited[other] <= (racks + 1) * (regions + 1) * 2 + 2, f"{other} waits"
        for key, most in limits.items():
            found = collections.Counter(labels[n][key] for n in at_work if key in labels[n])  # others have no limit
            assert max(found.values(), default=0) <= most, f"{key}: {found}"
        assert len(at_work) <= (strategy.max_parallel or len(labels))
        if len(at_work) < min(slots, strategy.max_parallel or slots):
            assert all(limits.keys() & labels[n.node_id].keys() for n in index.of["pending"].values()
                       if n.batch == index.batch), "a node without the labels waits"
        if not index.open:
            break
        ends = min(*at_work.values(), *(index[n].deadline for n in at_work))
        now = later(ends - NOW.elapsed)
        for node_id in [n for n, until in at_work.items() if until <= ends or index[n].deadline <= ends]:
            done = at_work.pop(node_id) <= ends
            end = rc.NodeEnd("success") if done else rc.NodeEnd("failed", rc.DEADLINE, "hung")
            index.put(index[node_id]._replace(in_flight=False, end=end))
    assert not index.open
    assert sum(turns.values()) == len(labels)


# -- the plan is what counts --------------------------------------------------------------------------

def test_labels_that_change_while_a_release_runs_change_nothing(store):
    for number in (1, 2):
        store.nodes.add(f"edge-{number}", f"10.0.0.{number}", labels=f'{{"rack":"a","region":"r{number}"}}')
    made = new_release(store, strategy={"maxParallelPer": {"rack": 1}, "batches": ["100%"]})
    store.nodes.update(2, {"labels": '{"rack":"b"}'})
    assert [n.labels for n in store.releases.with_nodes(made.id)[1]] == ['{"rack":"a"}'] * 2
    plain = new_release(store)
    assert [n.labels for n in store.releases.with_nodes(plain.id)[1]] == ["{}"] * 2
    # one that a person wrote, or from before: as the nodes are now
    sql(store, "UPDATE release_task_nodes SET labels = '' WHERE release_task_id = ?", made.id)
    nodes = store.releases.with_nodes(made.id)[1]
    assert [n.labels for n in nodes] == ['{"rack":"a","region":"r1"}', '{"rack":"b"}']
    assert len(sends(decide(nodes, strategy=PER_RACK))) == 2


def test_why_says_which_label_holds_a_release_up(world):
    world.nodes(4, task_ms=600_000)
    for number in range(1, 5):
        world.store.nodes.update(number, {"labels": rc.to_json(
            {"rack": f"r{number % 2}", "region": "eu"} if number < 4 else {"rack": "r0"})})
    made = new_release(world.store, payload={"websites": []}, strategy={
        "batches": ["100%"], "maxParallelPer": {"rack": 1, "region": 1}})
    executor = world.executor()
    executor.tick()
    found = eventually(lambda: [one for one in world.store.claims.why(made.id, 600.0).steps if one.name == "slots"])
    assert re.fullmatch(r"waiting for a free slot \(region=eu has 1 of 1 \(edge-1\), for which 2 nodes wait; rack=r1 "
                        r"has 1 of 1 \(edge-1\), for which 1 node waits; .*: maxParallelPer\)"
                        "|.*rack=r0.*", found[0].text), found[0].text
    assert found[0].state == "waits"
    world.finish()
    world.drain()
    assert world.store.releases.get(made.id).status == "success"


def test_why_says_which_failed_node_keeps_its_place_and_until_when(world):
    for number in (1, 2):
        world.store.nodes.add(f"edge-{number}", f"10.0.0.{number}", agent_protocol="execute", labels='{"rack":"a"}')
    made = new_release(world.store, payload={"websites": []}, strategy={
        "batches": [1], "maxParallelPer": {"rack": 1}, "maxFailed": 1})
    sql(world.store, "UPDATE release_tasks SET status = 'running', started_at = created_at WHERE id = ?", made.id)
    sql(world.store, "UPDATE release_task_nodes SET status = 'failed', hold_until = ? WHERE node_id = 1",
        rc.utc_text(world.store.clock.wall() + 50))
    found = [one for one in world.store.claims.why(made.id, 600.0).steps if one.name == "slots"]
    assert re.fullmatch(r"waiting for a free slot \(rack=a has 1 of 1 \(edge-1, which failed and may be busy until "
                        r"\d\d:\d\d:\d\dZ, in \d+ s\), for which 1 node waits: maxParallelPer\)", found[0].text)
    assert contract.has_its_time(found[0].text, found[0].until)
    # a hold that no setting allows is of a clock that was ahead, and void
    sql(world.store, "UPDATE release_task_nodes SET hold_until = '2999-01-01T00:00:00.000Z' WHERE node_id = 1")
    assert [one for one in world.store.claims.why(made.id, 600.0).steps if one.name == "slots"] == []


# -- who gets it -------------------------------------------------------------------------------------

ROLES = {1: ("eu", "edge"), 2: ("eu", "cache"), 3: ("us", "edge"), 4: ("ap", "edge"), 5: ("us", "cache")}


def label_nodes(store: rc.Store) -> None:
    for number, (region, role) in ROLES.items():
        store.nodes.add(f"edge-{region}-{number}", f"10.0.0.{number}",
                        labels=rc.to_json({"region": region, "role": role}))
    store.nodes.add("plain-6", "10.0.0.6")


@pytest.mark.parametrize(("wanted", "chosen", "excluded"), [
    ({"labels": {"region": ["eu", "us"]}}, [1, 2, 3, 5], []),
    ({"labels": {"region": ["eu", "us"], "role": "edge"}}, [1, 3], []),
    ({"exclude": {"labels": {"role": "cache"}}}, [1, 3, 4, 6], [2, 5]),
    ({"exclude": {"labels": {"role": "cache", "region": ["ap"]}, "nodeIds": [6]}}, [1, 3], [2, 4, 5, 6]),
    ({"labels": {"region": "us"}, "exclude": {"nodeIds": [1, 5]}}, [3], [5]),
    ({"nodeIds": [4, 2, 1], "exclude": {"labels": {"role": "cache"}}}, [1, 4], [2])])
def test_nodes_are_chosen_by_lists_of_values_and_exclusions_which_the_release_keeps(client, wanted, chosen, excluded):
    label_nodes(client.store)
    plan = client.ok("POST", "/api/v1/releases", {**wanted, "dryRun": True})
    assert [id_ for batch in plan["batches"] for id_ in batch["nodeIds"]] == chosen
    assert [(one["nodeId"], one["why"]) for one in plan["leftOut"]] == [(id_, "excluded") for id_ in excluded]
    made = client.ok("POST", "/api/v1/releases", wanted, 201)
    release = client.ok("GET", f"/api/v1/releases/{made['releaseId']}")["release"]
    assert release["selection"] == {**wanted, **({"nodeIds": sorted(wanted["nodeIds"])} if "nodeIds" in wanted else {})}
    # section 5: whom it is for tells what every node should run, also of those that come later
    sql(client.store, "UPDATE release_task_nodes SET status = 'success'")
    sql(client.store, "UPDATE release_tasks SET status = 'success', started_at = created_at")
    client.store.nodes.add("edge-eu-7", "10.0.0.7", labels='{"region":"eu","role":"edge"}')
    client.store.nodes.add("edge-eu-8", "10.0.0.8", labels='{"region":"eu","role":"cache"}')
    late = {7: "nodeIds" not in wanted and wanted.get("labels", {}).get("region") != "us",
            8: wanted == {"labels": {"region": ["eu", "us"]}}}
    wants = {item["id"]: item["wants"] is not None for item in client.ok("GET", "/api/v1/nodes")["items"]}
    assert wants == {**{id_: id_ in chosen for id_ in range(1, 7)}, **late}


@on_sqlite
@pytest.mark.parametrize(("wanted", "code", "message"), [
    ({"labels": {"region": ["mars", "moon"]}}, 3003,
     "no node matches region=mars,moon (values of region: ap, eu, us)"),
    ({"labels": {"regoin": "eu"}}, 3003,
     "no node matches regoin=eu (no node has the label regoin (did you mean region?); labels: region, role)"),
    ({"labels": {"region": "ap"}, "exclude": {"nodeIds": [4]}}, 3003,
     "no node is left: exclude names all of the 1 that were selected"),
    ({"labels": {"region": []}}, 2003, "labels must have for region a value, or a list of 1 to 1000"),
    ({"labels": {"region": ["eu", "eu"]}}, 2003, "labels must not have the value eu of region twice"),
    ({"labels": {"region": [1]}}, 2003, "labels must have for region"), ({"labels": ["eu"]}, 2003, "labels must be"),
    ({"exclude": [1]}, 2003, "exclude must be an object"), ({"exclude": {"node": 1}}, 2003, "exclude: node is not"),
    ({"exclude": {"nodeIds": [99]}}, 2003, "exclude: node 99 does not exist"),
    ({"exclude": {"nodeIds": []}}, 2003, "exclude: nodeIds must be"),
    ({"exclude": {"labels": {"role": 1}}}, 2003, "exclude: labels must have for role"),
    ({"nodeIds": [1], "labels": {"region": "eu"}}, 2003, "nodeIds and labels exclude each other")])
def test_a_choice_that_can_not_be_meant_is_refused_by_name(client, wanted, code, message):
    label_nodes(client.store)
    answer = client("POST", "/api/v1/releases", wanted)
    assert answer.code == code, answer.message
    assert message in answer.message
    assert client.store.releases.page().total == 0


@pytest.mark.parametrize(("texts", "expected"), [
    (["region=eu,us"], ({"region": ["eu", "us"]}, {})),
    (["region=eu", "role!=cache"], ({"region": "eu"}, {"role": "cache"})),
    (["region=eu,us,role!=cache,db,rack=a"], ({"region": ["eu", "us"], "rack": "a"}, {"role": ["cache", "db"]})),
    (["note=a=b"], ({"note": "a=b"}, {})), (["empty="], ({"empty": ""}, {}))])
def test_labels_are_chosen_in_the_words_of_the_command_line(texts, expected):
    assert rc.parse_label_words("--label", texts) == expected


@pytest.mark.parametrize(("texts", "message"), [
    (["region=eu", "region=us"], "--label region is given twice"),
    (["region=eu", "region!=us"], "region is given twice"),
    (["region"], "--label region must be K=V"), (["region=eu,"], "must be K=V"), (["=eu"], "must be K=V"),
    (["!=eu"], "must be K=V"), ([",region=eu"], "must be K=V"), (["region=eu,eu"], "the value eu of region twice"),
    ([f"{'k' * 64}=v"], "key of a label")])
def test_words_that_can_not_be_meant_are_refused(texts, message):
    with pytest.raises(rc.AppError, match=re.escape(message)) as error:
        rc.parse_label_words("--label", texts)
    assert error.value.code == 2003


def plan_of(cli, *words: str) -> dict:
    return cli.ok("create", "--plan", *words, "--json").json


def names_in(plan: dict) -> list[str]:
    return [name for batch in plan["batches"] for name in batch["nodeNames"]]


def test_create_takes_patterns_lists_and_exclusions_and_shows_them_by_name(quick, open_store):
    store = quick.store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    label_nodes(store)
    store.nodes.update(2, {"status": "offline"})
    plan = plan_of(quick, "--node", "edge-eu-*", "--node", "plain-6")
    assert names_in(plan) == ["edge-eu-1", "plain-6"]
    assert plan["leftOut"] == [{"nodeId": 2, "nodeName": "edge-eu-2", "why": "offline"}]
    assert names_in(plan_of(quick, "--label", "region=us,ap", "--label", "role!=cache")) == [
        "edge-us-3", "edge-ap-4"]
    shown = quick("create", "--plan", "--label", "role!=cache", "--exclude", "edge-ap-*", "--exclude", "plain-6").out
    assert "excluded: edge-eu-2, edge-ap-4, edge-us-5, plain-6\n" in shown
    assert "added later" in shown
    assert "added later" not in quick("create", "--plan", "--node", "edge-*", "--exclude", "edge-ap-*").out
    assert "note: exclude: no selected node has role=cahce (values of role: cache, edge)" in quick(
        "create", "--plan", "--label", "role!=cahce").out
    for words, code, message in (
            (("--node", "edge-eu-2"), 2, "node edge-eu-2 is offline"),
            (("--node", "edge-x-*"), 3, "node edge-x-* does not exist"),
            (("--exclude", "edge-eu-9"), 3, "node edge-eu-9 does not exist"),
            (("--label", "region=eu", "--label", "region=us"), 2, "--label region is given twice"),
            (("--label", "region=mars"), 3, "no node matches region=mars (values of region: ap, eu, us)"),
            (("--label", "region=eu", "--node", "plain-6"), 2, "exclude each other"),
            (("--first", "role!=cache"), 2, "--first takes K=V"), (("--max-parallel-per", "rack"), 2, "must be K=V"),
            (("--max-parallel-per", "role=x"), 2, "strategy: maxParallelPer")):
        assert message in quick.refused(code, "create", *words)
    quick.ok("create", "--node", "edge-eu-*", "--exclude", "edge-eu-1", "--node", "edge-us-*")
    assert rc.parse_json(store.releases.get(1).selection) == {"nodeIds": [1, 2, 3, 5], "exclude": {"nodeIds": [1]}}


def test_the_same_words_choose_nodes_in_node_list_and_node_set(quick, open_store):
    store = quick.store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    label_nodes(store)

    def listed(*words: str) -> list[int]:
        return [item["id"] for item in quick.ok("node", "list", *words, "--json").json["items"]]

    assert listed("--label", "region=eu,us", "--label", "role!=cache") == [1, 3]
    assert listed("edge-*", "--exclude", "edge-eu-*", "--exclude", "edge-ap-4") == [3, 5]
    assert quick("node", "list", "--label", "region=mars").out == (
        "no node matches region=mars (values of region: ap, eu, us)\n")
    assert "--label region is given twice" in quick.refused(2, "node", "list", "--label", "region=eu,region=us")
    quick.ok("node", "set", "--where", "region=eu,us", "--where", "role!=cache", "--exclude", "edge-us-3", "--disable")
    assert [node.enabled for node in store.nodes.page().items] == [0, 1, 1, 1, 1, 1]
    assert "no node matches region=mars (values of region: ap, eu, us)" in quick.refused(
        3, "node", "set", "--where", "region=mars", "--disable")
    assert "node edge-eu-* does not exist with region=us" in quick.refused(
        3, "node", "set", "edge-eu-*", "--where", "region=us", "--disable")


def test_node_ping_asks_those_that_the_words_choose(cli, world):
    world.nodes(3)
    for number, region in enumerate(["eu", "us", "us"], 1):
        world.store.nodes.update(number, {"labels": rc.to_json({"region": region})})
    cli.settings.update(DATABASE_URL=world.url, **mtls(world.certs))
    found = cli("node", "ping", "--label", "region=us", "--exclude", "edge-3", "--json").json["items"]
    assert [(item["name"], item["ok"]) for item in found] == [("edge-2", True)]


def test_a_stored_selection_may_name_numbers_as_the_labels_of_nodes_do():
    nodes = fleet(2, lambda n: {"rack": str(n)})
    for text in ('{"labels":{"rack":2}}', '{"labels":{"rack":"2"}}', '{"labels":{"rack":["2","3"]}}'):
        selection = rc.selection_of(text)
        assert selection
        assert [node.id for node in nodes if selection.takes(node)] == [2], text
    assert rc.selection_of('{"labels":7}') is None


@pytest.mark.parametrize(("racks", "limits"), [(5_000, {"rack": 1}), (2, {"rack": 4_000})])
def test_a_decision_examines_the_racks_whose_turn_it_is_and_no_others(racks, limits, monkeypatch):
    index = rc.NodeIndex([node(n, "running" if n <= 50 else "pending", labels=f'{{"rack":"{n % racks}"}}')
                          for n in range(1, 10_001)])
    examined = []
    limited = rc.NodeIndex.limited
    monkeypatch.setattr(rc.NodeIndex, "limited", lambda self, labels, limits: (
        examined.append(labels), limited(self, labels, limits))[1])
    queue = rc.NodeIndex.queue
    monkeypatch.setattr(rc.NodeIndex, "queue", lambda self, turn, batch: (
        examined.append(one.node_id) or one for one in queue(self, turn, batch)))
    decision = rc.decide(rc.Situation(release(), index, NOW, POLICY, rc.Strategy(max_parallel_per=limits), slots=40))
    assert len(decision.sends) == 40
    assert len(examined) <= 2 * 40 + 50
    # and a copy of what was decided is another one's
    assert len(index.turns(1)[None]) == racks
    assert [turn.begun for turn in index.turns(1)[None][:1]] == [0 if racks > 50 else 25]


def test_a_decision_examines_no_rack_of_a_region_that_is_full(monkeypatch):
    regions, racks = 5, 2_000
    index = rc.NodeIndex([node(n, labels=rc.to_json({"rack": f"r{n % racks}", "region": f"g{n % regions}"}))
                          for n in range(1, 2 * racks + 1)])
    strategy = rc.Strategy(max_parallel_per={"rack": 1, "region": 4})
    examined = []
    limited = rc.NodeIndex.limited
    monkeypatch.setattr(rc.NodeIndex, "limited", lambda self, labels, limits: (
        examined.append(labels), limited(self, labels, limits))[1])
    sent: list[int] = []
    for _ in range(10):
        examined.clear()
        decision = rc.decide(rc.Situation(release(), index, NOW, POLICY, strategy, slots=64))
        index = decision.nodes
        sent += [node_id for _, node_id in sends(decision)]
        done = index[sent[-1]]
        index.put(done._replace(in_flight=False, end=rc.NodeEnd("success")))
    assert len(sent) == regions * 4 + 9
    assert len(examined) <= 10
