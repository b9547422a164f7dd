"""vLLM's plug-in for statistics: one line of JSON for each request that the engine is done with.

It has the engine's own id, which holds that of the gateway: `chatcmpl-ID`, `cmpl-ID-0` (of /v1/responses alone it does
not: vLLM makes one there). Seconds are the engine's: queued until it was scheduled, prefill until the first token,
decode until the last one.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

write = import_module("lines").write
logger = logging.getLogger("vllm.fleet")


class EngineLines(import_module("vllm.v1.metrics.loggers").StatLoggerBase):  # type: ignore[misc]  # not here
    """Gets each iteration's statistics."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.works = True

    def log_engine_initialized(self) -> None:
        """There is nothing to say."""

    def record(self, _scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Writes a line for each request that ended in this iteration."""
        if not self.works or iteration_stats is None:
            return
        try:
            for done in iteration_stats.finished_requests:
                write(
                    {
                        "engine_id": done.request_id,
                        "finished": str(done.finish_reason),
                        "prompt_tokens": done.num_prompt_tokens,
                        "cached_tokens": done.num_cached_tokens,
                        "completion_tokens": done.num_generation_tokens,
                        "preemptions": done.num_preemptions,
                        "queued": round(done.queued_time, 3),
                        "prefill": round(done.prefill_time, 3),
                        "decode": round(done.decode_time, 3),
                        "seconds": round(done.e2e_latency, 3),
                    }
                )
        except Exception:
            # It would end the engine's loop, and with it the replica.
            self.works = False
            logger.warning("no more lines of the engine's requests: this vLLM tells of them otherwise", exc_info=True)
