"""minilora inspect data: what the model sees of a file of rows."""

from typing import Annotated

from ..config import DataConfig
from ..errors import DataError
from ..terminal import say
from .arguments import Arg
from .shared_flags import Data, DataSeed, Html, check_paths


def run(
    *,
    model: Annotated[str, Arg("folder of a checkpoint; its weights are not read", "DIR")],
    data: Data,
    val: Annotated[
        str | None, Arg("validation rows, which shall not be among the others", "FILE", group="data")
    ] = None,
    settings: DataConfig,
    samples: Annotated[int, Arg("rows to show", within=(0, 1000), short="-n")] = 3,
    row: Annotated[int | None, Arg("show this row alone: 1, 2, ...", within=(1, 2**63 - 1))] = None,
    only_problems: Annotated[bool, Arg("show rows that have a problem")] = False,
    check_template: Annotated[bool, Arg("compare with the folder's own chat template")] = False,
    html: Html | None = None,
    seed: DataSeed = 42,
) -> int:
    check_paths(model, None, data, settings.encoding)
    say(f"reading {data}")
    from pathlib import Path

    from ..console import Console
    from ..files.atomic import write_output
    from ..text.tokenizer import load_tokenizer
    from ..tools.inspect_data import inspect_data
    from ..tools.inspect_data_show import show, to_html

    folder, tokenizer = Path(model), load_tokenizer(model)
    found = inspect_data(
        data, folder, tokenizer, settings, samples, row, only_problems, val=val, compare=check_template, seed=seed
    )
    show(found, Console())
    if html:
        write_output(Path(html), to_html(found, folder))
        say(f"\npage     {html}")
    return 0 if len(found.lengths["total"]) else DataError.code  # nothing can be used
