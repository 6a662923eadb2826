"""`--log-to`: sends the metrics of each step to experiment trackers: TensorBoard, W&B, SwanLab, MLflow.

Each is imported only when named, writes into the run folder, and sends nothing over the network unless its own variable says
so: WANDB_MODE=online, SWANLAB_MODE=online, MLFLOW_TRACKING_URI. metrics.jsonl is always written.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..config import TrainConfig
from ..errors import UsageError, quote
from ..spelling import nearest

PROJECT = "minilora"


class Logger(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """RUN/tensorboard: `tensorboard --logdir` shows it."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            SummaryWriter = import_module("tensorboardX").SummaryWriter
        # drops what an earlier attempt logged beyond the step at which the run resumes
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1, flush_secs=10)
        self._writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()), start)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """RUN/wandb: `wandb sync` sends it later."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = import_module("wandb")
        settings = wandb.Settings(silent=True, console="off")
        mode = os.environ.get("WANDB_MODE", "offline")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=config, mode=mode, settings=settings
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """RUN/swanlog: `swanlab sync` sends it later."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int):
        mode = os.environ.get("SWANLAB_MODE", "offline")
        self._run = import_module("swanlab").init(
            project=PROJECT, name=folder.name, log_dir=str(folder / "swanlog"), config=config, mode=mode
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """RUN/mlflow.db, or the server of MLFLOW_TRACKING_URI: `mlflow ui --backend-store-uri` shows it."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._mlflow = import_module("mlflow")
        self._mlflow.set_tracking_uri(
            os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        )
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._mlflow.start_run(run_name=folder.name)
        self._mlflow.log_params(config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "swanlab": SwanLab, "mlflow": MLflow,
}  # fmt: skip
PLACES = ("tensorboard", "wandb", "swanlog", "mlflow.db")  # where they write in the folder of a run
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}  # either; else the package of that name
ALWAYS = ("jsonl", "none", "")  # metrics.jsonl is always written


def asked_for(log_to: str) -> list[str]:
    """The loggers that --log-to names. Raises UsageError for one that is not known or not installed."""
    names = [name for name in dict.fromkeys(word.strip() for word in log_to.split(",")) if name not in ALWAYS]
    for name in names:
        if name not in LOGGERS:
            near = nearest(name, LOGGERS)
            hint = f"{f'Did you mean {near}? ' if near else ''}It can be {', '.join(LOGGERS)}, jsonl, or several with commas."
            raise UsageError(f"--log-to names {quote(name)}", hint)
        packages = PACKAGES.get(name, (name,))
        if not any(find_spec(package) for package in packages):
            raise UsageError(f"--log-to names {name}, which is not installed", f"pip install {packages[0]}")
    return names


class Loggers:
    """The loggers of a run. One that fails is reported once and dropped: it never stops the training."""

    def __init__(self, say: Callable[[str], Any]):
        self._open: dict[str, Logger] = {}
        self._say = say

    def open(self, config: TrainConfig, start: int) -> None:
        """Start logging a run that is at step `start`."""
        for name in asked_for(config.log_to):
            with self._harmless(name):
                self._open[name] = LOGGERS[name](Path(config.output), asdict(config), start)

    def log(self, metrics: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl."""
        numbers = {k: v for k, v in metrics.items() if k != "step" and type(v) in (int, float)}
        for name, logger in list(self._open.items()):
            with self._harmless(name):
                logger.log(metrics["step"], numbers)

    def close(self) -> None:
        for name, logger in list(self._open.items()):
            with self._harmless(name):
                logger.close()
        self._open.clear()

    @contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # noqa: BLE001 whatever a program of others does
            self._open.pop(name, None)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._say(f"log     {name} stopped ({reason}); the run goes on, and metrics.jsonl has every step")
