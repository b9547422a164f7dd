"""Whatever the documented API allows is answered without a failure of the gateway's own (Schemathesis).

`openapi.json` is what the pinned vLLM announces of the paths that the gateway opens, recorded from a replica of the
default model. It lacks what only other kinds of models have: vectors, scores and sounds, which test_usage.py asks for.
What answers here are simulated replicas, so only the gateway is judged: no answer is a 5xx, none is missing, and an
error of its own is JSON that names the request. The answers' schemas are the engine's business, and are not compared.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.test_access import bearer, entry, keys_file, new_key

KEY = new_key()
# Enough for all that the gateway looks at, so that no example is stopped by a mere number.
LIMITS = {
    "requests_per_minute": 10**6,
    "tokens_per_day": 10**9,
    "parallel_requests": 100,
    "max_tokens": 10**6,
    "n": 10**6,
}

spec: dict[str, Any] = json.loads(Path(__file__).with_name("openapi.json").read_text())
# The gateway's own paths beside those of a replica.
spec["paths"] |= {
    path: {"get": {"responses": {"200": {"description": "an answer"}}}}
    for path in ("/v1/models", "/v1/usage", "/health")
}
# Any text would be a model that is not there.
for one in spec["components"]["schemas"].values():
    if "model" in one.get("properties", {}):
        one["properties"]["model"] = {"enum": ["sim", "another"]}
schema = schemathesis.openapi.from_dict(spec)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    files = {"secrets/keys.json": keys_file(entry("alice", KEY, limits=LIMITS)).encode()}
    # Short answers, whatever is asked for.
    quick = ("--step-ms", "0.1", "--max-model-len", "200")
    with Replicas(2, *quick) as replicas, Gateway(replicas, files=files) as running:
        until(lambda: httpx.get(running.url + "/ready").json().get("ready") == 2, "ready")
        yield running


@schema.parametrize()
@settings(
    max_examples=10,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)
def test_the_documented_api_never_fails(gateway: Gateway, case: schemathesis.Case[Any]) -> None:
    answer = case.call(base_url=gateway.url, headers=bearer(KEY), timeout=20)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and not answer.headers.get("x-replica"):
        error = json.loads(answer.content)["error"]
        assert answer.headers["x-request-id"][0] in (error.get("message") or "")
