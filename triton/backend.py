"""Triton's backend `vllm` where NVIDIA's image is not: it runs in the Python backend, and takes and gives the same.

In: text_input, and if wanted stream, exclude_input_in_output, sampling_parameters (JSON; else the request's parameters
count) and return_…, a flag for each further output. Out: text_output, and what those flags ask for. A stream has an
answer for each step of the engine, with what is new in it; else there is one answer.

The engine's arguments are those of model.json beside the model's version, which start.py has checked.
"""

from __future__ import annotations

import asyncio
import json
import locale
import os
import signal
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

PID_FILE = Path("/tmp/triton.pid")  # noqa: S108 - of this container's own; start.py writes it
FLAGS = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
INPUTS = {
    "text_input": "TYPE_STRING",
    "stream": "TYPE_BOOL",
    "sampling_parameters": "TYPE_STRING",
    "exclude_input_in_output": "TYPE_BOOL",
    **dict.fromkeys(FLAGS, "TYPE_BOOL"),
}
OUTPUTS = {
    "text_output": ("TYPE_STRING", -1),
    "finish_reason": ("TYPE_STRING", -1),
    "cumulative_logprob": ("TYPE_FP32", -1),
    "logprobs": ("TYPE_STRING", -1),
    "num_input_tokens": ("TYPE_UINT32", 1),
    "num_output_tokens": ("TYPE_UINT32", -1),
}
# How a parameter is read, which may come as text or as another kind of number.
READERS = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    prompt: str
    stream: bool
    with_prompt: bool
    parameters: dict[str, Any]
    flags: frozenset[str]


def value(request: Any, name: str) -> Any:
    """An input's one value; None where the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().flatten()[0]


def read(request: Any) -> Asked:
    """What a request asks for; a ValueError says what is wrong with it."""
    stream = bool(value(request, "stream"))
    exclude = value(request, "exclude_input_in_output")
    if stream and exclude is not None and not exclude:
        raise ValueError("a stream has no prompt in it: leave exclude_input_in_output out, or set it to true")
    given = value(request, "sampling_parameters")
    parameters = json.loads(request.parameters() if given is None else given)
    if not isinstance(parameters, dict):
        raise ValueError("sampling_parameters is no JSON object")  # noqa: TRY004 - as what else is wrong with it
    return Asked(
        prompt=value(request, "text_input").decode(),
        stream=stream,
        with_prompt=not stream if exclude is None else not exclude,
        parameters=parameters,
        flags=frozenset(name for name in FLAGS if value(request, name)),
    )


def name_of(kind: Any) -> str:
    """What an annotation is called, be it a type, a type or None, or their text."""
    return str(getattr(kind, "__name__", kind) if isinstance(kind, type) else kind).removesuffix(" | None")


def sampling(asked: Asked) -> Any:
    """vLLM's own sampling parameters; a ValueError names those that it does not have."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: PLC0415 - ten seconds

    kinds = {name: name_of(kind) for name, kind in SamplingParams.__annotations__.items()}
    if unknown := sorted(name for name in asked.parameters if name not in kinds or name.startswith("_")):
        raise ValueError(f"unknown sampling parameter: {', '.join(unknown)}")
    values = {name: READERS.get(kinds[name], lambda one: one)(given) for name, given in asked.parameters.items()}
    if "return_logprobs" in asked.flags:
        values.setdefault("logprobs", 0)
    return SamplingParams(
        **values | {"output_kind": RequestOutputKind.DELTA if asked.stream else RequestOutputKind.FINAL_ONLY}
    )


def logprobs_of(output: Any) -> bytes:
    """The log probabilities of an answer's new tokens, as JSON."""
    tokens = [
        {
            token: {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in at.items()
        }
        for at in output.logprobs or ()
    ]
    return json.dumps(tokens).encode()


def response(asked: Asked, result: Any, count: int) -> Any:
    """A step's answer: `count` texts, of which those that this step has nothing for are empty."""
    outputs: list[Any] = [None] * count
    for output in result.outputs:
        outputs[output.index] = output
    before = asked.prompt if asked.with_prompt else ""
    of_each: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
        "return_finish_reason": ("finish_reason", np.object_, lambda one: str(one and one.finish_reason).encode()),
        "return_cumulative_logprob": (
            "cumulative_logprob",
            np.float32,
            lambda one: one.cumulative_logprob if one else 0,
        ),
        "return_logprobs": ("logprobs", np.object_, lambda one: logprobs_of(one) if one else b"[]"),
        "return_num_output_tokens": ("num_output_tokens", np.uint32, lambda one: len(one.token_ids) if one else 0),
    }
    texts = [(before + (one.text if one else "")).encode() for one in outputs]
    tensors = [pb_utils.Tensor("text_output", np.asarray(texts, dtype=np.object_))]
    for flag, (name, kind, of) in of_each.items():
        if flag in asked.flags:
            tensors.append(pb_utils.Tensor(name, np.asarray([of(one) for one in outputs], dtype=kind)))
    if "return_num_input_tokens" in asked.flags:
        length = len(result.prompt_token_ids or ())
        tensors.append(pb_utils.Tensor("num_input_tokens", np.asarray([length], dtype=np.uint32)))
    return pb_utils.InferenceResponse(output_tensors=tensors)


class TritonPythonModel:
    """What Triton calls."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Adds to a model's configuration what it does not say."""
        there = config.as_dict()
        named = {one["name"] for one in (*there["input"], *there["output"])}
        for name, kind in INPUTS.items():
            if name not in named:
                optional = {"optional": True} if name != "text_input" else {}
                config.add_input({"name": name, "data_type": kind, "dims": [1], **optional})
        for name, (kind, size) in OUTPUTS.items():
            if name not in named:
                config.add_output({"name": name, "data_type": kind, "dims": [size]})
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, _args: dict[str, str]) -> None:
        """Starts the engine; Triton waits for it."""
        # The stub begins in ASCII, and chat templates and tokenizers are read as text.
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        arguments = json.loads(Path(pb_utils.get_model_dir(), "model.json").read_text(encoding="utf-8"))
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine = asyncio.run_coroutine_threadsafe(start(arguments), self.loop).result()

    def execute(self, requests: Sequence[Any]) -> None:
        """Takes requests, whose answers come later."""
        for request in requests:
            asyncio.run_coroutine_threadsafe(self.answer(request), self.loop)

    async def answer(self, request: Any) -> None:
        """Answers a request. One that its client has left is ended in the engine too."""
        from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415

        sender = request.get_response_sender()
        try:
            asked = read(request)
            wanted = sampling(asked)
            results = self.engine.generate(asked.prompt, wanted, uuid.uuid4().hex)
            async for result in results:
                if sender.is_cancelled():
                    await results.aclose()
                    break
                sender.send(response(asked, result, wanted.n))
        except EngineDeadError:
            # Triton would go on, and answer every request with an error.
            os.kill(int(PID_FILE.read_text()), signal.SIGKILL)
        except Exception as error:  # noqa: BLE001 - whatever it is, its client waits for an answer
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{error}")))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Ends the engine."""
        self.engine.shutdown()


async def start(arguments: dict[str, Any]) -> Any:
    """The engine with these arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
