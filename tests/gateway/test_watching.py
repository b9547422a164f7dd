"""What is watched stays within its budget: series for 8 replicas, 100 keys and 3 models."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from lab.http import get
from lab.sim.gateway import Gateway
from lab.waiting import until
from lab.watching import BUDGET, KEYS, MODELS, RECORDED, REPLICAS, STATUSES, busy_gateway, by_metric

NEXT = "give a metric fewer labels; if all of them earn their place, raise BUDGET in lab/watching.py and say why"


@pytest.fixture(scope="module")
def exposition() -> Iterator[str]:
    """The gateway's metrics after a load that touches every label."""
    with busy_gateway() as gateway:
        yield settled(gateway)


def settled(gateway: Gateway) -> str:
    """The metrics, once each request is counted out."""

    def counted() -> str:
        text = get(f"{gateway.metrics_url}/metrics").decode()
        in_flight = re.findall(r"^gateway_requests_in_flight\{.*\} (\d+)$", text, re.MULTILINE)
        return text if set(in_flight) == {"0"} else ""

    return until(counted, "each request is counted out")


def of_the_recorded_replica() -> int:
    return by_metric(RECORDED.read_text()).total()


def test_the_load_touches_every_label_that_grows(exposition: str) -> None:
    """Each key at each replica, each model, each way to choose, each status: else the count below would say nothing."""

    def values(metric: str, label: str) -> set[str]:
        return set(re.findall(rf'^{metric}\{{(?:.*,)?{label}="([^"]*)"', exposition, re.MULTILINE))

    kinds = re.findall(r'^gateway_tokens_total\{.*kind="(\w+)"', exposition, re.MULTILINE)
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("prompt", "cached", "completion"), KEYS * REPLICAS
    )
    assert values("gateway_requests_total", "model") >= set(MODELS)
    assert values("gateway_requests_total", "status") >= {"200", *map(str, STATUSES)}
    assert values("gateway_requests_total", "reason") >= {"load", "prefix", "session"}


def test_the_gateways_series_are_within_their_budget(exposition: str) -> None:
    found = by_metric(exposition)
    assert found.total() <= BUDGET["gateway"], f"{found.total()} series of the gateway, {NEXT}: {found.most_common(5)}"


def test_a_replicas_series_are_within_their_budget() -> None:
    """Of the real engine's metrics as they were recorded."""
    found = by_metric(RECORDED.read_text())
    assert found["vllm:time_to_first_token_seconds"] > 10
    assert found.total() <= BUDGET["replica"], f"{found.total()} series of a replica, {NEXT}: {found.most_common(5)}"


def test_the_fleets_series_are_within_their_budget(exposition: str) -> None:
    whole = by_metric(exposition).total() + REPLICAS * of_the_recorded_replica()
    assert whole <= BUDGET["fleet"], f"{whole} series of the fleet, {NEXT}"
    assert BUDGET["gateway"] + REPLICAS * BUDGET["replica"] == BUDGET["fleet"]
