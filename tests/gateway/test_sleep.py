"""Models on demand: who sleeps and who wakes, and that no request is lost by it."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat, seen_by
from tests.gateway.test_health import reason
from tests.gateway.test_routing import counted


@contextlib.contextmanager
def sleepers(
    *models: str, gpus: tuple[Path, ...] = (), wake_seconds: float = 30, rate: float = 1, **env: str
) -> Iterator[tuple[Gateway, Replicas, httpx.Client]]:
    """A gateway over a replica of each of these models, all asleep. `gpus` is what they share."""
    replicas = Replicas(len(models), "--sleeps", "--wake-seconds", str(wake_seconds), "--step-ms", str(10 * rate))
    for sim, model in zip(replicas, models, strict=True):
        sim.args += ["--model", model, "--gpus", *map(str, gpus)]
    with replicas, Gateway(replicas, env=env) as gateway, httpx.Client(base_url=gateway.url, timeout=60) as client:
        gateway.wait_states({sim.name: "asleep" for sim in replicas})
        # one that is about to sleep is out of the route already
        until(lambda: all(told(replicas, sim.name)["state"] == "asleep" for sim in replicas), "all sleep")
        yield gateway, replicas, client


def ask(client: httpx.Client, model: str, text: str = "hi", **more: object) -> httpx.Response:
    return client.post("/v1/chat/completions", json=chat(text, model=model, **more))


def told(replicas: Replicas, name: str) -> dict[str, object]:
    found: dict[str, object] = httpx.get(f"{replicas[name].url}/is_sleeping").json()
    return found


def test_the_first_request_wakes_a_model_and_waits() -> None:
    with sleepers("a", "b") as (gateway, replicas, client):
        until(lambda: reason(gateway, "vllm-0") == "the next request wakes it", "the gateway knows that it sleeps")
        assert {card["id"] for card in client.get("/v1/models").json()["data"]} == {"a", "b"}
        assert client.get("/ready").json() == {"ready": 0, "asleep": 2, "replicas": 2}
        answer = ask(client, "a")
        assert (answer.status_code, answer.headers["x-route-reason"]) == (200, "wake")
        gateway.wait_states({"vllm-0": "ready", "vllm-1": "asleep"}, 5)
        assert ask(client, "a").headers["x-route-reason"] != "wake"
        assert told(replicas, "vllm-1")["state"] == "asleep"
        assert not [line for line in gateway.log().splitlines() if "[error]" in line or "[warn]" in line]


def test_streams_and_long_bodies_wait_as_well() -> None:
    """The second lies on disk, and would fill the connection to a replica that does not read it."""
    with sleepers("a", "b") as (_, replicas, client):
        answer = ask(client, "a", stream=True)
        assert "[DONE]" in answer.text
        long = ask(client, "b", "x" * 3_000_000, max_tokens=1)
        assert long.status_code == 400, long.text  # more than the model takes, says the replica
        assert len(seen_by(replicas["vllm-1"], "xxx")) == 1


def test_all_replicas_of_a_model_wake_together_and_sleep_when_nobody_asks() -> None:
    with sleepers("a", "a", "b", SLEEP_AFTER_SECONDS="3") as (gateway, _, client):
        assert ask(client, "a").status_code == 200
        gateway.wait_states({"vllm-0": "ready", "vllm-1": "ready", "vllm-2": "asleep"}, 5)
        text = "once more " * 400
        assert [ask(client, "a", text).headers["x-route-reason"] for _ in range(2)] == ["load", "prefix"]
        end = time.monotonic() + 5
        n = 0
        while time.monotonic() < end:
            n += 1
            assert ask(client, "a", f"turn {n}").status_code == 200
            assert gateway.states() == {"vllm-0": "ready", "vllm-1": "ready", "vllm-2": "asleep"}
            time.sleep(0.2)  # in use all the time
        gateway.wait_states(dict.fromkeys(("vllm-0", "vllm-1", "vllm-2"), "asleep"), 10)
        # Their caches went with their sleep: nobody is sent after them, nor said to have broken them.
        assert ask(client, "a").status_code == 200
        gateway.wait_states({"vllm-0": "ready", "vllm-1": "ready"}, 5)
        assert ask(client, "a", text).headers["x-route-reason"] == "load"


def test_a_sleeper_is_neither_asked_for_tokens_nor_found_wedged() -> None:
    with sleepers("a") as (gateway, replicas, client):
        alive = 'gateway_probes_total{replica="vllm-0",result="alive"}'
        looks = counted(gateway, alive)
        until(lambda: counted(gateway, alive) > looks + 3, "some looks", 10)
        assert replicas["vllm-0"].state()["generations"] == 0
        assert counted(gateway, 'gateway_replica_state{replica="vllm-0",state="asleep"}') == 1
        assert counted(gateway, 'gateway_replica_state{replica="vllm-0",state="wedged"}') == 0
        assert ask(client, "a").status_code == 200


def test_who_waits_too_long_gets_503_in_the_words_of_its_api() -> None:
    with sleepers("a", wake_seconds=2) as (gateway, replicas, client):
        replicas["vllm-0"].fault(waking="hang")
        answer = ask(client, "a")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "model_asleep"
        assert "after 2 s it was still asleep" in answer.json()["error"]["message"]
        assert reason(gateway, "vllm-0") == "is waking up"
        other = client.post("/v1/messages", json=chat("hi", model="a"))
        assert (other.status_code, other.json()["type"]) == (503, "error")
        assert counted(gateway, 'gateway_refusals_total{cause="asleep"}') == 2
        assert counted(gateway, "gateway_requests_in_flight") == 0


@pytest.mark.parametrize("fault", ["fail", "crash"])
def test_a_replica_that_fails_to_wake_is_said_to_at_once(fault: str) -> None:
    with sleepers("a") as (gateway, replicas, client):
        replicas["vllm-0"].fault(waking=fault)
        began = time.monotonic()
        answer = ask(client, "a")
        assert time.monotonic() - began < 10
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_asleep")
        said = "out of memory" if fault == "fail" else "it ended before it was awake"
        assert said in answer.json()["error"]["message"]
        if fault == "crash":
            gateway.wait_states({"vllm-0": "unreachable"})
            assert ask(client, "a").status_code == 503
            replicas["vllm-0"].kill()
            replicas["vllm-0"].start()
        replicas["vllm-0"].fault()
        gateway.wait_states({"vllm-0": "asleep"}, 10)
        assert ask(client, "a").status_code == 200


def test_a_drained_sleeper_stays_asleep() -> None:
    with sleepers("a") as (gateway, replicas, client):
        assert gateway.admin("PUT", "/replicas/vllm-0/drain")["state"] == "draining"
        answer = ask(client, "a")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica_ready")
        assert told(replicas, "vllm-0")["state"] == "asleep"
        assert gateway.admin("DELETE", "/replicas/vllm-0/drain")["state"] == "asleep"
        assert ask(client, "a").status_code == 200


def test_a_client_that_hangs_up_frees_its_place() -> None:
    with sleepers("a") as (gateway, replicas, client):
        replicas["vllm-0"].fault(waking="hang")
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=chat("gone", model="a"), timeout=2)
        until(lambda: told(replicas, "vllm-0")["wanted"] is None, "nobody waits any more", 5)
        until(lambda: counted(gateway, "gateway_requests_in_flight") == 0, "nothing in flight", 5)


def test_those_that_wait_are_bounded_in_number() -> None:
    with sleepers("a") as (gateway, replicas, _):
        replicas["vllm-0"].fault(waking="hang")
        with httpx.Client(base_url=gateway.url, timeout=60, limits=httpx.Limits(max_connections=600)) as many:
            refused: list[httpx.Response] = []

            def one() -> None:
                with contextlib.suppress(httpx.HTTPError):
                    refused.append(ask(many, "a"))

            threads = [threading.Thread(target=one, daemon=True) for _ in range(520)]
            for thread in threads:
                thread.start()
            until(lambda: len(refused) == 8, "those beyond are refused", 25)
            assert {answer.status_code for answer in refused} == {503}
            assert "512 requests wait for it already" in refused[0].text
            replicas["vllm-0"].kill()
            for thread in threads:
                thread.join(20)
        assert {answer.status_code for answer in refused} == {503}


def test_by_the_timetable_a_model_wakes_and_stays_awake() -> None:
    """The clock is the gateway's; whatever the minute is, one span has it and the other does not."""
    now = time.gmtime()
    span = f"Mon-Sun {now.tm_hour:02}:00-{(now.tm_hour + 2) % 24:02}:00"
    other = f"Mon-Sun {(now.tm_hour + 3) % 24:02}:00-{(now.tm_hour + 4) % 24:02}:00"
    with sleepers("a", "b", AWAKE=f"a={span}; b={other}", SLEEP_AFTER_SECONDS="1") as (gateway, replicas, client):
        gateway.wait_states({"vllm-0": "ready", "vllm-1": "asleep"}, 10)
        assert ask(client, "b").status_code == 200
        gateway.wait_states({"vllm-0": "ready", "vllm-1": "asleep"}, 10)
        assert replicas["vllm-0"].state()["generations"] == 1  # the gateway's own


@pytest.mark.timeout(120)
def test_two_models_take_turns_on_one_gpu_under_load_and_nothing_is_lost(tmp_path: Path) -> None:
    """Four clients of each model, streams among them; a replica that wakes while the other is awake has no memory."""
    with sleepers("a", "b", gpus=(tmp_path / "0",), wake_seconds=60) as (gateway, replicas, _):
        over = threading.Event()
        answers: dict[str, list[tuple[float, int, bool]]] = {"a": [], "b": []}

        def run(model: str, number: int) -> None:
            n = 0
            with httpx.Client(base_url=gateway.url, timeout=120) as client:
                while not over.is_set():
                    n += 1
                    answer = ask(client, model, f"{number} {n}", stream=number % 2 == 0, max_tokens=60)
                    whole = "[DONE]" in answer.text or number % 2 == 1
                    answers[model].append((time.monotonic(), answer.status_code, whole))

        clients = [threading.Thread(target=run, args=(model, n)) for model in answers for n in range(4)]
        for client in clients:
            client.start()
        awake: list[tuple[object, ...]] = []

        def changes() -> int:
            now = tuple(told(replicas, name)["state"] for name in ("vllm-0", "vllm-1"))
            assert now.count("asleep") >= 1
            awake.append(now)
            firsts = [seen for seen in awake if "awake" in seen]
            return sum(one != other for one, other in itertools.pairwise(firsts))

        until(lambda: changes() >= 2, "one, the other, and the first again", 70)
        over.set()
        for client in clients:
            client.join(70)
        for model, found in answers.items():
            assert {(status, whole) for _, status, whole in found} == {(200, True)}, model
            assert len(found) > 8
        assert counted(gateway, "gateway_streams_cut_total") == 0
        assert counted(gateway, "gateway_refusals_total") == 0
        assert [told(replicas, name)["failure"] for name in ("vllm-0", "vllm-1")] == ["", ""]


def test_two_gateways_wake_one_of_two_that_share_a_gpu(tmp_path: Path) -> None:
    with sleepers("a", "b", gpus=(tmp_path / "0",)) as (_, replicas, client):
        second = Gateway(replicas, env={"GATEWAYS": "2"})
        second.host = replicas.gateway_host.rsplit(".", 1)[0] + ".2"
        second.url, second.metrics_url, second.admin_url = (
            f"http://{second.host}:{port}" for port in (8080, 9113, 8081)
        )
        with second, httpx.Client(base_url=second.url, timeout=60) as other:
            second.wait_states({"vllm-0": "asleep", "vllm-1": "asleep"})
            answers: list[int] = []
            threads = [
                threading.Thread(target=lambda c=c, m=m: answers.append(ask(c, m).status_code))
                for c, m in ((client, "a"), (other, "b"), (client, "b"), (other, "a"))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert answers == [200] * 4
            assert [told(replicas, name)["failure"] for name in ("vllm-0", "vllm-1")] == ["", ""]


def test_wrong_settings_are_named_and_the_safe_value_is_taken() -> None:
    with sleepers("a", AWAKE="a=sometimes; b=Mon 08:00-18:00", SLEEP_AFTER_SECONDS="soon") as (gateway, _, _client):
        until(lambda: "AWAKE: a=sometimes" in gateway.log(), "it is logged")
        assert "SLEEP_AFTER_SECONDS=soon" in gateway.log()
        assert json.dumps(gateway.status())
