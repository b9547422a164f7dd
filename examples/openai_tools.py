# /// script
# dependencies = ["openai==3.54.0"]
# ///
"""OpenAI's Python SDK: tools and a JSON schema.

The replicas need `TOOL_CALL_PARSER` in .env. `"strict": true` makes the engine hold to the schema; without it a
small model may not.
"""

import os

from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    city: str
    country: str


client, model = OpenAI(), os.environ["MODEL"]
weather = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
question = [{"role": "user", "content": "How is the weather in Paris?"}]
called = client.chat.completions.create(
    model=model, messages=question, tools=[weather], tool_choice={"type": "function", "function": {"name": "weather"}}
)
print(called.choices[0].message.tool_calls[0].function)

question = [{"role": "user", "content": "Name a city and its country."}]
print(client.chat.completions.parse(model=model, messages=question, response_format=City).choices[0].message.parsed)
