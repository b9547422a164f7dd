#!/usr/bin/env python3
"""Brings a model into models/, where all replicas see it: from the hub, a folder, or an HTTP or S3 mirror.

A download that was cut off goes on where it ended; what has arrived is checked against its SHA-256; and only a whole
model gets its place under models/, so that no replica ever loads half of one."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from planner.hub import HUB, read_token
from planner.sources import SUMS, File, Source, open_source
from stack.console import Problem, console, one_line_for_mistakes

ROOT = Path(__file__).resolve().parent.parent
SPARE = 1 << 30  # bytes of disk that stay free
ABOUT = ".source.json"


def main(
    source: Annotated[
        str,
        typer.Argument(help="OWNER/NAME on the hub, a folder, https://… or s3://BUCKET/FOLDER.", show_default=False),
    ],
    name: Annotated[str | None, typer.Option(help="Folder under models/; the source's own name if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="A commit, tag or branch of the hub's repository.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token for a gated model; HF_TOKEN_FILE names one too.")
    ] = None,
    endpoint: Annotated[str, typer.Option(envvar="HF_ENDPOINT", help="A mirror of the hub.")] = HUB,
    models: Annotated[Path, typer.Option(help="The folder of models.")] = ROOT / "models",
) -> None:
    """Bring a model into models/: resumed, checked, and only put in place when whole."""
    with one_line_for_mistakes():
        found = open_source(source, revision, read_token(token_file), endpoint)
        files = found.files()
        if not any(file.path == "config.json" for file in files):
            raise Problem(f"{source} has no config.json", "is it a model's folder?")
        place = models / (name or found.name)
        if _is_there(place, found.revision, files):
            console.print(f"{place} is there already, revision {found.revision[:12]}")
            return
        if place.exists():
            raise Problem(f"{place} holds something else already", "move it away, or choose another --name")
        part = models / ".partial" / (name or found.name)
        _check_disk(part, files)
        try:
            sums = {file.path: sum_ for file, sum_ in zip(files, _fetch(found, files, part), strict=True)}
        except httpx.HTTPError as error:
            raise Problem(f"{source} broke off: {error}", "run this again: it goes on where it ended") from error
        (part / SUMS).write_text("".join(f"{digest}  {path}\n" for path, digest in sums.items() if path != SUMS))
        (part / ABOUT).write_text(json.dumps({"source": source, "revision": found.revision}, indent=1) + "\n")
        place.parent.mkdir(parents=True, exist_ok=True)
        part.rename(place)
        console.print(
            f"{place} is complete, revision {found.revision[:12]}. MODEL={place.relative_to(models)} serves it."
        )


def _is_there(place: Path, revision: str, files: list[File]) -> bool:
    about = place / ABOUT
    same = about.is_file() and json.loads(about.read_text()).get("revision") == revision
    sizes = (place / file.path for file in files if file.path != SUMS)
    return same and all(path.is_file() for path in sizes)


def _check_disk(part: Path, files: list[File]) -> None:
    part.mkdir(parents=True, exist_ok=True)
    here = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    needed = sum(file.size for file in files) - here + SPARE
    free = shutil.disk_usage(part).free
    if needed > free:
        raise Problem(
            f"{part.parent.parent} has {free / SPARE:.1f} GiB free, {needed / SPARE:.1f} GiB are needed",
            "free some, or name another folder with --models",
        )


def _fetch(source: Source, files: list[File], part: Path) -> list[str]:
    """Fetches what is missing; returns each file's SHA-256."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    sums = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(file.size for file in files))
        for file in files:
            progress.update(task, description=file.path)
            path = part / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            have = 0
            with path.open("a+b") as stream:
                stream.seek(0)
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
                    have += len(chunk)
                progress.advance(task, have)
                if have < file.size or not file.size:
                    for chunk in source.read(file, have):
                        stream.write(chunk)
                        digest.update(chunk)
                        have += len(chunk)
                        progress.advance(task, len(chunk))
            if file.size and have < file.size:
                raise Problem(f"{file.path} broke off at {have:,} of {file.size:,} bytes", "run this again: it goes on")
            if (file.size and have > file.size) or file.sha256 not in (None, digest.hexdigest()):
                path.unlink()
                raise Problem(f"{file.path} arrived damaged and was thrown away", "run this again")
            sums.append(digest.hexdigest())
    return sums


if __name__ == "__main__":
    typer.run(main)
