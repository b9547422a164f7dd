"""A command that takes no arguments does nothing where it is given one: `make up ARGS=--dry-run` is no dry run."""

from __future__ import annotations

import runpy
import sys

import pytest

from stack import settings
from stack.shell import ROOT


@pytest.mark.parametrize("command", ["up", "status", "lint"])
@pytest.mark.parametrize("argument", ["--dry-run", "vllm-0"])
def test_an_argument_is_refused_by_name_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, argument: str
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{command}.py", argument])
    # what both begin with
    monkeypatch.setattr(settings, "load", lambda: pytest.fail("it began"))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{command}.py"), run_name="__main__")
    assert end.value.code == 2
    assert argument in capsys.readouterr().err


def test_without_arguments_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["status.py"])

    def begin() -> None:
        raise SystemExit(77)

    monkeypatch.setattr(settings, "load", begin)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "status.py"), run_name="__main__")
    assert end.value.code == 77
