"""Small HTTP calls, and the key for a stack that asks for one."""

import os
import urllib.error
import urllib.request
from collections.abc import Mapping

# The key of an admin, where the running stack asks for keys.
KEY = "FLEET_KEY"


def key_headers() -> dict[str, str]:
    """The header with the key in $FLEET_KEY; nothing without it."""
    key = os.environ.get(KEY, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def get(
    url: str,
    data: bytes | None = None,
    method: str | None = None,
    timeout: float = 5.0,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """The body of a 2xx answer; OSError (urllib's errors are such) otherwise."""
    request = urllib.request.Request(url, data=data, method=method, headers=dict(headers or {}))
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        body: bytes = answer.read()
        return body


def answers(url: str) -> bool:
    """Whether anything that speaks HTTP is there."""
    try:
        get(url, timeout=1.0)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
