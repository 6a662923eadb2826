"""CUDA graphs without a GPU: padding changes no bit, what is recorded touches no host, and a replay sees what is new."""

import json
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
from oracle import OWN, WIDE, config_json, conversations, randomise, tiny
from torch import Tensor

from bench.proof.fake_cuda import fake_cuda
from minilora import add_lora
from minilora.checkpoint.load import read_config
from minilora.checkpoint.quantized import FORMS
from minilora.data import IGNORE, Batch, Example, make_batch
from minilora.files.model_folder import ModelFolder
from minilora.kernels.dispatch import kernels_enabled
from minilora.kernels.lang import INTERPRETED
from minilora.lora import linears
from minilora.models import layers
from minilora.models.decoder import Decoder
from minilora.models.quantized import quantize_linears
from minilora.models.stream import Context
from minilora.run import fit, graphs
from minilora.run.fit import Streams, stream_tokens
from minilora.run.graphs import Choice, Graphs, Size, choose, pad
from minilora.run.schedule import set_learning_rate
from minilora.run.setup import optimizer_of
from minilora.settings import resolve
from minilora.train import micro_batch, train_step

# padding would count among the tokens of experts; the chunks of a hybrid follow from its documents
families = pytest.mark.parametrize(
    "family", [family for family in OWN if "moe" not in family and family not in ("qwen3_5", "qwen3_next")]
)


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


def steps(family: str, through: bool, settings: dict[str, Any]) -> list[Any]:
    """What six steps of changing streams read and leave behind, by graphs or without."""
    model, config = adapted(family, settings.get("lora_dropout", 0.0)), resolve({"lr": 0.01, **settings})
    model.checkpointing = config.checkpointing
    optimizer = optimizer_of(model, config)
    call = Graphs(model) if through else operator.call
    examples, found = conversations(family), []
    for step in range(6):
        turned = examples[step % 4 :] + examples[: step % 4]  # other documents in a stream of the same size
        streams = [make_batch(part) for part in (turned, turned[:2], turned[::-1])]
        set_learning_rate(optimizer, 0.01 / (step + 1))
        found.append(train_step(model, optimizer, streams, config, step, call=call).read())
    return [*found, *(p.detach() for p in model.parameters())]


@families
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2, "checkpointing": True}], ids=["plain", "dropout"])
def test_steps_by_graphs_are_the_steps(family: str, settings: dict[str, Any], recorder: Recorder):
    without, through = (steps(family, on, settings) for on in (False, True))
    for a, b in zip(without, through, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert recorder.recorded.count("update") == 1 and recorder.replayed >= 12


def test_sizes():
    def size(*lengths: int) -> Size:
        return Size.of(make_batch([Example(np.arange(n), np.arange(n), "") for n in lengths]))

    assert size(3, 5) == Size(128, 128, 4)
    assert size(128) == Size(128, 128, 2) and size(129) == Size(256, 256, 2)
    assert [size(*[1] * n).documents for n in (7, 8, 15, 16)] == [8, 16, 16, 32]
    assert [size(n).tokens for n in (1900, 2048, 2049, 4000, 8000)] == [1920, 2048, 2304, 4096, 8192]
    for n in range(1024, 20_000, 77):
        assert 0 <= size(n).tokens - n <= n / 8
    ignored = make_batch([Example(np.arange(9), np.full(9, IGNORE), "")])
    assert Size.of(ignored).rows == 128


def test_a_size_too_many_runs_without_a_graph(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    without, through = (steps("qwen2", on, {}) for on in (False, True))
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(without, through, strict=True))
    assert recorder.recorded == ["micro_batch"]


# on a GPU without data


def quantize(model: Decoder, quant: str) -> None:
    """Give the linears weights of so many bits, without data."""
    if quant in FORMS:
        empty = {f"{path}.weight": FORMS[quant].empty(w.weight.shape, "meta") for path, w in linears(model).items()}
        quantize_linears(model, empty)


def recorded_on_fake_cuda(family: str, kernels: bool, quant: str = "off", **settings: Any) -> list[str]:
    """Three steps of a family; RuntimeError if anything passes between the host and the GPU while a graph is recorded."""
    config, recorded = resolve(settings), []
    model = tiny(family, torch.bfloat16, **WIDE[family])
    quantize(model, quant)
    add_lora(model, r=4, dropout=config.lora_dropout)
    model.checkpointing = model.keep_attention = config.checkpointing
    with fake_cuda(90) as cuda, kernels_enabled(kernels):

        def record(function: Any, args: list[Any], pool: Any) -> tuple[Callable[[], None], Tensor]:
            recorded.append(function.__name__)
            with cuda.capturing():
                return lambda: None, function(*args)

        with patch.object(graphs, "record", record), patch.object(torch.cuda, "graph_pool_handle", lambda: None):
            model.to("cuda").train()
            optimizer, by_graphs = optimizer_of(model, config), Graphs(model)
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
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_recording_of_a_quantised_base_touches_no_host(quant: str):
    settings = {"lora_dropout": 0.1} if quant == "int8" else {}  # the tiny widths of nf4 take PyTorch's path
    assert recorded_on_fake_cuda("qwen2", True, quant, **settings) == ["micro_batch", "update"]


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


# where they are on


def choice(
    streams: Streams,
    family: str = "qwen2",
    dropout: float = 0.0,
    kernels: bool = True,
    offload: bool = False,
    graphs: str = "auto",
    quant: str = "off",
) -> Choice:
    model = tiny(family, torch.bfloat16, **WIDE[family])
    quantize(model, quant)
    add_lora(model, r=4, dropout=dropout)
    model.offload = offload
    name = patch.object(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    with fake_cuda(90), kernels_enabled(kernels), name:
        return choose(resolve({"lora_dropout": dropout, "graphs": graphs}), model.to("cuda").train(), streams)


@pytest.mark.skipif(INTERPRETED, reason="there is no GPU for it")
def test_graphs_are_on_where_launching_takes_longer_than_computing():
    few = choice(Streams(8192, True))
    assert few.on and "launches a stream of 8,192 tokens in about 2 ms, the GPU computes it in 0 ms" in few.why
    assert not choice(Streams(10**9, True)).on and choice(Streams(10**9, True), graphs="on").on
    assert choice(Streams(8192, True), graphs="off") == Choice(False, "as set")


@pytest.mark.skipif(INTERPRETED, reason="there is no GPU for it")
@pytest.mark.parametrize("case, why", [
    ({"streams": Streams(8192, False)}, "does not fit"), ({"dropout": 0.1, "kernels": False}, "masks of dropout"), ({"offload": True}, "--offload"),
    ({"family": "qwen3_moe"}, "tokens that experts saw"), ({"family": "qwen3"}, "a document at a time"), ({"family": "qwen3_5"}, "gated DeltaNet"),
    ({"dropout": 0.1, "quant": "nf4"}, "masks of dropout"),
])  # fmt: skip
def test_why_there_are_no_graphs(case: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(WIDE, "qwen3", WIDE["qwen3"] | {"head_dim": 12})  # no head for flash attention
    found = choice(**{"streams": Streams(8192, True), "graphs": "on", **case})
    assert not found.on and why in found.why


def test_without_a_gpu_there_are_none():
    assert choose(resolve({}), adapted("qwen2"), Streams(8192)) == Choice(False, "no GPU")


# how long streams are


@pytest.fixture
def on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Streams]:
    """stream_tokens of six layers of Qwen2.5-0.5B on a card with so many GB free."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 6, "num_attention_heads": 14, "num_key_value_heads": 2,
             "vocab_size": 151936}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config_json("qwen2", **sizes, dtype="bfloat16")))
    folder, dtype = ModelFolder(tmp_path), torch.bfloat16
    head = SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype)
    model: Any = SimpleNamespace(config=read_config(folder), head=head, compute=dtype, compute_dtype=dtype)

    def found(gb: float, longest: int = 2000, rows: int = 64, **settings: Any) -> Streams:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gb * 1e9), 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
        return stream_tokens(resolve(settings), folder, model, longest, rows)

    return found


def test_streams_are_as_long_as_the_memory_takes(on_a_card: Callable[..., Streams]):
    assert on_a_card(2)[:2] == (2000, False)  # the longest row, whatever fits
    assert 8192 <= on_a_card(6).tokens < fit.LARGEST and not on_a_card(6).fit_twice
    assert on_a_card(80)[:2] == (fit.LARGEST, True)
    assert on_a_card(80, longest=500, rows=8)[:2] == (4000, True)  # no step has more
    assert on_a_card(80, micro_tokens=3000)[:2] == (3000, True)
    assert on_a_card(6, checkpointing=True).tokens == fit.LARGEST
    assert on_a_card(6).room > on_a_card(6).tokens  # which leave some for the allocator
