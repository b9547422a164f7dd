"""Several gateways in front of the same replicas: what they cost in prefix hits, by the gateway's own policy."""

import pytest

from lab.hosts import gateways
from lab.hosts.gateways import POINTS, WORKLOADS


def hits(workload: str, count: int, replicas: int = 16, *, alone: bool = False) -> float:
    """The share of prefix hits with so many gateways, in a short run."""
    return gateways.run(workload, count, replicas, alone=alone, requests=150)["hits"]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_two_gateways_find_what_one_would(workload: str) -> None:
    """Two gateways that do not talk have, within three points, the prefix hits of one."""
    assert hits(workload, 2) > hits(workload, 1) - POINTS


def test_four_gateways_do_over_64_replicas_too() -> None:
    assert hits("chats", 4, 64) > hits("chats", 1, 64) - POINTS


def test_one_gateway_keeps_each_document_in_one_replica() -> None:
    """A document that one replica knows is worth more there than the time that another one takes to compute it: all
    documents fill three quarters of the caches, so twice they have no room."""
    assert hits("documents", 1) > 0.9


def test_gateways_that_are_not_told_of_each_other_cost_more() -> None:
    """What the setting is there for: without it half of the turns miss."""
    assert hits("chats", 2, alone=True) < hits("chats", 1) - 5 * POINTS
