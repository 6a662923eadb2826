"""Sweeps: which runs a file means, going on after a stop, one test set for all, and the recipes."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tiny import ROWS, make_model, make_rows

from minilora.__main__ import main
from minilora.console import Console
from minilora.errors import DataError, MiniloraError, OutputInUse, Stopped, UsageError
from minilora.report.page import Document, write_both
from minilora.report.record import Record, read_record
from minilora.report.score_table import SHOWN, shortened, show_scores
from minilora.rows import to_messages
from minilora.rows.render import hashes
from minilora.rows.sources import parse_sources
from minilora.settings import resolve
from minilora.tools import sweep as sweep_module
from minilora.tools.sweep import RECIPES, combinations, name_of, read_sweep, sweep

QUIET = Console(quiet=True)


def test_zip_goes_in_step_and_product_crosses():
    zipped, crossed = {"a": [1, 2], "b": [10, 20]}, {"c": [5, 6, 7], "d": [0]}
    found = combinations(zipped, crossed, "", 24)
    assert len(found) == 6 and {(p["a"], p["b"]) for p in found} == {(1, 10), (2, 20)}
    assert [p["c"] for p in found] == [5, 6, 7, 5, 6, 7]
    assert combinations({}, {}, "", 24) == [{}] and combinations({}, {"c": [1, 2]}, "", 24) == [{"c": 1}, {"c": 2}]
    with pytest.raises(UsageError, match="lists of"):
        combinations({"a": [1, 2], "b": [1]}, {}, "", 24)
    with pytest.raises(UsageError, match="a stands in zip and in product"):
        combinations({"a": [1]}, {"a": [2]}, "", 24)


@pytest.mark.parametrize(
    "value", ["../../etc/passwd", "/", "a\nb", ".", "..", "<img onerror=x>", "好" * 300, "", None, -1e-5]
)
def test_names_are_plain(value):
    name = name_of({"data": value})
    assert name == Path(name).name and name not in ("", ".", "..") and len(name) <= 100 and name.isascii()


def write(path: Path, **sections) -> str:
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def test_flags_win_and_aliases_are_one_setting(tmp_path):
    path = write(
        tmp_path / "s.yaml",
        base={"model": "m", "learning_rate": 1e-3, "data": "d"},
        product={"lora_rank": [4, 8], "lr": [1, 2]},
    )
    plan = read_sweep(path, tmp_path / "out", {"model": "other"})
    assert [(p.config.lora_r, p.config.lr, p.config.model) for p in plan.points] == [
        (4, 1, "other"),
        (4, 2, "other"),
        (8, 1, "other"),
        (8, 2, "other"),
    ]
    assert plan.points[0].name == "lora_rank=4,lr=1" and plan.points[0].config.output == str(
        tmp_path / "out" / "lora_rank=4,lr=1"
    )
    with pytest.raises(UsageError, match="varies lora_rank, lr"):
        read_sweep(path, tmp_path, {"r": 2})


WRONG = {
    "section": ({"bases": {}}, "unknown section 'bases'"),
    "no list": ({"zip": {"lr": 1}}, "zip has lr: 1"),
    "empty list": ({"product": {"lr": []}}, "product has lr"),
    "unknown setting": ({"product": {"lerning_rate": [1]}}, "unknown setting 'lerning_rate'"),
    "bad value": ({"product": {"lr": [1, "fast"]}}, "lr is 'fast'"),
    "base of words": ({"base": "x"}, "base is 'x'"),
    "test of both": ({"test": {"data": "x", "rows": 1}}, "test is"),
    "test of more than predict takes": ({"test": {"rows": 1, "batch": 5000}}, "test is"),
    "test key": ({"test": {"dat": "x"}}, "test is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_before_anything_runs(tmp_path, name):
    sections, said = WRONG[name]
    with pytest.raises(UsageError) as error:
        sweep(write(tmp_path / "s.yaml", **sections), str(tmp_path / "out"), {}, console=QUIET)
    assert said in error.value.what and not (tmp_path / "out").exists()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A sweep file on a tiny model, and the commands that it starts, run in this process."""
    make_model(tmp_path / "model")
    rows = make_rows(tmp_path / "rows.json")
    base = {
        "model": str(tmp_path / "model"),
        "data": str(rows),
        "max_steps": 3,
        "lora_r": 2,
        "device": "cpu",
        "batch_size": 4,
        "save_every": 1,
        "keep_checkpoints": 5,
    }
    path = write(
        tmp_path / "s.yaml", base=base, zip={"lr": [1e-3, 2e-3]}, test={"rows": 4, "max_tokens": 5, "before": True}
    )
    calls = []

    def child(*words):
        calls.append([str(w) for w in words])
        return main(calls[-1])

    monkeypatch.setattr(sweep_module, "_child", child)
    return path, tmp_path / "out", calls


def test_runs_test_set_and_page(here):
    path, out, calls = here
    page = sweep(path, str(out), {}, console=QUIET)
    assert [c[0] for c in calls] == ["train", "predict", "train", "predict", "predict"] and page.is_file()
    sides = {
        name: [json.loads(line) for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    assert len(sides["test"]) == 4 and sorted(map(str, sides["train"] + sides["test"])) == sorted(map(str, ROWS))
    labels = [
        [json.loads(line)["label"] for line in (out / run / "generated_predictions.jsonl").read_text().splitlines()]
        for run in ("lr=0.001/predict", "lr=0.002/predict", "before")
    ]
    assert labels[0] == labels[1] == labels[2] and len(labels[0]) == 4
    # what was trained on, and what was asked, are known by the same hashes
    trained = read_record(out / "lr=0.001").trained_rows
    rows = [to_messages(row, "") for row in sides["train"] + sides["test"]]
    assert trained is not None and {tuple(pair) for pair in trained.tolist()} == set(map(hashes, rows[:-4]))
    asked = [[int(h, 16) for h in row["hashes"]] for row in read_record(out / "before").rows]
    assert list(map(tuple, asked)) == list(map(hashes, rows[-4:]))
    assert "was trained on the questions" not in (out / "compare.md").read_text()
    assert "| lr | 0.001 | 0.002 |" in (out / "compare.md").read_text()
    before = (out / "lr=0.001" / "adapter" / "adapter_model.safetensors").read_bytes()
    calls.clear()
    sweep(path, str(out), {}, console=QUIET)
    assert not [c for c in calls if c[0] == "train"]  # predictions are asked for, and found
    assert (out / "lr=0.001" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    for other in ({"lora_r": "4"}, {"keep": "last"}, {"define": {"name": "Bobby"}}, {"mix_general": "rows.json"}):
        with pytest.raises(OutputInUse, match="other settings"):
            sweep(path, str(out), other, console=QUIET)


def test_rows_that_cannot_be_used_are_left_out_of_a_test_as_of_a_training(here, tmp_path):
    path, out, _ = here
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS, {"prompt": "without an answer"}]))
    with pytest.raises(DataError):
        sweep(path, str(out), {}, console=QUIET)
    sweep(path, str(out), {"skip_bad": True}, console=QUIET)
    lines = [(out / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert sum(map(len, lines)) == len(ROWS)


def test_preferences_are_no_questions(here):
    path, out, _ = here
    with pytest.raises(UsageError, match="rows of preferences cannot be asked"):
        sweep(path, str(out), {"objective": "dpo"}, console=QUIET)


def test_answers_are_given_on_the_bits_of_the_training(monkeypatch):
    calls = []
    monkeypatch.setattr(sweep_module, "_child", lambda *words: calls.append([*map(str, words)]) or 0)
    for quant in ("nf4", "keep"):
        config = resolve({"model": "m", "data": "d", "output": "run", "quant": quant})
        sweep_module._predict(config, {"data": "t"}, Path("out"), adapter=True)
    assert calls[0][calls[0].index("--quant") + 1] == "nf4" and "--quant" not in calls[1]


def test_before_is_asked_of_each_base_and_named_by_its_first_run(here):
    path, out, calls = here
    sections = yaml.safe_load(Path(path).read_text()) | {"product": {"quant": ["off", "int8"]}}
    sweep(write(Path(path), **sections), str(out), {}, console=QUIET)
    asked = [c for c in calls if c[0] == "predict" and "--adapter" not in c]
    assert [(Path(c[c.index("--output") + 1]).name, c[c.index("--quant") + 1]) for c in asked] == [
        ("before-lr=0.001,quant=off", "off"),
        ("before-lr=0.001,quant=int8", "int8"),
    ]
    page = (out / "compare.md").read_text()
    assert "E is before-lr=0.001,quant=off, F is before-lr=0.001,quant=int8" in page.replace("\\", "")
    sections |= {"zip": {"lr": [i / 1000 for i in range(1, 26)]}, "product": {}}
    assert len(read_sweep(write(Path(path), **sections), out, {}).points) == 25
    sections["zip"]["model"] = [f"m{i % 2}" for i in range(25)]
    with pytest.raises(UsageError, match="25 runs and 2 base models"):
        read_sweep(write(Path(path), **sections), out, {})


def test_a_stopped_sweep_goes_on(here):
    path, out, calls = here
    sweep(path, str(out), {}, console=QUIET)
    whole = (out / "lr=0.002" / "adapter" / "adapter_model.safetensors").read_bytes()
    # as a stop in the second run leaves it: a snapshot of step 1, no adapter, nothing after it
    run = out / "lr=0.002"
    for name in ("adapter", "predict", "checkpoints/step-2", "checkpoints/step-3"):
        shutil.rmtree(run / name, ignore_errors=True)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    calls.clear()
    sweep(path, str(out), {}, console=QUIET)
    assert [c[0] for c in calls] == ["predict", "train", "predict", "predict"] and "--resume" in calls[1]
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_a_run_that_was_killed_before_its_first_snapshot_is_trained_again(here):
    path, out, calls = here
    sweep(path, str(out), {}, console=QUIET)
    for name in ("adapter", "checkpoints", "predict"):
        shutil.rmtree(out / "lr=0.001" / name)
    calls.clear()
    sweep(path, str(out), {}, console=QUIET)
    assert "--overwrite" in calls[0] and (out / "lr=0.001" / "adapter").is_dir()


def test_a_finished_run_without_its_weights_is_not_trained_again_over_its_answers(here):
    path, out, _ = here
    sweep(path, str(out), {}, console=QUIET)
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(out / "lr=0.001" / name)
    with pytest.raises(OutputInUse, match="whose weights are gone"):
        sweep(path, str(out), {}, console=QUIET)
    assert (out / "lr=0.001" / "predict" / "generated_predictions.jsonl").is_file()


def test_a_sweep_does_not_go_on_with_another_model_of_the_same_name(here):
    path, out, _ = here
    sections = yaml.safe_load(Path(path).read_text())
    del sections["test"]
    write(Path(path), **sections)
    sweep(path, str(out), {}, console=QUIET)
    shutil.rmtree(out / "lr=0.002")
    config = Path(sections["base"]["model"]) / "config.json"
    config.write_text(config.read_text().replace("10000.0", "50.0"))
    with pytest.raises(OutputInUse, match="has changed since"):
        sweep(path, str(out), {}, console=QUIET)


def test_a_run_that_diverged_does_not_end_the_sweep_but_an_error_does(here, monkeypatch):
    path, out, _ = here
    codes = iter([5, 0, 0, 0])

    def child(*words):
        return main([str(w) for w in words]) if next(codes, 0) == 0 else 5

    monkeypatch.setattr(sweep_module, "_child", child)
    sweep(path, str(out), {}, console=QUIET)
    assert not (out / "lr=0.001").exists() and (out / "lr=0.002" / "predict").is_dir()
    assert "lr=0.001 failed with exit code 5" in (out / "compare.html").read_text()


@pytest.mark.parametrize(
    "more", [{}, {"question": {"ask": "Which?", "published": "None.", "compare": "lr", "expect": [0, 1]}}]
)
def test_a_sweep_whose_runs_all_failed_has_their_code_and_tells_of_no_page(here, monkeypatch, capsys, more):
    path, out, _ = here
    sections = yaml.safe_load(Path(path).read_text())
    del sections["test"]
    write(Path(path), **sections | more)
    out.mkdir()
    (out / "sweep.json").write_text('{"file": "", "runs": []}')
    write_both(out / "compare.html", Document("of before").html(), Document("of before").markdown())
    monkeypatch.setattr(sweep_module, "_child", lambda *words: 7)
    with pytest.raises(MiniloraError, match="each run failed") as error:
        sweep(path, str(out), {})
    assert error.value.code == 7 and "page" not in capsys.readouterr().out


def test_children_are_commands_of_their_own(tmp_path):
    assert sweep_module._child("--version") == 0
    with pytest.raises(MiniloraError, match="minilora train failed") as error:
        sweep_module._child("train", "--model", tmp_path / "none", "--data", "x", "--output", tmp_path / "out")
    assert error.value.code in (3, 4)


def test_a_stop_is_passed_on_once(monkeypatch):
    sent = []

    class Child:
        def wait(self, timeout):
            if len(sent) < 1:
                raise sweep_module.subprocess.TimeoutExpired("", timeout)
            return 75

        def send_signal(self, number):
            sent.append(number)

    class Asked:
        requested, name = True, "Ctrl-C"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(sweep_module.subprocess, "Popen", lambda *a, **k: Child())
    monkeypatch.setattr(sweep_module, "StopSignal", Asked)
    with pytest.raises(Stopped, match="stopped by Ctrl-C"):
        sweep_module._child("train")
    assert sent == [sweep_module.signal.SIGTERM]


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputInUse, match="holds no sweep"):
        sweep("identity-qwen", str(tmp_path / "out"), {}, smoke=True, console=QUIET)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(
        UsageError, match="recipes: adgen-chatglm, attention-or-mlp, batch-penalty, classification, identity-qwen,"
    ):
        sweep("nothing", str(tmp_path / "x"), {}, console=QUIET)


@pytest.mark.parametrize("name", [p.stem for p in RECIPES.glob("*.yaml")])
def test_recipes_are_whole(tmp_path, name):
    full, small = (read_sweep(name, tmp_path, {}, smoke) for smoke in (False, True))
    assert 1 <= len(small.points) <= len(full.points)
    for plan in (full, small):
        assert plan.test or plan.question.get("loss") == "train" or all(point.config.val for point in plan.points)
    for point in small.points:
        assert (
            Path(point.config.model, "config.json").is_file()
            and Path(parse_sources(point.config.data)[0].path).is_file()
        )
        assert point.config.device == "cpu"
    if name.startswith("length"):
        assert [(p.config.max_source_length, p.config.max_target_length) for p in full.points] == [
            (512, 128),
            (1024, 256),
        ]


@pytest.mark.long
@pytest.mark.parametrize("name", [p.stem for p in RECIPES.glob("*.yaml")])
def test_a_recipe_runs_small(tmp_path, name):
    page = sweep(name, str(tmp_path / "out"), {}, smoke=True)
    assert page.is_file() and page.with_suffix(".md").is_file()


LONG = "model=Qwen2.5-0.5B-Instruct,max_source_length={},max_target_length=256,lora_r={},lr=2e-4"


@settings(deadline=None)
@given(st.lists(st.text("ab0,=/好", min_size=1, max_size=60), min_size=1, max_size=12, unique=True), st.integers(8, 40))
def test_shortened_names_differ(names, width):
    found = shortened(names, width)
    assert len(set(found)) == len(names) and all(cell_len(name) <= width for name in found)
    assert all(short == name for short, name in zip(found, names, strict=True) if cell_len(name) <= width)


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_the_table_of_scores_fits_the_terminal(tmp_path, capsys, columns):
    names = [LONG.format(n, r) for n in (512, 1024) for r in (8, 16)] + ["before"]
    runs = []
    for i, name in enumerate(names):
        metrics = {metric: {"value": 10.0 + i, "definition": ""} for metric in SHOWN}
        val = [(0.0, 3.0), (5.0, 2.5 + i)] if name != "before" else []
        runs.append(Record(name, tmp_path / name, val=val, results={"metrics": metrics}))
    show_scores(runs, Console(width=columns))
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert all(cell_len(line) <= columns for line in lines) and len(lines) == 3 + len(runs)
    rows = [line.split() for line in lines[3:]]
    assert [row[0] for row in rows] == ["A:", "B:", "C:", "D:", "E:"] and len({row[1] for row in rows}) == 5
    assert all(part in rows[1][1] for part in ("=512", "lora_r=16")) and rows[0][2:] == ["2.5000"] + ["10.00"] * len(
        SHOWN
    )
    assert rows[3][2] == "3.0000" and rows[4][1:] == ["before"] + ["14.00"] * len(SHOWN)


def test_a_name_in_the_table_of_scores_is_no_markup(tmp_path, capsys):
    show_scores([Record("p[/q]", tmp_path), Record("[red]x", tmp_path)], Console(width=100))
    assert "A: p[/q]" in (said := capsys.readouterr().out) and "B: [red]x" in said


def test_a_sweep_of_more_runs_than_a_page_holds_is_refused_before_it_runs(tmp_path):
    path = write(tmp_path / "s.yaml", base={"model": "m", "data": "d"}, product={"seed": list(range(26))})
    with pytest.raises(UsageError, match="means 26 runs"):
        sweep(path, str(tmp_path / "out"), {}, console=QUIET)
    assert not (tmp_path / "out").exists()
