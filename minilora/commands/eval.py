"""minilora eval: loss and perplexity on a file of rows."""

import argparse

from .shared_flags import definitions, limit_flags, model_flags, settings_of


def flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="file of rows, or path#500@0.2, several with commas"
    )
    limit_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    import json
    from dataclasses import astuple
    from pathlib import Path

    from ..adapter import load_adapter
    from ..checkpoint import load_model
    from ..data import load_examples
    from ..evaluate import evaluate
    from ..heap import keep_heap
    from ..text.tokenizer import check_fits, load_tokenizer

    keep_heap()
    tokenizer = load_tokenizer(args.model)
    settings = settings_of(args, definitions(args.define))
    examples, report = load_examples(args.data, tokenizer, *astuple(settings))
    model = load_model(args.model, device=args.device)
    check_fits(tokenizer, model.config.vocab, Path(args.model))
    if args.adapter:
        load_adapter(model, args.adapter, args.any_base)
        model.eval()
    score = evaluate(model, examples, args.max_length)
    if args.json:
        print(
            json.dumps(
                {
                    "loss": score.loss,
                    "perplexity": score.perplexity,
                    "tokens": score.tokens,
                    "rows": len(examples),
                }
            )
        )
        return
    print(f"data        {report}")
    print(f"loss        {score.loss:.4f} nats a token over {score.tokens:,} answer tokens")
    print(f"perplexity  {score.perplexity:.3f}")
