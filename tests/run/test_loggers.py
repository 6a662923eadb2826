"""`--log-to`: what each program is told, and that none of them can stop a training. TensorBoard itself is read back where it is installed."""

import json
import sys
from pathlib import Path

import pytest
from tiny import make_model, make_rows

from minilora.__main__ import main
from minilora.config import TrainConfig
from minilora.run.loggers import LOGGERS, Loggers

# stand-ins of the programs' own calls: what they are told goes into a file
FAKES = {
    "wandb": """
class Settings(dict): pass
class Run:
    def log(self, metrics, step): tell("log", step=step, **metrics)
    def finish(self): tell("finish")
def init(*, project, name, dir, config, mode, settings):
    tell("init", name=name, mode=mode, lr=config["lr"])
    return Run()
""",
    "swanlab": """
class Run:
    def log(self, metrics, step): raise ConnectionError("cloud\\nis away")
    def finish(self): tell("finish")
def init(*, project, name, log_dir, config, mode):
    tell("init", name=name, mode=mode, lr=config["lr"])
    return Run()
""",
    "mlflow": """
def set_tracking_uri(uri): tell("uri", uri=uri)
def set_experiment(name): pass
def start_run(run_name): raise SystemExit(1)
""",
}
TELL = """
import json
def tell(what, **more):
    with open(__file__ + "l", "a") as file:
        file.write(json.dumps([what, more]) + "\\n")
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fakes").mkdir()
    for name, source in FAKES.items():
        (tmp_path / "fakes" / f"{name}.py").write_text(TELL + source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("WANDB_MODE", "SWANLAB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # which they set, here until the test ends
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    return tmp_path / "fakes"


def told(fakes: Path, name: str) -> list:
    return [json.loads(line) for line in (fakes / f"{name}.pyl").read_text().splitlines()]


def test_a_run_is_logged_and_outlives_loggers_that_fail(
    fakes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    words = ["train", "--model", str(make_model(tmp_path / "m")), "--data", str(make_rows(tmp_path / "rows.json")), "--val", "2",
             "--output", str(run), "--max-steps", "3", "--lr", "1e-3", "--log-to", "jsonl, wandb,swanlab,mlflow"]  # fmt: skip
    assert main(words) == 0
    first, *lines, last = told(fakes, "wandb")
    assert first == ["init", {"name": "run", "mode": "offline", "lr": 1e-3}] and last == ["finish", {}]
    assert [line for _, line in lines] == [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for _, line in lines] == [0, 1, 2, 3]
    # swanlab fails at every step and mlflow at the start: each is told of once, and is not asked again
    assert told(fakes, "swanlab") == [["init", {"name": "run", "mode": "offline", "lr": 1e-3}]]
    assert told(fakes, "mlflow") == [["uri", {"uri": f"sqlite:///{run}/mlflow.db"}]]
    out = capsys.readouterr().out
    assert out.count("swanlab stopped (ConnectionError: cloud is away); the run goes on") == 1
    assert out.count("mlflow stopped (SystemExit: 1)") == 1 and "wandb stopped" not in out


def test_a_variable_lets_a_logger_go_online(fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    loggers = Loggers(print)
    loggers.open(TrainConfig(output=str(tmp_path / "run"), log_to="wandb"), 0)
    assert told(fakes, "wandb")[0][1]["mode"] == "online"


@pytest.mark.parametrize(
    ("log_to", "what", "hint"),
    [("wanddb", "'wanddb'", "Did you mean wandb?"), ("swanlab", "not installed", "pip install swanlab")],
)
def test_what_cannot_be_logged_to_is_told_before_anything_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    log_to: str,
    what: str,
    hint: str,
):
    monkeypatch.setattr("minilora.run.loggers.find_spec", lambda name: None)
    assert (
        main(["train", "--model", str(make_model(tmp_path / "m")), "--data", "x", "--output", "y", "--log-to", log_to])
        == 2
    )
    err = capsys.readouterr().err
    assert what in err and hint in err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of protobuf
def test_tensorboard_reads_back_what_was_logged(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(output=str(tmp_path), log_to="tensorboard", lr=1e-3)
    said: list[str] = []

    def log(start: int, losses: list[float]) -> None:
        loggers = Loggers(said.append)
        loggers.open(config, start)
        for step, loss in enumerate(losses, start + 1):
            loggers.log({"step": step, "loss": loss, "tokens": 7, "norms": {"a": 1.0}})
        loggers.close()

    log(0, [3.0, 2.5, 9.0])
    log(2, [2.25, 2.0])  # resumed from step 2: step 3 of before counts no more
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert said == [] and sorted(read.Tags()["scalars"]) == ["loss", "tokens"]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 3.0), (2, 2.5), (3, 2.25), (4, 2.0)]


def test_every_logger_is_in_the_help():
    from minilora.config import FIELDS

    assert all(name in FIELDS["log_to"].metadata["help"] for name in LOGGERS)
