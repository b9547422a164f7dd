"""A model as the planner sees it: its weights, and what it keeps of a request.

Lengths are tokens, widths and ranks are numbers, weights are counted in parameters."""

from dataclasses import dataclass, replace

from planner.pooling import Pooling
from planner.quantization import NF4, Quantization

# Bits a weight with its scales, of the methods that vLLM can apply to an unquantized checkpoint while it loads.
ONLINE_BITS = {"fp8": 8.0, "bitsandbytes": NF4}


@dataclass(frozen=True)
class Cached:
    """Layers that keep the same of a request: a key and a value of each KV head, with MLA one latent vector, or a state
    that no token adds to."""

    layers: int
    kv_heads: int
    head_dim: int
    latent: int = 0  # kv_lora_rank + qk_rope_head_dim
    window: int = 0  # how far they see; 0: all of it
    state: int = 0  # bytes for a request, which tp splits
    # how often it keeps its state: as it is, as it was for the prefix cache, and with Mamba 2 once more from within a
    # step (`MambaSpec.max_memory_usage_bytes` in vllm/v1/kv_cache_interface.py, mamba_cache_mode "align")
    states: int = 2
    row: int = 0  # bytes for each `ratio` tokens whatever the KV cache's numbers, whole on each GPU
    ratio: int = 1

    def token_bytes(self, tp: int, kv_bytes: int) -> int:
        """What one of `tp` GPUs keeps of one token in one such layer, at `kv_bytes` a number: of its share of the KV
        heads, at least one; of a latent vector all."""
        if self.state or self.row:
            return self.row // self.ratio
        if self.latent:
            return self.latent * kv_bytes
        return 2 * max(1, -(-self.kv_heads // tp)) * self.head_dim * kv_bytes


@dataclass(frozen=True)
class Attention:
    """The heads of most layers, and what each kind of layer keeps. `kv_heads` is 0 with MLA, where one latent vector
    serves all heads; `cached` is empty where nothing is kept."""

    heads: int
    kv_heads: int
    head_dim: int
    cached: tuple[Cached, ...]

    @property
    def latent(self) -> int:
        """Numbers of a layer's latent vector, 0 without one."""
        return max((one.latent for one in self.cached), default=0)

    @property
    def window(self) -> int:
        """How far the layers with a window see, 0 where there are none."""
        return max((one.window for one in self.cached), default=0)

    @property
    def sliding_layers(self) -> int:
        """Layers with a window."""
        return sum(one.layers for one in self.cached if one.window)


@dataclass(frozen=True)
class Mlp:
    """The widths of the MLPs."""

    width: int  # of one MLP or one expert, which tp has to divide
    plain_width: int  # of the widest that is no routed expert: a dense one, or all shared experts
    used: int = 0  # routed experts that one token goes through


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, by how vLLM spreads them over the GPUs of a replica."""

    embedding: int  # vocabulary × hidden, split by tp; on the first stage
    head: int  # the same again where it is not tied; on the last stage
    split: int  # of one average layer, split by tp
    replicated: int  # of one average layer, whole on each GPU
    experts: int = 0  # the part of `split` that are routed experts
    active_share: float = 1.0  # of the experts, the share that one token uses
    plain: int = 0  # first layers that have no experts
    look_up: int = 0  # embeddings for each layer, never quantized, split by tp; on the first stage

    def layer(self) -> int:
        """Parameters of one average layer."""
        return self.split + self.replicated


@dataclass(frozen=True)
class Tower:
    """What sees and hears beside the language model."""

    parameters: int
    width: int  # numbers that it keeps of one patch of a picture while it computes
    patches: int  # of its largest picture
    whole: int  # parameters that each GPU holds; tp splits the others

    def share(self, tp: int) -> float:
        """Of it, what one of `tp` GPUs holds."""
        return (self.whole + (self.parameters - self.whole) / tp) / self.parameters


@dataclass(frozen=True)
class Model:
    """A model's shape."""

    name: str
    kind: str  # the config's model_type
    layers: int
    hidden: int
    vocabulary: int
    max_length: int
    attention: Attention
    mlp: Mlp
    weights: Weights
    quantization: Quantization | None = None
    pooling: Pooling | None = None  # gives vectors or scores instead of text
    tower: Tower | None = None
    file_bytes: int | None = None  # of the weights as vLLM loads them, where the files are at hand
    longrope: bool = False  # vLLM takes the length before this scaling unless it is told another
    uneven: bool = False  # its layers differ too much for pipeline stages to be alike
    draft: "Model | None" = None  # the model or head that guesses its next tokens, on the same GPUs
    own_code: bool = False  # Python files beside its config describe it; vLLM has its own description of most
    unread: tuple[str, ...] = ()  # keys of its config that may change sizes and were not read

    @property
    def bits(self) -> float:
        """Of a weight of what is quantized, with its scales; 16 where nothing is."""
        return (self.quantization and self.quantization.bits) or 16.0

    @property
    def whole_prompts(self) -> bool:
        """Prompts are not cut into pieces: a step has to take the longest."""
        return bool(self.pooling and self.pooling.whole_prompts)

    @property
    def parameters(self) -> int:
        """Those of the language model, tied embeddings once."""
        weights = self.weights
        return weights.embedding + weights.look_up + weights.head + self.layers * weights.layer()

    @property
    def all_parameters(self) -> int:
        """With those of its towers."""
        return self.parameters + (self.tower.parameters if self.tower else 0)

    @property
    def active_parameters(self) -> float:
        """Those that one token is multiplied with: the embedding is a look-up, an unused expert rests."""
        idle = self.weights.experts * (1 - self.weights.active_share)
        return max(self.weights.head, self.weights.embedding) + self.layers * (self.weights.layer() - idle)

    def tp_sizes(self, limit: int) -> list[int]:
        """Tensor-parallel sizes up to `limit` that vLLM takes: dividing the heads and the MLP width, and either
        dividing the KV heads or a multiple of them, each then held by several GPUs."""
        kv, group = self.attention.kv_heads, self.quantization.group if self.quantization else 0
        return [
            tp
            for tp in range(1, limit + 1)
            if not self.attention.heads % tp
            and not self.mlp.width % tp
            and not (kv and kv % tp and tp % kv)
            and not any(one.state and one.kv_heads % tp for one in self.attention.cached)
            and not (group and (self.mlp.width // tp) % group)
            and (not self.draft or tp in self.draft.tp_sizes(tp))
        ]

    def quantized(self, method: str) -> "Model":
        """The same model with its linear layers quantized while loading, by vLLM's name of the method."""
        return replace(self, quantization=Quantization(method, ONLINE_BITS[method], online=True), file_bytes=None)
