"""One computation by many routes, in fp64: the routes agree to 1e-12 of the largest value, or to the bit."""

import pytest
import torch
from oracle import cached_logits
from tiny import make_model, make_rows

import minilora
from minilora.data import load_examples, make_batch, pack
from minilora.evaluate import evaluate
from minilora.lora import adapters, add_lora
from minilora.settings import resolve
from minilora.train import train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("equal") / "model")


@pytest.fixture(scope="module")
def examples(folder, tmp_path_factory):
    rows = make_rows(tmp_path_factory.mktemp("rows") / "rows.json")
    return load_examples(rows, minilora.load_tokenizer(folder))[0]


def adapted(folder, dropout=0.0):
    """The model in fp64 with adapters that do something."""
    model = minilora.load_model(folder, torch.float64, "cpu")
    add_lora(model, r=4, alpha=8, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    for _, wrapper in adapters(model):
        wrapper.lora_B.data.normal_(0, 0.1, generator=generator)
    return model.double().train()


def loss_and_gradients(model, batches):
    targets = sum(len(b.targets) for b in batches)
    losses = []
    for batch in batches:
        loss = model.loss(batch) / targets
        loss.backward()
        losses.append(loss.detach())
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return torch.stack(losses).sum(), gradients


def assert_close(a, b):
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("route", ["one at a time", "two streams", "packed first-fit", "reversed"])
def test_micro_batches_and_packing(folder, examples, route):
    model = adapted(folder)
    batches = {
        "one at a time": [make_batch([e]) for e in examples],
        "two streams": [make_batch(examples[:5]), make_batch(examples[5:])],
        "packed first-fit": pack(examples, 150),
        "reversed": [make_batch(examples[::-1])],
    }[route]
    expected = loss_and_gradients(model, [make_batch(examples)])
    for value, reference in zip(loss_and_gradients(model, batches), expected, strict=True):
        assert_close(value, reference)


def test_packed_documents_do_not_see_each_other(folder, examples):
    """Another first document changes no bit of the second."""
    model = adapted(folder).eval()
    stream = make_batch(examples[:2])
    other = make_batch([examples[0], examples[1]])
    end = stream.documents.cu_seqlens[1]
    other.ids[:end] = 7
    with torch.no_grad():
        hidden, changed = (model(b.ids, b.documents) for b in (stream, other))
    assert torch.equal(hidden[end:], changed[end:])
    assert not torch.equal(hidden[:end], changed[:end])


def test_evaluation_does_not_depend_on_streams(folder, examples):
    model = adapted(folder)
    one, many = evaluate(model, examples, 10_000), evaluate(model, examples, 1)
    assert one.tokens == many.tokens and abs(one.total - many.total) <= 1e-12 * one.total


def test_checkpointing_changes_no_bit(folder, examples):
    """Recomputation draws the same dropout masks."""
    model = adapted(folder, dropout=0.3)
    kept = loss_and_gradients(model, [make_batch(examples)])
    model.checkpointing = True
    recomputed = loss_and_gradients(model, [make_batch(examples)])
    assert torch.equal(kept[0], recomputed[0]) and torch.equal(kept[1], recomputed[1])


@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}])
def test_cached_decoding_is_the_full_forward(tmp_path, examples, changes):
    model = adapted(make_model(tmp_path / "model", **changes)).eval()
    ids = torch.from_numpy(examples[-1].ids)
    with torch.no_grad():
        full = model.logits(ids)
        pieces = cached_logits(model, ids, [7, 1, 1, 5, *[1] * (len(ids) - 14)])
    assert_close(torch.cat(pieces), full)


def test_a_new_adapter_is_the_base_to_the_bit(folder, examples):
    ids = torch.from_numpy(examples[0].ids)
    for dtype in (torch.float32, torch.bfloat16):
        model = minilora.load_model(folder, dtype, "cpu")
        with torch.no_grad():
            base = model.logits(ids)
            add_lora(model)
            assert torch.equal(model.logits(ids), base)


def test_accumulation_is_one_step(folder, examples):
    """A step in streams of 60 tokens moves the adapters as a step in one stream does."""
    config = resolve({"lr": 1e-2})
    moved = []
    for capacity in (60, 10_000):
        model = adapted(folder)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2, fused=True)
        for step in range(3):
            train_step(model, optimizer, pack(examples, capacity), config, step)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert_close(*moved)
