"""ASGI middleware: a streamed answer begins with its first token.

vLLM sends the status and headers of a stream at once, its first token when the queue and the prefill are done, maybe
seconds later. Whatever had begun cannot go to another replica, so a stream that still waits in the queue of a replica
that dies would be lost. Here the headers wait for the first bytes; until then the gateway can move the request. A chat
opens with an event that says only whose turn it is: it waits for the token too, and leaves together with it. A
stream whose first event is an error has not begun either: it becomes an error with its status, as without streaming.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

ERROR_EVENT = b'data: {"error"'
OPENING = b'"delta":{"role":"assistant","content":""}'
HEADERS = [(b"content-type", b"application/json")]


class Begin:
    """Wraps the application."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on and its answer back, the headers not before the first bytes."""
        await self.app(scope, receive, Held(send) if scope["type"] == "http" else send)


class Held:
    """The way back for one answer."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message | None = None
        self.opening = b""
        self.failed = False

    async def __call__(self, message: Message) -> None:
        """Takes one message of the answer."""
        if message["type"] == "http.response.start":
            self.start = message
        elif self.failed:
            return
        elif self.start is None:
            await self.send(message)
        elif OPENING in (body := message.get("body", b"")) and message.get("more_body"):
            self.opening += body
        elif body or not message.get("more_body"):
            start, self.start = self.start, None
            if start["status"] == 200 and body.startswith(ERROR_EVENT):
                self.failed = True
                start, message = as_error(body)
            else:
                message = {**message, "body": self.opening + body}
            await self.send(start)
            await self.send(message)


def as_error(event: bytes) -> tuple[Message, Message]:
    """The two messages of an answer that is this error.

    What is not the client's fault may go well elsewhere. 503 says that this replica is full, 502 that its engine
    failed. Its words stand in a header too, as the gateway drops the body of what it sends on to the next replica.
    """
    body = event.split(b"\n", 1)[0].removeprefix(b"data: ")
    error = json.loads(body)["error"]
    code = error.get("code")
    status = code if isinstance(code, int) and (400 <= code < 500 or code == 503) else 502
    words = b" ".join(str(error.get("message", "")).encode("ascii", "replace").split())[:500]
    failure = [(b"x-failure", words)] if status == 502 else []
    return (
        {"type": "http.response.start", "status": status, "headers": [*HEADERS, *failure]},
        {"type": "http.response.body", "body": body},
    )
