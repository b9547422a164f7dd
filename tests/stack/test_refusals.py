"""Requests that cannot be served: each is refused with the right status, in OpenAI's shape of an error."""

import http.client
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import requests

from lab.stack import Stack

MESSAGES = [{"role": "user", "content": "Hello"}]


def assert_refused(answer: requests.Response, status: int) -> dict[str, Any]:
    """Check status and shape, and return the error itself."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["X-Request-Id"]
    error: dict[str, Any] = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def test_unknown_model(stack: Stack, client: openai.OpenAI) -> None:
    """A model that nobody serves: 404, which names the models there are, and OpenAI's client says NotFoundError."""
    answer = requests.post(
        f"{stack.url}/v1/chat/completions",
        json={"model": "no-such-model", "messages": MESSAGES},
        headers=stack.headers,
        timeout=30,
    )
    error = assert_refused(answer, 404)
    assert "no-such-model" in error["message"]
    assert stack.model in error["message"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="Hello", max_tokens=1)


@pytest.mark.parametrize("body", ["{", "", "[]", '"text"', '{"model": '], ids=["open", "empty", "list", "text", "cut"])
def test_bad_json(stack: Stack, body: str) -> None:
    """A body that is no JSON object: 400."""
    answer = requests.post(
        f"{stack.url}/v1/chat/completions",
        data=body.encode(),
        headers={**stack.headers, "Content-Type": "application/json"},
        timeout=30,
    )
    assert_refused(answer, 400)


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": -1}, {"temperature": "hot"}, {"messages": "Hello"}, {"messages": []}, {"top_p": 7}, {"n": 0}],
    ids="-".join,
)
def test_bad_parameter(stack: Stack, wrong: dict[str, Any]) -> None:
    """A parameter of the wrong type or out of its range: 400."""
    body = {"model": stack.model, "messages": MESSAGES, "max_tokens": 1} | wrong
    assert_refused(requests.post(f"{stack.url}/v1/chat/completions", json=body, headers=stack.headers, timeout=30), 400)


def test_too_long_a_prompt(stack: Stack) -> None:
    """A prompt longer than the model's context: 400, which names that length."""
    length = requests.get(f"{stack.url}/v1/models", headers=stack.headers, timeout=10).json()["data"][0][
        "max_model_len"
    ]
    body = {"model": stack.model, "prompt": "word " * (length + 10), "max_tokens": 1}
    error = assert_refused(
        requests.post(f"{stack.url}/v1/completions", json=body, headers=stack.headers, timeout=30), 400
    )
    assert str(length) in error["message"]


def test_too_big_a_body(stack: Stack) -> None:
    """A body of a gigabyte: 413 as soon as its length is announced."""
    connection = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    for header in stack.headers.items():
        connection.putheader(*header)
    connection.putheader("Content-Length", str(2**30))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert b'"error"' in answer.read()
    connection.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/chat/completions"), ("PUT", "/v1/completions"), ("DELETE", "/v1/models"), ("GET", "/tokenize")],
)
def test_wrong_method(stack: Stack, method: str, path: str) -> None:
    """A path that exists, asked with a method that it does not have: 405."""
    assert_refused(requests.request(method, stack.url + path, headers=stack.headers, timeout=10), 405)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v2/chat/completions", "/v1/chat/completions/7"])
def test_wrong_path(stack: Stack, path: str) -> None:
    """A path that does not exist: 404."""
    assert_refused(requests.post(stack.url + path, json={}, timeout=10), 404)


def test_refusal_names_the_request(stack: Stack) -> None:
    """The gateway's own errors name the request, by the client's id where it sent one."""
    answer = requests.get(f"{stack.url}/v1/nothing", headers={"X-Request-Id": "from-the-client-17"}, timeout=10)
    error = assert_refused(answer, 404)
    assert answer.headers["X-Request-Id"] == "from-the-client-17"
    assert "from-the-client-17" in error["message"]
