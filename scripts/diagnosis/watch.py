"""Looks through Prometheus' eyes: what it cannot read, and which alerts fire."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from diagnosis.findings import Found, now
from diagnosis.seen import Seen

# Severities of alerts that want nobody to act.
QUIET = {"info", "none", "note"}
# A target that has just come was not read yet.
JUST_COME = timedelta(seconds=30)


def moment(text: str) -> datetime | None:
    """A time as Prometheus writes it; None where it says never."""
    try:
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        return None
    return found if found.year > 1 else None


def look_at_targets(seen: Seen, found: Found) -> str:
    """Whether Prometheus reads each part, and its own configuration."""
    targets: list[dict[str, Any]] = seen.prometheus.ask("targets")["activeTargets"]
    read = {target["labels"].get("replica") or target["labels"].get("job", "") for target in targets}
    for target in targets:
        labels, last = target["labels"], moment(target.get("lastScrape", ""))
        if target["health"] == "up" or (target["health"] == "unknown" and not last):
            continue
        name = labels.get("replica") or labels.get("job", "")
        if name in seen.stopped:
            continue
        condition = f'up{{job="{labels.get("job")}",instance="{labels.get("instance")}"}} == 1'
        what = f"Prometheus cannot read it: {target.get('lastError') or 'no reason given'}"
        found.wrong(name, what, "see whether it runs, above; while it lasts, its graphs are empty",
                    seen.last_time(condition))  # fmt: skip
    for name in seen.replicas:
        container = seen.containers.get(name)
        if name not in read and container and container.runs and now() - container.state.started > JUST_COME:
            fix = "the gateway tells Prometheus of replicas: see its look above"
            found.wrong(name, "Prometheus does not know it, so it has no graphs", fix)
    for _, value in seen.prometheus.vector("prometheus_config_last_reload_successful"):
        if value != 1:
            fix = "docker compose exec prometheus promtool check config /etc/prometheus/prometheus.yml"
            found.wrong("prometheus", "its new configuration has a mistake, so the old one stays", fix)
    return f"{sum(target['health'] == 'up' for target in targets)} of {len(targets)} are read"


def look_at_alerts(seen: Seen, found: Found) -> str:
    """Alerts that fire, and rules that cannot be evaluated."""
    alerts: list[dict[str, Any]] = seen.prometheus.ask("alerts")["alerts"]
    for alert in alerts:
        if alert["state"] != "firing":
            continue
        labels, says = alert["labels"], alert.get("annotations", {})
        what = says.get("summary") or says.get("description") or "it fires"
        runbook = says.get("runbook") or says.get("runbook_url")
        fix = f"see {runbook}" if runbook else says.get("description") or "see it at /alerts of Prometheus"
        of = labels.get("replica") or labels.get("key") or labels.get("model")
        subject = f"{labels['alertname']} ({of})" if of else labels["alertname"]
        say = found.note if labels.get("severity") in QUIET else found.wrong
        say(subject, what, fix, moment(alert.get("activeAt", "")))
    groups: list[dict[str, Any]] = seen.prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    for rule in rules:
        if rule.get("health") == "err":
            what = f"Prometheus cannot evaluate it: {rule.get('lastError')}"
            found.wrong(rule["name"], what, "promtool check rules names the mistake in prometheus/")
    count = {state: sum(alert["state"] == state for alert in alerts) for state in ("firing", "pending")}
    alerting = sum(rule["type"] == "alerting" for rule in rules)
    return f"{count['firing']} fire, {count['pending']} may soon, of {alerting} that are watched for"
