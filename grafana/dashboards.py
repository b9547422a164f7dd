"""Writes grafana/dashboards/*.json, and checks that they are in step and ask only for metrics that exist.

A panel is one entry of a table: title, unit, queries, how to read it. Grafana's own SDK turns the table into JSON.
metrics.json says what each scrape job exports; `--record` takes it from a running stack.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Literal

import httpx
import typer
from grafana_foundation_sdk.builders import common as parts
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import stat, statetimeline, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from rich.console import Console

HERE = Path(__file__).parent
DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="prometheus")

# Labels that Prometheus itself puts on what it scrapes.
SCRAPE_LABELS = {"job", "instance", "replica", "le"}
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")

Metrics = dict[str, set[str]]
Builder = timeseries.Panel | stat.Panel | statetimeline.Panel


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
    """One panel: `read` says what it shows and what to do about it.

    unit is Grafana's name of the unit: `s`, `reqps` (requests a second), `percentunit` (0 to 1) or `short` (a number).
    width is in Grafana's columns, of which a row has 24. warn, alarm and ceiling, the axis' end, are in `unit`.
    """

    title: str
    unit: str
    queries: list[Query]
    read: str
    kind: Literal["timeseries", "stat", "state-timeline"] = "timeseries"
    width: int = 8
    stacked: bool = False
    ceiling: float | None = None
    decimals: int | None = None
    warn: float | None = None
    alarm: float | None = None

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
    """A dashboard: its file name and uid, its title, and its panels by section, in the order of the screen."""

    uid: str
    title: str
    description: str
    sections: dict[str, list[Panel]]

    @property
    def panels(self) -> list[Panel]:
        """All panels, in the order of the screen."""
        return [panel for panels in self.sections.values() for panel in panels]


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
CHOSEN = ROUTED + ',replica!=""'
FAILED = ROUTED + ',status=~"5.."'

# Worst last: where a replica is between two states, the worse one shows.
STATES = {"ready": "green", "loading": "blue", "draining": "yellow", "wedged": "orange", "unreachable": "red"}


def rate(metric: str, labels: str) -> str:
    """A counter's growth per second over Grafana's own window."""
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def total(expr: str, legend: str) -> list[Query]:
    """An additive expression over the whole fleet, as one line."""
    return [Query(f"sum({expr})", legend)]


def by(labels: str, expr: str) -> list[Query]:
    """An additive expression, one line for each value of the labels (`replica, cause`)."""
    return [Query(f"sum by ({labels}) ({expr})", " ".join(f"{{{{{label}}}}}" for label in labels.split(", ")))]


def per_replica(expr: str) -> list[Query]:
    """An additive expression for each replica and, as one more line, for the fleet."""
    return by("replica", expr) + total(expr, "fleet")


def quantile(metric: str, labels: str, cut: int) -> Query:
    """One percentile of a histogram over all replicas."""
    return Query(f"histogram_quantile(0.{cut}, sum by (le) ({rate(f'{metric}_bucket', labels)}))", f"p{cut}")


def quantiles(metric: str, labels: str) -> list[Query]:
    """Median, 90th and 99th percentile of a histogram over all replicas."""
    return [quantile(metric, labels, cut) for cut in (50, 90, 99)]


def p90_per_replica(metric: str, labels: str) -> list[Query]:
    """The 90th percentile of a histogram, one line per replica."""
    return [
        Query(f"histogram_quantile(0.90, sum by (replica, le) ({rate(f'{metric}_bucket', labels)}))", "{{replica}}")
    ]


def share(part: str, whole: str, labels: str) -> list[Query]:
    """One counter over another, for each replica and for the fleet, from 0 to 1."""
    return [
        Query(f"sum by (replica) ({rate(part, labels)}) / sum by (replica) ({rate(whole, labels)})", "{{replica}}"),
        Query(f"sum({rate(part, labels)}) / sum({rate(whole, labels)})", "fleet"),
    ]


def coded_states() -> list[Query]:
    """The number of each replica's state: 1 for the first of STATES, and so on."""
    coded = [f'{n} * gateway_replica_state{{{GATEWAY},state="{state}"}}' for n, state in enumerate(STATES, start=1)]
    return [Query(f"max by (replica) ({' or '.join(coded)})", "{{replica}}")]


FLEET = Dashboard(
    uid="fleet",
    title="Fleet",
    description="Every replica and the gateway in front of them.",
    sections={
        "Now": [
            Panel(
                "Replicas ready",
                "short",
                total(f"gateway_replica_state{{{READY}}}", "ready"),
                "Replicas that take new requests. If some are missing, look at the states further down.",
                kind="stat",
                width=4,
            ),
            Panel(
                "Requests",
                "reqps",
                total(rate("gateway_requests_total", ROUTED), "requests"),
                "Requests a second that the gateway has answered, whatever the status.",
                kind="stat",
                width=4,
            ),
            Panel(
                "Failed",
                "percentunit",
                [
                    Query(
                        f"(sum({rate('gateway_requests_total', FAILED)}) or vector(0))"
                        f" / sum({rate('gateway_requests_total', ROUTED)})",
                        "failed",
                    )
                ],
                "Share of the requests that ended with a 5xx. If it is not 0, look at the gateway's log.",
                kind="stat",
                width=4,
                warn=0.001,
                alarm=0.01,
            ),
            Panel(
                "Time to first token, p90",
                "s",
                [quantile("vllm:time_to_first_token_seconds", ENGINE, 90)],
                "Nine of ten requests got their first token within this time, as the engine measures it.",
                kind="stat",
                width=4,
            ),
            Panel(
                "Tokens generated",
                "short",
                total(rate("vllm:generation_tokens_total", ENGINE), "tokens/s"),
                "Tokens a second that all replicas make together.",
                kind="stat",
                width=4,
                decimals=1,
            ),
            Panel(
                "Waiting",
                "short",
                total(f"vllm:num_requests_waiting{{{ENGINE}}}", "waiting"),
                "Requests that wait for a place in a replica's batch. If it stays above 0, the fleet is full.",
                kind="stat",
                width=4,
                warn=1,
                alarm=20,
            ),
        ],
        "Requests": [
            Panel(
                "Finished requests",
                "reqps",
                per_replica(rate("vllm:request_success_total", ENGINE)),
                "Requests a second that each engine has finished. If the lines differ under even load, look at the"
                " reasons for the gateway's choice.",
            ),
            Panel(
                "How requests finished",
                "reqps",
                by("finished_reason", rate("vllm:request_success_total", ENGINE)),
                "stop: the model ended by itself; length: cut at max_tokens; abort: the client went away.",
                stacked=True,
            ),
            Panel(
                "Errors of the replicas",
                "reqps",
                by(
                    "replica, http_response_status_code",
                    rate("http_server_request_duration_seconds_count", HTTP_ERRORS),
                ),
                "Errors a second that each replica answered with. 4xx is the client's mistake. 5xx is the replica's:"
                " look at its log.",
            ),
            Panel(
                "Running",
                "short",
                per_replica(f"vllm:num_requests_running{{{ENGINE}}}"),
                "Requests in each engine's batch. A flat top is the limit MAX_NUM_SEQS: raise it if the KV cache has"
                " room.",
            ),
            Panel(
                "Waiting",
                "short",
                per_replica(f"vllm:num_requests_waiting{{{ENGINE}}}"),
                "Requests that wait in each engine. If they wait on one replica only, the load is uneven. If they"
                " wait on all, the fleet is full.",
            ),
            Panel(
                "Time in the queue, p90",
                "s",
                p90_per_replica("vllm:request_queue_time_seconds", ENGINE),
                "Nine of ten requests waited less than this in the engine before it began their prompt. If it grows,"
                " the fleet is full: add a replica.",
            ),
        ],
        "Latency": [
            Panel(
                "Time to first token (TTFT)",
                "s",
                quantiles("vllm:time_to_first_token_seconds", ENGINE),
                "From the request's arrival in the engine to its first token. If it is long, look at the queue first,"
                " then at the length of the prompts.",
            ),
            Panel(
                "Inter-token latency (ITL)",
                "s",
                quantiles("vllm:inter_token_latency_seconds", ENGINE),
                "Time between one token and the next. It rises with the batch. Steps are other requests' long prompts.",
            ),
            Panel(
                "Time per output token (TPOT)",
                "s",
                quantiles("vllm:request_time_per_output_token_seconds", ENGINE),
                "Mean time per token of a request, after the first. One divided by it is the speed that a reader sees.",
            ),
            Panel(
                "TTFT p90 per replica",
                "s",
                p90_per_replica("vllm:time_to_first_token_seconds", ENGINE),
                "If one line is far above the others, that replica is slow or its queue is long.",
            ),
            Panel(
                "ITL p90 per replica",
                "s",
                p90_per_replica("vllm:inter_token_latency_seconds", ENGINE),
                "If one line is far above the others, that replica's GPU is slower, hotter or shared.",
            ),
            Panel(
                "Whole request",
                "s",
                quantiles("vllm:e2e_request_latency_seconds", ENGINE),
                "From the request's arrival in the engine to its last token. It follows the length of the answers.",
            ),
        ],
        "Tokens and cache": [
            Panel(
                "Prompt tokens",
                "short",
                per_replica(rate("vllm:prompt_tokens_total", ENGINE)),
                "Prompt tokens a second, including those found in the prefix cache.",
            ),
            Panel(
                "Generated tokens",
                "short",
                per_replica(rate("vllm:generation_tokens_total", ENGINE)),
                "Tokens a second that each replica makes: the fleet's useful work.",
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                [
                    Query(f"max by (replica) (vllm:kv_cache_usage_perc{{{ENGINE}}})", "{{replica}}"),
                    Query(f"avg(vllm:kv_cache_usage_perc{{{ENGINE}}})", "fleet"),
                ],
                "Share of the KV blocks that running requests hold. Near 100 %, requests wait or are preempted: give"
                " the cache more memory or add a replica.",
                ceiling=1,
            ),
            Panel(
                "Prefix cache hits",
                "percentunit",
                share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", ENGINE),
                "Share of the prompt tokens that the engine found in its KV cache and did not compute again. If it is"
                " low though prompts repeat, look at the reasons for the gateway's choice.",
                ceiling=1,
            ),
            Panel(
                "Prefix blocks matched by the gateway",
                "percentunit",
                [
                    Query(
                        f"sum({rate('gateway_prefix_blocks_total', MATCHED)})"
                        f" / sum({rate('gateway_prefix_blocks_total', GATEWAY_ALL)})",
                        "matched",
                    )
                ],
                "Share of the prompts' blocks that the gateway had sent to the same replica before. If it is far"
                " above the engines' own hits, their caches are too small and forget.",
                ceiling=1,
            ),
            Panel(
                "Preemptions",
                "reqps",
                per_replica(rate("vllm:num_preemptions_total", ENGINE)),
                "Requests a second that went back into the queue because the KV cache was full. If it is not 0, lower"
                " MAX_NUM_SEQS or give the cache more memory.",
            ),
        ],
        "Gateway": [
            Panel(
                "Replica states",
                "short",
                coded_states(),
                "ready: takes requests; loading: has not answered yet; draining: finishes what it has; wedged: lives"
                " but makes no token; unreachable: does not answer.",
                kind="state-timeline",
                width=24,
            ),
            Panel(
                "Requests by replica",
                "reqps",
                per_replica(rate("gateway_requests_total", CHOSEN)),
                "Requests a second that the gateway gave to each replica.",
            ),
            Panel(
                "Requests by status",
                "reqps",
                by("status", rate("gateway_requests_total", ROUTED)),
                "What clients were told. 2xx: all is well; 4xx: their own mistake; 429: the fleet is full; 5xx: a"
                " failure.",
                stacked=True,
            ),
            Panel(
                "Requests by reason of the choice",
                "reqps",
                by("reason", rate("gateway_requests_total", ROUTED)),
                "Why the gateway chose the replica. prefix: it has the prompt's beginning in its cache; session: the"
                " conversation began there; load: it was the least busy; turn: it was next; retry: another had failed;"
                " fallback: none was ready; refused: there was none at all.",
                stacked=True,
            ),
            Panel(
                "In flight",
                "short",
                per_replica(f"gateway_requests_in_flight{{{GATEWAY}}}"),
                "Requests that the gateway has given to each replica and that have not ended.",
            ),
            Panel(
                "Time to first byte",
                "s",
                quantiles("gateway_time_to_first_byte_seconds", GATEWAY),
                "From the request's arrival at the gateway to the first byte of the answer. This is what clients"
                " feel, with retries and queues.",
            ),
            Panel(
                "Whole request, p90 per replica",
                "s",
                p90_per_replica("gateway_request_duration_seconds", GATEWAY),
                "From the request's arrival at the gateway to the last byte of the answer.",
            ),
            Panel(
                "Retries",
                "reqps",
                by("replica, cause", rate("gateway_retries_total", GATEWAY)),
                "Tries a second that failed on a replica before the first byte and went on to the next. connect: no"
                " connection; reset: it broke; timeout: no answer in time; failed: the engine broke; refused: the"
                " replica was full; draining: it was being stopped.",
            ),
            Panel(
                "Refusals",
                "reqps",
                by("cause", rate("gateway_refusals_total", GATEWAY_ALL)),
                "Requests a second that the gateway itself refused. full: every replica refused; failed: two broke on"
                " it; none_ready: no replica was ready; unknown_model: nobody serves it; closed: published without"
                " keys; host, origin, media, connection: a browser's page, or a request that is none of ours.",
            ),
            Panel(
                "Probes",
                "reqps",
                by("replica, result", rate("gateway_probes_total", PROBES)),
                "One-token requests by which the gateway sees whether a replica still works. no_token: that replica"
                " was wedged.",
            ),
        ],
        "Metrics": [
            Panel(
                "Scraped",
                "short",
                [Query('up{job=~"replicas|gateway|prometheus"}', "{{job}} {{instance}}")],
                "1 while Prometheus can read the target. At 0, the panels above show nothing for it.",
                width=8,
                ceiling=1,
            ),
            Panel(
                "Series kept",
                "short",
                [Query('prometheus_tsdb_head_series{job="prometheus"}', "series")],
                "Time series in Prometheus' memory. They grow with the replicas and should not grow with the requests.",
                width=8,
            ),
            Panel(
                "Writes lost",
                "short",
                by("zone", f"increase(gateway_writes_lost_total{{{GATEWAY_ALL}}}[$__rate_interval])"),
                "Writes of the gateway that found no room in a zone of its memory. Above 0, what it knows of replicas,"
                " models or counts has gaps: make that zone larger in nginx/conf.d/njs.conf.",
                width=8,
            ),
        ],
    },
)

DASHBOARDS = [FLEET]


LEGEND = parts.VizLegendOptions().show_legend(True)


def look(panel: Panel) -> Builder:
    """The panel's kind with its look, where that differs from the SDK's defaults, and its height in Grafana's rows."""
    if panel.kind == "stat":
        last = parts.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
        return stat.Panel().height(4).reduce_options(last)
    if panel.kind == "state-timeline":
        words = {
            str(code): dashboard.ValueMappingResult(text=state, color=color, index=code)
            for code, (state, color) in enumerate(STATES.items(), start=1)
        }
        return statetimeline.Panel().height(6).mappings([dashboard.ValueMap(options=words)]).legend(LEGEND)
    stacking = common.StackingMode.NORMAL if panel.stacked else common.StackingMode.NONE
    return (
        timeseries.Panel()
        .height(8)
        .color_scheme(grafana.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC))
        .fill_opacity(30 if panel.stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .stacking(parts.StackingConfig().mode(stacking).group("A"))
        .legend(LEGEND)
        .tooltip(parts.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    )


def panel_builder(panel: Panel, number: int) -> Builder:
    """The panel as the SDK builds it; `number` is its id."""
    steps = [dashboard.Threshold(None, "green")]
    steps += [
        dashboard.Threshold(at, color) for at, color in ((panel.warn, "orange"), (panel.alarm, "red")) if at is not None
    ]
    built = (
        look(panel)
        .id(number)
        .title(panel.title)
        .description(panel.description)
        .datasource(DATASOURCE)
        .span(panel.width)
        .unit(panel.unit)
        .min(0)
        .thresholds(grafana.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
    )
    if panel.ceiling is not None:
        built.max(panel.ceiling)
    if panel.decimals is not None:
        built.decimals(panel.decimals)
    for letter, query in zip(ascii_uppercase, panel.queries, strict=False):
        target = Dataquery().ref_id(letter).datasource(DATASOURCE).expr(query.expr).legend_format(query.legend)
        built.with_target(target.range())
    return built


def variable(name: str, label: str, query: str) -> grafana.QueryVariable:
    """A drop-down that offers a label's values; All matches also what comes later."""
    return (
        grafana.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .definition(query)
        .query({"query": query, "refId": name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def rendered(what: Dashboard) -> str:
    """The dashboard's JSON in Grafana's own form. The SDK lays the panels out row by row."""
    built = (
        grafana.Dashboard(what.title)
        .uid(what.uid)
        .description(what.description)
        .tags(["vllm-fleet"])
        .readonly()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-15m", "now")
        .timezone(common.TimeZoneBrowser)
        .with_variable(variable("model", "Model", "label_values(vllm:num_requests_running, model_name)"))
        .with_variable(variable("replica", "Replica", 'label_values(up{job="replicas"}, replica)'))
    )
    ids = count(1)
    for title, panels in what.sections.items():
        built.with_row(grafana.Row(title).id(next(ids)))
        for panel in panels:
            built.with_panel(panel_builder(panel, next(ids)))
    return json.dumps(built.build(), cls=JSONEncoder, indent=1, ensure_ascii=False) + "\n"


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
    for each in DASHBOARDS:
        for panel in each.panels:
            for query in panel.queries:
                found += [f"{each.title} / {panel.title}: {fault}" for fault in faults(query, known)]
        path = HERE / "dashboards" / f"{each.uid}.json"
        if not path.exists() or path.read_text() != rendered(each):
            found.append(f"grafana/dashboards/{path.name} is out of step: run python grafana/dashboards.py")
    return found


def record(prometheus: str) -> None:
    """Writes metrics.json: for each scrape job its metrics with their label names, one metric per line."""
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
        for each in DASHBOARDS:
            (HERE / "dashboards" / f"{each.uid}.json").write_text(rendered(each))
    found = check()
    for line in found:
        console.print(line, style="red", markup=False)
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
