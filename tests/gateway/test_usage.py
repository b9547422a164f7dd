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
    found: dict[str, float] = {"prompt": 0, "cached": 0, "completion": 0, "repeated": 0}
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


@pytest.mark.parametrize(
    ("path", "more"),
    [(CHAT, {}), ("/v1/completions", {"prompt": "bye"}), ("/v1/messages", {}),
     ("/v1/responses", {"input": "bye " * 40, "max_output_tokens": 3000})],
)  # fmt: skip
def test_a_client_that_hangs_up_is_metered(
    client: httpx.Client, metered: Gateway, path: str, more: dict[str, Any]
) -> None:
    before = tokens(metered)
    body = chat("bye", stream=True, max_tokens=3000, **more)
    with client.stream("POST", path, json=body, headers=bearer(ALICE)) as answer:
        lines = answer.iter_lines()
        for _ in range(80):
            next(lines)

    def gained(kind: str) -> float:
        return tokens(metered)[kind] - before[kind]

    until(lambda: 5 <= gained("completion") < 300, "the tokens are counted", 5)
    # The simulated replica tells the prompt of /v1/messages at the end only.
    assert path == "/v1/messages" or 0 < gained("prompt") < 200


LONG: dict[str, Any] = {"stream": True, "max_tokens": 120}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
MIXED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat("mixed", max_tokens=60)),
    (CHAT, {**chat("mixed", "and", "on"), **LONG}),
    (CHAT, {**chat("mixed"), **LONG, "tools": TOOLS}),
    ("/v1/completions", {"model": "sim", "prompt": ["mixed", "twice"], **LONG}),
    ("/v1/messages", {**chat("mixed"), **LONG}),
    ("/v1/responses", {"model": "sim", "input": "mixed", "max_output_tokens": 60}),
]
HANG_UPS = (1, 2, 61, 63)  # of APIs whose every event tells the usage


def test_the_books_balance_for_mixed_traffic_with_hang_ups_and_retries(metered: Gateway, fleet: Replicas) -> None:
    """To 0.1 %: what the engines did and nobody metered is a token or two of each hang-up, made before they knew."""

    def books() -> tuple[float, float, int]:
        """Tokens that the engines counted and those that were metered, and how many requests the engines finished or
        were left with more than were counted."""
        page, engines, own = exposed(metered), [sim.metrics() for sim in fleet], tokens(metered)
        probes = sum(value for series, value in page.items() if re.match(r"gateway_probes_total.*=\"token\"", series))
        made = sum(one["vllm:prompt_tokens_total"] + one["vllm:generation_tokens_total"] for one in engines)
        counted = sum(value for series, value in page.items() if series.startswith("gateway_key_requests_total"))
        finished = sum(sum(sim.state()["finished"].values()) for sim in fleet)
        # A probe is one token that makes one more.
        return made - 2 * probes, own["prompt"] + own["completion"], round(finished - probes - counted)

    def idle() -> bool:
        running = sum(sim.metrics()["vllm:num_requests_running"] for sim in fleet)
        flying = [value for series, value in exposed(metered).items() if "requests_in_flight" in series]
        return not running and not any(flying)

    def one(number: int) -> bool:
        path, body = MIXED[number % len(MIXED)]
        if number == 40:
            fleet["vllm-0"].fault("status", status=503)
        if number == 80:
            fleet["vllm-0"].fault()
        with httpx.stream("POST", metered.url + path, json=body, headers=bearer(ALICE), timeout=30) as answer:
            assert answer.status_code == 200
            events = 0
            for line in answer.iter_lines():
                events += line.startswith("data:")
                if number in HANG_UPS and events > 60:
                    return True
        return False

    until(idle, "the engines are idle")
    before, retried = books(), retries(metered)
    with ThreadPoolExecutor(20) as pool:
        hung_up = sum(pool.map(one, range(150)))
    assert hung_up == len(HANG_UPS)
    until(idle, "all is over")
    assert retries(metered) > retried
    made, counted, requests = (now - then for now, then in zip(books(), before, strict=True))
    assert made > 10_000
    assert requests == 0
    assert 0 <= made - counted <= 0.001 * made, (made, counted, hung_up)


def retries(gateway: Gateway) -> float:
    """Tries that failed before the first byte."""
    return sum(value for series, value in exposed(gateway).items() if series.startswith("gateway_retries_total"))


def test_a_prompt_that_has_several_answers_is_used_once_and_computed_for_each(
    client: httpx.Client, metered: Gateway
) -> None:
    """The engine counts it for each of `n`, so the books need the rest; nobody is charged for it."""
    for path, body, more in (
        (CHAT, chat("several", n=3), 2),
        (CHAT, chat("several", n=3, stream=True), 2),
        ("/v1/completions", {"model": "sim", "prompt": "several", "n": "2", "max_tokens": 2}, 1),
        ("/v1/messages", {**chat("several"), "n": 3}, 0),
        (CHAT, chat("several"), 0),
    ):
        before = tokens(metered)
        assert client.post(path, json=body, headers=bearer(ALICE)).status_code == 200
        now = tokens(metered)
        prompt = now["prompt"] - before["prompt"]
        assert prompt > 0
        assert now["repeated"] - before["repeated"] == more * prompt, body
    assert "repeated" not in client.get("/v1/usage", headers=bearer(ALICE)).json()["tokens"]


def audio(**fields: str) -> dict[str, Any]:
    """A request with a sound, as keywords of httpx."""
    return {"data": {"model": "sim", **fields}, "files": {"file": ("a.wav", b"RIFF" * 1000)}}


QUESTION = {"model": "sim", "query": "a", "documents": ["b"], "input": "a", "data_1": "a", "data_2": "b"}


@pytest.mark.parametrize(
    ("path", "asked", "used"),
    [
        *((path, {"json": QUESTION}, {"prompt": 7}) for path in (
            "/v1/embeddings", "/pooling", "/classify", "/v2/embed", "/generative_scoring",
            "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
        )),
        ("/v1/embeddings", {"json": {**QUESTION, "encoding_format": "bytes"}}, {"prompt": 7}),
        ("/v1/systemone", {"json": QUESTION}, {"prompt": 7, "completion": 2}),
        ("/v1/audio/transcriptions", audio(), {"audio_seconds": 4}),
        ("/v1/audio/transcriptions", audio(response_format="verbose_json"), {"audio_seconds": 4}),
        ("/v1/audio/translations", audio(response_format="verbose_json"), {"audio_seconds": 4}),
        *((path, {"json": chat("x")}, {}) for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens")),
    ],
)  # fmt: skip
def test_every_other_path_is_metered_too(
    client: httpx.Client, metered: Gateway, path: str, asked: dict[str, Any], used: dict[str, int]
) -> None:
    """In tokens, or in seconds of sound, as the engine says it, and nothing that it answers is unmetered."""

    def now() -> dict[str, float]:
        holder: dict[str, float] = client.get("/v1/usage", headers=bearer(ALICE)).json()["tokens"]
        return {**holder, "unmetered": exposed(metered)["gateway_unmetered_total"]}

    before = now()
    assert client.post(path, headers=bearer(ALICE), **asked).status_code == 200
    gained = {kind: value - before.get(kind, 0) for kind, value in now().items()}
    assert {kind: value for kind, value in gained.items() if value} == {"requests": 1, **used}


def test_seconds_of_sound_are_a_metric(client: httpx.Client, metered: Gateway) -> None:
    def heard() -> float:
        series = exposed(metered).items()
        return sum(v for name, v in series if name.startswith("gateway_audio_seconds_total") and 'key="front"' in name)

    before = heard()
    assert client.post("/v1/audio/transcriptions", headers=bearer(FRONT), **audio()).status_code == 200
    # A request is counted when its answer is out.
    until(lambda: heard() == before + 4, "the seconds are counted", 5)


def test_what_says_nothing_of_its_use_is_counted_as_such(client: httpx.Client, metered: Gateway) -> None:
    before = exposed(metered)["gateway_unmetered_total"]
    assert client.post("/v1/audio/translations", headers=bearer(ALICE), **audio()).status_code == 200
    assert exposed(metered)["gateway_unmetered_total"] == before + 1


def test_end_users_are_told_apart_and_forged_ones_are_not_there(client: httpx.Client, metered: Gateway) -> None:
    for user in ("ann", "bob", "bob"):
        client.post(CHAT, json=chat("hi", max_tokens=3), headers={**bearer(FRONT), "X-End-User": user})
    client.post(CHAT, json=chat("hi", max_tokens=3), headers={**bearer(ALICE), "X-End-User": "ann"})
    assert tokens(metered, "front", end_user="ann")["completion"] == 3
    assert tokens(metered, "front", end_user="bob")["completion"] == 6
    assert tokens(metered, "alice", end_user="ann")["completion"] == 0


def test_a_holder_sees_its_limits_in_force_and_its_use(client: httpx.Client) -> None:
    assert client.get("/v1/usage").status_code == 401
    assert client.post(CHAT, json=chat("hi"), headers=bearer(ALICE)).status_code == 200

    def counted() -> Any:
        shown = client.get("/v1/usage", headers=bearer(ALICE)).json()
        return shown if shown["tokens"].get("completion") else None

    shown = until(counted, "the request is counted", 5)
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
