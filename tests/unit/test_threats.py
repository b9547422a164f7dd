"""Each line of the threat model names what shows it, and that is there."""

import re

from stack.shell import ROOT

PAGE = (ROOT / "docs" / "threats.md").read_text()


def test_each_threat_has_a_test_that_is_there() -> None:
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| attack")]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[3])
        assert named, row
        assert [name for name in named if name not in defined] == [], row
