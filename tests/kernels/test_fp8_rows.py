"""Weights in FP8 by rows and products of their codes, by torch._scaled_mm on a CPU, against the specification."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minilora
from minilora import add_lora, load_model
from minilora.__main__ import main
from minilora.checkpoint.load import empty_model, read_config
from minilora.checkpoint.quantized import quantized_note
from minilora.data import Example, make_batch
from minilora.files.model_folder import ModelFolder
from minilora.kernels import fp8_rows
from minilora.kernels.fp8_rows import FP8RowsWeight, by_rows, input_gradient_ref, product_ref
from minilora.kernels.frozen_linear import add_input_gradient, frozen_linear
from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.packed import stacked
from minilora.kernels.projection import Adapter, Projection
from minilora.models.quantized import quantized_weights

DEMO = Path(minilora.__file__).parent / "demo" / "mini"
GOLDEN = Path(__file__).parents[1] / "golden"
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(found: Tensor | None, wanted: Tensor) -> float:
    """Relative Frobenius distance."""
    assert found is not None
    return (
        torch.linalg.vector_norm(found.double() - wanted.double()) / torch.linalg.vector_norm(wanted.double())
    ).item()


def test_a_weight_is_as_near_as_three_bits_of_fraction_come():
    """Each weight by half a unit in the last place, or of the smallest step; a row of zeros is one."""
    weight = random(32, 48) * torch.logspace(-20, 20, 32)[:, None]
    weight[3] = 0
    weight[5, 1:] = 0
    made = FP8RowsWeight.of(weight)
    found = made.weight_as(torch.float64)
    step = 2.0**-9 * made.scales.double()  # below 2^-6, numbers of e4m3 are this far apart
    assert ((found - weight).abs() <= torch.maximum(weight.abs().double() * 2.0**-4, step / 2) * (1 + 1e-6)).all()
    assert torch.equal(found[3], torch.zeros(48)) and torch.equal(found[5], weight[5].double())
    assert made.scales.isfinite().all() and (made.codes.float().abs().amax(1) == 448).sum() == 31


@dtypes
@pytest.mark.parametrize("rows, n, k", [(1, 16, 16), (33, 48, 64), (5, 160, 32)])
def test_products_are_those_of_the_specification(dtype: torch.dtype, rows: int, n: int, k: int):
    """fp32 sums in another order; in bf16 the last bit may fall the other way."""
    weight, x, bias = (
        FP8RowsWeight.of(random(n, k)),
        random(rows, k, dtype=dtype, seed=1),
        random(n, dtype=dtype, seed=2),
    )
    dy = random(rows, 2 * n, dtype=dtype, seed=3)[:, n:]  # as a group's comes
    eps = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 8)
    pairs = [
        (weight.product(x, None), product_ref(x, weight)),
        (weight.product(x, bias), product_ref(x, weight, bias)),
        (weight.input_gradient(dy), input_gradient_ref(dy, weight)),
    ]
    for found, wanted in pairs:
        assert found is not None and found.dtype == dtype and off(found, wanted) < eps
    # what the two roundings cost: of independent errors of at most 2^-4, uniform below that
    assert off(frozen_linear(x, weight, bias), x.float() @ random(n, k).T + bias) < 0.05
    assert off(add_input_gradient(None, dy, weight), dy.float() @ random(n, k)) < 0.05
    dx = random(rows, k, dtype=dtype, seed=4)
    assert torch.equal(add_input_gradient(dx.clone(), dy, weight), dx + add_input_gradient(None, dy, weight))


def test_tokens_are_rounded_apart():
    """A token of large numbers takes nothing from the others; zeros and numbers that are not finite stay what they are."""
    x = random(6, 32)
    alone = by_rows(x)[0][1:]
    x[0] *= 1e30
    assert torch.equal(by_rows(x)[0][1:].view(torch.int8), alone.view(torch.int8))
    x[2], x[3, 4] = 0, float("inf")
    codes, scales = by_rows(x)
    assert torch.equal(codes[2].float(), torch.zeros(32)) and scales[2] > 0
    y = FP8RowsWeight.of(random(16, 32)).product(x, None)
    assert y is not None and y[3].isnan().all() and y[[0, 1, 2, 4, 5]].isfinite().all()


def test_the_gradient_weighs_rows_as_the_weight_does():
    """Rows of W of very different sizes: their scales go into dY before it is rounded, so that no small row counts as a large one."""
    weight = random(32, 48) * torch.logspace(-3, 3, 32)[:, None]
    dy = random(7, 32, seed=1)
    found = FP8RowsWeight.of(weight).input_gradient(dy)
    assert found is not None and off(found, dy @ weight) < 0.05


@dtypes
def test_a_group_with_adapters(dtype: torch.dtype):
    """The base in FP8, the adapters on x and dY as they are; packed weights are one product."""
    x = random(20, 32, dtype=dtype).requires_grad_()
    whole = FP8RowsWeight.of(random(48, 32, seed=1))
    weights = [
        FP8RowsWeight(c, s) for c, s in zip(whole.codes.split([32, 16]), whole.scales.split([32, 16]), strict=True)
    ]
    adapters = [
        Adapter(random(3, 32, seed=2 + n).requires_grad_(), random(n, 3, seed=3 + n).requires_grad_(), 2.0)
        for n in (32, 16)
    ]
    packed = stacked(weights)
    assert isinstance(packed, FP8RowsWeight) and packed.codes.data_ptr() == whole.codes.data_ptr()
    assert stacked([weights[1], weights[0]]) is None and stacked([weights[0], random(16, 32)]) is None
    projections = [
        Projection(w, random(w.shape[0], seed=9).to(dtype), a) for w, a in zip(weights, adapters, strict=True)
    ]
    ys = lora_linear_group(x, projections)
    dys = [random(20, y.shape[1], dtype=dtype, seed=5) for y in ys]
    torch.autograd.backward(ys, dys)
    tight = 4 * torch.finfo(dtype).eps
    dx = torch.zeros(20, 32)
    for y, dy, (w, bias, a) in zip(ys, dys, projections, strict=True):
        assert isinstance(w, FP8RowsWeight) and bias is not None and a is not None
        wide, up, s = dy.float() * 2, a.b.detach(), x.detach().float() @ a.a.detach().T
        assert off(y.detach(), product_ref(x.detach(), w).float() + bias + 2 * s @ up.T) < tight
        assert off(a.a.grad, (wide @ up).T @ x.detach().float()) < tight and off(a.b.grad, wide.T @ s) < tight
        dx += input_gradient_ref(dy, w).float() + wide @ up @ a.a.detach()
    assert off(x.grad, dx) < tight


def test_torch_takes_the_layouts_of_a_gpu():
    """On tensors without data, where torch checks that the second operand lies by columns."""
    weight = FP8RowsWeight.empty((48, 64), "meta")
    x, dy = (
        torch.empty(33, 64, device="meta", dtype=torch.bfloat16),
        torch.empty(33, 48, device="meta", dtype=torch.bfloat16),
    )
    y, dx = weight.product(x, dy[0]), weight.input_gradient(dy)
    assert (
        y is not None
        and dx is not None
        and (y.shape, dx.shape) == (dy.shape, x.shape)
        and y.dtype == dx.dtype == x.dtype
    )


def test_where_codes_are_multiplied(monkeypatch: pytest.MonkeyPatch):
    """On a GPU that has FP8, in bf16, and widths of 16; elsewhere the weight is widened."""
    cards = {"capability": (9, 0)}
    monkeypatch.setattr(fp8_rows, "capability", lambda _: cards["capability"])

    def multiplies(dtype: torch.dtype = torch.bfloat16, n: int = 48) -> bool:
        x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype)
        return FP8RowsWeight.empty((n, 64), "meta")._multiplies(x)

    assert multiplies() and not multiplies(torch.float32) and not multiplies(n=40)
    cards["capability"] = (8, 9)
    assert multiplies()
    cards["capability"] = (8, 6)
    assert not multiplies()
    weight, x = FP8RowsWeight.of(random(40, 64)), random(5, 64)
    assert torch.allclose(frozen_linear(x, weight), x @ weight.weight_as(torch.float32).T, atol=1e-5)


def test_a_model(monkeypatch: pytest.MonkeyPatch):
    """q/k/v and gate/up are packed and one product each; the error is told; the dry run has its bytes."""
    model = load_model(DEMO, torch.bfloat16, "cpu", "bfloat16", "fp8-rows")
    plain = load_model(DEMO, torch.bfloat16, "cpu", "bfloat16")
    weights = quantized_weights(model)
    assert len(weights) == 7 * model.config.layers
    empty = quantized_weights(empty_model(read_config(ModelFolder(DEMO)), quant="fp8-rows"))
    assert {n: w.nbytes for n, w in empty.items()} == {n: w.nbytes for n, w in weights.items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[name].codes.float(), FP8RowsWeight.of(plain.get_parameter(name)).codes.float())
    note = quantized_note(model)
    assert (
        note is not None
        and "fp8-rows with a scale a row: 35 weights at 8." in note
        and "rounded to FP8 by tokens" in note
        and "%" in note
    )
    products = []
    real = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: products.append(a[1].shape) or real(*a, **k))
    batch = make_batch([Example(np.arange(3, 40), np.arange(4, 41), "row", None)])
    losses, grads = [], []
    for one in (model, plain):
        add_lora(one, r=4)
        loss = one.train().loss(batch)
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]))
    # forward: q/k/v, o, gate/up, down; backward: q/k/v, o, gate, up, down, but for the first layer's input
    assert len(products) == (4 + 5) * model.config.layers - 1
    assert losses[0] != losses[1] and abs(losses[0] / losses[1] - 1) < 0.01
    monkeypatch.setattr(FP8RowsWeight, "_multiplies", lambda *_: False)
    model.zero_grad()
    model.loss(batch).backward()
    widened = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    # the rounding of W makes most of it; that of x and of dY is of the same size and independent of it
    assert off(grads[0], grads[1]) < 3**0.5 * off(widened, grads[1])


@pytest.mark.parametrize(
    "flags, told",
    [
        ([], "a CPU does not"),
        (["--quant", "int8"], "two formats of the base"),
        (["--compute", "float32"], "computes in bfloat16"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--output", "x"], ["plan"]], ids=lambda c: c[0])
def test_where_it_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], flags: list[str], told: str
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert main([*command, "--model", str(DEMO), "--data", "rows.jsonl", "--fp8", "on", "--device", "cpu", *flags]) == 2
    out, err = capsys.readouterr()
    assert told in out + err and not (tmp_path / "x").exists()


def test_a_card_is_planned_for(capsys: pytest.CaptureFixture[str]):
    words = ["plan", "--model", str(DEMO), "--json", "--device-memory", "80", "--gemm", "library"]
    sizes = []
    for flags in ([], ["--fp8", "on"]):
        assert main([*words, *flags]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["memory"]["weights"])
    model = load_model(DEMO, torch.bfloat16, "cpu", quant="fp8-rows")
    linears = quantized_weights(model).values()
    assert sizes[0] - sizes[1] == sum(w.numel() - 4 * w.shape[0] for w in linears)
