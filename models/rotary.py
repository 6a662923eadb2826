"""The frequencies of rotary positions (Su et al., 2021), with YaRN (Peng et al., 2023)."""

import math

import torch
from torch import Tensor

from .config import Config


def inverse_frequencies(c: Config, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Rotary frequencies [P/2] in fp32 (fp64 if dtype is) and the factor on cos and sin, YaRN applied; P is c.rotary."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, c.rotary, 2, device=device, dtype=torch.int64).to(wide) / c.rotary
    frequencies = 1.0 / c.rope_theta**exponents / c.rope_scale
    yarn = c.yarn
    if yarn is None:
        return frequencies, 1.0

    def dimension(rotations: float) -> float:  # the dimension that turns so often over the original length
        return c.rotary * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.rotary - 1)
    ramp = (torch.arange(c.rotary // 2, device=device, dtype=wide) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow), yarn.attention_factor
