"""minilora plan: what a training needs, before anything is loaded."""

import argparse

from .before import check_paths, say
from .shared_flags import definitions
from .train import foreign_flags, setting_flags, settings_file


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", metavar="FILE", help="yaml file of the settings below; flags win over it")
    parser.add_argument(
        "--device-memory", type=float, metavar="GB", help="plan for a card with so many 10^9 bytes [this machine]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    setting_flags(parser)


def run(args: argparse.Namespace) -> None:
    import json

    from ..config import resolve

    own = ("command", "config", "device_memory", "json", "rest")
    given = {k: v for k, v in vars(args).items() if k not in own} | foreign_flags(args.rest)
    if "define" in given:
        given["define"] = definitions(given["define"])
    config = resolve(*([settings_file(args.config)] if args.config else []), given)
    check_paths(config.model, None, config.data)
    from ..forecast import forecast, text_of

    found = forecast(config, args.device_memory)
    say(json.dumps(found, indent=1, ensure_ascii=False) if args.json else text_of(found))
