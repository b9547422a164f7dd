"""The /status page in a real browser: says why a request may be slow, reads on a phone, and needs nothing from outside.

With PICTURES=docs/pictures in the environment the pictures of the docs are taken anew.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from lab.http import KEY
from lab.stack import Stack
from lab.waiting import until
from tests.browser.conftest import CONTENT_POLICY, HURRY, FakeGateway, errors, look, replica, sign_in

BUSY: dict[str, Any] = {
    "in_flight": 8,
    "running": 6,
    "waiting": 2,
    "kv_usage": 0.62,
    "tokens_per_s": 104,
    "ttft_ms": 180,
}
FLEET = [
    replica("vllm-0", **BUSY | {"prefix_hit_rate": 0.71}),
    replica("vllm-1", **BUSY | {"prefix_hit_rate": 0.58, "kv_usage": 0.97, "waiting": 3, "tokens_per_s": 91}),
    replica("vllm-2", "wedged", reason="no token for 8 s although 2 requests run", in_flight=2, running=2),
    replica("vllm-3", "loading", reason="answers /health with 503", models=[]),
]


def text(browser: Chrome, element_id: str) -> str:
    return browser.find_element(By.ID, element_id).text


def card(browser: Chrome, name: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f'[data-replica="{name}"]')


def field(browser: Chrome, name: str, value: str) -> str:
    return card(browser, name).find_element(By.CSS_SELECTOR, f'[data-is="{value}"]').text


def await_text(browser: Chrome, element_id: str, wanted: str) -> None:
    until(lambda: wanted in text(browser, element_id), f"{wanted!r} in #{element_id}", 10)


def ready(n: int, **more: Any) -> dict[str, Any]:
    return replica(f"vllm-{n}", **more)


NEARLY_FULL = "The KV cache of vllm-0 is nearly full: requests may be put back."
WEDGED = replica("vllm-1", "wedged", reason="no token for 8 s")
LOADING = replica("vllm-1", "loading")
ASLEEP = replica("vllm-1", "asleep", reason="the next request wakes it")


@pytest.mark.parametrize(
    ("replicas", "level", "sentence"),
    [
        ([ready(0), ready(1)], "ok", "2 replicas ready, nothing to do."),
        ([ready(0, in_flight=1), ready(1)], "ok", "2 replicas ready, 1 request in work, none waits."),
        ([ready(0, waiting=7), ready(1, waiting=5)], "warn", "All replicas are busy: 12 requests wait."),
        ([ready(0, waiting=1)], "warn", "vllm-0 is busy: 1 request waits."),
        ([ready(0, waiting=3), ready(1)], "warn", "3 requests wait at vllm-0, while vllm-1 has room."),
        ([ready(0, waiting=3), ready(1, models=["embed"])], "warn", "vllm-0 is busy: 3 requests wait."),
        ([ready(0), WEDGED], "warn", "vllm-1 is wedged; vllm-0 carries all load."),
        ([ready(0), LOADING], "warn", "vllm-1 is loading; vllm-0 carries all load."),
        ([ready(0, waiting=2), WEDGED], "warn", "vllm-1 is wedged; vllm-0 carries all load, and 2 requests wait."),
        ([ready(0), WEDGED, ready(2)], "warn", "vllm-1 is wedged; the other 2 carry the load."),
        (
            [ready(0, kv_usage=0.99), ready(1)],
            "warn",
            NEARLY_FULL,
        ),
        (
            [ready(0, in_flight=1, ttft_ms=4200), ready(1, ttft_ms=600)],
            "warn",
            "vllm-0 is slow: first token after 4.2 s, 600 ms elsewhere.",
        ),
        ([ready(0, ttft_ms=4200), ready(1, ttft_ms=600)], "ok", "2 replicas ready, nothing to do."),
        ([ready(0), ready(1, state="stopped")], "ok", "1 replica ready, 1 stopped, nothing to do."),
        ([LOADING, WEDGED], "bad", "No replica is ready, 1 of 2 is loading: requests are refused until one is."),
        ([ready(0), ASLEEP], "ok", "1 replica ready, 1 asleep, nothing to do."),
        ([ready(0), ASLEEP, WEDGED | {"name": "vllm-2"}], "warn", "vllm-2 is wedged; vllm-0 carries all load."),
        ([ASLEEP], "ok", "vllm-1 sleeps: the first request wakes it."),
        (
            [ASLEEP | {"name": "vllm-0"}, ASLEEP, LOADING | {"name": "vllm-2"}],
            "warn",
            "vllm-0 and vllm-1 sleep: the first request for a model wakes it, and vllm-2 is away.",
        ),
        ([], "bad", "The gateway knows no replica: add one in nginx/fleet/."),
    ],
)
def test_verdict_says_why_requests_are_slow(
    replicas: list[dict[str, Any]], level: str, sentence: str, gateway: FakeGateway, browser: Chrome
) -> None:
    """One plain sentence, the gravest cause first; a mark and a word beside the colour."""
    gateway.replicas = replicas
    browser.get(f"{gateway.url}/status")
    await_text(browser, "sentence", sentence)
    verdict = browser.find_element(By.ID, "verdict")
    assert verdict.get_attribute("data-level") == level
    assert text(browser, "word") in browser.title
    mark = "return getComputedStyle(document.querySelector('#verdict .mark'), '::before').content"
    assert browser.execute_script(mark) == {"ok": '"✓"', "warn": '"!"', "bad": '"✕"'}[level]
    assert not errors(browser)


def test_refusals_show_while_they_happen(gateway: FakeGateway, browser: Chrome) -> None:
    """Refusals from before the page was opened are history; new ones are the reason now."""
    gateway.replicas = [ready(0, waiting=8)]
    gateway.refused = {"full": 40}
    browser.get(f"{gateway.url}/status")
    await_text(browser, "sentence", "vllm-0 is busy: 8 requests wait.")
    assert text(browser, "refused") == "Refused since the gateway started: 40 as all replicas were full."
    gateway.refused = {"full": 43}
    await_text(browser, "sentence", "All replicas are full: 3 requests refused in the last minute.")


def test_each_replica_shows_its_numbers(gateway: FakeGateway, browser: Chrome) -> None:
    """State with its reason, load, KV use, hits and speed stand on each card, in words and figures."""
    gateway.replicas = FLEET
    browser.get(f"{gateway.url}/status")
    await_text(browser, "ready", "2 of 4")
    assert text(browser, "waiting") == "5"
    assert text(browser, "tokens") == "195"
    assert field(browser, "vllm-0", "state") == "ready"
    assert field(browser, "vllm-0", "in_flight") == "8"
    assert field(browser, "vllm-0", "kv") == "62 %"
    assert field(browser, "vllm-0", "hits") == "71 %"
    assert field(browser, "vllm-0", "ttft") == "180 ms"
    assert field(browser, "vllm-2", "state") == "wedged"
    assert field(browser, "vllm-2", "reason") == "no token for 8 s although 2 requests run"
    assert field(browser, "vllm-3", "models") == "no model yet"
    bar = card(browser, "vllm-0").find_element(By.CSS_SELECTOR, "[role=meter]")
    assert bar.get_attribute("aria-valuenow") == "62"
    assert bar.find_element(By.TAG_NAME, "span").size["width"] == pytest.approx(0.62 * bar.size["width"], abs=2)


AIM = {"ttft_p95_seconds": 2, "itl_p95_seconds": 0.1, "availability": 0.999}


def stands(model: str, ttft: list[float], itl: list[float]) -> dict[str, Any]:
    """How a model stands, as /status.json says it: of first and next tokens [in time, all]."""
    return {"model": model, "objective": AIM, "ttft": ttft, "itl": itl}


def test_objectives_are_held_against_what_came_since_the_page_is_open(gateway: FakeGateway, browser: Chrome) -> None:
    """What was before does not count, a miss is marked, and without a request there is no figure."""
    gateway.replicas = [ready(0)]
    gateway.objectives = [stands("org/<b>quick", [900, 1000], [5000, 5000]), stands("idle", [7, 7], [90, 90])]
    browser.get(gateway.url + "/status")

    read = (
        "return [...document.querySelectorAll('#objectives tbody tr')].map((row) =>"
        " [...row.children].map((cell) => [cell.textContent.replaceAll('\\u00a0', ' '), cell.dataset.level || '']))"
    )

    def rows() -> list[list[list[str]]]:
        # at once: the page makes its rows anew each second
        found: list[list[list[str]]] = browser.execute_script(read)
        return found

    until(lambda: len(rows()) == 2, "two models are shown", 10)
    assert rows()[0][1] == ["– within 2.0 s, aim 95 %", "unknown"]
    gateway.objectives = [stands("org/<b>quick", [997, 1100], [5900, 6000]), stands("idle", [7, 7], [90, 90])]
    gateway.refused = {"failed": 1, "none_ready": 0, "limit": 50}
    until(lambda: rows()[0][1][1] == "ok" and "101" in rows()[0][3][0], "the new counts are shown", 10)
    assert rows()[0] == [
        ["org/<b>quick", ""],
        ["97 % within 2.0 s, aim 95 %", "ok"],
        ["90 % within 100 ms, aim 95 %", "bad"],
        ["99 % of 101 requests, aim 99.9 %", "bad"],
    ]
    assert rows()[1][1] == ["– within 2.0 s, aim 95 %", "unknown"]
    assert errors(browser) == []


def test_page_follows_the_fleet(gateway: FakeGateway, browser: Chrome) -> None:
    """Replicas come, go and change in the open page, and their charts grow."""
    gateway.replicas = [ready(0, tokens_per_s=50)]
    browser.get(f"{gateway.url}/status")
    await_text(browser, "ready", "1 of 1")
    gateway.replicas = [ready(0, tokens_per_s=80), ready(1)]
    await_text(browser, "ready", "2 of 2")
    stroke = card(browser, "vllm-0").find_element(By.CSS_SELECTOR, '[data-chart="tokens_per_s"] .stroke')
    until(lambda: (stroke.get_attribute("d") or "").count("L") >= 2, "three points in the chart", 10)
    gateway.replicas = [ready(1)]
    await_text(browser, "ready", "1 of 1")
    assert not browser.find_elements(By.CSS_SELECTOR, '[data-replica="vllm-0"]')
    assert not errors(browser)


def test_lost_gateway_is_said(gateway: FakeGateway, browser: Chrome) -> None:
    """Old numbers are not shown as new ones: the page says that it lost the gateway, and goes on when it is back."""
    gateway.replicas = [ready(0)]
    browser.get(f"{gateway.url}/status")
    await_text(browser, "word", "All well")
    gateway.broken = True
    await_text(browser, "sentence", "The gateway has not answered this page for")
    assert "stale" in (browser.find_element(By.TAG_NAME, "body").get_attribute("class") or "")
    gateway.broken = False
    await_text(browser, "word", "All well")


def test_names_are_text_and_not_markup(gateway: FakeGateway, browser: Chrome) -> None:
    """What replicas call themselves and their models cannot become part of the page."""
    gateway.replicas = [ready(0, models=["<img src=x onerror=alert(1)>"], reason="<b>")]
    browser.get(f"{gateway.url}/status")
    await_text(browser, "ready", "1 of 1")
    assert field(browser, "vllm-0", "models") == "<img src=x onerror=alert(1)>"
    assert not errors(browser)


@pytest.mark.parametrize("width", [320, 360, 768, 1120])
def test_nothing_sticks_out(width: int, gateway: FakeGateway, browser: Chrome) -> None:
    """No width needs a horizontal scroll, not even with long names."""
    long_model = replica("vllm-10", models=["organisation/A-very-long-model-name-Instruct-AWQ-int4-128k"], **BUSY)
    gateway.replicas = [*FLEET, long_model]
    look(browser, width, 740, phone=width < 500)
    browser.get(f"{gateway.url}/status")
    await_text(browser, "ready", "3 of 5")
    everything = "return [...document.querySelectorAll('body *')]"
    wide = everything + ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [element.get_attribute("outerHTML") for element in browser.execute_script(wide)] == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read(dark: bool, gateway: FakeGateway, browser: Chrome) -> None:
    """Every text has a contrast of 4.5 to its background (WCAG AA), in light and in dark."""
    gateway.replicas = FLEET
    look(browser, 1120, 800, dark=dark)
    browser.get(f"{gateway.url}/status")
    await_text(browser, "ready", "2 of 4")
    assert browser.execute_script(CONTRAST) == []


CONTRAST = """
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => parts(colour).slice(0, 3)
  .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((total, v, i) => total + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => {
  const colour = getComputedStyle(e).backgroundColor;
  return parts(colour)[3] === 0 ? behind(e.parentElement) : colour;
};
return [...document.querySelectorAll('body *')]
  .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => [light(getComputedStyle(e).color), light(behind(e)), e.textContent])
  .map(([a, b, text]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text])
  .filter(([contrast]) => contrast < 4.5);
"""


def test_pictures(gateway: FakeGateway, browser: Chrome, picture: Callable[[str], Path]) -> None:
    """A fleet under load; in the docs' picture after two minutes."""
    enough = 130 if "PICTURES" in os.environ else 20
    gateway.replicas, gateway.moving = FLEET[:3], True
    hurry = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": HURRY})
    try:
        look(browser, 1120, 100)
        browser.get(f"{gateway.url}/status")
        until(lambda: gateway.polls >= enough, f"{enough} polls", 60)
        assert picture("status.png").stat().st_size > 20_000
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", hurry)
    assert not errors(browser)


def test_real_gateway_serves_the_page(stack: Stack, browser: Chrome) -> None:
    """The running gateway serves the page under the same policy, and the page shows the running fleet."""
    assert httpx.get(f"{stack.url}/status").headers["Content-Security-Policy"] == CONTENT_POLICY
    browser.get(f"{stack.url}/status")
    if stack.headers:
        sign_in(browser, os.environ[KEY])
    replicas = stack.replicas()
    await_text(browser, "ready", f"{len(replicas)} of {len(replicas)}")
    assert {name: field(browser, name, "models") for name in replicas} == dict.fromkeys(replicas, stack.model)
    assert browser.find_element(By.ID, "verdict").get_attribute("data-level") in {"ok", "warn"}
    assert not errors(browser)


def test_where_keys_are_asked_for_the_page_signs_in(browser: Chrome, gateway: FakeGateway) -> None:
    """A wrong key is told, the right one shows the fleet, and it stays in the tab and out of the address."""
    gateway.replicas = [ready(0)]
    gateway.key = "right"
    browser.get(f"{gateway.url}/status")
    await_text(browser, "word", "Sign in")
    for key in ("wrong", "right"):
        sign_in(browser, key)
        await_text(
            browser, "sentence" if key == "wrong" else "word", "not taken here" if key == "wrong" else "All well"
        )
    assert not browser.find_element(By.ID, "sign-in").is_displayed()
    assert "right" not in browser.current_url
