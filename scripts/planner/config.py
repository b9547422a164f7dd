"""Reads a model from its files: config.json, and what others of them add."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from models.hub import fetch_config, fetch_further
from planner.model import Attention, Cached, Mlp, Model, Tower, Weights
from planner.pooling import Further, Pooling
from planner.quantization import MXFP4_METHODS, Quantization, read_quantization
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
# How configs call one thing. What is not here has one name.
NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "vocabulary": ("vocab_size",),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "experts": ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    "used_experts": (
        "num_experts_per_tok",
        "experts_per_token",
        "num_experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_top_k",
        "moe_k",
    ),
    "shared_experts": ("n_shared_experts", "moe_num_shared_experts"),
    "first_dense": ("first_k_dense_replace", "moe_layer_start_index"),
    "sparse_step": ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step"),
    "length": (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "max_sequence_length",
        "max_seq_length",
        "seq_len",
    ),
    "tower_hidden": ("embed_dim", "hidden_size"),
    "tower_layers": ("depth", "num_hidden_layers", "num_layers"),
    "dtype": ("torch_dtype", "dtype"),
}
# Kinds of RoPE scaling whose length is in the stated one already.
SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope")
# Methods whose groups do not keep experts from being split further.
FINER = ("fp8", *MXFP4_METHODS)
NO_FILES: dict[str, Mapping[str, Any]] = {}
NOT_A_MODEL = "give the folder or the hub's name of a language model"


def read_model(config: object, name: str, disk_bytes: int | None = None, further: Further = NO_FILES.get) -> Model:
    """The model of a config.json. `disk_bytes` of its weights where the files are at hand; `further` gives another JSON
    file of the model by its name, None where it has none.

    Raises Problem where its arithmetic is not known."""
    if not isinstance(config, Mapping):
        raise Problem(f"{name}: config.json is not an object", NOT_A_MODEL)
    try:
        return Config(config, name, further).model(disk_bytes)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # any of its values may be of another type than everybody's
        raise Problem(f"{name}: config.json is not one of a language model: {error}", NOT_A_MODEL) from error


class Config:
    """A config.json and the keys of it that are known."""

    def __init__(self, whole: Mapping[str, Any], name: str, further: Further = NO_FILES.get) -> None:
        text = whole.get("text_config") or whole.get("llm_config") or whole
        if not isinstance(text, Mapping):
            raise Problem(f"{name}: text_config in config.json is not an object", NOT_A_MODEL)
        self.name, self.whole, self.further = name, whole, further
        self.text = DEFAULTS.get(str(text.get("model_type")), {}) | {k: v for k, v in text.items() if v is not None}
        self.kind = str(self.text.get("model_type", ""))
        self.architecture = str((whole.get("architectures") or [""])[0])
        _refuse_recurrent(self.text, name)
        self.hidden, self.layers, self.heads, self.vocabulary = (
            self.number(what) for what in ("hidden", "layers", "heads", "vocabulary")
        )
        if not (self.hidden and self.layers and self.heads and self.vocabulary):
            raise Problem(
                f"{name}: config.json says 0 for hidden_size, num_hidden_layers, num_attention_heads or vocab_size",
                NOT_A_MODEL,
            )
        self.intermediate = self.number("intermediate", 4 * self.hidden) or 4 * self.hidden

    def get(self, what: str, default: Any = None) -> Any:
        """The first value there is by any of its NAMES, of the language model before the whole one."""
        for key in NAMES.get(what, (what,)):
            if (value := self.text.get(key, self.whole.get(key))) is not None:
                return value
        return default

    def number(self, what: str, default: int | None = None) -> int:
        """The first of its NAMES that has a whole number, in the language model's part. Raises Problem without one and
        without a default."""
        names = NAMES.get(what, (what,))
        found = _number(self.text, names, 0)
        if found is None and default is None:
            raise Problem(f"{self.name}: config.json has no {names[0]}", NOT_A_MODEL)
        return found if found is not None else default or 0

    def model(self, disk_bytes: int | None) -> Model:
        """The whole model. Raises Problem where a number is missing or makes no sense."""
        found = self.get("quantization_config") or self.whole.get("compression_config")
        found = found or self.further("hf_quant_config.json")
        pooling = Pooling.read(self.architecture, {**self.text, **self.whole}, self.further)
        attention, split, replicated = self.attention(pooling)
        mlp, weights = self.mlp()
        tied = self.get("tie_word_embeddings", self.kind.startswith(TIED)) or pooling is not None
        weights = replace(
            weights,
            head=0 if tied else weights.head,
            split=weights.split + split,
            replicated=weights.replicated + replicated + 2 * self.hidden,
        )
        if words := self.number("draft_vocab_size", 0):
            # An EAGLE-3 head: the embedding is the large model's, the output a shorter one of its own, and its one
            # layer sees three of the large model's layers through a matrix, and its own input beside them.
            heads = attention.heads + 2 * attention.kv_heads
            seen = 3 * self.hidden * self.hidden + self.hidden * heads * attention.head_dim
            weights = replace(weights, embedding=0, head=words * self.hidden, split=weights.split + seen // self.layers)
        if disk_bytes and (unused := self.number("num_nextn_predict_layers", 0)):
            # layers that only guess tokens, which vLLM does not load unless asked to
            disk_bytes = disk_bytes * self.layers // (self.layers + unused)
        length = self.max_length()
        model = Model(
            name=self.name,
            kind=str(self.whole.get("model_type", "")),
            layers=self.layers,
            hidden=self.hidden,
            vocabulary=self.vocabulary,
            max_length=min(length, pooling.max_length or length) if pooling else length,
            attention=attention,
            mlp=mlp,
            weights=weights,
            pooling=pooling,
            tower=self.tower(),
            file_bytes=disk_bytes,
        )
        if found:
            return replace(model, quantization=_quantization(found, model, split))
        stored = DTYPE_BYTES.get(str(self.get("dtype")), 2)
        return replace(model, file_bytes=disk_bytes * 2 // stored if disk_bytes else None)

    def attention(self, pooling: Pooling | None) -> tuple[Attention, int, int]:
        """Each layer's attention; its parameters that tp splits; those that each GPU keeps whole."""
        hidden, heads = self.hidden, self.heads
        if rank := self.number("kv_lora_rank", 0):
            nope, rope, value = (self.number(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
            query_rank = self.number("q_lora_rank", 0)
            split = heads * ((query_rank or hidden) * (nope + rope) + rank * (nope + value) + value * hidden)
            replicated = hidden * (rank + rope) + hidden * query_rank
            return Attention(heads, 0, value, self.cached(0, value, rank + rope, pooling)), split, replicated
        head_dim = self.number("head_dim", 0) or hidden // heads
        kv_heads = self.number("kv_heads", heads) or heads
        if not head_dim:
            raise Problem(f"{self.name}: config.json has more heads than its width of {hidden}", NOT_A_MODEL)
        encoder = bool(pooling and pooling.encoder)
        bias = bool(self.text.get("attention_bias") or self.architecture.startswith("Qwen2") or encoder)
        split = 2 * hidden * heads * head_dim + (2 * hidden + 2 * bias) * kv_heads * head_dim + bias * heads * head_dim
        return Attention(heads, kv_heads, head_dim, self.cached(kv_heads, head_dim, 0, pooling)), split, 0

    def cached(self, kv_heads: int, head_dim: int, latent: int, pooling: Pooling | None) -> tuple[Cached, ...]:
        """The kinds of layers by how far they see."""
        if pooling and pooling.encoder:
            return ()
        window, sliding = self.sliding()
        kinds = ((self.layers - sliding, 0), (sliding, window))
        return tuple(Cached(layers, kv_heads, head_dim, latent, seen) for layers, seen in kinds if layers)

    def sliding(self) -> tuple[int, int]:
        """(window, how many layers see only that far)."""
        window = self.text.get("sliding_window")
        qwen = self.kind.startswith("qwen")  # only if they say so
        if not isinstance(window, int) or window < 1 or not self.text.get("use_sliding_window", not qwen):
            return 0, 0
        if kinds := self.text.get("layer_types"):
            return window, sum(kind == "sliding_attention" for kind in kinds)
        if pattern := self.text.get("sliding_window_pattern"):
            return window, self.layers - self.layers // int(pattern)
        return window, self.layers

    def mlp(self) -> tuple[Mlp, Weights]:
        """The MLPs' widths; the embedding's, head's and MLPs' parameters."""
        hidden, layers, dense = self.hidden, self.layers, self.intermediate
        words = self.vocabulary * hidden
        matrices = 2 if self.kind in UNGATED else 3
        experts = self.number("experts", 0)
        if not experts:
            return Mlp(dense, dense), Weights(words, words, matrices * hidden * dense, 0)
        width = self.number("moe_intermediate_size", dense) or dense
        used = self.number("used_experts", 2)
        shared = self.number("shared_expert_intermediate_size", 0) or self.number("shared_experts", 0) * width
        if self.kind == "llama4_text":  # its dense MLPs have a width of their own, and one expert is shared
            shared, dense = width, self.number("intermediate_size_mlp")
        routing = self.routing_layers()
        routed = matrices * hidden * width * experts * routing
        rest = matrices * hidden * (shared * routing + dense * (layers - routing))
        mlp = Mlp(width, max(used * width + shared, dense if routing < layers else 0))
        router = hidden * experts * routing // layers
        return mlp, Weights(words, words, (routed + rest) // layers, router, routed // layers, used / experts)

    def routing_layers(self) -> int:
        """Layers that route to experts: DeepSeek starts with some dense ones, Qwen and Llama 4 may take every n-th."""
        first_dense, step = (
            next((int(one) for key in NAMES[what] if (one := self.text.get(key))), default)
            for what, default in (("first_dense", 0), ("sparse_step", 1))
        )
        only_dense = len(self.text.get("mlp_only_layers") or [])
        return max(0, ceil((self.layers - first_dense) / max(1, step)) - only_dense)

    def tower(self) -> Tower | None:
        """An estimate, rather too large. What its config does not say is as in Qwen2-VL, one of the larger towers,
        whose pictures may be of any size."""
        vision = self.whole.get("vision_config")
        if not isinstance(vision, Mapping):
            return None

        def number(default: int, what: str) -> int:
            return _number(vision, NAMES.get(what, (what,)), 1) or default

        hidden = number(1280, "tower_hidden")
        intermediate = number(4 * hidden, "intermediate_size")
        layers = number(32, "tower_layers")
        patches = (number(3584, "image_size") // number(14, "patch_size")) ** 2
        parameters = layers * (4 * hidden * hidden + 3 * hidden * intermediate)
        return Tower(parameters, 8 * hidden + 3 * intermediate, patches)

    def max_length(self) -> int:
        """The longest input, as vLLM derives it (`derive_max_model_len_and_key` in
        vllm/transformers_utils/model_arch_config_convertor.py, `_get_and_verify_max_len` in vllm/config/model.py): RoPE
        scaling multiplies it but for the kinds whose configs state the scaled one. It refuses a longer one."""
        stated = [value for key in NAMES["length"] if isinstance(value := self.text.get(key), int)]
        length: float = self.text.get("model_max_length") or min(stated, default=2048)
        found = self.text.get("rope_parameters") or self.text.get("rope_scaling") or {}
        if "gemma3" not in self.kind:
            # one for all layers, or one for each kind of layer, which share the factor
            factor = None
            for scaling in [one for one in found.values() if isinstance(one, Mapping)] or [found]:
                if scaling.get("rope_type", scaling.get("type")) not in SCALED_ALREADY:
                    factor = scaling.get("factor", factor)
            length *= factor or 1
        # RoBERTa's positions begin after the padding index
        length = int(length) - (2 if "Roberta" in self.architecture else 0)
        if length < 1:
            raise Problem(f"{self.name}: config.json says that it takes no token", NOT_A_MODEL)
        return length


def _number(found: Mapping[str, Any], keys: tuple[str, ...], least: int) -> int | None:
    values = (found.get(key) for key in keys)
    return next((one for one in values if isinstance(one, int) and not isinstance(one, bool) and one >= least), None)


def _refuse_recurrent(text: Mapping[str, Any], name: str) -> None:
    kinds = " ".join([str(text.get("model_type", "")), *map(str, text.get("layer_types") or [])]).lower()
    if any(word in kinds for word in STATE_SPACE) or any(str(key).startswith(STATE_KEYS) for key in text):
        raise Problem(
            f"{name} keeps a recurrent state, which the planner cannot size", "pin its GPUs in docker-compose.gpu.yml"
        )


def _quantization(found: Mapping[str, Any], model: Model, attention: int) -> Quantization:
    """How the model is quantized, with the bits of its files where they are at hand: the config may not say, or not all
    is quantized that one would think. `attention`: parameters of one layer's."""
    said = read_quantization(found)
    weights, candidates = model.weights, []
    experts_only = bool(weights.experts and (said.experts_only or not said.attention))
    if said.bits:
        share = 0 if said.attention or experts_only else attention / weights.split
        candidates.append(said.bits * (1 - share) + 16 * share)
    if model.file_bytes:
        quantized = model.layers * (weights.experts if experts_only else weights.split)
        whole = model.parameters - quantized + (model.tower.parameters if model.tower else 0)
        candidates.append(8 * (model.file_bytes - 2 * whole) / quantized)
    bits = max(candidates, default=0.0)
    if bits < 1:
        raise Problem(
            f"{model.name}: its config.json does not say how many bits {said.method} keeps of a weight",
            "bring it with scripts/download_model.py: the planner then sees it from the files",
        )
    # vLLM cuts the scales of experts to what a GPU holds of them, and pads MXFP4
    group = 0 if weights.experts and said.method in FINER else said.group
    return replace(said, bits=min(16.0, bits), group=group, experts_only=experts_only)


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
