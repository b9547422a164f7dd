"""HTTPS and HTTP/2 by the same paths as HTTP; what comes by plain HTTP where it should not is sent on or refused."""

import contextlib
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat

CHAT = "/v1/chat/completions"


def certify(folder: Path, name: str) -> None:
    """A certificate for a name and for this host's addresses, as `make up` finds it."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", folder / "key", "-out", folder / "chain", "-days", "2", "-subj", f"/CN={name}",
         "-addext", f"subjectAltName=DNS:{name},DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    for made, seen in (("key", "privkey.pem"), ("chain", "fullchain.pem")):
        (folder / made).chmod(0o644)
        (folder / made).rename(folder / seen)


class Secure(Gateway):
    """A gateway with a certificate."""

    def configure(self) -> None:
        super().configure()
        self.tls.mkdir(parents=True)
        certify(self.tls, "first.example")

    @property
    def tls(self) -> Path:
        """Where its certificate lies."""
        return self.conf / "tls"

    @property
    def https_url(self) -> str:
        return f"https://{self.host}:8443"

    @property
    def redirect_url(self) -> str:
        return f"http://{self.host}:8079"


@pytest.fixture(scope="module")
def secure() -> Iterator[Secure]:
    with Replicas(2) as fleet, Secure(fleet, env={"HTTPS_PORT": "8443", "TLS": "1"}) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture(scope="module")
def client(secure: Secure) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=secure.https_url, http2=True, verify=False, timeout=30) as session:  # noqa: S501
        yield session


def test_a_chat_and_a_stream_come_by_http_2(client: httpx.Client) -> None:
    answer = client.post(CHAT, json=chat("by https"))
    assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
    stream = client.post(CHAT, json=chat("by https") | {"stream": True})
    assert stream.text.rstrip().endswith("data: [DONE]")
    assert client.get("/nothing").status_code == 404


def test_a_browser_is_told_to_come_by_https_only(client: httpx.Client, secure: Secure) -> None:
    for path in ("/status", "/status/status.js", "/v1/models", "/nothing"):
        assert client.get(path).headers["strict-transport-security"] == "max-age=63072000", path
        plain = httpx.get(secure.url + path)
        assert "strict-transport-security" not in plain.headers


def test_a_stream_whose_replica_dies_says_so_by_http_2(secure: Secure) -> None:
    """The error is an event of its own, and the stream ends without the mark of a whole one."""
    with Replicas(1) as fleet, Secure(fleet) as gateway:
        gateway.wait_ready()
        fleet["vllm-0"].fault("cut", after_tokens=3)
        with httpx.Client(base_url=gateway.https_url, http2=True, verify=False, timeout=30) as session:  # noqa: S501
            got: list[str] = []
            asked = session.stream("POST", CHAT, json=chat("cut") | {"stream": True, "max_tokens": 50})
            with asked as answer, pytest.raises(httpx.RemoteProtocolError):
                got.extend(answer.iter_text())
    assert "stream_lost" in "".join(got)
    assert "[DONE]" not in "".join(got)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_browser_that_came_by_http_is_sent_on(secure: Secure, method: str) -> None:
    answer = httpx.request(method, f"{secure.redirect_url}/status?x=%20y", headers={"Host": "llm.example"})
    assert answer.status_code == 308
    assert answer.headers["location"] == "https://llm.example:8443/status?x=%20y"


def test_a_request_with_a_body_by_plain_http_is_refused_with_what_to_do(secure: Secure) -> None:
    answer = httpx.post(secure.redirect_url + CHAT, json=chat("plain"), headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "https_required"
    assert "rotate it" in answer.json()["error"]["message"]
    assert "secret" not in answer.text


def test_a_renewed_certificate_counts_without_a_reload(secure: Secure) -> None:
    def subject() -> str:
        context = ssl.create_default_context(cafile=str(secure.tls / "fullchain.pem"))
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection((secure.host, 8443)) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as tls,
        ):
            der = tls.getpeercert(binary_form=True)
        assert der
        shown = subprocess.run(["openssl", "x509", "-inform", "der", "-noout", "-subject"], input=der,
                               capture_output=True, check=True)  # fmt: skip
        return shown.stdout.decode()

    workers = secure.workers()
    assert "first.example" in subject()
    certify(secure.tls, "second.example")
    until(lambda: "second.example" in subject(), "the new certificate is served", 30)
    assert secure.workers() == workers


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")  # that they are old is the point
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_versions_of_tls_that_are_broken_are_not_spoken(secure: Secure, version: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection((secure.host, 8443)) as raw,
        pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|NO_PROTOCOLS|UNSUPPORTED|alert|EOF"),
    ):
        context.wrap_socket(raw)


def test_without_a_certificate_the_rest_works(secure: Secure) -> None:
    with Replicas(1) as fleet, Gateway(fleet) as gateway:
        gateway.wait_ready()
        assert httpx.post(gateway.url + CHAT, json=chat("plain")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://{gateway.host}:8443/health", verify=False)  # noqa: S501


def test_headers_that_come_slowly_end_in_time(secure: Secure) -> None:
    """A client that sends a byte now and then holds its connection for fifteen seconds, not for ever."""
    with socket.create_connection((secure.host, 8080)) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        slow.settimeout(0.2)

        def ended() -> bool:
            try:
                slow.sendall(b"a")
                slow.recv(4096)
            except TimeoutError:
                return False
            except OSError:
                pass
            return True

        until(ended, "the gateway ends the connection", 25)


def test_the_clients_address_is_taken_from_trusted_proxies_only(secure: Secure) -> None:
    """Nobody is trusted by default: what a client says of itself stays what it says."""
    answer = httpx.post(secure.url + CHAT, json=chat("who"), headers={"X-Forwarded-For": "203.0.113.9"})
    assert answer.status_code == 200
    request = answer.headers["x-request-id"]
    until(lambda: request in secure.log(), "the request is logged")
    (line,) = re.findall(rf'.*"{request}".*', secure.log())
    assert '"client":"127.' in line
    assert "203.0.113.9" not in line


class Edited(Gateway):
    """A gateway with a limit that a test reaches, and with proxies that it trusts."""

    def configure(self) -> None:
        super().configure()
        public, proxies = self.conf / "conf.d" / "public.conf", self.conf / "host" / "proxies.conf"
        assert "limit_conn addresses 4000;" in public.read_text()
        public.write_text(public.read_text().replace("limit_conn addresses 4000;", "limit_conn addresses 3;"))
        proxies.write_text(proxies.read_text() + "set_real_ip_from 127.0.0.0/8;\n")


@pytest.fixture(scope="module")
def edited() -> Iterator[Edited]:
    with Replicas(2) as fleet, Edited(fleet) as gateway:
        gateway.wait_ready()
        for sim in fleet:
            sim.fault(slow=5.0)
        yield gateway


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_an_address_with_too_many_requests_at_once_is_told_so_in_its_own_words(edited: Edited, path: str) -> None:
    """Up to the limit all are served, beyond it none; another address is served all the same."""
    with contextlib.ExitStack() as streams:
        for n in range(3):
            body = chat(f"held {n}") | {"stream": True, "max_tokens": 400}
            asked = httpx.stream("POST", edited.url + CHAT, json=body, headers={"X-Forwarded-For": "203.0.113.7"})
            assert streams.enter_context(asked).status_code == 200
        body = chat("one more") | {"max_tokens": 2}
        refused = httpx.post(edited.url + path, json=body, headers={"X-Forwarded-For": "203.0.113.7"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "too many requests on their way" in refused.json()["error"]["message"]
        other = httpx.post(edited.url + CHAT, json=body, headers={"X-Forwarded-For": "203.0.113.8"})
        assert other.status_code == 200
    until(
        lambda: httpx.post(edited.url + CHAT, json=body, headers={"X-Forwarded-For": "203.0.113.7"}).is_success,
        "places of streams that ended are free",
    )


def test_a_trusted_proxys_word_for_the_clients_address_counts(edited: Edited) -> None:
    answer = httpx.post(edited.url + CHAT, json=chat("who"), headers={"X-Forwarded-For": "10.9.9.9, 203.0.113.9"})
    request = answer.headers["x-request-id"]
    until(lambda: request in edited.log(), "the request is logged")
    (line,) = re.findall(rf'.*"{request}".*', edited.log())
    assert '"client":"203.0.113.9"' in line, (
        "the last address, which the proxy wrote, and not what the client said before"
    )
