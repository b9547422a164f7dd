"""What had not begun to stream does not fail; what had ends with an error event."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import httpx
import openai
import pytest

from lab.http import answers
from lab.sim.gateway import Gateway
from lab.sim.load import Outcome, SteadyLoad, session, stream
from lab.sim.replicas import Replicas, Sim
from lab.waiting import until
from tests.gateway.conftest import chat, seen_by
from tests.gateway.test_public import error_of
from tests.gateway.test_routing import Held, ask, counted


def under_load(gateway: Gateway, act: Callable[[], object], seconds: float = 3.0, clients: int = 8) -> list[Outcome]:
    """What became of the requests of some clients, while `act` happens after a third of the time."""

    async def run() -> list[Outcome]:
        outcomes: list[Outcome] = []
        end = time.monotonic() + seconds

        async def one(number: int) -> None:
            n = 0
            while time.monotonic() < end:
                n += 1
                outcomes.append(await stream(http, gateway.url, chat(f"load {number} {n}", max_tokens=10), 30))

        async with session() as http:
            work = [asyncio.create_task(one(n)) for n in range(clients)]
            await asyncio.sleep(seconds / 3)
            await asyncio.to_thread(act)
            await asyncio.gather(*work)
        return outcomes

    return asyncio.run(run())


def known_to(client: httpx.Client, name: str) -> str:
    """A prompt that this replica was sent, so that it is sent there again."""
    asked: list[str] = []

    def there() -> bool:
        asked.append(f"known to {name} {time.monotonic()} " + "and so on " * 20)
        return ask(client, asked[-1]) == name

    # New prompts go to whom was sent least lately, which the tests before decide for some seconds.
    until(there, f"{name} is sent a new prompt", 15)
    return asked[-1]


@pytest.mark.parametrize("forget", [True, False], ids=["name gone", "name kept"])
def test_a_replica_killed_under_load_fails_nothing_that_had_not_begun(
    gateway: Gateway, fleet: Replicas, forget: bool
) -> None:
    outcomes = under_load(gateway, lambda: fleet["vllm-0"].kill(forget=forget))
    assert len(outcomes) > 50
    assert [outcome.why for outcome in outcomes if outcome.failed] == []
    cut = [outcome for outcome in outcomes if outcome.cut]
    assert all(outcome.error_event and outcome.replica == "vllm-0" for outcome in cut)
    assert len(cut) <= 8
    fleet["vllm-0"].start()


def test_a_killed_replica_leaves_the_route_at_the_first_request(gateway: Gateway, fleet: Replicas) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        known = known_to(client, "vllm-2")
        fleet["vllm-2"].kill(forget=False)
        # It is sent there, as nothing else has told yet that the replica is gone, and moved.
        assert ask(client, known) in {"vllm-0", "vllm-1"}
        assert gateway.states()["vllm-2"] != "ready"
    fleet["vllm-2"].start()


def test_a_replica_under_a_new_address_is_found_without_a_reload(gateway: Gateway, fleet: Replicas) -> None:
    outcomes = under_load(gateway, fleet["vllm-1"].move, seconds=4)
    assert [outcome.why for outcome in outcomes if outcome.failed] == []
    gateway.wait_states({"vllm-1": "ready"}, 10)
    with httpx.Client(base_url=gateway.url) as client:
        until(lambda: ask(client, f"moved {time.monotonic()}") == "vllm-1", "vllm-1 answers again", 5)


def test_a_full_replica_passes_the_request_on(gateway: Gateway, fleet: Replicas) -> None:
    refused = 'gateway_retries_total{replica="vllm-0",cause="refused"}'
    with httpx.Client(base_url=gateway.url) as client:
        known = known_to(client, "vllm-0")
        before = counted(gateway, refused)
        fleet["vllm-0"].fault("status", status=503)
        assert ask(client, known) in {"vllm-1", "vllm-2"}
    assert counted(gateway, refused) == before + 1
    assert gateway.states()["vllm-0"] == "ready"


def test_all_full_is_a_quick_429_that_says_when_to_come_back(gateway: Gateway, fleet: Replicas) -> None:
    for sim in fleet:
        sim.fault("status", status=503)
    began = time.monotonic()
    answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("no room"))
    assert time.monotonic() - began < 1
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert error_of(answer)["code"] == "fleet_full"
    assert counted(gateway, 'gateway_refusals_total{cause="full"}') >= 1
    for sim in fleet:
        assert sum("no room" in request["body"] for request in sim.state()["seen"]) == 1


def test_replicas_that_are_being_stopped_are_not_full(gateway: Gateway, fleet: Replicas) -> None:
    draining = 'gateway_retries_total{replica="vllm-1",cause="draining"}'
    before = counted(gateway, draining)
    for sim in fleet:
        sim.fault("status", status=503, refusal="draining")
    answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("too late"))
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert error_of(answer)["code"] == "no_replica_ready"
    assert "vllm-0 draining, vllm-1 draining, vllm-2 draining" in str(error_of(answer)["message"])
    assert counted(gateway, draining) == before + 1
    fleet["vllm-1"].fault("status", status=503)
    answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("one is full"))
    assert error_of(answer)["code"] == "fleet_full"


@pytest.mark.parametrize("status", [400, 404, 422, 429])
def test_a_4xx_is_the_clients_and_moves_nothing(gateway: Gateway, fleet: Replicas, status: int) -> None:
    for sim in fleet:
        sim.fault("status", status=status)
    before = counted(gateway, "gateway_retries_total")
    with httpx.Client(base_url=gateway.url) as client:
        answers = [client.post("/v1/chat/completions", json=chat(f"wrong {n}")) for n in range(6)]
    assert {answer.status_code for answer in answers} == {status}
    assert counted(gateway, "gateway_retries_total") == before
    assert set(gateway.states().values()) == {"ready"}


def test_a_500_of_the_replica_is_its_answer(gateway: Gateway, fleet: Replicas) -> None:
    for sim in fleet:
        sim.fault("status", status=500)
    answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("broken"))
    assert answer.status_code == 500
    assert answer.headers["x-replica"].startswith("vllm-")


@pytest.mark.parametrize("fault", ["reset", "crash"])
def test_a_connection_that_breaks_before_the_first_byte_goes_to_the_next_replica(
    gateway: Gateway, fleet: Replicas, fault: str
) -> None:
    sim = fleet["vllm-0"]
    with httpx.Client(base_url=gateway.url, timeout=30) as client, ThreadPoolExecutor(1) as pool:
        known = known_to(client, sim.name)
        before = counted(gateway, 'gateway_retries_total{replica="vllm-0"')
        # It crashes with the request in its hands: of an earlier crash the gateway's own look may tell first.
        sim.fault("reset" if fault == "reset" else "hang")
        answered = pool.submit(ask, client, known, max_tokens=3)
        until(lambda: len(seen_by(sim, known)) == 2, "the request is there")
        if fault == "crash":
            sim.fault("crash")
        assert answered.result() in {"vllm-1", "vllm-2"}
    assert counted(gateway, 'gateway_retries_total{replica="vllm-0"') == before + 1
    if fault == "crash":
        sim.kill(forget=False)
        sim.start()


def test_the_retried_request_has_its_whole_body(gateway: Gateway, fleet: Replicas) -> None:
    text = "x" * 3_000_000  # more than Nginx keeps in memory
    retries = 'gateway_retries_total{replica="vllm-0"'
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        sessions: list[str] = []

        def there() -> bool:
            sessions.append(f"session {time.monotonic()}")
            return ask(client, f"in {sessions[-1]}", headers={"X-Session-Id": sessions[-1]}) == "vllm-0"

        until(there, "a session begins on vllm-0", 15)
        fleet["vllm-0"].fault("reset")
        before = counted(gateway, retries)
        # Too long a prompt for the replica, which says so.
        answer = client.post("/v1/chat/completions", json=chat(text), headers={"X-Session-Id": sessions[-1]})
        home = answer.headers["x-replica"]
        assert answer.status_code == 400
        assert home in {"vllm-1", "vllm-2"}
        assert counted(gateway, retries) == before + 1
    assert len(seen_by(fleet[home], text)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_one_request_ends_two_replicas_at_most_whatever_the_client_repeats(stream: bool) -> None:
    with Replicas(4) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        for sim in replicas:
            sim.fault(deadly="poison")
        client = openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", timeout=30)
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(**chat("this is poison", stream=stream))
        assert failed.value.status_code == 502
        assert failed.value.response.headers["x-should-retry"] == "false"
        said = str(error_of(cast("httpx.Response", failed.value.response))["message"])
        assert said.count("vllm-") == 2
        assert "reset" in said
        alive = [sim for sim in replicas if answers(f"{sim.url}/health")]
        assert len(alive) == 2
        assert client.chat.completions.create(**chat("harmless")).choices


def test_a_replica_that_refuses_or_is_gone_costs_no_try(gateway: Gateway, fleet: Replicas) -> None:
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        known = known_to(client, "vllm-0")
        fleet["vllm-0"].fault("reset")
        # Whichever comes next is full, and passes the request on to the third.
        fleet["vllm-1"].fault("status", status=503)
        for _ in range(4):
            assert ask(client, known) == "vllm-2"


@pytest.mark.parametrize("status", [500, 502, 504])
def test_an_engines_failure_is_passed_on_in_its_own_words(gateway: Gateway, fleet: Replicas, status: int) -> None:
    for sim in fleet:
        sim.fault("status", status=status)
    asked = f"what went wrong? {status}"
    answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat(asked))
    assert answer.status_code == (500 if status == 500 else 502)
    assert "simulated fault" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert sum(len(seen_by(sim, asked)) for sim in fleet) == (1 if status == 500 else 2)


def test_a_stream_that_breaks_off_ends_with_an_error_event(gateway: Gateway, fleet: Replicas) -> None:
    for sim in fleet:
        sim.fault("cut", after_tokens=3)
    before = counted(gateway, "gateway_streams_cut_total")
    body = chat("cut me", stream=True, max_tokens=50)
    text = ""
    with httpx.stream("POST", gateway.url + "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        # The message is left unfinished, so that no client uses this connection again.
        with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 what came before the break is wanted
            for piece in answer.iter_text():
                text += piece
    events = text.strip().split("\n\n")
    assert '"code":"stream_lost"' in events[-1]
    assert answer.headers["x-request-id"] in events[-1]
    assert "[DONE]" not in text
    assert counted(gateway, "gateway_streams_cut_total") == before + 1


def test_none_ready_says_how_many_are_loading() -> None:
    with Replicas(2) as replicas:
        for sim in replicas:
            sim.kill(forget=False)
        with Gateway(replicas) as gateway:
            # Before its first look the gateway calls them loading too, but tries them.
            until(
                lambda: all(replica["reason"] != "not asked yet" for replica in gateway.status()["replicas"]),
                "a look at each replica",
            )
            gateway.wait_states({"vllm-0": "loading", "vllm-1": "loading"})
            answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("hello?"))
            assert answer.status_code == 503
            assert "2 of 2 loading" in str(error_of(answer)["message"])
            assert answer.headers["retry-after"]
            assert httpx.get(gateway.url + "/ready").status_code == 503
            assert httpx.get(gateway.url + "/health").status_code == 200
            assert httpx.get(gateway.url + "/v1/models").status_code == 503


def test_a_single_replica_that_restarts_is_tried_again() -> None:
    with Replicas(1) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        replicas["vllm-0"].kill(forget=False)
        assert httpx.post(gateway.url + "/v1/chat/completions", json=chat("gone")).status_code == 503
        replicas["vllm-0"].start()
        until(lambda: gateway.states()["vllm-0"] == "ready", "it is back", 5)
        assert httpx.post(gateway.url + "/v1/chat/completions", json=chat("back")).status_code == 200


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("fault", "state"), [("pause", "unreachable"), ("hang", "wedged")])
def test_the_last_replica_is_asked_though_it_was_given_up(fault: str, state: str) -> None:
    """It froze while the others were away, as on a busy host where another one loads: what comes waits for it."""

    async def scenario(gateway: Gateway, last: Sim) -> list[Outcome]:
        async with SteadyLoad(gateway.url, "sim", clients=4, max_tokens=5, patience=60) as load:
            await load.settle(20)
            last.pause() if fault == "pause" else last.fault("hang")
            await asyncio.to_thread(gateway.wait_states, {last.name: state})
            async with session() as http:
                new = asyncio.create_task(stream(http, gateway.url, chat("while it is frozen", max_tokens=5), 60))
                await asyncio.to_thread(
                    until, lambda: counted(gateway, "gateway_requests_in_flight") == 5, "the new one waits too", 10
                )
                last.resume() if fault == "pause" else last.fault()
                load.outcomes.append(await new)
            await asyncio.to_thread(gateway.wait_states, {last.name: "ready"})
            await load.settle(20)
        return load.outcomes

    with Replicas(2) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        replicas["vllm-1"].kill()
        gateway.wait_states({"vllm-1": "unreachable"})
        outcomes = asyncio.run(scenario(gateway, replicas["vllm-0"]))
    assert len(outcomes) > 40
    assert [(outcome.status, outcome.why) for outcome in outcomes if not outcome.done] == []


def test_a_drained_replica_is_no_last_resort() -> None:
    with Replicas(1) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        gateway.admin("PUT", "/replicas/vllm-0/drain")
        replicas["vllm-0"].pause()
        gateway.wait_states({"vllm-0": "unreachable"})
        assert httpx.post(gateway.url + "/v1/chat/completions", json=chat("too late")).status_code == 503
        replicas["vllm-0"].resume()


def test_a_reload_under_load_fails_nothing(gateway: Gateway) -> None:
    outcomes = under_load(gateway, gateway.reload)
    assert [outcome.why for outcome in outcomes if not outcome.done] == []
    until(lambda: counted(gateway, "gateway_requests_in_flight") == 0, "nothing in flight", 10)


def test_killed_workers_leave_no_request_in_flight(gateway: Gateway) -> None:
    with pytest.raises(httpx.HTTPError), Held(gateway, 8):  # noqa: PT012 the streams fail at the block's end
        assert counted(gateway, "gateway_requests_in_flight") == 8
        for _ in range(2):
            gateway.kill_worker()
    # Below the block: its end fails, which would hide what fails in it.
    until(lambda: counted(gateway, "gateway_requests_in_flight") == 0, "the dead workers' requests are gone", 5)


def test_old_workers_end_soon_after_a_reload_and_all_at_a_stop() -> None:
    with Replicas(1) as replicas, Gateway(replicas) as gateway, httpx.Client() as client:
        gateway.wait_ready()
        assert client.get(gateway.url + "/health").status_code == 200  # and stays connected
        old = set(gateway.workers())
        gateway.reload()
        until(lambda: not old & set(gateway.workers()), "the old workers ended", 8)
        until(lambda: "vllm-0" in gateway.states(), "the new workers serve")
        master = gateway.master()
        os.kill(master, signal.SIGQUIT)

        def ended() -> bool:
            status = Path(f"/proc/{master}/stat")
            return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"

        until(ended, "Nginx ended", 8)
