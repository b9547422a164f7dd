"""The reports' pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.bench.peers import OURS

matplotlib.use("svg")
# Else the names inside a picture are new each time. With no date in it either, the same figures give the same file.
matplotlib.rcParams["svg.hashsalt"] = "vllm-fleet"
COLOURS = (
    *("#4c566a", "#9aa5b8", "#c7cedb", "#5e81ac", "#81a1c1", "#a3be8c", "#d08770", "#b48ead", "#ebcb8b", "#88c0d0"),
    "#8fbcbb",
)


def bars(
    path: Path, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], log: bool = False
) -> None:
    """A picture of grouped bars, one group for each of `groups`."""
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.85 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [group + index * width for group in range(len(groups))]
        axes.bar(places, values, width, label=name, color=colour(name, index))
    axes.set_xticks([group + 0.425 - width / 2 for group in range(len(groups))], groups)
    axes.set_ylabel(title)
    if log:
        axes.set_yscale("log")
    finish(figure, axes, path)


def line(path: Path, across: str, up: str, places: Sequence[float], series: Mapping[str, Sequence[float]]) -> None:
    """A picture of lines."""
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
