"""A folder's Jinja template, in a fork of the child process that renders them: it ends in time and in bounds, and touches nothing.

The verdict is a value if it wrote any of the chats; 4 if it refused all, or the child was stopped by its limits.
"""

import atexit
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from random import Random

from minilora.errors import ModelError
from minilora.files.strict_json import parse_json
from minilora.text.own_template import CHILD, PROBES, TOOL_PROBES, Order

from ..mutator import mutate as mutated

TOUCHED = 77  # as template_server.py

HERE = Path(__file__).parents[1]
CHATS = [
    order.variables
    for order in (Order(PROBES["several turns"]), Order(PROBES["thoughts"][:1], True), Order(TOOL_PROBES[1]))
]
SIGKILL, SIGXCPU = -9, -24
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ self.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}", "{{ messages | attr('__class__') }}", "{{ messages | map(attribute='__class__') | list }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}", "{{ '{0.__class__.__init__}'.format(1) }}", "{{ '%s' | format(1) }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}", "{{ messages.append(1) }}", "{{ joiner.__call__.__func__ }}",
    "{{ strftime_now('%' * 1000) }}", "{{ tojson.__wrapped__ }}", "{{ [1] | tojson(indent='\\x1b[2J') }}", "{{ 'x'.format_map({}) }}",
)  # fmt: skip
BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SEEDS = [
    BODY.encode(),
    b"{%- if tools %}{{ tools | tojson(indent=1) }}{% endif %}{% set ns = namespace(x=0) %}{% for m in messages[::-1] %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{% endfor %}",
    b"{% macro f(a, b='x') %}{{ a ~ b }}{% endmacro %}{{ f(1) }}{{ raise_exception('no') }}{% generation %}{{ eos_token }}{% endgeneration %}",
    b"{% for m in messages %}{% if m.content.split('</think>')[-1].strip() %}{{ loop.index0 }}{% continue %}{% endif %}{% break %}{% endfor %}{{ strftime_now('%Y') }}",
    *(escape.encode() for escape in ESCAPES),
]
WORDS = [*ESCAPES, "{{", "}}", "{%", "%}", "{#", "#}", "{%- ", "-%}", "for m in messages", "endfor", "if", "else", "endif", "set", "macro", "call", "filter", "block", "range(99)",
         "range(10**9)", "'a' * 10**9", "10**10**8", "'%1000000000d' % 1", "| tojson", "| map('upper')", "| groupby('role')", "| sort", "| join('x')", "| center(10**9)",
         "| indent(10**9)", "| batch(2)", "| urlize", "| wordwrap(1)", "loop", "recursive", "self", "namespace()", "caller()", "lipsum(9)", "dict(a=1)", "m.role", "messages", "not",
         "is defined", "is mapping", "~", "**", "//", "**kwargs", "*args", "\\u0000", "generation", "endgeneration", "continue"]  # fmt: skip


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-I", str(HERE / "template_server.py"), str(HERE), str(CHILD)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONUTF8": "1"}
    )
    atexit.register(server.communicate)  # which closes its input, and waits for its end
    return server


def prepare() -> None:
    target(b"")


def target(data: bytes) -> None:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    order = {"template": data.decode("utf-8", "replace"), "variables": {"eos_token": "<|im_end|>"}, "chats": CHATS}
    print(json.dumps(order), file=server.stdin, flush=True)
    status, said = json.loads(server.stdout.readline())
    assert status != TOUCHED, "the template touched something"
    if status in (3, SIGKILL, SIGXCPU):
        raise ModelError(f"ended with {status}")
    assert status == 0, f"ended with {status}"
    results = parse_json(said)
    assert len(results) == len(CHATS)
    for text, error in results:
        assert (text is None) != (error is None) and isinstance(text or error or "", str)
    if all(error for _, error in results):
        raise ModelError(results[0][1])


def mutate(data: bytes, random: Random, other: bytes) -> bytes:
    """As any bytes; a word of the language is put in more often than not."""
    if random.random() < 0.5:
        at, word = random.randint(0, len(data)), random.choice(WORDS).encode()
        data = data[:at] + word + data[at + random.choice((0, 0, 2, 8)) :]
    return mutated(data, random, WORDS, other)
