"""A timetable: how many replicas there are to be, or which models are to be awake, and when.

Entries with `;` between: `3=Mon-Fri 08:00-18:00; 2=Sat,Sun 10:00-24:00`. Days are names of three letters, with `-`
for a range and `,` between; times are local (of models UTC), from 00:00 to 24:00. An entry whose end is before its
beginning lasts until that time of the next day. nginx/njs/timetable.js reads the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
ENTRY = re.compile(r"([^=;]+?)\s*=\s*([A-Za-z,-]+)\s+(\d\d):(\d\d)-(\d\d):(\d\d)", re.ASCII)
DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class Entry:
    """What is wanted (a count or a name) on these days (0 is Monday), from one minute of the day to before another."""

    what: str
    days: frozenset[int]
    begin: int
    end: int

    def at(self, when: datetime) -> bool:
        """Whether it is in force at a local time."""
        minute, day = when.hour * 60 + when.minute, when.weekday()
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        return (day in self.days and minute >= self.begin) or ((day - 1) % 7 in self.days and minute < self.end)


def days_of(text: str) -> frozenset[int]:
    """`Mon-Fri` or `Sat,Sun` as numbers. Raises ValueError for what is no day."""
    found: set[int] = set()
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not set(ends) <= set(DAYS):
            raise ValueError(f"{part or text} is no day: write {', '.join(DAYS)}, a range such as Mon-Fri, or Sat,Sun")
        first, last = DAYS.index(ends[0]), DAYS.index(ends[-1])
        found |= {day % 7 for day in range(first, last + 1 + (7 if last < first else 0))}
    return frozenset(found)


def minutes(hour: str, minute: str) -> int:
    """A time as minutes of the day. Raises ValueError beyond 24:00."""
    found = int(hour) * 60 + int(minute)
    if int(minute) > 59 or found > DAY_MINUTES:
        raise ValueError(f"{hour}:{minute} is no time of a day")
    return found


def parse(text: str, like: str = "3") -> tuple[Entry, ...]:
    """The entries of a timetable, none for an empty text; `like` is an example of what may be wanted.

    Raises ValueError with what is wrong in words.
    """
    entries = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        if not (match := ENTRY.fullmatch(part)):
            raise ValueError(f"{part!r} is no entry: write it as {like}=Mon-Fri 08:00-18:00, with ; between entries")
        what, days, *times = match.groups()
        begin, end = minutes(*times[:2]), minutes(*times[2:])
        if begin in (end, DAY_MINUTES):
            raise ValueError(f"{part!r} ends when it begins: a whole day is 00:00-24:00")
        entries.append(Entry(what, days_of(days), begin, end))
    return tuple(entries)


def counts(text: str) -> tuple[Entry, ...]:
    """A timetable of counts of replicas. Raises ValueError for what is no whole number from 1 on."""
    entries = parse(text)
    if wrong := [entry.what for entry in entries if not re.fullmatch(r"[1-9]\d{0,2}", entry.what)]:
        raise ValueError(f"{wrong[0]} is no number of replicas from 1 to 999")
    return entries


def most(entries: tuple[Entry, ...], now: datetime, within: timedelta) -> int:
    """The largest count in force at some time from `now`, which is local, until `within` later; 0 where none is."""
    moments = [now + timedelta(minutes=step) for step in range(int(within.total_seconds() // 60) + 1)]
    moments.append(now + within)
    return max((int(entry.what) for entry in entries if any(entry.at(moment) for moment in moments)), default=0)
