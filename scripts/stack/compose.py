"""The stack as Docker Compose sees it: which files make it up, what they say, and what runs of it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from stack import settings
from stack.console import Problem
from stack.shell import ROOT, ask

# Compose lays it over docker-compose.yml by itself; `make plan` writes it.
OVERRIDE = ROOT / "docker-compose.override.yml"
GPU_FILE = "docker-compose.gpu.yml"
TLS_FILE = "docker-compose.tls.yml"
ACME_FILE = "docker-compose.acme.yml"
WEBUI_FILE = "docker-compose.webui.yml"
# The links to other hosts; `make host` writes it.
LINKS_FILE = "docker-compose.links.yml"
# How many replicas there are, where `make up` was told so with --replicas (stack/scale.py).
REPLICAS_FILE = "docker-compose.replicas.yml"


class Build(BaseModel):
    """How a service's image is built: the folder and the build arguments."""

    context: Path
    args: dict[str, str] = {}


class Volume(BaseModel):
    """A folder, file or named volume in a container."""

    source: str = ""
    target: str


class Service(BaseModel):
    """One service of the stack."""

    image: str = ""
    build: Build | None = None
    environment: dict[str, str | None] = {}
    volumes: list[Volume] = []
    deploy: dict[str, Any] = {}

    @property
    def over_a_base(self) -> Build | None:
        """How its image is built over a base that `make up` chooses; None for one that is pulled or Compose builds."""
        return self.build if self.build and "BASE" in self.build.args else None

    @property
    def _devices(self) -> list[dict[str, Any]]:
        return self.deploy.get("resources", {}).get("reservations", {}).get("devices") or []

    @property
    def on_gpus(self) -> bool:
        """Whether it is given GPUs."""
        return bool(self._devices)

    @property
    def gpus(self) -> list[str]:
        """The GPUs that it is pinned to, by number or UUID."""
        return [gpu for device in self._devices for gpu in device.get("device_ids") or ()]


def is_replica(service: str) -> bool:
    """Whether the service of this name runs `vllm serve`."""
    return service.startswith("vllm-")


class Config(BaseModel):
    """The stack that the Compose files describe, settings filled in."""

    name: str = ""
    services: dict[str, Service]
    pins: dict[str, str] = Field(alias="x-pins")
    # what `make plan` expects of each replica (planner/check.py)
    planned: dict[str, Any] = Field({}, alias="x-planned")

    @model_validator(mode="after")
    def _name_images(self) -> Config:
        """Names what is built without a name as Compose does."""
        for name, service in self.services.items():
            service.image = service.image or f"{self.name}-{name}"
        # a plan may be for more than --replicas leaves
        self.planned = {name: sizes for name, sizes in self.planned.items() if name in self.services}
        return self

    @property
    def replicas(self) -> list[str]:
        """The services that run `vllm serve`."""
        return sorted(filter(is_replica, self.services))

    @property
    def tritons(self) -> list[str]:
        """The services that run Triton."""
        return sorted(name for name in self.services if name.startswith("triton"))


class Container(BaseModel):
    """What `docker compose ps` says of one container."""

    id: str = Field(alias="ID")
    service: str = Field(alias="Service")
    state: str = Field(alias="State")
    health: str = Field(alias="Health")
    status: str = Field(alias="Status")
    # how often Docker has started it again by itself
    restarts: int = 0

    @property
    def well(self) -> bool:
        """Whether it runs and its health check, where it has one, passes."""
        return self.state == "running" and self.health in ("healthy", "")


def stays_down(now: Container | None, began: Container | None) -> bool:
    """Whether waiting will not bring a container up: it is gone, has ended, or has started again and again.

    `began` is the container when the wait began. One new start alone may be the machine's doing. The state does not
    tell of them: after any 10 s of running Docker pauses for a tenth of a second only.
    """
    if now is None or now.state in ("restarting", "exited", "dead"):
        return True
    return now.restarts - (began.restarts if began and began.id == now.id else 0) >= 2


class Compose:
    """Docker Compose over the files that plain `docker compose` would choose, and those of `further`."""

    def __init__(self, *further: str) -> None:
        self.files: list[str] = []
        if further:
            listed = settings.value_of("COMPOSE_FILE")
            if listed:
                self.files = listed.split(settings.value_of("COMPOSE_PATH_SEPARATOR") or os.pathsep)
            else:
                self.files = ["docker-compose.yml", *([OVERRIDE.name] if OVERRIDE.exists() else [])]
            missing = [file for file in further if file not in self.files]
            # before what a plan or the user says
            self.files[1:1] = [file for file in missing if file != REPLICAS_FILE]
            # and this one says which of all those are there
            self.files += [file for file in missing if file == REPLICAS_FILE]

    def command(self, *args: str) -> list[str]:
        """A `docker compose` command line."""
        return ["docker", "compose", *(word for file in self.files for word in ("-f", file)), *args]

    def line(self, *args: str) -> str:
        """A `docker compose` command line to paste: a plain one does not know what `further` files add."""
        return shlex.join(self.command(*args))

    def ask(self, *args: str, timeout_s: float = 60) -> str:
        """The output of a `docker compose` command; its failure, or no end within `timeout_s`, is a Problem."""
        done = ask(*self.command(*args), timeout=timeout_s)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise Problem(f"docker compose {args[0]}: {lines[-1]}", "correct it and run the command again")
        return done.stdout

    def read_anew(self, service: str) -> None:
        """Makes a service that runs read its files anew. It must take SIGHUP for that, and ends no connection.

        Not by `docker kill --signal`, which Docker takes for a stop by hand: the container would stay down when this
        host boots.
        """
        self.ask("exec", "-T", service, "sh", "-c", "kill -HUP 1")

    def config(self) -> Config:
        """What the files say, settings filled in. A Problem where they are not those of the stack."""
        try:
            return Config.model_validate_json(self.ask("config", "--format", "json"))
        except ValidationError as error:
            first = error.errors()[0]
            raise Problem(
                f"the Compose files are not those of the stack: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                "correct them; COMPOSE_FILE, where it is set, has to name docker-compose.yml first",
            ) from None

    def check_launch(self, config: Config, command: str) -> str:
        """A Problem with all settings that a replica's or Triton's launcher refuses, asked in its image; else says in
        words whose were accepted.

        Replicas that differ only in which GPUs they have are asked once. `command` is what to run when all is mended.
        """
        names = [*config.replicas, *config.tritons]
        alike: dict[str, str] = {}
        for name in names:
            replica = config.services[name]
            kind = repr((replica.image, replica.environment, replica.volumes, len(replica.gpus)))
            alike.setdefault(kind, name)
        refused: dict[str, str] = {}
        for name in alike.values():
            done = ask(*self.command("run", "--rm", "--no-deps", "--no-TTY", name, "--print"), timeout=120)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.startswith("launch: ")]
                for line in lines or done.stderr.strip().splitlines()[-1:] or ["no reason given"]:
                    refused.setdefault(line.removeprefix("launch: "), name)
        if refused:
            raise Problem(
                "\n".join(f"{name}: {line}" for line, name in refused.items()),
                f"correct that and run `{command}` again; what runs was left as it is",
            )
        return f"accepted for {', '.join(names)}" if names else "there are none here"

    def containers(self) -> dict[str, Container]:
        """The stack's containers, running or not, by service."""
        lines = self.ask("ps", "--all", "--format", "json").splitlines()
        rows = (json.loads(line) for line in lines)
        # not those of `docker compose run`
        own = (row for row in rows if "com.docker.compose.oneoff=True" not in str(row.get("Labels")))
        found = (Container.model_validate(row) for row in own)
        containers = {container.service: container for container in found}
        ids = [container.id for container in containers.values()]
        counts = ask("docker", "inspect", "--format", "{{.Id}} {{.RestartCount}}", *ids).stdout.split() if ids else []
        for container in containers.values():
            for whole, count in zip(counts[::2], counts[1::2], strict=True):
                if whole.startswith(container.id):
                    container.restarts = int(count)
        return containers

    def other_settings(self, container: Container, service: Service) -> list[str]:
        """The settings of a service that its container was started with another value of; an unset one counts as
        empty."""
        done = ask("docker", "inspect", "--format", "{{json .Config.Env}}", container.id)
        words = json.loads(done.stdout or "null") or []
        now = dict(word.partition("=")[::2] for word in words)
        # `docker compose config` writes a dollar twice
        there = {name: (value or "").replace("$$", "$") for name, value in service.environment.items()}
        return [name for name, value in there.items() if value != now.get(name, "")]

    def log_of_start(self, container: Container, last: str) -> str:
        """What a container logged from when it last started, up to the line that has `last`: of a log of any length."""
        began = ask("docker", "inspect", "--format", "{{.State.StartedAt}}", container.id).stdout.strip()
        command = ["docker", "logs", "--since", began, container.id]
        lines = []
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if last in line:
                    process.terminate()
                    break
        return "".join(lines)

    def last_words(self, service: str) -> str:
        """The last line that a service logged, or words that it logged nothing."""
        lines = self.ask("logs", "--no-log-prefix", "--no-color", "--tail", "20", service).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it logged nothing")


def running(what: str) -> str:
    """What `docker ps` shows of the project's running containers, a line each, by a template."""
    project = settings.value_of("COMPOSE_PROJECT_NAME") or "vllm-fleet"
    return ask("docker", "ps", "--filter", f"label=com.docker.compose.project={project}", "--format", what).stdout


def running_files() -> list[str]:
    """Which of the files that `make up` adds the running stack was started with, and are still there: without another
    host there is no file of links any more."""
    used = running('{{.Label "com.docker.compose.project.config_files"}}')
    added = (GPU_FILE, TLS_FILE, ACME_FILE, WEBUI_FILE, LINKS_FILE, REPLICAS_FILE)
    return [file for file in added if f"{os.sep}{file}" in used and (ROOT / file).exists()]
