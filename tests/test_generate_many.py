"""Many prompts at once are the same answers as one after the other."""

import random
from pathlib import Path

import pytest
import torch
from tiny import make_model

import minilora
from minilora.generate import Sampling, generate
from minilora.generate_many import generate_many, random_of
from minilora.models.decoder import Decoder

PROMPTS = [[random.Random(n).randrange(256) for _ in range(1 + (7 * n) % 23)] for n in range(13)]


@pytest.fixture(scope="module", params=[{}, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}])
def model(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("many") / "model", **request.param)
    return minilora.load_model(folder, torch.float64, "cpu")


def alone(model, stop, max_tokens):
    return [list(generate(model, prompt, stop, max_tokens)) for prompt in PROMPTS]


@pytest.mark.parametrize("slots", [1, 3, 13, 40])
def test_greedy_answers_are_those_of_one_prompt_alone(model, slots):
    free = alone(model, set(), 20)
    stop = {free[0][4], free[5][9], free[9][0]}  # answers end at different passes
    found = {a.number: a for a in generate_many(model, PROMPTS, stop, 20, slots)}
    wanted = alone(model, stop, 20)
    assert [found[n].ids for n in range(len(PROMPTS))] == wanted
    assert 0 < len({len(ids) for ids in wanted} - {20}) and 1 < len({a.cut for a in found.values()})
    assert all(a.cut == (len(a.ids) == 20) for a in found.values())


def test_draws_do_not_depend_on_what_runs_beside(model):
    sampling = Sampling(temperature=1.5, top_k=50, repetition_penalty=1.1)
    runs = [{a.number: a.ids for a in generate_many(model, PROMPTS, {7}, 12, slots, sampling, 3)} for slots in (2, 9)]
    assert runs[0] == runs[1]
    assert runs[0] != {a.number: a.ids for a in generate_many(model, PROMPTS, {7}, 12, 9, sampling, 4)}


def test_no_token_is_computed_twice_and_none_is_padding(model, monkeypatch):
    """Every pass is as long as its new tokens: the prompts once, then a token for each answer token but its last."""
    passes = []
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, ids, *a: passes.append(len(ids)) or forward(self, ids, *a))
    answers = list(generate_many(model, PROMPTS, set(), 9, 4))
    assert sum(passes) == sum(map(len, PROMPTS)) + sum(len(a.ids) - 1 for a in answers)
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
    found = {a.number: a.ids for a in generate_many(model, prompts, {7}, 9, 4, sampling, 2)}
    assert [found[n] for n in range(len(prompts))] == wanted
    assert len({tuple(ids) for ids in wanted}) > 5
