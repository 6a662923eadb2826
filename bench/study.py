"""python -m bench.study --model DIR --data FILE: the cost of `train --study on`, compared with the same steps without it.

A step that is measured by the study and the same step without it alternate, in one process with one thread. CPU seconds are
compared, so that other load on the machine does not count; the cost of one measurement is shared by the steps up to the next one.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from minilora.checkpoint.open_model import computing
from minilora.data import pack, step_examples
from minilora.files.model_folder import ModelFolder
from minilora.ranks.ranks import ALONE
from minilora.rows.dataset import load_data
from minilora.run.folder import Progress, Run
from minilora.run.schedule import make_plan
from minilora.run.setup import kernels, load, optimizer_of
from minilora.run.study import Study
from minilora.settings import resolve
from minilora.train import train_step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lora-r", type=int, default=16)
    settings = vars(parser.parse_args(argv))
    turns = settings.pop("turns")
    with tempfile.TemporaryDirectory() as output:
        config = resolve(settings, {"output": output, "study": True, "threads": 1, "device": "cpu"})
        with kernels(config):
            folder = ModelFolder(config.model)
            data = load_data(config, folder)
            model, config = load(config, folder)
            plan = make_plan(config, folder, data, model, computing(model, config.compute))
            measure(Run(Path(output), config, plan, model, optimizer_of(model, config), Progress(), ALONE), turns)


def measure(run: Run, turns: int) -> None:
    """Print the share of the CPU time of a run that its looks take, with its spread over turns."""
    study, looks, steps = Study(run, print), [], []
    for turn in range(turns + 1):  # the first one warms up
        batches = pack(
            step_examples(run.plan.train, run.plan.rows_per_step, run.config.seed, turn), run.plan.micro_tokens
        )
        seconds = {}
        for look in (True, False) if turn % 2 else (False, True):
            began = time.process_time()
            if look:
                study.before(0)
            result = train_step(run.model, run.optimizer, batches, run.config, turn)
            if look:
                json.dumps(study.after(result))
            result.read()
            seconds[look] = time.process_time() - began
        if turn:
            looks.append(seconds[True] - seconds[False])
            steps.append(seconds[False])
    step = statistics.median(steps)
    low, middle, high = (look / (study.every * step) for look in statistics.quantiles(looks, n=4))
    print(f"CPU seconds on {torch.get_num_threads()} thread: a step {step:.3f}, a look {statistics.median(looks):.3f}")
    print(f"study on takes {100 * middle:.2f} % of it, quartiles {100 * low:.2f} to {100 * high:.2f}, {turns} turns")


if __name__ == "__main__":
    main()
