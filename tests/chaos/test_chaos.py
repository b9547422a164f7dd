"""The short fault table; `make chaos` runs all of it, and its table is docs/benchmarks/chaos.md."""

import asyncio

import pytest

from lab.chaos.rows import CASES, GatewayCase, play


@pytest.mark.usefixtures("gateway_image")
@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.run.__name__)
def test_no_request_fails_that_had_not_begun(case: GatewayCase) -> None:
    """Under a steady load of streams each fault leaves everything whole that it did not hit itself."""
    row = asyncio.run(play(case))
    if row.skipped:
        pytest.skip(row.skipped)
    assert not row.wrong
    assert row.sent > 50
