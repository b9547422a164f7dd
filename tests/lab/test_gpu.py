"""lab/gpu without GPUs: what the planner makes of its shapes, its report, and one run over simulated replicas."""

import json
import math
import os
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.bench.peers import OURS, PEERS
from lab.gpu import engines, fair, measure, plans, report, turns
from lab.gpu import run as runs
from lab.gpu.engines import SHAPES, config_of
from lab.gpu.plans import Layout
from lab.gpu.run import Run
from lab.report import DOCS
from lab.sim.load import Outcome
from planner.config import read_model
from planner.machine import Link, Machine, load_machine
from stack.shell import ROOT
from tests.lab import stand_in

RESULTS = {path.stem: json.loads(path.read_text()) for path in sorted(DOCS.glob("gpus-*.json"))}


def machine(gpus: int) -> Machine:
    """So many H200."""
    known = load_machine(ROOT / "tests" / "machines" / "two-h200.json")
    every = tuple(known.gpus[0].model_copy(update={"index": n, "id": str(n)}) for n in range(gpus))
    links = tuple(Link(a=a, b=b, kind="nvlink", gb_s=450) for a, b in combinations(range(gpus), 2))
    return known.model_copy(update={"gpus": every, "links": links})


@pytest.mark.parametrize("shape", SHAPES)
def test_the_planner_knows_every_key_of_each_shape(shape: str) -> None:
    assert read_model(config_of(shape), shape).parameters > 1e9


@pytest.mark.parametrize("shape", turns.SHAPES)
def test_a_llamas_checkpoint_has_all_of_its_parameters(shape: str) -> None:
    config = config_of(shape)
    written = sum(map(math.prod, engines.llama_weights(config).values()))
    # the planner leaves out the last norm
    assert written - config["hidden_size"] == read_model(config, shape).parameters


@pytest.mark.parametrize("shape", measure.FAMILIES)
def test_each_family_fits_one_gpu(shape: str) -> None:
    assert plans.account(machine(2), shape).max_requests > 1


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_each_goals_plan_is_measured_in_the_first_three_rounds(gpus: int) -> None:
    rounds = plans.rounds(plans.by_worth(machine(gpus), measure.LAYOUT_SHAPES), gpus)
    first = [layout for one in rounds[:3] for layout in one]
    for shape in measure.LAYOUT_SHAPES:
        assert all(plans.listed(machine(gpus), shape, goal)[0] in first for goal in plans.GOALS)


layouts = st.builds(
    Layout, st.sampled_from(["a", "b"]), st.text(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.just(1)
)


@given(st.lists(layouts, unique=True))
def test_rounds_hold_each_layout_once_and_no_more_than_there_are_gpus(found: list[Layout]) -> None:
    rounds = plans.rounds(found, 8)
    assert sorted(map(repr, (layout for one in rounds for layout in one))) == sorted(map(repr, found))
    assert all(0 < sum(layout.gpus for layout in one) <= 8 for one in rounds)


def far(text: str) -> set[tuple[str, str]]:
    """The predictions in the tables of a report that it marks with (!), by their row and what they predict."""
    found, head = set(), [""]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "weights GiB" in cells:
            head = cells
        elif line.startswith("|"):
            found |= {(cells[0], head[at - 2]) for at, cell in enumerate(cells) if cell.endswith("(!)")}
    return found


def test_predictions_are_within_eight_percent_of_what_was_measured_or_there_is_a_reason() -> None:
    assert RESULTS
    assert set().union(*(far(report.section(one)) for one in RESULTS.values())) == report.REASONS.keys()


def test_a_prediction_that_is_off_is_found_in_the_report() -> None:
    found = json.loads(json.dumps(RESULTS["gpus-4-cores-64"]))
    found["layouts"]["Llama-70B"]["1 × tp 4"]["memory"]["kv_tokens"] *= 0.9
    assert far(report.section(found)) - report.REASONS.keys() == {("Llama-70B, 1 × tp 4", "KV tokens")}


def test_each_plan_was_the_best_that_was_measured() -> None:
    for one in RESULTS.values():
        assert "% worse" not in report.section(one)
        assert "not measured" not in report.section(one)


def test_calls_on_one_machine_are_one_part_of_the_report() -> None:
    call = {
        "date": "a",
        "machine": {"gpus": [1, 2], "cpu_cores": 8, "memory_free": 1},
        "versions": {},
        "seconds": {"families": 1},
    }
    other = call | {"date": "b", "seconds": {"layouts": 2}, "failures": {"x": "y"}}
    more_gpus = call | {"machine": {"gpus": [1, 2, 3], "cpu_cores": 8}}
    more_cores = call | {"machine": {"gpus": [1, 2], "cpu_cores": 16}}
    one, two, three = report.joined([call, more_gpus, more_cores, other])
    assert one["dates"] == ["a", "b"]
    assert one["seconds"] == {"families": 1, "layouts": 2}
    assert one["failures"] == {"x": "y"}
    assert two["dates"] == three["dates"] == ["a"]
    with pytest.raises(ValueError, match="families"):
        report.joined([call, call])
    with pytest.raises(ValueError, match="versions"):
        report.joined([call, other | {"versions": {"vllm": "0.32.0"}}])


def test_the_memory_of_unequal_stages_is_that_of_the_one_with_the_least_left() -> None:
    found = engines.parse_log(stand_in.LOG)
    assert (found["weights"], found["kv"], found["kv_tokens"]) == (16.5, 110.79, 920144)


def answered(*times: tuple[float, float], why: str = "") -> list[Outcome]:
    """Requests sent at 0 whose first and last tokens came then; cut for that reason, where there is one."""
    return [Outcome(0.0, first=first, last=last, ended=last, done=not why, why=why) for first, last in times]


def test_a_turn_lasts_from_a_models_first_token_to_its_last() -> None:
    ours, theirs = answered((1, 3), (2, 4), (30, 31)), answered((8, 20), (9, 12))
    found = turns.told({"a": ours, "b": [*theirs, Outcome(0.0, ended=50.0, why="asleep")]})
    assert found == {
        "answers": {"a": 3, "b": 2}, "lost": 1, "why": ["asleep"],
        "turns": ["a", "b", "a"], "longest_s": 50, "between_s": [4, 10],
    }  # fmt: skip


def test_models_that_are_awake_at_once_show_as_turns_that_overlap() -> None:
    assert turns.told({"a": answered((1, 3), (4, 6)), "b": answered((2, 5))})["between_s"] == [-1, -1]


def taken(answers: dict[str, str | None], lost: int = 0) -> dict[str, Any]:
    """The results of a level, by the answer of each wake."""
    wakes = {
        when: {"reason": "wake", "wake_s": 1.25, "awake_s": 0.02, "answer": answer,
                 "lost": [] if answer else ["it could not wake"]}
        for when, answer in answers.items()
    }  # fmt: skip
    load = turns.told({"a": answered((1, 3)), "b": [*answered((8, 9)), *answered((8, 9), why="reset")[:lost]]})
    return {"start": {"a": {"s": 12.0, "gib": 1.5}}, "wakes": {"a": wakes}, "load": {"seconds": 45.0, **load}}


def test_the_report_marks_wrong_answers_and_lost_requests() -> None:
    good = taken({turns.FIRST: "bagebagekilo", turns.LAST: "bagebagekilo"})
    found = {"weights": {"a": 2.5}, "level 1": good, "level 2": good}
    text = turns.report(found)
    assert text.count("| 2.5 | 12 | 1.50 | 1.25 1.25 | 20 20 | 2 of 2 | 2 |") == 2
    assert text.count("| 45 | 1 + 1 | 0 | 2 | 8.0 | 5.0 |") == 2
    assert "(!)" not in text
    # right at level 1, and the same wrong weights at each wake of level 2
    text = turns.report(found | {"level 2": taken({turns.FIRST: "mumumumumumu", turns.LAST: None}, lost=1)})
    assert "| 0 of 2 (!) |" in text
    assert "(!) level 2, a, last wake: it could not wake" in text
    assert "| 1 + 1 | 1 (!) |" in text
    assert "(!) level 2, both at once: reset" in text
    overlap = {**good["load"], "between_s": [-1.0]}
    assert "(!) level 1: both models were awake at once" in turns.report(found | {"level 1": {**good, "load": overlap}})
    # one that was cut off
    assert "2 of 2" in turns.report({"weights": {"a": 2.5}, "level 2": {"start": {}}, "level 1": good})


def test_what_there_is_no_number_for_is_null() -> None:
    found = runs.strict({"full": {"requests": 0, "ttft_p50": float("nan")}, "used": [1.5]})
    assert found == {"full": {"requests": 0, "ttft_p50": None}, "used": [1.5]}
    assert not any("nan" in report.section(one).lower() for one in RESULTS.values())


def test_the_report_is_that_of_the_results_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "REPORT", tmp_path / "gpu.md")
    report.write()
    assert (tmp_path / "gpu.md").read_text() == (DOCS / "gpu.md").read_text(), "write it: python -m lab.gpu report"


# ---- one run


@pytest.fixture
def nginx(request: pytest.FixtureRequest) -> None:
    """A binary where there is one, else the gateway's image."""
    if "NGINX" not in os.environ:
        request.getfixturevalue("gateway_image")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run over four simulated replicas, short."""
    monkeypatch.setattr(runs, "SENDERS", 1)
    monkeypatch.setattr(engines, "serve", stand_in.serve)
    monkeypatch.setattr(engines, "write_model", stand_in.write_model)
    monkeypatch.setattr(engines, "write_weights", stand_in.write_weights)
    monkeypatch.setattr(engines, "PRELOAD", [])
    monkeypatch.setattr(engines, "find_spec", lambda _: True)
    monkeypatch.setattr(engines, "used_memory", lambda gpus: [0 for _ in gpus])
    monkeypatch.setattr(runs, "Engine", stand_in.StandIn)
    for name, value in {
        "PER_GPU": 8,
        "ROUTE_SECONDS": 1.0,
        "LAYOUT_SECONDS": 1.0,
        "TRACE_SECONDS": 6.0,
        "FAULT_CLIENTS": 8,
        "FAULT_SECONDS": 3.0,
        "COMPARED": {OURS: PEERS[OURS]},
        "LAYOUT_SHAPES": ("Llama-70B",),
    }.items():
        monkeypatch.setattr(measure, name, value)
    for name, value in {"CLIENTS": 8, "SECONDS": 1.5, "SETTLE": 0.5, "STEPS": (2048,)}.items():
        monkeypatch.setattr(fair, name, value)
    monkeypatch.setattr(turns, "LEVELS", {level: turns.Level(3, 60) for level in turns.LEVELS})
    found = Run(machine(4), tmp_path / "out", tmp_path / "work", 300)
    yield found
    found.close()


@pytest.mark.usefixtures("nginx")
def test_a_run_measures_all_and_goes_on_where_an_engine_does_not_start(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "FAMILIES", ("Gemma-4-E4B", "gpt-oss-20B"))
    first = plans.by_worth(machine(4), measure.LAYOUT_SHAPES)[:4]
    monkeypatch.setattr(plans, "by_worth", lambda *_: first)
    started = run.engine

    def engine(shape: str, gpus: Any, *extra: str, **settings: str) -> Any:
        found = started(shape, gpus, *extra, **settings)
        if shape == "gpt-oss-20B" or settings.get("PIPELINE_PARALLEL_SIZE") == "4":
            found.kill()
        return found

    monkeypatch.setattr(run, "engine", engine)
    for name, (needs, step) in measure.PARTS.items():
        run.part(name, needs, partial(step, run))
    found = json.loads(run.path.read_text())
    assert found["families"]["Gemma-4-E4B"]["answered"] == 16
    assert found["families"]["Gemma-4-E4B"]["kv_tokens"] == 920144
    assert found["failures"].keys() == {"gpt-oss-20B", "Llama-70B 1 × tp 1 × pp 4"}
    assert "ended" in found["failures"]["gpt-oss-20B"]

    assert len(found["route"]["throughput"]) == 4
    assert all(cell["tokens_per_s"] > 0 and not cell["lost"] for cell in found["route"]["throughput"].values())
    assert all(cell["cores"] > 0 for name, cell in found["route"]["throughput"].items() if "gateway" in name)
    assert all(cell["requests"] > 10 and not cell["lost"] for cell in found["route"]["trace"].values())
    fault = found["route"]["fault"]
    assert fault["replicas killed"] == 2
    assert fault["not begun and failed"] == 0 < fault["complete"]
    assert fault["complete"] + fault["streams cut"] == fault["requests"]

    assert found["layouts"]["Llama-70B"].keys() == {one.name for one in first} - {"1 × tp 1 × pp 4"}
    assert all(one["full"]["tokens_per_s"] > 0 for one in found["layouts"]["Llama-70B"].values())

    phases = found["fair"]["2048"]
    assert phases.keys() == {fair.ALONE, fair.IN_TURN, fair.SHARED}
    assert all(
        waits["requests"] > 1 and not waits["lost"] for one in phases.values() for waits in one["waits"].values()
    )
    assert phases[fair.SHARED]["flood"]["requests"] > 8
    assert len(found["sleep"]) == 5

    for level in ("level 1", "level 2"):
        for wakes in (said := found["turns"][level])["wakes"].values():
            assert [(one["reason"], one["lost"]) for one in wakes.values()] == [("wake", [])] * 2
            assert len({one["answer"] for one in wakes.values()}) == 1
        assert said["wakes"].keys() == said["start"].keys() == set(turns.SHAPES)
        assert all(said["load"]["answers"].values())
        assert not said["load"]["lost"]
        assert sorted(said["load"]["turns"]) == sorted(turns.SHAPES)
        assert all(between > 0 for between in said["load"]["between_s"])

    text = report.section({**found, "date": "2026-01-01 00:00", "machine": run.machine.model_dump(mode="json")})
    assert "1 × tp 1 × pp 4: not measured" in text
    assert "4 behind the gateway give" in text
    assert "| 2,048 in a step, 512 in |" in text
    assert "| level 2, 2 |" in text
    assert "| level 2, Llama-3B |" in text
    assert "(!)" not in text.partition("### Models that take turns")[2]
    print(text)


def test_what_there_is_no_time_for_is_left_out_and_named(run: Run) -> None:
    run.end = 0
    run.part("families", 60, lambda: measure.measure_families(run))
    assert run.results == {"failures": {"families": "left out: the time was over"}}
    assert not run.started
