"""Headless Chromium, used as a person would: real keys, clicks, dropped files and downloads.

It is driven over the DevTools protocol through two pipes: messages of JSON, each ended by a zero byte.
"""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHIFT, CONTROL = 8, 2  # modifiers of keys and clicks
CODES = {"Enter": 13, "Backspace": 8, "Escape": 27, " ": 32, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36}
CODES |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}


class Browser:
    """A running Chromium with a profile of its own in `folder`; downloads go to `folder`/downloads."""

    def __init__(self, folder: Path, seconds: float = 60):
        self.downloads, self.seconds = folder / "downloads", seconds
        self._numbers, self._buffer = itertools.count(1), b""
        self.events: list[dict] = []
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (*os.pipe(), *os.pipe())]
        commands, self._out, self._in, answers = pipes
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *options, f"--user-data-dir={folder / 'profile'}"],
            preexec_fn=lambda: (os.dup2(commands, 3), os.dup2(answers, 4)),  # where Chromium looks for its pipes
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        behaviour = {"behavior": "allow", "downloadPath": str(self.downloads)}
        self.call("Browser.setDownloadBehavior", **behaviour)

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._in)
            os.close(self._out)

    def call(self, method: str, session: str = "", **parameters) -> dict:
        """The result of one command; events that arrive meanwhile are kept in `events`."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait(self, method: str, session: str) -> None:
        """Take the next event of this kind out of `events`, which may have arrived already."""
        while True:
            for event in self.events:
                if event["method"] == method and event.get("sessionId") == session:
                    self.events.remove(event)
                    return
            self.events.append(self._receive())

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], self.seconds)
            part = os.read(self._in, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, size: tuple[int, int] = (1280, 800), before: str = "") -> "Page":
        """A new tab with a file in it; `before` is a script that runs first."""
        return Page(self, path, size, before)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, path: Path, size: tuple[int, int], before: str):
        self.browser, self.path = browser, path
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        if before:
            self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=path.resolve().as_uri())
        browser.wait("Page.loadEventFired", self.session)

    def call(self, method: str, **parameters) -> dict:
        return self.browser.call(method, self.session, **parameters)

    def js(self, expression: str):
        """The value of an expression in the page; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        deadline = time.monotonic() + self.browser.seconds
        while not self.js(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)

    def reload(self) -> None:
        self.call("Page.reload")
        self.browser.wait("Page.loadEventFired", self.session)

    def press(self, *keys: str, modifiers: int = 0) -> None:
        for key in keys:
            letter = len(key) == 1
            code = CODES.get(key) or ord(key.upper())
            event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
            if letter and key != " ":
                event["code"] = f"Digit{key}" if key.isdigit() else f"Key{key.upper()}"
            text = {"text": {"Enter": "\r"}.get(key, key)} if (letter or key == "Enter") and not modifiers else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def centre(self, selector: str) -> tuple[float, float]:
        """The middle of the first element that the selector finds, in pixels of the window."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        return tuple(self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})"))

    def click(self, selector: str, modifiers: int = 0) -> None:
        x, y = self.centre(selector)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1, "modifiers": modifiers}
            self.call("Input.dispatchMouseEvent", **event)

    def drop(self, path: Path) -> None:
        """Drag a file from a file manager onto the page."""
        data = {"items": [], "files": [str(path.resolve())], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    def downloaded(self, name: str) -> Path:
        """The finished download of this name, which is awaited."""
        deadline = time.monotonic() + self.browser.seconds
        while not (self.browser.downloads / name).exists():
            assert time.monotonic() < deadline, f"{name} was not downloaded"
            time.sleep(0.02)
        return self.browser.downloads / name

    def complaints(self) -> list[str]:
        """Errors and warnings that the browser's console shows."""
        self.js("1")  # the events until now
        events = [event for event in self.browser.events if event.get("sessionId") == self.session]
        messages = [event["params"] for event in events if event["method"] == "Runtime.exceptionThrown"]
        messages += [event["params"]["entry"]["text"] for event in events if event["method"] == "Log.entryAdded"]
        return list(map(str, messages))

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        self.js("1")
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event["method"] == "Network.requestWillBeSent" and event["sessionId"] == self.session
        ]
