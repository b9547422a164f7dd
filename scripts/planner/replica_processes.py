"""The processes of this project's running replicas. A new fleet takes their place, so what they hold counts as free."""

from pathlib import Path

from stack.compose import is_replica, running
from stack.shell import ask

PROC = Path("/proc")
LAUNCHER = b"/opt/fleet/launch.py"  # a replica's first process was started with it


def running_replicas() -> list[str]:
    """The ids of this project's running replicas."""
    lines = running('{{.ID}} {{.Label "com.docker.compose.service"}}').splitlines()
    return [container for container, _, service in (line.partition(" ") for line in lines) if is_replica(service)]


def processes(containers: list[str]) -> frozenset[int]:
    """The processes in these replicas, by their numbers on this host; none of a replica whose numbers are those of
    another host, as where Docker runs in a virtual machine."""
    if not containers:
        return frozenset()
    first = ask("docker", "inspect", "--format", "{{.State.Pid}}", *containers).stdout.split()
    ending = {int(pid) for pid in first if LAUNCHER in _read(pid, "cmdline")}
    parents = {}
    for folder in PROC.glob("[0-9]*"):
        # "12 (a name) S 1 …": the state and the parent come after the last bracket
        if after := _read(folder.name, "stat").rpartition(b")")[2].split():
            parents[int(folder.name)] = int(after[1])
    while more := {pid for pid, parent in parents.items() if parent in ending} - ending:
        ending |= more
    return frozenset(ending)


def host_memory(pids: frozenset[int]) -> int:
    """Bytes of the host's memory that are free once these processes end; what they read of files is free already."""
    lines = (line.split() for pid in pids for line in _read(str(pid), "status").splitlines())
    return sum(int(words[1]) * 1024 for words in lines if words[:1] == [b"RssAnon:"])


def _read(pid: str, name: str) -> bytes:
    try:
        return (PROC / pid / name).read_bytes()
    except OSError:
        return b""  # it ended meanwhile
