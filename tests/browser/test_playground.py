"""The chat on the /status page, in a real browser."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from lab.http import KEY
from lab.stack import Stack
from lab.waiting import until
from tests.browser.conftest import FakeGateway, errors, look, replica, sign_in


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


USAGE = {"prompt_tokens": 31, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}
ANSWER = [says("Grüße, "), says("<b>"), says("Welt"), {"choices": [], "usage": USAGE}]


@pytest.fixture
def fleet(gateway: FakeGateway) -> FakeGateway:
    gateway.replicas = [replica("vllm-0"), replica("vllm-1")]
    gateway.answer = ANSWER
    return gateway


def open_page(browser: Chrome, url: str) -> None:
    browser.get(f"{url}/status")
    until(browser.find_element(By.ID, "play").is_displayed, "the chat shows", 10)


def ask(browser: Chrome, question: str) -> None:
    browser.find_element(By.ID, "prompt").send_keys(question)
    browser.find_element(By.ID, "send").click()


def last(browser: Chrome, what: str) -> str:
    return browser.find_elements(By.CSS_SELECTOR, f".turn .{what}")[-1].text


def await_last(browser: Chrome, what: str, wanted: str) -> None:
    until(lambda: wanted in last(browser, what), f"{wanted!r} in .{what}", 10)


def test_an_answer_comes_with_its_times_and_its_replica(browser: Chrome, fleet: FakeGateway) -> None:
    open_page(browser, fleet.url)
    ask(browser, "Hello")
    await_last(browser, "facts", "by vllm-1, which knows the beginning of this chat")
    # text, never markup
    assert last(browser, "answer") == "Grüße, <b>Welt"
    facts = last(browser, "facts")
    assert facts.startswith("first token after ")
    assert "31 tokens in (16 from the cache), 3 out" in facts
    assert "tokens/s" in facts
    assert not errors(browser)


def test_the_chat_goes_on_and_begins_anew(browser: Chrome, fleet: FakeGateway) -> None:
    open_page(browser, fleet.url)
    for question in ("One", "Two"):
        ask(browser, question)
        await_last(browser, "facts", "vllm-1")
    browser.find_element(By.ID, "anew").click()
    assert not browser.find_elements(By.CLASS_NAME, "turn")
    ask(browser, "Three")
    await_last(browser, "facts", "vllm-1")
    said = [[message["content"] for message in body["messages"]] for body in fleet.asked]
    assert said == [["One"], ["One", "Grüße, <b>Welt", "Two"], ["Three"]]
    assert all(body["stream"] and body["model"] == "SmolLM2-135M" for body in fleet.asked)


def test_an_answer_can_be_stopped_and_the_chat_goes_on_from_there(browser: Chrome, fleet: FakeGateway) -> None:
    fleet.hold = threading.Event()
    open_page(browser, fleet.url)
    ask(browser, "One")
    await_last(browser, "answer", "Welt")
    browser.find_element(By.ID, "send").click()
    await_last(browser, "facts", "Stopped.")
    fleet.hold.set()
    fleet.hold = None
    ask(browser, "Two")
    await_last(browser, "facts", "vllm-1")
    assert [message["content"] for message in fleet.asked[1]["messages"]] == ["One", "Grüße, <b>Welt", "Two"]


@pytest.mark.parametrize("answer", [429, [says("Gr"), {"error": {"message": "All replicas are full."}}]])
def test_a_failure_is_told_in_the_gateways_words(browser: Chrome, fleet: FakeGateway, answer: Any) -> None:
    fleet.answer = answer
    open_page(browser, fleet.url)
    ask(browser, "Hello")
    await_last(browser, "facts", "All replicas are full.")
    assert browser.find_element(By.CSS_SELECTOR, ".turn.failed")


def test_a_users_key_opens_the_chat_and_not_the_status(browser: Chrome, fleet: FakeGateway) -> None:
    fleet.key, fleet.user_key = "admin", "user"
    browser.get(f"{fleet.url}/status")
    until(lambda: browser.find_element(By.ID, "word").text == "Sign in", "it asks for a key", 10)
    assert not browser.find_element(By.ID, "play").is_displayed()
    sign_in(browser, "user")
    until(browser.find_element(By.ID, "play").is_displayed, "the chat shows", 10)
    assert browser.find_element(By.ID, "sentence").text == "Your key may use models. The status is for admins."
    ask(browser, "Hello")
    await_last(browser, "facts", "vllm-1")
    assert not browser.find_elements(By.CSS_SELECTOR, "[data-replica]")


def test_it_fits_a_phone(browser: Chrome, fleet: FakeGateway) -> None:
    look(browser, 360, 740, phone=True)
    fleet.answer = [says("long" * 200), {"choices": [], "usage": USAGE}]
    open_page(browser, fleet.url)
    ask(browser, "a" * 200)
    await_last(browser, "facts", "vllm-1")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_a_real_model_answers_through_the_real_gateway(
    browser: Chrome, stack: Stack, picture: Callable[[str], Path]
) -> None:
    look(browser, 400, 100, dark=True, phone=True)
    browser.get(f"{stack.url}/status")
    if stack.headers:
        sign_in(browser, os.environ[KEY])
    until(browser.find_element(By.ID, "play").is_displayed, "the chat shows", 10)
    ask(browser, "What is the capital of France?")
    until(lambda: " by vllm-" in last(browser, "facts"), "an answer and its facts", 90)
    assert last(browser, "answer")
    assert "first token after" in last(browser, "facts")
    assert not errors(browser)
    browser.execute_script("document.querySelector('#replicas').remove()")
    assert picture("chat.png").stat().st_size > 10_000
