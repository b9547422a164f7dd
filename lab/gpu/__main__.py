"""Measures the planner and the gateway on a host with equal GPUs, and writes the report.

    python -m lab.gpu run --out DIR --work DIR    on that host, with vLLM, and Nginx at $NGINX, $NGINX_MODULES
    python -m lab.gpu report DIR/gpu.json …       writes docs/benchmarks/gpu.md from what was measured

Models are shapes with random weights, so nothing has to be fetched. What is measured is written after each step: a run
that is cut off keeps what it has."""

import contextlib
import json
import signal
import sys
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from lab.gpu import report as reports
from lab.gpu.measure import PARTS, SEVERAL
from lab.gpu.run import START, Run, say
from lab.report import DOCS
from lab.sim.gateway import nginx_version
from planner.nvml import read_machine
from stack.shell import ROOT

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json.")],
    work: Annotated[Path, typer.Option(help="Folder for models and logs.")],
    parts: Annotated[str, typer.Option(help="Which, and in what order, by commas.")] = ",".join(PARTS),
    seconds: Annotated[int, typer.Option(help="It is over by then; what does not fit is left out.")] = 565,
) -> None:
    """Measure on all of this host's GPUs."""
    names = parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}", param_hint="--parts")
    machine = read_machine()
    if len(machine.gpus) < 2 and (alone := SEVERAL.intersection(names)):
        raise typer.BadParameter(f"{', '.join(sorted(alone))}: that takes two GPUs or more", param_hint="--parts")
    bench = Run(machine, out, work, seconds - (time.monotonic() - START))

    def end(number: int, _: FrameType | None) -> None:
        if number == signal.SIGALRM:
            raise TimeoutError("the time was over")
        sys.exit(124)

    # `timeout` sends SIGTERM: engines are ended then too
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, bench.left())
    try:
        bench.keep("date", value=f"{datetime.now(UTC):%Y-%m-%d %H:%M}")
        bench.keep("machine", value=machine.model_dump(mode="json"))
        bench.keep("versions", value=versions())
        for name in names:
            start, (needs, step) = time.monotonic(), PARTS[name]
            bench.part(name, needs, partial(step, bench))
            bench.keep("seconds", name, value=round(time.monotonic() - start))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        bench.close()
        say(f"over after {time.monotonic() - START:.0f} s")
        with contextlib.suppress(LookupError, ArithmeticError):  # the results are on disk, whatever is missing in them
            print(reports.section(bench.results), flush=True)


def versions() -> dict[str, str]:
    """Of what is here and counts; the router is one that some parts are measured beside."""
    found = {"nginx": nginx_version().removeprefix("nginx/")}
    for name in ("vllm", "torch", "transformers", "vllm-router"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@app.command()
def report(results: Annotated[list[Path], typer.Argument(help="gpu.json of each call, in their order.")]) -> None:
    """Write docs/benchmarks/gpu.md from measured results, predictions by the planner as it is now."""
    try:
        machines = reports.joined([json.loads(path.read_text()) for path in results])
    except ValueError as error:
        raise typer.BadParameter(f"{error}; name the calls that belong together", param_hint="RESULTS") from error
    except KeyError as error:
        raise typer.BadParameter(f"one has no {error}; name gpu.json of each call", param_hint="RESULTS") from error
    for found in machines:
        (DOCS / f"{reports.machine_of(found)}.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    reports.write()
    print(f"wrote {reports.REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    app()
