"""The functions of each njs module, called inside real njs."""

import base64
import itertools
import json
import random
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler import timetable
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from tests.gateway.conftest import agent
from tests.gateway.test_access import BAD, entry, keys_file

PORT = 8089
MIB = 2**20
Call = Callable[..., Any]


@contextmanager
def calling(**env: str) -> Iterator[tuple[Gateway, Call]]:
    """A gateway in this environment, and `call(module, function, *arguments)`: it gives what the function does."""
    with Replicas(1) as replicas:
        server = (
            f"js_import calls from calls.js; server {{ listen {replicas.gateway_host}:{PORT};"
            " location / { client_max_body_size 8m; js_content calls.call; } }"
        )
        files = {
            "fleet/calls.conf": server.encode(),
            "njs/calls.js": Path(__file__).with_name("calls.js").read_bytes(),
        }
        with Gateway(replicas, files=files, env=env) as gateway, httpx.Client(timeout=20) as client:
            gateway.wait_ready()

            def ask(module: str, name: str | None = None, *arguments: object) -> Any:
                asked = {"module": module, "arguments": arguments, **({"name": name} if name else {})}
                answer = client.post(f"http://{replicas.gateway_host}:{PORT}/", content=json.dumps(asked))
                assert answer.status_code == 200, answer.text
                return answer.json()

            yield gateway, ask


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with calling() as (_, ask):
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
        upstream vllm-7 { zone vllm-7 64k; server link-gpu-b:8001 resolve; keepalive 64; }
        server { listen 1; }
    """
    assert call("fleet", "parse", text) == [
        {"name": "vllm-0", "host": "vllm-0:8000", "on": "", "weight": 1},
        {"name": "big", "host": "10.0.0.7:8001", "on": "", "weight": 3},
        {"name": "vllm-7", "host": "link-gpu-b:8001", "on": "gpu-b", "weight": 1},
    ]


@pytest.mark.parametrize("times", [1, 3])
def test_what_another_worker_learned_while_the_table_was_made_is_in_it(call: Call, times: int) -> None:
    """Whoever writes last has begun last, or makes it anew."""
    assert call("fleet", "overtaken", times) == [times / 100, times / 100, times + 1]


def test_workers_that_always_overtake_each_other_come_to_an_end(call: Call) -> None:
    _, _, made = call("fleet", "overtaken", 1000)
    assert made == 5


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


# ---- timetable.js

WEEK = 7 * 24 * 60
# 2026-11-30 is a Monday.
MONDAY = datetime(2026, 11, 30, tzinfo=UTC)
ANY_DAYS = st.lists(
    st.lists(st.sampled_from(timetable.DAYS), min_size=1, max_size=2).map("-".join), min_size=1, max_size=3
)
ANY_TIME = st.tuples(st.integers(0, 24), st.integers(0, 60)).map(lambda time: f"{time[0]:02}:{time[1]:02}")
ANY_ENTRY = st.builds(
    lambda model, days, begin, end: f"{model}={','.join(days)} {begin}-{end}",
    st.sampled_from(["qwen", "Qwen/Qwen2.5-7B:x", "a b"]), ANY_DAYS, ANY_TIME, ANY_TIME,
)  # fmt: skip
ODD = st.text(alphabet="MonTueFri 0123456789:-,;=a", max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY_ENTRY | ODD, max_size=4).map("; ".join), st.lists(st.integers(0, WEEK - 1), max_size=40))
def test_a_timetable_says_the_same_to_the_gateway_as_to_make_up(call: Call, text: str, minutes: list[int]) -> None:
    try:
        entries = timetable.parse(text)
    except ValueError:
        entries = None
    minutes += [60 * hour + 24 * 60 * day + minute for day in range(7) for hour in (0, 23) for minute in (0, 59)]
    wrong, found = call("timetable", "hours", text, minutes)
    assert (wrong == []) is (entries is not None)
    if entries is not None:
        assert dict(found) == {
            model: [
                minute for minute in minutes
                if any(entry.at(MONDAY + timedelta(minutes=minute)) for entry in entries if entry.what == model)
            ]
            for model in {entry.what for entry in entries}
        }  # fmt: skip


def test_the_week_begins_on_monday_in_utc(call: Call) -> None:
    assert call("timetable", "minuteOf", 0) == 3 * 24 * 60  # 1970 began on a Thursday
    sunday = datetime(2026, 11, 29, 23, 59, 59, tzinfo=UTC)
    assert call("timetable", "minuteOf", sunday.timestamp() * 1000) == WEEK - 1


# ---- sleep.js


def sleeper(name: str, model: str, state: str = "asleep", **more: Any) -> dict[str, Any]:
    """A replica that can sleep; `wanted`, `idle` and `seconds` as it says them, `gpus` that it shares."""
    said = {"state": state, "seconds": 100, "idle": 0, "wanted": None, "gpus": [], **more}
    return {"name": name, "models": [model], "drained": said.pop("drained", False), "sleep": said}


@pytest.mark.parametrize(
    ("replicas", "due_models", "sleep", "wake"),
    [
        pytest.param([sleeper("v0", "a"), sleeper("v1", "b")], [], [], [], id="nobody is wanted"),
        pytest.param([sleeper("v0", "a", wanted=0.1), sleeper("v1", "b")], [], [], ["v0"], id="one is wanted"),
        pytest.param(
            [sleeper("v0", "a", wanted=0.1), sleeper("v1", "a")], [], [], ["v0", "v1"], id="all of a model wake"
        ),
        pytest.param([sleeper("v0", "a", wanted=1, drained=True)], [], [], [], id="a drained one stays asleep"),
        pytest.param([sleeper("v0", "a", "awake", idle=60)], [], ["v0"], [], id="a rest ends in sleep"),
        pytest.param([sleeper("v0", "a", "awake", idle=59)], [], [], [], id="a pause does not"),
        pytest.param([sleeper("v0", "a", "awake", idle=99)], ["a"], [], [], id="due by the timetable"),
        pytest.param([sleeper("v0", "a")], ["a"], [], ["v0"], id="wakes by the timetable"),
        pytest.param(
            [sleeper("v0", "a", "awake", idle=99), sleeper("v1", "a", "awake", idle=2)],
            [],
            [],
            [],
            id="those of a model sleep together",
        ),
        pytest.param(
            [sleeper("v0", "a"), sleeper("v1", "a", "awake", idle=2)], [], [], ["v0"], id="one that has come joins"
        ),
        pytest.param(
            [sleeper("v0", "a", "awake", seconds=3, gpus=["0"]), sleeper("v1", "b", wanted=2, gpus=["0"])],
            [],
            [],
            [],
            id="who is awake has its turn",
        ),
        pytest.param(
            [sleeper("v0", "a", "awake", seconds=20, gpus=["0"]), sleeper("v1", "b", wanted=2, gpus=["0"])],
            [],
            ["v0"],
            [],
            id="then it gives way",
        ),
        pytest.param(
            [sleeper("v0", "a", "awake", seconds=6, idle=5, gpus=["0"]), sleeper("v1", "b", wanted=2, gpus=["0"])],
            [],
            ["v0"],
            [],
            id="or in a pause",
        ),
        pytest.param(
            [sleeper("v0", "a", "awake", idle=99, gpus=["0"]), sleeper("v1", "b", wanted=2, gpus=["0"])],
            ["a"],
            ["v0"],
            [],
            id="a request comes before the timetable",
        ),
        pytest.param(
            [sleeper("v0", "a", "awake", idle=99, gpus=["0"]), sleeper("v1", "b", gpus=["0"])],
            ["a", "b"],
            [],
            [],
            id="of two that are due who is awake stays",
        ),
        pytest.param(
            [sleeper("v0", "a", "awake", idle=19, gpus=["0"]), sleeper("v1", "b", gpus=["0"])],
            ["b"],
            [],
            [],
            id="the timetable waits for a pause",
        ),
        pytest.param(
            [sleeper("v0", "a", "awake", idle=20, gpus=["0"]), sleeper("v1", "b", gpus=["0"])],
            ["b"],
            ["v0"],
            [],
            id="and then counts",
        ),
        *(
            pytest.param(
                [sleeper("v0", "a", state, gpus=["0"]), sleeper("v1", "b", wanted=2, gpus=["0"])],
                [],
                [],
                [],
                id=f"nobody wakes beside one that is {state}",
            )
            for state in ("closing", "waking", "unknown")
        ),
        pytest.param(
            [
                sleeper("v0", "a", wanted=2, gpus=["0"]),
                sleeper("v1", "b", wanted=3, gpus=["0"]),
                sleeper("v2", "c", wanted=1, gpus=["1"]),
            ],
            [],
            [],
            ["v1", "v2"],
            id="who waited longest is first on each GPU",
        ),
        pytest.param(
            [
                sleeper("v0", "large", wanted=3, gpus=["0", "1"]),
                sleeper("v1", "b", "awake", gpus=["0"]),
                sleeper("v2", "c", wanted=1, gpus=["1"]),
            ],
            [],
            ["v1"],
            [],
            id="nobody takes a GPU that one before it waits for",
        ),
        pytest.param(
            [
                sleeper("v0", "a", gpus=["0"]),
                sleeper("v1", "a", "awake", gpus=["1"]),
                sleeper("v2", "b", "awake", idle=30, gpus=["0"]),
            ],
            [],
            [],
            [],
            id="a second replica takes nobody's turn",
        ),
    ],
)
def test_who_sleeps_and_who_wakes(
    call: Call, replicas: list[dict[str, Any]], due_models: list[str], sleep: list[str], wake: list[str]
) -> None:
    assert call("sleep", "decided", replicas, 60, due_models) == {"sleep": sleep, "wake": wake}
    # in whatever order they are listed
    turned = call("sleep", "decided", replicas[::-1], 60, due_models)
    assert {key: sorted(names) for key, names in turned.items()} == {"sleep": sorted(sleep), "wake": sorted(wake)}


SLEEPERS = st.lists(
    st.builds(
        lambda model, state, **said: sleeper("", model, state, **said),
        st.sampled_from("abc"),
        st.sampled_from(["awake", "closing", "asleep", "asleep", "waking", "unknown"]),
        seconds=st.integers(0, 99),
        idle=st.integers(0, 99),
        wanted=st.none() | st.integers(0, 9),
        gpus=st.lists(st.sampled_from("01"), unique=True),
        drained=st.booleans(),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(SLEEPERS, st.lists(st.sampled_from("abc")))
def test_no_two_that_share_a_gpu_are_awake_whatever_is_wanted(
    call: Call, replicas: list[dict[str, Any]], due_models: list[str]
) -> None:
    """And somebody who is wanted is on the way, unless those in its way have their turn or are about to be told."""
    for n, replica in enumerate(replicas):
        replica["name"] = f"v{n}"
    decided = call("sleep", "decided", replicas, 60, due_models)
    of = {replica["name"]: replica for replica in replicas}
    woken = [of[name] for name in decided["wake"]]
    assert not [one for one in woken if one["sleep"]["state"] != "asleep" or one["drained"]]
    assert not [name for name in decided["sleep"] if of[name]["sleep"]["state"] != "awake"]
    there = woken + [one for one in replicas if one["sleep"]["state"] != "asleep"]
    for one in woken:
        sharing = [other["name"] for other in there if {*one["sleep"]["gpus"]} & {*other["sleep"]["gpus"]}]
        assert sharing in ([], [one["name"]])
    wanted = [one for one in replicas if one["sleep"]["state"] == "asleep" and one["sleep"]["wanted"] is not None]
    if (
        wanted
        and all(one["sleep"]["state"] == "asleep" for one in replicas)
        and not any(one["drained"] for one in wanted)
    ):
        assert woken


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", '{"state": "up"}', '{"state": "awake", "gpus": "0"}'])
def test_an_odd_word_of_sleep_is_none(call: Call, text: str | None) -> None:
    assert call("sleep", "told", text) is None


# ---- body.js


def model(call: Call, body: str | bytes, content_type: str = "application/json") -> str:
    data = body.encode() if isinstance(body, str) else body
    found: str = call("body", "read", content_type, base64.b64encode(data).decode())["model"]
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
        {"a": "x" * 900_000, "messages": [{"content": '\\" "model":"x", \\\\'}], "model": "m", "b": "x" * 900_000},
        {"x": [{}] * 400_000, "model": "m", "y": [{}] * 400_000},
        {"x": [1.5] * 50_000, "metadata": {"a": [{"model": "x"}]}, "model": "m", "y": "x" * 50_000},
    ],
)
def test_the_model_of_a_body_too_long_to_parse_each_time(call: Call, body: dict[str, object]) -> None:
    assert model(call, json.dumps(body)) == "m"


@pytest.mark.parametrize("size", [1, 200_000])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_body_is_read_in_the_encodings_that_the_replica_reads(call: Call, encoding: str, size: int) -> None:
    assert model(call, json.dumps({"messages": "Ģ" * size, "model": "m"}, ensure_ascii=False).encode(encoding)) == "m"


def test_a_long_body_keeps_its_session_and_where_its_prompt_begins(call: Call) -> None:
    long = {
        "x": "y" * 700_000,
        "messages": [{"content": "z" * 700_000}],
        "prompt_cache_key": "k",
        "tools": [1],
        "model": "m",
    }
    found = call("body", "read", "application/json", base64.b64encode(json.dumps(long).encode()).decode())
    assert (found["model"], found["session"]) == ("m", "k")
    assert found["body"]["prompt"].startswith('[1][{"content": "zzz')


def quickest(call: Call, *cases: tuple[Any, ...]) -> list[float]:
    """The milliseconds that each of these calls takes, the least of ten. They take turns: a slow host slows all of
    them, and a busy one some of the ten."""
    rounds = [[call(module, "timed", *given)[1] for module, *given in cases] for _ in range(10)]
    return [min(taken) for taken in zip(*rounds, strict=True)]


def test_odd_heads_and_bodies_take_no_time(call: Call) -> None:
    """No odd one takes much longer than a plain one of its length; each took a worker 0.1 to 0.8 s."""
    body = base64.b64encode(b"x").decode()
    for length in (900, 15_000):
        heads = ["multipart/form-data; boundary=a" + filling * length + "x" for filling in "a "]
        plain, odd = quickest(call, *(("body", head, body) for head in heads))
        assert odd < 3 * plain, (plain, odd)
    parts: list[list[Any]] = [[[{}] * 40_000], [{}] * 40_000]
    plain, odd = quickest(call, *(("prefix", {"messages": [{"role": "user", "content": some}]}, "m") for some in parts))
    assert odd < 2 * plain, (plain, odd)
    spelt = ["%41", "%2541", "%25252541", "%ff"]
    plain, *odds = quickest(call, *(("door", (one * 16_000)[:16_000]) for one in ["a", *spelt]))
    assert max(odds) < 10 * plain, (plain, odds)
    assert {call("door", "timed", (one * 16_000)[:16_000])[0] for one in spelt} == {""}
    for key in ("api_key=", "%61pi_key=", "%2561pi%255Fkey%253D", "%ff&%61pi_key=%ff"):
        assert call("door", "timed", f"/?{key}")[0] == "url"


def test_parts_beyond_those_that_are_hashed_still_tell_prompts_apart(call: Call) -> None:
    def last_of(*parts: object) -> str:
        message = {"role": "user", "content": [{"type": "x", "n": n} for n in range(40)] + list(parts)}
        texts: list[str] = call("prefix", "cutsOf", {"messages": [message]}, "m")["texts"]
        return texts[-1]

    assert last_of({"text": "a"}) == last_of({"text": "a"})
    assert len({last_of(), last_of({"text": "a"}), last_of({"text": "b"}), last_of({"text": "a"}, {"text": "a"})}) == 4


UPLOAD = "multipart/form-data; boundary=b"
FILE = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n{}\r\n'


@pytest.mark.parametrize(
    "part",
    [
        pytest.param('Content-Disposition: form-data; name="model"', id="as most"),
        pytest.param(
            "Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name=model", id=".NET"
        ),
        pytest.param('Content-Disposition: form-data; name="model"\r\nContent-Length: 7', id="Spring"),
        pytest.param('content-disposition: form-data; name="model"\r\ncontent-type: text/plain', id="lower case"),
    ],
)
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_the_model_of_an_upload(call: Call, part: str, size: int) -> None:
    file = FILE.format('; name="model"\r\n\r\nother\r\n' + "x" * size)
    assert model(call, f"{file}--b\r\n{part}\r\n\r\nwhisper\r\n--b--\r\n", UPLOAD) == "whisper"
    assert model(call, f"--b\r\n{part}\r\n\r\nwhisper\r\n{file}--b--\r\n", UPLOAD) == "whisper"


def test_a_model_inside_another_part_is_none(call: Call) -> None:
    file = FILE.format('Content-Disposition: form-data; name="model"\r\n\r\nother')
    assert model(call, file + "--b--\r\n", UPLOAD) == ""
    assert model(call, FILE.replace("a.wav", "; name=model; ").format("x") + "--b--\r\n", UPLOAD) == ""


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
        *[
            (
                {name: "a", "messages": [{"role": "user", "content": "hi"}]},
                {name: "b", "messages": [{"role": "user", "content": "hi"}]},
            )
            for name in ("system", "instructions", "cache_salt", "tools")
        ],
        *[
            tuple(
                {"messages": [{"role": "user", "content": [{"type": kind, kind: {"data": data * 999}}]}]}
                for data in "ab"
            )
            for kind in ("image_url", "input_audio", "source", "tool_result")
        ],
        tuple({"messages": [{"role": "assistant", "content": "so", "tool_calls": [name]}]} for name in "ab"),
        tuple({"input": [{"role": "user", "content": "hi"}], "instructions": name} for name in "ab"),
        tuple({"input": [{"type": "function_call_output", "output": name}]} for name in "ab"),
    ],
)
def test_other_beginnings_have_other_keys(call: Call, one: dict[str, object], two: dict[str, object]) -> None:
    assert not set(keys(call, one)) & looked_up(call, two)


FIELDS = st.sampled_from(["a", "b", "c" * 1200, "d" * 1200])
FRONTS = st.dictionaries(st.sampled_from(["system", "instructions", "tools", "cache_salt"]), FIELDS)
PARTS = st.lists(st.dictionaries(st.sampled_from(["text", "data"]), FIELDS, min_size=1, max_size=1), max_size=2)
CONTENTS = FIELDS | PARTS
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": CONTENTS}), min_size=1, max_size=3
)


@settings(max_examples=100)
@given(FRONTS, FRONTS, MESSAGES, MESSAGES)
def test_bodies_share_their_end_only_where_all_before_it_is_the_same(
    call: Call, front: dict[str, str], other: dict[str, str], one: list[object], two: list[object]
) -> None:
    end = keys(call, {**front, "messages": one})[-1]
    assert end == keys(call, {"messages": one, "temperature": 1, **dict(reversed(front.items()))})[-1]
    begins_alike = front == other and two[: len(one)] == one
    assert (end in looked_up(call, {**other, "messages": two})) == begins_alike


def body_of(texts: list[str], front: dict[str, str]) -> str:
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return base64.b64encode(json.dumps({"model": "m", **front, "messages": messages}).encode()).decode()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 20_000) | st.sampled_from([0, 512, 1023, 1024, 1025, 2047, 2048, 2049, 4096]),
    *[st.integers(1, 20_000) | st.sampled_from([1, 64, 500, 2000])] * 2,
    st.sampled_from([["hi"], ["s" * 1200], ["s" * 3000, "u" * 1400, "a" * 5000]]),
    st.sampled_from(["abcdefgh", 'ab"\\\n{}[]:,', "ab\u00e9\u65e5"]),
    st.integers(0, 10**6),
)
def test_prompts_share_the_cuts_up_to_where_they_part(
    call: Call, common: int, more: int, other: int, before: list[str], letters: str, seed: int
) -> None:
    """Whatever their length, texts that agree for so many characters share each cut before that and none after."""

    rng = random.Random(seed)

    def written(count: int) -> str:
        return "".join(rng.choices(letters, k=count))

    start = written(common)
    one, two = start + "a" + written(more), start + "b" + written(other)
    found = [call("prefix", "cutsIn", body_of([*before, text], {"cache_salt": "t"})) for text in (one, two)]
    keys_of = [{key: at for at, _, key in cuts} for cuts in found]
    shared = keys_of[0].keys() & keys_of[1].keys()
    # A cut's place is told in the body's own bytes where the text is long, and there an escaped letter has several.
    parts = found[0][-1][0] - (len(one) + 1)
    assert shared
    first = [cut for cut in found[0] if cut[2] in shared]
    assert first == found[0][: len(first)]
    assert first == found[1][: len(first)]
    if json.dumps(one) == f'"{one}"':
        ends = parts + common
        assert [cut[0] for cut in first] == [at for at, _, _ in found[0] if at <= ends]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([1, 100, 1200, 3000]), st.lists(st.sampled_from([2, 400, 1400, 2500]), max_size=14))
def test_prompts_that_began_otherwise_share_nothing(call: Call, first: int, rest: list[int]) -> None:
    texts = ["x" * size for size in rest]
    one, two = (call("prefix", "cutsIn", body_of([letter * first, *texts], {})) for letter in "ab")
    assert len(one) == len(two)
    assert not {key for *_, key in one} & {key for *_, key in two}


def test_a_text_is_cut_alike_in_bodies_of_any_length(call: Call) -> None:
    """A conversation that grows beyond any threshold keeps its beginning."""
    texts = ["be brief", "x" * 2040, "y" * 2060]
    before: list[list[Any]] = []
    for n in range(40):
        cuts = call("prefix", "cutsIn", body_of(texts, {}))
        if before:
            assert before[-1] in [[at, kind | 1, key] for at, kind, key in cuts]
        before = cuts
        texts += [f"turn {n} " + "w" * (40 << min(n // 2, 9)), "z" * 30]
    assert len(body_of(texts, {})) > 500_000


def test_an_agents_request_is_cut_up_to_its_end(call: Call) -> None:
    """Codex' messages have parts of which some are long."""

    def cuts(*turns: str) -> list[list[Any]]:
        body = json.dumps(agent(*turns)).encode()
        found: list[list[Any]] = call("prefix", "cutsIn", base64.b64encode(body).decode())
        return found

    one, two = cuts("Say hello."), cuts("Say hello.", "Once more.")
    assert one[-1][2] in [key for *_, key in two]
    assert one[-1][0] > len(json.dumps(agent()["tools"], separators=(",", ":"))) + 24 * 700 + 22 * 100


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([1, 190, 500, 1200, 5000]), min_size=1, max_size=40), min_size=1, max_size=4))
def test_a_prompt_is_as_long_as_its_parts(call: Call, sizes: list[list[int]]) -> None:
    messages = [{"role": "user", "content": [{"text": "x" * size} for size in parts]} for parts in sizes]
    body = base64.b64encode(json.dumps({"model": "m", "messages": messages}).encode()).decode()
    cuts = call("prefix", "cutsIn", body)
    places = [at for at, *_ in cuts]
    assert places == sorted(places)
    # Beyond 32 parts a message's rest is one piece of JSON. Each part ends with a mark, and so does each message.
    rests = [json.dumps(message["content"][32:], separators=(",", ":")) for message in messages]
    parts = sum(sum(parts[:32]) + len(parts[:32]) + 1 for parts in sizes)
    assert places[-1] == parts + sum(len(rest) for rest in rests if rest != "[]")


def test_bodies_that_come_at_once_do_not_mix(call: Call) -> None:
    """One is looked at before the next is read: texts.js knows only of the last whether it has long texts."""

    def body(size: int) -> str:
        tools = [{"description": "x" * size}, *[{"description": "y" * 500}] * 4]
        # a prompt that nobody knows, of the same length each time
        asked = {"model": "sim", "cache_salt": secrets.token_hex(8), "tools": tools, "messages": [{"content": "hi"}]}
        return base64.b64encode(json.dumps(asked).encode()).decode()

    sizes = [5000, 10, 3000, 10]
    alone = [call("route", "chosen", [body(size)])[0] for size in sizes]
    assert alone[0] - alone[1] == 5000 - 10
    assert call("route", "chosen", [body(size) for size in sizes]) == alone


def test_what_a_client_writes_is_no_stand_in(call: Call) -> None:
    """Only the gateway knows how stand-ins begin."""
    sent = json.dumps({"model": "m", "messages": [{"role": "user", "content": "long " * 1000}]})
    found = call("body", "read", "application/json", base64.b64encode(sent.encode()).decode())
    content: str = found["body"]["messages"][0]["content"]
    assert len(content) < 1500
    assert content.endswith(".5000")
    forged = "~" + "A" * 22 + content[23:]
    assert call("texts", "lengthOf", content) == 5000
    assert call("texts", "lengthOf", forged) == len(forged)
    named = json.dumps({"model": "m" * 5000, "messages": []}).encode()
    assert call("body", "read", "application/json", base64.b64encode(named).decode())["model"] == ""


@pytest.mark.parametrize(
    "piece", ['"",', '\\"', "\\\\", '"' + "x" * 2050 + '",', '"' + "x" * 90 + '",', '\\"' + "x" * 60, "{},", "x"]
)
def test_looking_for_long_texts_holds_up_nobody(call: Call, piece: str) -> None:
    body = ('{"a":["' + piece * (MIB // len(piece)))[:MIB].encode()
    runs = [call("texts", "timed", base64.b64encode(body).decode(), "base64") for _ in range(3)]
    assert min(ms for _, ms in runs) < 50, runs


def test_many_messages_hold_up_nobody(call: Call) -> None:
    body = json.dumps({"model": "m", "messages": [{}] * 43_000}, separators=(",", ":")).encode()
    found, ms = call("body", "timed", "application/json", base64.b64encode(body).decode())
    assert found["model"] == "m"
    assert ms < 50
    runs = [call("prefix", "timed", {"messages": [{}] * 43_000}, "m")[1] for _ in range(5)]
    assert min(runs) < 10, runs


def test_every_prompt_of_a_batch_is_work(call: Call) -> None:
    assert call("prefix", "cutsOf", {"prompt": ["a" * 10, "b" * 100, [1, 2]]}, "m")["more"] == 108


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


def filtered(
    call: Call,
    chunks: list[bytes],
    lost: int = -1,
    content_type: str = "text/event-stream",
    uri: str = "/v1/chat/completions",
    sent: int = 0,
    wants: str = "",
) -> bytes:
    """What passes of these chunks; `lost`: the one at which the replica was; `sent`: bytes that the client read;
    `wants`: what it asked for of usage.
    """
    encoded = [base64.b64encode(chunk).decode() for chunk in chunks]
    return base64.b64decode(call("stream", "filtered", content_type, encoded, lost, uri, sent, wants))


@given(st.lists(st.binary(max_size=50) | st.text("a\r\n", max_size=9).map(str.encode), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
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


@given(
    st.lists(st.sampled_from(["data: a", "event: b\ndata: c", ": d", "id: 1\r\ndata: e"]), max_size=5),
    st.sampled_from(["\n\n", "\r\n\r\n"]),
    st.text("da: \n\r", max_size=8).filter(lambda text: not text.startswith(("\n", "\r"))),
    st.lists(st.integers(0, 80), max_size=8),
    st.sampled_from(["/v1/chat/completions", "/v1/messages", "/v1/responses"]),
)
@settings(max_examples=150, deadline=None)
def test_a_cut_leaves_whole_events_only_however_they_came(
    call: Call, events: list[str], blank: str, half: str, cuts: list[int], uri: str
) -> None:
    half = half.replace("\n\n", "\n").replace("\n\r\n", "\n").replace("\n\n", "\n")
    whole = "".join(event + blank for event in events)
    stream = (whole + half).encode()
    at = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[start:end] for start, end in itertools.pairwise(at)]
    passed = filtered(call, [*chunks, b""], lost=len(chunks), uri=uri).decode()
    assert passed.startswith(whole)
    assert passed[len(whole) :].startswith(("event: error\n", "event: response.failed\n", 'data: {"error"'))


@pytest.mark.parametrize("size", [300_000, 3_000_000])
def test_an_event_too_long_to_hold_passes_as_it_came(call: Call, size: int) -> None:
    stream = b"data: a\n\ndata: " + b"x" * size + b"\n\ndata: b\n\n"
    chunks = [stream[at : at + 8192] for at in range(0, len(stream), 8192)]
    assert filtered(call, [*chunks, b""]) == stream + b"<last>"
    assert filtered(call, [*chunks[:-2], b""], lost=len(chunks) - 2) == b"".join(chunks[:-2])


def test_a_client_that_does_not_read_is_left_to_nginx(call: Call) -> None:
    """njs' own buffers grow without end, so it steps aside: then the error event is lost with the replica."""
    chunks = [b"data: " + b"x" * 8000 + b"\n\n"] * 70
    assert filtered(call, [*chunks, b""], lost=70, wants="all") == b"".join(chunks)
    assert filtered(call, [*chunks, b""], lost=70, wants="all", sent=500_000).endswith(b"}}\n\n")
    # Later where usage has to be taken out.
    assert filtered(call, [*chunks, b""], lost=70).endswith(b"}}\n\n")
    chunks = [b"data: " + b"x" * 64_000 + b"\n\n"] * 80
    assert filtered(call, [*chunks, b""], lost=80) == b"".join(chunks)


def test_a_lost_stream_speaks_the_dialect_of_its_api(call: Call) -> None:
    def events(uri: str) -> list[tuple[str, Any]]:
        text = filtered(call, [b"data: a\n\n", b""], lost=1, uri=uri).decode().removeprefix("data: a\n\n")
        return [(kind, json.loads(data)) for kind, data in re.findall(r"(?:event: (\S+)\n)?data: (.*)\n\n", text)]

    [(kind, error)] = events("/v1/messages")
    assert (kind, error["type"], error["error"]["type"]) == ("error", "error", "api_error")
    assert "r1" in error["error"]["message"]
    [(first, failed), (second, error)] = events("/v1/responses")
    assert (first, failed["type"], failed["response"]["status"]) == ("response.failed", "response.failed", "failed")
    assert failed["response"]["error"]["message"] == error["message"]
    assert (second, error["type"], error["code"], error["error"]["code"]) == (
        "error",
        "error",
        "stream_lost",
        "stream_lost",
    )


def test_a_stream_that_was_redirected_begins_like_others(call: Call) -> None:
    """As with a long body or one of unknown length."""
    assert call("stream", "toCompute", None, ["data: a\n\n"], True) == [0, 0]
    assert call("stream", "toCompute", "1", [": wait\n\n", "data: a\n\n"], True) == [500, 500, 0]


def test_a_comment_is_no_sign_that_the_prompt_is_computed(call: Call) -> None:
    comment, opening, token = ": wait\n\n", "event: response.created\ndata: {}\n\n", "data: a\n\n"
    assert call("stream", "toCompute", None, [token]) == [0, 0]
    assert call("stream", "toCompute", "1", [comment, comment, token]) == [500, 500, 500, 0]
    assert call("stream", "toCompute", "1", [opening + comment, ": wa", "it\n\n", token]) == [500, 500, 500, 500, 0]
    assert call("stream", "toCompute", "1", [comment + token, comment]) == [500, 0, 0]


def test_what_is_no_stream_is_left_alone(call: Call) -> None:
    assert filtered(call, [b'{"a":', b"1}", b""], lost=2, content_type="application/json") == b'{"a":1}'


# ---- settings.js


def test_settings_have_safe_defaults(call: Call) -> None:
    found = call("settings")
    known = {"policy": "prefix", "auth": "loopback", "hosts": [], "origins": [], "bodies": 1 << 30, "complaint": ""}
    assert {name: found[name] for name in known} == known


# ---- keys.js


@pytest.mark.parametrize("bad", BAD)
def test_a_wrong_file_of_keys_is_named(call: Call, bad: str) -> None:
    assert call("keys", "complaint", bad)


def test_a_right_file_of_keys_gives_each_hash_its_holder(call: Call) -> None:
    limits = {"requests_per_minute": 60, "n": 0}
    text = keys_file(
        entry("a", "one", "two", until_s=5, limits=limits),
        roles={"user": {"limits": {"n": 2, "requests_per_minute": 9}}},
    )
    assert call("keys", "complaint", text) == ""
    holders = call("keys", "parse", text)["holders"]
    assert [holder["until"] for holder in holders.values()] == [None, 5]
    # The key's own limit counts before the role's, and a zero is a zero.
    assert all(holder["limits"] == {"requests_per_minute": 60, "n": 0} for holder in holders.values())


# ---- usage.js


def event(data: dict[str, Any], name: str = "") -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def response(kind: str, usage: dict[str, int] | None, tools: object = None) -> str:
    return event({"response": {"tools": tools, "usage": usage, "user": None}, "type": kind}, kind)


FORGED = [{"type": "function", "parameters": {"usage": {"prompt_tokens": -(10**6), "input_tokens": 0}}}]


def test_a_clients_own_words_are_no_usage(call: Call) -> None:
    """A response repeats the client's tools in its first events and in its last."""
    stream = [response("response.created", None, FORGED), response("response.output_text.delta", None)]
    assert call("usage", "metered", "/v1/responses", "", stream)["used"] is None
    line = 'event: response.completed\ndata: {"response":{"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
    told = [*stream, event({"delta": line}, "response.output_text.delta")]
    assert call("usage", "metered", "/v1/responses", "", told)["used"] is None
    for kind in ("response.completed", "response.incomplete", "response.failed"):
        ended = [*stream, response(kind, {"input_tokens": 7, "output_tokens": 5}, FORGED)]
        for pieces in (ended, ["".join(ended)]):
            found = call("usage", "metered", "/v1/responses", "", pieces)["used"]
            assert found == {"prompt": 7, "cached": 0, "completion": 5}


@pytest.mark.parametrize("wrong", [-5, 0.5, "7", None, 1e300, [1], True])
@pytest.mark.parametrize(
    ("uri", "prompt", "completion"),
    [
        ("/v1/chat/completions", "prompt_tokens", "completion_tokens"),
        ("/v1/messages", "input_tokens", "output_tokens"),
        ("/v1/responses", "input_tokens", "output_tokens"),
    ],
)
def test_what_is_no_count_of_tokens_is_dropped(
    call: Call, uri: str, prompt: str, completion: str, wrong: object
) -> None:
    def found(usage: dict[str, object]) -> Any:
        kind = "response.completed"
        data = {"response": {"usage": usage}} if uri == "/v1/responses" else {"choices": [], "usage": usage}
        return call("usage", "metered", uri, "", [event(data, kind)])["used"]

    assert found({prompt: 0, completion: 0}) == {"prompt": 0, "cached": 0, "completion": 0}
    assert found({prompt: 7, completion: wrong}) == {"prompt": 7, "cached": 0, "completion": 0}
    assert found({prompt: wrong, completion: 7}) is None
    others = {"prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"} - {prompt, completion}
    assert found({prompt: 7, completion: 5, **dict.fromkeys(others, 100)}) == {
        "prompt": 7,
        "cached": 0,
        "completion": 5,
    }


def test_every_prompt_of_a_list_that_its_client_left_is_counted_once(call: Call) -> None:
    def chunk(index: int, prompt: int, made: int) -> str:
        usage = {"prompt_tokens": prompt, "completion_tokens": made}
        return event({"choices": [{"index": index, "text": "x"}], "usage": usage})

    # Three prompts with two answers each, of which the last has not begun.
    pieces = [chunk(index, 10 * (1 + index // 2), made) for made in (1, 2, 3) for index in range(5)]
    for wants in (pieces, ["".join(pieces)]):
        found = call("usage", "metered", "/v1/completions", "2", wants)["used"]
        # the engine counts a prompt once for each of its answers
        assert found == {"prompt": 60, "cached": 0, "completion": 15, "repeated": 60}
    assert call("usage", "many", "/v1/completions", {"prompt": ["a", "b"]}) == "1"
    assert call("usage", "many", "/v1/completions", {"prompt": "a", "n": "3"}) == "3"
    for odd in (3, "2_0", {"toString": 1}):  # of one prompt, however many they are
        assert int(call("usage", "many", "/v1/chat/completions", {"n": odd})) >= 3
    assert call("usage", "many", "/v1/chat/completions", {"n": 1}) == ""


@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n"])
def test_no_text_goes_with_the_usage_that_is_taken_out(call: Call, blank: str) -> None:
    chunk = 'data: {"choices":[{"index":0,"delta":{"content":"a"}}],"usage":{"prompt_tokens":1}}' + blank
    last = 'data: {"choices":[],"usage":{"prompt_tokens":1}}' + blank
    done = "data: [DONE]" + blank
    passed = call("usage", "metered", "/v1/chat/completions", "", [chunk + chunk + last + done])["passed"]
    plain = chunk.replace(',"usage":{"prompt_tokens":1}', "")
    assert passed == plain + plain + (last if "\r" in blank else "") + done


WORDS = st.sampled_from(["a", "\u65e5", '","usage":{', '{"usage":{}}', '\\n\\n,"usage":{"a":1}}', "[]", "x" * 40])
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}}


@given(
    st.lists(st.tuples(WORDS, st.booleans()), max_size=5),
    st.sampled_from(["", "last", "all"]),
    st.lists(st.integers(0, 1500), max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_usage_is_taken_out_however_a_stream_comes_in_pieces(
    call: Call, words: list[tuple[str, bool]], wants: str, cuts: list[int]
) -> None:
    """A client gets the usage that it asked for and nothing else is lost, whatever the words of the answer."""
    stream, expected = "", ""
    for word, finishes in words:
        choice = {"index": 0, "delta": {"content": word}, "finish_reason": "stop" if finishes else None}
        chunk = {"id": "1", "choices": [choice]}
        stream += event({**chunk, "usage": USAGE})
        expected += event({**chunk, "usage": USAGE} if wants == "all" else chunk)
    last = event({"id": "1", "choices": [], "usage": USAGE})
    stream += last + "data: [DONE]\n\n"
    expected += (last if wants else "") + "data: [DONE]\n\n"
    whole = stream.encode()
    at = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    chunks = [whole[start:end] for start, end in itertools.pairwise(at)]
    assert filtered(call, [*chunks, b""], wants=wants).decode() == expected + "<last>"


# ---- ed25519.js


def test_signatures_of_ed25519_are_told_from_all_others(call: Call) -> None:
    """Against another implementation; each bit of one signature, and what RFC 8032 says to refuse."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    good = [(public, key.sign(message), message) for message in (b"", b"x", secrets.token_bytes(1000))]
    _, signature, message = good[1]
    flipped = [bytes([*signature[:n], signature[n] ^ 1 << n % 8, *signature[n + 1 :]]) for n in range(64)]
    order = 2**252 + 27742317777372353535851937790883648493
    again = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    bad = [
        *((public, one, message) for one in flipped),
        (public, signature, message + b"x"),
        (other, signature, message),
        (public, again, message),
        (public, signature[:63], message),
        (public, signature + b"x", message),
        (public, b"", message),
        (b"", signature, message),
        # numbers that are no points: too large, and without a root
        (public, b"\xff" * 32 + signature[32:], message),
        (b"\xff" * 32, signature, message),
        ((2).to_bytes(32, "little"), signature, message),
    ]
    found, took_ms = call("ed25519", "signatures", [[part.hex() for part in row] for row in good + bad])
    assert found == [True] * len(good) + [False] * len(bad)
    assert took_ms < 50


# ---- objectives.js


@pytest.mark.parametrize(
    ("value", "kept"),
    [(0.25, 2), (0.5, 4), (1, 10), (2, 18), (2.5, 22), (1.75, 16), (9, 22), (0, 0)],
)
def test_what_keeps_an_objective_is_interpolated_between_bounds(call: Call, value: float, kept: float) -> None:
    """Beyond the last bound nobody knows how slow they were: they are late."""
    assert call("objectives", "within", {"Infinity": 30, "2.5": 22, "1": 10, "0.5": 4}, value) == kept


def test_both_latencies_of_a_replica_are_held_against_its_objective(call: Call) -> None:
    """Over all of its engines."""
    text = "".join(
        f'vllm:{name}_seconds_bucket{{engine="{engine}",le="{le}",model_name="m"}} {count}\n'
        for engine in (0, 1)
        for name, counts in (
            ("time_to_first_token", {"1.0": 3, "2.5": 6, "+Inf": 8}),
            ("inter_token_latency", {"0.1": 50, "0.15": 60, "+Inf": 60}),
        )
        for le, count in counts.items()
    )
    aim = {"ttft_p95_seconds": 2.5, "itl_p95_seconds": 0.1, "availability": 0.999}
    assert call("health", "parse", text, aim)["timely"] == {"ttft_p95_seconds": [12, 16], "itl_p95_seconds": [100, 120]}
