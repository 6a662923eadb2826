"""CUDA graphs: the kernels of a stream, a thousand launches, as one launch.

A graph repeats what was launched while it was recorded, on the same memory. So a stream is padded to one of a few sizes, and
copied to where the graph of that size reads it:

    a last document of tokens without targets      empty documents after it      rows whose target is ignored

None of it reaches the loss or a gradient: it adds zeros. What is recorded is `train.micro_batch` and `train.update`, as they are.
The first call with a size runs without a graph and compiles what it needs, the second one is recorded. A size too many runs
without a graph too.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.attention import in_one_call, varlen_bounds
from minilora.kernels.dispatch import to_device
from minilora.kernels.dropout import shared_keys
from minilora.kernels.lora_linear import runs_on_triton
from minilora.models.decoder import Decoder
from minilora.models.gathered import GatheredWeight
from minilora.models.qwen3_5 import GatedDeltaNet

from ..config import TrainConfig
from ..data import IGNORE, Batch
from ..experts import expert_linears
from ..lora import adapters, trained_parameters
from ..machine.flops import flops_per_token, peak_flops
from .fit import Streams

TILE = 128  # rows that a product takes at once: less padding would save nothing
MOST = 32  # graphs
# seconds of a CPU for the launches of a layer, forward and backward, without and with checkpointing (bench/proof/host.json)
HOST = {False: 1.1e-3, True: 1.8e-3}
REACHED = 0.6  # of the FLOP/s of its data sheet that a GPU is taken to reach


class Choice(NamedTuple):
    """Whether a run has graphs, and why, for its header."""

    on: bool
    why: str


def choose(config: TrainConfig, model: Decoder, streams: Streams) -> Choice:
    """What the config asks for where graphs are possible; auto: where launching takes longer than computing, by an estimate."""
    obstacle = _obstacle(config, model, streams)
    if obstacle or config.graphs == "off":
        return Choice(False, obstacle or "as set")
    each, head = flops_per_token(model, config.method == "full")
    peak = peak_flops(model.head.device, model.compute_dtype)
    computing = streams.tokens * (each + head / 2) / (REACHED * peak)  # half of the tokens have a target
    launching = model.config.layers * HOST[model.checkpointing]
    why = f"the CPU launches a stream of {streams.tokens:,} tokens in about {1e3 * launching:,.0f} ms, the GPU computes it in {1e3 * computing:,.0f} ms"
    return Choice(config.graphs == "on" or launching > computing, why)


def _obstacle(config: TrainConfig, model: Decoder, streams: Streams) -> str | None:
    """Why the steps of a run cannot be recorded."""
    probe = torch.empty(1, 1, dtype=model.compute_dtype, device=model.head.device)
    if not probe.is_cuda:
        return "no GPU"
    if not in_one_call(probe.new_empty(1, 1, model.config.head_size)):
        return "attention is called a document at a time"
    if any(isinstance(m, GatedDeltaNet) for m in model.modules()):
        return "the chunks of gated DeltaNet follow from the documents"
    if model.offload:
        return "--offload on"
    if config.objective == "dpo":
        return "--objective dpo"
    if isinstance(model.head, GatheredWeight):
        return "--shard on gathers every layer from the other ranks"
    if config.method not in ("lora", "full"):
        return f"the steps of --method {config.method} are not recorded"
    if expert_linears(model):
        return "padding would count among the tokens that experts saw"
    stream = probe.expand(streams.tokens, 1)
    if config.lora_dropout and not all(
        (p := w.projection()) and runs_on_triton(stream, [p]) for _, w in adapters(model)
    ):
        return "PyTorch draws the masks of dropout from a seed of the host"
    return (
        None
        if streams.fit_twice
        else "the memory of a graph comes on top, which does not fit (a smaller --micro-tokens)"
    )


class Size(NamedTuple):
    """Tokens, rows with a target, and documents."""

    tokens: int
    rows: int
    documents: int

    @staticmethod
    def of(batch: Batch) -> "Size":
        """What a stream is padded to: at most an eighth more tokens and rows, and a power of two of documents."""
        tokens, rows = (_round_up(len(x)) for x in (batch.ids, batch.targets))
        return Size(tokens, rows, 1 << len(batch.documents.lengths).bit_length())


def _round_up(n: int) -> int:
    step = max(TILE, 1 << max(n.bit_length() - 4, 0))
    return max(1, -(-n // step)) * step


def pad(batch: Batch, size: Size) -> Batch:
    """The stream with padding; its loss and gradients are those of the stream."""
    documents, ignored = batch.documents, size.rows - len(batch.targets)
    empty = size.documents - len(documents.lengths)
    prefix_lens = None if documents.prefix_lens is None else documents.prefix_lens + [0] * empty
    extra = size.tokens - len(batch.ids)
    return Batch(
        ids=F.pad(batch.ids, (0, extra)),
        documents=replace(
            documents,
            cu_seqlens=documents.cu_seqlens + [size.tokens] * empty,
            positions=F.pad(documents.positions, (0, extra)),
            prefix_lens=prefix_lens,
        ),
        # spread out: on a GPU gradients of one token that many rows give wait for each other
        target_index=torch.cat((batch.target_index, torch.arange(ignored) % size.tokens)),
        targets=F.pad(batch.targets, (0, ignored), value=IGNORE),
        where=batch.where,
    )


def record(function: Callable[..., Any], args: list[Any], pool: Any) -> tuple[Callable[[], None], Tensor]:
    """What repeats the launches of a call, and the memory of its result; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    groups = [group for a in args if isinstance(a, torch.optim.Optimizer) for group in a.param_groups]
    for group in groups:
        group["capturable"] = (
            True  # torch asks for this word here, and warns of it elsewhere; a fused optimizer does the same
        )
    with torch.cuda.graph(graph, pool=pool):
        result = function(*args)
    for group in groups:
        group["capturable"] = False
    return graph.replay, result


class Graphs:
    """Calls the functions of a training step by graphs, from the second call with arguments of the same sizes on."""

    def __init__(self, model: Decoder):
        self.device = model.head.device
        self._trained = list(trained_parameters(model).values())
        self._gradients: list[Tensor] = []
        self._memory: dict[tuple[Any, ...], list[Any]] = {}  # by function and sizes: the arguments that a graph reads
        self._replays: dict[tuple[Any, ...], tuple[Callable[[], None], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        shared_keys(wrapper for _, wrapper in adapters(model)).in_place = True

    def __call__(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """function(*args), whose tensors and Batch may be on the CPU."""
        self._hold_gradients()
        key = function, *(Size.of(a) if isinstance(a, Batch) else getattr(a, "shape", ()) for a in args)
        if key not in self._memory and len(self._memory) == MOST:
            return function(*args)
        given = [pad(a, Size.of(a)) if isinstance(a, Batch) else a for a in args]
        if key not in self._memory:
            self._memory[key] = [self._placed(a) for a in given]
            return function(*self._memory[key])
        memory = self._memory[key]
        for to, a in zip(memory, given, strict=True):
            for place, value in zip(_tensors(to), _tensors(a), strict=True):
                place.copy_(to_device(value, self.device))
        if key not in self._replays:
            self._replays[key] = record(function, memory, self._pool)
        replay, result = self._replays[key]
        replay()
        return result.clone()  # the next replay writes there again

    def _hold_gradients(self) -> None:
        """Keep gradients in the memory where graphs add to them; at the first call of a step they are zero."""
        if self._trained[0].grad is None:
            self._gradients = self._gradients or [torch.empty_like(p) for p in self._trained]
            torch._foreach_zero_(self._gradients)
            for p, gradient in zip(self._trained, self._gradients, strict=True):
                p.grad = gradient

    def _placed(self, arg: Any) -> Any:
        """The argument in memory of its own. Of a stream, the host knows its size alone: what is recorded holds for all of that size."""
        if not isinstance(arg, Batch):
            return arg.to(self.device, copy=True) if isinstance(arg, Tensor) else arg
        ids, positions, bounds, index, targets = (t.to(self.device, copy=True) for t in _tensors(arg))
        count, tokens = len(arg.documents.lengths), len(ids)
        whole = replace(
            arg.documents, cu_seqlens=[0] + [tokens] * count, positions=positions, bounds=bounds,
            prefix_lens=None if arg.documents.prefix_lens is None else [0] * count,
        )  # fmt: skip
        return Batch(ids, whole, index, targets, [])


def _tensors(arg: Any) -> list[Tensor]:
    """The memory of an argument, in the order of its parts."""
    if isinstance(arg, Batch):
        documents = arg.documents
        bounds = documents.bounds
        if bounds is None:
            bounds = varlen_bounds(documents.cu_seqlens, documents.prefix_lens)
        return [arg.ids, documents.positions, bounds, arg.target_index, arg.targets]
    return [arg] if isinstance(arg, Tensor) else []
