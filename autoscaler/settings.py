"""The autoscaler's settings, from the environment; `make up` checks them before anything starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from autoscaler import timetable

MOST = 999


class Mistake(Exception):
    """What is wrong with a setting: `what` it is, and the `fix`."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}: {fix}")
        self.what = what
        self.fix = fix


@dataclass(frozen=True)
class Settings:
    """The bounds (`most`: None for all that are there), the timetable with its zone, and how long a drain may take."""

    least: int
    most: int | None
    entries: tuple[timetable.Entry, ...]
    zone: ZoneInfo
    drain_s: float


def number(environment: Mapping[str, str], name: str) -> int | None:
    """A setting that counts replicas; None where it is not set. A Mistake out of 1 to MOST."""
    text = environment.get(name) or ""
    if not text:
        return None
    if not re.fullmatch(r"\d{1,4}", text) or not 1 <= int(text) <= MOST:
        raise Mistake(f"{name}={text} will not do", f"write a number of replicas from 1 to {MOST}")
    return int(text)


def read(environment: Mapping[str, str]) -> Settings:
    """The settings. A Mistake where one is wrong, or they do not go together."""
    least, most = number(environment, "MIN_REPLICAS") or 1, number(environment, "MAX_REPLICAS")
    if most is not None and most < least:
        raise Mistake(f"MAX_REPLICAS={most} is less than MIN_REPLICAS={least}", "raise the one or lower the other")
    text = environment.get("REPLICAS_TIMETABLE") or ""
    try:
        entries = timetable.counts(text)
    except ValueError as error:
        raise Mistake(f"REPLICAS_TIMETABLE: {error}", ".env.example has an example") from None
    if over := [entry.what for entry in entries if most is not None and int(entry.what) > most]:
        raise Mistake(f"REPLICAS_TIMETABLE wants {over[0]} replicas, and MAX_REPLICAS is {most}", "make them agree")
    zone = environment.get("TZ") or "UTC"
    try:
        info = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise Mistake(f"TZ={zone} is no time zone", "write it as Europe/Berlin") from None
    drain = environment.get("DRAIN_SECONDS") or "120"
    if not re.fullmatch(r"\d{1,6}", drain):
        raise Mistake(f"DRAIN_SECONDS={drain} will not do", "write a number of seconds")
    return Settings(least, most, entries, info, float(drain))
