"""Measures the planner and the gateway on two real GPUs, and writes the report.

    python -m lab.gpu run --out DIR --work DIR    on the host with the GPUs, vLLM, and Nginx at $NGINX, $NGINX_MODULES
    python -m lab.gpu report DIR/gpu.json         writes docs/benchmarks/gpu.md from what was measured

Models are shapes with random weights, so nothing has to be fetched. What is measured is written after each step: a run
that is cut off keeps what it has."""

import json
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from lab.gpu import engines
from lab.gpu import report as reports
from lab.gpu.measure import BY_FILES, PARTS, measure
from lab.gpu.run import Run, say
from lab.sim.gateway import nginx_version
from planner.nvml import read_machine
from stack.shell import ROOT

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json; results that are in it stay.")],
    work: Annotated[Path, typer.Option(help="Folder for models and logs.")],
    parts: Annotated[
        str, typer.Option(help="Which, by commas; a shape's layout as 8B:tp2; presets: each starts and answers.")
    ] = ",".join(PARTS),
) -> None:
    """Measure on this host's first two GPUs."""
    bench = Run(out, work)
    machine = read_machine()
    bench.keep("machine", value=machine.model_dump(mode="json"))
    bench.keep("versions", value={
        **{name: version(name) for name in ("vllm", "torch", "vllm-router", "bitsandbytes")},
        "nginx": nginx_version().removeprefix("nginx/"),
    })  # fmt: skip
    # `timeout` sends SIGTERM: engines are ended then too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))
    writing = subprocess.Popen([sys.executable, "-m", "lab.gpu", "weights", str(work / "models")])
    try:
        for name in parts.split(","):
            when, start = f"{datetime.now(UTC):%Y-%m-%d %H:%M}", time.monotonic()
            bench.part(name, partial(measure, bench, name))
            bench.keep("parts", name, value={"when": when, "seconds": round(time.monotonic() - start)})
    finally:
        writing.kill()
        bench.pool.shutdown(cancel_futures=True)
        bench.dns.close()
    say("done")


@app.command(hidden=True)
def weights(models: Path) -> None:
    """Random weights for the models that are quantized from files, in a process of its own."""
    for model in BY_FILES:
        engines.write_weights(engines.write_model(models, model))


@app.command()
def report(results: Path) -> None:
    """Write docs/benchmarks/gpu.md from measured results, predictions by the planner as it is now."""
    reports.write(json.loads(results.read_text()))
    print(f"wrote {reports.REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    app()
