"""A replica that sleeps: the middleware around a small ASGI application and an engine that takes its time."""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm import sleeper
from vllm.sleeper import Message, Naps, Receive, Send, Sleeper

Scenario = Callable[["World"], Awaitable[None]]


class World:
    """A replica: its engine, its application, and clients."""

    def __init__(self) -> None:
        self.engine: list[object] = []  # what the engine was told
        self.running = 0
        self.bodies: list[bytes] = []
        self.release = asyncio.Event()  # lets what runs in the application end
        self.fails = False
        self.app = SimpleNamespace(state=SimpleNamespace(engine_client=self))
        self.replica = Sleeper(self.run)

    async def sleep(self, level: int, mode: str) -> None:
        assert not self.running
        self.engine.append(("sleep", level, mode))

    async def wake_up(self, tags: list[str] | None = None) -> None:
        if self.fails:
            raise RuntimeError("CUDA error: out of memory")
        self.engine.append(("wake_up", tags))

    async def collective_rpc(self, method: str) -> None:
        self.engine.append(method)

    async def run(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        body = b""
        if scope["method"] == "POST":
            more = True
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
            self.bodies.append(body)
            self.running += 1
            await self.release.wait()
            self.running -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def ask(
        self, path: str, method: str = "POST", body: tuple[bytes, ...] = (b"x",), request_id: bool = True
    ) -> tuple[int, dict[str, str], bytes]:
        """A client that stays until it has its answer: status, headers and body."""
        parts: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        parts[-1]["more_body"] = False
        sent: list[Message] = []

        async def receive() -> Message:
            if not parts:
                await asyncio.Event().wait()
            return parts.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"x-request-id", b"r")] if request_id else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "app": self.app}
        await self.replica(scope, receive, send)
        head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], head, sent[1]["body"]

    async def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await self.ask("/is_sleeping", "GET"))[2])
        return found

    async def until(self, state: str) -> None:
        """Returns when the replica is in this state."""
        async with asyncio.timeout(5):
            while (await self.told())["state"] != state:
                await asyncio.sleep(0)

    async def waiting(self, count: int) -> None:
        """Returns when so many wait for it."""
        async with asyncio.timeout(5):
            while not self.replica._naps or len(self.replica._naps._held) != count:
                await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def keep_sigterm() -> Iterator[None]:
    """Puts back the handler that a test replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a scenario with a replica that has begun, and sleeps."""

    def run(scenario: Scenario, level: int = 1, wake_s: float = 30) -> None:
        for name, value in {"SLEEP_LEVEL": level, "WAKE_SECONDS": wake_s, "SHARED_GPUS": "0,1"}.items():
            monkeypatch.setenv(name, str(value))

        async def whole() -> None:
            world = World()
            await world.replica({"type": "lifespan", "app": world.app}, None, None)  # type: ignore[arg-type]
            await world.until("asleep")
            await scenario(world)

        asyncio.run(whole())

    return run


def test_it_begins_asleep_and_says_so(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        assert world.engine == [("sleep", 1, "wait")]
        status, head, _ = await world.ask("/health", "GET")
        assert (status, json.loads(head["x-sleep"])) == (200, await world.told())
        told = await world.told()
        assert (told["is_sleeping"], told["gpus"], told["wanted"]) == (True, ["0", "1"], None)
        assert (await world.ask("/metrics", "GET"))[0] == 200

    play(scenario)


def test_what_comes_while_it_sleeps_waits_with_its_body_and_runs_when_it_wakes(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        body = tuple(bytes([n]) * 100_000 for n in range(20))
        world.release.set()
        asked = [asyncio.create_task(world.ask("/v1/completions", body=body)) for _ in range(3)]
        await world.waiting(3)
        assert (await world.told())["wanted"] is not None
        assert not world.bodies
        assert (await world.ask("/wake_up"))[0] == 200
        assert [await one for one in asked] == [(200, {}, b"done")] * 3
        assert world.bodies == [b"".join(body)] * 3
        assert world.engine[1:] == [("wake_up", None)]
        assert world.replica._naps
        assert world.replica._naps.held_bytes == 0

    play(scenario)


def test_told_to_sleep_it_finishes_what_it_has_first(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        await world.ask("/wake_up")
        await world.until("awake")
        running = asyncio.create_task(world.ask("/v1/completions"))
        while not world.running:
            await asyncio.sleep(0)
        await world.ask("/sleep")
        late = asyncio.create_task(world.ask("/v1/completions", body=(b"late",)))
        await world.waiting(1)
        assert (await world.told())["state"] == "closing"
        assert world.engine[-1] == ("wake_up", None)
        world.release.set()
        assert (await running)[0] == 200
        await world.until("asleep")
        assert world.bodies == [b"x"]
        await world.ask("/wake_up")
        assert (await late)[0] == 200

    play(scenario)


def test_level_2_loads_the_weights_again(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        await world.ask("/wake_up")
        await world.until("awake")
        steps = [("wake_up", ["weights"]), "reload_weights", ("wake_up", ["kv_cache"])]
        assert world.engine == [("sleep", 2, "wait"), *steps]

    play(scenario, level=2)


def test_to_wake_and_to_sleep_twice_is_to_do_it_once(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        await asyncio.gather(*(world.ask("/wake_up") for _ in range(5)))
        await world.until("awake")
        await world.ask("/wake_up")
        await asyncio.gather(*(world.ask("/sleep") for _ in range(5)))
        await world.until("asleep")
        await world.ask("/sleep")
        assert [one[0] for one in world.engine if isinstance(one, tuple)] == ["sleep", "wake_up", "sleep"]

    play(scenario)


def test_one_that_waits_too_long_is_refused_with_the_reason(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        status, head, body = await world.ask("/v1/completions")
        assert (status, head["x-refusal"]) == (503, "asleep")
        assert head["x-failure"] == "after 0.05 s it was still asleep"
        assert json.loads(body)["error"]["message"] == head["x-failure"]
        assert (await world.told())["wanted"] is None

    play(scenario, wake_s=0.05)


def test_a_client_that_hangs_up_frees_its_place(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        gone = asyncio.Event()
        sent: list[Message] = []

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        head = [(b"x-request-id", b"r")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": head, "app": world.app}
        asked = asyncio.create_task(world.replica(scope, receive, send))
        await world.waiting(1)
        gone.set()
        await asked
        await world.waiting(0)

    play(scenario)


def test_those_that_wait_are_bounded_in_number_and_in_bytes(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleeper, "HELD", 2)
    monkeypatch.setattr(sleeper, "HELD_BYTES", 2**20)

    async def scenario(world: World) -> None:
        world.release.set()
        first = asyncio.create_task(world.ask("/v1/completions", body=(b"a" * 700_000,)))
        await world.waiting(1)
        status, head, _ = await world.ask("/v1/completions", body=(b"b" * 700_000,))
        assert (status, head["x-failure"]) == (503, "1 MiB of requests wait for it already")
        second = asyncio.create_task(world.ask("/v1/completions"))
        await world.waiting(2)
        status, head, _ = await world.ask("/v1/completions")
        assert (status, head["x-failure"]) == (503, "2 requests wait for it already")
        await world.ask("/wake_up")
        assert [(await first)[0], (await second)[0]] == [200, 200]

    play(scenario)


def test_what_asks_whether_the_engine_lives_neither_waits_nor_wakes_it(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        status, head, _ = await world.ask("/v1/completions", request_id=False)
        assert (status, head["x-refusal"]) == (503, "asleep")
        assert (await world.told())["state"] == "asleep"
        world.release.set()
        await world.ask("/wake_up")
        await world.until("awake")
        assert (await world.ask("/v1/completions", request_id=False))[0] == 200

    play(scenario)


def test_an_engine_that_does_not_wake_ends_the_process_and_those_that_wait_are_told(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleeper, "LAST_S", 0.01)
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    async def scenario(world: World) -> None:
        world.fails = True
        asked = asyncio.create_task(world.ask("/v1/completions"))
        await world.waiting(1)
        await world.ask("/wake_up")
        status, head, _ = await asked
        assert (status, head["x-failure"]) == (503, "it could not wake: CUDA error: out of memory")
        async with asyncio.timeout(5):
            while not ended:
                await asyncio.sleep(0.01)
        assert ended == [1]

    play(scenario)


def test_a_replica_that_is_stopped_sends_away_who_waits(play: Callable[..., None]) -> None:
    before: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: before.append(number))

    async def scenario(world: World) -> None:
        asked = asyncio.create_task(world.ask("/v1/completions"))
        await world.waiting(1)
        os.kill(os.getpid(), signal.SIGTERM)
        status, head, _ = await asked
        assert (status, head["x-refusal"]) == (503, "draining")
        assert (await world.ask("/v1/completions"))[0] == 503
        assert before == [signal.SIGTERM]

    play(scenario)


def test_an_engine_that_does_not_fall_asleep_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async def nap() -> None:
            raise RuntimeError("no")

        async def wake() -> None:
            """Is not told to."""

        naps = Naps(nap, wake, 5, [])
        naps.sleep()
        assert await naps.enter(asyncio.get_running_loop().create_future()) == ""
        naps.leave()
        assert naps.state == "awake"

    asyncio.run(scenario())
    assert "could not be put to sleep" in caplog.text
