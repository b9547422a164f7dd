"""Which fault makes which alert fire: real Prometheus and Nginx over simulated replicas, under a steady load.

Each row has a fleet, a gateway and a Prometheus of its own. It is right when nothing fires before the fault, when then
exactly the alerts fire that the row names, and when they end after it. Prometheus runs the project's rules SCALE times
as quick as they are (lab/sim/prometheus.py); a window of six hours is twelve minutes then, so most rows see its
beginning only.
"""

import asyncio
import hashlib
import json
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from lab.chaos.rows import FAKETIME, own_clock
from lab.http import get
from lab.sim.autoscaler import Autoscaler
from lab.sim.gateway import Gateway
from lab.sim.load import SteadyLoad
from lab.sim.prometheus import Prometheus
from lab.sim.replicas import Replicas, Sim
from stack.gateway import fleet_line
from stack.shell import ROOT

SCALE = 30
AT_ONCE = 5
# How long the load runs before the fault, and how long no further alert may come after those that should, in seconds.
WARM, HOLD = 12.0, 8.0
# How long alerts may last after their fault, in seconds: a slow burn looks back for a minute here.
GONE = 90.0
SHAPE = ("--step-ms", "10", "--seq-ms", "0.2", "--max-running", "32")
KEY = "sk-fleet-" + "a" * 43


@dataclass
class Arena:
    """A fleet with its gateway, its Prometheus and a load."""

    fleet: Replicas
    gateway: Gateway
    prometheus: Prometheus
    load: SteadyLoad
    autoscaler: Autoscaler | None

    @property
    def victim(self) -> Sim:
        """The replica to be hit."""
        return self.fleet["vllm-0"]


Fault = Callable[[Arena], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def nothing(_: Arena) -> AsyncIterator[None]:
    """The load alone."""
    yield


@asynccontextmanager
async def killed(arena: Arena) -> AsyncIterator[None]:
    """SIGKILL to one replica."""
    arena.victim.kill()
    yield
    await asyncio.to_thread(arena.victim.start)


@asynccontextmanager
async def all_killed(arena: Arena) -> AsyncIterator[None]:
    """SIGKILL to every replica."""
    for sim in arena.fleet:
        sim.kill()
    yield
    for sim in arena.fleet:
        await asyncio.to_thread(sim.start)


@asynccontextmanager
async def restarts(arena: Arena) -> AsyncIterator[None]:
    """One replica is killed and started, four times."""
    for _ in range(4):
        arena.victim.kill()
        await asyncio.to_thread(arena.victim.start)
        await asyncio.sleep(1.5)  # so long that a scrape sees it
    yield


@asynccontextmanager
async def never_loads(arena: Arena) -> AsyncIterator[None]:
    """A further replica has a name and an address, but opens no port."""
    fleet, gateway = arena.fleet, arena.gateway
    fleet.dns.names["vllm-9"] = gateway.host.rsplit(".", 1)[0] + ".99"
    gateway.write_fleet(fleet.upstreams() + fleet_line("vllm-9", fleet.port) + "\n")
    await asyncio.to_thread(gateway.reload)
    yield
    gateway.write_fleet(fleet.upstreams())
    await asyncio.to_thread(gateway.reload)


def fault(everywhere: bool = False, **values: float | str) -> Fault:
    """A fault of the simulated replica (lab/sim/replica.py), at one of them or at all."""

    @asynccontextmanager
    async def injected(arena: Arena) -> AsyncIterator[None]:
        hit = list(arena.fleet) if everywhere else [arena.victim]
        for sim in hit:
            sim.fault(**values)  # type: ignore[arg-type]
        yield
        for sim in hit:
            sim.fault()

    return injected


def more_clients(clients: int, tokens: int, each_s: float = 0.0) -> Fault:
    """Further clients, all at once or one after the other, that ask for answers of so many tokens."""

    @asynccontextmanager
    async def injected(arena: Arena) -> AsyncIterator[None]:
        crowds: list[SteadyLoad] = []

        async def come() -> None:
            sizes = [1] * clients if each_s else [clients]
            for number, size in enumerate(sizes):
                crowd = replace(arena.load, clients=size, max_tokens=tokens, seed=number + 1, outcomes=[])
                crowds.append(await crowd.__aenter__())
                await asyncio.sleep(each_s)

        coming = asyncio.create_task(come())
        yield
        coming.cancel()
        await asyncio.gather(*(crowd.stop() for crowd in crowds))

    return injected


@asynccontextmanager
async def cache_full(arena: Arena) -> AsyncIterator[None]:
    """More single prompts at once than the cache has room for."""
    arena.victim.fault(preempting=True)
    async with replace(arena.load, clients=44, turns=1, seed=1, outcomes=[]):
        yield


@asynccontextmanager
async def prompts_change(arena: Arena) -> AsyncIterator[None]:
    """Conversations no longer go on: each prompt is a new one."""
    arena.load.turns = 1
    yield
    arena.load.turns = 3


@asynccontextmanager
async def gateway_down(arena: Arena) -> AsyncIterator[None]:
    """The gateway ends, and is started again."""
    await asyncio.to_thread(arena.gateway.stop)
    yield
    await asyncio.to_thread(arena.gateway.start)


@asynccontextmanager
async def reloads(arena: Arena) -> AsyncIterator[None]:
    """The gateway reads its configuration anew, three times."""
    for _ in range(3):
        await asyncio.to_thread(arena.gateway.reload)
    yield


@asynccontextmanager
async def roll(arena: Arena) -> AsyncIterator[None]:
    """Each replica is drained, ended, started and put back."""
    for sim in arena.fleet:
        await asyncio.to_thread(arena.gateway.admin, "PUT", f"/replicas/{sim.name}/drain")
        await asyncio.sleep(1)  # its streams end
        sim.kill()
        await asyncio.to_thread(sim.start)
        await asyncio.to_thread(arena.gateway.admin, "DELETE", f"/replicas/{sim.name}/drain")
        await asyncio.to_thread(arena.gateway.wait_ready)
    yield


def adapters(count: int) -> Fault:
    """One replica comes back with so many adapters, whose cards need room in a zone."""

    @asynccontextmanager
    async def injected(arena: Arena) -> AsyncIterator[None]:
        arena.victim.args += ["--adapters", str(count)]
        arena.victim.kill()
        await asyncio.to_thread(arena.victim.start)
        yield
        arena.victim.args = arena.victim.args[:-2]
        arena.victim.kill()
        await asyncio.to_thread(arena.victim.start)

    return injected


@asynccontextmanager
async def clock_step(arena: Arena) -> AsyncIterator[None]:
    """The gateway's wall clock is an hour behind."""
    (arena.gateway.conf / "clock").write_text("-3600")
    yield
    (arena.gateway.conf / "clock").write_text("+0")


@asynccontextmanager
async def certificate_ends(arena: Arena) -> AsyncIterator[None]:
    """A certificate that ends in two days."""
    folder = arena.gateway.conf / "tls"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=a"]
    files = ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    await asyncio.to_thread(subprocess.run, [*command, *files], check=True, capture_output=True)
    yield
    (folder / "fullchain.pem").unlink()


@asynccontextmanager
async def quota_used(arena: Arena) -> AsyncIterator[None]:
    """A key uses more than 900 of the 1,000 tokens of its day."""
    body = {"model": arena.fleet.model, "max_tokens": 170, "messages": [{"role": "user", "content": "x" * 3000}]}
    url, headers = arena.gateway.url + "/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    headers["Content-Type"] = "application/json"
    answer = json.loads(await asyncio.to_thread(get, url, json.dumps(body).encode(), headers=headers))
    used = answer["usage"]["total_tokens"]
    assert 900 < used <= 1000, f"the request used {used} tokens"
    yield


@asynccontextmanager
async def past_the_gateway(arena: Arena) -> AsyncIterator[None]:
    """Two of the clients ask a replica directly."""
    crowd = replace(arena.load, url=arena.victim.url, clients=2, seed=1, outcomes=[])
    async with crowd:
        yield


@asynccontextmanager
async def switch_away(arena: Arena) -> AsyncIterator[None]:
    """The autoscaler's switch does not answer."""
    assert arena.autoscaler
    arena.autoscaler.network.away = True
    yield
    arena.autoscaler.network.away = False


def resized(zone: str, size: str) -> dict[str, bytes]:
    """A gateway's files in which a zone has another size."""
    text, found = re.subn(rf"(zone={zone}):\w+", rf"\1:{size}", (ROOT / "nginx" / "conf.d" / "njs.conf").read_text())
    assert found == 1, zone
    return {"conf.d/njs.conf": text.encode()}


def one_key(**limits: int) -> dict[str, bytes]:
    """A gateway's files in which KEY is the only key."""
    sha256 = hashlib.sha256(KEY.encode()).hexdigest()
    key: dict[str, Any] = {"id": "k1", "name": "alice", "role": "admin", "models": None, "limits": limits}
    key |= {"hashes": [{"sha256": sha256, "until": None}], "priority": 0, "end_users": False}
    key |= {"expires": None, "created": 0, "note": ""}
    return {"secrets/keys.json": json.dumps({"version": 1, "keys": [key]}).encode()}


@dataclass(frozen=True)
class Case:
    """One row: its name in the table, the fault, and the alerts that it should make fire, within so many seconds."""

    name: str
    fault: Fault
    alerts: frozenset[str] = frozenset()
    within: float = 45.0
    # what does not end soon after the fault: a window of a day, a used quota
    stays: bool = False
    replicas: int = 3
    clients: int = 6
    warm: float = WARM
    shape: tuple[str, ...] = SHAPE
    files: dict[str, bytes] = field(default_factory=dict)
    clock: bool = False
    keys: bool = False
    autoscaler: bool = False
    quick: bool = False


def fires(*names: str) -> frozenset[str]:
    """The alerts of a row."""
    return frozenset(names)


SMALL = ("--step-ms", "10", "--seq-ms", "0.2", "--max-running", "2")
LITTLE_CACHE = ("--step-ms", "10", "--seq-ms", "0.2", "--kv-blocks", "210")
CASES = [
    Case("none: a steady load", nothing, within=20),
    Case("one replica killed", killed, fires("ReplicaDown"), quick=True),
    Case(
        "all replicas killed",
        all_killed,
        fires("NoReplicaReady", "ReplicaDown", "ErrorRatioHigh", "AvailabilityBurn"),
    ),
    Case("one replica wedged: no token comes", fault(fault="hang"), fires("ReplicaWedged")),
    Case("one replica starts again and again", restarts, fires("ReplicaRestarting"), stays=True),
    Case("one replica never loads", never_loads, fires("ReplicaLoading"), within=120),
    Case("one replica refuses with 503", fault(fault="status", status=503), within=20),
    Case("all replicas refuse with 503", fault(True, fault="status", status=503), fires("FleetFull")),
    Case("one replica answers 400", fault(fault="status", status=400), within=20),
    Case(
        # An engine that fails at one-token requests as well is wedged.
        "all replicas answer 500",
        fault(True, fault="status", status=500),
        fires("ErrorRatioHigh", "AvailabilityBurn", "ReplicaWedged", "NoReplicaReady"),
    ),
    # Quick tokens are many: it takes an hour's window until the slow ones prevail.
    Case("all replicas 12 times slower", fault(True, slow=12), fires("ItlBurn"), within=180, stays=True),
    Case(
        "more clients than the batches hold",
        more_clients(64, 30),
        fires("TtftBurn"),
        within=60,
        stays=True,
        clients=4,
        shape=SMALL,
    ),
    Case(
        "more clients all the time",
        more_clients(60, 60, each_s=0.5),
        fires("QueueGrowing", "TtftBurn"),
        within=90,
        stays=True,
        clients=4,
        shape=SMALL,
    ),
    Case(
        "a KV cache too small for the load",
        cache_full,
        fires("KvCacheFull"),
        within=60,
        clients=1,
        replicas=1,
        shape=LITTLE_CACHE,
    ),
    Case(
        "prompts that change at their beginning",
        prompts_change,
        fires("PrefixHitsCollapsed"),
        within=150,
        stays=True,
        warm=110,
    ),
    Case("the gateway ends", gateway_down, fires("GatewayDown"), quick=True),
    Case("the gateway reloaded", reloads, within=20),
    Case("roll: each replica drained, ended, started, put back", roll, within=20),
    Case(
        "a zone nearly full",
        adapters(660),
        fires("GatewayZoneNearlyFull"),
        files=resized("cards", "256k"),
    ),
    Case(
        "a zone full",
        adapters(900),
        fires("GatewayZoneNearlyFull", "GatewayWritesLost"),
        files=resized("cards", "256k"),
        stays=True,
    ),
    Case("a replica's metrics answer 500", fault(metrics=500), fires("ScrapeMissing")),
    Case("the gateway's clock an hour behind", clock_step, fires("ClockOff"), clock=True),
    Case("a certificate that ends in two days", certificate_ends, fires("CertificateEnding"), files={"tls/none": b""}),
    Case(
        "a key that used nine tenths of its day",
        quota_used,
        fires("KeyNearQuota"),
        stays=True,
        clients=0,
        keys=True,
        files=one_key(tokens_per_day=1000),
    ),
    Case("the autoscaler's switch away", switch_away, fires("AutoscalerBlind"), autoscaler=True),
    Case("requests past the gateway", past_the_gateway, fires("BooksDoNotBalance"), within=180, stays=True),
]


@dataclass
class Row:
    """What became of one case: seconds from the fault to each alert, and from its end until none fired any more."""

    case: Case
    fired: dict[str, float] = field(default_factory=dict)
    gone_s: float | None = None
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""


async def play(case: Case) -> Row:
    """Runs one case."""
    row = Row(case)
    env: dict[str, str] = {}
    files = dict(case.files)
    if case.clock:
        if not FAKETIME:
            row.skipped = "libfaketime is not installed"
            return row
        env, files = own_clock()
    key = KEY if case.keys else ""
    with (
        Replicas(case.replicas, *case.shape) as fleet,
        Gateway(fleet, env=env, files=files, key=key) as gateway,
    ):
        await asyncio.to_thread(gateway.wait_ready)
        load = SteadyLoad(gateway.url, fleet.model, clients=case.clients, patience=30.0)
        with (
            Autoscaler(fleet) if case.autoscaler else nullcontext() as autoscaler,
            Prometheus(gateway, fleet, SCALE, case.autoscaler) as prometheus,
        ):
            async with load:
                try:
                    await watch(row, Arena(fleet, gateway, prometheus, load, autoscaler))
                except (AssertionError, TimeoutError, OSError) as why:
                    row.wrong.append(str(why) or type(why).__name__)
                finally:
                    for sim in fleet:
                        if not sim.ended():
                            sim.fault()
    return row


def play_all(cases: list[Case], tell: Callable[[Row], None]) -> list[Row]:
    """Runs cases, AT_ONCE at a time, as most of each is waiting; `tell` gets each row when it is over."""

    def played(case: Case) -> Row:
        row = asyncio.run(play(case))
        tell(row)
        return row

    longest_first = sorted(cases, key=lambda case: -case.warm - case.within)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = {case.name: pool.submit(played, case) for case in longest_first}
        return [rows[case.name].result() for case in cases]


async def watch(row: Row, arena: Arena) -> None:
    """Notes which alerts fire before, under and after the row's fault."""
    case = row.case
    await asyncio.sleep(case.warm)
    before = await asyncio.to_thread(arena.prometheus.firing)
    assert not before, f"fire before the fault: {', '.join(before)}"
    began = time.monotonic()
    async with case.fault(arena):
        until = began + case.within
        while time.monotonic() < until:
            for name, one in (await asyncio.to_thread(arena.prometheus.firing)).items():
                if name not in row.fired:
                    row.fired[name] = time.monotonic() - began
                    texts = " ".join(one["annotations"].values())
                    assert "<error" not in texts and "no value" not in texts, f"{name} says: {texts}"  # noqa: PT018
            if case.alerts and case.alerts <= row.fired.keys() and until == began + case.within:
                until = min(until, time.monotonic() + HOLD)
            await asyncio.sleep(0.25)
    if missing := case.alerts - row.fired.keys():
        row.wrong.append(f"silent within {case.within:.0f} s: {', '.join(sorted(missing))}")
    if more := row.fired.keys() - case.alerts:
        row.wrong.append(f"fired beside: {', '.join(sorted(more))}")
    if case.alerts and not case.stays:
        ended = time.monotonic()
        while now := await asyncio.to_thread(arena.prometheus.firing):
            if time.monotonic() - ended > GONE:
                row.wrong.append(f"still fire {GONE:.0f} s after the fault: {', '.join(now)}")
                return
            await asyncio.sleep(0.25)
        row.gone_s = time.monotonic() - ended
