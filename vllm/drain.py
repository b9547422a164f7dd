"""ASGI middleware: a replica that is being stopped finishes what it has and turns new requests away with 503.

vLLM by itself answers them with 500 until its last running request is done, which a gateway must take for an answer,
as it must where the engine has died. A 503 sends the request to the next replica; a header says that it is not for want
of room. A dead engine's answers become 502: the request may be what ended it. `/metrics` goes on, so that the drain can
be watched.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable, MutableMapping
from types import FrameType
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

DRAINING = (b"x-refusal", b"draining")
DIED = (b"x-failure", b"its engine has died")
HEADERS = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"connection", b"close"), DRAINING]
BODY = json.dumps(
    {"error": {"message": "This replica is being stopped.", "type": "unavailable", "param": None, "code": "draining"}}
).encode()


class Drain:
    """Wraps the application."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.draining = False

    def _drain(self, _number: int, _frame: FrameType | None) -> None:
        self.draining = True

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan":
            # The server starts, so vLLM has set its handler. The event loop learns of a signal through its wakeup file
            # descriptor whichever handler is set, so vLLM's still runs.
            signal.signal(signal.SIGTERM, self._drain)
        if scope["type"] != "http" or scope["path"] == "/metrics":
            await self.app(scope, receive, send)
        elif self.draining:
            await send({"type": "http.response.start", "status": 503, "headers": HEADERS})
            await send({"type": "http.response.body", "body": BODY})
        else:
            await self.app(scope, receive, lambda message: send(self._late(scope, message)))

    def _late(self, scope: Message, message: Message) -> Message:
        """What a request is told that had come in but did not reach the engine before it closed, or died."""
        if message["type"] != "http.response.start" or message["status"] != 500:
            return message
        headers = message.get("headers", [])
        if self.draining:
            return {**message, "status": 503, "headers": [*headers, DRAINING]}
        if scope["app"].state.engine_client.errored:
            return {**message, "status": 502, "headers": [*headers, DIED]}
        return message
