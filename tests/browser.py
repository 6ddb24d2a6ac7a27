"""A headless Chromium that is told what to do over two pipes, and says what it saw.

The DevTools protocol (https://chromedevtools.github.io/devtools-protocol/): JSON messages with a NUL after each, which
the browser reads from its file descriptor 3 and writes to 4.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
PATIENCE = 30.0
# Of bash: dup2 in the child without code of ours between fork and exec.
START = """exec "$1" --headless --no-sandbox --disable-gpu --hide-scrollbars \\
    --remote-debugging-pipe --user-data-dir="$2" 3<&"$3" 4>&"$4\""""


class Browser:
    """A page in a browser.

    Attributes:
        complaints: what the page did wrong: exceptions, refused by its policy, fetched from elsewhere.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._read = b""
        self._number = 0
        self._session = ""
        self.complaints: list[str] = []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns what came of it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path, *, dark: bool = False, width: int = 1200) -> None:
        """Opens a page and waits until it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self.tell("Page.navigate", url=page.as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """Returns what an expression is on the page, after the page has been drawn."""
        drawn = f"new Promise(done => requestAnimationFrame(() => setTimeout(() => done({expression}))))"
        result = self.tell("Runtime.evaluate", expression=drawn, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **more)

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._back, 1 << 16) if ready else b""
            assert piece, "the browser says nothing any more"
            self._read += piece
        text, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._listen(message.get("method", ""), message.get("params", {}))
        return message

    def _listen(self, method: str, seen: dict[str, Any]) -> None:
        error = method == "Log.entryAdded" and seen["entry"]["level"] == "error"
        if error or method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(seen))
        if method == "Network.requestWillBeSent" and not seen["request"]["url"].startswith("file:"):
            self.complaints.append(seen["request"]["url"])


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Starts a browser; skips the test where there is none."""
    program = next((name for name in NAMES if shutil.which(name)), None)
    if program is None:
        pytest.skip("no Chromium here, and none in this distribution's packages")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = ["bash", "-c", START, "start", program, str(folder / "profile"), str(theirs_in), str(theirs_out)]
    with (folder / "browser.log").open("wb") as log:
        child = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=log, stdout=log)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        os.close(ours_out)  # which ends it
        os.close(ours_in)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)
        child.kill()
        child.wait()
