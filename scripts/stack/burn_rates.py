"""What `make up` writes from slo.yml: prometheus/rules/objectives.yml with burn rates, nginx/objectives.json as it is.

A burn rate is how fast an objective's budget is used up: at 1, what 30 days may have lasts 30 days. For a latency it is
the share of the tokens that came later than the objective says, over the 5 % that may; for availability the share of
the requests that failed, over the share that may. prometheus/rules/fleet.yml has the alerts on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stack.objectives import Objectives
from stack.shell import ROOT

FILE = ROOT / "prometheus" / "rules" / "objectives.yml"
FOR_GATEWAY = ROOT / "nginx" / "objectives.json"
HEAD = "# yamllint disable-file\n# Written by `make up` from slo.yml.\n"
WINDOWS = ("5m", "30m", "1h", "6h")
SLOW_SHARE = 0.05  # what may be slower than the 95th percentile's objective
# The bounds of vLLM's histograms, in seconds, as Prometheus writes them.
BOUNDS = (
    *("0.001", "0.005", "0.01", "0.02", "0.04", "0.06", "0.08", "0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0"),
    *("7.5", "10.0", "20.0", "40.0", "80.0", "160.0", "640.0", "2560.0"),
)
ITL_BOUNDS = (
    *("0.01", "0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75", "1.0", "2.5", "5.0"),
    *("7.5", "10.0", "20.0", "40.0", "80.0"),
)
HISTOGRAMS = {
    "ttft": ("vllm:time_to_first_token_seconds", BOUNDS),
    "itl": ("vllm:inter_token_latency_seconds", ITL_BOUNDS),
}

Rule = dict[str, Any]


def latency_rules(name: str, own: dict[str, float], default: float) -> list[Rule]:
    """The burn rates of one latency: of each model with an objective of its own, in seconds, and of all others."""
    metric, bounds = HISTOGRAMS[name]

    def late(matcher: str, within: float) -> str:
        """Tokens a second that came later; between two bounds of the histogram they are taken as evenly spread."""
        above = next(bound for bound in bounds if float(bound) >= within)
        below = bounds[bounds.index(above) - 1] if above != bounds[0] else None
        part = (within - float(below or 0)) / (float(above) - float(below or 0))

        def up_to(bound: str) -> str:
            return f'sum by (model_name) (rate({metric}_bucket{{{matcher},le="{bound}"}}[5m]))'

        if part == 1:
            quick = [up_to(above)]
        else:
            quick = [f"{part:.6g} * {up_to(above)}", *([f"{1 - part:.6g} * {up_to(below)}"] if below else [])]
        return f"sum by (model_name) (rate({metric}_count{{{matcher}}}[5m])) - {' - '.join(quick)}"

    spent = " or ".join(f"({late(matcher, seconds)}) / {SLOW_SHARE}" for matcher, seconds in each(own, default))
    return burn_rules(name, f"sum by (model_name) (rate({metric}_count[5m]))", spent)


def availability_rules(own: dict[str, float], default: float) -> list[Rule]:
    """The burn rates of availability. A mistake of the client (4xx), or one that hung up, counts neither way."""

    def requests(statuses: str) -> str:
        rate = f"sum by (model) (rate(gateway_requests_total{{{statuses}}}[5m]))"
        return f'label_replace({rate}, "model_name", "$1", "model", "(.*)")'

    def failed(matcher: str) -> str:
        # 0 from the start: a mean over an hour must not be one over the minutes since the first failure.
        of_models = matcher.replace("model_name", "model")
        return requests(f'status=~"5..",{of_models}') + f" or 0 * model:availability_counted:rate5m{{{matcher}}}"

    spent = " or ".join(f"({failed(matcher)}) / {1 - share:.6g}" for matcher, share in each(own, default))
    return burn_rules("availability", requests('status!~"4.."'), spent)


def burn_rules(name: str, counted: str, spent: str) -> list[Rule]:
    """What counts a second, what of it missed the objective as a multiple of its budget, and the burn rates of both.

    The longer windows are means of what is recorded: six hours of each replica's histograms would cost too much.
    """
    bases = [f"model:{name}_spent:rate5m", f"model:{name}_counted:rate5m"]
    rules = [{"record": bases[1], "expr": counted}, {"record": bases[0], "expr": spent}]
    for window in WINDOWS:
        part, whole = bases if window == "5m" else (f"avg_over_time({base}[{window}])" for base in bases)
        rules.append({"record": f"model:{name}_burn:rate{window}", "expr": f"{part} / {whole}"})
    return rules


def each(own: dict[str, float], default: float) -> Iterator[tuple[str, float]]:
    """A matcher and the objective for each model that has its own, and for all others together."""
    for model, value in own.items():
        yield f"model_name={json.dumps(model, ensure_ascii=False)}", value
    names = json.dumps("|".join(map(re.escape, own)), ensure_ascii=False)
    yield f"model_name!~{names}" if own else 'model_name=~".*"', default


def rendered(objectives: Objectives) -> str:
    """The text of objectives.yml."""
    default, models = objectives.default, objectives.models

    def differing(field: str) -> dict[str, float]:
        own = {name: getattr(one, field) for name, one in models.items()}
        return {name: value for name, value in own.items() if value != getattr(default, field)}

    rules = [
        *latency_rules("ttft", differing("ttft_p95_seconds"), default.ttft_p95_seconds),
        *latency_rules("itl", differing("itl_p95_seconds"), default.itl_p95_seconds),
        *availability_rules(differing("availability"), default.availability),
    ]
    groups = {"groups": [{"name": "burn-rates", "interval": "30s", "rules": rules}]}
    return HEAD + yaml.safe_dump(groups, sort_keys=False, width=1000, allow_unicode=True)


def files(objectives: Objectives) -> dict[Path, str]:
    """What is written from slo.yml, for Prometheus and for the gateway: the text of each file."""
    return {FILE: rendered(objectives), FOR_GATEWAY: objectives.model_dump_json(indent=1) + "\n"}


def out_of_step(objectives: Objectives) -> list[Path]:
    """Those files that say something else than slo.yml."""
    return [path for path, text in files(objectives).items() if not path.exists() or path.read_text() != text]


def write(objectives: Objectives) -> str:
    """Brings these files in step; says in words what was done."""
    stale = out_of_step(objectives)
    for path in stale:
        path.write_text(files(objectives)[path])
    return f"{' and '.join(path.name for path in stale)} written anew" if stale else "unchanged"
