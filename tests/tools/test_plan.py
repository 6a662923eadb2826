"""`minilora plan`: the dry run counts what a real step allocates, and the command tells it without weights or data."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from oracle import tiny_folder
from published import PUBLISHED
from tiny import make_model, make_rows

import minilora
from minilora.__main__ import main
from minilora.checkpoint.load import empty_model, read_config
from minilora.data import load_examples, make_batch, pack
from minilora.kernels import experts_on_triton
from minilora.kernels.dispatch import compile_for, use_gemm
from minilora.kernels.launch import Launch
from minilora.kernels.linear_cross_entropy import CHUNK_ROWS, linear_cross_entropy
from minilora.lora import adapters, base_parameters
from minilora.machine.compute import name_of
from minilora.machine.dry_run import _Live, card_memory, step_memory
from minilora.machine.gemm import settle
from minilora.ranks.scale import NF4_BITS, Shape
from minilora.run.fit import LARGEST
from minilora.run.setup import prepare
from minilora.settings import resolve
from minilora.tools.plan import _assumed_row, forecast, text_of

FLAGS = {"lora_r": 8, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", torch.bfloat16)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "m", torch.bfloat16, num_hidden_layers=7)


@pytest.mark.parametrize("depth", ["folder", "deep"])  # all layers are run, and three of seven
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"checkpointing": "on"},
        {"checkpointing": "on", "offload": "on"},
        {"method": "full"},
        {"lora_dropout": 0.1},
        {"quant": "nf4"},
        {"quant": "int8"},
        {"quant": "nf4", "checkpointing": "on"},
        {"quant": "int8", "compute": "float32"},
    ],
    ids=str,
)
def test_the_dry_run_counts_what_a_step_allocates(depth, request, tmp_path, settings):
    folder = request.getfixturevalue(depth)
    config = resolve({"model": str(folder)} | FLAGS | settings)
    examples, _ = load_examples(make_rows(tmp_path / "rows.json"), minilora.load_tokenizer(folder))
    batch = pack(examples, 300)[0]
    full = config.method == "full"
    dtype = torch.float32 if full else torch.bfloat16
    compute = torch.float32 if full or config.compute == "float32" else torch.bfloat16
    planned = prepare(empty_model(read_config(folder), dtype, config.quant), config)
    planned.compute = compute
    found = step_memory(planned, batch)
    model = prepare(minilora.load_model(folder, dtype, "cpu", name_of(compute), config.quant), config)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    base = sum(p.nbytes for p in [*model.parameters(), *model.buffers()] if not p.requires_grad)
    inputs = batch.ids, batch.documents.positions, batch.target_index, batch.targets
    live = _Live([*model.parameters(), *model.buffers(), *inputs])
    with live:
        loss = model.loss(batch)
        kept = live.now
        loss.backward()
    assert (found.weights, found.adapters) == ((trained, 0) if full else (base, trained))
    assert (found.gradients, found.optimizer) == (trained, 2 * trained)
    # the host's memory is the device's on a CPU
    assert (found.host > 0) == (config.offload == "on")
    assert found.activations + found.host == kept > 10_000
    assert found.host + found.temporaries == max(found.host, live.peak - found.activations - trained)


def test_augmented_matrices_are_counted(folder):
    """Beside the weights themselves, what the matrices of q/k/v, o, gate/up and down have more."""
    config = resolve({"model": str(folder), "lora_r": 8, "max_length": 50})
    with use_gemm("augmented"):
        model = prepare(empty_model(read_config(folder), torch.bfloat16), config)
        settle(model, 50)
        found = step_memory(model, make_batch([_assumed_row(config, False)]))
    matrices = [cast(torch.Tensor, w.base.weight).untyped_storage() for _, w in adapters(model)]
    plain = sum(p.nbytes for p in base_parameters(model).values() if isinstance(p, torch.Tensor) and p.is_contiguous())
    assert found.weights == plain + sum({s._cdata: s.nbytes() for s in matrices}.values())


def test_a_storage_counts_while_it_lives():
    known = torch.zeros(100)
    live = _Live([known])
    with live:
        a = torch.zeros(1000)
        b = a[10:].view(-1)  # no bytes of its own
        known.add_(1)
        assert live.now == 4000
        del a
        assert live.now == 4000
        c = torch.ones(500, dtype=torch.float64)
        del b
        assert live.now == 4000 and live.peak == 8000
        del c
        assert live.now == 0


def test_logits_of_one_chunk_exist_at_a_time():
    x, head = torch.randn(2 * CHUNK_ROWS + 50, 16, requires_grad=True), torch.randn(4000, 16)
    targets = torch.randint(4000, x.shape[:1])
    with _Live([x, head, targets]) as live:
        linear_cross_entropy(x, head, targets)
    chunk = CHUNK_ROWS * 4000 * 4
    assert chunk < live.peak < 1.2 * chunk


def test_recomputing_keeps_less_and_offloading_one_input(deep, tmp_path):
    examples, _ = load_examples(make_rows(tmp_path / "rows.json"), minilora.load_tokenizer(deep))
    batch = make_batch(examples)
    kept, host = [], []
    for settings in ({}, {"checkpointing": "on"}, {"checkpointing": "on", "offload": "on"}):
        config = resolve({"model": str(deep)} | FLAGS | settings)
        memory = step_memory(prepare(empty_model(read_config(deep), torch.bfloat16), config), batch)
        kept.append(memory.activations)
        host.append(memory.host)
    assert kept[1] < kept[0] / 3
    c = read_config(deep)
    assert host == [0, 0, c.layers * len(batch.ids) * c.width * 2]
    assert kept[1] - kept[2] == (c.layers - 1) * len(batch.ids) * c.width * 2


@pytest.fixture
def plan(capsys):
    def call(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["plan", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out + err

    return call


def test_on_a_card_a_stream_is_as_long_as_it_takes(plan, folder):
    """Up to a step, and to what a run would take of itself; on a CPU it is max_length."""

    def stream(*arguments) -> int:
        return json.loads(plan("--model", folder, "--max-length", 100, "--json", *arguments)[1])["step"][
            "stream_tokens"
        ]

    assert stream() == 100
    assert stream("--device-memory", 80) == 800  # all eight rows of the step
    assert stream("--device-memory", 80, "--accumulation", 1000) == LARGEST // 100 * 100
    assert stream("--device-memory", 1e-4) == 100 and stream("--device-memory", 80, "--micro-tokens", 250) == 200


def test_a_config_alone(plan, folder, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((folder / "config.json").read_bytes())
    arguments = ["--model", tmp_path / "m", "--lora_rank", 8, "--max-source-length", 40, "--max-target-length", 10]
    arguments += ["--gemm", "library"]  # as on this machine: a GPU is planned with room for augmented matrices
    code, out = plan(*arguments, "--max-length", 120, "--json", "--compute", "bfloat16")
    found = json.loads(out)
    assert code == 0 and found["row_tokens"] == 50 and found["row_trained"] == 10
    assert found["step"]["stream_tokens"] == 100 and found["step"]["streams"] == 4  # two rows of 50 in 120
    assert found["parameters"] == sum(p.numel() for p in minilora.load_model(folder, device="cpu").parameters())
    memory = found["memory"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    # a stream of the size that is said to fit needs what the card has
    small = memory["total"] / 1e9 * 4
    on_card = ["--max-length", 120, "--micro-tokens", 120, "--json", "--device-memory", small]
    most = json.loads(plan(*arguments, *on_card)[1])["most_tokens"]
    rows = most // 50
    again = json.loads(
        plan(*arguments, "--max-length", 50 * rows, "--batch-size", rows, "--json", "--compute", "bfloat16")[1]
    )
    assert 0.85 < again["memory"]["total"] / 1e9 / small <= 1  # never more
    code, out = plan(*arguments, "--device-memory", 0.0001)
    assert code == 0 and "GB more than" in out


def test_with_data(plan, folder, tmp_path):
    rows = make_rows(tmp_path / "rows.json")
    code, out = plan("--model", folder, "--data", rows, "--batch-size", 4, "--epochs", 2)
    assert code == 0 and "14 rows" in out and "8 steps, 2 epochs" in out and "activations" in out
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_planned(plan, folder):
    assert plan()[0] == 2
    assert plan("--model", folder, "--lora_rnak", 8)[0] == 2
    assert plan("--model", folder, "--lora-targets", "nothing")[0] == 2


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a 7B model that is a config.json alone, and its plan in NF4 on a card of 8 GB."""
    folder = tmp_path_factory.mktemp("seven")
    (folder / "config.json").write_text(json.dumps(PUBLISHED["Qwen2.5-7B"][1]))
    settings = {"quant": "nf4", "lora_r": 8, "batch_size": 1, "checkpointing": True}
    return folder, forecast(resolve({"model": str(folder)} | settings), 8)


def test_a_7b_model_trains_in_less_than_7_gb(seven):
    _, found = seven
    assert found["step"]["stream_tokens"] == 2048 and found["memory"]["total"] < 7e9
    # the loss on a GPU has the logits of all of these rows at once
    assert found["memory"]["temporaries"] >= 2047 * 152064 * 2
    cards = {card["gb"]: card for card in found["cards"]}
    assert [*cards] == [8, 16, 24, 48, 80] and cards[8]["checkpointing"] == found["most_tokens"] > cards[8]["kept"]
    assert f"{cards[80]['checkpointing']:,}   the same with --checkpointing" in text_of(found)


@pytest.mark.parametrize("name", ["ChatGLM-6B", "GLM-4-9B", "Qwen2.5-72B"])
def test_eight_ranks(name, tmp_path):
    """What they send is of the adapters alone, whatever the base. The largest does not fit, and has streams of one row."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][1]))
    config = resolve({"model": str(tmp_path), "lora_r": 8, "checkpointing": True, "batch_size": 16})
    found = forecast(config, 80, gpus=8)
    assert found["parameters"] == PUBLISHED[name][0]
    ranks, step = found["ranks"], found["step"]
    fits = name != "Qwen2.5-72B"
    assert step["stream_tokens"] == (2 * 2048 if fits else 2048) and ranks["imbalance"] == 1
    assert (ranks["streams"], ranks["most_streams"]) == ((8, 1) if fits else (16, 2))
    assert ranks["reduced"] == 2 * 7 / 8 * (4 * found["trained"] + 8)
    seconds = ranks["most_streams"] * step["flops"] / (0.4 * 312e12)
    wire = {link["name"]: link for link in ranks["links"]}
    assert wire["100 Gb/s"]["A100"] == pytest.approx(seconds / (seconds + ranks["reduced"] / 12.5e9))
    assert "H100" not in wire["NVLink, A800"] and wire["NVLink, H100"]["H100"] > wire["PCIe 4 x16"]["H100"]
    assert ("fits in the 80 GB" in text_of(found)) == fits == ("--shard on" not in text_of(found))


@pytest.mark.parametrize(
    ("quant", "bits", "layers"), [("keep", 16, 80), ("nf4", NF4_BITS, 8)]
)  # W in NF4 is many pieces
def test_eight_ranks_that_share_a_base(quant, bits, layers, tmp_path):
    """Each has an eighth, and a stream gathers every layer twice, embedding and head once; the bytes are the cost model's."""
    sizes = {"num_hidden_layers": layers, "max_window_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen2.5-72B"][1] | sizes))
    settings = {
        "lora_r": 8,
        "checkpointing": True,
        "batch_size": 64,
        "quant": quant,
        "micro_tokens": 8192,
        "shard": "on",
    }
    found = forecast(resolve({"model": str(tmp_path)} | settings), 80, gpus=8)
    shape = Shape(layers, 8192, 64, 8, 128, 29568, 152064)
    blocks, ends = layers * shape.block * bits / 8, 4 * 152064 * 8192
    assert found["memory"]["weights"] == pytest.approx((blocks + ends) / 8, rel=2e-3)
    assert found["memory"]["total"] == sum(v for k, v in found["memory"].items() if k != "total") < 80e9
    assert found["ranks"]["most_streams"] == 2
    assert found["ranks"]["gathered"] == pytest.approx(2 * 7 / 8 * (2 * blocks + ends), rel=2e-3)
    assert "a part of the base each" in text_of(found) and found["cards"][-1]["checkpointing"] == found["most_tokens"]


def test_ranks_share_the_rows_of_a_step(plan, folder):
    """And on a CPU its memory."""
    arguments = ["--model", folder, "--max-length", 100, "--json", "--gpus", 4]
    on_card = json.loads(plan(*arguments, "--device-memory", 80, "--accumulation", 3)[1])
    assert on_card["step"]["stream_tokens"] == 600 and on_card["ranks"]["streams"] == 4  # 24 rows, six for each
    uneven = json.loads(plan(*arguments, "--batch-size", 5)[1])
    assert (uneven["ranks"]["most_streams"], uneven["ranks"]["imbalance"]) == (2, 1.6)
    alone = json.loads(plan(*arguments[:-2])[1])
    assert "ranks" not in alone and uneven["device_gb"] == alone["device_gb"] / 4


@pytest.mark.long
@pytest.mark.parametrize(("gb", "way"), [(8, "kept"), (16, "kept"), (8, "checkpointing"), (16, "checkpointing")])
def test_what_is_said_to_fit_a_card_does_and_fills_it(seven, gb, way):
    folder, found = seven
    settings = {"quant": "nf4", "lora_r": 8, "checkpointing": way == "checkpointing"}
    model = prepare(empty_model(read_config(folder), torch.bfloat16, "nf4"), resolve({"model": str(folder)} | settings))
    model.compute = torch.bfloat16
    tokens = next(card[way] for card in found["cards"] if card["gb"] == gb)
    stream = make_batch([_assumed_row(resolve({"max_length": tokens}), False)])
    assert 0.95 < card_memory(model, stream).total / gb / 1e9 <= 1


def test_a_card_has_room_for_the_rows_of_all_experts_at_once(tmp_path, monkeypatch):
    """What the steps of experts_on_triton.py allocate, launched or not."""
    sizes = {
        "hidden_size": 256,
        "moe_intermediate_size": 192,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 64,
    }
    folder = tiny_folder(tmp_path / "m", "qwen3_moe", **sizes)
    config = resolve({"model": str(folder), "checkpointing": "on"} | FLAGS)
    stream, found = make_batch([_assumed_row(resolve({"max_length": 2048}), False)]), []
    for memory in (card_memory, step_memory):
        model = prepare(empty_model(read_config(folder), torch.bfloat16), config)
        model.compute = torch.bfloat16
        with compile_for(90):
            found.append(memory(model, stream))
        monkeypatch.setattr(experts_on_triton, "use_triton", lambda *_: True)
        monkeypatch.setattr(Launch, "__call__", lambda *_: None)
    planned, real = found
    assert real.temporaries <= planned.temporaries and planned.total <= 1.15 * real.total
