"""Writes small stand-ins for the presets' models below /stand-ins: right architecture and file format, random weights.

Runs in the replica's image, which has torch and transformers, with the real small model below /models.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaModel,
)

Weights = dict[str, torch.Tensor]

HIDDEN, MLP, VOCABULARY = 256, 512, 49280
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 8,  # EAGLE-3 takes the output of three that are neither first nor last
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUP = 128  # inputs that share a scale, in AWQ and GPTQ
PER_INT32 = 8  # numbers of 4 bits

TOKENIZER = AutoTokenizer.from_pretrained("/models/HuggingFaceTB/SmolLM2-135M-Instruct")
# Llama 3.1's mark of a tool call: vLLM's parser for that format insists on it.
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<|python_tag|>"]})


def write(name: str, config: PretrainedConfig, weights: Weights) -> None:
    """A model's folder, as it comes from the hub."""
    folder = Path("/stand-ins", name)
    config.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the replica is another user


def random_weights(model: PreTrainedModel) -> Weights:
    model.config.architectures = [type(model).__name__]
    return {name: weight.contiguous() for name, weight in model.to(torch.bfloat16).state_dict().items()}


def noise(*shape: int) -> torch.Tensor:
    return 0.02 * torch.randn(*shape, dtype=torch.bfloat16)


def eagle3_weights() -> Weights:
    """The head of EAGLE-3: one layer over the token's embedding beside what three of the model's layers make of it."""
    model = random_weights(LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 1})))
    layer = {name.replace("model.layers.0.", "midlayer."): weight for name, weight in model.items() if ".0." in name}
    for name in ("q", "k", "v"):
        weight = layer[f"midlayer.self_attn.{name}_proj.weight"]
        layer[f"midlayer.self_attn.{name}_proj.weight"] = noise(len(weight), 2 * HIDDEN)
    return layer | {
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "fc.weight": noise(HIDDEN, 3 * HIDDEN),
        "lm_head.weight": model["lm_head.weight"][: VOCABULARY // 2].clone(),
        # which tokens of the model the head knows, as offsets: the first half
        "d2t": torch.zeros(VOCABULARY // 2, dtype=torch.int64),
        "t2d": torch.arange(VOCABULARY) < VOCABULARY // 2,
    }


def quantized(weights: Weights, method: str) -> Weights:
    """The same model with the linear layers as AWQ or GPTQ store them: random numbers, eight in an integer."""
    packed: Weights = {}
    for name, weight in weights.items():
        layer = name.removesuffix("weight")
        outputs, inputs = weight.shape[0], weight.shape[-1]
        if not layer.endswith("_proj."):
            packed[name] = weight.to(torch.float16)
            continue
        shape = (inputs, outputs // PER_INT32) if method == "awq" else (inputs // PER_INT32, outputs)
        packed[layer + "qweight"] = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
        # eights and sevens: a zero in the middle, which GPTQ stores less one
        zero = -0x77777778 if method == "awq" else 0x77777777
        packed[layer + "qzeros"] = torch.full((inputs // GROUP, outputs // PER_INT32), zero, dtype=torch.int32)
        packed[layer + "scales"] = torch.full((inputs // GROUP, outputs), 0.005, dtype=torch.float16)
        if method == "gptq":
            packed[layer + "g_idx"] = (torch.arange(inputs) // GROUP).to(torch.int32)
    return packed


def main() -> None:
    """All of them."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    write("meta-llama/Llama-3.1-8B-Instruct", llama.config, random_weights(llama))
    head = LlamaConfig(**SIZES | {"num_hidden_layers": 1}, draft_vocab_size=VOCABULARY // 2)
    head.architectures = ["LlamaForCausalLMEagle3"]
    write("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", head, eagle3_weights())

    # One model as its own draft: what it guesses is right.
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"):
        write(name, qwen3.config, random_weights(qwen3))

    qwen2 = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    weights = random_weights(qwen2)
    write("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", qwen2.config, weights)
    awq = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    for name, how in (("Qwen/Qwen2.5-7B-Instruct-AWQ", awq), ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", gptq)):
        qwen2.config.quantization_config = how
        write(name, qwen2.config, quantized(weights, str(how["quant_method"])))

    roberta = XLMRobertaModel(XLMRobertaConfig(**SIZES | {"pad_token_id": 1}, position_embedding_type="absolute"))
    write("BAAI/bge-m3", roberta.config, random_weights(roberta))


if __name__ == "__main__":
    main()
