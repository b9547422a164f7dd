"""Watching costs a replica little."""

from statistics import median

from lab.stack import Stack
from lab.watching import LOOK_INTERVAL_S, SCRAPE_INTERVAL_S, Look, container_process, cost, from_gateway

# Of a core: Prometheus' looks at one replica, and those with the gateway's; 0.01 on a quiet host, 0.02 on a busy one.
SCRAPES, ALL = 0.01, 0.04
# What a look of the gateway takes, in looks of Prometheus: they take 0.9.
LOOK = 1.3
LOOKS = 50


def test_looks_take_little(stack: Stack) -> None:
    """Prometheus' take less than a hundredth of a core, all less than four, and one of the gateway's, each second, no
    more than one of Prometheus'. The middle of three, as others use this host."""
    replica = min(stack.replicas())
    process = container_process(stack, replica)

    def look_ms(port: int) -> float:
        url = f"http://{replica}:{port}/metrics"
        return cost(lambda: from_gateway(stack, url, LOOKS), process, LOOKS, idle_s=2)

    rounds = [(look_ms(9464), look_ms(8000)) for _ in range(3)]
    scrape, look = (median(taken) for taken in zip(*rounds, strict=True))
    scrapes = Look("", SCRAPE_INTERVAL_S, scrape).share
    assert 0 < scrapes < SCRAPES
    assert scrapes + Look("", LOOK_INTERVAL_S, look).share < ALL
    assert look < LOOK * scrape, rounds
