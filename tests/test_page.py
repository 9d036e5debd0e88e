"""The dashboard in a real headless Chromium, over a real API, executor and agents (issue 8).

Whatever a test does with the page, it must log no error and ask nobody but its own daemon.
"""
from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from browser import PROGRAM, Browser
from conftest import leave_out
from lab import ADDRESSES, ROOT, World, add_nodes, eventually, new_release, settings_for, sql

import releasectl as rc

AXE = "axe-core@4.14.1"
MARKUP = "<img src=x onerror=alert(1)> & <b>bold</b>"
PAYLOAD = '{"websites": []}'
PLAN = {"totalNodes": 40, "batches": [{"batch": 1, "nodeIds": [1], "maxFailed": 0},
                                      {"batch": 2, "nodeIds": [*range(2, 41)], "maxFailed": 0}], "leftOut": []}
NEWER = {"code": 3003, "data": None, "message": "release 5 (v5) succeeded later on edge-1: retry of release 1 would "
                                                "replace its payload; overNewer (--over-newer) says so"}


class Daemon:
    """What `serve` runs, in this process: the API, and an executor where one is wanted."""

    def __init__(self, store: rc.Store, settings: rc.Settings, executor: rc.Executor | None = None,
                 api: rc.Api | None = None):
        self.store, self.executor = store, executor
        if executor and api is None:
            api = rc.Api(store, rc.Metrics(), executor.nudge, process=lambda: rc.process_json(settings, executor))
        self._server = rc.ApiServer(settings, api or rc.Api(store, rc.Metrics()))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._threads = [threading.Thread(target=self._server.serve_forever, args=(0.02,))]
        if executor:
            self._threads.append(threading.Thread(target=executor.run_loop))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self.executor:
            self.executor.stop()
        for thread in self._threads:
            thread.join()


class ServeProcess:
    """A real `serve` without an executor, to be killed."""

    def __init__(self, url: str, port: int = 0):
        if not port:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                port = taken.getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}/"
        environment = {"PATH": os.environ["PATH"], "DATABASE_URL": url, "HTTP_ADDR": f"127.0.0.1:{port}",
                       "RELEASE_EXECUTOR_ENABLED": "0"}
        self._process = subprocess.Popen([sys.executable, str(ROOT / "releasectl.py"), "serve"], env=environment,
                                         stderr=subprocess.DEVNULL)
        eventually(self._answers, message="serve did not come up")

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Page:
    """A person before the browser: looks for words, presses what bears a name."""

    def __init__(self, browser: Browser, daemon: Daemon | ServeProcess):
        self.browser, self.daemon = browser, daemon

    def open(self, place: str = "#/releases") -> Page:
        self.browser.open(self.daemon.url + place)
        return self.see(None)

    def run(self, expression: str) -> Any:
        return self.browser.run(expression)

    def text(self, selector: str = "body") -> str:
        """Return what is to be read in an element, '' when it is not there."""
        return self.run(f"(document.querySelector({json.dumps(selector)}) || {{innerText: ''}}).innerText")

    def see(self, words: str | None, selector: str = "body", within_s: float = 20.0) -> Page:
        """Wait until words can be read; without words until a view is drawn."""
        if words is None:
            eventually(lambda: self.run("document.querySelector('main h1') !== null"), within_s, "no view was drawn")
            return self
        text = ""

        def has_words() -> bool:
            nonlocal text
            text = self.text(selector)
            return words in text

        try:
            eventually(has_words, within_s)
        except AssertionError:
            pytest.fail(f"{words!r} did not come within {within_s} s into {selector}, which said:\n{text}")
        return self

    def count(self, selector: str) -> int:
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def press(self, name: str) -> Page:
        """Click the button or link of that name, as soon as it is there; in a dialog if one is open."""
        find = ("[...(document.querySelector('dialog[open]') || document).querySelectorAll('button, a, summary')]"
                f".find(e => e.textContent === {json.dumps(name)})")
        eventually(lambda: self.run(f"Boolean({find})"), message=f"nothing is called {name!r}")
        self.run(f"{find}.click()")
        return self

    def fill(self, **fields: str) -> Page:
        for name, value in fields.items():
            self.run(f"{{ const f = document.querySelector('dialog[open] [name={name}]');"
                     f" f.value = {json.dumps(value)}; f.dispatchEvent(new Event('input', {{bubbles: true}})); }}")
        return self

    def enter(self, place: str, key: str = "Enter", held: int = 0) -> Page:
        """Press Enter (or the space bar) where a selector leads, as often as it comes while it is held."""
        self.run(f"document.querySelector({json.dumps(place)}).focus()")
        assert self.run(f"document.activeElement === document.querySelector({json.dumps(place)})"), place
        self.browser.key(key, "\r" if key == "Enter" else key, held)
        return self

    def plan(self) -> Page:
        """Ask for the plan and wait until it is there."""
        return self.press("Show the plan").see("Plan", "#plan h3")

    def answers(self, *answers: tuple[str, str, Any]) -> Page:
        """Let the page's own fetch give these, in their order, to what changes something, instead of the daemon:

        the end of the address, what must be in the body, and the envelope (or only its data).
        """
        made = [(path, part, data if "code" in data else {"code": 0, "message": "success", "data": data})
                for path, part, data in answers]
        self.run("window.sent = []; window.left = " + json.dumps(made) + """;
            window.asDaemon = window.asDaemon || window.fetch;
            window.fetch = async (path, options) => {
              if (options.method === 'GET' || !options.method) return window.asDaemon(path, options);
              window.sent.push([path, JSON.parse(options.body), options.headers]);
              const [end, part, envelope] = window.left.shift() || ['?'];
              if (!path.endsWith(end) || !options.body.includes(part)) throw new Error(`unexpected: ${path}`);
              return new Response(JSON.stringify(envelope), {status: envelope.code ? 409 : 200});
            }; null""")
        return self

    def sent(self) -> list[tuple[str, Any]]:
        """What was sent to answers()."""
        return [(path.rpartition("/")[2], body) for path, body, _ in self.run("window.sent")]

    def settle(self) -> Page:
        """Wait as long as it takes for a click to become a release."""
        self.run("new Promise(then => setTimeout(then, 400))")
        return self

    def address(self) -> str:
        return self.run("location.hash")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        leave_out("Chromium (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def new_page(browser):
    """A function that gives a page before a daemon; no error, and no request to others, at the end."""
    daemons = []

    def make(daemon: Daemon | ServeProcess) -> Page:
        daemons.append(daemon)
        return Page(browser, daemon)

    browser.look()
    yield make
    browser.run("document.title")  # whatever was logged has come in
    errors, requests = list(browser.errors), list(browser.requests)
    browser.open("about:blank")
    for seen in (browser.errors, browser.requests, browser.answers, browser.changes):
        seen.clear()
    for daemon in daemons:
        daemon.stop()
    assert errors == []
    ours = tuple(daemon.url for daemon in daemons)
    assert [url for url in requests if not url.startswith((*ours, "data:", "about:"))] == []


@pytest.fixture
def page(new_page, sqlite_world) -> Page:
    """A page over a daemon without an executor, with an empty database."""
    return new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url)))


@pytest.fixture
def live(new_page, sqlite_world):
    """A function that starts agents and a daemon with an executor, and gives a page before it."""
    def start(count: int, **settings: Any) -> tuple[Page, World]:
        sqlite_world.nodes(count)
        executor = sqlite_world.executor(**settings)
        return new_page(Daemon(sqlite_world.store, executor.settings, executor)), sqlite_world
    return start


def big_release(store: rc.Store, nodes: int) -> None:
    """Make release 1 with so many nodes, all but the first running, with an event each."""
    with store.database.transaction(write=True) as tx:
        tx.insert_many("INSERT INTO nodes (name, main_ip) VALUES ", 2,
                       [(f"edge-{n}", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}") for n in range(1, nodes + 1)])
    new_release(store)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'success' WHERE batch = 1")
        tx.execute("UPDATE release_task_nodes SET status = 'running' WHERE batch = 2")
        tx.execute("UPDATE release_tasks SET status = 'running', started_at = created_at, success_nodes = 1")
        rc.add_events(tx, rc.utc_text(0), "test", [
            rc.NewEvent(1, "dispatched", "pending", "running", node_id=n) for n in range(2, nodes + 1)])


def succeed(store: rc.Store, first: int, last: int) -> None:
    """Let nodes of release 1 succeed, as an executor would write it."""
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'success' WHERE node_id BETWEEN ? AND ?", first, last)
        tx.execute(f"UPDATE release_tasks SET updated_at = ?, {rc.COUNTERS}", store.state.now())
        rc.add_events(tx, store.state.now(), "test", [
            rc.NewEvent(1, "succeeded", "running", "success", node_id=n) for n in range(first, last + 1)])


# -- what is served ----------------------------------------------------------------------------

def test_the_page_is_one_document_whose_policy_allows_its_own_script_and_style_alone():
    text, headers = rc.dashboard()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
                      "form-action": "'none'", "frame-ancestors": "'none'"}
    assert headers["Referrer-Policy"] == "no-referrer"


def test_the_page_writes_text_only_and_names_no_other_host():
    text = rc.dashboard().text
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", text) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert " style=" not in text


@pytest.fixture
def dashboard_file(tmp_path, monkeypatch):
    """Where dashboard.html would have to stand; nothing is there yet, and nothing was read."""
    monkeypatch.setattr(rc, "DASHBOARD_FILE", tmp_path / "dashboard.html")
    rc.dashboard.cache_clear()
    yield tmp_path / "dashboard.html"
    rc.dashboard.cache_clear()


@pytest.mark.parametrize(("content", "reason"), [
    (None, "dashboard.html can't be read (no such file or directory): it belongs beside releasectl.py"),
    (b"", "dashboard.html is empty or cut off: copy the one that came with this releasectl.py"),
    (b"<!doctype html><p>half", "dashboard.html is empty or cut off: copy the one that came with this releasectl.py"),
    (b"\xff", "dashboard.html can't be read (not UTF-8): it belongs beside releasectl.py")])
def test_without_its_file_the_page_is_404_with_what_is_missing_and_all_else_works(
        dashboard_file, sqlite_world, content, reason):
    if content is not None:
        dashboard_file.write_bytes(content)
    daemon = Daemon(sqlite_world.store, settings_for(sqlite_world.url))
    try:
        with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(daemon.url, timeout=60):
            pass
        assert (refused.value.code, refused.value.headers["Content-Type"]) == (404, "application/json")
        assert json.load(refused.value) == {"code": 3001, "message": f"no dashboard: {reason}", "data": None}
        refused.value.close()
        for path in ("readyz", "api/v1/health", "openapi.json"):
            with urllib.request.urlopen(daemon.url + path, timeout=60) as answer:
                assert answer.status == 200, path
    finally:
        daemon.stop()


def test_the_page_is_read_at_the_first_request_and_kept_when_its_file_changes(dashboard_file):
    api = rc.Api(rc.Store(rc.Database("sqlite://")), rc.Metrics())
    request = rc.Request((), {}, {}, "test")
    with pytest.raises(rc.AppError):
        api.page(request)
    dashboard_file.write_text("<style>a</style><script>b</script></html>\n")
    first = api.page(request)  # a file that was forgotten needs no restart
    dashboard_file.write_text("<style>c</style><script>d</script></html>\n")
    assert api.page(request) == first
    assert hashlib.sha256(b"b").digest() == base64.b64decode(
        re.findall(r"script-src 'sha256-([^']+)'", first.headers["Content-Security-Policy"])[0])


# -- health, which the page reads ------------------------------------------------------------------

def test_health_tells_executor_claims_releases_database_and_certificates(world):
    world.nodes(3)
    executor = world.executor()
    release = new_release(world.store)
    claim = world.store.claims.claim(release.id, "someone:1", 30)
    api = rc.Api(world.store, rc.Metrics(), process=lambda: rc.process_json(executor.settings, executor))
    health = api.process_health(rc.Request((), {}, {}, "test")).data
    assert health["database"] == {"engine": world.store.database.engine.name, "ok": True,
                                  "schema": len(rc.schema_steps()), "message": ""}
    assert health["executor"] == {"enabled": True, "owner": executor.owner, "lastLookAt": None}
    assert [(r["id"], r["status"], r["batches"]) for r in health["releases"]] == [(1, "running", 2)]
    assert [(c["releaseId"], c["owner"]) for c in health["claims"]] == [(claim.release_id, "someone:1")]
    (certificate,) = health["certificates"]
    assert (certificate["name"], certificate["message"]) == ("CONTROL_CERT", "")
    assert certificate["daysLeft"] > 1
    assert str(world.certs) not in json.dumps(health)


def test_the_list_of_nodes_tells_the_newest_release_that_names_each(store):
    add_nodes(store, 2)
    new_release(store)
    store.nodes.update(2, {"enabled": 0})
    new_release(store)
    store.releases.act("cancel", 2, "test")
    add_nodes(store, 1, first=3)
    listed = rc.Api(store, rc.Metrics()).list_nodes(rc.Request((), {"lastRelease": "1"}, {}, "test")).data["items"]
    assert [node["lastRelease"] for node in listed] == [
        {"releaseId": 2, "status": "skipped"}, {"releaseId": 1, "status": "pending"}, None]


def test_health_answers_without_a_database_and_with_certificates_that_are_no_good(sqlite_world, tmp_path):
    executor = sqlite_world.executor(CONTROL_CERT=tmp_path / "none.crt")
    store = rc.Store(rc.Database(f"sqlite:///{tmp_path}/missing/test.db"))
    api = rc.Api(store, rc.Metrics(), process=lambda: rc.process_json(executor.settings, executor))
    health = api.process_health(rc.Request((), {}, {}, "test")).data
    assert (health["database"]["ok"], health["releases"], health["claims"]) == (False, [], [])
    assert health["database"]["message"]
    assert health["certificates"] == [{"name": "CONTROL_CERT", "notAfter": None, "daysLeft": None,
                                       "message": "run `releasectl check` to see why"}]


# -- releases ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_release_is_followed_from_its_creation_to_success(live):
    page, world = live(3)
    page.open().see("There is no release yet")
    page.press("New release").fill(reason="weekly", payload=PAYLOAD).plan().press("Create")
    page.see("3 nodes succeeded", "main")
    assert page.address() == "#/releases/1"
    for words in ("success", "weekly", "Batch 2 of 2", "2 of 2 done", "created", "by api", "finished"):
        page.see(words, "main")
    assert world.runs() == [1, 1, 1]
    page.press("releasectl").see("All is well", "main h1").see("took", "#release-1")
    assert page.run("document.title") == "All is well | Releases"


@pytest.mark.slow
def test_a_release_is_followed_to_failure_and_says_why_in_text_and_is_retried(live):
    page, world = live(3)
    world.agent(1).set(outcome="failed", message=MARKUP)
    page.open().press("New release").fill(payload=PAYLOAD).plan().press("Create")
    page.see("1 node failed", "#failures").see(MARKUP, "#failures pre").see("Fix what its message names", "#failures")
    assert page.count("main img") + page.count("main b") == 0
    page.see("Release 1 failed", "#pulse")
    page.run("document.querySelector('#failures ul a').click()")
    page.see(MARKUP, "#node pre")
    assert page.address() == "#/releases/1?node=1"
    for words in ("edge-1", "agent_failed", f"apply_config_{ADDRESSES[0]}_1", "Attempts\n1", "dispatched"):
        page.see(words, "#node")
    page.press("Close")
    eventually(lambda: page.address() == "#/releases/1")
    world.agent(1).set(outcome="success", message="")
    page.press("Retry").see("for the 3 nodes that failed or were skipped", "#ask").see("to 3 nodes", "#plan")
    page.press("Retry release 1")
    eventually(lambda: page.address() == "#/releases/2")
    page.see("3 nodes succeeded", "main").see("release 1", "main dl")


@pytest.mark.slow
def test_a_release_is_paused_and_resumed_from_the_page(live):
    page, world = live(2, AGENT_RETRIES=100)
    world.agent(1).set(mode="status", only="query")  # it has the task, and does not tell how it goes
    new_release(world.store)
    page.open("#/releases/1").see("running", "main .chip")
    page.press("Pause").see("until someone resumes", "#ask").fill(reason="look first").press("Pause release 1")
    page.see("paused", "main .chip").see("look first", "#timeline").see("needs you: paused", "#pulse")
    world.agent(1).set(mode="normal")
    page.see("1 of 1 done", "#batch-1")
    assert world.runs() == [1, 0]
    page.press("Resume").see("Continues with batch 2 (1 node).", "#ask")
    page.press("Resume release 1").see("2 nodes succeeded", "main")


@pytest.mark.slow
def test_a_verb_that_can_not_be_used_now_says_what_it_needs(page):
    add_nodes(page.daemon.store, 1)
    new_release(page.daemon.store)
    page.open("#/releases/1").see("resume needs paused; retry needs partial, failed or cancelled", "#why")
    assert page.run("[...document.querySelectorAll('button[aria-disabled]')].map(b => b.textContent)") \
        == ["Resume", "Retry", "Roll back"]
    page.press("Retry")
    assert page.count("dialog[open]") == 0
    page.press("Cancel").press("Cancel release 1").see("cancelled", "main .chip")


@pytest.mark.slow
def test_what_the_daemon_refuses_is_said_in_the_dialog(page):
    page.open().press("New release").fill(payload=PAYLOAD).press("Show the plan").see("no online nodes", "#ask")
    page.fill(payload="{").press("Show the plan").see("The payload is not JSON", "#wrong-payload")
    assert page.run("document.activeElement.name") == "payload"
    page.fill(payload=PAYLOAD, strategy="[").press("Show the plan").see("The strategy is not JSON", "#wrong-strategy")
    assert page.text("#wrong-payload") == ""
    page.fill(strategy="", labels="region=eu, region=us").press("Show the plan")
    page.see("The label region is there twice", "#wrong-labels")
    assert page.count("dialog[open]") == 1


@pytest.mark.slow
def test_the_filter_is_in_the_address_and_the_way_back_leads_back(page):
    store = page.daemon.store
    add_nodes(store, 1)
    for _ in range(25):
        new_release(store)
    store.releases.act("pause", 3, "test")
    page.open("#/releases?status=paused").see("Release 3", "#release-3")
    assert page.count("tbody tr") == 1
    page.press("pending").see("Release 25", "tbody").see("page 1 of 2", "main")
    assert page.address() == "#/releases?status=pending"
    page.press("Next").see("Release 1", "tbody")
    assert page.address() == "#/releases?status=pending&page=2"
    page.press("failed").see("No release is failed", "main")
    page.run("history.back()")
    page.see("Release 1", "tbody")
    page.open("#/releases/99").see("release 99 does not exist", "main")
    page.open("#/nothing").see("There is no page nothing", "main").see("Page not found", "main h1")
    page.press("Releases").see("History", "main")


@pytest.mark.slow
def test_a_daemon_that_is_lost_and_comes_back_is_noticed_and_what_was_seen_stays(new_page, sqlite_world):
    add_nodes(sqlite_world.store, 2)
    new_release(sqlite_world.store)
    first = ServeProcess(sqlite_world.url)
    page = new_page(first).open("#/releases/1").see("pending", "main .chip").see("updated", "#age")
    first.stop()
    page.see("The daemon can't be reached. Retrying.", "#trouble").see("Connection lost", "#pulse")
    assert re.fullmatch(r"\d+ s ago, showing \d\d:\d\d:\d\d", page.text("#age"))
    page.see("Release 1", "main h1")
    sqlite_world.store.releases.act("pause", 1, "test")
    second = ServeProcess(sqlite_world.url, first.port)
    try:
        page.see("paused", "main .chip")
        assert page.text("#trouble") == ""
    finally:
        second.stop()


@pytest.mark.slow
def test_a_node_is_found_walked_to_and_opened_by_keyboard(page):
    add_nodes(page.daemon.store, 4)
    new_release(page.daemon.store)
    page.open("#/releases/1")
    eventually(lambda: page.count(".cell") == 4)
    page.run("document.querySelector('#batch-2 .cell').focus()")
    page.browser.key("ArrowRight")
    assert page.run("document.activeElement.getAttribute('aria-label')") == "edge-3: pending"
    page.browser.key("Enter", "\r")
    page.see("edge-3", "#node")
    page.browser.key("Escape")
    eventually(lambda: page.address() == "#/releases/1")
    assert page.run("document.activeElement.id") == "cell-3"
    page.run("const f = document.querySelector('.find'); f.value = 'edge-4'; f.oninput({target: f})")
    eventually(lambda: page.count(".cell") == 1)


@pytest.mark.slow
def test_ten_thousand_nodes_are_capped_summed_up_and_followed_by_events_alone(page):
    big_release(page.daemon.store, 10_000)
    page.open("#/releases/1").see("and 9,699 more nodes: 9,699 running", "#batch-2", 60)
    assert page.count(".cell") == 300  # and none of batch 1, which is done and folded
    assert page.count("*") < 1500

    def whole_reads() -> int:
        page.run("0")  # what was asked for since has come in
        return len([url for url in page.browser.requests if url.endswith("/api/v1/releases/1")])

    eventually(lambda: whole_reads() == 2)  # once more after the history came in, and never again
    for last in (4000, 9999):
        succeed(page.daemon.store, 2, last)
        page.see(f"{last - 1} of 9999 done", "#batch-2", 60)
    assert whole_reads() == 2
    page.run("location.hash = '#/releases/1?node=9998'")
    page.see("edge-9998", "#node").see("succeeded", "#node")


# -- nothing changes without a plan that was read and a button that was pressed ------------------------

@pytest.mark.slow
def test_enter_in_the_new_release_dialog_creates_nothing(page):
    add_nodes(page.daemon.store, 2)
    page.open().see("There is no release yet")
    page.run("[...document.querySelectorAll('button')].find(b => b.textContent === 'New release').id = 'new'")
    page.enter("#new", held=5).see("New release", "#ask h2")
    for name in ("target", "reason", "labels"):
        page.enter(f"#ask [name={name}]")
    page.settle()
    assert page.browser.changes == []
    page.fill(payload=PAYLOAD)
    for name in ("target", "reason", "labels"):
        page.enter(f"#ask [name={name}]")
    page.plan()
    for name in ("target", "reason", "labels"):
        page.enter(f"#ask [name={name}]")
    page.settle()
    assert [body["dryRun"] for _, _, body in page.browser.changes] == [True]
    assert page.daemon.store.releases.page().total == 0


@pytest.mark.slow
def test_a_new_release_is_created_only_after_its_plan_was_shown(page):
    store = page.daemon.store
    add_nodes(store, 3)
    page.open().press("New release").fill(payload=PAYLOAD).press("Create").settle()
    assert page.browser.changes == []
    page.plan().see("Goes to 3 nodes", "#plan").see("in batches of 1, then 2.", "#plan")
    assert "undefined" not in page.text("#ask")
    for change in ({"target": "dns"}, {"reason": "weekly"}, {"payload": '{"websites": [], "more": 1}'},
                   {"strategy": '{"batches": [2]}'}):
        page.fill(**change)
        assert page.count("#plan h3") == 0, change
        page.press("Create").settle()
        assert page.count("dialog[open]") == 1
        page.plan()
    page.see("in batches of 2, then 1.", "#plan")
    assert all(body["dryRun"] for _, _, body in page.browser.changes)
    page.run("document.querySelector('[name=target]').value = 'silently'")  # as a browser's extension would
    page.press("Create").settle()
    assert page.count("#plan h3") == 0
    assert store.releases.page().total == 0
    page.fill(target="dns").plan().press("Create")
    eventually(lambda: page.address() == "#/releases/1")
    assert [(r.target, r.reason) for r in store.releases.page().items] == [("dns", "weekly")]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["Enter", " "])
def test_a_plan_that_was_read_is_created_by_the_keyboard_on_its_button(page, key):
    add_nodes(page.daemon.store, 1)
    page.open().press("New release").fill(payload=PAYLOAD)
    page.run("[...document.querySelectorAll('#ask button')].forEach(b => { b.id = b.textContent.split(' ')[0]; })")
    page.enter("#Show", key, held=3).see("Goes to 1 node", "#plan").settle()
    assert page.daemon.store.releases.page().total == 0  # held down on the one button it does not reach the other
    assert page.run("document.activeElement.id") == "Show"
    assert page.run("document.querySelector('#plan').getAttribute('aria-live')") == "polite"
    page.browser.key("Tab")
    assert page.run("document.activeElement.id") == "Create"
    page.enter("#Create", key)
    eventually(lambda: page.address() == "#/releases/1")


@pytest.mark.slow
def test_a_plan_of_what_was_written_before_is_not_shown(page):
    add_nodes(page.daemon.store, 1)
    page.open().press("New release").fill(payload=PAYLOAD)
    page.run("""const real = window.fetch; window.fetch = async (path, options) => {
      const answer = await real(path, options);
      if (options.method === 'POST') await new Promise(then => { window.goOn = then; });
      return answer; }""")
    page.press("Show the plan").see("Loading the plan", "#plan").fill(reason="changed")
    eventually(lambda: page.run("Boolean(window.goOn)"))
    page.run("window.goOn()")
    page.see("can be used once the plan is shown", "#plan").press("Create").settle()
    assert page.daemon.store.releases.page().total == 0


@pytest.mark.slow
def test_an_empty_payload_is_an_error_beside_its_field(page):
    add_nodes(page.daemon.store, 1)
    page.open().press("New release")
    assert page.run("document.querySelector('[name=payload]').value") == ""
    page.press("Show the plan").see('Write the payload, for example {"websites": []}', "#wrong-payload")
    assert page.run("[document.activeElement.name, document.activeElement.getAttribute('aria-invalid'), "
                    "document.activeElement.getAttribute('aria-describedby')]") == ["payload", "true", "wrong-payload"]
    assert page.browser.changes == []
    page.fill(payload=PAYLOAD).plan()
    assert page.text("#wrong-payload") == ""
    assert page.count("[aria-invalid]") == 0


@pytest.mark.slow
def test_the_payload_goes_out_as_it_was_written(page):
    add_nodes(page.daemon.store, 1)
    page.open().press("New release").fill(payload='{"websites": [], "websites": [1]}').press("Show the plan")
    page.see("websites", "#ask .refused")  # the daemon takes no key twice: which of the two would be meant?
    page.fill(payload='{"websites": [12345678901234567891]}', strategy='{"batches": [1]}').plan().press("Create")
    eventually(lambda: page.address() == "#/releases/1")
    with page.daemon.store.database.transaction() as tx:
        assert "12345678901234567891" in tx.value("SELECT payload FROM release_tasks")


@pytest.mark.slow
def test_the_plan_of_a_new_release_warns_of_nodes_that_would_lose_their_sites(page):
    refusal = {"code": 2003, "message": "payload has no websites, which edge-1 needs", "data": None}
    page.open().press("New release").fill(payload="{}").answers(
        ("releases", "dryRun", refusal),
        ("releases", "dryRun", {**PLAN, "version": 7, "emptied": [f"edge-{n}" for n in range(1, 16)]}),
        ("releases", "dryRun", {**PLAN, "version": 7, "emptied": []}))
    page.press("Show the plan").see(refusal["message"], "#ask .refused")
    assert page.count("#plan h3") == 0
    page.plan().see("Goes to 40 nodes as version 7, in batches of 1, then 39.", "#plan")
    page.see("15 nodes would be left without any site: edge-1, edge-2, ", "#plan .notice")
    page.see(" and 3 more", "#plan .notice")
    page.fill(payload='{"websites": [1]}').plan()
    assert "without any site" not in page.text("#ask")


@pytest.mark.slow
def test_what_a_new_release_leaves_out_is_told_before_and_after_its_creation(page):
    left_out = [{"nodeId": 3, "nodeName": "edge-3", "why": "maintenance"},
                {"nodeId": 4, "nodeName": MARKUP, "why": "disabled"},
                {"nodeId": 5, "nodeName": "edge-5", "why": "maintenance"}]
    add_nodes(page.daemon.store, 1)
    new_release(page.daemon.store)
    page.open().press("New release").fill(payload=PAYLOAD).answers(
        ("releases", "dryRun", {**PLAN, "leftOut": left_out}),
        ("releases", "websites", {"releaseId": 1, "version": 1, "totalNodes": 40, "batches": [], "leftOut": left_out}))
    page.plan()
    for words in ("Left out: 3 nodes.", "maintenance: edge-3, edge-5", f"disabled: {MARKUP}"):
        page.see(words, "#plan")
    page.press("Create").see("Release 1 created", "#ask h2").see("Version 1 goes to 40 nodes.", "#ask")
    page.see("maintenance: edge-3, edge-5", "#ask")
    assert page.address() == "#/releases/1"
    page.press("Close").see("pending", "main .chip")
    assert page.count("dialog[open]") == 0


def failed_release(store: rc.Store) -> None:
    """Make release 1 of 3 nodes: one success, one failed, one skipped."""
    add_nodes(store, 3)
    new_release(store)
    with store.database.transaction(write=True) as tx:
        for node, status in enumerate(("success", "failed", "skipped"), 1):
            tx.execute("UPDATE release_task_nodes SET status = ? WHERE node_id = ?", status, node)
        tx.execute("UPDATE release_tasks SET status = 'failed', success_nodes = 1, failed_nodes = 1, started_at = "
                   "created_at, finished_at = created_at, error_msg = 'edge-2: no'")


@pytest.mark.slow
def test_the_causes_of_many_failures_are_a_table_with_the_names_folded(page):
    store = page.daemon.store
    store.nodes.import_all([{"name": f"edge-{number}", "main_ip": f"10.9.0.{number}",
                             "labels": json.dumps({"pop": "gru" if number < 25 else "fra"})}
                            for number in range(1, 61)])
    release = new_release(store)
    for number in range(1, 27):
        sql(store, "UPDATE release_task_nodes SET status = 'failed', error_kind = ?, error_msg = ? WHERE node_id = ?",
            "unreachable" if number < 25 else "agent_failed",
            f"10.9.0.{number}:8443: no route" if number < 25 else MARKUP, number)
    sql(store, "UPDATE release_tasks SET status = 'failed', failed_nodes = 26, finished_at = created_at")
    page.open(f"#/releases/{release.id}").see("26 nodes failed", "#failures h2")
    page.see("{main_ip}:8443: no route", "#cause-0").see("24 of 24 in pop=gru", "#cause-0")
    page.see("Is the host up", "#cause-0").see(MARKUP, "#cause-1").see("agent_failed", "#cause-1")
    assert page.count("#failures img") + page.count("#failures li") == 0
    page.run("document.querySelector('#cause-0 summary').click()")
    page.see("edge-20", "#cause-0 ul").see("and 4 more", "#cause-0 ul")
    page.run("document.querySelector('#cause-0 li a').click()")
    page.see("no route", "#node pre").press("Close").see("edge-20", "#cause-0 ul")  # it is still open
    page.run("document.querySelector('#cause-0 summary').click()")
    eventually(lambda: page.count("#failures li") == 0)


@pytest.mark.slow
def test_a_retry_shows_its_plan_and_goes_over_newer_releases_only_when_told(page):
    failed_release(page.daemon.store)
    plan = {**PLAN, "version": 6, "payloadOf": {"releaseId": 1, "version": 1},
            "leftOut": [{"nodeId": 2, "nodeName": "edge-2", "why": "disabled"}]}
    page.open("#/releases/1").see("failed", "main .chip").answers(
        ("1/retry", "dryRun", NEWER), ("1/retry", "overNewer", plan), ("1/retry", "overNewer", {
            "releaseId": 1, "version": 6, "totalNodes": 40, "batches": [], "leftOut": []}))
    page.press("Retry").see(NEWER["message"], "#ask .refused").press("Retry release 1").settle()
    page.see("Go over newer releases", "#ask")
    page.run("document.querySelector('[name=overNewer]').click()")
    page.see("Sends the payload of release 1 (v1) to 40 nodes as version 6", "#plan").see("disabled: edge-2", "#plan")
    page.fill(reason="again")  # says nothing of what goes out: the plan stays
    page.enter("#ask [name=reason]").settle().press("Retry release 1")
    eventually(lambda: page.count("dialog[open]") == 0)
    assert page.sent() == [("retry", {"dryRun": True}), ("retry", {"overNewer": True, "dryRun": True}),
                           ("retry", {"overNewer": True, "reason": "again"})]
    assert "Idempotency-Key" in page.run("window.sent[2][2]")


@pytest.mark.slow
def test_a_rollback_shows_which_release_it_goes_back_to_and_takes_another(page):
    failed_release(page.daemon.store)
    page.open("#/releases/1").see("failed", "main .chip").answers(
        ("1/rollback", "dryRun", {"code": 3003, "message": "nothing to roll back to", "data": None}),
        ("1/rollback", "toRelease", {**PLAN, "payloadOf": {"releaseId": 4, "version": 4}}),
        ("1/rollback", "toRelease", PLAN),
        ("1/rollback", "toRelease", {"releaseId": 1, "version": 6, "totalNodes": 40, "batches": []}))
    page.press("Roll back").see("nothing to roll back to", "#ask .refused")
    assert "Go over newer releases" not in page.text("#ask")
    page.fill(toRelease="four").press("Show the plan").see("Write the number of a release", "#wrong-toRelease")
    page.fill(toRelease="4").enter("[name=toRelease]").settle().press("Roll back release 1").settle()
    assert len(page.sent()) == 1
    page.plan().see("Sends the payload of release 4 (v4) to 40 nodes, in batches of 1, then 39.", "#plan")
    page.fill(toRelease="3").plan().see("Goes to 40 nodes, in", "#plan").press("Roll back release 1")
    eventually(lambda: page.count("dialog[open]") == 0)
    assert page.sent()[1:] == [("rollback", {"toRelease": 4, "dryRun": True}),
                               ("rollback", {"toRelease": 3, "dryRun": True}), ("rollback", {"toRelease": 3})]


@pytest.mark.slow
def test_what_the_daemon_plans_refuses_and_leaves_out_is_what_the_page_says(live):
    page, world = live(3)
    store = world.store
    store.nodes.add("edge-9", "10.9.9.9", agent_protocol="execute")
    page.open().press("New release").fill(payload="{}").press("Show the plan").see("websites", "#ask .refused")
    page.fill(payload=PAYLOAD).plan().see("Goes to 4 nodes as version 1", "#plan")
    page.see("1 node would be left without any site: edge-9", "#plan .notice")
    store.nodes.update(4, {"enabled": 0})
    page.fill(reason="first").plan().see("Goes to 3 nodes", "#plan").press("Create")
    eventually(lambda: page.address() == "#/releases/1")
    page.open("#/releases/1").see("3 nodes succeeded", "main")
    world.agent(1).set(outcome="failed", message="no")
    new_release(store, payload={"websites": [2]})
    page.open("#/releases/2").see("1 node failed", "#failures")
    world.agent(1).set(outcome="success", message="")
    new_release(store, payload={"websites": [3]})
    page.open("#/releases/3").see("3 nodes succeeded", "main")
    page.open("#/releases/2").press("Retry").see("release 3 (v3) succeeded later on", "#ask .refused")
    page.run("document.querySelector('[name=overNewer]').click()")
    page.see("Sends the payload of release 2 (v2) to 3 nodes as version 4", "#plan").press("Close")
    page.open("#/releases/3").press("Roll back").see("Sends the payload of release 1 (v1) to 3 nodes", "#plan")
    page.fill(toRelease="9").press("Show the plan").see("9", "#ask .refused")
    store.nodes.update(3, {"enabled": 0})
    page.fill(toRelease="1").plan().see("Left out: 1 node.", "#plan").see("edge-3", "#plan")
    page.press("Roll back release 3").see("Release 4 created", "#ask h2").see("edge-3", "#ask").press("Close")
    page.see("2 nodes succeeded", "main").see("Release 3", "main dl")
    assert page.address() == "#/releases/4"


@pytest.mark.slow
def test_enter_changes_nothing_in_any_dialog(page):
    store = page.daemon.store
    failed_release(store)
    new_release(store)
    for place, name, field in (("#/releases/1", "Retry", "reason"), ("#/releases/1", "Roll back", "toRelease"),
                               ("#/releases/2", "Pause", "reason"), ("#/releases/2", "Cancel", "reason"),
                               ("#/nodes", "Add a node", "mainIp"), ("#/nodes", "Edit", "name"),
                               ("#/health", "Freeze", "reason")):
        page.open(place).press(name).fill(**{field: "edge-9"}).enter(f"#ask [name={field}]", held=3).settle()
        assert page.count("dialog[open]") == 1, name
        page.press("Close")
    page.open("#/nodes").press("Maintenance")
    page.browser.key("Enter", "\r", held=3)  # whoever held it on the button before
    page.settle()
    assert [(path, body) for _, path, body in page.browser.changes if not body.get("dryRun")] == []
    assert store.releases.get(2).status == "pending"
    page.press("Change").see("End maintenance", "#row-1")


# -- who may, nodes, health -------------------------------------------------------------------------

@pytest.mark.slow
def test_a_token_is_asked_for_kept_for_the_session_and_sent(new_page, sqlite_world, tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"vera:viewer:{hashlib.sha256(b'open sesame').hexdigest()}\n")
    file.chmod(0o600)
    add_nodes(sqlite_world.store, 1)
    new_release(sqlite_world.store)
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url, API_TOKENS_FILE=file)))
    page.open("#/releases/1").see("Enter your API token", "#ask").see("Signed out", "main h1")
    page.fill(token="wrong").enter("[name=token]")
    page.see("This token isn't valid: mistyped, or removed on the server.", "#ask").fill(token="open sesame")
    page.press("Sign in").see("pending", "main .chip")
    assert page.run("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.see("Read only: your token is a viewer's.", "#why")
    assert page.run("document.querySelector('#verb-pause').getAttribute('aria-disabled')") == "true"
    page.run("location.reload()")
    page.see("pending", "main .chip")


@pytest.mark.slow
def test_nodes_are_added_edited_and_taken_out(page):
    page.open("#/nodes").see("There is no node yet", "main")
    page.press("Add a node").fill(name="edge-1", mainIp="bad address").press("Add").see("mainIp", "#ask .refused")
    page.fill(mainIp="10.0.0.7", labels="region=eu, site=ams").press("Add").see("region=eu, site=ams", "#row-1")
    page.press("Edit").fill(agentPort="9090", agentProtocol="execute").press("Save").see("execute, port 9090", "#row-1")
    page.press("Maintenance").press("Change").see("End maintenance", "#row-1")
    page.press("Disable").see("New releases leave it out", "#ask").press("Change").see("disabled", "#row-1")
    node = page.daemon.store.nodes.get(1)
    assert (node.agent_port, node.status, node.enabled) == (9090, "maintenance", 0)


@pytest.mark.slow
def test_health_shows_how_long_a_crl_is_good_and_one_that_has_expired_is_the_verdict(live, monkeypatch):
    page, _ = live(1)
    crl = {"name": "CONTROL_CA CRL", "notAfter": rc.utc_text(time.time() + 90_000), "daysLeft": 1.04, "message": ""}
    monkeypatch.setattr(rc, "crl_json", lambda *_: [crl])
    page.open("#/health")
    page.see("CONTROL_CA CRL", "main")
    assert "ends soon" not in page.text("main")
    crl.update(notAfter=None, daysLeft=None, message="expired since yesterday")
    page.see("CONTROL_CA CRL can't be used", "main")


@pytest.mark.slow
def test_health_shows_executor_database_certificates_and_claims(live):
    page, world = live(1, AGENT_RETRIES=100)
    world.agent(1).set(mode="refuse")
    new_release(world.store)
    page.open("#/health")
    for words in ("Last tick", "writable", "CONTROL_CERT", "days left", "expires in", rc.__version__):
        page.see(words, "main")
    assert "Freeze" in page.text("main") or (404, f"{page.daemon.url}api/v1/freeze") in page.browser.answers
    world.agent(1).set(mode="normal")
    page.see("No release is claimed", "main")


@pytest.mark.slow
@pytest.mark.parametrize(("last_at", "words"), [("2026-01-02T03:04:05.000Z", "Last tick 2026-01-02 "),
                                                (None, "No tick since its start on host-a.")])
def test_an_executor_that_is_stalled_is_told_with_its_host_and_where_to_look(
        new_page, sqlite_world, last_at, words):
    api = rc.Api(sqlite_world.store, rc.Metrics(), process=lambda: {"certificates": [], "executor": {
        "enabled": True, "owner": "host-a:1:9f3a61c0", "lastLookAt": last_at}})
    api.started_at -= 600
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url), api=api)).open()
    page.see("Executor stalled", "#pulse").see(words, "main .verdict")
    page.see("on host-a. journalctl -u releasectl -n 50", "main .verdict")


@pytest.mark.slow
def test_every_problem_is_told_with_since_when_and_its_mend(live):
    page, world = live(1)
    world.agent(1).set(outcome="failed", message="no space")
    new_release(world.store)
    eventually(lambda: world.store.releases.get(1).is_terminal)
    world.store.releases.set_freeze(True, "anna", "the match")
    page.open().see("Release 1 failed", "#pulse").see("frozen by anna: the match", "main .problems")
    for words in ("release 1 (v1) of cdn ended failed", "releasectl retry 1 --plan", "releasectl freeze off", " for "):
        page.see(words, "main .problems")
    assert page.count("main .problems li") == 2


# -- for everybody -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The source of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    if not shutil.which("npm"):
        leave_out("npm, for axe-core")
    packed = subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, capture_output=True, text=True, timeout=120,
                            check=False)
    if packed.returncode:
        leave_out(f"{AXE} by npm: {packed.stderr.strip()[:200]}")
    shutil.unpack_archive(folder / packed.stdout.strip(), folder, "gztar")
    return (folder / "package" / "axe.min.js").read_text()


@pytest.fixture
def full(new_page, sqlite_world) -> Page:
    """A page with something of everything: 1 failed, 2 success, 3 running, 4 pending; nodes in each state."""
    store = sqlite_world.store
    for n in range(1, 13):
        store.nodes.add(f"edge-with-a-rather-long-name-{n}", f"10.0.0.{n}", labels='{"region":"eu","site":"ams-2"}')
    mixes = (("success", "failed", "skipped"), ("success",), ("success", "running", "pending"), ("pending",))
    for number, statuses in enumerate(mixes, 1):
        new_release(store, reason="a reason that somebody gave")
        with store.database.transaction(write=True) as tx:
            for node in range(1, 13):
                status = statuses[(node - 1) % len(statuses)]
                message = f"nginx -t failed: {'x' * 120}" if status == "failed" else ""
                tx.execute("UPDATE release_task_nodes SET status = ?, error_kind = ?, error_msg = ?, started_at = ? "
                           "WHERE release_task_id = ? AND node_id = ?", status,
                           "agent_failed" if message else "", message, store.state.now(), number, node)
            status = ("failed", "success", "running", "pending")[number - 1]
            tx.execute(f"UPDATE release_tasks SET status = ?, started_at = created_at, finished_at = ?, {rc.COUNTERS} "
                       "WHERE id = ?", status, store.state.now() if status in rc.TERMINAL else None, number)
    store.nodes.update(11, {"enabled": 0})
    store.nodes.update(12, {"status": "maintenance"})
    return new_page(Daemon(store, settings_for(sqlite_world.url)))


PLACES = ("#/releases", "#/releases?status=failed", "#/releases/1", "#/releases/3", "#/releases/1?node=2", "#/nodes",
          "#/health")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_keeps_a_person_out(full, axe, scheme):
    full.browser.look(scheme=scheme)
    for place in PLACES:
        full.open(place)
        if "node=" in place:
            full.see("Attempts", "#node")
        assert (place, violations(full, axe)) == (place, [])
    for place, name in (("#/releases/3", "Cancel"), ("#/releases", "New release"), ("#/nodes", "Add a node")):
        full.open(place).press(name)
        assert (name, violations(full, axe)) == (name, [])
    full.open("#/releases").press("New release").press("Show the plan").see("Write the payload", "#ask")
    assert violations(full, axe) == []
    full.open("#/releases/1").see("failed", "main .chip").answers(("retry", "", NEWER), ("retry", "", {
        **PLAN, "emptied": ["edge-1"], "leftOut": [{"nodeId": 1, "nodeName": "edge-2", "why": "disabled"}]}))
    full.press("Retry").see(NEWER["message"], "#ask")
    assert violations(full, axe) == []
    full.plan()
    assert violations(full, axe) == []


def violations(page: Page, axe: str) -> list[Any]:
    page.run(axe)
    return page.run("axe.run().then(found => found.violations.map(v => [v.id, ...v.nodes.map(n => n.html)]))")


@pytest.mark.slow
def test_nothing_scrolls_sideways_at_360_pixels(full):
    full.browser.look(360, 780)
    for place in PLACES:
        full.open(place)
        wide = full.run("[document.documentElement.scrollWidth, ...[...document.querySelectorAll('dialog[open]')]"
                        ".map(d => d.scrollWidth)]")
        assert (place, [width for width in wide if width > 360]) == (place, [])
