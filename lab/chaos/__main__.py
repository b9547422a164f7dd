"""The fault table: each fault under a steady load of streams, and what became of every request.

    make chaos                       real Nginx over simulated replicas, no GPU, no model
    make chaos ARGS=--real           the running stack, through its published port
    make chaos ARGS='--only kill'    some rows

A full run writes docs/benchmarks/chaos.md, or chaos-real.md. Exit 1 when a row is wrong.
"""

import asyncio
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lab.chaos import real, rows
from lab.chaos.rows import Row
from lab.report import DOCS, provenance, table
from lab.sim.gateway import nginx_version
from lab.stack import Stack, StackError
from stack.shell import ROOT

HEAD = [
    "fault",
    "sent",
    "not begun but failed",
    "cut on the replica hit",
    "cut elsewhere",
    "refused (4xx)",
    "longest wait for a first token",
    "route changed after",
    "served again after",
    "note",
]
INTRO = """# Faults under load

Written by `make chaos{args}`. {what} Every request is a stream; one that gets no token for {patience:.0f} s is lost.
Begun means that a token had come. Times count from the fault (route changed) and from its end (served again).
"""

app = typer.Typer(add_completion=False)
console = Console()


def seconds(value: float | None) -> str:
    """Seconds with their unit; nothing for what was not measured."""
    return "" if value is None else f"{value:.2f} s"


def cells(row: Row) -> list[str]:
    """A row's cells, as HEAD names them."""
    if row.skipped:
        return [row.name, *[""] * (len(HEAD) - 2), f"not run: {row.skipped}"]
    counts = [row.sent, row.failed, row.cut_there, row.cut_elsewhere, row.refused]
    times = [seconds(row.longest_wait_s), seconds(row.route_s), seconds(row.recovery_s)]
    return [
        row.name,
        *map(str, counts),
        *times,
        "; ".join([row.note, *(f"WRONG: {what}" for what in row.wrong)]).strip("; "),
    ]


def show(found: list[Row]) -> None:
    """Prints the table; rows that are wrong are red."""
    out = Table(*HEAD)
    for row in found:
        out.add_row(*cells(row), style="red" if row.wrong else "yellow" if row.skipped else None)
    console.print(out)


async def simulated(only: str, quick: bool) -> list[Row]:
    """The rows whose name has `only` in it, on simulated replicas."""
    found = []
    for case in rows.CASES:
        if only.lower() in f"{case.name} {case.run.__name__}".lower() and (case.quick or not quick):
            with console.status(case.name):
                found.append(await rows.play(case))
            tell(found[-1])
    return found


async def on_stack(only: str) -> list[Row]:
    """The rows whose name has `only` in it, on the running stack."""
    found = []
    stack = Stack.find()
    for name, fault, hits in real.CASES:
        if only.lower() in f"{name} {fault.__name__}".lower():
            with console.status(name):
                found.append(await real.play(name, fault, hits, stack))
            tell(found[-1])
    return found


def tell(row: Row) -> None:
    """Says how a row went."""
    verdict = f"not run: {row.skipped}" if row.skipped else "; ".join(row.wrong) or f"{row.sent} requests, none failed"
    console.print(f"{row.name}: {verdict}", style="red" if row.wrong else None, highlight=False)


@app.command()
def main(
    on_real: Annotated[bool, typer.Option("--real", help="The running stack in place of simulated replicas.")] = False,
    quick: Annotated[bool, typer.Option(help="Only the rows of the test suite.")] = False,
    only: Annotated[str, typer.Option(help="Only rows whose name has this in it.")] = "",
) -> None:
    """Plays the faults, prints the table, and writes it to docs/benchmarks when it is whole."""
    try:
        found = asyncio.run(on_stack(only) if on_real else simulated(only, quick))
    except StackError as why:
        console.print(str(why), style="red", markup=False)
        raise typer.Exit(1) from None
    show(found)
    if not only and not quick:
        what = (
            "The running stack through its published port: real vLLM on the CPU, 4 clients."
            if on_real
            else "Real Nginx over 4 simulated replicas, 16 clients; each row on a fleet and a gateway of its own."
        )
        patience = real.PATIENCE if on_real else rows.PATIENCE
        intro = INTRO.format(args=" ARGS=--real" if on_real else "", what=what, patience=patience)
        text = f"{intro}\n{provenance([nginx_version()])}\n{table(HEAD, [cells(row) for row in found])}"
        DOCS.mkdir(parents=True, exist_ok=True)
        path = DOCS / ("chaos-real.md" if on_real else "chaos.md")
        path.write_text(text)
        console.print(f"written: {path.relative_to(ROOT)}", highlight=False)
    if any(row.wrong for row in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
