"""Which kernels an operation takes on which card, by the launches that it makes on tensors without data."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.proof.launches import Launch, recorded
from minilora.kernels import dispatch, linear_cross_entropy
from minilora.kernels.dispatch import architecture, compile_for, use_gemm
from minilora.kernels.lora_experts import example, lora_experts
from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.projection import Adapter, Projection
from minilora.machine.kernel_paths import _why_not

SINGLE, TWO = ["_single_pass_kernel"], ["_shrink_kernel", "_forward_kernel"]
cards = pytest.mark.parametrize("card", [80, 90])


def plan(card: int, k: int, *ns: int, r: int = 16, p: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """The kernels of a forward."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    projections = [Projection(empty(n, k, dtype=dtype), None, Adapter(empty(r, k), empty(n, r), 2.0, p)) for n in ns]
    with recorded(card) as launches:
        lora_linear_group(empty(8192, k, dtype=dtype), projections)
    return [launch.name.partition(".")[2] for launch in launches]


@pytest.mark.parametrize("capability, named", [((8, 0), 80), ((8, 6), 86), ((9, 0), 90), ((10, 3), 103)])
def test_a_card_is_called_by_its_compute_capability(
    capability: tuple[int, int], named: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dispatch, "capability", lambda _: capability)
    assert architecture(torch.device("cuda")) == named
    with compile_for(80):
        assert architecture(torch.device("cuda")) == 80
    assert architecture(torch.device("cuda")) == named


@pytest.mark.parametrize("capability, runs", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_older_than_sm_80_runs_pytorch_s_operations_and_the_header_says_why(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dispatch, "capability", lambda _: capability)
    gpu: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    assert dispatch.use_triton(gpu) == runs
    says_why = f"a GPU of sm_{10 * capability[0] + capability[1]}: the kernels are for sm_80 and later"
    assert (_why_not(gpu) == says_why) != runs


@cards
@pytest.mark.parametrize("n", [128, 256])
def test_a_narrow_layer_alone_reads_its_input_once(card: int, n: int):
    assert plan(card, 3584, n) == SINGLE


@cards
@pytest.mark.parametrize("n", [512, 896, 3584, 18944])
def test_bytes_are_not_bought_with_operations(card: int, n: int):
    """S once a tile of columns would be 12.5 % more of them."""
    assert plan(card, 3584, n) == TWO


@cards
@pytest.mark.parametrize("form", [{"r": 64}, {"p": 0.1}])
def test_a_narrow_layer_whose_s_is_dear_makes_it_apart(card: int, form: dict):
    assert plan(card, 3584, 256, **form) == TWO


@cards
def test_a_group_reads_its_input_once_for_all_s(card: int):
    assert plan(card, 3584, 128, 128) == TWO


@cards
@pytest.mark.parametrize("k, ns", [(899, (3584,)), (3584, (3584, 131)), (3592, (3584,))])
def test_widths_that_are_not_in_sixteens_go_to_the_library(card: int, k: int, ns: tuple[int, ...]):
    assert plan(card, k, *ns) == []


@cards
def test_so_do_32_bits_and_what_is_asked_to(card: int):
    assert plan(card, 3584, 3584, dtype=torch.float32) == []
    with use_gemm("library"):
        assert plan(card, 3584, 3584) == ["_shrink_kernel"]


def experts(
    card: int, experts: int, d: int = 2048, f: int = 768, adapted: bool = True, **form: Any
) -> list[list[Launch]]:
    """The launches of a mixture's forward and backward, 8 experts a token."""
    x, w, routing, *linears = example(4099, d, f, experts, 8, 16, torch.bfloat16, "meta", **form)[0]
    gate_up, down = (p if adapted else p._replace(adapter=None) for p in linears)
    trained = [t.requires_grad_() for p in (gate_up, down) if p.adapter for t in (p.adapter.a, p.adapter.b)]
    with recorded(card) as launches:
        y = lora_experts(x.requires_grad_(), w.requires_grad_(), routing, gate_up, down)
        there = len(launches)
        y.backward(torch.empty_like(y))
    assert all(t.grad is not None for t in trained)
    return [launches[:there], launches[there:]]


@cards
@pytest.mark.parametrize("count", [8, 128])
def test_a_mixture_launches_as_many_kernels_for_any_number_of_experts(card: int, count: int):
    both = [[launch.name for launch in some] for some in experts(card, count)]
    columns, slots = "expert_shrink._over_columns_kernel", "expert_shrink._over_slots_kernel"
    y, dx = "expert_gemm._forward_kernel", "expert_gemm._input_gradient_kernel"
    assert both == [
        ["expert_tiles._tiles_kernel", columns, y, "swiglu._fwd_kernel", columns, y],
        [columns, dx, "expert_swiglu._backward_kernel", slots, slots, columns, slots, slots, dx],
    ]
    assert [len(some) for some in experts(card, count, p=0.1)] == [6, 9]
    assert [len(some) for some in experts(card, count, adapted=False)] == [4, 3]


@cards
def test_a_mixture_whose_widths_are_not_in_sixteens_goes_to_the_library(card: int):
    assert experts(card, 8, f=760) == [[], []] != experts(card, 8, f=768)


@cards
@pytest.mark.parametrize(
    "width, vocab, dtype, own",
    [
        (896, 4096, torch.bfloat16, True), (896, 4096, torch.float16, True), (904, 4096, torch.bfloat16, False),
        (896, 4099, torch.bfloat16, False), (896, 4096, torch.float32, False),
    ],
)  # fmt: skip
def test_linear_cross_entropy_by_its_sizes(card: int, width: int, vocab: int, dtype: torch.dtype, own: bool):
    """The logits are the library's where rows can't be copied asynchronously, or in 32 bits; a kernel's softmax follows."""
    (x, head, targets), _ = linear_cross_entropy.example(70, width, vocab, dtype, "meta")
    with recorded(card) as launches:
        linear_cross_entropy.linear_cross_entropy(x.requires_grad_(), head, targets)
    expected = ["_logits_kernel", "_softmax_kernel"] if own else ["_fwd_kernel"]
    assert [launch.name.partition(".")[2] for launch in launches] == expected
