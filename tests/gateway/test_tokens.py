"""Whose tokens the gateway takes, and that no attack on a JWT opens it."""

import base64
import hmac
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT
from tests.gateway.conftest import chat
from tests.gateway.test_access import CHAT, bearer, entry, keys_file, new_key
from tests.gateway.test_public import error_of

# Tokens are made when the tests are collected, and used whenever their turn comes.
LASTS_S = 24 * 3600
SECRET = b"0123456789abcdef0123456789abcdef"
OLD_SECRET = b"an older secret, 32 bytes at the least"
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
OTHER_EC = ec.generate_private_key(ec.SECP256R1())


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def issuer(name: str, algorithms: list[str], *keys: dict[str, Any], **more: Any) -> dict[str, Any]:
    plain = {"issuer": name, "audience": "fleet", "algorithms": algorithms, "keys": list(keys), "jwks_uri": None}
    return {**plain, "name_claim": "sub", "role_claim": "role", **more}


def oct_(kid: str, secret: bytes, **more: Any) -> dict[str, Any]:
    return {"kty": "oct", "kid": kid, "alg": "HS256", "k": b64(secret), **more}


RSA_JWK = {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "kid": "rsa", "alg": "RS256"}
EC_JWK = {**ECAlgorithm.to_jwk(EC.public_key(), as_dict=True), "kid": "ec", "alg": "ES256"}
ED_JWK = {**OKPAlgorithm.to_jwk(ED.public_key(), as_dict=True), "kid": "ed", "alg": "EdDSA"}
ISSUERS = [
    issuer("hs", ["HS256"], oct_("new", SECRET), oct_("old", OLD_SECRET), oct_("gone", SECRET, until=1)),
    issuer("rs", ["RS256"], RSA_JWK),
    issuer("es", ["ES256"], EC_JWK),
]


def tokens_file(*issuers: dict[str, Any]) -> str:
    return json.dumps({"version": 1, "issuers": list(issuers)})


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    files = {"secrets/tokens.json": tokens_file(*ISSUERS).encode(), "secrets/keys.json": keys_file().encode()}
    with Replicas(1) as replicas, Gateway(replicas, files=files) as running:
        until(lambda: httpx.get(running.url + "/ready").status_code == 200, "ready")
        yield running


def claims(iss: str, **more: Any) -> dict[str, Any]:
    now = int(time.time())
    return {"iss": iss, "aud": "fleet", "sub": "carol", "role": "user", "iat": now, "exp": now + LASTS_S, **more}


def without(iss: str, name: str) -> dict[str, Any]:
    return {claim: value for claim, value in claims(iss).items() if claim != name}


def hs(payload: dict[str, Any], secret: bytes = SECRET, kid: str | None = "new", **head: Any) -> str:
    headers = {"kid": kid, **head} if kid else head
    return jwt.encode(payload, secret, "HS256", headers=headers)


def by_hand(head: dict[str, Any], payload: object, secret: bytes = SECRET) -> str:
    said = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(payload).encode())}"
    return f"{said}.{b64(hmac.digest(secret, said.encode(), 'sha256'))}"


def unsigned(alg: str) -> str:
    said = f"{b64(json.dumps({'alg': alg, 'typ': 'JWT'}).encode())}.{b64(json.dumps(claims('hs')).encode())}"
    return said + "."


def ask(gateway: Gateway, token: str) -> httpx.Response:
    return httpx.post(gateway.url + CHAT, json=chat("hi"), headers=bearer(token))


GOOD = {
    "HS256": hs(claims("hs")),
    "HS256, the key before": hs(claims("hs"), OLD_SECRET, "old"),
    "RS256": jwt.encode(claims("rs"), RSA, "RS256", headers={"kid": "rsa"}),
    "RS256, the only key": jwt.encode(claims("rs"), RSA, "RS256"),
    "ES256": jwt.encode(claims("es"), EC, "ES256", headers={"kid": "ec"}),
    "several audiences": hs(claims("hs", aud=["other", "fleet"])),
    "no role": hs(without("hs", "role")),
    "several roles": hs(claims("hs", role=["user", "other"])),
}


@pytest.mark.parametrize("token", GOOD.values(), ids=GOOD.keys())
def test_a_token_of_a_known_issuer_opens(gateway: Gateway, token: str) -> None:
    assert ask(gateway, token).status_code == 200


PEM = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
HEAD, BODY, SIGNATURE = GOOD["HS256"].split(".")
BAD = {
    "alg none": unsigned("none"),
    "alg None": unsigned("None"),
    "alg nOnE, signed": by_hand({"alg": "nOnE", "kid": "new"}, claims("hs")),
    "no alg": by_hand({"kid": "new"}, claims("hs")),
    "alg is a list": by_hand({"alg": ["HS256"], "kid": "new"}, claims("hs")),
    "a method of objects as alg": by_hand({"alg": "toString", "kid": "new"}, claims("hs")),
    "no signature": f"{HEAD}.{BODY}.",
    "HS256 with the RSA key as its secret": by_hand({"alg": "HS256", "kid": "rsa"}, claims("rs"), PEM),
    "HS256 with the modulus as secret": by_hand({"alg": "HS256", "kid": "rsa"}, claims("rs"), RSA_JWK["n"].encode()),
    "HS256 with the EC key as its secret": by_hand({"alg": "HS256", "kid": "ec"}, claims("es"), EC_JWK["x"].encode()),
    "another's ES256": jwt.encode(claims("es"), OTHER_EC, "ES256", headers={"kid": "ec"}),
    "its own key in the header": jwt.encode(
        claims("es"), OTHER_EC, "ES256", headers={"jwk": ECAlgorithm.to_jwk(OTHER_EC.public_key(), as_dict=True)}
    ),
    "a key at an address in the header": hs(claims("hs"), b"x" * 32, jku="http://127.0.0.1/jwks"),
    "another issuer's key": jwt.encode(claims("hs"), RSA, "RS256", headers={"kid": "rsa"}),
    "tampered payload": f"{HEAD}.{b64(json.dumps(claims('hs', role='admin')).encode())}.{SIGNATURE}",
    "tampered header": f"{b64(json.dumps({'alg': 'HS256', 'kid': 'old'}).encode())}.{BODY}.{SIGNATURE}",
    "tampered signature": f"{HEAD}.{BODY}.{SIGNATURE[:-2]}{'AA' if SIGNATURE[-2:] != 'AA' else 'BB'}",
    "empty ES256 signature": ".".join(GOOD["ES256"].split(".")[:2]) + "." + b64(bytes(64)),
    "wrong secret": hs(claims("hs"), b"x" * 32),
    "a key that has ended": hs(claims("hs"), SECRET, "gone"),
    "unknown kid": hs(claims("hs"), SECRET, "other"),
    "no kid with two keys": hs(claims("hs"), SECRET, None),
    "kid is a path": by_hand({"alg": "HS256", "kid": "../../../dev/null"}, claims("hs"), b""),
    "wrong audience": hs(claims("hs", aud="other")),
    "no audience": hs(without("hs", "aud")),
    "unknown issuer": hs(claims("evil")),
    "no issuer": hs(without("hs", "iss")),
    "not yet": hs(claims("hs", nbf=int(time.time()) + LASTS_S - 1)),
    "no end": hs(without("hs", "exp")),
    "end is a text": by_hand({"alg": "HS256", "kid": "new"}, claims("hs", exp="9999999999")),
    "unknown role": hs(claims("hs", role="root")),
    "role of an object": hs(claims("hs", role={"admin": True})),
    "no name": hs(without("hs", "sub")),
    "empty name": hs(claims("hs", sub="")),
    "a name with a line break": hs(claims("hs", sub="a\nb")),
    "a crit that nobody knows": by_hand({"alg": "HS256", "kid": "new", "crit": ["x"], "x": 1}, claims("hs")),
    "claims are a list": by_hand({"alg": "HS256", "kid": "new"}, [1]),
    "claims are null": by_hand({"alg": "HS256", "kid": "new"}, None),
    "four parts": GOOD["HS256"] + ".x",
    "huge": hs(claims("hs", more="x" * 9000)),
}  # fmt: skip


@pytest.mark.parametrize("token", BAD.values(), ids=BAD.keys())
def test_no_other_token_does(gateway: Gateway, token: str) -> None:
    answer = ask(gateway, token)
    assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    assert token not in gateway.log()


def test_a_token_ends_and_is_not_taken_after(gateway: Gateway) -> None:
    token = hs(claims("hs", exp=int(time.time()) + 2))
    assert ask(gateway, token).status_code == 200
    until(lambda: ask(gateway, token).status_code == 401, "the token has ended", 4)
    assert error_of(ask(gateway, token))["code"] == "expired_api_key"


def own_and_others(*issuers: str) -> str:
    return tokens_file(*(issuer(name, ["HS256"], oct_("new", SECRET)) for name in issuers))


def test_a_token_spends_and_is_called_nothing_that_is_a_keys_or_anothers() -> None:
    """A key, a user here and users of two providers on one host have one name."""
    key = new_key()
    realms = ["https://id.example:8443/realms/a", "https://id.example:8443/realms/b"]
    keys = keys_file(
        entry("carol", key, end_users=True),
        roles={"user": {"limits": {"requests_per_minute": 2, "parallel_requests": 9}}},
        end_users={"limits": {"requests_per_minute": 2}},
    )
    files = {"secrets/tokens.json": own_and_others("vllm-fleet", *realms), "secrets/keys.json": keys}
    holders = {
        "carol": key,
        "user:carol": hs(claims("vllm-fleet")),
        "id.example%3A8443:realms:a#carol": hs(claims(realms[0])),
        "id.example%3A8443:realms:b#carol": hs(claims(realms[1])),
        "user:carol%2Fann": hs(claims("vllm-fleet", sub="carol/ann")),
        "user:%22%7C%23%3A%25": hs(claims("vllm-fleet", sub='"|#:%')),
        "user:carol@example.com": hs(claims("vllm-fleet", sub="carol@example.com")),
    }
    with (
        Replicas(1) as replicas,
        Gateway(replicas, files={name: text.encode() for name, text in files.items()}) as gateway,
    ):
        until(lambda: httpx.get(gateway.url + "/ready").status_code == 200, "ready")
        until(lambda: time.time() % 60 < 45, "a minute begins", 20)

        def asked(token: str, **headers: str) -> int:
            return httpx.post(gateway.url + CHAT, json=chat("hi"), headers={**bearer(token), **headers}).status_code

        assert [asked(key, **{"X-End-User": "ann"}) for _ in range(3)] == [200, 200, 429]
        for name, token in holders.items():
            if token != key:
                assert [asked(token) for _ in range(3)] == [200, 200, 429], name
            assert httpx.get(gateway.url + "/v1/usage", headers=bearer(token)).json()["key"] == name
        answer = httpx.post(gateway.url + CHAT, json=chat("hi"), headers=bearer(holders["user:carol"]))
        assert "The user user:carol may" in answer.text
        until(lambda: gateway.log().count('"key":"user:carol"') >= 4, "the log names the user")
        # however long, and alike at their beginning
        long = [f"{'/' * 127}{end}" for end in "ab"]
        names = {
            httpx.get(gateway.url + "/v1/usage", headers=bearer(hs(claims(realms[0], sub=sub)))).json()["key"]
            for sub in long
        }
        assert len(names) == 2
        assert max(map(len, names)) == 125


def test_a_tokens_role_counts(gateway: Gateway) -> None:
    for role, status in (("user", 403), ("admin", 200)):
        assert httpx.get(gateway.url + "/replicas", headers=bearer(hs(claims("hs", role=role)))).status_code == status


WRONG = [
    "{", "[]", '{"version": 2, "issuers": []}', tokens_file(issuer("a", ["none"], oct_("k", SECRET))),
    tokens_file(issuer("a", [], oct_("k", SECRET))), tokens_file(issuer("a", ["HS256"])),
    tokens_file(issuer("a", ["HS256"], oct_("k", b"short"))), tokens_file(issuer("a", ["HS256"], more=1)),
    tokens_file(issuer("a", ["RS256"], RSA_JWK, jwks_uri="http://keys.example.com/")),
    tokens_file(issuer("a", ["HS256"], oct_("k", SECRET), jwks_uri="https://keys.example.com/")),
    tokens_file(issuer("a", ["RS256"], RSA_JWK), issuer("a", ["RS256"], RSA_JWK)),
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_changes_nothing(gateway: Gateway, text: str) -> None:
    before = gateway.log().count("secrets/tokens.json is not taken")
    gateway.write_secret("tokens.json", text)
    until(lambda: gateway.log().count("secrets/tokens.json is not taken") > before, "a complaint", 4)
    assert ask(gateway, GOOD["HS256"]).status_code == 200


class Provider:
    """An outside issuer's address: what it answers, or whether it keeps its callers waiting."""

    def __init__(self) -> None:
        self.status, self.body, self.waits = 200, b"", False
        self.let_go = threading.Event()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if provider.waits:
                    provider.let_go.wait(30)
                    return
                # Of what is too much the gateway does not read the end.
                with suppress(ConnectionError):
                    self.send_response(provider.status)
                    self.send_header("Content-Length", str(len(provider.body)))
                    self.end_headers()
                    self.wfile.write(provider.body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve(self, *keys: dict[str, Any]) -> None:
        self.status, self.body = 200, json.dumps({"keys": keys}).encode()

    def end(self) -> None:
        """Nobody listens there any more."""
        self.let_go.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    one = Provider()
    yield one
    one.end()


def sooner(later_ms: int) -> dict[str, bytes]:
    """A gateway's `files` with which it asks issuers' addresses after so many ms, not after five minutes."""
    files = {}
    for name, swaps in (
        ("njs/keys.js", {"LATER = 300000;": f"LATER = {later_ms};", "SOON = 15000;": "SOON = 500;"}),
        ("nginx.conf", {"fetchKeys interval=5s;\n            js_fetch_timeout 4s;":
                        "fetchKeys interval=600ms;\n            js_fetch_timeout 400ms;"}),
    ):  # fmt: skip
        text = (ROOT / "nginx" / name).read_text()
        for old, new in swaps.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        files[name] = text.encode()
    return files


@contextmanager
def trusting(provider: Provider, later_ms: int) -> Iterator[Gateway]:
    """A gateway that asks this provider for its keys."""
    issuers = tokens_file(issuer("out", ["ES256", "RS256"], jwks_uri=provider.url))
    files = {"secrets/tokens.json": issuers.encode(), "secrets/keys.json": keys_file().encode(), **sooner(later_ms)}
    with Replicas(1) as replicas, Gateway(replicas, files=files) as gateway:
        until(lambda: httpx.get(gateway.url + "/ready").status_code == 200, "ready")
        yield gateway


def by_ec() -> str:
    return jwt.encode(claims("out"), EC, "ES256", headers={"kid": "ec"})


def by_rsa() -> str:
    return jwt.encode(claims("out"), RSA, "RS256", headers={"kid": "rsa"})


def statuses(gateway: Gateway, token: str) -> set[int]:
    """What all workers say to it: each connection meets one of them."""
    return {ask(gateway, token).status_code for _ in range(8)}


def test_keys_come_from_an_issuers_address(provider: Provider) -> None:
    """A later one comes when a token brings it, without the five minutes' wait, and the one that it replaced goes with
    it. Keys of other kinds are passed over."""
    provider.serve(EC_JWK, {"kty": "oct", "kid": "x", "k": b64(SECRET)}, {"kty": "new"})
    with trusting(provider, 300_000) as gateway:
        until(lambda: ask(gateway, by_ec()).status_code == 200, "the key has come", 15)
        assert ask(gateway, by_rsa()).status_code == 401
        assert ask(gateway, by_hand({"alg": "HS256", "kid": "x"}, claims("out"))).status_code == 401
        provider.serve(RSA_JWK)
        until(lambda: ask(gateway, by_rsa()).status_code == 200, "the new key has come", 10)
        assert statuses(gateway, by_ec()) == {401}
        assert error_of(ask(gateway, by_ec()))["code"] == "invalid_api_key"


def test_a_key_that_an_issuer_takes_away_is_refused_though_no_token_brings_another(provider: Provider) -> None:
    provider.serve(EC_JWK, RSA_JWK)
    with trusting(provider, 1000) as gateway:
        until(lambda: ask(gateway, by_ec()).status_code == 200, "the keys have come", 15)
        provider.serve(RSA_JWK)
        until(lambda: ask(gateway, by_ec()).status_code == 401, "the key is gone", 10)
        assert statuses(gateway, by_ec()) == {401}
        assert statuses(gateway, by_rsa()) == {200}


RUBBISH = {
    "an error": (500, b"{}"),
    "no JSON": (200, b"<html>planted"),
    "nothing": (200, b""),
    "null": (200, b"null"),
    "no keys": (200, b'{"planted": 1}'),
    "keys that are none": (200, b'{"keys": "planted"}'),
    "an empty set": (200, b'{"keys": []}'),
    "only keys of other kinds": (200, b'{"keys": [{"kty": "planted"}, null, 7]}'),
    "a weak key": (200, json.dumps({"keys": [{**RSA_JWK, "n": "AQAB"}]}).encode()),
    "too much": (200, json.dumps({"keys": [EC_JWK], "more": "planted" * 10_000}).encode()),
    "another address": (302, json.dumps({"keys": [EC_JWK]}).encode()),
}


def stays(gateway: Gateway, provider: Provider, what: str) -> None:
    """The last good key stays in force, no other comes, and both the log and the metric say that something is wrong."""

    def told() -> tuple[int, int]:
        metrics = httpx.get(gateway.metrics_url + "/metrics").text
        (counted,) = re.findall(r'gateway_secrets_refused_total\{file="jwks"\} (\d+)', metrics)
        return gateway.log().count(f"the keys at {provider.url} are not taken"), int(counted)

    before = told()
    # The first complaint may be about what stood there before.
    until(lambda: all(now >= then + 2 for then, now in zip(before, told(), strict=True)), what, 30)
    assert statuses(gateway, by_rsa()) == {200}, what
    assert statuses(gateway, by_ec()) == {401}, what


def test_an_issuer_that_answers_rubbish_keeps_its_last_good_keys_and_that_is_told(provider: Provider) -> None:
    """The keys count again as soon as it gives some."""
    provider.serve(RSA_JWK)
    with trusting(provider, 300) as gateway:
        until(lambda: ask(gateway, by_rsa()).status_code == 200, "the key has come", 15)
        for what, (status, body) in RUBBISH.items():
            provider.status, provider.body = status, body
            stays(gateway, provider, what)
        assert "planted" not in gateway.log()
        provider.serve(EC_JWK, RSA_JWK)
        until(lambda: ask(gateway, by_ec()).status_code == 200, "what it gives counts again", 10)


def test_an_issuer_that_is_down_keeps_its_last_good_keys_and_that_is_told(provider: Provider) -> None:
    provider.serve(RSA_JWK)
    with trusting(provider, 300) as gateway:
        until(lambda: ask(gateway, by_rsa()).status_code == 200, "the key has come", 15)
        provider.waits = True
        stays(gateway, provider, "it keeps the gateway waiting")
        provider.end()
        stays(gateway, provider, "nobody listens")
