"""How fast a layout would be: a roofline over memory bandwidth, arithmetic and the links, enough to rank layouts.

Times in seconds. The constants were fitted on two H200; elsewhere they only have to keep the order, as they do on four
(docs/benchmarks/gpu.md)."""

from dataclasses import dataclass, replace

from planner.machine import Gpu, Link
from planner.memory import Account, Settings, kv_bytes_per_token, total_weight_bytes
from planner.model import Model

PROMPT, ANSWER = 512, 128  # the request that plans are compared by, in tokens
CONCURRENT = 128  # requests at once for each GPU, at most

BANDWIDTH_SHARE = 0.8  # of the hardware's figure that decoding reaches
FLOPS_SHARE = 0.55  # of the hardware's figure that prefill reaches
LAYER_OVERHEAD = 3e-6  # launches of one layer, through CUDA graphs
STEP_OVERHEAD = 0.8e-3  # scheduler and sampler, once a step
# Seconds that a collective takes however small, and the share of the path's speed that it reaches.
ALL_REDUCE = {
    "nvlink": (16e-6, 0.16),
    "pix": (40e-6, 0.6),
    "pxb": (45e-6, 0.6),
    "phb": (50e-6, 0.6),
    "node": (60e-6, 0.6),
    "sys": (80e-6, 0.6),
}
PIPELINE_SHARE = 0.78  # of the time that a stage is busy: the others wait for it to hand on
HOP = 50e-6  # handing a step to the next stage
SERVER_TOKENS_S = 13_000  # what one API server process streams out, whatever its GPUs could do
OFFLOAD_GB_S = 20.0  # weights streamed from host memory, at best


@dataclass(frozen=True)
class Speed:
    """One replica's figures with the reference request."""

    first_token: float  # alone on the replica
    token: float  # time between tokens, alone
    tokens_per_s: float  # answers of as many requests as fit, up to CONCURRENT

    @property
    def latency(self) -> float:
        """One whole request, alone."""
        return self.first_token + ANSWER * self.token


def estimate(
    model: Model, gpu: Gpu, link: Link | None, tp: int, pp: int, account: Account, settings: Settings
) -> Speed:
    """Figures of a replica of tp × pp GPUs like `gpu`, where tensor parallelism works over paths no slower than
    `link` (None for a single GPU)."""
    bandwidth = gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE
    flops = gpu.bf16_tflops * 1e12 * FLOPS_SHARE
    # Quantizing while loading is taken to save memory alone: 4 bits ran at 0.6 to 0.8 of 16 bits' speed when measured.
    online = model.quantization and model.quantization.online
    weights = total_weight_bytes(replace(model, quantization=None) if online else model)
    expert_share = model.weights.experts / model.weights.layer()
    kv_token = kv_bytes_per_token(model, tp, model.layers, settings.kv_bytes)
    request = PROMPT + ANSWER

    def collectives(tokens: float) -> float:
        if tp == 1 or link is None:
            return 0.0
        moved = 2 * model.hidden * tokens * 2 * (tp - 1) / tp
        delay, share = ALL_REDUCE[link.kind]
        return 2 * model.layers * (delay + moved / (link.gb_s * 1e9 * share))

    def step(batch: float) -> float:
        """One token for each of `batch` requests, through all stages one after the other."""
        touched = 1 - float((1 - model.weights.active_share) ** batch)
        read = weights * (1 - expert_share * (1 - touched)) / tp + batch * (PROMPT + ANSWER / 2) * kv_token
        arithmetic = 2 * model.active_parameters * batch / tp / flops
        offloaded = settings.offload * pp / (OFFLOAD_GB_S * 1e9)
        overhead = STEP_OVERHEAD + model.layers * LAYER_OVERHEAD + (pp - 1) * HOP
        return max(read / bandwidth, arithmetic) + collectives(batch) + overhead + offloaded

    def prefill(tokens: float) -> float:
        arithmetic = 2 * model.active_parameters * tokens / tp / flops
        return max(arithmetic, step(1)) + collectives(tokens) - collectives(1)

    def rate(batch: float) -> float:
        """Tokens a second with `batch` requests at once. A pipeline's stages work on different parts of the batch."""
        part = batch / pp
        busy = part * prefill(PROMPT) + ANSWER * step(part)
        return min(batch * ANSWER / busy * (PIPELINE_SHARE if pp > 1 else 1.0), SERVER_TOKENS_S)

    if model.pooling:
        return Speed(prefill(PROMPT), 0.0, PROMPT * pp / prefill(PROMPT) * (PIPELINE_SHARE if pp > 1 else 1.0))
    batch = min(float(CONCURRENT * tp * pp), settings.max_num_seqs, account.kv_tokens / request)
    return Speed(prefill(PROMPT), step(1), rate(batch) if batch > 0 else 0.0)
