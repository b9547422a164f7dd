"""`make roll` finds out whom it may roll before it drains anyone, and leaves those be that nothing can stand in for."""

from __future__ import annotations

import time

import pytest

import roll
from stack.compose import Compose, Config, Container, Service
from stack.console import Problem
from stack.gateway import Gateway, Replica


class Fleet(Gateway):
    """A gateway over a fleet that is `name: model`; `drained` are those it was told to drain."""

    def __init__(self, served: dict[str, str], *, down: str = "", stopped: str = "") -> None:
        self.served, self.down, self.stopped_one = served, down, stopped
        self.drained: list[str] = []

    def replicas(self) -> list[Replica]:
        return [
            Replica(name=name, state=self.state(name), reason="", models=[model], in_flight=0)
            for name, model in self.served.items()
        ]

    def state(self, name: str) -> str:
        return "stopped" if name == self.stopped_one else "unreachable" if name == self.down else "ready"

    def drain(self, name: str) -> None:
        self.drained.append(name)

    def undrain(self, name: str) -> None:
        if name == self.down:
            self.down = ""


class Containers(Compose):
    """Containers that are well again as soon as they were made anew; `refused` is what the launcher says of them."""

    refused = ""

    def config(self) -> Config:
        services = {"vllm-0": Service(image="replica")}
        return Config.model_validate({"services": services, "x-pins": {}})

    def check_launch(self, _: Config, command: str) -> str:
        if self.refused:
            raise Problem(self.refused, command)
        return ""

    def ask(self, *_: str, timeout_s: float = 60) -> str:  # noqa: ARG002
        return ""

    def containers(self) -> dict[str, Container]:
        fields = {"ID": "1", "State": "running", "Health": "healthy", "Status": "Up"}
        return {f"vllm-{n}": Container.model_validate(fields | {"Service": f"vllm-{n}"}) for n in range(3)}


def run(monkeypatch: pytest.MonkeyPatch, fleet: Fleet, *names: str) -> int:
    """The exit status of `make roll` over this fleet."""
    monkeypatch.setattr(roll, "Gateway", lambda _: fleet)
    monkeypatch.setattr(roll, "Compose", Containers)
    monkeypatch.setattr(roll, "running_files", lambda: ["docker-compose.gpu.yml"])
    try:
        roll.roll(list(names), 1, 1)
    except SystemExit as end:
        return int(str(end.code))
    return 0


def heard(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said since the last time, to people and as an error."""
    return "".join(capsys.readouterr())


def test_all_are_rolled_in_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = Fleet({"vllm-0": "chat", "vllm-1": "chat"})
    assert run(monkeypatch, fleet) == 0
    assert fleet.drained == ["vllm-0", "vllm-1"]
    assert "rolled: vllm-0, vllm-1" in heard(capsys)


def test_what_the_autoscaler_has_stopped_is_made_anew_and_left_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(_: Containers, *words: str, timeout_s: float = 60) -> str:
        asked.append(words)
        return ""

    monkeypatch.setattr(Containers, "ask", ask)
    fleet = Fleet({"vllm-0": "chat", "vllm-1": "chat", "vllm-2": "chat"}, stopped="vllm-1")
    assert run(monkeypatch, fleet) == 0
    assert fleet.drained == ["vllm-0", "vllm-2"]
    assert ("up", "--no-start", "--force-recreate", "--no-deps", "vllm-1") in asked
    # where one alone runs, nothing could stand in for it
    alone = Fleet({"vllm-0": "chat", "vllm-1": "chat"}, stopped="vllm-1")
    assert run(monkeypatch, alone) == 1
    assert alone.drained == []
    assert "-f docker-compose.gpu.yml start vllm-1)" in heard(capsys)


def test_the_only_replica_of_a_model_is_left_as_it_is_and_the_others_are_rolled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = Fleet({"vllm-0": "chat", "vllm-1": "chat", "vllm-2": "bge-m3"})
    assert run(monkeypatch, fleet) == 0
    assert fleet.drained == ["vllm-0", "vllm-1"]
    said = heard(capsys)
    assert "vllm-2 is left as it is: it is the only replica of bge-m3" in said
    # with the files that it was started with
    assert "-f docker-compose.gpu.yml up --detach --force-recreate --no-deps vllm-2" in said


@pytest.mark.parametrize("names", [("vllm-0", "vllm-2"), ("vllm-2",)])
def test_one_that_was_named_is_refused_before_any_is_drained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    fleet = Fleet({"vllm-0": "chat", "vllm-1": "chat", "vllm-2": "bge-m3"})
    assert run(monkeypatch, fleet, *names) == 1
    assert fleet.drained == []
    assert "vllm-2 is the only replica of bge-m3" in heard(capsys)


def test_a_fleet_of_lone_replicas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet({"vllm-0": "chat", "vllm-1": "bge-m3"})
    assert run(monkeypatch, fleet) == 1
    assert fleet.drained == []


def test_one_whose_stand_in_is_down_is_refused_in_its_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = Fleet({"vllm-0": "chat", "vllm-1": "chat"}, down="vllm-1")
    assert run(monkeypatch, fleet) == 1
    assert "vllm-0 is the only ready replica of chat" in heard(capsys)
    down_first = Fleet({"vllm-0": "chat", "vllm-1": "chat"}, down="vllm-0")
    assert run(monkeypatch, down_first) == 0
    assert down_first.drained == ["vllm-0", "vllm-1"]


def test_a_replica_that_crashes_and_comes_back_for_ever_ends_the_roll(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = 0

    def containers(_: Compose) -> dict[str, Container]:
        nonlocal looks
        looks += 1
        fields = {"ID": "1", "Service": "vllm-0", "State": "running", "Health": "starting", "Status": "Up"}
        return {"vllm-0": Container.model_validate(fields | {"restarts": looks})}

    monkeypatch.setattr(Containers, "containers", containers)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert run(monkeypatch, Fleet({"vllm-0": "chat", "vllm-1": "chat"})) == 1
    assert "vllm-0 did not come back" in heard(capsys)


def test_settings_that_the_launcher_refuses_end_the_roll_before_any_is_drained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Containers, "refused", ".env: MAX_MODEL_LEN is 'abc'")
    fleet = Fleet({"vllm-0": "chat", "vllm-1": "chat"})
    assert run(monkeypatch, fleet) == 1
    assert fleet.drained == []
    assert "MAX_MODEL_LEN is 'abc'" in heard(capsys)


def test_a_gateway_that_fails_too_does_not_hide_why_the_roll_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(what: str) -> None:
        raise Problem(what, "mend it")

    monkeypatch.setattr(roll, "recreate", lambda *_: fail("vllm-0 did not come back"))
    monkeypatch.setattr(Fleet, "undrain", lambda *_: fail("no gateway"))
    assert run(monkeypatch, Fleet({"vllm-0": "chat", "vllm-1": "chat"})) == 1
    out, err = capsys.readouterr()
    assert "vllm-0 stays drained no gateway" in out
    assert "vllm-0 did not come back" in err


def test_one_that_ran_out_of_time_to_drain_is_put_back_into_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    put_back: list[str] = []
    monkeypatch.setattr(Fleet, "undrain", lambda _, name: put_back.append(name))
    monkeypatch.setattr(roll, "wait_for", lambda *_: False)
    assert run(monkeypatch, Fleet({"vllm-0": "chat", "vllm-1": "chat"})) == 1
    assert put_back == ["vllm-0"]
