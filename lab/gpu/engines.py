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
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
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

IDS: dict[str, Any] = {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Shapes by the names that the report gives them. What tests/models holds is told by how it differs from that.
CONFIGS = ROOT / "tests" / "models"
KNOWN = {
    "Llama-8B": "Llama-3.1-8B-Instruct",
    "Llama-70B": "Llama-3.3-70B-Instruct",
    "gpt-oss-20B": "gpt-oss-20b",
    "Gemma-4-E4B": "gemma-4-E4B-it",
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "intermediate_size": 8192,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-1B": {**_LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
                 "tie_word_embeddings": True},
    "Llama-3B": {**_LLAMA, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128,
                 "tie_word_embeddings": False},
    "Llama-8B": {},
    "Llama-70B": {},
    "gpt-oss-20B": {"swiglu_limit": 7.0, "rms_norm_eps": 1e-5, "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 4096, "truncate": False}},
    # its language model alone; transformers 5.17 would give the layers' head widths by layer, vLLM 0.26 wants one key
    "Gemma-4-E4B": {"architectures": ["Gemma4ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
                    "rms_norm_eps": 1e-6, "per_layer_config": {}},
    # a third of the layers and a quarter of the experts of the 80B
    "Qwen3-Next-16-layers": {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6, "rope_theta": 10000000, "partial_rotary_factor": 0.25, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 128, "num_experts_per_tok": 10,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "tie_word_embeddings": False,
    },
    "Nemotron-H-8B": {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hidden_size": 4096,
        "intermediate_size": 21504, "num_hidden_layers": 52, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 32768, "mamba_num_heads": 128,
        "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "tie_word_embeddings": False,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    },
    "GLM-4.5-Air-106B": {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151552, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000, "partial_rotary_factor": 0.5, "attention_bias": True, "use_qk_norm": False,
        "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0, "tie_word_embeddings": False,
    },
}  # fmt: skip

# A state is kept as vLLM 0.32 keeps it by default, and its kernels come without compiling one.
_STATE = ("--enable-prefix-caching", "--mamba-cache-mode", "align", "--gdn-prefill-backend", "triton")
# What a shape needs of vLLM 0.26 besides. FlashAttention 4, which it would take for heads of 512, is not at hand.
NEEDS: dict[str, tuple[str, ...]] = {
    "Gemma-4-E4B": ("--attention-backend", "TRITON_ATTN", "--hf-overrides", '{"global_head_dim": 512}'),
    "Qwen3-Next-16-layers": _STATE,
    "Nemotron-H-8B": _STATE[:3],
}

# Not compiled, which takes half a minute a start; CUDA graphs for decoding alone. Two H200 without the rest die of an
# illegal memory access in the fused all-reduce (vLLM 0.26); elsewhere try without.
QUICK = (
    "--compilation-config",
    '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "pass_config": {"fuse_allreduce_rms": false}}',
    "--disable-custom-all-reduce",
)

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}assistant\n"


def config_of(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    known: dict[str, Any] = {}
    if shape in KNOWN:
        known = json.loads((CONFIGS / KNOWN[shape] / "config.json").read_text())
        known = known.get("text_config", known)
    return known | IDS | SHAPES[shape]


def four_characters() -> Iterator[str]:
    """All that four neighbouring characters of the load's words can be: three syllables and a space, over and over."""
    consonants, vowels = ({syllable[at] for syllable in SYLLABLES} for at in (0, 1))
    pattern = [consonants, vowels] * 3 + [{" "}]
    for offset in range(len(pattern)):
        yield from map("".join, itertools.product(*map(sorted, (pattern * 2)[offset : offset + 4])))


def write_model(folder: Path, shape: str) -> Path:
    """A model's folder without weights: config.json, and a tokenizer of four characters a token.

    That is what lab/sim/load.py calls a token. An answer's tokens are such too, so a conversation's next turn holds
    the very tokens of its last answer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - only a GPU host has it

    path = folder / shape
    path.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
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


WEIGHTS = "model.safetensors"


def llama_weights(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama's checkpoint by their names there."""
    hidden, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    names = ["model.embed_tokens.weight", *([] if config["tie_word_embeddings"] else ["lm_head.weight"])]
    found: dict[str, tuple[int, ...]] = dict.fromkeys(names, (vocabulary, hidden))
    for number in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,)}


def write_weights(path: Path) -> Path:
    """Random weights on disk for the Llama in this folder, the same ones each time.

    Each matrix keeps the size of what goes through it, so every weight has its part in every answer.
    """
    import torch  # noqa: PLC0415 - only a GPU host has it
    from safetensors.torch import save_file  # noqa: PLC0415

    tensors = {}

    def fill(seed: int, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            return
        random = torch.Generator().manual_seed(seed)
        values = torch.empty(shape).normal_(0, shape[1] ** -0.5, generator=random)
        tensors[name] = values.to(torch.bfloat16)

    with ThreadPoolExecutor() as pool:
        shapes = llama_weights(json.loads((path / "config.json").read_text()))
        list(pool.map(fill, itertools.count(), shapes, shapes.values()))
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    return path


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
        "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache, /sleep
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        "PYTHONUNBUFFERED": "1",
    }
    # An engine has the path of the process that it comes from, and vLLM imports the replica's middleware by name.
    if find_spec("begin") is None:
        raise RuntimeError(f"PYTHONPATH has to name {ROOT / 'vllm'}: every engine would end when it has loaded")
    PROCESSES.set_forkserver_preload(PRELOAD)


def serve(arguments: list[str], environment: Mapping[str, str], log: str) -> None:
    """Becomes `vllm serve` in a process group of its own; `environment` comes on top of that of all engines."""
    os.setsid()
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv[1:] = arguments
    import_module("vllm.entrypoints.cli.main").main()


class Engine:
    """One `vllm serve` on some of the GPUs, as the launcher starts a replica.

    `host` is its loopback address, `settings` the launcher's beside the model, `extra` further arguments of vLLM. A
    model without weights on disk gets random ones.
    """

    def __init__(
        self, host: str, gpus: Sequence[int], model: Path, folder: Path, settings: Mapping[str, str], *extra: str
    ) -> None:
        self.host, self.gpus, self.name = host, list(gpus), model.name
        self.url = f"http://{host}:{PORT}"
        launch = launcher()
        empty = folder / "engine.yaml"
        empty.touch()
        mistakes = launch.Mistakes()
        read = launch.read_settings(empty, {**settings, "MODEL": model.name}, mistakes)
        if mistakes.lines:
            raise RuntimeError("\n".join(mistakes.lines))
        command = launch.serve_command(read, str(model), None)
        dummy = () if (model / WEIGHTS).exists() else ("--load-format", "dummy")
        self.arguments = [*command, "--host", host, *dummy, *NEEDS.get(self.name, ()), *extra]
        self.environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), **launch.sleep_environment(read)}
        self.log_path = folder / f"{self.name}-{'-'.join(map(str, gpus))}-{host}-{time.monotonic_ns()}.log"
        self.process = PROCESSES.Process(target=serve, args=(self.arguments, self.environment, str(self.log_path)))
        self.process.start()
        self.started = time.monotonic()

    def wait(self, seconds: float) -> Self:
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
        """The first errors in its log: what follows comes of them."""
        lines = [line for line in self.log().splitlines() if re.search(r"\b\w*(Error|Exception)\b: ", line)]
        return " | ".join(dict.fromkeys(lines[:3]))[:600] or self.log()[-300:]

    def log(self) -> str:
        """All that it wrote."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def kill(self) -> None:
        """SIGKILL to the server and its engine processes; returns at once."""
        # one that has just begun leads no group yet
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            assert self.process.pid
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends it and waits until its GPUs are free again."""
        self.kill()
        self.process.join()
        until(lambda: all(used < GIB for used in used_memory(self.gpus)), f"GPUs {self.gpus} are free again", 30)

    def facts(self) -> dict[str, Any]:
        """What the engine said about its memory (GiB; the tightest GPU) and its start (s), and what the driver says of
        memory (GiB a GPU)."""
        return parse_log(self.log()) | {"used": [round(used / GIB, 2) for used in used_memory(self.gpus)]}

    def idle(self) -> bool:
        """Whether no request is in it."""
        now = totals(self.url)
        return not now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]

    def post(self, path: str, timeout_s: float = 60.0) -> None:
        """A command of vLLM's developers' mode; OSError where it fails."""
        get(self.url + path, data=b"", method="POST", timeout=timeout_s)

    def forget(self) -> None:
        """Waits until it is idle and empties its prefix cache."""
        until(self.idle, f"{self.name} on GPUs {self.gpus} is idle")
        self.post("/reset_prefix_cache", 5.0)


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


# The first worker alone says what it loaded and what is left, but each says this in the end.
USAGE = r"Actual usage is ([\d.]+) GiB for weight.* Current kv cache memory in use is ([\d.]+) GiB"


def parse_log(text: str) -> dict[str, Any]:
    """Numbers in vLLM's log: the weights and the KV cache of the worker that has the least for it, and of all else that
    is said more than once the largest."""
    found: dict[str, Any] = {}
    for name, pattern in PATTERNS.items():
        if values := [float(value.replace(",", "")) for value in re.findall(pattern, text)]:
            found[name] = min(values) if name in ("kv_tokens", "kv") else max(values)
    if workers := [(float(kv), float(weights)) for weights, kv in re.findall(USAGE, text)]:
        found["kv"], found["weights"] = min(workers)
    return found


def used_memory(gpus: Sequence[int]) -> list[int]:
    """Bytes in use on each of the GPUs."""
    machine = read_machine()
    return [gpu.total - gpu.free for gpu in machine.gpus if gpu.index in gpus]
