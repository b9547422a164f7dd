#!/usr/bin/env python3
"""Brings a model into models/, where all replicas see it: from the hub, a folder, or an HTTP or S3 mirror.

A download that was cut off goes on where it ended; what has arrived is checked against what the source knows of it; and
only a whole model gets its place under models/, so that no replica ever loads half of one."""

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import httpx
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from models import hub
from models.hub import NAME, without_password
from models.served import let_replicas_read
from models.sources import SUMS, File, Source, for_vllm, open_source
from stack.checks import GIB
from stack.console import Problem, console, one_line_for_mistakes
from stack.shell import ROOT

SPARE = GIB  # bytes of disk that stay free
PARTIAL = ".partial"
ABOUT = ".source.json"
INDEX = "model.safetensors.index.json"
AGAIN = "run this again: it goes on where it ended"


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
            found = open_source(source, revision, token_file, endpoint or hub.endpoint())
            name = name or found.name
            if not re.fullmatch(f"{NAME}(/{NAME})?", name):
                raise Problem(f"{name!r} is no name for a model", "give one like owner/model: --name owner/model")
            files = for_vllm(found.files(), source)
            with _one_at_a_time(models, name):
                _bring(found, files, models, name, source)
        except httpx.RequestError as error:
            raise Problem(
                f"{error.request.url} does not answer, or broke off: {error}",
                f"check the address (--endpoint, AWS_ENDPOINT_URL, AWS_REGION) and the network, then {AGAIN}",
            ) from error
        except httpx.InvalidURL as error:
            raise Problem(
                f"{source} leads to no right address: {error}",
                "correct it, or --endpoint, or AWS_ENDPOINT_URL, whichever it came from",
            ) from error
        except OSError as error:
            raise Problem(
                f"{error.filename or models}: {error.strerror}",
                f"free disk space or correct the permissions (or name another folder with --models), then {AGAIN}",
            ) from error


@contextmanager
def _one_at_a_time(models: Path, name: str) -> Iterator[None]:
    """Waits for another download of the same model to end."""
    path = models / PARTIAL / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"Another download of {name} is running; waiting for it.", markup=False)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bring(found: Source, files: list[File], models: Path, name: str, source: str) -> None:
    place = models / name
    if place.exists():
        _check_whole(place, found.revision, files)
        let_replicas_read(place, models)
        console.print(f"{place} is there already, revision {found.revision[:12]}", markup=False, soft_wrap=True)
        return
    part = models / PARTIAL / f"{name}@{found.revision}"
    part.mkdir(parents=True, exist_ok=True)
    _check_disk(part, models, files)
    sums = _fetch(found, files, part)
    _check_shards(part, source)
    (part / SUMS).write_text("".join(f"{digest}  {path}\n" for path, digest in sums.items()))
    (part / ABOUT).write_text(
        json.dumps({"source": without_password(source), "revision": found.revision}, indent=1) + "\n"
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    part.rename(place)
    let_replicas_read(place, models)
    for other in part.parent.glob(f"{place.name}@*"):
        shutil.rmtree(other)
    done = f"{place} is complete, revision {found.revision[:12]}. MODEL={name} serves it."
    console.print(done, markup=False, soft_wrap=True)


def _check_whole(place: Path, revision: str, files: list[File]) -> None:
    """A Problem unless the folder has this revision, and each file in its size."""
    try:
        here = json.loads((place / ABOUT).read_bytes())["revision"]
    except (OSError, ValueError, LookupError, TypeError):
        here = None
    if here != revision:
        held = f"revision {here[:12]}, not {revision[:12]}" if isinstance(here, str) else "something else already"
        raise Problem(f"{place} holds {held}", "move it away, or choose another --name")
    for file in files:
        path = place / file.path
        size = path.stat().st_size if path.is_file() else 0
        if size != file.size:
            raise Problem(
                f"{place} is damaged: {file.path} has {size:,} of {file.size:,} bytes",
                "move the folder away, and run this again",
            )


def _check_disk(part: Path, models: Path, files: list[File]) -> None:
    here = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    needed = sum(file.size for file in files) - here + SPARE
    free = shutil.disk_usage(part).free
    if needed > free:
        raise Problem(
            f"{models} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB are needed",
            f"free some ({models / PARTIAL} has the downloads that broke off), or name another folder with --models",
        )


def _check_shards(part: Path, source: str) -> None:
    """A Problem where the index names weights that the source has not."""
    index = part / INDEX
    if not index.is_file():
        return
    try:
        shards = sorted({str(shard) for shard in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Problem(f"{INDEX} of {source} is damaged", "correct it at the source, then run this again") from error
    if missing := [shard for shard in shards if not (part / shard).is_file()]:
        raise Problem(
            f"{source} has no {missing[0]}, which its {INDEX} names", "put it there, then run this again: it goes on"
        )


def _fetch(source: Source, files: list[File], part: Path) -> dict[str, str]:
    """Fetches what is missing; returns each file's SHA-256."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    sums = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(file.size for file in files))
        for file in files:
            progress.update(task, description=file.path)
            path = part / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            sha256 = hashlib.sha256()
            git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
            have = 0
            with path.open("a+b") as stream:
                stream.seek(0)
                for chunk in _here_then_there(stream, source, file):
                    sha256.update(chunk)
                    git.update(chunk)
                    have += len(chunk)
                    progress.advance(task, len(chunk))
            if have < file.size:
                raise Problem(f"{file.path} broke off at {have:,} of {file.size:,} bytes", AGAIN)
            right = (file.sha256 or sha256.hexdigest(), file.git or git.hexdigest())
            if have > file.size or right != (sha256.hexdigest(), git.hexdigest()):
                path.unlink()
                raise Problem(f"{file.path} arrived damaged and was thrown away", "run this again")
            sums[file.path] = sha256.hexdigest()
    return sums


def _here_then_there(stream: BinaryIO, source: Source, file: File) -> Iterator[bytes]:
    """The file's bytes: those that have arrived, then the others, which it writes as they come."""
    while chunk := stream.read(1 << 20):
        yield chunk
    if stream.tell() < file.size:
        for chunk in source.read(file, stream.tell()):
            stream.write(chunk)
            yield chunk


if __name__ == "__main__":
    typer.run(main)
