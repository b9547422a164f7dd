"""Clients of the gateway."""

import os

import openai
import pytest

from lab.http import KEY
from lab.stack import Stack


@pytest.fixture(scope="session")
def client(stack: Stack) -> openai.OpenAI:
    """OpenAI's own client. It does not retry: what a test sees is what the gateway answered."""
    key = os.environ.get(KEY, "none")
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0, timeout=120)


def counted(usage: openai.types.CompletionUsage | None) -> tuple[int, int]:
    """The tokens of the prompt and of the answer; how many were cached depends on what was asked before."""
    assert usage
    return usage.prompt_tokens, usage.completion_tokens
