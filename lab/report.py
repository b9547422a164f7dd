"""Markdown that says where and when its figures were measured."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from stack.shell import ROOT

DOCS = ROOT / "docs" / "benchmarks"


def machine() -> str:
    """This machine in a few words."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = model[1] if model else platform.machine()
    return f"{os.cpu_count()} cores of {name}, {memory:.0f} GiB, Linux {platform.release()}"


def commit() -> str:
    """The checkout's commit, with a mark where files differ from it."""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "no commit"


def provenance(versions: Sequence[str], seed: int | None = None) -> str:
    """The lines under a report's title."""
    lines = [
        f"- machine: {machine()}",
        f"- versions: {', '.join(versions)}; this project at {commit()}",
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]
    if seed is not None:
        lines.append(f"- seed: {seed}")
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column left, all others right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
