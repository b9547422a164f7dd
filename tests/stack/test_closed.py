"""What must not be reachable from outside: replicas, their metrics and admin endpoints, the gateway's own admin."""

import http.client
import json
import re
from urllib.parse import urlsplit

import pytest
import requests

from lab.stack import Stack
from stack.shell import ROOT

# Each path of the engine in docs/design.md, open or closed.
ROWS = re.findall(r"^\| (`/.*`) \| (open|closed) \| ", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
ENGINE = {path: fate for paths, fate in ROWS for path in re.findall(r"`([^`]+)`", paths)}
# The gateway answers these itself.
OWN = {"/v1/models", "/health"}
CLOSED = [
    *sorted(path for path, fate in ENGINE.items() if fate == "closed" and path not in OWN),
    "/fleet",
    "/replicas",
    "/canary",
    "/replicas/vllm-0/drain",
]


def test_every_path_that_the_engine_announces_is_in_the_table(stack: Stack) -> None:
    """A new version of the engine with a new path does not go unnoticed."""
    ask = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000/openapi.json').read().decode())"
    announced = json.loads(stack.compose("exec", "-T", "vllm-0", "python3", "-c", ask))["paths"]
    assert set(announced) - set(ENGINE) == set()


@pytest.mark.parametrize("path", sorted(path for path, fate in ENGINE.items() if fate == "open"))
def test_an_open_path_reaches_a_replica(stack: Stack, path: str) -> None:
    """A replica answers, though it may say that its model cannot do that."""
    answer = requests.post(stack.url + path, json={}, headers=stack.headers, timeout=30)
    assert answer.headers["x-replica"].startswith("vllm-")


@pytest.mark.parametrize("path", CLOSED)
def test_no_way_to_what_is_inside(stack: Stack, path: str) -> None:
    """Metrics and admin paths do not exist for a client, whatever the method; with keys, some ask for one."""
    closed = {404, 401} if stack.headers else {404}
    for method in ("GET", "POST", "PUT"):
        assert requests.request(method, stack.url + path, json={}, timeout=10).status_code in closed | {405}
    assert requests.get(stack.url + path, timeout=10).status_code in closed


@pytest.mark.parametrize(
    "path",
    [
        "//metrics",
        "/v1/../metrics",
        "/v1/%2e%2e/metrics",
        "/v1/models/../../metrics",
        "/v1/models/..%2f..%2fmetrics",
        "/v1/chat/completions/..;/../../../metrics",
        "/./metrics",
        "/metrics?x=/v1/models",
        "/metrics/",
        "/METRICS",
    ],
)
def test_no_way_round(stack: Stack, path: str) -> None:
    """No spelling of a path leads past the allowlist. (Raw: a client library would tidy the path up first.)"""
    connection = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status in (400, 404) or (stack.headers and answer.status == 401)
    assert b"vllm:" not in answer.read()
    connection.close()


def test_only_the_gateway_is_published(stack: Stack) -> None:
    """The host's ports lead to the gateway, and on loopback to Prometheus and Grafana; nothing else."""
    for line in stack.compose("ps", "--format", "json").splitlines():
        service = json.loads(line)
        ports = {(port["TargetPort"], port["URL"]) for port in service["Publishers"] or () if port["PublishedPort"]}
        match service["Service"]:
            case "gateway":
                assert {target for target, _ in ports} == {80}
            case "prometheus":
                assert ports == {(9090, "127.0.0.1")}
            case "grafana":
                assert ports == {(3000, "127.0.0.1")}
            case _:
                assert not ports, f"{service['Service']} is published"


def test_replicas_run_with_no_rights(stack: Stack) -> None:
    """A replica is an ordinary user in a read-only container with no capabilities."""
    identity = stack.compose("exec", "-T", "vllm-0", "python3", "-c", "import os; print(os.getuid())")
    assert int(identity) != 0
    status = stack.compose("exec", "-T", "vllm-0", "cat", "/proc/1/status")
    capabilities = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    assert int(capabilities, 16) == 0
    tried = stack.compose(
        "exec", "-T", "vllm-0", "sh", "-c", "touch /usr/x 2>/dev/null || touch /models/x 2>/dev/null || echo refused"
    )
    assert tried.strip() == "refused"
