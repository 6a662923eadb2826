"""How close an answer is to its reference: BLEU-4, ROUGE and exact match row by row, sacreBLEU and chrF over all rows.

Three different numbers are called BLEU-4 where GLM models are trained, so every name here says what is counted, and
DEFINITIONS is printed under every table. Scores run from 0 to 100. The values are those of nltk, rouge-chinese and sacreBLEU
on the same strings (tests/report/test_metrics.py).
"""

import importlib.util
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# tokens of a text that ROUGE-L reads: its time grows as the product of two lengths, and this takes 0.05 s
LONGEST = 20_000
DEFINITIONS = {
    "bleu4_char": "BLEU-4 of each answer by character, smoothing method 3, mean over rows: ChatGLM-6B's and LLaMA-Factory's BLEU-4",
    "bleu4_words": "the same by jieba word: GLM-4's and ChatGLM3's BLEU-4 (which they print without the factor 100)",
    "rouge1_words": "ROUGE-1 F of jieba words, mean over rows, as rouge-chinese: ChatGLM-6B's and LLaMA-Factory's ROUGE-1",
    "rouge2_words": "ROUGE-2 F of jieba words, the same way",
    "rougeL_words": f"ROUGE-L F of jieba words, the same way; of the first {LONGEST:,} where there are more",
    "rouge1_char": "ROUGE-1 F of characters without blanks, mean over rows",
    "rouge2_char": "ROUGE-2 F of characters, the same way",
    "rougeL_char": f"ROUGE-L F of characters, the same way; of the first {LONGEST:,} where there are more",
    "exact": "share of answers that are their reference, blanks around them aside",
    "sacrebleu": "sacreBLEU's BLEU over all rows together",
    "chrf": "sacreBLEU's chrF2 over all rows together",
}
RESAMPLES = 1000


def bleu4(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Sentence BLEU-4 of token lists, 0 to 100 (Papineni et al., 2002).

    A precision of zero becomes 1 / (2^k n-grams) at the k-th time (method 3 of Chen and Cherry, 2014). No common token is 0.
    """
    if not set(answer) & set(reference):
        return 0.0
    logs, misses = 0.0, 0
    for n in (1, 2, 3, 4):
        ours, theirs = Counter(_ngrams(answer, n)), Counter(_ngrams(reference, n))
        hits, count = (ours & theirs).total(), max(1, ours.total())
        misses += hits == 0
        logs += 0.25 * math.log(hits / count if hits else 1 / (2**misses * count))
    brevity = 1.0 if len(answer) > len(reference) else math.exp(1 - len(reference) / len(answer))
    return 100 * brevity * math.exp(logs)


def rouge_n(answer: Sequence[str], reference: Sequence[str], n: int) -> float:
    """ROUGE-N F of the sets of n-grams, 0 to 100, as in rouge-chinese: repeated n-grams count once."""
    ours, theirs = set(_ngrams(answer, n)), set(_ngrams(reference, n))
    return _f_score(len(ours & theirs), len(ours), len(theirs))


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L F of the longest common subsequence, 0 to 100 (Lin, 2004); of very long texts, that of their first LONGEST tokens."""
    answer, reference = answer[:LONGEST], reference[:LONGEST]
    return _f_score(common_subsequence(answer, reference), len(answer), len(reference))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one integer operation per row of the table (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    open_ = full
    for token in b:
        hits = open_ & places.get(token, 0)
        open_ = (open_ + hits | open_ - hits) & full
    return len(a) - open_.bit_count()


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def _f_score(common: int, ours: int, theirs: int) -> float:
    precision, recall = common / max(ours, 1), common / max(theirs, 1)
    return 100 * 2 * precision * recall / (precision + recall + 1e-8)  # their guard against 0 / 0


# where rouge-chinese ends a sentence
SENTENCE_END = re.compile(r"(?:[。！？?]|\.{6}|…{2})(?=[^”’])")


def rouge_tokens(words: Sequence[str]) -> list[str]:
    """The tokens that rouge-chinese counts in a list of words: no blanks, and '' for each empty line."""
    lines = SENTENCE_END.sub(lambda m: m[0] + "\n", " ".join(words)).rstrip().split("\n")
    return [token for line in lines if line for token in " ".join(line.split()).split(" ")]


@cache
def word_cutter() -> Callable[[str], list[str]] | None:
    """jieba's function from a text to its words; None if jieba is not installed."""
    if importlib.util.find_spec("jieba") is None:
        return None
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in its source, and pkg_resources
        import jieba
    jieba.setLogLevel("ERROR")
    tokenizer: Any = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as private:
        # its cache in the shared /tmp could be another user's file
        tokenizer.cache_file = str(Path(private) / "jieba.cache")
        tokenizer.initialize()
    return tokenizer.lcut


class Measured(NamedTuple):
    """A metric of some answers: its counts in each row, float64 [rows, K], and the score of summed counts, [n, K] -> [n]."""

    counts: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    definition: str

    @property
    def value(self) -> float:
        return float(self.score(self.counts.sum(0, keepdims=True))[0])


def measure(answers: Sequence[str], references: Sequence[str]) -> dict[str, Measured]:
    """Every metric of the answers, by name; those on words only if jieba is installed."""
    cut = word_cutter()
    rows = [_row(a, r, cut) for a, r in zip(answers, references, strict=True)]
    result = {}
    for name, definition in DEFINITIONS.items():
        if name in rows[0]:
            scores = np.array([[row[name]] for row in rows])
            result[name] = Measured(scores, lambda sums: sums[:, 0] / len(rows), definition)
    return result | {name: _corpus(name, m, answers, references) for name, m in _sacrebleu(references).items()}


def measured_rows(rows: list[dict[str, Any]]) -> dict[str, Measured]:
    """Every metric of rows of a generated_predictions.jsonl, all with a reference; {} for no rows."""
    return measure([row["predict"] for row in rows], [row["label"] for row in rows]) if rows else {}


def _row(answer: str, reference: str, cut: Callable[[str], list[str]] | None) -> dict[str, float]:
    scores = {"exact": 100.0 * (answer.strip() == reference.strip()), "bleu4_char": bleu4(answer, reference)}
    scores |= _rouge("char", "".join(answer.split()), "".join(reference.split()))
    if cut is not None:
        ours, theirs = cut(answer), cut(reference)
        scores["bleu4_words"] = bleu4(ours, theirs)
        scores |= _rouge("words", rouge_tokens(ours), rouge_tokens(theirs))
    return scores


def _rouge(kind: str, answer: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    return {
        f"rouge1_{kind}": rouge_n(answer, reference, 1),
        f"rouge2_{kind}": rouge_n(answer, reference, 2),
        f"rougeL_{kind}": rouge_l(answer, reference),
    }


def _sacrebleu(references: Sequence[str]) -> dict[str, Any]:
    """sacreBLEU's metrics for these references, with its Chinese tokenizer if a tenth of the characters are Chinese, else 13a."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    text = "".join(references)
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in text)
    return {"sacrebleu": BLEU(tokenize="zh" if 10 * chinese > len(text) else "13a"), "chrf": CHRF()}


def _corpus(name: str, metric: Any, answers: Sequence[str], references: Sequence[str]) -> Measured:
    # its own paired test counts a tie as a difference: two systems that differ in two rows get p = 0.001
    counts = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]), float)

    def score(sums: np.ndarray) -> np.ndarray:
        return np.array([float(metric._compute_score_from_stats(s.round().astype(int).tolist()).score) for s in sums])

    return Measured(counts, score, f"{DEFINITIONS[name]} ({metric.get_signature()})")


class Interval(NamedTuple):
    """A score over all rows and the 95 % interval of its bootstrap over rows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}\u00a0to\u00a0{self.high:.2f})"  # not broken over lines


def interval(metric: Measured, seed: int = 0) -> Interval:
    """The score with its percentile bootstrap interval; the same seed gives the same interval."""
    low, high = np.percentile(metric.score(_resamples(len(metric.counts), seed) @ metric.counts), [2.5, 97.5])
    return Interval(metric.value, float(low), float(high))


class Paired(NamedTuple):
    """How much B is above A on the same rows, the 95 % interval of the difference, and its p under no difference."""

    difference: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.difference:+.2f} ({self.low:+.2f}\u00a0to\u00a0{self.high:+.2f})"


def paired(a: Measured, b: Measured, seed: int = 0) -> Paired:
    """Compare one metric of two systems on the same rows: paired bootstrap interval, and p of a randomisation test.

    The test swaps A and B row by row at random and counts how often the difference is as large, in either direction (Noreen, 1989).
    """
    assert len(a.counts) == len(b.counts), (a.counts.shape, b.counts.shape)
    times = _resamples(len(a.counts), seed)
    low, high = np.percentile(b.score(times @ b.counts) - a.score(times @ a.counts), [2.5, 97.5])
    observed = b.value - a.value
    moved = np.random.default_rng(seed + 1).integers(0, 2, size=times.shape) @ (b.counts - a.counts)
    swapped = b.score(b.counts.sum(0) - moved) - a.score(a.counts.sum(0) + moved)
    as_far = int((np.abs(swapped) >= abs(observed) - 1e-6).sum())
    return Paired(observed, float(low), float(high), (as_far + 1) / (RESAMPLES + 1))


def _resamples(rows: int, seed: int) -> np.ndarray:
    """The number of draws of each row in each resample, [RESAMPLES, rows]."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(float)
