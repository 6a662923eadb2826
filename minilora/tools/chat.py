"""`minilora chat`: talk with a model, with or without its adapter."""

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import torch

from minilora.models.decoder import Decoder

from ..adapted import without_adapters
from ..checkpoint.open_model import Opening, folder_notes, open_model
from ..errors import UsageError
from ..files.model_folder import ModelFolder, beyond
from ..files.regular import read_file
from ..generate import generate, stream_text
from ..lora import adapters
from ..positions import room
from ..sampling import Sampling, read_generation
from ..terminal import printable, say
from ..text.template import Call, Message
from ..text.tokenizer import Tokenizer, load_tokenizer
from ..text.tools import as_json, read_tools
from .typed import typed

MAX_TOOLS = 4 << 20  # bytes
HELP = """\
/base          switch the adapter off, or on again
/greedy        switch sampling off, or on again
/think         let the model think, or stop it
/system TEXT   begin a new conversation with this system prompt
/new           begin a new conversation
/quit          leave, as Ctrl-D and Ctrl-C do; during an answer Ctrl-C stops it
A pasted text is one message. The up arrow brings back what was said before."""
INT8 = "The adapter is merged into the 8-bit weights and cannot be switched off."
NO_THOUGHTS = "The model's chat format has no place for thoughts: it answers as before."
COMMANDS = ("/base", "/greedy", "/think", "/system", "/new", "/quit", "/exit", "/help")


@dataclass
class Session:
    """A conversation with a model, and the settings of its next answer."""

    model: Decoder
    tokenizer: Tokenizer
    sampling: Sampling
    stop: set[int]
    max_tokens: int
    generator: torch.Generator
    messages: list[Message]
    tools: list[dict] = field(default_factory=list)  # functions that the model may call
    called: list[Call] = field(default_factory=list)  # calls whose results are awaited
    base: bool = False
    thinking: bool = False
    greedy: bool = False
    asked: int = 0  # tokens of the last prompt
    answered: int = 0  # tokens of the last answer

    def _kept(self, tokens: Iterator[int], ids: list[int]) -> Iterator[int]:
        for token in tokens:
            self.answered += 1
            ids.append(token)
            yield token

    def forget(self, messages: list[Message]) -> None:
        """Begin a new conversation with some messages, and with the functions that there are."""
        functions = [{"role": "tools", "content": as_json(self.tools)}] if self.tools else []
        self.messages, self.called = functions + messages, []

    def reply(self, text: str) -> Iterator[str]:
        """Say something; the answer comes piece by piece and joins the conversation, also when it is stopped.

        What is said after calls are their results, one after the other; the last of them is answered.
        """
        said = [*self.messages, {"role": "tool" if self.called else "user", "content": text}]
        if len(self.called) > 1:
            self.messages, self.called, self.asked, self.answered = said, self.called[1:], 0, 0
            return
        ids, _ = self.tokenizer.render(said, prompt=True, thinking=self.thinking)
        self.asked, self.answered = len(ids), 0
        sampling = replace(self.sampling, temperature=0.0) if self.greedy else self.sampling
        with without_adapters(self.model) if self.base else nullcontext():
            new: list[int] = []
            tokens = self._kept(generate(self.model, ids, self.stop, self.max_tokens, sampling, self.generator), new)
            pieces = []
            most, learned = int(min(self.model.config.max_positions, room(self.model))), not self.model.config.rotary
            if len(ids) > most:
                yield f"[{beyond(len(ids), most, learned)}{'; /new begins a new conversation' if learned else ''}]\n"
                if learned:
                    return
            try:
                for piece in stream_text(self.tokenizer, tokens):
                    pieces.append(piece)
                    yield piece
            finally:
                content, calls = self.tokenizer.reply(new, self.tools) if self.tools else ("".join(pieces), [])
                answer = {"role": "assistant", "content": content, **({"calls": calls} if calls else {})}
                self.messages, self.called = [*said, answer], calls

    def notes(self) -> list[str]:
        """Why the last answer may be incomplete or poor, and what it waits for."""
        most, total = int(min(self.model.config.max_positions, room(self.model))), self.asked + self.answered
        cut = f"the answer was cut at {self.max_tokens:,} tokens: --max-tokens"
        over = [beyond(total, most, not self.model.config.rotary)] * (self.asked <= most < total)
        notes = [cut] * (self.answered == self.max_tokens) + over
        for call in self.called[:1]:
            notes.append(f"what you say next is what {call['name']}({as_json(call['arguments'])}) returned")
        return notes


def chat(
    model: str,
    adapter: str | None = None,
    system: str | None = None,
    prompts: list[str] | None = None,
    greedy: bool = False,
    max_tokens: int = 1024,
    think: bool = False,
    seed: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    tools: str | None = None,
    **opening: Unpack[Opening],
) -> None:
    """Talk on the terminal; if there are `prompts`, they are said one after the other, and nothing is read."""
    folder = ModelFolder(model)
    tokenizer = load_tokenizer(folder, adapter)
    functions = _functions(tools, tokenizer) if tools else []
    for name, note in folder_notes(folder, tokenizer, adapter).items():
        say(f"{name:<8}{note}")
    int8 = opening.get("int8", False)
    decoder = open_model(folder, tokenizer, adapter, say=lambda how: say(f"compute {how}"), **opening)
    wrapped = [w for _, w in adapters(decoder)]
    if wrapped and not any(bool(w.lora_B.any()) for w in wrapped):
        print("note: every lora_B is zero, this adapter changes nothing", file=sys.stderr)
    sampling, stop = read_generation(folder)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = replace(sampling, **{k: v for k, v in given.items() if v is not None})
    generator = torch.Generator().manual_seed(seed)
    session = Session(decoder, tokenizer, sampling, stop | tokenizer.stop_ids, max_tokens, generator, [], functions)
    session.forget([{"role": "system", "content": system}] if system else [])
    session.thinking, session.greedy = think, greedy or sampling.temperature == 0
    if think and not tokenizer.template.thinks:
        say(NO_THOUGHTS)
    if prompts:
        for prompt in prompts:
            say(f"> {prompt}")
            _show(session, prompt)
        return
    sys.stdin.reconfigure(errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]
    if sys.stdin.isatty():
        say(f"{folder.path.name}{' + ' + adapter if adapter else ''}   /help lists the commands")
    fixed = "" if adapter and not int8 else INT8 if adapter else "There is no adapter to switch off."
    for line in typed("> ") if sys.stdin.isatty() else _piped():
        text = _whole_characters(line).strip()
        if is_command(text):
            if not _command(session, text, fixed):
                return
        elif text:
            _show(session, text)


def _functions(path: str, tokenizer: Tokenizer) -> list[dict]:
    """The functions of a JSON file; UsageError if it is none, or the chat format is one in which they cannot be written."""
    try:
        tools = read_tools(read_file(Path(path), UsageError, MAX_TOOLS).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        what = f"--tools {path}: {error.strerror if isinstance(error, OSError) else error}"
        raise UsageError(what, "Give a JSON file with a list of functions, as OpenAI writes them.") from None
    if not tokenizer.template.tools.marks:
        what = f"tools cannot be written here in the model's chat format {tokenizer.template.name}"
        raise UsageError(what, "Take a model whose own chat template writes them, or leave --tools out.")
    return tools


def _piped() -> Iterator[str]:
    try:
        while True:
            yield input()
    except (EOFError, KeyboardInterrupt):
        return


def _whole_characters(text: str) -> str:
    """The text, with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _show(session: Session, text: str) -> None:
    """Print an answer as it comes, then how fast it came; Ctrl-C ends the answer, not the chat."""
    start = time.perf_counter()
    try:
        for piece in session.reply(text):
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    for note in session.notes():
        say(f"[{note}]")
    if sys.stdout.isatty():
        print(f"\033[2m{session.answered / max(time.perf_counter() - start, 1e-9):.1f} tokens/s\033[0m")


def is_command(text: str) -> bool:
    """Whether a text is a /command, known or mistyped; a text of several lines is one only if it is known."""
    return text.startswith("/") and ("\n" not in text or text.split()[0] in COMMANDS)


def _command(session: Session, text: str, fixed: str) -> bool:
    """Carry out a /command; False ends the chat. `fixed` says why the adapter cannot be switched, if it cannot."""
    name, rest = (*text.split(maxsplit=1), "")[:2]
    if name in ("/quit", "/exit"):
        return False
    if name == "/base":
        session.base = not session.base and not fixed
        say(fixed or ("The base model answers now." if session.base else "The adapter is on again."))
    elif name == "/new":
        session.forget([m for m in session.messages if m["role"] == "system"])
        say("A new conversation begins.")
    elif name == "/system":
        session.forget([{"role": "system", "content": rest}] if rest else [])
        say(f"A new conversation begins, {'with this system prompt' if rest else 'without a system prompt of yours'}.")
    elif name == "/greedy":
        session.greedy = not session.greedy
        if session.sampling.temperature == 0:
            session.sampling = replace(session.sampling, temperature=1.0)
        drawn = f"Tokens are drawn now, with {session.sampling.words()}."
        say("Each token is the likeliest one now." if session.greedy else drawn)
    elif name == "/think":
        session.thinking = not session.thinking
        on = "The model may think now." if session.thinking else "The model answers without thinking now."
        say(on if session.tokenizer.template.thinks else NO_THOUGHTS)
    else:
        say(HELP if name == "/help" else f"There is no command {name}. These are there:\n{HELP}")
    return True
