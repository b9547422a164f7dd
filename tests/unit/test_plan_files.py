"""What `plan.py` prints and writes, as its users call it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import plan as command
from planner import render
from planner.choose import Wish, choose
from planner.config import read_model
from planner.machine import Machine, join, load_machine
from planner.render import Part
from stack import hosts
from stack.compose import Config
from stack.console import Problem
from stack.shell import ROOT

MACHINES = ROOT / "tests" / "machines"
MODELS = ROOT / "tests" / "models"


def plan(*args: str | Path, root: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts" / "plan.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60)


def as_json(*args: str | Path) -> dict[str, Any]:
    run = plan(*args, "--json")
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.fixture
def lab(tmp_path: Path) -> list[str | Path]:
    """The options for the home lab with each of its GPUs in a server of its own: a 3060, then three 3090."""
    host = json.loads((MACHINES / "home-lab.json").read_text())
    options: list[str | Path] = []
    for name, gpu in zip("abcd", host["gpus"], strict=True):
        own = host | {"name": "node", "gpus": [gpu | {"index": 0, "id": "0"}], "links": []}
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(own))
        options += ["--machine", tmp_path / f"gpu-{name}.json"]
    return options


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of its own, with a model in models/, to write into."""
    for name in ("scripts", "presets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("docker-compose.yml", "docker-compose.gpu.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("SmolLM2-135M-Instruct", "bge-m3"):
        shutil.copytree(MODELS / name, tmp_path / "models" / name)
    return tmp_path


def test_each_number_comes_with_its_reason_and_runners_up_with_their_cost() -> None:
    run = plan(MODELS / "Llama-3.1-8B-Instruct", "--machine", MACHINES / "two-h200.json")
    assert run.returncode == 0, run.stderr
    for words in ("2 × tp 1", "max model length", "KV tokens", "GPU memory utilization", "runner-up", "1 × tp 2"):
        assert words in run.stdout
    found = as_json(MODELS / "Llama-3.1-8B-Instruct", "--machine", MACHINES / "two-h200.json")["models"][0]
    assert all(reason["why"] for reason in found["reasons"])
    assert {"layout", "weights", "KV tokens", "reserve"} <= {reason["what"] for reason in found["reasons"]}
    assert [other["layout"] for other in found["runners_up"]] == ["1 × tp 1 × pp 2", "1 × tp 2"]


def test_a_chat_model_over_four_gpus_and_an_embedding_model_on_one() -> None:
    found = as_json(
        MODELS / "Llama-3.3-70B-Instruct",
        *("--also", f"{MODELS / 'bge-m3'}@4", "--gpus", "0-3", "--machine", MACHINES / "eight-h100.json"),
    )
    chat, embedding = found["models"]
    assert [one["gpus"] for one in chat["replicas"]] == [["0", "1", "2", "3"]]
    assert [one["gpus"] for one in embedding["replicas"]] == [["4"]]


def test_a_further_model_takes_the_fewest_gpus_from_the_end() -> None:
    found = as_json(
        MODELS / "Llama-3.1-8B-Instruct", "--also", MODELS / "bge-m3", "--machine", MACHINES / "four-3090.json"
    )
    assert found["models"][1]["replicas"][0]["gpus"] == ["3"]
    assert "3" not in [gpu for one in found["models"][0]["replicas"] for gpu in one["gpus"]]


def also(machine: str, model: str, *further: str) -> list[Part]:
    host = load_machine(MACHINES / f"{machine}.json")
    return command.plan_all(host, str(MODELS / model), [str(MODELS / one) for one in further], None, Wish())


def test_a_further_model_keeps_its_own_weights_where_the_gpus_hold_them() -> None:
    first, second = also("eight-h100", "Llama-3.1-8B-Instruct", "Llama-3.3-70B-Instruct")
    assert (second.plan.layout, second.plan.quantization, second.plan.host_memory) == ("1 × tp 2", None, 0)
    assert {gpu.index for one in first.plan.replicas for gpu in one.gpus} == set(range(6))
    # where they do not, it is quantized as before
    _, second = also("four-3090", "bge-m3", "Llama-3.3-70B-Instruct")
    assert second.plan.quantization == "bitsandbytes"


def test_a_further_model_that_leaves_too_little_can_be_given_less() -> None:
    with pytest.raises(Problem, match=r"beside .*Qwen3-30B-A3B: .*; or give .* fewer GPUs: --also .*@GPU"):
        also("four-3090", "Llama-3.3-70B-Instruct", "Qwen3-30B-A3B")


def test_a_further_model_takes_the_smallest_gpu_that_holds_it() -> None:
    _, second = also("home-lab", "Llama-3.1-8B-Instruct", "bge-m3")
    assert [gpu.name for gpu in second.plan.replicas[0].gpus] == ["NVIDIA GeForce RTX 3060"]
    _, second = also("home-lab", "DeepSeek-R1-Distill-Qwen-1.5B", "Llama-3.1-8B-Instruct")
    assert [gpu.index for gpu in second.plan.replicas[0].gpus] == [3], "the 3060 does not hold its 16 bits"
    _, second = also("mig", "DeepSeek-R1-Distill-Qwen-1.5B", "bge-m3")
    assert [gpu.index for gpu in second.plan.replicas[0].gpus] == [2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere/at/all"], "neither a folder"),
        ([MODELS / "Llama-3.1-8B-Instruct", "--gpus", "a-b"], "not a list of GPUs"),
        ([MODELS / "Llama-3.1-8B-Instruct", "--gpus", "9"], "--gpus: there is no GPU 9 here"),
        ([MODELS / "Llama-3.1-8B-Instruct", "--gpus", "2-0"], "--gpus: 2-0 names no GPU"),
        ([MODELS / "Llama-3.1-8B-Instruct", "--gpus", ""], "--gpus:  is not a list of GPUs"),
        ([MODELS / "Llama-3.1-8B-Instruct", "--also", f"{MODELS / 'bge-m3'}@9"], "--also: there is no GPU 9 here"),
        ([MODELS / "Llama-3.1-8B-Instruct", "--also", f"{MODELS / 'bge-m3'}@1-0"], "--also: 1-0 names no GPU"),
        ([MODELS / "Llama-3.1-8B-Instruct", "--also", f"{MODELS / 'bge-m3'}@"], "--also:  is not a list of GPUs"),
        (
            [
                MODELS / "gemma-3-27b-it",
                "--also",
                f"{MODELS / 'bge-m3'}@0",
                "--also",
                f"{MODELS / 'Mistral-7B-v0.1'}@0",
            ],
            "GPU 0 has",
        ),
        ([MODELS / "Llama-3.1-8B-Instruct", "--record", "/nowhere/at/all.json"], "/nowhere/at/all.json: No such file"),
        ([MODELS / "Llama-3.1-8B-Instruct", "--record", "/nowhere/at/all.json"], "check that the path exists and that"),
        ([MODELS / "mamba-2.8b"], "recurrent state"),
        ([MODELS / "DeepSeek-V3"], "does not fit"),
    ],
)
def test_mistakes_are_told_without_a_traceback(args: list[str | Path], words: str) -> None:
    run = plan(*args, "--machine", MACHINES / "two-h200.json")
    assert run.returncode == 1
    assert words in run.stderr
    assert len(run.stderr.splitlines()) == 2, "what is wrong, and what to do"
    assert not run.stdout


@pytest.mark.parametrize("text", [b"", b"{", b'{"name": "x"}', b'{"name": "x", "gpu": []}', b"\xff\xfe"])
def test_a_file_that_is_no_machine_is_told_so(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "m.json").write_bytes(text)
    run = plan(MODELS / "bge-m3", "--machine", tmp_path / "m.json")
    assert run.returncode == 1
    assert "is not a recorded machine" in run.stderr
    assert len(run.stderr.splitlines()) == 2


@pytest.mark.parametrize("text", [b"[]", b'"x"', b"\xff\xfe", b"{", b'{"hidden_size": "x"}'])
def test_a_file_that_is_no_config_is_told_so(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    run = plan(tmp_path, "--machine", MACHINES / "two-h200.json")
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 2
    assert "config.json" in run.stderr


def test_this_machine_can_be_recorded_and_planned_for(tmp_path: Path) -> None:
    first = plan(MODELS / "SmolLM2-135M-Instruct", "--dry-run", "--record", tmp_path / "m.json", "--json")
    again = plan(MODELS / "SmolLM2-135M-Instruct", "--machine", tmp_path / "m.json", "--json")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert first.stdout == again.stdout


def written(checkout: Path) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        pass

    def replaced(loader: yaml.SafeLoader, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        return loader.construct_sequence(node, deep=True)

    Loader.add_constructor("!override", replaced)
    Loader.add_constructor("!reset", lambda *_: None)
    text = (checkout / "docker-compose.override.yml").read_text()
    found: dict[str, Any] = yaml.load(text, Loader)["services"]  # noqa: S506 - a SafeLoader with Compose's two tags
    return found


def test_it_writes_the_fleet_and_asks_before_it_writes_over_a_changed_file(checkout: Path) -> None:
    override, fleet = checkout / "docker-compose.override.yml", checkout / "fleet" / "default.conf"
    smol = ("SmolLM2-135M-Instruct", "--context", "1024")
    assert not plan(*smol, "--dry-run", root=checkout).returncode
    assert not override.exists()

    run = plan(*smol, "--replicas", "3", "--tp", "1", root=checkout)
    if run.returncode and "does not fit" in run.stderr:
        pytest.skip("too little memory is free here for three replicas")
    assert not run.returncode, run.stderr
    services = written(checkout)
    assert set(services) == {"gateway", "vllm-0", "vllm-1", "vllm-2"}
    assert services["vllm-2"]["extends"] == {"file": "docker-compose.yml", "service": "vllm-0"}
    assert services["vllm-2"]["hostname"] == "vllm-2.fleet"
    assert services["vllm-2"]["environment"]["MODEL"] == "SmolLM2-135M-Instruct"
    assert fleet.read_text().count("\nupstream vllm-") == 3

    # what the planner wrote it may write over
    assert not plan(*smol, "--replicas", "1", root=checkout).returncode
    assert written(checkout)["vllm-1"] is None
    assert fleet.read_text().count("\nupstream vllm-") == 1

    override.write_text(override.read_text().replace("1024", "512"))
    before = override.read_text()
    refused = plan(*smol, root=checkout)
    assert refused.returncode == 1
    assert "was changed by hand" in refused.stderr
    assert override.read_text() == before
    assert not plan(*smol, "--yes", root=checkout).returncode
    assert override.read_text() != before


def test_the_gateway_may_read_the_fleet_whatever_the_umask(checkout: Path) -> None:
    """It runs as a user of its own."""
    smol = ("SmolLM2-135M-Instruct", "--context", "1024", "--replicas", "1")
    old = os.umask(0o077)
    try:
        run = plan(*smol, root=checkout)
    finally:
        os.umask(old)
    assert not run.returncode, run.stderr
    modes = [path.stat().st_mode & 0o777 for path in (checkout / "fleet", checkout / "fleet" / "default.conf")]
    assert modes == [0o755, 0o644]


def test_a_model_outside_models_is_not_written(checkout: Path) -> None:
    run = plan(MODELS / "SmolLM2-135M-Instruct", "--context", "1024", root=checkout)
    assert run.returncode == 1
    assert "lies outside models/" in run.stderr
    assert not (checkout / "docker-compose.override.yml").exists()


def test_what_is_in_the_way_of_the_files_is_told(checkout: Path) -> None:
    smol = ("SmolLM2-135M-Instruct/", "--context", "1024", "--replicas", "1")
    (checkout / "fleet").write_text("")
    run = plan(*smol, root=checkout)
    assert run.returncode == 1
    assert "fleet" in run.stderr
    assert "Traceback" not in run.stderr
    (checkout / "fleet").unlink()

    (checkout / "docker-compose.override.yml").write_bytes(b"\xff\xfe")
    run = plan(*smol, root=checkout)
    assert "was changed by hand" in run.stderr
    assert not plan(*smol, "--yes", root=checkout).returncode
    assert written(checkout)["vllm-0"]["environment"]["MODEL"] == "SmolLM2-135M-Instruct", "without the slash"


SIZING = {
    "MODEL": "other", "DTYPE": "float32", "QUANTIZATION": "fp8", "SPECULATIVE_CONFIG": "'{}'", "CPU_OFFLOAD_GB": "7",
    "MAX_MODEL_LEN": "777", "GPU_MEMORY_UTILIZATION": "0.5", "KV_CACHE_GB": "77", "KV_CACHE_DTYPE": "fp8",
    "MAX_NUM_SEQS": "777", "MAX_NUM_BATCHED_TOKENS": "777", "TENSOR_PARALLEL_SIZE": "7", "PIPELINE_PARALLEL_SIZE": "7",
}  # fmt: skip


@pytest.mark.parametrize("machine", ["home-lab", "two-h200", "laptop"])
def test_no_size_in_env_gets_into_a_planned_replica(machine: str) -> None:
    host = load_machine(MACHINES / f"{machine}.json")
    also = [str(MODELS / "bge-m3")]
    parts = command.plan_all(host, str(MODELS / "SmolLM2-135M-Instruct"), also, None, Wish())
    for part in parts:
        for replica in part.plan.replicas:
            assert set(SIZING) <= set(render.environment(part, replica)), "Compose would take it from .env"
    assert parts[1].extra["TOOL_CALL_PARSER"] == "", "what .env says of it is meant for the first model"


def test_the_plan_says_what_it_replaces_in_env(checkout: Path) -> None:
    shutil.copy(ROOT / ".env.example", checkout / ".env.example")
    (checkout / ".env").write_text(
        "\n".join(f"{name}={value}" for name, value in SIZING.items()) + "\nHTTP_PORT=8080\n"
    )
    run = plan("SmolLM2-135M-Instruct", "--context", "1024", "--replicas", "1", root=checkout)
    assert not run.returncode, run.stderr
    line = next(line for line in run.stderr.splitlines() if ".env" in line)
    assert set(SIZING) <= set(line.replace(",", "").split())
    assert "HTTP_PORT" not in line

    (checkout / ".env").write_text("TOOL_CALL_PARSER=hermes\n")
    run = plan("SmolLM2-135M-Instruct", "--context", "1024", "--also", "bge-m3", root=checkout)
    if not run.returncode:  # else too little memory is free here for both
        assert ".env" not in run.stderr, "the first model keeps it"

    (checkout / ".env").write_text("SERVED_MODEL_NAME=mine\n")
    run = plan("SmolLM2-135M-Instruct", "--context", "1024", "--also", "bge-m3", root=checkout)
    assert run.returncode == 1
    assert "SERVED_MODEL_NAME in .env" in run.stderr


def test_a_plan_beside_the_running_fleet_says_what_comes_first(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Here the replica's process is not one of this host's, as where Docker runs in a virtual machine."""
    docker = tmp_path_factory.mktemp("bin") / "docker"
    docker.write_text("#!/bin/sh\ncase $1 in ps) echo aa vllm-0;; inspect) echo 0;; esac\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(docker.parent), prepend=os.pathsep)
    smol = ("SmolLM2-135M-Instruct", "--context", "1024", "--replicas", "1")
    dry = plan(*smol, "--dry-run", root=checkout)
    assert not dry.returncode, dry.stderr
    assert "cannot be told" in dry.stderr
    assert plan(*smol, root=checkout).stderr.splitlines()[-1] == "make down, then make up starts it"
    docker.write_text("#!/bin/sh\n")
    assert plan(*smol, root=checkout).stderr.splitlines()[-1] == "make up starts it"


def length_of(machine: str, model: str, config: dict[str, Any] | None = None, **wish: Any) -> str:
    """What a planned replica is told of its longest request; every replica the same."""
    host = load_machine(MACHINES / f"{machine}.json")
    path = MODELS / model / "config.json"
    found = read_model(json.loads(path.read_text()) | (config or {}), model)
    part = Part(choose(host, found, Wish(**wish)), model, {})
    assert part.plan.finds_length == as_json_part(host, part)["max_model_len_auto"]
    (said,) = {render.environment(part, replica)["MAX_MODEL_LEN"] for replica in part.plan.replicas}
    return said


def as_json_part(host: Machine, part: Part) -> dict[str, Any]:
    found: dict[str, Any] = render.as_json(host, [part])["models"][0]
    return found


def test_vllm_finds_the_length_where_that_serves() -> None:
    assert length_of("two-h200", "Llama-3.1-8B-Instruct") == "auto", "the model's own limit fits"
    assert length_of("one-24gb", "Llama-3.1-8B-Instruct") == "auto", "one replica"


def test_vllm_is_told_the_length_where_what_it_finds_would_not_do() -> None:
    assert length_of("one-24gb", "Llama-3.1-8B-Instruct", context=8192) == "8192", "as asked for"
    assert int(length_of("four-3090", "Llama-3.1-8B-Instruct", tp=1)) < 131072, "replicas that could differ"
    assert length_of("laptop", "SmolLM2-135M-Instruct").isdecimal(), "the CPU's speed, not its memory, sets it"
    assert length_of("two-h200", "bge-m3").isdecimal(), "a step takes a whole prompt"
    longrope = {"rope_scaling": {"type": "longrope", "factor": 32}}
    assert length_of("two-h200", "Llama-3.1-8B-Instruct", longrope) == "131072", "vLLM would take the shorter one"
    endless = {"max_position_embeddings": 10 << 20, "rope_scaling": None}
    assert length_of("one-24gb", "Llama-3.1-8B-Instruct", endless).isdecimal(), "room for such a request in each slot"


def test_a_gpu_without_bfloat16_gets_float16() -> None:
    host = load_machine(MACHINES / "one-24gb.json")
    old = host.gpus[0].model_copy(update={"compute_capability": (7, 5)})
    for gpu, dtype in ((host.gpus[0], "bfloat16"), (old, "float16")):
        one = host.model_copy(update={"gpus": (gpu,)})
        part = command.plan_all(one, str(MODELS / "DeepSeek-R1-Distill-Qwen-1.5B"), [], None, Wish())[0]
        assert render.environment(part, part.plan.replicas[0])["DTYPE"] == dtype


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the Docker client (no engine)")
@pytest.mark.parametrize("machine", ["two-h200", "home-lab", "mig", "eight-h100", "laptop"])
def test_compose_reads_the_fleet_as_planned(checkout: Path, machine: str) -> None:
    host = load_machine(MACHINES / f"{machine}.json")
    parts = command.plan_all(host, str(checkout / "models" / "SmolLM2-135M-Instruct"), [], None, Wish())
    text = render.override_file(parts, checkout / "docker-compose.yml")
    (checkout / "docker-compose.override.yml").write_text(text)
    run = subprocess.run(
        ["docker", "compose", "config", "--format", "json"], cwd=checkout, capture_output=True, text=True, timeout=60
    )
    if "is not a docker command" in run.stderr:
        pytest.skip("needs the Compose plugin")
    assert not run.returncode, run.stderr
    services = json.loads(run.stdout)["services"]
    replicas = parts[0].plan.replicas
    planned = {f"vllm-{n}": render.planned_sizes(parts[0], one) for n, one in enumerate(replicas)}
    assert Config.model_validate_json(run.stdout).planned == {name: one.model_dump() for name, one in planned.items()}
    assert {name for name in services if name.startswith("vllm-")} == {f"vllm-{n}" for n in range(len(replicas))}
    for number, one in enumerate(replicas):
        service = services[f"vllm-{number}"]
        assert service["environment"]["TENSOR_PARALLEL_SIZE"] == str(one.tp)
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        ids = [device["device_ids"] for device in devices]
        assert ids == ([[gpu.id for gpu in one.gpus]] if one.gpus else []), "exactly one reservation with its GPUs"
    assert {"type": "bind", "target": "/etc/nginx/fleet"}.items() <= next(
        volume for volume in services["gateway"]["volumes"] if volume["target"] == "/etc/nginx/fleet"
    ).items()


def test_a_fleet_over_several_hosts_is_written_a_folder_a_host(checkout: Path, lab: list[str | Path]) -> None:
    run = plan("SmolLM2-135M-Instruct", *lab, root=checkout)
    assert not run.returncode, run.stderr
    assert "GPUs are numbered through. gpu-a: GPU 0; gpu-b: GPU 1;" in run.stdout
    for number, name in enumerate("abcd"):
        folder = checkout / "hosts" / f"gpu-{name}"
        services = written(folder)
        replicas = {service for service, what in services.items() if service.startswith("vllm-") and what}
        assert replicas == {f"vllm-{number}"}, "a name that is unique over the fleet"
        assert services.get("vllm-0", "reset") is None or number == 0
        (devices,) = services[f"vllm-{number}"]["deploy"]["resources"]["reservations"]["devices"]
        assert devices["device_ids"] == ["0"], "as it is called on its own host"
        assert (folder / "fleet").exists() == (services.get("gateway") is not None) == (number == 0)
        others = [service for service, what in services.items() if what and not service.startswith("vllm-")]
        assert ("gateway" in others) if number == 0 else others == ["link"], "nothing but its replicas and the link"
    fleet = (checkout / "hosts" / "gpu-a" / "fleet" / "default.conf").read_text()
    weights = [int(weight) for weight in re.findall(r"^upstream .*weight=(\d+)", fleet, re.MULTILINE)]
    for number, name in enumerate("bcd", 1):
        _, (member,) = hosts.part_of(f"gpu-{name}", checkout / "hosts")
        assert member.name == f"vllm-{number}", "as `make host` takes it"
        assert member.weight
        weights.append(member.weight)
    assert len(weights) == 4, "the gateway's own list has its own replica alone"
    assert weights[0] < weights[1] == weights[2] == weights[3], "the 3060 gets less"
    assert not (checkout / "docker-compose.override.yml").exists(), "this host has no part in it"

    shutil.rmtree(checkout / "hosts" / "gpu-d")
    run = plan("SmolLM2-135M-Instruct", *lab, "--gpus", "1", root=checkout)
    assert not run.returncode, run.stderr
    assert "hosts/gpu-c is left from another plan" in run.stderr
    assert "hosts/gpu-b is left" not in run.stderr
    services = written(checkout / "hosts" / "gpu-a")
    assert services["vllm-0"] is services["vllm-1"] is None, "the gateway's host has no replica"
    assert not (checkout / "hosts" / "gpu-d").exists(), "it has no part"

    override = checkout / "hosts" / "gpu-b" / "docker-compose.override.yml"
    override.write_text(override.read_text() + "# mine\n")
    refused = plan("SmolLM2-135M-Instruct", *lab, root=checkout)
    assert "hosts/gpu-b/docker-compose.override.yml was changed by hand" in refused.stderr


def test_no_replica_lies_in_two_hosts(lab: list[str | Path]) -> None:
    for model in ("Qwen2.5-32B-Instruct", "Llama-3.1-8B-Instruct"):
        found = as_json(MODELS / model, *lab, "--dry-run")["models"][0]
        assert {len(one["gpus"]) for one in found["replicas"]} == {1}
        assert len({one["host"] for one in found["replicas"]}) == len(found["replicas"])
    run = plan(MODELS / "Llama-3.1-8B-Instruct", *lab, "--tp", "2")
    assert "--tp 2 needs 2 GPUs of one kind in one host, there are 1" in run.stderr
    run = plan(MODELS / "Llama-3.3-70B-Instruct", *lab)
    assert "NVIDIA GeForce RTX 3090 in one host instead of 1" in run.stderr


def test_hosts_with_several_gpus_keep_their_groups_and_links() -> None:
    one, two = (load_machine(MACHINES / f"{name}.json") for name in ("eight-h100", "two-h200"))
    host = join({"big": one, "small": two})
    parts = command.plan_all(host, str(MODELS / "Llama-3.3-70B-Instruct"), [], None, Wish(tp=2, pp=1))
    groups = [{gpu.index for gpu in replica.gpus} for replica in parts[0].plan.replicas]
    assert {8, 9} in groups
    assert len(groups) == 5
    assert all(len({host.hosts[index] for index in group}) == 1 for group in groups)
    assert all(replica.link and replica.link.kind == "nvlink" for replica in parts[0].plan.replicas)
    found = yaml.safe_load(render.override_file(parts, ROOT / "docker-compose.yml", [8, 9]).replace("!", "#"))
    assert set(found["x-planned"]) == {f"vllm-{groups.index({8, 9})}"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["gpu-a", "gpu-a"], "two hosts are called gpu-a"),
        (["gpu-a", "laptop"], "laptop has no GPU"),
        (["gpu-a", "one box"], "one box is no name for a host"),
        # as `make host` would say, when the plan is made
        (["gpu-a", "GPU-B"], "GPU-B is no name for a host"),
    ],
)
def test_hosts_that_make_no_fleet_are_told(tmp_path: Path, lab: list[str | Path], names: list[str], words: str) -> None:
    shutil.copy(MACHINES / "laptop.json", tmp_path / "laptop.json")
    for name in ("one box", "GPU-B"):
        shutil.copy(MACHINES / "two-h200.json", tmp_path / f"{name}.json")
    options = [word for name in names for word in ("--machine", tmp_path / f"{name}.json")]
    run = plan(MODELS / "Llama-3.1-8B-Instruct", *options)
    assert run.returncode == 1
    assert words in run.stderr
    assert len(run.stderr.splitlines()) == 2
    run = plan(MODELS / "Llama-3.1-8B-Instruct", *lab, "--record", tmp_path / "r.json")
    assert "--record records one machine" in run.stderr


def test_weights_reach_the_gateway() -> None:
    host = load_machine(MACHINES / "home-lab.json")
    parts = command.plan_all(host, str(MODELS / "DeepSeek-R1-Distill-Qwen-1.5B"), [], None, Wish())
    lines = render.fleet_file(parts).splitlines()
    assert lines[0].startswith("upstream vllm-0 { zone vllm-0 64k; server vllm-0:8000 resolve weight=")
    assert len({line.split("weight=")[1] for line in lines}) == 2


def test_a_file_of_a_person_counts_as_changed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert not render.changed_by_hand(path)
    path.write_text(render.signed("a: 1\n", "x"))
    assert not render.changed_by_hand(path)
    path.write_text("a: 1\n")
    assert render.changed_by_hand(path)


@pytest.mark.parametrize(("text", "tokens"), [("32k", 32768), ("32768", 32768), ("1M", 1048576)])
def test_a_context_may_be_written_in_thousands(text: str, tokens: int) -> None:
    assert command._tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "k", "-1", "32 kilos", "1e3", "9999999999"])
def test_a_context_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a number of tokens"):
        command._tokens(text)


def test_what_is_asked_for_without_a_gpu_or_in_8_bits_is_said() -> None:
    run = plan(MODELS / "SmolLM2-135M-Instruct", "--machine", MACHINES / "laptop.json", "--gpus", "0")
    assert "--gpus: this host has no GPU" in run.stderr
    found = as_json(MODELS / "Qwen3-30B-A3B", "--machine", MACHINES / "eight-h100.json", "--kv-cache", "fp8")
    assert reason(found, "KV cache") == "what is left, in 8 bits"


@pytest.mark.parametrize("option", ["--tp", "--pp", "--replicas"])
def test_a_number_beyond_all_machines_is_refused_at_once(option: str) -> None:
    run = plan(MODELS / "Llama-3.1-8B-Instruct", "--machine", MACHINES / "two-h200.json", option, "99999999999")
    assert run.returncode == 2
    assert f"'{option}'" in run.stderr


def test_code_that_comes_with_a_model_is_named(tmp_path: Path) -> None:
    config = json.loads((MODELS / "Llama-3.1-8B-Instruct" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    run = plan(tmp_path, "--machine", MACHINES / "two-h200.json", "--json")
    assert json.loads(run.stdout), "the notice is for people"
    assert "brings code of its own (auto_map)" in run.stderr
    assert "TRUST_REMOTE_CODE" in run.stderr


def reason(found: dict[str, Any], what: str) -> str:
    return next(str(one["why"]) for one in found["models"][0]["reasons"] if one["what"] == what)


def test_reasons_say_what_holds_for_such_a_model() -> None:
    found = as_json(MODELS / "DeepSeek-V3", "--machine", MACHINES / "eight-h100.json")
    assert "host memory" in reason(found, "CPU offload")
    assert reason(found, "quantization") == "the checkpoint is quantized"
    found = as_json(MODELS / "bge-m3", "--machine", MACHINES / "two-h200.json")
    assert "tokens in" in reason(found, "layout")
    assert " out" not in reason(found, "layout"), "it writes nothing"


@pytest.mark.parametrize("model", ["gpt-oss-20b", "gemma-3-27b-it"])
def test_the_kv_tokens_of_mixed_layers_can_be_reckoned_from_their_reason(model: str) -> None:
    found = as_json(MODELS / model, "--machine", MACHINES / "two-h200.json")
    said = re.search(r"a request of ([\d,]+) tokens takes ([\d.]+) GiB a GPU", reason(found, "KV tokens"))
    assert said
    length, gib = int(said[1].replace(",", "")), float(said[2])
    replica = found["models"][0]["replicas"][0]
    assert replica["kv_tokens"] == pytest.approx(replica["memory"]["kv"] / (gib * 2**30) * length, rel=0.01)


def test_links_that_are_not_known_are_named(tmp_path: Path) -> None:
    machine = json.loads((MACHINES / "two-h200.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(machine | {"links": []}))
    for path, there in ((tmp_path / "m.json", True), (MACHINES / "two-h200.json", False)):
        shown = plan(MODELS / "Llama-3.1-8B-Instruct", "--machine", path).stdout
        assert ("The links between the GPUs are not known" in shown) == there


def test_a_list_of_more_gpus_than_there_can_be_is_refused_at_once() -> None:
    with pytest.raises(Problem, match="--gpus: 0-9999999999 goes beyond GPU 1023"):
        command._numbers("--gpus", "0-9999999999")
