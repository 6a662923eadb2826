"""GGUF files in the hands of others: the gguf package reads them, and llama.cpp answers with the same tokens (extra: llama)."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unicodedata import is_normalized

import pytest
import torch
from tiny import make_model

import minilora
from minilora.checkpoint.gguf import export_lora, export_model
from minilora.checkpoint.verify import PROMPTS
from minilora.files.gguf import encode
from minilora.generate import generate
from minilora.lora import adapters
from minilora.text.template import render_text

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

ASKED = [*PROMPTS, "Name three colours.", "把下面的句子改成被动语态：他打碎了杯子。"]
TOKENIZERS = Path(__file__).parent / "golden" / "tokenizers"
MINI = Path(minilora.__file__).parent / "demo" / "mini"
FAMILIES = ("qwen2", "qwen3", "glm", "glm4")
SIZES: dict[str, Any] = {"num_attention_heads": 2, "vocab_size": 264}


def with_adapter(folder: Path, to: Path, size: float) -> Path:
    """An adapter that changes what the model says."""
    model = minilora.load_model(folder, device="cpu")
    minilora.add_lora(model, r=4, alpha=6)
    generator = torch.Generator().manual_seed(0)
    for _, wrapper in adapters(model):
        wrapper.lora_B.data.normal_(0, size, generator=generator)
    minilora.save_adapter(model, to)
    return to


def llama(model: Path, lora: Path | None = None, **options: Any) -> Any:
    return closing(
        llama_cpp.Llama(
            str(model),
            n_ctx=256,
            n_threads=1,
            verbose=False,
            type_k=0,
            type_v=0,
            lora_path=lora and str(lora),
            **options,
        )
    )


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_are_those_of_the_package(kind: str):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    x[5] = 0
    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert torch.equal(encode(x.flatten(), kind), torch.from_numpy(theirs).flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_package_reads_a_file(tmp_path: Path, family: str):
    """Its table of names knows every tensor, and the numbers are the folder's."""
    folder = make_model(tmp_path / "model", model_type=family, tie_word_embeddings=False, **SIZES)
    export_model(folder, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    architecture = reader.get_field("general.architecture").contents()
    number = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, 2)
    weights = dict(minilora.load_model(folder, device="cpu").named_parameters())
    names = {known.get_name(name, (".weight", ".bias")): name for name in weights}
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert found.keys() == names.keys()
    assert all(torch.equal(found[theirs].reshape(weights[name].shape), weights[name]) for theirs, name in names.items())


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "yarn"])
def test_llama_cpp_computes_the_same(tmp_path: Path, family: str):
    """Logits of every family in fp32, of the base and with an adapter, past the length that YaRN begins at."""
    changes: dict[str, Any] = {"model_type": family} | SIZES
    if family == "yarn":
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        changes |= {"model_type": "qwen3", "rope_scaling": yarn}
    folder = make_model(tmp_path / "model", **changes)
    adapter = with_adapter(folder, tmp_path / "adapter", 0.1)
    export_model(folder, tmp_path / "out")
    export_lora(folder, adapter, tmp_path / "lora")
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
    model = minilora.load_model(folder, device="cpu", compute="float32")
    ours = [model.logits(ids)]
    minilora.load_adapter(model, adapter)
    ours.append(model.logits(ids))
    assert (ours[0] - ours[1]).abs().max() > 0.1
    for lora, expected in zip((None, tmp_path / "lora" / "adapter.gguf"), ours, strict=True):
        with llama(tmp_path / "out" / "model.gguf", lora, logits_all=True) as llm:
            llm.eval(ids.tolist())
            found = torch.from_numpy(llm.scores[: len(ids)].copy())
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_llama_cpp_cuts_text_alike(tmp_path: Path, name: str):
    """The texts of the golden tokens, but for those that are not NFC, which llama.cpp does not make of them."""
    folder = make_model(tmp_path / "model", vocab_size=151_700, hidden_size=16, num_hidden_layers=1)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZERS / name / file, folder)
    export_model(folder, tmp_path / "out")
    texts = [
        t
        for t in json.loads((TOKENIZERS / name / "golden.json").read_text())["texts"]
        if is_normalized("NFC", t["text"])
    ]
    with llama(tmp_path / "out" / "model.gguf", vocab_only=True) as llm:
        found = {t["text"]: llm.tokenize(t["text"].encode(), add_bos=False, special=True) for t in texts}
    assert {t["text"]: t["ids"] for t in texts} == found and len(found) > 70


def answers(folder: Path, adapter: Path | None) -> Iterator[tuple[str, list[int], list[int]]]:
    """The text and the ids of each prompt, and the likeliest tokens after them in fp32."""
    tokenizer, model = minilora.load_tokenizer(folder), minilora.load_model(folder, torch.float32, "cpu")
    if adapter:
        minilora.load_adapter(model, adapter)
    model.eval()
    for asked in ASKED:
        messages = [{"role": "user", "content": asked}]
        ids = tokenizer.render(messages, prompt=True)[0]
        text = render_text(tokenizer.template.segments(messages, prompt=True))
        yield text, ids, list(generate(model, ids, tokenizer.stop_ids, 16))


def check_answers(folder: Path, tmp_path: Path, size: float) -> None:
    adapter = with_adapter(folder, tmp_path / "adapter", size)
    export_model(folder, tmp_path / "out", "f32")
    export_lora(folder, adapter, tmp_path / "lora")
    said = []
    for ours, lora in ((None, None), (adapter, tmp_path / "lora" / "adapter.gguf")):
        with llama(tmp_path / "out" / "model.gguf", lora) as llm:
            for text, ids, expected in answers(folder, ours):
                assert llm.tokenize(text.encode(), add_bos=False, special=True) == ids
                llm.reset()
                found: list[int] = []
                for token in llm.generate(ids, temp=0.0, repeat_penalty=1.0):
                    if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token) or len(found) == 16:
                        break
                    found.append(token)
                assert found == expected, text
                said.append(found)
    assert said[: len(ASKED)] != said[len(ASKED) :]  # the adapter did something


def test_the_same_tokens_as_llama_cpp(tmp_path: Path):
    """Ten prompts, base and adapter; text is cut as we cut it, and an answer ends where ours ends."""
    check_answers(MINI, tmp_path, 0.06)


@pytest.mark.long
def test_the_same_tokens_of_a_real_model(tmp_path: Path):
    """MINILORA_MODEL is the folder of a published model."""
    if "MINILORA_MODEL" not in os.environ:
        pytest.skip("MINILORA_MODEL is not set")
    check_answers(Path(os.environ["MINILORA_MODEL"]), tmp_path, 0.01)
