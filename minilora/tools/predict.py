"""`minilora predict`: the model's own answers to the questions of a test set, and their scores.

The last answer of each row is the reference, and all before it is the prompt. A row that ends with a question, or whose last
answer is empty, has no reference: it is answered and not scored. No prompt and no reference is cut, whatever the limits of
training were, but by --source-tail; answers that end at max_tokens are counted. Each answer is saved at once, in part.jsonl,
so that a stopped prediction can go on. The files are those of LLaMA-Factory, with more in them. Ranks share the questions and
send their answers to the first, which writes them.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from rich.table import Table

from minilora.models.config import as_json

from ..checkpoint.load import fingerprint
from ..checkpoint.method_folder import weights_of
from ..checkpoint.open_model import Opening, folder_notes, open_model
from ..checkpoint.quantized import in_memory
from ..config import PLAIN, RANK_TIMEOUT, DataConfig
from ..console import Console
from ..errors import OutputInUse, Stopped
from ..files.atomic import locked, sync, write_file
from ..files.model_folder import ADAPTER_CONFIG, ModelFolder
from ..files.run_folder import require_outside_runs
from ..files.strict_json import read_json_lines
from ..generate import Request, decode
from ..lora import base_parameters
from ..machine.compute import name_of
from ..ranks.ranks import Ranks, join
from ..report.metrics import interval, measured_rows, word_cutter
from ..report.record import RESULTS, ROWS, hash_of, read_json_file, sample_of
from ..rows.questions import Question, read_questions
from ..rows.token_store import tokenizer_hash
from ..run.monitor import PLAIN_EVERY
from ..run.signals import StopSignal
from ..sampling import GREEDY, random_of, read_generation
from ..terminal import clock
from ..text.tokenizer import Tokenizer, load_tokenizer

PART = "part.jsonl"
# as LLaMA-Factory names what it reports
FOREIGN = {
    "predict_bleu-4": "bleu4_char", "predict_rouge-1": "rouge1_words", "predict_rouge-2": "rouge2_words",
    "predict_rouge-l": "rougeL_words",
}  # fmt: skip


def predict(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    adapter: str | Path | None = None,
    max_tokens: int = 512,
    batch: int = 16,
    reading: DataConfig = PLAIN,
    sample: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
    rank_timeout: float = RANK_TIMEOUT,
    **opening: Unpack[Opening],
) -> dict[str, Any]:
    """Answer the questions of a file into a folder; returns the contents of its predict_results.json.

    A folder that holds the same prediction is left as it is, and one that was stopped goes on; any other raises OutputInUse.
    """
    console, folder, ranks = console or Console(), Path(output), join(rank_timeout)
    say = console.say
    with (
        ranks.ending_as_one("The same command goes on from there."),
        _owned(folder, ranks, data if overwrite else None),
    ):
        base = ModelFolder.of(model)
        tokenizer = load_tokenizer(base, adapter)
        for name, note in folder_notes(base, tokenizer, adapter).items():
            say(f"{name:<8}{note}")
        questions = read_questions(data, tokenizer, reading, say)
        then, results, done = _earlier(folder, overwrite or not ranks.first)
        dtype = then.get("dtype") if isinstance(then, dict) else None
        if opening.get("compute", "auto") == "auto" and dtype in ("float32", "bfloat16"):
            opening["compute"] = dtype  # a machine that is busy now may measure otherwise
        opening["compute"] = ranks.share(opening.get("compute", "auto"))
        decoder = open_model(base, tokenizer, adapter, say=lambda how: say(f"compute {how}"), ranks=ranks, **opening)
        sampling, stop = read_generation(base)
        stop |= tokenizer.stop_ids
        sampling = sampling if sample else GREEDY
        quant = in_memory(opening.get("quant", "keep"), base.config)
        settings = {
            "model": str(model), "adapter": str(adapter) if adapter else None, "data": str(data),
            "rows_hash": _hash(json.dumps([q.text, q.label]) for q in questions),
            "prompts_hash": _hash(json.dumps(q.ids) for q in questions),
            "weights_hash": fingerprint(base_parameters(decoder)) + (_adapter_hash(Path(adapter)) if adapter else ""),
            **({} if adapter else {"model_hash": sample_of(base.path)}), "architecture": as_json(decoder.config),
            "tokenizer_hash": "".join(tokenizer_hash(Path(place))[:16] for place in (base.path, adapter) if place),
            "dtype": "int8" if opening.get("int8") else name_of(decoder.compute_dtype), "quant": quant,
            "decoding": {"max_tokens": max_tokens, "stop": sorted(stop), **(asdict(sampling) | {"seed": seed} if sample else {"greedy": True})},
        }  # fmt: skip
        if then is not None and not _same(then, settings):
            what = "a prediction" if results else "the beginning of a prediction"
            hint = "Give another --output, or --overwrite to start again."
            raise OutputInUse(f"{folder} holds {what} of other weights, rows or decoding", hint)
        left = ranks.share(None if results else [i for i in range(len(questions)) if i not in done])
        if left is None:
            if ranks.first:
                _delete_part(folder)  # as after a kill between the two
            say(f"{folder} holds this prediction already")
            return ranks.share(results)
        if ranks.first:
            write_file(folder / PART, "".join(map(_line, [settings, *done.values()])))
            for name in (RESULTS, ROWS):  # whose order says what a kill leaves: the whole prediction, or a part of it
                (folder / name).unlink(missing_ok=True)
        began = time.monotonic()
        own = ranks.own([len(questions[i].ids) + max_tokens for i in left])
        generators = {} if sampling == GREEDY else {i: random_of(seed, i) for i in left}
        requests = [
            Request(questions[i].ids, stop, max_tokens, sampling, generators.get(i), i) for i in (left[k] for k in own)
        ]
        # the longest first: what is too long for the memory fails at once, and the cache grows once
        requests.sort(key=lambda r: -len(r.prompt))
        with open(folder / PART if ranks.first else os.devnull, "a", encoding="utf-8") as part, StopSignal() as signal:
            answers = ranks.gather(_finished(decode(decoder, deque(requests), batch), ranks), lambda: signal.requested)
            for answer in _shown_progress(answers, len(done), len(questions), console):
                row = _row(answer, questions[answer["row"]], tokenizer)
                done[answer["row"]] = row
                part.write(_line(row))
                part.flush()
                os.fsync(part.fileno())
        if ranks.first:
            if len(done) < len(questions):
                by = signal.name or "a signal to another rank"
                what = f"stopped by {by} after {len(done)} of {len(questions)} answers, which are kept in {folder}"
                raise Stopped(what, "The same command goes on from there.")
            rows = [done[i] for i in range(len(questions))]
            results = _results(rows, settings, time.monotonic() - began)
            write_file(folder / ROWS, "".join(map(_line, rows)))
            write_file(folder / RESULTS, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
            _delete_part(folder)
        return ranks.share(results)


@contextmanager
def _owned(folder: Path, ranks: Ranks, read: str | Path | None) -> Iterator[None]:
    """The folder, locked for this prediction; its first rank holds it."""
    if not ranks.first:
        yield
        return
    _check_output(folder)
    if read is not None and Path(os.path.realpath(read)).parent == Path(os.path.realpath(folder)):
        raise OutputInUse(f"--overwrite would delete {read}, which is read", "Give another --output.")
    with locked(folder):
        yield


def _delete_part(folder: Path) -> None:
    """The prediction is whole: its beginning is gone, after a power cut too."""
    (folder / PART).unlink(missing_ok=True)
    sync(folder)


def _hash(texts) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]


def _adapter_hash(adapter: Path) -> str:
    """Of its weights, and of its config, which scales them."""
    return hash_of(weights_of(adapter).path, adapter / ADAPTER_CONFIG)


def _check_output(folder: Path) -> None:
    """OutputInUse for a folder that holds something else, before a lock is written there."""
    require_outside_runs(folder)
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")} if folder.is_dir() else set()
    if names - {ROWS, RESULTS, PART}:
        raise OutputInUse(f"{folder} holds no prediction but {min(names)}", "Give another --output.")


def _earlier(folder: Path, overwrite: bool) -> tuple[Any, dict[str, Any] | None, dict[int, dict[str, Any]]]:
    """(settings, results, answers by row) of the prediction that a folder holds, or of its beginning, which has no results."""
    if overwrite:
        return None, None, {}
    here = {name for name in (ROWS, RESULTS, PART) if (folder / name).exists()}
    if {ROWS, RESULTS} <= here:
        results = read_json_file(folder / RESULTS)
        return results.get("settings", {}), results, {}
    settings, *lines = [*read_json_lines(folder / PART)] or [None]
    if here and settings is None:
        hint = "Give another --output, or --overwrite to start again."
        raise OutputInUse(f"{folder} holds {', '.join(sorted(here))}, and not how it was made", hint)
    return settings, None, {line["row"]: line for line in lines if _is_row(line)}


def _is_row(line: Any) -> bool:
    """Whether a line of an unfinished prediction is what _row gives."""
    kinds = {"row": int, "predict": str, "label": str, "tokens": int, "label_tokens": int, "cut": bool}
    return isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in kinds.items())


def _same(then: Any, now: dict) -> bool:
    """Whether two predictions have the same weights, rows and decoding; folders may have moved."""
    keys = ("rows_hash", "prompts_hash", "weights_hash", "architecture", "tokenizer_hash", "dtype", "decoding")
    if not isinstance(then, dict) or then.get("quant", "off") != now["quant"]:  # older ones do not say it
        return False
    return all(then.get(key) == now[key] for key in keys)


def _shown_progress(answers: Iterator[dict], done: int, total: int, console: Console) -> Iterator[dict]:
    """The answers, with a line from time to time; `done` answers of an earlier process are there already."""
    began = shown = time.monotonic()
    tokens = 0
    for made, answer in enumerate(answers, 1):
        yield answer
        tokens += len(answer["ids"])
        now = time.monotonic()
        if now - shown > PLAIN_EVERY or done + made == total:
            shown = now
            eta = clock((now - began) / made * (total - done - made))
            speed = f"{tokens / (now - began):,.0f} answer tokens/s"
            console.say(f" {done + made:>5}/{total} answers  {speed}  ETA {eta}")


def _row(answer: dict[str, Any], question: Question, tokenizer: Tokenizer) -> dict[str, Any]:
    """A row of generated_predictions.jsonl."""
    return {
        "row": answer["row"],
        "prompt": tokenizer.decode(question.ids, specials=True),
        "predict": tokenizer.answer(answer["ids"]),
        "label": question.label,
        "question": question.text,
        "where": question.where,
        "hashes": [f"{h:016x}" for h in question.hashes],
        "tokens": len(answer["ids"]),
        "label_tokens": question.label_tokens,
        "cut": answer["cut"],
    }


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _finished(passes: Iterator[list[Request]], ranks: Ranks) -> Iterator[list[dict[str, Any]]]:
    """The answers of this rank that each pass ends: their row, ids, and whether they were cut."""
    for number, requests in enumerate(passes, 1):
        ranks.begin(f"answering, token {number}")
        ended = [r for r in requests if r.finish_reason]
        yield [{"row": r.number, "ids": r.ids, "cut": r.finish_reason == "length"} for r in ended]


def _results(rows: list[dict], settings: dict, seconds: float) -> dict[str, Any]:
    """The contents of predict_results.json."""
    scored = [row for row in rows if row["label"]]
    metrics = {
        name: {k: round(v, 4) for k, v in interval(metric)._asdict().items()} | {"definition": metric.definition}
        for name, metric in measured_rows(scored).items()
    }
    foreign = {name: metrics[ours]["value"] for name, ours in FOREIGN.items() if ours in metrics}
    return {
        **foreign,
        "predict_runtime": round(seconds, 2),
        "rows": len(rows),
        "references": len(scored),
        "cut": sum(row["cut"] for row in rows),
        "answer_tokens": sum(row["tokens"] for row in rows),
        "label_tokens": sum(row["label_tokens"] for row in rows),
        "metrics": metrics,
        "settings": settings,
    }


def show_results(results: dict[str, Any], console: Console) -> None:
    """Print the table of scores, what each metric counts, and what to beware of."""
    rows, metrics = results["rows"], results["metrics"]
    scored = results.get("references", rows)  # older predictions have one in every row
    lines = [f"{name}: {m['definition']}" for name, m in metrics.items()]
    answered = f"{results['answer_tokens']:,} tokens were answered"
    if scored:
        table = Table("metric", box=None, pad_edge=False)
        for name in ("score", "95 % interval"):
            table.add_column(name, justify="right")
        for name, m in metrics.items():
            table.add_row(name, f"{m['value']:.2f}", f"{m['low']:.2f} to {m['high']:.2f}")
        console.print(table)
        if word_cutter() is None:
            lines.append("note: no metric on words, jieba is not installed (pip install 'minilora[report]')")
        others = "" if scored == rows else f"{scored:,} of "
        are = "" if scored == rows else " are scored, the others have no reference answer"
        references = f"the references have {results['label_tokens']:,}"
        lines.append(f"{others}{rows:,} rows{are}; intervals are a bootstrap over them. {answered}, {references}.")
    else:
        lines.append(f"{rows:,} rows without a reference answer: they are answered and not scored. {answered}.")
    limit = results["settings"]["decoding"]["max_tokens"]
    if results["cut"] and limit > 1:  # one token is a label, not a text cut short
        cut = f"{results['cut']:,} of {rows:,} answers were cut at {limit:,} tokens"
        lines.append(f"note: {cut}; a larger --max-tokens lets them end")
    console.say("\n".join(["", *lines]))
