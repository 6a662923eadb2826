"""The command line. Heavy imports are inside the commands, so that --help is quick."""

import argparse
import errno
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from . import __version__
from .errors import MiniloraError, UsageError

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is a UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"See {self.prog} --help.")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except MiniloraError as error:
        return fail(error.code, error.what, error.hint)
    except KeyboardInterrupt:
        return fail(130, "stopped by Ctrl-C")
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno in DISK:
            return fail(6, what, "Free some space, or give another --output. What was there before is untouched.")
        return fail(6, what, "Check the path and its permissions.")
    except MemoryError:
        return fail(7, "out of memory", "Close other programs, or use a smaller model.")
    except Exception as error:  # noqa: BLE001 the last net: everything else is our own bug
        from torch import OutOfMemoryError

        if isinstance(error, OutOfMemoryError) or "can't allocate memory" in str(error):
            return fail(
                7,
                f"out of memory: {str(error).splitlines()[0]}",
                "Close other programs, or use a smaller model.",
            )
        traceback.print_exc()
        return fail(70, "this is a bug of minilora", "Please report it with the lines above.")


def fail(code: int, what: str, hint: str = "") -> int:
    """Say what is wrong on standard error; returns the code."""
    kind = "" if code == 75 else "error: "  # stopped and saved is no failure
    print(f"{kind}{what}", file=sys.stderr)
    if hint:
        print(f"{' ' * len(kind)}{hint}", file=sys.stderr)
    return code


def run(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows another
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    broken = next((word for word in argv if not _is_text(word)), None)
    if broken is not None:
        raise UsageError(f"{broken!a} is not UTF-8", "Type it in a terminal that writes UTF-8.")
    parser = Parser(prog="minilora", description="A from-scratch LoRA engine for Qwen models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (summary, add_flags, _) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False)
        # the flags of train are many; they are made when train is asked for
        if name == (argv[0] if argv else ""):
            add_flags(sub)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "train":
        raise UsageError(f"unknown argument {rest[0]!r}", f"See minilora {args.command} --help.")
    if args.command == "train":
        args.rest = rest
    return COMMANDS[args.command][2](args) or 0


def _is_text(word: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in word)


def train_flags(parser: argparse.ArgumentParser) -> None:
    from dataclasses import fields

    from .config import TrainConfig, defaults, kind_name

    parser.add_argument("-c", "--config", metavar="FILE", help="yaml file of the settings below; flags win over it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--overwrite", action="store_true", help="delete what is in --output")
    for f in fields(TrainConfig):
        flag, default = "--" + f.name.replace("_", "-"), defaults()[f.name]
        shown = "" if default in ("", None, {}) else f" [{'off' if default is False else default}]"
        text = (f.metadata["help"] + shown).replace("%", "%%")
        action = "append" if f.name == "define" else "store"
        parser.add_argument(flag, metavar=kind_name(f), help=text, default=argparse.SUPPRESS, action=action)


def train_command(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .config import read_yaml, resolve

    flags = {k: v for k, v in vars(args).items() if k not in ("command", "config", "resume", "overwrite", "rest")}
    flags |= _foreign_flags(args.rest)
    if "define" in flags:
        flags["define"] = _definitions(flags["define"])
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other", "Give one of them.")
    sources = [read_yaml(Path(args.config))] if args.config else []
    if args.resume:
        if "output" not in flags:
            raise UsageError("--output is missing", "minilora train --output RUN --resume")
        saved = Path(flags["output"]) / "config.yaml"
        if not saved.is_file():
            raise UsageError(f"{saved} is not there", "Give the --output of the run to go on with.")
        sources.insert(0, read_yaml(saved))
    config = resolve(*sources, flags)

    from .heap import keep_heap
    from .train import train

    keep_heap()
    train(config, args.resume, args.overwrite)
    return 0


def _definitions(given: list[str]) -> dict[str, str]:
    """NAME=TEXT words as a dictionary."""
    pairs = [text.partition("=") for text in given]
    wrong = next((key for key, mark, _ in pairs if not mark or not key), None)
    if wrong is not None:
        raise UsageError(f"--define {wrong!r} is not NAME=TEXT", "For example --define name=Archer.")
    return {key: text for key, _, text in pairs}


def _foreign_flags(rest: list[str]) -> dict[str, Any]:
    """Flags under names known from other tools; UsageError with the nearest name for an unknown one."""
    from .config import canonical

    flags, words = {}, list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"unknown argument {word!r}", "See minilora train --help.")
        name, mark, value = word[2:].partition("=")
        name = canonical(name)
        if not mark and not words:
            raise UsageError(f"{word} needs a value", "See minilora train --help.")
        flags[name] = value if mark else words.pop(0)
    return flags


def model_flags(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a Hugging Face checkpoint")
    parser.add_argument(
        "--adapter", required=not adapter, metavar="DIR", help="PEFT adapter folder, such as RUN/adapter"
    )
    parser.add_argument("--any-base", action="store_true", help="take an adapter that was trained on another base")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 [the GPU if there is one]")


def _between(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a number within bounds, both allowed."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    number.__name__ = kind.__name__
    return number


def chat_flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt [the template's]")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", help="say this and leave; may be given several times"
    )
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--temperature", type=_between(float, 0, 100), metavar="X", help="[generation_config.json]")
    parser.add_argument("--top-p", type=_between(float, 0, 1), metavar="X", help="[generation_config.json]")
    parser.add_argument("--top-k", type=_between(int, 0, 2**31), metavar="N", help="[generation_config.json]")
    parser.add_argument(
        "--max-tokens", type=_between(int, 1, 2**31), default=1024, metavar="N", help="longest answer [1024]"
    )
    parser.add_argument("--think", action="store_true", help="let a model that can think do so")
    parser.add_argument("--seed", type=_between(int, 0, 2**63 - 1), default=0, metavar="N", help="of the sampling [0]")


def chat_command(args: argparse.Namespace) -> None:
    from .chat import chat
    from .heap import keep_heap

    keep_heap()
    chat(args.model, args.adapter, args.system, args.prompt, args.greedy, args.max_tokens, args.think, args.seed,
         args.any_base, args.device, args.temperature, args.top_p, args.top_k)  # fmt: skip


def eval_flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="json or jsonl file of rows")
    parser.add_argument("--define", metavar="NAME=TEXT", action="append", default=[], help="fill {{name}} in the rows")
    parser.add_argument("--loss-on", choices=["all", "last"], default="all", help="which answers count [all]")
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="longest row in tokens [2048]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def eval_command(args: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from .adapter import load_adapter
    from .checkpoint import load_model
    from .data import load_examples
    from .evaluate import evaluate
    from .heap import keep_heap
    from .tokenizer import check_fits, load_tokenizer

    keep_heap()
    tokenizer = load_tokenizer(args.model)
    examples, report = load_examples(args.data, tokenizer, _definitions(args.define), args.loss_on, args.max_length)
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


def merge_flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser, adapter=False)
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the merged checkpoint")
    parser.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file in 10^9 bytes [5]")


def merge_command(args: argparse.Namespace) -> None:
    from .heap import keep_heap
    from .merge_folder import merge_folder

    keep_heap()
    if args.shard_size <= 0:
        raise UsageError(f"--shard-size is {args.shard_size:g}", "A number of gigabytes belongs there.")
    proof = merge_folder(args.model, args.adapter, args.output, int(args.shard_size * 1e9), args.any_base, args.device)
    print(f"merged  {args.output}")
    print(
        f"proof   over {proof.tokens} tokens of 8 prompts, read back from the disk: a logit is off by at most {proof.merged:.3g}"
    )
    print(
        f"        ({proof.allowed:.3g} would be rounding; the adapter moves logits by {proof.adapter:.3g}); likeliest next token as in"
    )
    print(
        f"        exact arithmetic for {proof.same:.1%} of the tokens (unmerged, in the same type: {proof.same_plain:.1%})"
    )
    print(f"\n  minilora chat --model {args.output}")


def demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        default="demo-run",
        metavar="DIR",
        help="run folder; an older demo in it is replaced [demo-run]",
    )
    parser.add_argument("--name", default="Archer", metavar="TEXT", help="what the model shall be called [Archer]")
    parser.add_argument("--author", default="DemoLab", metavar="TEXT", help="who it shall say made it [DemoLab]")


def demo_command(args: argparse.Namespace) -> None:
    from .demo.show import demo
    from .heap import keep_heap

    keep_heap()
    demo(args.output, args.name, args.author)


COMMANDS = {
    "demo": ("see it work: a tiny chat model learns a new name", demo_flags, demo_command),
    "train": ("train an adapter on rows of conversations", train_flags, train_command),
    "chat": ("talk with a model and its adapter", chat_flags, chat_command),
    "eval": ("loss and perplexity on a file of rows", eval_flags, eval_command),
    "merge": ("write base and adapter as one checkpoint, and prove it", merge_flags, merge_command),
}

if __name__ == "__main__":
    sys.exit(main())
