"""The simulated replica does what its docstring says: other tests stand on it."""

import asyncio
import json
import urllib.error
from collections.abc import Iterator

import pytest

from lab.http import get
from lab.sim.engine import BLOCK, TOKEN_BYTES, Blocks, block_hashes
from lab.sim.load import Outcome, session, stream
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
