"""Text to ids and back, and whole chats to ids with a mask of what is trained.

The work is done by the `tokenizers` library on the folder's tokenizer.json (or vocab.json and merges.txt). Two encoders are
kept: one that knows the special tokens, for the template's own, and one that has none of them, for everybody's text.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from .checkpoint import MAX_JSON, check_folder, read_json
from .errors import ModelError
from .template import Message, Segment, Template, template_of

# how Qwen cuts text before byte-level BPE: one digit at a time
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


class Tokenizer:
    """The tokenizer of a checkpoint folder and its chat template."""

    def __init__(self, description: str, template: Template):
        """description: the text of a tokenizer.json."""
        j = json.loads(description)
        self.template = template
        self.specials = {t["content"]: t["id"] for t in j.get("added_tokens", [])}
        full = tokenizers.Tokenizer.from_str(description)
        if any(full.token_to_id(text) != i for text, i in self.specials.items()):
            # the library numbers added tokens one after the other, whatever the file says, unless the vocabulary has them
            j["model"]["vocab"] |= self.specials
            full = tokenizers.Tokenizer.from_str(json.dumps(j))
        plain = tokenizers.Tokenizer.from_str(json.dumps(j | {"added_tokens": [], "post_processor": None}))
        for encoder in (full, plain):
            encoder.no_truncation()
            encoder.no_padding()
        self._full, self._plain = full, plain

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._full.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a text, nothing added. Names of special tokens in it are plain text unless `specials` is set."""
        encoder = self._full if specials else self._plain
        with _no_panic("tokenizer.json"):
            return encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], specials: bool = False) -> str:
        """The text of ids; special tokens are left out unless `specials` is set."""
        return self._full.decode(ids, skip_special_tokens=not specials)

    def render(
        self, messages: list[Message], prompt: bool = False, thinking: bool = False, loss_on: str = "all"
    ) -> tuple[list[int], list[bool]]:
        """The ids of a chat and, for each, whether it is trained: the answers and the token that ends each of them.

        prompt opens the assistant's next turn. loss_on is "all" (every answer) or "last"; a message's own "loss" key wins.
        """
        segments = self.template.segments(messages, prompt, thinking)
        last = max((s.answer for s in segments if s.answer is not None), default=None)
        ids, trained = [], []
        # plain neighbours of one kind are cut into tokens together, as one text
        for (special, answer), group in groupby(segments, key=lambda s: (s.special, s.answer)):
            new = self._encode_group(special, group)
            ids += new
            wanted = answer is not None and messages[answer].get("loss", loss_on == "all" or answer == last)
            trained += [wanted] * len(new)
        return ids, trained

    def _encode_group(self, special: bool, group: Any) -> list[int]:
        texts = [s.text for s in group]
        if not special:
            return self.encode("".join(texts))
        missing = [t for t in texts if t not in self.specials]
        if missing:
            raise ModelError(
                f"the tokenizer has no token {missing[0]!r}",
                "The tokenizer and the model are of two generations.",
            )
        return [self.specials[t] for t in texts]

    @property
    def stop_ids(self) -> set[int]:
        """The ids that end an assistant's turn, by the template."""
        return {self.specials[t] for t in (self.template.stop, "<|endoftext|>") if t in self.specials}


def render_text(segments: list[Segment]) -> str:
    """The text of a rendered chat, as a Jinja template would write it."""
    return "".join(s.text for s in segments)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The Tokenizer of a checkpoint folder; ModelError if it has none or the file is broken."""
    folder = Path(folder)
    check_folder(folder)
    path = folder / "tokenizer.json"
    with _no_panic(str(path)):
        description = _description(folder)
        specials = {t["content"] for t in json.loads(description).get("added_tokens", [])}
        model_type = read_json(folder / "config.json").get("model_type")
        return Tokenizer(description, template_of(folder, specials, model_type))


@contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """ModelError for what the library makes of a crafted file: it panics, and its PanicException is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (ModelError, KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ModelError(
            f"{what} is no usable tokenizer: {str(error)[:200]}", "Download or copy tokenizer.json again."
        ) from None


def check_fits(tokenizer: Tokenizer, vocab: int, folder: Path) -> None:
    """ModelError if the tokenizer has more ids than the model has rows."""
    if tokenizer.size > vocab:
        raise ModelError(f"{folder}: the tokenizer has ids up to {tokenizer.size - 1}, the model {vocab} rows",
                         "They are of two generations: take both from one folder.")  # fmt: skip


def _description(folder: Path) -> str:
    path = folder / "tokenizer.json"
    if path.is_file():
        if path.stat().st_size > MAX_JSON:
            raise ModelError(f"{path} is larger than {MAX_JSON >> 20} MiB", "It is not the file it should be.")
        return path.read_text(encoding="utf-8")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        raise ModelError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt",
            "Copy them from the model's folder.",
        )
    built = qwen_tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    j = json.loads(built.to_str())
    j["added_tokens"] = [
        {"id": i, "content": content, "special": special, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for content, i, special in _added_tokens(folder)
    ]  # fmt: skip
    return json.dumps(j)


def qwen_tokenizer(bpe: models.BPE) -> tokenizers.Tokenizer:
    """A byte-level BPE model with what Qwen puts around it: NFC, its way to cut text, bytes as characters."""
    built = tokenizers.Tokenizer(bpe)
    built.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    built.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return built


def _added_tokens(folder: Path) -> list[tuple[str, int, bool]]:
    """(text, id, special) of the tokens beside the vocabulary: of tokenizer_config.json, or the three that Qwen always has."""
    if (folder / "tokenizer_config.json").is_file():
        table = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        if table:
            return sorted(
                ((t["content"], int(i), bool(t.get("special"))) for i, t in table.items()), key=lambda t: t[1]
            )
    return [(content, i, True) for content, i in QWEN_SPECIALS.items()]
