"""What `make key` and `make user` write is what the gateway takes: the store and njs agree on every field."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from access.keys import KeyStore, Limits
from access.store import MAX_NUMBER, Secrets
from access.tokens import Algorithm, Issuer, SigningKey, TokenStore, issue, new_jwk
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until

PASSABLE = dict.fromkeys(Limits.model_fields, MAX_NUMBER)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Replicas(1) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path / "secrets")


def publish(gateway: Gateway, secrets: Secrets) -> None:
    """Lays the store's files where the gateway reads them."""
    for path in (secrets.keys, secrets.issuers):
        if path.exists():
            gateway.write_secret(path.name, path.read_text())


def settled(gateway: Gateway, wanted: dict[str, int]) -> None:
    """Returns when each key or token is answered with its status, by whichever worker."""

    def statuses() -> dict[str, int]:
        return {
            key: httpx.get(f"{gateway.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code
            for key in wanted
        }

    until(lambda: all(statuses() == wanted for _ in range(4)), f"{list(wanted.values())} in force", 10)


def test_every_field_of_a_key_is_taken(gateway: Gateway, secrets: Secrets) -> None:
    store = KeyStore(secrets)
    full = store.create(
        "alice-1.x_y", role="admin", models=["sim", "other/model:1"], limits=PASSABLE, priority=-1000, end_users=True,
        expires=int(time.time()) + 3600, note="a note — with “signs”",
    )  # fmt: skip
    bare = store.create("bob")
    for of in ("user", "admin", "end_users"):
        store.set_limits(of, PASSABLE)
    publish(gateway, secrets)
    settled(gateway, {full: 200, bare: 200, "sk-fleet-" + "x" * 43: 401})
    new = store.rotate("bob", 3600)
    publish(gateway, secrets)
    settled(gateway, {bare: 200, new: 200})
    newest = store.rotate("bob", 0)
    store.revoke("alice-1.x_y")
    publish(gateway, secrets)
    settled(gateway, {full: 401, bare: 401, new: 401, newest: 200})


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256", "EdDSA"])
def test_a_token_of_the_service_is_taken_while_its_key_is_in_force(
    gateway: Gateway, secrets: Secrets, algorithm: Algorithm
) -> None:
    store = TokenStore(secrets)
    store.rotate(algorithm)
    first = issue(store.signing(), "alice", "user", time.time())
    publish(gateway, secrets)
    settled(gateway, {first: 200, first[:-8] + "A" * 8: 401})
    store.rotate("ES256")
    late = issue(store.signing(), "alice", "admin", time.time() - 3600)
    early = issue(store.signing(), "alice", "admin", time.time() + 60)
    publish(gateway, secrets)
    settled(gateway, {first: 200, late: 401, early: 401})
    store.rotate("ES256", 0)
    publish(gateway, secrets)
    # nobody writes the file when the old key's time is over
    settled(gateway, {first: 401})


def test_a_leaked_key_of_the_store_signs_nothing_once_it_has_ended(gateway: Gateway, secrets: Secrets) -> None:
    store = TokenStore(secrets)
    store.take(None, 30)
    leaked = store.signing()
    publish(gateway, secrets)
    settled(gateway, {issue(leaked, "alice", "admin", time.time()): 200})
    store.rotate("ES256", 0)
    publish(gateway, secrets)
    until(lambda: not store.signing().keys[1].in_force(time.time()), "the old key's end", 10)
    settled(gateway, {issue(leaked, "alice", "admin", time.time()): 401})


def test_a_providers_tokens_are_taken_beside_our_own(gateway: Gateway, secrets: Secrets) -> None:
    store = TokenStore(secrets)
    store.take(None, 30)
    theirs = SigningKey(jwk=new_jwk("ES256"), created=0)
    fields = {"issuer": "https://id.example", "audience": "fleet", "algorithms": ["ES256"]}
    store.trust(Issuer.model_validate(fields | {"keys": [theirs.public()], "name_claim": "email"}))
    publish(gateway, secrets)
    settled(gateway, {issue(store.signing(), "alice", "user", time.time()): 200})
    store.distrust("vllm-fleet")
    publish(gateway, secrets)
    settled(gateway, {issue(store.signing(), "alice", "user", time.time()): 401})
