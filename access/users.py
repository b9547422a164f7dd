"""Users, who sign in with a password: secrets/tokens/users.json, which `make user` writes, or the environment.

A password is kept as an argon2id hash with a salt of its own. What signs tokens has no part in it: another signing key
changes no password.
"""

from __future__ import annotations

import hmac
import re
import secrets as random
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import argon2
from argon2.exceptions import Argon2Error, InvalidHash
from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from access import audit
from access.keys import Name, Role, Seconds
from access.store import Mistake, Secrets, Strict, made, read, why

MAX_USERS = 10_000
# NIST SP 800-63B asks for 15 where a password is all there is, and for no other rule.
SHORTEST = 15
LONGEST = 1024
HASHER = argon2.PasswordHasher()
OURS = argon2.profiles.RFC_9106_LOW_MEMORY
# What a hash from elsewhere may cost to check (KiB, rounds, threads). OWASP: at least 19 MiB and 2 rounds.
MEMORY_KIB = range(19 * 1024, 128 * 1024 + 1)
ROUNDS = range(2, 11)
THREADS = range(1, 9)


def argon2id(text: str) -> str:
    """A hash that is neither weak nor dear."""
    try:
        found = argon2.extract_parameters(text)
    except InvalidHash:
        raise ValueError("it is no argon2 hash: `make user ARGS=hash` makes one") from None
    if found.type is not argon2.Type.ID:
        raise ValueError("it is argon2, but not argon2id: `make user ARGS=hash` makes one")
    for what, value, allowed in (
        ("KiB of memory", found.memory_cost, MEMORY_KIB),
        ("rounds", found.time_cost, ROUNDS),
        ("threads", found.parallelism, THREADS),
    ):
        if value not in allowed:
            raise ValueError(f"its {what} are {value}, not {allowed.start} to {allowed.stop - 1}")
    if found.salt_len < 16 or found.hash_len < 32:
        raise ValueError("its salt has less than 16 bytes, or its hash less than 32")
    return text


class User(Strict):
    """Who may sign in, and as what."""

    name: Name
    role: Role = "user"
    password: Annotated[str, StringConstraints(max_length=512), AfterValidator(argon2id)]
    created: Seconds = 0
    source: Literal["command", "environment"] = "command"


class Users(Strict):
    """The whole file."""

    version: Literal[1] = 1
    users: Annotated[list[User], Field(max_length=MAX_USERS)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _told_apart(self) -> Users:
        names = [user.name for user in self.users]
        if len(set(names)) < len(names):
            raise ValueError(f"two users have the name {next(name for name in names if names.count(name) > 1)}")
        return self

    def find(self, name: str) -> User | None:
        """The user of this name; None where there is none."""
        return next((user for user in self.users if user.name == name), None)


class Doorman:
    """Says who a password lets in, in the same time whether there is such a user or not."""

    def __init__(self, users: Users) -> None:
        self._users = {user.name: user for user in users.users}
        # Hashes from elsewhere may cost more or less than ours. A name that is nobody's always costs the same, and as
        # often this much as users do.
        costs = [argon2.extract_parameters(user.password) for user in users.users] or [OURS]
        made_for = {repr(cost): decoy(cost) for cost in {repr(cost): cost for cost in costs}.values()}
        self._decoys = [made_for[repr(cost)] for cost in costs]
        self._pepper = random.token_bytes(32)

    def lets_in(self, name: str, password: str) -> User | None:
        """The user, if it is their password."""
        user = self._users.get(name)
        try:
            HASHER.verify(user.password if user else self._decoy(name), password)
        except (Argon2Error, UnicodeEncodeError):
            return None
        return user

    def _decoy(self, name: str) -> str:
        digest = hmac.digest(self._pepper, name.encode(errors="replace"), "sha256")
        return self._decoys[int.from_bytes(digest) % len(self._decoys)]


def decoy(cost: argon2.Parameters) -> str:
    """A hash of a password that nobody knows, as dear to check as others of this cost."""
    return argon2.PasswordHasher.from_parameters(cost).hash(random.token_urlsafe(32))


def hashed(password: str, name: str = "") -> str:
    """A password's hash. A Mistake where the password is too easy to guess."""
    try:
        size = len(password.encode())
    except UnicodeEncodeError:
        raise Mistake(
            "the password is not UTF-8", "type it at a terminal that speaks UTF-8, or take other characters"
        ) from None
    if len(password) < SHORTEST:
        raise Mistake(f"the password has {len(password)} characters", f"take one of at least {SHORTEST}")
    if size > LONGEST:
        raise Mistake("the password is too long", f"take one of at most {LONGEST} bytes")
    if len(set(password)) < 6 or (name and name in password.lower() and len(password) < SHORTEST + len(name)):
        raise Mistake("the password is easy to guess", "take several words that have nothing to do with each other")
    return HASHER.hash(password)


ALIAS = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


def from_environment(environment: Mapping[str, str]) -> list[User]:
    """The users that USER_LIST names. A Mistake says which variable will not do; it never shows a value."""
    listed = [alias.strip() for alias in environment.get("USER_LIST", "").split(",")]
    found = []
    for alias in filter(None, listed):
        if not ALIAS.fullmatch(alias):
            raise Mistake(f"USER_LIST: {alias!r} is no alias", "write capital letters: USER_LIST=ALICE,BOB")
        names = {"name": f"{alias}_USERNAME", "password": f"{alias}_HASHED_PASSWORD", "role": f"{alias}_ROLE"}
        fields = {field: environment[name] for field, name in names.items() if environment.get(name)}
        for field in ("name", "password"):
            if field not in fields:
                raise Mistake(f"USER_LIST has {alias}, but {names[field]} is not set", "set it, or take the alias out")
        try:
            found.append(User.model_validate(fields | {"source": "environment"}))
        except ValidationError as error:
            field, _, reason = why(error).partition(": ")
            fix = "correct it; a hash stands in single quotes, because it has $ in it"
            raise Mistake(f"{names[field]}: {reason}", fix) from None
    made(Users, {"users": [user.model_dump() for user in found]})
    return found


class UserStore:
    """The users in the folder `secrets`. Every change is checked, written whole, and stands in the audit log."""

    def __init__(self, secrets: Secrets, clock: Callable[[], float] = time.time) -> None:
        self._secrets = secrets
        self._clock = clock

    def read(self) -> Users:
        """All users; none where there is no file yet."""
        return read(self._secrets.users, Users) or Users()

    def add(self, name: str, password: str, role: Role) -> None:
        """Adds a user. A Mistake where the name is taken or the password easy to guess."""
        with self._secrets.locked():
            users = self.read()
            if users.find(name):
                fix = f"for another password: make user ARGS='password {name}'"
                raise Mistake(f"there is a user {name} already", fix)
            if len(users.users) >= MAX_USERS:
                raise Mistake(f"there are {MAX_USERS} users, and no room for more", "remove some first")
            fields = {"name": name, "role": role, "created": int(self._clock())}
            users.users = [*users.users, made(User, fields | {"password": hashed(password, name)})]
            self._commit(users, "user.add", name, role=role)

    def set(self, name: str, *, password: str | None = None, role: Role | None = None) -> None:
        """Another password or role for a user."""
        with self._secrets.locked():
            users = self.read()
            user = self._own(users, name)
            if password is not None:
                user.password = hashed(password, name)
                self._commit(users, "user.password", name)
            if role is not None:
                before, user.role = user.role, role
                self._commit(users, "user.role", name, before=before, after=role)

    def remove(self, name: str) -> None:
        """Takes a user out. Tokens that the user has work until they expire."""
        with self._secrets.locked():
            users = self.read()
            self._own(users, name)
            users.users = [user for user in users.users if user.name != name]
            self._commit(users, "user.remove", name)

    def take(self, environment: Mapping[str, str]) -> None:
        """Makes the users of the environment be those that are in the file from there: adds, changes, removes."""
        wanted = {user.name: user for user in from_environment(environment)}
        if not wanted and not any(user.source == "environment" for user in self.read().users):
            return
        with self._secrets.locked():
            users = self.read()
            for user in users.users:
                if user.source == "command" and user.name in wanted:
                    raise Mistake(
                        f"USER_LIST names {user.name}, and `make user` made a user of that name",
                        f"take one of them out (make user ARGS='remove {user.name}')",
                    )
            there = {user.name: user for user in users.users if user.source == "environment"}
            for name in there.keys() - wanted.keys():
                users.users = [user for user in users.users if user.name != name]
                self._commit(users, "user.remove", name, source="environment")
            for name, user in wanted.items():
                old = there.get(name)
                user.created = old.created if old else int(self._clock())
                if old != user:
                    users.users = [*(other for other in users.users if other.name != name), user]
                    self._commit(users, "user.set" if old else "user.add", name, role=user.role, source="environment")

    def _own(self, users: Users, name: str) -> User:
        """The user of this name, whom commands may change."""
        user = users.find(name)
        if user is None:
            raise Mistake(f"there is no user {name}", "`make user ARGS=list` shows those that there are")
        if user.source == "environment":
            raise Mistake(f"{name} comes from USER_LIST", "change it in .env, and run `make up`")
        return user

    def _commit(self, users: Users, action: str, name: str, **details: object) -> None:
        audit.commit(self._secrets, {self._secrets.users: users}, action, name, **details)
