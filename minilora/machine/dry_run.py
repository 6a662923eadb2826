"""The memory of a training step by a dry run: the engine's own forward and backward on tensors that have no bytes.

Tensors on the meta device have a shape, a dtype and a storage of known size that is never allocated. Every storage that an operation
makes is counted when it appears and when its last tensor goes, so the peak is the one that the step itself has, with
whatever its kernels save and recompute: there are no formulas of our own that could fall behind the code.

The layers of a model are alike, but for dense ones before mixtures of experts, so that a deep one is run with its first
three of the kind of its last, and the rest is counted as the third, unless layers keep so little that it is not they that
make the peak. Where kinds of layers take turns, it is the first two turns, and the second one stands for the rest. The experts
of a layer get the same number of tokens each.

Counted are tensors. What the allocator loses between them, and what CUDA and Python take for themselves, comes on top. The
operations are those of the CPU path; of experts on a card, those of its kernels, which compute all experts at once.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.kernels.cross_entropy import BLOCK_ROWS
from minilora.kernels.dispatch import dry_run_for
from minilora.kernels.linear_cross_entropy import CHUNK_ROWS_CUDA
from minilora.models.config import Config
from minilora.models.decoder import Decoder
from minilora.models.quantized import quantized_weights
from minilora.models.qwen3_5 import HybridConfig
from minilora.models.stream import Batch

from ..lora import base_parameters, trained_parameters
from .gemm import matrices

aten = torch.ops.aten
ALIKE = 3  # layers that are run
ARCHITECTURE = 90  # whose tiles stand for those of any card


@dataclass(frozen=True)
class StepMemory:
    """Bytes by part. Their sum is the peak of the step.

    activations: what the forward pass keeps for the backward pass; temporaries: what comes and goes beside it, at the peak.
    host: what it keeps in the host's memory (--offload), which is no part of the sum. buffers: where a base that ranks share is gathered.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    host: int
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values()) - self.host

    def most_tokens(self, tokens: int, there: float, copies: int = 1) -> int:
        """About how many tokens a stream can have in `there` bytes, with what it allocates in so many copies; this one has `tokens`."""
        made = self.activations + self.temporaries
        return max(0, int(tokens * (there - (self.total - made)) / (copies * made)))


class _Live(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, on the device of `known`; those in `known` are not its business.

    host: bytes of those on another device.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = self.host = 0
        self._device = known[0].device
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
            self._sizes[key] = size = storage.nbytes()
            here = storage.device == self._device
            self._add(size, here)
            weakref.finalize(storage, self._forget, key, here)

    def _forget(self, key: int, here: bool) -> None:
        self._add(-self._sizes.pop(key), here)

    def _add(self, size: int, here: bool) -> None:
        if here:
            self.now += size
            self.peak = max(self.peak, self.now)
        else:
            self.host += size


def step_memory(model: Decoder, batch: Batch) -> StepMemory:
    """The memory of one micro-batch and the optimizer's step. The model lies on the meta device, as prepared for training.

    The optimizer is AdamW: two numbers in fp32 for each trained one.
    """
    trained = sum(p.nbytes for p in trained_parameters(model).values())
    base = sum(w.nbytes for w in base_parameters(model).values() if not w.requires_grad)
    base += sum(matrix.extra_bytes for matrix in matrices(model))
    blocks, count, turn = list(model.blocks), len(model.blocks), _turn(model.config)
    others = next(i for i, block in enumerate(blocks) if _kind(block) == _kind(blocks[-1]))
    run = others + (ALIKE if turn == 1 else 2 * turn)
    del model.blocks[run:]
    activations, host, peak, layer = _kept_and_peak(model, batch, turn)
    model.blocks.extend(blocks[run:])
    if layer < trained / count or model.offload:
        # going down the stack, gradients take more than activations free: the peak is where all layers have been. What
        # the host holds is of all layers, too
        activations, host, peak, _ = _kept_and_peak(model, batch, turn)
    else:
        rest = int(max(0, count - run) * layer)
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
        host=host,
    )


def _kind(block: nn.Module) -> object:
    return type(getattr(block, "mlp", None))


def card_memory(model: Decoder, batch: Batch) -> StepMemory:
    """The memory of a step on a GPU, whose loss has the logits of more rows at a time than that of a dry run."""
    few = slice(BLOCK_ROWS)  # what the loss of more rows takes is known, and running it takes seconds
    with dry_run_for(ARCHITECTURE):
        memory = step_memory(model, replace(batch, target_index=batch.target_index[few], targets=batch.targets[few]))
    size, c = model.compute_dtype.itemsize, model.config
    logits = min(CHUNK_ROWS_CUDA, len(batch.targets)) * c.vocab * size
    hidden = 2 * len(batch.targets[BLOCK_ROWS:]) * c.width * size  # of the others, and their gradient
    return replace(memory, activations=memory.activations + hidden, temporaries=max(memory.temporaries, logits))


def _turn(c: Config) -> int:
    """After how many layers the kinds of layers come again; all of them, if they do not."""
    kinds = c.linear if isinstance(c, HybridConfig) else (False,)
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])


def _kept_and_peak(model: Decoder, batch: Batch, turn: int) -> tuple[int, int, int, float]:
    """Bytes that the forward pass keeps, also those in the host's memory, the most at any time, and what a layer of the last
    turn keeps."""
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
        activations, host = live.now, live.host
        loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    layers = len(model.blocks)
    layer = (marks[-1] - marks[-1 - turn]) / turn if layers > turn else activations / layers
    return activations, host, live.peak, layer
