# /// script
# dependencies = ["langchain-openai==1.7.4"]
# ///
"""LangChain: a chat, streamed, with its usage.

It reads OPENAI_BASE_URL and OPENAI_API_KEY. On an address other than OpenAI's it asks for usage only if
`stream_usage` says so.
"""

import os

from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=os.environ["MODEL"], max_tokens=40, stream_usage=True)
usage = None
for piece in model.stream("What is the capital of France?"):
    print(piece.content, end="", flush=True)
    usage = piece.usage_metadata or usage
print("\n", usage)
