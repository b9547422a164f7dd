"""The simulated engine: continuous batching over a paged KV cache with prefix caching, after vLLM's v1 scheduler.

Model of time. The engine works in steps. A step takes

    (step_ms + seq_ms * requests that get a token + prefill_ms * prompt tokens computed) * slow

and computes at most `batch_tokens` tokens: for the running requests first, in the order in which they began, one token
each or the next piece of a prompt; and while tokens are left over, for those that wait, by priority (lower is sooner)
and arrival. So a long prompt is computed in pieces over several steps (chunked prefill), and who waits begins at the
next step that has tokens left, but pushes nobody out. A request whose prompt is computed gets its first token in that
step. So TTFT grows with the uncached prompt and with the queue, ITL grows with the batch and with prompts computed
beside it. This is `Scheduler.schedule` of vLLM 0.32 with `--scheduling-policy priority`.

Model of memory. A token is four bytes of text, a block `BLOCK` tokens, the cache `kv_blocks` blocks. A block is known
by the hash of all text up to its end. A request takes the cached blocks that its prompt begins with and reserves all
others up to its last token at admission. (vLLM takes them one by one, and preempts the running request of the lowest
priority where there is none left; the sum is the same.) Full blocks of
prompt and answer stay when it ends, and go least recently used first. The prompt's last token is always computed, as in
vLLM.

What it leaves out: the cost of attention over long contexts, CUDA graphs' steps in batch size, preemption, speculative
decoding. `tests/stack/test_sim_shape.py` compares the shape with the real engine.
"""

import asyncio
import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field

BLOCK = 16
TOKEN_BYTES = 4


@dataclass
class Shape:
    """What an engine is: times in milliseconds, sizes in tokens and blocks."""

    step_ms: float = 10.0
    seq_ms: float = 0.2
    prefill_ms: float = 0.05
    batch_tokens: int = 2048
    max_running: int = 64
    max_waiting: int = 256
    kv_blocks: int = 8192
    max_model_len: int = 32768
    answer_tokens: int = 4096  # where an answer ends by itself


@dataclass
class Request:
    """One generation. `tokens` yields each token's index as it is made, then None; it is what the API side reads."""

    prompt: bytes
    max_tokens: int
    answer: bytes
    arrived: float
    priority: int = 0
    tokens: "asyncio.Queue[int | None]" = field(default_factory=asyncio.Queue)
    hashes: list[int] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    private: int = 0
    cached_tokens: int = 0
    computed: int = 0
    made: int = 0
    first_token_at: float = 0.0
    gone: bool = False

    @property
    def prompt_tokens(self) -> int:
        """The prompt in tokens, one at least."""
        return max(1, -(-len(self.prompt) // TOKEN_BYTES))


class QueueFullError(Exception):
    """The waiting queue is at its cap."""


def block_hashes(text: bytes, known: list[int]) -> list[int]:
    """The chained hashes of the full blocks of `text`, going on from those already `known`."""
    size = BLOCK * TOKEN_BYTES
    hashes = list(known)
    for start in range(len(hashes) * size, len(text) - size + 1, size):
        hashes.append(hash((hashes[-1] if hashes else 0, text[start : start + size])))
    return hashes


class Blocks:
    """The block pool. `users` counts each cached block's requests, `idle` holds those without any, oldest first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.users: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.private = 0

    @property
    def used(self) -> int:
        """Blocks that requests hold now."""
        return self.private + len(self.users) - len(self.idle)

    def prefix(self, hashes: list[int], limit: int) -> list[int]:
        """The longest run of cached blocks, at most `limit`, that a prompt begins with."""
        found = []
        for digest in hashes[:limit]:
            if digest not in self.users:
                break
            found.append(digest)
        return found

    def admit(self, pinned: list[int], private: int) -> bool:
        """Pins cached blocks and reserves `private` new ones; False, and nothing done, when there is no room."""
        idle_pinned = sum(1 for digest in pinned if self.users[digest] == 0)
        if self.used + idle_pinned + private > self.size:
            return False
        for digest in pinned:
            self.users[digest] += 1
            self.idle.pop(digest, None)
        self.private += private
        self._trim()
        return True

    def publish(self, digest: int) -> None:
        """Turns one private block into a cached one with one user."""
        self.private -= 1
        self.users[digest] = self.users.get(digest, 0) + 1
        self.idle.pop(digest, None)

    def release(self, pinned: list[int], private: int) -> None:
        """Gives blocks back; the end of a sequence becomes the oldest, so that it is dropped before its beginning."""
        self.private -= private
        for digest in reversed(pinned):
            self.users[digest] -= 1
            if self.users[digest] == 0:
                self.idle[digest] = None
        self._trim()

    def _trim(self) -> None:
        while self.private + len(self.users) > self.size:
            digest, _ = self.idle.popitem(last=False)
            del self.users[digest]


class Engine:
    """Runs requests in steps. `slow` stretches time; `hung` stops all work, as a wedged engine does; `preempting`
    counts each step in which the next request finds no room in the cache: vLLM would have put one back."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.blocks = Blocks(shape.kv_blocks)
        # A heap: priority, number of arrival, request.
        self.waiting: list[tuple[int, int, Request]] = []
        self.running: list[Request] = []
        self.slow = 1.0
        self.hung = False
        self.preempting = False
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._wake = asyncio.Event()
        self._numbers = itertools.count()

    def submit(self, request: Request) -> None:
        """Queues a request; raises `QueueFullError` at the queue's cap."""
        if len(self.waiting) >= self.shape.max_waiting:
            raise QueueFullError
        heapq.heappush(self.waiting, (request.priority, next(self._numbers), request))
        self._wake.set()

    def abort(self, request: Request) -> None:
        """Forgets a request whose client is gone; its blocks are free after the step in progress."""
        request.gone = True
        self._wake.set()

    def wake(self) -> None:
        """Call after a change of `hung`."""
        self._wake.set()

    async def run(self) -> None:
        """Steps for ever."""
        loop = asyncio.get_running_loop()
        clock = loop.time()
        while True:
            self._drop_gone()
            planned = None if self.hung else self._plan()
            if not planned:
                self._wake.clear()
                await self._wake.wait()
                clock = loop.time()
                continue
            decoding, prefilled, millis = planned
            # Counted from the step before, so that the time Python needs for a step is not added to it.
            clock = max(clock + millis / 1000 * self.slow, loop.time())
            await asyncio.sleep(clock - loop.time())
            if not self.hung:
                self._deliver(decoding, prefilled, loop.time())

    def _drop_gone(self) -> None:
        if any(request.gone for _, _, request in self.waiting):
            self.waiting = [entry for entry in self.waiting if not entry[2].gone]
            heapq.heapify(self.waiting)
        for request in [request for request in self.running if request.gone]:
            self._finish(request)

    def _admit(self) -> Request | None:
        """Lets the first of those that wait begin, if there is room for it."""
        if not self.waiting or len(self.running) >= self.shape.max_running:
            return None
        request = self.waiting[0][2]
        if not request.hashes:
            request.hashes = block_hashes(request.prompt, [])
        cached = self.blocks.prefix(request.hashes, (request.prompt_tokens - 1) // BLOCK)
        private = -(-(request.prompt_tokens + request.max_tokens) // BLOCK) - len(cached)
        if not self.blocks.admit(cached, private):
            self.preemptions += self.preempting
            return None
        heapq.heappop(self.waiting)
        self.running.append(request)
        request.pinned, request.private = cached, private
        request.cached_tokens = request.computed = len(cached) * BLOCK
        self.prefix_queries += request.prompt_tokens
        self.prefix_hits += request.cached_tokens
        return request

    def _plan(self) -> tuple[list[Request], list[tuple[Request, int]], float] | None:
        """What the next step computes: whose next token, how much of whose prompt, and how long it takes in ms."""
        budget = self.shape.batch_tokens
        decoding: list[Request] = []
        prefilled: list[tuple[Request, int]] = []
        begun = iter(list(self.running))
        while budget > 0 and (request := next(begun, None) or self._admit()):
            left = request.prompt_tokens - request.computed
            if left > 0:
                prefilled.append((request, min(left, budget)))
            else:
                decoding.append(request)
            budget -= min(max(left, 1), budget)
        if not decoding and not prefilled:
            return None
        computed = sum(piece for _, piece in prefilled)
        shape = self.shape
        return decoding, prefilled, shape.step_ms + shape.seq_ms * len(decoding) + shape.prefill_ms * computed

    def _deliver(self, decoding: list[Request], prefilled: list[tuple[Request, int]], now: float) -> None:
        for request, piece in prefilled:
            request.computed += piece
            if request.computed == request.prompt_tokens:
                self.prompt_tokens += request.prompt_tokens
                for digest in request.hashes[len(request.pinned) :]:
                    self.blocks.publish(digest)
                    request.private -= 1
                    request.pinned.append(digest)
                request.first_token_at = now
                decoding.append(request)
        for request in decoding:
            self.generation_tokens += 1
            request.tokens.put_nowait(request.made)
            request.made += 1
            if request.made >= request.max_tokens:
                self._finish(request)
                request.tokens.put_nowait(None)

    def _finish(self, request: Request) -> None:
        self.running.remove(request)
        if request.made:
            whole = request.prompt + request.answer[: request.made * TOKEN_BYTES]
            for digest in block_hashes(whole, request.hashes)[len(request.hashes) :]:
                self.blocks.publish(digest)
                request.private -= 1
                request.pinned.append(digest)
        self.blocks.release(request.pinned, request.private)
