"""Running other programs, quietly where they are asked something and visibly where they work for long."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from stack.console import Problem

T = TypeVar("T")
# takes what a step is doing right now
Say = Callable[[str], None]

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
LOG = CACHE / "up.log"


def ask(*args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a quick program and gives its status and output; 127: it is not installed, 124: `timeout` seconds passed."""
    try:
        # what stands in the standard input is for the commands after this one
        return subprocess.run(args, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError:
        return subprocess.CompletedProcess(args, 127, "", f"{args[0]} is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(args, 124, "", f"{args[0]} did not answer within {timeout:.0f} s")


def wait_for(condition: Callable[[], T], within_s: float = math.inf, every_s: float = 0.5) -> T:
    """Calls `condition` until it returns something true, and gives that; its last, false value after `within_s`."""
    deadline = time.monotonic() + within_s
    while not (value := condition()) and time.monotonic() <= deadline:
        time.sleep(every_s)
    return value


def work(
    args: Sequence[str],
    say: Say,
    *,
    fix: str,
    cwd: Path = ROOT,
    first_line_within: float = threading.TIMEOUT_MAX,
) -> None:
    """Runs a program that takes its time: each line of its output goes to `say` and to the log.

    Its failure, or nothing printed within `first_line_within` seconds, is a Problem with its last line and `fix`.
    """
    LOG.parent.mkdir(exist_ok=True)
    last = ""
    with (
        LOG.open("a", buffering=1) as log,
        subprocess.Popen(
            args,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        log.write(f"\n$ {shlex.join(args)}\n")
        silence = threading.Timer(first_line_within, process.kill)
        silence.start()
        try:
            for line in process.stdout:
                silence.cancel()
                log.write(line)
                if line.strip():
                    say(line)
                    last = line.strip()
        except BaseException:
            process.terminate()
            raise
        finally:
            silence.cancel()
    if process.returncode:
        what = f"{shlex.join(args[:3])} … failed: {last or 'it said nothing'}"
        raise Problem(what, f"{fix} (the whole output: {LOG.relative_to(ROOT)})")


def as_root(*args: str) -> list[str]:
    """The command for something that only root may do. Raises a Problem where neither root nor sudo is at hand."""
    if os.geteuid() == 0:
        return list(args)
    if shutil.which("sudo"):
        return ["sudo", *args]
    raise Problem(
        f"`{args[0]}` needs root, and there is no sudo",
        "run `make up` as root once; later runs need only rights on Docker",
    )


def let_all_read(paths: Iterable[Path]) -> None:
    """Opens files and folders to the users that containers run as, whatever the umask was while they were written.

    Not what a link leads to: that may lie elsewhere.
    """
    for path in paths:
        if path.is_symlink():
            continue
        now = path.stat().st_mode
        wanted = now | (0o555 if path.is_dir() else 0o444)
        # not more often than needed: what is another user's cannot be changed
        if now != wanted:
            path.chmod(wanted)


def apt_install(packages: Sequence[str], say: Say) -> None:
    """Installs Debian or Ubuntu packages. A Problem where there is no apt-get, or it fails."""
    if not shutil.which("apt-get"):
        raise Problem(
            f"cannot install {', '.join(packages)}: this is neither Debian nor Ubuntu",
            "install Docker Engine with Compose (https://docs.docker.com/engine/install/) and run `make up` again",
        )
    fix = "check the machine's package sources and its network, then run `make up` again"
    work(as_root("apt-get", "update"), say, fix=fix)
    install = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--no-install-recommends")
    work(as_root(*install, *packages), say, fix=fix)
