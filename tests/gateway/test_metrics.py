"""The gateway's metrics, as Prometheus reads them."""

import re
import subprocess

import httpx
import pytest

from lab.sim.fleet import Gateway, get, image, wait_until
from tests.gateway.conftest import chat
from tests.gateway.test_routing import counted

LINE = re.compile(
    r'([a-z_]+)(?:\{([a-z]+="(?:[^"\\\n]|\\.)*"(?:,[a-z]+="(?:[^"\\\n]|\\.)*")*)\})? (-?[0-9.e+-]+|\+Inf|NaN)'
)


def exposed(gateway: Gateway) -> dict[str, float]:
    """Every series and its value; each line is checked against the format, each name against its # TYPE."""
    series: dict[str, float] = {}
    typed: dict[str, str] = {}
    for line in get(gateway.metrics_url + "/metrics").decode().splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split()
            assert name not in typed
            typed[name] = kind
        elif not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            assert match[1] in typed or re.sub("_(bucket|sum|count)$", "", match[1]) in typed
            key = line.rsplit(" ", 1)[0]
            assert key not in series
            series[key] = float(match[3])
    return series


def test_all_known_series_are_there_from_the_start(gateway: Gateway) -> None:
    series = exposed(gateway)
    for replica in ("vllm-0", "vllm-1", "vllm-2"):
        states = [f'gateway_replica_state{{replica="{replica}",state="{state}"}}'
                  for state in ("ready", "loading", "wedged", "draining", "unreachable")]  # fmt: skip
        assert [series[state] for state in states] == [1, 0, 0, 0, 0]
        assert f'gateway_requests_in_flight{{replica="{replica}"}}' in series
        assert f'gateway_time_to_first_byte_seconds_count{{replica="{replica}"}}' in series
        for cause in ("connect", "reset", "timeout", "refused"):
            assert f'gateway_retries_total{{replica="{replica}",cause="{cause}"}}' in series
        for result in ("alive", "dead", "token", "no_token"):
            assert f'gateway_probes_total{{replica="{replica}",result="{result}"}}' in series
    for cause in ("full", "none_ready", "unknown_model", "closed"):
        assert f'gateway_refusals_total{{cause="{cause}"}}' in series
    assert 'gateway_prefix_blocks_total{result="matched"}' in series


def test_a_request_is_counted_once_everywhere(gateway: Gateway) -> None:
    def measure(name: str) -> list[float]:
        found = exposed(gateway)
        return [found.get(key, 0) for key in (
            f'gateway_requests_total{{replica="{name}",model="sim",status="200",reason="load"}}',
            f'gateway_request_duration_seconds_count{{replica="{name}"}}',
            f'gateway_time_to_first_byte_seconds_count{{replica="{name}"}}',
            f'gateway_request_duration_seconds_bucket{{replica="{name}",le="+Inf"}}',
        )]  # fmt: skip

    before = {name: measure(name) for name in gateway.states()}
    answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("count me", max_tokens=20))
    name = answer.headers["x-replica"]
    wait_until(lambda: measure(name) == [value + 1 for value in before[name]], "counted once")
    others = [other for other in before if other != name]
    assert [measure(other) for other in others] == [before[other] for other in others]


def test_refusals_are_requests_too(gateway: Gateway) -> None:
    before = counted(gateway, 'gateway_requests_total{replica="",model="",status="404",reason="refused"}')
    httpx.post(gateway.url + "/v1/chat/completions", json=chat("x", model='odd"name\n'))
    wait_until(
        lambda: (
            counted(gateway, 'gateway_requests_total{replica="",model="",status="404",reason="refused"}') == before + 1
        ),
        "the refusal is counted",
    )
    exposed(gateway)


def test_counters_survive_a_reload(gateway: Gateway) -> None:
    wait_until(lambda: counted(gateway, "gateway_requests_in_flight") == 0, "all before is counted")
    before = counted(gateway, "gateway_requests_total")
    httpx.post(gateway.url + "/v1/chat/completions", json=chat("before the reload"))
    wait_until(lambda: counted(gateway, "gateway_requests_total") == before + 1, "counted")
    gateway.reload()
    assert counted(gateway, "gateway_requests_total") == before + 1


def test_promtool_has_nothing_to_say(gateway: Gateway) -> None:
    name = image("prometheus")
    if subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode:
        pytest.skip(f"{name} is not here; `make up` builds it")
    checked = subprocess.run(
        ["docker", "run", "--rm", "-i", "--network", "none", "--entrypoint", "promtool", name, "check", "metrics"],
        input=get(gateway.metrics_url + "/metrics"),
        capture_output=True,
    )
    assert checked.returncode == 0, (checked.stdout + checked.stderr).decode()


@pytest.mark.parametrize("path", ["/metrics", "/fleet", "/replicas", "/canary"])
def test_the_inner_listeners_are_not_reachable_through_the_public_one(gateway: Gateway, path: str) -> None:
    assert httpx.get(gateway.url + path).status_code == 404
    assert httpx.get(gateway.metrics_url + "/replicas").status_code == 404
