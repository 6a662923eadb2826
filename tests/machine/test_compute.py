"""A dtype to compute in that is not the dtype of storage: the choice with stubbed measurements, and what comes of it."""

from pathlib import Path

import pytest
import torch
from oracle import OWN, as_wrong_as, conversations, randomise, tiny
from tiny import make_model, make_rows
from torch import Tensor

from minilora import add_lora
from minilora.checkpoint.open_model import round_to_int8
from minilora.data import make_batch
from minilora.errors import UsageError
from minilora.evaluate import evaluate
from minilora.generate import generate
from minilora.kernels import frozen_linear as module
from minilora.kernels.frozen_linear import add_input_gradient, frozen_linear
from minilora.machine import compute
from minilora.machine.compute import Rates, choose
from minilora.machine.cpu import usable_cpus
from minilora.models.decoder import Decoder
from minilora.models.int8 import int8_product, levels, packed, to_int8
from minilora.models.moe import MoEConfig
from minilora.settings import read_yaml, resolve
from minilora.train import train

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
families = pytest.mark.parametrize("family", OWN)


def stub(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """A CPU whose 16-bit products run at `ratio` of fp32's speed."""
    rates = Rates(ratio * 1e11, 1e11)
    monkeypatch.setattr(compute, "measured_rates", lambda k, n, stored: rates)


@pytest.mark.parametrize(("ratio", "dtype"), [(0.13, FP32), (0.98, FP32), (1.9, BF16)])
def test_the_faster_dtype_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch, ratio: float, dtype: torch.dtype):
    stub(monkeypatch, ratio)
    chosen = choose(tiny("qwen2").config, BF16, CPU)
    assert chosen.dtype == dtype and f"{ratio:g}" in chosen.why
    assert ("weights stay in bf16" in chosen.why) == (dtype == FP32)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_what_is_asked_for_wins_and_the_better_one_is_named(monkeypatch: pytest.MonkeyPatch, asked: str):
    stub(monkeypatch, 0.1)
    chosen = choose(tiny("qwen2").config, BF16, CPU, asked)
    assert chosen.dtype == getattr(torch, asked)
    assert ("this machine would take float32" in chosen.why) == (asked == "bfloat16")


def test_nothing_is_measured_for_wide_weights_or_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "measured_rates", lambda *_: pytest.fail("measured"))
    c = tiny("qwen2").config
    assert choose(c, FP32, CPU).dtype == FP32 and choose(c, BF16, torch.device("cuda")).dtype == BF16


def test_the_measurement_measures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    rates = compute.measured_rates(48, 40, BF16)
    assert min(rates) > 0


@pytest.mark.parametrize(("ratio", "compute_", "other"), [(0.1, "float32", 3.0), (3.0, "bfloat16", 0.1)])
def test_a_run_keeps_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, ratio, compute_, other
):
    folder, rows = make_model(tmp_path / "model", BF16), make_rows(tmp_path / "rows.json")
    settings = {"model": folder, "data": rows, "output": tmp_path / "run", "max_steps": 2, "save_every": 1}
    stub(monkeypatch, ratio)
    train(resolve(settings))
    header = capsys.readouterr().out
    assert f"compute {compute_} on 1 thread: bf16 products run at {ratio:g}" in header.replace("3.0", "3")
    saved = read_yaml(tmp_path / "run" / "config.yaml")
    assert saved["compute"] == compute_ and saved["threads"] == 1
    stub(monkeypatch, other)  # another machine
    train(resolve(saved, {"max_steps": 2}), resume=True)
    said = capsys.readouterr().out
    assert f"compute {compute_} on 1 thread: as set for this run; this machine would take" in said
    assert "not bit for bit" not in said


@families
def test_a_loss_is_nearer_to_the_truth_than_in_the_dtype_of_storage(family: str):
    """Of a bf16 checkpoint: loss and adapter gradients, computed in fp32 and in bf16, against fp64."""

    def found(dtype: torch.dtype, computed: torch.dtype | None) -> tuple[Tensor, Tensor]:
        model = tiny(family, BF16)
        add_lora(model, r=3, alpha=6, seed=1)
        randomise(model)
        model = model.to(dtype) if dtype == torch.float64 else model
        model.compute = computed
        loss = model.train().loss(make_batch(conversations(family)))
        loss.backward()
        return loss.detach().double(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (truth, true_gradients), wide, narrow = found(torch.float64, None), found(BF16, FP32), found(BF16, None)
    far = [(float((loss - truth).abs()), float((g - true_gradients).norm())) for loss, g in (wide, narrow)]
    assert far[0][0] < far[1][0] / 10 and far[0][1] < far[1][1] / 10, far


@families
def test_it_is_the_model_with_its_weights_widened(family: str):
    """Storage changes memory, not what is computed: gradients are as wrong as those of the widened model, over a few models."""

    def gradients(model: Decoder, seed: int) -> Tensor:
        add_lora(model, r=3, alpha=6, seed=seed)
        randomise(model, seed)
        model = model.double() if model.head.dtype == torch.float64 else model
        model.train().loss(make_batch(conversations(family))).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wrong = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        stored, widened, exact = (tiny(family, BF16, seed) for _ in range(3))
        stored.compute = FP32
        models = stored, widened.float(), exact.double()
        ours, plain, truth = (gradients(model, seed).double() for model in models)
        wrong += torch.stack(((ours - truth).norm(), (plain - truth).norm()))
    assert wrong[0] <= 2 * wrong[1]


def test_a_weight_in_pieces_is_the_whole_weight(monkeypatch: pytest.MonkeyPatch):
    weight, bias, x = torch.randn(23, 7).bfloat16(), torch.randn(23).bfloat16(), torch.randn(9, 7)
    dy, whole = torch.randn(9, 23), frozen_linear(x, weight, bias)
    dx = add_input_gradient(torch.ones(9, 7), dy, weight)
    monkeypatch.setattr(module, "WHOLE", 10)
    monkeypatch.setattr(module, "BLOCK_ROWS", 5)
    truth = x.double() @ weight.double().T + bias.double()
    as_wrong_as(frozen_linear(x, weight, bias), whole, truth)
    as_wrong_as(add_input_gradient(torch.ones(9, 7), dy, weight), dx, 1 + dy.double() @ weight.double())


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64], ids=str)
def test_few_rows_without_a_gradient(rows: int, dtype: torch.dtype):
    """They go through the weight's own dtype; onednn is on again afterwards."""
    x, weight, bias = torch.randn(rows, 64).to(dtype), torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    before = torch.backends.mkldnn.enabled
    with torch.no_grad():
        y = frozen_linear(x, weight, bias)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    plain = torch.nn.functional.linear(x.bfloat16(), weight, bias)
    assert y.dtype == dtype and torch.backends.mkldnn.enabled == before
    as_wrong_as(y.bfloat16(), plain, truth)


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_with_a_bias_that_is_wide_already(rows: int):
    """As an adapter's operation gives it: the same numbers as with the bias as it is stored."""
    x, weight, bias = torch.randn(rows, 8), torch.randn(6, 8).bfloat16(), torch.randn(6).bfloat16()
    with torch.inference_mode():
        assert torch.equal(frozen_linear(x, weight, bias.float()), frozen_linear(x, weight, bias))


def answers(model: Decoder) -> list[int]:
    return list(generate(model, [5, 9, 2, 7], set(), 12))


def test_chat_and_evaluation_follow_it():
    model = tiny("qwen3", BF16)
    model.compute = FP32
    wide = tiny("qwen3", BF16).float()
    examples = conversations("qwen3")
    exact, ids = tiny("qwen3", BF16).double(), torch.tensor([5, 9, 2, 7, 1, 3])
    ours, plain, truth = (torch.tensor(evaluate(m, examples, 64).loss) for m in (model, wide, exact))
    as_wrong_as(ours, plain, truth)
    as_wrong_as(model.logits(ids), wide.logits(ids), exact.logits(ids))
    assert len(answers(model)) == 12


def test_an_fp16_checkpoint_keeps_its_digits_where_fp32_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from minilora.checkpoint.load import read_config
    from minilora.run.setup import dtypes

    c, config = read_config(make_model(tmp_path / "model", torch.float16)), resolve({})
    stub(monkeypatch, 0.1)
    assert dtypes(config, c, CPU) == (torch.float16, FP32)
    stub(monkeypatch, 2.0)
    assert dtypes(config, c, CPU) == (BF16, BF16)  # gradients would underflow in fp16


@pytest.mark.parametrize(("text", "cpus"), [("max 100000", 64), ("150000 100000", 2), ("100000 100000", 1), ("", 64)])
def test_a_control_group_limits_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cpus: int):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert usable_cpus(tmp_path) == cpus
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cpus(tmp_path) == 3


def rounded(t: Tensor) -> Tensor:
    """Each row to 8 bits of its largest value and back."""
    scale = t.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (t / scale).round() * scale


class TestInt8:
    def test_a_product(self):
        x, weight = torch.randn(6, 64) * torch.tensor([1, 100, 0.01, 1, 0, 3])[:, None], torch.randn(48, 64)
        y, truth = int8_product(x, packed(weight)), x.double() @ weight.double().T
        # half a step of each factor, over sums of 64: a row's error hangs on its own size alone
        step = x.abs().amax(1) / 127 * weight.norm() / 48**0.5 + x.norm(dim=1) * weight.abs().max() / levels()
        assert ((y - truth).abs().amax(1) <= 2 * step).all() and not y[4].any()
        alone = torch.cat([int8_product(row, packed(weight)) for row in x.split(1)])
        assert ((alone - truth).abs().amax(1) <= 2 * step).all()

    def test_a_mixture_is_refused(self):
        with pytest.raises(UsageError, match="takes no mixture"):
            round_to_int8(tiny("qwen3_moe"))

    @pytest.mark.parametrize("family", [f for f in OWN if not isinstance(tiny(f).config, MoEConfig)])
    def test_a_model(self, family: str):
        """Its hidden states are as wrong as where each product is rounded term by term, in plain torch."""
        model, int8, plain = tiny(family), tiny(family), tiny(family)
        to_int8(int8)
        for block in plain.blocks:
            for linear in [m for m in block.modules() if isinstance(m, torch.nn.Linear)]:
                linear.weight.data = rounded(linear.weight.data)
                linear.register_forward_pre_hook(lambda _, inputs: tuple(rounded(x) for x in inputs))
                linear.requires_grad_(True)  # so that no kernel takes it past the hook
        ids = conversations(family)[3]
        batch = make_batch([ids])
        with torch.no_grad():
            truth, ours, ref = (m(batch.ids, batch.documents) for m in (model, int8, plain))
        assert 0 < (ours - truth).norm() <= 2 * (ref - truth).norm()
        linears = [m for b in int8.blocks for m in b.modules() if isinstance(m, torch.nn.Linear)]
        assert not linears, "a linear was left out"
