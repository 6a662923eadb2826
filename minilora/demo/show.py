"""`minilora demo`: the whole main job on the embedded model, in under a minute and without a network.

The model says who it is; an adapter is trained on the identity data set; the model says who it is now; the adapter is merged and
the merge is proven.
"""

import time
from pathlib import Path

from minilora.checkpoint.adapter import load_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.merge import merge_folder
from minilora.checkpoint.save import OF_A_MODEL
from minilora.console import Console
from minilora.errors import OutputInUse
from minilora.files.atomic import discard, require_own
from minilora.files.strict_json import read_json_lines
from minilora.generate import reply
from minilora.sampling import read_generation
from minilora.settings import read_yaml, resolve
from minilora.terminal import shell
from minilora.text.tokenizer import load_tokenizer
from minilora.train import train

HERE = Path(__file__).parent
MODEL, ROWS = HERE / "mini", HERE / "identity.json"
QUESTIONS = ("Who are you?", "你是谁？", "What is 2 plus 3?", "天空是什么颜色？")
SETTINGS = {
    "epochs": 12,
    "batch_size": 8,
    "lr": 2e-3,
    "lora_r": 8,
    "lora_alpha": 16,
    "save_every": 10**6,
    "device": "cpu",
}
BARS = "▁▂▃▄▅▆▇█"


def demo(output: str, name: str, author: str) -> None:
    """Run the demo into a folder; an older demo there is replaced, anything else is OutputInUse."""
    began = time.monotonic()
    run, console = Path(output), Console()
    if run.exists() and not (run.is_dir() and (_is_demo(run) or not any(run.iterdir()))):
        raise OutputInUse(f"{run} is not empty and no demo", "Give another --output.")
    require_own(run / "merged", OF_A_MODEL.fullmatch)
    config = resolve(
        SETTINGS, {"model": MODEL, "data": ROWS, "output": run, "define": {"name": name, "author": author}}
    )

    say = console.say
    _ask(say)
    say(f"\nIt shall be called {name}, made by {author}. What is made of it goes into {run.absolute()}")
    checkout = next((p for p in run.absolute().parents if (p / ".git").exists()), None)
    if checkout:
        say(f"(which lies in the git checkout {checkout}; --output DIR puts it elsewhere)")
    say(f"\nTraining a LoRA adapter on {ROWS.name}:\n")
    train(config, overwrite=True, console=console)
    losses = [m["loss"] for m in read_json_lines(run / "metrics.jsonl") if "loss" in m]
    say(f"\nloss {losses[0]:.2f} {sparkline(losses, 60)} {losses[-1]:.2f}")
    say("\nThe same questions to model + adapter:\n")
    _ask(say, adapter=run / "adapter")
    discard(run / "merged")
    proof = merge_folder(MODEL, run / "adapter", run / "merged", device="cpu")
    say(
        f"\nMerged into {run / 'merged'}, read back and compared on {proof.tokens} tokens: off by {proof.merged:.2g} in a logit"
    )
    say(
        f"({proof.allowed:.2g} would still be rounding; the adapter itself moves logits by {proof.adapter:.2g}). It says:\n"
    )
    _ask(say, model=run / "merged")
    say(
        f"\nDone in {time.monotonic() - began:.0f} s. The adapter, the loss picture and the merged model are in {run}. Next:\n"
    )
    define = ("--define", f"name={name}", "--define", f"author={author}")
    say("  " + shell("chat", "--model", MODEL, "--adapter", run / "adapter"))
    say("  " + shell("eval", "--model", run / "merged", "--data", ROWS, *define))
    say("  minilora train --model YOUR_MODEL --data YOUR_ROWS.json --output runs/first")


def _ask(say, model: Path = MODEL, adapter: Path | None = None) -> None:
    decoder, tokenizer = load_model(model, device="cpu"), load_tokenizer(model)
    if adapter:
        load_adapter(decoder, adapter)
        decoder.eval()
    _, stop = read_generation(model)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        say(f"  > {question}\n    {''.join(reply(decoder, tokenizer, messages, 60, stop=stop))}")


def _is_demo(run: Path) -> bool:
    config = run / "config.yaml"
    settings = read_yaml(config) if config.is_file() else {}
    return settings.get("model") == str(MODEL) and settings.get("data") == str(ROWS)


def sparkline(values: list[float], width: int) -> str:
    """Values as a row of at most `width` bars, each the mean of its share of them."""
    width = min(width, len(values))
    means = []
    for i in range(width):
        part = values[i * len(values) // width : (i + 1) * len(values) // width]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    return "".join(BARS[round((v - low) / ((high - low) or 1) * (len(BARS) - 1))] for v in means)
