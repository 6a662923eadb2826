"""minilora doctor: what this machine has, how fast it is, what is to be mended, and what binds."""

from pathlib import Path
from typing import Annotated

from ..terminal import say
from .arguments import Arg

EPILOG = """on several machines: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
-m minilora doctor on each; the network is then measured between all of their ranks"""


def run(
    *,
    gpus: Annotated[
        int | None,
        Arg("ranks that add up gradients in the measurement [every GPU; two processes on a CPU]", within=(1, 1024)),
    ] = None,
    output: Annotated[str, Arg("folder that runs are written to", "DIR")] = ".",
) -> int:
    from ..ranks.ranks import join
    from ..tools.doctor import diagnose, text_of

    ranks = join(60)
    with ranks.ending_as_one("Start it again."):
        found = diagnose(Path(output), gpus, ranks)
    if found:
        say(text_of(found))
    return next((f.code for f in found if f.mend), 0)
