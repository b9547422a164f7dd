"""What `make status` shows stays whole on a narrow screen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import status
from stack.gateway import Replica

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


@pytest.mark.parametrize("width", [80, 200])
def test_a_models_name_is_folded_not_cut(width: int) -> None:
    replicas = [Replica(name=f"vllm-{n}", state="unreachable", models=[MODEL], weight=1, kv_usage=0.5) for n in (0, 1)]
    page = io.StringIO()
    Console(file=page, width=width).print(status.replica_table(replicas))
    lines = page.getvalue().splitlines()
    # the last column, below its heading
    (top,) = (number for number, line in enumerate(lines) if "model" in line)
    column = lines[top].index("model")
    below = [line[column:].strip() for line in lines[top + 2 :]]
    assert "".join(below) == MODEL * 2
    assert len([line for line in below if line]) <= 2 * 4
    assert max(map(len, lines)) <= width
    assert sum("vllm-" in line and "50%" in line for line in lines) == 2


def test_a_name_with_brackets_is_shown_as_it_is() -> None:
    page = io.StringIO()
    Console(file=page, width=200).print(
        status.replica_table([Replica(name="vllm-0", state="ready", models=["qwen[/b]", "[red]x"])])
    )
    assert "qwen[/b]" in page.getvalue()
    assert "[red]x" in page.getvalue()
