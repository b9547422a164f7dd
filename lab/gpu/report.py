"""The report on a run: what was measured, beside what the planner predicts now."""

import json
from typing import Any

from lab.bench.workloads import Cell
from lab.gpu.engines import MAX_LENGTH, SHAPES
from lab.gpu.measure import CLIENTS, GATEWAY_SHAPE, LAYOUTS, QUANTIZED_SHAPE, WORKLOAD_SECONDS
from lab.gpu.run import PER_GPU
from lab.report import DOCS, table
from planner import choose, memory, speed
from planner.choose import Wish
from planner.config import read_model
from planner.machine import GIB, Machine
from planner.memory import Settings
from planner.model import Model

REPORT = DOCS / "gpu.md"

PLANNER_NOTE = """\
Predictions are those of the planner as it is now; its constants were fitted on the 1.5B and 8B shapes in an earlier
run, 32B is the test of the fit. `used` is what the driver says of the fullest GPU. Speeds are those of {prompt} tokens
in and {answer} out: tokens/s with {most} requests at once on both GPUs, ms of one such request alone.
"""


def planner_model(shape: str) -> Model:
    """A shape as the planner reads it."""
    return read_model(SHAPES[shape], shape)


def off(predicted: float, measured: float) -> str:
    """By how much a prediction is off, in percent of what was measured."""
    return f"{100 * (predicted / measured - 1):+.1f} %"


def report_shapes(results: dict[str, Any], machine: Machine) -> str:
    """Predicted against measured, and the plan that the planner would have chosen against the best measured."""
    rows, ranks = [], []
    fresh = machine.model_copy(
        update={"gpus": tuple(gpu.model_copy(update={"free": gpu.total}) for gpu in machine.gpus)}
    )
    for shape in SHAPES:
        layouts, model, gpu = results["shapes"].get(shape, {}), planner_model(shape), fresh.gpus[0]
        for one in LAYOUTS.values():
            if not (said := layouts.get(one.name, {}).get("memory")):
                continue
            account = memory.account(model, gpu, one.tp, one.pp, MAX_LENGTH, Settings.default(gpu))
            rows.append([
                f"{shape}, {one.name}", f"{account.kv_tokens:,}", f"{said['kv_tokens']:,.0f}",
                off(account.kv_tokens, said["kv_tokens"]), f"{account.weights / GIB:.2f}", f"{said['weights']:.2f}",
                f"{account.used / GIB:.1f}", f"{max(said['used']):.1f}", off(account.used / GIB, max(said["used"])),
                f"{said['init_s']:.0f}, {said['compile_s']:.0f}" if "init_s" in said else "",
            ])  # fmt: skip
        for goal in ("throughput", "latency"):
            plan = choose.choose(fresh, model, Wish(goal=goal, context=MAX_LENGTH, quantization="none"))
            measured = {
                one.name: found["full"]["tokens_per_s"] if goal == "throughput"
                else found["alone"]["ttft_ms"] + speed.ANSWER * found["alone"]["tpot_ms"]
                for one in LAYOUTS.values() if "full" in (found := layouts.get(one.name, {}))
            }  # fmt: skip
            if len(measured) < 2:
                continue
            best = (max if goal == "throughput" else min)(measured, key=lambda layout: measured[layout])
            unit = "tokens/s" if goal == "throughput" else "ms"
            others = ", ".join(f"{layout}: {value:,.0f} {unit}" for layout, value in measured.items())
            ranks.append([shape, goal, plan.layout, best, "yes" if plan.layout == best else "no", others])
    head = ["", "KV tokens predicted", "reported", "off", "weights GiB predicted", "reported", "used GiB predicted",
            "measured", "off", "s to start, of it compiling"]  # fmt: skip
    text = table(head, rows) + "\n"
    return text + table(["shape", "goal", "planned", "measured best", "the same", "measured"], ranks)


def cell_row(name: str, cell: Cell) -> list[str]:
    """A system's row in a workload's table."""
    return [name, f"{100 * cell.hit_rate:.1f} %", f"{1000 * cell.ttft_p50:.0f}", f"{1000 * cell.ttft_p90:.0f}",
            f"{1000 * cell.ttft_p99:.0f}", f"{cell.tokens_per_s:,.0f}", f"{cell.requests}", f"{cell.lost}"]  # fmt: skip


CELL = ["", "prefix hits", "TTFT p50 ms", "p90", "p99", "tokens/s", "requests", "lost"]


def report_gateway(found: dict[str, Any]) -> str:
    """The tables of the gateway's part."""
    text = ""
    if rows := found.get("throughput"):
        text += f"### Two replicas behind the gateway, {PER_GPU} clients a replica\n\n" + table(
            CELL, [cell_row(name, Cell(**one)) for name, one in rows.items()]
        )
        direct, through = ([one["tokens_per_s"] for name, one in rows.items() if part in name]
                           for part in ("one direct", "gateway"))  # fmt: skip
        text += f"\nTwo behind the gateway give {sum(through) / sum(direct):.2f} × one direct.\n\n"
    if rows := found.get("alone"):
        text += "### One request at a time\n\n" + table(
            ["", "TTFT p50 ms", "added (median of neighbours) ms", "ms a token"],
            [[name, f"{one['ttft_ms']:.2f}", f"{one['added_ms']:+.2f}", f"{one['tpot_ms']:.3f}"]
             for name, one in rows.items()],
        ) + "\n"  # fmt: skip
    if rows := found.get("workloads"):
        text += f"### Workloads of `make bench`, {CLIENTS} clients, {WORKLOAD_SECONDS:.0f} s each after a warm-up\n\n"
        text += "![TTFT p90, ms](gpu-ttft.svg)\n\n![tokens/s](gpu-tokens.svg)\n\n"
        for workload, systems in rows.items():
            text += f"**{workload}**\n\n"
            text += table(CELL, [cell_row(name, Cell(**one)) for name, one in systems.items()]) + "\n"
    if one := found.get("kill"):
        text += "### A replica killed under load\n\n"
        text += table(["", ""], [[key, str(value)] for key, value in one.items()]) + "\n"
    return text


def report_presets(found: dict[str, Any]) -> str:
    """What each preset answered."""
    rows = []
    for name, one in found.items():
        answered = f"a vector of {one['vector']}" if "vector" in one else "a chat" if one["chat"] else "no"
        drafted = f"{one['drafted']:.0f}" if one.get("drafted") else ""
        rows.append([name, answered, f"{one.get('kv_tokens', 0):,.0f}", drafted])
    return table(["", "answered", "KV tokens in 10 GiB", "tokens drafted"], rows)


def write(found: dict[str, Any]) -> None:
    """Writes docs/benchmarks/gpu.md with its charts, and gpu.json, from a run's results."""
    from lab.bench.pictures import draw  # noqa: PLC0415 - a GPU host has no matplotlib

    machine = Machine.model_validate(found["machine"])
    versions = found["versions"]
    gpus = f"{len(machine.gpus)} × {machine.gpus[0].name}"
    parts = ", ".join(f"{name} at {one['when']} in {one['seconds']} s" for name, one in found["parts"].items())
    seconds = sum(one["seconds"] for one in found["parts"].values())
    link = f"{machine.links[0].kind}, {machine.links[0].gb_s:g} GB/s one way"
    text = f"""# On real GPUs

Written by `python -m lab.gpu report` from [gpu.json](gpu.json): shapes with random weights, so speeds are real and
answers are not. Replicas start as the launcher starts them.

- machine: {gpus} ({link}), {machine.cpu_cores} cores, driver {machine.driver}
- versions: {", ".join(f"{name} {value}" for name, value in versions.items())}
- parts (UTC): {parts}; together {seconds / 60:.0f} minutes

"""
    if "shapes" in found:
        note = PLANNER_NOTE.format(prompt=speed.PROMPT, answer=speed.ANSWER, most=2 * PER_GPU)
        text += f"## The planner\n\n{note}\n{report_shapes(found, machine)}\n"
    if "gateway" in found:
        text += f"## The gateway, {GATEWAY_SHAPE} shape\n\n"
        text += report_gateway(found["gateway"])
    if rows := found.get("quantized"):
        text += f"## 4-bit weights, {QUANTIZED_SHAPE} shape on one GPU\n\n" + table(
            ["", "weights GiB", "KV tokens", "tokens/s alone", "TTFT alone ms", "tokens/s, 64 at once"],
            [
                [name, f"{one['memory']['weights']:.2f}", f"{one['memory']['kv_tokens']:,.0f}",
                 f"{1000 / one['alone']['tpot_ms']:.0f}", f"{one['alone']['ttft_ms']:.1f}",
                 f"{one['full']['tokens_per_s']:,.0f}"]
                for name, one in rows.items() if "full" in one
            ],
        ) + "\n"  # fmt: skip
    if rows := found.get("presets"):
        text += (
            "## Presets\n\nAll at the same time, each with 10 GiB of KV cache, started by the launcher from its file; "
        )
        text += "the models have the right shape and format.\n\n" + report_presets(rows) + "\n"
    if failures := found.get("failures"):
        text += "## What is missing\n\n" + "".join(f"- {name}: {why}\n" for name, why in failures.items())
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(text.rstrip() + "\n")
    (REPORT.parent / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(REPORT.name)
