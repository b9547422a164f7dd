"""What a checkpoint says of the bits of its weights, in the words of the methods that vLLM loads
(vllm/model_executor/layers/quantization, 0.32)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# A scale of 8 bits for every 16 weights of NVFP4, for every 32 of the MX formats.
NVFP4, MXFP4, MXFP8 = 4 + 8 / 16, 4 + 8 / 32, 8 + 8 / 32
NF4 = 4 + 32 / 64  # bitsandbytes keeps a 32-bit scale for every 64 weights
# Methods that always have the same bits; a scale for a whole matrix, or for 128 x 128 of it, counts nothing.
BITS = {
    "fp8": 8.0,
    "fbgemm_fp8": 8.0,
    "deepseek_v4_fp8": 8.0,
    "experts_int8": 8.0,
    "mxfp8": MXFP8,
    "mxfp4": MXFP4,
    "gpt_oss_mxfp4": MXFP4,
}
GROUPED = ("gptq", "awq", "auto_gptq", "auto_awq", "gptq_marlin", "awq_marlin", "inc", "auto-round")
MXFP4_METHODS = ("mxfp4", "gpt_oss_mxfp4")
EXPERTS_ONLY = (*MXFP4_METHODS, "experts_int8")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's linear layers are quantized."""

    method: str
    bits: float | None  # of a weight with its scales; None where the config does not say
    group: int = 0  # weights that share a scale, which one GPU has to hold whole; 0: no such rule
    experts_only: bool = False
    attention: bool = True  # quantized too
    online: bool = False  # while it loads, from 16 bits


def read_quantization(found: Mapping[str, Any]) -> Quantization:
    """From quantization_config in config.json, or from hf_quant_config.json."""
    method = str(found.get("quant_method") or (found.get("producer") or {}).get("name") or "unknown")
    method = method.lower().replace("compressed_tensors", "compressed-tensors")
    excluded = [one for key in ("modules_to_not_convert", "ignored_layers", "ignore") for one in found.get(key) or []]
    excluded += (found.get("quantization") or {}).get("exclude_modules") or []
    # a vision tower has its own attention
    attention = not any("self_attn" in str(one) and "vis" not in str(one) for one in excluded)
    bits, group = _bits(method, found)
    return Quantization(method, bits, group, method in EXPERTS_ONLY, attention)


def _bits(method: str, found: Mapping[str, Any]) -> tuple[float | None, int]:
    """(bits of a weight with its scales, group). Of several schemes the widest: which layers take which is not worth
    reading here."""
    if method in BITS:
        block = found.get("weight_block_size")
        return BITS[method], int(block[-1]) if block else 0
    if method in GROUPED:
        bits, group = int(found.get("bits", 4)), int(found.get("group_size", 128))
        # a 16-bit scale and a zero point for each group
        return (bits + (16 + bits) / group if group > 0 else bits), max(0, group)
    if method == "bitsandbytes":
        return (NF4 if found.get("load_in_4bit") else 8.0), 0
    if method.startswith("modelopt"):
        algorithm = str((found.get("quantization") or found).get("quant_algo")).upper()
        for part, bits_, group in (("NVFP4", NVFP4, 16), ("MXFP4", MXFP4, 32), ("MXFP8", MXFP8, 32), ("FP8", 8.0, 0)):
            if part in algorithm:
                return bits_, group
    if method == "compressed-tensors":
        schemes = [one.get("weights") for one in (found.get("config_groups") or {}).values()]
        # layers that no scheme names keep their 16 bits
        return max((_scheme(one) for one in schemes if one), default=(16.0, 0))
    if method == "quark":
        return max(_quark(found), default=(None, 0))
    if method == "torchao":
        text = str(found.get("quant_type")).lower()
        # 32 bits of scale and zero point for every 32 weights at most
        return (5.0 if "int4" in text else 8.0 if "int8" in text or "float8" in text else None), 0
    return None, 0


def _scheme(weights: Mapping[str, Any]) -> tuple[float, int]:
    """One scheme of compressed-tensors: floats of 4 bits have scales of 8, integers of 16."""
    bits, group = int(weights.get("num_bits", 8)), int(weights.get("group_size") or 0)
    if block := weights.get("block_structure"):
        return bits, int(block[-1])
    scale = 8 if bits == 4 and weights.get("type") == "float" else 16
    zero = 0 if weights.get("symmetric", True) else bits
    return bits + ((scale + zero) / group if group > 0 else 0), max(0, group)


def _quark(found: Mapping[str, Any]) -> Iterator[tuple[float, int]]:
    """The schemes of Quark whose type says its bits, such as fp8_e4m3, int8, uint4 or fp4."""
    for scheme in [found.get("global_quant_config"), *(found.get("layer_quant_config") or {}).values()]:
        weights = (scheme or {}).get("weight") or {}
        # of two, one after the other, the last is what is stored
        last = weights[-1] if isinstance(weights, list) else weights
        group = int(last.get("group_size") or 0)
        for part, bits in (("fp4", MXFP4), ("int4", 4 + (20 / group if group else 0)), ("fp8", 8.0), ("int8", 8.0)):
            if part in str(last.get("dtype")):
                yield bits, max(0, group)
                break
