"""A process of its own that renders chats by a stranger's Jinja template: it can open no file, no socket, and not run long.

Run as a script by template_check.py. In: {"template", "chats", "variables"} as JSON on stdin. Out: a list with [text, null] or
[null, error] for each chat. Nothing of the engine is imported here.
"""

import datetime
import json
import resource
import sys
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY, SECONDS, TEXT = 512 << 20, 3, 16 << 20


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, with which a template of transformers marks what is trained: its inside."""

    tags = frozenset(("generation",))  # pyright: ignore[reportAssignmentType] a set that nothing changes

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    order = json.load(sys.stdin)
    environment = _environment()
    # a first template and a first error, for whatever else is imported when it is needed
    _render(
        environment, {"template": r"{{ '\N{DIGIT ONE}' | urlize | tojson }}{{ lipsum(1) }}{{ 1 / 0 }}", "chats": [{}]}
    )
    # what is open stays open, nothing else can be opened from here on: no file, no socket, no child
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (TEXT, TEXT))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    json.dump(_render(environment, order), sys.stdout)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a chat template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **more: json.dumps(
        value, ensure_ascii=False, indent=more.get("indent")
    )
    return environment


def _render(environment: Any, order: dict) -> list:
    try:
        template = environment.from_string(order["template"])
    except (TemplateError, RecursionError) as error:
        return [[None, str(error)[:300]]] * len(order["chats"])
    results, left = [], TEXT
    for chat in order["chats"]:
        try:
            text = template.render(**order.get("variables", {}), **chat)
            left -= len(text.encode())
            results.append([text, None] if left > 0 else [None, "the text grows too long"])
        except Exception as error:  # noqa: BLE001 a template can raise anything; it is told to the parent
            results.append([None, f"{type(error).__name__}: {error}"[:300]])
    return results


def _refuse(message: Any) -> None:
    raise TemplateError(str(message))


if __name__ == "__main__":
    main()
