"""Shows each part of the stack with its health, and each replica with its load. Exit status 1 if any part is unwell."""

from __future__ import annotations

import math

import httpx
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from stack import hosts, images, objectives, settings
from stack.access import SECRETS, one_line
from stack.certificate import Untrusted
from stack.compose import Compose, running_files
from stack.console import Problem, console
from stack.docker import docker_version
from stack.gateway import Gateway, Replica
from stack.objectives import Objective, Objectives

# Of each model: its 95th percentiles in seconds, and the share of its requests that did not fail, over the last hour.
P95 = "histogram_quantile(0.95, sum by (model_name, le) (rate({}_bucket[1h])))"
SEEN = {
    "ttft": P95.format("vllm:time_to_first_token_seconds"),
    "itl": P95.format("vllm:inter_token_latency_seconds"),
    "answered": (
        'label_replace(1 - (sum by (model) (increase(gateway_requests_total{status=~"5.."}[1h]))'
        ' or 0 * sum by (model) (increase(gateway_requests_total{status!~"4.."}[1h])))'
        ' / sum by (model) (increase(gateway_requests_total{status!~"4.."}[1h])),'
        ' "model_name", "$1", "model", "(.+)")'
    ),
}


def number(value: float | None, form: str = "{:g}") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else form.format(value)


def coloured(text: str, *, well: bool) -> str:
    """Text for a table cell: green where all is well, else red."""
    return f"[{'green' if well else 'red'}]{escape(text)}[/]"


def replica_table(replicas: list[Replica]) -> Table:
    """The replicas as the gateway sees them."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    several = any(replica.on for replica in replicas)
    for column in ("replica", *(["host"] if several else []), "state"):
        table.add_column(column, no_wrap=True)
    for column in ("weight", "in\nflight", "running", "waiting", "KV\nuse"):
        table.add_column(column, justify="right", no_wrap=True)
    # the one that gives way on a narrow screen
    table.add_column("model", overflow="fold")
    for replica in replicas:
        table.add_row(
            escape(replica.name),
            *([replica.on or "–"] if several else []),
            coloured(replica.state, well=replica.well),
            number(replica.weight),
            number(replica.in_flight),
            number(replica.running),
            number(replica.waiting),
            number(replica.kv_usage, "{:.0%}"),
            escape("\n".join(replica.models)) or "–",
        )
    return table


def seen(prometheus: httpx.Client) -> dict[str, dict[str, float]]:
    """What each model did in the last hour, by its name and the names of SEEN; only what there was to see.

    Raises httpx.HTTPError, ValueError or LookupError where Prometheus does not answer.
    """
    found: dict[str, dict[str, float]] = {}
    for name, query in SEEN.items():
        answer = prometheus.get("/api/v1/query", params={"query": query}).raise_for_status().json()
        for one in answer["data"]["result"]:
            value = float(one["value"][1])
            if not math.isnan(value):
                found.setdefault(one["metric"].get("model_name", ""), {})[name] = value
    return found


def objectives_table(seen_of: dict[str, dict[str, float]], wanted: Objectives) -> Table:
    """Each model against its objectives; what misses one is red."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("last hour, and objective", overflow="fold")
    for column in ("first token\np95", "next token\np95", "answered"):
        table.add_column(column, justify="right", no_wrap=True)

    def cell(value: float | None, limit: float, form: str, *, well: bool) -> str:
        text = f"{number(value, form)} of {form.format(limit)}"
        return text if value is None else coloured(text, well=well)

    for model, found in sorted(seen_of.items()):
        aim: Objective = wanted.of(model)
        ttft, itl, answered = (found.get(name) for name in SEEN)
        table.add_row(
            escape(model) or "(no model)",
            cell(ttft, aim.ttft_p95_seconds, "{:.3g} s", well=(ttft or 0) <= aim.ttft_p95_seconds),
            cell(itl, aim.itl_p95_seconds, "{:.3g} s", well=(itl or 0) <= aim.itl_p95_seconds),
            cell(answered, aim.availability, "{:.2%}", well=(answered or 0) >= aim.availability),
        )
    return table


def show_objectives(wanted: settings.Settings) -> None:
    """Prints how the fleet stands against slo.yml, by Prometheus; in one line where it does not answer."""
    aims = objectives.load()
    url = f"http://127.0.0.1:{wanted.prometheus_port}"
    try:
        with httpx.Client(base_url=url, timeout=5, trust_env=False) as prometheus:
            found = seen(prometheus)
    except (httpx.HTTPError, ValueError, LookupError) as error:
        console.print(f"  [yellow]Prometheus at {url} does not tell of the objectives: {escape(str(error))}[/]")
        return
    if found:
        console.print(objectives_table(found, aims))
    else:
        console.print("  no request in the last hour to hold against the objectives")


def status() -> bool:
    """Prints both tables and gives whether all is well."""
    wanted = settings.load()
    if not docker_version()[0]:
        raise Problem("the Docker engine does not answer", "`make up` starts it")
    compose = Compose(*running_files())
    config = compose.config()
    containers = compose.containers()
    no_answer = f"no answer from {wanted.url}"
    joined = hosts.joined(SECRETS)
    gateway = Gateway(compose, wanted.url, wanted.https_domain)
    try:
        replicas = None if joined else gateway.published()
    except Untrusted as problem:
        replicas, no_answer = None, problem.what
    all_well = True

    parts = Table("part", "health", "", box=SIMPLE_HEAD)
    stopped = {replica.name for replica in replicas or () if replica.state == "stopped"}
    for name, service in config.services.items():
        container = containers.get(name)
        if name in stopped:
            parts.add_row(name, "[dim]stopped[/]", "by the autoscaler")
            continue
        if container is None and not service.build and not images.present(service.image):
            parts.add_row(name, "[dim]not here[/]", "[dim]its image is not on this machine[/]")
            continue
        well = container is not None and container.well
        all_well = all_well and well
        health = (container.health or container.state) if container else "not started"
        note = container.status.partition(" (")[0] if container else "`make up` starts it"
        parts.add_row(name, coloured(health, well=well), note)
    if joined:
        console.print(parts, f"  [bold]{joined.host}[/], a host of a fleet whose gateway is elsewhere")
        tell(hosts.own_ending(joined))
        return all_well
    if replicas is None:
        console.print(parts, f"  [red]{escape(no_answer)}[/]")
        return False
    console.print(parts, f"  [bold]{wanted.url}[/]")
    if "traces" in config.services:
        console.print(f"  traces: http://127.0.0.1:{wanted.traces_port}")
    console.print(replica_table(replicas))
    if (running := containers.get("prometheus")) and running.well:
        show_objectives(wanted)
    unready = [replica for replica in replicas if not replica.well]
    for replica in unready:
        console.print(f"  [red]{replica.name} is {replica.state}[/] {escape(replica.reason or '')}")
    tell([*gateway.differences, *hosts.ending(hosts.load(SECRETS))])
    return all_well and not unready


def tell(lines: list[str]) -> None:
    """Prints what an operator should know, a line each."""
    for line in lines:
        console.print(f"  [yellow]{escape(line)}[/]", soft_wrap=True)


def main() -> None:
    """Show each part of the stack with its health, and each replica with its load; exit status 1 if any is unwell."""
    with one_line():
        raise typer.Exit(0 if status() else 1)


if __name__ == "__main__":
    typer.run(main)
