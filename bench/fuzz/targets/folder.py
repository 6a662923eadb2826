"""A model's folder: its index, shards, links and small files, as a JSON object of names and contents laid over a tiny model.

What is not said is the tiny model's; "model-1.safetensors" and the like may be {"same": 1}, the tiny model's own tensors.
"""

import base64
import json
import shutil
from typing import Any

from minilora.checkpoint.load import load_model
from minilora.checkpoint.open_model import folder_notes
from minilora.files.model_folder import ModelFolder, positions_note
from minilora.sampling import read_generation
from minilora.text import own_template
from minilora.text.tokenizer import check_fits, load_tokenizer

from ..room import ROOM, SECRET, fresh, lay, tiny

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
WORDS = [INDEX, SHARD, "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json",
         "chat_template.jinja", "weight_map", "metadata", "total_size", "link", "pipe", "base64", "same", "../secret.safetensors", str(SECRET), ".", "..",
         "/dev/zero", "model.norm.weight", "pytorch_model.bin", "adapter_config.json", "modeling_x.py", "temperature", "top_k", "eos_token_id", "chat_template",
         "added_tokens_decoder", "merges.txt", "vocab.json", "tokenizer.model", "qwen.tiktoken", "ice_text.model"]  # fmt: skip


def _names() -> list[str]:
    from minilora.files.safetensors import SafetensorsFile

    return list(SafetensorsFile(tiny() / "model.safetensors").entries)


def prepare() -> None:
    own_template.CACHE = ROOM / "templates"
    places = dict.fromkeys(_names(), SHARD)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    whole: list[dict[str, Any]] = [
        {},
        {"model.safetensors": None, SHARD: {"same": 1}, INDEX: index},
        {"model.safetensors": None, SHARD: {"link": "../tiny/model.safetensors"}, INDEX: index},
        {"model.safetensors": {"link": "model.safetensors"}},
        {"generation_config.json": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": [258, 256], "do_sample": True}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"258": {"content": "<|im_end|>", "special": True}}, "eos_token": "<|im_end|>", "chat_template": None},
         "added_tokens.json": {"<x>": 259}},
        {"tokenizer.json": None, "vocab.json": {"a": 0}, "merges.txt": "#version: 0.2\n"},
        {"config.json": {"pipe": 1}},
    ]  # fmt: skip
    SEEDS[:] = [json.dumps(files).encode() for files in whole]


SEEDS: list[bytes] = []
CHILDREN = ("jinja_child.py",)
LINKS = False  # weights may lie behind a link, as in the cache of a hub; an index may not name what is elsewhere


def target(data: bytes) -> None:
    try:
        files = json.loads(data)
    except ValueError:
        files = {"config.json": {"base64": base64.b64encode(data).decode()}}
    folder = fresh("folder")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        shutil.copyfile(tiny() / name, folder / name)
    files = files if isinstance(files, dict) else {"config.json": files}
    for name, held in files.items():
        if isinstance(held, dict) and "same" in held:
            lay(folder, {name: {"base64": base64.b64encode((tiny() / "model.safetensors").read_bytes()).decode()}})
        else:
            lay(folder, {name: held})
    opened = ModelFolder(folder)
    tokenizer = load_tokenizer(opened)
    model = load_model(opened, device="cpu")
    check_fits(tokenizer, model.config.vocab, opened)
    folder_notes(opened, tokenizer)
    read_generation(opened)
    positions_note(opened, 10**6)
