"""One request is found again: by `make logs`, and as a trace where the profile `traces` runs."""

import secrets
import subprocess

import httpx
import pytest

from lab.stack import Stack, StackError, published
from lab.waiting import until
from stack.shell import ROOT


def ask(stack: Stack, **headers: str) -> tuple[str, str]:
    """A request's id, and the replica that answered it."""
    body = {"model": stack.model, "messages": [{"role": "user", "content": "planted-9e2b"}], "max_tokens": 3}
    request_id = secrets.token_hex(8)
    headers = {**stack.headers, "X-Request-Id": request_id, **headers}
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200
    return request_id, answer.headers["x-replica"]


def logs(of: str) -> subprocess.CompletedProcess[str]:
    """`make logs` of an id."""
    return subprocess.run(["make", "logs", f"ARGS={of}"], cwd=ROOT, text=True, capture_output=True, check=False)


def test_a_request_is_followed_through_gateway_and_replica(stack: Stack) -> None:
    request_id, replica = ask(stack)

    def whole() -> bool:
        told = " ".join(logs(request_id).stdout.split())  # a narrow table breaks its lines
        return all(words in told for words in (f"sent to {replica}", "200 after", "3 of answer", "engine: queued"))

    until(whole, "the story is whole", 30)
    assert "planted-9e2b" not in logs(request_id).stdout


def test_an_id_that_was_never_given_is_said_so(stack: Stack) -> None:
    done = logs("never-given")
    assert done.returncode
    assert "no line of the gateway or of a replica has the id never-given" in done.stderr


def test_a_request_is_one_trace(stack: Stack) -> None:
    try:
        store = published("traces", 4318)
    except StackError:
        pytest.skip("no store of traces runs: COMPOSE_PROFILES=traces and TRACE_SAMPLE in .env start it")
    trace = secrets.token_hex(16)
    request_id, replica = ask(stack, traceparent=f"00-{trace}-b7ad6b7169203331-01")

    def spans() -> dict[str, dict[str, object]]:
        """The trace's spans, by name, when the gateway's and vLLM's are there."""
        found = httpx.get(f"{store}/v1/projects/default/spans", params={"trace_id": trace, "limit": 50}).json()["data"]
        own = {span["name"]: span for span in found if span["context"]["trace_id"] == trace}
        return own if len(own) >= 2 else {}

    until(spans, "both spans are in the store", 30)
    gateway, engine = spans()["POST /v1/chat/completions"], spans()["llm_request"]
    assert gateway["parent_id"] == "b7ad6b7169203331"
    assert engine["parent_id"] == gateway["context"]["span_id"]  # type: ignore[index]
    assert gateway["attributes"]["gateway.replica"] == replica  # type: ignore[index]
    assert "planted-9e2b" not in str(spans())
    assert f"trace {trace}" in logs(request_id).stdout
