"""h = silu(g) * u with g and u two linear layers of x with adapters, where no backward follows: g and u are never
stored.

    g = x W_0^T + b_0 + s_0 drop_0(x) A_0^T B_0^T        u likewise with projection 1        h [T, F] = silu(g) * u

Evaluation uses it, and the first pass over a layer that the backward computes again (activation checkpointing). The two
weights are packed in one storage, and a tile takes its columns from both alternately: one product makes g and u side by
side, in the registers of one thread. They are rounded to the dtype of x as the two layers would round them. Where
another form than Triton's is chosen for their shapes (wide_products.py), they are stored, and h is made of them.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels import kept, lora_linear, lora_shrink
from minilora.kernels.group import Forms, Group, Place, Sizes, launch_options, s_index
from minilora.kernels.lang import cdiv, jit, load, rounded, rows_of, store, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.lora_gemm import GROUP_ROWS, as_operand, dot, load_operand, swizzle_tile
from minilora.kernels.packed import join, joined
from minilora.kernels.projection import Projection, check
from minilora.kernels.swiglu import sigmoid, swiglu, swiglu_fused, swiglu_fused_ref, swiglu_ref

DUAL = {  # by architecture, as in lora_gemm: BN columns of each of the two
    0: {"BM": 32, "BN": 32, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 128, "BN": 64, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 4},
    86: {"BM": 128, "BN": 64, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 4},
    90: {"BM": 128, "BN": 128, "BK": 64, "R": 64, "num_warps": 8, "num_stages": 3},
}


def lora_swiglu_ref(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """The specification: two projections of x [T, K], gate and up, or one that is both -> [T, F]."""
    ys = lora_linear.lora_linear_group_ref(x, projections)
    return swiglu_ref(*ys) if len(ys) == 2 else swiglu_fused_ref(*ys)


@jit(do_not_specialize=["rows"])
def _dual_kernel(
    x_ptr,
    s_ptr,
    w_ptr,
    bias_ptrs,
    b_ptrs,
    h_ptr,
    scales,
    bias_ns,
    ranks,
    s_index,
    w_stride,
    x_stride,
    rows,
    K,
    N,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BM rows by BN columns of h. y is [g_0 u_0 g_1 u_1 ...], so that each thread holds both of a pair."""
    i_m, i_n = swizzle_tile(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(N, BN), GROUP)
    top = i_m.to(tl.int64) * BM
    o_m = tl.minimum(top + tl.arange(0, BM), rows - 1)[:, None]
    o_n = i_n * BN + tl.arange(0, BN)[None, :]
    o_b = tl.minimum(o_n, N - 1).to(tl.int64)
    # expand, gate and up apart: s_j S_j B_j^T                                              [BM, R] x [R, BN]
    pair = ()
    for j in tl.static_range(2):
        b_y = tl.zeros((BM, BN), ACC)
        for start_r in tl.range(0, PADDED_R, R, num_stages=1):
            o_r = start_r + tl.arange(0, R)
            p_s = s_ptr + tl.cast(s_index[j], tl.int64) * rows * PADDED_R + o_m * PADDED_R + o_r[None, :]
            b_s = load_operand(p_s, o_r[None, :] < ranks[j], ACC)
            b_b = load(b_ptrs[j] + o_b * ranks[j] + o_r[:, None], o_r[:, None] < ranks[j], ACC)
            b_y = dot(b_s, as_operand(b_b, x_ptr.dtype.element_ty), b_y)
        pair = pair + (b_y * scales[j],)
    # base GEMM of both: y += x [W_0, W_1]^T                                          [BM, BK] x [BK, 2 * BN]
    b_y = tl.reshape(tl.join(pair[0], pair[1]), (BM, 2 * BN))
    o_k, o_2n = tl.arange(0, BK), tl.arange(0, 2 * BN)[None, :]
    o_w = tl.minimum(i_n * BN + o_2n // 2, N - 1) + o_2n % 2 * N
    p_x, p_w = x_ptr + o_m * x_stride + o_k[None, :], w_ptr + o_w.to(tl.int64) * w_stride + o_k[:, None]
    for start_k in range(0, K, BK):
        m_k = (start_k + o_k < K) | EVEN_K
        b_y = dot(load_operand(p_x, m_k[None, :], ACC), load_operand(p_w, m_k[:, None], ACC), b_y)
        p_x += BK
        p_w += BK
    # biases, the rounding that the two layers would do, and h = silu(g) * u                         [BM, BN]
    b_g, b_u = tl.split(tl.reshape(b_y, (BM, BN, 2)))
    b_g = rounded(b_g + load(bias_ptrs[0] + o_n, o_n < bias_ns[0], ACC), x_ptr.dtype.element_ty)
    b_u = rounded(b_u + load(bias_ptrs[1] + o_n, o_n < bias_ns[1], ACC), x_ptr.dtype.element_ty)
    o_m = tl.arange(0, BM)[:, None]
    store(h_ptr + top * N + o_m * N + o_n, b_g * sigmoid(b_g) * b_u, (o_m < rows - top) & (o_n < N))


@per_shape
def _dual_launch(
    place: Place, rows: int, k: int, x_stride: int, pair: tuple[Sizes, ...], index: tuple[int, ...]
) -> Launch:
    options, n = launch_options(DUAL, place, [p.rank for p in pair if p.rank]), pair[0].n
    del options["COUNT"]
    options["EVEN_K"] = k % options["BK"] == 0
    _, w_strides, bias_ns, ranks, scales = zip(*pair, strict=True)
    numbers = scales, bias_ns, ranks, index, w_strides[0], x_stride, rows, k, n
    grid = cdiv(rows, options["BM"]) * cdiv(n, options["BN"])
    return Launch(place.device, grid, numbers, GROUP=GROUP_ROWS, **options)


def _on_triton(x: Tensor, weight: Tensor, pair: Sequence[Projection]) -> Tensor:
    """weight [2 F, K]: the gate's rows, then up's."""
    x, n, group, adapters = rows_of(x), weight.shape[0] // 2, Group.of(pair), [p.adapter for p in pair if p.adapter]
    (rows, k), shrunk, index = x.shape, group, s_index(group.sizes)
    if len(adapters) == 2 and adapters[0].a is adapters[1].a and adapters[0][3:] == adapters[1][3:]:
        shrunk, index = Group.of(pair[:1]), (0, 0)  # the same A and mask, so the same S
    launch = _dual_launch(Place.of(x), rows, k, x.stride(0), group.sizes, index)
    h = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        s = kept.keep(lora_shrink.shrink(x, shrunk))
        launch(_dual_kernel, x, s, weight, group.biases, group.wide_bs, h)
    return h


def _halves(fused: Projection) -> list[Projection]:
    """Gate and up of a projection that is both."""
    (_, bias, adapter), weight, n = fused, fused.tensor, fused.weight.shape[0] // 2
    return [
        Projection(weight[half], None if bias is None else bias[half], adapter and adapter._replace(b=adapter.b[half]))
        for half in (slice(n), slice(n, None))
    ]


def check_pair(projections: Sequence[Projection]) -> None:
    """ValueError unless they are gate and up, or one that is both."""
    shapes = [list(p.weight.shape) for p in projections]
    if len(shapes) not in (1, 2) or shapes[0] != shapes[-1] or (len(shapes) == 1 and shapes[0][0] % 2):
        raise ValueError(f"gate and up are two weights of one shape, or one with the rows of both, not {shapes}")


def lora_swiglu(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """silu(gate) * up [T, F] for the projections of x [T, K]: gate and up, or one that holds both, the gate's F rows
    first.

    No gradient is recorded. ValueError if they do not fit together.
    """
    check_pair(projections)
    check(x, projections)
    with torch.no_grad():
        if Forms.of(projections).y == "triton" and all(isinstance(p.weight, Tensor) for p in projections):
            pair = projections if len(projections) == 2 else _halves(projections[0])
            weight = joined([p.tensor for p in pair])
            if weight is not None and lora_linear.runs_on_triton(x, pair):
                return _on_triton(x, weight, pair)
        ys = lora_linear.lora_linear_group(x, projections)
        return swiglu(*ys) if len(ys) == 2 else swiglu_fused(*ys)


def example(
    tokens: int, k: int, n: int, r: int, dtype: torch.dtype, device: str = "cpu", p: float = 0.0
) -> tuple[tuple[Tensor, list[Projection]], dict]:
    """Arguments of one call, and the flops and bytes that a perfect one needs."""
    (x, projections), cost = lora_linear.group_example(tokens, k, (n, n), r, dtype, device, p)
    weights = join([p.tensor for p in projections])
    projections = [p._replace(weight=weight) for p, weight in zip(projections, weights, strict=True)]
    return (x, projections), {"flops": cost["flops"], "bytes": cost["bytes"] - dtype.itemsize * tokens * n}


def fused_example(
    tokens: int, k: int, n: int, r: int, dtype: torch.dtype, device: str = "cpu", p: float = 0.0
) -> tuple[tuple[Tensor, list[Projection]], dict]:
    """The same of one projection that is both."""
    args, cost = lora_linear.group_example(tokens, k, (2 * n,), r, dtype, device, p)
    return args, {"flops": cost["flops"], "bytes": cost["bytes"] - dtype.itemsize * tokens * n}
