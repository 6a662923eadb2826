"""`minilora report`: one run on one page, with what its curve says, as far as a curve can say it.

Made from the files of the run folder alone, so it can be made again at any time; only --samples loads the model.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..durable import write_file
from ..errors import MiniloraError, UsageError
from ..model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from ..plot import smoothed
from .charts import Level, Series, heat_map, histogram, line_chart
from .compare import loss_rows, over_the_limit, reasons
from .document import Document
from .record import Record, read_record

SAMPLES = "samples.jsonl"


def report(folder: str | Path, samples: int = 0) -> Path:
    """Write RUN/report.html and return its path; `samples` rows are first answered by the base and by the run's adapter."""
    folder = Path(folder)
    run = read_record(folder)
    if not run.config:
        raise UsageError(f"{folder} is no run", "Give the --output of minilora train.")
    if samples:
        make_samples(run, samples)
    write_file(folder / "report.html", run_page(run).html())
    return folder / "report.html"


def run_page(run: Record) -> Document:
    """The document on a run."""
    page = Document(f"Run {run.name}")
    if not run.metrics:
        page.text("No step was taken yet.", "warning")
        return page
    page.heading("What the curve says")
    for line in reading(run):
        page.text(line)
    page.text("Read from the losses alone; answers to a test set (minilora predict) tell more.", "dim")
    page.heading("Loss")
    raw = Series("training loss", run.loss, 0, 0, faint=True)
    series = [raw, Series("training loss, smoothed over a twentieth of the steps", run.smooth, 0, 0)]
    if run.val:
        series.append(Series("validation loss", run.val, 1, 1, dots=True))
    page.chart(line_chart(series, "step", "loss (nats a token)", best=run.best))
    page.table(["", run.name], loss_rows([run]))
    page.heading("Optimizer and speed")
    page.chart(line_chart([Series("", _column(run, "lr"))], "step", "learning rate"))
    clip = run.config.get("clip")
    levels = [Level(clip, f"clipped above {clip:g}")] if isinstance(clip, (int, float)) and clip > 0 else []
    page.chart(line_chart([Series("", _column(run, "grad_norm"))], "step", "gradient norm", log=True, levels=levels))
    if levels:
        over = sum(m["grad_norm"] > clip for m in run.metrics)
        page.text(f"{over:,} of {len(run.metrics):,} steps were clipped.", "dim")
    page.chart(line_chart([Series("", _column(run, "tokens_per_second"))], "step", "tokens a second"))
    _data(page, run)
    _adapter(page, run)
    _samples(page, run)
    page.heading("Settings")
    page.table(["setting", "value"], [[key, str(value)] for key, value in run.config.items()])
    return page


def _column(run: Record, key: str) -> list[tuple[float, float]]:
    return [(m["step"], m[key]) for m in run.metrics if isinstance(m.get(key), (int, float))]


def reading(run: Record) -> list[str]:
    """What the curve shows: whether the loss fell, still falls, came apart, and whether validation turned."""
    losses = [y for _, y in run.loss]
    if len(losses) < 10:
        return [f"Only {len(losses)} steps: too few to read a curve from."]
    broken = [step for step, y in run.loss if not math.isfinite(y)]
    if broken:
        return [
            f"The loss is not finite from step {broken[0]:,} on: the run diverged. A lower lr or a longer warmup may help."
        ]
    lines = [_trend(losses)]
    ends = smoothed(losses)
    low = min(ends)
    spikes = [step for (step, y), mean in zip(run.loss[10:], ends[9:], strict=False) if y > 3 * mean and y > 1]
    if ends[-1] > 1.5 * low and ends[-1] > low + 0.3:
        lines.append(f"The smoothed training loss ends at {ends[-1]:.3g}, well above its lowest value of {low:.3g}: it may be diverging. "
                     "A lower lr is the first thing to try.")  # fmt: skip
    if spikes:
        lines.append(
            f"{len(spikes):,} steps stand out at over three times the loss around them (first: step {spikes[0]:,})."
        )
    return [*lines, _validation(run)]


def _trend(losses: list[float]) -> str:
    """Whether the last quarter still falls: a line through it, against the scatter of the points around the line."""
    tail = np.array(losses[-max(len(losses) // 4, 8) :])
    x = np.arange(len(tail)) - (len(tail) - 1) / 2
    slope = float((x * tail).sum() / (x * x).sum())
    scatter = math.sqrt(
        float(((tail - tail.mean() - slope * x) ** 2).sum()) / max(len(tail) - 2, 1) / float((x * x).sum())
    )
    moved = slope * len(tail)
    fell = f"The training loss went from {np.mean(losses[:3]):.3g} to {np.mean(tail[-3:]):.3g}."
    if abs(slope) <= 2 * scatter or abs(moved) < 0.02 * abs(float(tail.mean())):
        return f"{fell} In the last quarter it is level within its scatter: more steps with this schedule would change little."
    if slope < 0:
        return f"{fell} In the last quarter it still falls (by {-moved:.2g}): it has not converged."
    return f"{fell} In the last quarter it rises (by {moved:.2g})."


def _validation(run: Record) -> str:
    if len(run.val) < 2 or run.best is None:
        return "There are no validation losses over time: whether the run over-fits cannot be seen (--val 0.05)."
    (best_step, best), (last_step, last) = run.best, run.val[-1]
    if best_step == 0:
        return (f"Validation was best before training ({best:.4g}, then {last:.4g}): these rows do not teach what is validated, "
                "or the lr is too high.")  # fmt: skip
    if last > 1.02 * best and last_step > best_step:
        return (f"Validation was best at step {best_step:,} ({best:.4g}) and is {last:.4g} at the end while training went on: "
                "that is how over-fitting looks. checkpoints/best holds the best step; fewer epochs would do.")  # fmt: skip
    gap = last - run.smooth[-1][1]
    more = f" It ends {gap:.2g} above the training loss." if gap > 0.5 * max(run.smooth[-1][1], 0.1) else ""
    return f"Validation loss is {last:.4g} at the end, the best is {best:.4g} at step {best_step:,}: no over-fitting is seen.{more}"


def _data(page: Document, run: Record) -> None:
    if not run.data:
        return
    data = run.data
    page.heading("Rows and lengths")
    share = 100 * data["trained"] / max(data["tokens"], 1)
    page.text(f"{data['rows']:,} rows: {data['train_rows']:,} trained on, {data['val_rows']:,} validated on; dropped: {reasons(run, 'dropped')}; "
              f"cut: {reasons(run, 'cut')}. "
              f"{data['tokens']:,} tokens an epoch, {share:.0f} % of them trained.")  # fmt: skip
    for key, label, limit in (("masked_lengths", "masked tokens of a row", "max_source_length"),
                              ("trained_lengths", "trained tokens of a row", "max_target_length")):  # fmt: skip
        counts = {int(n): rows for n, rows in data[key].items()}
        at = run.config.get(limit)
        page.chart(histogram([counts], [label], label, [Level(at, f"{limit} {at}")] if at else []))
    for line in over_the_limit([run]):
        page.text(line)


def _adapter(page: Document, run: Record) -> None:
    """How far each adapter moves its linear."""
    folder = run.folder / "adapter"
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return
    norms = adapter_norms(folder)
    page.heading("Adapter")
    cells, rest = {}, []
    for path, norm in norms.items():
        layer = re.search(r"\.(\d+)\.(.+)$", path)
        if layer:
            cells[layer[2].split(".")[-1], layer[1]] = norm
        else:
            rest.append(f"{path} {norm:.3g}")
    page.text("Frobenius norm of scale x B A, the change that each adapter makes to its weight, by layer."
              + (f" Beside them: {', '.join(rest)}." if rest else ""))  # fmt: skip
    if cells:
        page.chart(heat_map(cells, "layer", "module"))
    still = [path for path, norm in norms.items() if norm == 0]
    if still:
        page.text(f"{len(still):,} of {len(norms):,} adapters change nothing (first: {still[0]})", "warning")


def adapter_norms(folder: Path) -> dict[str, float]:
    """||scale B A||_F of every adapter of a PEFT folder, by path; from the r x r products, B A is never formed."""
    config = read_json(folder / ADAPTER_CONFIG)
    from ..safetensors import SafetensorsFile

    file = SafetensorsFile(folder / ADAPTER_WEIGHTS)
    norms = {}
    for name in file.entries:
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        a, b = (file.tensor(n).double() for n in (name, name.replace(".lora_A.", ".lora_B.")))
        r = a.shape[0]
        alpha = (config.get("alpha_pattern") or {}).get(path, config["lora_alpha"])
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        norms[path] = scale * math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))
    return norms


def make_samples(run: Record, count: int) -> None:
    """Write RUN/samples.jsonl: the answers of the base model and of the run's adapter to rows of its validation file or data."""
    from ..config import resolve
    from ..generate import read_generation
    from ..generate_many import generate_many
    from ..lora import without_adapters
    from ..open_model import open_model
    from ..rows.dataset import data_config
    from ..text.tokenizer import load_tokenizer
    from .predict import read_questions

    config = run.config
    if not (run.folder / "adapter" / ADAPTER_WEIGHTS).is_file():
        raise UsageError(
            f"{run.folder} has no adapter", "Samples before and after are of a finished run with adapters."
        )
    rows = config["val"] if Path(str(config.get("val") or "")).is_file() else config["data"]
    tokenizer = load_tokenizer(config["model"])
    questions = read_questions(rows, tokenizer, data_config(resolve(config)))
    chosen = sorted(np.random.default_rng(0).permutation(len(questions))[:count].tolist())
    device = None if config.get("device", "auto") == "auto" else config["device"]
    model = open_model(config["model"], tokenizer, run.folder / "adapter", device=device)
    stop = read_generation(Path(config["model"]))[1] | tokenizer.stop_ids

    def answers() -> dict[int, str]:
        found = generate_many(model, [questions[i].ids for i in chosen], stop, 256)
        return {chosen[a.number]: tokenizer.answer(a.ids) + (" …" if a.cut else "") for a in found}

    after = answers()
    with without_adapters(model):
        before = answers()
    lines = [{"question": questions[i].text, "label": questions[i].label, "before": before[i], "after": after[i],
              "where": questions[i].where} for i in chosen]  # fmt: skip
    write_file(run.folder / SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _samples(page: Document, run: Record) -> None:
    path = run.folder / SAMPLES
    page.heading("Answers before and after")
    if not path.is_file():
        page.text(f"None yet: minilora report {run.folder} --samples 4 asks the base model and the adapter.", "dim")
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        row: dict[str, Any] = json.loads(line) if line else {}
        if row:
            page.heading(row["where"], small=True)
            for name in ("question", "label", "before", "after"):
                page.text({"label": "reference"}.get(name, name), "dim")
                page.verbatim(row[name])


def report_quietly(folder: Path) -> str:
    """report() at the end of a run, which has better things to do than to fail for a picture; returns the path or why not."""
    try:
        return str(report(folder))
    except (MiniloraError, OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        return f"no report.html: {' '.join(str(error).split())[:200]}"
