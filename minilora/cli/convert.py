"""minilora convert: a folder of pickle weights (ChatGLM-6B, ChatGLM2-6B) as safetensors."""

import argparse

from .before import check_paths, say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder with pytorch_model.bin, or its shards and their index")
    parser.add_argument("output", metavar="OUT", help="new folder for the same checkpoint as safetensors")


def run(args: argparse.Namespace) -> None:
    check_paths(args.folder)
    say(f"reading {args.folder}")
    from ..checkpoint.convert import convert

    done = convert(args.folder, args.output, say=say)
    say(
        f"wrote   {args.output}: {done.tensors:,} tensors, {done.bytes / 1e9:,.3g} GB, with the config and the tokenizer"
    )
    say(f"\n  minilora inspect model {args.output}")
