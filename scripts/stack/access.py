"""The folder secrets/ of this checkout, as the operator commands use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from access.store import Mistake, Secrets
from stack.console import Problem, one_line_for_mistakes
from stack.shell import ROOT

SECRETS = Secrets(ROOT / "secrets")


@contextmanager
def as_problems() -> Iterator[None]:
    """Turns the package's mistakes into those of the commands."""
    try:
        yield
    except Mistake as mistake:
        raise Problem(mistake.what, mistake.fix) from None


@contextmanager
def one_line() -> Iterator[None]:
    """`one_line_for_mistakes`, for the package's too."""
    with one_line_for_mistakes(), as_problems():
        yield
