"""config.json of released models, and how many parameters they are published with."""

from typing import Any


def qwen3_5(
    layers: int, width: int, heads: int, kv_heads: int, ffn: int, value_heads: int, tied: bool
) -> dict[str, Any]:
    """A Qwen3.5 folder's config.json, with all keys that the published ones have."""
    text = {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248044,
        "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": width, "initializer_range": 0.02,
        "intermediate_size": ffn, "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "output_gate_type": "swish", "pad_token_id": None, "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": tied, "use_cache": True, "vocab_size": 248320,
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
                            "rope_theta": 10000000, "rope_type": "default"},
    }  # fmt: skip
    vision = {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5", "out_hidden_size": width, "patch_size": 16}
    ids = {
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
    }
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "language_model_only": False, "model_type": "qwen3_5", "text_config": text,
        "tie_word_embeddings": tied, "transformers_version": "4.57.1", "vision_config": vision, **ids,
    }  # fmt: skip


PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "ChatGLM-6B": (6_173_286_400, {
        "model_type": "chatglm", "vocab_size": 130528, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
        "inner_hidden_size": 16384, "layernorm_epsilon": 1e-5, "max_sequence_length": 2048, "position_encoding_2d": True,
        "bos_token_id": 130004, "eos_token_id": 130005, "gmask_token_id": 130001, "pad_token_id": 3,
        "torch_dtype": "float16",
    }),
    "GLM-4-9B": (9_399_951_360, {
        "model_type": "chatglm", "padded_vocab_size": 151552, "hidden_size": 4096, "num_layers": 40,
        "num_attention_heads": 32, "kv_channels": 128, "multi_query_attention": True, "multi_query_group_num": 2,
        "ffn_hidden_size": 13696, "layernorm_epsilon": 1.5625e-07, "rope_ratio": 500, "add_qkv_bias": True,
        "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True, "original_rope": True,
        "apply_residual_connection_post_layernorm": False, "seq_length": 131072, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }),
    "Qwen1.5-1.8B": (1_836_828_672, {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5504,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }),
    "Qwen2.5-7B": (7_615_616_512, {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }),
    "Qwen2.5-72B": (72_706_203_648, {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }),
    # of the text part, as transformers' class of that size has it
    "Qwen3.5-0.8B": (752_393_024, qwen3_5(24, 1024, 8, 2, 3584, 16, True)),
    "Qwen3.5-2B": (1_881_825_088, qwen3_5(24, 2048, 8, 2, 6144, 16, True)),
    "Qwen3.5-4B": (4_205_751_296, qwen3_5(32, 2560, 16, 4, 9216, 32, True)),
    "Qwen3.5-9B": (8_953_803_264, qwen3_5(32, 4096, 16, 4, 12288, 32, False)),
    "Qwen3.5-27B": (26_895_998_464, qwen3_5(64, 5120, 24, 4, 17408, 48, False)),
    "Qwen3-32B": (32_762_123_264, {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "head_dim": 128,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }),
}  # fmt: skip
