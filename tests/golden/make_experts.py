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
DELTA = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def shared(name: str) -> list[str]:
    return [f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")]


FOLDERS = {
    "qwen2_moe": (ATTENTION, EXPERTS + shared("shared_expert")),
    "qwen3_moe": (ATTENTION, EXPERTS),
    "qwen3_next": ([*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"], EXPERTS + shared("shared_expert")),
    "qwen3_5_moe_text": ([*ATTENTION, *DELTA, "out_proj"], EXPERTS + shared("shared_expert")),
    "glm4_moe": (ATTENTION, EXPERTS + shared("shared_experts")),
    "glm4_moe_lite": (LATENT, EXPERTS + shared("shared_experts")),
}


def make_base(folder: Path) -> None:
    """qwen3_5_moe_text: sizes that are no multiples of each other, every tensor of one dimension moved from where it starts."""
    config = transformers.AutoConfig.for_model(
        "qwen3_5_moe_text", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=48,
        max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=False, dtype="float32", pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape) * (1.0 if p.dim() == 1 else 0.3)
    model.save_pretrained(folder)
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 128, (2, 24), generator=random)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.3, -100)
    with torch.no_grad():
        logits = model(ids).logits
    save_file({"input_ids": ids, "labels": labels, "logits": logits.contiguous()}, folder / "expected.safetensors")


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
    adapted.peft_config["default"].base_model_name_or_path = folder.name  # no path of the machine
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
    if not (HERE / name / "model.safetensors").is_file():
        make_base(HERE / name)
    make(HERE / name, *targets)
