"""Small inputs of real users that were once dropped, misread or refused for a wrong reason."""

import json
import shutil
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_rows

import minilora
from minilora.__main__ import main
from minilora.checkpoint.load import read_config
from minilora.checkpoint.open_model import folder_notes
from minilora.data import load_examples
from minilora.demo.show import MODEL
from minilora.errors import DataError, ModelError
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.kernels.frozen_linear import frozen_linear
from minilora.models.config_json import rope_of
from minilora.models.int8 import int8_product, packed
from minilora.rows import open_rows, read_rows
from minilora.text.template import render_text
from minilora.text.template_qwen import ChatML

CASES = Path(__file__).parent / "cases"
ROWS = json.dumps({"prompt": "q", "response": "a"}) + "\n"


# adapters


def test_an_adapter_that_holds_nan_is_refused_by_every_command(tmp_path: Path, capsys):
    rows, adapter = make_rows(tmp_path / "rows.json"), CASES / "adapter-nan" / "nan"
    both = ["--model", str(MODEL), "--adapter", str(adapter)]
    for words in (
        ["chat", "--prompt", "hi"],
        ["eval", "--data", str(rows)],
        ["predict", "--data", str(rows), "--output", str(tmp_path / "p")],
        ["merge", "--output", str(tmp_path / "m")],
        ["data", "score", "--data", str(rows)],
    ):
        command = words[:2] if words[0] == "data" else words[:1]
        assert main([*command, *both, *words[len(command) :]]) == 4
        assert "lora_" in (err := capsys.readouterr().err) and "not finite" in err
    assert not (tmp_path / "m").exists()


def test_weights_that_hold_nan_are_refused(tmp_path: Path):
    folder = make_model(tmp_path / "m")
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: file.tensor(name).clone() for name in file.entries}
    tensors["model.norm.weight"][3] = float("nan")
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(ModelError, match="model.norm.weight holds values that are not finite"):
        minilora.load_model(folder)


def test_values_whose_sum_overflows_are_finite(tmp_path: Path):
    folder = make_model(tmp_path / "m", torch.float16)
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: file.tensor(name).clone() for name in file.entries}
    tensors["model.norm.weight"].fill_(60000.0)
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", tensors)
    minilora.load_model(folder)


def test_eva_and_keys_with_the_adapters_name_load():
    for case in ("adapter-eva/eva", "adapter-head-and-embedding/default_key"):
        model = minilora.load_model(MODEL)
        minilora.load_adapter(model, CASES / case)
        assert any(name.endswith("lora_A") for name, _ in model.named_parameters())


def damaged(tmp_path: Path, change: Any) -> Path:
    """An adapter of a tiny model whose tensors were changed."""
    model = minilora.load_model(make_model(tmp_path / "m"))
    minilora.add_lora(model, "q_proj,v_proj", r=2, alpha=4)
    minilora.save_adapter(model, tmp_path / "a")
    file = SafetensorsFile(tmp_path / "a" / "adapter_model.safetensors")
    tensors = {name: file.tensor(name).clone() for name in file.entries}
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    write_tensors(tmp_path / "a" / "adapter_model.safetensors", change(tensors))
    return tmp_path / "a"


def test_an_adapter_that_lacks_a_layer_is_taken_on_request_alone(tmp_path: Path, capsys):
    adapter = damaged(tmp_path, lambda t: {k: v for k, v in t.items() if "layers.1." not in k})
    model = minilora.load_model(tmp_path / "m")
    with pytest.raises(ModelError, match=r"names 4 linears of this model, its file holds 2 \(missing: model.layers.1"):
        minilora.load_adapter(model, adapter)
    minilora.load_adapter(model, adapter, allow_partial=True)
    words = [
        "eval",
        "--model",
        str(tmp_path / "m"),
        "--adapter",
        str(adapter),
        "--data",
        str(make_rows(tmp_path / "r.json")),
    ]
    assert main(words) == 4 and "--allow-partial" in capsys.readouterr().err
    assert main([*words, "--allow-partial"]) == 0


def test_keys_without_a_prefix_load(tmp_path: Path):
    adapter = damaged(tmp_path, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    minilora.load_adapter(minilora.load_model(tmp_path / "m"), adapter)


@pytest.mark.parametrize(
    "key",
    ["base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A",
     "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"],
)  # fmt: skip
def test_an_adapter_on_the_head_or_the_embedding_is_refused_for_that(tmp_path: Path, key: str):
    adapter = damaged(tmp_path, lambda t: t | {key: torch.zeros(2, 32)})
    with pytest.raises(ModelError, match="head or the embedding, or a vocabulary"):
        minilora.load_adapter(minilora.load_model(tmp_path / "m"), adapter)


# what is saved in place of a model


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 988097824\n", "Git LFS pointer"),
        ("<!DOCTYPE html><html><body>Sign in</body></html>" + " " * 100, "web page"),
        ("<html><head><title>404</title></head></html>" + " " * 100, "web page"),
    ],
)
def test_what_was_saved_in_place_of_a_file_is_told(tmp_path: Path, name: str, content: str, told: str):
    folder = make_model(tmp_path / "m")
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=told):
        minilora.load_model(folder)


def test_the_root_of_a_cache_names_its_snapshot(tmp_path: Path):
    for name in ("refs", "blobs", "snapshots/0123abc"):
        (tmp_path / "models--X--Y" / name).mkdir(parents=True)
    with pytest.raises(ModelError) as error:
        minilora.load_model(tmp_path / "models--X--Y")
    assert "cache" in error.value.what and error.value.hint.endswith("snapshots/0123abc.")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("quantization", {"group_size": 64, "bits": 4}, "MLX, 4 bits"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}, r"quantised \(fp8\)"),
        ("quantization_bit", 4, "4 bits"),
    ],
)
def test_a_quantised_folder_is_told_for_what_it_is(tmp_path: Path, key: str, value: Any, told: str):
    with pytest.raises(ModelError, match=told):
        read_config(make_model(tmp_path / "m", **{key: value}))


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def test_two_keys_of_rope_that_contradict_each_other_are_refused():
    plain = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(ValueError, match=r"rope_parameters \(default\) and rope_scaling \(yarn\) contradict"):
        rope_of({"rope_parameters": plain, "rope_scaling": YARN}, 256)
    same = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
    theta, yarn = rope_of({"rope_parameters": same, "rope_scaling": YARN}, 256)
    assert theta == 1e6 and yarn is not None and yarn.factor == 4


# rows

QWEN3 = Path(__file__).parent / "golden" / "tokenizers" / "qwen3"
# file of cases/rows: the first row as a model of Qwen3 reads it, what is trained in brackets; or what the refusal says
READ = {
    "k4_instr_query": "Answer politely.\nWhat colour is snow?|[White, sir.]", "k4_prompt_input": "Translate into Chinese.\nIt rained today.|[今天下雨了。]",
    "k4_query_input": "Translate into Chinese.\nIt rained today.|[今天下雨了。]", "k4_zh_alpaca": "把下面的话译成英文。\n今天下雨了。|[It rained today.]",
    "reasoning": "What is 1 plus 1?|[<think>\nTwo times 1 is 2.\n</think>\n\nIt is 2.]",
    "toolcalls": 'Weather in town 0?|[I will look that up.\n<tool_call>\n{"name": "weather", "arguments": {"town": "0"}}\n</tool_call>]',
    "weight0": "Capital of land 0?|WRONG ANSWER|Are you sure?|[Town 0.]", "toolcall_text": '[<tool_call>\n{"name": "weather", "arguments": {"town": "0"}}\n</tool_call>]',
    "toolscol": "book_room|Please book room 0.|[Which day?]", "lead_nl": "2+2?|[4]", "two_asst": "2+2?|[Let me see.]|[4]",
    "kto": "'label' holds something and is not read", "p_noans": "there is nothing to learn",
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_all_of_a_row_is_used_or_it_is_refused(name: str):
    """Nothing that a user supplies is ignored without a word."""
    path, tokenizer, wanted = CASES / "rows" / f"{name}.jsonl", minilora.load_tokenizer(QWEN3), READ[name]
    if "[" not in wanted:
        with pytest.raises(DataError, match=wanted):
            load_examples(path, tokenizer)
        return
    example = load_examples(path, tokenizer)[0][0]
    trained = [False, *(example.targets[:-1] >= 0)]
    runs = [(t, tokenizer.decode([i for i, _ in run], specials=True)) for t, run in groupby(zip(example.ids.tolist(), trained, strict=True), itemgetter(1))]  # fmt: skip
    text = "".join(f"[{said}]" if of else said for of, said in runs)
    at = 0
    for piece in wanted.split("|"):
        piece = piece.replace("]", "<|im_end|>]")
        assert piece in text[at:], f"{piece!r} is not in {text[at:]!r}"
        at = text.index(piece, at) + len(piece)


def test_a_test_set_without_answers_is_answered(tmp_path: Path):
    words = ["predict", "--model", str(MODEL), "--data", str(CASES / "rows" / "p_noans.jsonl"), "--max-tokens", "1"]
    assert main([*words, "--output", str(tmp_path / "p")]) == 0


def test_a_config_of_transformers_5_with_yarn_pasted_in_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="contradict each other"):
        read_config(CASES / "rope")


def test_a_csv_in_another_encoding_is_not_taken_for_chinese():
    with pytest.raises(DataError, match="neither UTF-8 nor plausible Chinese in GB18030; it could be big5") as error:
        open_rows(CASES / "big5.csv")
    assert "--encoding big5" in error.value.hint


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("こんにちは、元気ですか", "shift_jis"), ("안녕하세요 반갑습니다", "euc_kr"), ("café, très élégant", "cp1252")],
)
def test_other_alphabets_are_refused_with_what_fits(tmp_path: Path, text: str, encoding: str):
    (tmp_path / "x.csv").write_bytes(f"prompt,response\n{text},{text}\n".encode(encoding))
    with pytest.raises(DataError, match=encoding):
        open_rows(tmp_path / "x.csv")


def test_chinese_in_gb18030_is_read(tmp_path: Path):
    (tmp_path / "x.csv").write_bytes("问题,答案\n天空是什么颜色？,天空是蓝色的。\n".encode("gb18030"))
    (row,) = read_rows(tmp_path / "x.csv")
    assert row.messages[1]["content"] == "天空是蓝色的。"


def test_cells_of_a_sheet():
    pytest.importorskip("openpyxl")
    texts = [m["content"] for row in read_rows(CASES / "x000d.xlsx") for m in row.messages]
    assert (
        texts and not any("_x000D_" in text or "\r" in text for text in texts) and any("\n" in text for text in texts)
    )
    assert list(read_rows(CASES / "spaces.xlsx"))


def test_objects_over_several_lines_are_rows(tmp_path: Path):
    rows = list(read_rows(CASES / "pretty.jsonl"))
    assert len(rows) == 4 and rows[1].where.endswith("line 5")
    (tmp_path / "x.jsonl").write_text('{\n "prompt": "q",\n "response": "a"\n}\n{\n "prompt": oops\n}\n')
    with pytest.raises(DataError, match="line 6, column 12"):
        open_rows(tmp_path / "x.jsonl")


def test_rows_beyond_the_positions_of_the_model_are_told(tmp_path: Path, capsys):
    model = make_model(tmp_path / "m", max_position_embeddings=64)
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "long " * 40, "response": "a"}) + "\n" + ROWS)
    data = ["--model", str(model), "--data", str(tmp_path / "x.jsonl")]
    told = "tokens are more than the 64 positions of the model"
    assert (
        main(["train", *data, "--output", str(tmp_path / "run"), "--max-steps", "1"]) == 0
        and told in capsys.readouterr().out
    )
    assert main(["plan", *data]) == 0 and told in capsys.readouterr().out
    assert main(["inspect", "data", *data]) == 0 and told in capsys.readouterr().out
    assert main(["chat", *data[:2], "--prompt", "long " * 40, "--max-tokens", "2"]) == 0
    assert "tokens are more than the 64 positions" in capsys.readouterr().out


def test_chat_shows_nothing_raw_and_says_that_an_answer_was_cut(tmp_path: Path, capsys):
    words = ["chat", "--model", str(MODEL), "--greedy", "--prompt", "who \x1b[31mare you?", "--max-tokens", "3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\u001b" in out and "[the answer was cut at 3 tokens: --max-tokens]" in out


def test_inspect_data_ends_with_3_where_nothing_can_be_used(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "response": ""}\n')
    assert (
        main(["inspect", "data", "--model", str(make_model(tmp_path / "m")), "--data", str(tmp_path / "x.jsonl")]) == 3
    )


# pictures


@pytest.mark.parametrize("name", ["实验一", "r$x^$ 😀"])
def test_a_run_folder_of_any_name_draws_its_picture(tmp_path: Path, name: str):
    pytest.importorskip("matplotlib")
    model, rows = make_model(tmp_path / "m"), make_rows(tmp_path / "rows.json")
    words = ["train", "--model", str(model), "--data", str(rows), "--output", str(tmp_path / name), "--max-steps", "1"]
    assert main(words) == 0  # warnings are errors here
    assert (tmp_path / name / "loss.png").stat().st_size > 1000


# settings of other tools


def test_settings_of_other_tools_that_mean_nothing_here_are_one_line(tmp_path: Path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "do_train: true\ntemplate: qwen\nbf16: true\noptim: adamw\nreport_to: none\nlearning_rate: 1.0e-4\n"
    )
    assert main(["plan", "-c", str(config), "--model", str(make_model(tmp_path / "m"))]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not needed" in line)
    assert all(key in line for key in ("do_train", "template", "bf16", "optim")) and "learning" not in line


@pytest.mark.parametrize(
    ("flag", "told"),
    [("--bf16", "--compute sets it"), ("--fp16", "--compute sets it"), ("--quantization_bit", "Give --quant nf4")],
)
def test_a_flag_of_another_tool_gets_a_hint(flag: str, told: str, capsys):
    for words in ([flag], [flag, "4"], [f"{flag}=true"]):
        assert main(["train", "--model", "m", "--data", "d", *words]) == 2
        assert told in capsys.readouterr().err


def test_added_tokens_are_themselves_in_an_answer_and_text_in_a_question(tmp_path: Path):
    folder = make_model(tmp_path / "m", vocab_size=300)
    j = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    j["added_tokens"] += [
        {"id": 259 + n, "content": t, "special": False, **flags} for n, t in enumerate(("<tool_call>", "<tool_call>x"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(j))
    tokenizer = minilora.load_tokenizer(folder)
    text = "<tool_call>{}<tool_call>x <|im_end|>"
    ids, trained = tokenizer.render([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    asked, said = ([i for i, t in zip(ids, trained, strict=True) if t == of] for of in (False, True))
    assert 259 not in asked and 260 not in asked and said.count(259) == said.count(260) == 1
    assert said.count(258) == 1  # <|im_end|> of an answer's text stays text
    assert tokenizer.decode(said, specials=True) == text + "<|im_end|>"
    assert tokenizer.encode(text) == tokenizer.encode(text, specials=False) and 259 not in tokenizer.encode(text)


def test_edges_of_qwen3s_template():
    """As its Jinja: newlines before a last answer go, and of two answers in a row the last alone has the empty think block."""
    qwen3 = ChatML("qwen3", None, "optional")
    ask, block = {"role": "user", "content": "2+2?"}, "<think>\n\n</think>\n\n"

    def said(*texts: str) -> str:
        return render_text(qwen3.segments([ask, *({"role": "assistant", "content": t} for t in texts)])).partition(
            "<|im_end|>\n"
        )[2]

    assert said("\n\n4") == f"<|im_start|>assistant\n{block}4<|im_end|>\n"
    assert said("Let me see.", "4") == (
        f"<|im_start|>assistant\nLet me see.<|im_end|>\n<|im_start|>assistant\n{block}4<|im_end|>\n"
    )


def test_small_activations_of_one_row_keep_their_digits_in_int8():
    weight, x = packed(torch.randn(48, 64)), torch.randn(1, 64)
    assert torch.allclose(
        int8_product(2.0**-17 * x, weight) * 2**17, int8_product(x, weight)
    )  # only the exponent differs


def test_fp16_weights_never_take_fp32_activations_into_their_range():
    with torch.inference_mode():
        y = frozen_linear(torch.full((1, 4), 1e6), torch.ones(2, 4, dtype=torch.float16))
    assert torch.equal(y, torch.full((1, 2), 4e6))


@pytest.mark.parametrize("bad", [{"layers_to_transform": [[0]]}, {"use_rslora": "false"}], ids=str)
def test_values_of_a_wrong_kind_in_an_adapters_config(tmp_path: Path, bad: dict):
    adapter = damaged(tmp_path, lambda t: t)
    j = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps(j | bad))
    with pytest.raises(ModelError, match=next(iter(bad))):
        minilora.load_adapter(minilora.load_model(tmp_path / "m"), adapter)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path):
    adapter = damaged(tmp_path, lambda t: t | {k.removeprefix("base_model.model."): 5 * v for k, v in t.items()})
    with pytest.raises(ModelError, match="a second time"):
        minilora.load_adapter(minilora.load_model(tmp_path / "m"), adapter)


# what a folder holds beside a model, and whom an adapter was made for


@pytest.fixture
def folder_and_adapter(tmp_path: Path) -> tuple[Path, Path]:
    folder = make_model(tmp_path / "model")
    model = minilora.load_model(folder, device="cpu")
    minilora.add_lora(model, r=2)
    minilora.save_adapter(model, tmp_path / "adapter", "Qwen/Other-Model")
    return folder, tmp_path / "adapter"


def notes_of(folder: Path, adapter: Path | None = None) -> dict[str, str]:
    return folder_notes(folder, minilora.load_tokenizer(folder, adapter), adapter)


def test_an_adapter_in_the_model_s_folder_is_told(folder_and_adapter):
    folder, adapter = folder_and_adapter
    assert notes_of(folder) == {}
    shutil.copy(adapter / "adapter_config.json", folder)
    assert "not read" in notes_of(folder)["files"]


def test_the_base_that_an_adapter_names_is_told_where_its_weights_cannot_be_compared(folder_and_adapter):
    folder, adapter = folder_and_adapter
    assert "base" not in notes_of(folder, adapter)  # it knows the weights
    file = SafetensorsFile(adapter / "adapter_model.safetensors")
    tensors = {k: file.tensor(k).clone() for k in file.entries}
    (adapter / "adapter_model.safetensors").unlink()
    write_tensors(adapter / "adapter_model.safetensors", tensors)
    assert "made for 'Qwen/Other-Model'" in notes_of(folder, adapter)["base"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name in (str(folder), "someone/MODEL/"):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        assert "base" not in notes_of(folder, adapter)


@pytest.mark.parametrize(
    "change", [{"layers_to_transform": [0]}, {"target_modules": ["q_proj"]}, {"exclude_modules": ["up_proj"]}]
)
def test_an_adapter_that_holds_more_than_its_config_says(folder_and_adapter, change: dict):
    folder, adapter = folder_and_adapter
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match="linears that its config leaves out"):
        minilora.load_adapter(minilora.load_model(folder, device="cpu"), adapter)
    minilora.load_adapter(minilora.load_model(folder, device="cpu"), adapter, allow_partial=True)


def test_tokens_that_the_tokenizer_does_not_know_are_told(folder_and_adapter):
    folder, _ = folder_and_adapter
    (folder / "added_tokens.json").write_text(json.dumps({"<mine>": 2600, "<|im_end|>": 1}))
    assert "<mine>" in notes_of(folder)["tokens"] and "im_end" not in notes_of(folder)["tokens"]


def test_questions_without_an_answer_and_marks_are_counted(tmp_path: Path):
    rows = tmp_path / "rows.json"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    more = {"role": "user", "content": "<|im_start|>and then?"}
    rows.write_text(json.dumps([{"messages": talk}, {"messages": [*talk, more]}]))
    told = str(load_examples(rows, minilora.load_tokenizer(MODEL))[1])
    assert "note: 1 rows end with a message that no answer follows" in told and "note: 1 rows hold marks" in told


def test_a_classifier_and_settings_that_answers_do_not_follow_are_told(folder_and_adapter):
    folder, _ = folder_and_adapter
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForSequenceClassification"]}))
    neutral = {"eos_token_id": 1, "temperature": 0.7, "num_beams": 1}
    generation = neutral | {"no_repeat_ngram_size": 3, "stop_strings": ["x"], "renormalize_logits": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert "Qwen3ForSequenceClassification" in notes_of(folder)["config"]
    assert notes_of(folder)["answers"].endswith("'no_repeat_ngram_size', 'stop_strings', 'renormalize_logits'")
    (folder / "config.json").write_text(json.dumps(config | {"architectures": 5}))
    assert "names '5'" in notes_of(folder)["config"]
    (folder / "generation_config.json").write_text("{bad")
    assert "not valid JSON" in notes_of(folder)["answers"]
