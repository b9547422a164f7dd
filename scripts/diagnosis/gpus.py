"""What is wrong with this host's GPUs, by NVML and the kernel's log. `planner/nvml.py` reads what they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pynvml

from diagnosis.findings import Found
from stack.shell import ask

# Why a GPU runs slower than it could (NVML's clocks event reasons), what it means, and what to do.
SLOWED = {
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: ("it is too hot", "see to its fans and the room's cooling"),
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: ("it is too hot", "see to its fans and the room's cooling"),
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: (
        "the power supply asked it to",
        "see to the power supply: it may be too weak for all GPUs",
    ),
}
# What the driver logs of a GPU that failed, by its number (NVIDIA, "XID Errors"), and what to do.
XIDS = {
    13: ("a program did what it must not", "if it comes back with another model, replace the GPU"),
    31: ("a program read memory that is not its own", "if it comes back with another model, replace the GPU"),
    48: ("its memory has an error that cannot be corrected", "reset it or restart the host; then replace it"),
    63: ("a row of its memory was replaced", "restart the host when it suits"),
    64: ("a row of its memory could not be replaced", "replace it"),
    74: ("NVLink failed", "see to the bridge or the switch"),
    79: ("it has fallen off the bus", "restart the host; see to its power and its slot"),
    94: ("its memory had an error, and one program was ended", "restart the host when it suits"),
    95: ("its memory had an error, and all programs were ended", "restart the host"),
    119: ("its own processor does not answer", "restart the host; upgrade the driver"),
}
XID = re.compile(r"^(\S+).*NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", re.MULTILINE)


def look(found: Found) -> None:
    """Notes what is wrong with each GPU. Where NVML does not tell something, nothing is said of it."""
    pynvml.nvmlInit()
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            _look_at(index, found)
    finally:
        pynvml.nvmlShutdown()
    _read_kernel_log(found)


def _told(question: Callable[..., Any], *args: Any) -> Any:
    """What NVML answers; None where this GPU does not tell."""
    try:
        return question(*args)
    except pynvml.NVMLError:
        return None


def _look_at(index: int, found: Found) -> None:
    name = f"GPU {index}"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        found.wrong(name, f"the driver does not reach it: {error}", "restart the host; `dmesg | grep Xid` says why")
        return
    reasons = _told(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    degrees = _told(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    for why, fix in dict.fromkeys(said for bit, said in SLOWED.items() if reasons & bit):
        at = f" ({degrees} °C)" if degrees is not None else ""
        found.wrong(name, f"it runs slower than it could: {why}{at}", fix)
    corrected_not = (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
    if errors := _told(pynvml.nvmlDeviceGetTotalEccErrors, handle, *corrected_not):
        what = f"its memory had {errors} errors since the driver was loaded that could not be corrected"
        found.wrong(name, what, "reset it or restart the host; if they come back, replace it")
    if rows := _told(pynvml.nvmlDeviceGetRemappedRows, handle):
        _, _, pending, failed = rows
        if failed:
            found.wrong(name, "rows of its memory are bad, and there are none left to replace them", "replace it")
        elif pending:
            found.note(name, "a bad row of its memory is replaced at the next reset", "restart the host when it suits")


def _read_kernel_log(found: Found) -> None:
    """Notes the last error of each kind that the driver logged of each GPU, where this user may read that log."""
    told = ask("dmesg", "--time-format", "iso", timeout=5).stdout
    last: dict[tuple[str, int], str] = {(bus, int(number)): when for when, bus, number in XID.findall(told)}
    for (bus, number), when in last.items():
        why, fix = XIDS.get(number, ("see NVIDIA's list of XID errors", "if it comes back, restart the host"))
        found.wrong(f"GPU {bus}", f"the driver logged XID {number}: {why}", fix, _moment(when))


def _moment(text: str) -> datetime | None:
    """A time of the kernel's log."""
    try:
        return datetime.fromisoformat(text.replace(",", "."))
    except ValueError:
        return None
