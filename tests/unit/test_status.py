"""What `make status` shows stays whole on a narrow screen."""

from __future__ import annotations

import io

import httpx
import pytest
from rich.console import Console

import status
from stack.gateway import Replica
from stack.objectives import Objective, Objectives

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


def test_one_that_sleeps_is_well_and_one_that_loads_is_not() -> None:
    page = io.StringIO()
    Console(file=page, width=120, force_terminal=True, color_system="standard").print(
        status.replica_table([Replica(name="vllm-0", state="asleep"), Replica(name="vllm-1", state="loading")])
    )
    assert "\x1b[32masleep" in page.getvalue()
    assert "\x1b[31mloading" in page.getvalue()


AIMS = Objectives(
    default=Objective(ttft_p95_seconds=2.0, itl_p95_seconds=0.1, availability=0.999),
    models={"slow": Objective(ttft_p95_seconds=20.0, itl_p95_seconds=0.75, availability=0.999)},
)


def test_what_misses_an_objective_is_red() -> None:
    """Each model is held against its own objective, and what nobody asked for is a dash."""
    seen = {
        "quick": {"ttft": 3.0, "itl": 0.05, "answered": 0.9985},
        "slow": {"ttft": 3.0, "itl": 0.05, "answered": 1.0},
        "[b]": {"answered": 1.0},
    }
    page = io.StringIO()
    Console(file=page, width=120, force_terminal=True, color_system="standard").print(
        status.objectives_table(seen, AIMS)
    )
    quick, slow, odd = (next(line for line in page.getvalue().splitlines() if name in line) for name in seen)
    assert quick.count("\x1b[31m") == 2
    assert "3 s of 2 s" in quick
    assert "99.85% of 99.90%" in quick
    assert "\x1b[31m" not in slow
    assert "3 s of 20 s" in slow
    assert odd.count("–") == 2


def test_what_prometheus_does_not_know_is_left_out() -> None:
    """No observations are NaN, which is no latency."""

    def answer(request: httpx.Request) -> httpx.Response:
        value = "NaN" if "inter_token" in request.url.params["query"] else "0.5"
        return httpx.Response(200, json={"data": {"result": [{"metric": {"model_name": "m"}, "value": [0, value]}]}})

    with httpx.Client(base_url="http://prometheus", transport=httpx.MockTransport(answer)) as client:
        assert status.seen(client) == {"m": {"ttft": 0.5, "answered": 0.5}}
