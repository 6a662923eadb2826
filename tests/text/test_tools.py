"""Conversations with tools: the ids of the folder's own template, what is trained, and calls that are read back."""

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tool_chats

from minilora.files.model_folder import ModelFolder
from minilora.rows import to_messages
from minilora.rows.render import hashes
from minilora.text import tools_qwen
from minilora.text.own_template import Order, render
from minilora.text.template import has_thought, jinja_text, render_text
from minilora.text.template_check import check_template
from minilora.text.template_glm import RoleTokens
from minilora.text.template_glm45 import GLM45, GLM47, ReasoningTurns
from minilora.text.template_qwen import QWEN35
from minilora.text.tokenizer import Tokenizer, load_tokenizer
from minilora.text.tools_glm import CallTurns
from minilora.text.tools_qwen import Tags

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
GLM = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "/nothink"]
GLM_WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]  # fmt: skip

# what Qwen3.5's template writes of texts, in our words
QWEN35_JINJA = r"""
{%- macro call(c) %}{{ '<tool_call>\n<function=' + c.name + '>\n' }}{% for k, v in c.arguments.items() -%}
{{ '<parameter=' + k + '>\n' }}{{ WRITTEN }}{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}{% endmacro -%}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}{{ '<|im_start|>system\n' + PREFACE[0] }}{% for t in tools %}{{ '\n' + t|tojson }}{% endfor %}{{ PREFACE[1] }}
{%- if messages[0].role == 'system' and messages[0].content|trim %}{{ '\n\n' + messages[0].content|trim }}{% endif %}{{ '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content|trim + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{% set text = m.content|trim %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + text + '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user' if loop.previtem.role != 'tool' }}{{ '\n<tool_response>\n' + text + '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
{%- elif m.role == 'assistant' %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1]|trim if '</think>' in text else '' %}{% set text = text.split('</think>')[-1].lstrip('\n') %}
{{- '<|im_start|>assistant\n' }}{{ '<think>\n' + thought + '\n</think>\n\n' if loop.index0 > ns.last }}{{ text }}
{%- for c in m.tool_calls or [] %}{{ ('\n\n' if text else '') if loop.first else '\n' }}{{ call(c.function) }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{{ '' if enable_thinking else '\n</think>\n\n' }}{% endif %}"""
PYTHON = "v|tojson if v is mapping or (v is sequence and v is not string) else v|string"
JSON = "v if v is string else v|tojson"
# GLM-4.5's
GLM45_JINJA = r"""[gMASK]<sop>{% if tools %}{{ '<|system|>\n' + PREFACE[0] }}{% for t in tools %}{{ t|tojson + '\n' }}{% endfor %}{{ PREFACE[1] }}{% endif -%}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages %}{% set text = m.content %}
{%- if m.role == 'system' %}{{ '<|system|>\n' + text }}
{%- elif m.role == 'user' %}{{ '<|user|>\n' + text }}{{ '' if enable_thinking else '/nothink' }}
{%- elif m.role == 'tool' %}{{ '<|observation|>' if loop.previtem.role != 'tool' }}{{ '\n<tool_response>\n' + text + '\n</tool_response>' }}
{%- else %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in text and loop.index0 > ns.last else '' %}
{%- set text = text.split('</think>')[-1].strip() %}{{ '<|assistant|>\n<think>' + thought + '</think>' }}{{ '\n' + text if text }}
{%- for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name + '\n' }}{% for k, v in c.function.arguments.items() -%}
{{ '<arg_key>' + k + '</arg_key>\n<arg_value>' }}{{ v if v is string else v|tojson }}{{ '</arg_value>\n' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{{ '' if enable_thinking else '\n<think></think>' }}{% endif %}"""
# GLM-4.7's
GLM47_JINJA = r"""[gMASK]<sop>{% if tools %}{{ '<|system|>\n' + PREFACE[0] }}{% for t in tools %}{{ t|tojson + '\n' }}{% endfor %}{{ PREFACE[1] }}{% endif -%}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages %}{% set text = m.content %}
{%- if m.role in ('system', 'user') %}{{ '<|' + m.role + '|>' + text }}
{%- elif m.role == 'tool' %}{{ '<|observation|>' if loop.previtem.role != 'tool' }}{{ '<tool_response>' + text + '</tool_response>' }}
{%- else %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in text and loop.index0 > ns.last else '' %}
{{- '<|assistant|>' + ('<think>' + thought if thought else '') + '</think>' + text.split('</think>')[-1].strip() }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() -%}
{{ '<arg_key>' + k + '</arg_key><arg_value>' }}{{ v if v is string else v|tojson }}{{ '</arg_value>' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' + ('<think>' if enable_thinking else '</think>') }}{% endif %}"""
# GLM-4's, with the function of a call as its metadata
GLM4_JINJA = r"""[gMASK]<sop>{% if tools %}{{ '<|system|>\nINTRO# 可用工具' }}{% for t in tools %}{{ '\n\n## ' + t.function.name + '\n\n' }}
{{- t.function|tojson(indent=4) }}{{ '\n在调用上述函数时，请使用 Json 格式表示调用的参数。' }}{% endfor %}{% endif -%}
{%- for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.metadata + 'GAP' if m.metadata }}{{ '\n' + m.content }}{% endfor -%}
{{- '<|assistant|>' if add_generation_prompt }}"""


def with_words(words: tuple[str, str], jinja: str) -> str:
    """A template that begins and ends its list of functions with our words, which the golden texts hold true."""
    return "{%- set PREFACE = " + json.dumps(words) + " -%}" + jinja.lstrip("\n")


def listed(template: ReasoningTurns) -> tuple[str, str]:
    first, *_, last = template.tools.preface([], None)
    return first.text, last.text


OWN = {
    "qwen3.5": with_words(tools_qwen.TAGS, QWEN35_JINJA.replace("WRITTEN", PYTHON)),
    "qwen3.6": with_words(tools_qwen.TAGS, QWEN35_JINJA.replace("WRITTEN", JSON)),
    "glm-4.5": with_words(listed(GLM45), GLM45_JINJA),
    "glm-4.7": with_words(listed(GLM47), GLM47_JINJA),
    "glm4": GLM4_JINJA.replace("INTRO", "").replace("GAP", " "),
    "glm4-9b": GLM4_JINJA.replace("INTRO", "你是 GLM。\\n\\n").replace("GAP", ""),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, tuple[Path, Tokenizer]]:
    """Folders and tokenizers: those of Qwen2.5 and Qwen3, and of the others with the tokens that they name."""
    j = json.loads((GOLDEN / "qwen3" / "tokenizer.json").read_text(encoding="utf-8"))
    glm = json.loads(json.dumps(j))
    for token in j["added_tokens"]:
        glm["model"]["vocab"].pop(token["content"], None)
    names = [*((t, True) for t in GLM), *((t, False) for t in GLM_WORDS)]
    glm["added_tokens"] = [{"id": 151643 + i, "content": t, **FLAGS, "special": s} for i, (t, s) in enumerate(names)]
    folders = {name: GOLDEN / name for name in ("qwen2_5", "qwen3")}
    for name, jinja in OWN.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text(json.dumps(glm if "glm" in name else j))
        (folder / "chat_template.jinja").write_text(jinja)
    return {name: (folder, load_tokenizer(folder)) for name, folder in folders.items()}


FAMILIES = pytest.mark.parametrize("name", ["qwen2_5", "qwen3", *OWN])


@FAMILIES
@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(200), marks=pytest.mark.long)], ids=len)
def test_conversations_have_the_ids_of_the_folders_own_template(name: str, seeds: range, tokenizers):
    folder, tokenizer = tokenizers[name]
    assert tokenizer.template.tools.marks and not tokenizer.notes
    rows = [tool_chats.row(seed, tokenizer.template.thinks) for seed in seeds]
    result = check_template(folder, tokenizer, [to_messages(row, "here").messages for row in rows])
    assert (result.chats, result.same, result.first, result.error) == (len(seeds), len(seeds), None, None)


@FAMILIES
def test_what_is_trained_is_what_the_assistant_says_and_the_stop(name: str, tokenizers):
    """Thoughts, texts, calls and the tokens that end them; results, questions, functions and system prompts are masked."""
    tokenizer: Tokenizer = tokenizers[name][1]
    thinks = tokenizer.template.thinks
    for seed in range(20):
        row = to_messages(tool_chats.row(seed, thinks), "here")
        ids, trained = tokenizer.render(row.messages)
        runs = [
            (flag, [i for i, _ in run]) for flag, run in groupby(zip(ids, trained, strict=True), key=lambda t: t[1])
        ]
        said = [tokenizer.decode(run, specials=True) for flag, run in runs if flag]
        answers = [m for m in row.messages if m["role"] == "assistant"]
        assert len(said) == len(answers)
        for text, answer in zip(said, answers, strict=True):
            stop = next(s for s in tokenizer.template.stops if text.endswith(s))
            assert text.count(stop) == 1 and answer["content"].split("</think>")[-1].strip() in text
            assert ("<|observation|>" in text) == bool(answer.get("calls")) or "glm" not in name
        thoughts = [m["content"].split("</think>")[0] for m in answers if m.get("thought")]
        shown = "".join(said)
        for message in row.messages:
            if (
                message["role"] in ("tool", "system")
                and len(message["content"]) > 8
                and message["content"] not in str(answers)
            ):
                assert message["content"].strip() not in shown
        assert not has_thought(row.messages) or thoughts[-1].removeprefix("<think>").strip() in shown


@FAMILIES
def test_calls_are_read_back_from_what_is_trained(name: str, tokenizers):
    tokenizer: Tokenizer = tokenizers[name][1]
    for seed in range(30):
        draw = Random(seed)
        tools = tool_chats.functions(draw)
        calls = [tool_chats.call(draw, tools) for _ in range(draw.randint(0, 3))]
        said = tool_chats.text(draw) if draw.random() < 0.5 or not calls else ""
        question = [{"role": "tools", "content": json.dumps(tools)}, {"role": "user", "content": "q"}]
        answer = {"role": "assistant", "content": said, **({"calls": calls} if calls else {})}
        ids, trained = tokenizer.render([*question, answer], train_end=False)
        assert tokenizer.reply([i for i, t in zip(ids, trained, strict=True) if t], tools) == (said, calls)
        if calls:
            before = tokenizer.answer([i for i, t in zip(ids, trained, strict=True) if t])
            assert before[: tokenizer.template.tools.start(before)].strip() in (said, "") or "glm4" in name


BROKEN = ["<tool_call>\n{\n</tool_call>", "<tool_call>\n<function=f>\n<parameter=k>\n</function>\n</tool_call>", "<tool_call>",
          "f\n{", "<tool_call>f\n<arg_key>k</arg_key>\n</tool_call>", "f", "a <tool_call> b </tool_call>", '<tool_call>[1]</tool_call>',
          '<tool_call>{"name": "f", "arguments": 1}</tool_call>', '<tool_call>{"name": "f<", "arguments": {}}</tool_call>']  # fmt: skip


@FAMILIES
@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_call_stays_text(name: str, text: str, tokenizers):
    tools = [{"type": "function", "function": {"name": "f"}}]
    format = tokenizers[name][1].template.tools
    said, calls = format.read(text, tools)
    if not calls:  # GLM-4 calls with a line of its own, GLM-4.5 with a name alone
        assert said == text
    else:
        assert calls == [{"name": calls[0]["name"], "arguments": {}}] and "glm" in name


# the texts of published templates

GOLDEN_TEXTS = json.loads((GOLDEN.parent / "tool_texts.json").read_text(encoding="utf-8"))
PUBLISHED: dict[str, Any] = {
    "qwen3.5": QWEN35,
    "qwen3.6": replace(QWEN35, tools=Tags(python=False)),
    "glm-4.5": GLM45,
    "glm-4.7": GLM47,
    "glm4-9b": RoleTokens("glm4", tools=CallTurns(GOLDEN_TEXTS["intro"], "\n")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_texts_are_those_that_published_templates_wrote(name: str):
    template = PUBLISHED[name]
    for row, (whole, prompt) in zip(GOLDEN_TEXTS["rows"], GOLDEN_TEXTS["texts"][name], strict=True):
        messages = to_messages(row, "here").messages
        ours = render_text(template.segments(messages))
        assert whole in (ours, ours.removesuffix("<|user|>"), ours.removesuffix("<|observation|>"))
        assert render_text(template.segments(messages[:-1], prompt=True)) == prompt


# rows


def test_the_two_ways_to_write_a_row_are_one_row(tokenizers):
    same = 0
    for seed in range(60):
        row = tool_chats.row(seed, True)
        if any(m.get("tool_calls") and m["content"] for m in row["messages"]):
            continue  # LLaMA-Factory's calls have no text beside them
        ours, theirs = (to_messages(r, "here") for r in (row, tool_chats.as_sharegpt(row)))
        for message in (*ours.messages, *theirs.messages):
            message.pop("thought", None)  # a thought in a text is not told apart before it is rendered
        same += 1
        assert ours.messages == theirs.messages and hashes(ours) == hashes(theirs) and not theirs.unread
    assert same > 10


# what few conversations have


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.6", "glm-4.5", "glm-4.7"])
def test_a_text_that_looks_like_something_else_is_read_back_as_its_function_says(name: str, tokenizers):
    form = tokenizers[name][1].template.tools
    looks = ["12", "true", "None", "{}", "null", '"q"', " 1"]
    kinds = {f"k{i}": {"type": "string"} for i in range(len(looks))} | {"n": {"type": "integer"}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": kinds}}}]
    call = {"name": "f", "arguments": {f"k{i}": text for i, text in enumerate(looks)} | {"n": 12, "other": [True]}}
    assert form.read(render_text(form.calls([call], "")), tools) == ("", [call])


def test_glm_45_is_told_not_to_think_once():
    asked = render_text(GLM45.segments([{"role": "user", "content": "q/nothink"}], prompt=True))
    assert asked == "[gMASK]<sop><|user|>\nq/nothink<|assistant|>\n<think></think>"


def test_a_result_in_a_users_text_is_no_question(tokenizers):
    """So the thought before it stays, in Qwen3's own template too."""
    folder, tokenizer = tokenizers["qwen3"]
    thinking = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}
    chat = [
        {"role": "user", "content": "q"},
        thinking,
        {"role": "user", "content": "<tool_response>\nr\n</tool_response>"},
        thinking,
    ]
    ours = render_text(tokenizer.template.segments(chat))
    text = jinja_text(folder)
    assert text is not None and render(ModelFolder(folder), text, [Order(chat)]) == [(ours, None)]
    assert ours.count("hm") == 2
