# /// script
# dependencies = ["anthropic==2.14.0"]
# ///
"""Anthropic's Python SDK: messages, streamed, and their tokens counted beforehand.

It reads ANTHROPIC_BASE_URL (http://localhost, without /v1) and ANTHROPIC_API_KEY.
"""

import os

from anthropic import Anthropic

client, model = Anthropic(), os.environ["MODEL"]
messages = [{"role": "user", "content": "What is the capital of France?"}]
print(client.messages.count_tokens(model=model, messages=messages).input_tokens, "tokens")
with client.messages.stream(model=model, messages=messages, max_tokens=40) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
