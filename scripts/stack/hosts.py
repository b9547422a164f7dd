"""The other hosts of the fleet, as the gateway's host keeps them, and the file that makes a host one of them.

secrets/hosts/hosts.json        which there are
secrets/hosts/ca.pem, ca.key    the authority (hosts_certificates.py)
secrets/hosts/NAME/             mounted into NAME's link, the gateway's end of it (nginx/link/gateway.conf)
secrets/link/                   on the other host: mounted into its link (nginx/link/host.conf), and host.json
docker-compose.links.yml        a link for each host
nginx/fleet/link-NAME.conf      their replicas, for the gateway
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets as random
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from access import audit
from access.store import Mistake, Secrets, Strict, made, read, read_whole, why
from stack import checks
from stack import hosts_certificates as certificates
from stack.compose import LINKS_FILE, OVERRIDE, Config
from stack.console import Problem
from stack.gateway import fleet_folder, fleet_line
from stack.hosts_certificates import Pair
from stack.shell import ROOT

# also a part of names in certificates
REPLICA = re.compile(r"vllm-[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")
ADDRESS = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
METRICS = "-metrics"
# ports of the gateway's end: those of its first replica
API_PORT, METRICS_PORT = 8000, 9464
PORT = 9443
MOST_REPLICAS = 256
# A certificate is told of before it ends.
SOON = timedelta(days=30)
PARTS = ROOT / "hosts"  # what `make plan` writes for several hosts


class Member(Strict):
    """A replica on another host. `weight`: its share of the load, where shares differ."""

    name: str
    weight: int | None = None


class Host(Strict):
    """Another host of the fleet. `membership` is its name and the id of this membership; `expires` the end of the
    certificate that it was given last, in seconds since 1970; `ssh` where its checkout is, as USER@HOST:FOLDER."""

    name: str
    address: str
    port: int
    membership: str
    replicas: list[Member]
    expires: int
    ssh: str = ""

    @property
    def ends(self) -> datetime:
        """When its certificate ends."""
        return datetime.fromtimestamp(self.expires, UTC)


class Hosts(Strict):
    """All other hosts."""

    hosts: list[Host] = Field(default_factory=list)

    def find(self, name: str) -> Host:
        """The host of this name; a Problem where there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        names = ", ".join(host.name for host in self.hosts) or "none"
        raise Problem(f"there is no host {name} in this fleet", f"there is {names}; make host ARGS=list")

    def of(self, replica: str) -> Host | None:
        """The host that a replica is on; None for one that is here."""
        return next((host for host in self.hosts if replica in (one.name for one in host.replicas)), None)


class Join(Strict):
    """What a host needs to be one of the fleet; holds its private key. `made` is in seconds since 1970, `part` the
    Compose file of its replicas if they were planned, `settings` else those of the gateway's host that say what is
    served, and `vllm` its version there."""

    kind: Literal["vllm-fleet host"] = "vllm-fleet host"
    made: int
    host: str
    membership: str
    port: int
    replicas: list[str]
    ca: str
    certificate: str
    key: str
    part: str
    settings: dict[str, str]
    vllm: str


# ---- on the gateway's host


def folder(secrets: Secrets) -> Path:
    """Where all about the other hosts lies."""
    return secrets.folder / "hosts"


def load(secrets: Secrets) -> Hosts:
    """The other hosts."""
    return read(folder(secrets) / "hosts.json", Hosts) or Hosts()


def part_of(host: str, parts: Path = PARTS) -> tuple[str, list[Member]]:
    """The Compose file that `make plan` wrote for a host, and its replicas; nothing where there is none."""
    file = parts / host / OVERRIDE.name
    if not file.exists():
        return "", []
    text = file.read_text()
    try:
        weights = yaml.safe_load(re.sub(r"![a-z]+", "", text))["x-weights"]
        return text, [Member(name=name, weight=weight) for name, weight in weights.items()]
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValidationError):
        raise Problem(
            f"{file} is no host's part of a plan", "plan again: make plan ARGS='MODEL --machine …'; or move it away"
        ) from None


def next_names(taken: Iterable[str], count: int) -> list[Member]:
    """So many replicas by the first numbers that are free after the last one."""
    numbers = [int(name.removeprefix("vllm-")) for name in taken if re.fullmatch(r"vllm-\d{1,9}", name)]
    first = max(numbers, default=-1) + 1
    return [Member(name=f"vllm-{number}") for number in range(first, first + count)]


def check_host(host: Host, others: Sequence[Host], here: Iterable[str]) -> None:
    """A Problem where a host's name, address or replicas will not do, or are another's. `here`: the replicas of the
    gateway's own host."""
    checks.host_has_a_name(host.name)
    if not is_address(host.address):
        raise Problem(f"{host.address} is no address", "write the host's IP address or DNS name: 10.0.0.2")
    if host.ssh and not re.fullmatch(r"[^\s:]+:\S+", host.ssh):
        raise Problem(f"--ssh {host.ssh} names no folder", "write USER@HOST:FOLDER, where its checkout is")
    if not 1 <= len(host.replicas) <= MOST_REPLICAS:
        raise Problem(f"{host.name} would have {len(host.replicas)} replicas", f"a host has 1 to {MOST_REPLICAS}")
    of = {replica.name: other.name for other in others for replica in other.replicas} | dict.fromkeys(here, "this host")
    for other in others:
        if other.name == host.name:
            raise Problem(
                f"there is a host {host.name} already, at {other.address}",
                f"choose another name; for a new file make host ARGS='renew {host.name}'",
            )
        if (other.address, other.port) == (host.address, host.port):
            raise Problem(f"{other.name} is at {host.address}, port {host.port}, already", "correct the address")
    for number, replica in enumerate(host.replicas):
        if not REPLICA.fullmatch(replica.name) or replica.name.endswith(METRICS):
            raise Problem(f"{replica.name} is no name for a replica", "write vllm- and small letters, digits and -")
        if replica.name in of or replica.name in (one.name for one in host.replicas[:number]):
            raise Problem(
                f"{replica.name} would be on {of.get(replica.name, host.name)} and on {host.name}: replicas' names are"
                " unique over the fleet",
                f"plan all hosts together (make plan ARGS='MODEL --machine …'), or remove hosts/{host.name}/",
            )


def is_address(text: str) -> bool:
    """Whether this is an IP address, IPv6 without brackets, or a DNS name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return bool(ADDRESS.fullmatch(text)) and not re.fullmatch(r"[\d.]+", text)
    return True


def new_membership(name: str) -> str:
    """A membership that there never was."""
    return f"{name}-{random.token_hex(4)}"


def add(secrets: Secrets, host: Host, here: Sequence[str], life: timedelta = certificates.LIFE) -> Pair:
    """Adds a host to the list, and gives the certificate that it is to prove itself with."""
    with secrets.locked():
        hosts = load(secrets)
        check_host(host, hosts.hosts, here)
        ca = _authority(secrets)
        own = certificates.for_host(ca, host.membership, life)
        host.expires = int(own.ends.timestamp())
        hosts.hosts.append(host)
        _write_link(secrets, host, ca, certificates.for_gateway(ca, host.membership))
        _commit(secrets, hosts, "host.add", host)
        return own


def renew(secrets: Secrets, name: str, replicas: list[Member], here: Sequence[str]) -> Pair:
    """A new certificate for a host, which `replicas`, where there are any, are now on. The old one is valid until it
    ends."""
    with secrets.locked():
        hosts = load(secrets)
        host = hosts.find(name)
        if replicas:
            host.replicas = replicas
            check_host(host, [other for other in hosts.hosts if other is not host], here)
        ca = _authority(secrets)
        own = certificates.for_host(ca, host.membership)
        host.expires = int(own.ends.timestamp())
        _write_link(secrets, host, ca, certificates.for_gateway(ca, host.membership))
        _commit(secrets, hosts, "host.renew", host)
        return own


def remove(secrets: Secrets, name: str) -> Host:
    """Takes a host off the list. What it proved itself with is worth nothing from now on."""
    with secrets.locked():
        hosts = load(secrets)
        host = hosts.find(name)
        hosts.hosts.remove(host)
        _commit(secrets, hosts, "host.remove", host)
        shutil.rmtree(folder(secrets) / name, ignore_errors=True)
        return host


def _commit(secrets: Secrets, hosts: Hosts, action: str, host: Host) -> None:
    audit.commit(secrets, {folder(secrets) / "hosts.json": hosts}, action, host.name, address=host.address)


def _authority(secrets: Secrets) -> Pair:
    """The fleet's authority, made where there is none."""
    place = folder(secrets)
    found = certificates.read(place)
    if found is None:
        found = certificates.authority()
        place.mkdir(mode=0o700, exist_ok=True)
        _put(place / "ca.pem", found.certificate, 0o644)
        _put(place / "ca.key", found.key, 0o600)
    return found


def _write_link(secrets: Secrets, host: Host, ca: Pair, own: Pair) -> None:
    """Writes what the gateway's end of a host's link reads. Its container has a user of its own: secrets/ is what is
    closed."""
    place = folder(secrets) / host.name
    place.mkdir(exist_ok=True)
    place.chmod(0o755)
    write_end(place, ca.certificate, own, gateway_end(host))


def write_end(place: Path, ca: str, own: Pair, replicas: str) -> None:
    """Writes what an end of a link reads."""
    for name, text in (("ca.pem", ca), ("own.key", own.key), ("own.pem", own.certificate), ("replicas.conf", replicas)):
        _put(place / name, text, 0o644)


def _put(path: Path, text: str, mode: int) -> None:
    """Writes a file that never has other rights than `mode`, whole."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.chmod(mode)
    new.rename(path)


def gateway_end(host: Host) -> str:
    """The lines of the gateway's end: its port of each replica, and of its metrics, and where they lead."""
    address = f"[{host.address}]" if ":" in host.address else host.address
    resolve = "" if _is_ip(host.address) else " resolve"
    server = f"server {address}:{host.port}{resolve} max_fails=0; server 127.0.0.1:9000 backup;"
    lines = [f"upstream host {{ zone host 64k; {server} }}"]
    for number, replica in enumerate(host.replicas):
        for port, what in ((API_PORT, ""), (METRICS_PORT, METRICS)):
            asked = f"{replica.name}{what}.{certificates.domain(host.membership)}"
            lines.append(f"server {{ listen {port + number}; proxy_ssl_name {asked}; proxy_pass host; }}")
    return "\n".join(lines) + "\n"


def _is_ip(text: str) -> bool:
    return bool(re.fullmatch(r"[\d.]+|.*:.*", text))


def host_end(membership: str, replicas: Sequence[str]) -> str:
    """The lines of the other host's end: which name leads to which port of a replica there."""
    ports = {f"{name}{what}": f"{name}:{port}" for name in replicas for port, what in ((8000, ""), (9464, METRICS))}
    lines = ["map $ssl_server_name $replica {", "    default absent;"]
    lines += [f"    {name}.{certificates.domain(membership)} {name};" for name in ports]
    lines += ["}", "upstream absent { server 127.0.0.1:9000; }"]
    lines += [
        f"upstream {name} {{ zone {name} 64k; server {at} resolve max_fails=0; server 127.0.0.1:9000 backup; }}"
        for name, at in ports.items()
    ]
    return "\n".join(lines) + "\n"


def fleet_lines(host: Host) -> str:
    """The replicas of a host, for the gateway."""
    return "".join(
        fleet_line(replica.name, API_PORT + number, replica.weight, f"link-{host.name}") + "\n"
        for number, replica in enumerate(host.replicas)
    )


def links(hosts: Hosts) -> str:
    """docker-compose.links.yml: a link for each host, from docker-compose.host.yml."""
    services = [
        f"  link-{host.name}:\n"
        "    extends: {file: docker-compose.host.yml, service: link}\n"
        "    command: [sh, /etc/nginx/link/start.sh, gateway]\n"
        "    ports: !reset []\n"
        "    volumes: !override\n"
        "      - ./nginx/link:/etc/nginx/link:ro\n"
        f"      - ./secrets/hosts/{host.name}:/etc/fleet/link:ro\n"
        for host in hosts.hosts
    ]
    return "# The links to the other hosts. Written by `make host`.\nservices:\n" + "".join(services)


def lay_out_links(hosts: Hosts, root: Path = ROOT) -> None:
    """Makes docker-compose.links.yml say what the list says; without another host there is none."""
    make_file(root / LINKS_FILE, links(hosts) if hosts.hosts else "")


def lay_out_fleet(hosts: Hosts, config: Config) -> None:
    """Makes the gateway's fleet files of the other hosts say what the list says, and touches none that does already."""
    place = fleet_folder(config)
    wanted = {place / f"link-{host.name}.conf": fleet_lines(host) for host in hosts.hosts}
    for path in {*place.glob("link-*.conf"), *wanted}:
        make_file(path, wanted.get(path, ""))


def make_file(path: Path, text: str) -> None:
    """Makes a file have this text, or be away where that is empty. One that is right is not touched."""
    if not text:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_text() != text:
        _put(path, text, 0o644)


def check_unique(hosts: Hosts, here: Sequence[str]) -> None:
    """A Problem where a replica of this host has the name of one that is elsewhere."""
    for name in here:
        if host := hosts.of(name):
            raise Problem(
                f"{name} is on this host and on {host.name}: replicas' names are unique over the fleet",
                f"give it another name here, or make host ARGS='remove {host.name}'",
            )


def over_ssh(host: Host, command: str, *args: str) -> list[str]:
    """A `make` command on another host, through `ssh`, which must not ask for anything."""
    target, _, place = host.ssh.partition(":")
    said = f" ARGS={shlex.quote(shlex.join(args))}" if args else ""
    return ["ssh", "-o", "BatchMode=yes", "--", target, f"cd {shlex.quote(place)} && make {command}{said}"]


def ending(hosts: Hosts, now: datetime | None = None) -> list[str]:
    """A line for each host whose certificate ends soon, or has ended."""
    now = now or datetime.now(UTC)
    return [
        f"{host.name}'s certificate {'ends' if host.ends > now else 'ended'} on {host.ends:%Y-%m-%d}:"
        f" make host ARGS='renew {host.name}'"
        for host in hosts.hosts
        if host.ends - now < SOON
    ]


def write_join(path: Path, host: Host, own: Pair, ca: str, part: str, settings: Mapping[str, str], vllm: str) -> None:
    """Writes the file to carry over, for its owner alone."""
    join = made(
        Join,
        {
            "made": int(time.time()),
            "host": host.name,
            "membership": host.membership,
            "port": host.port,
            "replicas": [replica.name for replica in host.replicas],
            "ca": ca,
            "certificate": own.certificate,
            "key": own.key,
            "part": part,
            "settings": dict(settings),
            "vllm": vllm,
        },
    )
    _put(path, join.model_dump_json(indent=1) + "\n", 0o600)


# ---- on another host


def link_folder(secrets: Secrets) -> Path:
    """What this host's end of the link reads, where this host has joined a fleet."""
    return secrets.folder / "link"


def joined(secrets: Secrets) -> Join | None:
    """What this host joined with; None on the gateway's host."""
    return read(link_folder(secrets) / "host.json", Join)


def read_join(path: Path, now: float | None = None) -> Join:
    """The file that was carried over. A Problem where it is none, others may read it, or it is not valid now."""
    try:
        if path.stat().st_mode & 0o077:
            raise Problem(f"{path} holds a private key, and others may read it", f"chmod 600 {path}")
        join = Join.model_validate_json(read_whole(path))
    except FileNotFoundError:
        raise Problem(f"there is no file {path}", "make host ARGS='add NAME ADDRESS' on the gateway's host") from None
    except ValidationError as error:
        raise Problem(
            f"{path} is no file that `make host` wrote: {why(error)}", "carry it over again; is this checkout as new?"
        ) from None
    except Mistake as mistake:
        raise Problem(mistake.what, mistake.fix) from None
    odd = [name for name in join.replicas if not REPLICA.fullmatch(name)]
    if odd or not checks.HOST.fullmatch(join.host) or not re.fullmatch(rf"{join.host}-[0-9a-f]{{8}}", join.membership):
        raise Problem(f"{path} has names that `make host` does not give", "carry it over again")
    late = join.made - (time.time() if now is None else now)
    if late > certificates.EARLIER.total_seconds():
        raise Problem(
            f"this host's clock is {late / 3600:.0f} hours behind: it would refuse the gateway", "set it (NTP)"
        )
    own = Pair(join.certificate, join.key)
    if own.ends.timestamp() <= (time.time() if now is None else now):
        raise Problem(f"the certificate in {path} has ended", f"make host ARGS='renew {join.host}' on the gateway's")
    return join


def take_join(secrets: Secrets, join: Join) -> bool:
    """Makes this host one of the fleet; gives whether that changed anything. A Problem where it has a fleet already."""
    if load(secrets).hosts:
        raise Problem("this is the gateway's host: it has hosts of its own", "run it on the other host")
    with secrets.locked():
        old = joined(secrets)
        if old and old.host != join.host:
            raise Problem(
                f"this host is {old.host} already, and the file is for {join.host}",
                "is it on the right host? If so: make down, and remove secrets/link/ and docker-compose.override.yml",
            )
        place = link_folder(secrets)
        place.mkdir(exist_ok=True)
        place.chmod(0o755)
        write_end(place, join.ca, Pair(join.certificate, join.key), host_end(join.membership, join.replicas))
        if old == join:
            return False
        secrets.replace(secrets.written(place / "host.json", join), place / "host.json")
        return True


def own_ending(join: Join, now: datetime | None = None) -> list[str]:
    """A line if this host's certificate ends soon, or has ended."""
    ends = Pair(join.certificate, join.key).ends
    if ends - (now or datetime.now(UTC)) >= SOON:
        return []
    return [
        f"this host's certificate ends on {ends:%Y-%m-%d}: on the gateway's host, make host ARGS='renew {join.host}'"
    ]


def differences(join: Join, vllm: str, own: Mapping[str, str], now: float | None = None) -> list[str]:
    """What of this host is not as on the gateway's, a line each. `own`: what its `.env` says."""
    late = join.made - (time.time() if now is None else now)
    others = [(name, own[name], value) for name, value in join.settings.items() if own.get(name, value) != value]
    return [
        *([f"this host's clock is behind the gateway's, by {late:.0f} s or more: set it (NTP)"] if late > 5 else []),
        *([f"this checkout has vLLM {vllm}, the gateway's {join.vllm}: bring both to one"] * (vllm != join.vllm)),
        *(f".env says {name}={mine}, the gateway's host {name}={value}" for name, mine, value in others),
    ]


def vllm_version(config: Config) -> str:
    """The version of vLLM that a checkout pins."""
    return config.pins["vllm-cpu"].rpartition(":")[2].removeprefix("v")
