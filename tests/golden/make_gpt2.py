"""A tiny GPT-2 of random weights, and what transformers and peft compute with it: tests/golden/gpt2.

PEERS/bin/python tests/golden/make_gpt2.py      (transformers 5.23.0, peft 0.21.2)
"""

from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "gpt2"
LINEARS = ["c_attn", "c_proj", "c_fc"]


def perturbed(model: torch.nn.Module, part: str, size: float, seed: int) -> None:
    """Move every parameter with `part` in its name from where it starts, so that forgetting one shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if part in name:
            p.data = p.data + size * torch.randn(p.shape, generator=generator)


config = transformers.GPT2Config(
    vocab_size=128, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=32, dtype="float32", bos_token_id=0, eos_token_id=0,
    attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, attn_implementation="eager",
)  # fmt: skip
torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(config).eval()
perturbed(model, "", 0.15, 1)
model.save_pretrained(FOLDER)
random = torch.Generator().manual_seed(2)
ids = torch.randint(3, 128, (2, 24), generator=random)
labels = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.3, -100)
with torch.no_grad():
    base = model(ids, labels=labels)

adapter = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, fan_in_fan_out=True, task_type="CAUSAL_LM")
adapted = peft.get_peft_model(model, adapter).eval()
perturbed(adapted, "lora_", 0.1, 3)
out = adapted(ids, labels=labels)
out.loss.backward()
adapted.peft_config["default"].base_model_name_or_path = FOLDER.name  # no path of the machine
adapted.save_pretrained(FOLDER / "adapter")
for beside in ("adapter/README.md", "generation_config.json"):
    (FOLDER / beside).unlink()
grads = {f"grad.{n.replace('.default.', '.')}": p.grad for n, p in adapted.named_parameters() if p.requires_grad}
expected = {
    "input_ids": ids, "labels": labels, "logits": base.logits, "loss": base.loss[None],
    "adapter_logits": out.logits.detach(), "adapter_loss": out.loss.detach()[None], **grads,
}  # fmt: skip
save_file({name: t.contiguous() for name, t in expected.items()}, FOLDER / "expected.safetensors")
