"""Chooses the fleet: which GPUs work together in a replica, how many replicas, and what each can hold."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations, product
from math import ceil, gcd, log2
from typing import Literal

from planner import memory, speed
from planner.machine import GIB, LINK_ORDER, Gpu, Link, Machine
from planner.memory import Account, Settings
from planner.model import ONLINE_BITS, Model
from planner.quantization import MXFP4_METHODS
from planner.speed import Speed
from stack.console import Problem

Goal = Literal["throughput", "latency"]
SHORTEST = 4096  # tokens; a fleet that takes no longer requests is only planned when asked for
# What fleets are ranked by (Plan.worth). Twice the context makes up for a tenth of the goal's figure, for latency so do
# twice the tokens/s; twice the tokens a step, which prefill faster than is counted here, for a fortieth.
CONTEXT, RATE, STEP = log2(1.1), log2(1.1), log2(1.025)
NATIVE_FP8 = (8, 9)
OLDEST = (7, 5)  # compute capability that vLLM's CUDA build has kernels for
BFLOAT16 = (8, 0)
# vLLM refuses them in float16, all that older GPUs have (`_FLOAT16_NOT_SUPPORTED_MODELS` in vllm/config/model.py).
NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
# One vLLM on a CPU: its own memory without weights and KV cache, measured with 0.32; and for each further tp worker.
CPU_PROCESS, CPU_WORKER = round(2.6 * GIB), round(1.6 * GIB)
CPU_SHARE = 0.9  # of the free memory
CPU_KV_STEP = GIB // 4
# Beyond it vLLM is not left to find the length: while it looks, it holds room for a request of the model's own limit in
# each of its slots (`RequestState` in vllm/v1/worker/gpu/states.py), 4 bytes a token of the host's memory.
LONGEST_TO_FIND = 1 << 20


@dataclass(frozen=True)
class Wish:
    """What the user asked for. None: the planner's choice."""

    goal: Goal = "throughput"
    context: int | None = None
    quantization: str | None = None  # vLLM's name, or "none": never quantize
    kv_cache: str | None = None  # "fp8", or "auto": 16 bits
    max_num_seqs: int | None = None
    max_batched_tokens: int | None = None
    replicas: int | None = None
    tp: int | None = None
    pp: int | None = None
    trust_config: bool = False  # plan without the keys of config.json that the planner does not know


@dataclass(frozen=True)
class Replica:
    """One vLLM on its GPUs, in the order of its ranks; on none of them it runs on the CPU."""

    gpus: tuple[Gpu, ...]
    tp: int
    pp: int
    link: Link | None  # the slowest path inside a stage, or between stages of one GPU
    settings: Settings
    longest: int  # request that it holds, in tokens
    account: Account
    speed: Speed
    weight: int = 1  # its share of the route


@dataclass(frozen=True)
class Plan:
    """A fleet of one model."""

    model: Model
    wish: Wish
    quantization: str | None  # to apply while loading
    replicas: tuple[Replica, ...]
    idle: tuple[tuple[Gpu, str], ...] = ()  # GPUs left out, and why
    reasons: tuple[str, ...] = ()
    runners_up: tuple["Plan", ...] = field(default=(), compare=False)

    @property
    def max_length(self) -> int:
        """The longest request that every replica takes."""
        return min(replica.longest for replica in self.replicas)

    @property
    def finds_length(self) -> bool:
        """Whether vLLM finds the longest request itself (`--max-model-len auto`): the model's own limit, or what fits.

        It is told `max_length` where a user or the CPU's speed set it, and where what it finds would not do: several
        replicas would take requests of different lengths, a step has to take a whole prompt, longrope's would be short.
        """
        if not self.replicas[0].gpus or self.wish.context or self.model.whole_prompts or self.model.longrope:
            return False
        alone = len(self.replicas) == 1 and self.model.max_length <= LONGEST_TO_FIND
        return alone or self.max_length == self.model.max_length

    @property
    def tokens_per_s(self) -> float:
        """Of the whole fleet with as many requests as it holds."""
        return sum(replica.speed.tokens_per_s for replica in self.replicas)

    @property
    def latency(self) -> float:
        """Seconds of one reference request alone on the slowest replica."""
        return max(replica.speed.latency for replica in self.replicas)

    @property
    def worth(self) -> float:
        """What fleets with the same weights are ranked by, as docs/plan.md says."""
        rate = self.tokens_per_s
        figure = rate if self.wish.goal == "throughput" else rate**RATE / self.latency
        step = min(replica.settings.max_batched_tokens for replica in self.replicas)
        return float(figure * self.max_length**CONTEXT * step**STEP)

    @property
    def host_memory(self) -> int:
        """Bytes of the host's memory that it takes: all of it on a CPU, else the weights that stay there."""
        return sum(one.account.total if not one.gpus else one.settings.offload * len(one.gpus) for one in self.replicas)

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
    """A way to load the model."""

    model: Model
    quantization: str | None = None
    offload: int = 0  # bytes of weights a GPU keeps in host memory
    reason: str = ""
    last: bool = True  # nothing but host memory comes after it, so small batches are tried too


def choose(machine: Machine, model: Model, wish: Wish) -> Plan:
    """The best fleet of `model` on all GPUs of `machine`, with the runners-up. Raises DoesNotFitError or
    Problem."""
    if wish.context and wish.context > model.max_length:
        raise Problem(
            f"--context {wish.context}: {model.name} takes {model.max_length} tokens at most", "ask for no more"
        )
    method = model.quantization.method if model.quantization else None
    if wish.quantization not in (None, "none", *ONLINE_BITS, method):
        known = ", ".join(ONLINE_BITS)
        raise Problem(
            f"--quantization {wish.quantization}: vLLM applies only {known} while it loads",
            "take one of these, or a checkpoint that is quantized already",
        )
    if wish.quantization in ONLINE_BITS and method not in (None, wish.quantization):
        raise Problem(
            f"--quantization {wish.quantization}: {model.name} is quantized already, by {method}",
            "leave it out, or take a checkpoint in 16 bits",
        )
    if not machine.gpus:
        _check_split(machine, model, wish)
        return _choose_cpu(machine, model, wish)
    usable = _usable(machine, model)
    if not usable.gpus:
        newest = max(machine.gpus, key=lambda gpu: gpu.compute_capability)
        raise Problem(
            f"{model.name} cannot run on GPU {newest.index} ({newest.name}): {_too_old(newest, model)}",
            "take a newer one",
        )
    _check_split(usable, model, wish)
    plan = best(machine, model, wish)
    if plan is None:
        raise _what_is_missing(usable, model, wish)
    return plan


def _too_old(gpu: Gpu, model: Model) -> str | None:
    """Why the GPU can do nothing for the model, however much memory it has."""
    needed, why = OLDEST, "vLLM"
    if model.quantization and model.quantization.method in MXFP4_METHODS:
        needed, why = BFLOAT16, "a checkpoint in mxfp4"
    elif model.kind in NO_FLOAT16:
        needed, why = BFLOAT16, f"{model.kind}, which does not work in float16,"
    if gpu.compute_capability >= needed:
        return None
    has, needs = (".".join(map(str, one)) for one in (gpu.compute_capability, needed))
    return f"{why} needs compute capability {needs}, it has {has}"


def _usable(machine: Machine, model: Model) -> Machine:
    return machine.model_copy(update={"gpus": tuple(gpu for gpu in machine.gpus if not _too_old(gpu, model))})


def _check_split(machine: Machine, model: Model, wish: Wish) -> None:
    """Raises Problem where the tp and pp that were asked for are impossible, however much memory there is."""
    tp, pp = wish.tp or 1, wish.pp or 1
    asked = " ".join([f"--tp {wish.tp}"] * (tp > 1) + [f"--pp {wish.pp}"] * (pp > 1))
    if tp not in model.tp_sizes(tp):
        sizes = ", ".join(str(size) for size in model.tp_sizes(16))
        what = f"--tp {tp} does not divide {model.name} with its {model.attention.heads} heads"
        raise Problem(what, f"take --tp of {sizes}")
    if pp > 1 and not machine.gpus:
        raise Problem(f"--pp {pp}: pipeline parallelism does not work on a CPU", "leave it out")
    if pp > 1 and (why := _one_stage(model)):
        raise Problem(f"--pp {pp}: {model.name} {why}, which works in one stage only", "leave it out")
    if pp > model.layers:
        raise Problem(f"--pp {pp}: {model.name} has {model.layers} layers", f"take --pp of {model.layers} at most")
    if tp * pp > 1 and machine.gpus:
        if all(gpu.mig for gpu in machine.gpus):
            raise Problem(f"{asked}: a MIG slice works alone", "leave it out, or turn MIG off")
        most = max(_most(machine, gpus) for gpus in _classes(machine) if not gpus[0].mig)
        if tp * pp > most:
            where = " in one host" if len(machine.by_host(machine.gpus)) > 1 else ""
            raise Problem(f"{asked} needs {tp * pp} GPUs of one kind{where}, there are {most}", f"use {most} at most")


def _one_stage(model: Model) -> str:
    """Why the model works in one pipeline stage only; empty where it may have several."""
    if model.uneven:
        return "has layers of many sizes"
    return "is an embedding model" if model.pooling else "has a draft model" if model.draft else ""


def best(machine: Machine, model: Model, wish: Wish) -> Plan | None:
    """The best fleet on GPUs; None where nothing fits. The model's own weights are quantized only where they fit no
    other way, and stay in host memory only where nothing else fits."""
    usable = _usable(machine, model)
    ways = [*([variant] for variant in _variants(usable, model, wish)), list(_offloading(usable, model, wish))]
    while ways:
        if ranked := _ranked(usable, ways.pop(0), wish):
            first, *others = ranked
            # fewer bits do not make the answers better, but a person may prefer what they give room for
            smaller = [plan for way in ways[:-1] for plan in _ranked(usable, way, wish)[:1] if plan.worth > first.worth]
            kept = [_finished(machine, plan) for plan in (first, *_distinct(first, others)[:4], *smaller)]
            return replace(kept[0], runners_up=tuple(kept[1:]))
    return None


def _ranked(machine: Machine, variants: list[_Variant], wish: Wish) -> list[Plan]:
    """All fleets, the best first; of equal ones that with more replicas: a fault then takes less away."""
    plans = (plan for variant in variants for plan in _fleets(machine, variant, wish))
    return sorted(plans, key=lambda plan: (-plan.worth, -len(plan.replicas)))


def _variants(machine: Machine, model: Model, wish: Wish) -> Iterator[_Variant]:
    asked = wish.quantization
    if asked in ONLINE_BITS and model.quantization is None:
        yield _Variant(model.quantized(asked), asked, reason=f"{asked}: asked for")
        return
    smaller = asked is None and model.quantization is None and not model.pooling
    yield _Variant(model, last=not smaller)
    if smaller:
        needed = f"its {memory.total_weight_bytes(model) / GIB:.1f} GiB of 16-bit weights leave too little room here"
        if all(gpu.compute_capability >= NATIVE_FP8 for gpu in machine.gpus):
            yield _Variant(model.quantized("fp8"), "fp8", reason=f"8-bit weights: {needed}", last=False)
        yield _Variant(model.quantized("bitsandbytes"), "bitsandbytes", reason=f"4-bit weights: {needed}")


def _offloading(machine: Machine, model: Model, wish: Wish) -> Iterator[_Variant]:
    if wish.quantization == "none" or model.pooling:
        return
    online = wish.quantization if wish.quantization in ONLINE_BITS and model.quantization is None else None
    loaded = model.quantized(online) if online else model
    for gib in (2, 4, 8, 16, 32, 64):
        # what half of the host's memory and half of the weights allow
        if gib * GIB * len(machine.gpus) <= min(machine.memory_free / 2, memory.total_weight_bytes(model) / 2):
            reason = f"{gib} GiB of weights a GPU stay in host memory, which is slow: they fit no other way"
            yield _Variant(loaded, online, gib * GIB, reason)


def _sizes(gpu: Gpu, variant: _Variant, wish: Wish) -> list[Settings]:
    """What vLLM can be told on such a GPU, its own choice first."""
    model, found = variant.model, []
    for own in [*Settings.choices(gpu), *([memory.TIGHT] if variant.last else [])]:
        batched = wish.max_batched_tokens or own.max_batched_tokens
        batches = [batched]
        if model.whole_prompts:  # a step takes all of one; where memory is short, of shorter ones than the model allows
            longest = max(batched, wish.context or model.max_length)
            least = wish.context or min(model.max_length, SHORTEST)
            batches = [longest >> power for power in range(longest.bit_length()) if longest >> power >= least]
        kv_bytes = 1 if wish.kv_cache == "fp8" else 2
        found += [Settings(wish.max_num_seqs or own.max_num_seqs, one, kv_bytes, variant.offload) for one in batches]
    return list(dict.fromkeys(found))


def _classes(machine: Machine) -> list[list[Gpu]]:
    """GPUs that can share a replica: of one name and size. A MIG slice works alone."""
    found: dict[tuple[object, ...], list[Gpu]] = {}
    for gpu in machine.gpus:
        found.setdefault((*gpu.size, gpu.mig), []).append(gpu)
    return list(found.values())


def _groups(machine: Machine, gpus: list[Gpu], tp: int, pp: int) -> list[tuple[tuple[Gpu, ...], Link | None]]:
    """The GPUs in groups for a replica each, best linked first; among equals those with more free memory. A group is in
    the order of vLLM's ranks, one stage after the other, with the slowest path inside a stage: tensor parallelism works
    over it. Where a stage is one GPU, it is the slowest path between stages."""
    size = tp * pp
    if size == 1:
        return [((gpu,), None) for gpu in gpus]
    if len(hosts := machine.by_host(gpus)) > 1:
        return [group for one in hosts for group in _groups(machine, one, tp, pp)]
    links = {(a, b): machine.link(a, b) for a, b in combinations(sorted(gpu.index for gpu in gpus), 2)}
    kinds = {(LINK_ORDER.index(link.kind), -link.gb_s): link for link in links.values()}
    paths = [kinds[kind] for kind in sorted(kinds)]  # the best first; a place in it is a path's grade
    grades = {pair: sorted(kinds).index((LINK_ORDER.index(link.kind), -link.gb_s)) for pair, link in links.items()}

    def slowest(group: tuple[int, ...]) -> int:
        return max(grades[pair] for pair in combinations(group, 2))

    @cache
    def ordered(group: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The grade of the slowest path inside a stage, and the order that makes it the best; of equal ones that of the
        numbers."""
        if tp == 1 or len(group) <= tp:
            return slowest(group), group
        found = []
        for others in combinations(group[1:], tp - 1):
            stage = (group[0], *others)
            grade, rest = ordered(tuple(index for index in group if index not in stage))
            found.append((max(slowest(stage), grade), (*stage, *rest)))
        return min(found)

    by_index = {gpu.index: gpu for gpu in gpus}
    left = sorted(by_index, key=lambda index: (-by_index[index].free, index))
    if len(paths) == 1:
        # any grouping is as good
        chunks = (sorted(left[at : at + size]) for at in range(0, len(left) - size + 1, size))
        return [(tuple(by_index[index] for index in chunk), paths[0]) for chunk in chunks]

    def key(group: tuple[int, ...]) -> tuple[int, int, int, tuple[int, ...]]:
        grade, _ = ordered(group)
        return grade, grade if pp == 1 else slowest(group), -min(by_index[index].free for index in group), group

    groups: list[tuple[tuple[Gpu, ...], Link | None]] = []
    while len(left) >= size:
        grade, order = ordered(min(combinations(sorted(left), size), key=key))
        groups.append((tuple(by_index[index] for index in order), paths[grade]))
        left = [index for index in left if index not in order]
    return groups


def fewest_first(machine: Machine) -> Iterator[list[int]]:
    """Groups of GPUs for one replica that leave some for another model: few before many, small before large, and those
    before others that are less well linked or at the end."""
    small = sorted(_classes(machine), key=lambda gpus: gpus[0].total)
    for count, gpus in product(range(1, len(machine.gpus)), small):
        if count == 1 or not gpus[0].mig:
            yield from ([gpu.index for gpu in group] for group, _ in reversed(_groups(machine, gpus, count, 1)))


def _most(machine: Machine, gpus: list[Gpu]) -> int:
    """How many of a class of GPUs can share a replica: those of one host."""
    return 1 if gpus[0].mig else max(len(one) for one in machine.by_host(gpus))


def _layouts(machine: Machine, gpus: list[Gpu], model: Model, wish: Wish) -> Iterator[tuple[int, int]]:
    """(tp, pp) that the model and the number of GPUs allow."""
    most = _most(machine, gpus)
    for tp in model.tp_sizes(most):
        for pp in range(1, min(most // tp, model.layers) + 1):
            if wish.tp in (None, tp) and wish.pp in (None, pp) and not (pp > 1 and _one_stage(model)):
                yield tp, pp


def _options(machine: Machine, gpus: list[Gpu], variant: _Variant, wish: Wish) -> list[list[Replica]]:
    """All fleets of one class of GPUs: each layout with each of vLLM's settings, over all GPUs that hold it, and
    without those that have less free memory than others."""
    model = variant.model
    needed = wish.context or min(model.max_length, SHORTEST)
    options = []
    for (tp, pp), settings in product(_layouts(machine, gpus, model, wish), _sizes(gpus[0], variant, wish)):
        able = [gpu for gpu in gpus if memory.holds(model, gpu, tp, pp, needed, settings)]
        for least in sorted({gpu.free // GIB for gpu in able}):
            replicas = []
            for group, link in _groups(machine, [gpu for gpu in able if gpu.free // GIB >= least], tp, pp):
                tightest = min(group, key=lambda gpu: gpu.free)
                length = wish.context or memory.longest(model, tightest, tp, pp, settings)
                account = memory.account(model, tightest, tp, pp, length, settings)
                figures = speed.estimate(model, tightest, link, tp, pp, account, settings)
                replicas.append(Replica(group, tp, pp, link, settings, length, account, figures))
            options += [replicas[:count] for count in range(1, len(replicas) + 1) if wish.replicas]
            options += [replicas] if replicas and not wish.replicas else []
    return options


def _fleets(machine: Machine, variant: _Variant, wish: Wish) -> Iterator[Plan]:
    """All fleets over all classes of GPUs; a class may stay idle where another is in use."""
    per_class = [[[], *_options(machine, gpus, variant, wish)] for gpus in _classes(machine)]
    for chosen in product(*per_class):
        replicas = tuple(replica for option in chosen for replica in option)
        if replicas and len(replicas) == (wish.replicas or len(replicas)):
            reasons = (variant.reason,) if variant.reason else ()
            yield Plan(variant.model, wish, variant.quantization, replicas, reasons=reasons)


def _finished(machine: Machine, plan: Plan) -> Plan:
    """The plan with accounts for the length that all replicas have in common, the route's weights and the idle GPUs."""
    weights = route_weights([replica.speed.tokens_per_s for replica in plan.replicas])
    final = []
    for one, weight in zip(plan.replicas, weights, strict=True):
        tightest = min(one.gpus, key=lambda gpu: gpu.free)
        account = memory.account(plan.model, tightest, one.tp, one.pp, plan.max_length, one.settings)
        final.append(replace(one, account=account, weight=weight))
    used = {gpu.index for replica in plan.replicas for gpu in replica.gpus}
    idle = tuple((gpu, _why_idle(gpu, plan)) for gpu in machine.gpus if gpu.index not in used)
    return replace(plan, replicas=tuple(final), idle=idle)


def route_weights(rates: list[float]) -> list[int]:
    """Small whole numbers in the ratio of the replicas' speeds, to a tenth."""
    slowest = min(rates)
    tenths = [max(1, round(10 * rate / slowest)) for rate in rates]
    divisor = gcd(*tenths)
    return [tenth // divisor for tenth in tenths]


def _why_idle(gpu: Gpu, plan: Plan) -> str:
    first, wish, model = plan.replicas[0], plan.wish, plan.model
    if reason := _too_old(gpu, model):
        return reason
    needed = wish.context or min(model.max_length, SHORTEST)
    if not memory.holds(model, gpu, first.tp, first.pp, needed, first.settings):
        programs = f", {', '.join(gpu.programs)} runs there" if gpu.programs else ""
        return f"{gpu.free / GIB:.1f} GiB free are too few{programs}"
    if wish.replicas:
        return f"{wish.replicas} replicas were asked for"
    if first.tp * first.pp > 1:
        return f"no {first.tp * first.pp} GPUs of its kind are left for another replica"
    return "the others are faster without it" if wish.goal == "latency" else "it would shorten the longest request"


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
    length = wish.context or min(model.max_length, SHORTEST)
    shortfalls = []
    for gpus in _classes(machine):
        settings = _sizes(gpus[0], _Variant(loaded), wish)[-1]
        for tp, pp in _layouts(machine, gpus, loaded, wish):
            widest = sorted(gpus, key=lambda gpu: gpu.free)[-tp * pp]
            account = memory.account(loaded, widest, tp, pp, length, settings)
            layers = ceil(loaded.layers / pp)
            one = memory.MARGIN * memory.request_bytes(loaded, tp, layers, length, settings, pp)
            shortfalls.append((one - account.kv, tp, pp))
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
    if wish.kv_cache != "fp8" and all(gpu.compute_capability >= NATIVE_FP8 for gpu in machine.gpus):
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
        alike = [gpu for gpu in machine.gpus if gpu.size == largest.size and not gpu.mig]
        have, several = _most(machine, alike), len(machine.by_host(machine.gpus)) > 1
        for count in (2, 3, 4, 6, 8, 16):
            if count > have:
                clones = (largest.model_copy(update={"index": n, "free": largest.total}) for n in range(count))
                yield (
                    f"{count} × {largest.name} {'in one host ' if several else ''}instead of {have}",
                    machine.one_host(tuple(clones)),
                    wish,
                )


def _choose_cpu(machine: Machine, model: Model, wish: Wish) -> Plan:
    """Replicas on the CPU: as many as were asked for, or two where memory and cores allow, so that one can be replaced
    while the other serves."""
    if wish.quantization in ONLINE_BITS and wish.quantization != (model.quantization and model.quantization.method):
        raise Problem(f"--quantization {wish.quantization}: there is no GPU here to quantize on", "leave it out")
    if wish.kv_cache == "fp8":
        raise Problem("--kv-cache fp8: there is no GPU here", "leave it out")
    tp = wish.tp or 1
    settings = Settings(wish.max_num_seqs or 32, wish.max_batched_tokens or 2048, eager=True)
    length = wish.context or min(model.max_length, 2 * SHORTEST)
    # vLLM takes the size for each worker
    one = memory.request_bytes(model, tp, model.layers, length, settings)
    kv = ceil(max(GIB / tp, one) / CPU_KV_STEP) * CPU_KV_STEP
    weights = tp * memory.weight_bytes(model, tp, 1, 0)
    needed = weights + tp * kv + CPU_PROCESS + (tp - 1) * CPU_WORKER
    room = int(machine.memory_free * CPU_SHARE)
    count = wish.replicas or max(1, min(2, room // needed, machine.cpu_cores // tp))
    if count * needed > room:
        raise DoesNotFitError(
            f"{model.name} does not fit: {count} × {needed / GIB:.1f} GiB are {(count * needed - room) / GIB:.1f} GiB "
            f"more than the {room / GIB:.1f} GiB of memory that are free",
            f"take --replicas {room // needed}" if needed <= room else "take a smaller model, or stop other programs",
        )
    requests = kv / one if one else settings.max_num_seqs
    tokens = int(requests * length) if one else 0
    account = Account(needed, 1.0, weights, 0, 0, needed - weights - tp * kv, 0, kv, tokens, requests)
    # one core streams weights from memory at about 10 GB/s
    token = weights / (min(machine.cpu_cores, 8) / count * 10e9) + 0.02
    figures = Speed(first_token=speed.PROMPT * token / 8, token=token, tokens_per_s=4 / token)
    replicas = tuple(Replica((), tp, 1, None, settings, length, account, figures) for _ in range(count))
    return Plan(model, wish, None, replicas, (), ("no GPU here: vLLM runs on the CPU",))
