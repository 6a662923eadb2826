"""What is already there: no command takes away a file or a folder that is not its own, or that it reads, and none takes other rows for the same."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny import make_model, make_rows

import minilora
from minilora.__main__ import main
from minilora.errors import MiniloraError, OutputInUse
from minilora.files import atomic
from minilora.files.atomic import locked, require_empty
from minilora.ranks.ranks import ALONE
from minilora.report.page import Document
from minilora.rows.dataset import load_data
from minilora.run.folder import after_restart, check_output
from minilora.tools import sweep as sweep_module
from minilora.tools.sweep import sweep
from minilora.tools.truncate_adapter import truncate_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, rows, and a run of one step with validation rows that were split off."""
    made = tmp_path_factory.mktemp("made")
    make_model(made / "model")
    make_rows(made / "rows.json")
    assert main([*training(made), "--data", str(made / "rows.json"), "--output", str(made / "run")]) == 0
    return made


def training(made: Path) -> list[str]:
    settings = ["--lora-r", "2", "--max-steps", "1", "--batch-size", "4", "--device", "cpu", "--val", "2"]
    return ["train", "--model", str(made / "model"), *settings]


@pytest.fixture
def here(tmp_path, made, monkeypatch) -> Path:
    """A copy of them as the current folder, and precious files beside them."""
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "mine").mkdir()
    for name in ("mine/thesis", "notes.md"):
        (tmp_path / name).write_text("precious")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


SCORE = "data score --model model --data rows.json"
REFUSED = {
    "a smaller adapter in place of a folder": ("inspect adapter run --to-rank 1 --output mine", 8),
    "a smaller adapter in place of its run": ("inspect adapter run --to-rank 1 --output run", 8),
    "the rows that are kept in place of all": (f"{SCORE} --keep-below 9 --output rows.json", 8),
    "the scores of rows in place of the rows": (f"{SCORE} --scores rows.json", 8),
    "a merged model in a run's checkpoints": ("merge --model model --adapter run --output run/checkpoints/x", 8),
    "a merged model in the place of a run's own": ("merge --model model --adapter run --output run/model", 8),
    "a merged model behind a link into a run": ("merge --model model --adapter run --output run/checkpoints/last/x/y", 8),
    "an export in a run's checkpoints": ("export --model model --adapter run --for gguf --output run/checkpoints/x", 8),
    "an adapter in a run's checkpoints": ("inspect adapter run --to-rank 1 --output run/checkpoints/x", 8),
    "a division of rows in a run's": ("data split --data rows.json --val 2 --output run/data/x", 8),
    "answers in a run's checkpoint": ("predict --model model --data rows.json --output run/checkpoints/step-1/predict", 8),
    "a sweep in a run's data": ("sweep mine.yaml --output run/data/x", 8),
    "a run whose cache is its data": ("train --model model --data rows.json --output new --cache new/data", 8),
    "a run in a run's checkpoints": ("train --model model --data rows.json --output run/checkpoints/step-9", 8),
    "a page in place of rows": ("inspect data --model model --data rows.json --html rows.json", 2),
    "a page in place of another page": ("inspect data --model model --data rows.json --html other.html", 8),
    "the twin of a page in place of notes": ("compare run run --output notes.html", 8),
    "the page of a run in place of another page": ("report project", 8),
    "answers in place of answers of another tool": ("predict --model model --data rows.json --output answers", 8),
    "answers in place of answers whose settings are lost": ("predict --model model --data rows.json --output part", 8),
    "a run in place of the rows that it reads": ("train --model model --data run/data/val.jsonl --output run --overwrite", 8),
    "a run in place of the model that it reads": ("train --model full --data rows.json --output full --overwrite", 8),
    "a run in place of the model that links lead to": ("train --model links --data rows.json --output full --overwrite", 8),
    "a run in place of a project": ("train --model model --data rows.json --output project --overwrite", 8),
    "a run in place of rows beside a run's": ("train --model model --data rows.json --output mixed --overwrite", 8),
    "a run in place of another in its folder": ("train --model model --data rows.json --output outer --overwrite", 8),
    "a run in place of a model that another command put there": ("train --model model --data rows.json --output merged --overwrite", 8),
    "a run in place of an adapter that another command put there": ("train --model model --data rows.json --output whole --overwrite", 8),
    "a run in place of notes in a checkpoint": ("train --model model --data rows.json --output noted --overwrite", 8),
    "a run in place of scripts beside a model": ("train --model model --data rows.json --output scripts --overwrite", 8),
    "a run in place of what its user keeps beside a model": ("train --model model --data rows.json --output kept --overwrite", 8),
    "a demo in place of a file": ("demo --output rows.json", 8),
    "the twin of a page that has none in place of notes": ("compare run run --output page.html", 8),
    "a sweep in place of another tool's": ("sweep sweep.json --output .", 8),
    "answers in place of the answers that are read": ("predict --model model --data answers/generated_predictions.jsonl --output answers --overwrite", 8),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_commands_own_stays(here, name, capsys):
    for folder in ("answers", "part", "project/data", "project/checkpoints", "full/model"):
        (here / folder).mkdir(parents=True)
    (here / "answers" / "generated_predictions.jsonl").write_text('{"predict": "precious"}\n')
    (here / "part" / "part.jsonl").write_text('{"broken\n{"row": 0}\n')
    for marks in ("project", "full"):
        shutil.copy(here / "run" / "config.yaml", here / marks)
    shutil.copy(here / "run" / "metrics.jsonl", here / "full")
    shutil.copytree(here / "model", here / "full" / "model", dirs_exist_ok=True)
    shutil.copy(here / "rows.json", here / "project" / "data" / "train.json")
    shutil.copytree(here / "run", here / "mixed", symlinks=True)
    shutil.copy(here / "rows.json", here / "mixed" / "data" / "my-rows.json")
    shutil.copytree(here / "run", here / "outer", symlinks=True)
    shutil.copytree(here / "run", here / "outer" / "predict", symlinks=True)
    (here / "links").mkdir()
    for path in (here / "full" / "model").iterdir():
        (here / "links" / path.name).symlink_to(path)
    shutil.copytree(here / "run", here / "kept", symlinks=True)
    (here / "kept" / "model").mkdir()
    for copy in ("noted", "scripts", "merged", "whole"):
        shutil.copytree(here / "run", here / copy, symlinks=True)
    shutil.copytree(here / "model", here / "merged" / "model")
    settings = here / "whole" / "config.yaml"
    settings.write_text(settings.read_text().replace("method: lora", "method: full"))
    (here / "scripts" / "model").mkdir()
    for mine in ("kept/model/notes", "page.md", "noted/checkpoints/step-1/notes", "scripts/model/mine.py"):
        (here / mine).write_text("precious")
    (here / "mine.yaml").write_text("base: {model: model, data: rows.json, max_steps: 1}")
    (here / "page.html").write_text(Document("a page without a twin").html())
    (here / "sweep.json").write_text(json.dumps({"base": {"model": "model", "data": "rows.json", "max_steps": 1}}))
    for page in ("other.html", "project/report.html"):
        (here / page).write_text("<p>precious")
    before, (command, code) = tree(here), REFUSED[name]
    words = command.split()
    assert main(words) == code, capsys.readouterr().err
    assert tree(here) == before


def test_a_run_in_which_a_prediction_is_being_written_stays(here, capsys):
    command = ["train", "--model", "model", "--data", "rows.json", "--output", "run", "--overwrite"]
    with locked(here / "run" / "predict"):
        before = tree(here)
        assert main(command) == 8 and "predict is being written" in capsys.readouterr().err
        assert tree(here) == before


@pytest.mark.parametrize("came", ["a prediction", "notes"])
def test_what_comes_while_a_run_loads_stays(here, monkeypatch, came, capsys):
    """--overwrite looks again right before it deletes: minutes may have passed."""
    before, stack = {}, ExitStack()

    def load(*arguments):
        if came == "notes":
            (here / "run" / "data" / "notes").write_text("precious")
        else:
            stack.enter_context(locked(here / "run" / "predict"))
        before.update(tree(here))
        return load_data(*arguments)

    monkeypatch.setattr("minilora.train.load_data", load)
    with stack:
        assert main([*training(here), "--data", "rows.json", "--output", "run", "--overwrite"]) == 8
        assert tree(here) == before and "--overwrite would delete it" in capsys.readouterr().err


def test_a_cache_among_the_files_of_another_run_is_refused(here, capsys):
    before = tree(here)
    for words in (
        [*training(here), "--data", "rows.json", "--output", "other", "--cache", "run/checkpoints"],
        ["data", "score", "--model", "model", "--data", "rows.json", "--cache", "run/adapter/tokens"],
    ):
        assert main(words) == 8 and "which a run fills" in capsys.readouterr().err
    assert {name: raw for name, raw in tree(here).items() if not name.startswith("other")} == before


@pytest.mark.parametrize("after", [False, True])
def test_a_signal_while_the_old_folder_is_deleted_loses_neither(tmp_path, monkeypatch, after):
    """Ctrl-C in the last moment of a save that replaces an adapter: the new one, or the old one, is there whole."""
    adapter, delete = tmp_path / "adapter", atomic.remove

    def interrupted(path: Path) -> None:
        if path.name == ".trash-adapter" and path.exists():
            delete(path if after else path / "a")
            monkeypatch.undo()
            raise KeyboardInterrupt
        delete(path)

    def save(text: str) -> None:
        with atomic.atomic_folder(adapter) as stage:
            for name in "ab":
                (stage / name).write_text(text)

    save("old")
    monkeypatch.setattr(atomic, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save("new")
    assert tree(adapter) in ({"a": b"old", "b": b"old"}, {"a": b"new", "b": b"new"})


def test_a_folder_that_appears_while_another_is_filled_stays(tmp_path):
    """As when a run is begun in the --output of a merge that takes minutes."""
    with pytest.raises(OutputInUse, match="not empty"), atomic.new_folder(tmp_path / "out") as stage:
        (stage / "merged").write_text("")
        with locked(tmp_path / "out"):
            (tmp_path / "out" / "config.yaml").write_text("precious")
    assert tree(tmp_path) == {"out/config.yaml": b"precious"}


def test_the_old_folder_stays_where_the_new_one_is_taken_away(tmp_path):
    """As by a program that cleans up, or by another process on a file system without locks."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic.atomic_folder(tmp_path / "adapter") as stage:
        shutil.rmtree(stage)
    assert tree(tmp_path) == {"adapter/a": b"old"}


def test_a_resumed_run_leaves_what_lies_beside_its_rows(here):
    (here / "run" / "data" / "notes").write_text("precious")
    before = tree(here / "run" / "data")
    assert main(["train", "--output", "run", "--resume"]) == 0
    assert tree(here / "run" / "data") == before


def test_a_resumed_run_leaves_the_comments_in_its_settings(here):
    settings, resume = here / "run" / "config.yaml", ["train", "--output", "run", "--resume"]
    assert main(resume) == 0  # the copy of a run is told where it lies now
    settings.write_text(f"# precious\n{settings.read_text()}")
    before = settings.read_text()
    assert main(resume) == 0 and settings.read_text() == before
    assert main([*resume, "--save-every", "7"]) == 0
    assert "save_every: 7" in settings.read_text()


def test_a_copy_whose_links_were_followed_is_resumed_once_the_copies_are_taken_away(here, capsys):
    shutil.copytree(here / "run", here / "copy")
    resume = ["train", "--output", "copy", "--resume"]
    for name in ("last", "best"):
        before = tree(here)
        assert main(resume) == 8 and f"copy/checkpoints/{name} is no link" in capsys.readouterr().err
        assert tree(here) == before
        shutil.rmtree(here / "copy" / "checkpoints" / name)
    assert main(resume) == 0 and (here / "copy" / "checkpoints" / "last").is_symlink()


@pytest.mark.parametrize("mode", ["--resume", "--overwrite"])
@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "tensorboard", "wandb"])
def test_a_run_writes_and_deletes_nothing_through_a_link(here, name, mode, capsys):
    """As in a stranger's folder of a run, whose links lead out of it."""
    away = here / "mine" / name
    if (here / "run" / name).exists():
        (here / "run" / name).rename(away)
    else:
        away.mkdir()
    (here / "run" / name).symlink_to(away)
    before = tree(here)
    command = training(here)[:1] if mode == "--resume" else [*training(here), "--data", "rows.json"]
    assert main([*command, "--output", "run", mode]) == 8
    assert f"run/{name} is a link to {away}" in capsys.readouterr().err and tree(here) == before


def test_the_code_that_a_full_model_has_of_its_base_is_the_runs_own(here):
    (here / "model" / "modeling_x.py").write_text("of the base")
    train = [*training(here), "--data", "rows.json", "--method", "full", "--output", "whole"]
    assert main(train) == 0 and (here / "whole" / "model" / "modeling_x.py").exists()
    check_output(here / "whole", resume=False, overwrite=True)
    (here / "whole" / "model" / "mine.py").write_text("precious")
    with pytest.raises(OutputInUse, match=r"mine\.py was written by no run"):
        check_output(here / "whole", resume=False, overwrite=True)


def test_a_page_and_its_twin_are_written_anew(here):
    for _ in range(2):
        assert main(["compare", "run", "run", "--output", "both.html"]) == 0
        assert main(["inspect", "data", "--model", "model", "--data", "rows.json", "--html", "rows.html"]) == 0


def test_a_saved_adapter_or_model_takes_the_place_of_nothing_else(here):
    model = minilora.load_model(here / "model")
    minilora.save_model(model, here / "again", here / "model")
    minilora.save_model(model, here / "again", here / "model")
    (here / "scripts").mkdir()
    (here / "scripts" / "train.py").write_text("precious")
    with pytest.raises(OutputInUse, match="would be lost"):
        minilora.save_model(model, here / "scripts", here / "model")
    minilora.add_lora(model, r=2)
    minilora.save_adapter(model, here / "adapter")
    minilora.save_adapter(model, here / "adapter")
    before = tree(here)
    for folder in ("mine", "run", "run/checkpoints/step-1", "again"):
        with pytest.raises(OutputInUse, match="would be lost"):
            minilora.save_adapter(model, here / folder)
    with pytest.raises(OutputInUse, match="would be lost"):
        minilora.save_model(minilora.load_model(here / "model"), here / "adapter", here / "model")
    with pytest.raises(OutputInUse, match="not empty"):
        truncate_adapter(here / "adapter", 1, here / "mine")
    assert tree(here) == before


def test_a_new_folder_takes_the_place_of_no_link_and_not_of_the_current_folder(here, monkeypatch):
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    (here / "dangling").symlink_to("nowhere")
    for name, said in (("link", "a link to empty"), ("dangling", "a link to nowhere")):
        with pytest.raises(OutputInUse, match=said):
            require_empty(here / name)
    assert main([*training(here), "--data", "rows.json", "--output", "dangling"]) == 8
    require_empty(here / "empty")
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(OutputInUse, match="mount point"):
        require_empty(here / "empty")
    monkeypatch.undo()
    monkeypatch.chdir(here / "empty")
    with pytest.raises(OutputInUse, match="current folder"):
        require_empty(Path("."))


def test_a_run_that_torchrun_starts_again_goes_on_with_what_the_same_torchrun_began(here, monkeypatch):
    run, error_file = here / "run", "logs/first/attempt_{}/0/error.json"

    def as_asked(attempt: int) -> bool:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file.format(attempt))
        answers = (False, False), (True, False), (False, True)
        return all(after_restart(run, ALONE.launch, *asked) == asked for asked in answers)

    assert as_asked(1)  # an older run: the first start was refused, and so is this one
    shutil.rmtree(run)
    assert as_asked(1)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file.format(0))
    assert main([*training(here), "--data", "rows.json", "--output", "run"]) == 0
    assert not as_asked(1)
    assert after_restart(run, ALONE.launch, resume=False, overwrite=True) == (True, False)
    shutil.rmtree(run / "checkpoints")
    assert after_restart(run, ALONE.launch, resume=True, overwrite=False) == (False, True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "logs/second/attempt_1/0/error.json")
    assert after_restart(run, ALONE.launch, resume=False, overwrite=False) == (False, False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert after_restart(run, ALONE.launch, resume=False, overwrite=False) == (False, False)


def test_a_prediction_without_its_rows_is_none(here):
    command = ["predict", "--model", "model", "--data", "rows.json", "--output", "answers", "--max-tokens", "1"]
    assert main(command) == 0
    (here / "answers" / "generated_predictions.jsonl").unlink()
    assert main(command) == 8 and main([*command, "--overwrite"]) == 0
    assert (here / "answers" / "generated_predictions.jsonl").exists()


@pytest.mark.parametrize("test", [{}, {"rows": 3}])
def test_a_sweep_does_not_go_on_with_other_rows(here, monkeypatch, test):
    """Nothing is trained: what was finished would be taken for a result of the new rows."""
    monkeypatch.setattr(sweep_module, "_train", lambda point: 5)
    base = {"model": "model", "data": "rows.json", "max_steps": 1}
    (here / "sweep.yaml").write_text(json.dumps({"base": base, "product": {"lora_r": [2]}, "test": test}))
    for _ in range(2):
        with pytest.raises(MiniloraError, match="each run failed"):
            sweep("sweep.yaml", "out", {})
    other = json.loads((here / "rows.json").read_text())[1:]
    (here / "other.json").write_text(json.dumps(other))
    if test:
        with pytest.raises(OutputInUse, match="division of other rows"):
            sweep("sweep.yaml", "out", {"data": "other.json"})
    shutil.copy("other.json", "rows.json")
    with pytest.raises(OutputInUse, match="rows.json has changed"):
        sweep("sweep.yaml", "out", {})
