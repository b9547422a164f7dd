"""What holds for every panel of every dashboard, over the JSON that Grafana reads.

metrics.json says what each scrape job exports, with the labels; `--record` takes it from a running stack.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana.panels import SELECTOR

HERE = Path(__file__).parent

# Labels that Prometheus itself puts on what it scrapes.
SCRAPE_LABELS = {"job", "instance", "le"}
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
NAME = re.compile(r"[a-zA-Z_:][\w:]*")
GROWTH = re.compile(r"\b(?:rate|increase)\(\s*$")
COUNTED = re.compile(r"\bcount(?: by \([^)]*\))? \(\s*$")
# Prometheus and the hosts serve no model.
OTHER_JOB = re.compile(r'\bjob=~?"(?!(?:replicas|gateway)")')
WINDOW = re.compile(r"^\s*\[[^\]]+\]\s*\)")
MERGED = re.compile(r"histogram_quantile\(0\.\d+, sum by \([^)]*\ble\) \(")
# Which drop-down chooses by which label.
DROP_DOWNS = {"model": "model", "model_name": "model", "replica": "replica", "key": "key"}

Json = dict[str, Any]
Metrics = dict[str, set[str]]


def known_metrics() -> Metrics:
    """Metric name -> label names, over all jobs of metrics.json."""
    jobs: dict[str, dict[str, list[str]]] = json.loads((HERE / "metrics.json").read_text())
    known: Metrics = {}
    for metrics in jobs.values():
        for name, labels in metrics.items():
            known.setdefault(name, set()).update(labels)
    return known


def unknown(expr: str, known: Metrics) -> Iterator[str]:
    """What an expression asks for and nobody has: a metric that nothing exports, a label that it has not."""
    selected = SELECTOR.findall(expr)
    for name, matchers in selected:
        if name not in known:
            yield f"{name} is exported by nothing that is scraped"
            continue
        for label in MATCHER.findall(matchers):
            if label not in known[name] | SCRAPE_LABELS:
                yield f"{name} has no label {label}"
    there = SCRAPE_LABELS.union(*(known.get(name, set()) for name, _ in selected))
    for labels in GROUPING.findall(expr):
        for label in (part.strip() for part in labels.split(",")):
            if label and label not in there:
                yield f"no metric of the query has the label {label}: {expr}"


def query_faults(expr: str, known: Metrics) -> Iterator[str]:
    """What is wrong with a query: what nobody has, a metric without its labels, a sum that means nothing."""
    if not SELECTOR.search(expr):
        yield f"selects no metric: {expr}"
    yield from unknown(expr, known)
    for name in NAME.findall(SELECTOR.sub("", expr)):
        if name in known:
            yield f"{name} needs its labels, such as the job: {expr}"
    yield from meaning_faults(expr)


def meaning_faults(expr: str) -> Iterator[str]:
    """A counter that is not taken as a rate, a quantile that is not of merged buckets, an average."""
    for found in SELECTOR.finditer(expr):
        before, after = expr[: found.start()], expr[found.end() :]
        grows = found[1].endswith(("_total", "_bucket", "_count", "_sum"))
        taken = (GROWTH.search(before) and WINDOW.match(after)) or COUNTED.search(before)
        if grows and not taken:
            yield f"{found[1]} is a counter and needs a rate: {expr}"
    if len(re.findall(r"\bhistogram_quantile\(", expr)) != len(MERGED.findall(expr)):
        yield f"a quantile is not of buckets merged by le: {expr}"
    if re.search(r"\b(?:avg|avg_over_time|quantile|quantile_over_time)\b\s*(?:by|without)?\s*\(", expr):
        yield f"an average, or a quantile of values: take sums, or merged histograms: {expr}"


def variable_faults(expr: str, offered: set[str], known: Metrics) -> Iterator[str]:
    """A drop-down that does not choose, though the query has a metric with its label."""
    for name, matchers in SELECTOR.findall(expr):
        if OTHER_JOB.search(matchers):
            continue
        for label in known.get(name, set()):
            variable = DROP_DOWNS.get(label)
            # a replica is of a model where its metric does not say so: of_model() chooses there
            direct = f"${variable}" in matchers
            if variable in offered and not direct and f'"${variable}"' not in expr:
                yield f"${variable} does not choose of {name}: {expr}"
        replica_only = "replica" in known.get(name, set()) and not known[name] & {"model", "model_name"}
        if replica_only and "model" in offered and '{model_name!~"$model"}' not in expr:
            yield f"$model does not choose of {name}: {expr}"


def faults(dashboard: Json, known: Metrics) -> Iterator[str]:
    """Every fault of a dashboard's JSON, one line each."""
    offered = {variable["name"] for variable in dashboard["templating"]["list"]}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    everything = json.dumps([target["expr"] for panel in panels for target in panel["targets"]])
    for name in sorted(offered):
        if f"${name}" not in everything:
            yield f"{dashboard['title']}: no panel uses ${name}"
    for panel in panels:
        where = f"{dashboard['title']} / {panel['title']}"
        description = panel.get("description") or ""
        if not panel["fieldConfig"]["defaults"].get("unit"):
            yield f"{where}: has no unit"
        if not panel["targets"]:
            yield f"{where}: has no query"
        for target in panel["targets"]:
            expr = target["expr"]
            for name, _ in SELECTOR.findall(expr):
                if f"`{name}`" not in description:
                    yield f"{where}: its description does not name {name}"
            yield from (f"{where}: {fault}" for fault in query_faults(expr, known))
            yield from (f"{where}: {fault}" for fault in variable_faults(expr, offered, known))
