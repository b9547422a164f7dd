"""Python reads this when it starts, in the container of Open WebUI under test: it notes each host that is looked up or
called."""

import sys
from pathlib import Path
from typing import Any

# it looks up names where Python does not see it
sys.modules["uvloop"] = None  # type: ignore[assignment]


def note(event: str, args: tuple[Any, ...]) -> None:
    host = args[0] if event == "socket.getaddrinfo" else args[1] if event == "socket.connect" else None
    if host is not None:
        with Path("/tmp/asked").open("a") as file:  # noqa: S108
            file.write(f"{host[0] if isinstance(host, tuple) else host}\n")


sys.addaudithook(note)
