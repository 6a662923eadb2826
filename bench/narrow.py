"""A LoRA step at an eighth of the width of published models, by bench.train: minilora and transformers + peft in turn.

    python -m bench.narrow --model DIR --data FILE --side hf=PYTHON [--of qwen3_5 qwen3_moe] [other flags of bench.train]

For families whose smallest models are too large for a laptop. Widths, heads and vocabulary are divided by eight; layers,
experts, chosen experts and the size of a head are as published. Weights are random, and the folders are gone at the end.
--model is where the tokenizer comes from; its ids are taken modulo the vocabulary. Adapters are on all linears, those of
every expert among them.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import train
from minilora.checkpoint.load import empty_model, read_config
from minilora.checkpoint.save import save_model

# a key for each line of the models' own config.json that minilora and transformers both read
SHARED = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "max_position_embeddings": 4096,
}
NARROW: dict[str, dict[str, Any]] = {
    "qwen3_5": {  # Qwen3.5-9B
        "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 248320 // 8, "hidden_size": 4096 // 8,
        "intermediate_size": 12288 // 8, "num_hidden_layers": 32, "num_attention_heads": 16 // 8, "num_key_value_heads": 1, "head_dim": 256,
        "linear_num_key_heads": 16 // 8, "linear_num_value_heads": 32 // 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    },
    "qwen3_moe": {  # Qwen3-30B-A3B
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936 // 8, "hidden_size": 2048 // 8,
        "intermediate_size": 6144 // 8, "num_hidden_layers": 48, "num_attention_heads": 32 // 8, "num_key_value_heads": 1, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768 // 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "rope_theta": 1000000.0, "tie_word_embeddings": False,
    },
}  # fmt: skip


def make_folder(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of random weights, as large as keeps the hidden state's size from layer to layer."""
    named = folder.with_name("config")
    named.mkdir()
    (named / "config.json").write_text(json.dumps(SHARED | config))
    model = empty_model(read_config(named)).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(train.SEED)
    for p in model.parameters():
        p.normal_(0.0, p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1, generator=generator)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight") and "Offset" not in type(model.get_submodule(name.rpartition(".")[0])).__name__:
            p += 1
    save_model(model, folder, named)


def main(argv: list[str] | None = None) -> None:
    parser = train.parser_of(__doc__ or "")
    parser.add_argument("--of", nargs="+", choices=NARROW, default=list(NARROW))
    parser.add_argument("--layers", type=int, help="fewer layers than the published model has")
    args = parser.parse_args(argv)
    steps, results = train.steps_of(args), {}
    for family in args.of:
        config = NARROW[family] | ({"num_hidden_layers": args.layers} if args.layers else {})
        vocab = config["vocab_size"]
        narrowed = [
            [{key: [i % vocab if i >= 0 else i for i in ids] for key, ids in row.items()} for row in of_step]
            for of_step in steps
        ]
        with tempfile.TemporaryDirectory() as work:
            make_folder(Path(work) / "model", config)
            results[family] = train.measure(argparse.Namespace(**vars(args) | {"model": f"{work}/model"}), narrowed)
        results[family]["layers"] = config["num_hidden_layers"]
        print(f"{family}\n{train.report(results[family])}\n", flush=True)
    train.save(results | {"machine": train.machine(args.device)}, args.save)


if __name__ == "__main__":
    main()
