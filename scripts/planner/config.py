"""Reads a model from its files: config.json, and what others of them add."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile
from math import ceil, gcd
from pathlib import Path
from typing import Any

from models.hub import fetch_config, fetch_further
from planner.families import (
    DEFAULTS,
    ENCODER_DECODERS,
    GATED_DELTA,
    HARMLESS,
    INDEXED,
    INDEXED_KINDS,
    KDA,
    LONGROPE,
    MAMBA2,
    NAMES,
    NOT_SIZED,
    OF_A_PART,
    OPAQUE,
    PATTERN,
    SCALED_ALREADY,
    SEEING,
    SHORT_CONV,
    SIZES,
    STATE_KEYS,
    TIED,
    TOWER_HARMLESS,
    TOWERS,
    UNGATED,
    UNSERVED,
    WHOLE_TOWERS,
)
from planner.model import Attention, Cached, Mlp, Model, Tower, Weights
from planner.pooling import Further, Pooling
from planner.quantization import MXFP4, MXFP4_METHODS, Quantization, read_quantization
from stack.console import Problem

DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
# Methods whose groups do not keep experts from being split further.
FINER = ("fp8", *MXFP4_METHODS)
LFS_POINTER = b"version https://git-lfs.github.com/"
MOST_LAYERS = 10_000
NO_FILES: dict[str, Mapping[str, Any]] = {}
NOT_A_MODEL = "give the folder or the hub's name of a language model"


def read_model(
    config: object, name: str, disk_bytes: int | None = None, further: Further = NO_FILES.get, trust: bool = False
) -> Model:
    """The model of a config.json. `disk_bytes` of its weights where the files are at hand; `further` gives another JSON
    file of the model by its name, None where it has none.

    Raises Problem where its arithmetic is not known. A key that may change sizes and was not read is one of these,
    unless `trust` has it left to the caller in `unread`."""
    if not isinstance(config, Mapping):
        raise Problem(f"{name}: config.json is not an object", NOT_A_MODEL)
    if config.get("is_encoder_decoder") or config.get("model_type") in ENCODER_DECODERS:
        raise Problem(
            f"{name} is an encoder-decoder ({config.get('model_type')}), of which the planner knows no arithmetic",
            "for speech pin its GPUs in docker-compose.gpu.yml; for text take a decoder, which vLLM serves",
        )
    try:
        read = Config(config, name, further)
        model = read.model(disk_bytes)
        unread = read.unread()
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # any of its values may be of another type than everybody's
        raise Problem(f"{name}: config.json is not one of a language model: {error}", NOT_A_MODEL) from error
    except Problem as error:
        if config.get("auto_map") and error.fix == NOT_A_MODEL:
            raise Problem(
                f"{name} is described by code of its own (auto_map), which the planner does not run",
                "pin its GPUs in docker-compose.gpu.yml, with TRUST_REMOTE_CODE=1 if you trust that code",
            ) from error
        raise
    if unread and not trust:
        raise Problem(
            f"{name}: config.json has {', '.join(unread)}, which may change sizes and which the planner does not know",
            "plan without it by --trust-config, or pin its GPUs in docker-compose.gpu.yml",
        )
    return replace(model, unread=unread)


class Keys(dict[str, Any]):
    """A part of a config.json without its nulls, and so are the parts in it; it notes which keys were read."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        super().__init__((str(key), _keys(value)) for key, value in found.items() if value is not None)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict does."""
        self.read.add(key)
        return super().get(key, default)

    def unread(self, known: set[str], layers: int) -> Iterator[str]:
        """Keys that may change sizes and are neither read nor known, nor HARMLESS; those of a part in this one with
        its name before them. A list with a value for each of `layers` layers is one."""
        for key, value in self.items():
            parts = value if isinstance(value, list) else [value]
            if key in OPAQUE:
                continue
            if any(isinstance(one, Keys) for one in parts):
                inner = TOWER_HARMLESS if key in TOWERS else set()
                for one in parts:
                    if isinstance(one, Keys):
                        yield from (f"{key}.{further}" for further in one.unread(inner, layers))
            elif value and key not in self.read | known | HARMLESS and (SIZES.search(key) or len(parts) == layers > 1):
                yield key


class Config:
    """A config.json and the keys of it that are known."""

    def __init__(self, whole: Mapping[str, Any], name: str, further: Further = NO_FILES.get) -> None:
        if isinstance(thinker := whole.get("thinker_config"), Mapping):  # of Qwen Omni: vLLM loads nothing else
            whole = {key: value for key, value in whole.items() if key != "thinker_config"} | dict(thinker)
        text = whole.get("text_config") or whole.get("llm_config") or whole
        if not isinstance(text, Mapping):
            raise Problem(f"{name}: text_config in config.json is not an object", NOT_A_MODEL)
        self.name, self.further = name, further
        self.whole = Keys(DEFAULTS.get(str(whole.get("model_type")), {}) | dict(whole))
        self.text = self.whole if text is whole else Keys(text)
        kind = str(text.get("model_type"))
        for key, value in (DEFAULTS.get(kind) or (OF_A_PART.get(kind, {}) if text is not whole else {})).items():
            self.text.setdefault(key, value)
        for key in ("hybrid_override_pattern", "layers_block_type"):
            if isinstance(kinds := text.get(key), (str, list)):  # newer files of Nemotron H say no number beside it
                self.text.setdefault("num_hidden_layers", len(kinds))
        self.kind = str(self.text.get("model_type", ""))
        self.architecture = str((whole.get("architectures") or [""])[0])
        self.refuse_unsized()
        self.hidden, self.layers, self.heads, self.vocabulary = (
            self.number(what) for what in ("hidden", "layers", "heads", "vocabulary")
        )
        if not (self.hidden and self.layers and self.heads and self.vocabulary):
            raise Problem(
                f"{name}: config.json says 0 for hidden_size, num_hidden_layers, num_attention_heads or vocab_size",
                NOT_A_MODEL,
            )
        if self.layers > MOST_LAYERS:
            raise Problem(f"{name}: config.json says that it has {self.layers} layers", NOT_A_MODEL)
        self.kinds = self.layer_kinds()
        # the last so many keep nothing of their own and see what earlier ones kept
        self.sharing = min(self.number("num_kv_shared_layers", 0), self.layers - 1)

    def refuse_unsized(self) -> None:
        """Raises Problem for a family whose arithmetic is not known, or that vLLM no longer serves."""
        if last := next((version for version, served in UNSERVED.items() if self.architecture in served.split()), None):
            raise Problem(
                f"{self.name}: vLLM serves no {self.architecture} any more; the last that did was {last}",
                "take a newer model",
            )
        kinds = {str(one.get("model_type")) for one in (self.text, self.whole)}
        kinds |= {kind.removesuffix("_text") for kind in kinds}
        reason = next((why for family, why in NOT_SIZED.items() if family in kinds), None)
        if reason is None and any(key.startswith(STATE_KEYS) for key in self.text):
            reason = "keeps a recurrent state of another kind"
        if reason:
            raise Problem(
                f"{self.name} {reason}, which the planner cannot size", "pin its GPUs in docker-compose.gpu.yml"
            )

    def get(self, what: str, default: Any = None) -> Any:
        """The first value there is by any of its NAMES, of the language model before the whole one."""
        for key in NAMES.get(what, (what,)):
            if (value := self.text.get(key, self.whole.get(key))) is not None:
                return value
        return default

    def number(self, what: str, default: int | None = None) -> int:
        """The first of its NAMES that has a whole number, in the language model's part. Raises Problem without one and
        without a default, and for a list of several."""
        names = NAMES.get(what, (what,))
        found = _number(self.text, names, 0)
        if found is None and (several := next((key for key in names if isinstance(self.text.get(key), list)), None)):
            raise Problem(
                f"{self.name}: config.json has several numbers for {several}, which the planner cannot spread",
                "pin its GPUs in docker-compose.gpu.yml",
            )
        if found is None and default is None:
            raise Problem(f"{self.name}: config.json has no {names[0]}", NOT_A_MODEL)
        return found if found is not None else default or 0

    def unread(self) -> tuple[str, ...]:
        """Keys that may change sizes and were not read, once all else is read."""
        # some configs have their towers beside the language model's own keys
        known = TOWER_HARMLESS if any(tower in self.text for tower in TOWERS) else set()
        found = list(self.text.unread(known, self.layers))
        if self.whole is not self.text:
            # beside the language model a key of its own says the same again
            found += self.whole.unread(TOWER_HARMLESS | self.text.read, self.layers)
        return tuple(dict.fromkeys(found))

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
        if rank := self.number("laurel_rank", 0):  # two narrow matrices beside the attention of Gemma 3n
            weights = replace(weights, split=weights.split + 2 * self.hidden * rank)
        if width := self.number("hidden_size_per_layer_input", 0):
            # each layer looks up an embedding of its own, which a matrix narrows the first one to and two more apply
            words = self.number("vocab_size_per_layer_input", self.vocabulary)
            weights = replace(
                weights,
                look_up=words * width * self.layers,
                split=weights.split + self.hidden * width,
                replicated=weights.replicated + 2 * self.hidden * width,
            )
        if words := self.number("draft_vocab_size", 0):
            # An EAGLE-3 head: the embedding is the large model's, the output a shorter one of its own, and its one
            # layer sees three of the large model's layers through a matrix, and its own input beside them.
            heads = attention.heads + 2 * attention.kv_heads
            seen = 3 * self.hidden * self.hidden + self.hidden * heads * attention.head_dim
            weights = replace(weights, embedding=0, head=words * self.hidden, split=weights.split + seen // self.layers)
        if (unused := self.number("num_nextn_predict_layers", 0)) and disk_bytes:
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
            own_code=bool(self.whole.get("auto_map")),
            longrope=any(scaling.get("rope_type", scaling.get("type")) in LONGROPE for scaling in self.ropes()),
            uneven="block_configs" in self.text,
            file_bytes=disk_bytes,
        )
        if found:
            return replace(model, quantization=_quantization(found, model, split, str(self.text.get("expert_dtype"))))
        stored = DTYPE_BYTES.get(str(self.get("dtype")), 2)
        return replace(model, file_bytes=disk_bytes * 2 // stored if disk_bytes else None)

    def attention(self, pooling: Pooling | None) -> tuple[Attention, int, int]:
        """The attention; of an average layer's parameters those that tp splits, and those that each GPU keeps whole."""
        hidden, heads, encoder = self.hidden, self.heads, bool(pooling and pooling.encoder)
        windows = self.windows()
        if self.text.get("compress_ratios"):
            return self.compressed()
        states, state_split, state_whole = self.states()
        seeing = [layer for layer in range(self.layers) if self.kinds[layer] in SEEING]
        if rank := self.number("kv_lora_rank", 0):
            nope, rope, value = (self.number(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
            for key in ("head_dim", *NAMES["kv_heads"]):  # said of the others
                self.text.get(key)
            query_rank = self.number("q_lora_rank", 0)
            split = heads * ((query_rank or hidden) * (nope + rope) + rank * (nope + value) + value * hidden)
            replicated = hidden * (rank + rope) + hidden * query_rank
            cached = _cached(Counter((0, value, rank + rope, windows[layer]) for layer in seeing))
            if dim := self.number("index_head_dim", 0):
                # one vector of 8 bits and its scale for all heads of the index
                looking, index_heads = self.indexed_layers(), self.number("index_n_heads")
                cached += (Cached(looking, 0, dim, row=dim + dim // 128 * 4),)
                state_whole += looking * (query_rank * index_heads * dim + hidden * (dim + index_heads))
            split, replicated = (
                (one * len(seeing) + more) // self.layers
                for one, more in ((split, state_split), (replicated, state_whole))
            )
            return Attention(heads, 0, value, () if encoder else cached + states), split, replicated
        head_dim = self.number("head_dim", 0) or hidden // heads
        kv_heads = self.kv_heads()
        if not head_dim:
            raise Problem(f"{self.name}: config.json has more heads than its width of {hidden}", NOT_A_MODEL)
        bias = bool(self.text.get("attention_bias") or self.architecture.startswith("Qwen2") or encoder)
        gated = self.text.get("attn_output_gate", GATED_DELTA in self.kinds)  # by a second matrix for queries
        # layers that see all may be of another shape
        apart = (self.text.get("per_layer_config") or {}).values()  # newer files of Gemma 4 say it for each of these
        apart = [one.get("head_dim", 0) for one in apart if isinstance(one, Keys)]
        wide = self.number("global_head_dim", 0) or max(apart, default=0) or head_dim
        few = self.number("num_global_key_value_heads", 0)
        split, kept = 0, Counter[tuple[int, int, int, int]]()
        for layer in seeing:
            window = windows[layer]
            dim, kv = (head_dim, kv_heads[layer]) if window else (wide, few or kv_heads[layer])
            if not kv:
                continue  # no attention at all
            own = 0 if layer >= self.layers - self.sharing else kv
            split += (2 + bool(gated)) * hidden * heads * dim + (2 * hidden + 2 * bias) * own * dim + bias * heads * dim
            if own:
                kept[kv, dim, 0, window] += 1
        cached = () if encoder else _cached(kept) + states
        return Attention(heads, max(kv_heads), head_dim, cached), (split + state_split) // self.layers, 0

    def layer_kinds(self) -> list[str]:
        """What each layer does: a name of SEEING, GATED_DELTA, MAMBA2, KDA, or "mlp" and "moe" for one that is no more
        than that. Raises Problem for another."""
        linear, seeing = self.text.get("linear_attn_config"), self.text.get("full_attn_idxs") or []
        if pattern := self.text.get("hybrid_override_pattern"):
            found = [PATTERN.get(one, str(one)) for one in pattern]
        elif linear:
            kda, _ = linear.get("kda_layers") or [], linear.get("full_attn_layers")
            found = [KDA if layer + 1 in kda else "full_attention" for layer in range(self.layers)]
        elif found := self.text.get("layer_types") or self.text.get("layers_block_type"):
            # newer files say linear attention for Mamba 2 too
            words = {GATED_DELTA: MAMBA2} if self.number("mamba_heads", 0) else {}
            if self.kind in INDEXED_KINDS:
                words = {INDEXED: "full_attention"}
            found = [words.get(str(one), str(one)) for one in found]
        elif kinds := self.text.get("attn_type_list"):  # of MiniMax
            found = ["full_attention" if kind == 1 else "lightning attention" for kind in kinds]
        elif self.kind.startswith("lfm2"):
            found = ["full_attention" if layer in seeing else SHORT_CONV for layer in range(self.layers)]
        elif self.kind.startswith(("qwen3_next", "qwen3_5")):
            every = self.number("full_attention_interval", 4)
            found = [GATED_DELTA if (layer + 1) % every else "full_attention" for layer in range(self.layers)]
        else:
            found = ["full_attention"] * self.layers
        known = (*SEEING, GATED_DELTA, MAMBA2, KDA, SHORT_CONV, "mlp", "moe")
        if odd := next((one for one in found if one not in known), None):
            raise Problem(
                f"{self.name} has layers of a kind that the planner does not know: {odd}",
                "pin its GPUs in docker-compose.gpu.yml",
            )
        if len(found) < self.layers:
            raise ValueError(f"it says the kind of {len(found)} layers of {self.layers}")
        return found[: self.layers]

    def states(self) -> tuple[tuple[Cached, ...], int, int]:
        """The layers that keep a state, in vLLM's types (vllm/model_executor/layers/mamba/mamba_utils.py): what they
        keep, and of all of them the parameters that tp splits and those that each GPU keeps whole."""
        hidden = self.hidden
        if count := self.kinds.count(GATED_DELTA):
            key_dim, value_dim = self.number("linear_key_head_dim"), self.number("linear_value_head_dim")
            heads, few = self.number("linear_num_value_heads"), self.number("linear_num_key_heads")
            kernel, keys, values = self.number("linear_conv_kernel_dim", 4), few * key_dim, heads * value_dim
            number = DTYPE_BYTES.get(str(self.text.get("mamba_ssm_dtype")), 2)
            state = (kernel - 1) * (2 * keys + values) * 2 + heads * key_dim * value_dim * number
            split = hidden * (2 * keys + 3 * values + 2 * heads) + kernel * (2 * keys + values)
            return (Cached(count, gcd(heads, few), 0, state=state),), count * split, 0
        # in Falcon H1 beside the attention of each layer
        if heads := self.number("mamba_heads", 0):  # said even where no layer is one
            groups, size, kernel = (self.number(what) for what in ("mamba_groups", "mamba_size", "mamba_kernel"))
            inner = self.number("mamba_expand", 2) * hidden
            inner = self.number("mamba_d_ssm", 0) or heads * self.number("mamba_width", inner // heads)  # or "auto"
        if count := self.layers if self.kind == "falcon_h1" else self.kinds.count(MAMBA2):
            usual = "float32" if self.kind == "nemotron_h" else "bfloat16"
            number = DTYPE_BYTES.get(str(self.text.get("mamba_ssm_cache_dtype", usual)), 2)
            conv = inner + 2 * groups * size
            state = (kernel - 1) * conv * 2 + inner * size * number
            split = hidden * (2 * inner + conv + heads) + kernel * conv
            return (Cached(count, heads, 0, state=state, states=3),), count * split, 0
        if count := self.kinds.count(SHORT_CONV):
            kernel, wide = self.number("conv_L_cache"), self.number("conv_dim", hidden)
            split = 4 * hidden * wide + kernel * wide
            return (Cached(count, self.heads, 0, state=(kernel - 1) * wide * 2),), count * split, 0
        if count := self.kinds.count(KDA):
            said = self.text["linear_attn_config"]
            heads, width = (_number(said, (key,), 1) or 0 for key in ("num_heads", "head_dim"))
            kernel = said.get("short_conv_kernel_size", 4)
            inner = heads * width
            state = (kernel - 1) * 3 * inner * 2 + heads * width * width * 4
            # queries, keys, values, output; two narrow gates
            split = 4 * hidden * inner + 2 * width * inner + hidden * heads
            return (Cached(count, heads, 0, state=state),), count * split, count * 2 * hidden * width
        return (), 0, 0

    def indexed_layers(self) -> int:
        """Layers of DeepSeek V3.2 and GLM-5 with an index of their own; others see what the one before them found
        (vllm/models/deepseek_v32/attention.py)."""
        every = self.number("index_topk_freq", 1)
        for key, shared in (("index_topk_pattern", "S"), ("indexer_types", "shared")):
            if kinds := self.text.get(key):
                return self.layers - list(kinds[: self.layers]).count(shared)
        offset = self.number("index_skip_topk_offset", 2)
        return sum(not max(layer - offset + 1, 0) % every for layer in range(self.layers))

    def compressed(self) -> tuple[Attention, int, int]:
        """DeepSeek V4's: each layer keeps a window, most also a row for every few tokens, those with the fewest an
        index of these (vllm/models/deepseek_v4/attention.py). Rows are of 8 bits with scales."""
        hidden, heads, dim = self.hidden, self.heads, self.number("head_dim")
        rank, groups, out = self.number("q_lora_rank"), self.number("o_groups", 8), self.number("o_lora_rank")
        index_heads, index_dim = self.number("index_n_heads", 64), self.number("index_head_dim", 128)
        rope, window = self.number("qk_rope_head_dim"), self.number("sliding_window")
        self.number("kv_heads", 1)
        row = dim - rope + 2 * rope + 8
        split = rank * heads * dim + heads * dim * out + groups * out * hidden
        cached, replicated = [Cached(self.layers, 0, dim, window=window, row=row)], 0
        for ratio, count in Counter(self.text["compress_ratios"][: self.layers]).items():
            replicated += count * hidden * (rank + dim)
            if ratio > 1:
                cached.append(Cached(count, 0, dim, row=row, ratio=ratio))
                replicated += count * 2 * hidden * dim * (2 if ratio == 4 else 1)
            if ratio == 4:
                cached.append(Cached(count, 0, index_dim, row=index_dim + 4, ratio=ratio))
                replicated += count * (rank * index_heads * index_dim + hidden * (index_heads + 4 * index_dim))
        return Attention(heads, 0, dim, tuple(cached)), split, replicated // self.layers

    def kv_heads(self) -> list[int]:
        """Of each layer, 0 where one has no attention."""
        if blocks := self.text.get("block_configs"):
            said = [block["attention"] for block in blocks[: self.layers]]
            if any(one.get("replace_with_linear") for one in said):
                raise Problem(
                    f"{self.name}: attention replaced by a matrix is not known",
                    "pin its GPUs in docker-compose.gpu.yml",
                )
            return [0 if one.get("no_op") else self.heads // one["n_heads_in_group"] for one in said]
        one = self.number("kv_heads", self.heads) or self.heads
        if self.text.get("multi_query") and not self.text.get("new_decoder_architecture"):
            one = 1
        return [one] * self.layers

    def windows(self) -> list[int]:
        """How far each layer sees, 0 for all of it. A chunk of Llama 4 counts as a window."""
        if (chunk := self.number("attention_chunk_size", 0)) and self.kind == "llama4_text":
            turned = self.text.get("no_rope_layers") or [(layer + 1) % 4 for layer in range(self.layers)]
            return [chunk if one else 0 for one in turned[: self.layers]]
        window = self.text.get("sliding_window")
        every = self.number("window_every", 0)
        qwen = self.kind.startswith("qwen")  # only if they say so
        if not isinstance(window, int) or window < 1 or not self.text.get("use_sliding_window", not qwen):
            return [0] * self.layers
        if self.text.get("layer_types"):
            return [window if kind in ("sliding_attention", "sliding") else 0 for kind in self.kinds]
        return [0 if every and layer % every == every - 1 else window for layer in range(self.layers)]

    def widths(self) -> list[int]:
        """Of each layer's MLP that is not of experts, 0 where one has none."""
        said = self.text.get("intermediate_size")
        if isinstance(said, list):
            return [int(said[layer]) for layer in range(self.layers)]
        one = self.number("intermediate", 4 * self.hidden) or 4 * self.hidden
        if self.text.get("block_auto_adjust_ff_dim") and not self.number("experts", 0):  # of LFM2
            several = self.number("block_multiple_of", 256)
            one = ceil(int(self.text.get("block_ffn_dim_multiplier", 1) * (2 * one // 3)) / several) * several
        if self.kind == "granitemoehybrid" and not self.number("experts", 0):
            one = self.number("shared_width")
        if blocks := self.text.get("block_configs"):
            return [self._block_width(block["ffn"]) for block in blocks[: self.layers]]
        if "mlp" in self.kinds or "moe" in self.kinds:
            return [one if kind == "mlp" else 0 for kind in self.kinds]
        wider = self.sharing if self.text.get("use_double_wide_mlp") else 0
        return [one] * (self.layers - wider) + [2 * one] * wider

    def _block_width(self, ffn: Mapping[str, Any]) -> int:
        """As `_ffn_mult_to_intermediate_size` in vllm/model_executor/models/nemotron_nas.py."""
        if ffn.get("no_op"):
            return 0
        if ffn.get("replace_with_linear"):
            raise Problem(
                f"{self.name}: an MLP replaced by a matrix is not known", "pin its GPUs in docker-compose.gpu.yml"
            )
        return int(ffn.get("intermediate_size") or ceil(int(2 * ffn["ffn_mult"] * self.hidden / 3) / 256) * 256)

    def mlp(self) -> tuple[Mlp, Weights]:
        """The MLPs' widths; the embedding's, head's and MLPs' parameters."""
        hidden, layers, widths = self.hidden, self.layers, self.widths()
        words = self.vocabulary * hidden
        matrices = 2 if self.kind in UNGATED else 3
        experts = self.number("experts", 0)
        dense = max(widths)
        width = self.number("moe_intermediate_size", dense) or dense
        used = self.number("used_experts", 2)
        shared = self.number("shared_width", 0) or self.number("shared_experts", 0) * width
        routing = self.routing_layers()
        if not experts:
            split = matrices * hidden * sum(widths) // layers
            return Mlp(gcd(*widths), dense), Weights(words, words, split, 0)
        if self.kind == "llama4_text":  # its dense MLPs have a width of their own, and one expert is shared
            shared, dense = width, self.number("intermediate_size_mlp")
        if self.kind == "gemma4_text":  # a dense MLP stands beside the experts of each layer
            shared = dense
        narrow = self.number("moe_latent_size", 0) or hidden  # what experts see of a token, in Nemotron 3 Super
        routed = matrices * narrow * width * experts * routing
        alone = sum(widths) if "moe" in self.kinds else dense * (layers - routing)
        rest = matrices * hidden * (shared * routing + alone)
        mlp = Mlp(width, max(shared, dense if routing < layers else 0), used)
        router = (hidden * experts + (2 * hidden * narrow if narrow < hidden else 0)) * routing // layers
        # those without experts are the first, or spread evenly
        kinds = self.text.get("mlp_layer_types") or ["dense"] * self.number("first_dense", 0) + ["sparse"]
        first = len(list(takewhile(lambda kind: kind == "dense", kinds)))
        plain = first if first == layers - routing < layers else 0
        split, share = (routed + rest) // layers, used / experts
        return mlp, Weights(words, words, split, router, routed // layers, share, plain)

    def routing_layers(self) -> int:
        """Layers that route to experts: DeepSeek starts with some dense ones, Qwen and Llama 4 may take every n-th."""
        first_dense, step = (
            next((int(one) for one in [self.text.get(key) for key in NAMES[what]] if one), default)
            for what, default in (("first_dense", 0), ("sparse_step", 1))
        )
        if "moe" in self.kinds:
            return self.kinds.count("moe")
        only_dense = len(self.text.get("mlp_only_layers") or [])
        if kinds := self.text.get("mlp_layer_types"):
            return sum(kind != "dense" for kind in kinds[: self.layers])
        return max(0, ceil((self.layers - first_dense) / max(1, step)) - only_dense)

    def tower(self) -> Tower | None:
        """Those of pictures and of sounds, an estimate, rather too large. What a config does not say is as in Qwen2-VL,
        one of the larger towers, whose pictures may be of any size."""
        sound, heard = self.whole.get("audio_config"), 0
        # of Gemma's only the models with an embedding a layer hear
        if isinstance(sound, Keys):
            width = _number(sound, NAMES["tower_hidden"], 1) or 1280
            inner = _number(sound, NAMES["tower_intermediate"], 1) or 10 * width
            heard = (4 * width + 2 * inner) * width * (_number(sound, NAMES["tower_layers"], 1) or 32)
        if "gemma" in self.kind and "hidden_size_per_layer_input" not in self.text:
            heard = 0
        vision = self.whole.get("vision_config")
        if not isinstance(vision, Keys):
            return Tower(heard, 0, 0, heard) if heard else None

        def number(default: int, what: str) -> int:
            return _number(vision, NAMES.get(what, (what,)), 1) or default

        hidden = number(1280, "tower_hidden")
        intermediate = number(ceil((vision.get("mlp_ratio") or 4) * hidden), "tower_intermediate")
        layers = number(32, "tower_layers")
        patches = (number(3584, "image_size") // number(14, "patch_size")) ** 2
        parameters = layers * (4 * hidden * hidden + 3 * hidden * intermediate)
        whole = parameters if str(self.whole.get("model_type")).startswith(WHOLE_TOWERS) else 0
        return Tower(parameters + heard, 8 * hidden + 3 * intermediate, patches, whole + heard)

    def ropes(self) -> list[Mapping[str, Any]]:
        """How positions are scaled: once for all layers, or once for each kind of layer, which share the factor."""
        found = self.text.get("rope_parameters") or self.text.get("rope_scaling") or {}
        return [one for one in found.values() if isinstance(one, Mapping)] or [found]

    def max_length(self) -> int:
        """The longest input, as vLLM derives it (`derive_max_model_len_and_key` in
        vllm/transformers_utils/model_arch_config_convertor.py, `_get_and_verify_max_len` in vllm/config/model.py): RoPE
        scaling multiplies it but for the kinds whose configs state the scaled one. It refuses a longer one."""
        stated = [value for key in NAMES["length"] if isinstance(value := self.text.get(key), int)]
        length: float = self.text.get("model_max_length") or min(stated, default=2048)
        if "gemma3" not in self.kind:
            factor = None
            for scaling in self.ropes():
                if scaling.get("rope_type", scaling.get("type")) not in SCALED_ALREADY:
                    factor = scaling.get("factor", factor)
            length *= factor or 1
        # RoBERTa's positions begin after the padding index
        length = int(length) - (2 if "Roberta" in self.architecture else 0)
        if length < 1:
            raise Problem(f"{self.name}: config.json says that it takes no token", NOT_A_MODEL)
        return length


def _keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Keys(value)
    return [_keys(one) for one in value] if isinstance(value, list) else value


def _cached(kinds: Mapping[tuple[int, int, int, int], int]) -> tuple[Cached, ...]:
    """Of (KV heads, head's width, latent, window) each with its number of layers."""
    return tuple(Cached(layers, *kind) for kind, layers in kinds.items())


def _number(found: Mapping[str, Any], keys: tuple[str, ...], least: int) -> int | None:
    values = [found.get(key) for key in keys]  # all, so that each counts as read
    # one for each layer, where these do not differ
    values = [one[0] if isinstance(one, list) and one and one.count(one[0]) == len(one) else one for one in values]
    return next((one for one in values if isinstance(one, int) and not isinstance(one, bool) and one >= least), None)


def _quantization(found: Mapping[str, Any], model: Model, attention: int, expert_dtype: str) -> Quantization:
    """How the model is quantized, with the bits of its files where they are at hand: the config may not say, or not all
    is quantized that one would think. `attention`: parameters of one layer's."""
    said = read_quantization(found)
    weights, candidates = model.weights, []
    experts_only = bool(weights.experts and (said.experts_only or not said.attention))
    if said.bits and expert_dtype == "fp4":
        share = weights.experts / weights.split
        said = replace(said, bits=said.bits * (1 - share) + MXFP4 * share)
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


def load_model(name: str, models: Path, trust: bool = False) -> Model:
    """The model `name`: a folder, a folder under `models`, or a repository on the hub (its config.json alone).

    `trust`: as for read_model. Raises Problem where there is none, or none that the planner knows."""
    name = name.rstrip("/") or name
    for folder in (Path(name), models / name):
        _check_folder(folder, name)
        if (path := folder / "config.json").is_file():
            return read_model(_json(path), name, weight_files_bytes(folder), partial(_further_in, folder), trust)
    if Path(name).is_dir():
        raise Problem(f"{name}: the folder has no config.json", NOT_A_MODEL)
    return read_model(fetch_config(name), name, further=partial(fetch_further, name), trust=trust)


def _check_folder(folder: Path, name: str) -> None:
    """Raises Problem for a folder that holds something else than a model in the files that vLLM loads."""
    for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise Problem(f"{name}: {path.name} is a git-LFS pointer, not the file", "run git lfs pull there")
    if (folder / "model_index.json").is_file():
        raise Problem(f"{name} is a diffusion pipeline, which draws pictures", NOT_A_MODEL)
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if any(not path.name.startswith("adapter_") for path in weights):
        return
    # these may have a config.json beside them too
    if (path := folder / "adapter_config.json").is_file():
        base = (_further_in(folder, path.name) or {}).get("base_model_name_or_path", "its base model")
        raise Problem(f"{name} is an adapter of {base}, not a model", f"plan {base}, and merge the adapter into it")
    if any(folder.glob("*.gguf")):
        raise Problem(f"{name} is a model in GGUF, which replicas do not load", "take the model in safetensors")


def _further_in(folder: Path, file: str) -> Mapping[str, Any] | None:
    """Another JSON file in a model folder, None where there is none."""
    found = _json(folder / file) if (folder / file).is_file() else None
    return found if isinstance(found, Mapping) else None


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path} is not JSON: {error}", "fetch the model again") from error
