"""ASGI middleware: one line of JSON for each request that the gateway sent, with its id and nothing that was said.

uvicorn's own line has no id. engine_lines.py adds what the engine tells of the same request.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# The gateway gives every request an id, and no longer one than this; what it asks for itself has none.
LONGEST = 128
REPLICA = socket.gethostname().split(".")[0]


def write(line: dict[str, Any]) -> None:
    """Writes a line with the time (UTC) and this replica's name."""
    told = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "replica": REPLICA, **line}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def request_id(scope: Message) -> str:
    """The id of a request's headers, '' if it has none."""
    found = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return str(found[:LONGEST].decode("latin-1"))


class Lines:
    """Wraps the application."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on and its answer back; writes its line when it is over, however it ended."""
        if scope["type"] != "http" or not (given := request_id(scope)):
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        told: dict[str, Any] = {"status": None, "first_byte": None, "whole": False}

        async def passed(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
            elif message["type"] == "http.response.body":
                if told["first_byte"] is None:
                    told["first_byte"] = round(time.monotonic() - began, 3)
                told["whole"] = not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, receive, passed)
        finally:
            write({"id": given, "path": scope["path"], **told, "seconds": round(time.monotonic() - began, 3)})
