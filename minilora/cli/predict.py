"""minilora predict: answers to the questions of a test set, and their scores."""

import argparse

from .before import check_paths, say
from .parser import group
from .shared_flags import between, data_config, data_flags, int8_flag, model_flags, opening


def flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    int8_flag(parser)
    group(parser, "data").add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="rows; the last answer of each is the reference, one without is answered alone",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for answers and scores; one that was stopped goes on"
    )
    parser.add_argument(
        "--max-tokens", type=between(int, 1, 2**31), default=512, metavar="N", help="longest answer [512]"
    )
    parser.add_argument("--batch", type=between(int, 1, 4096), default=16, metavar="N", help="answers at a time [16]")
    parser.add_argument(
        "--sample", action="store_true", help="draw as generation_config.json says, instead of the likeliest token"
    )
    parser.add_argument("--seed", type=between(int, 0, 2**63 - 1), default=0, metavar="N", help="of the sampling [0]")
    data_flags(parser, "columns", "encoding", "ignore_keys", "define")
    parser.add_argument("--overwrite", action="store_true", help="delete an older prediction in --output")
    parser.add_argument("--json", action="store_true", help="print predict_results.json instead of the table")


def run(args: argparse.Namespace) -> None:
    reading = data_config(args)
    check_paths(args.model, args.adapter, args.data, reading.encoding)
    say(f"predict {args.model} on {args.data}", quiet=args.json)
    import json

    from ..console import Console
    from ..tools.predict import predict, show_results

    console = Console(stderr=args.json)
    results = predict(
        args.model,
        args.data,
        args.output,
        args.adapter,
        args.max_tokens,
        args.batch,
        reading,
        args.sample,
        args.seed,
        args.overwrite,
        console,
        **opening(args),
    )
    if args.json:
        say(json.dumps(results, ensure_ascii=False, indent=1))
    else:
        show_results(results, console)
