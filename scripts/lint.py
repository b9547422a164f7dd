"""`make lint`: every linter, all of them even when one fails, and one table at the end."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.table import Table

from stack.console import console
from stack.shell import ROOT, ask

BIN = Path(sys.executable).parent  # where pip puts the linters
COMPOSE_FILES = [
    *(
        ["docker-compose.yml", *further]
        for further in (
            [],
            ["docker-compose.gpu.yml"],
            ["docker-compose.tls.yml"],
            ["docker-compose.host.yml"],
            ["docker-compose.webui.yml"],
            ["docker-compose.gpu.yml", "docker-compose.tls.yml"],
        )
    ),
    ["docker-compose.ray.yml"],
    ["docker-compose.ray.yml", "docker-compose.ray-gpu.yml"],
]
LIMIT_S = 300

Command = list[str]


@dataclass(frozen=True)
class Check:
    """A linter: `complaint` runs it and returns what it found wrong, nothing where all is well."""

    name: str
    complaint: Callable[[], str]


def files(*patterns: str) -> list[str]:
    """Paths of the repository's files, committed or new but not ignored, that match one of the patterns."""
    listed = ask("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
    paths = [Path(line) for line in sorted(set(listed)) if (ROOT / line).is_file()]
    return [str(path) for path in paths if any(path.match(pattern) for pattern in patterns)]


def shell_scripts() -> list[str]:
    """Files whose first line is a shell's #! line."""
    first_lines = {path: (ROOT / path).read_bytes().split(b"\n")[0] for path in files("*")}
    return [
        path for path, first in first_lines.items() if first.startswith(b"#!") and first.endswith((b"/sh", b"bash"))
    ]


def failed(*commands: Command) -> str:
    """Run all commands; what those said that failed."""
    done = [(command, ask(*command, timeout=LIMIT_S)) for command in commands]
    said = [f"$ {' '.join(command)[:200]}\n{it.stdout}{it.stderr}".strip() for command, it in done if it.returncode]
    return "\n".join(said)


def tool(name: str, *arguments: str) -> str:
    """A linter that pip installed."""
    return failed([str(BIN / name), *arguments])


# Gixy doubts these variables, but no client decides what they hold. njs sets $replica to a name of nginx/fleet/,
# $triton to one of two names and $reason to a word; $uri is one of the listed paths where either is reached,
# $allowed_origin is one that a setting lists, $token_service stands in nginx/host/, those of limits hold numbers and
# durations, and those of traces and of Open WebUI what njs sets or a header as Nginx read it, which is one line.
LIMITS = tuple(f'"${what}_{of}"' for what in ("limit", "remaining", "reset") for of in ("requests", "tokens"))
HEADERS = ('"$traceparent"', '"$tracestate"')
NAMES = ('"$replica"', '"$triton"', '"$reason"', '"$uri"', '"$allowed_origin"', '"$token_service"', '"$priority"')
WEBUI = tuple(f'"$webui_{what}"' for what in ("user", "name", "role", "seconds", "cookie"))
KNOWN = (*NAMES, *HEADERS, *LIMITS, *WEBUI)


def gixy() -> str:
    """Gixy's findings, but for those about KNOWN variables."""
    skipped = "--skips=try_files_is_evil_too,add_header_redefinition"  # three static files, with headers of their own
    done = ask(str(BIN / "gixy"), "--format=json", skipped, "nginx/nginx.conf", timeout=LIMIT_S)
    try:
        findings = json.loads(done.stdout)
    except json.JSONDecodeError:
        return done.stdout + done.stderr
    real = [finding for finding in findings if not any(name in finding["reason"] for name in KNOWN)]
    return "\n".join(f"{it['severity']} {it['plugin']}: {it['reason']}\n{it['config']}" for it in real)


def compose_combinations() -> str:
    """`docker compose config` for the files of each kind of host: without a profile, with each, and with all."""
    commands: list[Command] = []
    for chosen in COMPOSE_FILES:
        compose = ["docker", "compose", *(f"--file={file}" for file in chosen)]
        profiles = [f"--profile={profile}" for profile in ask(*compose, "config", "--profiles").stdout.split()]
        commands += [
            [*compose, *subset, "config", "--quiet"] for subset in ([], *([one] for one in profiles), profiles)
        ]
    return failed(*commands)


def in_service(service: str, program: str, *arguments: str) -> str:
    """A program in a service's own image, as its user and with its files, beside whatever runs."""
    asked = ask("docker", "compose", "config", "--images", service)
    if asked.returncode:
        return asked.stderr
    image = asked.stdout.splitlines()[0]
    if ask("docker", "image", "inspect", image).returncode:
        return f"It runs in the image {image}, which is not here: run `make up` once."
    run = ["docker", "compose", "run", "--rm", "--no-deps", "--no-TTY", "--entrypoint", program]
    return failed([*run, service, *arguments])


CHECKS = [
    Check("ruff check", lambda: tool("ruff", "check", "--quiet")),
    Check("ruff format", lambda: tool("ruff", "format", "--check", "--quiet")),
    Check("mypy", lambda: tool("mypy", "--no-error-summary", *files("*.py"))),
    Check("shellcheck", lambda: tool("shellcheck", *shell_scripts())),
    Check("hadolint", lambda: tool("hadolint", "--no-color", *files("Dockerfile"))),
    Check("yamllint", lambda: tool("yamllint", "--strict", *files("*.yml", "*.yaml"))),
    Check("gixy", gixy),
    Check("examples", lambda: failed([sys.executable, "examples/page.py", "--check"])),
    Check("dashboards", lambda: failed([sys.executable, "-m", "grafana.dashboards", "--check"])),
    Check("kubernetes", lambda: failed(["env", "PYTHONPATH=scripts", sys.executable, "deploy/kubernetes/check.py"])),
    Check("docker compose config", compose_combinations),
    Check("nginx -t", lambda: in_service("gateway", "nginx", "-p", "/etc/nginx/", "-t")),
    Check("rules", lambda: failed(["env", "PYTHONPATH=.:scripts", sys.executable, "-m", "prometheus.rules.check"])),
    Check(
        "promtool check config",
        lambda: in_service("prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml"),
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What a check said (nothing when it passed), and the seconds it took."""

    name: str
    complaint: str
    seconds: float


def main() -> None:
    """Run every linter; exit status 1 if any fails."""
    outcomes = []
    for check in CHECKS:
        began = time.monotonic()
        with console.status(check.name):
            complaint = check.complaint()
        outcomes.append(Outcome(check.name, complaint, time.monotonic() - began))
        if complaint:
            console.rule(f"[red]{check.name}[/]", align="left")
            console.print(complaint, markup=False, soft_wrap=True)
    table = Table("linter", "result", "seconds")
    for outcome in outcomes:
        table.add_row(outcome.name, "[red]failed[/]" if outcome.complaint else "[green]ok[/]", f"{outcome.seconds:.1f}")
    console.print(table)
    if any(outcome.complaint for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
