"""The methods beside LoRA, DoRA and full, by the names of --method and of PEFT."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol, cast

from torch import Tensor, nn

from minilora.models.decoder import Decoder
from minilora.models.layers import Adapted

from ..config import TrainConfig
from . import bitfit, bottleneck, freeze, ia3, prefix, prompt


class Method(Protocol):
    """What a file of a method holds."""

    PEFT_TYPE: str  # in adapter_config.json
    Part: type[Adapted]  # what it puts in a model

    def install(self, model: Decoder, config: TrainConfig) -> None:
        """Put new parts in a frozen model, which then computes what it did, or almost."""
        ...

    def read(self, model: Decoder, j: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Put in the parts that an adapter_config.json and the shapes of its file ask for; returns, by key, where its tensors go.

        ValueError for a config that is not supported, with what to do.
        """
        ...

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What the file of an adapter holds, by key: the trained parameters themselves where it is them."""
        ...

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Its own keys of adapter_config.json."""
        ...

    def describe(self, model: nn.Module) -> str:
        """What is trained, and what is slower than it could be, for the header of a run."""
        ...


def _method(module: ModuleType) -> Method:
    return cast(Method, module)


METHODS = {
    "prefix": _method(prefix), "prompt": _method(prompt), "ia3": _method(ia3), "freeze": _method(freeze), "bitfit": _method(bitfit),
    "bottleneck": _method(bottleneck),
}  # fmt: skip
PEFT_TYPES = {method.PEFT_TYPE: method for method in METHODS.values()} | {"P_TUNING": METHODS["prompt"]}


def method_of(model: nn.Module) -> Method | None:
    """The method whose parts a model has; None for LoRA and DoRA, and for a model that has none."""
    modules = list(model.modules())
    return next((m for m in METHODS.values() if any(isinstance(part, m.Part) for part in modules)), None)
