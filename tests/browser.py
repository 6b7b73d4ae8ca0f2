"""Headless Chromium for tests of pages: opened from the disk, without a network, driven over the DevTools protocol."""

import fcntl
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import pytest

from pipeline.runs.ports import free_port
from tests import ROOT

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
EXECUTABLE = next(filter(None, map(shutil.which, BROWSERS)), None)
HAS_QT = find_spec("PySide6") is not None and find_spec("PySide6.QtWebEngineWidgets") is not None
needs_browser = pytest.mark.skipif(
    EXECUTABLE is None and not HAS_QT, reason=f"none of {', '.join(BROWSERS)} is installed, nor PySide6-WebEngine"
)

TIMEOUT = 60  # seconds for one answer of the browser


@dataclass
class Visit:
    """One opened page: what it complained about, what it asked for, and how to ask it."""

    browser: "Browser"
    session: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def evaluate(self, expression: str):
        options = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self.browser.call("Runtime.evaluate", self.session, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "exception"))
        return answer["result"].get("value")

    def wait_until(self, condition: str) -> None:
        """Until a JavaScript expression is true; it is looked at whenever the page changes."""
        self.evaluate(
            f"new Promise((resume) => {{ const look = () => {{ if ({condition}) resume(); }}; look();"
            "new MutationObserver(look).observe(document, { attributes: true, childList: true, subtree: true }); })"
        )

    def note(self, method: str, event: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(event["exceptionDetails"]["exception"].get("description", "exception"))
        elif method == "Runtime.consoleAPICalled":
            text = " ".join(str(part.get("value", part)) for part in event["args"])
            self._sort(event["type"]).append(text)
        elif method == "Log.entryAdded":
            self._sort(event["entry"]["level"]).append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not event["request"]["url"].startswith("data:"):
            self.requests.append(event["request"]["url"])

    def _sort(self, level: str) -> list[str]:
        return {"error": self.errors, "assert": self.errors, "warning": self.warnings}.get(level, [])


class Browser:
    """Asks over a link, and gives every page that it opens the events that are the page's."""

    def __init__(self, link: "Link") -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self._visits: dict[str, Visit] = {}
        self._loaded: set[str] = set()

    def open(self, page: Path, fragment: str = "") -> Visit:
        session = self.call("Target.attachToTarget", targetId=self._link.target(self), flatten=True)["sessionId"]
        visit = self._visits[session] = Visit(self, session)
        self.call("Page.enable", session)
        self._go(session, "about:blank")  # where one page serves all, another fragment alone would load nothing
        for domain in ("Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        for method in ("Runtime.discardConsoleEntries", "Log.clear"):  # of an earlier page in the same place
            self.call(method, session)
        visit.errors.clear()
        visit.warnings.clear()
        self._go(session, page.as_uri() + fragment)
        return visit

    def call(self, method: str, session: str | None = None, **params) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._link.send(json.dumps(message))
        while True:
            answer = json.loads(self._link.receive())
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._handle(answer)

    def allow_clipboard(self) -> None:
        self._link.allow_clipboard(self)

    def close(self) -> None:
        self._link.close(self)

    def _go(self, session: str, address: str) -> None:
        self._loaded.discard(session)
        self.call("Page.navigate", session, url=address)
        while session not in self._loaded:
            self._handle(json.loads(self._link.receive()))

    def _handle(self, message: dict) -> None:
        session = message.get("sessionId")
        if message.get("method") == "Page.loadEventFired":
            self._loaded.add(session)
        if session in self._visits and "method" in message:
            self._visits[session].note(message["method"], message["params"])


class Link(Protocol):
    """How a browser was started and is reached."""

    def send(self, message: str) -> None: ...
    def receive(self) -> str: ...
    def target(self, browser: Browser) -> str:
        """The id of an empty page."""

    def allow_clipboard(self, browser: Browser) -> None: ...
    def close(self, browser: Browser) -> None: ...


class Pipe:
    """An executable over the protocol's pipe: messages, each ended by a zero byte."""

    def __init__(self, executable: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium reads descriptor 3 and writes 4; from high numbers, moving them there overwrites neither.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20) for descriptor in (theirs_in, theirs_out)]
        launch = f"import os, sys; os.dup2({high[0]}, 3); os.dup2({high[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "--disable-background-networking"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", launch, executable, *flags, "about:blank"],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (theirs_in, theirs_out, *high):
            os.close(descriptor)
        self._buffer = b""

    def send(self, message: str) -> None:
        os.write(self._out, message.encode() + b"\0")

    def receive(self) -> str:
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(self._in, 1 << 16) if ready else b""
            assert chunk, f"the browser gave no answer within {TIMEOUT} s, or ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return message.decode()

    def target(self, browser: Browser) -> str:
        return browser.call("Target.createTarget", url="about:blank")["targetId"]

    def allow_clipboard(self, browser: Browser) -> None:
        browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])

    def close(self, browser: Browser) -> None:
        try:
            browser.call("Browser.close")
            self._process.wait(TIMEOUT)
        finally:
            self._process.kill()
            os.close(self._in)
            os.close(self._out)


class Qt:
    """Qt's WebEngine, which is Chromium in a wheel, over a socket. It has no pipe, and one page for all."""

    def __init__(self) -> None:
        from websockets.sync.client import connect

        port = free_port()
        flags = '--disable-gpu --host-resolver-rules="MAP * ~NOTFOUND" --disable-background-networking'
        settings = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
        settings |= {"QTWEBENGINE_CHROMIUM_FLAGS": flags, "QTWEBENGINE_REMOTE_DEBUGGING": str(port)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.qt_page"],
            env=os.environ | settings,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = list[str]()
        for line in self._process.stderr:
            said.append(line)
            if address := re.search(r"DevTools listening on (ws:\S+)", line):
                break
        else:
            if lacking := re.search(r"ImportError: (.*cannot open shared object file.*)", "".join(said)):
                pytest.skip(f"PySide6-WebEngine needs a library of the system: {lacking[1]}")
            raise RuntimeError(f"Qt's WebEngine did not start: {''.join(said)}")
        threading.Thread(target=self._process.stderr.read, daemon=True).start()  # or it would wait for a reader
        self._stack = ExitStack()
        self._socket = self._stack.enter_context(connect(address[1], max_size=None, proxy=None))

    def send(self, message: str) -> None:
        self._socket.send(message)

    def receive(self) -> str:
        return self._socket.recv(timeout=TIMEOUT)

    def target(self, browser: Browser) -> str:
        targets = browser.call("Target.getTargets")["targetInfos"]
        return next(target["targetId"] for target in targets if target["type"] == "page")

    def allow_clipboard(self, browser: Browser) -> None:
        """tests/qt_page.py does."""

    def close(self, browser: Browser) -> None:
        self._process.kill()
        self._process.wait(TIMEOUT)
        self._stack.close()


def start_browser(profile: Path) -> Browser:
    """profile: an empty folder."""
    return Browser(Pipe(EXECUTABLE, profile) if EXECUTABLE else Qt())


def press(browser, visit, key: str, code: int, text: str = "") -> None:
    for kind in ("keyDown", "keyUp"):
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code} | ({"text": text} if kind == "keyDown" else {})
        browser.call("Input.dispatchKeyEvent", visit.session, type=kind, **named)
