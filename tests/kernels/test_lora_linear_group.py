"""Groups of linear layers with adapters: the same tests for the torch path and, on the interpreter, for the kernels."""

import re
from typing import Any

import pytest
import torch
from oracle import check_op
from torch import Tensor

from minilora.kernels import library_gemm, lora_linear
from minilora.kernels.augmented import Augmented
from minilora.kernels.dispatch import use_gemm
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.frozen_linear import FEW_ROWS
from minilora.kernels.lora_linear import lora_linear_group, lora_linear_group_ref
from minilora.kernels.lora_swiglu import lora_swiglu, lora_swiglu_ref
from minilora.kernels.packed import join, joined
from minilora.kernels.projection import Adapter, Projection

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def group(ranks: tuple[int, ...], ns: tuple[int, ...], p: float, dtype: torch.dtype) -> tuple[Tensor, list[Projection]]:
    """x and its projections, every second one without a bias; rank 0: no adapter."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    kept, made = torch.promote_types(dtype, torch.float32), []
    for j, (r, n) in enumerate(zip(ranks, ns, strict=True)):
        adapter = None
        if r:
            adapter = Adapter(randn(r, 19, dtype=kept), randn(n, r, dtype=kept), 1.75, p, DropoutKey(7, 3, 1, j))
        made.append(Projection(randn(n, 19), None if j % 2 else randn(n), adapter))
    return randn(21, 19), made


def of(function: Any, projections: list[Projection]) -> tuple[Any, list[Tensor]]:
    """The function of x and the adapters' matrices with its outputs side by side; and these matrices."""
    matrices = [t for p in projections if p.adapter for t in p.adapter[:2]]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        now = [p._replace(adapter=p.adapter and p.adapter._replace(a=next(rest), b=next(rest))) for p in projections]
        if x.dtype == torch.float64:
            now = [p._replace(weight=p.tensor.double(), bias=None if p.bias is None else p.bias.double()) for p in now]
        return torch.cat(function(x, now), dim=1)

    return call, matrices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lie_together", [True, False])
@pytest.mark.parametrize("ranks, p", [((3, 0, 17), 0.0), ((2, 3, 1), 0.0), ((2, 2), 0.2), ((5,), 0.2)], ids=str)
def test_a_group_and_its_gradients(ranks: tuple[int, ...], p: float, lie_together: bool, dtype: torch.dtype):
    x, projections = group(ranks, (11, 5, 8)[: len(ranks)], p, dtype)
    if lie_together:
        weights = join([projection.tensor for projection in projections])
        projections = [projection._replace(weight=w) for projection, w in zip(projections, weights, strict=True)]
        assert joined(weights) is not None
    (op, matrices), (ref, _) = of(lora_linear_group, projections), of(lora_linear_group_ref, projections)
    check_op(op, ref, (x, *matrices), range(1 + len(matrices)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks, p", [((3, 0, 17), 0.0), ((20, 30, 14), 0.2), ((70,), 0.0)], ids=str)
def test_a_group_in_one_augmented_matrix(ranks: tuple[int, ...], p: float, dtype: torch.dtype):
    x, projections = group(ranks, (11, 5, 8)[: len(ranks)], p, dtype)
    held = Augmented(projections).holding(projections)
    assert Augmented.of(held, x) is not None
    (op, matrices), (ref, _) = of(lora_linear_group, held), of(lora_linear_group_ref, projections)
    with use_gemm("augmented"):
        check_op(op, ref, (x, *matrices), range(1 + len(matrices)))


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_x, frozen", [(True, None), (False, None), (True, 0), (False, 3)])
def test_gradients_without_the_outputs_are_autograd_s(needs_x: bool, frozen: int | None, kept: torch.dtype):
    """Members without an adapter, matrices that are not trained, and matrices in 16 bits too."""
    x, projections = group((3, 0, 4), (11, 5, 8), 0.2, torch.bfloat16)
    projections = [
        p._replace(adapter=p.adapter and p.adapter._replace(a=p.adapter.a.to(kept), b=p.adapter.b.to(kept)))
        for p in projections
    ]
    matrices = [t for p in projections if p.adapter for t in p.adapter[:2]]
    for i, t in enumerate(matrices):
        t.requires_grad_(i != frozen)
    ys = lora_linear_group(x.requires_grad_(needs_x), projections)
    dys = [torch.ones_like(y) * (j + 1) for j, y in enumerate(ys)]
    torch.autograd.backward(ys, dys)
    trained = [t for t in (x, *matrices) if t.requires_grad]
    unmade = lora_linear_group(x, projections, output_needed=False)
    assert [y.shape for y in unmade] == [y.shape for y in ys]
    for t, d in zip(trained, torch.autograd.grad(unmade, trained, dys), strict=True):
        assert t.grad is not None and torch.equal(d, t.grad)


def test_gradients_of_a_layer_without_adapter():
    x, projections = group((0,), (11,), 0.0, torch.float32)
    dy, (y,) = torch.ones(21, 11), lora_linear_group(x.requires_grad_(), projections, output_needed=False)
    (dx,) = torch.autograd.grad(y, [x], dy)
    assert torch.equal(dx, dy @ projections[0].tensor)


@pytest.mark.parametrize("rows, inference, checked", [(FEW_ROWS, True, 0), (FEW_ROWS + 1, True, 1), (1, False, 1)])
def test_all_but_single_tokens_in_decoding_are_checked(
    rows: int, inference: bool, checked: int, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []
    monkeypatch.setattr(lora_linear, "check", lambda *args: seen.append(args))
    x, projections = group((3,), (7,), 0.0, torch.float32)
    with torch.inference_mode(inference):
        lora_linear.lora_linear_group(x[:rows], projections)
    assert len(seen) == checked


@pytest.mark.parametrize("width, gemms", [(9, 1), (10, 2), (15, 2), (30, 2)])
def test_dx_of_packed_weights_takes_the_way_that_moves_fewer_bytes(
    width: int, gemms: int, monkeypatch: pytest.MonkeyPatch
):
    """The copy of two dY moves 2 (width + width) numbers a row, adding up in dX 2 k, which is 38 here."""
    made, product = [], library_gemm.add_input_gradient
    monkeypatch.setattr(library_gemm, "add_input_gradient", lambda *args: (made.append(args), product(*args))[1])
    _, projections = group((0, 0), (width, width), 0.0, torch.float64)
    packed = join([p.tensor for p in projections])
    dys = [torch.randn(21, width, dtype=torch.float64) for _ in packed]
    dx = library_gemm.input_gradient(
        dys, None, [p._replace(weight=w) for p, w in zip(projections, packed, strict=True)]
    )
    expected = sum(dy @ w for dy, w in zip(dys, packed, strict=True))
    torch.testing.assert_close(dx, expected, rtol=1e-12, atol=1e-12)
    assert len(made) == gemms


def test_weights_that_do_not_lie_one_behind_the_other_are_not_joined():
    first, second = join([torch.ones(3, 4), torch.zeros(2, 4)])
    whole = joined([first, second])
    assert whole is not None and whole.shape == (5, 4) and whole.data_ptr() == first.data_ptr()
    others = [torch.ones(2, 4), second[:, :2], second.double(), second[1:], torch.ones(4, 2).T]
    for other in others:
        assert joined([first, other]) is None
    assert joined([second, first]) is None
    assert joined([first, first]) is None
    three = join([torch.rand(n, 4) for n in (3, 2, 5)])
    rest = joined(three[1:])
    assert rest is not None and torch.equal(rest, torch.cat(three[1:]))
    assert joined([first[:2], second]) is None  # a gap


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks, p", [((3, 5), 0.0), ((0, 17), 0.2), ((4,), 0.2), ((0,), 0.0)], ids=str)
@pytest.mark.parametrize("lie_together", [True, False])
def test_swiglu_of_two_projections_and_of_one_that_is_both(
    ranks: tuple[int, ...], p: float, lie_together: bool, dtype: torch.dtype
):
    x, projections = group(ranks, (11, 11) if len(ranks) == 2 else (22,), p, dtype)
    if lie_together:
        weights = join([projection.tensor for projection in projections])
        projections = [q._replace(weight=w) for q, w in zip(projections, weights, strict=True)]
    (op, matrices), (ref, _) = of(in_turn(lora_swiglu), projections), of(in_turn(lora_swiglu_ref), projections)
    check_op(op, ref, (x, *matrices), ())
    assert not op(x.requires_grad_(), *matrices).requires_grad


def in_turn(one: Any) -> Any:
    """A function with one output as one with several."""
    return lambda *args: (one(*args),)


@pytest.mark.parametrize("ns", [(11, 5), (11,), (4, 4, 4), ()], ids=str)
def test_what_is_no_gate_and_up_is_named(ns: tuple[int, ...]):
    x, projections = group((2,) * len(ns), ns, 0.0, torch.float32)
    with pytest.raises(ValueError, match="two weights of one shape, or one with the rows of both"):
        lora_swiglu(x, projections)


def bad(change: str) -> tuple[Tensor, list[Projection]]:
    x, (one, two) = group((3, 2), (11, 5), 0.2, torch.float32)
    assert one.adapter and two.adapter
    a = one.adapter
    match change:
        case "none":
            return x, []
        case "x":
            return x[0], [one, two]
        case "integers":
            return x.long(), [one, two]
        case "weight":
            return x, [one._replace(weight=one.tensor[:, 1:]), two]
        case "dtype":
            return x, [one, two._replace(weight=two.tensor.to(torch.int8))]
        case "device":
            return x, [one, two._replace(weight=two.tensor.to("meta"))]
        case "bias":
            return x, [one._replace(bias=torch.ones(3)), two]
        case "trained":
            return x, [one, two._replace(weight=two.tensor.clone().requires_grad_())]
        case "a":
            return x, [one._replace(adapter=a._replace(a=a.a[:2])), two]
        case "b":
            return x, [one._replace(adapter=a._replace(b=a.b.half())), two]
        case "rank":
            return x, [one._replace(adapter=a._replace(a=a.a[:0], b=a.b[:, :0])), two]
        case "p":
            return x, [one._replace(adapter=a._replace(p=1.0)), two]
    raise AssertionError(change)


@pytest.mark.parametrize(
    "change, message",
    [
        ("none", "one to three projections, not 0"), ("x", "x is [19], not ['T', 'K']"),
        ("integers", "x is torch.int64; it takes floating-point numbers"), ("weight", "weight 0 is [11, 18], not [11, 19]"),
        ("dtype", "weight 1 is torch.int8; it takes floating-point numbers"),
        ("device", "weight 1 is torch.float32 on meta, x torch.float32 on cpu"), ("bias", "bias 0 is [3], not [11]"),
        ("trained", "projection 1 requires grad"), ("a", "b 0 is [11, 3], not [11, 2]"),
        ("b", "b 0 is torch.float16 on cpu"), ("rank", "adapter 0 has rank 0"), ("p", "dropout 1.0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: str, message: str):
    x, projections = bad(change)
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_linear_group(x, projections)
