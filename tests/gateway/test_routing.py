"""Which replica a request goes to."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import httpx
import pytest

from lab.http import get
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import agent, chat

WORDS = "lorem ipsum dolor sit amet consectetur " * 20


def ask(client: httpx.Client, *messages: str, headers: dict[str, str] | None = None, **more: object) -> str:
    """The replica that answered."""
    answer = client.post("/v1/chat/completions", json=chat(*messages, **more), headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-replica"])


def counted(gateway: Gateway, name: str) -> float:
    """The sum of a metric's series whose line begins with `name`."""
    lines = get(gateway.metrics_url + "/metrics").decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


class Held:
    """Long streams, begun one after another, that keep replicas busy until the end of the block."""

    def __init__(self, gateway: Gateway, count: int, headers: dict[str, str] | None = None) -> None:
        self.count = count
        self.replicas: list[str] = []
        self._client = httpx.Client(base_url=gateway.url, headers=headers, timeout=30)
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._done: list[Future[None]] = []

    def _hold(self, n: int) -> None:
        body = chat(f"hold {n} {id(self)}", stream=True, max_tokens=5000)
        with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            self.replicas.append(answer.headers["x-replica"])
            for _ in answer.iter_raw():
                if self._end.is_set():
                    return

    def __enter__(self) -> Self:
        for n in range(self.count):
            self._done.append(self._pool.submit(self._hold, n))
            until(lambda n=n: len(self.replicas) > n, f"stream {n} runs")  # type: ignore[misc]
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        try:
            for done in self._done:
                done.result()
        finally:
            self._pool.shutdown()
            self._client.close()


@pytest.fixture
def fresh(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """A gateway of its own over three replicas; the parameter is its environment."""
    with Replicas(3) as replicas, Gateway(replicas, env=getattr(request, "param", {})) as gateway:
        gateway.wait_ready()
        yield gateway


# ---- prefix


def test_a_conversation_stays_with_its_replica(client: httpx.Client) -> None:
    for talk in range(6):
        turns = [f"talk {talk}: how do I begin? {WORDS}"]
        home = ask(client, *turns)
        for turn in range(4):
            turns += [f"answer {turn}", f"question {turn}"]
            assert ask(client, *turns) == home


def test_new_conversations_are_spread(client: httpx.Client) -> None:
    homes = Counter(ask(client, f"nothing in common {n} {WORDS}") for n in range(30))
    assert len(homes) == 3, homes
    assert min(homes.values()) >= 7, homes


def test_a_shared_document_is_sent_where_it_is_cached(client: httpx.Client) -> None:
    document = f"the document {WORDS * 5}"
    home = ask(client, f"{document} what is this?")
    assert {ask(client, f"{document} question {n}?") for n in range(5)} == {home}


def test_a_completion_prompt_counts_too(client: httpx.Client) -> None:
    def complete(prompt: str) -> str:
        answer = client.post("/v1/completions", json={"model": "sim", "prompt": prompt, "max_tokens": 1})
        return str(answer.headers["x-replica"])

    shots = f"few shots {WORDS * 3}"
    home = complete(f"{shots} one")
    assert {complete(f"{shots} {n}") for n in range(5)} == {home}


def test_an_agents_conversation_stays_with_its_replica(client: httpx.Client) -> None:
    """Codex' requests find their prompt again without a session too."""
    turns = [f"say hello {WORDS}"]
    for turn in range(4):
        answer = client.post("/v1/responses", json=agent(*turns, max_output_tokens=1))
        assert answer.status_code == 200, answer.text
        assert turn == 0 or answer.headers["x-route-reason"] == "prefix"
        turns.append(f"question {turn}")


@pytest.mark.parametrize("kind", ["header", "cache key"])
def test_a_session_is_kept_whatever_is_said(client: httpx.Client, kind: str) -> None:
    def say(session: str, text: str) -> str:
        if kind == "header":
            return ask(client, text, headers={"X-Session-Id": session})
        return ask(client, text, prompt_cache_key=session)

    homes = {f"s{n}": say(f"s{n}", f"hello from {kind} {n} {WORDS * 8}") for n in range(9)}
    assert len(set(homes.values())) == 3
    for n in range(4):
        for session, home in homes.items():
            assert say(session, f"something else {n}") == home


def test_a_hot_prefix_overloads_no_replica(client: httpx.Client, gateway: Gateway) -> None:
    prompt = f"everybody asks this {WORDS * 3}"
    home = ask(client, prompt)
    # While few ask, it stays where it is cached.
    assert {ask(client, f"{prompt} alone {n}") for n in range(5)} == {home}
    with ThreadPoolExecutor(30) as pool:
        homes = Counter(pool.map(lambda n: ask(client, f"{prompt} {n}", max_tokens=20), range(300)))
    assert set(homes) == {"vllm-0", "vllm-1", "vllm-2"}
    assert max(homes.values()) < 180, homes


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    """What a replica has still to compute counts, not how many requests it has."""
    shape = ("--prefill-ms", "0.5", "--step-ms", "5")  # 2,000 tokens a second
    with Replicas(2, *shape) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        with httpx.Client(base_url=gateway.url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
            short = f"a short one {WORDS}"
            home = ask(client, short)
            # The next is beside the home in turn or not: only a long prompt at home itself shows anything.
            for n in range(20):
                long = pool.submit(ask, client, f"{short} and much more {n} {WORDS * 30}", stream=True, max_tokens=1)
                until(lambda: counted(gateway, "gateway_requests_in_flight") == 1, "the long prompt is computed")
                at_home = counted(gateway, f'gateway_requests_in_flight{{replica="{home}"}}') == 1
                went = ask(client, short)
                assert not long.done()
                assert long.result() in {"vllm-0", "vllm-1"}
                if at_home:
                    assert went != home
                    return
    pytest.fail("no long prompt went where its beginning is cached")


def test_what_was_computed_is_no_load_any_more(fresh: Gateway) -> None:
    """A long prompt that makes tokens keeps nobody from its replica, and one that is over has left nothing behind."""
    with httpx.Client(base_url=fresh.url, timeout=60) as client:
        begin = f"the beginning {WORDS * 40}"
        body = chat(begin, stream=True, max_tokens=5000)
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            home = answer.headers["x-replica"]
            assert {ask(client, f"{begin[:9000]} {n}") for n in range(5)} == {home}
        until(lambda: counted(fresh, "gateway_requests_in_flight") == 0, "all is over")
        assert {ask(client, f"{begin[:9000]} again {n}") for n in range(5)} == {home}


def test_replicas_that_idle_learn_a_beginning_that_many_share() -> None:
    """Eight ask at once, time after time, with one long system prompt: it is worth its room on each of four."""
    system = {"role": "system", "content": f"the rules {WORDS * 26}"}
    with (
        Replicas(4) as replicas,
        Gateway(replicas) as gateway,
        httpx.Client(base_url=gateway.url, timeout=60) as client,
    ):
        gateway.wait_ready()

        def asked(n: int) -> str:
            body = chat("", max_tokens=40) | {"messages": [system, {"role": "user", "content": f"question {n}"}]}
            return str(client.post("/v1/chat/completions", json=body).headers["x-replica"])

        # While few ask it stays where it is.
        assert len({asked(n) for n in range(5)}) == 1
        with ThreadPoolExecutor(8) as pool:
            homes = Counter(pool.map(asked, range(5, 85)))
    assert len(homes) == 4, homes
    assert min(homes.values()) >= 8, homes


@pytest.mark.parametrize("kind", ["beginning", "header", "cache key"])
def test_work_comes_back_to_a_drained_replica_within_two_turns(kind: str) -> None:
    """One of two was away while forty chats began: in their second next turn it has its part of them."""
    with Replicas(2) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        gateway.admin("PUT", "/replicas/vllm-1/drain")
        with httpx.Client(base_url=gateway.url, timeout=60) as client, ThreadPoolExecutor(40) as pool:

            def turn(n: int, talk: list[str]) -> str:
                headers = {"X-Session-Id": f"s{n}"} if kind == "header" else None
                more = {"prompt_cache_key": f"s{n}"} if kind == "cache key" else {}
                return ask(client, *talk, headers=headers, max_tokens=40, **more)

            talks = [[f"talk {n} {WORDS}"] for n in range(40)]
            assert set(pool.map(turn, range(40), talks)) == {"vllm-0"}
            gateway.admin("DELETE", "/replicas/vllm-1/drain")
            for _ in range(2):
                talks = [[*talk, "yes", "go on"] for talk in talks]
                homes = Counter(pool.map(turn, range(40), talks))
    assert homes["vllm-1"] >= 8, homes


def test_one_cache_key_for_all_overloads_no_replica(client: httpx.Client) -> None:
    with ThreadPoolExecutor(24) as pool:
        homes = Counter(
            pool.map(lambda n: ask(client, f"app {n} {WORDS}", prompt_cache_key="app", max_tokens=40), range(96))
        )
    assert max(homes.values()) <= 64, homes


@pytest.mark.parametrize("header", ["X-Session-Id", "X-Claude-Code-Session-Id", "X-OpenWebUI-Chat-Id"])
def test_agents_name_their_conversation(client: httpx.Client, header: str) -> None:
    homes = {n: ask(client, f"hello {header} {n}", headers={header: f"c{n}"}) for n in range(6)}
    assert {n: ask(client, f"more {header} {n}", headers={header: f"c{n}"}) for n in range(6)} == homes


def test_matched_blocks_and_reasons_are_counted(client: httpx.Client, gateway: Gateway) -> None:
    until(lambda: counted(gateway, "gateway_requests_in_flight") == 0, "all before is counted")
    before = counted(gateway, 'gateway_prefix_blocks_total{result="matched"}')
    by_prefix = counted(gateway, 'gateway_requests_total{replica="vllm-')
    ask(client, f"counted {WORDS * 2}")
    ask(client, f"counted {WORDS * 2}")
    assert counted(gateway, 'gateway_prefix_blocks_total{result="matched"}') >= before + 2
    until(lambda: counted(gateway, 'gateway_requests_total{replica="vllm-') == by_prefix + 2, "both counted")


# ---- the other policies


@pytest.mark.parametrize("fresh", [{"ROUTE_POLICY": "round_robin"}], indirect=True)
def test_round_robin_takes_turns(fresh: Gateway) -> None:
    with httpx.Client(base_url=fresh.url) as client:
        homes = [ask(client, "always the same") for _ in range(9)]
    assert homes == homes[:3] * 3
    assert len(set(homes)) == 3


@pytest.mark.parametrize("fresh", [{"ROUTE_POLICY": "least_busy"}], indirect=True)
def test_least_busy_goes_where_least_is_in_flight(fresh: Gateway) -> None:
    with Held(fresh, 2) as held, httpx.Client(base_url=fresh.url) as client:
        assert len(set(held.replicas)) == 2
        homes = {ask(client, "always the same") for _ in range(5)}
        assert homes == {"vllm-0", "vllm-1", "vllm-2"} - set(held.replicas)


@pytest.mark.parametrize("fresh", [{"ROUTE_POLICY": "session"}], indirect=True)
def test_session_policy_looks_at_the_session_only(fresh: Gateway) -> None:
    with httpx.Client(base_url=fresh.url) as client:
        assert len({ask(client, "same words", headers={"X-Session-Id": "a"}) for _ in range(5)}) == 1
        assert len({ask(client, f"same words {WORDS}") for _ in range(6)}) == 3


@pytest.mark.parametrize("fresh", [{"ROUTE_POLICY": "fastest"}], indirect=True)
def test_an_unknown_policy_is_named_in_the_log_and_prefix_is_used(fresh: Gateway) -> None:
    assert fresh.status()["gateway"]["policy"] == "prefix"
    assert "ROUTE_POLICY=fastest is none of prefix, least_busy, round_robin, session" in fresh.log()


# ---- models, weights, beginnings


def test_each_model_goes_to_the_replicas_that_serve_it() -> None:
    with Replicas(2, model="small") as small, Replicas(1, model="large") as large:
        moved = large.upstreams().replace("vllm-0", "vllm-9")
        small.dns.names["vllm-9"] = large["vllm-0"].host
        with (
            Gateway(small, upstreams=small.upstreams() + moved) as gateway,
            httpx.Client(base_url=gateway.url) as client,
        ):
            gateway.wait_ready()
            listed = {card["id"] for card in client.get("/v1/models").json()["data"]}
            assert listed == {"small", "large"}
            assert {ask(client, f"a {n}", model="small") for n in range(6)} == {"vllm-0", "vllm-1"}
            assert {ask(client, f"a {n}", model="large") for n in range(4)} == {"vllm-9"}


@pytest.mark.parametrize("policy", ["prefix", "least_busy"])
def test_a_replica_of_three_times_the_weight_takes_three_times_the_load(policy: str) -> None:
    def held(replicas: Replicas) -> tuple[Counter[str], float]:
        """Who holds how many of twelve streams, and the seconds since the gateway's last look when all were begun."""
        upstreams = replicas.upstreams().replace("resolve;", "resolve weight=3;", 1)
        with Gateway(replicas, upstreams=upstreams, env={"ROUTE_POLICY": policy}) as gateway:
            gateway.wait_ready()
            alive = 'gateway_probes_total{replica="vllm-1",result="alive"}'
            looks = counted(gateway, alive)
            until(lambda: counted(gateway, alive) > looks, "a look at the replicas")
            began = time.monotonic()
            with Held(gateway, 12) as streams:
                return Counter(streams.replicas), time.monotonic() - began

    with Replicas(2) as replicas:
        for _ in range(5):
            homes, seconds = held(replicas)
            # With each look, once a second, the gateway forgets a part of what `prefix` goes by: the work given out.
            if seconds < 0.8:
                break
        assert homes == {"vllm-0": 9, "vllm-1": 3}


def test_requests_are_taken_before_any_replica_was_asked() -> None:
    with Replicas(2) as replicas, Gateway(replicas) as gateway:
        # The gateway answers within milliseconds of its start; its first look may still be under way.
        answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("early"))
        assert answer.status_code == 200
        gateway.wait_ready()


# ---- canary


def test_a_canary_takes_its_share_of_new_conversations_and_keeps_them(fresh: Gateway) -> None:
    with httpx.Client(base_url=fresh.url) as client:
        assert fresh.admin("GET", "/canary") == {"replicas": [], "share": 0}
        old = [[f"before {n} {WORDS}"] for n in range(9)]
        homes = [ask(client, *turns) for turns in old]
        fresh.admin("PUT", "/canary", {"replicas": ["vllm-2"], "share": 0.3})
        for turns, home in zip(old, homes, strict=True):
            turns += ["yes", "go on"]
            assert ask(client, *turns) == home
        talks = [[f"during {n} {WORDS}"] for n in range(200)]
        begun = [ask(client, *turns, max_tokens=1) for turns in talks]
        assert 30 <= begun.count("vllm-2") <= 95
        fresh.admin("PUT", "/canary", {"replicas": ["vllm-2"], "share": 0})
        for turns, home in list(zip(talks, begun, strict=True))[:40]:
            assert ask(client, *turns, "yes", "go on", max_tokens=1) == home
        assert "vllm-2" not in {ask(client, f"after {n} {WORDS}") for n in range(10)}
        fresh.admin("DELETE", "/canary")
        assert "vllm-2" in {ask(client, f"again {n} {WORDS}") for n in range(10)}


@pytest.mark.parametrize(
    "body", [None, 5, {}, {"replicas": ["vllm-7"], "share": 0.1}, {"replicas": ["vllm-1"], "share": 2}]
)
def test_a_wrong_canary_is_refused(gateway: Gateway, body: object) -> None:
    answer = httpx.put(gateway.admin_url + "/canary", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "bad_canary"
    assert gateway.admin("GET", "/canary") == {"replicas": [], "share": 0}
