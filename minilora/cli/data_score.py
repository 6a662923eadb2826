"""minilora data score: the perplexity of every row under a model."""

import argparse

from ..errors import UsageError
from .before import check_paths, say
from .parser import group
from .shared_flags import between, data_config, data_flags, model_flags, opening


def flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    group(parser, "data").add_argument(
        "--data", required=True, metavar="FILE", help="file of rows, or path#500@0.2, several with commas"
    )
    data_flags(parser)
    parser.add_argument("--scores", metavar="FILE", help="write a jsonl of every row with its perplexity")
    parser.add_argument("--keep-below", type=between(float, 0, 1e300), metavar="X", help="largest perplexity to keep")
    parser.add_argument("--keep-above", type=between(float, 0, 1e300), metavar="X", help="smallest perplexity to keep")
    parser.add_argument("--output", metavar="FILE", help="write a jsonl of the rows that are kept")
    parser.add_argument("--worst", type=between(int, 0, 1000), default=5, metavar="N", help="rows to show [5]")
    parser.add_argument("--html", metavar="FILE", help="write a page as well")
    parser.add_argument("--cache", metavar="DIR", help="folder that keeps the tokens of the rows for the next time")
    parser.add_argument("--seed", type=between(int, 0, 2**31), default=42, metavar="N", help="of #N and @RATE [42]")


def run(args: argparse.Namespace) -> None:
    if (args.keep_below is None and args.keep_above is None) != (args.output is None):
        raise UsageError("--keep-below or --keep-above and --output belong together", "Give both, or none of them.")
    settings = data_config(args)
    check_paths(args.model, args.adapter, args.data, settings.encoding)
    say(f"score       {args.data} by {args.model}")
    from pathlib import Path

    from ..checkpoint.open_model import folder_notes, open_model
    from ..console import Console
    from ..data import load_examples
    from ..files.atomic import write_file
    from ..files.model_folder import ModelFolder
    from ..rows.token_store import TokenCache
    from ..text.tokenizer import load_tokenizer
    from ..tools.score_data import kept, score_lines, score_rows, write_kept
    from ..tools.score_data_show import shown_progress, to_html, to_text

    console = Console()
    folder = ModelFolder(args.model)
    tokenizer = load_tokenizer(folder, args.adapter)
    for name, note in folder_notes(folder, tokenizer, args.adapter).items():
        say(f"{name:<12}{note}")
    cache = TokenCache(Path(args.cache), Path(args.model)) if args.cache else None
    examples, report = load_examples(args.data, tokenizer, settings, seed=args.seed, cache=cache)
    console.print(f"data        {report}", highlight=False, markup=False, soft_wrap=True)
    model = open_model(folder, tokenizer, args.adapter, say=lambda how: say(f"compute     {how}"), **opening(args))
    scores = list(shown_progress(score_rows(model, examples, settings.max_length), len(examples), console))
    if args.scores:
        write_file(Path(args.scores), "".join(score_lines(scores, examples)))
    marks = {k: v for k, v in (("keep_below", args.keep_below), ("keep_above", args.keep_above)) if v is not None}
    console.print(to_text(scores, examples, marks, args.worst), highlight=False, markup=False, soft_wrap=True)
    if args.output:
        import numpy as np

        keep = kept(np.array([s.perplexity for s in scores]), args.keep_below, args.keep_above)
        write_kept(Path(args.output), scores, keep, examples)
        console.print(f"kept        {keep.sum():,} of {len(keep):,} rows: {args.output}", highlight=False, markup=False)
    if args.scores:
        console.print(f"scores      {args.scores}", highlight=False, markup=False)
    if args.html:
        write_file(Path(args.html), to_html(args.data, args.model, scores, examples, marks, max(args.worst, 20)))
        console.print(f"page        {args.html}", highlight=False, markup=False)
