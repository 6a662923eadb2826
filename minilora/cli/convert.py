"""minilora convert: a folder of pickle weights (ChatGLM-6B, ChatGLM2-6B, an older adapter) as safetensors."""

from pathlib import Path
from typing import Annotated

from ..files.model_folder import is_adapter, is_prefix_folder
from ..terminal import say
from .arguments import Arg
from .shared_flags import check_paths


def run(
    folder: Annotated[
        str, Arg("folder with pytorch_model.bin, its shards and their index, or adapter_model.bin", "DIR")
    ],
    output: Annotated[str, Arg("new folder for the same as safetensors", "OUT")],
) -> None:
    adapter = is_adapter(Path(folder))
    check_paths(*((None, folder) if adapter else (folder, None)))
    say(f"reading {folder}")
    from ..checkpoint.convert import convert

    done = convert(folder, output, say=say)
    say(f"wrote   {output}: {done.tensors:,} tensors, {done.bytes / 1e9:,.3g} GB, with the config and the tokenizer")
    beside = adapter or is_prefix_folder(Path(output))
    say(f"\n  minilora {f'chat --model BASE --adapter {output}' if beside else f'inspect model {output}'}")
