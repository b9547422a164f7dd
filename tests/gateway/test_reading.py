"""What the gateway reads out of a body is what the replica reads: held against Python's json and Starlette's forms."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas

Read = Callable[..., dict[str, Any]]

# They stand for so much that a body is longer than any threshold and piece of the reader.
LONG = "LONG"
MANY = "MANY"


def written_out(text: str, long: int, many: int = 0) -> str:
    """The text with `long` letters for the first LONG and `many` empty objects for the first MANY, fewer for others."""
    once = text.replace(LONG, "y" * long, 1).replace(MANY, "{}," * many, 1)
    return once.replace(LONG, "y" * (long % 999)).replace(MANY, "{}," * (many % 99))


@pytest.fixture(scope="module")
def read() -> Iterator[Read]:
    """`read(type, body)`: what body.js reads."""
    with Replicas(1) as replicas:
        server = (
            f"js_import calls from calls.js; server {{ listen {replicas.gateway_host}:8089;"
            " location / { client_max_body_size 8m; js_content calls.call; } }"
        )
        calls = Path(__file__).with_name("calls.js").read_bytes()
        with (
            Gateway(replicas, files={"fleet/calls.conf": server.encode(), "njs/calls.js": calls}),
            httpx.Client(timeout=60) as client,
        ):

            def ask(content_type: str, body: bytes) -> dict[str, Any]:
                arguments = [content_type, base64.b64encode(body).decode()]
                asked = {"module": "body", "name": "read", "arguments": arguments}
                answer = client.post(f"http://{replicas.gateway_host}:8089/", content=json.dumps(asked))
                assert answer.status_code == 200, answer.text
                found: dict[str, Any] = answer.json()
                return found

            yield ask


# ---- JSON

BLANK = st.sampled_from(["", "", " ", "\r\n", "\t"])
TEXT = st.lists(
    st.sampled_from(
        ["a", "model", '\\"', "\\\\", "\\u006d", "\\/", "{", "}", "[", "]", ",", ":", "é", "日", "𝄞", LONG]
    ),
    max_size=5,
).map(lambda parts: f'"{"".join(parts)}"')
NAMES = st.sampled_from(
    ['"model"', '"model"', '"\\u006dodel"', '"mo\\u0064el"', '"prompt_cache_key"', '"messages"', '"Model"', '"x"']
)
SCALARS = st.sampled_from(["1", "-1.5e3", "null", "true", "NaN", "-Infinity", f"[{MANY}[]]"])


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.builds("{0}{1}{0}:{0}{2}{0}".format, BLANK, NAMES | TEXT, values)
    return st.lists(pairs, max_size=5).map(lambda inner: f"{{{','.join(inner)}}}")


VALUES = st.recursive(
    TEXT | SCALARS, lambda inner: objects(inner) | st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]")
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    objects(VALUES),
    # Around the ends of pieces, and beyond what is parsed.
    st.integers(65_400, 65_600) | st.integers(0, 200) | st.sampled_from([140_000, 1_100_000]),
    st.integers(21_780, 21_850) | st.integers(0, 3) | st.just(50_000),
    st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]),
)
@example('{"a":{"model":"x"},"b":"LONG\\"model\\":\\"y\\"","model":"m"}', 1_100_000, 0, "utf-8")
@example('{"model":"m","x":[MANY[]],"model":1}', 0, 50_000, "utf-8")
@example('{"x":"LONG","\\u006dodel":"m","y":[MANY[]]}', 65_520, 50_000, "utf-16-be")
def test_model_and_session_are_what_python_reads(read: Read, text: str, long: int, many: int, encoding: str) -> None:
    written = written_out(text, long, many)
    body = written.encode(encoding)
    found = read("application/json", body)
    value = json.loads(body)
    for field, name in (("model", "model"), ("session", "prompt_cache_key")):
        wanted = value.get(name)
        if not isinstance(wanted, str):
            wanted = ""
        # A name so long that nothing has it may be left out.
        assert found[field] == wanted or (found[field] == "" and len(wanted) > 30_000)


@pytest.mark.parametrize("size", [0, 2_000_000])
@pytest.mark.parametrize(
    ("written", "number"),
    [("5", 5), (" 2e3 ", 2000), ('7,"n":8', 8), ('"7"', None), ('"2_0"', None), ("[5]", None), ('1,"n":null', None)],
)
def test_the_numbers_that_limits_go_by_are_read(read: Read, written: str, number: int | None, size: int) -> None:
    for body in (f'{{"n":{written}}}', f'{{"n":{written},"x":1}}'):
        text = body.replace("{", f'{{"y":"{"y" * size}",', 1)
        found = read("application/json", text.encode())["body"].get("n")
        assert (found if isinstance(found, int) else None) == number


@pytest.mark.parametrize("size", [0, 300_000, 2_000_000])
def test_half_of_a_body_names_no_model(read: Read, size: int) -> None:
    assert read("application/json", b'{"model":"m","x":"' + b"y" * size)["model"] == ""


# ---- uploads


def replica_reads(content_type: str, body: bytes) -> str | None:
    """The model that the replica's own reader finds: '' if none, None where it refuses the upload or finds a file."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    logging.getLogger("python_multipart").setLevel(logging.ERROR)

    async def form() -> str | None:
        try:
            found = await MultiPartParser(Headers({"Content-Type": content_type}), stream()).parse()
        except MultiPartException:
            return None
        model = found.get("model", "")
        await found.close()
        return model if isinstance(model, str) else None

    return asyncio.run(form())


NO_TEXT = "\udcff"  # the byte 0xFF
PARAMETERS = st.sampled_from(
    [
        "form-data",
        " name=model",
        ' name="model"',
        ' NAME="model"',
        ' name="file"',
        ' filename="a.wav"',
        ' filename="a;name=model"',
        ' filename="a\\"; name="model"',
        ' filename="C:\\"',
        f' filename="{NO_TEXT * 8}"',
        ' filename="caf\udce9"',
        " filename*=utf-8''a",
        " name*=utf-8''model",
        " name = model",
        ' name="mo\\del"',
        " name=<model>",
        "",
    ]
)
DISPOSITION = st.lists(PARAMETERS, min_size=1, max_size=4).map(lambda parts: f"Content-Disposition: {';'.join(parts)}")
USUAL = st.sampled_from(
    [
        'Content-Disposition: form-data; name="model"',
        'content-disposition: form-data; name="file"; filename="a.wav"',
        "Content-Disposition: form-data; name=model",
        "Content-Disposition: form-data; name=file; filename=a.wav; filename*=utf-8''a.wav",
    ]
)
HEADERS = (
    USUAL | DISPOSITION | st.sampled_from(["Content-Type: text/plain", "Content-Length: 3", " folded", "X", "A\nB: c"])
)
DATA = st.lists(
    st.sampled_from(["a", "whisper", "--b", "\r\n", "\r", "\r\n--b", "\r\n--bc\r\n", "--", " ", "é", LONG]), max_size=4
).map("".join)
PART = st.builds(
    lambda heads, data, end: "\r\n".join(heads) + "\r\n\r\n" + data + end,
    st.lists(HEADERS, min_size=1, max_size=2) | USUAL.map(lambda head: [head]),
    DATA,
    st.sampled_from(["\r\n--b\r\n"] * 6 + ["\r\n--b--\r\n", "\r\n--b", "\r\n--b \r\n", "\r\n--b--", "--b\r\n"]),
)


# Starlette does not close the file of a part that never ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["--b\r\n"] * 8 + ["\r\n--b\r\n", "x--b\r\n", "\r\nx--b\r\n", "--b \r\n", "--b--\r\n"]),
    st.lists(PART, min_size=1, max_size=4),
    st.integers(65_400, 65_600) | st.integers(0, 9),
    st.sampled_from(["b", "b", '"b"', "b; charset=utf-8", "b; charset=utf-16", "b; boundary=c", "b; x=y", "b ;"]),
)
@example(
    "--b\r\n",
    [
        'Content-Disposition: form-data; name="model"\r\n\r\nsim\r\n--b\r\n',
        f'Content-Disposition: form-data; name="x"; filename="{NO_TEXT * 60}"\r\n\r\n\r\n--b\r\n',
        'Content-Disposition: form-data; name="model"\r\n\r\nother\r\n--b--\r\n',
    ],
    0,
    "b",
)
def test_the_model_of_an_upload_is_what_the_replica_reads(
    read: Read, start: str, parts: list[str], long: int, boundary: str
) -> None:
    # Bytes that are no UTF-8 have three bytes each once they are read as text.
    body = written_out(start + "".join(parts), long).encode(errors="surrogateescape")
    content_type = f"multipart/form-data; boundary={boundary}"
    found = read(content_type, body)
    wanted = replica_reads(content_type, body)
    if "unreadable" not in found and wanted is not None:
        # A name so long that nothing has it may be left out.
        assert found["model"] == wanted or (found["model"] == "" and len(wanted) > 4000)


@pytest.mark.parametrize(
    "head", ['Content-Disposition: form-data; name="model"', "content-disposition:form-data;name=model"]
)
def test_what_clients_write_is_never_unreadable(read: Read, head: str) -> None:
    parts = [
        'Content-Disposition: form-data; name="file"; filename="a \\"b\\" é.wav"\r\nContent-Type: a/wav\r\n\r\nLONG',
        "Content-Disposition: form-data; name=file; filename=a.wav; filename*=utf-8''a.wav\r\n\r\nLONG",
        f"{head}\r\n\r\nwhisper",
    ]
    body = "".join(f"--b\r\n{part}\r\n" for part in parts) + "--b--\r\n"
    found = read("multipart/form-data; boundary=b", written_out(body, 150_000).encode())
    assert found["model"] == "whisper"
    assert "unreadable" not in found
