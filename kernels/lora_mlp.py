"""The MLP of a block, whose linears may have adapters, as one operation (SwiGLU: Shazeer, 2020).

    y = down(h)        h = silu(g) * u        g = gate(x), u = up(x), or [g u] = gate_up(x)

Saved for the backward: x, g, u, and S of the adapters (lora_linear.py). h [T, F], as large as g, is not: the backward
of the gate, which reads g and u, makes it again for the gradient of down's A.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels import kept, lora_linear, swiglu_shrink
from minilora.kernels.dispatch import once_differentiable, use_triton
from minilora.kernels.lora_linear import (
    Linears,
    gradients,
    in_order,
    linears_of,
    lora_linear_group,
    lora_linear_group_ref,
)
from minilora.kernels.lora_swiglu import check_pair, lora_swiglu, lora_swiglu_ref
from minilora.kernels.on_triton import OnTriton, uninitialised
from minilora.kernels.projection import Projection, check
from minilora.kernels.swiglu import halves, swiglu_backward, swiglu_forward


def lora_mlp_ref(x: Tensor, gate_up: Sequence[Projection], down: Projection) -> Tensor:
    """The specification: gate and up of x [T, D], or one projection that is both, and down of h [T, F] -> [T, N]."""
    return lora_linear_group_ref(lora_swiglu_ref(x, gate_up), [down])[0]


class _MLP(torch.autograd.Function):
    """trained: the tensors of the adapters named to autograd, first those of gate and up."""

    @staticmethod
    def forward(
        ctx, gate_up: Sequence[Projection], down: Projection, output_needed: bool, x: Tensor, *trained: Tensor
    ) -> Tensor:
        first, last, on_triton = linears_of(x, gate_up), linears_of(x, [down]), use_triton(x)
        with torch.cuda.device_of(x):
            s, gu = first.forward(x, kept.given() if first.adapted else None, True)
            g, u = gu if len(gu) == 2 else (gu[0], None)
            s_down = kept.given() if last.adapted else None
            if output_needed or (last.adapted and s_down is None):
                if isinstance(last, OnTriton) and s_down is None:
                    h, s_down = swiglu_shrink.forward(g, u, last.group)
                else:
                    h = swiglu_forward(g, u, on_triton)
                check(h, [down])
                s_down, (y,) = last.forward(h, s_down, output_needed)
            else:
                (y,) = uninitialised(x, [down.weight])
        ctx.save_for_backward(x, g, u, kept.keep(s), kept.keep(s_down), *trained)
        ctx.linears, ctx.on_triton = (first, last), on_triton
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, g, u, s, s_down, *trained = ctx.saved_tensors
        (first, last), needs = ctx.linears, ctx.needs_input_grad[3:]
        own = 2 if last.adapted else 0  # tensors of down's adapter, behind the others
        inner, outer = needs[: len(needs) - own], needs[len(needs) - own :]
        with torch.cuda.device_of(x):
            dgu, of_down = _down_backward(last, grads[0], g, u, s_down, ctx.on_triton, any(inner), outer)
            found = gradients(first, x, s, trained[: len(inner) - 1], dgu, inner) if dgu else [None] * len(inner)
        return None, None, None, *found, *in_order(*of_down, trained[len(inner) - 1 :], outer)


def _down_backward(
    down: Linears,
    dy: Tensor,
    g: Tensor,
    u: Tensor | None,
    s: Tensor | None,
    on_triton: bool,
    needs_gu: bool,
    needs: Sequence[bool],
) -> tuple[list[Tensor], tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]:
    """[dg, du], or one gradient that is both, or nothing where it is not needed; dA and dB of down's adapter, if any."""
    needs_a, needs_b, shape = needs[::2], needs[1::2], halves(g, u)[0]
    ds, dbs = down.expand_backward([dy], s, needs_gu or any(needs_a), needs_b)
    if not needs_gu and not any(needs_a):
        return [], ([None], dbs)  # B alone
    masks = down.masks(shape)
    if needs_gu:
        dh = down.input_gradient([dy], ds, masks)
        if isinstance(down, OnTriton) and needs_a[0]:
            dgu, das = swiglu_shrink.backward(dh, g, u, ds, down.group)
            return dgu, (das, dbs)
        dgu, h = swiglu_backward(dh, g, u, on_triton)
    else:
        dgu, h = [], swiglu_forward(g, u, on_triton)
    das = down.shrink_backward(h, ds, masks, needs_a) if any(needs_a) else [None] * len(needs_a)
    return dgu, (das, dbs)


def lora_mlp(x: Tensor, gate_up: Sequence[Projection], down: Projection, output_needed: bool = True) -> Tensor:
    """down(silu(gate(x)) * up(x)) [T, N] for x [T, D] and gate and up, or one projection that is both, gate's rows first.

    output_needed as in lora_linear_group. ValueError if they do not fit together.
    """
    if not torch.is_grad_enabled():
        return lora_linear_group(lora_swiglu(x, gate_up), [down], output_needed)[0]
    check_pair(gate_up)
    check(x, gate_up)
    trained = [t for p in (*gate_up, down) if p.adapter for t in (p.adapter.a, p.adapter.b)]
    return _MLP.apply(gate_up, down, output_needed, x, *trained)  # pyright: ignore[reportReturnType]


def example(
    tokens: int, d: int, f: int, r: int, dtype: torch.dtype, device: str = "cpu", p: float = 0.0, joined: bool = False
) -> tuple[tuple[Tensor, list[Projection], Projection], dict]:
    """Arguments of one call, gate and up joined or not, and the flops and bytes that a perfect forward and backward need."""
    (x, gate_up), wide = lora_linear.group_example(tokens, d, (2 * f,) if joined else (f, f), r, dtype, device, p)
    (_, (down,)), narrow = lora_linear.group_example(tokens, f, (d,), r, dtype, device, p)
    # g and u read, h written; dh, g and u read, dg and du written
    between = {"bytes": 3 * tokens * f * dtype.itemsize, "backward_bytes": 5 * tokens * f * dtype.itemsize}
    return (x, gate_up, down), {key: wide[key] + narrow[key] + between.get(key, 0) for key in wide}
