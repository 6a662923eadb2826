"""Metrics equal those of the packages that everybody quotes, on the same strings; intervals and tests do what they say."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.report import metrics
from minilora.report.metrics import (
    Measured,
    bleu4,
    common_subsequence,
    interval,
    paired,
    rouge_l,
    rouge_n,
    rouge_tokens,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    rouge_chinese = pytest.importorskip("rouge_chinese")
    metrics.word_cutter()

PAIRS = [
    ("今天天气很好，我们去公园散步吧。", "今天的天气不错，我们一起去公园走走。"),
    ("这件外套线条利落，适合秋天。\n\n颜色是灰色。 ", "这件灰色外套线条利落……适合春秋两季！真的？"),
    ("def f(x):\n    return x + 1", "def f(y):\n    return y + 1\n"),
    ("the cat sat on the mat the cat", "the cat is on the mat"),
    ("好", "好"),
    ("甲", "乙丙丁"),
    ("。。。。", "！！？？。。"),
    ("a", "a b c d e f"),
    ("“你好。”他说。“再见！”", "他说：“你好。”"),
]
# few letters, so that n-grams are shared; and what ends sentences or lines
TEXT = st.text(alphabet="我你好天 a.。！？?…”’\n，", min_size=1, max_size=30)
WORDS = st.lists(st.sampled_from(["我", "你好", "a", ".", "。", "！", "”", "\n", " ", "......", "……", "？"]), min_size=1, max_size=25)  # fmt: skip


def nltk_bleu(answer, reference) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smooth = bleu_score.SmoothingFunction().method3
        return 100 * bleu_score.sentence_bleu([list(reference)], list(answer), smoothing_function=smooth)


def package_rouge(answer: list[str], reference: list[str]) -> list[float]:
    """As ChatGLM-6B and LLaMA-Factory call it: words joined by blanks; 0 where one side has none."""
    if not " ".join(answer).split() or not " ".join(reference).split():
        return [0.0, 0.0, 0.0]
    scores = rouge_chinese.Rouge().get_scores(" ".join(answer), " ".join(reference))[0]
    return [100 * scores[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")]


def our_rouge(answer: list[str], reference: list[str]) -> list[float]:
    return [rouge_n(answer, reference, 1), rouge_n(answer, reference, 2), rouge_l(answer, reference)]


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_values_are_the_packages(answer, reference):
    cut = metrics.word_cutter()
    assert cut is not None
    found = {name: metric.value for name, metric in metrics.measure([answer], [reference]).items()}
    assert found["bleu4_char"] == pytest.approx(nltk_bleu(answer, reference), abs=1e-9)
    assert found["bleu4_words"] == pytest.approx(nltk_bleu(cut(answer), cut(reference)), abs=1e-9)
    for kind, tokens in (("words", cut), ("char", lambda text: list("".join(text.split())))):
        mine = [found[f"rouge{n}_{kind}"] for n in "12L"]
        if kind == "char":  # one sentence: rouge-chinese's way to cut lines does not matter
            assert mine == pytest.approx(our_rouge(tokens(answer), tokens(reference)), abs=1e-9)
        assert mine == pytest.approx(package_rouge(tokens(answer), tokens(reference)), abs=1e-9)


@settings(deadline=None, max_examples=300)
@given(answer=TEXT, reference=TEXT)
def test_bleu_is_nltks(answer, reference):
    assert bleu4(answer, reference) == pytest.approx(nltk_bleu(answer, reference), abs=1e-9)


@settings(deadline=None, max_examples=300)
@given(answer=WORDS, reference=WORDS)
def test_rouge_is_rouge_chineses(answer, reference):
    """The words go in as they are: blank ones, sentence ends and empty lines are where the two could differ."""
    mine = our_rouge(rouge_tokens(answer), rouge_tokens(reference))
    assert mine == pytest.approx(package_rouge(answer, reference), abs=1e-9)


@settings(deadline=None, max_examples=300)
@given(a=st.text("abc", max_size=40), b=st.text("abc", max_size=40))
def test_common_subsequence_is_the_tables(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    assert common_subsequence(a, b) == table[-1, -1]


def test_very_long_texts_are_measured_by_their_beginnings_and_it_is_said():
    same = "abcde" * 4000
    assert rouge_l(same + "x" * 10**6, same + "y" * 10**6) == rouge_l(same, same) > rouge_l(same[1:] + "x", same)
    assert all("of the first 20,000" in text for name, text in metrics.DEFINITIONS.items() if name.startswith("rougeL"))


def test_empty_answers_score_nothing():
    assert all(metric.value == 0 for metric in metrics.measure(["", "  \n"], ["好的。", "ab"]).values())


def test_sacrebleu_is_sacrebleus():
    import sacrebleu

    answers, references = map(list, zip(*PAIRS, strict=True))
    found = metrics.measure(answers, references)
    assert found["sacrebleu"].value == pytest.approx(sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert "tok:zh" in found["sacrebleu"].definition and "version:" in found["chrf"].definition
    assert "tok:13a" in metrics.measure(["a b"], ["a b c"])["sacrebleu"].definition


def of_scores(scores: np.ndarray) -> Measured:
    return Measured(scores[:, None], lambda sums: sums[:, 0] / len(scores), "a mean")


def test_intervals_hold_the_mean_and_repeat():
    scores = np.random.default_rng(5).normal(50, 10, 400)
    found = interval(of_scores(scores))
    assert found == interval(of_scores(scores)) != interval(of_scores(scores), seed=1)
    assert found.low < found.value < found.high and found.value == pytest.approx(scores.mean())
    # about two standard errors each way
    assert found.high - found.low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.15)


def test_a_paired_difference_is_seen_and_chance_is_not():
    generator = np.random.default_rng(6)
    a = generator.normal(50, 20, 200)
    better = paired(of_scores(a), of_scores(a + generator.normal(2, 4, 200)))
    assert better.low > 0 and better.p < 0.01  # though the rows differ by 20
    same = paired(of_scores(a), of_scores(a + generator.permutation(np.repeat([-3.0, 3.0], 100))))
    assert same.low < 0 < same.high and same.p > 0.5
    assert paired(of_scores(a), of_scores(a)).p == 1.0
    two_rows = a + 30 * (np.arange(200) < 2)
    assert paired(of_scores(a), of_scores(two_rows)).p == pytest.approx(0.5, abs=0.06)  # a sign for each of two rows


def test_corpus_metrics_are_compared_the_same_way():
    references = [f"第{n}行是{n * 7}号。" for n in range(40)]
    worse = [f"第{n}行。" if n % 2 else r for n, r in enumerate(references)]
    a, b = metrics.measure(worse, references), metrics.measure(references, references)
    for name in ("sacrebleu", "chrf"):
        assert paired(a[name], b[name]).p < 0.01 and paired(a[name], b[name]).low > 0
        assert paired(a[name], a[name]).p == 1.0
        assert interval(a[name]).low < a[name].value < interval(a[name]).high
