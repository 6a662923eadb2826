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


def gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    """A GPT-2 folder's config.json, without the dropouts of its training, which the header of a run tells."""
    return {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": width, "n_head": heads,
        "n_layer": layers, "n_positions": 1024, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}},
        "vocab_size": 50257,
    }  # fmt: skip


def qwen3_5_moe(layers: int, width: int, heads: int, experts: int, ffn: int) -> dict[str, Any]:
    """A config.json of Qwen3.5's mixtures: the hybrid's keys, with experts in the place of one MLP."""
    j = qwen3_5(layers, width, heads, 2, ffn, 2 * heads, False)
    text = {key: value for key, value in j["text_config"].items() if key != "intermediate_size"} | {
        "model_type": "qwen3_5_moe_text", "num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": ffn,
        "shared_expert_intermediate_size": ffn, "router_aux_loss_coef": 0.001, "output_router_logits": False,
    }  # fmt: skip
    kind = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": text}
    return j | kind | {"vision_config": j["vision_config"] | {"model_type": "qwen3_5_moe"}}


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
    **{name: (count, gpt2(*sizes)) for name, count, sizes in (
        ("distilgpt2", 81_912_576, (6, 768, 12)), ("gpt2", 124_439_808, (12, 768, 12)), ("gpt2-medium", 354_823_168, (24, 1024, 16)),
        ("gpt2-large", 774_030_080, (36, 1280, 20)), ("gpt2-xl", 1_557_611_200, (48, 1600, 25)),
    )},
    "Qwen3.5-35B-A3B": (34_660_610_688, qwen3_5_moe(40, 2048, 16, 256, 512)),
    "Qwen3-32B": (32_762_123_264, {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "head_dim": 128,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "torch_dtype": "bfloat16",
    }),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False, "torch_dtype": "bfloat16",
    }),
    # 110,468,824,832 with the layer for predicting several tokens, its embedding and its head, which are not read
    "GLM-4.5-Air": (106_852_251_264, {
        "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "head_dim": 128,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "partial_rotary_factor": 0.5, "attention_bias": True,
        "use_qk_norm": False, "tie_word_embeddings": False, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
    }),
    # 31,221,488,576 with that layer
    "GLM-4.7-Flash": (29_943_393_920, {
        "model_type": "glm4_moe_lite", "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
        "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "attention_bias": False, "tie_word_embeddings": False,
        "q_lora_rank": 768, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256,
        "n_routed_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "dtype": "bfloat16",
    }),
}  # fmt: skip
