"""Looks at the stack itself: its images and models, its services, the gateway, the replicas, and their clocks."""

from __future__ import annotations

import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx

from diagnosis.deaths import Death, cause, shortened
from diagnosis.findings import Found, now
from diagnosis.seen import DOCKER_S, Container, Seen
from models import served
from stack import images
from stack.certificate import Untrusted
from stack.compose import is_replica
from stack.gateway import Gateway
from stack.shell import ROOT, ask

# Docker starts a service anew whenever it ends; so often within so long it does not get anywhere.
LOOP_RESTARTS, LOOP_FOR = 2, timedelta(minutes=15)
# So long a replica may load before its health check counts (docker-compose.yml, start_period).
LOADING = timedelta(minutes=30)
# What a request may take on its way, and the second that an HTTP date is cut to.
CLOCK_TOLERANCE_S = 5
DATE_S = 3
# What has a setting of its own for its memory limit.
MEMORY_SETTING = "REPLICA_MEMORY"

# Containers that have not ended, and do not run.
AT_REST = {
    "paused": ("it is paused", "docker compose unpause SERVICE"),
    "created": ("it was made and never started", "`make up` starts it"),
}


def look_at_images(seen: Seen, found: Found) -> str:
    """Whether each image is here, is of this checkout, and is what runs: an update by the pins needs no network."""
    stale = images.without_base(seen.config, seen.wanted.images)
    builds = images.builds_of(seen.config)
    notes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, service in seen.config.services.items():
        container, image = seen.containers.get(name), service.image
        ident = images.image_id(image)
        if container and container.image_name != image:
            what = f"an update is here: {container.image_name} runs, and this checkout pins {image}"
            notes[what, "`make up` brings it"].append(name)
        elif not ident and service.build:
            found.wrong(name, f"its image {image} is not on this machine", "`make up` makes it")
        elif not ident and not container:
            what = f"it is left out: its image {image} is not on this machine"
            found.note(name, what, "where a registry can be reached `make up` gets it; or `docker load` it")
        elif image in stale or (
            image in builds and images.label_of(image, images.RECIPE_LABEL) not in ("", images.recipe(builds[image]))
        ):
            notes[f"its image {image} is of another state of this checkout", "`make up` builds it anew"].append(name)
        elif container and ident and container.image != ident:
            fix = "`make roll`" if is_replica(name) else "`make up`"
            notes[f"it runs an older {image} than there is here", f"{fix} takes the new one"].append(name)
    for (what, fix), names in notes.items():
        found.note(", ".join(names), what, fix)
    behind = ask("git", "rev-list", "--count", "HEAD..@{upstream}", timeout=5).stdout.strip()
    if behind.isdigit() and int(behind):
        found.note("update", f"this checkout is {behind} commits behind what was last fetched", "git pull, `make up`")
    return ", ".join(dict.fromkeys(service.image for service in seen.config.services.values()))


def look_at_models(seen: Seen, found: Found) -> str:
    """Whether the models lie where replicas look for them."""
    wanted = served.of_fleet(seen.config)
    for model in wanted:
        if not served.is_here(model):
            what = f"it is not in {served.folder_of(model)}, so a replica has to fetch it, or does not start"
            found.note(model, what, "`make up` brings it; docs/guide.md#change-the-model")
    return ", ".join(wanted)


def look_at_services(seen: Seen, found: Found) -> str:
    """Every container but the replicas'."""
    if "stack" not in seen.has:
        found.wrong("stack", "it is down: no container of it is there", "`make up` starts it")
        return ""
    names = [name for name in {**seen.config.services, **seen.containers} if name not in seen.replicas]
    for name in names:
        look_at_container(name, seen, found)
    if "files" in seen.has:
        drift(seen, found)
    # of one that does not run all is said
    if "prometheus" not in seen.has and not any(one.subject == "prometheus" for one in found.all):
        found.check("prometheus", seen.prometheus.ask, "status/buildinfo")
    return ", ".join(name for name in names if name in seen.containers)


def drift(seen: Seen, found: Found) -> None:
    """Notes services that run with other settings than the files have now."""
    if any(container.labels.get("com.docker.compose.project.working_dir") != str(ROOT)
           for container in seen.containers.values()):  # fmt: skip
        return
    told = seen.compose.ask("config", "--hash", "*", timeout_s=DOCKER_S).split()
    hashes = dict(zip(told[::2], told[1::2], strict=False))
    other = [
        name
        for name, container in seen.containers.items()
        if name in hashes and container.labels.get("com.docker.compose.config-hash") != hashes[name]
    ]
    if other:
        what = "it was started with other settings than .env and the Compose files have now"
        fix = "`make up` applies them; `make roll` does it for replicas without a gap"
        found.note(", ".join(sorted(other)), what, fix)
    for name in seen.config.replicas:
        container, file = seen.containers.get(name), served.engine_file(seen.config.services[name])
        if container and container.runs and file and file.is_file():
            changed = datetime.fromtimestamp(int(file.stat().st_mtime), UTC)
            if changed > container.state.started:
                found.note(name, f"{file.name} was changed after it started", "`make roll` reads it", changed)


def look_at_container(name: str, seen: Seen, found: Found) -> bool:
    """Notes what is wrong with a service's container, and gives whether nothing is."""
    container = seen.containers.get(name)
    if container is None:
        service = seen.config.services[name]
        if service.build or images.present(service.image):
            found.wrong(name, "it has no container", "`make up` starts it")
            return False
        return True  # left out, which the look at images says
    state = container.state
    if state.status in AT_REST and not state.error:
        what, fix = AT_REST[state.status]
        found.wrong(name, what, to_do(fix, name, seen))
        return False
    if not container.runs:
        death = death_of(container, before_start=False)
        how = "it starts again and again" if state.status == "restarting" else f"it is {state.status}"
        what = f"{how}: {death.why}. Its log says: {death.line}"
        found.wrong(name, what, to_do(death.fix, name, seen), container.ended)
        return False
    if container.restarts >= LOOP_RESTARTS and now() - state.started < LOOP_FOR:
        death = death_of(container, before_start=True)
        what = f"it starts again and again ({container.restarts} times): {death.why}. Its log says: {death.line}"
        found.wrong(name, what, to_do(death.fix, name, seen), state.started)
        return False
    if container.restarts:
        death = death_of(container, before_start=True)
        what = f"Docker has started it again {times(container.restarts)}, last: {death.why}. Its log says: {death.line}"
        found.note(name, what, to_do(death.fix, name, seen), state.started)
    if failing := container.failing:
        what = f"it runs, but its health check fails: {shortened(failing.output) or 'it says nothing'}"
        found.wrong(name, what, to_do("docker compose logs --tail 50 SERVICE", name, seen), failing.start)
        return False
    return True


def to_do(fix: str, name: str, seen: Seen) -> str:
    """What to do about a service, with commands that find it where they are pasted."""
    on = seen.fleet[name].on if name in seen.fleet else ""
    compose = f"on {on}, docker compose" if on else seen.compose.line()
    return fix.replace("docker compose", compose).replace("SERVICE", name)


def times(count: int) -> str:
    """How often, in words."""
    return "once" if count == 1 else f"{count} times"


def death_of(container: Container, *, before_start: bool) -> Death:
    """Why a container's process ended, in this run or in the one before."""
    limit = MEMORY_SETTING if is_replica(container.service) else ""
    lines = container.log(before_start=before_start)
    last = shortened(lines[-1]) if lines else "it logged nothing"
    if container.state.error:
        return Death(f"Docker cannot start it ({container.state.error})", last, "mend that, then `make up`")
    if container.stays_down:
        why = f"somebody stopped it (exit status {container.state.exit_code})"
        return Death(why, last, "`make up` starts it")
    # of the run before Docker keeps neither exit status nor cause
    if before_start:
        return cause(lines)
    return cause(lines, container.state.exit_code, oom_killed=container.state.oom_killed, limit=limit)


def look_at_gateway(seen: Seen, found: Found) -> str:
    """Whether it answers as users ask, and whether its files could be read again."""
    gateway = seen.gateway
    try:
        fleet = gateway.published()
    except Untrusted as problem:
        found.wrong("gateway", problem.what, problem.fix)
        fleet = None
    container = seen.containers.get("gateway")
    if container and container.runs and "files" in seen.has:
        found.check("gateway", gateway.check_files)
    if fleet is None:
        if not found.all:
            fix = "docker compose logs --tail 50 gateway; is HTTP_PORT in .env what it was started with?"
            found.wrong("gateway", f"no answer from {seen.wanted.url}", fix, container.ended if container else None)
        return ""
    seen.has.add("gateway")
    seen.fleet = {replica.name: replica for replica in fleet}
    if not any(replica.serves for replica in fleet):
        since = seen.last_time('gateway_replica_state{state=~"ready|asleep"} == 1')
        found.wrong("gateway", "no replica is ready, so every request is refused", "see the replicas below", since)
    return f"answers at {seen.wanted.url}"


FIXES = {
    "wedged": "it gets no requests while others are ready; if it stays so: docker compose restart SERVICE",
    "loading": "wait; docker compose logs --follow SERVICE shows how far it is",
    "draining": "docs/guide.md#drain-by-hand-try-a-canary says how to put it back",
    "unreachable": "docker compose logs --tail 50 SERVICE",
}


def look_at_replicas(seen: Seen, found: Found) -> str:
    """Each replica: its container, and what the gateway says of it."""
    ready = asleep = 0
    # those on other hosts have no container here
    names = sorted({*seen.replicas, *seen.fleet} - seen.stopped)
    for name in names:
        lives = look_at_container(name, seen, found) if name in {*seen.containers, *seen.config.services} else True
        replica = seen.fleet.get(name)
        if replica is None:
            if lives and "gateway" in seen.has and name in seen.containers:
                found.wrong(name, "the gateway does not know it, so it gets no requests",
                            "its line in nginx/fleet/ is missing: `make up` says which")  # fmt: skip
            continue
        ready += replica.state == "ready"
        asleep += replica.state == "asleep"
        if not lives or replica.serves:
            continue
        condition = f'gateway_replica_state{{replica="{name}",state="ready"}} == 1'
        what = f"it is {replica.state}" + (f": {replica.reason}" if replica.reason else "")
        fix = to_do(FIXES.get(replica.state, FIXES["unreachable"]), name, seen)
        started = seen.containers[name].state.started if name in seen.containers else None
        loads = replica.state == "loading" and started is not None and now() - started < LOADING
        say = found.note if loads or replica.state == "draining" else found.wrong
        say(name, what, fix, seen.last_time(condition) or started)
    resting = f", {asleep} asleep" if asleep else ""
    stopped = f", {', '.join(sorted(seen.stopped))} stopped by the autoscaler" if seen.stopped else ""
    return f"{ready} of {len(names)} ready{resting}{stopped}" if "gateway" in seen.has else ""


def look_at_clocks(seen: Seen, found: Found) -> str:
    """This host's clock against those of the gateway, the replicas and Prometheus, and whether it is kept right."""
    kept = ask("timedatectl", "show", "--property=NTPSynchronized", "--value", timeout=5)
    if kept.returncode == 0 and kept.stdout.strip() == "no":
        what = "nothing keeps it right (NTP), and keys, tokens and certificates end by it"
        found.note("clock", what, "timedatectl set-ntp true, or install chrony")
    asked = 0
    for name, apart in apart_by(seen).items():
        asked += 1
        if abs(apart) > CLOCK_TOLERANCE_S:
            way = "ahead of" if apart > 0 else "behind"
            what = f"its clock is {abs(apart):.0f} s {way} this host's: rates and limits are wrong by that"
            found.wrong(name, what, "let NTP keep both hosts' clocks")
    if not asked:
        return "nobody to compare with"
    return f"{asked} parts within {CLOCK_TOLERANCE_S} s of this host" if not found.all else ""


def apart_by(seen: Seen) -> dict[str, float]:
    """By how many seconds the clock of each part that answers is ahead of this host's."""
    found: dict[str, float] = {}

    def take(name: str, date: str | None) -> None:
        try:
            # at once: the next answer may take its time
            found[name] = parsedate_to_datetime(date or "").timestamp() - time.time()
        except ValueError:
            return

    for name, url in (("gateway", f"{seen.wanted.url}/health"), ("prometheus", f"{seen.prometheus.url}/-/healthy")):
        try:
            answer = httpx.get(url, timeout=DATE_S, trust_env=False, verify=False)  # noqa: S501 - only its time is read
        except httpx.HTTPError:
            continue
        take(name, answer.headers.get("Date"))
    if "gateway" in seen.has:
        for name, replica in seen.fleet.items():
            if replica.serves or replica.state == "draining":
                take(name, date_of(seen.gateway, name))
    return found


def date_of(gateway: Gateway, replica: str) -> str | None:
    """The HTTP date of a replica's answer; None where there is none."""
    head = gateway.ask_replica(replica, "/health", "--dump-header", "-", "--max-time", str(DATE_S)) or ""
    return next((line[5:].strip() for line in head.splitlines() if line.lower().startswith("date:")), None)
