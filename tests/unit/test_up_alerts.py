"""`make up` takes changed objectives and rules over, and says what is wrong with them before anything reads them."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from stack import burn_rates, objectives, reload, shell
from stack.compose import Compose, Container
from stack.console import Problem


class Fake(Compose):
    """A stack with these services running; what it was asked is kept."""

    def __init__(self, *running: str, mistake: str = "") -> None:
        self.running = running
        self.mistake = mistake
        self.said: list[tuple[str, ...]] = []

    def containers(self) -> dict[str, Container]:
        return {
            name: Container(ID=name, Service=name, State="running", Health="healthy", Status="Up")
            for name in self.running
        }

    def command(self, *args: str) -> list[str]:
        self.said.append(args)
        return ["sh", "-c", f"echo '{self.mistake}' >&2; exit {bool(self.mistake):d}"]

    def ask(self, *args: str, timeout_s: float = 60) -> str:
        assert timeout_s
        self.said.append(args)
        return ""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of rules; containers started a minute ago."""
    (tmp_path / "rules.yml").write_text("groups: []\n")
    began = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 60)) + ".123456789+00:00"

    def ask(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return (
            subprocess.CompletedProcess(args, 0, began + "\n", "") if args[0] == "docker" else shell.ask(*args, **more)
        )

    monkeypatch.setattr(reload, "FOLDER", tmp_path)
    monkeypatch.setattr("stack.reload.ask", ask)
    return tmp_path


def age(folder: Path, seconds: float) -> None:
    """Makes all of a folder look as if it had been changed so many seconds ago."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - seconds,) * 2)


def test_who_started_after_the_change_reads_nothing_again(folder: Path) -> None:
    age(folder, 120)
    compose = Fake("prometheus", "alertmanager")
    assert reload.by_whom_it_concerns(compose) == "unchanged"
    assert compose.said == []


def test_whoever_runs_reads_a_change_once_it_is_checked(folder: Path) -> None:
    age(folder, 10)
    compose = Fake("prometheus")
    assert reload.by_whom_it_concerns(compose) == "read again by prometheus, as files changed"
    assert [said[0] for said in compose.said] == ["exec", "exec"]
    assert compose.said[1] == ("exec", "-T", "prometheus", "sh", "-c", "kill -HUP 1")


def test_no_signal_is_sent_by_docker() -> None:
    """It takes any for a stop by hand, and leaves the container down when the host boots: seen in `lab.hosts`."""
    files = [*(shell.ROOT / "scripts").rglob("*.py"), shell.ROOT / "Makefile"]
    assert not [file.name for file in files if re.search(r'"kill", "-|compose kill -', file.read_text())]


def test_a_mistake_is_named_and_nobody_reads_it(folder: Path) -> None:
    age(folder, 10)
    compose = Fake("alertmanager", mistake='undefined receiver "me" used in route')
    with pytest.raises(Problem, match='the files of alertmanager have a mistake: undefined receiver "me"'):
        reload.by_whom_it_concerns(compose)
    assert [said[0] for said in compose.said] == ["exec"]


def test_changed_objectives_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burn_rates, "FILE", tmp_path / "objectives.yml")
    monkeypatch.setattr(burn_rates, "FOR_GATEWAY", tmp_path / "objectives.json")
    assert burn_rates.write(objectives.load()) == "objectives.yml and objectives.json written anew"
    assert burn_rates.write(objectives.load()) == "unchanged"
