"""This host as the planner reads it: through an NVML that answers as some driver or GPU does."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from planner import nvml
from planner.machine import GIB, Machine
from stack.console import Problem

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
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answers], Machine]:
    """This host with two RTX 3090, or other answers of NVML."""

    def read(other: Answers) -> Machine:
        for name, answer in (ANSWERS | other).items():
            monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", answer)
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.159.04")
        monkeypatch.setattr(pynvml, "nvmlSystemGetProcessName", lambda _: "/usr/bin/python3")
        return nvml.read_machine()

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


def test_a_gpu_that_is_lost_is_told(host: Callable[[Answers], Machine]) -> None:
    def lost(_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    with pytest.raises(Problem, match="GPU is lost"):
        host({"HandleByIndex": lost})


def test_what_a_gpu_tells_is_taken(host: Callable[[Answers], Machine]) -> None:
    machine = host({})
    assert [gpu.bandwidth_gb_s for gpu in machine.gpus] == [936.1, 936.1]
    assert (machine.links[0].kind, machine.links[0].gb_s) == ("phb", 31.5)


def test_a_gpu_that_does_not_tell_its_speeds_has_usual_ones(host: Callable[[Answers], Machine]) -> None:
    quiet = ("NumGpuCores", "MaxClockInfo", "MemoryBusWidth", "ComputeRunningProcesses", "TopologyCommonAncestor")
    quiet += ("MaxPcieLinkGeneration", "MaxPcieLinkWidth")
    machine = host(dict.fromkeys(quiet, not_supported))
    assert {(gpu.bandwidth_gb_s, gpu.bf16_tflops) for gpu in machine.gpus} == {(300.0, 50.0)}
    assert (machine.links[0].kind, machine.links[0].gb_s) == ("sys", 15.8)


def test_a_gpu_that_does_not_tell_its_memory_is_refused_in_one_line(host: Callable[[Answers], Machine]) -> None:
    with pytest.raises(Problem, match=r"GPU 0 \(NVIDIA GeForce RTX 3090\) does not tell its memory"):
        host({"MemoryInfo": not_supported})


def test_a_slice_never_has_the_number_of_another_gpu(host: Callable[[Answers], Machine]) -> None:
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
