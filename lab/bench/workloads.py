"""Streams of conversations as users send them, and what the replicas made of them.

Every peer gets the same conversations: a client's prompts depend on the seed, the workload and the client's number.
Clients send one request after the other without a pause, so a faster fleet answers more of them. Only the requests of
the trace come when they are due, however busy the fleet is.
"""

import asyncio
import contextlib
import itertools
import random
import re
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

from lab.bench.overhead import quantile
from lab.http import get
from lab.sim.load import Outcome, session, stream, text

Message = dict[str, str]
# What a client asks next, given the answer to what it asked last; and the most tokens it wants.
Client = Generator[tuple[list[Message], int], str, None]


@dataclass(frozen=True)
class Sizes:
    """A workload's measures: `tokens` scales prompts, `answers` answers, `shared` the number of shared prefixes."""

    tokens: float = 1.0
    answers: float = 1.0
    shared: float = 1.0

    def prompt(self, rng: random.Random, tokens: int) -> str:
        """A text of about `tokens` tokens, scaled."""
        return text(rng, max(4, int(tokens * self.tokens)))

    def answer(self, rng: random.Random, tokens: int) -> int:
        """Half to one and a half times as long: were all alike, those begun together would end and begin together."""
        return max(4, int(tokens * rng.uniform(0.5, 1.5) * self.answers))

    def texts(self, rng: random.Random, count: int, tokens: int) -> list[str]:
        """`count` texts, scaled, of `tokens` tokens each."""
        return [self.prompt(rng, tokens) for _ in range(max(2, int(count * self.shared)))]


def user(content: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    """A system prompt."""
    return {"role": "system", "content": content}


def chats(rng: random.Random, _: random.Random, sizes: Sizes) -> Client:
    """Conversations of six turns, each with its own beginning."""
    while True:
        messages = [system(sizes.prompt(rng, 300))]
        for _turn in range(6):
            messages.append(user(sizes.prompt(rng, 100)))
            answer = yield messages, sizes.answer(rng, 40)
            messages.append({"role": "assistant", "content": answer})


def shared_prompts(rng: random.Random, common: random.Random, sizes: Sizes) -> Client:
    """Twelve system prompts of 1,500 tokens, and a question of its own after one of them."""
    prompts = sizes.texts(common, 12, 1500)
    while True:
        yield [system(rng.choice(prompts)), user(sizes.prompt(rng, 60))], sizes.answer(rng, 40)


def random_prompts(rng: random.Random, _: random.Random, sizes: Sizes) -> Client:
    """Nothing in common: affinity has nothing to win, and must not lose."""
    while True:
        yield [user(sizes.prompt(rng, rng.randint(300, 800)))], sizes.answer(rng, 40)


def hot_prefix(rng: random.Random, common: random.Random, sizes: Sizes) -> Client:
    """One prefix of 2,000 tokens on every request: all to one replica would be the wrong answer."""
    prefix = sizes.prompt(common, 2000)
    while True:
        yield [system(prefix), user(sizes.prompt(rng, 50))], sizes.answer(rng, 40)


def long_and_short(rng: random.Random, _: random.Random, sizes: Sizes) -> Client:
    """One in five prompts is of 3,000 tokens, the others of 60."""
    while True:
        if rng.random() < 0.2:
            yield [user(sizes.prompt(rng, 3000))], sizes.answer(rng, 30)
        else:
            yield [user(sizes.prompt(rng, 60))], sizes.answer(rng, 60)


def kv_pressure(rng: random.Random, common: random.Random, sizes: Sizes) -> Client:
    """Questions to 48 documents of 2,000 tokens: three times what one replica's cache holds, less than the fleet's."""
    documents = sizes.texts(common, 48, 2000)
    while True:
        yield [system(rng.choice(documents)), user(sizes.prompt(rng, 40))], sizes.answer(rng, 20)


@dataclass(frozen=True)
class Turn:
    """A request of the trace: when it is due, in seconds from the start, in which conversation, what its user adds and
    the most tokens of its answer. `system` is the system prompt of all.
    """

    due: float
    talk: int
    system: str
    says: str
    tokens: int


# What follows is the shape of Mooncake's published trace of conversations (FAST '25; conversation_trace.jsonl in the
# folder FAST25-release of github.com/kvcache-ai/Mooncake: 12,031 requests in an hour), read off 150 of its rows from
# two places. Lengths in tokens, each as its minimum, its quantiles at QUANTILES, and its maximum.
QUANTILES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
FIRST = (890, 917, 1087, 2651, 7324, 15172, 24246, 27701, 30000)  # a conversation's first prompt; 87,000 in the trace
MORE = (20, 40, 80, 235, 643, 1076, 3218, 6204, 10000)  # what a later prompt adds, without the answer before it
ANSWER = (1, 3, 14, 145, 355, 475, 700, 850, 1000)
SYSTEM = 880  # tokens that all prompts begin with: the first block of 512 is one and the same, and none is below 890
GOES_ON = 0.36  # of conversations, after each answer: three in eight requests are later turns
# Seconds between two turns: half are below the first; the logarithm's standard deviation. 170 s in the trace: a row of
# the bench lasts a minute, not an hour.
PAUSE = (8.5, 1.1)
# All stamps of the trace lie three seconds apart, so requests come in bursts of ten, give or take five.
BURST, BURST_SPREAD = 10, 5


def draw(rng: random.Random, quantiles: Sequence[float]) -> float:
    """A value of the distribution that has these at QUANTILES, straight between them."""
    share = rng.random()
    at = max(index for index, one in enumerate(QUANTILES) if one <= share)
    part = (share - QUANTILES[at]) / (QUANTILES[at + 1] - QUANTILES[at])
    return quantiles[at] + part * (quantiles[at + 1] - quantiles[at])


def trace(seed: int, seconds: float, rate: float, sizes: Sizes) -> list[Turn]:
    """The requests of `seconds`, `rate` a second on average, in the order in which they are due.

    Conversations that grow, all with one system prompt, of 900 to 30,000 tokens, in bursts: the shape of a public trace
    of conversations (Mooncake's).
    """
    rng = random.Random(f"{seed} trace")
    common = sizes.prompt(rng, SYSTEM)
    turns = []
    talk = 0
    interval = BURST / rate
    for burst in range(int(seconds / interval)):
        # Gamma's mean is the product of its two, its variance the product with the second squared; half a burst begins
        # conversations, the rest is drawn towards it by what they add later.
        size = rng.gammavariate((BURST / BURST_SPREAD) ** 2, BURST_SPREAD**2 / BURST)
        for _ in range(round(size * (1 - GOES_ON))):
            at, tokens, length = burst, draw(rng, FIRST) - SYSTEM, float(SYSTEM)
            while at * interval < seconds and length + tokens <= FIRST[-1]:
                answer = draw(rng, ANSWER)
                length += tokens + answer
                says = sizes.prompt(rng, round(tokens))
                turns.append(Turn(at * interval, talk, common, says, max(1, round(answer * sizes.answers))))
                if rng.random() > GOES_ON:
                    break
                at += 1 + int(PAUSE[0] * rng.lognormvariate(0, PAUSE[1]) / interval)
                tokens = draw(rng, MORE)
            talk += 1
    return sorted(turns, key=lambda turn: turn.due)


Workload = Callable[[random.Random, random.Random, Sizes], Client]

WORKLOADS: dict[str, Workload] = {
    "many-turn chats": chats,
    "shared system prompts": shared_prompts,
    "random prompts": random_prompts,
    "one hot prefix": hot_prefix,
    "long and short mixed": long_and_short,
    "KV pressure": kv_pressure,
}

# A replica for the workloads: prompts at 10,000 tokens/s, 20 ms a step, a cache of 32k tokens.
SHAPE = (
    *("--step-ms", "20", "--seq-ms", "0.3", "--prefill-ms", "0.1", "--batch-tokens", "2048"),
    *("--max-running", "32", "--kv-blocks", "2048"),
)

# A replica for the trace: prompts at 50,000 tokens/s, 10 ms a step, a cache of 262k tokens.
TRACE_SHAPE = (
    *("--step-ms", "10", "--seq-ms", "0.1", "--prefill-ms", "0.02", "--batch-tokens", "8192"),
    *("--max-running", "64", "--kv-blocks", "16384"),
)


@dataclass
class Cell:
    """One peer on one workload, over the measured time: rates in 0..1, seconds, tokens a second."""

    requests: int
    lost: int
    hit_rate: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tokens_per_s: float
    spread: float


@dataclass
class Counters:
    """What the replicas had counted at one moment."""

    at: float
    queries: float = 0.0
    hits: float = 0.0
    tokens: float = 0.0
    requests: list[float] = field(default_factory=list)


def totals(url: str) -> dict[str, float]:
    """A replica's own metrics by name, summed over their labels."""
    sums: dict[str, float] = {}
    page = get(url + "/metrics").decode()
    for name, value in re.findall(r"^(vllm:\w+)(?:\{[^}]*\})? (\S+)$", page, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def counters(urls: Sequence[str]) -> Counters:
    """What these replicas have counted by now, all together."""
    now = Counters(time.monotonic())
    for url in urls:
        sums = totals(url)
        now.queries += sums["vllm:prefix_cache_queries_total"]
        now.hits += sums["vllm:prefix_cache_hits_total"]
        now.tokens += sums["vllm:generation_tokens_total"]
        now.requests.append(sums["vllm:request_success_total"])
    return now


async def drive(
    urls: Sequence[str],
    model: str,
    workload: Workload,
    seed: int,
    clients: Iterable[int],
    seconds: float,
    sizes: Sizes,
) -> list[Outcome]:
    """Lets the clients of these numbers ask `urls` (taken in turn) for `seconds`; the requests that ended by then."""
    outcomes: list[Outcome] = []
    turns = itertools.cycle(urls)
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        own = random.Random(f"{seed} {workload.__name__} {number}")
        common = random.Random(f"{seed} {workload.__name__}")
        asks = workload(own, common, sizes)
        messages, tokens = next(asks)
        # asked for too, as Python's wait_for before 3.12 may swallow that the task is cancelled
        while time.monotonic() < end:
            body: dict[str, object] = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
            body["ignore_eos"] = True
            outcome = await stream(connection, next(turns), body, patience=60)
            outcomes.append(outcome)
            if not outcome.done:
                await asyncio.sleep(0.1)
            messages, tokens = asks.send(outcome.answer)

    async with session() as connection:
        tasks = [asyncio.create_task(client(number)) for number in clients]
        try:
            await asyncio.sleep(seconds)
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks)
    return outcomes


async def replay(urls: Sequence[str], model: str, turns: Sequence[Turn], start: float | None = None) -> list[Outcome]:
    """Sends the turns of a trace to `urls` (taken in turn), each when it is due after `start` (of `time.monotonic`; now
    by default), or when the answer before it in its conversation is over, if that is later. Their outcomes, in order.
    """
    start = time.monotonic() if start is None else start
    talks: dict[int, list[Message]] = {}
    last: dict[int, asyncio.Task[Outcome]] = {}

    async def ask(url: str, turn: Turn, before: asyncio.Task[Outcome] | None) -> Outcome:
        await asyncio.sleep(start + turn.due - time.monotonic())
        messages = talks.setdefault(turn.talk, [system(turn.system)])
        if before:
            messages.append({"role": "assistant", "content": (await before).answer})
        messages.append(user(turn.says))
        body: dict[str, object] = {"model": model, "messages": messages, "max_tokens": turn.tokens, "temperature": 0}
        body["ignore_eos"] = True
        return await stream(connection, url, body, patience=120)

    async with session() as connection:
        asks = []
        for url, turn in zip(itertools.cycle(urls), turns, strict=False):
            last[turn.talk] = asyncio.create_task(ask(url, turn, last.get(turn.talk)))
            asks.append(last[turn.talk])
        return await asyncio.gather(*asks)


def cell(outcomes: Sequence[Outcome], before: Counters, after: Counters) -> Cell:
    """What was measured between two moments."""
    met = [outcome for outcome in outcomes if outcome.sent >= before.at]
    waits = [outcome.ttft for outcome in met if outcome.begun] or [float("nan")]
    served = [late - early for late, early in zip(after.requests, before.requests, strict=True)]
    return Cell(
        requests=len(met),
        lost=sum(not outcome.done for outcome in met),
        hit_rate=(after.hits - before.hits) / max(1.0, after.queries - before.queries),
        ttft_p50=quantile(waits, 0.5),
        ttft_p90=quantile(waits, 0.9),
        ttft_p99=quantile(waits, 0.99),
        tokens_per_s=(after.tokens - before.tokens) / (after.at - before.at),
        spread=max(served) / max(1.0, sum(served) / len(served)),
    )


async def run(
    urls: Sequence[str],
    replicas: Sequence[str],
    model: str,
    workload: str,
    seed: int,
    clients: int,
    seconds: float,
    sizes: Sizes,
) -> Cell:
    """One workload against `urls` for `seconds`, after half of that to warm up."""
    driving = asyncio.create_task(drive(urls, model, WORKLOADS[workload], seed, range(clients), 1.5 * seconds, sizes))
    await asyncio.sleep(seconds / 2)
    before = await asyncio.to_thread(counters, replicas)
    outcomes = await driving
    return cell(outcomes, before, await asyncio.to_thread(counters, replicas))


async def run_trace(urls: Sequence[str], replicas: Sequence[str], model: str, turns: Sequence[Turn]) -> Cell:
    """A trace against `urls`; what is due in its first third warms up."""
    driving = asyncio.create_task(replay(urls, model, turns))
    await asyncio.sleep(turns[-1].due / 3)
    before = await asyncio.to_thread(counters, replicas)
    outcomes = await driving
    return cell(outcomes, before, await asyncio.to_thread(counters, replicas))
