"""The rows of the fault table over hosts: each one fault, under a steady load of streams from the gateway's host.

A row fails as those of `make chaos` do: when a request that had not begun failed, when a stream was cut on a replica
that was not hit, when the fault did not show, or when the host did not come back by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from lab.chaos.rows import HOLD, PATIENCE, SHAPE, WARM_REQUESTS, Case, Row, Watch, judge
from lab.hosts.fleet import Far, HostFleet
from lab.hosts.network import Namespace, run
from lab.sim.gateway import Gateway
from lab.sim.load import Outcome, SteadyLoad, session, stream
from lab.waiting import until
from stack import hosts
from stack import hosts_certificates as certificates

# Two replicas here, two on gpu-b, one on gpu-c.
HERE = 2
FAR = {"gpu-b": 2, "gpu-c": 1}
# What is revoked is cut within this.
REVOKED_S = 2.0
# The kernel has noticed by then that the other side is gone (the sysctls of docker-compose.yml).
NOTICED_S = 20.0


@dataclass
class Arena(Watch):
    """A load on a gateway with replicas on several hosts."""

    fleet: HostFleet = field(kw_only=True)
    gateway: Gateway = field(kw_only=True)
    spaces: Mapping[str, Namespace] = field(kw_only=True)

    def victim(self, name: str = "gpu-b") -> Far:
        """The host to be hit; the streams on it may be cut from now on."""
        self.hit |= set(self.fleet.on(name))
        return self.fleet.far[name]

    async def all_left(self, far: Far, limit: float) -> None:
        """Notes the seconds until the gateway has all of the host's replicas out of its route."""
        start = time.monotonic()
        for sim in far.sims:
            await self.left(sim.name, limit)
        self.route_s = time.monotonic() - start

    async def all_back(self, far: Far, limit: float = 20.0) -> None:
        """Notes the seconds until each of the host's replicas serves again."""
        start = time.monotonic()
        await asyncio.gather(*(self.back(sim.name, limit) for sim in far.sims))
        self.recovery_s = time.monotonic() - start


async def replica_killed(arena: Arena) -> None:
    """SIGKILL to one replica of the host; a container would start again."""
    far = arena.fleet.far["gpu-b"]
    sim = far.sims[0]
    arena.hit.add(sim.name)
    sim.kill()
    await arena.left(sim.name, 2.0)
    await arena.load.settle(WARM_REQUESTS)
    await asyncio.to_thread(sim.start)
    await arena.back(sim.name)


async def replicas_killed(arena: Arena) -> None:
    """SIGKILL to all replicas of the host at once; its link lives."""
    far = arena.victim()
    for sim in far.sims:
        sim.kill()
    await arena.all_left(far, 2.0)
    await arena.load.settle(WARM_REQUESTS)
    for sim in far.sims:
        await asyncio.to_thread(sim.start)
    await arena.all_back(far)


async def far_end_killed(arena: Arena) -> None:
    """SIGKILL to the host's end of the link."""
    far = arena.victim()
    far.link.kill()
    await arena.all_left(far, 2.0)
    await arena.load.settle(WARM_REQUESTS)
    far.link.start()
    await arena.all_back(far)


async def near_end_killed(arena: Arena) -> None:
    """SIGKILL to the gateway's end of the link."""
    far = arena.victim()
    link = arena.fleet.links["gpu-b"]
    link.kill()
    await arena.all_left(far, 2.0)
    await arena.load.settle(WARM_REQUESTS)
    await asyncio.to_thread(link.start)
    await arena.all_back(far)


async def cable_cut(arena: Arena) -> None:
    """The cable is cut and, after a while, mended."""
    far = arena.victim()
    arena.spaces[far.host.name].cable.cut()
    await arena.all_left(far, 10.0)
    await arena.watch(HOLD)
    arena.spaces[far.host.name].cable.mend()
    await arena.all_back(far)


async def blink(arena: Arena) -> None:
    """The cable is cut for a second: what runs goes on."""
    far = arena.fleet.far["gpu-b"]
    arena.spaces[far.host.name].cable.cut()
    await arena.watch(1)
    arena.spaces[far.host.name].cable.mend()
    await arena.all_back(far)
    arena.note = "for 1 s"


async def power_cut(arena: Arena) -> None:
    """The host is off without a word, and boots again."""
    far = arena.victim()
    arena.spaces[far.host.name].cable.cut()
    for sim in far.sims:
        sim.kill()
    far.link.kill()
    await arena.all_left(far, 10.0)
    await arena.watch(HOLD)
    arena.spaces[far.host.name].cable.mend()
    far.link.start()
    for sim in far.sims:
        await asyncio.to_thread(sim.start)
    await arena.all_back(far)


async def gateway_last(arena: Arena) -> None:
    """The other hosts are up when the gateway's host boots."""
    await arena.load.stop()
    arena.gateway.__exit__()
    for link in arena.fleet.links.values():
        link.kill()
    await asyncio.sleep(2)
    start = time.monotonic()
    for link in arena.fleet.links.values():
        await asyncio.to_thread(link.start)
    await renewed(arena)
    await arena.all_back(arena.fleet.far["gpu-b"])
    arena.recovery_s = time.monotonic() - start
    arena.note = "counted from the start of the gateway"


async def renewed(arena: Arena) -> None:
    """A new gateway and a new load on it."""
    arena.gateway = Gateway(arena.fleet)
    await asyncio.to_thread(arena.gateway.__enter__)
    arena.look = arena.gateway.states
    arena.load = await load_on(arena.gateway, arena.fleet, arena.load.outcomes).__aenter__()


async def gateway_gone(arena: Arena) -> None:
    """The gateway's host is off without a word while streams run on the others, and boots again."""
    far = arena.victim()
    await arena.load.stop()
    body = {"model": "sim", "messages": [{"role": "user", "content": "long"}], "max_tokens": 20_000}
    async with session() as client:
        held = [
            asyncio.create_task(stream(client, arena.fleet.links["gpu-b"].url.replace(":9001", f":{port}"), body, 60))
            for port in (8000, 8001)
        ]
        while not await asyncio.to_thread(lambda: all(sim.metrics()["vllm:num_requests_running"] for sim in far.sims)):
            await asyncio.sleep(0.05)
        for space in arena.spaces.values():
            space.cable.cut()
        gone = time.monotonic()
        for link in arena.fleet.links.values():
            link.kill()
        arena.gateway.__exit__()
        ended_streams = await asyncio.gather(*held)
    assert all(one.cut for one in ended_streams), f"a stream did not run: {ended_streams}"

    def idle() -> bool:
        return not any(sim.metrics()["vllm:num_requests_running"] for sim in far.sims)

    await asyncio.to_thread(until, idle, "what ran for the gateway has ended", NOTICED_S)
    ended = time.monotonic() - gone
    for space in arena.spaces.values():
        space.cable.mend()
    start = time.monotonic()
    for link in arena.fleet.links.values():
        await asyncio.to_thread(link.start)
    await renewed(arena)
    await arena.all_back(far)
    arena.recovery_s = time.monotonic() - start
    arena.note = f"what ran for it ended after {ended:.1f} s; served again counts from its boot"


async def expired(arena: Arena) -> None:
    """The host's certificate ends, and is renewed."""
    fleet, far = arena.fleet, arena.fleet.far["gpu-b"]
    authority = certificates.read(hosts.folder(fleet.secrets))
    assert authority
    far.give(fleet.ca, certificates.for_host(authority, far.host.membership, timedelta(seconds=3)))
    far.link.reload()
    ends = time.monotonic() + 3
    for sim in far.sims:
        await arena.left(sim.name, 10.0)
    arena.route_s = max(0.0, time.monotonic() - ends)
    await arena.load.settle(WARM_REQUESTS)
    far.give(fleet.ca, hosts.renew(fleet.secrets, "gpu-b", [], []))
    far.link.reload()
    await arena.all_back(far)
    arena.note = "no stream cut: what is connected goes on"


async def revoked(arena: Arena) -> None:
    """The host is removed, and what it has does not get it back; added again, it serves."""
    fleet, far = arena.fleet, arena.victim()
    outcomes = arena.load.outcomes
    start = time.monotonic()
    hosts.remove(fleet.secrets, "gpu-b")
    await asyncio.to_thread(arena.gateway.write_fleet, fleet.upstreams())
    fleet.links["gpu-b"].kill()
    await asyncio.to_thread(arena.gateway.reload)
    cut_s = time.monotonic() - start
    assert cut_s < REVOKED_S, f"removed after {cut_s:.1f} s"
    assert not set(arena.gateway.states()) & set(fleet.on("gpu-b")), "the gateway still knows its replicas"
    await arena.load.settle(WARM_REQUESTS)
    late = [one for one in outcomes if one.replica in arena.hit and one.sent > start + REVOKED_S]
    assert not late, f"{len(late)} requests went there after it was removed"
    before = sum(sim.state()["generations"] for sim in far.sims)

    # the same name at the same address: the certificate of before is for another membership
    again = far.host.model_copy(update={"membership": hosts.new_membership("gpu-b")})
    own = hosts.add(fleet.secrets, again, [])
    await asyncio.to_thread(arena.gateway.write_fleet, fleet.upstreams())
    await asyncio.to_thread(fleet.links["gpu-b"].start)
    await asyncio.to_thread(arena.gateway.reload)
    await arena.watch(3)
    assert not any(arena.gateway.states()[sim.name] == "ready" for sim in far.sims), "the old certificate opens it"
    assert sum(sim.state()["generations"] for sim in far.sims) == before, "the old certificate opens it"
    far.host = again
    far.give(fleet.ca, own)
    far.link.reload()
    await arena.all_back(far)
    arena.route_s = cut_s
    arena.note = "with its old certificate it stayed out; served again counts from the new one"


async def wrong_host(arena: Arena) -> None:
    """Another host of the fleet has the host's address for a while."""
    far, other = arena.victim(), arena.spaces["gpu-c"]
    arena.spaces[far.host.name].cable.cut()
    other.do("ip", "address", "add", f"{far.space.address}/24", "dev", "eth0")
    run("ip", "neighbour", "flush", "dev", "switch")
    await arena.all_left(far, 10.0)
    (seen,) = [sim for sim in arena.fleet.all if sim.name in arena.fleet.on("gpu-c")]
    until(lambda: "subject" in (log := arena.fleet.links["gpu-b"].log()) or "does not match" in log, "a refusal", 10)
    await arena.load.settle(WARM_REQUESTS)
    assert "vllm-2" not in str(seen.state()["seen"]), "the wrong host was asked"
    other.do("ip", "address", "del", f"{far.space.address}/24", "dev", "eth0")
    arena.spaces[far.host.name].cable.mend()
    run("ip", "neighbour", "flush", "dev", "switch")
    await arena.all_back(far)
    arena.note = "refused by its certificate; it was asked nothing"


CASES: list[Case[Arena]] = [
    Case("replica killed", replica_killed),
    Case("all replicas of a host killed", replicas_killed),
    Case("the host's end of the link killed", far_end_killed),
    Case("the gateway's end of the link killed", near_end_killed),
    Case("cable cut and mended", cable_cut),
    Case("cable cut for a second", blink),
    Case("power cut and boot", power_cut, quick=True),
    Case("the gateway's host boots last", gateway_last),
    Case("the gateway's host gone and back", gateway_gone),
    Case("certificate expired, then renewed", expired),
    Case("host removed, then added again", revoked, quick=True),
    Case("another host has its address", wrong_host),
]


def load_on(gateway: Gateway, fleet: HostFleet, outcomes: list[Outcome]) -> SteadyLoad:
    """The load of a row; `outcomes` is what there was before it."""
    return SteadyLoad(gateway.url, fleet.model, clients=16, patience=PATIENCE, outcomes=outcomes)


async def play(case: Case[Arena], spaces: Mapping[str, Namespace]) -> Row:
    """Runs one case on a fleet and a gateway of its own."""
    row = Row(case.name)
    far = {name: (spaces[name], count) for name, count in FAR.items()}
    with HostFleet(HERE, far, *SHAPE) as fleet, Gateway(fleet) as gateway:
        await asyncio.to_thread(gateway.wait_ready)
        load = await load_on(gateway, fleet, []).__aenter__()
        arena = Arena(gateway.states, load, fleet=fleet, gateway=gateway, spaces=spaces)
        try:
            await load.settle(WARM_REQUESTS)
            await case.run(arena)
            await arena.load.settle(WARM_REQUESTS)
        except (AssertionError, TimeoutError, OSError) as why:
            row.wrong.append(str(why) or type(why).__name__)
        finally:
            for space in spaces.values():
                space.cable.mend()
            await arena.load.stop()
            if arena.gateway is not gateway:
                arena.gateway.__exit__()
        judge(row, arena)
    return row
