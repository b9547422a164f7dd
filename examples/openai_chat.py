# /// script
# dependencies = ["openai==3.54.0"]
# ///
"""OpenAI's Python SDK: a chat, streamed.

It reads OPENAI_BASE_URL (http://localhost/v1) and OPENAI_API_KEY. It repeats a request by itself when all
replicas are full, but not when the gateway says that this will not help.
"""

import os

from openai import OpenAI

stream = OpenAI().chat.completions.create(
    model=os.environ["MODEL"],
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    max_tokens=40,
    stream=True,
)
for event in stream:
    print(event.choices[0].delta.content or "", end="", flush=True)
print()
