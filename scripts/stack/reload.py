"""Prometheus and Alertmanager read their files anew when those have changed."""

from __future__ import annotations

from datetime import datetime

from stack.compose import Compose
from stack.console import Problem
from stack.shell import ROOT, ask

FOLDER = ROOT / "prometheus"
# What checks the files of each, inside its own container.
CHECKS = {
    "prometheus": ("promtool", "check", "config", "/etc/prometheus/prometheus.yml"),
    "alertmanager": ("amtool", "check-config", "/etc/alertmanager/alertmanager.yml"),
}


def by_whom_it_concerns(compose: Compose) -> str:
    """Makes each of them that runs read its files again if one is newer than its start; says in words what was done.

    A mistake in them is a Problem; they then go on as they were.
    """
    changed = max(path.lstat().st_mtime for path in (FOLDER, *FOLDER.rglob("*")))
    containers = compose.containers()
    read = []
    for service, check in CHECKS.items():
        container = containers.get(service)
        if container is None or container.state != "running":
            continue
        began = ask("docker", "inspect", "--format", "{{.State.StartedAt}}", container.id).stdout.strip()
        if changed <= datetime.fromisoformat(began).timestamp():
            continue
        checked = ask(*compose.command("exec", "-T", service, *check))
        if checked.returncode:
            said = (checked.stderr.strip() or checked.stdout.strip() or "no reason given").splitlines()[-1]
            raise Problem(f"the files of {service} have a mistake: {said}", "correct it and run `make up` again")
        compose.read_anew(service)
        read.append(service)
    return f"read again by {' and '.join(read)}, as files changed" if read else "unchanged"
