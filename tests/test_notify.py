"""Notifications: what happened gets to people, at least once, and no release waits for that."""
from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import ROOT, Inbox, World, add_nodes, beside, eventually, findings, new_release, serve_process, sql
from test_places import rows_of, section_of

import releasectl as rc

ALL_KINDS = ",".join(rc.NOTIFY_KINDS)


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    """A receiver at http://."""
    found = Inbox()
    yield found
    found.stop()


@pytest.fixture
def program(tmp_path) -> Callable[[str], str]:
    """A function that writes a Python program and returns the NOTIFY_COMMAND that runs it."""
    def write(text: str) -> str:
        path = tmp_path / "notify.py"
        path.write_text(text)
        return f"{sys.executable} '{path}'"
    return write


def notifying(world: World, **settings: object) -> dict[str, object]:
    """Let the store of a world write the notifications of these settings; return them."""
    world.store.database.notify_on = world.settings(**settings).notify_kinds
    return settings


def drain(world: World, **settings: object) -> None:
    """Do what `run-once --drain` does."""
    executor = world.executor(**settings)
    executor.drain()
    executor.close()


def outbox(store: rc.Store) -> list[rc.Notification]:
    with store.database.transaction() as tx:
        return [rc.Notification(*row) for row in tx.rows(
            f"SELECT {rc.Outbox.COLUMNS} FROM notifications ORDER BY id")]


def make_due(store: rc.Store, age_s: float = 0.0) -> None:
    """Let what waits be due now, and be as old as that."""
    sql(store, "UPDATE notifications SET next_at = ?, at = ?", rc.utc_text(time.time() - 1),
        rc.utc_text(time.time() - age_s))


def events(store: rc.Store, release_id: int = 1) -> list[str]:
    return [event.event for event in store.releases.events(release_id) if event.node_id is None]


# -- what is written ------------------------------------------------------------------------------

def test_the_table_in_the_document_says_which_change_is_told_as_what():
    told = {}
    rows = [row for row in rows_of(section_of("docs/ARCHITECTURE.md", "Notifications")) if len(row) == 3]
    assert {kind.strip("`") for _, kind, _ in rows} == {*rc.NOTIFY_KINDS}
    for change, kind, _ in rows:
        before, _, after = change.partition(" to ")
        if after and change.startswith(("(", *rc.RELEASE_TRANSITIONS)):
            told.update({(status if status != "(none)" else "", after): kind.strip("`")
                         for status in before.split(" or ")})
    assert told == rc.NOTIFIED_CHANGES


def test_every_change_to_an_end_or_a_pause_is_told():
    for before, statuses in rc.RELEASE_TRANSITIONS.items():
        for after in statuses:
            kind = rc.notification_kind("any", before, after)
            assert (kind == after) == (after in (*rc.TERMINAL, rc.PAUSED))
    assert {*rc.NOTIFIED_CHANGES.values(), *rc.NOTIFIED_EVENTS.values(), rc.FROZEN} == set(rc.NOTIFY_KINDS)


def test_a_message_is_written_in_the_transaction_of_its_event(store):
    store.database.notify_on = frozenset(rc.NOTIFY_KINDS)
    add_nodes(store, 1)
    new_release(store, reason="for tests")
    [row] = outbox(store)
    assert (row.kind, row.release_id, row.detail, row.attempts) == ("created", 1, "for tests", 0)
    with contextlib.suppress(ZeroDivisionError), store.database.transaction(write=True) as tx:
        rc.add_events(tx, row.at, "tests", [rc.NewEvent(1, "paused", "pending", "paused")])
        raise ZeroDivisionError
    assert outbox(store) == [row]
    assert events(store) == ["created"]


def test_nothing_is_written_where_nobody_has_a_receiver_for_it(store):
    add_nodes(store, 1)
    new_release(store)
    store.database.notify_on = frozenset({"failed"})
    new_release(store)
    assert outbox(store) == []


def test_who_has_no_receiver_writes_for_an_executor_that_has_one(store, open_store, database_url):
    add_nodes(store, 1)
    other = open_store(database_url)
    other.database.notify_on = frozenset({"created", "frozen"})
    other.claims.note_executor("host-a:1:x", "host-a", "serve", 10.0, "", is_first=True)
    new_release(store)
    store.releases.set_freeze(True, "alice", "network work")
    store.releases.act("pause", 1, "alice")
    assert [(row.kind, row.release_id) for row in outbox(store)] == [("created", 1), ("frozen", None)]
    other.database.notify_on = frozenset()  # the host's next process has other settings
    other.claims.end_executor("host-a:1:x")
    other.claims.note_executor("host-a:2:x", "host-a", "serve", 10.0, "", is_first=True)
    new_release(store)
    assert len(outbox(store)) == 2


def test_a_restart_of_the_program_counts_for_the_kinds_that_it_had_until_it_is_there_again(store):
    add_nodes(store, 1)
    store.database.notify_on = frozenset({"created"})
    store.claims.note_executor("host-a:1:x", "host-a", "serve", 10.0, "", is_first=True)
    store.claims.end_executor("host-a:1:x")
    store.database.notify_on = frozenset()
    new_release(store)
    assert [row.kind for row in outbox(store)] == ["created"]


@pytest.mark.parametrize("kind", ["serve", "tick"])
def test_a_second_process_without_a_receiver_switches_nothing_off_for_one_that_lives(store, kind):
    add_nodes(store, 1)
    store.database.notify_on = frozenset({"created", "cancelled"})
    store.claims.note_executor("host-a:1:x", "host-a", kind, 17.0, "", is_first=True)
    store.database.notify_on = frozenset()
    for number, other in enumerate(("serve", "tick", "tick")):
        store.claims.note_executor(f"host-a:2:{number}", "host-a", other, 17.0, "", is_first=True)
    new_release(store)
    store.releases.act("cancel", 1, "alice")
    assert [row.kind for row in outbox(store)] == ["created", "cancelled"]
    with store.database.transaction() as tx:
        assert len(rc.read_executors(tx)) == 3  # the second of the two bare ticks took the place of the first
    sql(store, "UPDATE executors SET seen_at = ? WHERE owner = 'host-a:1:x'", rc.utc_text(time.time() - 4000))
    store.claims.note_executor("host-a:3:x", "host-a", kind, 17.0, "", is_first=True)
    new_release(store)
    assert len(outbox(store)) == 2


def test_what_an_operator_does_between_two_ticks_of_cron_is_told_by_the_next(fleet_cli, inbox):
    bare = dict(fleet_cli.settings)
    fleet_cli.settings.update(NOTIFY_URL=inbox.url, NOTIFY_ON="cancelled")
    cron = dict(fleet_cli.settings)
    fleet_cli.ok("run-once")
    fleet_cli.settings = bare
    fleet_cli.ok("run-once")
    new_release(fleet_cli.world.store, strategy={"startAt": "2099-01-01T00:00:00Z"})
    fleet_cli.ok("cancel", "1")
    fleet_cli.settings = cron
    fleet_cli.ok("run-once")
    assert inbox.kinds() == ["cancelled"]


# -- end to end -----------------------------------------------------------------------------------

def test_a_failed_release_is_told_as_why_tells_it_with_its_failures_and_a_link(world, inbox):
    world.nodes(3)
    world.fleet.set(outcome="failed", message="nginx -t failed")
    settings = notifying(world, NOTIFY_URL=inbox.url, PUBLIC_URL="https://releases.example.com/")
    release = world.store.releases.create(rc.ReleaseRequest(reason="for tests", payload={"key": "SECRET"}), "t").release
    drain(world, **settings)
    [message] = eventually(lambda: inbox.messages)
    assert outbox(world.store) == []
    now = world.store.releases.get(release.id)
    assert (message["kind"], message["at"]) == ("failed", now.finished_at)
    assert message["text"] == rc.one_line(world.store.claims.why(release.id, 600.0).line)
    [group] = message["failures"]
    assert (group["errorKind"], group["nodes"], group["nodeNames"]) == ("agent_failed", 1, ["edge-1"])
    assert "nginx -t failed" in group["message"]
    assert message["link"] == "https://releases.example.com/#/releases/1"
    assert message["host"] == socket.gethostname()
    assert message["release"] == {
        "id": 1, "target": "cdn", "version": 1, "status": "failed", "reason": "for tests", "totalNodes": 3,
        "successNodes": 0, "failedNodes": 1, "skippedNodes": 2, "statusReason": now.status_reason}
    assert inbox.heads[0]["X-Releasectl-Id"] == message["id"]
    assert b"SECRET" not in inbox.bodies[0]
    assert "X-Releasectl-Signature" not in inbox.heads[0]


def test_all_kinds_of_a_release_are_told_in_their_order(world, inbox):
    world.nodes(2)
    settings = notifying(world, NOTIFY_URL=inbox.url, NOTIFY_ON=ALL_KINDS)
    new_release(world.store, strategy={"pauseAfter": [1]})
    drain(world, **settings)
    world.store.releases.act("resume", 1, "alice")
    drain(world, **settings)
    new_release(world.store)
    world.store.releases.set_freeze(True, "alice", "network work")
    world.store.releases.act("cancel", 2, "alice")
    drain(world, **settings)
    assert inbox.kinds() == ["created", "started", "paused", "success", "created", "frozen", "cancelled"]
    frozen = inbox.messages[5]
    assert (frozen["release"], frozen["text"]) == (None, "frozen by alice: network work")
    assert len({message["id"] for message in inbox.messages}) == 7


def test_a_message_says_what_was_and_what_is_where_its_release_has_gone_on(world, inbox):
    world.nodes(1)
    settings = notifying(world, NOTIFY_URL=inbox.url)
    new_release(world.store)
    world.store.releases.act("pause", 1, "alice", reason="lunch")
    world.store.releases.act("resume", 1, "alice")
    drain(world, **settings)
    assert re.match(r"release 1 \(v1\) was paused: lunch; now: ", inbox.messages[0]["text"])


def test_a_release_that_is_taken_over_is_told(world, inbox):
    world.nodes(1)
    settings = notifying(world, NOTIFY_URL=inbox.url, NOTIFY_ON="taken_over")
    new_release(world.store)
    world.store.claims.claim(1, "host-z:1:x", 30.0)
    sql(world.store, "UPDATE release_tasks SET claim_expires_at = ?", rc.utc_text(time.time() - 60))
    drain(world, **settings)
    assert "taken_over" in events(world.store)
    [message] = inbox.messages
    assert re.fullmatch(r"release 1 \(v1\): taken over by \S+ from host-z:1:x, whose claim had run out",
                        message["text"])


def test_a_command_gets_the_same_document_on_its_standard_input(world, program, tmp_path):
    world.nodes(1)
    settings = notifying(world, NOTIFY_ON="success", NOTIFY_COMMAND=program(
        f"import sys, os\nopen({str(tmp_path / 'got')!r}, 'ab').write(sys.stdin.buffer.read())\n"
        "assert not {'NOTIFY_URL', 'DATABASE_URL', 'NOTIFY_SOCKET'} & set(os.environ)\n"))
    new_release(world.store)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NOTIFY_URL", "DATABASE_URL", "NOTIFY_SOCKET"):
            patch.setenv(name, "SECRET")
        drain(world, **settings)
    assert json.loads((tmp_path / "got").read_bytes())["text"].startswith("release 1 (v1): it has ended: success")


def test_a_receiver_that_has_a_message_does_not_get_it_again_for_the_others_sake(world, inbox, program, tmp_path):
    world.nodes(1)
    inbox.status = 500
    settings = notifying(world, NOTIFY_ON="success", NOTIFY_URL=inbox.url, NOTIFY_COMMAND=program(
        f"open({str(tmp_path / 'got')!r}, 'a').write('x')"))
    new_release(world.store)
    drain(world, **settings)
    [row] = outbox(world.store)
    assert (row.sent_to, row.last_error) == (
        "NOTIFY_COMMAND", f"NOTIFY_URL: {inbox.url.partition('/hook')[0]}/*** answered 500")
    inbox.status = 204
    make_due(world.store)
    drain(world, **settings)
    assert outbox(world.store) == []
    assert inbox.kinds() == ["success"]
    assert json.loads(row.body) == inbox.messages[0]
    assert (tmp_path / "got").read_text() == "x"


def test_what_can_not_be_explained_is_told_all_the_same(world, inbox, monkeypatch, told):
    world.nodes(1)
    settings = notifying(world, NOTIFY_URL=inbox.url, NOTIFY_ON="created")
    new_release(world.store, reason="for tests")
    monkeypatch.setattr(world.store.claims, "why", lambda *_: 1 / 0)
    drain(world, **settings)
    assert [(message["kind"], message["text"]) for message in inbox.messages] == [("created", "for tests")]
    assert "release 1 can't be explained" in told.text


# -- crashes, two senders, backoff --------------------------------------------------------------------

def test_a_message_comes_again_with_its_id_when_its_sender_dies_before_it_wrote_that_it_was_sent(world, inbox):
    world.nodes(1)
    settings = notifying(world, NOTIFY_URL=inbox.url, NOTIFY_ON="created")
    new_release(world.store)
    dead = world.executor(**settings).notifier
    waiting, _ = world.store.outbox.next()
    row = world.store.outbox.begin_try(waiting, rc.to_json(dead._message(waiting)))
    dead._send("NOTIFY_URL", dead.receivers["NOTIFY_URL"], json.loads(row.body)["id"], row.body.encode())
    assert 0 < world.store.outbox.next()[1] <= rc.SENDING_S
    drain(world, **settings)
    assert inbox.kinds() == ["created"]
    make_due(world.store)
    drain(world, **settings)
    assert inbox.kinds() == ["created"] * 2
    assert inbox.messages[0] == inbox.messages[1]
    assert outbox(world.store) == []


def test_two_senders_send_each_message_once(world, inbox):
    world.nodes(1)
    settings = notifying(world, NOTIFY_URL=inbox.url, NOTIFY_ON="created")
    for _ in range(12):
        new_release(world.store)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            notifier = world.executor(**settings).notifier
            stack.enter_context(beside(notifier._cycle))
    eventually(lambda: not outbox(world.store))
    assert sorted(message["release"]["id"] for message in inbox.messages) == list(range(1, 13))


def test_a_failed_try_is_repeated_ever_later_and_others_wait_a_moment(store):
    store.database.notify_on = frozenset({"created"})
    add_nodes(store, 1)
    new_release(store)
    waits = []
    for attempt in range(1, 12):
        waiting, wait_s = store.outbox.next()
        assert (waiting.attempts, wait_s) == (attempt - 1, 0.0)
        row = store.outbox.begin_try(waiting, "{}")
        assert store.outbox.end_try(row, "it is down", "tests") == "failed"
        waits.append(store.outbox.next()[1])
        make_due(store)
    assert 2 < waits[0] <= 5
    assert all(later > wait for wait, later in zip(waits, waits[1:5]))
    assert 299 < waits[-1] <= 600


def test_a_try_that_began_far_ahead_by_a_wrong_clock_is_due(store):
    store.database.notify_on = frozenset({"created"})
    add_nodes(store, 1)
    new_release(store)
    sql(store, "UPDATE notifications SET next_at = '2099-01-01T00:00:00.000Z'")
    assert store.outbox.next()[1] == 0.0


def test_an_owner_that_wakes_up_late_changes_nothing_of_a_later_try(store):
    store.database.notify_on = frozenset({"created"})
    add_nodes(store, 1)
    new_release(store)
    early = store.outbox.begin_try(store.outbox.next()[0], "{}")
    make_due(store)
    store.outbox.begin_try(store.outbox.next()[0], "{}")
    assert store.outbox.begin_try(early._replace(attempts=0), "{}") is None
    store.outbox.end_try(early, "it is down", "tests")
    assert [(row.attempts, row.last_error) for row in outbox(store)] == [(2, "")]
    store.outbox.end_try(early, "", "tests")
    assert outbox(store) == []


def test_what_did_not_get_out_for_a_day_is_given_up_with_an_event_that_the_audit_allows(world, inbox, told):
    world.nodes(1)
    inbox.status = 500
    settings = notifying(world, NOTIFY_URL=inbox.url, NOTIFY_ON="success")
    new_release(world.store)
    drain(world, **settings)
    make_due(world.store, age_s=86500)
    drain(world, **settings)
    assert outbox(world.store) == []
    given_up = world.store.releases.events(1)[-1]
    assert (given_up.event, given_up.from_status, given_up.to_status) == ("notify.given_up", "success", "success")
    assert re.fullmatch(r"success of \S+, after 2 tries: NOTIFY_URL: http://\S+/\*\*\* answered 500", given_up.detail)
    assert "is given up: NOTIFY_URL" in told.text
    assert world.store.audit.verify().faults == []
    sql(world.store, "INSERT INTO release_events (release_task_id, event) VALUES (1, 'resumed')")
    assert len(world.store.audit.verify().faults) == 1


def test_without_a_receiver_an_executor_gives_up_what_is_a_day_old_and_leaves_the_rest(world):
    world.nodes(1)
    world.store.database.notify_on = frozenset({"created"})
    new_release(world.store)
    world.store.database.notify_on = frozenset()
    world.executor().tick()
    assert [row.attempts for row in outbox(world.store)] == [0]
    make_due(world.store, age_s=86500)
    world.executor().tick()
    assert outbox(world.store) == []
    assert world.store.releases.events(1)[-1].detail.endswith("no executor has a receiver")


def test_prune_leaves_a_release_of_which_something_is_to_be_told(store):
    add_nodes(store, 1)
    for _ in range(3):
        new_release(store)
    sql(store, "UPDATE release_tasks SET status = 'failed', finished_at = '2020-01-01T00:00:00.000Z'")
    sql(store, "INSERT INTO notifications (kind, release_task_id) VALUES ('failed', 1)")
    assert [release.id for release in store.history.prunable(0.0, 1)] == [2]
    assert store.history.delete([1, 2]) == [2]
    sql(store, "DELETE FROM notifications")
    assert store.history.delete([1]) == [1]


# -- receivers that misbehave -------------------------------------------------------------------------

def post(url: str, secret_file: str = "", ca: str = "", within_s: float = 5.0, body: bytes = b"{}") -> str:
    """Return what is wrong with a receiver, "" for nothing."""
    ends_at = time.monotonic() + within_s
    receive = rc.receivers_of(rc.Settings.load(
        {"NOTIFY_URL": url, "NOTIFY_SECRET_FILE": secret_file, "NOTIFY_CA": ca}))["NOTIFY_URL"]
    try:
        receive("id-1", body, lambda: ends_at - time.monotonic())
        return ""
    except rc.NotDelivered as error:
        return str(error)


def test_a_post_is_signed_and_its_receiver_verified(certs, tmp_path):
    (tmp_path / "secret").write_text("a secret\n")
    (tmp_path / "secret").chmod(0o640)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "agents" / "127.0.1.1.crt", certs / "agents" / "127.0.1.1.key")
    inbox = Inbox(tls=context)
    try:
        assert post(inbox.url, str(tmp_path / "secret"), f"{certs}/ca.crt", body=b'{"kind":"test"}') == ""
        wanted = hmac.new(b"a secret", b'{"kind":"test"}', hashlib.sha256).hexdigest()
        assert inbox.heads[0]["X-Releasectl-Signature"] == f"sha256={wanted}"
        assert inbox.heads[0]["Content-Type"] == "application/json"
        for ca in (f"{certs}/other/ca.crt", ""):
            assert "is not signed by" in post(inbox.url, ca=ca) or "bad certificate" in post(inbox.url, ca=ca)
        other = f"https://localhost:{inbox.url.split(':')[2]}"
        assert "can't be reached" in post(other, ca=f"{certs}/ca.crt")
        (tmp_path / "secret").chmod(0o644)
        assert "is open to others" in post(inbox.url, str(tmp_path / "secret"), f"{certs}/ca.crt")
    finally:
        inbox.stop()


def test_user_and_password_in_the_url_are_sent_as_basic_authentication_and_shown_nowhere(inbox):
    assert post(inbox.url.replace("//", "//al%40ice:SECRET@")) == ""
    assert inbox.heads[0]["Authorization"] == "Basic YWxAaWNlOlNFQ1JFVA=="
    inbox.status = 401
    assert post(inbox.url.replace("//", "//al%40ice:SECRET@")).endswith("/*** answered 401")


@pytest.mark.parametrize(("status", "wanted"), [(302, "answered 302, a redirect"), (500, "answered 500"),
                                                (404, "answered 404"), (204, ""), (201, "")])
def test_only_2xx_is_a_success(inbox, status, wanted):
    inbox.status = status
    assert post(inbox.url).partition("/*** ")[2] == wanted


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 202 Accepted\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70000, b"HTTP/1.1 200 OK\r\nConte",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nok", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    b"HTTP/1.1 200 OK\r\nX-Y : a\r\nContent-Length: 5\r\n\r\nok", b"HTTP/1.0 200\r\n",
    b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"])
def test_who_says_2xx_has_the_message_whatever_follows(answer, new_peer):
    def say(peer, sock):
        peer.read_request(sock)
        sock.sendall(answer)
        peer.stopped.wait(10)

    peer = new_peer(say, tls=False)
    assert post(f"http://{peer.host}:{peer.port}", within_s=8) == ""


def test_an_address_that_swallows_packets_leaves_time_to_the_next(inbox, monkeypatch):
    good = urllib.parse.urlsplit(inbox.url)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):
            waits = stack.enter_context(socket.socket())
            waits.setblocking(False)
            waits.connect_ex(full.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
            for address in (full.getsockname(), (good.hostname, good.port))])
        began = time.monotonic()
        rc._connect("any", 1, began + 2).close()
        assert time.monotonic() - began < 1.9


def test_a_name_server_that_does_not_answer_costs_no_more_than_the_time_of_a_try(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
    began = time.monotonic()
    assert post("https://h.example", within_s=0.3).endswith("did not answer in time")
    assert time.monotonic() - began < 5
    release.set()


def test_a_try_ends_before_another_process_may_begin_one():
    assert 2 * (rc.TRY_S + 1) < rc.SENDING_S


def test_a_receiver_that_hangs_drips_or_is_not_there_costs_no_more_than_the_time_of_a_try(inbox, new_peer):
    def drip(peer, sock):
        peer.read_request(sock)
        while not peer.stopped.wait(0.05):
            sock.sendall(b"H")

    inbox.is_hanging = True
    dripping = new_peer(drip, tls=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert post(inbox.url, within_s=0.5).endswith("did not answer in time")
        assert post(f"http://{dripping.host}:{dripping.port}", within_s=0.5).endswith("did not answer in time")
        assert post(f"https://127.0.0.1:{silent.getsockname()[1]}", within_s=0.5).endswith("did not answer in time")
        assert time.monotonic() - began < 5
        port = silent.getsockname()[1]
    assert "can't be reached: " in post(f"http://127.0.0.1:{port}")
    speaks = new_peer(lambda peer, sock: (peer.read_request(sock), sock.sendall(b"SSH-2.0-x\r\n\r\n")), tls=False)
    assert "is not HTTP" in post(f"http://{speaks.host}:{speaks.port}")


def run_command(command: str, within_s: float = 10.0, body: bytes = b"{}") -> str:
    ends_at = time.monotonic() + within_s
    receive = rc.receivers_of(rc.Settings.load({"NOTIFY_COMMAND": command}))["NOTIFY_COMMAND"]
    try:
        receive("id-1", body, lambda: ends_at - time.monotonic())
        return ""
    except rc.NotDelivered as error:
        return str(error)


@pytest.mark.parametrize(("command", "wanted"), [
    ("true", ""), ("/no/such/program SECRET", "program can't be run: no such file or directory"),
    ("false", "false ended with 1"), ("sh -c 'echo url: /services/SECRET; exit 3'", "sh ended with 3"),
    ("sh -c 'kill -9 $$'", "sh was killed by signal 9"), ("/etc/passwd", "passwd can't be run: permission denied")])
def test_a_command_that_fails_says_so_in_one_line_without_what_it_printed(command, wanted):
    assert run_command(command) == wanted


@pytest.mark.parametrize(("printed", "wanted"), [
    ("no route to mail", "no route to mail"),
    ("see https://user:SECRET@h.example/SECRET?k=SECRET", "see https://h.example/***")])
def test_what_a_command_printed_is_shown_to_who_tries_it_by_hand(printed, wanted, quick, open_store):
    open_store(f"sqlite:///{quick.folder}/releasectl.db")
    quick.settings.update(MTLS_ENABLED="0", NOTIFY_COMMAND=f"sh -c 'echo {printed}; exit 1'")
    result = quick("check", "--notify", "--json")
    assert findings(result)["NOTIFY_COMMAND"] == (False, f"sh ended with 1: {wanted}")
    assert "SECRET" not in result.out + result.err


def test_what_a_command_printed_gets_into_no_log_row_or_event(world, told):
    world.nodes(1)
    settings = notifying(world, NOTIFY_ON="success", NOTIFY_COMMAND="sh -c 'echo url: /services/SECRET; exit 1'")
    new_release(world.store)
    drain(world, **settings)
    [row] = outbox(world.store)
    assert row.last_error == "NOTIFY_COMMAND: sh ended with 1"
    make_due(world.store, age_s=86500)
    drain(world, **settings)
    assert world.store.releases.events(1)[-1].detail.endswith("2 tries: NOTIFY_COMMAND: sh ended with 1")
    assert "SECRET" not in told.text


def what_was_said(command: str) -> str:
    receive = rc.receivers_of(rc.Settings.load({"NOTIFY_COMMAND": command}))["NOTIFY_COMMAND"]
    with pytest.raises(rc.NotDelivered) as caught:
        receive("id-1", b"{}", lambda: 10.0)
    return caught.value.said


def test_a_command_need_not_read_its_standard_input(program):
    assert run_command(program("import sys; sys.stdin.close()"), body=b"x" * 1_000_000) == ""


def test_of_what_a_command_says_the_last_line_is_kept(program):
    command = program("import sys\nfor _ in range(200): sys.stdout.write('x' * 100_000)\nraise OSError('no route')")
    assert what_was_said(command) == "OSError: no route"
    assert len(what_was_said(program("import sys\nsys.exit('x' * 1_000_000)"))) < 300


@pytest.mark.parametrize("ends", [True, False], ids=["its parent ends", "its parent stays"])
def test_a_command_that_forks_and_stays_is_ended_with_all_its_processes(tmp_path, program, ends):
    command = program(f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} ')
    time.sleep(600)
while {not ends} or not os.path.exists({str(tmp_path / 'pid')!r}):
    time.sleep(0.01)
""")
    began = time.monotonic()
    assert run_command(command, within_s=1.5) == (
        "" if ends else f"{Path(sys.executable).name} did not end in time, and was killed")
    assert time.monotonic() - began < 10
    pid = int((tmp_path / "pid").read_text())

    def is_gone() -> bool:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid, 0)
            return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
        return True

    eventually(is_gone, 10)


def test_no_release_is_slowed_by_a_receiver_that_hangs(world, inbox, monkeypatch):
    monkeypatch.setattr(rc, "TICK_NOTIFIES_S", 0.5)
    world.nodes(2)
    inbox.is_hanging = True
    settings = notifying(world, NOTIFY_URL=inbox.url, NOTIFY_ON=ALL_KINDS)
    for _ in range(3):
        new_release(world.store)
    executor = world.executor(**settings)
    executor.drain()
    ended = [world.store.releases.get(release_id) for release_id in (1, 2, 3)]
    assert [release.status for release in ended] == ["success"] * 3
    assert rc.epoch_of(ended[-1].finished_at) - rc.epoch_of(ended[0].created_at) < rc.TRY_S
    began = time.monotonic()
    executor.close()
    assert time.monotonic() - began < rc.TRY_S + 5
    assert len(outbox(world.store)) == 9


def test_a_receiver_that_fails_holds_up_no_other(world, inbox, program, tmp_path):
    world.store.database.notify_on = frozenset({"created"})
    add_nodes(world.store, 1)
    for _ in range(20):
        new_release(world.store)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    executor = world.executor(NOTIFY_URL=url, NOTIFY_COMMAND=f"sh -c 'cat >>{tmp_path}/got; echo >>{tmp_path}/got'")
    executor.close()
    assert (tmp_path / "got").read_text().count("\n") == 20
    assert {(row.attempts, row.sent_to) for row in outbox(world.store)} == {(1, "NOTIFY_COMMAND")}
    assert all("can't be reached" in row.last_error for row in outbox(world.store))


def test_what_was_never_tried_goes_first_and_a_receiver_that_hangs_costs_one_try_a_cycle(world, inbox, monkeypatch):
    monkeypatch.setattr(rc, "TRY_S", 0.5)
    world.store.database.notify_on = frozenset({"created"})
    add_nodes(world.store, 1)
    for _ in range(8):
        new_release(world.store)
    sql(world.store, "UPDATE notifications SET attempts = 8")
    make_due(world.store, age_s=3000)
    new_release(world.store)
    assert world.store.outbox.next()[0].release_id == 9
    inbox.is_hanging = True
    notifier = world.executor(NOTIFY_URL=inbox.url).notifier
    tries = []
    send = notifier._send
    monkeypatch.setattr(notifier, "_send", lambda *words: tries.append(1) or send(*words))
    assert notifier._cycle() == rc.PAUSE_S
    assert len(tries) == 1
    assert sorted(row.attempts for row in outbox(world.store)) == [1] + [9] * 8


# -- who is stuck -----------------------------------------------------------------------------------

def test_a_release_that_nobody_can_work_on_is_told_once(world, inbox, monkeypatch):
    monkeypatch.setattr(rc, "STUCK_AFTER_S", 0.0)
    world.nodes(1)
    settings = notifying(world, NOTIFY_URL=inbox.url)
    new_release(world.store)
    for _ in range(2):
        executor = world.executor(**settings, CONTROL_CERT="")
        with pytest.raises(rc.ConfigError):
            executor.tick()
        executor.close()
    assert inbox.kinds() == ["stuck"]
    assert inbox.messages[0]["text"] == (f"release 1 (v1) is stopped: {socket.gethostname()} can't dispatch: "
                                         "CONTROL_CERT is not set")
    assert events(world.store) == ["created", "stuck"]


def test_what_a_person_stopped_is_not_stuck_and_a_service_looks_twice(world, inbox, monkeypatch):
    monkeypatch.setattr(rc, "STUCK_AFTER_S", 0.0)
    world.nodes(1)
    settings = notifying(world, NOTIFY_URL=inbox.url, NOTIFY_ON="stuck")
    new_release(world.store)
    world.store.releases.set_freeze(True, "alice", "network work")
    executor = world.executor(**settings, CONTROL_CERT="")
    executor._note("CONTROL_CERT is not set")
    executor.notifier._note_stuck(at_once=True)
    assert "stuck" not in events(world.store)
    world.store.releases.set_freeze(False, "alice")
    executor.notifier._note_stuck(at_once=False)
    assert "stuck" not in events(world.store)
    executor.notifier._note_stuck(at_once=False)
    executor.notifier._note_stuck(at_once=False)
    assert events(world.store).count("stuck") == 1


def old_releases(world: World, *, targets: int, of_each: int) -> None:
    """Make pending releases that nobody wrote to for an hour."""
    world.nodes(1)
    for number in range(targets * of_each):
        new_release(world.store, target=f"t{number % targets}")
    sql(world.store, "UPDATE release_tasks SET updated_at = ?", rc.utc_text(time.time() - 3600))


def test_of_the_pending_releases_of_a_target_the_first_is_looked_at_and_of_paused_those_in_flight(world):
    old_releases(world, targets=2, of_each=3)
    assert world.store.outbox.quiet_releases(300.0) == [1, 2]
    sql(world.store, "UPDATE release_tasks SET status = 'running' WHERE id = 1")
    sql(world.store, "UPDATE release_tasks SET status = 'paused' WHERE id IN (2, 4)")
    sql(world.store, "UPDATE release_task_nodes SET status = 'running' WHERE release_task_id = 4")
    sql(world.store, "UPDATE release_tasks SET status = 'success' WHERE id = 6")
    assert world.store.outbox.quiet_releases(300.0) == [1, 3, 4]


def test_what_stops_all_releases_is_told_once_by_the_oldest(world):
    old_releases(world, targets=5, of_each=2)
    executor = world.executor(**notifying(world, NOTIFY_COMMAND="true", NOTIFY_ON="stuck"))
    executor.notifier._note_stuck(at_once=True)
    executor.notifier._note_stuck(at_once=True)
    assert [(row.kind, row.release_id) for row in outbox(world.store)] == [("stuck", 1)]


def test_nobody_looks_for_what_is_stuck_who_does_not_tell_it_or_has_no_time(world):
    old_releases(world, targets=1, of_each=1)
    executor = world.executor(**notifying(world, NOTIFY_COMMAND="true", NOTIFY_ON="failed"))
    executor.notifier._note_stuck(at_once=True)
    executor = world.executor(**notifying(world, NOTIFY_COMMAND="true", NOTIFY_ON="stuck"))
    executor.notifier.stop(0.0)
    executor.notifier._note_stuck(at_once=True)
    assert "stuck" not in events(world.store)


# -- processes ----------------------------------------------------------------------------------------

def test_serve_sends_what_it_and_other_processes_write(fleet_cli, inbox):
    fleet_cli.settings.update(NOTIFY_URL=inbox.url, NOTIFY_ON="success,paused,frozen")
    with serve_process(fleet_cli):
        new_release(fleet_cli.world.store)
        eventually(lambda: inbox.kinds() == ["success"])
        # an operator's shell without the settings
        fleet_cli.world.store.releases.set_freeze(True, "alice", "network work")
        eventually(lambda: inbox.kinds() == ["success", "frozen"])


def test_serve_stops_while_a_receiver_hangs_and_another_process_sends_it(fleet_cli, inbox, program, tmp_path):
    fleet_cli.settings.update(NOTIFY_ON="success", NOTIFY_COMMAND=program(
        f"import time, os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"))
    with serve_process(fleet_cli) as process:
        new_release(fleet_cli.world.store)
        eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    del fleet_cli.settings["NOTIFY_COMMAND"]
    fleet_cli.settings["NOTIFY_URL"] = inbox.url
    make_due(fleet_cli.world.store)
    fleet_cli.ok("run-once")
    assert inbox.kinds() == ["success"]


@pytest.mark.slow
def test_a_tick_of_cron_sends_what_is_due_and_does_not_hang(fleet_cli, inbox):
    fleet_cli.settings.update(NOTIFY_URL=inbox.url, NOTIFY_ON="success")
    new_release(fleet_cli.world.store)
    fleet_cli.ok("run-once", "--drain")
    assert inbox.kinds() == ["success"]
    inbox.is_hanging = True
    new_release(fleet_cli.world.store)
    began = time.monotonic()
    fleet_cli.ok("run-once", "--drain")
    assert time.monotonic() - began < 60
    assert len(outbox(fleet_cli.world.store)) == 1


def test_run_once_ends_soon_after_sigterm_while_a_receiver_hangs(fleet_cli, program, tmp_path):
    fleet_cli.settings.update(NOTIFY_ON="success", NOTIFY_COMMAND=program(
        f"import time\nopen({str(tmp_path / 'began')!r}, 'w')\ntime.sleep(600)"))
    new_release(fleet_cli.world.store)
    process = fleet_cli.start("run-once", "--drain")
    eventually((tmp_path / "began").exists)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - began < rc.STOP_GRACE_S + 2.5


# -- settings, check, metrics ---------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "text", "wanted"), [
    ("NOTIFY_URL", "http://hooks.example.com/SECRET", "NOTIFY_URL=*** can't be used: must begin with https://"),
    ("NOTIFY_URL", "htps:/hooks.example.com/SECRET", "NOTIFY_URL=*** can't be used: must be https://HOST"),
    *(("NOTIFY_URL", url, "NOTIFY_URL=*** can't be used: must be https://HOST") for url in (
        "https://h:99999/SECRET", "https://h/SECRET\u00e9", "https://user:SECRET", "https://SECRET\u2100@h/",
        "https://[::1/SECRET", "https://h/SECRET#x", "https://h/T'SECRET", 'https://h/"SECRET', "https://h/<SECRET",
        "https://u:p'SECRET@h/", "https://h/SECRET>", "https://h\\SECRET/x")),
    ("NOTIFY_COMMAND", "notify 'SECRET", "NOTIFY_COMMAND=*** can't be used: a quote in it is not closed"),
    ("NOTIFY_ON", "failed,success,pauses", "'pauses' is none of failed, partial, "),
    ("PUBLIC_URL", "releases.example.com", "PUBLIC_URL=releases.example.com can't be used: must be the page's"),
    ("PUBLIC_URL", "https://u:p@releases.example.com", "must be the page's address")])
def test_a_setting_that_can_not_be_used_is_refused_without_its_secret(name, text, wanted):
    with pytest.raises(rc.ConfigError) as caught:
        rc.Settings.load({name: text})
    assert wanted in caught.value.message
    assert "SECRET" not in caught.value.message


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://localhost/x", "http://[::1]:8/x", "https://h.example"])
def test_a_url_over_tls_or_to_loopback_is_taken(url):
    assert rc.Settings.load({"NOTIFY_URL": url}).notify_kinds == {"failed", "partial", "paused", "stuck"}
    assert rc.Settings.load({}).notify_kinds == set()


@pytest.mark.parametrize(("url", "wanted"), [
    ("https://u:SECRET@h.example", "https://h.example/***"), ("https://h.example?SECRET", "https://h.example/***"),
    ("https://u:p@SECRET@h:8443//a//SECRET", "https://h:8443/***"), ("https://[::1]:443/SECRET", "https://[::1]:443/***")])
def test_of_a_url_scheme_host_and_port_are_shown(url, wanted):
    assert rc.check_url(rc.Settings.load({"NOTIFY_URL": url})) == wanted


def test_approval_is_taken_before_anything_is_told_so():
    assert rc.Settings.load({"NOTIFY_URL": "https://h", "NOTIFY_ON": "approval"}).notify_kinds == {"approval"}


def test_check_sends_a_test_and_says_what_became_of_it(quick, open_store, inbox, sqlite_url):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    quick.settings.update(MTLS_ENABLED="0", NOTIFY_URL=inbox.url, NOTIFY_COMMAND="/no/such/program SECRET")
    found = findings(quick("check", "--json"))
    assert found["NOTIFY_COMMAND"] == (False, "program is no program that this user can run")
    assert found["NOTIFY_URL"] == (True, f"{inbox.url.partition('/hook')[0]}/***")
    assert inbox.messages == []
    result = quick("check", "--notify", "--json")
    assert result.code == 69
    found = findings(result)
    assert re.fullmatch(r"took a test message in \d+ ms", found["NOTIFY_URL"][1])
    assert found["NOTIFY_COMMAND"] == (False, "program can't be run: no such file or directory")
    assert (inbox.messages[0]["kind"], inbox.messages[0]["release"]) == ("test", None)
    assert outbox(store) == []
    quick.settings = {name: value for name, value in quick.settings.items() if not name.startswith("NOTIFY")}
    result = quick("check", "--notify", "--json")
    assert (result.code, findings(result)["notifications"][0]) == (2, False)


def test_check_says_what_has_not_got_out(quick, open_store):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    quick.settings["MTLS_ENABLED"] = "0"
    sql(store, "INSERT INTO notifications (kind) VALUES ('failed')")
    assert "notifications" not in findings(quick("check", "--json"))
    sql(store, "UPDATE notifications SET at = '2026-01-01T00:00:00.000Z'")
    result = quick("check", "--json")
    assert (result.code, findings(result)["notifications"]) == (1, (
        False, "1 notification has not got out: none was tried: no executor with NOTIFY_COMMAND or "
        "NOTIFY_URL is running; the oldest is of 2026-01-01T00:00:00.000Z"))
    sql(store, "UPDATE notifications SET last_error = 'NOTIFY_URL: https://h/*** answered 500'")
    found = findings(quick("check", "--json"))["notifications"][1]
    assert "not got out: NOTIFY_URL: https://h/*** answered 500; " in found


def test_a_secret_file_that_others_can_read_stops_the_start(fleet_cli, inbox):
    fleet_cli.settings.update(NOTIFY_URL=inbox.url, NOTIFY_SECRET_FILE=fleet_cli.file("secret", "SECRET"))
    os.chmod(fleet_cli.folder / "secret", 0o644)
    assert "NOTIFY_SECRET_FILE=" in fleet_cli.refused(2, "run-once")


def test_no_secret_of_a_url_is_logged_or_shown(fleet_cli, inbox):
    inbox.status = 500
    fleet_cli.settings.update(NOTIFY_URL=inbox.url, NOTIFY_ON="success")
    new_release(fleet_cli.world.store)
    done = fleet_cli.ok("run-once", "--drain", "--metrics-file", fleet_cli.folder / "metrics")
    metrics = (fleet_cli.folder / "metrics").read_text()
    shown = [done.out, done.err, metrics, fleet_cli("check", "--notify").out, str(outbox(fleet_cli.world.store))]
    assert "/*** answered 500" in done.err
    assert not any("SECRET" in text for text in shown)
    assert "releasectl_notifications_waiting 1\n" in metrics
    assert re.search(r'releasectl_notifications_total\{outcome="failed"\} [1-9]', metrics)
    assert 'releasectl_notifications_total{outcome="given_up"} 0\n' in metrics


def test_an_idle_notifier_asks_nothing_of_the_database(sqlite_world, inbox, monkeypatch):
    settings = notifying(sqlite_world, NOTIFY_URL=inbox.url)
    notifier = sqlite_world.executor(**settings).notifier
    asked = []
    next_one = sqlite_world.store.outbox.next
    monkeypatch.setattr(sqlite_world.store.outbox, "next", lambda *words: asked.append(1) or next_one(*words))
    notifier.start()
    eventually(lambda: asked)
    waited = threading.Event().wait(0.5)
    assert (waited, len(asked)) == (False, 1)
    new_release_of(sqlite_world)
    eventually(lambda: inbox.kinds() == ["created"])


def new_release_of(world: World) -> None:
    world.store.database.notify_on = frozenset({"created"})
    add_nodes(world.store, 1)
    new_release(world.store)


# -- the document ---------------------------------------------------------------------------------------

DOCUMENT = (ROOT / "docs" / "NOTIFICATIONS.md").read_text()


def example(heading: str) -> str:
    """Return the first block of code below a heading."""
    text = DOCUMENT.partition(f"\n## {heading}\n")[2]
    block = re.search(r"(?m)(?:^    .*\n|^\n(?=    ))+", text)
    assert block, heading
    return re.sub(r"(?m)^    ", "", block[0]).strip() + "\n"


def test_the_document_shows_a_message_as_it_is():
    shown = json.loads(example("A message"))
    real = rc.message_of("failed", "", "", "", "")
    assert list(shown) == list(real)
    source = re.findall(r'"(\w+)": release\.', (ROOT / "releasectl.py").read_text().partition("def message_of(")[2])
    assert list(shown["release"]) == source[:10]


def test_the_example_for_chats_posts_the_text(cli, inbox, tmp_path):
    (tmp_path / "chat-url").write_text(inbox.url + "\n")
    script = tmp_path / "notify-chat"
    script.write_text(example("Chats").replace("/etc/releasectl/chat-url", str(tmp_path / "chat-url")))
    script.chmod(0o755)
    inbox.messages.clear()
    cli.settings.update(NOTIFY_COMMAND=str(script), MTLS_ENABLED="0", PUBLIC_URL="https://r.example")
    cli.ok("migrate")
    assert "took a test message" in cli("check", "--notify").out
    assert re.fullmatch(r"test: a test from \S+: notifications get here https://r.example", inbox.messages[0]["text"])


def test_the_example_for_mail_sends_a_mail(cli, tmp_path, new_peer):
    got: list[str] = []

    def smtp(_peer, sock):
        file = sock.makefile("rwb")

        def say(line: str) -> None:
            file.write(line.encode() + b"\r\n")
            file.flush()

        say("220 mail.example ESMTP")
        while line := file.readline().decode().strip():
            if line.upper() == "DATA":
                say("354 go on")
                while (text := file.readline().decode()) != ".\r\n":
                    got.append(text)
            say("221 bye" if line.upper() == "QUIT" else "250 ok")

    peer = new_peer(smtp, tls=False)
    script = tmp_path / "notify-mail"
    script.write_text(example("Mail").replace('"127.0.0.1", 25', f'"{peer.host}", {peer.port}'))
    script.chmod(0o755)
    cli.settings.update(NOTIFY_COMMAND=str(script), MTLS_ENABLED="0")
    cli.ok("migrate")
    assert "took a test message" in cli("check", "--notify").out
    mail = "".join(got)
    assert "Subject: [releasectl] test: a test from" in mail
    assert re.search(r"Message-ID: <[0-9a-f]{32}@", mail)


def test_the_example_for_the_signature_tells_ours_from_others(tmp_path):
    (tmp_path / "secret").write_text("a secret\n")
    (tmp_path / "secret").chmod(0o600)
    namespace: dict[str, Callable[[bytes, str, str], bool]] = {}
    exec(example("Verifying the signature"), namespace)  # noqa: S102
    header = rc.signature_of(b"{}", str(tmp_path / "secret"))
    assert namespace["is_ours"](b"{}", header, "a secret")
    assert not namespace["is_ours"](b"{} ", header, "a secret")


def test_the_examples_run_without_a_shell_as_they_stand_in_the_settings():
    for line in re.findall(r"(?m)^    NOTIFY_COMMAND=(.*)$", DOCUMENT):
        assert rc.Settings.load({"NOTIFY_COMMAND": line}).notify_command
