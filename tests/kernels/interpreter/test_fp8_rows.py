"""Rows rounded to FP8 by the kernel: the bits of torch's own conversion."""

import pytest
import torch

from minilora.kernels.dispatch import use_triton
from minilora.kernels.fp8_rows import E4M3, by_rows, by_rows_ref

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def same(x: torch.Tensor, factor: torch.Tensor | None = None) -> None:
    (codes, scales), (wanted, of_rows) = by_rows(x, factor), by_rows_ref(x, factor)
    assert use_triton(x) and codes.dtype == E4M3
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8)) and torch.equal(scales, of_rows)


def test_every_code_and_what_lies_between_two():
    """Each of the 127 sizes, the middle of two neighbours, which goes to the even one, and what is next to the middle."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middle = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (0.0, 1000.0)]
    sizes = torch.cat([torch.tensor([448.0]), codes, middle, *beside])
    same(torch.cat([sizes, -sizes])[None])


@dtypes
@pytest.mark.parametrize("n", [1, 16, 100, 4100])
def test_rows_of_any_length_and_size(dtype: torch.dtype, n: int):
    torch.manual_seed(n)
    x = (torch.randn(7, n + 5) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)[:, :n]
    x[2] = 0
    same(x)
    same(x, torch.rand(n, 1))


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's infinity times zero
def test_what_is_not_finite():
    x = torch.ones(3, 16)
    x[1, 3], x[2, 2] = float("nan"), float("inf")
    codes = by_rows(x)[0].float()
    assert codes[1, 3].isnan() and codes[2, 2].isnan() and codes[0].isfinite().all()
