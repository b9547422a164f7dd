"""Every attack of the table in docs/attacks.md, on the real Nginx over simulated replicas."""

from collections.abc import Iterator

import pytest

from lab.attacks.rows import ROWS, Row
from lab.attacks.target import Target, simulated
from stack.shell import ROOT


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with simulated() as attacked:
        yield attacked


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.attack}: {row.input}")
def test_an_attack_is_answered_as_expected(target: Target, row: Row) -> None:
    assert row.fire(target) == row.expected


def test_the_page_has_every_attack() -> None:
    page = (ROOT / "docs" / "attacks.md").read_text()
    assert len(ROWS) >= 50
    missing = [row for row in ROWS if f"| {row.attack} | {row.input.replace('|', chr(92) + '|')} |" not in page]
    assert not missing, "run `python -m lab.attacks`"
