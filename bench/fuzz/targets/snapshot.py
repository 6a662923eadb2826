"""A run's folder of checkpoints: names, manifests, states and metrics, as a JSON object of names and contents; and what resume and report make of it.

"manifest": true in a snapshot stands for one that fits the other files, as if an attacker had written it anew.
"""

import hashlib
import json
from typing import Any

from minilora.files.atomic import MANIFEST
from minilora.report.record import read_record
from minilora.run.snapshot import newest_snapshot, read_state, step_of

from ..room import fresh, lay, plain

STATE = {
    "step": 4,
    "seconds": 1.5,
    "best_loss": 0.5,
    "best_step": 2,
    "identity": {"a": 1},
    "machine": {"torch": "2"},
    "position": 0,
}
STEP = '"tokens": 9, "target_tokens": 5, "lr": 0.1'
METRICS = f'{{"step": 1, "loss": 0.5, {STEP}}}\n{{"step": 2, "loss": 0.25, {STEP}, "val_loss": 1.0, "time": 3}}\n'
RUN = {
    "step-4": {"state.json": STATE, "x": "weights", "manifest": True},
    "metrics.jsonl": METRICS,
    "config.yaml": "lr: 0.1\n",
    "data.json": {"steps": 5},
}
SEEDS = [json.dumps(j).encode() for j in (
    RUN, RUN | {"step-8": {"state.json": STATE | {"step": 8}, "manifest": True}}, RUN | {"step-08": RUN["step-4"]}, {"step-5": RUN["step-4"]} | RUN,
    {"step-4": {"state.json": STATE, "manifest.json": {"state.json": {"size": 1, "sha256": "0"}}}}, {"metrics.jsonl": '{"step": 1, "loss": NaN}\n[1]\n{"st'},
)]  # fmt: skip
WORDS = [*STATE, "step-4", "step-٤", "step-99999999999999999999", "state.json", "manifest", MANIFEST, "size", "sha256", "metrics.jsonl", "config.yaml", "data.json", "loss",
         "lr", "grad_norm", "tokens", "val_loss", "time", "link", "pipe", "../x", "/etc/passwd", "last", "best", "scores.json", "answers.jsonl", "predictions.jsonl"]  # fmt: skip
CODES = (9,)


def target(data: bytes) -> None:
    try:
        run = json.loads(data)
    except (ValueError, RecursionError):
        run = {"metrics.jsonl": data.decode("utf-8", "surrogateescape")}
    folder = fresh("run")
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    for name, held in run.items() if isinstance(run, dict) else ():
        if name.startswith("step-") and isinstance(held, dict) and not held.keys() & {"link", "pipe", "base64"}:
            _lay_snapshot(checkpoints / plain(name), held)
        else:
            lay(folder, {name: held})
    newest, skipped = newest_snapshot(checkpoints)
    assert all(isinstance(line, str) for line in skipped)
    if newest is not None:
        state = read_state(newest)
        assert state["step"] == step_of(newest)
    read_record(folder)


def _lay_snapshot(folder: Any, files: dict[str, Any]) -> None:
    if folder.exists():
        return
    folder.mkdir()
    lay(folder, {name: held for name, held in files.items() if name != "manifest"})
    if "manifest" in files:
        sums = {
            p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
            for p in folder.iterdir()
            if p.is_file()
        }
        lay(folder, {MANIFEST: sums})
