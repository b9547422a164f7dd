"""`make ray`: the image of a Ray node, over the replica's (`ARGS=--gpu`: over that for GPUs).

Where the replica's image was built from packages, it fetches wheels first, and the build needs no network.
"""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from stack.console import Problem, console, one_line_for_mistakes
from stack.images import BASE_LABEL, WHEEL_LIST, label_of, lay_further_wheels, present
from stack.shell import ROOT, work

COMPOSE_FILE = ROOT / "docker-compose.ray.yml"
GPU_FILE = ROOT / "docker-compose.ray-gpu.yml"
WHEELS = ROOT / "ray" / "wheels"


def build(pins: dict[str, str], gpu: bool) -> str:
    """Builds the image, and gives its name. A Problem where it cannot be built."""
    suffix = "-gpu" if gpu else ""
    replica = pins["replica"] + suffix
    if not present(replica):
        raise Problem(f"{replica} is not on this machine", "run `make up` once, which builds it")
    from_packages = (label_of(replica, BASE_LABEL) or "").startswith("vllm-fleet/")
    lay_further_wheels(WHEELS, [f"--constraint={WHEEL_LIST}", *pins["ray-packages"].split()], from_packages)
    files = [f"--file={COMPOSE_FILE}", *([f"--file={GPU_FILE}"] if gpu else [])]
    work(["docker", "compose", *files, "build", "ray-head"], console.log, fix="see what the build says")
    return pins["ray-image"] + suffix


def main(gpu: Annotated[bool, typer.Option("--gpu", help="for NVIDIA GPUs")] = False) -> None:
    """Build the image of a Ray node."""
    with one_line_for_mistakes():
        image = build(yaml.safe_load(COMPOSE_FILE.read_text())["x-pins"], gpu)
    console.print(f"{image} is built")


if __name__ == "__main__":
    typer.run(main)
