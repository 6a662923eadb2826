"""A pass of one model is that model loaded alone, bit for bit; a pass of several gives each row to its own."""

import json

import pytest
import torch
from tiny import make_model

import minilora
from minilora.lora import adapters
from minilora.models.stream import Documents

starlette = pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from served import make_models

from minilora.errors import ModelError, UsageError
from minilora.files.model_folder import ModelFolder
from minilora.methods.table import METHODS
from minilora.serve.models import Asked, Mixed
from minilora.serve.server import open_models
from minilora.settings import resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(folder):
    return make_models(folder)


def alone(folder, name):
    model = minilora.load_model(folder / "tiny", torch.float32, "cpu")
    if name != "tiny":
        minilora.load_adapter(model, folder / name)
    return model.eval()


@torch.inference_mode()
def logits(model, prompts):
    documents = Documents.of(list(map(len, prompts))).to(torch.device("cpu"))
    return model.to_logits(model(torch.tensor([i for prompt in prompts for i in prompt]), documents))


def asked(models, *pairs):
    return [Asked(prompt, set(), 5, model=models.all[name]) for name, prompt in pairs]


@pytest.mark.parametrize("name", ["tiny", "red", "blue"])
def test_one_model_is_that_model_alone(models, folder, name):
    prompts = [[1, 2, 3], [4, 5]]
    models.choose(asked(models, *((name, prompt) for prompt in prompts)))
    assert torch.equal(logits(models.decoder, prompts), logits(alone(folder, name), prompts))
    assert not any(isinstance(m, Mixed) for m in models.decoder.modules())


def test_rows_of_several_models_are_each_their_own(models, folder):
    """Prompts that lie between each other, then one token of each; a row of a wrong model would be off by more than 0.1."""
    pairs = [("red", [1, 2, 3]), ("tiny", [4, 5]), ("blue", [6]), ("red", [7, 8]), ("tiny", [9])]
    requests = asked(models, *pairs)
    models.choose(requests)
    found = logits(models.decoder, [prompt for _, prompt in pairs]).split([len(prompt) for _, prompt in pairs])
    wrong = []
    for (name, prompt), rows in zip(pairs, found, strict=True):
        torch.testing.assert_close(rows, logits(alone(folder, name), [prompt]), rtol=0, atol=1e-4)
        other = "blue" if name == "red" else "red"
        wrong.append(float((rows - logits(alone(folder, other), [prompt])).abs().max()))
    assert min(wrong) > 0.1
    for request in requests:
        request.ids = [3]
    models.choose(requests)
    assert [(model.name, index.tolist()) for model, index in models._rows] == [
        ("red", [0, 3]),
        ("tiny", [1, 4]),
        ("blue", [2]),
    ]


def test_there_is_one_copy_of_the_base(models):
    red = dict(models.all["red"].linears)
    for path, wrapper in models.all["blue"].linears.items():
        assert wrapper.base is red[path].base is models._mixed[path].base
    models.choose(asked(models, ("tiny", [1])))
    assert not list(adapters(models.decoder))


def test_what_cannot_be_served_together(tmp_path):
    folder = ModelFolder(make_model(tmp_path / "tiny"))
    with pytest.raises(UsageError, match="has the name of the model"):
        open_models(folder, {"tiny": "x"})
    with pytest.raises(UsageError, match="cannot hold several models"):
        open_models(folder, {"red": "x"}, int8=True)


def test_what_is_not_on_linears_alone_is_not_served(tmp_path):
    """A prefix would stay in the model when the base is asked."""
    folder = make_model(tmp_path / "tiny")
    model = minilora.load_model(folder, torch.float32, "cpu")
    METHODS["prefix"].install(model, resolve({"method": "prefix", "pre_seq_len": 2}))
    minilora.save_adapter(model, tmp_path / "prefix")
    with pytest.raises(ModelError, match="PREFIX_TUNING, which cannot be served beside others"):
        open_models(ModelFolder(folder), {"red": str(tmp_path / "prefix")}, device="cpu")


def test_an_adapters_own_tokenizer_fits_the_model(tmp_path):
    folder = make_model(tmp_path / "tiny", vocab_size=259)
    model = minilora.load_model(folder, torch.float32, "cpu")
    minilora.add_lora(model, r=2)
    minilora.save_adapter(model, tmp_path / "wide")
    j = json.loads((folder / "tokenizer.json").read_text())
    j["added_tokens"].append(j["added_tokens"][-1] | {"id": 259, "content": "<new>"})
    (tmp_path / "wide" / "tokenizer.json").write_text(json.dumps(j))
    with pytest.raises(ModelError, match="ids up to 259, the model 259 rows"):
        open_models(ModelFolder(folder), {"red": str(tmp_path / "wide")}, device="cpu")
