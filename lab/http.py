"""Small HTTP calls."""

import urllib.error
import urllib.request
from collections.abc import Mapping


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
