"""The Hugging Face hub, for config.json alone; weights are download_model.py's business."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from stack.console import Problem

HUB = "https://huggingface.co"


def read_token(file: Path | None = None) -> str | None:
    """The access token in a file: the one named, or HF_TOKEN_FILE's. None without one; never from the command line."""
    path = file or (Path(named) if (named := os.environ.get("HF_TOKEN_FILE")) else None)
    if path is None:
        return None
    try:
        return path.read_text().strip()
    except OSError as error:
        raise Problem(f"cannot read the token file {path}: {error.strerror}", "correct HF_TOKEN_FILE") from error


def fetch_config(repository: str) -> Mapping[str, Any]:
    """The config.json of a repository on the hub, or on HF_ENDPOINT. Raises Problem where it cannot be had."""
    if repository.count("/") != 1 or repository.startswith((".", "/")):
        raise Problem(f"{repository} is neither a folder with a config.json nor a name like owner/model", "correct it")
    token = read_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{repository}/resolve/main/config.json"
    try:
        answer = httpx.get(url, headers=headers, timeout=20, follow_redirects=True)
    except httpx.HTTPError as error:
        raise Problem(
            f"cannot reach the hub for {repository}/config.json: {error}",
            "give a folder that holds the model, or bring it with scripts/download_model.py",
        ) from error
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        # the hub says so too of a name that it does not have
        raise Problem(
            f"{repository} is gated, or there is no such model",
            "correct the name, or accept its terms on the hub and set HF_TOKEN_FILE to a file with your token",
        )
    if answer.status_code != httpx.codes.OK:
        raise Problem(f"{url}: status {answer.status_code}", "correct the name")
    found: Mapping[str, Any] = answer.json()
    return found
