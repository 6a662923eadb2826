"""Ollama's Modelfile: the model, the chat template, the stop tokens and the sampling settings.

Ollama renders chats with a template for Go's text/template. It is built here from what our template puts before and after each
message; a format that depends on the neighbours of a message gets none, and Ollama falls back on the GGUF file's template if it knows it.
"""

from dataclasses import replace

from ..files.model_folder import ModelFolder
from ..text.template import Message, Template, render_text
from ..text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# generation_config.json -> Ollama
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


def modelfile(model: str, tokenizer: Tokenizer, folder: ModelFolder, adapter: str | None = None) -> str:
    """The text of a Modelfile that runs a model (a file, or a name of Ollama's), with an adapter if one is given."""
    template, settings = tokenizer.template, folder.generation_config
    lines = [f"FROM {model}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    chat = go_template(template)
    if chat is not None:
        lines.append(f"TEMPLATE {_quoted(chat)}")
    if template.default_system is not None and '"""' not in template.default_system:  # which would end the text there
        lines.append(f"SYSTEM {_quoted(template.default_system)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in template.stops if stop in tokenizer.specials]
    for ours, theirs in SAMPLING.items():
        if type(settings.get(ours)) in (int, float):
            lines.append(f"PARAMETER {theirs} {settings[ours]}")
    return "\n".join(lines) + "\n"


def go_template(template: Template) -> str | None:
    """The format as a template of Go's over .Messages; None if what stands around a message depends on its neighbours."""
    plain = replace(template, default_system=None)

    def text(*roles: str, prompt: bool = False) -> str:
        messages: list[Message] = [{"role": role, "content": f"\0{role}\0"} for role in roles]
        return render_text(plain.segments(messages, prompt))

    start, turn = text(), text("user")
    before = {role: text("user", role, "user").removeprefix(turn) for role in ROLES}
    around = {role: before[role].removesuffix(turn.removeprefix(start)).split(f"\0{role}\0") for role in ROLES}
    opened = text("user", prompt=True).removeprefix(turn)
    # what the pieces make of a chat must be what the format makes of it
    chat = ("system", "user", "assistant", "user")
    pieces = start + "".join(f"\0{role}\0".join(around[role]) for role in chat) + opened
    if any(len(parts) != 2 for parts in around.values()) or pieces != text(*chat, prompt=True):
        return None
    turns = "".join(
        f'{{{{ {"else " if i else ""}if eq .Role "{role}" }}}}{"{{ .Content }}".join(around[role])}'
        for i, role in enumerate(ROLES)
    )
    return f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{opened}"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
