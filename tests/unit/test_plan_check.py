"""The running fleet beside its plan: what vLLM says of itself, and what `make plan ARGS=--check` makes of it."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import plan as command
from planner import memory, render
from planner.check import CLOSE, Compared, Sizes, reported
from planner.choose import Wish
from planner.machine import GIB, load_machine
from stack import settings
from stack.shell import ROOT

MODELS, MACHINES = ROOT / "tests" / "models", ROOT / "tests" / "machines"
# Two workers of vLLM 0.26: the first has less room.
V026 = """\
(Worker_TP0 pid=311) INFO 11-22 21:43:02 [default_loader.py:397] Loading weights took 3.82 seconds
(Worker_TP0 pid=311) INFO 11-22 21:43:03 [gpu_model_runner.py:4879] Model loading took 7.49 GiB memory and 4.07 seconds
(Worker_TP1 pid=312) INFO 11-22 21:43:03 [gpu_model_runner.py:4879] Model loading took 7.51 GiB memory and 4.11 seconds
(Worker_TP0 pid=311) INFO 11-22 21:43:31 [gpu_worker.py:462] Available KV cache memory: 120.34 GiB
(Worker_TP1 pid=312) INFO 11-22 21:43:31 [gpu_worker.py:462] Available KV cache memory: 120.41 GiB
(EngineCore pid=290) INFO 11-22 21:43:31 [kv_cache_utils.py:1710] GPU KV cache size: 1,971,776 tokens
(EngineCore pid=290) INFO 11-22 21:43:31 [kv_cache_utils.py:1711] Maximum concurrency for 8,192 tokens per \
request: 240.70x
INFO:     Application startup complete.
"""
V032 = """\
launch: vllm serve /models/meta-llama/Llama-3.1-8B-Instruct --host 0.0.0.0 --port 8000 --max-model-len auto
(EngineCore pid=45) INFO 11-29 22:52:59 [model_runner.py:425] Model loading took 14.99 GiB memory and 4.074018 seconds
(EngineCore pid=45) INFO 11-29 22:53:20 [gpu_worker.py:760] Available KV cache memory: 108.31 GiB
(EngineCore pid=45) INFO 11-29 22:53:20 [kv_cache_utils.py:2468] Auto-fit max_model_len: full model context length \
131072 fits in available KV cache memory (108.3 GiB GPU)
(EngineCore pid=45) INFO 11-29 22:53:20 [kv_cache_utils.py:2327] GPU KV cache size: 887,264 tokens, \
Maximum concurrency for 131,072 tokens per request: 6.77x
INFO:     Application startup complete.
"""
V032_CPU = """\
(Worker pid=61) INFO 11-29 22:52:58 [default_loader.py:501] Loading weights took 0.84 seconds
(Worker pid=61) INFO 11-29 22:52:59 [cpu_worker.py:260] Explicitly set (1.0/6.0) GiB for KV cache on node 0.
(EngineCore pid=45) INFO 11-29 22:52:59 [kv_cache_utils.py:2327] CPU KV cache size: 46,592 tokens, \
Maximum concurrency for 4,096 tokens per request: 11.38x
INFO:     Application startup complete.
"""
# What did not fit was shortened; recorded, without times.
FITTED_CPU = """\
INFO [model.py:2152] Using max model len 8192
INFO [cpu_worker.py:260] Explicitly set (0.1/21.09) GiB for KV cache on node 0.
INFO [kv_cache_utils.py:2477] Auto-fit max_model_len: reduced from 8192 to 4352 to fit in available KV cache memory \
(0.09 GiB CPU)
INFO [kv_cache_utils.py:2327] CPU KV cache size: 4,480 tokens, Maximum concurrency for 4,352 tokens per request: 1.03x
"""
AUTO_CPU = "INFO [cpu_worker.py:260] Auto set (3.25/24.0) GiB for KV cache on node 0, with 22.08 GiB requested memory"
GIVEN_GPU = (
    "INFO [gpu_worker.py:672] Initial free memory 78.6 GiB, reserved 20.0 GiB memory for KV Cache as specified by"
)
NOTHING_LEFT = "INFO [gpu_worker.py:760] Available KV cache memory: -1.44 GiB"
METRICS = """\
vllm:cache_config_info{block_size="128",engine="0",kv_cache_max_concurrency="11.375",kv_cache_memory_bytes="1073741824",\
kv_cache_size_tokens="46592",num_gpu_blocks="364"} 1.0
"""
CARDS = '{"object":"list","data":[{"id":"m","max_model_len":4096},{"id":"adapter","max_model_len":null}]}'


@pytest.mark.parametrize(
    ("log", "metrics", "weights", "kv", "tokens"),
    [
        (V026, "", 7.51, 120.34, 1_971_776),
        (V032, "", 14.99, 108.31, 887_264),
        (V032_CPU, "", None, 1, 46_592),
        (FITTED_CPU, "", None, 0.1, 4480),
        ("", METRICS, None, None, 46_592),
        (V032, METRICS, 14.99, 108.31, 46_592),
        (AUTO_CPU, 'vllm:cache_config_info{kv_cache_size_tokens="None"} 1.0', None, 3.25, None),
        (GIVEN_GPU, "", None, 20, None),
        (NOTHING_LEFT, "", None, -1.44, None),
        ("", "", None, None, None),
    ],
    ids=[
        "0.26",
        "0.32",
        "0.32 on a CPU",
        "auto",
        "log is gone",
        "metrics first",
        "CPU, auto",
        "GPU, given",
        "-",
        "nothing",
    ],
)
def test_an_engine_says_what_it_has(
    log: str, metrics: str, weights: float | None, kv: float | None, tokens: int | None
) -> None:
    found = reported(log, metrics, CARDS)
    assert found.weights == (weights and round(weights * GIB))
    assert found.kv == (kv and round(kv * GIB))
    assert (found.kv_tokens, found.max_model_len) == (tokens, 4096)


def test_it_is_far_beyond_eight_percent_and_a_longer_request_never() -> None:
    planned = Sizes(weights=1000, kv=1000, kv_tokens=1000, max_model_len=1000)

    def far(**now: int) -> set[str]:
        return set(Compared("vllm-0", planned, Sizes(**now)).far())

    near, beyond = round(1000 * CLOSE), round(1000 * CLOSE) + 1
    assert far(weights=1000 + near, kv=1000 - near, kv_tokens=1000 - near, max_model_len=1000 - near) == set()
    assert far(weights=1000 + beyond, kv=1000 - beyond, kv_tokens=0) == {"weights", "kv", "kv_tokens"}
    assert far(max_model_len=1000 - beyond) == {"max_model_len"}
    assert far(max_model_len=5000) == set()
    assert not Compared("vllm-0", Sizes(), Sizes(kv=1)).far(), "an embedding model keeps nothing"


def test_a_warm_start_has_the_room_that_a_cold_one_compiles_in() -> None:
    """As in tests/logs: Qwen3-8B on a 4090."""
    planned = Sizes(kv=5 * GIB, kv_warm=round(5.9 * GIB), kv_tokens=36_640)
    for tokens, far in ((35_792, set()), (43_040, set()), (52_000, {"kv_tokens"}), (33_000, {"kv_tokens"})):
        assert set(Compared("vllm-0", planned, Sizes(kv_tokens=tokens)).far()) == far


def test_a_plan_for_a_small_gpu_knows_what_a_warm_start_has() -> None:
    host = load_machine(MACHINES / "one-24gb.json")
    part = command.plan_all(host, str(MODELS / "Llama-3.1-8B-Instruct"), [], None, Wish())[0]
    sizes = render.planned_sizes(part, part.plan.replicas[0])
    assert sizes.kv
    assert sizes.kv_warm == sizes.kv + memory.COMPILING
    host = load_machine(MACHINES / "laptop.json")
    part = command.plan_all(host, str(MODELS / "SmolLM2-135M-Instruct"), [], None, Wish())[0]
    sizes = render.planned_sizes(part, part.plan.replicas[0])
    assert sizes.kv == sizes.kv_warm, "the CPU is told its size"
    assert sizes.weights is None


def planned_sizes() -> dict[str, Any]:
    """Of two replicas, one on each H200."""
    host = load_machine(MACHINES / "two-h200.json")
    parts = command.plan_all(host, str(MODELS / "Llama-3.1-8B-Instruct"), [], None, Wish())
    found = {f"vllm-{n}": render.planned_sizes(parts[0], one) for n, one in enumerate(parts[0].plan.replicas)}
    assert len(found) == 2
    return {name: sizes.model_dump() for name, sizes in found.items()}


class Fleet:
    """Two replicas as a `docker` that only recites has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.planned: dict[str, Any] = planned_sizes()
        self.environment = {"MAX_MODEL_LEN": "auto", "MODEL": "m", "QUANTIZATION": None, "EXTRA_ARGS": "--seed=$$1"}
        self.started_with = ["MAX_MODEL_LEN=auto", "MODEL=m", "PATH=/bin", "EXTRA_ARGS=--seed=$1"]
        self.logs = {"vllm-0": V032, "vllm-1": V032}
        self.states = {"vllm-0": "running", "vllm-1": "running"}
        self.answering = {"vllm-0", "vllm-1"}

    def check(self, *options: str) -> Result:
        """`plan.py --check` beside it."""
        config = {
            "services": {name: {"image": "replica", "environment": self.environment} for name in self.logs},
            "x-pins": {},
            **({"x-planned": self.planned} if self.planned else {}),
        }
        rows = [
            {"ID": f"id-{name}", "Service": name, "State": state, "Health": "healthy", "Status": "Up"}
            for name, state in self.states.items()
        ]
        card = json.dumps({"data": [{"id": "m", "max_model_len": 131072}]})
        answers = {
            "version *": "28.0",
            "compose *config *": json.dumps(config),
            "compose *ps *": "\n".join(map(json.dumps, rows)),
            "inspect *Env* *": json.dumps(self.started_with),
            "inspect *StartedAt* *": "2026-11-29T22:52:30Z",
            **{f"logs * id-{name}": log for name, log in self.logs.items()},
            **{f"compose *exec *http://{name}:8000/v1/models": card for name in self.answering},
        }
        cases = []
        for number, (pattern, answer) in enumerate(answers.items()):
            file = self.folder / f"{number}.txt"
            file.write_text(answer + "\n")
            words = "*".join(shlex.quote(piece) if piece else "" for piece in pattern.split("*"))
            cases.append(f"{words}) cat {file};;")
        docker = self.folder / "docker"
        docker.write_text(
            '#!/bin/sh\ncase "$1 - $*" in\n'.replace('"$1 - $*"', '"$*"')
            + "\n".join(cases).replace("compose *", "compose *")
            + "\n*' exec '*) exit 22;;\nesac\n"
        )
        docker.chmod(0o755)
        app = typer.Typer()
        app.command()(command.main)
        return CliRunner().invoke(app, ["--check", *options])


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(settings, "read", lambda *_: {})
    monkeypatch.setattr(settings, "load", lambda: settings.check({"HTTP_PORT": "9"}))
    return Fleet(tmp_path)


def said(result: Result) -> str:
    """All that was printed, on one line."""
    return " ".join(result.output.split())


def test_a_fleet_as_planned_is_shown_beside_its_plan(fleet: Fleet) -> None:
    result = fleet.check()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == ["replica", "vllm-0", "planned", "vllm-1", "planned"]
    assert all(words in lines[1] for words in ("15.0 GiB", "108.3 GiB", "887,264", "131,072 +0.0 %"))
    assert "apart" not in result.output


def test_a_figure_that_is_far_off_is_named_and_the_rest_is_not(fleet: Fleet) -> None:
    fleet.logs["vllm-1"] = V032.replace("887,264", "487,264")
    result = fleet.check()
    assert result.exit_code == 0, "the fleet serves"
    assert "vllm-1: KV tokens 487,264, planned " in said(result)
    assert "vllm-0:" not in result.output
    assert "vllm-1: weights" not in result.output
    assert "More than 8% apart" in said(result)


def test_programs_get_both_in_bytes(fleet: Fleet) -> None:
    result = fleet.check("--json")
    first = json.loads(result.output)["replicas"][0]
    assert first["planned"] == fleet.planned["vllm-0"]
    assert first["reported"]["weights"] == round(14.99 * GIB)
    assert set(first["apart"]) == {"weights", "kv", "kv_tokens", "max_model_len"}
    assert first["settings"] == {"MAX_MODEL_LEN": "auto", "MODEL": "m", "EXTRA_ARGS": "--seed=$$1"}


def test_a_fleet_that_was_not_planned_says_so(fleet: Fleet) -> None:
    fleet.planned = {}
    result = fleet.check()
    assert result.exit_code == 0
    assert "nothing was planned for this fleet" in result.output
    assert "887,264" in result.output


def test_a_replica_that_still_loads_is_named_beside_the_other(fleet: Fleet) -> None:
    fleet.answering = {"vllm-0"}
    result = fleet.check()
    assert result.exit_code == 1
    assert "vllm-1 is unreachable" in said(result)
    assert "887,264" in result.output


def test_no_fleet_is_one_clear_line(fleet: Fleet) -> None:
    fleet.states = {"vllm-0": "exited"}
    result = fleet.check()
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 2, "what is wrong, and what to do"
    assert "no replica runs" in result.output


def test_a_plan_that_has_not_been_started_is_not_compared(fleet: Fleet) -> None:
    fleet.started_with[0] = "MAX_MODEL_LEN=4096"
    result = fleet.check()
    assert result.exit_code == 1
    assert "vllm-0 runs with another MAX_MODEL_LEN than the Compose files have now" in said(result)
    assert "`make up`" in result.output


def test_a_plan_that_a_person_broke_is_told(fleet: Fleet) -> None:
    fleet.planned["vllm-0"]["kv"] = "much"
    result = fleet.check()
    assert result.exit_code == 1
    assert "x-planned.vllm-0.kv" in result.output


@pytest.mark.parametrize(
    ("options", "words"), [(["some/model"], "not model"), (["--gpus", "0"], "not gpus"), (["--dry-run"], "not dry-run")]
)
def test_a_check_takes_nothing_else(fleet: Fleet, options: list[str], words: str) -> None:
    result = fleet.check(*options)
    assert result.exit_code == 1
    assert words in said(result)


def test_a_log_of_any_length_is_read_to_the_end_of_the_start_only(fleet: Fleet) -> None:
    fleet.logs["vllm-0"] += "(EngineCore pid=45) GPU KV cache size: 1 tokens\n" * 200_000
    assert "887,264" in fleet.check().output
