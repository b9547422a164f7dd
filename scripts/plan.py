#!/usr/bin/env python3
"""Plans the fleet for this host's GPUs and a model, and writes it: docker-compose.override.yml and fleet/."""

import json
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from planner import choose, render
from planner.choose import Plan, Wish
from planner.machine import Machine, load_machine
from planner.model import ONLINE_BITS, Model, load_model
from planner.nvml import read_machine
from stack.console import Problem, one_line_for_mistakes

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "presets"


class Quantization(StrEnum):
    """What vLLM can do to an unquantized checkpoint while it loads."""

    none = "none"
    fp8 = "fp8"
    bitsandbytes = "bitsandbytes"


class KvCache(StrEnum):
    """Numbers in the KV cache: the model's 16 bits, or 8."""

    auto = "auto"
    fp8 = "fp8"


def main(
    model: Annotated[
        str, typer.Argument(help="A folder under models/, a name on the hub, or a preset's name.", show_default=False)
    ],
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="A further model on its own GPUs, as MODEL or MODEL@GPUS (bge-m3@4). One replica; repeatable."
        ),
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="Only these GPUs: 0-3 or 0,2,5.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the longest request has to be able to have.")
    ] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="How to quantize while loading. Left out: only where it fits no other way."),
    ] = None,
    kv_cache: Annotated[KvCache, typer.Option(help="KV cache in 16 bits or in 8.")] = KvCache.auto,
    replicas: Annotated[int | None, typer.Option(min=1, help="Exactly so many replicas.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Exactly this tensor-parallel size.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Exactly so many pipeline stages.")] = None,
    latency: Annotated[
        bool, typer.Option("--latency/--throughput", help="The shortest answers, or the most tokens a second.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
    machine: Annotated[
        Path | None,
        typer.Option(help="Plan for a recorded machine instead of this one; writes nothing.", show_default=False),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Record this machine in a file, for --machine.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write over files that a person changed.")] = False,
) -> None:
    """Plan the fleet: from GPUs and a model to replicas that fit."""
    with one_line_for_mistakes():
        host = load_machine(machine) if machine else read_machine()
        if record:
            record.write_text(host.model_dump_json(indent=2) + "\n")
        wish = Wish(
            goal="latency" if latency else "throughput",
            context=context,
            quantization=quantization.value if quantization else None,
            kv_cache="fp8" if kv_cache is KvCache.fp8 else None,
            replicas=replicas,
            tp=tp,
            pp=pp,
        )
        parts = plan_all(host, model, also or [], _numbers("--gpus", gpus) if gpus else None, wish)
        if as_json:
            print(json.dumps(render.as_json(host, parts), indent=2))
        else:
            for part in parts:
                render.print_part(Console(width=None if sys.stdout.isatty() else 120), host, part)
        if not (dry_run or machine):
            _write(parts, yes)


def plan_all(machine: Machine, model: str, also: list[str], gpus: list[int] | None, wish: Wish) -> list[render.Part]:
    """The plans of `model` and of further models beside it. A further model that names no GPUs gets the fewest that
    hold it, from the end; `model` gets what is left, or `gpus`."""
    left = machine.only(gpus) if gpus else machine
    others = []
    # those that name their GPUs first, so that the others are not put there
    for text in sorted(also, key=lambda one: "@" not in one):
        name, _, where = text.partition("@")
        found, extra, wanted = _model_and_wish(name, Wish(goal=wish.goal, replicas=1))
        if where:
            pinned = _numbers("--also", where)
            plan = choose.choose(machine.only(pinned), found, wanted)
        else:
            plan = _fewest(left, found, wanted)
        used = {gpu.index for replica in plan.replicas for gpu in replica.gpus}
        if machine.gpus:
            rest = [gpu.index for gpu in left.gpus if gpu.index not in used]
            if not rest:
                raise Problem(f"--also {text}: leaves no GPU for {model}", "pin it to fewer: --also MODEL@GPU")
            left = left.only(rest)
        others.append(render.Part(replace(plan, idle=()), _name_in_container(found.name), extra))
    found, extra, wanted = _model_and_wish(model, wish)
    return [render.Part(choose.choose(left, found, wanted), _name_in_container(found.name), extra), *others]


def _fewest(machine: Machine, model: Model, wish: Wish) -> Plan:
    indices = [gpu.index for gpu in machine.gpus]
    for count in range(1, len(indices)):
        part = machine.only(indices[-count:])
        if plan := choose.best(part, model, wish):
            return plan
    return choose.choose(machine, model, wish)


def _model_and_wish(name: str, wish: Wish) -> tuple[Model, dict[str, str], Wish]:
    """The model, and where `name` is a preset its settings: those that the planner knows go into the wish, if they are
    not there yet, the others to vLLM as they are."""
    if not (path := PRESETS / f"{name}.yaml").is_file():
        return load_model(name, ROOT / "models"), {}, wish
    settings = {key: str(value) for key, value in yaml.safe_load(path.read_text())["settings"].items()}
    found = load_model(settings.pop("MODEL"), ROOT / "models")
    quantization = settings.pop("QUANTIZATION", None)
    return (
        found,
        settings,
        replace(
            wish,
            quantization=wish.quantization or (quantization if quantization in ONLINE_BITS else None),
            context=wish.context or (int(settings.pop("MAX_MODEL_LEN")) if "MAX_MODEL_LEN" in settings else None),
            kv_cache=wish.kv_cache or ("fp8" if settings.pop("KV_CACHE_DTYPE", "").startswith("fp8") else None),
        ),
    )


def _name_in_container(name: str) -> str:
    """A folder under models/ by the name that the replica sees it by."""
    path = Path(name)
    return str(path.resolve().relative_to(ROOT / "models")) if path.resolve().is_relative_to(ROOT / "models") else name


def _numbers(option: str, text: str) -> list[int]:
    """0-3 or 0,2,5 as a list."""
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise Problem(f"{option}: {text} is not a list of GPUs", "write it as 0-3 or 0,2,5")
        found += range(int(first), int(last or first) + 1)
    return found


def _write(parts: list[render.Part], yes: bool) -> None:
    for part in parts:
        if Path(part.model).is_absolute() or Path(part.model).is_dir():
            raise Problem(
                f"{part.model} lies outside models/, where replicas do not see it",
                "copy it there with scripts/download_model.py",
            )
    what = "; ".join(f"{part.plan.layout} of {part.model} for {part.plan.wish.goal}" for part in parts)
    files = {
        ROOT / "docker-compose.override.yml": render.override_file(parts, ROOT / "docker-compose.yml"),
        ROOT / "fleet" / "default.conf": render.fleet_file(parts),
    }
    for path in files:
        if render.changed_by_hand(path) and not yes:
            question = f"{path.relative_to(ROOT)} was changed by hand. Write over it?"
            if not sys.stdin.isatty():
                raise Problem(
                    f"{path.relative_to(ROOT)} was changed by hand", "move it away, or write over it with --yes"
                )
            if not typer.confirm(question, err=True):
                raise Problem("nothing was written", "move the file away, or answer y")
    for path, body in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(render.signed(body, what))
        print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    print("make up starts it", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
