"""minilora data split: train, val and test files that share no question."""

from typing import Annotated

from ..config import DataConfig
from ..terminal import say
from .arguments import Arg, Settings
from .shared_flags import Data


def run(
    *,
    data: Data,
    val: Annotated[str | None, Arg("rows for validation: 200 or 0.05", "N|SHARE")] = None,
    test: Annotated[str | None, Arg("rows for the test: 200 or 0.05", "N|SHARE")] = None,
    output: Annotated[str, Arg("new folder for train.jsonl, val.jsonl, test.jsonl", "DIR")],
    settings: Annotated[DataConfig, Settings(("columns", "encoding", "skip_bad"))],
    drop_duplicates: Annotated[bool, Arg("keep the first of rows that are the same")] = False,
    seed: Annotated[int, Arg("chooses the rows", within=(0, 2**31))] = 42,
) -> None:
    from pathlib import Path

    from ..tools.split_files import split_files

    wanted = {name: text for name, text in (("val", val), ("test", test)) if text is not None}
    say("\n".join(split_files(data, wanted, Path(output), settings, drop_duplicates, seed)))
