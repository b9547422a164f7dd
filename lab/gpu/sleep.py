"""vLLM's sleep mode on a GPU: what it frees, and how soon an engine is gone and back."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from lab.gpu.engines import QUICK, Engine
from lab.gpu.run import Run, alone
from lab.report import table

SHAPE = "Llama-8B"
START_S = 240
LEVELS = (1, 2)

NOTE = """One replica with `--enable-sleep-mode` on one GPU. Level 1 keeps the weights in the memory of the host,
level 2 nowhere, so loading them comes on top of waking up. Each level twice. The first token is that of one request.
"""


def measure(run: Run) -> None:
    """Each level twice, on the first GPU."""
    engine = run.engine(SHAPE, run.gpus[:1], "--enable-sleep-mode", *QUICK)
    try:
        run.ready(engine, START_S)
        run.keep("sleep", "start_s", value=time.monotonic() - engine.started)
        first_token(engine)
        for level in LEVELS:
            for turn in (1, 2):
                run.keep("sleep", f"level {level}, {turn}", value=nap(engine, level))
    finally:
        run.stop()


def nap(engine: Engine, level: int) -> dict[str, float]:
    """Puts it to sleep and wakes it: seconds for each, the GPU's memory in use in GiB, and milliseconds to the first
    token before and after."""
    found = {"ttft_before_ms": first_token(engine), "awake_gib": engine.facts()["used"][0]}
    found["sleep_s"] = seconds(engine, f"/sleep?level={level}")
    found["asleep_gib"] = engine.facts()["used"][0]
    found["wake_s"] = seconds(engine, "/wake_up")
    return found | {"ttft_after_ms": first_token(engine)}


def seconds(engine: Engine, path: str) -> float:
    """How long a POST takes."""
    start = time.monotonic()
    engine.post(path)
    return time.monotonic() - start


def first_token(engine: Engine) -> float:
    """Milliseconds to the first token of a short request."""
    return asyncio.run(alone(engine.url, engine.name, 1, 4, warm=0))["ttft_ms"]


def report(found: Mapping[str, Any]) -> str:
    """The table: a row for each nap."""
    names = ("sleep_s", "asleep_gib", "awake_gib", "wake_s", "ttft_before_ms", "ttft_after_ms")
    rows = [
        [name, *(f"{nap[one]:,.1f}" if one.endswith("_ms") else f"{nap[one]:.2f}" for one in names)]
        for name, nap in found.items()
        if name.startswith("level")
    ]
    heads = ["s to sleep", "GiB asleep", "GiB awake", "s to wake up", "first token before, ms", "after, ms"]
    text = f"### Sleep mode, {SHAPE}\n\n{NOTE}\n{table(['', *heads], rows)}\n"
    return text + (
        f"A start takes {found['start_s']:.0f} s here, with random weights.\n\n" if "start_s" in found else ""
    )
