"""adapter_config.json beside the tensors of a small adapter, opened on its model."""

import json
from functools import cache

from minilora import add_lora, load_adapter, load_model, save_adapter
from minilora.checkpoint.adapter_config import HARMLESS, READ, REFUSED
from minilora.checkpoint.load import empty_model, read_config
from minilora.files.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelFolder
from minilora.models.decoder import Decoder

from ..room import ROOM, fresh, tiny

WORDS = [*READ, *HARMLESS, *REFUSED, "LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "q_proj", "v_proj", "all-linear", ".*", r".*layers\.\d+\..*",
         "(a|a)*b", "(.+)+x", "pissa", "eva", "loftq", "default", "lora_only", "CAUSAL_LM"]  # fmt: skip
SEEDS = [
    json.dumps(j).encode()
    for j in (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "bias": "none"},
        {"peft_type": "LORA", "r": 8, "lora_alpha": 4, "target_modules": r".*self_attn\.(q|v)_proj", "rank_pattern": {"q_proj": 2, r".*\.v_proj": 2},
         "alpha_pattern": {"v_proj": 4.5}, "use_rslora": True, "init_lora_weights": "eva", "layers_to_transform": [0, 1], "modules_to_save": None},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_layers": 2, "token_dim": 32, "num_attention_heads": 2, "prefix_projection": False},
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "fan_in_fan_out": False},
        {"num_layers": 2, "fine_tune_type": "lora", "lora_parameters": {"rank": 2, "alpha": 16, "dropout": 0.0, "scale": 10.0, "keys": ["self_attn.q_proj"]}},
    )
]  # fmt: skip


@cache
def _weights() -> bytes:
    model = load_model(tiny(), device="cpu")
    add_lora(model, "q_proj,v_proj", r=2, alpha=4)
    save_adapter(model, ROOM / "adapter")
    return (ROOM / "adapter" / ADAPTER_WEIGHTS).read_bytes()


def _model() -> Decoder:
    """Without memory: an adapter is read all the same."""
    return empty_model(read_config(ModelFolder(tiny())))


def prepare() -> None:
    _weights()


def target(data: bytes) -> None:
    folder = fresh("its")
    (folder / ADAPTER_WEIGHTS).write_bytes(_weights())
    (folder / ADAPTER_CONFIG).write_bytes(data)
    load_adapter(_model(), folder, any_base=True)
