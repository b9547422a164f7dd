"""The autoscaler's turn, over a gateway, a Prometheus and a switch that answer what a test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from autoscaler import settings, timetable
from autoscaler.decide import DOWN_S
from autoscaler.service import AGAIN_S, TURN_S, Autoscaler, Figures
from autoscaler.settings import Mistake, Settings
from autoscaler.state import KEPT, Store
from stack.shell import ROOT

NOW = 1_795_000_000.0


class World:
    """A fleet: the containers that run, what the gateway knows, and the load that Prometheus saw."""

    def __init__(self, folder: Path, replicas: int) -> None:
        self.folder = folder
        self.now = NOW
        self.running = {f"vllm-{number}": True for number in range(replicas)}
        self.states = dict.fromkeys(self.running, "ready")
        self.in_flight = dict.fromkeys(self.running, 0)
        self.load = {"waiting": 0.0, "running": 0.0, "kv": 0.0, "refusals": 0.0, "prompt": 0.0}
        self.models = 1
        self.away: set[str] = set()
        self.asked: list[str] = []

    def named(self) -> set[str]:
        """The names in the gateway's file."""
        return set(json.loads((self.folder / "stopped.json").read_text()))

    def follow(self) -> None:
        """The gateway reads the file."""
        for name, runs in self.running.items():
            if name in self.named():
                self.states[name] = "draining" if runs else "stopped"
            elif self.states[name] in ("draining", "stopped"):
                self.states[name] = "ready" if runs else "unreachable"

    def answer(self, request: httpx.Request) -> httpx.Response:
        host, path = request.url.host, request.url.path
        if host in self.away:
            raise httpx.ConnectError("refused", request=request)
        if host == "switch" and request.method == "GET":
            label = "com.docker.compose.service"
            rows = [{"Labels": {label: name}, "State": "running" if runs else "exited"}
                    for name, runs in self.running.items()]  # fmt: skip
            return httpx.Response(200, json=rows)
        if host == "switch":
            self.asked.append(path)
            _, verb, name = path.split("/")
            self.running[name] = verb == "start"
            return httpx.Response(204)
        if path == "/fleet":
            here = [{"targets": [], "labels": {"replica": name}} for name in self.states]
            return httpx.Response(200, json=[*here, {"targets": [], "labels": {"replica": "far-0", "host": "gpu-b"}}])
        if path == "/metrics":
            lines = []
            for name, state in self.states.items():
                lines += [f'gateway_replica_state{{replica="{name}",state="{one}"}} {int(one == state)}'
                          for one in ("ready", "loading", "draining", "stopped", "unreachable")]  # fmt: skip
                lines.append(f'gateway_requests_in_flight{{replica="{name}"}} {self.in_flight[name]}')
            return httpx.Response(200, text="\n".join(lines) + "\n")
        return httpx.Response(200, json={"data": {"result": self.query(request.url.params)}})

    def query(self, params: httpx.QueryParams) -> list[Any]:
        if "start" not in params:
            return [{"metric": {}, "value": [self.now, str(self.models)]}]
        name = next(name for name in self.load if name in params["query"])
        at = float(params["start"])
        moments = []
        while at <= float(params["end"]):
            moments.append([at, str(self.load[name])])
            at += float(params["step"])
        return [{"metric": {}, "values": moments}]


Turn = Callable[..., str]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 3)


def started(world: World, lines: list[str] | None = None, **changed: Any) -> tuple[Autoscaler, CollectorRegistry]:
    """An autoscaler that has just been started over what was kept."""
    wanted = Settings(**{"least": 1, "most": None, "entries": (), "zone": ZoneInfo("UTC"), "drain_s": 120.0} | changed)
    registry = CollectorRegistry()
    client = httpx.Client(transport=httpx.MockTransport(world.answer))
    said = lines if lines is not None else []
    return Autoscaler(wanted, client, Store(world.folder), Figures(registry), said.append, lambda: world.now), registry


def turns(autoscaler: Autoscaler, world: World, seconds: float) -> None:
    """So much time, turn by turn; the gateway reads the file after each."""
    for _ in range(int(seconds / TURN_S)):
        autoscaler.turn()
        world.follow()
        world.now += TURN_S


def test_an_idle_replica_is_drained_then_stopped_and_said_to_be(world: World) -> None:
    lines: list[str] = []
    autoscaler, registry = started(world, lines)
    world.in_flight["vllm-2"] = 1
    autoscaler.turn()
    # the idlest of the highest number goes out of the route, and nothing is stopped yet
    assert (world.named(), world.asked) == ({"vllm-1"}, [])
    world.in_flight["vllm-1"] = 2
    world.follow()
    world.now += TURN_S
    turns(autoscaler, world, 30)
    assert world.asked == []
    world.in_flight["vllm-1"] = 0
    turns(autoscaler, world, 15)
    assert world.asked == ["/stop/vllm-1"]
    assert world.named() == {"vllm-1"}
    audit = [json.loads(line) for line in (world.folder / "audit.jsonl").read_text().splitlines()]
    assert [(line["action"], line["name"]) for line in audit] == [
        ("drain", "vllm-1"), ("stop", "vllm-1"), ("stopped", "vllm-1"),
    ]  # fmt: skip
    text = generate_latest(registry).decode()
    for line in (
        "autoscaler_wanted_replicas 2.0",
        "autoscaler_serving_replicas 2.0",
        "autoscaler_stopped_replicas 1.0",
        'autoscaler_changes_total{change="stop"} 1.0',
        "autoscaler_blind 0.0",
    ):
        assert line in text
    assert '"cause": "idle"' in lines[0] or '"action": "drain"' in lines[0]
    assert any('"cause": "idle"' in line for line in lines)


def test_a_gateway_that_has_not_read_the_word_yet_is_waited_for(world: World) -> None:
    """In flight 0 says nothing while new requests may still come."""
    autoscaler, _ = started(world)
    autoscaler.turn()
    for _ in range(3):
        world.now += TURN_S
        autoscaler.turn()
    assert world.asked == []


def test_one_that_does_not_get_empty_goes_back_into_the_route(world: World) -> None:
    autoscaler, registry = started(world)
    world.in_flight = dict.fromkeys(world.in_flight, 1)
    turns(autoscaler, world, 115)
    assert world.named() == {"vllm-2"}
    turns(autoscaler, world, 15)
    assert world.named() == set()
    assert world.asked == []
    assert 'autoscaler_changes_total{change="kept"} 1.0' in generate_latest(registry).decode()
    # and it is not tried again at once
    turns(autoscaler, world, DOWN_S - 60)
    assert world.named() == set()


def stopped(world: World) -> Autoscaler:
    """An autoscaler that has stopped vllm-2."""
    autoscaler, _ = started(world)
    turns(autoscaler, world, 20)
    assert not world.running["vllm-2"]
    world.asked.clear()
    return autoscaler


def test_a_queue_starts_a_stopped_one_and_its_load_is_learned(world: World) -> None:
    autoscaler = stopped(world)
    world.load |= {"waiting": 9, "running": 8}
    autoscaler.turn()
    assert (world.asked, world.named()) == (["/start/vllm-2"], set())
    world.states["vllm-2"] = "unreachable"
    turns(autoscaler, world, 30)
    world.states["vllm-2"] = "loading"
    turns(autoscaler, world, 60)
    assert world.asked == ["/start/vllm-2"]
    world.states["vllm-2"] = "ready"
    turns(autoscaler, world, 5)
    assert 90 <= autoscaler.kept.memory.load_s <= 100
    assert autoscaler.kept.on_the_way == {}


def test_a_queue_brings_back_what_still_drains(world: World) -> None:
    autoscaler, _ = started(world)
    world.in_flight["vllm-2"] = world.in_flight["vllm-1"] = world.in_flight["vllm-0"] = 1
    turns(autoscaler, world, 10)
    assert world.named() == {"vllm-2"}
    world.load |= {"waiting": 9, "running": 8}
    autoscaler.turn()
    assert (world.named(), world.asked) == (set(), [])


def test_a_restart_changes_nothing(world: World) -> None:
    stopped(world)
    before = world.folder.joinpath("stopped.json").read_text()
    again, _ = started(world)
    turns(again, world, DOWN_S - 60)
    assert (world.folder.joinpath("stopped.json").read_text(), world.asked) == (before, [])


def test_a_restart_in_the_middle_of_a_drain_goes_on_with_it(world: World) -> None:
    autoscaler, _ = started(world)
    world.in_flight = dict.fromkeys(world.in_flight, 1)
    turns(autoscaler, world, 10)
    again, _ = started(world)
    world.in_flight["vllm-2"] = 0
    turns(again, world, 10)
    assert world.asked == ["/stop/vllm-2"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"memory": 7}', '{"memory": {}, "parked": {"vllm-1": {}}}'])
def test_a_broken_file_of_what_was_kept_takes_nothing_out(world: World, text: str) -> None:
    (world.folder / "state.json").write_text(text)
    world.load["running"] = 500
    world.load["kv"] = 2.9
    autoscaler, _ = started(world)
    autoscaler.turn()
    assert world.named() == set()


@pytest.mark.parametrize("host", ["gateway", "prometheus", "switch"])
def test_blind_it_holds_still_and_says_so(world: World, host: str) -> None:
    autoscaler = stopped(world)
    world.away = {host}
    world.load |= {"waiting": 9, "running": 8, "refusals": 3}
    turns(autoscaler, world, 60)
    decision = autoscaler.turn()
    assert (decision.cause, decision.wanted) == ("blind", 2)
    assert f"{host} does not answer" in decision.why
    assert (world.asked, world.named()) == ([], {"vllm-2"})
    world.away = set()
    autoscaler.turn()
    assert world.asked == ["/start/vllm-2"]


def test_blind_for_long_it_keeps_no_living_replica_out_of_the_route(world: World) -> None:
    autoscaler, _ = started(world)
    world.in_flight = dict.fromkeys(world.in_flight, 1)
    turns(autoscaler, world, 10)
    world.away = {"prometheus"}
    turns(autoscaler, world, 130)
    assert world.named() == set()


def test_blind_is_also_who_sees_nonsense(world: World) -> None:
    autoscaler, _ = started(world)
    world.states["vllm-9"] = "ready"
    world.in_flight["vllm-9"] = 0
    answer = world.answer
    for said in (httpx.Response(200, text="<html>"), httpx.Response(200, json=[{}]), httpx.Response(500, text="no")):
        world.answer = lambda request, said=said: said if request.url.path == "/fleet" else answer(request)  # type: ignore[method-assign,misc]
        autoscaler.client = httpx.Client(transport=httpx.MockTransport(world.answer))
        assert autoscaler.turn().cause == "blind"
    assert world.named() == set()


def test_a_fleet_of_several_models_is_left_alone(world: World) -> None:
    autoscaler, _ = started(world)
    world.models = 2
    decision = autoscaler.turn()
    assert (decision.cause, world.named()) == ("blind", set())
    assert "several models" in decision.why


def test_what_an_operator_starts_stays(world: World) -> None:
    autoscaler = stopped(world)
    world.running["vllm-2"] = True
    autoscaler.turn()
    assert world.named() == set()
    world.follow()
    turns(autoscaler, world, DOWN_S - 60)
    assert world.asked == []


def test_one_without_a_container_is_not_started(world: World) -> None:
    autoscaler = stopped(world)
    del world.running["vllm-2"]
    world.load |= {"waiting": 9, "running": 8}
    autoscaler.turn()
    assert world.asked == []


def test_a_stop_that_docker_does_not_carry_out_is_asked_for_again(world: World) -> None:
    autoscaler, _ = started(world)
    turns(autoscaler, world, 10)
    assert world.asked == ["/stop/vllm-2"]
    for _ in range(int(AGAIN_S / TURN_S)):
        world.running["vllm-2"] = True
        world.now += TURN_S
        autoscaler.turn()
    assert world.asked == ["/stop/vllm-2"] * 2


def test_the_files_are_written_anew_every_turn(world: World) -> None:
    """Their age is what the gateway knows that the autoscaler lives by."""
    autoscaler, _ = started(world)
    world.away = {"gateway"}
    autoscaler.turn()
    (world.folder / "stopped.json").unlink()
    autoscaler.turn()
    assert world.named() == set()
    assert (world.folder / "stopped.json").stat().st_mode & 0o777 == 0o644


def test_the_audit_log_has_an_end(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "audit.jsonl").write_text("{}\n" * KEPT)
    store.audit("start", "vllm-1", "why")
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == KEPT // 2 + 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"MIN_REPLICAS": "0"}, "MIN_REPLICAS=0 will not do: write a number of replicas from 1 to 999"),
        ({"MAX_REPLICAS": "many"}, "MAX_REPLICAS=many will not do"),
        ({"MAX_REPLICAS": "-1"}, "MAX_REPLICAS=-1 will not do"),
        ({"MIN_REPLICAS": "3", "MAX_REPLICAS": "2"}, "MAX_REPLICAS=2 is less than MIN_REPLICAS=3"),
        ({"REPLICAS_TIMETABLE": "3=Mo 8-9"}, "REPLICAS_TIMETABLE: '3=Mo 8-9' is no entry"),
        ({"REPLICAS_TIMETABLE": "3=Mon 08:00-09:00", "MAX_REPLICAS": "2"}, "wants 3 replicas, and MAX_REPLICAS is 2"),
        ({"TZ": "Berlin"}, "TZ=Berlin is no time zone: write it as Europe/Berlin"),
        ({"TZ": "../etc/passwd"}, "is no time zone"),
        ({"DRAIN_SECONDS": "2m"}, "DRAIN_SECONDS=2m will not do"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(values: dict[str, str], says: str) -> None:
    with pytest.raises(Mistake) as mistake:
        settings.read(values)
    assert says in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_settings_that_are_right_are_taken() -> None:
    values = {"MIN_REPLICAS": "2", "REPLICAS_TIMETABLE": "3=Mon-Fri 08:00-18:00", "TZ": "Europe/Berlin"}
    found = settings.read(values | {"DRAIN_SECONDS": "60", "MAX_REPLICAS": ""})
    entries = timetable.counts("3=Mon-Fri 08:00-18:00")
    assert found == Settings(2, None, entries, ZoneInfo("Europe/Berlin"), 60.0)
    assert settings.read({}) == Settings(1, None, (), ZoneInfo("UTC"), 120.0)


def test_what_the_dashboards_and_the_rules_know_of_its_metrics_is_what_it_has(world: World) -> None:
    """grafana/metrics.json is recorded from a stack that may not run it."""
    autoscaler, registry = started(world)
    autoscaler.turn()
    families = text_string_to_metric_families(generate_latest(registry).decode())
    has = {sample.name: sorted(sample.labels) for family in families for sample in family.samples}
    recorded = json.loads((ROOT / "grafana" / "metrics.json").read_text())["elsewhere"]
    assert has == {name: labels for name, labels in recorded.items() if name.startswith("autoscaler_")}
