"""`make up` over HTTPS: a certificate that clients would refuse is told in words, and waiting for one has an end."""

from __future__ import annotations

import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import up
from stack import certificate, gateway, settings
from stack.certificate import Untrusted
from stack.compose import Compose, Config, Container, Service
from stack.console import Problem
from stack.gateway import Gateway
from stack.shell import ROOT


def certify(folder: Path) -> None:
    """A certificate of nobody's, for this host."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem", "-days", "2", "-subj", "/CN=own.example"],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where something answers with a certificate of tmp_path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "16")
            self.end_headers()
            self.wfile.write(b'{"replicas": []}')

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(gateway, "NEW_CERTIFICATE_SECONDS", 0)
    certify(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "fullchain.pem", tmp_path / "privkey.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_certificate_of_an_authority_that_nobody_knows_is_a_problem(url: str) -> None:
    asked = Gateway(Compose(), url, "own.example")
    for ask in (asked.published, asked.answers, lambda: asked.first_answer("?")):
        with pytest.raises(Problem, match=r"cannot be verified: self-signed certificate: .*staging authority"):
            ask()


def test_the_certificate_in_secrets_is_taken_as_it_is_and_no_other(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "FOLDER", tmp_path)
    assert Gateway(Compose(), url).published() == []
    certify(tmp_path)
    with pytest.raises(Untrusted, match=r"the gateway serves another than .*fullchain\.pem"):
        Gateway(Compose(), url).published()
    (tmp_path / "fullchain.pem").unlink()
    with pytest.raises(Untrusted, match=r"fullchain\.pem cannot be read"):
        Gateway(Compose(), url).published()


def test_a_certificate_that_a_worker_has_still_to_read_is_waited_for(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another lies in secrets/ than is served, until the gateway has looked again."""
    monkeypatch.setattr(gateway, "NEW_CERTIFICATE_SECONDS", 60)
    new = tmp_path / "new"
    new.mkdir()
    certify(new)
    monkeypatch.setattr(certificate, "FOLDER", new)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            monkeypatch.setattr(certificate, "FOLDER", tmp_path)

    monkeypatch.setattr(time, "sleep", sleep)
    assert Gateway(Compose(), url).answers()
    assert len(waits) == 2


class Fleet(Compose):
    """A stack whose certificate comes with a restart of what asks for it; `said` are the commands that it was given."""

    def __init__(self, *services: str) -> None:
        super().__init__()
        self.said: list[tuple[str, ...]] = []
        fields: dict[str, Any] = {"ID": "1", "State": "running", "Health": "", "Status": "Up"}
        self.there = {name: Container.model_validate(fields | {"Service": name}) for name in services}

    def containers(self) -> dict[str, Container]:
        return self.there

    def command(self, *args: str) -> list[str]:
        self.said.append(args)
        return ["true"]

    def line(self, *args: str) -> str:
        return " ".join(args)

    def last_words(self, service: str) -> str:
        return f"{service}: no such domain"


class Served(Gateway):
    """A gateway that has its certificate at the third look."""

    looks = 0

    def answers(self) -> bool:
        self.looks += 1
        return self.looks > 2


def test_what_sleeps_after_a_failure_asks_for_the_certificate_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    fleet = Fleet("acme")
    up.wait_for_certificate(fleet, Served(fleet), fleet.there["acme"])
    assert fleet.said == [("restart", "acme")]


def test_what_just_began_to_ask_for_the_certificate_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    fleet = Fleet("acme")
    up.wait_for_certificate(fleet, Served(fleet), None)
    assert fleet.said == []


def test_the_wait_for_a_certificate_ends_with_the_reason(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "CERTIFICATE_S", 0)
    fleet = Fleet("acme")
    with pytest.raises(Problem, match="cannot be verified"):
        up.wait_for_certificate(fleet, Gateway(fleet, url, "own.example"), None)
    with pytest.raises(Problem, match="no certificate after 0 s: acme: no such domain"):
        up.wait_for_certificate(fleet, Gateway(fleet, "https://127.0.0.1:9", "own.example"), None)


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("tokens", "tokens"),
        ("webui", "webui"),
        ("node-exporter", "hardware"),
        ("traces", "traces"),
        ("alertmanager", "alerts"),
    ],
)
def test_what_a_profile_started_goes_with_it(name: str, profile: str) -> None:
    fleet = Fleet("gateway", name)
    services = {"gateway": Service(image="a"), name: Service(image="b")}
    up.remove_left_out(fleet, Config.model_validate({"services": services, "x-pins": {}}), print)
    assert fleet.said == []
    del services[name]
    up.remove_left_out(fleet, Config.model_validate({"services": services, "x-pins": {}}), print)
    assert fleet.said == [("--profile", profile, "rm", "--stop", "--force", name)]


def test_the_first_key_is_shown_though_what_comes_next_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise Problem("a user's role is wrong", "correct it")

    monkeypatch.setattr(up, "first_key", lambda _: "sk-fleet-first")
    monkeypatch.setattr(up, "take_environment", fails)
    with pytest.raises(Problem, match="role is wrong"):
        up.bring_keys(settings.check({}), Config.model_validate({"services": {}, "x-pins": {}}))
    assert "sk-fleet-first" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["ACME_SERVER", "ACME_EMAIL"])
def test_another_authority_or_address_begins_anew(tmp_path: Path, changed: str) -> None:
    """The loop of docker-compose.acme.yml, with a lego that notes what it was told and makes a pair."""
    script = yaml.safe_load((ROOT / "docker-compose.acme.yml").read_text())["services"]["acme"]["entrypoint"][2]
    script = script.replace("$$", "$").replace("cd /certificates", f"cd {tmp_path}")
    script = script.replace("sleep 43200", "exit 43")
    lego = tmp_path / "lego"
    lego.write_text(
        '#!/bin/sh\necho "$*" >>asked\nwhile [ "$1" != --path ]; do shift; done\nmkdir -p "$2/certificates"\n'
        'for end in key crt; do echo "$ACME_SERVER" >"$2/certificates/own.example.$end"; done\n'
    )
    lego.chmod(0o755)
    values = {"HTTPS_DOMAIN": "own.example", "ACME_SERVER": "https://a.example/dir", "ACME_EMAIL": "a@a.example"}
    for told in (values, values, values | {changed: "https://b.example"}):
        done = subprocess.run(
            ["/bin/sh", "-uc", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin", **told}, check=False
        )
        assert done.returncode == 43
        assert (tmp_path / "fullchain.pem").read_text() == told["ACME_SERVER"] + "\n"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.partition("webroot webroot ")[2] for line in asked] == ["run", "renew --days 30", "run"]
