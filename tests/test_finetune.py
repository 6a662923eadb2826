"""Training in memory computes what a run with files computes, and leaves nothing behind."""

import json
import os
from pathlib import Path

import pytest
import torch

import minilora
from minilora.errors import DataError, Diverged, UsageError
from minilora.lora import adapters
from minilora.models.decoder import Decoder
from minilora.sampling import Sampling
from minilora.text.tokenizer import Tokenizer

MODEL = Path(minilora.__file__).parent / "demo" / "mini"
ROWS = [
    [{"role": "user", "content": f"What follows {n}?"}, {"role": "assistant", "content": f"{n + 1}."}] for n in range(6)
]
SETTINGS = {"lora_r": 4, "lora_alpha": 8, "lr": 2e-3, "batch_size": 2, "max_steps": 5, "seed": 3}


Pair = tuple[Decoder, Tokenizer]


@pytest.fixture
def pair() -> Pair:
    return minilora.load_model(MODEL, torch.float32, "cpu", "float32"), minilora.load_tokenizer(MODEL)


def test_the_losses_are_those_of_a_run_with_files(pair: Pair, tmp_path: Path):
    from minilora.settings import resolve
    from minilora.train import train

    heard = []
    losses = minilora.finetune(*pair, ROWS, lambda step, loss: heard.append((step, loss)), **SETTINGS)
    assert heard == list(enumerate(losses, 1)) and losses[-1] < losses[0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))
    run = {"model": str(MODEL), "data": str(rows), "output": str(tmp_path / "run"), "device": "cpu", "dtype": "float32"}
    train(resolve(SETTINGS, run, {"compute": "float32"}))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses


def test_adapters_that_are_there_are_trained_on(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    minilora.finetune(*pair, ROWS, **SETTINGS)
    first = [w.lora_B.detach().clone() for _, w in adapters(pair[0])]
    assert not pair[0].training and minilora.finetune(*pair, ROWS, **SETTINGS)
    assert not any(torch.equal(b, w.lora_B) for b, (_, w) in zip(first, adapters(pair[0]), strict=True))
    assert os.listdir() == []
    for other in ({"lora_r": 3}, {"lora_alpha": 7}, {"lora_targets": "mlp"}):
        with pytest.raises(UsageError, match="has adapters already"):
            minilora.finetune(*pair, ROWS, **(SETTINGS | other))  # pyright: ignore[reportArgumentType]


def test_their_dropout_draws_a_new_mask_for_each_step(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    minilora.add_lora(pair[0], r=4, dropout=0.3)
    keys = set()
    monkeypatch.setattr("minilora.train.set_dropout_keys", lambda model, *place: keys.add(place))
    minilora.finetune(*pair, ROWS, max_steps=3)
    assert len(keys) == 3


@pytest.mark.parametrize(
    "rows, settings, error, told",
    [
        (ROWS, {"output": "x"}, UsageError, "takes no output"), (ROWS, {"output_dir": "x"}, UsageError, "takes no output"),
        (ROWS, {"mix_general": "x"}, UsageError, "takes no mix_general"), (ROWS, {"device": "cpu"}, UsageError, "the model is loaded"),
        (ROWS, {"objective": "dpo"}, UsageError, "takes no objective"), (ROWS, {"log_to": "wandb"}, UsageError, "takes no log_to"),
        (ROWS, {"learning_rat": 1}, UsageError, "learning_rate"), ([], {}, DataError, "no rows"),
        ([ROWS[0], {"question": "a"}], {}, DataError, "row 2"), (ROWS, {"max_length": 4}, DataError, "row 1 is over max_length 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_named(pair: Pair, rows, settings, error, told):
    with pytest.raises(error) as found:
        minilora.finetune(*pair, rows, **settings)
    assert told in found.value.what + found.value.hint
    assert not list(adapters(pair[0]))


def test_a_reply_comes_in_pieces(pair: Pair):
    messages = [{"role": "user", "content": "Who are you?"}]
    pieces = list(minilora.reply(*pair, messages, max_tokens=12))
    assert len(pieces) > 3 and "".join(pieces).isprintable()
    drawn = ["".join(minilora.reply(*pair, messages, 12, Sampling(temperature=2.0), seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_dir_is_the_api():
    assert "finetune" in dir(minilora) and not {"os", "Any", "import_module", "TYPE_CHECKING"} & set(dir(minilora))


def test_weights_that_the_last_step_broke_are_told(pair: Pair):
    with pytest.raises(Diverged, match="not finite after the update"):
        minilora.finetune(*pair, ROWS, lr=1e300, max_steps=1)
