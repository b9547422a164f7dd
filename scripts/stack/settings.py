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
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr, ValidationError

from stack.console import Problem
from stack.shell import ROOT

ENV_FILE = ROOT / ".env"
EXAMPLE_FILE = ROOT / ".env.example"
DOMAIN = r"^([a-z0-9-]{1,63}\.)+[a-z0-9-]{2,63}$"


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


def each(shape: str, what: str) -> AfterValidator:
    """Checks the entries of a list with commas between, in whatever case."""

    def check_entries(text: str) -> str:
        entries = filter(None, (entry.strip() for entry in text.lower().split(",")))
        if wrong := [entry for entry in entries if not re.fullmatch(shape, entry)]:
            raise ValueError(f"{wrong[0]} is no {what}")
        return text

    return AfterValidator(check_entries)


def by_https(url: str) -> str:
    """The address of an authority's directory."""
    if not re.fullmatch(r"https://[^\s/]+(/\S*)?", url):
        raise ValueError("an authority's directory is an address with https://")
    return url


# nginx/njs/settings.js has the same.
HOST = r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\]"
ORIGIN = rf"http://({HOST})(:(?!80$)\d+)?|https://({HOST})(:(?!443$)\d+)?"


class Settings(BaseModel):
    """What `make up` reads itself; Compose passes the rest on to the containers."""

    model: Annotated[str, AfterValidator(below_models)] | None = Field(None, alias="MODEL")
    http_port: int = Field(80, alias="HTTP_PORT", ge=1, le=65535)
    https_port: int | None = Field(None, alias="HTTPS_PORT", ge=1, le=65535)
    https_domain: str | None = Field(None, alias="HTTPS_DOMAIN", max_length=253, pattern=DOMAIN)
    acme_email: str | None = Field(None, alias="ACME_EMAIL", pattern=r"^[^@\s]+@[^@\s]+$")
    acme_server: Annotated[str, AfterValidator(by_https)] | None = Field(None, alias="ACME_SERVER")
    grafana_port: int = Field(3000, alias="GRAFANA_PORT", ge=1, le=65535)
    prometheus_port: int = Field(9090, alias="PROMETHEUS_PORT", ge=1, le=65535)
    webui_port: int = Field(8080, alias="WEBUI_PORT", ge=1, le=65535)
    link_port: int = Field(9443, alias="LINK_PORT", ge=1, le=65535)
    bind_address: Annotated[ipaddress.IPv4Address | ipaddress.IPv6Address, BeforeValidator(without_brackets)] = Field(
        ipaddress.IPv4Address("127.0.0.1"), alias="BIND_ADDRESS"
    )
    gateway_auth: Literal["off"] | None = Field(None, alias="GATEWAY_AUTH")
    gateway_hosts: Annotated[str, each(HOST, "name without scheme and port")] | None = Field(
        None, alias="GATEWAY_HOSTS"
    )
    cors_origins: Annotated[str, each(ORIGIN, "origin as browsers write it: https://app.example.com")] | None = Field(
        None, alias="CORS_ORIGINS"
    )
    route_policy: Literal["prefix", "least_busy", "round_robin", "session"] | None = Field(None, alias="ROUTE_POLICY")
    gateway_bodies_mb: int = Field(1024, alias="GATEWAY_BODIES_MB", ge=64, lt=10**9)
    gateways: int = Field(1, alias="GATEWAYS", ge=1, le=99)
    sleep_after_seconds: int = Field(600, alias="SLEEP_AFTER_SECONDS", ge=1, lt=10**7)
    # hours.py checks it
    awake: str | None = Field(None, alias="AWAKE")
    trace_sample: float | None = Field(None, alias="TRACE_SAMPLE", ge=0, le=1)
    traces_port: int = Field(6006, alias="TRACES_PORT", ge=1, le=65535)
    user_list: str | None = Field(None, alias="USER_LIST")
    jwt_key: SecretStr | None = Field(None, alias="JWT_KEY")
    access_token_expire_minutes: int = Field(30, alias="ACCESS_TOKEN_EXPIRE_MINUTES", ge=1, le=1440)
    images: Literal["auto", "registry", "packages"] = Field("auto", alias="IMAGES")
    gpu: Literal["auto", "on", "off"] = Field("auto", alias="GPU")

    @property
    def url(self) -> str:
        """Where the gateway answers, seen from this host."""
        return self.at(self.https_port or self.http_port)

    def at(self, port: int) -> str:
        """The address of a port of the gateway, seen from this host."""
        address = self.bind_address
        if address.is_unspecified:
            address = ipaddress.ip_address("::1" if address.version == 6 else "127.0.0.1")
        host = f"[{address}]" if address.version == 6 else str(address)
        scheme, usual = ("https", 443) if self.https_port else ("http", 80)
        return f"{scheme}://{host}" if port == usual else f"{scheme}://{host}:{port}"


# the names of these settings in `.env`
ALIASES = {str(field.alias) for field in Settings.model_fields.values()}
# what a setting can be called
NAME = re.compile(r"[A-Za-z_]\w{,39}", re.ASCII)
# what Compose itself reads from a `.env`
OF_COMPOSE = {
    f"COMPOSE_{name}"
    for name in (
        *("PROJECT_NAME", "FILE", "PROFILES", "PATH_SEPARATOR", "CONVERT_WINDOWS_PATHS", "IGNORE_ORPHANS"),
        *("REMOVE_ORPHANS", "PARALLEL_LIMIT", "ANSI", "STATUS_STDOUT", "ENV_FILES", "DISABLE_ENV_FILE", "MENU"),
        *("EXPERIMENTAL", "PROGRESS", "BAKE", "COMPATIBILITY"),
    )
}
# what each alias in USER_LIST may have behind it, as access/users.py reads it
OF_A_USER = ("USERNAME", "HASHED_PASSWORD", "ROLE")

# what is named like a secret, and is none
NO_SECRET = {"ACCESS_TOKEN_EXPIRE_MINUTES", "HF_TOKEN_FILE"}


def names_of_users(user_list: str) -> set[str]:
    """The settings of the users that USER_LIST names."""
    return {f"{alias.strip()}_{name}" for alias in user_list.split(",") if alias.strip() for name in OF_A_USER}


def known_names(example: str) -> set[str]:
    """The settings that there are: `.env.example` names each once, commented out where it has no default."""
    return set(re.findall(r"^(?:#\s?)?([A-Z][A-Z0-9_]*)=", example, re.MULTILINE))


def lines_of(text: str, known: set[str]) -> tuple[dict[str, str], list[Problem]]:
    """The settings in the text of a `.env`, and its mistakes: lines that are no setting, or name one that nothing
    reads."""
    values: dict[str, str] = {}
    mistakes = []
    known = known | OF_COMPOSE
    bindings = list(parse_stream(io.StringIO(text)))
    for binding in bindings:
        if binding.key == "USER_LIST" and "USER_LIST" in known:
            known = known | names_of_users(binding.value or "")
    for binding in bindings:
        name, value, written = binding.key, binding.value, binding.original.string
        if name is None and not binding.error:
            continue  # a comment or nothing
        number = binding.original.line + written[: len(written) - len(written.lstrip())].count("\n")
        # what the line says is not shown: it may be a part of a secret, which can look like a name before its "="
        if name is None or value is None or not NAME.fullmatch(name):
            mistakes.append(Problem(f".env, line {number}: this is not NAME=value", "correct or delete the line"))
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            what = f".env, line {number}: nothing reads {name}"
            mistakes.append(Problem(what, f"{hint}.env.example lists every setting"))
        else:
            values[name] = value
    return values, mistakes


def parse_env(text: str, known: set[str]) -> dict[str, str]:
    """The settings in the text of a `.env`; the first of its mistakes is raised."""
    values, mistakes = lines_of(text, known)
    if mistakes:
        raise mistakes[0]
    return values


def wrong_values(values: Mapping[str, str]) -> list[Problem]:
    """A Problem for each value that is out of its range."""
    try:
        Settings.model_validate({name: value for name, value in values.items() if value})
    except ValidationError as error:
        return [
            Problem(
                f"{one['loc'][0]}={one['input']} will not do: {one['msg'].removeprefix('Value error, ')}",
                f"correct {one['loc'][0]} in .env or in the environment",
            )
            for one in error.errors()
        ]
    return []


def check(values: Mapping[str, str]) -> Settings:
    """Settings from the values of `.env` and the environment; a value out of its range is a Problem."""
    if wrong := wrong_values(values):
        raise wrong[0]
    settings = Settings.model_validate({name: value for name, value in values.items() if value})
    if settings.https_domain and not (settings.https_port and settings.acme_email):
        raise Problem(
            "HTTPS_DOMAIN is set, but not HTTPS_PORT or not ACME_EMAIL",
            "set HTTPS_PORT=443 and ACME_EMAIL, whom the authority writes to, in .env",
        )
    if settings.https_domain and settings.bind_address.is_loopback:
        raise Problem(
            f"HTTPS_DOMAIN is set, but no authority reaches the gateway at BIND_ADDRESS={settings.bind_address}",
            "set BIND_ADDRESS=0.0.0.0 in .env",
        )
    return settings


def load(env_file: Path = ENV_FILE, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this checkout. As with Compose, the environment wins over `.env`."""
    known = known_names(EXAMPLE_FILE.read_text())
    return check({**read(env_file), **{name: environment[name] for name in known if name in environment}})


def with_users(env_file: Path = ENV_FILE, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The values of all settings that are set, those of users too, whose names USER_LIST decides."""
    values = read(env_file)
    names = known_names(EXAMPLE_FILE.read_text())
    names |= names_of_users(environment.get("USER_LIST", values.get("USER_LIST", "")))
    return values | {name: environment[name] for name in names if name in environment}


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


def written(env_file: Path = ENV_FILE) -> list[tuple[str, str]]:
    """The names and values in a `.env` as they stand there, whatever is wrong with them."""
    if not env_file.is_file():
        return []
    with env_file.open(errors="replace") as file:
        return [(binding.key, binding.value or "") for binding in parse_stream(file) if binding.key]


def mistakes(env_file: Path = ENV_FILE, environment: Mapping[str, str] = os.environ) -> list[Problem]:
    """All that is wrong with the settings of this checkout, where `load` stops at the first."""
    try:
        load(env_file, environment)
    except Problem as first:
        known = known_names(EXAMPLE_FILE.read_text())
        text = env_file.read_text(errors="replace") if env_file.exists() else ""
        values, found = lines_of(text, known)
        given = {name: environment[name] for name in known if name in environment}
        return [*found, *wrong_values(values | given)] or [first]
    return []


def as_far_as_readable(env_file: Path = ENV_FILE, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings without what is wrong with them, for a look at a stack that runs with some of them."""
    values = {name: value for name, value in [*written(env_file), *environment.items()] if name in ALIASES and value}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        wrong = {problem["loc"][0] for problem in error.errors()}
        return Settings.model_validate({name: value for name, value in values.items() if name not in wrong})


def check_private(env_file: Path = ENV_FILE) -> None:
    """A Problem where other users of this host can read a `.env` that holds a secret."""
    secret = (name for name, value in read(env_file).items() if value and is_secret(name))
    if (name := next(secret, None)) and env_file.stat().st_mode & 0o077:
        raise Problem(f"{name} is in .env, which other users of this host may read", f"chmod 600 {env_file.name}")


def is_secret(name: str) -> bool:
    """Whether a setting's value is one."""
    return name == "JWT_KEY" or name.endswith("_HASHED_PASSWORD")


def may_be_secret(name: str) -> bool:
    """Whether a setting, or a variable of whatever program, is named as secrets are."""
    words = {*re.split(r"[^A-Z]+", name.upper())}
    return bool(words & {"TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "APIKEY"}) and name not in NO_SECRET


def value_of(
    name: Literal[
        "COMPOSE_PROFILES",
        "COMPOSE_PROJECT_NAME",
        "COMPOSE_FILE",
        "COMPOSE_PATH_SEPARATOR",
        "GATEWAY_AUTH",
        "HF_ENDPOINT",
        "HF_TOKEN_FILE",
    ],
    env_file: Path = ENV_FILE,
    environment: Mapping[str, str] = os.environ,
) -> str | None:
    """What the environment or `.env` says of a name that only some commands need; an empty value says nothing."""
    return environment.get(name) or read(env_file).get(name) or None
