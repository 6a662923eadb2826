"""P-tuning v2 checkpoints of ChatGLM-6B's and ChatGLM2-6B's own code: prefix_encoder and pre_seq_len."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracle import IDS, conversations, tiny, tiny_folder
from tiny_chatglm import write_tokenizer
from torch import Tensor

from minilora import load_adapter, load_model, save_adapter
from minilora.__main__ import main
from minilora.data import make_batch
from minilora.errors import ModelError
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.lora import trained_parameters
from minilora.models.decoder import Decoder
from minilora.models.stream import Context

P = 4


def encoder(model: Decoder, projected: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with the names and the shapes that the authors' code gives them."""
    c, generator = model.config, torch.Generator().manual_seed(5)
    width = 2 * c.layers * c.kv_heads * c.head_size
    dim = width if c.family == "chatglm2" or not projected else c.width
    shapes = {"embedding.weight": (P, dim)}
    if projected:
        shapes |= {
            "trans.0.weight": (c.width, dim),
            "trans.0.bias": (c.width,),
            "trans.2.weight": (width, c.width),
            "trans.2.bias": (width,),
        }
    return {f"transformer.prefix_encoder.{n}": 0.5 * torch.randn(s, generator=generator) for n, s in shapes.items()}


def published(folder: Path, tensors: dict[str, Tensor], pickle: bool = False, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", "pre_seq_len": P, **config}))
    if pickle:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        write_tensors(folder / "model.safetensors", tensors)
    return folder


def naive(past: Tensor, prefix: int):
    """Attention of one document with a prefix, from the authors' formula: keys before those of the document, seen by all."""

    def attend(self: Context, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        k, v = torch.cat((past[2 * layer], k)), torch.cat((past[2 * layer + 1], v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        n = len(q)
        own = torch.ones(n, n).tril().bool() | (torch.arange(n) < prefix)
        seen = torch.cat((torch.ones(n, P).bool(), own), 1)
        scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    return attend


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
@pytest.mark.parametrize("projected", [False, True])
def test_its_logits_are_those_of_the_formula(
    family: str, projected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, c = tiny(family), tiny(family).config
    tensors = encoder(model, projected)
    load_adapter(model, published(tmp_path / "p", tensors, prefix_projection=projected))
    model.double().eval()
    with torch.no_grad():
        ours = model.logits(IDS)
    flat = tensors["transformer.prefix_encoder.embedding.weight"].double()
    if projected:
        w = {n.removeprefix("transformer.prefix_encoder.trans."): t.double() for n, t in tensors.items()}
        flat = torch.tanh(flat @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
    past = flat.view(P, 2 * c.layers, c.kv_heads, c.head_size).transpose(0, 1)
    base = tiny(family).double()
    prefix_lens = base.prefix_lens(IDS)
    monkeypatch.setattr(Context, "attend", naive(past, prefix_lens[0] if prefix_lens else 0))
    with torch.no_grad():
        torch.testing.assert_close(ours, base.logits(IDS), rtol=1e-9, atol=1e-9)


def test_it_is_trained_further_and_saved_for_peft(tmp_path: Path):
    model = tiny("chatglm")
    load_adapter(model, published(tmp_path / "p", encoder(model, True), prefix_projection=True))
    batch = make_batch(conversations("chatglm"))
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train().loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and len(trained_parameters(model)) == 5
    save_adapter(model, tmp_path / "a")
    again = tiny("chatglm")
    load_adapter(again, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again.eval().logits(IDS), model.eval().logits(IDS))
    assert list(SafetensorsFile(tmp_path / "a" / "adapter_model.safetensors").entries) == ["prompt_embeddings"]


def test_a_pickled_one_is_converted_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tokenizer").mkdir()
    folder = tiny_folder(tmp_path / "base", "chatglm", vocab_size=500, **write_tokenizer(tmp_path / "tokenizer"))
    shutil.copytree(tmp_path / "tokenizer", folder, dirs_exist_ok=True)
    c = json.loads((folder / "config.json").read_text())
    tensors = {"transformer.prefix_encoder.embedding.weight": torch.randn(P, 2 * c["num_layers"] * c["hidden_size"])}
    pickled = published(tmp_path / "p", tensors, pickle=True)
    words = ["chat", "--model", str(folder), "--greedy", "--max-tokens", "3", "--prompt", "数到3。"]
    assert main([*words, "--adapter", str(pickled)]) == 4
    assert "minilora convert" in capsys.readouterr().err
    assert main(["convert", str(pickled), str(tmp_path / "plain")]) == 0
    assert "--adapter" in capsys.readouterr().out
    assert main([*words, "--adapter", str(tmp_path / "plain")]) == 0
    with pytest.raises(ModelError, match="fits"):
        load_adapter(tiny("qwen2"), tmp_path / "plain")
    with pytest.raises(ModelError, match="P-tuning prefix"):
        load_model(tmp_path / "plain")
