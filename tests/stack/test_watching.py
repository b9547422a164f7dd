"""Watching costs a replica little."""

import time
from collections.abc import Iterator
from statistics import median

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lab.stack import Stack
from lab.watching import LOOK_INTERVAL_S, RECORDED, SCRAPE_INTERVAL_S, Look, container_process, cost, from_gateway

# Of a core: Prometheus' looks at one replica.
SCRAPES = 0.01
# What all looks in a second may take, in writings: they take 0.9, on a busy host up to 1.1.
WRITINGS = 1.4
LOOKS = 50


class Recorded:
    """The metrics of a replica as they were recorded."""

    def __init__(self) -> None:
        self.metrics = list(text_string_to_metric_families(RECORDED.read_text()))

    def collect(self) -> Iterator[Metric]:
        yield from self.metrics


def test_looks_take_little(stack: Stack) -> None:
    """Prometheus' take less than a hundredth of a core; with the gateway's, each second, they take about as long as
    this host needs to write as many metrics. The middle of three, as others use this host."""
    replica = min(stack.replicas())
    process = container_process(stack, replica)
    recorded = CollectorRegistry()
    recorded.register(Recorded())

    def look_ms(port: int) -> float:
        url = f"http://{replica}:{port}/metrics"
        return cost(lambda: from_gateway(stack, url, LOOKS), process, LOOKS, idle_s=2)

    def writing_ms() -> float:
        began = time.process_time()
        for _ in range(LOOKS):
            generate_latest(recorded)
        return (time.process_time() - began) / LOOKS * 1000

    rounds = [(look_ms(9464), look_ms(8000), writing_ms()) for _ in range(3)]
    scrape, look, writing = (median(taken) for taken in zip(*rounds, strict=True))
    scrapes = Look("", SCRAPE_INTERVAL_S, scrape).share
    assert 0 < scrapes < SCRAPES
    assert scrapes + Look("", LOOK_INTERVAL_S, look).share < WRITINGS * Look("", 1, writing).share, rounds
