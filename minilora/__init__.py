"""minilora: a from-scratch LoRA engine for GLM and Qwen models.

import minilora is cheap; the names below are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load_model": "checkpoint.load",
    "save_model": "checkpoint.save",
    "add_lora": "lora",
    "merge": "adapted",
    "set_dropout_keys": "lora",
    "loftq_init": "checkpoint.loftq",
    "load_adapter": "checkpoint.adapter",
    "save_adapter": "checkpoint.adapter",
    "load_tokenizer": "text.tokenizer",
    "finetune": "finetuning",
    "reply": "generate",
    "Sampling": "sampling",
}

if TYPE_CHECKING:
    from .adapted import merge as merge
    from .checkpoint.adapter import load_adapter as load_adapter
    from .checkpoint.adapter import save_adapter as save_adapter
    from .checkpoint.load import load_model as load_model
    from .checkpoint.loftq import loftq_init as loftq_init
    from .checkpoint.save import save_model as save_model
    from .finetuning import finetune as finetune
    from .generate import reply as reply
    from .lora import add_lora as add_lora
    from .lora import set_dropout_keys as set_dropout_keys
    from .sampling import Sampling as Sampling
    from .text.tokenizer import load_tokenizer as load_tokenizer


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
