"""What a dashboard is made of: queries, panels, sections, and the PromQL that they share.

Rates are of counters, quantiles of histograms merged over all replicas, shares of sums: nothing here is an average.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")

# $model and $replica are the drop-downs. vLLM's metrics have both labels, the gateway's requests too.
ENGINE = 'model_name=~"$model",replica=~"$replica"'
REQUESTS = 'job="gateway",model=~"$model",replica=~"$replica"'
# Of these only the replica is told; of_model() chooses by the model.
GATEWAY = 'job="gateway",replica=~"$replica"'
REPLICAS = 'job="replicas",replica=~"$replica"'
# These are of the gateway as a whole.
WHOLE = 'job="gateway"'

# A burn rate: at 1 an objective of slo.yml is just met, and at this one an alert pages (prometheus/rules/fleet.yml).
PAGE = 14.4

# Worst last: where a replica is between two states, the worse one shows.
STATES = {
    "ready": "green",
    "asleep": "purple",
    "stopped": "gray",
    "loading": "blue",
    "draining": "yellow",
    "wedged": "orange",
    "unreachable": "red",
}


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
    width is in Grafana's columns, of which a row has 24; height in its rows, None for what suits the kind. warn, alarm
    and ceiling, the axis' end, are in `unit`. `empty` says why the panel may have no data on a sound stack. `days`
    makes bars of a day each, over so many days. In a table each query is a column, its legend the column's name, and
    `labels` are the columns that name the rows. In a state-timeline `words` are the states with their colours, numbered
    from 1.
    """

    title: str
    unit: str
    queries: list[Query]
    read: str
    kind: Literal["timeseries", "stat", "state-timeline", "table"] = "timeseries"
    width: int = 8
    height: int | None = None
    stacked: bool = False
    ceiling: float | None = None
    decimals: int | None = None
    warn: float | None = None
    alarm: float | None = None
    empty: str = ""
    days: int = 0
    labels: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=lambda: STATES)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that the panel's queries select, each once."""
        return list(dict.fromkeys(name for query in self.queries for name in query.metrics))

    @property
    def description(self) -> str:
        """What Grafana shows behind the panel's (i): how to read it, why it may be empty, then the metrics."""
        empty = f"\n\nNo data: {self.empty}" if self.empty else ""
        return f"{self.read}{empty}\n\nFrom {', '.join(f'`{name}`' for name in self.metrics)}."


@dataclass(frozen=True)
class Variable:
    """A drop-down that offers the values of a label."""

    name: str
    title: str
    query: str


MODEL = Variable("model", "Model", "label_values(vllm:num_requests_running, model_name)")
REPLICA = Variable("replica", "Replica", 'label_values(up{job="replicas"}, replica)')


@dataclass(frozen=True)
class Dashboard:
    """A dashboard: its file name and uid, its title, its panels by section, in the order of the screen, its drop-downs.

    `folder` is the one below grafana/ where its file lies. `span` is the time that it shows at first.
    """

    uid: str
    title: str
    description: str
    sections: dict[str, list[Panel]]
    variables: list[Variable] = field(default_factory=lambda: [MODEL, REPLICA])
    folder: str = "dashboards"
    span: str = "15m"

    @property
    def panels(self) -> list[Panel]:
        """All panels, in the order of the screen."""
        return [panel for panels in self.sections.values() for panel in panels]


# ---- PromQL


def rate(metric: str, labels: str) -> str:
    """A counter's growth per second over Grafana's own window."""
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def of_model(expr: str) -> str:
    """Leaves out the replicas that are known to serve other models: one that is down is of any model."""
    return f'({expr} unless on (replica) vllm:num_requests_running{{model_name!~"$model"}})'


def total(expr: str, legend: str) -> list[Query]:
    """An additive expression over the whole fleet, as one line."""
    return [Query(f"sum({expr})", legend)]


def by(labels: str, expr: str) -> list[Query]:
    """An additive expression, one line for each value of the labels (`replica, cause`)."""
    return [Query(f"sum by ({labels}) ({expr})", " ".join(f"{{{{{label}}}}}" for label in labels.split(", ")))]


def per_replica(expr: str) -> list[Query]:
    """An additive expression for each replica and, as one more line, for the fleet."""
    return by("replica", expr) + total(expr, "fleet")


def quantile(cut: int, expr: str, labels: str = "") -> str:
    """A percentile of a rate of buckets, merged over all but these labels (`replica`)."""
    return f"histogram_quantile({cut / 100:.2f}, sum by ({f'{labels}, ' if labels else ''}le) ({expr}))"


def quantiles(metric: str, labels: str, choose: Callable[[str], str] = str) -> list[Query]:
    """Median, 95th and 99th percentile of a histogram over all replicas."""
    return [Query(quantile(cut, choose(rate(f"{metric}_bucket", labels))), f"p{cut}") for cut in (50, 95, 99)]


def p95_per_replica(metric: str, labels: str, choose: Callable[[str], str] = str) -> list[Query]:
    """The 95th percentile of a histogram, one line per replica."""
    return [Query(quantile(95, choose(rate(f"{metric}_bucket", labels)), "replica"), "{{replica}}")]


def share(part: str, whole: str, labels: str) -> list[Query]:
    """One counter over another, for each replica and for the fleet, from 0 to 1."""
    return [
        Query(f"sum by (replica) ({rate(part, labels)}) / sum by (replica) ({rate(whole, labels)})", "{{replica}}"),
        Query(f"sum({rate(part, labels)}) / sum({rate(whole, labels)})", "fleet"),
    ]


def mean(metric: str, labels: str, legend: str) -> Query:
    """The mean of all that a histogram has seen: the sum over the count."""
    return Query(f"sum({rate(f'{metric}_sum', labels)}) / sum({rate(f'{metric}_count', labels)})", legend)


def burn(objective: str) -> list[Query]:
    """How fast each model uses up the budget of an objective (`ttft`, `itl`, `availability`), by Prometheus' rules."""
    return [Query(f'model:{objective}_burn:rate5m{{model_name=~"$model"}}', "{{model_name}}")]


def numbered(metric: str, labels: str, label: str, words: Iterable[str]) -> str:
    """The number of each of these words where a gauge with that word as its label is 1: 1 for the first, and so on."""
    return " or ".join(f'{n} * {metric}{{{labels},{label}="{word}"}}' for n, word in enumerate(words, start=1))


def states() -> list[Query]:
    """The number of each replica's state, by STATES."""
    known = of_model(f"({numbered('gateway_replica_state', GATEWAY, 'state', STATES)})")
    return [Query(f"max by (replica) ({known})", "{{replica}}")]
