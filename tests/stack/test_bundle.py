"""A bundle installs, starts and answers where no network leads out: the gateway and one replica with the real model."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lab.stack import StackError, run
from stack.shell import ROOT

PROJECT = "vllm-fleet-test-bundle"
SERVICES = ("gateway", "vllm-0")
MODEL = Path("models/HuggingFaceTB/SmolLM2-135M-Instruct")
# The replica answers to a name that only these settings give it.
SETTINGS = "SERVED_MODEL_NAME=bundled\nMAX_MODEL_LEN=512\nKV_CACHE_GB=0.25\n"
QUESTION = {"model": "bundled", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A checkout whose stack is the gateway and one replica, with image names of its own, in a network that leads
    nowhere. What it packs was made by `make up`."""
    folder = tmp_path / "checkout"
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = {name: document["services"][name] for name in SERVICES}
    try:
        run("docker", "image", "inspect", *(service["image"] for service in services.values()))
        missing = not (ROOT / MODEL).is_dir()
    except StackError:
        missing = True
    if missing:
        request.getfixturevalue("stack")
    for name in ("scripts", "nginx", "presets", "docs", "vllm", "autoscaler"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "Makefile", ".gitignore", ".env.example"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".env").write_text(SETTINGS)
    (folder / MODEL.parent).mkdir(parents=True)
    (folder / MODEL).symlink_to((ROOT / MODEL).resolve())
    for name, service in services.items():
        run("docker", "tag", service["image"], f"{PROJECT}/{name}:1")
        service["image"] = f"{PROJECT}/{name}:1"
    del services["gateway"]["ports"]
    only = {"name": PROJECT, "x-pins": document["x-pins"], "services": services}
    only |= {
        "networks": {"fleet": {"internal": True}},
        "volumes": dict.fromkeys(("hub", "compiled", "used", "bodies", "autoscaler")),
    }
    (folder / "docker-compose.yml").write_text(yaml.safe_dump(only))
    run("git", "-C", str(folder), "init", "--quiet")
    run("git", "-C", str(folder), "add", "--all")
    yield folder
    down = ["docker", "compose", "--project-name", PROJECT, "down", "--volumes", "--timeout", "10"]
    subprocess.run(down, cwd=folder, capture_output=True)
    subprocess.run(["docker", "image", "rm", *(f"{PROJECT}/{name}:1" for name in SERVICES)], capture_output=True)
    # gigabytes, which pytest would keep for three runs
    for path in (folder, tmp_path / "vllm-fleet"):
        shutil.rmtree(path, ignore_errors=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="taking the network away needs root")
@pytest.mark.timeout(600)
def test_a_bundle_installs_and_answers_without_a_network(small: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE")}
    # no interface but a loopback that is down; Docker is reached through its socket
    alone = ["unshare", "--net", "--"]

    def there(*command: str) -> subprocess.CompletedProcess[str]:
        """As a user of a hardened host would: nothing that is made is for others to read."""
        where = tmp_path / "vllm-fleet" if (tmp_path / "vllm-fleet").exists() else tmp_path
        return subprocess.run([*alone, *command], cwd=where, env=env, capture_output=True, text=True, umask=0o077)

    python = str(ROOT / ".venv" / "bin" / "python")
    packed = subprocess.run([python, "scripts/bundle.py"], cwd=small, env=env, capture_output=True, text=True)
    assert not packed.returncode, packed.stdout + packed.stderr
    archive = next((small / "dist").glob("*.tar"))
    run("docker", "image", "rm", *(f"{PROJECT}/{name}:1" for name in SERVICES))
    extracted = there("tar", "xpf", str(archive))
    assert not extracted.returncode, extracted.stderr
    archive.unlink()
    for name in ("docs/plan.md", "pyproject.toml", str(MODEL / "config.json")):
        assert (tmp_path / "vllm-fleet" / name).is_file(), name

    damaged = tmp_path / "vllm-fleet" / MODEL / "config.json"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole + b" ")
    refused = there("./install.sh")
    assert refused.returncode
    assert f"{MODEL}/config.json" in refused.stdout + refused.stderr
    damaged.write_bytes(whole)

    installed = there("./install.sh")
    assert not installed.returncode, installed.stdout + installed.stderr
    ran = there(".venv/bin/python", "scripts/plan.py", "--help")
    assert not ran.returncode, ran.stderr
    started = there("docker", "compose", "up", "--detach", "--no-build", "--pull", "never", "--wait")
    assert not started.returncode, started.stderr + there("docker", "compose", "logs", "--tail", "40").stdout
    # until the gateway has seen what Docker has
    ask = ["curl", "--fail", "--silent", "--show-error", "--retry", "20", "--retry-delay", "1", "--retry-all-errors"]
    ask += ["--json", json.dumps(QUESTION), "http://127.0.0.1/v1/chat/completions"]
    answer = there("docker", "compose", "exec", "--no-TTY", "gateway", *ask)
    assert not answer.returncode, answer.stderr
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
