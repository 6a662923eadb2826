"""The keys of config.json by family: those that are read, those that change no logit, those with one supported value.

A key that is in no table is unknown, and whoever opens a folder reports it. A key of NEUTRAL changes what a model
computes in other families or releases: with a value that is not listed, the model is none of ours.
"""

from collections.abc import Iterator
from typing import Any

ROPE = {"rope_theta", "rope_parameters", "rope_scaling"}
SHARED = {"model_type", "dtype", "torch_dtype", "tie_word_embeddings", "num_attention_heads", "hidden_size"}
LLAMA_LIKE = SHARED | ROPE | {
    "hidden_act", "attention_bias", "num_hidden_layers", "head_dim", "max_position_embeddings", "num_key_value_heads",
    "intermediate_size", "vocab_size", "rms_norm_eps",
}  # fmt: skip
QWEN = LLAMA_LIKE | {
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "qkv_bias", "use_qk_norm",
}  # fmt: skip
GLM = LLAMA_LIKE | {"partial_rotary_factor"}
HYBRID = GLM | {
    "layer_types", "full_attention_interval", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "linear_conv_kernel_dim", "attn_output_gate", "output_gate_type", "mamba_ssm_dtype",
}  # fmt: skip
QWEN_MOE = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers",
}  # fmt: skip
GLM_MOE = {
    "n_routed_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "n_group", "topk_group",
    "routed_scaling_factor", "n_shared_experts", "first_k_dense_replace", "mlp_layer_types", "topk_method", "scoring_func",
}  # fmt: skip
# what the family's config() reads; a test changes each of them
USED: dict[str, set[str]] = {
    "qwen2": QWEN,
    "qwen3": QWEN,
    "glm": GLM,
    "glm4": GLM,
    "qwen3_5": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID | QWEN_MOE | {"shared_expert_intermediate_size"},
    "qwen3_5_moe": (HYBRID | QWEN_MOE | {"shared_expert_intermediate_size"}) - {"norm_topk_prob"},
    "qwen3_5_moe_text": (HYBRID | QWEN_MOE | {"shared_expert_intermediate_size"}) - {"norm_topk_prob"},
    "glm4_moe": GLM | GLM_MOE | {"use_qk_norm"},
    "glm4_moe_lite": LLAMA_LIKE | GLM_MOE | {
        "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rope_interleave", "qk_head_dim",
    },
    "qwen2_moe": QWEN | QWEN_MOE | {"shared_expert_intermediate_size"},
    "qwen3_moe": (QWEN | QWEN_MOE) - {"max_window_layers"},
    "gpt2": {
        "model_type", "dtype", "torch_dtype", "tie_word_embeddings", "n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size",
        "layer_norm_epsilon", "activation_function",
    },
    "chatglm2": SHARED | {
        "_name_or_path", "rope_ratio", "multi_query_attention", "rmsnorm", "post_layer_norm", "add_bias_linear",
        "apply_residual_connection_post_layernorm", "original_rope", "num_layers", "multi_query_group_num", "kv_channels",
        "ffn_hidden_size", "padded_vocab_size", "layernorm_epsilon", "add_qkv_bias", "seq_length",
    },
    "chatglm": SHARED | {
        "position_encoding_2d", "num_layers", "inner_hidden_size", "vocab_size", "layernorm_epsilon", "max_sequence_length",
        "bos_token_id",
    },
    "qwen": SHARED | {
        "num_hidden_layers", "kv_channels", "intermediate_size", "rotary_pct", "max_position_embeddings", "vocab_size",
        "layer_norm_epsilon", "rotary_emb_base", "seq_length", "use_dynamic_ntk", "use_logn_attn", "no_bias", "bf16", "fp16", "fp32",
        "n_embd", "n_layer", "n_head", "ffn_hidden_size", "n_positions", "padded_vocab_size",
    },
}  # fmt: skip

# whatever they hold, the logits of a text are the same
HARMLESS = {
    "_name_or_path", "_commit_hash", "architectures", "transformers_version", "tokenizer_class", "tokenizer_type", "params_dtype",
    "name_or_path", "transformers.js_config", "unsloth_fixed", "unsloth_version", "generation_config",
    # ids that the tokenizer and generation_config.json name
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "cls_token_id", "mask_token_id", "gmask_token_id",
    "decoder_start_token_id", "bad_words_ids", "begin_suppress_tokens", "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    # how training starts, and what a forward pass returns or how it is carried out
    "initializer_range", "initializer_factor", "use_cache", "return_dict", "return_dict_in_generate", "output_attentions",
    "output_hidden_states", "output_scores", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward",
    "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "attn_implementation", "use_flash_attn",
    "use_cache_kernel", "onnx_safe", "gradient_checkpointing", "pretraining_tp", "bias_dropout_fusion", "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling", "softmax_in_fp32", "reorder_and_upcast_attn", "quantization_embeddings", "prefix_projection",
    # of a loss that keeps experts evenly loaded, and of layers that predict several tokens at once: neither is here
    "output_router_logits", "router_aux_loss_coef", "num_nextn_predict_layers", "num_mtp_layers",
    "max_window_layers",  # where there are no windows
    # of heads that are not a language model's
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "classifier_dropout",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    # how an answer is drawn, which generation_config.json says
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "max_length", "min_length",
    "max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty", "early_stopping",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "remove_invalid_values", "prefix",
    # of an encoder, where there is none
    "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings",  # layers that predict further tokens, which are not read
    "is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder",
}  # fmt: skip
OWN_CODE = {"chatglm", "chatglm2", "qwen"}  # families published with their own code, which auto_map names
DROPOUTS = {
    "attention_dropout", "hidden_dropout", "dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attn_dropout_prob",
    "emb_dropout_prob", "embedding_dropout", "mlp_dropout",
}  # fmt: skip
# null is neutral for each
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # scales and caps
    "attention_multiplier": (), "query_pre_attn_scalar": (), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "logit_scale": (1,), "logits_scaling": (1,), "output_multiplier": (1,), "residual_multiplier": (1,), "embedding_multiplier": (1,),
    "scale_emb": (1,), "scale_depth": (), "dim_model_base": (), "mup_base_width": (), "clip_qkv": (), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "logn_attn": (False,),
    # the shape of a block
    "use_parallel_residual": (False,), "parallel_attn": (False,), "parallel_residual": (False,), "attention_bias": (False,),
    "mlp_bias": (False,), "o_proj_bias": (False,), "lm_head_bias": (False,), "norm_after": (False,), "use_post_norm": (False,),
    "apply_residual_connection_post_layernorm": (False,), "fp32_residual_connection": (False,), "interleaved_qkv": (False,),
    "attn_output_gate": (False,), "use_gated_attention": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "pruned_heads": ({},), "use_cache_quantization": (False,), "activation": ("swiglu", "silu"), "is_causal": (True,),
    "use_bidirectional_attention": (False,), "attention_sink": (False,), "use_attention_sinks": (False,),
    # positions
    "alibi": (False,), "use_rope": (True,), "use_mrope": (False,), "mrope_section": (), "no_rope_layers": ([],),
    "no_rope_layer_interval": (), "pos_emb": ("rotary", "rope"), "position_embedding_type": ("rotary", "rope"),
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rotary_dim": (), "rope_ratio": (1,), "rope_interleave": (),
    "rope_local_base_freq": (), "rope_theta": (10000,), "rope_scaling": (), "rope_parameters": (),
    "use_dynamic_ntk": (False,), "use_logn_attn": (False,), "position_encoding_2d": (False,),
    # what a query sees
    "sliding_window": (), "use_sliding_window": (False,), "use_swa": (False,), "sliding_window_pattern": (), "sliding_window_size": (),
    "window_size": (), "attention_window": (), "local_attention_window": (), "attention_chunk_size": (), "full_attention_interval": (),
    "global_attn_every_n_layers": (), "linear_attention": (False,), "linear_num_value_heads": (), "linear_conv_kernel_dim": (), "mlp_only_layers": ([],),
    # experts and other branches
    "num_experts": (0,), "num_local_experts": (0,), "n_routed_experts": (0,), "n_shared_experts": (0,), "num_experts_per_tok": (0,),
    "moe_intermediate_size": (0,), "shared_expert_intermediate_size": (0,), "moe_num_experts": (0,), "kv_lora_rank": (),
    "q_lora_rank": (), "vision_config": (), "audio_config": (), "text_config": (),
    "use_qk_norm": (False,), "qk_layernorm": (False,), "pre_seq_len": (), "quantization_config": (), "quantization_bit": (0,),
}  # fmt: skip
ROPE_KEYS = {
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "truncate",
}  # fmt: skip
MROPE = {"mrope_section", "mrope_interleaved"}  # three rows of positions, which are equal for text

# names of one setting in several families: where a config.json has two of them, they must agree
SPELLINGS = (
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    ("hidden_size", "n_embd", "d_model"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("num_key_value_heads", "multi_query_group_num", "num_kv_heads", "n_head_kv"),
    ("head_dim", "kv_channels", "head_size", "attention_head_dim", "d_kv"),
    ("intermediate_size", "ffn_hidden_size", "inner_hidden_size", "n_inner", "d_ff"),
    ("rms_norm_eps", "layernorm_epsilon", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
    ("rope_theta", "rotary_emb_base", "rope_base"),
    ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx"),
    ("hidden_act", "hidden_activation", "activation_function"),
    ("tie_word_embeddings", "tie_embeddings", "tied_embeddings", "tie_lm_head", "share_input_output_embed"),
    ("attention_bias", "add_qkv_bias"),
    ("dtype", "torch_dtype"),
    ("vocab_size", "padded_vocab_size"),
    ("num_experts", "num_local_experts", "n_routed_experts"),
)


def check_keys(j: dict[str, Any], family: str) -> None:
    """ValueError for a key that asks for unsupported arithmetic, and for two keys that contradict each other."""
    for name, key, value in _not_read(j, family):
        if value is None or key not in NEUTRAL:
            continue
        if value not in NEUTRAL[key]:
            wanted = " or ".join(str(allowed) for allowed in NEUTRAL[key]) or "null"
            raise ValueError(f"{name} is {str(value)[:40]}; {family} is supported with {wanted} there")
    if "layer_types" not in USED[family] and set(j.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types is {str(j['layer_types'])[:40]}; {family} has full_attention alone")
    for spellings in SPELLINGS:
        found = {key: _plain(j[key]) for key in spellings if j.get(key) is not None}
        read = [key for key in spellings if key in USED[family]]
        taken = next((key for key in found if key in read), None)
        if not found or not read:
            continue
        if taken is None:
            raise ValueError(f"{next(iter(found))} is another family's name: write {read[0]}, as {family} does")
        other = next((key for key in found if key != taken and found[key] != found[taken]), None)
        if other is not None:
            raise ValueError(
                f"{taken} {found[taken]} and {other} {found[other]} contradict each other: keep one of them"
            )


def unknown_keys(j: dict[str, Any], family: str) -> list[str]:
    """The keys with content that are in no table, and dropouts other than zero: they may have a meaning."""
    known = HARMLESS | NEUTRAL.keys() | ({"auto_map"} if family in OWN_CODE else set())
    known |= {
        key for spellings in SPELLINGS if USED[family] & set(spellings) for key in spellings
    }  # check_keys compares them
    names = []
    for name, key, value in _not_read(j, family):
        empty = value is None or value in ("", [], {}) or (key in DROPOUTS and value == 0)
        if not empty and key not in known and key != "layer_types":
            names.append(name)
    if "sliding_window" in USED[family] and j.get("sliding_window") and j.get("use_sliding_window") is None:
        names.append("sliding_window")  # which counts where use_sliding_window is true
    return names


def _not_read(j: dict[str, Any], family: str) -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of each key that the family's config() does not read, those in the rope settings too."""
    for key, value in j.items():
        if key not in USED[family]:
            yield key, key, value
    inside = ROPE_KEYS | (USED[family] & {"partial_rotary_factor"})
    inside |= MROPE if "linear_num_value_heads" in USED[family] else set()
    for rope in ("rope_parameters", "rope_scaling"):
        if rope in USED[family] and isinstance(j.get(rope), dict):
            for key, value in j[rope].items():
                if key not in inside:
                    yield f"{rope}.{key}", key, value


def _plain(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value
