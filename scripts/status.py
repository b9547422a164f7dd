"""Shows each part of the stack with its health, and each replica with its load. Exit status 1 if any part is unwell."""

from __future__ import annotations

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from stack import images, settings
from stack.certificate import Untrusted
from stack.compose import Compose, running_files
from stack.console import Problem, console, one_line_for_mistakes
from stack.docker import docker_version
from stack.gateway import Gateway, Replica


def number(value: float | None, form: str = "{:g}") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else form.format(value)


def coloured(text: str, *, well: bool) -> str:
    """Text for a table cell: green where all is well, else red."""
    return f"[{'green' if well else 'red'}]{escape(text)}[/]"


def replica_table(replicas: list[Replica]) -> Table:
    """The replicas as the gateway sees them."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("replica", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("weight", "in\nflight", "running", "waiting", "KV\nuse"):
        table.add_column(column, justify="right", no_wrap=True)
    # the one that gives way on a narrow screen
    table.add_column("model", overflow="fold")
    for replica in replicas:
        table.add_row(
            escape(replica.name),
            coloured(replica.state, well=replica.state == "ready"),
            number(replica.weight),
            number(replica.in_flight),
            number(replica.running),
            number(replica.waiting),
            number(replica.kv_usage, "{:.0%}"),
            escape("\n".join(replica.models)) or "–",
        )
    return table


def status() -> bool:
    """Prints both tables and gives whether all is well."""
    wanted = settings.load()
    if not docker_version()[0]:
        raise Problem("the Docker engine does not answer", "`make up` starts it")
    compose = Compose(*running_files())
    config = compose.config()
    containers = compose.containers()
    no_answer = f"no answer from {wanted.url}"
    try:
        replicas = Gateway(compose, wanted.url, wanted.https_domain).published()
    except Untrusted as problem:
        replicas, no_answer = None, problem.what
    all_well = True

    parts = Table("part", "health", "", box=SIMPLE_HEAD)
    for name, service in config.services.items():
        container = containers.get(name)
        if container is None and not service.build and not images.present(service.image):
            parts.add_row(name, "[dim]not here[/]", "[dim]its image is not on this machine[/]")
            continue
        well = container is not None and container.well
        all_well = all_well and well
        health = (container.health or container.state) if container else "not started"
        note = container.status.partition(" (")[0] if container else "`make up` starts it"
        parts.add_row(name, coloured(health, well=well), note)
    if replicas is None:
        console.print(parts, f"  [red]{escape(no_answer)}[/]")
        return False
    console.print(parts, f"  [bold]{wanted.url}[/]")
    console.print(replica_table(replicas))
    unready = [replica for replica in replicas if replica.state != "ready"]
    for replica in unready:
        console.print(f"  [red]{replica.name} is {replica.state}[/] {escape(replica.reason or '')}")
    return all_well and not unready


def main() -> None:
    """Show each part of the stack with its health, and each replica with its load; exit status 1 if any is unwell."""
    with one_line_for_mistakes():
        raise typer.Exit(0 if status() else 1)


if __name__ == "__main__":
    typer.run(main)
