"""How the operator commands speak: steps with their progress and time, and mistakes in two lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.status import Status

console = Console(highlight=False)
_mistakes = Console(highlight=False, stderr=True)


class Problem(Exception):
    """Something that the operator can mend: `what` is wrong, and `fix` says what to do about it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}: {fix}")
        self.what = what
        self.fix = fix


class Step:
    """One step while it runs: what it is doing right now, and its result for the line that stays."""

    def __init__(self, title: str, status: Status) -> None:
        self._title = title
        self._status = status
        self._began = time.monotonic()
        self.result = ""

    def say(self, detail: str) -> None:
        """Shows what the step is doing right now, cut to what is left of the line."""
        begin = f"{self._title}  {self.seconds:.0f} s  "
        room = max(0, console.width - len(begin) - 4)
        self._status.update(f"{escape(begin)}[dim]{escape(detail.strip()[:room])}[/]")

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._began


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Shows `title` and what it is doing while the body runs, then a line with its result and its seconds."""
    with console.status(escape(title)) as status:
        shown = Step(title, status)
        try:
            yield shown
        except BaseException:
            console.print(f"[red]✗[/] {escape(title)}")
            raise
    took = f" [dim]({shown.seconds:.0f} s)[/]" if shown.seconds >= 1 else ""
    console.print(f"[green]✓[/] {escape(title)}  [dim]{escape(shown.result)}[/]{took}", soft_wrap=True)


def refused(error: OSError) -> Problem:
    """What the system's refusal of a file means."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, PermissionError):
        return Problem(what, "see whose it is; after a run as root: `sudo chown -R $USER .cache .venv models secrets`")
    return Problem(what, "correct that, and run the command again")


@contextmanager
def one_line_for_mistakes() -> Iterator[None]:
    """Turns a Problem, or a file that is refused, into what is wrong and what to do, with exit status 1, and Ctrl-C
    into exit status 130. All go to stderr: what the command printed may be read by a program."""
    try:
        yield
    except (Problem, OSError) as mistake:
        problem = mistake if isinstance(mistake, Problem) else refused(mistake)
        _mistakes.print(f"[bold red]{escape(problem.what)}[/]", soft_wrap=True)
        _mistakes.print(f"[bold]What to do:[/] {escape(problem.fix)}", soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _mistakes.print("Stopped. The same command goes on from here.")
        raise SystemExit(130) from None
