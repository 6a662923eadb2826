"""Token by token from a model, for one prompt or many at once.

There is one loop, `decode`. A pass is either the prompts of new requests, packed into one stream, or one token for each
request that is running: no prompt is padded, and nothing is computed twice.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from minilora.models.cache import Cache
from minilora.models.decoder import Decoder

from .errors import not_finite
from .positions import check_room, room
from .sampling import GREEDY, Sampling, choose
from .text.growing import Growing
from .text.tokenizer import Tokenizer

PREFILL_TOKENS = 8192  # most prompt tokens of one pass, unless a single prompt has more


@dataclass(eq=False)
class Request:
    """A prompt and the answer to it, ids, which grows by a token a pass, until a token in `stop` or max_tokens ends it."""

    prompt: list[int]
    stop: set[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    generator: torch.Generator | None = None
    number: int = 0  # the caller's name for it
    ids: list[int] = field(default_factory=list)  # without the stop token
    finish_reason: str | None = None  # "stop", "length", or the caller's own

    def add(self, token: int, logits: Tensor) -> None:
        """Take the next token, which was chosen from logits [V]."""
        if token in self.stop:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        if len(self.ids) >= self.max_tokens:
            self.finish_reason = "length"


R = TypeVar("R", bound=Request)


@torch.inference_mode()
def decode(
    model: Decoder, waiting: deque[R], slots: int = 1, before: Callable[[list[R]], object] = lambda requests: None
) -> Iterator[list[R]]:
    """Answer requests, at most `slots` at a time; yields the requests that each pass advanced.

    A request leaves `waiting` when a slot is free. At any time the caller may append to `waiting`, and may end a request, waiting
    or running, by giving it a finish_reason. `before` is called with the requests of each pass, whose rows are in that order: all
    tokens of a prompt, or one. Answers do not depend on what runs beside them, up to the rounding of the model's dtype. Raises
    Diverged for logits that are not finite.
    """
    cache = Cache(model.config.layers, slots, model.head.device, model.virtual)
    running: list[R] = []
    while True:
        for slot in reversed(range(len(running))):
            if running[slot].finish_reason:
                cache.remove(slot)
                running[slot] = running[-1]
                running.pop()
        new = _admit(waiting, slots - len(running))
        for r in new:
            check_room(
                model, "a prompt", len(r.prompt), "Ask for less; of rows, --source-tail reads the end of a question."
            )
            r.max_tokens = int(min(r.max_tokens, room(model) - len(r.prompt) + 1))  # the last answer token is not read
        if not new and not running:
            return
        passed = new or list(running)
        before(passed)
        logits = _prefill(model, cache, new) if new else _advance(model, cache, running)
        running += new
        largest, chosen = torch.stack([t.double() for t in logits.max(-1)]).tolist()
        if not all(map(math.isfinite, largest)):  # the largest of any numbers and NaN is NaN
            raise not_finite("what the model computed")
        for r, row, likeliest in zip(passed, logits, map(int, chosen), strict=True):
            r.add(likeliest if r.sampling == GREEDY else choose(row, r.prompt + r.ids, r.sampling, r.generator), row)
        yield passed


def _admit(waiting: deque[R], room: int) -> list[R]:
    """Take from the queue what the next prefill can hold."""
    new: list[R] = []
    tokens = 0
    while waiting and len(new) < room and (not new or tokens + len(waiting[0].prompt) <= PREFILL_TOKENS):
        request = waiting.popleft()
        if not request.finish_reason:
            new.append(request)
            tokens += len(request.prompt)
    return new


def _prefill(model: Decoder, cache: Cache, requests: Sequence[Request]) -> Tensor:
    """Logits [requests, V] after prompts that the cache does not hold yet."""
    prefix_lens = [n for r in requests for n in model.prefix_lens(torch.tensor(r.prompt)) or ()] or None
    documents = cache.start([len(r.prompt) for r in requests], prefix_lens)
    ids = torch.tensor([i for r in requests for i in r.prompt], device=cache.device)
    last = torch.tensor(documents.cu_seqlens[1:], device=cache.device) - 1
    return model.to_logits(model(ids, documents, last))


def _advance(model: Decoder, cache: Cache, requests: Sequence[Request]) -> Tensor:
    """Logits [requests, V] after the newest token of each answer."""
    ids = torch.tensor([r.ids[-1] for r in requests], device=cache.device)
    return model.to_logits(model(ids, cache.extend()))


def generate(
    model: Decoder,
    ids: list[int],
    stop: set[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens that follow ids, one at a time, until a stop id (excluded); at most max_tokens."""
    if max_tokens < 1:
        return
    request = Request(ids, stop, max_tokens, sampling, generator)
    for _ in decode(model, deque([request])):
        if request.finish_reason != "stop":
            yield request.ids[-1]


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as it grows; a character that takes several tokens comes whole."""
    ids: list[int] = []
    shown, growing = "", Growing(tokenizer.decode)
    for token in tokens:
        ids.append(token)
        text = tokenizer.template.answer_of(growing.text(ids))
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.answer(ids)[len(shown) :]
    if rest:
        yield rest


def reply(
    model: Decoder,
    tokenizer: Tokenizer,
    messages: list[dict],
    max_tokens: int = 512,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    stop: set[int] | frozenset[int] = frozenset(),
) -> Iterator[str]:
    """The assistant's next message in a chat, piece by piece as it is written, thinking off; the same seed draws the same.

    It ends at the tokenizer's stop ids, at those in `stop`, or after max_tokens.
    """
    ids, _ = tokenizer.render(messages, prompt=True)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return stream_text(tokenizer, generate(model, ids, tokenizer.stop_ids | stop, max_tokens, sampling, generator))
