"""Choosing tokens, stopping, and text that comes in whole characters."""

import pytest
import torch
from tiny import make_model

import minilora
from minilora.errors import ModelError
from minilora.generate import generate, stream_text
from minilora.sampling import GREEDY, Sampling, choose, read_generation
from minilora.terminal import printable

LOGITS = torch.tensor([1.0, 4.0, 2.0, 3.0, -1.0])
NONE_SEEN = torch.tensor([], dtype=torch.long)


def drawn(sampling: Sampling, times: int = 400) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {choose(LOGITS, NONE_SEEN, sampling, generator) for _ in range(times)}


def test_greedy_takes_the_likeliest():
    assert drawn(GREEDY, 5) == {1}


def test_top_k_and_top_p_cut_the_tail():
    assert drawn(Sampling(temperature=5.0)) == {0, 1, 2, 3, 4}
    assert drawn(Sampling(temperature=5.0, top_k=2)) == {1, 3}
    p = LOGITS.softmax(0).sort(descending=True).values
    assert drawn(Sampling(temperature=1.0, top_p=float(p[0] + p[1] / 2))) == {1, 3}
    assert drawn(Sampling(temperature=1.0, top_p=0.0)) == {1}


def test_temperature_is_the_softmax():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[choose(LOGITS, NONE_SEEN, Sampling(temperature=2.0), generator)] += 1
    p = (LOGITS / 2).softmax(0)
    assert ((counts / 4000 - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()


def test_repetition_penalty_pushes_seen_tokens_down():
    seen = torch.tensor([1, 4, 1])
    assert choose(LOGITS, seen, Sampling(repetition_penalty=2.0)) == 3


def test_generation_ends_before_the_stop_token(tmp_path):
    model = minilora.load_model(make_model(tmp_path / "model"), device="cpu")
    free = list(generate(model, [5, 6, 7], set(), 12))
    stopped = list(generate(model, [5, 6, 7], {free[4]}, 12))
    assert len(free) == 12 and stopped == free[: free.index(free[4])]


def test_cached_generation_is_the_full_forward(tmp_path):
    model = minilora.load_model(make_model(tmp_path / "model"), torch.float64, "cpu")
    ids = [5, 6, 7]
    for token in generate(model, list(ids), set(), 10):
        with torch.no_grad():
            assert token == int(model.logits(torch.tensor(ids))[-1].argmax())
        ids.append(token)


def test_streamed_text_is_the_text(tmp_path):
    tokenizer = minilora.load_tokenizer(make_model(tmp_path / "model"))
    text = "naïve 你好 🤖!"
    pieces = list(stream_text(tokenizer, iter(tokenizer.encode(text))))
    assert "".join(pieces) == text and all("\ufffd" not in p for p in pieces)


def test_generation_config(tmp_path):
    folder = make_model(tmp_path / "model")
    assert read_generation(folder) == (GREEDY, set())
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.7, "top_k": 20, "eos_token_id": [3, 4]}'
    )
    assert read_generation(folder) == (Sampling(0.7, 1.0, 20, 1.0), {3, 4})
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7, "eos_token_id": 3}')
    assert read_generation(folder)[0].temperature == 0.0
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": null, "eos_token_id": null}')
    assert read_generation(folder) == (Sampling(1.0, 1.0, 50, 1.0), set())
    for wrong in (
        '{"top_p": "x"}',
        '{"eos_token_id": 1.5}',
        '{"eos_token_id": [[1]]}',
        '{"eos_token_id": "<|im_end|>"}',
        '{"top_k": 1e400}',
        '{"top_k": 1e30}',
        '{"repetition_penalty": 0}',
        '{"repetition_penalty": NaN}',
        '{"do_sample": true, "temperature": 1e24}',
    ):
        (folder / "generation_config.json").write_text(wrong)
        with pytest.raises(ModelError, match="generation_config"):
            read_generation(folder)


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\u202ec\n\t你") == "a\\u001b[2Jb\\u202ec\n\t你"
