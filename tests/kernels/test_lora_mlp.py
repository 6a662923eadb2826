"""The MLP as one operation: the same tests for the torch path and, on the interpreter, for the kernels."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from oracle import check_op, run, upstream
from torch import Tensor

from minilora.kernels import lora_mlp as module
from minilora.kernels.dispatch import kernels_enabled, use_gemm, use_triton
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.kept import giving, keeping
from minilora.kernels.lora_mlp import lora_mlp, lora_mlp_ref
from minilora.kernels.nf4 import NF4Weight
from minilora.kernels.packed import join
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import weight_as

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
T, D, F = 21, 19, 33
# ranks of gate, up and down, or of one that is both and down (0: no adapter); dropout
FORMS = {
    "all": ((3, 3, 3), 0.0),
    "all dropped": ((3, 5, 17), 0.2),
    "down alone": ((0, 0, 4), 0.2),
    "up alone": ((0, 2, 0), 0.0),
    "not down": ((2, 3, 0), 0.2),
    "frozen": ((0, 0, 0), 0.0),
    "joined": ((4, 3), 0.2),
    "joined plain": ((4, 3), 0.0),
    "joined without down": ((4, 0), 0.0),
    "joined down alone": ((0, 18), 0.0),
}
forms = pytest.mark.parametrize("name", FORMS)


def made(name: str, dtype: torch.dtype, tokens: int = T) -> tuple[Tensor, list[Projection]]:
    """x and gate, up and down, or gate_up and down; weights of gate and up lie together."""
    ranks, p = FORMS[name]
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5).to(dtype)

    stored, projections = torch.promote_types(dtype, torch.float32), []
    sizes = [(F if len(ranks) == 3 else 2 * F, D)] * (len(ranks) - 1) + [(D, F)]
    for j, (r, (n, k)) in enumerate(zip(ranks, sizes, strict=True)):
        adapter = None
        if r:
            key = DropoutKey(7, 3, 1, j)
            adapter = Adapter(randn(r, k, dtype=stored), randn(n, r, dtype=stored), 1.75, p, key)
        projections.append(Projection(randn(n, k), None if j % 2 else randn(n), adapter))
    weights = join([q.tensor for q in projections[:-1]])
    projections[:-1] = [q._replace(weight=w) for q, w in zip(projections[:-1], weights, strict=True)]
    return randn(tokens, D) * D**0.5, projections


def of(function: Any, projections: list[Projection]) -> tuple[Any, list[Tensor]]:
    """The function of x and the adapters' matrices; and these."""

    def call(x: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        now = [p._replace(adapter=p.adapter and p.adapter._replace(a=next(rest), b=next(rest))) for p in projections]
        if x.dtype == torch.float64:
            now = [
                p._replace(weight=weight_as(p.weight, x.dtype), bias=None if p.bias is None else p.bias.double())
                for p in now
            ]
        return function(x, now[:-1], now[-1])

    return call, [t for p in projections if p.adapter for t in p.adapter[:2]]


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, DTYPES[0]) for name in FORMS), *((name, d) for name in ("all dropped", "joined") for d in DTYPES[1:])],
    ids=str,
)
def test_an_mlp_and_its_gradients(name: str, dtype: torch.dtype):
    x, projections = made(name, dtype)
    (op, matrices), (ref, _) = of(lora_mlp, projections), of(lora_mlp_ref, projections)
    check_op(op, ref, (x, *matrices), range(1 + len(matrices)))


@pytest.mark.parametrize("name", ["all", "joined plain"])
def test_products_of_the_library(name: str):
    """On a GPU the kernel of the gate's backward makes h for them."""
    x, projections = made(name, torch.float32)
    (op, matrices), (ref, _) = of(lora_mlp, projections), of(lora_mlp_ref, projections)
    with use_gemm("library"):
        check_op(op, ref, (x, *matrices), range(1 + len(matrices)))


@pytest.mark.parametrize("name", ["all dropped", "joined"])
def test_each_input_alone_gets_the_gradient_that_it_gets_among_all(name: str):
    """The one of down's A, where it is the only one, is made by other kernels: but for rounding."""
    x, projections = made(name, torch.float32)
    op, matrices = of(lora_mlp, projections)
    args = (x, *matrices)
    dy, every = upstream(op(*args)), range(len(args))
    together = dict(zip(every, run(op, args, every, dy)[1:], strict=True))
    for trained in [(i,) for i in every] + [(0, every[-2]), (every[-2], every[-1])]:
        for i, d in zip(trained, run(op, args, trained, dy)[1:], strict=True):
            size = float(together[i].abs().max())
            assert torch.allclose(d, together[i], rtol=0, atol=1e-6 * size if i == every[-2] else 0), trained


@forms
def test_no_gradient_is_recorded_where_none_is_wanted(name: str):
    x, projections = made(name, torch.float32)
    op, matrices = of(lora_mlp, projections)
    with torch.no_grad():
        y = op(x.requires_grad_(), *matrices)
    assert not y.requires_grad and torch.allclose(y, op(x, *matrices), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["all dropped", "joined", "frozen"])
def test_gradients_without_the_output_and_with_every_s_kept(name: str):
    """The same bits; but for rounding where a pass without gradients took other kernels to S, as on a GPU."""
    x, projections = made(name, torch.float32)
    op, matrices = of(lora_mlp, projections)
    trained = [t.requires_grad_() for t in (x, *matrices)]
    y = op(*trained)
    dy, kept = torch.ones_like(y), []
    expected = torch.autograd.grad(y, trained, dy)
    with torch.no_grad(), keeping(kept):
        op(*trained)
    assert [s.shape[-1] for s in kept] or not matrices
    last = lambda x, gate_up, down: lora_mlp(x, gate_up, down, output_needed=False)
    for given in (None, kept):
        if given is None:
            unmade = of(last, projections)[0](*trained)
        else:
            with giving(given):
                unmade = of(last, projections)[0](*trained)
        assert unmade.shape == y.shape
        found = torch.autograd.grad(unmade, trained, dy)
        share = 1e-6 if given and use_triton(x) else 0
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=share * float(b.abs().max()))


@pytest.mark.parametrize("name, wide", [("all", 2), ("joined", 2), ("down alone", 2), ("frozen", 2)])
def test_h_is_not_kept(name: str, wide: int):
    """Of [T, F] the backward finds g and u alone."""
    x, projections = made(name, torch.float32)
    op, matrices = of(lora_mlp, projections)
    saved: list[Tensor] = []
    for t in matrices:
        t.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op(x.requires_grad_(), *matrices)
    assert sum(t.numel() for t in saved if t.shape in ((T, F), (T, 2 * F))) == wide * T * F


def test_what_is_given_is_not_made_again():
    """The passes over x and h that S takes: none in a block that is computed again."""
    x, projections = made("all", torch.float32)
    kept: list[Tensor] = []
    with torch.no_grad(), keeping(kept):
        lora_mlp(x, projections[:-1], projections[-1])
    x.requires_grad_()
    gated: list[Any] = []
    with giving(kept), patch.object(module, "swiglu_forward", lambda *a: gated.append(a)):
        lora_mlp(x, projections[:-1], projections[-1], output_needed=False)
    assert not gated


def test_weights_in_four_bits():
    torch.manual_seed(0)
    x, projections = made("all", torch.float32)
    x, projections = torch.randn(T, 64), [
        p._replace(weight=NF4Weight.of(torch.randn(*shape) * 0.1), bias=None,
                   adapter=Adapter(torch.randn(3, shape[1]) * 0.1, torch.randn(shape[0], 3), 1.5))
        for p, shape in zip(projections, [(128, 64), (128, 64), (64, 128)], strict=True)
    ]  # fmt: skip
    (op, matrices), (ref, _) = of(lora_mlp, projections), of(lora_mlp_ref, projections)
    check_op(op, ref, (x, *matrices), range(7))


@pytest.mark.parametrize("change", [{}, {"tokens": 0}])
def test_strided_rows_and_none(change: dict[str, int]):
    x, projections = made("all dropped", torch.float32, **change)
    op, matrices = of(lora_mlp, projections)
    dy = upstream(op(x, *matrices))
    expected = run(op, (x, *matrices), range(7), dy)
    found = run(op, (torch.cat((x, x), 1)[:, :D], *matrices), range(7), torch.cat((dy, dy), 1)[:, :D])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_switches_of_forward_hold_for_the_backward():
    x, projections = made("all dropped", torch.float32)
    op, matrices = of(lora_mlp, projections)
    dy = upstream(op(x, *matrices))
    for context in (kernels_enabled(False), use_gemm("library")):
        args = [t.detach().requires_grad_() for t in (x, *matrices)]
        with context:
            y = op(*args)
            expected = torch.autograd.grad(y, args, dy, retain_graph=True)
        found = torch.autograd.grad(y, args, dy)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_does_not_fit_is_named():
    x, (gate, up, down) = made("all", torch.float32)
    with pytest.raises(ValueError, match="two weights of one shape, or one with the rows of both"):
        lora_mlp(x.requires_grad_(), [gate, down], down)
    with pytest.raises(ValueError, match=r"weight 0 is \[33, 19\], not \[33, 33\]"):
        lora_mlp(x, [gate, up], up)
