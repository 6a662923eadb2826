"""The command line. Heavy imports are inside the commands, so that --help is quick."""

import errno
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from importlib import import_module

from . import __version__
from .cli.arguments import add_arguments, keywords
from .cli.parser import Parser
from .errors import MiniloraError, UsageError
from .machine.cpu import before_torch, tune_memory
from .ranks.early import said_once
from .run.signals import one_command
from .terminal import printable

NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTDIR}  # what no file or folder can be called
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        with one_command(alone=argv is None), said_once():  # which waits for a signal
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
        full = "Free some space, or give another --output. What was there before is untouched."
        code = 2 if error.errno in NO_PATH else 6
        return fail(code, what, full if error.errno in DISK else "Check the path and its permissions.")
    except MemoryError:
        return fail(7, "out of memory", "Close other programs, or use a smaller model.")
    except Exception as error:  # noqa: BLE001 the last net: everything else is our own bug
        from torch import OutOfMemoryError

        if isinstance(error, OutOfMemoryError) or "can't allocate memory" in str(error):
            what = f"out of memory: {str(error).splitlines()[0]}"
            return fail(7, what, "Close other programs, or use a smaller model.")
        print(printable(traceback.format_exc()), file=sys.stderr)
        return fail(70, "this is a bug of minilora", "Please report it with the lines above.")


def fail(code: int, what: str, hint: str = "") -> int:
    """Say what is wrong on standard error; returns the code."""
    kind = "" if code == 75 else "error: "  # stopped and saved is no failure
    print(f"{kind}{printable(what)}", file=sys.stderr)
    if hint:
        print(f"{' ' * len(kind)}{printable(hint)}", file=sys.stderr)
    return code


def run(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows another
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    broken = next((word for word in argv if any("\ud800" <= c <= "\udfff" for c in word)), None)  # lone surrogates
    if broken is not None:
        raise UsageError(f"{broken!a} is not UTF-8", "Type it in a terminal that writes UTF-8.")
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    parser = Parser(prog="minilora", description="A from-scratch LoRA engine for GLM and Qwen.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    _add_commands(parser, argv)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    arguments = keywords(command, given)
    before_torch()
    tune_memory()
    return command(**arguments) or 0


def _add_commands(parser: Parser, words: list[str], group: str = "") -> None:
    """Add the commands, or those of a group. Only the command that is asked for is imported and gets its arguments."""
    choices = parser.add_subparsers(metavar="WHAT" if group else "COMMAND", required=True, parser_class=Parser)
    asked = next((word for word in words if not word.startswith("-")), "")
    for name, summary in (SUBCOMMANDS[group] if group else COMMANDS).items():
        description = f"{summary[0].upper()}{summary[1:]}."
        sub = choices.add_parser(name, help=summary, description=description, allow_abbrev=False)
        if name == asked and not group and name in SUBCOMMANDS:
            _add_commands(sub, words[words.index(name) + 1 :], name)
        elif name == asked:
            module = import_module(f"minilora.cli.{group}_{name}" if group else f"minilora.cli.{name}")
            sub.usage, sub.epilog = getattr(module, "USAGE", None), getattr(module, "EPILOG", None)
            if sub.epilog:
                sub.formatter_class = RawDescriptionHelpFormatter
            sub.set_defaults(command=module.run)
            add_arguments(sub, module.run)


COMMANDS = {
    "demo": "see it work: a tiny chat model learns a new name",
    "doctor": "what this machine has, how fast it is, what is to be mended, and what binds",
    "plan": "tell what a training needs, from config.json alone or with the data, and do nothing",
    "train": "train an adapter on rows of conversations",
    "chat": "talk with a model and its adapter",
    "eval": "loss and perplexity on a file of rows",
    "inspect": "look at a model folder or a file of rows before anything is done with it",
    "explain": "one step of training through one linear, number by number, and where its code is",
    "data": "measure, filter and divide rows",
    "predict": "answers to the questions of a test set, and their BLEU and ROUGE",
    "sweep": "several runs that differ in one thing, and the page that compares them",
    "compare": "runs side by side on one page: settings, losses, scores with p, answers",
    "report": "one run on one page: curves, lengths, adapter, and what the curve says",
    "convert": "turn a folder of pickle weights into safetensors",
    "merge": "write base and adapter as one checkpoint, and prove it",
    "export": "write an adapter as PEFT, vLLM or llama.cpp reads it, or a model as GGUF",
    "verify": "see whether PEFT or vLLM would apply an adapter, and whether it moves the logits",
    "serve": "a model and its adapters behind an endpoint like OpenAI's, and a page to chat and to watch runs",
    "completion": "a script with which bash, zsh or fish completes commands and flags",
}
# commands of two words: each has its own module, such as cli/inspect_data.py
SUBCOMMANDS = {
    "inspect": {
        "adapter": "what an adapter learned: sizes, spectra, directions, drift, and a smaller rank that would do",
        "data": "what the model sees of a file of rows: tokens, roles, what is trained, lengths, problems",
        "model": "family, sizes, linears that take adapters, chat format and stop tokens of a model folder",
    },
    "data": {
        "score": "perplexity of every row under a model, the strangest rows, and a filter",
        "split": "divide rows into train, val and test files, with their hashes and the rows that are too alike",
    },
}

if __name__ == "__main__":
    sys.exit(main())
