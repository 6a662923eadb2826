"""Forward and backward of a LoRA step at the sizes of real models, random weights, against what others write.

    python -m bench.step [--models qwen2.5-0.5b ...] [--tokens 8192] [--document 1024] [--rank 16] [--compile] [--save FILE.json]

One stream of packed documents, half of each trained. The sides: minilora, the same with recomputation, with the wide products
by the library's GEMM, and on PyTorch's operations alone (--kernels off), the formulation of transformers and peft in this
project's blocks (adapters in fp32, each operation term by term, all logits in fp32) with and without recomputation, and that
under torch.compile. Attention and the stream are the same for all, so a trainer that pads pays for that beside. In turn, one
process a model; the optimizer's step, the same for all, is left out.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import formulations as others
from bench.roof import machine
from bench.shapes import MODELS, TOY, Shape
from bench.timing import Times, in_turn, peak_bytes
from bench.workers import Row, in_workers, lost, reason, work
from minilora.kernels.dispatch import kernels_enabled, use_library_gemm, use_triton
from minilora.lora import LoRALinear, add_lora
from minilora.machine.flops import flops_per_token, peak_flops, step_flops
from minilora.models import decoder, layers, qwen
from minilora.models.decoder import Decoder
from minilora.models.stream import Batch, Documents

SHAPES = {**MODELS, "toy": TOY}


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
    layers.pack_weights(model)
    for name, p in model.named_parameters():
        p.fill_(1) if "norm" in name else p.normal_(0, 0.02)
    add_lora(model, r=rank, alpha=2 * rank)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.02)
    return model.train()


def stream(shape: Shape, tokens: int, document: int, device: torch.device) -> Batch:
    """Documents end to end, the second half of each trained."""
    ids = torch.randint(shape.vocab, (tokens,), device=device)
    lengths = [min(document, tokens - start) for start in range(0, tokens, document)]
    documents = Documents.of(lengths).to(device)
    position = documents.positions
    trained = (position >= document // 2) & (position < document - 1)
    index = trained[:-1].nonzero().squeeze(1)
    return Batch(ids, documents, index, ids[index + 1], [])


@contextmanager
def formulated_by_others() -> Iterator[None]:
    """The blocks with every operation as transformers and peft write it."""

    def linear(self: LoRALinear, x: Tensor) -> Tensor:
        return others.peft_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)

    def add_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float, round_once: bool = False) -> tuple[Tensor, Tensor]:
        return others.hf_add_rms_norm(x, residual, w, eps)

    plain: dict[str, Any] = {
        "projections": lambda *linears: None,
        "rms_norm": lambda x, w, eps, round_once=False: others.hf_rms_norm(x, w, eps),
        "add_rms_norm": add_norm,
        "rope_pair": lambda q, k, cos, sin, interleaved=False: tuple(others.hf_rope(x, cos, sin) for x in (q, k)),
        "swiglu": others.hf_swiglu,
    }
    again = partial(checkpoint, use_reentrant=False)
    recompute = patch.object(decoder, "recomputed", lambda block, x, place, *_: again(block, x, place))
    with patch.multiple(layers, **plain), patch.object(LoRALinear, "forward", linear), recompute:
        yield


def sides(model: Decoder, batch: Batch, compile_too: bool) -> dict[str, Callable[[], float]]:
    """A step of each side: its loss, and gradients that are made and dropped."""

    def step(
        loss_of: Callable[[], Tensor], *contexts: Callable[[], AbstractContextManager[Any]]
    ) -> Callable[[], float]:
        def call() -> float:
            try:
                with ExitStack() as stack:
                    for context in contexts:
                        stack.enter_context(context())
                    loss = loss_of() / len(batch.targets)
                    loss.backward()
                return float(loss.detach())
            finally:
                model.zero_grad(set_to_none=True)

        return call

    def ours() -> Tensor:
        return model.loss(batch)

    def theirs(run: Callable[..., Tensor] = model) -> Tensor:
        hidden = run(batch.ids, batch.documents, batch.target_index)
        return others.hf_linear_cross_entropy(hidden, model.head, batch.targets)

    off, recomputing = partial(kernels_enabled, False), partial(patch.object, model, "checkpointing", True)
    found = {"minilora": step(ours), "minilora, recomputing": step(ours, recomputing)}
    if use_triton(model.head):
        found["minilora, library GEMM"] = step(ours, use_library_gemm)
        found["minilora, kernels off"] = step(ours, off)
    found["peft style"] = step(theirs, formulated_by_others, off)
    found["peft style, recomputing"] = step(theirs, formulated_by_others, off, recomputing)
    if compile_too:
        compiled = others.compiled(model)
        found["peft style, torch.compile"] = step(lambda: theirs(compiled), formulated_by_others, off)
    return found


def measure(model: Decoder, batch: Batch, device: torch.device, rounds: int, compile_too: bool) -> dict[str, Any]:
    """Seconds, memory and loss of each side; a side that fails, for want of memory above all, says why."""
    calls, result = sides(model, batch, compile_too), {}
    for name, call in list(calls.items()):
        try:
            loss = call()
            result[name] = {"loss": loss, "peak": peak_bytes(call, device)}
        except Exception as problem:
            if name == "minilora" and not isinstance(problem, torch.OutOfMemoryError):
                raise
            result[name] = {"failed": reason(problem)}
            del calls[name]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what one side kept is not there for the next one's peak
    for name, times in in_turn(calls, device, rounds).items():
        result[name]["seconds"] = times
    return result


HEAD = (
    "| model | side | ms a step (20 to 80 %) | tokens/s | against peft style | MFU | peak GB beyond the weights | loss |\n|"
    + "---|" * 8
)


def told(row: Row, tokens: int) -> str:
    """The lines of a model in Markdown."""
    if "sides" not in row:
        return f"| {row['name']} | {lost(row)} |" + " |" * 6
    base, lines = row["sides"].get("peft style", {}).get("seconds"), []
    for side, r in row["sides"].items():
        if "failed" in r:
            lines.append(f"| {row['name']} | {side} | {lost(r)} |" + " |" * 5)
            continue
        t = Times(*r["seconds"])
        against = f"{Times(*base).median / t.median:.2f}" if base else ""
        lines.append(
            f"| {row['name']} | {side} | {t.median * 1e3:.1f} ({t.low * 1e3:.1f} to {t.high * 1e3:.1f}) "
            f"| {tokens / t.median:,.0f} | {against} | {row['flops'] / t.median / row['roof']:.1%} "
            f"| {r['peak'] / 1e9:.2f} | {r['loss']:.4f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen2.5-0.5b"])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--document", type=int, default=1024 if on_gpu else 128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7 if on_gpu else 3)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--compile", nargs="*", metavar="MODEL", help="torch.compile of the peft style too (minutes)")
    parser.add_argument("--seconds", type=float, default=1e9, help="what is not done by then is skipped")
    parser.add_argument("--save", metavar="FILE", help="write the figures as JSON, and the table beside it as .md")
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    compiled = args.models if args.compile == [] else args.compile or []

    def case(name: str) -> Row:
        torch.manual_seed(0)
        model = random_model(SHAPES[name], torch.bfloat16, device, args.rank)
        batch = stream(SHAPES[name], args.tokens, args.document, device)
        flops = step_flops(model.config, [batch], flops_per_token(model, full=False))
        found = measure(model, batch, device, args.rounds, name in compiled)
        return {"flops": flops, "roof": peak_flops(device, torch.bfloat16), "sides": found}

    if args.lines:
        return work(args.names, case, args.lines)
    form = [f"--{key}={getattr(args, key)}" for key in ("tokens", "document", "rank", "rounds", "device")]
    command = [sys.executable, "-m", "bench.step", *form, "--models", *args.models]
    command += ["--compile", *compiled] if compiled else []
    print(HEAD, flush=True)
    rows = in_workers(command, args.models, 1, args.seconds, lambda row: print(told(row, args.tokens), flush=True))
    if args.save:
        about = machine(device) | {key: getattr(args, key) for key in ("tokens", "document", "rank", "rounds")}
        lines = [HEAD, *(told(row, args.tokens) for row in rows.values())]
        Path(args.save).write_text(json.dumps({"machine": about, "rows": list(rows.values())}, indent=1) + "\n")
        Path(args.save).with_suffix(".md").write_text("\n".join([json.dumps(about), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
