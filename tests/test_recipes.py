"""The five recipes of docs/STRATEGIES.md: what the text says to type or to send is done, and what it says comes.

Each runs from its own text, by the command line, by the API and in the page, on both engines, with agents that listen:
quick are the command line on SQLite and the API on PostgreSQL.
"""
from __future__ import annotations

import collections
import contextlib
import http.server
import json
import os
import pwd
import re
import shlex
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_agent import payload_sha256
from lab import (
    ADDRESSES,
    FOREVER_MS,
    ROOT,
    USER,
    Client,
    Quick,
    World,
    assert_books_balance,
    eventually,
    free_port,
    mtls,
    new_release,
    settings_for,
    sha256,
    statuses,
)
from test_page import Daemon, Page, new_page, signed_in  # noqa: F401  (one is a fixture)

import releasectl as rc

# The fleet that the text describes, and the regions in their order.
NODES = range(1, 13)
REGIONS = {"ap": [1, 2, 3, 4], "eu": [5, 6, 7, 8], "us": [9, 10, 11, 12]}
CANARIES = [1, 5]
RACKS = {f"r{rack}": [n for n in NODES if (n - 1) % 4 == rack - 1] for rack in range(1, 5)}
OLD = {"websites": [{"name": "shop", "ttl": 60}]}
NEW = {"websites": [{"name": "shop", "ttl": 300}]}
BAD = {"websites": [{"name": "shop", "ttl": 0}]}


# -- the text --------------------------------------------------------------------------------------

def section(recipe: str) -> str:
    """Return the text of a recipe; for '' what stands before the first one."""
    text = (ROOT / "docs" / "STRATEGIES.md").read_text(encoding="utf-8").partition("\n## Recipes\n")[2]
    return re.split(r"(?m)^##", text.partition(f"\n### {recipe}\n")[2] if recipe else text)[0]


class Text:
    """The indented blocks of a recipe, one after the other; what has to differ in a test is replaced in them."""

    def __init__(self, recipe: str, **replaced: object):
        self.replaced = replaced
        self.blocks = [textwrap.dedent(part) for part in section(recipe).strip("\n").split("\n\n")
                       if part.startswith("    ")]

    def _next(self) -> str:
        block = self.blocks.pop(0)
        for name, value in self.replaced.items():
            block = re.sub(rf"\b{name}\b", str(value), block)
        return block

    def typed(self) -> list[list[str]]:
        """Return the words of each line of a block for the command line."""
        block = self._next()
        assert block.startswith("releasectl "), block
        return [shlex.split(line)[1:] for line in block.replace("\\\n", " ").split("\n")]

    def shown(self) -> list[str]:
        """Return the lines of a block that is printed, with single spaces; [] where the next block is none."""
        if not self.blocks or self.blocks[0].startswith(("releasectl ", "POST ")):
            return []
        return [" ".join(line.split()) for line in self._next().strip().split("\n")]

    def sent(self) -> tuple[str, dict[str, Any]]:
        """Return path and body of a block for the API."""
        head, _, body = self._next().partition("\n")
        method, path = head.split()
        assert method == "POST"
        return path, json.loads(body)


# -- the site --------------------------------------------------------------------------------------

class Site:
    """Twelve nodes that run release 1, an executor that is ticked, and one of three doors to steer it by."""

    def __init__(self, world: World, cli: Quick, client: Client, door: str, page: Page | None):
        self.world, self.cli, self.client, self.store = world, cli, client, world.store
        self.door, self.page = door, page
        world.nodes(len(NODES))
        for number in NODES:
            labels = {key: value for key, groups in (("region", REGIONS), ("rack", RACKS))
                      for value, members in groups.items() if number in members}
            world.store.nodes.update(number, {"labels": rc.to_json(
                {**labels, "role": "canary" if number in CANARIES else "edge"})})
        self.executor = world.executor()
        self.release(OLD)
        world.fleet.clear_log()

    def release(self, payload: dict[str, Any]) -> None:
        """Send a payload to all nodes."""
        made = new_release(self.store, payload=payload)
        self.until(lambda: self.store.releases.get(made.id).status == "success")

    def until(self, look: Callable[[], Any]) -> None:
        """Let the executor work until look() is true."""
        eventually(lambda: self.executor.tick() is not None and look(), 20.0)

    def ended(self, release_id: int) -> str:
        """Let a release come to its end; return its status."""
        self.until(lambda: self.store.releases.get(release_id).is_terminal)
        assert_books_balance(self.store, release_id)
        return self.store.releases.get(release_id).status

    # what the text says is typed, or sent, and what it shows is compared with what comes

    def plans(self, text: Text) -> list[str]:
        """Run the command that shows a plan; return what the text shows of it, which is all that came."""
        [words] = text.typed()
        assert words[-1] == "--plan"
        before = self.store.releases.page().total
        shown = text.shown()
        assert shown == [" ".join(line.split()) for line in self.cli.ok(*words).out.splitlines()]
        assert self.store.releases.page().total == before
        return shown

    def makes(self, text: Text, plan: list[str]) -> None:
        """Create what the plan showed; through the API its dryRun has the same numbers."""
        [words], shown, (path, body) = text.typed(), text.shown(), text.sent()
        if self.door == "cli":
            out = self.cli.ok(*words).out.splitlines()
            assert shown == out[:len(shown)]
            return
        if self.door == "page":
            self._makes_on_the_page(path, body, plan)
            return
        planned = self.client.ok("POST", path, {**body, "dryRun": True})
        rows = [re.fullmatch(r"(\d+) (\d+) (\d+) (?:((?!edge-).*?) )?(edge-\d+(?:, edge-\d+)*)", line) for line in plan]
        assert [(str(one["batch"]), str(len(one["nodeIds"])), str(one["maxFailed"]), one["group"] or None,
                 ", ".join(f"edge-{id_}" for id_ in one["nodeIds"])) for one in planned["batches"]] == [
            row.groups() for row in rows if row]
        # with what holds it up; the plan of an emergency is shown without the words that help
        assert {f"note: {rc.with_options(one)}" for one in planned["warnings"]} <= set(plan)
        self.client.ok("POST", path, body, 201)

    def _makes_on_the_page(self, path: str, body: dict[str, Any], plan: list[str]) -> None:
        """Write and tick what a body has, look at the plan, and send it: it is that body."""
        assert self.page
        page = signed_in(self.page, "alice" * 8, "alice")
        if path.endswith("/releases"):
            body = {"strategy": {}, "reason": "weekly", **body, "target": "cdn"}
            page.draft(payload=rc.to_json(body["payload"]), reason=body["reason"]).ready().press("JSON")
            page.fill(strategy=rc.to_json(body["strategy"]))
        else:
            page.open(f"#/releases/{path.split('/')[-2]}").press("Roll back").ready().fill(reason=body["reason"])
        for name in body:
            if body[name] is True:
                page.tick(name)
        page.ready()
        shown = " ".join((page.text("#ask-plan") or page.text("#plan")).split())
        batches = len(re.findall(r"(?m)^\d+ \d+ \d+ ", "\n".join(plan)))
        assert f"to {len(NODES)} nodes in {batches} batch" in shown
        for change in [re.fullmatch(r"~ (.*): (.*) -> (.*)", line) for line in plan]:
            assert not change or "{} - {} + {}".format(*change.groups()) in shown, shown
        if body.get("supersede") and body.get("duringFreeze"):
            assert "Would wait for" not in shown
        made = self.store.releases.page().total + 1
        page.run("document.querySelector('#ask-do.main, #send-button.main').click()")
        page.see(f"Release {made}", "main h1")
        assert page.browser.changes[-1] == ("POST", path, body)

    def says(self, text: Text) -> None:
        """Ask as the text does; each line that it shows must come, in its order."""
        [[verb, release_id]], shown = text.typed(), text.shown()
        assert shown
        if self.door == "cli":
            came = [" ".join(line.split()) for line in self.cli(verb, release_id).out.splitlines()]
        elif self.door == "page":
            came = self._says_on_the_page(int(release_id), shown)
        elif verb == "why":
            came = [" ".join([one["state"], one["name"], *one["text"].split()])
                    for one in self.client.ok("GET", f"/api/v1/releases/{release_id}/why")["steps"]]
        else:
            found = self.client.ok("GET", f"/api/v1/releases/{release_id}")["release"]
            came = [f"release {found['id']} (v{found['version']}): {found['status']}, {found['statusReason']}",
                    f"reason: {found['reason']}"]
        assert [line for line in came if line in shown] == shown, came

    def _says_on_the_page(self, release_id: int, shown: list[str]) -> list[str]:
        """Return those lines whose words the view of a release has."""
        parts = {line: re.sub(r"^(release \d+ \(v\d+\): \w+, |reason: |waits \w+ )", "", line) for line in shown}
        self.page.open(f"#/releases/{release_id}").see(None)
        with contextlib.suppress(AssertionError):
            eventually(lambda: all(part in " ".join(self.page.text("main").split()) for part in parts.values()))
        words = " ".join(self.page.text("main").split())
        return [line for line in shown if parts[line] in words] + [words]

    # what the agents did, by their own count

    def runs(self) -> list[tuple[float, float, int]]:
        """Return start, end (infinite where it hangs) and node of what ran since release 1, in order of start."""
        return sorted((run["startedAt"], float("inf") if run["finishedAt"] is None else run["finishedAt"], number)
                      for number in NODES for run in self.world.agent(number).runs)

    def ran(self) -> list[int]:
        """Return the nodes that ran something, sorted."""
        return sorted(number for _, _, number in self.runs())

    def runs_now(self, payload: dict[str, Any]) -> list[int]:
        """Return the nodes whose agents have a payload applied."""
        return [number for number in NODES if self.world.agent(number).content == payload_sha256(payload)]

    def assert_one_batch_after_the_other(self, *batches: list[int]) -> None:
        runs = self.runs()
        ran = [[run for run in runs if run[2] in batch] for batch in batches]
        assert [sorted(run[2] for run in batch) for batch in ran] == [sorted(batch) for batch in batches]
        assert sum(map(len, batches)) == len(runs), "each once"
        for batch, following in zip(ran, ran[1:]):
            assert max(end for _, end, _ in batch) <= min(start for start, _, _ in following)

    def most_at_once(self, members: list[int]) -> int:
        """Return how many of these nodes worked at one time at most."""
        runs = [run for run in self.runs() if run[2] in members]
        return max(sum(one[0] <= start < one[1] for one in runs) for start, _, _ in runs)


by_each_door = pytest.mark.parametrize(("database_url", "site"), [("sqlite", "cli"), ("postgresql", "api"), *(
    pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("postgresql", "cli"), ("sqlite", "api"), ("sqlite", "page"), ("postgresql", "page")))], indirect=True)


@pytest.fixture
def site(request, world, quick, tmp_path) -> Iterator[Site]:
    """The site of the text, with the command line as the door, the API, or the page; in the last two alice signs in."""
    [words] = [shlex.split(block) for block in Text("").blocks if block.startswith("echo ")]
    quick.file(words[2].lstrip(">"), words[1])
    assert json.loads(words[1]) == NEW
    quick.settings.update(DATABASE_URL=world.url, **mtls(world.certs))
    tokens = tmp_path / "tokens"
    tokens.write_text("".join(f"{name}:operator:{sha256(name * 8)}\n" for name in ("alice", "bob")))
    tokens.chmod(0o600)
    make_page = request.getfixturevalue("new_page") if request.param == "page" else None
    daemon = Daemon(world.store, settings_for("sqlite:///unused.db", API_TOKENS_FILE=tokens))
    client = Client(daemon.server, world.store)
    client.token = "alice" * 8
    if make_page:
        yield Site(world, quick, client, "page", make_page(daemon))  # which stops it
    else:
        yield Site(world, quick, client, request.param, None)
        daemon.stop()


# -- the recipes -----------------------------------------------------------------------------------

def test_the_recipes_are_those_of_this_file():
    text = (ROOT / "docs" / "STRATEGIES.md").read_text(encoding="utf-8").partition("\n## Recipes\n")[2]
    assert re.findall(r"(?m)^### (.*)", text) == [
        "Canary then regions", "One host a rack", "Four eyes", "Back by itself", "Emergency", "Others"]


AFTER_CANARIES = [[n for n in members if n not in CANARIES] for members in REGIONS.values()]


def soak(site: Site, release_id: int, *batches: list[int]) -> None:
    """Let batches of a release go out, each after ten minutes of the one before it and none earlier."""
    done: list[int] = []
    for batch in batches:
        done = sorted([*done, *batch])
        site.until(lambda wanted=done: sorted(n.node_id for n in site.store.releases.with_nodes(release_id)[1]
                                              if n.status == "success") == wanted)
        site.world.advance(540)
        site.executor.tick()
        assert site.ran() == done, "it soaks"
        site.world.advance(60)


@by_each_door
def test_canary_then_regions_goes_in_the_order_as_written_and_soaks_between(site):
    text = Text("Canary then regions")
    site.makes(text, site.plans(text))
    soak(site, 2, CANARIES, *AFTER_CANARIES[:-1])
    assert site.ended(2) == "success"
    site.assert_one_batch_after_the_other(CANARIES, *AFTER_CANARIES)
    assert site.runs_now(NEW) == list(NODES)


@by_each_door
def test_canary_then_regions_stops_before_region_3_where_region_2_fails(site):
    text = Text("Canary then regions")
    site.makes(text, site.plans(text))
    site.world.agent(6).set(outcome="failed", message="no disk space")
    soak(site, 2, CANARIES, AFTER_CANARIES[0])
    assert site.ended(2) == "failed"
    site.says(text)
    site.world.advance(3600)
    site.executor.tick()
    site.assert_one_batch_after_the_other(CANARIES, *AFTER_CANARIES[:2])
    assert site.runs_now(OLD) == [6, *REGIONS["us"]]
    assert statuses(site.store, 2) == ["success"] * 5 + ["failed"] + ["success"] * 2 + ["skipped"] * 4
    assert [n for batch in site.store.releases.plan_again("retry", 2).batches for n in batch] == [6, *REGIONS["us"]]


@by_each_door
def test_one_host_a_rack_by_the_agents_own_count(site):
    text = Text("One host a rack")
    site.makes(text, site.plans(text))
    site.world.fleet.set(task_ms=400)
    assert site.ended(2) == "success"
    assert site.ran() == list(NODES)
    assert {rack: site.most_at_once(members) for rack, members in RACKS.items()} == dict.fromkeys(RACKS, 1)
    assert site.most_at_once(list(NODES)) == 4


@by_each_door
def test_one_host_a_rack_that_hangs_keeps_its_place_and_the_other_racks_go_on(site):
    text = Text("One host a rack")
    site.makes(text, site.plans(text))
    site.world.agent(6).set(task_ms=FOREVER_MS)
    site.until(lambda: site.runs_now(NEW) == [n for n in NODES if n not in (6, 10)])
    site.until(lambda: site.store.releases.get(2).success_nodes == 10)
    site.says(text)
    site.world.advance(125)  # well past its deadline, not just at it
    assert site.ended(2) == "failed"
    site.says(text)
    assert site.ran() == [n for n in NODES if n != 10]
    assert {rack: site.most_at_once(members) for rack, members in RACKS.items()} == dict.fromkeys(RACKS, 1)
    assert statuses(site.store, 2) == ["success"] * 5 + ["failed"] + ["success"] * 3 + ["skipped"] + ["success"] * 2


@by_each_door
def test_four_eyes_waits_for_somebody_else(site, monkeypatch):
    author = USER if site.door == "cli" else "alice"
    text = Text("Four eyes", alice=author)
    site.makes(text, site.plans(text))
    shown = section("Four eyes").replace("alice", author)
    [refusal] = re.findall(r'refused: "([^"]*)"', " ".join(shown.split()))
    [diff, approve], (path, body) = text.typed(), text.sent()
    site.executor.tick()
    assert site.ran() == []
    if site.door == "cli":
        assert refusal in site.cli.refused(3, *approve)
        monkeypatch.setattr(os, "getuid", lambda: pwd.getpwnam("daemon").pw_uid)
        assert "ttl: 60 -> 300" in site.cli(*diff).out
        site.cli.ok(*approve)
    elif site.door == "page":
        assert "somebody else than you" in site.page.open("#/releases/2").text("main")
        assert "Approve" not in site.page.text("main [role=group]")
        site.page.press("Sign out").see("You are signed out", "main h1")
        page = signed_in(site.page, "bob" * 8, "bob", "#/releases/2").see("300", "main")
        page.press("Approve").see("may start", "#ask").fill(**body).press("Approve: release 2").see("bob", "main")
        assert page.browser.changes[-1] == ("POST", path, body)
    else:
        answer = site.client("POST", path, body)
        assert (answer.code, refusal in answer.message) == (rc.NOT_ALLOWED, True)
        site.client.token = "bob" * 8
        site.client.ok("POST", path, body)
    assert site.ended(2) == "success"
    assert site.runs_now(NEW) == list(NODES)
    found = site.store.releases.get(2)
    assert (found.author, found.approved_by) == (author, "daemon" if site.door == "cli" else "bob")
    assert ("approved", body["reason"]) in [(e.event, e.detail) for e in site.store.releases.events(2)]
    assert f"by {author}; approved" in site.cli.ok("status", "2").out


@by_each_door
def test_four_eyes_somebody_with_a_token_approves_what_was_typed(site):
    text = Text("Four eyes", alice=USER)
    site.plans(text)
    [words] = text.typed()
    site.cli.ok(*words)
    site.executor.tick()
    assert site.ran() == []
    site.client.token = "bob" * 8
    site.client.ok("POST", "/api/v1/releases/2/approve", {"reason": "looks well"})
    assert site.ended(2) == "success"


@contextlib.contextmanager
def health_of(site: Site, breaks: int) -> Iterator[int]:
    """Give the port of health pages on all nodes: 200, but 502 on one node that has the new payload."""
    port = free_port(*ADDRESSES[:len(NODES)])

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_broken = self.server.server_address[0] == ADDRESSES[breaks - 1] and breaks in site.runs_now(NEW)
            self.send_response(502 if is_broken else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with contextlib.ExitStack() as stack:
        for address in ADDRESSES[:len(NODES)]:
            server = stack.enter_context(http.server.ThreadingHTTPServer((address, port), Page))
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
        yield port


@by_each_door
def test_back_by_itself_everything_is_on_the_old_payload_and_both_releases_say_so(site):
    with health_of(site, breaks=6) as port:
        text = Text("Back by itself", **{"8080": port, r"10\.0\.0": "127.0.1"})
        site.makes(text, site.plans(text))
        soak(site, 2, CANARIES, AFTER_CANARIES[0])
        assert site.ended(2) == "failed"
        assert site.ended(3) == "success"
    touched = [n for batch in [CANARIES, *AFTER_CANARIES[:2]] for n in batch]
    assert collections.Counter(number for _, _, number in site.runs()) == dict.fromkeys(touched, 2)
    assert all([run["payloadSha256"] for run in site.world.agent(n).runs] == [payload_sha256(NEW), payload_sha256(OLD)]
               for n in touched)
    assert site.runs_now(OLD) == list(NODES)
    assert not set(REGIONS["us"]) & set(site.ran())
    site.says(text)
    site.says(text)
    found = site.store.releases.get(3)
    assert (found.rollback_of, found.total_nodes) == (2, 8)
    assert site.store.releases.page().total == 3, "a rollback never rolls back"
    assert {row.via for row in site.store.audit.rows(limit=1000) if row.object == "release 3"} == {"executor"}


def make_emergency(site: Site) -> None:
    """Bring about what the recipe begins with: APPROVALS=1, release 2 is bad, three more wait, and all is frozen."""
    site.store.database.approvals = True
    site.cli.settings["APPROVALS"] = "1"
    for _ in range(3):
        site.cli.ok("create", "--payload", "bad.json", "--reason", "more of it")
    site.store.releases.set_freeze(True, USER, "the match")
    site.executor.tick()
    site.world.fleet.clear_log()


@by_each_door
def test_emergency_goes_before_what_waits_through_freeze_and_approvals(site):
    site.cli.file("bad.json", rc.to_json(BAD))
    site.release(NEW)
    make_emergency(site)
    assert site.runs_now(NEW) == list(NODES)
    assert "release 5 is pending and changed no node; the newest of target cdn that went out is release 2: " \
        "releasectl rollback 2" in site.cli.refused(3, "rollback", "latest", "--now")
    text = Text("Emergency", alice=USER)
    site.makes(text, site.plans(text))
    assert site.ended(6) == "success"
    assert site.runs_now(OLD) == site.ran() == list(NODES)
    site.says(text)
    for number in (3, 4, 5):
        found = site.store.releases.get(number)
        assert (found.status, found.status_reason) == (
            "cancelled", "superseded by release 6 (v6): 0 of 12 nodes updated")
    rows = {row.action: row for row in site.store.audit.rows(limit=1000) if row.object == "release 6"}
    assert rc.parse_json(rows["release.rollback"].after)["reason"] == "checkout answers 502"
    assert "emergency" in [event.event for event in site.store.releases.events(6)]
    assert text.blocks == []


@by_each_door
def test_emergency_where_the_bad_release_still_runs_it_is_ended_first(site):
    site.cli.file("bad.json", rc.to_json(BAD))
    site.cli.ok("create", "--payload", "site.json", "--soak", "10m")
    site.until(lambda: site.runs_now(NEW) == [1])
    make_emergency(site)
    text = Text("Emergency", alice=USER)
    text.typed(), text.shown()
    [words], _, (path, body) = text.typed(), text.shown(), text.sent()
    [command] = re.findall(r"end it first \(`releasectl ([^`]*)`\)", section("Emergency"))
    refusal = site.cli.refused(3, *words)
    assert refusal.endswith(f"release 2 is running; a release is rolled back after its end: releasectl {command}")
    site.cli.ok(*command.split())
    assert site.ended(2) == "cancelled"
    if site.door == "cli":
        site.cli.ok(*words)
    else:
        site.client.ok("POST", path, body, 201)
    assert site.ended(6) == "success"
    assert (site.runs_now(OLD), site.ran()) == (list(NODES), [1])
