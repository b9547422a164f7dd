"""`make usage`: the days' sums are those of the counters, whatever happened in between."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import usage
from stack import settings

DAY = 86400
MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
FIRST = date(2026, 3, 1)


def test_midnight_ends_a_day() -> None:
    gained, lost = usage.per_day(100, [(MIDNIGHT + 900, 110), (MIDNIGHT + DAY, 130), (MIDNIGHT + DAY + 900, 131)])
    assert gained == {FIRST: 30, FIRST + timedelta(days=1): 1}
    assert lost == []


def test_a_counter_that_began_anew_is_counted_on_and_named() -> None:
    gained, lost = usage.per_day(100, [(MIDNIGHT + 900, 110), (MIDNIGHT + 1800, 5), (MIDNIGHT + 2700, 7)])
    assert gained == {FIRST: 17}
    assert lost == [FIRST]


@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(1, 3 * DAY), st.integers(0, 500)), max_size=40))
def test_the_days_add_up_to_what_the_counter_gained(before: int, steps: list[tuple[int, int]]) -> None:
    moment, value, points = MIDNIGHT, float(before), []
    expected: Counter[date] = Counter()
    for pause, more in steps:
        moment, value = moment + pause, value + more
        points.append((moment, value))
        expected[datetime.fromtimestamp(moment - 1, UTC).date()] += more
    gained, lost = usage.per_day(before, points)
    assert lost == []
    assert {day: amount for day, amount in gained.items() if amount} == +expected


class Fake(httpx.BaseTransport):
    """A Prometheus with counters that grow by so much a second; each has the labels of its key and model."""

    def __init__(self, rates: dict[tuple[str, str], float], began: float) -> None:
        self.rates = rates
        self.began = began
        self.asked: list[dict[str, str]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        asked = {name: values[0] for name, values in parse_qs(request.content.decode()).items()}
        self.asked.append(asked)
        result: list[dict[str, Any]] = []
        for (key, model), rate in self.rates.items() if 'kind="prompt"' in asked["query"] else ():
            one: dict[str, Any] = {"metric": {"key": key, "model": model}}

            def value(moment: float, rate: float = rate) -> list[Any]:
                return [moment, str(round(rate * (moment - self.began)))]

            if request.url.path.endswith("query_range"):
                start, end, step = (float(asked[name]) for name in ("start", "end", "step"))
                moments = [start + step * n for n in range(int((end - start) // step) + 1)]
                one["values"] = [value(moment) for moment in moments if moment >= self.began]
            elif float(asked["time"]) >= self.began:
                one["value"] = value(float(asked["time"]))
            else:
                continue
            result.append(one)
        return httpx.Response(200, json={"status": "success", "data": {"result": result}})


@pytest.mark.parametrize("began", [MIDNIGHT - 5 * DAY, MIDNIGHT + 1.5 * DAY])
def test_each_day_has_its_share_also_the_one_that_is_not_over(began: float) -> None:
    now = MIDNIGHT + 2 * DAY + 12345
    fake = Fake({("alice", "a"): 1, ("bob", "a"): 2}, began)
    rows, lost = usage.usage(usage.Prometheus("http://p", fake), ["key", "model"], FIRST, now)
    assert not lost
    expected = {}
    for number in range(3):
        day = FIRST + timedelta(days=number)
        begin, end = MIDNIGHT + number * DAY, min(MIDNIGHT + (number + 1) * DAY, now)
        for key, rate in (("alice", 1), ("bob", 2)):
            if end > max(begin, began):
                expected[day, (key, "a")] = {"prompt": rate * (end - max(begin, began))}
    assert rows == expected


def test_prometheus_is_never_asked_for_more_points_than_it_gives() -> None:
    assert usage.LONGEST_DAYS * DAY / usage.STEP_S < 11_000
    assert DAY % usage.STEP_S == 0


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: MIDNIGHT + DAY + 3600)
    monkeypatch.setattr(settings, "load", lambda: settings.check({}))
    fake = Fake({("alice", "a"): 1}, MIDNIGHT - 9 * DAY)
    real = usage.Prometheus
    monkeypatch.setattr(usage, "Prometheus", lambda url: real(url, fake))


app = typer.Typer()
app.command()(usage.main)


@pytest.mark.usefixtures("shown")
def test_the_table_and_the_csv_say_the_same() -> None:
    table = CliRunner().invoke(app, ["--days", "2"])
    assert "2026-03-01   alice          0   86,400        0            0" in table.stdout
    assert "audio" not in table.stdout
    done = CliRunner().invoke(app, ["--days", "2", "--csv", "--by", "model,key"])
    assert list(csv.reader(io.StringIO(done.stdout))) == [
        ["day", "model", "key", "requests", "prompt", "cached", "completion", "audio_seconds"],
        ["2026-03-01", "a", "alice", "0", "86400", "0", "0", "0"],
        ["2026-03-02", "a", "alice", "0", "3600", "0", "0", "0"],
    ]


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize(("args", "says"), [(["--by", "user"], "--by user is not known"), (["--days", "0"], "--days")])
def test_a_mistake_is_named(args: list[str], says: str) -> None:
    done = CliRunner().invoke(app, args)
    assert done.exit_code != 0
    assert says in done.stderr


def test_a_prometheus_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "load", lambda: settings.check({"PROMETHEUS_PORT": "1"}))
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 1
    assert "Prometheus does not answer" in done.stderr
    assert "make status" in done.stderr
