"""The dashboards' check finds what it is there to find, and the dashboards pass it."""

import json

import pytest

from grafana import dashboards
from grafana.dashboards import DASHBOARDS, Query, faults

KNOWN = {"vllm:tokens_total": {"model_name", "engine"}, "gateway_requests_total": {"status"}}


@pytest.mark.parametrize(
    "expr",
    [
        'sum by (replica) (rate(vllm:tokens_total{model_name=~"$model"}[1m]))',
        'sum(rate(gateway_requests_total{job="gateway",status=~"5.."}[1m])) / sum(rate(gateway_requests_total{}[1m]))',
    ],
)
def test_good_queries_pass(expr: str) -> None:
    """Known metrics with their own labels and with those that Prometheus adds are no fault."""
    assert list(faults(Query(expr, ""), KNOWN)) == []


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("sum(vllm:token_total{})", "vllm:token_total is exported by neither vLLM, the gateway nor Prometheus"),
        ('vllm:tokens_total{model="x"}', "vllm:tokens_total has no label model"),
        ('vllm:tokens_total{engine!~"0|1",modelname="x"}', "vllm:tokens_total has no label modelname"),
        ("sum by (replica, states) (gateway_requests_total{})", "no metric of the query has the label states"),
        ("sum(vllm:tokens_total)", "selects no metric"),
    ],
)
def test_bad_queries_are_named(expr: str, fault: str) -> None:
    """A metric, a label or a grouping that does not exist is said in one line."""
    found = list(faults(Query(expr, ""), KNOWN))
    assert len(found) == 1
    assert fault in found[0]


def test_dashboards_are_sound_and_written() -> None:
    """No query asks for what is not exported, and the JSON is what the Python says."""
    assert dashboards.check() == []


def test_stale_json_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in Python that was not written out fails the check."""
    monkeypatch.setattr(dashboards, "rendered", lambda _: "{}\n")
    assert dashboards.check() == [
        f"grafana/dashboards/{dashboard.uid}.json is out of step: run python grafana/dashboards.py"
        for dashboard in DASHBOARDS
    ]


def test_layout_fits_grafanas_grid() -> None:
    """No panel sticks out of the 24 columns or covers another."""
    for dashboard in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(dashboards.rendered(dashboard))["panels"]:
            place = panel["gridPos"]
            cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
            assert max(x for x, _ in cells) < 24, panel["title"]
            assert not cells & taken, panel["title"]
            taken |= cells


def test_descriptions_name_their_metrics() -> None:
    """Behind each panel's (i) stands how to read it and which metrics it shows."""
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            assert panel.read.endswith("."), panel.title
            assert panel.metrics, panel.title
            assert all(f"`{metric}`" in panel.description for metric in panel.metrics)
