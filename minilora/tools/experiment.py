"""The page on a sweep with a question: the answer of its runs and, if the question asks for them, the spectra of their dW."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoint.factors import Factors, read_factors
from ..checkpoint.load import empty_model, read_config
from ..checkpoint.quantized import Stored
from ..errors import DataError, UsageError
from ..files.model_folder import ModelFolder
from ..files.safetensors import SafetensorsFile
from ..report.experiment import Cells, Estimate, Question, Table, experiment
from ..report.page import write_both
from ..report.record import Record, read_json_file, read_record
from ..run.snapshot import MODEL
from .inspect_adapter import Spectrum, beside, effective_rank, in_fp32, rank_for

SPECTRA = (
    "Means over the linears of the run with the best loss of each seed. Effective rank: exp of the entropy of the singular values of dW. "
    "Intruders: of the ten strongest singular directions of W + dW, those that W does not have (Shuttleworth et al., 2024, "
    "arXiv 2410.21228). The changes of full fine-tuning are read from its last checkpoint, in fp32."
)


def write_experiment(folder: Path, output: Path, failed: Sequence[str] = ()) -> list[str]:
    """Write the page on a sweep's folder, in html and in markdown; returns its verdicts. UsageError if the sweep has no question."""
    cells = read_cells(folder)
    more = [("What was changed", SPECTRA, _spectra(cells))] if cells.question.spectra else []
    page = experiment(cells, failed, more)
    write_both(output, page.html(), page.markdown())
    return page.verdicts


def read_cells(folder: Path) -> Cells:
    """The runs of a sweep's folder that were started, and its question."""
    sweep = read_json_file(folder / "sweep.json") if (folder / "sweep.json").is_file() else {}
    if not sweep.get("question"):
        raise UsageError(f"{folder} is one folder and no sweep that asks a question", "Give two or more runs.")
    runs = sweep.get("runs")
    if (
        not isinstance(sweep["question"], dict)
        or not isinstance(runs, list)
        or not all(isinstance(r, str) for r in runs)
    ):
        raise DataError(f"{folder / 'sweep.json'} is not what a sweep writes", "Give the same minilora sweep again.")
    question = Question.of(sweep["question"], str(folder / "sweep.json"))
    found = [folder / name for name in runs if (folder / name / "config.yaml").is_file()]
    if not found:
        raise UsageError(f"{folder} has no run yet", "Give a sweep that was run.")
    return Cells(question, map(read_record, found))


def _spectra(cells: Cells) -> Table:
    """Size and spectrum of the changes of each group, over seeds."""
    rows = []
    for along in cells.alongs:
        for group in cells.groups:
            measured = [_measure(best.run) for best in cells.bests(along, group).values()]
            texts = [Estimate.of(column).text(".3g") for column in zip(*measured, strict=True)]
            rows.append([*([along] if along else []), *group, *texts])
    named = [*([cells.question.along] if cells.question.along else []), *cells.question.compare]
    return [*named, "||dW|| / ||W||", "effective rank", "rank of 90 % of the energy", "intruders of 10"], rows


def _measure(run: Record) -> tuple[float, ...]:
    """Means over the linears of a run: size beside W, effective rank, rank of 90 % of the energy, intruders."""
    folder, found = ModelFolder(run.config["model"]), []
    stored = Stored.of(folder, empty_model(read_config(folder)))
    for path, factors in _changes(run, stored).items():
        with stored.reading_linear(path, torch.Size(factors.shape)) as w:
            spectrum = Spectrum.of(factors)
            base = beside(in_fp32(w), factors, spectrum)
        found.append(
            (base.relative, effective_rank(spectrum.s), float(rank_for(spectrum.s, 0.9)), float(base.intruders))
        )
    return tuple(statistics.fmean(column) for column in zip(*found, strict=True))


def _changes(run: Record, stored: Stored) -> dict[str, Factors]:
    """dW of a run by linear; of full fine-tuning, only the linears that LoRA would adapt."""
    if run.config["method"] != "full":
        return read_factors(run.folder / "adapter")
    file, changes = SafetensorsFile(run.folder / "checkpoints" / "last" / MODEL), {}
    for name, entry in file.entries.items():
        if ".layers." in name and name.endswith("_proj.weight"):
            path = name.removesuffix(".weight")
            with stored.reading_linear(path, torch.Size(entry.shape)) as w:
                u, s, vh = torch.linalg.svd(file.tensor(name).double() - in_fp32(w).double(), full_matrices=False)
            changes[path] = Factors(vh, u * s)
    return changes
