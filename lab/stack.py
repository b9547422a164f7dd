"""The real stack that runs on this host, as its users see it."""

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.error import HTTPError

from lab.http import KEY, get, key_headers
from lab.waiting import until
from stack.shell import ask


class StackError(Exception):
    """The stack, or what runs it, is not there or not well; the message says what was asked and what came back."""


def run(*command: str, timeout_s: float = 120) -> str:
    """Runs a command in the repository and gives its standard output; StackError with the end of what it said if it
    fails, is not there or takes longer than `timeout_s`."""
    done = ask(*command, timeout=timeout_s)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-4000:]
        raise StackError(f"`{' '.join(command)}` failed with exit status {done.returncode}: {said}")
    return done.stdout


def published(service: str, port: int) -> str:
    """The URL at which this host reaches a service's port; StackError where the service does not run."""
    address = run("docker", "compose", "port", service, str(port)).strip()
    return "http://" + address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "127.0.0.1")


@dataclass(frozen=True)
class Stack:
    """A running stack."""

    url: str  # of the gateway
    prometheus_url: str
    model: str  # that every request may ask for

    @property
    def headers(self) -> dict[str, str]:
        """What every request has to bring: the key in $FLEET_KEY, where there is one."""
        return key_headers()

    @classmethod
    def find(cls) -> Self:
        """The stack that is up; StackError where none answers."""
        try:
            url, prometheus_url = published("gateway", 80), published("prometheus", 9090)
            model = json.loads(get(f"{url}/v1/models", headers=key_headers()))["data"][0]["id"]
        except HTTPError as why:
            if why.code == HTTPStatus.UNAUTHORIZED:
                fix = f"Put an admin's key into {KEY}: export {KEY}=$(make -s key ARGS='create tests --role admin')"
                raise StackError(f"the stack asks for a key, or does not know the one in {KEY}. {fix}") from why
            raise StackError(f"the gateway answered {why.code}. See `make status`.") from why
        except (StackError, OSError, ValueError, LookupError) as why:
            raise StackError(f"no stack answers here: {why}. Start it with `make up`.") from why
        return cls(url, prometheus_url, model)

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        """Standard output of `docker compose ARGUMENTS`; StackError where it fails."""
        return run("docker", "compose", *arguments, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What /status.json says."""
        # A host on which a replica loads may stand still for seconds.
        status: dict[str, Any] = json.loads(get(f"{self.url}/status.json", timeout=30, headers=self.headers))
        return status

    def replicas(self) -> dict[str, dict[str, Any]]:
        """Each replica in /status.json, by name."""
        return {replica["name"]: replica for replica in self.status()["replicas"]}

    def states(self) -> dict[str, str]:
        """Each replica's state, by name."""
        return {name: replica["state"] for name, replica in self.replicas().items()}

    def wait_ready(self, within_s: float = 240) -> None:
        """Returns when every replica answers one-token requests and is in the route; TimeoutError after `within_s`."""
        until(lambda: set(self.states().values()) == {"ready"}, "every replica ready", within_s)
