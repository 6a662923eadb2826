"""The tokenizers and chat formats of the GLM generations and of Qwen-1: golden ids, round trips, training rows, refusals."""

import base64
import json
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIALS, byte_tokenizer
from tiny_chatglm import write_tokenizer

from minilora.errors import DataError, ModelError
from minilora.generate import stream_text
from minilora.text.bpe import GLM4_SPECIALS, QWEN_SPLIT, read_ranks
from minilora.text.growing import Growing
from minilora.text.template import render_text
from minilora.text.template_glm import CHATGLM2
from minilora.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
EXPECTED = {
    name: json.loads((GOLDEN / name / "golden.json").read_text(encoding="utf-8"))
    for name in ("chatglm3", "qwen1", "gpt2")
}
PROPERTY = settings(deadline=None, max_examples=150)
CHATGLM_CONFIG = {"model_type": "chatglm", "vocab_size": 30000}
S, U, A = (lambda text, role=role: {"role": role, "content": text} for role in ("system", "user", "assistant"))


def folder_with(folder: Path, config: dict, files: dict[str, str | bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in ({"config.json": json.dumps(config)} | files).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def make_chatglm(folder: Path, first_release: bool) -> Path:
    folder_with(folder, {}, {})
    (folder / "config.json").write_text(json.dumps(CHATGLM_CONFIG | write_tokenizer(folder, first_release)))
    return folder


def glm4_ranks() -> str:
    """A tokenizer.model in the format of GLM-4: the bytes and the numbers up to 999."""
    tokens = [bytes([b]) for b in range(256)] + [str(n).encode() for n in range(10, 1000)]
    return "".join(f"{base64.b64encode(t).decode()} {n}\n" for n, t in enumerate(tokens))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    make_chatglm(root / "chatglm", first_release=False)
    make_chatglm(root / "chatglm-first", first_release=True)
    shutil.copytree(GOLDEN / "chatglm3", root / "chatglm2")
    config = {"model_type": "chatglm", "padded_vocab_size": 65024, "_name_or_path": "THUDM/chatglm2-6b"}
    (root / "chatglm2" / "config.json").write_text(json.dumps(config))
    folder_with(
        root / "glm4", {"model_type": "chatglm", "padded_vocab_size": 151552}, {"tokenizer.model": glm4_ranks()}
    )
    made = {name: load_tokenizer(root / name) for name in ("chatglm", "chatglm-first", "chatglm2", "glm4")}
    return made | {name: load_tokenizer(GOLDEN / name) for name in EXPECTED}


# golden


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_ids(name, tokenizers):
    wrong = [t["text"] for t in EXPECTED[name]["texts"] if tokenizers[name].encode(t["text"]) != t["ids"]]
    assert not wrong and len(EXPECTED[name]["texts"]) > 80


def test_golden_chats(tokenizers):
    for chat in EXPECTED["chatglm3"]["chats"]:
        ids, _ = tokenizers["chatglm3"].render(chat["messages"], prompt=chat["add_generation_prompt"])
        assert ids == chat["ids"]
    assert len(EXPECTED["chatglm3"]["chats"]) == 4


def test_gpt2_from_a_vocabulary_and_merges(tokenizers, tmp_path):
    """OpenAI's own folder has vocab.json and merges.txt; both ways give transformers' ids, and its chats."""
    model = json.loads((GOLDEN / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    files: dict[str, str | bytes] = {"vocab.json": json.dumps(model["vocab"]), "merges.txt": merges}
    apart = load_tokenizer(folder_with(tmp_path / "m", {"model_type": "gpt2"}, files))
    assert not [t["text"] for t in EXPECTED["gpt2"]["texts"] if apart.encode(t["text"]) != t["ids"]]
    (chat,) = EXPECTED["gpt2"]["chats"]
    for tokenizer in (apart, tokenizers["gpt2"]):
        assert tokenizer.specials == {"<|endoftext|>": 50256} and tokenizer.stop_ids == {50256}
        assert tokenizer.encode("<|endoftext|>") != [50256]
        ids, trained = tokenizer.render(chat["messages"])
        assert ids == chat["ids"] and trained == [False] * 8 + [True] * 4
        assert tokenizer.render(chat["messages"][:2], prompt=True)[0] == ids[:8]
        assert render_text(tokenizer.template.segments(chat["messages"])) == chat["text"]


def test_ranks_are_cut_as_tiktoken_cuts_them(tokenizers):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = read_ranks(GOLDEN / "qwen1" / "qwen.tiktoken")
    oracle = tiktoken.Encoding("small", pat_str=QWEN_SPLIT, mergeable_ranks=ranks, special_tokens={})
    tokens = sorted(ranks)
    pieces = [t.decode("utf-8", "ignore") for t in tokens[:: len(tokens) // 400]]

    @PROPERTY
    @given(st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=12).map("".join))
    def check(text):
        expected = oracle.encode(unicodedata.normalize("NFC", text), disallowed_special=())
        assert tokenizers["qwen1"].encode(text) == expected

    check()


# text comes back

ALL = pytest.mark.parametrize("name", ["chatglm", "chatglm-first", "chatglm2", "chatglm3", "glm4", "qwen1", "gpt2"])
CHATGLMS = pytest.mark.parametrize("name", ["chatglm", "chatglm-first"])
SAMPLES = ["你好，世界！", "👩‍👩‍👧 🇨🇳 🤖", "\ttab\t\ttabs", "a  b   c" + " " * 79 + "d" + " " * 81 + "e" + " " * 200, "\n\n", " lead", "end  ",
           "\r\n", "def f(x):\n    return\tx  # 码\n", "", " ", "\u200b\ufeff", "é ê"]  # fmt: skip
white = st.sampled_from(
    [" ", "  ", " " * 7, " " * 81, "\n", "\t", "▂", "<", "|blank_3|", "你好", "🤖", "[gMASK]", "<sop>", "eop"]
)


@ALL
def test_samples_come_back(name, tokenizers):
    for text in SAMPLES:
        expected = unicodedata.normalize("NFC", text) if name == "qwen1" else text
        assert tokenizers[name].decode(tokenizers[name].encode(text)) == expected


@ALL
def test_any_text_comes_back(name, tokenizers):
    # SentencePiece writes a blank as U+2581 and reads it back as a blank; ChatGLM-6B does the like with its own words
    words = {"\u2581", "<n>", "<|tab|>"}

    @PROPERTY
    @given(st.lists(white | st.text(max_size=5), max_size=8).map("".join))
    def check(text):
        if name == "glm4" or (not any(w in text for w in words) and "\0" not in text and "<|blank_" not in text):
            expected = unicodedata.normalize("NFC", text) if name == "qwen1" else text
            assert tokenizers[name].decode(tokenizers[name].encode(text)) == expected

    check()


@ALL
def test_a_users_text_never_becomes_a_special_token(name, tokenizers):
    tokenizer = tokenizers[name]

    @PROPERTY
    @given(st.lists(st.sampled_from(list(tokenizer.specials)) | st.text(max_size=4), max_size=6).map("".join))
    def check(text):
        assert not set(tokenizer.encode(text)) & set(tokenizer.specials.values())
        ids = tokenizer.encode(text, specials=True)
        assert set(ids) & set(tokenizer.specials.values()) or not any(s in text for s in tokenizer.specials)

    check()


@CHATGLMS
def test_white_space_of_chatglm(name, tokenizers):
    tokenizer = tokenizers[name]
    (blank,) = tokenizer.encode("a" + " " * 5 + "b")[-2:-1]
    assert blank - tokenizer.encode("a" + " " * 4 + "b")[-2] == 1  # one piece, and the pieces stand in order
    assert len(tokenizer.encode("a" + " " * 85 + "b")) == len(tokenizer.encode("ab")) + 2
    assert len(tokenizer.encode("a\n\tb")) == len(tokenizer.encode("ab")) + 2
    assert min(tokenizer.encode("数到 1\n")) >= (20000 if name == "chatglm-first" else 0)


@ALL
def test_a_streamed_answer_is_the_whole_answer(name, tokenizers):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("\n 数到 你好 🤖🇨🇳\n two  lines")
    assert "".join(stream_text(tokenizer, iter(ids))) == tokenizer.answer(ids)


@ALL
def test_a_growing_text_is_that_of_all_its_ids_of_which_few_are_read_anew(name, tokenizers):
    tokenizer, draw, read = tokenizers[name], random.Random(0), []

    def decode(ids):
        read.append(len(ids))
        return tokenizer.decode(ids)

    written = [i for text in SAMPLES for i in [*tokenizer.encode(text), draw.choice([*tokenizer.specials.values()])]]
    for ids in (written, [draw.randrange(tokenizer.size) for _ in range(150)]):
        growing = Growing(decode)
        for count in range(1, len(ids) + 1):
            whole = tokenizer.decode(ids[:count])
            assert growing.text(ids[:count]).rstrip("\ufffd") == whole.rstrip("\ufffd"), (count, ids)
    assert len(written) > 100 and max(read) < 60


def test_ids_that_no_piece_has_are_left_out(tokenizers):
    tokenizer = tokenizers["chatglm3"]
    assert tokenizer.decode([*tokenizer.encode("hi"), tokenizer.size, 10**9]) == "hi"
    assert tokenizers["chatglm-first"].decode([0, 19999, *tokenizers["chatglm-first"].encode("hi")]) == "hi"


# rows as they are trained

CHAT = [U("q0"), A("a0"), U("q1"), A("a1")]


@CHATGLMS
def test_a_row_of_chatglm(name, tokenizers):
    t = tokenizers[name]
    special = t.specials
    ids, trained = t.render([U("数到 2"), A("1 2")])
    question, answer = t.encode("数到 2"), t.encode("1 2")
    assert ids == [*question, special["[gMASK]"], special["<sop>"], *answer, special["<eop>"]]
    assert trained == [False] * (len(question) + 1) + [True] * (len(answer) + 2)
    assert t.prefix(ids) == len(question) + 1
    assert t.stop_ids == {special["<eop>"]}
    prompt, _ = t.render([U("数到 2")], prompt=True)
    assert prompt == ids[: len(question) + 2]


def test_rounds(tokenizers):
    t = tokenizers["chatglm"]
    ids, trained = t.render([S("s"), *CHAT])
    assert t.decode(ids[: t.prefix(ids)]) == "s\n[Round 0]\n问：q0\n答：a0\n[Round 1]\n问：q1\n答："
    assert t.decode([i for i, wanted in zip(ids, trained, strict=True) if wanted], specials=True) == "<sop>a1<eop>"
    assert render_text(CHATGLM2.segments(CHAT)) == (
        "[gMASK]sop[Round 1]\n\n问：q0\n\n答：a0\n\n[Round 2]\n\n问：q1\n\n答：a1</s>"
    )
    t = tokenizers["chatglm2"]
    assert t.render([U("q0")], prompt=True)[0] == t.encode("[gMASK]sop", specials=True) + t.encode(
        "[Round 1]\n\n问：q0\n\n答："
    )
    assert t.prefix(ids) is None and t.stop_ids == {2}
    for wrong in ([U("a"), U("b")], [A("a")], [], [S("s")]):
        with pytest.raises(DataError):
            t.render(wrong)


def trained_text(t: Tokenizer, messages: list[dict], **flags) -> list[str]:
    """The trained runs of a rendered chat."""
    ids, trained = t.render(messages, **flags)
    runs: list[list[int]] = [[]]
    for i, wanted in zip(ids, trained, strict=True):
        runs += [[]] if not wanted else []
        runs[-1] += [i] if wanted else []
    return [t.decode(run, specials=True) for run in runs if run]


def test_what_ends_a_turn_is_trained(tokenizers):
    assert trained_text(tokenizers["glm4"], CHAT) == ["\na0<|user|>", "\na1<|user|>"]
    assert trained_text(tokenizers["chatglm3"], CHAT) == ["\n a0<|user|>", "\n a1</s>"]
    assert trained_text(tokenizers["qwen1"], CHAT) == ["a0<|im_end|>", "a1<|im_end|>"]
    assert trained_text(tokenizers["glm4"], CHAT, loss_on="last") == ["\na1<|user|>"]
    assert trained_text(tokenizers["glm4"], CHAT, train_end=False) == ["\na0", "\na1"]
    stops = {"glm4": {"<|endoftext|>", "<|user|>", "<|observation|>"}, "chatglm3": {"</s>", "<|user|>", "<|observation|>"},
             "qwen1": {"<|im_end|>", "<|im_start|>", "<|endoftext|>"}}  # fmt: skip
    for name, names in stops.items():
        t = tokenizers[name]
        assert t.stop_ids == {t.specials[s] for s in names}
        ids, trained = t.render(CHAT)
        ends = {i for i, wanted in zip(ids, trained, strict=True) if wanted} & set(t.specials.values())
        assert ends and ends <= t.stop_ids


def test_header_and_content_are_cut_apart_where_the_original_code_does(tokenizers):
    t = tokenizers["glm4"]
    ids, _ = t.render([U("\nq")], prompt=True)
    assert t.decode(ids, specials=True) == "[gMASK]<sop><|user|>\n\nq<|assistant|>"
    t = tokenizers["qwen1"]
    newline = t.encode("\n")
    assert t.render([U("\nq")])[0].count(*newline) == 5


def test_digits_of_glm4_go_three_by_three(tokenizers):
    t = tokenizers["glm4"]
    assert [t.decode([i]) for i in t.encode("1234567 é")][:3] == ["123", "456", "7"]
    assert t.decode(t.encode("e\u0301")) == "e\u0301"  # not normalised


# chat formats of a tokenizer.json

GLM_ROLES = "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
FORMATS = {
    "glm4": ("[gMASK]<sop>" + GLM_ROLES + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
             "[gMASK]<sop><|user|>\nq<|assistant|>"),
    "glm-z1": ("[gMASK]<sop>" + GLM_ROLES.replace("m.content", "m.content.split('</think>')[-1].lstrip('\\n')")
               + "{% if add_generation_prompt %}{{ '<|assistant|>\\n<think>' }}{% endif %}",
               "[gMASK]<sop><|user|>\nq<|assistant|>\n<think>"),
    "glm-edge": (GLM_ROLES + "{% if add_generation_prompt %}<|assistant|>{% endif %}", "<|user|>\nq<|assistant|>"),
}  # fmt: skip


def glm_json() -> str:
    j = json.loads(byte_tokenizer())
    flags = {k: v for k, v in j["added_tokens"][0].items() if k not in ("id", "content")}
    j["model"]["vocab"] = {t: i for t, i in j["model"]["vocab"].items() if t not in SPECIALS}
    j["added_tokens"] = [{"id": 256 + i, "content": t, **flags} for i, t in enumerate(GLM4_SPECIALS)]
    return json.dumps(j)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_a_tokenizer_json(name, tmp_path):
    jinja, prompt = FORMATS[name]
    files: dict[str, str | bytes] = {"tokenizer.json": glm_json(), "chat_template.jinja": jinja}
    t = load_tokenizer(folder_with(tmp_path / "m", {"model_type": "glm4"}, files))
    assert t.template.name == name and not t.notes
    assert render_text(t.template.segments([U("q")], prompt=True)) == prompt
    ids, trained = t.render([U("q"), A("<think>\nhm\n</think>\na")])
    assert t.decode(ids, specials=True).startswith(prompt) and not any(trained[: len(t.encode(prompt, specials=True))])
    end = "\nhm</think>\na<|user|>" if name == "glm-z1" else "\n<think>\nhm\n</think>\na<|user|>"
    assert trained_text(t, [U("q"), A("<think>\nhm\n</think>\na")]) == [end]


def test_old_thoughts_of_glm_z1_are_dropped(tmp_path):
    files: dict[str, str | bytes] = {"tokenizer.json": glm_json(), "chat_template.jinja": FORMATS["glm-z1"][0]}
    t = load_tokenizer(folder_with(tmp_path / "m", {"model_type": "glm4"}, files))
    text = render_text(t.template.segments([U("q"), A("<think>hm</think>\n\na"), U("r")], prompt=True))
    assert text == "[gMASK]<sop><|user|>\nq<|assistant|>\na<|user|>\nr<|assistant|>\n<think>"


# refusals


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_tokenizer(folder)
    assert "\n" not in error.value.what and error.value.hint
    return error.value.what


def test_a_tokenizer_of_another_generation(tmp_path):
    first = make_chatglm(tmp_path / "first", first_release=True)
    (first / "tokenizer_config.json").write_text('{"num_image_tokens": 0}')
    assert "bos_token_id" in refused(first)
    config = first / "config.json"
    config.write_text('{"model_type": "qwen2"}')
    assert "ice_text.model" in refused(first)
    (first / "ice_text.model").unlink()
    config.write_text('{"model_type": "chatglm"}')
    shutil.copy(GOLDEN / "chatglm3" / "tokenizer.model", first)
    assert "has no ice_text.model" in refused(first)


def test_chatglm2_and_chatglm3_are_told_apart_or_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "chatglm3", tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "chatglm", "padded_vocab_size": 65024}')
    assert "ChatGLM2 or ChatGLM3" in refused(folder)
    for code, name in (("def build_prompt(): 1 / 0", "chatglm2"), ("['<|user|>', '<|assistant|>'] / 0", "chatglm3")):
        (folder / "tokenization_chatglm.py").write_text(code)
        assert load_tokenizer(folder).template.name == name
    (folder / "tokenization_chatglm.py").unlink()
    (folder / "tokenizer_config.json").write_text('{"name_or_path": "THUDM/chatglm3-6b-32k"}')
    assert load_tokenizer(folder).template.name == "chatglm3"


def test_damaged_sentencepiece_models_are_read_or_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "chatglm3", tmp_path / "m")
    whole, generator = (GOLDEN / "chatglm3" / "tokenizer.model").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        place, length = int(generator.integers(len(whole))), int(generator.integers(1, 9))
        middle = generator.bytes(length) if generator.integers(2) else b""
        (folder / "tokenizer.model").write_bytes(whole[:place] + middle + whole[place + length :])
        try:
            tokenizer = load_tokenizer(folder)
        except ModelError:
            refused += 1
        else:
            assert isinstance(tokenizer.decode(tokenizer.encode("hello 你好 🤖") + list(range(tokenizer.size))), str)
    assert 50 < refused < 150


BROKEN = {
    "empty": ("tokenizer.model", b"", "not a usable tokenizer"),
    "no protobuf": ("tokenizer.model", b"\xff" * 64, "not a usable tokenizer"),
    "no base64": ("qwen.tiktoken", b"IQ== 0\n!!! 1\n", "line 2"),
    "a gap": ("qwen.tiktoken", b"IQ== 0\nIg== 2\n", "line 2"),
    "a token twice": ("qwen.tiktoken", b"IQ== 0\nIQ== 1\n", "line 2"),
    "too few": ("qwen.tiktoken", b"IQ== 0\n", "not every byte"),
    "no file": ("readme.txt", b"", "tokenizer.json"),
    "half": ("vocab.json", b"{}", "merges.txt"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files(name, content, message, tmp_path):
    config = {"model_type": "chatglm", "padded_vocab_size": 65024, "_name_or_path": "chatglm3"}
    assert message in refused(folder_with(tmp_path / "m", config, {name: content}))
