"""Tokens: what signs them, what is taken, and every way to forge one."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from access import tokens
from access.store import Mistake, Secrets, made
from access.tokens import (
    Algorithm,
    Issuer,
    Jwk,
    Refused,
    Signing,
    SigningKey,
    TokenStore,
    issue,
    new_jwk,
    strong,
    verify,
)

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
GOOD = base64.b64encode(bytes(range(7, 255, 8)) + b"x").decode()
MADE: dict[Algorithm, Jwk] = {algorithm: new_jwk(algorithm) for algorithm in ALGORITHMS}


def signing(*algorithms: Algorithm, minutes: int = 30) -> Signing:
    created = int(time.time()) - 3600
    return Signing(minutes=minutes, keys=[SigningKey(jwk=MADE[one], created=created) for one in algorithms])


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path / "secrets")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_says_who_it_is_for_by_each_algorithm(algorithm: Algorithm) -> None:
    token = issue(signing(algorithm), "alice", "admin", time.time())
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    claims = verify(signing(algorithm), token)
    assert (claims.name, claims.role) == ("alice", "admin")


def forge(change: Callable[[dict[str, Any]], object], algorithm: Algorithm = "HS256", **header: str) -> str:
    """A token with changed claims, rightly signed."""
    now = int(time.time())
    claims: dict[str, Any] = {"iss": "vllm-fleet", "aud": "vllm-fleet", "sub": "alice", "role": "user", "jti": "1"}
    claims |= {"iat": now, "nbf": now, "exp": now + 60}
    change(claims)
    key = jwt.PyJWK(MADE[algorithm], algorithm=algorithm).key
    return jwt.encode(claims, key, algorithm, headers={"kid": MADE[algorithm]["kid"], **header})


def encode(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def public_pem(algorithm: Algorithm) -> bytes:
    """The public half of a key, as an attacker has it."""
    key = jwt.PyJWK(MADE[algorithm], algorithm=algorithm).key.public_key()
    pem: bytes = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


def by_hand(header: dict[str, str], secret: bytes) -> str:
    """HMAC over any bytes: the library refuses to sign with a public key."""
    now = int(time.time())
    claims = {"iss": "vllm-fleet", "aud": "vllm-fleet", "sub": "alice", "role": "admin", "jti": "1"}
    text = f"{encode(header)}.{encode(claims | {'iat': now, 'nbf': now, 'exp': now + 60})}"
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(text.encode(), secret)
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


KID = {algorithm: MADE[algorithm]["kid"] for algorithm in ALGORITHMS}


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(lambda: forge(lambda claims: claims.update(exp=int(time.time()) - 1)), id="expired"),
        pytest.param(lambda: forge(lambda claims: claims.update(nbf=int(time.time()) + 60)), id="not yet"),
        pytest.param(lambda: forge(lambda claims: claims.update(aud="other")), id="another audience"),
        pytest.param(lambda: forge(lambda claims: claims.update(iss="other")), id="another issuer"),
        pytest.param(lambda: forge(lambda claims: claims.update(role="root")), id="no role of ours"),
        *(
            pytest.param(lambda name=name: forge(lambda claims: claims.pop(name)), id=f"without {name}")
            for name in ("exp", "nbf", "iat", "aud", "iss", "sub", "role")
        ),
        pytest.param(lambda: forge(lambda _: None, kid="other"), id="another key's name"),
        pytest.param(lambda: forge(lambda _: None, kid=KID["RS256"]), id="another kind of key's name"),
        pytest.param(
            lambda: f"{encode({'alg': 'none', 'kid': KID['HS256']})}.{forge(lambda _: None).split('.')[1]}.", id="none"
        ),
        pytest.param(
            lambda: f"{encode({'alg': 'nOnE', 'kid': KID['RS256']})}.{forge(lambda _: None).split('.')[1]}.", id="nOnE"
        ),
        pytest.param(
            lambda: by_hand({"alg": "HS256", "kid": KID["RS256"]}, public_pem("RS256")), id="signed with a public key"
        ),
        pytest.param(
            lambda: by_hand({"alg": "HS256", "kid": KID["EdDSA"]}, base64.urlsafe_b64decode(MADE["EdDSA"]["x"] + "=")),
            id="signed with a public key's bytes",
        ),
        pytest.param(lambda: by_hand({"alg": "HS256", "kid": KID["HS256"]}, b""), id="signed with nothing"),
        pytest.param(lambda: by_hand({"alg": "HS512", "kid": KID["HS256"]}, b"x" * 64), id="another length"),
        pytest.param(lambda: forge(lambda _: None)[:-2] + "xx", id="another signature"),
        pytest.param(lambda: "", id="nothing"),
        pytest.param(lambda: "a.b.c", id="no token"),
        pytest.param(lambda: "." * 10_000, id="dots"),
    ],
)
def test_a_forged_token_is_refused(token: Callable[[], str]) -> None:
    keys = signing(*ALGORITHMS)
    assert verify(keys, forge(lambda _: None)).name == "alice"
    with pytest.raises(Refused):
        verify(keys, token())


def test_a_token_that_expired_is_told_from_one_that_never_was_good() -> None:
    token = issue(signing("ES256"), "alice", "user", time.time() - 3600)
    with pytest.raises(Refused) as refused:
        verify(signing("ES256"), token)
    assert refused.value.expired


@given(st.integers(0, 400), st.integers(0, 7))
def test_no_bit_of_a_token_can_be_changed(at: int, bit: int) -> None:
    token = issue(signing("EdDSA"), "alice", "user", time.time())
    raw = bytearray(token.encode())
    raw[at % len(raw)] ^= 1 << bit
    changed = raw.decode("latin-1")
    try:
        verify(signing("EdDSA"), changed)
    except Refused:
        return
    # base64's last character has bits that mean nothing
    decode = [base64.urlsafe_b64decode(part + "==") for part in token.split(".")]
    assert [base64.urlsafe_b64decode(part + "==") for part in changed.split(".")] == decode


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("secret", "has 6 bytes, less than 32"),
        ("a" * 64, "less than 128 bits"),
        ("abcdefghijklmnopqrstuvwxyz0123456789", "less than 128 bits"),
        ("passwordpasswordpasswordpassword", "examples that everybody knows"),
        ("09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7", "examples that everybody knows"),
        ("your-256-bit-secret-your-256-bit-secret", "examples that everybody knows"),
        ("qwertzuiqwertzuiqwertzuiqwertzui", "less than 128 bits"),
        ("01010101010101010101010101010101010101010101", "less than 128 bits"),
    ],
)
def test_a_weak_signing_key_is_refused_without_being_shown(key: str, says: str) -> None:
    with pytest.raises(Mistake, match=f"JWT_KEY .*{says}.*openssl rand") as refused:
        strong(key)
    assert key not in str(refused.value)


@given(st.binary(min_size=32, max_size=32))
def test_what_openssl_rand_prints_is_strong(drawn: bytes) -> None:
    # hypothesis likes bytes that are alike, which chance does not
    if len(set(drawn)) >= 24:
        assert strong(base64.b64encode(drawn).decode())


def test_the_gateways_file_has_no_private_half(secrets: Secrets) -> None:
    store = TokenStore(secrets)
    for algorithm in ("RS256", "ES256", "EdDSA"):
        store.rotate(algorithm)
    (own,) = json.loads(secrets.issuers.read_text())["issuers"]
    assert own["algorithms"] == ["ES256", "EdDSA", "RS256"]
    assert (own["issuer"], own["audience"], own["jwks_uri"]) == ("vllm-fleet", "vllm-fleet", None)
    assert (own["name_claim"], own["role_claim"]) == ("sub", "role")
    private = {"d", "p", "q", "dp", "dq", "qi", "k"}
    assert not any(private & key.keys() for key in own["keys"])
    kept = json.loads(secrets.signing.read_text())["keys"]
    assert all("d" in key["jwk"] for key in kept)
    # what the gateway has checks what the service signs
    token = issue(store.signing(), "alice", "user", time.time() + 10)
    named = jwt.get_unverified_header(token)["kid"]
    key = next(jwt.PyJWK(key) for key in own["keys"] if key["kid"] == named)
    assert jwt.decode(token, key, ["EdDSA"], audience="vllm-fleet", options={"verify_nbf": False, "verify_iat": False})


def test_two_keys_are_in_force_through_a_rotation_and_the_old_one_ends_by_itself(secrets: Secrets) -> None:
    now = float(int(time.time()))
    store = TokenStore(secrets, lambda: now)
    store.take(None, 30)
    old = store.signing()
    token = issue(old, "alice", "user", now)
    store.rotate("ES256")
    both = store.signing()
    assert [key.in_force(now + 30 * 60 + 2) for key in both.keys] == [True, True]
    assert [key.in_force(now + 30 * 60 + 3) for key in both.keys] == [True, False]
    assert verify(both, token).name == "alice"
    published = json.loads(secrets.issuers.read_text())["issuers"][0]["keys"]
    assert [key.get("until") for key in published] == [None, now + 30 * 60 + 3]
    # a leaked key ends at once
    store.rotate("ES256", 0)
    now += 4
    assert [key.in_force(now) for key in store.signing().keys] == [True, False, False]


@pytest.mark.parametrize("broken", ["audit.jsonl", "gateway/.tokens.json.new", "tokens/.signing.json.new"])
def test_what_signs_and_what_checks_change_together_or_not_at_all(secrets: Secrets, broken: str) -> None:
    store = TokenStore(secrets)
    store.take(None, 30)
    files = {path: path.read_bytes() for path in (secrets.issuers, secrets.signing)}
    place = secrets.folder / broken
    place.unlink(missing_ok=True)
    place.mkdir()
    changes: list[Callable[[], None]] = [
        lambda: store.rotate("ES256"),
        lambda: store.take(GOOD, 30),
        lambda: store.take(None, 60),
    ]
    for change in changes:
        with pytest.raises(OSError, match=re.escape(place.name)):
            change()
        assert {path: path.read_bytes() for path in files} == files


def test_two_files_that_came_apart_are_mended_by_the_next_take(secrets: Secrets) -> None:
    store = TokenStore(secrets)
    store.take(None, 30)
    before = secrets.signing.read_bytes()
    store.rotate("ES256")
    # as if the machine had stopped between the two
    secrets.signing.write_bytes(before)
    store.take(None, 30)
    assert secrets.signing.read_bytes() == before
    (own,) = store.issuers().issuers
    assert [one["kid"] for one in own.keys] == [one.jwk["kid"] for one in store.signing().keys]
    files = [secrets.issuers.read_bytes(), secrets.audit.read_bytes()]
    store.take(None, 30)
    assert files == [secrets.issuers.read_bytes(), secrets.audit.read_bytes()]


def test_nothing_is_signed_with_a_key_that_the_gateway_cannot_know_yet(secrets: Secrets) -> None:
    now = time.time()
    store = TokenStore(secrets, lambda: now)
    store.take(None, 30)
    first = store.signing().keys[0].jwk["kid"]
    assert jwt.get_unverified_header(issue(store.signing(), "a", "user", now))["kid"] == first
    store.rotate("EdDSA")
    second = store.signing().keys[0].jwk["kid"]
    signed_by = [
        jwt.get_unverified_header(issue(store.signing(), "a", "user", now + wait))["kid"] for wait in (0, 2, 4)
    ]
    assert signed_by == [first, first, second]


def test_another_jwt_key_is_a_rotation_and_the_same_changes_nothing(secrets: Secrets) -> None:
    store = TokenStore(secrets)
    store.take(GOOD, 30)
    assert [key.algorithm for key in store.signing().keys] == ["HS256"]
    # the text itself is the key, so other libraries that know it check the same tokens
    token = issue(store.signing(), "alice", "user", time.time())
    assert jwt.decode(token, GOOD, ["HS256"], audience="vllm-fleet")["sub"] == "alice"
    before = secrets.signing.read_bytes(), secrets.issuers.read_bytes()
    store.take(GOOD, 30)
    assert (secrets.signing.read_bytes(), secrets.issuers.read_bytes()) == before
    store.take(GOOD[::-1], 30)
    assert verify(store.signing(), token).name == "alice"
    with pytest.raises(Mistake, match="JWT_KEY is what signs"):
        store.rotate("EdDSA")
    store.take(None, 15)
    assert [key.algorithm for key in store.signing().keys] == ["ES256", "HS256", "HS256"]
    assert store.signing().minutes == 15
    assert GOOD not in secrets.audit.read_text()


def test_a_weak_jwt_key_changes_nothing(secrets: Secrets) -> None:
    store = TokenStore(secrets)
    with pytest.raises(Mistake, match="JWT_KEY has 4 bytes"):
        store.take("weak", 30)
    assert not secrets.signing.exists()
    assert not secrets.issuers.exists()


def jwks(*keys: Jwk) -> list[Jwk]:
    return [SigningKey(jwk=key, created=0).public() for key in keys]


PROVIDER: dict[str, Any] = {"issuer": "https://id.example", "audience": "fleet", "algorithms": ["RS256"]}


def test_an_identity_providers_tokens_are_taken_beside_our_own(secrets: Secrets) -> None:
    store = TokenStore(secrets)
    store.trust(made(Issuer, PROVIDER | {"jwks_uri": "https://id.example/keys", "name_claim": "email"}))
    store.take(None, 30)
    store.trust(made(Issuer, PROVIDER | {"keys": jwks(MADE["RS256"])}))
    assert [one.issuer for one in store.issuers().issuers] == ["vllm-fleet", "https://id.example"]
    store.rotate("ES256")
    assert store.issuers().issuers[1].keys == jwks(MADE["RS256"])
    with pytest.raises(Mistake, match=r"takes no tokens of https://id: name one of these: vllm-fleet, https://id\.exa"):
        store.distrust("https://id")
    store.distrust("https://id.example")
    assert [one.issuer for one in store.issuers().issuers] == ["vllm-fleet"]


SMALL: Jwk = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key(), as_dict=True)  # noqa: S505


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "neither keys nor an address"),
        ({"jwks_uri": "http://id.example/keys"}, "jwks_uri: it has to be https"),
        ({"jwks_uri": "https://id.example"}, "jwks_uri: it has to be https"),
        ({"jwks_uri": "https://u:p@id.example/keys"}, "jwks_uri: it has to be https"),
        ({"jwks_uri": "https://id.example/k", "algorithms": ["HS256"]}, "HS256 has no public key"),
        ({"jwks_uri": "https://id.example/k", "algorithms": ["none"]}, r"algorithms\[0\]: Input should be 'HS256'"),
        ({"jwks_uri": "https://id.example/k", "algorithms": []}, "algorithms: List should have at least 1"),
        ({"keys": [MADE["RS256"]]}, r"keys\[0\]: d is of a private key"),
        ({"keys": jwks(MADE["ES256"])}, "a key for ES256, which is not among"),
        ({"keys": [{"kty": "RSA"}]}, "it is no key of kind RSA"),
        ({"keys": [{"kty": "oct"}], "algorithms": ["HS256"]}, "it is no key of kind oct"),
        ({"keys": [{"kty": ["RSA"]}]}, "kty is oct, RSA, EC, OKP"),
        ({"keys": [SMALL]}, "has 1024 bits, less than 2048"),
        ({"keys": [{**MADE["HS256"], "k": "YWJj"}], "algorithms": ["HS256"]}, "has 3 bytes, less than 32"),
        ({"keys": [{**jwks(MADE["RS256"])[0], "alg": "HS256"}]}, "a key of kind RSA is for RS256"),
        ({"keys": [{"kty": "x"}]}, "kty is oct, RSA, EC, OKP"),
        ({"keys": [{**jwks(MADE["RS256"])[0], "colour": "red"}]}, "unknown field colour"),
    ],
)
def test_an_issuer_that_cannot_be_checked_safely_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(Mistake, match=says):
        made(Issuer, PROVIDER | fields)


@pytest.mark.parametrize("address", ["https://id.example/keys", "http://keycloak:8080/keys", "http://127.0.0.1:1/k"])
def test_an_address_of_keys_may_be_a_container_beside(address: str) -> None:
    assert made(Issuer, PROVIDER | {"jwks_uri": address}).jwks_uri == address


def test_this_fleet_itself_cannot_be_trusted_as_another() -> None:
    with pytest.raises(Mistake, match="is this fleet itself"):
        TokenStore(Secrets(Path("/nowhere"))).trust(
            made(Issuer, PROVIDER | {"issuer": tokens.ISSUER, "keys": jwks(MADE["RS256"])})
        )


def test_a_file_with_a_mistake_shows_no_key(secrets: Secrets) -> None:
    store = TokenStore(secrets)
    store.take(None, 30)
    secrets.signing.write_text(re.sub(r'"d": ?"', '"d": "planted', secrets.signing.read_text()))
    with pytest.raises(Mistake, match=r"signing\.json: keys\[0\]\.jwk: it is no key of kind EC") as refused:
        store.signing()
    assert "planted" not in str(refused.value)
