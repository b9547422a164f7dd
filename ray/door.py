"""ASGI middleware: the door of a front that answers clients itself. It asks for a key or token of the package `access`.

The gateway does this for replicas behind it. Ray Serve can answer without a gateway. Then this class stands in front of
vLLM's own application and holds to the same files: gateway/keys.json and gateway/tokens.json in secrets/. A revoked key
is refused at the next request. Users reach what generates and the list of models, admins the version too, and nobody
anything else: metrics are Ray's, a port on each host. With users and signing keys in tokens/, `POST /token` signs users
in.

A gateway can stand in front. It has a key of its own, made of the cluster's secret: what it lets in has been asked
already, and goes first or last as it says.

Limits of keys (requests and tokens a minute, quotas) are the gateway's: several Serve replicas would count apart.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from access.keys import PREFIX, Keys, Role, gateways_key
from access.service import Watched
from access.service import build as token_service
from access.tokens import ISSUER, Issuers, Refused, Signing, SigningKey, verify

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

SECRETS = Path("/etc/fleet/secrets")
# As nginx/conf.d/public.conf lists them.
GENERATE = {
    *(f"/v1/{name}" for name in ("chat/completions", "chat/completions/batch", "completions", "responses")),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v2/embed", "/pooling", "/classify"),
    *("/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank", "/generative_scoring", "/tokenize", "/detokenize"),
    *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/systemone"),
}
MODELS = re.compile(r"/v1/models(/.*)?")
ADMINS = {"/version"}
# What proves who asks is nothing for vLLM; and neither who is served first nor where is a client's to say.
KEPT_HERE = {b"authorization", b"x-api-key", b"cookie", b"x-vllm-priority", b"x-data-parallel-rank"}
BEARER = re.compile(r"Bearer +([!-~]+) *", re.IGNORECASE)
LONGEST_TOKEN = 8192
# As the gateway limits it.
PRIORITY = re.compile(rb"-?[0-9]{1,4}")


class NotLetIn(Exception):
    """A request that is answered here: a status, OpenAI's code, and words."""

    def __init__(self, status: int, code: str, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Caller:
    """Who asks: a role, the models that the key is for (None: all), and vLLM's priority (lower is sooner)."""

    role: Role
    models: list[str] | None = None
    priority: int = 0


def own_keys(issuers: Issuers) -> Signing:
    """The keys, without what signs, by which this fleet's own tokens are checked."""
    keys = [jwk for one in issuers.issuers if one.issuer == ISSUER for jwk in one.keys]
    return Signing(
        keys=[
            SigningKey(
                jwk={name: value for name, value in jwk.items() if name != "until"}, created=0, until=jwk.get("until")
            )
            for jwk in keys
        ]
    )


def gateway_in(secrets: Path) -> bytes | None:
    """The key of a gateway in front; None where the cluster's secret is not in a file, as on Kubernetes."""
    try:
        return gateways_key((secrets / "ray" / "token").read_text()).encode()
    except OSError:
        return None


def presented(headers: dict[bytes, bytes]) -> str:
    """The key or token of a request. NotLetIn where there is none, or more than one."""
    authorization, other = (headers.get(name) for name in (b"authorization", b"x-api-key"))
    if authorization is None:
        if other is None:
            words = "No key: send the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'."
            raise NotLetIn(401, "missing_api_key", words)
        return other.decode("latin-1")
    match = BEARER.fullmatch(authorization.decode("latin-1"))
    if not match:
        raise NotLetIn(401, "invalid_api_key", "The header Authorization is not of the form 'Bearer KEY'.")
    if other is not None and other.decode("latin-1") != match[1]:
        words = "The headers Authorization and x-api-key bring two different keys: send one."
        raise NotLetIn(401, "invalid_api_key", words)
    return match[1]


class Door:
    """Wraps the application. `secrets`: a folder laid out as secrets/ is; by default what FLEET_SECRETS names."""

    def __init__(self, app: App, secrets: Path | None = None) -> None:
        folder = secrets or Path(os.environ.get("FLEET_SECRETS") or SECRETS)
        self.app = app
        self.open = os.environ.get("GATEWAY_AUTH") == "off"
        self.served = os.environ.get("FLEET_SERVED_MODEL", "")
        self.keys = Watched(folder / "gateway" / "keys.json", Keys, lambda keys: keys)
        self.issuers = Watched(folder / "gateway" / "tokens.json", Issuers, own_keys)
        self.tokens = token_service(folder / "tokens")
        self.gateway = gateway_in(folder)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                app, scope = self._admitted(scope)
            except NotLetIn as refusal:
                await answer(send, scope["path"], refusal)
            else:
                await app(scope, receive, send)

    def _admitted(self, scope: Message) -> tuple[App, Message]:
        """The application that answers, and what it is told of the request. NotLetIn where none does."""
        method, path = scope["method"], scope["path"]
        generates, lists = path in GENERATE, bool(MODELS.fullmatch(path)) and method in {"GET", "HEAD"}
        if (method, path) == ("POST", "/token"):
            return self.tokens, scope
        if path == "/health" and method in {"GET", "HEAD"}:
            return self.app, scope
        if not generates and not lists and path not in ADMINS:
            raise NotLetIn(404, "not_found", "Not found.")
        caller = Caller("admin") if self.open else self._caller(dict(scope["headers"]))
        if path in ADMINS and caller.role != "admin":
            raise NotLetIn(403, "forbidden", f"{path} is for keys of the role admin.")
        if caller.models is not None and self.served not in caller.models and path not in ADMINS:
            raise NotLetIn(404, "model_not_found", "This key is not for the model that is served here.")
        headers = [(name, value) for name, value in scope["headers"] if name not in KEPT_HERE]
        return self.app, {**scope, "headers": [*headers, (b"x-vllm-priority", str(caller.priority).encode())]}

    def _caller(self, headers: dict[bytes, bytes]) -> Caller:
        """Whose key or token a request brings. NotLetIn where it is nobody's."""
        key = presented(headers)
        if self.gateway and hmac.compare_digest(key.encode("latin-1"), self.gateway):
            said = headers.get(b"x-vllm-priority", b"")
            return Caller("admin", priority=int(said) if PRIORITY.fullmatch(said) else 0)
        keys, issuers = self.keys(), self.issuers()
        if keys is None and issuers is None:
            words = "Nobody has a key yet. On the host that has secrets/: make key ARGS='create NAME'"
            raise NotLetIn(401, "no_keys", words)
        if key.startswith(PREFIX):
            holder = keys.holder(key, time.time()) if keys else None
            if holder:
                return Caller(holder.role, holder.models, holder.priority)
            raise NotLetIn(401, "invalid_api_key", "This key is not known here, or has expired.")
        if issuers is None or len(key) > LONGEST_TOKEN:
            raise NotLetIn(401, "invalid_api_key", "This key is not known here.")
        try:
            return Caller(verify(issuers, key).role)
        except Refused as refused:
            if refused.expired:
                raise NotLetIn(401, "expired_api_key", "This token has expired.") from None
            raise NotLetIn(401, "invalid_api_key", "This token is not taken here.") from None


async def answer(send: Send, path: str, refusal: NotLetIn) -> None:
    """Sends a refusal in the shape of the API that was asked."""
    said: dict[str, Any]
    if path.startswith("/v1/messages"):
        kind = {401: "authentication_error", 403: "permission_error"}.get(refusal.status, "not_found_error")
        said = {"type": "error", "error": {"type": kind, "message": str(refusal)}}
    else:
        kind = "invalid_request_error"
        said = {"error": {"message": str(refusal), "type": kind, "param": None, "code": refusal.code}}
    headers = [(b"content-type", b"application/json")]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(said).encode()})
