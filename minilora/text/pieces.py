"""SentencePiece tokenizers: ChatGLM-6B (ice_text.model), ChatGLM2 and ChatGLM3 (tokenizer.model).

Special tokens are control pieces of the model or ids beside it. SentencePiece makes neither from text, so nothing that a
user types becomes one.

ChatGLM-6B writes a newline as <n>, a tab as <|tab|> and 2 to 80 blanks in a row as <|blank_N|> before it cuts text, and so
reads these words back as what they stand for, as its authors' code does. Two layouts of its ids exist: text starts at 20000,
after ids for images (first releases), or at 0. The first releases also ship the model without the special pieces.
"""

import re
import struct
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from ..errors import ModelError
from ..files.model_folder import ModelFolder
from .bpe import no_panic, read_small
from .growth import check_replacements, check_tokens

CHATGLM2_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
CHATGLM3_SPECIALS = (*CHATGLM2_SPECIALS, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHATGLM_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
IMAGE_IDS = 20000  # ids before those of text in the first releases of ChatGLM-6B
MOST_BLANKS = 80
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # types of a piece in sentencepiece_model.proto


class Pieces:
    """Text to ids and back by a SentencePiece model; `specials` are its control pieces and the tokens beside it."""

    def __init__(self, model: SentencePieceProcessor, beside: tuple[str, ...] = (), offset: int = 0):
        """beside: tokens whose ids follow the model's; offset: the id of the model's first piece."""
        count = model.vocab_size()
        self._model, self._offset = model, offset
        self.specials = {model.id_to_piece(i): i + offset for i in range(count) if model.is_control(i)}
        self.specials |= {text: count + offset + i for i, text in enumerate(beside)}
        self._names = {i: text for text, i in self.specials.items()}
        self.size = count + offset + len(beside)  # one more than the largest id

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a text, nothing added. Names of special tokens in it are plain text unless `specials` is set."""
        if not specials:
            return [i + self._offset for i in self._model.encode(self._written(text))]
        names = "|".join(re.escape(t) for t in sorted(self.specials, key=len, reverse=True))
        parts = re.split(f"({names})", text)
        ids = [[self.specials[p]] if n % 2 else self.encode(p) for n, p in enumerate(parts)]
        return [i for part in ids for i in part]

    def decode(self, ids: list[int], specials: bool = False) -> str:
        """The text of ids; special tokens are left out unless `specials` is set."""
        runs: list[list[int] | str] = [[]]
        for i in ids:
            if i in self._names:
                runs += [self._names[i] if specials else "", []]
            elif 0 <= i - self._offset < self._model.vocab_size():
                assert isinstance(runs[-1], list)
                runs[-1].append(i - self._offset)
        return "".join(run if isinstance(run, str) else self._read(self._model.decode(run)) for run in runs)

    def _written(self, text: str) -> str:
        return text

    def _read(self, text: str) -> str:
        return text


class BlankPieces(Pieces):
    """ChatGLM-6B's: white space is written as words that are pieces."""

    def _written(self, text: str) -> str:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return re.sub(f" {{2,{MOST_BLANKS}}}", lambda run: f"<|blank_{len(run[0])}|>", text)

    def _read(self, text: str) -> str:
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d{1,2})\|>", lambda blanks: " " * int(blanks[1]), text)


def load_chatglm(folder: ModelFolder) -> BlankPieces:
    """The ice_text.model of a ChatGLM-6B folder, of either layout; ModelError if it is not the layout of config.json."""
    path = folder / "ice_text.model"
    raw = read_small(path)
    model = _model(raw, path)
    if model.piece_to_id("[gMASK]") == model.unk_id():
        model = _model(raw + _missing_pieces(), path)
    offset = folder.tokenizer_config.get("num_image_tokens", IMAGE_IDS)
    if type(offset) is not int or not 0 <= offset < 1 << 30:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: num_image_tokens is {str(offset)[:40]}", f"It is 0 or {IMAGE_IDS}."
        )
    pieces = BlankPieces(model, offset=offset)
    start, wanted = pieces.specials.get("<sop>"), folder.config.get("bos_token_id", 150004)
    if start != wanted:
        raise ModelError(
            f"{path}: <sop> is {start}, config.json has {str(wanted)[:40]} (bos_token_id)",
            "They are of two generations: take the tokenizer's files and config.json from one folder.",
        )
    return pieces


def load_chatglm2(folder: ModelFolder, roles: bool) -> Pieces:
    """The tokenizer.model of a ChatGLM2 folder, or with `roles` of a ChatGLM3 folder."""
    path = folder / "tokenizer.model"
    return Pieces(_model(read_small(path), path), CHATGLM3_SPECIALS if roles else CHATGLM2_SPECIALS)


def _model(raw: bytes, path: Path) -> SentencePieceProcessor:
    with no_panic(str(path)):
        model = SentencePieceProcessor(model_proto=raw)
        if not raw or model.vocab_size() == 0:  # the library takes an empty file
            raise ValueError("it holds no pieces")
        # a piece that is not UTF-8 raises here; later it would come up in the middle of an answer
        check_tokens(model.id_to_piece(i) for i in range(model.vocab_size()))
        check_replacements(model.serialized_model_proto())  # as the library has read it
        return model


def _missing_pieces() -> bytes:
    """What the first releases add to their ice_text.model: specials, white space, bytes, and the use of the bytes.

    Two protocol buffers of one type that follow each other are one: lists go on, and single values are set.
    """
    white = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, MOST_BLANKS + 1))]
    kinds = [*((t, CONTROL) for t in CHATGLM_SPECIALS), *((t, USER_DEFINED) for t in white)]
    kinds += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    pieces = []
    for text, kind in kinds:
        body = b"\x0a" + bytes([len(text)]) + text.encode() + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind])
        pieces.append(b"\x0a" + bytes([len(body)]) + body)
    byte_fallback = b"\x12\x03\x98\x02\x01"  # trainer_spec.byte_fallback = true
    return b"".join(pieces) + byte_fallback
