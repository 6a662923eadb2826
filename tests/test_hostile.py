"""Files that were made to hang, to fill the memory or to steer the terminal: each ends at once, with one clear line and its code."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny import make_model, make_rows

from minilora import add_lora, load_model, save_adapter
from minilora.__main__ import main
from minilora.errors import UsageError
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.settings import read_yaml
from minilora.terminal import LONGEST
from minilora.tools.sweep import read_sweep

ESC = "\x1b[31m"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    make_model(folder / "model")
    make_rows(folder / "rows.json")
    return folder


@pytest.fixture
def here(tmp_path, folders, monkeypatch) -> Path:
    """A working folder with a model and rows of its own."""
    monkeypatch.chdir(shutil.copytree(folders, tmp_path / "here"))
    return tmp_path / "here"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def told(capsys):
    """Run a command line: its exit code and all that it wrote, which holds no control code and no endless line."""

    def call(words: str | list[str]) -> tuple[int, str]:
        capsys.readouterr()
        code = main(words.split() if isinstance(words, str) else words)
        text = "".join(capsys.readouterr())
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text) and "Traceback" not in text
        assert max(map(len, text.split("\n"))) < LONGEST + 100
        return code, text

    return call


# ---- the terminal


@pytest.mark.parametrize(
    "value", [ESC, "x" * 1_000_000, "\u202e\x9b", [ESC], {"rope_type": ESC}], ids=lambda v: str(type(v))
)
def test_no_value_of_a_config_reaches_the_terminal_raw(here, told, value):
    keys = (
        "rms_norm_eps",
        "hidden_size",
        "rope_theta",
        "model_type",
        "rope_scaling",
        "architectures",
        "dtype",
        "hidden_act",
        ESC,
    )
    before = (here / "model" / "config.json").read_text()
    for key in keys:
        (here / "model" / "config.json").write_text(before)
        change(here / "model" / "config.json", **{key: value})
        code, _ = told("inspect model model")
        assert code in (0, 4), key


@pytest.mark.parametrize("name", [ESC, "x" * 1_000_000])
def test_no_name_in_an_index_or_a_row_does(here, told, name):
    (here / "model" / "model.safetensors").unlink()
    for places in ({name: "model-1.safetensors"}, {"a": name}):
        (here / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        assert told("inspect model model")[0] == 4
    (here / "rows.json").write_text(json.dumps([{name: 1, "instruction": name, "output": "x"}]))
    assert told("train --model model --data rows.json --output out")[0] == 3
    assert told(["train", "--lora-targets", name, "--schedule", name])[0] == 2


def test_what_is_asked_is_echoed_without_control_codes(here, told):
    code, text = told(["chat", "--model", "model", "--prompt", f"a{ESC}b", "--max-tokens", "1"])
    assert code == 0 and "> a\\u001b[31mb" in text


# ---- numbers


@pytest.mark.parametrize("place", ["model/model.safetensors", "adapter/adapter_model.safetensors"])
def test_weights_that_overflow_never_end_with_0(here, told, place):
    """They are finite, and what is computed from them is not."""
    model = load_model(here / "model", device="cpu")
    add_lora(model, r=2)
    save_adapter(model, here / "adapter")
    file = SafetensorsFile(here / place)
    tensors = {name: file.tensor(name).clone() for name in file.entries}
    name = next(name for name in tensors if "q_proj" in name and "lora_A" not in name)
    tensors[name].fill_(1e38)
    (here / place).unlink()
    write_tensors(here / place, tensors, {k: v for k, v in file.metadata.items() if k != "format"})
    adapter = " --adapter adapter" if "adapter" in place else ""
    for words in (
        "chat --model model --prompt x --greedy", "chat --model model --prompt x --temperature 1", "eval --model model --data rows.json",
        "data score --model model --data rows.json", "predict --model model --data rows.json --output out --max-tokens 2",
    ):  # fmt: skip
        code, text = told(words + adapter)
        assert code == 5 and "is not finite" in text, (words, text)


# ---- yaml

YAML = {
    "aliases of aliases": "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'] * 10)}]" for i in range(9)),
    "aliases of mappings": "\n".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' if i else f'k{j}: v' for j in range(10))}}}" for i in range(9)),
    "an alias within itself": "define: &a [*a]",
    "one long text, often": f"define: {{a: &t {'x' * 50_000}, b: *t, c: *t, d: *t}}",
    "deep": f"define: {'[' * 2000}",
    "a long line": f"lr: {'1' * 100_000}",
    "digits": f"seed: {'9' * 5000}",
    "hexadecimal digits": f"val: 0x{'f' * 5000}",
    "parts of a minute": f"seed: {'1:' * 5000}1",
    "a date": "lr: 2024-01-01",
    "no date": "lr: 2024-13-45",
    "no time": "seed: 2024-01-01T99:99:99Z",
    "no number": "seed: !!int a",
    "no truth": "rslora: !!bool a",
    "an object": "seed: !!python/object/apply:os.system [id]",
    "many keys": "".join(f"k{i}: 1\n" for i in range(3000)),
    "too large": "# " + "x" * 200_000,
    "a key twice": "define: {a: 1, a: 2}",
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_a_yaml_file_that_grows_or_lies_is_refused(here, told, name):
    (here / "run.yaml").write_text(YAML[name])
    assert told("train -c run.yaml --model model --data rows.json --output out")[0] == 2
    assert not (here / "out").exists()


def test_plain_aliases_are_fine(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: &rate 1e-3\nweight_decay: *rate\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lr": "1e-3", "weight_decay": "1e-3"}


@pytest.mark.parametrize("varied", [
    "product: {" + ", ".join(f"{k}: [{', '.join(map(str, range(1, 31)))}]" for k in ("lora_r", "seed", "epochs", "batch_size", "max_length")) + "}",
    f"zip: {{seed: [{', '.join(['1'] * 3000)}]}}",
    "product: {5: [1]}",
    "product: {seed: 5}",
    "test: {rows: 2, max_tokens: abc}",
    "test: [1]",
])  # fmt: skip
def test_a_sweep_out_of_proportion_is_refused_before_it_is_written_out(tmp_path, varied):
    (tmp_path / "s.yaml").write_text(f"base: {{model: m, data: d}}\n{varied}\n")
    with pytest.raises(UsageError):
        read_sweep(str(tmp_path / "s.yaml"), tmp_path / "out", {})
