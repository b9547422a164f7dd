"""Draws a dashboard from a live Prometheus, for the docs: nothing here needs Grafana.

scripts/bootstrap.sh bench
.venv/bin/python -m lab.dashboard docs/pictures/dashboard.png
.venv/bin/python -m lab.dashboard docs/pictures/replica.png --dashboard replica --section Scheduler --section Cache
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from math import ceil, isnan, nan
from pathlib import Path
from typing import Annotated, Any

import httpx
import matplotlib
import typer
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from rich.console import Console

from grafana.dashboards import DASHBOARDS
from grafana.panels import Dashboard
from grafana.render import rendered

matplotlib.use("agg")
COLUMNS = 24
WIDTH_IN = 14.0
ROW_IN = 0.27
STEP_S = 5  # the scrape interval
# the names beside state bars, in inches: a letter's width, about, and a line's height
NAME_PT, LETTER_IN, NAME_IN = 7.5, 0.066, 0.125
# As Grafana fills them in with All chosen: its window is four scrape intervals.
VARIABLES = {"$__rate_interval": "20s", "$__range": "15m", "$model": ".*", "$replica": ".*", "$key": ".*"}
BY_NAME = {dashboard.uid: dashboard for dashboard in DASHBOARDS if dashboard.folder == "dashboards"}
COLOURS = {
    "green": "#37872d",
    "orange": "#e0752d",
    "red": "#c4162a",
    "blue": "#3274d9",
    "yellow": "#e0b400",
    "gray": "#8e8e8e",
    "purple": "#8f3bb8",
}

Json = dict[str, Any]
Series = dict[str, list[float]]


def series(prometheus: httpx.Client, target: Json, times: Sequence[float]) -> Series:
    """A query's lines by their legend: a value for each of `times` (seconds since 1970), NaN where there is none."""
    expr = target["expr"]
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    asked: dict[str, str | float] = {"query": expr, "start": times[0], "end": times[-1], "step": STEP_S}
    reply = prometheus.get("/api/v1/query_range", params=asked)
    reply.raise_for_status()
    found: Series = {}
    for line in reply.json()["data"]["result"]:
        legend = target["legendFormat"]
        for label, text in line["metric"].items():
            legend = legend.replace(f"{{{{{label}}}}}", text)
        values = {round(float(at) - times[0]): float(value) for at, value in line["values"]}
        # Grafana too writes the name of a label that a line has not
        found[re.sub(r"\{\{(\w+)\}\}", r"\1", legend)] = [values.get(round(at - times[0]), nan) for at in times]
    return found


def written(value: float, unit: str) -> str:
    """A value with its unit, as short as Grafana writes it."""
    if unit in ("percentunit", "percent"):
        return f"{value * (100 if unit == 'percentunit' else 1):.3g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"
    step = 1024 if unit == "bytes" else 1000
    prefixes = "KMGT" if value >= step else ""
    for prefix in prefixes:
        value /= step
        if value < step or prefix == prefixes[-1]:
            prefixes = f" {prefix}"
            break
    after = {"reqps": "req/s", "bytes": "iB" if prefixes else "B", "Bps": "B/s"}.get(unit, "")
    gap = "" if prefixes and unit in ("bytes", "Bps") else " "
    return f"{value:.3g}{prefixes}{gap}{after}".rstrip()


def draw_figure(axes: Axes, panel: Json, lines: Series) -> None:
    """The last value in large type over its own small graph, in the colour of its threshold."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.axis("off")
    if not lines:
        axes.text(0.5, 0.55, defaults["noValue"], transform=axes.transAxes, ha="center", va="center", fontsize=19)
    for values in lines.values():
        known = [value for value in values if not isnan(value)]
        last = known[-1] if known else 0.0
        reached = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or step["value"] <= last]
        colour = COLOURS[reached[-1]["color"]]
        axes.fill_between(range(len(values)), values, color=colour, alpha=0.2, linewidth=0)
        axes.set_ylim(0, max([*known, 1e-9]) * 2.5)
        text = f"{last:.1f}" if "decimals" in defaults else written(last, defaults["unit"])
        axes.text(0.5, 0.55, text, transform=axes.transAxes, ha="center", va="center", fontsize=19, color=colour)


def cut(name: str, letters: int) -> str:
    """A name in at most so many letters. Names differ most at their ends."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"


def draw_states(axes: Axes, panel: Json, times: Sequence[float], lines: Series, letters: int) -> None:
    """A bar for each line, in the colour of its state, and its name in so many letters where there is room."""
    states = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    names = sorted(lines)
    for row, values in enumerate(lines[name] for name in names):
        for start, end, value in zip(times, times[1:], values, strict=False):
            if not isnan(value):
                axes.barh(row, end - start, left=start, height=0.8, color=COLOURS[states[str(int(value))]["color"]])
    fit = max(1, int(axes.get_window_extent().height / axes.figure.dpi / NAME_IN))
    named = range(0, len(names), max(1, ceil(len(names) / fit)))
    axes.set_yticks(named, [cut(names[row], letters) for row in named])
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)


def draw_lines(axes: Axes, panel: Json, times: Sequence[float], lines: Series) -> None:
    """Lines over time, stacked where the panel says so, with their legend below."""
    defaults = panel["fieldConfig"]["defaults"]
    if lines and defaults["custom"]["stacking"]["mode"] == "normal":
        stacked = [[0.0 if isnan(value) else value for value in values] for values in lines.values()]
        axes.stackplot(times, stacked, labels=list(lines), alpha=0.6)
    else:
        for name, values in lines.items():
            axes.plot(times, values, label=name, linewidth=1.2)
            axes.fill_between(times, values, alpha=0.08, linewidth=0)
    axes.set_ylim(0, defaults.get("max"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, defaults["unit"])))
    axes.grid(color="#e4e7eb", linewidth=0.6)
    if lines:
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.12), ncols=4, fontsize=7.5, frameon=False, borderpad=0)


def draw_table(axes: Axes, panel: Json, lines: Series) -> None:
    """The last value of each line in a row of its own."""
    axes.axis("off")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    rows = [[name, written(values[-1], unit)] for name, values in sorted(lines.items()) if not isnan(values[-1])]
    if rows:
        axes.table(rows, loc="upper center", edges="open")


def draw(figure: Figure, panel: Json, rows: int, times: Sequence[float], lines: Series) -> None:
    """One panel in its place of Grafana's grid, of which the figure shows `rows`."""
    grid = panel["gridPos"]
    height = rows * ROW_IN + 0.4
    x, y = grid["x"] / COLUMNS, 1 - (grid["y"] + grid["h"]) * ROW_IN / height
    width, tall = grid["w"] / COLUMNS, grid["h"] * ROW_IN / height
    gap, line = 0.04 / WIDTH_IN, ROW_IN / height
    box = Rectangle(
        (x + gap, y + line / 8), width - 2 * gap, tall - line / 4, facecolor="white", edgecolor="#d5dae0", zorder=-1
    )
    figure.add_artist(box)
    figure.text(x + 4 * gap, y + tall - line * 0.75, panel["title"], fontsize=9, va="center")
    if panel["type"] == "table":
        return draw_table(figure.add_axes((x + 2 * gap, y, width - 4 * gap, tall - 1.5 * line)), panel, lines)
    if panel["type"] == "stat":
        # side by side, as Grafana has them
        share = (width - 4 * gap) / max(1, len(lines))
        for index, (name, values) in enumerate(sorted(lines.items())):
            inside = (x + 2 * gap + index * share, y + line / 4, share, tall - 1.5 * line)
            axes = figure.add_axes(inside)
            draw_figure(axes, panel, {name: values})
            if len(lines) > 1:
                label = name.rpartition("/")[2]
                axes.text(0.5, 0.08, label, transform=axes.transAxes, ha="center", fontsize=6, color="#5b6470")
        return None
    # a state-timeline has long names on its left, up to a third of it, and no legend below
    states = panel["type"] == "state-timeline"
    letters = min(max(map(len, lines), default=0), int(width / 3 * WIDTH_IN / LETTER_IN))
    left = max(0.042, (letters * LETTER_IN + 0.15) / WIDTH_IN) if states else 0.042
    below = line * (1 if states else 1.9)
    axes = figure.add_axes((x + left, y + below, width - left - 0.01, tall - 1.4 * line - below))
    minutes = [at for at in times if at % 60 == 0]
    marks = minutes[:: 1 + len(minutes) // 6]
    axes.set_xticks(marks, [datetime.fromtimestamp(at, UTC).strftime("%H:%M") for at in marks])
    if states:
        draw_states(axes, panel, times, lines, letters)
    else:
        draw_lines(axes, panel, times, lines)
    axes.set_xlim(times[0], times[-1])
    axes.tick_params(labelsize=NAME_PT, length=0, colors="#5b6470")
    axes.spines[:].set_visible(False)
    return None


def picture(
    path: Path, prometheus: httpx.Client, whole: Dashboard, sections: Sequence[str], minutes: float, ago: float
) -> None:
    """Writes the picture of the sections' panels over some minutes, which ended `ago` minutes before now.

    Raises httpx.HTTPError where Prometheus does not answer.
    """
    part = replace(whole, sections={name: panels for name, panels in whole.sections.items() if name in sections})
    shown = json.loads(rendered(part))["panels"]
    end = (time.time() - ago * 60) // STEP_S * STEP_S
    times = [end - minutes * 60 + at for at in range(0, round(minutes * 60) + 1, STEP_S)]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in shown)
    figure = pyplot.figure(figsize=(WIDTH_IN, rows * ROW_IN + 0.4), facecolor="#f4f5f7")
    for panel in shown:
        if panel["type"] == "row":
            down = (panel["gridPos"]["y"] + 0.5) * ROW_IN / (rows * ROW_IN + 0.4)
            figure.text(0.006, 1 - down, panel["title"], fontsize=11, weight="bold", va="center")
            continue
        lines: Series = {}
        for target in panel["targets"]:
            # a table names its rows by their labels
            labels = re.findall(r"^sum by \((.+?)\)", target["expr"])[0] if panel["type"] == "table" else ""
            rows_of = "".join(f"{{{{{label}}}}} " for label in labels.split(", ") if label)
            legend = {"legendFormat": f"{rows_of}{target['legendFormat']}"}
            lines |= series(prometheus, target | legend, times)
        draw(figure, panel, rows, times, lines)
    drawn = (
        f"Grafana's dashboard “{whole.title}”, drawn by `python -m lab.dashboard` from the data that Prometheus had on"
        f" {datetime.now(UTC):%Y-%m-%d} (times in UTC). Not a screenshot of Grafana."
    )
    figure.text(0.006, 0.18 / (rows * ROW_IN + 0.4), drawn, fontsize=8.5, color="#5b6470", va="center")
    image = BytesIO()
    figure.savefig(image, dpi=100)
    pyplot.close(figure)
    Image.open(image).convert("RGB").quantize(128).save(path, optimize=True)


def main(
    path: Annotated[Path, typer.Argument(help="The picture to write, a .png.")],
    name: Annotated[str, typer.Option("--dashboard", help=f"Which one: {', '.join(BY_NAME)}.")] = "fleet",
    section: Annotated[list[str] | None, typer.Option(help="Draw only these sections (several may be given).")] = None,
    url: Annotated[str, typer.Option(help="Where Prometheus answers.")] = "http://127.0.0.1:9090",
    minutes: Annotated[float, typer.Option(help="How many minutes the graphs show.")] = 15,
    ago: Annotated[float, typer.Option(help="How many minutes ago they end.")] = 0,
) -> None:
    """Draw a dashboard from a live Prometheus."""
    console = Console(stderr=True, soft_wrap=True)
    if name not in BY_NAME:
        console.print(f"no dashboard {name}: there are {', '.join(BY_NAME)}")
        raise typer.Exit(1)
    whole = BY_NAME[name]
    unknown = set(section or ()) - set(whole.sections)
    if unknown:
        console.print(f"no section {', '.join(sorted(unknown))}: there are {', '.join(whole.sections)}")
        raise typer.Exit(1)
    try:
        with httpx.Client(base_url=url, timeout=30) as prometheus:
            picture(path, prometheus, whole, section or list(whole.sections), minutes, ago)
    except httpx.HTTPError as error:
        console.print(f"Prometheus at {url} does not answer ({error}): is the stack up (make status)?")
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
