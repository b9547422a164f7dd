"""Two hosts with Docker engines of their own, the real image and the real model: what a user types, and the faults.

gw has the gateway and a replica, gpu-b joins with another one; gpu-c is only to be mistaken for gpu-b. This process is
a client on the switch between them. The rows come one after the other on the same fleet, each under a load of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import httpx

from access.store import Secrets
from lab.chaos.rows import HOLD, PATIENCE, Case, Row, Watch, judge
from lab.hosts.fleet import End
from lab.hosts.machines import Machine, MachineError, check_tools, introduce
from lab.hosts.network import Namespace
from lab.hosts.rows import NOTICED_S, REVOKED_S
from lab.http import get
from lab.sim.load import Outcome, SteadyLoad, session, stream
from lab.waiting import until
from models.served import PACKAGED
from stack import hosts, images
from stack import hosts_certificates as certificates
from stack.compose import Build, Compose
from stack.console import console
from stack.gateway import fleet_line
from stack.hosts_certificates import Pair

NAMES = ("gw", "gpu-b", "gpu-c")
# the gateway's host would have a second replica too
NEAR, FAR = "vllm-0", "vllm-1"
SMALL = {"KV_CACHE_GB": "0.3", "MAX_MODEL_LEN": "1024"}
OPEN = {"BIND_ADDRESS": "0.0.0.0", "GATEWAY_AUTH": "off"}
WARM_REQUESTS = 6
# a replica that starts anew while another one serves, on few cores
LOADED_S = 300.0


class Lab:
    """The hosts, and how the fleet on them came about: `said` has what was measured, in words."""

    def __init__(self, spaces: Mapping[str, Namespace], *, simulated: bool) -> None:
        check_tools()
        self.simulated = simulated
        self.near, self.far = Machine(spaces["gw"]), Machine(spaces["gpu-b"])
        self.other = spaces["gpu-c"]
        self.said: list[tuple[str, str]] = []
        self.ssh = introduce(self.near, self.far)

    @property
    def url(self) -> str:
        """The gateway's."""
        return f"http://{self.near.space.address}"

    def status(self) -> dict[str, Any]:
        """What /status.json says."""
        found: dict[str, Any] = json.loads(get(f"{self.url}/status.json", timeout=30))
        return found

    def states(self) -> dict[str, str]:
        """Each replica's state, by name."""
        return {one["name"]: one["state"] for one in self.status()["replicas"]}

    def ready(self) -> bool:
        """Whether both replicas are."""
        with suppress(OSError, ValueError):
            states = self.states()
            return all(states.get(name) == "ready" for name in (NEAR, FAR))
        return False

    def note(self, what: str, value: str) -> None:
        """Keeps what was measured."""
        self.said.append((what, value))
        console.print(f"{what}: {value}", highlight=False, markup=False)

    # ---- what a user types

    def begin(self) -> None:
        """Boots both hosts and brings up the stack on the gateway's."""
        start = time.monotonic()
        for machine in (self.near, self.far):
            machine.boot()
        built = images.builds_of(Compose().config())
        replica = {name: build for name, build in built.items() if "replica" in name}
        gateway = {name: build for name, build in built.items() if "gateway" in name}
        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(self._bring, self.near, OPEN, built),
                pool.submit(self._bring, self.far, {}, replica | gateway),
            ]
            for job in jobs:
                job.result()
        # one replica is enough there
        (self.near.checkout / "docker-compose.override.yml").write_text("services:\n  vllm-1: !reset null\n")
        (self.near.checkout / "nginx" / "fleet" / "default.conf").write_text(fleet_line(NEAR) + "\n")
        self.note("both engines, with images, model and checkout", f"{time.monotonic() - start:.0f} s")
        start = time.monotonic()
        self.near.make("up", within_s=600)
        self.note("`make up` on gw, until its replica answers", f"{time.monotonic() - start:.0f} s")

    def _bring(self, machine: Machine, env: dict[str, str], wanted: dict[str, Build]) -> None:
        machine.wait()
        machine.clean()
        replica = next(image for image in wanted if "replica" in image)
        machine.load(wanted, replica, simulated=self.simulated)
        machine.clone(SMALL | env)
        if self.simulated:
            machine.simulate(replica, wanted[replica])

    @property
    def add(self) -> str:
        """The arguments that add gpu-b."""
        ssh = f" --ssh root@{self.far.space.address}:{self.far.checkout}" if self.ssh else ""
        return f"add gpu-b {self.far.space.address}{ssh}"

    def carry(self, args: str) -> None:
        """`make host ARGS='…'` on the gateway's host, and its file to the other one."""
        self.near.make("host", args)
        shutil.move(self.near.checkout / "gpu-b.join", self.far.checkout / "gpu-b.join")

    def take(self) -> None:
        """`make up ARGS='--join gpu-b.join'` on the other host."""
        self.far.make("up", "--join gpu-b.join", within_s=LOADED_S)

    def join(self) -> None:
        """Makes gpu-b one of the fleet, and notes when its replica is seen."""
        start = time.monotonic()
        self.carry(self.add)
        self.note("`make host ARGS='add gpu-b …'`", f"{time.monotonic() - start:.1f} s")
        assert self.states()[FAR] == "unreachable", self.states()
        start = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(self.take)
            seen: dict[str, float] = {}
            while FAR not in seen or not job.done():
                seen.setdefault(self.states()[FAR], time.monotonic() - start)
                if self.states()[FAR] == "ready":
                    seen.setdefault(FAR, time.monotonic() - start)
                if job.done():
                    job.result()
                time.sleep(0.2)
            ended = time.monotonic() - start
        if "loading" in seen:
            self.note("the status page shows its replica loading after", f"{seen['loading']:.0f} s")
        self.note("the status page shows it ready after", f"{seen[FAR]:.0f} s")
        self.note("`make up ARGS='--join gpu-b.join'` ends after", f"{ended:.0f} s")

    def check_seen(self) -> None:
        """AssertionError where an answer, the log, the status or Prometheus does not tell of gpu-b's replica."""
        replica = {one["name"]: one for one in self.status()["replicas"]}[FAR]
        assert replica["host"] == "gpu-b", replica

        body = {"model": PACKAGED, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}

        def answered() -> str:
            body["messages"] = [{"role": "user", "content": f"Hello, it is {time.monotonic()}"}]
            answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.headers["x-request-id"] if answer.headers["x-replica"] == FAR else ""

        with ThreadPoolExecutor(3) as pool:
            found = until(lambda: list(filter(None, pool.map(lambda _: answered(), range(3)))), f"{FAR} answers", 60)

        def logged() -> list[dict[str, Any]]:
            said = self.near.do("docker", "compose", "logs", "--no-log-prefix", "gateway")
            lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
            return [line for line in lines if line.get("id") == found[0]]

        (line,) = until(logged, "the request is in the log", 10)
        assert (line["replica"], line["host"]) == (FAR, "gpu-b"), line
        until(lambda: self.prometheus('up{host="gpu-b"}') == ["1"], "Prometheus reads gpu-b's replica", 60)
        metric = 'vllm:num_requests_running{host="gpu-b"}'
        until(lambda: self.prometheus(metric), "the replica's metrics are in Prometheus", 60)
        self.note("answers, log, status and Prometheus name gpu-b", "yes")

    def prometheus(self, query: str) -> list[str]:
        """The values that Prometheus has for a query."""
        curl = ("curl", "--silent", "--get", "--data-urlencode", f"query={query}", "prometheus:9090/api/v1/query")
        said = self.near.do("docker", "compose", "exec", "-T", "gateway", *curl)
        return [one["value"][1] for one in json.loads(said)["data"]["result"]]

    def check_status(self) -> None:
        """AssertionError where `make status` does not tell what it has to, on both hosts."""
        near, far = self.near.make("status"), self.far.make("status")
        assert re.search(rf"{FAR}\s+gpu-b\s+ready", near), near
        assert re.search(rf"{FAR}\s+healthy", far), far
        assert "gpu-b, a host of a fleet" in far, far
        assert NEAR not in far, far

    def down(self) -> None:
        """`make down` on the gateway's host; AssertionError where something runs afterwards."""
        start = time.monotonic()
        self.near.make("down")
        assert not self.near.services(), self.near.services()
        if self.ssh:
            assert not self.far.services(), self.far.services()
        where = "on gw, which ends it on both hosts" if self.ssh else "on gw"
        self.note(f"`make down` {where}", f"{time.monotonic() - start:.0f} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in (self.near, self.far):
            machine.remove()


@dataclass
class Arena(Watch):
    """A load on the fleet."""

    lab: Lab = field(kw_only=True)

    def hit_far(self) -> Machine:
        """gpu-b; the streams on it may be cut from now on."""
        self.hit.add(FAR)
        return self.lab.far

    async def quiet(self) -> None:
        """Ends the load, as nobody is there to ask."""
        await self.load.stop()

    async def again(self) -> None:
        """A new load, once the gateway says that it is ready: a replica of its own may still load then."""

        def ready() -> bool:
            with suppress(OSError):
                return bool(get(f"{self.lab.url}/ready", timeout=30))
            return False

        await asyncio.to_thread(until, ready, "the gateway is ready", LOADED_S)
        self.load = await load_on(self.lab, self.load.outcomes).__aenter__()


async def replica_killed(arena: Arena) -> None:
    """SIGKILL to the replica's container."""
    far = arena.hit_far()
    await asyncio.to_thread(far.kill, FAR)
    await arena.left(FAR, 5)
    await arena.back(FAR, LOADED_S)


async def far_end_killed(arena: Arena) -> None:
    """SIGKILL to the host's end of the link."""
    far = arena.hit_far()
    await asyncio.to_thread(far.kill, "link")
    await arena.back(FAR, 60)


async def near_end_killed(arena: Arena) -> None:
    """SIGKILL to the gateway's end of the link."""
    arena.hit_far()
    await asyncio.to_thread(arena.lab.near.kill, "link-gpu-b")
    await arena.back(FAR, 60)


async def cable_cut(arena: Arena) -> None:
    """The cable is cut and, after a while, mended."""
    far = arena.hit_far()
    far.space.cable.cut()
    await arena.left(FAR, 10)
    await arena.watch(HOLD)
    far.space.cable.mend()
    await arena.back(FAR, 60)


async def power_cut(arena: Arena) -> None:
    """The host is off without a word, and boots again."""
    far = arena.hit_far()
    far.power_off()
    await arena.left(FAR, 10)
    await arena.watch(HOLD)
    far.boot()
    await arena.back(FAR, LOADED_S)
    arena.note = "counted from its boot; its engine starts all that ran"


async def gateway_last(arena: Arena) -> None:
    """Both hosts lose power; the other one has booted, and its replica has loaded, when the gateway's host boots."""
    lab = arena.lab
    await arena.quiet()
    lab.near.power_off()
    lab.far.power_off()
    lab.far.boot()
    await asyncio.to_thread(lab.far.wait)
    await asyncio.to_thread(until, lambda: lab.far.health(FAR) == "healthy", "gpu-b's replica is healthy", LOADED_S)
    assert set(lab.far.services()) == {FAR, "link"}, lab.far.services()
    start = time.monotonic()
    lab.near.boot()
    await arena.again()
    await arena.back(FAR, 120)
    arena.recovery_s = time.monotonic() - start
    arena.note = "counted from the boot of the gateway's host"


async def gateway_gone(arena: Arena) -> None:
    """The gateway's host is off without a word while a stream runs on the other, and boots again."""
    lab = arena.lab
    await arena.quiet()

    def running() -> bool:
        curl = ("docker", "compose", "exec", "-T", FAR, "curl", "--silent", "--max-time", "5", "localhost:8000/metrics")
        return bool(re.search(r"^vllm:num_requests_running\S* [1-9]", lab.far.ask(*curl).stdout, re.MULTILINE))

    async with session() as client:
        held = [
            asyncio.create_task(
                stream(
                    client,
                    lab.url,
                    {
                        "model": PACKAGED,
                        "messages": [{"role": "user", "content": f"Write a long story, number {number}."}],
                        "max_tokens": 900,
                        "ignore_eos": True,
                    },
                    15,
                )
            )
            for number in range(4)
        ]
        await asyncio.to_thread(until, running, "a stream runs on gpu-b", 60)
        lab.near.power_off()
        gone = time.monotonic()
        await asyncio.to_thread(until, lambda: not running(), "what ran for the gateway has ended", NOTICED_S + 10)
        ended = time.monotonic() - gone
        streams = await asyncio.gather(*held)
    assert not any(one.done for one in streams), f"a stream outlived its gateway: {streams}"
    start = time.monotonic()
    lab.near.boot()
    await arena.again()
    await arena.back(FAR, 120)
    arena.recovery_s = time.monotonic() - start
    arena.note = f"what ran for it on gpu-b ended after {ended:.0f} s; served again counts from its boot"


async def expired(arena: Arena) -> None:
    """The host's certificate ends, and is renewed by the two commands."""
    lab = arena.lab
    secrets = Secrets(lab.near.checkout / "secrets")
    ca = certificates.read(hosts.folder(secrets))
    host = hosts.load(secrets).find("gpu-b")
    assert ca
    place = lab.far.checkout / "secrets" / "link"
    short = certificates.for_host(ca, host.membership, timedelta(seconds=4))
    hosts.write_end(place, ca.certificate, short, hosts.host_end(host.membership, [FAR]))
    ends = time.monotonic() + 4
    await asyncio.to_thread(lab.far.do, "docker", "compose", "exec", "-T", "link", "sh", "-c", "kill -HUP 1")
    await arena.left(FAR, 15)
    arena.route_s = max(0.0, time.monotonic() - ends)
    await arena.load.settle(WARM_REQUESTS, PATIENCE)
    start = time.monotonic()
    await asyncio.to_thread(lab.carry, "renew gpu-b")
    await asyncio.to_thread(lab.take)
    await arena.back(FAR, 60)
    arena.recovery_s = time.monotonic() - start
    arena.note = "served again counts from `make host ARGS='renew gpu-b'`, with `make up` there; no stream cut"


async def renewed(arena: Arena) -> None:
    """A certificate that is still good is renewed by the two commands: nobody notices."""
    start = time.monotonic()

    def both() -> None:
        arena.lab.carry("renew gpu-b")
        arena.lab.take()

    commands = asyncio.create_task(asyncio.to_thread(both))
    while not commands.done():
        await arena.states()
        await asyncio.sleep(0.1)
    await commands
    assert arena.seen_states[FAR] == {"ready"}, arena.seen_states
    await arena.back(FAR, 60)
    arena.note = f"both commands in {time.monotonic() - start:.0f} s"


async def revoked(arena: Arena) -> None:
    """The host is removed, and what it has does not get it back; added again, it serves."""
    lab = arena.lab
    arena.hit_far()
    start = time.monotonic()
    command = asyncio.create_task(asyncio.to_thread(lab.near.make, "host", "remove gpu-b"))
    listed = lab.near.checkout / "secrets" / "hosts" / "hosts.json"
    await asyncio.to_thread(until, lambda: "gpu-b" not in listed.read_text(), "gpu-b is off the list", 30)
    removed = time.monotonic()
    await asyncio.to_thread(until, lambda: not lab.near.container("link-gpu-b"), "its link has ended", 30)
    cut_s, since_s = time.monotonic() - start, time.monotonic() - removed
    await command
    late = [one for one in arena.load.outcomes if one.replica == FAR and one.sent > start + cut_s]
    assert not late, f"{len(late)} requests went there after it was removed"
    assert FAR not in lab.states(), "the gateway still knows its replica"
    await arena.load.settle(WARM_REQUESTS, PATIENCE)

    # the same name at the same address: the certificate of before is for another membership
    await asyncio.to_thread(lab.near.make, "host", lab.add)
    await arena.watch(3)
    assert "ready" not in arena.seen_states.get(FAR, set()) or lab.states()[FAR] != "ready", "its old file opens it"
    assert "does not match" in lab.near.log("link-gpu-b"), lab.near.log("link-gpu-b")[-500:]
    shutil.move(lab.near.checkout / "gpu-b.join", lab.far.checkout / "gpu-b.join")
    start = time.monotonic()
    await asyncio.to_thread(lab.take)
    await arena.back(FAR, 60)
    arena.recovery_s = time.monotonic() - start
    arena.route_s = cut_s
    # the command's own start takes longer where the cores have other work
    assert since_s < REVOKED_S, f"cut {since_s:.1f} s after it was off the list"
    arena.note = "with its old file it stayed out; served again counts from `make up` there, with the new one"


async def wrong_host(arena: Arena) -> None:
    """Another host of the fleet has the host's address for a while."""
    lab = arena.lab
    far, other = arena.hit_far(), lab.other
    file = lab.near.checkout / "gpu-c.join"
    await asyncio.to_thread(lab.near.make, "host", f"add gpu-c {other.address}")
    join = hosts.read_join(file)
    with tempfile.TemporaryDirectory(prefix="gpu-c-") as folder:
        place = Path(folder)
        place.chmod(0o755)
        hosts.write_end(
            place, join.ca, Pair(join.certificate, join.key), hosts.host_end(join.membership, join.replicas)
        )
        with End("host", place, "127.0.0.11", enter=other.enter):
            far.space.cable.cut()
            other.do("ip", "address", "add", f"{far.space.address}/24", "dev", "eth0")
            lab.near.do("ip", "neighbour", "flush", "dev", "eth0")
            await arena.left(FAR, 10)
            await asyncio.to_thread(until, lambda: "does not match" in lab.near.log("link-gpu-b"), "a refusal", 15)
            await arena.load.settle(WARM_REQUESTS, PATIENCE)
            assert lab.states()[FAR] != "ready"
            other.do("ip", "address", "del", f"{far.space.address}/24", "dev", "eth0")
            far.space.cable.mend()
            lab.near.do("ip", "neighbour", "flush", "dev", "eth0")
            await arena.back(FAR, 60)
    await asyncio.to_thread(lab.near.make, "host", "remove gpu-c")
    arena.note = "refused by its certificate"


async def rolled_there(arena: Arena) -> None:
    """`make roll` on the other host."""
    start = time.monotonic()
    await asyncio.to_thread(arena.lab.far.make, "roll")
    arena.note = f"{time.monotonic() - start:.0f} s"
    await arena.back(FAR, 60)


async def rolled_here(arena: Arena) -> None:
    """`make roll` on the gateway's host, which rolls all."""
    start = time.monotonic()
    said = await asyncio.to_thread(arena.lab.near.make, "roll", "", 2 * LOADED_S)
    wanted = f"rolled: {NEAR}" + (f", {FAR}" if arena.lab.ssh else "")
    assert wanted in said, said
    arena.note = f"{time.monotonic() - start:.0f} s" + (", by ssh to gpu-b" if arena.lab.ssh else ", of its own")
    await arena.back(FAR, 60)


async def down_there(arena: Arena) -> None:
    """`make down` on the other host, and `make up` after a while."""
    far = arena.lab.far
    await asyncio.to_thread(far.make, "down")
    assert not far.services(), far.services()
    await arena.load.settle(WARM_REQUESTS, PATIENCE)
    await asyncio.to_thread(far.make, "up")
    await arena.back(FAR, 60)
    arena.note = "no stream cut; served again counts from the end of `make up`"


CASES: list[Case[Arena]] = [
    # first: what was told to read its files anew has to be up again after a power cut too
    Case("certificate renewed", renewed, quick=True),
    Case("replica killed", replica_killed),
    Case("the host's end of the link killed", far_end_killed),
    Case("the gateway's end of the link killed", near_end_killed),
    Case("cable cut and mended", cable_cut),
    Case("power cut and boot", power_cut, quick=True),
    Case("the gateway's host boots last", gateway_last),
    Case("the gateway's host gone and back", gateway_gone),
    Case("certificate expired, then renewed", expired),
    Case("host removed, then added again", revoked, quick=True),
    Case("another host has its address", wrong_host),
    Case("`make roll` on the host", rolled_there),
    Case("`make roll` on the gateway's host", rolled_here),
    Case("`make down` and `make up` on the host", down_there),
]


def load_on(lab: Lab, outcomes: list[Outcome]) -> SteadyLoad:
    """The load of a row, small as a replica on a CPU is slow; `outcomes` is what there was before it."""
    shape = {"clients": 3, "prompt_tokens": 12, "max_tokens": 8, "turns": 2}
    return SteadyLoad(lab.url, PACKAGED, patience=PATIENCE, outcomes=outcomes, **shape)


async def play(case: Case[Arena], lab: Lab) -> Row:
    """Runs one case."""
    row = Row(case.name)
    await asyncio.to_thread(until, lab.ready, "both replicas ready", LOADED_S)
    load = await load_on(lab, []).__aenter__()
    arena = Arena(lab.states, load, lab=lab)
    try:
        await load.settle(WARM_REQUESTS, PATIENCE)
        await case.run(arena)
        await arena.load.settle(WARM_REQUESTS, PATIENCE)
    except (AssertionError, TimeoutError, OSError, MachineError, ValueError, httpx.HTTPError) as why:
        row.wrong.append(str(why) or type(why).__name__)
    finally:
        await arena.load.stop()
    judge(row, arena)
    return row
