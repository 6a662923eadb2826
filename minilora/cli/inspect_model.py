"""minilora inspect model: what a model folder is, and what minilora makes of it."""

from typing import Annotated

from ..errors import ModelError
from ..terminal import say
from .arguments import Arg
from .shared_flags import Json, check_paths


def run(
    folder: Annotated[str, Arg("folder of a Hugging Face checkpoint; config.json alone is enough", "DIR")],
    *,
    lora_targets: Annotated[str, Arg("linears that get adapters", aliases=("--targets",))] = "all-linear",
    json: Json = False,
) -> int:
    check_paths(folder)
    from json import dumps
    from pathlib import Path

    from ..tools.inspect_model import describe, text_of

    found = describe(Path(folder), lora_targets)
    say(dumps(found, indent=1, ensure_ascii=False) if json else text_of(found), whole=json)
    return ModelError.code if found["problems"] else 0
