"""Presets with the real engine: each that runs without a GPU is started from its file and does what it is for.

Their models are replaced by small ones of the same architecture and file format (stand_ins.py), below the same names;
everything else is as the preset has it.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from lab.stack import Stack, run
from lab.waiting import until
from stack.shell import ROOT

PRESETS = {path.stem: yaml.safe_load(path.read_text())["settings"] for path in (ROOT / "presets").glob("*.yaml")}
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
AT_ONCE = 2  # on 2 cores three are no faster; each takes 2 GB
MESSAGES = [{"role": "user", "content": "one two three one two three one two three one two"}]
WEATHER = {
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = '{"name": "get_weather", "parameters": {"city": "Paris"}}'  # as Llama 3.1 writes it


@dataclass(frozen=True)
class Replica:
    """A replica that is up with a preset's settings."""

    name: str  # of its container
    url: str
    model: str

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """Its answer, which has to be a good one."""
        answer = requests.post(self.url + path, json={"model": self.model, **body}, timeout=120)
        assert answer.ok, f"{answer.text}\n{self.log()[-4000:]}"
        content: dict[str, Any] = answer.json()
        return content

    def chat(self, **body: Any) -> dict[str, Any]:
        """The message that it answers with."""
        answer = self.ask("/v1/chat/completions", messages=MESSAGES, temperature=0, **body)
        message: dict[str, Any] = answer["choices"][0]["message"]
        return message

    def metric(self, name: str) -> float:
        lines = requests.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def log(self) -> str:
        told = subprocess.run(["docker", "logs", self.name], capture_output=True, text=True, check=False)
        return told.stdout + told.stderr


def guesses(replica: Replica) -> None:
    """Tokens are guessed before the model computes them."""
    replica.chat(max_tokens=24, ignore_eos=True)
    assert replica.metric("vllm:spec_decode_num_draft_tokens_total") > 0


def guesses_right(replica: Replica) -> None:
    """... and the model agrees with some."""
    guesses(replica)
    assert replica.metric("vllm:spec_decode_num_accepted_tokens_total") > 0


def quantized(method: str) -> Callable[[Replica], None]:
    """The weights are quantized so, and it answers."""

    def check(replica: Replica) -> None:
        assert replica.chat(max_tokens=8)["content"]
        assert f"quantization={method}," in replica.log()

    return check


def embeds(replica: Replica) -> None:
    """A text becomes a vector of length 1, another text another one."""
    hello, world = (one["embedding"] for one in replica.ask("/v1/embeddings", input=["Hello", "world"])["data"])
    assert len(hello) == len(world) == 256  # the stand-in's width
    assert sum(number**2 for number in hello) == pytest.approx(1, abs=1e-2)
    assert hello != world


def remembers_much(replica: Replica) -> None:
    """A prompt longer than one chunk of prefill, into a KV cache of 8 bits with room for 128k tokens."""
    prompt = [number % 1000 for number in range(9000)]
    assert replica.ask("/v1/completions", prompt=prompt, max_tokens=2)["usage"]["prompt_tokens"] == len(prompt)
    assert requests.get(f"{replica.url}/v1/models", timeout=30).json()["data"][0]["max_model_len"] == 131072
    log = replica.log()
    assert "kv_cache_dtype=fp8," in log
    assert "enable_chunked_prefill=True" in log
    assert "Chunked prefill is enabled with max_num_batched_tokens=8192" in log


def calls_tools(replica: Replica) -> None:
    """Forced and on its own account: a call in Llama 3.1's format comes out as OpenAI's.

    Random weights would call nothing by themselves. Where vLLM forces the call by a grammar, the call's letters are
    preferred, as else blanks would follow each other without end; in the other case the whole answer is given.
    """
    tools = [{"type": "function", "function": WEATHER}]
    letters = replica.ask("/tokenize", prompt="\n".join(set(CALL)), return_token_strs=True)
    tokens = [str(token) for token, text in zip(letters["tokens"], letters["token_strs"], strict=True) if text in CALL]
    forced = {"tool_choice": "required", "logit_bias": dict.fromkeys(tokens, 100)}
    automatic = {"tool_choice": "auto", "structured_outputs": {"choice": [CALL]}}
    loose = [{"type": "function", "function": {**WEATHER, "strict": False}}]
    for message in (
        replica.chat(tools=tools, max_tokens=60, **forced),
        replica.chat(tools=loose, max_tokens=60, **automatic),
    ):
        assert message.get("tool_calls"), message
        (call,) = (one["function"] for one in message["tool_calls"])
        assert call["name"] == "get_weather"
        assert yaml.safe_load(call["arguments"]) == {"city": "Paris"}


ON_A_CPU: dict[str, Callable[[Replica], None]] = {
    "speculative-ngram": guesses_right,
    "speculative-draft": guesses_right,  # its stand-in guesses for itself
    "speculative-eagle": guesses,
    "embeddings": embeds,
    "tool-calling": calls_tools,
    "long-context": remembers_much,
    "deepseek-r1-1.5b-4bit": quantized("bitsandbytes"),
    "qwen2.5-7b-awq": quantized("awq"),
    "qwen2.5-7b-gptq": quantized("auto_gptq"),
}
# What vLLM 0.32 ends with while it loads, on a CPU without AMX; for one with AMX it has other code, not tried yet.
NO_FP8 = "RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4 argument(s)."
ON_GPUS_ONLY = {"deepseek-r1-1.5b-8bit": NO_FP8, "llama-3.1-8b-fp8": NO_FP8}


def test_each_preset_is_in_one_of_the_two_groups() -> None:
    assert sorted([*ON_A_CPU, *ON_GPUS_ONLY]) == sorted(PRESETS)


def test_what_runs_beside_a_replica_gets_none_of_its_requests(stack: Stack) -> None:
    """Under none of the names that Docker gives it: that of the container, its id, and its hostname."""
    name = "vllm-fleet-test-beside"
    command = ["docker", "compose", "run", "--detach", "--no-deps", "--name", name, "--entrypoint", "sleep"]
    remove(name)
    try:
        run(*command, "vllm-0", "60")
        networks = json.loads(run("docker", "inspect", "--format", "{{json .NetworkSettings.Networks}}", name))
    finally:
        remove(name)
    # Docker 26 and later tell all of them as DNSNames, those before as Aliases.
    names = {each for one in networks.values() for each in (*one["Aliases"], *(one.get("DNSNames") or ()))}
    assert name in names
    assert not names & set(stack.replicas()), "it would get requests from the gateway"


@pytest.fixture(scope="module")
def models(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the stand-ins, beside which the real small model is mounted."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o755)
    (folder / SMOLLM2).mkdir(parents=True)  # mounted there
    return folder


def write_stand_ins(folder: Path) -> None:
    program = ROOT / "tests" / "stack" / "stand_ins.py"
    command = ["docker", "compose", "run", "--rm", "--no-deps", "--no-TTY", "--entrypoint", "python3"]
    # torch asks for the user's name, which the image does not know
    command += ["--user", str(os.getuid()), "--env", "USER=test"]
    command += ["--volume", f"{folder}:/stand-ins", "--volume", f"{program}:/stand_ins.py:ro"]
    run(*command, "vllm-0", "/stand_ins.py")


@contextlib.contextmanager
def replica_of(preset: str, models: Path) -> Iterator[Replica]:
    """A replica, not in the route, with a preset's settings over those of vllm-0."""
    name = f"vllm-fleet-test-{preset}"
    # In 16 bits the cache would have no room for the long context.
    settings = {"KV_CACHE_GB": "0.5", **PRESETS[preset]}
    command = ["docker", "compose", "run", "--detach", "--no-deps", "--name", name, "--publish", "127.0.0.1::8000"]
    command += ["--volume", f"{models}:/models:ro"]
    command += ["--volume", f"{ROOT / 'models' / SMOLLM2}:/models/{SMOLLM2}:ro"]
    command += [f"--env={setting}={value}" for setting, value in settings.items()]
    remove(name)
    run(*command, "vllm-0")
    with subprocess.Popen(["docker", "wait", name], stdout=subprocess.DEVNULL) as end:
        try:
            address = run("docker", "port", name, "8000").split()[0]
            replica = Replica(name, f"http://{address}", settings["MODEL"])

            def answers() -> bool:
                assert end.poll() is None, replica.log()[-8000:]
                with contextlib.suppress(requests.RequestException):
                    return requests.get(f"{replica.url}/health", timeout=10).ok
                return False

            until(answers, f"{preset} up", 240)
            yield replica
        finally:
            remove(name)


def remove(container: str) -> None:
    subprocess.run(["docker", "rm", "--force", container], capture_output=True, check=False)


@pytest.fixture(scope="module")
def checks(request: pytest.FixtureRequest, models: Path) -> Iterator[dict[str, Future[None]]]:
    """The checks of the presets whose tests run, begun ahead of them, some at a time."""
    tests = [item for item in request.session.items if "checks" in getattr(item, "fixturenames", ())]
    names = [str(test.callspec.params["preset"]) for test in tests if isinstance(test, pytest.Function)]

    def check(preset: str) -> None:
        if PRESETS[preset]["MODEL"] != SMOLLM2:
            written.result()
        with replica_of(preset, models) as replica:
            ON_A_CPU[preset](replica)

    pool = ThreadPoolExecutor(AT_ONCE)
    # The one preset that runs on the real model needs none, and comes up meanwhile.
    written = pool.submit(write_stand_ins, models)
    yield {name: pool.submit(check, name) for name in names}
    pool.shutdown(cancel_futures=True)


# vLLM 0.32 has no code for these on a CPU without AVX-512: "FP8 KV cache on CPU requires x86 with AVX-512 or AMX", and
# no cpu_gemm_wna16.
AVX512 = {"long-context", "qwen2.5-7b-awq", "qwen2.5-7b-gptq"}
HAS_AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()


def on_this_cpu(preset: str) -> object:
    lacks = preset in AVX512 and not HAS_AVX512
    return pytest.param(preset, marks=pytest.mark.skipif(lacks, reason="vLLM runs this only on a CPU with AVX-512"))


@pytest.mark.parametrize("preset", [on_this_cpu(preset) for preset in ON_A_CPU])
def test_preset_does_what_it_is_for(preset: str, checks: dict[str, Future[None]]) -> None:
    checks[preset].result()
