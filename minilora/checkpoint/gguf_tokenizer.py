"""The tokenizer of a folder as the metadata of a GGUF file.

llama.cpp knows a few pre-tokenizers by name, and spells its vocabulary as byte-level BPE does. It does not normalise text, while
Qwen's tokenizers apply NFC.
"""

import json
from typing import Any

from ..errors import ModelError
from ..files.gguf import Value
from ..files.hub_cache import check_namesake
from ..files.model_folder import ModelFolder
from ..text.bpe import GLM_SPLIT, QWEN35_SPLIT, QWEN_SPLIT, BytePairs
from ..text.template import jinja_text
from ..text.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
NAMES = {QWEN_SPLIT: "qwen2", QWEN35_SPLIT: "qwen35", GLM_SPLIT: "chatglm-bpe"}
# llama.cpp has three places for tokens that end an answer
ENDS = ("eos", "eot", "eom")


def tokenizer_metadata(folder: ModelFolder, tokenizer: Tokenizer, vocab: int) -> dict[str, Value]:
    """The keys tokenizer.* for a model of `vocab` rows; ModelError if llama.cpp cuts text in no such way."""
    if not isinstance(tokenizer.coder, BytePairs):
        raise ModelError(f"{folder}: its tokenizer is no byte-level BPE", "GGUF is written for those alone.")
    j = tokenizer.coder.description
    added = {t["id"]: t for t in j["added_tokens"]}
    texts = {i: text for text, i in j["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    kinds = {i: CONTROL if t["special"] else USER_DEFINED for i, t in added.items()}
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _cut(folder, j),
        "tokenizer.ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(vocab)],
        "tokenizer.ggml.token_type": [kinds.get(i, NORMAL) if i in texts else UNUSED for i in range(vocab)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in j["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": False,
    }
    known = tokenizer.specials
    ends = [token for token in tokenizer.template.stops if token in known]
    bos, pad = _named(folder, "bos_token") or "<|endoftext|>", _named(folder, "pad_token")
    ids = {
        role: known[token]
        for role, token in [*zip(ENDS, ends, strict=False), ("bos", bos), ("padding", pad)]
        if token in known
    }
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    check_namesake(folder.path, folder / "chat_template.jinja")
    template = jinja_text(folder)
    return metadata if template is None else metadata | {"tokenizer.chat_template": template}


def _named(folder: ModelFolder, role: str) -> str | None:
    """The token that tokenizer_config.json has for a role."""
    token = folder.tokenizer_config.get(role)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _cut(folder: ModelFolder, j: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a tokenizer.json cuts text."""
    steps = (j["pre_tokenizer"] or {}).get("pretokenizers", [])
    pattern = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    if pattern not in NAMES:
        raise ModelError(
            f"{folder}: its tokenizer cuts text by {json.dumps(pattern)[:60]}, for which llama.cpp is not known to have a name",
            "GGUF is written for the tokenizers of Qwen and GLM-4.",
        )
    # the names of GLM's way differ in whether a word that is a token is taken as it is
    return "glm4" if pattern == GLM_SPLIT and j["model"].get("ignore_merges") else NAMES[pattern]
