"""What is attacked: a gateway that asks for keys, with holders made for the attacks.

`simulated()` is the real Nginx over simulated replicas, with the real token service; `real()` the running stack, whose
keys, users and issuer are taken away at the end, however that comes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets as random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import uvicorn

from access import service
from access.keys import KeyStore
from access.store import Secrets
from access.tokens import Algorithm, Issuer, Jwk, TokenStore, new_jwk
from access.users import UserStore
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.stack import StackError, published, run
from lab.waiting import until
from stack.access import SECRETS
from stack.shell import ROOT

CHAT = "/v1/chat/completions"
PREFIX = "attack-"
# Whose password is guessed is kept waiting, so it is another one.
USER, GUESSED = "attack-user", "attack-guessed"
ISSUER, AUDIENCE = "https://attacks.invalid", "attacks"
ALGORITHMS: list[Algorithm] = ["HS256", "RS256", "ES256"]
# A gateway waits so long for the rest of a header or a body; in the simulated one it is less, so that a test is short.
PATIENCE_S, SHORT_S = 15, 2


def b64(data: bytes) -> str:
    """Base64 as in a token."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def bearer(key: str) -> dict[str, str]:
    """The header with a key."""
    return {"Authorization": f"Bearer {key}"}


def said(answer: httpx.Response) -> str:
    """An answer's status, and the code of its error."""
    return summary(f"HTTP/1.1 {answer.status_code} \r\n{answer.text}".encode())


def summary(data: bytes) -> str:
    """The statuses of all answers in what came, and the first error's code; "closed" if nothing came."""
    statuses = [status.decode() for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", data)]
    code = re.search(rb'"(?:code|error)":\s*"(\w+)"', data)
    return ", ".join(statuses or ["closed"]) + (f" {code[1].decode()}" if code and statuses[-1] >= "400" else "")


@dataclass
class Target:
    """A gateway under attack, which `about` tells of. `keys` and `jwks` are by name; `log` gives what it has logged
    since the attacks began."""

    url: str
    model: str
    patience_s: float
    secrets: Secrets
    put_in_force: Callable[[], None]
    log: Callable[[], str]
    # What the replicas were sent with this text in it, head and body; None where nobody can see that.
    seen: Callable[[str], list[str] | None]
    keys: dict[str, str] = field(default_factory=dict)
    jwks: dict[str, Jwk] = field(default_factory=dict)
    password: str = field(default_factory=lambda: f"{random.token_hex(6)} {random.token_hex(6)} words")
    # All that must stand in no log.
    hidden: set[str] = field(default_factory=set)
    passwords: bool = True  # whether anybody can sign in
    about: str = "the real Nginx and token service over simulated replicas"
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120, trust_env=False))

    def ask(self, method: str, path: str, key: str = "", **more: Any) -> httpx.Response:
        """An answer; `key` is the name of one of `keys`, or '' for none."""
        headers = {**(bearer(self.keys[key]) if key else {}), **more.pop("headers", {})}
        return self.client.request(method, self.url + path, headers=headers, **more)

    def chat(self, key: str = "", text: str = "hi", headers: dict[str, str] | None = None, **more: Any) -> str:
        """What is said to a chat."""
        body = {"model": self.model, "max_tokens": 1, "messages": [{"role": "user", "content": text}], **more}
        return said(self.ask("POST", CHAT, key, json=body, headers=headers or {}))

    def raw(self, head: str, body: bytes = b"", key: str = "", wait_s: float = 10) -> str:
        """What is said to a request that is spelt by hand; `head` has its lines, without the blank one."""
        lines = [line for line in head.strip().splitlines() if line]
        if key:
            lines.append(f"Authorization: Bearer {self.keys[key]}")
        with self.connect(wait_s) as connection:
            with contextlib.suppress(ConnectionError):  # a refusal may come before all is sent
                connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            return summary(received(connection))

    def connect(self, wait_s: float) -> socket.socket:
        """A connection to the gateway."""
        parts = urlsplit(self.url)
        return socket.create_connection((parts.hostname or "", parts.port or 80), wait_s)

    def token(self, alg: str = "ES256", head: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token of the issuer that the gateway takes; a claim of None is left out."""
        now = int(time.time())
        plain = {"iss": ISSUER, "aud": AUDIENCE, "sub": "mallory", "role": "user", "iat": now, "exp": now + 600}
        wanted = {name: value for name, value in {**plain, **claims}.items() if value is not None}
        key = self.jwks[alg]
        made = jwt.encode(wanted, jwt.PyJWK(key, algorithm=alg).key, alg, headers={"kid": key["kid"], **(head or {})})
        self.hidden.add(made)
        return made

    def present(self, token: str) -> str:
        """What is said to a chat with this token."""
        self.hidden.add(token)
        return self.chat(headers=bearer(token))

    def sign_in(self, password: str, name: str = USER, **headers: str) -> httpx.Response:
        """The answer to a name and a password."""
        form = {"grant_type": "password", "username": name, "password": password}
        return self.ask("POST", "/token", data=form, headers=headers)


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes, or no more does."""
    data = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    return data


def prepare(target: Target) -> None:
    """Makes the holders whom the attacks need."""
    store = KeyStore(target.secrets)
    now = int(time.time())

    def make(name: str, store: KeyStore = store, **rights: Any) -> str:
        target.keys[name] = store.create(PREFIX + name, **rights)
        return target.keys[name]

    make("user")
    make("admin", role="admin")
    make("own", models=[target.model])
    make("elsewhere", models=["a-model-that-is-not-served"])
    make("few", limits={"requests_per_minute": 5})
    make("two", limits={"parallel_requests": 2})
    make("small", limits={"max_tokens": 16, "n": 2, "body_bytes": 100_000, "prompt_tokens": 1000})
    make("expired", KeyStore(target.secrets, lambda: now - 3600), expires=now - 60)
    for name, overlap_s in (("in overlap", 3600), ("after overlap", 0)):
        plain = name.replace(" ", "-")
        old = make(plain)
        target.keys[f"new, {name}"] = store.rotate(PREFIX + plain, overlap_s)
        target.keys[f"old, {name}"] = old
    revoked = make("revoked")
    store.revoke(PREFIX + "revoked")
    target.keys["revoked"] = revoked
    target.keys["unknown"] = "sk-fleet-" + random.token_urlsafe(32)
    target.jwks = {algorithm: new_jwk(algorithm) for algorithm in ALGORITHMS}
    target.jwks["ended"] = new_jwk("ES256")
    public = [{name: value for name, value in jwk.items() if name not in ("d", "p", "q", "dp", "dq", "qi")}
              for jwk in target.jwks.values()]  # fmt: skip
    public[-1]["until"] = 1
    TokenStore(target.secrets).trust(Issuer(issuer=ISSUER, audience=AUDIENCE, algorithms=ALGORITHMS, keys=public))
    if target.passwords:
        for name in (USER, GUESSED):
            UserStore(target.secrets).add(name, target.password, "user")
    target.hidden |= {*target.keys.values(), target.password}
    target.put_in_force()
    until(
        lambda: (
            target.ask("GET", "/v1/models", "new, after overlap").status_code == 200
            and target.present(target.token()) == "200"
        ),
        "the holders are in force",
    )


def clear(secrets: Secrets) -> None:
    """Takes away what `prepare` made, or an earlier one that was killed."""
    store = KeyStore(secrets)
    for key in store.read().keys:
        if key.name.startswith(PREFIX):
            store.revoke(key.name)
    if any(one.issuer == ISSUER for one in TokenStore(secrets).issuers().issuers):
        TokenStore(secrets).distrust(ISSUER)
    for name in (USER, GUESSED):
        if UserStore(secrets).read().find(name):
            UserStore(secrets).remove(name)


@contextlib.contextmanager
def simulated() -> Iterator[Target]:
    """The real Nginx and token service, over two simulated replicas."""
    text = (ROOT / "nginx/conf.d/http.conf").read_text()
    slow = [f"client_{what}_timeout {PATIENCE_S}s;" for what in ("header", "body")]
    if not all(one in text for one in slow):
        raise RuntimeError(f"conf.d/http.conf does not have {slow}: it and lab/attacks/target.py are out of step")
    for one in slow:
        text = text.replace(one, one.replace(str(PATIENCE_S), str(SHORT_S)))
    with tempfile.TemporaryDirectory() as folder:
        secrets = Secrets(Path(folder) / "secrets")
        admin = KeyStore(secrets).create("operator", role="admin")
        TokenStore(secrets).take(None, 30)
        files = {f"secrets/{path.name}": path.read_bytes() for path in (secrets.keys, secrets.issuers)}
        with (
            Replicas(2) as replicas,
            Gateway(replicas, files={**files, "conf.d/http.conf": text.encode()}, key=admin) as gateway,
            serving(secrets, gateway.host),
        ):
            gateway.wait_ready()

            def put_in_force() -> None:
                for path in (secrets.keys, secrets.issuers):
                    gateway.write_secret(path.name, path.read_text())

            def seen(text: str) -> list[str]:
                requests = [request for sim in replicas for request in sim.state()["seen"]]
                return [one["head"] + one["body"] for one in requests if text in one["body"]]

            target = Target(gateway.url, "sim", SHORT_S, secrets, put_in_force, gateway.log, seen)
            with target.client:
                prepare(target)
                yield target


@contextlib.contextmanager
def serving(secrets: Secrets, host: str) -> Iterator[None]:
    """The token service, where the gateway looks for it."""
    app = service.build(secrets.users.parent)
    server = uvicorn.Server(uvicorn.Config(app, host, 8000, log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started, "the token service")
        yield
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def real() -> Iterator[Target]:
    """The running stack. StackError where none runs, or it asks nobody for a key."""
    url = published("gateway", 80)
    began = datetime.now(UTC)
    answer = httpx.get(f"{url}/v1/models", trust_env=False)
    if answer.status_code != httpx.codes.UNAUTHORIZED:
        raise StackError("the stack asks nobody for a key, and the attacks' keys would close it: make one (make key)")

    def log() -> str:
        since = f"{began:%Y-%m-%dT%H:%M:%SZ}"
        return run("docker", "compose", "--profile", "*", "logs", "--no-color", "--since", since, timeout_s=300)

    services = run("docker", "compose", "--profile", "*", "ps", "--status", "running", "--services").split()
    clear(SECRETS)
    target = Target(url, "", PATIENCE_S, SECRETS, lambda: None, log, lambda _: None, passwords="tokens" in services)
    try:
        finder = KeyStore(SECRETS).create(PREFIX + "finder")
        listed = until(lambda: names(url, finder), "the stack lists a model to a new key")
        target.model = listed[0]
        with target.client:
            prepare(target)
            count = len(target.ask("GET", "/status.json", "admin").json()["replicas"])
            tokens = "with" if target.passwords else "without"
            target.about = (
                f"the running stack through its published port: {count} replicas of {target.model}, {tokens} the token "
                "service"
            )
            yield target
    finally:
        clear(SECRETS)


def names(url: str, key: str) -> Sequence[str]:
    """The models that a key may use; none while it is not in force."""
    answer = httpx.get(f"{url}/v1/models", headers=bearer(key), trust_env=False)
    return [card["id"] for card in answer.json()["data"]] if answer.status_code == httpx.codes.OK else []


def forged(head: dict[str, Any], claims: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """A token whose parts are as given, whatever a library thinks of them."""
    text = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(claims).encode())}"
    return f"{text}.{b64(sign(text.encode()))}"
