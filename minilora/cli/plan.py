"""minilora plan: what a training needs, before anything is loaded."""

import argparse

from .before import check_paths, say
from .shared_flags import between
from .train import file_flags, given_settings, run_flags, settings_files


def flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = "minilora plan [RUN.yaml] --model DIR [--data FILE] [--SETTING VALUE ...]"
    file_flags(parser)
    parser.add_argument(
        "--device-memory",
        type=between(float, 1e-6, 100_000),
        metavar="GB",
        help="plan for a card with so many 10^9 bytes [this machine]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    run_flags(parser)


def run(args: argparse.Namespace) -> None:
    import json

    from ..config import resolve

    config = resolve(*settings_files(args), given_settings(args))
    check_paths(config.model, None, config.data, config.encoding)
    from ..tools.plan import forecast, text_of

    found = forecast(config, args.device_memory)
    say(json.dumps(found, indent=1, ensure_ascii=False) if args.json else text_of(found))
