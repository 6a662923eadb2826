"""Solutions of the exercises of docs/course, three a page, in order."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import minilora
from minilora.data import Example, pack
from minilora.tools.inspect_adapter import effective_rank, rank_for

DEMO = Path(minilora.__file__).parent / "demo" / "mini"
RNG = np.random.default_rng(0)
T, K, N, R, S = 4, 6, 5, 2, 2.0


def step(s: float = S, zero_b: bool = False) -> dict[str, np.ndarray]:
    """x, W, A, B, a target, and the gradients of page 2."""
    rng = np.random.default_rng(1)
    v = {
        "x": rng.normal(size=(T, K)),
        "W": rng.normal(size=(N, K)),
        "A": rng.normal(size=(R, K)),
        "B": rng.normal(size=(N, R)),
    }
    v["target"] = rng.normal(size=(T, N))
    v["B"] *= not zero_b
    v["S"] = v["x"] @ v["A"].T
    v["y"] = v["x"] @ v["W"].T + s * v["S"] @ v["B"].T
    v["dY"] = 2 * (v["y"] - v["target"])
    v["dS"] = s * v["dY"] @ v["B"]
    v["dB"] = s * v["dY"].T @ v["S"]
    v["dA"] = v["dS"].T @ v["x"]
    v["dX"] = v["dY"] @ v["W"] + v["dS"] @ v["A"]
    return v


def test_1_1_numbers_of_rank_16_on_a_7b():
    shapes = [(3584, 3584)] * 2 + [(512, 3584)] * 2 + [(18944, 3584)] * 2 + [(3584, 18944)]
    assert 28 * 16 * sum(n + k for n, k in shapes) == 40_370_176


def test_1_2_both_at_zero_never_learn_and_both_at_random_do_not_start_from_the_base():
    v = step()
    dY = v["dY"]
    A, B = np.zeros((R, K)), np.zeros((N, R))
    assert not (S * (dY @ B).T @ v["x"]).any() and not (S * dY.T @ (v["x"] @ A.T)).any()
    assert np.abs(v["y"] - v["x"] @ v["W"].T).max() > 0.1


def test_1_3_doubling_alpha_and_r():
    def scale(alpha: int, r: int) -> float:
        return alpha / r

    assert scale(32, 16) == scale(64, 32) and 32 * (K + N) == 2 * 16 * (K + N)


def test_2_1_one_number_of_db_by_finite_differences():
    v, h = step(), 1e-6

    def loss(b: float) -> float:
        B = v["B"].copy()
        B[2, 1] += b
        return float(((v["x"] @ v["W"].T + S * v["S"] @ B.T - v["target"]) ** 2).sum())

    assert (loss(h) - loss(-h)) / (2 * h) == pytest.approx(v["dB"][2, 1], rel=1e-6)


def test_2_2_in_the_first_step_only_b_learns():
    v = step(zero_b=True)
    assert not v["dS"].any() and not v["dA"].any()
    assert v["dB"].any() and v["dX"].any()  # A learns from the second step on


def test_2_3_what_doubling_s_does():
    moved = {}
    for s in (S, 2 * S):
        trained, fresh = step(s), step(s, zero_b=True)
        # the same gradient of y, which the layers above give
        dA = (s * fresh["dY"] @ trained["B"]).T @ trained["x"]
        dB = s * fresh["dY"].T @ fresh["S"]
        lr = 1e-3
        moved[s] = s * trained["x"] @ (-lr * dA).T @ trained["B"].T, s * fresh["S"] @ (-lr * dB).T
    assert np.allclose(moved[2 * S][1], 4 * moved[S][1])
    # of A, too, s stands in the gradient and in y: also four times; only under AdamW, whose step is lr, it is twice
    assert np.allclose(moved[2 * S][0], 4 * moved[S][0])


def test_3_1_merging_before_each_step():
    tokens, k, n, r = 2048, 3584, 3584, 16
    merging, ours = 2 * n * k * r, 2 * tokens * r * (k + n)
    assert merging / ours == pytest.approx(n * k / (tokens * (n + k))) and merging < ours
    # but dA and dB would come from dW = dY^T x, [N, K], which costs as much as the layer, and has to be kept
    assert 2 * tokens * n * k > 50 * 2 * tokens * r * (k + n) / 2


def test_3_2_bytes_of_masks_that_are_kept():
    widths = [3584] * 6 + [18944]
    assert 28 * 8192 * sum(widths) == 9_277_800_448


def test_3_3_dx_without_b_a():
    v = step()
    assert np.allclose(v["dX"], v["dY"] @ (v["W"] + S * v["B"] @ v["A"]))


def test_4_1_the_gradient_of_a_row():
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5], requires_grad=True)
    F.cross_entropy(logits[None], torch.tensor([2])).backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, logits.detach().softmax(0) - torch.tensor([0.0, 0, 1, 0]))


def test_4_2_memory_of_a_chunk():
    assert 8192 / 512 == 16
    # from below: the head, [V, D], is read once for each chunk, whatever its rows
    rows, d, flops_a_byte = 512, 896, 100
    assert (
        2 * rows * d / (2 * d) >= flops_a_byte
    )  # enough rows that arithmetic, and not reading the head in bf16, takes the time


def test_4_3_logsumexp_by_the_maximum():
    logits = torch.tensor([100.0, 99.0])
    assert logits.exp().sum().log().isinf()
    m = logits.max()
    assert (m + (logits - m).exp().sum().log()).item() == pytest.approx(100 + math.log(1 + math.exp(-1)))


def test_5_1_what_padding_wastes():
    lengths = np.random.default_rng(0).integers(20, 501, size=1000)

    def wasted(rows: np.ndarray) -> float:
        padded = sum(len(part) * part.max() for part in np.array_split(rows, 125))
        return 1 - rows.sum() / padded

    assert 0.35 < wasted(lengths) < 0.5
    assert wasted(np.sort(lengths)) < 0.02  # but then a batch has rows of one length alone


def test_5_2_first_fit():
    rows = [Example(np.zeros(n, np.int64), np.full(n, -100), "") for n in (5, 3, 4, 2)]
    found = [[b - a for a, b in pairwise(batch.documents.cu_seqlens)] for batch in pack(rows, 7)]
    assert found == [[5, 2], [3, 4]]


def test_5_3_positions_that_go_on():
    """RoPE depends on distances alone, so that within its document a row computes the same wherever it begins."""
    model = minilora.load_model(DEMO, torch.float64)
    ids = torch.tensor([31, 32, 33, 34])
    from dataclasses import replace

    from minilora.models.stream import Documents

    documents = Documents.of([4])
    moved = replace(documents, positions=documents.positions + 5)
    logits, shifted = (model.to_logits(model(ids, d)) for d in (documents, moved))
    assert torch.allclose(logits, shifted, atol=1e-10)  # not at all: what matters is that attention stays inside


def test_6_1_a_planted_rank():
    A, B = torch.randn(8, 40), torch.randn(30, 8)
    B[:, 3:] = 0
    s = torch.linalg.svdvals(B @ A)[:8]
    s[s < 1e-5 * s[0]] = 0
    assert effective_rank(s) <= 3.001 and rank_for(s, 0.99) <= 3


def test_6_2_eckart_and_young():
    dw = torch.randn(20, 30, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(dw, full_matrices=False)
    assert (dw - u[:, :2] * s[:2] @ vh[:2]).norm().item() == pytest.approx(s[2:].norm().item())


def test_6_3_the_same_change_from_other_matrices():
    A, B = torch.randn(3, 10, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    turn = torch.randn(3, 3, dtype=torch.float64)
    A2, B2 = torch.linalg.solve(turn, A), B @ turn
    assert torch.allclose(B2 @ A2, B @ A)
    # sizes, spectra and directions are of dW: equal. How far A turned from its start asks for the space that A reads: equal, too
    q, q2 = (torch.linalg.qr(m.T)[0] for m in (A, A2))
    assert (q.T @ q2).square().sum().item() == pytest.approx(3)


def scores() -> tuple[np.ndarray, np.ndarray]:
    """a and b of page 7."""
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, size=200)
    return hard + rng.normal(0, 3, size=200), hard + 1.0 + rng.normal(0, 3, size=200)


def test_7_1_the_bootstrap_and_the_standard_error():
    a, _ = scores()
    means = a[np.random.default_rng(1).integers(0, 200, size=(4000, 200))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    assert (high - low) / 2 == pytest.approx(1.96 * a.std() / math.sqrt(200), rel=0.1)


def test_7_2_swapping_scores():
    a, b = scores()
    signs = np.random.default_rng(2).choice([-1, 1], size=(2000, 200))
    as_large = (np.abs((signs * (b - a)).mean(1)) >= abs((b - a).mean())).sum()
    assert (as_large + 1) / 2001 < 0.02


def test_7_3_how_many_seeds():
    wanted = next(n for n in range(1, 100) if 0.5 / math.sqrt(2 / n) >= 2)
    assert wanted == 32
