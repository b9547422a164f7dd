"""The fault table over hosts: its short form, in network namespaces."""

import os
import subprocess
import sys

import pytest

from stack.shell import ROOT


def test_no_fault_between_hosts_loses_a_request(gateway_image: None) -> None:
    """A host that is off without a word, or removed: no request that had not begun is lost, and it comes back."""
    command = [sys.executable, "-m", "lab.hosts", "--quick"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f".{os.pathsep}scripts"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
