"""The real autoscaler beside a simulated fleet, with a switch that only says which replicas run.

It keeps all replicas. Fleet, Prometheus and metrics are where the lab has them, in place of the services' names.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Self

import httpx
from prometheus_client import CollectorRegistry, start_http_server

from autoscaler import service, settings, sources
from autoscaler.state import Store
from lab.sim.replicas import Replicas

# The rules are quicker here too.
TURN_S = 1.0


class Network(httpx.HTTPTransport):
    """What the autoscaler reaches: the gateway and Prometheus on the lab's host, and the switch unless it is `away`."""

    def __init__(self, fleet: Replicas) -> None:
        super().__init__()
        self.away = False
        self._host = fleet.gateway_host
        self._replicas = [{"Labels": {sources.SERVICE: sim.name}, "State": "running"} for sim in fleet]

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """One request."""
        if request.url.host != "switch":
            request.url = request.url.copy_with(host=self._host)
            return super().handle_request(request)
        if self.away:
            raise httpx.ConnectError("the switch is away", request=request)
        return httpx.Response(200, json=self._replicas)


class Autoscaler:
    """It looks every TURN_S until the context ends."""

    def __init__(self, fleet: Replicas) -> None:
        self.network = Network(fleet)
        self._host = fleet.gateway_host
        self._least = len(fleet.all)
        self._over = threading.Event()

    def __enter__(self) -> Self:
        registry = CollectorRegistry()
        figures = service.Figures(registry)
        self._server, _ = start_http_server(service.PORT, self._host, registry)
        self._thread = threading.Thread(target=self._run, args=(figures,))
        self._thread.start()
        return self

    def _run(self, figures: service.Figures) -> None:
        wanted = settings.read({"MIN_REPLICAS": str(self._least)})
        with tempfile.TemporaryDirectory() as folder, httpx.Client(transport=self.network) as client:
            own = service.Autoscaler(wanted, client, Store(Path(folder)), figures, lambda _: None)
            while not self._over.wait(TURN_S):
                own.turn()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._server.shutdown()
        self._server.server_close()
