"""The bench's reports: their words and tables, shown and written."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import mean, median, stdev

from rich.console import Console
from rich.markdown import Markdown

from lab.bench import overhead, peers
from lab.bench.overhead import SIZES, Cost
from lab.bench.peers import OURS
from lab.bench.pictures import draw
from lab.bench.workloads import WORKLOADS, Cell
from lab.report import DOCS, provenance, table
from lab.sim.gateway import nginx_version

console = Console()

OVERHEAD = """# What a gateway costs

Written by `make bench`. Two replicas that answer at once; the gateway on a core of its own, load and replicas on
another. Every request is a chat of 1, 10 or 100 KB, no two the same; {connections} connections by wrk for the highest
rate.
"""

RATES = """## Highest rate

Requests a second, and in brackets how many times that this gateway does.
"""

LATENCIES = """## Latency at a held rate

Milliseconds p50, p99 from when a request was due to its whole answer; in brackets what is added to the replica itself.
"""

LOADS = """# Workloads

Written by `make bench`. {replicas} simulated replicas (`{shape}`;
lab/sim/engine.py has their model of time), {clients} clients, {seconds:.0f} s each after a warm-up, new replicas and
a new gateway for each row. Direct: clients take the replicas in turn. {designs} are other
designs of this gateway's affinity. vllm-router's {best} is the best of {others}
in this run.
"""

TRACE = """# A trace

Written by `make bench ARGS='--parts trace'`. {replicas} simulated replicas (`{shape}`;
lab/sim/engine.py has their model of time), new ones and a new gateway for each row. {seconds:.0f} s of requests,
{rate:.0f} a second; those due in the first third only warm up.

The requests have the shape of Mooncake's published trace of conversations: conversations that grow and all have one
system prompt, prompts of 900 to 30,000 tokens, bursts of ten at once, give or take five. They come when they are due,
however busy the replicas are. lab/bench/workloads.py has the quantiles. Two things differ: the pauses within a
conversation are a twentieth as long, and the answers three tenths.
"""

HITS = """# Prefix hits, beside those of another commit

Written by `make bench ARGS='--parts hits --against {against}'`. {replicas} simulated replicas (`{shape}`), {clients}
clients, {seconds:.0f} s after a warm-up, new replicas and a new gateway each time; the same {seeds} seeds for both. The
mean, and in brackets the least and the most. Lower is what is lower by more than the standard error of the mean.
"""

MEMORY = """# The gateway's memory

Written by `make bench`. All workers together, over {requests:,} requests of 1 KB, no two the same, as fast as they go.
Shared is what they have in common: the zones, of fixed sizes, which fill up once.
"""

BY_BOTH_PATHS = """# The time to the first token

Written by `make bench ARGS='--parts first-token'`. {replicas} replicas of {model} in the running stack.
"""

REAL = """# On real replicas

Written by `make bench ARGS=--real`. {replicas} replicas of {model} on the CPU in the running stack, {clients} clients,
{seconds:.0f} s each. All of it shares one machine, so differences in speed between gateways that send requests to the
same replicas are noise; prefix hits are not.
"""

TTFT = """## Time to the first token

{count} requests by each path in turn, one at a time, from a container in the fleet's network. Milliseconds.

{table}
The gateway adds {added:.2f} ms at the median (the median of the differences of neighbours: {pairs:.2f} ms).
"""


def tell(what: str) -> None:
    """Says what is measured now, with the time of day (UTC)."""
    console.print(f"{datetime.now(UTC):%H:%M:%S} {what}", style="dim", highlight=False)


def overhead_report(found: dict[str, dict[str, Cost]]) -> str:
    """The tables of highest rates and of latencies; `found` has each peer's costs by size."""
    ours = found[OURS]
    rates, latency = [], []
    for name, costs in found.items():
        cells = [f"{median(costs[size].rates):,.0f}" for size in SIZES]
        if name not in (OURS, "direct"):
            cells = [
                f"{cell} ({median(ours[size].rates) / median(costs[size].rates):.1f} x)"
                for cell, size in zip(cells, SIZES, strict=True)
            ]
        errors = sum(cost.errors for cost in costs.values())
        rates.append([name, *cells, str(errors)])
        row = [name, f"{overhead.held(name):.0f}"]
        for size in SIZES:
            base, cost = found["direct"][size], costs[size]
            p50, p99 = median(cost.p50_ms), median(cost.p99_ms)
            added = "" if name == "direct" else f" ({p50 - median(base.p50_ms):+.2f}, {p99 - median(base.p99_ms):+.2f})"
            row.append(f"{p50:.2f}, {p99:.2f}{added}")
        latency.append(row)
    sizes = list(SIZES)
    return f"""{RATES}
{table(["", *sizes, "errors"], rates)}
{LATENCIES}
{table(["", "requests/s", *sizes], latency)}"""


HEAD = ["", "requests", "lost", "prefix hits", "TTFT p50", "p90", "p99", "tokens/s", "busiest / mean"]

PICTURES = """![TTFT p90, ms](workloads-ttft.svg)

![tokens/s](workloads-tokens.svg)

![prefix hits, %](workloads-hits.svg)

"""


def cell_row(name: str, cell: Cell) -> list[str]:
    """A peer's row in a workload's table."""
    waits = [f"{wait * 1000:.0f} ms" for wait in (cell.ttft_p50, cell.ttft_p90, cell.ttft_p99)]
    return [
        name,
        f"{cell.requests}",
        f"{cell.lost}",
        f"{cell.hit_rate:.1%}",
        *waits,
        f"{cell.tokens_per_s:.0f}",
        f"{cell.spread:.2f}",
    ]


def workloads_report(found: dict[str, dict[str, Cell]]) -> str:
    """A table for each workload with a row for each peer; `found` has each peer's cells by workload."""
    parts = []
    for workload in next(iter(found.values())):
        says = (WORKLOADS[workload].__doc__ or "").strip()
        rows = [cell_row(name, cells[workload]) for name, cells in found.items()]
        parts.append(f"## {workload[0].upper()}{workload[1:]}\n\n{says}\n\n{table(HEAD, rows)}")
    return "\n".join(parts)


def hits_report(now: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> str:
    """A row for each workload; both have the hits by workload, from the same seeds in the same order."""
    rows = []
    for workload, hits in now.items():
        differences = [one - other for one, other in zip(hits, before[workload], strict=True)]
        error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        cells = [f"{mean(some):.1%} ({min(some):.1%} to {max(some):.1%})" for some in (before[workload], hits)]
        rows.append(
            [workload, *cells, f"{mean(differences) * 100:+.1f}", "yes" if mean(differences) < -error else "no"]
        )
    return table(["", "before", "now", "difference, points", "lower"], rows)


def trace_report(found: dict[str, Cell]) -> str:
    """A table with a row for each peer."""
    return table(HEAD, [cell_row(name, cell) for name, cell in found.items()])


def publish(
    name: str, intro: str, report: str, seed: int, write: bool, charts: str = "", peers_too: bool = True
) -> None:
    """Shows a report on the terminal and, where `write` says so, writes it with its charts to docs/benchmarks.

    `name` is its file's name, `intro` what stands above its provenance, `charts` the lines that show its charts;
    `peers_too`: other gateways were measured, and their versions count.
    """
    console.print(Markdown(report))
    if not write:
        return
    DOCS.mkdir(parents=True, exist_ok=True)
    versions = [nginx_version(), *(peers.versions() if peers_too else [])]
    (DOCS / name).write_text(f"{intro}\n{provenance(versions, seed)}\n{charts}{report}")
    draw(name)
    console.print(f"written: docs/benchmarks/{name}", highlight=False)
