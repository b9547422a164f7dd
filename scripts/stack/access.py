"""The folder secrets/ of this checkout, as the operator commands use it: the first key, and keys of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from access.keys import KeyStore, Limits
from access.store import MAX_NUMBER, Mistake, Secrets, Strict, read
from access.tokens import TokenStore, strong
from access.users import UserStore, from_environment
from stack import settings
from stack.console import Problem, one_line_for_mistakes
from stack.shell import ROOT

SECRETS = Secrets(ROOT / "secrets")
# What `own_key` may call a key. `make key` makes none of these names.
OwnName = Literal["make-up"]
OWN_NOTE = "of a command that runs"
# So that no role's limits stand against a command.
AMPLE = dict.fromkeys(Limits.model_fields, MAX_NUMBER)


# What Open WebUI's key is called.
WEBUI = "open-webui"


class WebuiKey(Strict):
    """The whole of secrets/webui/key.json."""

    key: str


@contextmanager
def as_problems() -> Iterator[None]:
    """Turns the package's mistakes into those of the commands."""
    try:
        yield
    except Mistake as mistake:
        raise Problem(mistake.what, mistake.fix) from None


@contextmanager
def one_line() -> Iterator[None]:
    """`one_line_for_mistakes`, for the package's too."""
    with one_line_for_mistakes(), as_problems():
        yield


def open_to_others(wanted: settings.Settings) -> bool:
    """Whether others than this host can reach the gateway, and are to be asked for a key."""
    return wanted.gateway_auth != "off" and not wanted.bind_address.is_loopback


def asks_for_keys(wanted: settings.Settings) -> bool:
    """Whether the gateway asks everybody for a key, by the rule that it follows itself."""
    there = SECRETS.keys.exists() or SECRETS.issuers.exists()
    return open_to_others(wanted) or (wanted.gateway_auth != "off" and there)


def first_key(wanted: settings.Settings) -> str:
    """A key for the administrator, where the gateway is open to others and there is none; '' where none is needed."""
    with as_problems():
        SECRETS.prepare()
        store = KeyStore(SECRETS)
        if open_to_others(wanted) and not store.read().keys:
            return store.create("admin", role="admin", note="made by make up")
    return ""


def check_environment() -> None:
    """A Problem where USER_LIST, what belongs to it, or JWT_KEY will not do. Only looks."""
    values = settings.with_users()
    with as_problems():
        from_environment(values)
        if key := values.get("JWT_KEY"):
            strong(key)


def take_environment() -> None:
    """Takes the users of USER_LIST, and what signs their tokens, from `.env` and the environment into secrets/. Changes
    nothing where it is there already, or where there are no users."""
    values = settings.with_users()
    wanted = settings.check({name: value for name, value in values.items() if name in settings.ALIASES})
    with as_problems():
        users = UserStore(SECRETS)
        users.take(values)
        if users.read().users:
            TokenStore(SECRETS).take(values.get("JWT_KEY") or None, wanted.access_token_expire_minutes)


def check_users() -> None:
    """A Problem where nobody could sign in at the token service."""
    if not UserStore(SECRETS).read().users:
        raise Problem(
            "COMPOSE_PROFILES starts the token service, and there is no user who could sign in",
            "make user ARGS='add NAME', or take tokens out of COMPOSE_PROFILES",
        )


def webui_key(secrets: Secrets) -> bool:
    """Makes secrets/webui/key.json hold a key that is in force, whose holder may name end users. Says whether it is
    another one than before. The new key counts at the gateway before Open WebUI can read it."""
    with as_problems():
        store = KeyStore(secrets)
        keys = store.read()
        old = read(secrets.webui, WebuiKey)
        if old and keys.holder(old.key, time.time()):
            return False
        if any(key.name == WEBUI for key in keys.keys):
            secret = store.rotate(WEBUI, overlap_s=0)
        else:
            secret = store.create(WEBUI, end_users=True, note="made by make up, for Open WebUI")
        with secrets.locked():
            secrets.replace(secrets.written(secrets.webui, WebuiKey(key=secret)), secrets.webui)
    return True


def check_webui(wanted: settings.Settings) -> None:
    """A Problem where nobody could sign in to Open WebUI."""
    if wanted.gateway_auth == "off":
        raise Problem(
            "COMPOSE_PROFILES starts Open WebUI, and with GATEWAY_AUTH=off nobody could sign in to it",
            "take GATEWAY_AUTH out of .env, or webui out of COMPOSE_PROFILES",
        )


@contextmanager
def own_key(wanted: settings.Settings, name: OwnName, life_s: int) -> Iterator[str]:
    """A key for a command's own requests, which is revoked at the end, and ends by itself after `life_s` seconds if the
    command is killed. '' where the gateway asks nobody for one."""
    if not asks_for_keys(wanted):
        yield ""
        return
    store = KeyStore(SECRETS)
    with as_problems():
        for key in store.read().keys:
            if key.name == name and key.note != OWN_NOTE:
                fix = f"give its holder another, and run make key ARGS='revoke {name}'"
                raise Mistake(f"the key {name} has the name of a command's own", fix)
            if key.name == name:
                store.revoke(name)
        secret = store.create(name, expires=int(time.time()) + life_s, note=OWN_NOTE, limits=AMPLE)
    try:
        yield secret
    finally:
        with as_problems():
            store.revoke(name)
