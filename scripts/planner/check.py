"""Holds what a fleet was planned to have against what its engines report: each start is a test of the planner."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from planner.machine import GIB
from stack.compose import OVERRIDE, Compose, Config
from stack.console import Problem
from stack.gateway import Gateway

CLOSE = 0.08  # a share; further apart the planner is wrong
STARTED = "Application startup complete"  # after it vLLM's log says no more of its memory
# vLLM's lines, on GPUs and on the CPU: of each worker its weights (GPUs only) and KV cache in GiB.
WEIGHTS = re.compile(r"Model loading took ([\d.]+) GiB")
KV = re.compile(
    r"Available KV cache memory: (-?[\d.]+) GiB|reserved ([\d.]+) GiB memory for KV Cache"
    r"|(?:Explicitly|Auto) set \(([\d.]+)/[\d.]+\) GiB for KV cache"
)
KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
KV_TOKENS_METRIC = re.compile(r'^vllm:cache_config_info\{.*\bkv_cache_size_tokens="(\d+)"', re.MULTILINE)
LENGTH = re.compile(r'"max_model_len": ?(\d+)')


class Sizes(BaseModel):
    """What a replica has, bytes of its tightest GPU (on the CPU: of a process). None: nothing is known of it, or it has
    none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: int | None = None
    kv: int | None = None
    kv_warm: int | None = None  # of a plan: the most that may be left where the start has nothing to compile
    kv_tokens: int | None = None
    max_model_len: int | None = None


def _gib(value: int) -> str:
    gib = value / GIB
    return f"{gib:.2f} GiB" if abs(gib) < 10 else f"{gib:.1f} GiB"


# How people read them.
FIGURES: dict[str, tuple[str, Callable[[int], str]]] = {
    "weights": ("weights", _gib),
    "kv": ("KV cache", _gib),
    "kv_tokens": ("KV tokens", "{:,}".format),
    "max_model_len": ("max model length", "{:,}".format),
}


@dataclass(frozen=True)
class Compared:
    """A replica: its plan, None where none was written, and what its engine reports; None with the reason in words and
    what to do."""

    name: str
    planned: Sizes | None
    reported: Sizes | None
    why: str = ""
    fix: str = ""

    def apart(self) -> dict[str, float]:
        """By how much of what was planned each figure that both have differs: 0.1 is a tenth more than planned."""
        found = {}
        for figure in FIGURES:
            before, now = getattr(self.planned, figure, None), getattr(self.reported, figure, None)
            if before and now is not None:
                found[figure] = (now - before) / before
        return found

    def far(self) -> dict[str, float]:
        """The figures of `apart` that the planner got wrong. A longer request than planned is none: vLLM may find room
        for it, as the plan leaves a margin. Nor is more KV cache at a warm start: the plan is for a cold one."""
        plan = self.planned or Sizes()
        warm = (plan.kv_warm or plan.kv or 1) / (plan.kv or 1)
        most = {"kv": warm * (1 + CLOSE) - 1, "kv_tokens": warm * (1 + CLOSE) - 1, "max_model_len": inf}
        apart = self.apart().items()
        return {figure: share for figure, share in apart if not -CLOSE <= share <= most.get(figure, CLOSE)}


def reported(log: str, metrics: str, models: str) -> Sizes:
    """What an engine says of itself: in its log from its start to STARTED, in its metrics, which are there for longer,
    and in its list of models. With several workers the largest weights and the least KV cache count, as in a plan."""
    weights = [float(found) for found in WEIGHTS.findall(log)]
    kv = [float(next(filter(None, found))) for found in KV.findall(log)]
    tokens = [int(found) for found in KV_TOKENS_METRIC.findall(metrics)]
    tokens = tokens or [int(found.replace(",", "")) for found in KV_TOKENS.findall(log)]
    return Sizes(
        weights=round(max(weights) * GIB) if weights else None,
        kv=round(min(kv) * GIB) if kv else None,
        kv_tokens=min(tokens, default=None),
        max_model_len=min(map(int, LENGTH.findall(models)), default=None),
    )


def compare(compose: Compose, gateway: Gateway, config: Config) -> list[Compared]:
    """All replicas of the Compose files. A Problem where none of them runs."""
    try:
        planned = TypeAdapter(dict[str, Sizes]).validate_python(config.planned)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise Problem(
            f"{OVERRIDE.name}: x-planned.{where} is not what `make plan` writes", "plan again: make plan ARGS='MODEL'"
        ) from None
    containers = compose.containers()
    if not any(name in containers and containers[name].state == "running" for name in config.replicas):
        raise Problem("no replica runs, so there is nothing to compare", "`make up` starts the fleet")
    states = {replica.name: replica.state for replica in gateway.published() or ()}
    found = []
    for name in config.replicas:
        container = containers.get(name)
        if container is None or container.state != "running":
            found.append(Compared(name, planned.get(name), None, "does not run", "`make up` starts it"))
            continue
        if other := compose.other_settings(container, config.services[name]):
            why = f"runs with another {', '.join(other)} than the Compose files have now"
            found.append(Compared(name, planned.get(name), None, why, "`make up` starts it anew"))
            continue
        models = gateway.ask_replica(name, "/v1/models")
        if models is None:
            state = states.get(name, "unreachable")
            fix = "`make status` shows when it is ready; then run this again"
            found.append(Compared(name, planned.get(name), None, f"is {state}", fix))
            continue
        log = compose.log_of_start(container, STARTED)
        sizes = reported(log, gateway.ask_replica(name, "/metrics") or "", models)
        found.append(Compared(name, planned.get(name), sizes))
    return found


def table(found: Iterable[Compared]) -> Table:
    """What each engine reports, and below it what was planned."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("replica", no_wrap=True)
    for title, _ in FIGURES.values():
        shown.add_column(title, justify="right", no_wrap=True)
    for one in found:
        if one.reported is None:
            continue
        apart, far = one.apart(), one.far()
        cells = []
        for figure, (_, text) in FIGURES.items():
            value = getattr(one.reported, figure)
            cell = "–" if value is None else text(value)
            if figure in apart:
                style = "yellow" if figure in far else "green"
                cell += f" [{style}]{100 * apart[figure]:+.1f} %[/]"
            cells.append(cell)
        shown.add_row(one.name, *cells)
        if one.planned:
            values = [(getattr(one.planned, figure), text) for figure, (_, text) in FIGURES.items()]
            shown.add_row("  planned", *("–" if value is None else text(value) for value, text in values), style="dim")
    return shown


def warnings(found: Iterable[Compared]) -> list[str]:
    """A line for each figure that is far from what was planned."""
    lines = []
    for one in found:
        for figure, share in one.far().items():
            title, text = FIGURES[figure]
            now, before = text(getattr(one.reported, figure)), text(getattr(one.planned, figure))
            lines.append(f"{one.name}: {title} {now}, planned {before} ({100 * share:+.0f} %)")
    return lines


def summary(found: list[Compared]) -> str:
    """The outcome in a few words."""
    if missing := [one for one in found if one.why]:
        return f"{missing[0].name} {missing[0].why}"
    return "not as planned" if warnings(found) else f"as planned, within {CLOSE:.0%}"


def show(console: Console, found: list[Compared]) -> None:
    """Prints the table and what is to be said of it."""
    if any(one.reported for one in found):
        console.print(table(found))
    if not any(one.planned for one in found):
        console.print("nothing was planned for this fleet: `make plan ARGS=MODEL` plans one")
    if far := warnings(found):
        for line in far:
            console.print(f"[yellow]{line}[/]", soft_wrap=True)
        console.print(
            f"More than {CLOSE:.0%} apart: the planner is wrong here. The fleet serves as it is; please report what"
            " `make plan ARGS='--check --json'` prints.",
            soft_wrap=True,
        )


def as_json(found: Iterable[Compared], config: Config) -> dict[str, Any]:
    """The same for programs, sizes in bytes, with the settings that the replicas run with."""
    return {
        "close": CLOSE,
        "replicas": [
            {
                "replica": one.name,
                "reported": one.reported and one.reported.model_dump(),
                "planned": one.planned and one.planned.model_dump(),
                "apart": {figure: round(share, 4) for figure, share in one.apart().items()},
                "far": sorted(one.far()),
                "why_not_compared": one.why or None,
                "settings": {name: value for name, value in config.services[one.name].environment.items() if value},
            }
            for one in found
        ],
    }
