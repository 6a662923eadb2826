"""minilora data split: train, val and test files that share no question."""

import argparse

from .before import say
from .shared_flags import between, data_config, data_flags


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="file of rows, or path#500@0.2, several with commas"
    )
    parser.add_argument("--val", metavar="N|SHARE", help="rows for validation: 200 or 0.05")
    parser.add_argument("--test", metavar="N|SHARE", help="rows for the test: 200 or 0.05")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="new folder for train.jsonl, val.jsonl, test.jsonl"
    )
    data_flags(parser, "columns", "encoding", "skip_bad")
    parser.add_argument("--drop-duplicates", action="store_true", help="keep the first of rows that are the same")
    parser.add_argument("--seed", type=between(int, 0, 2**31), default=42, metavar="N", help="chooses the rows [42]")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..tools.split_files import split_files

    wanted = {name: text for name in ("val", "test") if (text := getattr(args, name)) is not None}
    lines = split_files(args.data, wanted, Path(args.output), data_config(args), args.drop_duplicates, args.seed)
    say("\n".join(lines))
