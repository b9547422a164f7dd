"""How vLLM spends a GPU's memory, and what is left for the KV cache.

The account is vLLM's own (`determine_available_memory` in vllm/v1/worker/gpu_worker.py, 0.32):

    KV cache = utilization x total - weights - peak activations - what is not torch's - CUDA graphs

Sizes are bytes a GPU, lengths are tokens. The constants were fitted on two H200 (`REPORTED` in
tests/unit/test_plan.py); docs/benchmarks/gpu.md holds them against other models on four."""

from dataclasses import dataclass
from math import ceil, floor

from planner.machine import GIB, Gpu
from planner.model import Model
from planner.quantization import MXFP4_METHODS

BLOCK = 16  # tokens; vLLM's KV block
DEFAULT_UTILIZATION = 0.92  # vLLM's own default
# KV cache that a request of full length has to leave free, as vLLM refuses to start with less than the request takes:
# the predictions are trusted to 5 %.
MARGIN = 1.05
NOT_TORCH = 256 << 20  # attention workspaces and the like, inside what vLLM asks for
# The first start compiles, which peaks above a small model's activations and is freed before CUDA graphs are captured:
# seen on a 4090 with Qwen3-8B (1.18 GiB cold, 0.19 warm) and on a laptop's 8 GB with Qwen2.5-1.5B.
COMPILING = round(1.1 * GIB)
# Patches that a vision tower sees while vLLM measures (`profile_run` in vllm/v1/worker/gpu/model_runner.py): pictures
# that fill a step, in Gemma 3 16 patches a token; one of the largest size where that is more. An estimate.
PATCHES_A_TOKEN = 16
# What a replica takes besides what it asks for: CUDA context, library handles; with several GPUs NCCL's buffers too.
CONTEXT, CONTEXT_NCCL = 900 << 20, 1800 << 20


@dataclass(frozen=True)
class Settings:
    """What the planner hands to vLLM besides the layout."""

    max_num_seqs: int
    max_batched_tokens: int
    kv_bytes: int = 2  # a number in the KV cache: 1 for fp8
    offload: int = 0  # bytes of weights a GPU keeps in host memory
    eager: bool = False

    @staticmethod
    def choices(gpu: Gpu) -> list["Settings"]:
        """vLLM's own choice for an API server on such a GPU (`get_batch_defaults` in vllm/engine/arg_utils.py), and
        after it those for smaller GPUs, which leave more for the KV cache."""
        found = [Settings(256, 2048)]
        if gpu.total >= 70 * GIB and "a100" not in gpu.name.lower():
            found.insert(0, Settings(1024, 8192))
        if gpu.total >= 160 * GIB:
            found.insert(0, Settings(1024, 16384))
        return found

    @staticmethod
    def default(gpu: Gpu) -> "Settings":
        """vLLM's own choice."""
        return Settings.choices(gpu)[0]


# For a model that nearly fills its GPU: few CUDA graphs, and short steps.
TIGHT = Settings(64, 1024)


@dataclass(frozen=True)
class Account:
    """One GPU's memory, in bytes; the tightest GPU of the replica."""

    total: int
    utilization: float
    weights: int
    activations: int
    graphs: int
    other: int  # not torch's
    outside: int  # CUDA context, NCCL: not counted by vLLM
    kv: int  # what is left; negative where it does not fit
    kv_tokens: int
    max_requests: float  # of full length at once

    @property
    def used(self) -> int:
        """What the replica takes once it serves."""
        return self.weights + self.activations + self.graphs + self.other + self.outside + max(0, self.kv)


def outside(tp: int, pp: int) -> int:
    """What a GPU needs besides what vLLM asks for: CUDA's context and the libraries of several GPUs."""
    return CONTEXT_NCCL if tp * pp > 1 else CONTEXT


def utilization(gpu: Gpu, needed_outside: int) -> float:
    """`--gpu-memory-utilization`, in hundredths: vLLM's default, or less where other programs or a small GPU leave
    less: vLLM refuses to start where utilization x total is more than what is free."""
    return max(0.0, min(DEFAULT_UTILIZATION, floor(100 * (gpu.free - needed_outside) / gpu.total) / 100))


def stage_layers(layers: int, pp: int) -> list[int]:
    """Layers of each pipeline stage: what does not divide goes to the later stages but the last, which has the head
    (`get_pp_indices` in vllm/distributed/utils.py)."""
    stages = [layers // pp] * pp
    for position in range(2, layers % pp + 2):
        stages[-position] += 1
    return stages


def weight_bytes(model: Model, tp: int, pp: int, stage: int) -> int:
    """Weights that one GPU of a stage holds.

    vLLM splits all linear layers by rows and columns, the experts too, the embedding and head by vocabulary (padded to
    64). Each GPU keeps whole the norms, a router, MLA's down-projections, and its KV heads where there are fewer of
    them than GPUs. A draft model lies beside it, split as it is; there is one stage then.
    """
    weights, attention, found, width = model.weights, model.attention, model.quantization, model.bits / 8
    experts, rest = weights.experts * width, (weights.split - weights.experts) * width
    if found and found.experts_only:
        experts *= _mxfp4_padding(model, tp) if found.method in MXFP4_METHODS else 1.0
        rest = 2 * (weights.split - weights.experts)
    per_gpu = rest / tp + 2 * weights.replicated
    if attention.kv_heads and tp > attention.kv_heads:
        copies = tp / attention.kv_heads - 1
        per_gpu += width * 2 * model.hidden * attention.kv_heads * attention.head_dim * copies / tp
    stages = stage_layers(model.layers, pp)
    # the first layers may have no experts, so the others have more than the average
    routing = stages[stage] - max(0, min(weights.plain - sum(stages[:stage]), stages[stage]))
    bytes_ = per_gpu * stages[stage] + experts / tp * routing * model.layers / (model.layers - weights.plain)
    padded = ceil(model.vocabulary / 64) / (model.vocabulary / 64)
    if stage == 0:
        bytes_ += 2 * (weights.embedding + weights.look_up) * padded / tp
    if stage == pp - 1 and (weights.head or pp > 1) and not model.pooling:
        bytes_ += 2 * (weights.head or weights.embedding) * padded / tp
    share = model.tower.share(tp) if model.tower else 1.0
    if model.file_bytes and found is None:
        # files say more than the language model's shape where there is a tower
        bytes_ += max(0, model.file_bytes - 2 * model.parameters) * share
    elif model.tower:
        bytes_ += 2 * model.tower.parameters * share
    return round(bytes_) + (weight_bytes(model.draft, tp, 1, 0) if model.draft else 0)


def _mxfp4_padding(model: Model, tp: int) -> float:
    """What MXFP4's kernels make of one: an expert's width on a GPU is rounded up to 128, the hidden size to 256
    (`mxfp4_round_up_hidden_size_and_intermediate_size` in vllm/model_executor/layers/fused_moe/oracle/mxfp4.py)."""
    width = model.mlp.width / tp
    return ceil(width / 128) * 128 / width * ceil(model.hidden / 256) * 256 / model.hidden


def total_weight_bytes(model: Model) -> int:
    """Weights of the model on one GPU."""
    return weight_bytes(model, 1, 1, 0)


def kv_bytes_per_token(model: Model, tp: int, layers: int, kv_bytes: int = 2) -> int:
    """What one GPU keeps for one token in `layers` layers as long as they see it, and in those of a draft model."""
    draft = kv_bytes_per_token(model.draft, tp, model.draft.layers, kv_bytes) if model.draft else 0
    kept = sum(one.layers * one.token_bytes(tp, kv_bytes) for one in model.attention.cached)
    return kept * layers // model.layers + draft


def request_bytes(model: Model, tp: int, layers: int, length: int, settings: Settings, pp: int = 1) -> int:
    """What one GPU keeps for one request of `length` tokens, on a stage of `layers` layers.

    vLLM hands out blocks of a whole group of layers, and pads the last group of a kind to the size of the others
    (`_get_kv_cache_groups_uniform_page_size` in vllm/v1/core/kv_cache_utils.py). A group with a window keeps its window
    and the tokens of the steps that are under way: of each stage one, and one more that is scheduled already
    (`SlidingWindowSpec.max_admission_blocks_per_request` in vllm/v1/kv_cache_interface.py, `max_in_flight_tokens` in
    vllm/config/vllm.py)."""
    draft = request_bytes(model.draft, tp, model.draft.layers, length, settings) if model.draft else 0
    cached = model.attention.cached
    if not cached:
        return draft
    under_way = settings.max_batched_tokens * (pp if model.pooling else pp + 1)
    if any(one.row for one in cached):
        # blocks of different sizes are packed
        kept = 0
        for one in cached:
            tokens = min(one.window - 1 + under_way, length) if one.window else length
            row = one.row or one.token_bytes(tp, settings.kv_bytes)
            kept += one.layers * row * ceil(ceil(tokens / one.ratio) / BLOCK) * BLOCK
        return kept * layers // model.layers + draft
    fewest, most = min(one.layers for one in cached), max(one.layers for one in cached)
    group = most if most < 1.5 * fewest else fewest
    token = max(one.token_bytes(tp, settings.kv_bytes) for one in cached)
    # a page of attention is made so large that a state fits into it (`_align_hybrid_block_size` in
    # vllm/platforms/interface.py); where nothing else is kept a page is a state
    state = max(ceil(one.state / tp) for one in cached)
    least = 128 if state and model.attention.latent else BLOCK
    page = ceil(state / (token * least)) * token * least if state and token else state or token * BLOCK
    blocks = 0
    for one in cached:
        if one.state:
            kept = one.states
        else:
            # a kind with smaller pages has as many more tokens in a block, where these come out even
            times, rest = divmod(page, one.token_bytes(tp, settings.kv_bytes) * BLOCK)
            block = BLOCK * (1 if rest else times)
            kept = ceil(min(one.window - 1 + under_way, length) / block) + 1 if one.window else ceil(length / block)
        blocks += ceil(one.layers / group) * kept
    here = -(-group * layers // model.layers)  # of a group's layers, rounded up
    return page * here * blocks + draft


def activation_bytes(model: Model, tp: int, last_stage: bool, settings: Settings) -> int:
    """Peak of one step at full batch: the widest layer, or on the last stage the sampler over the vocabulary. A sampled
    row takes 4 bytes a word, 6 where tp gathers the logits: measured.

    Experts have room of their own that stays (`WorkspaceManager` in vllm/v1/worker/workspace.py): every token once for
    each expert that it uses, as it enters or leaves the first matrices and again the last
    (`TritonExperts.workspace_shapes` in vllm/model_executor/layers/fused_moe/experts/triton_moe.py; the other kernels
    want about as much). MXFP4's make theirs as they go."""
    attention, mlp, found = model.attention, model.mlp, model.quantization
    heads = (
        attention.heads * max(attention.head_dim, attention.latent // 8) + 2 * attention.kv_heads * attention.head_dim
    )
    plain, room = mlp.plain_width, 0.0
    if found and found.method in MXFP4_METHODS:
        plain += mlp.used * mlp.width
    else:
        entering, leaving = max(2 * mlp.width / tp, model.hidden), max(mlp.width / tp, model.hidden)
        room = 2 * settings.max_batched_tokens * mlp.used * (entering + leaving)
    forward = 2 * settings.max_batched_tokens * (6 * model.hidden + max(3 * plain, 2 * heads) / tp)
    if model.tower:
        # vLLM lets the tower see a full step of pictures first, and keeps what comes out while the model computes
        patches = max(model.tower.patches, PATCHES_A_TOKEN * settings.max_batched_tokens)
        forward = max(forward, 2 * patches * model.tower.width) + 2 * patches // 4 * model.hidden
    if not model.pooling and last_stage:
        forward = max(forward, settings.max_num_seqs * model.vocabulary * (4 if tp == 1 else 6))
    return round(forward + room)


def graph_bytes(model: Model, layers: int, settings: Settings) -> int:
    """CUDA graphs of up to 51 batch sizes, captured twice, of pooling models once: mostly per layer and size. vLLM
    measures them before it lays out the KV cache (`profile_cudagraph_memory` in vllm/v1/worker/gpu/cudagraph_utils.py).
    """
    if settings.eager:
        return 0
    sizes = min(51, 3 + settings.max_num_seqs // 6)
    layers += model.draft.layers if model.draft else 0
    return round(layers * sizes * (0.25 if model.pooling else 0.5) * (1 << 20))


def account(model: Model, gpu: Gpu, tp: int, pp: int, length: int, settings: Settings) -> Account:
    """The tightest GPU of a replica of tp x pp GPUs like `gpu`, for requests of up to `length` tokens."""
    needed_outside = outside(tp, pp)
    share = utilization(gpu, needed_outside)
    requested = ceil(gpu.total * share)
    accounts = []
    for stage, layers in enumerate(stage_layers(model.layers, pp)):
        weights = max(0, weight_bytes(model, tp, pp, stage) - settings.offload)
        activations = activation_bytes(model, tp, stage == pp - 1, settings)
        graphs = graph_bytes(model, layers, settings)
        if not settings.eager:
            activations = max(activations, COMPILING - graphs)
        kv = requested - weights - activations - graphs - NOT_TORCH
        one = request_bytes(model, tp, layers, length, settings, pp)
        requests = max(0.0, kv / one) if one else float(settings.max_num_seqs if kv > 0 else 0)
        if any(kind.window or kind.state or kind.row for kind in model.attention.cached):
            tokens = floor(requests * length)
        else:
            per_token = kv_bytes_per_token(model, tp, layers, settings.kv_bytes)
            tokens = max(0, kv) // (per_token * BLOCK) * BLOCK if per_token else 0
        parts = (weights, activations, graphs, NOT_TORCH, needed_outside, kv, tokens, requests)
        accounts.append(Account(gpu.total, share, *parts))
    return min(accounts, key=lambda one: (one.kv_tokens, one.kv))


def holds(model: Model, gpu: Gpu, tp: int, pp: int, length: int, settings: Settings) -> bool:
    """Whether a replica takes a request of `length` tokens, even where the account errs by MARGIN."""
    return account(model, gpu, tp, pp, length, settings).max_requests >= MARGIN


def longest(model: Model, gpu: Gpu, tp: int, pp: int, settings: Settings) -> int:
    """The longest request that fits, in tokens: the model's own limit, or as many thousands as one request can have."""
    most = min(model.max_length, settings.max_batched_tokens) if model.whole_prompts else model.max_length
    if holds(model, gpu, tp, pp, most, settings):
        return most
    low, high = 0, most // 1024
    while low < high:
        middle = (low + high + 1) // 2
        if holds(model, gpu, tp, pp, middle * 1024, settings):
            low = middle
        else:
            high = middle - 1
    return low * 1024
