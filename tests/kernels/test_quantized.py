"""Weights in 4 and 8 bits: the parts that bitsandbytes and transformers make, and what is read back from them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minilora.kernels import fp8_blocks, frozen_linear, int8_rows, nf4
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.lora_linear import lora_linear_group, lora_linear_group_ref
from minilora.kernels.lora_swiglu import lora_swiglu, lora_swiglu_ref
from minilora.kernels.packed import stacked
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import PIECE, QuantizedWeight, relative_error, weight_as

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "quantised.safetensors")  # made by make_quantized.py there
CASES = [name for name in GOLDEN if "/" not in name and name != "levels"]
FORMATS = {"nf4": nf4, "int8": int8_rows, "fp8": fp8_blocks}
every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def random(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(5))


def same(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None and found.dtype == expected.dtype and found.equal(expected)


def test_there_are_goldens_of_every_kind():
    assert {"random", "constant", "zero", "tiny", "huge", "odd", "one"} <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_nf4_is_bitsandbytes(name: str):
    weight, found = GOLDEN[name], nf4.quantize(GOLDEN[name])
    same(found.codes, GOLDEN[f"{name}/nf4/codes"])
    same(nf4.quantize(weight, nested=False).absmax, GOLDEN[f"{name}/nf4/plain_absmax"])
    same(found.absmax, GOLDEN[f"{name}/nf4/absmax"])
    same(found.nested_absmax, GOLDEN[f"{name}/nf4/nested_absmax"])
    same(found.offset, GOLDEN[f"{name}/nf4/offset"])
    if f"{name}/nf4/weight" in GOLDEN:
        same(found.weight_as(torch.float32), GOLDEN[f"{name}/nf4/weight"])


def test_the_levels_of_scales_are_bitsandbytes():
    same(nf4.dynamic_levels(), GOLDEN["levels"])


@pytest.mark.parametrize("name", CASES)
def test_int8_is_bitsandbytes(name: str):
    found = int8_rows.quantize(GOLDEN[name])
    same(found.codes, GOLDEN[f"{name}/int8/codes"])
    same(found.absmax, GOLDEN[f"{name}/int8/absmax"])


@every_format
@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_read_back_as_the_reference_says(form, name: str):
    found = form.quantize(GOLDEN[name])
    assert found.weight_as(torch.float32).equal(form.dequantize_ref(found))


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 9), (130, 128), (300, 200), (5, 2 * PIECE // 3), (2 * PIECE // 64 + 3, 64)]
)
def test_pieces_of_rows_are_the_reference_rounded_once(form, dtype: torch.dtype, shape: tuple[int, int]):
    """Rows that end where no block does, and weights of more than one piece."""
    found = form.quantize(random(*shape))
    wanted = form.dequantize_ref(found).to(dtype)
    height = shape[0]
    for rows in (
        slice(None),
        slice(0, 1),
        slice(height // 2, None),
        slice(height // 3, height // 3 + 2),
        slice(height, None),
    ):
        same(weight_as(found, dtype, rows), wanted[rows])


@pytest.mark.parametrize("threads", [1, 3])
def test_look_ups_of_few_and_of_many_threads_are_the_same(threads: int):
    found, before = nf4.quantize(random(300, 200)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert found.weight_as(torch.float32).equal(nf4.dequantize_ref(found))
    finally:
        torch.set_num_threads(before)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_quantised_again_stays_as_it_is(form, dtype: torch.dtype):
    """Codes are the nearest levels: the levels themselves are nearest to themselves."""
    once = form.quantize(random(64, 128).to(dtype))
    again = form.quantize(once.weight_as(torch.float32))
    assert (again.weight_as(torch.float32) - once.weight_as(torch.float32)).abs().max() < 1e-2
    assert (again.codes.view(torch.uint8) != once.codes.view(torch.uint8)).float().mean() < 2e-2


@every_format
def test_the_error_is_that_of_the_bits(form):
    """NF4 of normal weights is 0.09 off (QLoRA, table 2's data type); 8 bits by rows under 0.01; three mantissa bits 0.026."""
    weight = random(512, 512)
    error = relative_error(form.quantize(weight), weight)
    low, high = {nf4: (0.085, 0.1), int8_rows: (0.005, 0.01), fp8_blocks: (0.02, 0.03)}[form]
    assert low < error < high
    assert relative_error(form.quantize(torch.zeros(4, 4)), torch.zeros(4, 4)) == 0


@pytest.mark.parametrize(("form", "bits"), [(nf4, 4.13), (int8_rows, 8.02), (fp8_blocks, 8.002)])
def test_bytes_are_those_of_the_bits(form, bits: float):
    found = form.quantize(random(2048, 2048))
    assert found.nbytes * 8 / found.numel() == pytest.approx(bits, abs=0.005)


def test_fp8_holds_every_finite_code():
    """All 256 but the two that are no number, by the bits that are moved and by torch's own cast."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8_blocks.E4M3)
    codes = codes[codes.float().isfinite()][None]
    assert codes.shape[1] == 254
    assert (fp8_blocks.as_half(codes).float() * fp8_blocks.LIFT).equal(codes.float())


@every_format
def test_moving_keeps_the_dtypes_of_the_parts(form):
    found = form.quantize(random(64, 64))
    before = {name: part.dtype for name, part in found.named_buffers()}
    assert {name: part.dtype for name, part in found.to(torch.bfloat16).named_buffers()} == before
    moved = found.to("meta")
    assert moved.device.type == "meta" and {name: p.dtype for name, p in moved.named_buffers()} == before


def test_one_verb_takes_plain_tensors_too():
    weight = random(6, 5)
    assert weight_as(weight, torch.float32).data_ptr() == weight.data_ptr()
    same(weight_as(weight, torch.bfloat16, slice(2, 4)), weight[2:4].bfloat16())


@pytest.mark.parametrize("name", CASES)
def test_bitsandbytes_itself(name: str):
    """The same against the library, where the extra `peers` is there."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = GOLDEN[name]
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    found = nf4.quantize(weight)
    same(found.codes, codes.view(-1))
    same(found.absmax, state.absmax)
    same(found.nested_absmax, state.state2.absmax)
    int8, rows, _ = bnb.int8_vectorwise_quant(weight.clone())
    same(int8_rows.quantize(weight).codes, int8)
    same(int8_rows.quantize(weight).absmax, rows)


def test_fp8_is_transformers():
    """Codes and scales of whole blocks, where the extra `peers` is there."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class Quantizer:
        class quantization_config:
            weight_block_size, scale_fmt = [128, 128], "float"

    for weight in (
        random(256, 384) * 0.02,
        random(128, 256).bfloat16(),
        torch.zeros(128, 128),
        random(128, 128) * 1e30,
    ):
        parts = fp8.Fp8Quantize(Quantizer)._quantize_one("a.weight", weight)
        found = fp8_blocks.quantize(weight)
        same(found.codes.view(torch.uint8), parts["a.weight"].view(torch.uint8))
        same(found.scales, parts["a.weight_scale_inv"])
        wide = fp8.Fp8Dequantize(Quantizer)._dequantize_one(found.codes, found.scales, torch.float32)
        same(found.weight_as(torch.float32), wide)


def group(form, bias: bool = True) -> tuple[Tensor, list[Projection]]:
    """x and three projections with quantised weights, whose adapters are to be trained."""
    generator = torch.Generator().manual_seed(6)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = []
    for j, n in enumerate((64, 24, 40)):
        adapter = Adapter(randn(4, 72).requires_grad_(), randn(n, 4).requires_grad_(), 1.5, 0.2, DropoutKey(7, 3, 1, j))
        made.append(Projection(form.quantize(randn(n, 72)), randn(n) if bias and j else None, adapter))
    return randn(21, 72), made


def plain(projections: list[Projection], dtype: torch.dtype) -> list[Projection]:
    return [p._replace(weight=weight_as(p.weight, dtype)) for p in projections]


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_with_adapters_are_those_of_the_weight_that_is_read(form, dtype: torch.dtype):
    """Outputs and all gradients, bit for bit but for the rounding of one product in place of three."""
    x, quantised = group(form)
    results = []
    for projections in (quantised, plain(quantised, dtype)):
        leaf = x.to(dtype).requires_grad_()
        ys = lora_linear_group(leaf, projections)
        trained = [t for p in projections if p.adapter for t in p.adapter[:2]]
        loss = torch.stack([y.float().square().sum() for y in ys]).sum()
        results.append([*ys, *torch.autograd.grad(loss, [leaf, *trained])])
    for ours, wanted in zip(*results, strict=True):
        assert ours.dtype == wanted.dtype
        assert (ours - wanted).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * wanted.norm()


@every_format
@pytest.mark.parametrize("rows", [1, 3, 21])
def test_without_a_gradient_too(form, rows: int):
    x, quantised = group(form)
    with torch.inference_mode():
        for ours, wanted in zip(
            lora_linear_group(x[:rows], quantised), lora_linear_group_ref(x[:rows], quantised), strict=True
        ):
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-4)
        gate_up = quantised[:1] * 2
        assert torch.allclose(lora_swiglu(x[:rows], gate_up), lora_swiglu_ref(x[:rows], gate_up), rtol=1e-4, atol=1e-3)
        assert torch.allclose(
            lora_swiglu(x[:rows], quantised[:1]), lora_swiglu_ref(x[:rows], quantised[:1]), rtol=1e-4, atol=1e-3
        )


@every_format
def test_a_weight_beyond_one_piece_is_multiplied_by_rows(form, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frozen_linear, "WHOLE", 1000)
    monkeypatch.setattr(frozen_linear, "BLOCK_ROWS", 7)
    weight, x, bias = form.quantize(random(30, 40)), random(5, 40), random(1, 30)[0]
    wide = weight.weight_as(torch.float32)
    assert torch.allclose(frozen_linear.frozen_linear(x, weight, bias), x @ wide.T + bias, atol=1e-5)
    assert torch.allclose(
        frozen_linear.add_input_gradient(None, random(5, 30), weight), random(5, 30) @ wide, atol=1e-4
    )


@every_format
def test_on_a_gpu_all_weights_are_widened_into_the_same_memory(form, monkeypatch: pytest.MonkeyPatch):
    """As large as the largest, whatever WHOLE is; a group's weights are one matrix in it."""
    monkeypatch.setattr(frozen_linear, "_on_gpu", lambda weight: isinstance(weight, QuantizedWeight))
    monkeypatch.setattr(frozen_linear, "_memory", memory := {})
    monkeypatch.setattr(frozen_linear, "WHOLE", 0)
    small, large = form.quantize(random(6, 40)), form.quantize(random(30, 40))
    whole, x = stacked([small, large]), random(5, 40)
    assert isinstance(whole, QuantizedWeight)
    for weight, height in ((small, 6), (large, 30), (small, 30), (whole, 36), (large, 36)):
        wide = weight.weight_as(torch.float32)
        assert torch.equal(frozen_linear.frozen_linear(x, weight), torch.nn.functional.linear(x, wide))
        dy = random(5, weight.shape[0])
        assert torch.equal(frozen_linear.add_input_gradient(None, dy, weight), dy @ wide)
        assert [m.numel() for m in memory.values()] == [height * 40]


@every_format
def test_packed_weights_are_one_above_the_other(form):
    weights = [form.quantize(random(n, 40)) for n in (6, 1, 9)]
    whole = stacked(weights)
    assert whole is not None and whole.shape == (16, 40)
    wanted = torch.cat([w.weight_as(torch.float32) for w in weights])
    for rows in (None, slice(0, 3), slice(5, 8), slice(7, None), slice(2, 16)):
        same(weight_as(whole, torch.float32, rows), wanted if rows is None else wanted[rows])
    assert stacked([weights[0], random(6, 40)]) is None


@every_format
def test_a_weight_that_does_not_fit_is_refused(form):
    x, (first, *_) = group(form)
    with pytest.raises(ValueError, match=r"weight 0 is \[64, 72\]"):
        lora_linear_group(x[:, :70], [first])
