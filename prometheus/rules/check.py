"""Checks the rules: what comes from slo.yml is in step with it, and all ask only for metrics that exist.

PYTHONPATH=scripts .venv/bin/python -m prometheus.rules.check
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from grafana.rules import GROUPING, known_metrics, unknown
from stack import burn_rates, objectives
from stack.console import one_line_for_mistakes

HERE = Path(__file__).parent
Rule = dict[str, Any]

WORD = re.compile(r"[a-zA-Z_:][\w:]*")
# What stands in PromQL where a metric could, and is none: strings, selectors, ranges, labels of groupings, keywords.
NO_METRIC = re.compile(
    r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)'
    r"|\b(?:and|or|unless|bool|offset\s+\w+)\b|\b[a-z_0-9]+\s*(?=\(|by\b|without\b)|\b\d[\w.]*"
)


def rules_in() -> Iterator[tuple[Path, Rule]]:
    """Every rule of every file of rules, in order."""
    for path in sorted(HERE.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                yield path, rule


def with_selectors(expr: str) -> str:
    """The expression with `{}` behind each metric that has no selector."""
    blank = NO_METRIC.sub(lambda match: " " * len(match[0]), expr)
    for match in reversed(list(WORD.finditer(blank))):
        if not expr[match.end() :].startswith("{"):
            expr = f"{expr[: match.end()]}{{}}{expr[match.end() :]}"
    return expr


def check() -> list[str]:
    """Every fault of the rules, one line each; none when all is well."""
    known = known_metrics()
    found = [
        f"{path.name} is out of step with slo.yml: run python -m prometheus.rules.check --write"
        for path in burn_rates.out_of_step(objectives.load())
    ]
    rules = list(rules_in())
    for _, rule in rules:
        if "record" in rule:
            grouped = [label.strip() for labels in GROUPING.findall(rule["expr"]) for label in labels.split(",")]
            known[rule["record"]] = {"model_name", *grouped}
    for path, rule in rules:
        where = f"{path.name} / {rule.get('alert') or rule['record']}"
        found += [f"{where}: {fault}" for fault in unknown(with_selectors(rule["expr"]), known)]
    return found


def main(
    write: Annotated[bool, typer.Option(help="Write what comes from slo.yml anew before, as `make up` does.")] = False,
) -> None:
    """Say what is wrong with the rules; exit status 1 if anything is."""
    with one_line_for_mistakes():
        if write:
            burn_rates.write(objectives.load())
        found = check()
    for line in found:
        Console(stderr=True, soft_wrap=True).print(line, style="red", markup=False)
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
