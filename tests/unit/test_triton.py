"""triton/start.py and triton/look.py: what is looked at before Triton starts, and its health."""

import http.client
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack.shell import ROOT
from vllm import health, launch

ENGINE = "model: org/small\ndtype: bfloat16\nmax_model_len: 512\nkv_cache_gb: 1\nmax_num_queued_reqs: 8\n"
SOURCE = """
class EngineArgs:
    model: str = ""
    gpu_memory_utilization: float = 0.9
    block_size: int | None = None

class AsyncEngineArgs(EngineArgs):
    enable_log_requests: bool = False
"""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """As in the image, where launch.py lies beside it, with a model, settings of replicas and a vLLM."""
    monkeypatch.setitem(sys.modules, "launch", launch)
    module = import_module("triton.start")
    for name in ("org/small", "org/other"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"num_attention_heads": 9}')
    (tmp_path / "engine.yaml").write_text(ENGINE)
    (tmp_path / "vllm" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text(SOURCE)
    monkeypatch.setattr(launch, "MODELS", tmp_path / "models")
    monkeypatch.setattr(launch, "ENGINE_FILE", tmp_path / "engine.yaml")
    monkeypatch.setattr(launch, "vllm_folder", lambda: tmp_path / "vllm")
    return module


@pytest.fixture
def checked(start: ModuleType, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The engine arguments that Triton gets for the text of a model.json."""

    def check(text: str, **environment: str) -> dict[str, Any]:
        file = tmp_path / "repository" / "m" / "1" / "model.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        found: dict[Path, dict[str, Any]] = start.check_models(tmp_path / "repository", environment)
        return found[file]

    return check


def test_what_the_file_does_not_say_comes_from_the_replicas(checked: Callable[..., dict[str, Any]]) -> None:
    arguments = checked('{"gpu_memory_utilization": 0.5}', MAX_NUM_SEQS="4", GPU_MEMORY_UTILIZATION="0.9")
    assert arguments.pop("model").endswith("/models/org/small")
    assert arguments == {
        "served_model_name": "org/small",
        "dtype": "bfloat16",
        "max_model_len": 512,
        "kv_cache_memory_bytes": 2**30,
        "max_num_seqs": 4,
        "gpu_memory_utilization": 0.5,
    }


def test_a_file_with_a_model_stands_for_itself(checked: Callable[..., dict[str, Any]]) -> None:
    arguments = checked('{"model": "org/other", "block_size": 16}', MAX_NUM_SEQS="4", DTYPE="wrong")
    assert arguments.pop("model").endswith("/models/org/other")
    assert arguments == {"served_model_name": "org/other", "block_size": 16}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "m/1/model.json: not JSON"),
        ("[" * 5000, "m/1/model.json: not JSON"),
        ("[]", "m/1/model.json: holds a list"),
        (
            '{"disable_log_requests": true}',
            "m/1/model.json: unknown engine argument 'disable_log_requests'; did you mean",
        ),
        ('{"port": 80}', "m/1/model.json: unknown engine argument 'port'; leave it out"),
        ('{"gpu_memory_utilization": 2}', "m/1/model.json: gpu_memory_utilization is 2; it must be a share above 0"),
        ('{"model": "org/none here"}', "m/1/model.json: MODEL is 'org/none here': neither a folder"),
        (
            '{"tensor_parallel_size": 2}',
            "m/1/model.json: TENSOR_PARALLEL_SIZE is 2, but org/small has 9 attention heads",
        ),
        ('{"pipeline_parallel_size": 2}', "m/1/model.json: PIPELINE_PARALLEL_SIZE is 2, but on a CPU"),
    ],
)
def test_a_mistake_is_one_line(checked: Callable[..., dict[str, Any]], text: str, said: str) -> None:
    with pytest.raises(launch.SettingsError) as caught:
        checked(text)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(said)


def test_all_mistakes_of_all_models_are_told_at_once(
    start: ModuleType, checked: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    checked("{}")
    other = tmp_path / "repository" / "n" / "2" / "model.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"nope": 1, "dtype": "int3"}')
    with pytest.raises(launch.SettingsError) as caught:
        start.check_models(tmp_path / "repository", {})
    assert [line.split(";")[0] for line in str(caught.value).splitlines()] == [
        "n/2/model.json: unknown engine argument 'nope'",
        "n/2/model.json: dtype is 'int3'",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*launch.Settings.model_fields, "block_size", "nope"]) | st.text()


@given(values=st.dictionaries(NAMES, JSON, max_size=4))
def test_whatever_the_file_holds_it_is_taken_or_refused_in_lines(values: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "launch", launch)
        start = import_module("triton.start")
        patch.setattr(launch, "vllm_folder", lambda: None)
        patch.setattr(start, "_check", lambda *_: None)
        patch.setattr(launch, "find_model", lambda model, _: (model, {}))
        patch.setattr(launch, "find_draft", lambda draft, _: draft)
        file = Path("/dev/shm/triton-test-model.json")  # noqa: S108 - rewritten hundreds of times
        file.write_text(json.dumps({"model": "org/small", **values}))
        said = ""
        try:
            start.engine_arguments(file, "model.json", {})
        except launch.SettingsError as error:
            said = str(error) or "nothing"
        finally:
            file.unlink()
        assert all(line.startswith("model.json: ") for line in said.splitlines())


def repository(folder: Path) -> Path:
    (folder / "vllm_model" / "1").mkdir(parents=True)
    (folder / "vllm_model" / "config.pbtxt").write_text('backend: "vllm"\n')
    (folder / "vllm_model" / "1" / "model.json").write_text("{}")
    return folder


def test_the_copy_is_what_changes(start: ModuleType, tmp_path: Path) -> None:
    original = repository(tmp_path / "folders" / "mine")
    start.fetch("mine", original.parent, tmp_path / "copy")
    file = tmp_path / "copy" / "vllm_model" / "1" / "model.json"
    file.unlink()
    file.write_text("changed")
    assert (original / "vllm_model" / "1" / "model.json").read_text() == "{}"
    start.fetch("mine", original.parent, tmp_path / "copy")
    assert file.read_text() == "{}"


@pytest.mark.parametrize("source", ["", "..", "none", "a/b", "/etc", "s3://", "s3://B/x", "http://bucket/x"])
def test_a_source_that_is_none_is_named(start: ModuleType, tmp_path: Path, source: str) -> None:
    with pytest.raises(launch.SettingsError, match="TRITON_REPOSITORY is") as caught:
        start.fetch(source, tmp_path, tmp_path / "copy")
    assert repr(source) in str(caught.value)


def test_an_empty_folder_has_no_model(start: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(launch.SettingsError, match="empty: there is no model in it"):
        start.fetch("empty", tmp_path, tmp_path / "copy")


class Bucket:
    """An S3 client with these keys and sizes."""

    def __init__(self, **objects: int) -> None:
        self.objects = objects

    def get_paginator(self, _name: str) -> "Bucket":
        return self

    def paginate(self, **_asked: str) -> list[dict[str, Any]]:
        return [{"Contents": [{"Key": key, "Size": size} for key, size in self.objects.items()]}]

    def download_file(self, _bucket: str, _key: str, path: str) -> None:
        Path(path).write_text("x")


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ({"t/a/../../b": 1}, "leads out of the repository"),
        ({"t//etc/passwd": 1}, "leads out of the repository"),
        ({"t/a/config.pbtxt": 2**28, "t/a/1/x": 1}, "has more than 256 MiB"),
        ({}, "there is no model in it"),
    ],
)
def test_an_s3_server_gets_nothing_out_of_its_folder_and_no_more_than_fits(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objects: dict[str, int], said: str
) -> None:
    monkeypatch.setattr("boto3.client", lambda _: Bucket(**objects))
    with pytest.raises(launch.SettingsError, match=said):
        start.fetch("s3://bucket/t", tmp_path, tmp_path / "copy")
    assert not (tmp_path / "b").exists()


def test_an_s3_server_that_is_not_there_is_said_in_one_line(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(launch.SettingsError, match="cannot be read") as caught:
        start.fetch("s3://bucket/t", tmp_path, tmp_path / "copy")
    assert len(str(caught.value).splitlines()) == 1


class Answers:
    """Triton, as the health check sees it: each request's status by path, 200 where none is said."""

    def __init__(self, **statuses: int) -> None:
        self.statuses = statuses
        self.asked: list[str] = []

    def request(self, _method: str, path: str, _body: object = None) -> tuple[int, bytes]:
        self.asked.append(path)
        status = self.statuses.get(path.rpartition("/")[2], 200)
        if status < 100:
            raise http.client.RemoteDisconnected("gone")
        return status, b"why"


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.setitem(sys.modules, "health", health)
    module = import_module("triton.look")
    monkeypatch.setattr(module, "SEEN", tmp_path / "seen.json")
    monkeypatch.setattr(module, "PID", tmp_path / "pid")
    monkeypatch.setattr(module, "MODELS", repository(tmp_path / "repository"))
    monkeypatch.setattr(module, "EVERY_S", 0)
    monkeypatch.setattr(health, "PROC", tmp_path)
    (tmp_path / "pid").write_text("4242")
    return module


def check(look: ModuleType, monkeypatch: pytest.MonkeyPatch, triton: Answers) -> tuple[int, list[tuple[int, int]]]:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(health, "Replica", lambda _: triton)
    monkeypatch.setattr("os.kill", lambda pid, number: killed.append((pid, number)))
    return look.main(), killed


def test_a_triton_whose_models_make_a_token_is_well(look: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    well = Answers()
    assert check(look, monkeypatch, well) == (0, [])
    assert well.asked == ["/v2/health/ready", "/v2/models/vllm_model/generate"]
    monkeypatch.setattr(look, "EVERY_S", 20)
    assert check(look, monkeypatch, well) == (0, [])
    assert len(well.asked) == 2


@pytest.mark.parametrize("fault", [{"generate": 400}, {"ready": 400}, {"generate": 0}])
def test_one_that_fails_three_times_is_ended_but_not_while_it_loads(
    look: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: dict[str, int]
) -> None:
    assert [check(look, monkeypatch, Answers(**fault)) for _ in range(4)] == [(1, [])] * 4
    assert check(look, monkeypatch, Answers())[0] == 0
    outcomes = [check(look, monkeypatch, Answers(**fault)) for _ in range(3)]
    assert outcomes == [(1, []), (1, []), (1, [(4242, 9)])]


def test_the_model_repository_is_as_users_know_it() -> None:
    model = ROOT / "triton" / "model_repository" / "vllm_model"
    assert json.loads((model / "1" / "model.json").read_text())["gpu_memory_utilization"] == 0.5
    assert 'backend: "vllm"' in (model / "config.pbtxt").read_text()
