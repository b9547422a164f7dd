"""`make host`: other hosts whose replicas are behind this gateway. docs/hosts.md has the whole of it.

`make host ARGS=--help` lists the commands, `make host ARGS='add --help'` the options of one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from models import served
from stack import hosts
from stack.access import SECRETS, one_line
from stack.compose import LINKS_FILE, Compose, Config, running, running_files
from stack.console import Problem, console, step
from stack.gateway import Gateway, Replica, fleet_folder, named
from stack.hosts import Host, Hosts
from stack.hosts_certificates import Pair
from stack.settings import value_of
from stack.shell import ROOT, ask, work

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="What the host is called: gpu-b.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="The file to carry over. Left out: NAME.join here.", show_default=False)]


def here(config: Config) -> list[str]:
    """The replicas of this host, those too that --replicas leaves out: the gateway's files name them all the same."""
    if "gateway" not in config.services:
        return []
    own = [file for file in fleet_folder(config).glob("*.conf") if not file.name.startswith("link-")]
    return sorted({*config.replicas, *named(own)})


def check_gateway(config: Config) -> None:
    """A Problem on a host whose gateway is elsewhere."""
    if "gateway" not in config.services:
        raise Problem("this host's gateway is elsewhere", "run it on the gateway's host")


def served_here(config: Config) -> dict[str, str]:
    """The settings of this host that say what its replicas serve."""
    if not config.replicas:
        return {}
    service = config.services[config.replicas[0]]
    name = served.setting(service, "served_model_name")
    return {"MODEL": served.of_replica(service)[0], **({"SERVED_MODEL_NAME": str(name)} if name else {})}


def hand_over(host: Host, own: Pair, config: Config, out: Path | None) -> None:
    """Writes the file to carry over, and says what to do with it."""
    part, _ = hosts.part_of(host.name)
    ca = (hosts.folder(SECRETS) / "ca.pem").read_text()
    path = out or ROOT / f"{host.name}.join"
    hosts.write_join(path, host, own, ca, part, {} if part else served_here(config), hosts.vllm_version(config))
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    names = ", ".join(replica.name for replica in host.replicas)
    console.print(f"{host.name} has {names}{', as planned' if part else ''}. Its file is [bold]{shown}[/], with a key.")
    console.print(f"Carry it over, delete it here, and on {host.name}: make up ARGS='--join {path.name}'")


def connect(compose: Compose, config: Config, known: Hosts) -> None:
    """Makes what runs here do what the list of hosts says. Where no gateway runs, `make up` will."""
    hosts.lay_out_links(known)
    hosts.lay_out_fleet(known, config)
    services = running('{{.Label "com.docker.compose.service"}}').split()
    if "gateway" not in services:
        console.print("The gateway does not run here now: `make up` starts the link with it.")
        return
    compose = Compose(*dict.fromkeys([*running_files(), *([LINKS_FILE] if known.hosts else [])]))
    if known.hosts:
        names = [f"link-{host.name}" for host in known.hosts]
        compose.ask("up", "--detach", "--no-deps", *names, timeout_s=120)
        # what was up already reads its files anew; no connection ends
        for name in set(names) & set(services):
            compose.read_anew(name)
    Gateway(compose).reload_if_changed(config)


def cut(name: str) -> None:
    """Ends the gateway's end of a host's link, with all connections on it."""
    project = value_of("COMPOSE_PROJECT_NAME") or "vllm-fleet"
    labels = (f"project={project}", f"service=link-{name}")
    filters = (word for label in labels for word in ("--filter", f"label=com.docker.compose.{label}"))
    if ids := ask("docker", "ps", "--all", "--quiet", *filters).stdout.split():
        done = ask("docker", "rm", "--force", *ids)
        if done.returncode:
            raise Problem(f"{name}'s link still runs: {done.stderr.strip()}", f"docker rm --force {' '.join(ids)}")


@app.command()
def add(
    name: Name,
    address: Annotated[
        str, typer.Argument(help="Its IP address or DNS name, as this host reaches it.", show_default=False)
    ],
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=hosts.MOST_REPLICAS,
            help="How many it has, each on a GPU of its own. Left out: as planned, or 1.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its one open port; LINK_PORT there.")] = hosts.PORT,
    ssh: Annotated[
        str, typer.Option(help="USER@HOST:FOLDER, its checkout: `make roll` and `make down` here then reach it too.")
    ] = "",
    out: Out = None,
) -> None:
    """Add a host: make its certificate, and write the one file that it needs."""
    with one_line():
        compose = Compose(*running_files())
        config = compose.config()
        check_gateway(config)
        known = hosts.load(SECRETS)
        _, members = hosts.part_of(name)
        if members and replicas:
            raise Problem(
                f"hosts/{name}/ has a plan for {len(members)} replicas", "leave --replicas out, or remove that folder"
            )
        taken = [*here(config), *(one.name for other in known.hosts for one in other.replicas)]
        host = Host(
            name=name,
            address=address,
            port=port,
            membership=hosts.new_membership(name),
            replicas=members or hosts.next_names(taken, replicas or 1),
            expires=0,
            ssh=ssh,
        )
        own = hosts.add(SECRETS, host, here(config))
        hand_over(host, own, config, out)
        connect(compose, config, hosts.load(SECRETS))


@app.command("list")
def list_hosts() -> None:
    """List the other hosts, with what the gateway says of their replicas."""
    with one_line():
        known = hosts.load(SECRETS)
        if not known.hosts:
            console.print("There is no other host yet: make host ARGS='add NAME ADDRESS'")
            return
        console.print(host_table(known, states()))
        for line in hosts.ending(known):
            console.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)


def states() -> list[Replica]:
    """The replicas as the running gateway sees them; none where it does not run."""
    try:
        return Gateway(Compose(*running_files())).replicas()
    except (Problem, ValueError):
        return []


def host_table(known: Hosts, replicas: list[Replica]) -> Table:
    """The hosts, a line each."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("host", "address", "replicas", "certificate until"):
        table.add_column(column, overflow="fold")
    state = {replica.name: replica.state for replica in replicas}
    for host in known.hosts:
        lines = [f"{one.name} {state.get(one.name, '')}".strip() for one in host.replicas]
        ended = host.expires <= time.time()
        until = f"[{'red' if ended else 'default'}]{host.ends:%Y-%m-%d}[/]"
        table.add_row(host.name, f"{host.address}, port {host.port}", "\n".join(lines), until)
    return table


@app.command()
def renew(name: Name, out: Out = None) -> None:
    """Make another certificate for a host, and a file with what was planned for it since."""
    with one_line():
        compose = Compose(*running_files())
        config = compose.config()
        check_gateway(config)
        _, members = hosts.part_of(name)
        own = hosts.renew(SECRETS, name, members, here(config))
        known = hosts.load(SECRETS)
        hand_over(known.find(name), own, config, out)
        connect(compose, config, known)
        console.print(
            f"The old one is valid until it ends; if somebody has it: make host ARGS='remove {name}', and add."
        )


@app.command()
def remove(name: Name) -> None:
    """Take a host out of the fleet, and cut every connection to it. Its certificate is worth nothing from then on."""
    with one_line():
        hosts.remove(SECRETS, name)
        cut(name)
        console.print(f"{name} is removed: it gets no more requests, and what ran there was cut.")
        compose = Compose(*running_files())
        connect(compose, compose.config(), hosts.load(SECRETS))


@app.command()
def down() -> None:
    """Stop the replicas and links of the other hosts: of those that --ssh names. `make down` runs it."""
    with one_line():
        for host in hosts.load(SECRETS).hosts:
            if not host.ssh:
                console.print(f"{host.name} runs on: `make down` there stops it")
                continue
            with step(f"{host.name}: make down") as shown:
                work(hosts.over_ssh(host, "down"), shown.say, fix=f"see what {host.name} says")


if __name__ == "__main__":
    app()
