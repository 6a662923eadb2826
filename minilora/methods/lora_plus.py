"""LoRA+: B learns faster than A (Hayou et al., 2024, arXiv 2402.12354).

In a wide model dW = s B A moves by B's steps far more than by A's if both have one rate. The paper gives B the rate of A
times a ratio, about 16. It is not a way to adapt a layer, only two groups of the optimizer: any adapter with a lora_B
takes it. What has one dimension (DoRA's magnitudes) goes with B, as in PEFT's create_loraplus_optimizer.
"""

from typing import Any

from torch import nn

from ..errors import UsageError
from ..lora import trained_parameters


def rate_groups(model: nn.Module, ratio: float) -> list[dict[str, Any]]:
    """The trained parameters as groups of an optimizer: each learns at the run's rate times its `ratio`.

    UsageError for a ratio where there is no B.
    """
    trained = trained_parameters(model)
    if ratio == 1:
        return [{"params": list(trained.values()), "ratio": 1.0}]
    if not any(name.endswith("lora_B") for name in trained):
        raise UsageError("--loraplus-lr-ratio is for adapters with a B", "Take --method lora or dora, or leave it out.")
    fast = {name for name, p in trained.items() if name.endswith("lora_B") or p.dim() == 1}
    return [
        {"params": [p for name, p in trained.items() if name not in fast], "ratio": 1.0},
        {"params": [p for name, p in trained.items() if name in fast], "ratio": ratio},
    ]
