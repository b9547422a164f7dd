"""A replica tells Prometheus what its container uses, with control groups of either version."""

import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from stack.shell import ROOT
from vllm.container import Collector, figures

GIB = 2**30


def tree(root: Path, **files: str) -> Path:
    """A folder of control groups: each file's text, by its path with __ for / and ___ for a dot."""
    for name, text in files.items():
        path = root / name.replace("___", ".").replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def second(root: Path, limit: str) -> Path:
    """Control groups of version 2."""
    return tree(
        root,
        memory___current=f"{3 * GIB}\n",
        memory___stat=f"anon 7\nfile 9\ninactive_file {GIB}\n",
        memory___max=f"{limit}\n",
        cpu___stat="usage_usec 12500000\nuser_usec 1\n",
    )


def first(root: Path, limit: int) -> Path:
    """Control groups of version 1."""
    return tree(
        root,
        memory__memory___usage_in_bytes=f"{3 * GIB}\n",
        memory__memory___stat=f"cache 1\ninactive_file 5\ntotal_inactive_file {GIB}\n",
        memory__memory___limit_in_bytes=f"{limit}\n",
        cpuacct__cpuacct___usage="12500000000\n",
    )


def test_both_versions_say_the_same(tmp_path: Path) -> None:
    """What files keep in memory that nobody uses is left out; no limit is no figure."""
    bounded = {"memory": 2.0 * GIB, "limit": 6.0 * GIB, "cpu": 12.5}
    unbounded = {"memory": 2.0 * GIB, "cpu": 12.5}
    assert figures(second(tmp_path / "a", str(6 * GIB))) == bounded
    assert figures(first(tmp_path / "b", 6 * GIB)) == bounded
    assert figures(second(tmp_path / "c", "max")) == unbounded
    assert figures(first(tmp_path / "d", 9223372036854771712)) == unbounded


def test_without_control_groups_nothing_is_said(tmp_path: Path) -> None:
    assert figures(tmp_path) == {}
    registry = CollectorRegistry()
    registry.register(Collector(tmp_path))
    assert generate_latest(registry) == b""


def test_prometheus_reads_them(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(Collector(second(tmp_path, str(6 * GIB))))
    lines = [line.split() for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    assert {name: float(value) for name, value in lines} == {
        "replica_cpu_seconds_total": 12.5,
        "replica_memory_bytes": 2.0 * GIB,
        "replica_memory_limit_bytes": 6.0 * GIB,
    }


def test_they_are_in_the_registry_that_is_shown() -> None:
    """OpenTelemetry's exporter shows Prometheus' own registry, which the server adds them to."""
    script = "import container, prometheus_client as p; container.expose(); print(p.generate_latest().decode())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "vllm", text=True, capture_output=True, check=True)
    assert bool(figures()) == ("replica_memory_bytes " in done.stdout)
    assert "process_cpu_seconds_total" in done.stdout
