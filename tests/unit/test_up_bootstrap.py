"""What `make up` begins with: .venv is made where it is missing or broken, and left alone where it is whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stack.shell import ROOT

# Stands in for Python: notes what it is asked for, and makes a .venv with itself in it.
PYTHON = """\
#!/bin/sh
echo "$*" >>"$NOTES"
if [ "$1 $2" = "-m venv" ]; then
  for folder; do :; done
  rm -rf "$folder"
  mkdir -p "$folder/bin"
  cp "$0" "$folder/bin/python"
fi
"""
BROKEN = "#!/bin/sh\nexit 1\n"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def bootstrap(checkout: Path) -> list[Path]:
    """The command in a checkout that is made for it."""
    program(checkout / "bin/python3", PYTHON)
    (checkout / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts/bootstrap.sh", checkout / "scripts")
    (checkout / "pyproject.toml").write_text("[project]\n")
    return [checkout / "scripts/bootstrap.sh"]


def environment(checkout: Path) -> dict[str, str]:
    """One in which that Python is found."""
    return {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "NOTES": str(checkout / "notes")}


def asked(checkout: Path) -> list[str]:
    """What Python is asked for by bootstrap.sh in this checkout."""
    notes = checkout / "notes"
    notes.write_text("")
    subprocess.run(bootstrap(checkout), env=environment(checkout), check=True, capture_output=True)
    return notes.read_text().splitlines()


@pytest.mark.parametrize("broken", ["dangling", "no pip", "missing"])
def test_a_venv_that_is_broken_is_made_anew_and_then_left_alone(tmp_path: Path, broken: str) -> None:
    python = tmp_path / ".venv/bin/python"
    if broken == "no pip":
        program(python, BROKEN)
    elif broken == "dangling":
        python.parent.mkdir(parents=True)
        python.symlink_to(tmp_path / "gone")
    if broken != "missing":
        (tmp_path / ".venv/.installed-scripts").write_text("[project]\n")
    first = asked(tmp_path)
    assert "-m venv --clear .venv" in first
    assert any("pip install" in line and "--group scripts" in line for line in first)
    assert asked(tmp_path) == ["-c import pip"]


def test_two_at_once_make_it_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    command = bootstrap(tmp_path)
    (tmp_path / "notes").touch()
    os.mkfifo(tmp_path / "go")
    # pip, in this one, takes until somebody writes into `go`
    slow = PYTHON.replace("if [", 'case "$*" in *"pip install"*--upgrade*) read -r _ <go ;; esac\nif [', 1)
    program(tmp_path / "bin/python3", slow)
    first = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    assert first.stderr
    assert next(line for line in first.stderr if "Installing the Python packages" in line)
    second = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    assert second.stderr
    said = second.stderr.readline()
    (tmp_path / "go").write_text("go\n")
    assert [first.wait(20), second.wait(20)] == [0, 0]
    assert "waiting for its end" in said
    notes = (tmp_path / "notes").read_text()
    assert notes.count("-m venv") == 1
    assert notes.count("--group scripts") == 1
    first.stderr.close()
    second.stderr.close()


def test_only_the_command_that_runs_the_browser_tests_sees_to_a_browser() -> None:
    """It is bootstrap.sh's group `test` that does."""
    recipes = re.findall(r"^(\w+): ##.*\n\tscripts/bootstrap\.sh test ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipes == ["test"]
