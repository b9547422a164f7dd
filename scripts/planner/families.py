"""What is known of families of models: how their configs call things and what these leave out, which keys are without
effect on sizes, and which families cannot be sized."""

import re
from typing import Any

# Models that keep a state of another kind than those that are read here, by how keys begin that only such models have.
STATE_KEYS = ("ssm_cfg", "mamba_dt_rank", "time_step_rank", "state_size")
# Families that vLLM serves and that the planner cannot size, and why.
MAMBA1 = "keeps a recurrent state of another kind (Mamba 1)"
ALONE = "keeps a recurrent state and nothing else"
NOT_SIZED = {
    "mamba": MAMBA1,
    "falcon_mamba": MAMBA1,
    "jamba": MAMBA1,
    "plamo2": MAMBA1,
    "mamba2": ALONE,
    "rwkv": ALONE,
    "recurrent_gemma": "keeps a recurrent state of another kind (RG-LRU)",
    "zamba2": "shares blocks of attention between its layers, beside a recurrent state",
    "minimax_text_01": "keeps a recurrent state of another kind (lightning attention)",
    "bailing_moe_linear": "keeps a recurrent state of another kind (lightning attention)",
    "hrm_text": "runs its layers several times, each with a KV cache of its own",
    "iquestloopcoder": "runs its layers several times, each with a KV cache of its own",
    "k2_horizon": "has experts in its attention",
    "minicpm3": "keeps keys and values in vLLM whose widths differ from what its latent vector says",
    "phi3_v": "has a tower whose sizes its config does not say",
    "phi4mm": "has towers and adapters whose sizes its config does not say",
    "molmo": "has a tower whose sizes its config does not say",
    "dbrx": "states its sizes in keys of its own (ffn_config, attn_config)",
    "longcat_flash": "has two attentions in each layer, and experts that compute nothing",
    "kimi_k3": "has attention and experts of shapes that are not known",
    "dots3_note": "looks up what it sees in an index whose arithmetic is not known",
    "deepseek_v41": "looks up embeddings of sequences of words",
    "minimax_m3": "looks up what it sees in an index whose arithmetic is not known",
    "minimax_m3_vl": "looks up what it sees in an index whose arithmetic is not known",
    "qwen4_exp": "looks up what it sees in an index whose arithmetic is not known",
    "hy_v4": "looks up what it sees in an index whose arithmetic is not known",
    "glm5_next": "looks up what it sees in an index whose arithmetic is not known",
}
# Architectures that vLLM served once, by the last version that did (`_PREVIOUSLY_SUPPORTED_MODELS` in
# vllm/model_executor/models/registry.py, 0.32).
UNSERVED = {
    "0.9.2": "Phi3SmallForCausalLM",
    "0.10.2": ("MotifForCausalLM Phi4FlashForCausalLM DonutForConditionalGeneration MllamaForConditionalGeneration"),
    "0.12.0": "Phi4MultimodalForCausalLM",
    "0.22.0": "JAISLMHeadModel",
    "0.23.0": (
        "ErnieModel ErnieForSequenceClassification ErnieForTokenClassification InternLM2VEForCausalLM "
        "QWenLMHeadModel QwenVLForConditionalGeneration InternLMForCausalLM XverseForCausalLM Dots1ForCausalLM "
        "BambaForCausalLM MiniMaxForCausalLM MiniMaxText01ForCausalLM MiniMaxM1ForCausalLM "
        "MiniMaxVL01ForConditionalGeneration BaiChuanForCausalLM BaichuanForCausalLM "
        "Tarsier2ForConditionalGeneration"
    ),
    "0.24.0": (
        "AquilaModel AquilaForCausalLM Grok1ModelForCausalLM Grok1ForCausalLM TarsierForConditionalGeneration "
        "MantisForConditionalGeneration MusicFlamingoForConditionalGeneration AyaVisionForConditionalGeneration"
    ),
    "0.25.0": "TeleChatForCausalLM PersimmonForCausalLM FuyuForCausalLM",
    "0.26.0": "Plamo2ForCausalLM OuroForCausalLM",
    "0.28.0": (
        "ArcticForCausalLM ChameleonForConditionalGeneration Cheers CheersForConditionalGeneration "
        "Fairseq2LlamaForCausalLM FireRedLIDForConditionalGeneration GritLM HCXVisionForCausalLM MPTForCausalLM "
        "MptForCausalLM RWForCausalLM StableLMEpochForCausalLM PrithviGeoSpatialMAE"
    ),
}
# What a layer does, by its name in layer_types; those with a state by how it is made.
GATED_DELTA, MAMBA2, KDA, SHORT_CONV = "linear_attention", "mamba", "kda", "conv"
SEEING = ("full_attention", "sliding_attention", "attention", "chunked_attention", "full", "sliding")
# Families whose layers look up what they see in an index (DeepSeek's sparse attention), as layer_types may say.
INDEXED, INDEXED_KINDS = "indexed_attention", ("deepseek_v32", "glm_moe_dsa")
# Letters of hybrid_override_pattern.
PATTERN = {"M": MAMBA2, "*": "full_attention", "-": "mlp", "E": "moe"}
# What the language model in a larger config.json leaves to its class in transformers. A config of its own says it.
OF_A_PART: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
}
# What a config.json leaves to its class in transformers; those of Gemma 3 on the hub say little else.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gemma4": {
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 16,
            "patch_size": 16,
            "image_size": 800,  # 2,520 patches
        },
        "audio_config": {"hidden_size": 1024, "num_hidden_layers": 12},
    },
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2},
    "llama4_text": {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 131072,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
    },
}
# Families that use the embedding as the head where their config does not say (class defaults of transformers).
TIED = (
    "gemma",
    "cohere",
    "gpt2",
    "gpt_bigcode",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "starcoder2",
    "smollm3",
    "ernie4_5",
    "lfm2",
)
# Families whose MLP has two matrices; all others gate theirs with a third.
UNGATED = (
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "opt",
    "phi",
    "falcon",
    "starcoder2",
    "bloom",
    "mpt",
    "nemotron",
    "nemotron_h",
    "arcee",
    "jais2",
    "apertus",
    "bert",
    "roberta",
    "xlm-roberta",
)
# How configs call one thing. What is not here has one name.
NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "intermediate": ("block_ff_dim", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "experts": ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    "used_experts": (
        "num_experts_per_tok",
        "experts_per_token",
        "num_experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_top_k",
        "moe_k",
    ),
    "shared_experts": ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "num_shared_expert"),
    "shared_width": (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "first_dense": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "sparse_step": ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step"),
    "length": (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "max_sequence_length",
        "max_seq_length",
        "seq_len",
    ),
    "mamba_heads": ("mamba_num_heads", "mamba_n_heads"),
    "mamba_width": ("mamba_head_dim", "mamba_d_head"),
    "mamba_groups": ("n_groups", "mamba_n_groups"),
    "mamba_size": ("ssm_state_size", "mamba_d_state"),
    "mamba_kernel": ("conv_kernel", "mamba_d_conv"),
    "window_every": ("sliding_window_pattern", "global_attn_every_n_layers"),
    "tower_hidden": ("embed_dim", "hidden_size", "d_model", "vt_hidden_size"),
    "tower_intermediate": ("intermediate_size", "encoder_ffn_dim", "vt_intermediate_size"),
    "tower_layers": (
        "depth",
        "num_hidden_layers",
        "num_layers",
        "encoder_layers",
        "conf_num_hidden_layers",
        "vt_num_hidden_layers",
    ),
    "dtype": ("torch_dtype", "dtype"),
}
# Kinds of RoPE scaling whose length is in the stated one already.
LONGROPE = ("su", "longrope")
SCALED_ALREADY = (*LONGROPE, "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope")
# Keys of a size-like kind that are without effect on what a GPU holds, or on which too much is counted without them.
HARMLESS = {
    "architectures",
    "image_size",  # of a tower whose config lies in the language model's
    "lora_rank",  # adapters that a model is published with, a hundredth of it
    "mtp_num_hidden_layers",
    "mtp_transformer_layers",
    "num_beam_groups",
    "patch_size",
    "rope_ratio",  # of RoPE's base alone
    "sliding_window_size",  # beside sliding_window, which is read
    "vision_batch_size",
    "word_embed_proj_dim",  # of OPT: hidden_size or less
    "attention_head_dim",  # beside head_dim
    "block_dim",  # of LFM2: hidden_size
    "conv_dim_out",
    "mamba_chunk_size",
    "num_heads",  # beside num_attention_heads
    "order_of_interleaved_layers",
    "attn_layer_indices",
    "eos_token_id",
    "chunk_size",
    "ep_size",
    "head_dim_rope",
    "index_topk_pattern",
    "layer_rope_theta",
    "max_window_layers",
    "matryoshka_dimensions",  # shorter vectors than the one that it gives
    "matryoshka_dims",
    "mlp_multipliers",
    "model_parallel_size",
    "moe_layers",
    "num_mtp_layers",
    "no_rope_layers",
    "activation_sparsity_pattern",
    "qk_head_dim",
    "rotary_dim",
    "tensor_parallel_size",
    "type_vocab_size",
    "unpadded_vocab_size",
}
# Parts of a config.json that say nothing of sizes, or the same again, or lie in another part that is read.
OPAQUE = {
    "rope_scaling",
    "rope_parameters",
    "quantization_config",
    "compression_config",
    "auto_map",
    "dual_chunk_attention_config",
    "task_specific_params",
    "text_config",
    "llm_config",
    "talker_config",  # what speaks, which vLLM does not load
    "token2wav_config",
    "code2wav_config",
}
# What the estimate of a tower covers: its heads, and what stands between it and the language model.
TOWERS = ("vision_config", "audio_config")
# Families whose towers that see vLLM does not split, or not all of them.
WHOLE_TOWERS = ("gemma3n", "gemma4", "internvl", "muse_glimmer")
TOWER_HARMLESS = {
    "alignment_intermediate_size",
    "downsample_hidden_size",
    "downsample_ratio",
    "dynamic_image_size",
    "encoder_attention_heads",
    "force_image_size",
    "global_head_dim",
    "head_dim",
    "in_dim",
    "input_feat_size",
    "max_image_size",
    "max_img_size",
    "mel_vocab_size",
    "mm_hidden_size",
    "pooling_kernel_size",
    "position_embedding_size",
    "vt_num_attention_heads",
    "merge_kernel_size",
    "merge_size",
    "merged_hidden_size",
    "min_image_size",
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "out_hidden_size",
    "output_dim",
    "patch_dim",
    "pixel_shuffle_ratio",
    "projection_dim",
    "projection_hidden_size",
    "projection_intermediate_size",
    "projector_hidden_size",
    "projector_input_dim",
    "projector_output_dim",
    "spatial_merge_size",
    "spatial_patch_size",
    "temporal_merge_size",
    "temporal_patch_size",
    "text_hidden_size",
    "video_patch_dim",
    "video_temporal_patch_size",
    "vision_aspect_ratio",
    "vision_hidden_size",
    "vision_output_dim",
    "vocab_size",
    "window_kernel_size",
    "window_size",
    # of the sound encoder of Gemma 3n
    "conf_attention_chunk_size",
    "conf_conv_kernel_size",
    "conf_num_attention_heads",
    "sscp_conv_channel_size",
    "sscp_conv_kernel_size",
    "sscp_conv_stride_size",
}
SIZES = re.compile(
    r"(_dims?|_sizes?|_heads|_layers|_groups|_ratios?|_rank|_inner|_expand|_state|_per_layer|_d_conv)$|^block_configs$"
)
ENCODER_DECODERS = ("whisper", "t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100")
