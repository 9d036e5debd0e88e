"""The API over real HTTP: routes, shapes, codes, tokens, limits, hostile requests (contract section 5)."""
from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
import threading
from typing import Any

import pytest
from conftest import on_sqlite
from lab import (
    ADDRESSES,
    HTTP_STATUS,
    JSON,
    Client,
    add_nodes,
    eventually,
    misfit,
    new_release,
    read_answer,
    replace_handler,
    serving_one_node,
    sha256,
    split_answer,
    sql,
    take_away,
)

import releasectl as rc

MAX_BODY_BYTES = 1 << 20

RELEASE_KEYS = {"id", "type", "target", "version", "status", "statusReason", "reason", "totalNodes", "successNodes",
                "failedNodes", "skippedNodes", "currentBatch", "soakUntil", "errorMsg", "strategy", "payloadSha256",
                "retryOf", "selection", "catchUpOf", "author", "approval", "approvedBy", "approvedAt", "goesFirst",
                "duringFreeze", "rollbackOf", "rolledBackBy", "rollbackStatus", "createdAt", "startedAt", "finishedAt",
                "updatedAt"}
RELEASE_NODE_KEYS = {"nodeId", "nodeName", "mainIp", "status", "taskId", "attempts", "errorKind", "errorMsg",
                     "startedAt", "finishedAt"}
NODE_KEYS = {"id", "name", "mainIp", "agentPort", "agentProtocol", "labels", "enabled", "status", "createdAt",
             "updatedAt", "runs", "wants", "drift", "driftText"}
CREATED_KEYS = {"releaseId", "version", "totalNodes", "batches"}
ROUTES = {
    ("POST", "/api/v1/releases"), ("GET", "/api/v1/releases"), ("GET", "/api/v1/releases/{id}"),
    ("POST", "/api/v1/releases/{id}/pause"), ("POST", "/api/v1/releases/{id}/resume"),
    ("POST", "/api/v1/releases/{id}/cancel"), ("POST", "/api/v1/releases/{id}/retry"),
    ("POST", "/api/v1/releases/{id}/rollback"), ("POST", "/api/v1/releases/{id}/approve"),
    ("GET", "/api/v1/releases/{id}/events"),
    ("GET", "/api/v1/releases/{id}/payload"), ("GET", "/api/v1/releases/{id}/diff"),
    ("GET", "/api/v1/releases/{id}/why"),
    ("GET", "/api/v1/nodes"), ("POST", "/api/v1/nodes"), ("GET", "/api/v1/nodes/{id}"),
    ("PATCH", "/api/v1/nodes/{id}"), ("DELETE", "/api/v1/nodes/{id}"),
    ("GET", "/api/v1/freeze"), ("PUT", "/api/v1/freeze"),
    ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/openapi.json"),
    ("GET", "/"), ("GET", "/api/v1/health"), ("GET", "/api/v1/overview"), ("GET", "/api/v1/audit"),
    ("GET", "/api/v1/nodes/{id}/releases"), ("GET", "/api/v1/labels"), ("PATCH", "/api/v1/nodes"),
    ("POST", "/api/v1/catch-up"), ("POST", "/api/v1/nodes/{id}/ping"),
}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A client of one server with one node, for requests that are refused and so change nothing."""
    with serving_one_node(tmp_path_factory.mktemp("api")) as client:
        yield client
        assert (client.ok("GET", "/api/v1/releases")["total"], client.ok("GET", "/api/v1/nodes")["total"]) == (0, 1)


@pytest.fixture
def lite(new_client, open_store, sqlite_url):
    """The same on SQLite alone, for what has nothing to do with the engine."""
    return new_client(open_store(sqlite_url))


@pytest.fixture
def new_tokens(tmp_path):
    """A function that writes a tokens file, by default of vera (viewer) and oskar (operator)."""
    def write(content: str | bytes = "", mode: int = 0o600) -> str:
        text = content or f"# ours\n\nvera:viewer:{sha256('viewer-secret')}\n" \
            f"oskar:operator:{sha256('operator-secret').upper()}\n"
        path = tmp_path / "tokens"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        return str(path)
    return write


def ended(store: rc.Store, *statuses: str) -> int:
    """Create a release, and let it have ended with its nodes in these statuses; return its id."""
    release, batches, *_ = store.releases.create(rc.ReleaseRequest(payload={"for": list(statuses)}), "test")
    with store.database.transaction(write=True) as tx:
        for node_id, status in zip([node_id for batch in batches for node_id in batch], statuses):
            tx.execute("UPDATE release_task_nodes SET status = ? WHERE release_task_id = ? AND node_id = ?",
                       status, release.id, node_id)
        tx.execute("UPDATE release_tasks SET status = ?, finished_at = updated_at WHERE id = ?",
                   "success" if set(statuses) == {"success"} else "failed", release.id)
    return release.id


# -- releases ----------------------------------------------------------------------------------

def test_post_of_a_release_answers_its_id_version_and_batches(client):
    add_nodes(client.store, 3)
    body = {"target": "cdn", "reason": "weekly", "payload": {"sites": []}, "strategy": {}}
    data = client.ok("POST", "/api/v1/releases", body, 201)
    assert data == {"releaseId": 1, "version": 1, "totalNodes": 3,
                    "batches": [{"batch": 1, "nodeIds": [1]}, {"batch": 2, "nodeIds": [2, 3]}],
                    "changesNothing": False}
    assert client.ok("POST", "/api/v1/releases", status=201)["version"] == 2


def test_a_batch_names_the_label_that_all_its_nodes_share_where_there_is_one_for_each_value(client):
    for n, pop in enumerate(("ams", "fra", "ams", "fra"), 1):
        client.store.nodes.add(f"edge-{n}", f"10.0.0.{n}", labels=json.dumps({"pop": pop, "role": "cache"}))
    for strategy in ({"batchBy": "pop", "batches": ["100%"]}, {"batches": [2]}):
        client.ok("POST", "/api/v1/releases", {"strategy": strategy}, 201)
    groups = [[batch["group"] for batch in client.ok("GET", f"/api/v1/releases/{number}")["batches"]]
              for number in (1, 2)]
    assert groups == [["pop=ams", "pop=fra"], ["", ""]]
    client.store.nodes.update(1, {"labels": '{"pop":"gru"}'})
    assert [batch["group"] for batch in client.ok("GET", "/api/v1/releases/1")["batches"]] == ["", "pop=fra"]


def test_a_release_has_the_keys_of_the_contract_and_null_for_what_has_not_come(client):
    add_nodes(client.store, 3)
    client.ok("POST", "/api/v1/releases", {"reason": "weekly"}, 201)
    release = client.ok("GET", "/api/v1/releases/1")["release"]
    assert set(release) == RELEASE_KEYS
    assert TIME.fullmatch(release.pop("createdAt"))
    assert TIME.fullmatch(release.pop("updatedAt"))
    assert release.pop("statusReason")
    assert release == {
        "id": 1, "type": "apply_config", "target": "cdn", "version": 1, "status": "pending", "reason": "weekly",
        "totalNodes": 3, "successNodes": 0, "failedNodes": 0, "skippedNodes": 0, "currentBatch": 1,
        "soakUntil": None, "errorMsg": "",
        "strategy": {}, "payloadSha256": rc.digest_of({}), "selection": {}, "retryOf": None, "rollbackOf": None,
        "rolledBackBy": None, "rollbackStatus": "", "catchUpOf": None, "author": "api", "approval": "",
        "approvedBy": "", "approvedAt": None,
        "goesFirst": False, "duringFreeze": False, "startedAt": None, "finishedAt": None}


def test_a_release_is_answered_with_its_nodes_by_batch(client):
    add_nodes(client.store, 3)
    new_release(client.store)
    data = client.ok("GET", "/api/v1/releases/1")
    assert set(data) == {"release", "failures", "batches"}
    assert [(batch["batch"], [node["nodeId"] for node in batch["nodes"]]) for batch in data["batches"]] \
        == [(1, [1]), (2, [2, 3])]
    assert data["batches"][0] == {"batch": 1, "group": "", "nodes": [{
        "nodeId": 1, "nodeName": "edge-1", "mainIp": ADDRESSES[0], "status": "pending", "taskId": "", "attempts": 0,
        "errorKind": "", "errorMsg": "", "startedAt": None, "finishedAt": None}]}


def test_view_summary_leaves_the_nodes_out(client):
    add_nodes(client.store, 2)
    new_release(client.store)
    summary = client.ok("GET", "/api/v1/releases/1?view=summary")
    assert set(summary) == {"release", "failures"}
    assert summary["release"] == client.ok("GET", "/api/v1/releases/1?view=full")["release"]
    assert client.code("GET", "/api/v1/releases/1?view=short") == 2003


def test_a_release_that_ran_tells_its_times_counts_and_errors(world, new_client):
    world.nodes(3)
    world.agent(1).set(outcome="failed", message="nginx -t failed")
    new_release(world.store)
    world.drain()
    data = new_client(world.store).ok("GET", "/api/v1/releases/1")
    release, first = data["release"], data["batches"][0]["nodes"][0]
    assert (release["status"], release["failedNodes"], release["skippedNodes"]) == ("failed", 1, 2)
    assert (release["errorMsg"], release["currentBatch"]) == ("node edge-1: nginx -t failed", 1)
    assert (first["errorKind"], first["errorMsg"], first["attempts"]) == ("agent_failed", "nginx -t failed", 1)
    assert re.fullmatch(f"apply_config_{ADDRESSES[0]}_1_[0-9a-f]{{8}}", first["taskId"])
    assert all(TIME.fullmatch(row[key]) for row in (release, first) for key in ("startedAt", "finishedAt"))
    assert data["batches"][1]["nodes"][0]["startedAt"] is None


def test_current_batch_is_0_when_no_node_is_pending_running_or_failed(lite):
    add_nodes(lite.store, 2)
    release_id = ended(lite.store, "success", "success")
    assert lite.ok("GET", f"/api/v1/releases/{release_id}")["release"]["currentBatch"] == 0


def test_releases_are_listed_newest_first_by_page(client):
    add_nodes(client.store, 1)
    for _ in range(3):
        new_release(client.store)
    data = client.ok("GET", "/api/v1/releases?page=1&pageSize=2")
    assert set(data) == {"items", "total", "page", "pageSize"}
    assert ([item["id"] for item in data["items"]], data["total"]) == ([3, 2], 3)
    assert set(data["items"][0]) == RELEASE_KEYS
    second = client.ok("GET", "/api/v1/releases?page=2&pageSize=2")
    assert ([item["id"] for item in second["items"]], second["page"], second["pageSize"]) == ([1], 2, 2)
    assert client.ok("GET", "/api/v1/releases?page=1000000000&pageSize=100")["items"] == []
    defaults = client.ok("GET", "/api/v1/releases")
    assert (defaults["page"], defaults["pageSize"]) == (1, 20)


def test_the_list_is_filtered_by_status(client):
    add_nodes(client.store, 1)
    for _ in range(3):
        new_release(client.store)
    client.ok("POST", "/api/v1/releases/2/pause")
    for status, ids in (("paused", [2]), ("pending", [3, 1]), ("failed", []), ("", [3, 2, 1])):
        data = client.ok("GET", f"/api/v1/releases?status={status}")
        assert ([item["id"] for item in data["items"]], data["total"]) == (ids, len(ids))


@pytest.mark.parametrize(("query", "code"), [
    ("pageSize=0", 2003), ("pageSize=101", 2003), ("pageSize=-1", 2003), ("pageSize=ten", 2002), ("pageSize=", 2002),
    ("page=0", 2003), ("page=1000000001", 2003), ("page=" + "9" * 30, 2003), ("page=1.0", 2002),
    ("status=done", 2003), ("sort=id", 2003), ("page=1&page=2", 2002), ("page=%ff", 2002),
    ("&".join(f"k{n}=1" for n in range(30)), 2002),
])
def test_a_number_or_word_of_a_query_that_is_out_of_range_is_an_error(refusing, query, code):
    assert refusing.code("GET", f"/api/v1/releases?{query}") == code


def test_pause_resume_and_cancel_answer_the_release(client):
    add_nodes(client.store, 2)
    new_release(client.store)
    for verb, status in (("pause", "paused"), ("resume", "pending"), ("cancel", "cancelled")):
        release = client.ok("POST", f"/api/v1/releases/1/{verb}", {"reason": "because"})
        assert set(release) == RELEASE_KEYS
        assert release["status"] == status
    assert release["skippedNodes"] == 2
    assert TIME.fullmatch(release["finishedAt"])


def test_a_verb_in_the_wrong_state_is_3003_and_changes_nothing(client):
    add_nodes(client.store, 1)
    ended(client.store, "success")
    before = client.ok("GET", "/api/v1/releases/1")
    for verb in ("pause", "resume", "cancel", "retry"):
        answer = client("POST", f"/api/v1/releases/1/{verb}")
        assert (answer.code, answer.message.startswith("release 1 succeeded; only ")) == (3003, True)
    answer = client("POST", "/api/v1/releases/1/rollback")
    assert (answer.code, "nothing to roll back to" in answer.message) == (3003, True)
    assert client.ok("GET", "/api/v1/releases/1") == before


def test_what_the_description_lets_an_id_be_is_what_the_api_takes(client):
    add_nodes(client.store, 1)
    ended(client.store, "success")
    document = json.loads(client("GET", "/openapi.json").text)
    parameter, = (p["schema"] for p in document["paths"]["/api/v1/releases/{id}/diff"]["get"]["parameters"]
                  if p["name"] == "with")
    for text, code in (("before", 3001), ("1", 0), ("0", 3001), ("9" * 19, 3001), ("9" * 20, 3001), ("9" * 4000, 3001),
                       ("9" * 4001, 2002), ("", 2002), ("-1", 2002), ("1.0", 2002), ("after", 2002)):
        assert client.code("GET", f"/api/v1/releases/1/diff?with={text}") == code, text
        assert bool(re.search(parameter["pattern"], text)) == (code != 2002), text
    schemas = document["components"]["schemas"]
    for number in (0, 1, 2**63 - 1, 2**63):
        for schema, path, body in (
                (schemas["Rollback"]["properties"]["toRelease"], "/1/rollback", {"toRelease": number}),
                (schemas["NewRelease"]["properties"]["nodeIds"]["items"], "", {"nodeIds": [number]})):
            message = client("POST", f"/api/v1/releases{path}", {**body, "dryRun": True}).message
            is_no_id = "must be the id of a release" in message or "must be a list of different ids of nodes" in message
            assert is_no_id != (schema["minimum"] <= number <= schema["maximum"]), (path, number, message)


def test_retry_and_rollback_answer_like_the_post_of_a_release(client):
    add_nodes(client.store, 3)
    ended(client.store, "success", "success", "success")
    failed = ended(client.store, "success", "failed", "skipped")
    again = client.ok("POST", f"/api/v1/releases/{failed}/retry", status=201)
    assert again == {"releaseId": 3, "version": 3, "totalNodes": 2,
                     "batches": [{"batch": 1, "nodeIds": [2]}, {"batch": 2, "nodeIds": [3]}],
                     "changesNothing": False, "leftOut": []}
    back = client.ok("POST", f"/api/v1/releases/{failed}/rollback", {}, 201)
    assert (set(back), back["releaseId"], back["totalNodes"]) == (
        {*CREATED_KEYS, "changesNothing", "leftOut", "warnings"}, 4, 2)
    assert back["warnings"][0].startswith("goes behind release 3 ")
    links = {item["id"]: (item["retryOf"], item["rollbackOf"])
             for item in client.ok("GET", "/api/v1/releases")["items"]}
    assert links == {4: (None, failed), 3: (failed, None), 2: (None, None), 1: (None, None)}


def test_events_come_in_order_from_an_id_on_and_name_the_actor(client):
    add_nodes(client.store, 1)
    client.ok("POST", "/api/v1/releases", {"reason": "weekly"}, 201)
    client.ok("POST", "/api/v1/releases/1/pause", {"reason": "lunch"})
    client.ok("POST", "/api/v1/releases/1/cancel")
    events = client.ok("GET", "/api/v1/releases/1/events")["items"]
    assert set(events[0]) == {"id", "releaseId", "nodeId", "nodeName", "at", "actor", "event", "fromStatus",
                              "toStatus", "detail"}
    assert [(e["event"], e["fromStatus"], e["toStatus"], e["detail"]) for e in events][:2] == [
        ("created", "", "pending", "weekly"), ("paused", "pending", "paused", "lunch")]
    assert (events[0]["nodeId"], events[0]["nodeName"], events[0]["actor"]) == (None, "", "api")
    assert any((e["nodeId"], e["nodeName"], e["toStatus"]) == (1, "edge-1", "skipped") for e in events)
    after = client.ok("GET", f"/api/v1/releases/1/events?after={events[0]['id']}&limit=2")["items"]
    assert after == events[1:3]
    assert client.ok("GET", f"/api/v1/releases/1/events?after={2**63 - 1}")["items"] == []


@pytest.mark.parametrize(("query", "code"), [("limit=0", 2003), ("limit=1001", 2003), ("after=-1", 2003),
                                             ("after=x", 2002), (f"after={2**63}", 2003)])
def test_the_limits_of_events_are_kept(refusing, query, code):
    assert refusing.code("GET", f"/api/v1/releases/1/events?{query}") == code


@pytest.mark.parametrize(("body", "word"), [
    ({"payload": []}, "payload"), ({"payload": None}, "payload"), ({"payload": "{}"}, "payload"),
    ({"payload": {"version": 7}}, "version"), ({"payload": {"version": "1"}}, "version"),
    ({"payload": {"version": True}}, "version"), ({"strategy": []}, "strategy"), ({"strategy": {"x": 1}}, "x"),
    ({"reason": 5}, "reason"), ({"reason": "x" * 501}, "reason"), ({"target": ""}, "target"),
    ({"target": "a b"}, "target"), ({"target": None}, "target"), ({"payloads": {}}, "did you mean payload"),
])
def test_a_release_with_a_value_that_is_not_allowed_is_refused_and_nothing_is_written(refusing, body, word):
    answer = refusing("POST", "/api/v1/releases", body)
    assert answer.code == 2003
    assert word in answer.message
    assert refusing.ok("GET", "/api/v1/releases")["total"] == 0


def test_no_online_nodes_is_3003_and_nothing_is_written(client):
    client.ok("POST", "/api/v1/nodes", {"name": "a", "mainIp": "10.0.0.1", "enabled": False}, 201)
    client.ok("POST", "/api/v1/nodes", {"name": "b", "mainIp": "10.0.0.2", "status": "offline"}, 201)
    answer = client("POST", "/api/v1/releases", {})
    assert (answer.code, answer.status) == (3003, 409)
    assert "no online nodes" in answer.message
    assert client.ok("GET", "/api/v1/releases")["total"] == 0


def test_releases_that_are_posted_at_the_same_time_get_versions_of_their_own(client):
    add_nodes(client.store, 2)
    versions: list[int] = []

    def post() -> None:
        versions.append(client("POST", "/api/v1/releases", {}).data["version"])

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == [1, 2, 3, 4, 5, 6]


def test_an_executor_in_the_same_process_is_told_of_every_act(open_store, sqlite_url, new_client):
    lite = new_client(open_store(sqlite_url))
    add_nodes(lite.store, 1)
    nudged: list[int] = []
    lite.server.api = rc.Api(lite.store, rc.Metrics(), lambda: nudged.append(1))
    ended(lite.store, "failed")
    for path in ("", "/2/pause", "/2/resume", "/2/cancel", "/1/retry"):
        assert lite.code("POST", f"/api/v1/releases{path}") == 0
    assert len(nudged) == 5
    assert lite.code("POST", "/api/v1/releases/2/pause") == 3003
    assert len(nudged) == 5


# -- nodes -------------------------------------------------------------------------------------

def test_a_node_is_added_read_listed_changed_and_deleted(client):
    node = client.ok("POST", "/api/v1/nodes", {"name": "edge-1", "mainIp": "10.0.0.1"}, 201)
    assert set(node) == NODE_KEYS
    assert TIME.fullmatch(node["createdAt"])
    assert {key: node[key] for key in NODE_KEYS - {"createdAt", "updatedAt"}} == {
        "id": 1, "name": "edge-1", "mainIp": "10.0.0.1", "agentPort": 8443, "agentProtocol": "tasks", "labels": {},
        "enabled": True, "status": "online", "runs": None, "wants": None, "drift": "none",
        "driftText": ""}
    assert client.ok("GET", "/api/v1/nodes/1") == node
    assert client.ok("GET", "/api/v1/nodes") == {"items": [node], "total": 1, "page": 1, "pageSize": 20}
    change = {"name": "edge-one", "mainIp": "Edge.Example.ORG", "agentPort": 9090, "agentProtocol": "execute",
              "labels": {"region": "eu"}, "enabled": False, "status": "maintenance"}
    changed = client.ok("PATCH", "/api/v1/nodes/1", change)
    assert changed == {**node, **change, "mainIp": "edge.example.org", "updatedAt": changed["updatedAt"]}
    assert client.ok("PATCH", "/api/v1/nodes/1", {}) == changed
    assert client.ok("DELETE", "/api/v1/nodes/1") is None
    assert client.code("GET", "/api/v1/nodes/1") == 3001
    assert client.code("DELETE", "/api/v1/nodes/1") == 3001


def test_nodes_are_listed_by_page(lite):
    add_nodes(lite.store, 3)
    data = lite.ok("GET", "/api/v1/nodes?page=2&pageSize=2")
    assert ([item["name"] for item in data["items"]], data["total"], data["page"]) == (["edge-3"], 3, 2)
    assert lite.code("GET", "/api/v1/nodes?pageSize=101") == 2003


@pytest.mark.parametrize("missing", ["name", "mainIp"])
def test_post_of_a_node_needs_name_and_main_ip(refusing, missing):
    body = {"name": "a", "mainIp": "10.0.0.1"}
    del body[missing]
    answer = refusing("POST", "/api/v1/nodes", body)
    assert (answer.code, missing in answer.message) == (2001, True)
    assert refusing.code("POST", "/api/v1/nodes") == 2001


@pytest.mark.parametrize(("field", "value"), [
    ("name", ""), ("name", None), ("name", "x" * 101), ("name", " a"), ("name", "a\nb"), ("name", "a\u202eb"),
    ("mainIp", ""), ("mainIp", "10.0.0.256"), ("mainIp", "10.0.0"), ("mainIp", "a b"), ("mainIp", "-a"),
    ("mainIp", "http://a"), ("mainIp", "10.0.0.1:8443"), ("mainIp", 7), ("mainIp", "fe80::1%eth0"),
    ("agentPort", 0), ("agentPort", 65536), ("agentPort", -1), ("agentPort", "8443"), ("agentPort", 8443.5),
    ("agentPort", True), ("agentPort", None), ("agentProtocol", "http"), ("agentProtocol", None),
    ("labels", []), ("labels", {"a": 1}), ("enabled", 1), ("enabled", "true"), ("status", "busy"),
    ("id", 5), ("agentport", 8443), ("main_ip", "10.0.0.1"),
])
def test_a_node_with_a_value_that_is_not_allowed_is_refused_by_name(refusing, field, value):
    before = refusing.ok("GET", "/api/v1/nodes/1")
    posted = refusing("POST", "/api/v1/nodes", {"name": "b", "mainIp": "10.0.0.9", field: value})
    patched = refusing("PATCH", "/api/v1/nodes/1", {field: value})
    assert (posted.code, patched.code) == (2003, 2003)
    assert field in posted.message
    assert field in patched.message
    assert refusing.ok("GET", "/api/v1/nodes")["items"] == [before]


def test_names_of_nodes_are_unique(client):
    add_nodes(client.store, 2)
    for answer in (client("POST", "/api/v1/nodes", {"name": "edge-1", "mainIp": "10.0.0.9"}),
                   client("PATCH", "/api/v1/nodes/2", {"name": "edge-1"})):
        assert (answer.code, answer.message) == (3002, "node edge-1 exists already")
    assert client.code("PATCH", "/api/v1/nodes/1", {"name": "edge-1"}) == 0


def test_a_node_that_a_release_names_cant_be_deleted(client):
    add_nodes(client.store, 1)
    release_id = ended(client.store, "success")
    answer = client("DELETE", "/api/v1/nodes/1")
    assert answer.code == 3003
    assert f"release {release_id}" in answer.message
    assert "disable" in answer.message


@pytest.mark.parametrize("change", [{"mainIp": "10.9.9.9"}, {"agentPort": 1}, {"agentProtocol": "execute"}])
def test_address_port_and_protocol_stay_until_the_release_is_terminal(client, change):
    add_nodes(client.store, 1)
    ended(client.store, "success")
    release = new_release(client.store)
    answer = client("PATCH", "/api/v1/nodes/1", {"name": "renamed", **change})
    assert answer.code == 3003
    assert f"release {release.id}" in answer.message
    assert client.ok("GET", "/api/v1/nodes/1")["name"] == "edge-1"
    assert client.ok("PATCH", "/api/v1/nodes/1", {"name": "renamed", "labels": {"a": "b"}})["name"] == "renamed"
    client.ok("POST", f"/api/v1/releases/{release.id}/cancel")
    assert client.code("PATCH", "/api/v1/nodes/1", change) == 0


# -- errors ------------------------------------------------------------------------------------

@pytest.mark.parametrize("thing", ["releases", "nodes"])
def test_an_id_that_is_no_number_is_malformed_and_a_huge_one_not_found(client, thing):
    for text in ("x", "-1", "1.0", "%20", "1e3", "%d9%a1", "%00"):
        assert (text, client.code("GET", f"/api/v1/{thing}/{text}")) == (text, 2002)
    for text in ("0", "99", str(2**31), str(2**63 - 1), str(2**63), "9" * 4000):
        assert (text, client.code("GET", f"/api/v1/{thing}/{text}")) == (text, 3001)


def test_what_does_not_exist_is_3001(refusing):
    for verb in ("pause", "resume", "cancel", "retry", "rollback", "events"):
        answer = refusing("GET" if verb == "events" else "POST", f"/api/v1/releases/7/{verb}")
        assert (answer.code, answer.message) == (3001, "release 7 does not exist")


@pytest.mark.parametrize("path", ["/api", "/api/v1", "/api/v1/releases/", "/api/v2/releases", "/healthz/x",
                                  "/api/v1/releases/1/destroy", "/%00", "/%ff", "/..%2f",
                                  "/index.html", "*"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_3001(refusing, method, path):
    assert refusing.code(method, path) == 3001


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("DELETE", "/api/v1/releases", {"GET", "HEAD", "POST"}),
    ("PUT", "/api/v1/releases/1", {"GET", "HEAD"}),
    ("GET", "/api/v1/releases/1/pause", {"POST"}),
    ("HEAD", "/api/v1/releases/1/cancel", {"POST"}),
    ("POST", "/api/v1/nodes/1", {"GET", "HEAD", "PATCH", "DELETE"}),
    ("OPTIONS", "/api/v1/nodes", {"GET", "HEAD", "PATCH", "POST"}),
    ("POST", "/healthz", {"GET", "HEAD"}),
    ("TRACE", "/healthz", {"GET", "HEAD"}),
    ("CONNECT", "/healthz", {"GET", "HEAD"}),
    ("BREW", "/metrics", {"GET", "HEAD"}),
    ("get", "/healthz", {"GET", "HEAD"}),
])
def test_a_method_that_a_path_does_not_take_is_405_with_allow(refusing, method, path, allow):
    answer = refusing(method, path)
    assert answer.status == 405
    assert answer.code in (4005, None if method == "HEAD" else 4005)
    assert set(answer.headers["Allow"].split(", ")) == allow


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b'{"a":1,"a":2}', b'{"a":NaN}',
                                  b'{"payload":' * 200 + b"{}" + b"}" * 200, b'{"a":"\\ud800"}', b"{} {}",
                                  b"[" * 100_000])
def test_a_body_that_is_not_a_json_object_is_2002(refusing, body):
    answer = refusing("POST", "/api/v1/releases", body)
    assert answer.code == 2002
    assert "JSON" in answer.message


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded",
                                          "application/jsonp"])
def test_a_body_that_does_not_say_json_is_4015(refusing, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert refusing("POST", "/api/v1/releases", b"{}", headers).code == 4015


def test_the_content_type_may_name_its_charset(refusing):
    assert refusing("POST", "/api/v1/nodes", b"{}", {"Content-Type": "Application/JSON; charset=utf-8"}).code == 2001


def test_a_body_where_none_belongs_is_2002(refusing):
    assert refusing.code("GET", "/api/v1/nodes", {}) == 2002
    assert refusing.code("POST", "/api/v1/releases/1/retry", {"x": 1}) == 2003


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 8 * MAX_BODY_BYTES])
def test_a_body_over_1_mib_is_4013_also_for_who_sends_all_of_it_first(refusing, size):
    for _ in range(5):
        answer = refusing("POST", "/api/v1/releases", b"x" * size)
        assert (answer.code, answer.headers["Connection"]) == (4013, "close")


def test_a_body_of_1_mib_is_read(lite):
    add_nodes(lite.store, 1)
    body = json.dumps({"payload": {"x": ""}}).encode()
    body = body.replace(b'""', b'"' + b"y" * (MAX_BODY_BYTES - len(body)) + b'"')
    assert len(body) == MAX_BODY_BYTES
    assert lite.code("POST", "/api/v1/releases", body) == 0


def test_a_failure_of_our_own_is_5001_without_a_stack_trace(refusing, monkeypatch, caplog):
    def explode(_api: rc.Api, _request: rc.Request) -> rc.Reply:
        raise RuntimeError("hunter2")

    replace_handler(monkeypatch, rc.Api.list_nodes, explode)
    monkeypatch.setattr(rc.log, "propagate", True)
    answer = refusing("GET", "/api/v1/nodes")
    assert (answer.code, "hunter2" in answer.text) == (5001, False)
    assert "RuntimeError: hunter2" in caplog.text
    assert refusing.code("GET", "/healthz") == 0


def test_a_database_that_is_gone_is_503_with_retry_after_and_health_stays(client, database_url):
    add_nodes(client.store, 1)
    take_away(database_url)
    for method, path in (("GET", "/api/v1/nodes"), ("POST", "/api/v1/releases"), ("GET", "/readyz"),
                         ("DELETE", "/api/v1/nodes/1")):
        answer = client(method, path)
        assert (answer.code, answer.status) == (5002, 503)
        assert int(answer.headers["Retry-After"]) >= 1
    assert client.ok("GET", "/healthz") == {"status": "ok"}


def test_readyz_says_when_the_schema_is_not_ours(client):
    assert client.ok("GET", "/readyz") == {"status": "ready"}
    with client.store.database.transaction(write=True) as tx:
        tx.execute("INSERT INTO schema_version (version) VALUES (99)")
    eventually(lambda: client("GET", "/readyz").code == 5002)  # it looks once a second, whoever asks


# -- HTTP itself -------------------------------------------------------------------------------

@pytest.mark.parametrize("request_bytes", [
    b"nonsense\r\n\r\n",
    b"GET /healthz\r\n\r\n",
    b"GET /healthz HTTP/1.1 more\r\n\r\n",
    b"GET /healthz HTTP/x\r\n\r\n",
    b"GET /healthz HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"POST /healthz\r\n\r\n",
    b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(150)) + b"\r\n",
    b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET http://[x/healthz HTTP/1.1\r\n\r\n",
    b"POST /api/v1/releases HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"POST /api/v1/releases HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/v1/releases HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"POST /api/v1/releases HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}",
    b"POST /api/v1/releases HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
])
def test_what_the_parser_refuses_is_answered_in_the_envelope(refusing, request_bytes):
    status, document = split_answer(refusing.raw(request_bytes))
    assert HTTP_STATUS[document["code"]] == (status,)
    assert document["code"] in (2002, 4014, 4031, 5004, 5005)
    assert document["data"] is None
    assert refusing.ok("GET", "/healthz") == {"status": "ok"}


def test_a_refusal_after_a_good_request_on_one_connection_is_answered_too(refusing):
    raw = refusing.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nnonsense\r\n\r\n")
    first, _, second = raw.partition(b"}}")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert split_answer(second)[1]["code"] == 2002


def test_a_connection_is_kept_over_many_requests_also_refused_ones(lite):
    add_nodes(lite.store, 1)
    connection = lite.connect()
    try:
        sockets = set()
        for method, path, body, code in (
                ("GET", "/healthz", None, 0), ("POST", "/api/v1/releases", b'{"x":1}', 2003),
                ("POST", "/nowhere", b"x" * 1000, 3001), ("DELETE", "/api/v1/releases", None, 4005),
                ("POST", "/api/v1/releases", b"{", 2002), ("POST", "/api/v1/releases", b"{}", 0),
                ("GET", "/api/v1/releases/1", None, 0)):
            connection.request(method, path, body, JSON)
            sockets.add(connection.sock)
            assert read_answer(connection.getresponse()).code == code
        assert len(sockets) == 1
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json", "/api/v1/releases", "/api/v1/nodes/7"])
def test_head_answers_as_get_does_without_the_body(refusing, path):
    head, get = refusing("HEAD", path), refusing("GET", path)
    assert head.status == get.status
    assert {name: head.headers[name] for name in ("Content-Type", "Content-Length")} == {
        name: get.headers[name] for name in ("Content-Type", "Content-Length")}


def test_a_client_that_waits_for_100_continue_gets_it(lite):
    add_nodes(lite.store, 1)
    with socket.create_connection(lite.address, timeout=60) as connection:
        connection.sendall(b"POST /api/v1/releases HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert connection.recv(1000).startswith(b"HTTP/1.1 201 ")


def test_no_answer_is_stored_by_a_cache(refusing):
    assert refusing("GET", "/api/v1/nodes").headers["Cache-Control"] == "no-store"


# -- tokens ------------------------------------------------------------------------------------

@pytest.fixture
def guarded(new_client, open_store, sqlite_url, new_tokens):
    """A client of a server that asks for tokens; it has none yet."""
    guarded = new_client(open_store(sqlite_url), API_TOKENS_FILE=new_tokens())
    add_nodes(guarded.store, 1)
    return guarded


def test_a_token_is_needed_for_all_but_the_page_healthz_and_readyz(guarded):
    open_to_all = {path for method, path in ROUTES if guarded(method, path.replace("{id}", "1")).status == 200}
    assert open_to_all == {"/", "/healthz", "/readyz"}
    for method, path in ROUTES:
        answer = guarded(method, path.replace("{id}", "1"))
        assert path in open_to_all or (answer.code, answer.headers["WWW-Authenticate"]) == (1001, "Bearer")


def test_a_token_is_known_by_its_sha256(guarded):
    for authorization, code in (
            ("Bearer wrong", 1002), ("Bearer viewer-secret2", 1002), ("Bearer viewer-secret", 0),
            ("bearer   viewer-secret ", 0), ("Bearer", 1001), ("Bearer ", 1001), ("Basic dmVyYTp4", 1001),
            ("viewer-secret", 1001), ("Bearer \xff", 1002), (f"Bearer {sha256('viewer-secret')}", 1002)):
        answer = guarded("GET", "/api/v1/nodes", headers={"Authorization": authorization})
        assert (authorization, answer.code) == (authorization, code)
        assert "secret" not in answer.text


def test_a_viewer_reads_and_only_an_operator_changes(guarded):
    guarded.token = "viewer-secret"
    refused = {(method, path) for method, path in ROUTES if guarded(method, path.replace("{id}", "99")).code == 1004}
    assert refused == {(method, path) for method, path in ROUTES if method != "GET"} | {
        ("GET", f"/api/v1/{path}") for path in ("audit", "releases/{id}/payload", "releases/{id}/diff")}
    guarded.token = "operator-secret"
    for method, path in ROUTES:
        assert guarded(method, path.replace("{id}", "99")).code not in (1001, 1002, 1004)


def test_the_history_names_who_acted(guarded):
    guarded.token = "operator-secret"
    guarded.ok("POST", "/api/v1/releases", {}, 201)
    guarded.ok("POST", "/api/v1/releases/1/cancel")
    with guarded.store.database.transaction() as tx:
        assert {row[0] for row in tx.rows("SELECT actor FROM release_events")} == {"oskar"}


def test_the_tokens_file_is_read_again_when_it_changes(guarded, new_tokens):
    guarded.token = "new-secret"
    assert guarded.code("GET", "/api/v1/nodes") == 1002
    new_tokens(f"nina:viewer:{sha256('new-secret')}\n")
    assert guarded.code("GET", "/api/v1/nodes") == 0
    guarded.token = "viewer-secret"
    assert guarded.code("GET", "/api/v1/nodes") == 1002


@pytest.mark.parametrize("harm", ["readable", "removed", "broken", "not UTF-8"])
def test_a_tokens_file_that_went_bad_lets_nobody_in_and_tells_only_the_log(guarded, new_tokens, harm, caplog,
                                                                          monkeypatch):
    monkeypatch.setattr(rc.log, "propagate", True)
    guarded.token = "operator-secret"
    assert guarded.code("GET", "/api/v1/nodes") == 0
    path = new_tokens()
    if harm == "readable":
        os.chmod(path, 0o644)
    elif harm == "removed":
        os.remove(path)
    else:
        new_tokens("nonsense\n" if harm == "broken" else b"\xff:viewer:x\n")
    answer = guarded("GET", "/api/v1/nodes")
    assert (answer.code, "tokens" in answer.message, path in answer.text) == (5001, True, False)
    assert path in caplog.text
    assert "Traceback" not in caplog.text
    new_tokens()
    assert guarded.code("GET", "/api/v1/nodes") == 0


@pytest.mark.parametrize(("content", "mode", "message"), [
    ("", 0o604, "chmod"), ("nina:admin:" + "0" * 64, 0o600, ":1: must be"), ("nina:viewer:abc", 0o600, ":1: must be"),
    ("\n:viewer:" + "0" * 64, 0o600, ":2: must be"),
    ("nina:viewer:" + "0" * 64 + ":x", 0o600, ":1: what follows the SHA-256 must be"),
    (b"\xff", 0o600, "not UTF-8"),
])
def test_a_tokens_file_that_cant_be_used_stops_the_start(new_client, open_store, sqlite_url, new_tokens, content, mode,
                                                          message):
    with pytest.raises(rc.ConfigError, match="API_TOKENS_FILE") as caught:
        new_client(open_store(sqlite_url), API_TOKENS_FILE=new_tokens(content, mode))
    assert message in str(caught.value)


def test_a_token_in_the_tokens_file_itself_is_never_told(new_client, open_store, sqlite_url, new_tokens):
    with pytest.raises(rc.ConfigError) as caught:
        new_client(open_store(sqlite_url), API_TOKENS_FILE=new_tokens("nina:viewer:hunter2"))
    assert "hunter2" not in str(caught.value)


# -- where it listens --------------------------------------------------------------------------

@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", ":0"])
def test_without_tokens_only_loopback_is_bound(new_client, open_store, sqlite_url, address):
    with pytest.raises(rc.ConfigError, match="API_TOKENS_FILE"):
        new_client(open_store(sqlite_url), HTTP_ADDR=address)


def test_with_tokens_any_address_may_be_bound(new_client, open_store, sqlite_url, new_tokens):
    client = new_client(open_store(sqlite_url), HTTP_ADDR="0.0.0.0:0", API_TOKENS_FILE=new_tokens(), HTTP_PLAIN=1)
    client.address = ("127.0.0.1", client.address[1])
    assert client.code("GET", "/healthz") == 0
    assert client.code("GET", "/api/v1/nodes") == 1001


@pytest.mark.parametrize("address", ["203.0.113.1:0", "no-such-host.invalid:0"])
def test_an_address_that_cant_be_bound_is_told_by_name(new_client, open_store, sqlite_url, new_tokens, address):
    with pytest.raises(rc.ConfigError, match="HTTP_ADDR .* can't be listened on"):
        new_client(open_store(sqlite_url), HTTP_ADDR=address, API_TOKENS_FILE=new_tokens(), HTTP_PLAIN=1)


# -- HTTPS -------------------------------------------------------------------------------------

@pytest.fixture
def new_https(new_client, open_store, sqlite_url, certs):
    """A function that starts an HTTPS server on 127.0.1.1 and gives a client that trusts its CA."""
    def start(**settings: Any) -> Client:
        pair = f"{certs}/agents/{ADDRESSES[0]}"
        client = new_client(open_store(sqlite_url), HTTP_ADDR=f"{ADDRESSES[0]}:0", HTTP_CERT=f"{pair}.crt",
                            HTTP_KEY=f"{pair}.key", **settings)
        client.context = ssl.create_default_context(cafile=f"{certs}/ca.crt")
        return client
    return start


def test_with_a_certificate_the_api_speaks_https(new_https):
    client = new_https()
    assert client.ok("GET", "/healthz") == {"status": "ok"}
    connection = client.connect()
    try:
        for _ in range(3):
            connection.request("GET", "/api/v1/nodes")
            assert read_answer(connection.getresponse()).code == 0
        assert connection.sock.version() in ("TLSv1.2", "TLSv1.3")
    finally:
        connection.close()


def test_an_https_answer_ends_with_the_goodbye_of_tls(new_https):
    client = new_https()
    with socket.create_connection(client.address, timeout=60) as plain, \
            client.context.wrap_socket(plain, server_hostname=ADDRESSES[0], suppress_ragged_eofs=False) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    assert split_answer(raw)[0] == 200


def test_who_does_not_speak_tls_holds_up_nobody(new_https):
    client = new_https()
    with socket.create_connection(client.address, timeout=60), \
            socket.create_connection(client.address, timeout=60) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert client.code("GET", "/healthz") == 0


def test_with_a_client_ca_only_its_certificates_are_let_in(new_https, certs):
    client = new_https(HTTP_CLIENT_CA=f"{certs}/ca.crt")
    with pytest.raises((OSError, http.client.RemoteDisconnected)):
        client("GET", "/healthz")
    client.context.load_cert_chain(f"{certs}/other/control.crt", f"{certs}/other/control.key")
    with pytest.raises((OSError, http.client.RemoteDisconnected)):
        client("GET", "/healthz")
    client.context = ssl.create_default_context(cafile=f"{certs}/ca.crt")
    client.context.load_cert_chain(f"{certs}/control.crt", f"{certs}/control.key")
    assert client.code("GET", "/healthz") == 0


@pytest.mark.parametrize(("settings", "message"), [
    ({"HTTP_KEY": "control.key"}, "HTTP_CERT .* does not fit HTTP_KEY"),
    ({"HTTP_CERT": "none.crt"}, "HTTP_CERT .*none.crt can't be read: no such file"),
    ({"HTTP_CERT": "control.key"}, "HTTP_CERT"),
    ({"HTTP_CLIENT_CA": "control.key"}, "HTTP_CLIENT_CA .* holds no PEM certificate"),
])
def test_certificates_that_cant_be_used_stop_the_start(new_client, open_store, sqlite_url, certs, settings, message):
    pair = f"{certs}/agents/{ADDRESSES[0]}"
    given = {"HTTP_CERT": f"{pair}.crt", "HTTP_KEY": f"{pair}.key",
             **{name: f"{certs}/{file}" for name, file in settings.items()}}
    with pytest.raises(rc.ConfigError, match=message):
        new_client(open_store(sqlite_url), **given)


# -- pings --------------------------------------------------------------------------------------

def test_a_ping_asks_the_agent_of_one_node_and_gives_it_nothing_to_do(sqlite_world, new_client):
    sqlite_world.nodes(2)
    sqlite_world.agent(2).set(mode="refuse")
    agents = rc.AgentClient(sqlite_world.settings())
    client = new_client(sqlite_world.store)
    client.server.api = rc.Api(client.store, rc.Metrics(), ping=lambda node: rc.ping_node(agents, node))
    good, bad = (client.ok("POST", f"/api/v1/nodes/{number}/ping") for number in (1, 2))
    agents.close()
    assert (good["name"], good["ok"], good["errorKind"]) == ("edge-1", True, "")
    assert re.fullmatch(r"answers as a tasks agent in \d+ ms", good["message"])
    assert (bad["name"], bad["ok"], bad["errorKind"]) == ("edge-2", False, "unreachable")
    assert sqlite_world.runs() == [0, 0]
    assert client.code("POST", "/api/v1/nodes/3/ping") == 3001


def test_an_agent_that_hangs_is_given_up_before_the_page_gives_up_the_daemon(sqlite_world):
    sqlite_world.nodes(1)
    sqlite_world.agent(1).set(mode="hang")
    agents = rc.AgentClient(sqlite_world.settings())
    found = rc.ping_node(agents, sqlite_world.store.nodes.get(1), 0.5)
    agents.close()
    assert (found.is_ok, found.error_kind) == (False, "timeout")
    page = rc.DASHBOARD_FILE.read_text(encoding="utf-8")
    assert float(re.search(r"withinMs = (\d+)", page)[1]) / 1000 - 3 >= rc.PING_S


def test_where_no_agent_can_be_called_a_ping_says_why(open_store, sqlite_url, new_client):
    client = new_client(open_store(sqlite_url))
    add_nodes(client.store, 1)
    answer = client("POST", "/api/v1/nodes/1/ping")
    assert answer.code == 3003
    assert "no agent can be asked from here: this process calls no agents" in answer.text


@pytest.mark.parametrize(("max_waiting", "at_once"), [(32, rc.MAX_PINGS), (1, 1)])
def test_so_many_pings_at_once_and_no_more_each_has_a_thread(open_store, sqlite_url, new_client, max_waiting, at_once):
    client, may_answer = new_client(open_store(sqlite_url)), threading.Event()
    add_nodes(client.store, 1)
    asked: list[str] = []

    def ping(node: rc.Node) -> rc.Ping:
        asked.append(node.name)
        may_answer.wait(60)
        return rc.Ping(node, True, "", "")

    client.server.api = rc.Api(client.store, rc.Metrics(), max_waiting=max_waiting, ping=ping)
    codes: list[int | None] = []
    threads = [threading.Thread(target=lambda: codes.append(client.code("POST", "/api/v1/nodes/1/ping")))
               for _ in range(at_once)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(asked) == at_once)
    assert client.code("POST", "/api/v1/nodes/1/ping") == 4029
    may_answer.set()
    for thread in threads:
        thread.join()
    assert codes == [0] * at_once
    assert client.code("POST", "/api/v1/nodes/1/ping") == 0


# -- documents ---------------------------------------------------------------------------------

def test_openapi_lists_exactly_the_routes_that_are_served(refusing):
    document = refusing("GET", "/openapi.json").data
    assert document["openapi"].startswith("3.")
    listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert listed == ROUTES
    for method, path in listed:
        assert refusing.code(method, path.replace("{id}", "1"), []) == 2002  # and neither 3001 nor 4005
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    assert not set(document["components"]["schemas"]) - references, "a schema that nothing uses"


def test_the_schemas_of_openapi_fit_real_answers(client):
    document = client("GET", "/openapi.json").data
    client.server.api = rc.Api(client.store, rc.Metrics(), ping=lambda node: rc.Ping(node, False, "unreachable", "x"))
    add_nodes(client.store, 2)
    ended(client.store, "success", "success")
    ended(client.store, "failed", "skipped")
    fitted = set()
    for method, path, number, body in (
            ("POST", "/api/v1/releases", 0, {"reason": "x", "payload": {}, "strategy": {}, "target": "dns",
                                             "approval": True}),
            ("POST", "/api/v1/releases/{id}/approve", 3, {"reason": "x", "emergency": True}),
            ("GET", "/api/v1/releases", 0, None), ("GET", "/api/v1/releases/{id}", 3, None),
            ("GET", "/api/v1/releases/{id}", "3?view=summary", None), ("GET", "/api/v1/releases/{id}", 2, None),
            ("POST", "/api/v1/releases/{id}/pause", 3, {"reason": "x"}),
            ("POST", "/api/v1/releases/{id}/resume", 3, {}), ("POST", "/api/v1/releases/{id}/cancel", 3, None),
            ("POST", "/api/v1/releases/{id}/retry", 2, {}), ("POST", "/api/v1/releases/{id}/rollback", 2, None),
            ("GET", "/api/v1/releases/{id}/events", 3, None), ("GET", "/api/v1/releases/{id}/payload", 3, None),
            ("GET", "/api/v1/releases/{id}/diff", 2, None), ("GET", "/api/v1/releases/{id}/why", 3, None),
            ("GET", "/api/v1/nodes", 0, None),
            ("POST", "/api/v1/nodes", 0, {"name": "n", "mainIp": "::1", "agentPort": 1, "labels": {"a": "b"}}),
            ("PATCH", "/api/v1/nodes/{id}", 3, {"status": "offline", "enabled": False}),
            ("GET", "/api/v1/nodes/{id}", 3, None), ("GET", "/api/v1/nodes/{id}/releases", 1, None),
            ("POST", "/api/v1/nodes/{id}/ping", 3, None),
            ("POST", "/api/v1/catch-up", 0, {"reason": "x", "strategy": {}}), ("DELETE", "/api/v1/nodes/{id}", 3, None),
            ("PUT", "/api/v1/freeze", 0, {"frozen": True, "reason": "x"}), ("GET", "/api/v1/freeze", 0, None),
            ("GET", "/api/v1/health", 0, None), ("GET", "/api/v1/overview", 0, None), ("GET", "/healthz", 0, None),
            ("GET", "/readyz", 0, None), ("GET", "/api/v1/labels", 0, None),
            ("PATCH", "/api/v1/nodes", 0, {"total": 2, "status": "online"}),
                ("GET", "/api/v1/audit", 0, None)):
        operation = document["paths"][path][method.lower()]
        answer = client(method, path.replace("{id}", str(number)), body)
        schema = operation["responses"][str(answer.status)]["content"]["application/json"]["schema"]
        assert misfit(json.loads(answer.text), schema, document) == ""
        if body is not None:
            wanted = operation["requestBody"]["content"]["application/json"]["schema"]
            assert misfit(body, wanted, document) == ""
        fitted.add((method, path))
    assert ROUTES - fitted == {("GET", "/"), ("GET", "/metrics"), ("GET", "/openapi.json")}
    assert document["paths"]["/healthz"]["get"]["responses"]["400"] == {"$ref": "#/components/responses/400"}
    error = document["components"]["responses"]["400"]["content"]["application/json"]["schema"]
    assert misfit(json.loads(client("GET", "/nowhere").text), error, document) == ""


# -- steering (contract section 7) -------------------------------------------------------------------

def test_dry_run_answers_the_plan_with_200_and_writes_nothing(client):
    add_nodes(client.store, 20)
    client.store.nodes.update(3, {"status": "maintenance"})
    body = {"strategy": {"batches": [1, "50%"], "maxFailed": "20%", "maxFailedTotal": 1}, "dryRun": True}
    plan = client.ok("POST", "/api/v1/releases", body)
    assert [(len(b["nodeIds"]), b["maxFailed"]) for b in plan["batches"]] == [(1, 0), (9, 1), (9, 1)]
    assert plan["leftOut"] == [{"nodeId": 3, "nodeName": "edge-3", "why": "in maintenance"}]
    assert (plan["totalNodes"], plan["maxFailedTotal"], plan["maxParallel"]) == (19, 1, 0)
    assert client.ok("GET", "/api/v1/releases")["total"] == 0
    created = client.ok("POST", "/api/v1/releases", {**body, "dryRun": False}, 201)
    assert [b["nodeIds"] for b in created["batches"]] == [b["nodeIds"] for b in plan["batches"]]
    assert client.ok("GET", "/api/v1/releases/1?view=summary")["release"]["strategy"] == body["strategy"]


@on_sqlite
@pytest.mark.parametrize(("body", "code", "named"), [
    ({"nodeIds": []}, 2003, "nodeIds"), ({"nodeIds": [1, 1]}, 2003, "nodeIds"), ({"nodeIds": ["1"]}, 2003, "nodeIds"),
    ({"nodeIds": [2]}, 2003, "edge-2"), ({"nodeIds": [7]}, 2003, "node 7"), ({"labels": {"a": 1}}, 2003, "labels"),
    ({"labels": {"region": "nowhere"}}, 3003, "region"), ({"nodeIds": [1], "labels": {}}, 2003, "exclude"),
    ({"dryRun": "yes"}, 2003, "dryRun"), ({"strategy": {"soakSec": "1"}}, 2003, "soakSec"),
    ({"strategy": {"verify": {"url": "http://169.254.169.254/"}}}, 2003, "url"),
    ({"dryRun": True, "strategy": {"pauseAfter": [9]}}, 2003, "pauseAfter")])
def test_a_choice_or_strategy_that_can_not_be_meant_is_refused_by_name(client, body, code, named):
    add_nodes(client.store, 2)
    client.store.nodes.update(2, {"enabled": 0})
    answer = client("POST", "/api/v1/releases", body)
    assert (answer.code, named in answer.message) == (code, True), answer.message
    assert client.ok("GET", "/api/v1/releases")["total"] == 0


def test_the_freeze_is_set_seen_and_lifted_with_who_did_it(client):
    assert client.ok("GET", "/api/v1/freeze")["frozen"] is False
    frozen = client.ok("PUT", "/api/v1/freeze", {"frozen": True, "reason": "holidays"})
    assert (frozen["frozen"], frozen["reason"], frozen["actor"]) == (True, "holidays", "api")
    add_nodes(client.store, 1)
    client.ok("POST", "/api/v1/releases", {}, 201)
    reason = client.ok("GET", "/api/v1/releases/1")["release"]["statusReason"]
    assert reason.startswith("frozen: holidays; no executor is running")
    assert client.ok("PUT", "/api/v1/freeze", {"frozen": False})["frozen"] is False
    assert client.code("PUT", "/api/v1/freeze", {}) == 2001
    assert client.code("PUT", "/api/v1/freeze", {"frozen": 1}) == 2003


def test_cancel_by_force_and_resume_that_accepts_failures(client):
    add_nodes(client.store, 2)
    client.ok("POST", "/api/v1/releases", {"strategy": {"onExceed": "pause"}}, 201)
    with client.store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_tasks SET status = 'paused', started_at = created_at")
        tx.execute("UPDATE release_task_nodes SET status = 'failed' WHERE node_id = 1")
    assert client.code("POST", "/api/v1/releases/1/resume", {}) == 3003
    assert client.code("POST", "/api/v1/releases/1/resume", {"acceptFailures": "yes"}) == 2003
    resumed = client.ok("POST", "/api/v1/releases/1/resume", {"acceptFailures": True, "reason": "known"})
    assert (resumed["status"], resumed["failedNodes"]) == ("running", 1)
    ended = client.ok("POST", "/api/v1/releases/1/cancel", {"force": True, "reason": "enough"})
    assert (ended["status"], ended["skippedNodes"]) == ("cancelled", 1)
    assert "enough" in [e["detail"] for e in client.ok("GET", "/api/v1/releases/1/events")["items"]]


# -- a success is a success (issue 12) ------------------------------------------------------------------

def test_a_release_may_name_a_higher_version_and_no_other(client):
    add_nodes(client.store, 1)
    assert client.ok("POST", "/api/v1/releases", {"version": 10, "dryRun": True})["version"] == 10
    assert client.ok("POST", "/api/v1/releases", {"version": 10}, 201)["version"] == 10
    for dry in (False, True):
        for used in (1, 9, 10):
            answer = client("POST", "/api/v1/releases", {"version": used, "dryRun": dry})
            assert (answer.code, "name one from 11 on" in answer.message) == (2003, True)
    for wrong in (0, -1, 11.5, "11", True, None, [11], 2**53 + 1, 10**400):
        answer = client("POST", "/api/v1/releases", {"version": wrong})
        assert (answer.code, "version" in answer.message) == (2003, True), wrong
    assert client.code("POST", "/api/v1/releases", {"version": 12, "payload": {"version": 13}}) == 2003
    assert client.ok("POST", "/api/v1/releases", {"version": 13, "payload": {"version": 13}}, 201)["version"] == 13
    assert client.ok("POST", "/api/v1/releases", {}, 201)["version"] == 14
    document = client("GET", "/openapi.json").data
    assert document["components"]["schemas"]["NewRelease"]["properties"]["version"]["minimum"] == 1


@pytest.mark.parametrize("address", [
    "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "169.254.169.254", "fe80::1", "0.0.0.1",
    "::ffff:169.254.169.254", "::ffff:0.0.0.0", "0x0", "0xA9FEA9FE"])
def test_an_address_that_is_no_hosts_is_refused_as_a_node(refusing, address):
    before = refusing.ok("GET", "/api/v1/nodes")
    for answer in (refusing("POST", "/api/v1/nodes", {"name": "b", "mainIp": address}),
                   refusing("PATCH", "/api/v1/nodes/1", {"mainIp": address})):
        assert (answer.code, "mainIp" in answer.message) == (2003, True)
    assert refusing.ok("GET", "/api/v1/nodes") == before


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.7", "192.0.2.7", "fd00::7", "2001:db8::7",
                                     "edge-7.example.com", "0xcafe.example.com", "10x"])
def test_an_address_or_name_of_a_host_is_taken(lite, address):
    assert lite.ok("POST", "/api/v1/nodes", {"name": "b", "mainIp": address}, 201)["mainIp"] == address


def test_an_ipv4_address_within_ipv6_is_stored_as_what_it_is(client):
    assert client.ok("POST", "/api/v1/nodes", {"name": "a", "mainIp": "::ffff:10.0.0.7"}, 201)["mainIp"] == "10.0.0.7"
    client.ok("POST", "/api/v1/nodes", {"name": "b", "mainIp": "10.0.0.8"}, 201)
    for again in ("10.0.0.7", "::ffff:a00:7"):
        assert client.code("POST", "/api/v1/nodes", {"name": "c", "mainIp": again}) == 3002
        assert client.code("PATCH", "/api/v1/nodes/2", {"mainIp": again}) == 3002
    assert client.ok("PATCH", "/api/v1/nodes/2", {"mainIp": "::ffff:10.0.0.9"})["mainIp"] == "10.0.0.9"


@pytest.mark.parametrize("text", [
    "2026-01-31T22:00:00", "2026-01-31", "2026-01-31 22:00:00Z", "2026-02-30T00:00:00Z", "2026-01-31T22:00Z",
    "2026-01-31T22:00:00.Z", "2026-01-31T22:00:00+2", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00",
    "99999-01-01T00:00:00Z", "9999-12-31T23:59:59.9999Z", "2026-01-31T22:00:00\u0660Z", "now", 1790000000, None])
def test_a_start_time_that_is_none_is_refused_by_name(refusing, text):
    answer = refusing("POST", "/api/v1/releases", {"strategy": {"startAt": text}})
    assert (answer.code, answer.message.startswith("strategy: startAt ")) == (2003, True), answer.message
    assert "must be a time" in answer.message


def test_what_is_given_twice_in_a_request_is_refused(lite):
    add_nodes(lite.store, 1)
    for answer in (lite("GET", "/api/v1/releases?page=1&page=1"), lite("GET", "/api/v1/nodes?pageSize=1&pageSize=2"),
                   lite("POST", "/api/v1/releases", b'{"target":"cdn","target":"dns"}'),
                   lite("POST", "/api/v1/releases", b'{"labels":{"region":"eu","region":"us"}}'),
                   lite("POST", "/api/v1/nodes", b'{"name":"b","mainIp":"10.0.0.7","mainIp":"10.0.0.8"}')):
        assert (answer.code, "twice" in answer.message) == (2002, True), answer.message
    for header in (b"Idempotency-Key", b"Authorization", b"Content-Type", b"Host"):
        raw = lite.raw(b"POST /api/v1/releases HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                       b"%s: a\r\n%s: a\r\nContent-Length: 2\r\n\r\n{}" % (header, header))
        assert split_answer(raw)[0] == 400, header
    assert (lite.store.releases.page().total, lite.store.nodes.page().total) == (0, 1)


def test_all_nodes_that_a_search_finds_are_changed_where_they_are_as_many_as_was_seen(store):
    add_nodes(store, 12)
    store.nodes.update(3, {"status": "maintenance"})
    api = rc.Api(store, rc.Metrics())

    def change(search: str, **body: Any) -> int:
        return api.update_nodes(rc.Request((), {"search": search}, body, "anna")).data["changed"]

    with pytest.raises(rc.AppError, match="4 nodes found, not 5: look at them again"):
        change("edge-1", total=5, status="maintenance")
    for body in ({"total": 4}, {"status": "online"}, {"total": 4, "name": "x"}):
        with pytest.raises(rc.AppError):
            change("edge-1", **body)
    assert change("edge-1", total=4, status="maintenance") == 4
    assert change("edge", total=12, status="maintenance") == 7
    assert {node.status for node in store.nodes.page().items} == {"maintenance"}
    assert len(store.audit.rows(0, 100, rc.AuditFilter(action="node.set"))) == 12


def test_the_labels_of_the_nodes_that_get_releases_are_counted(store):
    for number, labels in enumerate(('{"pop":"ams","role":"a"}', '{"pop":"ams"}', '{"pop":"fra"}', "{}", "broken"), 1):
        store.nodes.add(f"edge-{number}", f"10.0.0.{number}", labels="{}")
        sql(store, "UPDATE nodes SET labels = ? WHERE id = ?", labels, number)
    store.nodes.update(3, {"enabled": 0})
    found = rc.Api(store, rc.Metrics()).list_labels(rc.Request((), {}, {}, "anna")).data["items"]
    assert found == [{"key": "pop", "value": "ams", "nodes": 2}, {"key": "role", "value": "a", "nodes": 1}]
