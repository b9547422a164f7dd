"""A bundle installs and starts where no network leads out: a stack of the gateway alone stands for the whole."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Stack, run

IMAGE = "vllm-fleet-test-bundle/gateway:1"
PROJECT = "vllm-fleet-test-bundle"


@pytest.fixture
def small(stack: Stack, tmp_path: Path) -> Iterator[Path]:
    """A checkout whose stack is the gateway, under an image name of its own, in a network that leads nowhere."""
    folder = tmp_path / "checkout"
    for name in ("scripts", "nginx", "presets", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "HuggingFaceTB"))
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "tests" / "models" / "bge-m3", folder / "models" / "bge-m3")
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    gateway = document["services"]["gateway"] | {"image": IMAGE}
    del gateway["ports"]
    pins = {"name": PROJECT, "x-pins": document["x-pins"]}
    only = pins | {"services": {"gateway": gateway}, "networks": {"fleet": {"internal": True}}}
    (folder / "docker-compose.yml").write_text(yaml.safe_dump(only))
    run("docker", "tag", stack.compose("config", "--images", "gateway").strip(), IMAGE)
    run("git", "-C", str(folder), "init", "--quiet")
    yield folder
    subprocess.run(["docker", "compose", "--project-name", PROJECT, "down"], cwd=folder, capture_output=True)
    subprocess.run(["docker", "image", "rm", IMAGE], capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="taking the network away needs root")
@pytest.mark.timeout(400)
def test_a_bundle_installs_and_starts_without_a_network(small: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE")}
    python = str(ROOT / ".venv" / "bin" / "python")
    packed = subprocess.run([python, "scripts/bundle.py"], cwd=small, env=env, capture_output=True, text=True)
    assert not packed.returncode, packed.stdout + packed.stderr
    archive = next((small / "dist").glob("*.tar"))
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    there = tmp_path / "vllm-fleet"
    assert (there / "models" / "bge-m3" / "config.json").is_file()
    run("docker", "image", "rm", IMAGE)

    # no interface but a loopback that is down; Docker is reached through its socket
    alone = ["unshare", "--net", "--"]
    damaged = there / "models" / "bge-m3" / "config.json"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole + b" ")
    refused = subprocess.run([*alone, "./install.sh"], cwd=there, env=env, capture_output=True, text=True)
    assert refused.returncode
    assert "models/bge-m3/config.json" in refused.stdout + refused.stderr
    damaged.write_bytes(whole)

    installed = subprocess.run([*alone, "./install.sh"], cwd=there, env=env, capture_output=True, text=True)
    assert not installed.returncode, installed.stdout + installed.stderr
    ran = subprocess.run([".venv/bin/python", "scripts/plan.py", "--help"], cwd=there, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    up = ["docker", "compose", "up", "--detach", "--no-build", "--pull", "never", "--wait", "gateway"]
    started = subprocess.run([*alone, *up], cwd=there, env=env, capture_output=True, text=True)
    assert not started.returncode, started.stderr
