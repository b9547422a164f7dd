#!/usr/bin/env python3
"""Brings a model into models/, where all replicas see it: from the hub, a folder, or an HTTP or S3 mirror.

A download that was cut off goes on where it ended; what has arrived is checked against what the source knows of it; and
only a whole model gets its place under models/, so that no replica ever loads half of one."""

from pathlib import Path
from typing import Annotated

import typer

from models import download
from models.sources import AGAIN, name_of, open_source
from stack.console import Problem, one_line_for_mistakes
from stack.shell import ROOT


def main(
    source: Annotated[
        str,
        typer.Argument(help="OWNER/NAME on the hub, a folder, https://… or s3://BUCKET/FOLDER.", show_default=False),
    ],
    name: Annotated[str | None, typer.Option(help="Folder under models/; the source's own name if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="A commit, tag or branch of the hub's repository.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the token for a gated model or a mirror; for the hub HF_TOKEN_FILE names one too."
        ),
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="A mirror of the hub; HF_ENDPOINT names one too.")] = None,
    models: Annotated[Path, typer.Option(help="The folder of models.")] = ROOT / "models",
) -> None:
    """Bring a model into models/: resumed, checked, and only put in place when whole."""
    with one_line_for_mistakes():
        try:
            name = name or name_of(source)
            download.check_name(name)
            download.bring(open_source(source, revision, token_file, endpoint), source, name, models)
        except OSError as error:
            raise Problem(
                f"{error.filename or models}: {error.strerror or error}",
                f"free disk space or correct the permissions, then {AGAIN}",
            ) from error


if __name__ == "__main__":
    typer.run(main)
