"""The old names, for the tests that still use them."""

import time
from collections.abc import Callable

from lab.http import answers, get
from lab.sim.gateway import Gateway, image
from lab.sim.replicas import Replicas, Sim
from lab.waiting import START_SECONDS, until
from stack.shell import ROOT

__all__ = ["ROOT", "Gateway", "Replicas", "Sim", "answers", "get", "image", "wait_until"]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> float:
    start = time.monotonic()
    until(condition, what, seconds)
    return time.monotonic() - start
