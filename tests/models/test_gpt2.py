"""GPT-2: learned positions and where they end, weights that lie transposed in files, short documents; each way to hold its weights."""

import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import conversation, randomise, tiny, tiny_folder
from torch import Tensor

from minilora import add_lora, load_model, loftq_init, merge, save_adapter, save_model
from minilora.__main__ import main
from minilora.checkpoint.export import export_adapter
from minilora.checkpoint.load import described_model
from minilora.data import IGNORE, Example, load_examples, make_batch
from minilora.errors import DataError, UsageError
from minilora.files.model_folder import ModelFolder
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.finetuning import finetune
from minilora.generate import Request, decode, generate
from minilora.kernels.quantized import QuantizedWeight
from minilora.lora import adapters, trained_parameters
from minilora.models.decoder import Decoder
from minilora.models.gpt2 import Conv1D
from minilora.models.stream import Documents
from minilora.positions import check_room
from minilora.run.fit import longest_document
from minilora.run.setup import prepare
from minilora.sampling import GREEDY
from minilora.settings import resolve
from minilora.text.tokenizer import load_tokenizer
from minilora.tools.chat import Session

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizers" / "gpt2" / "tokenizer.json"
LENGTHS = [5, 1, 2, 3, 11, 1, 64]  # the last one has all positions that there are


def bare(folder: Path) -> Path:
    """The folder with the names of OpenAI's own: no prefix, and the masks of attention among the weights."""
    file = folder / "model.safetensors"
    old = SafetensorsFile(file)
    tensors = {name.removeprefix("transformer."): old.tensor(name).clone() for name in old.entries}
    file.unlink()
    write_tensors(file, tensors | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)})
    return folder


def logits(model: Decoder, ids: Tensor | None = None) -> Tensor:
    return model.logits(torch.arange(1, 21) if ids is None else ids).detach()


def test_documents_of_a_few_tokens_are_as_alone():
    """Logits, the loss and the gradients of all adapters."""
    model = tiny("gpt2", torch.float64)
    add_lora(model, r=3)
    randomise(model.double())
    ids = torch.randint(0, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    parts = [part.numpy() for part in ids.split(LENGTHS)]
    examples = [Example(part, np.append(part[1:], IGNORE), "", None) for part in parts]
    sums = []
    for streams in ([examples], [[e] for e in examples if len(e.ids) > 1]):  # one token has nothing to predict
        losses = [model.loss(make_batch(stream)) for stream in streams]
        torch.stack(losses).sum().backward()
        gradients = [p.grad for p in trained_parameters(model).values() if p.grad is not None]
        sums.append(torch.cat([torch.stack(losses).sum().detach()[None], *(g.flatten() for g in gradients)]))
        model.zero_grad()
    assert (sums[0] - sums[1]).abs().max() <= 1e-12 * sums[1].abs().max() and len(sums[0]) > 1000
    with torch.no_grad():
        packed = model.to_logits(model(ids, Documents.of(LENGTHS)))
        alone = torch.cat([model.logits(part) for part in ids.split(LENGTHS)])
    assert (packed - alone).abs().max() <= 1e-12 * alone.abs().max()
    shifted = model(ids[:5], Documents.of([5], starts=[1]))
    assert (model.to_logits(shifted) - alone[:5]).abs().max() > 1e-2  # a position more is another model


# folders


@pytest.mark.parametrize("prefix", [True, False])
def test_a_folder_is_read_and_written_in_its_spelling(tmp_path: Path, prefix: bool):
    folder = tiny_folder(tmp_path / "m", "gpt2")
    folder = folder if prefix else bare(folder)
    model = load_model(folder, device="cpu")
    assert torch.equal(logits(model), logits(tiny("gpt2")))
    add_lora(model, r=3)
    randomise(model)
    merge(model)
    save_model(model, tmp_path / "out", folder)
    old, new = (SafetensorsFile(f / "model.safetensors").entries for f in (folder, tmp_path / "out"))
    assert {n: e.shape for n, e in old.items() if not n.endswith(".attn.bias")} == {n: e.shape for n, e in new.items()}
    assert torch.equal(logits(load_model(tmp_path / "out", device="cpu")), logits(model))


def test_the_weight_of_a_linear_is_not_the_transposed_one(tmp_path: Path):
    """attn.c_proj is square: nothing but its name tells how it lies."""
    folder = tiny_folder(tmp_path / "m", "gpt2")
    model, stored = described_model(ModelFolder(folder), None, "keep")
    for path, linear in model.named_modules():
        if isinstance(linear, Conv1D):
            weight = tiny("gpt2").get_parameter(f"{path}.weight")
            with stored.reading_linear(path, weight.shape) as value:
                assert isinstance(value, Tensor) and torch.equal(value, weight)
            assert torch.equal(stored.tensors._files[f"{path}.weight"].tensor(f"{path}.weight"), weight.T)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantised_weights_are_of_the_weights_as_they_are_in_memory(tmp_path: Path, quant: str):
    """attn.c_proj is square: rounded the wrong way round it would have the same error."""
    folder = tiny_folder(tmp_path / "m", "gpt2", n_embd=64, n_inner=128)
    plain, model = load_model(folder, device="cpu"), load_model(folder, device="cpu", quant=quant)
    add_lora(model, r=16)
    loftq_init(model, folder)
    for path, wrapper in adapters(model):
        weight, wide = wrapper.base.weight, plain.get_parameter(f"{path}.weight")
        assert isinstance(weight, QuantizedWeight) and weight.error is not None and weight.error_left is not None
        off = wide - weight.weight_as(torch.float32)
        left = off - wrapper.scale * wrapper.lora_B.detach() @ wrapper.lora_A.detach()
        assert abs(float(off.norm() / wide.norm()) - weight.error) < 1e-3 * weight.error
        assert abs(float(left.norm() / wide.norm()) - weight.error_left) < 1e-3 * weight.error


def test_vllm_takes_no_adapters_on_it(tmp_path: Path):
    folder, model = tiny_folder(tmp_path / "m", "gpt2"), tiny("gpt2")
    add_lora(model, r=2)
    save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert export_adapter(folder, tmp_path / "a", tmp_path / "peft", "peft").adapted == len(dict(adapters(model)))
    with pytest.raises(UsageError, match="vllm takes no adapters on gpt2"):
        export_adapter(folder, tmp_path / "a", tmp_path / "vllm", "vllm")


# where positions end


def test_an_answer_ends_where_positions_do():
    model, prompt = tiny("gpt2"), torch.arange(60).tolist()
    answer = list(generate(model, prompt, set(), 100))
    assert len(answer) == 5  # the last one is not read
    model.logits(torch.tensor([*prompt, *answer[:4]]))
    full = Request([1] * 64, set(), 100)
    list(decode(model, deque([full])))
    assert len(full.ids) == 1 and full.finish_reason == "length"
    with pytest.raises(DataError, match="a prompt has 65 tokens, and the model has 64 learned positions"):
        list(generate(model, [1] * 65, set(), 100))
    with pytest.raises(ValueError, match="65 tokens are more than the 64 learned positions"):
        model.logits(torch.ones(65, dtype=torch.long))
    check_room(tiny("qwen2"), "a row", 10**6)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_take_positions(method: str):
    model = prepare(tiny("gpt2"), resolve({"method": method, "pre_seq_len": 4}))
    with pytest.raises(DataError, match=r"64 learned positions, 4 of them .*\n--max-length 60"):
        check_room(model, "row 1", 61)
    model.loss(make_batch([conversation("gpt2", 40, 20, 0)]))  # the last token has position 63


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with GPT-2's own tokenizer, of the texts of its golden."""
    made = tiny_folder(tmp_path_factory.mktemp("gpt2") / "m", "gpt2", vocab_size=50257, n_embd=8, n_inner=8)
    (made / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return made


def test_rows_that_are_longer_are_refused_before_training(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = tmp_path / "rows.jsonl"
    texts = ["a" * 10, "1" + " 1" * 70]
    rows.write_text("".join(json.dumps({"prompt": text, "response": "1"}) + "\n" for text in texts))
    where = ["--model", str(folder), "--data", str(rows)]
    for command in (["train", "--output", str(tmp_path / "run"), "--max-steps", "1"], ["eval"]):
        assert main([*command, *where, "--device", "cpu"]) == 3
        told = capsys.readouterr()
        assert "and the model has 64 learned positions" in told.err and "--max-length 64" in told.err
    assert main(["inspect", "data", *where]) == 0
    assert "it can read nothing beyond them" in capsys.readouterr().out
    assert main(["eval", *where, "--device", "cpu", "--max-length", "64"]) == 0
    with pytest.raises(DataError, match="row 1 has"):
        finetune(load_model(folder, device="cpu"), load_tokenizer(folder), [{"prompt": texts[1], "response": "1"}])


def test_a_conversation_that_is_too_long_is_not_answered(folder: Path):
    generator = torch.Generator().manual_seed(0)
    session = Session(
        load_model(folder, device="cpu"),
        load_tokenizer(folder),
        GREEDY,
        set(),
        3,
        generator,
        [{"role": "user", "content": "1" + " 1" * 70}],
    )
    (told,) = session.reply("hello")
    assert "more than the 64 positions" in told and "/new begins" in told and len(session.messages) == 1


def test_a_pair_is_two_documents(folder: Path, tmp_path: Path):
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "1 1", "chosen": "1" + " 1" * n, "rejected": "1" + " 1" * m} for n, m in ((3, 2), (4, 9))]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found, _ = load_examples(rows, load_tokenizer(folder), pairs=True)
    assert found.longest > 14 and longest_document(found)[1] == 14  # 2 and 10 tokens, and <|endoftext|> behind each
