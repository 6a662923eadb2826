"""Many prompts at once are the same answers as one after the other."""

import random
from collections import deque
from pathlib import Path

import pytest
import torch
from tiny import make_model

import minilora
from minilora.generate import Request, decode, generate
from minilora.models.decoder import Decoder
from minilora.sampling import GREEDY, Sampling, random_of

PROMPTS = [[random.Random(n).randrange(256) for _ in range(1 + (7 * n) % 23)] for n in range(13)]


@pytest.fixture(scope="module", params=[{}, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}])
def model(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("many") / "model", **request.param)
    return minilora.load_model(folder, torch.float64, "cpu")


def together(model, prompts, stop, max_tokens, slots, sampling=GREEDY, seed=0) -> list[Request]:
    requests = [Request(p, stop, max_tokens, sampling, random_of(seed, n)) for n, p in enumerate(prompts)]
    for passed in decode(model, deque(requests), slots):
        assert 0 < len(passed) <= slots
    return requests


def alone(model, stop, max_tokens):
    return [list(generate(model, prompt, stop, max_tokens)) for prompt in PROMPTS]


@pytest.mark.parametrize("slots", [1, 3, 13, 40])
def test_greedy_answers_are_those_of_one_prompt_alone(model, slots):
    free = alone(model, set(), 20)
    stop = {free[0][4], free[5][9], free[9][0]}  # answers end at different passes
    found = together(model, PROMPTS, stop, 20, slots)
    wanted = alone(model, stop, 20)
    assert [r.ids for r in found] == wanted
    assert 0 < len({len(ids) for ids in wanted} - {20}) and {r.finish_reason for r in found} == {"stop", "length"}
    assert all((r.finish_reason == "length") == (len(r.ids) == 20) for r in found)


def test_draws_do_not_depend_on_what_runs_beside(model):
    sampling = Sampling(temperature=1.5, top_k=50, repetition_penalty=1.1)
    seeds = [(2, 3), (9, 3), (9, 4)]
    runs = [[r.ids for r in together(model, PROMPTS, {7}, 12, slots, sampling, seed)] for slots, seed in seeds]
    assert runs[0] == runs[1] != runs[2]


def test_requests_come_and_go_between_passes(model):
    """Each with its own sampling: one is ended by the caller, two join while others run, and no answer changes."""
    drawn, stop = Sampling(temperature=1.5), {7}
    first, second = (Request(p, stop, 9) for p in PROMPTS[:2])
    late = [Request(p, stop, n, drawn, random_of(1, n)) for n, p in zip((3, 6), PROMPTS[2:4], strict=True)]
    waiting = deque([first, second])
    for number, passed in enumerate(decode(model, waiting, slots=2), 1):
        assert len(passed) <= 2
        if number == 4:
            second.finish_reason = "cancelled"
            waiting.extend(late)
    assert second.ids == list(generate(model, second.prompt, stop, 4)) and second.finish_reason == "cancelled"
    assert first.ids == list(generate(model, first.prompt, stop, 9))
    for request, n in zip(late, (3, 6), strict=True):
        assert request.ids == list(generate(model, request.prompt, stop, n, drawn, random_of(1, n)))


def test_a_request_that_ends_before_its_turn_is_never_computed(model):
    """And the caller hears of each pass before it runs: which requests are in it, in the order of its rows."""
    first, never, last = (Request(p, {7}, 4) for p in PROMPTS[:3])
    never.finish_reason, told = "cancelled", []
    passed = list(decode(model, deque([first, never, last]), 2, lambda requests: told.append(list(requests))))
    assert told == passed and not never.ids and all(never not in requests for requests in passed)
    assert last.ids == list(generate(model, last.prompt, {7}, 4))


def test_no_token_is_computed_twice_and_none_is_padding(model, monkeypatch):
    """Every pass is as long as its new tokens: the prompts once, then a token for each answer token but its last."""
    passes = []
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, ids, *a: passes.append(len(ids)) or forward(self, ids, *a))
    answers = together(model, PROMPTS, set(), 9, 4)
    assert sum(passes) == sum(map(len, PROMPTS)) + sum(len(r.ids) - 1 for r in answers)
    assert max(passes[1:]) <= max(4, max(map(len, PROMPTS)) * 4)


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "glm", "glm4", "qwen", "qwen2_yarn", "qwen3"])
def test_every_family_answers_as_alone(family):
    """With a bidirectional prefix for ChatGLM-6B, and with prompts beyond the trained length for Qwen-1."""
    model = minilora.load_model(GOLDEN / family, torch.float64, "cpu")
    opening = [57, 60] if family == "chatglm" else []
    prompts = [[i % 50 for i in prompt] + opening for prompt in PROMPTS]
    sampling = Sampling(temperature=3.0)  # the likeliest token of random weights is often one and the same
    wanted = [list(generate(model, p, {7}, 9, sampling, random_of(2, n))) for n, p in enumerate(prompts)]
    assert [r.ids for r in together(model, prompts, {7}, 9, 4, sampling, 2)] == wanted
    assert len({tuple(ids) for ids in wanted}) > 5
