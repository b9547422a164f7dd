"""The report on fair shares."""

import math
import re

from lab.bench.fair import Shares, Waits, report, waits
from lab.sim.load import Outcome


def test_where_there_is_no_figure_the_report_says_why() -> None:
    """Of a run in which a prompt was not answered at all, and of a flood of which no request ended."""
    none, endless = waits([]), waits([Outcome(1.0, ended=61.0)])
    assert endless.p50 == endless.p90 == math.inf
    good = Waits(4, 0, 0.1, 0.2)
    alone = {500: good, 2000: good, 9000: endless}
    beside = {500: Waits(4, 0, 0.2, 0.3), 2000: endless, 9000: endless}
    text = report({"two": [Shares(alone, beside, none, 50.0) for _ in range(2)]})
    assert not re.search(r"\b(nan|inf)\b", text)
    assert "| two, 500 tokens | 100 | 200 | 200 | 300 | 1.50 × (1.50 to 1.50) | 16 | 0 |" in text
    assert "| two, 2,000 tokens | 100 | 200 | no answer | no answer | no answer × (no answer to no answer) |" in text
    assert "| two, 9,000 tokens | no answer | no answer | no answer | no answer | no answer alone | 4 | 4 |" in text
    assert "| two | 50 | no request ended |" in text


def test_a_request_without_a_whole_answer_is_lost() -> None:
    found = waits([Outcome(1.0, first=1.5, done=True), Outcome(1.0, first=2.5), Outcome(1.0, ended=9.0)])
    assert (found.requests, found.lost, found.p50, found.p90) == (3, 2, 1.5, math.inf)
