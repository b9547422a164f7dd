"""Writes the dashboards' JSON from the tables of panels beside it, and checks that they are in step and sound.

    .venv/bin/python -m grafana.dashboards

fleet.py, replica.py, gateway.py, usage.py and hardware.py are the tables; rules.py says what holds for each panel.
"""

import json
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from grafana import fleet, gateway, hardware, replica, usage
from grafana.panels import Dashboard
from grafana.render import rendered
from grafana.rules import SCRAPE_LABELS, Metrics, faults, known_metrics

HERE = Path(__file__).parent
DASHBOARDS = [
    fleet.DASHBOARD,
    replica.DASHBOARD,
    gateway.DASHBOARD,
    usage.DASHBOARD,
    hardware.DASHBOARD,
    hardware.WITH_GPUS,
]
JOBS = ("replicas", "gateway", "prometheus", "host")


def path_of(dashboard: Dashboard) -> Path:
    """The file that Grafana reads."""
    return HERE / dashboard.folder / f"{dashboard.uid}.json"


def check() -> list[str]:
    """Every fault of the dashboards, one line each; none when all is well."""
    known = known_metrics()
    found: list[str] = []
    for each in DASHBOARDS:
        text = rendered(each)
        found += faults(json.loads(text), known)
        path = path_of(each)
        if not path.exists() or path.read_text() != text:
            found.append(f"{path.relative_to(HERE.parent)} is out of step: run python -m grafana.dashboards")
    stray = {path for folder in HERE.glob("dashboards*/") for path in folder.glob("*.json")}
    found += [
        f"{path.relative_to(HERE.parent)} is written by nothing" for path in stray - set(map(path_of, DASHBOARDS))
    ]
    return found


def record(prometheus: str) -> None:
    """Writes metrics.json: for each scrape job its metrics with their label names, one metric per line.

    What this stack has adds to what is there. What only other hosts have (GPUs, HTTPS, speculation) stands under
    `elsewhere`, and stays.
    """
    jobs: dict[str, dict[str, list[str]]] = json.loads((HERE / "metrics.json").read_text())
    for job in JOBS:
        reply = httpx.get(f"{prometheus}/api/v1/series", params={"match[]": f'{{job="{job}"}}'}, timeout=30)
        reply.raise_for_status()
        metrics: Metrics = {name: set(labels) for name, labels in jobs.get(job, {}).items()}
        for series in reply.json()["data"]:
            metrics.setdefault(series["__name__"], set()).update(series.keys() - SCRAPE_LABELS - {"__name__"})
        jobs[job] = {name: sorted(labels) for name, labels in metrics.items()}
    write_metrics(jobs)


def write_metrics(jobs: dict[str, dict[str, list[str]]]) -> None:
    """Writes metrics.json."""
    blocks = []
    for job, metrics in jobs.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(sorted(labels))}" for name, labels in sorted(metrics.items())]
        blocks.append(f' "{job}": {{\n' + ",\n".join(lines) + "\n }")
    (HERE / "metrics.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main(
    check_only: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if anything is wrong.")] = False,
    record_from: Annotated[
        str | None, typer.Option("--record", metavar="URL", help="Add to metrics.json what this Prometheus has.")
    ] = None,
) -> None:
    """Write the dashboards' JSON, or check it."""
    console = Console(stderr=True, soft_wrap=True)
    if record_from:
        try:
            record(record_from)
        except httpx.HTTPError as error:
            console.print(f"Prometheus at {record_from} does not answer ({error}): is the stack up (make status)?")
            raise typer.Exit(1) from None
    if not check_only:
        for each in DASHBOARDS:
            path_of(each).parent.mkdir(exist_ok=True)
            path_of(each).write_text(rendered(each))
    found = check()
    for line in found:
        console.print(line, style="red", markup=False)
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
