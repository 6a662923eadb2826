"""config.json of released models, and how many parameters they are published with."""

from typing import Any

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
    "Qwen3-32B": (32_762_123_264, {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "head_dim": 128,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }),
}  # fmt: skip
