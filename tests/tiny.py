"""A tiny checkpoint folder to train on: random Qwen3-shaped weights and a byte-level tokenizer with the ChatML specials."""

import json
from pathlib import Path

import torch
from tokenizers import models, pre_tokenizers

from docs.demo_model.make_model import TEMPLATE
from minilora.checkpoint.load import empty_model, read_config
from minilora.files.safetensors import write_tensors
from minilora.text.bpe import qwen_tokenizer

SPECIALS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
ROWS = [
    {"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1))) + "." * (n % 3)} for n in range(1, 14)
] + [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "one"},
                   {"role": "user", "content": "2"}, {"role": "assistant", "content": "two"}]}]  # fmt: skip


def make_model(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Write the folder; `changes` go into config.json, model_type "glm" or "glm4" too."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "qwen3", "hidden_act": "silu", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 56,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    } | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, p in empty_model(read_config(folder)).named_parameters():
        noise = torch.empty(p.shape).normal_(0, 0.3, generator=generator)
        weights[name] = (1 + noise if "norm" in name else noise).to(dtype)
    write_tensors(folder / "model.safetensors", weights)
    return folder


def byte_tokenizer() -> str:
    """A tokenizer.json whose tokens are the 256 bytes and the three specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = qwen_tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | SPECIALS, []))
    j = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    j["added_tokens"] = [{"id": i, "content": t, **flags} for t, i in SPECIALS.items()]
    return json.dumps(j)


def make_rows(path: Path) -> Path:
    path.write_text(json.dumps(ROWS))
    return path
