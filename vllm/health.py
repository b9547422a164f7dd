"""The replica's health check: exit status 0 when it can answer, 1 and one line when it cannot.

`/health` of vLLM says only that the process lives, and a port that is open says less. What counts here is that the
engine makes progress:

- The engine's step counter has moved since the last check: it works, nothing is sent. However slow the steps are, a
  replica that makes them is healthy.
- It stands still while requests run, or nothing is known yet: the replica must answer a request for one token.
- It stands still and nothing runs: the same, but only once a minute, as an idle replica should stay idle.
- It is asleep (sleeper.py): that is healthy, and nothing wakes it. Waking may take ten minutes.

Docker does not restart a container that is not healthy. So a replica that has worked, and then is found wedged, is
ended here; the restart policy brings it back, and what waited at it moves on. Wedged is one that failed three checks in
a row while its processes hardly computed anything. One that computes may only be at a very long step, or spins in a
dead collective operation: it gets ten minutes without a step.

What the last check saw is kept in a file that goes with the container.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

SEEN = Path("/tmp/health.json")  # noqa: S108 - a file system of this container's own
PID = Path("/tmp/replica.pid")  # noqa: S108 - the same; written by launch.py
PROC = Path("/proc")
PORT = 8000
# The first token after the start may take its time.
FIRST_TIMEOUT_S, TIMEOUT_S = 25, 10
# All requests of a check together: below Docker's own limit, 30 s, after which nothing would be noted of it.
LIMIT_S = 25
IDLE_PROBE_EVERY_S = 60
FAILURES_OF_A_WEDGED = 3
BUSY_CORES = 0.5
BUSY_MAY_FAIL_S = 600
STEPS = "vllm:iteration_tokens_total_count"
RUNNING = ("vllm:num_requests_running", "vllm:num_requests_waiting")
# A model that makes no text has no first one.
ONE_TOKEN = (
    ("/v1/completions", {"prompt": "1", "max_tokens": 1}),
    ("/v1/embeddings", {"input": "1"}),
    ("/pooling", {"input": "1"}),
)


@dataclass(frozen=True)
class Seen:
    """What the last check saw; times are seconds of the monotonic clock."""

    steps: float  # of the engine so far
    proved_at: float  # when the replica last showed that it works
    failures: int = 0  # checks that failed since
    failing_since: float = 0
    cpu_s_then: float = 0  # that its processes had used when the first of them failed


class Replica:
    """The replica, to be asked in one check: each request has `timeout_s` seconds, all together LIMIT_S."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until = time.monotonic() + LIMIT_S

    def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and body of one request. Raises OSError where none comes in time."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {LIMIT_S} s")
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=min(left, self._timeout_s))
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def total(metrics: str, *names: str) -> float:
    """The sum of all samples of these metrics."""
    samples = (line for line in metrics.splitlines() if line.startswith(names))
    return sum(float(line.rsplit(" ", 1)[1]) for line in samples if line.split("{")[0].split(" ")[0] in names)


def cpu_seconds() -> float:
    """Seconds that all processes of this container have computed."""
    ticks = 0
    for stat in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it just ended
            ticks += sum(int(field) for field in stat.read_text().rpartition(")")[2].split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def must_ask(last: Seen | None, steps: float, running: float, now: float) -> bool:
    """Whether a request for one token is needed to know that the replica works."""
    if last is None or steps < last.steps:
        return True
    if steps > last.steps:
        return False
    return running > 0 or last.failures > 0 or now - last.proved_at >= IDLE_PROBE_EVERY_S


def ask_for_one_token(replica: Replica) -> None:
    """Returns when the replica answered. Raises RuntimeError where it refused."""
    model = json.loads(replica.request("GET", "/v1/models")[1])["data"][0]["id"]
    for path, body in ONE_TOKEN:
        status, answer = replica.request("POST", path, {"model": model, **body})
        if status == http.HTTPStatus.NOT_FOUND:
            continue
        if status != http.HTTPStatus.OK:
            raise RuntimeError(f"{path} answered {status}: {answer[:200].decode(errors='replace')}")
        return
    raise RuntimeError("no endpoint that answers for this model")


def sleeps(replica: Replica) -> bool:
    """Whether it is asleep, or wakes. Raises RuntimeError where it does not wake."""
    status, answer = replica.request("GET", "/is_sleeping")
    if status != http.HTTPStatus.OK:
        return False
    told = json.loads(answer)
    if told["state"] == "waking" and told["seconds"] > BUSY_MAY_FAIL_S:
        raise RuntimeError(f"it has been waking for {told['seconds']:.0f} s")
    return bool(told["is_sleeping"])


def look(last: Seen | None) -> Seen:
    """Checks the replica. Raises where it cannot answer."""
    now, replica = time.monotonic(), Replica(TIMEOUT_S if last else FIRST_TIMEOUT_S)
    if sleeps(replica):
        return Seen(last.steps if last else 0, now)
    metrics = replica.request("GET", "/metrics")[1].decode()
    steps = total(metrics, STEPS)
    if must_ask(last, steps, total(metrics, *RUNNING), now):
        ask_for_one_token(replica)
    elif last and steps == last.steps:
        return last  # idle
    return Seen(steps, now)


def count_failure(last: Seen) -> Seen:
    """What is known after one more check failed."""
    if last.failures:
        return replace(last, failures=last.failures + 1)
    return replace(last, failures=1, failing_since=time.monotonic(), cpu_s_then=cpu_seconds())


def is_wedged(seen: Seen) -> bool:
    """Whether failed checks mean that the replica will not come back by itself."""
    failing_s = time.monotonic() - seen.failing_since
    if cpu_seconds() - seen.cpu_s_then > BUSY_CORES * failing_s:
        return failing_s >= BUSY_MAY_FAIL_S
    return seen.failures >= FAILURES_OF_A_WEDGED


def main() -> int:
    """Checks the replica once."""
    last = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        last = Seen(**json.loads(SEEN.read_text(encoding="utf-8")))
    try:
        seen = look(last)
    except (OSError, http.client.HTTPException, ValueError, LookupError, RuntimeError) as error:
        print(f"not healthy: {error or type(error).__name__}")
        if last is None:
            return 1  # it is still loading
        seen = count_failure(last)
    SEEN.write_text(json.dumps(asdict(seen)), encoding="utf-8")
    if not seen.failures:
        return 0
    if is_wedged(seen):
        with contextlib.suppress(OSError):  # the log of the container
            (PROC / "1/fd/2").write_text("health: the replica lives but makes no token; ended, to start anew\n")
        os.kill(int(PID.read_text()), signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(main())
