"""minilora eval: loss and perplexity on a file of rows."""

import argparse
from typing import Any

from .before import check_paths, say
from .parser import group
from .shared_flags import data_config, data_flags, int8_flag, model_flags, opening


def flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    int8_flag(parser)
    group(parser, "data").add_argument(
        "--data", required=True, metavar="FILE", help="file of rows, or path#500@0.2, several with commas"
    )
    data_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    import json

    settings = data_config(args)
    check_paths(args.model, args.adapter, args.data, settings.encoding)
    say(f"eval        {args.model} on {args.data}", quiet=args.json)
    from ..checkpoint.open_model import folder_notes, open_model, round_to_int8
    from ..data import load_examples
    from ..evaluate import evaluate
    from ..files.model_folder import ModelFolder
    from ..text.tokenizer import load_tokenizer

    folder = ModelFolder(args.model)
    tokenizer = load_tokenizer(folder, args.adapter)
    for name, note in folder_notes(folder, tokenizer, args.adapter).items():
        say(f"{name:<12}{note}", quiet=args.json)
    examples, report = load_examples(args.data, tokenizer, settings)
    opened: dict[str, Any] = opening(args) | {"int8": False}
    model = open_model(
        folder, tokenizer, args.adapter, say=lambda how: say(f"compute     {how}", quiet=args.json), **opened
    )
    score = evaluate(model, examples, settings.max_length)
    rounded = None
    if args.int8:
        round_to_int8(model)
        rounded = evaluate(model, examples, settings.max_length)
    if args.json:
        say(
            json.dumps(
                {
                    "loss": score.loss,
                    "perplexity": score.perplexity,
                    "tokens": score.tokens,
                    "rows": len(examples),
                    **({} if rounded is None else {"int8_loss": rounded.loss}),
                }
            )
        )
        return
    say(f"data        {report}")
    say(f"loss        {score.loss:.4f} nats a token over {score.tokens:,} answer tokens")
    say(f"perplexity  {score.perplexity:.3f}")
    if rounded is not None:
        more = 100 * (rounded.loss / score.loss - 1)
        say(f"int8        loss {rounded.loss:.4f} ({more:+.2f} %), perplexity {rounded.perplexity:.3f}")
