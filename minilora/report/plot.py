"""loss.png: the training loss, raw and smoothed, and the validation loss with its best point."""

import io
import logging
import math
import os
import re
import warnings
from pathlib import Path

from ..files.atomic import write_file
from ..files.strict_json import read_json_lines

CJK = re.compile(r"CJK|WenQuanYi|SimHei|SimSun|YaHei|PingFang|Heiti|Hiragino|Source Han|AR PL", re.IGNORECASE)


def plot_loss(run: Path) -> str:
    """Draw RUN/loss.png from RUN/metrics.jsonl; returns the path, or what is missing to draw it."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its caches and fonts are no news to a user
    try:
        from matplotlib import rc_context, rcParams
        from matplotlib.font_manager import fontManager
    except ImportError:
        return "no loss.png: matplotlib is not there (pip install 'minilora[report]')"
    # a name in Chinese is drawn where a font for it is there, and warns nobody where there is none
    families = [*rcParams["font.sans-serif"][:1], *sorted({f.name for f in fontManager.ttflist if CJK.search(f.name)})]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        return _draw(run)


def _draw(run: Path) -> str:
    from matplotlib.figure import Figure

    metrics = read_json_lines(run / "metrics.jsonl")
    train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    val = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="train")
        axes.plot(steps, smoothed(list(losses)), color="#08519c", linewidth=2, label="train, smoothed")
    if val:
        steps, losses = zip(*val, strict=True)
        axes.plot(
            steps, losses, color="#d95f02", linestyle="--", marker="o", markersize=4, linewidth=1.5, label="validation"
        )
        best = min((p for p in val if math.isfinite(p[1])), key=lambda p: p[1], default=None)
        if best:
            side = "right" if best[0] > 0.9 * steps[-1] else "left" if best[0] < 0.1 * steps[-1] else "center"
            axes.annotate(f"best {best[1]:.3f}", best, xytext=(0, 10), textcoords="offset points", ha=side)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title(run.name, parse_math=False)  # a $ in a name is a $
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(run / "loss.png", picture.getvalue())
    return str(run / "loss.png")


def smoothed(values: list[float]) -> list[float]:
    """Exponential average over about a twentieth of the values, bias-corrected; a value that is not finite is passed over."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else value)
    return result
