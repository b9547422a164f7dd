"""ASGI middleware: a replica that gives up its GPUs' memory while nobody asks for its model (vLLM's sleep mode).

It begins asleep, so that replicas which share GPUs can load one after the other. The gateway decides when it wakes and
sleeps (nginx/njs/sleep.js); this is what holds it to that without losing a request. Told to sleep, it finishes what it
has first. What comes meanwhile, and until it is awake again, waits here: bounded in number, bytes and time, and a
client that hangs up frees its place. Beyond that it gets 503 with `X-Refusal: asleep`.

    GET /is_sleeping   what it is; the answers of /health have the same in the header X-Sleep
    POST /sleep        sleep once nothing runs; answers at once
    POST /wake_up      wake; answers at once

These stand in the place of vLLM's own routes of the same names. Those would need VLLM_SERVER_DEV_MODE, which opens
routes that change weights and call any function of the engine; here they stay closed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Literal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
State = Literal["awake", "closing", "asleep", "waking"]

# What may wait here together; the gateway's own limits are larger, and there may be several gateways.
HELD = 512
HELD_BYTES = 256 * 2**20
STOPPED = "it is being stopped"
# Its level 2 keeps the weights nowhere, so they are loaded again.
DISCARDED = 2
# For the answers of those that wait to get out.
LAST_S = 1
logger = logging.getLogger("vllm.fleet")


@dataclass(frozen=True)
class Told:
    """What a replica says of its sleep; times in seconds."""

    is_sleeping: bool
    # closing: finishes what it has, then sleeps
    state: State
    # in this state
    seconds: float
    # awake, and without a request since so long
    idle: float
    # how long the first of those that wait for it has waited; None where nobody does
    wanted: float | None
    # why it did not wake, the last time that it was told to
    failure: str
    # names of what it shares with other replicas: of those that name the same one only one may be awake
    gpus: list[str]


class Naps:
    """When a replica sleeps, and who waits for it. `nap` and `wake` are the engine's, and return when it is done.

    It begins awake. A request waits for `wake_s` seconds at most.
    """

    def __init__(
        self,
        nap: Callable[[], Awaitable[object]],
        wake: Callable[[], Awaitable[object]],
        wake_s: float,
        gpus: list[str],
    ) -> None:
        self._nap, self._wake = nap, wake
        self._wake_s = wake_s
        self._gpus = gpus
        self.state: State = "awake"
        self._since = self._rested = time.monotonic()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        # What each of those that wait is told, '' to begin or why it can't, and when it began to wait.
        self._held: dict[asyncio.Future[str], float] = {}
        self._failure = ""
        self._stopped = False
        # of the bodies of those that wait
        self.held_bytes = 0
        self._task: asyncio.Task[None] | None = None

    def told(self) -> Told:
        """What it is now."""
        now = time.monotonic()
        return Told(
            is_sleeping=self.state in ("asleep", "waking"),
            state=self.state,
            seconds=round(now - self._since, 1),
            idle=round(now - self._rested, 1) if self.state == "awake" and not self._running else 0,
            wanted=round(now - min(self._held.values()), 1) if self._held else None,
            failure=self._failure,
            gpus=self._gpus,
        )

    def sleep(self) -> None:
        """Sleeps once nothing runs."""
        if self.state == "awake":
            self._become("closing")
            self._task = asyncio.create_task(self._close())

    def wake_up(self) -> None:
        """Wakes, if it sleeps."""
        if self.state == "asleep":
            self._become("waking")
            self._task = asyncio.create_task(self._awaken())

    def stop(self) -> None:
        """The replica ends: nobody waits for it any more."""
        self._stopped = True
        self._release(STOPPED)

    async def enter(self, gone: asyncio.Future[Any]) -> str:
        """Lets a request begin, when it may: '', or why it can't. `leave` has to follow the first.

        It ends with 'gone' where that future is done before.
        """
        until = time.monotonic() + self._wake_s
        while self.state != "awake":
            if self._stopped:
                return STOPPED
            if len(self._held) >= HELD:
                return f"{HELD} requests wait for it already"
            began: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            self._held[began] = until - self._wake_s
            try:
                wait = max(0.0, until - time.monotonic())
                await asyncio.wait({began, gone}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            finally:
                del self._held[began]
            if gone.done():
                return "gone"
            if not began.done():
                return f"after {self._wake_s:g} s it was still asleep"
            if began.result():
                return began.result()
        self._running += 1
        self._idle.clear()
        return ""

    def leave(self) -> None:
        """A request that had begun is over."""
        self._running -= 1
        if not self._running:
            self._rested = time.monotonic()
            self._idle.set()

    def _become(self, state: State) -> None:
        self.state = state
        self._since = time.monotonic()

    def _open(self) -> None:
        self._become("awake")
        self._rested = self._since
        self._release("")

    def _release(self, why: str) -> None:
        for waits in self._held:
            if not waits.done():
                waits.set_result(why)

    async def _close(self) -> None:
        await self._idle.wait()
        try:
            await self._nap()
        except Exception:
            logger.exception("the engine could not be put to sleep")
            self._open()
            return
        self._become("asleep")

    async def _awaken(self) -> None:
        try:
            await self._wake()
        except Exception as error:
            logger.exception("the engine did not wake")
            self._failure = f"it could not wake: {error or type(error).__name__}"
            self._become("asleep")
            self._release(self._failure)
            return
        self._failure = ""
        self._open()


class Sleeper:
    """Wraps the application; the environment says how: SLEEP_LEVEL, WAKE_SECONDS, SHARED_GPUS (launch.py)."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._level = int(os.environ["SLEEP_LEVEL"])
        self._wake_s = float(os.environ["WAKE_SECONDS"])
        self._gpus = list(filter(None, os.environ.get("SHARED_GPUS", "").split(",")))
        self._naps: Naps | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, at once or when the engine is awake."""
        if scope["type"] == "lifespan":
            self._begin(scope["app"])
        if scope["type"] != "http" or not self._naps:
            await self.app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        if path == "/health":
            await self.app(scope, receive, lambda message: send(self._shown(message)))
        elif (method, path) in (("GET", "/is_sleeping"), ("POST", "/sleep"), ("POST", "/wake_up")):
            if path == "/sleep":
                self._naps.sleep()
            elif path == "/wake_up":
                self._naps.wake_up()
            await answer(send, 200, asdict(self._naps.told()))
        elif method != "POST":
            await self.app(scope, receive, send)
        elif any(name == b"x-request-id" for name, _ in scope["headers"]):
            await self._in_turn(self._naps, scope, receive, send)
        elif self._naps.told().is_sleeping:
            # A gateway names each request that it passes on. What has no name asks whether the engine lives.
            await refuse(send, "it sleeps")
        else:
            await self.app(scope, receive, send)

    def _begin(self, application: Any) -> None:
        """The server starts: the engine is loaded, and sleeps until somebody wants it."""
        engine, loop = application.state.engine_client, asyncio.get_running_loop()
        naps = self._naps = Naps(
            lambda: engine.sleep(self._level, "wait"),
            lambda: wake(engine, self._level),
            self._wake_s,
            self._gpus,
        )
        naps.sleep()
        before = signal.getsignal(signal.SIGTERM)

        def stop(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(naps.stop)
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, stop)

    def _shown(self, message: Message) -> Message:
        """The beginning of an answer of /health, with what the replica is."""
        if message["type"] != "http.response.start" or not self._naps:
            return message
        told = json.dumps(asdict(self._naps.told())).encode()
        return {**message, "headers": [*message.get("headers", []), (b"x-sleep", told)]}

    async def _in_turn(self, naps: Naps, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on when the engine is awake."""
        if naps.state == "awake":
            # nothing is awaited until it counts as running
            await naps.enter(asyncio.get_running_loop().create_future())
            try:
                await self.app(scope, receive, send)
            finally:
                naps.leave()
            return
        body = Body(naps, receive)
        try:
            why = await naps.enter(body.reading)
            if why:
                await refuse(send, body.why or why)
                return
            body.begin()
            try:
                await self.app(scope, body.came.get, send)
            finally:
                naps.leave()
        finally:
            body.end()


class Body:
    """A request's body, taken while the request waits: the gateway would else give up on it. `reading` is done when the
    client is gone, or when too much waits; `why` then says so."""

    def __init__(self, naps: Naps, receive: Receive) -> None:
        self.came: asyncio.Queue[Message] = asyncio.Queue()
        self.why = ""
        self._naps = naps
        self._waits = True
        self._bytes = 0
        self.reading = asyncio.create_task(self._read(receive))

    def begin(self) -> None:
        """The request waits no longer; what is still to come of its body goes on."""
        self._waits = False
        self._naps.held_bytes -= self._bytes
        self._bytes = 0

    def end(self) -> None:
        """The request is over."""
        self.begin()
        self.reading.cancel()

    async def _read(self, receive: Receive) -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()
            self.came.put_nowait(message)
            if self._waits:
                size = len(message.get("body", b""))
                self._bytes += size
                self._naps.held_bytes += size
                if self._naps.held_bytes > HELD_BYTES:
                    self.why = f"{HELD_BYTES // 2**20} MiB of requests wait for it already"
                    return


async def wake(engine: Any, level: int) -> None:
    """Wakes an engine that sleeps at this level. One that fails to may be half awake: this process then ends, and
    Docker starts it anew."""
    try:
        if level < DISCARDED:
            await engine.wake_up()
            return
        await engine.wake_up(["weights"])
        await engine.collective_rpc("reload_weights")
        await engine.wake_up(["kv_cache"])
    except Exception:
        asyncio.get_running_loop().call_later(LAST_S, os._exit, 1)
        raise


async def answer(send: Send, status: int, said: object, *headers: tuple[bytes, bytes]) -> None:
    """Answers with JSON."""
    head = [(b"content-type", b"application/json"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": json.dumps(said).encode()})


async def refuse(send: Send, why: str) -> None:
    """Answers that the request cannot wait for the engine any longer, in words that the gateway passes on."""
    words = " ".join(why.encode("ascii", "replace").decode().split())[:500]
    refusal = (b"x-refusal", b"draining" if why == STOPPED else b"asleep")
    said = {"error": {"message": words, "type": "unavailable", "param": None, "code": "asleep"}}
    await answer(send, 503, said, refusal, (b"x-failure", words.encode()), (b"retry-after", b"5"))
