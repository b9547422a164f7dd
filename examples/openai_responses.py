# /// script
# dependencies = ["openai==3.54.0"]
# ///
"""OpenAI's Python SDK: the Responses API.

Each request carries the whole conversation, and `store` is off: a gateway of several replicas keeps no answers.
"""

import os

from openai import OpenAI

answer = OpenAI().responses.create(
    model=os.environ["MODEL"],
    input=[{"role": "user", "content": "What is the capital of France?"}],
    max_output_tokens=40,
    store=False,
)
print(answer.output_text)
