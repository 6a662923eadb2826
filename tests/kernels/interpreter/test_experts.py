"""The kernels of the experts of a mixture, on the interpreter: against the specification, and what an empty expert costs."""

# pyright: reportOptionalMemberAccess=false

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import check_op, run, upstream
from shadow import shadow
from test_far import APART, ROWS, WIDTH, last_program
from test_row_kernels import guarded, in_nan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.kernels import expert_gemm, fp8_blocks, int8_rows, nf4
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.expert_tiles import DOWN, GATE_UP, Stack, Tiles
from minilora.kernels.group import Place
from minilora.kernels.lora_experts import Routing, lora_experts, lora_experts_ref
from minilora.kernels.projection import Adapter, Projection

T, D, F, E, K = 37, 20, 12, 6, 2
P = 0.2  # 1 / (1 - p) is exact in fp32, which a kernel's numbers are
TRAINED = (0, 1, 3, 4, 6, 7)
OWN, OUTER, SHARED = (E, E, E, E), (1, E, E, 1), (1, 1, 1, 1)  # how many A and B gate_up and down have


def tensors(
    dtype: torch.dtype = torch.float32,
    tokens: int = T,
    d: int = D,
    f: int = F,
    r: int = 3,
    stacks: tuple[int, ...] = OWN,
) -> list[Tensor]:
    """x, w, and of gate_up and of down the weight, A and B."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    a1, b1, a2, b2 = stacks
    wide = torch.promote_types(dtype, torch.float32)
    return [
        random(tokens, d).to(dtype), random(tokens, K).softmax(-1).to(wide),
        (random(E * 2 * f, d) * d**-0.5).to(dtype), (random(a1, r, d) * d**-0.5).to(wide), random(b1, 2 * f, r).to(wide),
        (random(E * d, f) * f**-0.5).to(dtype), (random(a2, r, f) * f**-0.5).to(wide), random(b2, d, r).to(wide),
    ]  # fmt: skip


def routing(tokens: int) -> Routing:
    """Every token to expert 4, so that it has more than a tile of slots, and to one of 0, 1 and 3: 2 and 5 have none."""
    others = torch.tensor([0, 3, 1, 0]).take(torch.arange(tokens) % 4)
    index = torch.stack((others, torch.full((tokens,), 4)), 1)
    index[1::2] = index[1::2].flip(1)
    return Routing.of(index, E)


def op(function: Callable, p: float = 0.0) -> Callable:
    def call(x: Tensor, w: Tensor, w1: Any, a1: Any, b1: Any, w2: Any, a2: Any, b2: Any) -> Tensor:
        first, last = (
            None if a is None else Adapter(a, b, 1.75, p, DropoutKey(0, 1, 2, j))
            for j, (a, b) in enumerate(((a1, b1), (a2, b2)))
        )
        return function(x, w, routing(len(x)), Projection(w1, None, first), Projection(w2, None, last))

    return call


def leaves_and_grads(args: list[Any], p: float = 0.0, trained: tuple[int, ...] = TRAINED) -> list[Tensor]:
    return run(op(lora_experts, p), args, trained, upstream(torch.empty_like(args[0])))


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "dtype, tokens, stacks, r, p",
    [
        (torch.float32, T, OWN, 3, P), (torch.float32, 9, OUTER, 20, P), (torch.float32, 9, SHARED, 3, 0.0),
        (torch.bfloat16, 9, OWN, 3, P),
    ],
)  # fmt: skip
def test_the_rule_within_fences(dtype: torch.dtype, tokens: int, stacks: tuple[int, ...], r: int, p: float):
    with guarded() as wholes:
        check_op(op(lora_experts, p), op(lora_experts_ref, p), tensors(dtype, tokens, r=r, stacks=stacks), TRAINED)
    assert wholes


@pytest.mark.parametrize("trained, left_out", [((0, 1), (3, 4, 6, 7)), ((3, 4), (6, 7)), ((0, 6), (3, 4))])
def test_linears_without_adapters(trained: tuple[int, ...], left_out: tuple[int, ...]):
    args: list[Any] = [None if i in left_out else t for i, t in enumerate(tensors(tokens=5))]
    check_op(op(lora_experts), op(lora_experts_ref), args, trained)


@pytest.mark.parametrize("tokens", [1, 7])
def test_few_tokens_in_training_and_in_decoding(tokens: int):
    """Decoding takes tiles of few rows."""
    args = tensors(tokens=tokens)
    check_op(op(lora_experts), op(lora_experts_ref), args, (0, 1) if tokens > 1 else TRAINED)
    with torch.no_grad():
        check_op(op(lora_experts), op(lora_experts_ref), args, ())


class Seen(TorchDispatchMode):
    """The names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_second_call_gives_the_same_bits_and_none_waits_or_writes_an_input():
    args = tensors(tokens=5)
    before = [a.clone() for a in args]
    with Seen() as seen:
        together = leaves_and_grads(args, P)
    assert equal(leaves_and_grads(args, P), together)
    assert equal(leaves_and_grads(args, P, (4, 6)), [together[0], together[4], together[5]])
    assert equal(args, before)
    # for the values of these, or for how many they find, the host waits for a GPU
    assert not seen.names & {"_local_scalar_dense", "bincount", "nonzero", "masked_select", "index"}
    assert "searchsorted" in seen.names


def test_views_inside_nan():
    """Rows of x, of the weights and of dY that lie apart; A, B and w come without gaps."""
    args = tensors(tokens=5)
    dy = upstream(args[0])
    expected = run(op(lora_experts, P), args, TRAINED, dy)
    apart = [in_nan(a) if i in (0, 1, 2, 5) else a for i, a in enumerate(args)]
    assert equal(run(op(lora_experts, P), apart, TRAINED, in_nan(dy)), expected)


@pytest.mark.parametrize("form", [nf4, int8_rows, fp8_blocks], ids=lambda form: form.__name__.rpartition(".")[2])
def test_quantised_experts_have_the_bits_of_the_wide_ones(form: Any):
    args = tensors(d=64, f=64, tokens=3)
    quantised: list[Any] = [form.quantize(a) if i in (2, 5) else a for i, a in enumerate(args)]
    wide = [a.weight_as(torch.float32) if i in (2, 5) else a for i, a in enumerate(quantised)]
    found, expected = (leaves_and_grads(some, trained=(0,)) for some in (quantised, wide))
    assert equal(found, expected)


# tiles


@pytest.mark.parametrize("counts", [[0, 70, 0, 1, 32, 33, 0], [5], [0, 0, 1], [64] * 40])
def test_every_slot_is_in_one_tile(counts: list[int]):
    """Of its expert; no program more than any routing of so many slots needs, and those over have no rows."""
    slots, of_expert = sum(counts), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(0))
    r = Routing.of(of_expert[order].unflatten(0, (-1, 1)), len(counts))
    assert r.counts.tolist() == counts
    tiles = Tiles.of(r, Place.of(torch.empty(1)), False)
    assert tiles.starts.tolist() == [sum(counts[:e]) for e in range(len(counts) + 1)]
    rows = [(e, i) for e, first, end in tiles.table.tolist() for i in range(first, end)]
    assert sorted(i for _, i in rows) == list(range(slots))
    assert all(of_expert[i] == e for e, i in rows)
    assert all(end - first <= tiles.rows for _, first, end in tiles.table.tolist())
    most = min(len(counts), slots)
    assert len(tiles.table) == most + (slots - most) // tiles.rows


def test_an_expert_without_tokens_costs_nothing():
    """Its weights, A and B are never read, and its gradients are zeros."""
    with shadow() as launches:
        _, _, _, *gradients = leaves_and_grads(tensors(tokens=9))
    assert all(not g[e].any() and g[4].any() for g in gradients for e in (2, 5))
    read = 0
    for launch in launches:
        for x in launch.accesses:
            if x.argument.name in ("w_ptr", "factor_ptr", "a_ptr", "b_ptr"):
                each = x.argument.numel() // E
                assert not set(x.elements // each) & {2, 5}, f"{launch.kernel} {x.argument.name}"
                read += len(x.elements)
    assert read


# offsets beyond int32


def test_rows_far_apart():
    args = tensors(torch.float16, tokens=3)
    x = torch.empty(2 * APART + D, dtype=torch.float16).as_strided((3, D), (APART, 1)).copy_(args[0])
    assert equal(leaves_and_grads([x, *args[1:]], P, (3,)), leaves_and_grads(args, P, (3,)))


@pytest.fixture
def many() -> Tiles:
    """The tiles of 2^18 slots of one expert, of which only the last one is looked at."""
    tiles = torch.empty(ROWS // 32, 3, dtype=torch.int32)
    tiles[-1] = torch.tensor([0, ROWS - 32, ROWS])
    return Tiles(torch.arange(ROWS), 1, False, 32, tiles, torch.tensor([0, ROWS], dtype=torch.int32))


@pytest.mark.parametrize("rows", [GATE_UP, DOWN], ids=["gate_up", "down"])
def test_the_last_slots_of_large_outputs(rows: Any, many: Tiles):
    torch.manual_seed(0)
    x, s = torch.randn(1, 16).half().expand(ROWS, -1), torch.empty(ROWS, 16, dtype=torch.float16)
    s[-32:] = torch.randn(16).half()
    weight, a, b = torch.randn(WIDTH, 16).half(), torch.randn(1, 3, 16), torch.randn(1, WIDTH, 3)
    with last_program():
        y = expert_gemm.forward(x, s, None, Stack.of(Projection(weight, None, Adapter(a, b, 0.5)), 1, rows), many)
    truth = x[-1].double() @ weight.double().T + 0.5 * s[-1, :3].double() @ b[0].double().T
    torch.testing.assert_close(y[-1, -20:].double(), truth[-20:], rtol=2e-3, atol=1e-2)
    down = Adapter(b.mT.contiguous(), a.mT.contiguous(), 0.5)
    with last_program():
        dx = expert_gemm.input_gradient(x, s, Stack.of(Projection(weight.T, None, down), 1, rows), many)
    truth = x[-1].double() @ weight.double().T + s[-1, :3].double() @ b[0].double().T
    torch.testing.assert_close(dx[-1, -20:].double(), truth[-20:], rtol=2e-3, atol=1e-2)
