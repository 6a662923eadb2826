"""The base and every adapter on it as models of their own, in one copy of the weights.

A pass of the decoder may hold requests to several of them. If all are to one model, its linears stand in the decoder, as if it had
been loaded alone. If not, a Mixed linear gives each row to the linear of its own model: all of them advance in every pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minilora.models.decoder import Decoder

from ..checkpoint.adapter import load_adapter
from ..errors import ModelError
from ..files.model_folder import ModelFolder
from ..generate import Request
from ..lora import adapters, replace_module
from ..methods.table import PEFT_TYPES
from ..text.tokenizer import Tokenizer


@dataclass(eq=False)
class Served:
    """A model that can be asked: its name, its tokenizer, and its adapter's linears by path (none: the base)."""

    name: str
    tokenizer: Tokenizer
    linears: dict[str, nn.Module] = field(default_factory=dict)


@dataclass(eq=False)
class Asked(Request):
    """A Request to one of the models of a server. `top`: how many of the likeliest tokens to keep beside each; None: keep none."""

    model: Served = field(kw_only=True)
    top: int | None = field(default=None, kw_only=True)
    # for each id its log-probability, and the likeliest tokens with theirs
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list, kw_only=True)
    changed: Callable[[], object] = field(
        default=lambda: None, kw_only=True
    )  # called in the event loop after each pass

    def add(self, token: int, logits: Tensor) -> None:
        if self.top is not None:
            logprobs = logits.float().log_softmax(-1)
            values, ids = logprobs.topk(self.top)
            self.logprobs.append((float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))))
        super().add(token, logits)


class Models:
    """A decoder and the models that it can be; `choose` is what decode calls before a pass."""

    def __init__(self, decoder: Decoder, name: str, tokenizer: Tokenizer):
        self.decoder, self.base = decoder, Served(name, tokenizer)
        self.all = {name: self.base}
        self._rows = Rows()
        self._mixed: dict[str, nn.Module] = {}
        self._bases: dict[str, nn.Module] = {}  # the base's own linears under any adapter
        self._installed: dict[str, nn.Module] = self.base.linears

    def add(
        self, name: str, folder: ModelFolder, tokenizer: Tokenizer, any_base: bool = False, allow_partial: bool = False
    ) -> None:
        """Load an adapter beside the others; ModelError if it does not fit the base, or is not on linears alone."""
        kind = folder.adapter_config.get("peft_type")
        if kind in PEFT_TYPES:  # it would stay in the model when another one is asked
            raise ModelError(f"{folder} is of {kind}, which cannot be served beside others", "Merge it, or use chat.")
        load_adapter(self.decoder, folder, any_base, allow_partial)
        self.decoder.eval()
        served = self.all[name] = Served(name, tokenizer, dict(adapters(self.decoder)))
        self._bases |= {path: wrapper.get_submodule("base") for path, wrapper in served.linears.items()}
        self._mixed = {path: Mixed(base, path, self._rows) for path, base in self._bases.items()}
        self._install(self.base.linears)

    def choose(self, requests: list[Asked]) -> None:
        """Let the next pass of the decoder be that of these requests."""
        models = {r.model for r in requests}
        if len(models) > 1:
            self._rows.of([(r.model, 1 if r.ids else len(r.prompt)) for r in requests], self.decoder.head.device)
        linears = self._mixed if len(models) > 1 else models.pop().linears
        if linears is not self._installed:
            self._install(linears)

    def _install(self, linears: dict[str, nn.Module]) -> None:
        self._installed = linears
        for path, base in self._bases.items():
            replace_module(self.decoder, path, linears.get(path, base))


class Rows:
    """Which rows of the stream belong to which model: pairs of a model and an index [rows], shared by all Mixed linears."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Served, Tensor]] = []

    def of(self, runs: list[tuple[Served, int]], device: torch.device) -> None:
        """Take the models of the stream's parts and their lengths."""
        rows: dict[Served, list[int]] = {}
        start = 0
        for model, length in runs:
            rows.setdefault(model, []).extend(range(start, start + length))
            start += length
        self._pairs = [(model, torch.tensor(index, device=device)) for model, index in rows.items()]

    def __iter__(self) -> Iterator[tuple[Served, Tensor]]:
        return iter(self._pairs)


class Mixed(nn.Module):
    """A linear whose rows belong to several models: x [T, K] -> [T, N], each row by its own model's linear at this path."""

    def __init__(self, base: nn.Module, path: str, rows: Rows):
        super().__init__()
        self.base, self.path, self.rows = base, path, rows

    def forward(self, x: Tensor) -> Tensor:
        parts = [(index, model.linears.get(self.path, self.base)(x[index])) for model, index in self.rows]
        y = x.new_empty(x.shape[0], parts[0][1].shape[1])
        for index, part in parts:
            y[index] = part
        return y
