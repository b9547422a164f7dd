"""The account against what vLLM reported in public logs (tests/logs); docs/plan.md has the table of it.

A log's model is a folder of tests/models, its config laid over that. Sizes are GiB, of one GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from planner import memory
from planner.config import read_model
from planner.machine import GIB, Gpu
from planner.memory import Settings
from stack.shell import ROOT

LOGS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "tests" / "logs").glob("*.json"))}
CLOSE = 0.08
BEGIN, END = "<!-- written by tests/unit/test_plan_logs.py -->\n", "<!-- end -->\n"
UNITS = {"weights_gib": "weights {:,.2f} GiB", "kv_gib": "KV {:,.2f} GiB", "kv_tokens": "{:,} tokens"}


def planned(log: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The account of a log's replica, under the names that it reports."""
    path = ROOT / "tests" / "models" / log["model"] / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    model = read_model(config | log.get("config", {}), log["model"])
    flags, total = log["flags"], round(log["total_gib"] * GIB)
    gpu = Gpu(
        index=0,
        id="0",
        name=log["gpu"],
        total=total,
        free=total,
        compute_capability=tuple(log["compute_capability"]),
        bandwidth_gb_s=1000,
        bf16_tflops=100,
    )
    monkeypatch.setattr(memory, "utilization", lambda *_: flags["gpu_memory_utilization"])
    tp, length, settings = flags["tensor_parallel_size"], flags["max_model_len"], Settings.default(gpu)
    account = memory.account(model, gpu, tp, 1, length, settings)
    tokens = account.kv_tokens
    if steps := log.get("steps_under_way"):
        # taken to be without asynchronous scheduling, where a window keeps the tokens of one step, not of two
        one = memory.request_bytes(model, tp, model.layers, length, settings, steps - 1)
        tokens = int(account.kv / one * length)
    return {"weights_gib": account.weights / GIB, "kv_gib": account.kv / GIB, "kv_tokens": tokens}


@pytest.mark.parametrize("name", LOGS)
def test_the_account_is_within_eight_percent_of_what_vllm_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LOGS[name]
    found = planned(log, monkeypatch)
    close = {what: found[what] == pytest.approx(value, rel=CLOSE) for what, value in log["reported"].items()}
    if "reason" in log:
        assert not all(close.values()), "it is close by now: take its reason out"
        assert all((found[what] < 0) == (value < 0) for what, value in log["reported"].items())
    else:
        assert all(close.values()), (found, log["reported"])


def test_a_plan_starts_cold_where_a_warm_start_had_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cold, warm = (LOGS[f"qwen3-8b-4090-{how}"] for how in ("cold", "warm"))
    tokens = planned(cold, monkeypatch)["kv_tokens"]
    assert tokens <= cold["reported"]["kv_tokens"] * memory.MARGIN < warm["reported"]["kv_tokens"]


def test_the_table_in_the_docs_is_that_of_the_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the table anew where it is not, and fails once."""
    rows = ["| model | GPUs, utilization, length | vLLM reported | planned | |", "|---|---|---|---|---|"]
    for log in LOGS.values():
        found, flags = planned(log, monkeypatch), log["flags"]
        where = f"{log['gpus']} × {log['gpu']}, {flags['gpu_memory_utilization']:.2f}, {flags['max_model_len']:,}"
        said = ", ".join(UNITS[what].format(value) for what, value in log["reported"].items())
        counted = ", ".join(UNITS[what].format(found[what]) for what in log["reported"])
        shares = ", ".join(f"{100 * (found[what] / value - 1):+.1f} %" for what, value in log["reported"].items())
        shares += ", with one step under way" if "steps_under_way" in log else ""
        rows.append(f"| {log['model']} | {where} | {said} | {counted} | {log.get('reason', shares)} |")
    path = Path(ROOT / "docs" / "plan.md")
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{path} has no place for the table"
    written = before + BEGIN + "\n" + "\n".join(rows) + "\n\n" + END + after
    if written != text:
        path.write_text(written)
    assert written == text, "the table was not that of the logs; it is now"
