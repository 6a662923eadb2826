"""`minilora chat`: talk with a model, with or without its adapter."""

import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minilora.models.decoder import Decoder

from .generate import Sampling, generate, read_generation, stream_text
from .lora import adapters, without_adapters
from .model_folder import beyond
from .open_model import folder_notes, open_model
from .text.template import Message
from .text.tokenizer import Tokenizer, load_tokenizer

HELP = """\
/base     switch the adapter off, or on again      /new      forget the conversation
/system T set the system prompt                    /greedy   switch sampling off, or on again
/think    let the model think, or stop it          /quit     leave (also Ctrl-D)"""


@dataclass
class Session:
    """One conversation with a model and how its next answer is made."""

    model: Decoder
    tokenizer: Tokenizer
    sampling: Sampling
    stop: set[int]
    max_tokens: int
    generator: torch.Generator
    messages: list[Message]
    base: bool = False
    thinking: bool = False
    greedy: bool = False
    cut: bool = False  # the last answer had max_tokens, and no end

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        count = 0
        for count, token in enumerate(tokens, 1):  # noqa: B007
            yield token
        self.cut = count == self.max_tokens

    def reply(self, text: str) -> Iterator[str]:
        """Say something; the answer comes piece by piece and joins the conversation when it is whole."""
        self.messages.append({"role": "user", "content": text})
        ids, _ = self.tokenizer.render(self.messages, prompt=True, thinking=self.thinking)
        sampling = replace(self.sampling, temperature=0.0) if self.greedy else self.sampling
        with without_adapters(self.model) if self.base else nullcontext():
            tokens = self._counted(generate(self.model, ids, self.stop, self.max_tokens, sampling, self.generator))
            pieces = []
            most = self.model.config.max_positions
            if len(ids) > most:
                yield f"[{beyond(len(ids), most)}]\n"
            try:
                for piece in stream_text(self.tokenizer, tokens):
                    pieces.append(piece)
                    yield piece
            finally:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})


def chat(
    model: str, adapter: str | None = None, system: str | None = None, prompts: list[str] | None = None, greedy: bool = False,
    max_tokens: int = 1024, think: bool = False, seed: int = 0, temperature: float | None = None, top_p: float | None = None,
    top_k: int | None = None, **opening: Any,
) -> None:  # fmt: skip
    """Talk on the terminal; `prompts` are said one after the other instead of what is typed. `opening`: as for open_model."""
    folder = Path(model)
    tokenizer = load_tokenizer(folder, adapter)
    for name, note in folder_notes(folder, tokenizer).items():
        print(f"{name:<8}{note}")
    int8 = opening.get("int8", False)
    decoder = open_model(folder, tokenizer, adapter, say=lambda how: print(f"compute {how}"), **opening)
    if adapter and not int8 and not any(bool(w.lora_B.any()) for _, w in adapters(decoder)):
        print("note: every lora_B is zero, this adapter changes nothing", file=sys.stderr)
    sampling, stop = read_generation(folder)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = replace(sampling, **{k: v for k, v in given.items() if v is not None})
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    generator = torch.Generator().manual_seed(seed)
    session = Session(decoder, tokenizer, sampling, stop | tokenizer.stop_ids, max_tokens, generator, messages,
                      thinking=think, greedy=greedy or sampling.temperature == 0)  # fmt: skip
    if prompts:
        for prompt in prompts:
            print(f"> {printable(prompt)}")
            _show(session, prompt)
        return
    interactive = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]
    if interactive:
        print(f"{folder.name}{' + ' + adapter if adapter else ''}   /help lists the commands")
    while (line := _read(interactive)) is not None:
        line = line.strip()
        if line.startswith("/"):
            if not _command(session, line, bool(adapter) and not int8):
                return
        elif line:
            _show(session, line)


def _read(interactive: bool) -> str | None:
    try:
        return _whole_characters(input("> " if interactive else ""))
    except (EOFError, KeyboardInterrupt):
        if interactive:
            print()
        return None


def _whole_characters(text: str) -> str:
    """Bytes that were no UTF-8 become a replacement sign."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _show(session: Session, text: str) -> None:
    """Print an answer as it comes, then how fast it came; Ctrl-C ends the answer, not the chat."""
    start, count = time.perf_counter(), 0
    try:
        for piece in session.reply(text):
            count += 1
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    if session.cut:
        print(f"[the answer was cut at {session.max_tokens:,} tokens: --max-tokens]")
    if sys.stdout.isatty():
        print(f"\033[2m{count / max(time.perf_counter() - start, 1e-9):.1f} tokens/s\033[0m")


def printable(text: str) -> str:
    """A model's text for a terminal: control and direction characters cannot steer it."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") or c == "\u200d" else repr(c)[1:-1]
        for c in text
    )


def _command(session: Session, line: str, has_adapter: bool) -> bool:
    """Carry out a /command; False ends the chat."""
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/base":
        session.base = not session.base and has_adapter
        print(
            "the base model answers" if session.base else "the adapter is on" if has_adapter else "there is no adapter"
        )
    elif name == "/new":
        session.messages = [m for m in session.messages if m["role"] == "system"]
        print("a new conversation")
    elif name == "/system":
        session.messages = [{"role": "system", "content": rest}] if rest else []
        print("a new conversation with this system prompt" if rest else "a new conversation, no system prompt of yours")
    elif name == "/greedy":
        session.greedy = not session.greedy
        if session.sampling.temperature == 0:
            session.sampling = replace(session.sampling, temperature=1.0)
        print("the likeliest token is taken" if session.greedy else f"sampled: {session.sampling}")
    elif name == "/think":
        session.thinking = not session.thinking
        print("thinking is on" if session.thinking else "thinking is off")
    else:
        print(HELP if name == "/help" else f"there is no {name}\n{HELP}")
    return True
