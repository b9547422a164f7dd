"""Reads this host's GPUs through NVML, the library behind nvidia-smi."""

import os
import platform
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pynvml

from planner.machine import Gpu, Link, LinkKind, Machine
from planner.replica_processes import host_memory
from stack.console import Problem

# Dense bf16 FLOP per clock and SM with 32-bit sums, from NVIDIA's papers on A100, GA102, Ada, H100 and Blackwell.
FLOP_PER_CLOCK_SM = {(7, 5): 512, (8, 0): 2048, (8, 6): 512, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}
CORES_PER_SM = {(7, 5): 64, (8, 0): 64}
# GB/s one direction of one link, by NVLink version as NVML reports it.
NVLINK_GB_S = {1: 20.0, 2: 25.0, 3: 25.0, 4: 25.0, 5: 50.0}
# GB/s one direction of one lane, by PCIe generation.
PCIE_GB_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}
ANCESTOR: dict[int, LinkKind] = {0: "pix", 10: "pix", 20: "pxb", 30: "phb", 40: "node", 50: "sys"}
# What is taken where a GPU does not tell its speeds (vGPU, WSL): those of a middling one. They only rank layouts.
USUAL_GB_S, USUAL_TFLOPS = 300.0, 50.0
USUAL_PCIE, USUAL_LANES = 3, 16


def read_machine(ending: frozenset[int] = frozenset()) -> Machine:
    """This host, as if the processes `ending` had ended. Without an NVIDIA driver it simply has no GPUs; a driver that
    does not work is a Problem."""
    memory = psutil.virtual_memory()
    host: dict[str, Any] = {
        "name": platform.node(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory": memory.total,
        "memory_free": min(memory.total, memory.available + host_memory(ending)),
    }
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
            return Machine.model_validate(host)
        raise _broken(error) from error
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = [gpu for index, handle in enumerate(handles) for gpu in _read_gpu(index, handle, ending)]
        whole = {gpu.index for gpu in gpus if not gpu.mig}
        links = [_read_link(a, b, handles) for a, b in combinations(sorted(whole), 2)]
        return Machine(**host, driver=pynvml.nvmlSystemGetDriverVersion(), gpus=tuple(gpus), links=tuple(links))
    except pynvml.NVMLError as error:
        raise _broken(error) from error
    finally:
        pynvml.nvmlShutdown()


def _broken(error: Exception) -> Problem:
    return Problem(
        f"the NVIDIA driver cannot be asked for this host's GPUs: {error}",
        "restart the host if its driver was upgraded; `nvidia-smi` has to list the GPUs",
    )


def _told(ask: Callable[..., Any], *args: Any, otherwise: Any) -> Any:
    """What NVML answers, or `otherwise` where this GPU does not tell."""
    try:
        return ask(*args)
    except pynvml.NVMLError:
        return otherwise


def _read_gpu(index: int, handle: Any, ending: frozenset[int]) -> list[Gpu]:
    """The GPU, or its MIG slices where it is cut into some."""
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    cores = _told(pynvml.nvmlDeviceGetNumGpuCores, handle, otherwise=0)
    multiprocessors = cores // CORES_PER_SM.get(capability, 128)
    clock = _told(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM, otherwise=0) * 1e6
    tflops = multiprocessors * clock * FLOP_PER_CLOCK_SM.get(capability, 1024) / 1e12
    # two transfers a clock; bus width in bits
    memory_clock = _told(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM, otherwise=0) * 1e6
    bandwidth = 2 * memory_clock * _told(pynvml.nvmlDeviceGetMemoryBusWidth, handle, otherwise=0) / 8 / 1e9
    name = pynvml.nvmlDeviceGetName(handle)
    total, free = _memory(handle, f"GPU {index} ({name})")
    held, programs = _programs(handle, ending)
    whole = Gpu(
        index=index,
        id=str(index),
        name=name,
        total=total,
        free=min(total, free + held),
        compute_capability=capability,
        bandwidth_gb_s=round(bandwidth, 1) or USUAL_GB_S,
        bf16_tflops=round(tflops, 1) or USUAL_TFLOPS,
        numa=_numa_node(handle),
        programs=programs,
    )
    slices = _read_slices(handle, whole, ending)
    return slices or [whole]


def _read_slices(handle: Any, whole: Gpu, ending: frozenset[int]) -> list[Gpu]:
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
    except pynvml.NVMLError:
        return []
    slices = []
    for position in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, position)
        except pynvml.NVMLError:
            continue
        name = pynvml.nvmlDeviceGetName(part)
        total, free = _memory(part, name)
        held, programs = _programs(part, ending)
        attributes = pynvml.nvmlDeviceGetAttributes_v2(part)
        share = attributes.memorySizeMB * (1 << 20) / whole.total
        slices.append(
            whole.model_copy(
                update={
                    # never the number of a whole GPU
                    "index": (whole.index + 1) * 1000 + position,
                    "id": pynvml.nvmlDeviceGetUUID(part),
                    "name": name,
                    "total": total,
                    "free": min(total, free + held),
                    "bandwidth_gb_s": round(whole.bandwidth_gb_s * share, 1),
                    "bf16_tflops": round(whole.bf16_tflops * attributes.gpuInstanceSliceCount / 7, 1),
                    "mig": True,
                    "programs": programs,
                }
            )
        )
    return slices


def _memory(handle: Any, name: str) -> tuple[int, int]:
    """Total without the driver's reserve, as CUDA counts it, and free."""
    if memory := _told(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2, otherwise=None):
        return memory.total - memory.reserved, memory.free
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_NOT_SUPPORTED:
            raise
        raise Problem(
            f"{name} does not tell its memory: {error}",
            "pin GPUs that share the host's memory in docker-compose.gpu.yml, the planner cannot size them",
        ) from error
    return memory.total, memory.free


def _numa_node(handle: Any) -> int:
    bus = pynvml.nvmlDeviceGetPciInfo(handle).busId
    address = (bus.decode() if isinstance(bus, bytes) else bus)[-12:].lower()
    path = Path(f"/sys/bus/pci/devices/{address}/numa_node")
    # -1 where the firmware says nothing
    return max(0, int(path.read_text())) if path.exists() else 0


def _programs(handle: Any, ending: frozenset[int]) -> tuple[int, tuple[str, ...]]:
    """The bytes that `ending` hold, and what else runs there."""
    held, names = 0, []
    for process in _told(pynvml.nvmlDeviceGetComputeRunningProcesses, handle, otherwise=[]):
        if process.pid in ending:
            if process.usedGpuMemory is None:
                names.append("this project's replicas (make down)")
            held += process.usedGpuMemory or 0
            continue
        try:
            name = Path(pynvml.nvmlSystemGetProcessName(process.pid)).name
        except pynvml.NVMLError:
            name = "a program"
        names.append(f"{name} (pid {process.pid})")
    return held, tuple(dict.fromkeys(names))


def _read_link(a: int, b: int, handles: list[Any]) -> Link:
    if bandwidth := _nvlink_gb_s(handles[a], handles[b]):
        return Link(a=a, b=b, kind="nvlink", gb_s=bandwidth)
    level = _told(pynvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b], otherwise=None)
    speeds = [
        PCIE_GB_S.get(_told(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle, otherwise=USUAL_PCIE), 0.985)
        * (_told(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle, otherwise=0) or USUAL_LANES)
        for handle in (handles[a], handles[b])
    ]
    return Link(a=a, b=b, kind=ANCESTOR.get(level, "sys"), gb_s=round(min(speeds), 1))


def _nvlink_gb_s(a: Any, b: Any) -> float:
    """GB/s one way over the NVLinks that join a and b, directly or through NVSwitches; 0 where there are none."""
    other = pynvml.nvmlDeviceGetPciInfo(b).busId
    total = 0.0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(a, link) != pynvml.NVML_FEATURE_ENABLED:
                continue
            through_switch = (
                pynvml.nvmlDeviceGetNvLinkRemoteDeviceType(a, link) == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
            )
            if through_switch or pynvml.nvmlDeviceGetNvLinkRemotePciInfo(a, link).busId == other:
                total += NVLINK_GB_S.get(pynvml.nvmlDeviceGetNvLinkVersion(a, link), 25.0)
        except pynvml.NVMLError:
            # fewer links than the library's limit
            continue
    return total
