"""How the next token is chosen from the logits, and what a folder's generation_config.json says of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ModelError, quote
from .files.model_folder import Folder, ModelFolder


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


def choose(
    logits: Tensor, seen: Tensor | list[int], sampling: Sampling, generator: torch.Generator | None = None
) -> int:
    """The next token from logits [V] after the tokens seen [n]."""
    if sampling.repetition_penalty != 1.0:
        seen = torch.as_tensor(seen, device=logits.device)
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


def random_of(seed: int, number: int) -> torch.Generator:
    """The generator for the draws of prompt `number` of several."""
    # torch's CPU generator takes 32 bits of its seed: a sum or a shift would lose one of the two
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def read_generation(folder: Folder) -> tuple[Sampling, set[int]]:
    """The sampling and the stop ids of a folder's generation_config.json; greedy and none where there is no such file.

    Raises ModelError for a value that cannot be used.
    """
    folder = ModelFolder.of(folder)
    j = {key: value for key, value in folder.generation_config.items() if value is not None}  # null is the default
    if not j:
        return GREEDY, set()
    stop = j.get("eos_token_id", [])
    stop = stop if isinstance(stop, list) else [stop]
    try:
        if not all(type(i) is int for i in stop):
            raise ValueError(f"eos_token_id {str(stop)[:60]} is neither a token number nor a list of them")
        sampling = Sampling(
            temperature=_within(j, "temperature", 1.0, 0, 1e6) if j.get("do_sample") else 0.0,
            top_p=_within(j, "top_p", 1.0, 0, 1),
            top_k=int(_within(j, "top_k", 50, 0, 2**31)),
            repetition_penalty=_within(j, "repetition_penalty", 1.0, 1e-6, 1e6),
        )
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'generation_config.json'}: {error}", "Correct the file, or take it away."
        ) from None
    return sampling, set(stop)


def _within(j: dict[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = float(j.get(key, default))
    if not low <= value <= high:  # nor NaN
        raise ValueError(f"{key} is {value:g}; a number from {low:g} to {high:g} belongs there")
    return value


# keys of generation_config.json: what read_generation takes, and what does not change the next token
READ = {"eos_token_id", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}
HARMLESS = {
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config", "max_length", "max_new_tokens",
    "use_cache", "cache_implementation", "chat_format", "max_window_size", "return_dict_in_generate", "output_scores",
    "trust_remote_code",
}  # fmt: skip


def generation_note(folder: ModelFolder) -> str | None:
    """A line that names the keys of a folder's generation_config.json that answers do not follow, if there are any."""
    try:
        j = folder.generation_config
    except ModelError as error:
        return error.what
    # True is not the neutral 1 of num_beams and others
    asked = [k for k in j if k not in READ | HARMLESS and (j[k] is True or j[k] not in (None, False, "", [], {}, 0, 1))]
    other = [quote(k, 40) for k in asked]
    return f"generation_config.json has keys that answers do not follow: {', '.join(other[:6])}" if other else None
