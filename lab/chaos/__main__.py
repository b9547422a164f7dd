"""The fault table: each fault under a steady load of streams, and what became of every request.

    make chaos                       real Nginx over simulated replicas, no GPU, no model
    make chaos ARGS=--real           the running stack, through its published port
    make chaos ARGS=--alerts         which alerts each fault makes fire, over simulated replicas
    make chaos ARGS='--only kill'    some rows

A full run writes docs/benchmarks/chaos.md, chaos-real.md or alerts.md. Exit 1 when a row is wrong.
"""

import asyncio
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lab.chaos import alerts, real, rows
from lab.chaos.rows import Row
from lab.report import DOCS, provenance, table
from lab.sim.gateway import nginx_version
from lab.stack import Stack, StackError
from prometheus.rules.check import rules_in
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
        if case.chosen(only, quick):
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


ALERTS_HEAD = ["fault", "alerts that fire, and after how many seconds", "none fires any more after"]
ALERTS_INTRO = """# Faults and alerts

Written by `make chaos ARGS=--alerts`. Real Nginx and real Prometheus over 3 simulated replicas (1 in the row of the KV
cache), each row on a fleet of its own under a steady load. Before each fault nothing fires; then exactly the alerts of
the row do, and no other for {hold:.0f} s more.

Prometheus runs the rules {scale} times as quick as they are: what waits for 5 minutes waits for {five:.0f} s here, and
what looks back for 6 hours looks back for {six:.0f} minutes. Faults keep their own time, so the seconds compare rows,
and are not those of a real stack. {at_once} rows run at a time.
"""
ALERTS_REST = """
{names} are not in this table, because nothing here has a GPU, a host or a container's limit to fail, or
the clients of hours.
`promtool test rules` shows them firing and silent, as it does with every alert: [tests/alerts](../../tests/alerts).
[The runbook](../runbook.md) says what each means and what to do.
"""


def alert_cells(row: alerts.Row) -> list[str]:
    """A row's cells, as ALERTS_HEAD names them."""
    fired = ", ".join(f"{name} ({after:.0f})" for name, after in sorted(row.fired.items(), key=lambda one: one[1]))
    said = fired or (f"not run: {row.skipped}" if row.skipped else "none")
    wrong = "".join(f"; WRONG: {what}" for what in row.wrong)
    return [row.case.name, said + wrong, "" if row.gone_s is None else f"{row.gone_s:.0f} s"]


def alerts_page(found: list[alerts.Row]) -> str:
    """The text of alerts.md."""
    intro = ALERTS_INTRO.format(
        hold=alerts.HOLD,
        scale=alerts.SCALE,
        five=300 / alerts.SCALE,
        six=6 * 60 / alerts.SCALE,
        at_once=alerts.AT_ONCE,
    )
    shown = {name for row in found for name in row.fired}
    rest = dict.fromkeys(rule["alert"] for _, rule in rules_in() if "alert" in rule and rule["alert"] not in shown)
    names = ", ".join(rest)
    return (
        f"{intro}\n{provenance([nginx_version()])}\n{table(ALERTS_HEAD, [alert_cells(row) for row in found])}"
        f"{ALERTS_REST.format(names=names)}"
    )


def with_alerts(only: str, quick: bool) -> list[alerts.Row]:
    """The rows of alerts whose name has `only` in it."""

    def tell_of(row: alerts.Row) -> None:
        console.print(" | ".join(alert_cells(row)), style="red" if row.wrong else None, highlight=False)

    cases = [case for case in alerts.CASES if only.lower() in case.name.lower() and (case.quick or not quick)]
    return alerts.play_all(cases, tell_of)


def tell(row: Row) -> None:
    """Says how a row went."""
    verdict = f"not run: {row.skipped}" if row.skipped else "; ".join(row.wrong) or f"{row.sent} requests, none failed"
    console.print(f"{row.name}: {verdict}", style="red" if row.wrong else None, highlight=False)


def save(name: str, text: str) -> None:
    """Writes a page of docs/benchmarks."""
    DOCS.mkdir(parents=True, exist_ok=True)
    path = DOCS / name
    path.write_text(text)
    console.print(f"written: {path.relative_to(ROOT)}", highlight=False)


@app.command()
def main(
    on_real: Annotated[bool, typer.Option("--real", help="The running stack in place of simulated replicas.")] = False,
    on_alerts: Annotated[bool, typer.Option("--alerts", help="Which alerts each fault makes fire.")] = False,
    quick: Annotated[bool, typer.Option(help="Only the rows of the test suite.")] = False,
    only: Annotated[str, typer.Option(help="Only rows whose name has this in it.")] = "",
) -> None:
    """Plays the faults, prints the table, and writes it to docs/benchmarks when it is whole."""
    if on_alerts:
        played = with_alerts(only, quick)
        if not only and not quick:
            save("alerts.md", alerts_page(played))
        raise typer.Exit(1 if any(row.wrong for row in played) else 0)
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
        save("chaos-real.md" if on_real else "chaos.md", text)
    if any(row.wrong for row in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
