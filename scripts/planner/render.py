"""Writes a plan down: for people as a table, for programs as JSON, for Compose and the gateway as files."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import floor
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from planner import memory
from planner.check import Sizes
from planner.choose import BFLOAT16, Plan, Replica
from planner.machine import GIB, Hosts, Machine
from planner.memory import Account
from planner.replica_gpus import OverrideMap, beside_gpus, dump_compose, gpu_service
from planner.speed import ANSWER, CONCURRENT, PROMPT
from stack.gateway import fleet_line

MIB = 1 << 20
LINK_NAMES = {
    "nvlink": "NVLink",
    "pix": "one PCIe switch",
    "pxb": "PCIe switches",
    "phb": "PCIe host bridge",
    "node": "PCIe, one NUMA node",
    "sys": "PCIe between NUMA nodes",
}
HEADER = re.compile(r"\A# Written by `make \w+`.*\n(?:#.*\n)*?# sha256 ([0-9a-f]{16})\n")


@dataclass(frozen=True)
class Part:
    """One model of the fleet: its plan, the name vLLM knows it by, and a preset's settings."""

    plan: Plan
    model: str
    extra: Mapping[str, str]


def reasons(plan: Plan) -> list[tuple[str, str, str]]:
    """(number, its value, why) of the fleet, and of each kind of replica in it."""
    model = plan.model
    rows = [("layout", plan.layout, _layout_reason(plan))]
    if model.quantization:
        why = "; ".join(plan.reasons) if plan.quantization else "the checkpoint is quantized"
        rows.append(("quantization", f"{model.quantization.method}, {model.bits:.3g} bits a weight", why))
    rows.append(("max model length", f"{plan.max_length:,} tokens", _length_reason(plan)))
    if len({one.weight for one in plan.replicas}) > 1:
        weights = ", ".join(str(one.weight) for one in plan.replicas)
        rows.append(("route weights", weights, "the replicas' expected tokens/s"))
    kinds: dict[object, list[int]] = {}
    for number, one in enumerate(plan.replicas):
        size = one.gpus[0].size if one.gpus else None
        kinds.setdefault((size, one.tp, one.pp, one.settings, one.account.utilization), []).append(number)
    for numbers in kinds.values():
        of = f" of replica {', '.join(map(str, numbers))}" if len(kinds) > 1 else ""
        rows += [(what + of, value, why) for what, value, why in _replica_reasons(plan, plan.replicas[numbers[0]])]
    return rows


def _replica_reasons(plan: Plan, replica: Replica) -> list[tuple[str, str, str]]:
    model, account, settings = plan.model, replica.account, replica.settings
    if not replica.gpus:
        memory_why = "weights, KV cache and vLLM itself; " + plan.reasons[0]
        kv_why = f"{_gib(account.kv)} for each {'process' if replica.tp > 1 else 'replica'}"
        return [
            ("memory of a replica", _gib(account.total), memory_why),
            ("KV cache", f"{account.kv_tokens:,} tokens", kv_why),
        ]
    layers = max(memory.stage_layers(model.layers, replica.pp))
    per_token = memory.kv_bytes_per_token(model, replica.tp, layers, settings.kv_bytes)
    tight = min(replica.gpus, key=lambda gpu: gpu.free)
    others = tight.total - tight.free
    share_reason = "vLLM's default"
    if account.utilization < memory.DEFAULT_UTILIZATION:
        who = f"{', '.join(tight.programs) or 'other programs'} hold {_gib(others)} of GPU {tight.index}"
        share_reason = (who if others > GIB else "a small GPU") + f"; CUDA needs {_gib(account.outside)} besides"
    reserve = _gib(account.activations + account.graphs + account.other)
    rows = [("CPU offload", _gib(settings.offload), plan.reasons[-1])] if settings.offload else []
    rows += [
        ("GPU memory utilization", f"{account.utilization:.2f}", share_reason),
        ("weights", f"{_gib(account.weights)} a GPU", _weights_reason(plan, replica)),
        ("reserve", f"{reserve} a GPU", _reserve_reason(replica)),
    ]
    if per_token:
        full = f"of {plan.max_length:,} tokens at the same time"
        rows += [
            ("KV cache", f"{_gib(account.kv)} a GPU", "what is left" + ", in 8 bits" * (settings.kv_bytes == 1)),
            ("KV tokens", f"{account.kv_tokens:,} a replica", _kv_reason(plan, replica, layers, per_token)),
            ("full-length requests", f"{_requests(account)} a replica", full),
        ]
    sizes = f"{settings.max_num_seqs:,}, {settings.max_batched_tokens:,} tokens"
    return [*rows, ("max sequences, batch", sizes, _sizes_reason(plan, replica))]


def _sizes_reason(plan: Plan, replica: Replica) -> str:
    own = memory.Settings.default(replica.gpus[0])
    settings = replica.settings
    if plan.wish.max_num_seqs or plan.wish.max_batched_tokens:
        return "as asked for"
    if (own.max_num_seqs, own.max_batched_tokens) == (settings.max_num_seqs, settings.max_batched_tokens):
        return "vLLM's own for such a GPU"
    if plan.model.whole_prompts:
        return "a prompt of full length in one step, which embedding models need"
    return f"less than vLLM's own {own.max_num_seqs:,}, {own.max_batched_tokens:,}: leaves more for the KV cache"


def _requests(account: Account) -> str:
    """Requests of full length at once, never rounded up."""
    return f"{floor(account.max_requests * 100) / 100:g}"


def _gib(bytes_: float) -> str:
    return f"{bytes_ / GIB:.1f} GiB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def _layout_reason(plan: Plan) -> str:
    replica = plan.replicas[0]
    if plan.wish.replicas or plan.wish.tp or plan.wish.pp:
        return "as asked for"
    if not replica.gpus:
        return "so that one serves while the other is replaced" if len(plan.replicas) > 1 else "memory holds one"
    if not plan.runners_up:
        return "the only one that fits"
    if plan.wish.goal == "latency":
        out = "" if plan.model.pooling else f" and {ANSWER} out"
        return f"the shortest answer: {_seconds(plan.latency)} for {PROMPT} tokens in{out}"
    out = "" if plan.model.pooling else f", {ANSWER} out"
    load = f"{CONCURRENT} requests a GPU, {PROMPT} tokens in{out}"
    return f"the most tokens/s: about {plan.tokens_per_s:,.0f} with {load}"


def _length_reason(plan: Plan) -> str:
    if plan.wish.context:
        return "asked for"
    if plan.max_length == plan.model.max_length:
        return "the model's own limit" + ("; vLLM takes less if that does not fit (auto)" if plan.finds_length else "")
    if not plan.replicas[0].gpus:
        return "enough for chats; --context N for more"
    of = "on the smallest replica" if len({one.account.total for one in plan.replicas}) > 1 else "here"
    limit = f"the model's limit is {plan.model.max_length:,}"
    if plan.finds_length:
        return f"about what one request can have {of}: vLLM finds it (auto); {limit}"
    return f"what one request can have {of}; {limit}"


def _weights_reason(plan: Plan, replica: Replica) -> str:
    model = plan.model
    text = f"{model.all_parameters / 1e9:.2f} B parameters × {model.bits:.3g} bits"
    parts = [f"tp {replica.tp}"] * (replica.tp > 1) + [f"pp {replica.pp}"] * (replica.pp > 1)
    text += f" over {' × '.join(parts)}" if parts else ""
    text += (
        f", the draft model's {_gib(memory.weight_bytes(model.draft, replica.tp, 1, 0))} besides" if model.draft else ""
    )
    offload = replica.settings.offload
    return text + (f", {_gib(offload)} of it in host memory" if offload else "")


def _reserve_reason(replica: Replica) -> str:
    account, settings = replica.account, replica.settings
    step = f"activations of {settings.max_batched_tokens:,} tokens and {settings.max_num_seqs:,} samplings"
    graphs = f", CUDA graphs {_gib(account.graphs)}" if account.graphs else ""
    return f"{step} {_gib(account.activations)}{graphs}, workspaces {_gib(account.other)}"


def _kv_reason(plan: Plan, replica: Replica, layers: int, per_token: int) -> str:
    attention, kv_bytes, draft = plan.model.attention, replica.settings.kv_bytes, plan.model.draft
    size = f"{per_token / 1024:.6g} KiB a token and GPU: {layers} layers × "
    if len(attention.cached) > 1 or any(one.window or one.state or one.row for one in attention.cached):
        request = memory.request_bytes(plan.model, replica.tp, layers, plan.max_length, replica.settings, replica.pp)
        text = f"a request of {plan.max_length:,} tokens takes {request / GIB:.2f} GiB a GPU"
        draft = None  # it is in there
    elif attention.latent:
        text = size + f"a latent of {attention.latent} × {kv_bytes} bytes, whole on each GPU"
    else:
        heads = max(1, -(-attention.kv_heads // replica.tp))
        text = size + f"2 × {heads} KV heads × {attention.head_dim} × {kv_bytes} bytes"
    if draft:
        kib = memory.kv_bytes_per_token(draft, replica.tp, draft.layers, kv_bytes) / 1024
        text += f", and {kib:g} KiB of the draft model"
    if attention.sliding_layers and not any(one.row for one in attention.cached):
        text += f"; {attention.sliding_layers} of {plan.model.layers} layers keep only {attention.window:,} tokens"
    for one in attention.cached:
        if one.state:
            text += (
                f"; {one.layers} of {plan.model.layers} layers keep a state of {one.state / MIB / replica.tp:.1f} MiB"
            )
    return text


def print_part(console: Console, machine: Machine, part: Part) -> None:
    """The plan of one model as tables: replicas, reasons, runners-up."""
    plan = part.plan
    replicas = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "replica",
        "GPUs",
        "tp × pp",
        "path between them",
        "KV tokens",
        "full-length requests",
        "tokens/s",
        "weight",
    ):
        replicas.add_column(column, justify="left" if column in ("replica", "GPUs", "path between them") else "right")
    for number, one in enumerate(plan.replicas):
        gpus = ", ".join(str(gpu.index) for gpu in one.gpus) or "CPU"
        if isinstance(machine, Hosts):
            gpus += f" in {machine.hosts[one.gpus[0].index]}"
        path = f"{LINK_NAMES[one.link.kind]}, {one.link.gb_s:g} GB/s" if one.link else "–"
        path += " in a stage" if one.tp > 1 and one.pp > 1 else ""
        replicas.add_row(
            str(number), gpus, f"{one.tp} × {one.pp}", path, f"{one.account.kv_tokens:,}",
            _requests(one.account), f"{one.speed.tokens_per_s:,.0f}", str(one.weight),
        )  # fmt: skip
    why = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("number", "value", "reason"):
        why.add_column(column, overflow="fold")
    for row in reasons(plan):
        why.add_row(*row)
    blocks: list[Any] = [
        Text(_title(machine, part), style="bold cyan"),
        replicas,
        Text(),
        why,
    ]
    if isinstance(machine, Hosts):
        blocks[1:1] = [Text(f"GPUs are numbered through. {'; '.join(machine.where())}")]
    if any(len(gpus) > 1 for gpus in machine.by_host(machine.gpus)) and not machine.links:
        slowest = machine.link(machine.gpus[0].index, machine.gpus[1].index)
        note = f"they count as {LINK_NAMES[slowest.kind]}, {slowest.gb_s:g} GB/s"
        blocks += [Text(), Text(f"The links between the GPUs are not known: {note}", style="yellow")]
    if plan.idle:
        blocks.append(Text())
        blocks += [
            Text(f"GPU {gpu.index} ({gpu.name}) stays idle: {reason}", style="yellow") for gpu, reason in plan.idle
        ]
    if plan.runners_up:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("runner-up", "weights", "tokens/s", "one answer", "KV tokens", "max length"):
            table.add_column(column, justify="left" if column in ("runner-up", "weights") else "right")
        for other in plan.runners_up:
            table.add_row(
                other.layout,
                f"{other.model.bits:.3g} bits",
                f"{other.tokens_per_s:,.0f} ({_change(other.tokens_per_s, plan.tokens_per_s)})",
                f"{_seconds(other.latency)} ({_change(other.latency, plan.latency)})",
                f"{other.kv_tokens:,} ({_change(other.kv_tokens, plan.kv_tokens)})",
                f"{other.max_length:,}",
            )
        blocks += [Text(), table]
    console.print(Padding(Group(*blocks), (0, 0, 1, 0)))


def _title(machine: Machine, part: Part) -> str:
    names = [gpu.name for replica in part.plan.replicas for gpu in replica.gpus]
    where = " + ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "the CPU"
    return f"{part.model} on {where} of {machine.name}, for {part.plan.wish.goal}"


def _change(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.0f} %" if base else "–"


def as_json(machine: Machine, parts: list[Part]) -> dict[str, Any]:
    """The plan for programs. Sizes in bytes, times in seconds."""
    hosts = machine.hosts if isinstance(machine, Hosts) else {}
    return {"machine": machine.name, "models": [_part_json(part, hosts) for part in parts]}


def _part_json(part: Part, hosts: Mapping[int, str]) -> dict[str, Any]:
    plan = part.plan
    return {
        "model": part.model,
        "goal": plan.wish.goal,
        "layout": plan.layout,
        "quantization": plan.quantization,
        "max_model_len": plan.max_length,
        "max_model_len_auto": plan.finds_length,
        "tokens_per_s": round(plan.tokens_per_s, 1),
        "latency_s": round(plan.latency, 4),
        "replicas": [
            {
                **({"host": hosts[one.gpus[0].index]} if hosts else {}),
                "gpus": [gpu.id for gpu in one.gpus],
                "tensor_parallel_size": one.tp,
                "pipeline_parallel_size": one.pp,
                "weight": one.weight,
                "memory": {
                    "weights": one.account.weights,
                    "activations": one.account.activations,
                    "graphs": one.account.graphs,
                    "other": one.account.other,
                    "kv": one.account.kv,
                    "utilization": one.account.utilization,
                },
                "kv_tokens": one.account.kv_tokens,
                "max_num_seqs": one.settings.max_num_seqs,
                "max_num_batched_tokens": one.settings.max_batched_tokens,
                "full_length_requests": floor(one.account.max_requests * 100) / 100,
                "tokens_per_s": round(one.speed.tokens_per_s, 1),
            }
            for one in plan.replicas
        ],
        "idle": [
            {**({"host": hosts[gpu.index]} if hosts else {}), "gpu": gpu.id, "reason": reason}
            for gpu, reason in plan.idle
        ],
        "reasons": [{"what": what, "value": value, "why": why} for what, value, why in reasons(plan)],
        "runners_up": [
            {
                "layout": other.layout,
                "quantization": other.quantization,
                "tokens_per_s": round(other.tokens_per_s, 1),
                "latency_s": round(other.latency, 4),
                "kv_tokens": other.kv_tokens,
                "max_model_len": other.max_length,
            }
            for other in plan.runners_up
        ],
    }


def environment(part: Part, replica: Replica) -> dict[str, str]:
    """The settings of one replica, by the names of .env. All that its memory depends on are there, empty ones too,
    which count as unset: Compose would take them from .env otherwise."""
    plan, settings = part.plan, replica.settings
    found = {
        "MODEL": part.model,
        "DTYPE": "",
        "QUANTIZATION": plan.quantization or "",
        "TENSOR_PARALLEL_SIZE": str(replica.tp),
        "PIPELINE_PARALLEL_SIZE": str(replica.pp),
        "MAX_MODEL_LEN": "auto" if plan.finds_length else str(plan.max_length),
        "GPU_MEMORY_UTILIZATION": "",
        "KV_CACHE_GB": "",
        "KV_CACHE_DTYPE": "fp8" if settings.kv_bytes == 1 else "",
        "CPU_OFFLOAD_GB": str(settings.offload // GIB) if settings.offload else "",
        "MAX_NUM_SEQS": str(settings.max_num_seqs),
        "MAX_NUM_BATCHED_TOKENS": str(settings.max_batched_tokens),
        "SPECULATIVE_CONFIG": part.extra.get("SPECULATIVE_CONFIG", ""),
    }
    if replica.gpus:
        found["GPU_MEMORY_UTILIZATION"] = f"{replica.account.utilization:.2f}"
        # GPUs before Ampere have no bfloat16
        old = any(gpu.compute_capability < BFLOAT16 for gpu in replica.gpus)
        found["DTYPE"] = "float16" if old else part.extra.get("DTYPE", "bfloat16")
    else:
        found["KV_CACHE_GB"] = f"{replica.account.kv / GIB:g}"
        if not plan.wish.max_batched_tokens:
            found["MAX_NUM_BATCHED_TOKENS"] = ""
    return {**part.extra, **found}


def planned_sizes(part: Part, replica: Replica) -> Sizes:
    """What the replica's engine should report of itself."""
    account, tokens = replica.account, replica.account.kv_tokens or None
    compiling = 0 if replica.settings.eager else memory.COMPILING
    return Sizes(
        weights=account.weights if replica.gpus else None,  # on a CPU it does not tell
        kv=account.kv if tokens else None,
        kv_warm=account.kv + compiling if tokens else None,
        kv_tokens=tokens,
        max_model_len=part.plan.max_length,
    )


def override_file(parts: list[Part], base: Path, host: Sequence[int] | None = None) -> str:
    """docker-compose.override.yml, over docker-compose.yml (`base`): the planned replicas and no others. `host`: the
    numbers of the GPUs of one of several hosts, whose file it is then; the gateway is on the first."""
    in_base = _replicas_of(base)
    services: dict[str, Any] = {}
    with_gateway = host is None or 0 in host
    if with_gateway:
        services["gateway"] = {"volumes": ["./fleet:/etc/nginx/fleet:ro"]}
    here = [one for one in _named(parts) if host is None or one[2].gpus[0].index in host]
    for name, part, replica in here:
        service = _begun(name, base)
        settings = environment(part, replica)
        if replica.gpus:
            settings |= _order(replica)
            service |= gpu_service([gpu.id for gpu in replica.gpus], replica.tp, replica.pp, settings)
            if "gateway" in services:
                services |= beside_gpus()
            if offload := replica.settings.offload:
                service["mem_limit"] = f"{32 + offload * len(replica.gpus) // GIB}g"
        else:
            service |= {"environment": settings, "mem_limit": f"{-(-replica.account.total * 11 // 10 // MIB)}m"}
        services[name] = service
    # what `make up` and `make plan ARGS=--check` hold against what the engines report
    planned = {name: planned_sizes(part, replica).model_dump() for name, part, replica in here}
    if not with_gateway:
        return host_file(
            services, base, {"x-planned": planned, "x-weights": {name: one.weight for name, _, one in here}}
        )
    text = dump_compose({"x-planned": planned, "services": services})
    return text + "".join(f"  {name}: !reset null\n" for name in in_base if name not in services)


def host_file(replicas: Mapping[str, Any], base: Path, more: Mapping[str, Any]) -> str:
    """docker-compose.override.yml of a host whose gateway is elsewhere: these replicas, the link, and nothing else of
    docker-compose.yml (`base`). `more` stands above the services."""
    services: dict[str, Any] = {"link": {"extends": {"file": "docker-compose.host.yml", "service": "link"}}}
    for name, service in replicas.items():
        services[name] = {**service, "depends_on": OverrideMap(link={"condition": "service_healthy"})}
    others = [name for name in yaml.safe_load(base.read_text())["services"] if name not in services]
    return dump_compose({**more, "services": services}) + "".join(f"  {name}: !reset null\n" for name in others)


def unplanned_file(names: Sequence[str], base: Path, gpus: Sequence[str], environment: Mapping[str, str]) -> str:
    """The same for a host that nobody planned: a replica of each name, on a GPU each where there are `gpus`."""
    services: dict[str, Any] = {}
    for number, name in enumerate(names):
        on_gpu = gpu_service([gpus[number]], 1, 1, environment) if gpus else {"environment": dict(environment)}
        services[name] = _begun(name, base) | on_gpu
    return host_file(services, base, {})


def _replicas_of(base: Path) -> list[str]:
    """The replicas that docker-compose.yml has."""
    return [name for name in yaml.safe_load(base.read_text())["services"] if re.fullmatch(r"vllm-\d+", name)]


def _begun(name: str, base: Path) -> dict[str, Any]:
    """What a replica's service begins with: nothing where docker-compose.yml has it, for Compose would add its lists
    to themselves; else all that the first one there is."""
    in_base = _replicas_of(base)
    if name in in_base:
        return {}
    return {"extends": {"file": base.name, "service": in_base[0]}, "hostname": f"{name}.fleet"}


def _order(replica: Replica) -> dict[str, str]:
    """Puts the replica's GPUs in the order of its ranks. CUDA numbers those of a container by their place on the bus,
    whatever the order that Docker got them in."""
    order = [gpu.index for gpu in replica.gpus]
    if order == sorted(order):
        return {}
    numbers = ",".join(str(sorted(order).index(index)) for index in order)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": numbers}


def fleet_file(parts: list[Part], host: Sequence[int] | None = None) -> str:
    """The gateway's fleet: one upstream a replica, its weight where they differ. `host`: the numbers of the GPUs of the
    gateway's own host, if there are several; `make host` adds the replicas of the others."""
    lines = []
    weighted = any(replica.weight > 1 for _, _, replica in _named(parts))
    for name, _, replica in _named(parts):
        if host is None or replica.gpus[0].index in host:
            lines.append(fleet_line(name, weight=replica.weight if weighted else None) + "\n")
    return "".join(lines)


def _named(parts: list[Part]) -> list[tuple[str, Part, Replica]]:
    every = [(part, replica) for part in parts for replica in part.plan.replicas]
    return [(f"vllm-{number}", part, replica) for number, (part, replica) in enumerate(every)]


def signed(body: str, what: str, by: str = "make plan") -> str:
    """`body` under a header that says who wrote it and lets `changed_by_hand` see whether it is still the same."""
    day = datetime.now(UTC).date()
    lines = [
        f"# Written by `{by}` on {day}: {what}.",
        f"# Change it as you like: `{by}` asks before it writes over a changed file.",
        f"# sha256 {_hash(body)}",
    ]
    return "\n".join(lines) + "\n" + body


def is_signed(path: Path) -> bool:
    """Whether `signed` gave the file its header, and it still has it; what is below may have changed."""
    return path.exists() and HEADER.match(path.read_bytes().decode(errors="replace")) is not None


def changed_by_hand(path: Path) -> bool:
    """Whether a person wrote or changed the file. A file that is not there was not changed."""
    if not path.exists():
        return False
    text = path.read_bytes().decode(errors="replace")
    header = HEADER.match(text)
    return header is None or header[1] != _hash(text[header.end() :])


def _hash(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]
