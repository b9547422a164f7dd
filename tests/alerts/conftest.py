"""Prometheus' own tools, from the image that the stack runs."""

import subprocess
from collections.abc import Callable

import pytest

from lab.sim.gateway import image
from lab.stack import StackError, run
from stack.shell import ROOT

Promtool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def promtool(request: pytest.FixtureRequest) -> Promtool:
    """Runs promtool in the checkout; where its image is missing, `make up` makes it."""
    try:
        run("docker", "image", "inspect", image("prometheus"))
    except StackError:
        request.getfixturevalue("stack")

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        mount = ["--volume", f"{ROOT}:/checkout:ro", "--workdir", "/checkout"]
        docker = ["docker", "run", "--rm", "--pull", "never", "--network", "none", *mount, "--entrypoint", "promtool"]
        return subprocess.run([*docker, image("prometheus"), *arguments], capture_output=True, text=True, timeout=120)

    return call
