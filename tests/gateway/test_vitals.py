"""What the gateway tells of itself: its clock, memory, zones, certificate, and keys near their quota."""

import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from lab.sim.gateway import Gateway
from lab.sim.replica import ITL_BUCKETS
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT
from tests.gateway.conftest import chat
from tests.gateway.test_access import CHAT, bearer, entry, keys_file, new_key
from tests.gateway.test_metrics import exposed

KEYS = {name: new_key() for name in ("near", "far", "free")}
LIMITS = {
    "near": {"tokens_per_day": 50, "tokens_per_month": 1000},
    "far": {"tokens_per_day": 100_000},
    "free": {"requests_per_minute": 100},
}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Replicas]:
    with Replicas(1) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def gateway(fleet: Replicas) -> Iterator[Gateway]:
    """A gateway with a folder for a certificate and three keys."""
    keys = keys_file(*(entry(name, key, limits=LIMITS[name]) for name, key in KEYS.items())).encode()
    files = {"secrets/keys.json": keys, "tls/none": b""}
    with Gateway(fleet, files=files) as running:
        until(lambda: httpx.get(running.url + "/ready").status_code == 200, "ready")
        yield running


def certificate(end: datetime, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    """A certificate in PEM that ends then."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llm.example.com" * 4)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2025, 1, 1, tzinfo=UTC))
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize("years", [1, 60])
@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_the_end_of_the_certificate_is_told(gateway: Gateway, kind: str, years: int) -> None:
    """That of the first certificate in the file, before and after 2050, from which on the time is written otherwise."""
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=365 * years, seconds=7)
    path = gateway.conf / "tls" / "fullchain.pem"
    path.write_text(certificate(end, key) + certificate(end + timedelta(days=1), key))
    assert exposed(gateway)["gateway_certificate_end_seconds"] == end.timestamp()


@pytest.mark.parametrize(
    "text",
    ["", "no certificate", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"],
)
def test_what_is_no_certificate_has_no_end(gateway: Gateway, text: str) -> None:
    """All other metrics are there."""
    (gateway.conf / "tls" / "fullchain.pem").write_text(text)
    series = exposed(gateway)
    assert "gateway_certificate_end_seconds" not in series
    assert "gateway_time_seconds" in series


def test_half_a_certificate_has_no_end(gateway: Gateway) -> None:
    """One that is being written, or was cut, wherever that is."""
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
    pem = certificate(end, ec.generate_private_key(ec.SECP256R1()))
    body = pem.splitlines()[1:-1]
    for lines in range(len(body)):
        cut = "\n".join(["-----BEGIN CERTIFICATE-----", *body[:lines], "-----END CERTIFICATE-----", ""])
        (gateway.conf / "tls" / "fullchain.pem").write_text(cut)
        assert "gateway_certificate_end_seconds" not in exposed(gateway), f"{lines} of {len(body)} lines"


def test_clock_memory_and_zones_are_told(gateway: Gateway) -> None:
    series = exposed(gateway)
    assert abs(series["gateway_time_seconds"] - time.time()) < 5
    assert series["gateway_memory_bytes"] > 1 << 20
    for zone, size in (("counters", 10 << 20), ("usage", 12 << 20), ("keys", 16 << 20)):
        assert series[f'gateway_zone_bytes{{zone="{zone}"}}'] == size
        assert 0.5 * size < series[f'gateway_zone_free_bytes{{zone="{zone}"}}'] < size


def test_a_key_near_its_quota_is_told_and_no_other(gateway: Gateway) -> None:
    """The share is that of the day's tokens; a key with room, and one without a quota, have no series."""

    def told() -> dict[str, float]:
        return {key: value for key, value in exposed(gateway).items() if "quota_used" in key}

    assert told() == {}
    used = 0
    for name, key in KEYS.items():
        answer = httpx.post(gateway.url + CHAT, json=chat("near its end", max_tokens=20), headers=bearer(key))
        assert answer.status_code == 200, answer.text
        if name == "near":
            used = answer.json()["usage"]["total_tokens"]
    assert 25 < used <= 50
    until(told, "a key near its quota is told")
    assert told() == {'gateway_key_quota_used_ratio{key="near",quota="day"}': used / 50}


def test_the_tokens_of_probes_are_told(gateway: Gateway) -> None:
    """A replica has been asked for one token at least, and its answer said what that took."""
    series = exposed(gateway)
    asked = series['gateway_probes_total{replica="vllm-0",result="token"}']
    assert series['gateway_probe_tokens_total{replica="vllm-0"}'] == 2 * asked > 0


def test_how_models_stand_against_their_objectives_is_told(gateway: Gateway, fleet: Replicas) -> None:
    """By the file that `make up` writes, and the replica's own counts of tokens, of which some came too late."""
    sim = fleet["vllm-0"]
    objective = json.loads((ROOT / "nginx" / "objectives.json").read_text())["default"]
    # a bound of the replica's histogram, so that it knows exactly how many kept it
    assert objective["itl_p95_seconds"] in ITL_BUCKETS

    def stands() -> dict[str, Any]:
        status = httpx.get(gateway.admin_url + "/status.json").json()
        return next(iter(status["objectives"]), {})

    def counted() -> tuple[list[int], int]:
        """The tokens after the first that were in time and all of these, and all first ones."""
        text = httpx.get(f"{sim.url}/metrics").text
        itl = [
            int(re.findall(rf'^vllm:inter_token_latency_seconds_bucket{{.*,le="{le}"}} (\d+)$', text, re.MULTILINE)[0])
            for le in (objective["itl_p95_seconds"], r"\+Inf")
        ]
        return itl, int(sim.metrics()["vllm:time_to_first_token_seconds_count"])

    def ask() -> None:
        answer = httpx.post(gateway.url + CHAT, json=chat("in time", max_tokens=7), headers=bearer(KEYS["free"]))
        assert answer.status_code == 200

    (_, before), _ = counted()
    ask()
    sim.fault(slow=20)  # a step takes 200 ms
    ask()
    sim.fault()
    (in_time, every), _ = counted()
    assert every == before + 12
    assert in_time <= every - 6
    until(lambda: (told := stands()) and (told["itl"], told["ttft"][1]) == counted(), "all tokens are counted")
    told = stands()
    assert told["model"] == "sim"
    assert told["objective"] == objective
    assert 0 < told["ttft"][0] <= told["ttft"][1]
