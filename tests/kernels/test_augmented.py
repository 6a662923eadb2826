"""The three forms of the wide products on the torch path: the same values, one rounding, and matrices that follow their adapters."""

import copy

import pytest
import torch
from torch import Tensor

from minilora.kernels.augmented import ALIGN, Augmented, AugmentedWeight
from minilora.kernels.dispatch import Timed, use_gemm
from minilora.kernels.lora_linear import group_example, lora_linear_group
from minilora.kernels.packed import joined
from minilora.kernels.projection import Adapter, Projection


def group(ranks: tuple[int, ...], ns: tuple[int, ...], p: float, dtype: torch.dtype) -> tuple[Tensor, list[Projection]]:
    """x and its projections, every second one without a bias; rank 0: no adapter."""
    torch.manual_seed(0)
    (x, projections), _ = group_example(21, 19, ns, max(ranks), dtype, p=p)
    found = []
    for j, (r, (weight, bias, adapter)) in enumerate(zip(ranks, projections, strict=True)):
        assert adapter
        cut = adapter._replace(a=adapter.a[:r].contiguous(), b=adapter.b[:, :r].contiguous())
        found.append(Projection(weight, None if j % 2 else bias, cut if r else None))
    return x, found


def test_the_matrix_is_what_its_picture_says():
    x, projections = group((3, 0, 4), (11, 5, 8), 0.2, torch.float32)
    whole = Augmented(projections)
    with use_gemm("augmented"):
        lora_linear_group(x, whole.holding(projections))
    expected = torch.zeros(24 + ALIGN, 19 + ALIGN)
    one, _, three = [p.adapter for p in projections]
    assert one and three
    expected[:24, :19] = torch.cat([p.tensor for p in projections])
    expected[24:27, :19], expected[27:31, :19] = one.a, three.a
    expected[:11, 19:22], expected[16:24, 22:26] = one.b * one.factor, three.b * three.factor
    assert torch.equal(whole.matrix, expected)
    assert whole.extra_bytes == (expected.numel() - 24 * 19) * 4
    weights = joined(whole.weights())
    assert (
        weights is not None
        and torch.equal(weights, expected[:24, :19])
        and weights.data_ptr() == whole.matrix.data_ptr()
    )


def outputs(x: Tensor, projections: list[Projection], form: str) -> Tensor:
    with use_gemm(form):
        return torch.cat(lora_linear_group(x, projections), 1)


@pytest.mark.parametrize("change", ["a copy", "a fused optimizer", "dropout off"])
def test_the_matrix_follows_its_adapters(change: str):
    """Also a fused optimizer, which changes values and no version."""
    x, projections = group((3, 4), (11, 5), 0.0 if change != "dropout off" else 0.2, torch.float32)
    whole = Augmented(projections)
    held = whole.holding(projections)
    before = outputs(x, held, "augmented")
    adapters = [p.adapter for p in held if p.adapter]
    if change == "a copy":
        adapters[1].b.copy_(torch.randn(5, 4))
    elif change == "dropout off":
        held = [p._replace(adapter=p.adapter and p.adapter._replace(p=0.0)) for p in held]
    else:
        trained = [t.requires_grad_() for a in adapters for t in (a.a, a.b)]
        optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
        outputs(x, held, "augmented").sum().backward()
        optimizer.step()
    matrix = whole.matrix.clone()
    after = outputs(x, held, "augmented")
    # a captured graph goes on with the matrix: evaluation leaves it alone, and an optimizer's step has changed it already
    assert torch.equal(matrix, whole.matrix) == (change != "a copy")
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, outputs(x, held, "library"))


def test_one_rounding_errs_less_than_peft_s_two():
    """y and dX in bf16 against fp64, with a low-rank part of a sixth of W x. PEFT rounds W x, and the sum again: sqrt 2 times the error."""
    torch.manual_seed(0)
    x, dy = torch.randn(256, 384).bfloat16().requires_grad_(), torch.randn(256, 320).bfloat16()
    w, a, b = (
        (torch.randn(320, 384) * 384**-0.5).bfloat16(),
        torch.randn(16, 384) * 384**-0.5,
        torch.randn(320, 16) * 0.02,
    )
    plain = [Projection(w, None, Adapter(a, b, 2.0))]
    held = Augmented(plain).holding(plain)
    with use_gemm("augmented"):
        (ours,) = lora_linear_group(x, held)
    peft = x @ w.T + (x.float() @ a.T @ b.T * 2.0).bfloat16()  # adapters in fp32, and x cast to them
    merged = w.double() + 2.0 * b.double() @ a.double()
    for exact, one, other in (
        (x.double() @ merged.T, ours, peft),
        (dy.double() @ merged, *(torch.autograd.grad(y, x, dy)[0] for y in (ours, peft))),
    ):
        assert (one.double() - exact).norm() < 0.8 * (other.double() - exact).norm()


def test_each_product_takes_the_form_of_its_shapes(monkeypatch: pytest.MonkeyPatch):
    x, projections = group((3, 4), (11, 5), 0.0, torch.float32)
    held = Augmented(projections).holding(projections)
    calls: list[str] = []
    for name in ("forward", "input_gradient"):
        real = getattr(Augmented, name)
        monkeypatch.setattr(Augmented, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    shapes = 19, (11, 5), (3, 4)
    for what, expected in (("y", ["forward"]), ("dx", ["input_gradient"]), ("other", [])):
        with use_gemm({(what, *shapes): Timed("augmented", {})}):
            y = torch.cat(lora_linear_group(x.requires_grad_(), held), 1)
        y.sum().backward()  # as its forward did, whatever holds now
        assert calls == expected
        calls.clear()


def test_weights_that_are_not_all_of_a_matrix_are_the_library_s():
    """One of a fused group alone, a copy, a matrix that has moved, another dtype, another rank."""
    x, projections = group((3, 4), (11, 5), 0.0, torch.float32)
    held = Augmented(projections).holding(projections)
    first, second = held
    assert first.adapter and isinstance(first.weight, AugmentedWeight)
    wider = first._replace(adapter=first.adapter._replace(a=torch.ones(5, 19), b=torch.ones(11, 5)))
    for others in (
        [first],
        [second, first],
        [wider, second],
        [first._replace(weight=copy.deepcopy(first.weight)), second],
    ):
        assert Augmented.of(others, x) is None
        torch.testing.assert_close(outputs(x, others, "augmented"), outputs(x, others, "library"))
    assert Augmented.of(held, x.double()) is None
    first.weight.data = first.weight.data.clone()
    assert Augmented.of(held, x) is None
