"""ASGI middleware: the header X-Vllm-Priority of vLLM 0.32 for vLLM 0.26, which knows it only in the body."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Priority:
    """Wraps the application: what the header says stands first in the body's JSON, which must say nothing of it."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        said = dict(scope.get("headers", ())).get(b"x-vllm-priority") if scope["type"] == "http" else None
        if said is None:
            await self.app(scope, receive, send)
            return
        first = True

        async def changed() -> Message:
            nonlocal first
            message = await receive()
            body = message.get("body", b"")
            if first and body.startswith(b"{"):
                first = False
                return {**message, "body": b'{"priority":%d,' % int(said) + body[1:]}
            return message

        await self.app(scope, changed, send)
