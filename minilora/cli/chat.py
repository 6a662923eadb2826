"""minilora chat: talk with a model and its adapter."""

import argparse

from .before import check_paths, say
from .shared_flags import between, int8_flag, model_flags, opening


def flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    int8_flag(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt [the template's]")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", help="say this and leave; may be given several times"
    )
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--temperature", type=between(float, 0, 100), metavar="X", help="[generation_config.json]")
    parser.add_argument("--top-p", type=between(float, 0, 1), metavar="X", help="[generation_config.json]")
    parser.add_argument("--top-k", type=between(int, 0, 2**31), metavar="N", help="[generation_config.json]")
    parser.add_argument(
        "--max-tokens", type=between(int, 1, 2**31), default=1024, metavar="N", help="longest answer [1024]"
    )
    parser.add_argument("--think", action="store_true", help="let a model that can think do so")
    parser.add_argument("--seed", type=between(int, 0, 2**63 - 1), default=0, metavar="N", help="of the sampling [0]")


def run(args: argparse.Namespace) -> None:
    check_paths(args.model, args.adapter)
    say(f"loading {args.model}")
    from ..tools.chat import chat

    chat(
        args.model,
        args.adapter,
        args.system,
        args.prompt,
        args.greedy,
        args.max_tokens,
        args.think,
        args.seed,
        args.temperature,
        args.top_p,
        args.top_k,
        **opening(args),
    )
