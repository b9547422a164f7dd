"""What the autoscaler saves over a day, and what users feel of it: a simulation of a fleet under a day's load.

    PYTHONPATH=.:scripts .venv/bin/python -m lab.autoscaling    # some minutes

The decisions are those of autoscaler/decide.py, every five simulated seconds, over what Prometheus would have seen.
Requests, queues and loads are simulated event by event, over two days of which the second counts: on the first the
autoscaler learns what a replica carries. Writes docs/benchmarks/autoscaling.md and its picture.
"""

from __future__ import annotations

import heapq
import math
import random
import re
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from statistics import quantiles
from typing import NamedTuple

import matplotlib
from matplotlib import pyplot

from autoscaler import timetable
from autoscaler.decide import Limits, Memory, Replica, Sample, choose, decide
from autoscaler.service import TURN_S
from lab.report import DOCS, provenance, table

SEED = 7
MOST = 4
DAY_S, DAYS = 86400.0, 2
BEGIN = datetime(2026, 11, 30, tzinfo=UTC)
# A replica, in the terms of lab/sim/engine.py: a step of the engine and what each sequence adds to it, a prompt's
# tokens a second, how many sequences it runs at once, and the KV cache. About a 7B model on one GPU of 24 GB.
STEP_S, SEQUENCE_S, PREFILL, SEATS, KV_TOKENS = 0.020, 0.0004, 5000.0, 32, 60_000
# At its peak a day keeps MOST of them about this busy.
BUSY = 0.7
# How far sizes spread about their medians, as the logarithm's deviation.
SPREAD = 0.8


class Shape(NamedTuple):
    """A day: how many times its peak is its mean and its valley, the hour of the peak, and the medians of prompts and
    answers in tokens."""

    over_mean: float
    over_valley: float
    peak_hour: float
    prompt: float
    answer: float


# Two services of Azure. The ratios are those of Stojkovic et al., DynamoLLM (arXiv 2408.00741, section III), the sizes
# those of Patel et al., Splitwise (arXiv 2311.18677, section III), both of traces that Azure published. What lies
# between the ratios, a cosine to a power, is ours.
SHAPES = {
    "Conversation": Shape(1.7, 3.3, 14.0, 1020, 129),
    "Coding": Shape(2.8, 34.6, 14.0, 1500, 13),
}


def exponent(shape: Shape) -> float:
    """The power of the cosine that gives the day its mean."""

    def mean(power: float) -> float:
        hours = [((1 + math.cos(2 * math.pi * minute / 1440)) / 2) ** power for minute in range(1440)]
        low = 1 / shape.over_valley
        return float(low + (1 - low) * sum(hours) / len(hours))

    low, high = 0.1, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > 1 / shape.over_mean else (low, middle)
    return low


@dataclass
class Engine:
    """A simulated replica: what it runs, what waits, and until when it computes prompts."""

    name: str
    ready_at: float = 0.0
    parked: bool = False
    stopped: bool = False
    running: int = 0
    tokens: float = 0.0
    queue: deque[tuple[float, float, float]] = field(default_factory=deque)
    prefill_until: float = 0.0
    started: float = 0.0


@dataclass
class Day:
    """What came of a day."""

    requests: int = 0
    ttft: list[float] = field(default_factory=list)
    replica_s: float = 0.0
    changes: int = 0
    longest_queue: float = 0.0
    # each five minutes: the hour, requests a second, replicas that run
    course: list[tuple[float, float, float]] = field(default_factory=list)


def arrivals(shape: Shape, rng: random.Random) -> list[tuple[float, float, float]]:
    """When each request comes, with its prompt and answer in tokens: a Poisson process whose rate wavers by itself."""
    mean = math.exp(SPREAD**2 / 2)
    # seconds of a replica that a request takes: its prompt alone, or its share of a full batch
    cost = max(mean * shape.prompt / PREFILL, mean * shape.answer * (STEP_S + SEQUENCE_S * SEATS) / SEATS)
    top = MOST * BUSY / cost
    low, power = 1 / shape.over_valley, exponent(shape)
    found = []
    at, waver, until = 0.0, 1.0, 0.0
    while (at := at + rng.expovariate(top * 1.5)) < DAYS * DAY_S:
        if at >= until:
            waver, until = min(1.5, max(0.5, rng.gauss(1, 0.1))), at + 300
        angle = 2 * math.pi * (at / 3600 - shape.peak_hour) / 24
        share = low + (1 - low) * ((1 + math.cos(angle)) / 2) ** power
        if rng.random() < share * waver / 1.5:
            prompt, answer = (median * rng.lognormvariate(0, SPREAD) for median in (shape.prompt, shape.answer))
            found.append((at, min(8000.0, prompt), min(1000.0, max(1.0, answer))))
    return found


class Fleet:
    """The fleet over the days. `limits`: of the autoscaler; None for a fleet of MOST. `load_s`: to load a model."""

    def __init__(self, limits: Limits | None, load_s: float) -> None:
        self.limits, self.load_s = limits, load_s
        self.engines = [Engine(f"vllm-{number}") for number in range(MOST)]
        self.memory = Memory(wanted=MOST, load_s=load_s)
        self.samples: deque[Sample] = deque(maxlen=int((max(600, 3 * load_s) + 60) / TURN_S))
        self.day = Day()
        # tokens of prompts and answers, of each turn of the last minute
        self.made: deque[float] = deque([0.0], maxlen=12)
        self.events: list[tuple[float, int, Engine, float]] = []
        self.order = count()

    def run(self, requests: list[tuple[float, float, float]]) -> Day:
        """The last day with these requests."""
        turn, course, counted = 0.0, 0.0, 0
        for request in [*requests, (DAYS * DAY_S, 0.0, 0.0)]:
            while min(turn, self.events[0][0] if self.events else math.inf) <= request[0]:
                if self.events and self.events[0][0] <= turn:
                    at, _, engine, tokens = heapq.heappop(self.events)
                    engine.running -= 1
                    engine.tokens -= tokens
                    self.made[-1] += tokens
                    self.admit(engine, at)
                    continue
                if turn == (DAYS - 1) * DAY_S:
                    self.day, counted = Day(), 0
                self.turn(turn)
                if turn >= course:
                    here = sum(not one.stopped for one in self.engines)
                    self.day.course.append((turn % DAY_S / 3600, (self.day.requests - counted) / 300, here))
                    course, counted = course + 300, self.day.requests
                turn += TURN_S
            if request[0] < DAYS * DAY_S:
                self.day.requests += 1
                serving = [one for one in self.engines if not one.parked and one.ready_at <= request[0]]
                engine = min(serving, key=lambda one: one.running + len(one.queue))
                engine.queue.append(request)
                self.admit(engine, request[0])
        return self.day

    def admit(self, engine: Engine, now: float) -> None:
        """Lets what waits run, as far as there are seats and room in the KV cache."""
        while engine.queue and engine.running < SEATS:
            came, prompt, answer = engine.queue[0]
            if engine.running and engine.tokens + prompt + answer > KV_TOKENS:
                return
            engine.queue.popleft()
            engine.running += 1
            engine.tokens += prompt + answer
            engine.prefill_until = max(engine.prefill_until, now) + prompt / PREFILL
            step = STEP_S + SEQUENCE_S * engine.running
            self.day.ttft.append(engine.prefill_until + step - came)
            over = engine.prefill_until + answer * step
            heapq.heappush(self.events, (over, next(self.order), engine, prompt + answer))

    def turn(self, now: float) -> None:
        """The autoscaler's turn."""
        self.day.replica_s += TURN_S * sum(not one.stopped for one in self.engines)
        serving = [one for one in self.engines if one.ready_at <= now and not one.stopped]
        waiting = sum(len(one.queue) for one in serving)
        self.day.longest_queue = max(self.day.longest_queue, waiting)
        if self.limits is None:
            return
        for one in self.engines:
            if one.parked and not one.stopped and not one.running and not one.queue:
                one.stopped = True
                self.memory = replace(self.memory, changed=now)
            if one.ready_at and now - TURN_S < one.ready_at <= now:
                self.memory = replace(self.memory, ready=now)
        kv = sum(one.tokens for one in serving) / KV_TOKENS
        rate = sum(self.made) / len(self.made) / TURN_S
        self.made.append(0.0)
        self.samples.append(Sample(now, waiting, sum(one.running for one in serving), kv, 0, rate))
        replicas = [self.seen(one, now) for one in self.engines]
        local = BEGIN + timedelta(seconds=now)
        found = decide(now, local, replicas, self.samples, self.limits, self.memory)
        if found.carries:
            self.memory = replace(self.memory, carries=found.carries, carries_at=now)
        self.memory = replace(self.memory, wanted=found.wanted)
        start, stop = choose(found.wanted, replicas, self.limits, self.memory)
        for one in self.engines:
            if one.name in start + stop:
                self.day.changes += 1
                self.memory = replace(self.memory, changed=now)
                one.parked = one.name in stop
                if one.name in start and one.stopped:
                    one.stopped, one.ready_at, one.started = False, now + self.load_s, now

    @staticmethod
    def seen(one: Engine, now: float) -> Replica:
        """A replica as the gateway would tell of it."""
        if one.parked:
            return Replica(one.name, "stopped" if one.stopped else "draining", one.running, parked=True)
        if one.ready_at > now:
            return Replica(one.name, "loading", loading_s=now - one.started)
        return Replica(one.name, "ready", one.running + len(one.queue))


ROWS = {
    "fixed": (None, 120.0),
    "autoscaler, a load takes 2 min": (Limits(1, MOST), 120.0),
    "autoscaler, a load takes 10 min": (Limits(1, MOST), 600.0),
    "with a timetable, 10 min": (Limits(1, MOST, timetable.counts("4=Mon-Sun 08:00-20:00")), 600.0),
}

INTRO = """# Autoscaling

Written by `python -m lab.autoscaling`. A simulated day of a fleet of {most} replicas: all of them running all day, or
as many as [the autoscaler](../guide.md#run-only-the-replicas-that-are-needed) decides. Its decisions are the real ones
(autoscaler/decide.py), every five seconds; the replicas are simulated. Nothing here was measured on an engine.

The day's peak over its mean and its valley, and the requests' sizes, are those of two services of Azure, as papers on
their published traces give them: Conversation {conversation}, Coding {coding} (lab/autoscaling.py names the papers;
the curve between is ours). At the peak {most} replicas are about {busy:.0%} busy. A replica takes {seats} requests at
once. The autoscaler may go down to one. A day before this one, which is not counted, it has learned what one carries.
"""
AFTER = """
TTFT is the time to the first token, from when a request comes. A change is a replica that is started or drained.

![Requests a second and running replicas over the day](autoscaling.svg)
"""


def draw(days: dict[str, dict[str, Day]]) -> None:
    """The picture: each shape's load, and the replicas that ran."""
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "vllm-fleet", "font.size": 9})
    figure, axes = pyplot.subplots(len(days), 1, figsize=(8, 5.5), sharex=True, layout="constrained")
    for axis, (name, rows) in zip(axes, days.items(), strict=True):
        # a point in twenty minutes is as much as one sees
        course = rows["fixed"].course[:: max(1, len(rows["fixed"].course) // 72)]
        axis.fill_between([hour for hour, *_ in course], [rate for _, rate, _ in course], color="#c7cedb", lw=0)
        axis.set_ylabel(f"{name}\nrequests/s")
        right = axis.twinx()
        right.set_ylabel("replicas")
        right.set_ylim(0, MOST + 0.3)
        right.set_yticks(range(MOST + 1))
        for label, colour in zip(list(ROWS)[1:], ("#5e81ac", "#d08770", "#a3be8c"), strict=True):
            steps = [(hour, replicas) for hour, _, replicas in rows[label].course]
            changes = [one for one, before in zip(steps[1:], steps, strict=False) if one[1] != before[1]]
            hours, here = zip(steps[0], *changes, steps[-1], strict=True)
            right.step(hours, here, where="post", color=colour, label=label)
    figure.axes[-1].legend(loc="lower right", fontsize=8)
    axes[-1].set_xlabel("hour of the day")
    axes[-1].set_xlim(0, 24)
    axes[-1].set_xticks(range(0, 25, 3))
    picture = DOCS / "autoscaling.svg"
    figure.savefig(picture, metadata={"Date": None})
    # a hundredth of a point is finer than any screen
    picture.write_text(re.sub(r"(\.\d\d)\d+", r"\1", picture.read_text()))
    pyplot.close(figure)


def simulate(shape: Shape, seed: int = SEED) -> dict[str, Day]:
    """The day of each row."""
    requests = arrivals(shape, random.Random(seed))
    return {name: Fleet(*row).run(requests) for name, row in ROWS.items()}


def main() -> None:
    """Simulates, and writes the page and its picture."""
    days = {name: simulate(shape) for name, shape in SHAPES.items()}
    ratio = {name: f"{shape.over_mean} and {shape.over_valley}" for name, shape in SHAPES.items()}
    text = INTRO.format(most=MOST, conversation=ratio["Conversation"], coding=ratio["Coding"], busy=BUSY, seats=SEATS)
    text += "\n" + provenance(["simulated replicas"], SEED)
    for name, rows in days.items():
        text += f"\n## {name}: {rows['fixed'].requests:,} requests\n\n"
        head = ["", "replica-hours", "saved", "TTFT p50", "p90", "p99", "longest queue", "changes"]
        lines = []
        for row, day in rows.items():
            cuts = quantiles(day.ttft, n=100)
            saved = 1 - day.replica_s / rows["fixed"].replica_s
            lines.append([
                row, f"{day.replica_s / 3600:.1f}", f"{saved:.0%}",
                *(f"{cuts[share - 1]:.2f} s" for share in (50, 90, 99)),
                f"{day.longest_queue:.0f}", str(day.changes),
            ])  # fmt: skip
        text += table(head, lines)
    (DOCS / "autoscaling.md").write_text(text + AFTER)
    draw(days)
    print(text)


if __name__ == "__main__":
    main()
