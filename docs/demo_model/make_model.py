"""How the demo's model was made: python -m docs.demo_model.make_model OUT

A byte-level BPE vocabulary is learned from the corpus, a Qwen3-shaped model of 2.5 million parameters starts from random
weights, and the engine trains every one of them (`method: full`). The same machine, thread count and torch give the same
bytes. A few minutes on two cores.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minilora.checkpoint.load import read_config
from minilora.console import Console
from minilora.files.safetensors import write_tensors
from minilora.machine.cpu import tune_memory
from minilora.models.qwen import decoder
from minilora.settings import resolve
from minilora.text.bpe import qwen_tokenizer
from minilora.train import train

from .corpus import conversations

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 2600
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "vocab_size": VOCAB,
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "attention_bias": False, "torch_dtype": "bfloat16", "eos_token_id": 2, "use_cache": True,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS = {
    "method": "full", "epochs": 16, "batch_size": 64, "lr": 2e-3, "warmup": 0.03, "weight_decay": 0.05, "beta2": 0.98,
    "save_every": 10**6, "seed": 1, "device": "cpu", "max_length": 512, "micro_tokens": 4096,
}  # fmt: skip


def learn_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE as Qwen has it, with a vocabulary learned from the texts."""
    tokenizer = qwen_tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def start_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Random bf16 weights: normal with deviation 0.02, norms one (GPT-2's start)."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, p in decoder(read_config(folder)).named_parameters():
        value = torch.ones(p.shape) if p.dim() == 1 else torch.empty(p.shape).normal_(0, 0.02, generator=generator)
        weights[name] = value.to(torch.bfloat16)
    return weights


def make(output: Path, console: Console) -> None:
    """Write the trained checkpoint folder."""
    chats = conversations()
    with tempfile.TemporaryDirectory() as work:
        start, rows = Path(work) / "start", Path(work) / "corpus.jsonl"
        start.mkdir()
        learn_tokenizer([m["content"] for chat in chats for m in chat]).save(str(start / "tokenizer.json"))
        files = {
            "config.json": CONFIG,
            "generation_config.json": {"eos_token_id": [2, 0], "do_sample": False},
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
            },
        }
        for name, value in files.items():
            (start / name).write_text(json.dumps(value, indent=2) + "\n")
        (start / "chat_template.jinja").write_text(TEMPLATE)
        write_tensors(start / "model.safetensors", start_weights(start))
        rows.write_text(
            "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats), encoding="utf-8"
        )
        run = Path(work) / "run"
        model = train(resolve(SETTINGS, {"model": start, "data": rows, "output": run}), console=console)
        model.rename(output)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tune_memory()
    torch.set_num_threads(2)
    make(Path(sys.argv[1]), Console())
