"""Presets: data that the launcher takes as it is, and that the planner adds a host's sizes to."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import plan as command
from planner import render
from planner.choose import Wish
from planner.machine import load_machine
from stack.shell import ROOT
from vllm import launch

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_launcher_takes_each_preset(path: Path, tmp_path: Path) -> None:
    preset = yaml.safe_load(path.read_text())
    assert set(preset) == {"about", "needs", "settings"}
    (tmp_path / "engine.yaml").write_text("")
    settings = {name: str(value) for name, value in preset["settings"].items()}
    mistakes = launch.Mistakes()
    read = launch.read_settings(tmp_path / "engine.yaml", settings, mistakes)
    assert not mistakes.lines
    assert read
    assert read.model == settings["MODEL"]
    documented = (ROOT / ".env.example").read_text()
    for name in settings:
        assert f"{name}=" in documented, f"{name} is no setting of .env.example"


def test_every_kind_of_preset_is_there() -> None:
    every = {path.stem: yaml.safe_load(path.read_text())["settings"] for path in PRESETS}
    methods = {json.loads(one["SPECULATIVE_CONFIG"])["method"] for one in every.values() if "SPECULATIVE_CONFIG" in one}
    assert methods == {"ngram", "draft_model", "eagle3"}
    assert {one["QUANTIZATION"] for one in every.values() if "QUANTIZATION" in one} == {"bitsandbytes", "fp8"}


QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936,
    "max_position_embeddings": 40960,
}  # fmt: skip
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288,
}  # fmt: skip
QWEN3_06B = QWEN3 | {
    "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072,
    "tie_word_embeddings": True,
}  # fmt: skip
# of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, 0.85 GB
EAGLE = {
    "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "draft_vocab_size": 32000,
    "max_position_embeddings": 2048,
}  # fmt: skip
# as RedHatAI's and Qwen's checkpoints have it
FP8 = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with what the presets name in models/, config.json alone."""
    for name in ("scripts", "presets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    configs = {
        "Qwen/Qwen3-8B": QWEN3_8B,
        "Qwen/Qwen3-0.6B": QWEN3_06B,
        "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": EAGLE,
    }
    for name in (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct-AWQ",
    ):
        path = ROOT / "tests" / "models" / Path(name).name / "config.json"
        configs[name] = json.loads(path.read_text())
    llama, qwen = configs["meta-llama/Llama-3.1-8B-Instruct"], configs["Qwen/Qwen2.5-7B-Instruct-AWQ"]
    configs["RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8"] = llama | {"quantization_config": FP8}
    configs["Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"] = qwen | {"quantization_config": GPTQ}
    for name, config in configs.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def run_plan(checkout: Path, *args: str, machine: str) -> subprocess.CompletedProcess[str]:
    recorded = ROOT / "tests" / "machines" / f"{machine}.json"
    command = [sys.executable, str(checkout / "scripts" / "plan.py"), *args, "--machine", str(recorded), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def plan(checkout: Path, *args: str, machine: str) -> dict[str, Any]:
    run = run_plan(checkout, *args, machine=machine)
    assert not run.returncode, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)["models"][0]
    return found


def test_the_planner_adds_this_hosts_sizes_to_a_preset(checkout: Path) -> None:
    found = plan(checkout, "deepseek-r1-1.5b-4bit", machine="home-lab")
    assert (found["quantization"], found["max_model_len"]) == ("bitsandbytes", 16384)
    assert found["replicas"][0]["memory"]["weights"] < 1.9 * 2**30, "4-bit layers, 16-bit embedding and head"


def test_what_the_user_asks_for_wins_over_the_preset(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ROOT", checkout)
    host = load_machine(ROOT / "tests" / "machines" / "eight-h100.json")
    asked = Wish(context=4096, quantization="none", kv_cache="auto", max_batched_tokens=2048, replicas=1)
    for path in PRESETS:
        if (checkout / "models" / yaml.safe_load(path.read_text())["settings"]["MODEL"]).exists():
            part = command.plan_all(host, path.stem, [], None, asked)[0]
            written = render.environment(part, part.plan.replicas[0])
            assert written["MAX_MODEL_LEN"] == "4096"
            assert written["MAX_NUM_BATCHED_TOKENS"] == "2048"
            assert (written["QUANTIZATION"], written["KV_CACHE_DTYPE"]) == ("", "")


def test_a_draft_model_needs_memory_too(checkout: Path) -> None:
    alone = plan(checkout, "Qwen/Qwen3-8B", "--context", "16384", machine="two-h200")["replicas"][0]
    drafted = plan(checkout, "speculative-draft", machine="two-h200")["replicas"][0]
    weights = drafted["memory"]["weights"] - alone["memory"]["weights"]
    assert weights / 2**30 == pytest.approx(1.11, rel=0.02), "0.6 B parameters in 16 bits"
    per_token = [one["memory"]["kv"] / one["kv_tokens"] / 1024 for one in (alone, drafted)]
    assert per_token == pytest.approx([144, 144 + 112], rel=0.01)


def test_a_head_that_guesses_needs_memory_too(checkout: Path) -> None:
    alone = plan(checkout, "meta-llama/Llama-3.1-8B-Instruct", "--context", "16384", machine="two-h200")["replicas"][0]
    headed = plan(checkout, "speculative-eagle", machine="two-h200")["replicas"][0]
    assert (headed["memory"]["weights"] - alone["memory"]["weights"]) / 1e9 == pytest.approx(0.85, rel=0.05)
    assert headed["memory"]["kv"] / headed["kv_tokens"] == pytest.approx(33 * 4096, rel=0.001)


def test_the_batch_of_a_preset_is_in_the_account(checkout: Path) -> None:
    found = plan(checkout, "long-context", machine="eight-h100")
    assert found["max_model_len"] == 131072
    assert {one["max_num_batched_tokens"] for one in found["replicas"]} == {8192}
    preset = checkout / "presets" / "long-context.yaml"
    preset.write_text(preset.read_text().replace(": 8192", ": 65536"))
    wider = plan(checkout, "long-context", machine="eight-h100")
    assert {one["max_num_batched_tokens"] for one in wider["replicas"]} == {65536}
    assert wider["replicas"][0]["memory"]["activations"] > found["replicas"][0]["memory"]["activations"]


def test_a_preset_that_the_planner_cannot_size_is_refused(checkout: Path) -> None:
    preset = checkout / "presets" / "speculative-draft.yaml"
    text = preset.read_text()
    preset.write_text(text.replace('"model": "Qwen/Qwen3-0.6B", ', ""))
    assert "cannot size" in run_plan(checkout, "speculative-draft", machine="one-24gb").stderr
    preset.write_text(text + "  KV_CACHE_GB: 100\n")
    assert "sets KV_CACHE_GB" in run_plan(checkout, "speculative-draft", machine="one-24gb").stderr


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_a_preset_needs_is_checked(path: Path) -> None:
    needs = yaml.safe_load(path.read_text())["needs"]
    assert needs == "nothing" or command.NEEDS.fullmatch(needs)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_a_gpu_of_the_size_that_it_needs(
    path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what a desktop takes of it, the checkpoint's own weights or the preset's quantization, all on the GPU."""
    preset = yaml.safe_load(path.read_text())
    needs = re.fullmatch(r"a GPU of compute capability (\d+)\.(\d+) with (\d+) GiB", preset["needs"])
    if not needs:
        return
    monkeypatch.setattr(command, "ROOT", checkout)
    host = load_machine(ROOT / "tests" / "machines" / "one-24gb.json")
    size = int(needs[3]) << 30
    about = {"total": size, "free": size - (300 << 20), "compute_capability": (int(needs[1]), int(needs[2]))}
    host = host.model_copy(update={"gpus": (host.gpus[0].model_copy(update=about),)})
    chosen = command.plan_all(host, path.stem, [], None, Wish())[0].plan
    assert chosen.quantization == preset["settings"].get("QUANTIZATION")
    assert [replica.settings.offload for replica in chosen.replicas] == [0]
    assert chosen.max_length >= preset["settings"].get("MAX_MODEL_LEN", 0)


@pytest.mark.parametrize(
    ("preset", "machine", "words"),
    [
        ("long-context", "four-3090", "needs a GPU of compute capability 8.9 with 32 GiB; GPU 0"),
        ("deepseek-r1-1.5b-4bit", "laptop", "needs a GPU of compute capability 7.5 with 6 GiB, and there is none here"),
    ],
)
def test_a_preset_is_refused_where_its_gpu_is_missing(checkout: Path, preset: str, machine: str, words: str) -> None:
    run = run_plan(checkout, preset, machine=machine)
    assert run.returncode == 1
    assert words in run.stderr


def test_the_default_preset_runs_without_bfloat16() -> None:
    """Its GPU may be a Turing, which has none."""
    assert yaml.safe_load((ROOT / "presets" / "deepseek-r1-1.5b-4bit.yaml").read_text())["settings"]["DTYPE"] == "auto"
