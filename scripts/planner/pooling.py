"""Which models vLLM serves for vectors and scores instead of text, and how it feeds them (0.32)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Another JSON file of the model by its name, None where it has none.
Further = Callable[[str], Mapping[str, Any] | None]

# Families of encoders, by how the names of their architectures begin.
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "ModernBert", "NomicBert", "Gte", "New", "BgeM3", "ColBERT", "HF_ColBERT")
# How architectures end that give vectors or scores, and those that end so too but write text or guess it
# (`_SUFFIX_TO_DEFAULTS` in vllm/config/model.py, after vllm/model_executor/models/registry.py).
POOLING = ("ForTextEncoding", "Classification", "ForRewardModeling", "Model", "ForMaskedLM")
TEXT = ("LMHeadModel", "LMModel", "ChatModel", "ChatGLMModel", "OmniModel", "AudioModel", "UltravoxModel")
GUESSING = ("DraftModel", "AssistantModel", "SparkModel", "MTPModel", "MedusaModel")
SENTENCE_CONFIGS = [
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


@dataclass(frozen=True)
class Pooling:
    """A model whose states are pooled into a vector or a score."""

    encoder: bool  # each token sees all others, so nothing is kept in a KV cache
    whole_prompts: bool  # its prompts are not cut into pieces: each has to fit into one step
    max_length: int | None = None  # tokens that its files state beside its positions

    @classmethod
    def read(cls, architecture: str, config: Mapping[str, Any], further: Further) -> "Pooling | None":
        """None for a model that writes text (`attn_type`, `is_chunked_prefill_supported` in vllm/config/model.py)."""
        family = architecture.startswith(ENCODERS)
        by_name = family or (architecture.endswith(POOLING) and not architecture.endswith(TEXT + GUESSING))
        # Sentence Transformers keeps there how a model's states are pooled, of decoders too
        modes = further("1_Pooling/config.json")
        if not by_name and modes is None:
            return None
        modes = modes or {}
        both_ways = config.get("is_causal") is False or bool(config.get("use_bidirectional_attention"))
        encoder = family or "Bidirectional" in architecture or both_ways
        averaged = str(modes.get("pooling_mode")).lower() in ("mean", "cls") or any(
            modes.get(f"pooling_mode_{one}") is True for one in ("mean_tokens", "cls_token")
        )
        whole_prompts = encoder or averaged or "ProcessReward" in architecture
        return cls(encoder, whole_prompts, _stated_length(config, further))


def _stated_length(config: Mapping[str, Any], further: Further) -> int | None:
    """Tokens that Sentence Transformers or the tokenizer state, None where neither does (`get_and_verify_max_len` in
    vllm/config/model.py). vLLM refuses to start with more."""
    limits = []
    if config.get("position_embedding_type") == "absolute":
        limits.append((further("tokenizer_config.json") or {}).get("model_max_length"))
    if found := next((one for name in SENTENCE_CONFIGS if (one := further(name))), None):
        limits.append(found.get("max_seq_length"))
    return min((int(one) for one in limits if isinstance(one, (int, float)) and one >= 1), default=None)
