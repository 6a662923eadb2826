"""One side of bench.train, in an interpreter that may have nothing of ours: steps on rows from a file, at the word of a pipe.

    PYTHON train_side.py NAME --model DIR --adapter DIR --steps FILE --device cpu

FILE holds the steps as JSON: each a list of rows, a row {"ids": [...], "targets": [...]} with -100 where nothing is trained.
Every line on standard input is a step's number; for each, one line of JSON says what it cost.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.pop(0)  # this folder has files that are called as other people's packages are
CLIP, LR = 1.0, 2e-4

Step = Callable[[list[dict]], float]  # the rows of a step -> its loss


def minilora(args: argparse.Namespace, quant: str = "keep") -> Step:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from minilora.machine.cpu import before_torch, tune_memory

    before_torch()
    tune_memory()
    import numpy as np
    import torch

    from minilora.checkpoint.adapter import load_adapter
    from minilora.checkpoint.load import load_model
    from minilora.checkpoint.open_model import computing
    from minilora.data import Example, make_batch
    from minilora.settings import resolve
    from minilora.train import train_step

    model = load_model(args.model, device=args.device, quant=quant)
    print(computing(model), file=sys.stderr)
    load_adapter(model, args.adapter)
    trained = [p.requires_grad_(True) for name, p in model.named_parameters() if "lora_" in name]
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    config = resolve({"clip": CLIP})

    def step(rows: list[dict]) -> float:
        examples = [Example(np.array(row["ids"]), np.array(row["targets"]), "") for row in rows]
        return train_step(model, optimizer, [make_batch(examples)], config, 0).read()[0]

    return step


def hf(args: argparse.Namespace) -> Step:
    """transformers + peft, in bf16 or as MINILORA_BENCH_DTYPE says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, os.environ.get("MINILORA_BENCH_DTYPE", "bfloat16"))
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    return _padded(PeftModel.from_pretrained(base, args.adapter, is_trainable=True).train(), args.device)


def qlora(args: argparse.Namespace) -> Step:
    """transformers + peft + bitsandbytes in NF4 with double quantisation, computed in bf16."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=how, dtype=dtype, device_map=args.device
    )
    return _padded(PeftModel.from_pretrained(base, args.adapter, is_trainable=True).train(), args.device)


def unsloth(args: argparse.Namespace) -> Step:
    """Unsloth's own loader, which takes its CPU path where there is no GPU; 16-bit base, no checkpointing: its fastest."""
    from peft import PeftModel
    from unsloth import FastLanguageModel  # first: it patches the others

    base, _ = FastLanguageModel.from_pretrained(
        args.model, load_in_4bit=False, load_in_16bit=True, use_gradient_checkpointing=False
    )
    model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True)
    return _padded(FastLanguageModel.for_training(model, use_gradient_checkpointing=False) or model, args.device)


def _padded(model, device: str) -> Step:
    """Steps on batches padded to their longest row, as the trainers of these libraries make them."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)

    def step(rows: list[dict]) -> float:
        shape = (len(rows), max(len(row["ids"]) for row in rows))
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["ids"])
            ids[i, :n], mask[i, :n] = torch.tensor(row["ids"]), 1
            labels[i, 1:n] = torch.tensor(row["targets"][:-1])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


SIDES = {
    "minilora": minilora,
    "nf4": partial(minilora, quant="nf4"),
    "int8": partial(minilora, quant="int8"),
    "hf": hf,
    "qlora": qlora,
    "unsloth": unsloth,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SIDES)
    for flag in ("--model", "--adapter", "--steps", "--device"):
        parser.add_argument(flag, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print goes to standard error
    steps = json.loads(Path(args.steps).read_text())
    step = SIDES[args.name](args)
    import torch

    for line in sys.stdin:
        rows = steps[int(line)]
        start, cpu = time.perf_counter(), time.process_time()
        loss = step(rows)
        if args.device != "cpu":
            torch.cuda.synchronize()
        cost = {
            "loss": loss,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "tokens": sum(len(row["ids"]) for row in rows),
            "memory": torch.cuda.max_memory_allocated()
            if args.device != "cpu"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        answers.write(json.dumps(cost) + "\n")


if __name__ == "__main__":
    main()
