"""The attacks, a row each: what is sent, what should come back, and the function that does it and says what came."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from access.tokens import new_jwk
from lab.attacks.target import AUDIENCE, CHAT, GUESSED, ISSUER, Target, b64, bearer, forged, received, said

MIB = 1 << 20
Fire = Callable[[Target], str]


@dataclass(frozen=True)
class Row:
    """An attack. `fire` gives what was seen, None where this target cannot show it."""

    attack: str
    input: str
    expected: str
    fire: Callable[[Target], str | None]


def counted(answers: Sequence[str]) -> str:
    """Answers by how many there were of each, most first."""
    return ", ".join(f"{count:,} × {answer}" for answer, count in sorted(Counter(answers).items(), key=by_count))


def by_count(one: tuple[str, int]) -> tuple[int, str]:
    """Most first."""
    return -one[1], one[0]


def at_once(count: int, fire: Callable[[int], str], threads: int = 40) -> str:
    """What was said to so many at once."""
    with ThreadPoolExecutor(min(count, threads)) as pool:
        return counted(list(pool.map(fire, range(count))))


# ---- keys


def with_headers(make: Callable[[Target], dict[str, str]]) -> Fire:
    """A chat with these headers."""
    return lambda t: t.chat(headers=make(t))


def with_key(name: str) -> Fire:
    """A chat with the key of this name."""
    return lambda t: t.chat(name)


def twice(name: str, one: str, other: str) -> Fire:
    """A header that comes twice."""
    shape = "Bearer {}" if name == "Authorization" else "{}"

    def fire(t: Target) -> str:
        lines = "\n".join(f"{name}: {shape.format(t.keys[key])}" for key in (one, other))
        return t.raw(f"GET /v1/models HTTP/1.1\nHost: localhost\nConnection: close\n{lines}")

    return fire


def bare(make: Callable[[Target], str]) -> Fire:
    """A request with this key that is spelt by hand."""
    head = "GET /v1/models HTTP/1.1\nHost: localhost\nConnection: close\nAuthorization: Bearer "
    return lambda t: t.raw(head + make(t))


def address(path: str) -> Fire:
    """An address with a key in it, which the header does not need."""

    def fire(t: Target) -> str:
        key = t.keys["user"]
        spelt = "".join(f"%{ord(letter):02x}" for letter in key)
        t.hidden.add(spelt)
        return said(t.ask("GET", path.replace("KEY", key).replace("SPELT", spelt), "user"))

    return fire


def guessing(t: Target) -> str:
    """A thousand keys at speed, and a user in between."""
    meanwhile = []

    def guess(number: int) -> str:
        if number % 100 == 50:
            meanwhile.append(said(t.ask("GET", "/v1/models", "user")))
        key = f"sk-fleet-{b64(hashlib.sha256(str((number, time.time())).encode()).digest())}"
        return said(t.ask("GET", "/v1/models", headers=bearer(key)))

    return f"{at_once(1000, guess, 16)}; the user {', '.join(sorted(set(meanwhile)))}"


KEYS = [
    Row("no key", "no header", "401 missing_api_key", lambda t: t.chat()),
    Row("an unknown key", "a key of the right form", "401 invalid_api_key", with_key("unknown")),
    Row("a cut key", "a key without its last letter", "401 invalid_api_key",
        with_headers(lambda t: bearer(t.keys["user"][:-1]))),
    Row("a long key", "a key with a letter more", "401 invalid_api_key",
        with_headers(lambda t: bearer(t.keys["user"] + "A"))),
    Row("a key in the other case", "capitals small, small ones capital", "401 invalid_api_key",
        with_headers(lambda t: bearer(t.keys["user"].swapcase()))),
    Row("a stolen keys.json", "the hash that stands there", "401 invalid_api_key",
        with_headers(lambda t: bearer(hashlib.sha256(t.keys["user"].encode()).hexdigest()))),
    Row("a holder's name", "`Bearer attack-user`", "401 invalid_api_key",
        with_headers(lambda _: bearer("attack-user"))),
    Row("a revoked key", "the key as it was", "401 invalid_api_key", with_key("revoked")),
    Row("an expired key", "the key as it was", "401 expired_api_key", with_key("expired")),
    Row("a rotated key, in its overlap", "the old key", "200", with_key("old, in overlap")),
    Row("a rotated key, after its overlap", "the old key", "401 expired_api_key", with_key("old, after overlap")),
    Row("a rotated key's successor", "the new key", "200", with_key("new, after overlap")),
    Row("another scheme", "`Authorization: Basic KEY`", "401 invalid_api_key",
        with_headers(lambda t: {"Authorization": f"Basic {t.keys['user']}"})),
    Row("a key in a cookie", "`Cookie: key=KEY`", "401 missing_api_key",
        with_headers(lambda t: {"Cookie": f"key={t.keys['user']}"})),
    Row("a key in another's header", "`Api-Key: KEY`", "401 missing_api_key",
        with_headers(lambda t: {"Api-Key": t.keys["user"]})),
    Row("two keys", "a user's in Authorization, an admin's in x-api-key", "401 invalid_api_key",
        with_headers(lambda t: {**bearer(t.keys["user"]), "x-api-key": t.keys["admin"]})),
    Row("a header twice", "Authorization with a user's and an admin's key", "400 invalid_request",
        twice("Authorization", "user", "admin")),
    Row("a header twice", "Authorization twice, the same key", "400 invalid_request",
        twice("Authorization", "user", "user")),
    Row("a header twice", "x-api-key with a user's and an admin's key", "401 invalid_api_key",
        twice("X-Api-Key", "user", "admin")),
    Row("a key in the query", "`/v1/models?api_key=KEY`", "400 key_in_url", address("/v1/models?api_key=KEY")),
    Row("a key in the query, hidden", "each letter as %xx", "400 key_in_url", address("/v1/models?x=SPELT")),
    Row("a key in the path", "`/v1/models/KEY`", "400 key_in_url", address("/v1/models/KEY")),
    Row("a key in an open path's query", "`/health?key=KEY`", "400 key_in_url", address("/health?key=KEY")),
    Row("a key in the page before", "`Referer: https://a.example/?k=KEY`", "400 key_in_url",
        lambda t: t.chat("user", headers={"Referer": f"https://a.example/?k={t.keys['user']}"})),
    Row("a key that is too long", "60 KB in Authorization", "431 headers_too_large", bare(lambda _: "x" * 60_000)),
    Row("a zero byte", "`Bearer KEY\\0`", "400 invalid_request", bare(lambda t: t.keys["user"] + "\0")),
    Row("guessing keys at speed", "1,000 random keys, 16 at a time; a user in between",
        "1,000 × 401 invalid_api_key; the user 200", guessing),
]  # fmt: skip

# ---- tokens


def with_token(**claims: Any) -> Fire:
    """A chat with a token of the known issuer."""
    return lambda t: t.present(t.token(**claims))


def claims(**more: Any) -> dict[str, Any]:
    """Claims that would do."""
    return {"iss": ISSUER, "aud": AUDIENCE, "sub": "mallory", "role": "admin", "exp": int(time.time()) + 600, **more}


def unsigned(alg: str) -> Fire:
    """A token without a signature."""
    return lambda t: t.present(forged({"alg": alg, "typ": "JWT"}, claims(), lambda _: b""))


def by_hmac(secret: Callable[[Target], bytes], **head: Any) -> Fire:
    """A token that is signed by HS256 with what everybody knows."""

    def fire(t: Target) -> str:
        kid = t.jwks["RS256"]["kid"]
        sign = lambda text: hmac.digest(secret(t), text, "sha256")  # noqa: E731
        return t.present(forged({"alg": "HS256", "kid": kid, **head}, claims(), sign))

    return fire


def pem(t: Target) -> bytes:
    """The RSA key that everybody may know, as a file has it."""
    public = {name: t.jwks["RS256"][name] for name in ("kty", "n", "e")}
    key: Any = jwt.PyJWK(public, algorithm="RS256").key
    written: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return written


def tampered(part: int) -> Fire:
    """A good token with one part changed."""

    def fire(t: Target) -> str:
        parts = t.token().split(".")
        new = [json.dumps({"alg": "ES256", "kid": "other"}), json.dumps(claims())]
        parts[part] = b64(new[part].encode()) if part < len(new) else b64(bytes(64))
        return t.present(".".join(parts))

    return fire


def own_key(header: str) -> Fire:
    """A token with its own key, which the header names."""

    def fire(t: Target) -> str:
        mine = new_jwk("ES256")
        value: Any = mine if header == "jwk" else "https://evil.example/jwks"
        key = jwt.PyJWK(mine, algorithm="ES256").key
        return t.present(jwt.encode(claims(), key, "ES256", headers={"kid": t.jwks["ES256"]["kid"], header: value}))

    return fire


def with_ended_key(t: Target) -> str:
    """A token by a key that a rotation has ended."""
    key = t.jwks["ended"]
    return t.present(jwt.encode(claims(), jwt.PyJWK(key, algorithm="ES256").key, "ES256", headers={"kid": key["kid"]}))


def replayed(t: Target) -> str:
    """The same token before its end and after it."""
    token = t.token(exp=int(time.time()) + 3)
    before = t.present(token)
    time.sleep(4)  # its time
    return f"{before}, then {t.present(token)}"


def forging(t: Target) -> str:
    """Many tokens at speed whose signature has to be computed."""
    head, body, _ = t.token().split(".")
    return at_once(500, lambda n: t.present(f"{head}.{body}.{b64(hashlib.sha512(str(n).encode()).digest())}"), 16)


def passwords(names: Sequence[str], spread: bool = False) -> Callable[[Target], str | None]:
    """Wrong passwords for these names in turn, from forged addresses if `spread`."""

    def fire(t: Target) -> str | None:
        if not t.passwords:
            return None
        answers = []
        for number, name in enumerate(names):
            forged_address = {"X-Forwarded-For": f"203.0.113.{number}"} if spread else {}
            answers.append(said(t.sign_in(f"wrong password, number {number}", name, **forged_address)))
        return counted(answers)

    return fire


def signed_in(t: Target) -> str | None:
    """A token for the right password, and the same with its payload changed."""
    if not t.passwords:
        return None
    token = t.sign_in(t.password).json()["access_token"]
    head, _, signature = token.split(".")
    changed = ".".join([head, b64(json.dumps(claims(iss="vllm-fleet", aud="vllm-fleet")).encode()), signature])
    return f"{t.present(token)}, then {t.present(changed)}"


TOKENS = [
    Row("a token of a known issuer", "ES256", "200", with_token()),
    Row("no signature", "`alg: none`", "401 invalid_api_key", unsigned("none")),
    Row("no signature", "`alg: nOnE`", "401 invalid_api_key", unsigned("nOnE")),
    Row("no signature", "`alg: ES256` and nothing after the second point", "401 invalid_api_key", unsigned("ES256")),
    Row("HS for RS", "HS256 with the public RSA key (PEM) as its secret", "401 invalid_api_key", by_hmac(pem)),
    Row("HS for RS", "HS256 with the modulus as its secret", "401 invalid_api_key",
        by_hmac(lambda t: t.jwks["RS256"]["n"].encode())),
    Row("HS without a secret", "HS256 with an empty secret, `kid` a path to an empty file", "401 invalid_api_key",
        by_hmac(lambda _: b"", kid="../../../dev/null")),
    Row("tampered header", "another `kid`", "401 invalid_api_key", tampered(0)),
    Row("tampered claims", "`role: admin`", "401 invalid_api_key", tampered(1)),
    Row("tampered signature", "64 zeros", "401 invalid_api_key", tampered(2)),
    Row("replayed after its end", "a token that lasts 3 s, before and after", "200, then 401 expired_api_key",
        replayed),
    Row("too early", "`nbf` in an hour", "401 invalid_api_key",
        lambda t: t.present(t.token(nbf=int(time.time()) + 3600))),
    Row("for ever", "no `exp`", "401 invalid_api_key", with_token(exp=None)),
    Row("wrong audience", "`aud: other`", "401 invalid_api_key", with_token(aud="other")),
    Row("no audience", "no `aud`", "401 invalid_api_key", with_token(aud=None)),
    Row("wrong issuer", "`iss: vllm-fleet`, signed by another issuer", "401 invalid_api_key",
        with_token(iss="vllm-fleet")),
    Row("its own key", "`jwk` in the header", "401 invalid_api_key", own_key("jwk")),
    Row("its own key", "`jku` in the header", "401 invalid_api_key", own_key("jku")),
    Row("a key that has ended", "signed after the rotation's overlap", "401 invalid_api_key", with_ended_key),
    Row("an unknown demand", "`crit: [x]`", "401 invalid_api_key", with_token(head={"crit": ["x"], "x": 1})),
    Row("a role that is none", "`role: root`", "401 invalid_api_key", with_token(role="root")),
    Row("a name with a line break", "`sub: a\\nb`", "401 invalid_api_key", with_token(sub="a\nb")),
    Row("a giant token", "9 KB of claims", "401 invalid_api_key", with_token(more="x" * 9000)),
    Row("a token in the query", "`/v1/models?access_token=TOKEN`", "400 key_in_url",
        lambda t: said(t.ask("GET", f"/v1/models?access_token={t.token()}"))),
    Row("forging at speed", "500 signatures, 16 at a time", "500 × 401 invalid_api_key", forging),
    Row("a user's own token, raised", "the token of `/token`; then the same with `role: admin`",
        "200, then 401 invalid_api_key", signed_in),
    Row("guessing a password", "8 wrong ones for a user, each from another forged address",
        "5 × 400 invalid_grant, 3 × 429 slow_down", passwords([GUESSED] * 8, spread=True)),
    Row("looking for users", "a wrong password for a user that there is not", "1 × 400 invalid_grant",
        passwords(["attack-nobody"])),
]  # fmt: skip

# ---- what a user may not


def as_user(method: str, path: str, **more: Any) -> Fire:
    """A request with a user's key."""
    return lambda t: said(t.ask(method, path, "user", **more))


def by_hand(line: str, *headers: str, key: str = "user") -> Fire:
    """A request without a body, spelt by hand."""
    lines = "\n".join(headers)
    return lambda t: t.raw(f"{line}\nHost: localhost\nContent-Length: 0\nConnection: close\n{lines}", key=key)


def undrained(fire: Fire) -> Fire:
    """The same, and how many replicas are drained then."""

    def and_then(t: Target) -> str:
        seen = fire(t)
        states = [replica["state"] for replica in t.ask("GET", "/status.json", "admin").json()["replicas"]]
        return f"{seen}; {states.count('draining')} drained"

    return and_then


def end_user(t: Target) -> str:
    """A forged end user: what is said, and for how many end users of this name something is counted."""
    seen = t.chat("user", headers={"X-End-User": "mallory-the-end-user"})
    metrics = t.ask("GET", "/metrics", "admin").text
    return f"{seen}; counted for {metrics.count('mallory-the-end-user')}"


def priority(t: Target) -> str | None:
    """A forged priority: what the replica was told."""
    text = "goes first, please"
    seen = t.chat("user", text, headers={"X-Vllm-Priority": "-999"}, priority=-999)
    heads = t.seen(text)
    if heads is None:
        return None
    told = [line for head in heads for line in head.lower().splitlines() if line.startswith("x-vllm-priority:")]
    return f"{seen}; the replica is told {'it' if '-999' in str(told) else 'another' if told else 'none'}"


def usage_of_another(t: Target) -> str:
    """What `GET /v1/usage` says whose it is, whoever is asked about."""
    answer = t.ask("GET", "/v1/usage?user=attack-admin", "own", headers={"X-End-User": "attack-admin"})
    return f"{answer.status_code}, of {answer.json()['key']}"


def models(t: Target) -> str:
    """How many models a key lists that may use none here."""
    answer = t.ask("GET", "/v1/models", "elsewhere")
    return f"{answer.status_code}, {len(answer.json()['data'])} models"


def two_models(names: Callable[[Target], Sequence[str]]) -> Fire:
    """A body that names two models: the replica takes the last."""

    def fire(t: Target) -> str:
        fields = ",".join(f'"model":{json.dumps(name)}' for name in names(t))
        body = f'{{{fields},"max_tokens":1,"messages":[{{"role":"user","content":"hi"}}]}}'
        return said(t.ask("POST", CHAT, "own", content=body, headers={"Content-Type": "application/json"}))

    return fire


RIGHTS = [
    Row("another's model", "a chat with a model that the key may not use", "404 model_not_found",
        with_key("elsewhere")),
    Row("another's model", "`/v1/models/NAME`", "404 model_not_found",
        lambda t: said(t.ask("GET", f"/v1/models/{t.model}", "elsewhere"))),
    Row("another's model, listed", "`/v1/models`", "200, 0 models", models),
    Row("two models in one body", "its own first, then another", "404 model_not_found",
        two_models(lambda t: [t.model, "another"])),
    Row("two models in one body", "another first, then its own", "200", two_models(lambda t: ["another", t.model])),
    *(Row("an admin's path as a user", f"`{method} {path}`", "403 forbidden", as_user(method, path))
      for method, path in (
        ("GET", "/status.json"), ("GET", "/metrics"), ("GET", "/replicas"), ("PUT", "/replicas/vllm-0/drain"),
        ("DELETE", "/replicas/vllm-0/drain"), ("PUT", "/canary"))),
    Row("an admin's path without a key", "`PUT /replicas/vllm-0/drain`", "401 missing_api_key",
        lambda t: said(t.ask("PUT", "/replicas/vllm-0/drain"))),
    *(Row("the engine's own path as an admin", f"`POST {path}`", "404 not_found",
          lambda t, path=path: said(t.ask("POST", path, "admin", json={}))) for path in (  # type: ignore[misc]
        "/pause", "/sleep", "/v1/load_lora_adapter", "/collective_rpc", "/invocations", "/abort_requests")),
    Row("method override", "`GET /replicas/vllm-0/drain`, `X-HTTP-Method-Override: PUT`", "403 forbidden; 0 drained",
        undrained(as_user("GET", "/replicas/vllm-0/drain", headers={"X-HTTP-Method-Override": "PUT"}))),
    Row("path override", "`GET /v1/models`, `X-Original-URL: /replicas/vllm-0/drain`", "200; 0 drained",
        undrained(as_user("GET", "/v1/models", headers={"X-Original-URL": "/replicas/vllm-0/drain"}))),
    *(Row("odd path", f"`{method} {path}`", expected, by_hand(f"{method} {path} HTTP/1.1"))
      for method, path, expected in (
        ("GET", "/v1/chat/completions/../../../metrics", "403 forbidden"),
        ("GET", "/v1/../../metrics", "400 invalid_request"),
        ("GET", "/v1/models/../../metrics", "403 forbidden"),
        ("GET", "//metrics", "403 forbidden"),
        ("GET", "/%6detrics", "403 forbidden"),
        ("GET", "/metrics%00", "400 invalid_request"),
        ("GET", "/metrics;x", "404 not_found"),
        ("GET", "/METRICS", "404 not_found"),
        ("PUT", "/replicas%2fvllm-0%2fdrain", "403 forbidden"),
        ("GET", "http://localhost/metrics", "403 forbidden"),
        ("GET", "/v1/models/x%0d%0aSet-Cookie:a=b", "404 model_not_found"))),
    Row("odd method", "`TRACE /`", "405 method_not_allowed", by_hand("TRACE / HTTP/1.1")),
    Row("odd method", "`CONNECT vllm-0:8000`", "405 method_not_allowed", by_hand("CONNECT vllm-0:8000 HTTP/1.1")),
    Row("forged end user", "`X-End-User` with a key that may not name one", "200; counted for 0", end_user),
    Row("forged priority", "`X-Vllm-Priority: -999`, and `priority` in the body", "200; the replica is told another",
        priority),
    Row("another's usage", "`/v1/usage?user=attack-admin`", "200, of attack-own", usage_of_another),
    Row("a page of another origin", "a browser's question before it sends", "403 foreign_origin",
        lambda t: said(t.ask("OPTIONS", CHAT, headers={
            "Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}))),
]  # fmt: skip

# ---- HTTP itself


def smuggled(lengths: str, body: bytes = b"0\r\n\r\n") -> Fire:
    """A request that ends in two places, with an admin's request behind the first."""

    def fire(t: Target) -> str:
        hidden = (
            f"PUT /replicas/vllm-0/drain HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {t.keys['admin']}\r\n\r\n"
        )
        head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Type: application/json\n{lengths}"
        return t.raw(head, body + hidden.encode(), key="user")

    return undrained(fire)


def stops(what: str) -> Fire:
    """A client that is slow for ever: whether its connection is closed in time."""

    def fire(t: Target) -> str:
        key = f"Authorization: Bearer {t.keys['user']}\r\n"
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{key}Content-Length: 1000\r\n"
        began = time.monotonic()
        with t.connect(t.patience_s * 2) as connection, contextlib.suppress(ConnectionError, TimeoutError):
            if what == "header":
                connection.settimeout(0.5)
                connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
                while time.monotonic() - began < t.patience_s * 2:
                    connection.sendall(b"x")
                    with contextlib.suppress(TimeoutError):
                        if not connection.recv(1):
                            break
            else:
                connection.sendall(head.encode() + b"\r\n{")
                received(connection)
        return "closed in time" if time.monotonic() - began < t.patience_s + 3 else "still open"

    return fire


def unread(length: int, key: str = "") -> Fire:
    """A body that is announced and never sent: the answer comes all the same."""
    head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {length}"
    return lambda t: t.raw(head, key=key, wait_s=1.5)


def posted(key: str, make: Callable[[Target], bytes], **headers: str) -> Fire:
    """A body of bytes."""

    def fire(t: Target) -> str:
        known = {"Content-Type": "application/json", **headers}
        try:
            return said(t.ask("POST", CHAT, key, content=make(t), headers=known))
        except httpx.WriteError:
            return "closed"

    return fire


def values(t: Target) -> bytes:
    """A million small values, and the model after them."""
    return b'{"pad":[' + b"[1]," * 1_000_000 + f'[1]],"model":{json.dumps(t.model)}}}'.encode()


def many_headers(t: Target) -> str:
    """10,000 headers."""
    lines = "\n".join(f"X-{n}: y" for n in range(10_000))
    return t.raw(f"GET /v1/models HTTP/1.1\nHost: localhost\n{lines}", key="user")


def pipelined(t: Target) -> str:
    """Two requests in one go, of which only the first has a key."""
    second = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    return t.raw("GET /v1/models HTTP/1.1\nHost: localhost", second, key="user")


HTTP = [
    *(Row("smuggling", what, f"{expected}; 0 drained", smuggled(lengths)) for what, lengths, expected in (
        ("Content-Length and Transfer-Encoding", "Content-Length: 5\nTransfer-Encoding: chunked",
         "400 invalid_request"),
        ("two Content-Length", "Content-Length: 5\nContent-Length: 60", "400 invalid_request"),
        ("`Transfer-Encoding: chunked, identity`", "Transfer-Encoding: chunked, identity", "501 not_implemented"),
        ("Transfer-Encoding twice", "Transfer-Encoding: chunked\nTransfer-Encoding: chunked", "400 invalid_request"),
        ("`Transfer-Encoding:\\x0bchunked`", "Transfer-Encoding:\x0bchunked", "501 not_implemented"),
        ("`Content-Length: +5`", "Content-Length: +5", "400 invalid_request"),
        ("a line that goes on in the next", "Transfer-Encoding:\n chunked", "400 invalid_request"),
        ("`Transfer-Encoding : chunked`", "Transfer-Encoding : chunked", "400 invalid_request"))),
    Row("smuggling", "a chunk of 2^64 bytes", "400 invalid_request; 0 drained",
        smuggled("Transfer-Encoding: chunked\nConnection: close", b"FFFFFFFFFFFFFFFFF\r\n{\r\n0\r\n\r\n")),
    Row("one key for two requests", "two requests in one go, the second without a key", "200, 401 missing_api_key",
        pipelined),
    Row("a header kept to the connection", "`Connection: X-Vllm-Priority`", "400 connection_header",
        lambda t: t.chat("user", headers={"Connection": "X-Vllm-Priority"})),
    Row("10,000 headers", "`X-0: y` … `X-9999: y`", "431 headers_too_large", many_headers),
    Row("a long address", "60 KB", "414 uri_too_long", by_hand(f"GET /{'x' * 60_000} HTTP/1.1")),
    Row("slow header", "a byte each half second", "closed in time", stops("header")),
    Row("slow body", "one byte of a thousand", "closed in time", stops("body")),
    Row("a stranger's body", "60 MiB announced, no key", "401 missing_api_key", unread(60 * MIB)),
    Row("a body that is too long", "1 GiB announced", "413 request_too_large", unread(1024 * MIB, "user")),
    Row("a body that is too long for its key", "1 MiB announced, 100 KB allowed", "413 limit_exceeded",
        unread(MIB, "small")),
    Row("giant JSON", "a million lists in each other", "400 model_required", posted("own", lambda _: b"[" * MIB)),
    Row("giant JSON", "a million small values before another's model", "404 model_not_found",
        posted("elsewhere", values)),
    Row("a packed body", "`Content-Encoding: gzip`", "400 model_required",
        posted("own", lambda _: b"\x1f\x8b" + bytes(1000), **{"Content-Encoding": "gzip"})),
    Row("no JSON", "`Content-Type: text/plain`", "415 unsupported_media_type",
        posted("user", lambda _: b"hi", **{"Content-Type": "text/plain"})),
    Row("a request id that is none", "`X-Request-Id: <script>`", "another id",
        lambda t: "the same id" if "<" in t.ask("GET", "/v1/models", "user", headers={"X-Request-Id": "<script>"})
        .headers["x-request-id"] else "another id"),
]  # fmt: skip

# ---- limits


def with_numbers(**fields: Any) -> Fire:
    """A chat of a key with small limits."""
    return lambda t: t.chat("small", **fields)


def burst(t: Target) -> str:
    """Forty at once, early in a minute, of a key that may five."""
    if time.time() % 60 > 54:
        time.sleep(60 - time.time() % 60)  # the window is the clock's minute
    return at_once(40, lambda _: t.chat("few"))


def uploads(t: Target) -> str:
    """Two uploads that have hardly begun take the two places of their key."""
    key = f"Authorization: Bearer {t.keys['two']}\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{key}Content-Length: 1000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(t.connect(5)).sendall(head.encode() + b"{")

        def used() -> int:
            shown = t.ask("GET", "/v1/usage", "two").json()["limits"]["key"]["parallel_requests"]
            return int(shown["used"])

        end = time.monotonic() + min(t.patience_s, 5) / 2
        while used() < 2 and time.monotonic() < end:
            time.sleep(0.05)
        return t.chat("two")


def in_the_open(t: Target) -> str:
    """In how many places a key, token or password of all these attacks stands."""
    time.sleep(2)  # a log is written once a second
    shown = t.log() + t.ask("GET", "/metrics", "admin").text
    return f"{sum(secret in shown for secret in t.hidden)} of {'all'}"


LIMITS = [
    Row("a burst", "40 at once of a key with 5 a minute", "35 × 429 rate_limit_exceeded, 5 × 200", burst),
    Row("slow uploads beyond the limit", "a third request of a key with 2 at once", "429 rate_limit_exceeded", uploads),
    Row("a long answer", "`max_tokens: 17`, 16 allowed", "400 limit_exceeded", with_numbers(max_tokens=17)),
    Row("a long answer, hidden", "`max_completion_tokens: 17` beside `max_tokens: 1`", "400 limit_exceeded",
        with_numbers(max_completion_tokens=17)),
    Row("a long answer, unsaid", "no `max_tokens`", "400 limit_exceeded", with_numbers(max_tokens=None)),
    Row("a number that others read otherwise", '`max_tokens: "1_6"`', "400 invalid_number",
        with_numbers(max_tokens="1_6")),
    Row("many answers", "`n: 1000000000`, 2 allowed", "400 limit_exceeded", with_numbers(n=10**9)),
    Row("a long prompt", "20,000 letters, 1,000 tokens allowed", "400 limit_exceeded",
        lambda t: t.chat("small", "word " * 4000)),
]  # fmt: skip

# The last row of all: it looks back at what the others left behind.
TRACES = [
    Row(
        "reading the logs",
        "all keys, tokens and passwords of these attacks, in logs and metrics",
        "0 of all",
        in_the_open,
    ),
]

GROUPS: dict[str, list[Row]] = {
    "Keys": KEYS, "Tokens and passwords": TOKENS, "Rights": RIGHTS, "HTTP": HTTP, "Limits": LIMITS, "Traces": TRACES,
}  # fmt: skip
ROWS = [row for rows in GROUPS.values() for row in rows]
