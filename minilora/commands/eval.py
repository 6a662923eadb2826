"""minilora eval: loss and perplexity on a file of rows."""

import argparse

from .shared_flags import definitions, model_flags


def flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="json or jsonl file of rows")
    parser.add_argument("--define", metavar="NAME=TEXT", action="append", default=[], help="fill {{name}} in the rows")
    parser.add_argument("--loss-on", choices=["all", "last"], default="all", help="which answers count [all]")
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="longest row in tokens [2048]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from ..adapter import load_adapter
    from ..checkpoint import load_model
    from ..data import load_examples
    from ..evaluate import evaluate
    from ..heap import keep_heap
    from ..tokenizer import check_fits, load_tokenizer

    keep_heap()
    tokenizer = load_tokenizer(args.model)
    examples, report = load_examples(args.data, tokenizer, definitions(args.define), args.loss_on, args.max_length)
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
