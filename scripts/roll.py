"""Restarts the replicas one after the other without breaking a stream.

Each is drained (it finishes what it has and gets nothing new), recreated with the image and settings of now, awaited
until it answers a one-token request, and put back into the route. The first that does not come back ends the roll; the
replicas not yet rolled go on serving as they are. So does the only replica of a model, for which nothing can stand in.

On a host whose gateway is elsewhere there is nobody to drain it by: a replica that is stopped turns new requests away,
which the gateway sends on, and finishes what it has within DRAIN_SECONDS.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.markup import escape

from stack import hosts
from stack.access import SECRETS, one_line
from stack.compose import Compose, running_files, stays_down
from stack.console import Problem, Step, console, step
from stack.gateway import Gateway, Replica
from stack.hosts import Host, Hosts
from stack.shell import wait_for, work

RECREATE = ("up", "--detach", "--force-recreate", "--no-deps")
# The gateway looks at each replica once a second.
ROUTE_S = 30


def alone_in(replicas: list[Replica], name: str) -> str:
    """The models, in words, that the named replica serves and none of the other `replicas`; '' where there are none."""
    served = {model for replica in replicas if replica.name == name for model in replica.models}
    others = {model for replica in replicas if replica.name != name for model in replica.models}
    return ", ".join(sorted(served - others))


def check_rest(compose: Compose, replicas: list[Replica], name: str, by_hand: str) -> None:
    """A Problem where nothing would serve a model while the named replica is away."""
    if models := alone_in([one for one in replicas if one.name == name or one.serves], name):
        stopped = next((one.name for one in replicas if one.state == "stopped"), "")
        start = f"start one that the autoscaler has stopped ({compose.line('start', stopped)}), " if stopped else ""
        raise Problem(
            f"{name} is the only ready replica of {models}: rolling it would stop the service",
            f"{start}wait until another one is ready (`make status`), or accept the gap: {by_hand}",
        )


def drain(gateway: Gateway, name: str, within_s: float, shown: Step) -> None:
    """Returns when the replica has nothing in flight. A Problem after so many seconds."""

    def is_idle() -> bool:
        in_flight = gateway.replica(name).in_flight
        shown.say(f"{in_flight} requests left")
        return in_flight == 0

    gateway.drain(name)
    if not wait_for(is_idle, within_s):
        raise Problem(
            f"{name} still has {gateway.replica(name).in_flight} requests after {within_s:.0f} s; it was left running",
            "run `make roll` again when it has less to do, or give it longer with ARGS='--drain-seconds …'",
        )


def recreate(compose: Compose, name: str, within_s: float, shown: Step) -> None:
    """Replaces the replica's container; returns when its health check, a one-token request, passes.

    A Problem, with the last words of the replica, where it does not start or not within so many seconds.
    """
    compose.ask(*RECREATE, name, timeout_s=within_s)
    began = compose.containers()

    def is_well() -> bool:
        container = compose.containers().get(name)
        if container is None or stays_down(container, began.get(name)):
            state = container.status if container else "it is gone"
            raise Problem(
                f"{name} did not come back ({state}): {compose.last_words(name)}",
                f"see `{compose.line('logs', name)}`, correct it, run `make roll` again; the others serve on",
            )
        shown.say(container.status)
        return container.well

    if not wait_for(is_well, within_s):
        raise Problem(
            f"{name} was not ready within {within_s:.0f} s: {compose.last_words(name)}",
            f"see `{compose.line('logs', name)}`; give it longer with ARGS='--ready-seconds …'; the others serve on",
        )


@contextmanager
def back_in_the_route(gateway: Gateway, name: str) -> Iterator[None]:
    """Lets the gateway send to the replica again after the body, however that ended.

    One that is not ready is out of the route anyway; ready again later, it should serve.
    """
    try:
        yield
    except BaseException:
        try:
            gateway.undrain(name)
        except Problem as problem:
            # not raised: what went wrong before is what the operator has to know
            console.print(f"[red]{name} stays drained[/] {escape(problem.what)}", soft_wrap=True)
        raise
    gateway.undrain(name)


def await_route(gateway: Gateway, name: str) -> None:
    """Returns when the gateway sends requests to the replica again. A Problem after ROUTE_S."""
    if not wait_for(lambda: gateway.replica(name).serves, ROUTE_S):
        replica = gateway.replica(name)
        raise Problem(
            f"{name} is healthy, but the gateway says {replica.state}: {replica.reason}",
            "see `docker compose logs gateway`; the others serve on",
        )


def known_names(names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The replicas to roll: those named, or all. A Problem where there is none of a name."""
    if unknown := set(names or []) - set(known):
        raise Problem(f"there is no replica {', '.join(sorted(unknown))}", f"name some of {', '.join(known)}")
    return list(names or known)


def ways(replicas: Sequence[Replica], known: Hosts, *, named: bool) -> dict[str, Host | None]:
    """Of these replicas those that can be rolled from here, with the host that each is on, None for this one. A Problem
    for one on a host without a way there, if it was `named`; else that is said."""
    found: dict[str, Host | None] = {}
    for replica in replicas:
        host = known.find(replica.on) if replica.on else None
        if not host or host.ssh:
            found[replica.name] = host
            continue
        fix = f"run make roll ARGS={replica.name} there, or add the host with --ssh"
        if named:
            raise Problem(f"{replica.name} is on {host.name}, and this host knows no way there", fix)
        console.print(f"{replica.name} is left as it is, on {host.name}: {fix}", soft_wrap=True)
    return found


def roll_behind_gateway(
    compose: Compose, names: list[str] | None, drain_seconds: float, ready_seconds: float
) -> list[str]:
    """Rolls the replicas behind this host's gateway, those on other hosts too if there is a way there; gives which."""
    gateway = Gateway(compose)
    known = hosts.load(SECRETS)
    replicas = gateway.replicas()
    asked = known_names(names, [replica.name for replica in replicas])
    host_of = ways([one for one in replicas if one.name in asked], known, named=bool(names))
    by_hand = {
        name: shlex.join(hosts.over_ssh(host, "roll", name)) if host else compose.line(*RECREATE, name)
        for name, host in host_of.items()
    }
    lone = {name: models for name in host_of if (models := alone_in(replicas, name))}
    rolled = [name for name in asked if name in host_of and name not in lone]
    for name, models in lone.items():
        if names or not rolled:
            raise Problem(
                f"{name} is the only replica of {models}: rolling it would stop the service",
                f"give it a second one, or accept the gap: {by_hand[name]}",
            )
        console.print(
            f"{name} is left as it is: it is the only replica of {models}. With a gap: {by_hand[name]}",
            soft_wrap=True,
        )
    compose.check_launch(compose.config(), "make roll")
    for name in rolled:
        if gateway.replica(name).state == "stopped":
            with step(f"{name}: made anew, and left to the autoscaler"):
                compose.ask("up", "--no-start", "--force-recreate", "--no-deps", name)
            continue
        check_rest(compose, gateway.replicas(), name, by_hand[name])
        host = host_of[name]
        with back_in_the_route(gateway, name):
            with step(f"{name}: drain") as shown:
                drain(gateway, name, drain_seconds, shown)
            with step(f"{name}: recreate and answer a one-token request") as shown:
                if host:
                    work(
                        hosts.over_ssh(host, "roll", name),
                        shown.say,
                        fix=f"see what {host.name} says; the others serve on",
                    )
                else:
                    recreate(compose, name, ready_seconds, shown)
        with step(f"{name}: back in the route"):
            await_route(gateway, name)
    return rolled


def roll(
    names: Annotated[list[str] | None, typer.Argument(help="Replicas to roll; all of them if none is named.")] = None,
    drain_seconds: Annotated[float, typer.Option(help="How long running requests may take to finish.")] = 600,
    ready_seconds: Annotated[float, typer.Option(help="How long a replica may take to load and answer.")] = 1800,
) -> None:
    """Restart the replicas one after the other without breaking a stream."""
    with one_line():
        compose = Compose(*running_files())
        if joined := hosts.joined(SECRETS):
            rolled = known_names(names, joined.replicas)
            compose.check_launch(compose.config(), "make roll")
            for name in rolled:
                with step(f"{name}: recreate and answer a one-token request") as shown:
                    recreate(compose, name, ready_seconds, shown)
        else:
            rolled = roll_behind_gateway(compose, names, drain_seconds, ready_seconds)
        console.print(f"rolled: {', '.join(rolled)}")


if __name__ == "__main__":
    typer.run(roll)
