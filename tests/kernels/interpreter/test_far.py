"""Offsets beyond int32 in the kernels with a wide product: tensors whose rows lie far apart, and the last program of many.

The memory between the rows is never touched, so it takes none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from oracle import upstream
from torch import Tensor
from triton.runtime import interpreter

from minilora.kernels import fp8_rows, linear_cross_entropy, lora_gemm, lora_linear, lora_shrink, swiglu_shrink
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.group import Group
from minilora.kernels.lang import accum_dtype
from minilora.kernels.projection import Adapter, Projection

APART = 2**30 + 5  # elements, so that the third row begins beyond 2^31


def far(x: Tensor) -> Tensor:
    """The same three rows, each APART behind the one before."""
    assert x.shape[0] == 3
    return torch.empty(2 * APART + x.shape[1], dtype=x.dtype).as_strided(x.shape, (APART, 1)).copy_(x)


def gradients(out: list[Tensor], dys: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return [*out, *torch.autograd.grad(out, leaves, dys)]


@pytest.mark.parametrize("where", ["g", "u", "both"])
def test_rows_of_gate_and_up_far_apart(where: str):
    torch.manual_seed(0)
    g, u, dh = (torch.randn(3, 40, dtype=torch.float16) for _ in range(3))
    adapter = Adapter(torch.randn(2, 40), torch.randn(5, 2), 1.5, 0.25, DropoutKey(1, 2, 3, 4))
    group, ds = Group.of([Projection(torch.randn(5, 40), None, adapter)]), torch.randn(1, 3, 16, dtype=torch.float16)

    def results(g: Tensor, u: Tensor | None) -> list[Tensor]:
        dgu, da = swiglu_shrink.backward(dh, g, u, ds, group)
        return [*swiglu_shrink.forward(g, u, group), torch.cat(dgu, 1), *da]

    if where == "both":
        expected, found = results(torch.cat((g, u), 1), None), results(far(torch.cat((g, u), 1)), None)
    else:
        expected, found = results(g, u), results(far(g) if where == "g" else g, far(u) if where == "u" else u)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("single", [True, False], ids=["one pass", "two"])
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
def test_rows_of_a_linear_far_apart(where: str, single: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora_gemm, "single_pass_wins", lambda *_: single)
    torch.manual_seed(0)
    (x, (p,)), _ = lora_linear.group_example(3, 21, (3,), 2, torch.float16)
    assert p.adapter
    leaves = [x.requires_grad_(), p.adapter.a.requires_grad_(), p.adapter.b.requires_grad_()]
    dy = upstream(lora_linear.lora_linear_group(x, [p])[0])

    def results(x: Tensor, p: Projection, dy: Tensor) -> list[Tensor]:
        leaves[0] = x
        return gradients([lora_linear.lora_linear_group(x, [p])[0]], [dy], leaves)

    expected = results(x, p, dy)
    match where:
        case "x":
            found = results(far(x.detach()).requires_grad_(), p, dy)
        case "weight":
            found = results(x, p._replace(weight=far(p.tensor)), dy)
        case _:
            found = results(x, p, far(dy))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@contextmanager
def last_program() -> Iterator[None]:
    """Of every launch inside only the last program runs."""
    began, last = interpreter.GridExecutor.__init__, [0]

    def of_one(self: Any, fn: Any, names: Any, grid: tuple[int, ...], *rest: Any) -> None:
        last[0] = grid[0] - 1
        began(self, fn, names, (1,), *rest)

    def index(self: Any, *_: int) -> None:
        self.grid_idx = (last[0], 0, 0)

    with (
        patch.object(interpreter.GridExecutor, "__init__", of_one),
        patch.object(interpreter.InterpreterBuilder, "set_grid_idx", index),
    ):
        yield


ROWS, WIDTH = 2**18, 2**13 + 512  # over 2^31 values


@pytest.fixture
def adapter() -> Adapter:
    torch.manual_seed(0)
    return Adapter(torch.randn(3, WIDTH), torch.randn(WIDTH, 3), 0.5, 0.0, DropoutKey(0, 0, 0, 0))


def test_the_last_rows_of_a_large_output(adapter: Adapter):
    x = torch.randn(1, 32).half().expand(ROWS, -1)  # one row in memory
    weight = torch.randn(WIDTH, 32).half()
    narrow = adapter._replace(a=torch.randn(3, 32))
    s = torch.empty(1, ROWS, 16, dtype=x.dtype)
    s[:, -64:, :3] = torch.randn(3).half()
    with last_program():
        (y,) = lora_gemm.forward(x, s, Group.of([Projection(weight, None, narrow)]))
    truth = x[-1].double() @ weight.double().T + 0.5 * s[0, -1, :3].double() @ narrow.b.double().T
    torch.testing.assert_close(y[-1, -20:].double(), truth[-20:], rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_last_rows_of_a_large_input_gradient(adapter: Adapter, p: float):
    dy = torch.randn(1, 16).half().expand(ROWS, -1)
    weight = torch.randn(16, WIDTH).half()
    ds = torch.empty(1, ROWS, 16, dtype=dy.dtype)
    ds[:, -64:, :3] = torch.randn(3).half()
    wide = adapter._replace(b=torch.randn(16, 3), p=p)
    with last_program():
        dx = lora_gemm.input_gradient([dy], ds, Group.of([Projection(weight, None, wide)]))
    low = ds[0, -1, :3].double() @ adapter.a.double()
    drawn = [low * 0, low] if p else [low]
    errors = [(dx[-1].double() - dy[-1].double() @ weight.double() - each)[-20:].abs() for each in drawn]
    assert torch.stack(errors).amin(0).max() < 0.05
    assert not p or all((e > 0.05).any() for e in errors), "some are kept and some are not"


def test_the_last_partial_sums_of_many(adapter: Adapter, monkeypatch: pytest.MonkeyPatch):
    """Of dB and dS, whose tiles of rows are so many that the partials have 2^31 values."""
    add_up = MagicMock()
    monkeypatch.setattr(lora_shrink, "_sum_kernel", add_up)
    monkeypatch.setitem(lora_shrink.PROGRAMS, 0, 2**15)  # two for each tile of rows
    dy = torch.randn(1, WIDTH).half().expand(2 * ROWS, -1)
    s = torch.empty(1, 2 * ROWS, 16, dtype=dy.dtype)
    s[:, -64:, :3] = torch.randn(3).half()
    with last_program():
        lora_shrink.expand_backward([dy], s, Group.of([Projection(dy, None, adapter)]), True, True)
    ds, _, db, *_ = add_up[0].call_args.args
    assert db.numel() > 2**31
    tile = 2 * ROWS // db.shape[0]
    expected = 0.5 * tile * dy[-1, -16:, None].double() * s[0, -1, :3].double()
    torch.testing.assert_close(db[-1, -16:, :3].double(), expected, rtol=1e-5, atol=1e-5)
    half = WIDTH // ds.shape[0]
    expected = 0.5 * dy[-1, -half:].double() @ adapter.b[-half:].half().double()
    torch.testing.assert_close(ds[-1, -1, :3].double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_that_are_rounded_to_fp8_far_apart():
    torch.manual_seed(0)
    x = torch.randn(3, 40, dtype=torch.float16)
    (codes, scales), (near, of_rows) = fp8_rows.by_rows(far(x)), fp8_rows.by_rows(x)
    assert torch.equal(codes.view(torch.uint8), near.view(torch.uint8)) and torch.equal(scales, of_rows)


def test_rows_of_a_linear_cross_entropy_far_apart():
    torch.manual_seed(0)
    (x, head, targets), _ = linear_cross_entropy.example(3, 20, 37, torch.float16)

    def results(x: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_(), head.requires_grad_()]
        return gradients([linear_cross_entropy.linear_cross_entropy(x, head, targets)], [torch.ones(())], leaves)

    expected = results(x)
    assert all(torch.equal(a, b) for a, b in zip(results(far(x.detach())), expected, strict=True))


def test_the_last_row_of_a_large_chunk_of_logits():
    torch.manual_seed(0)
    logits, parts = torch.empty(ROWS, WIDTH, dtype=torch.float16), 2
    x, head = torch.randn(1, 16).half(), torch.randn(WIDTH, 16).half()
    row = (x @ head.T)[0]
    logits[-1], target = row, 77
    partial = torch.full((ROWS, parts), -float("inf"))
    partial[-1, 1] = torch.cat((row[:target], row[target + 1 :])).float().logsumexp(0)
    targets, loss = torch.full((ROWS,), target), torch.empty(ROWS)
    with last_program():
        linear_cross_entropy._softmax_kernel[(ROWS,)](
            logits,
            partial,
            x.expand(ROWS, -1),
            head,
            targets,
            loss,
            0,
            16,
            WIDTH,
            16,
            parts,
            PARTS=parts,
            BLOCK=1024,
            ACC=accum_dtype(logits.dtype),
            num_warps=4,
        )
    truth = row.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(truth, targets[-1])
    expected.backward()
    torch.testing.assert_close(loss[-1].double(), expected.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[-1].double(), truth.grad, rtol=2e-3, atol=1e-4)
