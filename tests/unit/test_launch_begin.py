"""A streamed answer begins with its first token: what the ASGI middleware lets through, and when."""

import asyncio
import json
from typing import Any

import pytest

from vllm.begin import Begin, Message, Receive, Send

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def chunk(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def sent(*messages: Message) -> list[list[Message]]:
    """What the client's side got after each of the application's messages."""
    after: list[list[Message]] = []

    async def scenario() -> None:
        got: list[Message] = []

        async def send(message: Message) -> None:
            got.append(message)

        async def receive() -> Message:
            return {}

        async def app(_scope: Message, _receive: Receive, send: Send) -> None:
            for message in messages:
                await send(message)
                after.append(list(got))

        await Begin(app)({"type": "http"}, receive, send)

    asyncio.run(scenario())
    return after


def test_headers_wait_for_the_first_bytes_and_nothing_else_does() -> None:
    """Until then the gateway can send the request elsewhere; from then on each token leaves at once."""
    first, second, end = chunk(b"data: a\n\n"), chunk(b"data: b\n\n"), chunk(b"", more=False)
    assert sent(START, chunk(b""), first, second, end) == [
        [],
        [],
        [START, first],
        [START, first, second],
        [START, first, second, end],
    ]


def test_a_chats_opening_event_waits_for_the_first_token() -> None:
    """One for each choice, without any text: a chat that got no further can still go to another replica."""
    opening = b'data: {"choices":[{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null}]}\n\n'
    token = b'data: {"choices":[{"index":0,"delta":{"content":"It"}}]}\n\n'
    more = chunk(token)
    assert sent(START, chunk(opening % 0), chunk(opening % 1), chunk(token), more) == [
        [],
        [],
        [],
        [START, chunk(opening % 0 + opening % 1 + token)],
        [START, chunk(opening % 0 + opening % 1 + token), more],
    ]
    error = chunk(b'data: {"error": {"code": 500}}\n\n')
    assert sent(START, chunk(opening % 0), error)[-1][0]["status"] == 502


def test_an_answer_without_a_body_is_not_held_for_ever() -> None:
    """A 200 with nothing in it, as /health gives."""
    end = chunk(b"", more=False)
    assert sent(START, end) == [[], [START, end]]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        pytest.param(400, 400, id="the client's fault stays here"),
        pytest.param(503, 503, id="a full queue"),
        pytest.param(500, 502, id="a dead engine sends the request to the next replica"),
        pytest.param(None, 502, id="no code"),
    ],
)
def test_a_stream_that_begins_with_an_error_becomes_that_error(code: int | None, status: int) -> None:
    """It had not begun: its status says what happened, its body is the error, and nothing of the stream follows."""
    error: dict[str, Any] = {"error": {"message": "no", "code": code}}
    event = f"data: {json.dumps(error)}\n\n".encode()
    start, body = sent(START, chunk(event), chunk(b"data: [DONE]\n\n"), chunk(b"", more=False))[-1]
    assert start["status"] == status
    failure = [(b"x-failure", b"no")] if status == 502 else []
    assert start["headers"] == [(b"content-type", b"application/json"), *failure]
    assert json.loads(body["body"]) == error
    assert not body.get("more_body")


def test_an_error_in_mid_stream_stays_in_the_stream() -> None:
    """What has begun keeps its status."""
    first, error = chunk(b"data: a\n\n"), chunk(b'data: {"error": {"code": 500}}\n\n')
    assert sent(START, first, error)[-1] == [START, first, error]
