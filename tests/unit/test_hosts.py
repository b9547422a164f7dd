"""`make host` and `make up ARGS='--join FILE'`: names, certificates, files and their rights, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import host
import roll
import up
from access.store import Secrets
from planner import render
from stack import compose, docker, hosts, settings
from stack import hosts_certificates as certificates
from stack.compose import Compose, Config, Service, Volume
from stack.console import Problem
from stack.gateway import Gateway, Replica, fleet_line
from stack.host import check_ports
from stack.hosts import Host, Hosts, Join, Member
from stack.hosts_certificates import Pair
from stack.shell import ROOT

PINS = {"vllm-cpu": "docker.io/vllm/vllm-openai-cpu:v0.32.0"}


def config_of(root: Path, *replicas: str) -> Config:
    """The Compose files of a gateway's host."""
    services = {name: Service(image="replica") for name in replicas}
    gateway = Service(volumes=[Volume(source=str(root / "nginx"), target="/etc/nginx")])
    return Config.model_validate({"services": {"gateway": gateway, **services}, "x-pins": PINS})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gateway's host with two replicas, where nothing runs."""
    (tmp_path / "nginx" / "fleet").mkdir(parents=True)
    secrets = Secrets(tmp_path / "secrets")
    for module in (host, up, roll):
        monkeypatch.setattr(module, "SECRETS", secrets)
    monkeypatch.setattr(host, "ROOT", tmp_path)
    monkeypatch.setattr(hosts.lay_out_links, "__defaults__", (tmp_path,))
    monkeypatch.setattr(hosts.part_of, "__defaults__", (tmp_path / "hosts",))
    for module in (host, up, roll):
        monkeypatch.setattr(module, "running", lambda _: "", raising=False)
        monkeypatch.setattr(module, "running_files", list, raising=False)
    monkeypatch.setattr(Compose, "config", lambda _: config_of(tmp_path, "vllm-0", "vllm-1"))
    monkeypatch.setattr(settings, "ENV_FILE", tmp_path / ".env")
    return tmp_path


def make_host(args: str) -> Result:
    """What `make host ARGS='…'` does."""
    return CliRunner().invoke(host.app, shlex.split(args))


def added(args: str) -> Result:
    """The same, where it must work."""
    done = make_host(args)
    assert done.exit_code == 0, done.output
    return done


def one(name: str = "gpu-b", address: str = "10.0.0.2", replicas: tuple[str, ...] = ("vllm-2",), **more: Any) -> Host:
    """A host of a list."""
    members = [Member(name=replica) for replica in replicas]
    fields: dict[str, Any] = {"port": 9443, "membership": f"{name}-00000000", "expires": 0, **more}
    return Host(name=name, address=address, replicas=members, **fields)


def mode(path: Path) -> int:
    """A file's rights."""
    return stat.S_IMODE(path.stat().st_mode)


# ---- certificates


def names(pair: Pair) -> list[str]:
    """The names that a certificate is for."""
    made = x509.load_pem_x509_certificate(pair.certificate.encode())
    return made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def test_a_host_proves_that_it_is_itself_and_is_no_client() -> None:
    ca = certificates.authority()
    own = certificates.for_host(ca, "gpu-b-0a1b2c3d")
    assert names(own) == ["*.gpu-b-0a1b2c3d.fleet"]
    made = x509.load_pem_x509_certificate(own.certificate.encode())
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert (usage.critical, list(usage.value)) == (True, [certificates.SERVER])
    gateway = x509.load_pem_x509_certificate(certificates.for_gateway(ca, "gpu-b-0a1b2c3d").certificate.encode())
    both = gateway.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(both) == {certificates.CLIENT, certificates.SERVER}
    for signed in (made, gateway):
        signed.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.certificate.encode()))


def test_a_damaged_authority_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"ca\.key is damaged"):
        certificates.for_host(Pair("no certificate", "no key"), "gpu-b-00000000")


# ---- on the gateway's host


def test_a_host_is_added_with_one_file_for_it_alone(here: Path) -> None:
    done = added("add gpu-b 10.0.0.2 --replicas 2")
    assert "make up ARGS='--join gpu-b.join'" in done.output
    path = here / "gpu-b.join"
    assert mode(path) == 0o600
    join = Join.model_validate_json(path.read_bytes())
    assert (join.host, join.port, join.replicas, join.vllm) == ("gpu-b", 9443, ["vllm-2", "vllm-3"], "0.32.0")
    assert join.settings == {"MODEL": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    place = here / "secrets" / "hosts"
    assert [mode(here / "secrets"), mode(place), mode(place / "ca.key")] == [0o700, 0o700, 0o600]
    assert sorted(file.name for file in (place / "gpu-b").iterdir()) == [
        "ca.pem",
        "own.key",
        "own.pem",
        "replicas.conf",
    ]
    assert join.key not in (place / "gpu-b" / "own.key").read_text(), "the host's key is in its file alone"
    assert (here / "nginx" / "fleet" / "link-gpu-b.conf").read_text() == (
        "upstream vllm-2 { zone vllm-2 64k; server link-gpu-b:8000 resolve; keepalive 64; }\n"
        "upstream vllm-3 { zone vllm-3 64k; server link-gpu-b:8001 resolve; keepalive 64; }\n"
    )
    assert "link-gpu-b:" in (here / "docker-compose.links.yml").read_text()
    (line,) = (here / "secrets" / "audit.jsonl").read_text().splitlines()
    said = json.loads(line)
    assert (said["action"], said["name"], said["address"]) == ("host.add", "gpu-b", "10.0.0.2")


def test_the_next_host_gets_the_next_names(here: Path) -> None:
    added("add gpu-b 10.0.0.2 --replicas 2")
    added("add gpu-c gpu-c.lan")
    assert [one.name for one in hosts.load(Secrets(here / "secrets")).hosts[1].replicas] == ["vllm-4"]
    listed = added("list").output
    assert re.search(r"gpu-b\s+10\.0\.0\.2, port 9443\s+vllm-2", listed)
    assert re.search(r"gpu-c\s+gpu-c\.lan, port 9443\s+vllm-4", listed)


@given(st.lists(st.from_regex(r"vllm-(\d{1,9}|[a-z]{1,4})", fullmatch=True)), st.integers(1, hosts.MOST_REPLICAS))
def test_new_names_are_never_taken(taken: list[str], count: int) -> None:
    new = [member.name for member in hosts.next_names(taken, count)]
    assert len(set(new)) == count
    assert not set(new) & set(taken)
    assert all(hosts.REPLICA.fullmatch(name) for name in new)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("add GPU_B 10.0.0.3", "GPU_B is no name for a host"),
        ("add ../x 10.0.0.3", "../x is no name for a host"),
        (f"add {'a' * 33} 10.0.0.3", "is no name for a host"),
        ("add gpu-c 10.0.0.256", "10.0.0.256 is no address"),
        ("add gpu-c '10.0.0.3;'", "10.0.0.3; is no address"),
        ("add gpu-c http://x", "http://x is no address"),
        ("add gpu-b 10.0.0.3", "there is a host gpu-b already, at 10.0.0.2"),
        ("add gpu-c 10.0.0.2", "gpu-b is at 10.0.0.2, port 9443, already"),
        ("add gpu-c 10.0.0.3 --ssh nowhere", "--ssh nowhere names no folder"),
        ("remove gpu-x", "there is no host gpu-x in this fleet: there is gpu-b"),
        ("renew gpu-x", "there is no host gpu-x in this fleet: there is gpu-b"),
    ],
)
def test_what_will_not_do_is_refused_by_name_and_changes_nothing(here: Path, args: str, said: str) -> None:
    added("add gpu-b 10.0.0.2")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    done = make_host(args)
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.split()).replace(" What to do:", ":")
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_replicas_names_are_unique_over_the_fleet() -> None:
    with pytest.raises(Problem, match="vllm-2 would be on gpu-b and on gpu-c"):
        hosts.check_host(one("gpu-c", "10.0.0.3", ("vllm-2",)), [one()], ["vllm-0"])
    with pytest.raises(Problem, match="vllm-0 would be on this host and on gpu-c"):
        hosts.check_host(one("gpu-c", "10.0.0.3", ("vllm-0",)), [one()], ["vllm-0"])
    with pytest.raises(Problem, match="vllm-5 would be on gpu-c and on gpu-c"):
        hosts.check_host(one("gpu-c", "10.0.0.3", ("vllm-5", "vllm-5")), [one()], ["vllm-0"])
    with pytest.raises(Problem, match="vllm-1-metrics is no name for a replica"):
        hosts.check_host(one("gpu-c", "10.0.0.3", ("vllm-1-metrics",)), [], [])
    with pytest.raises(Problem, match="vllm-2 is on this host and on gpu-b"):
        hosts.check_unique(Hosts(hosts=[one()]), ["vllm-2"])


def test_a_planned_host_gets_its_part_with_its_names_and_weights(here: Path) -> None:
    part = here / "hosts" / "gpu-b"
    part.mkdir(parents=True)
    body = render.host_file({"vllm-7": {}}, ROOT / "docker-compose.yml", {"x-weights": {"vllm-7": 3}})
    (part / "docker-compose.override.yml").write_text(body)
    added("add gpu-b 10.0.0.2")
    join = Join.model_validate_json((here / "gpu-b.join").read_bytes())
    assert (join.part, join.replicas, join.settings) == (body, ["vllm-7"], {})
    assert "server link-gpu-b:8000 resolve weight=3;" in (here / "nginx" / "fleet" / "link-gpu-b.conf").read_text()
    refused = make_host("add gpu-c 10.0.0.3 --replicas 1")
    assert refused.exit_code == 0, "another host is not planned"
    (part / "docker-compose.override.yml").write_text("services: {}\n")
    assert "is no host's part of a plan" in " ".join(make_host("renew gpu-b").stderr.split())


def test_a_renewed_host_stays_what_it_was_and_a_removed_one_does_not(here: Path) -> None:
    secrets = Secrets(here / "secrets")
    added("add gpu-b 10.0.0.2")
    first = Join.model_validate_json((here / "gpu-b.join").read_bytes())
    added("renew gpu-b")
    again = Join.model_validate_json((here / "gpu-b.join").read_bytes())
    assert (again.membership, again.replicas, again.ca) == (first.membership, first.replicas, first.ca)
    assert again.certificate != first.certificate
    added("remove gpu-b")
    assert hosts.load(secrets).hosts == []
    assert not (here / "docker-compose.links.yml").exists()
    assert list((here / "nginx" / "fleet").iterdir()) == []
    assert not (here / "secrets" / "hosts" / "gpu-b").exists()
    added("add gpu-b 10.0.0.2")
    anew = Join.model_validate_json((here / "gpu-b.join").read_bytes())
    assert anew.membership != first.membership, "what it had before is for a name that nobody asks for"
    (asked,) = set(re.findall(r"vllm-2\.(\S+);", (here / "secrets" / "hosts" / "gpu-b" / "replicas.conf").read_text()))
    assert asked == f"{anew.membership}.fleet"


def test_removing_cuts_the_link_before_anything_else(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added("add gpu-b 10.0.0.2")
    asked: list[tuple[str, ...]] = []

    def ask(*args: str) -> subprocess.CompletedProcess[str]:
        asked.append(args)
        return subprocess.CompletedProcess(args, 0, "abc\n" if args[1] == "ps" else "", "")

    def slow(_: Compose) -> Config:
        asked.append(("config",))
        return config_of(here, "vllm-0", "vllm-1")

    monkeypatch.setattr(host, "ask", ask)
    monkeypatch.setattr(Compose, "config", slow)
    added("remove gpu-b")
    assert [args[:2] for args in asked] == [("docker", "ps"), ("docker", "rm"), ("config",)]
    assert asked[1] == ("docker", "rm", "--force", "abc"), "SIGKILL: no connection lives on"
    assert "label=com.docker.compose.service=link-gpu-b" in asked[0]


def test_a_certificate_that_ends_soon_is_told_of() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    ends = [now + timedelta(days=days) for days in (-1, 29, 31)]
    every = [one(f"gpu-{number}", expires=int(end.timestamp())) for number, end in enumerate(ends)]
    said = hosts.ending(Hosts(hosts=every), now)
    assert [line.split(":")[0] for line in said] == [
        "gpu-0's certificate ended on 2029-12-31",
        "gpu-1's certificate ends on 2030-01-30",
    ]


def test_an_ipv6_address_and_a_dns_name_are_written_as_nginx_wants_them() -> None:
    assert "server [fd00::2]:9443 max_fails=0;" in hosts.gateway_end(one(address="fd00::2"))
    assert "server gpu-b.lan:9443 resolve max_fails=0;" in hosts.gateway_end(one(address="gpu-b.lan"))
    assert "server 10.0.0.2:9443 max_fails=0;" in hosts.gateway_end(one())


def test_each_replica_has_two_ports_of_its_own_at_the_gateways_end() -> None:
    lines = hosts.gateway_end(one(replicas=("vllm-2", "vllm-9"))).splitlines()[1:]
    assert [re.findall(r"listen (\d+); proxy_ssl_name (\S+);", line)[0] for line in lines] == [
        ("8000", "vllm-2.gpu-b-00000000.fleet"),
        ("9464", "vllm-2-metrics.gpu-b-00000000.fleet"),
        ("8001", "vllm-9.gpu-b-00000000.fleet"),
        ("9465", "vllm-9-metrics.gpu-b-00000000.fleet"),
    ]


# ---- on another host


@pytest.fixture
def carried(here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of gpu-b with two replicas, on that host."""
    added("add gpu-b 10.0.0.2 --replicas 2")
    there = tmp_path_factory.mktemp("gpu-b")
    (here / "gpu-b.join").rename(there / "gpu-b.join")
    monkeypatch.setattr(up, "SECRETS", Secrets(there / "secrets"))
    monkeypatch.setattr(roll, "SECRETS", Secrets(there / "secrets"))
    monkeypatch.setattr(up, "OVERRIDE", there / "docker-compose.override.yml")
    return there / "gpu-b.join"


def secrets_of(carried: Path) -> Secrets:
    """The other host's."""
    return Secrets(carried.parent / "secrets")


def override_of(carried: Path) -> Path:
    """The other host's docker-compose.override.yml."""
    return carried.parent / "docker-compose.override.yml"


def test_joining_takes_over_what_the_link_reads(carried: Path) -> None:
    up.take_part(carried)
    place = carried.parent / "secrets" / "link"
    assert mode(place.parent) == 0o700
    text = (place / "replicas.conf").read_text()
    join = hosts.joined(secrets_of(carried))
    assert join
    assert (place / "own.key").read_text() == join.key
    assert re.findall(r"^    (\S+) (\S+);$", text, re.MULTILINE)[1:] == [
        (f"vllm-2.{join.membership}.fleet", "vllm-2"),
        (f"vllm-2-metrics.{join.membership}.fleet", "vllm-2-metrics"),
        (f"vllm-3.{join.membership}.fleet", "vllm-3"),
        (f"vllm-3-metrics.{join.membership}.fleet", "vllm-3-metrics"),
    ]
    assert not hosts.take_join(secrets_of(carried), join), "once more changes nothing"


def change(path: Path, **fields: Any) -> None:
    """Changes fields of the file that was carried over."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_file_that_others_may_read_is_refused(carried: Path) -> None:
    carried.chmod(0o644)
    with pytest.raises(Problem, match="holds a private key, and others may read it"):
        up.take_part(carried)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "something"}, "is no file that `make host` wrote"),
        ({"more": 1}, "unknown field more"),
        ({"replicas": ["vllm-2; x"]}, "has names that `make host` does not give"),
        ({"membership": "gpu-c-00000000"}, "has names that `make host` does not give"),
        ({"made": 32_503_680_000}, "this host's clock is .* hours behind"),
    ],
)
def test_a_file_that_is_none_is_refused(carried: Path, fields: dict[str, Any], said: str) -> None:
    change(carried, **fields)
    with pytest.raises(Problem, match=said):
        up.take_part(carried)
    assert hosts.joined(secrets_of(carried)) is None


def test_a_file_that_is_missing_cut_off_or_out_of_date_is_refused(carried: Path) -> None:
    with pytest.raises(Problem, match="there is no file"):
        up.take_part(carried.with_name("other"))
    with pytest.raises(Problem, match=r"the certificate in .* has ended"):
        hosts.read_join(carried, now=datetime(2100, 1, 1, tzinfo=UTC).timestamp())
    carried.write_bytes(carried.read_bytes()[:500])
    with pytest.raises(Problem, match="is no file that `make host` wrote"):
        up.take_part(carried)


def test_a_host_that_is_something_else_already_is_left_alone(
    here: Path, carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "running", lambda _: "gateway\nvllm-0\n")
    with pytest.raises(Problem, match="this host runs a gateway of its own"):
        up.take_part(carried)
    monkeypatch.setattr(up, "running", lambda _: "")
    monkeypatch.setattr(up, "SECRETS", Secrets(here / "secrets"))
    with pytest.raises(Problem, match="this is the gateway's host"):
        up.take_part(carried)
    monkeypatch.setattr(up, "SECRETS", Secrets(carried.parent / "secrets"))
    up.take_part(carried)
    added("add gpu-c 10.0.0.3")
    with pytest.raises(Problem, match="this host is gpu-b already, and the file is for gpu-c"):
        up.take_part(here / "gpu-c.join")


def composed(*files: Path) -> dict[str, Any]:
    """What `docker compose` makes of these files."""
    options = [part for file in (ROOT / "docker-compose.yml", *files) for part in ("--file", str(file))]
    command = ["docker", "compose", "--project-directory", str(ROOT), "--env-file", os.devnull, *options]
    done = subprocess.run([*command, "config", "--format", "json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def wanted(**values: str) -> settings.Settings:
    """Settings of a host."""
    return settings.check(values)


def test_the_part_of_a_host_is_its_replicas_and_its_link(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker, "gpu_toolkit", lambda: False)
    monkeypatch.setattr(up, "listed_gpus", lambda: "")
    up.write_part(up.take_part(carried), wanted())
    services = composed(override_of(carried))
    assert set(services) == {"link", "vllm-2", "vllm-3"}
    assert {name: [port["published"] for port in one.get("ports", ())] for name, one in services.items()} == {
        "link": ["9443"],
        "vllm-2": [],
        "vllm-3": [],
    }
    assert services["vllm-2"]["environment"]["MODEL"] == "HuggingFaceTB/SmolLM2-135M-Instruct", "the gateway's host's"
    assert set(services["vllm-2"]["depends_on"]) == {"link"}
    assert services["link"]["read_only"]
    assert services["link"]["cap_drop"] == ["ALL"]
    targets = {volume["target"] for volume in services["link"]["volumes"]}
    assert targets == {"/etc/nginx/link", "/etc/fleet/link"}
    assert render.changed_by_hand(override_of(carried)) is False
    override_of(carried).write_text(override_of(carried).read_text() + "# mine\n")
    with pytest.raises(Problem, match=r"docker-compose\.override\.yml was changed by hand"):
        up.write_part(up.take_part(carried), wanted())


def test_a_host_can_have_the_names_that_the_compose_file_uses(tmp_path: Path) -> None:
    """The gateway's host has one replica or none, so vllm-0 and vllm-1 are elsewhere."""
    file = tmp_path / "docker-compose.override.yml"
    for names in (["vllm-0", "vllm-1", "vllm-2"], ["vllm-1"]):
        file.write_text(render.unplanned_file(names, ROOT / "docker-compose.yml", [], {}))
        services = composed(file)
        assert set(services) == {"link", *names}
        for name in names:
            assert services[name]["hostname"] == f"{name}.fleet"
            assert services[name]["security_opt"] == ["no-new-privileges:true"]
            assert set(services[name]["depends_on"]) == {"link"}


def test_each_replica_gets_a_gpu_where_there_are_some(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker, "gpu_toolkit", lambda: True)
    monkeypatch.setattr(up, "listed_gpus", lambda: "GPU 0: one\nGPU 1: two\n")
    join = up.take_part(carried)
    up.write_part(join, wanted())
    services = composed(override_of(carried))
    ids = [
        one["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for one in (services["vllm-2"], services["vllm-3"])
    ]
    assert ids == [["0"], ["1"]]
    monkeypatch.setattr(up, "listed_gpus", lambda: "GPU 0: one\n")
    with pytest.raises(Problem, match="gpu-b was added with 2 replicas, and has 1 GPUs"):
        up.write_part(join, wanted())
    up.write_part(join, wanted(GPU="off"))
    assert "deploy" not in composed(override_of(carried))["vllm-2"]


def test_a_replica_that_is_left_out_here_keeps_its_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make up ARGS='--replicas 1'` leaves its line in the gateway's files; a second one would stop the gateway."""
    fleet = here / "nginx" / "fleet"
    (fleet / "default.conf").write_text(fleet_line("vllm-0") + "\n" + fleet_line("vllm-1") + "\n")
    monkeypatch.setattr(Compose, "config", lambda _: config_of(here, "vllm-0"))
    added("add gpu-b 10.0.0.2")
    assert [one.name for one in hosts.load(Secrets(here / "secrets")).find("gpu-b").replicas] == ["vllm-2"]
    added("add gpu-c 10.0.0.3")
    assert [one.name for one in hosts.load(Secrets(here / "secrets")).find("gpu-c").replicas] == ["vllm-3"]


def test_no_command_asks_for_the_file_of_links_once_the_last_host_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's container still says that it was started with it."""
    files = [ROOT / name for name in ("docker-compose.yml", "docker-compose.tls.yml", "docker-compose.links.yml")]
    monkeypatch.setattr(compose, "running", lambda _: ",".join(map(str, files)))
    monkeypatch.setattr(compose, "ROOT", tmp_path)
    for name in ("docker-compose.tls.yml", "docker-compose.links.yml"):
        (tmp_path / name).touch()
    assert compose.running_files() == ["docker-compose.tls.yml", "docker-compose.links.yml"]
    (tmp_path / "docker-compose.links.yml").unlink()
    assert compose.running_files() == ["docker-compose.tls.yml"]


def test_the_gateways_end_publishes_nothing(here: Path) -> None:
    added("add gpu-b 10.0.0.2")
    services = composed(here / "docker-compose.links.yml")
    link = services["link-gpu-b"]
    assert "ports" not in link
    assert link["command"][-1] == "gateway"
    assert [volume["source"].rpartition("/secrets/")[2] for volume in link["volumes"]][1:] == ["hosts/gpu-b"]
    assert link["sysctls"] == services["gateway"]["sysctls"], "what finds a host that is gone"


def test_what_differs_from_the_gateways_host_is_told(carried: Path) -> None:
    join = up.take_part(carried)
    assert hosts.differences(join, "0.32.0", {}) == []
    said = hosts.differences(join, "0.31.0", {"MODEL": "other"}, now=join.made - 60)
    assert said == [
        "this host's clock is behind the gateway's, by 60 s or more: set it (NTP)",
        "this checkout has vLLM 0.31.0, the gateway's 0.32.0: bring both to one",
        ".env says MODEL=other, the gateway's host MODEL=HuggingFaceTB/SmolLM2-135M-Instruct",
    ]


def test_a_host_whose_replicas_or_port_are_not_those_that_the_fleet_knows_is_refused(
    carried: Path, tmp_path: Path
) -> None:
    join = up.take_part(carried)
    services = {name: Service(image="replica") for name in ("link", "vllm-2", "vllm-3", "new")}
    config = Config.model_validate({"services": services, "x-pins": PINS})
    up.check_joined(join, config, wanted())
    assert set(config.services) == {"link", "vllm-2", "vllm-3"}, "what else there is, is not this host's"
    with pytest.raises(Problem, match="the gateway asks at port 9443, but LINK_PORT is 9000"):
        up.check_joined(join, config, wanted(LINK_PORT="9000"))
    with pytest.raises(
        Problem, match="this host's replicas are vllm-0, but the fleet knows those of gpu-b as vllm-2, vllm-3"
    ):
        up.check_joined(join, config_of(tmp_path, "vllm-0"), wanted())


def test_the_port_that_has_to_be_free_is_the_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_connections", lambda _: [])
    assert check_ports(wanted(), set(), joined=True) == "9443"


# ---- rolling


class Fleet(Gateway):
    """A gateway over replicas here and on gpu-b."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def replicas(self) -> list[Replica]:
        return [
            Replica(name="vllm-0", state="ready", models=["m"], in_flight=0),
            Replica(name="vllm-2", on="gpu-b", state="ready", models=["m"], in_flight=0),
        ]

    def drain(self, name: str) -> None:
        self.calls.append(f"drain {name}")

    def undrain(self, name: str) -> None:
        self.calls.append(f"undrain {name}")


def rolled(monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, list[str]]:
    """The exit status of `make roll`, and what was done in which order."""
    fleet = Fleet()
    monkeypatch.setattr(roll, "Gateway", lambda _: fleet)
    monkeypatch.setattr(Compose, "check_launch", lambda *_: None)
    monkeypatch.setattr(roll, "recreate", lambda _, name, *__: fleet.calls.append(f"recreate {name}"))
    monkeypatch.setattr(roll, "work", lambda command, *_, **__: fleet.calls.append(shlex.join(command)))
    try:
        roll.roll(list(args) or None, 1, 1)
    except SystemExit as end:
        return int(str(end.code)), fleet.calls
    return 0, fleet.calls


def test_replicas_of_other_hosts_are_rolled_where_there_is_a_way(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Compose, "config", lambda _: config_of(here, "vllm-0", "vllm-1"))
    added("add gpu-b 10.0.0.2")
    status, calls = rolled(monkeypatch)
    assert (status, calls) == (0, ["drain vllm-0", "recreate vllm-0", "undrain vllm-0"])
    assert "vllm-2 is left as it is, on gpu-b: run make roll ARGS=vllm-2 there" in " ".join(
        capsys.readouterr().out.split()
    )
    assert rolled(monkeypatch, "vllm-2")[0] == 1
    assert "vllm-2 is on gpu-b, and this host knows no way there" in " ".join(capsys.readouterr().err.split())

    added("remove gpu-b")
    added("add gpu-b 10.0.0.2 --ssh me@gpu-b:fleet")
    over = "ssh -o BatchMode=yes -- me@gpu-b 'cd fleet && make roll ARGS=vllm-2'"
    status, calls = rolled(monkeypatch)
    assert (status, calls[3:]) == (0, ["drain vllm-2", over, "undrain vllm-2"])


def test_a_host_whose_gateway_is_elsewhere_rolls_its_own(
    carried: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    up.take_part(carried)
    assert rolled(monkeypatch) == (0, ["recreate vllm-2", "recreate vllm-3"])
    assert rolled(monkeypatch, "vllm-3") == (0, ["recreate vllm-3"])
    assert rolled(monkeypatch, "vllm-0")[0] == 1
    assert "there is no replica vllm-0" in capsys.readouterr().err


def test_make_down_reaches_the_hosts_that_there_is_a_way_to(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added("add gpu-b 10.0.0.2 --ssh me@gpu-b:fleet")
    added("add gpu-c 10.0.0.3")
    asked: list[str] = []
    monkeypatch.setattr(host, "work", lambda command, *_, **__: asked.append(shlex.join(command)))
    assert "gpu-c runs on: `make down` there stops it" in added("down").output
    assert asked == ["ssh -o BatchMode=yes -- me@gpu-b 'cd fleet && make down'"]
