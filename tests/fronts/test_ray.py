"""Ray Serve on two hosts, each with a replica, and the gateway before both: two fronts with the same keys and users.

What a front lets in is asked of each. `serve` is Ray Serve itself, at the head's port.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from access import service
from access.keys import KeyStore, gateways_key
from access.store import Secrets
from access.tokens import TokenStore, issue
from access.users import UserStore
from lab.ray.cluster import CHAT, HEAD, Cluster, gateway_before
from lab.sim.gateway import Gateway
from lab.waiting import until
from models.served import PACKAGED

# Two engines load on what may be two cores.
pytestmark = pytest.mark.timeout(900)
SERVES = "serve"
READY_S = 500
HOST = "127.0.99.2"
PASSWORD = "seven quiet otters at noon"


@dataclass
class Fronts:
    """Both ways in, the files that they hold to, and keys."""

    hosts: Cluster
    gateway: Gateway
    urls: dict[str, str]
    keys: KeyStore
    tokens: TokenStore
    folder: Path
    user: str
    admin: str

    def share(self) -> None:
        """Gives the gateway what changed in the files: its container has copies."""
        for path in (self.folder / "gateway").glob("*.json"):
            self.gateway.write_secret(path.name, path.read_text())

    def ask(self, front: str, method: str, path: str, key: str = "", **rest: object) -> httpx.Response:
        """One request, with a key where one is given."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, self.urls[front] + path, headers=headers, timeout=120, **rest)  # type: ignore[arg-type]

    def chat(self, front: str, key: str, **rest: object) -> httpx.Response:
        """A short chat."""
        return self.ask(front, "POST", "/v1/chat/completions", key, json={**CHAT, **rest})


@pytest.fixture(scope="module")
def fronts(ray_hosts: tuple[Cluster, Path], gateway_image: None) -> Iterator[Fronts]:
    hosts, folder = ray_hosts
    store = Secrets(folder)
    keys, tokens = KeyStore(store), TokenStore(store)
    made = {role: keys.create(role, role=role) for role in ("user", "admin")}
    tokens.take(None, 30)
    UserStore(store).add("alice", PASSWORD, "user")
    until(hosts.whole, "both Serve replicas stand", READY_S)
    with gateway_before(folder, HOST, made["admin"]) as gateway:
        gateway.wait_ready(60)
        urls = {"serve": f"http://{HEAD}:8000", "gateway": gateway.url}
        yield Fronts(hosts, gateway, urls, keys, tokens, folder, made["user"], made["admin"])


@pytest.fixture
def token_service(fronts: Fronts) -> Iterator[None]:
    """The token service, where the gateway looks for it."""
    app = service.build(fronts.folder / "tokens")
    server = uvicorn.Server(uvicorn.Config(app, HOST, 8000, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started, "the service", 30)
    yield
    server.should_exit = True
    thread.join(30)


BOTH = pytest.mark.parametrize("front", ["serve", "gateway"])


@BOTH
def test_a_chat_is_answered_whole_and_streamed(fronts: Fronts, front: str) -> None:
    client = openai.OpenAI(base_url=f"{fronts.urls[front]}/v1", api_key=fronts.user)
    shape = {**CHAT, "temperature": 0.0, "logprobs": True}
    whole = client.chat.completions.create(**shape)  # type: ignore[call-overload]
    assert whole.usage.completion_tokens == 8
    assert len(whole.choices[0].logprobs.content) == 8
    chunks = list(client.chat.completions.create(**shape, stream=True))  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 4


@BOTH
def test_tools_and_the_other_apis_are_vllms_own(fronts: Fronts, front: str) -> None:
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    function = {"name": "light", "parameters": parameters, "strict": True}
    choice = {"type": "function", "function": {"name": "light"}}
    tools = [{"type": "function", "function": function}]
    called = fronts.chat(front, fronts.user, tools=tools, tool_choice=choice, max_tokens=64, temperature=0)
    (call,) = called.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "light"
    assert json.loads(call["function"]["arguments"])["on"] in (True, False)
    asked = {"model": PACKAGED, "input": "Hi", "max_output_tokens": 8}
    assert fronts.ask(front, "POST", "/v1/responses", fronts.user, json=asked).json()["object"] == "response"
    assert fronts.ask(front, "GET", "/v1/models", fronts.user).json()["data"][0]["id"] == PACKAGED


@BOTH
@pytest.mark.parametrize("key", ["", "sk-fleet-unknown", "eyJhbGciOiJub25lIn0.e30.x"])
def test_nobody_is_let_in_without_a_key(fronts: Fronts, front: str, key: str) -> None:
    refused = fronts.chat(front, key)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == ("invalid_api_key" if key else "missing_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{fronts.urls[front]}/v1", api_key=key or "none").models.list()


@BOTH
def test_roles_and_what_nobody_reaches(fronts: Fronts, front: str) -> None:
    roles = [fronts.ask(front, "GET", "/version", key).status_code for key in (fronts.user, fronts.admin)]
    assert roles == ([403, 200] if front == "serve" else [404, 404])
    assert fronts.ask(front, "POST", "/v1/load_lora_adapter", fronts.admin, json={}).status_code == 404
    # the gateway has metrics of its own for an admin
    assert fronts.ask("serve", "GET", "/metrics", fronts.admin).status_code == 404


def test_the_key_of_the_gateway_opens_serve_and_not_the_gateway(fronts: Fronts) -> None:
    key = gateways_key((fronts.folder / "ray" / "token").read_text())
    assert fronts.chat("serve", key).status_code == 200
    assert fronts.chat("gateway", key).status_code == 401


def test_the_gateway_counts_what_serve_answered(fronts: Fronts) -> None:
    key = fronts.keys.create("carol")
    fronts.share()
    until(lambda: fronts.ask("gateway", "GET", "/v1/models", key).status_code == 200, "the new key is taken", 5)
    assert fronts.chat("gateway", key).headers["x-replica"].startswith("vllm-ray-")
    used = fronts.ask("gateway", "GET", "/v1/usage", key).json()
    assert used["tokens"]["completion"] == 8


@pytest.mark.usefixtures("token_service")
def test_a_token_of_one_front_is_taken_at_the_other(fronts: Fronts) -> None:
    for signs_in in ("serve", "gateway"):
        wrong = fronts.ask(signs_in, "POST", "/token", data={"username": "alice", "password": "another"})
        assert wrong.json()["error"] == "invalid_grant"
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        token = fronts.ask(signs_in, "POST", "/token", data=form).json()["access_token"]
        assert [fronts.chat(front, token).status_code for front in ("serve", "gateway")] == [200, 200], signs_in
    old = issue(fronts.tokens.signing(), "alice", "user", time.time() - 10**6)
    assert [fronts.chat(front, old).status_code for front in ("serve", "gateway")] == [401, 401]


def test_a_revoked_key_is_refused_at_both_within_two_seconds(fronts: Fronts) -> None:
    def said(key: str) -> list[int]:
        return [fronts.ask(front, "GET", "/v1/models", key).status_code for front in ("serve", "gateway")]

    key = fronts.keys.create("bob")
    fronts.share()
    until(lambda: said(key) == [200, 200], "the new key is taken", 5)
    fronts.keys.revoke("bob")
    fronts.share()
    until(lambda: said(key) == [401, 401], "the revoked key is refused", 2)


def test_a_host_is_lost_and_the_service_is_whole_again_when_it_is_back(fronts: Fronts) -> None:
    """Behind the gateway, whoever asks after the loss is answered; what the lost host was computing may be lost."""
    lost, enough = threading.Event(), threading.Event()
    before: list[int] = []
    after: list[int] = []

    def client() -> None:
        while not enough.is_set():
            then = lost.is_set()
            (after if then else before).append(fronts.chat("gateway", fronts.user).status_code)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    try:
        until(lambda: len(before) >= 6, "six are answered", 120)
        fronts.hosts.compose("kill", "ray-worker")
        lost.set()
        until(lambda: len(after) >= 12, "twelve more are answered", 240)
    finally:
        enough.set()
        for thread in clients:
            thread.join()
    assert Counter(after) == {200: len(after)}
    assert sum(status != 200 for status in before) <= len(clients)

    fronts.hosts.compose("start", "ray-worker")
    until(fronts.hosts.whole, "both Serve replicas stand again", READY_S)
    fronts.gateway.wait_ready(60)
    assert fronts.chat("gateway", fronts.user).status_code == 200
