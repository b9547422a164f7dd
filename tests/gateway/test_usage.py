"""What each key used, by the engine's own word, and nothing of it in a stream whose client did not ask."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat
from tests.gateway.test_access import CHAT, bearer, entry, keys_file, new_key
from tests.gateway.test_metrics import exposed

ALICE, FRONT = new_key(), new_key()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Replicas]:
    with Replicas(2) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def metered(fleet: Replicas) -> Iterator[Gateway]:
    entries = [entry("alice", ALICE, limits={"tokens_per_day": 10**9}), entry("front", FRONT, end_users=True)]
    with Gateway(fleet, files={"secrets/keys.json": keys_file(*entries).encode()}) as gateway:
        until(lambda: httpx.get(gateway.url + "/ready").json().get("ready") == 2, "ready")
        yield gateway


@pytest.fixture
def client(metered: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=metered.url, timeout=30) as session:
        yield session


def tokens(gateway: Gateway, key: str = "alice", **labels: str) -> dict[str, float]:
    """The key's tokens by kind, over all replicas."""
    found: dict[str, float] = {"prompt": 0, "cached": 0, "completion": 0}
    for series, value in exposed(gateway).items():
        if series.startswith("gateway_tokens_total"):
            have = dict(re.findall(r'([a-z_]+)="([^"]*)"', series))
            if have["key"] == key and labels.items() <= have.items():
                found[have["kind"]] += value
    return found


def chunks(client: httpx.Client, path: str = CHAT, **more: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    body = (
        chat("count me", stream=True, max_tokens=6, **more)
        if path == CHAT
        else {"model": "sim", "stream": True, "max_tokens": 6, **more}
    )
    text = client.post(path, json=body, headers=bearer(ALICE)).text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(("path", "more"), [(CHAT, {}), ("/v1/completions", {"prompt": "count me"})])
def test_a_stream_has_the_usage_that_its_client_asked_for(
    client: httpx.Client, path: str, more: dict[str, Any]
) -> None:
    plain = chunks(client, path, **more)
    last = chunks(client, path, stream_options={"include_usage": True}, **more)
    full = chunks(client, path, stream_options={"include_usage": True, "continuous_usage_stats": True}, **more)
    assert all(chunk["choices"] and "usage" not in chunk for chunk in plain)
    assert [bool(chunk.get("usage")) for chunk in last] == [False] * len(plain) + [True]
    assert (last[-1]["choices"], last[-1]["usage"]["completion_tokens"]) == ([], 6)
    assert sum(bool(chunk.get("usage")) for chunk in full) >= 7
    choices = [[choice for chunk in made for choice in chunk["choices"]] for made in (plain, last, full)]
    assert choices[0] == choices[1] == choices[2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("books")),
        (CHAT, chat("books", stream=True)),
        ("/v1/completions", {"model": "sim", "prompt": "books", "max_tokens": 3}),
        ("/v1/messages", {**chat("books"), "max_tokens": 4}),
        ("/v1/messages", {**chat("books"), "max_tokens": 4, "stream": True}),
        ("/v1/responses", {"model": "sim", "input": "books", "max_output_tokens": 4}),
        ("/v1/responses", {"model": "sim", "input": "books", "max_output_tokens": 4, "stream": True}),
    ],
)
def test_the_books_balance(
    client: httpx.Client, metered: Gateway, fleet: Replicas, path: str, body: dict[str, Any]
) -> None:
    """What the gateway meters is what the engines say they did, of any API, streamed or not."""

    def engines() -> tuple[float, float]:
        all_ = [sim.metrics() for sim in fleet]
        return (
            sum(one["vllm:prompt_tokens_total"] for one in all_),
            sum(one["vllm:generation_tokens_total"] for one in all_),
        )

    done, made = tokens(metered), engines()
    for _ in range(3):
        assert client.post(path, json=body, headers=bearer(ALICE)).status_code == 200
    now, after = tokens(metered), engines()
    # The gateway's own one-token requests are not a key's.
    prompts, completions = now["prompt"] - done["prompt"], now["completion"] - done["completion"]
    assert completions > 0
    assert prompts > 0
    assert completions <= after[1] - made[1] <= completions + 4
    assert prompts <= after[0] - made[0] <= prompts + 20


def test_a_client_that_hangs_up_is_metered(client: httpx.Client, metered: Gateway) -> None:
    before = tokens(metered)["completion"]
    with client.stream("POST", CHAT, json=chat("bye", stream=True, max_tokens=3000), headers=bearer(ALICE)) as answer:
        lines = answer.iter_lines()
        for _ in range(60):
            next(lines)
    until(lambda: 20 <= tokens(metered)["completion"] - before < 300, "the tokens are counted", 5)


def test_the_books_balance_for_mixed_traffic_with_hang_ups(metered: Gateway, fleet: Replicas) -> None:
    """What the engines did and nobody metered is at most what they make in the moment until they learn of a hang-up."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        (CHAT, chat("mixed")),
        (CHAT, chat("mixed", stream=True, max_tokens=60)),
        (CHAT, chat("mixed", stream=True, max_tokens=40, n=2)),
        ("/v1/completions", {"model": "sim", "prompt": "mixed", "stream": True, "max_tokens": 60}),
        ("/v1/messages", {**chat("mixed"), "stream": True, "max_tokens": 60}),
        ("/v1/responses", {"model": "sim", "input": "mixed", "max_output_tokens": 20}),
    ]

    def engines() -> tuple[float, float, float]:
        all_ = [sim.metrics() for sim in fleet]
        names = ("prompt_tokens_total", "generation_tokens_total", "num_requests_running")
        prompts, made, running = (sum(one[f"vllm:{name}"] for one in all_) for name in names)
        return prompts, made, running

    def one(number: int) -> bool:
        path, body = kinds[number % len(kinds)]
        # A stream of /v1/messages may tell the prompt's tokens only at its end.
        hang_up = bool(body.get("stream")) and path != "/v1/messages" and number % 5 == 0
        with httpx.stream("POST", metered.url + path, json=body, headers=bearer(ALICE), timeout=30) as answer:
            assert answer.status_code == 200
            for count, _ in enumerate(answer.iter_lines()):
                if hang_up and count > 20:
                    return True
        return False

    until(lambda: engines()[2] == 0, "the engines are idle")
    done, made = tokens(metered), engines()
    with ThreadPoolExecutor(8) as pool:
        hung_up = sum(pool.map(one, range(72)))
    assert hung_up > 5

    def settled() -> bool:
        idle = engines()[2] == 0
        counts = [
            value for series, value in exposed(metered).items() if series.startswith("gateway_requests_in_flight")
        ]
        return idle and not any(counts)

    until(settled, "all is over")
    now, after = tokens(metered), engines()
    completions, prompts = now["completion"] - done["completion"], now["prompt"] - done["prompt"]
    # The gateway's own one-token requests are not a key's.
    assert completions <= after[1] - made[1] <= completions + 10 * hung_up + 4
    assert prompts <= after[0] - made[0] <= prompts + 20


def test_end_users_are_told_apart_and_forged_ones_are_not_there(client: httpx.Client, metered: Gateway) -> None:
    for user in ("ann", "bob", "bob"):
        client.post(CHAT, json=chat("hi", max_tokens=3), headers={**bearer(FRONT), "X-End-User": user})
    client.post(CHAT, json=chat("hi", max_tokens=3), headers={**bearer(ALICE), "X-End-User": "ann"})
    assert tokens(metered, "front", end_user="ann")["completion"] == 3
    assert tokens(metered, "front", end_user="bob")["completion"] == 6
    assert tokens(metered, "alice", end_user="ann")["completion"] == 0


def test_a_holder_sees_its_limits_in_force_and_its_use(client: httpx.Client) -> None:
    assert client.get("/v1/usage").status_code == 401
    shown = client.get("/v1/usage", headers=bearer(ALICE)).json()
    assert (shown["key"], shown["role"], shown["models"]) == ("alice", "user", None)
    quota = shown["limits"]["key"]["tokens_per_day"]
    assert quota["limit"] == 10**9
    assert quota["used"] > 0
    assert quota["used"] + quota["reserved"] + quota["remaining"] == 10**9
    assert shown["tokens"]["completion"] > 0
    assert "front" not in json.dumps(shown)


def test_use_outlasts_a_restart() -> None:
    with Replicas(1) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        httpx.post(gateway.url + CHAT, json=chat("hi", max_tokens=5))
        assert tokens(gateway, "")["completion"] == 5
        gateway.restart()
        assert tokens(gateway, "")["completion"] == 5
