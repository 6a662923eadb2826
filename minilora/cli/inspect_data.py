"""minilora inspect data: what the model sees of a file of rows."""

import argparse

from ..errors import DataError
from .before import check_paths, say
from .parser import group
from .shared_flags import between, data_config, data_flags


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder of a checkpoint; its weights are not read"
    )
    group(parser, "data").add_argument(
        "--data", required=True, metavar="FILE", help="file of rows, or path#500@0.2, several with commas"
    )
    group(parser, "data").add_argument(
        "--val", metavar="FILE", help="validation rows, which shall not be among the others"
    )
    data_flags(parser)
    parser.add_argument("-n", "--samples", type=between(int, 0, 1000), default=3, metavar="N", help="rows to show [3]")
    parser.add_argument("--row", type=between(int, 1, 2**63 - 1), metavar="N", help="show this row alone: 1, 2, ...")
    parser.add_argument("--only-problems", action="store_true", help="show rows that have a problem")
    parser.add_argument("--check-template", action="store_true", help="compare with the folder's own chat template")
    parser.add_argument("--html", metavar="FILE", help="write a page as well")
    parser.add_argument("--seed", type=between(int, 0, 2**31), default=42, metavar="N", help="of #N and @RATE [42]")


def run(args: argparse.Namespace) -> int:
    settings = data_config(args)
    check_paths(args.model, None, args.data, settings.encoding)
    say(f"reading {args.data}")
    from pathlib import Path

    from ..console import Console
    from ..files.atomic import write_file
    from ..text.tokenizer import load_tokenizer
    from ..tools.inspect_data import inspect_data
    from ..tools.inspect_data_show import show, to_html

    tokenizer = load_tokenizer(args.model)
    result = inspect_data(
        args.data,
        Path(args.model),
        tokenizer,
        settings,
        args.samples,
        args.row,
        args.only_problems,
        args.val,
        args.check_template,
        args.seed,
    )
    show(result, Console())
    if args.html:
        write_file(Path(args.html), to_html(result, Path(args.model)))
        say(f"\npage     {args.html}")
    return 0 if len(result.lengths["total"]) else DataError.code  # nothing can be used
