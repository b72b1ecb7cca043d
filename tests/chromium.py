"""Headless Chromium on its DevTools pipe: enough to open a page, ask it questions and take pictures."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A page of a browser of its own. `errors` collects what goes wrong on it: console errors, exceptions, failed requests."""

    def __init__(self, timeout: float = 120):
        self.timeout, self.errors, self.loaded, self._id, self._buffer = timeout, [], False, 0, b""
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        # --remote-debugging-pipe reads from descriptor 3 and writes to 4
        command = (
            f'exec "$0" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars '
            f'--autoplay-policy=no-user-gesture-required --user-data-dir="$1" --remote-debugging-pipe about:blank '
            f"3<&{there} 4>&{back}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command, EXECUTABLE, self.profile.name], pass_fds=(there, back), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self.session = None
        (target,) = (t["targetId"] for t in self._pages())
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _pages(self) -> list[dict]:
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            if pages := [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]:
                return pages[:1]
            time.sleep(0.1)
        raise TimeoutError("Chromium opened no page")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._out)
        os.close(self._in)
        self.profile.cleanup()

    def _receive(self) -> dict:
        end = time.monotonic() + self.timeout
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError(f"Chromium ended with status {self.process.wait()}")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(message)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value") for argument in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.loadingFailed":
            self.errors.append(params["errorText"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        return message

    def send(self, method: str, **params) -> dict:
        """A command of the DevTools protocol and its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (answer := self._receive()).get("id") != self._id:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, file: Path) -> None:
        """Open a file, without a server, and wait until it has loaded."""
        self.loaded = False
        self.send("Page.navigate", url=file.resolve().as_uri())
        while not self.loaded:
            self._receive()

    def evaluate(self, script: str):
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", result["exceptionDetails"]).get("description"))
        return result["result"].get("value")

    def look(self, width: int, height: int, scheme: str = "light", mobile: bool = False) -> None:
        """Set the window's size and the colour scheme."""
        scale = 2 if mobile else 1
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile)
        self.send("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is in the window, or of the whole page."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))
