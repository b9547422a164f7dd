"""One model over two hosts by Ray: an answer, a host lost, and the model back when the host is."""

import json
from pathlib import Path

import pytest

from lab.ray.cluster import HEAD, Cluster
from lab.waiting import until

pytestmark = pytest.mark.timeout(900)
SERVES = "replica"
READY_S = 400


def test_a_model_over_two_hosts_answers_and_is_back_after_one_was_lost(ray_hosts: tuple[Cluster, Path]) -> None:
    hosts, _ = ray_hosts
    until(lambda: hosts.answer() == "200", "the model over both hosts answers", READY_S)
    said = hosts.log()
    assert "world_size=3" in said
    assert "ip=172.31.77.3" in said

    other = hosts.compose("exec", "-T", "ray-worker", "curl", "--silent", f"http://{HEAD}:8000/v1/models")
    assert json.loads(other.stdout)["error"]["code"] == "not_near"

    hosts.compose("kill", "ray-worker")
    until(lambda: hosts.answer() != "200", "the loss is seen", 60)
    until(lambda: "hosts have 1 GPUs" in hosts.log(), "the head waits for the other host", 120)
    hosts.compose("start", "ray-worker")
    until(lambda: hosts.answer() == "200", "the model answers again", READY_S)
