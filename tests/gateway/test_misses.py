"""Whose prompts should have been in a replica's cache and were not: by program, key and model, in few series."""

import re
import secrets
from collections.abc import Iterator

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT
from tests.gateway.conftest import chat
from tests.gateway.test_access import CHAT
from tests.gateway.test_metrics import exposed

RULES = "Answer in short sentences, name your sources, and never guess. " * 60


@pytest.fixture(scope="module")
def asked() -> Iterator[Gateway]:
    large = ["--max-model-len=500000", "--kv-blocks=60000", "--batch-tokens=500000", "--prefill-ms=0.002"]
    with Replicas(2, *large) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        yield gateway


def counted(gateway: Gateway, program: str) -> tuple[float, float]:
    """Tokens of a program's prompts that a cache should have had, and those that it had not."""
    found = {"expected": 0.0, "missed": 0.0}
    for series, value in exposed(gateway).items():
        match = re.match(r'gateway_(expected|missed)_cached_tokens_total{client="([^"]*)",', series)
        if match and match[2] == program:
            found[match[1]] += value
    return found["expected"], found["missed"]


def converse(gateway: Gateway, program: str, systems: list[str]) -> None:
    """A conversation that grows by a turn for each of these system prompts, which stand at its beginning."""
    turns: list[str] = []
    for number, system in enumerate(systems):
        turns.append(f"Question {number} of {program}")
        body = chat(*turns)
        body["messages"].insert(0, {"role": "system", "content": system})
        answer = httpx.post(gateway.url + CHAT, json=body, headers={"User-Agent": program}, timeout=30)
        assert answer.status_code == 200, answer.text
        turns.append(answer.json()["choices"][0]["message"]["content"])


def test_a_client_that_changes_its_beginning_each_turn_is_told_from_one_that_does_not(asked: Gateway) -> None:
    """Both hold the same conversation; a clock at the beginning, or amid the system prompt, costs the whole cache."""
    converse(asked, "curl/8.14.1", [RULES] * 5)
    converse(asked, "OpenAI/Python 3.54.0", [f"It is 12:0{minute}. {RULES}" for minute in range(5)])
    # the gateway takes samples of long texts, and the engine reads all
    half = len(RULES) // 2 + 200
    amid = [f"{RULES[:half]} It is 12:0{minute}. {RULES[half:]}" for minute in range(5)]
    converse(asked, "python-requests/2.34", amid)
    until(lambda: counted(asked, "requests")[0] > 0, "the last one is counted", 5)

    expected, missed = counted(asked, "curl")
    assert expected > 1000
    assert missed == 0
    for program, least in (("openai-python", 0.9), ("requests", 0.3)):
        expected, missed = counted(asked, program)
        assert expected > 1000, program
        assert missed / expected > least, program


def test_a_first_question_misses_nothing(asked: Gateway) -> None:
    """Nobody expects of a cache what nobody has sent before."""
    before = counted(asked, "go")
    body = chat(f"{secrets.token_hex(8)} {RULES}")
    httpx.post(asked.url + CHAT, json=body, headers={"User-Agent": "Go-http-client/2.0"}, timeout=30)
    httpx.post(asked.url + CHAT, json=body, headers={"User-Agent": "Go-http-client/2.0"}, timeout=30)
    until(lambda: counted(asked, "go")[0] > before[0], "the second one is counted", 5)
    assert counted(asked, "go")[1] == before[1]


def test_a_long_body_is_counted_too(asked: Gateway) -> None:
    """Its choice is made before an internal redirect, which forgets what is no variable."""
    body = chat("The gateway's book. " * 60_000, max_tokens=1)
    for _ in range(2):
        answer = httpx.post(asked.url + CHAT, json=body, headers={"User-Agent": "node"}, timeout=60)
        assert answer.status_code == 200, answer.text
    until(lambda: counted(asked, "node")[0] > 100_000, "the second one is counted", 5)


@pytest.mark.parametrize(
    ("agent", "program"),
    [
        ("claude-cli/2.1.197 (external, cli)", "claude-code"),
        ("codex_cli_rs/0.169.0 (Debian 12.0.0; x86_64) unknown", "codex"),
        ("AsyncOpenAI/Python 3.54.0", "openai-python"),
        ("ai/5.0.1 ai-sdk/provider-utils/3.0.0 runtime/node.js/24", "ai-sdk"),
        ("Python/3.11 aiohttp/3.14.5", "aiohttp"),
        ("Mozilla/5.0 (X11; Linux x86_64)", "browser"),
        ("made-up/1.0 OpenAI/Python", "other"),
        ("", "other"),
    ],
)
def test_programs_are_counted_in_families(asked: Gateway, agent: str, program: str) -> None:
    before = counted(asked, program)[0]
    for _ in range(2):
        httpx.post(asked.url + CHAT, json=chat(f"{agent} {RULES}"), headers={"User-Agent": agent}, timeout=30)
    until(lambda: counted(asked, program)[0] > before, f"one of {program} is counted", 5)


def test_the_series_are_bounded() -> None:
    """Beyond the last series keys and models are counted together, and nothing is lost."""
    text = (ROOT / "nginx/njs/misses.js").read_text()
    fewer = text.replace("const SERIES = 1000;", "const SERIES = 2;")
    assert fewer != text
    agents = ["curl/8", "node", "python-httpx/0.28.1", "Go-http-client/2.0"]
    with Replicas(1) as replicas, Gateway(replicas, files={"njs/misses.js": fewer.encode()}) as gateway:
        gateway.wait_ready()
        for agent in agents:
            for _ in range(2):
                httpx.post(gateway.url + CHAT, json=chat(RULES), headers={"User-Agent": agent}, timeout=30)
        until(lambda: counted(gateway, "go")[0] > 0, "the last one is counted", 5)
        models = [
            re.search(r'key="([^"]*)",model="([^"]*)"', series)
            for series in exposed(gateway)
            if series.startswith("gateway_expected_cached_tokens_total")
        ]
        assert sorted(match.groups() for match in models if match) == [("", "sim")] * 2 + [("other", "other")] * 2
