"""minilora export --for gguf: what the files hold is the model, the adapter and the tokenizer, or they are not there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_file import read_gguf
from tiny import make_model
from tokenizers import AddedToken, models, pre_tokenizers

import minilora
from minilora.__main__ import main
from minilora.checkpoint.gguf import export_lora, export_model, gguf_name
from minilora.checkpoint.modelfile import go_template
from minilora.errors import ModelError
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.lora import adapters
from minilora.text.bpe import GLM_SPLIT, around
from minilora.text.template import Template, render_text
from minilora.text.template_glm import GLM4_OWN, glm_formats
from minilora.text.template_qwen import DEEPSEEK_R1, ChatML

MINI = Path(minilora.__file__).parent / "demo" / "mini"
FAMILIES = {"qwen2": "qwen2", "qwen3": "qwen3", "glm": "chatglm", "glm4": "glm4"}
SIZES: dict[str, Any] = {
    "num_attention_heads": 2
}  # two heads of 16 make up the width, as llama.cpp has it in qwen2 and glm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_holds_the_model(tmp_path: Path, family: str, tied: bool):
    folder = make_model(tmp_path / "model", model_type=family, tie_word_embeddings=tied, rms_norm_eps=1e-3, **SIZES)
    written = export_model(folder, tmp_path / "out")
    metadata, tensors = read_gguf(tmp_path / "out" / "model.gguf")
    stored = SafetensorsFile(folder / "model.safetensors")
    assert tensors.keys() == {gguf_name(name) for name in stored.entries} and len(tensors) == len(stored.entries)
    for name in stored.entries:
        assert torch.equal(tensors[gguf_name(name)].values, stored.tensor(name)), name
    assert written.kinds == {"f32": len(tensors)} and written.size == (tmp_path / "out" / "model.gguf").stat().st_size
    arch = metadata["general.architecture"]
    assert (arch, metadata["general.type"], metadata["general.file_type"]) == (FAMILIES[family], "model", 0)
    sizes = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    expected = {
        "context_length": 256, "embedding_length": 32, "block_count": 2, "feed_forward_length": 56, "vocab_size": 260,
        "attention.head_count": 2, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-3), "rope.freq_base": 10000.0,
        "rope.dimension_count": 8 if family.startswith("glm") else 16,
    }  # fmt: skip
    assert sizes == expected


def test_weights_are_of_the_kind_that_is_asked_for(tmp_path: Path):
    """The rows of down_proj, 56 numbers, are no whole blocks; the head, here the embedding, is finer than q4_0."""
    folder = make_model(tmp_path / "model", torch.bfloat16)
    for kind in (None, "f16", "q8_0", "q4_0"):
        export_model(folder, tmp_path / str(kind), kind)
        metadata, tensors = read_gguf(tmp_path / str(kind) / "model.gguf")
        assert metadata["general.file_type"] == {None: 32, "f16": 1, "q8_0": 7, "q4_0": 2}[kind]
        found = {name: stored.kind for name, stored in tensors.items()}
        assert {k for n, k in found.items() if "norm" in n} == {"f32"}
        assert found["blk.1.attn_q.weight"] == (kind or "bf16")
        assert found["blk.0.ffn_down.weight"] == ("f16" if kind else "bf16")
        assert found["token_embd.weight"] == ("q8_0" if kind == "q4_0" else kind or "bf16")
        original = (
            SafetensorsFile(folder / "model.safetensors").tensor("model.layers.1.self_attn.q_proj.weight").float()
        )
        off = (tensors["blk.1.attn_q.weight"].values - original).norm() / original.norm()
        assert off <= {None: 0, "f16": 1e-3, "q8_0": 1e-2, "q4_0": 0.2}[kind]


def test_no_strangers_file_goes_into_a_model(tmp_path: Path):
    folder = make_model(tmp_path / "model")
    (tmp_path / "key").write_text("secret")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").symlink_to(tmp_path / "key")
    with pytest.raises(ModelError, match="is a link to"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_yarn_and_what_llama_cpp_computes_otherwise(tmp_path: Path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    folder = make_model(tmp_path / "model", rope_scaling=yarn)
    export_model(folder, tmp_path / "out")
    metadata, _ = read_gguf(tmp_path / "out" / "model.gguf")
    assert metadata["qwen3.rope.scaling.type"] == "yarn" and metadata["qwen3.rope.scaling.factor"] == 4
    assert metadata["qwen3.rope.scaling.original_context_length"] == 64
    refused = {
        "attention_factor": {"rope_scaling": yarn | {"attention_factor": 2.0}},
        "sliding window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "make up the width": {"model_type": "qwen2"},
        "qwen2_moe is not written": {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    }  # fmt: skip
    for i, (said, changes) in enumerate(refused.items()):
        folder = make_model(tmp_path / str(i), **changes)
        with pytest.raises(ModelError, match=said):
            export_model(folder, tmp_path / f"out{i}")
        assert not (tmp_path / f"out{i}").exists()


def test_a_value_that_fp16_cannot_hold(tmp_path: Path):
    folder = make_model(tmp_path / "model", torch.bfloat16)
    weights = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: weights.tensor(name).clone() for name in weights.entries}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 70000
    write_tensors(folder / "changed", tensors)
    (folder / "changed").rename(folder / "model.safetensors")
    with pytest.raises(ModelError, match="up_proj.weight has values that fp16 cannot hold"):
        export_model(folder, tmp_path / "out", "f16")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    export_model(folder, tmp_path / "out", "q8_0")


# the tokenizer


def test_the_tokenizer_goes_along(tmp_path: Path):
    export_model(MINI, tmp_path / "out", "q4_0")
    metadata, tensors = read_gguf(tmp_path / "out" / "model.gguf")
    about = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    j = json.loads((MINI / "tokenizer.json").read_text())
    assert (about["model"], about["pre"], about["add_bos_token"]) == ("gpt2", "qwen2", False)
    assert len(about["tokens"]) == len(about["token_type"]) == len(tensors["token_embd.weight"].values)
    assert all(about["tokens"][i] == text for text, i in j["model"]["vocab"].items())
    assert about["merges"] == [" ".join(pair) for pair in j["model"]["merges"]]
    specials = {t["content"]: t["id"] for t in j["added_tokens"]}
    assert [about["tokens"][i] for i in specials.values()] == list(specials)
    assert {i for i, kind in enumerate(about["token_type"]) if kind == 3} == set(specials.values())
    assert about["eos_token_id"] == specials["<|im_end|>"] and about["eot_token_id"] == specials["<|endoftext|>"]
    assert about["padding_token_id"] == about["bos_token_id"] == specials["<|endoftext|>"]
    assert metadata["tokenizer.chat_template"] == (MINI / "chat_template.jinja").read_text()


def test_rows_without_a_token_and_tokens_that_are_no_special_ones(tmp_path: Path):
    folder = make_model(tmp_path / "model", vocab_size=270)
    j = json.loads((folder / "tokenizer.json").read_text())
    j["added_tokens"].append(j["added_tokens"][0] | {"id": 259, "content": "<think>", "special": False})
    j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "nonsense"
    (folder / "tokenizer.json").write_text(json.dumps(j))
    with pytest.raises(ModelError, match="cuts text by"):
        export_model(folder, tmp_path / "out")
    j["pre_tokenizer"] = json.loads((MINI / "tokenizer.json").read_text())["pre_tokenizer"]
    (folder / "tokenizer.json").write_text(json.dumps(j))
    settings = {"bos_token": {"content": "<|im_start|>"}, "pad_token": ["odd"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    export_model(folder, tmp_path / "out")
    metadata, _ = read_gguf(tmp_path / "out" / "model.gguf")
    assert metadata["tokenizer.ggml.bos_token_id"] == 257 and "tokenizer.ggml.padding_token_id" not in metadata
    assert metadata["tokenizer.ggml.tokens"][258:262] == ["<|im_end|>", "<think>", "[PAD260]", "[PAD261]"]
    assert metadata["tokenizer.ggml.token_type"][258:262] == [3, 4, 5, 5]


@pytest.mark.parametrize("whole", [True, False])
def test_the_tokenizer_of_glm(tmp_path: Path, whole: bool):
    """Digits are cut in threes; llama.cpp has two names for that, by whether a word that is a token is taken as it is."""
    ends = {"<|user|>": 256, "<|endoftext|>": 257, "<|observation|>": 258, "<|assistant|>": 259}
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    built = around(models.BPE(alphabet | ends, [], ignore_merges=whole), GLM_SPLIT, nfc=False)
    built.add_special_tokens([AddedToken(text, normalized=False) for text in ends])
    folder = make_model(tmp_path / "model", model_type="glm4", **SIZES)
    built.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").unlink()
    export_model(folder, tmp_path / "out")
    metadata, _ = read_gguf(tmp_path / "out" / "model.gguf")
    assert metadata["tokenizer.ggml.pre"] == ("glm4" if whole else "chatglm-bpe")
    found = {end: metadata[f"tokenizer.ggml.{end}_token_id"] for end in ("eos", "eot", "eom", "bos")}
    assert found == {"eos": 256, "eot": 257, "eom": 258, "bos": 257} and "tokenizer.chat_template" not in metadata


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go makes of the templates that we write."""
    found = re.fullmatch(r"(.*)\{\{ range .Messages }}(.*)\{\{ end }}\{\{ end }}(.*)", template, re.DOTALL)
    assert found
    turns = dict(re.findall(r'\{\{ (?:else )?if eq .Role "(\w+)" }}(.*?)(?=\{\{ else|\Z)', found[2], re.DOTALL))
    return found[1] + "".join(turns[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + found[3]


@pytest.mark.parametrize(
    "template",
    [
        ChatML("qwen2.5"),
        ChatML("qwen3", None, "optional"),
        ChatML("qwq", None, "always"),
        DEEPSEEK_R1,
        GLM4_OWN,
        *glm_formats()[::4],
    ],
    ids=lambda t: t.name,
)
def test_ollama_writes_a_chat_as_we_do(template: Template):
    chat = [{"role": role, "content": text} for role, text in
            [("system", "be kind"), ("user", "a\nb"), ("assistant", "c"), ("user", "d "), ("assistant", "e"), ("user", "f")]]  # fmt: skip
    written = go_template(template)
    assert written is not None
    for messages in (chat, chat[1:2], chat[1:]):
        assert go(written, messages) == render_text(template.segments(messages, prompt=True))


# adapters


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"targets": "mlp"}], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "glm4"])
def test_an_adapter_is_the_same_update(tmp_path: Path, family: str, options: dict):
    """llama.cpp adds alpha / R of B A, R the rows of A; each linear may have a rank and a scale of its own."""
    folder = make_model(tmp_path / "model", model_type=family)
    model = minilora.load_model(folder, device="cpu")
    minilora.add_lora(model, r=3, alpha=7, **options)
    for _, wrapper in adapters(model):
        wrapper.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    minilora.save_adapter(model, tmp_path / "adapter")
    if not options:
        j = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(j | {"alpha_pattern": {"o_proj": 5}}))
        model = minilora.load_model(folder, device="cpu")
        minilora.load_adapter(model, tmp_path / "adapter")
    export_lora(folder, tmp_path / "adapter", tmp_path / "out")
    metadata, tensors = read_gguf(tmp_path / "out" / "adapter.gguf")
    assert metadata["general.type"] == "adapter" and metadata["adapter.type"] == "lora"
    assert metadata["general.architecture"] == FAMILIES[family]
    wrapped = {gguf_name(f"{path}.weight"): w for path, w in adapters(model)}
    assert tensors.keys() == {f"{name}.lora_{half}" for name in wrapped for half in "ab"}
    for name, w in wrapped.items():
        a, b = (tensors[f"{name}.lora_{half}"].values for half in "ab")
        update = metadata["adapter.lora.alpha"] / len(a) * b @ a
        torch.testing.assert_close(update, w.scale * (w.lora_B @ w.lora_A).detach(), rtol=1e-5, atol=1e-7)


def test_what_is_no_lora_is_refused(tmp_path: Path):
    folder = make_model(tmp_path / "model")
    model = minilora.load_model(folder, device="cpu")
    minilora.add_lora(model, r=2)
    minilora.save_adapter(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    j = json.loads(config.read_text())
    changes = {
        "no plain LoRA": {"use_dora": True},
        "llama.cpp has no other": {"peft_type": "IA3"},
        "lora_alpha is 0": {"lora_alpha": 0},
    }
    for said, change in changes.items():
        config.write_text(json.dumps(j | change))
        with pytest.raises(ModelError, match=said):
            export_lora(folder, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_model(tmp_path / "model", torch.bfloat16)
    model = minilora.load_model(folder, device="cpu")
    minilora.add_lora(model, r=2)
    minilora.save_adapter(model, tmp_path / "adapter")
    given = ["export", "--model", str(folder), "--for", "gguf"]
    assert main([*given, "--type", "q8_0", "--output", str(tmp_path / "base")]) == 0
    assert "13 in q8_0" in capsys.readouterr().out
    base = str(tmp_path / "base" / "model.gguf")
    adapter = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "lora")]
    assert main([*given, *adapter, "--from", base]) == 0
    said = (tmp_path / "lora" / "Modelfile").read_text()
    assert (
        said.startswith("FROM ../base/model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")
        and 'PARAMETER stop "<|im_end|>"' in said
    )
    assert main([*given, *adapter]) == 8  # what is there is not replaced
    wrong = [[*given, *adapter, "--type", "f16"], [*given, "--from", base, "--output", "x"],
             ["export", "--model", str(folder), "--for", "peft", "--output", "x"]]  # fmt: skip
    for words in wrong:
        assert main(words) == 2
