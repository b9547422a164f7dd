"""`make ray-front`: the gateway in front of a Ray Serve application (docs/ray.md).

    make ray-front ARGS='10.0.0.1 10.0.0.2'    at these hosts of its cluster
    make ray-front                             no longer

It writes nginx/fleet/ray.conf, where each of these hosts is a replica, and secrets/gateway/ray.conf with the gateway's
key, which is made of secrets/ray/token.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from access.keys import gateways_key
from stack.console import Problem, console, one_line_for_mistakes
from stack.shell import ROOT

PORT = 8000
# the first of the ports inside the gateway, one a host
INSIDE = 8101
SEEN = "/etc/fleet/secrets/ray.conf"


def fleet_file(hosts: Sequence[str], inside: str = "127.0.0.1", key_file: str = SEEN) -> str:
    """The gateway's fleet file for these hosts; `inside` is the gateway's own address, `key_file` where it sees its
    key."""
    text = (
        "# Hosts of a Ray cluster, whose Serve application stands behind this gateway. Written by `make ray-front`.\n"
    )
    for number, host in enumerate(hosts, start=1):
        name, port = f"vllm-ray-{number}", INSIDE + number - 1
        there = f"[{host}]" if ":" in host else host
        text += (
            f"upstream {name} {{ zone {name} 64k; server {inside}:{port}; keepalive 64; }}\n"
            f"server {{\n    listen {inside}:{port};\n    include {key_file};\n    include conf.d/onward.conf;\n"
            f"    location / {{ proxy_pass http://{there}:{PORT}; }}\n}}\n"
        )
    return text


def key_file(cluster_secret: str) -> str:
    """The file that has the gateway's key."""
    return f'proxy_set_header Authorization "Bearer {gateways_key(cluster_secret)}";\n'


def checked(hosts: Sequence[str]) -> list[str]:
    """The hosts' addresses. A Problem where one will not do."""
    fix = "name the HOST_ADDRESS of hosts that run docker-compose.ray.yml"
    found = []
    for host in hosts:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            raise Problem(f"{host!r} is no address", fix) from None
        if address.is_loopback or address.is_unspecified:
            raise Problem(f"{host} is another host on each host, and in a container the container itself", fix)
        if str(address) in found:
            raise Problem(f"{host} is named twice", fix)
        found.append(str(address))
    return found


def lay_out(hosts: Sequence[str], root: Path = ROOT) -> None:
    """Writes both files for these hosts, or takes them away where there are none. A Problem where that cannot be."""
    fleet, key, token = (
        root / path for path in ("nginx/fleet/ray.conf", "secrets/gateway/ray.conf", "secrets/ray/token")
    )
    if not hosts:
        fleet.unlink(missing_ok=True)
        key.unlink(missing_ok=True)
        return
    try:
        secret = token.read_text()
    except OSError as error:
        raise Problem(
            f"secrets/ray/token cannot be read ({error.strerror})", "copy it from the cluster's head"
        ) from None
    # the gateway's user reads it; secrets/ is closed to this host's others
    key.write_text(key_file(secret))
    key.chmod(0o644)
    fleet.write_text(fleet_file(hosts))


def main(
    hosts: Annotated[
        list[str] | None,
        typer.Argument(help="Addresses of hosts of the cluster. None: take it away.", show_default=False),
    ] = None,
) -> None:
    """Put the gateway in front of a Ray Serve application."""
    with one_line_for_mistakes():
        found = checked(hosts or [])
        lay_out(found)
    console.print(f"{', '.join(found) or 'no Ray Serve'} is behind the gateway after `make up`", highlight=False)


if __name__ == "__main__":
    typer.run(main)
