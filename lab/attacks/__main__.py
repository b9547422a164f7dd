"""Every attack of `rows.py` on a gateway that asks for keys.

    PYTHONPATH=scripts .venv/bin/python -m lab.attacks              real Nginx over simulated replicas
    PYTHONPATH=scripts .venv/bin/python -m lab.attacks --real       the running stack, which must ask for keys
    PYTHONPATH=scripts .venv/bin/python -m lab.attacks --only slow  some rows

A whole run writes docs/attacks.md. Exit 1 when something else is seen than expected.
"""

from typing import Annotated

import typer
from rich.console import Console

from lab.attacks.rows import GROUPS, Row
from lab.attacks.target import Target, real, simulated
from lab.report import provenance
from lab.sim.gateway import nginx_version
from lab.stack import StackError
from stack.shell import ROOT

PATH = ROOT / "docs" / "attacks.md"
INTRO = """# Attacks

{count} attacks on a gateway that asks for keys: what was sent, what should come back, and what came. Written by
`python -m lab.attacks{args}`, which exits with an error where the two differ. {what}

[Threats](threats.md) says what protects; `tests/gateway/test_attacks.py` fires these rows in every run of the tests.
"""

app = typer.Typer(add_completion=False)
console = Console(highlight=False)


def fired(target: Target, only: str) -> dict[str, list[tuple[Row, str | None]]]:
    """Each group's rows whose words have `only` in them, with what was seen; None where it could not be."""
    found: dict[str, list[tuple[Row, str | None]]] = {}
    for group, rows in GROUPS.items():
        chosen = [row for row in rows if only.lower() in f"{group} {row.attack} {row.input}".lower()]
        for row in chosen:
            seen = row.fire(target)
            found.setdefault(group, []).append((row, seen))
            wrong = seen is not None and seen != row.expected
            if wrong:
                console.print(
                    f"{row.attack}: {row.input}: {row.expected!r} expected, {seen!r} seen", style="red", markup=False
                )
    return found


def cell(text: str) -> str:
    """Text of a table's cell."""
    return text.replace("|", "\\|")


def report(found: dict[str, list[tuple[Row, str | None]]], about: str, on_real: bool) -> str:
    """The page."""
    what = f"Here it was {about}." if on_real else f"Here it was {about}; `--real` takes the running stack."
    count = sum(len(rows) for rows in found.values())
    parts = [INTRO.format(count=count, args=" --real" if on_real else "", what=what), provenance([nginx_version()])]
    for group, rows in found.items():
        lines = [f"## {group}", "", "| attack | input | expected | seen |", "|---|---|---|---|"]
        for row, seen in rows:
            cells = (row.attack, row.input, row.expected, "not to be seen here" if seen is None else seen)
            lines.append(f"| {' | '.join(map(cell, cells))} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


@app.command()
def main(
    on_real: Annotated[bool, typer.Option("--real", help="The running stack in place of simulated replicas.")] = False,
    only: Annotated[str, typer.Option(help="Only rows that have this in their words.")] = "",
) -> None:
    """Fire the attacks, and write docs/attacks.md when all were."""
    try:
        with real() if on_real else simulated() as target:
            found = fired(target, only)
    except StackError as why:
        console.print(str(why), style="red", markup=False)
        raise typer.Exit(1) from None
    all_rows = [one for rows in found.values() for one in rows]
    wrong = [row for row, seen in all_rows if seen not in (None, row.expected)]
    console.print(f"{len(all_rows)} attacks, {len(wrong)} answered otherwise than expected")
    if not only:
        PATH.write_text(report(found, target.about, on_real))
        console.print(f"written: {PATH.relative_to(ROOT)}")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
