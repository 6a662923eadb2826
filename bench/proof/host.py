"""What a training step costs the CPU that launches it: kernels launched, and CPU time beside the same step in PEFT style.

    python -m bench.proof.host [--rounds 15] [--models ...] > bench/proof/host.json

No GPU is needed. Launches are counted at the sizes of real models, on tensors without data. CPU time is measured with the layers of
a real model at toy widths, where a product takes torch no longer than a call of cuBLAS: Triton launches for an H100 on a driver that does nothing
(bench/proof/no_op_driver.py), attention returns memory as it comes, all else runs as it is. The sides run in turn, and each figure is a
ratio within a round; a GPU's own launches would come on top, and PEFT's are four to seven times as many.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import formulations as others
from bench.proof.launches import as_if_on, recorded
from bench.proof.no_op_driver import NoOpDriver
from bench.shapes import MODELS, TOY, Shape
from bench.step import formulated_by_others, random_model
from minilora import train
from minilora.config import TrainConfig
from minilora.kernels import attention, lora_gemm
from minilora.models import decoder
from minilora.models.decoder import Decoder
from minilora.models.stream import Batch, Documents

ARCHITECTURE = 90
COUNTED = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
TOKENS = (2048, 8192)
RANK, TOY_TOKENS, WARM = 16, 8, 2


def batch_of(shape: Shape, tokens: int, device: str) -> Batch:
    """One document, the second half of it trained."""
    ids = torch.zeros(tokens, dtype=torch.long, device=device)
    index = torch.arange(tokens // 2, tokens - 1, device=device)
    return Batch(ids, Documents.of([tokens]).to(torch.device(device)), index, ids[index], [])


def launches(shape: Shape, tokens: int, checkpointing: bool) -> dict[str, int]:
    """Kernels launched by one layer, forward and backward, and by a whole step."""
    counts = []
    for layers in (1, 2):
        model = random_model(shape._replace(layers=layers), torch.bfloat16, torch.device("meta"), RANK)
        model.checkpointing = model.keep_attention = checkpointing
        batch = batch_of(shape, tokens, "meta")
        with recorded(ARCHITECTURE) as made:
            loss = model.loss(batch)
            there = len(made)
            loss.backward()
        counts.append((there, len(made) - there))
    (first, first_back), (second, second_back) = counts
    forward, backward = second - first, second_back - first_back
    step = first + first_back + (shape.layers - 1) * (forward + backward)
    return {"forward": forward, "backward": backward, "layer": forward + backward, "step": step}


def counted(names: list[str]) -> dict[str, dict[str, int]]:
    """The launches of models at several lengths of a stream, with and without checkpointing."""
    return {
        f"{name} T={tokens}{', checkpointing' * checkpointing}": launches(MODELS[name], tokens, checkpointing)
        for name in names for tokens in TOKENS for checkpointing in (False, True)
    }  # fmt: skip


@contextmanager
def on_no_gpu() -> Iterator[None]:
    """The CPU's tensors take the GPU's path: Triton's kernels, and attention in one call for the stream, which does nothing."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    flash = SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    with ExitStack() as stack:
        stack.enter_context(as_if_on(ARCHITECTURE))
        stack.enter_context(patch.object(attention, "aten", flash))
        stack.enter_context(patch.object(attention, "_cpu_forward", attention._cuda_forward))
        stack.enter_context(patch.object(attention, "_cpu_backward", attention._cuda_backward))
        stack.enter_context(
            patch.object(lora_gemm, "REPEATS", 0)
        )  # no real width takes the single pass that a toy's would
        stack.enter_context(patch.object(train, "skip_unless_finite", lambda *_: None))  # nothing was computed
        yield


class Side:
    """A layer and a step of one formulation; its context is entered before the clock starts."""

    def __init__(self, model: Decoder, batch: Batch, checkpointing: bool):
        self.model, self.batch, self.checkpointing = model, batch, checkpointing
        self.config = TrainConfig()
        self.optimizer = train.optimizer_of(model, self.config)
        self.x = torch.randn(TOY_TOKENS, TOY.width, dtype=torch.bfloat16, requires_grad=True)
        self.dy = torch.randn_like(self.x)
        self.inputs = [self.x, *(p for p in model.blocks[0].parameters() if p.requires_grad)]
        self.place = model.context(batch.documents, torch.bfloat16)

    @contextmanager
    def context(self) -> Iterator[None]:
        self.model.checkpointing = self.model.keep_attention = self.checkpointing
        yield

    def layer(self) -> None:
        """Forward and backward of one block."""
        block = self.model.blocks[0]
        y = decoder.recomputed(block, self.x, self.place, True) if self.checkpointing else block(self.x, self.place)
        y.backward(self.dy)
        for t in self.inputs:
            t.grad = None

    def step(self) -> None:
        """Forward, backward, clipping and AdamW of the whole model."""
        train.train_step(self.model, self.optimizer, [self.batch], self.config, 0)


class PeftStyle(Side):
    """The same layers as transformers and peft write them, and the step that a plain loop would make of them."""

    @contextmanager
    def context(self) -> Iterator[None]:
        with super().context(), formulated_by_others():
            yield

    def step(self) -> None:
        hidden = self.model(self.batch.ids, self.batch.documents, self.batch.target_index)
        loss = others.hf_linear_cross_entropy(hidden, self.model.head, self.batch.targets) / len(self.batch.targets)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def seconds(call: Callable[[], None], times: int) -> float:
    """CPU time of this thread for one call, the least of `times`: what else the machine does only adds to it."""
    spent = []
    for _ in range(times):
        start = time.thread_time()
        call()
        spent.append(time.thread_time() - start)
    return min(spent)


def python_calls(call: Callable[[], None]) -> int:
    """Functions of Python and C that Python calls in it: no time, but the same number every time."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


def measured(layers: int, checkpointing: bool, rounds: int) -> dict[str, Any]:
    """Microseconds of a layer and of a step of both sides, ours as a multiple of PEFT's (medians of the rounds), and calls."""
    model = random_model(TOY._replace(layers=layers), torch.bfloat16, torch.device("cpu"), RANK)
    batch = batch_of(TOY, TOY_TOKENS, "cpu")
    sides = {"minilora": Side(model, batch, checkpointing), "peft": PeftStyle(model, batch, checkpointing)}
    found: dict[str, list[float]] = {f"{part} {name}": [] for part in ("layer", "step") for name in sides}
    for r in range(WARM + rounds):
        for name in sorted(sides, reverse=bool(r % 2)):
            side = sides[name]
            with side.context():
                for part, call, times in (("layer", side.layer, 20), ("step", side.step, 3)):
                    spent = seconds(call, times)
                    if r >= WARM:
                        found[f"{part} {name}"].append(spent)
            gc.collect()
    result: dict[str, Any] = {name: round(1e6 * statistics.median(spent)) for name, spent in found.items()}
    for part in ("layer", "step"):
        ratios = [a / b for a, b in zip(found[f"{part} minilora"], found[f"{part} peft"], strict=True)]
        result[f"{part} ratio"] = round(statistics.median(ratios), 3)
    for name, side in sides.items():
        with side.context():
            result[f"layer {name} calls"] = python_calls(side.layer)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proof.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=COUNTED, help="launches of these are counted")
    parser.add_argument("--layers", type=int, default=MODELS["qwen2.5-0.5b"].layers, help="of the model that is timed")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    table: dict[str, Any] = {"launches": counted(args.models)}
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # takes 15 us for a product of any size
    try:
        with tempfile.TemporaryDirectory() as folder:
            driver = NoOpDriver(Path(folder), ARCHITECTURE)
            with on_no_gpu():
                for name, checkpointing in (("time", False), ("time, checkpointing", True)):
                    table[name] = measured(args.layers, checkpointing, args.rounds)
            assert driver.launches, "Triton launched nothing"
    except OSError as error:
        print(f"CPU time is not measured: {error}", file=sys.stderr)
    lines = []
    for name, rows in table.items():
        body = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        lines.append(f"  {json.dumps(name)}: {{\n{body}\n  }}")
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
