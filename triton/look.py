"""Triton's health check: exit status 0 when each of its models that runs on vLLM can answer, 1 and one line when not.

Triton stays up when a backend's process or its engine has died, and answers every request with an error. So each model
must answer a request for one token, once in a while where it is idle. A Triton that has worked, and then fails three
checks in a row while its processes hardly compute anything, is ended here; the restart policy brings it back. One that
computes may only be busy: it gets ten minutes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import health
else:
    # it lies beside this file in the image
    import health

PID = Path("/tmp/triton.pid")  # noqa: S108 - of this container's own; start.py writes it
SEEN = Path("/tmp/triton.json")  # noqa: S108 - the same
MODELS = Path("/tmp/repository")  # noqa: S108 - the same
# An idle one is asked so seldom.
EVERY_S = 20
ONE_TOKEN = {"text_input": "1", "parameters": {"max_tokens": 1}}


def ask(triton: health.Replica) -> None:
    """Returns when Triton is ready and each model on vLLM has made a token. Raises RuntimeError where one has not."""
    if triton.request("GET", "/v2/health/ready")[0] != http.HTTPStatus.OK:
        raise RuntimeError("it is not ready")
    for model in sorted({file.parent.parent.name for file in MODELS.glob("*/*/model.json")}):
        status, answer = triton.request("POST", f"/v2/models/{model}/generate", ONE_TOKEN)
        if status != http.HTTPStatus.OK:
            raise RuntimeError(f"{model} answered {status}: {answer[:200].decode(errors='replace')}")


def main() -> int:
    """Checks Triton once."""
    last = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        last = health.Seen(**json.loads(SEEN.read_text(encoding="utf-8")))
    now = time.monotonic()
    if last and not last.failures and now - last.proved_at < EVERY_S:
        return 0
    try:
        ask(health.Replica(health.TIMEOUT_S if last else health.FIRST_TIMEOUT_S))
        seen = health.Seen(0, now)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        print(f"not healthy: {error or type(error).__name__}")
        if last is None:
            return 1  # it is still loading
        seen = health.count_failure(last)
    SEEN.write_text(json.dumps(asdict(seen)), encoding="utf-8")
    if not seen.failures:
        return 0
    if health.is_wedged(seen):
        with contextlib.suppress(OSError):  # the log of the container
            (health.PROC / "1/fd/2").write_text("look: Triton lives but makes no token; ended, to start anew\n")
        os.kill(int(PID.read_text(encoding="utf-8")), signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(main())
