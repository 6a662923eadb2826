"""`minilora explain`: its numbers are those of the step that training makes, and its places are where the code is."""

from pathlib import Path

import pytest
import torch
from tiny import make_model, make_rows

from minilora import load_model
from minilora.__main__ import main
from minilora.data import load_examples, make_batch
from minilora.lora import adapters, add_lora
from minilora.text.tokenizer import load_tokenizer
from minilora.tools.explain import explain, where

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_every_number_is_that_of_the_step(path: str, tmp_path: Path):
    folder = make_model(tmp_path / "m")
    example = load_examples(make_rows(tmp_path / "rows.json"), load_tokenizer(folder))[0][0]
    model = load_model(folder, torch.float64)
    add_lora(model, r=3, alpha=6)
    found = explain(model, example, path)
    of = {q.name: q.value for q in found.quantities}
    # the model has taken one step and is otherwise as it was: its own gradients
    model.zero_grad()
    batch = make_batch([example])
    loss = model.loss(batch) / len(batch.targets)
    loss.backward()
    linear = dict(adapters(model))[path]
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12) and found.tokens == len(batch.ids)
    assert linear.lora_A.grad is not None and linear.lora_B.grad is not None and linear.lora_B.any()
    # A and B are fp32, and so are their gradients
    torch.testing.assert_close(of["dA"].float(), linear.lora_A.grad, rtol=1e-5, atol=0)
    torch.testing.assert_close(of["dB"].float(), linear.lora_B.grad, rtol=1e-5, atol=0)
    errors = {q.name: q.error for q in found.quantities if q.error is not None}
    assert errors.keys() == {"y", "dX", "dA", "dB"} and max(errors.values()) < 1e-6
    t, k, n = found.tokens, of["x"].shape[1], of["y"].shape[1]
    assert sum(q.flops for q in found.quantities) == 2 * t * (2 * n * k + 3 * 3 * (n + k))
    assert found.adapter_share == pytest.approx(9 * (n + k) / (2 * n * k + 9 * (n + k)))


def test_places_are_where_the_code_is():
    for what, place in where():
        file, line = place.split(":")
        path = next(p for p in (ROOT / file, ROOT / "minilora" / file) if p.is_file())
        assert path.read_text().splitlines()[int(line) - 1].lstrip().startswith(("def ", "class ")), what


def test_the_command(tmp_path: Path, capsys):
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    assert "dS^T x" in out and "kernels/lora_linear.py:" in out
    folder, rows = make_model(tmp_path / "m"), make_rows(tmp_path / "rows.json")
    words = ["explain", "--model", str(folder), "--data", str(rows)]
    assert main([*words, "--row", "14"]) == 0
    assert main([*words, "--row", "15"]) == 2
    assert main([*words, "--linear", "lm_head"]) == 2
    assert "no linear with an adapter" in capsys.readouterr().err
