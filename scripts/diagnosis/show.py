"""A diagnosis as a table for people."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from diagnosis.findings import Diagnosis, Finding, Look
from diagnosis.seen import ago

MARKS = {"well": "[green]✓[/]", "note": "[yellow]•[/]", "wrong": "[red]✗[/]", "not looked": "[dim]–[/]"}
COLOURS = {"wrong": "red", "note": "yellow"}


def table(diagnosis: Diagnosis) -> Group:
    """The looks, each with what was found and what to do, and a line for all."""
    rows = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    rows.add_column(no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    for look in diagnosis.looks:
        rows.add_row(MARKS[look.state], escape(look.title), _words(look, diagnosis))
    return Group(rows, summary(diagnosis))


def _words(look: Look, diagnosis: Diagnosis) -> str:
    """What a look says."""
    first = [f"[dim]{escape(look.result)}[/]"] if look.result else []
    return "\n".join(first + [_finding(one, diagnosis) for one in look.findings])


def _finding(one: Finding, diagnosis: Diagnosis) -> str:
    """What is wrong, since when, and what to do."""
    since = f" [dim](since {one.since:%Y-%m-%d %H:%M} UTC, {ago(one.since, diagnosis.at)})[/]" if one.since else ""
    what = f"[{COLOURS[one.level]}]{escape(one.subject)}[/]: {escape(one.what)}"
    return f"{what}{since}\n  [bold]What to do:[/] {escape(one.fix)}"


def summary(diagnosis: Diagnosis) -> str:
    """One line for all."""
    count = {level: sum(one.level == level for look in diagnosis.looks for one in look.findings)
             for level in ("wrong", "note")}  # fmt: skip
    blind = [look.title for look in diagnosis.looks if look.state == "not looked"]
    words = [f"{count['wrong']} {'thing is' if count['wrong'] == 1 else 'things are'} wrong"] if count["wrong"] else []
    if count["note"]:
        words.append(f"{count['note']} {'note' if count['note'] == 1 else 'notes'}")
    if blind:
        words.append(f"not looked at: {', '.join(blind)}")
    if diagnosis.verdict == "well":
        return f"[green]All is well.[/] {'; '.join(words)}".rstrip()
    return f"[red]{'; '.join(words)}[/]" if diagnosis.verdict == "wrong" else f"[yellow]{'; '.join(words)}[/]"
