"""Chooses the fleet: which GPUs work together in a replica, how many replicas, and what each can hold."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from math import ceil, gcd
from typing import Literal

from planner import memory, speed
from planner.machine import GIB, LINK_ORDER, Gpu, Link, Machine
from planner.memory import Account, Settings
from planner.model import ONLINE_BITS, Model
from planner.speed import Speed
from stack.console import Problem

Goal = Literal["throughput", "latency"]
SHORTEST = 4096  # tokens; a fleet that takes no longer requests is only planned when asked for
AS_FAST = 1.1  # layouts within a tenth of the best latency count as equally fast: the one with more throughput wins
NATIVE_FP8 = (8, 9)
# One vLLM on a CPU: its own memory without weights and KV cache, measured with 0.32; and for each further tp worker.
CPU_PROCESS, CPU_WORKER = round(2.6 * GIB), round(1.6 * GIB)


@dataclass(frozen=True)
class Wish:
    """What the user asked for. None: the planner's choice."""

    goal: Goal = "throughput"
    context: int | None = None
    quantization: str | None = None  # vLLM's name, or "none": never quantize
    kv_cache: str | None = None  # "fp8"
    replicas: int | None = None
    tp: int | None = None
    pp: int | None = None


@dataclass(frozen=True)
class Replica:
    """One vLLM on its GPUs; on none of them it runs on the CPU."""

    gpus: tuple[Gpu, ...]
    tp: int
    pp: int
    link: Link | None  # the slowest path inside it
    account: Account
    speed: Speed
    weight: int = 1  # its share of the route


@dataclass(frozen=True)
class Plan:
    """A fleet of one model."""

    model: Model
    wish: Wish
    settings: Settings
    quantization: str | None  # to apply while loading
    max_length: int
    replicas: tuple[Replica, ...]
    idle: tuple[tuple[Gpu, str], ...] = ()  # GPUs left out, and why
    reasons: tuple[str, ...] = ()
    runners_up: tuple["Plan", ...] = field(default=(), compare=False)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole fleet with as many requests as it holds."""
        return sum(replica.speed.tokens_per_s for replica in self.replicas)

    @property
    def latency(self) -> float:
        """Seconds of one reference request alone on the slowest replica."""
        return max(replica.speed.latency for replica in self.replicas)

    @property
    def kv_tokens(self) -> int:
        return sum(replica.account.kv_tokens for replica in self.replicas)

    @property
    def layout(self) -> str:
        """In a few characters, as `2 × tp 4` or `1 × tp 2 × pp 2`."""
        counts: dict[str, int] = {}
        for replica in self.replicas:
            shape = f"tp {replica.tp}" + (f" × pp {replica.pp}" if replica.pp > 1 else "")
            counts[shape] = counts.get(shape, 0) + 1
        return " + ".join(f"{count} × {shape}" for shape, count in counts.items())


class DoesNotFitError(Problem):
    """No layout holds the model: by how much, and what would help."""


@dataclass(frozen=True)
class _Variant:
    """A way to load the model; the earlier one in the list is always preferred."""

    model: Model
    settings: Settings
    quantization: str | None = None
    reason: str = ""


def choose(machine: Machine, model: Model, wish: Wish) -> Plan:
    """The best fleet of `model` on all GPUs of `machine`, with the runners-up. Raises DoesNotFitError or
    Problem."""
    if wish.context and wish.context > model.max_length:
        raise Problem(
            f"--context {wish.context}: {model.name} takes {model.max_length} tokens at most", "ask for no more"
        )
    if wish.quantization not in (None, "none", *ONLINE_BITS) and wish.quantization != model.quantization:
        known = ", ".join(ONLINE_BITS)
        raise Problem(
            f"--quantization {wish.quantization}: vLLM applies only {known} while it loads",
            "take one of these, or a checkpoint that is quantized already",
        )
    if not machine.gpus:
        return _choose_cpu(machine, model, wish)
    plan = best(machine, model, wish)
    if plan is None:
        raise _what_is_missing(machine, model, wish)
    return plan


def best(machine: Machine, model: Model, wish: Wish) -> Plan | None:
    """The best fleet on GPUs; None where nothing fits."""
    for variant in _variants(machine, model, wish):
        if plans := _fleets(machine, variant, wish):
            first, *others = _ranked(plans, wish)
            return replace(first, runners_up=tuple(_distinct(first, others)[:4]))
    return None


def _variants(machine: Machine, model: Model, wish: Wish) -> Iterator[_Variant]:
    settings = replace(Settings.default(machine.gpus[0]), kv_bytes=1 if wish.kv_cache == "fp8" else 2)
    asked = wish.quantization
    if asked in ONLINE_BITS and model.quantization is None:
        yield _Variant(model.quantized(asked), settings, asked, f"{asked}: asked for")
    else:
        yield _Variant(model, settings)
        if asked is None and model.quantization is None and not model.pooling:
            needed = (
                f"its {memory.total_weight_bytes(model) / GIB:.1f} GiB of 16-bit weights leave too little room here"
            )
            if all(gpu.compute_capability >= NATIVE_FP8 for gpu in machine.gpus):
                yield _Variant(model.quantized("fp8"), settings, "fp8", f"8-bit weights: {needed}")
            yield _Variant(model.quantized("bitsandbytes"), settings, "bitsandbytes", f"4-bit weights: {needed}")
    if asked != "none" and not model.pooling:
        weights = memory.total_weight_bytes(model)
        for gib in (2, 4, 8, 16, 32, 64):
            # what half of the host's memory and half of the weights allow
            if gib * GIB * len(machine.gpus) <= min(machine.memory_free / 2, weights / 2):
                loaded = model.quantized(asked) if asked in ONLINE_BITS and model.quantization is None else model
                reason = f"{gib} GiB of weights a GPU stay in host memory, which is slow: they fit no other way"
                quantization = asked if asked in ONLINE_BITS else None
                yield _Variant(loaded, replace(settings, offload=gib * GIB), quantization, reason)


def _classes(machine: Machine) -> list[list[Gpu]]:
    """GPUs that can share a replica: of one name and size. A MIG slice works alone."""
    found: dict[tuple[object, ...], list[Gpu]] = {}
    for gpu in machine.gpus:
        found.setdefault((*gpu.size, gpu.mig), []).append(gpu)
    return list(found.values())


def _groups(machine: Machine, gpus: list[Gpu], size: int) -> list[tuple[tuple[Gpu, ...], Link | None]]:
    """The GPUs in groups of `size`, best linked first; among equals those with more free memory."""
    if size == 1:
        return [((gpu,), None) for gpu in gpus]
    links = {frozenset((a.index, b.index)): machine.link(a.index, b.index) for a, b in combinations(gpus, 2)}

    def slowest(group: tuple[Gpu, ...]) -> Link:
        inside = (links[frozenset((a.index, b.index))] for a, b in combinations(group, 2))
        return max(inside, key=lambda link: (LINK_ORDER.index(link.kind), -link.gb_s))

    groups: list[tuple[tuple[Gpu, ...], Link | None]] = []
    left = sorted(gpus, key=lambda gpu: (-gpu.free, gpu.index))
    if len({(link.kind, link.gb_s) for link in links.values()}) == 1:
        # any grouping is as good
        chunks = (tuple(left[at : at + size]) for at in range(0, len(left) - size + 1, size))
        return [(tuple(sorted(chunk, key=lambda gpu: gpu.index)), slowest(chunk)) for chunk in chunks]
    while len(left) >= size:
        closest: tuple[tuple[float, ...], tuple[Gpu, ...], Link] | None = None
        for group in combinations(left, size):
            link = slowest(group)
            key = (LINK_ORDER.index(link.kind), -link.gb_s, -min(gpu.free for gpu in group), *[g.index for g in group])
            if closest is None or key < closest[0]:
                closest = (key, group, link)
        assert closest
        groups.append((closest[1], closest[2]))
        left = [gpu for gpu in left if gpu not in closest[1]]
    return groups


def _layouts(gpus: list[Gpu], model: Model, wish: Wish) -> Iterator[tuple[int, int]]:
    """(tp, pp) that the model and the number of GPUs allow."""
    most = 1 if gpus[0].mig else len(gpus)
    for tp in model.tp_sizes(most):
        for pp in range(1, min(most // tp, model.layers) + 1):
            if wish.tp in (None, tp) and wish.pp in (None, pp) and not (pp > 1 and model.pooling):
                yield tp, pp


def _options(machine: Machine, gpus: list[Gpu], variant: _Variant, wish: Wish) -> list[list[Replica]]:
    """All fleets of one class of GPUs: each layout, with as many replicas as there is room for, or fewer."""
    needed = wish.context or min(variant.model.max_length, SHORTEST)
    options = []
    for tp, pp in _layouts(gpus, variant.model, wish):
        able = [gpu for gpu in gpus if _holds(variant, gpu, tp, pp, needed)]
        replicas = []
        for group, link in _groups(machine, able, tp * pp):
            tightest = min(group, key=lambda gpu: gpu.free)
            length = wish.context or memory.longest(variant.model, tightest, tp, pp, variant.settings)
            account = memory.account(variant.model, tightest, tp, pp, length, variant.settings)
            figures = speed.estimate(variant.model, tightest, link, tp, pp, account, variant.settings)
            replicas.append(Replica(group, tp, pp, link, account, figures))
        options += [
            replicas[:count] for count in range(1, len(replicas) + 1) if wish.replicas or count == len(replicas)
        ]
    return options


def _holds(variant: _Variant, gpu: Gpu, tp: int, pp: int, length: int) -> bool:
    return memory.account(variant.model, gpu, tp, pp, length, variant.settings).max_requests >= 1


def _fleets(machine: Machine, variant: _Variant, wish: Wish) -> list[Plan]:
    """All fleets over all classes of GPUs; a class may stay idle where another is in use."""
    per_class = [[[], *_options(machine, gpus, variant, wish)] for gpus in _classes(machine)]
    plans = []
    for chosen in product(*per_class):
        replicas = [replica for option in chosen for replica in option]
        if replicas and len(replicas) == (wish.replicas or len(replicas)):
            plans.append(_plan(machine, variant, wish, replicas))
    return plans


def _plan(machine: Machine, variant: _Variant, wish: Wish, replicas: list[Replica]) -> Plan:
    model, settings = variant.model, variant.settings
    length = wish.context or min(
        memory.longest(model, min(one.gpus, key=lambda gpu: gpu.free), one.tp, one.pp, settings) for one in replicas
    )
    weights = route_weights([replica.speed.tokens_per_s for replica in replicas])
    final = []
    for replica, weight in zip(replicas, weights, strict=True):
        tightest = min(replica.gpus, key=lambda gpu: gpu.free)
        account = memory.account(model, tightest, replica.tp, replica.pp, length, settings)
        final.append(replace(replica, account=account, weight=weight))
    used = {gpu.index for replica in replicas for gpu in replica.gpus}
    idle = tuple((gpu, _why_idle(gpu, variant, replicas, wish)) for gpu in machine.gpus if gpu.index not in used)
    reasons = (variant.reason,) if variant.reason else ()
    return Plan(model, wish, settings, variant.quantization, length, tuple(final), idle, reasons)


def route_weights(rates: list[float]) -> list[int]:
    """Small whole numbers in the ratio of the replicas' speeds, to a tenth."""
    slowest = min(rates)
    tenths = [max(1, round(10 * rate / slowest)) for rate in rates]
    divisor = gcd(*tenths)
    return [tenth // divisor for tenth in tenths]


def _why_idle(gpu: Gpu, variant: _Variant, replicas: list[Replica], wish: Wish) -> str:
    tp, pp = replicas[0].tp, replicas[0].pp
    if not _holds(variant, gpu, tp, pp, wish.context or min(variant.model.max_length, SHORTEST)):
        programs = f", {', '.join(gpu.programs)} runs there" if gpu.programs else ""
        return f"{gpu.free / GIB:.1f} GiB free are too few{programs}"
    if wish.replicas:
        return f"{wish.replicas} replicas were asked for"
    if tp * pp > 1:
        return f"no {tp * pp} GPUs of its kind are left for another replica"
    return "the others are faster without it" if wish.goal == "latency" else "it would shorten the longest request"


def _ranked(plans: list[Plan], wish: Wish) -> list[Plan]:
    """Best first. Of equal ones the one with more replicas: a fault then takes less away."""
    if wish.goal == "throughput":
        return sorted(plans, key=lambda plan: (-plan.tokens_per_s, -len(plan.replicas)))
    enough = AS_FAST * min(plan.latency for plan in plans)
    return sorted(
        plans, key=lambda plan: (plan.latency > enough, -plan.tokens_per_s if plan.latency <= enough else plan.latency)
    )


def _distinct(first: Plan, others: list[Plan]) -> list[Plan]:
    """One plan for each layout."""
    seen, kept = {first.layout}, []
    for plan in others:
        if plan.layout not in seen:
            seen.add(plan.layout)
            kept.append(plan)
    return kept


def _what_is_missing(machine: Machine, model: Model, wish: Wish) -> DoesNotFitError:
    """By how much the model does not fit in the layout that comes closest, and the smallest change that mends it."""
    loaded = model
    if model.quantization is None and wish.quantization != "none" and not model.pooling:
        loaded = model.quantized(wish.quantization or "bitsandbytes")
    settings = replace(Settings.default(machine.gpus[0]), kv_bytes=1 if wish.kv_cache == "fp8" else 2)
    length = wish.context or min(model.max_length, SHORTEST)
    shortfalls = []
    for gpus in _classes(machine):
        for tp, pp in _layouts(gpus, loaded, replace(wish, tp=wish.tp, pp=wish.pp)):
            widest = sorted(gpus, key=lambda gpu: gpu.free)[-tp * pp]
            account = memory.account(loaded, widest, tp, pp, length, settings)
            layers = ceil(loaded.layers / pp)
            shortfalls.append((memory.request_bytes(loaded, tp, layers, length, settings) - account.kv, tp, pp))
    if not shortfalls:
        sizes = ", ".join(str(size) for size in model.tp_sizes(16))
        return DoesNotFitError(f"{model.name} has {model.attention.heads} heads", f"take --tp of {sizes}")
    missing, tp, pp = min(shortfalls)
    how = "" if loaded is model else f" even with {loaded.bits:g}-bit weights"
    if missing <= 0:
        most = _most_replicas(machine, model, wish)
        return DoesNotFitError(f"{model.name} fits, but not {wish.replicas} times", f"take --replicas {most}")
    size = f"{missing / GIB:.1f} GiB on each GPU for one request of {length:,} tokens"
    what = f"{model.name} does not fit{how}: the closest layout, tp {tp} × pp {pp}, misses {size}"
    changes = [text for text, other, changed in _changes(machine, model, wish) if best(other, model, changed)]
    fix = f"the smallest change that makes it fit is {changes[0]}" if changes else "it takes other GPUs"
    return DoesNotFitError(what, fix)


def _most_replicas(machine: Machine, model: Model, wish: Wish) -> int:
    most = 0
    for count in range(1, len(machine.gpus) + 1):
        if best(machine, model, replace(wish, replicas=count)):
            most = count
    return most


def _changes(machine: Machine, model: Model, wish: Wish) -> Iterator[tuple[str, Machine, Wish]]:
    """(what to change, the machine then, the wish then), smallest change first."""
    for length in (32768, 16384, 8192, 4096, 2048, 1024):
        if length < (wish.context or min(model.max_length, SHORTEST)):
            yield f"--context {length}", machine, replace(wish, context=length)
    if wish.kv_cache is None and all(gpu.compute_capability >= NATIVE_FP8 for gpu in machine.gpus):
        yield "--kv-cache fp8", machine, replace(wish, kv_cache="fp8")
    if wish.tp or wish.pp:
        yield "leave out --tp and --pp", machine, replace(wish, tp=None, pp=None)
    if busy := [gpu for gpu in machine.gpus if gpu.programs]:
        freed = tuple(gpu.model_copy(update={"free": gpu.total}) if gpu.programs else gpu for gpu in machine.gpus)
        names = "; ".join(f"{', '.join(gpu.programs)} on GPU {gpu.index}" for gpu in busy)
        yield f"stop {names}", machine.model_copy(update={"gpus": freed}), wish
    if wish.quantization == "none":
        yield "leave out --quantization none", machine, replace(wish, quantization=None)
    largest = max(machine.gpus, key=lambda gpu: gpu.total)
    if not largest.mig:
        have = sum(gpu.size == largest.size for gpu in machine.gpus)
        for count in (2, 3, 4, 6, 8, 16):
            if count > have:
                clones = (largest.model_copy(update={"index": n, "free": largest.total}) for n in range(count))
                changed = machine.model_copy(update={"gpus": tuple(clones), "links": ()})
                yield f"{count} × {largest.name} instead of {have}", changed, wish


def _choose_cpu(machine: Machine, model: Model, wish: Wish) -> Plan:
    """Replicas on the CPU: as many as were asked for, or two where memory and cores allow, so that one can be replaced
    while the other serves."""
    tp, pp = wish.tp or 1, 1
    if wish.pp not in (None, 1):
        raise Problem("--pp: pipeline parallelism does not work on a CPU", "leave it out")
    if tp not in model.tp_sizes(tp):
        sizes = ", ".join(str(size) for size in model.tp_sizes(16))
        raise Problem(f"--tp {tp}: {model.name} cannot be split so", f"take one of {sizes}")
    settings = Settings(max_num_seqs=128, max_batched_tokens=2048, eager=True)
    length = wish.context or min(model.max_length, 2 * SHORTEST)
    kv = max(GIB, ceil(memory.request_bytes(model, 1, model.layers, length, settings) / GIB) * GIB)
    weights = memory.total_weight_bytes(model)
    needed = weights + kv + CPU_PROCESS + (tp - 1) * CPU_WORKER
    room = int(machine.memory_free * 0.9)
    count = wish.replicas or max(1, min(2, room // needed, machine.cpu_cores // tp))
    if count * needed > room:
        raise DoesNotFitError(
            f"{model.name} does not fit: {count} × {needed / GIB:.1f} GiB are {(count * needed - room) / GIB:.1f} GiB "
            f"more than the {room / GIB:.1f} GiB of memory that are free",
            "take --replicas 1" if count > 1 and needed <= room else "take a smaller model, or stop other programs",
        )
    per_token = memory.kv_bytes_per_token(model, 1, model.layers)
    tokens = kv // per_token if per_token else 0
    requests = (
        kv / memory.request_bytes(model, 1, model.layers, length, settings) if per_token else settings.max_num_seqs
    )
    account = Account(needed, 1.0, weights, 0, 0, needed - weights - kv, 0, kv, tokens, round(requests, 2))
    # one core streams weights from memory at about 10 GB/s
    token = weights / (min(machine.cpu_cores, 8) / count * 10e9) + 0.02
    figures = Speed(first_token=speed.PROMPT * token / 8, token=token, tokens_per_s=4 / token)
    replicas = tuple(Replica((), tp, pp, None, account, figures) for _ in range(count))
    return Plan(model, wish, settings, None, length, replicas, (), ("no GPU here: vLLM runs on the CPU",))
