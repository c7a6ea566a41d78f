"""A page in headless Chromium, through its DevTools protocol over a pair of pipes."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """Chromium with one page; a context manager.

    Args:
        folder: for its profile, empty.
        more: options of the command line.
    """

    def __init__(self, folder: Path, *more: str):
        found = next(filter(None, map(shutil.which, NAMES)), None)
        assert found, f"This test needs one of {', '.join(NAMES)} (Debian: apt-get install chromium)."
        self.events: list[dict] = []
        """What the browser has told so far."""
        self.number = 0
        command_end, self.commands = os.pipe()
        self.answers, answer_end = os.pipe()
        # The browser reads its file 3 and writes its file 4.
        command = f'exec 3<&{command_end} 4>&{answer_end}; exec "$@"'
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            *more,
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", found, *options],
            pass_fds=(command_end, answer_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_end)
        os.close(answer_end)
        self.rest = b""
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self.commands)
        self.process.kill()
        self.process.wait()
        os.close(self.answers)

    def call(self, method: str, **parameters):
        """The result of a command of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(
            self.commands, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0"
        )
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def open(self, path: Path | str, width: int, height: int = 900, scheme: str = "light") -> None:
        """Opens a file, or an address, in a window of so many CSS pixels; below 600 it is a phone's."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, script: str):
        """The value of an expression of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Presses and releases a key, by its name and number."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def point(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Moves the mouse to a place in an element, in shares of its width and height."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        # Until the page has been told that it was scrolled.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        left, top, width, height = self.run(
            f"(({{left, top, width, height}}) => [left, top, width, height])({element}.getBoundingClientRect())"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + x * width, y=top + y * height)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Writes a PNG of the whole page, or of what the window shows."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Errors of the console, exceptions, and requests for anything but the page and what is inside."""
        self.run("0")
        found = []
        for event in self.events:
            method, told = event["method"], event.get("params", {})
            if method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                found.append(json.dumps(told))
            elif method == "Network.requestWillBeSent":
                url = told["request"]["url"]
                if not url.startswith("data:") and told.get("type") != "Document":
                    found.append(url)
        return found

    def _read(self):
        while b"\0" not in self.rest:
            part = os.read(self.answers, 1 << 20)
            assert part, "The browser has ended."
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)
