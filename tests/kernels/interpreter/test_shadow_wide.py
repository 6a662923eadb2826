"""The operations with a wide product on the shadow memory: in bounds, without races, in any order, each argument moved once."""

from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from oracle import upstream
from shadow import Launch, backwards, shadow, shuffled
from torch import Tensor

from bench.proof import traffic
from minilora.kernels import (
    cross_entropy,
    fp8_blocks,
    fp8_rows,
    int8_rows,
    linear_cross_entropy,
    lora_experts,
    lora_linear,
    lora_mlp,
    lora_swiglu,
    nf4,
)
from minilora.kernels.dispatch import use_gemm

Call = Callable[[], list[Tensor]]  # makes the arguments, runs forward and backward, returns outputs and gradients


def gradients(*leaves: Tensor) -> list[Tensor]:
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(found) == len(leaves)
    return found


def group(tokens: int, k: int, ns: tuple[int, ...], r: int, p: float = 0.0, form: str = "triton") -> Call:
    def call() -> list[Tensor]:
        (x, frozen), _ = lora_linear.group_example(tokens, k, ns, r, torch.bfloat16, "cpu", p)
        x.requires_grad_()
        trained = [t.requires_grad_() for q in frozen if q.adapter for t in (q.adapter.a, q.adapter.b)]
        with use_gemm(form):
            ys = lora_linear.lora_linear_group(x, frozen)
        torch.autograd.backward(ys, [upstream(y) for y in ys])
        return [*ys, *gradients(x, *trained)]

    return call


def quantized(form: ModuleType, rows: int) -> Call:
    """Of a group whose second weight ends inside a tile."""

    def call() -> list[Tensor]:
        (x, projections), _ = lora_linear.group_example(rows, 192, (32, 5), 5, torch.bfloat16)
        frozen = [p._replace(weight=form.quantize(p.tensor)) for p in projections]
        x.requires_grad_()
        trained = [t.requires_grad_() for q in frozen if q.adapter for t in (q.adapter.a, q.adapter.b)]
        ys = lora_linear.lora_linear_group(x, frozen)
        torch.autograd.backward(ys, [upstream(y) for y in ys])
        return [*ys, *gradients(x, *trained)]

    return call


def widened() -> list[Tensor]:
    weight = torch.randn(40, 320)
    return [form.quantize(weight).weight_as(torch.bfloat16) for form in (nf4, int8_rows, fp8_blocks)]


def mlp(tokens: int, d: int, f: int, r: int, p: float = 0.0, joined: bool = False, down_adapted: bool = True) -> Call:
    def call() -> list[Tensor]:
        (x, gate_up, down), _ = lora_mlp.example(tokens, d, f, r, torch.bfloat16, "cpu", p, joined)
        down = down if down_adapted else down._replace(adapter=None)
        trained = [t.requires_grad_() for q in (*gate_up, down) if q.adapter for t in (q.adapter.a, q.adapter.b)]
        y = lora_mlp.lora_mlp(x.requires_grad_(), gate_up, down)
        y.backward(upstream(y))
        return [y, *gradients(x, *trained)]

    return call


def experts(tokens: int, d: int, f: int, r: int, p: float = 0.0, shared: bool = False) -> Call:
    def call() -> list[Tensor]:
        (x, w, routing, *linears), _ = lora_experts.example(tokens, d, f, 5, 2, r, torch.bfloat16, "cpu", p)
        first, last = (q.adapter for q in linears)
        assert first and last
        if shared:
            first, last = first._replace(a=first.a[:1]), last._replace(b=last.b[:1])
        trained = [t.requires_grad_() for t in (x, w, first.a, first.b, last.a, last.b)]
        gate_up, down = (q._replace(adapter=a) for q, a in zip(linears, (first, last), strict=True))
        y = lora_experts.lora_experts(x, w, routing, gate_up, down)
        y.backward(upstream(y))
        return [y, *gradients(*trained)]

    return call


def on_logits(rows: int, vocab: int, scale: float | None = None) -> Call:
    def call() -> list[Tensor]:
        logits, targets = cross_entropy.example(rows, vocab, torch.bfloat16)[0]
        logits.requires_grad_()
        given = None if scale is None else torch.tensor(scale)
        loss, _ = cross_entropy.cross_entropy(logits, targets, given)
        (loss * 3).backward()
        return [loss, *gradients(logits)]

    return call


def of_a_head(rows: int, width: int, vocab: int, chunk: int = 20) -> Call:
    def call() -> list[Tensor]:
        x, head, targets = linear_cross_entropy.example(rows, width, vocab, torch.bfloat16)[0]
        loss = linear_cross_entropy.linear_cross_entropy(x.requires_grad_(), head.requires_grad_(), targets, chunk)
        loss.backward()
        return [loss, *gradients(x, head)]

    return call


def in_fp8(rows: int, n: int) -> Call:
    def call() -> list[Tensor]:
        x = torch.randn(rows, n + 3).bfloat16()[:, :n]
        codes, scales = fp8_rows.by_rows(x, torch.rand(n, 1))
        return [codes.view(torch.uint8), scales]

    return call


def dual() -> list[Tensor]:
    x, projections = lora_swiglu.example(37, 40, 41, 5, torch.bfloat16)[0]
    return [lora_swiglu.lora_swiglu(x, projections)]


KERNELS = {
    "lora_shrink._shrink_kernel", "lora_shrink._expand_backward_kernel", "lora_shrink._shrink_backward_kernel", "lora_shrink._sum_kernel",
    "lora_gemm._forward_kernel", "lora_gemm._input_gradient_kernel", "lora_gemm._single_pass_kernel",
    "dequantize._widen_kernel", "wide_products._dropped_kernel", "lora_swiglu._dual_kernel",
    "swiglu._fwd_kernel", "swiglu._bwd_kernel", "swiglu_shrink._fwd_kernel", "swiglu_shrink._bwd_kernel",
    "cross_entropy._fwd_kernel", "cross_entropy._bwd_kernel", "cross_entropy._rescale_kernel",
    "linear_cross_entropy._logits_kernel", "linear_cross_entropy._softmax_kernel", "linear_cross_entropy._dhead_kernel",
    "fp8_rows._rows_kernel", "expert_tiles._tiles_kernel", "expert_gemm._forward_kernel", "expert_gemm._input_gradient_kernel",
    "expert_shrink._over_columns_kernel", "expert_shrink._over_slots_kernel", "expert_swiglu._backward_kernel",
}  # fmt: skip
CALLS = {  # two tiles of every size, the second ragged
    "lora_swiglu": dual,
    "lora_linear_group": group(37, 40, (41, 20), 5),
    "lora_linear_group dropout": group(37, 40, (41, 20), 5, 0.3),
    "lora_linear_group dropout, the library's GEMM": group(37, 40, (41, 20), 20, 0.3, "library"),
    "lora_linear_group without a mask over K": group(37, 64, (64, 32), 5),
    "lora_linear": group(37, 40, (41,), 5),
    "widened": widened,
    "nf4 weights": quantized(nf4, 19),
    "nf4 weights, few rows": quantized(nf4, 3),
    "int8 weights": quantized(int8_rows, 19),
    "fp8 weights": quantized(fp8_blocks, 19),
    "lora_linear of two parts of a rank": group(37, 40, (33,), 20),
    "lora_mlp": mlp(37, 20, 41, 5, 0.3),
    "lora_mlp without an adapter of down": mlp(5, 20, 2051, 5, down_adapted=False),
    "lora_mlp of two parts of a rank, joined": mlp(19, 20, 41, 20, joined=True),
    "lora_experts": experts(23, 20, 20, 5, 0.3),
    "lora_experts of two parts of a rank, shared": experts(5, 36, 20, 20, shared=True),
    "cross_entropy": on_logits(7, 9001),
    "cross_entropy scaled": on_logits(7, 9001, 0.5),
    "linear_cross_entropy": of_a_head(37, 70, 555),
    "fp8_rows": in_fp8(7, 1100),
    "linear_cross_entropy of two tiles of rows": of_a_head(37, 16, 70, 40),
}
LARGE = {
    "lora_linear_group": group(70, 100, (90, 41, 60), 5, 0.3),
    "lora_mlp": mlp(70, 60, 90, 20, 0.3),
    "lora_linear of a wide rank": group(70, 100, (90,), 70),
    "linear_cross_entropy": of_a_head(70, 90, 1111),
}
SLOW = "lora_mlp without an adapter of down"
each = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n == SLOW else n for n in CALLS])


@cache
def shadowed(call: Call) -> tuple[list[Launch], list[Tensor]]:
    torch.manual_seed(0)
    with shadow() as launches:
        return launches, call()


def prove(call: Call, order: Callable) -> None:
    launches, expected = shadowed(call)
    assert max(launch.programs for launch in launches) > 1
    assert [fault for launch in launches for fault in launch.faults()] == []
    torch.manual_seed(0)
    with shadow(order):
        found = call()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each
def test_nothing_outside_no_race_and_the_order_of_the_programs_changes_no_bit(name: str):
    prove(CALLS[name], shuffled)


def test_every_kernel_is_launched():
    assert {launch.kernel for call in CALLS.values() for launch in shadowed(call)[0]} == KERNELS


@pytest.mark.long
@pytest.mark.parametrize("order", [backwards, shuffled])
@pytest.mark.parametrize("name", LARGE)
def test_the_same_of_larger_sizes(name: str, order: Callable):
    prove(LARGE[name], order)


def arguments_once(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each once, though it may be given twice; not what stands for keys where there are none."""
    given = [a for a in launch.arguments if a.dtype == torch.int64 or not a.name.startswith("seed_ptrs")]
    return sum({(a.real, tuple(a.shape)): a.numel() * a.size for a in given}.values())


@pytest.mark.parametrize(
    "call",
    [group(64, 96, (96, 32), 16), group(64, 96, (96,), 16, 0.3), mlp(64, 96, 128, 16), in_fp8(64, 1024), widened],
    ids=["group", "one", "mlp", "fp8", "widened"],
)
def test_a_launch_moves_each_of_its_arguments_once(call: Call):
    """So bytes of a launch are those of its arguments, whatever their size, and bench/proof/layer_bytes.py adds them up."""
    for launch in shadowed(call)[0]:
        assert launch.total() <= arguments_once(launch) <= 1.05 * launch.total(), launch.kernel


def counted(launches: list[Launch], name: str) -> int:
    """Bytes of one argument over all launches."""
    return sum(sum(launch.bytes().get(name, (0, 0))) for launch in launches)


def test_a_linear_cross_entropy_moves_eight_bytes_a_logit_and_the_head_twice_a_chunk(monkeypatch: pytest.MonkeyPatch):
    rows, width, vocab, chunk = 64, 96, 1024, 32
    tile = linear_cross_entropy.TILE_INTERPRETED
    products = []
    mm = torch.mm

    def recorded(p: Tensor, head: Tensor, out: Tensor) -> Tensor:
        products.append((p, head, out))
        return mm(p, head, out=out)

    monkeypatch.setattr(torch, "mm", recorded)
    x, head, targets = linear_cross_entropy.example(rows, width, vocab, torch.bfloat16)[0]
    with shadow() as launches:
        linear_cross_entropy.linear_cross_entropy(x.requires_grad_(), head, targets, chunk)
    p, heads, outs = (sum(t.numel() * t.element_size() for t in ts) for ts in zip(*products, strict=True))
    assert counted(launches, "logits_ptr") + p == 8 * rows * vocab
    first = [launch for launch in launches if launch.kernel == "linear_cross_entropy._logits_kernel"]
    chunks = rows // chunk
    assert counted(first, "head_ptr") == heads == chunks * head.numel() * head.element_size()
    assert all(launch.loads()["logits_ptr"] <= 1 for launch in launches)
    parts = 2 * -(-vocab // tile.columns)
    formula = traffic.linear_cross_entropy(rows, width, vocab, chunk, parts)["minilora"].bytes
    assert sum(launch.total() for launch in launches) + p + heads + outs <= formula
    assert formula <= 1.02 * (sum(launch.total() for launch in launches) + p + heads + outs)


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_a_cross_entropy_whose_scale_is_known_reads_and_writes_each_logit_once(scale: float):
    (logits, targets), cost = cross_entropy.example(8, 9001, torch.bfloat16)
    with shadow() as launches:
        loss, _ = cross_entropy.cross_entropy(logits.requires_grad_(), targets, torch.tensor(scale))
        loss.backward()
    kept, all_rows = cost["bytes"], logits.numel() * logits.element_size()
    assert sum(launch.total() for launch in launches) == pytest.approx(kept + all_rows, rel=2e-3)


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_a_cross_entropy_moves_what_its_example_says(scale: float):
    (logits, targets), cost = cross_entropy.example(8, 9001, torch.bfloat16)
    with shadow() as launches:
        loss, _ = cross_entropy.cross_entropy(logits.requires_grad_(), targets)
        (loss * scale).backward()
    least = cost["bytes"] + cost["backward_bytes"]
    assert least <= sum(launch.total() for launch in launches) <= 1.002 * least
