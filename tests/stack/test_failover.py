"""Replicas that die under load: nothing fails that had not begun, and they come back into the route by themselves.

"Begun" means that a token has reached the client. A stream that had begun on the dead one is cut: its KV cache is gone.
"""

import asyncio
import json
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import requests

from lab.sim.load import Outcome, SteadyLoad
from lab.stack import Stack, run
from lab.waiting import until
from stack.shell import ROOT

VICTIM = "vllm-1"
CLIENTS = 4


def under_load(stack: Stack, fault: Callable[[], None], back_within_s: float) -> list[Outcome]:
    """Do `fault` while clients stream, wait until the victim serves again, and return every request's outcome."""

    async def scenario() -> list[Outcome]:
        async with SteadyLoad(
            stack.url,
            stack.model,
            clients=CLIENTS,
            prompt_tokens=20,
            max_tokens=8,
            patience=60,
            turns=2,
            # new conversations each time: known ones go where they were
            seed=time.time_ns(),
        ) as load:

            def served(since: float) -> set[str | None]:
                return {outcome.replica for outcome in load.outcomes if outcome.done and outcome.sent > since}

            def back() -> bool:
                return bool(stack.replicas()[VICTIM]["state"] == "ready")

            replicas = set(stack.replicas())
            await asyncio.to_thread(until, lambda: served(0) == replicas, "all serve before the fault", 60)
            await asyncio.to_thread(fault)
            hit = time.monotonic()
            await asyncio.to_thread(until, lambda: served(hit) >= replicas - {VICTIM}, "the others go on", 60)
            # Until the gateway's next look the victim still counts as ready.
            await asyncio.to_thread(until, lambda: not back(), f"{VICTIM} out of the route", 60)
            await asyncio.to_thread(until, back, f"{VICTIM} back in the route", back_within_s)
            again = time.monotonic()
            await asyncio.to_thread(until, lambda: VICTIM in served(again), f"{VICTIM} serves again", 60)
        return load.outcomes

    return asyncio.run(scenario())


def assert_nothing_failed(outcomes: list[Outcome]) -> None:
    """No request failed that had not begun, and only streams on the victim were cut."""
    failed = [(outcome.status, outcome.replica, outcome.why) for outcome in outcomes if outcome.failed]
    assert not failed
    refused = [(outcome.status, outcome.why) for outcome in outcomes if outcome.refused]
    assert not refused
    cut = [outcome.replica for outcome in outcomes if outcome.cut]
    assert set(cut) <= {VICTIM}
    assert len(cut) <= CLIENTS


@pytest.mark.timeout(400)
def test_a_replica_that_crashes(stack: Stack) -> None:
    """All processes of a replica are killed under load: nothing fails, and Docker's restart policy brings it back."""
    stack.wait_ready()

    def crash() -> None:
        # Everything in the container but its init, which then ends as after a crash. This shell may be gone too
        # before it tells how it went; the count of restarts tells it.
        command = ["docker", "compose", "exec", "-T", VICTIM, "sh", "-c", "kill -9 -1"]
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)

    before = restarts()
    assert_nothing_failed(under_load(stack, crash, back_within_s=240))
    assert restarts() == before + 1


@pytest.mark.timeout(400)
def test_a_replica_recreated_with_a_new_address(stack: Stack) -> None:
    """A replica is killed under load and made anew elsewhere: nothing fails, and the gateway finds it."""
    stack.wait_ready()
    network, old = network_and_address(container())

    def kill_and_recreate() -> None:
        stack.compose("kill", VICTIM)
        stack.compose("rm", "--force", VICTIM)
        with taken(network, old):
            stack.compose("up", "--detach", "--no-deps", "--no-build", VICTIM)
        assert network_and_address(container())[1] != old

    assert_nothing_failed(under_load(stack, kill_and_recreate, back_within_s=240))


def test_a_request_sent_into_a_cut_network_goes_elsewhere(stack: Stack) -> None:
    """Right after the cut the gateway sends on a connection that it kept; nobody answers there, so it is moved."""
    stack.wait_ready()

    def ask(client: requests.Session, prompt: str) -> str:
        body = {"model": stack.model, "prompt": prompt, "max_tokens": 1}
        answer = client.post(f"{stack.url}/v1/completions", json=body, timeout=40)
        assert answer.status_code == 200, answer.text
        return answer.headers["X-Replica"]

    # One connection to the gateway: the worker that has it is the one that kept a connection to the victim.
    with requests.Session() as client:
        client.headers.update(stack.headers)

        def known_to_victim() -> str:
            prompt = f"{secrets.token_hex(16)} " + "and so on " * 50
            return prompt if ask(client, prompt) == VICTIM else ""

        prompt = until(known_to_victim, f"{VICTIM} is sent a new prompt", 60)
        name = container()
        network, _ = network_and_address(name)
        run("docker", "network", "disconnect", network, name)
        try:
            assert ask(client, prompt) != VICTIM
        finally:
            run("docker", "network", "connect", "--alias", VICTIM, network, name)
        stack.wait_ready()
        # The gateway's looks find a name that is back at once, the upstream some seconds later.
        until(known_to_victim, f"{VICTIM} serves again", 60)


def restarts() -> int:
    """How often Docker has restarted the victim."""
    return int(run("docker", "inspect", "--format", "{{.RestartCount}}", container()))


def container() -> str:
    return run("docker", "compose", "ps", "--all", "--quiet", VICTIM).strip()


def network_and_address(name: str) -> tuple[str, str]:
    """The network that a container is in, and its address there."""
    networks = json.loads(run("docker", "inspect", "--format", "{{json .NetworkSettings.Networks}}", name))
    ((network, settings),) = networks.items()
    return network, settings["IPAddress"]


@contextmanager
def taken(network: str, address: str) -> Iterator[None]:
    """Other containers join the network until one of them has the address, so that the next replica cannot get it."""
    image = run("docker", "compose", "images", "--quiet", "gateway").strip()
    holders: list[str] = []
    try:
        for number in range(8):
            holders.append(f"vllm-fleet-test-holder-{number}")
            command = ["docker", "run", "--detach", "--rm", "--name", holders[-1], "--network", network]
            run(*command, "--entrypoint", "sleep", image, "300")
            if network_and_address(holders[-1])[1] == address:
                break
        yield
    finally:
        for name in holders:
            subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)
