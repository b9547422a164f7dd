"""A replica on its GPUs, as Compose wants it: what docker-compose.gpu.yml says of two, for any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from stack.compose import GPU_FILE, is_replica
from stack.shell import ROOT


class Override(list[Any]):
    """A list that replaces the one of an earlier Compose file; Compose would append to it otherwise."""


class OverrideMap(dict[str, Any]):
    """A mapping that replaces the one of an earlier Compose file."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Override, lambda dumper, value: dumper.represent_sequence("!override", value))
_Dumper.add_representer(OverrideMap, lambda dumper, value: dumper.represent_mapping("!override", value))


def gpu_service(
    device_ids: Iterable[str],
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The part of a replica's service that puts it on GPUs, to be laid over the replica of docker-compose.yml.

    device_ids: indices or UUIDs of the replica's own GPUs (or MIG slices), as `nvidia-smi -L` shows them; one for each
    tensor parallel worker of each pipeline stage. environment: further settings, by their names in .env.
    Raises ValueError where the number of GPUs and the parallel sizes differ, or a GPU is named twice.
    """
    ids = list(device_ids)
    if len(set(ids)) != len(ids) or len(ids) != tensor_parallel_size * pipeline_parallel_size:
        raise ValueError(
            f"tp {tensor_parallel_size} x pp {pipeline_parallel_size} needs as many different GPUs, got {ids}"
        )
    common = yaml.safe_load((ROOT / GPU_FILE).read_text())["x-gpu-replica"]
    return {
        **common,
        "environment": {
            "TENSOR_PARALLEL_SIZE": str(tensor_parallel_size),
            "PIPELINE_PARALLEL_SIZE": str(pipeline_parallel_size),
            **(environment or {}),
        },
        "deploy": {
            "resources": {
                "reservations": {
                    "devices": Override([{"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}]),
                }
            }
        },
    }


def beside_gpus() -> dict[str, Any]:
    """What docker-compose.gpu.yml says of other services than replicas: whoever plans does not use that file."""
    services: dict[str, Any] = yaml.safe_load((ROOT / GPU_FILE).read_text())["services"]
    return {name: service for name, service in services.items() if not is_replica(name)}


def dump_compose(document: Mapping[str, Any]) -> str:
    """The text of a Compose file."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
