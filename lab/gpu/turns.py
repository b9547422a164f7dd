"""Models that take turns on one GPU: two replicas that sleep, behind the gateway, which wakes who is asked for."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from lab.gpu import engines
from lab.gpu.engines import QUICK, WEIGHTS, Engine
from lab.gpu.run import Fleet, Run, say
from lab.http import get
from lab.report import table
from lab.sim.gateway import Gateway
from lab.sim.load import Outcome, SteadyLoad, session, stream, text
from lab.waiting import until
from planner.machine import GIB

SHAPES = ("Llama-1B", "Llama-3B")
# Of each replica, so that the GPU has no room for two that are awake.
SHARE = 0.85


@dataclass(frozen=True)
class Level:
    """How long the clients of both models ask, and how long all of it may take, in seconds."""

    load_s: float
    whole_s: float


LEVELS = {1: Level(60, 140), 2: Level(60, 140)}
WEIGHTS_S, START_S = 60.0, 60.0
# What is kept of a level's time for what follows the load, and the shortest load.
AFTER_S, LEAST_S = 16.0, 5.0
CLIENTS = 4  # of each model
PROMPT, ANSWER = 60, 64  # tokens
PATIENCE = 50.0
FIXED, OTHER = (text(random.Random(seed), PROMPT) for seed in (1, 2))
CHECKED = 32  # tokens of an answer that is compared
# The wakes of a model that are looked at: after it was loaded, and after many more.
FIRST, LAST = "first", "last"

NOTE = """Two models with random weights on disk, each with {share:.0%} of the same GPU, as the launcher starts replicas
with `SLEEP_LEVEL` and `SHARED_GPUS`, behind the gateway. Level 1 keeps the weights in the memory of the host, level 2
loads them again from files that the host still had in its memory. One request wakes a model while no other one is
awake, and one more follows; that comes once after the start and once after the load below. An answer is right if its
{tokens} tokens, chosen greedily, are those of the model's first wake at {first}. GiB in use: on the GPU, by all
that sleep so far.
"""
LOAD_NOTE = """**Both are asked at once**: {clients} clients of each model ask for {answer} tokens at a time, for so
many seconds. A turn goes from a model's first token to its last before the other's. The last turn comes after the
load, once nobody has asked for the other model for five seconds.
"""


def measure(run: Run) -> None:
    """Each level in turn, on the first GPU."""
    weights = [run.pool.submit(engines.write_weights, run.models[shape].result()) for shape in SHAPES]
    for level, spent in LEVELS.items():
        run.part(f"turns, level {level}", spent.load_s, partial(measure_level, run, level, weights))


def measure_level(run: Run, level: int, weights: Sequence[Future[Path]]) -> None:
    """Both models loaded, woken one by one, asked at once, and woken one by one again."""
    end = time.monotonic() + min(LEVELS[level].whole_s, run.left())
    every: list[Engine] = []
    try:
        for shape, written in zip(SHAPES, weights, strict=True):
            path = written.result(WEIGHTS_S)
            run.keep("turns", "weights", shape, value=(path / WEIGHTS).stat().st_size / GIB)
            every.append(start(run, shape, level))
            run.keep("turns", f"level {level}", "start", shape, value=asleep(run, every[-1], end))
        fleet = Fleet(every, run.dns, run.gateway_host)
        with Gateway(fleet) as gateway:
            wake(run, level, gateway, every, FIRST)
            seconds = max(LEAST_S, min(LEVELS[level].load_s, end - time.monotonic() - AFTER_S))
            found = asyncio.run(load(gateway.url, seconds, run.seed))
            run.keep("turns", f"level {level}", "load", value={"seconds": seconds, **told(found)})
            for engine in every:
                engine.post("/sleep")
            wake(run, level, gateway, every, LAST)
    except Exception:
        for engine in every:
            say(f"the log of {engine.name} ends:\n{engine.log()[-3000:]}")
        raise
    finally:
        run.stop()


def start(run: Run, shape: str, level: int) -> Engine:
    """A replica on the first GPU, as the launcher starts one that sleeps."""
    gpus = run.gpus[:1]
    settings = {
        "SLEEP_LEVEL": str(level),
        "SHARED_GPUS": str(gpus[0]),
        "GPU_MEMORY_UTILIZATION": str(SHARE),
        # few graphs to capture: it starts sooner
        "MAX_NUM_SEQS": "16",
    }
    return run.engine(shape, gpus, *QUICK, **settings)


def asleep(run: Run, engine: Engine, end: float) -> dict[str, float]:
    """Waits until it has loaded and sleeps: the seconds that took, and GiB in use on its GPU then."""
    run.ready(engine, min(START_S, end - time.monotonic()))
    sleeping(engine)
    return {"s": time.monotonic() - engine.started, "gib": engine.facts()["used"][0]}


def sleeping(engine: Engine) -> None:
    """Waits until it sleeps."""
    until(lambda: json.loads(get(engine.url + "/is_sleeping"))["state"] == "asleep", f"{engine.name} sleeps", 30)


def wake(run: Run, level: int, gateway: Gateway, every: Sequence[Engine], when: str) -> None:
    """Wakes each model by a request, asks it once more, and puts it to sleep."""
    for engine in every:
        gateway.wait_states({f"vllm-{n}": "asleep" for n in range(len(every))}, 30)
        first, again = asyncio.run(ask(gateway.url, engine.name))
        lost = [one.why or f"cut, with status {one.status}" for one in (first, again) if not one.done]
        value = {
            "reason": first.reason,
            "wake_s": first.ttft,
            "awake_s": again.ttft,
            "answer": first.answer if first.done else None,
            "lost": lost,
        }
        run.keep("turns", f"level {level}", "wakes", engine.name, when, value=value)
        if not first.done:
            raise RuntimeError(f"{engine.name} did not answer when it was to wake: {lost[0]}")
        engine.post("/sleep")
        sleeping(engine)


async def ask(url: str, model: str) -> tuple[Outcome, Outcome]:
    """The fixed request, and after it another one."""
    bodies = [
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": CHECKED,
            "temperature": 0,
            "ignore_eos": True,
        }
        for content in (FIXED, OTHER)
    ]
    async with session() as connection:
        return await stream(connection, url, bodies[0], PATIENCE), await stream(connection, url, bodies[1], PATIENCE)


async def load(url: str, seconds: float, seed: int) -> dict[str, list[Outcome]]:
    """Clients of both models at once, each request brought to its end."""
    every = [SteadyLoad(url, model, CLIENTS, PROMPT, ANSWER, PATIENCE, seed=seed + n) for n, model in enumerate(SHAPES)]
    async with every[0], every[1]:
        await asyncio.sleep(seconds)
        # both at once: who is left would wait for its turn beside the other one's load
        await asyncio.gather(*(one.stop() for one in every))
    return {one.model: one.outcomes for one in every}


def turns(found: Mapping[str, Sequence[Outcome]]) -> list[tuple[str, float, float]]:
    """Whose tokens came, from when to when: the times of the first and of the last."""
    begun = sorted(
        (one.first, one.last, model)
        for model, outcomes in found.items()
        for one in outcomes
        if one.first is not None and one.last is not None
    )
    spans = [(model, list(some)) for model, some in itertools.groupby(begun, itemgetter(2))]
    return [(model, some[0][0], max(last for _, last, _ in some)) for model, some in spans]


def told(found: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """What became of the requests of a load."""
    every = [one for outcomes in found.values() for one in outcomes]
    had = turns(found)
    return {
        "answers": {model: sum(one.done for one in outcomes) for model, outcomes in found.items()},
        "lost": sum(not one.done for one in every),
        "why": sorted({one.why for one in every if not one.done})[:3],
        "turns": [model for model, _, _ in had],
        "longest_s": max((one.ttft for one in every), default=None),
        "between_s": [later[1] - before[2] for before, later in itertools.pairwise(had)],
    }


def report(found: Mapping[str, Any]) -> str:
    """The tables: a row for each level and model, then one for each level."""
    levels = {name: said for name, said in found.items() if name.startswith("level")}
    first = next((name for name, said in levels.items() if said.get("wakes")), "level 1")
    note = NOTE.format(share=SHARE, tokens=CHECKED, first=first)
    wakes, loads, lost = [], [], []
    for name, said in levels.items():
        for shape, wakes_of in said.get("wakes", {}).items():
            every = list(wakes_of.values())
            wanted = levels[first]["wakes"].get(shape, {}).get(FIRST, {}).get("answer")
            right = sum(one["answer"] is not None and one["answer"] == wanted for one in every)
            different = len({(wanted or "")[at : at + 4] for at in range(0, len(wanted or ""), 4)})
            wakes.append([
                f"{name}, {shape}",
                f"{found['weights'][shape]:.1f}",
                f"{said['start'][shape]['s']:.0f}",
                f"{said['start'][shape]['gib']:.2f}",
                " ".join(f"{one['wake_s']:.2f}" for one in every),
                " ".join(f"{1000 * one['awake_s']:.0f}" for one in every),
                f"{right} of {len(every)}" + ("" if right == len(every) else " (!)"),
                f"{different}",
            ])  # fmt: skip
            lost += [f"{name}, {shape}, {when} wake: {why}" for when, one in wakes_of.items() for why in one["lost"]]
            lost += [
                f"{name}, {shape}, {when} wake: the gateway said {one['reason']}"
                for when, one in wakes_of.items()
                if one["reason"] != "wake"
            ]
        if one := said.get("load"):
            between = one["between_s"]
            loads.append([
                name,
                f"{one['seconds']:.0f}",
                " + ".join(f"{count:,}" for count in one["answers"].values()),
                f"{one['lost']}" + (" (!)" if one["lost"] else ""),
                f"{len(one['turns'])}",
                f"{one['longest_s']:.1f}" if one["longest_s"] is not None else "",
                " ".join(f"{seconds:.1f}" for seconds in between),
            ])  # fmt: skip
            lost += [f"{name}, both at once: {why}" for why in one["why"]]
            lost += [f"{name}: both models were awake at once"] if any(seconds < 0 for seconds in between) else []
    heads = ["", "weights, GiB", "s from start to sleep", "GiB in use", "waking: first token after s",
             "awake: after ms", "right answers", "different tokens in one"]  # fmt: skip
    result = f"### Models that take turns, {' and '.join(SHAPES)} on one GPU\n\n{note}\n{table(heads, wakes)}\n"
    if loads:
        heads = ["", "s", "answers", "lost", "turns", "longest wait, s", "s between turns"]
        result += LOAD_NOTE.format(clients=CLIENTS, answer=ANSWER) + f"\n{table(heads, loads)}\n"
    return result + "".join(f"(!) {one}\n\n" for one in lost)
