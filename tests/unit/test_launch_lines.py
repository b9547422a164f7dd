"""The lines that a replica logs of each request: of HTTP and of the engine, with the id and nothing that was said."""

import asyncio
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stack.shell import ROOT
from vllm import lines
from vllm.lines import Message, Receive, Send

PLANTED = "planted-5d1c"
HEADERS = [(b"host", b"a"), (b"x-request-id", b"abc-1"), (b"authorization", PLANTED.encode())]


def run(
    headers: list[tuple[bytes, bytes]], *messages: Message, kind: str = "http", dies: bool = False
) -> list[Message]:
    """What the client gets of an application that answers so."""
    got: list[Message] = []

    async def app(_scope: Message, _receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if dies:
            raise asyncio.CancelledError

    async def send(message: Message) -> None:
        got.append(message)

    async def receive() -> Message:
        return {}

    scope = {"type": kind, "path": "/v1/x", "query_string": PLANTED.encode(), "headers": headers}
    try:
        asyncio.run(lines.Lines(app)(scope, receive, send))
    except asyncio.CancelledError:
        assert dies
    return got


def start(status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"x-planted", PLANTED.encode())]}


def body(more: bool) -> Message:
    return {"type": "http.response.body", "body": PLANTED.encode(), "more_body": more}


def line_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one line that was written."""
    out = capsys.readouterr().out
    assert PLANTED not in out
    (line,) = out.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_an_answer_passes_as_it_is_and_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    messages = [start(), body(True), body(False)]
    assert run(HEADERS, *messages) == messages
    line = line_of(capsys)
    assert (line["id"], line["path"], line["status"], line["whole"]) == ("abc-1", "/v1/x", 200, True)
    assert 0 <= line["first_byte"] <= line["seconds"] < 5
    assert line["time"].endswith("+00:00")


@pytest.mark.parametrize(("messages", "status"), [([], None), ([start()], 200), ([start(), body(True)], 200)])
def test_one_that_is_broken_off_has_its_line_too(
    capsys: pytest.CaptureFixture[str], messages: list[Message], status: int | None
) -> None:
    run(HEADERS, *messages, dies=True)
    line = line_of(capsys)
    assert (line["status"], line["whole"]) == (status, False)
    assert (line["first_byte"] is None) == (len(messages) < 2)


def test_what_the_gateway_asks_for_itself_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    run([(b"host", b"a")], start(), body(False))
    run([], kind="lifespan")
    assert capsys.readouterr().out == ""


def test_an_id_that_breaks_lines_or_is_long_does_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    run([(b"x-request-id", b'a\n{"id":"\xff' + b"x" * 1000)], start(), body(False))
    assert len(line_of(capsys)["id"]) == lines.LONGEST


@pytest.fixture
def engine_lines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plug-in, where vLLM is not installed."""
    monkeypatch.setitem(sys.modules, "vllm.v1.metrics.loggers", SimpleNamespace(StatLoggerBase=object))
    monkeypatch.setitem(sys.modules, "lines", lines)
    spec = importlib.util.spec_from_file_location("engine_lines", ROOT / "vllm" / "engine_lines.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def done(request_id: str) -> SimpleNamespace:
    """A request as vLLM tells of it."""
    tokens = {"num_prompt_tokens": 9, "num_cached_tokens": 4, "num_generation_tokens": 2, "num_preemptions": 0}
    times = {"queued_time": 0.25, "prefill_time": 0.5, "decode_time": 1.0, "e2e_latency": 1.7512}
    return SimpleNamespace(request_id=request_id, finish_reason="stop", **tokens, **times)


def test_the_engine_tells_of_each_request_that_ended(
    engine_lines: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = engine_lines.EngineLines(None, engine_index=0)
    plugin.record(None, None, mm_cache_stats=None, engine_idx=0)
    plugin.record(None, SimpleNamespace(finished_requests=[]), engine_idx=0)
    plugin.record(None, SimpleNamespace(finished_requests=[done("chatcmpl-abc-1")]), engine_idx=0)
    line = line_of(capsys)
    assert (line["engine_id"], line["finished"]) == ("chatcmpl-abc-1", "stop")
    assert [line[name] for name in ("queued", "prefill", "decode", "seconds")] == [0.25, 0.5, 1.0, 1.751]
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (9, 4, 2)


def test_a_vllm_that_tells_otherwise_loses_lines_and_no_replica(
    engine_lines: ModuleType, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    plugin = engine_lines.EngineLines(None)
    for _ in range(3):
        plugin.record(None, SimpleNamespace(finished=[]))
    assert capsys.readouterr().out == ""
    assert caplog.text.count("no more lines") == 1
