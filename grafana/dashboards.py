"""Writes grafana/dashboards/*.json, and checks that they are in step and ask only for metrics that exist.

A dashboard is a list of sections, a section a list of panels, a panel a few PromQL queries with one sentence on how to
read them. What each scrape job exports stands in metrics.json, recorded from a running stack by `--record`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

HERE = Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}

# Labels that Prometheus itself puts on what it scrapes.
SCRAPE_LABELS = {"job", "instance", "replica", "le"}
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")

Json = dict[str, Any]
Metrics = dict[str, set[str]]


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the legend of its series (Grafana's `{{label}}` form)."""

    expr: str
    legend: str

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that the expression selects, each once, in order of appearance."""
        return list(dict.fromkeys(name for name, _ in SELECTOR.findall(self.expr)))


@dataclass(frozen=True)
class Panel:
    """One panel. `read` says in words how to read it; the metric names are added to the description by themselves.

    width is in Grafana's columns, of which a row has 24. ceiling is the highest value of the axis, in `unit`.
    """

    title: str
    read: str
    queries: list[Query]
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    stacked: bool = False
    ceiling: float | None = None
    decimals: int | None = None
    warn: float | None = None
    alarm: float | None = None
    states: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that the panel's queries select, each once."""
        return list(dict.fromkeys(name for query in self.queries for name in query.metrics))

    @property
    def description(self) -> str:
        """What Grafana shows behind the panel's (i): how to read it, then the metrics."""
        return f"{self.read}\n\nFrom {', '.join(f'`{name}`' for name in self.metrics)}."


@dataclass(frozen=True)
class Dashboard:
    """A dashboard: its file name and uid, its title and its sections (title, panels)."""

    uid: str
    title: str
    description: str
    sections: list[tuple[str, list[Panel]]]

    @property
    def panels(self) -> Iterator[Panel]:
        """All panels, in the order in which they are shown."""
        for _, panels in self.sections:
            yield from panels


ENGINE = 'model_name=~"$model",replica=~"$replica"'
HTTP_ERRORS = (
    'job="replicas",replica=~"$replica",http_request_method="POST",http_route=~"/v1/.+",'
    'http_response_status_code=~"[45].."'
)
GATEWAY_ALL = 'job="gateway"'
MATCHED = GATEWAY_ALL + ',result="matched"'
GATEWAY = GATEWAY_ALL + ',replica=~"$replica"'
READY = GATEWAY + ',state="ready"'
PROBES = GATEWAY + ',result=~"token|no_token"'
ROUTED = GATEWAY + ',model=~"$model"'
FAILED = ROUTED + ',status=~"5.."'

# The order is that of concern: where a replica is between two states, the worse one shows.
STATES = ["ready", "loading", "draining", "wedged", "unreachable"]
STATE_COLORS = ["green", "blue", "yellow", "orange", "red"]


def rate(metric: str, labels: str) -> str:
    """A counter's growth per second over Grafana's own window."""
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def per_replica(expr: str) -> list[Query]:
    """An additive expression for each replica and, as one more line, for the fleet."""
    return [Query(f"sum by (replica) ({expr})", "{{replica}}"), Query(f"sum({expr})", "fleet")]


def quantiles(metric: str, labels: str) -> list[Query]:
    """Median, 90th and 99th percentile of a histogram over all replicas."""
    buckets = rate(f"{metric}_bucket", labels)
    return [Query(f"histogram_quantile(0.{cut}, sum by (le) ({buckets}))", f"p{cut}") for cut in ("50", "90", "99")]


def quantile_per_replica(metric: str, labels: str, cut: str = "90") -> list[Query]:
    """One percentile of a histogram, a line a replica."""
    buckets = rate(f"{metric}_bucket", labels)
    return [Query(f"histogram_quantile(0.{cut}, sum by (replica, le) ({buckets}))", "{{replica}}")]


def share(part: str, whole: str, labels: str) -> list[Query]:
    """One counter over another, for each replica and for the fleet, from 0 to 1."""
    return [
        Query(f"sum by (replica) ({rate(part, labels)}) / sum by (replica) ({rate(whole, labels)})", "{{replica}}"),
        Query(f"sum({rate(part, labels)}) / sum({rate(whole, labels)})", "fleet"),
    ]


def coded_state() -> str:
    """The number of each replica's state: 1 for the first of STATES, and so on."""
    coded = [f'{n} * gateway_replica_state{{{GATEWAY},state="{state}"}}' for n, state in enumerate(STATES, start=1)]
    return f"max by (replica) ({' or '.join(coded)})"


FLEET = Dashboard(
    uid="fleet",
    title="Fleet",
    description="Every replica and the gateway in front of them.",
    sections=[
        (
            "Now",
            [
                Panel(
                    "Replicas ready",
                    "Replicas that take new requests. Fewer than there are: look at the states further down.",
                    [Query(f"sum(gateway_replica_state{{{READY}}})", "ready")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Requests",
                    "Requests a second that the gateway has answered, whatever the status.",
                    [Query(f"sum({rate('gateway_requests_total', ROUTED)})", "requests")],
                    unit="reqps",
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Failed",
                    "Share of the requests that ended with a 5xx. Anything but 0 is worth a look at the gateway's log.",
                    [
                        Query(
                            f"(sum({rate('gateway_requests_total', FAILED)}) or vector(0))"
                            f" / sum({rate('gateway_requests_total', ROUTED)})",
                            "failed",
                        )
                    ],
                    unit="percentunit",
                    kind="stat",
                    width=4,
                    warn=0.001,
                    alarm=0.01,
                ),
                Panel(
                    "Time to first token, p90",
                    "Nine of ten requests got their first token within this time, as the engine measures it.",
                    [quantiles("vllm:time_to_first_token_seconds", ENGINE)[1]],
                    unit="s",
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Tokens generated",
                    "Tokens a second that all replicas together make.",
                    [Query(f"sum({rate('vllm:generation_tokens_total', ENGINE)})", "tokens/s")],
                    kind="stat",
                    width=4,
                    decimals=1,
                ),
                Panel(
                    "Waiting",
                    "Requests that wait in a replica for a place in its batch. Lasting numbers above 0: the fleet is"
                    " full.",
                    [Query(f"sum(vllm:num_requests_waiting{{{ENGINE}}})", "waiting")],
                    kind="stat",
                    width=4,
                    warn=1,
                    alarm=20,
                ),
            ],
        ),
        (
            "Requests",
            [
                Panel(
                    "Finished requests",
                    "Requests a second that each engine has finished. Uneven lines under even load: look at the reasons"
                    " of the gateway's choice.",
                    per_replica(rate("vllm:request_success_total", ENGINE)),
                    unit="reqps",
                ),
                Panel(
                    "How requests finished",
                    "stop: the model ended by itself; length: cut at max_tokens; abort: the client went away.",
                    [
                        Query(
                            f"sum by (finished_reason) ({rate('vllm:request_success_total', ENGINE)})",
                            "{{finished_reason}}",
                        )
                    ],
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "Errors of the replicas",
                    "Answers with 4xx (the client's mistake) or 5xx (the replica's) a second, as each replica gave"
                    " them.",
                    [
                        Query(
                            "sum by (replica, http_response_status_code) ("
                            f"{rate('http_server_request_duration_seconds_count', HTTP_ERRORS)})",
                            "{{replica}} {{http_response_status_code}}",
                        )
                    ],
                    unit="reqps",
                ),
                Panel(
                    "Running",
                    "Requests in each engine's batch. A flat top is the limit MAX_NUM_SEQS.",
                    per_replica(f"vllm:num_requests_running{{{ENGINE}}}"),
                ),
                Panel(
                    "Waiting",
                    "Requests that wait in each engine. On one replica only: the route is uneven; on all: the fleet is"
                    " full.",
                    per_replica(f"vllm:num_requests_waiting{{{ENGINE}}}"),
                ),
                Panel(
                    "Time in the queue, p90",
                    "Nine of ten requests waited less than this in the engine before their prompt was begun.",
                    quantile_per_replica("vllm:request_queue_time_seconds", ENGINE),
                    unit="s",
                ),
            ],
        ),
        (
            "Latency",
            [
                Panel(
                    "Time to first token (TTFT)",
                    "From the request's arrival in the engine to its first token: queue and prompt together.",
                    quantiles("vllm:time_to_first_token_seconds", ENGINE),
                    unit="s",
                ),
                Panel(
                    "Inter-token latency (ITL)",
                    "Time between one token and the next. Rises with the batch; steps are long prompts of others.",
                    quantiles("vllm:inter_token_latency_seconds", ENGINE),
                    unit="s",
                ),
                Panel(
                    "Time per output token (TPOT)",
                    "Mean time a token within one request, after the first. Its inverse is the speed that a reader"
                    " sees.",
                    quantiles("vllm:request_time_per_output_token_seconds", ENGINE),
                    unit="s",
                ),
                Panel(
                    "TTFT p90 per replica",
                    "One line far above the others: that replica is slow or its queue is long.",
                    quantile_per_replica("vllm:time_to_first_token_seconds", ENGINE),
                    unit="s",
                ),
                Panel(
                    "ITL p90 per replica",
                    "One line far above the others: that replica's GPU is slower, hotter or shared.",
                    quantile_per_replica("vllm:inter_token_latency_seconds", ENGINE),
                    unit="s",
                ),
                Panel(
                    "Whole request",
                    "From arrival in the engine to the last token. Follows the length of the answers.",
                    quantiles("vllm:e2e_request_latency_seconds", ENGINE),
                    unit="s",
                ),
            ],
        ),
        (
            "Tokens and cache",
            [
                Panel(
                    "Prompt tokens",
                    "Prompt tokens a second, those found in the prefix cache included.",
                    per_replica(rate("vllm:prompt_tokens_total", ENGINE)),
                ),
                Panel(
                    "Generated tokens",
                    "Tokens a second that each replica makes: the fleet's useful work.",
                    per_replica(rate("vllm:generation_tokens_total", ENGINE)),
                ),
                Panel(
                    "KV cache in use",
                    "Share of the KV blocks that running requests hold. Near 100 % requests are preempted or wait.",
                    [
                        Query(f"max by (replica) (vllm:kv_cache_usage_perc{{{ENGINE}}})", "{{replica}}"),
                        Query(f"avg(vllm:kv_cache_usage_perc{{{ENGINE}}})", "fleet"),
                    ],
                    unit="percentunit",
                    ceiling=1,
                ),
                Panel(
                    "Prefix cache hits",
                    "Share of the prompt tokens that were found in the KV cache and not computed again.",
                    share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", ENGINE),
                    unit="percentunit",
                    ceiling=1,
                ),
                Panel(
                    "Prefix blocks matched by the gateway",
                    "Share of the prompts' blocks that the gateway had already sent to the replica it chose. Far above"
                    " the"
                    " engines' own hits: their caches are too small and forget.",
                    [
                        Query(
                            f"sum({rate('gateway_prefix_blocks_total', MATCHED)})"
                            f" / sum({rate('gateway_prefix_blocks_total', GATEWAY_ALL)})",
                            "matched",
                        )
                    ],
                    unit="percentunit",
                    ceiling=1,
                ),
                Panel(
                    "Preemptions",
                    "Requests a second that were put back into the queue because the KV cache was full. Should be 0:"
                    " lower"
                    " MAX_NUM_SEQS or give the cache more memory.",
                    per_replica(rate("vllm:num_preemptions_total", ENGINE)),
                    unit="reqps",
                ),
            ],
        ),
        (
            "Gateway",
            [
                Panel(
                    "Replica states",
                    "ready takes requests; loading has not answered yet; draining finishes what it has; wedged lives"
                    " but"
                    " makes no token; unreachable does not answer.",
                    [Query(coded_state(), "{{replica}}")],
                    kind="state-timeline",
                    width=24,
                    states=dict(enumerate(zip(STATES, STATE_COLORS, strict=True), start=1)),
                ),
                Panel(
                    "Requests by replica",
                    "Requests a second that the gateway gave to each replica.",
                    per_replica(rate("gateway_requests_total", ROUTED + ',replica!=""')),
                    unit="reqps",
                ),
                Panel(
                    "Requests by status",
                    "What clients were told: 2xx is well, 4xx their own mistake, 429 the fleet is full, 5xx a failure.",
                    [Query(f"sum by (status) ({rate('gateway_requests_total', ROUTED)})", "{{status}}")],
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "Requests by reason of the choice",
                    "Why the replica was chosen: prefix, where the prompt's beginning is cached; session, where the"
                    " conversation began; load, the least busy; turn, the next one; retry, another had failed;"
                    " fallback,"
                    " none was ready; refused, none at all.",
                    [Query(f"sum by (reason) ({rate('gateway_requests_total', ROUTED)})", "{{reason}}")],
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "In flight",
                    "Requests that the gateway has given to each replica and that have not ended.",
                    per_replica(f"gateway_requests_in_flight{{{GATEWAY}}}"),
                ),
                Panel(
                    "Time to first byte",
                    "From the request's arrival at the gateway to the first byte of the answer: what clients feel,"
                    " retries"
                    " and queues included.",
                    quantiles("gateway_time_to_first_byte_seconds", GATEWAY),
                    unit="s",
                ),
                Panel(
                    "Whole request, p90 per replica",
                    "From the request's arrival at the gateway to the last byte of the answer.",
                    quantile_per_replica("gateway_request_duration_seconds", GATEWAY),
                    unit="s",
                ),
                Panel(
                    "Retries",
                    "Tries a second that failed on a replica before the first byte and went on to the next, by cause:"
                    " connect, no connection; reset, it broke; timeout; failed, its engine did;"
                    " refused, the replica was full.",
                    [
                        Query(
                            f"sum by (replica, cause) ({rate('gateway_retries_total', GATEWAY)})",
                            "{{replica}} {{cause}}",
                        )
                    ],
                    unit="reqps",
                ),
                Panel(
                    "Refusals",
                    "Requests a second that the gateway refused itself: full, every replica refused; none_ready;"
                    " failed, on two replicas; unknown_model;"
                    " closed, published without keys.",
                    [Query(f"sum by (cause) ({rate('gateway_refusals_total', GATEWAY_ALL)})", "{{cause}}")],
                    unit="reqps",
                ),
                Panel(
                    "Probes",
                    "Requests for one token that the gateway made to see whether a replica still works. Any no_token:"
                    " that"
                    " replica was wedged.",
                    [
                        Query(
                            f"sum by (replica, result) ({rate('gateway_probes_total', PROBES)})",
                            "{{replica}} {{result}}",
                        )
                    ],
                    unit="reqps",
                ),
            ],
        ),
        (
            "Metrics",
            [
                Panel(
                    "Scraped",
                    "1 while Prometheus reads the target, 0 when it cannot: the panels above then show nothing for it.",
                    [Query('up{job=~"replicas|gateway|prometheus"}', "{{job}} {{instance}}")],
                    width=12,
                    ceiling=1,
                ),
                Panel(
                    "Series kept",
                    "Time series in Prometheus' memory. Grows with the replicas, and should not grow with the"
                    " requests.",
                    [Query('prometheus_tsdb_head_series{job="prometheus"}', "series")],
                    width=12,
                ),
            ],
        ),
    ],
)

DASHBOARDS = [FLEET]


def thresholds(panel: Panel) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    if panel.warn is not None:
        steps.append({"color": "orange", "value": panel.warn})
    if panel.alarm is not None:
        steps.append({"color": "red", "value": panel.alarm})
    return {"mode": "absolute", "steps": steps}


def defaults(panel: Panel) -> Json:
    """Grafana's field defaults: unit, axis and look."""
    result: Json = {"unit": panel.unit, "min": 0, "thresholds": thresholds(panel)}
    if panel.ceiling is not None:
        result["max"] = panel.ceiling
    if panel.decimals is not None:
        result["decimals"] = panel.decimals
    if panel.kind == "timeseries":
        result["color"] = {"mode": "palette-classic"}
        result["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    if panel.states:
        options = {
            str(code): {"text": state, "color": color, "index": code} for code, (state, color) in panel.states.items()
        }
        result["mappings"] = [{"type": "value", "options": options}]
        result["custom"] = {"fillOpacity": 70, "lineWidth": 0}
    return result


LEGEND: Json = {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": True}
OPTIONS: dict[str, Json] = {
    "timeseries": {
        "legend": LEGEND,
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "state-timeline": {
        "alignValue": "left",
        "legend": LEGEND,
        "mergeValues": True,
        "rowHeight": 0.8,
        "showValue": "auto",
        "tooltip": {"mode": "single", "sort": "none"},
    },
}
HEIGHTS = {"timeseries": 8, "stat": 4, "state-timeline": 6}


def panel_json(panel: Panel, number: int, x: int, y: int) -> Json:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHTS[panel.kind]},
        "fieldConfig": {"defaults": defaults(panel), "overrides": []},
        "options": OPTIONS[panel.kind],
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "range": True,
            }
            for i, query in enumerate(panel.queries)
        ],
    }


def variable(name: str, label: str, query: str) -> Json:
    """A drop-down that offers a label's values; All matches also what comes later."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
    }


def dashboard_json(dashboard: Dashboard) -> Json:
    """The dashboard in Grafana's own form, panels laid out row by row."""
    panels: list[Json] = []
    y = 0
    for title, members in dashboard.sections:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        x, y, height = 0, y + 1, 0
        for panel in members:
            if x + panel.width > 24:
                x, y, height = 0, y + height, 0
            panels.append(panel_json(panel, len(panels) + 1, x, y))
            x, height = x + panel.width, max(height, HEIGHTS[panel.kind])
        y += height
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["vllm-fleet"],
        "schemaVersion": 41,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                variable("model", "Model", "label_values(vllm:num_requests_running, model_name)"),
                variable("replica", "Replica", 'label_values(up{job="replicas"}, replica)'),
            ]
        },
        "annotations": {"list": []},
        "panels": panels,
    }


def rendered(dashboard: Dashboard) -> str:
    return json.dumps(dashboard_json(dashboard), indent=2, ensure_ascii=False) + "\n"


def known_metrics() -> Metrics:
    """Metric name -> label names, over all jobs of metrics.json."""
    jobs: dict[str, dict[str, list[str]]] = json.loads((HERE / "metrics.json").read_text())
    return {name: set(labels) for metrics in jobs.values() for name, labels in metrics.items()}


def faults(query: Query, known: Metrics) -> Iterator[str]:
    """What is wrong with a query: a metric that nothing exports, a label that the metric does not have."""
    if not query.metrics:
        yield f"selects no metric: {query.expr}"
    for name, matchers in SELECTOR.findall(query.expr):
        if name not in known:
            yield f"{name} is exported by neither vLLM, the gateway nor Prometheus"
            continue
        for label in MATCHER.findall(matchers):
            if label not in known[name] | SCRAPE_LABELS:
                yield f"{name} has no label {label}"
    there = SCRAPE_LABELS.union(*(known.get(name, set()) for name in query.metrics))
    for labels in GROUPING.findall(query.expr):
        for label in (part.strip() for part in labels.split(",")):
            if label and label not in there:
                yield f"no metric of the query has the label {label}: {query.expr}"


def check() -> list[str]:
    """Every fault of the dashboards, one line each; none when all is well."""
    known = known_metrics()
    found = []
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            for query in panel.queries:
                found += [f"{dashboard.title} / {panel.title}: {fault}" for fault in faults(query, known)]
        path = HERE / "dashboards" / f"{dashboard.uid}.json"
        if not path.exists() or path.read_text() != rendered(dashboard):
            found.append(f"grafana/dashboards/{path.name} is out of step: run python grafana/dashboards.py")
    return found


def record(prometheus: str) -> None:
    """Writes metrics.json: for each scrape job its metrics with their label names, a metric a line."""
    blocks = []
    for job in ("replicas", "gateway", "prometheus"):
        reply = httpx.get(f"{prometheus}/api/v1/series", params={"match[]": f'{{job="{job}"}}'}, timeout=30)
        reply.raise_for_status()
        metrics: Metrics = {}
        for series in reply.json()["data"]:
            metrics.setdefault(series["__name__"], set()).update(series.keys() - SCRAPE_LABELS - {"__name__"})
        lines = [f"  {json.dumps(name)}: {json.dumps(sorted(labels))}" for name, labels in sorted(metrics.items())]
        blocks.append(f' "{job}": {{\n' + ",\n".join(lines) + "\n }")
    (HERE / "metrics.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main(
    check_only: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if anything is wrong.")] = False,
    record_from: Annotated[
        str | None, typer.Option("--record", metavar="URL", help="Take metrics.json anew from this Prometheus.")
    ] = None,
) -> None:
    """Write the dashboards' JSON, or check it."""
    console = Console(stderr=True, soft_wrap=True)
    if record_from:
        try:
            record(record_from)
        except httpx.HTTPError as error:
            console.print(f"Prometheus at {record_from} does not answer ({error}): is the stack up (make status)?")
            raise typer.Exit(1) from None
    if not check_only:
        for dashboard in DASHBOARDS:
            (HERE / "dashboards" / f"{dashboard.uid}.json").write_text(rendered(dashboard))
    found = check()
    for line in found:
        console.print(line, style="red", markup=False)
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
