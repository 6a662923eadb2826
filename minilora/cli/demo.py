"""minilora demo: a tiny chat model learns a new name."""

from typing import Annotated

from ..terminal import say
from .arguments import Arg


def run(
    *,
    output: Annotated[str, Arg("run folder; an older demo in it is replaced", "DIR")] = "demo-run",
    name: Annotated[str, Arg("what the model shall be called")] = "Archer",
    author: Annotated[str, Arg("who it shall say made it")] = "DemoLab",
) -> None:
    say("A tiny bilingual chat model ships with minilora. This is what it says:\n")
    from ..demo.show import demo

    demo(output, name, author)
