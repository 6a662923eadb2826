"""The operations with a wide product on the shadow memory: in bounds, without races, in any order, each argument moved once."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from oracle import upstream
from shadow import Launch, backwards, shadow, shuffled
from torch import Tensor

from minilora.kernels import cross_entropy, linear_cross_entropy, lora_linear_group, lora_swiglu

Call = Callable[[], list[Tensor]]  # makes the arguments, runs forward and backward, returns outputs and gradients


def group(tokens: int, k: int, ns: tuple[int, ...], r: int, p: float = 0.0) -> Call:
    def call() -> list[Tensor]:
        (x, frozen), _ = lora_linear_group.example(tokens, k, ns, r, torch.bfloat16, "cpu", p)
        x.requires_grad_()
        adapters = [q.adapter._replace(a=q.adapter.a.requires_grad_(), b=q.adapter.b.requires_grad_()) for q in frozen]
        projections = [q._replace(adapter=a) for q, a in zip(frozen, adapters, strict=True)]
        ys = lora_linear_group.lora_linear_group(x, projections)
        torch.autograd.backward(ys, [upstream(y) for y in ys])
        return [*ys, x.grad, *(t.grad for a in adapters for t in (a.a, a.b))]

    return call


def on_logits(rows: int, vocab: int, scale: float | None = None) -> Call:
    def call() -> list[Tensor]:
        logits, targets = cross_entropy.example(rows, vocab, torch.bfloat16)[0]
        logits.requires_grad_()
        given = None if scale is None else torch.tensor(scale)
        loss, _ = cross_entropy.cross_entropy(logits, targets, given)
        (loss * 3).backward()
        return [loss, logits.grad]

    return call


def of_a_head(rows: int, width: int, vocab: int) -> Call:
    def call() -> list[Tensor]:
        x, head, targets = linear_cross_entropy.example(rows, width, vocab, torch.bfloat16)[0]
        loss = linear_cross_entropy.linear_cross_entropy(x.requires_grad_(), head.requires_grad_(), targets, 20)
        loss.backward()
        return [loss, x.grad, head.grad]

    return call


def dual() -> list[Tensor]:
    x, projections = lora_swiglu.example(37, 40, 41, 5, torch.bfloat16)[0]
    return [lora_swiglu.lora_swiglu(x, projections)]


KERNELS = {
    "lora_narrow._low_kernel", "lora_narrow._gradients_kernel", "lora_narrow._a_gradient_kernel", "lora_narrow._sum_kernel",
    "lora_gemm._forward_kernel", "lora_gemm._input_gradient_kernel", "lora_gemm._single_pass_kernel",
    "lora_swiglu._dual_kernel", "cross_entropy._fwd_kernel", "cross_entropy._bwd_kernel", "cross_entropy._rescale_kernel",
    "linear_cross_entropy._logits_kernel", "linear_cross_entropy._softmax_kernel", "linear_cross_entropy._dhead_kernel",
}  # fmt: skip
CALLS = {  # two tiles of every size, the second ragged
    "lora_swiglu": dual,
    "lora_linear_group": group(37, 40, (41, 20), 5),
    "lora_linear_group dropout": group(37, 40, (41, 20), 5, 0.3),
    "lora_linear": group(37, 40, (41,), 5, 0.3),
    "lora_linear of two parts of a rank": group(37, 40, (33,), 20),
    "cross_entropy": on_logits(7, 9001),
    "cross_entropy scaled": on_logits(7, 9001, 0.5),
    "linear_cross_entropy": of_a_head(37, 70, 555),
}
LARGE = {
    "lora_linear_group": group(70, 100, (90, 41, 60), 5, 0.3),
    "lora_linear of a wide rank": group(70, 100, (90,), 70),
    "linear_cross_entropy": of_a_head(70, 90, 1111),
}
each = pytest.mark.parametrize("name", CALLS)


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
    """Bytes of all tensors of a launch, each once, though it may be given twice."""
    found = {(a.real, tuple(a.shape)): a.numel() * a.size for a in launch.arguments}
    return sum(found.values())


@pytest.mark.parametrize("call", [group(64, 96, (96, 32), 16), group(64, 96, (96,), 16, 0.3)], ids=["group", "one"])
def test_a_launch_moves_each_of_its_arguments_once(call: Call):
    """So bytes of a launch are those of its arguments, whatever their size, and bench/layer_bytes.py adds them up."""
    for launch in shadowed(call)[0]:
        assert launch.total() <= arguments_once(launch) <= 1.05 * launch.total(), launch.kernel
