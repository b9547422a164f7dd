"""Brings a model into a folder of models: resumed, checked, and put in place only when whole."""

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from models.hub import NAME, without_password
from models.served import let_replicas_read
from models.sources import AGAIN, SUMS, File, Source, for_vllm
from stack.checks import GIB
from stack.console import Problem, console

SPARE = GIB  # bytes of disk that stay free
PARTIAL = ".partial"
ABOUT = ".source.json"
INDEX = "model.safetensors.index.json"


def check_name(name: str) -> None:
    """A Problem unless a folder under models/ may be called so."""
    if not re.fullmatch(f"{NAME}(/{NAME})?", name):
        raise Problem(f"{name!r} is no name for a model", "give one like owner/model: --name owner/model")


def bring(found: Source, source: str, name: str, models: Path) -> None:
    """Brings what is at `found`, which the user calls `source`, into the folder `name` of `models`.

    Raises Problem where it cannot be had whole, and OSError where the disk refuses it; what has arrived stays in
    .partial/, from where the next run goes on.
    """
    files = for_vllm(found.files, source)
    with _one_at_a_time(models, name):
        _bring(found, files, models, name, source)


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
            f"free some ({models / PARTIAL} has the downloads that broke off)",
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
    done = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(file.size for file in files))
        for file in files:
            path = part / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                progress.update(task, description=file.path, completed=done + stream.tell())
                if stream.tell() < file.size:
                    source.fetch(file, stream, partial(progress.advance, task))
            done += file.size
            progress.update(task, completed=done)
            sums[file.path] = _check(path, file)
    return sums


def _check(path: Path, file: File) -> str:
    """The SHA-256 of a file that has arrived. A Problem where it is not what its source says it is."""
    have = path.stat().st_size
    if have < file.size:
        raise Problem(f"{file.path} broke off at {have:,} of {file.size:,} bytes", AGAIN)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    right = have == file.size and file.sha256 in (None, sha256)
    if right and file.git:
        blob = b"blob %d\0%b" % (have, path.read_bytes())
        right = hashlib.sha1(blob, usedforsecurity=False).hexdigest() == file.git
    if not right:
        path.unlink()
        raise Problem(f"{file.path} arrived damaged and was thrown away", "run this again")
    return sha256
