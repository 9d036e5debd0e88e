"""A real headless Chromium for the tests of the page, driven through its own pipe: no package needed.

    with Browser(folder) as browser:
        browser.open("http://127.0.0.1:8080/")
        assert browser.run("document.title") == "..."

The pipe carries the Chrome DevTools Protocol: JSON messages, each ended by a NUL, in on descriptor
3 and out on 4. What the page logs, throws and asks for is kept in `errors` and `requests`; what it
asks for other than by GET also in `changes`, with its body.
"""
from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe")
ANSWER_S = 60.0


class Browser:
    """One Chromium with one page; every call waits for its answer."""

    def __init__(self, folder: Path):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", str(PROGRAM), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._read, self._session = itertools.count(1), b"", ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.changes: list[tuple[str, str, Any]] = []
        self.answers: list[tuple[int, str]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, 9)  # a session of its own: nobody else is in it
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    # -- what tests call -----------------------------------------------------------------

    def open(self, url: str) -> None:
        """Go to an address anew; also where only the part behind # is another one."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """Return what an expression of JavaScript (or its promise) comes to; raise AssertionError when it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True,
                           userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, key: str, text: str = "", held: int = 0) -> None:
        """Press a key for real; held: so often it comes again before it is let go."""
        for turn, kind in enumerate(["keyDown"] * (1 + held) + ["keyUp"]):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text if kind == "keyDown" else "",
                      autoRepeat=kind == "keyDown" and turn > 0,
                      windowsVirtualKeyCode={"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39}.get(
                          key, ord(key[0].upper())))

    def look(self, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "") -> None:
        """Set the size of the window, the colour scheme that the person prefers, and print or forced-colors."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", media="print" if media == "print" else "", features=[
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "forced-colors", "value": "active" if media == "forced-colors" else "none"}])

    def picture(self, file: Path, whole: bool = False) -> None:
        """Write what is seen as PNG; whole: also what is below the window."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    # -- the protocol --------------------------------------------------------------------

    def call(self, method: str, **params: Any) -> Any:
        """Do one command of the protocol; note the events that come before its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data):]
        give_up_at = time.monotonic() + ANSWER_S
        while True:
            answer = self._next(give_up_at - time.monotonic(), method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _next(self, within_s: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._read:
            if not select.select([self._in], [], [], max(0.0, within_s))[0]:
                raise TimeoutError(f"Chromium did not answer to {what}")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise EOFError("Chromium went away")
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            request = params["request"]
            self.requests.append(request["url"])
            if request["method"] != "GET":
                path = "/" + request["url"].split("/", 3)[3]
                self.changes.append((request["method"], path, json.loads(request.get("postData") or "null")))
        elif event == "Network.responseReceived":
            self.answers.append((params["response"]["status"], params["response"]["url"]))
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"].get("exception", {}).get("description", params)))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning") \
                and params["entry"]["source"] != "network":  # an answer that is no success is seen in `answers`
            self.errors.append(params["entry"]["text"])
