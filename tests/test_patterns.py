"""Which patterns are used: those that give any name up soon, however they are written."""

import time

import pytest

from minilora.errors import UsageError
from minilora.patterns import LETTERS, MOST_WAYS, simple
from minilora.targets import chosen

PATHS = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(40) for n in "qkvo"]


@pytest.mark.parametrize(("pattern", "count"), [
    (r".*\.(q|v)_proj", 80), (r"model\.layers\.(1[2-9]|2[0-9])\..*(q_proj|v_proj)", 36), (r".*layers\.\d+\.self_attn\.(q|k)_proj", 80),
    (r"^(?!.*(lm_head|output)).*\.(?:q_proj|k_proj|v_proj|o_proj)$", 160), (r"(.*\.)?q_proj", 40), (r"model\.(layers\.[0-9]{1,2}\.)?self_attn.+", 160),
    (r"(?i:MODEL)\.layers\.[0-3]\..*", 16), (r"(?P<all>.*)_proj", 160),
])  # fmt: skip
def test_patterns_that_people_write_are_used(pattern: str, count: int):
    assert len(chosen(PATHS, pattern)) == count


@pytest.mark.parametrize("pattern", [
    "(a+)+$", "(|.)(|.)" * 10 + "x", "(.|.)*x", ".*" * 12 + "x!", "((.*)*)*x", "(.+)+x$", r"(.)\1x", "(.|.){50}x", "(?P<a>x)(?(a)b|c)",
    "(x*)*", "(x?){100}y", "(?=(.*)*b)", "(?:(?:.|l)+?)+!", "(?>(a|aa)*)*b", "x" * 201, "(" * 99 + ")" * 99,
])  # fmt: skip
def test_patterns_that_could_be_tried_for_ever_are_not(pattern: str):
    start = time.process_time()
    assert simple(pattern) is None or pattern.startswith("((((")
    with pytest.raises(UsageError, match=r"for ever|no linear"):
        chosen(PATHS, pattern)
    assert time.process_time() - start < 1


def test_a_broken_pattern_is_told_as_one():
    for pattern in ("(", "*a", "[", "x{99999999999999999999}", "(?P<a"):
        assert simple(pattern) is None
        with pytest.raises(UsageError, match="not a regular expression"):
            chosen(PATHS, pattern)


def test_ways_multiply():
    """As many repetitions as the bound allows, and one more; a choice of words counts as two."""
    many = 0
    while LETTERS ** (many + 1) <= MOST_WAYS:
        many += 1
    assert simple(".{1,100}" * many) and not simple(".{1,100}" * (many + 1))
    assert simple("(ab|cd|ef)" * 16) and not simple("(ab|cd|ef)" * 17)
