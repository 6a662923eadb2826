"""What bitsandbytes, transformers and peft make of quantised weights: python tests/golden/make_quantized.py, with the extra `peers`.

quantised.safetensors holds tensors and the parts that bitsandbytes 0.50 makes of them; qwen3_nf4 is a folder that transformers
saved in 4 bits, qwen3_fp8 one with the tensors of a -FP8 release. Both have the logits, loss and gradients of transformers and peft.
"""

import json
import shutil
import tempfile
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

HERE = Path(__file__).parent
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "head_dim": 32, "vocab_size": 96, "max_position_embeddings": 256, "tie_word_embeddings": True}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """By name: ordinary weights, and those at the edges of the formats; odd sizes, and more than one block of blocks."""
    torch.manual_seed(0)
    return {
        "random": torch.randn(130, 128).bfloat16() * 0.02, "outliers": torch.randn(40, 65) * torch.rand(40, 1).pow(8) * 20,
        "half": torch.randn(24, 100).half(), "constant": torch.full((9, 64), 0.3), "zero": torch.zeros(4, 64),
        "one": torch.full((1, 1), -2.0), "odd": torch.randn(7, 9), "short": torch.randn(3, 43), "row of zeros": torch.randn(5, 64) * torch.tensor([1, 1, 0, 1, 1.0])[:, None],
        "tiny": torch.randn(12, 33) * 1e-38, "denormal": torch.randn(12, 33) * 1e-41, "huge": torch.randn(12, 33) * 1e36,
    }  # fmt: skip


def formats() -> dict[str, Tensor]:
    """The tensors, and under their names with a slash the parts of each format."""
    found = {}
    for name, weight in tensors().items():
        codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        _, plain = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        int8, rows, _ = bnb.int8_vectorwise_quant(weight.clone())
        found |= {
            name: weight, f"{name}/nf4/codes": codes.view(-1), f"{name}/nf4/plain_absmax": plain.absmax, f"{name}/nf4/absmax": state.absmax,
            f"{name}/nf4/nested_absmax": state.state2.absmax, f"{name}/nf4/offset": state.offset, f"{name}/int8/codes": int8, f"{name}/int8/absmax": rows,
        }  # fmt: skip
        if weight.shape[1] % 64 == 0:  # bitsandbytes 0.50.2 dequantises other rows wrongly on a CPU with AVX-512
            state.dtype = torch.float32
            found[f"{name}/nf4/weight"] = bnb.dequantize_4bit(codes, state)
    return found | {"levels": bnb.create_dynamic_map()}


def rows() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 13))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def expected(model: torch.nn.Module, folder: Path) -> None:
    """Write the model's results, with a new adapter that is saved beside them."""
    batch, found = rows(), {}
    # in training: for inference bitsandbytes computes in bf16 on some CPUs
    model = model.train()
    with torch.no_grad():
        out = model(**batch)
    found |= batch | {"logits": out.logits, "loss": out.loss[None]}
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(2)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) * 0.05
    out = adapted(**batch)
    out.loss.backward()
    found |= {"adapter_logits": out.logits.detach(), "adapter_loss": out.loss.detach()[None]}
    found |= {f"grad.{n.replace('.default', '')}": p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = None  # a folder of the machine that made it
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    save_file({n: t.contiguous() for n, t in found.items()}, folder / "expected.safetensors")


def plain_model() -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=0)).float()


def nf4_folder(folder: Path) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    with tempfile.TemporaryDirectory() as plain:
        plain_model().save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=how, device_map="cpu", dtype=torch.float32
        )
        model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    expected(model, folder)


def fp8_folder(folder: Path) -> None:
    class Quantizer:
        class quantization_config:
            weight_block_size, scale_fmt = [128, 128], "float"

    quantize, dequantize = Fp8Quantize(Quantizer), Fp8Dequantize(Quantizer)
    model = plain_model()
    model.save_pretrained(folder)
    stored = {}
    for name, value in load_file(folder / "model.safetensors").items():
        parts = quantize._quantize_one(name, value) if "_proj." in name else {name: value}
        stored |= parts
        if len(parts) == 2:
            wide = dequantize._dequantize_one(parts[name], parts[f"{name}_scale_inv"], torch.float32)
            model.get_parameter(name).data.copy_(wide)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    j = json.loads((folder / "config.json").read_text())
    j["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(j, indent=2) + "\n")
    expected(model, folder)


if __name__ == "__main__":
    save_file(formats(), HERE / "quantised.safetensors")
    for name, make in (("qwen3_nf4", nf4_folder), ("qwen3_fp8", fp8_folder)):
        (HERE / name).mkdir(exist_ok=True)
        make(HERE / name)
