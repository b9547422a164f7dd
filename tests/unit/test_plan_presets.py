"""Presets: data that the launcher takes as it is, and that the planner adds a host's sizes to."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from vllm import launch

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_launcher_takes_each_preset(path: Path, tmp_path: Path) -> None:
    preset = yaml.safe_load(path.read_text())
    assert set(preset) == {"about", "needs", "settings"}
    (tmp_path / "engine.yaml").write_text("")
    settings = {name: str(value) for name, value in preset["settings"].items()}
    read = launch.read_settings(tmp_path / "engine.yaml", settings)
    assert read.model == settings["MODEL"]
    documented = (ROOT / ".env.example").read_text()
    for name in settings:
        assert f"{name}=" in documented, f"{name} is no setting of .env.example"


def test_every_kind_of_preset_is_there() -> None:
    every = {path.stem: yaml.safe_load(path.read_text())["settings"] for path in PRESETS}
    methods = {json.loads(one["SPECULATIVE_CONFIG"])["method"] for one in every.values() if "SPECULATIVE_CONFIG" in one}
    assert methods == {"ngram", "draft_model", "eagle3"}
    assert {one["QUANTIZATION"] for one in every.values() if "QUANTIZATION" in one} == {"bitsandbytes", "fp8"}


def test_the_planner_adds_this_hosts_sizes_to_a_preset(tmp_path: Path) -> None:
    for name in ("scripts", "presets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    model = tmp_path / "models" / "deepseek-ai" / "DeepSeek-R1-Distill-Qwen-1.5B"
    shutil.copytree(ROOT / "tests" / "models" / model.name, model)
    machine = ROOT / "tests" / "machines" / "home-lab.json"
    script = tmp_path / "scripts" / "plan.py"
    command = [sys.executable, str(script), "deepseek-r1-1.5b-4bit", "--machine", str(machine), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not run.returncode, run.stdout + run.stderr
    plan = json.loads(run.stdout)["models"][0]
    assert (plan["quantization"], plan["max_model_len"]) == ("bitsandbytes", 16384)
    assert plan["replicas"][0]["memory"]["weights"] < 1.9 * 2**30, "4-bit layers, 16-bit embedding and head"
