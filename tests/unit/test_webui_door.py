"""The door in front of Open WebUI: it goes by what the gateway says, request by request."""

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from webui.start import Door, Receive, Scope, Send, own_secret

Sent = list[MutableMapping[str, Any]]


def scope(kind: str, path: str = "/api/x", **told: str) -> Scope:
    headers = [(f"x-fleet-{name}".encode(), value.encode()) for name, value in told.items()]
    return {"type": kind, "path": path, "headers": headers}


class Chat:
    """Open WebUI, as far as the door knows it: users with roles, and WebSockets that nobody closes."""

    def __init__(self) -> None:
        self.roles: dict[str, str] = {}
        self.seen: list[str] = []

    async def __call__(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        self.seen.append(scope["type"])
        if scope["type"] == "websocket":
            await asyncio.Event().wait()

    async def set_role(self, user: str, role: str) -> bool:
        if user in self.roles:
            self.roles[user] = role
        return user in self.roles


def ask(door: Door, *scopes: Scope) -> Sent:
    sent: Sent = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def all_of_them() -> None:
        for one in scopes:
            await asyncio.wait_for(door(one, receive, send), 10)

    asyncio.run(all_of_them())
    return sent


@pytest.mark.parametrize("told", [{}, {"user": "user:a", "role": "user"}, {"user": "user:a", "seconds": "9"}])
def test_what_did_not_come_by_the_gateway_is_refused(told: dict[str, str]) -> None:
    chat = Chat()
    door = Door(chat, chat.set_role)
    assert ask(door, scope("http", **told))[0]["status"] == 401
    assert ask(door, scope("websocket", **told)) == [{"type": "websocket.close", "code": 1008}]
    assert chat.seen == []
    ask(door, scope("http", "/health"), scope("lifespan", ""))
    assert chat.seen == ["http", "lifespan"]


def test_a_role_is_what_the_gateway_says_now() -> None:
    """Open WebUI itself looks at it only when its own token is new."""
    chat = Chat()
    door = Door(chat, chat.set_role)
    ask(door, scope("http", user="user:a", role="admin", seconds="9"))
    chat.roles["user:a"] = "user"
    for role in ("admin", "user"):
        ask(door, scope("http", user="user:a", role=role, seconds="9"))
        assert chat.roles == {"user:a": role}


def test_a_websocket_ends_when_the_token_does() -> None:
    chat = Chat()
    door = Door(chat, chat.set_role)
    sent = ask(door, scope("websocket", user="user:a", role="user", seconds="1"))
    assert (chat.seen, sent) == (["websocket"], [{"type": "websocket.close", "code": 1008}])


def test_its_own_secret_is_made_once_and_nobody_else_reads_it(tmp_path: Path) -> None:
    secret = own_secret(tmp_path / "secret")
    assert len(secret) >= 32
    assert own_secret(tmp_path / "secret") == secret
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
