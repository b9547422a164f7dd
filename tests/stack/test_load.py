"""Several requests at once, clients that leave, and which replica serves."""

from concurrent.futures import ThreadPoolExecutor

import openai
import requests

from lab.stack import Stack
from lab.waiting import until


def test_sixteen_at_once(stack: Stack, client: openai.OpenAI) -> None:
    """Sixteen streams at once are all answered, each with its own text."""

    def count_to(number: int) -> tuple[str, str]:
        stream = client.chat.completions.create(
            model=stack.model,
            messages=[{"role": "user", "content": f"Repeat the number {number}."}],
            max_tokens=8,
            temperature=0,
            stream=True,
        )
        chunks = list(stream)
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        return chunks[0].id, text

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(count_to, range(100, 116)))
    assert len({identity for identity, _ in answers}) == 16
    assert all(text for _, text in answers)


def test_every_replica_serves(stack: Stack) -> None:
    """Different conversations that come together are spread over all replicas."""

    def served_by(number: int) -> str:
        body = {"model": stack.model, "prompt": f"{number} different prompts. Number {number}:", "max_tokens": 8}
        answer = requests.post(f"{stack.url}/v1/completions", json=body, headers=stack.headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.headers["X-Replica"]

    replicas = set(stack.replicas())
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(served_by, range(8))) == replicas


def test_a_client_that_hangs_up(stack: Stack) -> None:
    """A client that leaves stops the generation: its replica runs nothing soon after, long before the answer's end."""
    until(lambda: idle(stack), "an idle fleet before the test", 60)
    body = {
        "model": stack.model,
        "prompt": "Once upon a time",
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{stack.url}/v1/completions"
    with requests.post(url, json=body, headers=stack.headers, stream=True, timeout=60) as answer:
        assert answer.status_code == 200
        replica = answer.headers["X-Replica"]
        lines = answer.iter_lines()  # kept: without a reader the client's side closes
        assert next(lines).startswith(b"data: ")
        until(lambda: stack.replicas()[replica]["running"] >= 1, f"the request running on {replica}", 10)
    until(lambda: idle(stack), f"no request running on {replica} after the client has left", 10)


def test_request_id(stack: Stack) -> None:
    """A request id is passed on and echoed; where the client has none, the gateway makes one, a new one each time."""
    body = {"model": stack.model, "prompt": "Hello", "max_tokens": 1}
    url = f"{stack.url}/v1/completions"
    named = requests.post(url, json=body, headers={**stack.headers, "X-Request-Id": "my-own-id-42"}, timeout=60)
    assert named.headers["X-Request-Id"] == "my-own-id-42"
    assert "my-own-id-42" in named.json()["id"], "the replica knows the request by the same id"
    made = {requests.post(url, json=body, headers=stack.headers, timeout=60).headers["X-Request-Id"] for _ in range(2)}
    assert len(made) == 2
    assert all(made)


def test_health_and_readiness(stack: Stack) -> None:
    """/health says that the gateway lives, /ready that a replica is ready."""
    assert requests.get(f"{stack.url}/health", timeout=5).status_code == 200
    assert requests.get(f"{stack.url}/ready", timeout=5).status_code == 200


def idle(stack: Stack) -> bool:
    """Whether nothing is in flight at the gateway and nothing runs or waits in a replica."""
    return all(
        replica["in_flight"] == replica["running"] == replica["waiting"] == 0 for replica in stack.replicas().values()
    )
