"""The token service: `POST /token` gives a user a JSON web token for a password (OAuth2, RFC 6749 section 4.3).

It only reads: users and signing keys are files that commands write, and a change is in force at the next request. It
hashes a few passwords at a time, because each takes an eighth of a second and 64 MiB. The gateway is in front of it and
says what a client's address is.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from access.guessing import Guessing, network
from access.store import Mistake, Strict, read
from access.tokens import Signing, issue
from access.users import LONGEST, Doorman, Users

FOLDER = Path("/etc/fleet/secrets")
LARGEST_BODY = 8 * 1024
AT_ONCE = 2
# At an eighth of a second each, who is last in this line waits for two seconds.
LINE = 32
WRONG_BY_ACCOUNT = 5
WRONG_BY_ADDRESS = 20

File = TypeVar("File", bound=Strict)
Made = TypeVar("Made")


def log(what: str, **details: object) -> None:
    """A line of JSON about a sign-in. A name is only logged if it is a user's: else it may be a password."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    sys.stdout.write(json.dumps({"time": now, "event": what, **details}) + "\n")
    sys.stdout.flush()


class Watched(Generic[File, Made]):
    """What is made of a file, made again when the file changes. A file with a mistake changes nothing, loudly; one that
    is gone leaves nothing: commands rename files, so it is never gone for a moment only."""

    def __init__(self, path: Path, kind: type[File], make: Callable[[File], Made]) -> None:
        self._path = path
        self._kind = kind
        self._make = make
        self._seen: tuple[int, int, int] | None = None
        self._made: Made | None = None

    def __call__(self) -> Made | None:
        """What is made of the file now; None where there is none, or has been no good one."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen != self._seen:
                data = read(self._path, self._kind)
                if data is not None:
                    self._made = self._make(data)
                self._seen = seen
        except FileNotFoundError:
            if self._seen is not None:
                log("file.gone", file=self._path.name)
            self._seen = self._made = None
        except (Mistake, OSError) as mistake:
            log("file.refused", file=self._path.name, why=str(mistake))
        return self._made


class NotNow(Exception):
    """A request that gets no token: with this status, OAuth2's code, words, and maybe seconds to wait."""

    def __init__(self, status: int, code: str, words: str, wait_s: float = 0) -> None:
        super().__init__(words)
        headers = {"Cache-Control": "no-store"}
        if wait_s:
            headers["Retry-After"] = str(math.ceil(wait_s))
        self.answer = JSONResponse({"error": code, "error_description": words}, status, headers)


async def form(request: Request) -> tuple[str, str]:
    """The name and password of a request's form. NotNow where there are none."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise NotNow(400, "invalid_request", "send a form: Content-Type: application/x-www-form-urlencoded")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise NotNow(413, "invalid_request", f"the form has more than {LARGEST_BODY} bytes")
    try:
        fields = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=16, errors="strict")
    except ValueError:
        raise NotNow(400, "invalid_request", "the form cannot be read") from None
    if any(len(values) > 1 for values in fields.values()):
        raise NotNow(400, "invalid_request", "a field comes twice")
    if fields.get("grant_type", ["password"]) != ["password"]:
        raise NotNow(400, "unsupported_grant_type", "the only grant_type is password")
    for name in ("username", "password"):
        if not fields.get(name, [""])[0]:
            raise NotNow(400, "invalid_request", f"{name} is missing")
    password = fields["password"][0]
    if len(password.encode()) > LONGEST:
        raise NotNow(400, "invalid_request", f"the password has more than {LONGEST} bytes")
    return fields["username"][0], password


def client(request: Request) -> str:
    """The client's address, as the gateway put it at the end of X-Forwarded-For; else that of the connection."""
    forwarded = ",".join(request.headers.getlist("x-forwarded-for"))
    own = request.client.host if request.client else ""
    return network(forwarded.rpartition(",")[2] if forwarded else own)


def build(folder: Path = FOLDER, clock: Callable[[], float] = time.monotonic) -> FastAPI:
    """The service over the users and signing keys in a folder. `clock`: seconds, for what is slowed."""
    app = FastAPI(title="vllm-fleet: tokens", openapi_url=None)
    doorman = Watched(folder / "users.json", Users, lambda users: (Doorman(users), {user.name for user in users.users}))
    signing = Watched(folder / "signing.json", Signing, lambda data: data)
    accounts, addresses = Guessing(WRONG_BY_ACCOUNT, clock), Guessing(WRONG_BY_ADDRESS, clock)
    hashing = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="argon2")
    in_line = 0

    @app.exception_handler(NotNow)
    async def say_why(_: Request, refusal: NotNow) -> JSONResponse:
        return refusal.answer

    @app.get("/health")
    async def health() -> JSONResponse:
        missing = [name for name, made in (("users", doorman()), ("signing keys", signing())) if made is None]
        return JSONResponse({"missing": missing}, 503 if missing else 200)

    @app.post("/token")
    async def token(request: Request) -> JSONResponse:
        nonlocal in_line
        name, password = await form(request)
        door, keys = doorman(), signing()
        if door is None or keys is None or not keys.keys:
            raise NotNow(503, "temporarily_unavailable", "nobody can sign in yet", 5)
        address, known = client(request), name if name in door[1] else None
        if wait := max(accounts.wait(name), addresses.wait(address)):
            log("token.slowed", name=known, address=address, seconds=math.ceil(wait))
            raise NotNow(429, "slow_down", "too many wrong passwords; wait before the next", wait)
        if in_line >= AT_ONCE + LINE:
            raise NotNow(503, "temporarily_unavailable", "too many sign in at this moment", 1)
        accounts.begin(name)
        addresses.begin(address)
        in_line += 1
        try:
            user = await asyncio.get_running_loop().run_in_executor(hashing, door[0].lets_in, name, password)
        finally:
            in_line -= 1
        if user is None:
            log("token.refused", name=known, address=address)
            raise NotNow(400, "invalid_grant", "no such user, or another password")
        accounts.right(name, forgive=True)
        addresses.right(address, forgive=False)
        log("token.issued", name=name, role=user.role, address=address)
        given = issue(keys, user.name, user.role, time.time())
        answer = {"access_token": given, "token_type": "bearer", "expires_in": 60 * keys.minutes}
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})

    return app


if __name__ == "__main__":
    uvicorn.run(build(), host="0.0.0.0", port=8000, access_log=False, server_header=False, proxy_headers=False)
