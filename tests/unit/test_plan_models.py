"""What the planner reads in a model's files, as vLLM 0.32 reads it."""

import json
from pathlib import Path
from typing import Any

import pytest

from planner.model import Model, read_model, weight_files_bytes
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
