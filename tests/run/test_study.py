"""`train --study`: what is logged of each linear is what dense arithmetic says, and the training does not notice."""

import json

import pytest
import torch
from tiny import make_model, make_rows

from minilora import load_adapter, load_model
from minilora.__main__ import main
from minilora.data import Example, make_batch
from minilora.lora import adapters
from minilora.run.study import feature_change, steps_between
from minilora.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the same run, with and without a look at each step."""
    home = tmp_path_factory.mktemp("study")
    base, rows = make_model(home / "m"), make_rows(home / "rows.json")
    words = ["--model", base, "--data", rows, "--max-steps", "6", "--lora-r", "4", "--lora-dropout", "0.1", "--save-every", "1",
             "--keep-checkpoints", "9", "--batch-size", "4", "--clip", "0.001"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.run.study.SHARE", 1)  # a look at each step
        for name, more in (("with", ["--study", "on"]), ("without", [])):
            assert main(["train", *map(str, words), "--output", str(home / name), *more]) == 0
    return home


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_the_same_to_the_bit_with_and_without(runs):
    weights = [(runs / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert [m["loss"] for m in lines(runs / "with")] == [m["loss"] for m in lines(runs / "without")]
    assert all("study" not in m for m in lines(runs / "without"))


def test_norms_are_those_of_the_checkpoints(runs):
    seen = {m["step"]: m["study"] for m in lines(runs / "with") if "study" in m}
    assert len(seen) >= 2 and max(seen) > 1
    step = max(seen)
    held = []
    for at in (step - 1, step):
        model = load_model(runs / "m")
        load_adapter(model, runs / f"with/checkpoints/step-{at}")
        held.append(dict(adapters(model)))
    before, after = held
    assert seen[step].keys() == before.keys() and len(before) == 14
    for path, numbers in seen[step].items():
        for half in "ab":
            old, new = (getattr(side[path], f"lora_{half.upper()}").detach().double() for side in (before, after))
            assert numbers[half] == pytest.approx(float(old.norm()), rel=1e-3)
            assert numbers[f"step_{half}"] == pytest.approx(float((new - old).norm()), rel=2e-3)
    squares = sum(n["grad_a"] ** 2 + n["grad_b"] ** 2 for n in seen[step].values())
    norm = next(m["grad_norm"] for m in lines(runs / "with") if m["step"] == step)
    assert squares**0.5 == pytest.approx(norm, rel=1e-3)  # before clipping
    assert all(n["moved"] > 0 for n in seen[step].values())


def test_moved_is_what_two_products_say(runs):
    """Of the linears that no kernel fuses with others, whose x a hook sees."""
    model = load_model(runs / "m", torch.float64)
    load_adapter(model, runs / "with/adapter")
    tokenizer = load_tokenizer(runs / "m")
    ids = torch.tensor(tokenizer.encode("one two three four"))
    found = feature_change(model, make_batch([Example(ids.numpy(), ids.numpy(), "here")]))
    assert len(found) == 14
    seen = {}
    for path, linear in adapters(model):
        linear.register_forward_hook(lambda m, x, y, path=path: seen.update({path: x[0]}))
    with torch.no_grad():
        model.logits(ids)
    assert seen, "some linears are called by themselves"
    for path, x in seen.items():
        linear = dict(adapters(model))[path]
        change = linear.scale * x @ linear.lora_A.detach().double().T @ linear.lora_B.detach().double().T
        plain = x @ linear.base.weight.T
        assert found[path] == pytest.approx(float(change.norm() / plain.norm()), rel=1e-6)


def test_how_often_it_looks():
    assert steps_between(256, 4096) == 3  # 256 / (3 x 4096) is 2.1 % of a step's arithmetic
    assert steps_between(256, 1e6) == 1 and steps_between(256, 0.5) == 256


def test_the_report_draws_it_and_full_training_refuses_it(runs, tmp_path, capsys):
    assert main(["report", str(runs / "with")]) == 0
    page = (runs / "with/report.html").read_text()
    assert "How the adapters learned" in page and "moved by the adapter at step" in page
    assert "How the adapters learned" not in (runs / "without/report.html").read_text()
    words = ["--model", str(runs / "m"), "--data", str(runs / "rows.json"), "--output", str(tmp_path / "full")]
    assert main(["train", *words, "--method", "full", "--study"]) == 2
    assert "looks at adapters" in capsys.readouterr().err
