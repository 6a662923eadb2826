"""The model and the optimizer of a run: loaded, with adapters, in the dtypes that it stores and computes in."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from minilora.kernels.dispatch import deterministic_backward, kernels_enabled, use_gemm
from minilora.kernels.fp8_rows import FP8RowsWeight, has_fp8
from minilora.models.config import Config
from minilora.models.decoder import Decoder
from minilora.models.quantized import quantized_weights

from ..checkpoint.load import find_device, load_model, read_config
from ..checkpoint.loftq import loftq_init, mark_loftq
from ..checkpoint.quantized import QUANTS
from ..config import TrainConfig
from ..errors import UsageError
from ..files.model_folder import ModelFolder
from ..lora import LoRALinear, add_lora, require_no_adapters
from ..machine.compute import choose, choose_threads, name_of
from ..machine.cpu import usable_cpus
from ..machine.gemm import GEMM, MOST_ROWS, read_choice, settle
from ..methods.dora import DoRALinear
from ..methods.lora_plus import rate_groups
from ..methods.pissa import PiSSALinear, pissa_init
from ..methods.table import METHODS
from ..objective import objective_of
from ..ranks.ranks import ALONE, Ranks
from .load_sharded import load_sharded, starts


def load(
    config: TrainConfig, folder: ModelFolder, resume: bool = False, ranks: Ranks = ALONE
) -> tuple[Decoder, TrainConfig]:
    """The model ready to train, and the config with the compute dtype and the threads that were chosen.

    resume: the adapters' values are read from a snapshot afterwards, and the forms of GEMM are those that the run had.
    """
    c, device = read_config(folder), find_device(None if config.device == "auto" else config.device)
    check_offload(config, device)
    check_shard(config)
    stored, compute = dtypes(config, c, device)
    if not ranks.least(compute.itemsize == 2) and compute.itemsize == 2:
        compute = torch.float32  # another rank found it faster
    form = folder, stored, device, name_of(compute), quant_asked(config, device)
    shares = config.shard == "on" and ranks.count > 1
    loaded = load_sharded(*form, ranks, objective_of(config).passes) if shares else load_model(*form)
    model = prepare(loaded, config)
    if config.lora_init == "loftq" and not resume:
        loftq_init(model, folder, starts(ranks.shards) if ranks.shards else None)
    if config.lora_init == "pissa" and not resume:
        pissa_init(model)
    if device.type == "cpu":
        torch.set_num_threads(min(config.threads, usable_cpus()) if config.threads else choose_threads(c))
    kept = read_choice(Path(config.output) / GEMM, device) if resume else None
    settle(model, config.micro_tokens or MOST_ROWS, kept)
    settled = name_of(compute) if compute != torch.float64 else "auto"
    return model, replace(config, compute=settled, threads=torch.get_num_threads())


def dtypes(config: TrainConfig, c: Config, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """The dtype that a run stores the base weights in, and the one that it computes in."""
    if config.method == "full":
        if config.compute == "bfloat16":
            raise UsageError("--method full computes in float32", "Leave --compute out.")
        return torch.float32, torch.float32
    stored = {"auto": c.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    compute = choose(c, stored, device, config.compute).dtype
    if compute == torch.float16:  # in which gradients would underflow
        stored = compute = torch.bfloat16
    return stored, compute


def prepare(model: Decoder, config: TrainConfig) -> Decoder:
    """Make a loaded model trainable: add adapters, or with method full unfreeze every weight."""
    if config.method == "full":
        if config.objective == "dpo":
            raise UsageError("--objective dpo compares with the model without its adapters", "Leave --method full out.")
        if config.study:
            raise UsageError("--study looks at adapters, and --method full has none", "Leave one of them out.")
        if quantized_weights(model):
            raise UsageError(
                "--method full trains every weight, and these are quantised",
                "Leave --quant out, or take the bf16 release.",
            )
        model.requires_grad_(True)
    elif config.method in METHODS:
        check_method(config)
        require_no_adapters(model)
        model.requires_grad_(False)
        METHODS[config.method].install(model, config)
    else:
        check_method(config)
        size = {
            "r": config.lora_r,
            "alpha": config.lora_alpha,
            "rslora": config.rslora,
            "shared_outer": config.shared_outer,
        }
        kind = DoRALinear if config.method == "dora" else PiSSALinear if config.lora_init == "pissa" else LoRALinear
        add_lora(model, config.lora_targets, **size, dropout=config.lora_dropout, seed=config.seed, kind=kind)
        if config.lora_init == "loftq":
            mark_loftq(model)
    set_recomputing(model, config)
    return model.train()


def check_method(config: TrainConfig) -> None:
    """UsageError for a setting of LoRA that the method has no place for."""
    if config.method == "lora":
        return
    of_lora = {"--study": config.study, f"--lora-init {config.lora_init}": config.lora_init != "kaiming"}
    of_lora["--lora-dropout"] = bool(config.lora_dropout) and config.method != "dora"
    for flag in [flag for flag, given in of_lora.items() if given]:
        raise UsageError(f"{flag} is of --method lora, and not of {config.method}", "Leave one of them out.")


def set_recomputing(model: Decoder, config: TrainConfig) -> None:
    """Set what of a forward pass is kept for the backward, and where."""
    model.checkpointing, model.keep_attention = config.checkpointing, config.keep_attention
    model.offload = config.offload == "on"


def check_offload(config: TrainConfig, device: torch.device) -> None:
    """UsageError where --offload has nothing to move, or nowhere to move it."""
    if config.offload == "on" and not config.checkpointing:
        raise UsageError("--offload on moves the inputs of checkpointed layers", "Add --checkpointing.")
    if config.offload == "on" and device.type != "cuda":
        raise UsageError(
            "--offload on moves the inputs of layers from a GPU to the host's memory, and this run is on a CPU",
            "Leave it out.",
        )


def check_shard(config: TrainConfig) -> None:
    """UsageError where --shard has nothing to shard, or where a method would need weights whole that no rank has whole."""
    if config.shard == "on" and config.method == "full":
        raise UsageError("--shard on shares a frozen base, and --method full trains it", "Give one of them.")
    if config.shard == "on" and (config.method != "lora" or config.lora_init == "pissa"):
        of = f"--method {config.method}" if config.method != "lora" else "--lora-init pissa"
        raise UsageError(f"--shard on is for plain LoRA, and {of} is another method", "Give one of them.")


def quant_asked(config: TrainConfig, device: torch.device, planned: bool = False) -> str:
    """The quant of load_model that a config asks for; UsageError for --fp8 where a GPU has no FP8, or beside --quant.

    planned: for a card that is not there, and has it.
    """
    if config.fp8 == "off":
        return config.quant
    if config.quant in QUANTS:
        raise UsageError(f"--fp8 on and --quant {config.quant} are two formats of the base", "Give one of them.")
    if config.compute == "float32":
        raise UsageError("--fp8 on computes in bfloat16", "Leave --compute out.")
    if not planned and not has_fp8(device):
        raise UsageError(
            f"--fp8 on multiplies in FP8, which a GPU of compute capability 8.9 or later does (H100, L40), and {_machine(device)} does not",
            "Leave it out; --quant int8 keeps the base in 8 bits anywhere.",
        )
    return FP8RowsWeight.name


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def optimizer_of(model: Decoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on the trained parameters; on a GPU the learning rate lies in a tensor (schedule.set_learning_rate)."""
    form = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(rate_groups(model, config.loraplus_lr_ratio), lr=config.lr, **form)
    if model.head.is_cuda:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.lr * group["ratio"], device=model.head.device)
    return optimizer


@contextmanager
def kernels(config: TrainConfig) -> Iterator[None]:
    """A context with the kernels and the forms of GEMM that the config asks for, and the order in which they add."""
    chosen = kernels_enabled(False) if config.kernels == "off" else nullcontext()
    form = {} if config.gemm == "auto" else config.gemm  # auto: load fills it
    with chosen, use_gemm(form), deterministic_backward(config.deterministic):
        yield
