"""A model as the planner sees it: what its config.json says about weights and KV cache."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from models.hub import fetch_config, fetch_further
from planner.pooling import Further, longest_prompt, read_pooling
from planner.quantization import MXFP4_METHODS, NF4, Quantization, read_quantization
from stack.console import Problem

DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
# Layers that keep a state instead of keys and values, which this arithmetic does not describe: how they are named, and
# how the keys begin that only such models have.
STATE_SPACE = ("mamba", "ssm", "rwkv", "linear_attention", "recurrent", "conv")
STATE_KEYS = ("mamba_", "ssm_", "hybrid_override_pattern", "linear_num_", "linear_attn_config", "conv_L_cache")
# What a config.json leaves to its class in transformers; those of Gemma 3 on the hub say little else.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2},
    "llama4_text": {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
    },
}
# Families that use the embedding as the head where their config does not say (class defaults of transformers).
TIED = ("gemma", "cohere", "gpt2", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "starcoder2", "smollm3", "ernie4_5")
# Families whose MLP has two matrices; all others gate theirs with a third.
UNGATED = (
    "gpt2",
    "gpt_neox",
    "gptj",
    "opt",
    "phi",
    "falcon",
    "starcoder2",
    "bloom",
    "mpt",
    "bert",
    "roberta",
    "xlm-roberta",
)
# Where configs state the longest input, and the kinds of RoPE scaling that it has in it already.
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
USED_EXPERTS = (
    "num_experts_per_tok",
    "experts_per_token",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope")
# Methods whose groups do not keep experts from being split further.
FINER = ("fp8", *MXFP4_METHODS)
NOT_A_MODEL = "give the folder or the hub's name of a language model"


@dataclass(frozen=True)
class Attention:
    """What one layer keeps for a token. `kv_heads` is 0 with MLA, where one latent vector serves all heads."""

    heads: int
    kv_heads: int
    head_dim: int
    latent: int = 0  # kv_lora_rank + qk_rope_head_dim


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, by how vLLM spreads them over the GPUs of a replica."""

    embedding: int  # vocabulary × hidden, split by tp; on the first stage
    head: int  # the same again where it is not tied; on the last stage
    split: int  # of one average layer, split by tp
    replicated: int  # of one average layer, whole on each GPU
    experts: int = 0  # the part of `split` that are routed experts
    active_share: float = 1.0  # of the experts, the share that one token uses

    def layer(self) -> int:
        """Parameters of one average layer."""
        return self.split + self.replicated


@dataclass(frozen=True)
class Model:
    """A model's shape. Lengths in tokens, widths in numbers, `bits` of a linear layer's weight."""

    name: str
    layers: int
    hidden: int
    intermediate: int  # widest MLP that one token goes through, summed over the experts it uses
    vocabulary: int
    attention: Attention
    weights: Weights
    max_length: int
    sliding_layers: int = 0
    window: int = 0
    checkpoint_dtype_bytes: int = 2
    bits: float = 16.0
    quantization: str | None = None  # the method of a checkpoint that is quantized already
    quantized_experts_only: bool = False
    group_size: int = 0
    disk_bytes: int | None = None  # of the weights, where the files are at hand
    kind: str = ""  # the config's model_type
    pooling: bool = False  # gives vectors or scores instead of text
    encoder: bool = False  # of these, one that keeps no KV cache
    whole_prompts: bool = False  # prompts are not cut into pieces: a step has to take the longest
    dense_intermediate: int = 0  # one MLP's or one expert's width, which tp has to divide
    quantized_online: bool = False  # while it loads, from 16 bits
    tower: int = 0  # parameters of a vision tower beside the language model
    tower_width: int = 0  # numbers that it keeps of one patch of a picture while it computes
    tower_patches: int = 0  # of its largest picture
    draft: "Model | None" = None  # the model or head that guesses its next tokens, on the same GPUs

    @property
    def parameters(self) -> int:
        """All of them, tied embeddings once."""
        return self.weights.embedding + self.weights.head + self.layers * self.weights.layer()

    @property
    def active_parameters(self) -> float:
        """Those that one token is multiplied with: the embedding is a look-up, an unused expert rests."""
        idle = self.weights.experts * (1 - self.weights.active_share)
        return max(self.weights.head, self.weights.embedding) + self.layers * (self.weights.layer() - idle)

    def tp_sizes(self, limit: int) -> list[int]:
        """Tensor-parallel sizes up to `limit` that vLLM takes: dividing the heads and the MLP width, and either
        dividing the KV heads or a multiple of them, each then held by several GPUs."""
        sizes = []
        for tp in range(1, limit + 1):
            kv = self.attention.kv_heads
            if self.attention.heads % tp or self.dense_intermediate % tp:
                continue
            if kv and kv % tp and tp % kv:
                continue
            if self.group_size and (self.dense_intermediate // tp) % self.group_size:
                continue
            if self.draft and tp not in self.draft.tp_sizes(tp):
                continue
            sizes.append(tp)
        return sizes

    def quantized(self, method: str) -> "Model":
        """The same model with its linear layers quantized while loading, by vLLM's name of the method."""
        return replace(self, bits=ONLINE_BITS[method], quantization=method, quantized_online=True, disk_bytes=None)


# Bits a weight with its scales, of the methods that vLLM can apply to an unquantized checkpoint while it loads.
ONLINE_BITS = {"fp8": 8.0, "bitsandbytes": NF4}


NO_FILES: dict[str, Mapping[str, Any]] = {}


def read_model(config: object, name: str, disk_bytes: int | None = None, further: Further = NO_FILES.get) -> Model:
    """The shape in a config.json. `further` gives another JSON file of the model, None where it has none.

    Raises Problem where its arithmetic is not known."""
    if not isinstance(config, Mapping):
        raise Problem(f"{name}: config.json is not an object", NOT_A_MODEL)
    text = config.get("text_config") or config.get("llm_config") or config
    if not isinstance(text, Mapping):
        raise Problem(f"{name}: text_config in config.json is not an object", NOT_A_MODEL)
    text = DEFAULTS.get(str(text.get("model_type")), {}) | {key: text[key] for key in text if text[key] is not None}
    try:
        _refuse_recurrent(text, name)
        return _read_shape(config, _Shape(text, name), disk_bytes, further)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # any of its values may be of another type than everybody's
        raise Problem(f"{name}: config.json is not one of a language model: {error}", NOT_A_MODEL) from error


def _refuse_recurrent(text: Mapping[str, Any], name: str) -> None:
    kinds = " ".join([str(text.get("model_type", "")), *map(str, text.get("layer_types") or [])]).lower()
    if any(word in kinds for word in STATE_SPACE) or any(str(key).startswith(STATE_KEYS) for key in text):
        raise Problem(
            f"{name} keeps a recurrent state, which the planner cannot size", "pin its GPUs in docker-compose.gpu.yml"
        )


class _Shape:
    """The part of a config.json that describes the language model."""

    def __init__(self, text: Mapping[str, Any], name: str) -> None:
        self.text, self.name = text, name
        self.hidden = self.number("hidden_size", "n_embd", "d_model")
        self.layers = self.number("num_hidden_layers", "n_layer", "num_layers")
        self.heads = self.number("num_attention_heads", "n_head")
        self.vocabulary = self.number("vocab_size")
        if not (self.hidden and self.layers and self.heads and self.vocabulary):
            raise Problem(
                f"{name}: config.json says 0 for hidden_size, num_hidden_layers, num_attention_heads or vocab_size",
                NOT_A_MODEL,
            )
        self.intermediate = (
            self.number("intermediate_size", "n_inner", "ffn_dim", default=4 * self.hidden) or 4 * self.hidden
        )

    def number(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that has a whole number."""
        for key in keys:
            value = self.text.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        if default is None:
            raise Problem(f"{self.name}: config.json has no {keys[0]}", NOT_A_MODEL)
        return default


def _read_shape(config: Mapping[str, Any], shape: _Shape, disk_bytes: int | None, further: Further) -> Model:
    text, hidden, layers = shape.text, shape.hidden, shape.layers
    architecture = str((config.get("architectures") or [""])[0])
    pooling = read_pooling(architecture, {**text, **config}, further)
    family = str(text.get("model_type", "")).startswith(TIED)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", family)) or pooling is not None
    bias = text.get("attention_bias") or architecture.startswith("Qwen2") or (pooling and pooling.encoder)
    attention, attention_split, attention_replicated = _attention(shape, 1 if bias else 0)
    mlp = _mlp(shape)
    weights = Weights(
        embedding=shape.vocabulary * hidden,
        head=0 if tied else shape.vocabulary * hidden,
        split=attention_split + mlp.split,
        replicated=attention_replicated + mlp.router + 2 * hidden,
        experts=mlp.experts,
        active_share=mlp.active_share,
    )
    if words := shape.number("draft_vocab_size", default=0):
        # An EAGLE-3 head: the embedding is the large model's, the output a shorter one of its own, and its one layer
        # sees three of the large model's layers through a matrix, and its own input beside them.
        seen = 3 * hidden * hidden + hidden * (attention.heads + 2 * attention.kv_heads) * attention.head_dim
        weights = replace(weights, embedding=0, head=words * hidden, split=weights.split + seen // layers)
    window, sliding = _sliding(text, layers)
    if disk_bytes and (unused := shape.number("num_nextn_predict_layers", default=0)):
        # layers that only guess tokens, which vLLM does not load unless asked to
        disk_bytes = disk_bytes * layers // (layers + unused)
    found = config.get("quantization_config") or text.get("quantization_config") or config.get("compression_config")
    found = found or further("hf_quant_config.json")
    quantization = read_quantization(found) if found else None
    dtype = str(text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype"))
    tower, tower_width, tower_patches = _tower(config)
    # RoBERTa's positions begin after the padding index
    length = _max_length(text, shape.name) - (2 if "Roberta" in architecture else 0)
    # vLLM cuts the scales of experts to what a GPU holds of them, and pads MXFP4
    grouped = quantization and not (mlp.experts and quantization.method in FINER)
    model = Model(
        name=shape.name,
        layers=layers,
        hidden=hidden,
        intermediate=mlp.active_width,
        vocabulary=shape.vocabulary,
        attention=attention,
        weights=weights,
        max_length=longest_prompt({**text, **config}, length, further) if pooling else length,
        sliding_layers=sliding,
        window=window,
        checkpoint_dtype_bytes=DTYPE_BYTES.get(dtype, 2),
        quantization=quantization.method if quantization else None,
        quantized_experts_only=bool(
            quantization and mlp.experts and (quantization.experts_only or not quantization.attention)
        ),
        group_size=quantization.group if quantization and grouped else 0,
        disk_bytes=disk_bytes,
        kind=str(config.get("model_type", "")),
        pooling=pooling is not None,
        encoder=bool(pooling and pooling.encoder),
        whole_prompts=bool(pooling and pooling.whole_prompts),
        dense_intermediate=mlp.width,
        tower=tower,
        tower_width=tower_width,
        tower_patches=tower_patches,
    )
    return replace(model, bits=_bits(quantization, model, attention_split))


def _attention(shape: _Shape, bias: int) -> tuple[Attention, int, int]:
    """A layer's attention; its parameters that tp splits; those that each GPU keeps whole. `bias`: 1 with one."""
    hidden, heads = shape.hidden, shape.heads
    if latent_rank := shape.number("kv_lora_rank", default=0):
        nope, rope, value = (shape.number(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        query_rank = shape.number("q_lora_rank", default=0)
        split = heads * ((query_rank or hidden) * (nope + rope) + latent_rank * (nope + value) + value * hidden)
        replicated = hidden * (latent_rank + rope) + hidden * query_rank
        return Attention(heads, 0, value, latent=latent_rank + rope), split, replicated
    head_dim = shape.number("head_dim", default=0) or hidden // heads
    kv_heads = shape.number("num_key_value_heads", "num_kv_heads", default=heads) or heads
    if not head_dim:
        raise Problem(f"{shape.name}: config.json has more heads than its width of {hidden}", NOT_A_MODEL)
    split = 2 * hidden * heads * head_dim + (2 * hidden + 2 * bias) * kv_heads * head_dim + bias * heads * head_dim
    return Attention(heads, kv_heads, head_dim), split, 0


@dataclass(frozen=True)
class _Mlp:
    """The MLPs of one average layer, in parameters and widths."""

    split: int
    width: int  # of one MLP or one expert, which tp has to divide
    active_width: int  # widest that one token goes through
    experts: int = 0
    router: int = 0
    active_share: float = 1.0


def _mlp(shape: _Shape) -> _Mlp:
    text, hidden, layers, intermediate = shape.text, shape.hidden, shape.layers, shape.intermediate
    matrices = 2 if text.get("model_type") in UNGATED else 3
    experts = shape.number("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", default=0)
    if not experts:
        return _Mlp(matrices * hidden * intermediate, intermediate, intermediate)
    width = shape.number("moe_intermediate_size", default=intermediate) or intermediate
    used = shape.number(*USED_EXPERTS, default=2)
    shared_width = shape.number("shared_expert_intermediate_size", default=0)
    shared_width = shared_width or shape.number("n_shared_experts", "moe_num_shared_experts", default=0) * width
    if text.get("model_type") == "llama4_text":  # its dense MLPs have a width of their own, and one expert is shared
        shared_width, intermediate = width, shape.number("intermediate_size_mlp")
    moe_layers = _moe_layers(text, layers)
    routed = matrices * hidden * width * experts * moe_layers
    dense = matrices * hidden * (shared_width * moe_layers + intermediate * (layers - moe_layers))
    return _Mlp(
        split=(routed + dense) // layers,
        width=width,
        active_width=max(used * width + shared_width, intermediate if moe_layers < layers else 0),
        experts=routed // layers,
        router=hidden * experts * moe_layers // layers,
        active_share=used / experts,
    )


def _moe_layers(text: Mapping[str, Any], layers: int) -> int:
    """How many layers route to experts: DeepSeek starts with some dense ones, Qwen and Llama 4 may take every n-th."""
    first_dense = int(text.get("first_k_dense_replace") or text.get("moe_layer_start_index") or 0)
    steps = (text.get(key) for key in ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step"))
    step = int(next((one for one in steps if one), 1))
    only_dense = len(text.get("mlp_only_layers") or [])
    return max(0, ceil((layers - first_dense) / max(1, step)) - only_dense)


def _tower(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """A vision tower's parameters, the numbers that it keeps of one patch, and the patches of its largest picture: an
    estimate, rather too large. What its config does not say is as in Qwen2-VL, one of the larger towers, whose pictures
    may be of any size."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return 0, 0, 0

    def number(default: int, *keys: str) -> int:
        return next((one for key in keys if isinstance(one := vision.get(key), int) and one > 0), default)

    hidden = number(1280, "embed_dim", "hidden_size")
    intermediate = number(4 * hidden, "intermediate_size")
    layers = number(32, "depth", "num_hidden_layers", "num_layers")
    patches = (number(3584, "image_size") // number(14, "patch_size")) ** 2
    return layers * (4 * hidden * hidden + 3 * hidden * intermediate), 8 * hidden + 3 * intermediate, patches


def _sliding(text: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(window, how many layers see only that far)."""
    window = text.get("sliding_window")
    qwen = str(text.get("model_type", "")).startswith("qwen")  # only if they say so
    if not isinstance(window, int) or window < 1 or not text.get("use_sliding_window", not qwen):
        return 0, 0
    if kinds := text.get("layer_types"):
        return window, sum(kind == "sliding_attention" for kind in kinds)
    if pattern := text.get("sliding_window_pattern"):
        return window, layers - layers // int(pattern)
    return window, layers


def _max_length(text: Mapping[str, Any], name: str) -> int:
    """The longest input in tokens, as vLLM derives it (`derive_max_model_len_and_key` in
    vllm/transformers_utils/model_arch_config_convertor.py, `_get_and_verify_max_len` in vllm/config/model.py): RoPE
    scaling multiplies it but for the kinds whose configs state the scaled one. It refuses a longer one."""
    stated = [value for key in LENGTHS if isinstance(value := text.get(key), int)]
    length: float = text.get("model_max_length") or min(stated, default=2048)
    found = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if "gemma3" not in str(text.get("model_type", "")):
        # one for all layers, or one for each kind of layer, which share the factor
        factor = None
        for scaling in [one for one in found.values() if isinstance(one, Mapping)] or [found]:
            if scaling.get("rope_type", scaling.get("type")) not in SCALED_ALREADY:
                factor = scaling.get("factor", factor)
        length *= factor or 1
    if length < 1:
        raise Problem(f"{name}: config.json says that it takes no token", NOT_A_MODEL)
    return int(length)


def _bits(found: Quantization | None, model: Model, attention: int) -> float:
    """Bits a weight of what is quantized, with its scales. Files at hand say it where the config does not, or where not
    all is quantized that one would think. `attention`: parameters of one layer's."""
    if not found:
        return 16.0
    weights, candidates = model.weights, []
    if found.bits:
        share = 0 if found.attention or model.quantized_experts_only else attention / weights.split
        candidates.append(found.bits * (1 - share) + 16 * share)
    if model.disk_bytes:
        quantized = model.layers * (weights.experts if model.quantized_experts_only else weights.split)
        whole = model.parameters - quantized + model.tower
        candidates.append(8 * (model.disk_bytes - 2 * whole) / quantized)
    bits = max(candidates, default=0.0)
    if bits < 1:
        raise Problem(
            f"{model.name}: its config.json does not say how many bits {found.method} keeps of a weight",
            "bring it with scripts/download_model.py: the planner then sees it from the files",
        )
    return min(16.0, bits)


def weight_files_bytes(folder: Path) -> int | None:
    """Bytes of the weights that vLLM loads from a model folder, None where they are not all there. It loads what the
    index names (`filter_duplicate_safetensors_files` in vllm/model_executor/model_loader/weight_utils.py):
    `consolidated.safetensors` holds the same weights again for other programs."""
    there = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    names = {name for name in there if not name.startswith("consolidated")} or set(there)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise Problem(f"{index} is not an index of weights", "fetch the model again") from error
    return sum(there[name] for name in names) or None if names <= set(there) else None


def load_model(name: str, models: Path) -> Model:
    """The model `name`: a folder, a folder under `models`, or a repository on the hub (its config.json alone)."""
    name = name.rstrip("/") or name
    for folder in (Path(name), models / name):
        if (path := folder / "config.json").is_file():
            return read_model(_json(path), name, weight_files_bytes(folder), partial(_further_in, folder))
    if Path(name).is_dir():
        raise Problem(f"{name}: the folder has no config.json", NOT_A_MODEL)
    return read_model(fetch_config(name), name, further=partial(fetch_further, name))


def _further_in(folder: Path, file: str) -> Mapping[str, Any] | None:
    """Another JSON file in a model folder, None where there is none."""
    found = _json(folder / file) if (folder / file).is_file() else None
    return found if isinstance(found, Mapping) else None


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise Problem(f"{path} is not JSON: {error}", "fetch the model again") from error
