"""The door to Open WebUI: who is let in, and what Open WebUI is told of them. The real token service and the real
Nginx, before a server that answers with what it was sent."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web

from access.keys import KeyStore
from access.store import Secrets
from access.tokens import TokenStore, issue
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import PASSWORD, token_service

PAGE = {"Accept": "text/html,*/*"}


@dataclass
class Door:
    """The gateway's port for Open WebUI, and what issues tokens."""

    gateway: Gateway
    secrets: Secrets
    key: str
    clients: list[httpx.Client] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.gateway.host}:8090"

    def client(self, token: str = "", **headers: str) -> httpx.Client:
        """A browser, with a token in its cookie where one is given."""
        cookies = {"fleet_token": token} if token else {}
        self.clients.append(client := httpx.Client(base_url=self.url, cookies=cookies, headers=headers, timeout=30))
        return client

    def token(self, name: str, role: Any = "user", ago_s: float = 0) -> str:
        return issue(TokenStore(self.secrets).signing(), name, role, time.time() - ago_s)

    def sign_in(
        self, name: str = "alice", password: str = PASSWORD, **headers: str
    ) -> tuple[httpx.Client, httpx.Response]:
        client = self.client()
        form = {"username": name, "password": password}
        return client, client.post("/sign-in", data=form, headers=headers)


async def echo(request: web.Request) -> web.StreamResponse:
    """What came, as JSON; over a WebSocket as its first message, and then each message again."""
    seen = {name.lower(): value for name, value in request.headers.items()}
    if request.headers.get("Upgrade"):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json(seen)
        async for message in socket:
            await socket.send_str(str(message.data))
        return socket
    if request.path == "/moved":
        raise web.HTTPTemporaryRedirect(f"http://{request.host}/elsewhere")
    if request.path == "/page":
        return web.Response(text="<p>", content_type="text/html")
    return web.json_response(
        {"headers": seen, "names": [name.lower() for name in request.headers], "path": request.path_qs}
    )


@pytest.fixture(scope="module")
def door(secrets: Secrets) -> Iterator[Door]:
    key = KeyStore(secrets).create("bob")
    files = {f"secrets/{path.name}": path.read_bytes() for path in (secrets.keys, secrets.issuers)}
    with Replicas(1) as replicas, Gateway(replicas, files=files) as gateway:
        found = Door(gateway, secrets, key)
        loop = asyncio.new_event_loop()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", echo)
        runner = web.AppRunner(app)
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.TCPSite(runner, gateway.host, 8088).start())
        background = threading.Thread(target=loop.run_forever)
        background.start()
        with token_service(gateway, secrets):
            yield found
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        background.join(30)
        loop.close()
        for client in found.clients:
            client.close()


def test_a_password_lets_in_and_open_webui_is_told_who_it_is(door: Door) -> None:
    for name, role in (("alice", "user"), ("root", "admin")):
        client, answer = door.sign_in(name)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert cookie.endswith("; Path=/; Max-Age=1800; HttpOnly; SameSite=Lax")
        client.cookies.set("theirs", "stays", domain=door.gateway.host)
        seen = client.get("/api/x?y=%20z", headers={"Authorization": "Bearer of-open-webui"}).json()
        told = {name: seen["headers"][f"x-fleet-{name}"] for name in ("user", "name", "role")}
        assert told == {"user": f"user:{name}", "name": name, "role": role}
        assert 1790 <= int(seen["headers"]["x-fleet-seconds"]) <= 1800
        assert (seen["headers"]["cookie"], seen["headers"]["authorization"]) == ("theirs=stays", "Bearer of-open-webui")
        assert seen["path"] == "/api/x?y=%20z"
        assert client.get("/moved").headers["location"] == "/elsewhere"


def test_whoever_has_not_signed_in_gets_the_form_and_nothing_else(door: Door) -> None:
    client = door.client()
    assert (page := client.get("/c/1", headers=PAGE)).status_code == 303
    assert page.headers["location"] == "/sign-in"
    form = client.get("/sign-in")
    assert form.status_code == 200
    assert 'action="/sign-in"' in form.text
    assert client.get("/api/x").status_code == client.post("/api/x", json={}).status_code == 401
    # of the gateway's other server nothing is here
    for path in ("/token", "/status.json", "/v1/models", "/metrics"):
        assert client.get(path).status_code in (401, 404)
    assert client.post("/token", data={"username": "alice", "password": PASSWORD}).status_code == 404


@pytest.mark.parametrize("name", ["X-Fleet-User", "X-FLEET-USER", "X_Fleet_User", "X-Fleet-Role", "X-Forwarded-User"])
def test_no_header_of_a_client_signs_it_in_or_changes_who_it_is(door: Door, name: str) -> None:
    forged = {name: "admin" if "Role" in name else "user:root"}
    assert door.client().get("/api/x", headers=forged).status_code == 401
    seen = door.client(door.token("alice")).get("/api/x", headers=forged).json()
    assert (seen["headers"]["x-fleet-user"], seen["headers"]["x-fleet-role"]) == ("user:alice", "user")
    assert [one for one in seen["names"] if one.replace("_", "-") == "x-fleet-user"] == ["x-fleet-user"]


def test_what_is_no_token_in_force_lets_nobody_in(door: Door) -> None:
    good = door.token("alice")
    assert door.client(good).get("/api/x").status_code == 200
    ended = door.token("alice", ago_s=1801)
    for cookie in (ended, good[:-4] + "AAAA", door.key, "x", "a.b.c"):
        assert door.client(cookie).get("/api/x").status_code == 401
        assert door.client(cookie).get("/", headers=PAGE).status_code == 303
    # nor does a token where it is not looked for
    assert door.client(Authorization=f"Bearer {good}").get("/api/x").status_code == 401
    assert door.client().get(f"/api/x?fleet_token={good}").status_code == 401


def test_a_session_ends_with_its_token(door: Door) -> None:
    client = door.client(door.token("alice", ago_s=1797))
    answer = client.get("/page")
    assert answer.status_code == 200
    seconds, _, where = answer.headers["refresh"].partition("; ")
    assert (1 <= int(seconds) <= 4, where) == (True, "url=/sign-in")
    # else a browser would go by the seconds of an older answer
    assert answer.headers["cache-control"] == "no-store"
    assert "refresh" not in client.get("/api/x").headers
    until(lambda: client.get("/api/x").status_code == 401, "the end of the token", 10)


def test_a_wrong_password_is_told_and_guessing_is_slowed(door: Door) -> None:
    _, answer = door.sign_in(password="another one that is long")
    assert answer.status_code == 401
    assert "No such user, or another password." in answer.text
    assert "set-cookie" not in answer.headers
    _, unknown = door.sign_in("nobody<script>")
    assert (unknown.status_code, "script" in unknown.text) == (401, False)
    answers = [door.sign_in("carol", "wrong " * 4)[1] for _ in range(8)]
    assert [answer.status_code for answer in answers] == [401] * 5 + [429] * 3
    assert "Too many wrong passwords. Wait a second." in answers[-1].text
    assert door.sign_in(password="x" * 9000)[1].status_code == 413


def test_signing_out_takes_the_cookie(door: Door) -> None:
    client, _ = door.sign_in()
    assert client.get("/api/x").status_code == 200
    assert client.get("/sign-in").headers["location"] == "/"
    assert client.get("/sign-out").headers["location"] == "/sign-in"
    assert client.get("/api/x").status_code == 401


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://HOST:8080", "https://HOST:8090.evil.example"]
)
def test_a_page_of_another_origin_can_do_nothing(door: Door, origin: str) -> None:
    """Another port of the same host too, to which a browser sends the same cookies."""
    origin = origin.replace("HOST", door.gateway.host)
    assert door.sign_in(Origin=origin)[1].status_code == 403
    client = door.client(door.token("alice"), Origin=origin)
    assert client.post("/api/x", json={}).status_code == client.get("/ws").status_code == 403
    own = door.client(door.token("alice"), Origin=door.url)
    assert own.post("/api/x", json={}).status_code == 200


def test_nothing_is_asked_of_other_hosts_by_the_browser(door: Door) -> None:
    policy = door.client(door.token("alice")).get("/page").headers["content-security-policy"]
    assert policy.startswith("default-src 'self' ")
    assert "http" not in policy


def test_a_websocket_passes_for_who_has_signed_in(door: Door) -> None:
    async def talk(token: str, **headers: str) -> Any:
        cookie = {"Cookie": f"fleet_token={token}"}
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{door.url}/ws/socket.io/?EIO=4", headers=cookie | headers) as socket,
        ):
            seen = json.loads(await socket.receive_str(timeout=10))
            await socket.send_str("hello")
            return seen, await socket.receive_str(timeout=10)

    seen, said = asyncio.run(talk(door.token("alice"), **{"X-Fleet-User": "user:root"}))
    assert (seen["x-fleet-user"], said) == ("user:alice", "hello")
    for token, headers in (("x", {}), (door.token("alice"), {"Origin": "http://evil.example"})):
        with pytest.raises(aiohttp.WSServerHandshakeError):
            asyncio.run(talk(token, **headers))


def test_capitals_tell_users_of_a_provider_apart(door: Door) -> None:
    """Open WebUI takes them for small letters. Names of the fleet's own users have none; a provider's may."""
    names = [
        door.client(door.token(name)).get("/api/x").json()["headers"]["x-fleet-user"] for name in ("Ann", "ann", "a%41")
    ]
    assert names == ["user:%41nn", "user:ann", "user:a%2541"]
    assert len({name.lower() for name in names}) == 3
