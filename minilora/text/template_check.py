"""Are our ids those of the folder's own chat template? The Jinja text is rendered in a process without rights, and compared."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import ModelError
from ..model_folder import read_json
from .template import Message, jinja_text
from .tokenizer import Tokenizer

CHILD = Path(__file__).parent / "jinja_child.py"
AROUND = 6  # tokens shown on each side of a difference


class Difference(NamedTuple):
    """The first place where the ids part: the chat's number, the token's number, and what stands there on each side."""

    chat: int
    token: int
    before: str
    ours: str
    theirs: str


class TemplateCheck(NamedTuple):
    """What came of a comparison; error: why the folder's template gave no text, if it did not."""

    chats: int
    same: int
    first: Difference | None
    error: str | None


def check_template(folder: Path, tokenizer: Tokenizer, chats: Sequence[list[Message]]) -> TemplateCheck:
    """Compare the ids of whole chats, and of the prompt of each one's last answer, with those of the folder's template.

    Raises ModelError if the folder has no template, or it does not end in time.
    """
    text = jinja_text(folder)
    if text is None:
        raise ModelError(f"{folder} has no chat template of its own", "There is nothing to compare with.")
    wanted = [(number, messages, False) for number, messages in enumerate(chats)]
    wanted += [(number, messages[:-1], True) for number, messages in enumerate(chats) if len(messages) > 1]
    rendered = _in_child(text, folder, [(messages, prompt) for _, messages, prompt in wanted])
    good, first, error = set(range(len(chats))), None, None
    for (number, messages, prompt), (theirs, refused) in zip(wanted, rendered, strict=True):
        if theirs is None:
            good.discard(number)
            error = error or refused
            continue
        mine = tokenizer.render(messages, prompt=prompt)[0]
        other = tokenizer.encode(theirs, specials=True)
        if mine != other:
            good.discard(number)
            first = first or _difference(number, mine, other, tokenizer)
    return TemplateCheck(len(chats), len(good), first, error)


def _difference(number: int, mine: list[int], other: list[int], tokenizer: Tokenizer) -> Difference:
    at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    shown = [tokenizer.decode(ids, specials=True) for ids in (mine[max(at - AROUND, 0) : at], mine[at : at + AROUND], other[at : at + AROUND])]  # fmt: skip
    return Difference(number, at, *shown)


def _in_child(
    template: str, folder: Path, chats: list[tuple[list[Message], bool]]
) -> list[tuple[str | None, str | None]]:
    variables: dict[str, object] = {"tools": None}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                variables[name] = token
    order = {
        "template": template,
        "variables": variables,
        "chats": [
            {
                "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                "add_generation_prompt": prompt,
                "enable_thinking": False,
            }
            for messages, prompt in chats
        ],
    }
    command = [sys.executable, "-I", str(CHILD)]
    try:
        child = subprocess.run(
            command, input=json.dumps(order).encode(), capture_output=True, timeout=60, env={}, check=True
        )
        return [(text, error) for text, error in json.loads(child.stdout)]
    except (subprocess.SubprocessError, ValueError) as error:
        said = getattr(error, "stderr", None) or b""
        reason = (said.decode(errors="replace").strip().splitlines() or ["it was stopped"])[-1][:200]
        what = f"{folder}: its chat template could not be rendered in time and in bounds: {reason}"
        raise ModelError(what, "It is not a template that chats are written with.") from None
