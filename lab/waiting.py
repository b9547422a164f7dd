"""Await a condition instead of sleeping."""

from collections.abc import Callable
from typing import TypeVar

from stack.shell import wait_for

T = TypeVar("T")
START_SECONDS = 60.0


def until(condition: Callable[[], T], what: str, within_s: float = START_SECONDS) -> T:
    """Calls `condition` until it returns something true, and gives that; TimeoutError names `what` after `within_s`."""
    value = wait_for(condition, within_s, every_s=0.05)
    if not value:
        raise TimeoutError(f"{what}: not within {within_s:.0f} s (last seen: {value!r})")
    return value
