"""CUDA graphs without a GPU: padding changes no bit, what is recorded touches no host, and a replay sees what is new."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("triton")

import torch
from oracle import OWN, WIDE, conversations, randomise, tiny
from torch import Tensor

from bench.proof.fake_cuda import fake_cuda
from minilora import add_lora
from minilora.data import Batch, Example, make_batch
from minilora.kernels.dispatch import kernels_enabled
from minilora.kernels.lang import INTERPRETED
from minilora.models import layers
from minilora.models.decoder import Decoder
from minilora.models.stream import Context
from minilora.run import graphs
from minilora.run.graphs import Graphs, Size, pad, size_for
from minilora.run.schedule import set_learning_rate
from minilora.run.setup import optimizer_of
from minilora.settings import resolve
from minilora.train import micro_batch, train_step

families = pytest.mark.parametrize("family", OWN)


def adapted(family: str, dropout: float = 0.0) -> Decoder:
    model = tiny(family)
    add_lora(model, r=3, dropout=dropout)
    randomise(model)
    return model.train()


def loss_and_gradients(model: Decoder, batch: Batch) -> list[Tensor]:
    loss = micro_batch(model, batch, torch.tensor(19.0))
    found = [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


@families
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_padded_stream_is_the_stream_to_the_bit(family: str, dropout: float):
    model, batch = adapted(family, dropout), make_batch(conversations(family))
    tokens, rows = len(batch.ids), len(batch.targets)
    plain = loss_and_gradients(model, batch)
    for size in (Size(tokens + 20, rows + 13, 8), Size(tokens, rows, 5)):
        padded = pad(batch, size)
        assert (len(padded.ids), len(padded.targets), len(padded.documents.lengths)) == size
        assert padded.documents.cu_seqlens[-1] == size.tokens
        assert all(map(torch.equal, loss_and_gradients(model, padded), plain))


class Recorder:
    """Repeats a call where a GPU would repeat its launches: what it reads and writes is the same memory."""

    def __init__(self) -> None:
        self.recorded, self.replayed = [], 0

    def __call__(
        self, function: Callable[..., Tensor], args: list[Any], pool: Any
    ) -> tuple[Callable[[], None], Tensor]:
        self.recorded.append(function.__name__)
        result = torch.full((3,), torch.nan) if function is not micro_batch else torch.tensor(torch.nan)

        def replay() -> None:
            self.replayed += 1
            found = function(*args)
            result.resize_(found.shape).copy_(found)

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Attention reads the bounds from the memory that a graph reads, as it does on a GPU."""
    recorder, attend = Recorder(), Context.attend

    def by_bounds(self: Context, *args: Any) -> Tensor:
        documents = self.documents
        if documents.bounds is not None:
            first, prefix_lens = documents.bounds[0].tolist(), None
            if documents.prefix_lens is not None:  # three pieces a document, of which the first is the prefix
                prefix_lens = [b - a for a, b in zip(first[:-1:3], first[1::3], strict=True)]
                first = first[::3]
            documents = replace(documents, cu_seqlens=first, prefix_lens=prefix_lens)
        return attend(replace(self, documents=documents), *args)

    monkeypatch.setattr(graphs, "record", recorder)
    monkeypatch.setattr(Context, "attend", by_bounds)
    return recorder


def steps(family: str, through: bool, settings: dict[str, Any], capacity: int = 80) -> list[Any]:
    """What six steps of changing streams read and leave behind, by graphs or without."""
    model, config = adapted(family, settings.get("lora_dropout", 0.0)), resolve({"lr": 0.01, **settings})
    model.checkpointing = config.checkpointing
    optimizer = optimizer_of(model, config)
    call = {"call": Graphs(model, capacity)} if through else {}
    examples, found = conversations(family), []
    for step in range(6):
        turned = examples[step % 4 :] + examples[: step % 4]  # other documents in a stream of the same size
        streams = [make_batch(part) for part in (turned, turned[:2], turned[::-1])]
        set_learning_rate(optimizer, 0.01 / (step + 1))
        found.append(train_step(model, optimizer, streams, config, step, **call).read())
    return [*found, *(p.detach() for p in model.parameters())]


@families
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2, "checkpointing": True}], ids=["plain", "dropout"])
def test_steps_by_graphs_are_the_steps(family: str, settings: dict[str, Any], recorder: Recorder):
    without, through = (steps(family, on, settings) for on in (False, True))
    for a, b in zip(without, through, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert recorder.recorded.count("update") == 1 and recorder.replayed >= 12


def test_what_does_not_fit_runs_without_a_graph(recorder: Recorder):
    without, through = (
        steps("qwen2", on, {}, capacity=16) for on in (False, True)
    )  # the streams have 18 tokens and more
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(without, through, strict=True))
    assert recorder.recorded == ["update"]


def test_sizes():
    def batch(*lengths: int) -> Batch:
        return make_batch([Example(torch.arange(n).numpy(), torch.arange(n).numpy(), "") for n in lengths])

    assert size_for(batch(3, 5), 80) == Size(10, 10, 4)
    assert size_for(batch(70, 10), 80) == Size(80, 80, 4)
    assert size_for(batch(1), 80) == Size(10, 10, 2)
    assert size_for(batch(*[1] * 7), 80) == Size(10, 10, 8)
    assert size_for(batch(*[1] * 8), 80) == Size(10, 10, 16)
    assert size_for(batch(81), 80) is None and size_for(batch(81), 81) == Size(88, 88, 2)


def test_graphs_are_of_few_sizes(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    without, through = (steps("qwen2", on, {}) for on in (False, True))
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(without, through, strict=True))
    assert recorder.recorded == ["micro_batch"]


# on a GPU without data


def recorded_on_fake_cuda(family: str, kernels: bool, **settings: Any) -> list[str]:
    """Three steps of a family; RuntimeError if anything passes between the host and the GPU while a graph is recorded."""
    config, recorded = resolve(settings), []
    model = tiny(family, torch.bfloat16, **WIDE[family])
    add_lora(model, r=4, dropout=config.lora_dropout)
    model.checkpointing = model.keep_attention = config.checkpointing
    with fake_cuda(90) as cuda, kernels_enabled(kernels):

        def record(function: Any, args: list[Any], pool: Any) -> tuple[Callable[[], None], Tensor]:
            recorded.append(function.__name__)
            with cuda.capturing():
                return lambda: None, function(*args)

        with patch.object(graphs, "record", record), patch.object(torch.cuda, "graph_pool_handle", lambda: None):
            model.to("cuda").train()
            optimizer, by_graphs = optimizer_of(model, config), Graphs(model, 80)
            for step in range(3):
                train_step(model, optimizer, [make_batch(conversations(family))], config, step, call=by_graphs).read()
    cuda.check_launches()
    return recorded


@pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
@families
@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
def test_a_recording_touches_no_host(family: str, kernels: bool):
    settings = {"lora_dropout": 0.1, "checkpointing": True} if kernels else {}
    assert recorded_on_fake_cuda(family, kernels, **settings) == ["micro_batch", "update"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
@pytest.mark.parametrize("fault", [
    lambda x: x * torch.tensor(2.0),  # kept as it was when the graph was recorded
    lambda x: x + torch.tensor([1.0], device=x.device).to(x.dtype),
    lambda x: x * x.sum().item(),
    lambda x: x * x.abs().amax().to("cpu"),
])  # fmt: skip
def test_a_recording_that_touches_the_host_is_found(fault: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch):
    forward, calls = layers.RMSNorm.forward, []

    def at_last(self: layers.RMSNorm, x: Tensor) -> Tensor:
        calls.append(x)
        return forward(self, x) if len(calls) <= 5 else fault(forward(self, x))  # not in the first step

    monkeypatch.setattr(layers.RMSNorm, "forward", at_last)
    with pytest.raises(RuntimeError, match="graph is recorded|on cuda:0 and on the CPU|meta tensors"):
        recorded_on_fake_cuda("qwen2", True)
