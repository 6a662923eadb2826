"""Many clients at once, rude ones among them: nothing but answers, 429 and what they asked for, and passes that are full."""

import asyncio
import os

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from served import make_models, running

from bench.serve import measure


def test_many_clients_share_full_passes(tmp_path, monkeypatch):
    models, sizes = make_models(tmp_path), []
    choose = models.choose
    monkeypatch.setattr(models, "choose", lambda requests: sizes.append(len(requests)) or choose(requests))
    with running(models, slots=8, queue=16) as (url, engine):
        load = asyncio.run(measure(url, os.getpid(), 40, 1.5, 24))
        assert not engine.unfinished
    assert set(load.answers) <= {"200", "429", "cut", "broken JSON: 400"} and {"200", "429"} <= set(load.answers), (
        load.answers
    )
    assert load.answers["200"] >= 24 and load.tokens > 24
    decoding = sorted(sizes)[len(sizes) // 2 :]
    assert decoding[0] >= 3 and max(sizes) == 8  # a client alone has passes of one
