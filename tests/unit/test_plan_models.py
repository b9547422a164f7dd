"""What the planner reads in a model's files, as vLLM 0.32 reads it."""

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import choose, memory
from planner.choose import Wish
from planner.config import load_model, read_model, weight_files_bytes
from planner.families import HARMLESS, OPAQUE, SIZES, TOWER_HARMLESS
from planner.machine import GIB, load_machine
from planner.memory import Settings
from planner.model import Cached, Model
from stack.console import Problem
from stack.shell import ROOT

CONFIGS = {path.parent.name: json.loads(path.read_text()) for path in (ROOT / "tests/models").glob("*/config.json")}
LLAMA = CONFIGS["Llama-3.1-8B-Instruct"]


def llama(**changed: Any) -> Model:
    return read_model(LLAMA | {"rope_scaling": None, "max_position_embeddings": 8192} | changed, "x")


@pytest.mark.parametrize(
    ("changed", "length"),
    [
        ({}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 32768),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 16384),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": None}}, 8192),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}, 8192),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}, 8192),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 8192),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, 8192),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}}, 8192),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 8192),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 16384),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 16384),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, 8192),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 8192),
        ({"max_seq_len": 4096}, 4096),
        ({"model_max_length": 131072}, 131072),
    ],
)
def test_the_longest_input_is_that_which_vllm_takes(changed: dict[str, Any], length: int) -> None:
    """It refuses to start with a longer one."""
    assert llama(**changed).max_length == length


def test_a_model_that_takes_no_token_is_refused_in_one_line() -> None:
    with pytest.raises(Problem, match="takes no token"):
        llama(rope_scaling={"type": "linear", "factor": 1e-6})


def test_the_same_weights_for_another_program_are_counted_once(tmp_path: Path) -> None:
    """Mistral's repositories have consolidated.safetensors beside the shards."""
    for name, size in {"consolidated": 300, "model-00001-of-00002": 100, "model-00002-of-00002": 200}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    assert weight_files_bytes(tmp_path) == 300
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert weight_files_bytes(tmp_path) == 100
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}))
    assert weight_files_bytes(tmp_path) is None, "not all of them are there"
    index.write_text("[]")
    with pytest.raises(Problem, match="not an index"):
        weight_files_bytes(tmp_path)
    index.unlink()
    for path in tmp_path.glob("model*.safetensors"):
        path.unlink()
    assert weight_files_bytes(tmp_path) == 300, "nothing else is there"


# ---- keys that may change sizes

# Read, but without effect: all layers have experts of another width; MLA keeps one vector for all heads.
IDLE = [("Qwen3-30B-A3B", "intermediate_size"), ("DeepSeek-V3", "num_key_value_heads")]
IDLE += [("DeepSeek-V4-Flash", "num_key_value_heads")]
# The same of families: a list of layers says it, all layers have experts, only files tell, another key comes first.
WITHOUT_EFFECT = {
    "global_attn_every_n_layers": "afmoe gte-modernbert-base",
    "num_nextn_predict_layers": (
        "DeepSeek-V3.2 deepseek_v3 Ernie-4.5-21B-A3B GLM-4.5-Air GLM-4.6 GLM-4.7-Flash GLM-5 MiMo-7B"
    ),
    "intermediate_size": (
        "deepseek_v2 granite-4.0-h-micro granite-4.0-micro Hunyuan-A13B LFM2-1.2B mellum Nemotron-3-Nano-30B-A3B "
        "qwen2_moe Qwen3-235B-A22B Qwen3-Coder-480B-A35B Qwen3-Next-80B-A3B Qwen3-VL-30B-A3B"
    ),
    "num_kv_heads": "falcon",
    "mamba_expand": "Falcon-H1-7B granite-4.0-h-micro granite-4.0-h-small granite-4.0-h-tiny granite-4.0-micro",
    "mamba_d_state": "granite-4.0-micro",
    "mamba_n_groups": "granite-4.0-micro",
    "mamba_n_heads": "granite-4.0-micro",
    "mamba_d_conv": "granite-4.0-micro",
    "hidden_size": "InternVL3-8B paligemma Qwen2-VL-7B voxtral",
}
FAMILIES = [json.loads(line) for line in (ROOT / "tests" / "families.jsonl").read_text().splitlines()]
FAMILIES = [family for family in FAMILIES if not family.get("refused")]
SIZED = [
    (name, key)
    for name, config in CONFIGS.items()
    for key, value in (config.get("text_config") or config).items()
    if SIZES.search(key) and key not in HARMLESS and isinstance(value, int) and value
    if name != "mamba-2.8b" and (name, key) not in IDLE
]


def changed(name: str, **keys: Any) -> Model:
    """The model of a recorded config with some keys of its language model changed."""
    config = CONFIGS[name]
    part = {"text_config": config["text_config"] | keys} if "text_config" in config else keys
    return read_model(config | part, "x")


@given(
    name=st.sampled_from([name for name in CONFIGS if name != "mamba-2.8b"]),
    key=st.text("abcdefgh_", min_size=1, max_size=12),
    kind=st.sampled_from(["_dim", "_size", "_heads", "_layers", "_groups", "_ratio", "_ratios", "_rank"]),
    value=st.integers(1, 10**6) | st.lists(st.integers(), min_size=1),
)
def test_a_key_of_a_size_that_is_not_known_is_refused_by_its_name(name: str, key: str, kind: str, value: Any) -> None:
    unknown = f"x_{key}{kind}"
    with pytest.raises(Problem, match=f"{unknown}, which may change sizes"):
        changed(name, **{unknown: value})
    config = CONFIGS[name]
    part = {"text_config": config["text_config"] | {unknown: value}} if "text_config" in config else {unknown: value}
    trusted = read_model(config | part, "x", trust=True)
    assert trusted.unread == (unknown,)
    assert replace(trusted, unread=()) == read_model(config, "x"), "planned without it"


def places(part: Any) -> Iterator[dict[str, Any]]:
    """The objects of a config.json in which a key may change sizes, the outermost first."""
    if isinstance(part, list):
        for one in part:
            yield from places(one)
    elif isinstance(part, dict):
        yield part
        for key, value in part.items():
            if key not in OPAQUE - {"text_config", "llm_config"}:
                yield from places(value)


def sizes(part: dict[str, Any]) -> list[str]:
    """Its keys that change sizes."""
    return [
        key
        for key, value in part.items()
        if SIZES.search(key) and key not in HARMLESS | TOWER_HARMLESS and type(value) is int and value
    ]


@given(
    family=st.sampled_from(FAMILIES),
    place=st.integers(0, 9),
    kind=st.sampled_from(["_dim", "_size", "_heads", "_layers", "_groups", "_ratio", "_rank"]),
)
def test_a_key_that_is_not_known_is_refused_wherever_it_lies(family: dict[str, Any], place: int, kind: str) -> None:
    """Beside the language model, in its parts and in its towers."""
    config = copy.deepcopy(family["config"])
    found = list(places(config))
    found[place % len(found)][f"x{kind}"] = 7
    with pytest.raises(Problem, match=f"x{kind}[ ,].*which may change sizes"):
        read_model(config, "x")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["name"])
def test_a_size_in_any_part_changes_the_model_or_is_refused(family: dict[str, Any]) -> None:
    plain = read_model(family["config"], "x")
    idle = set()
    for place, part in enumerate(places(family["config"])):
        for key in sizes(part):
            config = copy.deepcopy(family["config"])
            list(places(config))[place][key] *= 2
            with contextlib.suppress(Problem):
                if read_model(config, "x") == plain:
                    idle.add(key)
    assert idle == {key for key, families in WITHOUT_EFFECT.items() if family["name"] in families.split()}


def test_a_list_with_a_value_for_each_layer_is_read_or_refused() -> None:
    with pytest.raises(Problem, match="x_kinds"):
        llama(x_kinds=["a"] * 32)
    assert llama(x_words=["a"] * 3), "of another length it is not one a layer"


@pytest.mark.parametrize(("name", "key"), SIZED)
def test_a_key_of_a_size_changes_the_model_or_is_refused(name: str, key: str) -> None:
    """Whatever a recorded config says of sizes is read."""
    value = (CONFIGS[name].get("text_config") or CONFIGS[name])[key]
    with contextlib.suppress(Problem):
        assert changed(name, **{key: 2 * value}) != read_model(CONFIGS[name], "x")


@pytest.mark.parametrize(
    "keys",
    [
        {"num_nextn_predict_layers": 1},
        {"mtp_num_hidden_layers": 1},
        {"rope_ratio": 500},
        {"sliding_window_size": 4096},
        {"image_size": 448, "patch_size": 14, "vision_batch_size": 16},
        {"num_beam_groups": 1},
        {"lora_rank": 4},
        {"matryoshka_dims": [32, 64, 128]},
        {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
        {"transformers.js_config": {"device_config": {"webgpu": {"dtype": "q4f16"}}}},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_keys_that_public_configs_have_and_that_change_no_size_are_known(keys: dict[str, Any]) -> None:
    assert llama(**keys) == llama()


@pytest.mark.parametrize(("kind", "billions"), [("llama", 6.74), ("mistral", 7.24)])
def test_a_part_that_says_only_what_differs_from_its_class_has_the_rest_from_there(kind: str, billions: float) -> None:
    """As LLaVA and Pixtral do; a config of its own has to say it."""
    part = {"model_type": kind, "torch_dtype": "bfloat16"}
    model = read_model({"architectures": ["LlavaForConditionalGeneration"], "text_config": part}, "x")
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    with pytest.raises(Problem, match="hidden_size"):
        read_model(part | {"architectures": ["LlamaForCausalLM"]}, "x")


# ---- what is no model that the planner knows


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model-Q4_K_M.gguf": "GGUF"}, "is a model in GGUF, .* take the model in safetensors"),
        ({"model.gguf": "GGUF", "config.json": json.dumps(LLAMA)}, "is a model in GGUF"),
        (
            {
                "adapter_config.json": '{"base_model_name_or_path": "me/base"}',
                "adapter_model.safetensors": "",
                "training_args.bin": "",
                "config.json": json.dumps(LLAMA),
            },
            "is an adapter of me/base",
        ),
        ({"adapter_config.json": '{"base_model_name_or_path": "me/base"}'}, "is an adapter of me/base.* plan me/base"),
        ({"model_index.json": "{}"}, "is a diffusion pipeline"),
        (
            {"config.json": "version https://git-lfs.github.com/spec/v1\noid"},
            "a git-LFS pointer.*lfs pull",
        ),
        (
            {"config.json": json.dumps(LLAMA), "model.safetensors": "version https://git-lfs.github.com/spec/v1\noid"},
            "model.safetensors is a git-LFS pointer",
        ),
        ({"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}, "width": 7}'}, "code of its own"),
        ({"config.json": '{"model_type": "whisper", "is_encoder_decoder": true}'}, r"encoder-decoder \(whisper\)"),
        ({"config.json": '{"model_type": "t5", "d_model": 512}'}, r"encoder-decoder \(t5\)"),
    ],
)
def test_what_is_no_such_model_is_called_by_its_name(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(Problem, match=words):
        load_model(str(tmp_path), tmp_path)


# ---- layers of several kinds


def test_an_embedding_for_each_layer_is_never_quantized() -> None:
    """Of Gemma's E-models it is a third of all, and looked up in 16 bits."""
    model = read_model(CONFIGS["gemma-4-E4B-it"], "x")
    assert model.weights.look_up == 262144 * 256 * 42
    assert model.tower
    whole = 2 * (model.weights.look_up + model.weights.embedding + model.tower.parameters)
    for tp in (1, 2):
        small = memory.weight_bytes(model.quantized("bitsandbytes"), tp, 1, 0)
        assert small > whole / tp + model.layers * model.weights.split * 4.5 / 8 / tp
    assert memory.weight_bytes(model, 1, 1, 0) > 14.5 * GIB


@pytest.mark.parametrize("machine", ["t4", "5080"])
def test_an_e_model_is_not_planned_whole_where_it_runs_out_of_memory(machine: str) -> None:
    host = load_machine(ROOT / "tests" / "machines" / "cases" / f"{machine}.json")
    with pytest.raises(Problem, match="does not fit"):
        choose.choose(host, read_model(CONFIGS["gemma-4-E4B-it"], "x"), Wish(quantization="none"))


def test_layers_that_see_all_have_a_shape_of_their_own() -> None:
    model = read_model(CONFIGS["gemma-4-31B-it"], "x")
    assert set(model.attention.cached) == {Cached(50, 16, 256, window=1024), Cached(10, 4, 512)}
    # a page of these holds twice the tokens of one with a window
    blocks = 5 * (ceil((1023 + 2 * 2048) / 16) + 1) + 262144 // 32
    assert memory.request_bytes(model, 1, 60, 262144, Settings(256, 2048)) == blocks * 10 * 16 * 2 * 16 * 256 * 2


def test_layers_that_share_what_others_keep_keep_nothing() -> None:
    model = read_model(CONFIGS["gemma-4-E4B-it"], "x")
    assert set(model.attention.cached) == {Cached(20, 2, 256, window=512), Cached(4, 2, 512)}


def test_a_dense_mlp_beside_experts_is_counted() -> None:
    text = CONFIGS["gemma-4-31B-it"]["text_config"]
    experts = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "enable_moe_block": True}
    shape = {"hidden_size": 2816, "intermediate_size": 2112, "num_attention_heads": 16, "num_key_value_heads": 8}
    layers = {"num_hidden_layers": 30, "layer_types": text["layer_types"][:30], "num_global_key_value_heads": 2}
    model = changed("gemma-4-31B-it", **experts, **shape, **layers)
    assert model.parameters / 1e9 == pytest.approx(25.2, rel=0.03)
    assert model.active_parameters / 1e9 == pytest.approx(3.8, rel=0.05)


def test_layers_without_attention_keep_nothing() -> None:
    """Of Nemotron's 80 layers 49 have one, and their MLPs are of many widths."""
    model = read_model(CONFIGS["Nemotron-Super-49B"], "x")
    assert model.attention.cached == (Cached(49, 8, 128),)
    assert model.tp_sizes(8) == [1, 2, 4, 8]
    # the first half of them is far heavier than the second
    host = load_machine(ROOT / "tests" / "machines" / "cases" / "h100x2.json")
    assert choose.choose(host, model, Wish()).layout == "1 × tp 2"
    with pytest.raises(Problem, match="has layers of many sizes, which works in one stage only"):
        choose.choose(host, model, Wish(pp=2))


# ---- layers that keep a state

QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 2048,
    "intermediate_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
    "head_dim": 256, "vocab_size": 151936, "max_position_embeddings": 262144, "full_attention_interval": 4,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
NEMOTRON_H_8B = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hidden_size": 4096,
    "intermediate_size": 21504, "num_hidden_layers": 52, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 8192, "mamba_num_heads": 128,
    "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "tie_word_embeddings": False,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
}  # fmt: skip
KIMI_LINEAR = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "hidden_size": 2304,
    "intermediate_size": 9216, "num_hidden_layers": 27, "num_attention_heads": 32, "num_key_value_heads": 32,
    "head_dim": 72, "vocab_size": 163840, "model_max_length": 1048576, "kv_lora_rank": 512, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts": 256,
    "num_experts_per_token": 8, "num_shared_experts": 1, "moe_intermediate_size": 1024, "moe_layer_freq": 1,
    "first_k_dense_replace": 1, "tie_word_embeddings": False,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32,
        "short_conv_kernel_size": 4, "kda_layers": [n for n in range(1, 27) if n % 4],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions", "active", "layers"),
    [
        (QWEN3_NEXT, 79.7, 3.6, {36: True, 12: False}),
        (NEMOTRON_H_8B, 8.1, None, {24: True, 4: False}),
        (KIMI_LINEAR, 48.5, 3.3, {20: True, 7: False}),
    ],
)
def test_models_with_a_state_are_counted_as_published(
    config: dict[str, Any], billions: float, active: float | None, layers: dict[int, bool]
) -> None:
    model = read_model(config, "x")
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.02)
    if active:
        assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.1)
    assert {one.layers: bool(one.state) for one in model.attention.cached} == layers


def test_pages_of_attention_are_as_large_as_a_state() -> None:
    """As vLLM 0.32 aligns them, in groups of one size; a request keeps two states of each group."""
    model = read_model(QWEN3_NEXT, "x")
    state = 3 * (2 * 16 * 128 + 32 * 128) * 2 + 32 * 128 * 128 * 2
    token = 2 * 2 * 256 * 2
    block = ceil(state / (16 * token)) * 16
    blocks = ceil(262144 / block) + 3 * 2
    assert memory.request_bytes(model, 1, 48, 262144, Settings(256, 2048)) == blocks * block * token * 12
    assert memory.kv_bytes_per_token(model, 1, 48) == 12 * token, "a state grows with no token"
    assert model.tp_sizes(16) == [1, 2, 4, 8, 16]


# ---- layers that look up what they see in an index


@pytest.mark.parametrize(
    ("said", "layers"),
    [
        ({}, 78),
        ({"index_topk_freq": 3}, 27),  # as GLM-5.2 keeps them
        ({"index_topk_pattern": "FSS" * 26}, 26),
        ({"indexer_types": ["full", "shared"] * 39}, 39),
    ],
)
def test_layers_may_share_what_an_index_found(said: dict[str, Any], layers: int) -> None:
    glm = next(family["config"] for family in FAMILIES if family["name"] == "GLM-5")
    model = read_model(glm | said, "x")
    assert set(model.attention.cached) == {Cached(78, 0, 256, latent=576), Cached(layers, 0, 128, row=132)}
    request = memory.request_bytes(model, 8, 78, 16384, Settings(256, 8192))
    assert request == 16384 * (78 * 576 * 2 + layers * 132), "whole on each GPU"


# ---- rows for several tokens


def test_deepseek_v4_weighs_what_it_was_seen_to_weigh() -> None:
    """79 GiB a GPU over two RTX PRO 6000, where it works."""
    model = read_model(CONFIGS["DeepSeek-V4-Flash"], "x")
    assert model.parameters / 1e9 == pytest.approx(284, rel=0.01)
    assert memory.weight_bytes(model, 2, 1, 0) / GIB == pytest.approx(79, rel=0.08)
    host = load_machine(ROOT / "tests" / "machines" / "cases" / "pro6000x2.json")
    plan = choose.choose(host, model, Wish())
    assert (plan.layout, plan.quantization) == ("1 × tp 2", None)


def test_a_longer_request_of_deepseek_v4_keeps_more() -> None:
    model, settings = read_model(CONFIGS["DeepSeek-V4-Flash"], "x"), Settings(256, 2048)
    short, long = (memory.request_bytes(model, 4, 43, length, settings) for length in (131072, 1048576))
    row, index = 448 + 2 * 64 + 8, 128 + 4
    assert long - short == (1048576 - 131072) * (21 * (row + index) // 4) + (1048576 - 131072) // 128 * 20 * row


def test_stages_with_nothing_but_experts_are_heavier_than_the_first() -> None:
    """Three of DeepSeek's 61 layers have none, and a stage of only such that do has more than its share."""
    model = read_model(CONFIGS["DeepSeek-V3"], "x")
    assert model.weights.plain == 3
    one = memory.weight_bytes(model, 8, 1, 0)
    first, last = (memory.weight_bytes(model, 8, 2, stage) for stage in (0, 1))
    experts = 256 * 3 * 7168 * 2048 * model.bits / 8 / 8
    # 28 of the first 31 have experts, and all of the last 30
    assert last - first == pytest.approx(2 * experts, rel=0.05)
    assert first + last == pytest.approx(one, rel=0.001)


# ---- quantized checkpoints


def ct(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}


@pytest.mark.parametrize(
    ("found", "bits", "group"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8, 128),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, 8, 0),
        ({"quant_method": "mxfp8"}, 8.25, 0),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8, 0),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5, 16),
        ({"quant_method": "modelopt_fp4", "quantization": {"quant_algo": "W4A16_NVFP4"}}, 4.5, 16),
        (MODELOPT, 4.5, 16),
        (ct(num_bits=8, type="float", strategy="channel"), 8, 0),
        (ct(num_bits=8, type="float", strategy="block", block_structure=[128, 128]), 8, 128),
        (ct(num_bits=4, type="int", group_size=128), 4.125, 128),
        (ct(num_bits=4, type="int", group_size=128, symmetric=False), 4.15625, 128),
        (ct(num_bits=4, type="float", group_size=16), 4.5, 16),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, 16, 0),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, 8, 0),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}}}, 4.25, 32),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, 5, 0),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 8, 0),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, 4.15625, 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.15625, 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4.15625, 128),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, 0),
    ],
)
def test_bits_of_quantized_checkpoints(found: dict[str, Any], bits: float, group: int) -> None:
    model = llama(quantization_config=found)
    assert model.quantization, "it is not quantized again while it loads"
    assert (model.bits, model.quantization.group) == (bits, group)


def test_attention_that_is_left_out_keeps_its_bits() -> None:
    left_out = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.self_attn.q_proj"]}
    assert 9.5 < llama(quantization_config=left_out).bits < 10, "a fifth of a layer"
    tower = {"quant_method": "fp8", "modules_to_not_convert": ["vision_tower.layers.0.self_attn.q_proj"]}
    assert llama(quantization_config=tower).bits == 8
    experts = read_model(CONFIGS["Qwen3-30B-A3B"] | {"quantization_config": left_out}, "x")
    assert experts.quantization
    assert experts.quantization.experts_only


def test_experts_of_four_bits_beside_all_else_in_sixteen_weigh_what_their_files_weigh() -> None:
    """Kimi K2.5 is published so, in files of 595 GB."""
    config = next(family["config"] for family in FAMILIES if family["name"] == "Kimi-K2.5")
    found = ct(num_bits=4, type="int", group_size=32, symmetric=True) | {"ignore": ["lm_head", "re:.*self_attn.*"]}
    model = read_model(config | {"text_config": config["text_config"] | {"quantization_config": found}}, "x")
    assert memory.total_weight_bytes(model) / 1e9 == pytest.approx(595, rel=0.005)


def test_files_at_hand_tell_the_bits() -> None:
    """Of a method that says none, and where more is left in 16 bits than the method says."""
    whole = llama(quantization_config={"quant_method": "fp8"})
    halves = 2 * (whole.weights.embedding + whole.weights.head + 32 * whole.weights.replicated)
    linear = 32 * whole.weights.split
    for method in ("new", "fp8"):
        config = LLAMA | {"quantization_config": {"quant_method": method}}
        assert read_model(config, "x", halves + linear).bits == pytest.approx(8, rel=0.001)
        assert read_model(config, "x", halves + linear * 5 // 4).bits == pytest.approx(10, rel=0.001)
    assert read_model(config, "x", halves + linear // 2).bits == 8, "fewer than it says: some are missing"
    with pytest.raises(Problem, match="does not say how many bits new keeps"):
        llama(quantization_config={"quant_method": "new"})


def test_nvidias_older_checkpoints_are_known_as_quantized(tmp_path: Path) -> None:
    """They say so in a file of its own."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load_model(str(tmp_path), tmp_path).quantization is None
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    model = load_model(str(tmp_path), tmp_path)
    assert model.quantization
    assert (model.quantization.method, model.bits) == ("modelopt", 4.5)


# ---- models that give vectors or scores

BERT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "vocab_size": 250002, "max_position_embeddings": 8194,
}  # fmt: skip
MEAN = {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}}
LAST = {"1_Pooling/config.json": {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}}


@pytest.mark.parametrize(
    ("architecture", "changed", "files", "expected"),
    [
        ("XLMRobertaModel", BERT, {}, (True, True, True)),
        ("XLMRobertaForSequenceClassification", BERT, {}, (True, True, True)),
        ("BertForSequenceClassification", BERT, {}, (True, True, True)),
        ("RobertaForMaskedLM", BERT, {}, (True, True, True)),
        ("ModernBertForSequenceClassification", BERT, {}, (True, True, True)),
        ("GteNewForSequenceClassification", BERT, {}, (True, True, True)),
        ("NewModel", BERT, {}, (True, True, True)),
        ("LlamaBidirectionalModel", {}, {}, (True, True, True)),
        ("Qwen2ForCausalLM", {"is_causal": False}, LAST, (True, True, True)),
        ("Gemma3TextModel", {"use_bidirectional_attention": True}, MEAN, (True, True, True)),
        ("LlamaForCausalLM", {}, MEAN, (True, False, True)),
        ("LlamaForCausalLM", {}, {"1_Pooling/config.json": {"pooling_mode": "cls"}}, (True, False, True)),
        ("Qwen2ForProcessRewardModel", {}, {}, (True, False, True)),
        ("Qwen3ForCausalLM", {}, LAST, (True, False, False)),  # Qwen3-Embedding
        ("MistralModel", {}, LAST, (True, False, False)),  # e5-mistral
        ("Qwen3ForSequenceClassification", {}, {}, (True, False, False)),
        ("LlamaForCausalLM", {"is_causal": False}, {}, (False, False, False)),
        ("GPT2LMHeadModel", {}, {}, (False, False, False)),
        ("ChatGLMModel", {}, {}, (False, False, False)),
        ("InternVLChatModel", {}, {}, (False, False, False)),
        ("PEagleDraftModel", {}, {}, (False, False, False)),
    ],
)
def test_models_that_are_pooled_are_known(
    architecture: str, changed: dict[str, Any], files: dict[str, Any], expected: tuple[bool, bool, bool]
) -> None:
    model = read_model(LLAMA | changed | {"architectures": [architecture]}, "x", further=files.get)
    encoder = bool(model.pooling and model.pooling.encoder)
    assert (model.pooling is not None, encoder, model.whole_prompts) == expected
    assert (memory.kv_bytes_per_token(model, 1, model.layers) == 0) == encoder


@pytest.mark.parametrize("machine", ["one-24gb", "two-h200", "home-lab"])
def test_a_prompt_of_a_model_that_sees_all_of_it_fits_into_one_step(machine: str) -> None:
    host = load_machine(ROOT / "tests" / "machines" / f"{machine}.json")
    for changed, files in (({"is_causal": False}, LAST), ({}, MEAN)):
        model = read_model(LLAMA | changed, "x", further=files.get)
        for wish in (Wish(), Wish(context=8192)):
            plan = choose.choose(host, model, wish)
            assert plan.max_length >= 4096
            assert all(one.settings.max_batched_tokens >= plan.max_length for one in plan.replicas)
            assert all(one.account.used <= gpu.free for one in plan.replicas for gpu in one.gpus)


def test_a_model_pooled_by_its_last_token_keeps_vllms_own_batch() -> None:
    host = load_machine(ROOT / "tests" / "machines" / "one-24gb.json")
    plan = choose.choose(host, read_model(LLAMA, "x", further=LAST.get), Wish())
    assert plan.replicas[0].settings == Settings(256, 2048)
    assert plan.replicas[0].account.kv_tokens > 0


@pytest.mark.parametrize(
    ("changed", "files", "length"),
    [
        ({}, {}, 8192),
        ({}, {"sentence_bert_config.json": {"max_seq_length": 512}}, 512),
        ({}, {"sentence_roberta_config.json": {"max_seq_length": 256}}, 256),
        ({}, {"sentence_bert_config.json": {"max_seq_length": None}}, 8192),
        ({}, {"tokenizer_config.json": {"model_max_length": 512}}, 8192),
        ({"position_embedding_type": "absolute"}, {"tokenizer_config.json": {"model_max_length": 512}}, 512),
        ({"position_embedding_type": "absolute"}, {"tokenizer_config.json": {"model_max_length": 1e30}}, 8192),
    ],
)
def test_what_sentence_transformers_states_caps_the_length(
    changed: dict[str, Any], files: dict[str, Any], length: int
) -> None:
    config = BERT | {"architectures": ["XLMRobertaModel"]} | changed
    assert read_model(config, "x", further=files.get).max_length == length


# ---- configs that say little, or say it in words of their own

GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
GEMMA2_9B = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 256, "hidden_size": 3584,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 42,
    "num_key_value_heads": 8, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
LLAMA4 = {
    "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "model_type": "llama4_text",
    "num_attention_heads": 40, "num_hidden_layers": 48, "num_key_value_heads": 8, "head_dim": 128,
    "num_experts_per_tok": 1, "vocab_size": 202048, "max_position_embeddings": 1048576,
}  # fmt: skip


def llama4(experts: int, step: int) -> dict[str, Any]:
    text = LLAMA4 | {"num_local_experts": experts, "interleave_moe_layer_step": step}
    return {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": text}


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        (GEMMA3_4B, 3.88, None),
        (GEMMA2_9B, 9.24, None),
        (llama4(16, 1), 107.8, 17),  # Scout without its tower
        (llama4(128, 2), 400.7, 17),  # Maverick
    ],
)
def test_configs_that_leave_much_to_their_class(config: dict[str, Any], billions: float, active: float | None) -> None:
    model = read_model(config, "x")
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    if active:
        assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.1)


def test_gemma_3_is_read_from_the_little_that_it_says() -> None:
    model = read_model(GEMMA3_4B, "x")
    assert (model.attention.heads, model.attention.kv_heads, model.attention.head_dim) == (8, 4, 256)
    assert (model.attention.window, model.attention.sliding_layers, model.max_length, model.weights.head) == (
        1024,
        29,
        131072,
        0,
    )
    assert read_model(GEMMA2_9B, "x").attention.sliding_layers == 21


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "mamba", "state_size": 16},
        {"model_type": "mine", "ssm_cfg": {"layer": "Mamba1"}},
        {"model_type": "jamba", "mamba_d_state": 16},
        {"model_type": "zamba2"},
    ],
)
def test_models_with_a_recurrent_state_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(Problem, match="recurrent state"):
        llama(**changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "kimi_k3"}, "me/model has attention and experts of shapes"),
        ({"architectures": ["MllamaForConditionalGeneration"]}, r"me/model: vLLM serves no Mllama.* was 0\.10\.2"),
        ({"moe_intermediate_size": [1536, 512], "num_local_experts": 8}, "several numbers for moe_intermediate_size"),
    ],
)
def test_what_is_known_not_to_work_is_said(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(Problem, match=words):
        read_model(LLAMA | changed, "me/model")


def test_a_config_that_is_nested_without_end_is_refused_in_one_line() -> None:
    nested: dict[str, Any] = {}
    for _ in range(2000):
        nested = {"deeper": nested}
    with pytest.raises(Problem, match="not one of a language model"):
        llama(x=nested)


def test_gpt_oss_is_split_over_any_of_its_heads_and_padded() -> None:
    """2880 is no multiple of a block of weights and their scale over 4 GPUs: vLLM rounds it up."""
    model = read_model(CONFIGS["gpt-oss-20b"], "x")
    assert model.tp_sizes(8) == [1, 2, 4, 8]
    experts = 24 * 32 * 3 * 2880 * 2880 * 4.25 / 8
    assert memory.total_weight_bytes(model) == pytest.approx(
        experts * 2944 * 3072 / 2880**2 + 2 * (model.parameters - model.layers * model.weights.experts), rel=0.001
    )
    assert memory.weight_bytes(model, 4, 1, 0) > memory.weight_bytes(model, 1, 1, 0) / 4 * 1.02


def test_layers_that_only_guess_tokens_are_not_loaded() -> None:
    plain = llama()
    files = 2 * plain.parameters * 33 // 32
    model = read_model(LLAMA | {"num_nextn_predict_layers": 1}, "x", files)
    assert memory.total_weight_bytes(model) == pytest.approx(memory.total_weight_bytes(plain), rel=0.001)


def test_qwen_has_a_window_only_where_it_says_so() -> None:
    assert llama(model_type="qwen2", sliding_window=4096).attention.sliding_layers == 0
    assert llama(model_type="mistral", sliding_window=4096).attention.sliding_layers == 32


def test_a_vision_tower_is_reserved_for() -> None:
    """Its share of the weights, and a step of pictures that vLLM lets it see before it lays out the KV cache."""
    gemma = read_model(CONFIGS["gemma-3-27b-it"], "x")
    blind = read_model({**CONFIGS["gemma-3-27b-it"], "vision_config": None}, "x")
    assert gemma.tower
    assert 0.42e9 < gemma.tower.parameters < 0.6e9, "0.42 billion, and what is not known of it"
    for tp in (1, 2):
        more = memory.weight_bytes(gemma, tp, 1, 0) - memory.weight_bytes(blind, tp, 1, 0)
        assert more == pytest.approx(2 * gemma.tower.parameters / tp, rel=1e-6)
    for batch, pictures in ((2048, 8), (8192, 32)):
        # its MLP's input and output of the activation, of 4096 patches a picture
        mlp = 2 * 2 * 4304 * 4096 * pictures
        assert mlp < memory.activation_bytes(gemma, 1, True, Settings(256, batch)) < 3 * mlp


def test_a_tower_that_takes_pictures_of_any_size_is_shown_a_large_one() -> None:
    any_size, one_size = (
        read_model(LLAMA | {"vision_config": {"embed_dim": 1280, "depth": 32} | more}, "x")
        for more in ({}, {"image_size": 448, "patch_size": 14})
    )
    small = Settings(256, 1024)
    ratio = memory.activation_bytes(any_size, 1, True, small) / memory.activation_bytes(one_size, 1, True, small)
    assert ratio == pytest.approx(65536 / (16 * 1024), rel=0.01)


def test_a_vision_tower_is_counted_once_where_the_files_are_at_hand() -> None:
    config = CONFIGS["gemma-3-27b-it"]
    plain = read_model(config, "x")
    assert plain.tower
    files = 2 * plain.parameters + 840_000_000
    assert memory.total_weight_bytes(read_model(config, "x", files)) == pytest.approx(files, rel=0.001)
    quantized = {**config, "quantization_config": {"quant_method": "fp8"}}
    eight = 2 * plain.parameters - plain.layers * plain.weights.split + 2 * plain.tower.parameters
    assert memory.total_weight_bytes(read_model(quantized, "x", eight)) == pytest.approx(eight, rel=0.001)


def test_a_tower_that_says_nothing_of_itself_is_a_large_one() -> None:
    silent = llama(vision_config={}).tower
    own = llama(vision_config={"embed_dim": 1280, "depth": 32, "hidden_size": 3584}).tower
    assert silent
    assert own
    assert silent.parameters > 0.6e9
    assert own.parameters < 1e9, "hidden is not its own"


def test_the_hub_is_asked_for_what_config_json_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is quantized says so elsewhere, one that is pooled states a shorter length elsewhere."""
    there = {"config.json": LLAMA, "hf_quant_config.json": MODELOPT}

    def get(_: httpx2.Client, __: str, url: str, **___: Any) -> httpx2.Response:
        file = url.partition("/me/model/resolve/main/")[2]
        return httpx2.Response(200, json=there[file]) if file in there else httpx2.Response(404)

    monkeypatch.setattr("httpx2.Client.request", get)
    model = load_model("me/model", ROOT / "models")
    assert (model.bits, model.pooling, model.max_length) == (4.5, None, 131072)
    there |= {**LAST, "sentence_bert_config.json": {"max_seq_length": 4096}}
    model = load_model("me/model", ROOT / "models")
    assert model.pooling
    assert model.max_length == 4096


def test_a_hub_that_breaks_off_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: httpx2.Client, __: str, url: str, **___: Any) -> httpx2.Response:
        if url.endswith("/config.json"):
            return httpx2.Response(200, json=LLAMA)
        raise httpx2.ConnectError("gone")

    monkeypatch.setattr("httpx2.Client.request", get)
    with pytest.raises(Problem, match="cannot reach"):
        load_model("me/model", ROOT / "models")
