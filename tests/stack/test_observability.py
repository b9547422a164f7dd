"""What Prometheus and the dashboards show is there, is right, and is counted once.

Every query of every dashboard is run against the real Prometheus, its variables filled in as Grafana does it, after
real traffic. Prometheus reads its targets every few seconds: the tests wait until it has read them after the traffic.
"""

import contextlib
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab.stack import Stack
from lab.waiting import until
from prometheus.rules.check import rules_in, with_selectors
from stack import burn_rates

DASHBOARDS = sorted((Path(__file__).parents[2] / "grafana").glob("dashboards*/*.json"))
METRIC = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{")
# Grafana's window for a scrape interval of 5 s: four times the interval.
RATE_INTERVAL = "20s"
# A rate of the rules is over five minutes, and they are worked out every half a minute.
RULES_S = 90
# Panels that a sound stack may leave empty, by what stands behind their (i), with what would have to run.
MAY_BE_EMPTY = {
    "COMPOSE_PROFILES in .env does not have hardware": "node-exporter",
    "COMPOSE_PROFILES in .env does not have autoscaler": "autoscaler",
    "the replica has no SPECULATIVE_CONFIG": None,
    "no key is marked to name its end users": None,
}
ANSWERS = 8
TOKENS = 12


class Prometheus:
    """The stack's Prometheus, asked through its HTTP API."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=10)

    def get(self, path: str, **params: str | float) -> dict[str, Any]:
        reply = self.client.get(f"/api/v1/{path}", params=params)
        body = reply.json()
        assert body["status"] == "success", f"Prometheus refused {params}: {body.get('error')}"
        data: dict[str, Any] = body["data"]
        return data

    def vector(self, query: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series that an instant query gives, now or at a time in seconds since 1970."""
        found = self.get("query", query=query, time=at or time.time())["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def number(self, query: str, at: float | None = None) -> float:
        """The sum of what an instant query gives; 0 when it gives nothing."""
        return sum(value for _, value in self.vector(query, at))

    def has_points(self, query: str, seconds: float = 120) -> bool:
        """Whether a graph of the query over the last `seconds` would show any point."""
        end = time.time()
        data = self.get("query_range", query=query, start=end - seconds, end=end, step=5)
        return any(value != "NaN" for series in data["result"] for _, value in series["values"])

    def labels_with_points(self, query: str, label: str, seconds: float = 120) -> set[str]:
        """Values of a label of the lines that a graph of the query over the last `seconds` would show."""
        end = time.time()
        data = self.get("query_range", query=query, start=end - seconds, end=end, step=5)
        lines = [one for one in data["result"] if any(value != "NaN" for _, value in one["values"])]
        return {one["metric"][label] for one in lines if label in one["metric"]}

    def await_scrape(self, since: float) -> None:
        """Waits until every target has been read after `since` (seconds since 1970)."""
        until(
            lambda: min((stamp for _, stamp in self.vector("timestamp(up)")), default=0) > since,
            "Prometheus reads every target again",
            60,
        )


@dataclass(frozen=True)
class Traffic:
    """What was sent, as the answers' own usage tells it."""

    answers: int
    generated_tokens: int


def chat(stack: Stack, content: str, **more: object) -> httpx.Response:
    body = {"model": stack.model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, **more}
    return httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=stack.headers, timeout=120)


def usage(stack: Stack, content: str, stream: bool) -> dict[str, int]:
    """Asks for an answer, whole or streamed, and gives the tokens that it says it took."""
    reply = (
        chat(stack, content, stream=True, stream_options={"include_usage": True}) if stream else chat(stack, content)
    )
    assert reply.status_code == 200, reply.text
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    counts: dict[str, int] = json.loads(events[-1] if stream else reply.text)["usage"]
    return counts


def converse(stack: Stack) -> None:
    """A conversation that goes on, which its replica has in its cache."""
    said = "The lighthouse keeper counts the ships that pass, and writes down their names and their colours. " * 12
    turns: list[dict[str, str]] = []
    for question in ("How many ships?", "And which colours?"):
        turns.append({"role": "user", "content": f"{said} {question}" if not turns else question})
        body = {"model": stack.model, "messages": turns, "max_tokens": TOKENS}
        answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=stack.headers, timeout=120)
        assert answer.status_code == 200, answer.text
        turns.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})


def send(stack: Stack) -> Traffic:
    """Sends prompts, a few at a time: half of them new and half with a long common beginning, half of them streamed."""
    shared = "The harbour master wrote down every ship that came in, and the weather of the day. " * 12
    prompts = [(shared if i % 2 else secrets.token_hex(16)) + f" Question {i}: where is Paris?" for i in range(ANSWERS)]
    with ThreadPoolExecutor(4) as pool:
        used = list(pool.map(lambda i: usage(stack, prompts[i], stream=i % 4 < 2), range(ANSWERS)))
    return Traffic(ANSWERS, sum(u["completion_tokens"] for u in used))


@pytest.fixture(scope="module")
def prometheus(stack: Stack) -> Iterator[Prometheus]:
    asked = Prometheus(stack.prometheus_url)
    yield asked
    asked.client.close()


@pytest.fixture(scope="module")
def replicas(stack: Stack) -> set[str]:
    return set(stack.replicas())


@pytest.fixture(scope="module")
def traffic(stack: Stack, prometheus: Prometheus, replicas: set[str]) -> None:
    """Traffic that moves every counter: answers from each replica, mistakes that a replica and the gateway refuse."""
    for _ in range(6):
        send(stack)
        converse(stack)
        mistake = chat(stack, "Hello", temperature=-1)
        assert mistake.status_code == 400, mistake.text
        unknown = chat(stack, "Hello", model="no-such-model")
        assert unknown.status_code == 404, unknown.text
        prometheus.await_scrape(time.time())
        # Those alone: the requests that ask whether a replica still works reach each one, too.
        chats = 'http_route="/v1/chat/completions",http_response_status_code="200"'
        grown = f"increase(http_server_request_duration_seconds_count{{{chats}}}[1m])"
        served = prometheus.vector(f"sum by (replica) ({grown}) > 0")
        if {labels["replica"] for labels, _ in served} == replicas:
            return
    pytest.fail(f"after {6 * ANSWERS} requests only these of {replicas} have served one: {served}")


def running(stack: Stack) -> set[str]:
    """The services that run."""
    return set(stack.compose("ps", "--services").split())


def test_every_part_is_scraped(stack: Stack, prometheus: Prometheus, replicas: set[str]) -> None:
    """Each replica that the gateway knows, the gateway and Prometheus itself are up, and nothing else is asked."""
    assert len(replicas) >= 2
    expected = {("replicas", name) for name in replicas} | {("gateway", ""), ("prometheus", "")}
    exporters = {"node-exporter": ("host", ""), "dcgm-exporter": ("gpus", "")}
    expected |= {target for name, target in exporters.items() if name in running(stack)}

    def scraped() -> bool:
        found = {(labels["job"], labels.get("replica", "")): value for labels, value in prometheus.vector("up")}
        return found == dict.fromkeys(expected, 1)

    try:
        until(scraped, f"{sorted(expected)} all up", 60)
    except TimeoutError:
        targets = prometheus.get("targets")["activeTargets"]
        pytest.fail(
            f"wanted {sorted(expected)} all up, got "
            + "; ".join(map(str, prometheus.vector("up")))
            + "; "
            + "; ".join(f"{target['scrapeUrl']}: {target['lastError']}" for target in targets)
        )


def test_configuration_is_sound(stack: Stack, prometheus: Prometheus) -> None:
    """promtool finds no fault, and what is kept is bounded in time and in size."""
    stack.compose("exec", "-T", "prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    flags = prometheus.get("status/flags")
    assert flags["storage.tsdb.retention.time"] not in {"", "0s"}
    assert flags["storage.tsdb.retention.size"] not in {"", "0B"}


@pytest.mark.usefixtures("traffic")
def test_variables_offer_every_replica_and_model(stack: Stack, prometheus: Prometheus, replicas: set[str]) -> None:
    """The dashboards' drop-downs list what there is: their queries give the replicas and the model."""
    for path in DASHBOARDS:
        offered: dict[str, set[str]] = {}
        for variable in json.loads(path.read_text())["templating"]["list"]:
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert match, f"{path.name}: not a label_values query: {variable['definition']}"
            selector, label = match.groups()
            offered[variable["name"]] = {labels.get(label, "") for labels, _ in prometheus.vector(selector)}
        keys = offered.pop("key", {""})
        assert offered == {"model": {stack.model}, "replica": replicas}
        assert keys, "who asks without a key is one of them"


@dataclass(frozen=True)
class Shown:
    """A query of a panel, as Grafana reads it from the dashboard's JSON, and why it may be empty."""

    name: str
    expr: str
    empty: str

    def filled(self, model: str = ".*", replica: str = ".*") -> str:
        """The query as Grafana sends it; `model` and `replica` are what is chosen in the drop-downs."""
        values = {"$__rate_interval": RATE_INTERVAL, "$__range": "1h", "$model": model, "$replica": replica}
        query = self.expr
        for variable, value in (values | {"$key": ".*"}).items():
            query = query.replace(variable, value)
        assert "$" not in query, f"{self.name}: a variable is left in {query}"
        return query

    @property
    def within_s(self) -> float:
        """How long to wait for its first point."""
        return RULES_S if "model:" in self.expr else 20


def shown() -> Iterator[Shown]:
    """Each query of each dashboard."""
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        folder = "" if path.parent.name == "dashboards" else f" ({path.parent.name})"
        for panel in dashboard["panels"]:
            _, _, empty = panel.get("description", "").partition("No data: ")
            for target in panel.get("targets", []):
                assert target["datasource"]["uid"] == "prometheus"
                name = f"{dashboard['title']}{folder} / {panel['title']} / {target['refId']}"
                yield Shown(name, target["expr"], empty.split("\n")[0])


ALL_SHOWN = [pytest.param(one, id=one.name.replace(" ", "_")) for one in shown()]


def chosen(values: set[str]) -> str:
    """Several values picked in a drop-down, as Grafana writes them into a PromQL regular expression."""
    escaped = [re.sub(r"[\\^$.*+?()\[\]{}|]", lambda m: "\\\\" + m.group(), value) for value in sorted(values)]
    return f"({'|'.join(escaped)})"


def excused(one: Shown, running: set[str]) -> bool:
    """Whether what this query would show is not there on this stack."""
    return any(
        one.empty.startswith(reason) and (service is None or service not in running)
        for reason, service in MAY_BE_EMPTY.items()
    ) or ("DCGM_" in one.expr and "dcgm-exporter" not in running)


@pytest.fixture(scope="module")
def services(stack: Stack) -> set[str]:
    return running(stack)


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("one", ALL_SHOWN)
def test_every_query_of_the_dashboards_has_data(
    one: Shown, stack: Stack, prometheus: Prometheus, replicas: set[str], services: set[str]
) -> None:
    """A graph of the query shows points, with All in the drop-downs and with each value picked by hand.

    Where the stack lacks what it would show, Prometheus takes the query all the same, and the panel says why.
    """
    for query in (one.filled(), one.filled(chosen({stack.model}), chosen(replicas))):
        if excused(one, services):
            prometheus.vector(query)
            continue
        try:
            until(lambda query=query: prometheus.has_points(query), one.name, one.within_s)  # type: ignore[misc]
        except TimeoutError:
            missing = [metric for metric in dict.fromkeys(METRIC.findall(query)) if not prometheus.vector(metric)]
            cause = f"nothing exports {', '.join(missing)}" if missing else "the metrics are there, the labels are not"
            pytest.fail(f"no data for {one.name}: {cause}\n{query}")


@pytest.mark.usefixtures("traffic")
def test_panels_have_data_for_every_replica(prometheus: Prometheus, replicas: set[str], services: set[str]) -> None:
    """Whatever a panel shows by replica it shows for each; errors are only where somebody made a mistake."""
    by_replica = [
        one for one in shown() if re.search(r"by \([^)]*\breplica\b", one.expr) and not excused(one, services)
    ]
    assert len(by_replica) > 20
    for one in by_replica:
        if "Errors answered" not in one.name:
            found: set[str] = set()

            def complete(one: Shown = one, found: set[str] = found) -> bool:
                found |= prometheus.labels_with_points(one.filled(), "replica")
                return found == replicas

            with contextlib.suppress(TimeoutError):
                until(complete, one.name, one.within_s)
            assert found == replicas, one.name


@pytest.mark.usefixtures("traffic")
def test_another_models_name_empties_every_panel_that_it_can(prometheus: Prometheus, services: set[str]) -> None:
    """The drop-down of models chooses on each panel whose metrics tell of a model or of a replica."""
    for one in shown():
        if "$model" in one.expr and not excused(one, services):
            points = prometheus.vector(one.filled(model="no-such-model"))
            # a share of nothing is no number, and a sum that begins with a number stays one
            assert not [value for _, value in points if value > 0], one.name


@pytest.mark.usefixtures("traffic")
def test_after_a_fault_the_right_panels_move(stack: Stack, prometheus: Prometheus, replicas: set[str]) -> None:
    """A replica that hangs shows on the first screen within seconds, by name, and no longer when it is over."""
    panels = {one.name: one for one in shown()}
    missing, states = panels["Fleet / Replicas not ready / A"], panels["Fleet / Replica states / A"]
    victim = max(replicas)

    def seen() -> tuple[float, set[str]]:
        unwell = {labels["replica"] for labels, value in prometheus.vector(states.filled()) if value > 1}
        return prometheus.number(missing.filled()), unwell

    until(lambda: seen() == (0, set()), "all is well", 60)
    stack.compose("pause", victim)
    try:
        until(lambda: seen() == (1, {victim}), f"{victim} is missing on both panels", 60)
    finally:
        stack.compose("unpause", victim)
        stack.wait_ready()
    until(lambda: seen() == (0, set()), "all is well again", 60)


@pytest.mark.usefixtures("traffic")
def test_nothing_is_counted_twice(stack: Stack, prometheus: Prometheus) -> None:
    """A known number of requests raises every counter by exactly that.

    Requests for one token, by which the replica's health check and the gateway see whether it still works, are told
    apart by their path and taken off: chats are what this test alone sends.
    """
    http = "http_server_request_duration_seconds_count"
    checks = f'sum({http}{{http_route="/v1/completions"}})'
    chats = [
        f'{http}{{http_route="/v1/chat/completions"}}',
        'gateway_requests_total{status="200"}',
        "gateway_request_duration_seconds_count",
    ]
    with_checks = ["vllm:request_success_total", "vllm:e2e_request_latency_seconds_count"]
    tokens = "vllm:generation_tokens_total"

    def read() -> dict[str, float]:
        now = time.time()
        found = {name: prometheus.number(f"sum({name})", now) for name in (*chats, *with_checks, tokens)}
        one_token = prometheus.number(checks, now)
        return found | {name: found[name] - one_token for name in (*with_checks, tokens)}

    def settled() -> dict[str, float]:
        """What is counted, where a scrape later it is the same: the last scrape may have come amid a request."""
        first = read()
        prometheus.await_scrape(time.time() + 1)
        second = read()
        return second if second == first else {}

    before = until(settled, "the counters stand still", 60)
    sent = send(stack)
    right = dict.fromkeys([*chats, *with_checks], sent.answers) | {tokens: sent.generated_tokens}

    def grown() -> dict[str, float]:
        return {name: value - before[name] for name, value in read().items()}

    # A replica writes its counters just after the last byte; the scrape that counts is one begun later.
    prometheus.await_scrape(time.time() + 1)
    with contextlib.suppress(TimeoutError):
        until(lambda: grown() == right, "all is counted", 30)
    assert grown() == right
    copies = prometheus.vector('count by (replica) ({job="replicas",__name__="vllm:num_requests_running"})')
    assert all(count == 1 for _, count in copies), f"a replica shows one metric more than once: {copies}"


@pytest.mark.usefixtures("traffic")
def test_clients_cannot_grow_the_metrics(stack: Stack, prometheus: Prometheus) -> None:
    """Made-up models, paths, methods and host names make no time series: memory does not grow with requests."""
    made_up = "madeup"

    def series() -> set[str]:
        """Every metric with its labels, the buckets of a histogram taken as one."""
        prometheus.await_scrape(time.time() + 1)
        asked: dict[str, str | float] = {"match[]": '{job=~"replicas|gateway"}', "start": time.time() - 5}
        found = prometheus.client.get("/api/v1/series", params=asked).json()["data"]
        return {json.dumps(labels | {"le": ""}, sort_keys=True) for labels in found}

    before = series()
    for _ in range(30):
        word = made_up + secrets.token_hex(8)
        chat(stack, "Hello", model=word)
        chat(stack, "Hello", temperature=-1, user=word)
        httpx.get(f"{stack.url}/v1/{word}")
        httpx.post(
            f"{stack.url}/v1/chat/completions", json=[word], headers={**stack.headers, "Host": f"{word}.example"}
        )
        httpx.request("BREW", f"{stack.url}/{word}", headers={"User-Agent": word})
    new = series() - before
    assert [one for one in new if made_up in one] == []
    # A status or a reason may be seen for the first time; a series for each request would be 30 of one metric.
    grown = Counter(json.loads(one)["__name__"] for one in new)
    assert [name for name, times in grown.items() if times > 10] == []


def test_every_rule_is_evaluated(prometheus: Prometheus, traffic: None) -> None:
    """Prometheus has all rules of the checkout, and none of them fails."""
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    wanted = {rule.get("alert") or rule["record"] for _, rule in rules_in()}
    assert {rule["name"] for rule in rules} == wanted
    until(
        lambda: all(rule["health"] == "ok" for group in prometheus.get("rules")["groups"] for rule in group["rules"]),
        "every rule was evaluated without an error",
        60,
    )


def test_every_metric_of_the_rules_is_there(prometheus: Prometheus, traffic: None) -> None:
    """But for those of GPUs, hosts, certificates and quotas, which this stack may not have."""
    known = json.loads((Path(__file__).parents[2] / "grafana" / "metrics.json").read_text())
    asked = {name for _, rule in rules_in() for name in METRIC.findall(with_selectors(rule["expr"]))}
    recorded = {rule["record"] for _, rule in rules_in() if "record" in rule}
    live = {
        name for name in asked - recorded - known["elsewhere"].keys() if prometheus.vector(f"{{__name__='{name}'}}")
    }
    assert asked - recorded - known["elsewhere"].keys() == live


def test_the_bounds_of_latencies_are_those_of_the_burn_rates(prometheus: Prometheus, traffic: None) -> None:
    """An objective is held against the nearest bounds of vLLM's histograms: another vLLM may have others."""
    for metric, bounds in burn_rates.HISTOGRAMS.values():
        found = {labels["le"] for labels, _ in prometheus.vector(f"count by (le) ({metric}_bucket)")}
        assert found == {*bounds, "+Inf"}
