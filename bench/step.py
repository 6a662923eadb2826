"""Forward and backward of a LoRA step at the sizes of real models, random weights, against what others write.

    python -m bench.step [--models qwen2.5-0.5b ...] [--tokens 8192] [--document 1024] [--rank 16] [--save FILE.json]

One stream of packed documents, half of each trained. The sides: minilora, the same with recomputation, the same on PyTorch's
operations alone (--kernels off), the formulation of transformers and peft in this project's blocks (adapters in fp32, each
operation term by term, all logits in fp32), and that under torch.compile. Attention and the stream are the same for all, so a
trainer that pads pays for that beside. In turn, in one process; the optimizer's step, the same for all, is left out.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import formulations as others
from bench.roof import machine
from bench.shapes import MODELS, Shape
from bench.timing import in_turn, peak_bytes
from minilora.data import Batch
from minilora.evaluate import batch_loss
from minilora.flops import peak_flops, step_flops
from minilora.kernels.dispatch import force
from minilora.lora import LoRALinear, add_lora
from minilora.models import layers, qwen
from minilora.models.decoder import Decoder


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device, rank: int) -> Decoder:
    """A Qwen2-shaped Decoder with small random weights and adapters that are no longer zero."""
    config = qwen.config(
        {"model_type": "qwen2", "num_hidden_layers": shape.layers, "hidden_size": shape.width, "vocab_size": shape.vocab,
         "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size,
         "intermediate_size": shape.ffn, "tie_word_embeddings": shape.width < 2048, "max_position_embeddings": 32768}
    )  # fmt: skip
    with torch.device("meta"):
        model = qwen.decoder(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False)
    layers.lay_together(model)
    for p in model.parameters():
        p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1 if p.numel() == shape.width else 0)
    add_lora(model, r=rank, alpha=2 * rank)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.02)
    return model.train()


def stream(shape: Shape, tokens: int, document: int, device: torch.device) -> Batch:
    """Documents end to end, the second half of each trained."""
    ids = torch.randint(shape.vocab, (tokens,), device=device)
    place = torch.arange(tokens, device=device) % document
    rows = (
        (place >= document // 2) & (place < document - 1) & (torch.arange(tokens, device=device) < tokens - 1)
    ).nonzero()
    rows = rows.squeeze(1)
    seams = [*range(0, tokens, document), tokens]
    return Batch(ids, place, seams, rows, ids[rows + 1], [])


@contextmanager
def formulated_by_others() -> Iterator[None]:
    """The blocks with every operation as transformers and peft write it."""

    def linear(self: LoRALinear, x: Tensor) -> Tensor:
        return others.peft_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)

    def add_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float, once: bool = False) -> tuple[Tensor, Tensor]:
        total = x + residual
        return others.hf_rms_norm(total, w, eps), total

    plain: dict[str, Any] = {
        "project": lambda x, *linears: tuple(each(x) for each in linears),
        "rms_norm": lambda x, w, eps, once=False: others.hf_rms_norm(x, w, eps),
        "add_rms_norm": add_norm,
        "rope": lambda x, cos, sin, interleaved=False: others.hf_rope(x, cos, sin),
        "swiglu": others.hf_swiglu,
    }
    with patch.multiple(layers, **plain), patch.object(LoRALinear, "forward", linear):
        yield


def sides(model: Decoder, batch: Batch, compile_too: bool) -> dict[str, Callable[[], float]]:
    """A step of each side: loss and gradients."""

    def step(loss_of: Callable[[], Tensor]) -> float:
        loss = loss_of() / len(batch.rows)
        loss.backward()
        for p in model.parameters():
            p.grad = None
        return float(loss.detach())

    def recomputing() -> Tensor:
        model.checkpointing = True
        try:
            return batch_loss(model, batch)
        finally:
            model.checkpointing = False

    def theirs(run: Callable[..., Tensor]) -> Tensor:
        hidden = run(batch.ids, batch.positions, batch.seams, batch.rows)
        return others.hf_linear_cross_entropy(hidden, model.head, batch.targets)

    def on_torch() -> float:
        with force(False):
            return step(lambda: batch_loss(model, batch))

    def others_step(run: Callable[..., Tensor]) -> Callable[[], float]:
        def call() -> float:
            with formulated_by_others(), force(False):
                return step(lambda: theirs(run))

        return call

    found = {
        "minilora": lambda: step(lambda: batch_loss(model, batch)),
        "minilora, recomputing": lambda: step(recomputing),
        "minilora, kernels off": on_torch,
        "peft style": others_step(model),
    }
    if compile_too:
        found["peft style, torch.compile"] = others_step(others.compiled(model))
    return found


def measure(model: Decoder, batch: Batch, device: torch.device, rounds: int, compile_too: bool) -> dict[str, Any]:
    """Seconds, memory and loss of each side; a side that fails says why."""
    calls, result = sides(model, batch, compile_too), {}
    for name, call in list(calls.items()):
        try:
            loss = call()
            result[name] = {"loss": loss, "peak": peak_bytes(call, device)}
        except Exception as problem:
            if name == "minilora":
                raise
            result[name] = {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0][:100]}
            del calls[name]
    for name, times in in_turn(calls, device, rounds).items():
        result[name]["seconds"] = times
    return result


HEAD = (
    "| model | side | ms a step (20 to 80 %) | tokens/s | against peft style | MFU | peak GB beyond the weights | loss |\n|"
    + "---|" * 8
)


def table(model: str, result: dict[str, Any], tokens: int, flops: float, peak: float) -> list[str]:
    base, lines = result.get("peft style", {}).get("seconds"), []
    for name, r in result.items():
        if "failed" in r:
            lines.append(f"| {model} | {name} | {r['failed']} | | | | | |")
            continue
        t = r["seconds"]
        against = f"{base.median / t.median:.2f}" if base else ""
        lines.append(
            f"| {model} | {name} | {t.median * 1e3:.1f} ({t.low * 1e3:.1f} to {t.high * 1e3:.1f}) | {tokens / t.median:,.0f} "
            f"| {against} | {flops / t.median / peak:.1%} | {r['peak'] / 1e9:.2f} | {r['loss']:.4f} |"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=["qwen2.5-0.5b"])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 512)
    parser.add_argument("--document", type=int, default=1024 if on_gpu else 128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7 if on_gpu else 3)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the peft style too (minutes)")
    parser.add_argument("--save", metavar="FILE", help="write the figures as JSON, and the table beside it as .md")
    args = parser.parse_args(argv)
    device, rows, lines = torch.device(args.device), [], [HEAD]
    print(HEAD)
    for name in args.models:
        torch.manual_seed(0)
        shape = MODELS[name]
        model = random_model(shape, torch.bfloat16, device, args.rank)
        batch = stream(shape, args.tokens, args.document, device)
        result = measure(model, batch, device, args.rounds, args.compile)
        flops = step_flops(model, [batch], full=False)
        new = table(name, result, args.tokens, flops, peak_flops(device, torch.bfloat16))
        print("\n".join(new), flush=True)
        lines += new
        rows.append({"model": name, "flops": flops, "sides": result})
        del model
    if args.save:
        about = machine(device) | {key: getattr(args, key) for key in ("tokens", "document", "rank", "rounds")}
        Path(args.save).write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        Path(args.save).with_suffix(".md").write_text("\n".join([json.dumps(about), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
