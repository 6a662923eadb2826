"""Inputs of checkpointed layers that wait in the host's memory: the same bits, one layer ahead, nothing let go too early."""

import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import OWN, conversations, randomise, tiny
from torch import Tensor

import minilora
from minilora import add_lora
from minilora.__main__ import main
from minilora.data import make_batch
from minilora.models import offload
from minilora.models.decoder import Decoder
from minilora.models.offload import Offload

CPU = torch.device("cpu")
DEMO = str(Path(minilora.__file__).parent / "demo" / "mini")


def adapted(family: str, targets: Any = "all-linear") -> Decoder:
    model = tiny(family)
    add_lora(model, targets, r=3, alpha=6, dropout=0.3)
    randomise(model)
    model.checkpointing = True
    return model.train()


def loss_and_gradients(model: Decoder) -> list[Tensor]:
    loss = model.loss(make_batch(conversations(model.config.family)))
    loss.backward()
    found = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 1 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Late:
    """Copies that are made as late as a stream may: when they are waited for. Until then the target holds nonsense."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def copy(self, to: Tensor, source: Tensor) -> list[Any]:
        to.fill_(float("nan"))
        self.log.append("copy")
        return [to, weakref.ref(source)]

    def wait(self, event: list[Any]) -> None:
        self.log.append("wait")
        if event:
            to, source = event
            assert source() is not None, "the source was let go before it was copied"
            to.copy_(source())
            event.clear()


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("keep_attention", [False, True])
def test_no_bit_changes(monkeypatch: pytest.MonkeyPatch, family: str, keep_attention: bool):
    """Also where copies take as long as they may."""
    model = adapted(family)
    model.keep_attention = keep_attention
    kept = loss_and_gradients(model)
    model.offload = True
    assert same_bits(loss_and_gradients(model), kept)
    monkeypatch.setattr(offload, "AtOnce", Late)
    assert same_bits(loss_and_gradients(model), kept)


def test_blocks_that_need_no_gradient():
    """Adapters on the last block alone: the first is not run again, and keeps nothing."""
    model = adapted("qwen2", [f"model.layers.{tiny('qwen2').config.layers - 1}.mlp.down_proj"])
    kept = loss_and_gradients(model)
    model.offload = True
    assert same_bits(loss_and_gradients(model), kept)


def test_an_input_comes_back_one_layer_ahead(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(offload, "AtOnce", Late)
    store = Offload(CPU)
    inputs = [torch.full((2, 3), float(i)) for i in range(4)]
    assert [store.keep(x) for x in inputs] == [0, 1, 2, 3]
    assert isinstance(store.side, Late) and store.side.log == ["copy", *["wait", "copy"] * 3]
    alive = [weakref.ref(x) for x in inputs]
    store.side.log.clear()
    for number in (3, 2, 1, 0):
        assert torch.equal(store.fetch(number), inputs[number])
        # the one for the next layer set out
        assert store.side.log == ["wait", "copy"] if number else ["wait"]
        store.side.log.clear()
    del inputs
    assert all(x() is None for x in alive) and store.moving is None


def test_a_graph_that_is_kept_runs_backward_twice():
    model = adapted("qwen2")
    model.offload = True
    loss = model.loss(make_batch(conversations("qwen2")))
    found = []
    for again in (True, False):
        loss.backward(retain_graph=again)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert same_bits(*found)


def test_the_streams_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """A copy comes after what was launched, on the other stream; and what follows, after the copy."""
    log: list[Any] = []

    class Stream:
        def __init__(self, name: Any):
            self.name, self.device = name, torch.device("cuda", 0)

        def wait_stream(self, other: "Stream") -> None:
            log.append((self.name, "after", other.name))

        def wait_event(self, event: Any) -> None:
            log.append((self.name, "after", event))

        def record_event(self) -> str:
            log.append((self.name, "event"))
            return "the copy"

    @contextmanager
    def on(stream: Stream):
        log.append(("on", stream.name))
        yield
        log.append("off")

    compute = Stream("compute")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    offload._stream.cache_clear()
    side = offload.SideStream(torch.device("cuda", 0))
    target = SimpleNamespace(copy_=lambda source, non_blocking: log.append(("copy", non_blocking)))
    side.wait(side.copy(target, torch.zeros(1)))  # pyright: ignore[reportArgumentType]
    offload._stream.cache_clear()
    assert log == [
        ("side", "after", "compute"), ("on", "side"), ("copy", True), "off", ("side", "event"), ("compute", "after", "the copy"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--offload", "on"], "Add --checkpointing"),
        (["--offload", "on", "--checkpointing"], "this run is on a CPU"),
        (["--offload", "maybe"], "offload"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--output", "x"], ["plan"]], ids=lambda c: c[0])
def test_where_there_is_nothing_to_gain_it_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, command: list[str],
    flags: list[str], told: str,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert main([*command, "--model", DEMO, "--data", "rows.jsonl", *flags, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert told in out + err and not (tmp_path / "x").exists()
