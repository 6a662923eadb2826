"""The memory of a training step by a dry run: the engine's own forward and backward on tensors that have no bytes.

Tensors on the meta device have a shape, a dtype and a storage of known size that is never allocated. Every storage that an operation
makes is counted when it appears and when its last tensor goes, so the peak is the one that the step itself has, with
whatever its kernels save and recompute: there are no formulas of our own that could fall behind the code.

The layers of a model are alike, so that a deep one is run with its first three and the rest is counted as the third.

Counted are tensors. What the allocator loses between them, and what CUDA and Python take for themselves, comes on top. The
operations are those of the CPU path.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.models.decoder import Decoder
from minilora.models.quantized import quantized_weights

from ..data import Batch
from ..lora import base_parameters, trained_parameters

aten = torch.ops.aten
ALIKE = 3  # layers that are run


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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's compiler would be imported to hear it: a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
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

    The optimizer is AdamW: two numbers in fp32 for each trained one.
    """
    trained = sum(p.nbytes for p in trained_parameters(model).values())
    base = sum(w.nbytes for w in base_parameters(model).values() if not w.requires_grad)
    blocks, count = list(model.blocks), len(model.blocks)
    del model.blocks[ALIKE:]
    activations, peak, layer = _kept_and_peak(model, batch)
    model.blocks.extend(blocks[ALIKE:])
    if layer < trained / count:
        # going down the stack, gradients take more than activations free: the peak is where all layers have been
        activations, peak, _ = _kept_and_peak(model, batch)
    else:
        rest = max(0, count - ALIKE) * layer
        activations, peak = activations + rest, peak + rest
    full = base == 0
    # the gradients of a stream may all be there at its peak, or none: they are counted once, as the part that stays
    return StepMemory(
        weights=trained if full else base,
        adapters=0 if full else trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=activations,
        temporaries=max(0, peak - activations - trained),
    )


def _kept_and_peak(model: Decoder, batch: Batch) -> tuple[int, int, int]:
    """Bytes that the forward pass keeps, the most at any time, and what the last layer keeps."""
    marks: list[int] = []
    batch = batch.to(torch.device("meta"))
    for weight in quantized_weights(model).values():
        weight.weight_as(torch.float32, slice(1))  # the tables of levels are made once, not in every step
    live = _Live(
        [*model.parameters(), *model.buffers(), batch.ids, batch.documents.positions, batch.target_index, batch.targets]
    )
    hooks = [block.register_forward_hook(lambda *_: marks.append(live.now)) for block in model.blocks]
    with live:
        loss = model.loss(batch)
        activations = live.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    layers = len(model.blocks)
    return activations, live.peak, marks[layers - 1] - marks[layers - 2] if layers > 1 else activations
