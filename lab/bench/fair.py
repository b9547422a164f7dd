"""Fair shares: what one key waits for its first token while another key floods the fleet.

The quiet key has one request at a time, with a pause of random length in between, so that it meets the engines at any
point of their steps. The flood's clients ask without a pause.
"""

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lab.bench.overhead import quantile
from lab.bench.workloads import counters, user
from lab.report import table
from lab.sim.gateway import Gateway
from lab.sim.keys import keyed
from lab.sim.load import Outcome, session, stream, text
from lab.sim.replicas import Replicas
from lab.waiting import until

QUIET, FLOOD = "quiet", "flood"
SHARES = ("p50", "p90")

INTRO = """# Fair shares

Written by `make bench ARGS='--parts {part}'`. {where}. One key
asks for one answer at a time, with up to {pause:g} s in between. The other one floods the fleet with {clients} requests
at once, {least:,.0f} to {most:,.0f} tokens in and {answer} out on average. The time to the first token of the
first key, in ms, alone and beside the flood, which began {settle:g} s before that.
"""


@dataclass(frozen=True)
class Mix:
    """What both keys ask: tokens of prompts and answers. The quiet key's prompts take turns; `pause` is the longest, in
    seconds, between two of its requests. The flood's prompts and answers are half to one and a half times as long.
    """

    prompts: tuple[int, ...] = (500, 2000)
    answer: int = 16
    pause: float = 0.2
    flood_prompt: int = 2000
    flood_answer: int = 128
    patience: float = 60.0


# A prompt of the flood fills a step, and two replicas run fewer requests than it has: each step is full.
SHAPE = (
    *("--step-ms", "20", "--seq-ms", "0.3", "--prefill-ms", "0.1", "--batch-tokens", "2048"),
    *("--max-running", "32", "--kv-blocks", "4096"),
)
SETTLE = 2.0  # seconds of a flood that are not counted


SIMULATED = Mix(answer=4, pause=0.1, flood_answer=64)
SIMULATED_CLIENTS = 48


@dataclass
class Waits:
    """The times to the first token, in seconds, of so many requests; inf where too few began. `lost` of them had
    no whole answer."""

    requests: int
    lost: int
    p50: float
    p90: float


@dataclass
class Shares:
    """The quiet key's waits by its prompts' tokens, alone and beside the flood, those of the flood, and the tokens that
    all replicas made in a second beside it."""

    alone: dict[int, Waits]
    beside: dict[int, Waits]
    flood: Waits
    tokens_per_s: float


def waits(outcomes: Sequence[Outcome]) -> Waits:
    """What these requests waited. One whose answer never began has waited for ever."""
    found = [one.ttft if one.begun else math.inf for one in outcomes] or [math.inf]
    lost = sum(not one.done for one in outcomes)
    return Waits(len(outcomes), lost, quantile(found, 0.5), quantile(found, 0.9))


async def quiet(
    urls: Sequence[str], model: str, key: str, mix: Mix, seed: int, seconds: float
) -> dict[int, list[Outcome]]:
    """The quiet key's requests for `seconds`, by the tokens of their prompts, and at least one of each; it asks `urls`
    in turn."""
    rng = random.Random(f"{seed} {QUIET}")
    found: dict[int, list[Outcome]] = {tokens: [] for tokens in mix.prompts}
    end = time.monotonic() + seconds
    async with session() as connection:
        first = rng.randrange(len(mix.prompts))
        sizes = itertools.cycle([*mix.prompts[first:], *mix.prompts[:first]])
        for url, tokens in zip(itertools.cycle(urls), sizes, strict=False):
            await asyncio.sleep(rng.uniform(0, mix.pause))
            if time.monotonic() > end and all(found.values()):
                break
            found[tokens].append(
                await stream(connection, url, asked(model, rng, tokens, mix.answer), mix.patience, key=key)
            )
    return found


async def flood(
    urls: Sequence[str], model: str, key: str, mix: Mix, seed: int, clients: Iterable[int], seconds: float
) -> list[Outcome]:
    """The flood of the clients of these numbers for `seconds`, or until it is cancelled: the requests that ended by
    then. What is on its way is hung up on."""
    found: list[Outcome] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {FLOOD} {number}")
        while time.monotonic() < end:
            tokens = round(mix.flood_prompt * rng.uniform(0.5, 1.5))
            answer = round(mix.flood_answer * rng.uniform(0.5, 1.5))
            one = await stream(
                connection, urls[number % len(urls)], asked(model, rng, tokens, answer), mix.patience, key=key
            )
            found.append(one)
            if not one.done:
                await asyncio.sleep(0.1)

    async with session() as connection:
        tasks = [asyncio.create_task(client(number)) for number in clients]
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    return found


def asked(model: str, rng: random.Random, tokens: int, answer: int) -> dict[str, object]:
    """A request of its own, none like another."""
    messages = [user(text(rng, tokens))]
    return {"model": model, "messages": messages, "max_tokens": answer, "temperature": 0, "ignore_eos": True}


async def shares(
    urls: Sequence[str],
    replicas: Sequence[str],
    model: str,
    keys: Mapping[str, str],
    mix: Mix,
    seed: int,
    seconds: float,
    clients: int,
) -> Shares:
    """The quiet key alone for `seconds`, then as long beside a flood of so many clients."""
    alone = await quiet(urls, model, keys[QUIET], mix, seed, seconds)
    flooding = asyncio.create_task(flood(urls, model, keys[FLOOD], mix, seed, range(clients), math.inf))
    await asyncio.sleep(SETTLE)
    before = await asyncio.to_thread(counters, replicas)
    beside = await quiet(urls, model, keys[QUIET], mix, seed + 1, seconds)
    after = await asyncio.to_thread(counters, replicas)
    flooding.cancel()
    found, now = ({tokens: waits(outcomes) for tokens, outcomes in some.items()} for some in (alone, beside))
    return Shares(found, now, waits(await flooding), (after.tokens - before.tokens) / (after.at - before.at))


def simulated(count: int, seeds: Sequence[int], seconds: float, gateway: bool = True) -> list[Shares]:
    """The shares of a run for each seed, on so many simulated replicas: through the gateway, or of who asks them in
    turn, all alike."""
    keys, files = keyed({QUIET: {}, FLOOD: {}, "lab": {"role": "admin"}})
    found = []
    with Replicas(count, *SHAPE) as fleet, Gateway(fleet, files=files, key=keys["lab"]) as running:
        running.wait_ready()
        replicas = [sim.url for sim in fleet]
        urls = [running.url] if gateway else replicas
        for seed in seeds:
            # Of a flood that was hung up on nothing may be left.
            until(lambda: not any(sim.metrics()["vllm:num_requests_running"] for sim in fleet), "idle replicas")
            found.append(
                asyncio.run(
                    shares(urls, replicas, fleet.model, keys, SIMULATED, seed, seconds, clients=SIMULATED_CLIENTS)
                )
            )
    return found


def report(found: Mapping[str, Sequence[Shares]]) -> str:
    """A row for each kind of fleet and prompt, over several runs of each; then the tokens that the fleet made."""
    rows, rates = [], []
    for name, runs in found.items():
        for tokens in runs[0].alone:
            pairs = [(one.alone[tokens], one.beside[tokens]) for one in runs]
            waited = [ms(some, share) for some in zip(*pairs, strict=True) for share in SHARES]
            ratios = sorted(beside.p90 / alone.p90 for alone, beside in pairs if math.isfinite(alone.p90))
            count, lost = (sum(getattr(wait, what) for pair in pairs for wait in pair) for what in ("requests", "lost"))
            worst = "no answer alone"
            if ratios:
                worst = f"{times(median(ratios))} × ({times(ratios[0])} to {times(ratios[-1])})"
            rows.append([f"{name}, {tokens:,} tokens", *waited, worst, str(count), str(lost)])
        flood = ms([one.flood for one in runs], "p50")
        rates.append([name, f"{median(one.tokens_per_s for one in runs):,.0f}", flood])
    heads = ["alone, p50", "p90", "beside the flood, p50", "p90", "p90 by p90 alone", "requests", "lost"]
    return f"{table(['', *heads], rows)}\n{table(['', 'tokens/s of both', 'TTFT p50 of the flood'], rates)}"


def ms(some: Sequence[Waits], share: str) -> str:
    """The median of some runs in milliseconds, or in words why there is none."""
    if not sum(one.requests for one in some):
        return "no request ended"
    middle = median(getattr(one, share) for one in some if one.requests)
    return f"{1000 * middle:,.0f}" if math.isfinite(middle) else "no answer"


def times(ratio: float) -> str:
    """A ratio; one without end is a request that got no answer."""
    return f"{ratio:.2f}" if math.isfinite(ratio) else "no answer"


def intro(part: str, where: str, mix: Mix, clients: int) -> str:
    """What stands above the tables."""
    lengths = {"least": mix.flood_prompt / 2, "most": mix.flood_prompt * 1.5, "answer": mix.flood_answer}
    return INTRO.format(part=part, where=where, pause=mix.pause, clients=clients, settle=SETTLE, **lengths)
