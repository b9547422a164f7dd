"""The gateway's admin interface, which only this host can reach: through the gateway's own container."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from stack.compose import Compose
from stack.console import Problem


class Replica(BaseModel):
    """A replica as the gateway sees it now."""

    name: str
    state: str
    reason: str
    models: list[str]
    in_flight: int


class Gateway:
    """The running gateway of a stack. Every call raises a Problem where it does not answer."""

    def __init__(self, compose: Compose) -> None:
        self._compose = compose

    def _call(self, method: str, path: str) -> Any:
        curl = [
            "curl",
            "--silent",
            "--show-error",
            "--max-time",
            "5",
            "--request",
            method,
            f"http://127.0.0.1:8081{path}",
        ]
        return json.loads(self._compose.ask("exec", "-T", "gateway", *curl))

    def replicas(self) -> list[Replica]:
        """All replicas, in the order of the fleet's file."""
        answer = self._call("GET", "/replicas")
        try:
            return TypeAdapter(list[Replica]).validate_python(answer)
        except ValidationError:
            raise Problem(
                f"the gateway says {answer} where its replicas were asked for", "is it of this version? `make up`"
            ) from None

    def replica(self, name: str) -> Replica:
        """One replica by name."""
        return next(replica for replica in self.replicas() if replica.name == name)

    def drain(self, name: str) -> None:
        """Takes a replica out of the route; it finishes what it has."""
        self._call("PUT", f"/replicas/{name}/drain")

    def undrain(self, name: str) -> None:
        """Puts a replica back into the route."""
        self._call("DELETE", f"/replicas/{name}/drain")
