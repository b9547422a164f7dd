"""Starts Triton: fetches the model repository, checks the engine arguments in it, and becomes the tritonserver.

TRITON_REPOSITORY says where the repository is: a folder below triton/, or s3://BUCKET/PREFIX, with AWS_ENDPOINT_URL
and AWS_REGION for the S3 server and secrets/triton/credentials for its key. What Triton gets is a copy, so what was
checked is what runs. Each mistake gives one line that says what is wrong, where, and what to do;
then the exit status is 2.

    start.py            start Triton
    start.py --print    check the repository, show the engines' arguments and stop; `make up` begins with it
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import ValidationError

if TYPE_CHECKING:
    from vllm import launch
else:
    # it lies beside this file in the image
    import launch

FOLDERS = Path("/repositories")
COPY = Path("/tmp/repository")  # noqa: S108 - a file system of this container's own
PID_FILE = Path("/tmp/triton.pid")  # noqa: S108 - the same; look.py and backend.py read it
SEEN_FILE = Path("/tmp/triton.json")  # noqa: S108 - the same; look.py writes it
TRITON = Path("/opt/tritonserver")
# Weights belong below models/ or on the hub: the copy is memory.
MOST_BYTES = 256 * 2**20
FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*")
S3 = re.compile(r"s3://([a-z0-9][a-z0-9.-]+)(?:/(.*))?")
# settings of the replicas that are no arguments of an engine
NOT_THE_ENGINES = {*launch.OTHERWISE, "tool_call_parser", "max_num_queued_reqs"} - {"model", "trust_remote_code"}


def fetch(source: str, folders: Path, copy: Path) -> None:
    """Makes `copy` the repository: links to the files of a folder in `folders`, or what an S3 server has.

    Raises SettingsError where there is no model.
    """
    shutil.rmtree(copy, ignore_errors=True)
    if ":" in source:
        fetch_s3(source, copy)
    elif not FOLDER.fullmatch(source) or not (folders / source).is_dir():
        raise launch.SettingsError(
            f"TRITON_REPOSITORY is {source!r}; it must be the name of a folder below triton/, or s3://BUCKET/PREFIX"
        )
    else:
        shutil.copytree(folders / source, copy, copy_function=os.symlink)
    if not any(copy.glob("*/config.pbtxt")):
        raise launch.SettingsError(f"{source}: there is no model in it; a model is a folder NAME with a config.pbtxt")


def fetch_s3(source: str, copy: Path) -> None:
    """Copies what an S3 server has below s3://BUCKET/PREFIX. SettingsError where it cannot."""
    found = S3.fullmatch(source)
    if not found:
        raise launch.SettingsError(
            f"TRITON_REPOSITORY is {source!r}; it must be s3://BUCKET/PREFIX, or the name of a folder below triton/"
        )
    bucket, prefix = found.group(1), (found.group(2) or "").strip("/")
    start = f"{prefix}/" if prefix else ""
    boto3, errors = import_module("boto3"), import_module("botocore.exceptions")
    left = MOST_BYTES
    try:
        client = boto3.client("s3")
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start):
            for entry in page.get("Contents", ()):
                path = PurePosixPath(entry["Key"].removeprefix(start))
                if entry["Key"].endswith("/"):
                    continue
                if path.is_absolute() or ".." in path.parts:
                    raise launch.SettingsError(f"{source}: {entry['Key']} leads out of the repository; rename it")
                left -= entry["Size"]
                if left < 0:
                    raise launch.SettingsError(
                        f"{source}: has more than {MOST_BYTES >> 20} MiB; keep weights below models/ or on the hub"
                    )
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, entry["Key"], str(copy / path))
    except (errors.BotoCoreError, errors.ClientError) as error:
        raise launch.SettingsError(
            f"{source}: cannot be read ({error}); check AWS_ENDPOINT_URL, AWS_REGION and secrets/triton/credentials"
        ) from None


def check_models(repository: Path, environment: dict[str, str]) -> dict[Path, dict[str, Any]]:
    """The engine arguments of each model.json in the repository, checked and completed. SettingsError with all that is
    wrong."""
    mistakes = launch.Mistakes()
    files = sorted(repository.glob("*/*/model.json"))
    nothing: dict[str, Any] = {}
    checked = {
        file: mistakes.of(engine_arguments, file, str(file.relative_to(repository)), environment, otherwise=nothing)
        for file in files
    }
    if mistakes.lines:
        raise launch.SettingsError("\n".join(mistakes.lines))
    return checked


def engine_arguments(file: Path, shown: str, environment: dict[str, str]) -> dict[str, Any]:
    """The arguments of one engine: those of its file, over the replicas' settings where it names no model of its own.

    Raises SettingsError with a line for each mistake; `shown` is what the user calls the file.
    """
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise launch.SettingsError(f"{shown}: not JSON ({error}); write engine arguments as one object") from None
    if not isinstance(given, dict):
        raise launch.SettingsError(f"{shown}: holds a {type(given).__name__}; write engine arguments as one object")
    mistakes = launch.Mistakes()
    known = launch.Settings.model_fields.keys() - NOT_THE_ENGINES
    mistakes.lines += unknown(given, shown, known)
    base: dict[str, Any] = {}
    if "model" not in given:
        base = of_replicas(environment, mistakes)
    mine = {name: value for name, value in given.items() if name in known}
    settings = read(base | mine, shown, mistakes)
    if settings:
        _check(settings, shown, environment, mistakes)
    if mistakes.lines or not settings:
        raise launch.SettingsError("\n".join(mistakes.lines))
    path, _ = launch.find_model(settings.model, launch.MODELS)
    arguments = base | given | {"model": path, "served_model_name": settings.model}
    if settings.speculative_config:
        arguments["speculative_config"] = launch.find_draft(settings.speculative_config, launch.MODELS)
    return arguments


def of_replicas(environment: dict[str, str], mistakes: launch.Mistakes) -> dict[str, Any]:
    """The replicas' settings that an engine takes as arguments."""
    settings = launch.read_settings(launch.ENGINE_FILE, environment, mistakes)
    if not settings:
        return {}
    said = settings.model_dump(exclude_unset=True, exclude_none=True)
    size = {} if settings.kv_cache_gb is None else {"kv_cache_memory_bytes": round(settings.kv_cache_gb * 2**30)}
    return {name: value for name, value in said.items() if name not in NOT_THE_ENGINES} | size


def read(values: dict[str, Any], shown: str, mistakes: launch.Mistakes) -> launch.Settings | None:
    """The settings that these arguments are; None where one is wrong, which is noted."""
    try:
        return launch.Settings(**{name: value for name, value in values.items() if name != "kv_cache_memory_bytes"})
    except ValidationError as errors:
        for name in dict.fromkeys(str(error["loc"][0]) for error in errors.errors()):
            description = launch.Settings.model_fields[name].description
            mistakes.lines.append(f"{shown}: {name} is {values.get(name)!r}; it must be {description}")
        return None


def _check(settings: launch.Settings, shown: str, environment: dict[str, str], mistakes: launch.Mistakes) -> None:
    """Notes what the launcher finds wrong with a replica of these settings."""
    found = launch.Mistakes()
    model: tuple[str, dict[str, Any]] = ("", {})
    _, config = found.of(launch.find_model, settings.model, launch.MODELS, otherwise=model)
    if settings.speculative_config:
        draft: dict[str, Any] = {}
        found.of(launch.find_draft, settings.speculative_config, launch.MODELS, otherwise=draft)
    on_gpus = environment.get("FLEET_DEVICE") == "gpu"
    gpus = found.of(launch.count_gpus, environment, otherwise=0) if on_gpus else None
    if gpus is not None:
        # Triton may have more than one engine, so it may see more GPUs than each of them takes.
        gpus = min(gpus, settings.tensor_parallel_size * settings.pipeline_parallel_size)
    if gpus != 0:
        found.of(launch.check_fit, settings, config, gpus, otherwise=None)
    found.of(launch.check_names, settings, launch.vllm_folder(), otherwise=None)
    mistakes.lines += [f"{shown}: {line}" for line in found.lines]


def unknown(given: dict[str, Any], shown: str, known: set[str]) -> list[str]:
    """A line for each argument that vLLM's engine does not have."""
    folder = launch.vllm_folder()
    names = known | (fields(folder / "engine" / "arg_utils.py") if folder else set())
    lines = []
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            lines.append(f"{shown}: unknown engine argument {name!r}; {hint}")
    return lines


def fields(file: Path) -> set[str]:
    """The names of the engine's arguments, out of vLLM's source: importing it takes ten seconds."""
    classes = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    return {
        line.target.id
        for node in classes
        if node.name in ("EngineArgs", "AsyncEngineArgs")
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def of_process(checked: dict[Path, dict[str, Any]], environment: dict[str, str]) -> launch.Settings:
    """The settings that vLLM reads from its environment, for all engines of this process. SettingsError where wrong."""
    eager = any(engine.get("enforce_eager") for engine in checked.values())
    mistakes = launch.Mistakes()
    values = {"model": "-", "enforce_eager": eager, "cpu_threads": environment.get("CPU_THREADS") or None}
    settings = read(values, ".env", mistakes)
    if not settings:
        raise launch.SettingsError("\n".join(mistakes.lines))
    return settings


def command(environment: dict[str, str]) -> list[str]:
    """The tritonserver's command line."""
    words = [str(TRITON / "bin" / "tritonserver"), f"--model-repository={COPY}"]
    words += [f"--backend-directory={TRITON / 'backends'}", "--model-control-mode=none"]
    words += ["--http-port=8000", "--grpc-port=8001", "--metrics-port=8002"]
    if environment.get("FLEET_DEVICE") != "gpu":
        words.append("--allow-gpu-metrics=false")
    return words


def main(arguments: list[str]) -> int:
    """Becomes the tritonserver, or returns an exit status."""
    parser = argparse.ArgumentParser(description="Start Triton on the model repository.")
    parser.add_argument("--print", action="store_true", help="show the engines' arguments and stop")
    only_print = parser.parse_args(arguments).print
    environment = dict(os.environ)
    try:
        fetch(environment.get("TRITON_REPOSITORY", ""), FOLDERS, COPY)
        checked = check_models(COPY, environment)
        settings = of_process(checked, environment)
    except launch.SettingsError as error:
        for line in str(error).splitlines():
            print(f"launch: {line}", file=sys.stderr)
        return 2
    for file, engine in checked.items():
        print(f"launch: {file.relative_to(COPY)}: {json.dumps(engine)}", file=sys.stdout if only_print else sys.stderr)
        file.unlink()
        file.write_text(json.dumps(engine), encoding="utf-8")
    if not only_print:
        become_triton(launch.process_environment(settings, environment, "triton"))
    return 0


def become_triton(environment: dict[str, str]) -> NoReturn:
    """Replaces this process by the tritonserver, so that a stop reaches it as a signal of its own."""
    Path(environment["HOME"]).mkdir(parents=True, exist_ok=True)
    PID_FILE.write_text(str(os.getpid()), encoding="utf-8")
    SEEN_FILE.unlink(missing_ok=True)
    words = command(environment)
    os.execve(words[0], words, environment)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
