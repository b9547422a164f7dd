"""What the last words of a service that died mean, and what to do about it."""

from __future__ import annotations

import re
from typing import NamedTuple

# of a line that is shown
LONGEST = 300


class Death(NamedTuple):
    """Why a service died: in words, the line of its log that says so, and what to do."""

    why: str
    line: str
    fix: str


# A line of a log, what it means, and what to do. The first that any line matches counts: causes before their effects.
MEANINGS: tuple[tuple[str, str, str], ...] = (
    # vllm/launch.py says itself what to do, in each of its lines
    (r"^launch: (?!vllm serve)", "its settings are refused", "correct what the line names, then `make up`"),
    (
        r"health: the replica lives but makes no token",
        "it hung, and its health check ended it",
        "if it happens again, see what it did before: `make report` packs its log",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache memory|No available KV cache",
        "no room for the KV cache beside the weights",
        "set a smaller MAX_MODEL_LEN, or more GPUs or smaller weights (docs/guide.md#too-little-memory)",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|hipErrorOutOfMemory",
        "the GPU's memory is full",
        "set a smaller MAX_MODEL_LEN or MAX_NUM_SEQS; another program on that GPU: nvidia-smi",
    ),
    (
        r"Free memory on device .* is less than desired GPU memory utilization",
        "another program holds the GPU's memory",
        "see which (nvidia-smi), end it, or set a smaller GPU_MEMORY_UTILIZATION",
    ),
    (
        r"CUDA driver version is insufficient|driver on your system is too old|no kernel image|unsupported toolchain",
        "the image's CUDA and this host's driver or GPU do not go together",
        "upgrade NVIDIA's driver, then `make up`; a GPU that this vLLM knows no more or not yet takes another image",
    ),
    (
        r"forward compatibility was attempted|CUDA error: system not yet initialized",
        "the driver is not ready to compute",
        "restart the host after an upgrade of the driver; with NVSwitch start nvidia-fabricmanager",
    ),
    (
        r"No CUDA GPUs are available|Found no NVIDIA driver|CUDA unknown error|libcuda\.so\.1: cannot open",
        "the replica sees no GPU",
        "`nvidia-smi` has to list it on this host, and Docker needs NVIDIA's container toolkit",
    ),
    (
        r"uncorrectable ECC|CUDA error: (an illegal memory access|unspecified launch failure|misaligned)|Xid",
        "the GPU failed in the middle of its work",
        "see `make doctor` on GPUs and `dmesg | grep Xid`; if it comes back, another GPU or driver",
    ),
    (
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError",
        "the GPUs of one replica do not reach each other",
        "set NCCL_DEBUG=INFO to see why; NCCL_P2P_DISABLE=1 where GPUs cannot copy directly",
    ),
    (
        r"requires you to execute the (configuration|model) file|trust_remote_code=True",
        "the model brings Python code of its own, which is not allowed to run",
        "read that code in the model's folder; if you trust it, set TRUST_REMOTE_CODE=true",
    ),
    (
        r"Model architectures .* (are not supported|failed to be inspected)|does not recognize this architecture",
        "this vLLM does not know the model's architecture",
        "choose a model that it knows, or a newer vLLM (x-pins in docker-compose.yml)",
    ),
    (
        r"SafetensorError|Error while deserializing header|MetadataIncompleteBuffer|unexpected EOF, expected",
        "a file of the model's weights is damaged or not complete",
        "remove the model's folder below models/ and run `make up`: it fetches the model again",
    ),
    (
        r"Cannot find any model weights|does not appear to have a file named|is not a local folder and is not a valid",
        "there is no model in that folder",
        "check MODEL in .env; docs/guide.md#a-model-that-wont-load",
    ),
    (
        r"LocalEntryNotFoundError|couldn't connect to .*huggingface|offline mode is enabled|Name or service not known",
        "the model is not on this host, and the hub does not answer",
        "put the model into models/, or mend the network, then `make up`",
    ),
    (
        r"GatedRepoError|401 Client Error.*huggingface|Access to model .* is restricted",
        "the model is gated",
        "accept its licence on the hub, set HF_TOKEN_FILE, then `make up`",
    ),
    (r"No space left on device|Errno 28", "a disk is full", "make room: `docker system df` shows what takes it"),
    (
        r"[Aa]ddress already in use|bind\(\) to .* failed \(98",
        "its port is taken",
        "`make doctor` names the port's setting; stop what holds it",
    ),
    (
        r"is damaged and set aside|\[emerg\]",
        "the gateway's files have a mistake",
        "correct the file and line that it names, then `make up`",
    ),
    (r"^start\.sh: ", "its settings are refused", "do what the line says"),
    (
        r"opening storage failed|lock DB directory|corrupt(ion|ed).*(block|WAL)|segments are not sequential",
        "Prometheus cannot open what it kept",
        "see the line; the metrics lie in Docker's volume `prometheus`, which can be removed if they are not needed",
    ),
    (r"error loading config|parsing YAML file", "its configuration has a mistake", "correct the file that it names"),
    (
        r"[Pp]ermission denied|PermissionError",
        "a file or folder may not be read or written",
        "`chmod -R a+rX models nginx prometheus grafana`, then `make up`",
    ),
    (
        r"MemoryError|Cannot allocate memory",
        "this host's memory is full",
        "stop other programs, or plan a smaller fleet",
    ),
)
KILLED, REFUSED = 137, 2


def cause(lines: list[str], exit_code: int = 0, *, oom_killed: bool = False, limit: str = "") -> Death:
    """Why a service died, by the last lines of its log, oldest first, and its exit status.

    `oom_killed`: the kernel ended it at its memory limit; `limit` is the setting that has it.
    """
    last = shortened(lines[-1]) if lines else "it logged nothing"
    if oom_killed:
        more = (
            f"set a higher {limit}, or less to do (docs/guide.md#too-little-memory)" if limit else "raise its mem_limit"
        )
        return Death("the kernel killed it at its memory limit", last, more)
    for pattern, why, fix in MEANINGS:
        if line := next((line for line in reversed(lines) if re.search(pattern, line)), None):
            return Death(why, shortened(line), fix)
    if exit_code == KILLED:
        fix = "see `dmesg | grep -i oom`; if nobody killed it, this host's memory was full"
        return Death("something killed it (exit status 137)", last, fix)
    why = f"it ended by itself with exit status {exit_code}" if exit_code else "it ended by itself"
    return Death(why, last, "see its log: docker compose logs --tail 50 SERVICE")


def shortened(line: str) -> str:
    """A line for people: without what stands before each of vLLM's lines, and not longer than LONGEST."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    plain = re.sub(r"^\((?:APIServer|EngineCore|VllmWorker|Worker)\S* pid=\d+\) ", "", plain)
    plain = re.sub(r"^(?:INFO|WARNING|ERROR) \d\d-\d\d \d\d:\d\d:\d\d \[\S+\] ", "", plain)
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…"
