"""The host as the planner sees it: its GPUs, how they are linked, and what is left of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stack.console import Problem

GIB = 1 << 30

LinkKind = Literal["nvlink", "pix", "pxb", "phb", "node", "sys"]
# NVLink, then PCIe as `nvidia-smi topo -m` names it: one switch, several switches, one host bridge, one node, beyond.
LINK_ORDER: tuple[LinkKind, ...] = ("nvlink", "pix", "pxb", "phb", "node", "sys")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gpu(_Record):
    """One GPU, or one MIG slice. Sizes in bytes, speeds as the hardware states them."""

    index: int = Field(ge=0)
    id: str  # what Compose's device_ids takes: the index, or the UUID of a MIG slice
    name: str
    total: int = Field(gt=0)  # what CUDA can hand out: the driver's own reserve is already off
    free: int = Field(ge=0)
    compute_capability: tuple[int, int]
    bandwidth_gb_s: float = Field(gt=0)  # of its memory
    bf16_tflops: float = Field(gt=0)  # dense, through the tensor cores
    numa: int = 0
    mig: bool = False
    programs: tuple[str, ...] = ()  # what else runs there

    @property
    def size(self) -> tuple[str, int, tuple[int, int]]:
        """What two GPUs share when they can work in one replica."""
        return (self.name, round(self.total / GIB), self.compute_capability)


class Link(_Record):
    """The path between two GPUs. Speed in GB/s, one direction."""

    a: int
    b: int
    kind: LinkKind
    gb_s: float = Field(gt=0)


class Machine(_Record):
    """A host. Recorded with `plan.py --record FILE`, planned for with `--machine FILE`."""

    name: str
    cpu_cores: int = Field(gt=0)
    memory: int = Field(gt=0)
    memory_free: int = Field(gt=0)
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()

    def link(self, a: int, b: int) -> Link:
        """The path between GPUs a and b; the slowest kind where none was recorded."""
        for link in self.links:
            if {link.a, link.b} == {a, b}:
                return link
        return Link(a=a, b=b, kind="sys", gb_s=8.0)

    def by_host(self, gpus: Iterable[Gpu]) -> list[list[Gpu]]:
        """These GPUs, those of each host together: a replica lies in one."""
        return [list(gpus)]

    def one_host(self, gpus: tuple[Gpu, ...]) -> "Machine":
        """A host with these GPUs, whose links are not known, and all else as here."""
        rest = self.model_dump(include={"name", "cpu_cores", "memory", "memory_free", "driver"})
        return Machine(**rest, gpus=gpus)

    def only(self, indices: list[int], option: str = "--gpus") -> "Machine":
        """The same host with no other GPUs than these, which `option` named."""
        known = {gpu.index for gpu in self.gpus}
        if indices and not known:
            raise Problem(f"{option}: this host has no GPU", "leave it out")
        if missing := sorted(set(indices) - known):
            have = ", ".join(str(index) for index in sorted(known))
            raise Problem(f"{option}: there is no GPU {missing[0]} here", f"choose from {have}")
        return self.model_copy(update={"gpus": tuple(gpu for gpu in self.gpus if gpu.index in indices)})


class Hosts(Machine):
    """Several hosts, whose GPUs are numbered through; `id` is what a GPU is called on its own host."""

    hosts: dict[int, str]  # of each GPU's number, the name of its host

    def by_host(self, gpus: Iterable[Gpu]) -> list[list[Gpu]]:
        found: dict[str, list[Gpu]] = {}
        for gpu in gpus:
            found.setdefault(self.hosts[gpu.index], []).append(gpu)
        return list(found.values())

    def own(self) -> dict[str, list[int]]:
        """The numbers of each host's GPUs, the gateway's host first."""
        own: dict[str, list[int]] = {}
        for index, host in self.hosts.items():
            own.setdefault(host, []).append(index)
        return own

    def where(self) -> list[str]:
        """A line a host: which of the GPUs are its own."""
        ranges = {host: f"{min(of)} to {max(of)}" if len(of) > 1 else str(of[0]) for host, of in self.own().items()}
        return [f"{host}: GPU {numbers}" for host, numbers in ranges.items()]


def join(machines: Mapping[str, Machine]) -> Hosts:
    """These hosts, by their names, as one machine for the planner. Raises Problem for one without a GPU."""
    gpus: list[Gpu] = []
    links: list[Link] = []
    hosts: dict[int, str] = {}
    for name, machine in machines.items():
        if not machine.gpus:
            raise Problem(f"--machine: {name} has no GPU", "plan several hosts with GPUs, or one without")
        numbers = {gpu.index: len(gpus) + place for place, gpu in enumerate(machine.gpus)}
        gpus += [gpu.model_copy(update={"index": numbers[gpu.index]}) for gpu in machine.gpus]
        links += [
            link.model_copy(update={"a": numbers[link.a], "b": numbers[link.b]})
            for link in machine.links
            if link.a in numbers and link.b in numbers
        ]
        hosts |= dict.fromkeys(numbers.values(), name)
    # what the poorest host has for each of its GPUs counts for all
    free = min(machine.memory_free // len(machine.gpus) for machine in machines.values()) * len(gpus)
    return Hosts(
        name=", ".join(machines),
        cpu_cores=sum(machine.cpu_cores for machine in machines.values()),
        memory=sum(machine.memory for machine in machines.values()),
        memory_free=free,
        gpus=tuple(gpus),
        links=tuple(links),
        hosts=hosts,
    )


def load_machine(path: Path) -> Machine:
    """A machine recorded earlier. Raises Problem for a file that is none."""
    try:
        return Machine.model_validate_json(path.read_bytes())
    except OSError as error:
        raise Problem(f"--machine: cannot read {path}: {error.strerror}", "make one with --record FILE") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise Problem(
            f"--machine: {path} is not a recorded machine: {where}: {first['msg']}", "make one with --record FILE"
        ) from error
