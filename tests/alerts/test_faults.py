"""The short table of faults and alerts; `make chaos ARGS=--alerts` runs all of it into docs/benchmarks/alerts.md."""

import re
from pathlib import Path

import pytest
import yaml

from lab.chaos.alerts import CASES, play_all
from lab.sim.prometheus import quick_rules
from prometheus.rules.check import rules_in
from stack.shell import ROOT

RULES = ROOT / "prometheus" / "rules"


@pytest.mark.usefixtures("gateway_image", "promtool")
def test_a_fault_makes_its_own_alert_fire_and_no_other() -> None:
    """Real Prometheus on the project's rules, in quicker time, over real Nginx and simulated replicas."""
    cases = [case for case in CASES if case.quick]
    rows = play_all(cases, lambda _: None)
    assert {row.case.name: row.wrong for row in rows} == {case.name: [] for case in cases}
    assert [set(row.fired) for row in rows] == [set(case.alerts) for case in cases]


def test_every_alert_that_can_be_caused_here_has_a_fault() -> None:
    """What has none needs a GPU, a host, a container's limit or a day's clients: promtool's tests alone show it."""
    caused = set().union(*(case.alerts for case in CASES))
    alerts = {rule["alert"]: path.name for path, rule in rules_in() if "alert" in rule}
    without = {name for name, file in alerts.items() if file == "fleet.yml"} - caused
    assert without == {"GatewayMemoryHigh", "ClientBreaksCache"}
    assert caused <= alerts.keys()


@pytest.mark.parametrize("path", sorted(RULES.glob("*.yml")), ids=lambda path: path.name)
def test_quicker_rules_differ_in_their_durations_only(path: Path) -> None:
    """Thirty times as quick, no duration is left as it was, and every other word is."""
    duration = re.compile(r"\b\d+(?:ms|[smhd])\b")
    for slow, quick in zip(
        yaml.safe_load(path.read_text())["groups"], quick_rules(path.read_text(), 30)["groups"], strict=True
    ):
        for before, after in zip(slow["rules"], quick["rules"], strict=True):
            assert duration.sub("T", before["expr"]) == duration.sub("T", after["expr"])
            assert before.get("alert") == after.get("alert")
            slower = re.findall(r"(?<=\[)\d+[smhd](?=\])|(?<=offset )\d+[smhd]", before["expr"])
            assert len(re.findall(r"\d+ms", after["expr"])) == len(slower)
    assert quick_rules(path.read_text(), 30) != yaml.safe_load(path.read_text())
