"""A tiny ChatGLM-6B through the command line: trained, resumed, merged, evaluated, asked."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracle import config_json
from tiny_chatglm import write_tokenizer

from minilora import load_model, load_tokenizer
from minilora.__main__ import main
from minilora.checkpoint import empty_model, read_config
from minilora.data import load_examples
from minilora.safetensors import write_tensors
from minilora.snapshot import snapshots, step_of

ROWS = [{"instruction": f"数到{n}。", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 7)]
STEPS, STOP = 40, 20


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, rows, and a finished run with its checkpoints."""
    work = tmp_path_factory.mktemp("chatglm")
    folder = work / "model"
    folder.mkdir()
    sizes = {
        "vocab_size": 700,
        "hidden_size": 64,
        "inner_hidden_size": 160,
        "num_layers": 4,
        "max_sequence_length": 256,
    }
    (folder / "config.json").write_text(json.dumps(config_json("chatglm", **sizes) | write_tokenizer(folder)))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, p in empty_model(read_config(folder)).named_parameters():
        value = torch.empty(p.shape).normal_(0, 0.2, generator=generator)
        weights[name] = value + 1 if name.endswith("layernorm.weight") else value
    write_tensors(folder / "model.safetensors", weights)
    (work / "rows.json").write_text(json.dumps(ROWS))
    assert run(work, "train", "--output", work / "run") == 0
    return work


def run(work: Path, command: str, *words: object) -> int:
    settings: tuple[object, ...] = ("--model", work / "model")
    if command == "train" and "--resume" not in words:
        settings += ("--data", work / "rows.json", "--lr", 8e-3, "--lora-r", 16, "--max-steps", STEPS)
        settings += ("--batch-size", 6, "--save-every", 20, "--keep", 9, "--device", "cpu", "--lora-dropout", 0.05)
    return main([command, *map(str, settings + words)])


def test_rows_are_what_the_authors_train_on(work: Path):
    """source [gMASK] <sop> target <eop>: all from <sop> on is learnt, the source and [gMASK] see each other."""
    tokenizer, c = load_tokenizer(work / "model"), json.loads((work / "model" / "config.json").read_text())
    example = load_examples(work / "rows.json", tokenizer)[0][2]
    ids, prefix = example.ids.tolist(), example.prefix
    assert prefix is not None and ids[prefix - 1 : prefix + 1] == [c["gmask_token_id"], c["bos_token_id"]]
    assert ids[-1] == c["eos_token_id"] and "数到3" in tokenizer.decode(ids[: prefix - 1])
    assert example.targets.tolist() == [-100] * (prefix - 1) + ids[prefix:] + [-100]
    assert prefix == load_model(work / "model", device="cpu").prefix(torch.tensor(ids))


def test_it_learns_and_answers(work: Path, capsys: pytest.CaptureFixture[str]):
    losses = [json.loads(line)["loss"] for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.1 * losses[0]
    words = ("--adapter", work / "run" / "adapter", "--prompt", "数到4。", "--greedy", "--max-tokens", 20)
    assert run(work, "chat", *words) == 0
    assert "1 2 3 4" in capsys.readouterr().out


def test_resumed_is_uninterrupted(work: Path, tmp_path: Path):
    again = tmp_path / "run"
    shutil.copytree(work / "run", again, symlinks=True)
    for folder in snapshots(again / "checkpoints"):
        if step_of(folder) > STOP:
            shutil.rmtree(folder)
    shutil.rmtree(again / "adapter")
    assert main(["train", "--output", str(again), "--resume"]) == 0
    files = [r / "adapter" / "adapter_model.safetensors" for r in (work / "run", again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_merged_answers_as_adapted(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    merged = tmp_path / "merged"
    assert run(work, "merge", "--adapter", work / "run" / "adapter", "--output", merged) == 0
    assert main(["chat", "--model", str(merged), "--prompt", "数到5。", "--greedy", "--max-tokens", "20"]) == 0
    assert "1 2 3 4 5" in capsys.readouterr().out
    assert (merged / "ice_text.model").read_bytes() == (work / "model" / "ice_text.model").read_bytes()


def test_evaluated(work: Path, capsys: pytest.CaptureFixture[str]):
    words = ("--adapter", work / "run" / "adapter", "--data", work / "rows.json")
    assert run(work, "eval", *words) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_vocabulary_of_another_generation(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The model has fewer rows than the tokenizer ids."""
    folder = tmp_path / "model"
    shutil.copytree(work / "model", folder)
    j = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(j))
    weights = {n: torch.zeros(p.shape) for n, p in empty_model(read_config(folder)).named_parameters()}
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", weights)
    assert main(["chat", "--model", str(folder), "--prompt", "1"]) == 4
    assert "two generations" in capsys.readouterr().err
