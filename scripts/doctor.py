"""Looks at everything and says what is wrong, since when, and what to do. Changes nothing.

Exit status: 0 nothing is wrong, 1 something is wrong, 2 something could not be looked at. (`make` turns 1 into 2: a
program runs `PYTHONPATH=. .venv/bin/python scripts/doctor.py --json`, or reads `verdict` in its answer.)
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from diagnosis.findings import Diagnosis, Exit
from diagnosis.looks import diagnose
from diagnosis.show import table
from stack.access import one_line
from stack.console import Problem, console

# of the picture, in characters
PICTURE_WIDTH = 110


def read(file: Path) -> Diagnosis:
    """A diagnosis that was written with --json. A Problem where the file is none."""
    try:
        return Diagnosis.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise Problem(f"{file} is no diagnosis: {where}: {first['msg']}", "name a file that --json wrote") from None


def draw(diagnosis: Diagnosis, file: Path) -> None:
    """Writes the table as a picture."""
    paper = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO(), highlight=False)
    paper.print(table(diagnosis))
    picture = paper.export_svg(title="make doctor", unique_id="doctor")
    # whoever shows it has a font; nothing is fetched for it
    file.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
    show: Annotated[Path | None, typer.Option(help="Show a diagnosis that --json wrote, and look at nothing.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the table as a picture into this file, too.")] = None,
) -> None:
    """Look at everything; say what is wrong, since when, and what to do. Exit status 1 if anything is wrong, 2 if
    something could not be looked at."""
    with one_line():
        if show:
            diagnosis = read(show)
        else:
            aside = Console(stderr=True)
            with aside.status("Looking") as status:
                diagnosis, _ = diagnose(lambda title: status.update(f"Looking: {title}"))
        if svg:
            draw(diagnosis, svg)
        if as_json:
            typer.echo(diagnosis.model_dump_json(indent=1))
        else:
            console.print(table(diagnosis))
        sys.exit(diagnosis.exit if diagnosis.exit is not Exit.WELL else 0)


if __name__ == "__main__":
    typer.run(main)
