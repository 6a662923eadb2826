"""minilora eval: loss and perplexity on a file of rows."""

import argparse

from .before import check_paths, say
from .shared_flags import definitions, int8_flag, limit_flags, model_flags, settings_of


def flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    int8_flag(parser)
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="file of rows, or path#500@0.2, several with commas"
    )
    limit_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    import json
    from dataclasses import astuple

    check_paths(args.model, args.adapter, args.data)
    say(f"eval        {args.model} on {args.data}", quiet=args.json)
    from minilora.models.int8 import to_int8

    from ..data import load_examples
    from ..evaluate import evaluate
    from ..lora import merge
    from ..open_model import open_model
    from ..text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    settings = settings_of(args, definitions(args.define))
    examples, report = load_examples(args.data, tokenizer, *astuple(settings))
    model = open_model(args.model, tokenizer, args.adapter, args.any_base, args.device, args.compute,
                       lambda line: say(f"compute     {line[8:]}", quiet=args.json))  # fmt: skip
    score = evaluate(model, examples, args.max_length)
    rounded = None
    if args.int8:
        merge(model)
        to_int8(model)
        rounded = evaluate(model, examples, args.max_length)
    if args.json:
        print(
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
    print(f"data        {report}")
    print(f"loss        {score.loss:.4f} nats a token over {score.tokens:,} answer tokens")
    print(f"perplexity  {score.perplexity:.3f}")
    if rounded is not None:
        more = 100 * (rounded.loss / score.loss - 1)
        print(f"int8        loss {rounded.loss:.4f} ({more:+.2f} %), perplexity {rounded.perplexity:.3f}")
