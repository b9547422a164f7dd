"""The simulated replica and the real one, asked the same: the model of time in lab/sim/engine.py holds."""

import asyncio
import random
import re
from statistics import median

from lab.http import get
from lab.sim.load import Outcome, session, stream, text
from lab.sim.replicas import Replicas
from lab.stack import Stack

ANSWER = 40  # tokens; of few all may come at once


async def ask(url: str, model: str, prompts: list[str], max_tokens: int) -> list[Outcome]:
    """All prompts at once."""

    async def one(prompt: str) -> Outcome:
        messages = [{"role": "user", "content": prompt}]
        body: dict[str, object] = {"model": model, "messages": messages, "max_tokens": max_tokens, "ignore_eos": True}
        outcome = await stream(client, url, body, patience=120)
        assert outcome.done, outcome.why
        return outcome

    async with session() as client:
        return await asyncio.gather(*map(one, prompts))


async def shape(url: str, model: str) -> dict[str, float]:
    """Seconds to the first token of short and long prompts, new and seen; seconds a token alone and in a batch. The
    middle of rounds that take turns, as others use this host."""
    rng = random.Random()
    rounds = []
    for _ in range(5):
        few, many = text(rng, 20), text(rng, 500)
        alone = (await ask(url, model, [few], ANSWER))[0]
        long = (await ask(url, model, [many], 1))[0]
        # A little more at its end: a replica that has its beginning need not compute it again.
        seen = (await ask(url, model, [many + " so"], 1))[0]
        batch = await ask(url, model, [text(rng, 20) for _ in range(24)], ANSWER)
        rounds.append(
            {
                "short": alone.ttft,
                "long": long.ttft,
                "seen": seen.ttft,
                "itl alone": itl(alone),
                "itl in a batch": median(map(itl, batch)),
            }
        )
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def itl(outcome: Outcome) -> float:
    """Mean seconds from one token to the next."""
    assert outcome.first
    assert outcome.last
    return (outcome.last - outcome.first) / (outcome.tokens - 1)


def test_time_has_the_same_shape(stack: Stack) -> None:
    """TTFT grows with the uncached prompt, a seen prefix cuts it, and tokens come slower in a batch: there and here."""
    with Replicas(1, "--prefill-ms", "0.5", "--seq-ms", "1") as fleet:
        simulated = asyncio.run(shape(fleet["vllm-0"].url, fleet.model))
    real = asyncio.run(shape(stack.url, stack.model))
    for found in (simulated, real):
        assert found["long"] > 2 * found["short"], found
        assert found["seen"] < 0.7 * found["long"], found
        assert found["itl in a batch"] > 1.3 * found["itl alone"], found


def test_every_simulated_metric_is_one_of_the_engines(stack: Stack) -> None:
    """What tests read of the simulated replica is there in the real one, under the same name and type."""
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
    real = stack.compose("exec", "-T", "vllm-0", "python3", "-c", code)
    with Replicas(1) as fleet:
        simulated = get(fleet["vllm-0"].url + "/metrics").decode()
    types = [set(re.findall(r"^# TYPE (vllm:\S+) (\S+)$", exposed, re.MULTILINE)) for exposed in (simulated, real)]
    assert len(types[0]) > 8
    assert types[0] <= types[1], types[0] - types[1]
