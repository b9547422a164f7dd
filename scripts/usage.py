"""`make usage`: who used how many tokens on which day, from the counters of the gateway that Prometheus keeps."""

from __future__ import annotations

import csv
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stack import settings
from stack.console import Problem, console, one_line_for_mistakes
from stack.prometheus import Prometheus as Client

LABELS = ("key", "end_user", "model", "replica")
# What is counted: a column, and the series that it adds up. Cached tokens are a part of the prompts'.
COLUMNS = {
    "requests": "gateway_key_requests_total",
    "prompt": 'gateway_tokens_total{kind="prompt"}',
    "cached": 'gateway_tokens_total{kind="cached"}',
    "completion": 'gateway_tokens_total{kind="completion"}',
    "audio_seconds": "gateway_audio_seconds_total",
}
# Most fleets hear nothing: this column is in the table only where some sound was heard.
SELDOM = "audio_seconds"
# Points of a counter are so far apart; midnight is one of them. Prometheus gives at most 11,000.
STEP_S = 900
LONGEST_DAYS = 90

Labels = tuple[str, ...]
Points = list[tuple[float, float]]


def per_day(before: float, points: Points) -> tuple[dict[date, float], list[date]]:
    """What a counter gained on each day (UTC), and the days on which it was lost and began anew.

    `before`: its value when the first day began; `points`: Unix seconds and values after that, in their order.
    """
    gained: dict[date, float] = defaultdict(float)
    lost = []
    last = before
    for moment, value in points:
        # midnight is the end of a day
        day = datetime.fromtimestamp(moment - 1e-3, UTC).date()
        if value < last:
            lost.append(day)
            last = 0.0
        gained[day] += value - last
        last = value
    return gained, lost


class Prometheus(Client):
    """The stack's Prometheus, asked for counters."""

    def counters(self, series: str, by: Iterable[str], start: float, now: float) -> dict[Labels, tuple[float, Points]]:
        """Each counter by its labels: its value at `start`, and its points from then to `now` (Unix seconds).

        The gateway is the only one that counts, so a sum over its series falls only when it loses them.
        """
        total = f"sum by ({', '.join(by)}) ({series})"
        # a gateway that was down at that moment had its last value before
        before = self.ask("query", query=f"last_over_time(({total})[{LONGEST_DAYS}d:1h])", time=start)["result"]
        after = self.ask("query_range", query=total, start=start + STEP_S, end=now, step=STEP_S)["result"]
        latest = self.ask("query", query=total, time=now)["result"]
        found: dict[Labels, tuple[float, Points]] = {}
        for one in before:
            found[self._labels(one, by)] = (float(one["value"][1]), [])
        for one in after:
            points = [(float(moment), float(value)) for moment, value in one["values"]]
            found.setdefault(self._labels(one, by), (0.0, []))[1].extend(points)
        for one in latest:
            _, points = found.setdefault(self._labels(one, by), (0.0, []))
            points.append((now, float(one["value"][1])))
        return found

    @staticmethod
    def _labels(one: Mapping[str, Any], by: Iterable[str]) -> Labels:
        return tuple(one["metric"].get(label, "") for label in by)


def usage(
    prometheus: Prometheus, by: list[str], first: date, now: float
) -> tuple[dict[tuple[date, Labels], dict[str, int]], set[date]]:
    """What was used by day and labels, in each column that was not zero; and the days on which counters were lost."""
    start = datetime(first.year, first.month, first.day, tzinfo=UTC).timestamp()
    rows: dict[tuple[date, Labels], dict[str, int]] = defaultdict(dict)
    lost: set[date] = set()
    for column, series in COLUMNS.items():
        for labels, (before, points) in prometheus.counters(series, by, start, now).items():
            gained, anew = per_day(before, points)
            lost |= set(anew)
            for day, amount in gained.items():
                if amount:
                    rows[day, labels][column] = round(amount)
    return rows, lost


def main(
    days: Annotated[int, typer.Option(min=1, max=LONGEST_DAYS, help="How many days back, today included (UTC).")] = 7,
    by: Annotated[str, typer.Option(help=f"Who or what, with commas between: {', '.join(LABELS)}.")] = "key",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:
    """Show tokens and requests by day and key, from Prometheus."""
    with one_line_for_mistakes():
        chosen = [label.strip() for label in by.split(",")]
        if unknown := [label for label in chosen if label not in LABELS]:
            raise Problem(f"--by {unknown[0]} is not known", f"name some of {', '.join(LABELS)}")
        wanted = settings.load()
        now = time.time()
        first = datetime.fromtimestamp(now, UTC).date() - timedelta(days=days - 1)
        rows, lost = usage(Prometheus(f"http://127.0.0.1:{wanted.prometheus_port}"), chosen, first, now)
        heads = ["day", *chosen, *COLUMNS]
        cells = [
            [day.isoformat(), *labels, *(found.get(column, 0) for column in COLUMNS)]
            for (day, labels), found in sorted(rows.items())
        ]
        aside = Console(highlight=False, stderr=True)
        for day in sorted(lost):
            aside.print(
                f"[yellow]{day}: the gateway's counters began anew; up to {STEP_S // 60} minutes are missing[/]"
            )
        if as_csv:
            csv.writer(sys.stdout).writerows([heads, *cells])
            return
        if not cells:
            console.print(f"Nothing was counted since {first}.")
            return
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        if not any(SELDOM in found for found in rows.values()):
            at = heads.index(SELDOM)
            heads, cells = heads[:at], [row[:at] for row in cells]
        for head in heads:
            table.add_column(head, justify="right" if head in COLUMNS else "left", overflow="fold")
        for row in cells:
            table.add_row(*(f"{cell:,}" if isinstance(cell, int) else escape(str(cell)) for cell in row))
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
