"""Fair shares on a GPU: what a quiet key waits for its first token while another one floods the engines."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from lab.bench import fair
from lab.bench.fair import FLOOD, QUIET, Mix
from lab.bench.workloads import counters
from lab.gpu.engines import QUICK
from lab.gpu.run import Fleet, Run
from lab.report import table
from lab.sim.gateway import Gateway
from lab.sim.keys import keyed
from lab.sim.load import Outcome
from lab.waiting import until

SHAPE = "Llama-8B"
START_S = 240
CLIENTS = 128  # of the flood, for each GPU
MIX = Mix(prompts=(512, 4096), flood_prompt=2000, flood_answer=128)
# vLLM's own number of tokens in a step on such a GPU, and a quarter of it.
STEPS = (8192, 2048)
SECONDS, SETTLE = 15.0, 4.0
ALONE, IN_TURN, SHARED = "alone", "flooded, first come first served", "flooded, by the gateway's priority"

NOTE = """One key asks for one answer at a time, with up to {pause:g} s in between; the other one floods with {clients}
requests at once a GPU, {least:,.0f} to {most:,.0f} tokens in and about {answer} out. Both go through the gateway, which
sets the priorities. Served first come first served, they ask the engines directly. vLLM 0.26 reads a priority from the
body only, so a middleware of the lab puts the gateway's header there. The first {settle:g} s of each flood are not
counted, and {seconds:g} s after.
"""


def measure(run: Run) -> None:
    """Each number of tokens in a step in turn."""
    for tokens in STEPS:
        run.part(f"fair, {tokens} tokens in a step", START_S / 4, partial(measure_step, run, tokens))


def measure_step(run: Run, tokens: int) -> None:
    """The quiet key alone and beside the flood, on replicas that compute so many tokens in a step."""
    extra = ("--middleware", "lab.gpu.priority.Priority", *QUICK)
    every = [run.engine(SHAPE, [gpu], *extra, MAX_NUM_BATCHED_TOKENS=str(tokens)) for gpu in run.gpus]
    try:
        for engine in every:
            run.ready(engine, START_S)
        fleet = Fleet(every, run.dns, run.gateway_host)
        keys, files = keyed({QUIET: {}, FLOOD: {}, "lab": {"role": "admin"}})
        with Gateway(fleet, files=files, key=keys["lab"]) as gateway:
            gateway.wait_ready()
            # graphs and kernels of all sizes are met before anything counts
            phase(run, fleet, [gateway.url], keys, 2.0, CLIENTS)
            for name, urls, clients in (
                (ALONE, [gateway.url], 0),
                (IN_TURN, fleet.urls, CLIENTS),
                (SHARED, [gateway.url], CLIENTS),
            ):
                run.keep("fair", str(tokens), name, value=phase(run, fleet, urls, keys, SECONDS, clients))
    finally:
        run.stop()


def phase(
    run: Run, fleet: Fleet, urls: Sequence[str], keys: Mapping[str, str], seconds: float, clients: int
) -> dict[str, Any]:
    """The quiet key's waits in `seconds` by its prompts' tokens, beside a flood of so many clients a GPU that began
    before, and what all got together."""
    run.fresh()
    until(lambda: all(engine.idle() for engine in fleet.every), "the engines are idle", 30)
    settle = SETTLE if clients else 0.0
    many = range(clients * len(fleet.every))
    jobs = [
        run.pool.submit(flooding, urls, fleet.model, keys[FLOOD], run.seed, many[n :: run.senders], settle + seconds)
        for n in range(min(run.senders, len(many)))
    ]
    time.sleep(settle)
    before = counters(fleet.urls)
    found = asyncio.run(fair.quiet(urls, fleet.model, keys[QUIET], MIX, run.seed, seconds))
    after = counters(fleet.urls)
    floods = [one for job in jobs for one in job.result()]
    return {
        "waits": {str(tokens): asdict(fair.waits(outcomes)) for tokens, outcomes in found.items()},
        "tokens_per_s": (after.tokens - before.tokens) / (after.at - before.at),
        "flood": asdict(fair.waits(floods)) if floods else None,
    }


def flooding(
    urls: Sequence[str], model: str, key: str, seed: int, clients: Sequence[int], seconds: float
) -> list[Outcome]:
    """A part of the flood, in a process of its own."""
    return asyncio.run(fair.flood(urls, model, key, MIX, seed, clients, seconds))


def report(found: Mapping[str, Any]) -> str:
    """The tables: a row for each size of step and of the quiet key's prompt."""
    rows = []
    for step, phases in found.items():
        for tokens in next(iter(phases.values()))["waits"]:
            cells = []
            for name in (ALONE, IN_TURN, SHARED):
                alone, here = (phases.get(one, {}).get("waits", {}).get(tokens) for one in (ALONE, name))
                for share in ("p50", "p90"):
                    if not here or here[share] is None:
                        cells.append("")
                        continue
                    times = f" ({here[share] / alone[share]:.2f} ×)" if alone and alone[share] and name != ALONE else ""
                    cells.append(f"{1000 * here[share]:,.0f}{times}")
            rows.append([f"{int(step):,} in a step, {int(tokens):,} in", *cells])
    heads = [f"{name}, {share}" for name in (ALONE, IN_TURN, SHARED) for share in ("TTFT p50 ms", "p90")]
    rates = [
        [
            f"{int(step):,} in a step",
            *(f"{phases[name]['tokens_per_s']:,.0f}" if name in phases else "" for name in names),
        ]
        for names in [(ALONE, IN_TURN, SHARED)]
        for step, phases in found.items()
    ]
    lengths = {"least": MIX.flood_prompt / 2, "most": MIX.flood_prompt * 1.5, "answer": MIX.flood_answer}
    note = NOTE.format(pause=MIX.pause, clients=CLIENTS, settle=SETTLE, seconds=SECONDS, **lengths)
    text = f"### Fair shares, {SHAPE} on each GPU\n\n{note}\n{table(['the quiet key', *heads], rows)}\n"
    return text + table(["tokens/s of both", ALONE, IN_TURN, SHARED], rates) + "\n"
