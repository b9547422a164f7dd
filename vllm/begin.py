"""ASGI middleware: a streamed answer begins with its first token.

vLLM sends the status and headers of a stream at once, its first token when the queue and the prefill are done, maybe
seconds later. Whatever had begun cannot go to another replica, so a stream that still waits in the queue of a replica
that dies would be lost. Here the headers wait for the first bytes; until then the gateway can move the request. A chat
opens with an event that says only whose turn it is, a response with two that say that it is there: these wait for the
token too, and leave together with it. A stream whose first event is an error has not begun either: it becomes an error
with its status, as without streaming.

STREAM_KEEPALIVE_SECONDS ends that wait: after so long without a byte a stream gets a comment, which clients skip and
which keeps what lies between from cutting the connection. From then on the request cannot move.

503 says that this replica is full. vLLM gives it to a request that failed in its engine too: that becomes 502.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

ERROR_EVENTS = (b'data: {"error"', b"event: error\n")
OPENING = b'"delta":{"role":"assistant","content":""}'
OPENINGS = (b"event: response.created\n", b"event: response.in_progress\n")
COMMENT = b": the answer is on its way\n\n"
# The type of Anthropic's API for the client's fault, which has no code.
INVALID = "invalid_request_error"
# The types of vLLM's 503: its queue is full, and the request failed in its engine.
FULL, FAILED = "Service Unavailable", "ServiceUnavailableError"
# Tells the gateway that an answer begins with a comment: its prompt may not be computed yet.
WAITING = (b"x-waiting", b"1")
HEADERS = [(b"content-type", b"application/json")]


class Begin:
    """Wraps the application; after `keepalive_s` seconds without a byte a stream gets a comment, with 0 never."""

    def __init__(self, app: App, keepalive_s: float | None = None) -> None:
        self.app = app
        setting = float(os.environ.get("STREAM_KEEPALIVE_SECONDS") or 0)
        self.keepalive_s = setting if keepalive_s is None else keepalive_s

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on and its answer back, the headers not before the first bytes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = Held(send, self.keepalive_s)
        try:
            await self.app(scope, receive, held)
        finally:
            held.end()


class Held:
    """The way back for one answer."""

    def __init__(self, send: Send, keepalive_s: float) -> None:
        self.send = send
        self.keepalive_s = keepalive_s
        self.start: Message | None = None
        self.opening = b""
        self.failed = False
        self.passed_at = 0.0
        self.comments: asyncio.Task[None] | None = None

    async def __call__(self, message: Message) -> None:
        """Takes one message of the answer."""
        if message["type"] == "http.response.start":
            self.start = message
            if self.keepalive_s and is_stream(message):
                self.passed_at = asyncio.get_running_loop().time()
                self.comments = asyncio.create_task(self.comment())
        elif self.failed:
            return
        elif self.start is None:
            await self.pass_on(message)
        elif is_opening(body := message.get("body", b"")) and message.get("more_body"):
            self.opening += body
        elif body or not message.get("more_body"):
            start, self.start = self.start, None
            if error := error_in(start, body):
                self.failed = True
                self.end()
                start, message = as_error(error)
                self.opening = b""
            await self.send(start)
            await self.pass_on(message)

    async def pass_on(self, message: Message) -> None:
        """Sends a part of the body."""
        self.passed_at = asyncio.get_running_loop().time()
        if not message.get("more_body"):
            self.end()
        if self.opening:
            opening, self.opening = self.opening, b""
            message = {**message, "body": opening + message.get("body", b"")}
        await self.send(message)

    async def comment(self) -> None:
        """Sends a comment whenever nothing was sent for so long; the first may begin the answer."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self.passed_at + self.keepalive_s - clock())
            if clock() < self.passed_at + self.keepalive_s:
                continue
            if start := self.start:
                self.start = None
                await self.send({**start, "headers": [*start.get("headers", []), WAITING]})
            await self.pass_on({"type": "http.response.body", "body": COMMENT, "more_body": True})

    def end(self) -> None:
        """No comment from here on."""
        if self.comments:
            self.comments.cancel()


def is_stream(start: Message) -> bool:
    """Whether the answer that starts so is a stream of events."""
    return any(name == b"content-type" and b"text/event-stream" in value for name, value in start.get("headers", []))


def is_opening(event: bytes) -> bool:
    """Whether an event comes before the engine has done anything."""
    return OPENING in event or event.startswith(OPENINGS)


def error_in(start: Message, body: bytes) -> dict[str, Any] | None:
    """The error that an answer is, as JSON, if it has to become another one here: of a stream, or that 503."""
    if start["status"] == 200 and body.startswith(ERROR_EVENTS):
        body = next((line for line in body.split(b"\n") if line.startswith(b"data: ")), b"").removeprefix(b"data: ")
    elif start["status"] != 503:
        return None
    try:
        said = json.loads(body)
        error = said["error"]
        full = start["status"] == 503 and error["type"] != FAILED
    except (ValueError, LookupError, TypeError):
        return None
    if start["status"] == 200 and not isinstance(error, dict):
        return {"error": {"message": str(error)}}
    return None if full else said


def as_error(said: dict[str, Any]) -> tuple[Message, Message]:
    """The two messages of an answer that is this error.

    What is not the client's fault may go well elsewhere. 503 says that this replica is full, 502 that its engine
    failed. Its words stand in a header too, as the gateway drops the body of what it sends on to the next replica.
    """
    error = said["error"]
    code = error.get("code")
    full = code == 503 and error.get("type") == FULL
    if code is None and error.get("type") == INVALID:
        code = 400
    status = code if isinstance(code, int) and 400 <= code < 500 else 503 if full else 502
    words = b" ".join(str(error.get("message", "")).encode("ascii", "replace").split())[:500]
    failure = [(b"x-failure", words)] if status == 502 else []
    return (
        {"type": "http.response.start", "status": status, "headers": [*HEADERS, *failure]},
        {"type": "http.response.body", "body": json.dumps(said).encode()},
    )
