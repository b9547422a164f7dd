"""Plain completions and the tokenizer."""

import openai
import requests

from lab.stack import Stack
from tests.stack.conftest import counted

PROMPT = "The three primary colours are"


def test_whole(stack: Stack, client: openai.OpenAI) -> None:
    """A plain prompt is continued, with a usage that adds up."""
    answer = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text
    assert answer.usage
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_streamed(stack: Stack, client: openai.OpenAI) -> None:
    """A streamed completion joins to the whole one and carries its usage."""
    whole = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=8, temperature=0)
    chunks = list(
        client.completions.create(
            model=stack.model,
            prompt=PROMPT,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [choice.text for chunk in chunks for choice in chunk.choices if choice.text]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].text
    assert counted(chunks[-1].usage) == counted(whole.usage)


def test_several_prompts(stack: Stack, client: openai.OpenAI) -> None:
    """A list of prompts gives one answer each, in their order."""
    answer = client.completions.create(model=stack.model, prompt=[PROMPT, "Once upon a time"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_prompt_of_tokens(stack: Stack, client: openai.OpenAI) -> None:
    """A prompt given as token numbers is continued as its text is."""
    tokens = tokenize(stack, PROMPT)
    by_text = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=6, temperature=0)
    by_token = client.completions.create(model=stack.model, prompt=tokens, max_tokens=6, temperature=0)
    assert by_token.choices[0].text == by_text.choices[0].text


def test_tokenize_and_back(stack: Stack) -> None:
    """Text becomes token numbers, and these become the same text again."""
    tokens = tokenize(stack, PROMPT)
    assert len(tokens) > 3
    back = requests.post(
        f"{stack.url}/detokenize", json={"model": stack.model, "tokens": tokens}, headers=stack.headers, timeout=30
    )
    assert back.json()["prompt"] == PROMPT


def test_tokenize_counts_as_usage_does(stack: Stack, client: openai.OpenAI) -> None:
    """The tokenizer's count is the prompt's count in the bill."""
    answer = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=1)
    assert answer.usage
    assert answer.usage.prompt_tokens == len(tokenize(stack, PROMPT))


def tokenize(stack: Stack, prompt: str) -> list[int]:
    answer = requests.post(
        f"{stack.url}/tokenize", json={"model": stack.model, "prompt": prompt}, headers=stack.headers, timeout=30
    )
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["tokens"]
    assert answer.json()["count"] == len(tokens)
    return tokens
