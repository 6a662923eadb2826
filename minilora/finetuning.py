"""Training in memory: rows in, an adapted model out, nothing on disk."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from minilora.models.decoder import Decoder

from .adapted import adapted
from .config import TrainConfig
from .data import pack, step_examples
from .errors import UsageError
from .lora import LoRALinear, adapters, check_trained
from .positions import check_room
from .rows.load import render_rows
from .run.schedule import count_steps, learning_rate, set_learning_rate
from .run.setup import check_offload, kernels, optimizer_of, prepare, set_recomputing
from .settings import canonical, resolve
from .text.tokenizer import Tokenizer, check_fits
from .train import train_step

# the settings of a run that have no meaning here, by the reason
REFUSED = {
    "nothing is read or written": {
        "model", "data", "output", "val", "test", "cache", "mix_general", "mix_ratio", "encoding", "skip_bad", "eval_every", "save_every", "keep",
        "keep_checkpoints", "log_to", "study",
    },
    "the model is loaded": {"device", "dtype", "quant", "fp8", "lora_init", "compute", "threads", "kernels", "gemm", "method"},
    "it is a run's": {"objective", "beta", "shard", "graphs", "rank_timeout"},
}  # fmt: skip


def finetune(
    model: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Any],
    on_step: Callable[[int, float], object] = lambda step, loss: None,
    **settings: Any,
) -> list[float]:
    """Train adapters on conversations; returns the loss of each optimizer step.

    rows are lists of messages ({"role": ..., "content": ...}), or what a line of a file of rows may hold. on_step hears the
    number of each step, from 1, and its loss. settings are those of `minilora train` by name: lora_r, lr, epochs, max_steps,
    ... The model is changed in place: it gets adapters unless it has some, which then are trained on, and ends in evaluation
    mode. UsageError for a setting of a run with files, DataError for a row that cannot be used or is over a limit, Diverged for
    a loss or a weight that is not finite.
    """
    config = resolve(settings)
    given = set(map(canonical, settings))
    for why, names in REFUSED.items():
        for name in sorted(names & given):
            raise UsageError(f"finetune takes no {name}: {why}", "Leave it out, or use `minilora train`.")
    examples = render_rows(rows, tokenizer, config)
    check_fits(tokenizer, model.config.vocab, "the model")
    check_offload(config, model.head.device)
    there = [wrapper for _, wrapper in adapters(model)]
    if there or any(True for _ in adapted(model)):
        if there:
            config = _with_what_adapters_have(config, given, there)
        set_recomputing(model, config)
        model.train()
    else:
        prepare(model, config)
    optimizer, (steps, _, _) = optimizer_of(model, config), count_steps(config, len(examples))
    rows_per_step = config.batch_size * config.accumulation
    for example in examples:
        check_room(model, example.where, len(example.ids))
    micro_tokens = max(config.micro_tokens or config.max_length, *(len(e.ids) for e in examples))
    losses = []
    with kernels(config):
        for step in range(steps):
            set_learning_rate(optimizer, learning_rate(config, step, steps))
            batches = pack(step_examples(examples, rows_per_step, config.seed, step), micro_tokens)
            loss, _ = train_step(model, optimizer, batches, config, step).read()
            losses.append(loss)
            on_step(step + 1, loss)
    check_trained(model, steps)
    model.eval()
    return losses


def _with_what_adapters_have(config: TrainConfig, given: set[str], there: list[LoRALinear]) -> TrainConfig:
    """The config with the dropout of the adapters that are there; UsageError for a setting that would make other ones."""
    first = there[0]
    have = {"lora_r": first.r, "lora_alpha": first.alpha, "rslora": first.rslora, "lora_dropout": first.dropout}
    other = [name for name in have if name in given and getattr(config, name) != have[name]]
    other += ["lora_targets"] if "lora_targets" in given else []
    if other:
        raise UsageError(f"the model has adapters already, of another {other[0]}", "Leave it out, or merge them first.")
    return replace(config, lora_dropout=max(wrapper.dropout for wrapper in there))
