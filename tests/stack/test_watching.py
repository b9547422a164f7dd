"""Watching costs a replica little."""

from statistics import median

from lab.stack import Stack
from lab.watching import LOOK_INTERVAL_S, SCRAPE_INTERVAL_S, Look, container_process, cost, from_gateway

# Of a core: Prometheus' looks at one replica, and those with the gateway's; 0.01 on a quiet host, 0.02 on a busy one.
SCRAPES, ALL = 0.01, 0.04
LOOKS = 50


def test_a_scrape_takes_less_than_a_hundredth_of_a_core(stack: Stack) -> None:
    """And with the gateway's looks, each second, less than four; the middle of three, as others use this host."""
    replica = min(stack.replicas())
    process = container_process(stack, replica)

    def share(port: int, every_s: float) -> float:
        url = f"http://{replica}:{port}/metrics"
        takes = median(cost(lambda: from_gateway(stack, url, LOOKS), process, LOOKS, idle_s=2) for _ in range(3))
        return Look("", every_s, takes).share

    scrapes = share(9464, SCRAPE_INTERVAL_S)
    assert 0 < scrapes < SCRAPES
    assert scrapes + share(8000, LOOK_INTERVAL_S) < ALL
