"""Keys of config.json: each one that is read changes something or is checked, each other one is harmless, refused or named."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model

from minilora.__main__ import main
from minilora.checkpoint.load import FAMILIES, keys_not_read, read_config
from minilora.errors import ModelError
from minilora.models.config_keys import DROPOUTS, HARMLESS, NEUTRAL, SPELLINGS, USED, check_keys, unknown_keys

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = {
    "qwen2": "qwen2", "qwen3": "qwen3", "glm": "glm", "glm4": "glm4", "qwen3_5": "qwen3_5_text", "qwen3_5_text": "qwen3_5_text", "chatglm": "chatglm", "chatglm2": "chatglm2", "qwen": "qwen",
    "qwen2_moe": "qwen2_moe", "qwen3_moe": "qwen3_moe", "glm4_moe": "glm4_moe", "glm4_moe_lite": "glm4_moe_lite",
    "gpt2": "gpt2", "qwen3_next": "qwen3_next", "qwen3_5_moe": "qwen3_5_moe_text", "qwen3_5_moe_text": "qwen3_5_moe_text",
}  # fmt: skip


def config_of(family: str) -> dict[str, Any]:
    j = json.loads((GOLDEN / FOLDERS[family] / "config.json").read_text())
    return j | {"model_type": family} if family == "qwen3_5" else j


def with_all_settings(family: str) -> dict[str, Any]:
    """A config in which no key is without effect because another one is off."""
    j = config_of(family)
    j.pop("layer_types", None)
    j.pop("mlp_layer_types", None)
    if family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        j |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    if family == "chatglm2":
        j |= {"rope_ratio": 2.0, "_name_or_path": "chatglm2-6b-32k"}
    return j


def outcome(j: dict[str, Any], folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(j))
    try:
        return asdict(read_config(folder))
    except ModelError as error:
        return error.what


@pytest.mark.parametrize("family", FAMILIES)
def test_each_key_that_is_read_changes_something_or_is_checked(family: str, tmp_path: Path):
    j = with_all_settings(family)
    before = outcome(j, tmp_path / "m")
    assert isinstance(before, dict), before

    def others(value: Any) -> list[Any]:
        first = value * 2 if type(value) in (int, float) else not value if type(value) is bool else "other"
        return [first, True, 7]

    idle = [
        key
        for key in sorted(USED[family])
        if all(outcome(j | {key: other}, tmp_path / "m") == before for other in others(j.get(key)))
    ]
    assert not idle


# numbers that decide no shape: positions, windows, ids
NO_SIZES = {
    "max_position_embeddings", "seq_length", "max_sequence_length", "n_positions", "sliding_window", "rope_theta", "rope_ratio",
    "max_window_layers", "num_experts_per_tok", "rotary_emb_base", "full_attention_interval", "rms_norm_eps", "layernorm_epsilon",
    "layer_norm_epsilon", "routed_scaling_factor", "initializer_range", "first_k_dense_replace", "decoder_sparse_step",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_no_size_is_larger_than_any_models(family: str, tmp_path: Path):
    """Each number near 2^31 is refused, by itself and where heads or experts only make too much together."""
    j = with_all_settings(family)
    numbers = [key for key in sorted(USED[family]) if type(j.get(key)) is int and key not in NO_SIZES]
    assert numbers
    for key in numbers:
        for huge in (2**31 - 1, 2**31 - 2, 2**31 - 128, 2**25):
            assert isinstance(outcome(j | {key: huge}, tmp_path / "m"), str), (key, huge)
    for size in {"head_dim", "kv_channels"} & j.keys():
        many = dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 1 << 16)
        assert isinstance(outcome(j | {"num_attention_heads": 1 << 16, size: 1 << 16} | many, tmp_path / "m"), str)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_known_as_harmless_are_silent(family: str, tmp_path: Path):
    j = config_of(family)
    before = outcome(j, tmp_path / "m")
    extra = {key: "x" for key in HARMLESS - USED[family]} | dict.fromkeys(DROPOUTS, 0.0)
    extra |= {key: values[0] for key, values in NEUTRAL.items() if values and key not in USED[family]}
    extra |= dict.fromkeys(NEUTRAL.keys() - USED[family] - extra.keys(), None)
    extra = {k: v for k, v in extra.items() if not any(k in names and set(names) & USED[family] for names in SPELLINGS)}
    assert outcome(j | extra, tmp_path / "m") == before and not unknown_keys(j | extra, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_of_other_arithmetic_stops(family: str):
    for key in NEUTRAL.keys() - USED[family]:
        with pytest.raises(ValueError, match=key):
            check_keys(config_of(family) | {key: 3}, family)


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.text(min_size=1),
    st.one_of(st.booleans(), st.integers(), st.text(min_size=1), st.just([1])),
)
def test_an_unknown_key_is_never_silent(family: str, key: str, value: Any):
    known = HARMLESS | NEUTRAL.keys() | DROPOUTS | USED[family]
    known |= {k for names in SPELLINGS if USED[family] & set(names) for k in names}
    if key not in known and key != "auto_map":
        assert unknown_keys(config_of(family) | {key: value}, family) == [key]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/config.json")), ids=lambda p: p.parent.name)
def test_nothing_is_told_of_configs_as_they_are_published(path: Path):
    read_config(path.parent)
    assert keys_not_read(path.parent) is None


def test_a_window_is_that_of_transformers_or_named(tmp_path: Path):
    j = config_of("qwen2") | {"max_window_layers": 1}
    j.pop("layer_types")
    j.pop("sliding_window")
    assert outcome(j | {"use_sliding_window": True}, tmp_path / "m")["windows"] == (None, 4096)
    assert outcome(j | {"use_sliding_window": True, "sliding_window": None}, tmp_path / "m")["windows"] == (None, None)
    assert unknown_keys(j | {"use_sliding_window": None, "sliding_window": 4}, "qwen2") == ["sliding_window"]


AS_PUBLISHED = {
    "chatglm": {
        "_name_or_path": "THUDM/chatglm-6b", "architectures": ["ChatGLMModel"], "auto_map": {"AutoConfig": "x"}, "bos_token_id": 130004,
        "eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3, "hidden_size": 4096,
        "inner_hidden_size": 16384, "layernorm_epsilon": 1e-05, "max_sequence_length": 2048, "model_type": "chatglm",
        "num_attention_heads": 32, "num_layers": 28, "position_encoding_2d": True, "torch_dtype": "float16",
        "transformers_version": "4.23.1", "use_cache": True, "vocab_size": 130528, "quantization_bit": 0, "quantization_embeddings": False,
        "pre_seq_len": None, "prefix_projection": False,
    },
    "chatglm2": {
        "_name_or_path": "THUDM/glm-4-9b-chat", "model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": {"AutoModel": "x"},
        "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "attn_implementation": "sdpa", "bias_dropout_fusion": True, "classifier_dropout": None, "eos_token_id": [151329, 151336, 151338],
        "ffn_hidden_size": 13696, "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
        "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_layers": 40, "original_rope": True, "pad_token_id": 151329, "padded_vocab_size": 151552,
        "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 500, "seq_length": 131072, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.30.2", "use_cache": True, "vocab_size": 151552,
    },
    "qwen": {
        "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "auto_map": {"AutoConfig": "x"}, "bf16": False,
        "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 22016,
        "kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 32768, "model_type": "qwen", "no_bias": True,
        "num_attention_heads": 32, "num_hidden_layers": 32, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "scale_attn_weights": True, "seq_length": 8192, "softmax_in_fp32": False, "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0", "use_cache": True, "use_cache_kernel": False,
        "use_cache_quantization": False, "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", AS_PUBLISHED)
def test_the_keys_of_folders_with_own_code_are_all_known(family: str, tmp_path: Path):
    assert isinstance(outcome(AS_PUBLISHED[family], tmp_path / "m"), dict)
    assert not unknown_keys(AS_PUBLISHED[family], family)


CONTRADICTIONS = {
    "two dtypes": ("qwen3", {"dtype": "float16", "torch_dtype": "bfloat16"}, "contradict"),
    "two flags of tying": ("qwen3", {"tie_word_embeddings": True, "tie_embeddings": False}, "contradict"),
    "tying as text": ("qwen3", {"tie_word_embeddings": "false"}, "true or false"),
    "two head sizes": ("qwen3", {"head_dim": 32, "kv_channels": 64}, "contradict"),
    "another spelling alone": ("qwen2", {"rope_theta": None, "rope_parameters": None, "rope_base": 5e5}, "write rope_theta"),
    "two bases": ("qwen2", {"rope_theta": 7.0}, "rope_theta is 1000000.0 in the rope settings and 7.0 beside"),
    "two shares": ("glm", {"partial_rotary_factor": 1.0}, "partial_rotary_factor is 0.5 in the rope settings"),
    "two rope types": ("qwen2", {"rope_parameters": {"rope_type": "default", "type": "yarn", "factor": 2.0}}, "contradict"),
    "a factor without a type": ("qwen2", {"rope_parameters": {"factor": 4.0}}, "factor"),
    "a partial rotation": ("qwen3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    "sliding layers without windows": ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    "linear layers": ("qwen2", {"layer_types": ["linear_attention"] * 2}, "layer_types"),
    "sliding layers of GLM": ("glm", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    "two widths": ("qwen", {"n_embd": 32}, "contradict"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "part"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused(family: str, changes: dict[str, Any], part: str, tmp_path: Path):
    told = outcome(config_of(family) | changes, tmp_path / "m")
    assert isinstance(told, str) and part in told, told


def test_two_spellings_that_agree_are_read(tmp_path: Path):
    j = config_of("qwen3")
    assert outcome(j | {"n_layer": j["num_hidden_layers"], "torch_dtype": j["dtype"]}, tmp_path / "m") == outcome(
        j, tmp_path / "m"
    )


def test_unknown_keys_and_dropouts_are_named_by_the_commands(tmp_path: Path, capsys):
    folder = make_model(tmp_path / "m", attention_dropout=0.1, my_key={"a": 1})
    assert main(["inspect", "model", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "not read: 'my_key'" in told and "not applied: attention_dropout" in told
