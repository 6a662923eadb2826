"""A base that ranks share, over gloo on a CPU: the bits of a run with a whole one, in 1/N of its memory and a block's."""

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import tiny_folder
from rank_runs import ROOT, interrupted, killing, metrics, run, steps, training
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.checkpoint.load import FIRST, empty_model, load_model, read_config
from minilora.config import TrainConfig
from minilora.errors import UsageError
from minilora.files.model_folder import ModelFolder
from minilora.files.safetensors import SafetensorsFile
from minilora.kernels.quantized import weight_as
from minilora.lora import base_parameters
from minilora.models.decoder import Decoder
from minilora.ranks.ranks import Ranks
from minilora.ranks.shard import ALIGN, Unit, Units, shard_bytes
from minilora.run.load_sharded import load_sharded
from minilora.run.setup import check_shard

pytestmark = pytest.mark.xdist_group(__name__)  # one worker starts the processes that all its tests look at

CPU = torch.device("cpu")
ALL = [
    "checkpointing, gathered ahead",
    "dropout",
    "last block alone",
    "bf16",
    "int8, keep attention",
    "dpo",
    "nf4, loftq",
]
SOME = ["gathered ahead", "one stream, nf4"]
OF = {2: ALL, 4: SOME}
four = pytest.param(4, marks=pytest.mark.long)
CASES = [(2, name) for name in ALL] + [pytest.param(4, name, marks=pytest.mark.long) for name in SOME]
Found = Callable[[int], list[dict]]  # number of ranks -> what each of them found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found, of a model whose blocks are larger than its embedding, in NF4 too."""

    @cache
    def of_ranks(count: int) -> list[dict]:
        folder = tmp_path_factory.mktemp("shard")
        sizes = {"num_hidden_layers": 3, "intermediate_size": 1024, "tie_word_embeddings": count == 2}
        model = make_model(folder / "model", **sizes)
        script = [str(ROOT / "tests/ranks/shard_steps.py"), str(count), str(model), str(folder), *OF[count]]
        done = run([sys.executable, *script])
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((folder / f"{count}-{rank}.json").read_text()) for rank in range(count)]

    return of_ranks


@pytest.mark.parametrize(("count", "case"), CASES)
def test_the_bits_are_those_of_a_whole_base(found: Found, count: int, case: str):
    """Losses, adapters, validation, fingerprint, errors of quantisation, and the memory of a step beside the base."""
    told = [one[case] for one in found(count)]
    for one in told:
        assert one["shard"]["same"] == one["whole"]["same"]
    assert len({one["shard"]["same"]["bits"] for one in told}) == 1


@pytest.mark.parametrize(("count", "case"), CASES)
def test_a_rank_has_its_part_and_one_block(found: Found, count: int, case: str):
    """Counted are the storages that loading makes and leaves. A second block where one is gathered ahead."""
    for one in found(count):
        whole, shard, size = one[case]["whole"], one[case]["shard"], one[case]["bytes"]
        blocks = 2 if "ahead" in case else 1
        rounding = 2 * ALIGN * 40  # of the starts of tensors and of parts; the model has 35 tensors
        known = 40 * FIRST * 4  # of each weight the first values
        assert size["kept"] + size["buffers"] <= shard["resident"] <= size["kept"] + size["buffers"] + known
        assert shard["resident"] <= whole["resident"] / count + blocks * size["block"] + rounding + known
        # while it is loaded, no more comes beside that than beside a whole base
        assert shard["loading"] <= whole["loading"]


@pytest.mark.parametrize("count", [2, four])
def test_what_travels_is_what_shard_bytes_says(found: Found, count: int):
    """To the byte in what is asked of gloo, and within 2 % in what all ranks put on the wire: its headers."""
    ranks = found(count)
    for case in OF[count]:
        forward, both = (ranks[0][case]["bytes"][name] for name in ("evaluation", "training"))
        passes = ranks[0][case]["passes"]  # whether each has a backward
        asked = [forward * len(passes), sum(both if p else forward for p in passes)]
        assert [one[case]["received"][:2] for one in ranks] == count * [asked]
        assert sum(one[case]["received"][2] for one in ranks) == pytest.approx(count * sum(asked), rel=0.02)


def test_a_snapshot_goes_on_with_shards_and_without(found: Found):
    assert len({bits for one in found(2) for bits in one["resumed"]}) == 1


# each rank by itself: reading needs no other


def sharded(folder: Path, rank: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Decoder, list[Unit]]:
    ranks = Ranks(rank, count)
    model = load_sharded(ModelFolder(folder), dtype, CPU, "float32", "off", ranks)
    assert ranks.shards
    return model, ranks.shards.units.each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_parts_of_all_ranks_are_the_whole_base(tmp_path: Path, family: str, dtype: torch.dtype):
    """Those of GPT-2 lie transposed in the files."""
    folder = tmp_path / "model"
    if family == "gpt2":
        tiny_folder(folder, "gpt2", tie_word_embeddings=False)
    else:
        make_model(folder, num_hidden_layers=3, tie_word_embeddings=False)
    parts = [sharded(folder, rank, 3, dtype) for rank in range(3)]
    _, units = parts[0]
    whole = base_parameters(load_model(folder, dtype, CPU, "float32"))
    for number, unit in enumerate(units):
        unit.whole.copy_(torch.cat([of_rank[number].own for _, of_rank in parts]))
        for name, weight in base_parameters(unit.module).items():
            assert torch.equal(weight_as(weight, dtype), weight_as(whole[f"{unit.path}.{name}"], dtype)), name


class Reads(TorchDispatchMode):
    """Counts the bytes that operations read of tensors of a file; a view of one reads nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.bytes, self._mapped, tensor = 0, set(), SafetensorsFile.tensor

        def noted(file: SafetensorsFile, name: str) -> torch.Tensor:
            found = tensor(file, name)
            self._mapped.add(found.untyped_storage().data_ptr())
            return found

        monkeypatch.setattr(SafetensorsFile, "tensor", noted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            mapped = [a for a in args if isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() in self._mapped]
            self.bytes += sum(a.nbytes for a in mapped)
        return result


def test_a_rank_reads_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_model(tmp_path / "model", torch.float16)
    size = sum(entry.end - entry.start for entry in SafetensorsFile(folder / "model.safetensors").entries.values())
    reads = []
    for rank in range(4):
        with Reads(monkeypatch) as counted:
            sharded(folder, rank, 4)
        reads.append(counted.bytes)
    firsts = 24 * FIRST * 2  # of each tensor the first values, by which a base is recognised
    assert max(reads) <= size / 4 + firsts + 3 * ALIGN * 2 and size < sum(reads) <= size + 4 * (firsts + 2 * 32 * 2)


def test_bytes_of_a_model_without_memory(tmp_path: Path):
    folder = make_model(tmp_path / "model", num_hidden_layers=4, tie_word_embeddings=False)
    size = shard_bytes(empty_model(read_config(folder)), 4)
    whole = sum(p.nbytes for p in load_model(folder, device="cpu").parameters())
    assert whole <= size.base < whole + 100 * ALIGN and size.kept < size.base / 4 + 10 * ALIGN
    alone = shard_bytes(empty_model(read_config(folder)), 1)
    assert alone.training == alone.evaluation == 0 and alone.kept == alone.base


def test_blocks_alternate_so_that_each_can_be_gathered_ahead(tmp_path: Path):
    """Only the first of an even number waits for the embedding, which is gone in no time."""
    for layers in (3, 4):
        ranks = Ranks(0, 2)
        folder = make_model(tmp_path / f"model{layers}", num_hidden_layers=layers)
        load_sharded(ModelFolder(folder), torch.float32, CPU, "float32", "off", ranks, ahead=True)
        assert ranks.shards
        order = [unit.buffer.data_ptr() for unit in Units.order(ranks.shards.units, backward=False)]
        waits = [i for i in range(1, len(order)) if order[i] == order[i - 1]]
        assert waits == ([1] if layers == 4 else [])


def test_experts_are_not_shared(tmp_path: Path):
    with pytest.raises(UsageError, match=r"does not split experts\n.*--quant nf4"):
        sharded(tiny_folder(tmp_path / "m", "qwen3_moe"), 0, 2)


def test_a_base_that_is_trained_is_not_shared():
    check_shard(TrainConfig(shard="on"))
    with pytest.raises(UsageError, match="--method full"):
        check_shard(TrainConfig(shard="on", method="full"))


@pytest.mark.long
def test_a_rank_that_dies_ends_a_sharded_run(tmp_path: Path):
    out = tmp_path / "run"
    command = training(tmp_path, str(out), "--shard", "on")
    code, said, _ = interrupted(command, lambda: steps(out) >= 5, killing(1, out))
    assert code == 10 and said.count("error:") == 1 and "Traceback" not in said, said
    assert re.search(r"shard   base sharded over 2 ranks: \S+ MB of \S+ MB each", said), said


@pytest.mark.long
def test_a_study_of_a_sharded_base_has_the_numbers_of_a_whole_one(tmp_path: Path):
    looks = []
    for shard in ("on", "off"):
        out = tmp_path / shard
        done = run(training(tmp_path, str(out), "--shard", shard, "--study", "on", "--max-steps", "2"))
        assert done.returncode == 0, done.stderr[-3000:]
        looks.append([line["study"] for line in metrics(out) if "study" in line])
    assert looks[0] and looks[0] == looks[1]
