"""An adapter of a smaller rank that is as close as one can be, and what it costs in loss."""

from pathlib import Path

from ..checkpoint.adapter import trained_quant
from ..checkpoint.factors import read_factors, write_factors
from ..checkpoint.open_model import open_model
from ..checkpoint.quantized import FORMS
from ..config import DataConfig
from ..data import load_examples
from ..evaluate import evaluate
from ..files.atomic import require_empty
from ..files.model_folder import Folder, ModelFolder
from ..text.tokenizer import load_tokenizer
from .inspect_adapter import Spectrum


def truncate_adapter(source: Path, rank: int, target: Path) -> float:
    """Write the closest adapter of at most this rank for every linear; returns the share of all energy that it keeps."""
    require_empty(target)
    spectra = {path: Spectrum.of(f) for path, f in read_factors(source).items()}
    write_factors(target, {path: s.first(rank) for path, s in spectra.items()}, source)
    kept, whole = (sum(float(s.s[:n].square().sum()) for s in spectra.values()) for n in (rank, None))
    return kept / whole if whole else 1.0


def cost_of(source: Path, smaller: Path, model: Folder, data: str, settings: DataConfig) -> list[str]:
    """Lines with the loss on rows of the base, of the adapter, and of the smaller one, in nats an answer token.

    The base has the bits with which the adapter was trained.
    """
    folder = ModelFolder.of(model)
    tokenizer = load_tokenizer(folder, str(source))
    bits = trained_quant(source)
    examples, report = load_examples(data, tokenizer, settings)
    lines = [f"data      {report}"]
    for name, adapter in (("base", None), ("adapter", str(source)), ("truncated", str(smaller))):
        opened = open_model(folder, tokenizer, adapter, quant=bits if bits in FORMS else "keep")
        score = evaluate(opened, examples, settings.max_length)
        lines.append(f"{name:<9} loss {score.loss:.4f} over {score.tokens:,} answer tokens")
    return lines
