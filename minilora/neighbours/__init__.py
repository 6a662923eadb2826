"""Translates configs of LLaMA-Factory, mlx-lm and axolotl into settings of a run here; one file per tool has its table of keys."""

from .axolotl import AXOLOTL
from .llama_factory import LLAMA_FACTORY
from .mlx_lm import MLX_LM
from .translate import Config, Neighbour, translated

__all__ = ["NEIGHBOURS", "Neighbour", "translated", "writer_of"]
NEIGHBOURS = (LLAMA_FACTORY, MLX_LM, AXOLOTL)


def writer_of(config: Config) -> Neighbour | None:
    """The tool that a config was written for, by keys that only this tool has; None for one of ours."""
    return next((neighbour for neighbour in NEIGHBOURS if neighbour.wrote(config)), None)
