"""Adapters that mlx-lm itself wrote on the golden bases, and its logits with them, float32 on CPU; run by hand.

    pip install mlx-lm 'mlx[cpu]' && python tests/golden/make_mlx.py

Made with mlx-lm 0.32.2.
"""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_config

HERE = Path(__file__).parent
CASES = {"qwen2": ("lora", 1), "qwen2_dora": ("dora", -1), "qwen3_moe": ("lora", -1)}


def make(name: str, kind: str, num_layers: int) -> None:
    source, target = HERE / name.removesuffix("_dora"), HERE / "mlx" / name
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        j = json.loads((source / "config.json").read_text())
        j |= {"rope_theta": j["rope_parameters"]["rope_theta"], "rope_scaling": None}  # as mlx-lm reads them
        j |= {"num_experts": j["num_local_experts"]} if "num_local_experts" in j else {}
        (base / "config.json").write_text(json.dumps(j))
        (base / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        model, _ = load_model(base)
    model.update(tree_map(lambda p: p.astype(mx.float32), model.parameters()))
    model.freeze()
    parameters = {"rank": 3, "dropout": 0.1, "scale": 2.5}
    layers = len(model.layers) if num_layers < 0 else num_layers
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    mx.random.seed(0)
    trained = tree_map(lambda p: p + 0.2 * mx.random.normal(p.shape), model.trainable_parameters())
    model.update(trained)
    model.eval()
    ids = mx.arange(3, 27)
    logits = model(ids[None])[0]
    target.mkdir(parents=True, exist_ok=True)
    # what mlx_lm.lora keeps: its whole settings, and the trained tensors
    about = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "model": "Org/Base", "batch_size": 4,
             "iters": 1000, "learning_rate": 1e-5, "optimizer": "adam", "max_seq_length": 2048, "train": True, "seed": 0}  # fmt: skip
    save_config(about, target / "adapter_config.json")
    mx.save_safetensors(str(target / "adapters.safetensors"), dict(tree_flatten(trained)))
    mx.save_safetensors(str(target / "expected.safetensors"), {"input_ids": ids, "logits": logits})


if __name__ == "__main__":
    for name, (kind, num_layers) in CASES.items():
        make(name, kind, num_layers)
