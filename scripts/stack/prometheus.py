"""The stack's Prometheus, asked through its HTTP API."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx

from stack.console import Problem


class Prometheus:
    """A Prometheus at `url`. It answers within `timeout_s`, or its silence is a Problem."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None, timeout_s: float = 60) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, transport=transport)

    def ask(self, what: str, **asked: str | float) -> Any:
        """The data of an answer of /api/v1/`what`, to a form with these fields or, without any, to a GET."""
        form = {name: str(value) for name, value in asked.items()}
        try:
            path = f"/api/v1/{what}"
            answer = self._client.post(path, data=form) if form else self._client.get(path)
            said: Any = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            fix = "`make status` shows whether it runs; PROMETHEUS_PORT in .env is its port"
            raise Problem(f"Prometheus does not answer: {error or type(error).__name__}", fix) from None
        if not isinstance(said, dict) or "status" not in said:
            raise Problem(f"{self.url} is not Prometheus", "PROMETHEUS_PORT in .env is its port")
        if said["status"] != "success":
            raise Problem(f"Prometheus: {said.get('error', 'no reason given')}", "ask for less at once")
        return said["data"]

    def vector(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series that an instant query gives now."""
        found = self.ask("query", query=query)["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def last_time(self, condition: str, within: str = "1d", step: str = "15s") -> datetime | None:
        """When a condition, such as `up{job="gateway"} == 1`, was last true; None where not within that time."""
        found = self.vector(f"max(max_over_time(timestamp({condition})[{within}:{step}]))")
        return datetime.fromtimestamp(int(found[0][1]), UTC) if found else None
