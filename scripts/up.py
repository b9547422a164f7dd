"""Brings the whole stack up, from whatever this machine has. `make up` runs it; run again it changes nothing.

First come the steps that only look, then those that do something. Each can be run again at any time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from models import served
from planner import check, render
from stack import (
    autoscaling,
    burn_rates,
    certificate,
    checks,
    docker,
    hosts,
    hours,
    images,
    objectives,
    reload,
    scale,
    settings,
)
from stack.access import (
    SECRETS,
    as_problems,
    asks_for_keys,
    check_environment,
    check_users,
    check_webui,
    first_key,
    one_line,
    own_key,
    take_environment,
    webui_key,
)
from stack.certificate import Untrusted
from stack.compose import (
    GPU_FILE,
    LINKS_FILE,
    OVERRIDE,
    REPLICAS_FILE,
    Compose,
    Config,
    Container,
    is_replica,
    running,
    stays_down,
)
from stack.console import Problem, console, step
from stack.gateway import SERVING, Gateway, check_named
from stack.host import (
    check_disk,
    check_memory,
    check_pins,
    check_ports,
    check_profiles,
    choose_gpus,
    further_files,
    listed_gpus,
    published_ports,
)
from stack.hosts import Hosts, Join
from stack.shell import CACHE, LOG, ROOT, Say, ask, let_all_read, wait_for, work

# An authority that answers has given one by then.
CERTIFICATE_S = 120
# What only a profile starts, and which.
BY_PROFILE = {
    "tokens": "tokens",
    "traces": "traces",
    "webui": "webui",
    "alertmanager": "alerts",
    "triton": "triton",
    "triton-canary": "triton-canary",
    "node-exporter": "hardware",
    "dcgm-exporter": "hardware",
    "autoscaler": "autoscaler",
    "switch": "autoscaler",
}
QUESTION = "What is the capital of France?"


def open_mounts(config: Config) -> None:
    """Lets containers read what they mount of this checkout: a clone under a strict umask keeps it to its owner."""
    sources = {Path(volume.source) for service in config.services.values() for volume in service.volumes}
    for source in sources - {served.MODELS}:
        if source.is_relative_to(ROOT):
            let_all_read([source, *source.rglob("*")])


def not_ready(
    compose: Compose,
    services: list[str],
    containers: Mapping[str, Container],
    states: Mapping[str, str],
    began: Mapping[str, Container],
) -> list[str]:
    """What is still missing, in words; empty when every service is healthy and every replica ready, or asleep.

    `states` are those that the gateway gives its replicas, `began` the containers at the beginning of the wait. A
    service that waiting will not bring up is a Problem.
    """
    missing = []
    for service in services:
        container, log = containers.get(service), compose.line("logs", service)
        if states.get(service) == "stopped":
            continue  # by the autoscaler, which starts it when it is needed
        if states.get(service) == "draining":
            # its container may end at any moment, and is to
            missing.append(f"{service} draining")
            continue
        if container is None or stays_down(container, began.get(service)):
            what = "stops instead of starting" if container else "was removed"
            raise Problem(f"{service} {what}", f"see why ({log}), correct it, and run `make up` again")
        if container.health == "unhealthy":
            raise Problem(f"{service} runs but is unwell", f"see why: {log}")
        state = states.get(service, "not in the route yet") if is_replica(service) else "ready"
        if not container.well:
            missing.append(f"{service} {states.get(service) or container.health or container.state}")
        elif state not in SERVING:
            missing.append(f"{service} {state}")
    return missing


def wait_until_ready(compose: Compose, gateway: Gateway | None, services: list[str], say: Say) -> None:
    """Returns when every service is healthy and every replica ready; a Problem has the last words of its service.

    `gateway`: None where it is on another host. A replica's own health check then decides.
    """
    began = compose.containers()

    def ready() -> bool:
        replicas = gateway.published() if gateway else []
        states = {replica.name: replica.state for replica in replicas or ()}
        if not gateway:
            states = dict.fromkeys(services, "ready")
        try:
            missing = not_ready(compose, services, compose.containers(), states, began)
        except Problem as problem:
            service = problem.what.split()[0]
            raise Problem(f"{problem.what}: {compose.last_words(service)}", problem.fix) from None
        say(", ".join(missing) or "the gateway does not answer yet")
        return replicas is not None and not missing

    wait_for(ready, every_s=1)


def wait_for_certificate(compose: Compose, gateway: Gateway, before: Container | None) -> None:
    """Returns when the gateway has a certificate that can be verified; a Problem says why it has none.

    `before` is the container that asks the authority as it was before this command: it may have hours to sleep.
    """
    untrusted: list[Untrusted] = []

    def served() -> bool:
        untrusted.clear()
        try:
            return gateway.answers()
        except Untrusted as problem:
            untrusted.append(problem)
            return False

    if served():
        return
    now = compose.containers().get("acme")
    if before and now and before.id == now.id:
        compose.ask("restart", "acme")
    if wait_for(served, CERTIFICATE_S):
        return
    if untrusted:
        raise untrusted[0]
    raise Problem(
        f"no certificate after {CERTIFICATE_S} s: {compose.last_words('acme')}",
        "HTTPS_DOMAIN has to point at this host, and port 80 has to be reachable from the authority;"
        f" see `{compose.line('logs', 'acme')}`",
    )


def remove_left_out(compose: Compose, config: Config, say: Say) -> None:
    """Stops and removes what has run by a profile that is gone: Compose calls no such service an orphan."""
    running = compose.containers()
    for name, profile in BY_PROFILE.items():
        if name in running and name not in config.services:
            remove = ("--profile", profile, "rm", "--stop", "--force", name)
            work(compose.command(*remove), say, fix=f"see `{compose.line('logs', name)}`")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits for another `make up` of this checkout to end."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step("Another `make up` runs here; waiting for its end"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def give_back() -> None:
    """Gives what root made under sudo to the user whose checkout this is: their next run writes there too."""
    user = os.environ.get("SUDO_UID", "")
    if os.geteuid() == 0 and user == str(ROOT.stat().st_uid):
        made = [str(folder) for folder in (CACHE, ROOT / ".venv", served.MODELS, SECRETS.folder) if folder.exists()]
        owner = f"{user}:{os.environ.get('SUDO_GID', '')}"
        ask("chown", "--recursive", "--no-dereference", "--from=root", owner, *made)


def bring_keys(wanted: settings.Settings, config: Config) -> str:
    """Makes the first key and takes the users of `.env`, where there is need; says in words who is asked for a key."""
    if made := first_key(wanted):
        # before anything that can fail: it is never shown again
        console.print("  The gateway is open to others, so it asks for a key. This is the administrator's, shown once:")
        console.print(f"  [bold]{made}[/]", soft_wrap=True)
        console.print("  `make key` makes one for each user. With GATEWAY_AUTH=off in .env it asks nobody.")
    take_environment()
    if "tokens" in config.services:
        check_users()
    return "asked of everybody" if asks_for_keys(wanted) else "asked of nobody"


def take_part(file: Path) -> Join:
    """Makes this host one of a fleet, by the file that `make host` wrote. A Problem where it has a gateway itself."""
    found = hosts.read_join(file)
    if "gateway" in running('{{.Label "com.docker.compose.service"}}').split():
        raise Problem(
            "this host runs a gateway of its own, which would be stopped",
            "is it the right host? If so, make down first",
        )
    hosts.take_join(SECRETS, found)
    return found


def write_part(joined: Join, wanted: settings.Settings) -> None:
    """Writes docker-compose.override.yml for a host that joins: its replicas and its link."""
    if render.changed_by_hand(OVERRIDE):
        raise Problem(f"{OVERRIDE.name} was changed by hand", "move it away, and run `make up` again")
    text = joined.part
    if not text:
        use = wanted.gpu != "off" and docker.gpu_toolkit()
        gpus = [str(number) for number in range(checks.gpus_listed(listed_gpus()))] if use else []
        if gpus and len(gpus) < len(joined.replicas):
            raise Problem(
                f"{joined.host} was added with {len(joined.replicas)} replicas, and has {len(gpus)} GPUs",
                f"on the gateway's host: make host ARGS='remove {joined.host}', and add it with fewer --replicas",
            )
        if len(gpus) > len(joined.replicas):
            console.print(f"  {len(gpus) - len(joined.replicas)} GPUs are left without a replica: docs/hosts.md")
        said = {name: f"${{{name}:-{value}}}" for name, value in joined.settings.items()}
        body = render.unplanned_file(joined.replicas, ROOT / "docker-compose.yml", gpus, said)
        text = render.signed(body, f"the replicas of {joined.host}", "make up")
    OVERRIDE.write_text(text)


def check_joined(joined: Join, config: Config, wanted: settings.Settings) -> None:
    """A Problem where this host is not what the gateway's knows of it; says what differs from there."""
    if set(config.replicas) != set(joined.replicas):
        raise Problem(
            f"this host's replicas are {', '.join(config.replicas) or 'none'}, but the fleet knows those of"
            f" {joined.host} as {', '.join(joined.replicas)}",
            f"put {OVERRIDE.name} back; for another plan see docs/hosts.md",
        )
    if wanted.link_port != joined.port:
        raise Problem(
            f"the gateway asks at port {joined.port}, but LINK_PORT is {wanted.link_port}",
            f"set LINK_PORT={joined.port} in .env",
        )
    # what a newer docker-compose.yml has besides is the gateway's host's
    config.services = {name: one for name, one in config.services.items() if name in {*joined.replicas, "link"}}
    for line in hosts.differences(joined, hosts.vllm_version(config), settings.with_users()):
        console.print(f"  [yellow]{line}[/]", soft_wrap=True)


def say_joined(joined: Join) -> None:
    """What this host is of the fleet."""
    names = ", ".join(joined.replicas)
    console.print(f"\n[bold]{joined.host}[/]  {names}; the gateway reaches it at port {joined.port}, and shows it")
    for line in hosts.own_ending(joined):
        console.print(f"[yellow]{line}[/]", soft_wrap=True)


def other_hosts(known: Hosts, gateway: Gateway) -> str:
    """In words, how many of each other host's replicas are ready, and why one is not. They are not waited for."""
    replicas = {replica.name: replica for replica in gateway.published() or ()}
    said = []
    for host in known.hosts:
        found = [replicas[one.name] for one in host.replicas if one.name in replicas]
        away = [replica for replica in found if not replica.serves]
        why = f" ({away[0].name} {away[0].state}: {away[0].reason})" if away else ""
        said.append(f"{host.name} {len(found) - len(away)} of {len(host.replicas)} ready{why}")
    return ", ".join(said)


def set_replicas(count: int, further: list[str], known: Hosts) -> None:
    """Writes down how many replicas this host has. A Problem where it cannot have so many; all is then as before."""
    path = ROOT / REPLICAS_FILE
    before = path.read_text() if path.exists() else ""
    taken = {one.name for host in known.hosts for one in host.replicas}
    scale.write(count, Compose(*further).config(), taken, checks.gpus_listed(listed_gpus()))
    try:
        compose = Compose(*further, *[REPLICAS_FILE] * path.exists())
        changed, containers = compose.config(), compose.containers()
        if new := [name for name in changed.replicas if name not in containers]:
            check_memory(changed, new)
    except Problem:
        hosts.make_file(path, before)
        raise


def take_out_surplus(compose: Compose, config: Config, gateway: Gateway, drain_s: float) -> None:
    """Drains the replicas that run and are not wanted any more; the next step removes them."""
    leaving = scale.surplus(compose, config)
    gateway_there = compose.containers().get("gateway")
    if leaving and gateway_there and gateway_there.well:
        with step(f"{', '.join(leaving)}: drain") as shown:
            scale.drain(gateway, leaving, drain_s, shown)


def up(join_file: Path | None = None, replicas: int | None = None) -> None:
    """All the steps, in their order. The first that cannot be done is a Problem."""
    with step("Settings") as shown:
        # a clone leaves secrets/ open to this host's other users
        SECRETS.prepare()
        wanted = settings.load()
        settings.check_private()
        hours.check(wanted.awake)
        check_environment()
        aims = objectives.load()
        shown.result = ".env" if settings.ENV_FILE.exists() else "the defaults; .env.example lists them"
    with step("Docker") as shown:
        shown.result = docker.check()
    own = published_ports()
    with as_problems():
        joined = take_part(join_file) if join_file else hosts.joined(SECRETS)
        known = hosts.load(SECRETS)
    if wanted.https_port and not wanted.https_domain and not joined:
        with step("Certificate") as shown:
            shown.result = certificate.check()
    with step("Ports") as shown:
        shown.result = check_ports(wanted, own, joined=joined is not None)

    with step("Docker engine and plugins") as shown:
        shown.result = docker.bring(shown.say)
    if joined and replicas:
        raise Problem(
            f"{joined.host}'s replicas are what the gateway's host knows of it", "docs/hosts.md says how to change them"
        )
    if joined and join_file:
        with step("Part of the fleet") as shown:
            write_part(joined, wanted)
            shown.result = f"{joined.host}: {', '.join(joined.replicas)}"
    hosts.lay_out_links(known)
    with step("GPUs") as shown:
        gpu, shown.result = choose_gpus(wanted)
        files = [GPU_FILE] * gpu if joined else further_files(wanted, gpu=gpu)
        further = [*files, *[LINKS_FILE] * bool(known.hosts)]
        if replicas:
            set_replicas(replicas, further, known)
        if (ROOT / REPLICAS_FILE).exists() and not joined:
            further.append(REPLICAS_FILE)
        compose = Compose(*further)
        config = compose.config()
        check_profiles(compose)
        if not joined:
            checks.traces_have_a_store(wanted=wanted.trace_sample is not None, there="traces" in config.services)
            if "webui" in config.services:
                check_webui(wanted)
        check_pins(config)
        checks.triton_is_built({name: images.present(config.services[name].image) for name in config.tritons})
    if joined:
        check_joined(joined, config, wanted)
    else:
        hosts.check_unique(known, config.replicas)
        hosts.lay_out_fleet(known, config)
        if "autoscaler" in config.services:
            with step("Autoscaler") as shown:
                shown.result = autoscaling.check(settings.with_users(), config)
    gateway = None if joined else Gateway(compose, wanted.url, wanted.https_domain)
    if not own:
        with step("Memory") as shown:
            shown.result = check_memory(config)
    if missing := images.without_base(config, wanted.images):
        with step("Disk") as shown:
            shown.result = check_disk(missing.values())
    with step("Images") as shown:
        shown.result = images.bring(config, wanted.images, shown.say)
    # what is built over no base of `make up` Compose builds
    services = [name for name, service in config.services.items() if service.build or images.present(service.image)]
    for name in config.services.keys() - services:
        image = config.services[name].image
        console.print(
            f"  {name} is left out: its image {image} is not on this machine and no registry offers it."
            " To add it later: `docker load` the image, then `make up`",
            soft_wrap=True,
        )
    served.fetch(config)
    with step("Model") as shown:
        shown.result = served.bring(config, shown.say)
        if not own:
            # the weights that were missing have a size now
            check_memory(config)
    another_key = False
    if gateway:
        with step("Keys") as shown:
            shown.result = bring_keys(wanted, config)
            another_key = "webui" in config.services and webui_key(SECRETS)
        with step("Objectives") as shown:
            shown.result = burn_rates.write(aims)
    open_mounts(config)
    with step("Settings of the replicas") as shown:
        there = {name: config.services[name] for name in services}
        shown.result = compose.check_launch(config.model_copy(update={"services": there}), "make up")
    before = compose.containers()
    if gateway:
        take_out_surplus(compose, config, gateway, autoscaling.check_settings(settings.with_users()).drain_s)
        scale.lay_out_fleet(config, Compose(*[file for file in further if file != REPLICAS_FILE]).config().replicas)
        check_named(config)
    stopped = gateway.stopped() if gateway and "autoscaler" in config.services else []
    with step("Containers") as shown:
        remove_left_out(compose, config, shown.say)
        start = ("--progress", "plain", "up", "--detach", "--remove-orphans")
        running = [name for name in services if name not in stopped]
        work(compose.command(*start, *running), shown.say, fix=f"see `{compose.line('logs')}`")
        if stopped:
            # as the files have them now, for when the autoscaler starts them
            compose.ask("up", "--no-start", "--no-deps", *stopped)
        shown.result = ", ".join(services)
    if gateway and another_key and "webui" in before:
        compose.ask("restart", "webui")
    if gateway and wanted.https_domain:
        with step("Certificate") as shown:
            wait_for_certificate(compose, gateway, before.get("acme"))
            shown.result = "the gateway's can be verified"
    if gateway:
        with step("Gateway's configuration") as shown:
            shown.result = gateway.reload_if_changed(config)
            for name in config.replicas:
                if name not in before and "gateway" in before:
                    # whatever was said of a replica of that name
                    gateway.undrain(name)
        with step("Rules of alerts") as shown:
            shown.result = reload.by_whom_it_concerns(compose)
    if "link" in before and join_file:
        # reads its certificate anew; no connection ends
        compose.read_anew("link")
    with step("Ready") as shown:
        wait_until_ready(compose, gateway, services, shown.say)
        shown.result = "every service is healthy, every replica answers"
    if joined:
        say_joined(joined)
    if not gateway:
        return
    if known.hosts:
        with step("Other hosts") as shown:
            shown.result = other_hosts(known, gateway)
        for line in hosts.ending(known):
            console.print(f"  [yellow]{line}[/]", soft_wrap=True)
    # without one here, the others may still be on their way
    if config.replicas:
        with step(QUESTION) as shown, own_key(wanted, "make-up", life_s=600) as key:
            shown.result = gateway.first_answer(QUESTION, key)
    if config.planned:
        with step("The plan's figures") as shown:
            compared = check.compare(compose, gateway, config)
            shown.result = check.summary(compared)
        check.show(console, compared)

    console.print(f"\n[bold]API[/]         {wanted.url}/v1")
    console.print(f"[bold]Status[/]      {wanted.url}/status")
    if "webui" in services:
        console.print(f"[bold]Open WebUI[/]  {wanted.at(wanted.webui_port)}")
    console.print(f"[bold]Prometheus[/]  http://127.0.0.1:{wanted.prometheus_port}")
    if "traces" in services:
        console.print(f"[bold]Traces[/]      http://127.0.0.1:{wanted.traces_port}")
    if "grafana" in services:
        console.print(f"[bold]Grafana[/]     http://127.0.0.1:{wanted.grafana_port}  user admin, password:")
        console.print("            docker compose exec grafana cat /var/lib/grafana/admin_password")


def main(
    join: Annotated[
        Path | None,
        typer.Option(help="Bring up this host's part of a fleet: the file that `make host` wrote.", show_default=False),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1, max=999, help="From now on so many replicas on this host. Others and streams are left alone."
        ),
    ] = None,
) -> None:
    """Bring the whole stack up, from whatever this machine has."""
    with one_line():
        try:
            with one_at_a_time():
                LOG.unlink(missing_ok=True)
                up(join, replicas)
        finally:
            give_back()


if __name__ == "__main__":
    typer.run(main)
