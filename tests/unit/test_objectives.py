"""slo.yml: what it says is taken as it stands, and a mistake in it is named with its line."""

from pathlib import Path

import pytest

from stack import objectives
from stack.console import Problem

DEFAULT = "default:\n  ttft_p95_seconds: 2\n  itl_p95_seconds: 0.1\n  availability: 0.999\n"


def load(tmp_path: Path, text: str) -> objectives.Objectives:
    """The objectives of a file with this text."""
    path = tmp_path / "slo.yml"
    path.write_text(text)
    return objectives.load(path)


def test_the_file_that_ships_is_right() -> None:
    """The objectives of this checkout can be read, and one model has its own."""
    shipped = objectives.load()
    assert shipped.models
    assert shipped.of("a model without an entry") == shipped.default


def test_a_model_has_what_differs(tmp_path: Path) -> None:
    """A model's entry changes what it names, and nothing else."""
    found = load(tmp_path, DEFAULT + "models:\n  org/a:\n    itl_p95_seconds: 0.5\n")
    assert found.of("org/a").itl_p95_seconds == 0.5
    assert found.of("org/a").ttft_p95_seconds == found.default.ttft_p95_seconds
    assert found.of("org/b") == found.default


@pytest.mark.parametrize("models", ["", "models:\n", "models: {}\n"])
def test_no_model_needs_an_entry(tmp_path: Path, models: str) -> None:
    """A file with the default alone is whole."""
    assert load(tmp_path, DEFAULT + models).models == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEFAULT + "model: {}\n", "slo.yml, line 5: nothing reads model: did you mean models?"),
        (
            DEFAULT + "models:\n  a:\n    ttft_p95: 3\n",
            "slo.yml, line 7: nothing reads models.a.ttft_p95: did you mean ttft_p95_seconds?",
        ),
        (DEFAULT.replace("0.999", "99.9"), "slo.yml, line 4: default.availability will not do: "),
        (DEFAULT.replace("0.999", "1"), "slo.yml, line 4: default.availability will not do: "),
        (DEFAULT.replace("0.1", "0"), "slo.yml, line 3: default.itl_p95_seconds will not do: "),
        (DEFAULT.replace("0.1", ".nan"), "slo.yml, line 3: default.itl_p95_seconds will not do: "),
        (DEFAULT.replace(": 2", ": yes"), "slo.yml, line 2: default.ttft_p95_seconds will not do: "),
        (DEFAULT.replace(": 2", ": 2 s"), "slo.yml, line 2: default.ttft_p95_seconds will not do: "),
        (DEFAULT.replace("  itl_p95_seconds: 0.1\n", ""), "slo.yml, line 1: default.itl_p95_seconds is missing"),
        ("models: {}\n", "slo.yml, line 1: default is missing"),
        (DEFAULT + "models:\n  7: {}\n", "slo.yml, line 6: models.7 will not do: "),
        (DEFAULT + "models:\n  a: 3\n", "slo.yml, line 6: models.a will not do: "),
        (DEFAULT + "models:\n  a: {}\n  a: {}\n", "slo.yml, line 7: a is there twice"),
        (DEFAULT + "models: [\n", "slo.yml, line 6: "),
        ("", "slo.yml, line 1: the file will not do: "),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    """What is unknown, missing or out of range is refused by its name, with its line."""
    with pytest.raises(Problem) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(said), str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Without the file there is one line, and no traceback."""
    with pytest.raises(Problem, match=r"slo\.yml is missing"):
        objectives.load(tmp_path / "slo.yml")
