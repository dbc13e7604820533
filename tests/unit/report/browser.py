"""Headless Chromium through chromedriver's HTTP interface: enough to look at a page, with nothing to install beside."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = (
    None if CHROMIUM and DRIVER else "no Chromium with chromedriver here: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage"
).split()


class Browser:
    """One page in a browser."""

    def __init__(self, port: int, session: str) -> None:
        self._url = f"http://127.0.0.1:{port}/session/{session}"

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Load a file at a width in CSS pixels, as a phone would where it is narrow."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        _call(f"{self._url}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """The value that a piece of JavaScript returns."""
        return _call(f"{self._url}/execute/sync", {"script": script, "args": []})

    def errors(self) -> list[str]:
        """What the page complained of since the last call: errors of scripts, and whatever it failed to load."""
        entries = _call(f"{self._url}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        found = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Chromium's own protocol."""
        return _call(f"{self._url}/goog/cdp/execute", {"cmd": command, "params": parameters})


@contextmanager
def browser(profile: Path, port: int) -> Iterator[Browser]:
    """A browser with a fresh profile and no network; ended on leaving."""
    assert DRIVER is not None
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    session = None
    try:
        _wait(port)
        arguments = [*FLAGS, f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        options = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = _call(f"http://127.0.0.1:{port}/session", {"capabilities": {"alwaysMatch": options}})
        session = made["sessionId"]
        yield Browser(port, session)
    finally:
        if session is not None:
            _call(f"http://127.0.0.1:{port}/session/{session}", method="DELETE")
        process.terminate()
        process.wait(timeout=20)


def _wait(port: int) -> None:
    for _ in range(100):
        try:
            _call(f"http://127.0.0.1:{port}/status", method="GET")
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("chromedriver did not start within 10 s")


def _call(url: str, body: Any = None, method: str = "POST") -> Any:
    data = None if method != "POST" else json.dumps(body or {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"chromedriver: {error.read().decode()[:500]}") from None
