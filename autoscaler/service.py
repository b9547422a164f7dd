"""The autoscaler's loop: looks, decides, acts, and says what it did. A turn every TURN_S.

    python3 -m autoscaler.service

A replica is stopped in three steps. Its name goes into the file that the gateway reads, which drains it. When the
gateway says that nothing is in flight there, the switch stops its container. And it stays in the file, so that
everybody sees that it is stopped on purpose. If it is not empty within DRAIN_SECONDS, it goes back into the route.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import get_args

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from autoscaler import sources
from autoscaler.decide import Cause, Decision, Limits, Replica, capacity, carried, choose, decide
from autoscaler.settings import Mistake, Settings, read
from autoscaler.sources import Blind
from autoscaler.state import Kept, Parked, Store

TURN_S = 5.0
PORT = 9464
# A container that was told to stop has had its grace by then, and is told again.
AGAIN_S = 300.0


class Figures:
    """The autoscaler's own metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"autoscaler_{name}", what, labels, registry=registry)

        self.wanted = gauge("wanted_replicas", "Replicas that there should be.")
        self.serving = gauge("serving_replicas", "Replicas that take requests.")
        self.loading = gauge("loading_replicas", "Replicas on their way to that.")
        self.stopped = gauge("stopped_replicas", "Replicas that the autoscaler drains or has stopped.")
        self.least = gauge("least_replicas", "The least that there may be now, by MIN_REPLICAS and the timetable.")
        self.most = gauge("most_replicas", "The most that there may be.")
        self.blind = gauge("blind", "Whether it does not see enough, and holds still.")
        self.cause = gauge("cause", "Whether this is the cause of the last decision.", "cause")
        self.decided = gauge("decision_timestamp_seconds", "When it last decided.")
        self.carries = gauge("replica_tokens_per_second", "What a replica made when requests waited; 0 if not known.")
        self.load = gauge("load_seconds", "How long a replica took to load.")
        what = "Replicas started, stopped, or kept as they did not get empty."
        self.changes = Counter("autoscaler_changes", what, ["change"], registry=registry)
        for change in ("start", "stop", "kept"):
            self.changes.labels(change)

    def show(self, decision: Decision) -> None:
        """Takes a decision over."""
        self.wanted.set(decision.wanted)
        self.blind.set(decision.cause == "blind")
        self.decided.set_to_current_time()
        for cause in get_args(Cause):
            self.cause.labels(cause).set(cause == decision.cause)


class Autoscaler:
    """One autoscaler over its store. `clock` gives the seconds since 1970, `say` takes lines for the log."""

    def __init__(
        self,
        settings: Settings,
        client: httpx.Client,
        store: Store,
        figures: Figures,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings, self.client, self.store, self.figures = settings, client, store, figures
        self.say, self.clock = say, clock
        self.kept: Kept = store.load()
        self.said: tuple[int, str] | None = None

    def turn(self) -> Decision:
        """Looks, decides, acts, keeps; gives the decision. Where it cannot see it changes nothing."""
        now = self.clock()
        try:
            decision = self.look_and_act(now)
        except Blind as blind:
            decision = Decision(self.kept.memory.wanted, "blind", f"{blind}: nothing is changed")
            self.put_back(now, "it could not be seen getting empty")
        # also when blind: what is drained stays so, and the gateway sees that this lives
        self.store.keep(self.kept)
        self.figures.show(decision)
        if self.said != (decision.wanted, decision.cause):
            self.said = (decision.wanted, decision.cause)
            self.say(json.dumps({"decision": decision.wanted, "cause": decision.cause, "why": decision.why}))
        return decision

    def look_and_act(self, now: float) -> Decision:
        """The turn itself. Blind where somebody does not answer; what was not begun then is not done."""
        fleet = sources.fleet(self.client)
        running = sources.containers(self.client)
        if sources.models(self.client) > 1:
            raise Blind("the replicas serve several models, and the autoscaler is for one")
        self.take_in(now, fleet, running)
        replicas = [
            Replica(name, state, in_flight, name in self.kept.parked, self.since(name, now))
            for name, (state, in_flight) in fleet.items()
            # one without a container cannot be started
            if name in running
        ]
        most = min(self.settings.most or len(replicas), len(replicas))
        limits = Limits(min(self.settings.least, most), most, self.settings.entries)
        memory = self.kept.memory
        samples = sources.samples(self.client, now, memory.window_s + sources.STEP_S)
        local = datetime.fromtimestamp(now, self.settings.zone)
        decision = decide(now, local, replicas, samples, limits, memory)
        self.show(replicas, limits, local)
        if decision.carries:
            memory = replace(memory, carries=decision.carries, carries_at=now)
        self.kept.memory = replace(memory, wanted=decision.wanted)
        start, stop = choose(decision.wanted, replicas, limits, memory)
        self.begin(now, start, stop, running, decision)
        self.go_on(now, fleet, running)
        return decision

    def since(self, name: str, now: float) -> float | None:
        """For how long a replica has been loading."""
        return now - self.kept.on_the_way[name][0] if name in self.kept.on_the_way else None

    def show(self, replicas: Sequence[Replica], limits: Limits, local: datetime) -> None:
        """Takes what was seen into the metrics."""
        serving, coming = capacity(replicas, self.kept.memory)
        self.figures.serving.set(len(serving))
        self.figures.loading.set(len(coming))
        self.figures.stopped.set(sum(one.parked for one in replicas))
        self.figures.least.set(limits.floor(local, 0))
        self.figures.most.set(limits.most)
        self.figures.load.set(self.kept.memory.load)
        self.figures.carries.set(carried(self.clock(), self.kept.memory))

    def take_in(self, now: float, fleet: dict[str, tuple[str, int]], running: Mapping[str, bool]) -> None:
        """Brings what is kept in step with what is."""
        for name, parked in list(self.kept.parked.items()):
            if name not in fleet:
                del self.kept.parked[name]
            elif not running.get(name, False):
                if not parked.stopped:
                    self.note("stopped", name, "it was empty")
                parked.stopped = True
            elif parked.stopped:
                # an operator's start is meant
                del self.kept.parked[name]
                self.note("taken back", name, "somebody else has started it")
        for name in list(self.kept.on_the_way):
            if name not in fleet or name in self.kept.parked:
                del self.kept.on_the_way[name]
        for name, (state, _) in fleet.items():
            if name in self.kept.parked:
                continue
            if state == "ready" and name in self.kept.on_the_way:
                began, ours = self.kept.on_the_way.pop(name)
                load_s = now - began if ours else self.kept.memory.load_s
                self.kept.memory = replace(self.kept.memory, ready=now, load_s=load_s)
            elif state == "loading":
                self.kept.on_the_way.setdefault(name, (now, False))

    def begin(
        self, now: float, start: Sequence[str], stop: Sequence[str], running: Mapping[str, bool], why: Decision
    ) -> None:
        """Takes the first step with each of these replicas. Blind where the switch fails: it is then as before."""
        for name in start:
            before = self.kept.parked.pop(name)
            # the gateway must not think that it is stopped on purpose while it loads
            self.store.keep(self.kept)
            if not running[name]:
                try:
                    sources.switch(self.client, "start", name)
                except Blind:
                    self.kept.parked[name] = before
                    raise
                self.kept.on_the_way[name] = (now, True)
            self.changed(now, "start", name, why.why)
        for name in stop:
            self.kept.parked[name] = Parked(now)
            self.note("drain", name, why.why)
            self.kept.memory = replace(self.kept.memory, changed=now)
        if stop:
            self.store.keep(self.kept)

    def go_on(self, now: float, fleet: dict[str, tuple[str, int]], running: Mapping[str, bool]) -> None:
        """Stops what has drained, and puts back what does not get empty in time."""
        for name, parked in list(self.kept.parked.items()):
            state, in_flight = fleet[name]
            if parked.stopped or not running.get(name, False) or now - parked.told < AGAIN_S:
                continue
            # the gateway has not read the file while it says "ready"
            if state != "ready" and in_flight == 0 and now > parked.since:
                sources.switch(self.client, "stop", name)
                parked.told = now
                self.changed(now, "stop", name, "nothing is in flight there")
        self.put_back(now, "it did not get empty")

    def put_back(self, now: float, why: str) -> None:
        """Puts back into the route what was to be stopped, and could not be within DRAIN_SECONDS."""
        for name, parked in list(self.kept.parked.items()):
            if not parked.stopped and not parked.told and now - parked.since > self.settings.drain_s:
                del self.kept.parked[name]
                self.changed(now, "kept", name, f"{why} within {self.settings.drain_s:.0f} s")

    def changed(self, now: float, change: str, name: str, why: str) -> None:
        """Notes a change, from which on it has to be quiet again before the next replica is stopped."""
        self.kept.memory = replace(self.kept.memory, changed=now)
        self.figures.changes.labels(change).inc()
        self.note(change, name, why)

    def note(self, action: str, name: str, why: str) -> None:
        """A line in the audit log and in the container's."""
        self.say(self.store.audit(action, name, why))


def main() -> None:
    """Runs until it is stopped. A setting that is wrong ends it with one line."""
    try:
        settings = read(os.environ)
    except Mistake as mistake:
        sys.exit(f"autoscaler: {mistake}")
    registry = CollectorRegistry()
    figures = Figures(registry)
    start_http_server(PORT, registry=registry)
    with httpx.Client(timeout=4, trust_env=False) as client:
        autoscaler = Autoscaler(settings, client, Store(), figures, lambda line: print(line, flush=True))
        while True:
            began = time.monotonic()
            autoscaler.turn()
            time.sleep(max(0.0, TURN_S - (time.monotonic() - began)))


if __name__ == "__main__":
    main()
