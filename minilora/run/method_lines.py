"""The lines of a run's header that say what is trained, and what of it is slower than LoRA."""

from collections.abc import Iterator

from torch import nn

from ..config import TrainConfig
from ..lora import adapters
from ..methods.table import method_of
from ..targets import short


def method_lines(config: TrainConfig, model: nn.Module, share: str) -> Iterator[tuple[str, str]]:
    """(name, note) of each line; share says how much is trained."""
    method = method_of(model)
    if method is not None:
        yield config.method, f"{method.describe(model)}  {share}"
        return
    wrapped = dict(adapters(model))
    names = " ".join(dict.fromkeys(short(path) for path in wrapped))
    scale = next(iter(wrapped.values())).scale
    size = f"r={config.lora_r} alpha={config.lora_alpha:g} (scale {scale:g})"
    yield config.method, f"{size}  {names}  {len(wrapped)} linears  {share}"
    if config.loraplus_lr_ratio != 1:
        yield "lora+", f"B learns at {config.loraplus_lr_ratio:g} times the rate of A"
    if config.lora_init == "pissa":
        yield "pissa", "W stays whole: each product has the start of the adapter subtracted, and costs that of rank 2r"
    if config.method == "dora":
        yield "", "the linears of one input are products of their own, and each pass reads W once more for its norms"
