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
        stream, late = (asyncio.create_task(ask(server, path)) for path in ("/stream", "/late"))
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(handler_of_vllm.wait(), 5)
        assert (await ask(server, "/v1/chat/completions"))[0] == 503
        assert (await ask(server, "/health"))[0] == 503
        assert await ask(server, "/metrics") == (200, True)
        release.set()
        assert await stream == (200, True)
        assert (await late)[0] == 503

    asyncio.run(scenario())


@pytest.mark.parametrize(("errored", "status"), [(False, 500), (True, 503)])
def test_a_request_goes_elsewhere_when_the_engine_died_and_not_when_it_broke_something(
    errored: bool, status: int
) -> None:
    async def app(_request: Message, _receive: Receive, send: Send) -> None:
        await send(FAILED)
        await send(END)

    assert asyncio.run(ask(drain.Drain(app), "/v1/completions", errored)) == (status, True)
