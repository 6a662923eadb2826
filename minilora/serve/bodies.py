"""What a client asks for: a JSON body of OpenAI's chat or completions API, read strictly."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import MiniloraError, quote
from ..files.strict_json import parse_json
from ..sampling import GREEDY, Sampling, random_of
from ..spelling import nearest
from ..text.tools import as_json, read_calls, read_tools
from .models import Asked, Models, Served

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_ANSWERS, MOST_STOPS, MOST_TOP = 64, 4, 20
KEYS = {"role", "content", "name", "refusal"}  # of every message
# keys that change no answer
NOT_NEEDED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# keys that are understood where they say what is done anyway
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True,), "echo": (False,), "suffix": ("",), "best_of": (1,), "modalities": (["text"],),
}  # fmt: skip


class Refused(Exception):
    """A request that is not answered: the HTTP status, and what OpenAI's error object says."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code
        # what they quote may hold half a surrogate pair
        self.message, self.param = (text and text.encode("utf-8", "replace").decode() for text in (message, param))

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and what it gets where it does not say."""

    context: int  # tokens of a prompt and its answer
    max_tokens: int  # of an answer, unless the request says
    sampling: Sampling  # the folder's own
    stop: frozenset[int]  # ids that end an answer, beside the template's


@dataclass(frozen=True)
class Asking:
    """A body that was understood: `n` answers to each of the prompts."""

    model: Served
    prompts: list[list[int]]
    chat: bool
    n: int
    max_tokens: int
    sampling: Sampling
    seed: int | None
    stop_ids: frozenset[int]
    stops: tuple[str, ...]  # texts that end an answer
    top: int | None  # how many likeliest tokens are told beside each; None: no log-probabilities at all
    stream: bool
    include_usage: bool
    tools: list[dict]  # functions that the model may call; none: calls are not told apart

    def requests(self, changed: Callable[[], object]) -> list[Asked]:
        """The requests to the engine, prompt by prompt."""
        drawn = self.seed is not None and self.sampling != GREEDY
        stop = set(self.stop_ids)
        return [
            Asked(
                prompt, stop, self.max_tokens, self.sampling, random_of(self.seed or 0, i) if drawn else None, i,
                model=self.model, top=self.top, changed=changed,
            )
            for i, prompt in enumerate([prompt for prompt in self.prompts for _ in range(self.n)])
        ]  # fmt: skip


def read_chat(raw: bytes, models: Models, limits: Limits) -> Asking:
    """The body of a chat completion; raises Refused."""
    body = Body(raw)
    model = body.model(models)
    messages, tools = _messages(body.needed("messages")), _tools(body)
    if tools:
        messages = [{"role": "tools", "content": as_json(tools)}, *messages]
    kwargs = body.get("chat_template_kwargs", dict, {})
    thinking = kwargs.get("enable_thinking", False)
    if kwargs.keys() - {"enable_thinking"} or not isinstance(thinking, bool):
        raise Refused(400, "chat_template_kwargs takes enable_thinking alone, true or false", "chat_template_kwargs")
    try:
        ids, _ = model.tokenizer.render(messages, prompt=True, thinking=thinking)
    except MiniloraError as error:  # the format cannot say this
        raise Refused(400, str(error), "messages") from None
    top = body.number("top_logprobs", int, 0, 0, MOST_TOP) if body.get("logprobs", bool, False) else None
    most = body.number("max_completion_tokens", int, None, 1)
    return replace(_asking(body, limits, model, [ids], top, most, chat=True), tools=tools)


def read_completion(raw: bytes, models: Models, limits: Limits) -> Asking:
    """The body of a completion; raises Refused."""
    body = Body(raw)
    model = body.model(models)
    prompts = _prompts(body.needed("prompt"), model)
    top = body.number("logprobs", int, None, 0, MOST_TOP)
    return _asking(body, limits, model, prompts, top, None, chat=False)


def _asking(
    body: "Body", limits: Limits, model: Served, prompts: list[list[int]], top: int | None, most: int | None, chat: bool
) -> Asking:
    sampling = replace(
        limits.sampling,
        **{
            key: value
            for key, kind, low, high in (
                ("temperature", float, 0, 2), ("top_p", float, 0, 1), ("top_k", int, 0, 2**31), ("repetition_penalty", float, 0.01, 100),
            )
            if (value := body.number(key, kind, None, low, high)) is not None
        },
    )  # fmt: skip
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:
        sampling = GREEDY
    longest = max(map(len, prompts))
    room = limits.context - longest
    older = body.number("max_tokens", int, None, 1)  # clients send both names
    most = older if most is None else most
    if room < (most or 1):
        asked = f" and max_tokens {most:,}" if most else ""
        what = f"the prompt has {longest:,} tokens{asked}: together at most {limits.context:,} are possible here"
        raise Refused(400, what, "messages" if chat else "prompt", "context_length_exceeded")
    options = body.get("stream_options", dict, {})
    n = body.number("n", int, 1, 1, MOST_ANSWERS)
    if n * len(prompts) > MOST_ANSWERS:
        raise Refused(400, f"{n * len(prompts)} answers are more than the {MOST_ANSWERS} of one request", "n")
    seed = body.number("seed", int, None, -(2**63), 2**63 - 1)
    asking = Asking(
        model, prompts, chat, n, most or min(limits.max_tokens, room), sampling, None if seed is None else seed % 2**63,
        limits.stop | model.tokenizer.stop_ids, _stops(body.get("stop", (str, list), [])), top, body.get("stream", bool, False),
        bool(options.get("include_usage")), [],
    )  # fmt: skip
    body.check_all_read()
    return asking


class Body:
    """A JSON object whose values are read by key, each of the right kind; null is as if it were not there."""

    def __init__(self, raw: bytes):
        try:
            value = parse_json(raw)
        except ValueError as error:
            raise Refused(400, f"the body is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise Refused(400, "the body is no JSON object")
        self._values = {key: value for key, value in value.items() if value is not None}
        self._read: set[str] = set()

    def needed(self, key: str) -> Any:
        if key not in self._values:
            raise Refused(400, f"{key} is missing", key)
        return self.get(key, object, None)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        self._read.add(key)
        value = self._values.get(key, default)
        if key in self._values and not isinstance(value, kind):
            raise Refused(400, f"{key} is {_kind(value)}: that does not belong there", key)
        return value

    def number(self, key: str, kind: type, default: Any, low: float, high: float = math.inf) -> Any:
        """A number within bounds, both allowed; a whole one where kind is int."""
        value = self.get(key, (int, float) if kind is float else int, default)
        if key in self._values and (isinstance(value, bool) or not low <= value <= high):
            bounds = f"from {low:g} " + (f"to {high:g}" if high < 2**31 else "on")
            raise Refused(400, f"{key} is {_kind(value)}, and can be a number {bounds}", key)
        return value

    def model(self, models: Models) -> Served:
        name = self.needed("model")
        if not isinstance(name, str) or name not in models.all:
            what = f"there is no model {quote(str(name))} here, but {', '.join(models.all)}"
            raise Refused(404, what, "model", "model_not_found")
        return models.all[name]

    def check_all_read(self) -> None:
        """Refused for a key that nothing here follows, unless it asks for what is done anyway."""
        for key in self._values.keys() - self._read - NOT_NEEDED:
            if self._values[key] not in NEUTRAL.get(key, ()):
                near = nearest(key, [*self._read])
                hint = f"; did you mean {near}?" if near and key not in NEUTRAL else ""
                raise Refused(400, f"{quote(key)} is not supported here{hint}", key)


def _kind(value: Any) -> str:
    return str(value) if isinstance(value, (int, float, bool)) else f"of type {type(value).__name__}"


def _messages(given: Any) -> list[dict]:
    """Messages as templates take them; Refused for what is no chat that an assistant could go on with."""
    if not isinstance(given, list) or not given:
        raise Refused(400, "messages is no list of messages", "messages")
    messages = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(400, f"{where} is no object with a role of {', '.join(ROLES)}", where)
        calls = message.get("tool_calls") if role == "assistant" else None
        more = {"tool": {"tool_call_id"}, "assistant": {"tool_calls"}}.get(role, set())
        other = {key for key, value in message.items() if value is not None} - KEYS - more
        if other:
            raise Refused(400, f"{where} has {quote(min(other))}, which is not supported here", where)
        content = message.get("content")
        found = {"role": ROLES[role], "content": "" if calls and content is None else _content(content, where)}
        messages.append(found | ({"calls": _read(read_calls, calls, f"{where}.tool_calls")} if calls else {}))
    return messages


def _tools(body: "Body") -> list[dict]:
    """The functions that may be called; none if the request says that none shall be."""
    choice = body.get("tool_choice", (str, dict), "auto")
    if choice not in NEUTRAL["tool_choice"]:
        raise Refused(400, "tool_choice can be auto or none here", "tool_choice")
    tools = _read(read_tools, body.get("tools", list, []), "tools")
    return [] if choice == "none" else tools


def _read(read: Callable[[Any], list[dict]], value: Any, where: str) -> list[dict]:
    try:
        return read(value)
    except ValueError as error:
        raise Refused(400, f"{where}: {error}", where) from None


def _content(content: Any, where: str) -> str:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]
    if len(texts) < len(parts):
        raise Refused(400, f"{where}: its content is neither a text nor a list of parts of type text", where)
    return _sound("".join(texts), where)


def _prompts(given: Any, model: Served) -> list[list[int]]:
    """The ids of the prompts of a completion: a text, several, the ids of one, or those of several."""
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    prompts = []
    for prompt in several:
        if isinstance(prompt, str):
            ids = model.tokenizer.encode(_sound(prompt, "prompt"))
        elif isinstance(prompt, list) and all(type(i) is int and 0 <= i < model.tokenizer.size for i in prompt):
            ids = prompt
        else:
            raise Refused(400, "prompt is neither a text nor a list of token ids, nor a list of those", "prompt")
        if not ids:
            raise Refused(400, "a prompt is empty", "prompt")
        prompts.append(ids)
    return prompts


def _stops(given: str | list) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if len(stops) > MOST_STOPS or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in stops):
        raise Refused(400, f"stop is a text or up to {MOST_STOPS} of them, each of 1 to 256 characters", "stop")
    return tuple(stops)


def _sound(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(400, f"{where} holds half a surrogate pair", where) from None
    return text
