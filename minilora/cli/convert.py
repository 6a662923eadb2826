"""minilora convert: a folder of pickle weights (ChatGLM-6B, ChatGLM2-6B) as safetensors."""

from pathlib import Path
from typing import Annotated

from ..files.model_folder import is_prefix_folder
from ..terminal import say
from .arguments import Arg
from .shared_flags import check_paths


def run(
    folder: Annotated[str, Arg("folder with pytorch_model.bin, or its shards and their index", "DIR")],
    output: Annotated[str, Arg("new folder for the same checkpoint as safetensors", "OUT")],
) -> None:
    check_paths(folder)
    say(f"reading {folder}")
    from ..checkpoint.convert import convert

    done = convert(folder, output, say=say)
    say(f"wrote   {output}: {done.tensors:,} tensors, {done.bytes / 1e9:,.3g} GB, with the config and the tokenizer")
    prefix = is_prefix_folder(Path(output))
    say(f"\n  minilora {f'chat --model BASE --adapter {output}' if prefix else f'inspect model {output}'}")
