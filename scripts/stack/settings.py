"""The settings in `.env` that the host's commands need, and the check that something reads every name in it."""

from __future__ import annotations

import difflib
import io
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from dotenv.parser import parse_stream
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from stack.console import Problem
from stack.shell import ROOT

ENV_FILE = ROOT / ".env"
EXAMPLE_FILE = ROOT / ".env.example"


def without_brackets(address: object) -> object:
    """An IPv6 address, which `.env` has in brackets: Compose takes no other form."""
    text = str(address)
    if ":" in text and not re.fullmatch(r"\[.*\]", text):
        raise ValueError(f"an IPv6 address stands in brackets, [{text}]")
    return text.removeprefix("[").removesuffix("]") if ":" in text else text


def below_models(model: str) -> str:
    """A model's name; one that begins with the folder itself would be asked of the hub."""
    if match := re.match(r"(\./)?models/(.+)", model):
        raise ValueError(f"the name is the path below models/, MODEL={match[2]}")
    return model


class Settings(BaseModel):
    """What `make up` reads itself; Compose passes the rest on to the containers."""

    model: Annotated[str, AfterValidator(below_models)] | None = Field(None, alias="MODEL")
    http_port: int = Field(80, alias="HTTP_PORT", ge=1, le=65535)
    grafana_port: int = Field(3000, alias="GRAFANA_PORT", ge=1, le=65535)
    prometheus_port: int = Field(9090, alias="PROMETHEUS_PORT", ge=1, le=65535)
    bind_address: Annotated[ipaddress.IPv4Address | ipaddress.IPv6Address, BeforeValidator(without_brackets)] = Field(
        ipaddress.IPv4Address("127.0.0.1"), alias="BIND_ADDRESS"
    )
    gateway_auth: Literal["off"] | None = Field(None, alias="GATEWAY_AUTH")
    route_policy: Literal["prefix", "least_busy", "round_robin", "session"] | None = Field(None, alias="ROUTE_POLICY")
    gateway_bodies_mb: int = Field(1024, alias="GATEWAY_BODIES_MB", ge=64, lt=10**9)
    images: Literal["auto", "registry", "packages"] = Field("auto", alias="IMAGES")
    gpu: Literal["auto", "on", "off"] = Field("auto", alias="GPU")

    @property
    def url(self) -> str:
        """Where the gateway answers, seen from this host."""
        address = self.bind_address
        if address.is_unspecified:
            address = ipaddress.ip_address("::1" if address.version == 6 else "127.0.0.1")
        host = f"[{address}]" if address.version == 6 else str(address)
        return f"http://{host}" if self.http_port == 80 else f"http://{host}:{self.http_port}"


def known_names(example: str) -> set[str]:
    """The settings that there are: `.env.example` names each once, commented out where it has no default."""
    return set(re.findall(r"^(?:#\s?)?([A-Z][A-Z0-9_]*)=", example, re.MULTILINE))


def parse_env(text: str, known: set[str]) -> dict[str, str]:
    """Reads the text of a `.env`. A line that is no setting, or names one that nothing reads, is a Problem."""
    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        name, value, written = binding.key, binding.value, binding.original.string
        if name is None and not binding.error:
            continue  # a comment or nothing
        number = binding.original.line + written[: len(written) - len(written.lstrip())].count("\n")
        if name is None or value is None:
            first = written.strip().split("\n")[0]
            raise Problem(f".env, line {number}: {first!r} is not NAME=value", "correct or delete the line")
        if name not in known and not name.startswith("COMPOSE_"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise Problem(f".env, line {number}: nothing reads {name}", f"{hint}.env.example lists every setting")
        values[name] = value
    return values


def check(values: Mapping[str, str]) -> Settings:
    """Settings from the values of `.env` and the environment; a value out of its range is a Problem."""
    try:
        settings = Settings.model_validate({name: value for name, value in values.items() if value})
    except ValidationError as error:
        first = error.errors()[0]
        name, why = first["loc"][0], first["msg"].removeprefix("Value error, ")
        raise Problem(
            f"{name}={first['input']} will not do: {why}", f"correct {name} in .env or in the environment"
        ) from None
    if not settings.bind_address.is_loopback and settings.gateway_auth != "off":
        raise Problem(
            f"BIND_ADDRESS={values['BIND_ADDRESS']} opens the gateway to others, and it asks nobody for a key yet",
            "set GATEWAY_AUTH=off in .env to say that this is wanted, or BIND_ADDRESS=127.0.0.1",
        )
    return settings


def load(env_file: Path = ENV_FILE, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this checkout. As with Compose, the environment wins over `.env`."""
    known = known_names(EXAMPLE_FILE.read_text())
    return check({**read(env_file), **{name: environment[name] for name in known if name in environment}})


def read(env_file: Path) -> dict[str, str]:
    """The settings in a `.env`, checked by name; none where it is missing."""
    if not env_file.exists():
        return {}
    try:
        text = env_file.read_text("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise Problem(f".env, line {line}: this is not UTF-8", "save the file as UTF-8") from None
    return parse_env(text, known_names(EXAMPLE_FILE.read_text()))


def value_of(
    name: Literal["COMPOSE_PROJECT_NAME", "COMPOSE_FILE", "COMPOSE_PATH_SEPARATOR", "HF_ENDPOINT", "HF_TOKEN_FILE"],
    env_file: Path = ENV_FILE,
    environment: Mapping[str, str] = os.environ,
) -> str | None:
    """What the environment or `.env` says of a name that only some commands need; an empty value says nothing."""
    return environment.get(name) or read(env_file).get(name) or None
