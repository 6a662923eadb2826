"""minilora inspect model: what a model folder is, and what minilora makes of it."""

import argparse

from .before import check_paths, say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="DIR", help="folder of a Hugging Face checkpoint; config.json alone is enough"
    )
    parser.add_argument(
        "--lora-targets", default="all-linear", metavar="TEXT", help="linears that get adapters [all-linear]"
    )
    parser.add_argument("--targets", dest="lora_targets", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    check_paths(args.folder)
    import json
    from pathlib import Path

    from ..tools.inspect_model import describe, text_of

    found = describe(Path(args.folder), args.lora_targets)
    say(json.dumps(found, indent=1, ensure_ascii=False) if args.json else text_of(found))
    return 4 if found["problems"] else 0
