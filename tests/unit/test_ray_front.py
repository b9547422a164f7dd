"""`make ray-front`: what it writes, takes away, and refuses."""

from pathlib import Path

import pytest

import ray_front
from access.keys import gateways_key
from stack.console import Problem


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("nginx/fleet", "secrets/gateway", "secrets/ray"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "secrets/ray/token").write_text("s" * 64 + "\n")
    return tmp_path


def test_each_host_is_a_replica_and_the_key_lies_where_only_the_gateway_reads(root: Path) -> None:
    ray_front.lay_out(["10.0.0.1", "fd00::2"], root)
    fleet, key = ((root / name).read_text() for name in ("nginx/fleet/ray.conf", "secrets/gateway/ray.conf"))
    assert "upstream vllm-ray-1 { zone vllm-ray-1 64k; server 127.0.0.1:8101; keepalive 64; }" in fleet
    assert "proxy_pass http://10.0.0.1:8000;" in fleet
    assert "listen 127.0.0.1:8102;" in fleet
    assert "proxy_pass http://[fd00::2]:8000;" in fleet
    secret = gateways_key("s" * 64)
    assert key == f'proxy_set_header Authorization "Bearer {secret}";\n'
    assert secret not in fleet
    assert "s" * 64 not in key


def test_without_a_host_both_files_are_gone(root: Path) -> None:
    ray_front.lay_out(["10.0.0.1"], root)
    (root / "secrets/ray/token").unlink()
    ray_front.lay_out([], root)
    assert not list(root.rglob("ray.conf"))


def test_without_the_clusters_secret_nothing_is_written(root: Path) -> None:
    (root / "secrets/ray/token").unlink()
    with pytest.raises(Problem, match="secrets/ray/token cannot be read"):
        ray_front.lay_out(["10.0.0.1"], root)
    assert not list(root.rglob("ray.conf"))


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        (["gpu-b"], "'gpu-b' is no address"),
        (["10.0.0.1; evil"], "is no address"),
        (["127.0.0.1"], "127.0.0.1 is another host on each host"),
        (["::"], ":: is another host"),
        (["fd00::1", "fd00:0::1"], "fd00:0::1 is named twice"),
    ],
)
def test_what_is_no_host_of_a_cluster_is_refused(hosts: list[str], said: str) -> None:
    with pytest.raises(Problem, match="HOST_ADDRESS") as refused:
        ray_front.checked(hosts)
    assert said in refused.value.what
