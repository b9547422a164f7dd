"""ASGI middleware: a replica on its host's own network answers that host and its containers, and nobody else.

It asks for no key, as the gateway has done so. Other replicas are in a network that only the gateway reaches; a node of
a Ray cluster is not.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import psutil

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Docker's bridges, which carry this host's containers.
BRIDGES = ("docker", "br-")
REFUSED = {"message": "This port is for the gateway on this host.", "type": "invalid_request_error", "code": "not_near"}


def own_networks(interfaces: Iterable[tuple[str, str, str]]) -> list[Network]:
    """Of interfaces, each a name, an address and a netmask: the addresses of this host, and Docker's networks."""
    found: list[Network] = []
    for name, address, mask in interfaces:
        bare = address.partition("%")[0]
        whole = name == "lo" or name.startswith(BRIDGES)
        found.append(ipaddress.ip_network(f"{bare}/{mask}" if whole and mask else bare, strict=False))
    return found


def seen_networks() -> list[Network]:
    """Those of this host now. Bridges come and go with Compose's projects."""
    families = {socket.AF_INET, socket.AF_INET6}
    return own_networks(
        (name, it.address, it.netmask or "" if it.family == socket.AF_INET else "")
        for name, addresses in psutil.net_if_addrs().items()
        for it in addresses
        if it.family in families
    )


class Near:
    """Wraps the application."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        client = scope.get("client")
        address = ipaddress.ip_address(client[0]) if client else None
        if address and any(address in network for network in seen_networks()):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"error": REFUSED}).encode()})
        else:
            await send({"type": "websocket.close", "code": 1008})
