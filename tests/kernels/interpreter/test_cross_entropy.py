"""What only the Triton kernels of the two cross-entropies promise; the rest is in tests/kernels/test_kernels.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import check_op, run
from test_row_kernels import guarded, in_nan
from torch import Tensor

from minilora.kernels import cross_entropy as ce
from minilora.kernels import linear_cross_entropy as lce
from minilora.kernels.cross_entropy import IGNORED
from minilora.kernels.dispatch import kernels_enabled, use_gemm

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
few = settings(max_examples=6, phases=[Phase.explicit, Phase.generate], deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in every direction already where a test is quick."""
    torch.manual_seed(0)
    monkeypatch.setattr(ce, "BLOCK", 64)
    monkeypatch.setattr(lce, "TILE_INTERPRETED", lce.Tile(16, 64, 16, 4, 1))


def summed(logits: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
    return ce.cross_entropy(logits, targets, scale)[0]


def summed_ref(logits: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
    return ce.cross_entropy_ref(logits, targets, scale)[0]


def linear(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return lce.linear_cross_entropy(x, head, targets, chunk_rows=4)


def arguments(op: Callable, dtype: torch.dtype, rows: int = 6, v: int = 131) -> list[Any]:
    if op is summed:
        return list(ce.example(rows, v, dtype)[0])
    x, head, targets = lce.example(rows, 37, v, dtype)[0]
    targets[1::4] = IGNORED
    return [x, head, targets]


OPS = [(summed, summed_ref, (0,)), (linear, lce.linear_cross_entropy_ref, (0, 1))]
each = pytest.mark.parametrize("op, ref, trained", OPS, ids=["logits", "linear"])
Trained = tuple[int, ...]


@each
def test_the_interpreter_runs_the_kernels_and_the_switch_turns_them_off(op: Callable, ref: Callable, trained: Trained):
    args = arguments(op, torch.float32)
    args[0].requires_grad_()
    assert op(*args).grad_fn.name() == "_OnTritonBackward"
    with kernels_enabled(False):
        assert op(*args).grad_fn.name() == "_OnTorchBackward"


@each
@dtypes
@pytest.mark.parametrize("rows, v", [(1, 1), (1, 131), (7, 2), (9, 131)])
def test_every_dtype_and_ragged_shapes_within_fences(
    op: Callable, ref: Callable, trained: Trained, dtype: torch.dtype, rows: int, v: int
):
    args = arguments(op, dtype, rows, v)
    # a few values of 8 or 11 bits are no measure of an error: the yardstick of a low precision is a larger one's
    small = rows * v < 512 and dtype in (torch.float16, torch.bfloat16)
    eps = 2 * torch.finfo(dtype).eps
    plain = (lambda *a: ref(*a) * (1 + eps) + sum(eps * a[i].sum() for i in trained)) if small else None
    with guarded() as wholes:
        check_op(op, ref, args, trained, plain)
    assert wholes


def test_rows_of_more_than_a_block():
    """The true logit is summed in blocks of 1024."""
    x, head, targets = lce.example(3, 1030, 7, torch.float32)[0]
    check_op(linear, lce.linear_cross_entropy_ref, (x, head, targets), (0, 1))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_chunks_of_several_tiles_of_rows(dtype: torch.dtype):
    """Three tiles, the last of them short, and rows without a target in each; the fences show a read of other targets."""
    args = arguments(linear, dtype, rows=37)
    with guarded():
        check_op(lambda *a: lce.linear_cross_entropy(*a, chunk_rows=37), lce.linear_cross_entropy_ref, args, (0, 1))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_views_inside_nan(op: Callable, ref: Callable, trained: Trained, dtype: torch.dtype):
    args = arguments(op, dtype)
    spread = [in_nan(a) if a.is_floating_point() else torch.stack((a, a + 1), 1)[:, 0] for a in args]
    expected, found = run(op, args, trained), run(op, spread, trained)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each
def test_expanded_and_reversed_layouts(op: Callable, ref: Callable, trained: Trained):
    x, *others = arguments(op, torch.bfloat16)
    for odd in (x[:1].expand_as(x), x.T.contiguous().T):
        expected = run(op, [odd.contiguous(), *others], trained)
        found = run(op, [odd, *others], trained)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def far(x: Tensor) -> Tensor:
    """The first three rows, further apart than int32 counts; the memory between them is never touched."""
    apart = 5 * 2**28 + 3
    memory = torch.empty(2 * apart + x.shape[1], dtype=x.dtype)
    return memory.as_strided((3, x.shape[1]), (apart, 1)).copy_(x[:3])


def test_rows_further_apart_than_int32():
    logits, targets = arguments(summed, torch.float16)
    expected = run(summed, (logits[:3], targets[:3]), (0,))
    assert all(torch.equal(a, b) for a, b in zip(run(summed, (far(logits), targets[:3]), (0,)), expected, strict=True))
    x, head, targets = arguments(linear, torch.float16)
    expected = run(linear, (x[:3], head[:3], targets[:3] % 3), (0, 1))
    found = run(linear, (far(x), far(head), targets[:3] % 3), (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each
def test_a_second_derivative_is_refused(op: Callable, ref: Callable, trained: Trained):
    x, *others = arguments(op, torch.float32)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(op(x, *others).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@each
@pytest.mark.parametrize("wrong", [-1, 131, 2**40])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_class_that_does_not_exist_is_seen_in_the_loss(op: Callable, ref: Callable, trained: Trained, wrong: int):
    """On a GPU the targets cannot be read in time: the loss is NaN, and nothing is read beside the logits."""
    *inputs, targets = arguments(op, torch.float32)
    targets[3] = wrong
    module: Any = ce if op is summed else lce
    leaves = [in_nan(a).requires_grad_() for a in inputs]
    loss = module._OnTriton.apply(*leaves, targets)
    assert loss.isnan()
    loss.backward()
    dx = leaves[0].grad
    assert dx[3].isnan().all() and dx[[0, 2, 4]].isfinite().all()


@each
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_what_is_not_finite_shows(op: Callable, ref: Callable, trained: Trained, value: float):
    """The interpreter's maximum passes over a NaN, as a GPU's does; the loss must not."""
    x, *others = arguments(op, torch.float32)
    x[4, 5] = value
    assert op(x, *others).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block", [32, 256])
def test_the_width_of_a_tile_changes_rounding_only(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int):
    monkeypatch.setattr(ce, "BLOCK", block)
    check_op(summed, summed_ref, arguments(summed, dtype), (0,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tile", [(16, 32, 16), (64, 32, 128), (16, 512, 64)])
def test_the_tiling_of_the_products_changes_rounding_only(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tile: tuple[int, int, int]
):
    monkeypatch.setattr(lce, "TILE_INTERPRETED", lce.Tile(*tile, 4, 1))
    check_op(linear, lce.linear_cross_entropy_ref, arguments(linear, dtype, 11, 211), (0, 1))


@few
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 150), st.integers(1, 10), st.integers(0, 2**9 - 1))
def test_any_shape_any_mask(rows: int, width: int, v: int, chunk: int, mask: int):
    torch.manual_seed(0)
    x, head, targets = lce.example(rows, width, v, torch.float32)[0]
    targets[[i for i in range(rows) if mask >> i & 1]] = IGNORED
    check_op(summed, summed_ref, (x @ head.T, targets), (0,))
    check_op(
        lambda x, w, t: lce.linear_cross_entropy(x, w, t, chunk),
        lce.linear_cross_entropy_ref,
        (x, head, targets),
        (0, 1),
    )


@dtypes
def test_the_librarys_gemm_serves_as_well(dtype: torch.dtype):
    def op(*args: Tensor) -> Tensor:
        with use_gemm("library"):
            return linear(*args)

    check_op(op, lce.linear_cross_entropy_ref, arguments(linear, dtype), (0, 1))


@dtypes
def test_the_loss_is_the_same_bits_with_a_gradient_and_without(dtype: torch.dtype):
    args = arguments(linear, dtype)
    with torch.no_grad():
        alone = linear(*args)
    assert torch.equal(alone, run(linear, args, (0,))[0])


def test_without_a_gradient_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch):
    with torch.no_grad(), guarded() as wholes:
        linear(*arguments(linear, torch.float32))
    assert max(w.numel() - 128 for w in wholes) < 131


@dtypes
def test_a_known_scale_is_in_the_gradient_that_the_forward_makes(dtype: torch.dtype):
    """And the loss may be scaled once more after that."""
    scale = torch.tensor(0.37)

    def op(logits: Tensor, targets: Tensor) -> Tensor:
        return summed(logits, targets, scale)

    def ref(logits: Tensor, targets: Tensor) -> Tensor:
        return summed_ref(logits, targets, scale.to(logits.dtype if logits.dtype == torch.float64 else torch.float32))

    args = arguments(summed, dtype)
    with guarded():
        check_op(op, ref, args, (0,))
    (_, made), (_, later) = run(op, args, (0,)), run(lambda *a: summed(*a) * scale, args, (0,))
    assert torch.equal(made, later)


def test_a_gradient_made_in_the_forward_is_given_once():
    logits, targets = arguments(summed, torch.float32)
    loss = summed(logits.requires_grad_(), targets, torch.tensor(2.0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_a_trained_head_adds_up_in_fp32():
    """A large chunk and small ones after it: a sum in bf16 would stay at 128."""
    x, head = torch.tensor([[256.0], [1], [1], [1], [1]]).bfloat16(), torch.zeros(2, 1, dtype=torch.bfloat16)
    targets = torch.zeros(5, dtype=torch.int64)
    _, dhead = run(lambda *a: lce.linear_cross_entropy(*a, chunk_rows=1), (x, head, targets), (1,))
    assert dhead.tolist() == [[-130.0], [130.0]]
