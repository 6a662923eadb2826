"""Token by token from a model: greedy or sampled, with a key/value cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.models.decoder import Decoder
from minilora.models.stream import Cache

from .errors import ModelError, quote
from .files.model_folder import Folder, ModelFolder
from .text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; else top_k, then top_p, then a draw.

    repetition_penalty divides the positive logits of tokens seen so far and multiplies the negative ones (Keskar et al., 2019).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def words(self) -> str:
        """The settings that have an effect, for people."""
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top_p {self.top_p:g}"] * (self.top_p < 1) + [f"top_k {self.top_k}"] * (self.top_k > 0)
        parts += [f"repetition_penalty {self.repetition_penalty:g}"] * (self.repetition_penalty != 1)
        return ", ".join(parts)


GREEDY = Sampling()


def read_generation(folder: Folder) -> tuple[Sampling, set[int]]:
    """The sampling and the stop ids of a folder's generation_config.json; greedy and none where it has none."""
    folder = ModelFolder.of(folder)
    path, j = folder / "generation_config.json", folder.generation_config
    if not j:
        return GREEDY, set()
    stop = j.get("eos_token_id")
    stop = [] if stop is None else stop if isinstance(stop, list) else [stop]

    def number(key: str, default: float) -> float:  # null is the default
        return float(default if j.get(key) is None else j[key])

    try:
        if not all(type(i) is int for i in stop):
            raise ValueError(f"eos_token_id {str(stop)[:60]} is neither a token number nor a list of them")
        sampling = Sampling(
            temperature=number("temperature", 1.0) if j.get("do_sample", False) else 0.0,
            top_p=number("top_p", 1.0),
            top_k=int(number("top_k", 50)),
            repetition_penalty=number("repetition_penalty", 1.0),
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}", "Correct the file, or take it away.") from None
    return sampling, set(stop)


# of generation_config.json: what Sampling and the stop ids take, and what says nothing of the next token
READ = {"eos_token_id", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}
HARMLESS = {
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config", "max_length", "max_new_tokens",
    "use_cache", "cache_implementation", "chat_format", "max_window_size", "return_dict_in_generate", "output_scores",
    "trust_remote_code",
}  # fmt: skip


def generation_note(folder: ModelFolder) -> str | None:
    """A line where a folder's generation_config.json asks for what answers here do not follow."""
    try:
        j = folder.generation_config
    except ModelError as error:
        return error.what
    # True is not the neutral 1 of num_beams and others
    asked = [k for k in j if k not in READ | HARMLESS and (j[k] is True or j[k] not in (None, False, "", [], {}, 0, 1))]
    other = [quote(k, 40) for k in asked]
    return f"generation_config.json has keys that answers do not follow: {', '.join(other[:6])}" if other else None


@torch.inference_mode()
def generate(
    model: Decoder,
    ids: list[int],
    stop: set[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens that follow ids, one at a time, up to and without the first of `stop`; at most max_tokens."""
    cache = Cache(model.config.layers)
    device = model.head.device
    seen = torch.tensor(ids, device=device)
    step = seen
    for _ in range(max_tokens):
        token = choose(model.logits(step, cache, last=True)[-1], seen, sampling, generator)
        if token in stop:
            return
        yield token
        step = torch.tensor([token], device=device)
        seen = torch.cat((seen, step))


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """The next token from logits [V] after the tokens seen [n]."""
    if sampling.repetition_penalty != 1.0:
        old = logits[seen]
        punished = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
        logits = logits.index_put((seen,), punished)
    if not sampling.temperature > 1e-4:  # logits / temperature would overflow
        return int(logits.argmax())
    logits = (logits / sampling.temperature).float()
    if 0 < sampling.top_k < len(logits):
        logits, ids = logits.topk(sampling.top_k)
    else:
        logits, ids = logits.sort(descending=True)
    p = logits.softmax(-1)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= sampling.top_p, 0.0)  # the smallest set whose mass reaches top_p; never empty
    p[0] = p[0].clamp(min=torch.finfo(p.dtype).tiny)
    return int(ids[torch.multinomial(p.cpu(), 1, generator=generator)])


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as it grows; a character that takes several tokens comes whole."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.answer(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.answer(ids)[len(shown) :]
    if rest:
        yield rest


def answer(
    model: Decoder,
    tokenizer: Tokenizer,
    messages: list[dict],
    stop: set[int],
    max_tokens: int = 128,
    sampling: Sampling = GREEDY,
) -> str:
    """The assistant's whole next message in a chat, thinking off."""
    ids, _ = tokenizer.render(messages, prompt=True)
    return tokenizer.answer(list(generate(model, ids, stop | tokenizer.stop_ids, max_tokens, sampling)))


def reply(
    model: Decoder,
    tokenizer: Tokenizer,
    messages: list[dict],
    max_tokens: int = 512,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
) -> Iterator[str]:
    """The assistant's next message in a chat, piece by piece as it is written, thinking off; the same seed draws the same."""
    ids, _ = tokenizer.render(messages, prompt=True)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return stream_text(tokenizer, generate(model, ids, tokenizer.stop_ids, max_tokens, sampling, generator))
