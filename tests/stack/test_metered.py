"""What the real engine did for a client that hangs up is metered, whichever API it asked."""

import json
import re
from typing import Any

import pytest
import requests

from lab.stack import Stack
from lab.waiting import until

STORY = [{"role": "user", "content": "Count from one to five hundred, in words."}]
LONG = 400
EVENTS = 12
# Without an option to go on past its end, the model has to find much to say, and the same each time.
TALE = "Write a long story about a cat and a dog, with every detail."
# Tokens that come between the last event that the client reads and the end of its connection.
LATE = 40
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": STORY, "max_tokens": LONG, "ignore_eos": True},
    "/v1/completions": {"prompt": "One, two, three,", "max_tokens": LONG, "ignore_eos": True},
    "/v1/messages": {"messages": [{"role": "user", "content": TALE}], "max_tokens": LONG, "temperature": 0},
    "/v1/responses": {"input": TALE, "max_output_tokens": LONG, "temperature": 0},
}


def metered(stack: Stack) -> dict[str, int]:
    """The tokens that the gateway has counted, by kind."""
    text = stack.compose("exec", "-T", "gateway", "curl", "--silent", "--fail", "http://127.0.0.1:9113/metrics")
    found = dict.fromkeys(("prompt", "completion"), 0)
    for kind, value in re.findall(r'^gateway_tokens_total\{[^}]*kind="(\w+)"[^}]*\} (\S+)', text, re.MULTILINE):
        found[kind] = found.get(kind, 0) + int(float(value))
    return found


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_its_client_leaves_is_metered(stack: Stack, path: str) -> None:
    """Its prompt, and what was made of its answer until then: no less than the client saw, and not the whole."""
    before = metered(stack)
    body = {"model": stack.model, "stream": True, **STREAMS[path]}
    texts = 0
    with requests.post(stack.url + path, json=body, headers=stack.headers, stream=True, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                delta = event.get("delta")
                chosen = event.get("choices") or [{}]
                texts += bool(
                    chosen[0].get("text")
                    or (chosen[0].get("delta") or {}).get("content")
                    or (delta if isinstance(delta, str) else (delta or {}).get("text"))
                )
            if texts >= EVENTS:
                break
    assert texts == EVENTS

    def gained() -> dict[str, int]:
        return {kind: value - before.get(kind, 0) for kind, value in metered(stack).items()}

    until(lambda: gained()["completion"] > 0, "the use of the stream is counted", 20)
    found = gained()
    assert EVENTS - 2 <= found["completion"] <= EVENTS + LATE
    assert 3 <= found["prompt"] <= 200
