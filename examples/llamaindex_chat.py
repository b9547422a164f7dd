# /// script
# dependencies = ["llama-index-llms-openai-like==0.8.1"]
# ///
"""LlamaIndex: a chat, streamed.

`OpenAILike` takes any model's name. It must be told that the model chats and how long its context is: /v1/models
has that as `max_model_len`.
"""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(
    model=os.environ["MODEL"],
    api_base=os.environ["OPENAI_BASE_URL"],
    api_key=os.environ["OPENAI_API_KEY"],
    is_chat_model=True,
    context_window=4096,
    max_tokens=40,
)
for piece in model.stream_chat([ChatMessage(role="user", content="What is the capital of France?")]):
    print(piece.delta, end="", flush=True)
print()
