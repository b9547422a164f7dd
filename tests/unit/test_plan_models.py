"""What the planner reads in a model's files, as vLLM 0.32 reads it."""

import json
from pathlib import Path
from typing import Any

import pytest

from planner.model import Model, load_model, read_model, weight_files_bytes
from stack.console import Problem
from tests.conftest import ROOT

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
    assert (model.bits, model.group_size) == (bits, group)
    assert model.quantization, "it is not quantized again while it loads"


def test_attention_that_is_left_out_keeps_its_bits() -> None:
    left_out = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.self_attn.q_proj"]}
    assert 9.5 < llama(quantization_config=left_out).bits < 10, "a fifth of a layer"
    tower = {"quant_method": "fp8", "modules_to_not_convert": ["vision_tower.layers.0.self_attn.q_proj"]}
    assert llama(quantization_config=tower).bits == 8
    experts = read_model(CONFIGS["Qwen3-30B-A3B"] | {"quantization_config": left_out}, "x")
    assert experts.quantized_experts_only


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
    assert (model.quantization, model.bits) == ("modelopt", 4.5)
