"""What a simulated replica says, in the shape of each API: the pieces of a stream, and an answer that is not streamed.

A dialect is made for one answer: `Dialect(model, stamp)`, `stamp` a unique text for its id. Its events are text that
goes out as it is. Only what the clients' libraries read is there.
"""

import json
import time
from typing import Any, Protocol

Json = dict[str, Any]


class Dialect(Protocol):
    """One answer in the shape of an API."""

    def __init__(self, model: str, stamp: str) -> None: ...

    def begin(self) -> str:
        """The events before the first token's."""
        ...

    def token(self, text: str, last: bool, usage: Json, /) -> str:
        """The event of one token; `usage` is the running one, as with vLLM's --enable-force-include-usage."""
        ...

    def end(self, text: str, usage: Json, /) -> str:
        """The events after the last token's, for the whole text."""
        ...

    def whole(self, text: str, usage: Json) -> Json:
        """The answer that is not streamed."""
        ...


def dumps(data: Json) -> str:
    """JSON as vLLM writes it, without spaces."""
    return json.dumps(data, separators=(",", ":"))


def event(name: str, data: Json) -> str:
    """An event with its name, which its data repeat as their type."""
    return f"event: {name}\ndata: {dumps({'type': name, **data})}\n\n"


class Completion:
    """/v1/completions. Text is put in without JSON's quoting: the words have nothing to quote, and it is fast."""

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, stamp: str) -> None:
        self.head = {"id": f"{self.prefix}-{stamp}", "created": int(time.time()), "model": model}
        self.start = f"data: {dumps({**self.head, 'object': self.chunk})[:-1]},"

    def begin(self) -> str:
        return ""

    def piece(self, text: str) -> str:
        return f'"text":"{text}"'

    def token(self, text: str, last: bool, usage: Json, /) -> str:
        finish = '"length"' if last else "null"
        choice = f'{{"index":0,{self.piece(text)},"logprobs":null,"finish_reason":{finish}}}'
        return f'{self.start}"choices":[{choice}],"usage":{dumps(usage)}}}\n\n'

    def end(self, _text: str, usage: Json, /) -> str:
        return f'{self.start}"choices":[],"usage":{dumps(usage)}}}\n\ndata: [DONE]\n\n'

    def whole(self, text: str, usage: Json) -> Json:
        return {**self.head, "object": self.kind, "choices": [{**self.choice(text), **CHOICE}], "usage": usage}

    def choice(self, text: str) -> Json:
        return {"text": text}


CHOICE = {"index": 0, "logprobs": None, "finish_reason": "length"}


class Chat(Completion):
    """/v1/chat/completions."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def begin(self) -> str:
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return f'{self.start}"choices":[{{"index":0,{delta}}}]}}\n\n'

    def piece(self, text: str) -> str:
        return f'"delta":{{"content":"{text}"}}'

    def choice(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}


class Responses:
    """/v1/responses."""

    def __init__(self, model: str, stamp: str) -> None:
        self.head = {"id": f"resp_{stamp}", "object": "response", "created_at": int(time.time()), "model": model}
        self.item = {"id": f"msg_{stamp}", "type": "message", "role": "assistant"}
        self.sent = 0

    def event(self, name: str, **data: object) -> str:
        self.sent += 1
        return event(name, {"sequence_number": self.sent - 1, **data})

    def begin(self) -> str:
        response = {**self.head, "status": "in_progress", "output": []}
        item = {**self.item, "status": "in_progress", "content": []}
        return self.event("response.created", response=response) + self.event(
            "response.output_item.added", output_index=0, item=item
        )

    def token(self, text: str, _last: bool, _usage: Json, /) -> str:
        place = {"item_id": self.item["id"], "output_index": 0, "content_index": 0}
        return self.event("response.output_text.delta", **place, delta=text)

    def end(self, text: str, usage: Json, /) -> str:
        whole = self.whole(text, usage)
        done = self.event("response.output_item.done", output_index=0, item=whole["output"][0])
        return done + self.event("response.completed", response=whole)

    def whole(self, text: str, usage: Json) -> Json:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        counted = {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
        }
        output = [{**self.item, "status": "completed", "content": content}]
        return {**self.head, "status": "completed", "output": output, "usage": counted}


class Messages:
    """/v1/messages."""

    def __init__(self, model: str, stamp: str) -> None:
        self.head = {"id": f"msg_{stamp}", "type": "message", "role": "assistant", "model": model}

    def begin(self) -> str:
        usage = {"input_tokens": 0, "output_tokens": 0}
        message: Json = {**self.head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        block = {"type": "text", "text": ""}
        return event("message_start", {"message": message}) + event(
            "content_block_start", {"index": 0, "content_block": block}
        )

    def token(self, text: str, _last: bool, _usage: Json, /) -> str:
        return event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}})

    def counted(self, usage: Json) -> Json:
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}

    def end(self, _text: str, usage: Json, /) -> str:
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        return (
            event("content_block_stop", {"index": 0})
            + event("message_delta", {"delta": delta, "usage": self.counted(usage)})
            + event("message_stop", {})
        )

    def whole(self, text: str, usage: Json) -> Json:
        counted = self.counted(usage)
        content = [{"type": "text", "text": text}]
        return {**self.head, "content": content, "stop_reason": "end_turn", "stop_sequence": None, "usage": counted}


# What vLLM answers on other paths: the same whatever was asked.
PROMPT = {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0, "prompt_tokens_details": None}
HEARD = {"type": "duration", "seconds": 4}
LABELS = {"usage": {"label_mass": 0.9, "argmax_is_label": True}}
FIXED: dict[str, Json] = {
    "/v1/embeddings": {"object": "list", "data": [{"index": 0, "embedding": [0.5]}], "usage": PROMPT},
    "/pooling": {"object": "list", "data": [{"index": 0, "data": [0.5]}], "usage": PROMPT},
    "/classify": {"object": "list", "data": [{"index": 0, "label": "a", "probs": [1.0]}], "usage": PROMPT},
    "/v2/embed": {
        "embeddings": {"float": [[0.5]]},
        "texts": ['"usage":{"prompt_tokens":1}'],
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 5, "image_tokens": 2}},
    },
    "/generative_scoring": {"object": "list", "data": [{"index": 0, "score": 0.5}], "usage": PROMPT},
    # A client may call a question and its labels as it likes.
    "/v1/systemone": {
        "object": "structured_decision",
        "answers": {"usage": {"input_tokens": 0.5}},
        "usage": {"input_tokens": 7, "output_tokens": 2},
        "diagnostics": LABELS,
    },
    "/v1/audio/transcriptions": {"text": "hello", "usage": HEARD},
    "/v1/audio/translations": {"text": "hello"},
    "/detokenize": {"prompt": "hello"},
    "/v1/messages/count_tokens": {"input_tokens": 7},
}
FIXED["/score"] = FIXED["/v1/score"] = FIXED["/generative_scoring"]
RERANKED = {"index": 0, "document": {"text": '"usage":{"prompt_tokens":1}'}, "relevance_score": 0.5}
FIXED["/rerank"] = {"id": "rerank-1", "usage": {"prompt_tokens": 7, "total_tokens": 7}, "results": [RERANKED]}
FIXED["/v1/rerank"] = FIXED["/v2/rerank"] = FIXED["/rerank"]

DIALECTS: dict[str, type[Dialect]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
}
