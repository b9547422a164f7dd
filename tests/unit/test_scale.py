"""`make up ARGS='--replicas N'`: what it writes, what it refuses, and what Compose and the gateway make of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack import scale
from stack.compose import REPLICAS_FILE, Compose, Config, Service, running_files
from stack.console import Problem
from stack.gateway import Replica
from stack.shell import ROOT
from tests.unit.test_compose import BASE, GPU, REPLICAS, compose, devices


def config_of(these: dict[str, Any], folder: Path | None = None, planned: Sequence[str] = ()) -> Config:
    """A stack of these services, whose gateway reads its fleet in a folder, planned for these replicas."""
    volumes = [{"source": str(folder), "target": "/etc/nginx/fleet"}, {"source": "/n", "target": "/etc/nginx"}]
    gateway = {"volumes": volumes} if folder else {}
    found = {"services": {"gateway": gateway, **these}, "x-pins": {}, "x-planned": services(planned)}
    return Config.model_validate(found)


def services(names: Sequence[str]) -> dict[str, Any]:
    """Services of these names of which nothing else is known."""
    return {name: {} for name in names}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scale, "ROOT", tmp_path)
    return tmp_path


def written(root: Path, *files: Path) -> dict[str, Any]:
    """What Compose makes of the file that was written, over others."""
    # it names docker-compose.yml as its neighbour
    there = ROOT / f"test-{os.getpid()}-{REPLICAS_FILE}"
    there.write_text((root / REPLICAS_FILE).read_text())
    try:
        found: dict[str, Any] = compose(*files, there)["services"]
    finally:
        there.unlink()
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_there_are_so_many_and_the_first_ones_stay_as_they_are(root: Path, count: int) -> None:
    """No other service changes by it, so Compose restarts nothing."""
    before = compose(BASE)
    scale.write(count, Config.model_validate(before), (), 0)
    if count == len(REPLICAS):
        assert not (root / REPLICAS_FILE).exists()
        return
    after = written(root, BASE)
    assert [name for name in after if name.startswith("vllm-")] == [f"vllm-{number}" for number in range(count)]
    for name in set(after) & set(before["services"]):
        assert after[name] == before["services"][name]
    for name in set(after) - set(before["services"]):
        assert after[name].pop("hostname") == f"{name}.fleet"
        assert after[name] == {key: value for key, value in after["vllm-0"].items() if key != "hostname"}


def test_on_gpus_each_further_one_has_a_gpu_that_is_free(root: Path) -> None:
    before = compose(BASE, GPU)
    scale.write(4, Config.model_validate(before), (), 4)
    after = written(root, BASE, GPU)
    assert [devices(after[f"vllm-{number}"])[0]["device_ids"] for number in range(4)] == [["0"], ["1"], ["2"], ["3"]]
    assert after["vllm-3"]["image"] == after["vllm-0"]["image"]
    assert Service.model_validate(after["vllm-3"]).on_gpus
    for name in REPLICAS:
        assert after[name] == before["services"][name]


def test_more_gpus_than_there_are_is_one_clear_line(root: Path) -> None:
    with pytest.raises(Problem) as problem:
        scale.write(4, Config.model_validate(compose(BASE, GPU)), (), 3)
    assert problem.value.what == "4 replicas need 4 GPUs, and this host has 3"
    assert problem.value.fix.startswith("ask for 3, or plan")
    assert not (root / REPLICAS_FILE).exists()


def test_a_planned_fleet_has_no_more_than_was_planned(root: Path) -> None:
    config = config_of(services(REPLICAS), planned=REPLICAS)
    with pytest.raises(Problem, match="the fleet is planned for 2 replicas, not 3"):
        scale.write(3, config, (), 8)
    scale.write(1, config, (), 8)
    assert "vllm-1: !reset null" in (root / REPLICAS_FILE).read_text()


def test_a_plan_for_more_is_not_held_against_what_is_left_out() -> None:
    config = config_of(services(["vllm-0"]), planned=REPLICAS)
    assert set(config.planned) == {"vllm-0"}


def test_the_file_comes_last_and_is_the_stacks_again_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPOSE_FILE", raising=False)
    monkeypatch.setattr("stack.settings.value_of", lambda _: None)
    monkeypatch.setattr("stack.compose.OVERRIDE", ROOT / "docker-compose.yml")  # one that is there
    files = Compose(REPLICAS_FILE, "docker-compose.gpu.yml").files
    assert files == ["docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.yml", REPLICAS_FILE]
    labels = f"{ROOT}/docker-compose.yml,{ROOT}/{REPLICAS_FILE}"
    monkeypatch.setattr("stack.compose.running", lambda _: labels)
    monkeypatch.setattr("stack.compose.ROOT", tmp_path)
    (tmp_path / REPLICAS_FILE).touch()
    assert running_files() == [REPLICAS_FILE]


def test_the_gateway_is_told_of_those_that_came_and_those_that_went(tmp_path: Path) -> None:
    own = ["vllm-0", "vllm-1"]
    scale.lay_out_fleet(config_of(services(["vllm-0", "vllm-1", "vllm-2", "vllm-10"]), tmp_path), own)
    lines = (tmp_path / "replicas.conf").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["vllm-2", "vllm-10"]
    assert "server vllm-2:8000 resolve;" in lines[0]
    assert not (tmp_path / "left-out").exists()
    scale.lay_out_fleet(config_of({"vllm-0": {}}, tmp_path), own)
    assert not (tmp_path / "replicas.conf").exists()
    assert (tmp_path / "left-out").read_text() == "vllm-1\n"
    scale.lay_out_fleet(config_of(services(own), tmp_path), own)
    assert list(tmp_path.iterdir()) == []


def test_what_is_right_already_is_not_touched(tmp_path: Path) -> None:
    """A file that is written anew would make the gateway read all of them again."""
    config = config_of(services(["vllm-0", "vllm-1", "vllm-2"]), tmp_path)
    scale.lay_out_fleet(config, ["vllm-0", "vllm-1"])
    before = (tmp_path / "replicas.conf").stat()
    scale.lay_out_fleet(config, ["vllm-0", "vllm-1"])
    assert (tmp_path / "replicas.conf").stat() == before


@given(st.integers(1, 60), st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 30)))
def test_names_are_as_many_as_asked_for_and_nobody_elses(wanted: int, own: set[int], taken: set[int]) -> None:
    mine, others = [f"vllm-{number}" for number in own], {f"vllm-{number}" for number in taken - own}
    found = scale.names(wanted, mine, others)
    assert len(found) == len(set(found)) == wanted
    assert not set(found) & others
    # those that the files have come first
    assert set(mine) <= set(found) or set(found) <= set(mine)


class Door:
    """A gateway whose replicas get empty after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks, self.said = looks, list[str]()

    def drain(self, name: str) -> None:
        self.said.append(f"drain {name}")

    def undrain(self, name: str) -> None:
        self.said.append(f"undrain {name}")

    def replica(self, name: str) -> Replica:
        self.looks -= 1
        return Replica(name=name, state="draining", in_flight=max(0, self.looks))


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        (3, ["drain vllm-2", "drain vllm-3"]),
        (10_000, ["drain vllm-2", "drain vllm-3", "undrain vllm-2", "undrain vllm-3"]),
    ],
)
def test_surplus_is_drained_or_all_stays_as_it_was(looks: int, said: Sequence[str]) -> None:
    door = Door(looks)
    shown = StepDouble()
    if looks < 100:
        scale.drain(door, ["vllm-2", "vllm-3"], 5, shown)  # type: ignore[arg-type]
    else:
        with pytest.raises(Problem, match="still had requests after 1 s, and nothing was changed"):
            scale.drain(door, ["vllm-2", "vllm-3"], 1, shown)  # type: ignore[arg-type]
    assert door.said == said


class StepDouble:
    """Takes what a step says."""

    def say(self, text: str) -> None:
        assert text
