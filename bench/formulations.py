"""The same operations as others formulate them, for the tables: Hugging Face and PEFT term by term, and the kernels of others.

Each takes what ours takes. They are plain functions that autograd differentiates; `compiled` puts torch.compile around one. `installed`
has the kernels of Liger, Unsloth and Cut Cross-Entropy where those packages are, on a GPU.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.projection import Projection


def peft_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """peft's Linear with adapters in fp32, its default: x is cast for them."""
    return F.linear(x, w, bias) + (F.linear(F.linear(x.to(a.dtype), a), b) * scale).to(x.dtype)


def peft_linear_16bit(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """peft's Linear with adapters in the dtype of x (autocast_adapter_dtype=False)."""
    return F.linear(x, w, bias) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


class _Unsloth(torch.autograd.Function):
    """A GEMM and one accumulate; x alone is kept, x A^T is made again in the backward, and dY B once for dA and once for dX."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        return F.linear(x, w, bias).addmm_(x @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        x, w, a, b = ctx.saved_tensors
        low_a, low_b = a.to(dy.dtype), b.to(dy.dtype)
        da = ((dy @ low_b).T @ x).mul_(ctx.scale).to(a.dtype)
        db = (dy.T @ (x @ low_a.T)).mul_(ctx.scale).to(b.dtype)
        dx = (dy @ w).addmm_(dy @ low_b, low_a, alpha=ctx.scale)
        return dx, None, None, da, db, None


def unsloth_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The formulation of Unsloth's kernels, from its description."""
    return _Unsloth.apply(x, w, bias, a, b, scale)  # pyright: ignore[reportReturnType]


def bare_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The frozen layer alone: what no adapter can be faster than on the same GEMM."""
    return F.linear(x, w, bias)


BARE = "no adapter"  # computes something else, so that its error says nothing
LORA_LINEARS: dict[str, Callable[..., Tensor]] = {
    "peft": peft_linear,
    "peft 16 bit": peft_linear_16bit,
    "unsloth style": unsloth_linear,
    BARE: bare_linear,
}


def hf_rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def hf_add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return hf_rms_norm(total, w, eps), total


def hf_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat((angle, angle), -1)[:, None] for angle in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def hf_rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GLM's: the first elements of a head rotate in pairs of neighbours."""
    cos, sin = (angle.repeat_interleave(2, dim=-1)[:, None] for angle in (cos, sin))
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((turning * cos + turned * sin, rest), dim=-1)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], window: int | None, prefix_lens: list[int] | None
) -> Tensor:
    """One document, products in the dtype of q and the softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    place = torch.arange(cu_seqlens[-1], device=q.device)
    seen = place[:, None] >= place
    if window is not None:
        seen &= place[:, None] - place < window
    if prefix_lens is not None:
        seen |= place < prefix_lens[0]
    scores = torch.einsum("qhe,khe->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("hqk,khe->qhe", weights.to(q.dtype), v)


def sdpa_by_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], *_: Any) -> Tensor:
    """torch's causal attention, a call a document."""
    outs = []
    for start, end in pairwise(cu_seqlens):
        one, two, three = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(one, two, three, is_causal=True, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def hf_swiglu(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


def hf_linear_cross_entropy(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, head).float(), targets, reduction="sum")


def hf_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


def torch_linear_cross_entropy(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """torch's own chunked one (2.13 and later)."""
    return F.linear_cross_entropy(x, head, targets, reduction="sum")  # pyright: ignore[reportAttributeAccessIssue]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def installed(op: str) -> dict[str, Callable[..., Any]]:
    """Kernels of others for an operation of ours, by the name of the package; none without a GPU."""
    if not torch.cuda.is_available():
        return {}
    packages = {"liger": _liger, "unsloth": _unsloth, "cut cross-entropy": _cut_cross_entropy}
    return {name: kernels()[op] for name, kernels in packages.items() if op in kernels()}


# (operation, package) that writes into its input: it is given one of its own, outside of its time
OVERWRITES = {("cross_entropy", "liger")}


@cache
def _unsloth() -> dict[str, Callable[..., Any]]:
    try:
        import unsloth  # noqa: F401  # pyright: ignore  (its kernels want it first)
        from unsloth.kernels.fast_lora import LoRA_QKV, LoRA_W  # pyright: ignore
    except (ImportError, NotImplementedError, RuntimeError):  # of its own checks of the machine
        return {}

    def linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y = LoRA_W.apply(x[None], w, None, a, b, scale)[0]
        return y if bias is None else y + bias  # its kernels know no bias of the frozen layer

    def qkv(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
        given = [[p.weight, None, p.adapter.a, p.adapter.b, p.adapter.scale] for p in projections if p.adapter]
        ys = LoRA_QKV.apply(x[None], *chain(*given), False)  # not in place: the other sides need x
        return tuple(y[0] if p.bias is None else y[0] + p.bias for y, p in zip(ys, projections, strict=True))

    return {"lora_linear": linear, "lora_qkv": qkv}


@cache
def _cut_cross_entropy() -> dict[str, Callable[..., Any]]:
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore
    except ImportError:
        return {}
    return {"linear_cross_entropy": partial(linear_cross_entropy, reduction="sum")}


@cache
def _liger() -> dict[str, Callable[..., Any]]:
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # pyright: ignore
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction  # pyright: ignore
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore
        from liger_kernel.ops.rope import LigerRopeFunction  # pyright: ignore
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore
    except ImportError:
        return {}

    def rms_norm(x: Tensor, w: Tensor, eps: float, *_: Any) -> Tensor:
        return LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)

    def rope(x: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> Tensor:
        q = x.transpose(0, 1)[None]
        both = (torch.cat((angle, angle), -1)[None] for angle in (cos, sin))
        return LigerRopeFunction.apply(q, q[:, :1].clone(), *both)[0][0].transpose(0, 1)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "sum")[0]

    def linear_cross_entropy(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return LigerFusedLinearCrossEntropyFunction.apply(x, head, targets, None, None, -100, 0.0, 0.0, "sum")[0]

    return {
        "rms_norm": rms_norm,
        "rope": rope,
        "swiglu": LigerSiLUMulFunction.apply,
        "cross_entropy": cross_entropy,
        "linear_cross_entropy": linear_cross_entropy,
    }
