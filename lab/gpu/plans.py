"""What the planner says of a shape on this machine: its layouts, and the account of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from lab.gpu.engines import MAX_LENGTH, config_of
from planner import choose, memory
from planner.choose import Goal, Wish
from planner.config import read_model
from planner.machine import Machine
from planner.memory import Account, Settings

GOALS: tuple[Goal, ...] = ("throughput", "latency")
LIKELIEST = 3  # plans of a goal whose speeds are compared


@dataclass(frozen=True)
class Layout:
    """A way to use all GPUs: equal replicas of tp × pp GPUs. `name` is the planner's."""

    shape: str
    name: str
    tp: int
    pp: int
    replicas: int

    @property
    def gpus(self) -> int:
        """Of one replica."""
        return self.tp * self.pp


def empty(machine: Machine) -> Machine:
    """The machine before anything ran on it."""
    gpus = tuple(gpu.model_copy(update={"free": gpu.total}) for gpu in machine.gpus)
    return machine.model_copy(update={"gpus": gpus})


def listed(machine: Machine, shape: str, goal: Goal) -> list[Layout]:
    """The plan for a goal and its runners-up, in 16 bits."""
    wish = Wish(goal=goal, context=MAX_LENGTH, quantization="none")
    plan = choose.choose(empty(machine), read_model(config_of(shape), shape), wish)
    return [
        Layout(shape, one.layout, one.replicas[0].tp, one.replicas[0].pp, len(one.replicas))
        for one in (plan, *plan.runners_up)
    ]


def by_worth(machine: Machine, shapes: Sequence[str]) -> list[Layout]:
    """All layouts that are listed for any goal: the plans, then all goals' second ones, and so on."""
    lists = [listed(machine, shape, goal) for shape in shapes for goal in GOALS]
    ranked = [one[rank] for rank in range(max(map(len, lists))) for one in lists if rank < len(one)]
    return list(dict.fromkeys(ranked))


def rounds(layouts: Sequence[Layout], gpus: int) -> list[list[Layout]]:
    """The layouts in groups that run at the same time, one replica of each, those first in the list as early as may
    be."""
    found: list[list[Layout]] = []
    for layout in layouts:
        for one in found:
            if sum(other.gpus for other in one) + layout.gpus <= gpus:
                one.append(layout)
                break
        else:
            found.append([layout])
    return found


def account(machine: Machine, shape: str, tp: int = 1, pp: int = 1) -> Account:
    """The planner's account of one GPU of a replica."""
    gpu = empty(machine).gpus[0]
    return memory.account(read_model(config_of(shape), shape), gpu, tp, pp, MAX_LENGTH, Settings.default(gpu))
