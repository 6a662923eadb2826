"""What is sent back: the text of an answer as it grows, and the objects of OpenAI's API around it."""

import time
import uuid
from typing import Any

from ..text.growing import CONTEXT, Growing
from ..text.tools import as_json
from .bodies import Asking
from .models import Asked


class Answer:
    """The text of a request as it grows; a character of several tokens comes whole, and a stop text does not come at all."""

    def __init__(self, request: Asked, asking: Asking):
        self.request, self.stops, self._chat, self._tools = request, asking.stops, asking.chat, asking.tools
        self.text, self.tokens = "", 0  # what was read so far
        self.finish_reason: str | None = None
        self.calls: list[dict[str, Any]] = []  # there when the answer is whole
        self._growing = self._anew()

    def read(self) -> str:
        """The text that came since the last call."""
        end = self.request.finish_reason  # before the ids: if it is there, they are complete
        count, whole = len(self.request.ids), self.text
        while self.tokens < count and not self.finish_reason:
            self.tokens = (
                self.tokens + 1 if self.stops else count
            )  # a stop text ends at the same token, however late it is seen
            whole = self._decoded(self.tokens)
            at = min((i for stop in self.stops if (i := whole.find(stop)) >= 0), default=None)
            if at is not None:
                whole, self.finish_reason = whole[:at], "stop"
                self.request.finish_reason = "stop"
        if end and not self.finish_reason:
            whole, self.finish_reason = self._decoded(count, whole=True), end
            if self.calls and end == "stop":
                self.finish_reason = "tool_calls"
        done = whole if self.finish_reason else whole[: self._certain(whole)]
        new, self.text = done[len(self.text) :], max(done, self.text, key=len)
        return new

    def _anew(self) -> Growing:
        tokenizer = self.request.model.tokenizer
        before = () if self._chat else self.request.prompt[-CONTEXT:]
        return Growing(tokenizer.decode_marks if self._tools else tokenizer.decode, before)

    def _decoded(self, count: int, whole: bool = False) -> str:
        ids, template = self.request.ids[:count], self.request.model.tokenizer.template
        text = (self._anew() if whole else self._growing).text(ids)
        if self._tools and whole:
            text, calls = template.tools.read(text, self._tools)
            self.calls = [_called(call) for call in calls]
        elif self._tools:  # what stands before calls for certain
            text = text[: template.tools.start(text)]
        return template.answer_of(text) if self._chat else text

    def _certain(self, text: str) -> int:
        """How much of an unfinished text stays as it is: without half a character, and without what may begin a stop text."""
        text = text.rstrip("\ufffd")
        held = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return len(text) - max(held, default=0)


def _called(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": as_json(call["arguments"])}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


class Reply:
    """The JSON objects of one request to the API: a whole reply, or chunks of it."""

    def __init__(self, asking: Asking, answers: list[Answer]):
        self.asking, self.answers = asking, answers
        self._kind = "chat.completion" if asking.chat else "text_completion"
        name = "chatcmpl" if asking.chat else "cmpl"
        self._head = {"id": f"{name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asking.model.name}

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(self.answers):
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            if answer.calls:
                message |= {"content": answer.text or None, "tool_calls": answer.calls}
            text = {"message": message} if self.asking.chat else {"text": answer.text}
            choices.append(
                {"index": index, **text, "logprobs": self._logprobs(answer, 0), "finish_reason": answer.finish_reason}
            )
        return {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of an answer in a chat."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})  # fmt: skip

    def chunks(self, index: int) -> list[dict[str, Any]]:
        """Chunks of what came of an answer since the last call."""
        answer = self.answers[index]
        if answer.finish_reason:
            return []
        first, length = answer.tokens, len(answer.text)
        new = answer.read()
        found = []
        if new or (answer.tokens > first and self.asking.top is not None):
            text = {"delta": {"content": new}} if self.asking.chat else {"text": new}
            logprobs = self._logprobs(answer, first, length)
            found.append({"index": index, **text, "logprobs": logprobs, "finish_reason": None})
        if answer.calls:
            told = [{"index": number, **call} for number, call in enumerate(answer.calls)]
            found.append({"index": index, "delta": {"tool_calls": told}, "logprobs": None, "finish_reason": None})
        if answer.finish_reason:
            text = {"delta": {}} if self.asking.chat else {"text": ""}
            found.append({"index": index, **text, "logprobs": None, "finish_reason": answer.finish_reason})
        return [self._chunk(choice) for choice in found]

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._chunk(), "usage": self._usage()}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        kind = self._kind + ".chunk" * self.asking.chat
        return {**self._head, "object": kind, "choices": list(choices)} | (
            {"usage": None} if self.asking.include_usage else {}
        )

    def _usage(self) -> dict[str, int]:
        asked, answered = sum(map(len, self.asking.prompts)), sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}

    def _logprobs(self, answer: Answer, first: int, offset: int = 0) -> dict[str, Any] | None:
        """The log-probabilities of the tokens from `first` on, whose text begins at `offset`."""
        if self.asking.top is None:
            return None
        decode = answer.request.model.tokenizer.decode

        def named(token: int, logprob: float) -> dict[str, Any]:
            text = decode([token], specials=True)
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        ids = answer.request.ids[first : answer.tokens]
        told = [
            named(token, logprob) | {"top_logprobs": [named(*other) for other in top]}
            for token, (logprob, top) in zip(ids, answer.request.logprobs[first : answer.tokens], strict=True)
        ]
        if self.asking.chat:
            return {"content": told, "refusal": None}
        offsets = [offset]
        for entry in told:
            offsets.append(offsets[-1] + len(entry["token"]))
        return {
            "tokens": [entry["token"] for entry in told],
            "token_logprobs": [entry["logprob"] for entry in told],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in told],
            "text_offset": offsets[:-1],
        }
