"""Tools in a request and calls in the reply, asked by the openai client; what the model says is written by the test."""

from dataclasses import replace

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from served import make_models, running

from minilora.generate import Request
from minilora.serve.models import Asked
from minilora.text.template import ToolFormat
from minilora.text.tools_glm import CallTurns
from minilora.text.tools_qwen import Hermes

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"k": {"type": "string"}}}},
    }
]
ASKED = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"k": "é", "n": 2}}\n</tool_call>'
HISTORY = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"k": "v"}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": "r"},
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(models):
    with running(models, context=4096) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:  # fmt: skip
        yield client


@pytest.fixture
def says(models, monkeypatch):
    """says(text, form): let every model say that text, and write tools in that form."""

    def script(text: str, form: ToolFormat = Hermes()) -> None:  # noqa: B008 it does not change
        tokenizer = models.base.tokenizer
        monkeypatch.setattr(tokenizer, "template", replace(tokenizer.template, tools=form))
        ids = [*tokenizer.encode(text), 258]
        monkeypatch.setattr(Asked, "add", lambda self, _, logits: Request.add(self, ids[len(self.ids)], logits))

    return script


def ask(client, messages=ASKED, tools=TOOLS, **more):
    return client.chat.completions.create(model="tiny", messages=messages, tools=tools, max_tokens=400, **more)


def streamed(client, **more) -> tuple[str, list, str]:
    """The text, the calls and the reason of a streamed answer."""
    text, calls, reason = "", [], ""
    for chunk in ask(client, stream=True, **more):
        delta = chunk.choices[0].delta
        text, reason = text + (delta.content or ""), chunk.choices[0].finish_reason or reason
        calls += [(call.index, call.function.name, call.function.arguments) for call in delta.tool_calls or []]
    return text, calls, reason


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        (f"Let me see.\n{CALL}", "Let me see.", 1), (f"{CALL}\n{CALL}", None, 2), ("No call.\n", "No call.\n", 0),
        ("Half a <tool_call>\n{", "Half a <tool_call>\n{", 0), ("a < b <tool", "a < b <tool", 0),
    ],
)  # fmt: skip
def test_calls_are_told_apart_whole_and_in_a_stream(client, says, said: str, text: str | None, calls: int):
    says(said)
    choice = ask(client).choices[0]
    found = choice.message.tool_calls or []
    assert (choice.message.content, len(found), choice.finish_reason) == (
        text,
        calls,
        "tool_calls" if calls else "stop",
    )
    assert all(call.function.name == "f" and call.function.arguments == '{"k": "é", "n": 2}' for call in found)
    assert len({call.id for call in found}) == calls
    told = [(number, "f", '{"k": "é", "n": 2}') for number in range(calls)]
    assert streamed(client) == (text or "", told, choice.finish_reason)


def test_a_call_of_glm4_is_a_turn(client, says):
    says('f\n{"k": "v"}', CallTurns())
    assert streamed(client) == ("", [(0, "f", '{"k": "v"}')], "tool_calls")
    says("\nhello", CallTurns())
    assert streamed(client) == ("\nhello", [], "stop")


def test_without_tools_or_with_none_to_choose_what_is_said_is_text(client, says):
    says(CALL)
    for more in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}):
        choice = ask(client, **more).choices[0]
        assert choice.message.content == CALL and not choice.message.tool_calls and choice.finish_reason == "stop"


def test_the_prompt_has_the_functions_the_calls_and_their_results(client, models, says):
    says("ok")
    messages = [
        {"role": "tools", "content": '[{"type": "function", "function": {"name": "f"}}]'}, ASKED[0],
        {"role": "assistant", "content": "", "calls": [{"name": "f", "arguments": {"k": "v"}}]}, {"role": "tool", "content": "r"},
    ]  # fmt: skip
    wanted = len(models.base.tokenizer.render(messages, prompt=True)[0])
    found = ask(client, HISTORY, [{"type": "function", "function": {"name": "f"}}], parallel_tool_calls=True)
    assert found.usage.prompt_tokens == wanted


WRONG = {
    "a forced call": {"tool_choice": "required"},
    "a certain call": {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    "one call": {"parallel_tool_calls": False},
    "no function": {"tools": [{"type": "function"}]},
    "another kind": {"tools": [{"type": "web_search"}]},
    "a broken call": {"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    "a call of the user": {"messages": [ASKED[0] | {"tool_calls": HISTORY[1]["tool_calls"]}]},
    "a result that is no text": {"messages": [{"role": "tool", "content": {"r": 1}}]},
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_refused_by_name(client, says, case: str):
    says("ok")
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **WRONG[case])
    assert error.value.param.startswith(next(iter(WRONG[case])))


def test_a_format_without_tools_refuses_them(client, says):
    says("ok", ToolFormat())
    with pytest.raises(openai.BadRequestError, match="in the chat format chatml"):
        ask(client)
