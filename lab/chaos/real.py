"""The short fault table on the real stack, through its published port: real replicas in their containers."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial

from lab.chaos.rows import Row, Watch, judge
from lab.sim.load import SteadyLoad
from lab.stack import Stack, StackError, run
from stack.shell import ROOT

VICTIM = "vllm-0"
# A replica loads its model for a minute or more.
START_SECONDS = 400.0
PATIENCE = 120.0
# How long a fault that passes by itself lasts, in seconds.
HOLD = 30.0


async def compose(*args: str) -> None:
    """`docker compose ARGS`; StackError where it fails."""
    await asyncio.to_thread(partial(run, "docker", "compose", *args, timeout_s=START_SECONDS))


async def kill(watch: Watch) -> None:
    """Every process of the container but its init gets SIGKILL."""
    # Everything in the container but its init: Docker starts it again by the restart policy, as after a crash.
    code = "import os; print('ready', flush=True); input(); os.kill(-1, 9)"
    command = ["docker", "compose", "exec", "-T", VICTIM, "python3", "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin
        assert killer.stdout
        await asyncio.to_thread(killer.stdout.readline)
        killer.stdin.write("\n")
        killer.stdin.flush()
        await watch.left(VICTIM, 1.0)
    await watch.back(VICTIM, START_SECONDS)


async def stop(watch: Watch) -> None:
    """The container stands still for a while."""
    await compose("pause", VICTIM)
    try:
        await watch.left(VICTIM, 10.0)
        await watch.watch(HOLD)
    finally:
        await compose("unpause", VICTIM)
    await watch.back(VICTIM, START_SECONDS)


async def network_cut(watch: Watch) -> None:
    """The container is out of its network for a while."""
    container = run("docker", "compose", "ps", "--quiet", VICTIM).strip()
    template = "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}"
    network = run("docker", "inspect", "--format", template, container).strip()
    start = time.monotonic()
    await asyncio.to_thread(run, "docker", "network", "disconnect", network, container)
    try:
        await watch.left(VICTIM, 10.0)
        await watch.watch(HOLD)
    finally:
        await asyncio.to_thread(run, "docker", "network", "connect", "--alias", VICTIM, network, container)
    await watch.back(VICTIM, START_SECONDS)
    late = [outcome.ttft for outcome in watch.load.outcomes if outcome.ended > start and outcome.ttft > HOLD]
    assert not late, f"{len(late)} waited for the network to come back, {max(late):.0f} s, and not for another replica"


async def recreate(watch: Watch) -> None:
    """The container is made anew."""
    await compose("up", "--detach", "--no-deps", "--force-recreate", VICTIM)
    await watch.back(VICTIM, START_SECONDS)


async def roll(watch: Watch) -> None:
    """`make roll` restarts every replica."""
    start = time.monotonic()
    await asyncio.to_thread(partial(run, sys.executable, "scripts/roll.py", timeout_s=2 * START_SECONDS))
    watch.note = f"{len(await watch.states())} replicas in {time.monotonic() - start:.0f} s"


CASES: list[tuple[str, Callable[[Watch], Awaitable[None]], bool]] = [
    ("killed (SIGKILL to all its processes)", kill, True),
    ("stopped (docker pause)", stop, True),
    ("network cut (docker network disconnect)", network_cut, True),
    ("recreated (docker compose up --force-recreate)", recreate, True),
    ("roll (make roll)", roll, False),
]


async def play(name: str, fault: Callable[[Watch], Awaitable[None]], hits: bool, stack: Stack) -> Row:
    """Runs one case; `hits` says whether streams of the first replica may be cut."""
    row = Row(name)
    load = SteadyLoad(stack.url, stack.model, clients=4, prompt_tokens=30, max_tokens=24, patience=PATIENCE)
    watch = Watch(stack.states, load)
    async with load:
        try:
            await load.settle(8, seconds=120)
            if hits:
                watch.hit.add(VICTIM)
            await fault(watch)
            await load.settle(8, seconds=120)
        except (AssertionError, TimeoutError, OSError, StackError) as why:
            row.wrong.append(str(why) or type(why).__name__)
    judge(row, watch)
    return row
