"""A browser without a window, driven over its debugging pipe: what a page shows, with its own policy in force."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NEEDS_BROWSER = pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
_SECONDS = 120


class Browser:
    """Chromium with one page; a browser that hangs or ends is a failure."""

    def __init__(self, folder: Path):
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]  # above 3 and 4, which they become
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command = ["chromium", *options, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        script = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=ends, env=environment, stderr=subprocess.DEVNULL
        )
        for end in (commands, answers, *ends):
            os.close(end)
        self._unread, self._calls, self._session = b"", 0, None
        self.complaints: list[str] = []

    def __enter__(self) -> "Browser":
        target = next(page for page in self._call("Target.getTargets")["targetInfos"] if page["type"] == "page")
        answer = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def open(self, page: Path, width: int = 1280, *, is_dark: bool = False, medium: str = "") -> None:
        """Load a page; `complaints` holds what its console says from now on."""
        self.complaints = []
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        self._call("Page.navigate", url=page.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page; a promise is awaited."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression holds."""
        end = time.monotonic() + _SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"{condition} does not come true"
            time.sleep(0.02)

    def press(self, key: str, code: int) -> None:
        """Press and release a key, by its name and its virtual key code."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def _call(self, method: str, **arguments: object) -> dict:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            self._listen(answer)
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], _SECONDS)[0], "the browser hangs"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser ended"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _listen(self, event: dict) -> None:
        method = event.get("method")
        if method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(event["params"]))
