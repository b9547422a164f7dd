"""Starts a replica: settings in, one checked `vllm serve` command out, which this process then becomes.

Settings are read from /etc/vllm/engine.yaml and from the environment (which Compose fills from .env); the environment
wins. A setting has one name: `max_model_len` in the file, `MAX_MODEL_LEN` in the environment. An empty value counts as
unset. Each mistake gives one line that says what is wrong, where, and what to do; then the exit status is 2.

    launch.py            start the replica
    launch.py --print    check all settings, show the command and stop; `make up` and `make roll` begin with it
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

ENGINE_FILE = Path("/etc/vllm/engine.yaml")
MODELS = Path("/models")
CACHE = Path("/cache/compiled")
PID_FILE = Path("/tmp/replica.pid")  # noqa: S108 - a file system of this container's own; health.py reads it
HEALTH_FILE = Path("/tmp/health.json")  # noqa: S108 - the same; health.py writes it
API_PORT = 8000
METRICS_PORT = 9464
# Longer than the gateway keeps an idle connection (60 s), or it would send a request into one that just closed.
KEEP_ALIVE_S = 90
NCCL_NAMES = ("NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE", "NCCL_DEBUG")
# arguments of `vllm serve` with which a replica takes another number of GPUs than its settings say
PARALLEL = re.compile(r"--(tensor|pipeline|data)-parallel-size|-(tp|pp|dp)\b")
# arguments of `vllm serve` with which several processes take requests
SEVERAL_PROCESSES = re.compile(r"--(api-server-count|data-parallel-size)|-(asc|dp)\b")
# arguments of `vllm serve` that would undo what the gateway relies on
ELSEWHERE = "the gateway, the health check and Prometheus look for the replica at port 8000 of all addresses, by HTTP"
RELIED_ON = {
    "--api-key": "the gateway and the health check send no key, so the replica would never be ready",
    "--no-enable-force-include-usage": "the gateway meters by the usage that each answer has",
    "--scheduling-policy": "keys have priorities, which need the policy that is set already",
    **dict.fromkeys(("--port", "--host", "--uds", "--ssl-"), ELSEWHERE),
}
# where vLLM's source lists what a setting may name
NAMES_IN_VLLM = {
    "quantization": ("model_executor/layers/quantization/__init__.py", "QuantizationMethods"),
    "kv_cache_dtype": ("config/cache.py", "CacheDType"),
    "tool_call_parser": ("tool_parsers/__init__.py", "_TOOL_PARSERS_TO_REGISTER"),
}
# of a setting in GiB: more than any machine has
MOST_GIB = 1_000_000
T = TypeVar("T")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class SettingsError(Exception):
    """Settings that cannot be started. Each line of its text is one mistake: what is wrong, where, what to do."""


def _mapping(value: object) -> object:
    """A mapping from YAML as it is; a text is read as JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        # vLLM gets it as JSON
        json.dumps(found)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    return found


def _words(value: object) -> object:
    """A list from YAML as it is; a text is split as a shell would."""
    return shlex.split(value) if isinstance(value, str) else value


def _names(value: object) -> object:
    """A list of names from YAML, or a text with commas between them."""
    names = value if isinstance(value, list) else str(value).split(",")
    names = [name.strip() if isinstance(name, str) else name for name in names]
    if not all(names) or len({*map(str, names)}) < len(names):
        raise ValueError("a name is empty, or there twice")
    if flag := next((name for name in names if str(name).startswith("-")), None):
        raise ValueError(f"{flag} would be an option")
    return names


class Settings(BaseModel):
    """What a replica can be told. Each description completes the sentence "it must be …"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="a folder below models/ or a name on the Hugging Face hub, org/name")
    served_model_name: Annotated[list[str], BeforeValidator(_names)] | None = Field(
        default=None, description="the names that clients ask for, with commas between"
    )
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = Field(
        default="auto", description="auto, half, float16, bfloat16, float or float32"
    )
    quantization: str | None = Field(
        default=None, description="a method of vLLM, such as bitsandbytes, fp8, awq or gptq"
    )
    tensor_parallel_size: PositiveInt = Field(default=1, description="a whole number of GPUs, 1 or more")
    pipeline_parallel_size: PositiveInt = Field(default=1, description="a whole number of stages, 1 or more")
    max_model_len: PositiveInt | Literal["auto"] | None = Field(
        default=None, description="a whole number of tokens, 1 or more, or auto for what fits"
    )
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1, description="a share above 0 and up to 1")
    cpu_offload_gb: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="a number of GiB, 0 or more"
    )
    cpu_threads: PositiveInt | None = Field(default=None, description="a whole number of threads, 1 or more")
    kv_cache_gb: float | None = Field(
        default=None, gt=0, le=MOST_GIB, description=f"a number of GiB above 0 and up to {MOST_GIB}"
    )
    max_num_seqs: PositiveInt | None = Field(default=None, description="a whole number of requests, 1 or more")
    max_num_batched_tokens: PositiveInt | None = Field(default=None, description="a whole number of tokens, 1 or more")
    max_num_queued_reqs: PositiveInt | None = Field(default=None, description="a whole number of requests, 1 or more")
    enable_prefix_caching: bool | None = Field(default=None, description="true or false")
    enforce_eager: bool | None = Field(default=None, description="true or false")
    kv_cache_dtype: str | None = Field(default=None, description="a KV cache type of vLLM, such as auto or fp8")
    speculative_config: Annotated[dict[str, Any], BeforeValidator(_mapping)] | None = Field(
        default=None, description='a JSON object, such as {"method": "ngram", "num_speculative_tokens": 4}'
    )
    chat_template: str | None = Field(default=None, description="a file below models/")
    tool_call_parser: str | None = Field(default=None, description="a tool call parser of vLLM, such as hermes")
    trust_remote_code: bool = Field(default=False, description="true or false")
    extra_args: Annotated[list[str], BeforeValidator(_words)] = Field(
        default=[], description="further arguments of `vllm serve`, quoted as in a shell"
    )
    sleep_level: int | None = Field(
        default=None, ge=1, le=2, description="1 (weights kept in the host's memory) or 2 (loaded again)"
    )
    wake_seconds: int = Field(default=60, ge=1, le=3600, description="a whole number of seconds from 1 to 3600")
    shared_gpus: Annotated[list[str], BeforeValidator(_names)] | None = Field(
        default=None, description="names of GPUs, with commas between"
    )
    drain_seconds: PositiveInt = Field(default=120, description="a whole number of seconds, 1 or more")
    stream_keepalive_seconds: int | None = Field(
        default=None, ge=1, le=3600, description="a whole number of seconds from 1 to 3600"
    )


# `vllm serve` knows all settings by the same name, but for these.
OTHERWISE = {
    *("model", "served_model_name", "chat_template", "trust_remote_code"),
    *("cpu_threads", "kv_cache_gb", "extra_args", "drain_seconds", "stream_keepalive_seconds"),
    *("sleep_level", "wake_seconds", "shared_gpus"),
}


@dataclass
class Mistakes:
    """Gathers what is wrong, so that all of it is told at once; `settings` are the names of settings that are wrong."""

    lines: list[str] = field(default_factory=list)
    settings: set[str] = field(default_factory=set)

    def of(self, check: Callable[..., T], *arguments: Any, otherwise: T) -> T:
        """What the check gives; `otherwise` where it finds a mistake, which is noted."""
        try:
            return check(*arguments)
        except SettingsError as error:
            self.lines += str(error).splitlines()
            return otherwise


def read_settings(engine_file: Path, environment: dict[str, str], mistakes: Mistakes) -> Settings | None:
    """The settings of the file, overridden by those of the environment; without the wrong ones, which are noted.

    None where the model, without which there is nothing to check, is among those.
    """
    # by its name in the checkout, which is the user's
    file = "vllm/engine.gpu.yaml" if environment.get("FLEET_DEVICE") == "gpu" else "vllm/engine.yaml"
    values = _known(mistakes.of(_read_file, engine_file, file, otherwise={}), file, mistakes)
    from_environment = {name for name in Settings.model_fields if environment.get(name.upper(), "").strip()}
    values |= {name: environment[name.upper()].strip() for name in from_environment}
    unreadable = bool(mistakes.lines)
    try:
        return Settings(**values)
    except ValidationError as errors:
        lines = []
        for error in errors.errors():
            name = str(error["loc"][0])
            mistakes.settings.add(name)
            description = Settings.model_fields[name].description
            place, shown = (".env", name.upper()) if name in from_environment else (file, name)
            if error["type"] == "missing":
                # what could not be read, or is misspelt, may have it
                if not unreadable:
                    lines.append(f"{place}: {shown} is not set; it must be {description}")
            else:
                why = f" ({error['ctx']['error']})" if error["type"] == "value_error" else ""
                lines.append(f"{place}: {shown} is {values[name]!r}{why}; it must be {description}")
    mistakes.lines += dict.fromkeys(lines)
    right = {name: value for name, value in values.items() if name not in mistakes.settings}
    return Settings(**right) if "model" in right else None


def _read_file(path: Path, shown: str) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{shown}: cannot be read ({error.strerror}); restore it, or run chmod a+r {shown}"
        ) from None
    except RecursionError:
        raise SettingsError(f"{shown}: is nested too deep; write one `name: value` a line") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable text"
        raise SettingsError(f"{shown}: not valid YAML{line} ({problem}); write one `name: value` a line") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{shown}: holds a {type(content).__name__}; write one `name: value` a line")
    return content


def _known(content: dict[Any, Any], shown: str, mistakes: Mistakes) -> dict[str, Any]:
    """What is set in a file's content by the names of settings; other names are mistakes."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_").lower()
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "pass an argument that has no setting through extra_args"
            mistakes.lines.append(f"{shown}: unknown setting {key}; {hint}")
        elif value is not None and value != "":
            values[name] = value
    return values


def find_model(model: str, models: Path) -> tuple[str, dict[str, Any]]:
    """What to hand to vLLM for a model's name (a folder, or the name itself for the hub), and the model's config.json.

    Raises SettingsError where there is no such model, or its folder is not complete.
    """
    folder = models / model

    def is_folder() -> bool:
        _check_readable(model, models)
        return folder.is_dir()

    if _looked_up("MODEL", is_folder):
        config = folder / "config.json"
        if not config.is_file():
            raise SettingsError(
                f"{folder}: no config.json; the download is not complete or this is not a model's folder: "
                "remove it or fetch the model again, then restart the replica"
            )
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"{config}: cannot be read ({error}); fetch the model again") from None
        if not isinstance(content, dict):
            raise SettingsError(f"{config}: holds a {type(content).__name__}, not an object; fetch the model again")
        return str(folder), content
    if not HUB_NAME.fullmatch(model):
        raise SettingsError(
            f"MODEL is {model!r}: neither a folder below models/ nor a hub name like org/name; check the spelling"
        )
    return model, _hub_config(model)


def _looked_up(name: str, look: Callable[[], bool]) -> bool:
    """What a look at the path that a setting names gives. Raises SettingsError where the system refuses such a path."""
    try:
        return look()
    except OSError as error:
        raise SettingsError(
            f"{name}: what it names cannot be looked up below models/ ({error.strerror}); check the spelling"
        ) from None


def _check_readable(model: str, models: Path) -> None:
    """Raises SettingsError where this user may not read a model's folder, one above it, or a file in it."""
    folder = models / model
    above = [path for path in reversed(folder.parents) if path.is_relative_to(models)]
    for path in chain(above, [folder], folder.rglob("*")):
        if not os.path.lexists(path) or path.is_symlink():
            continue
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0), effective_ids=True):
            raise SettingsError(
                f"{path}: the replica (user {os.geteuid()}) may not read it: run chmod -R a+rX models on the host"
            )


def find_draft(speculative: dict[str, Any], models: Path) -> dict[str, Any]:
    """Speculative decoding's settings with the path of a draft model or head that is a folder below models/.

    Another name stays as it is: vLLM fetches it from the hub.
    """
    draft = speculative.get("model")
    if isinstance(draft, str) and draft and _looked_up("SPECULATIVE_CONFIG", (models / draft).is_dir):
        return speculative | {"model": find_model(draft, models)[0]}
    return speculative


def _hub_config(model: str) -> dict[str, Any]:
    """The model's config.json from the hub or its cache, where vLLM will look for it next."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the outcome is told below
    hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
    try:
        path = hub.hf_hub_download(model, "config.json")
    except errors.GatedRepoError:
        problem = (
            "is gated; accept its licence on the hub, name your token's file in HF_TOKEN_FILE in .env, run `make up`"
        )
    except errors.RepositoryNotFoundError:
        problem = "is not on the hub, or is private; check the spelling"
    except errors.LocalEntryNotFoundError:
        problem = f"is not below models/, and the hub cannot be reached; put it into models/{model}"
    except errors.EntryNotFoundError:
        problem = "has no config.json on the hub; take one in the format of transformers"
    else:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return content
    raise SettingsError(f"MODEL {model} {problem}")


def count_gpus(environment: dict[str, str]) -> int:
    """GPUs (or MIG slices) that this container sees. Raises SettingsError where there is none."""
    listing = ""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    lines = listing.splitlines()
    slices = [line for line in lines if line.lstrip().startswith("MIG ")]
    gpus = slices or [line for line in lines if line.startswith("GPU ")]
    if not gpus:
        ids = environment.get("NVIDIA_VISIBLE_DEVICES", "")
        gpus = [] if ids in ("", "all", "none", "void") else ids.split(",")
    if not gpus:
        raise SettingsError(
            "this replica's image is for GPUs, but it sees none: check `nvidia-smi` and the NVIDIA container toolkit "
            "on the host, or start without docker-compose.gpu.yml"
        )
    return len(gpus)


def check_fit(settings: Settings, config: dict[str, Any], gpus: int | None) -> None:
    """Raises SettingsError where the parallel sizes fit neither the GPUs (None: a CPU) nor the model."""
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    lines = []
    if gpus is None and pp > 1:
        lines.append(
            f"PIPELINE_PARALLEL_SIZE is {pp}, but on a CPU vLLM ends at the first request with stages: set it to 1, "
            "and TENSOR_PARALLEL_SIZE to share the work"
        )
    if gpus not in (None, tp * pp) and not any(PARALLEL.match(word) for word in settings.extra_args):
        lines.append(
            f"TENSOR_PARALLEL_SIZE {tp} times PIPELINE_PARALLEL_SIZE {pp} is {tp * pp}, but this replica is pinned to "
            f"{gpus} GPUs: make the two equal, here or by its device_ids"
        )
    text_config = config.get("text_config")
    heads = (config | (text_config if isinstance(text_config, dict) else {})).get("num_attention_heads")
    if isinstance(heads, int) and heads % tp:
        sizes = ", ".join(str(size) for size in range(1, min(heads, 16) + 1) if heads % size == 0)
        lines.append(
            f"TENSOR_PARALLEL_SIZE is {tp}, but {settings.model} has {heads} attention heads; "
            f"it must divide them: {sizes}"
        )
    if lines:
        raise SettingsError("\n".join(lines))


def check_extra_args(settings: Settings) -> None:
    """Raises SettingsError where an argument, or the short form of one that argparse takes, undoes what the gateway
    relies on."""
    lines = {}
    for word in settings.extra_args:
        given = word.partition("=")[0].replace("_", "-")
        if not given.startswith("--") or given == "--":
            continue
        for flag, why in RELIED_ON.items():
            # a flag that ends in a dash stands for all that begin so
            if flag.startswith(given) or (flag.endswith("-") and given.startswith(flag)):
                shown = given if given == flag or flag.endswith("-") else f"{given} ({flag})"
                lines[shown] = f"EXTRA_ARGS has {shown}: {why}; leave it out"
                break
    if lines:
        raise SettingsError("\n".join(lines.values()))


def check_sleep(settings: Settings, on_gpus: bool, over_hosts: bool) -> None:
    """Raises SettingsError where a replica with these settings can't sleep, although it is to."""
    if settings.sleep_level is None:
        if settings.shared_gpus:
            raise SettingsError(
                f"SHARED_GPUS is {','.join(settings.shared_gpus)}, but without SLEEP_LEVEL this replica never gives "
                "them up: set SLEEP_LEVEL=1"
            )
        return
    lines = []
    if not on_gpus:
        lines.append(f"SLEEP_LEVEL is {settings.sleep_level}, but vLLM has no sleep mode on a CPU: leave it out")
    if over_hosts:
        lines.append(f"SLEEP_LEVEL is {settings.sleep_level}, but what runs over Ray does not sleep: leave it out")
    if words := [word for word in settings.extra_args if SEVERAL_PROCESSES.match(word)]:
        lines.append(f"EXTRA_ARGS has {words[0]}: each process would sleep by itself; leave it or SLEEP_LEVEL out")
    if lines:
        raise SettingsError("\n".join(lines))


def check_names(settings: Settings, vllm: Path | None) -> None:
    """Raises SettingsError where a setting names what vLLM, whose package lies in that folder, does not have.

    The names are read out of its source, as importing it takes ten seconds and more. What is not found there is left to
    vLLM.
    """
    lines = []
    for name, (file, variable) in NAMES_IN_VLLM.items():
        value = getattr(settings, name)
        # vLLM does the same to this one alone
        value = value.lower() if name == "quantization" and value else value
        listed = _strings_of(vllm / file, variable) if vllm and value is not None else set()
        if listed and name == "quantization":
            listed |= {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
        by_plugin = name == "tool_call_parser" and any("tool-parser-plugin" in word for word in settings.extra_args)
        if listed and value not in listed and not by_plugin:
            lines.append(f"{name.upper()} is {value!r}, which vLLM does not have; it has {', '.join(sorted(listed))}")
    if lines:
        raise SettingsError("\n".join(lines))


def _strings_of(file: Path, variable: str) -> set[str]:
    """The strings of a `Literal`, or the keys of a dictionary, that a Python file gives a name."""
    if not file.is_file():
        return set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
            parts = node.value.keys if isinstance(node.value, ast.Dict) else ast.walk(node.value)
            return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return set()


def vllm_folder() -> Path | None:
    """Where vLLM is installed, without importing it; None where it is not."""
    spec = find_spec("vllm")
    return Path(spec.origin).parent if spec and spec.origin else None


def check(environment: dict[str, str], over_hosts: bool = False) -> tuple[Settings, str, str | None]:
    """The settings, the model's folder or hub name, and the path of its chat template or None, all checked.

    `over_hosts`: Ray brings the GPUs, of several hosts, so those of this container are not counted. Raises
    SettingsError with a line for each mistake.
    """
    mistakes = Mistakes()
    settings = read_settings(ENGINE_FILE, environment, mistakes)
    model, template = "", None
    if settings:
        unknown: tuple[str, dict[str, Any]] = ("", {})
        model, config = mistakes.of(find_model, settings.model, MODELS, otherwise=unknown)
        if settings.speculative_config:
            draft = settings.speculative_config
            found = mistakes.of(find_draft, draft, MODELS, otherwise=draft)
            settings = settings.model_copy(update={"speculative_config": found})
        if settings.chat_template:
            template = mistakes.of(find_chat_template, settings.chat_template, MODELS, otherwise=None)
        on_gpus = environment.get("FLEET_DEVICE") == "gpu"
        gpus = None
        if on_gpus and over_hosts:
            gpus = settings.tensor_parallel_size * settings.pipeline_parallel_size
        elif on_gpus:
            gpus = mistakes.of(count_gpus, environment, otherwise=0)
        if gpus != 0 and not mistakes.settings & {"tensor_parallel_size", "pipeline_parallel_size", "extra_args"}:
            mistakes.of(check_fit, settings, config, gpus, otherwise=None)
        mistakes.of(check_extra_args, settings, otherwise=None)
        mistakes.of(check_sleep, settings, on_gpus, over_hosts, otherwise=None)
        mistakes.of(check_names, settings, vllm_folder(), otherwise=None)
    if mistakes.lines or not settings:
        raise SettingsError("\n".join(mistakes.lines))
    return settings, model, template


def find_chat_template(template: str, models: Path) -> str:
    """The path of a chat template; a relative one is below the models folder. Raises SettingsError if none."""
    path = models / template
    if not _looked_up("CHAT_TEMPLATE", path.is_file):
        raise SettingsError(
            f"CHAT_TEMPLATE is {template!r}, but there is no file {path}; put it below models/ and name it from there"
        )
    return str(path)


def serve_command(settings: Settings, model: str, chat_template: str | None, traces: str = "") -> list[str]:
    """The arguments after `vllm`, for a model's folder or hub name, the path of a chat template, and traces' store."""
    command = ["serve", model, "--host", "0.0.0.0", "--port", str(API_PORT)]
    command += ["--served-model-name", *(settings.served_model_name or [settings.model])]
    for name, value in settings:
        flag = name.replace("_", "-")
        if value is None or name in OTHERWISE:
            continue
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    if settings.kv_cache_gb is not None:
        command += ["--kv-cache-memory-bytes", str(round(settings.kv_cache_gb * 2**30))]
    if settings.tool_call_parser is not None:
        command.append("--enable-auto-tool-choice")
    if chat_template is not None:
        command += ["--chat-template", chat_template]
    if settings.trust_remote_code:
        command.append("--trust-remote-code")
    # The gateway and Prometheus ask for these every second or so.
    # the gateway meters by it, and takes out of a stream what the client did not ask for
    command += ["--enable-force-include-usage", "--enable-prompt-tokens-details"]
    # by the priority that the gateway sets; of the same priority who came first
    command += ["--scheduling-policy", "priority"]
    command += ["--disable-access-log-for-endpoints", "/health,/metrics"]
    # the last one is outermost
    sleeper = ["--middleware", "sleeper.Sleeper"] if settings.sleep_level else []
    command += ["--middleware", "begin.Begin", *sleeper, "--middleware", "drain.Drain", "--middleware", "lines.Lines"]
    if sleeper:
        command.append("--enable-sleep-mode")
    if traces:
        command += ["--otlp-traces-endpoint", traces]
    command += ["--shutdown-timeout", str(settings.drain_seconds)]
    return command + settings.extra_args


def process_environment(settings: Settings, environment: dict[str, str], replica: str) -> dict[str, str]:
    """The environment of the vLLM process of the named replica."""
    home = str(CACHE / replica)
    unset = {name for name in NCCL_NAMES if not environment.get(name)}
    traces = environment.get("TRACES_URL")
    return {name: value for name, value in environment.items() if name not in unset} | {
        # Whatever is compiled (vLLM, torch, Triton, FlashInfer, CUDA) is kept below the home folder. Each replica has
        # its own, as two that compile at once would write the same files.
        "HOME": home,
        "TORCHINDUCTOR_CACHE_DIR": f"{home}/torchinductor",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
        # begin.py reads it.
        "STREAM_KEEPALIVE_SECONDS": str(settings.stream_keepalive_seconds or ""),
        **sleep_environment(settings),
        "OTEL_SERVICE_NAME": "vllm-api",
        "OTEL_RESOURCE_ATTRIBUTES": f"service.instance.id={replica}",
        "OTEL_METRICS_EXPORTER": "prometheus",
        "OTEL_EXPORTER_PROMETHEUS_HOST": "0.0.0.0",
        "OTEL_EXPORTER_PROMETHEUS_PORT": str(METRICS_PORT),
        # traces.py exports; a trace begins at the gateway or before it, never here
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        **(
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": traces, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
            if traces
            else {}
        ),
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_SEMCONV_STABILITY_OPT_IN": "http",
        # The gateway's polling is no traffic.
        "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS": "/health$,/metrics$",
        # A third more series, which say when each began.
        "PROMETHEUS_DISABLE_CREATED_SERIES": "true",
        # vLLM's sampler compiles some functions even so, and needs a C++ compiler for that on a CPU.
        **({"TORCHDYNAMO_DISABLE": "1"} if settings.enforce_eager else {}),
        **({} if environment.get("FLEET_DEVICE") == "gpu" else _cpu_environment(settings)),
    }


def sleep_environment(settings: Settings) -> dict[str, str]:
    """What sleeper.py reads."""
    if settings.sleep_level is None:
        return {}
    return {
        "SLEEP_LEVEL": str(settings.sleep_level),
        "WAKE_SECONDS": str(settings.wake_seconds),
        "SHARED_GPUS": ",".join(settings.shared_gpus or []),
    }


def _cpu_environment(settings: Settings) -> dict[str, str]:
    # Two replicas share the cores. With a thread for each core in both, and threads that spin for 200 ms after each
    # operation as is OpenMP's default, they get a fraction of the work done (measured on 2 cores: a tenth to a half).
    cores = len(os.sched_getaffinity(0))
    threads = settings.cpu_threads or max(1, cores // 2)
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, threads // settings.tensor_parallel_size)),
        "KMP_BLOCKTIME": "5",
    }


def main(arguments: list[str]) -> int:
    """Becomes the vLLM process, or returns an exit status."""
    parser = argparse.ArgumentParser(description="Start a replica from /etc/vllm/engine.yaml and the environment.")
    parser.add_argument("--print", action="store_true", help="show the command and stop")
    only_print = parser.parse_args(arguments).print
    environment = dict(os.environ)
    try:
        settings, model, template = check(environment)
    except SettingsError as error:
        for line in str(error).splitlines():
            print(f"launch: {line}", file=sys.stderr)
        return 2
    command = serve_command(settings, model, template, environment.get("TRACES_URL", ""))
    print("launch:", shlex.join(["vllm", *command]), file=sys.stdout if only_print else sys.stderr, flush=True)
    if not only_print:
        become_vllm(command, process_environment(settings, environment, socket.gethostname().split(".")[0]))
    return 0


def become_vllm(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Replaces this process by vLLM, so that a stop reaches it as a signal of its own."""
    Path(environment["HOME"]).mkdir(parents=True, exist_ok=True)
    PID_FILE.write_text(str(os.getpid()))
    # A pod of Kubernetes keeps /tmp when its container starts anew: this replica has not failed a check yet.
    HEALTH_FILE.unlink(missing_ok=True)
    api = Path(__file__).with_name("api.py")
    os.execve(sys.executable, [sys.executable, str(api), *command], environment)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
