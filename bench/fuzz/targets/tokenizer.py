"""A tokenizer's own file, by what it begins with: a tokenizer.json, the ranks of Qwen-1, or a SentencePiece model; and three texts through it."""

import json
import shutil
from pathlib import Path

from minilora.files.model_folder import ModelFolder
from minilora.text.tokenizer import load_tokenizer

from ..room import ROOM, fresh, tiny

GOLDEN = Path(__file__).parents[3] / "tests" / "golden" / "tokenizers"
TEXTS = (
    "Hello world, 你好 123\n\n",
    "",
    "<|im_end|>é\u0301\u200d\0 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
)
WORDS = ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens", "truncation", "padding", "type", "Sequence", "NFC", "NFKC", "Lowercase",
         "Replace", "Prepend", "Strip", "StripAccents", "BertNormalizer", "Precompiled", "ByteLevel", "Metaspace", "Split", "Digits", "WhitespaceSplit", "Whitespace",
         "Punctuation", "CharDelimiterSplit", "UnicodeScripts", "FixedLength", "TemplateProcessing", "BertProcessing", "RobertaProcessing", "BPE", "Unigram", "WordPiece",
         "WordLevel", "Fuse", "ByteFallback", "WordPieceDecoder", "CTC", "pattern", "Regex", "String", "(a+)+$", "(?=.)*", "content", "behavior", "invert", "vocab", "merges",
         "unk_token", "fuse_unk", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "a a", "single", "pair", "special_tokens",
         "normalizers", "pretokenizers", "processors", "decoders", "length", "id", "special", "single_word", "lstrip", "normalized"]  # fmt: skip
SEEDS: list[bytes] = []


def prepare() -> None:
    j = json.loads((tiny() / "tokenizer.json").read_text())
    vocab = {token: i for token, i in j["model"]["vocab"].items() if i % 3 == 0 or token in "abc"}
    small = j | {"model": j["model"] | {"vocab": vocab | {"ab": 300, "abc": 301}, "merges": [["a", "b"], ["ab", "c"]]}}
    ways = [
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"}, {"type": "Lowercase"}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "\\d"}, "behavior": "Isolated", "invert": False},
                                                                 {"type": "FixedLength", "length": 5}, {"type": "Digits", "individual_digits": True}]}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                            "pair": [], "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [258], "tokens": ["<|im_end|>"]}}}},
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["ab", -2.0]], "byte_fallback": False}},
        {"model": {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"a": 0, "##b": 1}}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Fuse"}, {"type": "ByteFallback"}]}},
    ]  # fmt: skip
    SEEDS[:] = [json.dumps(small | way, ensure_ascii=False).encode() for way in ({}, *ways)]
    SEEDS.append((GOLDEN / "qwen1" / "qwen.tiktoken").read_bytes())
    SEEDS.append((GOLDEN / "chatglm3" / "tokenizer.model").read_bytes())
    for name in ("qwen1", "chatglm3"):
        shutil.copytree(GOLDEN / name, ROOM / f"golden-{name}", dirs_exist_ok=True)


def target(data: bytes) -> None:
    if data[:1] == b"{":
        name, base = "tokenizer.json", tiny()
    elif data[:2].isalnum() or data[:1] in b"I/+":
        name, base = "qwen.tiktoken", ROOM / "golden-qwen1"
    else:
        name, base = "tokenizer.model", ROOM / "golden-chatglm3"
    folder = fresh("tokenizer")
    shutil.copyfile(base / "config.json", folder / "config.json")
    (folder / name).write_bytes(data)
    tokenizer = load_tokenizer(ModelFolder(folder))
    for text in TEXTS:
        for specials in (False, True):
            ids = tokenizer.encode(text, specials)
            assert all(0 <= i < tokenizer.size for i in ids)
            tokenizer.decode(ids, specials)
    tokenizer.render([{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[2]}])
