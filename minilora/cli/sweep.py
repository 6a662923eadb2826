"""minilora sweep: several runs that differ in what a file says, and the page that compares them."""

from typing import Annotated, Any

from .arguments import Arg, Settings

USAGE = "minilora sweep FILE --output DIR [--smoke] [--SETTING VALUE ...]"
EPILOG = """Any setting of minilora train can be given as a flag; it wins over the file's base:
see minilora train --help."""


def run(
    file: Annotated[str, Arg("yaml of base, zip, product and test, or the name of a recipe", "FILE")],
    *,
    output: Annotated[str, Arg("folder for all runs; one that was stopped goes on", "DIR")],
    smoke: Annotated[bool, Arg("the file's small version: minutes on a CPU")] = False,
    **settings: Annotated[Any, Settings(shown=False)],
) -> None:
    from ..tools.sweep import sweep

    sweep(file, output, settings, smoke)
