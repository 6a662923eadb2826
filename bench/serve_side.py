"""One side of bench.serve, in an interpreter that may have nothing of ours: prompts answered in full batches, without a server.

    PYTHON serve_side.py NAME --model PATH --job FILE

FILE is JSON: `prompts` (ids), `stop` (ids that end an answer), `max_tokens`, `slots` (answers at a time) and `threads`. A line on
standard input is a number of seconds: prompts are answered in turn, greedy and in fp32, until they are over; what has begun then is
finished. One line of JSON says what it took, with the ids of the last answer to each prompt, without the stop id.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Answers = Callable[[Callable[[], bool]], Iterator[tuple[int, list[int]]]]  # more() -> (number of a prompt, its answer)


def minilora(model: str, job: Job) -> Answers:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from minilora.machine.cpu import before_torch, tune_memory

    before_torch()
    tune_memory()
    from minilora.checkpoint.open_model import open_model
    from minilora.generate import Request, decode
    from minilora.text.tokenizer import load_tokenizer

    tell = lambda line: print(line, file=sys.stderr)
    decoder = open_model(model, load_tokenizer(model), say=tell, compute="float32", device="cpu")

    def answers(more: Callable[[], bool]) -> Iterator[tuple[int, list[int]]]:
        numbers, waiting = count(), deque()

        def fill(_: list[Request]) -> None:
            while len(waiting) < job["slots"] and more():
                number = next(numbers) % len(job["prompts"])
                waiting.append(Request(job["prompts"][number], set(job["stop"]), job["max_tokens"], number=number))
            if not more():
                waiting.clear()

        fill([])
        for passed in decode(decoder, waiting, job["slots"], fill):
            yield from ((r.number, r.ids) for r in passed if r.finish_reason)

    return answers


def hf(model: str, job: Job) -> Answers:
    """transformers: generate on a batch of as many prompts as there are slots, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    options = {"max_new_tokens": job["max_tokens"], "eos_token_id": job["stop"], "pad_token_id": job["stop"][0]}

    def answers(more: Callable[[], bool]) -> Iterator[tuple[int, list[int]]]:
        numbers = count()
        while more():
            batch = [next(numbers) % len(job["prompts"]) for _ in range(job["slots"])]
            longest = max(len(job["prompts"][n]) for n in batch)
            rows = [[job["stop"][0]] * (longest - len(job["prompts"][n])) + job["prompts"][n] for n in batch]
            mask = [[0] * (longest - len(job["prompts"][n])) + [1] * len(job["prompts"][n]) for n in batch]
            found = loaded.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                do_sample=False,
                repetition_penalty=1.0,
                **options,
            )
            for number, ids in zip(batch, found[:, longest:].tolist(), strict=True):
                ends = (place for place, token in enumerate(ids) if token in job["stop"])
                yield number, ids[: next(ends, len(ids))]

    return answers


def llama(model: str, job: Job) -> Answers:
    """llama.cpp: a pass holds the next token of every running sequence, and the prompts of new ones in the places of those that ended."""
    import llama_cpp
    import numpy as np

    slots, longest = job["slots"], max(map(len, job["prompts"]))
    room = slots * longest  # most tokens of a pass
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = slots * (-(-(longest + job["max_tokens"]) // 256) * 256)
    params.n_batch, params.n_ubatch, params.n_seq_max, params.n_outputs_max = room, room, slots, slots
    params.n_threads = params.n_threads_batch = job["threads"]
    params.type_k = params.type_v = 0  # f32
    params.no_perf = True
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    assert loaded, model
    context = llama_cpp.llama_init_from_model(loaded, params)
    memory, greedy = llama_cpp.llama_get_memory(context), llama_cpp.llama_sampler_init_greedy()
    batch = llama_cpp.llama_batch_init(room, 0, 1)
    token, position, wanted = (
        np.ctypeslib.as_array(array, (room,)) for array in (batch.token, batch.pos, batch.logits)
    )
    np.ctypeslib.as_array(batch.n_seq_id, (room,))[:] = 1

    def answers(more: Callable[[], bool]) -> Iterator[tuple[int, list[int]]]:
        numbers = count()
        running: dict[int, tuple[int, list[int]]] = {}  # by slot: the number of its prompt, and its answer so far
        while True:
            end, ends = 0, {}
            for slot in range(slots):
                if slot in running:
                    number, ids = running[slot]
                    new, start = ids[-1:], len(job["prompts"][number]) + len(ids) - 1
                elif more():
                    number = next(numbers) % len(job["prompts"])
                    running[slot] = number, []
                    new, start = job["prompts"][number], 0
                    llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
                else:
                    continue
                begin, end = end, end + len(new)
                token[begin:end], position[begin:end] = new, range(start, start + len(new))
                for place in range(begin, end):
                    batch.seq_id[place][0] = slot
                wanted[begin:end] = 0
                wanted[end - 1] = 1
                ends[slot] = end - 1
            if not running:
                return
            batch.n_tokens = end
            assert llama_cpp.llama_decode(context, batch) == 0
            for slot, place in ends.items():
                number, ids = running[slot]
                chosen = llama_cpp.llama_sampler_sample(greedy, context, place)
                if chosen not in job["stop"]:
                    ids.append(chosen)
                if chosen in job["stop"] or len(ids) == job["max_tokens"]:
                    yield number, running.pop(slot)[1]

    return answers


SIDES = {"minilora": minilora, "hf": hf, "llama": llama}


def timed(answers: Answers, seconds: float) -> dict[str, Any]:
    """What so many seconds of answers take and give."""
    start, cpu = time.perf_counter(), time.process_time()
    tokens, last = 0, {}
    for number, ids in answers(lambda: time.perf_counter() < start + seconds):
        tokens, last[number] = tokens + len(ids), ids
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return took | {"tokens": tokens, "answers": [last[number] for number in sorted(last)]}


def main() -> None:
    sys.path.pop(0)  # this folder has files that are called as other people's packages are
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SIDES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--job", required=True)
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print goes to standard error
    answers = SIDES[args.name](args.model, json.loads(Path(args.job).read_text()))
    for line in sys.stdin:
        replies.write(json.dumps(timed(answers, float(line))) + "\n")


if __name__ == "__main__":
    main()
