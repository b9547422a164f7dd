"""API keys: who holds one, what it may do, and until when. secrets/gateway/keys.json has their hashes, never a key.

A key is `sk-fleet-` and 256 random bits, so its plain SHA-256 tells nobody what it is. The gateway reads the file once
a second; a change needs no reload.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets as random
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from access import audit
from access.store import MAX_NUMBER, Mistake, Secrets, Strict, made, read

PREFIX = "sk-fleet-"
LANES = {"interactive": 0, "batch": 10}
MAX_KEYS = 10_000
# The current hash of a key, and those of rotated ones whose time is not over.
MAX_HASHES = 8

Role = Literal["user", "admin"]
Seconds = Annotated[int, Field(ge=0, le=MAX_NUMBER)]  # since 1970, UTC
Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]


def printable(text: str) -> str:
    """Text on one line, in which no key stands."""
    if not text.isprintable():
        raise ValueError("it has a character that cannot be printed")
    if PREFIX in text:
        raise ValueError(f"it has {PREFIX} in it: a key must not stand here")
    return text


def as_label(name: str) -> str:
    """A name that can stand in logs and metrics."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise ValueError("it begins with a small letter or digit; up to 63 of those and . _ - follow")
    return name


Name = Annotated[str, AfterValidator(as_label), AfterValidator(printable)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(printable)]


class Limits(Strict):
    """What its holder may use. None: no limit; 0 is a zero."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    tokens_per_month: Count | None = None
    parallel_requests: Count | None = None
    prompt_tokens: Count | None = None
    body_bytes: Count | None = None
    max_tokens: Count | None = None
    n: Count | None = None

    @model_serializer(mode="wrap")
    def _only_those_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, int]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def changed(self, changes: Mapping[str, int | None]) -> Limits:
        """These limits with some set and, where the value is None, some taken away. A Mistake where one will not do."""
        return made(Limits, self.model_dump() | dict(changes))

    def over(self, general: Limits) -> Limits:
        """These limits, and the general ones where these say nothing."""
        return Limits.model_validate(general.model_dump() | self.model_dump())


class Hash(Strict):
    """The SHA-256 of a whole key, and when it stops to work."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    until: Seconds | None = None


class Key(Strict):
    """A key's holder and rights. The newest hash comes first."""

    id: Annotated[str, StringConstraints(pattern=r"^k[0-9a-f]{7,16}$")]
    name: Name
    hashes: Annotated[list[Hash], Field(min_length=1, max_length=MAX_HASHES)]
    role: Role = "user"
    models: Annotated[list[ModelName], Field(min_length=1, max_length=256)] | None = None
    limits: Limits = Limits()
    # vLLM's: lower is sooner
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    # may name an end user in the header X-End-User
    end_users: bool = False
    expires: Seconds | None = None
    created: Seconds = 0
    note: Annotated[str, StringConstraints(max_length=200), AfterValidator(printable)] = ""

    @field_validator("models")
    @classmethod
    def _each_once(cls, models: list[str] | None) -> list[str] | None:
        return models if models is None else list(dict.fromkeys(models))

    def ended(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires


class General(Strict):
    """What holds for all of a kind."""

    limits: Limits = Limits()


class Roles(Strict):
    """What holds for all keys of a role, where the key itself says nothing."""

    user: General = General()
    admin: General = General()


class Keys(Strict):
    """The whole file."""

    version: Literal[1] = 1
    keys: Annotated[list[Key], Field(max_length=MAX_KEYS)] = Field(default_factory=list)
    roles: Roles = Roles()
    end_users: General = General()

    @model_validator(mode="after")
    def _told_apart(self) -> Keys:
        for what, values in (
            ("name", [key.name for key in self.keys]),
            ("id", [key.id for key in self.keys]),
            ("hash", [one.sha256 for key in self.keys for one in key.hashes]),
        ):
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"two keys have the same {what}" + (f" {twice}" if what != "hash" else ""))
        return self

    def find(self, name: str) -> Key:
        """The key of this name. A Mistake where there is none."""
        for key in self.keys:
            if key.name == name:
                return key
        raise Mistake(f"there is no key {name}", "`make key ARGS=list` shows those that there are")

    def in_force(self, key: Key) -> Limits:
        """The key's limits, its role's where it has none of its own."""
        return key.limits.over(getattr(self.roles, key.role).limits)

    def holder(self, secret: str, now: float) -> Key | None:
        """Whose key this is; None where it is nobody's, or was, and its time is over."""
        digest = sha256(secret)
        for key in self.keys:
            for one in key.hashes:
                if random.compare_digest(one.sha256, digest):
                    ended = key.ended(now) or (one.until is not None and now >= one.until)
                    return None if ended else key
        return None


def gateways_key(cluster_secret: str) -> str:
    """What a gateway shows to the Ray Serve application behind it. The cluster's secret makes it, and cannot be found
    from it."""
    return "ray-" + hmac.new(cluster_secret.strip().encode(), b"gateway", hashlib.sha256).hexdigest()


def sha256(secret: str) -> str:
    """A key's hash, as the file has it."""
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyStore:
    """The keys in the folder `secrets`. Every change is checked, written whole, and stands in the audit log."""

    def __init__(self, secrets: Secrets, clock: Callable[[], float] = time.time) -> None:
        self._secrets = secrets
        self._clock = clock

    def read(self) -> Keys:
        """All keys; none where there is no file yet."""
        return read(self._secrets.keys, Keys) or Keys()

    def create(self, name: str, **rights: Any) -> str:
        """A new key, which is shown this once. `rights`: fields of Key, `limits` by name. A Mistake where the name is
        taken or a right will not do."""
        with self._secrets.locked():
            keys = self.read()
            if any(key.name == name for key in keys.keys):
                fix = f"choose another, or give its holder another key: make key ARGS='rotate {name}'"
                raise Mistake(f"there is a key {name} already", fix)
            if len(keys.keys) >= MAX_KEYS:
                raise Mistake(f"there are {MAX_KEYS} keys, and no room for more", "revoke what nobody uses")
            now = int(self._clock())
            secret = PREFIX + random.token_urlsafe(32)
            fields = {"id": f"k{random.token_hex(4)}", "name": name, "hashes": [{"sha256": sha256(secret)}]}
            key = made(Key, fields | {"created": now} | rights)
            self._refuse_an_end_in_the_past(key)
            keys.keys = [*keys.keys, key]
            self._commit(keys, "key.create", name, id=key.id, rights=shown(key))
        return secret

    def rotate(self, name: str, overlap_s: int) -> str:
        """Another key for the same holder. The old one works for `overlap_s` seconds more, or as long as it did."""
        with self._secrets.locked():
            keys = self.read()
            key = keys.find(name)
            now = int(self._clock())
            secret = PREFIX + random.token_urlsafe(32)
            end = now + overlap_s
            old = [
                Hash(sha256=one.sha256, until=min(one.until or end, end))
                for one in key.hashes
                if one.until is None or one.until > now
            ]
            if len(old) >= MAX_HASHES:
                raise Mistake(
                    f"{name} was rotated {MAX_HASHES - 1} times, and all those keys still work",
                    f"end them first: make key ARGS='revoke {name}', or wait",
                )
            key.hashes = [Hash(sha256=sha256(secret)), *old]
            self._commit(keys, "key.rotate", name, id=key.id, old_until=end)
        return secret

    def revoke(self, name: str) -> None:
        """Ends a key for good, with all that it was rotated from."""
        with self._secrets.locked():
            keys = self.read()
            key = keys.find(name)
            keys.keys = [other for other in keys.keys if other.name != name]
            self._commit(keys, "key.revoke", name, id=key.id)

    def set(self, name: str, limits: Mapping[str, int | None] | None = None, **rights: Any) -> Key:
        """Changes what a key may do: `limits` by name, None takes one away; `rights`: other fields of Key."""
        with self._secrets.locked():
            keys = self.read()
            key = keys.find(name)
            before = shown(key)
            after = made(Key, key.model_dump() | rights | {"limits": key.limits.changed(limits or {}).model_dump()})
            if "expires" in rights:
                self._refuse_an_end_in_the_past(after)
            keys.keys = [after if other.name == name else other for other in keys.keys]
            self._commit(keys, "key.set", name, id=key.id, **difference(before, shown(after)))
        return after

    def set_limits(self, of: Role | Literal["end_users"], limits: Mapping[str, int | None]) -> Limits:
        """Changes the limits of all keys of a role, or those of each end user; gives them all."""
        with self._secrets.locked():
            keys = self.read()
            general: General = keys.end_users if of == "end_users" else getattr(keys.roles, of)
            before = general.limits
            general.limits = before.changed(limits)
            self._commit(keys, "limits.set", of, **difference(before.model_dump(), general.limits.model_dump()))
        return general.limits

    def _refuse_an_end_in_the_past(self, key: Key) -> None:
        if key.ended(self._clock()):
            raise Mistake(f"{key.name} would have expired already", "name a later time, such as --expires 30d")

    def _commit(self, keys: Keys, action: str, name: str, **details: object) -> None:
        audit.commit(self._secrets, {self._secrets.keys: keys}, action, name, **details)


def shown(key: Key) -> dict[str, Any]:
    """What a key may do: all but what identifies it."""
    return key.model_dump(exclude={"id", "name", "hashes", "created"})


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields that changed, as they were and as they are."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return {"before": {name: before.get(name) for name in names}, "after": {name: after.get(name) for name in names}}
