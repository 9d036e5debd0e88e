"""The dashboard in a real headless Chromium, over a real API, executor and agents (issues 8 and 18).

Whatever a test does with the page, it must log no error and ask nobody but its own daemon.
"""
from __future__ import annotations

import base64
import csv
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
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from conftest import leave_out
from lab import ADDRESSES, ROOT, World, add_nodes, eventually, new_release, settings_for, sql
from test_again import ended, good, settle
from test_overview import live as looks_for_work

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
            api = rc.Api(store, rc.Metrics(), executor.nudge, process=rc.ProcessState(settings, executor),
                         ping=lambda node: rc.ping_node(executor.agents, node))
        self.server = rc.ApiServer(settings, api or rc.Api(store, rc.Metrics()))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        self._threads = [threading.Thread(target=self.server.serve_forever, args=(0.02,))]
        if executor:
            self._threads.append(threading.Thread(target=executor.run_loop))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
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

    def reload(self) -> Page:
        """Load the page anew in its tab."""
        return self.open(self.address())

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
            find = self._find(name)
            eventually(lambda: self.run(f"Boolean({find})"), message=f"no field is called {name!r}")  # noqa: B023
            self.run(f"{{ const f = {find}; f.value = {json.dumps(value)};"
                     " for (const kind of ['input', 'change']) f.dispatchEvent(new Event(kind, {bubbles: true})); }")
        return self

    @staticmethod
    def _find(name: str) -> str:
        """Return the expression for a field; in a dialog if one is open."""
        return f"(document.querySelector('dialog[open]') || document).querySelector('[name=\"{name}\"]')"

    def tick(self, name: str) -> Page:
        """Click a box that can be seen."""
        find = self._find(name)
        eventually(lambda: self.run(f"Boolean({find} && {find}.offsetParent)"), message=f"no box {name!r} is shown")
        self.run(f"{find}.click()")
        return self

    def enter(self, place: str, key: str = "Enter", held: int = 0) -> Page:
        """Press Enter (or the space bar) where a selector leads, as often as it comes while it is held."""
        self.run(f"document.querySelector({json.dumps(place)}).focus()")
        assert self.run(f"document.activeElement === document.querySelector({json.dumps(place)})"), place
        self.browser.key(key, "\r" if key == "Enter" else key, held)
        return self

    def drop(self, file: Path, place: str) -> Page:
        """Drag a file from outside to where a selector leads, and let go."""
        x, y = self.run(f"{{ const box = document.querySelector({json.dumps(place)}).getBoundingClientRect();"
                        " [box.left + box.width / 2, box.top + box.height / 2]; }")
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.browser.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
        return self

    def csv(self, card: str) -> tuple[str, list[dict[str, str]]]:
        """Press CSV where a selector leads; return the name of the file and its rows, by column."""
        name, text = self.run("""(async card => {
            const [link, {createObjectURL}] = [HTMLAnchorElement.prototype, URL], {click} = link;
            const file = new Promise(then => {
              URL.createObjectURL = blob => { file.blob = blob; return '#'; };
              link.click = function () { then(this.download); };
            });
            [...document.querySelectorAll(`${card} button`)].find(b => b.textContent === 'CSV').click();
            const name = await file;
            [link.click, URL.createObjectURL] = [click, createObjectURL];
            return [name, await file.blob.text()];
          })(""" + json.dumps(card) + ")")
        return name, list(csv.DictReader(text.splitlines()))

    def ready(self, words: str = "") -> Page:
        """Wait until the plan has come and the button that does it can be used; words are to be read in the plan."""
        eventually(lambda: self.run("Boolean(document.querySelector('#ask-do.main, #send-button.main'))"),
                   message=lambda: f"no plan came: {self.text('dialog[open]') or self.text('#plan')}")
        return self.see(words, "#ask-plan, #plan")

    def draft(self, **fields: str) -> Page:
        """Open the view of a new release and write into its fields."""
        return self.open("#/new").fill(**fields)

    def send(self) -> Page:
        """Press the button of a new release."""
        self.run("document.querySelector('#send-button').click()")
        return self

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
    api = rc.Api(world.store, rc.Metrics(), process=rc.ProcessState(executor.settings, executor))
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
    api = rc.Api(store, rc.Metrics(), process=rc.ProcessState(executor.settings, executor))
    health = api.process_health(rc.Request((), {}, {}, "test")).data
    assert (health["database"]["ok"], health["releases"], health["claims"]) == (False, [], [])
    assert health["database"]["message"]
    assert health["certificates"] == [{"name": "CONTROL_CERT", "notAfter": None, "daysLeft": None,
                                       "message": "run `releasectl check` to see why"}]


# -- what it says ----------------------------------------------------------------------------------

def texts() -> dict[str, list[str]]:
    """Return the table of texts: by key the English one and the Chinese one."""
    table = rc.dashboard().text.partition("const TEXTS = readTexts(`\n")[2].partition("`);")[0]
    return {key: said for key, *said in (line.split("\t") for line in table.splitlines())}


def test_each_text_that_the_page_uses_is_in_the_table_and_none_is_there_for_nothing():
    code = rc.dashboard().text.partition("const TEXTS = ")[2].partition("`);")[2]
    used = set(re.findall(r"""['"]([a-z]\w*(?:\.\w+)*)['"]""", code))
    asked = {key for call in re.findall(r"\b(?:t|phrase)\(([^)]*)", re.sub(r"=== '\w+'|\$\{[^}]*\}", "", code))
             for key in re.findall(r"'([\w.]+)'", call.partition(", {")[0])}
    made = set(re.findall(r"\b(?:t|phrase)\(`([\w.]+\.)\$\{", code))
    table = texts()
    assert sorted(asked - set(table)) == []
    assert sorted(key for key in table if key not in used and not key.startswith(tuple(made))) == []
    assert made == {"change.", "drift.", "exceed.", "field.", "hint.", "json.", "mend.", "nav.", "verb."}


def test_both_languages_have_every_text_with_the_same_values():
    for key, said in texts().items():
        english, chinese = said * 2 if len(said) == 1 else said
        values = [set(re.findall(r"\{(\w+)", text)) for text in (english, chinese)]
        assert values[1] <= values[0], key
        assert len(said) == 1 or re.search("[\u4e00-\u9fff]", chinese) or not re.search(
            "[A-Za-z]", re.sub(r"\{\w+\}", "", chinese)), key
    alike = {key for key, said in texts().items() if len(said) == 1}
    assert alike == {"col.agent", "hint.soakSec", "new.payload"}


def test_each_word_of_the_api_has_one_in_chinese():
    known = set(re.findall(r"'?([\w.]+)'?: '", rc.dashboard().text.partition("const WORDS = {")[2].partition("};")[0]))
    words = {*rc.RELEASE_STATUSES, *rc.NODE_STATUSES, *rc.DRIFTS[1:], *rc.ERROR_KINDS, *rc.NODE_EVENTS.values(),
             *rc.RELEASE_EVENTS.values(), rc.VIEWER, rc.OPERATOR, "skipped", "resumed", "renumbered"}
    assert words - known == set()


@pytest.mark.slow
def test_the_language_is_the_browsers_until_another_one_is_chosen_and_that_is_kept(page):
    page.browser.call("Emulation.setLocaleOverride", locale="zh-CN")
    try:
        page.browser.call("Network.setUserAgentOverride", userAgent="test", acceptLanguage="zh-CN,zh")
        page.open().see("没有执行器在运行（一天之内未见过任何执行器）", "main")
        page.open("#/releases/99").see("99 不存在", "main").open()
        assert page.run("document.documentElement.lang") == "zh-CN"
        page.press("English").see("no executor is running (none was seen for a day)", "main")
        page.open("#/nodes").see("None yet", "main").press("中文").see("尚无", "main")
        assert page.run("[document.title, localStorage.getItem('releasectl-language')]") == [
            "没有执行器在运行 | 节点", "zh"]
    finally:
        page.run("localStorage.clear()")
        page.browser.call("Emulation.setLocaleOverride", locale="")
        page.browser.call("Network.setUserAgentOverride", userAgent="test", acceptLanguage="en")


@pytest.mark.slow
def test_times_are_in_the_browsers_zone_or_in_utc_with_the_day_when_it_is_not_today(page):
    add_nodes(page.daemon.store, 1)
    new_release(page.daemon.store)
    then = "2025-01-02T20:04:05.000Z"
    sql(page.daemon.store, "UPDATE release_tasks SET status = 'paused', created_at = ?, started_at = ?, "
        "status_reason = ?", then, then, "soaking after batch 1 until 2126-01-02T20:04:05.609Z")
    page.browser.call("Emulation.setTimezoneOverride", timezoneId="Asia/Shanghai")
    try:
        page.open("#/releases/1").see("Times in Asia/Shanghai", "#foot").see("3 Jan 2025 04:04:05", "main dl")
        page.see("soaking after batch 1 until 3 Jan 2126 04:04:05, ", "main").press("UTC")
        page.see("2 Jan 2025 20:04:05", "main dl")
        for place in ("#/releases", "#/releases/1", "#/nodes/1", "#/health"):
            page.open(place)
            assert re.findall(r"\d{4}-\d\d-\d\dT.*", page.text()) == [], place
    finally:
        page.run("localStorage.clear()")
        page.browser.call("Emulation.setTimezoneOverride", timezoneId="")


def test_what_is_left_of_a_time_in_a_sentence_runs_on_in_both_languages(page):
    add_nodes(page.daemon.store, 1)
    release = new_release(page.daemon.store, strategy={"startAt": rc.utc_text(time.time() + 40)})
    try:
        for button, sentence in (("English", r"it starts at \d\d:\d\d:\d\d, (\d+) s left"),
                                 ("中文", r"开始时间：\d\d:\d\d:\d\d，还剩 (\d+) 秒")):
            page.open(f"#/releases/{release.id}").press(button)
            seen = eventually(lambda form=sentence: re.search(form, page.text("#why")),
                              message=lambda: page.text("#why"))
            eventually(lambda form=sentence, first=int(seen[1]): int(re.search(form, page.text("#why"))[1]) < first)
    finally:
        page.run("localStorage.clear()")


# -- a new release ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_release_is_followed_from_its_creation_to_success(live):
    page, world = live(3)
    page.open().see("There is no release yet").press("New release").fill(reason="weekly", payload=PAYLOAD)
    page.ready().see("Send to 3 nodes in 2 batches", "#send-button").send()
    page.see("3 nodes succeeded", "main")
    assert page.address() == "#/releases/1"
    for words in ("success", "weekly", "Batch 2 of 2", "2 of 2 done", "created", "finished"):
        page.see(words, "main")
    assert "by api" not in page.text()  # nobody signs in: nobody knows who that was
    assert world.runs() == [1, 1, 1]
    page.press("releasectl").see("All is well", "main h1").see("took", "#release-1")
    assert page.run("document.title") == "All is well | Releases"


@pytest.mark.slow
def test_a_mistake_in_the_payload_is_seen_in_the_difference_and_not_sent(live):
    page, world = live(3)
    new_release(world.store, payload={"websites": [{"domain": "a.example", "ttl": 300}], "big": 12345678901234567891})
    page.open("#/releases/1").see("3 nodes succeeded", "main")
    page.open("#/new").press("Start from the last success (release 1)").see("changes nothing", "#effect")
    text = page.run("document.querySelector('[name=payload]').value")
    assert "12345678901234567891" in text
    assert '      "ttl": 300' in text
    page.fill(payload=text.replace("300", "3"), reason="longer").ready("1 change against Release 1 (v1, 3 of 3 nodes)")
    page.see('~changed $.websites[?@.domain=="a.example"].ttl', "#effect").see("- 300\n+ 3", "#effect pre")
    assert page.run("document.querySelector('#gutter').textContent").split() == [*"123456789"]
    assert all(body["dryRun"] for _, _, body in page.browser.changes)
    page.fill(payload=text.replace("300", "30x"))
    page.see("Not JSON at line 5, column 16: , / } belongs there", "#wrong-payload").see("There is no plan", "#send")
    assert page.text("#gutter b").strip() == "5"
    assert world.store.releases.page().total == 1


@pytest.mark.slow
def test_the_button_of_a_new_release_waits_for_the_plan_of_exactly_what_is_written(page):
    store = page.daemon.store
    add_nodes(store, 3)
    page.draft().see("Give a reason first", "#send")  # also before there is a plan
    assert page.count("#main [name=supersede]") == 0    # nothing waits
    page.draft(payload=PAYLOAD).see("Goes to 3 nodes in 2 batches", "#plan").see("Give a reason first", "#send")
    page.send().settle()
    page.fill(reason="first").ready()
    for change in ({"target": "dns"}, {"payload": '{"websites": [], "more": 1}'}, {"strategy.batches": "2"}):
        page.fill(**change).send()
        page.see("Planning", "#send")
        page.ready()
    page.see("Batch 1", "#plan .planned").see("2 nodes", "#plan .planned")
    assert all(body["dryRun"] for _, _, body in page.browser.changes)
    page.run("""const real = window.fetch; window.fetch = async (path, options) => {
      const answer = await real(path, options);
      if (options.method === 'POST') await new Promise(then => { window.goOn = then; });
      return answer; }""")
    page.fill(target="ntp")
    eventually(lambda: page.run("Boolean(window.goOn)"))
    page.fill(target="dns2", reason="changed again")
    page.run("window.goOn(); window.goOn = null")
    page.send().settle()
    assert store.releases.page().total == 0
    eventually(lambda: page.run("Boolean(window.goOn)"))
    page.run("window.goOn(); window.goOn = null")
    page.ready().send()
    eventually(lambda: page.run("Boolean(window.goOn)"))
    page.run("window.goOn()")
    eventually(lambda: page.address() == "#/releases/1")
    assert [(r.target, r.reason) for r in store.releases.page().items] == [("dns2", "changed again")]
    assert page.run("sessionStorage.getItem('releasectl-draft')") is None


@pytest.mark.slow
def test_enter_sends_nothing_and_escape_and_a_reload_lose_nothing(page):
    add_nodes(page.daemon.store, 2)
    page.draft(payload=PAYLOAD, reason="kept").ready()
    for name in ("reason", "target"):
        page.enter(f"main [name={name}]", held=3)
    page.enter("[name='strategy.batches']").browser.key("Escape")
    page.settle()
    page.reload().ready()
    assert page.run("['reason', 'payload'].map(n => document.querySelector(`[name=${n}]`).value)") == ["kept", PAYLOAD]
    page.open("#/nodes").draft().ready()
    assert all(body["dryRun"] for _, _, body in page.browser.changes)
    page.enter("#send-button")
    eventually(lambda: page.address() == "#/releases/1")


@pytest.mark.slow
def test_the_payload_goes_out_as_it_was_written_also_from_a_file(page, tmp_path):
    add_nodes(page.daemon.store, 1)
    page.draft(payload='{"websites": [],\n "websites": [1]}')
    page.see('"websites" is there twice, again in line 2', "#wrong-payload")
    page.fill(payload="[1]").see("This must be a JSON object", "#plan")
    file = tmp_path / "site.json"
    file.write_text('\ufeff{"websites": [12345678901234567891]}')
    root = page.browser.call("DOM.getDocument")["root"]["nodeId"]
    node = page.browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
    page.fill(reason="from a file").ready("Goes to 1 node in 1 batch").send()
    eventually(lambda: page.address() == "#/releases/1")
    with page.daemon.store.database.transaction() as tx:
        assert "12345678901234567891" in tx.value("SELECT payload FROM release_tasks")


@pytest.mark.slow
def test_a_file_that_is_dropped_onto_the_payload_is_taken_as_one_that_is_loaded(page, tmp_path):
    add_nodes(page.daemon.store, 1)
    file = tmp_path / "site.json"
    page.draft(reason="dropped", payload="{}")
    for text, words in (('{"websites": [],\n "a": 1 2}', "Not JSON at line 2, column 9"),
                        ('\ufeff{"websites": [12345678901234567891]}', "1 line, 36 characters")):
        file.write_text(text)
        page.drop(file, "[name=payload]").see(words, "#wrong-payload")
    page.ready("Goes to 1 node in 1 batch").send()
    eventually(lambda: page.address() == "#/releases/1")
    assert page.daemon.store.releases.get(1).payload == '{"websites":[12345678901234567891]}'


@pytest.mark.slow
def test_nodes_are_chosen_by_labels_with_counts_or_picked_by_name(page):
    store = page.daemon.store
    for n in range(1, 7):
        store.nodes.add(f"edge-{n}", f"10.0.0.{n}", labels=json.dumps(
            {"pop": "ams" if n < 5 else "fra", "role": f"r{n % 2}"}))
    store.nodes.update(4, {"status": "maintenance"})
    page.draft(payload=PAYLOAD, reason="some").ready("Goes to 5 nodes").see("1 node, in maintenance: edge-4", "#plan")
    page.run("document.querySelector('[name=who][value=labels]').click()")
    page.press("ams 3").see("Goes to 3 nodes", "#plan").press("fra 2").see("Goes to 5 nodes", "#plan")
    page.press("ams 3").see("Goes to 2 nodes", "#plan").press("r1 3").see("Goes to 1 node", "#plan").ready()
    assert page.browser.changes[-1][2]["labels"] == {"pop": ["fra"], "role": ["r1"]}
    page.run("document.querySelector('[name=who][value=picked]').click()")
    page.see("Pick a node", "#plan")
    page.run("{ const f = document.querySelector('main .find'); f.value = 'edge-'; f.oninput({target: f}); }")
    page.press("+ edge-2").press("+ edge-5").see("Goes to 2 nodes", "#plan").ready().send()
    eventually(lambda: page.address() == "#/releases/1")
    assert [n.name for n in store.releases.with_nodes(1)[1]] == ["edge-2", "edge-5"]


@pytest.mark.slow
def test_a_strategy_is_written_in_fields_or_as_json_and_neither_loses_what_the_other_has(page):
    add_nodes(page.daemon.store, 8)
    page.draft(payload=PAYLOAD, reason="slow").ready().press("JSON")
    page.fill(strategy='{"batches": [1, "25%*"], "first": {"a": ["b"]}}').press("Fields")
    assert page.run("document.querySelector('[name=\"strategy.batches\"]').value") == "1, 25%*"
    page.fill(**{"strategy.maxFailed": "1", "strategy.soakSec": "60", "strategy.onExceed": "pause",
                 "strategy.pauseAfter": "1"})
    page.press("JSON")
    assert json.loads(page.run("document.querySelector('[name=strategy]').value")) == {
        "batches": [1, "25%*"], "first": {"a": ["b"]}, "maxFailed": 1, "soakSec": 60, "onExceed": "pause",
        "pauseAfter": [1]}
    page.see("first", "#plan .refused").fill(strategy='{"batches": [1, 2,]}')
    page.see("line 1, column 19: a value belongs there", "#wrong-strategy")
    page.fill(strategy='{"batches": [1, "25%*"], "maxFailed": 1, "soakSec": 60, "onExceed": "pause", '
                       '"pauseAfter": [1]}').ready()
    for words in ("Batches 2 to 4", "2 nodes each, 1 failure tolerated", "Waits 1 min after each batch",
                  "Where more fail: pause", "Pauses after batch 1"):
        page.see(words, "#plan")


@pytest.mark.slow
def test_an_emergency_is_offered_where_an_approval_is_needed_and_forgotten_with_the_draft(page):
    store = page.daemon.store
    add_nodes(store, 2)
    page.draft(payload=PAYLOAD, reason="it burns").ready()
    assert page.count("main [name=emergency]") == 0
    store.database.approvals = True
    page.fill(target="dns").ready("approval by somebody else").tick("approval")
    eventually(lambda: page.count("main [name=emergency]") == 0)  # they exclude each other
    page.ready("approval by somebody else").tick("approval").ready("“Emergency: without approval”").tick("emergency")
    page.ready("emergency: it goes without an approval").tick("approval").see("exclude each other", "#plan")
    page.press("Discard the draft").see("Discard the draft?", "#ask").press("Discard the draft").settle()
    assert page.run("JSON.parse(sessionStorage.getItem('releasectl-draft')).emergency") is None
    page.fill(payload=PAYLOAD, reason="again").ready("approval by somebody else").send().see("Release 1", "main h1")
    sql(store, "UPDATE release_tasks SET status = 'failed', approval = 'given', finished_at = created_at")
    sql(store, "UPDATE release_task_nodes SET status = 'failed'")
    page.open("#/releases/1").press("Retry").ready("approval by somebody else").fill(reason="now").tick("emergency")
    page.ready("emergency: it goes without an approval").press("Retry: release 1").see("Release 2", "main h1")
    assert [store.releases.get(number).approval for number in (1, 2)] == ["given", "emergency"]


@pytest.mark.slow
def test_the_plan_of_a_new_release_warns_of_nodes_that_would_lose_their_sites(page):
    refusal = {"code": 2003, "message": "payload has no websites, which edge-1 needs", "data": None}
    page.open("#/new").answers(
        ("releases", "dryRun", refusal),
        ("releases", "dryRun", {**PLAN, "version": 7, "emptied": [f"edge-{n}" for n in range(1, 16)]}))
    page.fill(payload="{}").see(refusal["message"], "#plan .refused").fill(payload=PAYLOAD, reason="then")
    page.ready("Goes to 40 nodes in 2 batches, as version 7").see("39 nodes", "#plan .planned")
    page.see("15 nodes would be left without any site: edge-1, edge-2, ", "#plan .notice")
    page.see("and 3 more", "#plan .notice")


@pytest.mark.slow
def test_the_nodes_that_a_release_leaves_out_are_told_in_the_plan(page):
    left_out = [{"nodeId": 3, "nodeName": "edge-3", "why": "in maintenance"},
                {"nodeId": 4, "nodeName": MARKUP, "why": "disabled"},
                {"nodeId": 5, "nodeName": "edge-5", "why": "in maintenance"}]
    page.open("#/new").answers(("releases", "dryRun", {**PLAN, "leftOut": left_out, "notChosen": 9}))
    page.fill(payload=PAYLOAD)
    for words in ("2 nodes, in maintenance: edge-3, edge-5", f"1 node, disabled: {MARKUP}",
                  "9 nodes are not among those chosen"):
        page.see(words, "#plan")


# -- a release ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_release_is_followed_to_failure_and_says_why_in_text_and_is_retried(live):
    page, world = live(3)
    world.agent(1).set(outcome="failed", message=MARKUP)
    page.draft(payload=PAYLOAD, reason="night").ready().send()
    page.see("1 node failed", "#failures").see(MARKUP, "#failures pre")
    page.see("If its message names what this release brought", "#failures")
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
    page.press("Retry").see("for 3 nodes that failed or were skipped", "#ask").ready("to 3 nodes")
    page.press("Retry: release 1")
    eventually(lambda: page.address() == "#/releases/2")
    page.see("3 nodes succeeded", "main").see("Release 1", "main dl")


@pytest.mark.slow
def test_a_release_is_paused_and_resumed_from_the_page(live):
    page, world = live(2, AGENT_RETRIES=100)
    world.agent(1).set(mode="status", only="query")  # it has the task, and does not tell how it goes
    new_release(world.store)
    page.open("#/releases/1").see("running", "main .chip")
    page.press("Pause").see("until someone resumes", "#ask").fill(reason="look first").press("Pause: release 1")
    page.see("paused", "main .chip").see("look first", "#timeline").see("needs you: paused", "#pulse")
    world.agent(1).set(mode="normal")
    page.see("1 of 1 done", "#batch-1")
    assert world.runs() == [1, 0]
    page.press("Resume").see("Continues with batch 2 (1 node).", "#ask")
    page.press("Resume: release 1").see("2 nodes succeeded", "main")


@pytest.mark.slow
def test_who_resumes_or_approves_is_told_of_a_freeze_that_holds_the_release_still(page):
    store = page.daemon.store
    add_nodes(store, 2)
    for fields in ({}, {"target": "dns", "during_freeze": True}, {"approval": "wanted"}):
        new_release(store, **fields)
    for release_id in (1, 2):
        store.releases.act("pause", release_id, "anna")
    store.releases.set_freeze(True, "anna", "the match", target="cdn")
    store.releases.set_freeze(True, "anna", "the lease", target="dns")
    held = "Would wait for: the end of the freeze: the match."
    page.open("#/releases/1").press("Resume").see(f"Continues with batch 1 (1 node). {held}", "#ask").press("Close")
    page.open("#/releases/2").press("Resume").see("Continues with batch 1 (1 node).", "#ask")
    assert "freeze" not in page.text("#ask")
    page.press("Close").open("#/releases/3").press("Approve").see(held, "#ask")


@pytest.mark.slow
def test_after_too_many_failures_there_are_two_ways_on_that_say_what_they_do(live):
    page, world = live(4)
    world.agent(1).set(outcome="failed", message="no")
    new_release(world.store, strategy={"batches": [2], "onExceed": "pause"})
    page.open("#/releases/1").see("Why it does not go on", "#why")
    eventually(lambda: page.run("[...document.querySelectorAll('main [role=group] button')].map(b => b.textContent)")
               == ["Accept the failures and continue", "Skip the rest and end"])
    page.press("Skip the rest and end").see("Skipped: 2 nodes", "#ask").see("1 node keeps version 1", "#ask")
    page.press("Close")
    page.press("Accept the failures and continue").see("1 failure counts no more", "#ask")
    page.see("Continues with batch 2 (2 nodes)", "#ask")
    assert page.text("#batch-1 .chip") == "failed"
    page.press("Accept the failures and continue: release 1").see("partial", "main .chip")
    page.see("1 failed, tolerated", "#batch-1 .chip")


@pytest.mark.slow
def test_a_release_that_waits_for_approval_offers_it_to_others_than_its_author(page):
    add_nodes(page.daemon.store, 2)
    new_release(page.daemon.store)
    sql(page.daemon.store, "UPDATE release_tasks SET approval = 'wanted', author = 'anna'")
    page.open("#/releases/1").see("anna asks for approval", "main").answers(("1/approve", "looked", {}))
    page.press("Approve").see("Release 1 of anna may start: version 1 goes to 2 nodes.", "#ask")
    page.fill(reason="looked at it").press("Approve: release 1")
    eventually(lambda: page.count("dialog[open]") == 0)
    assert page.sent() == [("approve", {"reason": "looked at it"})]
    sql(page.daemon.store, "UPDATE release_tasks SET author = ?", page.run("pulse.health.user"))
    page.open("#/releases/1").see("Waiting for approval by somebody else than you", "main")
    assert "Approve" not in page.text("main [role=group]")


@pytest.mark.slow
def test_only_verbs_that_can_be_used_now_are_offered(page):
    add_nodes(page.daemon.store, 1)
    new_release(page.daemon.store)
    page.open("#/releases/1")
    offered = "[...document.querySelectorAll('main [role=group][aria-label=Actions] button')].map(b => b.textContent)"
    eventually(lambda: page.run(offered) == ["Pause", "Cancel"])
    page.press("Cancel").press("Cancel: release 1").see("cancelled", "main .chip")
    eventually(lambda: page.run(offered) == ["Retry"])  # nothing was sent that could be rolled back


@pytest.mark.slow
def test_the_filter_is_in_the_address_and_the_way_back_leads_back(page):
    store = page.daemon.store
    add_nodes(store, 1)
    for number in range(35):
        new_release(store, reason=f"reason {number}")
    store.releases.act("pause", 3, "test")
    page.open("#/releases?status=paused").see("Release 3", "#release-3")
    assert page.count("[id^=release-]") == 1
    page.press("pending").see("Release 35", "#release-35").see("page 1 of 2", "main")
    assert page.address() == "#/releases?status=pending"
    page.press("Next").see("Release 1", "#release-1")
    assert page.address() == "#/releases?status=pending&page=2"
    page.press("failed").see("Nothing was found", "main")
    page.run("history.back()")
    page.see("Release 1", "#release-1")
    page.run("{ const f = document.querySelector('#search'); f.value = 'reason 7'; f.oninput({target: f}); }")
    page.see("Release 8", "#release-8")
    assert page.address() == "#/releases?status=pending&search=reason+7"
    page.open("#/releases/99").see("release 99 does not exist", "main").see("Page not found", "main h1")
    page.open("#/nothing").see("There is no page nothing", "main").see("Page not found", "main h1")
    page.press("Releases").see("History", "main").see("Waiting: 34", "#queue")
    assert page.count("#queue tbody tr") == 10
    page.press("Show all 34").see("34", "#queue")
    assert page.count("#queue tbody tr") == 34


def history(store: rc.Store, count: int) -> None:
    """Write so many releases of one node that ended, each way in turn, each a second longer than the one before it."""
    add_nodes(store, 1)
    with store.database.transaction(write=True) as tx:
        tx.insert_many("INSERT INTO release_tasks (version, status, reason, total_nodes, success_nodes, failed_nodes, "
                       "created_at, started_at, finished_at) VALUES ", 9,
                       [(n, ENDS[n % 4], f"reason {n}", 1, int(n % 4 < 2), int(n % 4 == 2), rc.utc_text(n * 1000),
                         rc.utc_text(n * 1000), rc.utc_text(n * 1000 + n)) for n in range(1, count + 1)])


ENDS = ("success", "partial", "failed", "cancelled")
ROWS = "[...document.querySelectorAll('main [id^=release-]')].map(row => Number(row.id.slice(8)))"
# Of each column of the strip: where it leads, its words twice, height, colour, and the shape of its mark.
STRIP = """[...document.querySelectorAll('main .strip a')].map(a => {
  const [tall, mark] = ['.tall', '.mark'].map(which => getComputedStyle(a.querySelector(which)));
  return [a.getAttribute('href'), a.getAttribute('aria-label'), a.title, parseFloat(tall.height), tall.backgroundColor,
    mark.clipPath]; })"""


@pytest.mark.slow
def test_of_500_releases_each_is_on_a_page_and_is_found_by_status_and_words(page):
    history(page.daemon.store, 500)
    page.open().see("page 1 of 17", "main")
    assert page.run(ROWS) == [*range(500, 470, -1)]
    page.press("Next").see("page 2 of 17", "main").see("Release 470", "#release-470")
    page.open("#/releases?page=17").see("page 17 of 17", "main")
    assert page.run(ROWS) == [*range(20, 0, -1)]
    assert page.count("main a[href*='page=18']") == 0
    page.press("failed").see("page 1 of 5", "main")
    assert page.run(ROWS) == [*range(498, 380, -4)]
    page.run("{ const f = document.querySelector('#search'); f.value = 'reason 35'; f.oninput({target: f}); }")
    page.see("Release 350", "#release-350")
    eventually(lambda: page.run(ROWS) == [358, 354, 350])
    assert page.address() == "#/releases?status=failed&search=reason+35"


@pytest.mark.slow
def test_the_last_30_releases_stand_as_high_as_they_took_with_their_end_in_colour_shape_and_word(page):
    history(page.daemon.store, 500)
    page.open("#/releases?status=failed&page=2").see("The last 30 releases: height is how long each took", "#strip")
    columns = page.run(STRIP)
    assert [column[0] for column in columns] == [f"#/releases/{n}" for n in range(471, 501)]  # of all, not of the page
    for n, (_, label, title, *_) in enumerate(columns, 471):
        assert label == title == f"Release {n}: {ENDS[n % 4]}, took {n // 60} min {n % 60} s".replace(" 0 s", "")
    heights = [column[3] for column in columns]
    assert heights == sorted(heights)
    assert heights[-1] - heights[0] >= 1
    assert len({column[4] for column in columns}) == len({column[5] for column in columns}) == len(ENDS)
    sql(page.daemon.store, "UPDATE release_tasks SET finished_at = started_at WHERE id = 500")
    sql(page.daemon.store, "UPDATE release_tasks SET finished_at = ? WHERE id = 499", rc.utc_text(499_000 + 4 * 498))
    page.reload().see("The last 30", "#strip")
    *_, quarter, whole, none = (column[3] for column in page.run(STRIP))
    assert abs((quarter - none) / (whole - none) - 1 / 4) < 0.05
    sql(page.daemon.store, "UPDATE release_tasks SET status = 'paused', finished_at = NULL WHERE id > 495")
    page.reload().see("The last 30", "#strip")
    assert [column[0] for column in page.run(STRIP)] == [f"#/releases/{n}" for n in range(466, 496)]


@pytest.mark.slow
def test_the_queue_is_one_table_of_places_in_the_order_in_which_releases_go(live):
    page, world = live(2, AGENT_RETRIES=100)
    world.agent(1).set(mode="refuse")
    for number in range(1, 6):
        new_release(world.store, reason=f"reason {number}")
    rows = "[...document.querySelectorAll('#queue tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    page.open().see("Waiting: 4", "#queue").see("Release 1", "#active-1").see("release 1", "#queue-5")
    assert page.count("main #queue table") == 1
    assert page.run("[...document.querySelectorAll('#queue th')].map(th => th.innerText)") == [
        "Place", "Release", "Nodes", "Reason", "Waits for"]
    assert page.run(rows) == [[str(n - 1), f"Release {n}\nversion {n}, cdn", "2", f"reason {n}",
                               "waiting for release 1, which is running"] for n in range(2, 6)]
    world.store.releases.act("cancel", 3, "test")
    page.see("Waiting: 3", "#queue")
    assert [row[:2] for row in page.run(rows)] == [
        [str(place), f"Release {n}\nversion {n}, cdn"] for place, n in ((1, 2), (2, 4), (3, 5))]


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
def test_keys_lead_about_and_a_sheet_tells_them(page):
    add_nodes(page.daemon.store, 3)
    page.open("#/releases")
    for key in "gn":
        page.browser.key(key, key)
    page.see("edge-3", "#row-3")
    assert page.address() == "#/nodes"
    for key in "jjk":
        page.browser.key(key, key)
    assert page.run("document.activeElement.textContent") == "edge-1"
    page.browser.key("/", "/")
    assert page.run("document.activeElement.id") == "search"
    page.browser.key("g", "g")
    page.browser.key("h", "h")
    assert page.run("[document.activeElement.value, location.hash]") == ["gh", "#/nodes"]  # typed, no way anywhere
    page.run("document.activeElement.blur()")
    page.browser.key("?", "?")
    page.see("next row", "#ask")
    page.browser.key("Escape")
    eventually(lambda: page.count("dialog[open]") == 0)


@pytest.mark.slow
def test_each_way_that_the_sheet_of_keys_tells_leads_where_it_says(page):
    page.open("#/nodes").browser.key("?", "?")
    page.see("next row", "#ask")
    told = page.run("[...document.querySelectorAll('#ask dt')].map(dt => [dt.innerText.split(' ').filter(Boolean),"
                    " dt.nextSibling.innerText])")
    ways = [(keys[1], name) for keys, name in told if keys[0] == "g"]
    links = page.run("[...document.querySelectorAll('#nav a')].map(a => a.innerText)")
    assert sorted(name for _, name in ways) == sorted(links)  # to each view
    page.press("Close")
    for key, name in ways:
        page.browser.key("g", "g")
        page.browser.key(key, key)
        eventually(lambda: page.run("document.title.split(' | ')[1]") == name, message=f"g {key}: {name}")  # noqa: B023
        assert page.text("#nav [aria-current]") == name
        eventually(lambda: page.run("view.isLoaded === true"))


@pytest.mark.slow
def test_ten_thousand_nodes_are_capped_summed_up_and_followed_by_events_alone(page):
    big_release(page.daemon.store, 10_000)
    page.open("#/releases/1").see("and 9,699 more: 9,699 running", "#batch-2", 60)
    assert page.count(".cell") == 300  # and none of batch 1, which is done and folded
    assert page.count("*") < 1500

    def whole_reads() -> int:
        page.run("0")  # what was asked for since has come in
        return len([url for url in page.browser.requests if url.endswith("/api/v1/releases/1")])

    eventually(lambda: whole_reads() == 2)  # once more after the history came in, and never again
    for last in (4000, 9999):
        succeed(page.daemon.store, 2, last)
        page.see(f"{last - 1:,} of 9,999 done", "#batch-2", 60)
    assert whole_reads() == 2
    page.run("location.hash = '#/releases/1?node=9998'")
    page.see("edge-9998", "#node").see("succeeded", "#node")


@pytest.mark.slow
def test_batches_that_are_alike_are_folded_into_one_line(page):
    add_nodes(page.daemon.store, 20)
    new_release(page.daemon.store, strategy={"batches": ["1*"]})
    sql(page.daemon.store, "UPDATE release_task_nodes SET status = 'success' WHERE batch < 15")
    sql(page.daemon.store, "UPDATE release_task_nodes SET status = 'running' WHERE batch = 15")
    page.open("#/releases/1").see("Batches 1 to 14", "#fold-1").see("14 nodes", "#fold-1")
    page.see("Batches 16 to 20", "#fold-16")
    page.run("document.querySelector('#fold-1 summary').click()")
    page.see("Batch 3 of 20", "#batch-3")


def night_shift(store: rc.Store, nodes: int) -> None:
    """Write a release of so many nodes of which 37 failed for three causes."""
    store.nodes.import_all([{"name": f"edge-{n}", "main_ip": f"10.9.{n >> 8}.{n & 255}", "labels": json.dumps(
        {"pop": "gru" if n <= 24 else "fra"})} for n in range(1, nodes + 1)])
    new_release(store, strategy={"maxFailed": 40})
    causes = [*[("unreachable", "10.9.0.{n}:8443: no route")] * 24, *[("agent_failed", MARKUP)] * 8,
              *[("timeout", "slow")] * 5]
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = 'success'")
        for n, (kind, message) in enumerate(causes, 1):
            tx.execute("UPDATE release_task_nodes SET status = 'failed', error_kind = ?, error_msg = ? WHERE node_id = "
                       "?", kind, message.format(n=n), n)
        tx.execute(f"UPDATE release_tasks SET status = 'partial', finished_at = created_at, {rc.COUNTERS}")


@pytest.mark.slow
def test_37_failures_of_three_kinds_among_2000_nodes_fit_a_screen_and_one_kind_is_retried(page):
    night_shift(page.daemon.store, 2000)
    page.browser.look(1280, 800)
    page.open("#/releases/1").see("37 nodes failed", "#failures h2")
    page.see("<address>:8443: no route", "#cause-0").see("24 of 24 in pop=gru", "#cause-0")
    page.see("Is the host up", "#cause-0").see(MARKUP, "#cause-1").see("agent_failed", "#cause-1")
    page.see("edge-1, edge-2, edge-3 …", "#cause-0")
    assert page.run("document.querySelector('#failures').getBoundingClientRect().height") < 480
    assert page.run("document.querySelector('#cause-2').getBoundingClientRect().bottom") < 800
    assert page.count("#failures img") + page.count("#failures li") == 0
    page.run("document.querySelector('#cause-0 summary').click()")
    page.see("edge-20", "#cause-0 ul").see("and 4 more", "#cause-0 ul")
    page.run("document.querySelector('#cause-0 li a').click()")
    page.see("no route", "#node pre").press("Close").see("edge-20", "#cause-0 ul")  # it is still open
    page.run("document.querySelector('#cause-0 summary').click()")
    eventually(lambda: page.count("#failures li") == 0)
    page.run("[...document.querySelectorAll('#cause-0 button')].find(b => b.textContent === 'Retry these').click()")
    page.see("for 24 nodes that failed", "#ask").ready("Sends the payload of release 1 to 24 nodes")
    page.press("Retry: release 1")
    eventually(lambda: page.address() == "#/releases/2")
    assert page.daemon.store.releases.get(2).total_nodes == 24


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
def test_a_retry_shows_its_plan_and_goes_over_newer_releases_only_when_told(page):
    failed_release(page.daemon.store)
    plan = {**PLAN, "version": 6, "payloadOf": {"releaseId": 1, "version": 1},
            "leftOut": [{"nodeId": 2, "nodeName": "edge-2", "why": "disabled"}]}
    page.open("#/releases/1").see("failed", "main .chip").answers(
        ("1/retry", "dryRun", NEWER), ("1/retry", "overNewer", plan),
        ("1/retry", "overNewer", {
            "releaseId": 1, "version": 6, "totalNodes": 40, "batches": [], "leftOut": []}))
    page.press("Retry").see("would replace its payload; “Replace what newer releases brought” says so", "#ask .refused")
    page.press("Retry: release 1").settle().see("Replace what newer releases brought", "#ask")
    page.run("document.querySelector('[name=overNewer]').click()")
    page.ready("Sends the payload of release 1 to 40 nodes in 2 batches, as version 6")
    page.see("1 node, disabled: edge-2", "#ask")
    page.fill(reason="again").enter("#ask [name=reason]").ready().press("Retry: release 1")
    eventually(lambda: page.count("dialog[open]") == 0)
    assert page.sent() == [("retry", {"dryRun": True}), ("retry", {"overNewer": True, "dryRun": True}),
                           ("retry", {"overNewer": True, "reason": "again"})]
    assert "Idempotency-Key" in page.run("window.sent[2][2]")


@pytest.mark.slow
def test_a_rollback_goes_to_the_release_that_was_chosen_of_the_good_ones(live):
    page, world = live(3)
    for number in (1, 2, 3):
        new_release(world.store, payload={"websites": [number]}, reason=f"site {number}")
        page.open(f"#/releases/{number}").see("3 nodes succeeded", "main")
    page.press("Roll back").ready("Sends the payload of release 2 to 3 nodes").see("- 3\n+ 2", "#effect pre")
    page.see("automatic: Release 2", "#ask option")
    page.fill(toRelease="1").ready("of release 1").fill(toRelease="").ready("of release 2")
    page.see("automatic: Release 2", "#ask option")
    assert page.run("[...document.querySelectorAll('[name=toRelease] option')].map(o => o.value)") == ["", "2", "1"]
    page.fill(toRelease="1").ready("Sends the payload of release 1 to 3 nodes").see("- 3\n+ 1", "#effect pre")
    world.store.nodes.update(3, {"enabled": 0})
    assert page.count("#ask [name=supersede]") == 0  # nothing waits that it could cancel
    page.fill(toRelease="2").ready("of release 2").fill(toRelease="1", reason="the old one")
    page.ready("1 node, disabled: edge-3").press("Undo release 3, back to release 1")
    page.see("Release 4 created", "#ask h2").see("edge-3", "#ask").press("Close")
    page.see("2 nodes succeeded", "main").see("Rollback of Release 3, the same as release 1", "main b")
    with world.store.database.transaction() as tx:
        assert json.loads(tx.value("SELECT payload FROM release_tasks WHERE id = 4"))["websites"] == [1]


@pytest.mark.slow
def test_what_the_daemon_plans_refuses_and_leaves_out_is_what_the_page_says(live):
    page, world = live(3)
    store = world.store
    store.nodes.add("edge-9", "10.9.9.9", agent_protocol="execute")
    page.draft(payload="{}").see("websites", "#plan .refused")
    page.fill(payload=PAYLOAD, reason="x").ready("Goes to 4 nodes in 2 batches, as version 1")
    page.see("1 node would be left without any site: edge-9", "#plan .notice")
    store.nodes.update(4, {"enabled": 0})
    page.fill(payload='{"websites": [ ]}', reason="first").ready("Goes to 3 nodes").send()
    eventually(lambda: page.address() == "#/releases/1")
    page.see("3 nodes succeeded", "main")
    world.agent(1).set(outcome="failed", message="no")
    new_release(store, payload={"websites": [2]})
    page.open("#/releases/2").see("1 node failed", "#failures").see("1 change against Release 1 (v1)", "#changes")
    world.agent(1).set(outcome="success", message="")
    new_release(store, payload={"websites": [3]})
    page.open("#/releases/3").see("3 nodes succeeded", "main")
    page.open("#/releases/2").press("Retry").see("release 3 (v3) succeeded later on", "#ask .refused")
    page.run("document.querySelector('[name=overNewer]').click()")
    page.ready("Sends the payload of release 2 to 3 nodes in 2 batches, as version 4")
    page.see("release 3 (v3) succeeded later on edge-1 and 2 more: replaces what release 3 brought", "#ask-plan .warn")
    page.press("Close")
    store.nodes.add("edge-10", "10.9.9.10")
    page.draft(payload='{"websites": [4]}', reason="x").ready("Goes to 4 nodes")
    page.see("1 node had no release yet: edge-10", "#effect")
    assert page.run("document.querySelector('#effect a').getAttribute('href')") == "#/releases/3"


@pytest.mark.slow
def test_enter_changes_nothing_in_any_dialog(page):
    store = page.daemon.store
    failed_release(store)
    new_release(store)
    for place, name, field in (("#/releases/1", "Retry", "reason"), ("#/releases/1", "Roll back", "reason"),
                               ("#/releases/2", "Pause", "reason"), ("#/releases/2", "Cancel", "reason"),
                               ("#/nodes", "Add a node", "mainIp"), ("#/nodes/1", "Edit", "name"),
                               ("#/health", "Freeze", "reason")):
        page.open(place).press(name).fill(**{field: "edge-9"}).enter(f"#ask [name={field}]", held=3).settle()
        assert page.count("dialog[open]") == 1, name
        page.press("Close")
    page.open("#/nodes/1").press("Maintenance")
    page.browser.key("Enter", "\r", held=3)  # whoever held it on the button before
    page.settle()
    assert [(path, body) for _, path, body in page.browser.changes if not body.get("dryRun")] == []
    assert store.releases.get(2).status == "pending"
    page.press("Maintenance").see("End maintenance", "main")


# -- who may, and what is known without contact ---------------------------------------------------------

@pytest.fixture
def tokens(tmp_path):
    """A function that writes the file of tokens: anna is an operator, vera a viewer; each one's name is the token."""
    def write(*names: str):
        file = tmp_path / "tokens"
        roles = {"anna": "operator", "vera": "viewer"}
        file.write_text("".join(f"{name}:{roles[name]}:{hashlib.sha256(name.encode()).hexdigest()}\n"
                                for name in names))
        file.chmod(0o600)
        return file
    return write


def signed_in(page: Page, token: str, name: str, place: str = "#/releases") -> Page:
    page.browser.open(page.daemon.url + place)
    page.see("Enter your API token", "#ask").fill(token=token).press("Sign in")
    return page.see(f"{name}, ", "#user").see(None)


@pytest.mark.slow
def test_a_viewers_tour_offers_nothing_that_a_viewer_can_not_do(new_page, sqlite_world, tokens):
    failed_release(sqlite_world.store)
    new_release(sqlite_world.store)
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url, API_TOKENS_FILE=tokens("anna", "vera"))))
    page.open("#/releases/1").see("Enter your API token", "#ask").see("Not signed in", "main h1")
    page.fill(token="wrong").enter("[name=token]")
    page.see("This token isn't valid: mistyped, or removed on the server.", "#ask").fill(token="vera")
    page.press("Sign in").see("failed", "main .chip").see("vera, viewer", "#user")
    assert page.run("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.see("Read only: your token is a viewer's.", "main")
    may_press = {"CSV", "Copy names", "UTC", "English", "中文", "Notify", "Beep", "Keys", "Sign out"}
    for place in ("#/releases", "#/releases/1", "#/releases/2", "#/nodes", "#/nodes?search=edge", "#/nodes/1",
                  "#/health"):
        page.run(f"location.hash = {place!r}")
        page.settle()
        pressable = set(page.run("[...document.querySelectorAll('button')].map(b => b.textContent)"))
        assert pressable <= may_press, place
        assert page.count("a[href^='#/new']") == 0, place
    page.run("location.hash = '#/new'")
    page.see("Read only: your token is a viewer's", "main")
    assert [answer for answer in page.browser.answers if answer[0] == 403] == []
    page.reload()
    page.see("vera, viewer", "#user").press("Sign out").see("You are signed out", "main h1")
    assert page.run("sessionStorage.length") == 0


@pytest.mark.slow
def test_what_is_on_its_way_when_somebody_signs_out_is_not_shown(new_page, sqlite_world, tokens):
    add_nodes(sqlite_world.store, 1)
    new_release(sqlite_world.store)
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url, API_TOKENS_FILE=tokens("anna"))))
    signed_in(page, "anna", "anna", "#/releases/1").see("pending", "main .chip")
    page.run("""{
        const ask = window.fetch, held = new Promise(then => { window.letGo = then; });
        window.fetch = async (path, ...of) => {
          const answer = await ask(path, ...of);
          if (!path.endsWith('v1/freeze')) return answer; // the last of the verdict
          window.isHeld = true;
          await held;
          return answer;
        };
      } null""")
    eventually(lambda: page.run("window.isHeld === true"))
    page.press("Sign out").see("You are signed out", "main h1")
    page.run("window.letGo()")
    page.settle()
    assert page.run("pulse") is None
    assert "pending" not in page.see("You are signed out", "main h1").text()


@pytest.mark.slow
def test_a_token_that_is_revoked_leaves_what_was_known_greyed_and_signing_in_goes_on(new_page, sqlite_world, tokens):
    failed_release(sqlite_world.store)
    new_release(sqlite_world.store)
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url, API_TOKENS_FILE=tokens("anna", "vera"))))
    signed_in(page, "anna", "anna", "#/releases/2").see("pending", "main .chip")
    tokens("vera")
    page.see("Your token has expired or was removed", "#trouble").see("showing", "#age").see("Release 2", "main h1")
    assert page.run("getComputedStyle(document.querySelector('main')).opacity") < "0.9"
    page.press("Pause").see("Sign in first", "#ask").press("Close")
    page.run("document.querySelector('#trouble button').click()")
    page.fill(token="vera").press("Sign in").see("vera, viewer", "#user").see("Read only", "main")
    assert page.text("#trouble") == ""


@pytest.mark.slow
def test_a_daemon_that_is_lost_and_comes_back_is_noticed_and_what_was_seen_stays(new_page, sqlite_world):
    add_nodes(sqlite_world.store, 2)
    new_release(sqlite_world.store)
    first = ServeProcess(sqlite_world.url)
    page = new_page(first).open("#/nodes").see("edge-1", "#row-1").open("#/nodes")
    page.run("location.hash = '#/health'")
    page.see("Executor", "main").run("location.hash = '#/releases/1'")
    page.see("pending", "main .chip").see("updated", "#age")
    first.stop()
    page.see("The daemon can't be reached. Retrying.", "#trouble").see("Connection lost", "#pulse")
    assert re.fullmatch(r"\d+ s ago, showing \d\d:\d\d:\d\d", page.text("#age"))
    assert "unknown" in page.run("document.querySelector('#pulse a').className")
    page.see("Release 1", "main h1")
    for place, words in (("#/nodes", "edge-1"), ("#/health", "reachable"), ("#/releases", "History"),
                         ("#/releases/1", "Batches")):
        page.run(f"location.hash = {place!r}")
        page.see(words, "main")
    page.press("Pause").see("The daemon can't be reached.", "#ask").press("Close")
    eventually(lambda: "bad" in page.run("document.querySelector('#pulse a').className"), 20)  # red after 10 s
    sqlite_world.store.releases.act("pause", 1, "test")
    second = ServeProcess(sqlite_world.url, first.port)
    try:
        page.see("paused", "main .chip")
        assert page.text("#trouble") == ""
        page.press("Resume").see("Goes on with what is left", "#ask")
    finally:
        second.stop()


# Each view, and what comes last into it.
VIEWS = {"#/releases": "Release 2", "#/releases/2": "created", "#/new": "Sends exactly this plan",
         "#/nodes?search=edge": "edge-3", "#/nodes/1": "Releases: 2", "#/health": "Process"}
# Of the buttons of a view those that change nothing but the view.
HARMLESS = {"CSV", "Copy names", "Load a file", "Fields", "JSON", "Discard the draft"}


def drawn(page: Page, place: str) -> set[str]:
    """Wait until a view is drawn, a new release with its plan; return the verbs that it offers."""
    if place == "#/new":
        page.fill(payload=PAYLOAD, reason="kept").ready()
    page.see(VIEWS[place], "main").run("window.isSame = true")
    return verbs_on(page)


def verbs_on(page: Page) -> set[str]:
    return set(page.run("[...document.querySelectorAll('main button:not([aria-disabled])')].map(b => b.textContent)")
               ) - HARMLESS


def standing(page: Page) -> list[Any]:
    """Return what a view tells and holds, but for times, the verdict, and whether one may send."""
    return page.run(r"""(() => { const main = document.querySelector('main').cloneNode(true);
        main.querySelectorAll('time, .verdict, #send').forEach(e => e.remove());
        const text = main.textContent.replace(/:\d+:[0-9a-f]{8}/, ''); // each executor has its own name
        return [text, ...[...document.querySelectorAll('main :is(input, textarea)')].map(e => e.value)];
        })()""")


def assert_greyed(page: Page, before: list[Any], why: str) -> None:
    """What was known stays, greyed, with its time; no verb can be used, and says why."""
    assert standing(page) == before
    assert re.search(r"ago, showing \d\d:\d\d:\d\d", page.text("#age"))
    assert page.run("getComputedStyle(document.querySelector('main')).opacity") < "0.9"
    assert verbs_on(page) == set()
    off = page.run("[...document.querySelectorAll('main button[aria-disabled]')].map(b => b.textContent)")
    for name in [name for name in off if page.address() != "#/new"]:
        page.press(name).see(why, "#ask").press("Close")
    if page.address() == "#/new":
        page.see(why, "#send").send().settle()
    assert [path for _, path, body in page.browser.changes if not body.get("dryRun")] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", VIEWS)
def test_without_its_daemon_each_view_stays_greyed_turns_red_and_goes_on_by_itself(new_page, sqlite_world, place):
    failed_release(sqlite_world.store)
    new_release(sqlite_world.store)
    first = ServeProcess(sqlite_world.url)
    page = new_page(first).open(place)
    verbs, before = drawn(page, place), standing(page)
    first.stop()
    page.see("Connection lost", "#pulse")
    assert "unknown" in page.run("document.querySelector('#pulse a').className")
    assert_greyed(page, before, "The daemon can't be reached.")
    page.run("lostAt -= 10000")  # 10 s later
    eventually(lambda: "bad" in page.run("document.querySelector('#pulse a').className"))
    second = ServeProcess(sqlite_world.url, first.port)
    try:
        page.see("updated", "#age")
        eventually(lambda: verbs_on(page) == verbs, message=lambda: f"{verbs_on(page)} in place of {verbs}")
        assert page.run("[document.body.className, document.querySelector('#trouble').hidden, window.isSame]") == [
            "", True, True]
        assert standing(page) == before
        page.run("sessionStorage.clear()")
    finally:
        second.stop()


@pytest.mark.slow
@pytest.mark.parametrize("place", VIEWS)
def test_without_its_token_each_view_stays_greyed_until_somebody_signs_in(new_page, sqlite_world, tokens, place):
    failed_release(sqlite_world.store)
    new_release(sqlite_world.store)
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url, API_TOKENS_FILE=tokens("anna"))))
    signed_in(page, "anna", "anna", place)
    verbs, before = drawn(page, place), standing(page)
    tokens("vera")
    page.see("Your token has expired or was removed: what is shown is from before.", "#trouble")
    assert_greyed(page, before, "Sign in first.")
    tokens("anna")
    page.run("document.querySelector('#trouble button').click()")
    page.fill(token="anna").press("Sign in").see("updated", "#age")
    eventually(lambda: verbs_on(page) == verbs, message=lambda: f"{verbs_on(page)} in place of {verbs}")
    assert page.run("[document.body.className, document.querySelector('#trouble').hidden, window.isSame]") == [
        "", True, True]
    assert standing(page) == before


@pytest.mark.slow
def test_an_error_of_a_view_is_that_views_and_no_loss_of_contact(page):
    page.open("#/nodes?drift=sideways").see("This can't be shown", "main h1").see("drift", "main")
    assert page.text("#trouble") == ""
    page.press("Releases").see("History", "main")


@pytest.mark.slow
def test_without_its_token_each_view_that_was_seen_is_still_shown_and_another_says_what_to_do(
        new_page, sqlite_world, tokens):
    failed_release(sqlite_world.store)
    new_release(sqlite_world.store)
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url, API_TOKENS_FILE=tokens("anna"))))
    seen = [place for place in VIEWS if place != "#/new"]
    signed_in(page, "anna", "anna", "#/new")
    for place in seen:
        page.run(f"location.hash = {place!r}")
        page.see(VIEWS[place], "main")
    tokens("vera")
    page.see("Your token has expired or was removed", "#trouble")
    for place in seen:
        page.run(f"location.hash = {place!r}")
        page.see(VIEWS[place], "main")
    page.run("location.hash = '#/releases/1'")
    page.see("Sign in first.", "main").run("location.hash = '#/nodes/2'")
    page.see("Sign in first.", "main")
    tokens("anna")
    page.run("document.querySelector('#trouble button').click()")
    page.fill(token="anna").press("Sign in").see("Releases: 2", "main")


@pytest.mark.slow
def test_a_plan_that_was_lost_with_the_daemon_comes_when_it_is_back(new_page, sqlite_world):
    failed_release(sqlite_world.store)
    new_release(sqlite_world.store)
    first = ServeProcess(sqlite_world.url)
    page = new_page(first).draft(payload="{}", reason="kept").ready()
    first.stop()
    page.see("Connection lost", "#pulse").fill(payload=PAYLOAD).see("The daemon can't be reached.", "#plan .refused")
    second = ServeProcess(sqlite_world.url, first.port)
    try:
        page.see("updated", "#age").ready("Goes to 3 nodes")
        page.run("sessionStorage.clear()")
    finally:
        second.stop()


@pytest.mark.slow
def test_the_releases_and_the_changes_of_a_node_are_saved_as_csv(page):
    failed_release(page.daemon.store)
    new_release(page.daemon.store)
    page.open("#/nodes/2").press("Disable").press("Disable").see("enabled: true → false", "main .timeline")
    name, rows = page.csv("main section:has(table)")
    assert (name, [f"try-{row['releaseId']}: {row['status']}" for row in rows]) == ("node-2-releases.csv", page.run(
        "[...document.querySelectorAll('main tbody tr')].map(row => `${row.id}: ${row.cells[1].innerText}`)"))
    assert [row["status"] for row in rows] == ["pending", "failed"]
    name, rows = page.csv("main section:has(.timeline)")
    assert (name, [row["action"] for row in rows]) == ("node-2-changes.csv", ["node.set", "node.add"])


# -- nodes and health -------------------------------------------------------------------------------------

@pytest.mark.slow
def test_nodes_are_added_edited_and_taken_out_and_their_page_tells_it(page):
    page.open("#/nodes").see("None yet", "main")
    page.press("Add a node").fill(name="edge-1", mainIp="bad address").press("Add")
    page.see("'bad address'", "#wrong-mainIp")
    page.fill(mainIp="10.0.0.7", labels="region=eu, region=us").press("Add")
    page.see("The label region is there twice", "#wrong-labels")
    page.fill(labels="region=eu, site=ams").press("Add").see("region=eu, site=ams", "#row-1").press("edge-1")
    page.see("10.0.0.7:8443", "main dl")
    page.press("Edit").fill(agentPort="9090", agentProtocol="execute").press("Save").see("10.0.0.7:9090", "main dl")
    page.press("Maintenance").see("what is missed counts as behind", "#ask").press("Maintenance")
    page.see("End maintenance", "main")
    page.press("Disable").see("Traffic is not touched", "#ask").press("Disable").see("disabled", "main")
    page.see("enabled: true → false", "main .timeline")
    node = page.daemon.store.nodes.get(1)
    assert (node.agent_port, node.status, node.enabled) == (9090, "maintenance", 0)


@pytest.mark.slow
def test_a_node_is_pinged_from_its_page_and_the_answer_stays(live):
    page, world = live(1)
    page.open("#/nodes/1").press("Ping").see("answers as a tasks agent", "#pinged").see("ok", "#pinged .chip.ok")
    page.see(" ago", "#pinged time").see("Ping", "main dl")
    assert page.run("document.querySelector('#said').textContent").startswith("Ping: ok answers as a tasks agent")
    world.agent(1).set(mode="refuse")
    page.run("""{ const ask = window.fetch; window.fetch = async (path, ...of) => {
        if (path.endsWith('/ping')) await new Promise(then => { window.goOn = then; });
        return ask(path, ...of); }; } null""")
    page.press("Ping").see("Asking...", "main").press("Asking...")
    find = "[...document.querySelectorAll('main button')].find(b => b.textContent === 'Asking...')"
    assert page.run(f"{find}.ariaDisabled") == "true"
    page.see("answers as a tasks agent", "#pinged").run("goOn()")
    page.see("unreachable", "#pinged .chip.failed").run("poll()")
    page.see("unreachable", "#pinged .chip.failed")
    page.press("中文").see("检测 agent", "main")
    eventually(lambda: page.count("#pinged") == 0)  # it was said in another language
    page.press("English").run("localStorage.clear()")
    assert [path for _, path, _ in page.browser.changes] == ["/api/v1/nodes/1/ping"] * 2


@pytest.mark.slow
def test_a_ping_that_this_process_can_not_do_says_why(page):
    add_nodes(page.daemon.store, 1)
    page.open("#/nodes/1").press("Ping").see("this process calls no agents", "#pinged .refused").run("poll()")
    page.see("this process calls no agents", "#pinged .refused").press("Ping")


@pytest.mark.slow
def test_nodes_are_searched_and_filtered_in_the_address_and_all_that_were_found_are_changed(page):
    store = page.daemon.store
    store.nodes.import_all([{"name": f"edge-{'ams' if n < 212 else 'fra'}-{n}", "main_ip": f"10.9.{n >> 8}.{n & 255}",
                             "labels": '{"pop":"x"}'} for n in range(300)])
    page.open("#/nodes").see("300 nodes", "main .bulk").see("page 1 of 6", "main")
    page.run("{ const f = document.querySelector('#search'); f.value = 'ams'; f.oninput({target: f}); }")
    page.see("212 nodes", "main .bulk")
    assert page.address() == "#/nodes?search=ams"
    page.press("Maintenance").see("edge-ams-0, edge-ams-1, ", "#ask").see("and 200 more", "#ask")
    page.press("Maintenance: 212 nodes")
    page.see("212 nodes changed", "#ask h2", 60)
    page.press("Close").see("maintenance", "#row-1")
    with store.database.transaction() as tx:
        assert tx.value("SELECT COUNT(*) FROM nodes WHERE status = 'maintenance'") == 212
    page.run("location.hash = '#/nodes?search=fra'")
    page.see("88 nodes", "main .bulk").press("New release for these").see("88 nodes picked", "main")


@pytest.mark.slow
def test_a_hundred_thousand_nodes_are_searched_and_walked_without_a_long_task(page):
    with page.daemon.store.database.transaction(write=True) as tx:
        tx.insert_many("INSERT INTO nodes (name, main_ip, labels) VALUES ", 3, [
            (f"edge-{'w' * 90 if n == 7 else ''}{n}", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", '{"pop":"ams"}')
            for n in range(1, 100_001)])
    page.browser.open(page.daemon.url + "#/nodes")
    page.see("100,000 nodes", "main .bulk", 90)
    page.run("""window.tasks = [];
        new PerformanceObserver(list => window.tasks.push(...list.getEntries().map(e => e.duration)))
            .observe({type: 'longtask'}); null""")
    page.run("window.scrollTo(0, 3000)")
    page.press("Next").see("edge-51", "#row-51", 60)
    page.run("{ const f = document.querySelector('#search'); f.value = 'edge-7777'; f.oninput({target: f}); }")
    page.see("edge-77771", "main tbody", 60)
    assert [ms for ms in page.run("window.tasks") if ms > 100] == []
    assert page.run("document.documentElement.scrollWidth") <= 1280


@pytest.mark.slow
def test_what_a_table_shows_is_saved_as_csv_without_a_formula_in_it(page):
    page.daemon.store.nodes.add("edge-1", "10.0.0.1", labels='{"a":"b"}')
    new_release(page.daemon.store, reason='=cmd|" /c calc"!A0')
    page.open().see("Release 1", "#release-1")
    page.run("""window.saved = []; URL.createObjectURL = blob => { window.saved.push(blob); return '#'; };
        HTMLAnchorElement.prototype.click = function () { window.saved.push(this.download); }; null""")
    page.run("[...document.querySelectorAll('button')].find(b => b.textContent === 'CSV').click()")
    assert page.run("window.saved[1]") == "queue.csv"
    assert '"\'=cmd|"" /c calc""!A0"' in page.run("window.saved[0].text()")


@pytest.mark.slow
def test_a_file_has_what_its_table_shows_row_by_row_in_the_same_order(page):
    store = page.daemon.store
    night_shift(store, 40)
    for number in (2, 3):
        new_release(store, reason=f"site {number}", node_ids=[1, 2])
    texts = "[...document.querySelectorAll('main %s')].map(e => e.innerText)"
    page.open("#/releases?search=site").see("Release 3", "#release-3").see("Release 3", "#queue-3")
    name, rows = page.csv("#queue")
    assert (name, [row["reason"] for row in rows]) == ("queue.csv", page.run(texts % "#queue td:nth-child(4)"))
    name, rows = page.csv("main section:last-of-type")
    assert (name, [(row["id"], row["status"]) for row in rows]) == (
        "releases.csv", [(str(id), "pending") for id in page.run(ROWS)])
    assert len(rows) == 2  # of three

    page.open("#/nodes?search=edge-1&sort=-name").see("edge-19", "#row-19")
    name, rows = page.csv(".bulk")
    assert (name, [row["name"] for row in rows]) == ("nodes.csv", page.run(texts % "tbody td:first-child > a"))
    assert [row["name"] for row in rows][:2] == ["edge-19", "edge-18"]

    page.open("#/releases/1").see("37 nodes failed", "#failures")
    name, rows = page.csv("#failures")
    assert name == "failures-1.csv"
    assert [sum(row["errorKind"] == kind for row in rows) for kind in page.run(texts % "#failures td .chip")] == [
        24, 8, 5]
    page.run("[...document.querySelectorAll('main .lane summary')].forEach(s => s.parentNode.open || s.click())")
    eventually(lambda: page.count(".cell") == 40)
    name, rows = page.csv("main section:has(.lane)")
    assert name == "release-1.csv"
    assert [f"{row['nodeName']}: {row['status']}" for row in rows] == page.run(
        "[...document.querySelectorAll('.cell')].map(cell => cell.getAttribute('aria-label'))")


@pytest.mark.slow
def test_the_names_of_a_cause_are_copied_all_of_them_and_of_it_alone(page):
    night_shift(page.daemon.store, 40)
    page.browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.open("#/releases/1").see("Copy names", "#cause-2")
    for cause, names in ((0, range(1, 25)), (1, range(25, 33)), (2, range(33, 38))):
        page.run(f"[...document.querySelectorAll('#cause-{cause} button')].find(b => b.textContent === 'Copy names')"
                 ".click()")
        wanted = "\n".join(f"edge-{n}" for n in names)
        eventually(lambda: page.run("navigator.clipboard.readText()") == wanted, message=wanted)  # noqa: B023


@pytest.mark.slow
def test_nodes_are_sorted_and_filtered_by_drift_through_the_address(page):
    store = page.daemon.store
    looks_for_work(store)
    add_nodes(store, 6)
    good(store, "A")
    for node in (5, 6):
        store.nodes.update(node, {"status": "maintenance"})
    settle(store, new_release(store, payload={"content": "B"}), *["success"] * 4)
    ended(store, "C", "success", "success", "failed", "skipped")
    rows = "[...document.querySelectorAll('main tbody tr')].map(row => row.id)"
    current = "[...document.querySelectorAll('.filters [aria-current]')].map(a => a.innerText)"
    page.open("#/nodes").see("edge-1", "#row-1")
    titles = page.run("[...document.querySelectorAll('main .filters a')].map(a => a.title.slice(0, 27))")
    assert titles == ["", "They run an older payload t", "They run a release that did", "It is not known what they r",
                      "No release goes there until", "", "Gets no release, and is not"]
    page.open().press("Show them").see("They run", "main")
    assert re.fullmatch("#/nodes.drift=(behind|ahead)", page.address())
    page.open("#/nodes?drift=behind&sort=-name").see("They run an older payload than they should", "main")
    page.see("edge-5", "#row-5")
    assert (page.run(rows), page.run(current)) == (["row-6", "row-5"], ["behind 2"])
    page.press("ahead 2").see("They run a release that did not end well", "main").see("edge-1", "#row-1")
    assert (page.run(rows), page.run(current)) == (["row-2", "row-1"], ["ahead 2"])
    page.press("Node ↓").see("Node ↑", "thead").see("edge-1", "#row-1")
    eventually(lambda: page.run(rows) == ["row-1", "row-2"])
    assert page.address() == "#/nodes?drift=ahead&sort=name"
    page.press("unknown").see("Nothing was found", "main").press("all").press("Runs").see("Runs ↑", "thead")
    eventually(lambda: page.run(rows) == ["row-5", "row-6", "row-3", "row-4", "row-1", "row-2"])
    assert page.address() == "#/nodes?sort=runs"
    page.run("history.back()")
    page.see("Node ↑", "thead").open("#/nodes?sort=drift").see("edge-3", "#row-3")
    assert set(page.run(rows)[4:]) == {"row-3", "row-4"}  # those that run what they should come last
    page.open("#/nodes?state=disabled&label=pop%3Dams").see("Nothing was found", "main").see("pop=ams", "main")
    page.see("Gets no release", "main").press("Show all").see("edge-3", "#row-3")
    assert page.address() == "#/nodes"


@pytest.mark.slow
def test_a_tab_beeps_and_notifies_of_a_new_problem_only_where_that_was_switched_on(live):
    page, _ = live(1)
    page.open().see("All is well", "#pulse")
    page.run("""window.told = []; window.AudioContext = function () { window.told.push('audio'); return {currentTime: 0,
        createOscillator: () => ({frequency: {}, connect: to => to, start() {}, stop() {}}),
        createGain: () => ({gain: {}, connect() {}})}; };
        window.Notification = function (name, {body}) { window.told.push(body); };
        Notification.requestPermission = async () => 'granted'; null""")
    page.daemon.store.releases.set_freeze(True, "anna", "first")
    page.see("Frozen", "#pulse")
    page.daemon.store.releases.set_freeze(False, "anna", "")
    page.see("All is well", "#pulse")
    assert page.run("window.told") == []
    page.press("Notify").press("Beep")  # each is tried at once
    eventually(lambda: page.run("window.told") == ["All is well | Releases", "audio"],
               message=lambda: page.run("window.told"))
    states = ("[...document.querySelectorAll('#foot button[title]')].map(b => "
              "[b.textContent, b.title, b.ariaPressed, b.querySelector('.mark').className])")
    tells = "Tells of each new problem while this tab is open"
    assert page.run(states) == [["Notify", tells, "true", "mark ok"], ["Beep", tells, "true", "mark ok"]]
    page.daemon.store.releases.set_freeze(True, "anna", "again")
    page.see("Frozen", "#pulse")
    eventually(lambda: page.run("window.told.at(-1)") == "Frozen: nothing is dispatched")
    assert page.run("sessionStorage.length") == 2
    page.press("Notify").press("Beep")


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
    for words in ("Last tick", "writable", "CONTROL_CERT", "days left", "expires in", "not frozen", rc.__version__):
        page.see(words, "main")
    page.press("Freeze").fill(reason="the match", target="dns", until="2126-01-02T03:04").press("Freeze")
    page.see("no release has the target dns", "#ask .notice").press("Close").see("until 2 Jan 2126 03:04:00", "main")
    page.press("Lift the freeze...").see("Lift the freeze of dns?", "#ask").press("Lift the freeze")
    page.see("not frozen", "main")
    world.agent(1).set(mode="normal")
    page.see("Held by the process that works on the release.\nNone yet", ".tiles")


@pytest.mark.slow
@pytest.mark.parametrize(("last_at", "words"), [("2026-01-02T03:04:05.000Z", "Last tick on host-a: 2 Jan "),
                                                (None, "Last tick on host-a: None yet")])
def test_an_executor_that_is_stalled_is_told_with_its_host_and_where_to_look(
        new_page, sqlite_world, last_at, words):
    api = rc.Api(sqlite_world.store, rc.Metrics(), process=lambda: {"certificates": [], "executor": {
        "enabled": True, "owner": "host-a:1:9f3a61c0", "lastLookAt": last_at}})
    api.started_at -= 600
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url), api=api)).open()
    page.see("Executor stalled", "#pulse").see(words, "main .verdict")
    page.see("on host-a", "main .verdict").see("journalctl -u releasectl -n 50", "main .verdict")


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
    assert page.count("main .problems > li") == 2
    assert "ba1b23" in page.run("document.querySelector('link[rel=icon]').href")


def good_then_failed(store: rc.Store, before: str = "A", brought: str = "B") -> None:
    """Make two nodes, release 1 that is good, and release 2 that failed on the second of them."""
    add_nodes(store, 2)
    good(store, before)
    ended(store, brought, "success", "failed")


def buttons(page: Page, where: str) -> list[list[str]]:
    """Return the words and the class of each button in a part of the page."""
    return page.run(f"[...document.querySelectorAll('{where} button')].map(b => [b.textContent, b.className])")


def verdict_buttons(page: Page) -> list[list[str]]:
    return buttons(page, ".verdict")


ACTIONS = "main [role=group][aria-label=Actions]"


BACK, RETRY = "Roll back to what ran before", "Retry failed and skipped nodes"


@pytest.mark.slow
def test_a_failure_is_rolled_back_from_the_verdict_which_then_says_so_and_so_does_the_failed_release(page):
    store = page.daemon.store
    looks_for_work(store)
    good_then_failed(store)
    page.open().see("releasectl retry 2 --plan", "main .problems").see("releasectl rollback 2 --plan", "main .problems")
    page.see(" ago", ".problems li:first-child div")
    assert verdict_buttons(page) == [[BACK, "main"], [RETRY, ""]]
    page.press(BACK).ready("Sends the payload of release 1 to 2 nodes")
    page.press("Undo release 2, back to release 1")
    eventually(lambda: page.address() == "#/releases/3")
    sql(store, "UPDATE release_tasks SET status = 'running', started_at = created_at WHERE id = 3")
    page.open().see("Release 2 is being rolled back", "main .verdict.busy h1").see("Rollback of Release 2", "#active-3")
    assert page.run("document.title") == "Release 2 is being rolled back | Releases"
    settle(store, store.releases.get(3), "success", "success")
    page.open().see("rolled back by release 3", "#release-2")
    page.open("#/releases/2").see("rolled back by release 3", "main")
    page.see("rolled back by Release 3", "main .chip.success")
    page.open("#/releases/3").see("1 change against Release 2 (v2)", "#changes")


@pytest.mark.slow
def test_what_is_wrong_beside_the_release_that_is_being_rolled_back_stays_red(page):
    store = page.daemon.store
    looks_for_work(store)
    good_then_failed(store)
    sql(store, "UPDATE release_tasks SET target = 'dns' WHERE id = 2")
    ended(store, "C", "success", "failed")
    store.releases.rollback(3, rc.Act("anna", rc.VIA_API), rc.Again("back"), None)
    sql(store, "UPDATE release_tasks SET status = 'running', started_at = created_at WHERE id = 4")
    page.open().see("release 2 (v2) of dns ended failed", "main .verdict.bad")


UNDERLINED = "[...document.querySelectorAll('#changes u')].map(u => u.textContent)"


@pytest.mark.parametrize(("before", "brought", "underlined"), [
    ("a", "aa", ["", "a"]), ("abc", "axc", ["b", "x"]), ("a\U0001f600b", "a\U0001fa00b", ["\U0001f600", "\U0001fa00"]),
    ("y" * 600, "x" + "y" * 600, ["", "x"]), ("z" * 300 + "0" + "y" * 300, "z" * 300 + "O" + "y" * 300, ["0", "O"]),
    ("a" * 600, "b" * 600, ["a" * 199, "b" * 199])])
def test_of_a_value_what_differs_is_underlined_and_a_long_one_is_cut_around_it(page, before, brought, underlined):
    good_then_failed(page.daemon.store, before, brought)
    page.open("#/releases/2").see("1 change against Release 1", "#changes")
    assert page.run(UNDERLINED) == underlined
    lines = page.text("#changes pre").split("\n")
    assert max(map(len, lines)) <= 210
    assert lines[-1].endswith("…") == (len(brought) > 200)


@pytest.mark.slow
def test_on_a_failed_release_the_way_back_comes_first_and_a_value_is_underlined_where_it_differs(page):
    store = page.daemon.store
    good_then_failed(store, "10.20.0.2:8080", "10.20.0.2:808O")
    page.open("#/releases/2").see("10.20.0.2:808O", "#changes")
    assert page.run(UNDERLINED) == ["0", "O"]
    assert buttons(page, ACTIONS) == [["Roll back", "main"], ["Retry", ""]]


@pytest.mark.slow
def test_the_browsers_back_leaves_no_dialog_behind(page):
    rolled_back(page.daemon.store)
    page.open("#/releases").see("Release 3", "#release-3 a")
    page.run("location.hash = '#/releases/3'")
    page.see("2 nodes failed", "#failures").press("Retry").see("Retry release 3?", "#ask")
    page.run("history.back()")
    page.see("History", "main")
    assert page.count("dialog[open]") == 0


@pytest.mark.slow
def test_j_walks_from_release_to_release_also_where_a_row_names_another(page):
    rolled_back(page.daemon.store)
    page.daemon.store.releases.rollback(3, rc.Act("anna", rc.VIA_API), rc.Again("back"), None)
    settle(page.daemon.store, page.daemon.store.releases.get(4), *["success"] * 4)
    page.open("#/releases").see("Rollback of", "#release-4")
    walked = []
    for _ in range(4):
        page.browser.key("j", "j")
        walked.append(page.run("document.activeElement.textContent"))
    assert walked == ["Release 4", "Release 3", "Release 2", "Release 1"]


@pytest.mark.slow
def test_the_nodes_of_a_small_batch_have_their_names_and_a_large_one_is_squares(page):
    store = page.daemon.store
    store.nodes.import_all([{"name": f"edge-{n}", "main_ip": f"10.0.0.{n}"} for n in range(1, 46)], "anna", False)
    new_release(store, strategy={"batches": [4, 41]})
    page.open("#/releases/1")
    eventually(lambda: page.count(".cell") == 45)
    assert page.run("[...document.querySelectorAll('#batch-1 .cell')].map(cell => cell.innerText)") == [
        f"edge-{n}" for n in range(1, 5)]
    assert page.run("[...document.querySelectorAll('#batch-2 .cell')].map(cell => cell.innerText).join('')") == ""


@pytest.mark.slow
def test_nodes_that_were_picked_stay_picked_when_a_payload_comes_from_a_release(page):
    add_nodes(page.daemon.store, 2)
    good(page.daemon.store, "A")
    page.open("#/nodes?search=edge-2").see("1 node", ".bulk").press("New release for these")
    page.see("1 node picked", "main")
    page.fill(reason="for edge-2 alone").open("#/new?from=1").see("from release 1", "#wrong-payload")
    page.see("1 node picked", "main").ready("1 node")
    assert page.run("document.querySelector('[name=reason]').value") == "for edge-2 alone"


@pytest.mark.slow
def test_the_way_back_comes_first_only_where_a_release_failed_that_was_no_way_back_itself(page):
    store = page.daemon.store
    looks_for_work(store)
    add_nodes(store, 2)
    good(store, "A")
    ended(store, "B", "success", "success")
    bad = ended(store, "C", "success", "failed")
    page.open().see("Release 3 failed", "main h1")
    assert verdict_buttons(page) == [[BACK, "main"], [RETRY, ""]]
    sql(store, "UPDATE release_tasks SET status = 'partial' WHERE id = 3")
    page.reload().see("Nodes are behind", "main h1").see(RETRY, ".verdict")
    assert verdict_buttons(page)[:2] == [[RETRY, ""], [BACK, ""]]
    assert page.run("[...document.querySelectorAll('.verdict .mend .mono')].map(e => e.innerText)")[-2:] == [
        "releasectl retry 3 --plan", "releasectl rollback 3 --plan"]
    sql(store, "UPDATE release_tasks SET status = 'failed' WHERE id = 3")
    good(store, "A", target="dns")
    ended(store, "D", "success", "failed", target="dns")
    page.reload().see("release 3 (v3)", ".verdict").see("release 5 (v5)", ".verdict")
    eventually(lambda: len(verdict_buttons(page)) >= 3)
    assert [kind for _, kind in verdict_buttons(page)].count("main") == 1
    sql(store, "UPDATE release_tasks SET status = CASE id WHEN 5 THEN 'success' ELSE 'partial' END WHERE id IN (3, 5)")
    settle(store, store.releases.rollback(bad.id, "anna").release, "failed", "failed")
    page.reload().see("Release 6 failed", "main h1")
    assert "main" not in [kind for _, kind in verdict_buttons(page)]
    page.run("""{ const ask = window.fetch; window.fetch = async (path, ...of) => path.includes('releases?page=1')
        ? new Response('{"code": 0, "message": "", "data": {"items": [], "total": 0}}') : ask(path, ...of); } null""")
    page.run("poll()")  # also where it is none of the newest
    assert "main" not in [kind for _, kind in verdict_buttons(page)]


@pytest.mark.slow
def test_what_a_rollback_brought_is_told_by_a_good_release_of_its_target(page):
    store = page.daemon.store
    add_nodes(store, 2)
    good(store, "A")
    good(store, "A", target="dns")
    bad = ended(store, "B", "success", "failed")
    settle(store, store.releases.rollback(bad.id, "anna").release, "success", "success")
    page.open("#/releases/4").see("Rollback of Release 3, the same as release 1", "main b")


@pytest.mark.slow
def test_the_plan_of_a_rollback_says_what_already_has_its_payload_and_why_the_last_batch_may_fail(page):
    store = page.daemon.store
    add_nodes(store, 4)
    good(store, "A")
    ended(store, "B", "success", "failed", "failed", "skipped")
    page.open("#/releases/2").press("Roll back").ready("Sends the payload of release 1 to 3 nodes in 2 batches")
    page.see("Nodes that had failed before are the last batch, and may fail again.", "#ask-plan p.small")
    page.press("Close").open("#/releases/2?node=4")
    page.see("Nothing was sent to it: ", "#node").see(store.releases.get(2).status_reason, "#node p")
    with store.database.transaction(write=True) as tx:
        rc.add_events(tx, tx.now(), "host-a:1", [rc.NewEvent(2, "finished", "running", "failed", "as it had ended")])
    page.reload().see("Nothing was sent to it: as it had ended", "#node p")
    sql(store, "UPDATE release_tasks SET status = 'cancelled' WHERE id = 2")
    page.reload().see("Nothing was sent to it: cancelled", "#node p")
    with store.database.transaction(write=True) as tx:
        rc.add_events(tx, tx.now(), "anna", [rc.NewEvent(2, "cancelling", "running", "cancelling", "the wrong file")])
    page.reload().see("Nothing was sent to it: cancelled by anna: the wrong file", "#node p")
    page.press("Close").press("中文").see("批次", "main")
    page.open("#/releases").see("1/4 完成，2 失败，1 已跳过", "#release-2 td:nth-child(3) .number")
    page.see("版本 2，cdn", "#release-2")
    assert page.run("document.querySelector('#release-2 .bar').ariaLabel") == "发布 2 的节点：2 失败、1 成功、1 已跳过"
    page.press("English").see("1 of 4 done, 2 failed, 1 skipped", "#release-2 td:nth-child(3) .number")
    page.run("localStorage.clear()")


@pytest.mark.slow
def test_a_draft_from_a_release_that_failed_says_so_and_offers_what_runs_now(page):
    store = page.daemon.store
    good_then_failed(store)
    page.open("#/new?from=2").see("Starts from the payload of release 2 (failed).", "#was")
    page.press("Start from the last success (release 1)").see("from release 1", "#wrong-payload")
    assert page.count("#was") == 0
    assert page.address() == "#/new"  # so nothing asks whether release 2 should replace it
    page.run("document.querySelector('[name=who][value=picked]').click()")
    page.fill(reason="for release 1").open("#/new?from=2").press("Replace it with release 2")
    page.see("Starts from the payload of release 2", "#was")
    fields = "[...document.querySelectorAll('[name=reason], [name=who]:checked')].map(e => e.value)"
    assert page.run(fields) == ["", "all"]
    page.press("Start from the last success (release 1)").see("from release 1", "#wrong-payload")
    assert '"A"' in page.run("document.querySelector('#field-payload').value")
    good(store, "A")
    page.open("#/new?from=3").press("Replace it with release 3")
    page.see("changes nothing: all its nodes run this payload already", "#plan .notice")
    # of the same release, too: another reason, strategy or choice of nodes may be in it
    page.fill(reason="mine").open("#/new?from=3").see("There is a draft that was not sent.", "main")
    page.press("Discard the draft").see("Discard the draft?", "#ask").press("Discard the draft")
    page.see("Write the payload, or load a file", "#plan").run("poll()")
    assert page.run("document.querySelector('#field-payload').value") == ""
    assert page.address() == "#/new"
    page.press("JSON").fill(strategy='{"batches": [1]}')  # a draft without a payload is one as well
    page.open("#/new?from=1").see("There is a draft that was not sent.", "main")


@pytest.mark.slow
def test_what_is_wrong_with_a_strategy_is_said_in_chinese_and_what_people_wrote_stays(page):
    store = page.daemon.store
    add_nodes(store, 3)
    new_release(store, reason="weekly", strategy={"batches": [1, 1]})
    page.open()
    page.run("localStorage.setItem('releasectl-language', 'zh')")
    try:
        page.open("#/releases/1").see("weekly；批次大小 1、1、1", "#timeline")
        page.open("#/new").fill(payload=PAYLOAD, **{"strategy.maxFailed": "5x"})
        page.see('每批最多失败数："5x" 须为 0 到 1000000 的整数', "#plan")
    finally:
        page.run("localStorage.clear()")


# -- rows, agents and browsers that are not as they should be --------------------------------------

@pytest.mark.slow
def test_what_an_agent_says_of_a_time_is_text_and_no_countdown(live):
    page, world = live(2)
    world.agent(1).set(outcome="failed", message="disk is full, about 9999999999 h left")
    new_release(world.store)
    page.open("#/releases/1").see("about 9999999999 h left", "main").see("1 node failed", "#failures")
    assert page.count("main [data-live=about]") == 0


@pytest.mark.slow
def test_a_time_that_is_none_is_shown_as_it_was_written(page):
    store = page.daemon.store
    add_nodes(store, 1)
    new_release(store)
    sql(store, "UPDATE release_tasks SET status = 'paused', started_at = 'soon'")
    page.open().see("soon", "#active-1")
    page.open("#/releases/1").see("soon", "main")
    for _ in range(2):
        settle(store, new_release(store), "success")
    sql(store, "UPDATE release_tasks SET status = 'success', finished_at = updated_at WHERE id = 1")
    page.open().see("took 0 s", "#release-1")
    heights = page.run("[...document.querySelectorAll('.strip .tall')].map(bar => bar.style.height)")
    assert [height.endswith("%") for height in heights] == [True] * 3
    assert page.run("said('at 25:61:00Z we go on').join('')") == "at 25:61:00Z we go on"


@pytest.mark.slow
def test_a_draw_that_fails_says_so_and_what_comes_later_is_drawn(page):
    page.open().see("None yet", "main")
    page.run("window.reportError = error => { window.reported = error.message; };"
             "window.asBefore = view.draw; view.draw = () => { throw new Error('drawn wrongly'); }; null")
    page.see("drawn wrongly", "main")
    assert page.run("window.reported") == "drawn wrongly"
    page.run("view.draw = window.asBefore; null")
    page.see("None yet", "main")


@pytest.mark.slow
def test_a_browser_that_lets_no_page_notify_goes_on_without(live):
    page, _ = live(1)
    page.open().see("All is well", "#pulse")
    page.run("window.Notification = function () { throw new TypeError('Illegal constructor'); };"
             "Notification.requestPermission = async () => 'granted'; null")
    page.press("Notify").see("The browser forbids it", "#ask").press("Close")
    state = "(b => [b.ariaPressed, b.querySelector('.mark').className])(document.querySelector('#foot button[title]'))"
    assert page.run(state) == ["false", "mark disabled"]
    assert page.run("sessionStorage.length") == 0
    page.daemon.store.releases.set_freeze(True, "anna", "first")
    page.see("Frozen", "#pulse")
    page.daemon.store.releases.set_freeze(False, "anna", "")
    page.see("All is well", "#pulse")


@pytest.mark.slow
def test_a_browser_that_keeps_nothing_shows_the_page(page):
    gone = page.browser.call("Page.addScriptToEvaluateOnNewDocument", source="""
        for (const name of ['localStorage', 'sessionStorage'])
            Object.defineProperty(window, name, {get() { throw new DOMException('denied', 'SecurityError'); }});""")
    try:
        page.daemon.store.nodes.import_all([{"name": f"edge-{n}", "main_ip": f"10.9.0.{n}"} for n in range(1, 4)])
        page.open().see("None yet", "main").press("中文").see("没有执行器", "main").press("English")
        page.open("#/nodes?search=edge-2").press("New release for these").see("edge-2", "main")
        page.fill(reason="written", payload=PAYLOAD).ready("Goes to 1 node").press("中文").see("新建发布", "main h1")
        assert page.run("document.querySelector('[name=reason]').value") == "written"
    finally:
        page.browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=gone["identifier"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ['{"startAt": "tomorrow"}', '{"verify": null}', '{"maxParallelPer": null}', "[]"])
def test_a_strategy_that_no_field_can_hold_stays_json(page, strategy):
    add_nodes(page.daemon.store, 1)
    page.draft(payload=PAYLOAD, reason="x").press("JSON").fill(strategy=strategy).press("Fields")
    for _ in range(2):
        eventually(lambda: page.run("(document.querySelector('#field-strategy') || {}).value") == strategy)
        eventually(lambda: page.count("#plan [role=alert]") == 1)
        page.reload()
    page.press("JSON").fill(strategy="{}").ready("Goes to 1 node")


@pytest.mark.slow
@pytest.mark.parametrize(("text", "mistake"), [
    ('{"a": "x\x01y"}', "line 1, column 7"), ('{"a":\u00a0[]}', "line 1, column 6"),
    ('{"a":\n\u3000[]}', "line 2, column 1"), ('{"a": 1}\u2028', "line 1, column 9"),
    ('{"a": 1, "\\u0061": 2}', "twice"), ('{"a": "\x7f\u00a0"}', "")])
def test_what_is_no_json_is_told_with_its_place(page, text, mistake):
    page.open("#/new")
    told = page.run(f"(jsonMistake({json.dumps(text)}) || {{text: ''}}).text")
    assert mistake in told
    assert bool(told) == bool(mistake), told
    try:
        json.loads(text, object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else 1 / 0)
        is_json = True
    except (ValueError, ZeroDivisionError):
        is_json = False
    assert is_json == (told == ""), "what Python says of it"


@pytest.mark.slow
def test_each_cause_is_retried_with_just_its_nodes_and_so_are_the_others(page):
    store = page.daemon.store
    store.nodes.import_all([{"name": f"edge-{n}", "main_ip": f"10.9.0.{n}"} for n in range(1, 61)])
    new_release(store, strategy={"maxFailed": 60})
    with store.database.transaction(write=True) as tx:
        for n in range(1, 61):
            own = hashlib.sha256(str(n).encode()).hexdigest()[:6]
            text = f"job {own}0 failed" if n < 31 else f"cause {'x' * (n % 11)}"
            tx.execute("UPDATE release_task_nodes SET status = 'failed', error_kind = 'agent_failed', error_msg = ? "
                       "WHERE node_id = ?", text, n)
        tx.execute(f"UPDATE release_tasks SET status = 'failed', finished_at = created_at, started_at = created_at, "
                   f"{rc.COUNTERS}")
    page.open("#/releases/1").see("job N failed", "#cause-0").see("2 other causes", "#failures")
    for _ in range(2):
        page.run("poll()")  # which reads a summary, as nothing has changed
    for place, few in ((0, range(1, 31)), (rc.MAX_GROUPS, None)):
        page.run(f"[...document.querySelectorAll('#cause-{place} button')]"
                 ".find(b => b.textContent === 'Retry these').click()")
        page.ready("Sends the payload of release 1 to")
        sent = page.browser.changes[-1][2]["nodeIds"]
        groups = page.daemon.store.releases.whole(1)[2]
        assert sent == list(groups[place].ids)
        assert few is None or sent == list(few)
        page.see(f"for {len(sent)} nodes that failed", "#ask").press("Close")


@pytest.mark.slow
def test_the_queue_has_the_places_of_each_target_and_what_goes_first_is_first(page):
    store = page.daemon.store
    looks_for_work(store)
    add_nodes(store, 1)
    for target in ("cdn", "dns", "cdn", "dns"):
        new_release(store, target=target)
    new_release(store, target="dns", goes_first=True)
    page.open().see("Release 5", "#queue")
    rows = "[...document.querySelectorAll('#queue tbody tr')].map(row => [row.id, row.cells[0].innerText])"
    assert page.run(rows) == [
        ["queue-1", "1"], ["queue-3", "2"], ["queue-5", "1"], ["queue-2", "2"], ["queue-4", "3"]]


@pytest.mark.slow
def test_an_answer_that_was_lost_and_another_language_make_no_second_release(page):
    add_nodes(page.daemon.store, 1)
    page.draft(payload=PAYLOAD, reason="once").ready()
    page.run("""window.asDaemon = window.fetch; window.fetch = async (path, options) => {
        const answer = await window.asDaemon(path, options);
        if (options.method !== 'POST' || options.body.includes('dryRun')) return answer;
        window.fetch = window.asDaemon;
        throw new TypeError('lost'); }; null""")
    try:
        page.send().see("can't be reached", "#send").press("中文").see("新建发布", "main h1").ready().send()
        eventually(lambda: page.address() == "#/releases/1")
        assert page.daemon.store.releases.page().total == 1
    finally:
        page.run("localStorage.clear()")


@pytest.mark.slow
def test_without_contact_another_language_leaves_what_was_seen(new_page, sqlite_world):
    add_nodes(sqlite_world.store, 1)
    new_release(sqlite_world.store, reason="weekly")
    daemon = ServeProcess(sqlite_world.url)
    page = new_page(daemon)
    page.open("#/releases/1").see("weekly", "main")
    daemon.stop()
    page.see("Retrying", "#trouble", 40.0)
    try:
        page.press("中文").see("原因", "main").see("weekly", "main")
    finally:
        page.run("localStorage.clear()")


@pytest.mark.slow
@pytest.mark.parametrize("answer", ['{"code": 502, "msg": "bad gateway"}', '{"error": "x"}', "null", "<html>"])
def test_what_a_proxy_answers_is_no_contact_and_ends_nothing(page, answer):
    page.open().see("None yet", "main")
    page.run("window.asDaemon = window.fetch; window.fetch = async () => "
             f"new Response({json.dumps(answer)}, {{status: 502}}); poll()")
    page.see("can't be reached", "#trouble").see("Connection lost", "#pulse")
    page.run("pulse = null; known.clear(); view.isLoaded = false; poll()")  # as at the first visit
    page.run("window.fetch = window.asDaemon; null")
    page.see("None yet", "main").see("updated", "#pulse")


@pytest.mark.slow
def test_another_language_is_that_of_all_that_was_read_before(page):
    store = page.daemon.store
    add_nodes(store, 1)
    settle(store, new_release(store), "success")
    with store.database.transaction(write=True) as tx:
        rc.add_events(tx, store.state.now(), "test", [
            rc.NewEvent(1, "finished", "running", "success", "1 of 1 nodes updated")])
    page.open("#/releases/1").see("1 of 1 nodes updated", "#timeline")
    try:
        page.press("中文").see("1 个节点中已更新 1 个", "#timeline")
        assert "updated" not in page.text("#timeline")
    finally:
        page.run("localStorage.clear()")


@pytest.mark.slow
def test_a_freeze_says_how_many_releases_it_would_hold(page):
    store = page.daemon.store
    looks_for_work(store)
    page.open("#/health").press("Freeze").fill(target="cdn")
    assert page.text("#wrong-target") == ""  # there is no release to compare it with
    add_nodes(store, 1)
    for target in ("cdn", "cdn", "dns"):
        new_release(store, target=target)
    page.open("#/health").press("Freeze").see("3 releases would wait", "#wrong-target")
    page.fill(target="cdn").see("2 releases would wait", "#wrong-target")
    page.fill(target="nds").see("None of the newest releases has this target: they have", "#wrong-target")
    page.fill(reason="r", target="x" * 200).press("Freeze").see("must be", "#wrong-target.refused").fill(target="cdn")
    page.see("2 releases would wait", "#wrong-target:not(.refused)")
    assert page.count("#ask [aria-invalid]") == 0


@pytest.mark.slow
def test_a_rollback_of_an_old_release_offers_the_ten_good_ones_before_it(page):
    store = page.daemon.store
    add_nodes(store, 1)
    for number in range(1, 49):
        settle(store, new_release(store, payload={"websites": [number]}), "success")
    for release, offered in ((12, range(11, 1, -1)), (3, (2, 1))):
        page.open(f"#/releases/{release}").press("Roll back")
        eventually(lambda: page.count("#ask [name=toRelease] option") > 1)
        assert page.run("[...document.querySelectorAll('[name=toRelease] option')].map(o => o.value)") == [
            "", *map(str, offered)]


@pytest.mark.slow
def test_a_reason_with_an_hour_in_it_stays_as_it_was_written(page):
    store = page.daemon.store
    add_nodes(store, 1)
    new_release(store)
    store.releases.act("pause", 1, "anna", "wait for the 12Z")
    page.open("#/releases/1").see("wait for the 12Z", "#timeline")


@pytest.mark.slow
def test_a_token_for_some_targets_is_offered_the_verbs_of_these(new_page, sqlite_world, tokens):
    store, file = sqlite_world.store, tokens("anna")
    file.write_text(f"{file.read_text().strip()}:targets=dns\n")
    add_nodes(store, 1)
    for target in ("cdn", "dns"):
        new_release(store, target=target)
    page = new_page(Daemon(store, settings_for(sqlite_world.url, API_TOKENS_FILE=file)))
    signed_in(page, "anna", "anna", "#/releases/2").see("Pause", "main")
    page.run("location.hash = '#/releases/1'")
    page.see("Release 1", "main h1")
    names = page.run("[...document.querySelectorAll('main button')].map(button => button.textContent)")
    assert not {"Pause", "Cancel"} & {*names}
    store.releases.set_freeze(True, "bob", "all of it")
    for release in (1, 2):
        settle(store, store.releases.get(release), "failed")
    page.run("location.hash = '#/releases'")
    page.see("Release 2 failed", "main").see("all of it", "main")
    assert [words for words, _ in verdict_buttons(page)] == [RETRY]


@pytest.mark.slow
def test_a_search_that_was_typed_leads_nobody_back(page):
    page.open("#/nodes").run("""{ const f = document.querySelector('#search'); f.value = 'edge';
        f.dispatchEvent(new Event('input', {bubbles: true})); location.hash = '#/health'; }""")
    page.see("Health", "main h1").settle()
    assert page.address() == "#/health"


# -- found by people who had never seen the page ------------------------------------------------------

def rolled_back(store: rc.Store, pops: str = "ab") -> None:
    """Make releases 1 and 2 good, let 3 fail in the batch of the second pop of two nodes each."""
    looks_for_work(store)
    for n, pop in enumerate(pops * 2, 1):
        store.nodes.add(f"edge-{n}", f"10.0.0.{n}", 9090, labels=json.dumps({"pop": pop}))
    strategy = {"batchBy": "pop", "batches": ["100%"]}
    for number in (1, 2, 3):
        release = new_release(store, payload={"websites": [{"domain": f"{number}.example"}]}, strategy=strategy)
        if number < 3:
            settle(store, release, *["success"] * 4)
    with store.database.transaction(write=True) as tx:
        tx.execute("UPDATE release_task_nodes SET status = CASE batch WHEN 1 THEN 'success' ELSE 'failed' END, "
                   "error_kind = CASE batch WHEN 1 THEN '' ELSE 'agent_failed' END, attempts = 1, error_msg = CASE "
                   "node_id WHEN 2 THEN 'no space left on device' WHEN 4 THEN 'no memory' ELSE '' END "
                   "WHERE release_task_id = 3")
        tx.execute("UPDATE release_tasks SET status = 'failed', started_at = created_at, finished_at = created_at, "
                   f"status_reason = 'stopped, 2 nodes failed: 2 agent_failed; no more', {rc.COUNTERS} WHERE id = 3")


@pytest.mark.slow
def test_a_reason_asks_for_no_other_plan_so_a_click_right_after_it_counts(page):
    rolled_back(page.daemon.store)
    page.open("#/releases/3").press("Roll back").ready("Sends the payload of release 2 to 4 nodes")
    page.see("Roll back release 3?", "#ask h2").fill(toRelease="1")
    assert page.run("[document.querySelector('#ask-do').textContent, document.querySelector('#ask-do').className]") == [
        "Planning...", ""]
    page.ready("Sends the payload of release 1").fill(toRelease="").ready("Sends the payload of release 2")
    page.fill(reason="typed and clicked").run("document.querySelector('#ask-do').click()")
    eventually(lambda: page.address() == "#/releases/4")
    page.draft(payload=PAYLOAD).see("Goes to 4 nodes", "#plan").fill(reason="at once").send()
    eventually(lambda: page.address() == "#/releases/5")
    assert [r.reason for r in page.daemon.store.releases.page().items[:2]] == ["at once", "typed and clicked"]


@pytest.mark.slow
def test_nodes_by_label_without_a_label_are_no_nodes_yet(page):
    page.daemon.store.nodes.add("edge-1", "10.0.0.1", labels='{"pop":"ams"}')
    page.draft(payload=PAYLOAD, reason="some").ready()
    page.run("document.querySelector('[name=who][value=labels]').click()")
    page.see("Pick a label", "#plan").see("There is no plan", "#send")
    assert page.count("#send-button.main") == 0
    page.press("ams 1").ready("Goes to 1 node")


@pytest.mark.slow
def test_a_freeze_of_a_target_names_it_everywhere_and_is_lifted_from_the_verdict(page):
    store = page.daemon.store
    looks_for_work(store)
    add_nodes(store, 1)
    new_release(store)
    settle(store, store.releases.get(1), "success")
    page.open("#/health").press("Freeze").fill(target="cnd")
    page.see("None of the newest releases has this target: they have cdn", "#wrong-target")
    page.fill(target="cdn")
    assert page.text("#wrong-target") == ""
    assert page.run("document.querySelector('#offers-target option').value") == "cdn"
    page.press("Freeze").see("Give a reason first", "#wrong-reason").fill(reason="the match").press("Freeze")
    page.see("Frozen: cdn", "#pulse").see("Frozen: cdn", ".verdict h2").see("Freeze something else", "main")
    page.open().press("Lift the freeze...").see("Lift the freeze of cdn?", "#ask").press("Lift the freeze")
    page.see("All is well", "#pulse")


@pytest.mark.slow
def test_a_first_visit_and_a_sign_out_are_told_as_what_they_are(new_page, sqlite_world, tokens):
    page = new_page(Daemon(sqlite_world.store, settings_for(sqlite_world.url, API_TOKENS_FILE=tokens("anna"))))
    page.open().see("Enter your API token", "#ask")
    outside = ("[...document.querySelectorAll('header, #trouble, main')].map(e => e.innerText).join()"
               ".match(/Sign in|expired|before|ago/g)")
    assert page.run(outside) is None  # the one way in is the dialog
    page.browser.key("Escape")
    eventually(lambda: page.count("main button") == 1)
    page.press("Sign in").fill(token="anna").press("Sign in").see("anna, ", "#user")
    page.open("#/new").fill(reason="of anna alone").see("anna, ", "#user").press("Sign out")
    page.see("You are signed out", "#pulse").see("You are signed out", "main h1")
    assert page.run(outside) == ["Sign in"]  # the button
    assert page.count("dialog[open]") == 0
    assert page.run("sessionStorage.getItem('releasectl-draft')") is None
    page.press("Sign in").fill(token="anna").press("Sign in").see("anna, ", "#user").see("Payload", "main")
    assert page.run("document.querySelector('[name=reason]').value") == ""


@pytest.mark.slow
def test_the_time_that_is_left_runs_down_in_the_language_of_the_page(page):
    store = page.daemon.store
    add_nodes(store, 2)
    looks_for_work(store)
    release = new_release(store)
    sql(store, "UPDATE release_tasks SET status = 'running', claim_owner = 'host-a:1:9f3a61c0', claim_expires_at = ?, "
               "status_reason = 'batch 1 of 2: waiting for 1 of 1 node; about 50 s left' WHERE id = ?",
        rc.utc_text(time.time() + 25), release.id)
    page.open(f"#/releases/{release.id}").see("about 48 s left", "main")
    page.press("中文").see("大约还需", "main")
    assert "left" not in page.text("main")


@pytest.mark.slow
def test_when_all_is_well_again_the_page_says_how_many_nodes_run_what_and_who_is_set_aside(page, monkeypatch):
    store, told = page.daemon.store, rc.overview_json
    counts = {"right": 4, "online": 4, "offline": 0, "maintenance": 1, "disabled": 2}
    monkeypatch.setattr(rc, "overview_json", lambda overview: {**told(overview), "nodes": counts})
    rolled_back(store)
    store.releases.rollback(3, rc.Act("anna", rc.VIA_API), rc.Again("back"), None)
    settle(store, store.releases.get(4), *["success"] * 4)
    page.open().see("All is well: 4 nodes run what they should", "main h1")
    page.see("release 4 (version 4), a rollback to what release 2 brought, ended", ".verdict")
    page.see("1 node: maintenance", ".verdict").see("2 nodes: disabled", ".verdict")
    assert page.run("[...document.querySelectorAll('.verdict .row a')].map(a => a.getAttribute('href'))") == [
        "#/nodes?state=maintenance", "#/nodes?state=disabled"]
    page.open("#/releases/4").see("4 nodes run what they should", "main .notice").see("Rollback of Release 3", "main")
    page.see("are the last batch, and may fail again", "main dl")
    page.open("#/nodes").see("version 4, the same as release 2", "#row-1")
    page.open("#/nodes/1")
    for name in ("Runs", "Should run"):
        fact = f"[...document.querySelectorAll('main dt')].find(dt => dt.innerText === '{name}').nextSibling.innerText"
        eventually(lambda fact=fact: "version 4, the same as release 2" in page.run(fact))
    page.open("#/releases/3").see("rolled back by Release 4", "main .chip.success")
    assert buttons(page, ACTIONS) == [["Roll back", "plain"], ["Retry", "plain"]]
    # what was wrong is still true, a retry is over, and so is a rollback
    page.see("Most likely the host is in trouble, not what this release brought: mend it there.", "#failures")
    assert "The agent tried" not in page.text("#failures")  # its advice is over
    assert "roll back" not in page.text("#failures")
    page.open("#/releases/3?node=2").see("no space left on device", "#node")
    page.open("#/releases").see("2 of 4 done, 2 failed", "#release-3 td:nth-child(3) .number")


@pytest.mark.slow
@pytest.mark.parametrize(("batches", "words"), [
    ([1, "50%", "100%"], "Batches of 1, 50%, then the rest."), ([1, "50%"], "Batches of 1, 50%, then the rest."),
    (["100%"], "All in one batch."), ([1, "10%*"], "Batches of 1, 10%*, so to the end.")])
def test_the_batches_of_a_strategy_are_told_to_their_end(page, batches, words):
    add_nodes(page.daemon.store, 4)
    new_release(page.daemon.store, strategy={"batches": batches})
    page.open("#/releases/1").see(words, "main dl")
    if batches == [1, "50%", "100%"]:
        page.press("中文").see("批次依次为 1、50%，其余为最后一批。", "main dl")


@pytest.mark.slow
def test_a_batch_is_called_by_the_label_that_its_nodes_share(page):
    rolled_back(page.daemon.store)
    page.open("#/releases/3").see("Batch 1 of 2, pop=a", "#batch-1").see("Batch 2 of 2, pop=b", "#batch-2")
    page.see("A batch for each pop.", "main dl")
    assert "then the rest" not in page.text("main dl")
    assert "in common" not in page.text("#failures").lower()  # what the batch says already
    assert page.run("[...document.querySelectorAll('#failures thead th')].length") == 4


@pytest.mark.slow
def test_the_link_of_a_problem_is_its_release_and_its_causes_stand_below_it(page):
    rolled_back(page.daemon.store)
    page.open().see("release 3 (v3) of cdn ended failed", ".problems a")
    causes = page.run("[...document.querySelectorAll('.problems .lines li')].map(e => e.innerText)")
    assert causes[:2] == ["stopped, 2 nodes failed: 2 agent_failed", "no more"]


@pytest.mark.slow
def test_what_somebody_set_a_node_to_bears_no_tick_and_its_failure_stands_in_its_head(page):
    rolled_back(page.daemon.store)
    page.open("#/nodes").see("Admin state", "thead").see("online", "#row-2 td:nth-child(2)")
    assert page.count("#row-2 .online") == 0
    page.open("#/nodes/2").see("release 3 failed here", "main .chip.failed")
    page.open("#/nodes").press("Add a node")
    assert page.run("document.querySelector('#ask [name=agentPort]').value") == "9090"  # as the others have


@pytest.mark.slow
def test_a_pause_says_how_many_go_on_and_how_many_wait(page):
    add_nodes(page.daemon.store, 3)
    new_release(page.daemon.store)
    sql(page.daemon.store, "UPDATE release_task_nodes SET status = 'running' WHERE node_id = 1")
    sql(page.daemon.store, "UPDATE release_tasks SET status = 'running', started_at = created_at")
    page.open("#/releases/1").press("Pause").see("Under way: 1 node; waiting: 2.", "#ask").press("Close")
    page.press("Cancel").see("Skipped: 2 nodes; followed to the end: 1.", "#ask")
    assert "version 1" not in page.text("#ask")  # no node has it


@pytest.mark.slow
def test_the_mark_above_tells_no_other_status_than_the_release_below_it(page):
    store = page.daemon.store
    looks_for_work(store)
    add_nodes(store, 1)
    new_release(store)
    page.open("#/releases/1").see("Release 1 is pending", "#pulse")
    page.run("""{ const ask = window.fetch; let isFirst = true;
        window.fetch = async (path, ...of) => {
          const answer = await ask(path, ...of);
          if (path.endsWith('v1/freeze') && isFirst) { // the last of the verdict: then it starts
            window.isAsked = true;
            await new Promise(then => { window.goOn = then; });
            isFirst = false;
          }
          return answer; }; } null""")
    eventually(lambda: page.run("Boolean(window.isAsked)"))
    sql(store, "UPDATE release_tasks SET status = 'running', started_at = created_at")
    page.run("""window.seen = []; new MutationObserver(() => window.seen.push(
        document.querySelector('#pulse').innerText + ' / ' + document.querySelector('main .chip').innerText))
        .observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
        window.goOn(); null""")
    page.see("running", "main .chip").see("Release 1 is running", "#pulse")
    assert [seen for seen in page.run("window.seen") if "pending" in seen.split(" / ")[0] and "running" in seen] == []


@pytest.mark.slow
def test_what_was_written_is_dropped_neither_by_a_click_beside_nor_by_the_first_esc(page):
    page.daemon.store.nodes.add("edge-1", "10.0.0.1")

    def click_beside() -> None:
        for kind in ("mousePressed", "mouseReleased"):
            page.browser.call("Input.dispatchMouseEvent", type=kind, x=5, y=400, button="left", clickCount=1)
        page.settle()

    page.open("#/nodes/1").press("Edit")
    click_beside()
    assert page.count("dialog[open]") == 0
    page.press("Edit").fill(name="edge-2")
    click_beside()
    assert page.count("dialog[open]") == 1
    page.browser.key("Escape")
    page.see("What you wrote is not saved", "#ask")
    page.browser.key("Escape")
    eventually(lambda: page.count("dialog[open]") == 0)
    assert page.daemon.store.nodes.get(1).name == "edge-1"


@pytest.mark.slow
def test_a_refused_key_of_a_strategy_is_marked_where_it_is_written(page):
    add_nodes(page.daemon.store, 2)
    page.draft(payload=PAYLOAD, reason="x", **{"strategy.maxFailed": "5x"})
    page.see("Failures tolerated in a batch: ", "#plan")
    assert page.run("[...document.querySelectorAll('[aria-invalid=true]')].map(e => e.name)") == ["strategy.maxFailed"]
    page.fill(**{"strategy.maxFailed": "1"}).ready()
    assert page.count("[aria-invalid=true]") == 0


@pytest.mark.slow
def test_a_search_keeps_its_place_and_narrow_rows_name_their_columns(page):
    rolled_back(page.daemon.store)
    place = "JSON.stringify(document.querySelector('#search').getBoundingClientRect())"
    page.open().see("Release 3", "#release-3")
    before = page.run(place)
    page.run("{ const f = document.querySelector('#search'); f.value = 'nothing'; f.oninput({target: f}); }")
    page.see("Nothing was found", "main")
    assert page.run(place) == before
    assert page.run("document.querySelector('.tools > button').offsetHeight") < 40  # CSV in one line, beside the search
    page.browser.look(360, 780)
    page.open().see("Release 3", "#release-3")
    assert page.run("document.querySelector('#release-3 td:nth-child(4)').dataset.name") == "Reason"
    assert page.run("getComputedStyle(document.querySelector('#release-3 td:nth-child(4)'), '::before').content"
                    ) not in ("none", "normal")


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



SHOWN = ("#/releases", "#/releases/1", "#/new", "#/nodes", "#/nodes/1", "#/health")
PLACES = ("#/releases", "#/releases?status=failed", "#/releases/1", "#/releases/3", "#/releases/1?node=2", "#/nodes",
          "#/nodes?search=long", "#/nodes/1", "#/health", "#/new")
DIALOGS = (("#/releases/3", "verb.cancel"), ("#/releases/1", "verb.retry"), ("#/releases/2", "verb.rollback"),
           ("#/nodes", "node.add"), ("#/nodes/1", "node.maintenance"), ("#/health", "freeze"), ("#/health", "keys"))


def wide(page: Page) -> list[int]:
    """Return how much wider than the window the page and its open dialogs are."""
    return page.run("[document.documentElement, ...document.querySelectorAll('dialog[open]')]"
                    ".map(d => d.scrollWidth - Math.min(d.clientWidth + 1, innerWidth)).filter(px => px > 1)")


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_view_and_dialog_is_for_everybody(full, axe, language):
    """In both languages axe finds nothing, in light and dark, and nothing is wider than 1280 and 360 pixels."""
    page = full.open()
    page.run(f"localStorage.setItem('releasectl-language', {language!r})")
    try:
        for place, key in ((*((place, "") for place in PLACES), *DIALOGS)):
            page.browser.look()
            page.open(place)
            if place == "#/new":
                page.fill(payload=PAYLOAD, reason="x").ready()
            if key:
                page.press(page.run(f"t({key!r})"))
                eventually(lambda: page.count("dialog[open] h2") == 1)
            eventually(lambda: page.count("main .waits") == 0)
            for width, scheme in (((1280, "light"), (360, "dark")) if language == "en" else ((360, "light"),)):
                page.browser.look(width, 800, scheme)
                assert (place, key, scheme, violations(page, axe)) == (place, key, scheme, [])
                assert (place, key, width, wide(page)) == (place, key, width, [])
    finally:
        page.run("localStorage.clear(); sessionStorage.clear()")


@pytest.mark.slow
@pytest.mark.parametrize(("language", "scheme", "media"), [
    ("en", "light", "forced-colors"), ("en", "light", "print"), ("en", "dark", ""), ("zh", "dark", "")])
def test_each_view_and_dialog_is_for_everybody_however_it_is_shown(full, axe, language, scheme, media):
    """Axe finds nothing, marks and bars stand out from what is behind them, and nothing is wider than 1280 pixels."""
    page = full.open()
    page.run(f"localStorage.setItem('releasectl-language', {language!r})")
    page.browser.look(1280, 900, scheme, media)
    try:
        for place, key in (*((place, "") for place in SHOWN), *DIALOGS):
            page.open(place)
            if place == "#/new":
                page.fill(payload=PAYLOAD, reason="x").ready()
            eventually(lambda: page.run("view.isLoaded === true") and page.count("main .waits") == 0)
            if key:
                page.run("[...document.querySelectorAll('button')].find(button => "
                         f"button.textContent.startsWith(t({key!r}))).click()")
                eventually(lambda: page.count("dialog[open] h2") == 1 and page.count("#ask-plan.waits") == 0)
            assert (place, key, violations(page, axe)) == (place, key, [])
            assert key or (place, unseen(page)) == (place, [])
            assert (place, wide(page)) == (place, [])
    finally:
        page.run("localStorage.clear(); sessionStorage.clear()")


def unseen(page: Page) -> list[str]:
    """Return the marks, cells, bars and columns without a contrast of 2 to 1 to their ground, in the page's picture."""
    picture = page.browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
    return page.run("""(async data => {
        const picture = new Image(), canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
        picture.src = `data:image/png;base64,${data}`;
        await picture.decode();
        [canvas.width, canvas.height] = [picture.width, picture.height];
        pen.drawImage(picture, 0, 0);
        const {data: points} = pen.getImageData(0, 0, picture.width, picture.height);
        const light = at => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
          const part = points[at + i] / 255;
          return sum + share * (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        }, 0.05);
        const at = (x, y) => light(4 * (Math.floor(y + scrollY) * picture.width + Math.floor(x + scrollX)));
        const contrast = e => {
          const {left, top, right, bottom} = e.getBoundingClientRect(), all = [];
          const around = (e.closest('.bar, .gauge, .strip') || e).getBoundingClientRect();
          const ground = at(around.left - 3, (around.top + around.bottom) / 2);
          for (let y = top; y < bottom; y++) {
            for (let x = left; x < right; x++) all.push(Math.max(at(x, y) / ground, ground / at(x, y)));
          }
          return all.sort((a, b) => a - b).at(-5);
        };
        const drawn = '.mark, .cell, .bar > span:not(.pending), .gauge > *, .tall';
        return [...document.querySelectorAll(`main :is(${drawn})`)].filter(e => e.checkVisibility() && contrast(e) < 2)
            .map(e => `${e.parentNode.className} > ${e.className}`);
      })(""" + json.dumps(picture) + ")")


def violations(page: Page, axe: str) -> list[Any]:
    page.run(f"window.axe || (() => {{ {axe} }})(); null")
    return page.run("axe.run().then(found => found.violations.map(v => [v.id, ...v.nodes.map(n => n.html)]))")


# Fields whose text, or whose placeholder while they are empty, is wider than they are.
CUT = """[...document.querySelectorAll('select, input:not([type=file], [type=checkbox], [type=radio])')].filter(e => {
  if (!e.offsetParent) return false;
  const pen = document.createElement('canvas').getContext('2d');
  pen.font = getComputedStyle(e).font;
  const [text, room] = e.selectedOptions ? [e.selectedOptions[0].text, 36] : [e.value || e.placeholder, 18];
  return pen.measureText(text).width > e.clientWidth - room; }).map(e => e.name || e.id)"""


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_field_cuts_its_text_at_360_pixels(full, language):
    full.browser.look(360, 780)
    full.open()
    full.run(f"localStorage.setItem('releasectl-language', {language!r})")
    try:
        for place in ("#/releases", "#/releases/2", "#/nodes", "#/new", "#/health"):
            full.open(place)
            assert full.run(CUT) == [], place
        full.open("#/releases/2").press({"en": "Roll back", "zh": "回滚"}[language]).see("2", "#ask")
        assert full.run(CUT) == []
    finally:
        full.run("localStorage.clear()")


@pytest.mark.slow
def test_bars_cells_and_marks_are_seen_in_forced_colours_and_in_print(full):
    for media in ("forced-colors", "print"):
        full.browser.look(media=media)
        full.open("#/releases/1")
        seen = full.run("""['.mark.failed', '.cell.failed', '.cell.failed .mark', '.bar .success', '.bar .failed']
            .map(which => {
                const style = getComputedStyle(document.querySelector(`main ${which}`));
                return style.backgroundColor !== 'rgba(0, 0, 0, 0)' || style.borderTopWidth !== '0px'
                    || style.backgroundImage !== 'none'; })""")
        assert (media, seen) == (media, [True] * 5)
        if media == "forced-colors":
            assert full.run("""(() => { const [mark, cell] = ['.cell.failed .mark', '.cell.failed'].map(which =>
                getComputedStyle(document.querySelector(which)).backgroundColor); return mark !== cell; })()""")
        else:
            assert full.run("getComputedStyle(document.querySelector('main .bar')).printColorAdjust") == "exact"
            assert full.run("document.querySelector('header').offsetHeight") == 0


def test_the_file_is_below_140_kb():
    assert len(rc.DASHBOARD_FILE.read_bytes()) < 140 * 1024
