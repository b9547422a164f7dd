"""Days and months of quotas, by a clock that the test sets: 24 hours and more pass in seconds."""

import calendar
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.test_modules import Call, calling

# Without the tables of zones that an image may lack: summer begins on the last Sunday of March, at 1:00 UTC.
ZONE = "CET-1CEST,M3.5.0,M10.5.0/3"
BEGIN = datetime(2026, 3, 28, tzinfo=UTC)
DAYS = 5
DAY, MONTH, MINUTE = 1000, 3500, 2
NEED = 10
TRIES = 3
HOLDER: dict[str, Any] = {
    "name": "alice",
    "priority": 0,
    "limits": {"tokens_per_day": DAY, "tokens_per_month": MONTH, "requests_per_minute": MINUTE},
}


def day_after(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


def month_after(moment: datetime) -> datetime:
    days = calendar.monthrange(moment.year, moment.month)[1]
    return moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0) + timedelta(days=days)


def spelt(span: timedelta) -> str:
    """A span as OpenAI writes it."""
    millis = round(span / timedelta(milliseconds=1))
    if millis < 1000:
        return f"{millis}ms"
    minutes, seconds = divmod(-(-millis // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{seconds}s"


def millis(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


class Book:
    """What the quotas leave, kept apart from the gateway."""

    def __init__(self) -> None:
        self.day: dict[str, int] = {}
        self.month: dict[str, int] = {}

    def expect(self, moment: datetime, earlier: int) -> tuple[list[Any], bool]:
        """What a request is answered when its minute has had so many, and whether it is admitted."""
        day, month = f"{moment:%m-%d}", f"{moment:%m}"
        left = [DAY - self.day.get(day, 0), MONTH - self.month.get(month, 0)]
        ends = [day_after(moment), month_after(moment)]
        refused = next((n for n in (0, 1) if left[n] < NEED), None)
        admitted = refused is None and earlier < MINUTE
        if admitted:
            self.day[day] = self.day.get(day, 0) + NEED
            self.month[month] = self.month.get(month, 0) + NEED
            left = [one - NEED for one in left]
        tightest = 1 if left[1] < left[0] else 0
        told = [str(left[tightest]), spelt(ends[tightest] - moment)]
        if admitted:
            return ["", 0, *told], True
        if earlier >= MINUTE:
            return ["rate_limit_exceeded", 60 - moment.second, *told], False
        wait = -(-(ends[refused or 0] - moment) // timedelta(seconds=1))
        return ["insufficient_quota", wait, *told], False


def test_a_day_and_a_month_admit_their_quota_exactly_through_a_restart_and_summer_time() -> None:
    """Three requests each quarter of an hour, over five days, a change to summer time and a month's end."""
    book, summer = Book(), False
    with calling(TZ=ZONE) as (gateway, call):
        for number in range(DAYS * 24):
            hour = BEGIN + timedelta(hours=number)
            moments = [hour + timedelta(minutes=15 * n) for n in range(4)]
            if hour.hour == 23:
                moments.append(hour + timedelta(hours=1, milliseconds=-1))
            answers, wall = call("limits", "clocked", HOLDER, [millis(moment) for moment in moments], TRIES)
            summer = summer or wall[0] == (hour.hour + 2) % 24
            for at, moment in enumerate(moments):
                earlier = 0
                for answer in answers[at * TRIES : (at + 1) * TRIES]:
                    wanted, admitted = book.expect(moment, earlier)
                    assert [*answer[:2], str(answer[2]), answer[3]] == wanted, moment
                    earlier += admitted
            if number == 33:
                gateway.restart()
            if number == 80:
                gateway.reload()
    # The clock on the wall did change.
    assert summer
    assert book.day == {"03-28": DAY, "03-29": DAY, "03-30": DAY, "03-31": MONTH - 3 * DAY, "04-01": DAY}
    assert book.month == {"03": MONTH, "04": DAY}


@pytest.fixture(scope="module")
def call() -> Any:
    with calling(TZ=ZONE) as (_, ask):
        yield ask


@settings(max_examples=200)
@given(st.datetimes(datetime(2024, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
def test_a_window_ends_where_the_calendar_says(call: Call, moment: datetime) -> None:
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    for name, end in (("tokens_per_day", day_after(moment)), ("tokens_per_month", month_after(moment))):
        window = call("limits", "windowOf", name, millis(moment))
        assert window["ends"] == millis(end)
        assert call("limits", "windowOf", name, millis(end))["id"] == window["id"] + 1
