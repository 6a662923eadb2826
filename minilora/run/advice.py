"""What published experiments say of the settings of a run. It is printed beside them and changes nothing.

A recipe of `minilora sweep` asks the same of the user's own rows, and may contradict it (docs/experiments.md).
"""

from ..config import TrainConfig

FULL, LORA = 5e-5, 1e-4  # rates from below and from above which one of the two is taken for the other
BATCH = 64  # rows
BITS = 2  # of knowledge that a parameter holds, at most (Allen-Zhu and Li, 2024, arXiv 2404.05405)
REGRET = "(Schulman et al., LoRA Without Regret, 2025)"


def advice(config: TrainConfig, trained: int, targets: int | None = None) -> list[str]:
    """Lines for a run that trains so many parameters on rows with so many target tokens, if they are known."""
    lines = []
    lora, whole = config.method in ("lora", "dora"), config.method in ("full", "freeze")
    if lora and config.objective == "sft" and config.lr < FULL:
        lines.append(
            f"lr {config.lr:g} suits training every weight; the best rate of LoRA is about ten times that {REGRET}; "
            "the recipe lora-or-full tries your rows"
        )
    if whole and config.lr >= LORA:
        lines.append(f"lr {config.lr:g} suits LoRA; the best rate of training every weight is about a tenth {REGRET}")
    if config.objective == "dpo" and config.lr > FULL:
        lines.append(f"lr {config.lr:g} is high for preferences: other tools begin at 5e-6 to 1e-5")
    if lora and config.lora_targets == "attention":
        lines.append(
            f"adapters on attention alone learn less than on the MLP, even with as many parameters {REGRET}; the recipe attention-or-mlp, "
            "which saw no difference on the demo model, tries your rows"
        )
    rows = config.batch_size * config.accumulation
    if lora and rows > BATCH:
        lines.append(
            f"{rows} rows a step: LoRA loses more by large batches than training every weight does {REGRET}; "
            "the recipe batch-penalty tries your rows"
        )
    if lora and targets is not None and targets > BITS * trained:
        rank = -(-config.lora_r * targets // (BITS * trained))
        lines.append(
            f"{targets:,} target tokens, at a bit each, are more than the {BITS} bits that each of {trained:,} parameters can hold "
            f"(Allen-Zhu and Li, 2024): rank {rank} would"
        )
    return lines
