"""The commands of docs/access.md, run as they stand there, one after the other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import key
import user
from access.store import Secrets
from stack import access, settings
from stack.gateway import Gateway, Replica
from stack.shell import ROOT

PAGE = (ROOT / "docs" / "access.md").read_text()


def commands() -> list[str]:
    """Each line of the page's shell blocks, in its order."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_each_command_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = Secrets(tmp_path / "secrets")
    for module in (key, user, access):
        monkeypatch.setattr(module, "SECRETS", secrets)
    monkeypatch.setattr(key, "running_files", list)
    monkeypatch.setattr(settings, "read", lambda _: {})
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr(Gateway, "replicas", lambda _: [Replica(name="vllm-0", state="ready", models=[model])])
    apps = {"key": key.app, "user": user.app}
    assert len(commands()) > 20
    for command in commands():
        make, target, *arguments = shlex.split(command)
        assert make == "make"
        words = shlex.split(" ".join(arguments).removeprefix("ARGS="))
        done = CliRunner().invoke(apps[target], words, "four words that fit together\n")
        assert done.exit_code == 0, f"{command}: {done.output}"
        assert "does not serve" not in done.stderr


@pytest.mark.parametrize(("target", "app"), [("key", key.app), ("user", user.app)])
def test_each_command_stands_in_the_page(target: str, app: typer.Typer) -> None:
    for command in app.registered_commands:
        assert command.callback
        name = command.name or command.callback.__name__
        assert re.search(rf"make {target} ARGS='?{name}\b", PAGE), name


def test_each_limit_stands_in_the_page() -> None:
    assert all(f"`--{option.replace('_', '-')}`" in PAGE for option in key.LIMITS)
