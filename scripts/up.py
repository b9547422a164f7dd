"""Brings the whole stack up, from whatever this machine has. `make up` runs it; run again it changes nothing.

First come the steps that only look, then those that do something. Each can be run again at any time.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import psutil
import typer

from models import served
from planner import check
from stack import certificate, checks, docker, images, settings
from stack.access import (
    SECRETS,
    asks_for_keys,
    check_environment,
    check_users,
    first_key,
    one_line,
    own_key,
    take_environment,
)
from stack.certificate import Untrusted
from stack.compose import (
    ACME_FILE,
    GPU_FILE,
    OVERRIDE,
    TLS_FILE,
    Build,
    Compose,
    Config,
    Container,
    is_replica,
    running,
    stays_down,
)
from stack.console import Problem, console, step
from stack.gateway import Gateway, check_named
from stack.shell import CACHE, LOG, ROOT, Say, ask, let_all_read, wait_for, work

# An authority that answers has given one by then.
CERTIFICATE_S = 120
QUESTION = "What is the capital of France?"


def published_ports() -> set[int]:
    """The ports of this host that the stack's running containers publish."""
    return {int(port) for port in re.findall(r":(\d+)->", running("{{.Ports}}"))}


def check_ports(wanted: settings.Settings, own: set[int]) -> str:
    """A Problem where a port that the stack publishes is taken by something else."""
    sockets = psutil.net_connections("tcp")
    taken = [socket.laddr[:2] for socket in sockets if socket.laddr and socket.status == psutil.CONN_LISTEN]
    ports = {
        "HTTP_PORT": (wanted.bind_address, wanted.http_port),
        **({"HTTPS_PORT": (wanted.bind_address, wanted.https_port)} if wanted.https_port else {}),
        "GRAFANA_PORT": (ip_address("127.0.0.1"), wanted.grafana_port),
        "PROMETHEUS_PORT": (ip_address("127.0.0.1"), wanted.prometheus_port),
    }
    checks.ports_differ(ports)
    for name, (address, port) in ports.items():
        if port not in own:
            checks.port_is_free(name, address, port, taken)
    return ", ".join(str(port) for _, port in ports.values())


def check_memory(config: Config) -> str:
    """A Problem where the replicas do not fit into the memory that is free."""
    memory = psutil.virtual_memory()
    checks.memory_suffices(
        memory.available, memory.total, [served.memory(config.services[name]) for name in config.replicas]
    )
    return f"{memory.available / checks.GIB:.1f} of {memory.total / checks.GIB:.1f} GiB free"


def check_disk(missing: Iterable[Build]) -> str:
    """A Problem where Docker's disk has no room for the images that are to be built."""
    folder = Path(ask("docker", "info", "--format", "{{.DockerRootDir}}").stdout.strip() or "/var/lib")
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    checks.disk_suffices(free, sum(checks.DISK[images.kind(build)] for build in missing), folder)
    return f"{free / checks.GIB:.0f} GiB free under {folder}"


def listed_gpus() -> str:
    """What `nvidia-smi` lists, a line a GPU and a line a MIG slice; nothing where there is no driver."""
    listed = ask("nvidia-smi", "--list-gpus")
    return listed.stdout if listed.returncode == 0 else ""


def choose_gpus(wanted: settings.Settings) -> tuple[bool, str]:
    """Whether the GPU file is added, and why."""
    gpus = checks.gpus_listed(listed_gpus())
    override: checks.Override = "none"
    if OVERRIDE.exists():
        config = Compose().config()
        override = "gpu" if any(config.services[name].on_gpus for name in config.replicas) else "cpu"
    return checks.gpu_choice(wanted.gpu, gpus, override, toolkit=docker.gpu_toolkit())


def check_pins(config: Config) -> None:
    """A Problem where a replica is pinned to a GPU that is not there."""
    replicas = [config.services[name] for name in config.replicas]
    if pinned := {gpu for replica in replicas for gpu in replica.gpus}:
        checks.gpus_are_there(pinned, listed_gpus(), served.of_replica(replicas[0])[0])


def open_mounts(config: Config) -> None:
    """Lets containers read what they mount of this checkout: a clone under a strict umask keeps it to its owner."""
    sources = {Path(volume.source) for service in config.services.values() for volume in service.volumes}
    for source in sources - {served.MODELS}:
        if source.is_relative_to(ROOT):
            let_all_read([source, *source.rglob("*")])


def not_ready(
    services: list[str], containers: Mapping[str, Container], states: Mapping[str, str], began: Mapping[str, Container]
) -> list[str]:
    """What is still missing, in words; empty when every service is healthy and every replica ready.

    `states` are those that the gateway gives its replicas, `began` the containers at the beginning of the wait. A
    service that waiting will not bring up is a Problem.
    """
    missing = []
    for service in services:
        container = containers.get(service)
        if container is None or stays_down(container, began.get(service)):
            what = "stops instead of starting" if container else "was removed"
            raise Problem(
                f"{service} {what}", f"see why (docker compose logs {service}), correct it, and run `make up` again"
            )
        if container.health == "unhealthy":
            raise Problem(f"{service} runs but is unwell", f"see why: docker compose logs {service}")
        state = states.get(service, "not in the route yet") if is_replica(service) else "ready"
        if not container.well:
            missing.append(f"{service} {states.get(service) or container.health or container.state}")
        elif state != "ready":
            missing.append(f"{service} {state}")
    return missing


def wait_until_ready(compose: Compose, gateway: Gateway, services: list[str], say: Say) -> None:
    """Returns when every service is healthy and every replica ready; a Problem has the last words of its service."""
    began = compose.containers()

    def ready() -> bool:
        replicas = gateway.published()
        states = {replica.name: replica.state for replica in replicas or ()}
        try:
            missing = not_ready(services, compose.containers(), states, began)
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
        " see `docker compose logs acme`",
    )


def remove_left_out(compose: Compose, config: Config, say: Say) -> None:
    """Stops and removes the token service where its profile is gone: Compose calls no such service an orphan."""
    if "tokens" in compose.containers() and "tokens" not in config.services:
        remove = ("--profile", "tokens", "rm", "--stop", "--force", "tokens")
        work(compose.command(*remove), say, fix="see `docker compose logs`")


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


def up() -> None:
    """All the steps, in their order. The first that cannot be done is a Problem."""
    with step("Settings") as shown:
        # a clone leaves secrets/ open to this host's other users
        SECRETS.prepare()
        wanted = settings.load()
        settings.check_private()
        check_environment()
        shown.result = ".env" if settings.ENV_FILE.exists() else "the defaults; .env.example lists them"
    with step("Docker") as shown:
        shown.result = docker.check()
    own = published_ports()
    if wanted.https_port and not wanted.https_domain:
        with step("Certificate") as shown:
            shown.result = certificate.check()
    with step("Ports") as shown:
        shown.result = check_ports(wanted, own)

    with step("Docker engine and plugins") as shown:
        shown.result = docker.bring(shown.say)
    with step("GPUs") as shown:
        gpu, shown.result = choose_gpus(wanted)
        compose = Compose(
            *[GPU_FILE] * gpu, *[TLS_FILE] * bool(wanted.https_port), *[ACME_FILE] * bool(wanted.https_domain)
        )
        config = compose.config()
        profiles = compose.ask("config", "--profiles").split()
        checks.profiles_are_known(settings.value_of("COMPOSE_PROFILES") or "", profiles)
        check_pins(config)
    check_named(config)
    gateway = Gateway(compose, wanted.url, wanted.https_domain)
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
    with step("Keys") as shown:
        shown.result = bring_keys(wanted, config)
    open_mounts(config)
    with step("Settings of the replicas"):
        there = {name: config.services[name] for name in services}
        compose.check_launch(config.model_copy(update={"services": there}), "make up")
    before = compose.containers()
    with step("Containers") as shown:
        remove_left_out(compose, config, shown.say)
        start = ("--progress", "plain", "up", "--detach", "--remove-orphans", *services)
        work(compose.command(*start), shown.say, fix="see `docker compose logs`")
        shown.result = ", ".join(services)
    if wanted.https_domain:
        with step("Certificate"):
            wait_for_certificate(compose, gateway, before.get("acme"))
    with step("Gateway's configuration") as shown:
        shown.result = gateway.reload_if_changed(config)
    with step("Ready") as shown:
        wait_until_ready(compose, gateway, services, shown.say)
        shown.result = "every service is healthy, every replica answers"
    with step(QUESTION) as shown, own_key(wanted, "make-up", life_s=600) as key:
        shown.result = gateway.first_answer(QUESTION, key)
    if config.planned:
        with step("The plan's figures") as shown:
            compared = check.compare(compose, gateway, config)
            shown.result = check.summary(compared)
        check.show(console, compared)

    console.print(f"\n[bold]API[/]         {wanted.url}/v1")
    console.print(f"[bold]Status[/]      {wanted.url}/status")
    console.print(f"[bold]Prometheus[/]  http://127.0.0.1:{wanted.prometheus_port}")
    if "grafana" in services:
        console.print(f"[bold]Grafana[/]     http://127.0.0.1:{wanted.grafana_port}  user admin, password:")
        console.print("            docker compose exec grafana cat /var/lib/grafana/admin_password")


def main() -> None:
    """Bring the whole stack up, from whatever this machine has."""
    with one_line():
        try:
            with one_at_a_time():
                LOG.unlink(missing_ok=True)
                up()
        finally:
            give_back()


if __name__ == "__main__":
    typer.run(main)
