"""Starts Open WebUI behind the gateway's sign-in.

Open WebUI believes its headers when a user comes, and then its own token for weeks. The door in front of it holds it
to what the gateway says with each request: who it is, in which role, and for how long.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets as random
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

KEY = Path("/etc/fleet/secrets/key.json")
OWN_SECRET = Path("/var/lib/webui/secret")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
# Makes the role of the user of this name be what the gateway says. False where there is no such user yet.
SetRole = Callable[[str, str], Awaitable[bool]]


class Door:
    """Open WebUI, for requests that the gateway has let in."""

    def __init__(self, app: App, set_role: SetRole) -> None:
        self._app = app
        self._set_role = set_role
        self._roles: dict[str, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of ASGI's."""
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        user, role, seconds = (headers.get(f"x-fleet-{name}", "") for name in ("user", "role", "seconds"))
        if not (user and role and seconds.isdigit()):
            await refuse(scope, receive, send)
            return
        if self._roles.get(user) != role and await self._set_role(user, role):
            self._roles[user] = role
        if scope["type"] == "http":
            await self._app(scope, receive, send)
            return
        # An answer on its way may end; a WebSocket would never.
        try:
            async with asyncio.timeout(int(seconds)):
                await self._app(scope, receive, send)
        except TimeoutError:
            await send({"type": "websocket.close", "code": 1008})


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers what did not come by the gateway."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b'{"detail": "Come by the gateway."}'})


def own_secret(path: Path = OWN_SECRET) -> str:
    """What Open WebUI signs its own tokens with: made at the first start, and kept."""
    if not path.exists():
        new = path.with_suffix(".new")
        new.touch(0o600)
        new.write_text(random.token_urlsafe(32))
        new.rename(path)
    return path.read_text()


def main() -> None:
    """Runs until it is stopped."""
    if not KEY.exists():
        sys.exit("start.py: secrets/webui/key.json is missing, the key for the gateway: run `make up`, which makes it")
    os.environ["OPENAI_API_KEY"] = json.loads(KEY.read_text())["key"]
    os.environ["WEBUI_SECRET_KEY"] = own_secret()
    if not Path("/app/build").exists():
        # the package has its pages elsewhere than the official image
        os.environ["FROM_INIT_PY"] = "true"

    # it reads its settings when it is imported
    import uvicorn  # noqa: PLC0415
    from open_webui.main import app  # noqa: PLC0415
    from open_webui.models.users import Users  # noqa: PLC0415

    async def set_role(name: str, role: str) -> bool:
        user = await Users.get_user_by_email(name)
        if user and user.role != role:
            await Users.update_user_role_by_id(user.id, role)
        return user is not None

    uvicorn.run(Door(app, set_role), host="0.0.0.0", port=8080, access_log=False, server_header=False)


if __name__ == "__main__":
    main()
