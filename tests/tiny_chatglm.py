"""The tokenizer of a tiny ChatGLM-6B folder: a SentencePiece model trained here, with the special pieces of the real one."""

import io
import json
from pathlib import Path

import sentencepiece

from minilora.text.pieces import CHATGLM_SPECIALS, IMAGE_IDS

TEXTS = [f"数到{n}。" + " ".join(map(str, range(1, n + 1))) + " Count to the number, 你好吗？" for n in range(1, 60)]


def ice_text(first_release: bool = False) -> bytes:
    """An ice_text.model: with all its special pieces, or as the first releases have it, with <n> alone."""
    white = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=110 if first_release else 460,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="<pad>",
        user_defined_symbols=["<n>", *([] if first_release else white)],
        control_symbols=[] if first_release else list(CHATGLM_SPECIALS),
        byte_fallback=not first_release,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, first_release: bool = False) -> dict[str, int]:
    """Put ice_text.model and tokenizer_config.json into a folder; returns what config.json must say about ids."""
    raw = ice_text(first_release)
    (folder / "ice_text.model").write_bytes(raw)
    settings = {} if first_release else {"num_image_tokens": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"} | settings))
    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
    if first_release:  # the specials follow the model's pieces
        ids = {name: IMAGE_IDS + model.vocab_size() + i for i, name in enumerate(CHATGLM_SPECIALS)}
    else:
        ids = {name: model.piece_to_id(name) for name in CHATGLM_SPECIALS}
    return {
        "bos_token_id": ids["<sop>"],
        "eos_token_id": ids["<eop>"],
        "mask_token_id": ids["[MASK]"],
        "gmask_token_id": ids["[gMASK]"],
    }
