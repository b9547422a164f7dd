"""ray/door.py and ray/near.py: who is let in, to what, and with which words others are refused."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from access.keys import KeyStore, gateways_key
from access.store import Secrets
from access.tokens import TokenStore, issue
from ray import door, near
from stack.shell import ROOT

Answer = tuple[int, dict[bytes, bytes], bytes]
CHAT = ("POST", "/v1/chat/completions")


class App:
    """Stands in for vLLM's: keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        self.asked.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})


def ask(app: Any, method: str, path: str, *headers: tuple[str, str], client: str = "127.0.0.1") -> Answer:
    """One request and its answer."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "client": (client, 1), "query_string": b""}
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


@pytest.fixture
def store(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path / "secrets")


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def front(app: App, store: Secrets, monkeypatch: pytest.MonkeyPatch) -> door.Door:
    monkeypatch.setenv("FLEET_SERVED_MODEL", "small")
    monkeypatch.delenv("GATEWAY_AUTH", raising=False)
    return door.Door(app, store.folder)


def code(answer: Answer) -> tuple[int, str]:
    return answer[0], json.loads(answer[2])["error"]["code"]


def test_before_there_is_a_key_nobody_is_let_in(front: door.Door) -> None:
    assert code(ask(front, *CHAT, bearer("sk-fleet-x"))) == (401, "no_keys")


def test_a_key_lets_in_until_it_is_revoked(front: door.Door, store: Secrets, app: App) -> None:
    keys = KeyStore(store)
    key = keys.create("alice")
    assert ask(front, *CHAT, bearer(key))[0] == 200
    assert ask(front, *CHAT, ("x-api-key", key))[0] == 200
    keys.revoke("alice")
    assert code(ask(front, *CHAT, bearer(key))) == (401, "invalid_api_key")
    assert len(app.asked) == 2


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ((), "missing_api_key"),
        ((("authorization", "Basic abc"),), "invalid_api_key"),
        ((bearer("one"), ("x-api-key", "two")), "invalid_api_key"),
        ((bearer("sk-fleet-unknown"),), "invalid_api_key"),
        ((bearer("a.b.c"),), "invalid_api_key"),
        ((bearer("x" * 100_000),), "invalid_api_key"),
    ],
)
def test_what_is_no_key_is_refused_in_openais_shape(
    front: door.Door, store: Secrets, headers: tuple[tuple[str, str], ...], said: str
) -> None:
    KeyStore(store).create("alice")
    TokenStore(store).take(None, 30)
    answer = ask(front, *CHAT, *headers)
    assert code(answer) == (401, said)
    assert answer[1][b"www-authenticate"] == b"Bearer"


def test_anthropics_api_is_refused_in_its_own_shape(front: door.Door) -> None:
    said = json.loads(ask(front, "POST", "/v1/messages")[2])
    assert (said["type"], said["error"]["type"]) == ("error", "authentication_error")


def test_a_token_of_the_fleet_lets_in_by_the_public_file_alone(front: door.Door, store: Secrets) -> None:
    tokens = TokenStore(store)
    tokens.take(None, 30)
    signing = tokens.signing()
    store.signing.unlink()
    assert ask(front, *CHAT, bearer(issue(signing, "bob", "user", time.time())))[0] == 200
    old = issue(signing, "bob", "user", time.time() - 3600)
    assert code(ask(front, *CHAT, bearer(old))) == (401, "expired_api_key")


def test_a_token_by_a_retired_key_is_refused(front: door.Door, store: Secrets) -> None:
    tokens = TokenStore(store)
    tokens.take(None, 30)
    token = issue(tokens.signing(), "bob", "user", time.time())
    tokens.rotate("ES256", overlap_s=-10)
    assert code(ask(front, *CHAT, bearer(token))) == (401, "invalid_api_key")


def test_roles_and_models(front: door.Door, store: Secrets) -> None:
    keys = KeyStore(store)
    user, admin, other = keys.create("u"), keys.create("a", role="admin"), keys.create("o", models=["large"])
    assert code(ask(front, "GET", "/version", bearer(user))) == (403, "forbidden")
    assert ask(front, "GET", "/version", bearer(admin))[0] == 200
    assert code(ask(front, *CHAT, bearer(other))) == (404, "model_not_found")


def test_what_generates_here_is_what_generates_at_the_gateway() -> None:
    listed = (ROOT / "nginx/conf.d/public.conf").read_text()
    assert (
        set(re.findall(r"^location = (\S+) +\{ include conf\.d/generate\.conf", listed, re.MULTILINE)) == door.GENERATE
    )


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1/load_lora_adapter", "/v1/chat", "/docs", "/sleep", "//version"])
def test_what_is_not_named_is_not_there(front: door.Door, store: Secrets, app: App, path: str) -> None:
    admin = KeyStore(store).create("a", role="admin")
    assert code(ask(front, "POST", path, bearer(admin))) == (404, "not_found")
    assert not app.asked


def test_the_engine_learns_the_keys_priority_and_not_the_key(front: door.Door, store: Secrets, app: App) -> None:
    key = KeyStore(store).create("alice", priority=7)
    ask(front, *CHAT, bearer(key), ("x-vllm-priority", "-1000"), ("cookie", "c"), ("x-other", "kept"))
    assert app.asked[0]["headers"] == [(b"x-other", b"kept"), (b"x-vllm-priority", b"7")]


def test_a_gateway_is_let_in_by_the_clusters_secret_and_says_who_goes_first(
    app: App, store: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET_SERVED_MODEL", "small")
    (store.folder / "ray").mkdir(parents=True)
    (store.folder / "ray" / "token").write_text("a secret of the cluster\n")
    front = door.Door(app, store.folder)
    key = gateways_key("a secret of the cluster")
    for said, told in (("-7", b"-7"), ("x", b"0"), ("99999", b"0")):
        assert ask(front, *CHAT, bearer(key), ("x-vllm-priority", said))[0] == 200
        assert app.asked[-1]["headers"] == [(b"x-vllm-priority", told)]
    assert ask(front, "GET", "/version", bearer(key))[0] == 200
    for wrong in (gateways_key("another"), key[:-1], "a secret of the cluster", f"{key}\xff"):
        assert ask(front, *CHAT, bearer(wrong))[0] == 401, wrong


def test_without_the_clusters_secret_no_gateway_is_let_in(front: door.Door, store: Secrets) -> None:
    KeyStore(store).create("alice")
    assert code(ask(front, *CHAT, bearer(gateways_key("")))) == (401, "invalid_api_key")


def test_without_users_nobody_signs_in_here(front: door.Door) -> None:
    form = ("content-type", "application/x-www-form-urlencoded")
    assert json.loads(ask(front, "POST", "/token", form)[2])["error"] == "invalid_request"


def test_off_means_off(app: App, store: Secrets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_AUTH", "off")
    assert ask(door.Door(app, store.folder), *CHAT)[0] == 200


def test_a_replica_of_the_hosts_network_answers_its_own_containers_alone(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = near.own_networks(
        [("lo", "127.0.0.1", "255.0.0.0"), ("eth0", "10.0.0.1", "255.255.255.0"), ("br-1", "172.18.0.1", "255.255.0.0")]
    )
    monkeypatch.setattr(near, "seen_networks", lambda: own)
    for client, status in {"127.0.0.1": 200, "172.18.0.9": 200, "10.0.0.1": 200, "10.0.0.2": 403}.items():
        assert ask(near.Near(app), *CHAT, client=client)[0] == status
