"""How many replicas the autoscaler wants: at once more, slowly fewer, never out of its bounds."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler import timetable
from autoscaler.decide import (
    DOWN_S,
    SETTLE_S,
    Decision,
    Limits,
    Memory,
    Replica,
    Sample,
    capacity,
    choose,
    decide,
)

NOW = 1_000_000.0
# a Monday
LOCAL = datetime(2026, 11, 30, 7, 0, tzinfo=UTC)
STATES = ("ready", "loading", "wedged", "unreachable", "draining", "stopped", "unknown")


def ready(count: int, parked: int = 0) -> list[Replica]:
    """So many that are ready, and behind them so many that are stopped."""
    here = [Replica(f"vllm-{number}", "ready") for number in range(count)]
    return here + [Replica(f"vllm-{count + number}", "stopped", parked=True) for number in range(parked)]


def load(
    waiting: float = 0,
    running: float = 1,
    kv: float = 0.1,
    refused: float = 0,
    tokens: float = 100,
    seconds: float = 1000,
) -> list[Sample]:
    """The same load for so long."""
    return [Sample(NOW - ago, waiting, running, kv, refused, tokens) for ago in range(int(seconds), -1, -5)]


def decided(
    replicas: Sequence[Replica],
    samples: Sequence[Sample],
    limits: Limits | None = None,
    memory: Memory | None = None,
    local: datetime = LOCAL,
) -> Decision:
    here = sum(not one.parked for one in replicas)
    return decide(NOW, local, replicas, samples, limits or Limits(1, len(replicas)), memory or Memory(wanted=here))


@pytest.mark.parametrize(
    ("samples", "cause"),
    [
        (load(waiting=2, running=8), "queue"),
        (load(refused=0.2), "full"),
        (load(kv=1.9), "kv"),
    ],
)
def test_pressure_calls_for_one_more_at_once(samples: list[Sample], cause: str) -> None:
    found = decided(ready(2, 1), samples)
    assert (found.wanted, found.cause) == (3, cause)


@pytest.mark.parametrize(
    "samples",
    [
        load(waiting=1, running=8),  # less than one a replica
        load(kv=1.7),
        [*load(seconds=1000)[:-1], Sample(NOW, 30, 8, 1, 0, 100)],  # one look
        [one for one in load(waiting=9) if one.at < NOW - 20],  # nothing new
        [],
    ],
)
def test_what_is_no_lasting_pressure_calls_for_none(samples: list[Sample]) -> None:
    assert decided(ready(2, 1), samples).wanted == 2


def test_a_long_queue_calls_for_twice_as_many_and_no_more() -> None:
    assert decided(ready(2, 6), load(waiting=80, running=16)).wanted == 4
    assert decided(ready(4, 4), load(waiting=8, running=16)).wanted == 6
    assert decided(ready(2, 6), load(waiting=80, running=16), Limits(1, 3)).wanted == 3


def test_what_loads_already_counts_for_as_long_as_a_load_may_take() -> None:
    samples = load(waiting=80, running=16)
    loading = [*ready(2), Replica("vllm-2", "loading", loading_s=100), *ready(0, 3)[:1]]
    assert decided(loading, samples).wanted == 3
    late = [replace(one, loading_s=901.0) if one.loading_s else one for one in loading]
    found = decided([*late, Replica("vllm-9", "stopped", parked=True)], samples)
    assert found.wanted == 4
    # a large model takes longer
    assert decided(late, samples, memory=Memory(wanted=3, load_s=400)).wanted == 3


def test_the_newest_has_its_time_to_take_over_a_share() -> None:
    samples = load(waiting=9, running=16)
    assert decided(ready(2, 1), samples, memory=Memory(wanted=2, ready=NOW - SETTLE_S + 1)).wanted == 2
    assert decided(ready(2, 1), samples, memory=Memory(wanted=2, ready=NOW - SETTLE_S)).wanted == 3


@pytest.mark.parametrize("state", ["wedged", "unreachable", "draining"])
def test_what_does_not_serve_is_no_capacity(state: str) -> None:
    """With a stopped one at hand, that takes its place; there are never more containers than the bounds allow."""
    fleet = [*ready(1), Replica("vllm-1", state), Replica("vllm-2", "stopped", parked=True)]
    found = decided(fleet, load(), memory=Memory(wanted=2))
    assert (found.wanted, found.cause) == (2, "lost")
    assert choose(2, fleet, Limits(1, 3), Memory()) == (["vllm-2"], [])
    assert choose(2, fleet, Limits(1, 2), Memory()) == ([], [])


def test_one_goes_when_a_whole_window_fits_into_the_others() -> None:
    found = decided(ready(3), load(running=4, kv=0.5))
    assert (found.wanted, found.cause) == (2, "idle")


@pytest.mark.parametrize(
    ("samples", "memory", "why"),
    [
        (load(seconds=DOWN_S - 70), Memory(), "not all of the last 600 s was seen"),
        ([one for one in load() if not NOW - 300 < one.at < NOW - 200], Memory(), "not all"),
        (load(), Memory(changed=NOW - DOWN_S + 1), "the last change is less than 600 s ago"),
        (load(), Memory(ready=NOW - DOWN_S + 1), "the last change"),
        (load(seconds=1500), Memory(changed=NOW - 700, load_s=300), "less than 900 s ago"),
        (load(kv=1.3), Memory(), "one less would fill the KV caches to 65%"),
        (load(tokens=1400), Memory(carries=1000, carries_at=NOW - 5000), "one less would make the others 70% busy"),
        (
            [replace(one, waiting=30) if 100 < NOW - one.at < 170 else one for one in load()],
            Memory(),
            "requests waited",
        ),
        ([replace(one, refused=0.1) if NOW - one.at == 500 else one for one in load()], Memory(), "refused lately"),
    ],
)
def test_none_goes_before_all_speaks_for_it(samples: list[Sample], memory: Memory, why: str) -> None:
    found = decided(ready(3), samples, memory=replace(memory, wanted=3))
    assert found.wanted == 3
    assert why in found.why


def test_what_a_replica_carries_is_learned_from_a_queue_and_forgotten_after_a_day() -> None:
    samples = load(waiting=9, running=24, tokens=2400)
    assert decided(ready(2), samples).carries == 1200
    # the most of an hour, but not of yesterday
    assert decided(ready(2), samples, memory=Memory(2, carries=1500, carries_at=NOW - 3000)).carries == 1500
    assert decided(ready(2), samples, memory=Memory(2, carries=1500, carries_at=NOW - 4000)).carries == 1200
    # one that has just come has not shown yet what it makes
    assert decided(ready(2), samples, memory=Memory(2, ready=NOW - 60)).carries == 0
    old = Memory(wanted=3, carries=1000, carries_at=NOW - 90_000)
    assert decided(ready(3), load(tokens=1400), memory=old).wanted == 2


def test_what_is_known_to_be_too_much_is_not_waited_for() -> None:
    """One more comes before requests wait, where it is known how much a replica carries."""
    known = Memory(wanted=2, carries=1000, carries_at=NOW - 5000)
    found = decided(ready(2, 2), load(tokens=1750), memory=known)
    assert (found.wanted, found.cause) == (3, "busy")
    assert decided(ready(2, 2), load(tokens=1650), memory=known).wanted == 2
    assert decided(ready(2, 2), load(tokens=1750), memory=replace(known, ready=NOW - 80)).wanted == 2


def test_the_last_ones_stay() -> None:
    assert decided(ready(1), load(running=0)).wanted == 1
    assert decided(ready(2), load(running=0), Limits(2, 2)).wanted == 2


def test_the_timetable_is_obeyed_in_time_for_a_load() -> None:
    limits = Limits(1, 4, timetable.counts("3=Mon-Fri 08:00-18:00"))
    memory = Memory(wanted=1, load_s=600)
    early = decided(ready(1, 3), load(), limits, memory, LOCAL.replace(hour=7, minute=48))
    assert early.wanted == 1
    found = decided(ready(1, 3), load(), limits, memory, LOCAL.replace(hour=7, minute=49))
    assert (found.wanted, found.cause) == (3, "timetable")
    # nothing is stopped while it is in force, nor just before
    assert decided(ready(3, 1), load(), limits, local=LOCAL.replace(hour=12)).wanted == 3
    assert decided(ready(3, 1), load(), limits, local=LOCAL.replace(hour=18)).wanted == 2


def test_more_than_the_bounds_allow_are_taken_out_at_once() -> None:
    found = decided(ready(4), load(waiting=9), Limits(1, 2))
    assert (found.wanted, found.cause) == (2, "bounds")
    assert choose(2, ready(4), Limits(1, 2), Memory()) == ([], ["vllm-3", "vllm-2"])


def test_the_idlest_goes_and_what_still_drains_comes_back_first() -> None:
    fleet = [Replica("vllm-0", "ready", 3), Replica("vllm-1", "ready", 1), Replica("vllm-2", "ready", 2)]
    assert choose(2, fleet, Limits(1, 3), Memory()) == ([], ["vllm-1"])
    drains = [*ready(1), Replica("vllm-1", "stopped", parked=True), Replica("vllm-2", "draining", 4, parked=True)]
    assert choose(2, drains, Limits(1, 3), Memory()) == (["vllm-2"], [])


def replicas_of(states: Iterable[tuple[str, bool, int]]) -> list[Replica]:
    return [
        Replica(f"vllm-{number}", state, in_flight, parked, 50.0 if state == "loading" else None)
        for number, (state, parked, in_flight) in enumerate(states)
    ]


fleets = st.lists(st.tuples(st.sampled_from(STATES), st.booleans(), st.integers(0, 50)), min_size=1, max_size=8).map(
    replicas_of
)
loads = st.lists(
    st.builds(
        Sample,
        st.floats(NOW - 2000, NOW),
        st.floats(0, 500),
        st.floats(0, 500),
        st.floats(0, 8),
        st.floats(0, 5),
        st.floats(0, 50_000),
    ),
    max_size=60,
).map(lambda samples: sorted(samples, key=lambda one: one.at))
memories = st.builds(
    Memory,
    st.integers(0, 12),
    st.floats(0, NOW),
    st.floats(0, NOW),
    st.floats(0, 2000),
    st.floats(0, 10_000),
    st.floats(0, NOW),
)


@given(fleets, loads, memories, st.data())
@settings(max_examples=200)
def test_whatever_is_seen_the_bounds_hold(
    fleet: list[Replica], samples: list[Sample], memory: Memory, data: st.DataObject
) -> None:
    most = data.draw(st.integers(1, len(fleet)))
    limits = Limits(data.draw(st.integers(1, most)), most, timetable.counts("5=Mon 06:00-09:00"))
    found = decide(NOW, LOCAL, fleet, samples, limits, memory)
    assert limits.least <= found.wanted <= limits.most
    assert found.why
    start, stop = choose(found.wanted, fleet, limits, memory)
    assert not (start and stop)
    by_name = {one.name: one for one in fleet}
    assert all(by_name[name].parked for name in start)
    assert all(by_name[name].state == "ready" and not by_name[name].parked for name in stop)
    here = sum(not one.parked for one in fleet)
    assert here + len(start) <= max(most, here)
    serving, _ = capacity(fleet, memory)
    assert not stop or len(serving) - len(stop) >= 1


@given(st.lists(st.floats(0, 300), min_size=20, max_size=200), st.integers(1, 6), st.floats(10, 60))
@settings(max_examples=30)
def test_no_load_makes_it_flap(demand: list[float], most: int, seats: float) -> None:
    """Over hours of any load: after any change nothing is stopped for a whole window, and one at a time at most."""
    memory = Memory(load_s=120)
    serving, coming, changes = 1, list[float](), list[tuple[float, int]]()
    samples: list[Sample] = []
    queue, at = 0.0, NOW
    for wanted_load in demand:
        for _ in range(12):  # a minute, in steps of five seconds
            at += 5
            for due in [due for due in coming if due <= at]:
                coming.remove(due)
                serving += 1
                memory = replace(memory, ready=at)
            running = min(wanted_load + queue, serving * seats)
            queue = max(0.0, wanted_load + queue - running) * 0.9
            samples.append(Sample(at, queue, running, running / seats, 0, 20 * running))
            fleet = [Replica(f"vllm-{number}", "ready") for number in range(serving)]
            fleet += [Replica(f"vllm-{serving + number}", "loading", 0, False, 10) for number in range(len(coming))]
            fleet += [Replica(f"vllm-{number}", "stopped", parked=True) for number in range(len(fleet), most)]
            found = decide(at, LOCAL, fleet, samples[-130:], Limits(1, most), memory)
            if found.carries:
                memory = replace(memory, carries=found.carries, carries_at=at)
            memory = replace(memory, wanted=found.wanted)
            start, stop = choose(found.wanted, fleet, Limits(1, most), memory)
            if start or stop:
                if stop:
                    assert len(stop) == 1
                    assert not changes or at - changes[-1][0] >= DOWN_S
                changes.append((at, len(start) - len(stop)))
                memory = replace(memory, changed=at)
                coming += [at + 120] * len(start)
                serving -= len(stop)
            assert 1 <= serving + len(coming) <= most
