"""The choice of a form of GEMM for every product: by a timer that is given, kept with the run, and what augmented models can do."""

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from oracle import OWN, SOP, tiny
from tiny import make_model, make_rows

from minilora import add_lora, load_model, save_model
from minilora.adapted import merge
from minilora.console import Console
from minilora.data import Example, make_batch
from minilora.kernels.augmented import AugmentedWeight
from minilora.kernels.dispatch import Timed, use_gemm
from minilora.lora import adapters
from minilora.machine import gemm
from minilora.models.stream import Documents
from minilora.run.setup import optimizer_of
from minilora.settings import resolve
from minilora.train import train, train_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", torch.float32)


def model_of(folder: Path, targets: str = "all-linear", dropout: float = 0.0):
    model = load_model(folder, device="cpu")
    add_lora(model, targets, r=4, dropout=dropout)
    return model.train()


def by(times: dict[str, float]):
    """A timer that calls what it is given and takes these times for it."""
    seen: list[set[str]] = []

    def seconds(functions: gemm.Functions) -> dict[str, float]:
        seen.append(set(functions))
        for function in functions.values():
            function()
        return {form: times[form] for form in functions}

    return seconds, seen


@pytest.mark.parametrize(
    "times, form",
    [
        ({"library": 1.0, "augmented": 0.98}, "library"), ({"library": 1.0, "augmented": 0.96}, "augmented"),
        ({"library": 1.0, "augmented": 0.9, "triton": 0.8}, "triton"), ({"library": 1.0}, "library"),
    ],
)  # fmt: skip
def test_it_is_the_library_unless_another_is_over_3_percent_faster(times: dict[str, float], form: str):
    assert gemm.fastest(times) == Timed(form, times)


def test_every_distinct_product_is_timed_once_in_the_forms_that_it_has(folder):
    model = model_of(folder, "q_proj,down_proj")
    seconds, seen = by({"library": 2.0, "augmented": 1.0})
    found = gemm.measured(model, 16, seconds)
    width, ffn, vocab = model.config.width, model.config.ffn, model.config.vocab
    qkv = tuple(p.weight.shape[0] for p in next(gemm.groups(model)).projections)
    expected = [(what, width, qkv, (4, 0, 0)) for what in ("y", "dx")] + [
        (what, ffn, (width,), (4,)) for what in ("y", "dx")
    ]
    assert list(found) == [*expected, ("logits", width, vocab)]
    assert seen == [{"library", "augmented"}] * 4 + [{"library"}]
    assert [timed.form for timed in found.values()] == ["augmented"] * 4 + ["library"]


def test_what_was_measured_is_read_back_on_the_same_machine_alone(tmp_path, monkeypatch):
    chosen = {
        ("y", 8, (16, 4), (2, 0)): Timed("augmented", {"library": 2.0, "augmented": 1.0}),
        ("logits", 8, 61): Timed("library", {"library": 1.0}),
    }
    with use_gemm(chosen):
        gemm.write_choice(tmp_path / "gemm.json", CPU)
        text = gemm.forms_text()
    assert gemm.read_choice(tmp_path / "gemm.json", CPU) == chosen
    assert text == "y-8-16+4-2+0:augmented logits-8-61:library"
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert gemm.read_choice(tmp_path / "gemm.json", CPU) is None
    assert gemm.read_choice(tmp_path / "none", CPU) is None


def test_the_header_says_the_form_and_how_much_longer_the_others_took(folder):
    model = model_of(folder)
    seconds, _ = by({"library": 1.1, "augmented": 1.0})
    with use_gemm({}):
        assert gemm.gemm_lines(model) == []
    with use_gemm(gemm.measured(model, 16, seconds)):
        lines = gemm.gemm_lines(model)
    both = "y augmented (library 1.10x), dX augmented (library 1.10x)"
    assert lines == [*(f"{name}: {both}" for name in ("q/k/v", "o", "gate/up", "down")), "logits library"]
    with use_gemm("augmented"):
        assert gemm.gemm_lines(model) == ["augmented for every product, as set for this run"]
        model.compute = torch.bfloat16
        assert gemm.gemm_lines(model)[0].endswith("library for q/k/v, o, gate/up, down, which cannot have it here")
    with use_gemm("triton"):
        assert "which cannot have it here" in gemm.gemm_lines(model)[0]  # no GPU


def losses(model, steps: int = 3) -> list[float]:
    batch = make_batch([Example(torch.arange(3, 40).numpy(), torch.arange(4, 41).numpy(), "row", None)])
    config = resolve({"lora_dropout": max(w.dropout for _, w in adapters(model))})
    optimizer = optimizer_of(model, config)
    return [train_step(model, optimizer, [batch], config, step).read()[0] for step in range(steps)]


@pytest.mark.parametrize("dropout, checkpointing", [(0.0, False), (0.2, False), (0.0, True)])
def test_an_augmented_model_trains_to_the_same_losses(folder, dropout, checkpointing):
    plain, other = model_of(folder, dropout=dropout), model_of(folder, dropout=dropout)
    other.checkpointing = checkpointing
    with use_gemm("augmented"):
        gemm.settle(other, 16)
        assert len(gemm.matrices(other)) == 4 * len(other.blocks)
        found = losses(other)
    assert found == pytest.approx(losses(plain), rel=1e-5) and found[2] < found[0]


@pytest.mark.parametrize("family", OWN)
def test_every_family_s_gradients(family):
    """Fused weights, packed ones, biases, linears of other names."""
    found = []
    for form in ("library", "augmented"):
        model = tiny(family)
        add_lora(model, r=4)
        for _, wrapper in adapters(model):
            torch.nn.init.normal_(wrapper.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
        with use_gemm(form):
            gemm.settle(model, 16)
            ids = torch.tensor([3, 1, 4, SOP, 5, 9])
            model(ids, Documents.of([6], [3] if family == "chatglm" else None)).square().sum().backward()
        assert (len(gemm.matrices(model)) > 0) == (form == "augmented")
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_quantised_weights_stay_the_library_s_and_the_header_says_so(folder):
    model = load_model(folder, device="cpu", quant="int8")
    add_lora(model, r=4)
    with use_gemm("augmented"):
        gemm.settle(model, 16)
        assert gemm.matrices(model) == []
        assert gemm.gemm_lines(model)[0].endswith("library for q/k/v, o, gate/up, down, which cannot have it here")


def test_settle_lays_out_what_was_chosen_alone(folder):
    model = model_of(folder)
    width, ffn = model.config.width, model.config.ffn
    with use_gemm({("dx", ffn, (width,), (4,)): Timed("augmented", {})}):
        gemm.settle(model, 16)
    augmented = {name for name, p in model.named_parameters() if isinstance(p, AugmentedWeight)}
    assert augmented == {f"model.layers.{i}.mlp.down_proj.base.weight" for i in range(len(model.blocks))}


def test_an_augmented_model_is_saved_merged_and_copied_as_any_other(folder, tmp_path):
    plain, other = model_of(folder), model_of(folder)
    with use_gemm("augmented"):
        gemm.settle(other, 16)
        ids = torch.arange(3, 20)
        torch.testing.assert_close(copy.deepcopy(other).logits(ids), plain.logits(ids))
    for number, model in enumerate((plain, other)):
        for _, wrapper in adapters(model):
            wrapper.lora_B.data.copy_(torch.ones_like(wrapper.lora_B) * 0.01)
        merge(model)
        save_model(model, tmp_path / str(number), folder)
    one, two = (load_model(tmp_path / name, device="cpu") for name in "01")
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_a_resumed_run_takes_the_forms_that_it_had(folder, tmp_path, monkeypatch):
    """On what stands for a GPU; another measurement would choose otherwise now, and the header tells which it took."""
    run, rows = tmp_path / "run", make_rows(tmp_path / "rows.json")
    config = {"model": str(folder), "data": str(rows), "output": str(run), "max_steps": 2, "save_every": 1, "lora_r": 4}
    times = {"library": 1.0, "augmented": 0.5}
    monkeypatch.setattr(gemm, "measures", lambda device: True)
    monkeypatch.setattr(gemm, "gpu_seconds", lambda functions, device: {form: times[form] for form in functions})

    def header(resume: bool) -> str:
        text = io.StringIO()
        train(resolve(config), resume, console=Console(file=text, width=200))
        return text.getvalue()

    first = header(resume=False)
    times["augmented"] = 2.0
    again = header(resume=True)
    assert "q/k/v: y augmented (library 2.00x)" in first and "q/k/v: y augmented (library 2.00x)" in again
    assert "not bit for bit" not in again
    kept = json.loads((run / "gemm.json").read_text())
    kept["machine"]["torch"] = "0.0"
    (run / "gemm.json").write_text(json.dumps(kept))
    other = header(resume=True)
    assert "q/k/v: y library (augmented 2.00x)" in other and "gemm was" in other


def test_a_gpu_is_timed_in_turn_and_without_the_warm_up(monkeypatch):
    """On a clock that stands for the GPU's: each function starts a round as often as any, and the median is that of the later rounds."""
    clock, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(gemm, "FLUSH", 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)

    def taking(name: str, milliseconds: float):
        def function() -> None:
            calls.append(name)
            clock[0] += milliseconds * (100 if calls.count(name) <= gemm.WARM else 1)

        return function

    found = gemm.gpu_seconds({"library": taking("library", 2.0), "triton": taking("triton", 3.0)}, CPU)
    assert found == pytest.approx({"library": 0.002, "triton": 0.003})
    assert calls == ["library", "triton", "triton", "library"] * ((gemm.WARM + gemm.ROUNDS) // 2) + [
        "library",
        "triton",
    ]
