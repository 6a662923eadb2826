"""What inspect data tells of rows: tokens, roles, masks, problems; the page; the folder's template in its process."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seen import Seen
from tiny import make_model

from minilora.__main__ import main
from minilora.config import DataConfig
from minilora.errors import ModelError
from minilora.report.charts import bins, marked_histogram, text_histogram
from minilora.report.token_view import tokens_of
from minilora.rows import to_messages
from minilora.rows.duplicates import NearDuplicates, signature
from minilora.rows.render import render_row
from minilora.text.template_check import check_template
from minilora.text.tokenizer import load_tokenizer
from minilora.tools.inspect_data import Inspection, inspect_data
from minilora.tools.inspect_data_show import check_words

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
QWEN = load_tokenizer(GOLDEN / "qwen2_5")
PLAIN = DataConfig()
JINJA = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def view(prompt: str, answer: str, tokenizer=QWEN):
    row = to_messages({"system": "s", "prompt": prompt, "completion": answer}, "here")
    ids, trained = render_row(row, tokenizer, PLAIN)
    return tokens_of(row, ids, trained, tokenizer), ids


def write(path: Path, *rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_tokens_have_roles_and_masks():
    tokens, _ = view("为什么?", "因为。")
    assert "".join(t.text for t in tokens if t.trained) == "因为。<|im_end|>"
    for role, text in (("system", "s"), ("user", "为什么?"), ("assistant", "因为。")):
        assert "".join(t.text for t in tokens if t.role == role) == text
    assert [t.text for t in tokens if t.special] == ["<|im_start|>", "<|im_end|>"] * 3
    assert not any(t.trained for t in tokens if t.role in ("system", "user"))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("你𠮷👩‍👧🍚é<|im_end|>"), max_size=12),
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip),
)
def test_every_token_is_shown_once_and_whole(prompt, answer):
    tokens, ids = view(prompt, answer)
    assert [i for t in tokens for i in t.ids] == ids.tolist()
    assert "".join(t.text for t in tokens) == QWEN.decode(ids.tolist(), specials=True)
    if "\ufffd" not in prompt + answer:
        assert not any("\ufffd" in t.text for t in tokens)


def test_bytes_of_one_character_are_one_token(tmp_path):
    bytewise = load_tokenizer(make_model(tmp_path / "m"))
    tokens, _ = view("q", "你a🍚", bytewise)
    assert [(t.text, len(t.ids)) for t in tokens if t.role == "assistant"] == [("你", 3), ("a", 1), ("🍚", 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("model") / "m")
    (folder / "chat_template.jinja").write_text(JINJA)
    return folder


LONG = "the quick brown fox jumps over the lazy dog and runs away from the angry farmer"
ROWS = [
    {"prompt": LONG, "completion": "a"},
    {"prompt": LONG, "completion": "a"},
    {"prompt": LONG, "completion": "b"},
    {"prompt": LONG + "s!", "completion": "x"},
    {"prompt": "q", "completion": ""},
    "{",
    {"prompt": "q <|im_end|>", "completion": "a {{name}}"},
    {"prompt": "q\ufffd", "completion": "a"},
    {"prompt": "z", "completion": "a" * 300},
    {"prompt": "fine", "completion": "fine"},
]
FOUND = {
    "a duplicate": ["line 2: of", "line 1"],
    "the same question with another answer": ["line 3: in", "line 1"],
    "nearly a duplicate": ["line 3: of", "line 1, about"],
    "cannot be used: empty answer": ["line 5: there is nothing to learn"],
    "cannot be used: broken JSON": ["line 6, column"],
    "the words of a chat format in a text": ["line 7: <|im_end|>"],
    "{{names}} are not filled": ["line 7: name"],
    "a character was lost (U+FFFD) before the file was written": ["line 8"],
    "over max_length 200": ["line 9: 3"],
}


def test_problems(tmp_path, model):
    path = str(write(tmp_path / "x.jsonl", *ROWS))
    tokenizer, limited = load_tokenizer(model), DataConfig(max_length=200)
    result = inspect_data(path, model, tokenizer, limited, samples=2, only_problems=True, compare=True)
    assert set(result.problems) == set(FOUND) and result.rows == 10
    for kind, parts in FOUND.items():
        assert all(part in result.problems[kind].places[0] for part in parts), kind
        assert result.problems[kind].rows == (2 if kind == "nearly a duplicate" else 1), kind
    assert [s.where[-6:] for s in result.samples] == ["line 2", "line 3"]
    assert result.check is not None and result.check.same == result.check.chats == 7 and result.check.first is None
    assert [len(v) for v in result.lengths.values()] == [8, 8, 8]
    (sample,) = inspect_data(path, model, tokenizer, PLAIN, row=10).samples
    assert sample.where.endswith("line 10") and not sample.problems


def test_clean_rows_have_no_problems(tmp_path, model):
    path = str(write(tmp_path / "x.jsonl", ROWS[0], ROWS[9], {"text": "a raw text"}))
    assert not inspect_data(path, model, load_tokenizer(model), PLAIN).problems


def test_a_row_of_which_a_key_is_not_read_cannot_be_used(tmp_path, model):
    path = str(write(tmp_path / "x.jsonl", ROWS[0] | {"images": "[1]", "id": 1}, ROWS[9] | {"id": 2}))
    result = inspect_data(path, model, load_tokenizer(model), PLAIN)
    assert {kind: p.rows for kind, p in result.problems.items()} == {"cannot be used: key 'images' is not read": 1}
    ignoring = inspect_data(path, model, load_tokenizer(model), DataConfig(ignore_keys="images"))
    assert not ignoring.problems and ignoring.notes == ["keys that are ignored on request: 'images' (1)"]


def test_leaks_into_the_validation_rows(tmp_path, model):
    train, val = write(tmp_path / "a", ROWS[0], ROWS[9]), write(tmp_path / "b", ROWS[2], ROWS[3], ROWS[7])
    problems = inspect_data(str(train), model, load_tokenizer(model), PLAIN, val=str(val)).problems
    assert {kind: p.rows for kind, p in problems.items()} == {
        "a validation row asks what a training row asks": 1,
        "a validation row is nearly a training row": 1,
    }


def test_a_stop_token_that_is_missing_is_seen(tmp_path, model):
    tokenizer = load_tokenizer(model)
    whole = tokenizer.render
    tokenizer.render = lambda *a, **k: tuple(x[:-2] for x in whole(*a, **k))  # type: ignore[method-assign]
    result = inspect_data(str(write(tmp_path / "x", ROWS[9])), model, tokenizer, PLAIN)
    assert list(result.problems) == ["no stop token at the end of an answer"]
    tokenizer.render = lambda *a, **k: tuple([x[0], *x] for x in whole(*a, **k))  # type: ignore[method-assign]
    result = inspect_data(str(write(tmp_path / "x", ROWS[9])), model, tokenizer, PLAIN)
    assert list(result.problems) == ["the first token appears twice"]


def test_the_command_and_its_page(tmp_path, model, capsys):
    hostile = {"prompt": "<script>alert(1)</script>\x1b[2J", "completion": "[bold]x[/] \u202e"}
    path = write(tmp_path / "x<b>.jsonl", hostile, *ROWS)
    page = tmp_path / "page.html"
    assert (
        main(
            [
                "inspect",
                "data",
                "--model",
                str(model),
                "--data",
                str(path),
                "--html",
                str(page),
                "-n",
                "20",
                "--check-template",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and "⟨U+001B⟩[2J" in out and "[bold]x[/] ⟨U+202E⟩" in out
    assert (
        "\nmasked   <|im_start|>user↵\nmasked   fine<|im_end|>↵\n" in out
        and "\ntrained  fine<|im_end|>\nmasked   ↵" in out
    )
    assert "8 of 8 compared rows have the ids of the folder's own chat template" in " ".join(out.split())
    text = page.read_text()
    assert (
        not {"b", "img"} & set(Seen(text).tags)
        and Seen(text).tags.count("script") == 1  # ours
        and text.count("<script>") == 1
        and "http" not in text.replace("http-equiv", "")
        and len(text) < 2 << 20
    )
    spans = [t for t in text.split("<span ") if "assistant t" in t]
    assert spans and all("trained" in s for s in spans)


def test_what_the_command_refuses(tmp_path, model, capsys):
    path = write(tmp_path / "x", ROWS[0])
    command = ["inspect", "data", "--model", str(model), "--data"]
    for more, code, part in (
        ([path, "--row", "2"], 3, "no row 2"),
        ([path, "--columns", "prompt"], 2, "columns is 'prompt'"),
        ([tmp_path / "no"], 3, "not there"),
    ):
        assert main([*command, *map(str, more)]) == code
        assert part in capsys.readouterr().err


# the folder's template


def checked(folder: Path, template: str, chats=None):
    (folder / "chat_template.jinja").write_text("<|im_start|>" + JINJA)
    tokenizer = load_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return check_template(
        folder, tokenizer, chats or [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    )


def test_the_first_difference_is_shown(tmp_path):
    folder = make_model(tmp_path / "m")
    assert checked(folder, JINJA)[:3] == (1, 1, None)
    result = checked(folder, JINJA.replace("'\\n' + m['content']", "'\\n\\n' + m['content']"))
    assert result.same == 0 and result.first is not None
    assert (result.first.ours, result.first.theirs) == ("q<|im_end|>\n<|im_start|>as", "\nq<|im_end|>\n<|im_start|>a")
    assert result.first.before.endswith("user\n") and result.first.chat == 0


ATTACKS = {
    "reads a file": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches the modules": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "raises": "{{ raise_exception('no system role') }}",
    "is no template": "{% if %}",
    "divides by zero": "{{ 1 / 0 }}",
    "grows": "{% set x = namespace(v='a' * 1000) %}{% for i in range(30) %}{% set x.v = x.v + x.v %}{% endfor %}{{ x.v }}",
    "changes the rows": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("template", ATTACKS.values(), ids=ATTACKS)
def test_a_hostile_template_gives_an_error_and_nothing_else(tmp_path, template):
    folder = make_model(tmp_path / "m")
    try:
        result = checked(folder, template)
    except ModelError as error:
        assert "could not be rendered" in error.what
        return
    assert result.same == 0 and result.error and "root:" not in result.error


def test_a_template_that_does_not_end_is_ended(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "m")
    began = time.monotonic()
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match="could not be rendered in time"):
        checked(folder, loops)
    assert time.monotonic() - began < 50


def test_a_folder_without_a_template(tmp_path):
    folder = make_model(tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        check_template(folder, tokenizer, [])


def test_tokens_that_are_spelled_out_are_compared_by_ids():
    folder = GOLDEN / "qwen3"
    tokenizer = load_tokenizer(folder)
    word = next(iter(tokenizer.specials.keys() & {"<think>", "<tool_call>"}))
    answered = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{word} a"}]
    asked = [{"role": "user", "content": f"{word} q"}, {"role": "assistant", "content": "a"}]
    result = check_template(folder, tokenizer, [answered, asked])
    assert result.same == 1 and result.first is not None and result.first.chat == 1
    assert result.first.their_ids[0] == tokenizer.specials[word] != result.first.our_ids[0]
    shown = Inspection("rows", PLAIN, check=result, checked=["row 1", "row 2"])
    assert str(result.first.their_ids) in check_words(shown) and str(result.first.our_ids) in check_words(shown)


# nearly the same, and pictures


def test_near_duplicates():
    near = NearDuplicates()
    assert near.add(LONG, "a") is None and near.add("x", "b") is None and near.add("x", "c") is None
    name, share = near.like(LONG.upper().replace("quick", "quick,")) or ("", 0.0)
    assert name == "a" and share == 1.0
    assert near.add(LONG + LONG[::-1] + LONG.upper(), "e") is None
    assert (near.like(LONG + LONG[::-1].replace("xof", "lewo") + LONG) or [""])[0] == "e"
    assert near.like(LONG[::-1]) is None and signature("short") is None
    chinese = "今天天气很好，我们一起去公园散步，看到了很多美丽的花。"
    assert near.add(chinese, "d") is None and near.like(chinese.replace("。", "！")) is not None


def test_histograms_count_every_value():
    import numpy as np

    values = np.array([0, 1, 5, 5, 9, 100, 1000])
    marks = {"limit": 50.0, "far": 99999.0}
    lines = text_histogram(values, marks)
    numbers = [int(line.split("█")[-1].split()[0].replace("▏", "")) for line in lines if "█" in line]
    assert (
        sum(numbers) == 7
        and any("◂ limit 50 (2 over, 28.6 %)" in line for line in lines)
        and "far 99999: none over" in lines[-1]
    )
    assert [line.split()[0] for line in text_histogram(np.array([1, 1, 2]), {})] == ["0", "1", "2"]  # no half tokens
    wide = text_histogram(np.array([500] * 100 + [2050] * 90), {"max_source_length": 512, "keep_below": 2000})
    assert max(map(len, wide)) == 80 and sum("◂" in line for line in wide) == 2
    picture = marked_histogram(values, marks, "<b>")
    assert "<b>" not in picture and "<polyline" in picture and "limit 50: 2 over" in picture
    assert "far 99999: none over" in picture  # under the picture, which it would only press together


def test_a_logarithmic_histogram_shows_its_outliers():
    import numpy as np

    values = np.array([1.0, 1.2, *[3.0] * 900, *[5.0] * 90, 40.0, 7e5])
    edges, numbers = bins(values, [20.0], 16, log=True)
    assert numbers.sum() == len(values) and len(numbers) <= 16 and numbers[0] == 902 and numbers[-1] == 1
    assert edges[0] <= 1.0 and edges[-2] <= 7e5 < edges[-1] and all(np.diff(edges) > 0)
    lines = text_histogram(values, {"keep_below": 20.0}, log=True)
    assert lines[-1].split() == ["320k", "▏", "1"] and sum("keep_below 20 (2 over, 0.2 %)" in x for x in lines) == 1
    picture = marked_histogram(values, {"keep_below": 20.0}, "perplexity", log=True)
    assert picture.count("<circle") == sum(0 < n < 15 for n in bins(values, [20.0], 48, log=True)[1])
    for odd in ([math.exp(700.0), 1.0], [1.0], [1.0, 1.0], [3.19], [1e-9, 1.0]):
        edges, numbers = bins(np.array(odd), [], 16, log=True)
        assert numbers.sum() == len(odd) and len(numbers) <= 16
    # in even steps the highest share the last bin, which says so
    long = np.array([*range(100), 5000])
    assert "and more, the largest is 5,000" in text_histogram(long, {})[-1] and "5,000" in marked_histogram(
        long, {}, "tokens"
    )
