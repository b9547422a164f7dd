"""Two hosts with Docker engines of their own, by a user's commands: joined, renewed, without power, removed."""

import os
import subprocess
import sys

import pytest

from stack.shell import ROOT

# what an engine takes at most to load the replica's image, the first time, and then all rows
WITHIN_S = 600


@pytest.mark.timeout(WITHIN_S + 60)
def test_a_second_host_joins_comes_back_and_leaves_by_the_commands(gateway_image: None) -> None:
    """Each command does what docs/hosts.md says of it, and no request that had not begun is lost. Replicas are
    simulated, in containers as they are."""
    done = subprocess.run(
        [sys.executable, "-m", "lab.hosts", "--engines", "--quick"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f".{os.pathsep}scripts"},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
