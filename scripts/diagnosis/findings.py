"""What `make doctor` says. Its JSON is a Diagnosis; within a version a field keeps its name and its meaning."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from enum import IntEnum
from typing import Literal, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, computed_field, field_validator

from access.store import Mistake
from stack.console import Problem

P = ParamSpec("P")
T = TypeVar("T")

# wrong: users are served badly or not at all, or will be soon. note: worth knowing, and nobody is harmed.
Level = Literal["wrong", "note"]
# A look that found nothing is well. One that could not be made says why in `result`.
State = Literal["well", "note", "wrong", "not looked"]
# What one look may find: of more, the rest is counted.
MOST = 40


class Exit(IntEnum):
    """The command's exit status. What is wrong counts before what could not be looked at; notes do not count."""

    WELL = 0
    WRONG = 1
    NOT_LOOKED = 2


class Finding(BaseModel):
    """One thing that was found. `subject` is what it is about: a replica, a setting, an alert. `since` is UTC, None
    where nobody knows."""

    model_config = ConfigDict(extra="forbid")

    level: Level
    subject: str
    what: str
    fix: str
    since: datetime | None = None

    @field_validator("since")
    @classmethod
    def _to_the_second(cls, since: datetime | None) -> datetime | None:
        return since and since.astimezone(UTC).replace(microsecond=0)


class Look(BaseModel):
    """One look: what it was at (`name` for programs, `title` for people) and what came of it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    state: State
    result: str = ""
    seconds: float = 0
    findings: list[Finding] = []


class Diagnosis(BaseModel):
    """All looks, in their order."""

    model_config = ConfigDict(extra="ignore")

    version: Literal[1] = 1
    at: datetime
    looks: list[Look]

    @property
    def exit(self) -> Exit:
        """The command's exit status."""
        states = {look.state for look in self.looks}
        return Exit.WRONG if "wrong" in states else Exit.NOT_LOOKED if "not looked" in states else Exit.WELL

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Literal["well", "wrong", "not looked"]:
        """The same in a word."""
        return {Exit.WELL: "well", Exit.WRONG: "wrong", Exit.NOT_LOOKED: "not looked"}[self.exit]  # type: ignore[return-value]


class Found:
    """Gathers what a look finds."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def wrong(self, subject: str, what: str, fix: str, since: datetime | None = None) -> None:
        """Notes something that is wrong."""
        self.all.append(Finding(level="wrong", subject=subject, what=what, fix=fix, since=since))

    def note(self, subject: str, what: str, fix: str, since: datetime | None = None) -> None:
        """Notes something that is worth knowing."""
        self.all.append(Finding(level="note", subject=subject, what=what, fix=fix, since=since))

    def check(self, subject: str, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What a check of `make up` gives; its Problem is noted as wrong, and gives None."""
        try:
            return check(*args, **kwargs)
        except (Problem, Mistake) as problem:
            self.wrong(subject, problem.what, problem.fix)
            return None

    def state(self) -> State:
        """The worst of it."""
        levels = {finding.level for finding in self.all}
        return "wrong" if "wrong" in levels else "note" if levels else "well"

    def bounded(self) -> list[Finding]:
        """What was found, what is wrong first; beyond MOST the rest is counted."""
        ordered = sorted(self.all, key=lambda finding: finding.level != "wrong")
        kept, rest = ordered[:MOST], ordered[MOST:]
        if rest:
            fix = "mend those above, and look again"
            kept.append(Finding(level=rest[0].level, subject="more", what=f"{len(rest)} further findings", fix=fix))
        return kept


def now() -> datetime:
    """This moment, as findings have it."""
    return datetime.now(UTC).replace(microsecond=0)
