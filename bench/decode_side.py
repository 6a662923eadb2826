"""One side of bench.decode, in an interpreter that may have nothing of ours: tokens one after the other.

    PYTHON decode_side.py NAME --model PATH --tokens N

Every line on standard input asks for N tokens after a prompt of PROMPT made-up ids, greedy; one line of JSON says what it took.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.pop(0)  # this folder has files that are called as other people's packages are
PROMPT = list(range(1000, 1030))

Decode = Callable[[int], None]  # so many tokens after the prompt


def minilora(model: str, int8: bool = False) -> Decode:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from minilora.machine.cpu import before_torch, tune_memory

    before_torch()
    tune_memory()
    from minilora.checkpoint.open_model import open_model
    from minilora.generate import generate
    from minilora.text.tokenizer import load_tokenizer

    decoder = open_model(model, load_tokenizer(model), say=lambda line: print(line, file=sys.stderr), int8=int8)

    def decode(count: int) -> None:
        for _ in generate(decoder, PROMPT, set(), count):
            pass

    return decode


def hf(model: str) -> Decode:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    ids = torch.tensor([PROMPT])

    def decode(count: int) -> None:
        loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )

    return decode


def llama(model: str) -> Decode:
    """llama.cpp through llama-cpp-python, on a GGUF file."""
    from llama_cpp import Llama

    loaded = Llama(model, n_ctx=1024, n_threads=len(os.sched_getaffinity(0)), verbose=False)

    def decode(count: int) -> None:
        loaded.reset()
        for n, _ in enumerate(loaded.generate(PROMPT, temp=0, reset=False), 1):
            if n == count:
                return

    return decode


SIDES = {"minilora": minilora, "minilora-int8": lambda model: minilora(model, int8=True), "hf": hf, "llama": llama}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SIDES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print goes to standard error
    decode = SIDES[args.name](args.model)
    decode(2)
    for _ in sys.stdin:
        times = []
        for count in (2, args.tokens + 2):  # the difference leaves the prompt out
            start, cpu = time.perf_counter(), time.process_time()
            decode(count)
            times.append((time.perf_counter() - start, time.process_time() - cpu))
        wall, cpu = (b - a for a, b in zip(*times, strict=True))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps({"seconds": wall, "cpu_seconds": cpu, "tokens": args.tokens, "memory": memory}) + "\n")


if __name__ == "__main__":
    main()
