"""All looks of `make doctor`, in their order, and how they are made: each within its time, all within theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil

from access.store import Mistake
from diagnosis import doors, fleet, machine, watch
from diagnosis.findings import Diagnosis, Found, Look, State, now
from diagnosis.seen import Seen
from stack.console import Problem

# A look at one thing, and all of them together.
LOOK_S = 30.0
ALL_S = 150.0


@dataclass(frozen=True)
class Task:
    """A look to be made: what it needs of those before it, and the function, which gives words for when all is well."""

    name: str
    title: str
    look: Callable[[Seen, Found], str]
    needs: frozenset[str] = frozenset()


def task(name: str, title: str, look: Callable[[Seen, Found], str], *needs: str) -> Task:
    """A look that needs what these name."""
    return Task(name, title, look, frozenset(needs))


TASKS = (
    task("settings", "Settings", machine.look_at_settings),
    task("docker", "Docker", machine.look_at_docker),
    task("files", "Compose files", machine.look_at_files, "settings", "docker"),
    task("ports", "Ports", machine.look_at_ports, "settings", "docker"),
    task("memory", "Memory", machine.look_at_memory),
    task("disk", "Disk", machine.look_at_disks),
    task("gpus", "GPUs", machine.look_at_gpus),
    task("images", "Images", fleet.look_at_images, "docker", "files"),
    task("models", "Models", fleet.look_at_models, "settings", "docker", "files"),
    task("services", "Services", fleet.look_at_services, "docker"),
    task("gateway", "Gateway", fleet.look_at_gateway, "docker", "stack"),
    task("replicas", "Replicas", fleet.look_at_replicas, "docker", "stack"),
    task("targets", "Metrics", watch.look_at_targets, "prometheus"),
    task("alerts", "Alerts", watch.look_at_alerts, "prometheus"),
    task("certificate", "Certificate", doors.look_at_certificate, "settings"),
    task("clock", "Clock", fleet.look_at_clocks),
    task("keys", "Keys", doors.look_at_keys, "settings"),
    task("tokens", "Token service", doors.look_at_tokens, "settings", "docker", "files"),
)
# Why a look is not made, by what it needs.
MISSING = {
    "settings": "the settings are wrong, see above",
    "docker": "Docker does not answer",
    "files": "the Compose files cannot be read, see above",
    "stack": "the stack is down",
    "prometheus": "Prometheus does not answer",
}


def diagnose(
    say: Callable[[str], None], tasks: Iterable[Task] = TASKS, look_s: float = LOOK_S, all_s: float = ALL_S
) -> tuple[Diagnosis, Seen]:
    """Makes all looks, and gives what came of them, and what was seen. `say` is told each title.

    A look that takes longer than `look_s`, or comes when `all_s` are over, is not made; so is one that cannot.
    """
    seen, looks, end = Seen(), [], time.monotonic() + all_s
    at = now()
    for one in tasks:
        say(one.title)
        looks.append(made(one, seen, min(look_s, end - time.monotonic())))
    end_children()
    return Diagnosis(at=at, looks=looks), seen


def made(one: Task, seen: Seen, within_s: float) -> Look:
    """One look, made in a thread of its own: what hangs in the system cannot be ended, only left behind."""
    if missing := sorted(one.needs - seen.has, key=list(MISSING).index):
        return Look(name=one.name, title=one.title, state="not looked", result=MISSING[missing[0]])
    if within_s <= 0:
        return Look(name=one.name, title=one.title, state="not looked", result="all looks together took too long")
    found, began = Found(), time.monotonic()
    said: list[str] = []
    failed: list[str] = []

    def run() -> None:
        try:
            said.append(one.look(seen, found))
        except (Problem, Mistake) as problem:
            found.wrong(one.title, problem.what, problem.fix)
        except Exception as error:  # noqa: BLE001 - a look that fails must not keep the others from being made
            failed.append(f"the look itself failed: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(within_s)
    if thread.is_alive():
        failed.append(f"no answer within {within_s:.0f} s")
    state: State = found.state()
    if failed and state != "wrong":
        state = "not looked"
    return Look(
        name=one.name,
        title=one.title,
        state=state,
        result=failed[0] if failed else said[0] if said else "",
        seconds=round(time.monotonic() - began, 2),
        findings=found.bounded(),
    )


def end_children() -> None:
    """Ends what looks that were left behind still wait for."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.Error:
            continue
