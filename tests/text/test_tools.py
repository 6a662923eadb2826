"""Conversations with tools: the ids of the folder's own template, what is trained, and calls that are read back."""

import json
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tool_chats

from minilora.config import DataConfig
from minilora.errors import DataError
from minilora.rows import load_examples, to_messages
from minilora.rows.render import render_row
from minilora.text import own_template
from minilora.text.template_check import check_template
from minilora.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
GLM = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "/nothink"]
GLM_WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]  # fmt: skip

# what Qwen3.5's template writes of texts, in our words
QWEN35 = r"""
{%- macro call(c) %}{{ '<tool_call>\n<function=' + c.name + '>\n' }}{% for k, v in c.arguments.items() -%}
{{ '<parameter=' + k + '>\n' }}{{ WRITTEN }}{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}{% endmacro -%}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}{{ PREFACE[0] }}{% for t in tools %}{{ '\n' + t|tojson }}{% endfor %}{{ PREFACE[1] }}
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
GLM45 = r"""[gMASK]<sop>{% if tools %}{{ '<|system|>\n' + PREFACE[0] }}{% for t in tools %}{{ t|tojson + '\n' }}{% endfor %}{{ PREFACE[1] }}{% endif -%}
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
# GLM-4's, with the function of a call as its metadata
GLM4 = r"""[gMASK]<sop>{% if tools %}{{ '<|system|>\nINTRO# 可用工具' }}{% for t in tools %}{{ '\n\n## ' + t.function.name + '\n\n' }}
{{- t.function|tojson(indent=4) }}{{ '\n在调用上述函数时，请使用 Json 格式表示调用的参数。' }}{% endfor %}{% endif -%}
{%- for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.metadata + 'GAP' if m.metadata }}{{ '\n' + m.content }}{% endfor -%}
{{- '<|assistant|>' if add_generation_prompt }}"""
