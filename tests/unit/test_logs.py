"""What `make logs` tells of one request, from lines as the gateway and the replicas write them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

import logs
from logs import story

LINE: dict[str, Any] = {
    "time": "2026-11-30T05:43:41+00:00", "id": "abc-1", "client": "172.18.0.1", "method": "POST",
    "path": "/v1/chat/completions", "status": 200, "bytes_in": 361, "bytes_out": 1080, "seconds": 0.152, "key": "alice",
    "end_user": "", "model": "m[/b]", "replica": "vllm-1", "reason": "retry", "tried": "vllm-0=connect",
    "upstream_status": "502 : 200", "ttfb": "0.000 : 0.100", "ttft": 0.101, "cut": False, "prompt_tokens": 12,
    "cached_tokens": 4, "completion_tokens": 20, "trace": "",
}  # fmt: skip
HTTP = {
    "time": "2026-11-30T05:43:41.120+00:00", "replica": "vllm-1", "id": "abc-1", "path": "/v1/chat/completions",
    "status": 200, "first_byte": 0.099, "whole": True, "seconds": 0.15,
}  # fmt: skip
ENGINE = {
    "time": "2026-11-30T05:43:41.119+00:00", "replica": "vllm-1", "engine_id": "chatcmpl-abc-1", "finished": "length",
    "prompt_tokens": 12, "cached_tokens": 4, "completion_tokens": 20, "preemptions": 0, "queued": 0.001,
    "prefill": 0.09, "decode": 0.05, "seconds": 0.149,
}  # fmt: skip


def lines(*objects: dict[str, Any]) -> Iterable[str]:
    """A log with these lines among others."""
    return ["no JSON at all", *map(json.dumps, objects), '"abc-1"', "[]"]


def told(asked: str, gateway: Iterable[str], **replicas: Iterable[str]) -> list[str]:
    """The story, a row a line."""
    named = {name.replace("_", "-"): log for name, log in replicas.items()}
    return [f"{row.who}: {row.what}" for row in story(asked, gateway, named)]


def test_a_story_is_told_in_its_order() -> None:
    other = {**LINE, "id": "abc-12"}
    assert told("abc-1", [*lines(other, LINE)], vllm_0=[], vllm_1=[json.dumps(ENGINE), json.dumps(HTTP)]) == [
        "gateway: POST /v1/chat/completions from 172.18.0.1, key alice",
        "gateway: vllm-0 failed: no connection",
        "gateway: sent to vllm-1 (retry), model m[/b]",
        "gateway: first token to the client after 0.101 s",
        "gateway: 200 after 0.152 s",
        "gateway: 12 tokens of prompt (4 cached), 20 of answer",
        "vllm-1: engine: queued 0.001 s, prefill 0.09 s, decode 0.05 s, 20 tokens, finished by length",
        "vllm-1: 200: first byte after 0.099 s, over after 0.15 s",
    ]


def test_a_trace_leads_to_its_requests() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    found = told(trace, lines({**LINE, "trace": trace}), vllm_1=lines(HTTP))
    assert f"gateway: trace {trace}" in found
    assert "vllm-1: 200: first byte after 0.099 s, over after 0.15 s" in found


def test_an_end_before_the_end_is_told() -> None:
    refused = {
        **LINE,
        "replica": "",
        "tried": "",
        "reason": "refused",
        "status": 429,
        "ttft": None,
        "prompt_tokens": None,
    }
    assert told("abc-1", lines(refused))[1:] == ["gateway: 429 after 0.152 s"]
    assert "gateway: 499 after 0.152 s, the client hung up" in told("abc-1", lines({**LINE, "status": 499}))
    cut = told("abc-1", lines({**LINE, "cut": True}), vllm_1=lines({**HTTP, "whole": False}))
    assert "gateway: 200 after 0.152 s, broken off: its replica was lost" in cut
    assert "vllm-1: 200: first byte after 0.099 s, over after 0.15 s, not to its end" in cut


def test_what_a_replica_says_otherwise_is_shown_as_it_stands() -> None:
    words = "ERROR Request chatcmpl-abc-1 failed: " + "x" * 1000
    assert told("abc-1", [], vllm_1=[words, "of chatcmpl-abc-12"]) == [f"vllm-1: {words[:300]}"]


def test_an_id_that_nobody_knows_or_that_is_none_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stack:
        """A stack that has logged nothing."""

        replicas = ("vllm-0",)

        def __init__(self, *_: str) -> None:
            pass

        def config(self) -> Stack:
            return self

    monkeypatch.setattr(logs, "docker_version", lambda: ((27,), ""))
    monkeypatch.setattr(logs, "running_files", list)
    monkeypatch.setattr(logs, "Compose", Stack)
    monkeypatch.setattr(logs, "lines_of", lambda *_: [])
    for given, says in (
        ("abc-1", "no line of the gateway or of a replica has the id abc-1"),
        ("a b", "no request's id"),
    ):
        with pytest.raises(SystemExit):
            logs.main(given)
        assert says in capsys.readouterr().err
