"""The simulated replica does what its docstring says: other tests stand on it."""

import asyncio
import json
import urllib.error
from collections.abc import Iterator

import pytest

from lab.http import get
from lab.sim.engine import BLOCK, TOKEN_BYTES, Blocks, Engine, Request, Shape, block_hashes
from lab.sim.load import Outcome, session, stream
from lab.sim.replica import priority_of
from lab.sim.replicas import Replicas
from lab.waiting import until

PROMPT = "a prompt of some length " * 60


@pytest.fixture
def fleet() -> Iterator[Replicas]:
    shape = "--step-ms 5 --prefill-ms 0.5 --max-waiting 2 --max-running 2"
    with Replicas(1, *shape.split()) as fleet:
        yield fleet


def ask(url: str, content: str = PROMPT, max_tokens: int = 5, count: int = 1) -> list[Outcome]:
    """`count` streamed requests at once."""
    body: dict[str, object] = {
        "model": "sim",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
    }

    async def run() -> list[Outcome]:
        async with session() as client:
            return await asyncio.gather(*(stream(client, url, body, 5.0) for _ in range(count)))

    return asyncio.run(run())


def test_a_prompt_seen_before_comes_from_the_cache_and_answers_the_same(fleet: Replicas) -> None:
    sim = fleet["vllm-0"]
    first, again = (ask(sim.url)[0] for _ in range(2))
    assert first.done
    assert (first.cached_tokens, first.tokens, first.answer) == (0, 5, again.answer)
    assert again.cached_tokens == (first.prompt_tokens - 1) // BLOCK * BLOCK
    assert again.ttft < first.ttft / 2  # some 10 ms against 180
    metrics = sim.metrics()
    assert metrics["vllm:prefix_cache_hits_total"] == again.cached_tokens
    assert metrics["vllm:generation_tokens_total"] == 10


def test_a_conversations_next_turn_hits_prompt_and_answer(fleet: Replicas) -> None:
    url = fleet["vllm-0"].url + "/v1/chat/completions"
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": "sim", "messages": messages, "max_tokens": 64}
    first = json.loads(get(url, json.dumps(body).encode()))
    messages += [first["choices"][0]["message"], {"role": "user", "content": "go on"}]
    usage = json.loads(get(url, json.dumps(body).encode()))["usage"]
    total = first["usage"]["total_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= total - 2 * BLOCK


def test_the_tokens_of_a_gateways_own_requests_are_told_from_its_clients(fleet: Replicas) -> None:
    """Only the clients' have an id."""
    sim = fleet["vllm-0"]
    body = json.dumps({"model": "sim", "prompt": "a", "max_tokens": 3}).encode()
    for headers in ({}, {"X-Request-Id": "r1"}, {}):
        get(sim.url + "/v1/completions", body, headers={"Content-Type": "application/json", **headers})
    assert sim.state()["tokens"] == 3
    assert sim.metrics()["vllm:generation_tokens_total"] == 9


def test_a_full_queue_answers_503(fleet: Replicas) -> None:
    outcomes = ask(fleet["vllm-0"].url, max_tokens=40, count=8)
    statuses = [outcome.status for outcome in outcomes]
    # two wait, and as many as two more run by then
    assert set(statuses) == {200, 503}
    assert 4 <= statuses.count(503) <= 6


def test_a_client_that_hangs_up_frees_its_place(fleet: Replicas) -> None:
    sim = fleet["vllm-0"]

    async def hang_up() -> None:
        body = {"model": "sim", "prompt": PROMPT, "max_tokens": 1000, "stream": True}
        async with session() as client, client.post(sim.url + "/v1/completions", json=body) as answer:
            await answer.content.readany()

    asyncio.run(hang_up())
    until(lambda: sim.metrics()["vllm:num_requests_running"] == 0, "no request runs")
    assert sim.metrics()["vllm:kv_cache_usage_perc"] == 0
    assert sim.state()["finished"]["abort"] == 1


def test_faults(fleet: Replicas) -> None:
    sim = fleet["vllm-0"]
    sim.fault("status", status=418)
    assert ask(sim.url)[0].status == 418
    sim.fault("cut", after_tokens=2)
    cut = ask(sim.url)[0]
    assert (cut.cut, cut.tokens) == (True, 2)
    for fault in ("reset", "garbage"):
        sim.fault(fault)
        assert ask(sim.url)[0].failed
    sim.fault("hang")
    assert get(sim.url + "/health") == b""
    sim.fault(health=503)
    with pytest.raises(urllib.error.HTTPError):
        get(sim.url + "/health")
    sim.fault()
    assert ask(sim.url)[0].done
    with pytest.raises(urllib.error.HTTPError):
        get(sim.url + "/_sim", b'{"falt": "hang"}')
    sim.fault("crash")
    until(sim.ended, "the process ends")


def test_the_oldest_blocks_are_dropped_first_and_a_tail_before_its_head() -> None:
    blocks = Blocks(4)
    size = BLOCK * TOKEN_BYTES
    one, other = (block_hashes(letter * 3 * size, []) for letter in (b"a", b"b"))
    for hashes in (one, other):
        assert blocks.admit([], 3)
        for digest in hashes:
            blocks.publish(digest)
        blocks.release(hashes, 0)
    assert blocks.prefix(other, 3) == other
    assert blocks.prefix(one, 3) == one[:1]
    assert not blocks.admit(other, 2)
    assert blocks.used == 0


def first_tokens(shape: Shape, *requests: tuple[str, int, int]) -> list[str]:
    """The names of requests in the order of their first tokens: (name, tokens of the prompt, priority), all at once."""

    async def run() -> list[str]:
        engine = Engine(shape)
        found = {}
        for name, tokens, priority in requests:
            prompt = (name * tokens * TOKEN_BYTES).encode()
            found[name] = Request(prompt, 8, b"x" * 8 * TOKEN_BYTES, 0.0, priority)
            engine.submit(found[name])
        working = asyncio.create_task(engine.run())
        for request in found.values():
            while await request.tokens.get() is not None:
                pass
        working.cancel()
        return sorted(found, key=lambda name: found[name].first_token_at)

    return asyncio.run(run())


def test_who_waits_begins_by_priority_and_then_by_arrival() -> None:
    shape = Shape(step_ms=1, max_running=1)
    assert first_tokens(shape, ("a", 10, 9), ("b", 10, 9), ("c", 10, 1), ("d", 10, -1)) == ["d", "c", "a", "b"]


def test_no_priority_takes_a_step_from_a_prompt_that_has_begun() -> None:
    """As in vLLM: who runs goes on, and who waits gets what tokens are left over."""

    async def late() -> tuple[float, float]:
        engine = Engine(Shape(step_ms=1, prefill_ms=0.05, batch_tokens=100))
        long = Request(b"l" * 400 * TOKEN_BYTES, 4, b"x" * 4 * TOKEN_BYTES, 0.0, 9)
        urgent = Request(b"u" * 10 * TOKEN_BYTES, 4, b"x" * 4 * TOKEN_BYTES, 0.0, -9)
        engine.submit(long)
        working = asyncio.create_task(engine.run())
        while not long.computed:
            await asyncio.sleep(0)
        engine.submit(urgent)
        for request in (long, urgent):
            while await request.tokens.get() is not None:
                pass
        working.cancel()
        return long.first_token_at, urgent.first_token_at

    first, urgent = asyncio.run(late())
    assert first < urgent


def test_the_header_says_a_requests_priority_before_its_body() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nX-Vllm-Priority: 7"
    assert priority_of(head, {"priority": 3}) == 7
    assert priority_of(b"POST /v1/completions HTTP/1.1", {"priority": 3}) == 3
    assert priority_of(b"POST /v1/completions HTTP/1.1", {}) == 0
