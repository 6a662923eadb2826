"""The folder's own chat template: which built-in format is taken for it, what is told of the difference, and the adapter's own."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from tiny import make_model, make_rows

import minilora
from docs.demo_model.make_model import TEMPLATE
from minilora.__main__ import main
from minilora.demo.show import MODEL
from minilora.errors import ModelError
from minilora.files.model_folder import ModelFolder
from minilora.text import own_template
from minilora.text.own_template import Order, render
from minilora.text.template import jinja_text
from minilora.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
BODY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] != 'system' %}"
MATH = r"Please reason step by step, and put your final answer within \boxed{}."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def opened(folder: Path, jinja: str) -> Tokenizer:
    (folder / "chat_template.jinja").write_bytes(jinja.encode())
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("written", "prompt"),
    [
        ("{{ '<|im_start|>system\\nOne line.<|im_end|>\\n' }}", "One line."),
        ("{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}", "You are a helpful assistant"),
        ("{{ '<|im_start|>system\\n" + MATH.replace("\\", "\\\\") + "<|im_end|>\\n' }}", MATH),
        ("{{ '<|im_start|>system\\nTwo\\nlines.<|im_end|>\\n' }}", "Two\nlines."),
        ('{{ "<|im_start|>system\\nIt\'s <b>you</b>.<|im_end|>\\n" }}', "It's <b>you</b>."),
        ("{{ '<|im_start|>system\\nIt\\'s \"you\".<|im_end|>\\n' }}", 'It\'s "you".'),
        ("<|im_start|>system\r\nTwo\r\nlines.<|im_end|>\r\n", "Two\nlines."),
        ("{% set who = 'Archer' %}<|im_start|>system\nI am {{ who }}<|im_end|>\n", "I am Archer"),
        ("{{ '<|im_start|>system\\n你是助手。<|im_end|>\\n' }}", "你是助手。"),
        ("", None),
    ],
)
def test_the_default_system_prompt_is_what_jinja_writes(folder: Path, written: str, prompt: str | None):
    tokenizer = opened(folder, NO_SYSTEM + written + "{% endif %}" + BODY)
    assert tokenizer.template.default_system == prompt and not tokenizer.notes


@pytest.mark.parametrize("place", [GOLDEN / "qwen2_5", GOLDEN / "qwen3", MODEL], ids=lambda p: p.name)
def test_a_published_template_is_known_without_a_process_and_writes_what_is_known_of_it(place: Path, monkeypatch):
    with monkeypatch.context() as no_process:
        no_process.setattr(own_template, "render", None)
        known = load_tokenizer(place)
    monkeypatch.setattr(own_template, "PUBLISHED", {})
    found = load_tokenizer(place)
    assert found.template == known.template and not known.notes and not found.notes


DIFFERENT = {
    "another format": ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "is another format than"),
    "an empty prompt": (
        NO_SYSTEM.replace("!= 'system'", "!= 'system' or not messages[0]['content']")
        + "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + BODY,
        "an empty system prompt",
    ),
    "trims": (BODY.replace("m.content", "m.content | trim"), "blanks and line ends around a text"),
    "thoughts": (
        BODY.replace("m.content }}", "m.content.split('</think>')[-1] }}"),
        "chatml, which is used, in: thoughts;",
    ),
    "refuses": (BODY.replace("{% for", "{{ raise_exception('never') }}{% for"), "refuses every chat"),
    "one role": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + BODY,
        "a system prompt, several turns, an empty system prompt; it refuses the first",
    ),
    "opens otherwise": (BODY.replace("assistant\n{% endif %}", "assistant:\n{% endif %}"), "opens an answer otherwise"),
    "no line end": (BODY.replace("<|im_end|>\n", "<|im_end|>"), "is another format than"),
    "every chat": (
        BODY.replace("{{ m.content", "{{ '' if loop.last and m.role == 'assistant' else m.content"),
        "in: every chat",
    ),
}


@pytest.mark.parametrize(("jinja", "told"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_template_that_no_format_reproduces_is_told_in_one_line(folder: Path, jinja: str, told: str):
    tokenizer = opened(folder, jinja)
    note = tokenizer.notes["chat"]
    assert told in note and tokenizer.template.name in note and note.isprintable()


def test_the_texts_of_an_unknown_template_are_cached_and_a_bad_cache_is_no_error(
    folder: Path, cache_of_templates: Path, monkeypatch, tmp_path
):
    jinja = "{# mine #}" + NO_SYSTEM + "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + BODY
    before = set(cache_of_templates.glob("*"))
    first = opened(folder, jinja).template
    (made,) = set(cache_of_templates.glob("*")) - before
    with monkeypatch.context() as no_process:
        no_process.setattr(own_template, "render", None)
        assert opened(folder, jinja).template == first
    for broken in ("{", "[1]", "[]", "{}"):
        made.write_text(broken)
        assert opened(folder, jinja).template == first
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(own_template, "CACHE", tmp_path / "file" / "no folder")
    assert opened(folder, jinja).template == first


def test_without_jinja2_it_is_said_that_nothing_was_compared(folder: Path, monkeypatch):
    monkeypatch.setattr(own_template, "find_spec", lambda name: None)
    note = opened(folder, "{# other #}" + BODY).notes["chat"]
    assert "not compared" in note and "jinja2" in note
    assert not opened(folder, TEMPLATE).notes


def test_a_template_that_is_not_rendered_in_bounds_is_said(folder: Path, monkeypatch):
    monkeypatch.setattr(own_template, "CHILD", folder / "no such file")
    with pytest.raises(ModelError, match="in time and in bounds"):
        render(ModelFolder(folder), BODY, [Order([])])

    def stopped(*_):
        raise ModelError("it was stopped", "")

    monkeypatch.setattr(own_template, "_cached", stopped)
    tokenizer = opened(folder, "{# endless #}" + BODY)
    assert tokenizer.notes["chat"] == "chatml is used: it was stopped"


ERRORS = {
    "raise_exception('no system role')": "TemplateError: no system role",
    "1 / 0": "ZeroDivisionError: division by zero",
    "nothing.at.all": "UndefinedError: 'nothing' is undefined",
    "'a' | nofilter": "No filter named 'nofilter'.",
    "lipsum(1) | length // 0": "ZeroDivisionError: integer division or modulo by zero",
}


@pytest.mark.parametrize(("expression", "error"), ERRORS.items(), ids=ERRORS)
def test_an_error_of_a_template_is_shown_as_itself(folder: Path, expression: str, error: str):
    assert render(ModelFolder(folder), "{{ " + expression + " }}", [Order([])]) == [(None, error)]


def test_a_template_may_use_what_transformers_gives_it(folder: Path):
    text = "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}{{ '\\N{DIGIT ONE}' }}{{ [1] | tojson(indent=1) }}{{ eos_token }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    ((found, error),) = render(ModelFolder(folder), text, [Order([])])
    assert error is None and found is not None and found[:2] == "20" and found[4:] == "1[\n 1\n]<end>"


# an adapter's own


def test_an_adapters_own_template_is_used_and_told(folder: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert not load_tokenizer(folder, adapter).notes
    (adapter / "chat_template.jinja").write_text("{# another text, the same chats #}" + BODY)
    assert not load_tokenizer(folder, adapter).notes
    own = NO_SYSTEM + "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + BODY
    (adapter / "chat_template.jinja").write_text(own)
    tokenizer = load_tokenizer(folder, adapter)
    assert tokenizer.template.default_system == "Be kind." and "'Be kind.'" in tokenizer.notes["chat"]
    assert tokenizer.replaced == {"chat_template.jinja": own.encode()}
    (tmp_path / "key").write_text("{}")
    for name in (
        "tokenizer_config.json",
        "chat_template.jinja",
    ):  # what is merged into a folder is no link to anybody's file
        (adapter / name).unlink(missing_ok=True)
        (adapter / name).symlink_to(tmp_path / "key")
        with pytest.raises(ModelError, match="is a link to"):
            load_tokenizer(folder, adapter)
        (adapter / name).unlink()


def test_templates_in_two_places_or_without_a_default_are_told(folder: Path):
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": BODY + "other"}))
    assert "has another chat_template" in load_tokenizer(folder).notes["chat"]
    settings.write_text(json.dumps({"chat_template": BODY}))
    assert not load_tokenizer(folder).notes
    (folder / "chat_template.jinja").unlink()
    settings.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": BODY}]}))
    assert "none that is a text or is named default" in load_tokenizer(folder).notes["chat"]


def test_tokens_that_only_tokenizer_config_adds_are_there(folder: Path):
    tokens = {"258": {"content": "<|im_end|>", "special": True}, "259": {"content": "<call>", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_answer("<call>") == [259] and tokenizer.encode("<call>") != [259] and tokenizer.size == 260
    assert tokenizer.decode([259, 258], specials=True) == "<call><|im_end|>"


def test_an_adapters_own_tokens_are_used_and_told(folder: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(folder / "tokenizer.json", adapter)
    assert not load_tokenizer(folder, adapter).notes
    j = json.loads((adapter / "tokenizer.json").read_text())
    j["added_tokens"].append({**j["added_tokens"][-1], "id": 259, "content": "<call>", "special": False})
    (adapter / "tokenizer.json").write_text(json.dumps(j))
    tokenizer = load_tokenizer(folder, adapter)
    assert (
        tokenizer.encode_answer("<call>") == [259]
        and "1 tokens that the base has not: '<call>'" in tokenizer.notes["tokens"]
    )
    assert set(tokenizer.replaced) == {"tokenizer.json"}


def test_a_published_hash_is_the_hash_of_the_text():
    text = jinja_text(GOLDEN / "qwen2_5")
    assert text is not None and hashlib.sha256(text.encode()).hexdigest() in own_template.PUBLISHED


def test_every_command_with_an_adapter_tells_and_uses_its_own_template(folder: Path, tmp_path: Path, capsys):
    model, adapter, rows = minilora.load_model(folder), tmp_path / "adapter", make_rows(tmp_path / "rows.json")
    minilora.add_lora(model, r=2)
    minilora.save_adapter(model, adapter)
    own = NO_SYSTEM + "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + BODY
    (adapter / "chat_template.jinja").write_text(own)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    both = ["--model", str(folder), "--adapter", str(adapter)]
    for words in (
        ["chat", "--prompt", "hi", "--max-tokens", "2"],
        ["eval", "--data", str(rows)],
        ["data", "score", "--data", str(rows)],
        ["predict", "--data", str(rows), "--output", str(tmp_path / "p"), "--max-tokens", "2"],
        ["merge", "--output", str(tmp_path / "m")],
    ):
        command = words[:2] if words[0] == "data" else words[:1]
        assert main([*command, *both, *words[len(command) :]]) == 0
        said = capsys.readouterr().out
        assert "chat  " in said and "'Be kind.' by the adapter's own chat template; the base has chatml" in said
    merged = load_tokenizer(tmp_path / "m")
    assert merged.template.default_system == "Be kind." and not merged.notes


def test_a_run_tells_of_the_folders_template_and_keys(tmp_path: Path, capsys):
    folder = make_model(tmp_path / "model", my_key=1)
    (folder / "chat_template.jinja").write_text(DIFFERENT["trims"][0])
    rows = make_rows(tmp_path / "rows.json")
    words = ["--model", str(folder), "--data", str(rows), "--output", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(["train", *words]) == 0
    said = capsys.readouterr().out
    assert "'my_key'" in said and "blanks and line ends" in said
    assert main(["inspect", "model", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "'my_key'" in said and "blanks and line ends" in said


QWEN35 = (
    "{% for m in messages %}{% set text = m.content|trim %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1]|trim %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% if not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)


def test_qwen35_opens_a_thought_or_has_it_whole_and_empty(folder: Path):
    j = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    j["added_tokens"] += [{"id": 259 + i, "content": t, **flags} for i, t in enumerate(("<think>", "</think>"))]
    (folder / "tokenizer.json").write_text(json.dumps(j))
    tokenizer = opened(folder, QWEN35)
    assert tokenizer.template.name == "qwen3.5" and not tokenizer.notes

    def told(answer: str) -> tuple[str, str]:
        ids, mask = tokenizer.render([{"role": "user", "content": " q\n"}, {"role": "assistant", "content": answer}])
        parts = [[i for i, m in zip(ids, mask, strict=True) if bool(m) is trained] for trained in (False, True)]
        return tuple(tokenizer.decode(part, specials=True) for part in parts)  # pyright: ignore[reportReturnType]

    start = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert told(" a ") == (start + "\n</think>\n\n\n", "a<|im_end|>")
    assert told("<think>\n hm\n</think>\n\na") == (start + "\n", "hm\n</think>\n\na<|im_end|>")
