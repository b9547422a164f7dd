"""What the looks have seen so far: each finds what those before it learned."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, Field

from stack.compose import Compose, Config, is_replica
from stack.console import Problem
from stack.gateway import Gateway, Replica
from stack.prometheus import Prometheus
from stack.settings import Settings
from stack.shell import ask

# The project as docker-compose.yml names it.
PROJECT = "vllm-fleet"
# One question to Docker.
DOCKER_S = 10
PROMETHEUS_S = 4
# Docker writes this for a time that has not come.
NEVER = 1


class Check(BaseModel):
    """One run of a container's health check."""

    start: datetime = Field(alias="Start")
    exit_code: int = Field(alias="ExitCode")
    output: str = Field("", alias="Output")


class Health(BaseModel):
    """What a container's health check says; Docker keeps its last five runs."""

    status: str = Field("", alias="Status")
    log: list[Check] | None = Field(None, alias="Log")


class State(BaseModel):
    """How a container is."""

    status: str = Field(alias="Status")
    exit_code: int = Field(0, alias="ExitCode")
    oom_killed: bool = Field(False, alias="OOMKilled")
    error: str = Field("", alias="Error")
    started: datetime = Field(alias="StartedAt")
    finished: datetime = Field(alias="FinishedAt")
    # None where the service has no check
    health: Health | None = Field(None, alias="Health")


class Container(BaseModel):
    """A container of the stack, as `docker inspect` has it."""

    id: str = Field(alias="Id")
    created: datetime = Field(alias="Created")
    image: str = Field(alias="Image")  # its content
    restarts: int = Field(0, alias="RestartCount")
    state: State = Field(alias="State")
    config: dict[str, Any] = Field(alias="Config")
    host: dict[str, Any] = Field(default_factory=dict, alias="HostConfig")

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        return self.config.get("Labels") or {}

    @property
    def service(self) -> str:
        """The service that it runs."""
        return self.labels.get("com.docker.compose.service", "")

    @property
    def image_name(self) -> str:
        """Its image, by the name that it was started with."""
        return str(self.config.get("Image", ""))

    @property
    def runs(self) -> bool:
        """Whether its process lives."""
        return self.state.status == "running"

    @property
    def stays_down(self) -> bool:
        """Whether somebody stopped it: Docker starts anew what ends by itself."""
        policy = (self.host.get("RestartPolicy") or {}).get("Name", "")
        return self.state.status == "exited" and policy in ("unless-stopped", "always")

    @property
    def ended(self) -> datetime | None:
        """When its process last ended; None where it never did."""
        return self.state.finished if self.state.finished.year > NEVER else None

    @property
    def failing(self) -> Check | None:
        """The run of its health check that began to fail, as far back as Docker remembers; None while it passes."""
        first = None
        if self.state.health and self.state.health.status == "unhealthy":
            for check in reversed(self.state.health.log or []):
                if check.exit_code == 0:
                    break
                first = check
        return first

    def log(self, *, before_start: bool, lines: int = 400) -> list[str]:
        """The last lines that it logged in its present run, or in those before."""
        moment = self.state.started.isoformat()
        # what the last run says comes before the next one starts
        span = ("--until", moment) if before_start else ("--since", moment)
        done = ask("docker", "logs", "--timestamps", *span, "--tail", str(lines), self.id, timeout=DOCKER_S)
        # both outputs, in the order of their times
        told = sorted((done.stdout + done.stderr).splitlines(), key=lambda line: line.partition(" ")[0])
        return [line for each in told if (line := each.partition(" ")[2].rstrip())]


@dataclass
class Seen:
    """What is known. `has` names what later looks may need: settings, docker, files, stack, gateway, prometheus."""

    has: set[str] = field(default_factory=set)
    # the defaults, until they are read
    wanted: Settings = field(default_factory=lambda: Settings.model_validate({}))
    compose: Compose = field(default_factory=Compose)
    config: Config = field(default_factory=lambda: Config.model_validate({"services": {}, "x-pins": {}}))
    containers: dict[str, Container] = field(default_factory=dict)
    fleet: dict[str, Replica] = field(default_factory=dict)

    @property
    def gateway(self) -> Gateway:
        """The gateway, asked as users do."""
        return Gateway(self.compose, self.wanted.url, self.wanted.https_domain)

    @property
    def prometheus(self) -> Prometheus:
        """The stack's Prometheus."""
        return Prometheus(f"http://127.0.0.1:{self.wanted.prometheus_port}", timeout_s=PROMETHEUS_S)

    @property
    def replicas(self) -> list[str]:
        """The replicas that there are or should be."""
        return sorted({*self.config.replicas, *filter(is_replica, self.containers)})

    @property
    def stopped(self) -> set[str]:
        """The replicas that the autoscaler has stopped."""
        return {name for name, replica in self.fleet.items() if replica.state == "stopped"}

    def ask_prometheus(self) -> None:
        """Notes whether Prometheus answers."""
        try:
            self.prometheus.ask("status/buildinfo")
        except Problem:
            return
        self.has.add("prometheus")

    def last_time(self, condition: str) -> datetime | None:
        """When something was last so, by Prometheus; None where it does not know."""
        if "prometheus" not in self.has:
            return None
        try:
            return self.prometheus.last_time(condition)
        except Problem:
            return None


def containers(project: str) -> dict[str, Container]:
    """The containers of a project by service, running or not, without those of `docker compose run`. A Problem where
    Docker does not tell."""
    listed = ask("docker", "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={project}",
                 timeout=DOCKER_S)  # fmt: skip
    if listed.returncode:
        raise Problem(f"Docker does not list its containers: {listed.stderr.strip()}", "see `docker ps`")
    if not (ids := listed.stdout.split()):
        return {}
    told = ask("docker", "inspect", *ids, timeout=DOCKER_S)
    # one that has just gone is missing, and that is all
    found = [Container.model_validate(one) for one in json.loads(told.stdout or "[]")]
    own = [one for one in found if one.labels.get("com.docker.compose.oneoff") != "True"]
    return {one.service: one for one in own}


def ago(moment: datetime, now: datetime) -> str:
    """How long ago, in the unit that a person would choose."""
    passed = max(now - moment, timedelta())
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if count := int(passed.total_seconds() // size):
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
