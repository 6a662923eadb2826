"""Arguments that several commands have, and the check of the paths among them."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from ..errors import OutputInUse, UsageError
from ..files.model_folder import ModelFolder, check_adapter
from ..terminal import say
from .arguments import Arg


def adapter_folder(given: str) -> str:
    """An argparse type: the folder of an adapter; of a run it is RUN/adapter."""
    return str(ModelFolder(given).path)


def page(given: str) -> str:
    """An argparse type: the name of a page; OutputInUse for a file that is none, and what require_place raises."""
    from ..files.atomic import require_place
    from ..report.page import check_page

    check_page(Path(given))
    require_place(Path(given))
    return given


def new_file(given: str) -> str:
    """An argparse type: the name of a file that is not there yet; UsageError for none, OutputInUse if it is there: it could be what is read."""
    from ..files.atomic import require_place

    if not given:
        raise UsageError("the name of a file to write is empty", "Give a name, or leave the flag out.")
    if os.path.lexists(given):
        raise OutputInUse(f"{given} is there already", "Give another name, or take it away.")
    require_place(Path(given))
    return given


Model = Annotated[str, Arg("folder of a Hugging Face checkpoint, or its name on the hub", "DIR", group="model")]
Adapter = Annotated[str, Arg("folder of an adapter, or of a run", "DIR", group="model", parse=adapter_folder)]
Data = Annotated[str, Arg("file of rows, or path#500@0.2, several with commas", "FILE", group="data")]
Int8 = Annotated[bool, Arg("weights in 8 bits, for speed on a CPU; eval --int8 tells what it costs", group="machine")]
Quant = Annotated[
    Literal["keep", "off", "nf4", "int8"],
    Arg("bits of the linears: nf4, int8, keep those of the folder, or off to widen them", group="machine"),
]
Json = Annotated[bool, Arg("print one JSON object")]
Html = Annotated[str, Arg("write a page as well", "FILE", parse=page)]
GPUs = Annotated[int, Arg("use so many GPUs of this machine, or processes on its CPU", within=(1, 1024))]
RankTimeout = Annotated[
    float,
    Arg("seconds to wait for a rank that gives no answer, with --gpus or torchrun", group="machine", within=(1, 1e6)),
]
DataSeed = Annotated[int, Arg("of #N and @RATE", within=(0, 2**31))]
SamplingSeed = Annotated[int, Arg("of the sampling", within=(0, 2**63 - 1))]
Recipe = Annotated[str, Arg("yaml file of the settings below; flags override it", "RUN.yaml")]
ConfigFile = Annotated[str, Arg("the same", "FILE", short="-c")]


class Opening(TypedDict, total=False):
    """How a model is opened, by the names of open_model; what is not given is left to it."""

    allow_partial: Annotated[bool, Arg("take an adapter that lacks linears which it names [off]", group="model")]
    any_base: Annotated[bool, Arg("take an adapter that was trained on another base [off]", group="model")]
    device: Annotated[str, Arg("cpu, cuda, cuda:1 [the GPU if there is one]", "NAME", group="machine")]
    compute: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Arg("dtype to compute in; auto is the fastest one on this machine", group="machine"),
    ]


def check_paths(
    model: str | None = None, adapter: str | None = None, data: str | None = None, encoding: str = "", log_to: str = ""
) -> None:
    """ModelError or DataError for a path that is not what it should be, UsageError for an encoding or a logger.

    Before torch is imported, which takes seconds.
    """
    if model:
        ModelFolder(model).config  # noqa: B018 read, or refused
    if adapter:
        check_adapter(Path(adapter))
    if log_to:
        from ..run.loggers import asked_for

        asked_for(log_to)
    if data:
        from ..rows import find_data
        from ..rows.encodings import check_encoding
        from ..rows.files import check_file
        from ..rows.sources import parse_sources

        check_encoding(encoding)
        for source in parse_sources(data):
            check_file(find_data(source.path)[0])


def settings_of_file(recipe: str | None, config: str | None) -> dict[str, Any]:
    """The settings of a yaml file, given by itself or with -c; prints and leaves out those that have no meaning here.

    A config of another tool (neighbours/) is translated, with a line for each of its keys.
    """
    from ..neighbours import translated, writer_of
    from ..settings import read_yaml, without_not_needed

    if recipe and config:
        raise UsageError(f"{recipe} and --config {config} are two files", "Give one of them.")
    if recipe and not Path(recipe).is_file():
        hint = "What stands alone is a yaml file of settings, or on or off after a switch."
        raise UsageError(f"unknown argument {recipe!r}", hint)
    path = recipe or config
    given = read_yaml(Path(path)) if path else {}
    writer = writer_of(given)
    if path and writer:
        return translated(Path(path), given, writer, lambda line: say(line, quiet=True))
    settings, note = without_not_needed(given)
    if note:
        say(note)
    return settings
