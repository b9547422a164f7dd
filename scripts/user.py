"""`make user`: users who sign in with a password, what signs their tokens, and whose other tokens are taken.

`make user ARGS=--help` lists the commands, `make user ARGS='add --help'` the options of one. A password is asked for,
or read from the standard input; it never stands in a command.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from access.store import made, read_whole
from access.tokens import Algorithm, Issuer, TokenStore, usable_keys
from access.users import UserStore, hashed
from key import aside, duration, when
from stack.access import SECRETS, one_line, take_environment
from stack.console import Problem, console

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="Small letters, digits, and . _ - between them.")]
Role = Annotated[Literal["user", "admin"], typer.Option(help="user uses models; admin also sees the fleet.")]


def password() -> str:
    """A password, asked for twice at a terminal, else the first line of the standard input."""
    if sys.stdin.isatty():
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    line = sys.stdin.buffer.readline().rstrip(b"\n")
    if not line:
        raise Problem("no password came", "type it at a terminal, or put it into the standard input")
    # what is no UTF-8 stays recognizable, and is refused like any other password that will not do
    return line.decode(errors="surrogateescape")


@app.command()
def add(name: Name, role: Role = "user") -> None:
    """Add a user. The password is asked for."""
    with one_line():
        UserStore(SECRETS).add(name, password(), role)
        take_environment()
        console.print(
            f"{name} can sign in by POST /token once the service runs: COMPOSE_PROFILES=tokens in .env, then `make up`."
        )


@app.command("password")
def set_password(name: Name) -> None:
    """Give a user another password."""
    with one_line():
        UserStore(SECRETS).set(name, password=password())
        console.print(f"{name} has another password.")


@app.command("role")
def set_role(name: Name, role: Annotated[Literal["user", "admin"], typer.Argument()]) -> None:
    """Give a user another role. Tokens that the user has keep theirs until they expire."""
    with one_line():
        UserStore(SECRETS).set(name, role=role)
        console.print(f"{name} is {role} from the next token on.")


@app.command()
def remove(name: Name) -> None:
    """Take a user out. Tokens that the user has work until they expire."""
    with one_line():
        UserStore(SECRETS).remove(name)
        minutes = TokenStore(SECRETS).signing().minutes
        console.print(f"{name} cannot sign in any more. Tokens of {name} end within {minutes} minutes.")


@app.command("list")
def list_users() -> None:
    """List all users."""
    with one_line():
        users = UserStore(SECRETS).read().users
        table = Table("name", "role", "from", "created", box=SIMPLE_HEAD, pad_edge=False)
        for user in users:
            source = "USER_LIST" if user.source == "environment" else "make user"
            table.add_row(user.name, user.role, source, when(user.created))
        console.print(table if users else "There is no user yet: make user ARGS='add NAME'")


@app.command("hash")
def show_hash() -> None:
    """Print a password's hash, for ALICE_HASHED_PASSWORD in .env. There it stands in single quotes."""
    with one_line():
        typer.echo(hashed(password()))


@app.command("signing-key")
def rotate(
    algorithm: Annotated[Algorithm, typer.Option(help="What it signs by.")] = "ES256",
    overlap: Annotated[
        str | None, typer.Option(help="How long what the old one signed is taken: 0s, 15m. Default: until it expires.")
    ] = None,
) -> None:
    """Sign with a new key from now on."""
    with one_line():
        TokenStore(SECRETS).rotate(algorithm, None if overlap is None else duration(overlap))
        console.print(f"Tokens are signed by another key, for {algorithm}.")


@app.command()
def trust(
    issuer: Annotated[str, typer.Argument(help="The `iss` of its tokens, as it writes it.")],
    audience: Annotated[str, typer.Option(help="The `aud` of tokens that are for this fleet.")],
    algorithm: Annotated[list[str], typer.Option(help="RS256, ES256 or EdDSA: what it signs by; repeatable.")],
    keys: Annotated[str, typer.Option(help="Its keys: a JWKS file, or the https address of one.")],
    name_claim: Annotated[str, typer.Option(help="The claim that names the user.")] = "sub",
    role_claim: Annotated[str, typer.Option(help="The claim that is user or admin.")] = "role",
) -> None:
    """Take the tokens of an identity provider elsewhere (OIDC) as well."""
    with one_line():
        if "HS256" in algorithm:
            raise Problem("HS256 has no public key", "name what the provider signs by: RS256, ES256 or EdDSA")
        fields: dict[str, Any] = {"issuer": issuer, "audience": audience, "algorithms": algorithm}
        fields |= {"name_claim": name_claim, "role_claim": role_claim}
        fields |= {"jwks_uri": keys} if "://" in keys else {"keys": keys_of(Path(keys), algorithm)}
        TokenStore(SECRETS).trust(made(Issuer, fields))
        console.print(f"Tokens of {escape(issuer)} for {escape(audience)} are taken.", soft_wrap=True)
        aside.print("The gateway asks everybody for a key or a token.")


def keys_of(file: Path, algorithms: list[str]) -> list[Any]:
    """The keys of a JWKS file that are of use here."""
    try:
        keys = json.loads(read_whole(file))["keys"]
    except (ValueError, TypeError, LookupError, RecursionError):
        keys = None
    if not isinstance(keys, list):
        raise Problem(f"{file} is no JWKS", 'it has to be {"keys": […]}, as the provider publishes it')
    if not (usable := usable_keys(keys, algorithms)):
        raise Problem(f"{file} has no key for {', '.join(algorithms)}", "see which `alg` or `kty` its keys have")
    return usable


@app.command()
def distrust(issuer: Annotated[str, typer.Argument(help="As `make user ARGS=issuers` shows it.")]) -> None:
    """Take an issuer's tokens no longer."""
    with one_line():
        TokenStore(SECRETS).distrust(issuer)
        console.print(f"Tokens of {escape(issuer)} are taken no longer.", soft_wrap=True)


@app.command()
def issuers() -> None:
    """List whose tokens the gateway takes."""
    with one_line():
        table = Table("issuer", "audience", "algorithms", "keys", box=SIMPLE_HEAD, pad_edge=False)
        for one in TokenStore(SECRETS).issuers().issuers:
            ends = [f" until {when(key['until'])}" if "until" in key else "" for key in one.keys]
            named = [f"{key.get('kid', key['kty'])}{end}" for key, end in zip(one.keys, ends, strict=True)]
            keys = one.jwks_uri or "\n".join(named)
            table.add_row(*map(escape, (one.issuer, one.audience, ", ".join(one.algorithms), keys)))
        console.print(table if table.rows else "Nobody's yet.")


if __name__ == "__main__":
    app()
