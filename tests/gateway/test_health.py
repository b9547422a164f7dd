"""A replica's state: what it is, how soon it is seen, and that it comes back by itself."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas, Sim
from lab.waiting import until
from stack.shell import ROOT
from tests.gateway.conftest import chat, resized
from tests.gateway.test_routing import ask, counted


def reason(gateway: Gateway, name: str) -> str:
    return next(str(replica["reason"]) for replica in gateway.status()["replicas"] if replica["name"] == name)


@pytest.fixture
def asking(gateway: Gateway) -> Iterator[list[int]]:
    """Clients that ask all the while, each time something new; the list takes the status of each answer."""
    statuses: list[int] = []
    over = threading.Event()

    def run(client_number: int) -> None:
        n = 0
        with httpx.Client(base_url=gateway.url, timeout=60) as client:
            while not over.is_set():
                n += 1
                statuses.append(client.post("/v1/chat/completions", json=chat(f"{client_number} {n}")).status_code)

    clients = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for client in clients:
        client.start()
    yield statuses
    over.set()
    for client in clients:
        client.join()


def test_a_replica_is_ready_once_it_gave_a_token_and_loading_before() -> None:
    with Replicas(2) as replicas:
        replicas["vllm-1"].kill(forget=False)
        with Gateway(replicas) as gateway:
            gateway.wait_states({"vllm-0": "ready", "vllm-1": "loading"})
            times = {replica["name"]: replica["ttft_ms"] for replica in gateway.status()["replicas"]}
            assert times["vllm-1"] is None  # no first token yet, which is not one after 0 ms
            replicas["vllm-1"].args += ["--fault", "hang"]
            replicas["vllm-1"].start()
            gateway.wait_states({"vllm-1": "wedged"})
            replicas["vllm-1"].fault()
            gateway.wait_states({"vllm-1": "ready"}, 5)
            assert counted(gateway, 'gateway_probes_total{replica="vllm-0",result="token"}') >= 1
            assert counted(gateway, 'gateway_probes_total{replica="vllm-1",result="no_token"}') >= 1


def test_a_failing_health_check_is_loading(gateway: Gateway, fleet: Replicas) -> None:
    fleet["vllm-0"].fault(health=503)
    gateway.wait_states({"vllm-0": "loading"}, 5)
    assert "503" in reason(gateway, "vllm-0")
    fleet["vllm-0"].fault()
    gateway.wait_states({"vllm-0": "ready"}, 5)


@pytest.mark.parametrize("forget", [True, False], ids=["name gone", "name kept"])
def test_a_killed_replica_is_unreachable_within_two_seconds_and_comes_back(
    gateway: Gateway, fleet: Replicas, forget: bool
) -> None:
    fleet["vllm-0"].kill(forget=forget)
    assert gateway.wait_states({"vllm-0": "unreachable"}, 10) < 4
    fleet["vllm-0"].start()
    assert gateway.wait_states({"vllm-0": "ready"}, 10) < 6


@pytest.mark.timeout(120)
def test_a_wedged_replica_leaves_the_route_within_ten_seconds_and_comes_back(
    gateway: Gateway, fleet: Replicas, asking: list[int]
) -> None:
    fleet["vllm-0"].fault("hang")
    assert gateway.wait_states({"vllm-0": "wedged"}, 30) < 10
    assert "no token" in reason(gateway, "vllm-0")
    served = fleet["vllm-0"].state()["generations"]
    with httpx.Client(base_url=gateway.url) as client:
        assert "vllm-0" not in {ask(client, f"while wedged {n}") for n in range(9)}
    assert fleet["vllm-0"].state()["generations"] <= served + 5  # one-token requests only
    fleet["vllm-0"].fault()
    gateway.wait_states({"vllm-0": "ready"}, 10)
    assert set(asking) == {200}


@pytest.mark.parametrize("status", [500, 502])
def test_a_replica_that_answers_5xx_leaves_the_route_within_three_seconds_and_comes_back(
    gateway: Gateway, fleet: Replicas, asking: list[int], status: int
) -> None:
    until(lambda: len(asking) > 10, "clients are served")
    fleet["vllm-0"].fault("status", status=status)
    assert gateway.wait_states({"vllm-0": "wedged"}, 10) < 3
    assert str(status) in reason(gateway, "vllm-0")
    fleet["vllm-0"].fault()
    gateway.wait_states({"vllm-0": "ready"}, 5)


def test_a_client_whose_requests_are_wrong_makes_no_replica_suspect(gateway: Gateway, fleet: Replicas) -> None:
    names = list(gateway.states())
    series = [f'gateway_probes_total{{replica="{name}",result="token"}}' for name in names]
    probes = [counted(gateway, one) for one in series]
    for sim in fleet:
        sim.fault("status", status=422)
    with httpx.Client(base_url=gateway.url) as client:
        for n in range(30):
            assert client.post("/v1/chat/completions", json=chat(f"wrong {n}")).status_code == 422
    looks = counted(gateway, 'gateway_probes_total{replica="vllm-0",result="alive"}')
    alive = 'gateway_probes_total{replica="vllm-0",result="alive"}'
    until(lambda: counted(gateway, alive) >= looks + 3, "a one-token request would have been sent by now")
    assert [counted(gateway, one) for one in series] == probes
    assert set(gateway.states().values()) == {"ready"}


@pytest.mark.parametrize("body", ["<html>", '{"data": [null, {"name": "sim"}]}'])
def test_an_odd_list_of_models_is_told_once_and_is_none(body: str) -> None:
    with Replicas(2) as replicas:
        replicas["vllm-1"].fault(models=body)
        with Gateway(replicas) as gateway:
            gateway.wait_states({"vllm-0": "ready", "vllm-1": "loading"})
            until(lambda: "/v1/models" in reason(gateway, "vllm-1"), "the status says why")
            alive = 'gateway_probes_total{replica="vllm-1",result="alive"}'
            looks = counted(gateway, alive)
            until(lambda: counted(gateway, alive) >= looks + 7, "it was asked for its models again")
            assert gateway.log().count("vllm-1: its /v1/models") == 1
            assert "[error]" not in gateway.log()
            answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("hi", model="nowhere"))
            assert answer.status_code == 404  # known to have none, which is not unknown
            replicas["vllm-1"].fault()
            gateway.wait_ready()


def test_a_model_is_not_called_missing_while_some_replica_has_not_told_its_models(
    gateway: Gateway,
) -> None:
    missing = chat("hi", model="nowhere")
    assert httpx.post(gateway.url + "/v1/chat/completions", json=missing).status_code == 404
    assert httpx.get(gateway.url + "/v1/models/nowhere").status_code == 404
    with Replicas(2) as replicas:
        replicas["vllm-1"].kill(forget=False)
        with Gateway(replicas) as half:
            half.wait_states({"vllm-0": "ready"})
            for answer in (
                httpx.post(half.url + "/v1/chat/completions", json=missing),
                httpx.get(half.url + "/v1/models/nowhere"),
            ):
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) > 0
            assert httpx.post(half.url + "/v1/chat/completions", json=chat("hi")).status_code == 200
            replicas["vllm-1"].start()
            half.wait_ready()
            assert httpx.post(half.url + "/v1/chat/completions", json=missing).status_code == 404
            replicas["vllm-1"].kill()  # what it serves is known all the same
            half.wait_states({"vllm-1": "unreachable"})
            assert httpx.post(half.url + "/v1/chat/completions", json=missing).status_code == 404


@pytest.mark.parametrize("share", [None, True, "0.5", -0.1, 1.1, [0.5]])
def test_a_canary_whose_share_is_no_number_is_refused_by_that_name(gateway: Gateway, share: object) -> None:
    answer = httpx.put(gateway.admin_url + "/canary", json={"replicas": ["vllm-0"], "share": share})
    assert answer.status_code == 400
    assert "share" in answer.json()["error"]["message"]
    assert gateway.admin("GET", "/canary") == {"replicas": [], "share": 0}


def test_a_stopped_process_leaves_the_route_within_ten_seconds_and_comes_back(
    gateway: Gateway, fleet: Replicas
) -> None:
    fleet["vllm-1"].pause()
    assert gateway.wait_states({"vllm-1": "unreachable"}, 30) < 10
    fleet["vllm-1"].resume()
    gateway.wait_states({"vllm-1": "ready"}, 10)


def test_a_slow_replica_is_not_wedged(gateway: Gateway, fleet: Replicas, asking: list[int]) -> None:
    for sim in fleet:
        sim.fault(slow=60.0)  # a step takes 0.6 s
    end = time.monotonic() + 12
    while time.monotonic() < end:
        assert set(gateway.states().values()) == {"ready"}
        time.sleep(0.2)  # the state is sampled all the time
    for sim in fleet:
        sim.fault()


def test_what_a_replica_has_to_do_is_shown(gateway: Gateway, fleet: Replicas) -> None:
    body = chat("work", stream=True, max_tokens=5000)
    with httpx.stream("POST", gateway.url + "/v1/chat/completions", json=body, timeout=30) as answer:
        name = answer.headers["x-replica"]

        def working() -> bool:
            now = next(replica for replica in gateway.status()["replicas"] if replica["name"] == name)
            return bool(
                now["in_flight"] == 1
                and now["running"] == 1
                and now["kv_usage"] > 0
                and now["tokens_per_s"] > 10
                and now["ttft_ms"] > 0
            )

        until(working, "the replica's load is shown", 5)
        assert counted(gateway, f'gateway_requests_in_flight{{replica="{name}"}}') == 1
    until(lambda: counted(gateway, "gateway_requests_in_flight") == 0, "nothing in flight", 5)


def test_a_drained_replica_gets_nothing_new_and_finishes_what_it_has(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        body = chat("before the drain", stream=True, max_tokens=300)
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            name = answer.headers["x-replica"]
            assert gateway.admin("PUT", f"/replicas/{name}/drain") == {
                "name": name,
                "state": "draining",
                "in_flight": 1,
            }
            assert name not in {ask(client, f"during the drain {n}") for n in range(9)}
            assert "[DONE]" in answer.read().decode()
        assert gateway.states()[name] == "draining"
        gateway.reload()
        assert gateway.states()[name] == "draining"
        assert gateway.admin("DELETE", f"/replicas/{name}/drain")["state"] == "ready"
        assert name in {ask(client, f"after the drain {n}") for n in range(9)}


def test_draining_what_is_not_there_says_so(gateway: Gateway) -> None:
    answer = httpx.put(gateway.admin_url + "/replicas/vllm-99/drain")
    assert answer.status_code == 404
    assert "vllm-99" in answer.json()["error"]["message"]


def test_replicas_are_added_and_removed_by_a_reload() -> None:
    with Replicas(3) as replicas, Gateway(replicas, upstreams=replicas.upstreams(["vllm-0"])) as gateway:
        gateway.wait_states({"vllm-0": "ready"})
        assert list(gateway.states()) == ["vllm-0"]
        gateway.write_fleet(replicas.upstreams(["vllm-0", "vllm-1", "vllm-2"]))
        gateway.reload()
        gateway.wait_states({"vllm-0": "ready", "vllm-1": "ready", "vllm-2": "ready"}, 5)
        targets = httpx.get(gateway.metrics_url + "/fleet").json()
        assert targets[2] == {"targets": ["vllm-2:9464"], "labels": {"replica": "vllm-2"}}
        gateway.write_fleet(replicas.upstreams(["vllm-1"]))
        gateway.reload()
        until(lambda: list(gateway.states()) == ["vllm-1"], "only vllm-1 is left", 5)
        with httpx.Client(base_url=gateway.url) as client:
            assert {ask(client, f"{n}") for n in range(4)} == {"vllm-1"}


@contextlib.contextmanager
def crowd(count: int, adapters: int, **zones: str) -> Iterator[tuple[Gateway, Sim]]:
    """A gateway with `count` replicas of `adapters` adapters each, and with zones of these sizes; and the last replica.

    All others are one process under many names.
    """
    with Replicas(2, "--instant", "--adapters", str(adapters)) as replicas:
        first, last = replicas.upstreams().splitlines(keepends=True)
        names = (
            re.sub(r"upstream \S+ \{ zone \S+", f"upstream many-{n} {{ zone many-{n}", first) for n in range(count - 1)
        )
        with Gateway(replicas, upstreams="".join(names) + last, files=resized(**zones)) as gateway:
            yield gateway, replicas["vllm-1"]


@pytest.mark.parametrize(("count", "adapters"), [(40, 200), (3, 800)])
def test_many_replicas_of_many_adapters_are_watched_as_few_are(count: int, adapters: int) -> None:
    with crowd(count, adapters) as (gateway, last), httpx.Client(base_url=gateway.url) as client:
        gateway.wait_ready(60)
        assert len(client.get("/v1/models").json()["data"]) == adapters + 1
        name = f"sim-adapter-{adapters - 1}"
        assert client.get(f"/v1/models/{name}").json()["parent"] == "sim"
        assert client.post("/v1/chat/completions", json=chat("hi", model=name)).status_code == 200
        assert "[error]" not in gateway.log()
        last.kill()
        assert gateway.wait_states({"vllm-1": "unreachable"}, 10) < 4


def test_cards_without_room_leave_the_watch_alone() -> None:
    with crowd(3, 800, cards="64k") as (gateway, last):
        gateway.wait_ready()
        until(lambda: "the zone cards is full" in gateway.log(), "it is logged")
        assert counted(gateway, 'gateway_writes_lost_total{zone="cards"}') > 0
        listed = httpx.get(gateway.url + "/v1/models").json()["data"]
        assert {f"sim-adapter-{n}" for n in range(800)} < {card["id"] for card in listed}
        last.kill()
        assert gateway.wait_states({"vllm-1": "unreachable"}, 10) < 4


def test_a_replica_whose_models_find_no_room_is_not_ready() -> None:
    with crowd(3, 2000, models="32k") as (gateway, _):
        until(lambda: "the zone models is full" in gateway.log(), "it is logged")
        until(lambda: "no room" in reason(gateway, "vllm-1"), "the status says why")
        assert "ready" not in gateway.states().values()
        assert counted(gateway, 'gateway_writes_lost_total{zone="models"}') > 0


def test_a_replica_whose_state_finds_no_room_is_not_ready() -> None:
    with crowd(60, 0, fleet="32k") as (gateway, last):
        until(lambda: "the zone fleet is full" in gateway.log(), "it is logged")
        assert counted(gateway, 'gateway_writes_lost_total{zone="fleet"}') > 0
        last.kill()
        until(lambda: gateway.states()["vllm-1"] != "ready", "the dead one left the route", 5)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert gateway.states()["vllm-1"] != "ready"
            time.sleep(0.2)  # the state is sampled all the time


def test_the_watch_for_tokens_rests_for_a_few_seconds_in_minutes() -> None:
    """What wedges while it rests is seen later by as long; a one-token request must still end within the rest."""
    conf, script = (ROOT / "nginx" / name for name in ("nginx.conf", "njs/health.js"))
    location = re.search(r"location @probe \{(.*?)\}", conf.read_text(), re.DOTALL)
    turn = re.search(r"TURN_MS = (\d+)", script.read_text())
    assert location
    assert turn
    interval = 60 * int(re.findall(r"interval=(\d+)m", location[1])[0])
    longest = int(re.findall(r"js_fetch_timeout (\d+)s", location[1])[0])
    assert longest < interval - int(turn[1]) / 1000 <= interval / 50


NOW = r"Date\.now\(|new Date\(\)"


def test_nothing_is_measured_by_the_wall_clock() -> None:
    """A step of it would keep replicas from being watched for as long; `make chaos` has one, where libfaketime is.

    Keys and sessions end at a date, their limits count days and months, models wake by a timetable, the autoscaler's
    word has an age and is renewed every few seconds, any step ends a slice of a few milliseconds, hosts' clocks are
    compared, a span has a date, and the clock itself is told to Prometheus.
    """
    dated = {"keys.js", "limits.js", "webui.js", "sleep.js", "parked.js", "trace.js"}
    reads = {path.name for path in (ROOT / "nginx" / "njs").glob("*.js") if re.search(NOW, path.read_text())}
    assert reads <= {*dated, "bytes.js", "hosts.js", "vitals.js"}
