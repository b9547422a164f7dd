"""Chat completions through the gateway, as OpenAI's client sees them."""

import json

import jsonschema
import openai
import pytest
from openai.types.chat import (
    ChatCompletionMessageParam,
    ChatCompletionToolChoiceOptionParam,
    ChatCompletionToolParam,
)

from lab.stack import Stack
from tests.stack.conftest import counted

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name three colours of the rainbow."}]

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_models(stack: Stack, client: openai.OpenAI) -> None:
    """The list of models names the served model with its context length."""
    models = client.models.list().data
    assert [model.id for model in models] == [stack.model]
    assert models[0].object == "model"
    assert client.models.retrieve(stack.model).id == stack.model


def test_whole(stack: Stack, client: openai.OpenAI) -> None:
    """A whole answer has text, a reason to end, the model's name and a usage that adds up."""
    answer = client.chat.completions.create(model=stack.model, messages=MESSAGES, max_tokens=8, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.model == stack.model
    assert answer.usage
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_streamed(stack: Stack, client: openai.OpenAI) -> None:
    """A streamed answer comes in pieces that join to the text of the whole one, and ends with its usage."""
    whole = client.chat.completions.create(model=stack.model, messages=MESSAGES, max_tokens=12, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=stack.model,
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]
    assert counted(chunks[-1].usage) == counted(whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_comes_as_it_is_made(stack: Stack, client: openai.OpenAI) -> None:
    """The gateway holds nothing back: at the first piece the replica still makes the rest."""
    stream = client.chat.completions.create(
        model=stack.model, messages=MESSAGES, max_tokens=64, stream=True, extra_body={"ignore_eos": True}
    )
    with stream:
        next(iter(stream))
        running = sum(replica["in_flight"] for replica in stack.replicas().values())
        rest = sum(1 for _ in stream)
    assert running >= 1
    assert rest > 32


def test_stop(stack: Stack, client: openai.OpenAI) -> None:
    """A stop string ends the answer before it."""
    free = client.chat.completions.create(model=stack.model, messages=MESSAGES, max_tokens=16, temperature=0)
    text = free.choices[0].message.content or ""
    stop = text[len(text) // 2 :][:3]
    stopped = client.chat.completions.create(
        model=stack.model, messages=MESSAGES, max_tokens=16, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == text[: text.index(stop)]


def test_seed(stack: Stack, client: openai.OpenAI) -> None:
    """At a high temperature the same seed gives the same text and another seed another."""

    def answer(seed: int) -> str | None:
        made = client.chat.completions.create(
            model=stack.model, messages=MESSAGES, max_tokens=12, temperature=1.2, seed=seed
        )
        return made.choices[0].message.content

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in (7, 8, 9)}) > 1


def test_temperature_zero(stack: Stack, client: openai.OpenAI) -> None:
    """Temperature 0 gives the same text each time."""
    texts = {
        client.chat.completions.create(model=stack.model, messages=MESSAGES, max_tokens=12, temperature=0)
        .choices[0]
        .message.content
        for _ in range(2)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}], ids=["top_k", "top_p"])
def test_narrow_sampling(stack: Stack, client: openai.OpenAI, narrow: dict[str, float]) -> None:
    """top_k = 1 and a tiny top_p leave only the likeliest token at each step, whatever the temperature."""

    def shortfalls(body: dict[str, float]) -> list[float]:
        """How much less likely each token was than the likeliest one (two tokens may be just as likely)."""
        answer = client.chat.completions.create(
            model=stack.model,
            messages=MESSAGES,
            max_tokens=12,
            temperature=1.5,
            logprobs=True,
            top_logprobs=2,
            extra_body=body,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs
        tokens = logprobs.content or ()
        return [max(other.logprob for other in token.top_logprobs) - token.logprob for token in tokens]

    assert max(shortfalls(narrow)) == pytest.approx(0, abs=1e-6)
    assert max(shortfalls({})) > 0


def test_beam_search(stack: Stack, client: openai.OpenAI) -> None:
    """Beam search gives as many different answers as it has beams."""
    answer = client.chat.completions.create(
        model=stack.model, messages=MESSAGES, max_tokens=6, n=3, temperature=0, extra_body={"use_beam_search": True}
    )
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_several_answers(stack: Stack, client: openai.OpenAI) -> None:
    """n = 3 gives three numbered answers, not all the same, whole and streamed."""
    answer = client.chat.completions.create(
        model=stack.model, messages=MESSAGES, max_tokens=8, n=3, temperature=1.2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    stream = client.chat.completions.create(model=stack.model, messages=MESSAGES, max_tokens=4, n=3, stream=True)
    assert {choice.index for chunk in stream for choice in chunk.choices} == {0, 1, 2}


def test_logprobs(stack: Stack, client: openai.OpenAI) -> None:
    """Each token comes with its log probability and those of the likeliest others, the best first."""
    answer = client.chat.completions.create(
        model=stack.model, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        likeliest = [other.logprob for other in token.top_logprobs]
        assert len(likeliest) == 3
        assert likeliest == sorted(likeliest, reverse=True)
        assert token.logprob == pytest.approx(likeliest[0])
        assert token.logprob <= 0


def test_json_schema(stack: Stack, client: openai.OpenAI) -> None:
    """An answer that is bound to a JSON schema fits it, even from a model this small."""
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "sure": {"type": "boolean"},
        },
        "required": ["colour", "count", "sure"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=stack.model,
        messages=MESSAGES,
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "pick", "schema": schema, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_tool_call(stack: Stack, client: openai.OpenAI) -> None:
    """A tool that must be called is called by name, with arguments that fit its (strict) schema."""
    choices: list[ChatCompletionToolChoiceOptionParam] = [
        {"type": "function", "function": {"name": "get_weather"}},
        "required",
    ]
    for choice in choices:
        answer = client.chat.completions.create(
            model=stack.model,
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=[WEATHER],
            tool_choice=choice,
            max_tokens=64,
            temperature=0,
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.id
        assert call.function.name == "get_weather"
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


def test_tool_result(stack: Stack, client: openai.OpenAI) -> None:
    """A conversation that holds a tool's call and its result is answered."""
    answer = client.chat.completions.create(
        model=stack.model,
        messages=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "call-1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call-1", "content": "sunny, 24 degrees"},
        ],
        tools=[WEATHER],
        tool_choice="none",
        max_tokens=8,
    )
    assert answer.choices[0].message.content
