"""minilora merge: base and adapter as one checkpoint, and the proof that it computes the same."""

import argparse

from .before import check_paths, say
from .shared_flags import between, model_flags, opening


def flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser, adapter=False)
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the merged checkpoint")
    parser.add_argument(
        "--shard-size",
        type=between(float, 0.001, 100_000),
        default=5.0,
        metavar="GB",
        help="largest file in 10^9 bytes [5]",
    )


def run(args: argparse.Namespace) -> None:
    check_paths(args.model, args.adapter)
    say(f"merging {args.adapter} into {args.model}")
    from ..checkpoint.merge import merge_folder

    proof = merge_folder(args.model, args.adapter, args.output, int(args.shard_size * 1e9), say=say, **opening(args))
    say(f"merged  {args.output}")
    say(
        f"proof   over {proof.tokens} tokens of 8 prompts, read back from the disk: a logit is off by at most {proof.merged:.3g}"
    )
    say(
        f"        ({proof.allowed:.3g} would be rounding; the adapter moves logits by {proof.adapter:.3g}); likeliest next token as in"
    )
    say(
        f"        exact arithmetic for {proof.same:.1%} of the tokens (unmerged, in the same type: {proof.same_plain:.1%})"
    )
    say(f"\n  minilora chat --model {args.output}")
