"""The audit log: who created, changed and revoked what, and when. One JSON line each, in secrets/audit.jsonl, which no
container sees. It holds no key, no password and no hash of one."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from access.store import Secrets, Strict


def who() -> str:
    """The user of this host who runs the command, and as whom under sudo: 'bob' or 'bob as root'."""

    def name(number: int) -> str:
        try:
            return pwd.getpwuid(number).pw_name
        except KeyError:
            return str(number)

    me = name(os.geteuid())
    behind = os.environ.get("SUDO_UID", "")
    return f"{name(int(behind))} as {me}" if os.geteuid() == 0 and behind.isdigit() else me


def line(action: str, name: str, details: dict[str, object]) -> str:
    """A line of the log: the time (UTC), the user of this host, what was done and to what."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": now, "who": who(), "action": action, "name": name, **details}, ensure_ascii=False)


def commit(secrets: Secrets, files: Mapping[Path, Strict], action: str, name: str, **details: object) -> None:
    """Replaces files of `secrets`, in their order, and says so in the audit log. Call it under `secrets.locked()`.

    The line comes before the first file changes: a change without its line cannot happen, a line without its change
    can, if the machine stops in between. A Mistake or an OSError where one cannot be written; nothing has changed then.
    """
    new = {path: secrets.written(path, data) for path, data in files.items()}
    secrets.append(secrets.audit, line(action, name, details))
    for path, written in new.items():
        secrets.replace(written, path)
