"""The names of simulated replicas, as a container's DNS has them."""

from typing import Any

from dnslib import QTYPE, RCODE, RR, A, DNSRecord
from dnslib.server import DNSLogger, DNSServer


class Dns:
    """A DNS server on the loopback address `host`, reached at `address` (host:port).

    `names` holds IPv4 addresses by name and can change at any time; an answer counts for a second.
    """

    def __init__(self, host: str) -> None:
        self.names: dict[str, str] = {}
        self._server = DNSServer(self, address=host, port=0, logger=DNSLogger("error"))
        self.address = f"{host}:{self._server.server.server_address[1]}"
        self._server.start_thread()

    def resolve(self, request: DNSRecord, _handler: Any) -> DNSRecord:
        """The reply to one question: an address, no address of the kind asked for, or no such name."""
        reply = request.reply()
        address = self.names.get(str(request.q.qname).rstrip(".").lower())
        if not address:
            reply.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype == QTYPE.A:
            reply.add_answer(RR(request.q.qname, rdata=A(address), ttl=1))
        return reply

    def close(self) -> None:
        """Ends the server."""
        self._server.stop()
        self._server.server.server_close()
