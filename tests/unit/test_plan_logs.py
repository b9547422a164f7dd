"""The account against what vLLM says itself; docs/plan.md has the tables of it.

tests/logs: what it reported in public logs. A log's model, or its `shape` where another has the same, is a folder of
tests/models or one of tests/families.jsonl; its config is laid over that. `kv_gib` is its KV cache where not all flags
are known. Sizes are GiB, of one GPU.

tests/families.jsonl: a config of each family, and the bytes that its class in vLLM 0.32 takes in bfloat16, made on
torch's device "meta", where weights have no memory: those of all weights, and of what a request of `length` tokens
keeps at most, two steps of 8,192 tokens under way; `_of_4` on each of four GPUs. Without `request` the class is that of
transformers 5.19, because vLLM's needs a GPU, or it keeps nothing. Without either the planner only has to read it."""

import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner import memory
from planner.config import read_model
from planner.machine import GIB, Gpu
from planner.memory import Settings
from stack.console import Problem
from stack.shell import ROOT

FAMILIES = [json.loads(line) for line in (ROOT / "tests" / "families.jsonl").read_text().splitlines()]
PLANNED = {one["name"]: one for one in FAMILIES if not one.get("refused")}
REFUSED = {one["name"]: one["config"] for one in FAMILIES if one.get("refused")}
LOGS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "tests" / "logs").glob("*.json"))}
CLOSE = 0.08
BEGIN, END = "<!-- {} written by tests/unit/test_plan_logs.py -->\n", "<!-- end of {} -->\n"
HUGE = Gpu(
    index=0,
    id="0",
    name="of any size",
    total=4000 * GIB,
    free=4000 * GIB,
    compute_capability=(9, 0),
    bandwidth_gb_s=1000,
    bf16_tflops=100,
)
UNITS = {
    "weights_gib": "weights {:,.2f} GiB",
    "kv_gib": "KV {:,.2f} GiB",
    "kv_tokens": "{:,} tokens",
    "request_gib": "a request {:,.2f} GiB",
}


def planned(log: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The account of a log's replica, under the names that it reports."""
    shape = log.get("shape", log["model"])
    path = ROOT / "tests" / "models" / shape / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else PLANNED.get(shape, {}).get("config", {})
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
    settings = replace(settings, kv_bytes=1 if flags.get("kv_cache_dtype") else 2, eager=flags.get("eager", False))
    account = memory.account(model, gpu, tp, 1, length, settings)
    tokens, kv = account.kv_tokens, account.kv
    # a log before asynchronous scheduling has a window keep the tokens of one step, not of two
    one = memory.request_bytes(model, tp, model.layers, length, settings, log.get("steps_under_way", 2) - 1)
    if "kv_gib" in log:
        kv = round(log["kv_gib"] * GIB)
    if "kv_gib" in log or "steps_under_way" in log:
        tokens = int(kv / one * length)
    return {
        "weights_gib": account.weights / GIB,
        "kv_gib": kv / GIB,
        "kv_tokens": tokens,
        "request_gib": one / GIB,
    }


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


def test_there_are_logs_of_many_models() -> None:
    assert len(LOGS) >= 20
    assert len({log["model"] for log in LOGS.values()}) >= 18


@pytest.mark.parametrize("name", PLANNED)
def test_a_family_takes_what_its_class_takes(name: str) -> None:
    """A tower may be counted too large, never much too small."""
    family = PLANNED[name]
    model = read_model(family["config"], name)
    assert memory.holds(model, HUGE, 1, 1, 128, Settings(16, 2048)), "it can be planned"
    for tp, which in ((1, ""), (4, "_of_4")):
        if weights := family.get(f"weights{which}"):
            off = memory.weight_bytes(model, tp, 1, 0) / weights - 1
            assert -0.03 < off < (0.15 if model.tower else 0.025), f"{off:+.1%} over {tp}"
        if request := family.get(f"request{which}"):
            kept = memory.request_bytes(model, tp, model.layers, family["length"], Settings(256, 8192))
            assert kept == pytest.approx(request, rel=0.01), f"over {tp}"


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_sized_is_refused_by_what_it_has(name: str) -> None:
    with pytest.raises(Problem) as caught:
        read_model(REFUSED[name], "me/model")
    assert "me/model" in str(caught.value)
    assert "pin its GPUs" in caught.value.fix or "take" in caught.value.fix, "no mere lack of a key"


def written(which: str, rows: list[str]) -> None:
    """Writes a table anew into the docs where it is not that, and fails once."""
    path, begin, end = Path(ROOT / "docs" / "plan.md"), BEGIN.format(which), END.format(which)
    text = path.read_text()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{path} has no place for the table of {which}"
    anew = before + begin + "\n" + "\n".join(rows) + "\n\n" + end + after
    if anew != text:
        path.write_text(anew)
    assert anew == text, f"the table of {which} was not that; it is now"


def test_the_table_of_families_in_the_docs_is_that_of_the_tests() -> None:
    rows = ["| model | its class | weights | KV cache of a request | logs |", "|---|---|---|---|---|"]
    for name, family in PLANNED.items():
        model = read_model(family["config"], name)
        weights, kept = "", "none" if "weights" in family and not model.attention.cached else ""
        if "weights" in family:
            weights = f"{100 * (memory.weight_bytes(model, 1, 1, 0) / family['weights'] - 1):+.1f} %"
        if "request" in family:
            one = memory.request_bytes(model, 1, model.layers, family["length"], Settings(256, 8192))
            kept = f"{100 * (one / family['request'] - 1):+.1f} %"
        logs = sum(log.get("shape", log["model"]) == name for log in LOGS.values())
        rows.append(f"| {name} | {family['config']['architectures'][0]} | {weights} | {kept} | {logs or ''} |")
    rows = [row.replace("-0.0 %", "0.0 %").replace("+0.0 %", "0.0 %") for row in rows]
    written("families", rows)


def test_the_list_of_refused_families_in_the_docs_is_that_of_the_tests() -> None:
    written("refused", textwrap.wrap("Refused: " + ", ".join(REFUSED) + ".", 120))


def test_the_table_of_logs_in_the_docs_is_that_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["| model | GPUs, utilization, length | vLLM reported | planned | |", "|---|---|---|---|---|"]
    for log in LOGS.values():
        found, flags = planned(log, monkeypatch), log["flags"]
        where = f"{log['gpus']} × {log['gpu']}"
        if "kv_gib" not in log and {"kv_gib", "kv_tokens"} & set(log["reported"]):
            where += f", {flags['gpu_memory_utilization']:.2f}"
        if set(log["reported"]) != {"weights_gib"}:
            where += f", {flags['max_model_len']:,}"
        said = ", ".join(UNITS[what].format(value) for what, value in log["reported"].items())
        counted = ", ".join(UNITS[what].format(found[what]) for what in log["reported"])
        shares = ", ".join(f"{100 * (found[what] / value - 1):+.1f} %" for what, value in log["reported"].items())
        shares += ", with one step under way" if "steps_under_way" in log else ""
        shares += f", of {log['kv_gib']} GiB" if "kv_gib" in log else ""
        rows.append(f"| {log['model']} | {where} | {said} | {counted} | {log.get('reason', shares)} |")
    written("logs", rows)
