"""The fault table's rows: each one fault, under a steady load of streams, on real Nginx over simulated replicas.

A row fails when a request that had not begun to stream failed, when a stream was cut on a replica that was not hit,
when the route took too long to change, or when the fault's own condition did not come about.
"""

import asyncio
import subprocess
import time
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Generic, TypeVar

from lab.sim.gateway import Gateway
from lab.sim.load import Outcome, SteadyLoad
from lab.sim.replicas import Replicas, Sim
from stack.shell import ROOT

PATIENCE = 60.0
WARM_REQUESTS = 40
# How long a fault that passes by itself lasts, in seconds.
HOLD = 18.0
# When the health check of a wedged container has ended it at the latest: three checks of 10 s, 5 s apart.
WEDGED_ENDS = 45.0
# Streams of about 0.4 s, so that each fault meets many of them at every stage.
SHAPE = ("--step-ms", "10", "--seq-ms", "0.2", "--max-running", "32")
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


class NotRunError(Exception):
    """This machine lacks what the row needs; the message names it."""


@dataclass
class Watch:
    """A load on a gateway, whose replicas' states `look` tells, and what a fault showed."""

    look: Callable[[], dict[str, str]]
    load: SteadyLoad
    hit: set[str] = field(default_factory=set)
    route_s: float | None = None
    recovery_s: float | None = None
    note: str = ""
    seen_states: dict[str, set[str]] = field(default_factory=dict)

    async def states(self) -> dict[str, str]:
        """Each replica's state by name, noted as seen."""
        states = await asyncio.to_thread(self.look)
        for name, state in states.items():
            self.seen_states.setdefault(name, set()).add(state)
        return states

    async def left(self, name: str, limit: float, state: str | None = None) -> None:
        """Notes the seconds until the gateway has `name` out of its route (or in `state`), `limit` at most."""
        start = time.monotonic()
        while (now := (await self.states())[name]) == "ready" or (state and now != state):
            if time.monotonic() - start > limit:
                raise TimeoutError(f"{name} is still {now} after {limit:.0f} s, not {state or 'out of the route'}")
            await asyncio.sleep(0.02)
        self.route_s = time.monotonic() - start

    async def back(self, name: str, limit: float = 20.0) -> None:
        """Notes the seconds until `name` serves a request that was sent after now."""
        start = time.monotonic()
        while not any(
            outcome.replica == name and outcome.sent > start and outcome.done for outcome in self.load.outcomes[-200:]
        ):
            if time.monotonic() - start > limit:
                raise TimeoutError(f"{name} serves nothing {limit:.0f} s after it came back: {await self.states()}")
            await asyncio.sleep(0.02)
        self.recovery_s = time.monotonic() - start

    async def watch(self, seconds: float) -> None:
        """Goes on for `seconds`, looking at the replicas' states."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await self.states()
            await asyncio.sleep(0.1)

    def since(self, moment: float) -> list[Outcome]:
        """The requests sent at `moment` (of `time.monotonic`) or later."""
        return [outcome for outcome in self.load.outcomes if outcome.sent >= moment]


Place = TypeVar("Place", bound=Watch)


@dataclass(frozen=True)
class Case(Generic[Place]):
    """A row: its name in the table and what happens. `quick`: part of the test suite."""

    name: str
    run: Callable[[Place], Awaitable[None]]
    quick: bool = False

    def chosen(self, only: str, quick: bool) -> bool:
        """Whether its name, or its function's, has `only` in it; with `quick` it must be of the test suite too."""
        return only.lower() in f"{self.name} {self.run.__name__}".lower() and (self.quick or not quick)


@dataclass
class Arena(Watch):
    """The same over simulated replicas."""

    fleet: Replicas = field(kw_only=True)
    gateway: Gateway = field(kw_only=True)

    def victim(self, name: str = "vllm-0") -> Sim:
        """The replica to be hit; its streams may be cut from now on."""
        self.hit.add(name)
        return self.fleet[name]


async def kill(arena: Arena) -> None:
    """SIGKILL, and a new start."""
    victim = arena.victim()
    victim.kill()
    await arena.left(victim.name, 1.0)
    await arena.load.settle(WARM_REQUESTS)
    await asyncio.to_thread(victim.start)
    await arena.back(victim.name)


async def stop(arena: Arena) -> None:
    """SIGSTOP for a while."""
    victim = arena.victim()
    victim.pause()
    await arena.left(victim.name, 10.0)
    await arena.watch(HOLD)
    victim.resume()
    await arena.back(victim.name)


async def wedge(arena: Arena) -> None:
    """No token comes for a while."""
    victim = arena.victim()
    victim.fault("hang")
    await arena.left(victim.name, 10.0, "wedged")
    await arena.watch(2)
    victim.fault()
    await arena.back(victim.name)


async def wedge_for_good(arena: Arena) -> None:
    """No token comes until the replica is ended."""
    victim = arena.victim()
    start = time.monotonic()
    victim.fault("hang")
    await arena.left(victim.name, 10.0, "wedged")
    # Nginx cannot take back a request that waits at a replica which keeps its connection. In a container the replica's
    # own health check ends the wedged engine, and so the wait; this is the moment at which it does.
    await arena.watch(start + WEDGED_ENDS - time.monotonic())
    await asyncio.to_thread(victim.kill)
    await asyncio.to_thread(victim.start)
    arena.note = f"ended after {WEDGED_ENDS:.0f} s, as its container's health check does; then what waited there moved"
    await arena.back(victim.name)


async def network_cut(arena: Arena) -> None:
    """Packets to and from the replica are dropped for a while."""
    victim = arena.victim()
    rules = [["OUTPUT", side, victim.host, "-j", "DROP"] for side in ("-d", "-s")]
    try:
        for rule in rules:
            await iptables("-I", *rule)
        await arena.left(victim.name, 10.0)
        await arena.watch(HOLD)
    finally:
        for rule in rules:
            await iptables("-D", *rule)
    await arena.back(victim.name)


async def iptables(*args: str) -> None:
    """Runs iptables; NotRunError where a rule cannot be added."""
    try:
        run = await asyncio.to_thread(subprocess.run, ["iptables", "-w", *args], capture_output=True, text=True)
    except FileNotFoundError as why:
        raise NotRunError("iptables is not installed") from why
    if run.returncode and args[0] == "-I":
        raise NotRunError(f"iptables: {run.stderr.strip()}")


async def recreate(arena: Arena) -> None:
    """The replica comes back under a new address."""
    victim = arena.victim()
    start = time.monotonic()
    await asyncio.to_thread(victim.move)
    await arena.back(victim.name)
    arena.route_s = time.monotonic() - start


async def resets(arena: Arena) -> None:
    """The replica resets its connections."""
    victim = arena.victim()
    victim.fault("reset")
    await arena.watch(3)
    victim.fault()
    await arena.back(victim.name)


async def garbage(arena: Arena) -> None:
    """The replica answers what is not HTTP."""
    victim = arena.victim()
    victim.fault("garbage")
    await arena.watch(3)
    # An answer without a status line Nginx takes for HTTP/0.9 and passes on: no directive refuses that.
    arena.note = "a header that is not HTTP"
    victim.fault()
    await arena.back(victim.name)


async def one_full(arena: Arena) -> None:
    """One replica refuses with 503; the others take its requests."""
    victim = arena.fleet["vllm-0"]
    victim.fault("status", status=503)
    start = time.monotonic()
    await arena.watch(3)
    refused = [outcome for outcome in arena.since(start) if outcome.refused]
    assert not refused, f"{len(refused)} refused though three replicas have room: {refused[0].why}"
    victim.fault()
    await arena.back(victim.name)


async def all_full(arena: Arena) -> None:
    """All refuse with 503: clients get 429 at once."""
    for sim in arena.fleet:
        sim.fault("status", status=503)
    await arena.load.settle(arena.load.clients)  # those that were at it
    start = time.monotonic()
    await arena.load.settle(100)
    met = arena.since(start)
    for sim in arena.fleet:
        sim.fault()
    odd = [outcome for outcome in met if outcome.status != 429 or not outcome.retry_after]
    assert not odd, f"{len(odd)} of {len(met)} not refused with 429 and Retry-After, but {odd[0].status}: {odd[0].why}"
    slowest = max(outcome.ended - outcome.sent for outcome in met)
    assert slowest < 1, f"a refusal took {slowest:.2f} s"
    arena.note = f"{len(met)} refused with 429, each within {slowest * 1000:.0f} ms"
    await arena.back("vllm-0")


async def client_errors(arena: Arena) -> None:
    """A client's mistake (400) does not count against the replica."""
    victim = arena.fleet["vllm-0"]
    victim.fault("status", status=400)
    await arena.watch(3)
    assert arena.seen_states[victim.name] == {"ready"}, f"a 400 moved it to {arena.seen_states[victim.name]}"
    refused = [outcome for outcome in arena.load.outcomes if outcome.refused]
    assert refused, "no client saw its 400"
    assert {(outcome.status, outcome.replica) for outcome in refused} == {(400, victim.name)}
    arena.note = f"{len(refused)} got their 400, the replica stayed in the route"
    victim.fault()
    await arena.back(victim.name)


async def slow(arena: Arena) -> None:
    """A replica that is 20 times slower stays in the route."""
    victim = arena.fleet["vllm-0"]
    victim.fault(slow=20)
    start = time.monotonic()
    await arena.watch(10)
    assert arena.seen_states[victim.name] == {"ready"}, f"slow was taken for {arena.seen_states[victim.name]}"
    met = arena.since(start)
    there = sum(outcome.replica == victim.name for outcome in met)
    arena.note = f"20 times slower: stayed in the route with {there} of {len(met)} requests"
    victim.fault()
    await arena.back(victim.name)


async def cut_streams(arena: Arena) -> None:
    """Streams break off after 5 tokens and end with an error event."""
    victim = arena.victim()
    victim.fault("cut", after_tokens=5)
    await arena.watch(3)
    cut = [outcome for outcome in arena.load.outcomes if outcome.cut]
    assert cut, "no stream was cut"
    silent = [outcome for outcome in cut if not outcome.error_event]
    assert not silent, f"{len(silent)} of {len(cut)} ended without an error event: {silent[0].why}"
    arena.note = "each ended with an error event"
    victim.fault()
    await arena.back(victim.name)


async def reload(arena: Arena) -> None:
    """The gateway reads its configuration anew, five times."""
    for _ in range(5):
        await asyncio.to_thread(arena.gateway.reload)
        await arena.load.settle(WARM_REQUESTS)
    arena.note = "5 reloads"


async def worker_killed(arena: Arena) -> None:
    """One of the gateway's workers gets SIGKILL, three times."""
    for _ in range(3):
        await asyncio.to_thread(arena.gateway.kill_worker)
        await arena.load.settle(WARM_REQUESTS)
    await arena.watch(2)
    left = {replica["name"]: replica["in_flight"] for replica in arena.gateway.status()["replicas"]}
    assert sum(left.values()) <= arena.load.clients, f"in-flight counts of dead workers stayed: {left}"
    arena.note = "3 workers; clients send again when a connection is lost before any answer, as the OpenAI client does"


async def roll(arena: Arena) -> None:
    """Each replica is drained, made anew and put back, one by one."""
    start = time.monotonic()
    for sim in arena.fleet:
        await asyncio.to_thread(arena.gateway.admin, "PUT", f"/replicas/{sim.name}/drain")
        while in_flight(arena.gateway, sim.name):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(sim.terminate)
        while not sim.ended():
            await asyncio.sleep(0.02)
        await asyncio.to_thread(sim.move)
        await asyncio.to_thread(arena.gateway.admin, "DELETE", f"/replicas/{sim.name}/drain")
        await arena.back(sim.name)
    arena.note = f"{len(arena.fleet.all)} replicas in {time.monotonic() - start:.0f} s"


def in_flight(gateway: Gateway, name: str) -> int:
    """The requests that the gateway has at the replica."""
    return next(int(replica["in_flight"]) for replica in gateway.status()["replicas"] if replica["name"] == name)


def seconds_ahead(url: str) -> float:
    """How far the clock of a server is ahead of this one's."""
    with urllib.request.urlopen(f"{url}/health") as answer:
        return (parsedate_to_datetime(answer.headers["Date"]) - datetime.now(UTC)).total_seconds()


async def clock_step(arena: Arena) -> None:
    """The gateway's wall clock steps; what it knows of its replicas stays right."""
    clock = arena.gateway.conf / "clock"
    for offset in ("+3600", "-7200", "+0"):
        clock.write_text(offset)
        ahead = await asyncio.to_thread(seconds_ahead, arena.gateway.url)
        assert abs(ahead - int(offset)) < 600, f"the gateway's clock is {ahead:.0f} s ahead, not {offset}"
        await arena.load.settle(WARM_REQUESTS)
        await arena.watch(3)
    odd = {name: states for name, states in arena.seen_states.items() if states != {"ready"}}
    assert not odd, f"a step of the clock moved replicas: {odd}"
    # What the gateway noted of its replicas lies in the future now; a wedge is seen as soon as ever.
    clock.write_text("-7200")
    await wedge(arena)
    arena.note = "the gateway's wall clock: 1 h ahead, 2 h behind, right again; then a wedge, 2 h behind"


@dataclass(frozen=True)
class GatewayCase(Case[Arena]):
    """A row here. `retries`: how often a client sends again what broke before any answer. `clock`: the gateway has its
    own."""

    cuts_anywhere: bool = False
    retries: int = 0
    clock: bool = False


CASES = [
    GatewayCase("killed (SIGKILL)", kill, quick=True),
    GatewayCase(f"stopped (SIGSTOP, {HOLD:.0f} s)", stop),
    GatewayCase("wedged: /health answers, no token comes", wedge, quick=True),
    GatewayCase("wedged for good", wedge_for_good),
    GatewayCase(f"network cut (packets dropped, {HOLD:.0f} s)", network_cut),
    GatewayCase("recreated with a new address", recreate),
    GatewayCase("connections reset", resets),
    GatewayCase("answers garbage", garbage),
    GatewayCase("one replica full (503)", one_full),
    GatewayCase("all replicas full (503)", all_full, quick=True),
    GatewayCase("4xx storm", client_errors, quick=True),
    GatewayCase("slow", slow),
    GatewayCase("streams cut after 5 tokens", cut_streams, quick=True),
    GatewayCase("gateway reloaded", reload, quick=True),
    GatewayCase("gateway worker killed", worker_killed, cuts_anywhere=True, retries=2),
    GatewayCase("roll: drain, recreate, undrain each", roll, quick=True),
    GatewayCase("clock step", clock_step, clock=True),
]


@dataclass
class Row:
    """What became of one case. `wrong` is empty when all held; `skipped` says why a row was not run."""

    name: str
    sent: int = 0
    failed: int = 0
    cut_there: int = 0
    cut_elsewhere: int = 0
    refused: int = 0
    longest_wait_s: float = 0.0
    route_s: float | None = None
    recovery_s: float | None = None
    note: str = ""
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""


def judge(row: Row, watch: Watch, cuts_anywhere: bool = False) -> None:
    """Fills in what was seen, and says what is wrong with it. The load has ended."""
    outcomes, hit = watch.load.outcomes, watch.hit
    row.route_s, row.recovery_s, row.note = watch.route_s, watch.recovery_s, watch.note
    row.sent = len(outcomes)
    failed = [outcome for outcome in outcomes if outcome.failed]
    row.failed = len(failed)
    row.cut_there = sum(outcome.cut and outcome.replica in hit for outcome in outcomes)
    elsewhere = [outcome for outcome in outcomes if outcome.cut and outcome.replica not in hit]
    row.cut_elsewhere = len(elsewhere)
    row.refused = sum(outcome.refused for outcome in outcomes)
    row.longest_wait_s = max((outcome.ttft for outcome in outcomes if outcome.begun), default=0.0)
    if failed:
        first = failed[0]
        row.wrong.append(f"{row.failed} failed that had not begun, e.g. {first.status} of {first.replica}: {first.why}")
    if elsewhere and not cuts_anywhere:
        first = elsewhere[0]
        row.wrong.append(f"{row.cut_elsewhere} streams cut on other replicas, e.g. on {first.replica}: {first.why}")


def own_clock() -> tuple[dict[str, str], dict[str, bytes]]:
    """The environment and files of a gateway whose wall clock is ahead by what the file `clock` says, in seconds.

    It alone sees that: the machine's own clock belongs to others.
    """
    env = {
        "LD_PRELOAD": "{conf}/libfaketime.so.1",
        "FAKETIME_TIMESTAMP_FILE": "{conf}/clock",
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    # Nginx' workers have no other environment.
    kept = "".join(f"env {name};\n" for name in env).encode()
    host = (ROOT / "nginx" / "host" / "main.conf").read_bytes()
    return env, {"libfaketime.so.1": FAKETIME[0].read_bytes(), "clock": b"+0", "host/main.conf": host + kept}


async def play(case: GatewayCase, replicas: int = 4, clients: int = 16) -> Row:
    """Runs one case on a fleet and a gateway of its own."""
    row = Row(case.name)
    env: dict[str, str] = {}
    files: dict[str, bytes] = {}
    if case.clock:
        if not FAKETIME:
            row.skipped = "libfaketime is not installed"
            return row
        env, files = own_clock()
    with Replicas(replicas, *SHAPE) as fleet, Gateway(fleet, env=env, files=files) as gateway:
        await asyncio.to_thread(gateway.wait_ready)
        load = SteadyLoad(gateway.url, fleet.model, clients=clients, patience=PATIENCE, retries=case.retries)
        async with load:
            await load.settle(WARM_REQUESTS)
            arena = Arena(gateway.states, load, fleet=fleet, gateway=gateway)
            try:
                await case.run(arena)
                await load.settle(WARM_REQUESTS)
            except NotRunError as why:
                row.skipped = str(why)
            except (AssertionError, TimeoutError, OSError) as why:
                row.wrong.append(str(why) or type(why).__name__)
                for sim in fleet:
                    if not sim.ended():
                        sim.resume()
        judge(row, arena, case.cuts_anywhere)
    return row
