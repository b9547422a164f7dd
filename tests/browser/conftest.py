"""A headless Chromium, and a gateway of a few lines that serves the page with a fleet that the test describes."""

import base64
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By

from lab.waiting import until
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
    """Serves the page's files; /status.json and a model to whoever has the `key`, if there is one, and the model
    alone to the `user_key`. All can be changed."""

    replicas: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    objectives: list[dict[str, Any]] = field(default_factory=list)
    broken: bool = False
    key: str = ""
    user_key: str = ""
    # What the model streams: the events' data. An int is the status of a refusal.
    answer: list[dict[str, Any]] | int = field(default_factory=list)
    # What it was asked.
    asked: list[dict[str, Any]] = field(default_factory=list)
    # Holds the stream open before its end.
    hold: threading.Event | None = None
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
        objectives = json.loads(json.dumps(self.objectives))
        return {"gateway": gateway, "models": ["SmolLM2-135M"], "objectives": objectives, "replicas": shown}


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in {"/status.json", "/v1/models"} and fake.key:
                key = str(self.headers["Authorization"]).removeprefix("Bearer ")
                if key not in {fake.key, fake.user_key}:
                    self.reply(401, "application/json", b"{}")
                    return
                if key != fake.key and self.path == "/status.json":
                    self.reply(403, "application/json", b"{}")
                    return
            if self.path == "/v1/models":
                self.reply(
                    200, "application/json", json.dumps({"data": [{"id": "SmolLM2-135M"}, {"id": "other"}]}).encode()
                )
                return
            if self.path == "/status.json":
                self.reply(503 if fake.broken else 200, "application/json", json.dumps(fake.status()).encode())
                return
            path = PAGE / ("index.html" if self.path == "/status" else Path(self.path).name)
            if path.exists():
                self.reply(200, TYPES[path.suffix], path.read_bytes())
            else:
                self.reply(404, "text/plain", b"")

        def do_POST(self) -> None:
            fake.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(fake.answer, int):
                message = {"error": {"message": "All replicas are full."}}
                self.reply(fake.answer, "application/json", json.dumps(message).encode())
                return
            self.send_response(200)
            for name, value in {
                "Content-Type": "text/event-stream", "X-Replica": "vllm-1", "X-Route-Reason": "prefix",
            }.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            for event in fake.answer:
                text = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
                # a chunk may end anywhere, within a letter too
                for piece in (text[: len(text) // 2], text[len(text) // 2 :]):
                    self.wfile.write(piece)
                    self.wfile.flush()
            if fake.hold:
                fake.hold.wait(20)
            self.wfile.write(b"data: [DONE]\n\n")

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
    # the next test signs in anew; an empty page has no storage
    with suppress(WebDriverException):
        chromium.execute_script("sessionStorage.clear()")
    chromium.get("about:blank")
    errors(chromium)


def sign_in(browser: Chrome, key: str) -> None:
    """Gives the page the key that it asks for."""
    field = browser.find_element(By.ID, "key")
    until(field.is_displayed, "the page asks for a key", 10)
    assert all("401" in error for error in errors(browser))
    field.send_keys(key)
    browser.find_element(By.CSS_SELECTOR, "#sign-in button").click()


@pytest.fixture
def picture(browser: Chrome, tmp_path: Path) -> Callable[[str], Path]:
    """Takes a picture of the whole page under a name."""
    folder = Path(os.environ.get("PICTURES", tmp_path))

    def take(name: str) -> Path:
        size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        path = folder / name
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    return take


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
