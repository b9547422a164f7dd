"""Prompts and answers stay private: what was asked and answered stands in no log, metric, error or file."""

import json
from collections.abc import Iterator

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat

PLANTED = "planted-3f9c"


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Replicas(2) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        yield gateway


def test_nothing_that_was_asked_or_answered_is_kept_or_shown(gateway: Gateway) -> None:
    """Whether the request is answered, streamed, refused by the gateway or by the replica, or makes no sense."""
    answers: list[str] = []
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        for body in (
            chat(PLANTED, max_tokens=40),
            chat(PLANTED, max_tokens=40, stream=True),
            chat(PLANTED * 5000, max_tokens=40),
        ):
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text[:300]
            if body.get("stream"):
                events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
                pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
                answers.append("".join(pieces))
            else:
                answers.append(answer.json()["choices"][0]["message"]["content"])
        refused = [
            client.post("/v1/chat/completions", json=chat(PLANTED, model="nobody's")),
            client.post("/v1/chat/completions", json=[PLANTED]),
            # does not stay in memory
            client.post("/v1/chat/completions", json=chat(PLANTED * 200_000)),
            client.post("/v1/chat/completions", content=f'{{"{PLANTED}', headers={"Content-Type": "application/json"}),
            client.post("/v1/chat/completions", content=PLANTED, headers={"Content-Type": "text/plain"}),
            client.post("/v1/nowhere", json=chat(PLANTED)),
            client.put("/v1/chat/completions", json=chat(PLANTED)),
        ]
        client.post("/v1/chat/completions", json=chat("the end"), headers={"X-Request-Id": "the-last-one"})
    until(lambda: "the-last-one" in gateway.log(), "the last request in the log", 10)
    shown = "".join(answer.text for answer in refused if answer.headers.get("x-replica", "") == "")
    shown += gateway.log() + httpx.get(f"{gateway.metrics_url}/metrics").text + json.dumps(gateway.status())
    said = [answer for answer in answers if len(answer) >= 12]
    assert said
    assert not [text for text in (PLANTED, *said) if text in shown]
    files = [path for path in gateway.folder.rglob("*") if path.is_file() and "nginx" not in path.parts[-2:]]
    assert not [path for path in files if PLANTED.encode() in path.read_bytes()]
