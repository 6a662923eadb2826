"""Byte-level BPE (Qwen, GLM-4, GPT-2): from a tokenizer.json, from vocab.json and merges.txt, or from a list of ranks.

The work is done by the `tokenizers` library. Two encoders are kept: one that knows the special tokens, for the template's
own, and one that has none of them, for everybody's text.

Qwen-1 and GLM-4-9B ship a text file of `base64 rank` lines, the format of tiktoken. Their merges follow from the ranks: any
two neighbours that make a token together may merge, the lowest rank first. So each way to cut a token into two tokens is a
merge, in the order of the ranks.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import ModelError
from ..files.model_folder import MAX_JSON, ModelFolder, check_is_itself
from ..files.regular import open_file, read_file
from ..files.strict_json import parse_json
from .growth import check_growth, check_tokens

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# how text is cut before BPE: Qwen takes one digit at a time, GLM-4 up to three
QWEN_SPLIT, GLM_SPLIT = SPLIT.replace("DIGITS", r"\p{N}"), SPLIT.replace("DIGITS", r"\p{N}{1,3}")
# Qwen3.5 counts combining marks among the letters of a word
QWEN35_SPLIT = QWEN_SPLIT.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
# GPT-2's own, where each rule may take the blank in front, digits are a run, and a line end is no more than a blank
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN1_SPECIALS = (*QWEN_SPECIALS, *(f"<|extra_{i}|>" for i in range(205)))
GLM4_SPECIALS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
MOST_MERGED = 1 << 25  # bytes of all merges that follow from ranks; Qwen's have 2.1 million
QWEN_FIRST, QWEN35_FIRST = (
    151643,
    248044,
)  # the id of <|endoftext|>, after the vocabulary of Qwen1.5 to Qwen3, and of Qwen3.5


class Added(NamedTuple):
    """A token beside the vocabulary."""

    content: str
    id: int
    special: bool = True


class BytePairs:
    """Text to ids and back by two encoders of one vocabulary: `full` knows the added tokens, `plain` does not."""

    def __init__(
        self, full: tokenizers.Tokenizer, plain: tokenizers.Tokenizer, specials: dict[str, int], words: dict[str, int]
    ):
        for encoder in (full, plain):
            encoder.no_truncation()
            encoder.no_padding()
        self._full, self._plain, self.specials, self.words = full, plain, specials, words
        self.vocabulary = full.get_vocab(with_added_tokens=True)
        self.size = max(self.vocabulary.values()) + 1  # one more than the largest id

    @classmethod
    def of_json(cls, description: str, more: Iterable[Added] = ()) -> Self:
        """description: the text of a tokenizer.json; more: tokens beside the vocabulary that it may lack."""
        j = parse_json(description)
        check_growth(j)
        there = {t["content"] for t in j.get("added_tokens", [])}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        lacking = [
            {"id": t.id, "content": t.content, **flags, "special": t.special} for t in more if t.content not in there
        ]
        if "type" not in j["model"]:  # as in GPT-2's
            j["model"]["type"] = "BPE"
            description = json.dumps(j)
        if lacking:
            j["added_tokens"] = [*j.get("added_tokens", []), *lacking]
            description = json.dumps(j)
        specials = {t["content"]: t["id"] for t in j.get("added_tokens", [])}
        if j["model"]["type"] != "BPE" or j["model"].get("dropout"):
            raise ValueError("its model is not byte-level BPE, or drops merges at random")
        affixes = [str(j["model"].get(name)) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
        check_tokens([*j["model"]["vocab"], *affixes], specials)
        words = {t["content"]: t["id"] for t in j.get("added_tokens", []) if not t.get("special")}
        full = tokenizers.Tokenizer.from_str(description)
        if any(full.token_to_id(text) != i for text, i in specials.items()):
            # the library numbers added tokens one after the other, whatever the file says, unless the vocabulary has them
            j["model"]["vocab"] |= specials
            full = tokenizers.Tokenizer.from_str(json.dumps(j))
        plain = tokenizers.Tokenizer.from_str(json.dumps(j | {"added_tokens": [], "post_processor": None}))
        return cls(full, plain, specials, words)

    @classmethod
    def of_merges(
        cls, vocab: dict[str, int], merges: list[tuple[str, str]], split: str, nfc: bool, added: list[Added], **options
    ) -> Self:
        """vocab and merges in the letters of byte-level BPE; split and nfc: how text is cut and whether it is normalised."""
        check_tokens(vocab, [t.content for t in added])
        plain = around(models.BPE(vocab, merges, **options), split, nfc)
        full = around(models.BPE(vocab | {t.content: t.id for t in added}, merges, **options), split, nfc)
        for t in added:
            token = tokenizers.AddedToken(t.content, special=t.special, normalized=False)
            full.add_special_tokens([token]) if t.special else full.add_tokens([token])
        words = {t.content: t.id for t in added if not t.special}
        return cls(full, plain, {t.content: t.id for t in added}, words)

    @property
    def description(self) -> dict[str, Any]:
        """The tokenizer.json of the encoder that knows the added tokens."""
        return json.loads(self._full.to_str())

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a text, nothing added. Names of special tokens in it are plain text unless `specials` is set."""
        encoder = self._full if specials else self._plain
        with no_panic("tokenizer.json"):
            return encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], specials: bool = False) -> str:
        """The text of ids; special tokens are left out unless `specials` is set."""
        return self._full.decode(ids, skip_special_tokens=not specials)


@contextmanager
def no_panic(what: str) -> Iterator[None]:
    """ModelError for what the library makes of a crafted file: it panics, and its PanicException is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (ModelError, KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        name = Path(what).name
        raise ModelError(
            f"{what} is not a usable tokenizer: {str(error)[:200]}", f"Download or copy {name} again."
        ) from None


def load_json(folder: ModelFolder) -> BytePairs:
    """The tokenizer.json of a folder, with the tokens that its tokenizer_config.json adds."""
    path = folder / "tokenizer.json"
    with no_panic(str(path)):
        text = read_small(path)
        check_is_itself(path, text[:64])
        return BytePairs.of_json(text.decode("utf-8"), _added(folder, {}))


def load_merges(folder: ModelFolder) -> BytePairs:
    """The vocab.json and merges.txt of a Qwen or GPT-2 folder."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not merges.is_file():
        raise ModelError(f"{folder} has a vocab.json and no merges.txt", "Copy it from the model's folder.")
    with no_panic(str(vocab)):
        tokens, lines = (
            parse_json(read_small(vocab)),
            read_small(merges).decode("utf-8").replace("\r\n", "\n").split("\n"),
        )
        halves = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        pairs = [(first, second) for first, second in halves]
        if folder.config.get("model_type") == "gpt2":  # whose vocabulary has <|endoftext|> in it, as its last token
            added = _added(folder, {t: i for t, i in tokens.items() if t == QWEN_SPECIALS[0]})
            return BytePairs.of_merges(tokens, pairs, GPT2_SPLIT, False, added)
        newer = str(folder.config.get("model_type")).startswith("qwen3_5")
        split, first = (QWEN35_SPLIT, QWEN35_FIRST) if newer else (QWEN_SPLIT, QWEN_FIRST)
        added = _added(folder, dict(zip(QWEN_SPECIALS, range(first, 1 << 30), strict=False)))
        return BytePairs.of_merges(tokens, pairs, split, True, added)


def load_qwen1(folder: ModelFolder) -> BytePairs:
    """The qwen.tiktoken of a Qwen-1 folder."""
    return _load_ranks(folder, folder / "qwen.tiktoken", QWEN_SPLIT, True, QWEN1_SPECIALS)


def load_glm4(folder: ModelFolder) -> BytePairs:
    """The tokenizer.model of a GLM-4-9B folder in the layout of its original code."""
    return _load_ranks(folder, folder / "tokenizer.model", GLM_SPLIT, False, GLM4_SPECIALS)


def _load_ranks(folder: ModelFolder, path: Path, split: str, nfc: bool, specials: tuple[str, ...]) -> BytePairs:
    ranks = read_ranks(path)
    with no_panic(str(path)):
        check_tokens(ranks)
        letters = _letters()
        text = {token: "".join(letters[b] for b in token) for token in ranks}
        vocab = {text[token]: rank for token, rank in ranks.items()}
        added = _added(folder, {t: len(ranks) + i for i, t in enumerate(specials)})
        # a whole word that is a token is taken as it is, even where no merges lead to it
        return BytePairs.of_merges(vocab, list(_merges(text)), split, nfc, added, ignore_merges=True)


def _merges(text: dict[bytes, str]) -> Iterator[tuple[str, str]]:
    """Each way to cut a token into two tokens; ValueError for far more of them than a vocabulary has."""
    length = 0
    for token in text:
        for i in range(1, len(token)):
            if token[:i] in text and token[i:] in text:
                length += len(token)
                if length > MOST_MERGED:
                    raise ValueError("its tokens can be cut into each other in far more ways than those of any model")
                yield text[token[:i]], text[token[i:]]


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a file of `base64 rank` lines, in the order of their ranks 0, 1, 2 ...; ModelError names a bad line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_small(path).splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ModelError(f"{path}, line {number}: no token and rank", "Download or copy the file again.") from None
        if int(rank) != len(ranks) - 1:
            raise ModelError(
                f"{path}, line {number}: rank {int(rank)}; {number - 1} belongs there, and each token once",
                "Download or copy the file again.",
            )
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ModelError(f"{path}: not every byte has a token", "Download or copy the file again.")
    return ranks


def is_ranks(path: Path) -> bool:
    """Whether a tokenizer.model is a text file of ranks (GLM-4) and not a SentencePiece model (ChatGLM2, ChatGLM3)."""
    with open_file(path, ModelError) as file:
        token, _, rank = file.readline(200).strip().partition(b" ")
    return rank.isdigit() and token.isascii() and token[:1].isalnum()


def read_small(path: Path) -> bytes:
    """A tokenizer's file; ModelError if it is too large to be one."""
    return read_file(path, ModelError, MAX_JSON)


def _letters() -> list[str]:
    """The character that byte-level BPE writes for each byte: printable Latin-1 as it is, the others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def qwen_tokenizer(bpe: models.BPE) -> tokenizers.Tokenizer:
    """A byte-level BPE model with what Qwen puts around it: NFC, its way to cut text, bytes as characters."""
    return around(bpe, QWEN_SPLIT, nfc=True)


def around(bpe: models.BPE, pattern: str, nfc: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE model behind a way to cut text."""
    built = tokenizers.Tokenizer(bpe)
    if nfc:
        built.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    built.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return built


def _added(folder: ModelFolder, usual: dict[str, int]) -> list[Added]:
    """The tokens beside the vocabulary, by their ids: those of tokenizer_config.json, or the usual ones."""
    tokens = [Added(content, i) for content, i in usual.items()]
    table = folder.tokenizer_config.get("added_tokens_decoder")
    if table:
        tokens = [Added(t["content"], int(i), bool(t.get("special"))) for i, t in table.items()]
    return sorted(tokens, key=lambda t: t.id)
