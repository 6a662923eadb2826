"""Quantised weights in kernels, on the interpreter: W to the bit, and products in whose loop it is made."""

# pyright: reportOptionalMemberAccess=false

from collections.abc import Callable, Sequence

import pytest
import torch
from oracle import as_wrong_as, upstream
from shadow import shadow
from test_lora_linear import GROUPS, KEY, SCALES, P
from torch import Tensor

from minilora.kernels import dequantize, fp8_blocks, int8_rows, lora_gemm, nf4
from minilora.kernels.dispatch import kernels_enabled, use_gemm
from minilora.kernels.lora_linear import lora_linear_group, lora_linear_group_ref
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import QuantizedWeight, weight_as

FORMATS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "nf4": nf4.quantize, "nf4 plain scales": lambda w: nf4.quantize(w, nested=False),
    "int8": int8_rows.quantize, "fp8": fp8_blocks.quantize,
}  # fmt: skip
REFS = {"nf4": nf4.dequantize_ref, "int8": int8_rows.dequantize_ref, "fp8": fp8_blocks.dequantize_ref}
every_format = pytest.mark.parametrize("form", FORMATS)
GROUPS = {**GROUPS, "narrow": ((5,), (19,), (True,), P)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def reference(weight: QuantizedWeight) -> Tensor:
    return REFS[weight.name](weight)  # pyright: ignore[reportArgumentType]


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(128, 192), (16, 20), (3, 600)], ids=str)
def test_w_is_that_of_the_reference_to_the_bit(form: str, dtype: torch.dtype, shape: tuple[int, int]):
    """Of values from tiny to huge, whole and from a row on."""
    weight = FORMATS[form](torch.randn(shape) * 10.0 ** torch.randint(-6, 5, (shape[0], 1)))
    wanted = reference(weight).to(dtype)
    for rows in (slice(None), slice(1, 2), slice(shape[0] // 2 - 1, None)):
        with shadow() as launches:
            found = weight_as(weight, dtype, rows)
        assert found.equal(wanted[rows])
        flat = shape[1] * (rows.start or 0) % 64 == wanted[rows].numel() % 64 == 0
        assert len(launches) == (weight.numel() % 64 == 0 and flat or weight.name != "nf4")
        assert [fault for launch in launches for fault in launch.faults()] == []


def test_every_code_is_read_as_it_is_meant():
    """Negative zero and subnormals of FP8 too."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes.view(fp8_blocks.E4M3)[codes & 127 != 127].view(2, 127)
    eight = fp8_blocks.FP8Weight(finite, torch.tensor([[2.0**-9]]))
    assert weight_as(eight, torch.float32).view(torch.int32).equal((finite.float() * 2.0**-9).view(torch.int32))
    whole = int8_rows.Int8Weight(codes.view(torch.int8)[None], torch.tensor([127.0]))
    assert weight_as(whole, torch.float32).equal(codes.view(torch.int8).float()[None])
    pairs = nf4.NF4Weight((8, 64), codes, torch.ones(8))
    assert weight_as(pairs, torch.float32).equal(nf4.dequantize_ref(pairs))


def test_codes_further_away_than_int32():
    """The memory before them is never touched."""
    start, k = 2**20, 2064
    codes, absmax = torch.empty(start + 4, k, dtype=torch.int8), torch.empty(start + 4)
    weight = int8_rows.Int8Weight(codes, absmax)
    few = int8_rows.quantize(torch.randn(4, k))
    codes[start:], absmax[start:] = few.codes, few.absmax
    assert start * k > 2**31 and weight_as(weight, torch.float32, slice(start, None)).equal(reference(few))


def projections(form: str, name: str, dtype: torch.dtype, k: int) -> list[Projection]:
    ranks, ns, biases, p = GROUPS[name]
    made = []
    for j, (rank, n, bias) in enumerate(zip(ranks, ns, biases, strict=True)):
        weight = FORMATS[form](torch.randn(n, k) * k**-0.5)
        a, b = torch.randn(rank, k).requires_grad_(), torch.randn(n, rank).requires_grad_()
        adapter = Adapter(a, b, SCALES[j], p, KEY._replace(module=j)) if rank else None
        made.append(Projection(weight, torch.randn(n).to(dtype) if bias else None, adapter))
    return made


def widened(group: Sequence[Projection], dtype: torch.dtype, wide: bool = False) -> list[Projection]:
    """The same of the weights that the reference reads, in a dtype; all of it in fp64 if `wide`."""
    made = []
    for weight, bias, adapter in group:
        assert isinstance(weight, QuantizedWeight)
        w = reference(weight).to(dtype)
        if wide:
            w, bias = w.double(), None if bias is None else bias.double()
            a, b = (t.detach().double().requires_grad_() for t in adapter[:2]) if adapter else (None, None)
            adapter = adapter and adapter._replace(a=a, b=b)
        made.append(Projection(w, bias, adapter))
    return made


def both_ways(op: Callable, x: Tensor, group: Sequence[Projection]) -> list[Tensor]:
    """Outputs, dX, and dA and dB of every adapter."""
    x = x.detach().requires_grad_()
    ys = op(x, group)
    trained = [t for p in group if p.adapter for t in p.adapter[:2]]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *trained], [upstream(y) for y in ys])]


@every_format
@pytest.mark.parametrize("name, dtype", [("one without adapter", torch.float32), ("narrow", torch.bfloat16)], ids=str)
def test_products_with_w_made_in_their_loop(form: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """What the same kernels make of the wide W, to the bit; and of W in fp64 within the error of plain torch."""
    group, x = projections(form, name, dtype, 192), torch.randn(19, 192).to(dtype)
    monkeypatch.setattr(dequantize, "_widen_kernel", None)
    monkeypatch.setattr(lora_gemm, "single_pass_wins", lambda *_: False)
    found, same = (both_ways(lora_linear_group, x, given) for given in (group, widened(group, dtype)))
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    plain = both_ways(lora_linear_group_ref, x, widened(group, dtype))
    truth = both_ways(lora_linear_group_ref, x.double(), widened(group, dtype, wide=True))
    scale = max(float(t.abs().max()) for t in truth)
    for ours, yard, exact in zip(found, plain, truth, strict=True):
        as_wrong_as(ours, yard, exact, scale=scale)


@every_format
@pytest.mark.parametrize("adapted", [True, False])
def test_a_few_rows_by_their_own_tiles(form: str, adapted: bool):
    """As in decoding: without a gradient, and linears without adapters too."""
    group, x = projections(form, "qkv", torch.float32, 192), torch.randn(3, 192)
    if not adapted:
        group = [p._replace(adapter=None) for p in group]
    with torch.no_grad(), shadow() as launches:
        found = lora_linear_group(x, group)
    assert [fault for launch in launches for fault in launch.faults()] == []
    names = [launch.kernel for launch in launches]
    assert names[-1] == "lora_gemm._forward_kernel" and "dequantize._widen_kernel" not in names
    plain = lora_linear_group_ref(x, widened(group, torch.float32))
    truth = lora_linear_group_ref(x.double(), widened(group, torch.float32, wide=True))
    for ours, yard, exact in zip(found, plain, truth, strict=True):
        as_wrong_as(ours.detach(), yard.detach(), exact.detach())


@pytest.mark.parametrize("form, bits", [("nf4", 4), ("int8", 8), ("fp8", 8)])
def test_codes_are_read_and_no_wide_copy_is(form: str, bits: int):
    """Each code once a launch, forward and backward; the scales and tables of so small a W are a quarter; nothing else is as large as W."""
    group, x = projections(form, "narrow", torch.bfloat16, 128), torch.randn(17, 128).bfloat16()
    with shadow() as launches:
        both_ways(lora_linear_group, x, group)
    weight, products = group[0].weight, [launch for launch in launches if launch.kernel.startswith("lora_gemm.")]
    assert len(products) == 2
    for launch in products:
        moved = launch.bytes()
        assert moved["w_ptrs[0]"] == (weight.numel() * bits // 8, 0)
        assert sum(moved[name][0] for name in moved if name.startswith("scale_ptrs")) <= 0.25 * moved["w_ptrs[0]"][0]
        others = [a for a in launch.arguments if not a.name.startswith("w_ptrs")]
        assert max(a.numel() for a in others) < weight.numel()


def kernels_of(rows: int, form: str, k: int = 64) -> list[str]:
    group, x = projections(form, "qkv", torch.float32, k), torch.randn(rows, k)
    with torch.no_grad(), shadow() as launches:
        lora_linear_group(x, group)
    return [launch.kernel.partition(".")[2] for launch in launches]


@pytest.mark.parametrize("form", REFS)
def test_many_rows_go_by_two_steps(form: str, monkeypatch: pytest.MonkeyPatch):
    assert kernels_of(20, form)[-1] == "_forward_kernel"
    monkeypatch.setattr(dequantize, "ROWS_IN_THE_LOOP", 19)
    assert kernels_of(20, form) == ["_shrink_kernel", "_sum_kernel", *["_widen_kernel"] * 3]
    with kernels_enabled(False):
        assert kernels_of(3, form) == []


@pytest.mark.parametrize("form", REFS)
def test_two_steps_are_the_librarys_products_of_the_wide_w(form: str, monkeypatch: pytest.MonkeyPatch):
    """Gradients too, under dropout."""
    group, x = projections(form, "qkv dropped", torch.float32, 64), torch.randn(20, 64)
    monkeypatch.setattr(dequantize, "ROWS_IN_THE_LOOP", 19)
    with use_gemm("library"):
        found, same = (both_ways(lora_linear_group, x, given) for given in (group, widened(group, torch.float32)))
    for ours, wide in zip(found, same, strict=True):
        assert (ours - wide).norm() <= 1e-6 * wide.norm()


def test_what_no_loop_reads():
    """Rows of NF4 that end inside a block, and weights of several formats."""
    assert "_forward_kernel" not in kernels_of(3, "nf4", 48) and kernels_of(3, "fp8", 48)[-1] == "_forward_kernel"
    assert dequantize.in_the_loop(1, 64, {"nf4"}) and not dequantize.in_the_loop(1, 64, {"nf4", "int8"})
    assert not dequantize.in_the_loop(1, 64, {dequantize.WIDE}) and not dequantize.in_the_loop(1, 64, {""})
