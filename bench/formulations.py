"""The same operations as others formulate them, for the tables: Hugging Face and PEFT term by term, Liger's where it is installed.

Each takes what ours takes. They are plain functions that autograd differentiates; `compiled` puts torch.compile around one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def peft_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """peft's Linear with adapters in fp32, its default: x is cast for them."""
    return F.linear(x, w, bias) + (F.linear(F.linear(x.to(a.dtype), a), b) * scale).to(x.dtype)


def peft_linear_16bit(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """peft's Linear with adapters in the dtype of x (autocast_adapter_dtype=False)."""
    return F.linear(x, w, bias) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


def hf_rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def hf_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat((angle, angle), -1)[:, None] for angle in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


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


def liger() -> dict[str, Callable[..., Any]]:
    """Liger's kernels by our names; none without the package or a GPU."""
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # pyright: ignore
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore
            LigerFusedLinearCrossEntropyFunction,
        )
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore
        from liger_kernel.ops.rope import LigerRopeFunction  # pyright: ignore
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}

    def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)

    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = x.transpose(0, 1)[None]
        both = (torch.cat((angle, angle), -1)[None] for angle in (cos, sin))
        return LigerRopeFunction.apply(q, q[:, :1].clone(), *both)[0][0].transpose(0, 1)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return LigerCrossEntropyFunction.apply(logits.clone(), targets, None, -100, 0.0, 0.0, "sum")[0]

    def linear_cross_entropy(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return LigerFusedLinearCrossEntropyFunction.apply(x, head, targets, None, None, -100, 0.0, 0.0, "sum")[0]

    return {
        "rms_norm": rms_norm,
        "rope": rope,
        "swiglu": LigerSiLUMulFunction.apply,
        "cross_entropy": cross_entropy,
        "linear_cross_entropy": linear_cross_entropy,
    }
