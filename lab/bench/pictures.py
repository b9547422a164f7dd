"""The reports' charts, drawn from the tables in docs/benchmarks.

PYTHONPATH=scripts .venv/bin/python -m lab.bench.pictures    draws all of them anew
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.bench.peers import OURS
from lab.bench.workloads import WORKLOADS
from lab.report import DOCS

matplotlib.use("svg")
matplotlib.rcParams.update({
    # Text stays text. It is laid out by DejaVu Sans, the widest of these, so what a reader has instead fits too.
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    # Else the names inside a picture are new each time. With no date in it either, the same figures give the same file.
    "svg.hashsalt": "vllm-fleet",
})  # fmt: skip
COLOURS = (
    *("#4c566a", "#9aa5b8", "#c7cedb", "#5e81ac", "#81a1c1", "#a3be8c", "#d08770", "#b48ead", "#ebcb8b", "#88c0d0"),
    "#8fbcbb",
)


@dataclass(frozen=True)
class Table:
    """One table of a report: its header, and its rows as they stand there."""

    head: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> dict[str, float]:
        """The numbers below `name`, by the first cell of their row; units and brackets are left out."""
        at = self.head.index(name)
        return {row[0]: float(row[at].replace(",", "").split()[0].rstrip("%")) for row in self.rows}


def tables(report: Path) -> dict[str, Table]:
    """The tables of a report, each by the heading (or the bold line) that it stands under."""
    found: dict[str, Table] = {}
    heading = ""
    for line in report.read_text().splitlines():
        if title := re.fullmatch(r"#+ (.+)|\*\*(.+)\*\*", line):
            heading = title[1] or title[2]
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if heading not in found:
                found[heading] = Table(cells, [])
            elif not cells[0].startswith("---"):
                found[heading].rows.append(cells)
    return found


def draw(report: str) -> None:
    """Draws the charts of one report, `report` being its file's name in docs/benchmarks."""
    known = tables(DOCS / report)
    # in the reports a workload's name may begin with a capital letter
    cells = {name: known[title] for name in WORKLOADS for title in known if title.lower() == name.lower()}

    def workloads(file: str, column: str, title: str, log: bool = False) -> None:
        by_workload = [table.column(column) for table in cells.values()]
        series = {peer: [one[peer] for one in by_workload] for peer in by_workload[0]}
        bars(DOCS / file, title, list(cells), series, log)

    if report == "overhead.md":
        rates = known["Highest rate"]
        sizes = rates.head[1:-1]
        columns = [rates.column(size) for size in sizes]
        peers = [row[0] for row in rates.rows if row[0] != "direct"]
        series = {peer: [column[peer] for column in columns] for peer in peers}
        bars(DOCS / "overhead.svg", "highest rate, requests/s", sizes, series, log=True)
    elif report == "workloads.md":
        workloads("workloads-ttft.svg", "p90", "TTFT p90, ms", log=True)
        workloads("workloads-tokens.svg", "tokens/s", "tokens/s")
        workloads("workloads-hits.svg", "prefix hits", "prefix hits, %")
    elif report == "trace.md":
        (trace,) = known.values()
        waits = {"p50": trace.column("TTFT p50"), "p90": trace.column("p90"), "p99": trace.column("p99")}
        series = {peer: [column[peer] for column in waits.values()] for peer in waits["p50"]}
        bars(DOCS / "trace-ttft.svg", "TTFT, ms", list(waits), series)
    elif report == "memory.md":
        (samples,) = known.values()
        places = [float(row[0].replace(",", "")) for row in samples.rows]
        series = {kind: list(samples.column(f"{kind}, MiB").values()) for kind in ("private", "shared")}
        line(DOCS / "memory.svg", "requests", "MiB", places, series)


def bars(
    path: Path, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], log: bool = False
) -> None:
    """Grouped bars: one group for each of `groups`, in it one bar for each of `series`, which has a value a group."""
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.85 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [group + index * width for group in range(len(groups))]
        axes.bar(places, values, width, label=name, color=colour(name, index))
    axes.set_xticks([group + 0.425 - width / 2 for group in range(len(groups))], [fill(name, 14) for name in groups])
    axes.set_ylabel(title)
    if log:
        axes.set_yscale("log")
    finish(figure, axes, path)


def line(path: Path, across: str, up: str, places: Sequence[float], series: Mapping[str, Sequence[float]]) -> None:
    """Lines: each of `series` has a value for each of `places`; `across` and `up` name the axes."""
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for name, values in series.items():
        axes.plot(places, values, label=name)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(bottom=0)
    finish(figure, axes, path)


def colour(name: str, index: int) -> str:
    """This gateway stands out; the others keep one colour each."""
    return "#d62728" if name == OURS else COLOURS[index % len(COLOURS)]


def finish(figure: Figure, axes: Axes, path: Path) -> None:
    """Writes the chart, and closes it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    # One line a part, not one a corner.
    path.write_text(re.sub(r"\s*\n\s*(?!<g id|\s)", " ", path.read_text().strip()) + "\n")


if __name__ == "__main__":
    for report in ("overhead.md", "workloads.md", "trace.md", "memory.md"):
        draw(report)
