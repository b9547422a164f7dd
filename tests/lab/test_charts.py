"""The benchmarks' charts as they are committed."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from stack.shell import ROOT

CHARTS = sorted((ROOT / "docs" / "benchmarks").glob("*.svg"))


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_a_chart_is_small_and_its_text_is_text(chart: Path) -> None:
    """A chart is under 40 KB, and its legend can be read, searched and translated."""
    assert chart.stat().st_size < 40_000
    words = {text.text for text in ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}text")}  # noqa: S314
    own = {"memory.svg": {"private", "shared"}, "autoscaling.svg": {"autoscaler, a load takes 2 min", "replicas"}}
    assert own.get(chart.name, {"this gateway", "Nginx, least_conn"}) <= words


def test_each_chart_is_shown() -> None:
    """Every chart belongs to a report that shows it."""
    reports = "".join(report.read_text() for report in (ROOT / "docs" / "benchmarks").glob("*.md"))
    assert [chart.name for chart in CHARTS if f"]({chart.name})" not in reports] == []
