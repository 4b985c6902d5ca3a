"""A real browser without a window, driven over its DevTools pipe: chromium, where installed."""

import base64
import json
import os
import shutil
import tempfile

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",  # as root in a container there is none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Browser:
    """One page of one browser, without a network. A context manager; requests are answered in turn.

    Attributes:
      problems: texts of exceptions and of errors in the console.
      requests: addresses that were loaded.
    """

    def __init__(self, width: int = 1200, height: int = 900, dark: bool = False):
        assert CHROMIUM is not None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={self._profile.name}"]
        self._pid = os.posix_spawn(
            CHROMIUM,
            [CHROMIUM, *flags],
            os.environ,
            file_actions=[
                # By way of high numbers: 3 and 4 may be the pipes' own.
                (os.POSIX_SPAWN_DUP2, theirs_in, 103),
                (os.POSIX_SPAWN_DUP2, theirs_out, 104),
                (os.POSIX_SPAWN_DUP2, 103, 3),
                (os.POSIX_SPAWN_DUP2, 104, 4),
                (os.POSIX_SPAWN_CLOSE, 103),
                (os.POSIX_SPAWN_CLOSE, 104),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._count, self._rest, self._session = 0, b"", ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        self.resize(width, height)
        self._call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self._call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._call("Browser.close")
        os.close(self._to)
        os.close(self._from)
        os.waitpid(self._pid, 0)
        self._profile.cleanup()

    def resize(self, width: int, height: int) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def open(self, address: str) -> None:
        """Loads a page and waits until it has been painted."""
        self._call("Page.navigate", url=address)
        self.run(
            "new Promise((done) => { const look = () => document.readyState === 'complete' ?"
            " requestAnimationFrame(() => requestAnimationFrame(done)) : setTimeout(look, 5);"
            " look(); })"
        )

    def run(self, expression: str):
        """The value of a JavaScript expression, promises awaited."""
        done = self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **_KEYS[key])

    def screenshot(self, whole: bool = True) -> bytes:
        """PNG of the page, or of what the window shows of it."""
        done = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(done["data"])

    def _call(self, method: str, **params) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            read = os.read(self._from, 1 << 16)
            assert read, "the browser has ended"
            self._rest += read
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _note(self, event: dict) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", details).get("description", str(details)))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


_KEYS = {
    "Tab": {"windowsVirtualKeyCode": 9},
    "ArrowRight": {"windowsVirtualKeyCode": 39},
    "ArrowDown": {"windowsVirtualKeyCode": 40},
}
