"""The functions of each njs module, called inside real njs."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas

PORT = 8089
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    """`call(module, function, *arguments)` gives what the function returns."""
    with Replicas(1) as replicas:
        server = (
            f"js_import calls from calls.js; server {{ listen {replicas.gateway_host}:{PORT};"
            " location / { client_max_body_size 8m; js_content calls.call; } }"
        )
        files = {
            "fleet/calls.conf": server.encode(),
            "njs/calls.js": Path(__file__).with_name("calls.js").read_bytes(),
        }
        with Gateway(replicas, files=files) as gateway, httpx.Client(timeout=20) as client:
            gateway.wait_ready()

            def ask(module: str, name: str | None = None, *arguments: object) -> Any:
                asked = {"module": module, "arguments": arguments, **({"name": name} if name else {})}
                answer = client.post(f"http://{replicas.gateway_host}:{PORT}/", content=json.dumps(asked))
                assert answer.status_code == 200, answer.text
                return answer.json()

            yield ask


# ---- fleet.js


def test_the_fleet_file_is_read_as_nginx_reads_it(call: Call) -> None:
    text = """
        # upstream gone { server gone:8000; }
        upstream vllm-0 { zone vllm-0 64k; server vllm-0:8000 resolve; keepalive 64; }  # the first
        upstream big {
            zone big 64k;
            server 10.0.0.7:8001 weight=3 resolve;
        }
        server { listen 1; }
    """
    assert call("fleet", "parse", text) == [
        {"name": "vllm-0", "host": "vllm-0:8000", "weight": 1},
        {"name": "big", "host": "10.0.0.7:8001", "weight": 3},
    ]


# ---- health.js


def test_metrics_are_summed_over_engines_and_the_fullest_cache_counts(call: Call) -> None:
    text = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b"} 3.0
vllm:num_requests_running{engine="1",model_name="a b"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:generation_tokens_total 1.5e+06
vllm:num_requests_running_else 9
python_info 1
"""
    assert call("health", "parse", text) == {"running": 7, "kv": 0.75, "tokens": 1_500_000}


# ---- body.js


def model(call: Call, body: str, content_type: str = "application/json") -> str:
    found: str = call("body", "read", content_type, body)["model"]
    return found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"model":"m"}', "m"),
        ('{"messages":[{"role":"user","content":"\\"model\\":\\"x\\""}],"model":"m"}', "m"),
        ('{"model":"a","model":"b"}', "b"),
        ('{"mod\\u0065l":"m\\/n"}', "m/n"),
        ('{"metadata":{"model":"x"},"model":"m"}', "m"),
        ('{"metadata":{"model":"x"}}', ""),
        ('{"model":5}', ""),
        ("[1]", ""),
        ("null", ""),
        ("", ""),
        ('{"model":"m"', ""),
        ("[" * 100_000, ""),
    ],
)
def test_the_model_of_a_body(call: Call, body: str, expected: str) -> None:
    assert model(call, body) == expected


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "messages": [{"role": "user", "content": "x" * 2_000_000}]},
        {
            "messages": [{"role": "user", "content": 'say "model":"x"} ' * 100_000}],
            "model": "m",
            "stream": True,
            "n": 1,
        },
        {"messages": [{"role": "user", "content": "x" * 2_000_000}], "model": "m", "metadata": {"model": "x"}},
    ],
)
def test_the_model_of_a_body_too_long_to_parse_each_time(call: Call, body: dict[str, object]) -> None:
    assert model(call, json.dumps(body)) == "m"


def test_the_model_of_an_upload(call: Call) -> None:
    body = '--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b\r\n…'
    assert model(call, body, "multipart/form-data; boundary=b") == "whisper"


# ---- prefix.js


def keys(call: Call, body: dict[str, object], seed: str = "m") -> list[str]:
    """A prompt's keys, as far as they are remembered, from its start to its end."""
    prompt = call("prefix", "cutsOf", body, seed)
    kept = call("prefix")["KEPT"]
    return [call("prefix", "key", prompt, n) for n, cut in enumerate(prompt["cuts"]) if cut & kept]


def looked_up(call: Call, body: dict[str, object], seed: str = "m") -> set[str]:
    prompt = call("prefix", "cutsOf", body, seed)
    return {call("prefix", "key", prompt, n) for n in range(len(prompt["cuts"]))}


def turns(*texts: str) -> dict[str, object]:
    roles = ["system", *["user", "assistant"] * len(texts)]
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def test_a_conversation_that_grew_is_recognised_at_its_former_end(call: Call) -> None:
    texts = ["be brief", *[f"turn {n} " + "word " * 50 for n in range(40)]]
    for length in (2, 4, 20, 30):
        assert keys(call, turns(*texts[:length]))[-1] in looked_up(call, turns(*texts[: length + 2]))


def test_a_turn_with_tools_is_recognised(call: Call) -> None:
    texts = ["be brief", "what is the weather?"]
    before = keys(call, turns(*texts))[-1]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}] * 2}
    grown: Any = turns(*texts)
    grown["messages"] += [calls, *[{"role": "tool", "content": "sun"}] * 2]
    assert before in looked_up(call, grown)


def test_a_system_prompt_and_a_document_are_shared(call: Call) -> None:
    document = "".join(f"line {n}\n" for n in range(2000))
    one = keys(call, turns("you are an expert", f"{document} What is in line 7?"))
    two = looked_up(call, turns("you are an expert", f"{document} And in line 9?"))
    assert set(one[:-1]) <= two
    assert one[-1] not in two
    assert len(one) > 4


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (turns("a", "hi"), turns("b", "hi")),
        ({"prompt": "id 1: " + "x" * 5000}, {"prompt": "id 2: " + "x" * 5000}),
        ({"prompt": [1, 2, 3]}, {"prompt": [1, 2, 4]}),
        ({"messages": [{"role": "user", "content": "hi"}]}, {"messages": [{"role": "system", "content": "hi"}]}),
    ],
)
def test_other_beginnings_have_other_keys(call: Call, one: dict[str, object], two: dict[str, object]) -> None:
    assert not set(keys(call, one)) & looked_up(call, two)


def test_another_model_has_other_keys(call: Call) -> None:
    assert not set(keys(call, turns("a", "b"), "m")) & set(keys(call, turns("a", "b"), "n"))


@pytest.mark.parametrize("prompt", ["hi", ["hi", "you"], [1, 2], [[1, 2]], "x" * 100_000])
def test_prompts_of_every_kind_have_keys(call: Call, prompt: object) -> None:
    assert keys(call, {"prompt": prompt})


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, {"messages": None}, {"messages": [None]}, {"prompt": 5}, {"prompt": []}]
)
def test_a_body_without_a_prompt_has_no_cuts(call: Call, body: dict[str, object]) -> None:
    assert call("prefix", "cutsOf", body, "m") is None


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "text", "image_url"]), inner)
        ),
        max_leaves=20,
    )
)
def test_no_shape_of_messages_breaks_the_cuts(call: Call, messages: object) -> None:
    call("prefix", "cutsOf", {"messages": messages}, "m")
    call("prefix", "cutsOf", {"prompt": messages}, "m")


def test_the_last_six_holders_of_a_key_are_remembered_the_latest_first(call: Call) -> None:
    for replica in (1, 2, 255, 4, 5, 6, 7, 5):
        call("prefix", "keep", "key", replica, call("prefix", "holders", "key"))
    packed = call("prefix", "holders", "key")
    assert [packed >> 8 * n & 255 for n in range(7)] == [5, 7, 6, 4, 255, 2, 0]
    assert call("prefix", "holds", packed, 255)
    assert not call("prefix", "holds", packed, 1)


# ---- stream.js


def filtered(call: Call, chunks: list[bytes], lost: int = -1, content_type: str = "text/event-stream") -> bytes:
    given_chunks = [base64.b64encode(chunk).decode() for chunk in chunks]
    return base64.b64decode(call("stream", "filtered", content_type, given_chunks, lost))


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=8))
@settings(max_examples=60)
def test_a_stream_passes_as_it_came(call: Call, chunks: list[bytes]) -> None:
    assert filtered(call, [*chunks, b""]) == b"".join(chunks) + b"<last>"


def test_a_lost_stream_ends_with_an_error_event_and_no_half_line(call: Call) -> None:
    passed = filtered(call, [b"", b'data: {"a":1}\n\nda', b'ta: {"b', b""], lost=3)
    whole, error = passed.split(b"\n\ndata: ")
    assert whole.rstrip() == b'data: {"a":1}'
    assert error.endswith(b"\n\n")
    said = json.loads(error)["error"]
    assert said["code"] == "stream_lost"
    assert "vllm-0" in said["message"]
    assert "r1" in said["message"]


def test_what_is_no_stream_is_left_alone(call: Call) -> None:
    assert filtered(call, [b'{"a":', b"1}", b""], lost=2, content_type="application/json") == b'{"a":'


# ---- settings.js


def test_settings_have_safe_defaults(call: Call) -> None:
    assert call("settings") == {"policy": "prefix", "closed": "", "complaint": ""}
