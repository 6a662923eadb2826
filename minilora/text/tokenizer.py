"""Text to ids and back, and whole chats to ids with a mask of what is trained.

A Tokenizer is a coder (bpe.py: byte-level BPE, pieces.py: SentencePiece) and a chat template. Which ones a folder has is
told by the names of its files, and for ChatGLM2 and ChatGLM3, whose files are the same, by what else it says.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

from ..errors import ModelError, quote
from ..files.hub_cache import check_namesake
from ..files.model_folder import Folder, ModelFolder, read_json
from . import bpe, pieces
from .own_template import choose
from .template import Call, Message, Segment, Template, jinja_note, jinja_text
from .template_glm import CHATGLM, CHATGLM2, CHATGLM3, GLM4_OWN, glm_formats
from .template_plain import PLAIN
from .template_qwen import QWEN1, qwen_formats

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "ice_text.model", "qwen.tiktoken")
# what an adapter's folder may have of its own, and then goes before the model's
REPLACED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"


class Coder(Protocol):
    """Text to ids and back. specials: the ids of the special tokens; size: one more than the largest id."""

    specials: dict[str, int]
    size: int

    def encode(self, text: str, specials: bool = False) -> list[int]: ...
    def decode(self, ids: list[int], specials: bool = False) -> str: ...


class Tokenizer:
    """The tokenizer of a checkpoint folder and its chat template.

    notes: lines for a header, by name: in what the folder's own chat template differs from the built-in one, and what is an
    adapter's. replaced: the files, by name, that belong to this tokenizer instead of the folder's.
    """

    def __init__(self, coder: Coder, template: Template):
        self.coder, self.template = coder, template
        self.notes: dict[str, str] = {}
        self.replaced: dict[str, bytes] = {}
        self.specials, self.size = coder.specials, coder.size
        self._words: dict[str, int] = getattr(coder, "words", {})
        self._names = re.compile(f"({'|'.join(map(re.escape, sorted(self.specials, key=len, reverse=True)))})")

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a text, nothing added. Names of special tokens in it are plain text unless `specials` is set."""
        return self.coder.encode(text, specials)

    def encode_answer(self, text: str) -> list[int]:
        """The ids of what an assistant says: added tokens that are no special ones (<tool_call>, <think>, a user's own) are themselves.

        They are the model's to write; in anybody else's text they stay text, as special tokens do everywhere.
        """
        if not self._words:
            return self.encode(text)
        longest_first = sorted(self._words, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        return [i for n, piece in enumerate(pieces) for i in ([self._words[piece]] if n % 2 else self.encode(piece))]

    def decode(self, ids: list[int], specials: bool = False) -> str:
        """The text of ids; special tokens are left out unless `specials` is set."""
        return self.coder.decode(ids, specials)

    def answer(self, ids: list[int]) -> str:
        """What the assistant said with the ids that it generated after a prompt."""
        return self.template.answer_of(self.decode(ids))

    def reply(self, ids: list[int], tools: list[dict]) -> tuple[str, list[Call]]:
        """What the assistant said beside calls, and its calls, with the ids that it generated after a prompt."""
        said, calls = self.template.tools.read(self.decode_marks(ids), tools)
        return self.template.answer_of(said), calls

    def decode_marks(self, ids: list[int]) -> str:
        """The text of ids, with those special tokens that mark calls."""
        marks = {self.specials[m]: m for m in self.template.tools.marks if m in self.specials}
        pieces = [
            "".join(marks[i] for i in run) if marked else self.decode(list(run))
            for marked, run in groupby(ids, key=lambda i: i in marks)
        ]
        return "".join(pieces)

    def render(
        self,
        messages: list[Message],
        prompt: bool = False,
        thinking: bool = False,
        loss_on: str = "all",
        train_end: bool = True,
    ) -> tuple[list[int], list[bool]]:
        """The ids of a chat and, for each, whether it is trained: the answers and, with train_end, the token that ends each.

        prompt opens the assistant's next turn. loss_on is "all" (every answer that the template can train) or "last"; a
        message's own "loss" key wins.
        """
        segments = self._split(self.template.segments(messages, prompt, thinking))
        last = max((s.answer for s in segments if s.answer is not None), default=None)
        ids, trained = [], []
        # plain neighbours of one kind are cut into tokens together, as one text, unless the template keeps them apart
        numbered = enumerate(segments)
        for (special, answer, _), group in groupby(
            numbered, key=lambda n: (n[1].special, n[1].answer, n[0] if self.template.apart else 0)
        ):
            texts = [s.text for _, s in group]
            new = self._encode_group(special, texts, answer is not None)
            ids += new
            wanted = answer is not None and messages[answer].get("loss", loss_on == "all" or answer == last)
            ends = [text in self.template.stops for text in texts] if special else [False] * len(new)
            trained += [wanted and (train_end or not end) for end in ends]
        return ids, trained

    def _split(self, segments: list[Segment]) -> list[Segment]:
        """The segments, those in the template's own words cut into the tokens that these name and the text between."""
        found = []
        for segment in segments:
            pieces = self._names.split(segment.text) if segment.own and self.specials else [segment.text]
            found += [
                segment._replace(text=piece, special=segment.special or n % 2 == 1) for n, piece in enumerate(pieces)
            ]
        return found

    def _encode_group(self, special: bool, texts: list[str], answer: bool) -> list[int]:
        if not special:
            return (self.encode_answer if answer else self.encode)("".join(texts))
        missing = [t for t in texts if t not in self.specials]
        if missing:
            raise ModelError(
                f"the tokenizer has no token {missing[0]!r}", "The tokenizer and the model are of two generations."
            )
        return [self.specials[t] for t in texts]

    @property
    def stop_ids(self) -> set[int]:
        """The ids that end an assistant's turn, by the template."""
        return {self.specials[t] for t in self.template.stops if t in self.specials}

    def prefix(self, ids: list[int]) -> int | None:
        """How many first tokens of a rendered chat see each other (ChatGLM-6B: those before <sop>); None for no such part."""
        return ids.index(self.specials["<sop>"]) if self.template == CHATGLM else None


def load_tokenizer(folder: Folder, adapter: Folder | None = None) -> Tokenizer:
    """The Tokenizer of a checkpoint folder; a tokenizer or a chat template of the adapter's own goes before the folder's.

    ModelError if it has none, or a broken one, or another generation's.
    """
    folder, adapter = ModelFolder.of(folder), None if adapter is None else ModelFolder.of(adapter)
    coder, fixed = _coder(folder)
    notes, replaced = {}, {}
    lost = _not_known(folder, coder)
    if lost:
        notes["tokens"] = f"added_tokens.json has tokens that the tokenizer does not know; they are plain text: {lost}"
    if adapter is not None:
        coder, told, replaced = _adapters_coder(adapter, folder, coder)
        notes |= {"tokens": told} if told else {}

    def template_of(place: ModelFolder, text: str | None) -> tuple[Template, str | None]:
        def formats(system: str | None) -> Sequence[Template]:
            return fixed or _formats(coder, folder, text, system)

        return choose(place, text, formats)

    text = jinja_text(folder)
    template, note = template_of(folder, text)
    note = "; ".join(told for told in (note, jinja_note(folder)) if told)
    its = None if adapter is None else jinja_text(adapter)
    if adapter is not None and its is not None and its != text:
        settings = next((p for p in (adapter, folder) if (p / "tokenizer_config.json").is_file()), folder)
        own, own_note = template_of(settings, its)
        if (own, own_note or "") != (template, note):
            note = f"{_described(own)} by the adapter's own chat template; the base has {_described(template)}"
            template, note = own, note + (f" ({own_note})" if own_note else "")
            check_namesake(adapter.path, adapter / TEMPLATE)
            replaced |= _files_with(its, settings)
    tokenizer = Tokenizer(coder, template)
    tokenizer.notes, tokenizer.replaced = notes | ({"chat": note} if note else {}), replaced
    return tokenizer


def _not_known(folder: ModelFolder, coder: Coder) -> str:
    """Tokens of a folder's added_tokens.json, which old tokenizers read, that its tokenizer lacks."""
    if not (folder / "added_tokens.json").is_file() or not isinstance(coder, bpe.BytePairs):
        return ""
    names = [quote(t, 20) for t in read_json(folder / "added_tokens.json") if t not in coder.vocabulary]
    return ", ".join(names[:4]) + (" ..." if names[4:] else "")


def _files_with(text: str, settings: ModelFolder) -> dict[str, bytes]:
    """The files of a folder that shall have a chat template: its own file, and tokenizer_config.json, where older readers look."""
    files = {TEMPLATE: text.encode()}
    if (settings / "tokenizer_config.json").is_file():
        check_namesake(settings.path, settings / "tokenizer_config.json")
        j = settings.tokenizer_config | {"chat_template": text}
        files["tokenizer_config.json"] = json.dumps(j, ensure_ascii=False, indent=2).encode()
    return files


def _coder(folder: ModelFolder) -> tuple[Coder, Sequence[Template]]:
    """The coder of a folder, and the formats where the tokenizer's files leave little choice."""
    first = _is_chatglm_6b(folder.config)
    if (folder / "ice_text.model").is_file() or first:
        if not first or not (folder / "ice_text.model").is_file():
            has = "has an ice_text.model" if not first else "has no ice_text.model"
            raise ModelError(
                f"{folder} {has}, and config.json is {'' if first else 'not '}ChatGLM-6B's",
                "Take the tokenizer's files and config.json from one folder.",
            )
        return pieces.load_chatglm(folder), [CHATGLM]
    if (folder / "qwen.tiktoken").is_file():
        return bpe.load_qwen1(folder), [QWEN1]
    if (folder / "tokenizer.json").is_file():
        return bpe.load_json(folder), []
    if (folder / "tokenizer.model").is_file():
        if bpe.is_ranks(folder / "tokenizer.model"):
            return bpe.load_glm4(folder), [GLM4_OWN, replace(GLM4_OWN, skips_empty=True)]
        template = _chatglm2_or_3(folder)
        return pieces.load_chatglm2(folder, roles=template == CHATGLM3), [template]
    if (folder / "vocab.json").is_file():
        return bpe.load_merges(folder), []
    raise ModelError(
        f"{folder} has no tokenizer.json, vocab.json and merges.txt, tokenizer.model, ice_text.model or qwen.tiktoken",
        "Copy the tokenizer's files from the model's folder.",
    )


def _formats(coder: Coder, folder: ModelFolder, jinja: str | None, system: str | None) -> Sequence[Template]:
    """The formats that the special tokens of a folder allow, the likeliest first."""
    roles = {"<|user|>", "<|assistant|>"} <= coder.specials.keys() and "<|im_start|>" not in coder.specials
    if roles:
        return glm_formats(folder.config.get("model_type"))
    if folder.config.get("model_type") == "gpt2" and "<|im_start|>" not in coder.specials:
        return [PLAIN]
    return qwen_formats(folder, jinja, set(coder.specials), folder.config.get("model_type"), system)


def _adapters_coder(
    adapter: ModelFolder, folder: ModelFolder, coder: Coder
) -> tuple[Coder, str | None, dict[str, bytes]]:
    """The adapter's own coder where it has one that differs from its base's, a line that says so, and its files."""
    if (adapter / "tokenizer.json").is_file() and isinstance(coder, bpe.BytePairs):
        its = bpe.load_json(adapter)
        if its.vocabulary == coder.vocabulary and its.words == coder.words:
            return coder, None, {}
        new = [quote(token, 20) for token in its.vocabulary if token not in coder.vocabulary]
        told = f"the adapter's own tokenizer.json, with {len(new):,} tokens that the base has not: {', '.join(new[:4])}"
        return its, told + (" ..." if new[4:] else ""), files_of(adapter, REPLACED)
    for name in TOKENIZER_FILES[1:]:
        its, base = adapter / name, folder / name
        if its.is_file() and not (base.is_file() and bpe.read_small(its) == bpe.read_small(base)):
            return coder, f"the base's; {name} in {adapter} is another one, and is not used", {}
    return coder, None, {}


def files_of(folder: ModelFolder, names: Sequence[str]) -> dict[str, bytes]:
    """What stands in the files of these names that a folder has; ModelError for a link out of it to a file of another name."""
    found = [name for name in names if (folder / name).is_file()]
    for name in found:
        check_namesake(folder.path, folder / name)
    return {name: bpe.read_small(folder / name) for name in found}


def _described(template: Template) -> str:
    system = template.default_system
    return template.name + (f" with the system prompt {quote(system, 40)}" if system else "")


def _is_chatglm_6b(j: dict[str, Any]) -> bool:
    return j.get("model_type") == "chatglm" and not {"multi_query_attention", "padded_vocab_size"} & j.keys()


def _chatglm2_or_3(folder: ModelFolder) -> Template:
    """ChatGLM2 or ChatGLM3, by the role tokens that ChatGLM3's code and chat template name, or by the published name."""
    settings = folder.tokenizer_config
    for text in (str(settings.get("chat_template", "")), _own_code(folder)):
        if text:
            return CHATGLM3 if "<|assistant|>" in text or "<|{{" in text else CHATGLM2
    names = f"{settings.get('name_or_path')} {folder.config.get('_name_or_path')} {folder.path.name}".lower()
    found = set(re.findall(r"chatglm([23])", names))
    if len(found) == 1:
        return CHATGLM3 if found == {"3"} else CHATGLM2
    raise ModelError(
        f"{folder}: nothing tells whether this is ChatGLM2 or ChatGLM3, whose files are the same",
        'Write "_name_or_path": "chatglm2-6b" or "chatglm3-6b" into config.json.',
    )


def _own_code(folder: ModelFolder) -> str:
    """The text of the folder's own tokenizer code, which is read and never run."""
    path = folder / "tokenization_chatglm.py"
    return bpe.read_small(path).decode("utf-8", "replace") if path.is_file() else ""


def check_fits(tokenizer: Tokenizer, vocab: int, folder: Folder) -> None:
    """ModelError if the tokenizer has more ids than the model has rows."""
    if tokenizer.size > vocab:
        raise ModelError(
            f"{folder}: the tokenizer has ids up to {tokenizer.size - 1}, the model {vocab} rows",
            "They are of two generations: take both from one folder.",
        )
