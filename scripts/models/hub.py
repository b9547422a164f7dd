"""The Hugging Face hub: its names, its token, its refusals, and the small files that the planner reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

# loads its parts as they are used: `make plan` with a local model must not wait for them
import huggingface_hub

from stack import settings
from stack.console import Problem

if TYPE_CHECKING:
    import httpx2

HUB = "https://huggingface.co"
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
REFUSED = (401, 403)
TIMEOUT = 30  # seconds without an answer
OTHERWISE = "put the model's folder into models/, or bring both from another machine with `make bundle`"
CHECK = f"check the network, and HF_ENDPOINT if it is set; or {OTHERWISE}"


def is_repository(text: str) -> bool:
    """Whether it is a name like owner/model."""
    return re.fullmatch(f"{NAME}/{NAME}", text) is not None


def endpoint(named: str | None = None) -> str:
    """Where the hub answers, or the mirror: the one `named` with --endpoint, or HF_ENDPOINT's."""
    found = named or settings.value_of("HF_ENDPOINT") or HUB
    # what is wrong in brackets urlsplit refuses
    with suppress(ValueError):
        if urlsplit(found).scheme in ("http", "https"):
            return found.rstrip("/")
    raise Problem(f"{found} is no address of a hub", f"write {'--endpoint' if named else 'HF_ENDPOINT'} like {HUB}")


def without_password(text: str) -> str:
    """The text without what stands before an @ in its addresses: a name and a password."""
    return re.sub(r"""(?<=://)[^/\s"']*@""", "", text)


def read_token(file: Path | None = None) -> str | None:
    """The access token in a file: the one named, or HF_TOKEN_FILE's. None without one; never from the command line."""
    path = file or (Path(named).expanduser() if (named := settings.value_of("HF_TOKEN_FILE")) else None)
    if path is None:
        return None
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise Problem(
            f"cannot read the token file {path}: {error.strerror}", "correct HF_TOKEN_FILE or --token-file"
        ) from error
    if not re.fullmatch(rb"[!-~]+", token):
        raise Problem(f"{path} holds something else than one token", "put your token in it, alone, as the hub shows it")
    return token.decode()


def gated(repository: str) -> Problem:
    """What the hub's 401 and 403 mean: it answers so for a name that it does not have, too."""
    return Problem(
        f"{repository} is gated, or there is no such model",
        "correct the name, or accept its terms on the hub and put your token in a file that HF_TOKEN_FILE names"
        " (scripts/download_model.py takes --token-file FILE, too)",
    )


def not_the_hub(url: str) -> Problem:
    """For an answer that the hub would not give: a login page, a mirror's error."""
    return Problem(
        f"{url} answers something else than the hub does",
        f"see what it says; HF_ENDPOINT has to name the hub or a mirror that speaks its API; or {OTHERWISE}",
    )


def headers(token: str | None) -> dict[str, str]:
    """The headers of a request, with the token if there is one."""
    # compressed on the way, sizes and offsets would mean something else
    plain = {"Accept-Encoding": "identity"}
    return {**plain, "Authorization": f"Bearer {token}"} if token else plain


@contextmanager
def reaching(where: str, fix: str = CHECK) -> Iterator[httpx2.Client]:
    """The client of the web; a network that fails in the body is a Problem that names `where` and `fix`."""
    import httpx2  # noqa: PLC0415 - as with huggingface_hub's parts

    # the library does not load with a wrong one
    endpoint()
    try:
        client = huggingface_hub.get_session()
    # it needs a package for one kind of proxy, and does not know others
    except (ImportError, ValueError) as error:
        why = "a socks proxy needs the package socksio" if isinstance(error, ImportError) else str(error)
        raise Problem(
            f"the proxy that ALL_PROXY, HTTPS_PROXY or HTTP_PROXY names cannot be used: {without_password(why)}",
            "name an http:// proxy, unset it, or for socks5:// run .venv/bin/pip install socksio",
        ) from error
    try:
        yield client
    except huggingface_hub.errors.OfflineModeIsEnabled as error:
        raise Problem(f"HF_HUB_OFFLINE is set, so {where} is not asked", f"unset it; or {OTHERWISE}") from error
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        what = f"cannot reach {where}, it does not answer or broke off: {error}"
        raise Problem(without_password(what), fix) from error


def ask(url: str, token: str | None, fix: str = CHECK, method: str = "GET") -> httpx2.Response:
    """What a web server says to a small request, whatever its status."""
    with reaching(url, fix) as client:
        return client.request(method, url, headers=headers(token), timeout=TIMEOUT)


def fetch_config(repository: str) -> Mapping[str, Any]:
    """The config.json of a repository on the hub, or on HF_ENDPOINT. Raises Problem where it cannot be had."""
    if not is_repository(repository):
        raise Problem(
            f"{repository} is neither a folder with a config.json nor a name like owner/model",
            "write a folder's path, or OWNER/NAME as the hub shows it",
        )
    status, found, url = _json(repository, "config.json")
    if status in REFUSED:
        raise gated(repository)
    if status != 200:
        raise Problem(f"{url}: status {status}", "correct the name")
    if not isinstance(found, dict):
        raise not_the_hub(url)
    return found


def fetch_further(repository: str, file: str) -> Mapping[str, Any] | None:
    """Another JSON file of a repository whose config.json fetch_config has brought; None where it has none."""
    _, found, _ = _json(repository, file)
    return found if isinstance(found, dict) else None


def _json(repository: str, file: str) -> tuple[int, object, str]:
    """What the hub answers for a file: the status, its JSON where that is 200, and its address."""
    url = f"{endpoint()}/{repository}/resolve/main/{file}"
    answer = ask(url, read_token())
    try:
        return answer.status_code, json.loads(answer.content) if answer.status_code == 200 else None, url
    except ValueError as error:
        raise not_the_hub(url) from error
