"""Training steps with a whole base and with a sharded one, by so many ranks. Writes what each rank found.

python tests/ranks/shard_steps.py RANKS MODEL OUT [CASE ...]
"""

import hashlib
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks.forked import forked
from ranks.steps import examples
from ranks.traffic import bytes_sent
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.checkpoint.load import fingerprint, load_model
from minilora.checkpoint.loftq import loftq_init
from minilora.config import TrainConfig
from minilora.data import Example, pack
from minilora.evaluate import evaluate
from minilora.files.model_folder import ModelFolder
from minilora.lora import base_parameters, trained_parameters
from minilora.models.decoder import Decoder
from minilora.models.quantized import quantized_weights
from minilora.objective import objective_of
from minilora.ranks.ranks import Ranks, join
from minilora.run.load_sharded import load_sharded, starts
from minilora.run.setup import optimizer_of, prepare
from minilora.run.snapshot import load_snapshot, save_snapshot
from minilora.train import train_step

CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "gathered ahead": {},
    "checkpointing, gathered ahead": {"checkpointing": True},
    "dropout": {"lora_dropout": 0.3},
    "one stream, nf4": {"micro_tokens": 10**6, "quant": "nf4"},  # ranks beyond the first have none
    "last block alone": {"lora_targets": r".*\.2\.mlp\.(gate|up)_proj"},  # no backward through the others
    "bf16": {"dtype": "bfloat16"},
    "int8, keep attention": {"quant": "int8", "checkpointing": True, "keep_attention": True},
    "dpo": {"objective": "dpo", "micro_tokens": 40},  # a second pass, without adapters and backward
    "nf4, loftq": {"quant": "nf4", "lora_init": "loftq"},
}


def pairs() -> list[Example]:
    """Preferences: of two examples the first is the chosen one."""
    found = examples()
    return [
        Example(np.concatenate([a.ids, b.ids]), np.concatenate([a.targets, b.targets]), "", None, len(a.ids))
        for a, b in zip(found[::2], found[1::2], strict=True)
    ]


class Made(TorchDispatchMode):
    """Counts the bytes of the storages that operations make on the CPU, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's compiler would be imported for it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.device == CPU:
                storage = t.untyped_storage()
                if storage._cdata not in self._alive and not any(_shares(a, storage) for a in args):
                    self._count(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self._count, storage._cdata, -storage.nbytes())
        return result

    def _count(self, key: int, size: int) -> None:
        self._alive ^= {key}
        self.now += size
        self.peak = max(self.peak, self.now)


def _shares(arg: Any, storage: torch.UntypedStorage) -> bool:
    return isinstance(arg, torch.Tensor) and arg.untyped_storage()._cdata == storage._cdata


def found(load: Callable[[], Decoder], config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    rows = pairs() if config.objective == "dpo" else examples()
    steps, micro_tokens = [], config.micro_tokens or 0
    with Made() as loading:
        model = load()
    resident, base, optimizer = loading.now, fingerprint(base_parameters(model)), optimizer_of(model, config)
    stepping = Made()
    for s in range(2):
        with stepping:
            steps.append(train_step(model, optimizer, pack(rows[s:], micro_tokens), config, s, ranks=ranks).read())
    score = evaluate(model, rows, micro_tokens, ranks, objective_of(config))
    errors = {name: (w.error, w.error_left) for name, w in quantized_weights(model).items()}
    same = {"steps": steps, "val": score, "bits": bits(model), "base": base, "errors": errors, "peak": stepping.peak}
    trained = sum(p.nbytes for p in trained_parameters(model).values())
    return {"same": same, "resident": resident - trained, "loading": loading.peak - resident}


def compared(folder: Path, ranks: Ranks, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a case gives with a whole base, and with a sharded one."""
    config = replace(TrainConfig(micro_tokens=24, lora_r=4, quant="off"), **settings)
    dtype, model = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32, ModelFolder(folder)
    form = model, dtype, CPU, "float32", config.quant

    def whole() -> Decoder:
        made = prepare(load_model(*form), config)
        if config.lora_init == "loftq":
            loftq_init(made, folder)
        return made

    def sharded() -> Decoder:
        made = prepare(load_sharded(*form, ranks, objective_of(config).passes, "ahead" in name), config)
        if config.lora_init == "loftq" and ranks.shards:
            loftq_init(made, folder, starts(ranks.shards))
        return made

    told: dict[str, Any] = {"whole": found(whole, config, ranks), "shard": found(sharded, config, ranks)}
    assert ranks.shards
    told["bytes"], told["received"] = ranks.shards.bytes._asdict(), received(ranks)
    told["passes"] = ranks.shards.passes
    ranks.shards = None
    return told


def received(ranks: Ranks) -> list[int]:
    """Bytes that a rank is sent in a pass of an evaluation and in one of a step; and that it sends in both, by the kernel's count."""
    assert ranks.shards
    broadcast, sizes, before = dist.broadcast, [], bytes_sent()

    def counted(tensor: torch.Tensor, source: int, **how: Any) -> Any:
        sizes[-1] += tensor.nbytes if source != ranks.rank else 0
        return broadcast(tensor, source, **how)

    dist.broadcast = counted
    for gradients in (False, True):
        sizes.append(0)
        with torch.set_grad_enabled(gradients):
            ranks.shards.serve()
    dist.broadcast = broadcast
    return [*sizes, bytes_sent() - before]


def resumed(folder: Path, ranks: Ranks, out: Path) -> list[str]:
    """The bits after two steps of a run with shards, and of its snapshot after one that goes on without; then the other way."""
    config, rows, found = TrainConfig(micro_tokens=24, lora_r=4, lora_dropout=0.2), examples(), []

    def step(model: Decoder, optimizer: torch.optim.Optimizer, number: int) -> None:
        train_step(model, optimizer, pack(rows[number:], 24), config, number, ranks=ranks).read()

    def load(shard: bool) -> tuple[Decoder, torch.optim.Optimizer]:
        ranks.shards, form = None, (ModelFolder(folder), torch.float32, CPU, "float32", "off")
        model = prepare(load_sharded(*form, ranks) if shard else load_model(*form), config)
        return model, optimizer_of(model, config)

    for shard in (True, False):
        model, optimizer = load(shard)
        step(model, optimizer, 0)
        snapshot = out / f"snapshot-{ranks.count}-{ranks.rank}-{shard}"
        save_snapshot(snapshot, model, optimizer, {}, folder, full=False)
        step(model, optimizer, 1)
        found.append(bits(model))
        model, optimizer = load(not shard)
        load_snapshot(snapshot, model, optimizer, full=False)
        step(model, optimizer, 1)
        found.append(bits(model))
    return found


def bits(model: Decoder) -> str:
    flat = torch.cat([p.detach().flatten() for p in trained_parameters(model).values()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def tell(folder: Path, out: Path, names: list[str]) -> None:
    me = join(60)
    told: dict[str, Any] = {name: compared(folder, me, name, CASES[name]) for name in names}
    if me.count == 2:
        told["resumed"] = resumed(folder, me, out)
    (out / f"{me.count}-{me.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    forked(int(sys.argv[1]), lambda: tell(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:] or list(CASES)))
