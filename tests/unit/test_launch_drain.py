"""A replica that is being stopped, or whose engine died: the middleware around a small ASGI application."""

import asyncio
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm import drain
from vllm.drain import Message, Receive, Send

START = {"type": "http.response.start", "status": 200, "headers": []}
FAILED = {**START, "status": 500}
END = {"type": "http.response.body", "body": b"end"}


def scope(path: str, errored: bool = False) -> Message:
    """A request to an application whose engine may have died."""
    state = SimpleNamespace(engine_client=SimpleNamespace(errored=errored))
    return {"type": "http", "path": path, "app": SimpleNamespace(state=state)}


async def receive() -> Message:
    """Nothing ever comes."""
    return {}


async def start_of(server: drain.Drain, path: str, errored: bool = False) -> Message:
    """How one answer begins, which has to come to its end."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await server(scope(path, errored), receive, send)
    assert messages[-1] == END
    return messages[0]


async def ask(server: drain.Drain, path: str, errored: bool = False) -> tuple[int, bool]:
    """Status of one answer, and whether it came to its end."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await server(scope(path, errored), receive, send)
    return messages[0]["status"], messages[-1] == END


@pytest.fixture(autouse=True)
def keep_sigterm() -> Iterator[None]:
    """Puts back the handler that a test replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_after_sigterm_new_requests_get_503_and_running_ones_go_on() -> None:
    async def scenario() -> None:
        release, handler_of_vllm = asyncio.Event(), asyncio.Event()

        async def app(request: Message, _receive: Receive, send: Send) -> None:
            if request["type"] == "lifespan":
                return
            if request["path"] == "/stream":
                await send(START)
            if request["path"] in ("/stream", "/late"):
                await release.wait()
            if request["path"] != "/stream":
                # the engine has closed before it was given what came late
                await send(FAILED if request["path"] == "/late" else START)
            await send(END)

        async def nothing(*_: Any) -> None:
            return None

        server = drain.Drain(app)
        # vLLM sets its handler before the application starts
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, handler_of_vllm.set)
        await server({"type": "lifespan"}, receive, nothing)
        assert await ask(server, "/health") == (200, True)
        stream, late = asyncio.create_task(ask(server, "/stream")), asyncio.create_task(start_of(server, "/late"))
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(handler_of_vllm.wait(), 5)
        refused: list[Message] = []

        async def keep(message: Message) -> None:
            refused.append(message)

        await server(scope("/v1/chat/completions"), receive, keep)
        assert refused[0]["status"] == 503
        assert drain.DRAINING in refused[0]["headers"]
        assert (await ask(server, "/health"))[0] == 503
        assert await ask(server, "/metrics") == (200, True)
        release.set()
        assert await stream == (200, True)
        said = await late
        assert said["status"] == 503
        assert drain.DRAINING in said["headers"]

    asyncio.run(scenario())


@pytest.mark.parametrize(("errored", "status", "said"), [(False, 500, []), (True, 502, [drain.DIED])])
def test_a_request_goes_elsewhere_when_the_engine_died_and_not_when_it_broke_something(
    errored: bool, status: int, said: list[tuple[bytes, bytes]]
) -> None:
    """As one that may be the cause: not as if there were no room."""

    async def app(_request: Message, _receive: Receive, send: Send) -> None:
        await send(FAILED)
        await send(END)

    start = asyncio.run(start_of(drain.Drain(app), "/v1/completions", errored))
    assert (start["status"], start["headers"]) == (status, said)
