"""A streamed answer begins with its first token: what the ASGI middleware lets through, and when."""

import asyncio
import json
from typing import Any

import pytest

from vllm.begin import COMMENT, Begin, Message, Receive, Send

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


def test_a_responses_opening_events_wait_for_the_first_token() -> None:
    """They come before the request is queued."""
    opening = [b"event: response.created\ndata: {}\n\n", b"event: response.in_progress\ndata: {}\n\n"]
    token = b"event: response.output_text.delta\ndata: {}\n\n"
    assert sent(START, *map(chunk, opening), chunk(token))[1:] == [[], [], [START, chunk(b"".join(opening) + token)]]


def test_an_answer_without_a_body_is_not_held_for_ever() -> None:
    """A 200 with nothing in it, as /health gives."""
    end = chunk(b"", more=False)
    assert sent(START, end) == [[], [START, end]]


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        pytest.param(400, "BadRequestError", 400, id="the client's fault stays here"),
        pytest.param(503, "Service Unavailable", 503, id="a full queue"),
        pytest.param(503, "ServiceUnavailableError", 502, id="a failure in the engine, though it may pass"),
        pytest.param(500, "InternalServerError", 502, id="a dead engine sends the request to the next replica"),
        pytest.param(None, None, 502, id="no code"),
    ],
)
def test_a_stream_that_begins_with_an_error_becomes_that_error(code: int | None, kind: str | None, status: int) -> None:
    """It had not begun: its status says what happened, its body is the error, and nothing of the stream follows."""
    error: dict[str, Any] = {"error": {"message": "no", "type": kind, "code": code}}
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


def test_an_error_event_of_anthropics_api_is_one_too() -> None:
    """vLLM gives it no code."""
    error = {"type": "error", "error": {"type": "internal_error", "message": "no"}}
    start, body = sent(START, chunk(f"event: error\ndata: {json.dumps(error)}\n\n".encode()))[-1]
    assert (start["status"], json.loads(body["body"])) == (502, error)


@pytest.mark.parametrize("shape", [{}, {"type": "error"}], ids=["OpenAI", "Anthropic"])
@pytest.mark.parametrize(("kind", "status"), [("Service Unavailable", 503), ("ServiceUnavailableError", 502)])
def test_a_failure_in_the_engine_is_no_full_queue(kind: str, status: int, shape: dict[str, str]) -> None:
    """Without streaming vLLM says 503 to both."""
    said = {**shape, "error": {"message": "please retry", "type": kind}}
    refused, body = {**START, "status": 503, "headers": []}, chunk(json.dumps(said).encode(), more=False)
    start, answer = sent(refused, body)[-1]
    assert (start["status"], json.loads(answer["body"])) == (status, said)
    assert ((b"x-failure", b"please retry") in start["headers"]) == (status == 502)


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[]", b'{"error": "scaling"}', b'{"error": {}}'])
def test_another_503_stays_as_it_is(body: bytes) -> None:
    """Such as that of /health."""
    messages = ({**START, "status": 503}, chunk(body, more=False))
    assert sent(*messages)[-1] == list(messages)


@pytest.mark.parametrize("event", [b"event: error\n\n", b"event: error\nretry: 1\n\n", b'data: {"error" no JSON\n\n'])
def test_an_error_event_that_says_nothing_passes_as_it_came(event: bytes) -> None:
    assert sent(START, chunk(event))[-1] == [START, chunk(event)]


def test_an_error_may_be_a_text() -> None:
    start, body = sent(START, chunk(b'data: {"error":"boom"}\n\n'))[-1]
    assert (start["status"], (b"x-failure", b"boom") in start["headers"]) == (502, True)
    assert json.loads(body["body"]) == {"error": {"message": "boom"}}


def test_the_clients_fault_is_known_without_a_code() -> None:
    """As Anthropic's API tells it."""
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    start, body = sent(START, chunk(f"event: error\ndata: {json.dumps(error)}\n\n".encode()))[-1]
    assert (start["status"], json.loads(body["body"])) == (400, error)


KEEPALIVE_S = 0.05
# What a start has that a comment sent.
WAITING: Message = {**START, "headers": [*START["headers"], (b"x-waiting", b"1")]}


def kept_alive(*messages: Message, wait: int, count: int) -> list[Message]:
    """What the client's side got, if the application waits before message `wait` until it has sent `count`."""
    got: list[Message] = []

    async def send(message: Message) -> None:
        got.append(message)

    async def receive() -> Message:
        return {}

    async def app(_scope: Message, _receive: Receive, send: Send) -> None:
        for n, message in enumerate(messages):
            while n == wait and len(got) < count:
                await asyncio.sleep(0.001)
            await send(message)
        # none comes after the end
        await asyncio.sleep(2 * KEEPALIVE_S)

    asyncio.run(asyncio.wait_for(Begin(app, KEEPALIVE_S)({"type": "http"}, receive, send), 10))
    return got


def test_a_stream_that_is_silent_for_long_gets_comments_if_that_is_wanted() -> None:
    """They keep the connection from being cut, before the first token and between two."""
    comment, token, end = chunk(COMMENT), chunk(b"data: a\n\n"), chunk(b"", more=False)
    assert kept_alive(START, token, end, wait=1, count=3) == [WAITING, comment, comment, token, end]
    assert kept_alive(START, token, end, wait=2, count=4) == [START, token, comment, comment, end]


def test_what_opens_a_stream_comes_before_its_comments() -> None:
    opening = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    token, end = chunk(b"data: a\n\n"), chunk(b"", more=False)
    assert kept_alive(START, chunk(opening), token, end, wait=2, count=2) == [
        WAITING,
        chunk(opening + COMMENT),
        token,
        end,
    ]


def test_an_error_after_a_comment_stays_in_the_stream() -> None:
    """The known price: its status has gone, and the request cannot move."""
    error, end = chunk(b'data: {"error": {"code": 500}}\n\n'), chunk(b"", more=False)
    assert kept_alive(START, error, end, wait=1, count=2) == [WAITING, chunk(COMMENT), error, end]


def test_what_is_no_stream_gets_no_comment() -> None:
    start = {**START, "headers": [(b"content-type", b"application/json")]}
    got: list[Message] = []

    async def send(message: Message) -> None:
        got.append(message)

    async def receive() -> Message:
        return {}

    async def app(_scope: Message, _receive: Receive, send: Send) -> None:
        await send(start)
        await asyncio.sleep(3 * KEEPALIVE_S)
        await send(chunk(b"{}", more=False))

    asyncio.run(Begin(app, KEEPALIVE_S)({"type": "http"}, receive, send))
    assert got == [start, chunk(b"{}", more=False)]
