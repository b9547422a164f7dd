"""The launcher: settings in, one checked `vllm serve` command out."""

import contextlib
import json
import os
import stat
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from stack.shell import ROOT
from vllm import launch

HEADS = 9
Start = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models with one in it, org/small."""
    folder = tmp_path / "models" / "org" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": HEADS}))
    return tmp_path / "models"


@pytest.fixture
def start(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Runs the launcher on an engine file's text and environment: (exit status, standard error, vLLM's arguments)."""

    def run(engine: str = "model: org/small", **environment: str) -> tuple[int, str, list[str]]:
        engine_file = tmp_path / "engine.yaml"
        engine_file.write_text(engine)
        executed: list[list[str]] = []
        monkeypatch.setattr(launch, "ENGINE_FILE", engine_file)
        monkeypatch.setattr(launch, "MODELS", models)
        monkeypatch.setattr(launch, "CACHE", tmp_path / "cache")
        monkeypatch.setattr(launch, "PID_FILE", tmp_path / "pid")
        monkeypatch.setattr(launch, "HEALTH_FILE", tmp_path / "health.json")
        monkeypatch.setattr(os, "environ", {"PATH": os.environ.get("PATH", ""), **environment})
        monkeypatch.setattr(os, "execve", lambda _path, arguments, _environment: executed.append(arguments))
        status = launch.main([])
        return status, capsys.readouterr().err, executed[0] if executed else []

    return run


def read(file: Path, environment: dict[str, str]) -> launch.Settings:
    """The settings, where they are all right."""
    mistakes = launch.Mistakes()
    settings = launch.read_settings(file, environment, mistakes)
    if mistakes.lines or settings is None:
        raise launch.SettingsError("\n".join(mistakes.lines))
    return settings


def value_of(arguments: list[str], flag: str) -> str:
    """What follows a flag."""
    return arguments[arguments.index(flag) + 1]


def test_starts_the_model_of_the_folder_under_its_own_name(start: Start, models: Path) -> None:
    status, _, arguments = start()
    assert status == 0
    assert arguments[1].endswith("api.py")
    assert (models.parent / "pid").read_text() == str(os.getpid())
    assert arguments[2:4] == ["serve", str(models / "org/small")]
    assert value_of(arguments, "--served-model-name") == "org/small"
    assert value_of(arguments, "--shutdown-timeout") == "120"
    assert "--trust-remote-code" not in arguments


def test_the_environment_wins_over_the_file_and_an_empty_value_is_none(start: Start) -> None:
    engine = "model: org/small\nmax_num_seqs: 7\nmax-model-len: 100"
    _, _, arguments = start(engine, MAX_NUM_SEQS="9", MAX_MODEL_LEN="", SERVED_MODEL_NAME="chat")
    assert value_of(arguments, "--max-num-seqs") == "9"
    assert value_of(arguments, "--max-model-len") == "100"
    assert value_of(arguments, "--served-model-name") == "chat"


@pytest.mark.parametrize("engine", ["served_model_name: a/b, claude-x", "served_model_name: [a/b, claude-x]"])
def test_a_model_may_have_several_names(start: Start, engine: str) -> None:
    """As text, in the file and in .env, or as a list."""
    _, _, arguments = start(f"model: org/small\n{engine}")
    at = arguments.index("--served-model-name")
    assert arguments[at + 1 : at + 3] == ["a/b", "claude-x"]
    assert arguments[at + 3].startswith("--")


def test_spans_are_exported_where_a_store_is_named_and_only_there() -> None:
    """A trace never begins at a replica: its health checks would be traces too."""
    settings = launch.Settings(model="a")
    url = "http://traces:4318/v1/traces"
    for store, command in (("", False), (url, True)):
        process = launch.process_environment(settings, {"TRACES_URL": store}, "vllm-0")
        assert process["OTEL_TRACES_SAMPLER"] == "parentbased_always_off"
        assert process.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "") == store
        assert ("--otlp-traces-endpoint" in launch.serve_command(settings, "m", None, store)) is command


def test_the_middleware_is_told_when_to_keep_a_stream_alive(tmp_path: Path) -> None:
    engine = tmp_path / "engine.yaml"
    engine.write_text("model: org/small\nstream_keepalive_seconds: 30")
    for environment, told in (({}, "30"), ({"STREAM_KEEPALIVE_SECONDS": "90"}, "90")):
        settings = read(engine, environment)
        assert launch.process_environment(settings, {}, "vllm-0")["STREAM_KEEPALIVE_SECONDS"] == told
        assert not any("keepalive" in argument for argument in launch.serve_command(settings, "m", None))


@pytest.mark.parametrize(
    ("engine", "environment"), [("model: org/small", "auto"), ("model: org/small\nmax_model_len: auto", "")]
)
def test_vllm_may_find_the_length_itself(start: Start, engine: str, environment: str) -> None:
    _, _, arguments = start(engine, MAX_MODEL_LEN=environment)
    assert value_of(arguments, "--max-model-len") == "auto"


def test_every_setting_reaches_vllm(start: Start, models: Path) -> None:
    (models / "plain.jinja").write_text("{{ messages }}")
    _, _, arguments = start(
        DTYPE="float16",
        QUANTIZATION="bitsandbytes",
        TENSOR_PARALLEL_SIZE="3",
        PIPELINE_PARALLEL_SIZE="2",
        FLEET_DEVICE="gpu",
        NVIDIA_VISIBLE_DEVICES="0,1,2,3,4,5",
        MAX_MODEL_LEN="2048",
        GPU_MEMORY_UTILIZATION="0.5",
        CPU_OFFLOAD_GB="2.5",
        KV_CACHE_GB="0.5",
        MAX_NUM_SEQS="8",
        MAX_NUM_BATCHED_TOKENS="512",
        MAX_NUM_QUEUED_REQS="64",
        ENABLE_PREFIX_CACHING="false",
        ENFORCE_EAGER="true",
        KV_CACHE_DTYPE="fp8",
        SPECULATIVE_CONFIG='{"method": "ngram", "num_speculative_tokens": 4}',
        CHAT_TEMPLATE="plain.jinja",
        TOOL_CALL_PARSER="hermes",
        TRUST_REMOTE_CODE="true",
        EXTRA_ARGS="--seed 7 --generation-config 'a b'",
        DRAIN_SECONDS="33",
    )
    expected = {
        "--dtype": "float16",
        "--quantization": "bitsandbytes",
        "--tensor-parallel-size": "3",
        "--pipeline-parallel-size": "2",
        "--max-model-len": "2048",
        "--gpu-memory-utilization": "0.5",
        "--cpu-offload-gb": "2.5",
        "--kv-cache-memory-bytes": str(2**29),
        "--max-num-seqs": "8",
        "--max-num-batched-tokens": "512",
        "--max-num-queued-reqs": "64",
        "--kv-cache-dtype": "fp8",
        "--speculative-config": '{"method": "ngram", "num_speculative_tokens": 4}',
        "--chat-template": str(models / "plain.jinja"),
        "--tool-call-parser": "hermes",
        "--shutdown-timeout": "33",
    }
    assert {flag: value_of(arguments, flag) for flag in expected} == expected
    assert {"--no-enable-prefix-caching", "--enforce-eager", "--enable-auto-tool-choice"} <= set(arguments)
    assert "--trust-remote-code" in arguments
    assert arguments[-4:] == ["--seed", "7", "--generation-config", "a b"]  # last, so that they win


def test_a_draft_model_is_looked_for_below_the_models_too(start: Start, models: Path) -> None:
    """The name of a draft stays one for the hub only where no folder has it."""
    for name, found in (("org/small", str(models / "org/small")), ("org/other", "org/other")):
        _, _, arguments = start(SPECULATIVE_CONFIG=json.dumps({"method": "draft_model", "model": name}))
        assert json.loads(value_of(arguments, "--speculative-config"))["model"] == found
    status, said, _ = start(SPECULATIVE_CONFIG='{"method": "draft_model", "model": "org"}')
    assert status == 2
    assert f"{models / 'org'}: no config.json" in said


MISTAKES = [
    (
        "unknown setting",
        "model: org/small\nmax_model_length: 1",
        {},
        ["launch: vllm/engine.yaml: ", "max_model_length", "max_model_len?"],
    ),
    (
        "wrong type in the file",
        "model: org/small\nmax_num_seqs: many",
        {},
        ["launch: vllm/engine.yaml: max_num_seqs", "'many'", "whole"],
    ),
    (
        "wrong type in .env",
        "model: org/small",
        {"TENSOR_PARALLEL_SIZE": "two"},
        [".env: TENSOR_PARALLEL_SIZE", "'two'"],
    ),
    ("zero GPUs", "model: org/small", {"TENSOR_PARALLEL_SIZE": "0"}, [".env: TENSOR_PARALLEL_SIZE", "1 or more"]),
    ("above a share", "model: org/small", {"GPU_MEMORY_UTILIZATION": "90"}, ["GPU_MEMORY_UTILIZATION", "up to 1"]),
    ("no seconds", "model: org/small", {"STREAM_KEEPALIVE_SECONDS": "soon"}, ["STREAM_KEEPALIVE_SECONDS", "1 to 3600"]),
    (
        "too short",
        "model: org/small",
        {"STREAM_KEEPALIVE_SECONDS": "0"},
        [".env: STREAM_KEEPALIVE_SECONDS", "1 to 3600"],
    ),
    ("too long", "model: org/small\nstream_keepalive_seconds: 9999", {}, ["engine.yaml: stream_keepalive_seconds"]),
    ("no end of memory", "model: org/small", {"KV_CACHE_GB": "inf"}, [".env: KV_CACHE_GB is 'inf'", "GiB above 0"]),
    ("no number", "model: org/small", {"CPU_OFFLOAD_GB": "nan"}, [".env: CPU_OFFLOAD_GB is 'nan'", "GiB, 0 or more"]),
    ("a list of sizes", "model: org/small\nkv_cache_gb: [1]", {}, ["engine.yaml: kv_cache_gb is [1]", "GiB above 0"]),
    ("no name", "model: org/small", {"SERVED_MODEL_NAME": "a,,b"}, [".env: SERVED_MODEL_NAME is 'a,,b'", "empty"]),
    ("a name twice", "model: org/small", {"SERVED_MODEL_NAME": "a, a"}, ["SERVED_MODEL_NAME", "twice", "commas"]),
    ("a name like an option", "model: org/small", {"SERVED_MODEL_NAME": "a,--b"}, ["--b would be an option"]),
    ("a name that is none", "model: org/small\nserved_model_name: [a, 1]", {}, ["served_model_name", "commas between"]),
    ("unknown dtype", "model: org/small", {"DTYPE": "bf16"}, ["DTYPE", "'bf16'", "bfloat16"]),
    ("no truth value", "model: org/small", {"TRUST_REMOTE_CODE": "maybe"}, ["TRUST_REMOTE_CODE", "true or false"]),
    ("broken JSON", "model: org/small", {"SPECULATIVE_CONFIG": "{"}, ["SPECULATIVE_CONFIG", "not JSON", "ngram"]),
    ("JSON, no object", "model: org/small", {"SPECULATIVE_CONFIG": "[1]"}, ["SPECULATIVE_CONFIG", "JSON object"]),
    ("open quote", "model: org/small", {"EXTRA_ARGS": "--a 'b"}, ["EXTRA_ARGS", "quot"]),
    ("no model", "dtype: auto", {}, ["model is not set", "org/name"]),
    ("no such folder", "model: small", {}, ["'small'", "folder below models/", "org/name"]),
    ("no chat template", "model: org/small", {"CHAT_TEMPLATE": "x.jinja"}, ["CHAT_TEMPLATE", "x.jinja", "models/"]),
    ("heads do not divide", "model: org/small", {"TENSOR_PARALLEL_SIZE": "2"}, ["9 attention heads", "1, 3, 9"]),
    ("stages on a CPU", "model: org/small", {"PIPELINE_PARALLEL_SIZE": "2"}, ["PIPELINE_PARALLEL_SIZE", "on a CPU"]),
    ("broken YAML", "model: [org", {"FLEET_DEVICE": "gpu"}, ["launch: vllm/engine.gpu.yaml: ", "line"]),
    ("no mapping", "- model", {}, ["launch: vllm/engine.yaml: ", "name: value"]),
    (
        "GPU image, no GPU",
        "model: org/small",
        {"FLEET_DEVICE": "gpu", "PATH": "/nowhere"},
        ["sees none", "container toolkit"],
    ),
    (
        "more workers than GPUs",
        "model: org/small",
        {"FLEET_DEVICE": "gpu", "PATH": "/nowhere", "NVIDIA_VISIBLE_DEVICES": "0,1", "TENSOR_PARALLEL_SIZE": "3"},
        ["is 3, but", "pinned to 2 GPUs", "device_ids"],
    ),
    (
        "fewer workers than GPUs",
        "model: org/small",
        {"FLEET_DEVICE": "gpu", "PATH": "/nowhere", "NVIDIA_VISIBLE_DEVICES": "0,1"},
        ["is 1, but", "pinned to 2 GPUs", "device_ids"],
    ),
]


@pytest.mark.parametrize(("engine", "environment", "says"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(
    start: Start, engine: str, environment: dict[str, str], says: list[str]
) -> None:
    status, errors, arguments = start(engine, **environment)
    assert status == 2
    assert arguments == []
    assert len(errors.splitlines()) == 1, errors
    assert [word for word in says if word not in errors] == [], errors


def test_each_mistake_is_told(start: Start) -> None:
    _, errors, _ = start(MAX_NUM_SEQS="x", MAX_MODEL_LEN="y")
    assert [line.split()[2] for line in errors.splitlines()] == ["MAX_MODEL_LEN", "MAX_NUM_SEQS"]


def test_mistakes_of_all_kinds_are_told_at_once(start: Start, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "vllm_folder", lambda: source_of_vllm(models.parent))
    status, errors, arguments = start(
        "model: org/none\nmax_lenght: 1\nmax_num_seqs: 0",
        MODEL="none",
        MAX_MODEL_LEN="abc",
        CHAT_TEMPLATE="none.jinja",
        PIPELINE_PARALLEL_SIZE="2",
        QUANTIZATION="fp9",
        EXTRA_ARGS="--seed 1 --api_key=secret",
    )
    assert (status, arguments) == (2, [])
    about = ["max_lenght", "MAX_MODEL_LEN", "max_num_seqs", "MODEL", "none.jinja", "PIPELINE", "--api-key", "'fp9'"]
    assert [name for name, line in zip(about, errors.splitlines(), strict=True) if name not in line] == [], errors
    assert "secret" not in errors


def source_of_vllm(folder: Path) -> Path:
    """A folder with the parts of vLLM's source that list names."""
    for name, text in {
        "model_executor/layers/quantization/__init__.py": 'QuantizationMethods = Literal[\n    "awq",\n    "fp8",\n]\n',
        "config/cache.py": 'CacheDType = Literal["auto", "fp8"]\n',
        "tool_parsers/__init__.py": '_TOOL_PARSERS_TO_REGISTER = {\n    "hermes": ("file", "Class"),\n}\n',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", ["QUANTIZATION", "KV_CACHE_DTYPE", "TOOL_CALL_PARSER"])
def test_a_name_that_vllm_does_not_have_is_a_mistake_with_those_that_it_has(
    start: Start, models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What its source does not list is left to vLLM, as is a parser beside a plugin."""
    monkeypatch.setattr(launch, "vllm_folder", lambda: source_of_vllm(models.parent))
    right = {"QUANTIZATION": "fp8", "KV_CACHE_DTYPE": "fp8", "TOOL_CALL_PARSER": "hermes"}[name]
    assert start(**{name: right})[0] == 0
    status, errors, _ = start(**{name: "file"})
    assert status == 2
    assert f"{name} is 'file', which vLLM does not have; it has " in errors
    assert right in errors
    assert start(TOOL_CALL_PARSER="mine", EXTRA_ARGS="--tool-parser-plugin /mine.py")[0] == 0
    monkeypatch.setattr(launch, "vllm_folder", lambda: models)
    assert start(**{name: "file"})[0] == 0


def test_a_plugin_of_vllm_may_bring_a_quantization(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "entry_points", lambda group: [types.SimpleNamespace(name=f"{group}.own")])
    vllm = source_of_vllm(models.parent)
    launch.check_names(launch.Settings(model="a", quantization="vllm.general_plugins.own"), vllm)
    with pytest.raises(launch.SettingsError, match="'own', which vLLM does not have"):
        launch.check_names(launch.Settings(model="a", quantization="own"), vllm)


def test_a_key_for_the_replica_is_refused_as_nobody_would_send_it(start: Start) -> None:
    for words in ("--api-key s3cret", "--api-key=s3cret", "--seed 1 --api_key s3cret"):
        status, errors, _ = start(EXTRA_ARGS=words)
        assert status == 2
        assert "EXTRA_ARGS has --api-key" in errors
        assert "s3cret" not in errors
    assert start(EXTRA_ARGS="--seed 1")[0] == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--no-enable-force-include-usage", "--no-enable-force-include-usage"),
        ("--no_enable_force_include_usage", "--no-enable-force-include-usage"),
        ("--no-enable-force", "--no-enable-force (--no-enable-force-include-usage)"),
        ("--scheduling-policy fcfs", "--scheduling-policy"),
        ("--sched=fcfs", "--sched (--scheduling-policy)"),
        ("--port 9000", "--port"),
        ("--por=9000", "--por (--port)"),
        ("--host ::1", "--host"),
        ("--uds /tmp/x", "--uds"),
        ("--ssl-keyfile /k", "--ssl-keyfile"),
        ("--ssl_certfile=/c", "--ssl-certfile"),
        ("--ssl-k /k", "--ssl-k"),
        ("--api s3cret", "--api (--api-key)"),
    ],
)
def test_what_would_undo_what_the_gateway_relies_on_is_refused(start: Start, words: str, named: str) -> None:
    status, errors, _ = start(EXTRA_ARGS=f"--seed 1 {words}")
    assert status == 2
    assert f"EXTRA_ARGS has {named}: " in errors
    assert errors.count("\n") == 1


GPU = {"FLEET_DEVICE": "gpu", "PATH": "/nowhere", "NVIDIA_VISIBLE_DEVICES": "0"}


def test_a_replica_with_a_level_of_sleep_has_sleep_mode_and_the_middleware(tmp_path: Path) -> None:
    engine = tmp_path / "engine.yaml"
    engine.write_text("model: org/small\nsleep_level: 1\nshared_gpus: [0, 1]")
    settings = read(engine, {"SLEEP_LEVEL": "2", "SHARED_GPUS": "a,b"})
    command = launch.serve_command(settings, "m", None)
    wrapped = [command[n + 1] for n, word in enumerate(command) if word == "--middleware"]
    assert wrapped == ["begin.Begin", "sleeper.Sleeper", "drain.Drain", "lines.Lines"]
    assert "--enable-sleep-mode" in command
    assert not {"--sleep-level", "--wake-seconds", "--shared-gpus"} & {*command}
    told = launch.process_environment(settings, {}, "vllm-0")
    assert {name: told[name] for name in ("SLEEP_LEVEL", "WAKE_SECONDS", "SHARED_GPUS")} == {
        "SLEEP_LEVEL": "2", "WAKE_SECONDS": "60", "SHARED_GPUS": "a,b",
    }  # fmt: skip


def test_without_a_level_nothing_of_sleep_mode_is_there(start: Start) -> None:
    _, _, arguments = start()
    assert not [word for word in arguments if "sleep" in word]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLEEP_LEVEL": "1"}, "SLEEP_LEVEL is 1, but vLLM has no sleep mode on a CPU: leave it out"),
        ({"SLEEP_LEVEL": "3", **GPU}, "SLEEP_LEVEL is '3'; it must be 1 (weights kept in the host's memory) or 2"),
        ({"SHARED_GPUS": "0,1", **GPU}, "SHARED_GPUS is 0,1, but without SLEEP_LEVEL this replica never gives them up"),
        ({"SLEEP_LEVEL": "1", "SHARED_GPUS": "0,,1", **GPU}, "SHARED_GPUS is '0,,1' (a name is empty"),
        ({"SLEEP_LEVEL": "1", "WAKE_SECONDS": "0", **GPU}, "WAKE_SECONDS is '0'; it must be a whole number"),
        ({"SLEEP_LEVEL": "1", "EXTRA_ARGS": "--api-server-count 2", **GPU}, "EXTRA_ARGS has --api-server-count: each"),
        ({"SLEEP_LEVEL": "1", "EXTRA_ARGS": "-dp 2", **GPU}, "EXTRA_ARGS has -dp: each process"),
    ],
)
def test_what_cannot_sleep_is_refused(start: Start, environment: dict[str, str], says: str) -> None:
    status, errors, arguments = start(**environment)
    assert (status, arguments) == (2, [])
    assert says in errors
    assert errors.count("\n") == 1


def test_what_runs_over_ray_does_not_sleep() -> None:
    with pytest.raises(launch.SettingsError, match="what runs over Ray does not sleep"):
        launch.check_sleep(launch.Settings(model="m", sleep_level=1), on_gpus=True, over_hosts=True)


def test_other_arguments_pass(start: Start) -> None:
    words = "--seed 1 --enable-force-include-usage --hf-overrides {} -O3 --api-server-count 2 --"
    assert start(EXTRA_ARGS=words)[0] == 0


@pytest.mark.parametrize(
    ("engine", "environment", "words"),
    [
        ("model: org/small", {"KV_CACHE_GB": "1e300"}, "KV_CACHE_GB is '1e300'"),
        ("model: org/small", {"KV_CACHE_GB": "inf"}, "KV_CACHE_GB is 'inf'"),
        ("model: org/small", {"MODEL": "m" * 5000}, "MODEL: what it names cannot be looked up"),
        ("model: org/small", {"CHAT_TEMPLATE": "m" * 300}, "CHAT_TEMPLATE: what it names cannot be looked up"),
        ("model: org/small", {"SPECULATIVE_CONFIG": json.dumps({"model": "m" * 300})}, "SPECULATIVE_CONFIG: what it"),
        ("model: org/small", {"SPECULATIVE_CONFIG": '{"a":' * 100_000}, "nested too deep"),
        ("model: " + "[" * 10_000, {}, "nested too deep"),
        ("model: org/small\nspeculative_config: {a: 2026-01-01}", {}, "not JSON"),
    ],
)
def test_what_is_beyond_all_measure_is_told_in_a_line(
    start: Start, engine: str, environment: dict[str, str], words: str
) -> None:
    status, errors, _ = start(engine, **environment)
    assert status == 2
    assert words in errors
    assert errors.startswith("launch: ")


def test_a_missing_engine_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(launch.SettingsError, match=r"^vllm/engine\.yaml: cannot be read"):
        read(tmp_path / "none.yaml", {})


@pytest.mark.parametrize("content", [None, "{", "", "[]"])
def test_a_folder_without_a_whole_config_is_a_mistake(models: Path, content: str | None) -> None:
    config = models / "org/small/config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    with pytest.raises(launch.SettingsError, match=r"config\.json.*fetch the model again"):
        launch.find_model("org/small", models)


@pytest.mark.parametrize("closed", ["", "org", "org/small", "org/small/config.json", "org/small/model.safetensors"])
def test_a_model_that_the_replica_may_not_read_is_a_mistake(closed: str) -> None:
    # not tmp_path, which other users cannot enter
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        models = Path(folder, "models")
        (models / "org" / "small").mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (models / "org" / "small" / name).write_text("{}")
        launch.find_model("org/small", models)
        mode = (models / closed).stat().st_mode
        (models / closed).chmod(0)
        is_root = os.geteuid() == 0
        try:
            if is_root:
                os.seteuid(10001)
            with pytest.raises(launch.SettingsError, match=f"{models / closed}: .*chmod -R a.rX models"):
                launch.find_model("org/small", models)
        finally:
            if is_root:
                os.seteuid(0)
            (models / closed).chmod(mode)


def test_the_image_has_the_launcher_readable_whatever_the_umask_of_the_clone() -> None:
    copied = [line for line in (ROOT / "vllm" / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    assert copied
    assert all(line.startswith("COPY --chmod=0644 ") for line in copied)


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("GatedRepoError", "gated.*licence.*HF_TOKEN_FILE in .env.*make up"),
        ("RepositoryNotFoundError", "not on the hub.*spelling"),
        ("LocalEntryNotFoundError", r"cannot be reached; put it into models/org/far"),
        ("EntryNotFoundError", r"no config\.json"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    models: Path, monkeypatch: pytest.MonkeyPatch, failure: str, says: str
) -> None:
    names = ("EntryNotFoundError", "RepositoryNotFoundError", "GatedRepoError", "LocalEntryNotFoundError")
    errors = types.SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})

    def download(_model: str, _file: str) -> str:
        raise getattr(errors, failure)

    hub = types.SimpleNamespace(hf_hub_download=download)
    monkeypatch.setattr(launch, "import_module", lambda name: errors if name.endswith("errors") else hub)
    with pytest.raises(launch.SettingsError, match=says) as raised:
        launch.find_model("org/far", models)
    assert len(str(raised.value).splitlines()) == 1


def test_a_model_on_the_hub_is_left_to_vllm(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"num_attention_heads": 8}')
    hub = types.SimpleNamespace(hf_hub_download=lambda _model, _file: str(config))
    monkeypatch.setattr(launch, "import_module", lambda _name: hub)
    assert launch.find_model("org/far", models) == ("org/far", {"num_attention_heads": 8})


TWO_GPUS = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
SLICES = (
    "GPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 3g.40gb Device 0: (UUID: MIG-1)\n  MIG 3g.40gb Device 1: (UUID: MIG-2)\n"
)


@pytest.mark.parametrize(("listing", "count"), [(TWO_GPUS, 2), (SLICES, 2), (TWO_GPUS.splitlines()[0], 1)])
def test_counts_the_gpus_that_the_driver_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, count: int
) -> None:
    (tmp_path / "listing").write_text(listing)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] && exec cat {tmp_path}/listing\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # the image says "all" whatever the container got
    assert launch.count_gpus({"NVIDIA_VISIBLE_DEVICES": "all"}) == count


@pytest.mark.parametrize("visible", ["", "all", "none", "void"])
def test_no_gpu_is_a_mistake(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(launch.SettingsError, match="sees none"):
        launch.count_gpus({"NVIDIA_VISIBLE_DEVICES": visible})


@pytest.mark.parametrize("extra", ["--data-parallel-size 2", "-dp 2", "--tensor-parallel-size=2"])
def test_parallel_sizes_among_the_further_arguments_are_left_to_vllm(start: Start, extra: str) -> None:
    environment = {"FLEET_DEVICE": "gpu", "PATH": "/nowhere", "NVIDIA_VISIBLE_DEVICES": "0,1"}
    assert start(EXTRA_ARGS=extra, **environment)[0] == 0
    assert start(EXTRA_ARGS="--seed 7 --no-parallelism", **environment)[0] == 2


@pytest.mark.parametrize(
    "config",
    [{}, {"text_config": None}, {"text_config": [1]}, {"num_attention_heads": "9"}, {"num_attention_heads": None}],
)
def test_heads_that_the_config_does_not_tell_are_left_to_vllm(config: dict[str, Any]) -> None:
    launch.check_fit(launch.Settings(model="org/small", tensor_parallel_size=2), config, None)


def test_the_heads_of_a_model_for_text_and_images_are_found() -> None:
    chosen = launch.Settings(model="org/small", tensor_parallel_size=2)
    with pytest.raises(launch.SettingsError, match="9 attention heads"):
        launch.check_fit(chosen, {"text_config": {"num_attention_heads": 9}}, None)


def test_metrics_are_told_apart_by_replica_and_unset_nccl_settings_stay_unset() -> None:
    environment = {"NCCL_DEBUG": "", "NCCL_P2P_DISABLE": "1", "OTHER": ""}
    chosen = launch.Settings(model="org/small")
    process = launch.process_environment(chosen, environment, "vllm-7")
    assert process["OTEL_RESOURCE_ATTRIBUTES"] == "service.instance.id=vllm-7"
    assert process["OTEL_SERVICE_NAME"] == "vllm-api"
    assert process["HOME"].endswith("/vllm-7")
    assert "NCCL_DEBUG" not in process
    assert process["NCCL_P2P_DISABLE"] == "1"


@pytest.mark.parametrize("eager", [True, False, None])
def test_nothing_is_compiled_where_compiling_is_off(eager: bool | None) -> None:
    chosen = launch.Settings(model="org/small", enforce_eager=eager)
    assert ("TORCHDYNAMO_DISABLE" in launch.process_environment(chosen, {}, "vllm-0")) is (eager is True)


@pytest.mark.parametrize(
    ("cores", "asked", "tp", "threads"),
    [(2, None, 1, "1"), (16, None, 1, "8"), (16, None, 4, "2"), (2, None, 3, "1"), (16, 12, 3, "4")],
)
def test_replicas_on_a_cpu_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, asked: int | None, tp: int, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    chosen = launch.Settings(model="org/small", cpu_threads=asked, tensor_parallel_size=tp)
    assert launch.process_environment(chosen, {}, "vllm-0")["OMP_NUM_THREADS"] == threads
    assert "OMP_NUM_THREADS" not in launch.process_environment(chosen, {"FLEET_DEVICE": "gpu"}, "vllm-0")


@pytest.mark.parametrize("name", ["engine.yaml", "engine.gpu.yaml"])
def test_the_engine_files_that_we_ship_are_right(name: str) -> None:
    read(ROOT / "vllm" / name, {})


@given(text=st.text() | st.text(st.sampled_from("model:- 0123{}[]'\"#&*!\n")))
@example(text="max_model_len: 2001-99-99")
def test_no_engine_file_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(launch.SettingsError):
        read(path, {})


@given(name=st.sampled_from(sorted(launch.Settings.model_fields)), value=st.text(st.characters(codec="utf-8")))
def test_no_value_in_the_environment_makes_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "model.yaml"
    path.write_text("model: org/small")
    with contextlib.suppress(launch.SettingsError):
        launch.serve_command(read(path, {name.upper(): value}), "org/small", None)


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "max_model_len": st.integers(1, 10**7) | st.just("auto"),
    "tensor_parallel_size": st.integers(1, 64),
    "gpu_memory_utilization": st.floats(0.01, 1),
    "kv_cache_gb": st.floats(0.01, 1000),
    "enforce_eager": st.booleans(),
    "dtype": st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    "speculative_config": st.dictionaries(st.text("abc", min_size=1), st.integers()),
}


def test_the_settings_for_gpus_start_on_one_without_bfloat16() -> None:
    """A Turing has none, and vLLM refuses it there; by itself it takes float16."""
    assert read(ROOT / "vllm" / "engine.gpu.yaml", {}).dtype == "auto"


@given(values=st.fixed_dictionaries({}, optional=VALUES))
def test_a_value_means_the_same_in_the_file_and_in_the_environment(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "full.yaml").write_text(yaml.safe_dump({"model": "a/b", **values}))
    (folder / "bare.yaml").write_text("model: a/b")
    texts = {
        name.upper(): json.dumps(value) if isinstance(value, dict) else str(value) for name, value in values.items()
    }
    assert read(folder / "full.yaml", {}) == read(folder / "bare.yaml", texts)


def test_a_replica_does_not_begin_with_what_was_found_of_the_last(start: Start, tmp_path: Path) -> None:
    (tmp_path / "health.json").write_text('{"failures": 3}')
    assert start()[0] == 0
    assert not (tmp_path / "health.json").exists()
