"""The simulated day: it has the shape that it says, and every request of it is answered."""

import math
import random

import pytest

from autoscaler.decide import Limits
from lab import autoscaling
from lab.autoscaling import DAY_S, SHAPES, Fleet, Shape, exponent


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_day_has_the_ratios_that_it_is_given(shape: Shape) -> None:
    low, power = 1 / shape.over_valley, exponent(shape)
    day = [low + (1 - low) * ((1 + math.cos(2 * math.pi * n / 1440)) / 2) ** power for n in range(1440)]
    assert max(day) / min(day) == pytest.approx(shape.over_valley, rel=0.01)
    assert max(day) / (sum(day) / len(day)) == pytest.approx(shape.over_mean, rel=0.01)


def test_no_request_is_lost_while_replicas_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet first part takes replicas out, a burst brings them back, and each request gets its first token."""
    monkeypatch.setattr(autoscaling, "DAYS", 1)
    rng = random.Random(1)
    quiet = [(at, 100.0, 20.0) for at in range(0, 12_000, 20)]
    burst = [(12_000 + at / 40, rng.uniform(500, 2000), 100.0) for at in range(24_000)]
    requests = quiet + burst
    day = Fleet(Limits(1, autoscaling.MOST), 120).run(requests)
    assert day.requests == len(day.ttft) == len(requests)
    assert min(here for _, _, here in day.course) == 1
    assert max(here for _, _, here in day.course) == autoscaling.MOST
    assert day.replica_s < autoscaling.MOST * DAY_S
    assert min(day.ttft) > 0
