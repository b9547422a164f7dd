"""A domain's certificate comes by ACME from a real authority (Pebble), and the real gateway serves it."""

import json
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from lab.waiting import until
from stack import images
from stack.compose import ACME_FILE, TLS_FILE, Compose
from stack.shell import ROOT, ask
from tests.gateway.test_https import certify

DOMAIN = "llm.example"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def pebble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Pebble's two programs, from Debian's package."""
    root = tmp_path_factory.mktemp("pebble") / "root"
    mirror = images.debian_mirror()
    make = ["mmdebstrap", "--quiet", "--variant=extract", '--aptopt=Acquire::Check-Valid-Until "false"']
    make += ["--include=pebble", "forky", str(root), *([f"deb {mirror} forky main"] if mirror else [])]
    if not shutil.which("mmdebstrap") or ask(*make, timeout=300).returncode:
        pytest.skip("no Debian mirror gives Pebble, the authority that this test asks, or mmdebstrap is not here")
    return root / "usr" / "bin"


@dataclass(frozen=True)
class Https:
    """A second gateway, with a domain of its own and the authority that vouches for it."""

    files: list[str]
    env: dict[str, str]
    roots: ssl.SSLContext

    def compose(self, *args: str) -> str:
        done = subprocess.run(
            ["docker", "compose", *(word for file in self.files for word in ("-f", file)), *args],
            cwd=ROOT, env=os.environ | self.env, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def get(self, path: str) -> httpx.Response:
        url = f"https://127.0.0.1:{self.env['HTTPS_PORT']}"
        with httpx.Client(base_url=url, verify=self.roots, http2=True, trust_env=False) as client:
            return client.get(path, headers={"Host": DOMAIN}, extensions={"sni_hostname": DOMAIN})


@pytest.fixture(scope="module")
def https(pebble: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Https]:
    folder = tmp_path_factory.mktemp("acme")
    folder.chmod(0o755)
    certify(folder, "pebble")
    api, management, dns, control = (free_port() for _ in range(4))
    env = {"HTTPS_DOMAIN": DOMAIN, "ACME_EMAIL": f"me@{DOMAIN}",
           "COMPOSE_PROJECT_NAME": f"https-{secrets.token_hex(3)}",
           "HTTP_PORT": str(free_port()), "HTTPS_PORT": str(free_port())}  # fmt: skip
    (folder / "pebble.json").write_text(json.dumps({"pebble": {
        "listenAddress": f"0.0.0.0:{api}", "managementListenAddress": f"127.0.0.1:{management}",
        "certificate": str(folder / "fullchain.pem"), "privateKey": str(folder / "privkey.pem"),
        "httpPort": int(env["HTTP_PORT"]), "tlsPort": int(env["HTTPS_PORT"]),
    }}))  # fmt: skip
    (folder / "authority.yml").write_text(json.dumps({"services": {"acme": {
        "extra_hosts": ["pebble:host-gateway"],
        "environment": {"LEGO_CA_CERTIFICATES": "/pebble.pem", "ACME_SERVER": f"https://pebble:{api}/dir"},
        "volumes": [f"{folder / 'fullchain.pem'}:/pebble.pem:ro"],
    }}}))  # fmt: skip
    programs = [
        subprocess.Popen([pebble / "pebble-challtestsrv", "-dnsserver", f"127.0.0.1:{dns}", "-management",
                          f"127.0.0.1:{control}", "-defaultIPv4", "127.0.0.1", "-defaultIPv6", "",
                          "-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", ""]),
        subprocess.Popen([pebble / "pebble", "-config", folder / "pebble.json", "-dnsserver", f"127.0.0.1:{dns}"],
                         env=os.environ | {"PEBBLE_VA_NOSLEEP": "1"}),
    ]  # fmt: skip
    files = ["docker-compose.yml", TLS_FILE, ACME_FILE, str(folder / "authority.yml")]
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            config = Compose(TLS_FILE, ACME_FILE).config()
        images.bring(config.model_copy(update={"services": {"acme": config.services["acme"]}}), "auto", lambda _: None)
        root = ["curl", "--silent", "--insecure", f"https://127.0.0.1:{management}/roots/0"]
        until(lambda: ask(*root).returncode == 0, "Pebble answers")
        (folder / "roots.pem").write_text(ask(*root).stdout)
        made = Https(files, env, ssl.create_default_context(cafile=str(folder / "roots.pem")))
        try:
            made.compose("up", "--detach", "gateway", "acme")
            yield made
        finally:
            made.compose("down", "--volumes", "--timeout", "1")
    finally:
        for program in programs:
            program.terminate()
            program.wait()


def test_a_domains_certificate_is_got_and_served(https: Https) -> None:
    """The certificate chains up to the authority's root, under the domain's name; the client checks both."""

    def answers() -> bool:
        try:
            return https.get("/health").status_code == httpx.codes.OK
        except httpx.ConnectError:
            return False

    until(answers, "the gateway has its certificate", 60)
    assert https.get("/health").http_version == "HTTP/2"
    assert https.get("/v1/models").status_code == 503  # no replica here; the gateway itself answers
    plain = httpx.get(f"http://127.0.0.1:{https.env['HTTP_PORT']}/status", headers={"Host": DOMAIN})
    assert plain.headers["location"] == f"https://{DOMAIN}:{https.env['HTTPS_PORT']}/status"


def test_only_the_two_ports_are_published_and_the_key_is_the_gateways_alone(https: Https) -> None:
    published = re.findall(r":(\d+)->(\d+)/tcp", https.compose("ps", "gateway"))
    assert sorted(inner for _, inner in published) == ["443", "8080"]
    assert https.compose("exec", "-T", "gateway", "stat", "-c", "%a %u", "/etc/fleet/tls/privkey.pem") == "600 101\n"
