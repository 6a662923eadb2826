"""From files to examples: what is dropped, cut or left out is counted; tokens are cached by content; memory stays small."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_model

from minilora.config import DataConfig
from minilora.data import load_examples
from minilora.errors import DataError, UsageError
from minilora.rows import load
from minilora.rows.dataset import load_data, trained_rows, write_split
from minilora.rows.token_store import TokenCache, tokenizer_hash
from minilora.settings import resolve
from minilora.text.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return load_tokenizer(model)


def write(path: Path, *rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def row(question: int, answer: int) -> dict[str, str]:
    return {"prompt": "q" * question, "completion": "a" * answer}


def contents(tokenizer: Tokenizer, example) -> tuple[str, str]:
    """The question and the trained answer of an example."""
    text = tokenizer.decode(example.ids.tolist(), specials=True)
    return text.split("user\n")[1].split("<|im_end|>")[0], text.split("assistant\n")[1]


CUTS = {
    "source": ({"max_source_length": 40}, row(60, 5), "max_source_length 40"),
    "target": ({"max_target_length": 9}, row(5, 60), "max_target_length 9"),
    "both": ({"max_source_length": 40, "max_target_length": 9}, row(60, 60), "max_source_length 40"),
    "total, of a long question": ({"max_length": 60}, row(70, 5), "max_length 60"),
    "total, of a long answer": ({"max_length": 60}, row(5, 70), "max_length 60"),
}


@pytest.mark.parametrize(("limits", "long", "over"), CUTS.values(), ids=CUTS)
def test_cut_rows_fit_exactly_and_keep_their_stop(tmp_path, tokenizer, limits, long, over):
    path = write(tmp_path / "x", long, row(5, 5))
    (example, short), report = load_examples(path, tokenizer, DataConfig(truncate="cut", **dict[str, Any](limits)))
    masked = len(example.ids) - example.trained
    sizes = {"max_length": len(example.ids), "max_source_length": masked, "max_target_length": example.trained}
    assert all(sizes[name] <= most for name, most in limits.items()) and any(sizes[n] == m for n, m in limits.items())
    question, answer = contents(tokenizer, example)
    assert long["prompt"].startswith(question) and question and answer.rstrip("\n").endswith("<|im_end|>")
    assert report.cut == {over: 1} and not report.dropped and f"cut 1 of 2 rows: 1 over {over}" in str(report)
    assert contents(tokenizer, short) == ("qqqqq", "aaaaa<|im_end|>\n")


def test_what_cannot_be_cut_is_dropped(tmp_path, tokenizer):
    path = write(tmp_path / "x", row(1, 60), row(5, 5))
    examples, report = load_examples(path, tokenizer, DataConfig(truncate="cut", max_target_length=6))
    assert len(examples) == 2 and report.cut == {"max_target_length 6": 1}
    assert report.dropped == {}
    with pytest.raises(DataError, match="all 2 rows are too long"):
        load_examples(path, tokenizer, DataConfig(truncate="cut", max_target_length=1))


def test_a_cut_falls_between_characters(tmp_path, tokenizer):
    path = write(tmp_path / "x", {"prompt": "q", "completion": "你好" * 9})
    (example,), _ = load_examples(path, tokenizer, DataConfig(truncate="cut", max_target_length=12))
    assert contents(tokenizer, example)[1] == "你好你<|im_end|>\n"


def test_truncate_error_names_the_row(tmp_path, tokenizer):
    with pytest.raises(DataError, match="line 2 is over max_length 60"):
        load_examples(
            write(tmp_path / "x", row(1, 1), row(60, 60)), tokenizer, DataConfig(max_length=60, truncate="error")
        )


BAD = [row(1, 1), "{", row(2, 0), {"a": 1}, row(3, 3), "{"]


def test_bad_rows_stop_and_the_others_are_counted(tmp_path, tokenizer):
    path = write(tmp_path / "x", *BAD)
    with pytest.raises(DataError) as error:
        load_examples(path, tokenizer)
    assert f"{path}, line 2, column 2" in error.value.what and "3 more rows cannot be used" in error.value.what
    assert "1 empty answer" in error.value.what and "--skip-bad" in error.value.hint


def test_skip_bad_counts_by_reason(tmp_path, tokenizer):
    examples, report = load_examples(write(tmp_path / "x", *BAD), tokenizer, DataConfig(skip_bad=True))
    assert [e.where.split()[-1] for e in examples] == ["1", "5"]
    assert report.broken == {"broken JSON": 2, "empty answer": 1, "unknown shape": 1} and report.kept == 2
    assert "left out 4 of 6 rows: 2 broken JSON, 1 empty answer, 1 unknown shape (first: " in str(report)
    with pytest.raises(DataError, match="all 1 rows are left out"):
        load_examples(write(tmp_path / "y", "{"), tokenizer, DataConfig(skip_bad=True))


def test_raw_text_is_trained_whole_in_pieces(tmp_path, tokenizer):
    text = "abcdefghij" * 7
    (tmp_path / "x.txt").write_text(f"{text}\nshort\n")
    examples, report = load_examples(tmp_path / "x.txt", tokenizer, DataConfig(max_length=32))
    assert [len(e.ids) for e in examples] == [32, 32, 7, 6] and report.examples == 4 and report.rows == 2
    assert "raw text in 4 pieces" in str(report)
    assert tokenizer.decode(np.concatenate([e.ids for e in examples]).tolist()) == text + "short"
    assert all((e.targets[:-1] == e.ids[1:]).all() and e.targets[-1] == -100 for e in examples)
    assert examples[2].ids[-1] in tokenizer.stop_ids


def test_a_cache_that_another_process_is_filling_is_left_to_it(tmp_path, model, tokenizer, monkeypatch):
    path, cache = write(tmp_path / "x", *(row(i % 7 + 1, i + 1) for i in range(9))), TokenCache(tmp_path / "c", model)
    monkeypatch.setattr(cache, "key", lambda **_: "key")
    with cache.write("key") as folder:
        own, _ = load_examples(path, tokenizer, cache=cache)
        assert not [*folder.iterdir()]
    plain, _ = load_examples(path, tokenizer)
    assert own.digest() == plain.digest()


def test_the_cache_gives_the_same_and_follows_the_content(tmp_path, model, tokenizer, monkeypatch):
    path, cache = write(tmp_path / "x", *(row(i % 7 + 1, i + 1) for i in range(50))), TokenCache(tmp_path / "c", model)
    plain, report = load_examples(path, tokenizer, DataConfig(max_length=60))
    load_examples(path, tokenizer, DataConfig(max_length=60), cache=cache)
    (entry,) = (tmp_path / "c").iterdir()
    with monkeypatch.context() as m:
        m.setattr(load, "render_within", None)  # nothing is rendered a second time
        held, again = load_examples(path, tokenizer, DataConfig(max_length=60), cache=cache)
    assert held.digest() == plain.digest() and [e.ids.tolist() for e in held] == [e.ids.tolist() for e in plain]
    assert [e.where for e in held] == [e.where for e in plain] and held.value(3) == plain.value(3)
    assert again.notes == [f"tokens of {path} from the cache"] and report.dropped == again.dropped != {}
    for changes in (
        {"max_length": 61},
        {"loss_on": "last"},
        {"truncate": "cut"},
        {"skip_bad": True},
        {"train_end": False},
        {"define": {"q": "x"}},
    ):
        load_examples(path, tokenizer, DataConfig(**dict[str, Any]({"max_length": 60} | changes)), cache=cache)
    write(path, *(row(i % 7 + 1, i + 1) for i in range(49)))
    load_examples(path, tokenizer, DataConfig(max_length=60), cache=cache)
    load_examples(f"{path}#5", tokenizer, DataConfig(max_length=60), cache=cache)
    assert len(list((tmp_path / "c").iterdir())) == 9
    assert TokenCache(tmp_path / "c", make_model(tmp_path / "m2", chat="x")).key() != cache.key()
    # a damaged entry is made again
    write(path, *(row(i % 7 + 1, i + 1) for i in range(50)))
    raw = bytearray((entry / "tokens").read_bytes())
    raw[9] ^= 1
    (entry / "tokens").write_bytes(raw)
    held, again = load_examples(path, tokenizer, DataConfig(max_length=60), cache=cache)
    assert (
        held.digest() == plain.digest()
        and not again.notes
        and [e.ids.tolist() for e in held] == [e.ids.tolist() for e in plain]
    )


def test_an_adapters_own_template_is_another_cache_entry(tmp_path, model):
    for name, template in (("one", "{{ 1 }}"), ("other", "{{ 2 }}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(template)
    places = (None, tmp_path / "one", tmp_path / "other")
    assert len({TokenCache(tmp_path, model, adapter).key() for adapter in places}) == 3


def test_a_crash_leaves_no_cache_entry(tmp_path, model, tokenizer):
    path = write(tmp_path / "x", row(1, 1), "{")
    with pytest.raises(DataError):
        load_examples(path, tokenizer, cache=TokenCache(tmp_path / "c", model))
    assert not list((tmp_path / "c").iterdir())


def config(model: Path, data, **more):
    return resolve({"model": model, "data": data, "output": "unused"} | more)


def test_sources_rates_and_general_rows(tmp_path, model):
    own, general = (
        write(tmp_path / "a", *(row(i + 1, 1) for i in range(20))),
        write(tmp_path / "g", *(row(1, i + 2) for i in range(9))),
    )
    data = load_data(config(model, f"{own}#:10@2,{general}#4", val="2", mix_general=general, mix_ratio="11:2"))
    assert len(data.val) == 2 and len(data.report.notes) == 2 and data.report.rows == 14
    counts = np.unique(data.train.order, return_counts=True)[1]
    assert counts.max() == 2 and "rows mixed in, 11:2, from 9 rows" in data.notes["general"]
    own_rows = sum("a, line" in e.where for e in data.train)
    assert own_rows == 2 * (10 - sum("a, line" in e.where for e in data.val))


def test_a_tokenizer_is_the_same_wherever_it_lies(tmp_path, model):
    copies = [shutil.copytree(model, tmp_path / name) for name in "abcdef"]
    assert len({tokenizer_hash(folder) for folder in copies}) == 1
    cache = TokenCache(tmp_path, copies[0])
    assert (
        cache.key(a=1, b={"x": 1, "y": 2}) == cache.key(b={"y": 2, "x": 1}, a=1) != cache.key(a=1, b={"x": 1, "y": 3})
    )
    (copies[0] / "vocab.json").write_text("{}")
    (copies[1] / "model.safetensors.index.json").write_text("{}")  # is not the tokenizer's
    first, *others = (tokenizer_hash(folder) for folder in copies)
    assert first not in others and len(set(others)) == 1


def test_rows_of_a_run_are_recorded_once(tmp_path, model):
    train = load_data(config(model, write(tmp_path / "a", row(1, 1), row(1, 2), row(2, 1), row(1, 1)))).train
    found = trained_rows(train)
    pairs = set(zip(train.column("question").tolist(), train.column("content").tolist(), strict=True))
    assert found.dtype == np.uint64 and len(found) == 3 and set(map(tuple, found.tolist())) == pairs


def test_a_split_is_written_with_hashes(tmp_path, model):
    rows = [row(i + 1, i + 1) for i in range(30)]
    path = write(tmp_path / "x", *rows)
    data = load_data(config(model, path, val="0.1", test="5"))
    write_split(tmp_path / "data", data)
    table = json.loads((tmp_path / "data" / "split.json").read_text())
    assert table["rows"] == {"train": 22, "val": 3, "test": 5}
    for name, size in (("val", 3), ("test", 5)):
        lines = [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == size and all(line in rows for line in lines)
        assert [h["row"] for h in table["hashes"][name]] == [f"{path}, line {len(r['prompt'])}" for r in lines]
    # the rows that stay are the others, and the same split comes again from the rows in another order
    assert len({e.where for e in data.train} | {e.where for e in data.val}) == 25
    shuffled = load_data(config(model, write(tmp_path / "y", *rows[::-1]), val="0.1", test="5"))
    assert sorted(shuffled.val.column("content")) == sorted(data.val.column("content"))


def test_a_text_of_several_pieces_is_one_row_of_a_split(tmp_path, model):
    texts = [{"text": f"{i:02} " * 50} for i in range(10)]
    data = load_data(config(model, write(tmp_path / "x", *texts), val="0.2", test="3", max_length=40))
    assert {name: pieces.firsts.sum() for name, pieces in data.taken.items()} == {"val": 2, "test": 3}
    assert len(data.val) > 6 and data.train.firsts.sum() == 5 and data.notes["val"] == "2 of these rows"
    write_split(tmp_path / "data", data)
    lines = (tmp_path / "data" / "test.jsonl").read_text().splitlines()
    assert len(set(lines)) == len(lines) == 3


def test_a_folder_brings_its_validation_rows(tmp_path, model):
    (tmp_path / "f").mkdir()
    write(tmp_path / "f" / "train.json", row(1, 1), row(2, 2))
    write(tmp_path / "f" / "dev.json", row(2, 3))
    data = load_data(config(model, tmp_path / "f"))
    assert [len(data.train), len(data.val)] == [2, 1]
    assert "1 validation rows ask what a training row asks" in data.notes["note"]
    own = load_data(config(model, tmp_path / "f", val="1"))  # who asks for other ones gets those
    assert [len(own.train), len(own.val)] == [1, 1] and own.notes["val"] == "1 of these rows"
    write(tmp_path / "f" / "dev.json", row(260, 3))
    assert "256 positions" in load_data(config(model, tmp_path / "f")).notes["long"]
    write(tmp_path / "f" / "dev.json", row(3, 3), row(3, 4), row(3, 5))
    assert len(load_data(config(model, tmp_path / "f" / "train.json", val=str(tmp_path / "f"))).val) == 3
    general = load_data(config(model, tmp_path / "f", mix_general=str(tmp_path / "f" / "dev.json")))
    assert "3 validation rows ask what a training row asks" in general.notes["note"]
    alone = load_data(config(model, tmp_path / "f" / "train.json"))
    assert not len(alone.val) and not alone.notes and not alone.taken
    write_split(tmp_path / "data", alone)
    assert not (tmp_path / "data").exists()
    with pytest.raises(UsageError, match="no row of"):
        load_data(config(model, tmp_path / "f", define={"nobody": "x"}))
    write(tmp_path / "f" / "dev.json", row(3, 3) | {"prompt": "{{nobody}}?"})
    assert len(load_data(config(model, tmp_path / "f", define={"nobody": "x"})).val) == 1  # filled there alone
    write(tmp_path / "f" / "train.json", row(1, 1) | {"prompt": "{{nobody}}?"})
    assert len(load_data(config(model, tmp_path / "f", define={"nobody": "x"})).train) == 1


def test_columns_from_a_flag_and_a_yaml(tmp_path, model):
    path = write(tmp_path / "x", {"q": "a", "a": "b"})
    for given in ("prompt=q,response=a", {"prompt": "q", "response": "a"}):
        assert len(load_data(config(model, path, columns=given)).train) == 1
    for given in ("prompt", "bogus=q"):
        with pytest.raises(UsageError):
            load_data(config(model, path, columns=given))


CHILD = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
from minilora.data import load_examples, step_examples
from minilora.text.tokenizer import load_tokenizer
from pathlib import Path
tokenizer = load_tokenizer({model!r})
load_examples({small!r}, tokenizer)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
examples, report = load_examples({large!r}, tokenizer)
assert len(step_examples(examples, 8, 0, 3)) == 8
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, report.tokens)
"""


def test_a_large_file_needs_little_memory(tmp_path, model):
    """Six million tokens: 30 MB on the disk, and less than 8 MB of memory more than a twentieth of them needs."""
    line = json.dumps(row(100, 1900)) + "\n"
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text(line * 150)
    large.write_text(line * 3000)
    code = CHILD.format(tests=str(ROOT / "tests"), root=str(ROOT), model=str(model), small=str(small), large=str(large))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, tokens = map(int, done.stdout.split())
    assert tokens > 6e6 and grown < 8 << 20


def test_a_giant_line_needs_little_memory_too(tmp_path, tokenizer):
    """It is refused when its first 64 MiB were read."""
    path = tmp_path / "x.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"prompt": "a", "completion": "b"}\n{"prompt": "')
        file.truncate(200 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="line 2 is longer than 64 MiB"):
        load_examples(path, tokenizer)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200 << 20
