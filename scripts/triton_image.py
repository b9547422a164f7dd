"""`make triton`: the image of Triton, over the replica's (`ARGS=--gpu`: over NVIDIA's, for GPUs).

Where the replica's image was built from packages, it fetches wheels first, and the build needs no network.
"""

from __future__ import annotations

from typing import Annotated

import typer

from stack.compose import GPU_FILE, Compose
from stack.console import Problem, console, one_line_for_mistakes
from stack.images import BASE_LABEL, label_of, lay_further_wheels, present
from stack.shell import ROOT, work

WHEELS = ROOT / "triton" / "wheels"


def build(gpu: bool) -> str:
    """Builds the image, and gives its name. A Problem where it cannot be built."""
    compose = Compose("docker-compose.gpu.yml") if gpu else Compose()
    files = ["-f", "docker-compose.yml", *(["-f", GPU_FILE] if gpu else [])]
    pins = compose.config().pins
    replica = pins["replica-image"]
    if not gpu and not present(replica):
        raise Problem(f"{replica} is not on this machine", "run `make up` once without the profile, which builds it")
    from_packages = not gpu and (label_of(replica, BASE_LABEL) or "").startswith("vllm-fleet/")
    lay_further_wheels(WHEELS, ["--no-deps", *pins["triton-packages"].split()], from_packages)
    command = ["docker", "compose", *files, "--profile", "triton", "build", "triton"]
    work(command, console.log, fix="see what the build says")
    return f"vllm-fleet/triton:{pins['triton'].split(':')[1].split('-')[0]}-gpu" if gpu else pins["triton-image"]


def main(gpu: Annotated[bool, typer.Option("--gpu", help="for NVIDIA GPUs")] = False) -> None:
    """Build the image of Triton."""
    with one_line_for_mistakes():
        image = build(gpu)
    console.print(f"{image} is built")


if __name__ == "__main__":
    typer.run(main)
