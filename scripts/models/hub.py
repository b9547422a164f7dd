"""The Hugging Face hub: its names, tokens and refusals, and config.json; weights are download_model.py's business."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from stack import settings
from stack.console import Problem

HUB = "https://huggingface.co"
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


def is_repository(text: str) -> bool:
    """Whether it is a name like owner/model."""
    return re.fullmatch(f"{NAME}/{NAME}", text) is not None


def endpoint() -> str:
    """Where the hub, or the mirror that HF_ENDPOINT names, answers."""
    return (settings.value_of("HF_ENDPOINT") or HUB).rstrip("/")


def without_password(text: str) -> str:
    """The text without what stands before an @ in its addresses: a name and a password."""
    return re.sub(r"""(?<=://)[^/\s"']*@""", "", text)


def client(**options: Any) -> httpx.Client:
    """An HTTP client. A Problem where it cannot take the proxy that the environment names."""
    try:
        return httpx.Client(**options)
    except (ImportError, ValueError) as error:
        # httpx needs a package for one kind, and does not know others
        why = (
            "a socks proxy needs the package socksio"
            if isinstance(error, ImportError)
            else without_password(str(error))
        )
        raise Problem(
            f"the proxy that ALL_PROXY, HTTPS_PROXY or HTTP_PROXY names cannot be used: {why}",
            "name an http:// proxy, unset it, or for socks5:// run .venv/bin/pip install 'httpx[socks]'",
        ) from error


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
        "see what it says; HF_ENDPOINT or --endpoint has to name the hub or a mirror that speaks its API",
    )


def fetch_config(repository: str) -> Mapping[str, Any]:
    """The config.json of a repository on the hub, or on HF_ENDPOINT. Raises Problem where it cannot be had."""
    if not is_repository(repository):
        raise Problem(f"{repository} is neither a folder with a config.json nor a name like owner/model", "correct it")
    answer = _get(repository, "config.json")
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise gated(repository)
    if answer.status_code != httpx.codes.OK:
        raise Problem(f"{_url(repository, 'config.json')}: status {answer.status_code}", "correct the name")
    found = _parse(answer, repository, "config.json")
    if not isinstance(found, dict):
        raise not_the_hub(_url(repository, "config.json"))
    return found


def fetch_further(repository: str, file: str) -> Mapping[str, Any] | None:
    """Another JSON file of a repository whose config.json fetch_config has brought; None where it has none."""
    answer = _get(repository, file)
    found = _parse(answer, repository, file) if answer.status_code == httpx.codes.OK else None
    return found if isinstance(found, dict) else None


def _url(repository: str, file: str) -> str:
    return f"{endpoint()}/{repository}/resolve/main/{file}"


def _get(repository: str, file: str) -> httpx.Response:
    token = read_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with client(timeout=20, follow_redirects=True) as asking:
            return asking.get(_url(repository, file), headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Problem(
            f"cannot reach {_url(repository, file)}: {error}",
            "correct HF_ENDPOINT if it is set, give a folder that holds the model, or bring it with"
            " scripts/download_model.py",
        ) from error


def _parse(answer: httpx.Response, repository: str, file: str) -> object:
    try:
        return json.loads(answer.content)
    except ValueError as error:
        raise not_the_hub(_url(repository, file)) from error
