"""A headless Chromium, and a gateway of a few lines that serves the page with a fleet that the test describes."""

import json
import math
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from stack.shell import ROOT

PAGE = ROOT / "nginx" / "status"
# What nginx/ sends with the page; the test on the real gateway compares.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
# Served with the page: its clock runs this many times faster, so that two minutes of charts take seconds.
HURRY = "const later = setTimeout; window.setTimeout = (f, ms) => later(f, ms / 50);"


def replica(name: str, state: str = "ready", **more: object) -> dict[str, Any]:
    """A replica as /status.json shows it; idle unless told otherwise."""
    known = {"reason": "", "models": ["SmolLM2-135M"], "weight": 1, "in_flight": 0, "running": 0, "waiting": 0}
    return {
        "name": name,
        "state": state,
        **known,
        "kv_usage": 0.1,
        "prefix_hit_rate": None,
        "tokens_per_s": 0,
        "ttft_ms": None,
        **more,
    }


@dataclass
class FakeGateway:
    """Serves the page's files and /status.json, to whoever has the `key` if there is one. All can be changed."""

    replicas: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    broken: bool = False
    key: str = ""
    moving: bool = False
    polls: int = 0
    url: str = ""

    def status(self) -> dict[str, Any]:
        """What /status.json answers. While `moving`, the numbers of ready replicas swing from poll to poll."""
        self.polls += 1
        shown = [dict(replica) for replica in self.replicas]
        if self.moving:
            for i, one in enumerate(r for r in shown if r["state"] == "ready"):
                swing = math.sin(self.polls / 9 + i) + 0.4 * math.sin(self.polls / 2.3 + 2 * i)
                one["tokens_per_s"] = round(one["tokens_per_s"] * (1 + 0.15 * swing), 1)
                one["ttft_ms"] = round(one["ttft_ms"] * (1 - 0.2 * swing))
                one["prefix_hit_rate"] = round(one["prefix_hit_rate"] * (1 - math.exp(-self.polls / 40)), 3)
        gateway = {"version": "1.30.6", "policy": "prefix", "uptime_s": 11520, "refused": self.refused}
        return {"gateway": gateway, "models": ["SmolLM2-135M"], "replicas": shown}


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/status.json" and fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                self.reply(401, "application/json", b"{}")
                return
            if self.path == "/status.json":
                self.reply(503 if fake.broken else 200, "application/json", json.dumps(fake.status()).encode())
                return
            path = PAGE / ("index.html" if self.path == "/status" else Path(self.path).name)
            if path.exists():
                self.reply(200, TYPES[path.suffix], path.read_bytes())
            else:
                self.reply(404, "text/plain", b"")

        def reply(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", CONTENT_POLICY)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet: the browser polls."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.fail("no browser: install chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless",
        "--no-sandbox",  # the sandbox does not start as root
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    browser = Chrome(options=options, service=ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """A browser on an empty page, with a desktop's window and light colours."""
    look(chromium, 1120, 800)
    yield chromium
    chromium.get("about:blank")
    errors(chromium)


def look(browser: Chrome, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
    """Sets the window's size in CSS pixels, the colour scheme and whether it is a phone."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def errors(browser: Chrome) -> list[str]:
    """What the page complained of in the console since the last call; a refused policy is an error too."""
    entries: list[dict[str, str]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in entries if entry["level"] in {"SEVERE", "WARNING"}]
