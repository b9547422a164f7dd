"""A simulated replica where lab/gpu starts `vllm serve`, for a host without GPUs."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.gpu.engines import WEIGHTS, Engine, config_of
from lab.waiting import until
from stack.shell import ROOT

# What vLLM says of its memory, as of two stages where the first has less to hold.
LOG = """
Model loading took 14.97 GiB memory and 2.5 seconds
Available KV cache memory: 112.32 GiB
GPU KV cache size: 920,144 tokens
init engine (profile, create kv cache, warmup model) took 41.95 s (compilation: 19.29 s)
Actual usage is 14.97 GiB for weight, 1.03 GiB for peak activation. Current kv cache memory in use is 112.32 GiB.
Actual usage is 16.5 GiB for weight, 1.03 GiB for peak activation. Current kv cache memory in use is 110.79 GiB.
"""
SHAPE = ["--step-ms", "10", "--prefill-ms", "0.02", "--kv-blocks", "60000", "--max-running", "256"]


def serve(arguments: list[str], environment: Mapping[str, str], log: str) -> None:
    """Becomes the simulated replica, in a process group of its own."""
    os.setsid()
    Path(log).write_text(LOG)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    host = arguments[len(arguments) - arguments[::-1].index("--host")]
    model = arguments[arguments.index("--served-model-name") + 1]
    os.chdir(ROOT)
    command = [sys.executable, "-m", "lab.sim.replica", "--host", host, "--port", "8000", "--model", model, *SHAPE]
    if "SLEEP_LEVEL" in environment:
        gpus = [str(Path(log).with_name(name)) for name in environment["SHARED_GPUS"].split(",")]
        command += ["--sleeps", "--wake-seconds", environment["WAKE_SECONDS"], "--gpus", *gpus]
    os.execve(sys.executable, command, os.environ)  # noqa: S606 - no shell is wanted


def write_model(folder: Path, shape: str) -> Path:
    """A model's folder without its tokenizer."""
    path = folder / shape
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_of(shape)))
    return path


def write_weights(path: Path) -> Path:
    """Weights that nobody reads."""
    (path / WEIGHTS).write_bytes(b"weights")
    return path


class StandIn(Engine):
    """An engine whose cache stays."""

    def facts(self) -> dict[str, Any]:
        """What its log says, and memory in use."""
        return super().facts() | {"used": [130.42 for _ in self.gpus]}

    def post(self, path: str, timeout_s: float = 60.0) -> None:
        """It knows no more of vLLM's than how to sleep, and that only where the launcher says so."""
        if "SLEEP_LEVEL" in self.environment:
            super().post(path, timeout_s)

    def forget(self) -> None:
        """Waits until it is idle."""
        until(self.idle, f"{self.name} is idle")
