"""How many replicas there should be: a pure function of what was seen in the last minutes. Nothing here looks or acts.

More at once: where requests wait, where replicas refuse, where KV caches are full, or where replicas compute nearly as
many tokens a second as they did when requests last waited, for UP_S. What loads already counts, so a queue that grows
while a replica loads does not call for one more. Fewer slowly: one at a time, and only when the busiest minute of a
whole window would leave the others room to spare. The window is longer than a load, and begins anew with each change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from math import ceil
from typing import Literal

from autoscaler import timetable

# Pressure that lasts so long is no accident of one scheduling step.
UP_S = 15.0
# A replica that has just come has taken over its share by then.
SETTLE_S = 30.0
# The shortest time that has to be quiet before a replica is stopped; three loads, where they take longer.
DOWN_S = 600.0
LOADS = 3
# KV caches this full are about to be too small, and this full they have room for a neighbour's load.
KV_HIGH, KV_LOW = 0.9, 0.6
# The share of what a replica carries from which on one more is needed, and that one less may leave the others with.
BUSY_HIGH, BUSY_LOW = 0.85, 0.65
# What a replica carries is forgotten after a day: the traffic may have changed. Within an hour the most counts.
KNOWN_S, HOUR_S = 86400.0, 3600.0
# A replica that has come shows in the tokens of the last minute only then.
LEARN_S = 90.0
# Loading for longer than a few loads is not loading. The second is where no load was seen yet.
PATIENCE_LOADS, PATIENCE_S, LOAD_S = 3, 900.0, 120.0
# What the gateway says of a replica that has been started: its container has no address yet, then its model loads.
ON_THE_WAY = ("loading", "unreachable")
# Samples may lie so far apart, and a window may lack so much at its beginning.
GAP_S = 60.0
MINUTE = 60.0

Cause = Literal["steady", "queue", "full", "kv", "busy", "idle", "timetable", "bounds", "lost", "blind"]


@dataclass(frozen=True)
class Limits:
    """The bounds, and the timetable of the least."""

    least: int
    most: int
    entries: tuple[timetable.Entry, ...] = ()

    def floor(self, now: datetime, lead_s: float) -> int:
        """The least that has to be there now, or in so many seconds: a replica needs as long to load."""
        planned = timetable.most(self.entries, now, timedelta(seconds=lead_s))
        return min(max(self.least, planned), self.most)


@dataclass(frozen=True)
class Replica:
    """A replica as it is now. `parked`: out of the route by the autoscaler's word, to be stopped or stopped already.
    `loading_s`: for how long it has been on its way to ready."""

    name: str
    state: str
    in_flight: int = 0
    parked: bool = False
    loading_s: float | None = None


@dataclass(frozen=True)
class Sample:
    """The fleet at a time, in seconds of any clock: requests that wait and that run, KV use in replicas' worth, the
    requests a second that were refused because all were full, and the tokens a second, of prompts and answers, of the
    minute before."""

    at: float
    waiting: float
    running: float
    kv: float
    refused: float
    tokens: float


@dataclass(frozen=True)
class Memory:
    """What is kept between two looks, and over restarts. Times are those of the samples' clock."""

    wanted: int = 0
    # of the last change, and of when a replica last became ready
    changed: float = 0.0
    ready: float = 0.0
    # seconds that a load took; 0 before the first
    load_s: float = 0.0
    # tokens a second that a replica made when requests waited, and when that was
    carries: float = 0.0
    carries_at: float = 0.0

    @property
    def load(self) -> float:
        """How long a load takes, in seconds."""
        return self.load_s or LOAD_S

    @property
    def window_s(self) -> float:
        """How long it has to be quiet before a replica is stopped."""
        return max(DOWN_S, LOADS * self.load)

    @property
    def patience_s(self) -> float:
        """How long a replica may load and still be counted."""
        return max(PATIENCE_S, PATIENCE_LOADS * self.load)


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be, and why: as a word that metrics have, and as a sentence."""

    wanted: int
    cause: Cause
    why: str
    # the tokens a second that a replica was seen to carry just now; 0 where that was not to be seen
    carries: float = 0.0


def capacity(replicas: Sequence[Replica], memory: Memory) -> tuple[list[Replica], list[Replica]]:
    """The replicas that take requests, and those on their way to that. One that is wedged, unreachable, drained by the
    operator or loads for too long is neither."""
    here = [one for one in replicas if not one.parked]
    serving = [one for one in here if one.state == "ready"]
    coming = [
        one
        for one in here
        if one.state in ON_THE_WAY and one.loading_s is not None and one.loading_s <= memory.patience_s
    ]
    return serving, coming


def decide(
    now: float, local: datetime, replicas: Sequence[Replica], samples: Sequence[Sample], limits: Limits, memory: Memory
) -> Decision:
    """How many replicas there should be. `samples` are in their order in time, up to now. The result is within the
    bounds whatever was seen."""
    serving, coming = capacity(replicas, memory)
    have = len(serving) + len(coming)
    floor = limits.floor(local, memory.load + MINUTE)
    base = min(max(memory.wanted, have, floor), limits.most)
    if base > max(have, memory.wanted):
        cause: Cause = "timetable" if floor > limits.least else "bounds"
        return Decision(base, cause, f"at least {floor} are to be there now, or when one has loaded")
    if have > limits.most:
        return Decision(limits.most, "bounds", f"{have} are there, and at most {limits.most} may be")
    if serving:
        cause, why = pressure(now, samples, len(serving), memory)
        if cause != "steady":
            return more(now, samples, len(serving), coming, base, limits, memory, cause, why)
    lost = [one.name for one in replicas if not one.parked and one not in serving and one not in coming]
    if have < base:
        return Decision(base, "lost", f"{', '.join(lost) or 'one'} does not serve, and {base} are needed")
    return fewer(now, samples, serving, coming, base, floor, memory)


def carried(now: float, memory: Memory) -> float:
    """The tokens a second that a replica is known to carry; 0 where that is not known."""
    return memory.carries if now - memory.carries_at < KNOWN_S else 0.0


def pressure(now: float, samples: Sequence[Sample], serving: int, memory: Memory) -> tuple[Cause, str]:
    """What says that there are too few, in all samples of the last UP_S; "steady" where nothing does."""
    recent = [one for one in samples if one.at > now - UP_S]
    if not recent or now - recent[-1].at > UP_S or len(recent) < 2:
        return "steady", ""
    if any(one.refused > 0 for one in recent):
        return "full", "requests are refused, as every replica is full"
    waiting = min(one.waiting for one in recent)
    if waiting >= serving:
        return "queue", f"{waiting:.0f} requests or more have waited for {UP_S:.0f} s"
    kv = min(one.kv for one in recent) / serving
    if kv >= KV_HIGH:
        return "kv", f"the KV caches have been {kv:.0%} full for {UP_S:.0f} s"
    known = carried(now, memory)
    if known and (busy := min(one.tokens for one in recent) / serving / known) > BUSY_HIGH:
        return "busy", f"replicas make {busy:.0%} of the tokens a second that they can"
    return "steady", ""


def more(
    now: float,
    samples: Sequence[Sample],
    serving: int,
    coming: Sequence[Replica],
    base: int,
    limits: Limits,
    memory: Memory,
    cause: Cause,
    why: str,
) -> Decision:
    """There are too few: what is to be done, with what was learned of how much a replica carries."""
    last = samples[-1]
    seen = last.tokens / serving if cause == "queue" and now - max(memory.ready, memory.changed) >= LEARN_S else 0.0
    carries = max(seen, memory.carries) if seen and now - memory.carries_at < HOUR_S else seen
    if coming:
        return Decision(base, cause, f"{why}; {coming[0].name} is on its way", carries)
    if now - memory.ready < (LEARN_S if cause == "busy" else SETTLE_S):
        return Decision(base, cause, f"{why}; the newest replica has just come", carries)
    if cause == "busy":
        need = serving + 1
    else:
        # twice as many at most: what waits now is gone when they have come
        factor = (last.running + last.waiting) / last.running if last.running else 2.0
        need = min(max(ceil(serving * min(factor, 2.0)), serving + 1), 2 * serving)
    wanted = min(max(base, need), limits.most)
    if wanted == base:
        return Decision(wanted, cause, f"{why}; no more than {limits.most} may be there", carries)
    return Decision(wanted, cause, why, carries)


def fewer(
    now: float,
    samples: Sequence[Sample],
    serving: Sequence[Replica],
    coming: Sequence[Replica],
    base: int,
    floor: int,
    memory: Memory,
) -> Decision:
    """One less, if a whole window says that the others would carry it; else what keeps it from being so."""
    left = len(serving) - 1
    if coming or left < floor or left < 1 or base > len(serving):
        return Decision(base, "steady", "as many as there are to be")
    since = now - memory.window_s
    if memory.changed > since or memory.ready > since:
        return Decision(base, "steady", f"the last change is less than {memory.window_s:.0f} s ago")
    window = [one for one in samples if one.at >= since]
    edges = [since, *(one.at for one in window), now]
    if max(later - earlier for earlier, later in pairwise(edges)) > GAP_S:
        return Decision(base, "steady", f"not all of the last {memory.window_s:.0f} s was seen")
    if any(one.refused > 0 for one in window):
        return Decision(base, "steady", "requests were refused lately")
    minutes = by_minute(window, now)
    waited = max(minute.waiting for minute in minutes)
    if waited >= 1:
        return Decision(base, "steady", f"{waited:.0f} requests waited in the busiest minute")
    kv = max(minute.kv for minute in minutes) / left
    if kv > KV_LOW:
        return Decision(base, "steady", f"one less would fill the KV caches to {kv:.0%}")
    known = carried(now, memory)
    if known and (busy := max(minute.tokens for minute in minutes) / left / known) > BUSY_LOW:
        return Decision(base, "steady", f"one less would make the others {busy:.0%} busy")
    return Decision(
        base - 1, "idle", f"the busiest of the last {memory.window_s / MINUTE:.0f} minutes fits into one less"
    )


def by_minute(samples: Sequence[Sample], now: float) -> list[Sample]:
    """The means of each minute before `now`."""
    groups: dict[int, list[Sample]] = {}
    for one in samples:
        groups.setdefault(int((now - one.at) // MINUTE), []).append(one)
    return [
        Sample(
            now - number * MINUTE,
            *(
                sum(getattr(one, name) for one in group) / len(group)
                for name in ("waiting", "running", "kv", "refused", "tokens")
            ),
        )
        for number, group in groups.items()
    ]


def choose(wanted: int, replicas: Sequence[Replica], limits: Limits, memory: Memory) -> tuple[list[str], list[str]]:
    """The replicas to start (or to leave in the route after all), and those to drain and stop, so that `wanted` serve.

    What does not serve has a container too: all that are not parked are never more than the bounds allow. A replica
    that still drains comes before one that would have to load.
    """
    serving, coming = capacity(replicas, memory)
    here = sum(not one.parked for one in replicas)
    missing = min(wanted - len(serving) - len(coming), limits.most - here)
    if missing > 0:
        parked = sorted((one for one in replicas if one.parked), key=lambda one: (one.state == "stopped", one.name))
        return [one.name for one in parked[:missing]], []
    surplus = min(len(serving) + len(coming) - wanted, len(serving) - 1)
    if surplus > 0:
        idlest = sorted(serving, key=lambda one: one.name, reverse=True)
        idlest.sort(key=lambda one: one.in_flight)
        return [], [one.name for one in idlest[:surplus]]
    return [], []
