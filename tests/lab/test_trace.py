"""The trace of `make bench` has the shape that its docs name."""

from collections import Counter
from statistics import mean, stdev

import pytest

from lab.bench.workloads import BURST, FIRST, GOES_ON, SYSTEM, Sizes, Turn, draw, trace

PLAIN = Sizes()
TURNS = trace(seed=5, seconds=300, rate=8, sizes=PLAIN)


def prompts(turns: list[Turn]) -> list[int]:
    """Each prompt in tokens: all that was said in its conversation."""
    talks: Counter[int] = Counter()
    lengths = []
    for turn in turns:
        talks[turn.talk] += len(turn.says) // 4
        lengths.append(SYSTEM + talks[turn.talk])
        talks[turn.talk] += turn.tokens
    return lengths


def test_a_seed_gives_the_same_requests_and_another_seed_others() -> None:
    again, other = (trace(seed, 30, 8, PLAIN) for seed in (5, 6))
    assert again == trace(5, 30, 8, PLAIN)
    assert again != other


def test_requests_come_in_order_and_at_the_rate() -> None:
    dues = [turn.due for turn in TURNS]
    assert dues == sorted(dues)
    assert dues[-1] < 300
    assert len(TURNS) / 300 == pytest.approx(8, rel=0.15)


def test_prompts_are_as_long_as_those_of_the_published_trace() -> None:
    lengths = sorted(prompts(TURNS))
    assert lengths[0] >= FIRST[0] - 1
    assert lengths[-1] <= FIRST[-1] + 4
    # Published: 12,035 tokens on average; here without those above 30,000.
    assert mean(lengths) == pytest.approx(11_000, rel=0.1)
    assert lengths[len(lengths) // 2] == pytest.approx(8_500, rel=0.2)


def test_conversations_share_a_system_prompt_and_grow() -> None:
    assert len({turn.system for turn in TURNS}) == 1
    assert len(TURNS[0].system) == SYSTEM * 4
    later = 1 - len({turn.talk for turn in TURNS}) / len(TURNS)
    assert later == pytest.approx(GOES_ON, abs=0.06)


def test_requests_come_in_bursts() -> None:
    bursts = list(Counter(turn.due for turn in TURNS).values())
    assert mean(bursts) == pytest.approx(BURST, rel=0.15)
    assert stdev(bursts) > 3.3  # without bursts of their own size: 3.2


def test_a_draw_keeps_to_its_quantiles() -> None:
    class Always:
        def __init__(self, share: float) -> None:
            self.share = share

        def random(self) -> float:
            return self.share

    assert draw(Always(0.0), FIRST) == FIRST[0]  # type: ignore[arg-type]
    assert draw(Always(0.5), FIRST) == FIRST[4]  # type: ignore[arg-type]
    assert FIRST[-2] < draw(Always(0.999), FIRST) < FIRST[-1]  # type: ignore[arg-type]
