"""This host as the planner reads it: through an NVML that answers as some driver or GPU does."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plan as command
from planner import choose, nvml, render, replica_processes
from planner.choose import Wish
from planner.config import load_model
from planner.machine import GIB, Gpu, Link, Machine, load_machine
from planner.model import Model
from planner.quantization import Quantization
from stack.console import Problem

TESTS = Path(__file__).resolve().parents[1]
Answers = dict[str, Any]


def not_supported(*_: Any) -> Any:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def memory(_: Any, version: int | None = None) -> Any:
    return SimpleNamespace(total=24 * GIB, free=20 * GIB, reserved=0)


# A handle is the GPU's number. Queries by their names without "nvmlDeviceGet".
ANSWERS: Answers = {
    "Count": lambda: 2,
    "HandleByIndex": lambda index: index,
    "CudaComputeCapability": lambda _: (8, 6),
    "NumGpuCores": lambda _: 10496,
    "MaxClockInfo": lambda _, kind: 9751 if kind == pynvml.NVML_CLOCK_MEM else 2100,
    "MemoryBusWidth": lambda _: 384,
    "Name": lambda _: "NVIDIA GeForce RTX 3090",
    "MemoryInfo": memory,
    "PciInfo": lambda handle: SimpleNamespace(busId=f"00000000:{handle:02x}:00.0"),
    "ComputeRunningProcesses": lambda _: [],
    "MigMode": not_supported,
    "TopologyCommonAncestor": lambda *_: 30,
    "MaxPcieLinkGeneration": lambda _: 4,
    "MaxPcieLinkWidth": lambda _: 16,
    "NvLinkState": not_supported,
}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """This host with two RTX 3090, or other answers of NVML."""

    def read(other: Answers, pids: frozenset[int] = frozenset()) -> Machine:
        for name, answer in (ANSWERS | other).items():
            monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", answer)
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.159.04")
        monkeypatch.setattr(pynvml, "nvmlSystemGetProcessName", lambda _: "/usr/bin/python3")
        return nvml.read_machine(pids)

    return read


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_host_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def init() -> None:
        raise pynvml.NVMLError(error)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    assert nvml.read_machine().gpus == ()


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, pynvml.NVML_ERROR_UNKNOWN])
def test_a_driver_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Else a plan for the CPU would take the place of the GPUs' one after an upgrade of the driver."""

    def init() -> None:
        raise pynvml.NVMLError(error)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    with pytest.raises(Problem, match=r"driver cannot be asked.*restart the host"):
        nvml.read_machine()


def test_a_gpu_that_is_lost_is_told(host: Callable[..., Machine]) -> None:
    def lost(*_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    for query in ("HandleByIndex", "MemoryInfo"):
        with pytest.raises(Problem, match=r"driver cannot be asked.*GPU is lost"):
            host({query: lost})


def test_what_a_gpu_tells_is_taken(host: Callable[..., Machine]) -> None:
    machine = host({})
    assert [gpu.bandwidth_gb_s for gpu in machine.gpus] == [936.1, 936.1]
    assert (machine.links[0].kind, machine.links[0].gb_s) == ("phb", 31.5)


def test_a_gpu_that_does_not_tell_its_speeds_has_usual_ones(host: Callable[..., Machine]) -> None:
    quiet = ["NumGpuCores", "MaxClockInfo", "MemoryBusWidth", "ComputeRunningProcesses", "TopologyCommonAncestor"]
    quiet += ["MaxPcieLinkGeneration", "MaxPcieLinkWidth"]
    machine = host(dict.fromkeys(quiet, not_supported))
    assert {(gpu.bandwidth_gb_s, gpu.bf16_tflops) for gpu in machine.gpus} == {(300.0, 50.0)}
    assert (machine.links[0].kind, machine.links[0].gb_s) == ("sys", 15.8)


def test_a_gpu_that_does_not_tell_its_memory_is_refused_in_one_line(host: Callable[..., Machine]) -> None:
    with pytest.raises(Problem, match=r"GPU 0 \(NVIDIA GeForce RTX 3090\) does not tell its memory"):
        host({"MemoryInfo": not_supported})


def test_a_slice_never_has_the_number_of_another_gpu(host: Callable[..., Machine]) -> None:
    """Slices of GPU 0 beside GPU 1, which is whole."""
    attributes = SimpleNamespace(memorySizeMB=12 * 1024, gpuInstanceSliceCount=3)
    machine = host(
        {
            "MigMode": lambda handle: (int(handle == 0), 0),
            "MaxMigDeviceCount": lambda _: 2,
            "MigDeviceHandleByIndex": lambda _, position: f"slice {position}",
            "Attributes_v2": lambda _: attributes,
            "UUID": lambda handle: f"MIG-{handle}",
        }
    )
    assert [(gpu.index, gpu.mig) for gpu in machine.gpus] == [(1000, True), (1001, True), (1, False)]
    assert {gpu.index for gpu in machine.only([1]).gpus} == {1}


# ---- while this project's replicas run


def proc(folder: Path, pid: int, parent: int, command: str, anonymous_kib: int) -> None:
    """One process, as Linux shows it in /proc."""
    (folder / str(pid)).mkdir()
    (folder / str(pid) / "stat").write_text(f"{pid} (a (name) x) S {parent} {pid} 0")
    (folder / str(pid) / "cmdline").write_text(command.replace(" ", "\0"))
    (folder / str(pid) / "status").write_text(f"Name:\tx\nRssAnon:\t{anonymous_kib:>8} kB\nRssFile:\t900 kB\n")


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Docker with a replica and a gateway; the replica's engine is process 13."""
    answers = {"ps": "aa vllm-0\nbb gateway\n", "inspect": "10\n"}

    def ask(*args: str) -> subprocess.CompletedProcess[str]:
        assert args[1] == "ps" or args[-1] == "aa", "only replicas are looked into"
        return subprocess.CompletedProcess(args, 0, answers[args[1]], "")

    monkeypatch.setattr(replica_processes, "ask", ask)
    monkeypatch.setattr("stack.compose.ask", ask)
    monkeypatch.setattr(replica_processes, "PROC", tmp_path)
    proc(tmp_path, 1, 0, "/sbin/init", 5000)
    proc(tmp_path, 10, 1, "/sbin/docker-init -- python3 /opt/fleet/launch.py", 100)
    proc(tmp_path, 13, 12, "VLLM::EngineCore", 3 * 1024 * 1024)
    proc(tmp_path, 12, 10, "python3 api_server", 1024 * 1024)
    proc(tmp_path, 99, 1, "python3 train.py", 7000)


@pytest.mark.usefixtures("docker")
def test_what_the_running_replicas_hold_of_the_host_counts_as_free() -> None:
    pids = replica_processes.processes(replica_processes.running_replicas())
    assert pids == {10, 12, 13}
    assert replica_processes.host_memory(pids) == 4 * GIB + 100 * 1024


@pytest.mark.usefixtures("docker")
def test_a_process_of_another_host_is_not_taken_for_a_replica(tmp_path: Path) -> None:
    """Docker in a virtual machine tells numbers that belong to other processes here."""
    (tmp_path / "10" / "cmdline").write_text("postgres")
    assert not replica_processes.processes(["aa"])


@pytest.mark.usefixtures("docker")
def test_what_the_running_replicas_hold_of_a_gpu_counts_as_free(host: Callable[..., Machine]) -> None:
    running = [SimpleNamespace(pid=13, usedGpuMemory=3 * GIB), SimpleNamespace(pid=99, usedGpuMemory=GIB)]
    answers = {"ComputeRunningProcesses": lambda handle: running if handle == 0 else []}
    first, second = host(answers, replica_processes.processes(replica_processes.running_replicas())).gpus
    assert (first.free, first.programs) == (23 * GIB, ("python3 (pid 99)",))
    assert (second.free, second.programs) == (20 * GIB, ())


def test_replicas_that_do_not_tell_what_they_hold_can_be_stopped(host: Callable[..., Machine]) -> None:
    answers = {"ComputeRunningProcesses": lambda _: [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in (12, 13)]}
    gpu = host(answers, frozenset({12, 13})).gpus[0]
    assert (gpu.free, gpu.programs) == (20 * GIB, ("this project's replicas (make down)",))


# ---- GPUs that are too old


def lab(*capabilities: tuple[int, int]) -> Machine:
    """The GPU of 24 GB with other compute capabilities, one for each."""
    machine = load_machine(TESTS / "machines" / "one-24gb.json")
    gpus = (
        machine.gpus[0].model_copy(update={"index": index, "name": f"sm {one}", "compute_capability": one})
        for index, one in enumerate(capabilities)
    )
    return machine.model_copy(update={"gpus": tuple(gpus)})


def model(name: str) -> Model:
    return load_model(str(TESTS / "models" / name), TESTS)


@pytest.mark.parametrize(
    ("name", "old", "reason"),
    [
        ("Llama-3.1-8B-Instruct", (6, 1), "vLLM needs compute capability 7.5, it has 6.1"),
        ("Llama-3.1-8B-Instruct", (7, 0), "vLLM needs compute capability 7.5, it has 7.0"),
        ("gpt-oss-20b", (7, 5), "a checkpoint in mxfp4 needs compute capability 8.0, it has 7.5"),
        ("gemma-3-27b-it", (7, 5), "gemma3, which does not work in float16, needs compute capability 8.0, it has 7.5"),
    ],
)
def test_a_gpu_that_is_too_old_stays_idle(name: str, old: tuple[int, int], reason: str) -> None:
    wish = Wish(context=2048)
    plan = choose.choose(lab(old, (8, 6)), model(name), wish)
    assert [(gpu.index, why) for gpu, why in plan.idle] == [(0, reason)]
    assert plan.quantization == choose.choose(lab((8, 6)), model(name), wish).quantization
    with pytest.raises(Problem, match=rf"cannot run on GPU 0 .*{reason}: take a newer one"):
        choose.choose(lab(old, old), model(name), Wish())


def test_mxfp4_by_its_other_name_needs_the_same_gpu() -> None:
    renamed = replace(model("gpt-oss-20b"), quantization=Quantization("gpt_oss_mxfp4", 4.25))
    with pytest.raises(Problem, match=r"a checkpoint in mxfp4 needs compute capability 8\.0"):
        choose.choose(lab((7, 5)), renamed, Wish())


def test_a_gpu_of_7_5_runs_the_others() -> None:
    assert len(choose.choose(lab((7, 5), (8, 6)), model("Qwen2.5-7B-Instruct-AWQ"), Wish()).replicas) == 2


def test_a_gpu_that_is_too_old_does_not_keep_others_from_8_bits() -> None:
    large = model("Qwen2.5-32B-Instruct")
    assert choose.choose(lab((6, 1), (8, 9), (8, 9)), large, Wish(context=16384)).quantization == "fp8"


@pytest.mark.parametrize("machine", ["two-h200", "laptop"])
@pytest.mark.parametrize(("name", "method"), [("Qwen2.5-7B-Instruct-AWQ", "awq"), ("gpt-oss-20b", "mxfp4")])
def test_what_is_quantized_already_is_not_quantized_again(machine: str, name: str, method: str) -> None:
    host = load_machine(TESTS / "machines" / f"{machine}.json")
    with pytest.raises(Problem, match=f"--quantization fp8: .*{name} is quantized already, by {method}"):
        choose.choose(host, model(name), Wish(quantization="fp8"))


# ---- which GPUs work together


def linked(count: int, nvlinks: dict[tuple[int, int], float]) -> Machine:
    """So many GPUs of 24 GB on one PCIe host bridge, some of them with NVLink between them (GB/s)."""
    machine = load_machine(TESTS / "machines" / "one-24gb.json")
    gpus = (machine.gpus[0].model_copy(update={"index": index, "id": str(index)}) for index in range(count))
    pairs = combinations(range(count), 2)
    links = (
        Link(a=a, b=b, kind="nvlink" if (a, b) in nvlinks else "phb", gb_s=nvlinks.get((a, b), 15.8)) for a, b in pairs
    )
    return machine.model_copy(update={"gpus": tuple(gpus), "links": tuple(links)})


@pytest.mark.parametrize(
    ("count", "nvlinks", "orders", "visible"),
    [
        (4, {(0, 1): 50.0, (2, 3): 50.0}, [[0, 1, 2, 3]], [None]),
        (4, {(0, 2): 50.0, (1, 3): 50.0}, [[0, 2, 1, 3]], ["0,2,1,3"]),
        # the fastest pair of all would leave a slow one
        (4, {(0, 1): 99.0, (0, 2): 50.0, (1, 3): 50.0}, [[0, 2, 1, 3]], ["0,2,1,3"]),
        # in its container the second replica's GPUs are 0 to 3 too
        (8, {(n, n + 4): 50.0 for n in range(4)}, [[0, 4, 1, 5], [2, 6, 3, 7]], ["0,2,1,3", "0,2,1,3"]),
    ],
)
def test_tensor_parallelism_works_over_the_best_links(
    count: int, nvlinks: dict[tuple[int, int], float], orders: list[list[int]], visible: list[str | None]
) -> None:
    plan = choose.choose(linked(count, nvlinks), model("Llama-3.1-8B-Instruct"), Wish(tp=2, pp=2))
    assert [[gpu.index for gpu in one.gpus] for one in plan.replicas] == orders
    assert {one.link.kind for one in plan.replicas if one.link} == {"nvlink"}
    slow = choose.choose(linked(count, {}), model("Llama-3.1-8B-Instruct"), Wish(tp=2, pp=2))
    assert plan.latency < slow.latency
    text = render.override_file([render.Part(plan, "x", {})], TESTS.parent / "docker-compose.yml")
    found = re.findall(r"  (vllm-\d+):|CUDA_DEVICE_ORDER: (PCI_BUS_ID)|CUDA_VISIBLE_DEVICES: '?([\d,]+)'?", text)
    assert [three for _, _, three in found if three] == [one for one in visible if one]
    assert sum(bool(two) for _, two, _ in found) == sum(bool(one) for one in visible)


GPUS = {gpu.name: gpu for name in ("mig", "home-lab") for gpu in load_machine(TESTS / "machines" / f"{name}.json").gpus}


@st.composite
def cut_machines(draw: st.DrawFn) -> Machine:
    """Whole GPUs beside such that are cut into MIG slices."""
    gpus: list[Gpu] = []
    for number in range(draw(st.integers(1, 4))):
        kind = GPUS[draw(st.sampled_from(sorted(GPUS)))]
        for position in range(draw(st.integers(1, 3)) if kind.mig else 1):
            index = (number + 1) * 1000 + position if kind.mig else number
            free = kind.total - draw(st.integers(0, kind.total // GIB - 1)) * GIB
            gpus.append(kind.model_copy(update={"index": index, "id": f"{kind.mig}-{index}", "free": free}))
    return Machine(name="any", cpu_cores=16, memory=128 * GIB, memory_free=100 * GIB, gpus=tuple(gpus))


NAMES = ["bge-m3", "DeepSeek-R1-Distill-Qwen-1.5B", "Llama-3.1-8B-Instruct"]


@settings(max_examples=100)
@given(
    machine=cut_machines(),
    name=st.sampled_from(NAMES),
    also=st.lists(st.sampled_from(NAMES), max_size=2),
    goal=st.sampled_from(["throughput", "latency"]),
)
def test_a_mig_slice_works_alone_beside_whole_gpus(
    machine: Machine, name: str, also: list[str], goal: choose.Goal
) -> None:
    paths = [str(TESTS / "models" / one) for one in (name, *also)]
    try:
        parts = command.plan_all(machine, paths[0], paths[1:], None, Wish(goal=goal))
    except Problem:
        return
    replicas = [one for part in parts for one in part.plan.replicas]
    used = [gpu.index for one in replicas for gpu in one.gpus]
    assert len(used) == len(set(used)), "a GPU is in two replicas"
    for one in replicas:
        assert len({gpu.name for gpu in one.gpus}) == 1
        assert len(one.gpus) == one.tp * one.pp
        assert len(one.gpus) == 1 or not any(gpu.mig for gpu in one.gpus)
        assert all(one.account.used <= gpu.free for gpu in one.gpus)
