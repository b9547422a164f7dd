"""The way on to a server that asks for a key, as `make ray-front` makes it: to simulated replicas, each by a port."""

from collections.abc import Iterator

import httpx
import pytest

import ray_front
from access.keys import gateways_key
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat

SECRET = "a secret of the cluster"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Replicas]:
    with Replicas(2) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def shared_gateway(fleet: Replicas) -> Iterator[Gateway]:
    hosts = [sim.host for sim in fleet]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_front, "PORT", next(iter(fleet)).port)
        text = ray_front.fleet_file(hosts, fleet.gateway_host, "/etc/nginx/secrets/ray.conf")
    files = {"secrets/ray.conf": ray_front.key_file(SECRET).encode()}
    with Gateway(fleet, upstreams=text, files=files, env={"GATEWAY_AUTH": "off"}) as gateway:
        gateway.wait_ready()
        yield gateway


def test_the_server_gets_the_gateways_key_and_the_priority_and_not_the_clients(
    client: httpx.Client, fleet: Replicas
) -> None:
    headers = {"Authorization": "Bearer the-clients-own", "X-Request-Id": "onward-1"}
    assert client.post("/v1/chat/completions", json=chat("Hello"), headers=headers).status_code == 200
    heads = [seen["head"] for sim in fleet for seen in sim.state()["seen"] if "onward-1" in seen["head"]]
    assert len(heads) == 1
    assert f"authorization: bearer {gateways_key(SECRET)}" in heads[0].lower()
    assert "x-request-id: onward-1" in heads[0].lower()
    assert "the-clients-own" not in heads[0]


def test_a_stream_comes_as_it_is_made(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json=chat("Hello", max_tokens=20, stream=True)) as answer:
        chunks = list(answer.iter_raw())
    assert len(chunks) > 5
    assert b"".join(chunks).rstrip().endswith(b"data: [DONE]")


def test_a_long_body_goes_through(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=chat("Hello " * 400_000, max_tokens=1))
    assert answer.status_code in (200, 400), answer.text[:300]


def test_a_host_that_is_gone_costs_no_request(gateway: Gateway, client: httpx.Client, fleet: Replicas) -> None:
    """Its port does not answer: what was meant for it has been seen by nobody, so it goes to the other one."""
    lost, _ = fleet
    lost.kill(forget=False)
    try:
        answers = [client.post("/v1/chat/completions", json=chat(f"Hello {n}")) for n in range(20)]
        assert {(answer.status_code, answer.headers["x-replica"]) for answer in answers} == {(200, "vllm-ray-2")}
        gateway.wait_states({"vllm-ray-1": "unreachable", "vllm-ray-2": "ready"})
    finally:
        lost.start()


def test_a_way_on_is_no_target_of_prometheus(gateway: Gateway) -> None:
    """In a stack it is a port of the gateway's own loopback, where nobody else comes."""
    text = (gateway.conf / "fleet" / "default.conf").read_text()
    before = httpx.get(f"{gateway.metrics_url}/fleet").json()
    try:
        gateway.write_fleet(text + "upstream vllm-away { zone vllm-away 64k; server 127.0.0.1:8101; }\n")
        gateway.reload()
        until(lambda: "vllm-away" in gateway.states(), "it is in the fleet")
        assert httpx.get(f"{gateway.metrics_url}/fleet").json() == before
    finally:
        gateway.write_fleet(text)
        gateway.reload()
