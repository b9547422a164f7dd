"""The timetable: what an entry means, and what is refused."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler import timetable
from autoscaler.timetable import DAYS, Entry

ZONE = ZoneInfo("Europe/Berlin")


def at(text: str) -> datetime:
    """A local time; 2026-11-30 is a Monday."""
    return datetime.fromisoformat(text).replace(tzinfo=ZONE)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("3=Mon-Fri 08:00-18:00", "2026-11-30T08:00", "2026-11-30T18:00"),
        ("3=Mon-Fri 08:00-18:00", "2026-12-04T17:59", "2026-12-05T09:00"),
        ("3=Sat,Sun 00:00-24:00", "2026-12-06T23:59", "2026-12-07T00:00"),
        ("3=Fri-Mon 10:00-11:00", "2026-12-06T10:30", "2026-12-01T10:30"),
        # over midnight it belongs to the day that it begins on
        ("3=Fri 22:00-02:00", "2026-12-05T01:59", "2026-12-04T01:00"),
        ("3=Sun 22:00-02:00", "2026-11-30T01:00", "2026-11-30T22:30"),
        (" 3 = Mon,Wed-Thu 08:00-09:00 ", "2026-12-02T08:00", "2026-12-01T08:00"),
    ],
)
def test_an_entry_is_in_force_when_it_says(text: str, inside: str, outside: str) -> None:
    (entry,) = timetable.parse(text)
    assert entry.at(at(inside))
    assert not entry.at(at(outside))


def test_the_largest_of_several_counts_and_a_while_before_it_begins() -> None:
    entries = timetable.counts("2=Mon-Sun 00:00-24:00; 4=Mon 08:00-18:00;")
    assert timetable.most(entries, at("2026-11-30T07:40"), timedelta(minutes=10)) == 2
    assert timetable.most(entries, at("2026-11-30T07:40"), timedelta(minutes=20)) == 4
    assert timetable.most(entries, at("2026-11-30T17:59"), timedelta()) == 4
    assert timetable.most(entries, at("2026-11-30T18:00"), timedelta()) == 2
    assert timetable.most((), at("2026-11-30T18:00"), timedelta()) == 0


def test_summer_time_moves_nothing() -> None:
    """08:00 is 08:00 on the clock on the wall, before and after it is put forward."""
    (entry,) = timetable.parse("1=Mon-Sun 08:00-09:00")
    for day in ("2026-03-28", "2026-03-29", "2026-03-30"):
        assert entry.at(at(f"{day}T08:30"))
        assert not entry.at(at(f"{day}T09:30"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3", "'3' is no entry: write it as 3=Mon-Fri 08:00-18:00"),
        ("3=08:00-18:00", "is no entry"),
        ("3=Mon-Fri 8-18", "is no entry"),
        ("3=Mon-Fri 08:00-18:00 2=Sat 08:00-18:00", "is no entry"),
        ("3=Mo-Fr 08:00-18:00", "Mo-Fr is no day"),
        ("3=Mon--Fri 08:00-18:00", "is no day"),
        ("3=Mon, 08:00-18:00", "is no day"),
        ("3=mon 08:00-18:00", "mon is no day"),
        ("3=Mon 08:00-24:01", "24:01 is no time"),
        ("3=Mon 08:60-10:00", "08:60 is no time"),
        ("3=Mon 08:00-08:00", "ends when it begins"),
        ("3=Mon 24:00-08:00", "ends when it begins"),
        ("many=Mon 08:00-09:00", "many is no number of replicas"),
        ("0=Mon 08:00-09:00", "0 is no number of replicas"),
        ("1000=Mon 08:00-09:00", "1000 is no number of replicas"),
    ],
)
def test_what_is_no_timetable_is_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        timetable.counts(text)


entries = st.builds(
    Entry,
    st.integers(1, 999).map(str),
    st.sets(st.integers(0, 6), min_size=1).map(frozenset),
    st.integers(0, 1439),
    st.integers(0, 1440),
).filter(lambda entry: entry.begin != entry.end)


def written(entry: Entry) -> str:
    """An entry as people write it."""
    days = ",".join(DAYS[day] for day in sorted(entry.days))
    begin, end = (f"{minute // 60:02}:{minute % 60:02}" for minute in (entry.begin, entry.end))
    return f"{entry.what}={days} {begin}-{end}"


@given(st.lists(entries, max_size=4))
def test_what_is_written_is_read_again(wanted: list[Entry]) -> None:
    assert timetable.counts("; ".join(map(written, wanted))) == tuple(wanted)


@given(st.text(max_size=40) | st.text("0123456789=MonFriSat,-:; ", max_size=40))
def test_no_text_does_worse_than_be_refused(text: str) -> None:
    try:
        found = timetable.counts(text)
    except ValueError:
        return
    assert all(entry.days and 0 <= entry.begin < 1440 and 0 <= entry.end <= 1440 for entry in found)


@given(entries, st.integers(0, 8760))
def test_an_entry_is_in_force_as_long_as_it_says(entry: Entry, hour: int) -> None:
    """Over a week, minute by minute at one per quarter of an hour: as often as days times length."""
    start = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour)
    length = (entry.end - entry.begin) % 1440 or 1440
    inside = sum(entry.at(start + timedelta(minutes=minute)) for minute in range(7 * 1440))
    assert inside == len(entry.days) * length
