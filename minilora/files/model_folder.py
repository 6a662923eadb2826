"""The folder of a model or an adapter, without torch: whether it is one, and its small JSON files, each opened once."""

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import ModelError, quote
from .hub_cache import cached, not_cached
from .regular import read_file
from .strict_json import parse_json

if TYPE_CHECKING:
    from .tensors import Tensors

MAX_JSON = 64 << 20
POSITIONS = ("max_position_embeddings", "seq_length", "max_sequence_length", "n_positions")
LEARNED = ("gpt2",)  # model types whose positions are learned: nothing is beyond them (positions.py)
# vision-language models whose language model is trained, and what is of vision in their config.json
VISION = ("qwen3_5", "qwen3_5_moe")
OF_VISION = {
    "text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "language_model_only",
}  # fmt: skip
MODEL_FILES = {".json", ".jinja", ".model", ".tiktoken", ".txt", ".safetensors", ".bin", ".py"}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"


def check_is_itself(path: Path, start: bytes) -> None:
    """ModelError for the first bytes of what is often saved in place of a model's file: a Git LFS pointer, a web page."""
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself", "Run git lfs pull in that folder.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise ModelError(f"{path} is a web page that was saved under this name", "Download the file itself.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a small file of a model folder; ModelError if it is none."""
    try:
        raw = read_file(path, ModelError, MAX_JSON)
        check_is_itself(path, raw[:64])
        value = parse_json(raw)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing", "Give the folder of a Hugging Face checkpoint.") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}", "Download or copy the file again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", "Download or copy the file again.")
    return value


def check_folder(folder: Path) -> None:
    """ModelError if this is no folder of a checkpoint, with what it is instead."""
    if not folder.is_dir():
        hint = "Give the folder of a Hugging Face checkpoint; nothing is downloaded."
        raise not_cached(folder) or ModelError(f"{folder} is not a folder", hint)
    check_regular(folder)
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        found = sorted(str(p) for p in (folder / "snapshots").iterdir() if p.is_dir())
        raise ModelError(
            f"{folder} is the root of a Hugging Face cache, not a model's folder",
            f"Give {found[0] if found else 'one of the folders in its snapshots/'}.",
        )
    if is_adapter(folder):
        raise ModelError(f"{folder} is an adapter", "Give it with --adapter, and its base with --model.")


def check_regular(folder: Path) -> None:
    """ModelError for what has the name of a model's file and is none: a pipe, a device, a socket, a link to nothing."""
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILES and not path.is_file() and not path.is_dir():
            what = "a link to nothing" if path.is_symlink() and not path.exists() else "not a regular file"
            raise ModelError(f"{path} is {what}", "Download or copy the file again.")


def trained_in(folder: Path) -> Path:
    """What a run trained, by the run's folder: its adapter, or with method full its model; any other folder is itself."""
    if any((folder / name).exists() for name in (ADAPTER_CONFIG, "config.json")):
        return folder
    return next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), folder)


class ModelFolder:
    """A folder whose files are read when they are first asked for, and not again: it is opened once and passed on.

    It is given by its path, by the name of a model on a hub (hub_cache.py), or by the folder of a run, which means what the run
    trained. `folder / file` is the path of a file in it, `folder.name` what it is called. Raises ModelError for a file that is broken.
    """

    def __init__(self, given: str | Path):
        folder = cached(given)
        self.path = trained_in(folder)
        # a link to itself makes Path.resolve() raise
        self.name = Path(os.path.realpath(folder) if folder == Path(given) else given).name

    @classmethod
    def of(cls, folder: "Folder") -> Self:
        return folder if isinstance(folder, cls) else cls(folder)  # pyright: ignore[reportArgumentType]

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; ModelError, which says what the folder is instead, if it has none."""
        check_folder(self.path)
        return read_json(self / "config.json")

    @cached_property
    def language(self) -> dict[str, Any]:
        """config.json of the language model: that of a vision-language model has it in text_config."""
        text = self.config.get("text_config")
        if self.config.get("model_type") not in VISION or not isinstance(text, dict):
            return self.config
        beside = {key: value for key, value in self.config.items() if key not in OF_VISION}
        tied = [j.get("tie_word_embeddings") for j in (self.config, text)]
        told = {"tie_word_embeddings": any(tied)} if all(t in (None, True, False) for t in tied) else {}
        return beside | text | told | {"model_type": self.config["model_type"]}

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        return self._optional("tokenizer_config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return self._optional("generation_config.json")

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """adapter_config.json as PEFT writes it, whoever wrote it."""
        check_adapter(self.path)
        if not (self / ADAPTER_CONFIG).exists():
            return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": self.config["pre_seq_len"]}
        j = read_json(self / ADAPTER_CONFIG)
        if "peft_type" not in j:
            from .mlx_adapter import as_peft  # which reads tensors, with torch

            return as_peft(self / ADAPTER_CONFIG, j)
        if not isinstance(j["peft_type"], str):
            what = f"{self / ADAPTER_CONFIG}: peft_type is {quote(str(j['peft_type']))}"
            raise ModelError(what, "The name of a method belongs there.")
        return j

    @cached_property
    def tensors(self) -> "Tensors":
        """The tensors of its safetensors files, by name."""
        from .tensors import Tensors

        return Tensors(self.path)

    def _optional(self, name: str) -> dict[str, Any]:
        return read_json(self / name) if (self / name).is_file() else {}


Folder = str | Path | ModelFolder


def positions_note(folder: Folder, longest: int) -> str | None:
    """A sentence where a row or a prompt is longer than the positions that the folder's model was made for."""
    j = ModelFolder.of(folder).language
    most = next((j[k] for k in POSITIONS if isinstance(j.get(k), int)), None)
    if most is None or longest <= most:
        return None
    return beyond(longest, most, j.get("model_type") in LEARNED)


def beyond(tokens: int, positions: int, learned: bool = False) -> str:
    then = (
        "they are learned, and it can read nothing beyond them"
        if learned
        else "what it reads beyond them is noise to it"
    )
    return f"{tokens:,} tokens are more than the {positions:,} positions of the model: {then}"


def is_prefix_folder(folder: Path) -> bool:
    """Whether this is a P-tuning checkpoint as ChatGLM-6B's own code writes it: the model's config, which asks for a prefix."""
    config = folder / "config.json"
    return not (folder / ADAPTER_CONFIG).exists() and config.is_file() and bool(read_json(config).get("pre_seq_len"))


def is_adapter(folder: Path) -> bool:
    """Whether this is the folder of an adapter, and no model's that has one beside its weights."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def check_adapter(folder: Path) -> None:
    """ModelError if this is no folder of an adapter."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", "Give the folder of an adapter, such as RUN/adapter.")
    check_regular(folder)
    if not (folder / ADAPTER_CONFIG).exists() and not is_prefix_folder(folder):
        hint = "Give the folder of an adapter, such as RUN/adapter."
        if (folder / "checkpoints" / "last" / ADAPTER_CONFIG).exists():  # a run that did not come to its end
            hint = f"{folder / 'checkpoints' / 'last'} is the newest adapter of this run."
        elif (folder / "model").is_dir():
            hint = f"{folder / 'model'} is what this run trained: give it with --model."
        raise ModelError(f"{folder / ADAPTER_CONFIG} is missing", hint)
