"""Adapters on experts, and what transformers and peft compute with them: tests/golden/{qwen2_moe,qwen3_moe,glm4_moe,glm4_moe_lite}.

    PEERS/bin/python tests/golden/make_experts.py      (transformers 5.23.0, peft 0.21.2)

Each folder holds config.json and model.safetensors, of random weights, and in expected.safetensors ids and labels.
adapter/ and all that expected.safetensors has beside them are made here. Adapters are on attention, the experts and the
expert of all tokens; peft takes the last ones as parameters, for their names would mean the experts to it.
"""

from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def shared(name: str) -> list[str]:
    return [f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")]


FOLDERS = {
    "qwen2_moe": (ATTENTION, EXPERTS + shared("shared_expert")),
    "qwen3_moe": (ATTENTION, EXPERTS),
    "glm4_moe": (ATTENTION, EXPERTS + shared("shared_experts")),
    "glm4_moe_lite": (LATENT, EXPERTS + shared("shared_experts")),
}


def make(folder: Path, modules: list[str], parameters: list[str]) -> None:
    old = load_file(folder / "expected.safetensors")
    ids, labels = old["input_ids"], old["labels"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        base = model(ids, labels=labels)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    out = adapted(ids, labels=labels)
    out.loss.backward()
    adapted.save_pretrained(folder / "adapter")
    grads = {
        f"grad.{name.replace('.default.', '.')}": p.grad.contiguous()
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    expected = {
        "input_ids": ids, "labels": labels, "logits": base.logits, "loss": base.loss[None],
        "adapter_logits": out.logits.detach(), "adapter_loss": out.loss.detach()[None], **grads,
    }  # fmt: skip
    save_file({name: t.contiguous() for name, t in expected.items()}, folder / "expected.safetensors")
    off = (base.logits - old["logits"]).abs().max()
    print(folder.name, len(grads), "gradients; base logits off what was there by", float(off))


for name, targets in FOLDERS.items():
    make(HERE / name, *targets)
