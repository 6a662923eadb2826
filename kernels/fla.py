"""Flash Linear Attention's kernels (Yang and Zhang, 2024; package `fla-core`), for 16-bit tensors on a GPU where it is installed.

Of the gated delta rule and its convolution, which say themselves what they compute; here is only how FLA is asked. What takes
no part in the package's interface, as the lengths of documents on the GPU, is made once for all layers.
"""

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from minilora.kernels.dispatch import to_device, use_triton

WIDEST = 256  # of a head, which FLA's kernels take


@lru_cache
def _installed() -> tuple[Any, Any] | str:
    """chunk_gated_delta_rule and causal_conv1d; or why they are not there."""
    try:
        rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        return rule, importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    except ImportError as error:
        missing = getattr(error, "name", None) in ("fla", "einops")
        return "fla-core is not installed: pip install 'minilora[hybrid]'" if missing else f"fla-core: {error}"
    except (OSError, RuntimeError, AttributeError) as error:  # built for another torch or Triton
        return f"fla-core cannot be used: {str(error).splitlines()[0][:80]}"


def _functions() -> tuple[Any, Any]:
    found = _installed()
    assert not isinstance(found, str), found
    return found


def runs_on_fla(*tensors: Tensor) -> bool:
    """Whether FLA takes these, of heads in their last dimension: fp16 or bf16 on a GPU that Triton serves, with the package there."""
    first = tensors[0]
    fits = first.is_cuda and first.element_size() == 2 and all(t.shape[-1] <= WIDEST for t in tensors if t.dim() == 3)
    return fits and use_triton(*tensors) and not isinstance(_installed(), str)


def fla_path(heads: Tensor) -> str:
    """How the gated delta rule of heads [..., n] on a GPU runs, for the header of a run."""
    found = _installed()
    if runs_on_fla(heads):
        return "Flash Linear Attention"
    why = found if isinstance(found, str) else f"not for {str(heads.dtype)[6:]}, or heads of {heads.shape[-1]}"
    return f"PyTorch, in chunks ({why})"


@lru_cache(16)
def _bounds(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    there = torch.tensor(cu_seqlens)
    return to_device(there, device), there


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """gated_delta_rule, by FLA."""
    rule, _ = _functions()
    bounds, on_cpu = _bounds(tuple(cu_seqlens), v.device)
    given = [x.contiguous()[None] for x in (q, k, v, g, beta)]
    form = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": bounds, "cu_seqlens_cpu": on_cpu}
    return rule(*given, **form)[0].squeeze(0)


def convolution(x: Tensor, w: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """short_conv, by FLA."""
    _, conv = _functions()
    bounds, on_cpu = _bounds(tuple(cu_seqlens), x.device)
    found = conv(x.contiguous()[None], w.contiguous(), activation="silu", cu_seqlens=bounds, cu_seqlens_cpu=on_cpu)
    return found[0].squeeze(0)
