#!/usr/bin/env python3
"""Plans the fleet for this host's GPUs and a model, and writes it: docker-compose.override.yml and fleet/."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from planner import check as fleet_check
from planner import choose, render, replica_processes
from planner.choose import Plan, Wish
from planner.config import load_model
from planner.machine import Hosts, Machine, join, load_machine
from planner.model import Model
from planner.nvml import read_machine
from stack import checks, settings
from stack.compose import Compose, running_files
from stack.console import Problem, console, one_line_for_mistakes
from stack.docker import docker_version
from stack.gateway import Gateway
from stack.settings import ENV_FILE, read
from stack.shell import ROOT

PRESETS = ROOT / "presets"
HOSTS = ROOT / "hosts"  # the parts of a fleet over several hosts
# A preset's settings that the planner decides too, by their names there and in Wish; those that are its alone.
WISHED = {
    "MAX_MODEL_LEN": "context",
    "QUANTIZATION": "quantization",
    "KV_CACHE_DTYPE": "kv_cache",
    "MAX_NUM_SEQS": "max_num_seqs",
    "MAX_NUM_BATCHED_TOKENS": "max_batched_tokens",
    "TENSOR_PARALLEL_SIZE": "tp",
    "PIPELINE_PARALLEL_SIZE": "pp",
}
NOT_WISHED = ("GPU_MEMORY_UTILIZATION", "KV_CACHE_GB", "CPU_OFFLOAD_GB")
# What .env says of these is meant for the first model.
OF_ONE_MODEL = ("TOOL_CALL_PARSER", "CHAT_TEMPLATE", "TRUST_REMOTE_CODE", "EXTRA_ARGS")
NO_DRAFT = ("ngram", "suffix")  # ways to speculate without a second model
MOST_GPUS = 1024  # numbers beyond are a slip of the finger, and a list of them would fill the memory
NEEDS = re.compile(r"a GPU of compute capability (\d+)\.(\d+) with \d+ GiB")


class Quantization(StrEnum):
    """What vLLM can do to an unquantized checkpoint while it loads."""

    none = "none"
    fp8 = "fp8"
    bitsandbytes = "bitsandbytes"


class KvCache(StrEnum):
    """Numbers in the KV cache: the model's 16 bits, or 8."""

    auto = "auto"
    fp8 = "fp8"


def _tokens(text: str) -> int:
    """32768, 32k or 1m as a number of tokens, k and m in powers of two as context lengths are."""
    found = re.fullmatch(r"(\d{1,9})([km]?)", str(text).strip().lower())
    if not found or not int(found[1]):
        raise typer.BadParameter(f"{text} is not a number of tokens: write it as 32768 or 32k")
    return int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2]]


def main(
    call: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A folder under models/, a name on the hub, or a preset's name.", show_default=False)
    ] = "",
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="A further model on its own GPUs, as MODEL or MODEL@GPUS (bge-m3@4). One replica; repeatable."
        ),
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="Only these GPUs: 0-3 or 0,2,5.")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            parser=_tokens,
            metavar="TOKENS",
            help="Tokens that the longest request has to have room for: 32768 or 32k.",
        ),
    ] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="How to quantize while loading. Left out: only where 16 bits do not fit."),
    ] = None,
    kv_cache: Annotated[KvCache | None, typer.Option(help="KV cache in 16 bits (auto, the default) or in 8.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, max=MOST_GPUS, help="Exactly so many replicas.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, max=MOST_GPUS, help="Exactly this tensor-parallel size.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, max=MOST_GPUS, help="Exactly so many pipeline stages.")] = None,
    trust_config: Annotated[
        bool, typer.Option("--trust-config", help="Plan without the keys of config.json that are not known.")
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency/--throughput", help="The shortest answers, or the most tokens a second.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
    machine: Annotated[
        list[Path] | None,
        typer.Option(
            help="Plan for a recorded machine instead of this one; writes nothing. Given several times, plan one fleet"
            " over these hosts and write each one's part under hosts/.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Record this machine in a file, for --machine.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write over files that a person changed.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Plan nothing: hold the running fleet against its plan.")
    ] = False,
) -> None:
    """Plan the fleet: from GPUs and a model to replicas that fit."""
    wish = Wish(
        goal="latency" if latency else "throughput",
        context=context,
        quantization=quantization.value if quantization else None,
        kv_cache=kv_cache.value if kv_cache else None,
        replicas=replicas,
        tp=tp,
        pp=pp,
        trust_config=trust_config,
    )
    with one_line_for_mistakes():
        if check:
            _check_running(_given(call) - {"check", "as_json"}, as_json)
            return
        if not model:
            raise Problem("no model is named", "name one: make plan ARGS=MODEL, or ARGS=--help for all options")
        try:
            replicas_up = [] if machine else replica_processes.running_replicas()
            pids = replica_processes.processes(replicas_up)
            if replicas_up and not pids:
                print(
                    "what the running replicas hold cannot be told and is left to them: make down first",
                    file=sys.stderr,
                )
            host = _recorded(machine) if machine else read_machine(pids)
            if record and isinstance(host, Hosts):
                raise Problem("--record records one machine", "leave it out, or plan for one")
            if record:
                record.write_text(host.model_dump_json(indent=2) + "\n")
            parts = plan_all(host, model, also or [], None if gpus is None else _numbers("--gpus", gpus), wish)
            if as_json:
                print(json.dumps(render.as_json(host, parts), indent=2))
            else:
                for part in parts:
                    render.print_part(Console(width=None if sys.stdout.isatty() else 120), host, part)
            if isinstance(host, Hosts) and not dry_run:
                files = _parts_of_hosts(host, parts)
                _write(files, parts, yes)
                for old in sorted({folder.name for folder in HOSTS.iterdir()} - {path.parent.name for path in files}):
                    print(f"hosts/{old} is left from another plan: it has no part in this one", file=sys.stderr)
                first = next(iter(host.own()))
                print(
                    f"on {first}, the gateway's host: cp -r hosts/{first}/. . && make up; then for each other host:"
                    " make host ARGS='add NAME ADDRESS'",
                    file=sys.stderr,
                )
            elif not (dry_run or machine):
                _write(_parts_of_this_host(parts), parts, yes)
                _say_what_env_loses(parts)
                # a new replica would come to a GPU that an old one still holds
                print("make down, then make up starts it" if replicas_up else "make up starts it", file=sys.stderr)
        except OSError as error:
            raise Problem(
                f"{error.filename}: {error.strerror}", "check that the path exists and that you may write there"
            ) from error


def _given(call: typer.Context) -> set[str]:
    """The parameters that were given, not left to their defaults."""
    sources = {name: call.get_parameter_source(name) for name in call.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _check_running(others: set[str], as_json: bool) -> None:
    """Shows what the running fleet's engines report beside what was planned. A Problem where a replica cannot be
    compared; `others` are further parameters, which there must not be."""
    if others:
        raise Problem(
            f"--check takes --json and nothing else, not {min(others).replace('_', '-')}",
            "leave it out: the running fleet is compared with the plan in docker-compose.override.yml",
        )
    wanted = settings.load()
    if not docker_version()[0]:
        raise Problem("the Docker engine does not answer", "`make up` starts it")
    compose = Compose(*running_files())
    config = compose.config()
    found = fleet_check.compare(compose, Gateway(compose, wanted.url, wanted.https_domain), config)
    if as_json:
        print(json.dumps(fleet_check.as_json(found, config), indent=2))
    else:
        fleet_check.show(console, found)
    if missing := [one for one in found if one.why]:
        raise Problem("; ".join(f"{one.name} {one.why}" for one in missing), missing[0].fix)


def plan_all(machine: Machine, model: str, also: list[str], gpus: list[int] | None, wish: Wish) -> list[render.Part]:
    """The plans of `model` and of further models beside it. A further model that names no GPUs gets the fewest and
    smallest that hold it, from the end; `model` gets what is left, or `gpus`."""
    allowed = {gpu.index for gpu in (machine if gpus is None else machine.only(gpus)).gpus}
    taken: dict[int, str] = {}
    free = machine
    others = []
    wide = []  # those that were given several GPUs
    # those that name their GPUs first, so that the others are not put there
    for text in sorted(also, key=lambda one: "@" not in one):
        name, at, where = text.partition("@")
        pinned = _numbers("--also", where) if at else []
        if clash := [index for index in pinned if index in taken]:
            raise Problem(f"--also {text}: GPU {clash[0]} has {taken[clash[0]]} already", "give it another")
        left = free.only(pinned, "--also") if at else free.only(sorted(allowed - set(taken)))
        found, extra, wanted = _model_and_wish(
            name, Wish(goal=wish.goal, replicas=1, trust_config=wish.trust_config), left
        )
        plan = choose.choose(left, found, wanted) if at else _fewest(left, found, wanted)
        wide += [text] if not at and len(plan.replicas[0].gpus) > 1 else []
        taken |= {gpu.index: found.name for replica in plan.replicas for gpu in replica.gpus}
        if machine.gpus and not allowed - set(taken):
            raise Problem(f"--also {text}: leaves no GPU for {model}", "pin it to fewer: --also MODEL@GPU")
        free = _less(free, plan)
        unset = dict.fromkeys(OF_ONE_MODEL, "")
        others.append(render.Part(replace(plan, idle=()), _name_in_container(found.name), unset | extra))
    left = free.only(sorted(allowed - set(taken)))
    found, extra, wanted = _model_and_wish(model, wish, left)
    try:
        plan = choose.choose(left, found, wanted)
    except choose.DoesNotFitError as error:
        if wide:
            raise choose.DoesNotFitError(
                f"{error.what}, beside {' and '.join(wide)}",
                f"{error.fix}; or give {wide[0]} fewer GPUs: --also {wide[0]}@GPU",
            ) from error
        raise
    return [render.Part(plan, _name_in_container(found.name), extra), *others]


def _less(machine: Machine, plan: Plan) -> Machine:
    """The machine without the GPUs, memory and cores that `plan` takes."""
    used = {gpu.index for replica in plan.replicas for gpu in replica.gpus}
    cores = sum(replica.tp for replica in plan.replicas if not replica.gpus)
    return machine.model_copy(
        update={
            "gpus": tuple(gpu for gpu in machine.gpus if gpu.index not in used),
            "memory_free": machine.memory_free - ceil(plan.host_memory / choose.CPU_SHARE),
            "cpu_cores": max(1, machine.cpu_cores - cores),
        }
    )


def _fewest(machine: Machine, model: Model, wish: Wish) -> Plan:
    """The plan over the fewest and smallest GPUs, with the model's own weights if all GPUs but one hold them."""
    own = replace(wish, quantization=wish.quantization or "none")
    parts = [machine.only(group) for group in choose.fewest_first(machine)]
    for wanted in (own, wish):
        for part in parts:
            # asked to quantize, it may still leave weights in host memory
            if (plan := choose.best(part, model, wanted)) and not (wanted is own and plan.host_memory):
                # with what it would be with fewer bits, among the runners-up
                return choose.choose(part, model, wish)
    return choose.choose(machine, model, wish)


def _model_and_wish(name: str, wish: Wish, machine: Machine) -> tuple[Model, dict[str, str], Wish]:
    """The model, and where `name` is a preset its settings: those that the planner decides go into the wish, if they
    are not there yet, the others to vLLM as they are."""
    if not (path := PRESETS / f"{name}.yaml").is_file():
        return _load(name, wish), {}, wish
    preset = yaml.safe_load(path.read_text())
    _check_needs(name, preset["needs"], machine)
    settings = {key: str(value) for key, value in preset["settings"].items()}
    if odd := [key for key in NOT_WISHED if key in settings]:
        raise Problem(f"preset {name} sets {odd[0]}, which the planner decides", "take it out of the preset")
    found = _load(settings.pop("MODEL"), wish)
    if text := settings.get("SPECULATIVE_CONFIG"):
        found = _with_draft(name, found, json.loads(text), wish)
    wanted: dict[str, Any] = {WISHED[key]: settings.pop(key) for key in WISHED if key in settings}
    for key, value in wanted.items():
        if key == "kv_cache":
            wanted[key] = "fp8" if value.startswith("fp8") else "auto"
        elif key != "quantization":
            wanted[key] = int(value)
    said = {key: value for key, value in vars(wish).items() if value is not None}
    return found, settings, Wish(**(wanted | said))


def _load(name: str, wish: Wish) -> Model:
    """The model `name`. What was not read of its config is said as a warning where the user trusts it all the same."""
    found = load_model(name, ROOT / "models", wish.trust_config)
    if found.own_code:
        advice = "if vLLM asks for it, read it and set TRUST_REMOTE_CODE=true in .env"
        print(f"{name} brings code of its own (auto_map): {advice}", file=sys.stderr)
    if found.unread:
        print(f"warning: {name}: planned without {', '.join(found.unread)} of its config.json", file=sys.stderr)
    return found


def _check_needs(name: str, needs: str, machine: Machine) -> None:
    """Raises Problem where this host has not the GPUs that a preset is for. Memory is the plan's business."""
    if not (capability := NEEDS.fullmatch(needs)):
        return
    if not machine.gpus:
        raise Problem(f"preset {name} needs {needs}, and there is none here", "take a preset that needs nothing")
    for gpu in machine.gpus:
        if gpu.compute_capability < (int(capability[1]), int(capability[2])):
            has = ".".join(map(str, gpu.compute_capability))
            raise Problem(
                f"preset {name} needs {needs}; GPU {gpu.index} ({gpu.name}) has {has}",
                "take another preset, or leave that GPU out with --gpus",
            )


def _with_draft(preset: str, model: Model, speculative: dict[str, Any], wish: Wish) -> Model:
    """The model with the one that guesses its tokens, which needs memory too."""
    if draft := speculative.get("model"):
        return replace(model, draft=_load(str(draft), wish))
    if speculative.get("method") not in NO_DRAFT:
        raise Problem(f"preset {preset}: the planner cannot size that SPECULATIVE_CONFIG", "name its draft model")
    return model


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
        if max(int(first), int(last or first)) >= MOST_GPUS:
            raise Problem(
                f"{option}: {text} goes beyond GPU {MOST_GPUS - 1}", "choose from those that nvidia-smi lists"
            )
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise Problem(f"{option}: {text} names no GPU", "write it as 0-3 or 0,2,5")
    return found


def _recorded(files: list[Path]) -> Machine:
    """The recorded machine; several as one, each host by the name of its file."""
    if len(files) == 1:
        return load_machine(files[0])
    machines: dict[str, Machine] = {}
    for file in files:
        name = file.name.removesuffix(".json")
        try:
            checks.host_has_a_name(name)
        except Problem as problem:
            raise Problem(
                f"--machine {file}: {problem.what}", f"call the file as the host is called: {problem.fix}"
            ) from None
        if name in machines:
            raise Problem(f"--machine: two hosts are called {name}", "call each file as its host is called")
        machines[name] = load_machine(file)
    return join(machines)


def _parts_of_this_host(parts: list[render.Part]) -> dict[Path, str]:
    """The files of a fleet on one host, with what they say."""
    return {
        ROOT / "docker-compose.override.yml": render.override_file(parts, ROOT / "docker-compose.yml"),
        ROOT / "fleet" / "default.conf": render.fleet_file(parts),
    }


def _parts_of_hosts(machine: Hosts, parts: list[render.Part]) -> dict[Path, str]:
    """The files of each of several hosts that has a part, in a folder of its own; the first one's gateway has the whole
    fleet."""
    files: dict[Path, str] = {}
    used = {gpu.index for part in parts for replica in part.plan.replicas for gpu in replica.gpus}
    for gpus in machine.by_host(machine.gpus):
        numbers = [gpu.index for gpu in gpus]
        if not used & set(numbers) and 0 not in numbers:
            continue
        folder = HOSTS / machine.hosts[numbers[0]]
        files[folder / "docker-compose.override.yml"] = render.override_file(
            parts, ROOT / "docker-compose.yml", numbers
        )
    (name, own), *_ = machine.own().items()
    return files | {HOSTS / name / "fleet" / "default.conf": render.fleet_file(parts, own)}


def _write(files: Mapping[Path, str], parts: list[render.Part], yes: bool) -> None:
    """Writes the files of a plan; asks, but for `yes`, before it writes over one that a person changed."""
    for part in parts:
        if Path(part.model).is_absolute() or Path(part.model).is_dir():
            raise Problem(
                f"{part.model} lies outside models/, where replicas do not see it",
                "copy it there with scripts/download_model.py",
            )
    said = {name: value for name, value in read(ENV_FILE).items() if value}
    if len(parts) > 1 and said.get("SERVED_MODEL_NAME"):
        raise Problem(
            "SERVED_MODEL_NAME in .env would give several models one name", "remove it there: each has its own"
        )
    what = "; ".join(f"{part.plan.layout} of {part.model} for {part.plan.wish.goal}" for part in parts)
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
        if path.parent != ROOT:
            path.parent.mkdir(exist_ok=True, parents=True)
            path.parent.chmod(0o755)
        path.write_text(render.signed(body, what))
        # the gateway reads them as a user of its own, whatever the umask here
        path.chmod(0o644)
        print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)


def _say_what_env_loses(parts: list[render.Part]) -> None:
    """Names the settings of .env that the plan takes no notice of."""
    said = {name: value for name, value in read(ENV_FILE).items() if value}
    decided = [render.environment(part, replica) for part in parts for replica in part.plan.replicas]
    lost = []
    for name, value in said.items():
        differs = [one.get(name, value) != value for one in decided]
        lost += [name] if all(differs) or (any(differs) and name not in OF_ONE_MODEL) else []
    if lost:
        print(f"the plan decides what .env says of {', '.join(lost)}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
