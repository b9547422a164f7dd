"""A streaming client that notes what became of each request; the load of `make chaos` and `make bench`."""

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Self

import aiohttp

from lab.http import key_headers

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def text(rng: random.Random, tokens: int) -> str:
    """Words of no language, `tokens` tokens of four bytes."""
    syllables = rng.choices(SYLLABLES, k=tokens * 2)
    return " ".join("".join(syllables[at : at + 3]) for at in range(0, len(syllables), 3))[: tokens * 4]


@dataclass
class Outcome:
    """One request: times are seconds of `time.monotonic`; `first` and `last` are those of tokens."""

    sent: float
    replica: str | None = None
    status: int = 0
    first: float | None = None
    last: float | None = None
    ended: float = 0.0
    tokens: int = 0
    answer: str = ""
    retry_after: str | None = None
    error_event: bool = False
    done: bool = False
    why: str = ""
    cached_tokens: int = 0
    prompt_tokens: int = 0
    # why the gateway chose the replica
    reason: str | None = None

    @property
    def begun(self) -> bool:
        """Whether any token came."""
        return self.first is not None

    @property
    def refused(self) -> bool:
        """Whether the answer was a plain refusal of the client (4xx), 429 among them."""
        return 400 <= self.status < 500

    @property
    def failed(self) -> bool:
        """Not begun, and neither done nor refused: what must never happen."""
        return not self.begun and not self.done and not self.refused

    @property
    def cut(self) -> bool:
        """Begun, and not brought to its end."""
        return self.begun and not self.done

    @property
    def ttft(self) -> float:
        """Seconds to the first token (to the end where none came)."""
        return (self.first or self.ended) - self.sent


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, object],
    patience: float,
    retries: int = 0,
    key: str = "",
) -> Outcome:
    """Sends one chat request, streamed, and reads it to its end.

    A pause of more than `patience` seconds ends it. `retries` is how often it is sent again when the connection is lost
    before any byte of an answer, as the OpenAI client does (twice by default). `key` is sent where one is asked for.
    """
    outcome = Outcome(time.monotonic())
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        sending = session.post(url + "/v1/chat/completions", data=payload, headers=headers)
        async with await asyncio.wait_for(sending, patience) as answer:
            outcome.status = answer.status
            outcome.replica = answer.headers.get("x-replica")
            outcome.reason = answer.headers.get("x-route-reason")
            outcome.retry_after = answer.headers.get("retry-after")
            if answer.status != 200:
                outcome.why = (await asyncio.wait_for(answer.text(), patience))[:200]
            else:
                async with contextlib.aclosing(events(answer, patience)) as found:
                    async for event in found:
                        note(outcome, event)
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as why:
        outcome.why = f"{type(why).__name__}: {why}"
        if retries and outcome.status == 0 and not isinstance(why, TimeoutError):
            again = await stream(session, url, body, patience, retries - 1, key)
            again.sent = outcome.sent
            return again
    outcome.ended = time.monotonic()
    return outcome


async def events(answer: aiohttp.ClientResponse, patience: float) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event."""
    rest = b""
    broken: Exception | None = None
    while True:
        try:
            data = await asyncio.wait_for(answer.content.readany(), patience)
        except aiohttp.ClientPayloadError as why:
            # aiohttp tells of the break before it gives the data that came ahead of it.
            data, broken = b"".join(answer.content._buffer), why  # noqa: SLF001 - nothing else has it
        if not data and not broken:
            return
        *whole, rest = (rest + data).split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    yield line[6:]
        if broken:
            raise broken


def note(outcome: Outcome, event: bytes) -> None:
    """Takes one event into the outcome."""
    if event == b"[DONE]":
        outcome.done = not outcome.error_event
        return
    data = json.loads(event)
    if "error" in data:
        outcome.error_event = True
        outcome.why = str(data["error"].get("message"))
        return
    if usage := data.get("usage"):
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    for choice in data.get("choices", []):
        if content := choice["delta"].get("content"):
            outcome.last = time.monotonic()
            outcome.first = outcome.first or outcome.last
            outcome.tokens += 1
            outcome.answer += content


def session() -> aiohttp.ClientSession:
    """A client without limits of its own: each client of a load keeps its connection. It brings $FLEET_KEY."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20, headers=key_headers())


@dataclass
class SteadyLoad:
    """`clients` clients, each sending one streamed request after the other until `stop`.

    `patience` is the longest wait for a token, in seconds, before a request counts as lost. A conversation has `turns`
    turns.
    """

    url: str
    model: str
    clients: int = 16
    prompt_tokens: int = 60
    max_tokens: int = 30
    patience: float = 15.0
    turns: int = 3
    retries: int = 0
    seed: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._session = session()
        self._stop = asyncio.Event()
        self._numbers = itertools.count()
        self._tasks = [asyncio.create_task(self._client(n)) for n in range(self.clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Lets each client end the request that it is at."""
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._session.close()

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not self._stop.is_set():
            messages: list[dict[str, str]] = []
            for _ in range(self.turns):
                messages.append({"role": "user", "content": text(rng, self.prompt_tokens)})
                body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0}
                outcome = await stream(self._session, self.url, body, self.patience, self.retries)
                self.outcomes.append(outcome)
                messages.append({"role": "assistant", "content": outcome.answer})
                if self._stop.is_set():
                    return
                if not outcome.done:
                    await asyncio.sleep(0.05)  # a refused client does not spin
                    break

    async def settle(self, requests: int, seconds: float = 20.0) -> None:
        """Waits until `requests` more requests have ended; TimeoutError where they have not."""
        before = len(self.outcomes)
        end = time.monotonic() + seconds
        while len(self.outcomes) < before + requests:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(self.outcomes) - before} of {requests} requests ended in {seconds:.0f} s")
            await asyncio.sleep(0.02)
