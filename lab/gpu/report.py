"""The report on the runs: what was measured, beside what the planner predicts now."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lab.bench.workloads import Cell
from lab.gpu import fair, plans, sleep, turns
from lab.gpu.engines import MAX_LENGTH
from lab.gpu.measure import (
    FAMILIES,
    LAYOUT_SHAPES,
    ROUTE_SHAPE,
    TRACE_RATE,
    TRACE_SECONDS,
    TRACE_SIZES,
)
from lab.gpu.plans import GOALS, LIKELIEST, Layout
from lab.gpu.run import PER_GPU
from lab.report import DOCS, table
from planner import speed
from planner.machine import GIB, Machine
from planner.memory import Account

REPORT = DOCS / "gpu.md"
CLOSE = 0.08

INTRO = f"""# On real GPUs

Written by `python -m lab.gpu` from the `gpus-*.json` beside this file. Models are shapes with random weights, so
speeds are real and answers are not. Predictions are those of the planner as it is now, which counts as vLLM 0.32 does,
for requests of up to {MAX_LENGTH:,} tokens; `off` is by how much they are off what was reported, with (!) above
{CLOSE:.0%}.
"""
# Why a prediction is off by more than that, by its row and what it predicts.
REASONS = {
    ("Nemotron-H-8B", "KV tokens"): "vLLM 0.26 keeps a Mamba 2 state twice for each request, 0.32 once more, from "
    "within a step (`num_prefill_checkpoint_blocks` of `MambaSpec`)",
}
FAMILIES_NOTE = """Each on a GPU of its own, started as the launcher starts it, with nothing compiled before. States are
kept as vLLM 0.32 keeps them by default (`--mamba-cache-mode align`).
"""
LAYOUTS_NOTE = f"""Memory is that of the GPU with the least left for its KV cache, `used` what the driver says of the
fullest. One replica of a layout was measured and its speed multiplied by their number. Throughput: {PER_GPU} requests
at once a GPU, each a quarter of the reference request ({speed.PROMPT} tokens in, {speed.ANSWER} out); tokens are
counted whether or not their request ended in the time. Latency: one reference request alone. Nothing was compiled, to
save time. For GLM vLLM 0.26 takes its older model runner, which tries the sampler with top-p and top-k before it lays
out the KV cache. 0.32 does not, so the predictions, which are for 0.32, are a little high there.
"""
ROUTE_NOTE = f"""{PER_GPU} clients a replica send the reference request ({speed.PROMPT} tokens in, {speed.ANSWER} out)
to one replica and to the gateway, in turn.
"""
TRACE_NOTE = """**The trace of `make bench`**: {rate:.0f} requests/s for {seconds:.0f} s, of which the first third warms
up; its lengths × {share:g}. The same requests for each, with empty caches.
"""


def machine_of(found: Mapping[str, Any]) -> str:
    """What machines are told apart by, as it stands in the names of their files."""
    return f"gpus-{len(found['machine']['gpus'])}-cores-{found['machine']['cpu_cores']}"


def joined(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of each machine, of one call or of several for different parts. ValueError where calls of a machine
    differ in more than their parts."""
    found: dict[str, dict[str, Any]] = {}
    for one in calls:
        name = machine_of(one)
        if name not in found:
            found[name] = one | {"dates": [one["date"]]}
            continue
        before = found[name]
        same = [{**call["machine"], "memory_free": 0, "versions": call["versions"]} for call in (before, one)]
        twice = before["seconds"].keys() & one["seconds"].keys()
        if same[0] != same[1] or twice:
            raise ValueError(f"two calls on {name}: {', '.join(twice) or 'their machine or versions differ'}")
        merged = {key: before.get(key, {}) | one.get(key, {}) for key in ("seconds", "failures")}
        found[name] = before | one | merged | {"dates": [*before["dates"], one["date"]]}
    for one in found.values():
        one.pop("date")
    return list(found.values())


def off(predicted: float, measured: float) -> str:
    """By how much a prediction is off, in percent of what was measured."""
    share = predicted / measured - 1
    return f"{100 * share:+.1f} %" + (" (!)" if abs(share) > CLOSE else "")


def compared(predicted: float, measured: float, digits: int = 2) -> list[str]:
    """Three columns: predicted, measured, and by how much the first is off."""
    return [f"{predicted:,.{digits}f}", f"{measured:,.{digits}f}", off(predicted, measured)]


def reasons(rows: Sequence[list[str]]) -> str:
    """Why some of these predictions are off, as text below their table."""
    names = {row[0] for row in rows}
    return "".join(f"\n(!) {name}, {what}: {why}.\n" for (name, what), why in REASONS.items() if name in names)


def memory_row(name: str, account: Account, said: Mapping[str, Any]) -> list[str]:
    """What an engine said of its memory beside its account."""
    return [
        name,
        *compared(account.weights / GIB, said["weights"]),
        *compared(account.kv / GIB, said["kv"]),
        *compared(account.kv_tokens, said["kv_tokens"], 0),
        *compared(account.used / GIB, max(said["used"]), 1),
        f"{said['init_s']:.0f}" if "init_s" in said else "",
    ]


MEMORY = ["", "weights GiB", "reported", "off", "KV GiB", "reported", "off", "KV tokens", "reported", "off",
          "used GiB", "measured", "off", "s to start the engine"]  # fmt: skip


def families(found: Mapping[str, Any], machine: Machine) -> str:
    """The account of each family against what vLLM reported."""
    rows = [memory_row(shape, plans.account(machine, shape), found[shape]) for shape in FAMILIES if shape in found]
    return f"### Families of models\n\n{FAMILIES_NOTE}\n{table(MEMORY, rows)}{reasons(rows)}\n"


CELL = ["", "prefix hits", "TTFT p50 ms", "p90", "p99", "tokens/s", "requests", "lost", "busiest / mean"]


def cell_row(name: str, cell: Cell) -> list[str]:
    """A system's row."""
    # null where no request ended in the time
    waits = [f"{1000 * wait:.0f}" if wait is not None else "" for wait in (cell.ttft_p50, cell.ttft_p90, cell.ttft_p99)]
    counts = [f"{cell.tokens_per_s:,.0f}", f"{cell.requests}", f"{cell.lost}", f"{cell.spread:.2f}"]
    return [name, f"{cell.hit_rate:.1%}", *waits, *counts]


def route(found: Mapping[str, Any], gpus: int) -> str:
    """The gateway's tables."""
    text = f"### The route, {ROUTE_SHAPE} on each GPU\n\n"
    if cells := found.get("throughput"):
        rows, cores = [], []
        rates: dict[bool, list[float]] = {True: [], False: []}
        for name, said in cells.items():
            behind = "gateway" in name
            one = Cell(**{key: value for key, value in said.items() if key != "cores"})
            rows.append([*cell_row(name, one)[:-1], f"{said['cores']:.2f}" if behind else ""])
            rates[behind].append(one.tokens_per_s)
            cores += [said["cores"]] if behind else []
        text += ROUTE_NOTE + "\n" + table([*CELL[:-1], "cores of the gateway"], rows)
        if rates[True] and rates[False]:
            times = sum(rates[True]) / len(rates[True]) / (sum(rates[False]) / len(rates[False]))
            text += f"\n{gpus} behind the gateway give {times:.2f} × one direct, {times / gpus:.3f} × their number; "
            text += f"the gateway takes {sum(cores) / len(cores):.2f} cores.\n"
        text += "\n"
    if systems := found.get("trace"):
        text += TRACE_NOTE.format(rate=TRACE_RATE * gpus, seconds=TRACE_SECONDS, share=TRACE_SIZES.tokens) + "\n"
        text += table(CELL, [cell_row(name, Cell(**one)) for name, one in systems.items()]) + "\n"
    if fault := found.get("fault"):
        text += "**Replicas killed under load**, through the gateway\n\n"
        text += table(["", ""], [[key, str(value)] for key, value in fault.items()]) + "\n"
    return text


def layouts(found: Mapping[str, Any], machine: Machine) -> str:
    """Each layout's account, and the plans against what measured best."""
    rows, ranks = [], []
    for shape in LAYOUT_SHAPES:
        measured = found.get(shape, {})
        for name, said in measured.items():
            sizes = said["layout"]["tp"], said["layout"]["pp"]
            if "memory" in said:
                rows.append(memory_row(f"{shape}, {name}", plans.account(machine, shape, *sizes), said["memory"]))
        for goal in GOALS:
            likeliest = plans.listed(machine, shape, goal)[:LIKELIEST]
            figures = {one.name: value for one in likeliest if (value := figure(one, goal, measured.get(one.name, {})))}
            missing = [one.name for one in likeliest if one.name not in figures]
            unit = "tokens/s" if goal == "throughput" else "ms"
            said = [f"{name}: {value:,.0f} {unit}" for name, value in figures.items()]
            best = (max if goal == "throughput" else min)(figures, key=lambda name: figures[name], default="")
            plan = likeliest[0].name
            same = "" if missing else "yes" if plan == best else f"no, {lost(figures[plan], figures[best])} worse"
            ranks.append([shape, goal, plan, best if not missing else "", same,
                          ", ".join([*said, *(f"{name}: not measured" for name in missing)])])  # fmt: skip
    text = f"### Layouts\n\n{LAYOUTS_NOTE}\n{table(MEMORY, rows)}{reasons(rows)}\n"
    return text + table(["shape", "goal", "planned", "measured best", "the same", "the likeliest"], ranks) + "\n"


def figure(layout: Layout, goal: str, said: Mapping[str, Any]) -> float:
    """A layout's measured figure for a goal: tokens/s of all its replicas, or milliseconds of a request; 0 without."""
    if goal == "throughput":
        return layout.replicas * float(said.get("full", {}).get("tokens_per_s", 0))
    alone = said.get("alone")
    return alone["ttft_ms"] + speed.ANSWER * alone["tpot_ms"] if alone else 0.0


def lost(plan: float, best: float) -> str:
    """By how much the plan's figure is worse."""
    return f"{100 * (1 - min(plan, best) / max(plan, best)):.0f} %"


def section(found: Mapping[str, Any]) -> str:
    """One machine's part of the report."""
    machine = Machine.model_validate(found["machine"])
    link = f", {machine.links[0].kind}, {machine.links[0].gb_s:g} GB/s one way" if machine.links else ""
    seconds = found.get("seconds", {})
    text = f"## {len(machine.gpus)} × {machine.gpus[0].name}\n\n"
    text += f"- machine: {machine.cpu_cores} cores, driver {machine.driver}{link}\n"
    text += f"- versions: {', '.join(f'{name} {value}' for name, value in found.get('versions', {}).items())}\n"
    parts = ", ".join(f"{name} {value} s" for name, value in seconds.items())
    dates = found.get("dates") or [found["date"]]
    calls = "one call" if len(dates) == 1 else f"{len(dates)} calls on the same machine, one after the other"
    text += f"- {calls}, begun at {' and '.join(dates)} UTC; {parts}\n\n"
    if "families" in found:
        text += families(found["families"], machine)
    if "route" in found:
        text += route(found["route"], len(machine.gpus))
    if "layouts" in found:
        text += layouts(found["layouts"], machine)
    if "fair" in found:
        text += fair.report(found["fair"])
    if "sleep" in found:
        text += sleep.report(found["sleep"])
    if "turns" in found:
        text += turns.report(found["turns"])
    if failures := found.get("failures"):
        text += "### What is missing\n\n" + "".join(f"- {name}: {why}\n" for name, why in failures.items()) + "\n"
    return text


def write() -> None:
    """Writes docs/benchmarks/gpu.md from the results beside it, those of the smallest machine first."""
    found = [json.loads(path.read_text()) for path in DOCS.glob("gpus-*.json")]
    found.sort(key=lambda one: (len(one["machine"]["gpus"]), one["machine"]["cpu_cores"]))
    REPORT.write_text("\n".join([INTRO, *map(section, found)]).rstrip() + "\n")
