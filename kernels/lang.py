"""Triton, where it is installed, and what every kernel does: a load that widens, a store that rounds once.

Every other file imports Triton's names from here, so that its torch path works without Triton (macOS). Triton's
interpreter (TRITON_INTERPRET=1, set before the first import) keeps bf16 as bit patterns: it can widen them, but it
truncates where a GPU rounds to nearest. `rounded` does that rounding by hand there, to the same bits.

Names in kernels are those of flash-linear-attention. For a tensor x and an axis m, n, k or r (rows, columns, what a
product sums over, ranks):

    x_ptr  memory of x          p_x  pointers to a tile of it       b_x  the tile, in registers
    i_m    index of a tile      o_m  offsets of its elements        m_m  their mask: true inside the tensor
    BM     size of a tile       M    size of the tensor, also rows, N, K
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton.language as tl

    HAVE_TRITON = INTERPRETED = True
    driver: Any
    JITFunction: type

    def jit(fn: Callable | None = None, **options: Any) -> Any: ...
else:
    try:
        import triton.language as tl
        from triton import jit, knobs
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        HAVE_TRITON, INTERPRETED = True, knobs.runtime.interpret
    except ImportError:
        HAVE_TRITON = INTERPRETED = False
        tl = SimpleNamespace(constexpr=lambda value: value)
        driver = JITFunction = None

        def jit(fn: Callable | None = None, **_: Any) -> Callable:
            return fn or (lambda fn: fn)


INTERPRET = tl.constexpr(INTERPRETED)
PINNED = {"enable_fp_fusion": True}  # options of every launch; their default differs between Triton 3.9 and 3.10


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own can also be called in a kernel and takes 4 us for that; so below."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def accum_dtype(dtype: torch.dtype) -> "tl.dtype":
    """What a kernel computes in: fp32, and fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., N] as [rows, N] with contiguous rows; a copy only where the strides need one."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@jit
def load(ptrs, mask, ACC: tl.constexpr):
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@jit
def rounded(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, in the dtype of x."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, bits, nearest).to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE).to(x.dtype)


@jit
def store(ptrs, x, mask):
    if INTERPRET:
        x = rounded(x, ptrs.dtype.element_ty)
    tl.store(ptrs, x, mask=mask)


@jit
def halves(x):
    """The left and the right half of the columns of a tile; no value leaves its register."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@jit
def quarters(x):
    """The four quarters of the columns of a tile, from left to right."""
    left, right = halves(x)
    return halves(left) + halves(right)
