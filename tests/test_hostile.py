"""Files that were made to hang, to fill the memory or to steer the terminal: each ends at once, with one clear line and its code."""

import base64
import json
import re
import shutil
from pathlib import Path
from unittest.mock import ANY

import pytest
from tiny import make_model, make_rows

from minilora import add_lora, load_model, save_adapter
from minilora.__main__ import main
from minilora.errors import ModelError, UsageError
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.settings import read_yaml
from minilora.terminal import LONGEST
from minilora.text.bpe import _merges
from minilora.text.growth import _fields, check_growth, check_replacements
from minilora.text.pieces import _model
from minilora.tools.sweep import read_sweep

ESC = "\x1b[31m"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    make_model(folder / "model")
    make_rows(folder / "rows.json")
    return folder


@pytest.fixture
def here(tmp_path, folders, monkeypatch) -> Path:
    """A working folder with a model and rows of its own."""
    monkeypatch.chdir(shutil.copytree(folders, tmp_path / "here"))
    return tmp_path / "here"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def told(capsys):
    """Run a command line: its exit code and all that it wrote, which holds no control code and no endless line."""

    def call(words: str | list[str]) -> tuple[int, str]:
        capsys.readouterr()
        code = main(words.split() if isinstance(words, str) else words)
        text = "".join(capsys.readouterr())
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text) and "Traceback" not in text
        assert max(map(len, text.split("\n"))) < LONGEST + 100
        return code, text

    return call


# ---- the terminal


@pytest.mark.parametrize(
    "value", [ESC, "x" * 1_000_000, "\u202e\x9b", [ESC], {"rope_type": ESC}], ids=lambda v: str(type(v))
)
def test_no_value_of_a_config_reaches_the_terminal_raw(here, told, value):
    keys = (
        "rms_norm_eps",
        "hidden_size",
        "rope_theta",
        "model_type",
        "rope_scaling",
        "architectures",
        "dtype",
        "hidden_act",
        ESC,
    )
    before = (here / "model" / "config.json").read_text()
    for key in keys:
        (here / "model" / "config.json").write_text(before)
        change(here / "model" / "config.json", **{key: value})
        code, _ = told("inspect model model")
        assert code in (0, 4), key


@pytest.mark.parametrize("name", [ESC, "x" * 1_000_000])
def test_no_name_in_an_index_or_a_row_does(here, told, name):
    (here / "model" / "model.safetensors").unlink()
    for places in ({name: "model-1.safetensors"}, {"a": name}):
        (here / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        assert told("inspect model model")[0] == 4
    (here / "rows.json").write_text(json.dumps([{name: 1, "instruction": name, "output": "x"}]))
    assert told("train --model model --data rows.json --output out")[0] == 3
    assert told(["train", "--lora-targets", name, "--schedule", name])[0] == 2


def test_what_is_asked_is_echoed_without_control_codes(here, told):
    code, text = told(["chat", "--model", "model", "--prompt", f"a{ESC}b", "--max-tokens", "1"])
    assert code == 0 and "> a\\u001b[31mb" in text


# ---- tokenizers


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def many(step: dict, key: str = "normalizers", times: int = 8) -> dict:
    return {"type": "Sequence", key: [step] * times}


def added(i: int, content: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": True, **flags}


GROWING = {
    "a long replacement": {"normalizer": replace({"String": "e"}, "x" * 1_000_000)},
    "replacements of replacements": {"normalizer": many(replace({"String": "e"}, "e" * 10))},
    "between all letters": {"normalizer": replace({"Regex": "x*"}, "y" * 1000)},
    "nothing replaced": {"normalizer": replace({"String": ""}, "y" * 1000)},
    "a long beginning": {"normalizer": {"type": "Prepend", "prepend": "x" * 5_000_000}},
    "bytes of bytes": {"normalizer": many({"type": "ByteLevel"}, times=24)},
    "bytes of bytes, later": {"pre_tokenizer": many({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}, "pretokenizers")},
    "both": {"normalizer": many({"type": "ByteLevel"}, times=4), "pre_tokenizer": many({"type": "Metaspace", "replacement": "_"}, "pretokenizers", 3)},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 10_000}},
    "on the way back": {"decoder": many(replace({"String": "e"}, "e" * 10), "decoders")},
    "a long token": {"model": {"type": "BPE", "vocab": {"q" * 100_000: 0}, "merges": []}},
    "a long prefix": {"model": {"type": "BPE", "vocab": {"q": 0}, "merges": [], "continuing_subword_prefix": "x" * 100_000}},
    "another kind of tokens": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["q" * 1_000_000, 0.0]]}},
    "merges at random": {"model": {"type": "BPE", "vocab": {"q": 0}, "merges": [], "dropout": 0.5}},
    "words": {"model": {"type": "WordLevel", "unk_token": "q", "vocab": {"q": 0}}},
    "a key that is not read": {"normalizer": {"type": "Sequence", "x": [], "normalizers": [{"type": "ByteLevel"}] * 24}},
    "an old form of a sequence": {"normalizer": {"normalizers": [replace({"String": "e"}, "x" * 1000)]}},
    "an old form of a step": {"decoder": {"pattern": {"String": "e"}, "content": "x" * 1000}},
    "a long added token": {"added_tokens": [added(0, "q" * 100_000)]},
    "many added tokens": {"added_tokens": [added(i, f"<{i:0>200}>") for i in range(6000)]},
    "a million tokens after a text": {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50_000}},
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_a_tokenizer_that_makes_a_text_grow_is_refused(here, told, name):
    change(here / "model" / "tokenizer.json", **GROWING[name])
    code, text = told("chat --model model --prompt x")
    assert code == 4 and "is not a usable tokenizer: " in text


SPLIT = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def test_what_tokenizers_do_by_habit_is_no_growth():
    for more in (
        {"normalizer": {"type": "NFC"}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")],
            }
        },
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, {"type": "ByteLevel", **BYTE_LEVEL}]}},
        {
            "decoder": {
                "type": "Sequence",
                "decoders": [replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}],
            }
        },
    ):
        check_growth(more)


def field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer."""
    size = len(content)
    return bytes([number << 3 | 2, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + content


def test_a_sentencepiece_model_that_makes_a_text_grow_is_refused():
    def table(size: int) -> bytes:
        return field(1, b"nmt") + field(2, b"\4\0\0\0trie" + b"x" * size + b"\0y\0")

    check_replacements(field(1, b"a piece") + field(3, table(18)) + field(5, table(18)))
    for size in (257, 100_000):
        for grows in (
            field(3, table(size)),
            field(3, table(18)) + field(5, table(size)),  # on the way back
            field(3, table(size)) + field(3, field(1, b"nmt")),  # two of one field are merged by the library
            field(3, table(size) + field(2, b"")),
        ):
            with pytest.raises(ValueError, match=f"{size:,} bytes"):
                check_replacements(field(1, b"a piece") + grows)


def test_ranks_that_can_be_cut_in_far_too_many_ways_are_refused(tmp_path):
    """Each way to cut a token into two is a merge: of tokens of one letter a number that grows as the cube of the longest."""
    chains = [bytes([letter]) * n for letter in range(97, 123) for n in range(2, 400)]
    text = {token: token.decode() for token in [*(bytes([b]) for b in range(97, 123)), *chains]}
    with pytest.raises(ValueError, match="far more ways"):
        list(_merges(text))
    assert list(_merges({b"a": "a", b"b": "b", b"ab": "ab"})) == [("a", "b")]


def test_a_table_behind_a_tag_that_the_library_shortens_is_seen(tmp_path):
    """Protocol buffers cut the number of a field to 32 bits."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = tmp_path / "texts.txt"
    texts.write_text("a b c d e f g\n" * 40)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(texts), model_prefix=str(tmp_path / "m"), vocab_size=12, hard_vocab_limit=False, minloglevel=2
    )
    raw = (tmp_path / "m.model").read_bytes()
    (own,) = _fields(raw, 3)
    (table,) = _fields(own, 2)
    spec = field(2, table + b"x" * 1000 + b"\0")
    hidden = b"\x9a\x80\x80\x80\x10" + field(3, spec)[1:]
    _model(raw, tmp_path)
    with pytest.raises(ModelError, match="replaces a letter by 1,000 bytes"):
        _model(raw + hidden, tmp_path)


def test_a_long_token_is_refused_in_every_format(here, told, tmp_path):
    """Merges from ranks take time quadratic in a token's length."""
    model = here / "model"
    (model / "tokenizer.json").unlink()
    ranks = [*(bytes([b]) for b in range(256)), b"ab" * 10_000]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)]
    (model / "qwen.tiktoken").write_bytes(b"".join(lines))
    assert told("chat --model model --prompt x") == (4, ANY)
    assert "one of its tokens has 20,000 characters" in told("chat --model model --prompt x")[1]
    (model / "qwen.tiktoken").unlink()
    (model / "vocab.json").write_text(json.dumps({"q" * 20_000: 0}))
    (model / "merges.txt").write_text("")
    assert "one of its tokens has 20,000 characters" in told("chat --model model --prompt x")[1]


# ---- numbers


@pytest.mark.parametrize("place", ["model/model.safetensors", "adapter/adapter_model.safetensors"])
def test_weights_that_overflow_never_end_with_0(here, told, place):
    """They are finite, and what is computed from them is not."""
    model = load_model(here / "model", device="cpu")
    add_lora(model, r=2)
    save_adapter(model, here / "adapter")
    file = SafetensorsFile(here / place)
    tensors = {name: file.tensor(name).clone() for name in file.entries}
    name = next(name for name in tensors if "q_proj" in name and "lora_A" not in name)
    tensors[name].fill_(1e38)
    (here / place).unlink()
    write_tensors(here / place, tensors, {k: v for k, v in file.metadata.items() if k != "format"})
    adapter = " --adapter adapter" if "adapter" in place else ""
    for words in (
        "chat --model model --prompt x --greedy", "chat --model model --prompt x --temperature 1", "eval --model model --data rows.json",
        "data score --model model --data rows.json", "predict --model model --data rows.json --output out --max-tokens 2",
    ):  # fmt: skip
        code, text = told(words + adapter)
        assert code == 5 and "is not finite" in text, (words, text)


# ---- yaml

YAML = {
    "aliases of aliases": "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'] * 10)}]" for i in range(9)),
    "aliases of mappings": "\n".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' if i else f'k{j}: v' for j in range(10))}}}" for i in range(9)),
    "an alias within itself": "define: &a [*a]",
    "one long text, often": f"define: {{a: &t {'x' * 50_000}, b: *t, c: *t, d: *t}}",
    "deep": f"define: {'[' * 2000}",
    "a long line": f"lr: {'1' * 100_000}",
    "digits": f"seed: {'9' * 5000}",
    "hexadecimal digits": f"val: 0x{'f' * 5000}",
    "parts of a minute": f"seed: {'1:' * 5000}1",
    "a date": "lr: 2024-01-01",
    "no date": "lr: 2024-13-45",
    "no time": "seed: 2024-01-01T99:99:99Z",
    "no number": "seed: !!int a",
    "no truth": "rslora: !!bool a",
    "an object": "seed: !!python/object/apply:os.system [id]",
    "many keys": "".join(f"k{i}: 1\n" for i in range(3000)),
    "too large": "# " + "x" * 200_000,
    "a key twice": "define: {a: 1, a: 2}",
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_a_yaml_file_that_grows_or_lies_is_refused(here, told, name):
    (here / "run.yaml").write_text(YAML[name])
    assert told("train -c run.yaml --model model --data rows.json --output out")[0] == 2
    assert not (here / "out").exists()


def test_plain_aliases_are_fine(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: &rate 1e-3\nweight_decay: *rate\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lr": "1e-3", "weight_decay": "1e-3"}


@pytest.mark.parametrize("varied", [
    "product: {" + ", ".join(f"{k}: [{', '.join(map(str, range(1, 31)))}]" for k in ("lora_r", "seed", "epochs", "batch_size", "max_length")) + "}",
    f"zip: {{seed: [{', '.join(['1'] * 3000)}]}}",
    "product: {5: [1]}",
    "product: {seed: 5}",
    "test: {rows: 2, max_tokens: abc}",
    "test: [1]",
])  # fmt: skip
def test_a_sweep_out_of_proportion_is_refused_before_it_is_written_out(tmp_path, varied):
    (tmp_path / "s.yaml").write_text(f"base: {{model: m, data: d}}\n{varied}\n")
    with pytest.raises(UsageError):
        read_sweep(str(tmp_path / "s.yaml"), tmp_path / "out", {})
