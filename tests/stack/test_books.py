"""The books of the gateway and of the real engine."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from lab.bench.real import replica_addresses
from lab.bench.workloads import totals
from lab.http import get
from lab.sim.load import text
from lab.stack import Stack
from lab.waiting import until


def test_the_books_balance_for_mixed_traffic(stack: Stack) -> None:
    """To 0.1 %: what the gateway metered is what vLLM says it did, for every API, `n`, lists and hang-ups."""
    addresses = replica_addresses(stack)
    gateway = f"http://{addresses.pop('gateway')}:9113/metrics"
    urls = [f"http://{address}:8000" for address in addresses.values()]

    def gateway_sum(pattern: str) -> float:
        lines = re.findall(rf"(?m)^{pattern} (\S+)$", get(gateway).decode())
        return sum(map(float, lines))

    def books() -> tuple[float, float]:
        # A probe is one token that makes one more.
        probes = gateway_sum(r'gateway_probes_total\{.*result="token".*\}')
        engines = [totals(url) for url in urls]
        made = sum(one["vllm:prompt_tokens_total"] + one["vllm:generation_tokens_total"] for one in engines)
        return made - 2 * probes, gateway_sum(r'gateway_tokens_total\{.*kind="(?:prompt|completion|repeated)"\}')

    def idle() -> bool:
        busy = [one["vllm:num_requests_running"] + one["vllm:num_requests_waiting"] for one in map(totals, urls)]
        return not any(busy) and not gateway_sum(r"gateway_requests_in_flight\{.*\}")

    prompt = text(random.Random(), 200)
    messages = [{"role": "user", "content": prompt}]
    head: dict[str, Any] = {"model": stack.model, "max_tokens": 6}
    chat = {**head, "messages": messages}
    usage = {"stream_options": {"include_usage": True}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", chat),
        ("chat/completions", {**chat, "stream": True}),
        ("chat/completions", {**chat, "stream": True, **usage}),
        ("chat/completions", {**chat, "n": 3}),
        ("chat/completions", {**chat, "n": 2, "stream": True}),
        ("chat/completions", {**chat, "tools": [tool], "tool_choice": "none"}),
        ("chat/completions/batch", {**chat, "messages": [messages, messages]}),
        ("completions", {**head, "prompt": prompt}),
        ("completions", {**head, "prompt": [prompt, "and another"], "n": 2, "stream": True}),
        ("messages", chat),
        ("messages", {**chat, "stream": True}),
        ("responses", {"model": stack.model, "input": prompt, "max_output_tokens": 6}),
        ("responses", {"model": stack.model, "input": prompt, "max_output_tokens": 6, "stream": True}),
    ]
    hang_up = ("chat/completions", {**chat, "max_tokens": 200, "stream": True, "ignore_eos": True})

    def ask(asked: tuple[str, dict[str, Any]]) -> None:
        path, body = asked
        url = f"{stack.url}/v1/{path}"
        with httpx.stream("POST", url, json=body, headers=stack.headers, timeout=300) as answer:
            assert answer.status_code == 200, answer.read()
            events = 0
            for line in answer.iter_lines():
                events += line.startswith("data: {")
                if asked is hang_up and events > 20:
                    return

    until(idle, "the stack is idle", 60)
    before = books()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, [*kinds, *kinds, hang_up]))
    until(idle, "all is over", 120)
    made, counted = (now - then for now, then in zip(books(), before, strict=True))
    print(json.dumps({"made": made, "counted": counted}))
    assert made > 5000
    assert abs(made - counted) <= 0.001 * made, (made, counted)
