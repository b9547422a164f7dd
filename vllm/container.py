"""What this container uses, as Prometheus reads it: its processor time, its memory and the limit of that.

A container sees its own control group, so nothing needs rights over Docker for it. Linux keeps the figures for all of
the container, the engine and its workers included.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

GROUPS = Path("/sys/fs/cgroup")
# Version 1 writes a number near this where there is no limit.
UNLIMITED = 2**60


def read(path: Path) -> str:
    """A file's text, or '' where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def field(text: str, name: str) -> float | None:
    """The number after a name, of lines of one name and one number each."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return float(value)
    return None


def figures(groups: Path = GROUPS) -> dict[str, float]:
    """`cpu` in seconds, `memory` and `limit` in bytes, of those that are known.

    `groups` is where control groups are mounted, of version 2 or 1. What files keep in memory that nobody uses at the
    moment is no use of memory: Linux takes it back when there is need, and Docker's own figures leave it out as well.
    """
    found: dict[str, float] = {}
    second = (groups / "memory.current").exists()
    memory = groups if second else groups / "memory"
    used = read(memory / ("memory.current" if second else "memory.usage_in_bytes"))
    idle = field(read(memory / "memory.stat"), "inactive_file" if second else "total_inactive_file")
    if used:
        found["memory"] = float(used) - (idle or 0)
    limit = read(memory / ("memory.max" if second else "memory.limit_in_bytes")).strip()
    if limit.isdigit() and int(limit) < UNLIMITED:
        found["limit"] = float(limit)
    if second:
        microseconds = field(read(groups / "cpu.stat"), "usage_usec")
        if microseconds is not None:
            found["cpu"] = microseconds / 1e6
    elif nanoseconds := read(groups / "cpuacct" / "cpuacct.usage"):
        found["cpu"] = float(nanoseconds) / 1e9
    return found


class Collector:
    """Gives the figures to Prometheus' client each time it is asked."""

    def __init__(self, groups: Path = GROUPS) -> None:
        self.groups = groups

    def collect(self) -> Iterator[Any]:
        """The metrics that are known here."""
        # only the replica's image has it
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        found = figures(self.groups)
        if "cpu" in found:
            yield CounterMetricFamily("replica_cpu_seconds", "Processor time of the container.", found["cpu"])
        if "memory" in found:
            what = "Memory of the container, without what Linux may take back."
            yield GaugeMetricFamily("replica_memory_bytes", what, found["memory"])
        if "limit" in found:
            yield GaugeMetricFamily("replica_memory_limit_bytes", "Limit of the container's memory.", found["limit"])


def expose() -> None:
    """Adds the figures to what this process shows to Prometheus."""
    from prometheus_client import REGISTRY  # noqa: PLC0415

    REGISTRY.register(Collector())
