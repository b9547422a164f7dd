"""The table of prefix hits beside another commit's."""

from lab.bench.reports import hits_report


def test_what_is_lower_than_chance_explains_is_named() -> None:
    """A workload is lower if most seeds say so, not if they disagree."""
    before = {"chats": [0.90, 0.80, 0.85], "documents": [0.90, 0.80, 0.85]}
    now = {"chats": [0.88, 0.78, 0.84], "documents": [0.80, 0.90, 0.84]}
    rows = [line.split(" | ") for line in hits_report(now, before).splitlines()[2:]]
    assert [(row[0], row[3], row[4]) for row in rows] == [("| chats", "-1.7", "yes |"), ("| documents", "-0.3", "no |")]
