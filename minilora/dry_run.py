"""The memory of a training step by a dry run: the engine's own forward and backward on tensors that have no bytes.

torch's fake tensors have a shape, a dtype and a storage of known size that is never allocated. Every storage that an operation
makes is counted when it appears and when its last tensor goes, so the peak is the one that the step itself has, with
whatever its kernels save and recompute: there are no formulas of our own that could fall behind the code.

Counted are tensors. What the allocator loses between them, and what CUDA and Python take for themselves, comes on top. The
operations are those of the CPU path.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.models.decoder import Decoder

from .data import Batch
from .evaluate import batch_loss
from .snapshot import trained_parameters

aten = torch.ops.aten


@dataclass(frozen=True)
class StepMemory:
    """Bytes by part. Their sum is the peak of the step.

    activations: what the forward pass keeps for the backward pass; temporaries: what comes and goes beside it, at the peak.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.temporaries


class _Live(TorchDispatchMode):
    """Counts the bytes of storages made while it is on; those in `known` are not its business."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(args[0] if args else None, FakeTensor):
            # questions about values, which are not there: is a target masked, which ones are wrong. No, and none
            if func is aten._local_scalar_dense.default:
                return False
            if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
                return args[0].new_empty(0)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def step_memory(model: Decoder, batch: Batch) -> StepMemory:
    """The memory of one micro-batch and the optimizer's step. The model lies on the meta device, as prepared for training.

    Its parameters are fake afterwards. The optimizer is AdamW: two numbers in fp32 for each trained one.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _fake_parameters(model)
        parts = {name: mode.from_tensor(getattr(batch, name)) for name in ("ids", "positions", "rows", "targets")}
        live = _Live([*model.parameters(), *parts.values()])
        with live:
            loss = batch_loss(model, replace(batch, **parts))
            activations = live.now
            loss.backward()
    trained = sum(p.nbytes for p in trained_parameters(model).values())
    base = sum(p.nbytes for p in model.parameters()) - trained
    full = base == 0
    # the gradients of a stream may all be there at its peak, or none: they are counted once, as the part that stays
    return StepMemory(
        weights=trained if full else base,
        adapters=0 if full else trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=activations,
        temporaries=max(0, live.peak - activations - trained),
    )


def _fake_parameters(model: nn.Module) -> None:
    """Replace every parameter by one without bytes on the CPU, under the fake mode that is on; views of one storage stay so."""
    storages: dict[int, Tensor] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                whole, count = p.untyped_storage(), p.untyped_storage().nbytes() // p.element_size()
                flat = storages.setdefault(whole._cdata, torch.empty(count, dtype=p.dtype, device="cpu"))
                fake = flat.as_strided(p.shape, p.stride(), p.storage_offset())
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
