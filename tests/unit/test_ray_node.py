"""ray/node.py and ray/application.py: what is looked at before Ray starts, and the words for what is wrong."""

import socket
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm import launch

HERE = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "wg0": ["10.9.0.1"]}
RIGHT = {"RAY_HEAD": "10.0.0.1", "HOST_ADDRESS": "10.0.0.1"}


@pytest.fixture(scope="module")
def application() -> ModuleType:
    """As in the image, where launch.py lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "launch", launch)
        return import_module("ray.application")


@pytest.fixture(scope="module")
def node(application: ModuleType) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "launch", launch)
        patch.setitem(sys.modules, "application", application)
        return import_module("ray.node")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}, []),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, []),
        ({"RAY_HEAD": ""}, ["RAY_HEAD is not set"]),
        ({"RAY_HEAD": "gpu-a"}, ["RAY_HEAD is 'gpu-a'"]),
        ({"HOST_ADDRESS": "127.0.0.1"}, ["HOST_ADDRESS is 127.0.0.1, which is another host on each host"]),
        ({"HOST_ADDRESS": "10.0.0.2"}, ["HOST_ADDRESS is 10.0.0.2, but this host has 10.0.0.1, 10.9.0.1"]),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, ["NCCL_SOCKET_IFNAME is ib0, but this host has eth0, lo, wg0"]),
        ({"GLOO_SOCKET_IFNAME": "wg0"}, ["GLOO_SOCKET_IFNAME is wg0, but 10.0.0.1 (HOST_ADDRESS) is on eth0"]),
    ],
)
def test_addresses_and_interfaces(node: ModuleType, changes: dict[str, str], said: list[str]) -> None:
    lines = node.interface_mistakes(RIGHT | changes, HERE)
    assert len(lines) == len(said)
    assert all(words in line for words, line in zip(said, lines, strict=True))


def test_the_secret_is_there_and_long_enough(node: ModuleType, tmp_path: Path) -> None:
    token = tmp_path / "token"
    assert "cannot be read" in node.token_mistake(token)
    token.write_text("short\n")
    assert "has 5 characters" in node.token_mistake(token)
    token.write_text("x" * 32)
    assert node.token_mistake(token) is None


def test_another_version_and_a_closed_port_are_named(node: ModuleType) -> None:
    nodes = [node.Node("10.0.0.1", "0.32.0", 1, (6380,)), node.Node("10.0.0.2", "0.31.0", 1, (6380,))]
    version, port = node.cluster_mistakes(nodes, "0.32.0", [("10.0.0.2", 6380)])
    assert version == "10.0.0.2 has vLLM 0.31.0, the head 0.32.0: bring one of them up to date"
    assert port.startswith("10.0.0.2: port 6380 does not answer from here; open 6379 to 6381 and 10002 to 10999")
    assert node.cluster_mistakes(nodes[:1], "0.32.0", []) == []


def test_too_few_gpus_are_counted_by_host(node: ModuleType) -> None:
    nodes = [node.Node("10.0.0.1", "0.32.0", 1, ()), node.Node("10.0.0.2", "0.32.0", 2, ())]
    assert node.missing_gpus(nodes, 3) is None
    assert "is 4, and the hosts have 3 GPUs (10.0.0.1: 1, 10.0.0.2: 2)" in node.missing_gpus(nodes, 4)


def test_a_port_that_answers_is_reached(node: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert node.reaches("127.0.0.1", port)
    assert not node.reaches("127.0.0.1", port)


def test_a_worker_says_what_it_waits_for_and_goes_on_when_the_head_is_there(
    node: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(node, "reaches", lambda *_: next(answers))
    monkeypatch.setattr(node.time, "sleep", lambda _: None)
    node.wait_for_head("10.0.0.1", "10.0.0.2")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("node: RAY_HEAD 10.0.0.1: port 6379 does not answer from 10.0.0.2; waiting for it")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, []),
        ({"SERVE_MAX_REPLICAS": "4", "SERVE_MIN_REPLICAS": ""}, []),
        ({"SERVE_MAX_REPLICA": "4"}, ["unknown setting SERVE_MAX_REPLICA; did you mean SERVE_MAX_REPLICAS?"]),
        ({"SERVE_MIN_REPLICAS": "0"}, ["SERVE_MIN_REPLICAS is '0'; it must be a whole number of replicas, 1 or more"]),
        ({"SERVE_MIN_REPLICAS": "3"}, ["SERVE_MIN_REPLICAS is 3, more than SERVE_MAX_REPLICAS, which is 2"]),
    ],
)
def test_the_bounds_of_replicas(application: ModuleType, environment: dict[str, str], said: list[str]) -> None:
    mistakes = launch.Mistakes()
    application.read_scaling(environment, mistakes)
    assert len(mistakes.lines) == len(said)
    assert all(words in line for words, line in zip(said, mistakes.lines, strict=True))


@pytest.fixture
def engine(application: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Settings without vLLM: its own parser stays out."""
    file = tmp_path / "engine.yaml"
    file.write_text("model: small\n")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    monkeypatch.setattr(launch, "ENGINE_FILE", file)
    monkeypatch.setattr(launch, "MODELS", tmp_path)
    monkeypatch.setattr(application, "engine_arguments", lambda command: {"command": command})
    return application


def test_a_configuration_has_model_replicas_and_drain(engine: Any) -> None:
    found = engine.configuration({"SERVE_MAX_REPLICAS": "3", "DRAIN_SECONDS": "60", "SERVED_MODEL_NAME": "s"})
    assert found["model_loading_config"]["model_id"] == "s"
    deployment = found["deployment_config"]
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 8}
    assert (deployment["autoscaling_config"], deployment["graceful_shutdown_timeout_s"]) == (scaling, 60)
    assert found["runtime_env"]["env_vars"]["FLEET_SERVED_MODEL"] == "s"


def test_gpus_of_other_hosts_count(engine: Any) -> None:
    """Four GPUs, of which this host need have none."""
    environment = {"FLEET_DEVICE": "gpu", "TENSOR_PARALLEL_SIZE": "2", "PIPELINE_PARALLEL_SIZE": "2"}
    assert engine.configuration(environment)["accelerator_config"] == {"kind": "gpu"}


def test_mistakes_are_told_all_at_once(engine: Any) -> None:
    with pytest.raises(launch.SettingsError) as told:
        engine.configuration({"SERVE_MIN_REPLICAS": "x", "MAX_NUM_SEQS": "-1"})
    assert len(str(told.value).splitlines()) == 2
    with pytest.raises(launch.SettingsError, match="2 names"):
        engine.configuration({"SERVED_MODEL_NAME": "a,b"})


@pytest.mark.parametrize(
    ("part", "environment", "said"),
    [
        ("serve", RIGHT | {"RAY_HEAD": "10.0.0.9"}, "the head is to run on 10.0.0.1"),
        ("replica", RIGHT, "on GPUs only"),
    ],
)
def test_a_head_that_cannot_be_is_refused(
    node: ModuleType, part: str, environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "start_ray", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(launch.SettingsError, match=said):
        node.head(part, environment)
