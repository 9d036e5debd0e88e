"""The stand-in agents behave as section 1 of the contract says, and misbehave as they are told."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from fake_agent import Agent, AgentSpec, Fleet, payload_sha256
from lab import FOREVER_MS, HOST, SCRIPTS, eventually, make_certs

WAIT_S = 10.0
BROKEN_ANSWERS = [
    ("notJson", 200, lambda body: not body.startswith(b"{")),
    ("tooBig", 200, lambda body: len(body) > 1024 * 1024),
    ("wrongShape", 200, lambda body: isinstance(json.loads(body), list)),
    ("status", 503, lambda body: json.loads(body)["code"] == 5001),
    ("code", 200, lambda body: json.loads(body)["code"] == 5001),
    ("redirect", 302, lambda body: body == b"Found\n"),
]


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def data(self) -> Any:
        return json.loads(self.body)["data"]


@pytest.fixture
def fleet(certs: Path) -> Iterator[Fleet]:
    agents = [AgentSpec(HOST, 0, "tasks"), AgentSpec(HOST, 0, "execute")]
    with Fleet(certs, agents, task_ms=20) as running:
        yield running


@pytest.fixture
def tasks(fleet: Fleet) -> Agent:
    return fleet.agents[0]


@pytest.fixture
def execute(fleet: Fleet) -> Agent:
    return fleet.agents[1]


def client_context(certs: Path, with_certificate: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certs / "ca.crt"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if with_certificate:
        context.load_cert_chain(certs / "control.crt", certs / "control.key")
    return context


def connect(agent: Agent, certs: Path, timeout: float = WAIT_S) -> http.client.HTTPSConnection:
    context = client_context(certs)
    return http.client.HTTPSConnection(HOST, agent.port, timeout=timeout, context=context)


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> Reply:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data)
    response = connection.getresponse()
    return Reply(response.status, response.read(), dict(response.headers))


def once(agent: Agent, certs: Path, method: str, path: str, body: Any = None,
         timeout: float = WAIT_S) -> Reply:
    connection = connect(agent, certs, timeout)
    try:
        return ask(connection, method, path, body)
    finally:
        connection.close()


def dispatch(agent: Agent, certs: Path, version: int, task_id: str = "", timeout: float = WAIT_S,
             payload: dict[str, Any] | None = None) -> Reply:
    task_id, payload = task_id or f"apply_config_{HOST}_{version}", payload or {}
    if agent.protocol == "execute":
        asked = {"requestId": task_id, "type": "apply_config", "payload": {**payload, "version": version}}
        return once(agent, certs, "POST", "/agent/v1/tasks/execute", asked, timeout)
    body = {"taskId": task_id, "type": "apply_config", "version": version, "payload": payload}
    return once(agent, certs, "POST", "/tasks/dispatch", body, timeout)


def end_of(agent: Agent, certs: Path, version: int) -> dict[str, Any]:
    path = f"/tasks/apply_config_{HOST}_{version}"
    replies: list[Reply] = []

    def is_at_rest() -> bool:
        replies[:] = [once(agent, certs, "GET", path)]
        return replies[0].data["status"] in ("success", "failed")

    eventually(is_at_rest)
    return replies[0].data


def test_a_dispatched_task_ends_in_success_and_applies_its_version(tasks: Agent, certs: Path) -> None:
    reply = dispatch(tasks, certs, 42)
    assert (reply.status, reply.data) == (200, {"taskId": f"apply_config_{HOST}_42", "status": "pending"})
    outcome = end_of(tasks, certs, 42)
    assert (outcome["status"], outcome["lastError"], outcome["type"]) == ("success", "", "apply_config")
    assert outcome["createdAt"] <= outcome["startedAt"] <= outcome["finishedAt"]
    assert (tasks.applied_version, tasks.run_counts) == (42, {outcome["taskId"]: 1})


def test_a_failure_is_remembered_and_not_run_again_until_the_restart(tasks: Agent, certs: Path) -> None:
    tasks.set(outcome="failed", message="no disk space")
    dispatch(tasks, certs, 42)
    assert end_of(tasks, certs, 42)["lastError"] == "no disk space"
    tasks.set(outcome="success", message="")
    assert dispatch(tasks, certs, 42).data["status"] == "failed"
    tasks.restart()
    unknown = once(tasks, certs, "GET", f"/tasks/apply_config_{HOST}_42")
    assert (unknown.status, unknown.data) == (404, None)
    dispatch(tasks, certs, 42)
    assert end_of(tasks, certs, 42)["status"] == "success"
    assert tasks.run_counts == {f"apply_config_{HOST}_42": 2}


def test_a_version_that_is_not_higher_is_success_and_changes_nothing(tasks: Agent, certs: Path) -> None:
    tasks.set(applied_version=42)
    dispatch(tasks, certs, 41)
    assert end_of(tasks, certs, 41)["status"] == "success"
    assert (tasks.runs, tasks.applied_version) == ([], 42)


def test_an_execute_agent_answers_with_the_outcome(execute: Agent, certs: Path) -> None:
    reply = dispatch(execute, certs, 42)
    assert reply.data == {"requestId": f"apply_config_{HOST}_42", "status": "success",
                          "message": "Version 42 applied"}
    assert dispatch(execute, certs, 42, "another").data["message"] == "Version 42 already applied (current: 42)"
    for body in ({"requestId": "x", "type": "apply_config", "payload": {}}, {"requestId": "y", "type": "apply_config"}):
        without_version = once(execute, certs, "POST", "/agent/v1/tasks/execute", body)
        assert without_version.data["message"] == "Version 0 already applied (current: 42)"
    assert len(execute.runs) == 1


@pytest.mark.parametrize("version", [1, 42, 43])
def test_an_execute_agent_answers_a_known_id_with_its_outcome_whatever_the_version(
        execute: Agent, certs: Path, version: int) -> None:
    dispatch(execute, certs, 42, "known")
    reply = dispatch(execute, certs, version, "known")
    assert reply.data == {"requestId": "known", "status": "success", "message": "Version 42 applied"}
    assert (execute.run_counts, execute.applied_version) == ({"known": 1}, 42)


def test_an_execute_agent_remembers_a_failure_though_a_newer_version_was_applied(execute: Agent, certs: Path) -> None:
    execute.set(outcome="failed", message="no disk space")
    dispatch(execute, certs, 42, "known")
    execute.set(outcome="success", message="")
    dispatch(execute, certs, 43)
    assert dispatch(execute, certs, 42, "known").data == {
        "requestId": "known", "status": "failed", "message": "no disk space"}
    execute.restart()
    assert dispatch(execute, certs, 42, "known").data["message"] == "Version 42 already applied (current: 43)"


def test_an_execute_agent_refuses_what_is_no_request(execute: Agent, certs: Path) -> None:
    no_id, no_type = b'{"type":"apply_config","payload":{"version":1}}', b'{"requestId":"x","payload":{"version":1}}'
    for body in (b"[]", b"{", b"", b"{}", no_id, no_type, no_type[:-1] + b',"type":""}'):
        reply = once(execute, certs, "POST", "/agent/v1/tasks/execute", body)
        assert (reply.status, json.loads(reply.body)) == (
            400, {"code": 2001, "data": None, "message": "invalid request body"})
    assert (execute.runs, execute.applied_version) == ([], 0)
    assert once(execute, certs, "POST", "/agent/v1/tasks/execute/", b"{}").status == 301
    reply = once(execute, certs, "GET", "/elsewhere")
    assert (reply.status, reply.headers["Content-Type"][:10]) == (404, "text/plain")


def test_an_execute_agent_breaks_both_of_two_requests_at_the_same_time(execute: Agent, certs: Path) -> None:
    execute.set(task_ms=400)
    replies: list[Reply] = []
    first = threading.Thread(target=lambda: replies.append(dispatch(execute, certs, 42)))
    first.start()
    eventually(lambda: execute.runs)
    replies.append(dispatch(execute, certs, 42))
    first.join(WAIT_S)
    assert [reply.data["status"] for reply in replies] == ["failed", "failed"]
    assert (execute.overlaps, execute.max_concurrent, execute.applied_version) == (1, 2, 0)


def test_a_payload_is_known_by_its_content_and_not_by_its_version_or_order() -> None:
    assert payload_sha256({"version": 1, "b": [1.5, None], "a": "\u00e9"}) == hashlib.sha256(
        '{"a":"\u00e9","b":[1.5,null]}'.encode()).hexdigest()
    assert payload_sha256({"version": 2, "a": {"y": 1, "x": 2}}) == payload_sha256({"a": {"x": 2, "y": 1}})
    assert payload_sha256({"a": {"version": 1}}) != payload_sha256({"a": {"version": 2}})
    assert len(payload_sha256({"a": "\ud800"})) == 64  # an agent gets what others may send, and does not die of it


@pytest.mark.parametrize("number", [0, 1], ids=["tasks", "execute"])
def test_an_agent_tells_which_payload_it_ran_and_which_it_has(fleet: Fleet, certs: Path, number: int) -> None:
    agent = fleet.agents[number]
    good, bad = {"websites": [], "rev": 1}, {"websites": [], "rev": 2}
    assert (agent.content, agent.snapshot()["content"]) == ("", "")

    def send(version: int, payload: dict[str, Any]) -> None:
        dispatch(agent, certs, version, payload=payload)
        eventually(lambda: [run for run in agent.runs if run["version"] == version and run["outcome"]])

    send(1, good)
    agent.set(outcome="failed")
    send(2, bad)
    assert [run["payloadSha256"] for run in agent.runs] == [payload_sha256(good), payload_sha256(bad)]
    agent.restart()
    agent.clear_log()  # what is on the node outlives both
    assert (agent.content, agent.snapshot()["content"]) == (payload_sha256(good), payload_sha256(good))
    agent.set(outcome="success")
    send(3, bad)
    dispatch(agent, certs, 2, "older", payload=good)  # already applied: nothing is done
    assert agent.content == payload_sha256(bad)


def test_an_execute_agent_drops_its_sites_for_a_payload_without_websites(execute: Agent, certs: Path) -> None:
    dispatch(execute, certs, 1, payload={"websites": [{"name": "a"}, {"name": "b"}]})
    assert (execute.sites, execute.snapshot()["sites"]) == (2, 2)
    execute.set(outcome="failed")
    dispatch(execute, certs, 2, payload={"websites": [{"name": "a"}]})
    assert execute.sites == 2
    execute.set(outcome="success")
    assert dispatch(execute, certs, 3, payload={}).data["status"] == "success"
    assert execute.sites == 0
    assert [run["websites"] for run in execute.runs] == [2, 1, 0]


def test_a_tasks_agent_serves_no_sites(tasks: Agent, certs: Path) -> None:
    dispatch(tasks, certs, 42, payload={"websites": [{"name": "a"}]})
    end_of(tasks, certs, 42)
    assert (tasks.sites, "websites" in tasks.runs[0]) == (0, False)


def test_a_tasks_agent_may_name_a_task_by_an_id_of_its_own(tasks: Agent, certs: Path) -> None:
    tasks.set(rename=True)
    assert dispatch(tasks, certs, 42, "sent").data == {"taskId": "agent-sent", "status": "pending"}
    eventually(lambda: tasks.applied_version == 42)
    for task_id in ("sent", "agent-sent"):
        data = once(tasks, certs, "GET", f"/tasks/{task_id}").data
        assert (data["taskId"], data["status"]) == (task_id, "success")
    assert dispatch(tasks, certs, 42, "sent").data == {"taskId": "agent-sent", "status": "success"}
    assert tasks.run_counts == {"sent": 1}
    dispatch(tasks, certs, 43, "agent-sent")  # not an id that it was sent: it runs, which is what tests look for
    eventually(lambda: tasks.applied_version == 43)
    assert tasks.run_counts == {"sent": 1, "agent-sent": 1}
    tasks.restart()
    assert once(tasks, certs, "GET", "/tasks/agent-sent").status == 404


def test_a_client_that_leaves_does_not_stop_the_run(execute: Agent, certs: Path) -> None:
    execute.set(task_ms=200)
    with pytest.raises(socket.timeout):
        dispatch(execute, certs, 42, timeout=0.1)
    eventually(lambda: execute.applied_version == 42)
    eventually(lambda: execute.in_flight == 0)


@pytest.mark.parametrize("number", [0, 1], ids=["tasks", "execute"])
def test_a_test_ends_a_task_itself(fleet: Fleet, certs: Path, number: int) -> None:
    agent = fleet.agents[number]
    agent.set(task_ms=FOREVER_MS)
    client = threading.Thread(target=lambda: dispatch(agent, certs, 42))
    client.start()
    eventually(lambda: agent.dispatches)
    assert agent.applied_version == 0
    fleet.finish()
    client.join()
    assert [run["outcome"] for run in agent.runs] == ["success"]
    assert (agent.applied_version, agent.in_flight) == (42, 0)


def test_one_connection_serves_many_requests(tasks: Agent, certs: Path) -> None:
    connection = connect(tasks, certs)
    assert [ask(connection, "GET", "/tasks/none").status for _ in range(5)] == [404] * 5
    assert (tasks.connections, tasks.handshakes, tasks.queries) == (1, 1, 5)
    connection.close()


@pytest.mark.parametrize("protocol", ["tasks", "execute"])
@pytest.mark.parametrize(("mode", "runs"), [("cut", 1), ("cutEarly", 1), ("drop", 0)])
def test_an_answer_is_lost(fleet: Fleet, certs: Path, mode: str, runs: int, protocol: str) -> None:
    agent = next(one for one in fleet.agents if one.protocol == protocol)
    agent.set(mode=mode, times=1)
    with pytest.raises((OSError, http.client.HTTPException)):
        dispatch(agent, certs, 42)
    eventually(lambda: agent.applied_version == 42 * runs)
    assert (len(agent.runs), agent.behaviour.mode) == (runs, "normal")


@pytest.mark.parametrize(("mode", "status", "is_expected"), BROKEN_ANSWERS)
def test_an_answer_is_wrong_for_the_named_operation_only(
        tasks: Agent, certs: Path, mode: str, status: int, is_expected: Callable[[bytes], bool]) -> None:
    tasks.set(mode=mode, httpStatus=503, only="dispatch")
    reply = dispatch(tasks, certs, 42)
    assert reply.status == status
    assert is_expected(reply.body)
    assert once(tasks, certs, "GET", "/tasks/none").status == 404
    assert tasks.runs == []


@pytest.mark.parametrize("mode", ["hang", "hangTls", "drip"])
def test_an_agent_that_never_ends_its_answer(tasks: Agent, certs: Path, mode: str) -> None:
    tasks.set(mode=mode)
    with pytest.raises(socket.timeout):
        dispatch(tasks, certs, 42, timeout=0.15)  # less than the time between two bytes of "drip"
    eventually(lambda: tasks.open_connections == 0 and tasks.in_flight == 0)
    tasks.set(mode="normal")
    assert dispatch(tasks, certs, 42).status == 200


def test_a_refusing_agent_listens_again_at_the_same_port(tasks: Agent, certs: Path) -> None:
    port = tasks.port
    tasks.set(mode="refuse")
    with pytest.raises(ConnectionRefusedError):
        dispatch(tasks, certs, 42)
    tasks.set(mode="normal")
    assert dispatch(tasks, certs, 42).status == 200
    assert tasks.port == port


def test_forget_restarts_the_agent_once_after_the_answer(tasks: Agent, certs: Path) -> None:
    tasks.set(forget=True)
    assert dispatch(tasks, certs, 42).status == 200
    assert once(tasks, certs, "GET", f"/tasks/apply_config_{HOST}_42").status == 404
    dispatch(tasks, certs, 42)
    assert end_of(tasks, certs, 42)["status"] == "success"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_certificate_gets_an_alert(
        tasks: Agent, certs: Path, version: ssl.TLSVersion) -> None:
    context = client_context(certs, with_certificate=False)
    context.minimum_version = context.maximum_version = version

    def read_once() -> None:
        raw = socket.create_connection((HOST, tasks.port), WAIT_S)
        with raw, context.wrap_socket(raw, server_hostname=HOST) as tls:
            tls.recv(1)

    with pytest.raises(ssl.SSLError, match="(?i)alert"):
        read_once()
    eventually(lambda: tasks.handshake_errors == 1)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_can_be_resumed(tasks: Agent, certs: Path, version: ssl.TLSVersion) -> None:
    context = client_context(certs)
    context.minimum_version = context.maximum_version = version
    session = None
    for _ in range(2):
        raw = socket.create_connection((HOST, tasks.port), WAIT_S)
        with raw, context.wrap_socket(raw, server_hostname=HOST, session=session) as tls:
            tls.sendall(b"GET /tasks/none HTTP/1.1\r\nHost: agent\r\n\r\n")
            assert tls.recv(65536)
            session = tls.session
    assert (tasks.handshakes, tasks.resumed) == (2, 1)


def test_an_expired_certificate_is_noticed(tmp_path: Path) -> None:
    make_certs(tmp_path, "unused.example")
    make_certs(tmp_path, HOST, DAYS="-1")
    expired = pytest.raises(ssl.SSLCertVerificationError, match="expired")
    with Fleet(tmp_path, [AgentSpec(HOST, 0)]) as fleet, expired:
        dispatch(fleet.agent(HOST), tmp_path, 42)


def test_unknown_behaviour_is_refused_by_name(tasks: Agent) -> None:
    with pytest.raises(ValueError, match="taskMS"):
        tasks.set(taskMS=1)
    with pytest.raises(ValueError, match="mode"):
        tasks.set(mode="sleepy")


def test_the_program_is_controlled_over_http_and_ends_on_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "fake_agent.py"), "--plain", "--listen", f"{HOST}:0",
               "--control", f"{HOST}:0", "--task-ms", "0", "--set", HOST, "message=a, b,delayMs=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == "ready: 1 agents\n"
        port = int(program.stderr.readline().rpartition(":")[2])
        control = http.client.HTTPConnection(HOST, port, timeout=WAIT_S)
        agent = json.loads(ask(control, "GET", "/agents").body)[HOST]
        assert (agent["behaviour"]["message"], agent["behaviour"]["delayMs"]) == ("a, b", 1)
        assert ask(control, "PUT", f"/agents/{HOST}", {"outcome": "failed"}).status == 200
        assert ask(control, "PUT", "/agents/*", {"outcome": "odd"}).status == 400
        direct = http.client.HTTPConnection(HOST, agent["port"], timeout=WAIT_S)
        assert ask(direct, "POST", "/tasks/dispatch", {"taskId": "t", "version": 1}).status == 200
        eventually(lambda: ask(direct, "GET", "/tasks/t").data["status"] == "failed")
        assert ask(control, "POST", f"/agents/{HOST}/restart").status == 200
        assert ask(control, "DELETE", "/log").status == 200
        direct.close()
        assert ask(direct, "GET", "/tasks/t").status == 404
        program.send_signal(signal.SIGTERM)
        assert program.wait(WAIT_S) == 0
        control.close()
        direct.close()
