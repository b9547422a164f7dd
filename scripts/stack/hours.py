"""What `make up` and `make doctor` check of AWAKE, which the gateway reads: that it is a timetable."""

from __future__ import annotations

from autoscaler import timetable
from stack.console import Problem


def check(awake: str | None) -> None:
    """A Problem where these are no hours of models."""
    try:
        timetable.parse(awake or "", "qwen")
    except ValueError as error:
        raise Problem(f"AWAKE={awake} will not do: {error}", "correct AWAKE in .env or in the environment") from None
