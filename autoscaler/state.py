"""What the autoscaler keeps in its folder, so that a restart of anything changes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autoscaler.decide import Memory

FOLDER = Path("/var/lib/autoscaler")
# lines of the audit log that are kept
KEPT = 5000


@dataclass
class Parked:
    """A replica that is taken out: when that began, when it was told to stop, and whether it has been seen stopped."""

    since: float
    told: float = 0.0
    stopped: bool = False


@dataclass
class Kept:
    """All that outlasts a restart. `on_the_way`: since when a replica loads, and whether the autoscaler started it."""

    memory: Memory = field(default_factory=Memory)
    parked: dict[str, Parked] = field(default_factory=dict)
    on_the_way: dict[str, tuple[float, bool]] = field(default_factory=dict)


class Store:
    """The files: `stopped.json` for the gateway, `state.json` for the autoscaler itself, `audit.jsonl` for people."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder

    def load(self) -> Kept:
        """What was kept; nothing where there is no file, or one that cannot be read: replicas are then as they are."""
        try:
            found = json.loads((self.folder / "state.json").read_text())
            known = {one.name for one in fields(Memory)}
            return Kept(
                Memory(**{name: value for name, value in found["memory"].items() if name in known}),
                {name: Parked(**one) for name, one in found["parked"].items()},
                {name: (since, ours) for name, (since, ours) in found["on_the_way"].items()},
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return Kept()

    def keep(self, kept: Kept) -> None:
        """Writes both files. The gateway takes its own one's age as a sign of life."""
        self._put("state.json", asdict(kept))
        self._put("stopped.json", sorted(kept.parked))

    def _put(self, name: str, data: Any) -> None:
        new = self.folder / f".{name}.new"
        new.write_text(json.dumps(data))
        new.chmod(0o644)
        new.rename(self.folder / name)

    def audit(self, action: str, name: str, why: str) -> str:
        """Adds a line to the audit log, and gives it."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": now, "who": "autoscaler", "action": action, "name": name, "why": why})
        path = self.folder / "audit.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= KEPT:
            path.write_text("".join(f"{old}\n" for old in lines[-KEPT // 2 :]))
        with path.open("a") as log:
            log.write(line + "\n")
        return line
