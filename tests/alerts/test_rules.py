"""Each alert fires when it should and is silent when it should not, and its runbook says what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prometheus.rules import check
from prometheus.rules.check import rules_in, with_selectors
from stack import burn_rates
from stack.objectives import Objective, Objectives
from stack.shell import ROOT
from tests.alerts.conftest import Promtool

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*.yml"))
ALERTS = [rule for _, rule in rules_in() if "alert" in rule]
NAMES = sorted({rule["alert"] for rule in ALERTS})
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()


def expected(test: dict[str, Any]) -> list[set[str]]:
    """The alerts that a test of promtool wants to fire, at each of its moments."""
    wanted = []
    for asked in test["promql_expr_test"]:
        if "ALERTS" in asked["expr"]:
            samples = " ".join(sample["labels"] for sample in asked.get("exp_samples", ()))
            wanted.append(set(re.findall(r'alertname="(\w+)"', samples)))
    return wanted


def test_promtool_sees_each_alert_fire_and_be_silent(promtool: Promtool) -> None:
    done = promtool("test", "rules", *(str(path.relative_to(ROOT)) for path in CASES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_no_fault_in_the_rules(promtool: Promtool) -> None:
    done = promtool("check", "config", "prometheus/prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    read = re.findall(r"^Checking (\S+)$", done.stdout, re.MULTILINE)
    assert set(read) >= {str(path.relative_to(ROOT)) for path in (ROOT / "prometheus" / "rules").glob("*.yml")}


@pytest.mark.parametrize("name", NAMES)
def test_each_alert_is_tested_firing_and_silent(name: str) -> None:
    """In the tests that bear its name it fires at some moment, and at another or for another part it does not."""
    tests = [test for path in CASES for test in yaml.safe_load(path.read_text())["tests"]]
    own = [test for test in tests if name in test["name"]]
    assert any(name in fired for test in own for fired in expected(test)), f"nothing shows {name} firing"
    silent = [word for test in own for word in re.findall(r"\b(?:not|silent|neither|goes)\b", test["name"])]
    assert silent, f"nothing shows {name} silent"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook"}
    assert annotations["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
    assert annotations["description"].endswith(".")
    assert not annotations["summary"].endswith(".")


def test_the_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    assert re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE) == list(dict.fromkeys(rule["alert"] for rule in ALERTS))


@pytest.mark.parametrize("name", NAMES)
def test_each_section_says_what_it_means_how_to_see_it_and_what_to_do(name: str) -> None:
    section = re.split(r"^#+ ", RUNBOOK.partition(f"\n### {name}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    assert re.findall(r"^\*\*(.+?)\*\*", section, re.MULTILINE) == ["For users:", "See it:", "Do:"]


def test_rules_ask_for_what_exists_and_are_in_step_with_the_objectives() -> None:
    assert check.check() == []


def test_a_metric_that_nobody_exports_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = {"alert": "Odd", "expr": 'sum by (replica) (rate(gateway_oddities_total[5m])) > 0 or up{job="x", moon="y"}'}
    monkeypatch.setattr(check, "rules_in", lambda: [(Path("odd.yml"), rule)])
    assert [fault.partition(" is exported")[0] for fault in check.check()] == [
        "odd.yml / Odd: gateway_oddities_total",
        "odd.yml / Odd: up has no label moon",
    ]


@pytest.mark.parametrize(
    ("expr", "selected"),
    [
        ("a / b", "a{} / b{}"),
        ("sum by (x) (rate(a[5m])) > 0", "sum by (x) (rate(a{}[5m])) > 0"),
        ('a{x="b"} and on (y) c:d:e offset 5m', 'a{x="b"} and on (y) c:d:e{} offset 5m'),
        ("clamp_min(a - b, 0) or 3600 * c", "clamp_min(a{} - b{}, 0) or 3600 * c{}"),
    ],
)
def test_metrics_are_found_in_an_expression(expr: str, selected: str) -> None:
    assert with_selectors(expr) == selected


def rules_of(objectives: Objectives) -> dict[str, str]:
    """The generated rules: expression by record."""
    group = yaml.safe_load(burn_rates.rendered(objectives))["groups"][0]
    return {rule["record"]: rule["expr"] for rule in group["rules"]}


def test_an_objective_between_two_bounds_is_interpolated() -> None:
    """2 s lies two thirds of the way from 1 to 2.5 s."""
    rules = rules_of(Objectives(default=Objective(ttft_p95_seconds=2.0, itl_p95_seconds=0.1, availability=0.999)))
    assert (
        '0.666667 * sum by (model_name) (rate(vllm:time_to_first_token_seconds_bucket{model_name=~".*",le="2.5"}'
        in (rules["model:ttft_spent:rate5m"])
    )
    assert (
        '0.333333 * sum by (model_name) (rate(vllm:time_to_first_token_seconds_bucket{model_name=~".*",le="1.0"}'
        in (rules["model:ttft_spent:rate5m"])
    )
    assert rules["model:itl_spent:rate5m"].count("_bucket") == 1
    assert rules["model:availability_spent:rate5m"].endswith("/ 0.001")


def test_odd_names_of_models_stay_in_their_quotes() -> None:
    """A name with quotes, backslashes and a dot is matched as it is, and no rule of the others counts it."""
    name = 'a "b" \\ c.d'
    own = Objective(ttft_p95_seconds=1.0, itl_p95_seconds=0.1, availability=0.99)
    default = Objective(ttft_p95_seconds=2.0, itl_p95_seconds=0.1, availability=0.999)
    spent = rules_of(Objectives(default=default, models={name: own}))["model:ttft_spent:rate5m"]
    assert r'{model_name="a \"b\" \\ c.d"' in spent
    assert r'{model_name!~"a\\ \"b\"\\ \\\\\\ c\\.d"' in spent
