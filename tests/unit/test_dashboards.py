"""The dashboards pass their rules, and each rule finds what it is there to find."""

import json
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from autoscaler.decide import Cause
from grafana import dashboards, fleet
from grafana.dashboards import DASHBOARDS
from grafana.panels import Dashboard
from grafana.render import HEIGHTS, rendered
from grafana.rules import faults, known_metrics, query_faults
from stack.shell import ROOT
from tests.gateway.sdks import NODE, NPM

KNOWN = {
    "vllm:tokens_total": {"model_name", "engine", "replica"},
    "vllm:ttft_bucket": {"model_name", "replica"},
    "vllm:running": {"model_name", "replica"},
    "vllm:num_requests_running": {"model_name", "replica"},
    "gateway_requests_total": {"status"},
    "gateway_state": {"replica"},
}
CHOSEN = 'model_name=~"$model",replica=~"$replica"'
SCREEN = 24  # of Grafana's rows on a screen of 1080 lines, below its own bars


@pytest.mark.parametrize(
    "expr",
    [
        f"sum by (replica) (rate(vllm:tokens_total{{{CHOSEN}}}[1m]))",
        'sum(rate(gateway_requests_total{job="gateway",status=~"5.."}[1m])) / sum(rate(gateway_requests_total{}[1m]))',
        f"histogram_quantile(0.95, sum by (replica, le) (rate(vllm:ttft_bucket{{{CHOSEN}}}[1m])))",
        f"max by (replica) (vllm:running{{{CHOSEN}}})",
    ],
)
def test_good_queries_pass(expr: str) -> None:
    """Known metrics with their own labels and with those that Prometheus adds are no fault."""
    assert list(query_faults(expr, KNOWN)) == []


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("sum(rate(vllm:token_total{}[1m]))", "vllm:token_total is exported by nothing that is scraped"),
        ('rate(vllm:tokens_total{model="x"}[1m])', "vllm:tokens_total has no label model"),
        ('rate(vllm:tokens_total{engine!~"0|1",modelname="x"}[1m])', "vllm:tokens_total has no label modelname"),
        ("sum by (replica, states) (vllm:running{})", "no metric of the query has the label states"),
        ("sum(vllm:made_up)", "selects no metric"),
        ("sum(vllm:running{} / vllm:running)", "vllm:running needs its labels"),
        ("sum(vllm:tokens_total{})", "vllm:tokens_total is a counter and needs a rate"),
        ("sum(rate(vllm:tokens_total{}))", "vllm:tokens_total is a counter and needs a rate"),
        ("histogram_quantile(0.9, rate(vllm:ttft_bucket{}[1m]))", "not of buckets merged by le"),
        ("histogram_quantile(0.9, sum by (replica) (rate(vllm:ttft_bucket{}[1m])))", "not of buckets merged by le"),
        ("avg(vllm:running{})", "an average"),
        ("avg by (replica) (vllm:running{})", "an average"),
        ("avg_over_time(vllm:running{}[5m])", "an average"),
        ("quantile by (replica) (0.9, vllm:running{})", "an average"),
    ],
)
def test_bad_queries_are_named(expr: str, fault: str) -> None:
    """A metric or a label that does not exist, a bare counter, a quantile or an average of values: one line each."""
    found = list(query_faults(expr, KNOWN))
    assert len(found) == 1
    assert fault in found[0]


def board(expr: str, description: str = "Sum of `vllm:running`.", unit: str = "short") -> dict[str, Any]:
    """A dashboard of one panel, in Grafana's form, with both drop-downs."""
    panel = {
        "type": "timeseries",
        "title": "P",
        "description": description,
        "fieldConfig": {"defaults": {"unit": unit}},
        "targets": [{"expr": expr}],
    }
    both = [{"name": "model"}, {"name": "replica"}]
    return {"title": "D", "templating": {"list": both}, "panels": [panel]}


def test_a_good_panel_passes() -> None:
    assert list(faults(board(f"sum(vllm:running{{{CHOSEN}}})"), KNOWN)) == []


@pytest.mark.parametrize(
    ("dashboard", "fault"),
    [
        (board(f"sum(vllm:running{{{CHOSEN}}})", unit=""), "D / P: has no unit"),
        (board(f"sum(vllm:running{{{CHOSEN}}})", description=""), "description does not name vllm:running"),
        (board('sum(vllm:running{model_name=~"$model"})'), "$replica does not choose of vllm:running"),
        (board('sum(vllm:running{replica=~"$replica"})'), "$model does not choose of vllm:running"),
        (board('sum(vllm:running{replica=~"$replica"})'), "D: no panel uses $model"),
        (
            board('sum(gateway_state{replica=~"$replica"})', "`gateway_state`."),
            "$model does not choose of gateway_state",
        ),
    ],
)
def test_bad_panels_are_named(dashboard: dict[str, Any], fault: str) -> None:
    """Without a unit, without its metric's name behind the (i), or past a drop-down."""
    assert any(fault in found for found in faults(dashboard, KNOWN))


def test_dashboards_are_sound_and_written() -> None:
    """Every panel keeps the rules, and the JSON is what the Python says."""
    assert dashboards.check() == []
    assert len(DASHBOARDS) == 6
    assert sum(len(dashboard.panels) for dashboard in DASHBOARDS) > 80


def test_a_metric_that_is_gone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking a metric out of what is recorded fails each dashboard that asks for it."""
    fewer = known_metrics()
    del fewer["vllm:kv_cache_usage_perc"]
    monkeypatch.setattr(dashboards, "known_metrics", lambda: fewer)
    found = {line.split(" / ")[0] for line in dashboards.check()}
    assert found == {"Fleet", "Replica"}


def test_stale_json_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in Python that was not written out fails the check."""

    def changed(dashboard: Dashboard) -> str:
        return json.dumps(json.loads(rendered(dashboard)) | {"title": f"New {dashboard.title}"})

    monkeypatch.setattr(dashboards, "rendered", changed)
    stale = "is out of step: run python -m grafana.dashboards"
    assert dashboards.check() == [
        f"grafana/{dashboard.folder}/{dashboard.uid}.json {stale}" for dashboard in DASHBOARDS
    ]


def test_layout_fits_grafanas_grid() -> None:
    """No panel sticks out of the 24 columns or covers another, and what every fleet has is one screen for who is on
    call."""
    for dashboard in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        panels = json.loads(rendered(dashboard))["panels"]
        for panel in panels:
            place = panel["gridPos"]
            cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
            assert max(x for x, _ in cells) < 24, panel["title"]
            assert not cells & taken, panel["title"]
            taken |= cells
        if dashboard.uid == "fleet":
            (below,) = [panel["gridPos"]["y"] for panel in panels if panel["title"] == "Autoscaler"]
            assert below <= SCREEN
            assert list(dashboard.sections)[-1] == "Autoscaler"


def test_the_autoscalers_causes_have_their_words() -> None:
    """A cause without a word would show as nothing. Where the profile is off, the panels say so."""
    assert set(fleet.CAUSES) == set(get_args(Cause))
    for panel in fleet.DASHBOARD.sections["Autoscaler"]:
        assert panel.empty == fleet.NO_AUTOSCALER


def test_each_panel_says_what_to_do() -> None:
    """Behind each panel's (i) stands how to read it, why it may be empty, and which metrics it shows."""
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            assert panel.read.endswith("."), panel.title
            assert len(panel.read.split()) >= 12, panel.title
            assert not panel.empty or panel.empty.endswith("."), panel.title
            assert panel.kind in HEIGHTS


def test_titles_are_told_apart() -> None:
    """A panel is named once on its dashboard, and each dashboard has a file of its own."""
    assert len({dashboards.path_of(dashboard) for dashboard in DASHBOARDS}) == len(DASHBOARDS)
    for dashboard in DASHBOARDS:
        titles = [panel.title for panel in dashboard.panels]
        assert len(set(titles)) == len(titles), dashboard.title


def test_only_hosts_with_gpus_have_rows_for_them() -> None:
    """Of the two Hardware dashboards, one lies in the place of the other where docker-compose.gpu.yml is used."""
    plain, with_gpus = (dashboard for dashboard in DASHBOARDS if dashboard.uid == "hardware")
    assert not any(name.startswith("DCGM") for panel in plain.panels for name in panel.metrics)
    assert set(plain.sections) == set(with_gpus.sections) - {"GPUs"}
    mount = "./grafana/dashboards-gpu/hardware.json:/etc/grafana/dashboards/hardware.json:ro"
    assert mount in (ROOT / "docker-compose.gpu.yml").read_text()
    assert mount not in (ROOT / "docker-compose.yml").read_text()


# Grafana's own types, with the values of their enums in place of these.
TYPES = """
import type { Dashboard } from '@grafana/schema';
type J<T> = T extends string ? `${T}`
  : T extends number ? (`${T}` extends `${infer N extends number}` ? N : T)
  : T extends (infer U)[] ? J<U>[]
  : T extends object ? { [K in keyof T]: J<T[K]> } : T;
"""


def test_dashboards_fit_grafanas_own_types(tmp_path: Path) -> None:
    """tsc finds fields that the pinned Grafana does not know, and values of a wrong type."""
    version = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-pins"]["grafana"].split(":")[1]
    packages = ["typescript@5.9.3", f"@grafana/schema@{version}"]
    install = [str(NODE), str(NPM), "install", "--silent", "--no-audit", "--no-fund", *packages]
    done = subprocess.run([*install, f"--prefix={tmp_path}"], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip("npm cannot fetch Grafana's types: is its registry reachable?")
    boards = [json.loads(dashboards.path_of(dashboard).read_text()) for dashboard in DASHBOARDS]
    for variable in (variable for board in boards for variable in board["templating"]["list"]):
        for name in ("auto", "auto_min", "auto_count", "definition"):
            # the SDK knows these of drop-downs and the types do not; the last one is what Grafana's own form writes
            del variable[name]

    def said(texts: list[str]) -> str:
        lines = [f"export const d{number}: J<Dashboard> = {text};" for number, text in enumerate(texts)]
        (tmp_path / "check.ts").write_text("\n".join([TYPES, *lines]))
        tsc = [str(NODE), str(tmp_path / "node_modules/typescript/bin/tsc"), "--noEmit", "--skipLibCheck", "--strict"]
        module = ["--module", "esnext", "--moduleResolution", "bundler", "--target", "es2022"]
        command = [*tsc, *module, str(tmp_path / "check.ts")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout

    texts = [json.dumps(board) for board in boards]
    assert said(texts) == ""
    broken = said(
        [texts[0].replace('"gridPos"', '"gridPosition"'), texts[1].replace('"editable": false', '"editable": 0')]
    )
    assert "gridPosition" in broken
    assert "Type 'number' is not assignable to type 'boolean" in broken
