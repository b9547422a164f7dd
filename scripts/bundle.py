#!/usr/bin/env python3
"""Packs the stack for a host without a network: images, models, pins, docs and this checkout, in one archive.

On that host, which has Docker with Compose and Buildx, and Python 3.11 to 3.14:

    tar xpf vllm-fleet-DATE.tar && vllm-fleet/install.sh && cd vllm-fleet && make up"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Annotated

import typer
from dotenv import dotenv_values
from rich.markup import escape

from models.hub import without_password
from models.served import of_fleet
from stack.compose import Compose, Config, running_files
from stack.console import Problem, console, one_line_for_mistakes, step
from stack.images import RECIPE_LABEL, builds_of, label_of, present, recipe
from stack.settings import may_be_secret, names_of_users, value_of
from stack.shell import ROOT, ask

NAME = "vllm-fleet"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
INSTALL = """\
#!/bin/sh
# Installs the stack from this bundle: checks it, loads the images, makes .venv. Needs no network. Can be run again.
set -eu
# containers read what is here as users of their own
umask 022
cd "$(dirname "$0")"
for needed in "docker info" "docker compose version" "docker buildx version"; do
  $needed >/dev/null || { echo "'$needed' fails, see above: mend that and run this again." >&2; exit 1; }
done
echo "Checking the files ..."
sha256sum --check --quiet SHA256SUMS
echo "Loading the images ..."
docker load --quiet --input images.tar
echo "Making .venv ..."
# relative: pip takes a space for the next folder's beginning
PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels scripts/bootstrap.sh
echo "Done. Start it with: make up"
"""


def main(
    out: Annotated[Path, typer.Option(help="Folder for the archive.")] = ROOT / "dist",
    model: Annotated[
        list[str] | None, typer.Option(help="Only this model of models/; repeatable. Left out: all that are there.")
    ] = None,
) -> None:
    """Pack images, models, pins and docs in one archive for a host without a network."""
    with one_line_for_mistakes():
        config = Compose(*running_files()).config()
        images = _images(config)
        folders = [_model(name) for name in model] if model else [ROOT / "models"]
        _check_served(of_fleet(config), folders, chosen=bool(model))
        archive = out / f"{NAME}-{datetime.now(UTC):%Y-%m-%d}.tar"
        try:
            out.mkdir(parents=True, exist_ok=True)
            _check_disk(out, images, folders)
            with tempfile.TemporaryDirectory(dir=out) as scratch:
                _pack(archive, Path(scratch), images, folders)
        except OSError as error:
            raise Problem(
                f"the bundle cannot be written: {error}", "mend that, or name another folder with --out"
            ) from None
        size = f"{archive.stat().st_size / 2**30:.1f} GiB"
        console.print(f"{archive}: {size}. There: tar xpf it, then {NAME}/install.sh", soft_wrap=True)


def _images(config: Config) -> list[str]:
    """The images of the stack as it runs. A Problem where one is missing that `make up` does not do without either."""
    services = config.services.values()
    for image, build in builds_of(config).items():
        if label_of(image, RECIPE_LABEL) not in (None, "", recipe(build)):
            raise Problem(f"{image} is older than this checkout", "bring the stack up, then pack it: make up")
    missing = {service.image: service.build for service in services if not present(service.image)}
    for image, built in missing.items():
        if built:
            raise Problem(f"{image} is not on this machine", "bring the stack up, then pack it: make up")
        console.print(f"[yellow]{image} is not on this machine and is left out[/]")
    return sorted({service.image for service in services} - missing.keys())


def _model(name: str) -> Path:
    """The folder of a model below models/, or of several."""
    folder = ROOT / "models" / name
    inside = Path(name).parts and not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside or not any(path.name == "config.json" for path in _files(folder)):
        raise Problem(f"--model {name}: there is no such model in models/", "bring it with scripts/download_model.py")
    return folder


def _files(folder: Path) -> Iterator[Path]:
    """The files of models, those of linked folders too, without downloads that are not complete."""
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted({*folders} - {".partial", ".cache"})
        yield from (Path(where, name) for name in sorted(names) if Path(where, name).is_file())


def _check_served(models: list[str], folders: list[Path], *, chosen: bool) -> None:
    """Names the models that the stack serves and `folders` lack; a Problem unless the user chose so."""
    for name in models:
        folder = ROOT / "models" / name.removeprefix("/models/")
        packed = (folder / "config.json").is_file() and any(folder.is_relative_to(one) for one in folders)
        if not packed and not chosen:
            raise Problem(
                f"the stack serves {name}, which is not in models/",
                f"bring it with scripts/download_model.py {name}, or choose what to pack with --model",
            )
        if not packed:
            console.print(f"[yellow]{escape(name)}, which the stack serves, is left out[/]", soft_wrap=True)


def _check_disk(out: Path, images: list[str], folders: list[Path]) -> None:
    sizes = ask("docker", "image", "inspect", "--format", "{{.Size}}", *images).stdout.split()
    models = sum(path.stat().st_size for folder in folders for path in _files(folder))
    # the images lie there twice while they are packed
    needed = 2 * sum(map(int, sizes)) + models
    free = shutil.disk_usage(out).free
    if needed > free:
        raise Problem(
            f"{out} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB may be needed",
            "free some, or name another folder with --out",
        )


def _pack(archive: Path, scratch: Path, images: list[str], folders: list[Path]) -> None:
    files = {name: ROOT / name for name in _checkout()}
    for folder in folders:
        files |= {str(path.relative_to(ROOT)): path for path in _files(folder)}
    if named := value_of("HF_TOKEN_FILE", ROOT / ".env"):
        token = (ROOT / Path(named).expanduser()).resolve()
        files = {name: path for name, path in files.items() if path.resolve() != token}
    if (ROOT / ".env").is_file():
        files[".env"] = scratch / ".env"
        files[".env"].write_text(_settings((ROOT / ".env").read_text()))
    with step(f"Saving {len(images)} images") as now:
        # not compressed: that takes five times as long for a third of the size
        files["images.tar"] = scratch / "images.tar"
        if subprocess.run(["docker", "save", "--output", files["images.tar"], *images]).returncode:
            raise Problem("docker save failed", "see what it says above")
        now.result = ", ".join(images)
    with step("Gathering Python packages") as now:
        wheels = scratch / "wheels"
        download = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", f"--dest={wheels}"]
        # bootstrap.sh brings pip up to date first
        download += ["--only-binary=:all:", "--group", f"{ROOT / 'pyproject.toml'}:scripts", "pip>=25.1"]
        # the Python there may be another
        for version in PYTHONS:
            now.say(f"for Python {version}")
            if subprocess.run([*download, f"--python-version={version}"]).returncode:
                raise Problem("pip could not fetch the packages", "see what it says above")
        files |= {f"wheels/{path.name}": path for path in sorted(wheels.iterdir())}
        now.result = f"{len(list(wheels.iterdir()))}, for Python {', '.join(PYTHONS)}"
    install = scratch / "install.sh"
    install.write_text(INSTALL)
    install.chmod(0o755)
    files["install.sh"] = install
    _write(archive, scratch, files)


def _write(archive: Path, scratch: Path, files: Mapping[str, Path]) -> None:
    """Writes `files`, by their names in it, and their sums into `archive`, which is there only once it is whole."""
    with step("Writing the archive") as now:
        sums = scratch / "SHA256SUMS"
        with sums.open("w") as lines:
            for name, path in files.items():
                now.say(name)
                # that one is there to be changed
                if name != ".env":
                    lines.write(f"{_sha256(path)}  {name}\n")
        unfinished = scratch / archive.name
        # what a link leads to, as that is not there
        with tarfile.open(unfinished, "w", dereference=True) as tar:
            every = {**files, "SHA256SUMS": sums}
            for folder in sorted({str(parent) for name in every for parent in PurePath(NAME, name).parents} - {"."}):
                entry = tarfile.TarInfo(folder)
                entry.type = tarfile.DIRTYPE
                tar.addfile(_readable(entry))
            for name, path in every.items():
                now.say(name)
                tar.add(path, f"{NAME}/{name}", recursive=False, filter=_readable)
        unfinished.rename(archive)


def _readable(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The entry as one that every user there can read, whatever the umask was here."""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _checkout() -> list[str]:
    """The files of this checkout that belong to the stack, and the plan for its replicas if there is one."""
    others = ("ls-files", "--others", "--exclude-standard", "-z")
    listed = ask("git", "-C", str(ROOT), "ls-files", "-z").stdout.split("\0")
    if "docker-compose.yml" in listed:
        for name in filter(None, ask("git", "-C", str(ROOT), *others).stdout.split("\0")):
            console.print(f"[yellow]{escape(name)} is left out: git does not track it[/]", soft_wrap=True)
    else:
        # no repository, or one that this user may not read: an empty one lists what .gitignore leaves
        with tempfile.TemporaryDirectory() as empty:
            ask("git", "init", "--quiet", "--bare", empty)
            done = ask("git", "-C", str(ROOT), f"--git-dir={empty}", f"--work-tree={ROOT}", *others)
        listed = done.stdout.split("\0")
        if "docker-compose.yml" not in listed:
            raise Problem(
                f"the files of {ROOT} cannot be listed: {done.stderr.strip() or 'git leaves them out'}",
                "install git and run this again",
            )
    # models are packed by themselves; of secrets/ only what keeps it out of git goes along
    apart = ("models/", *(name for name in listed if name.startswith("secrets/") and not name.endswith(".gitignore")))
    counted = ("docker-compose.replicas.yml", *(f"{folder}/{name}" for folder in ("fleet", "nginx/fleet")
                                                for name in ("replicas.conf", "left-out")))  # fmt: skip
    planned = [name for name in ("docker-compose.override.yml", "fleet/default.conf", *counted)
               if (ROOT / name).exists()]  # fmt: skip
    return [name for name in [*listed, *planned] if (ROOT / name).is_file() and not name.startswith(apart)]


def _settings(text: str) -> str:
    """The lines of a .env that set something, without tokens, passwords and the like, and without users: one without a
    password is none."""
    kept = []
    users = dotenv_values(stream=io.StringIO(text), interpolate=False).get("USER_LIST") or ""
    # of this host and its users
    own = {"HF_TOKEN_FILE", "USER_LIST", *names_of_users(users)}
    for line in text.splitlines():
        if setting := re.match(r"\s*(?:export\s+)?(\w+)\s*=", line):
            if setting[1] in own or may_be_secret(setting[1]):
                console.print(f"[yellow]{setting[1]} in .env is left out: it is yours[/]")
            else:
                kept.append(without_password(line) + "\n")
    return "".join(kept)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    typer.run(main)
