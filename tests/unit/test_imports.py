"""Which way imports go: tests -> lab -> scripts/. Everything is found from the two import roots, without a detour."""

import ast
from pathlib import Path

import pytest

from stack.shell import ROOT

# A folder, and what nothing in it may import.
BARRED = {
    "access": {"tests", "lab", "stack", "models", "planner", "diagnosis"},
    "lab": {"tests"},
    "scripts": {"tests", "lab"},
    "grafana": {"tests", "lab"},
    "vllm": {"tests", "lab"},
    "ray": {"tests", "lab", "stack"},
    "images": {"tests", "lab"},
}
# Weights on this host may bring Python of their own.
FILES = [path for path in ROOT.glob("[a-z]*/**/*.py") if path.relative_to(ROOT).parts[0] != "models"]


def imported(path: Path) -> set[str]:
    """The top-level packages and modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", BARRED)
def test_imports_go_one_way(folder: str) -> None:
    """Tests use the lab and the product, the lab uses the product, and nothing goes back."""
    files = [path for path in FILES if path.is_relative_to(ROOT / folder)]
    wrong = {str(path.relative_to(ROOT)): back for path in files if (back := imported(path) & BARRED[folder])}
    assert wrong == {}


def test_no_file_changes_the_import_path() -> None:
    """No file touches `sys.path`: who runs it sets the import roots (the Makefile, pyproject.toml)."""

    def touches(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr == "path":
            return isinstance(node.value, ast.Name) and node.value.id == "sys"
        return isinstance(node, ast.ImportFrom) and node.module == "sys" and "path" in {one.name for one in node.names}

    wrong = [str(path.relative_to(ROOT)) for path in FILES if any(map(touches, ast.walk(ast.parse(path.read_text()))))]
    assert wrong == []
