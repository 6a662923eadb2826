"""Which form of GEMM is fastest for the products of a model on this GPU: measured once, in about a second, and kept with the run.

A product is timed in every form that it has (kernels/wide_products.py) with the model's own weights and a stream of tokens, in
turn, the second-level cache flushed in between. A model has few distinct shapes; layers of the same shapes take the same form.
The library it is unless another form is over 3 % faster.

A group that takes the augmented form is copied into its matrix then. Groups with a quantised weight, those whose weights are
stored in another dtype than the computed one, and those of a base that ranks share have no such matrix.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.kernels.augmented import Augmented, AugmentedWeight
from minilora.kernels.dispatch import Timed, gemm_choice, use_gemm, use_triton
from minilora.kernels.group import Forms, shapes_of
from minilora.kernels.lang import HAVE_TRITON
from minilora.kernels.linear_cross_entropy import linear_cross_entropy
from minilora.kernels.lora_linear import lora_linear_group, runs_on_triton
from minilora.kernels.projection import Projection
from minilora.models.decoder import Decoder
from minilora.models.gathered import GatheredWeight
from minilora.models.layers import Adapted, projection

from ..errors import CheckpointMismatch
from ..files.atomic import write_file
from ..files.regular import SMALL, read_file
from ..files.strict_json import parse_json
from ..lora import LoRALinear
from ..targets import short

GEMM = "gemm.json"  # in the folder of a run
WORTH = 0.97  # of the library's time: another form has to take less
WARM, ROUNDS = 3, 10
FLUSH = 2**28  # bytes written between two calls: more than any second-level cache
AHEAD = 2_000_000  # cycles that the GPU sleeps before a call, about 1 ms: its launches are queued by then
MOST_ROWS, MOST_TARGETS = 8192, 2048  # larger products run at the same rate

Functions = dict[str, Callable[[], Any]]
Key = tuple[Any, ...]  # y or dx, K, the N_j and the R_j; or logits, D and V


class Linears(dict[str, nn.Module]):
    """Linears of one input, by path; the kernels take them together."""

    @property
    def name(self) -> str:
        """q/k/v for the three of a block."""
        return "/".join(map(short, self))

    @property
    def projections(self) -> list[Projection]:
        return [p for p in map(projection, self.values()) if p is not None]


def linear_children(module: nn.Module) -> dict[str, nn.Module]:
    """The linears directly in a module, with adapters or without, by name; not those of experts."""
    return {
        name: m
        for name, m in module.named_children()
        if name != "base" and isinstance(getattr(m, "base", None) if isinstance(m, Adapted) else m, nn.Linear)
    }


def groups(model: nn.Module) -> Iterator[Linears]:
    """The linears of a model that have an adapter which the kernels take, each with those that it is fused with."""
    for path, module in model.named_modules():
        children = linear_children(module)
        packed = getattr(module, "packed_modules", ())
        for names in [*([packed] if packed else []), *((n,) for n in children if n not in packed)]:
            adapted = any(isinstance(children.get(n), LoRALinear) for n in names)
            if adapted and all(projection(children[n]) for n in names):
                yield Linears({f"{path}.{n}": children[n] for n in names})


def settle(model: Decoder, rows: int, kept: dict[Key, Timed] | None = None) -> None:
    """Choose the forms of a model's products for streams of so many rows, and lay the weights of augmented ones anew.

    Where one form was asked for (use_gemm) nothing is measured, nor what is `kept` of a run that is resumed.
    """
    chosen, device = gemm_choice(), model.head.device
    if isinstance(chosen, dict) and measures(device):
        chosen |= measured(model, rows, partial(gpu_seconds, device=device)) if kept is None else kept
    probe = torch.empty(1, 1, dtype=model.compute_dtype, device=device)
    for linears in groups(model):
        if "augmented" in Forms.of(linears.projections) and _has("augmented", linears.projections, probe):
            augment(linears)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the weights that were copied lie in blocks too small for a matrix


def measures(device: torch.device) -> bool:
    """Whether there is more than one form to choose from: a CPU's GEMM is the library's."""
    return device.type == "cuda"


def augment(linears: Linears) -> None:
    """Lay the frozen weights of a group into an augmented matrix."""
    for linear, weight in zip(linears.values(), Augmented(linears.projections).weights(), strict=True):
        (linear.base if isinstance(linear, LoRALinear) else linear).weight = weight


def matrices(model: nn.Module) -> list[Augmented]:
    """The augmented matrices of a model."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return list(dict.fromkeys(w.whole for w in weights if isinstance(w, AugmentedWeight) and w.whole))


def measured(model: Decoder, rows: int, seconds: Callable[[Functions], dict[str, float]]) -> dict[Key, Timed]:
    """The form of every distinct product of a model; `seconds` times functions, in turn."""
    found: dict[Key, Timed] = {}
    dtype, device, rows = model.compute_dtype, model.head.device, min(rows, MOST_ROWS)
    for linears in groups(model):
        projections = [_frozen(p) for p in linears.projections]
        shapes = shapes_of(projections)
        if ("y", *shapes) in found:
            continue
        x = torch.randn(rows, shapes[0], dtype=dtype, device=device)
        dys = [torch.randn(rows, n, dtype=dtype, device=device) for n in shapes[1]]
        ways = _ways(projections, x)
        forward: Functions = {form: partial(_forward, form, x, ps) for form, ps in ways.items()}
        backward: Functions = {form: _backward(form, x, ps, dys) for form, ps in ways.items()}
        found["y", *shapes], found["dx", *shapes] = (fastest(seconds(these)) for these in (forward, backward))
    found["logits", model.head.shape[1], model.head.shape[0]] = fastest(seconds(_losses(model, rows)))
    return found


def _frozen(p: Projection) -> Projection:
    """Its adapter without gradients, which every form makes alike."""
    return p._replace(adapter=p.adapter and p.adapter._replace(a=p.adapter.a.detach(), b=p.adapter.b.detach()))


def _has(form: str, projections: list[Projection], x: Tensor) -> bool:
    """Whether the products of a group with x can have a form here."""
    if form == "triton":
        return runs_on_triton(x, projections)
    # a weight that is widened for each product has no matrix, nor has one that is gathered for each pass
    plain = all(isinstance(p.weight, Tensor) and p.weight.dtype == x.dtype for p in projections)
    return form == "library" or (plain and not any(isinstance(p.weight, GatheredWeight) for p in projections))


def _ways(projections: list[Projection], x: Tensor) -> dict[str, list[Projection]]:
    """The forms that a group has here, the library first, and what each takes."""
    return {
        form: Augmented(projections).holding(projections) if form == "augmented" else projections
        for form in ("library", "triton", "augmented")
        if _has(form, projections, x)
    }


@torch.no_grad()
def _forward(form: str, x: Tensor, projections: list[Projection]) -> None:
    with use_gemm(form):
        lora_linear_group(x, projections)


def _backward(form: str, x: Tensor, projections: list[Projection], dys: list[Tensor]) -> Callable[[], Any]:
    with use_gemm(form), torch.enable_grad():
        x = x.detach().requires_grad_()
        ys = lora_linear_group(x, projections)
    return partial(torch.autograd.grad, ys, [x], dys, retain_graph=True)


def _losses(model: Decoder, rows: int) -> Functions:
    head = model.head
    x = torch.randn(min(rows, MOST_TARGETS), head.shape[1], dtype=model.compute_dtype, device=head.device)
    targets = torch.zeros(len(x), dtype=torch.long, device=head.device)

    def loss(form: str) -> None:
        with use_gemm(form), torch.enable_grad():
            linear_cross_entropy(x.requires_grad_(), head, targets)

    forms = ("library", "triton") if use_triton(x) and head.dtype == x.dtype else ("library",)
    return {form: partial(loss, form) for form in forms}


def fastest(seconds: dict[str, float]) -> Timed:
    best = min(seconds, key=lambda form: seconds[form])
    return Timed(best if seconds[best] < WORTH * seconds["library"] else "library", seconds)


def gpu_seconds(functions: Functions, device: torch.device) -> dict[str, float]:
    """Seconds of the GPU's work in a call of each function: the median of rounds in which their order turns."""
    scratch, names = torch.empty(FLUSH, dtype=torch.int8, device=device), list(functions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM + ROUNDS):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            torch.cuda._sleep(AHEAD)
            start.record()
            functions[name]()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) / 1000)
    return {name: statistics.median(times[WARM:]) for name, times in taken.items()}


# for people, and for the folder of a run


def gemm_lines(model: Decoder) -> list[str]:
    """The form of every distinct product, and the others' times as multiples of its; none where there is no choice."""
    chosen, lines = gemm_choice(), {}
    if isinstance(chosen, str):
        probe = torch.empty(1, 1, dtype=model.compute_dtype, device=model.head.device)
        without = dict.fromkeys(g.name for g in groups(model) if not _has(chosen, g.projections, probe))
        note = f"; library for {', '.join(without)}, which cannot have it here" if without else ""
        return [f"{chosen} for every product, as set for this run{note}"]
    for linears in groups(model):
        shapes = shapes_of(linears.projections)
        y, dx = (chosen.get((what, *shapes)) for what in ("y", "dx"))
        if y and dx:
            lines.setdefault(shapes, f"{linears.name}: {_line('y', y)}, {_line('dX', dx)}")
    logits = chosen.get(("logits", model.head.shape[1], model.head.shape[0]))
    return [*lines.values(), *([_line("logits", logits)] if logits else [])]


def _line(what: str, timed: Timed) -> str:
    best = timed.seconds[timed.form]
    others = ", ".join(f"{form} {s / best:.2f}x" for form, s in timed.seconds.items() if form != timed.form)
    return f"{what} {timed.form}" + f" ({others})" * bool(others)


def forms_text() -> str:
    """What was chosen, in one line: two runs with the same line make their products alike."""
    chosen = gemm_choice()
    if isinstance(chosen, str):
        return chosen
    return " ".join(f"{'-'.join(map(_word, key))}:{timed.form}" for key, timed in chosen.items()) or "library"


def _word(part: Any) -> str:
    return "+".join(map(str, part)) if isinstance(part, tuple) else str(part)


def write_choice(path: Path, device: torch.device) -> None:
    """Write what was measured, if anything was, with the machine that it holds for."""
    chosen = gemm_choice()
    if not isinstance(chosen, str) and chosen:
        forms = [[key, *timed] for key, timed in chosen.items()]
        write_file(path, json.dumps({"machine": _machine(device), "forms": forms}) + "\n")


def read_choice(path: Path, device: torch.device) -> dict[Key, Timed] | None:
    """What a run measured on this machine; None if it was another one, or measured nothing."""
    if not path.is_file():
        return None
    try:
        found = parse_json(read_file(path, CheckpointMismatch, SMALL))
        if found["machine"] != _machine(device) or not found["forms"]:
            return None
        forms = [(tuple(tuple(p) if isinstance(p, list) else p for p in key), timed) for key, *timed in found["forms"]]
        return {key: Timed(*timed) for key, timed in forms}
    except (ValueError, TypeError, KeyError):
        raise CheckpointMismatch(f"{path} is damaged", "Delete it: the forms are measured again.") from None


def _machine(device: torch.device) -> dict[str, str | None]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    triton = version("triton") if HAVE_TRITON else None
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda}
