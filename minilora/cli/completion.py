"""minilora completion: a script with which a shell completes commands, flags and their values.

It is made from the signatures of the commands, as their help is, and stands by itself: pressing Tab starts no Python.
"""

import argparse
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from .arguments import Arg, add_arguments
from .parser import Parser

EPILOG = """examples:
  minilora completion bash > ~/.local/share/bash-completion/completions/minilora
  minilora completion zsh > ~/.zfunc/_minilora           # with fpath+=~/.zfunc before compinit
  minilora completion fish > ~/.config/fish/completions/minilora.fish"""


def run(shell: Annotated[Literal["bash", "zsh", "fish"], Arg("the shell that reads it")]) -> None:
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](commands()), end="")


class Flag(NamedTuple):
    name: str
    help: str
    value: bool  # whether a value follows
    choices: tuple[str, ...]


def commands() -> dict[str, list[Flag]]:
    """The flags of every command that has a file here, such as "train" or "inspect data"."""
    found = {}
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = import_module(f".{file.name}", __package__)
        if hasattr(module, "run"):
            parser = Parser(add_help=True, allow_abbrev=False)
            add_arguments(parser, module.run)
            found[file.name.replace("_", " ")] = [flag for action in parser._actions for flag in _flags(action)]
    return found


def _flags(action: argparse.Action) -> list[Flag]:
    if action.help == argparse.SUPPRESS:
        return []
    names = [name for name in action.option_strings if name.startswith("--")]
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    choices = tuple(map(str, action.choices or (metavar.split("|") if "|" in metavar and metavar.islower() else ())))
    text = " ".join((action.help or "").replace("%%", "%").split())
    return [Flag(name, text, action.nargs != 0, choices) for name in names]


def _first_words(known: dict[str, list[Flag]]) -> dict[str, list[str]]:
    """The first words of commands, and the second words that a first one takes."""
    found: dict[str, list[str]] = {}
    for name in known:
        first, _, second = name.partition(" ")
        found.setdefault(first, []).extend([second] if second else [])
    return found


def bash(known: dict[str, list[Flag]]) -> str:
    first = _first_words(known)
    groups = "\n".join(
        f'        {word}) command="$command ${{COMP_WORDS[2]}}"; words="{" ".join(more)}" ;;'
        for word, more in first.items()
        if more
    )
    flags = "\n".join(f'        "{name}") words="{" ".join(f.name for f in of)}" ;;' for name, of in known.items())
    values = "\n".join(
        f'        "{name} {f.name}") COMPREPLY=($(compgen -W "{" ".join(f.choices)}" -- "$current")); return ;;'
        for name, of in known.items()
        for f in of
        if f.choices
    )
    return f"""# completion of minilora for bash; what is no flag is a file
_minilora() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" words="" at=2
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{" ".join(first)}" -- "$current")); return
    fi
    case "$command" in
{groups}
    esac
    if [[ -n "$words" && COMP_CWORD -eq 2 ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current")); return
    fi
    case "$command ${{COMP_WORDS[COMP_CWORD - 1]}}" in
{values}
    esac
    [[ "$current" == -* ]] || return
    case "$command" in
{flags}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _minilora minilora
"""


def zsh(known: dict[str, list[Flag]]) -> str:
    first = _first_words(known)
    groups = "\n".join(
        f'    {word}) command="$command $words[3]"; second=({" ".join(more)}) ;;'
        for word, more in first.items()
        if more
    )

    def described(f: Flag) -> str:
        return _quoted(f"{f.name}:{f.help.replace(':', chr(92) + ':')}", "'\\''")

    flags = "\n".join(f'    "{name}") flags=({" ".join(map(described, of))}) ;;' for name, of in known.items())
    values = "\n".join(
        f'    "{name} {f.name}") compadd -- {" ".join(f.choices)}; return ;;'
        for name, of in known.items()
        for f in of
        if f.choices
    )
    return f"""#compdef minilora
# completion of minilora for zsh; what is no flag is a file
_minilora() {{
    local command="$words[2]"
    local -a second flags
    if ((CURRENT == 2)); then
        compadd -- {" ".join(first)}; return
    fi
    case "$command" in
{groups}
    esac
    if ((CURRENT == 3 && $#second)); then
        compadd -- $second; return
    fi
    case "$command $words[CURRENT-1]" in
{values}
    esac
    if [[ "$words[CURRENT]" != -* ]]; then
        _files; return
    fi
    case "$command" in
{flags}
    esac
    _describe flag flags
}}
_minilora "$@"
"""


FISH = """# completion of minilora for fish; what is no flag is a file
function __minilora_at # these words, and no more yet
    set -l words (commandline -opc)
    set -e words[1]
    test "$words" = "$argv"
end
function __minilora_in # these words, and more
    set -l words (commandline -opc)
    set -e words[1]
    string match -q -- "$argv *" "$words "
end
"""


def fish(known: dict[str, list[Flag]]) -> str:
    first = _first_words(known)
    groups = {"": list(first)} | {word: more for word, more in first.items() if more}
    lines = [
        f"complete -c minilora -n '__minilora_at {name}' -f -a '{' '.join(words)}'" for name, words in groups.items()
    ]
    for name, flags in known.items():
        for f in flags:
            value = " -r" * f.value + (f" -f -a '{' '.join(f.choices)}'" if f.choices else "")
            about = _quoted(f.help.replace("\\", "\\\\"), "\\'")
            lines.append(f"complete -c minilora -n '__minilora_in {name}' -l {f.name[2:]}{value} -d {about}")
    return FISH + "\n".join(lines) + "\n"


def _quoted(text: str, quote: str) -> str:
    """A text in single quotes for a shell, with what stands for a single quote in them."""
    return "'" + text.replace("'", quote) + "'"
