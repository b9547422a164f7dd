"""The commands that the docs show, run as they stand there."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from lab.stack import Stack
from stack.shell import ROOT

# Not run here, and why. A command that the docs show is either run or has its reason here.
NOT_RUN = {
    "make up": "the fixture runs it",
    "make test": "runs this",
    "make lint": "the same programs run beside the tests",
    ".ci/run": "runs this",
    ".venv/bin/python -m pytest": "runs this",
    "make down": "the fixture runs it",
    "make plan ARGS='Qwen": "asks the hub, and for GPUs",
    "make roll": "has tests of its own",
    "docker compose up": "`make up` runs it",
    "docker compose -f": "needs GPUs",
    "docker compose exec gateway curl": "changes who gets requests; the gateway's tests do the same",
    "docker compose exec grafana": "Grafana's image may not be there",
    "make logs": "a placeholder stands in it; tests/stack/test_logs.py follows a request",
    "make key": "would ask the tests for keys; tests/unit/test_access_docs.py runs them",
    "make user": "would ask the tests for keys; tests/unit/test_access_docs.py runs them",
    "make doctor": "tells of alerts that other tests cause; test_doctor.py runs it",
    "make report": "test_doctor.py runs it",
    "export FLEET_KEY=": "would ask the tests for keys",
    "make bundle": "takes minutes and gigabytes; has tests of its own",
    "tar xpf": "needs a bundle",
    "vllm-fleet/install.sh": "needs a bundle",
    "cd vllm-fleet": "needs a bundle",
    "cp --no-clobber": "would change the settings",
}


def commands() -> list[str]:
    """Each line of a shell block in the docs (the README's long curl, which spans lines, is tested by itself)."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "guide.md"]
    blocks = [
        block
        for page in pages
        for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    lines = [
        line.split("  #")[0].strip() for block in blocks if "curl http" not in block for line in block.splitlines()
    ]
    return sorted({line for line in lines if line and not line.startswith(tuple(NOT_RUN))})


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_succeeds(stack: Stack, command: str) -> None:
    """What a reader copies from the docs works."""
    here = command.replace("http://localhost", stack.url)
    done = subprocess.run(["bash", "-c", here], cwd=ROOT, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_curl_is_answered(stack: Stack, tmp_path: Path) -> None:
    """The command that a new user copies from the README gives an answer in words."""
    (command,) = re.findall(r"^```sh\n(curl .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    here = command.replace("http://localhost/", f"{stack.url}/").replace("curl ", "curl --silent --show-error ", 1)
    header = "".join(f'header = "{name}: {value}"\n' for name, value in stack.headers.items())
    (tmp_path / ".curlrc").write_text(header)
    env = {**os.environ, "CURL_HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", here], env=env, text=True, capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
