"""What `make up` begins with: .venv is made where it is missing or broken, and left alone where it is whole."""

from __future__ import annotations

import os
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


def asked(checkout: Path) -> list[str]:
    """What Python is asked for by bootstrap.sh in this checkout."""
    notes = checkout / "notes"
    notes.write_text("")
    program(checkout / "bin/python3", PYTHON)
    (checkout / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts/bootstrap.sh", checkout / "scripts")
    (checkout / "pyproject.toml").write_text("[project]\n")
    environment = {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "NOTES": str(notes)}
    subprocess.run([checkout / "scripts/bootstrap.sh"], env=environment, check=True, capture_output=True)
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
