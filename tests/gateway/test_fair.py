"""Fair shares: who floods comes after the others in the engines' queues, and leaves them a replica."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from lab.bench import fair
from lab.bench.fair import FLOOD, QUIET
from lab.sim.gateway import Gateway
from lab.sim.keys import keyed
from lab.sim.replicas import Replicas
from tests.gateway.conftest import chat
from tests.gateway.test_access import CHAT, bearer

LAST = "vllm-2"


def test_a_flood_leaves_another_key_its_time_to_the_first_token() -> None:
    """Two replicas, as shipped, and more requests than both can run: p90 stays within 1.3 times what it is alone."""
    (found,) = fair.simulated(2, [random.randrange(10**6)], 5.0)
    for tokens, alone in found.alone.items():
        beside = found.beside[tokens]
        assert alone.lost == beside.lost == 0
        assert beside.requests >= 8
        assert beside.p90 <= 1.3 * alone.p90, (tokens, alone, beside)
    # It is a flood: its own requests wait.
    assert found.flood.p50 > 5 * found.alone[500].p90


class Fleet:
    """A gateway over three replicas with two models, and streams that stay open."""

    def __init__(self, replicas: Replicas, gateway: Gateway, keys: dict[str, str], stack: ExitStack) -> None:
        self.replicas, self.gateway, self.keys = replicas, gateway, keys
        self.client = stack.enter_context(httpx.Client(base_url=gateway.url, timeout=30))
        self.stack = stack

    def open(self, key: str, count: int, model: str = "sim") -> Counter[str]:
        """So many streams more; the replicas that they went to."""
        went: Counter[str] = Counter()
        for _ in range(count):
            body = chat(f"{key} {random.random()}", model=model, stream=True, max_tokens=3000)
            stream = self.client.stream("POST", CHAT, json=body, headers=bearer(self.keys[key]))
            answer = self.stack.enter_context(stream)
            assert answer.status_code == 200
            went[answer.headers["x-replica"]] += 1
        return went


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    keys, files = keyed({QUIET: {}, FLOOD: {}, "second": {}, "lab": {"role": "admin"}})
    with ExitStack() as stack:
        replicas = stack.enter_context(Replicas(3, "--adapters", "1", "--max-running", "256"))
        gateway = stack.enter_context(Gateway(replicas, files=files, key=keys["lab"]))
        gateway.wait_ready()
        yield Fleet(replicas, gateway, keys, stack)


def test_alone_a_key_has_the_whole_fleet(fleet: Fleet) -> None:
    assert fleet.open(FLOOD, 36).keys() == {"vllm-0", "vllm-1", LAST}


def test_whoever_floods_leaves_the_last_replica_to_the_others(fleet: Fleet) -> None:
    fleet.open(QUIET, 1)
    few = fleet.open(FLOOD, 12)
    assert few[LAST] >= 3
    more = fleet.open(FLOOD, 24)
    assert more[LAST] == 0
    assert min(more["vllm-0"], more["vllm-1"]) >= 8
    # Another flood does the same, and who does not goes where there is none.
    assert fleet.open("second", 12)[LAST] > 0
    assert fleet.open("second", 12)[LAST] == 0
    assert fleet.open(QUIET, 3) == {LAST: 3}


def test_another_models_key_is_no_other(fleet: Fleet) -> None:
    fleet.open(QUIET, 1, "sim-adapter-0")
    assert fleet.open(FLOOD, 36)[LAST] >= 8


def test_a_canary_keeps_its_share_of_a_flood(fleet: Fleet) -> None:
    fleet.gateway.admin("PUT", "/canary", {"replicas": [LAST], "share": 1})
    fleet.open(QUIET, 1)
    assert fleet.open(FLOOD, 20) == {LAST: 20}


def test_a_flood_spills_over_before_it_is_refused(fleet: Fleet) -> None:
    """What the other replicas refuse goes to the last one all the same."""
    fleet.open(QUIET, 1)
    fleet.open(FLOOD, 13)
    for name in ("vllm-0", "vllm-1"):
        fleet.replicas[name].fault("status", status=503)
    assert fleet.open(FLOOD, 2) == {LAST: 2}
