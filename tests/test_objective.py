"""DPO: its loss and gradients are the formula's, packing changes nothing, every shape of a preference row is read or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import SOP, tiny
from tiny import make_model

from minilora import load_adapter, load_model
from minilora.__main__ import main
from minilora.adapted import without_adapters
from minilora.config import TrainConfig
from minilora.data import Example, make_batch, pack
from minilora.errors import RowError
from minilora.evaluate import evaluate
from minilora.files.strict_json import read_json_lines
from minilora.lora import adapters, add_lora, trained_parameters
from minilora.objective import LOGGED, SFT, objective_of, pair_numbers, preference_losses
from minilora.rows.preferences import to_pair
from minilora.run.setup import optimizer_of
from minilora.settings import resolve
from minilora.train import train_step

BETA = 0.3


def pairs(count: int, seed: int = 0, family: str = "qwen3") -> list[Example]:
    """Two answers of different lengths to each random question, which ends with <sop>."""
    random, found = np.random.default_rng(seed), []
    for i in range(count):
        question = np.array([*random.integers(1, SOP, random.integers(2, 6)), SOP])
        sides = []
        for n in random.integers(1, 7, 2):
            ids = np.concatenate([question, random.integers(1, SOP, n)])
            targets = np.full(len(ids), -100)
            targets[len(question) - 1 : -1] = ids[len(question) :]
            sides.append((ids, targets))
        ids, targets = (np.concatenate(parts) for parts in zip(*sides, strict=True))
        found.append(
            Example(ids, targets, f"pair {i}", len(question) - 1 if family == "chatglm" else None, len(sides[0][0]))
        )
    return found


def by_the_formula(model, examples: list[Example]) -> torch.Tensor:
    """The summed loss from whole logits, document by document (TRL's sigmoid loss on the same log-probabilities)."""

    def log_p(example: Example, start: int, end: int) -> torch.Tensor:
        ids, targets = (torch.from_numpy(t[start:end]) for t in (example.ids, example.targets))
        chosen = torch.log_softmax(model.logits(ids), -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return chosen[targets >= 0].sum()

    def ratios() -> torch.Tensor:
        return torch.stack([log_p(e, 0, e.second) - log_p(e, e.second, len(e.ids)) for e in examples])

    with torch.no_grad(), without_adapters(model):
        reference = ratios()
    return -F.logsigmoid(BETA * (ratios() - reference)).sum()


def adapted(family: str):
    model = tiny(family, torch.float64)
    add_lora(model, r=3)
    generator = torch.Generator().manual_seed(5)
    for _, linear in adapters(model):
        linear.lora_B.data.normal_(0, 0.3, generator=generator)
    return model.train()


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trained_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3", "glm4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_the_formulas(family: str, checkpointing: bool):
    model, examples = adapted(family), pairs(5)
    truth = by_the_formula(model, examples)
    wanted = gradients(model, truth)
    model.checkpointing = checkpointing
    numbers = pair_numbers(model, make_batch(examples), BETA)
    found = gradients(model, numbers[0])
    assert numbers.tolist()[0] == pytest.approx(truth.item(), rel=1e-12)
    assert wanted.keys() == found.keys() and len(found) > 4
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-7 * float(wanted[name].abs().max()), msg=name)


def test_the_objective_is_what_the_config_says():
    assert objective_of(resolve({})) is SFT and SFT.passes == (True,)
    dpo, batch = objective_of(resolve({"objective": "dpo", "beta": 0.25})), make_batch(pairs(4))
    assert dpo.logged == LOGGED and dpo.passes == (False, True) and dpo.units(batch) == 4
    model = adapted("qwen3")
    assert torch.equal(dpo.numbers(model, batch), pair_numbers(model, batch, 0.25))


def test_numbers_beside_the_loss():
    policy, reference = torch.tensor([-1.0, -5.0, -3.0, -2.0]), torch.tensor([-2.0, -2.0, -2.0, -2.0])
    losses, rewards = preference_losses(policy, reference, 0.5)
    assert rewards.tolist() == [[0.5, -1.5], [-0.5, 0.0]]
    torch.testing.assert_close(losses, torch.tensor([2.0, -0.5]).neg().exp().log1p())
    model, examples = adapted("qwen3"), pairs(4)
    _, margin, accuracy, chosen, rejected = pair_numbers(model, make_batch(examples), BETA).tolist()
    assert margin == pytest.approx(chosen - rejected) and accuracy in range(5)
    with without_adapters(model):  # where nothing differs, each loss is log 2, and no answer is the likelier
        assert pair_numbers(model, make_batch(examples), BETA).tolist() == pytest.approx([4 * np.log(2), 0, 0, 0, 0])


@pytest.mark.parametrize("family", ["qwen3", "chatglm"])
def test_packing_and_micro_batches_change_nothing(family: str):
    examples = pairs(6, family=family)
    config = TrainConfig(objective="dpo", beta=BETA, lr=1e-2, clip=0.0)
    states = []
    for capacity in (10_000, 30, 1):
        model = adapted(family)
        optimizer = optimizer_of(model, config)
        result = train_step(model, optimizer, pack(examples, capacity), config, 0)
        states.append(
            (result.read()[0], result.logged, [p.detach().clone() for p in trained_parameters(model).values()])
        )
        score = evaluate(model, examples, capacity, objective=objective_of(config))
        assert score.tokens == 6 and score.loss < states[-1][0] and score.logged["margin"] > result.logged["margin"]
    for loss, logged, state in states[1:]:
        assert loss == pytest.approx(states[0][0], rel=1e-6) and logged == pytest.approx(states[0][1], rel=1e-5)
        for one, other in zip(state, states[0][2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


ROWS = [
    {"instruction": "Say A", "input": "now", "chosen": "A", "rejected": "B"},
    {"prompt": "Say A\nnow", "chosen": "A", "rejected": "B"},
    {"messages": [{"role": "user", "content": "Say A\nnow"}], "chosen": {"role": "assistant", "content": "A"},
     "rejected": {"role": "assistant", "content": "B"}},
    {"conversations": [{"from": "human", "value": "Say A\nnow"}], "chosen": {"from": "gpt", "value": "A"},
     "rejected": {"from": "gpt", "value": "B"}},
    {"prompt": [{"role": "user", "content": "Say A\nnow"}], "chosen": [{"role": "assistant", "content": "A"}],
     "rejected": [{"role": "assistant", "content": "B"}]},
    {"prompt": "Say A\nnow", "chosen": [{"role": "assistant", "content": "A"}], "rejected": [{"role": "assistant", "content": "B"}]},
    {"prompt": "Say A\nnow", "chosen": [{"role": "user", "content": "Say A\nnow"}, {"role": "assistant", "content": "A"}],
     "rejected": [{"role": "user", "content": "Say A\nnow"}, {"role": "assistant", "content": "B"}]},
    {"chosen": [{"from": "human", "value": "Say A\nnow"}, {"from": "gpt", "value": "A"}],
     "rejected": [{"from": "human", "value": "Say A\nnow"}, {"from": "gpt", "value": "B"}]},
    {"conversations": [{"from": "human", "value": "Say A\nnow"}], "chosen": "A", "rejected": "B"},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_shapes(row):
    chosen, rejected = to_pair(row, "here")
    question = {"role": "user", "content": "Say A\nnow"}
    assert chosen.messages == [question, {"role": "assistant", "content": "A"}] and not chosen.unread
    assert rejected.messages == [question, {"role": "assistant", "content": "B"}] and not rejected.unread


def test_earlier_answers_are_context():
    before = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "2"},
    ]
    chosen, _ = to_pair({"messages": before, "chosen": "two", "rejected": "three"}, "here")
    assert [m.get("loss", True) for m in chosen.messages if m["role"] == "assistant"] == [False, True]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "q", "chosen": "a"}, "no pair"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "no pair"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal answers"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "output": "c"}, "three answers"),
        (["q"], "no pair"),
        ({"chosen": [{"role": "user", "content": "q"}], "rejected": [{"role": "user", "content": "r"}]}, "no answer"),
        ({"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
          "rejected": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]}, "two questions"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_refused(row, reason):
    with pytest.raises(RowError) as error:
        to_pair(row, "here")
    assert error.value.reason == reason


def test_the_command(tmp_path: Path, capsys):
    model, rows, run = make_model(tmp_path / "m"), tmp_path / "rows.jsonl", tmp_path / "run"
    lines = [{"prompt": f"Say {n}", "chosen": f"It is {n}.", "rejected": f"No {n}!"} for n in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "--model",
        model,
        "--data",
        rows,
        "--objective",
        "dpo",
        "--val",
        "0.25",
        "--batch-size",
        "4",
        "--lr",
        "2e-3",
    ]
    words = [*map(str, words), "--epochs", "8", "--graphs", "on"]
    assert main(["train", *words, "--output", str(run)]) == 0
    out = capsys.readouterr().out
    assert "12 rows (preferences)" in out and "accuracy" in out and "minilora eval" not in out
    steps = [m for m in read_json_lines(run / "metrics.jsonl") if "loss" in m]
    assert steps[0]["loss"] == pytest.approx(np.log(2)) and steps[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["accuracy"] == 1 and steps[-1]["margin"] > 0.5 and steps[-1]["loss"] < 0.5
    assert "reward" in (run / "report.html").read_text()
    load_adapter(load_model(model), run / "adapter")
    for more, told in ((["--method", "full"], "without its adapters"), (["--truncate", "cut"], "two questions")):
        assert main(["train", *words, *more, "--output", str(tmp_path / "no")]) == 2
        assert told in capsys.readouterr().err
    assert main(["train", *words[:4], "--output", str(tmp_path / "no")]) == 3
    assert "--objective dpo" in capsys.readouterr().err
