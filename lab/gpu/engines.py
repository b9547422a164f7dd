"""Real vLLM engines on this host's GPUs, on models with random weights, so that nothing has to be fetched."""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import string
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Self

from lab.bench.workloads import totals
from lab.http import get
from lab.sim.load import SYLLABLES
from lab.waiting import until
from planner.machine import GIB
from planner.nvml import read_machine
from stack.shell import ROOT

PORT = 8000
MAX_LENGTH = 16384

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": LLAMA | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "32B": LLAMA | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
                    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
}  # fmt: skip

# The models of the presets. What tests/models does not hold is told by how it differs from one of these.
CONFIGS = ROOT / "tests" / "models"
_SCALE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8,
          "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "BAAI/bge-m3": ("bge-m3", {"position_embedding_type": "absolute"}),
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8": ("Llama-3.1-8B-Instruct", {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"], "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": _SCALE, "input_activations": _SCALE}}}}),
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": ("Qwen2.5-7B-Instruct-AWQ", {"quantization_config": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}}),
    "Qwen/Qwen3-8B": ("Llama-3.1-8B-Instruct", _QWEN3 | {
        "intermediate_size": 12288, "num_hidden_layers": 36, "rope_scaling": None}),
    "Qwen/Qwen3-0.6B": ("Llama-3.1-8B-Instruct", _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "rope_scaling": None, "tie_word_embeddings": True}),
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": ("Llama-3.1-8B-Instruct", {
        "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 32000}),
}  # fmt: skip

# Two H200 without these die of an illegal memory access in the fused all-reduce (vLLM 0.26); elsewhere try without.
TP_SAFE = ("--disable-custom-all-reduce", "--compilation-config", '{"pass_config":{"fuse_allreduce_rms":false}}')

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}assistant\n"


def config_of(model: str) -> dict[str, Any]:
    """The config.json of a shape or of a preset's model."""
    if model in SHAPES:
        return SHAPES[model]
    base, other = VARIANTS.get(model, (model.rpartition("/")[2], {}))
    known: dict[str, Any] = json.loads((CONFIGS / base / "config.json").read_text())
    return known | {"bos_token_id": 1, "eos_token_id": 2} | other


def four_characters() -> Iterator[str]:
    """All that four neighbouring characters of the load's words can be: three syllables and a space, over and over."""
    consonants, vowels = ({syllable[at] for syllable in SYLLABLES} for at in (0, 1))
    pattern = [consonants, vowels] * 3 + [{" "}]
    for offset in range(len(pattern)):
        yield from map("".join, itertools.product(*map(sorted, (pattern * 2)[offset : offset + 4])))


def write_model(folder: Path, model: str) -> Path:
    """A folder that vLLM serves with `--load-format dummy`: config.json, and a tokenizer of four characters a token.

    That is what lab/sim/load.py calls a token. An answer's tokens are such too, so a conversation's next turn holds
    the very tokens of its last answer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - only a GPU host has it

    path = folder / model
    path.mkdir(parents=True, exist_ok=True)
    config = config_of(model)
    (path / "config.json").write_text(json.dumps(config))
    size = config["vocab_size"]
    words = dict.fromkeys(["<unk>", "<s>", "</s>", "\n", "syst", "em", "user", "assi", "stan", "t", "<|python_tag|>"])
    words |= dict.fromkeys(four_characters())
    filler = map("".join, itertools.product(string.ascii_letters + string.digits, repeat=4))
    while len(words) < size:
        words[next(filler)] = None
    vocabulary = {word: number for number, word in enumerate(itertools.islice(words, size))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\n]{1,4}"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
             "eos_token": "</s>", "pad_token": "</s>", "chat_template": CHAT_TEMPLATE}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    return path


def write_weights(path: Path) -> None:
    """Random weights as safetensors: bitsandbytes quantizes what it loads from files."""
    import torch  # noqa: PLC0415 - only a GPU host has it
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).state_dict()
    noise = torch.randn(2**24).to(torch.bfloat16) * 0.02
    weights = {
        name: noise.repeat(shape.numel() // noise.numel() + 1)[: shape.numel()].reshape(shape.shape).contiguous()
        for name, shape in shapes.items()
    }
    save_file(weights, path / "partial", {"format": "pt"})
    (path / "partial").rename(path / "model.safetensors")


def launcher() -> Any:
    """vllm/launch.py; `vllm` itself is the real package where engines run."""
    spec = spec_from_file_location("launch", ROOT / "vllm" / "launch.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    # pydantic and dataclasses look a class's module up by its name
    sys.modules["launch"] = module
    spec.loader.exec_module(module)
    return module


# All engines come from one process that has vLLM imported: a start does not pay for that.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOAD = ["__main__", "vllm.entrypoints.cli.serve", "vllm.entrypoints.openai.api_server", "vllm.v1.engine.core"]


def prepare() -> None:
    """Sets the environment of all engines; to be called before the first one starts."""
    os.environ |= {
        "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT / 'vllm'}",  # the replica's middleware
    }
    PROCESSES.set_forkserver_preload(PRELOAD)


def serve(arguments: list[str], gpus: str, log: str) -> None:
    """Becomes `vllm serve` in a process group of its own."""
    os.setsid()
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    launcher()  # its folder has the middleware
    sys.argv[1:] = arguments
    import_module("vllm.entrypoints.cli.main").main()


class Engine:
    """One `vllm serve` on some of the GPUs, as the launcher starts a replica.

    `host` is its loopback address, `settings` the launcher's beside the model, `extra` further arguments of vLLM.
    """

    def __init__(
        self, host: str, gpus: Sequence[int], model: Path, folder: Path, settings: Mapping[str, str], *extra: str
    ) -> None:
        self.host, self.gpus, self.name = host, list(gpus), model.name
        self.url = f"http://{host}:{PORT}"
        if settings.get("QUANTIZATION") != "bitsandbytes":
            extra = (*extra, "--load-format", "dummy")
        launch = launcher()
        empty = folder / "engine.yaml"
        empty.touch()
        mistakes = launch.Mistakes()
        read = launch.read_settings(empty, {**settings, "MODEL": model.name}, mistakes)
        if mistakes.lines:
            raise RuntimeError("\n".join(mistakes.lines))
        self.arguments = [*launch.serve_command(read, str(model), None), "--host", host, *extra]
        self.log_path = folder / f"{self.name}-{'-'.join(map(str, gpus))}-{host}-{time.monotonic_ns()}.log"
        self.process = PROCESSES.Process(
            target=serve, args=(self.arguments, ",".join(map(str, gpus)), str(self.log_path))
        )
        self.process.start()
        self.started = time.monotonic()

    def wait(self, seconds: float = 240) -> Self:
        """Waits until it answers; RuntimeError with the end of its log where it ends before."""

        def up() -> bool:
            if self.process.exitcode is not None:
                raise RuntimeError(f"{self.name} on GPUs {self.gpus} ended: {self.failure()}")
            try:
                get(self.url + "/health", timeout=1)
            except OSError:
                return False
            return True

        until(up, f"{self.name} on GPUs {self.gpus} answers", seconds)
        return self

    def failure(self) -> str:
        """The last errors in its log."""
        lines = [line for line in self.log().splitlines() if "Error" in line]
        return " | ".join(lines[-3:])[-600:]

    def log(self) -> str:
        """All that it wrote."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def kill(self) -> None:
        """SIGKILL to the server and its engine processes."""
        with contextlib.suppress(ProcessLookupError):
            assert self.process.pid
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def stop(self) -> None:
        """Ends it and waits until its GPUs are free again."""
        self.kill()
        until(lambda: all(used < GIB for used in used_memory(self.gpus)), f"GPUs {self.gpus} are free again", 30)

    def facts(self) -> dict[str, Any]:
        """What the engine said about its memory (GiB; the tightest GPU) and its start (s), and what the driver says of
        memory (GiB a GPU)."""
        return parse_log(self.log()) | {"used": [round(used / GIB, 2) for used in used_memory(self.gpus)]}

    def idle(self) -> bool:
        """Whether no request is in it."""
        now = totals(self.url)
        return not now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]

    def forget(self) -> None:
        """Waits until it is idle and empties its prefix cache."""
        until(self.idle, f"{self.name} on GPUs {self.gpus} is idle")
        get(self.url + "/reset_prefix_cache", data=b"", method="POST")


PATTERNS = {
    "kv_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "weights": r"Model loading took ([\d.]+) GiB",
    "kv": r"Available KV cache memory: ([\d.]+) GiB",
    "graphs_estimated": r"Estimated CUDA graph memory: ([\d.]+) GiB",
    "graphs": r"Graph capturing finished in .* took (-?[\d.]+) GiB",
    "load_s": r"Model loading took .* GiB.* and ([\d.]+) seconds",
    "capture_s": r"Graph capturing finished in ([\d.]+) secs",
    "init_s": r"init engine .* took ([\d.]+) s",
    "compile_s": r"init engine .*compilation: ([\d.]+) s",
}


def parse_log(text: str) -> dict[str, Any]:
    """Numbers in vLLM's log: the KV tokens of the tightest worker, of all else the largest."""
    found: dict[str, Any] = {}
    for name, pattern in PATTERNS.items():
        if values := [float(value.replace(",", "")) for value in re.findall(pattern, text)]:
            found[name] = min(values) if name in ("kv_tokens", "kv") else max(values)
    return found


def used_memory(gpus: Sequence[int]) -> list[int]:
    """Bytes in use on each of the GPUs."""
    machine = read_machine()
    return [gpu.total - gpu.free for gpu in machine.gpus if gpu.index in gpus]
