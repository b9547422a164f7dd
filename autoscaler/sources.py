"""What the autoscaler sees and does: it reads the gateway and Prometheus, and has the switch start and stop."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import httpx

from autoscaler.decide import Sample

GATEWAY, PROMETHEUS, SWITCH = "http://gateway:9113", "http://prometheus:9090", "http://switch:8000"
# The replicas of this host: those of others have a label, and nobody here can start them.
HERE = '{job="replicas",host=""}'
QUERIES = {
    "waiting": f"sum(vllm:num_requests_waiting{HERE})",
    "running": f"sum(vllm:num_requests_running{HERE})",
    "kv": f"sum(max by (replica) (vllm:kv_cache_usage_perc{HERE}))",
    "tokens": f"sum(rate(vllm:prompt_tokens_total{HERE}[1m])) + sum(rate(vllm:generation_tokens_total{HERE}[1m]))",
    "refused": 'sum(rate(gateway_refusals_total{cause="full"}[15s]))',
}
MODELS = f"count(count by (model_name) (vllm:num_requests_running{HERE}))"
STEP_S = 5
STATE = re.compile(r'^gateway_replica_state\{replica="([^"]+)",state="(\w+)"\} 1$', re.MULTILINE)
IN_FLIGHT = re.compile(r'^gateway_requests_in_flight\{replica="([^"]+)"\} (\d+)$', re.MULTILINE)
SERVICE = "com.docker.compose.service"


class Blind(Exception):
    """Somebody who has to be asked does not answer, or not so that it can be understood."""


def asked(client: httpx.Client, method: str, url: str, **rest: Any) -> httpx.Response:
    """The answer to a request; Blind where none came, or a failure."""
    try:
        return client.request(method, url, **rest).raise_for_status()
    except httpx.HTTPStatusError as error:
        said = error.response.text.strip()[:200]
        raise Blind(f"{httpx.URL(url).host} says {error.response.status_code} {said}") from None
    except httpx.HTTPError as error:
        raise Blind(f"{httpx.URL(url).host} does not answer ({type(error).__name__})") from None


def fleet(client: httpx.Client) -> dict[str, tuple[str, int]]:
    """The state and the requests in flight of each replica of this host, by name."""
    try:
        groups = asked(client, "GET", f"{GATEWAY}/fleet").json()
        names = [group["labels"]["replica"] for group in groups if not group["labels"].get("host")]
    except (ValueError, LookupError, TypeError) as error:
        raise Blind(f"the gateway's fleet cannot be read ({error})") from None
    text = asked(client, "GET", f"{GATEWAY}/metrics").text
    states = dict(STATE.findall(text))
    loads: dict[str, str] = dict(IN_FLIGHT.findall(text))
    if missing := [name for name in names if name not in loads]:
        raise Blind(f"the gateway has no figures of {missing[0]} yet")
    # one that nobody has asked yet has no state
    return {name: (states.get(name, "unknown"), int(loads[name])) for name in names}


def answer(client: httpx.Client, path: str, **params: str) -> list[Any]:
    """The result of a query of Prometheus."""
    try:
        found: list[Any] = asked(client, "GET", f"{PROMETHEUS}/api/v1/{path}", params=params).json()["data"]["result"]
    except (ValueError, LookupError, TypeError) as error:
        raise Blind(f"Prometheus' answer cannot be read ({error})") from None
    return found


def samples(client: httpx.Client, now: float, window_s: float) -> list[Sample]:
    """The fleet's load over a window that ends now; moments at which something was not measured are left out. Blind
    where Prometheus has nothing at all of a fleet that it reads."""
    columns: dict[str, dict[float, float]] = {}
    for name, query in QUERIES.items():
        span = {"start": f"{now - window_s:.3f}", "end": f"{now:.3f}", "step": str(STEP_S)}
        rows = answer(client, "query_range", query=query, **span)
        columns[name] = {float(at): float(value) for row in rows for at, value in row["values"]}
    both = sorted(columns["waiting"].keys() & columns["running"].keys() & columns["kv"].keys())
    return [
        Sample(
            at,
            columns["waiting"][at],
            columns["running"][at],
            columns["kv"][at],
            columns["refused"].get(at, 0.0),
            columns["tokens"].get(at, 0.0),
        )
        for at in both
    ]


def models(client: httpx.Client) -> int:
    """How many models the replicas of this host serve, as far as Prometheus knows."""
    return sum(int(float(row["value"][1])) for row in answer(client, "query", query=MODELS))


def containers(client: httpx.Client) -> Mapping[str, bool]:
    """The replicas that have a container, and whether that runs."""
    try:
        rows = asked(client, "GET", f"{SWITCH}/replicas").json()
        return {row["Labels"][SERVICE]: row["State"] in ("running", "restarting", "paused") for row in rows}
    except (ValueError, LookupError, TypeError) as error:
        raise Blind(f"the switch's answer cannot be read ({error})") from None


def switch(client: httpx.Client, verb: str, name: str) -> None:
    """Has a replica started or stopped. Docker goes on with it if it takes longer than the answer may."""
    try:
        client.post(f"{SWITCH}/{verb}/{name}", timeout=10).raise_for_status()
    except httpx.ReadTimeout:
        return
    except httpx.HTTPStatusError as error:
        # 304: it is so already
        if error.response.status_code != httpx.codes.NOT_MODIFIED:
            raise Blind(f"the switch says {error.response.status_code} to {verb} {name}") from None
    except httpx.HTTPError as error:
        raise Blind(f"the switch does not answer ({type(error).__name__})") from None
