"""The drawn dashboard: what a picture in the docs shows can be read."""

import json
from itertools import pairwise
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from grafana.render import rendered
from lab.dashboard import BY_NAME, WIDTH_IN, draw

TIMES = [float(at) for at in range(0, 241, 5)]
STATES = [panel for panel in json.loads(rendered(BY_NAME["fleet"]))["panels"] if panel["type"] == "state-timeline"]


@pytest.mark.parametrize("panel", STATES, ids=lambda panel: panel["title"])
@pytest.mark.parametrize(
    "names",
    [
        ["vllm-0"],
        [f"vllm-{number}" for number in range(6)],
        [f"vllm-of-a-host-with-a-long-name-{number}" for number in range(40)],
        [f"{'long-' * 40}{number}" for number in range(3)],
    ],
    ids=["one", "six", "forty", "long"],
)
def test_the_names_of_state_bars_overlap_neither_each_other_nor_their_panel(
    panel: dict[str, Any], names: list[str]
) -> None:
    """Some bars may go without their names where there are many, but never without all."""
    figure = pyplot.figure(figsize=(WIDTH_IN, 5))
    panel = panel | {"gridPos": panel["gridPos"] | {"x": 0, "y": 0}}
    draw(figure, panel, 18, TIMES, dict.fromkeys(names, [1.0] * len(TIMES)))
    figure.canvas.draw()
    (axes,) = figure.axes
    labels: list[Text] = [label for label in axes.get_yticklabels() if label.get_text()]
    boxes: list[Bbox] = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    pyplot.close(figure)
    assert labels
    assert labels[0].get_text()[-8:] == min(names)[-8:]
    for lower, upper in pairwise(boxes):
        assert lower.y1 <= upper.y0
    assert min(box.x0 for box in boxes) > 0
    assert max(box.x1 for box in boxes) < axes.get_window_extent().x0
