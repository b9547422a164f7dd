"""`make key`: makes, lists, rotates and revokes API keys, and sets what they may do. In force within two seconds.

`make key ARGS=--help` lists the commands, `make key ARGS='create --help'` the options of one.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from access.keys import LANES, Key, Keys, KeyStore, Limits
from stack import settings
from stack.access import SECRETS, OwnName, one_line
from stack.compose import Compose, running_files
from stack.console import Problem, console
from stack.gateway import Gateway

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
# What is not the answer itself, so that the answer can be read by a program.
aside = Console(highlight=False, stderr=True)

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
# The last second that a date can name: 9999-12-31 23:59:59 UTC.
LATEST = 253_402_300_799
NO_LIMIT = "none"
# The options that set limits, and the limits.
LIMITS = {
    "rpm": "requests_per_minute",
    "tpm": "tokens_per_minute",
    "tokens_per_day": "tokens_per_day",
    "tokens_per_month": "tokens_per_month",
    "parallel": "parallel_requests",
    "max_prompt": "prompt_tokens",
    "max_body": "body_bytes",
    "max_tokens": "max_tokens",
    "max_n": "n",
}

Name = Annotated[str, typer.Argument(help="Its holder: small letters, digits, and . _ - between them.")]
Limit = str | None
Rpm = Annotated[Limit, typer.Option(help="Requests a minute. For each limit: 0 allows nothing, none takes it away.")]
Tpm = Annotated[Limit, typer.Option(help="Tokens a minute, of prompts and answers.")]
PerDay = Annotated[Limit, typer.Option(help="Tokens a day (UTC).")]
PerMonth = Annotated[Limit, typer.Option(help="Tokens a month (UTC).")]
Parallel = Annotated[Limit, typer.Option(help="Requests at once.")]
MaxPrompt = Annotated[Limit, typer.Option(help="Tokens of the longest prompt.")]
MaxBody = Annotated[Limit, typer.Option(help="Bytes of the largest body.")]
MaxTokens = Annotated[Limit, typer.Option(help="Highest max_tokens of a request.")]
MaxN = Annotated[Limit, typer.Option(help="Highest n of a request.")]
Models = Annotated[str | None, typer.Option(help="Models it may use, with commas between; all: every one.")]
Role = Annotated[Literal["user", "admin"] | None, typer.Option(help="user uses models; admin also sees the fleet.")]
Priority = Annotated[str | None, typer.Option(help="interactive, batch, or vLLM's number: lower is sooner.")]
EndUsers = Annotated[bool | None, typer.Option(help="Whether it may name an end user in the header X-End-User.")]
Expires = Annotated[str | None, typer.Option(help="When it ends: 30d, 12h, 2027-01-31 (UTC), or never.")]
Note = Annotated[str | None, typer.Option(help="Anything worth knowing about it.")]


def duration(text: str) -> int:
    """Seconds of a span such as 90s, 15m, 12h, 30d or 2w. A Problem where it is none, or ends after the year 9999."""
    if match := re.fullmatch(r"(\d{1,9})([smhdw])", text, re.ASCII):
        return within_dates(int(match[1]) * SECONDS[match[2]], time.time(), text)
    raise Problem(f"{text!r} is no span of time", "write a number and s, m, h, d or w: 90s, 12h, 30d")


def within_dates(seconds: int, start: float, text: str) -> int:
    """These seconds, if that long after `start` there is still a date. A Problem where there is none."""
    if start + seconds > LATEST:
        raise Problem(f"{text!r} is after the year 9999", "write a shorter time")
    return seconds


def moment(text: str, now: float) -> int | None:
    """Seconds since 1970 of a span from now or of a date; None for never. A Problem where it is neither."""
    if text == "never":
        return None
    if re.fullmatch(r"\d+[a-z]", text):
        return int(now) + duration(text)
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        fix = "write a span (30d, 12h), a date (2027-01-31, which begins at 00:00 UTC), or never"
        raise Problem(f"{text!r} is no time", fix) from None
    return within_dates(max(0, int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())), 0, text)


def limits_of(given: dict[str, Any]) -> dict[str, int | None]:
    """The limits among a command's options, by their names; None takes one away."""
    limits: dict[str, int | None] = {}
    for option, limit in LIMITS.items():
        text = given[option]
        if text is None:
            continue
        if text != NO_LIMIT and not re.fullmatch(r"\d{1,16}", text):
            raise Problem(f"--{option.replace('_', '-')} {text}: that is no number", f"write digits, or {NO_LIMIT}")
        limits[limit] = None if text == NO_LIMIT else int(text)
    return limits


def rights_of(given: dict[str, Any]) -> dict[str, Any]:
    """What else a command's options say of a key, as fields of Key."""
    rights = {name: given[name] for name in ("role", "end_users", "note") if given[name] is not None}
    if given["models"] is not None:
        names = [name.strip() for name in given["models"].split(",") if name.strip()]
        if not names:
            raise Problem("--models names none", "name some, with commas between, or write all")
        if "all" in names and set(names) != {"all"}:
            raise Problem("--models names all and others", "write all alone, or take it out")
        rights["models"] = None if "all" in names else names
    if given["priority"] is not None:
        lane = LANES.get(given["priority"])
        if lane is None and not re.fullmatch(r"-?\d{1,4}", given["priority"]):
            raise Problem(f"--priority {given['priority']} is no lane", "write interactive, batch or a number")
        rights["priority"] = int(given["priority"]) if lane is None else lane
    if given["expires"] is not None:
        rights["expires"] = moment(given["expires"], time.time())
    return rights


def warn_of_unknown(models: list[str] | None) -> None:
    """Says which of these models the running fleet does not serve. Says nothing where none runs."""
    if not models:
        return
    try:
        replicas = Gateway(Compose(*running_files())).replicas()
    except (Problem, ValueError):
        return
    served = sorted({model for replica in replicas for model in replica.models})
    for model in models:
        if served and model not in served:
            warning = f"{model}: the fleet does not serve that now; it serves {', '.join(served)}"
            aside.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True)


def show_secret(name: str, secret: str) -> None:
    """Prints a key, alone on the standard output."""
    aside.print(f"The key of [bold]{escape(name)}[/]. It is shown this once:", soft_wrap=True)
    typer.echo(secret)


def when(seconds: int | None) -> str:
    """A moment as people read it, in UTC; as seconds where no date is that far away."""
    if seconds is None:
        return "never"
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s after 1970"


def limits_text(limits: Limits) -> str:
    """Limits in words, a line each."""
    options = {limit: option.replace("_", "-") for option, limit in LIMITS.items()}
    return "\n".join(f"{options[limit]} {value}" for limit, value in limits.model_dump().items()) or "none"


def lane(priority: int) -> str:
    """A priority by its lane's name, if it is one's."""
    return next((name for name, value in LANES.items() if value == priority), str(priority))


@app.command()
def create(
    name: Name,
    models: Models = None,
    role: Role = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    tokens_per_day: PerDay = None,
    tokens_per_month: PerMonth = None,
    parallel: Parallel = None,
    max_prompt: MaxPrompt = None,
    max_body: MaxBody = None,
    max_tokens: MaxTokens = None,
    max_n: MaxN = None,
    priority: Priority = None,
    end_users: EndUsers = None,
    expires: Expires = None,
    note: Note = None,
) -> None:
    """Make a key. It is shown this once; the file has its hash."""
    given = locals()
    with one_line():
        if name in get_args(OwnName):
            raise Problem(f"{name} is what commands call a key of their own", "choose another name")
        asks_nobody = settings.value_of("GATEWAY_AUTH") == "off"
        rights, limits = rights_of(given), limits_of(given)
        store = KeyStore(SECRETS)
        first = not SECRETS.keys.exists()
        kept = {limit: value for limit, value in limits.items() if value is not None}
        secret = store.create(name, **rights, limits=kept)
        warn_of_unknown(rights.get("models"))
        show_secret(name, secret)
        if asks_nobody:
            aside.print("[yellow]GATEWAY_AUTH=off is set: the gateway asks nobody for a key.[/]")
        elif first:
            aside.print("This is the first one. From now on the gateway asks everybody for a key.")


@app.command("list")
def list_keys() -> None:
    """List all keys, without the keys themselves."""
    with one_line():
        keys = KeyStore(SECRETS).read()
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("name", "role", "models", "limits", "lane", "expires", "note"):
            table.add_column(column, overflow="fold", no_wrap=column in ("name", "role"))
        now = time.time()
        for key in keys.keys:
            end = f"[red]ended {when(key.expires)}[/]" if key.ended(now) else when(key.expires)
            models = "all" if key.models is None else "\n".join(key.models)
            cells = [key.name, key.role, models, limits_text(keys.in_force(key)), lane(key.priority)]
            table.add_row(*map(escape, cells), end, escape(key.note))
        console.print(table if keys.keys else "There is no key yet: make key ARGS='create NAME'")


@app.command()
def show(name: Name) -> None:
    """Show one key: what it may do, and the limits in force."""
    with one_line():
        keys = KeyStore(SECRETS).read()
        console.print(details(keys, keys.find(name)))


def details(keys: Keys, key: Key) -> Table:
    """A key, a line a fact."""
    table = Table.grid(padding=(0, 2))
    rotated = [when(one.until) for one in key.hashes[1:]]
    for what, value in (
        ("name", key.name),
        ("id", key.id),
        ("role", key.role),
        ("models", "all" if key.models is None else "\n".join(key.models)),
        ("limits of its own", limits_text(key.limits)),
        ("limits in force", limits_text(keys.in_force(key))),
        ("lane", lane(key.priority)),
        ("names end users", "yes" if key.end_users else "no"),
        ("created", when(key.created)),
        ("expires", when(key.expires)),
        ("old keys end", "\n".join(rotated) or "–"),
        ("note", key.note or "–"),
    ):
        table.add_row(f"[bold]{what}[/]", escape(value))
    return table


@app.command()
def rotate(
    name: Name,
    overlap: Annotated[str, typer.Option(help="How long the old key works beside the new one: 0s, 15m, 1h.")] = "1h",
) -> None:
    """Make another key for the same holder. The old one works for a while more."""
    with one_line():
        span = duration(overlap)
        secret = KeyStore(SECRETS).rotate(name, span)
        show_secret(name, secret)
        end = f"works until {when(int(time.time()) + span)} UTC" if span else "has ended"
        aside.print(f"The old one {end}.")


@app.command()
def revoke(name: Name) -> None:
    """End a key for good."""
    with one_line():
        KeyStore(SECRETS).revoke(name)
        console.print(f"{name} is revoked. The gateway knows within two seconds.")


@app.command("set")
def set_rights(
    name: Name,
    models: Models = None,
    role: Role = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    tokens_per_day: PerDay = None,
    tokens_per_month: PerMonth = None,
    parallel: Parallel = None,
    max_prompt: MaxPrompt = None,
    max_body: MaxBody = None,
    max_tokens: MaxTokens = None,
    max_n: MaxN = None,
    priority: Priority = None,
    end_users: EndUsers = None,
    expires: Expires = None,
    note: Note = None,
) -> None:
    """Change what a key may do; what is not named stays."""
    given = locals()
    with one_line():
        rights, limits = rights_of(given), limits_of(given)
        if not rights and not limits:
            raise Problem(f"nothing to change for {name}", "name an option: make key ARGS='set --help' lists them")
        store = KeyStore(SECRETS)
        store.set(name, limits, **rights)
        warn_of_unknown(rights.get("models"))
        keys = store.read()
        console.print(details(keys, keys.find(name)))


@app.command("limits")
def set_limits(
    role: Annotated[Literal["user", "admin"] | None, typer.Option(help="Of all keys of this role.")] = None,
    end_users: Annotated[bool, typer.Option("--end-users", help="Of each end user that a key names.")] = False,
    rpm: Rpm = None,
    tpm: Tpm = None,
    tokens_per_day: PerDay = None,
    tokens_per_month: PerMonth = None,
    parallel: Parallel = None,
    max_prompt: MaxPrompt = None,
    max_body: MaxBody = None,
    max_tokens: MaxTokens = None,
    max_n: MaxN = None,
) -> None:
    """Set the limits of a role or of end users; a key's own win. Without a limit, show them."""
    given = locals()
    with one_line():
        if (role is None) == (not end_users):
            raise Problem("whose limits?", "name one: --role user, --role admin or --end-users")
        limits = limits_of(given)
        of: Literal["user", "admin", "end_users"] = role or "end_users"
        store = KeyStore(SECRETS)
        if limits:
            store.set_limits(of, limits)
        keys = store.read()
        general = keys.end_users if of == "end_users" else getattr(keys.roles, of)
        console.print(limits_text(general.limits))


if __name__ == "__main__":
    app()
