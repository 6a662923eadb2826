"""A LoRA training step at the sizes of real models, random weights, against what others write.

    python -m bench.step [--models qwen2.5-0.5b ...] [--tokens 8192 ...] [--sides NAME ...] [--trace DIR] [--save FILE.json]

One stream of packed documents, half of each trained; forward and backward, the optimizer's step left out. The sides: minilora, its
products in the forms of GEMM that are fastest here; the same in each form; with recomputation; and on PyTorch's operations alone
(--kernels off); whole training steps, with packing, clipping and AdamW; the formulation of transformers and peft in this project's blocks (adapters in fp32,
each operation term by term, all logits in fp32) with and without recomputation, and under torch.compile; and transformers with peft
themselves where they are installed, under autocast as their Trainer runs, a row of a batch for each document.

Each side of each model is a case of its own: one that fails costs the others nothing. Beside the time of a step stand the CPU time
until its last kernel was launched, and what one more step shows under torch's profiler: the time in which the GPU was busy, and
how many kernels it ran. A step is bound by the GPU where the first is near the third, and by the CPU where it is near the second.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import formulations as others
from bench.figures import Figures
from bench.roof import machine
from bench.shapes import MODELS, TOY, Shape
from bench.timing import Times, peak_bytes, profiled, wall_and_host
from bench.workers import Row, in_workers, lost, work
from minilora import train
from minilora.config import TrainConfig
from minilora.data import IGNORE, Example, pack
from minilora.kernels.dispatch import kernels_enabled, use_gemm
from minilora.lora import LoRALinear, add_lora
from minilora.machine.flops import flops_per_token, measured_flops, peak_flops, step_flops
from minilora.machine.gemm import matrices, settle
from minilora.models import decoder, layers, qwen
from minilora.models.decoder import Decoder
from minilora.models.stream import Batch, Documents
from minilora.ranks.ranks import ALONE, Ranks

SHAPES = {**MODELS, "toy": TOY}
BASE = "peft style"  # what the other sides are compared with


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


class Form(NamedTuple):
    """What a step is made of, beside the model's shape."""

    tokens: int
    document: int
    rank: int
    device: torch.device

    def stream(self, shape: Shape) -> Batch:
        """Documents end to end, the second half of each trained."""
        ids = torch.randint(shape.vocab, (self.tokens,), device=self.device)
        lengths = [min(self.document, self.tokens - start) for start in range(0, self.tokens, self.document)]
        documents = Documents.of(lengths).to(self.device)
        position = documents.positions
        trained = (position >= self.document // 2) & (position < self.document - 1)
        index = trained[:-1].nonzero().squeeze(1)
        return Batch(ids, documents, index, ids[index + 1], [])


class Step(NamedTuple):
    """A call that makes a loss and gradients, the tokens that it goes through, and the operations that they need."""

    run: Callable[[], Tensor | float]
    tokens: int
    flops: float


@lru_cache(maxsize=1)  # the sides of a model follow each other
def the_model(shape: Shape, rank: int, device: torch.device) -> Decoder:
    torch.manual_seed(0)
    return random_model(shape, torch.bfloat16, device, rank)


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


# the sides: what makes a step of a shape and a form

Context = Callable[[], AbstractContextManager[Any]]


def ours(model: Decoder, batch: Batch) -> Tensor:
    return model.loss(batch)


def theirs(model: Decoder, batch: Batch, run: Callable[..., Tensor] | None = None) -> Tensor:
    hidden = (run or model)(batch.ids, batch.documents, batch.target_index)
    return others.hf_linear_cross_entropy(hidden, model.head, batch.targets)


def compiled(model: Decoder, batch: Batch) -> Tensor:
    return theirs(model, batch, _compiled(model))


@cache
def _compiled(model: Decoder) -> Callable[..., Tensor]:
    return others.compiled(model)


def in_form(gemm: str, model: Decoder, tokens: int) -> Context:
    """The products of a model in a form of GEMM; auto: in those that are fastest here, measured now."""
    chosen = {} if gemm == "auto" else gemm
    with use_gemm(chosen):
        settle(model, tokens)
    if matrices(model):
        the_model.cache_clear()  # its weights lie in other memory now: the next side gets a new one
    return partial(use_gemm, chosen)


def formulation(
    loss_of: Callable[[Decoder, Batch], Tensor], *contexts: Context, recomputing: bool = False, gemm: str = "auto"
) -> Callable[[Shape, Form], Step]:
    """A side that computes the model's loss by a formulation, inside of the contexts."""

    def make(shape: Shape, form: Form) -> Step:
        model = the_model(shape, form.rank, form.device)
        torch.manual_seed(1)  # the same stream for all
        batch, chosen = form.stream(shape), in_form(gemm, model, form.tokens)

        def run() -> Tensor:
            try:
                with ExitStack() as stack:
                    for context in (chosen, *contexts, partial(patch.object, model, "checkpointing", recomputing)):
                        stack.enter_context(context())
                    loss = loss_of(model, batch) / len(batch.targets)
                    loss.backward()
                return loss.detach()
            finally:
                model.zero_grad(set_to_none=True)

        return Step(run, form.tokens, step_flops(model.config, [batch], flops_per_token(model, full=False)))

    return make


def training(shape: Shape, form: Form, ranks: Ranks = ALONE) -> Step:
    """Whole steps of `train`: rows of many lengths packed into streams, clipping and AdamW; as many rows for each rank."""
    model = the_model(shape, form.rank, form.device)
    chosen = in_form("auto", model, form.tokens)
    the_model.cache_clear()  # training changes the adapters: the next side gets new ones
    config = TrainConfig()
    optimizer = train.optimizer_of(model, config)
    numbers = np.random.default_rng(1)
    lengths = numbers.integers(form.document // 2, form.document + 1, ranks.count * 2 * form.tokens // form.document)
    examples = []
    for n in lengths:
        ids = numbers.integers(shape.vocab, size=n)
        examples.append(Example(ids, np.where(np.arange(n) < n // 2, IGNORE, ids), ""))
    steps = iter(range(10**9))
    batches = pack(examples, form.tokens)

    def run() -> float:
        with chosen():
            streams = pack(examples, form.tokens)
            return train.train_step(model, optimizer, streams, config, next(steps), ranks=ranks).read()[0]

    return Step(run, int(lengths.sum()), step_flops(model.config, batches, flops_per_token(model, full=False)))


def transformers_peft(shape: Shape, form: Form) -> Step:
    """Their own model and adapters, fp32 adapters under autocast; documents as the rows of a batch, all of one length."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import Qwen2Config, Qwen2ForCausalLM  # pyright: ignore[reportMissingImports]

    config = Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_size,
        tie_word_embeddings=shape.width < 2048, attn_implementation="sdpa", use_cache=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with form.device:
        base = Qwen2ForCausalLM(config).to(torch.bfloat16)
    lora = LoraConfig(r=form.rank, lora_alpha=2 * form.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    rows = max(1, form.tokens // form.document)
    ids = torch.randint(shape.vocab, (rows, form.document), device=form.device)
    labels = ids.clone()
    labels[:, : form.document // 2 + 1] = IGNORE

    def run() -> Tensor:
        try:
            with torch.autocast(form.device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            return loss.detach()
        finally:
            model.zero_grad(set_to_none=True)

    with torch.device("meta"):
        like = random_model(shape, torch.bfloat16, torch.device("meta"), form.rank)
    batch = form._replace(tokens=rows * form.document).stream(shape)
    flops = step_flops(like.config, [batch], flops_per_token(like, full=False))
    return Step(run, rows * form.document, flops)


off = partial(kernels_enabled, False)
SIDES: dict[str, Callable[[Shape, Form], Step]] = {
    "minilora": formulation(ours),
    BASE: formulation(theirs, formulated_by_others, off, gemm="library"),
    "minilora, Triton GEMM": formulation(ours, gemm="triton"),
    "minilora, library GEMM": formulation(ours, gemm="library"),
    "minilora, augmented GEMM": formulation(ours, gemm="augmented"),
    "minilora, whole training step": training,
    "transformers + peft": transformers_peft,
    "minilora, recomputing": formulation(ours, recomputing=True),
    "peft style, recomputing": formulation(theirs, formulated_by_others, off, recomputing=True, gemm="library"),
    "minilora, kernels off": formulation(ours, off),
    "peft style, torch.compile": formulation(compiled, formulated_by_others, off, gemm="library"),
}
SLOW = {"peft style, torch.compile"}  # compiles for minutes: only where it is asked for by name


def measure(step: Step, device: torch.device, rounds: int, trace: Path | None) -> Row:
    """Loss, memory, times, and what a profiler sees of one step."""
    loss = float(step.run())  # also the first warm-up: kernels are compiled, the library has chosen
    peak = peak_bytes(step.run, device)
    wall, host = wall_and_host(step.run, device, rounds)
    seen = profiled(step.run, device, trace)
    return {"loss": loss, "peak": peak, "seconds": wall, "host": host, **seen._asdict()}


HEAD = (
    "| case | ms a step (20 to 80 %) | tokens/s | against peft style | CPU ms to the last launch | GPU busy ms | launches "
    "| MFU, data sheet | of the measured GEMM | peak GB beyond the weights | loss |\n|" + "---|" * 11
)


def name_of(model: str, tokens: int, side: str) -> str:
    return f"{model}, T={tokens}: {side}"


def line_of(row: Row, rows: dict[str, Row]) -> str:
    """A side in Markdown, against the base of its model where that is there."""
    if "seconds" not in row:
        return f"| {row['name']} | {lost(row)} |" + " |" * 9
    t = Times(*row["seconds"])
    base = rows.get(name_of(row["model"], row["asked"], BASE), {})
    against = f"{row['tokens'] / t.median / (base['tokens'] / base['seconds'][0]):.2f}" if "seconds" in base else ""
    busy = f"{row['busy'] * 1e3:.1f} | {row['launches']}" if row["launches"] else "|"
    return (
        f"| {row['name']} | {t.median * 1e3:.1f} ({t.low * 1e3:.1f} to {t.high * 1e3:.1f}) | {row['tokens'] / t.median:,.0f} "
        f"| {against} | {row['host'] * 1e3:.1f} | {busy} | {row['flops'] / t.median / row['roof']:.1%} "
        f"| {row['flops'] / t.median / row['measured roof']:.1%} | {row['peak'] / 1e9:.2f} | {row['loss']:.4f} |"
    )


def main(argv: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen2.5-0.5b"])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192 if on_gpu else 256], help="lengths of the stream"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[s for s in SIDES if s not in SLOW])
    parser.add_argument("--document", type=int, default=1024 if on_gpu else 128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5 if on_gpu else 3)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="write the profiler's traces there")
    parser.add_argument("--seconds", type=float, default=1e9, help="what is not done by then is skipped")
    parser.add_argument("--save", metavar="FILE", help="write the figures as JSON, and the table beside it as .md")
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    cases = {name_of(m, t, s): (m, t, s) for m in args.models for t in args.tokens for s in args.sides}

    @cache
    def roofs() -> dict[str, float]:
        return {"roof": peak_flops(device, torch.bfloat16), "measured roof": measured_flops(device, torch.bfloat16)}

    def case(name: str) -> Row:
        model, tokens, side = cases[name]
        try:
            step = SIDES[side](SHAPES[model], Form(tokens, min(args.document, tokens), args.rank, device))
        except ModuleNotFoundError as missing:
            return {"skipped": f"{missing.name} is not installed"}
        trace = args.trace and args.trace / f"{model}-{tokens}-{side.replace(', ', '-').replace(' ', '-')}.json.gz"
        found = measure(step, device, args.rounds, trace)
        return {"model": model, "asked": tokens, "tokens": step.tokens, "flops": step.flops, **roofs(), **found}

    if args.lines:
        return work(args.names, case, args.lines)
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    form = [f"--{key}={getattr(args, key)}" for key in ("document", "rank", "rounds", "device")]
    command = [sys.executable, "-m", "bench.step", *form, "--models", *args.models, "--tokens", *map(str, args.tokens)]
    command += ["--sides", *args.sides] + (["--trace", str(args.trace)] if args.trace else [])
    about = machine(device) | {key: getattr(args, key) for key in ("document", "rank", "rounds")}
    figures = Figures(about, [HEAD], lambda row: line_of(row, figures.rows), args.save)
    in_workers(command, list(cases), 1, args.seconds, figures.add)


if __name__ == "__main__":
    main()
