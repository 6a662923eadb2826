"""LoRA on any model: one wrapper for a linear layer, and one function that installs it.

A wrapped linear computes y = W x + b + scale * B A dropout(x), with W and b frozen, A [R, in] and B [out, R] trained in fp32
(Hu et al., 2021), scale = alpha / R, or alpha / sqrt(R) for rank-stabilised LoRA (Kalajdzievski, 2023).
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.kernels.dropout import NO_KEYS, shared_keys
from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import Weight
from minilora.models.layers import Adapted
from minilora.models.moe import ExpertLinear
from minilora.models.quantized import quantized_weights

from .errors import Diverged, UsageError
from .experts import factors
from .targets import chosen

HEADS = ("lm_head", "output_layer")
Base = nn.Linear | ExpertLinear


class LoRALinear(Adapted):
    """A frozen linear layer and its adapter, x [T, in] -> [T, out]; or one of each expert, A [E, R, in] and B [E, out, R]."""

    merges = ("weight",)

    def __init__(
        self, base: Base, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False, shared: bool = False
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        like = {"device": base.weight.device, "dtype": torch.float32}
        of_a, of_b = base.stacks(shared) if isinstance(base, ExpertLinear) else ((), ())
        self.lora_A = nn.Parameter(torch.empty(*of_a, r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(*of_b, base.out_features, r, **like))
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.keys, self.number = NO_KEYS, 0  # of the masks of a model's adapters, and which of them is this one's
        self.loftq = False  # whether A and B began as the base's error of quantisation

    @property
    def r(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [out, R] of dW = scale * B A."""
        return self.lora_A, self.lora_B

    def projection(self) -> Projection | None:
        """The layer as the kernels see it; a block hands those of one input to them together."""
        p = self.dropout if self.training else 0.0
        bias, key = getattr(self.base, "bias", None), self.keys.of(self.number)
        return Projection(self.base.weight, bias, Adapter(*self.factors(), self.scale, p, key))

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear_group(x, [cast(Projection, self.projection())], self.output_needed)[0]

    def merged(self, name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        """W + scale * B A, or rows of it, summed in fp32 (fp64 for W in fp64) and rounded once to the dtype of W."""
        w = stored.to(self.lora_A.device)
        wide = torch.promote_types(w.dtype, torch.float32)
        merged, (a_all, b_all) = torch.empty_like(w), self.factors()
        for part, a, b in factors(a_all.detach(), b_all.detach(), rows):
            merged[part] = w[part].to(wide).add(b.to(wide) @ a.to(wide), alpha=self.scale)
        return merged


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every wrapped linear of a model with its path, in the order of the model."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


def linears(model: nn.Module) -> dict[str, Base]:
    """The linear layers that an adapter can go on, by path: all but the output head; that of all experts is one."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Base) and n.split(".")[-1] not in HEADS}


def base_parameters(model: nn.Module) -> dict[str, Weight]:
    """The weights of the model under its adapters, by the names that they have in the checkpoint."""
    named: dict[str, Weight] = {**dict(model.named_parameters()), **quantized_weights(model)}
    inside = [pair for m in model.modules() if isinstance(m, Adapted) for pair in m.named_parameters()]
    own = {id(p) for name, p in inside if not name.startswith("base.")}
    return {n.replace(".base.", "."): p for n, p in named.items() if id(p) not in own}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_trained(model: nn.Module, step: int) -> None:
    """Diverged if what a step left in the weights is not finite: its loss and gradients are of the weights before it."""
    for name, p in trained_parameters(model).items():
        if not p.isfinite().all():
            raise Diverged(f"step {step}: {name} is not finite after the update", "Lower --lr or --weight-decay.")


def add_lora(
    model: nn.Module,
    targets: str | list[str] = "all-linear",
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
    shared_outer: bool = False,
    kind: type[LoRALinear] = LoRALinear,
) -> None:
    """Freeze a model and wrap the targeted linears with new adapters, B zero: the model computes what it did.

    targets: "all-linear", "attention", "mlp", "experts", names of linears (a list, or one string with commas), or a regular
    expression over whole paths. A starts uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), drawn from seed.
    shared_outer: experts share the factor on the side of the hidden state (experts.py).
    Raises UsageError with the names that exist if a target is not there.
    """
    require_no_adapters(model)
    if r < 1:
        raise UsageError(f"lora_r is {r}", "It is at least 1.")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path in chosen(list(linears(model)), targets):
        wrapper = wrap(model, path, r, alpha, dropout, rslora, shared_outer, kind=kind)
        bound = wrapper.base.in_features**-0.5
        if not wrapper.lora_A.is_meta:  # as in a plan
            wrapper.lora_A.data.copy_(torch.empty(wrapper.lora_A.shape).uniform_(-bound, bound, generator=generator))
    set_dropout_keys(model, seed, 0, 0)  # no two linears drop alike; a loop sets new keys before each pass


def require_no_adapters(model: nn.Module) -> None:
    """UsageError if the model has adapters: one linear carries one."""
    if any(isinstance(m, Adapted) for m in model.modules()):
        raise UsageError("the model has adapters already", "Merge them first, or load the model again.")


def wrap(model: nn.Module, path: str, *form: Any, kind: type[LoRALinear] = LoRALinear) -> LoRALinear:
    """Replace the linear at a path by a wrapper around it, of a form as LoRALinear takes it; A is not initialised."""
    base = model.get_submodule(path)
    assert isinstance(base, Base), (path, type(base))
    wrapper = kind(base, *form).train(model.training)
    replace_module(model, path, wrapper)
    return wrapper


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def set_dropout_keys(model: nn.Module, seed: int, step: int, micro: int) -> None:
    """Set the keys of the next pass's dropout masks: a function of seed, step, micro-batch and module alone."""
    shared_keys(wrapper for _, wrapper in adapters(model)).set(seed, step, micro)
