"""The folder secrets/: what lies where, who can read it, and how a file in it is read, checked and replaced.

    secrets/               0700: keeps this host's other users out of all of it
      audit.jsonl          who changed what, see access/audit.py
      gateway/             mounted into the gateway, read-only: keys.json, tokens.json, ray.conf (scripts/ray_front.py)
      tokens/              mounted into the token service, read-only: users.json, signing.json
      ray/                 mounted into the nodes of a Ray cluster, read-only: token, put there by hand
      webui/               mounted into Open WebUI, read-only: key.json, which it shows to the gateway
      alertmanager/        mounted into Alertmanager, read-only: passwords of whom it sends by, put there by hand

A container has users of its own, so what is in these folders is readable by all; the folder above is what is closed.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

# The gateway reads a file whole, in each of its workers.
MAX_BYTES = 4 * 2**20
# The largest whole number that JavaScript holds exactly.
MAX_NUMBER = 2**53 - 1


class Mistake(Exception):
    """Something that the operator can mend: `what` is wrong, and `fix` says what to do about it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}: {fix}")
        self.what = what
        self.fix = fix


class Strict(BaseModel):
    """Data of a file in secrets/: no unknown field, no value of a neighbouring type."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)


File = TypeVar("File", bound=Strict)


def why(error: ValidationError) -> str:
    """The first thing that is wrong, and where. Never the value: it may be a secret."""
    first = error.errors(include_input=False, include_url=False)[0]
    where, field = list(first["loc"]), None
    if first["type"] == "extra_forbidden":
        field = where.pop()
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    said = f"unknown field {field}" if field else first["msg"].removeprefix("Value error, ")
    return f"{place}: {said}" if place else said


def read_whole(path: Path) -> bytes:
    """All of a file. A Mistake where it is none, or too large, which is seen before it is read."""
    # a pipe would else wait for somebody who writes
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Mistake(f"{path} is no file", "put one there, or take it away")
        if found.st_size > MAX_BYTES:
            raise Mistake(f"{path} has {found.st_size} bytes, more than {MAX_BYTES}", "remove what nobody needs")
        return file.read(MAX_BYTES)


def read(path: Path, kind: type[File]) -> File | None:
    """A file's data; None where there is no file. A Mistake where it is not what it should be."""
    try:
        text = read_whole(path)
    except FileNotFoundError:
        return None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise Mistake(f"{path}: {why(error)}", "correct the file, or put back a copy of it") from None


def made(kind: type[File], fields: Mapping[str, object]) -> File:
    """Data from its fields. A Mistake says which of them will not do."""
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise Mistake(why(error), "correct it and run the command again") from None


@dataclass(frozen=True)
class Secrets:
    """The folder secrets/, by its path."""

    folder: Path

    @property
    def keys(self) -> Path:
        """The keys that the gateway takes."""
        return self.folder / "gateway" / "keys.json"

    @property
    def issuers(self) -> Path:
        """Whose tokens the gateway takes."""
        return self.folder / "gateway" / "tokens.json"

    @property
    def users(self) -> Path:
        """Who can sign in at the token service."""
        return self.folder / "tokens" / "users.json"

    @property
    def signing(self) -> Path:
        """What the token service signs with."""
        return self.folder / "tokens" / "signing.json"

    @property
    def webui(self) -> Path:
        """The key that Open WebUI shows to the gateway."""
        return self.folder / "webui" / "key.json"

    @property
    def audit(self) -> Path:
        """Who changed what."""
        return self.folder / "audit.jsonl"

    def prepare(self) -> None:
        """Makes the folders, and closes the outer one to other users of this host."""
        mounted = (self.keys.parent, self.users.parent, self.webui.parent, self.folder / "alertmanager")
        for folder, mode in ((self.folder, 0o700), *((folder, 0o755) for folder in mounted)):
            if not folder.is_dir():
                folder.mkdir(parents=True)
                self._give(folder)
            if folder.stat().st_mode & 0o777 != mode:
                folder.chmod(mode)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Waits for other commands that change something here, and keeps them waiting. The folder itself is the lock:
        it is there, and the lock ends with the process."""
        self.prepare()
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def written(self, path: Path, data: Strict) -> Path:
        """Writes data beside `path`, whole and on the disk; gives the new file, which `replace` puts in its place.

        A Mistake where the data would be refused when it is read.
        """
        # as a whole: fields that were changed one by one may not go together
        text = made(type(data), data.model_dump()).model_dump_json(indent=1).encode() + b"\n"
        if len(text) > MAX_BYTES:
            raise Mistake(f"{path.name} would have {len(text)} bytes, more than {MAX_BYTES}", "remove something first")
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        with new.open("xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(0o644)
        self._give(new)
        return new

    @staticmethod
    def replace(new: Path, path: Path) -> None:
        """Puts a written file in the place of the old one. Whoever reads sees one or the other."""
        new.rename(path)
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def append(self, path: Path, line: str) -> None:
        """Adds a line to a file that only its owner may read."""
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(handle)
        self._give(path)

    def _give(self, path: Path) -> None:
        """Gives what root made under sudo to the user whose checkout this is: their next command writes here too."""
        if os.geteuid() == 0:
            owner = (self.folder if path != self.folder else self.folder.parent).stat()
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
