"""A browser without a window, driven through chromedriver by the W3C's protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Chromium asks nothing of the network but what a page asks for.
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Browser:
    """One window of one session."""

    def __init__(self, session: str) -> None:
        self.session = session

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Opens a page in a window of this size, which may be narrower than a desktop allows."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._cdp("Emulation.setDeviceMetricsOverride", size)
        _post(f"{self.session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns that runs in the page."""
        return _post(f"{self.session}/execute/sync", {"script": script, "args": arguments})

    def type(self, selector: str, text: str) -> None:
        """Clicks on a field and types into it."""
        found = _post(f"{self.session}/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        _post(f"{self.session}/element/{element}/click", {})
        _post(f"{self.session}/element/{element}/value", {"text": text})

    def complaints(self) -> list[str]:
        """What the console has said since the last time."""
        return [each["message"] for each in _post(f"{self.session}/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """What was asked of servers since the last time."""
        log = [
            json.loads(each["message"]) for each in _post(f"{self.session}/se/log", {"type": "performance"})
        ]
        sent = [each["message"] for each in log if each["message"]["method"] == "Network.requestWillBeSent"]
        return [url for each in sent if (url := each["params"]["request"]["url"]).startswith("http")]

    def picture(self, path: Path) -> None:
        """Writes what the window shows as a PNG."""
        shot = self._cdp("Page.captureScreenshot", {"format": "png"})
        path.write_bytes(base64.b64decode(shot["data"]))

    def _cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return _post(f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Starts Chromium with an empty profile, and ends it."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
        address = f"http://127.0.0.1:{port}/session"
        chrome = {"binary": shutil.which("chromium"), "args": [*OPTIONS, f"--user-data-dir={profile}"]}
        asked = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = _post(address, {"capabilities": {"alwaysMatch": asked}})["sessionId"]
        try:
            yield Browser(f"{address}/{session}")
        finally:
            _send(urllib.request.Request(f"{address}/{session}", method="DELETE"))
    finally:
        driver.terminate()
        driver.communicate()


def _post(address: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    return _send(urllib.request.Request(address, data, {"Content-Type": "application/json"}))


def _send(request: urllib.request.Request) -> Any:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.load(error)["value"]["message"]) from None
