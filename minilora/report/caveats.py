"""What makes runs hard to compare, in sentences: other rows, another decoding, answers cut short, training on the test set."""

from collections.abc import Callable
from itertools import combinations

import numpy as np

from .record import Record, as_text


def caveats(runs: list[Record]) -> list[str]:
    """What makes the runs hard to compare, the worst first; one sentence covers all pairs for which it is true."""
    answered = [run for run in runs if run.rows]
    found = _of_pairs(answered, _answers)
    missing = [r.letter for r in runs if not r.rows]
    if missing and answered:
        found.append(
            f"{', '.join(missing)} answered no test set: only losses can be compared (minilora predict --output RUN/predict)"
        )
    for run in answered:
        decoding, cut = run.decoded.get("decoding") or {}, sum(bool(row.get("cut")) for row in run.rows)
        if not decoding.get("greedy", True):
            found.append(f"the answers of {run.letter} are drawn at random: another draw gives another score")
        if cut and decoding.get("max_tokens") != 1:  # one token is a label, not a text cut short
            found.append(
                f"{cut:,} of {len(run.rows):,} answers of {run.letter} were cut at {decoding.get('max_tokens')} tokens"
            )
        if run.stale_answers:
            found.append(f"the answers of {run.letter} are of other weights than the run has now: predict again")
        found += _leaked(run)
    for run in runs:
        if rounded := rounded_note(run):
            found.append(f"{run.letter}: {rounded}")
        if run.step and not run.finished:
            how = "is going on" if run.going_on else "is not finished"
            found.append(f"{run.letter} {how}: {run.step:,} of {run.steps:,} steps")
    found += _of_pairs([run for run in runs if run.step], _trainings)
    if any(len(r.rows) < 100 for r in answered):
        found.append("fewer than 100 test rows: intervals are wide, and small differences cannot be seen")
    return found


def _of_pairs(runs: list[Record], differences: Callable[[Record, Record], list[str]]) -> list[str]:
    """Each difference between two of the runs, after the names of all pairs that have it."""
    pairs: dict[str, list[str]] = {}
    for a, b in combinations(runs, 2):
        for difference in differences(a, b):
            pairs.setdefault(difference, []).append(f"{a.letter} and {b.letter}")
    return [f"{', '.join(names)} {difference}" for difference, names in pairs.items()]


def _answers(a: Record, b: Record) -> list[str]:
    """The differences in how two runs answered."""
    found = []
    if not a.answers_the_rows_of(b):
        found.append("answered other test rows: their scores are not comparable, and no p is given")
    ours, theirs = (run.decoded.get("decoding") or {} for run in (a, b))
    changed = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
    if changed:
        values = ", ".join(f"{key} {as_text(ours.get(key))} and {as_text(theirs.get(key))}" for key in changed)
        found.append(f"were decoded in another way ({values}): this alone may change scores")
    if a.decoded.get("dtype") != b.decoded.get("dtype"):
        found.append(f"answered in {a.decoded.get('dtype')} and in {b.decoded.get('dtype')}")
    bits = [run.decoded.get("quant", "off") for run in (a, b)]
    if bits[0] != bits[1]:
        found.append(f"answered with the base's weights in {bits[0]} and in {bits[1]} (--quant)")
    ours, theirs = ({name: m.get("definition") for name, m in run.scores.items()} for run in (a, b))
    changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if changed:
        found.append(
            f"were scored by another metric when they were predicted ({', '.join(changed)}); "
            "the table below scores both again, in one way"
        )
    return found


def _trainings(a: Record, b: Record) -> list[str]:
    """The differences in the rows and tokens that two runs' losses are of."""
    found = []
    if a.config.get("model") != b.config.get("model"):
        found.append("start from other model folders: losses a token compare only if the tokenizer is the same")
    elif a.base != b.base:
        found.append(
            "start from other weights, or from another config.json, in folders of one name: their losses are not of one model"
        )
    if a.val and b.val and a.data.get("val_hash") != b.data.get("val_hash"):
        found.append(
            "were validated on other rows, or on rows cut in another way: their validation losses are not comparable"
        )
    if a.objective != b.objective:
        found.append("were trained for another objective, or with another beta: their losses are not comparable")
    if a.data.get("train_hash") != b.data.get("train_hash"):
        found.append("were trained on other rows or tokens: their training losses are means over other tokens")
    return found


def _leaked(run: Record) -> list[str]:
    """How much of its test set a run was trained on: rows with the same question, by their hashes; without hashes, by the file."""
    remembers = "its scores show what it remembers"
    known = [row["hashes"] for row in run.rows if row.get("hashes")]
    if run.trained_rows is not None and known:
        seen = same = 0
        for question, whole in known:
            rows = _with(run.trained_rows, 0, question)
            seen += len(rows) > 0
            same += len(_with(rows, 1, whole)) > 0
        if not seen:
            return []
        of = f"{seen:,} of {len(run.rows):,} test rows, {'all' if same == seen else f'{same:,}'} of them with the same answer"
        return [f"{run.letter} was trained on the questions of {of}: {remembers}"]
    if run.config.get("data") and run.decoded.get("data") == run.config["data"]:
        return [f"{run.letter} was trained on the file that it is tested on: {remembers}"]
    return []


def _with(rows: np.ndarray, column: int, hash_: str) -> np.ndarray:
    """The rows, sorted by a column, that have this hash in it; no others are read."""
    value = np.uint64(int(hash_, 16))
    start, end = (int(rows[:, column].searchsorted(value, side)) for side in ("left", "right"))
    return rows[start:end]


def rounded_note(run: Record) -> str | None:
    """A line where a model was rounded to the dtype of its config.json after its losses were measured."""
    loss = run.data.get("rounded_loss")
    if not isinstance(loss, float):
        return None
    return f"the model was rounded to the dtype of its config.json at the end; its validation loss is {loss:.4f}"


def over_the_limit(runs: list[Record]) -> list[str]:
    """How many references of the test set are longer than the limits of a run let it learn."""
    lines = []
    for run in runs:
        name = next((name for name in ("max_target_length", "max_length") if run.config.get(name)), None)
        lengths = [row["label_tokens"] for row in run.scored if isinstance(row.get("label_tokens"), int)]
        if name and lengths:
            over = sum(n > run.config[name] for n in lengths)
            lines.append(
                f"{run.letter}: {over:,} of {len(lengths):,} test references ({100 * over / len(lengths):.0f} %) are longer than "
                f"its {name} of {run.config[name]:,} tokens; the longest has {max(lengths):,}. They are scored whole."
            )
    return lines
