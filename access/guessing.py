"""Slows whoever guesses passwords: each wrong one makes the next try wait longer, by account and by address.

What is counted fits into a fixed table: an account or address has the place that a keyed hash gives it. Nobody can
fill the table or push another out of it; a few share a place, and then wait a little more than they would have to. A
name that is nobody's is counted like any other, so the waiting does not tell who there is.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets as random
import time
from collections.abc import Callable

PLACES = 2**16
LONGEST_S = 60.0
# After so long without a wrong password the next is the first.
FORGOTTEN_S = 900.0


class Guessing:
    """Counts wrong passwords of one kind, accounts or addresses."""

    def __init__(self, free: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`free`: how many may be wrong before the next has to wait: 1 s, 2 s, 4 s, … up to LONGEST_S."""
        self._free = free
        self._clock = clock
        self._pepper = random.token_bytes(16)
        self._counts: dict[int, tuple[int, float]] = {}

    def wait(self, who: str) -> float:
        """Seconds until the next try is allowed; 0 now."""
        count, last = self._at(self._place(who))
        if count < self._free:
            return 0.0
        return max(0.0, last + min(LONGEST_S, 2.0 ** min(count - self._free, 16)) - self._clock())

    def begin(self, who: str) -> None:
        """Counts a try as wrong until `right` takes it back, so that many at once are no way round."""
        place = self._place(who)
        self._counts[place] = (self._at(place)[0] + 1, self._clock())

    def right(self, who: str, *, forgive: bool) -> None:
        """Takes a try back that was right; with `forgive` all the wrong ones before it too."""
        place = self._place(who)
        count, last = self._at(place)
        if forgive or count <= 1:
            self._counts.pop(place, None)
        else:
            self._counts[place] = (count - 1, last)

    def _at(self, place: int) -> tuple[int, float]:
        count, last = self._counts.get(place, (0, 0.0))
        return (count, last) if self._clock() - last < FORGOTTEN_S else (0, 0.0)

    def _place(self, who: str) -> int:
        digest = hashlib.blake2b(who.encode(errors="replace"), key=self._pepper, digest_size=4).digest()
        return int.from_bytes(digest) % PLACES


def network(address: str) -> str:
    """Whom an address stands for: itself, or with IPv6 the /64 that one customer has. 'unknown' where it is none."""
    try:
        parsed = ipaddress.ip_address(address.strip())
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)
