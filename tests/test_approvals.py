"""Four eyes: a release waits until somebody else than its author has approved it (issue 17, 7)."""
from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import (
    PROGRAM,
    ROOT,
    USER,
    Client,
    Result,
    World,
    add_nodes,
    assert_books_balance,
    copy_pair,
    eventually,
    migrate,
    new_release,
    serving,
    settings_for,
    sql,
    statuses,
    trusting,
)
from test_audit import issue
from test_decision import release
from test_notify import outbox

import releasectl as rc

ALICE, BOB = rc.Act("alice", rc.VIA_API, token="alice"), rc.Act("bob", rc.VIA_API, token="bob")


@pytest.fixture
def four_eyes(store) -> rc.Store:
    """A store with two nodes, of a process with APPROVALS=1."""
    store.database.approvals = True
    add_nodes(store, 2)
    return store


def created(store: rc.Store, by: rc.Who = ALICE, **fields: object) -> rc.Release:
    return store.releases.create(rc.ReleaseRequest(**fields), by).release  # type: ignore[arg-type]


def approve(store: rc.Store, release_id: int, by: rc.Who = BOB, **more: object) -> rc.Release:
    return store.approvals.approve(release_id, by, **more)  # type: ignore[arg-type]


def refusal(store: rc.Store, release_id: int, by: rc.Who = BOB, **more: object) -> tuple[int, str]:
    """Return code and message of an approval that must be refused, and changes nothing."""
    before = store.releases.get(release_id), store.audit.head()
    with pytest.raises(rc.AppError) as error:
        approve(store, release_id, by, **more)
    assert (store.releases.get(release_id), store.audit.head()) == before
    return error.value.code, error.value.message


def events(store: rc.Store, release_id: int = 1) -> list[tuple[str, str, str]]:
    return [(e.event, e.actor, e.detail) for e in store.releases.events(release_id) if e.node_id is None]


def runnable(store: rc.Store) -> list[int]:
    return store.claims.scan("owner")[0]


def start(store: rc.Store, release_id: int = 1) -> None:
    """Let an executor take a release, and die."""
    assert store.claims.claim(release_id, "owner", 30.0)


# -- who is who ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("act", "identity"), [
    (rc.Act("alice", "api", token="alice"), "alice"),
    (rc.Act("cert:carol", "api", token="alice", certificate="carol"), "alice (certificate carol)"),
    (rc.Act("cert:alice", "api", token="alice", certificate="alice"), "alice"),
    (rc.Act("cert:alice", "api", certificate="alice"), "alice"),
    (rc.Act("api", "api"), "api"),
    (rc.Act("cli:root (sudo: alice)", "cli", user="root"), "root"),
    ("host-a:1:x", "host-a:1:x"),
])
def test_token_and_certificate_name_who_acts_else_the_unix_user(act, identity):
    assert rc.identity_of(act) == identity


@pytest.mark.parametrize(("author", "other", "is_same"), [
    ("alice", "alice", True), ("alice", "Alice", True), ("alice", "bob", False), ("", "", True), ("", "bob", False),
    ("alice (certificate carol)", "bob (certificate carol)", True), ("alice (certificate carol)", "Carol", True),
    ("alice", "alice (certificate carol)", True), ("alice (certificate carol)", "bob (certificate dora)", False),
    ("t (certificate a (certificate b))", "a (certificate b)", True), ("t (certificate x))", "x)", True)])
def test_a_name_is_one_persons_whatever_names_it(author, other, is_same):
    assert rc.same_person(author, other) == is_same


def test_the_command_line_is_its_unix_user_whatever_the_environment_says(quick, open_store, monkeypatch):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    add_nodes(store, 1)
    quick.settings.update(USER="alice", LOGNAME="alice", SUDO_USER="alice", APPROVALS="1")
    quick.ok("create")
    assert store.releases.get(1).author == USER
    quick.settings.update(USER="bob", LOGNAME="bob", SUDO_USER="bob")
    assert f"release 1 was made by {USER}: somebody else must approve it" in quick.refused(3, "approve", "1")
    monkeypatch.setattr(os, "getuid", lambda: pwd.getpwnam("daemon").pw_uid)
    assert quick.ok("approve", "1", "--json").json["approvedBy"] == "daemon"


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root becomes another user")
def test_another_unix_user_approves_and_the_author_does_not_under_another_name():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in (PROGRAM, ROOT / "schema.sql"):
            shutil.copy(source, folder)
        migrate(f"sqlite:///{folder}/test.db")
        store = rc.Store(rc.Database(f"sqlite:///{folder}/test.db"))
        add_nodes(store, 1)
        store.database.close()
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777)

        def run(user: str, *words: str, **environment: str) -> Result:
            done = subprocess.run(
                ["setpriv", "--reuid", user, "--clear-groups", sys.executable, "-I", "releasectl.py", *words],
                cwd=folder, text=True, capture_output=True, check=False,
                env={"PATH": os.environ["PATH"], "APPROVALS": "1", "DATABASE_URL": "sqlite:///test.db", **environment})
            return Result(done.returncode, done.stdout, done.stderr)

        result = run("daemon", "create", USER="root", SUDO_USER="root")
        assert "by somebody else than daemon: releasectl approve 1" in result.out, result
        for environment in ({}, {"USER": "bin", "LOGNAME": "bin", "SUDO_USER": "bin"}):
            result = run("daemon", "approve", "1", **environment)
            assert (result.code, "made by daemon: somebody else" in result.err) == (3, True), result
        result = run("bin", "approve", "1", "--json", USER="daemon")
        assert (result.code, result.json["approvedBy"]) == (0, "bin"), result


@contextlib.contextmanager
def signed_in(store: rc.Store, tokens: Path, name: str, **settings: object) -> Iterator[Client]:
    """Give a client with the token of a name."""
    with serving(store, API_TOKENS_FILE=tokens, **settings) as client:
        client.token = name * 8
        yield client


def test_by_the_api_only_another_operators_token_approves(four_eyes, tokens):
    with signed_in(four_eyes, tokens, "alice") as client:
        made = client.ok("POST", "/api/v1/releases", {"reason": "new sites"}, 201)
        assert made["approval"] == "wanted"
        answer = client("POST", "/api/v1/releases/1/approve", {})
        assert (answer.code, "made by alice: somebody else must approve it" in answer.text) == (1004, True)
        client.token = "vera" * 8
        assert client.code("POST", "/api/v1/releases/1/approve", {}) == 1004
        client.token = "bob" * 8
        shown = client.ok("POST", "/api/v1/releases/1/approve", {"reason": "looks well"})
        assert (shown["author"], shown["approval"], shown["approvedBy"]) == ("alice", "given", "bob")
        assert shown["approvedAt"] == four_eyes.releases.get(1).approved_at != ""
        answer = client("POST", "/api/v1/releases/1/approve", {})
        assert (answer.code, f"bob approved it at {shown['approvedAt']}" in answer.text) == (3003, True)
    assert events(four_eyes)[1:] == [
        ("approval", "alice", "waiting for approval by somebody else than alice: releasectl approve 1; new sites"),
        ("approved", "bob", "looks well")]
    row = four_eyes.audit.rows(0, 100)[-1]
    assert (row.actor, row.action, row.object) == ("bob", "release.approve", "release 1")
    assert json.loads(row.before) == {"approval": "wanted", "author": "alice"}
    assert json.loads(row.after) == {"approval": "given", "reason": "looks well"}


def test_two_tokens_under_one_certificate_are_one_person_and_so_is_one_token_under_two(
        four_eyes, certs, tokens, tmp_path):
    with signed_in(four_eyes, tokens, "alice", **copy_pair(certs, tmp_path),
                   HTTP_CLIENT_CA=f"{certs}/ca.crt") as client:
        client.context = trusting(certs, *issue(certs, tmp_path, "carol"))
        client.ok("POST", "/api/v1/releases", {}, 201)
        assert four_eyes.releases.get(1).author == "alice (certificate carol)"
        client.token = "bob" * 8
        assert client.code("POST", "/api/v1/releases/1/approve", {}) == 1004
        client.context = trusting(certs, *issue(certs, tmp_path, "dora"))
        client.token = "alice" * 8
        assert client.code("POST", "/api/v1/releases/1/approve", {}) == 1004
        client.token = "bob" * 8
        assert client.ok("POST", "/api/v1/releases/1/approve", {})["approvedBy"] == "bob (certificate dora)"


def test_without_tokens_a_certificate_names_who_acts(four_eyes, certs, tmp_path):
    with serving(four_eyes, **copy_pair(certs, tmp_path), HTTP_CLIENT_CA=f"{certs}/ca.crt") as client:
        client.context = trusting(certs, *issue(certs, tmp_path, "alice"))
        client.ok("POST", "/api/v1/releases", {}, 201)
        assert four_eyes.releases.get(1).author == "alice"
        assert client.code("POST", "/api/v1/releases/1/approve", {}) == 1004
        client.context = trusting(certs, *issue(certs, tmp_path, "bob"))
        assert client.ok("POST", "/api/v1/releases/1/approve", {})["approvedBy"] == "bob"


def test_over_an_api_where_nobody_signs_in_nobody_approves_and_nobody_what_was_made_there(four_eyes):
    shell = rc.Act("cli:bob", "cli", user="bob")
    created(four_eyes, shell)
    with serving(four_eyes) as client:
        answer = client("POST", "/api/v1/releases/1/approve", {})
        assert (answer.code, "nobody is a second person: set API_TOKENS_FILE" in answer.text) == (1004, True)
        client.ok("POST", "/api/v1/releases", {}, 201)
        assert client.code("POST", "/api/v1/releases/2/approve", {}) == 1004
        code, text = refusal(four_eyes, 2, shell)
        assert (code, "perhaps by you: set API_TOKENS_FILE" in text) == (1004, True)
        assert "which nobody can give" in four_eyes.releases.get(2).status_reason
        client.ok("POST", "/api/v1/releases/2/approve", {"emergency": True, "reason": "down"})
    assert approve(four_eyes, 1, rc.Act("cli:carol", "cli", user="carol")).approved_by == "carol"


def test_serve_and_check_warn_of_approvals_where_nobody_signs_in(quick, open_store, tokens, told):
    store = open_store(f"sqlite:///{quick.folder}/releasectl.db")
    text = "nobody can approve through the API, nor what was made there: set API_TOKENS_FILE"
    for settings, is_told in (({"APPROVALS": "1"}, True), ({}, False),
                              ({"APPROVALS": "1", "API_TOKENS_FILE": str(tokens)}, False)):
        told.clear()
        with serving(store, **settings):
            assert any(text in record.message for record in told.records) == is_told
        quick.settings.clear()
        quick.settings.update(settings)
        assert (text in quick("check").out.replace("\n", " ")) == is_told
    assert not rc.anonymity_of(settings_for(
        "sqlite:///unused.db", APPROVALS=1, HTTP_CLIENT_CA="ca.crt", HTTP_CERT="a", HTTP_KEY="b"))


def test_a_token_of_the_unix_users_name_is_no_second_person(four_eyes, tokens):
    created(four_eyes, rc.Act(f"cli:{USER}", "cli", user=USER))
    with signed_in(four_eyes, tokens, USER) as client:
        assert client.code("POST", "/api/v1/releases/1/approve", {}) == 1004


# -- which release may be approved -----------------------------------------------------------------

@pytest.mark.parametrize("approval", ["", *rc.APPROVAL_STATES])
@pytest.mark.parametrize("started_at", [None, "2026-01-31T00:00:00.000Z"])
@pytest.mark.parametrize("status", rc.RELEASE_STATUSES)
def test_what_waits_for_an_approval_and_has_not_started_can_be_approved_and_nothing_else(status, started_at, approval):
    found = release(status, started_at=started_at, approval=approval, author="alice")
    waits = approval == "wanted" and status in ("pending", "paused") and started_at is None
    for identity, is_emergency, code in (("bob", False, None), ("alice", False, 1004), ("alice", True, None)):
        with contextlib.ExitStack() as stack:
            if not waits or code:
                error = stack.enter_context(pytest.raises(rc.AppError))
            rc.check_approval(found, identity, is_emergency)
        assert waits and not code or error.value.code == (code if waits else 3003)


def test_who_comes_too_late_is_told_who_approved_it_and_that_it_has_ended(four_eyes):
    created(four_eyes)
    at = approve(four_eyes, 1).approved_at
    start(four_eyes)
    assert refusal(four_eyes, 1, "carol") == (
        3003, f"release 1 is running and waits for no approval: bob approved it at {at}")
    created(four_eyes)
    four_eyes.releases.act("cancel", 2, ALICE)
    assert refusal(four_eyes, 2) == (3003, "release 2 is cancelled and waits for no approval")
    assert refusal(four_eyes, 2, is_emergency=True, reason="x")[0] == 3003
    with pytest.raises(rc.AppError, match="release 9 does not exist"):
        approve(four_eyes, 9)


def test_of_two_processes_that_approve_at_once_one_does(filled, open_store):
    filled.ok("create", "--approval")
    sql(filled.store, "UPDATE release_tasks SET author = 'alice' WHERE id = 4")
    processes = [filled.start("approve", "4", "--json") for _ in range(2)]
    ended = sorted((filled.end(process) for process in processes), key=lambda result: result.code)
    assert [result.code for result in ended] == [0, 3]
    assert ended[0].json["approval"] == "given"
    assert f"waits for no approval: {USER} approved it at" in ended[1].err
    assert [event for event, _, _ in events(filled.store, 4)] == ["created", "approval", "approved"]


def test_of_many_that_approve_at_once_on_both_engines_one_does(four_eyes, database_url, open_store):
    created(four_eyes)
    found: list[str] = []
    ready = threading.Barrier(4)

    def race(name: str, store: rc.Store) -> None:
        ready.wait()
        with contextlib.suppress(rc.AppError):
            found.append(approve(store, 1, name).approved_by)

    threads = [threading.Thread(target=race, args=(name, open_store(database_url))) for name in "bcde"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [four_eyes.releases.get(1).approved_by]


# -- what it holds up --------------------------------------------------------------------------------

def test_nothing_of_a_release_is_sent_before_it_is_approved(world: World):
    store = world.nodes(2).store
    store.database.approvals = True
    created(store)
    world.drain()
    assert world.runs() == [0, 0]
    assert store.releases.get(1).status == "pending"
    approve(store, 1)
    world.drain()
    assert world.runs() == [1, 1]
    assert store.releases.get(1).status == "success"
    assert_books_balance(store, 1)


def test_what_waits_holds_nobody_up_and_takes_the_next_version_when_it_starts(world: World):
    store = world.nodes(2).store
    created(store, approval="wanted")
    other = created(store)
    world.drain()
    assert store.releases.get(other.id).status == "success"
    approve(store, 1)
    world.drain()
    first = store.releases.get(1)
    assert (first.status, first.version) == ("success", 3)
    assert "version 1 became 3: release 2 (v2) went out before it" in [
        detail for event, _, detail in events(store) if event == "renumbered"]
    assert world.runs() == [2, 2]


def test_an_executor_asks_for_the_approval_that_nobody_asked_for(store):
    add_nodes(store, 1)
    new_release(store)
    sql(store, "INSERT INTO release_tasks (version) VALUES (9)")
    new_release(store)
    start(store)
    store.database.approvals = True
    assert runnable(store) == []
    assert [store.releases.get(number).approval for number in (1, 2, 3)] == ["", "wanted", "wanted"]
    assert events(store, 2) == [("approval", "owner", "waiting for approval: releasectl approve 2")]
    assert events(store, 3)[1] == (
        "approval", "owner", "waiting for approval by somebody else than test: releasectl approve 3")
    assert store.releases.get(2).status_reason == "waiting for approval: releasectl approve 2"
    assert approve(store, 2, "anybody").approval == "given"
    assert runnable(store) == []  # no second look changes anything
    assert len(events(store, 3)) == 2


def test_a_row_that_comes_between_a_look_and_the_claim_is_not_claimed(four_eyes, database_url, open_store):
    new_release(open_store(database_url))
    assert four_eyes.claims.claim(1, "owner", 30.0) is None
    assert four_eyes.releases.get(1).status == "pending"


def test_run_once_by_cron_starts_nothing_unapproved(fleet_cli):
    fleet_cli.ok("create")
    fleet_cli.settings["APPROVALS"] = "1"
    fleet_cli.ok("run-once", "--drain")
    assert fleet_cli.world.runs() == [0, 0, 0]
    sql(fleet_cli.world.store, "UPDATE release_tasks SET author = 'alice'")
    fleet_cli.ok("approve", "1")
    fleet_cli.ok("run-once", "--drain")
    assert fleet_cli.world.runs() == [1, 1, 1]


def test_an_approval_while_frozen_or_before_its_time_starts_nothing(four_eyes):
    created(four_eyes)
    created(four_eyes, strategy={"startAt": "2099-01-01T00:00:00Z"}, target="dns")
    four_eyes.releases.set_freeze(True, "carol", "holidays")
    assert approve(four_eyes, 1).status_reason == "frozen: holidays"
    approve(four_eyes, 2)
    assert runnable(four_eyes) == []
    four_eyes.releases.set_freeze(False, "carol")
    assert runnable(four_eyes) == [1]
    assert four_eyes.releases.get(2).status_reason.startswith("scheduled for 2099-01-01")


def test_a_claim_that_has_run_out_asks_for_no_second_approval_and_stands_for_none(four_eyes):
    created(four_eyes)
    long_ago = "2020-01-01T00:00:00.000Z"
    sql(four_eyes, "UPDATE release_tasks SET claim_owner = 'gone', claim_fence = 3, claim_expires_at = ?", long_ago)
    assert runnable(four_eyes) == []
    approve(four_eyes, 1)
    start(four_eyes)
    sql(four_eyes, "UPDATE release_tasks SET claim_expires_at = ?", long_ago)
    assert runnable(four_eyes) == [1]
    start(four_eyes)
    assert four_eyes.releases.get(1).approval == "given"


def test_pause_resume_and_cancel_of_what_waits_are_as_of_any_pending_release(four_eyes):
    created(four_eyes)
    four_eyes.releases.act("pause", 1, ALICE)
    assert four_eyes.releases.act("resume", 1, ALICE).status_reason.startswith("waiting for approval")
    four_eyes.releases.act("pause", 1, ALICE)
    approve(four_eyes, 1)
    assert runnable(four_eyes) == []
    four_eyes.releases.act("resume", 1, ALICE)
    assert runnable(four_eyes) == [1]
    created(four_eyes)
    assert four_eyes.releases.act("cancel", 2, ALICE).status == "cancelled"
    assert statuses(four_eyes, 2) == ["skipped", "skipped"]


def test_each_kind_of_new_release_waits_where_the_setting_is_on(four_eyes):
    created(four_eyes, payload={"n": 1})
    sql(four_eyes, "UPDATE release_tasks SET status = 'success', started_at = created_at")
    sql(four_eyes, "UPDATE release_task_nodes SET status = 'success'")
    created(four_eyes, payload={"n": 2})
    sql(four_eyes, "UPDATE release_tasks SET status = 'failed', started_at = created_at WHERE id = 2")
    sql(four_eyes, "UPDATE release_task_nodes SET status = 'failed', attempts = 1 WHERE release_task_id = 2")
    retry, rollback = four_eyes.releases.retry(2, BOB).release, four_eyes.releases.rollback(2, BOB).release
    assert (retry.approval, retry.author, rollback.approval, rollback.author) == ("wanted", "bob", "wanted", "bob")
    assert refusal(four_eyes, retry.id, BOB)[0] == 1004
    assert runnable(four_eyes) == []


def test_a_retry_of_what_was_not_approved_waits_again_also_without_the_setting(store):
    add_nodes(store, 1)
    created(store, approval="wanted")
    store.releases.act("cancel", 1, ALICE)
    assert store.releases.retry(1, ALICE).release.approval == "wanted"
    created(store)
    store.releases.act("cancel", 3, ALICE)
    assert store.releases.retry(3, ALICE).release.approval == ""


def test_nobody_approved_what_the_program_made_itself(four_eyes):
    found = created(four_eyes, approval="automatic")
    assert (found.approved_by, found.approved_at, runnable(four_eyes)) == ("", None, [1])


# -- in an emergency ---------------------------------------------------------------------------------

def test_a_plan_tells_of_an_emergency_only_where_it_can_be_declared(four_eyes):
    told = "waits for approval by somebody else than its author"
    for request, warning in ((rc.ReleaseRequest(), f"{told}; in an emergency it goes without: emergency (--emergency)"),
                             (rc.ReleaseRequest(approval="wanted"), told)):
        assert four_eyes.releases.plan(request).warnings == [warning]


def test_an_emergency_goes_without_and_everybody_is_told(four_eyes, told):
    four_eyes.database.notify_on = frozenset({"failed"})
    created(four_eyes, is_emergency=True, reason="sites are down")
    assert runnable(four_eyes) == [1]
    found = four_eyes.releases.get(1)
    assert (found.approval, found.approved_by) == ("emergency", "alice")
    assert events(four_eyes)[1] == ("emergency", "alice", "without approval, by alice; sites are down")
    assert json.loads(four_eyes.audit.rows(0, 100)[-1].after)["approval"] == "emergency"
    assert [(row.kind, row.detail) for row in outbox(four_eyes)] == [
        ("approval", "without approval, by alice; sites are down")]
    assert [record.levelname for record in told.records if "without approval" in record.message] == ["WARNING"]


@pytest.mark.parametrize("asks", [False, True])
def test_an_emergency_where_nothing_asks_for_an_approval_is_a_note_and_no_alarm(store, asks):
    add_nodes(store, 1)
    store.database.notify_on = frozenset({"failed"})
    store.claims.note_executor("a:1:x", "a", rc.SERVE, 15.0, "", True)
    sql(store, "UPDATE executors SET approvals = ?", int(asks))  # an executor's setting, not this process's
    request = rc.ReleaseRequest(reason="down", is_emergency=True)
    note = [] if asks else ["nothing asks for an approval here (APPROVALS is 0): emergency changes nothing"]
    plan = store.releases.plan(request)
    assert plan.warnings == (note or ["emergency: it goes without an approval, and everybody is told so"])
    assert plan.approval == ("emergency" if asks else "")
    made = store.releases.create(request, ALICE)
    assert (made.release.approval, made.warnings) == ("emergency" if asks else "", note)
    assert [row.kind for row in outbox(store)] == (["approval"] if asks else [])
    assert ("emergency" in [event for event, _, _ in events(store)]) == asks


def test_the_author_of_what_waits_may_declare_an_emergency_with_a_reason(four_eyes):
    created(four_eyes)
    assert refusal(four_eyes, 1, ALICE, is_emergency=True) == (
        2001, "reason is missing: an emergency goes without approval, so say why")
    assert approve(four_eyes, 1, ALICE, is_emergency=True, reason="down").approval == "emergency"
    row = four_eyes.audit.rows(0, 100)[-1]
    assert json.loads(row.after) == {"approval": "emergency", "reason": "down", "emergency": True}
    assert "pending and waits for no approval: alice let it go without one at" in refusal(four_eyes, 1)[1]


def test_create_retry_and_rollback_take_an_emergency_with_a_reason_only(filled):
    filled.settings["APPROVALS"] = "1"
    for words in (["create"], ["retry", "2"], ["rollback", "2"]):
        assert "reason is missing" in filled.refused(2, *words, "--emergency")
        filled.ok(*words, "--emergency", "--reason", "sites are down")
    assert [filled.store.releases.get(number).approval for number in (4, 5, 6)] == ["emergency"] * 3
    assert "exclude each other" in filled.refused(2, "create", "--emergency", "--approval", "--reason", "x")


def test_the_api_takes_an_emergency_and_a_wish_for_an_approval(store, tokens):
    add_nodes(store, 1)
    with signed_in(store, tokens, "alice") as client:
        assert client.ok("POST", "/api/v1/releases", {"approval": True}, 201)["approval"] == "wanted"
        client.ok("POST", "/api/v1/releases/1/approve", {"emergency": True, "reason": "down"})
        assert client.code("POST", "/api/v1/releases", {"emergency": True}) == 2001
        assert client.code("POST", "/api/v1/releases", {"emergency": "yes", "reason": "x"}) == 2003
        assert client.code("POST", "/api/v1/releases", {"emergency": True, "approval": True, "reason": "x"}) == 2003
        client.ok("POST", "/api/v1/releases/1/cancel", {})
        assert client.code("POST", "/api/v1/releases/1/retry", {"emergency": True}) == 2001
        made = client.ok("POST", "/api/v1/releases/1/retry", {"emergency": True, "reason": "down"}, 201)
        assert ("approval" in made, len(made["warnings"])) == (False, 1)  # nothing asks for one: release 1 went without
    assert store.releases.get(1).approval == "emergency"


# -- what people are told ----------------------------------------------------------------------------

WAITS = "waiting for approval by somebody else than alice: releasectl approve 1"


def test_everybody_who_asks_hears_that_it_waits_and_for_whom(four_eyes):
    created(four_eyes)
    four_eyes.claims.note_executor("host-a:1:x", "host-a", "serve", 1000.0, "", is_first=True)
    assert four_eyes.releases.get(1).status_reason == WAITS
    why = four_eyes.claims.why(1, 600.0)
    step = why.stopped_by
    assert step == rc.Step("approval", "stops", WAITS, "releasectl approve 1")
    assert [one.name for one in why.steps][:4] == ["database", "freeze", "executor", "approval"]
    [problem] = four_eyes.overview.read([]).problems
    assert (problem.kind, problem.text, problem.mend, problem.release_id) == (
        "approval", f"release 1 (v1) of cdn waits for a person: {WAITS}", "releasectl approve 1", 1)
    approve(four_eyes, 1)
    assert rc.Step("approval", "ok", "approved by bob") in four_eyes.claims.why(1, 600.0).steps
    assert four_eyes.overview.read([]).problems == []


def test_why_names_the_approval_before_what_goes_on_by_itself(four_eyes):
    created(four_eyes, is_emergency=True, reason="x")
    start(four_eyes)
    created(four_eyes)
    four_eyes.claims.note_executor("owner", "host-a", "serve", 1000.0, "", is_first=True)
    why = four_eyes.claims.why(2, 600.0)
    assert [(step.name, step.state) for step in why.steps if step.state != "ok"] == [
        ("order", "waits"), ("approval", "stops")]
    assert why.text == WAITS.replace("1", "2")


def test_create_says_that_it_waits_and_watch_shows_it(filled_quick):
    filled_quick.settings["APPROVALS"] = "1"
    waits = f"waiting for approval by somebody else than {USER}: releasectl approve 4"
    out = filled_quick.ok("create", "--target", "dns").out
    assert waits in out, out
    assert "no executor is running" not in out  # one cause on one line: somebody has to approve it first
    assert waits in filled_quick.ok("status", "4").out
    assert waits in filled_quick.ok("list").out.replace("\n", " ")
    result = filled_quick("watch", "4", "--timeout", "0.1")
    assert (result.code, waits in result.err) == (75, True), result
    result = filled_quick("create", "--target", "dns", "--wait", "--timeout", "0.1")
    assert (result.code, waits.replace("4", "5") in result.err) == (75, True), result


def test_a_release_that_begins_to_wait_is_told_with_its_author_and_reason(four_eyes):
    four_eyes.database.notify_on = frozenset({"approval"})
    created(four_eyes, reason="new sites")
    [row] = outbox(four_eyes)
    assert (row.kind, row.release_id, row.detail) == ("approval", 1, f"{WAITS}; new sites")
    message = rc.message_of(row.kind, row.at, row.detail, "host-a", "https://r.example.com",
                            four_eyes.claims.why(1, 600.0))
    assert message["text"] == f"release 1 (v1): {WAITS}; new sites"
    assert message["link"] == "https://r.example.com/#/releases/1"


def test_what_waits_for_an_approval_is_not_stuck_and_hides_nobody_who_is(four_eyes):
    created(four_eyes)
    created(four_eyes)
    approve(four_eyes, 2)
    sql(four_eyes, "UPDATE release_tasks SET updated_at = '2020-01-01T00:00:00.000Z'")
    assert four_eyes.outbox.quiet_releases(300.0) == [2]


def test_status_says_who_made_and_who_approved_a_release(filled_quick):
    filled_quick.ok("create", "--approval", "--target", "dns")
    approve(filled_quick.store, 4)
    out = filled_quick.ok("status", "4").out
    assert f" by {USER}; approved " in out
    assert " by bob" in out


def test_serve_starts_what_is_approved_by_another_process_within_its_interval(fleet_cli):
    fleet_cli.settings["APPROVALS"] = "1"
    fleet_cli.ok("create")
    sql(fleet_cli.world.store, "UPDATE release_tasks SET author = 'alice'")
    process = fleet_cli.start("serve")
    try:
        eventually(lambda: fleet_cli.world.store.audit.rows(0, 100))
        fleet_cli.ok("approve", "1")
        eventually(lambda: fleet_cli.world.store.releases.get(1).status == "success")
    finally:
        process.terminate()
        fleet_cli.end(process)
