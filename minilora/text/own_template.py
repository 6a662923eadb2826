"""A folder's own chat template and the built-in formats: which one writes the same chats, and in what it differs if none does.

Published templates are known by the hash of their text. Any other writes short conversations in a process without rights
(jinja_child.py), and the built-in format that writes most of them alike is taken. What it wrote is kept in the user's cache
folder, under a hash of all that it follows from.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelError, quote
from ..files.atomic import write_file
from ..files.model_folder import ModelFolder
from ..files.strict_json import parse_json
from .template import Call, Message, Template, ToolFormat, has_thought, render_text
from .template_glm import CHATGLM3
from .template_glm45 import GLM45
from .template_qwen import DEEPSEEK_R1, QWEN3, QWEN25, QWEN35, ChatML
from .tools_glm import CallTurns
from .tools_qwen import Hermes, Tags

CHILD = Path(__file__).parent / "jinja_child.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "minilora" / "templates"
CACHED = 1 << 20  # characters
THOUGHT = "<think>\nhm\n</think>\n\n"


def _chat(*contents: str, system: str | None = None) -> list[Message]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _calling(text: str, calls: list[Call]) -> Message:
    return {"role": "assistant", "content": text, "calls": calls}


# what each conversation tries, and the conversation
PROBES: dict[str, list[Message]] = {
    "a chat without a system prompt": _chat("q", "a"),
    "a system prompt": _chat("q", "a", system="s"),
    "several turns": _chat("q", "a", "r", "b", system="s"),
    "an empty system prompt": _chat("q", "a", system=""),
    "thoughts": _chat("q", f"{THOUGHT}a", "r", f"{THOUGHT}b"),
    "blanks and line ends around a text": _chat(" q\n", "\n\na \n"),
}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"k": {"type": "string"}}}}
TOOLS = {
    "role": "tools",
    "content": json.dumps([{"type": "function", "function": FUNCTION | {"name": n}} for n in "fg"]),
}
CALLS = [
    {"name": "f", "arguments": {"k": "v\nw", "é": 1, "t": True, "n": None, "o": {"x": [1.5]}}},
    {"name": "g", "arguments": {}},
]
RESULTS = [{"role": "tool", "content": text} for text in ("r", "{}")]
FORMS = (ToolFormat(), CallTurns())  # that is, messages of OpenAI and of GLM-4
# conversations with tools: each has to be written alike, or the way in which the template writes them is not known
TOOL_PROBES: list[list[Message]] = [
    [TOOLS, *_chat("q", "a")],
    [TOOLS, *_chat("q", system="s"), _calling("t", CALLS), *RESULTS, *_chat("r", "a")[1:]],
    [TOOLS, *_chat("q"), _calling("", CALLS[:1]), *RESULTS[:1], *_chat("r", "a")[1:]],
]


class Order(NamedTuple):
    """One rendering: a conversation, whether the assistant's next turn is opened, whether thinking is asked for, and how tools are given."""

    messages: list[Message]
    prompt: bool = False
    thinking: bool = False
    form: ToolFormat = FORMS[0]

    @property
    def variables(self) -> dict[str, Any]:
        """What a template is given."""
        more = {"add_generation_prompt": self.prompt, "enable_thinking": self.thinking}
        return {**self.form.variables(self.messages), **more}


Rendered = tuple[str | None, str | None]  # the text, or why there is none


def choose(
    folder: ModelFolder, text: str | None, formats: Callable[[str | None], Sequence[Template]]
) -> tuple[Template, str | None]:
    """The built-in format for a folder whose chat template has that text, and what a user should know of how the two differ.

    formats(default system prompt) are the formats that the folder's tokens allow, the likeliest first.
    """
    likeliest = formats(None)[0]
    if text is None:
        return likeliest, None
    known = PUBLISHED.get(_hash(text))
    if known is not None and known.stops[0] == likeliest.stops[0]:  # it is of this folder's tokens
        return known, None
    if find_spec("jinja2") is None:
        told = f"{likeliest.name} is used; the folder's own template was not compared: jinja2 is not installed"
        return likeliest, told
    try:
        texts, with_tools = _texts_of_probes(folder, text)
    except ModelError as error:
        return likeliest, f"{likeliest.name} is used: {error.what}"
    unlike = {template: _unlike(template, texts) for template in formats(_default_system(texts))}
    # what the model is asked with matters most
    best = min(unlike, key=lambda t: (sum(u.prompt for u in unlike[t]), len(unlike[t]) / _compared(t)))
    return replace(best, tools=_tools_of(best, with_tools)), _words(best, unlike[best])


def _orders(messages: list[Message], form: ToolFormat = FORMS[0]) -> list[Order]:
    asked = messages[:-1]
    whole = Order(messages, False, has_thought(messages), form)
    return [whole, Order(asked, True, False, form), Order(asked, True, True, form)]


def _texts_of_probes(folder: ModelFolder, text: str) -> tuple[dict[str, list[Rendered]], list[list[Rendered]]]:
    """What a template makes of each probe, and of all probes with tools in each of the forms."""
    orders = [order for messages in PROBES.values() for order in _orders(messages)]
    with_tools = [_tool_orders(form) for form in FORMS]
    flat = iter(_cached(folder, text, [*orders, *chain(*with_tools)]))
    texts = {name: [next(flat) for _ in _orders(messages)] for name, messages in PROBES.items()}
    return texts, [[next(flat) for _ in orders] for orders in with_tools]


def _tool_orders(form: ToolFormat) -> list[Order]:
    return [order for messages in TOOL_PROBES for order in _orders(messages, form)]


def _tools_of(template: Template, texts: list[list[Rendered]]) -> ToolFormat:
    """The way in which a folder's template writes all probes with tools; none if it is not one that is known."""
    for form, told in zip(FORMS, texts, strict=True):
        for tools in template.tool_formats(told[0][0] or ""):
            format = replace(template, tools=tools)
            if all(_alike(format, order, theirs) for order, (theirs, _) in zip(_tool_orders(form), told, strict=True)):
                return tools
    return ToolFormat()


def _default_system(texts: dict[str, list[Rendered]]) -> str | None:
    """The system prompt that stands in a ChatML chat which was given none."""
    whole = texts["a chat without a system prompt"][0][0] or ""
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n<\|im_start\|>user\n", whole, re.DOTALL)
    return found[1] if found else None


class Unlike(NamedTuple):
    """A rendering that a template and a built-in format write in two ways."""

    probe: str
    prompt: bool
    ours: str
    theirs: str | None
    refused: str | None


def _unlike(template: Template, texts: dict[str, list[Rendered]]) -> list[Unlike]:
    """The renderings of probes that the format writes otherwise."""
    found = []
    for name, messages in PROBES.items():
        for order, (theirs, refused) in zip(_orders(messages), texts[name], strict=True):
            if not _alike(template, order, theirs):
                found.append(Unlike(name, order.prompt, _ours(template, order), theirs, refused))
    return found


def _ours(template: Template, order: Order) -> str:
    return render_text(template.segments(order.messages, order.prompt, order.thinking))


def _alike(template: Template, order: Order, theirs: str | None) -> bool:
    """Whether a format writes what a folder's template wrote, as far as the two can be compared."""
    if template.opens_thoughts and not order.prompt:
        return True  # a last answer has its thought here, which such templates leave out
    ours = _ours(template, order)
    # the token that closes the last turn is ours to learn; some templates leave it to the next turn
    return theirs == ours or (not order.prompt and theirs == ours.removesuffix(template.stops[0]))


def _compared(template: Template) -> int:
    """How many renderings are compared with a format's."""
    return sum(order.prompt or not template.opens_thoughts for m in PROBES.values() for order in _orders(m))


def _words(template: Template, unlike: list[Unlike]) -> str | None:
    """In what a folder's own template differs from the format that is used, and the first place where it does."""
    if not unlike:
        return None
    name, first = template.name, unlike[0]
    every = len(unlike) == _compared(template)
    if every and all(u.theirs is None for u in unlike):
        return f"{name} is used: the folder's own template refuses every chat ({quote(first.refused or '', 120)})"
    if every:
        told = f"the folder's own template is another format than {name}, which is used"
    elif all(u.prompt for u in unlike) and {u.probe for u in unlike} == set(PROBES):
        told = f"the folder's own template opens an answer otherwise than {name}, which is used"
    else:
        probes = list(dict.fromkeys(u.probe for u in unlike))
        where = "every chat" if len(probes) == len(PROBES) else ", ".join(probes)
        told = f"the folder's own template differs from {name}, which is used, in: {where}"
    if first.theirs is None:
        return f"{told}; it refuses the first ({quote(first.refused or '', 120)})"
    at = len(os.path.commonprefix([first.ours, first.theirs]))
    before, its, ours = first.ours[max(at - 20, 0) : at], first.theirs[at : at + 30], first.ours[at : at + 30]
    return f"{told}; after {quote(before)} it writes {quote(its)}, {name} {quote(ours)}"


def _cached(folder: ModelFolder, text: str, orders: list[Order]) -> list[Rendered]:
    """The texts of orders from the user's cache, or rendered and put there; a cache that cannot be used is no error."""
    told = [_variables(folder), [order.variables for order in orders]]
    key = _hash(json.dumps([text, told, _hash(CHILD.read_text(encoding="utf-8"))]))
    place = CACHE / f"{key}.json"
    with suppress(OSError, ValueError, TypeError, RuntimeError):
        found = [(text, error) for text, error in parse_json(place.expanduser().read_bytes())]
        if len(found) == len(orders):
            return found
    found = render(folder, text, orders)
    lengths = sum(len(text or "") for text, _ in found)
    if "strftime_now" not in text and lengths < CACHED:  # what tells the date holds for today alone
        with suppress(OSError, RuntimeError):
            place.expanduser().parent.mkdir(parents=True, exist_ok=True)
            write_file(place.expanduser(), json.dumps(found))
    return found


def render(folder: ModelFolder, text: str, orders: Sequence[Order]) -> list[Rendered]:
    """What a chat template makes of conversations; ModelError if it does not end in time and in bounds."""
    task = {"template": text, "variables": _variables(folder), "chats": [order.variables for order in orders]}
    command = [sys.executable, "-I", str(CHILD)]
    try:
        child = subprocess.run(
            command, input=json.dumps(task).encode(), capture_output=True, timeout=60, env={}, check=True
        )
        return [(text, error) for text, error in parse_json(child.stdout)]
    except (subprocess.SubprocessError, ValueError) as error:
        said = getattr(error, "stderr", None) or b""
        reason = (said.decode(errors="replace").strip().splitlines() or ["it was stopped"])[-1][:200]
        what = f"the chat template of {folder} could not be rendered in time and in bounds: {reason}"
        raise ModelError(what, "It is not a template that chats are written with.") from None


def _variables(folder: ModelFolder) -> dict[str, Any]:
    """What a template may name beside the messages: the special tokens of tokenizer_config.json."""
    variables: dict[str, Any] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = folder.tokenizer_config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            variables[name] = token
    return variables


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# sha256 of a published chat template -> the built-in format that stands for it
PUBLISHED: dict[str, Template] = {
    "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f": ChatML("qwen2.5", QWEN25, tools=Hermes()),
    # Qwen3 in two revisions, its 2507-Instruct, and the demo
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": QWEN3,
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5": QWEN3,
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": ChatML("chatml", tools=Hermes()),
    "94d754f89b5c462771bdd267b01a769ab6c028d5e077e0ade4e9f837c248e31d": ChatML("chatml"),
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": DEEPSEEK_R1,
    # Qwen3.5 that thinks unless told not to, Qwen3.5 that does not, Qwen3.6, and GLM-4.5
    "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715": QWEN35,
    "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80": QWEN35,
    "e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259": replace(QWEN35, tools=Tags(python=False)),
    "44f815868bf02fa458dd2f741a338046f4bf45f398eb6d067766726b9d96cce3": GLM45,
    # ChatGLM3 in two revisions: they put a blank before a text, which the model's own code does not
    "d0a00b0c9200e3aa26d889cd5b9c89e6a3dbf4135a9dfc581c822364b57a45ee": CHATGLM3,
    "e4496f930bf7b7bc7e7cf8232e90fd43ab4a9d8eb9c77f6ec98f5beb5c5cbeaa": CHATGLM3,
}
