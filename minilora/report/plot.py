"""loss.png: the training loss, raw and smoothed, and the validation loss with its best point."""

import io
import logging
import os
import re
import warnings
from pathlib import Path

from ..files.atomic import write_file
from .record import read_record

CJK = re.compile(r"CJK|WenQuanYi|SimHei|SimSun|YaHei|PingFang|Heiti|Hiragino|Source Han|AR PL", re.IGNORECASE)


def plot_loss(run: Path) -> str:
    """Draw RUN/loss.png from RUN/metrics.jsonl; returns the path, or why there is none."""
    if os.path.exists("matplotlibrc"):  # which older versions evaluate as Python
        return "no loss.png: matplotlib would take its settings from the matplotlibrc in the current folder"
    os.environ.setdefault("MPLBACKEND", "Agg")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a user need not hear of its caches and fonts
    try:
        from matplotlib import rc_context, rcParams
        from matplotlib.font_manager import fontManager
    except ImportError:
        return "no loss.png: matplotlib is not installed (pip install 'minilora[report]')"
    # a Chinese name is drawn if a font for it is installed; without one there is no warning
    families = [*rcParams["font.sans-serif"][:1], *sorted({f.name for f in fontManager.ttflist if CJK.search(f.name)})]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        return _draw(run)


def _draw(folder: Path) -> str:
    from matplotlib.figure import Figure

    run = read_record(folder)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if run.loss:
        axes.plot(run.loss.x, run.loss.y, color="#9ecae1", linewidth=1, label="train")
        axes.plot(run.smooth.x, run.smooth.y, color="#08519c", linewidth=2, label="train, smoothed")
    if run.val:
        look = {"color": "#d95f02", "linestyle": "--", "marker": "o", "markersize": 4, "linewidth": 1.5}
        axes.plot(*zip(*run.val, strict=True), label="validation", **look)
    if run.best:
        (step, loss), last = run.best, run.val[-1][0]
        side = "right" if step > 0.9 * last else "left" if step < 0.1 * last else "center"
        axes.annotate(f"best {loss:.3f}", run.best, xytext=(0, 10), textcoords="offset points", ha=side)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title(folder.name, parse_math=False)  # a $ in a name is a $
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(folder / "loss.png", picture.getvalue())
    return str(folder / "loss.png")
