"""ChatGLM-6B from its folder to an answer, by the command line: its own tokenizer, rows, prefix mask and positions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import tiny_folder
from tiny_chatglm import write_tokenizer

import minilora
from minilora.__main__ import main
from minilora.checkpoint.convert import BIN
from minilora.data import load_examples
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.generate import reply

ROWS = [
    {
        "prompt": f"数到{n}。",
        "response": " ".join(map(str, range(1, n + 1))),
        "history": [["你好", "你好！"]] if n % 2 else [],
    }
    for n in range(1, 9)
]
SETTINGS = ["--lora-r", "4", "--lr", "1e-2", "--batch-size", "4", "--max-length", "120", "--device", "cpu"]


def make_folder(folder: Path, first_release: bool = False, **changes) -> Path:
    tokenizer = folder.with_name(f"{folder.name}-tokenizer")
    tokenizer.mkdir(parents=True)
    ids = write_tokenizer(tokenizer, first_release)
    tiny_folder(folder, "chatglm", **({"vocab_size": 20700 if first_release else 500} | ids | changes))
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("chatglm") / "m")


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.json"
    rows = [
        {
            "messages": [
                m
                for q, a in row["history"] + [[row["prompt"], row["response"]]]
                for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
            ]
        }
        for row in ROWS
    ]
    path.write_text(json.dumps(rows))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(folder / "adapter_model.safetensors")
    return {name: file.tensor(name).clone() for name in file.entries}


def test_rows_are_what_the_authors_train_on(folder, rows):
    """source [gMASK] <sop> target <eop>: all from <sop> on is learnt, the source and [gMASK] see each other."""
    tokenizer, c = minilora.load_tokenizer(folder), json.loads((folder / "config.json").read_text())
    example = load_examples(rows, tokenizer)[0][2]
    ids, prefix = example.ids.tolist(), example.prefix
    assert prefix is not None and ids[prefix - 1 : prefix + 1] == [c["gmask_token_id"], c["bos_token_id"]]
    assert ids[-1] == c["eos_token_id"] and "数到3" in tokenizer.decode(ids[: prefix - 1])
    assert example.targets.tolist() == [-100] * (prefix - 1) + ids[prefix:] + [-100]
    assert [prefix] == minilora.load_model(folder, device="cpu").prefix_lens(torch.tensor(ids))


def test_train_resume_merge_and_chat(folder, rows, tmp_path, capsys):
    run = ["train", "--model", str(folder), "--data", str(rows), *SETTINGS, "--lora-dropout", "0.05"]
    assert main([*run, "--output", str(tmp_path / "whole"), "--max-steps", "4"]) == 0
    assert main([*run, "--output", str(tmp_path / "parts"), "--max-steps", "4", "--save-every", "2"]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    # the last two steps again, from the state after two
    for path in (tmp_path / "parts" / "checkpoints").glob("step-4"):
        shutil.rmtree(path)
    assert main(["train", "--output", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = weights(tmp_path / "whole" / "adapter"), weights(tmp_path / "parts" / "adapter")
    assert all(torch.equal(whole[n], parts[n]) for n in whole) and whole.keys() == parts.keys()
    both = ["--model", str(folder), "--adapter", str(tmp_path / "whole" / "adapter")]
    assert main(["merge", *both, "--output", str(tmp_path / "merged")]) == 0
    assert minilora.load_tokenizer(tmp_path / "merged").template.name == "chatglm"
    assert main(["eval", *both, "--data", str(rows), "--json"]) == 0
    capsys.readouterr()
    said = []
    for which in (both, ["--model", str(tmp_path / "merged")]):
        assert main(["chat", *which, "--greedy", "--max-tokens", "6", "--prompt", "数到3。", "--prompt", "再来"]) == 0
        said.append(capsys.readouterr().out.partition("\n")[2])  # after the line with the path
    assert said[0] == said[1] and said[0].count("> ") == 2


@pytest.mark.parametrize(("first_release", "steps"), [(False, "60"), (True, "200")])
def test_it_learns_to_answer(tmp_path, first_release, steps):
    """The answer comes out of cached generation only if mask and positions are those of training."""
    folder = make_folder(tmp_path / "m", first_release)
    rows = tmp_path / "two.json"
    rows.write_text(
        json.dumps([{"instruction": "数到3。", "output": "1 2 3"}, {"instruction": "你好", "output": "Count, 你好？"}])
    )
    arguments = ["--model", str(folder), "--data", str(rows), "--output", str(tmp_path / "run"), *SETTINGS]
    assert main(["train", *arguments, "--max-steps", steps, "--save-every", steps, "--schedule", "constant"]) == 0
    model, tokenizer = minilora.load_model(folder, device="cpu"), minilora.load_tokenizer(folder)
    minilora.load_adapter(model, tmp_path / "run" / "adapter")
    model.eval()
    said = ["".join(reply(model, tokenizer, [{"role": "user", "content": q}], 20)) for q in ("数到3。", "你好")]
    assert said == ["1 2 3", "Count, 你好？"]


def test_inspect_and_plan(folder, tmp_path, capsys):
    assert main(["inspect", "model", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "chatglm" and found["template"] == "chatglm" and found["problems"] == []
    assert [s["token"] for s in found["stop"]] == ["<eop>"]
    assert {row["name"].split(".")[-1] for row in found["linears"]} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
    assert main(["plan", "--model", str(folder), "--max-length", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["activations"] > 0


def test_from_pickle(folder, tmp_path):
    """As it is published: .bin, converted, loaded."""
    published = shutil.copytree(folder, tmp_path / "published")
    file = SafetensorsFile(published / "model.safetensors")
    torch.save({name: file.tensor(name).half() for name in file.entries}, published / BIN)
    (published / "model.safetensors").unlink()
    assert main(["convert", str(published), str(tmp_path / "out")]) == 0
    assert minilora.load_tokenizer(tmp_path / "out").template.name == "chatglm"
    model = minilora.load_model(tmp_path / "out", torch.float32, "cpu")
    assert all(torch.equal(p, file.tensor(n).half().float()) for n, p in model.named_parameters())


def test_one_line_and_exit_code_4(folder, rows, tmp_path, capsys):
    def told(spoiled: Path) -> str:
        capsys.readouterr()
        assert (
            main(["train", "--model", str(spoiled), "--data", str(rows), "--output", str(tmp_path / "x"), *SETTINGS])
            == 4
        )
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and not (tmp_path / "x").exists()
        return lines[0]

    def changed(name: str, **changes) -> Path:
        copy = shutil.copytree(folder, tmp_path / name)
        j = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(j | changes))
        return copy

    assert "quantised" in told(changed("int4", quantization_bit=4))
    assert "P-tuning" in told(changed("prefix", pre_seq_len=128))
    assert "bos_token_id" in told(changed("first", bos_token_id=150004))
    assert "ice_text.model" in told(changed("qwen", model_type="qwen2"))
    small = make_folder(tmp_path / "small", vocab_size=300)
    assert "the model 300 rows" in told(small)


EIGHTH: dict[str, Any] = {
    "vocab_size": 130528, "hidden_size": 512, "num_layers": 28, "num_attention_heads": 32, "inner_hidden_size": 2048,
}  # fmt: skip


@pytest.mark.long
def test_an_eighth_of_the_width(tmp_path, rows):
    """28 layers and 32 heads, random: trains, resumes, merges and answers."""
    folder = make_folder(tmp_path / "m", **EIGHTH)
    run = ["train", "--model", str(folder), "--data", str(rows), "--output", str(tmp_path / "run"), *SETTINGS]
    assert main([*run, "--max-steps", "4", "--save-every", "2"]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    assert main(["train", "--output", str(tmp_path / "run"), "--resume"]) == 0
    both = ["--model", str(folder), "--adapter", str(tmp_path / "run" / "adapter")]
    assert main(["merge", *both, "--output", str(tmp_path / "merged")]) == 0
    assert main(["chat", "--model", str(tmp_path / "merged"), "--greedy", "--max-tokens", "4", "--prompt", "你好"]) == 0


@pytest.mark.parametrize("sizes", [{}, pytest.param(EIGHTH, marks=pytest.mark.long)], ids=["tiny", "an eighth"])
def test_an_adapter_of_an_int8_base(tmp_path, rows, capsys, sizes):
    """ChatGLM-6B as it is often trained: a model of fp16 in int8, rank 8, alpha 32, query_key_value alone."""
    folder, run = make_folder(tmp_path / "m", **sizes), tmp_path / "run"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    file = SafetensorsFile(folder / "model.safetensors")
    write_tensors(folder / "half", {name: file.tensor(name).half() for name in file.entries})
    (folder / "half").replace(folder / "model.safetensors")
    layers = config["num_layers"]
    flags = ["--quant", "int8", "--lora-r", "8", "--lora-alpha", "32", "--lora-targets", "query_key_value"]
    data = ["--model", str(folder), "--data", str(rows)]
    words = [*data, *flags, "--lr", "1e-3", "--batch-size", "4", "--device", "cpu", "--max-steps", "4"]
    assert main(["train", *words, "--output", str(run)]) == 0
    header = capsys.readouterr().out
    assert f"int8 by rows: {4 * layers} weights at 8." in header and f"query_key_value  {layers} linears" in header
    both = ["--adapter", str(run / "adapter"), "--quant", "int8"]
    losses = []
    for which in (both[2:], both):
        assert main(["eval", *data, *which, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] < losses[0]
    assert main(["predict", *data, *both, "--max-tokens", "4", "--output", str(tmp_path / "answers")]) == 0
    capsys.readouterr()
    assert main(["merge", *data[:2], *both[:2], "--output", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "proof   over" in said and "trained on a base in int8: a logit of that model and of the merged one" in said
    assert main(["eval", "--model", str(tmp_path / "merged"), *data[2:], "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)["loss"]
    assert abs(merged - losses[1]) < 0.1 * (losses[0] - losses[1])
