"""Signing in through the gateway: the real token service behind the real Nginx, and none."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from access import service
from access.keys import KeyStore
from access.store import Secrets
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import PASSWORD, token_service


@pytest.fixture(scope="module")
def gateway(secrets: Secrets) -> Iterator[Gateway]:
    KeyStore(secrets).create("bob")
    files = {f"secrets/{path.name}": path.read_bytes() for path in (secrets.keys, secrets.issuers)}
    with Replicas(1) as replicas, Gateway(replicas, files=files) as gateway:
        until(lambda: httpx.get(f"{gateway.url}/ready").status_code == 200, "the replica ready")
        yield gateway


@pytest.fixture
def tokens(gateway: Gateway, secrets: Secrets) -> Iterator[None]:
    with token_service(gateway, secrets):
        yield


def sign_in(gateway: Gateway, name: str, password: str = PASSWORD, **more: Any) -> httpx.Response:
    form = {"grant_type": "password", "username": name, "password": password}
    return httpx.post(f"{gateway.url}/token", data=form, timeout=30, **more)


@pytest.mark.usefixtures("tokens")
def test_a_password_opens_what_the_role_may(gateway: Gateway) -> None:
    for name, status in (("alice", 403), ("root", 200)):
        answer = sign_in(gateway, name)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        headers = {"Authorization": f"Bearer {answer.json()['access_token']}"}
        assert httpx.get(f"{gateway.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{gateway.url}/status.json", headers=headers).status_code == status


@pytest.mark.usefixtures("tokens")
def test_errors_are_those_of_oauth2(gateway: Gateway) -> None:
    assert (wrong := sign_in(gateway, "alice", "x")).status_code == 400
    assert wrong.json()["error"] == "invalid_grant"
    assert httpx.post(f"{gateway.url}/token", json={"username": "alice"}).json()["error"] == "invalid_request"
    assert sign_in(gateway, "alice", "x" * 9000).status_code == 413
    assert httpx.get(f"{gateway.url}/token").status_code == 405
    assert httpx.post(f"{gateway.url}/token/", data={}).status_code in (404, 415)


@pytest.mark.usefixtures("tokens")
def test_who_guesses_is_slowed_whatever_address_is_claimed(gateway: Gateway) -> None:
    statuses = [
        sign_in(gateway, f"user{number}", "x", headers={"X-Forwarded-For": f"203.0.113.{number}"}).status_code
        for number in range(service.WRONG_BY_ADDRESS + 1)
    ]
    assert statuses == [400] * service.WRONG_BY_ADDRESS + [429]
    assert int(sign_in(gateway, "alice").headers["retry-after"]) >= 1


@pytest.mark.usefixtures("tokens")
def test_no_password_and_no_token_is_in_the_log(gateway: Gateway) -> None:
    given = sign_in(gateway, "alice").json()["access_token"]
    sign_in(gateway, "planted-name", "planted-password")
    httpx.post(f"{gateway.url}/token?password=planted-query", data={"username": "alice", "password": "x"})
    headers = {"Authorization": f"Bearer {given}", "X-Request-Id": "the-last-one"}
    httpx.get(f"{gateway.url}/v1/models", headers=headers)
    until(lambda: "the-last-one" in gateway.log(), "the last request in the log", 10)
    assert not any(secret in gateway.log() for secret in ("planted", PASSWORD, given, given.split(".")[1]))


def test_without_the_service_the_answer_says_what_starts_it(gateway: Gateway) -> None:
    answer = sign_in(gateway, "alice")
    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
    assert "COMPOSE_PROFILES=tokens" in answer.json()["error_description"]
    assert answer.headers["retry-after"] == "5"
